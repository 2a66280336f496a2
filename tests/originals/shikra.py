import json
import tempfile
from pathlib import Path

import torch
from hfvlm.conversion.shikra import MARKS, PATCH, config_from_original, tables_for
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from hfvlm.converter import Source, empty_model
from hfvlm.image_text import Features
from hfvlm.key_table import Table, convert_tables
from hfvlm.models.shikra import (
    HfvlmShikraConfig,
    HfvlmShikraForConditionalGeneration,
    HfvlmShikraImageProcessor,
    HfvlmShikraProcessor,
    HfvlmShikraTokenizer,
)
from hfvlm.models.shikra.places import Bins, Decimals, Square
from hfvlm.presets import load_preset
from tests.golden import Golden, Recorder, read_key_list

VISION = {"model_type": "clip_vision_model"}
ROLES = {"human": "user", "gpt": "assistant"}


def compare(golden: Golden) -> None:
    case = golden.case
    if "files" in case:
        pixels(golden)
    elif "rows" in case:
        dialogs(golden)
        formatting(golden)
    else:
        model_outputs(golden)


# Processor


def pixels(golden: Golden) -> None:
    stride = golden.case["stride"]
    for file in golden.case["files"]:
        name = file.removesuffix(".png")
        processor = HfvlmShikraImageProcessor(upright=False, size=golden.outputs[f"{name}.pixels"].shape[-1] * stride)
        (picture,) = processor(golden.folder / file, return_tensors="pt")["pixel_values"]
        exact = picture.double()
        golden.compare(f"{name}.pixels", picture[:, ::stride, ::stride])
        golden.compare(f"{name}.mean", exact.mean(dim=(1, 2)))
        golden.compare(f"{name}.std", exact.std(dim=(1, 2), correction=0))


def processor_of(golden: Golden, marks: tuple[str, str]) -> HfvlmShikraProcessor:
    """With a tokenizer as the case's, which is made of the bare file: it finds no end token in texts, as that of the
    release does."""
    plain = HfvlmShikraTokenizer.from_vocabulary(golden.folder / "tokenizer.model").backend_tokenizer
    engine = json.loads(plain.to_str())
    engine["added_tokens"] = [token for token in engine["added_tokens"] if token["content"] != "</s>"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        path.write_text(json.dumps(engine))
        added = [PATCH, *filter(None, marks)]
        tokenizer = HfvlmShikraTokenizer.from_vocabulary(path, added=added, eos_token="<unk>")
    start, end = marks
    return HfvlmShikraProcessor(HfvlmShikraImageProcessor(), tokenizer, image_start=start, image_end=end)


def messages_of(processor: HfvlmShikraProcessor, dialog: dict) -> list[dict]:
    """As users say it: the picture with the first message, places in its pixels."""
    messages, size = [], dialog["size"]
    for i, turn in enumerate(dialog["messages"]):
        text = turn["message"]
        given = {name: turn[name] for name in ("boxes", "points", "boxes_seq", "points_seq") if turn.get(name)}
        if given:
            text = processor.refer(text, tuple(size), **given)
        picture = [{"type": "image"}] if size and i == 0 else []
        messages.append({"role": ROLES[turn["role"]], "content": [*picture, {"type": "text", "text": text}]})
    return messages


def dialogs(golden: Golden) -> None:
    case = golden.case
    for row in case["rows"]:
        if row["tokenizer"] != "tiny":  # LLaMA's own is under a licence that does not let it be kept here
            continue
        processor, counts = processor_of(golden, MARKS if row["se"] else ("", "")), [row["image_token_len"]]
        messages = messages_of(processor, case["dialogs"][row["dialog"]])
        asks = messages[-1]["role"] == "user"
        whole = processor.apply_chat_template(messages, add_generation_prompt=asks, sanitize_control_tokens=False)
        patches = f"{processor.image_start}{PATCH * counts[0]}{processor.image_end}"
        assert whole.replace("<image>", patches) == row["prompt"]
        if row["mode"] == "train":
            ids, labels = processor.training_row(messages)
            assert processor.expand(ids, counts) == row["input_ids"], row["dialog"]
            repeats = [counts[0] if i == processor.image_token_id else 1 for i in ids]
            expanded = torch.tensor(labels).repeat_interleave(torch.tensor(repeats)).tolist()
            assert expanded == row["labels"], row["dialog"]
        else:  # the question before the last answer, and the whole, which is what answers are measured by
            asked = messages if asks else messages[:-1]
            prompt = processor.apply_chat_template(asked, add_generation_prompt=True, sanitize_control_tokens=False)
            assert processor.expand(processor.encode(prompt), counts) == row["input_ids"], row["dialog"]
            assert processor.expand(processor.encode(whole, add_special_tokens=False), counts) == row["labels"]


def formatting(golden: Golden) -> None:
    facts = golden.case["formatting"]
    plain, small = Decimals(), Decimals(2, "()")
    for i, text in enumerate(facts["strings"]):
        for name, width, notation in (("extract", 4, plain), ("extract_point", 2, plain), ("extract_small", 4, small)):
            found = [written.places for written in notation.find(text) if len(written.places[0]) == width]
            assert found == facts[name][i], (name, text)
    bins = Bins(101)
    for kind, places in (
        ("format_box", facts["format_box"]["boxes"]),
        ("format_point", facts["format_point"]["points"]),
    ):
        assert plain.write(places) == facts[kind]["plain"]
        assert bins.write(places) == facts[kind]["token101"]
    assert small.write(facts["format_box"]["boxes"]) == facts["format_box"]["small_precision2"]
    assert [written.places for written in bins.find(facts["format_box"]["token101"])] == facts["token_extract"]
    for known in facts["norm"]:
        # A picture of this size alone is no square: the square's own pixels are meant.
        if known["w"] == known["h"]:
            assert Square(known["w"], known["h"]).share(known["box"]) == known["norm"]
    for known in facts["expand2square"]:
        square, side = Square(known["w"], known["h"]), max(known["w"], known["h"])
        assert square.share(known["box"]) == [round(value / side, 3) for value in known["out"]]


# Model


def compose(path: Path) -> tuple[HfvlmShikraConfig, list[Table]]:
    """The released difference and, without memory, its base and the tower."""
    preset = load_preset(f"shikra/{path.name.removesuffix('.gz').removesuffix('.json')}")
    config = preset.make_config()
    delta = read_key_list(path)
    base = {key: t[:32000] if t.shape[0] == 32003 else t for key, t in delta.items() if "mm_projector" not in key}
    fields = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "image_size",
        "patch_size",
    )
    with torch.device("meta"):
        sizes = {name: getattr(config.vision_config, name) for name in fields}
        tower = CLIPVisionModel(CLIPVisionConfig(**sizes)).state_dict()
    settings = {"vision": VISION}
    tensors = {"main": delta, "base": base, "vision": tower}
    sources = {role: Source(path, part, settings.get(role, {})) for role, part in tensors.items()}
    return config, tables_for(config, preset.source["layout"], sources)


