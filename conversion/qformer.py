"""What BLIP-2's released files and transformers' folders have in common."""

import torch
from torch import Tensor

from hfvlm.checkpoints.key_table import Change, Row
from hfvlm.conversion.language_models import llama_rows, opt_rows, t5_rows
from hfvlm.models.blip2.configuration_blip2 import HfvlmBLIP2Config

# What the original calls its language model and what leads there, by transformers' model_type.
LANGUAGE_MODELS = {"opt": ("opt_model", "opt_proj"), "t5": ("t5_model", "t5_proj"), "llama": ("llm_model", "llm_proj")}
RETRIEVAL = "HfvlmBLIP2ForImageTextRetrieval"
GENERATIVE = ("HfvlmBLIP2ForConditionalGeneration", "HfvlmBLIP2T5ForConditionalGeneration")

unbatched = Change(lambda tensor: tensor.squeeze(0), lambda tensor: tensor.unsqueeze(0))
flattened = Change(lambda tensor: tensor.flatten(), lambda tensor: tensor.reshape(1, 1, -1))


def without_keys(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """The biases of queries and values; those of keys are zero."""
    query, _, value = tensor.chunk(3)
    return query, value


two_biases = Change(without_keys, lambda query, value: torch.cat([query, torch.zeros_like(query), value]))


def head_of(config: HfvlmBLIP2Config) -> str:
    return (config.architectures or GENERATIVE[:1])[0]


def attention_rows(theirs: str, ours: str, parts: dict[str, str]) -> list[Row]:
    """Of both attentions; `parts` are the names of the projections, which differ."""
    parts = parts | {"output.dense": ".out_proj", "output.LayerNorm": "_norm"}
    return [
        Row(f"{theirs}.{kind}.{part}.{{}}", f"{ours}.{name}{place}.{{}}")
        for kind, name in {"attention": "attention", "crossattention": "cross_attention"}.items()
        for part, place in parts.items()
    ]


def mlp_rows(theirs: str, ours: str, kind: str, name: str) -> list[Row]:
    return [
        Row(f"{theirs}.intermediate{kind}.dense.{{}}", f"{ours}.{name}.fc1.{{}}"),
        Row(f"{theirs}.output{kind}.dense.{{}}", f"{ours}.{name}.fc2.{{}}"),
        Row(f"{theirs}.output{kind}.LayerNorm.{{}}", f"{ours}.{name}_norm.{{}}"),
    ]


def language_rows(config: HfvlmBLIP2Config, source: str = "") -> list[Row]:
    """In transformers' names, which the original keeps; `source` ends in a dot."""
    kind = config.text_config.model_type
    if kind == "opt":
        return opt_rows(f"{source}model.decoder", f"{source}lm_head")
    return t5_rows(source) if kind == "t5" else llama_rows(f"{source}model", f"{source}lm_head")
