import copy
import re
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch import Tensor
from transformers import AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel

from hfvlm.checkpoints.conversion import Source
from hfvlm.checkpoints.key_table import Table, convert_tables
from hfvlm.conversion.blocks import LLAMA_FIELDS
from hfvlm.conversion.interop.llava import config_to_transformers
from hfvlm.conversion.llava import config_from_original, layout_of, tables_for
from hfvlm.modeling.image_text import Features
from hfvlm.models.llava import (
    HfvlmLLaVAConfig,
    HfvlmLLaVAForConditionalGeneration,
    HfvlmLLaVAImageProcessor,
    HfvlmLLaVAProcessor,
)
from hfvlm.models.llava.processing_llava import HfvlmLLaVATokenizer
from hfvlm.presets import Preset
from hfvlm.processing.assembly import IGNORE
from hfvlm.release.plans import empty_model
from tests.originals.common import fitting
from tests.support.golden import Golden, Recorder, UnknownOptionError, companions, notes_of, read_key_list, stem_of

PICTURE = -200
LAYOUTS = {"adapter_model.bin": "lora", "mm_projector.bin": "projector", "delta": "delta"}
PART_FILES = {"non_lora_trainables.bin": "main", "adapter_model.bin": "adapter"}
MODES = {"default": "crop", "pad": "pad", "anyres": "tiles"}


# Of config.json; what decides a value is read, or refused, where it is converted.
CONFIG = (
    *("model_type", "mm_vision_select_layer", "mm_vision_select_feature", "mm_projector_type", "mm_use_im_start_end"),
    *("mm_use_im_patch_token", "tokenizer_padding_side", "tokenizer_model_max_length", "image_aspect_ratio"),
    *("image_grid_pinpoints", "mm_patch_merge_type", "use_mm_proj", "mm_hidden_size", "mm_vision_tower", "use_cache"),
    *LLAMA_FIELDS,
)
ADAPTER = (
    *(
        "peft_type",
        "task_type",
        "base_model_name_or_path",
        "r",
        "lora_alpha",
        "lora_dropout",
        "bias",
        "target_modules",
    ),
    *("fan_in_fan_out", "inference_mode", "init_lora_weights", "use_rslora", "rank_pattern", "alpha_pattern"),
)
PIXELS = ("size", "crop_size", "resample", "do_convert_rgb", "rescale", "image_mean", "image_std")
ROW = (
    *("version", "tokenizer", "legacy", "mm_use_im_start_end", "conversation", "has_image", "input_ids", "labels"),
    *("error", "warning"),
)


def compare(golden: Golden) -> None:
    case = golden.case
    if golden.state_dict:
        vision = CLIPVisionConfig().to_dict()
        golden.check(config=CONFIG, adapter_config=ADAPTER, vision_config=vision)
        model_outputs(golden)
    elif "files" in case:
        golden.check(image_processor=PIXELS)
        pixels(golden)
    else:
        golden.check()
        kinds = {"templates": prompts, "rows": training_labels, "texts": tokens}
        for section in kinds.keys() & case:
            kinds[section](golden)


# Processor


def prompts(golden: Golden) -> None:
    for name, template in golden.case["templates"].items():
        tokenizer = HfvlmLLaVATokenizer(tokenizer_object=Tokenizer(BPE()))
        processor = HfvlmLLaVAProcessor(HfvlmLLaVAImageProcessor(), tokenizer, conversation=name)
        for turns, expected in template["prompts"].items():
            if isinstance(expected, dict):  # the original fails here
                continue
            messages, asks = [], False
            for role, said in golden.case["turns"][turns]:
                asks = said is None
                if not asks:
                    # With example turns the original forgets the image, which is not in its first message then.
                    shown = template["preset_messages"] == 0
                    messages.append({"role": ("user", "assistant")[int(role)], "content": content(said, shown)})
            assert (
                processor.apply_chat_template(messages, add_generation_prompt=asks, sanitize_control_tokens=False)
                == expected
            ), (name, turns)


def content(said, shown):
    if isinstance(said, str):
        return said
    return [{"type": "text", "text": said["tuple"][0]}, *([{"type": "image"}] if shown else [])]


def tokenizer_for(golden: Golden, name: str, legacy: bool, **options) -> HfvlmLLaVATokenizer | None:
    if name != "tiny":  # LLaMA's own is under a licence that does not let it be kept here
        return None
    return HfvlmLLaVATokenizer.from_vocabulary(golden.folder / "tokenizer.model", legacy=legacy, **options)


