"""A small LLaVA in its authors' formats."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import hfvlm
from hfvlm.checkpoints.key_table import restore_keys
from hfvlm.conversion.blocks import llama_rows, transformers_vision_rows
from hfvlm.conversion.interop.llava import config_to_transformers
from hfvlm.conversion.llava import TOWER, projector_rows
from hfvlm.models.llava import HfvlmLLaVAConfig, HfvlmLLaVAForConditionalGeneration
from tests.support.paths import OURS

VOCABULARY = OURS / "llava" / "processor-tokenizer" / "tokenizer.model"
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14, "projection_dim": None}
TEXT = {"model_type": "llama", "vocab_size": 480, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0}
GRID = [[28, 56], [56, 28], [56, 56]]


def tiny_config(**changes) -> HfvlmLLaVAConfig:
    return HfvlmLLaVAConfig(**{"vision_config": VISION, "text_config": TEXT, "image_token_id": 480} | changes)


def tiny_model(**changes) -> HfvlmLLaVAForConditionalGeneration:
    torch.manual_seed(3)
    model = HfvlmLLaVAForConditionalGeneration(tiny_config(**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms too, so that a forgotten one shows
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def original_config(model: HfvlmLLaVAForConditionalGeneration) -> dict:
    """As the authors' training writes config.json."""
    text = model.config.text_config
    sizes = {name: getattr(text, name) for name in TEXT if name != "model_type"}
    tiled = model.config.grid_pinpoints is not None
    config = {
        **sizes,
        "model_type": "llava_llama",
        "rms_norm_eps": text.rms_norm_eps,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_projector_type": {1: "linear", 2: "mlp2x_gelu"}[model.config.projector_depth],
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "image_aspect_ratio": "anyres" if tiled else "pad",
        "mm_patch_merge_type": model.config.patch_merge,
        "tokenizer_model_max_length": 256,
    }
    if tiled:
        config["image_grid_pinpoints"] = str([size[::-1] for size in model.config.grid_pinpoints])
    return config


def vision_settings(model) -> dict:
    config = tiny_config()
    config.vision_config = model.config.vision_config
    tower = config_to_transformers(config).vision_config
    return tower.to_dict() | {"model_type": "clip_vision_model"}


def original_tensors(model: HfvlmLLaVAForConditionalGeneration) -> dict[str, dict[str, Tensor]]:
    """The state dict in the authors' names, by parts."""
    ours = model.state_dict()
    rows = {
        "base": llama_rows(),
        "projector": projector_rows(model.config),
        "tower": transformers_vision_rows(TOWER, "vision_model"),
        "vision": transformers_vision_rows("vision_model", "vision_model"),
    }
    starts = {
        "base": "language_model.",
        "projector": "projector.",
        "tower": "vision_model.",
        "vision": "vision_model.",
    }
    return {
        part: restore_keys({k: t for k, t in ours.items() if k.startswith(starts[part])}, rows[part]) for part in rows
    }


def write(folder: Path, file: str, tensors: dict[str, Tensor], settings: dict | None = None) -> Path:
    """A released folder."""
    folder.mkdir(exist_ok=True)
    tensors = {key: tensor.clone().contiguous() for key, tensor in tensors.items()}
    if file.endswith(".bin"):
        torch.save(tensors, folder / file)
    else:
        save_file(tensors, folder / file)
    if settings is not None:
        name = "adapter_config.json" if file.startswith("adapter") else "config.json"
        (folder / name).write_text(json.dumps(settings))
    return folder


def converted(folder: Path, **changes) -> Path:
    """A small LLaVA as its authors would have released it, converted."""
    model = tiny_model(**changes)
    parts = original_tensors(model)
    settings = original_config(model) | {"vision_config": vision_settings(model)}
    whole = {**parts["base"], **parts["projector"], **parts["tower"]}
    source = write(folder / "release", "pytorch_model.bin", whole, settings)
    shutil.copy(VOCABULARY, source)
    return hfvlm.convert(source, "llava", folder / "llava")
