"""Files and folders that appear whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(output: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder beside `output` to write into; it takes that name when the block ends well, and goes when it fails.

    Raises:
        FileExistsError: there is an `output` that is not an empty folder, and `overwrite` is off.
    """
    output = Path(output)
    if not overwrite and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(
            f"{output} exists already: choose another output, or pass overwrite=True (--overwrite in a terminal)."
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        yield beside
        beside.chmod(0o755)
        if output.exists():
            old = beside.with_name(f"{beside.name}-old")
            output.rename(old)
            beside.rename(output)
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        else:
            beside.rename(output)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A file beside `path` to write into; it takes that name when the block ends well, and goes when it fails."""
    beside = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        yield beside
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
