"""The error that every reader raises."""


class MediaError(ValueError):
    """An input that cannot be read, is too large, or is refused; the message names it and the remedy."""
