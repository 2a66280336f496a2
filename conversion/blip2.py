"""BLIP-2's and InstructBLIP's released files, with the tower and the language model that they leave out; and
transformers' folders.

Source: https://github.com/salesforce/LAVIS at 506965b.
"""

from collections.abc import Iterable, Mapping
from math import isqrt
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import LlamaConfig, OPTConfig, T5Config

from hfvlm.checkpoints import CheckpointError
from hfvlm.checkpoints.compositions import lengthened
from hfvlm.checkpoints.conversion import Conversion, Names, Source, head_of, part_of
from hfvlm.checkpoints.key_table import Row, Table, flat, scalar, split, unbatched
from hfvlm.checkpoints.originals import UnsupportedOriginalError, check_options, count_layers
from hfvlm.conversion.blocks import LLAMA_FIELDS, language_rows, openai_tower, row, timm_layers
from hfvlm.conversion.interop import blip2 as interop
from hfvlm.conversion.interop.blip2 import GENERATIVE, LANGUAGE_MODELS, qformer_layers
from hfvlm.conversion.processors import check_vocabulary, sized, transformers_pixels
from hfvlm.models.blip2.configuration_blip2 import (
    HfvlmBLIP2CLIPVisionConfig,
    HfvlmBLIP2Config,
    HfvlmBLIP2QFormerConfig,
    HfvlmBLIP2VisionConfig,
)
from hfvlm.models.blip2.processing_blip2 import (
    HfvlmBLIP2ImageProcessor,
    HfvlmBLIP2Processor,
    HfvlmBLIP2QFormerTokenizer,
    HfvlmBLIP2RetrievalProcessor,
    HfvlmBLIP2Tokenizer,
    HfvlmInstructBLIPProcessor,
)

PARTS = {
    "vision": "eva_vit_g.pth or clip_vit_L.pth, the frozen tower that a release leaves out",
    "base": "the language model that a release leaves out, in transformers' format",
}
# OPT ends a caption with a new line.
OPT_NEWLINE = 50118


def layout_of(original: Mapping[str, Any]) -> str:
    return "transformers" if original.get("model_type") in interop.NATIVE_TYPES else "lavis"


def keys_for(config: HfvlmBLIP2Config, layout: str = "lavis", keys: Iterable[str] = ()) -> list[Row]:
    """Return the rows for a released file, or for transformers' folder."""
    if layout == "transformers":
        return interop.rows(config, keys)
    keys = list(keys)
    inside = any(key.startswith("visual_encoder.") for key in keys)
    rows = [*(vision_rows(config, "visual_encoder.") if inside else ()), *qformer_rows(config)]
    if head_of(config, GENERATIVE[0]) not in GENERATIVE:
        return [*rows, *first_stage_rows(config)]
    model, bridge = LANGUAGE_MODELS[config.text_config.model_type]
    rows.append(Row(f"{bridge}.{{}}", "projector.layers.0.{}"))
    if holds_language_model(config, keys):
        return [*rows, *language_rows(config.text_config.model_type, f"{model}.")]
    # A tied output layer can slip through the filter that leaves the language model out.
    return [*rows, Row(f"{model}.{{...}}", None, optional=True)]


def holds_language_model(config: HfvlmBLIP2Config, keys: Iterable[str]) -> bool:
    start = f"{LANGUAGE_MODELS[config.text_config.model_type][0]}."
    return sum(key.startswith(start) for key in keys) > 4


def vision_rows(config: HfvlmBLIP2Config, source: str = "") -> list[Row]:
    """Return the rows of the tower that the configuration names; `source` ends in a dot."""
    if isinstance(config.vision_config, HfvlmBLIP2CLIPVisionConfig):
        return openai_tower(source, "vision_model")
    block, layer = f"{source}blocks.{{}}", "vision_model.layers.{}"
    return [
        Row(f"{source}cls_token", "vision_model.class_token", flat),
        Row(f"{source}pos_embed", "vision_model.position", unbatched),
        Row(f"{source}patch_embed.proj.{{}}", "vision_model.patches.projection.{}"),
        *(Row(f"{block}.attn.{part}_bias", f"{layer}.attention.{part}_proj.bias") for part in "qv"),
        Row(f"{block}.attn.qkv.weight", tuple(f"{layer}.attention.{part}_proj.weight" for part in "qkv"), split(3)),
        *(one for one in timm_layers(f"{source}blocks", "vision_model.layers") if ".qkv." not in one.source),
    ]


