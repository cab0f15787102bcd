"""The one error of this package."""


class ShardError(ValueError):
    """A shard set, a sample or a request for one is wrong; the message names what and where."""
