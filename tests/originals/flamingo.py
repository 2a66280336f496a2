import re
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor

from hfvlm.checkpoints.conversion import Source
from hfvlm.checkpoints.key_table import Table, restore_keys
from hfvlm.conversion.blocks import LLAMA_FIELDS, transformers_vision_rows
from hfvlm.conversion.flamingo import (
    MPT_FIELDS,
    NEOX_FIELDS,
    config_from_original,
    kind_of,
    language_rows,
    table_rows,
    tables_for,
)
from hfvlm.modeling.captioning import padded_right
from hfvlm.models.flamingo import (
    HfvlmFlamingoConfig,
    HfvlmFlamingoForConditionalGeneration,
    HfvlmFlamingoImageProcessor,
    HfvlmFlamingoProcessor,
    HfvlmFlamingoTokenizer,
)
from hfvlm.presets import Preset
from tests.originals.common import converted, fitting, vocabulary
from tests.support.golden import Golden, Recorder, read_key_list, stem_of
from tests.support.shapes import shapes_of

# GPT-NeoX-20B's vocabulary by its name in $HFVLM_VOCABULARIES.
NEOX = "gpt-neox-20b.tokenizer.json"


VISION = ("image_size", "patch_size", "width", "layers", "heads", "output_dim", "quick_gelu")
# Of the language models; what decides a value is read, or refused, where it is converted.
MPT = (
    *(
        "vocab_size",
        "use_cache",
        "mlp_ratio",
        "expansion_ratio",
        "learned_pos_emb",
        "no_bias",
        "norm_type",
        "attn_config",
    ),
    *("logit_scale", "low_precision_layernorm", "alibi", "alibi_bias_max", "softmax_scale"),
    *(f"attn_{name}" for name in ("impl", "qk_ln", "clip_qkv", "pdrop", "type")),
)
ATTENTION = (
    *("attn_type", "attn_pdrop", "attn_impl", "qk_ln", "clip_qkv", "softmax_scale", "prefix_lm"),
    *("attn_uses_sequence_id", "alibi", "alibi_bias_max"),
)
LANGUAGE = {
    "lang_encoder": ("type", "config"),
    "lang_encoder__config": {*MPT, *MPT_FIELDS, *NEOX_FIELDS, *LLAMA_FIELDS},
    "lang_encoder__config__attn_config": ATTENTION,
}


def compare(golden: Golden) -> None:
    case = golden.case
    if golden.state_dict:
        golden.check(vision_encoder=VISION, **LANGUAGE)
        model_outputs(golden)
    elif "files" in case:
        pixels(golden)
    else:
        tokens(golden)


# Processor


def pixels(golden: Golden) -> None:
    golden.check(arguments=("image_size",))
    size, stride = golden.section("arguments").get("image_size", 224), golden.case.get("stride", 1)
    for file in golden.case["files"]:
        name = file.removesuffix(".png")
        processor = HfvlmFlamingoImageProcessor(size=size, upright=False)
        (picture,) = processor(golden.folder / file, return_tensors="pt")["pixel_values"]
        exact = picture.double()
        golden.compare(f"{name}.pixels", picture[:, ::stride, ::stride])
        golden.compare(f"{name}.mean", exact.mean(dim=(1, 2)))
        golden.compare(f"{name}.std", exact.std(dim=(1, 2), correction=0))


def tokens(golden: Golden) -> None:
    golden.check()
    labels_and_prompts(golden)
    case = golden.case
    if "texts" not in case:
        return
    tokenizer = HfvlmFlamingoTokenizer.from_vocabulary(vocabulary(golden.folder, NEOX))
    assert len(tokenizer) == case.get("final_length", len(tokenizer))
    assert {name: tokenizer.convert_tokens_to_ids(name) for name in golden.section("ids")} == golden.section("ids")
    processor = HfvlmFlamingoProcessor(HfvlmFlamingoImageProcessor(), tokenizer)
    for text, ids in zip(case["texts"], case["text_ids"], strict=True):
        assert processor.encode(text) == ids, text
    if expected := golden.section("left_padded_prompts"):
        prompts = [text for text in case["texts"] if text.startswith("<image>") and "spaced" not in text]
        padded = tokenizer.pad({"input_ids": [processor.encode(text) for text in prompts]}, padding=True)
        assert padded["input_ids"] == expected["input_ids"]
        assert padded["attention_mask"] == expected["attention_mask"]


def labels_and_prompts(golden: Golden) -> None:
    """What depends on the ids of the added tokens alone."""
    case = golden.case
    engine = Tokenizer(WordLevel(case["ids"], unk_token="<|endoftext|>"))
    tokenizer = HfvlmFlamingoTokenizer(tokenizer_object=engine)
    processor = HfvlmFlamingoProcessor(HfvlmFlamingoImageProcessor(), tokenizer)
    for name, interleaved in (("laion_batch", False), ("mmc4_row", True)):
        if batch := golden.section(name):
            rows = torch.tensor(batch["input_ids"])
            assert processor.labels(rows, interleaved=interleaved).tolist() == batch["labels"], name
    shot = {"question": "{question}", "text": "{text}"}
    for name, prompt in golden.section("eval_prompts").items():
        if name == "note":
            continue
        task, answer = TASKS[name]
        example = shot | {"answer": f"{{{answer}}}"}
        query = prompt.partition(f"{{{answer}}}")[0]
        assert processor.few_shot(task, [example], **shot) == prompt + query, name


