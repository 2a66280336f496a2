"""transformers' LlavaForConditionalGeneration and LlavaNextForConditionalGeneration."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from transformers import AutoConfig, LlavaConfig, LlavaNextConfig

from hfvlm.checkpoints.compositions import lengthened
from hfvlm.checkpoints.conversion import Export
from hfvlm.checkpoints.key_table import Row
from hfvlm.checkpoints.originals import UnsupportedOriginalError
from hfvlm.conversion.blocks import llama_rows, transformers_vision_rows
from hfvlm.conversion.interop.clip import vision_config_of
from hfvlm.models.llava.configuration_llava import HfvlmLLaVAConfig
from hfvlm.models.llava.processing_llava import HfvlmLLaVAProcessor


def is_native(original: Mapping[str, Any]) -> bool:
    """Tell whether a configuration is transformers' own; the authors' first release called itself "llava" too."""
    return original.get("model_type") in ("llava", "llava_next") and "text_config" in original


def rows(config: HfvlmLLaVAConfig, keys: Iterable[str] = ()) -> list[Row]:
    """Return the rows of LlavaForConditionalGeneration and LlavaNextForConditionalGeneration, whose parts each version
    of transformers saves under other names; without `keys`, under those that all of them load."""
    keys = list(keys)

    def start(part: str, otherwise: str = "") -> str:
        return next((key.removesuffix(part) for key in keys if key.endswith(part)), otherwise)

    language = start(".embed_tokens.weight", "language_model.model")
    head = start("lm_head.weight", "language_model.")
    tower = start(".embeddings.class_embedding", "vision_tower.vision_model")
    projector = start("multi_modal_projector.linear_1.weight")
    layers = [(f"{projector}multi_modal_projector.linear_{i + 1}.{{}}", f"projector.layers.{i}.{{}}") for i in (0, 1)]
    found = [
        *llama_rows(language, f"{head}lm_head"),
        *transformers_vision_rows(tower, "vision_model"),
        *(Row(*layer) for layer in layers),
    ]
    if config.patch_merge == "spatial_unpad":
        found.append(Row(f"{start('image_newline')}image_newline", "projector.newline.weight"))
    return found


def config_from_transformers(original: Mapping[str, Any]) -> HfvlmLLaVAConfig:
    native: Any = AutoConfig.for_model(**original)
    if native.vision_config.model_type != "clip_vision_model":
        raise UnsupportedOriginalError(
            f"vision_config: hfvlm's LLaVA reads CLIP, not {native.vision_config.model_type}."
        )
    if native.projector_hidden_act != "gelu" or not native.multimodal_projector_bias:
        raise UnsupportedOriginalError("hfvlm's projector has GELU and biases.")
    if not isinstance(native.vision_feature_layer, int):
        raise UnsupportedOriginalError("vision_feature_layer: hfvlm's LLaVA reads one layer.")
    tiled = native.model_type == "llava_next"
    return HfvlmLLaVAConfig(
        vision_config=vision_config_of(native.vision_config),
        text_config=native.text_config,
        image_token_id=native.image_token_index,
        vision_feature_layer=native.vision_feature_layer,
        keep_class_token=native.vision_feature_select_strategy == "full",
        grid_pinpoints=[list(size) for size in native.image_grid_pinpoints] if tiled else None,
        patch_merge="spatial_unpad" if tiled else "flat",
    )


def config_to_transformers(config: HfvlmLLaVAConfig) -> Any:
    """Return transformers' LlavaConfig, or LlavaNextConfig of a model that cuts tiles."""
    if config.projector_depth != 2:
        raise UnsupportedOriginalError(
            f"projector_depth {config.projector_depth}: transformers' LLaVA has a projector of two layers."
        )
    tiled = config.grid_pinpoints is not None
    if tiled != (config.patch_merge == "spatial_unpad"):
        raise UnsupportedOriginalError(
            f"patch_merge {config.patch_merge!r}: transformers' LLaVA-NeXT has none but its own."
        )
    vision = config.vision_config.to_diff_dict() | {"model_type": "clip_vision_model"}
    vision = {name: value for name, value in vision.items() if value is not None}
    text = config.text_config.to_dict()
    text["vocab_size"] = max(text["vocab_size"], config.image_token_id + 1)
    fields = {
        "vision_config": vision,
        "text_config": text,
        "image_token_index": config.image_token_id,
        "vision_feature_layer": config.vision_feature_layer,
        "vision_feature_select_strategy": "full" if config.keep_class_token else "default",
        "image_seq_length": config.count_tokens(),
    }
    if tiled:
        pinpoints = [list(size) for size in config.grid_pinpoints or ()]
        kind = "LlavaNextForConditionalGeneration"
        return LlavaNextConfig(architectures=[kind], image_grid_pinpoints=pinpoints, **fields)
    return LlavaConfig(architectures=["LlavaForConditionalGeneration"], **fields)


def tensors_to_transformers(tensors: Mapping[str, Tensor], native: Any) -> Mapping[str, Tensor]:
    """Return tensors with rows for the placeholder, which transformers looks up. The average token's logit is never
    the largest."""
    names = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")
    return lengthened(tensors, names, native.text_config.vocab_size)


def processor_to_transformers(processor: HfvlmLLaVAProcessor) -> Any:
    """Return transformers' LlavaProcessor or LlavaNextProcessor.

    It encodes a text with its images in one piece, which can differ from the authors' at the edges of images.
    """
    from transformers import LlavaNextProcessor, LlavaProcessor, PreTrainedTokenizerFast
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    own, pixels = processor.tokenizer, processor.image_processor
    if processor.image_start or processor.image_end:
        raise UnsupportedOriginalError("image_start: transformers' LlavaProcessor puts no tokens around images.")
    special = {name: getattr(own, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=own.backend_tokenizer,
        padding_side="left",
        extra_special_tokens={"image_token": processor.image_token},
        **special,
    )
    edge = pixels.size["height"]
    shared = {
        "size": {"shortest_edge": edge},
        "crop_size": pixels.size,
        "resample": pixels.resample,
        "image_mean": pixels.image_mean,
        "image_std": pixels.image_std,
    }
    options = {
        "patch_size": processor.patch_size,
        "vision_feature_select_strategy": "full" if processor.keep_class_token else "default",
        "image_token": processor.image_token,
        "num_additional_image_tokens": 1,
        "chat_template": processor.chat_template,
    }
    if pixels.resize_mode == "tiles":
        tiled = LlavaNextImageProcessorPil(image_grid_pinpoints=pixels.grid_pinpoints, **shared)
        return LlavaNextProcessor(tiled, tokenizer, **options)
    padded = pixels.resize_mode == "pad"
    native = LlavaImageProcessorPil(do_pad=True, **shared) if padded else CLIPImageProcessorPil(**shared)
    return LlavaProcessor(native, tokenizer, **options)


EXPORT = Export(config=config_to_transformers, processor=processor_to_transformers, tensors=tensors_to_transformers)
