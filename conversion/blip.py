"""BLIP's released files, and transformers' folders.

Source: https://github.com/salesforce/BLIP at 056a169.
"""

from collections.abc import Collection, Iterable, Mapping
from math import isqrt
from pathlib import Path
from typing import Any

from torch import Tensor

from hfvlm.checkpoints.conversion import Conversion, always, head_of
from hfvlm.checkpoints.key_table import Row, fit, flat, scalar, transpose, unbatched
from hfvlm.checkpoints.originals import check_options, count_layers
from hfvlm.conversion.blocks import BERT_ATTENTION, bert_attention, bert_mlp, row, timm_layers
from hfvlm.conversion.interop import blip as interop
from hfvlm.conversion.interop.blip import special_tokens
from hfvlm.conversion.processors import check_vocabulary, sized, transformers_pixels
from hfvlm.models.blip.configuration_blip import HfvlmBLIPConfig, HfvlmBLIPTextConfig, HfvlmBLIPVisionConfig
from hfvlm.models.blip.processing_blip import HfvlmBLIPImageProcessor, HfvlmBLIPProcessor, HfvlmBLIPTokenizer

VOCABULARIES = ("vocab.txt", "tokenizer.json")
# The authors' classes; any of them loads the file of another, as far as it has its parts.
CLASSES = {
    "BLIP_Base": "HfvlmBLIPModel",
    "BLIP_Decoder": "HfvlmBLIPForConditionalGeneration",
    "BLIP_ITM": "HfvlmBLIPForImageTextRetrieval",
    "BLIP_NLVR": "HfvlmBLIPForVisualReasoning",
    "BLIP_Pretrain": "HfvlmBLIPForPreTraining",
    "BLIP_Retrieval": "HfvlmBLIPForImageTextRetrieval",
    "BLIP_VQA": "HfvlmBLIPForQuestionAnswering",
}
# Parameters that are initialised in a model that starts from the file of another class, and what a file calls them.
FRESH = {
    "HfvlmBLIPForVisualReasoning": {"classifier.": "cls_head.", ".merge_layer.": ".merge_layer."},
    "HfvlmBLIPForRetrievalTraining": {"teacher.id_queue": "idx_queue", "teacher.pointer": "ptr_queue"},
}


def layout_of(original: Mapping[str, Any]) -> str:
    return "transformers" if original.get("model_type") == "blip" else "salesforce"


def keys_for(config: HfvlmBLIPConfig, layout: str = "salesforce", keys: Iterable[str] = ()) -> list[Row]:
    """Give the rows for a file of `layout`, "salesforce" or "transformers", for the head in `config.architectures`;
    with `keys`, also for a file of another head that has the parts of this one."""
    native, head = layout == "transformers", head_of(config, "HfvlmBLIPModel")
    vision = interop.vision_rows(head) if native else vision_rows("visual_encoder", "vision_model")
    encoder, decoder = text_rows("text_encoder", "text_model"), decoder_rows("text_decoder")
    heads = {
        "HfvlmBLIPModel": [*encoder, *joint_rows(config)],
        "HfvlmBLIPForConditionalGeneration": decoder,
        "HfvlmBLIPForQuestionAnswering": [*encoder, *decoder],
        "HfvlmBLIPForImageTextRetrieval": [*encoder, *matching_rows(config), *untrained_rows()],
        "HfvlmBLIPForRetrievalTraining": [*encoder, *matching_rows(config), *teacher_rows("ptr_queue"), ID_QUEUE],
        "HfvlmBLIPForPreTraining": [*pretraining_rows(), *matching_rows(config), *teacher_rows("queue_ptr")],
        "HfvlmBLIPForVisualReasoning": pair_rows("text_encoder", "text_model"),
    }
    rows = [*vision, *heads[head]]
    theirs = None if native else head_of_another(config, keys)
    if theirs is None:
        return rows
    if head == "HfvlmBLIPForVisualReasoning":
        rows = [*vision, *both_rows("text_encoder", "text_model")]
    return [*(row._replace(optional=True) for row in rows), *unused_rows(rows, heads[theirs], keys)]


