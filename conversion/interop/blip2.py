"""transformers' Blip2ForConditionalGeneration, Blip2Model, Blip2ForImageTextRetrieval and
InstructBlipForConditionalGeneration, to hfvlm and back."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from hfvlm.checkpoints.compositions import lengthened
from hfvlm.checkpoints.conversion import Export, head_of
from hfvlm.checkpoints.key_table import Change, Row, flat, scalar, split, unbatched
from hfvlm.checkpoints.originals import UnsupportedOriginalError
from hfvlm.checkpoints.saving import LazyTensors
from hfvlm.conversion.blocks import bert_attention, bert_mlp, language_rows, t5_rows
from hfvlm.conversion.interop.blip import SIZES, VISION_FIELDS
from hfvlm.models.blip2.configuration_blip2 import (
    HfvlmBLIP2CLIPVisionConfig,
    HfvlmBLIP2Config,
    HfvlmBLIP2QFormerConfig,
    HfvlmBLIP2VisionConfig,
)
from hfvlm.models.blip2.processing_blip2 import HfvlmBLIP2RetrievalProcessor, HfvlmInstructBLIPProcessor

NATIVE_TYPES = ("blip-2", "instructblip")
# What the original calls its language model and what leads there, by transformers' model_type.
LANGUAGE_MODELS = {"opt": ("opt_model", "opt_proj"), "t5": ("t5_model", "t5_proj"), "llama": ("llm_model", "llm_proj")}
RETRIEVAL = "HfvlmBLIP2ForImageTextRetrieval"
GENERATIVE = ("HfvlmBLIP2ForConditionalGeneration", "HfvlmBLIP2T5ForConditionalGeneration")


def without_keys(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return the biases of queries and values; those of keys are zero."""
    query, _, value = tensor.chunk(3)
    return query, value


two_biases = Change(without_keys, lambda query, value: torch.cat([query, torch.zeros_like(query), value]))


def rows(config: HfvlmBLIP2Config, keys: Iterable[str] = ()) -> list[Row]:
    """Return the rows of Blip2ForConditionalGeneration, Blip2Model, InstructBlipForConditionalGeneration and
    Blip2ForImageTextRetrieval; without `keys`, in the names that all versions of transformers load."""
    check_native(config)
    keys, read = list(keys), config.qformer_config.vocab_size is not None
    found = [*vision_rows(), *qformer_rows(config)]
    if head_of(config, GENERATIVE[0]) == RETRIEVAL:
        found += [Row(f"{name}_projection.{{}}", f"{part}_projection.{{}}") for name, part in JOINT.items()]
        found += [Row("itm_head.{}", "itm_head.{}"), *word_rows("embeddings")]
        if config.similarity_temperature is not None:
            found.append(Row("temp", "logit_scale.scale", scalar, optional=True))
        return found
    if read:
        found += word_rows("qformer.embeddings")
    found.append(Row("language_projection.{}", "projector.layers.0.{}"))
    start = start_of(config, keys)
    if config.text_config.model_type == "t5":  # a head that is tied is not saved
        return [*found, *t5_rows(start, own_head=not keys or f"{start}lm_head.weight" in keys)]
    return [*found, *language_rows(config.text_config.model_type, start)]


JOINT = {"vision": "image", "text": "text"}


def start_of(config: HfvlmBLIP2Config, keys: list[str]) -> str:
    """Return what comes before the language model's own names, which differ between versions of transformers."""
    known = {"opt": "model.decoder.embed_positions.weight", "t5": "shared.weight", "llama": "model.norm.weight"}
    end = known[config.text_config.model_type]
    return next((key.removesuffix(end) for key in keys if key.endswith(f".{end}")), "language_model.")


