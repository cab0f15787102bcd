"""The error of this room that a person can act on."""


class PipelineError(ValueError):
    """What makes a run impossible: a setting, a machine, a number; shown without a traceback."""
