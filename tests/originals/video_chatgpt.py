import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from hfvlm.checkpoints.conversion import Source
from hfvlm.checkpoints.key_table import Table, convert_tables
from hfvlm.conversion import video_chatgpt as conversion
from hfvlm.conversion.blocks import LLAMA_FIELDS
from hfvlm.media import read_video
from hfvlm.modeling.image_text import Features
from hfvlm.models.pg_video_llava import HfvlmPGVideoLLaVAProcessor
from hfvlm.models.video_chatgpt import (
    HfvlmVideoChatGPTConfig,
    HfvlmVideoChatGPTFeatureExtractor,
    HfvlmVideoChatGPTProcessor,
    HfvlmVideoChatGPTTokenizer,
)
from hfvlm.models.video_chatgpt.modeling_video_chatgpt import average
from hfvlm.presets import Preset
from hfvlm.processing.assembly import IGNORE
from hfvlm.release.plans import empty_model
from tests.originals.common import fitting
from tests.support.golden import Golden, Recorder, parts_of, read_key_list, stem_of

# The authors' own, where a case names none.
CONVERSATIONS = {HfvlmVideoChatGPTProcessor: "video-chatgpt_v1", HfvlmPGVideoLLaVAProcessor: "pg-video-llava"}
PARTS = {"base": "base", "projector": "main", "vision_tower": "vision"}
VISION = {"model_type": "clip_vision_model"}
ROLES = {"human": "user", "gpt": "assistant"}


CONFIG = (
    *("llama", "clip_vision", "mm_hidden_size", "mm_projector_type", "clip_vision_image_size", "use_vid_start_end"),
    *("vid_patch_token", "vid_start_token", "vid_end_token", "mm_vision_select_layer"),
)
MODEL = {"config": CONFIG, "config__llama": (*LLAMA_FIELDS, "use_cache"), "constructor": ()}
FRAMES = {"image_size": "size", "num_frames": "num_frames", "num_frm": "num_frames"}


def compare(golden: Golden) -> None:
    if golden.state_dict:
        check_model(golden)
        model_outputs(golden)
    elif not processing(golden, HfvlmVideoChatGPTProcessor, HfvlmVideoChatGPTFeatureExtractor):
        golden.check()
        pooling(golden)


def check_model(golden: Golden) -> None:
    golden.check(**MODEL, config__clip_vision=CLIPVisionConfig().to_dict())


def processing(golden: Golden, processor_class, extractor_class) -> bool:
    """Run a case of texts or of videos; whether it is one."""
    case = golden.case
    golden.check(arguments=FRAMES if "files" in case or "get_seq_frames" in case else ())
    if "prompts" in case:
        prompts(golden, processor_class)
    elif "sources" in case:
        training_labels(golden)
    elif "files" in case or "get_seq_frames" in case:
        frames(golden, extractor_class)
    else:
        return False
    return True


# Processor


def prompts(golden: Golden, processor_class=HfvlmVideoChatGPTProcessor) -> None:
    count = golden.case.get("video_token_len", 356)
    for prompt in golden.case["prompts"]:
        tokenizer = HfvlmVideoChatGPTTokenizer(tokenizer_object=Tokenizer(BPE()))
        style = prompt["conv_mode"].split()[0]
        processor = processor_class(HfvlmVideoChatGPTFeatureExtractor(), tokenizer, conversation=style)
        asked = prompt.get("turns", [["user", "What is this?\n<video>"], ["assistant", None]])
        turns = [{"role": role, "content": content(said)} for role, said in asked if said is not None]
        if "transcript" in prompt:
            turns[0]["content"].append({"type": "transcript", "text": prompt["transcript"]})
        text = processor.apply_chat_template(turns, add_generation_prompt=asked[-1][1] is None)
        assert text.replace("<video>", f"<vid_start><vid_patch>*{count}<vid_end>") == prompt["prompt"]


def content(said: str) -> str | list[dict[str, str]]:
    text, film, _ = said.partition("\n<video>")
    return [{"type": "video"}, {"type": "text", "text": text}] if film else said