def vision_rows() -> list[Row]:
    embeddings, block, layer = "vision_model.embeddings", "vision_model.encoder.layers.{}", "vision_model.layers.{}"
    attention = f"{layer}.attention"
    return [
        Row(f"{embeddings}.class_embedding", "vision_model.class_token", flat),
        Row(f"{embeddings}.position_embedding", "vision_model.position", unbatched),
        Row(f"{embeddings}.patch_embedding.{{}}", "vision_model.patches.projection.{}"),
        Row(f"{block}.layer_norm1.{{}}", f"{layer}.attention_norm.{{}}"),
        Row(f"{block}.self_attn.qkv.weight", tuple(f"{attention}.{part}_proj.weight" for part in "qkv"), split(3)),
        Row(f"{block}.self_attn.qkv.bias", tuple(f"{attention}.{part}_proj.bias" for part in "qv"), two_biases),
        Row(f"{block}.self_attn.projection.{{}}", f"{attention}.out_proj.{{}}"),
        Row(f"{block}.layer_norm2.{{}}", f"{layer}.mlp_norm.{{}}"),
        Row(f"{block}.mlp.{{}}.{{}}", f"{layer}.mlp.{{}}.{{}}"),
        Row("vision_model.post_layernorm.{}", "qformer_model.context_norm.{}"),
    ]


def qformer_rows(config: HfvlmBLIP2Config) -> list[Row]:
    read = config.qformer_config.vocab_size is not None
    instructed = head_of(config, GENERATIVE[0]) != RETRIEVAL and read
    norm = "qformer.embeddings.layernorm" if instructed else "qformer.layernorm"
    return [
        Row("query_tokens", "qformer_model.embeddings.queries", unbatched),
        Row(f"{norm}.{{}}", "qformer_model.embeddings.norm.{}"),
        *qformer_layers("qformer.encoder.layer.{}", "attention", read=read),
    ]


def qformer_layers(source: str, inner: str, *, read: bool) -> list[Row]:
    """Return the rows of the Q-Former's layers, with an MLP for texts if it reads them; `inner` as of
    `bert_attention`."""
    ours = "qformer_model.layers.{}"
    return [
        *bert_attention(f"{source}.attention", f"{ours}.attention", inner=inner),
        *bert_attention(f"{source}.crossattention", f"{ours}.cross_attention", inner=inner),
        *bert_mlp(source, f"{ours}.query_mlp", kind="_query"),
        *(bert_mlp(source, f"{ours}.mlp") if read else ()),
    ]


def word_rows(source: str) -> list[Row]:
    return [
        Row(f"{source}.word_embeddings.weight", "qformer_model.embeddings.token.weight"),
        Row(f"{source}.position_embeddings.weight", "qformer_model.embeddings.position"),
        # The counting numbers.
        Row(f"{source}.position_ids", None, optional=True),
    ]


def config_from_transformers(original: Mapping[str, Any]) -> HfvlmBLIP2Config:
    native: Any = AutoConfig.for_model(**original)
    kind = next(iter(native.architectures or ()), "")
    retrieval, instructed = kind == "Blip2ForImageTextRetrieval", native.model_type == "instructblip"
    text = native.text_config
    if not retrieval and text.model_type not in LANGUAGE_MODELS:
        known = ", ".join(LANGUAGE_MODELS)
        raise UnsupportedOriginalError(f"text_config: hfvlm's BLIP-2 has {known}, not {text.model_type}.")
    vision, qformer = native.vision_config, native.qformer_config
    joint = native.image_text_hidden_size if retrieval else None
    words: dict[str, Any] = {"vocab_size": None}
    if retrieval or instructed:
        words = {"vocab_size": qformer.vocab_size, "bos_token_id": qformer.vocab_size - 1, "eos_token_id": 102}
    size = 50272 if retrieval else text.vocab_size
    place = getattr(native, "image_token_index", None)
    return HfvlmBLIP2Config(
        architectures=[RETRIEVAL if retrieval else GENERATIVE[text.model_type == "t5"]],
        vision_config=HfvlmBLIP2VisionConfig(
            **{name: getattr(vision, name) for name in VISION_FIELDS},
        ),
        qformer_config=HfvlmBLIP2QFormerConfig(
            num_queries=native.num_query_tokens,
            context_size=vision.hidden_size,
            context_norm_eps=vision.layer_norm_eps,
            cross_attention_frequency=qformer.cross_attention_frequency,
            hidden_dropout=qformer.hidden_dropout_prob,
            attention_dropout=qformer.attention_probs_dropout_prob,
            projection_dim=joint,
            **{name: getattr(qformer, name) for name in (*SIZES, "max_position_embeddings")},
            **words,
        ),
        text_config=None if retrieval else text,
        image_token_id=size if place is None else place,
        video_token_id=size + 1,
        similarity_temperature=None if retrieval else 0.07,
    )