def head_of_another(config: HfvlmBLIPConfig, keys: Iterable[str]) -> str | None:
    """Give the head that a file's keys are for, if it is not the configuration's."""
    head = head_of(config, "HfvlmBLIPModel")
    keys = {key for key in keys if key.startswith(("text_encoder.", "text_decoder.", "itm_head."))}
    own = "HfvlmBLIPForImageTextRetrieval" if head == "HfvlmBLIPForRetrievalTraining" else head
    theirs = _head_of_file(keys) if keys else own
    return None if theirs == own else theirs


def fresh_parameters(config: HfvlmBLIPConfig, layout: str, keys: Iterable[str], expected: Iterable[str]) -> list[str]:
    """Name the parameters that are initialised, as in the original, since a file of another head lacks them."""
    fresh, keys = FRESH.get(head_of(config, "HfvlmBLIPModel"), {}), list(keys)
    if layout == "transformers" or head_of_another(config, keys) is None:
        return []
    missing = [ours for ours, theirs in fresh.items() if not any(theirs in key for key in keys)]
    return [name for name in expected if any(part in name for part in missing)]


def unused_rows(rows: list[Row], theirs: list[Row], keys: Iterable[str]) -> list[Row]:
    """Drop what another head's table knows and this one's does not."""
    theirs = [*theirs, *(Row(name, None) for name in ("vision_proj.{}", "text_proj.{}", "temp"))]
    return [Row(key, None) for key in keys if not fit([key], rows) and fit([key], theirs)]


def vision_rows(source: str, target: str) -> list[Row]:
    return [
        Row(f"{source}.cls_token", f"{target}.class_token", flat),
        Row(f"{source}.pos_embed", f"{target}.position", unbatched),
        Row(f"{source}.patch_embed.proj.{{}}", f"{target}.patches.projection.{{}}"),
        *timm_layers(f"{source}.blocks", f"{target}.layers"),
        Row(f"{source}.norm.{{}}", f"{target}.post_norm.{{}}"),
    ]


def text_rows(source: str, target: str) -> list[Row]:
    """Return the rows of a BERT with cross-attention."""
    return [
        row(f"{source}.embeddings.word_embeddings.weight", f"{target}.embeddings.token.weight"),
        *bert_attention(f"{source}.encoder.layer.{{}}.attention", f"{target}.layers.{{}}.attention"),
        *shared_rows(source, target),
        *bert_attention(f"{source}.encoder.layer.{{}}.crossattention", f"{target}.layers.{{}}.cross_attention"),
    ]


def shared_rows(source: str, *targets: str) -> list[Row]:
    """Return the rows of what is neither attention nor the table of words."""
    table, ours = f"{source}.embeddings", [f"{target}.embeddings" for target in targets]
    return [
        # The counting numbers.
        Row(f"{table}.position_ids", None, optional=True),
        row(f"{table}.position_embeddings.weight", *(f"{name}.position" for name in ours)),
        row(f"{table}.LayerNorm.{{}}", *(f"{name}.norm.{{}}" for name in ours)),
        *bert_mlp(f"{source}.encoder.layer.{{}}", *(f"{target}.layers.{{}}.mlp" for target in targets)),
    ]


def decoder_rows(name: str) -> list[Row]:
    words = f"{name}.embeddings.token.weight", f"{name}.lm_head.decoder.weight"
    rows = text_rows(f"{name}.bert", name)
    return [row(f"{name}.bert.embeddings.word_embeddings.weight", *words), *rows[1:], *language_head_rows(name)]


def language_head_rows(name: str) -> list[Row]:
    head = f"{name}.cls.predictions"
    return [
        Row(f"{head}.bias", f"{name}.lm_head.decoder.bias"),
        # The same tensors as the bias and the table of words.
        Row(f"{head}.decoder.{{}}", None, optional=True),
        Row(f"{head}.transform.dense.{{}}", f"{name}.lm_head.fc.{{}}"),
        Row(f"{head}.transform.LayerNorm.{{}}", f"{name}.lm_head.norm.{{}}"),
    ]