def qformer_rows(config: HfvlmBLIP2Config) -> list[Row]:
    read, table = config.qformer_config.vocab_size is not None, "Qformer.bert.embeddings"
    rows = [
        Row("query_tokens", "qformer_model.embeddings.queries", unbatched),
        Row("ln_vision.{}", "qformer_model.context_norm.{}"),
        # The counting numbers.
        Row(f"{table}.position_ids", None, optional=True),
        Row(f"{table}.LayerNorm.{{}}", "qformer_model.embeddings.norm.{}"),
        *qformer_layers("Qformer.bert.encoder.layer.{}", "self", read=read),
    ]
    if not read:
        return rows
    words = ["qformer_model.embeddings.token.weight"]
    if head_of(config, GENERATIVE[0]) == "HfvlmBLIP2ForPreTraining":
        words.append("lm_head.decoder.weight")
    return [
        *rows,
        row(f"{table}.word_embeddings.weight", *words),
        Row(f"{table}.position_embeddings.weight", "qformer_model.embeddings.position"),
    ]


def first_stage_rows(config: HfvlmBLIP2Config) -> list[Row]:
    head = "Qformer.cls.predictions"
    rows = [
        Row("vision_proj.{}", "image_projection.{}"),
        Row("text_proj.{}", "text_projection.{}"),
        Row("temp", "logit_scale.scale", scalar),
        Row("itm_head.{}", "itm_head.{}"),
    ]
    if head_of(config, GENERATIVE[0]) != "HfvlmBLIP2ForPreTraining":
        return [*rows, Row(f"{head}.{{...}}", None, optional=True)]
    return [
        *rows,
        Row(f"{head}.bias", "lm_head.decoder.bias"),
        # The same tensors as the bias and the table of words.
        Row(f"{head}.decoder.{{}}", None, optional=True),
        Row(f"{head}.transform.dense.{{}}", "lm_head.fc.{}"),
        Row(f"{head}.transform.LayerNorm.{{}}", "lm_head.norm.{}"),
    ]


def tables_for(config: HfvlmBLIP2Config, layout: str, sources: Mapping[str, Source]) -> list[Table]:
    """Return the tables of the released file, and of the tower and the language model that it leaves out.

    Raises:
        FileNotFoundError: a part is needed, and was not given.
        CheckpointError: a part was given that the release brings itself.
    """
    main = sources["main"].tensors
    tables = [Table(main, keys_for(config, layout, main))]
    if layout == "transformers":
        return tables
    inside = {"vision": any(key.startswith("visual_encoder.") for key in main)}
    if head_of(config, GENERATIVE[0]) in GENERATIVE:
        inside["base"] = holds_language_model(config, main)
    for part in PARTS:
        if inside.get(part, True) and part in sources:
            raise CheckpointError(f"This release has its own {part}, or needs none: leave `{part}` out.")
    if not inside["vision"]:
        tables.append(vision_table(config, part_of(sources, "vision", PARTS)))
    if not inside.get("base", True):
        tables.append(language_table(config, part_of(sources, "base", PARTS)))
    return tables


def vision_table(config: HfvlmBLIP2Config, tensors: Mapping[str, Tensor]) -> Table:
    """Return the table of a tower's own file, without what follows on the layers that are used: the last one, a norm,
    a projection."""
    depth = config.vision_config.num_hidden_layers
    after = tuple(f"{name}.{depth}." for name in ("blocks", "transformer.resblocks"))
    unused = (*after, "norm.", "fc_norm.", "head.", "ln_post.", "proj")
    read = {key: tensor for key, tensor in tensors.items() if not key.startswith(unused)}
    return Table(read, vision_rows(config), "vision")


