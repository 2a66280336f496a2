"""Small models of the kinds of towers that a CLIP, a SigLIP or a Wukong may have, with their processors."""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModel

import hfvlm
from hfvlm.release.sources import conversion_of
from hfvlm.release.untrained import KINDS
from tests.support.paths import OURS

WIDTHS = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
VIT = WIDTHS | {"image_size": 32, "patch_size": 8, "projection_dim": 64}
POOL = {"pool_heads": 4, "pool_intermediate_size": 48}
TEXT = WIDTHS | {"max_position_embeddings": 24, "projection_dim": 64}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "window_size": 3, "depths": [2, 2], "num_heads": [2, 2]}
TRUNKS = {
    "convnext": {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 12, 16, 24], "image_size": 32},
    "swin": SWIN | {"window_size": 4, "depths": [1, 1]},
    "xlm-roberta": WIDTHS | {"vocab_size": 70, "max_position_embeddings": 30, "type_vocab_size": 1},
}
RESNET = {"image_size": 64, "stem_size": 8, "depths": [1, 2, 1, 1], "num_attention_heads": 4, "projection_dim": 64}
# Small vocabularies of other text towers than CLIP's own.
XLM = OURS / "clip" / "processor-tokenizer-xlm" / "sentencepiece.bpe.model"
VOCABULARIES = {"clip-clipa": OURS / "clip" / "processor-tokenizer-clipa" / "vocab.txt"}
VOCABULARIES |= dict.fromkeys(("clip-convnext", "clip-metaclip2"), XLM)


def vision(kind: str, **sizes: Any) -> dict[str, Any]:
    return {"vision_config": {"model_type": f"hfvlm_{kind}"} | sizes}


def text(kind: str, **sizes: Any) -> dict[str, Any]:
    return {"text_config": {"model_type": f"hfvlm_{kind}"} | sizes}


def trunk(name: str, **sizes: Any) -> dict[str, Any]:
    """A tower that is a model of transformers."""
    return {"trunk_config": {"model_type": name} | TRUNKS[name], "projection_dim": 64} | sizes


# Changes of an architecture's tiny preset, by the architecture and the tower.
TOWERS: dict[str, dict[str, Any]] = {
    "clip-resnet": vision("clip_resnet", **RESNET),
    "clip-vit": vision("clip_vit", **VIT),
    "clip-eva": vision("clip_eva", **VIT),
    "clip-eva_post_norm": vision("clip_eva_post_norm", **VIT),
    "clip-eva02": vision("clip_eva02", **VIT),
    "clip-pe": vision("clip_pe", **VIT, **POOL),
    "clip-pe_gigantic": vision("clip_pe_gigantic", **VIT, **POOL),
    "clip-swin": vision("clip_swin", **SWIN, projection_dim=64),
    "clip-swin_v2": vision("clip_swin_v2", **SWIN, pretrained_windows=[3, 0], projection_dim=64),
    "clip-swin_of_transformers": vision("vision_trunk", **trunk("swin")),
    "clip-convnext": vision("vision_trunk", **trunk("convnext", projection_hidden_size=32))
    | text("text_trunk", **trunk("xlm-roberta", max_position_embeddings=24)),
    "clip-clipa": vision("clipa_vision", **VIT)
    | text("clipa_text", **TEXT, vocab_size=68, pad_token_id=0, bos_token_id=5, eos_token_id=None),
    "clip-mobileclip": text("clip_bidirectional_text", **TEXT, vocab_size=632, bos_token_id=630, eos_token_id=631),
    "clip-metaclip2": text(
        "metaclip2_text", **TEXT, vocab_size=70, bos_token_id=0, eos_token_id=2, pad_token_id=1
    ),
    "siglip-naflex": vision("siglip_naflex_vision", **WIDTHS, patch_size=8, num_patches=16),
    "wukong-clip": {"model_type": "hfvlm_wukong_clip"},
}  # fmt: skip
PROCESSORS = {
    "clip-resnet": {"image_processor": {"size": 64}},
    "siglip-naflex": {"image_processor": {"patch_size": 8, "max_num_patches": 16}},
}


def own_modalities(name: str) -> tuple[str, ...]:
    """Return the modalities whose towers one of `TOWERS` has instead of its architecture's."""
    kinds = {"vision_config": "image", "text_config": "text"}
    return tuple(kinds[part] for part in TOWERS[name] if part in kinds) or tuple(kinds.values())


def parts_with_tower(name: str) -> tuple[Any, Any]:
    """Make the model of one of `TOWERS`, or of an architecture's tiny preset, and its processor."""
    architecture = name.partition("-")[0]
    preset = hfvlm.load_preset(f"{architecture}/tiny")
    config, settings = {**preset.config, **TOWERS.get(name, {})}, {**preset.processor, **PROCESSORS.get(name, {})}
    preset = replace(preset, config=config, processor=settings)
    if (vocabulary := VOCABULARIES.get(name)) is not None:
        config = preset.make_config()
        processor = conversion_of(architecture).processor_for(config, preset.processor, vocabulary)
    else:
        with TemporaryDirectory() as scratch:
            config, processor = KINDS[architecture](preset, Path(scratch))
    torch.manual_seed(0)
    return AutoModel.from_config(config).eval(), processor