def pretraining_rows() -> list[Row]:
    """Return the rows of pretraining: the decoder's tensors are the encoder's, under a second name, but for its
    self-attention and its head."""
    both, decoder = ("text_model", "text_decoder"), "text_decoder.bert"
    layer = f"{decoder}.encoder.layer.{{}}"
    words = [*(f"{name}.embeddings.token.weight" for name in both), "text_decoder.lm_head.decoder.weight"]
    second_names = [
        f"{decoder}.embeddings.word_embeddings.weight",
        f"{decoder}.embeddings.position_embeddings.weight",
        f"{decoder}.embeddings.position_ids",
        f"{decoder}.embeddings.LayerNorm.{{}}",
        f"{layer}.crossattention.{{...}}",
        f"{layer}.intermediate.{{...}}",
        f"{layer}.output.{{...}}",
    ]
    return [
        row("text_encoder.embeddings.word_embeddings.weight", *words),
        *bert_attention("text_encoder.encoder.layer.{}.attention", "text_model.layers.{}.attention"),
        *bert_attention(f"{layer}.attention", "text_decoder.layers.{}.attention"),
        *shared_rows("text_encoder", *both),
        *bert_attention(
            "text_encoder.encoder.layer.{}.crossattention", *(f"{name}.layers.{{}}.cross_attention" for name in both)
        ),
        *(Row(name, None, optional=True) for name in second_names),
        *language_head_rows("text_decoder"),
    ]


def pair_rows(source: str, target: str) -> list[Row]:
    """Return the rows of NLVR2's encoder: a cross-attention for each image, one norm, and from the seventh layer on a
    merging layer."""
    theirs, ours = f"{source}.encoder.layer.{{}}.crossattention", f"{target}.layers.{{}}.cross_attention"
    pairs = [
        row
        for i, place in enumerate(("first", "second"))
        for row in (
            *(
                Row(f"{theirs}.self{i}.{name}.{{}}", f"{ours}.{place}.{name[0]}_proj.{{}}")
                for name in ("query", "key", "value")
            ),
            Row(f"{theirs}.output.dense{i}.{{}}", f"{ours}.{place}.out_proj.{{}}"),
        )
    ]
    return [*text_rows(source, target)[: -len(BERT_ATTENTION)], *pairs, *merging_rows(theirs, ours)]


def both_rows(source: str, target: str) -> list[Row]:
    """Return the rows of NLVR2's encoder out of one that attends to one image: both cross-attentions start from the
    one that is there."""
    theirs, ours = f"{source}.encoder.layer.{{}}.crossattention", f"{target}.layers.{{}}.cross_attention"
    pairs = [
        row(f"{theirs}.{part}.{{}}", *(f"{ours}.{place}{name}.{{}}" for place in ("first", "second")))
        for part, name in BERT_ATTENTION.items()
        if not name.endswith("_norm")
    ]
    return [*text_rows(source, target)[: -len(BERT_ATTENTION)], *pairs, *merging_rows(theirs, ours)]


def merging_rows(theirs: str, ours: str) -> list[Row]:
    """Return the rows of what is done with the two cross-attentions' outputs, and the head."""
    return [
        Row(f"{theirs}.output.merge_layer.{{}}", f"{ours}.merge_layer.{{}}", optional=True),
        Row(f"{theirs}.output.LayerNorm.{{}}", f"{ours}_norm.{{}}"),
        Row("cls_head.{}.{}", "classifier.{}.{}"),
    ]


def joint_rows(config: HfvlmBLIPConfig) -> list[Row]:
    rows = []
    if config.vision_config.projection_dim is not None:
        rows += [
            Row("vision_proj.{}", "vision_model.projection.{}"),
            Row("text_proj.{}", "text_model.projection.{}"),
        ]
    if config.similarity_temperature is not None:
        rows += [Row("temp", "logit_scale.scale", scalar)]
    return rows


def matching_rows(config: HfvlmBLIPConfig) -> list[Row]:
    return [*joint_rows(config), Row("itm_head.{}", "itm_head.{}")]


