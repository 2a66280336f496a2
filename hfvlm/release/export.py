"""Folders of hfvlm for transformers' own classes, where it has the architecture, and for ONNX."""

from pathlib import Path

from transformers import AutoConfig, AutoProcessor

from hfvlm.checkpoints import read_checkpoint
from hfvlm.checkpoints.key_table import restore_keys, restored
from hfvlm.checkpoints.originals import UnsupportedOriginalError
from hfvlm.checkpoints.saving import save_tensors
from hfvlm.presets.cards import record_of, write_export_card
from hfvlm.registry import architecture_of
from hfvlm.release.onnx import export_onnx
from hfvlm.release.sources import conversion_of
from hfvlm.versions import __version__
from hfvlm.writing import new_folder


def export(folder: str | Path, output: str | Path, *, to: str = "transformers", overwrite: bool = False) -> Path:
    """Export an hfvlm folder to one that transformers' own classes load, or to ONNX, with equal outputs.

    Args:
        folder: as `convert` or `save_pretrained` wrote it.
        output: the new folder; it is written beside and moved into place.
        to: "transformers", or "onnx" for the towers of a dual encoder; see `hfvlm.release.onnx.export_onnx`.
        overwrite: replace an existing output.

    Raises:
        UnsupportedOriginalError: transformers has no such architecture.
        ValueError: `to` is neither, or no model that ONNX can have.
        FileExistsError: there is an output already.
    """
    if to not in ("transformers", "onnx"):
        raise ValueError(f"Folders are exported to 'transformers' or 'onnx', not to {to!r}.")
    if to == "onnx":
        return export_onnx(folder, output, overwrite=overwrite)
    folder = Path(folder)
    config = AutoConfig.from_pretrained(folder)
    conversion = conversion_of(architecture_of(config.model_type).name)
    if (way := conversion.export) is None:
        raise UnsupportedOriginalError(f"{folder}: transformers has no classes of its own for {config.model_type}.")
    with new_folder(output, overwrite=overwrite) as target:
        native = way.config(config)
        rows = conversion.keys_for(config, "transformers")
        own = read_checkpoint(folder).tensors
        shapes = way.tensors(restore_keys({key: tensor.to("meta") for key, tensor in own.items()}, rows), native)
        native.dtype = config.dtype
        about = {"format": "pt", "hfvlm": __version__}
        save_tensors(target / "model.safetensors", dict(shapes), way.tensors(restored(own, rows), native), about=about)
        native.save_pretrained(target)
        write_export_card(target, config, record_of(folder), Path(output).name)
        way.processor(AutoProcessor.from_pretrained(folder)).save_pretrained(target)
    return Path(output)
