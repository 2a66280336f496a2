"""LLaVA's releases: whole models, projectors, adapters and deltas to a base; and transformers' own folders.

Source: https://github.com/haotian-liu/LLaVA at c121f04.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, CLIPVisionConfig, LlamaConfig, MistralConfig, MptConfig, Qwen2Config

from hfvlm.checkpoints import CheckpointError
from hfvlm.checkpoints.compositions import add_delta, lengthened, merge_lora
from hfvlm.checkpoints.conversion import Conversion, Names, Source, always, part_of
from hfvlm.checkpoints.key_table import Row, Table
from hfvlm.checkpoints.originals import UnsupportedOriginalError, check_options
from hfvlm.checkpoints.saving import LazyTensors
from hfvlm.conversion import clip as clip_conversion
from hfvlm.conversion.blocks import (
    LLAMA_FIELDS,
    MPT_FIELDS,
    QWEN2_FIELDS,
    llama_rows,
    mpt_rows,
    transformers_vision_rows,
)
from hfvlm.conversion.interop import llava as interop
from hfvlm.conversion.interop.clip import vision_config_of
from hfvlm.models.clip.configuration_clip import HfvlmCLIPVisionConfig
from hfvlm.models.llava.configuration_llava import HfvlmLLaVAConfig, openai_vision_config
from hfvlm.models.llava.processing_llava import HfvlmLLaVAImageProcessor, HfvlmLLaVAProcessor, HfvlmLLaVATokenizer

VOCABULARIES = ("tokenizer.model", "tokenizer.json")
PARTS = {
    "base": "the language model that a projector, an adapter or a delta was trained on, in transformers' format",
    "vision": "the CLIP that the release leaves out, transformers' folder or OpenAI's file",
}
# What a release consists of, where it is more than one weights file.
FILES: dict[str, dict[str, Names]] = {
    "lora": {"main": ("non_lora_trainables.bin",), "adapter": ("adapter_model.safetensors", "adapter_model.bin")},
    "projector": {"main": ("mm_projector.bin",)},
}
TOWER = "model.vision_tower.vision_tower.vision_model"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
MPT_EMBEDDING = "transformer.wte.weight"
OPENAI_TOWERS = {"openai/clip-vit-large-patch14": 224, "openai/clip-vit-large-patch14-336": 336}
LANGUAGE_MODELS = {
    "llava_mistral": MistralConfig,
    "mistral": MistralConfig,
    "llava_mpt": MptConfig,
    "mpt": MptConfig,
    "llava_qwen": Qwen2Config,
    "qwen2": Qwen2Config,
}
# Of language models whose vocabulary names no special tokens: the conversation, and the tokens.
LLAMA_3_PIECES = 128_256
LANGUAGE_SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_3": (
        "llava_llama_3",
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|end_of_text|>"},
    ),
    "llava_qwen": ("qwen_1_5", {"add_bos_token": False, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}),
    "llava_mpt": ("mpt", {"add_bos_token": False, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}),
}
# Options of the original's configuration that change what is computed, with the values that hfvlm has.
PROJECTORS = {"linear": 1, "identity": 0, **{f"mlp{n}x_gelu": n for n in range(1, 9)}}


def layout_of(original: Mapping[str, Any]) -> str:
    """Return "original" or "transformers"; the others are recognised by the files they consist of, or by a preset."""
    return "transformers" if interop.is_native(original) else "original"


def keys_for(config: HfvlmLLaVAConfig, layout: str = "original", keys: Iterable[str] = ()) -> list[Row]:
    """Return the rows for the main file of a release."""
    keys = list(keys)
    if layout == "transformers":
        return interop.rows(config, keys)
    if layout in ("projector", "lora"):
        return projector_rows(config)
    language = mpt_rows() if config.text_config.model_type == "mpt" else llama_rows()
    place = tower_place(config)
    tower = transformers_vision_rows(place, "vision_model")
    inside = any(key.startswith(place) for key in keys)
    projector = [
        r._replace(source=r.source.replace("model.", f"{whole_of(config)}.", 1)) for r in projector_rows(config)
    ]
    return [*language, *projector, *(tower if inside else ())]


def whole_of(config: HfvlmLLaVAConfig) -> str:
    """Return the original's name of the language model without its output layer."""
    return "transformer" if config.text_config.model_type == "mpt" else "model"