def language_table(config: HfvlmBLIP2Config, tensors: Mapping[str, Tensor]) -> Table:
    """Return the table of a language model's folder; OPT's first files leave out the name of the whole, and tokens
    that were added and never trained get the average token's rows."""
    if config.text_config.model_type == "opt":
        tensors = {f"model.{key}" if key.startswith("decoder.") else key: t for key, t in tensors.items()}
    if config.text_config.model_type == "llama":
        tables = ("model.embed_tokens.weight", "lm_head.weight")
        tensors = lengthened(tensors, tables, config.text_config.vocab_size)
    return Table(tensors, language_rows(config.text_config.model_type), "base")


# Configuration

ARGUMENTS = (
    *("vit_model", "img_size", "drop_path_rate", "num_query_token", "cross_attention_freq", "embed_dim"),
    *("max_txt_len", "max_output_txt_len", "prompt", "qformer_text_input", "opt_model", "t5_model", "llm_model"),
    "vision_override",
    # What is stored in half precision, frozen, recomputed, or done to answers changes none of the model's values.
    *("vit_precision", "freeze_vit", "use_grad_checkpoint", "apply_lemmatizer"),
    # Examples with images before a question are texts with several images.
    *("num_few_shot_examples", "few_shot_prob"),
)
BERT_FIELDS = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act"),
    *("max_position_embeddings", "layer_norm_eps", "hidden_dropout_prob", "attention_probs_dropout_prob"),
    *("pad_token_id", "initializer_range", "type_vocab_size", "encoder_width", "add_cross_attention", "query_length"),
    *("cross_attention_freq", "model_type", "architectures", "position_embedding_type"),
)


