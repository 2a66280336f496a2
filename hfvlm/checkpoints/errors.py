"""The error that every reader of checkpoints raises."""

from hfvlm.checks.messages import cut


class CheckpointError(ValueError):
    """A file that cannot be read, or that holds what a checkpoint has no use for. Messages are short and printable."""

    def __init__(self, message: str = ""):
        super().__init__(cut(message))