def tower_place(config: HfvlmLLaVAConfig) -> str:
    return TOWER.replace("model.", f"{whole_of(config)}.", 1)


def projector_rows(config: HfvlmLLaVAConfig) -> list[Row]:
    rows = linear_rows(config.projector_depth)
    if config.patch_merge == "spatial_unpad":
        rows.append(Row("model.image_newline", "projector.newline.weight"))
    return rows


def linear_rows(depth: int) -> list[Row]:
    """Return the rows of the projector's layers, between which activations stand in the original's Sequential."""
    if depth == 1:
        return [Row("model.mm_projector.{}", "projector.layers.0.{}")]
    return [Row(f"model.mm_projector.{2 * i}.{{}}", f"projector.layers.{i}.{{}}") for i in range(depth)]


def tables_for(config: HfvlmLLaVAConfig, layout: str, sources: Mapping[str, Source]) -> list[Table]:
    """Return each source's tensors with their rows.

    Raises:
        FileNotFoundError: a part is needed, and was not given.
        CheckpointError: a part was given that the release brings itself.
    """
    main = sources["main"].tensors
    if layout == "transformers":
        return [Table(main, keys_for(config, layout, main))]
    tables = {
        "original": lambda: [Table(main, keys_for(config, layout, main))],
        "delta": lambda: [delta_table(config, main, part_of(sources, "base", PARTS))],
        "projector": lambda: adapted(config, projector_of(main), part_of(sources, "base", PARTS)),
        "lora": lambda: adapted(config, trained_with_adapter(main), merged(sources)),
    }[layout]()
    if layout == "original" and "base" in sources:
        raise CheckpointError(
            "This release holds its language model: leave `base` out, or choose the preset of a delta."
        )
    inside = any(str(row[1]).startswith("vision_model") for table in tables for row in table.rows)
    if inside and "vision" in sources:
        raise CheckpointError("This release holds its own vision tower: leave `vision` out.")
    return tables if inside else [*tables, vision_table(sources)]


def vision_table(sources: Mapping[str, Source], parts: Mapping[str, str] = PARTS) -> Table:
    tensors = part_of(sources, "vision", parts)
    rows = clip_conversion.tower_rows(clip_conversion.layout_of(sources["vision"].settings), tensors)
    return Table(tensors, rows, "vision")


