"""transformers' BlipForConditionalGeneration, BlipForQuestionAnswering and BlipForImageTextRetrieval."""

import json
from collections.abc import Mapping
from typing import Any

from transformers import BlipConfig

from hfvlm.checkpoints.conversion import Export, head_of
from hfvlm.checkpoints.key_table import Row, flat, split, unbatched
from hfvlm.checkpoints.originals import UnsupportedOriginalError
from hfvlm.models.blip.configuration_blip import HfvlmBLIPConfig, HfvlmBLIPTextConfig, HfvlmBLIPVisionConfig
from hfvlm.models.blip.processing_blip import HfvlmBLIPProcessor

# transformers' classes for these heads; it has none for the others. Its BlipModel has projections of its own.
NATIVE = {
    "HfvlmBLIPForConditionalGeneration": "BlipForConditionalGeneration",
    "HfvlmBLIPForQuestionAnswering": "BlipForQuestionAnswering",
    "HfvlmBLIPForImageTextRetrieval": "BlipForImageTextRetrieval",
}
SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "layer_norm_eps"),
)
VISION_FIELDS = (*SIZES, "attention_dropout", "image_size", "patch_size")
TEXT_FIELDS = (*SIZES, "vocab_size", "pad_token_id", "max_position_embeddings")


def check_native(head: str) -> None:
    """Refuse heads that transformers does not have."""
    if head not in NATIVE:
        raise UnsupportedOriginalError(f"transformers has no BLIP like {head}; it has {', '.join(NATIVE.values())}.")


def vision_rows(head: str) -> list[Row]:
    """Return the rows of the vision tower of a model with `head`; texts go by the authors' names."""
    check_native(head)
    embeddings, block, layer = "vision_model.embeddings", "vision_model.encoder.layers.{}", "vision_model.layers.{}"
    return [
        Row(f"{embeddings}.class_embedding", "vision_model.class_token", flat),
        Row(f"{embeddings}.position_embedding", "vision_model.position", unbatched),
        Row(f"{embeddings}.patch_embedding.{{}}", "vision_model.patches.projection.{}"),
        Row(f"{block}.layer_norm1.{{}}", f"{layer}.attention_norm.{{}}"),
        Row(f"{block}.self_attn.qkv.{{}}", tuple(f"{layer}.attention.{part}_proj.{{}}" for part in "qkv"), split(3)),
        Row(f"{block}.self_attn.projection.{{}}", f"{layer}.attention.out_proj.{{}}"),
        Row(f"{block}.layer_norm2.{{}}", f"{layer}.mlp_norm.{{}}"),
        Row(f"{block}.mlp.{{}}.{{}}", f"{layer}.mlp.{{}}.{{}}"),
        Row("vision_model.post_layernorm.{}", "vision_model.post_norm.{}"),
    ]


def special_tokens(vocabulary: int, sep: int | None = None) -> dict[str, Any]:
    """Return the ids of special tokens: [DEC] and [ENC] are the last two, [SEP] is BERT's."""
    end = 102 if sep is None and vocabulary == 30524 else sep
    return {"bos_token_id": vocabulary - 2, "encoder_token_id": vocabulary - 1, "eos_token_id": end}


def config_from_transformers(original: Mapping[str, Any]) -> HfvlmBLIPConfig:
    native: Any = BlipConfig(**original)
    ours = {theirs: name for name, theirs in NATIVE.items()}
    head = ours.get(next(iter(native.architectures or ()), ""))
    if head is None:
        raise UnsupportedOriginalError(
            f"transformers' {native.architectures} is no model that BLIP's authors released; of its classes, "
            f"{', '.join(ours)} can be converted."
        )
    vision, text = native.vision_config, native.text_config
    joint = native.image_text_hidden_size if head == "HfvlmBLIPForImageTextRetrieval" else None
    return HfvlmBLIPConfig(
        architectures=[head],
        vision_config=HfvlmBLIPVisionConfig(
            projection_dim=joint,
            **{name: getattr(vision, name) for name in VISION_FIELDS},
        ),
        text_config=HfvlmBLIPTextConfig(
            projection_dim=joint,
            context_size=text.encoder_hidden_size,
            hidden_dropout=text.hidden_dropout_prob,
            attention_dropout=text.attention_probs_dropout_prob,
            **{name: getattr(text, name) for name in TEXT_FIELDS},
            **special_tokens(text.vocab_size, text.sep_token_id) | {"bos_token_id": text.bos_token_id},
        ),
        similarity_temperature=0.07 if joint is None else None,
        label_smoothing=native.label_smoothing,
    )


def config_to_transformers(config: HfvlmBLIPConfig) -> Any:
    """Return transformers' BlipConfig of the same model."""
    head, vision, text = head_of(config, "HfvlmBLIPModel"), config.vision_config, config.text_config
    check_native(head)
    if head == "HfvlmBLIPForQuestionAnswering" and vision.hidden_size != text.hidden_size:
        raise UnsupportedOriginalError("transformers' BlipForQuestionAnswering needs towers of the same width.")
    return BlipConfig(
        architectures=[NATIVE[head]],
        vision_config={name: getattr(vision, name) for name in VISION_FIELDS},
        text_config={
            **{name: getattr(text, name) for name in TEXT_FIELDS},
            "encoder_hidden_size": text.context_size,
            "hidden_dropout_prob": text.hidden_dropout,
            "attention_probs_dropout_prob": text.attention_dropout,
            "bos_token_id": text.bos_token_id,
            "eos_token_id": text.eos_token_id,
            "sep_token_id": text.eos_token_id,
            "label_smoothing": config.label_smoothing,
        },
        image_text_hidden_size=vision.projection_dim or 256,
        label_smoothing=config.label_smoothing,
    )


def processor_to_transformers(processor: HfvlmBLIPProcessor) -> Any:
    """Return transformers' BlipProcessor of the same vocabulary and pixels; it neither cleans texts nor knows a
    prompt."""
    from transformers import BertTokenizer, BlipImageProcessorPil, BlipProcessor

    pixels, tokenizer = processor.image_processor, processor.tokenizer
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    native = BertTokenizer(
        vocab=model["vocab"],
        model_max_length=tokenizer.model_max_length,
        bos_token="[DEC]",
        extra_special_tokens=["[ENC]"],
    )
    image_processor = BlipImageProcessorPil(
        size=pixels.size, resample=pixels.resample, image_mean=pixels.image_mean, image_std=pixels.image_std
    )
    return BlipProcessor(image_processor, native)


EXPORT = Export(config=config_to_transformers, processor=processor_to_transformers)
