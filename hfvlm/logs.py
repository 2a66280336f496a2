"""The one logger of hfvlm."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


class FollowingLogger(logging.Logger):
    """A logger with the level of transformers' logger until it is given one of its own.

    `transformers.utils.logging.set_verbosity_error()` and TRANSFORMERS_VERBOSITY so quiet hfvlm, too.
    """

    @property
    def level(self) -> int:
        """The level of its own, else the level at which transformers' logger speaks."""
        return self.__dict__.get("level") or logging.getLogger("transformers").getEffectiveLevel()

    @level.setter
    def level(self, level: int) -> None:
        self.__dict__["level"] = level


@contextmanager
def said_once(name: str) -> Iterator[None]:
    """Let one record of a logger through, of many alike that the block may give."""
    repeated = iter([True])

    def first(_: logging.LogRecord) -> bool:
        return next(repeated, False)

    quieted = logging.getLogger(name)
    quieted.addFilter(first)
    try:
        yield
    finally:
        quieted.removeFilter(first)


def shows_progress() -> bool:
    """Whether bars are shown: `transformers.utils.logging.disable_progress_bar()` and HF_HUB_DISABLE_PROGRESS_BARS
    switch hfvlm's off, too."""
    from huggingface_hub.utils import are_progress_bars_disabled

    return not are_progress_bars_disabled()


logger = logging.getLogger("hfvlm")
if type(logger) is logging.Logger:  # a class of the application's choice stays
    logger.__class__ = FollowingLogger
