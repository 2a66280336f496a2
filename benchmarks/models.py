"""Models with equal random weights: hfvlm's and transformers' own."""

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoProcessor

import hfvlm
from benchmarks.measuring import Size
from hfvlm.checkpoints.key_table import restore_keys
from hfvlm.models.align import HfvlmALIGNVisionConfig
from hfvlm.presets import load_preset
from hfvlm.release.sources import conversion_of

SAMPLES = Path(hfvlm.__file__).parent / "samples" / "clip-tiny"
WIDE = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 8}
PATCHES = WIDE | {"image_size": 224, "patch_size": 16}
LARGE = {"clip": PATCHES, "siglip": PATCHES, "blip": PATCHES, "align": {"width_coefficient": 1.0}}
TEXT = {"siglip": {"projection_dim": 512}, "blip": {"context_size": 512}}
LENGTHS = {"clip": 77, "siglip": 64, "blip": 40, "align": 64}


def config(name: str, size: Size) -> Any:
    """Return the tiny preset's configuration, with larger towers unless sizes are quick."""
    preset = load_preset(f"{name}/tiny")
    vision, text = (dict(preset.config[f"{part}_config"]) for part in ("vision", "text"))
    if not size.quick:
        vision |= LARGE[name]
        text |= WIDE | {"max_position_embeddings": LENGTHS[name]} | TEXT.get(name, {})
    if name == "align":  # transformers' has no projection of images
        vision["projection_dim"] = None
        text["projection_dim"] = HfvlmALIGNVisionConfig(**vision).hidden_size
    fields = {**preset.config, "vision_config": vision, "text_config": text}
    return AutoConfig.for_model(f"hfvlm_{name}", **fields)


def seeded(kind: Any, config: Any, size: Size) -> Any:
    torch.manual_seed(0)
    return kind(config).to(size.device).eval()


def native_of(ours: Any, name: str, kind: str | None = None) -> Any:
    """Make transformers' own model, of class `kind`, with the weights of hfvlm's."""
    conversion = conversion_of(name)
    native = conversion.export.config(ours.config)
    state = restore_keys(ours.state_dict(), conversion.keys_for(ours.config, "transformers"))
    theirs = AutoModel.from_config(native) if kind is None else getattr(transformers, kind)(native)
    state = {key: tensor.contiguous() for key, tensor in conversion.export.tensors(state, native).items()}
    missing = set(theirs.load_state_dict(state, strict=False).missing_keys) - theirs.all_tied_weights_keys.keys()
    if any("position_ids" not in key for key in missing):
        raise RuntimeError(f"transformers' {name} got no {sorted(missing)[:3]}.")
    theirs.tie_weights()
    return theirs.to(ours.device).eval()


def pixels(model: Any, count: int) -> Tensor:
    side = getattr(model.config.vision_config, "image_size", 128)  # ALIGN's takes any
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1)).to(model.device)


def tokens(model: Any, count: int) -> dict[str, Tensor]:
    """Texts of a quarter of the context's length and less, padded to all of it, with their mask."""
    text = model.config.text_config
    length, generator = text.max_position_embeddings, torch.Generator().manual_seed(2)
    ends = torch.randint(max(3, length // 8), max(4, length // 4), (count, 1), generator=generator)
    ids = torch.randint(5, text.vocab_size - 3, (count, length), generator=generator)
    places = torch.arange(length)
    ids = ids.masked_fill(places == ends, text.eos_token_id or 3).masked_fill(places > ends, text.pad_token_id)
    return {"input_ids": ids.to(model.device), "attention_mask": (places <= ends).long().to(model.device)}


def trimmed(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Cut a batch at its longest text, as a careful user pads it."""
    longest = int(inputs["attention_mask"].sum(dim=1).max())
    return {name: value[:, :longest].contiguous() for name, value in inputs.items()}


def embedding(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.pooler_output


@cache
def clip_tiny() -> Path:
    """Convert the CLIP that ships with hfvlm, once a process."""
    return hfvlm.convert(SAMPLES / "clip-tiny.pt", "clip/tiny", Path(mkdtemp()) / "clip-tiny")


def clip_with_processor(size: Size) -> tuple[Any, Any]:
    """Return a CLIP with the processor of the one that ships with hfvlm."""
    folder = clip_tiny()
    model = AutoModel.from_pretrained(folder)
    if not size.quick:
        fields = model.config.to_dict()
        wide = {part: fields[part] | WIDE for part in ("vision_config", "text_config")}
        model = seeded(type(model), type(model.config)(**wide), size)
    return model.to(size.device).eval(), AutoProcessor.from_pretrained(folder)
