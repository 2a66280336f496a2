"""Folders on their way to the Hub."""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers import AutoConfig
from transformers.utils import logging

from hfvlm.presets.cards import rename, write_card
from hfvlm.presets.licences import check_folder
from hfvlm.registry import Architecture, architecture_of
from hfvlm.release.fingerprints import RECORD, read_json, weight_files
from hfvlm.release.plans import empty_model
from hfvlm.release.sentence_files import write_sentence_files
from hfvlm.versions import __version__

__all__ = ["STUB", "Upload", "push", "stub_text", "write_card", "write_stub"]

logger = logging.get_logger(__name__)

STUB = "hfvlm_stub"
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")


class UploadError(ValueError):
    """A folder that cannot be sent as it is."""


@dataclass(frozen=True)
class Upload:
    """What a push sends.

    Args:
        repo_id: where to.
        files: bytes by the files' paths in the folder.
        left_out: why, by the paths of what is not sent.
        card: README.md's content.
    """

    repo_id: str
    files: Mapping[str, int]
    left_out: Mapping[str, str]
    card: str

    def __str__(self) -> str:
        lines = [f"{self.repo_id}: {len(self.files)} files, {sum(self.files.values()):,} bytes"]
        lines += [f"  {name}  {size:,}" for name, size in self.files.items()]
        lines += [f"  not sent: {name} ({reason})" for name, reason in self.left_out.items()]
        return "\n".join(lines)


def push(
    folder: str | Path,
    repo_id: str,
    *,
    accept_licence: bool = False,
    stub: bool = False,
    private: bool | None = None,
    token: str | None = None,
    dry_run: bool = False,
) -> Any:
    """Upload a folder with its card to the Hub.

    Regular files are sent, and listed in the log: no symbolic links, nothing whose name begins with a dot, no
    checkpoints of an unfinished training.

    Args:
        folder: as `convert`, `save_pretrained` or PEFT wrote it.
        repo_id: "user/name"; it is made if there is none.
        accept_licence: you have read the licence of non-commercial, special or unknown weights.
        stub: add a one-file stub and an `auto_map`, so that `trust_remote_code=True` replaces `import hfvlm` where
            hfvlm is installed. The Hub then tags the repository as custom code.
        private: visibility of a new repository.
        token: of the Hub; by default the stored one.
        dry_run: upload nothing.

    Returns:
        The commit's address; with `dry_run`, an `Upload` with the files and the card.

    Raises:
        LicenceError: see `accept_licence`.
        UploadError: the folder is no model of hfvlm's, or its weights or its configuration would not be sent.
    """
    folder = Path(folder)
    check_folder(folder, accepted=accept_licence)
    with tempfile.TemporaryDirectory() as temporary:
        staged = Path(temporary) / (folder.resolve().name or "model")
        left_out = stage(folder, staged)
        check_complete(folder, staged, left_out)
        write_named_card(staged, repo_id)
        if (staged / "config.json").exists() and not any(
            (staged / name).exists() for name in ("modules.json", RECORD)
        ):
            write_sentence_files(staged, empty_model(AutoConfig.from_pretrained(staged)))
        if stub:
            write_stub(staged)
        sizes = {name: (staged / name).stat().st_size for name in sorted(files_under(staged))}
        upload = Upload(repo_id, sizes, left_out, (staged / "README.md").read_text(encoding="utf-8"))
        if dry_run:
            return upload
        logger.info(str(upload))
        api = HfApi(token=token)
        api.create_repo(repo_id, exist_ok=True, private=private)
        return api.upload_folder(repo_id=repo_id, folder_path=staged, commit_message=f"hfvlm {__version__}")


def stage(folder: Path, staged: Path) -> dict[str, str]:
    """Put what is sent into a folder of its own: small files as copies, weights as links to where they lie.

    Returns:
        What is left out, with the reason.
    """
    staged.mkdir()
    left_out = {}
    for path in walk(folder):
        name = path.relative_to(folder).as_posix()
        if reason := reason_to_leave(path):
            left_out[name] = reason
        elif path.is_dir():
            (staged / name).mkdir()
        elif path.suffix in (".json", ".md", ".py"):
            shutil.copyfile(path, staged / name, follow_symlinks=False)
        else:
            link(path, staged / name)
    return left_out


def link(path: Path, place: Path) -> None:
    """Link to a file, or copy it where the system makes no links."""
    try:
        place.symlink_to(path.absolute())
    except OSError:
        shutil.copyfile(path, place, follow_symlinks=False)


def walk(folder: Path) -> Iterator[Path]:
    """Yield what is in a folder, and in those of its folders that are sent."""
    for path in sorted(folder.iterdir()):
        yield path
        if path.is_dir() and not reason_to_leave(path):
            yield from walk(path)


