"""Users' files: only regular ones, bounded in size."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hfvlm.checks.messages import cut, shown

LARGEST_JSON = 2**22
# Of JSON, the bytes that go with each list or dictionary at the least: a flood of empty ones takes 20 times its size.
BYTES_A_CONTAINER = 8


def check_regular(path: Path, error: type[Exception]) -> None:
    """Refuse devices, pipes and sockets, which may never end.

    Raises:
        FileNotFoundError: there is no such file.
        error: it is a folder or no regular file.
    """
    try:
        regular, there = path.is_file(), path.exists()
    except (OSError, ValueError) as problem:
        raise error(f"{shown(str(path))}: no name of a file ({problem}).") from problem
    if not there:
        raise FileNotFoundError(f"{cut(str(path), 300)}: no such file.")
    if not regular:
        raise error(f"{path}: no regular file, but a {'folder' if path.is_dir() else 'device or pipe'}.")


def read_bytes(path: Path, most: int, error: type[Exception]) -> bytes:
    """Read a regular file of at most `most` bytes.

    Raises:
        FileNotFoundError: there is no such file.
        error: it is larger, or no regular file.
    """
    check_regular(path, error)
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise error(f"{path}: more than {most} bytes, which no file of its kind has.")
    return data


def read_json(path: Path, error: type[Exception], most: int = LARGEST_JSON) -> dict[str, Any]:
    """Read the dictionary in a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        error: it is no JSON, no dictionary, names a key twice, or is larger than `most` bytes.
    """
    data = read_bytes(path, most, error)
    if data.count(b"[") + data.count(b"{") > 1000 + len(data) // BYTES_A_CONTAINER:
        raise error(f"{path}: a flood of empty lists, not a file of its kind.")
    with refusing(path, "not a JSON file", error):
        content = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_unique)
    if not isinstance(content, dict):
        raise error(f"{path}: holds a {type(content).__name__}, expected names and values between braces.")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"{shown(twice)} is there twice")
    return content


@contextmanager
def refusing(path: Path, what: str, error: type[Exception], ours: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Raise whatever goes wrong inside as `error`, which names the file: foreign bytes can fail in every way.

    Errors of the type `error`, and `ours`, pass as they are.
    """
    passing: tuple[type[Exception], ...] = (error, FileNotFoundError, *ours)
    try:
        yield
    except passing:
        raise
    except BaseException as problem:
        # Rust's panics derive from BaseException only.
        if not isinstance(problem, Exception) and type(problem).__name__ != "PanicException":
            raise
        reason = cut(f"{type(problem).__name__}: {problem}" if str(problem) else type(problem).__name__, 300)
        raise error(f"{path}: {what} ({reason}).") from problem


class FolderError(ValueError):
    """A folder whose files make no processor or tokenizer; the message names both."""

    def __init__(self, message: str = ""):
        super().__init__(cut(message))


class FolderTypeError(FolderError, TypeError):
    """Likewise, where a value is of the wrong type."""


class NamedErrors:
    """Base of classes whose `from_pretrained` names the folder in every error."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load as transformers does, with other errors.

        Raises:
            FolderError: the folder's files make no sense.
            OSError: there are no such files.
        """
        try:
            return super().from_pretrained(*args, **kwargs)  # type: ignore[misc]
        except (FolderError, OSError, ImportError):
            raise
        except Exception as error:  # foreign values can make no sense in every way
            kind = FolderTypeError if isinstance(error, TypeError) else FolderError
            reason = " ".join(cut(str(error), 600).split()) or type(error).__name__
            source = args[0] if args else kwargs.get("pretrained_model_name_or_path")
            raise kind(f"{cut(str(source), 300)}: makes no {cls.__name__}: {reason}") from error
