"""The error that every job says in one line."""


class EvaluationError(ValueError):
    """An input of the evaluation is wrong; the message is all the user needs."""