def reason_to_leave(path: Path) -> str:
    """Return why a file or folder is not sent; empty if it is."""
    if path.name.startswith("."):
        return "hidden"
    if path.is_symlink():
        return "a symbolic link"
    if path.name == "__pycache__":
        return "compiled code"
    if path.is_dir():
        return "a training's checkpoint" if path.name.startswith("checkpoint-") else ""
    return "" if path.is_file() else "no regular file"


def check_complete(folder: Path, staged: Path, left_out: Mapping[str, str]) -> None:
    """Check that a model's configuration and all of its weights, or an adapter's, are sent.

    Raises:
        UploadError: they are not; the message names what is missing.
    """
    if (folder / "config.json").exists():
        needed = ["config.json", *(path.name for path in weight_files(folder))]
    elif (folder / "adapter_config.json").exists():
        weights = [name for name in ADAPTERS if (folder / name).exists()]
        needed = ["adapter_config.json", *(weights or ADAPTERS[:1])]
    else:
        raise UploadError(f"{folder}: has neither config.json nor adapter_config.json: no model to push.")
    for name in needed:
        if not (staged / name).exists():
            reason = left_out.get(name, "not there")
            raise UploadError(f"{folder / name} would not be sent ({reason}): put the file itself there.")
    if needed[0] == "config.json":
        known_architecture(folder / "config.json")


def write_named_card(folder: Path, repo_id: str) -> None:
    """Write a card, or have the one that hfvlm wrote name the repository in the place of a local folder."""
    path = folder / "README.md"
    if not path.exists():
        write_card(folder, name=repo_id)
    else:
        path.write_text(rename(path.read_text(encoding="utf-8"), repo_id), encoding="utf-8")


def files_under(folder: Path) -> Iterator[str]:
    return (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def write_stub(folder: str | Path) -> Path:
    """Write `hfvlm_stub.py` and the `auto_map` entries that point to it.

    Raises:
        UploadError: a class that the folder names is none of hfvlm's.
    """
    folder = Path(folder)
    text = stub_text(folder)
    config = read_json(folder / "config.json")
    architecture = known_architecture(folder / "config.json")
    names = (config["architectures"][0], architecture.configs[config["model_type"]])
    autos = {auto: name for auto, models in architecture.models.items() for name in models if name in names}
    config["auto_map"] = {
        "AutoConfig": f"{STUB}.{names[1]}",
        **{auto: f"{STUB}.{name}" for auto, name in autos.items()},
    }
    _write_json(folder / "config.json", config)
    processing = folder / "processor_config.json"
    if processing.exists():
        settings = read_json(processing)
        settings["auto_map"] = {"AutoProcessor": f"{STUB}.{settings['processor_class']}"}
        for part in (value for value in settings.values() if isinstance(value, dict)):
            if "image_processor_type" in part:
                part["auto_map"] = {"AutoImageProcessor": f"{STUB}.{part['image_processor_type']}"}
        _write_json(processing, settings)
    stub = folder / f"{STUB}.py"
    stub.write_text(text, encoding="utf-8")
    return stub


def stub_text(folder: Path) -> str:
    """Return the stub's code: one import of classes, each of which the registry knows.

    Raises:
        UploadError: a class that the folder names is none of hfvlm's.
    """
    path = folder / "config.json"
    config, architecture = read_json(path), known_architecture(path)
    classes = config.get("architectures")
    first = classes[0] if isinstance(classes, list) and classes else classes
    names = {known_class(first, path, "architectures"), architecture.configs[config["model_type"]]}
    path = folder / "processor_config.json"
    if path.exists():
        settings = read_json(path)
        names.add(known_class(settings.get("processor_class"), path, "processor_class"))
        for part in (value for value in settings.values() if isinstance(value, dict)):
            if "image_processor_type" in part:
                names.add(known_class(part["image_processor_type"], path, "image_processor_type"))
    listed = ", ".join(sorted(names))
    return f'"""The classes of this model are in hfvlm: pip install hfvlm."""\n\nfrom hfvlm import {listed}\n'


def known_class(name: Any, path: Path, field: str) -> str:
    """Return a name that is one of hfvlm's classes.

    Raises:
        UploadError: it is none.
    """
    from hfvlm.registry import architectures

    if isinstance(name, str) and any(name in architecture.names for architecture in architectures().values()):
        return name
    raise UploadError(f"{path}: {field} is {str(name)[:100]!r}, no class of hfvlm: the folder gets no stub.")


def known_architecture(path: Path) -> Architecture:
    """Return the architecture that a config.json names.

    Raises:
        UploadError: it names none of hfvlm's.
    """
    settings = read_json(path)
    model_type = settings.get("model_type") if isinstance(settings, dict) else None
    try:
        return architecture_of(str(model_type))
    except ValueError as error:
        raise UploadError(f"{path}: {str(error)[:200]}") from error


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
