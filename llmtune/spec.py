"""What recipe sections are made of: closed models, kinds of numbers, and adapters: what the parameters are."""


class PlanError(ValueError):
    """A method that makes no sense or that the model cannot follow; `key` is the dotted key within its section."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key
