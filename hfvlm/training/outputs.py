"""The output folder of a training run, and what a run may replace there."""

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

logger = logging.getLogger(__name__)

# The files of a run in its output_dir.
RUN_FILES = (
    "checkpoint-*", "model*.safetensors", "model.safetensors.index.json", "adapter_*", "config.json",
    "generation_config.json", "processor_config.json", "*preprocessor_config.json", "tokenizer*", "*tokenizer",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.j*",
    "README.md", "NOTICE", "trainer_state.json", "training_args.bin", "*_results.json", "curve.png",
    "moved.json",
)  # fmt: skip
PROOFS = ("trainer_state.json", "training_args.bin", "checkpoint-*")


@contextmanager
def run_output(output: Path, *, overwrite: bool, resume: bool) -> Iterator[None]:
    """Prepare a run's output_dir: new, resumed, or in place of an earlier run's, which is removed when this succeeds.

    Only the first process of a distributed run does so.

    Args:
        output: the folder.
        overwrite: replace what an earlier run wrote; what is not a run's stays.
        resume: resume from a checkpoint in it.

    Raises:
        FileExistsError: it holds a run, and neither is on; or it holds a model that no run wrote.
        FileNotFoundError: there is no checkpoint to resume from.
    """
    if int(os.environ.get("RANK", "0")):
        yield
        return
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"{output}: is a file: name another output_dir.")
    if resume:
        if not any(output.glob("checkpoint-*")):
            raise FileNotFoundError(f"{output}: has no checkpoint to resume from.")
        yield
        return
    earlier = matching(output, RUN_FILES)
    if earlier and not overwrite:
        first = (matching(output, PROOFS) or earlier)[0].name
        raise FileExistsError(
            f"{output}: has {first}, of an earlier run: resume it (--resume), replace it (--overwrite), "
            "or name another output_dir."
        )
    if earlier and not matching(output, PROOFS):
        raise FileExistsError(f"{output}: has {earlier[0].name}, which no run wrote: name another output_dir.")
    with set_aside(output, earlier):
        yield


def matching(folder: Path, names: tuple[str, ...]) -> list[Path]:
    """Return the entries of a folder that match names."""
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    return [entry for entry in entries if any(fnmatch(entry.name, name) for name in names)]


@contextmanager
def set_aside(output: Path, entries: list[Path]) -> Iterator[None]:
    """Move entries of a folder away during the block: they are removed when it succeeds, and put back when it fails,
    unless what was written in their place can be resumed."""
    if not entries:
        yield
        return
    aside = Path(tempfile.mkdtemp(prefix=".earlier-", dir=output))
    for entry in entries:
        entry.rename(aside / entry.name)
    try:
        yield
    except BaseException:
        restore(output, aside)
        raise
    shutil.rmtree(aside)


def restore(output: Path, aside: Path) -> None:
    """Put an earlier run back in place of one that failed before its first checkpoint."""
    if any(output.glob("checkpoint-*")):
        logger.warning("%s: this run can be resumed; the earlier one is in %s.", output, aside)
        return
    for entry in matching(output, RUN_FILES):
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    for entry in aside.iterdir():
        entry.rename(output / entry.name)
    aside.rmdir()
