"""PaLI out of parts: there is no released file.

The one layout, "parts", is that of a ViT and an mT5 in transformers' names, `vit.`, `proj.` and `mt5.` before them.
"""

from collections.abc import Iterable, Mapping
from math import isqrt
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import T5Config

from hfvlm.checkpoints.conversion import Conversion, always
from hfvlm.checkpoints.key_table import Row
from hfvlm.checkpoints.originals import check_options, count_layers
from hfvlm.conversion.blocks import t5_rows
from hfvlm.conversion.processors import check_vocabulary, sized
from hfvlm.models.pali.configuration_pali import HfvlmPaLIConfig
from hfvlm.models.pali.processing_pali import HfvlmPaLIImageProcessor, HfvlmPaLIProcessor, HfvlmPaLITokenizer
from hfvlm.models.paligemma.configuration_paligemma import HfvlmPaliGemmaVisionConfig

VOCABULARIES = ("spiece.model", "tokenizer.model", "tokenizer.json")
OPTIONS = ("vit", "projection", "mt5")
VIT_OPTIONS = ("width", "mlp_dim", "depth", "num_heads", "image_size", "patch_size")


def keys_for(config: HfvlmPaLIConfig, layout: str = "parts", keys: Iterable[str] = ()) -> list[Row]:
    """Return the rows of the ViT, the projection and mT5."""
    layer, ours = "vit.encoder.layers.{}", "vision_model.layers.{}"
    return [
        Row("vit.embeddings.patch_embedding.{}", "vision_model.patches.projection.{}"),
        Row("vit.embeddings.position_embedding.weight", "vision_model.position"),
        Row(f"{layer}.layer_norm1.{{}}", f"{ours}.attention_norm.{{}}"),
        Row(f"{layer}.self_attn.{{}}.{{}}", f"{ours}.attention.{{}}.{{}}"),
        Row(f"{layer}.layer_norm2.{{}}", f"{ours}.mlp_norm.{{}}"),
        Row(f"{layer}.mlp.{{}}.{{}}", f"{ours}.mlp.{{}}.{{}}"),
        Row("vit.post_layernorm.{}", "vision_model.post_norm.{}"),
        *([Row("proj.{}", "projector.layers.0.{}")] if config.projector_depth else []),
        *t5_rows("mt5."),
    ]


def config_from_original(original: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> HfvlmPaLIConfig:
    """Read the options of the parts, `vit` and `mt5`, and the shapes of the file."""
    options = original.get("arguments") or original
    vit, text = options["vit"], dict(options["mt5"])
    check_options("vit", vit, VIT_OPTIONS)
    shapes = {key: tensor.shape for key, tensor in state_dict.items()}
    patch = shapes["vit.embeddings.patch_embedding.weight"]
    return HfvlmPaLIConfig(
        vision_config=HfvlmPaliGemmaVisionConfig(
            hidden_size=patch[0],
            intermediate_size=shapes["vit.encoder.layers.0.mlp.fc1.weight"][0],
            num_hidden_layers=count_layers(shapes, "vit.encoder.layers."),
            num_attention_heads=vit["num_heads"],
            patch_size=patch[-1],
            image_size=patch[-1] * isqrt(shapes["vit.embeddings.position_embedding.weight"][0]),
        ),
        text_config=T5Config(**text | {"tie_word_embeddings": False}),
        image_token_id=text["vocab_size"],
        projector_depth=int("proj.weight" in shapes),
    )


image_processor_for = sized(HfvlmPaLIImageProcessor)


def processor_for(config: HfvlmPaLIConfig, settings: Mapping[str, Any], vocabulary: Path) -> HfvlmPaLIProcessor:
    """Return the processor; `vocabulary` is mT5's."""
    text: Any = config.text_config
    tokenizer = HfvlmPaLITokenizer.from_vocabulary(
        vocabulary, size=text.vocab_size, **dict(settings.get("tokenizer", {}))
    )
    processor = HfvlmPaLIProcessor(
        image_processor_for(config, settings), tokenizer, patch_size=config.vision_config.patch_size
    )
    check_vocabulary(vocabulary, processor.image_token_id, config.image_token_id, "placeholder is", "image_token_id")
    return processor


CONVERSION = Conversion(
    config_from_original=config_from_original,
    keys_for=keys_for,
    layout_of=always("parts"),
    settings_from_original=always({}),
    image_processor_for=image_processor_for,
    processor_for=processor_for,
    vocabularies_for=always([VOCABULARIES]),
)