def delta_table(config: HfvlmLLaVAConfig, delta: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Table:
    whole = add_delta(base, delta)
    return Table(whole, keys_for(config, "original", whole))


def adapted(config: HfvlmLLaVAConfig, trained: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> list[Table]:
    """Return the tables of a base and what was trained next to it: the projector, at times the tower too."""
    inside = any(key.startswith(TOWER) for key in trained)
    tower = transformers_vision_rows(TOWER, "vision_model") if inside else []
    beside = {key: tensor for key, tensor in trained.items() if key != EMBEDDING}
    base = with_marks(base, trained[EMBEDDING]) if EMBEDDING in trained else base
    return [Table(beside, [*projector_rows(config), *tower], "projector"), Table(base, llama_rows(), "base")]


def with_marks(base: Mapping[str, Tensor], embedding: Tensor) -> LazyTensors:
    """Add tokens for the start and the end of an image, the last two rows of what was trained, to the base. They are
    never generated: their logits are as good as the average token's."""

    def marked() -> Tensor:
        table = base[EMBEDDING]
        return torch.cat([table, embedding[-2:].to(table.dtype)])

    return lengthened(base, [HEAD], len(base[HEAD]) + 2) | LazyTensors({EMBEDDING: marked})


def projector_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of mm_projector.bin, whose names begin with whatever the trainer had wrapped the model
    into."""
    return {f"model.{key[_start(key) :]}": tensor for key, tensor in tensors.items()}


def _start(key: str) -> int:
    return max(key.find("mm_projector."), key.find("image_newline"), key.find("embed_tokens."), 0)


def trained_with_adapter(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of non_lora_trainables.bin, by the names of the model inside PEFT's."""
    names = {key: key.removeprefix("base_model.") for key in tensors}
    if any(name.startswith("model.model.") for name in names.values()):
        names = {key: name.removeprefix("model.") for key, name in names.items()}
    return {names[key]: tensor for key, tensor in tensors.items()}


def merged(sources: Mapping[str, Source]) -> LazyTensors:
    adapter = sources["adapter"]
    return merge_lora(part_of(sources, "base", PARTS), adapter.tensors, adapter.settings)


def config_from_original(original: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> HfvlmLLaVAConfig:
    """Read LLaVA's config.json (with "vision_config", where the tower is at hand), or transformers' LLaVA's."""
    if interop.is_native(original):
        return interop.config_from_transformers(original)
    own = {**original.get("base_config", {}), **original, **original.get("config", {})}
    check_options("LLaVA's config.json", {name: own.get(name) for name in ("s2", "mm_resampler_type")}, ())
    projector = own.get("mm_projector_type", "linear")
    if projector not in PROJECTORS:
        raise UnsupportedOriginalError(f"LLaVA's config.json: hfvlm has no mm_projector_type {projector!r}.")
    table = next((state_dict[name] for name in (EMBEDDING, MPT_EMBEDDING) if name in state_dict), None)
    vocabulary = own["vocab_size"] if table is None else table.shape[0]
    tiled = own.get("image_aspect_ratio") == "anyres"
    return HfvlmLLaVAConfig(
        vision_config=vision_config_from(own),
        text_config=text_config_of(own, vocabulary),
        image_token_id=vocabulary,
        vision_feature_layer=own.get("mm_vision_select_layer", -2),
        keep_class_token=own.get("mm_vision_select_feature", "patch") == "cls_patch",
        projector_depth=PROJECTORS[projector],
        # The original has widths and heights.
        grid_pinpoints=[list(size[::-1]) for size in _pinpoints(own["image_grid_pinpoints"])] if tiled else None,
        patch_merge=own.get("mm_patch_merge_type", "flat"),
    )


def _pinpoints(value: Any) -> list[tuple[int, int]]:
    """Return a list, or parse one from a text."""
    import ast

    return ast.literal_eval(value) if isinstance(value, str) else value


def text_config_of(original: Mapping[str, Any], vocabulary: int) -> Any:
    kind: Any = LANGUAGE_MODELS.get(original.get("model_type", ""), LlamaConfig)
    if kind is MptConfig:
        return mpt_config_of(original, vocabulary)
    if kind is Qwen2Config:
        check_options("LLaVA's config.json", {"use_sliding_window": original.get("use_sliding_window")}, ())
        given = {name: original[name] for name in QWEN2_FIELDS if original.get(name) is not None}
        return Qwen2Config(**given | {"vocab_size": vocabulary})
    fields = {name: original[name] for name in LLAMA_FIELDS if original.get(name) is not None}
    if (fields.get("pad_token_id") or 0) < 0:  # LLaMA's first conversions have -1 for "none"
        del fields["pad_token_id"]
    if kind is MistralConfig:
        fields |= {"sliding_window": original.get("sliding_window")}
    return kind(**fields | {"vocab_size": vocabulary})


def mpt_config_of(original: Mapping[str, Any], vocabulary: int) -> MptConfig:
    """Return MPT's configuration.

    Raises:
        UnsupportedOriginalError: it has an option that transformers' MPT lacks.
    """
    attention = dict(original.get("attn_config") or {})
    refused = {
        "alibi": not attention.get("alibi", original.get("alibi", True)),
        "qk_ln": attention.get("qk_ln", original.get("attn_qk_ln", False)),
        "learned_pos_emb": original.get("learned_pos_emb", False) and not attention.get("alibi", True),
        "no_bias": not original.get("no_bias", True),
        "expansion_ratio": original.get("expansion_ratio", 4) != 4,
    }
    check_options("LLaVA's config.json", refused, ())
    given = {name: original[name] for name in MPT_FIELDS if original.get(name) is not None}
    known = {name: attention[name] for name in ("clip_qkv", "softmax_scale") if attention.get(name) is not None}
    return MptConfig(**given | {"vocab_size": vocabulary, "learned_pos_emb": False, "attn_config": known})


def vision_config_from(original: Mapping[str, Any]) -> HfvlmCLIPVisionConfig:
    """Return the configuration of the tower that is given, or of the OpenAI's that config.json names."""
    given, name = original.get("vision_config"), original.get("mm_vision_tower", original.get("vision_tower", ""))
    if given:
        native: Any = AutoConfig.for_model(**given) if given.get("model_type") else CLIPVisionConfig(**given)
        native = getattr(native, "vision_config", native)
        return vision_config_of(native)
    if name not in OPENAI_TOWERS:
        raise UnsupportedOriginalError(
            f"LLaVA's config.json: mm_vision_tower {name!r} is none of {', '.join(OPENAI_TOWERS)}: give its folder as "
            "the part 'vision'."
        )
    return openai_vision_config(OPENAI_TOWERS[name])


def settings_from_original(original: Mapping[str, Any], preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """Return the processor's settings. The conversation is in no file but for the names that the authors load by."""
    if interop.is_native(original):
        tiled = original["model_type"] == "llava_next"
        native = preprocessing.get("image_processor", preprocessing)
        crop = "pad" if native.get("do_pad") and not tiled else "crop"
        return {"image_processor": {"resize_mode": "tiles" if tiled else crop}}
    own = original.get("config", original)
    mode = {"anyres": "tiles", "pad": "pad"}.get(own.get("image_aspect_ratio") or "", "crop")
    settings: dict[str, Any] = {"image_processor": {"resize_mode": mode}, "tokenizer": {}}
    added = ["<im_patch>"] if own.get("mm_use_im_patch_token", False) else []
    if own.get("mm_use_im_start_end", False):
        added += ["<im_start>", "<im_end>"]
        settings |= {"image_start": "<im_start>", "image_end": "<im_end>"}
    settings["tokenizer"]["added"] = added
    if "tokenizer_model_max_length" in own:
        settings["tokenizer"]["model_max_length"] = own["tokenizer_model_max_length"]
    kind = own.get("model_type", "")
    kind = "llama_3" if kind == "llava_llama" and own.get("vocab_size", 0) >= LLAMA_3_PIECES else kind
    if kind in LANGUAGE_SETTINGS:
        conversation, tokens = LANGUAGE_SETTINGS[kind]
        settings |= {"conversation": conversation, "tokenizer": settings["tokenizer"] | tokens}
    return settings


def image_processor_for(config: HfvlmLLaVAConfig, settings: Mapping[str, Any]) -> HfvlmLLaVAImageProcessor:
    own = {"size": config.vision_config.image_size, "grid_pinpoints": config.grid_pinpoints}
    return HfvlmLLaVAImageProcessor(**own | settings.get("image_processor", {}))


def processor_for(config: HfvlmLLaVAConfig, settings: Mapping[str, Any], vocabulary: Path) -> HfvlmLLaVAProcessor:
    """Return the processor; `vocabulary` is the language model's."""
    options = dict(settings.get("tokenizer", {}))
    added, size = list(options.pop("added", ())), config.image_token_id
    plain = HfvlmLLaVATokenizer.from_vocabulary(vocabulary, added=added, **options)
    if len(plain) > size:
        raise ValueError(
            f"{vocabulary}: its {len(plain)} pieces are more than the model's {size} (image_token_id): this is the "
            "vocabulary of another model."
        )
    # Rows that the embedding table has for no piece get names, so that the placeholder comes after them.
    filling = [f"<unused_{i}>" for i in range(len(plain), size)]
    added += [*filling, HfvlmLLaVAProcessor.image_token]
    tokenizer = HfvlmLLaVATokenizer.from_vocabulary(vocabulary, added=added, **options)
    names = ("conversation", "image_start", "image_end")
    return HfvlmLLaVAProcessor(
        image_processor_for(config, settings),
        tokenizer,
        **{name: settings[name] for name in names if name in settings},
        patch_size=config.vision_config.patch_size,
        keep_class_token=config.keep_class_token,
        patch_merge=config.patch_merge,
    )


CONVERSION = Conversion(
    config_from_original=config_from_original,
    keys_for=keys_for,
    layout_of=layout_of,
    settings_from_original=settings_from_original,
    image_processor_for=image_processor_for,
    processor_for=processor_for,
    vocabularies_for=always([VOCABULARIES]),
    parts=PARTS,
    files=FILES,
    compose=tables_for,
    export=interop.EXPORT,
)