def tokens(golden: Golden) -> None:
    case = golden.case
    for name, expected in case["results"].items():
        kind, _, legacy = name.partition(".legacy_")
        tokenizer = tokenizer_for(golden, kind, legacy == "true")
        if tokenizer is None:
            continue
        known = {f"{name}": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk")}
        known["vocab"] = len(tokenizer)
        assert {part: expected.get(part, value) for part, value in known.items()} == known
        for text, ids in zip(case["texts"], expected["texts"], strict=True):
            assert tokenizer(text)["input_ids"] == ids, (name, text)
        processor = processor_around(tokenizer_for(golden, kind, legacy == "true", added=["<image>"]))
        for text, ids in zip(case.get("prompts", []), expected.get("tokenizer_image_token") or [], strict=True):
            assert as_original(processor, processor.encode(text)) == ids, (name, text)
        for field in filter(re.compile(r"truncated_\d+").fullmatch, expected):
            length = int(field.rpartition("_")[2])
            assert expected[field] in tokenizer(case["texts"], truncation=True, max_length=length)["input_ids"]


def processor_around(tokenizer, **options) -> HfvlmLLaVAProcessor:
    return HfvlmLLaVAProcessor(HfvlmLLaVAImageProcessor(), tokenizer, **options)


def as_original(processor, ids):
    return [PICTURE if i == processor.image_token_id else i for i in ids]


def training_labels(golden: Golden) -> None:
    for row in golden.case["rows"]:
        if unknown := sorted(set(row) - set(ROW)):
            raise UnknownOptionError(f"{golden.folder.name}: a row has {', '.join(unknown)}")
        around = {"image_start": "<im_start>", "image_end": "<im_end>"} if row["mm_use_im_start_end"] else {}
        added = [*around.values(), "<image>"]
        tokenizer = tokenizer_for(golden, row["tokenizer"], row["legacy"], added=added)
        if tokenizer is None:
            continue
        processor = processor_around(tokenizer, conversation=row["version"], **around)
        roles = {"human": "user", "gpt": "assistant"}
        turns = golden.case["conversations"][row["conversation"]]
        messages = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in turns]
        if "error" in row:
            try:
                processor.training_row(messages)
            except ValueError:
                continue
            raise AssertionError(f"{row['version']}: the original refuses conversation {row['conversation']}")
        ids, labels = processor.training_row(messages)
        assert as_original(processor, ids) == row["input_ids"], row["version"]
        expected = [IGNORE if label == PICTURE else label for label in row["labels"]]
        assert labels == expected, (row["version"], row["legacy"], row["conversation"])


def pixels(golden: Golden) -> None:
    case, facts = golden.case, golden.section("image_processor")
    names = {"image_mean": "image_mean", "image_std": "image_std", "crop_size": "size"}
    shared = {ours: facts[theirs] for theirs, ours in names.items() if theirs in facts}
    pinpoints = [size[::-1] for size in case.get("image_grid_pinpoints", [])]
    # How an image is fitted is part of an output's name, and a case need not have every way.
    modes = {mode: how for mode, how in MODES.items() if any(f".{mode}." in name for name in golden.outputs)}
    for file in case["files"]:
        stem = file.removesuffix(".png")
        for mode, resize_mode in modes.items():
            tiled = {"grid_pinpoints": pinpoints} if mode == "anyres" else {}
            processor = HfvlmLLaVAImageProcessor(upright=False, resize_mode=resize_mode, **shared, **tiled)
            inputs = processor(golden.folder / file, return_tensors="pt")
            views, name = inputs["pixel_values"], f"{stem}.{mode}"
            stated = golden.section("results").get(name, {})
            assert list(views.shape) == stated.get("shape", list(views.shape)), name
            stride = case.get("stride", 1)
            golden.compare(f"{name}.pixels", views[:, :, ::stride, ::stride])
            golden.compare(f"{name}.mean", views.double().mean(dim=(2, 3)))
            golden.compare(f"{name}.std", views.double().std(dim=(2, 3), correction=0))


# Model


def compose(path: Path) -> tuple[HfvlmLLaVAConfig, list[Table]]:
    """A released file and, without memory, the others that its preset names: the configuration and the tables."""
    return fitting("llava", release_of(path), lambda preset: composed(path, preset))


