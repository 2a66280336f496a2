"""transformers' FlavaModel, FlavaForPreTraining and FlavaImageCodebook, with the rows that they and the authors' files
have in common."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import FlavaConfig, FlavaImageCodebookConfig

from hfvlm.checkpoints import conversion
from hfvlm.checkpoints.conversion import Export
from hfvlm.checkpoints.key_table import Change, Row, flat, scalar, unbatched
from hfvlm.checkpoints.originals import UnsupportedOriginalError
from hfvlm.conversion.dvae import TRANSFORMERS, codebook_rows
from hfvlm.models.flava.configuration_flava import (
    HfvlmFLAVACodebookConfig,
    HfvlmFLAVAConfig,
    HfvlmFLAVAMultimodalConfig,
    HfvlmFLAVATextConfig,
    HfvlmFLAVAVisionConfig,
)

AnyConfig = HfvlmFLAVAConfig | HfvlmFLAVACodebookConfig
# transformers' classes; it has none for classification.
NATIVE = {"HfvlmFLAVAModel": "FlavaModel", "HfvlmFLAVAForPreTraining": "FlavaForPreTraining"}
# Our settings that transformers' image processor calls the same.
SAME_SETTINGS = (
    *("size", "resample", "image_mean", "image_std", "codebook_size", "codebook_resample", "input_size_patches"),
    *("total_mask_patches", "mask_group_min_patches", "mask_group_max_patches"),
    *("mask_group_min_aspect_ratio", "mask_group_max_aspect_ratio"),
)


def is_codebook(original: Mapping[str, Any]) -> bool:
    """Recognise the codebook by its class: early versions of transformers wrote no `model_type` for it."""
    return "FlavaImageCodebook" in (original.get("architectures") or ())


def head_of(config: AnyConfig) -> str:
    """Return the class of the model that a configuration is for."""
    if isinstance(config, HfvlmFLAVACodebookConfig):
        return "HfvlmFLAVACodebookModel"
    return conversion.head_of(config, "HfvlmFLAVAModel")


def check_native(config: HfvlmFLAVAConfig) -> str:
    """Return the class that a configuration is for, if transformers has it.

    Raises:
        UnsupportedOriginalError: it has none like it.
    """
    head = head_of(config)
    if head not in NATIVE:
        raise UnsupportedOriginalError(f"transformers has no FLAVA like {head}; it has {', '.join(NATIVE.values())}.")
    return head


def patch_rows(config: HfvlmFLAVAConfig, source: str) -> list[Row]:
    mask = [Row(f"{source}.mask_token", "vision_model.mask_token", flat)]
    return [
        Row(f"{source}.cls_token", "vision_model.class_token", flat),
        *(mask if config.vision_config.mask_token else []),
        Row(f"{source}.position_embeddings", "vision_model.position", unbatched),
        Row(f"{source}.patch_embeddings.projection.{{}}", "vision_model.patches.projection.{}"),
    ]


def pooled_rows(source: str, target: str) -> list[Row]:
    return [
        Row(f"{source}.layernorm.{{}}", f"{target}.post_norm.{{}}"),
        Row(f"{source}.pooler.dense.{{}}", f"{target}.summary.{{}}"),
    ]


def to_multimodal_rows(prefix: str) -> list[Row]:
    return [
        Row(f"{prefix}{kind}_to_mm_projection.{{}}", f"multimodal_model.{kind}_projection.{{}}")
        for kind in ("image", "text")
    ]


def joint_rows(prefix: str) -> list[Row]:
    return [
        Row(f"{prefix}image_projection.{{}}", "vision_model.projection.{}"),
        Row(f"{prefix}text_projection.{{}}", "text_model.projection.{}"),
    ]


def rows(config: AnyConfig) -> list[Row]:
    if isinstance(config, HfvlmFLAVACodebookConfig):
        return codebook_rows(config.blocks_per_group, TRANSFORMERS)
    head = check_native(config)
    prefix = "" if head == "HfvlmFLAVAModel" else "flava."
    words, ours = f"{prefix}text_model.embeddings", "text_model.embeddings"
    found = [
        native_scale(config, prefix),
        *patch_rows(config, f"{prefix}image_model.embeddings"),
        *native_layer_rows(f"{prefix}image_model", "vision_model"),
        # Files of 2022 store the counting numbers.
        Row(f"{words}.position_ids", None, optional=True),
        Row(f"{words}.word_embeddings.weight", f"{ours}.token.weight"),
        Row(f"{words}.position_embeddings.weight", f"{ours}.position"),
        Row(f"{words}.token_type_embeddings.weight", f"{ours}.token_type.weight"),
        Row(f"{words}.LayerNorm.{{}}", f"{ours}.norm.{{}}"),
        *native_layer_rows(f"{prefix}text_model", "text_model"),
        Row(f"{prefix}multimodal_model.cls_token", "multimodal_model.class_token", flat),
        *native_layer_rows(f"{prefix}multimodal_model", "multimodal_model"),
        *to_multimodal_rows(prefix),
        *joint_rows(prefix),
    ]
    if head == "HfvlmFLAVAModel":
        return found
    return [
        *found,
        *codebook_rows(config.codebook_config.blocks_per_group, TRANSFORMERS, "image_codebook.", "codebook_model."),
        *(row for name in ("mim", "mlm", "mmm_image", "mmm_text") for row in native_prediction_rows(f"{name}_head")),
        Row("itm_head.pooler.dense.{}", "itm_head.summary.{}"),
        Row("itm_head.seq_relationship.{}", "itm_head.classifier.{}"),
    ]


def native_scale(config: HfvlmFLAVAConfig, prefix: str) -> Row:
    """Return the row of the scale; a file of torchmultimodal's FLAVAModel has none, and transformers' class then
    multiplies by one."""
    if config.logit_scale_init_value is None:
        return Row(f"{prefix}logit_scale", (), Change(lambda _: (), lambda: torch.zeros(())))
    return Row(f"{prefix}logit_scale", "logit_scale.scale", scalar)


def native_layer_rows(source: str, target: str) -> list[Row]:
    layer, ours = f"{source}.encoder.layer.{{}}", f"{target}.layers.{{}}"
    return [
        *(
            Row(f"{layer}.attention.attention.{theirs}.{{}}", f"{ours}.attention.{part}_proj.{{}}")
            for theirs, part in (("query", "q"), ("key", "k"), ("value", "v"))
        ),
        Row(f"{layer}.attention.output.dense.{{}}", f"{ours}.attention.out_proj.{{}}"),
        Row(f"{layer}.intermediate.dense.{{}}", f"{ours}.mlp.fc1.{{}}"),
        Row(f"{layer}.output.dense.{{}}", f"{ours}.mlp.fc2.{{}}"),
        Row(f"{layer}.layernorm_before.{{}}", f"{ours}.attention_norm.{{}}"),
        Row(f"{layer}.layernorm_after.{{}}", f"{ours}.mlp_norm.{{}}"),
        *pooled_rows(source, target),
    ]


def native_prediction_rows(name: str) -> list[Row]:
    return [
        Row(f"{name}.transform.dense.{{}}", f"{name}.fc.{{}}"),
        Row(f"{name}.transform.LayerNorm.{{}}", f"{name}.norm.{{}}"),
        Row(f"{name}.decoder.weight", f"{name}.decoder.weight"),
        # One tensor under two names, of which a folder may hold either.
        Row(f"{name}.decoder.bias", f"{name}.decoder.bias", optional=True),
        Row(f"{name}.bias", f"{name}.decoder.bias", optional=True),
    ]


# Fields of an encoder that transformers calls the same, and those that it calls otherwise.
SAME = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "layer_norm_eps")
DROPOUTS = {"hidden_dropout": "hidden_dropout_prob", "attention_dropout": "attention_probs_dropout_prob"}
IMAGE_FIELDS, TEXT_FIELDS = (
    ("patch_size", "num_channels", "mask_token"),
    ("vocab_size", "type_vocab_size", "max_position_embeddings", "pad_token_id"),
)
WEIGHTS = {
    **{name: name for name in ("mim_weight", "mlm_weight", "mmm_image_weight", "mmm_text_weight", "itm_weight")},
    "contrastive_weight": "global_contrastive_weight",
}
CODEBOOK = {
    **{name: name for name in ("hidden_size", "vocab_size", "num_groups")},
    "num_channels": "input_channels",
    "blocks_per_group": "num_blocks_per_group",
}


def _native_sizes(native: Any) -> dict[str, Any]:
    if not native.qkv_bias:
        raise UnsupportedOriginalError("hfvlm's queries, keys and values have biases; this model has qkv_bias off.")
    return {name: getattr(native, name) for name in SAME} | {
        ours: getattr(native, theirs) for ours, theirs in DROPOUTS.items()
    }


def codebook_from_transformers(original: Mapping[str, Any]) -> HfvlmFLAVACodebookConfig:
    native: Any = FlavaImageCodebookConfig(**original)
    return HfvlmFLAVACodebookConfig(**{ours: getattr(native, theirs) for ours, theirs in CODEBOOK.items()})


def config_from_transformers(original: Mapping[str, Any], shapes: Mapping[str, Any]) -> HfvlmFLAVAConfig:
    native: Any = FlavaConfig(**original)
    image, text, both = native.image_config, native.text_config, native.multimodal_config
    if not both.use_cls_token:
        raise UnsupportedOriginalError("hfvlm's multimodal encoder has a class token; this model has none.")
    heads = "flava.logit_scale" in shapes
    if heads and image.hidden_act != text.hidden_act:
        raise UnsupportedOriginalError("hfvlm's heads have one activation; this model's differ.")
    return HfvlmFLAVAConfig(
        architectures=["HfvlmFLAVAForPreTraining" if heads else "HfvlmFLAVAModel"],
        vision_config=HfvlmFLAVAVisionConfig(
            image_size=image.image_size,
            projection_dim=native.projection_dim,
            **_native_sizes(image),
            **{name: getattr(image, name) for name in IMAGE_FIELDS},
        ),
        text_config=HfvlmFLAVATextConfig(
            projection_dim=native.projection_dim,
            **_native_sizes(text),
            **{name: getattr(text, name) for name in TEXT_FIELDS},
        ),
        multimodal_config=HfvlmFLAVAMultimodalConfig(
            image_hidden_size=image.hidden_size, text_hidden_size=text.hidden_size, **_native_sizes(both)
        ),
        codebook_config=codebook_from_transformers(native.image_codebook_config.to_dict()),
        logit_scale_init_value=native.logit_scale_init_value,
        head_act=image.hidden_act,
        # transformers' heads take the towers'; those of torchmultimodal have 1e-5.
        head_layer_norm_eps=image.layer_norm_eps,
        **{ours: getattr(native, theirs) for ours, theirs in WEIGHTS.items()},
    )


def config_to_transformers(config: AnyConfig) -> Any:
    """Return transformers' configuration of the same model."""
    if isinstance(config, HfvlmFLAVACodebookConfig):
        native = {theirs: getattr(config, ours) for ours, theirs in CODEBOOK.items()}
        return FlavaImageCodebookConfig(architectures=["FlavaImageCodebook"], **native)
    head = check_native(config)
    vision, text, both = config.vision_config, config.text_config, config.multimodal_config
    if head == "HfvlmFLAVAForPreTraining" and config.head_act != vision.hidden_act:
        raise UnsupportedOriginalError("transformers' heads have the towers' activation; this model's have another.")
    scale = config.logit_scale_init_value
    weights: dict[str, Any] = {theirs: float(getattr(config, ours)) for ours, theirs in WEIGHTS.items()}
    return FlavaConfig(
        architectures=[NATIVE[head]],
        image_config=_to_native(vision, ("image_size", *IMAGE_FIELDS))
        | {"vocab_size": config.codebook_config.vocab_size},
        text_config=_to_native(text, TEXT_FIELDS),
        multimodal_config=_to_native(both, ()),
        image_codebook_config=config_to_transformers(config.codebook_config).to_dict(),
        hidden_size=both.hidden_size,
        layer_norm_eps=both.layer_norm_eps,
        projection_dim=vision.projection_dim,
        logit_scale_init_value=0.0 if scale is None else float(scale),
        **weights,
    )


def _to_native(config: Any, names: Iterable[str]) -> dict[str, Any]:
    native = {name: getattr(config, name) for name in (*SAME, *names)}
    return native | {theirs: getattr(config, ours) for ours, theirs in DROPOUTS.items()}


def processor_to_transformers(processor: Any) -> Any:
    """Return transformers' FlavaProcessor of the same vocabulary and pixels, or its image processor alone.

    Its codebook reads images as they come, ours as they were squashed.
    """
    from transformers import BertTokenizer, FlavaProcessor
    from transformers.models.flava.image_processing_pil_flava import FlavaImageProcessorPil

    pixels = getattr(processor, "image_processor", processor)
    same = {name: getattr(pixels, name) for name in SAME_SETTINGS}
    image_processor = FlavaImageProcessorPil(crop_size=pixels.size, codebook_crop_size=pixels.codebook_size, **same)
    if pixels is processor:
        return image_processor
    tokenizer = processor.tokenizer
    vocabulary, length = tokenizer.get_vocab(), tokenizer.model_max_length
    return FlavaProcessor(image_processor, BertTokenizer(vocab=vocabulary, model_max_length=length))


EXPORT = Export(config=config_to_transformers, processor=processor_to_transformers)