def config_from_original(original: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> HfvlmBLIP2Config:
    """Read the sizes of the tensors; `original` may give the constructor's `arguments`, the configuration of the
    language model (`base_config`, or next to the arguments), and of the tokenizers `sep_token_id` and
    `newline_token_id`."""
    if original.get("model_type") in interop.NATIVE_TYPES:
        return interop.config_from_transformers(original)
    arguments = original.get("arguments", {})
    own = {name: value for name, value in arguments.items() if not name.partition(".")[0].endswith("_config")}
    check_options("BLIP-2's constructor", own, ARGUMENTS)
    check_options("BLIP-2's bert_config", arguments.get("bert_config", {}), BERT_FIELDS)
    check_options("BLIP-2's vision_override", arguments.get("vision_override", {}), VISION_FIELDS)
    shapes = {key: tuple(tensor.shape) for key, tensor in state_dict.items()}
    vision = _vision_config(shapes, arguments)
    qformer = _qformer_config(shapes, arguments, vision.hidden_size, original.get("sep_token_id"))
    kind = next((kind for kind, (_, bridge) in LANGUAGE_MODELS.items() if f"{bridge}.weight" in shapes), None)
    if kind is None:
        head = "HfvlmBLIP2ForPreTraining"
        return HfvlmBLIP2Config(architectures=[head], vision_config=vision, qformer_config=qformer)
    text = _text_config(kind, original, shapes)
    size = text.vocab_size
    return HfvlmBLIP2Config(
        architectures=[GENERATIVE[kind == "t5"]],
        vision_config=vision,
        qformer_config=qformer,
        text_config=text,
        image_token_id=size,
        video_token_id=size + 1,
    )


VISION_FIELDS = {
    "patch_size": "patch_size",
    # EVA's
    "embed_dim": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    # CLIP's
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
}


def _vision_config(shapes: Mapping[str, Any], arguments: Mapping[str, Any]) -> Any:
    """Return the configuration of the tower in the file; for one that is left out, of the released towers."""
    given, start = arguments.get("vision_override", {}), "visual_encoder."
    size = arguments.get("img_size", 224)
    if f"{start}conv1.weight" in shapes:
        width, channels, patch, _ = shapes[f"{start}conv1.weight"]
        return HfvlmBLIP2CLIPVisionConfig(
            image_size=patch * isqrt(shapes[f"{start}positional_embedding"][0] - 1),
            patch_size=patch,
            num_channels=channels,
            hidden_size=width,
            intermediate_size=shapes[f"{start}transformer.resblocks.0.mlp.c_fc.weight"][0],
            num_hidden_layers=count_layers(shapes, f"{start}transformer.resblocks."),
            num_attention_heads=given.get("heads", width // 64),
        )
    if f"{start}patch_embed.proj.weight" in shapes:
        width, channels, patch, _ = shapes[f"{start}patch_embed.proj.weight"]
        return HfvlmBLIP2VisionConfig(
            image_size=patch * isqrt(shapes[f"{start}pos_embed"][1] - 1),
            patch_size=patch,
            num_channels=channels,
            hidden_size=width,
            intermediate_size=shapes[f"{start}blocks.0.mlp.fc1.weight"][0],
            num_hidden_layers=count_layers(shapes, f"{start}blocks."),
            num_attention_heads=given.get("num_heads", width // 88),
            drop_path_rate=arguments.get("drop_path_rate", 0.0),
        )
    sizes = {name: given[theirs] for theirs, name in VISION_FIELDS.items() if theirs in given}
    if "width" in given or arguments.get("vit_model") == "clip_L" or shapes["ln_vision.weight"][0] == 1024:
        wide = {"intermediate_size": 4 * given["width"]} if "width" in given else {}
        return HfvlmBLIP2CLIPVisionConfig(image_size=size, **sizes, **wide)
    # EVA's MLP is 4.3637 times as wide.
    wide = {"intermediate_size": int(given["embed_dim"] * 4.3637)} if "embed_dim" in given else {}
    return HfvlmBLIP2VisionConfig(image_size=size, **sizes, **wide)


def _qformer_config(
    shapes: Mapping[str, Any], arguments: Mapping[str, Any], context: int, sep: int | None
) -> HfvlmBLIP2QFormerConfig:
    start, bert = "Qformer.bert.encoder.layer.", arguments.get("bert_config", {})
    _, queries, width = shapes["query_tokens"]
    depth = count_layers(shapes, start)
    crossed = [i for i in range(depth) if f"{start}{i}.crossattention.self.query.weight" in shapes]
    table, words = "Qformer.bert.embeddings", shapes.get("Qformer.bert.embeddings.word_embeddings.weight", (None,))[0]
    positions = shapes.get(f"{table}.position_embeddings.weight", shapes.get(f"{table}.position_ids", (512,))[-1:])[0]
    return HfvlmBLIP2QFormerConfig(
        num_queries=queries,
        context_size=context,
        cross_attention_frequency=crossed[1] if len(crossed) > 1 else depth,
        hidden_size=width,
        intermediate_size=shapes[f"{start}0.intermediate_query.dense.weight"][0],
        num_hidden_layers=depth,
        num_attention_heads=bert.get("num_attention_heads", width // 64),
        hidden_act=bert.get("hidden_act", "gelu"),
        layer_norm_eps=bert.get("layer_norm_eps", 1e-12),
        hidden_dropout=bert.get("hidden_dropout_prob", 0.1),
        attention_dropout=bert.get("attention_probs_dropout_prob", 0.1),
        pad_token_id=bert.get("pad_token_id", 0),
        vocab_size=words,
        max_position_embeddings=positions,
        projection_dim=shapes.get("vision_proj.weight", (None,))[0],
        # [DEC] is the last of the words.
        **{} if words is None else {"bos_token_id": words - 1, "eos_token_id": 102 if sep is None else sep},
    )


def _text_config(kind: str, original: Mapping[str, Any], shapes: Mapping[str, Any]) -> Any:
    """Read the configuration in the language model's own folder, with what the original changes of it."""
    arguments, model = original.get("arguments", {}), LANGUAGE_MODELS[kind][0]
    given = (value for name, value in arguments.items() if name.endswith("_config") and name != "bert_config")
    fields = original.get("base_config") or next(given, None)
    if fields is None:
        raise UnsupportedOriginalError(
            "The sizes of the language model are in its own config.json: give its folder as the part 'base', or "
            "choose a preset."
        )
    words = {"opt": "model.decoder.embed_tokens", "t5": "shared", "llama": "model.embed_tokens"}[kind]
    size = {"vocab_size": shapes[f"{model}.{words}.weight"][0]} if f"{model}.{words}.weight" in shapes else {}
    fields = {name: value for name, value in fields.items() if name != "architectures"} | size
    if kind == "opt":
        return OPTConfig(**fields | {"eos_token_id": original.get("newline_token_id", OPT_NEWLINE)})
    if kind == "t5":
        return erf_t5_config(**fields)
    known = {name: fields[name] for name in LLAMA_FIELDS if fields.get(name) is not None}
    if not size:  # the original adds a token for padding to the language model's own
        known["vocab_size"] += 1
    return LlamaConfig(**known | {"pad_token_id": known["vocab_size"] - 1})


def erf_t5_config(**fields: Any) -> T5Config:
    """Return FLAN-T5's configuration with the exact GELU, which the original runs it with, where T5 means the
    approximate one."""
    config = T5Config(**fields)
    if config.dense_act_fn == "gelu_new":
        config.dense_act_fn = "gelu"
    return config


# Processor

VOCABULARIES = ("vocab.txt", "vocab.json", "spiece.model", "tokenizer.model", "tokenizer.json")


def vocabularies_for(config: HfvlmBLIP2Config) -> list[Names]:
    """Name the files: of what is generated, and of what InstructBLIP's Q-Former reads."""
    words = ("vocab.txt", "tokenizer.json")
    if config.text_config is None:
        return [words]
    files = {"opt": "vocab.json", "t5": "spiece.model", "llama": "tokenizer.model"}
    language = (files[config.text_config.model_type], "tokenizer.json")
    return [language] if config.qformer_config.vocab_size is None else [language, words[:1]]


def settings_from_original(original: Mapping[str, Any], preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """Return the processor's settings, from the constructor's prompt or transformers' preprocessor_config.json."""
    arguments = original.get("arguments", {})
    prompt = {"prompt": arguments["prompt"]} if "prompt" in arguments else {}
    return {"image_processor": transformers_pixels(preprocessing), **prompt}


image_processor_for = sized(HfvlmBLIP2ImageProcessor)


def processor_for(config: HfvlmBLIP2Config, settings: Mapping[str, Any], vocabulary: Path, *more: Path) -> Any:
    """Return the processor; the files are those of `vocabularies_for`."""
    images, text = image_processor_for(config, settings), config.text_config
    options = settings.get("tokenizer", {})
    if text is None:
        return HfvlmBLIP2RetrievalProcessor(images, qformer_tokenizer_for(config, vocabulary, options))
    own = {name: settings[name] for name in ("prompt", "question") if name in settings}
    own |= {"num_queries": config.qformer_config.num_queries, "kind": text.model_type}
    tokenizer = HfvlmBLIP2Tokenizer.from_vocabulary(vocabulary, kind=text.model_type, size=config.image_token_id)
    if config.qformer_config.vocab_size is None:
        return HfvlmBLIP2Processor(images, tokenizer, **own)
    # Instructions that are too long lose their beginning.
    longest = {"model_max_length": 128, "truncation_side": "left"} | settings.get("qformer_tokenizer", {})
    return HfvlmInstructBLIPProcessor(images, tokenizer, qformer_tokenizer_for(config, more[0], longest), **own)


def qformer_tokenizer_for(
    config: HfvlmBLIP2Config, vocabulary: Path, options: Mapping[str, Any]
) -> HfvlmBLIP2QFormerTokenizer:
    qformer = config.qformer_config
    tokenizer = HfvlmBLIP2QFormerTokenizer.from_vocabulary(vocabulary, **options)
    ours = len(tokenizer), tokenizer.bos_token_id, tokenizer.sep_token_id
    wanted, fields = (qformer.vocab_size, qformer.bos_token_id, qformer.eos_token_id), "vocab_size, bos_token_id"
    check_vocabulary(vocabulary, ours, wanted, "pieces, [DEC] and [SEP] are", f"qformer_config.{fields}, eos_token_id")
    return tokenizer


CONVERSION = Conversion(
    config_from_original=config_from_original,
    keys_for=keys_for,
    layout_of=layout_of,
    settings_from_original=settings_from_original,
    image_processor_for=image_processor_for,
    processor_for=processor_for,
    vocabularies_for=vocabularies_for,
    parts=PARTS,
    compose=tables_for,
    export=interop.EXPORT,
)
