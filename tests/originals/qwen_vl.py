import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hfvlm.checkpoints.conversion import Source
from hfvlm.checkpoints.key_table import Table, convert_keys
from hfvlm.conversion.qwen_vl import config_from_original, keys_for, tables_for
from hfvlm.modeling.compat import cache_of
from hfvlm.models.qwen_vl import (
    HfvlmQwenVLConfig,
    HfvlmQwenVLForConditionalGeneration,
    HfvlmQwenVLImageProcessor,
    HfvlmQwenVLProcessor,
    HfvlmQwenVLTokenizer,
)
from hfvlm.models.qwen_vl.processing_qwen_vl import JOINER
from hfvlm.release.plans import empty_model
from tests.support.golden import Golden, Recorder, UnknownOptionError, notes_of, parts_of, present, read_key_list

PLACE = HfvlmQwenVLProcessor.image_token
# The original has the path of an image where hfvlm has the place of one that is given beside the text.
PATH = re.compile(r"<img>[^<]*</img>")


CONFIG = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "kv_channels", "intermediate_size"),
    *("seq_length", "max_position_embeddings", "layer_norm_epsilon", "rotary_pct", "rotary_emb_base", "no_bias"),
    *("use_dynamic_ntk", "use_logn_attn", "emb_dropout_prob", "attn_dropout_prob", "initializer_range", "visual"),
    *("tie_word_embeddings", "model_type"),
    # How the original computes, not what.
    *("use_flash_attn", "use_cache", "fp32", "bf16", "fp16", "softmax_in_fp32"),
)
VISUAL = (
    *("image_size", "patch_size", "width", "layers", "heads", "mlp_ratio", "n_queries", "output_dim"),
    "image_start_id",
)
ROW = ("tokenizer", "conversation", "input_ids", "labels", "attention_ones")


def compare(golden: Golden) -> None:
    case = golden.case
    if golden.state_dict:
        golden.check(config=CONFIG, config__visual=VISUAL)
        model_outputs(golden)
    elif "files" in case:
        golden.check(arguments=("image_size",))
        pixels(golden)
    elif "rows" in case:
        golden.check(arguments=("max_len", "system_message"))
        training_labels(golden)
    else:
        golden.check()
        tokens(golden)


