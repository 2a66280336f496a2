"""Files and folders that appear whole or not at all."""

import ctypes
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows; there nothing is swept, since no lock shows which process is at work
    fcntl = None  # type: ignore[assignment]

# Beginning and end of the names of unfinished folders, after the output's own name.
UNFINISHED, OLD = "-hfvlm-", "-old"
EXCHANGE = 2  # RENAME_EXCHANGE of linux/fs.h
HERE = -100  # AT_FDCWD


@contextmanager
def new_folder(output: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a folder next to `output` to write into; it is renamed to `output` when the block succeeds, and removed
    when it fails.

    If the process is killed, the earlier output or the new one exists; what an earlier run left is put back or removed
    first. A link is followed: its target is replaced.

    Raises:
        FileExistsError: `output` exists, is not an empty folder, and `overwrite` is off.
    """
    named, output = Path(output), Path(output)
    if output.is_symlink():
        output = output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    sweep(output)
    if not overwrite and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(
            f"{named} exists already: choose another output, or pass overwrite=True (--overwrite in a terminal)."
        )
    temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}{UNFINISHED}", dir=output.parent))
    lock = _lock(temporary)
    try:
        yield temporary
        temporary.chmod(0o755)
        _replace(temporary, output)
    finally:
        try:
            shutil.rmtree(temporary, ignore_errors=True)
        finally:
            if lock is not None:
                os.close(lock)


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a file next to `path` to write into; it is renamed to `path` when the block succeeds, and removed when it
    fails."""
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sweep(output: Path) -> None:
    """Put back what a killed run had moved away, and remove what such runs left unfinished."""
    start = f".{output.name}{UNFINISHED}"
    if fcntl is None:
        return
    left = [path for path in output.parent.iterdir() if path.name.startswith(start)]
    for path in sorted(left, key=lambda path: not path.name.endswith(OLD)):
        if path.is_symlink() or (lock := _lock(path)) is None:
            continue  # another process is at work in it
        try:
            if path.name.endswith(OLD) and not output.exists():
                path.rename(output)
            else:
                _remove(path)
        finally:
            os.close(lock)


def _replace(temporary: Path, output: Path) -> None:
    if not os.path.lexists(output):
        temporary.rename(output)
    elif _exchanged(temporary, output):
        _remove(temporary)
    else:  # in two steps, which `sweep` completes if this process is killed between them
        old = temporary.with_name(f"{temporary.name}{OLD}")
        output.rename(old)
        try:
            temporary.rename(output)
        except BaseException:
            old.rename(output)
            raise
        _remove(old)


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two paths atomically, where the system and the file system can."""
    if not sys.platform.startswith("linux"):
        return False
    with suppress(OSError, AttributeError):
        rename = ctypes.CDLL(None, use_errno=True).renameat2
        return rename(HERE, os.fsencode(one), HERE, os.fsencode(other), EXCHANGE) == 0
    return False


def _lock(path: Path) -> int | None:
    """Lock `path` until the descriptor is closed, or this process ends; None if another process holds it."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