# The evaluation's prompts: ours, and the field that is to be answered.
TASKS = {
    "caption": ("caption", "caption"),
    "vqa": ("vqa", "answer"),
    "imagenet": ("classify", "label"),
    "hateful_memes": ("hateful_memes", "label"),
}


# Model


def compose(path: Path) -> tuple[HfvlmFlamingoConfig, list[Table]]:
    """What was trained and, without memory, the language model and the tower that its preset names."""
    return fitting("flamingo", stem_of(path), lambda preset: composed(path, preset))


def composed(path: Path, preset: Preset) -> tuple[HfvlmFlamingoConfig, list[Table]]:
    config = preset.make_config()
    model = shapes_of(config)[0]
    language = {key: t for key, t in model.items() if key.startswith("language_model.")}
    tower = {key: t for key, t in model.items() if key.startswith("vision_model.")}
    base = restore_keys(language, language_rows(config))
    # The language models have rows to spare, all but LLaMA.
    for row in table_rows(config):
        base[row.source] = base[row.source].new_empty(50432, base[row.source].shape[1])
    sources = {
        "main": Source(path, read_key_list(path), {}),
        "base": Source(path, base, {}),
        "vision": Source(
            path,
            restore_keys(tower, transformers_vision_rows("vision_model", "vision_model")),
            {"model_type": "clip_vision_model"},
        ),
    }
    return config, tables_for(config, preset.source["layout"], sources)


def batch_of(golden: Golden, model: HfvlmFlamingoForConditionalGeneration, prefix: str = "") -> dict[str, Tensor]:
    """A batch of the case. The original has as many images in each row; those without a placeholder are never seen."""
    ids, pixels = golden.inputs[f"{prefix}lang_x"], golden.inputs[f"{prefix}vision_x"]
    counts = (ids == model.config.image_token_id).sum(dim=1).tolist()
    own = [row[:count] for row, count in zip(pixels, counts, strict=True)]
    mask = golden.mask(f"{prefix}attention_mask", f"{prefix}lang_x")
    return {"input_ids": ids, "pixel_values": torch.cat(own), "attention_mask": mask}


def model_outputs(golden: Golden) -> None:
    config = config_from_original(golden.case, golden.state_dict)
    model: HfvlmFlamingoForConditionalGeneration = converted("flamingo", golden.state_dict, config, "original")
    layers, first = f"language_model.{kind_of(config)[0]}", config.gated_layers[0]
    last = config.text_config.num_hidden_layers - 1
    latents = config.resampler_config.num_latents
    paths = {
        "perceiver_layer0_attn": "resampler.layers.0.attention",
        "perceiver_layer0_ff": "resampler.layers.0.mlp",
        "perceiver": "resampler.post_norm",
        "xattn_first_attn": f"gates.{first}.attention",
        "xattn_first": f"gates.{first}",
        "layer_first": f"{layers}.{first}",
        "layer_last": f"{layers}.{last}",
    }
    inputs, batch = golden.inputs, batch_of(golden, model)
    every = inputs["vision_x"]
    with torch.no_grad():
        with Recorder(model, list(paths.values())) as seen:
            features = model.get_image_features(every.flatten(0, 1))
            resampled = {
                name: seen[path].reshape(*every.shape[:2], latents, -1)
                for name, path in paths.items()
                if "perceiver" in name
            }
            output = model(**batch, labels=inputs.get("labels"))
            values = {name: seen[path] for name, path in paths.items()} | resampled
        # The original drops what is seen before any image inside its attention, and hfvlm after it.
        last_place = (batch["input_ids"] == config.image_token_id).cumsum(dim=1) > 0
        values["xattn_first_attn"] = values["xattn_first_attn"] * last_place.unsqueeze(-1)
        values |= {
            "vision_tokens": features.last_hidden_state[:, 1:],
            "logits": output.logits,
            "loss": None if output.loss is None else output.loss.reshape(1),
        }
        if "tail" in inputs:
            cache = model.cache_media(batch["input_ids"], batch["pixel_values"])
            values["cached_media_logits"] = model(input_ids=inputs["tail"], cache=cache).logits
    for name in golden.outputs:
        search = re.fullmatch(r"greedy|beam(\d+)", name)
        if not search:
            continue
        asked, beams = batch_of(golden, model, "gen_"), int(search[1] or 1)
        new = golden.outputs[name].shape[1] - asked["input_ids"].shape[1]
        options = {"eos_token_id": golden.case["gen_eos_token_id"], "pad_token_id": 0, "do_sample": False}
        ids = model.generate(**asked, max_new_tokens=new, num_beams=beams, **options)
        # Where the padding is 0, transformers' beams put more ends after the first.
        values[name] = padded_right(ids, asked["input_ids"].shape[1], options["eos_token_id"], options["pad_token_id"])
    stored = golden.section("stored_rows")
    mask = batch["attention_mask"].bool().unsqueeze(-1)
    for name in golden.in_order():
        count = stored.get(name, len(values[name]))
        real = mask[:count] if name in ("logits", "layer_first", "layer_last", "xattn_first") else None
        golden.compare(name, values[name][:count], real)
