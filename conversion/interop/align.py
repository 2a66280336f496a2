"""transformers' AlignModel."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AlignConfig

from hfvlm.checkpoints.conversion import Export
from hfvlm.checkpoints.key_table import Change, Row, scalar
from hfvlm.checkpoints.originals import UnsupportedOriginalError
from hfvlm.conversion.blocks import bert_attention, bert_mlp
from hfvlm.models.align.configuration_align import (
    STEM_CHANNELS,
    HfvlmALIGNConfig,
    HfvlmALIGNTextConfig,
    HfvlmALIGNVisionConfig,
)
from hfvlm.models.align.processing_align import HfvlmALIGNProcessor

# Fields of the vision tower that transformers calls the same: numbers of each stage, and others.
STAGES = ("kernel_sizes", "out_channels", "strides", "num_block_repeats", "expand_ratios")
SAME = ("num_channels", "width_coefficient", "depth_coefficient", "depth_divisor", "hidden_act", "batch_norm_eps")
# Our squeeze-and-excitation is linear on the mean, transformers' is convolutions on a map of one pixel.
pixel_to_linear = Change(lambda kernel: kernel[:, :, 0, 0], lambda weight: weight[:, :, None, None])


def check_chain(into: list[int], out: list[int]) -> None:
    if into != [STEM_CHANNELS, *out[:-1]]:
        raise UnsupportedOriginalError(f"Stages that take {into} channels do not follow on stages that give {out}.")


def rows(config: HfvlmALIGNConfig) -> list[Row]:
    width = config.text_config.hidden_size
    source, target = "vision_model.encoder.blocks.{}", "vision_model.layers.{}"
    layer, ours = "text_model.encoder.layer.{}", "text_model.layers.{}"
    return [
        Row("temperature", "logit_scale.scale", scalar),
        # Files of 2023 store the counting numbers.
        Row("text_model.embeddings.position_ids", None, optional=True),
        Row("vision_model.embeddings.convolution.weight", "vision_model.stem.conv.weight"),
        Row("vision_model.embeddings.batchnorm.{}", "vision_model.stem.norm.{}"),
        Row(f"{source}.expansion.expand_conv.weight", f"{target}.expand.conv.weight"),
        Row(f"{source}.expansion.expand_bn.{{}}", f"{target}.expand.norm.{{}}"),
        Row(f"{source}.depthwise_conv.depthwise_conv.weight", f"{target}.depthwise.conv.weight"),
        Row(f"{source}.depthwise_conv.depthwise_norm.{{}}", f"{target}.depthwise.norm.{{}}"),
        Row(f"{source}.squeeze_excite.reduce.weight", f"{target}.excite.fc1.weight", pixel_to_linear),
        Row(f"{source}.squeeze_excite.reduce.bias", f"{target}.excite.fc1.bias"),
        Row(f"{source}.squeeze_excite.expand.weight", f"{target}.excite.fc2.weight", pixel_to_linear),
        Row(f"{source}.squeeze_excite.expand.bias", f"{target}.excite.fc2.bias"),
        Row(f"{source}.projection.project_conv.weight", f"{target}.project.conv.weight"),
        Row(f"{source}.projection.project_bn.{{}}", f"{target}.project.norm.{{}}"),
        Row("text_model.embeddings.word_embeddings.weight", "text_model.embeddings.token.weight"),
        Row("text_model.embeddings.position_embeddings.weight", "text_model.embeddings.position"),
        Row("text_model.embeddings.token_type_embeddings.weight", "text_model.embeddings.token_type.weight"),
        Row("text_model.embeddings.LayerNorm.{}", "text_model.embeddings.norm.{}"),
        *bert_attention(f"{layer}.attention", f"{ours}.attention"),
        *bert_mlp(layer, f"{ours}.mlp"),
        # BERT's pooler is never read, nor trained; transformers' class has one all the same.
        Row("text_model.pooler.dense.weight", (), zeros(width, width)),
        Row("text_model.pooler.dense.bias", (), zeros(width)),
        Row("text_projection.{}", "text_model.projection.{}"),
    ]


def zeros(*shape: int) -> Change:
    """Drop a tensor that an exported file has zeros for."""
    return Change(lambda _: (), lambda: torch.zeros(shape))


def config_from_transformers(original: Mapping[str, Any]) -> HfvlmALIGNConfig:
    native: Any = AlignConfig(**original)
    vision, text = native.vision_config, native.text_config
    check_chain(list(vision.in_channels), list(vision.out_channels))
    if vision.depthwise_padding or vision.pooling_type != "mean":
        raise UnsupportedOriginalError(
            "hfvlm pads as the original and pools by the mean: no depthwise_padding, no max."
        )
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act")
    tables = ("layer_norm_eps", "vocab_size", "max_position_embeddings", "type_vocab_size", "pad_token_id")
    stages: dict[str, Any] = {name: tuple(getattr(vision, name)) for name in STAGES}
    return HfvlmALIGNConfig(
        vision_config=HfvlmALIGNVisionConfig(
            squeeze_ratio=vision.squeeze_expansion_ratio,
            drop_connect_rate=vision.drop_connect_rate,
            **{name: getattr(vision, name) for name in SAME},
            **stages,
        ),
        text_config=HfvlmALIGNTextConfig(
            hidden_dropout=text.hidden_dropout_prob,
            attention_dropout=text.attention_probs_dropout_prob,
            projection_dim=native.projection_dim,
            **{name: getattr(text, name) for name in (*sizes, *tables)},
        ),
        temperature_init_value=native.temperature_init_value,
    )


def config_to_transformers(config: HfvlmALIGNConfig) -> Any:
    """Return transformers' AlignConfig of the same model."""
    vision, text = config.vision_config, config.text_config
    if vision.projection_dim is not None:
        raise UnsupportedOriginalError("transformers' AlignModel has no image projection; this model has one.")
    native = text.to_diff_dict() | {
        "model_type": "align_text_model",
        "hidden_dropout_prob": text.hidden_dropout,
        "attention_probs_dropout_prob": text.attention_dropout,
    }
    return AlignConfig(
        architectures=["AlignModel"],
        projection_dim=text.projection_dim,
        temperature_init_value=float(config.temperature_init_value),
        vision_config={
            "model_type": "align_vision_model",
            "in_channels": [STEM_CHANNELS, *vision.out_channels[:-1]],
            "squeeze_expansion_ratio": float(vision.squeeze_ratio),
            "drop_connect_rate": vision.drop_connect_rate,
            # transformers' momentum is the share of the new batch, the original's 0.99 that of the past.
            "batch_norm_momentum": 0.01,
            **{name: list(getattr(vision, name)) for name in STAGES},
            **{name: getattr(vision, name) for name in SAME},
            **{name: float(getattr(vision, name)) for name in ("width_coefficient", "depth_coefficient")},
        },
        text_config={
            name: value for name, value in native.items() if name not in ("hidden_dropout", "projection_dim")
        },
    )


def processor_to_transformers(processor: HfvlmALIGNProcessor) -> Any:
    """Return transformers' AlignProcessor of the same vocabulary and sizes.

    It averages when it shrinks images, where the original samples, and folds fewer letters; see `antialias` and
    `clean` of ours.
    """
    from transformers import AlignProcessor, BertTokenizer
    from transformers.models.efficientnet.image_processing_pil_efficientnet import EfficientNetImageProcessorPil

    pixels = processor.image_processor
    image_processor = EfficientNetImageProcessorPil(
        size={"height": pixels.resized, "width": pixels.resized},
        crop_size=pixels.size,
        resample=pixels.resample,
        do_center_crop=True,
        rescale_factor=1 / 127.5,
        rescale_offset=True,
        do_normalize=False,
        include_top=False,
    )
    tokenizer = BertTokenizer(
        vocab=processor.tokenizer.get_vocab(), model_max_length=processor.tokenizer.model_max_length
    )
    return AlignProcessor(image_processor, tokenizer)


EXPORT = Export(config=config_to_transformers, processor=processor_to_transformers)