def role_of(notes: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    return "adapter" if "adapter_config" in notes else "base"


def compose(path: Path) -> tuple[HfvlmQwenVLConfig, list[Table]]:
    """A whole release, or an adapter on its base."""
    notes, tensors = notes_of(path), read_key_list(path)
    if role_of(notes, tensors) == "base":
        config = config_from_original(notes, tensors)
        return config, tables_for(config, "original", {"main": Source(path, tensors, {})})
    base = parts_of(path, role_of)["base"]
    whole = read_key_list(base)
    config = config_from_original(notes_of(base), whole)
    main = Source(path, tensors, notes["adapter_config"])
    return config, tables_for(config, "lora", {"main": main, "base": Source(base, whole, {})})


# Processor


def processor_for(golden: Golden, **options) -> HfvlmQwenVLProcessor:
    tokenizer = HfvlmQwenVLTokenizer.from_vocabulary(golden.folder / "qwen.tiktoken")
    return HfvlmQwenVLProcessor(HfvlmQwenVLImageProcessor(), tokenizer, **options)


def unrolled(stored) -> list[int]:
    return [i for i, count in stored["rle"] for _ in range(count)] if isinstance(stored, dict) else list(stored)


def pathless(ids: list[int], processor: HfvlmQwenVLProcessor) -> list[int]:
    """Ids as the original stores them, an image's path among its placeholders, with placeholders alone."""
    start, end = processor.token_id("<img>"), processor.token_id("</img>")
    inside, result = False, []
    for i in ids:
        inside = inside and i != end
        result.append(processor.image_token_id if inside else i)
        inside = inside or i == start
    return result


def expanded(processor: HfvlmQwenVLProcessor, ids: list[int]) -> list[int]:
    return processor.expand(ids, [processor.num_queries] * ids.count(processor.image_token_id))


def tokens(golden: Golden) -> None:
    case, expected = golden.case, golden.case["results"]["tiny"]  # the released vocabulary may not be kept here
    processor = processor_for(golden)
    tokenizer = processor.tokenizer
    special = {name: processor.token_id(name) for name in expected.get("special", {})}
    known = {"n_vocab": len(tokenizer), "eod_id": tokenizer.eos_token_id, "special": special}
    assert {name: expected.get(name, value) for name, value in known.items()} == known
    for text, ids in zip(case["texts"], expected["texts"], strict=True):
        if PATH.search(text):
            actual = expanded(processor, processor.encode(PATH.sub(PLACE, text)))
            assert actual == pathless(unrolled(ids), processor), text
        else:
            assert tokenizer(text)["input_ids"] == ids, text
    contexts(expected.get("make_context") or [], processor)
    if "lists" in case:
        for results in present(case["results"]).values():
            every_list(golden, case, results)
    if "boxes_texts" in case:
        boxes(case["boxes_texts"], expected["boxes"], processor)
    if decoded := expected.get("decode_tokens"):
        answer = tokenizer.decode(decoded["ids"][decoded["context_length"] :], skip_special_tokens=True)
        assert answer.startswith(decoded["text"][0])


def contexts(stated: list[dict], processor: HfvlmQwenVLProcessor) -> None:
    for context in stated:
        history = context.get("history") or []
        if any(answer is None for _, answer in history):  # the original writes a line too many here
            continue
        turns = [("system", context["system"]), *(t for q, a in history for t in (("user", q), ("assistant", a)))]
        turns.append(("user", context["query"]))
        messages = [{"role": role, "content": PATH.sub(PLACE, text)} for role, text in turns]
        text = processor.apply_chat_template(messages, add_generation_prompt=True, sanitize_control_tokens=False)
        assert text.replace(JOINER, "") == PATH.sub(PLACE, context["raw_text"])
        assert expanded(processor, processor.encode(text)) == pathless(unrolled(context["ids"]), processor)


def every_list(golden: Golden, case: dict, results: dict) -> None:
    """`from_list_format`, of the release and of an older revision."""
    if "from_list_format" in results:
        lists(case, results, processor_for(golden, conversation="raw"))
    if "from_list_format_older" in results:
        older = {"from_list_format": results["from_list_format_older"]}
        lists(case, older, processor_for(golden, conversation="raw", picture_colon=":"))


def boxes(texts: list[str], expected: list[list[dict]], processor: HfvlmQwenVLProcessor) -> None:
    for text, stated in zip(texts, expected, strict=False):
        found = [place for place in processor.post_process_grounding(text, [(1000, 1000)]) if "box_xyxy" in place]
        assert [{"box": place["box_xyxy"], "ref": place["label"]} for place in found] == [
            {"ref": None} | box for box in stated
        ]
    for text in texts:
        for quad in re.findall(r"<quad>(.*?)</quad>", text):
            corners = [[int(n) for n in pair] for pair in re.findall(r"\((\d+),(\d+)\)", quad)]
            found = processor.post_process_grounding(text, [(1000, 1000)])
            assert {"label": None, "quad_xy": corners} in found


def lists(case: dict, expected: dict, processor: HfvlmQwenVLProcessor) -> None:
    for parts, text in zip(case["lists"], expected["from_list_format"], strict=True):
        content = [part_of(part, processor) for part in parts]
        actual = processor.apply_chat_template([{"role": "user", "content": content}], sanitize_control_tokens=False)
        assert actual == PATH.sub(PLACE, text)


def part_of(part: dict, processor: HfvlmQwenVLProcessor) -> dict:
    if "image" in part:
        return {"type": "image"}
    text = processor.grounding_text(part["ref"], part["box"]) if "ref" in part else part["text"]
    return {"type": "text", "text": text}


def training_labels(golden: Golden) -> None:
    processor, arguments = processor_for(golden), golden.section("arguments")
    longest = arguments.get("max_len")
    system = [{"role": "system", "content": arguments["system_message"]}] if "system_message" in arguments else []
    for row in golden.case["rows"]:
        if unknown := sorted(set(row) - set(ROW)):
            raise UnknownOptionError(f"{golden.folder.name}: a row has {', '.join(unknown)}")
        if row["tokenizer"] != "tiny":
            continue
        turns = golden.case["conversations"][row["conversation"]]
        # The original drops a first turn that is not the user's.
        turns = turns[turns[0]["from"] != "user" :]
        messages = [{"role": turn["from"], "content": PATH.sub(PLACE, turn["value"])} for turn in turns]
        ids, labels = processor.training_row([*system, *messages])
        count = row.get("attention_ones", len(unrolled(row["input_ids"])))
        expected = pathless(unrolled(row["input_ids"]), processor)[:count]
        assert expanded(processor, ids)[:longest] == expected
        wide = [
            same
            for i, label in zip(ids, labels, strict=True)
            for same in [label] * (processor.num_queries if i == processor.image_token_id else 1)
        ]
        assert wide[:longest] == unrolled(row["labels"])[:count]


def pixels(golden: Golden) -> None:
    stride = golden.case.get("stride", 1)
    processor = HfvlmQwenVLImageProcessor(upright=False, size=golden.section("arguments").get("image_size", 448))
    for file in golden.case["files"]:
        name = file.removesuffix(".png")
        (values,) = processor(golden.folder / file, return_tensors="pt")["pixel_values"]
        golden.compare(f"{name}.pixels", values[:, ::stride, ::stride])
        golden.compare(f"{name}.mean", values.double().mean(dim=(1, 2)))
        golden.compare(f"{name}.std", values.double().std(dim=(1, 2), correction=0))


# Model


def converted(golden: Golden) -> HfvlmQwenVLForConditionalGeneration:
    tensors = golden.state_dict
    config = config_from_original(golden.case, tensors)
    empty = empty_model(config)
    ours = convert_keys(tensors, keys_for(config), empty.state_dict())
    ours = {key: tensor.contiguous().clone() for key, tensor in ours.items()}
    model, info = type(empty).from_pretrained(None, config=config, state_dict=ours, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def model_inputs(golden: Golden, config: HfvlmQwenVLConfig) -> tuple[dict[str, Tensor], list[str]]:
    """The original's ids with placeholders for paths, and the paths."""
    start, ids = config.image_token_id - 2, golden.inputs["input_ids"].clone()
    paths = []
    for row in ids:
        ends = zip((row == start).nonzero(), (row == start + 1).nonzero(), strict=True)
        for left, right in ends:
            span = row[left + 1 : right].tolist()
            paths.append(bytes(span[: span.index(config.image_token_id)]).decode())
            row[left + 1 : right] = config.image_token_id
    return {"input_ids": ids, "attention_mask": golden.mask()}, paths


def model_outputs(golden: Golden) -> None:
    model = converted(golden)
    inputs, paths = model_inputs(golden, model.config)
    read = HfvlmQwenVLImageProcessor(size=model.config.vision_config.image_size)
    pixel_values = read([golden.folder / path for path in paths], return_tensors="pt")["pixel_values"]
    layer = "language_model.model.layers.0"
    modules = {
        "vit_conv1": "vision_model.patches.projection",
        "vit_ln_pre": "vision_model.pre_norm",
        "vit_block0": "vision_model.layers.0",
        "vit_last": "vision_model.layers",
        "resampler_ln_kv": "projector.context_norm",
        "resampler": "projector.attention",
        "vit_ln_post": "projector.post_norm",
        "image_features": "projector.projection",
        "lm_block0_attn": f"{layer}.self_attn",
        "lm_block0_mlp": f"{layer}.mlp",
        "lm_block0": layer,
        "ln_f": "language_model.model.norm",
    }
    fused = [f"{layer}.self_attn.{part}_proj" for part in "qkv"]
    with torch.no_grad(), Recorder(model, [*modules.values(), *fused]) as seen:
        output = model(**inputs, pixel_values=pixel_values, labels=golden.inputs.get("labels"), use_cache=True)
        values = {name: seen[path] for name, path in modules.items()}
        values["lm_block0_c_attn"] = torch.cat([seen[path] for path in fused], dim=-1)
        values["lm_input"] = seen[f"{layer}:input"]
    for name in ("vit_block0", "vit_last"):  # the original's are sequence first
        values[name] = values[name].transpose(0, 1)
    values |= {
        "pixel_values": pixel_values,
        "logits": output.logits,
        "loss": None if output.loss is None else output.loss.reshape(1),
    }
    values["ntk_alpha"] = torch.tensor([float(cache_of(output).stretch)])
    real = inputs["attention_mask"].bool().unsqueeze(-1)
    masked = {name for name in values if name.startswith(("lm_", "ln_f", "logits")) and name != "lm_input"}
    for name in golden.in_order():
        if name == "greedy":
            options = {"max_new_tokens": golden.outputs[name].shape[1], "do_sample": False, "eos_token_id": None}
            written = model.generate(**inputs, pixel_values=pixel_values, **options)
            golden.compare(name, written[:, inputs["input_ids"].shape[1] :])
        else:
            count = golden.case.get("stored_rows", {}).get(name, len(values[name]))
            golden.compare(name, values[name][:count], real[:count] if name in masked else None)
