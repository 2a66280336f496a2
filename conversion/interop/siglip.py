"""transformers' SiglipModel and Siglip2Model."""

from collections.abc import Mapping
from math import isqrt
from typing import Any

from transformers import CONFIG_MAPPING, Siglip2Config, SiglipConfig

from hfvlm.checkpoints.conversion import Export
from hfvlm.checkpoints.key_table import Change, Row, split
from hfvlm.checkpoints.originals import UnsupportedOriginalError
from hfvlm.conversion.blocks import transformers_layers
from hfvlm.conversion.interop.clip import NATIVE_SIZES
from hfvlm.models.siglip.configuration_siglip import (
    HfvlmSigLIPConfig,
    HfvlmSigLIPNaFlexVisionConfig,
    HfvlmSigLIPTextConfig,
    HfvlmSigLIPVisionConfig,
)
from hfvlm.models.siglip.processing_siglip import HfvlmSigLIPNaFlexImageProcessor, HfvlmSigLIPProcessor

GEMMA_VOCABULARY = 256000


def is_naflex(config: HfvlmSigLIPConfig) -> bool:
    return isinstance(config.vision_config, HfvlmSigLIPNaFlexVisionConfig)


def rows(config: HfvlmSigLIPConfig) -> list[Row]:
    vision, text = "vision_model", "text_model"
    pool, ours = f"{vision}.head", f"{vision}.pool"
    naflex = is_naflex(config)
    edge = isqrt(config.vision_config.num_patches) if naflex else 0
    table = Change(lambda t: t.unflatten(0, (edge, edge)), lambda t: t.flatten(0, 1)) if naflex else None
    patches = f"{vision}.patches" if naflex else f"{vision}.patches.projection"
    return [
        Row("logit_scale", "logit_scale.scale"),
        Row("logit_bias", "logit_scale.bias"),
        Row(f"{vision}.embeddings.patch_embedding.{{}}", f"{patches}.{{}}"),
        Row(f"{vision}.embeddings.position_embedding.weight", f"{vision}.position", table),
        *transformers_layers(vision),
        Row(f"{vision}.post_layernorm.{{}}", f"{vision}.post_norm.{{}}"),
        Row(f"{pool}.probe", f"{ours}.probe"),
        Row(f"{pool}.attention.in_proj_{{}}", tuple(f"{ours}.attention.{p}_proj.{{}}" for p in "qkv"), split(3)),
        Row(f"{pool}.attention.out_proj.{{}}", f"{ours}.attention.out_proj.{{}}"),
        Row(f"{pool}.layernorm.{{}}", f"{ours}.mlp_norm.{{}}"),
        Row(f"{pool}.mlp.{{}}.{{}}", f"{ours}.mlp.{{}}.{{}}"),
        Row(f"{text}.embeddings.token_embedding.weight", f"{text}.embeddings.token.weight"),
        Row(f"{text}.embeddings.position_embedding.weight", f"{text}.embeddings.position"),
        *transformers_layers(text),
        Row(f"{text}.final_layer_norm.{{}}", f"{text}.post_norm.{{}}"),
        Row(f"{text}.head.{{}}", f"{text}.projection.{{}}"),
    ]


def config_from_transformers(original: Mapping[str, Any]) -> HfvlmSigLIPConfig:
    native = CONFIG_MAPPING[original["model_type"]](**original)
    vision, text = native.vision_config, native.text_config
    naflex = original["model_type"] == "siglip2"
    kind = HfvlmSigLIPNaFlexVisionConfig if naflex else HfvlmSigLIPVisionConfig
    extra = ("patch_size", "num_channels", "num_patches" if naflex else "image_size")
    return HfvlmSigLIPConfig(
        vision_config=kind(**{name: getattr(vision, name) for name in (*NATIVE_SIZES, *extra)}),
        text_config=HfvlmSigLIPTextConfig(
            projection_dim=text.projection_size,
            pad_token_id=0 if text.vocab_size == GEMMA_VOCABULARY else 1,
            eos_token_id=1,
            **{name: getattr(text, name) for name in (*NATIVE_SIZES, "vocab_size", "max_position_embeddings")},
        ),
    )


def config_to_transformers(config: HfvlmSigLIPConfig) -> Any:
    """Return transformers' SiglipConfig, or Siglip2Config for NaFlex, of the same model."""
    vision, text = config.vision_config.to_diff_dict(), config.text_config.to_diff_dict()
    if text.pop("projection_dim", None) is None:
        raise UnsupportedOriginalError("transformers' SiglipModel always has a text head; this model has none.")
    text["projection_size"] = config.text_config.projection_dim
    kind, name = (Siglip2Config, "siglip2") if is_naflex(config) else (SiglipConfig, "siglip")
    return kind(
        architectures=[kind.__name__.replace("Config", "Model")],
        vision_config=vision | {"model_type": f"{name}_vision_model"},
        text_config=text | {"model_type": f"{name}_text_model"},
    )


def processor_to_transformers(processor: HfvlmSigLIPProcessor) -> Any:
    """Return transformers' processor of the same vocabulary and pixels.

    The vocabulary goes along as tokenizer.json: transformers' class for SigLIP 1 needs the sentencepiece file, which
    an hfvlm folder does not keep. Its cleaning is built in but for the repair of broken text (ftfy).
    """
    from tokenizers import Regex, Tokenizer, normalizers
    from transformers import Siglip2Processor, SiglipProcessor
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
    from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil
    from transformers.tokenization_utils_tokenizers import TokenizersBackend

    pixels, tokens = processor.image_processor, processor.tokenizer
    shared = {"resample": pixels.resample, "image_mean": pixels.image_mean, "image_std": pixels.image_std}
    engine = Tokenizer.from_str(tokens.backend_tokenizer.to_str())
    steps: list[Any] = [normalizers.Lowercase()]
    if tokens.clean == "canonical":
        steps = [
            normalizers.Replace("_", " "),
            normalizers.Replace(Regex(r"[!-/:-@\[-`{-~]"), ""),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
            *steps,
        ]
    engine.normalizer = normalizers.Sequence([*steps, *([engine.normalizer] if engine.normalizer else [])])
    tokenizer = TokenizersBackend(
        tokenizer_object=engine,
        eos_token=tokens.eos_token,
        pad_token=tokens.pad_token,
        model_max_length=tokens.model_max_length,
        model_input_names=["input_ids"],
    )
    if isinstance(pixels, HfvlmSigLIPNaFlexImageProcessor):
        sizes: dict[str, Any] = {"patch_size": pixels.patch_size, "max_num_patches": pixels.max_num_patches}
        return Siglip2Processor(Siglip2ImageProcessorPil(**sizes, **shared), tokenizer)
    return SiglipProcessor(SiglipImageProcessorPil(size=pixels.size, **shared), tokenizer)


EXPORT = Export(config=config_to_transformers, processor=processor_to_transformers)