def converted(golden: Golden) -> HfvlmShikraForConditionalGeneration:
    case = golden.case
    parts: dict[str, dict[str, Tensor]] = {"main": {}, "vision": {}}
    for key, tensor in golden.state_dict.items():
        parts["vision" if key.startswith("vision_model.") else "main"][key] = tensor
    sources = {role: Source(Path(role), tensors, VISION) for role, tensors in parts.items()}
    flags = case["vision_flags"]
    original = {**case["config"], "vision_config": VISION | case["vision_config"]}
    original |= {"mm_use_im_start_end": flags["use_im_start_end"], "im_patch_token": flags["im_patch_token"]}
    config = config_from_original(original, parts["main"])
    empty = empty_model(config)
    tables = convert_tables(tables_for(config, "original", sources), empty.state_dict())
    tensors = {key: t.contiguous().clone() for part in tables for key, t in part.items()}
    model, info = type(empty).from_pretrained(None, config=config, state_dict=tensors, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def model_outputs(golden: Golden) -> None:
    model, inputs = converted(golden), golden.inputs
    paths = {
        "vision_pre_layrnorm": "vision_model.pre_norm",
        "vision_layer0": "vision_model.layers.0",
        "projected": "projector",
        "lm_layer0": "language_model.model.layers.0",
        "lm_norm": "language_model.model.norm",
    }
    batch = {name: inputs[name] for name in ("input_ids", "attention_mask", "labels")}
    with torch.no_grad(), Recorder(model, list(paths.values())) as seen:
        pictures = model.get_image_features(inputs["images"]).pooler_output
        if not golden.case["vision_flags"]["use_im_start_end"]:
            # Without tokens around pictures the original gives every row of a batch the first.
            pictures = pictures[:1] * len(pictures)
        features = {"image": Features(pooler_output=pictures)}
        output = model(**batch, mm_encoder_outputs=features)
        values = {name: seen[path] for name, path in paths.items()}
        values["inputs_embeds"] = model.embed(inputs["input_ids"], features)
    values |= {"logits": output.logits, "loss": output.loss.reshape(1)}
    mask, width = inputs["attention_mask"].bool().unsqueeze(-1), golden.outputs["vision_layer0"].shape[-1]
    for name in golden.in_order():
        if name.startswith("greedy"):
            golden.compare(name, greedy(golden, model, int(name.removeprefix("greedy_"))))
        elif name.startswith("vision"):
            golden.compare(name, values[name][..., :width])
        else:
            real = mask if name in ("inputs_embeds", "logits", "lm_layer0", "lm_norm") else None
            golden.compare(name, values[name], real)


def greedy(golden: Golden, model: HfvlmShikraForConditionalGeneration, i: int) -> Tensor:
    """The new ids after row i, with the pictures that are its own."""
    inputs, counts = golden.inputs, golden.case["images_per_sample"]
    first = sum(counts[:i])
    ids = inputs["input_ids"][i : i + 1, inputs["attention_mask"][i].bool()]
    picture = {"pixel_values": inputs["images"][first : first + counts[i]]} if counts[i] else {}
    length = len(golden.outputs[f"greedy_{i}"])
    new = model.generate(ids, **picture, do_sample=False, max_new_tokens=length, eos_token_id=None, pad_token_id=0)
    return new[0, ids.shape[1] :]