def release_of(path: Path) -> str:
    """What a release is called of which the list has one file, whose own name follows."""
    stem = stem_of(path)
    for file in (*PART_FILES, "mm_projector.bin"):
        stem = stem.removesuffix(f".{file}")
    return stem


def role_in(path: Path) -> str:
    """What a list's file is in its release, as its notes and its keys say."""
    adapter = all(".lora_" in key for key in read_key_list(path))
    return "adapter" if adapter or notes_of(path).get("files", "").startswith("adapter_model") else "main"


def composed(path: Path, preset: Preset) -> tuple[HfvlmLLaVAConfig, list[Table]]:
    config, source = preset.make_config(), preset.source
    tensors: dict[str, dict[str, Tensor]] = {role_in(path): read_key_list(path)}
    if source["layout"] == "lora":  # the two files of an adapter are two lists
        for other in companions(path):
            if release_of(other) == release_of(path):
                tensors.setdefault(role_in(other), read_key_list(other))
    parts = source.get("parts", {})
    if "base" in parts:
        tensors["base"] = language_model(config, source["layout"])
    if "vision" in parts:
        with torch.device("meta"):
            tensors["vision"] = CLIPVisionModel(config_to_transformers(whole(config)).vision_config).state_dict()
    assert "main" in tensors, f"{path.name}: the release's other file has no list"
    adapter = notes_of(path).get("adapter_config", {"r": 128, "lora_alpha": 256})
    settings = {"vision": {"model_type": "clip_vision_model"}, "adapter": adapter}
    sources = {role: Source(path, part, settings.get(role, {})) for role, part in tensors.items()}
    return config, tables_for(config, source["layout"], sources)


def language_model(config: HfvlmLLaVAConfig, layout: str) -> dict[str, Tensor]:
    """A difference is to a base without the tokens that were added."""
    text = copy.deepcopy(config.text_config)
    text.vocab_size = 32000 if layout == "delta" else text.vocab_size
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(text).state_dict()


def whole(config: HfvlmLLaVAConfig) -> HfvlmLLaVAConfig:
    config = copy.deepcopy(config)
    config.projector_depth = 2
    return config


def sources_of(golden: Golden) -> dict[str, Source]:
    """The case's state dict as the files that the original would read it from."""
    names = {
        "base": "base",
        "non_lora_trainables.bin": "main",
        "vision_tower": "vision",
        "adapter_model.bin": "adapter",
    }
    files: dict[str, dict[str, Tensor]] = {}
    for key, tensor in golden.state_dict.items():
        file, _, name = key.rpartition("|")
        files.setdefault(names.get(file, "main"), {})[name] = tensor
    settings = {"adapter": golden.section("adapter_config"), "vision": {"model_type": "clip_vision_model"}}
    return {role: Source(Path(role), tensors, settings.get(role, {})) for role, tensors in files.items()}


