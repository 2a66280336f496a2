"""The outputs that commands may replace: only those that hfvlm wrote."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

# The files of a model's folder; tokenizers within a processor have a folder of their own.
MODEL_FILES = (
    "README.md", "NOTICE", ".gitattributes", "config.json", "generation_config.json", "conversion.json",
    "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json",
    "model*.safetensors", "model.safetensors.index.json", "adapter_config.json", "adapter_model.safetensors",
    "processor_config.json", "*preprocessor_config.json", "tokenizer*.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.model", "chat_template.j*",
)  # fmt: skip
PARTS = ("*tokenizer", "additional_chat_templates")
# Marks of generated cards.
TEMPLATES = ("# Model Card for Model ID", "generated_from_trainer", "library_name: peft", "library_name: transformers")
GENERATOR = '<meta name="generator" content="hfvlm">'


def check_output(output: Path, *, overwrite: bool) -> None:
    """Refuse to replace a folder that is not a model's, written by hfvlm and nothing else.

    Raises:
        FileExistsError: there is something else in it; the message names it.
    """
    if not overwrite or not output.exists() or is_empty(output):
        return
    if not output.is_dir():
        raise FileExistsError(f"{output}: is a file, which hfvlm did not write: choose another output.")
    if foreign := foreign_files(output):
        raise FileExistsError(f"{output}: has {foreign[0]}, which hfvlm did not write: choose another output.")
    if not written_here(output):
        raise FileExistsError(f"{output}: was not written by hfvlm: choose another output.")


def is_empty(folder: Path) -> bool:
    """Check whether a path is a folder without content."""
    return folder.is_dir() and not any(folder.iterdir())


def foreign_files(folder: Path, known: Sequence[str] = ()) -> list[str]:
    """List the entries of a model's folder that are none of a model's, nor otherwise known, by name."""
    files = (*MODEL_FILES, *known)
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_symlink() or not any(fnmatch(path.name, name) for name in (PARTS if path.is_dir() else files))
    )


def written_here(folder: Path) -> bool:
    """Check whether the files of a model's folder name hfvlm as their origin."""
    if "hfvlm" in read_json(folder / "conversion.json"):
        return True
    if str(read_json(folder / "config.json").get("model_type", "")).startswith("hfvlm_"):
        return True
    return "hfvlm" in metadata(folder / "model.safetensors")


def metadata(path: Path) -> dict[str, str]:
    """Read the metadata of a safetensors file; empty for any other file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as opened:
            return opened.metadata() or {}
    except (OSError, SafetensorError):
        return {}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def check_card(folder: Path, *, overwrite: bool) -> None:
    """Refuse to replace a card that somebody wrote.

    Raises:
        FileExistsError: README.md is neither hfvlm's nor a template.
    """
    path = folder / "README.md"
    if overwrite or not path.exists():
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    if "library_name: hfvlm" not in text and not any(mark in text for mark in TEMPLATES):
        raise FileExistsError(f"{path}: hfvlm did not write it: move it away, or replace it with --overwrite.")


def check_place(path: Path) -> None:
    """Refuse a file that could not be written.

    Raises:
        FileExistsError: it is a folder.
        FileNotFoundError: the folder that it would lie in is not there.
    """
    if path.is_dir():
        raise FileExistsError(f"{path}: is a folder: choose a file as output.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}: make it first.")


def check_page(path: Path | None, *, overwrite: bool) -> None:
    """Refuse to replace a page that hfvlm did not write.

    Raises:
        FileExistsError: it is something else.
        FileNotFoundError: the folder that it would lie in is not there.
    """
    if path is None:
        return
    check_place(path)
    if overwrite or not path.exists():
        return
    with path.open("rb") as file:
        if GENERATOR.encode() not in file.read(4096):
            raise foreign_file(path)


def check_image(path: Path | None, *, overwrite: bool) -> None:
    """Refuse to replace an image that hfvlm did not draw; its own PNG files have a mark.

    Raises:
        FileExistsError: it is something else.
        FileNotFoundError: the folder that it would lie in is not there.
        ValueError: no image can be written by its ending.
    """
    from PIL import Image, UnidentifiedImageError

    from hfvlm.media.images import image_format

    if path is None:
        return
    check_place(path)
    image_format(path)
    if overwrite or not path.exists():
        return
    try:
        with Image.open(path) as image:
            if image.info.get("Software") == "hfvlm":
                return
    except (OSError, UnidentifiedImageError):
        pass
    raise foreign_file(path)


def foreign_file(path: Path) -> FileExistsError:
    """Return the error of a file that is not replaced."""
    return FileExistsError(f"{path}: hfvlm did not write it: choose another output, or replace it: --overwrite.")


@contextmanager
def report_folder(output: Path | None, *, overwrite: bool) -> Iterator[Path | None]:
    """Yield a folder to write a report into, whose files are moved into `output`, among what is there, when the block
    succeeds; None for None.

    Raises:
        FileExistsError: `output` is a file, or has a report that hfvlm did not write.
    """
    from hfvlm.evaluation.report import JSON_NAME, PAGE_NAME

    if output is None:
        yield None
        return
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"{output}: is a file: choose another output.")
    overwrite = overwrite or "hfvlm" in read_json(output / JSON_NAME)
    if output.exists():
        check_page(output / PAGE_NAME, overwrite=overwrite)
    if (output / JSON_NAME).exists() and not overwrite:
        raise foreign_file(output / JSON_NAME)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as temporary:
        yield Path(temporary)
        output.mkdir(exist_ok=True)
        for file in Path(temporary).iterdir():
            file.replace(output / file.name)