def untrained_rows() -> list[Row]:
    """Drop what is of use in training alone, which `HfvlmBLIPForRetrievalTraining` goes on with a new copy and an
    empty queue."""
    towers = ("visual_encoder_m", "text_encoder_m", "vision_proj_m", "text_proj_m")
    queues = ("image_queue", "text_queue", "idx_queue", "ptr_queue")
    return [
        *(Row(f"{tower}.{{...}}", None, optional=True) for tower in towers),
        *(Row(queue, None, optional=True) for queue in queues),
    ]


def teacher_rows(pointer: str) -> list[Row]:
    return [
        *vision_rows("visual_encoder_m", "teacher.vision_model"),
        *text_rows("text_encoder_m", "teacher.text_model"),
        Row("vision_proj_m.{}", "teacher.vision_model.projection.{}"),
        Row("text_proj_m.{}", "teacher.text_model.projection.{}"),
        Row("image_queue", "teacher.image_queue", transpose),
        Row("text_queue", "teacher.text_queue", transpose),
        Row(pointer, "teacher.pointer"),
    ]


ID_QUEUE = Row("idx_queue", "teacher.id_queue", unbatched)


def config_from_original(original: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> HfvlmBLIPConfig:
    """Read the constructor's arguments (none are needed for released files), or transformers' config.json.

    The head is that of the original's `class`, or else the one that the tensors are for. The position of [SEP] in a
    vocabulary that is not BERT's is no argument of the original's: give it as `sep_token_id`.
    """
    if original.get("model_type") == "blip":
        return interop.config_from_transformers(original)
    arguments = original.get("arguments", {})
    check_options("BLIP's constructor", arguments, ARGUMENTS)
    med, vit = arguments.get("med_config", {}), arguments.get("create_vit_override", {})
    check_options("BLIP's med_config", med, MED_FIELDS)
    check_options("BLIP's vision transformer", vit, ("patch_size", "embed_dim", "depth", "num_heads"))
    shapes = {key: tensor.shape for key, tensor in state_dict.items()}
    head = CLASSES.get(original.get("class", "").rpartition(".")[2]) or _head_of_file(shapes)
    joint = shapes.get("vision_proj.weight", (None,))[0] if head in JOINT else None
    vision = _vision_config(shapes, arguments, joint)
    if head in ("HfvlmBLIPForQuestionAnswering", "HfvlmBLIPForVisualReasoning") or vision.hidden_size == 1024:
        vision.drop_path_rate = 0.1
    config = HfvlmBLIPConfig(
        architectures=[head],
        vision_config=vision,
        text_config=_text_config(shapes, med, joint, vision.hidden_size, original.get("sep_token_id")),
        negatives_from_all_ranks=arguments.get("negative_all_rank", False),
        momentum=arguments.get("momentum", 0.995),
    )
    if head in ("HfvlmBLIPModel", "HfvlmBLIPForImageTextRetrieval") and "temp" not in shapes:
        config.similarity_temperature = None
    if "image_queue" in shapes:
        config.queue_size = shapes["image_queue"][1]
    return config


ARGUMENTS = (
    *("med_config", "image_size", "vit", "create_vit_override", "prompt", "embed_dim", "queue_size", "momentum"),
    # Whether activations are kept or computed again changes no value.
    *("negative_all_rank", "vit_grad_ckpt", "vit_ckpt_layer"),
)
MED_FIELDS = (
    *("architectures", "model_type", "vocab_size", "type_vocab_size", "pad_token_id", "max_position_embeddings"),
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "layer_norm_eps"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range"),
    *("encoder_width", "add_cross_attention"),
)


# The heads whose towers have projections to a joint space.
JOINT = (
    *("HfvlmBLIPModel", "HfvlmBLIPForImageTextRetrieval", "HfvlmBLIPForRetrievalTraining"),
    "HfvlmBLIPForPreTraining",
)


def _head_of_file(keys: Collection[str]) -> str:
    encoder, decoder = (any(key.startswith(part) for key in keys) for part in ("text_encoder.", "text_decoder."))
    if any(".crossattention.self0." in key for key in keys):
        return "HfvlmBLIPForVisualReasoning"
    if encoder and decoder:
        return "HfvlmBLIPForPreTraining" if "itm_head.weight" in keys else "HfvlmBLIPForQuestionAnswering"
    if decoder:
        return "HfvlmBLIPForConditionalGeneration"
    return "HfvlmBLIPForImageTextRetrieval" if "itm_head.weight" in keys else "HfvlmBLIPModel"


def _vision_config(
    shapes: Mapping[str, Any], arguments: Mapping[str, Any], joint: int | None
) -> HfvlmBLIPVisionConfig:
    """Return the configuration of the vision tower. `image_size` is the file's; for another, `resize_positions` does
    what the original does when it loads a file."""
    width, channels, patch, _ = shapes["visual_encoder.patch_embed.proj.weight"]
    return HfvlmBLIPVisionConfig(
        image_size=patch * isqrt(shapes["visual_encoder.pos_embed"][1] - 1),
        patch_size=patch,
        num_channels=channels,
        hidden_size=width,
        intermediate_size=shapes["visual_encoder.blocks.0.mlp.fc1.weight"][0],
        num_hidden_layers=count_layers(shapes, "visual_encoder.blocks."),
        num_attention_heads=arguments.get("create_vit_override", {}).get("num_heads", width // 64),
        projection_dim=joint,
    )


def _text_config(
    shapes: Mapping[str, Any], med: Mapping[str, Any], joint: int | None, context: int, sep: int | None
) -> HfvlmBLIPTextConfig:
    prefix = "text_encoder" if "text_encoder.embeddings.word_embeddings.weight" in shapes else "text_decoder.bert"
    vocabulary, width = shapes[f"{prefix}.embeddings.word_embeddings.weight"]
    return HfvlmBLIPTextConfig(
        vocab_size=vocabulary,
        max_position_embeddings=shapes[f"{prefix}.embeddings.position_embeddings.weight"][0],
        hidden_size=width,
        intermediate_size=shapes[f"{prefix}.encoder.layer.0.intermediate.dense.weight"][0],
        num_hidden_layers=count_layers(shapes, f"{prefix}.encoder.layer."),
        num_attention_heads=med.get("num_attention_heads", width // 64),
        hidden_act=med.get("hidden_act", "gelu"),
        layer_norm_eps=med.get("layer_norm_eps", 1e-12),
        hidden_dropout=med.get("hidden_dropout_prob", 0.1),
        attention_dropout=med.get("attention_probs_dropout_prob", 0.1),
        pad_token_id=med.get("pad_token_id", 0),
        context_size=context,
        projection_dim=joint,
        **special_tokens(vocabulary, sep),
    )


def settings_from_original(original: Mapping[str, Any], preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """Return the processor's settings, from the constructor's prompt or transformers' preprocessor_config.json."""
    prompt = original.get("arguments", {}).get("prompt", "")
    return {"image_processor": transformers_pixels(preprocessing), "prompt": prompt}


image_processor_for = sized(HfvlmBLIPImageProcessor)


def processor_for(config: HfvlmBLIPConfig, settings: Mapping[str, Any], vocabulary: Path) -> HfvlmBLIPProcessor:
    """Return the processor; `vocabulary` is one of VOCABULARIES."""
    text = config.text_config
    length = {"model_max_length": min(35, text.max_position_embeddings)}
    tokenizer = HfvlmBLIPTokenizer.from_vocabulary(vocabulary, **length | settings.get("tokenizer", {}))
    ours = len(tokenizer), tokenizer.bos_token_id, tokenizer.sep_token_id
    wanted, fields = (text.vocab_size, text.bos_token_id, text.eos_token_id), "vocab_size, bos_token_id, eos_token_id"
    check_vocabulary(vocabulary, ours, wanted, "pieces, [DEC] and [SEP] are", f"text_config.{fields}")
    return HfvlmBLIPProcessor(image_processor_for(config, settings), tokenizer, prompt=settings.get("prompt", ""))


CONVERSION = Conversion(
    config_from_original=config_from_original,
    keys_for=keys_for,
    layout_of=layout_of,
    settings_from_original=settings_from_original,
    image_processor_for=image_processor_for,
    processor_for=processor_for,
    vocabularies_for=always([VOCABULARIES]),
    fresh_parameters=fresh_parameters,
    export=interop.EXPORT,
)