def tokenizer_of(golden: Golden, first: int) -> HfvlmVideoChatGPTTokenizer:
    """Equal from either form of the vocabulary; `first` is the id of the first token that was added."""
    made = []
    for file in ("tokenizer.model", "tokenizer.json"):
        plain = HfvlmVideoChatGPTTokenizer.from_vocabulary(golden.folder / file)
        filling = [f"<unused_{i}>" for i in range(len(plain), first)]
        added = [*filling, *golden.case["added_tokens"]]
        made.append(HfvlmVideoChatGPTTokenizer.from_vocabulary(golden.folder / file, added=added))
    text = "<s> A dog.\n<vid_start><vid_patch><vid_end> runs  away\n"
    assert made[0](text)["input_ids"] == made[1](text)["input_ids"]
    assert made[0].convert_tokens_to_ids(list(golden.case["added_tokens"])) == [*golden.case["added_tokens"].values()]
    return made[0]


def training_labels(golden: Golden) -> None:
    case = golden.case
    tokenizer = tokenizer_of(golden, min(case["added_tokens"].values()))
    processor = HfvlmVideoChatGPTProcessor(HfvlmVideoChatGPTFeatureExtractor(), tokenizer)
    patches = case["first_messages"][0].count("<vid_patch>")
    for i, source in enumerate(case["sources"]):
        messages = [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in source]
        ids, labels = processor.training_row(messages)
        repeats = [patches if token == processor.video_token_id else 1 for token in ids]
        ids, labels = (np.repeat(row, repeats).tolist() for row in (ids, labels))
        rest = len(case["input_ids"][i]) - len(ids)
        assert ids + [tokenizer.pad_token_id] * rest == case["input_ids"][i]
        assert labels + [IGNORE] * rest == case["labels"][i]


def frames(golden: Golden, extractor_class=HfvlmVideoChatGPTFeatureExtractor) -> None:
    extractor = extractor_class(**{FRAMES[name]: value for name, value in golden.section("arguments").items()})
    settings = extractor.settings_for({})
    for count, expected in golden.section("get_seq_frames.indices").items():
        video = read_video(np.zeros((int(count), 1, 1, 3), np.uint8))
        assert extractor.frame_indices(video, settings) == expected, count
    mean, std = (torch.tensor(getattr(extractor, name))[:, None, None] for name in ("image_mean", "image_std"))
    for file, facts in golden.section("files").items():
        video = read_video(golden.folder / file)
        assert extractor.frame_indices(video, settings) == facts.get(
            "frames_taken", extractor.frame_indices(video, settings)
        )
        inputs = extractor(golden.folder / file, return_tensors="pt")
        pixels = inputs["pixel_values_videos"][0]
        assert list(pixels.shape) == facts.get("pixel_values", list(pixels.shape))
        assert inputs["num_frames"].tolist() == [len(pixels)]
        loaded = ((pixels * std + mean) * 255).round().byte().permute(0, 2, 3, 1)
        golden.compare(f"{file}.loaded_frame0_stride", loaded[0, ::16, ::16])
        golden.compare(f"{file}.loaded_stride9973", loaded.flatten()[::9973])
        golden.compare(f"{file}.pixel_values_stride9973", pixels.flatten()[::9973])
        exact = pixels.double().flatten(1)
        golden.compare(f"{file}.mean_std_per_frame", torch.stack([exact.mean(1), exact.std(1, correction=0)]))


# Model


def pooling(golden: Golden) -> None:
    for name, patches in golden.inputs.items():
        golden.compare(f"{name}.float32", average(patches, 100))
        golden.compare(f"{name}.half", average(patches, 100).half())
        golden.compare(f"{name}.numpy_on_float16", average(patches.half(), 100))


def compose(path: Path) -> tuple[HfvlmVideoChatGPTConfig, list[Table]]:
    """The three released files of a whole model, of which `path` is one."""
    return composed(path, "video_chatgpt", conversion)


