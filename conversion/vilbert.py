"""ViLBERT's released files: of pretraining and of all tasks.

Source: https://github.com/facebookresearch/vilbert-multi-task at f22b84a.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hfvlm.checkpoints.conversion import Conversion
from hfvlm.checkpoints.key_table import Row
from hfvlm.checkpoints.originals import UnsupportedOriginalError, check_options, count_layers
from hfvlm.conversion.blocks import bert_attention, bert_mlp, row
from hfvlm.conversion.processors import check_vocabulary
from hfvlm.models.vilbert.configuration_vilbert import (
    HfvlmViLBERTConfig,
    HfvlmViLBERTTextConfig,
    HfvlmViLBERTVisionConfig,
)
from hfvlm.models.vilbert.processing_vilbert import HfvlmViLBERTProcessor, HfvlmViLBERTTokenizer

VOCABULARIES = ("vocab.txt", "tokenizer.json")
TASKS_HEAD = "HfvlmViLBERTForVisionLanguageTasks"


def layout_of(original: Mapping[str, Any]) -> str:
    return "vilbert-multi-task"


def keys_for(config: HfvlmViLBERTConfig, layout: str = "vilbert-multi-task", keys: Iterable[str] = ()) -> list[Row]:
    """Return the rows for a file of the class that `config` is for."""
    norm = "LayerNorm"
    words, regions, layer = "bert.embeddings", "bert.v_embeddings", "bert.encoder.c_layer.{}"
    sides = (("text", "t", "2", "1"), ("vision", "v", "1", "2"))
    rows = [
        row(f"{words}.word_embeddings.weight", "text_model.embeddings.token.weight", "lm_head.decoder.weight"),
        Row(f"{words}.position_embeddings.weight", "text_model.embeddings.position"),
        Row(f"{words}.token_type_embeddings.weight", "text_model.embeddings.token_type.weight"),
        Row(f"{words}.{norm}.{{}}", "text_model.embeddings.norm.{}"),
        Row(f"{regions}.image_embeddings.{{}}", "vision_model.embeddings.features.{}"),
        Row(f"{regions}.image_location_embeddings.{{}}", "vision_model.embeddings.locations.{}"),
        Row(f"{regions}.{norm}.{{}}", "vision_model.embeddings.norm.{}"),
        *stream_rows("bert.encoder.layer.{}", "text_model.layers.{}"),
        *stream_rows("bert.encoder.v_layer.{}", "vision_model.layers.{}"),
    ]
    if config.text_config.num_tasks is not None:
        rows += [Row(f"{words}.task_embeddings.weight", "text_model.embeddings.task.weight")]
    for side, letter, own, other in sides:
        ours = f"connections.{{}}.{side}"
        rows += [
            Row(f"{layer}.biattention.query{own}.{{}}", f"{ours}.attention.q_proj.{{}}"),
            Row(f"{layer}.biattention.key{other}.{{}}", f"{ours}.attention.k_proj.{{}}"),
            Row(f"{layer}.biattention.value{other}.{{}}", f"{ours}.attention.v_proj.{{}}"),
            Row(f"{layer}.biOutput.dense{own}.{{}}", f"{ours}.attention.out_proj.{{}}"),
            Row(f"{layer}.biOutput.{norm}{own}.{{}}", f"{ours}.attention_norm.{{}}"),
            # Of no use in the original, either.
            Row(f"{layer}.biOutput.q_dense{own}.{{}}", None),
            Row(f"{layer}.{letter}_intermediate.dense.{{}}", f"{ours}.mlp.fc1.{{}}"),
            Row(f"{layer}.{letter}_output.dense.{{}}", f"{ours}.mlp.fc2.{{}}"),
            Row(f"{layer}.{letter}_output.{norm}.{{}}", f"{ours}.mlp_norm.{{}}"),
            Row(f"bert.{letter}_pooler.dense.{{}}", f"{side}_pooler.{{}}"),
        ]
    rows += [
        Row("cls.predictions.transform.dense.{}", "lm_head.fc.{}"),
        Row("cls.predictions.transform.LayerNorm.{}", "lm_head.norm.{}"),
        Row("cls.predictions.bias", "lm_head.decoder.bias"),
        # The table of words under a second name.
        Row("cls.predictions.decoder.weight", None),
        Row("cls.imagePredictions.transform.dense.{}", "region_head.fc.{}"),
        Row("cls.imagePredictions.transform.LayerNorm.{}", "region_head.norm.{}"),
        Row("cls.imagePredictions.decoder.{}", "region_head.decoder.{}"),
        Row("cls.bi_seq_relationship.{}", "alignment_head.{}"),
    ]
    return [*rows, *task_rows()] if (config.architectures or [TASKS_HEAD])[0] == TASKS_HEAD else rows


def stream_rows(source: str, target: str) -> list[Row]:
    return [*bert_attention(f"{source}.attention", f"{target}.attention"), *bert_mlp(source, f"{target}.mlp")]


def task_rows() -> list[Row]:
    parts = (("0", "fc1"), ("2", "norm"), ("3", "fc2"))
    deep = (("vil_prediction", "answer"), ("vil_prediction_gqa", "gqa"), ("vil_binary_prediction", "pair"))
    plain = {
        "vil_logit": "score",
        "vil_tri_prediction": "entailment",
        "vision_logit": "grounding",
        "linguisic_logit": "token",
    }
    return [
        *(
            Row(f"{theirs}.logit_fc.{number}.{{}}", f"{ours}_head.{part}.{{}}")
            for theirs, ours in deep
            for number, part in parts
        ),
        *(Row(f"{theirs}.{{}}", f"{ours}_head.{{}}") for theirs, ours in plain.items()),
    ]


# What the original's config says, of which some only decides shapes, and some is never read.
FIELDS = (
    *("attention_probs_dropout_prob", "hidden_act", "hidden_dropout_prob", "hidden_size", "initializer_range"),
    *("intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers", "type_vocab_size"),
    *("vocab_size", "v_feature_size", "v_target_size", "v_hidden_size", "v_num_hidden_layers"),
    *("v_num_attention_heads", "v_intermediate_size", "bi_hidden_size", "bi_num_attention_heads"),
    *("v_attention_probs_dropout_prob", "v_hidden_act", "v_hidden_dropout_prob", "v_initializer_range"),
    *("v_biattention_id", "t_biattention_id", "visual_target", "fusion_method", "num_negative", "objective", "model"),
    *("task_specific_tokens", "visualization", "with_coattention", "fixed_v_layer", "fixed_t_layer"),
    *("bi_intermediate_size", "bi_attention_type", "pooling_method", "finetuning_task", "layer_norm_eps"),
    *("num_labels", "output_attentions", "output_hidden_states", "torchscript"),
)
OBJECTIVES = ("kl", "mse", "nce")
ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "swish": "silu"}


def config_from_original(original: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> HfvlmViLBERTConfig:
    """Read the constructor's arguments: `config`, and with it `config attributes` that are set afterwards. Released
    files need none; the class is the one that the tensors are for.

    `fixed_v_layer` and `fixed_t_layer`, layers that a training leaves as they are, are no part of a model.
    """
    arguments = original.get("arguments", {})
    given = {**arguments.get("config", {}), **arguments.get("config attributes", {})}
    check_options("ViLBERT's config", given, FIELDS)
    if not given.get("with_coattention", True):
        raise UnsupportedOriginalError("ViLBERT's config: hfvlm does not implement with_coattention = false.")
    shapes = {key: tuple(tensor.shape) for key, tensor in state_dict.items()}
    tasks = shapes.get("bert.embeddings.task_embeddings.weight")
    vocabulary, width = shapes["bert.embeddings.word_embeddings.weight"]
    vision_width, features = shapes["bert.v_embeddings.image_embeddings.weight"]
    depth, vision_depth, connections = (
        count_layers(shapes, f"bert.encoder.{kind}.") for kind in ("layer", "v_layer", "c_layer")
    )
    head = TASKS_HEAD if "vil_logit.weight" in shapes else "HfvlmViLBERTForPreTraining"
    answers: dict[str, Any] = {
        ours: shapes[f"{theirs}.logit_fc.3.weight"][0]
        for theirs, ours in (("vil_prediction", "num_answers"), ("vil_prediction_gqa", "num_gqa_answers"))
        if head == TASKS_HEAD
    }
    connection = shapes["bert.t_pooler.dense.weight"][0]
    return HfvlmViLBERTConfig(
        architectures=[head],
        text_config=HfvlmViLBERTTextConfig(
            vocab_size=vocabulary,
            max_position_embeddings=shapes["bert.embeddings.position_embeddings.weight"][0],
            type_vocab_size=shapes["bert.embeddings.token_type_embeddings.weight"][0],
            num_tasks=None if tasks is None else tasks[0],
            hidden_size=width,
            intermediate_size=shapes["bert.encoder.layer.0.intermediate.dense.weight"][0],
            num_hidden_layers=depth,
            num_attention_heads=given.get("num_attention_heads", width // 64),
            hidden_act=activation(given.get("hidden_act", "gelu")),
            hidden_dropout=given.get("hidden_dropout_prob", 0.1),
            attention_dropout=given.get("attention_probs_dropout_prob", 0.1),
            initializer_range=given.get("initializer_range", 0.02),
        ),
        vision_config=HfvlmViLBERTVisionConfig(
            feature_size=features,
            hidden_size=vision_width,
            intermediate_size=shapes["bert.encoder.v_layer.0.intermediate.dense.weight"][0],
            num_hidden_layers=vision_depth,
            num_attention_heads=given.get("v_num_attention_heads", 8),
            hidden_act=activation(given.get("v_hidden_act", "gelu")),
            hidden_dropout=given.get("v_hidden_dropout_prob", 0.1),
            attention_dropout=given.get("v_attention_probs_dropout_prob", 0.1),
            initializer_range=given.get("v_initializer_range", 0.02),
        ),
        connection_size=connection,
        num_connection_heads=given.get("bi_num_attention_heads", 8),
        vision_connections=list(given.get("v_biattention_id", range(vision_depth - connections, vision_depth))),
        text_connections=list(given.get("t_biattention_id", range(depth - connections, depth))),
        fusion=given.get("fusion_method", "mul"),
        region_objective=OBJECTIVES[given.get("visual_target", 0)],
        target_size=shapes["cls.imagePredictions.decoder.weight"][0],
        num_negatives=given.get("num_negative", 128),
        objective=given.get("objective", 0),
        initializer_range=given.get("initializer_range", 0.02),
        **answers,
    )


def activation(name: str) -> str:
    """Return an activation by the original's name."""
    if name not in ACTIVATIONS:
        raise UnsupportedOriginalError(f"hfvlm knows no activation {name}; it knows {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[name]


def vocabularies_for(config: HfvlmViLBERTConfig) -> list[tuple[str, ...]]:
    return [VOCABULARIES]


def processor_for(config: HfvlmViLBERTConfig, settings: Mapping[str, Any], vocabulary: Path) -> HfvlmViLBERTProcessor:
    """Return the processor; `vocabulary` is one of VOCABULARIES."""
    text = config.text_config
    length = {"model_max_length": text.max_position_embeddings}
    tokenizer = HfvlmViLBERTTokenizer.from_vocabulary(vocabulary, **length | settings.get("tokenizer", {}))
    ours, wanted = (len(tokenizer), tokenizer.pad_token_id), (text.vocab_size, text.pad_token_id)
    check_vocabulary(vocabulary, ours, wanted, "pieces and [PAD] are", "text_config.vocab_size, pad_token_id")
    rest = {name: value for name, value in settings.items() if name != "tokenizer"}
    own = {"feature_size": config.vision_config.feature_size, "task_tokens": text.num_tasks is not None}
    return HfvlmViLBERTProcessor(tokenizer, **own | rest)


def image_processor_for(config: HfvlmViLBERTConfig, settings: Mapping[str, Any]) -> None:
    """Return none: a detector of one's own turns images into regions."""


CONVERSION = Conversion(
    config_from_original=config_from_original,
    keys_for=keys_for,
    layout_of=layout_of,
    image_processor_for=image_processor_for,
    processor_for=processor_for,
    vocabularies_for=vocabularies_for,
)
