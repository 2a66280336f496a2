import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from hfvlm.checkpoints.conversion import Source
from hfvlm.checkpoints.key_table import Table, convert_tables
from hfvlm.conversion.blocks import LLAMA_FIELDS
from hfvlm.conversion.shikra import MARKS, PATCH, config_from_original, tables_for
from hfvlm.modeling.image_text import Features
from hfvlm.models.shikra import (
    HfvlmShikraConfig,
    HfvlmShikraForConditionalGeneration,
    HfvlmShikraImageProcessor,
    HfvlmShikraProcessor,
    HfvlmShikraTokenizer,
)
from hfvlm.models.shikra.regions import Bins, Decimals, Square
from hfvlm.presets import Preset
from hfvlm.release.plans import empty_model
from tests.originals.common import fitting
from tests.support.golden import Golden, Recorder, UnknownOptionError, read_key_list, stem_of

VISION = {"model_type": "clip_vision_model"}
ROLES = {"human": "user", "gpt": "assistant"}


CONFIG = (*LLAMA_FIELDS, "mm_vision_select_layer", "model_type")
FLAGS = ("use_im_start_end", "im_patch_token", "im_start_token", "im_end_token")
ROW = ("dialog", "tokenizer", "mode", "image_token_len", "se", "prompt", "input_ids", "labels", "attention_mask_sum")


def compare(golden: Golden) -> None:
    case = golden.case
    if golden.state_dict:
        golden.check(config=CONFIG, vision_flags=FLAGS, vision_config=CLIPVisionConfig().to_dict())
        model_outputs(golden)
    elif "files" in case:
        golden.check(arguments=("image_size",))
        pixels(golden)
    else:
        golden.check()
        dialogs(golden)
        formatting(golden)


# Processor


def pixels(golden: Golden) -> None:
    size, stride = golden.section("arguments").get("image_size", 224), golden.case.get("stride", 1)
    for file in golden.case["files"]:
        name = file.removesuffix(".png")
        processor = HfvlmShikraImageProcessor(size=size, upright=False)
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
    """As users say it: the image with the first message, places in its pixels."""
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
    for row in case.get("rows", []):
        if unknown := sorted(set(row) - set(ROW)):
            raise UnknownOptionError(f"{golden.folder.name}: a row has {', '.join(unknown)}")
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
    """What a case has of how places are written and found."""
    facts = golden.section("formatting")
    plain, small, bins = Decimals(), Decimals(2, "()"), Bins(101)
    found_in(facts, {"extract": (4, plain), "extract_point": (2, plain), "extract_small": (4, small)})
    for kind, given in (("format_box", "boxes"), ("format_point", "points")):
        stated = golden.section(f"formatting.{kind}")
        notations = {"plain": plain, "token101": bins, "small_precision2": small}
        for name in set(stated) - {given}:
            assert notations[name].format(stated[given]) == stated[name], (kind, name)
        if kind == "format_box" and "token101" in stated and "token_extract" in facts:
            assert [match.regions for match in bins.find(stated["token101"])] == facts["token_extract"]
    squares(facts)


def found_in(facts: dict[str, Any], kinds: dict[str, tuple[int, Decimals]]) -> None:
    """Boxes and points in texts."""
    for name in kinds.keys() & facts:
        width, notation = kinds[name]
        for text, expected in zip(facts["strings"], facts[name], strict=True):
            found = [match.regions for match in notation.find(text) if len(match.regions[0]) == width]
            assert found == expected, (name, text)


def squares(facts: dict[str, Any]) -> None:
    for known in facts.get("norm", []):
        # An image of this size alone is no square: the square's own pixels are meant.
        if known["w"] == known["h"]:
            assert Square(known["w"], known["h"]).share(known["box"]) == known["norm"]
    for known in facts.get("expand2square", []):
        square, side = Square(known["w"], known["h"]), max(known["w"], known["h"])
        assert square.share(known["box"]) == [round(value / side, 3) for value in known["out"]]


# Model


def compose(path: Path) -> tuple[HfvlmShikraConfig, list[Table]]:
    """The released difference and, without memory, its base and the tower."""
    return fitting("shikra", stem_of(path), lambda preset: composed(path, preset))


def composed(path: Path, preset: Preset) -> tuple[HfvlmShikraConfig, list[Table]]:
    config = preset.make_config()
    delta = read_key_list(path)
    base = {
        key: t[:32000] if t.ndim and t.shape[0] > 32000 else t for key, t in delta.items() if "mm_projector" not in key
    }
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
    flags = {"use_im_start_end": True} | golden.section("vision_flags")
    original = {**case["config"], "vision_config": VISION | case["vision_config"]}
    original["mm_use_im_start_end"] = flags["use_im_start_end"]
    original |= {name: flags[name] for name in ("im_patch_token",) if name in flags}
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
    batch = {"input_ids": inputs["input_ids"], "attention_mask": golden.mask(), "labels": inputs.get("labels")}
    with torch.no_grad(), Recorder(model, list(paths.values())) as seen:
        pictures = model.get_image_features(inputs["images"]).pooler_output
        if not golden.section("vision_flags").get("use_im_start_end", True):
            # Without tokens around images the original gives every row of a batch the first.
            pictures = pictures[:1] * len(pictures)
        features = {"image": Features(pooler_output=pictures)}
        output = model(**batch, mm_encoder_outputs=features)
        values = {name: seen[path] for name, path in paths.items()}
        values["inputs_embeds"] = model.embed(inputs["input_ids"], features)
    values |= {"logits": output.logits, "loss": None if output.loss is None else output.loss.reshape(1)}
    mask = batch["attention_mask"].bool().unsqueeze(-1)
    for name in golden.in_order():
        if name.startswith("greedy"):
            golden.compare(name, greedy(golden, model, int(name.removeprefix("greedy_"))))
        elif name.startswith("vision"):
            golden.compare(name, values[name][..., : golden.outputs[name].shape[-1]])
        else:
            real = mask if name in ("inputs_embeds", "logits", "lm_layer0", "lm_norm") else None
            golden.compare(name, values[name], real)


def greedy(golden: Golden, model: HfvlmShikraForConditionalGeneration, i: int) -> Tensor:
    """The new ids after row i, with the images that are its own."""
    inputs, counts = golden.inputs, golden.case.get("images_per_sample") or [1] * len(golden.inputs["input_ids"])
    first = sum(counts[:i])
    ids = inputs["input_ids"][i : i + 1, golden.mask()[i].bool()]
    picture = {"pixel_values": inputs["images"][first : first + counts[i]]} if counts[i] else {}
    length = len(golden.outputs[f"greedy_{i}"])
    new = model.generate(ids, **picture, do_sample=False, max_new_tokens=length, eos_token_id=None, pad_token_id=0)
    return new[0, ids.shape[1] :]