def check_native(config: HfvlmBLIP2Config) -> None:
    """Refuse what transformers' classes do not compute."""
    if head_of(config, GENERATIVE[0]) == "HfvlmBLIP2ForPreTraining":
        raise UnsupportedOriginalError(
            f"transformers' BLIP-2 has no generative head of the first stage: load it as {RETRIEVAL}, and save that."
        )
    if isinstance(config.vision_config, HfvlmBLIP2CLIPVisionConfig):
        raise UnsupportedOriginalError("transformers' BLIP-2 has no tower but EVA-CLIP's.")


def config_to_transformers(config: HfvlmBLIP2Config) -> Any:
    """Return transformers' Blip2Config or InstructBlipConfig of the same model. It has one epsilon for the norms of
    the tower and the one behind it, which is that of the tower here."""
    from transformers import Blip2Config, InstructBlipConfig

    check_native(config)
    vision, qformer, text = config.vision_config, config.qformer_config, config.text_config
    retrieval = head_of(config, GENERATIVE[0]) == RETRIEVAL
    instructed = not retrieval and qformer.vocab_size is not None
    kind: Any = InstructBlipConfig if instructed else Blip2Config
    fields: dict[str, Any] = {
        "vision_config": {name: getattr(vision, name) for name in VISION_FIELDS},
        "qformer_config": {
            **{name: getattr(qformer, name) for name in (*SIZES, "max_position_embeddings")},
            "vocab_size": qformer.vocab_size or 30523,
            "cross_attention_frequency": qformer.cross_attention_frequency,
            "encoder_hidden_size": qformer.context_size,
            "hidden_dropout_prob": qformer.hidden_dropout,
            "attention_probs_dropout_prob": qformer.attention_dropout,
            "use_qformer_text_input": retrieval,
        },
        "num_query_tokens": qformer.num_queries,
    }
    if retrieval:
        fields |= {"image_text_hidden_size": qformer.projection_dim, "architectures": ["Blip2ForImageTextRetrieval"]}
        return kind(**fields)
    fields["text_config"] = text.to_dict() | {"vocab_size": max(text.vocab_size, config.image_token_id + 1)}
    head = "InstructBlipForConditionalGeneration" if instructed else "Blip2ForConditionalGeneration"
    return kind(architectures=[head], image_token_index=config.image_token_id, **fields)


def tensors_to_transformers(tensors: Mapping[str, Tensor], native: Any) -> Mapping[str, Tensor]:
    """Return tensors with rows for the placeholder, which transformers looks up; the average token's logit is never
    the largest. Without the temperature, since transformers compares cosines as they are."""
    ends = ("embed_tokens.weight", "shared.weight", "lm_head.weight")
    names = [name for name in tensors if name != "temp"]
    tables = [name for name in names if name.startswith("language_model.") and name.endswith(ends)]
    size = native.text_config.vocab_size if tables else 0
    return lengthened(LazyTensors.of(tensors, names), tables, size)


def processor_to_transformers(processor: Any) -> Any:
    """Return transformers' Blip2Processor or InstructBlipProcessor. It knows neither a prompt nor a template of
    questions."""
    from transformers import Blip2Processor, BlipImageProcessorPil, InstructBlipProcessor

    pixels = processor.image_processor
    images = BlipImageProcessorPil(
        size=pixels.size, resample=pixels.resample, image_mean=pixels.image_mean, image_std=pixels.image_std
    )
    tokenizer = native_tokenizer(processor.tokenizer)
    if isinstance(processor, HfvlmBLIP2RetrievalProcessor):
        return Blip2Processor(images, tokenizer)
    options = {"num_query_tokens": processor.num_queries}
    if isinstance(processor, HfvlmInstructBLIPProcessor):
        return InstructBlipProcessor(images, tokenizer, native_tokenizer(processor.qformer_tokenizer), **options)
    return Blip2Processor(images, tokenizer, **options)


def native_tokenizer(own: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    names = ("bos_token", "eos_token", "unk_token", "pad_token", "cls_token", "sep_token", "mask_token")
    special = {name: getattr(own, name) for name in names if getattr(own, name, None) is not None}
    return PreTrainedTokenizerFast(
        tokenizer_object=own.backend_tokenizer,
        padding_side=own.padding_side,
        truncation_side=own.truncation_side,
        model_max_length=own.model_max_length,
        **special,
    )


EXPORT = Export(config=config_to_transformers, processor=processor_to_transformers, tensors=tensors_to_transformers)
