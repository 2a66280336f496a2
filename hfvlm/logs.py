"""The one logger of hfvlm."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class FollowingLogger(logging.Logger):
    """A logger with the level of transformers' logger until it is given one of its own.

    `transformers.utils.logging.set_verbosity_error()` and TRANSFORMERS_VERBOSITY so quiet hfvlm, too.
    """

    @property
    def level(self) -> int:
        """The level of its own, else that of transformers' logger."""
        return self.__dict__.get("level") or logging.getLogger("transformers").getEffectiveLevel()

    @level.setter
    def level(self, level: int) -> None:
        self.__dict__["level"] = level


@contextmanager
def logged_once(name: str) -> Iterator[None]:
    """Let one record of a logger through, of many alike in the block."""
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
    """Check whether bars are shown: `transformers.utils.logging.disable_progress_bar()` and
    HF_HUB_DISABLE_PROGRESS_BARS switch hfvlm's off, too."""
    from huggingface_hub.utils import are_progress_bars_disabled

    return not are_progress_bars_disabled()


def tracked(items: Iterable[T], text: str, total: int) -> Iterable[T]:
    """Yield the items, with a bar on the terminal's error stream, where bars are shown."""
    from rich.console import Console
    from rich.progress import track

    return track(items, text, total, console=Console(stderr=True)) if shows_progress() else items


logger = logging.getLogger("hfvlm")
if type(logger) is logging.Logger:  # a class of the application's choice stays
    logger.__class__ = FollowingLogger