def converted(golden: Golden) -> HfvlmLLaVAForConditionalGeneration:
    sources = sources_of(golden)
    main = sources["main"].tensors
    holder = main if "model.embed_tokens.weight" in main else sources["base"].tensors
    config = config_from_original(golden.case, holder)
    files = {key.rpartition("|")[0] for key in golden.state_dict}
    layout = next((layout for file, layout in LAYOUTS.items() if file in files), layout_of(golden.case))
    empty = empty_model(config)
    parts = convert_tables(tables_for(config, layout, sources), empty.state_dict())
    tensors = {key: t.contiguous().clone() for part in parts for key, t in part.items()}
    model, info = type(empty).from_pretrained(None, config=config, state_dict=tensors, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def model_outputs(golden: Golden) -> None:
    model = converted(golden)
    paths = {
        "vision_embeddings": "vision_model.pre_norm:input",
        "vision_pre_layrnorm": "vision_model.pre_norm",
        "vision_layer0": "vision_model.layers.0",
        "vision_selected": "projector:input",
        "projected": "projector",
        "lm_layer0": "language_model.model.layers.0",
        "lm_norm": "language_model.model.norm",
    }
    modules = sorted({path.removesuffix(":input") for path in paths.values()})
    with torch.no_grad(), Recorder(model, modules) as seen:
        features = features_of(golden, model)
        rows = rows_of(golden, model, features)
        prepared = batch_of(golden, rows)
        mask = prepared["attention_mask"]
        output = model(**prepared)
        embeds = model.embed(prepared["input_ids"], prepared["mm_encoder_outputs"]) * mask.unsqueeze(-1)
        values = {name: seen[path] for name, path in paths.items()}
    loss = None if output.loss is None else output.loss.reshape(1)
    values |= {"logits": output.logits, "loss": loss, "inputs_embeds": embeds}
    values |= {"attention_mask": mask, "labels": prepared["labels"]}
    values["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0) * mask
    stored, places = golden.section("stored_rows"), {"logits", "lm_layer0", "lm_norm"}
    for name in golden.in_order():
        if name in values:
            count = stored.get(name, len(values[name]))
            golden.compare(name, values[name][:count], mask[:count].bool().unsqueeze(-1) if name in places else None)
        elif name.startswith("greedy"):
            chosen = rows if name == "greedy_batch" else [rows[int(name.removeprefix("greedy_"))]]
            golden.compare(name, greedy(golden, model, chosen, golden.outputs[name].shape))
        else:
            layer = name.removeprefix("merged.")
            golden.compare(name, model.language_model.model.get_submodule(layer).weight)


def features_of(golden: Golden, model: HfvlmLLaVAForConditionalGeneration) -> list[Tensor]:
    inputs = golden.inputs
    names = sorted((name for name in inputs if name.startswith("images_")), key=lambda name: int(name[7:]))
    sizes = inputs["image_sizes"].flip(1) if "image_sizes" in inputs else None  # the original's are (width, height)
    if not names:
        images = inputs["images"]
        return model.get_image_features(images, image_sizes=sizes if images.ndim == 5 else None).pooler_output
    return model.get_image_features([inputs[name] for name in names], image_sizes=sizes).pooler_output


def rows_of(golden: Golden, model: HfvlmLLaVAForConditionalGeneration, features: list[Tensor]) -> list[tuple]:
    """Each sample's ids, labels and features as the original makes them: what is masked is dropped, every image has
    its tokens' places, and what is too long is cut. A text alone consumes an image that it does not show."""
    inputs, token = golden.inputs, model.config.image_token_id
    longest = golden.section("config").get("tokenizer_model_max_length")
    remaining, rows = iter(features), []
    every = inputs.get("labels", torch.full_like(inputs["input_ids"], IGNORE))
    for ids, mask, labels in zip(inputs["input_ids"], golden.mask().bool(), every, strict=True):
        pairs = list(zip(ids[mask].tolist(), labels[mask].tolist(), strict=True))
        shown = sum(i == PICTURE for i, _ in pairs)
        own = [next(remaining) for _ in range(max(1, shown))][:shown]
        parts, row = iter(own), []
        for i, label in pairs:
            row += [(token, IGNORE)] * len(next(parts)) if i == PICTURE else [(i, label)]
        row = row[:longest]
        places = sum(i == token for i, _ in row)
        rows.append(([i for i, _ in row], [label for _, label in row], torch.cat(own)[:places] if own else None))
    return rows


def batch_of(golden: Golden, rows: list[tuple]) -> dict:
    """Rows padded on the original's side."""
    length = max(len(ids) for ids, _, _ in rows)
    left = golden.section("config").get("tokenizer_padding_side", "right") == "left"

    def pad(row: list[int], value: int) -> list[int]:
        rest = [value] * (length - len(row))
        return rest + row if left else row + rest

    features = [own for _, _, own in rows if own is not None]
    return {
        "input_ids": torch.tensor([pad(ids, 0) for ids, _, _ in rows]),
        "labels": torch.tensor([pad(labels, IGNORE) for _, labels, _ in rows]),
        "attention_mask": torch.tensor([pad([1] * len(ids), 0) for ids, _, _ in rows]),
        "mm_encoder_outputs": {"image": Features(pooler_output=features)} if features else None,
    }


def greedy(golden: Golden, model: HfvlmLLaVAForConditionalGeneration, rows: list[tuple], shape: torch.Size) -> Tensor:
    """The original's ids start with a start token that its version of transformers makes up before the new ones."""
    inputs = batch_of(golden, rows)
    del inputs["labels"]
    made_up = torch.full((len(rows), 1), model.config.text_config.bos_token_id)
    new = model.generate(**inputs, max_new_tokens=shape[-1] - 1, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    return torch.cat([made_up, new], dim=1).reshape(shape)