def role_of(notes: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """What a released file is to a whole model, as its notes say; where they say nothing of it, as its keys do."""
    use, keys = (" ".join(str(notes.get(name, "")) for name in names) for names in (("use", "repo"), ("keys", "load")))
    if "CLIPVisionModel" in use or "/clip-vit" in use:
        return "vision"
    if "mm_projector" in keys:
        return "main"
    if "pytorch_model" in str(notes.get("files", "")):
        return "base"
    inside = {"vision": "vision_model.", "base": "lm_head."}
    return next((role for role, start in inside.items() if any(key.startswith(start) for key in tensors)), "main")


def composed(path: Path, architecture: str, module) -> tuple[HfvlmVideoChatGPTConfig, list[Table]]:
    files = parts_of(path, role_of)
    assert set(files) == {"base", "vision", "main"}, f"of {path.name}'s model there are {', '.join(files)} alone"
    sources = {
        role: Source(file, read_key_list(file), VISION if role == "vision" else {}) for role, file in files.items()
    }

    def tables(preset: Preset) -> tuple[Any, list[Table]]:
        config = preset.make_config()
        return config, module.tables_for(config, preset.source["layout"], sources)

    return fitting(architecture, stem_of(files["main"]), tables)


def sources_of(golden: Golden) -> dict[str, Source]:
    """The case's state dict as the files that the original would read it from. A case that begins with the tower's
    features has no tower, and gets any."""
    files: dict[str, dict[str, Tensor]] = {}
    for key, tensor in golden.state_dict.items():
        part, _, name = key.partition("/") if key.partition("/")[0] in PARTS else ("projector", "", key)
        files.setdefault(PARTS[part], {})[name] = tensor
    if "vision" not in files:
        files["vision"] = CLIPVisionModel(CLIPVisionConfig(**vision_of(golden))).state_dict()
    return {role: Source(Path(role), tensors, VISION if role == "vision" else {}) for role, tensors in files.items()}


def vision_of(golden: Golden) -> dict:
    config = golden.case["config"]
    sizes = {"hidden_size": config["mm_hidden_size"], "intermediate_size": 8, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 1, "image_size": config.get("clip_vision_image_size", 28), "patch_size": 14}
    return config.get("clip_vision", sizes)


def converted(golden: Golden, module=conversion):
    sources = sources_of(golden)
    own = {name: value for name, value in golden.case["config"].items() if name not in ("llama", "clip_vision")}
    original = {**golden.case["config"]["llama"], **own, "vision_config": VISION | vision_of(golden)}
    config = module.config_from_original(original, sources["main"].tensors)
    layout = "projector" if "base" in sources else module.layout_of(original)
    empty = empty_model(config)
    parts = convert_tables(module.tables_for(config, layout, sources), empty.state_dict())
    tensors = {key: t.contiguous().clone() for part in parts for key, t in part.items()}
    model, info = type(empty).from_pretrained(None, config=config, state_dict=tensors, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def stored(golden: Golden, name: str, value: Tensor) -> Tensor:
    """The part of an output that the case says it keeps: "[:, ::3]", "first 3 frames", "last 8 positions"."""
    said = golden.section("stored").get(name, "")
    if match := re.search(r"\[(.+)\]", said):
        steps = [part.strip().rpartition("::")[2] for part in match[1].split(",")]
        return value[tuple(slice(None, None, int(step) if step.isdigit() else None) for step in steps)]
    if match := re.search(r"first (\d+)", said):
        return value[: int(match[1])]
    if match := re.search(r"last (\d+) positions", said):
        return value[:, -int(match[1]) :]
    return value


def model_outputs(golden: Golden, module=conversion, processor_class=HfvlmVideoChatGPTProcessor) -> None:
    model, inputs = converted(golden, module), golden.inputs
    known = golden.case.get("base_vocab", model.config.text_config.vocab_size)
    paths = {
        "clip.embeddings": "vision_model.pre_norm",
        "clip.layer0": "vision_model.layers.0",
        "mm_projector": "projector",
        "video_features": "projector:input",
        "llm.layer0": "language_model.model.layers.0",
        "llm.final_norm": "language_model.model.norm",
    }
    modules = sorted({path.removesuffix(":input") for path in paths.values()})
    with torch.no_grad(), Recorder(model, modules) as seen:
        batch, values = (
            asked(golden, model, processor_class, seen) if "frames" in inputs else given(golden, model, seen)
        )
        output = model(**batch)
        values |= {name: seen[path] for name, path in paths.items() if name not in values and path in seen}
        values["inputs_embeds"] = model.embed(batch["input_ids"], batch["mm_encoder_outputs"])
    values["logits"] = output.logits
    if output.loss is not None:
        values["loss"] = output.loss.reshape(1)
    if "generated_ids" in golden.outputs:
        values["generated_ids"] = greedy(golden, model, batch)
    mask = batch["attention_mask"].bool().unsqueeze(-1)
    for name in golden.in_order():
        value = stored(golden, name, values[name])
        real = None
        if name.startswith(("llm", "logits", "inputs_embeds")):
            real = stored(golden, name, mask).expand_as(value).clone()
            if name == "logits":  # the original draws the added tokens' outputs again each time
                real[..., known:] = False
        golden.compare(name, value, real)


def asked(golden: Golden, model, processor_class, seen: dict) -> tuple[dict, dict]:
    """The authors' inference: frames, a question and, where there is one, a transcript."""
    case, config = golden.case, model.config
    edge = config.vision_config.image_size
    extractor = HfvlmVideoChatGPTFeatureExtractor(size=edge, do_sample_frames=False)
    tokenizer = tokenizer_of(golden, config.video_token_id)
    assert type(tokenizer) is HfvlmVideoChatGPTTokenizer
    marks = {} if golden.section("config").get("use_vid_start_end", True) else conversion.unmarked()
    processor = processor_class(
        extractor,
        tokenizer,
        conversation=case.get("conv_mode", CONVERSATIONS[processor_class]),
        patch_size=config.vision_config.patch_size,
        temporal_tokens=config.temporal_tokens,
        **marks,
    )
    text = {"type": "text", "text": case["question"]}
    said = [{"type": "transcript", "text": case["transcript"]}] if case.get("transcript") else []
    chat = [{"role": "user", "content": [{"type": "video", "video": golden.inputs["frames"]}, text, *said]}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    batch = dict(processor(text=prompt, videos=[golden.inputs["frames"]]))
    count = case.get("video_token_len", int((batch["input_ids"] == config.video_token_id).sum()))
    if "prompt" in case:
        around = f"{processor.video_start}<vid_patch>*{count}{processor.video_end}"
        assert prompt.replace("<video>", around) == case["prompt"]
    if "input_ids" in golden.inputs:
        assert torch.equal(batch["input_ids"], golden.inputs["input_ids"])
    fast = rounds(batch["input_ids"], config.video_token_id)
    slow = rounds(processor.encode_trained(prompt), config.video_token_id, count)
    assert fast == case.get("input_ids_fast", fast)
    assert slow == case.get("input_ids_slow", slow)
    pixels = batch.pop("pixel_values_videos")
    features = model.get_video_features(pixels, num_frames=batch.pop("num_frames"))
    batch["mm_encoder_outputs"] = {"video": features}
    values = {
        "pixel_values": pixels[0],
        "clip.penultimate": features.last_hidden_state[:, 1:],
        "mm_projector": features.pooler_output[0][None],
    }
    return batch, values


def rounds(ids, placeholder: int, count: int | None = None) -> list:
    """Ids as the case lists them, with [id, count] for the placeholders."""
    ids = ids[0].tolist() if isinstance(ids, Tensor) else ids
    count = count or ids.count(placeholder)
    first = ids.index(placeholder)
    rest = [i for i in ids[first:] if i != placeholder]
    return [*ids[:first], [placeholder, count], *rest]


def given(golden: Golden, model, seen: dict) -> tuple[dict, dict]:
    """A batch of ids and features. A text alone consumes features that it does not show."""
    inputs = golden.inputs
    projected = model.projector(inputs["video_spatio_temporal_features"])
    ids = inputs["input_ids"]
    shown = (ids == model.config.video_token_id).any(dim=1)
    batch = {"input_ids": ids, "attention_mask": golden.mask()}
    batch |= {name: inputs[name] for name in ("labels",) if name in inputs}
    batch["mm_encoder_outputs"] = {"video": Features(pooler_output=list(projected[shown]))}
    return batch, {"mm_projector": projected}


def greedy(golden: Golden, model, batch: dict) -> Tensor:
    """Of the first row's question."""
    batch = copy.copy(batch)
    row = batch["attention_mask"][0].bool()
    if "labels" in batch:
        row &= batch["labels"][0] == IGNORE
    ids = batch["input_ids"][:1, row]
    features = {"video": Features(pooler_output=batch["mm_encoder_outputs"]["video"].pooler_output[:1])}
    length = len(golden.outputs["generated_ids"])
    ended = {"eos_token_id": None, "pad_token_id": 0, "max_new_tokens": length}
    new = model.generate(
        ids, attention_mask=torch.ones_like(ids), mm_encoder_outputs=features, do_sample=False, **ended
    )
    return new[0, ids.shape[1] :]
