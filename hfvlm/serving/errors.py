"""The error of a request that is refused."""

from collections.abc import Iterator
from contextlib import contextmanager

from hfvlm.checks.messages import cut
from hfvlm.media.rows import UNREADABLE


class RequestError(Exception):
    """A request that is not answered; the message names what is wrong with it and the remedy.

    Args:
        message: for whoever sent the request.
        status: of HTTP.
    """

    def __init__(self, message: str, status: int = 422):
        super().__init__(cut(message))
        self.status = status


@contextmanager
def refusing() -> Iterator[None]:
    """Refuse a request whose media or values cannot be used.

    Raises:
        RequestError: with 422; with 501 where a decoder is not installed.
    """
    try:
        yield
    except UNREADABLE as error:
        raise RequestError(str(error)) from error
    except ImportError as error:
        raise RequestError(str(error), 501) from error
