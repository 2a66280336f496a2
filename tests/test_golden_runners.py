"""The runners of goldens read what a case says, leave out what it has not, and refuse what they do not know."""

import copy
import importlib
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hfvlm.checkpoints.originals import UnsupportedOriginalError
from tests.support.golden import (
    OURS,
    SECTIONS,
    Golden,
    UnknownOptionError,
    parts_of,
    present,
    read_key_list,
    unwrapped,
)

CASES = sorted(str(path.parent.relative_to(OURS)) for path in OURS.rglob("case.json"))


def mutated(name: str, change: Callable[[dict[str, Any]], Any]) -> Golden:
    """A case of ours after a change."""
    golden = Golden(OURS / name)
    case = copy.deepcopy(golden.case)
    change(case)
    golden.__dict__["case"] = present(case)
    return golden


def run(golden: Golden) -> None:
    importlib.import_module(f"tests.originals.{golden.architecture}").compare(golden)


def put(section: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    """Set an entry by its dotted path."""
    *path, last = section.split(".")

    def change(case: dict[str, Any]) -> None:
        for step in path:
            case = case.setdefault(step, {})
        case[last] = value

    return change


def drop(section: str) -> Callable[[dict[str, Any]], Any]:
    *path, last = section.split(".")

    def change(case: dict[str, Any]) -> None:
        for step in path:
            case = case[step]
        del case[last]

    return change


def sections_of(name: str) -> list[str]:
    case = Golden(OURS / name).case
    own = [section for section in SECTIONS if isinstance(case.get(section), dict)]
    return sorted({*own, "arguments"})


@pytest.mark.parametrize(
    ("name", "section"), [pytest.param(n, s, id=f"{n}:{s}") for n in CASES for s in sections_of(n)]
)
def test_an_unknown_option_is_refused_by_its_name(name, section):
    with pytest.raises((UnknownOptionError, UnsupportedOriginalError), match="made_up"):
        run(mutated(name, put(f"{section}.made_up", 1)))


NESTED = {
    "align/b3-image-projection": ("arguments.efficientnet", "arguments.bert_config"),
    "blip/features-base": ("arguments.med_config", "arguments.create_vit_override"),
    "blip2/opt-eva": ("arguments.bert_config", "arguments.vision_override", "arguments.opt_config"),
    "clip/vit-patch8": ("constructor",),
    "clip/processor-image-openclip": ("settings.shortest_224", "settings.shortest_224.cfg"),
    "coca/b32-like": ("constructor.vision_cfg", "constructor.text_cfg", "constructor.multimodal_cfg"),
    "filip/vit-patch8": ("constructor.image_encode", "constructor.text_encode", "constructor.clip"),
    "flamingo/mpt7b-like-every2": ("lang_encoder", "lang_encoder.config", "vision_encoder"),
    "flava/pretraining": ("arguments.loss",),
    "languagebind/image": ("config.text_config", "config.vision_config"),
    "llava/lora-release": ("adapter_config", "vision_config"),
    "losses/clip-ws2": ("runs.local0_gather0.kwargs",),
    "mammut/l14-like": ("constructor.vision_cfg", "constructor.text_cfg"),
    "qwen_vl/one-image-loss": ("config.visual",),
    "shikra/im-start-end": ("vision_flags", "vision_config"),
    "siglip/bigvision-siglip2-scan": ("constructor.image", "constructor.text"),
    "siglip/openclip-siglip1-gelu-erf": ("constructor.vision_cfg", "constructor.text_cfg"),
    "siglip/processor-image": ("settings.siglip_224.cfg",),
    "video_chatgpt/batch-loss": ("config.llama",),
}


@pytest.mark.parametrize(
    ("name", "section"), [pytest.param(n, s, id=f"{n}:{s}") for n, paths in NESTED.items() for s in paths]
)
def test_an_unknown_option_of_a_part_is_refused_by_its_name(name, section):
    with pytest.raises((UnknownOptionError, UnsupportedOriginalError), match="made_up"):
        run(mutated(name, put(f"{section}.made_up", 1)))


FREE = [
    *(("video_chatgpt/processor-frames", section) for section in ("get_seq_frames", "files")),
    ("pg_video_llava/processor-frames", "get_seq_frames"),
    ("video_chatgpt/e2e", "prompt"),
    ("shikra/processor-prompts", "formatting"),
    *(("shikra/processor-prompts", f"formatting.{name}") for name in ("extract", "format_box", "norm")),
    ("qwen_vl/processor-tokenizer", "lists"),
    ("qwen_vl/processor-train-labels", "arguments"),
    ("qwen_vl/processor-images-448", "arguments"),
    ("pg_video_llava/grounding-and-transcript", "unique_tags"),
    ("llava/processor-tokenizer", "prompts"),
    ("blip/features-base", "texts"),
]


@pytest.mark.parametrize("absent", [False, True], ids=["null", "absent"])
@pytest.mark.parametrize(("name", "section"), FREE)
def test_a_section_that_is_not_there_is_left_out(name, section, absent):
    golden = mutated(name, drop(section) if absent else put(section, None))
    if section == "prompts":
        for results in golden.case["results"].values():
            results.pop("tokenizer_image_token", None)
    if section == "files":
        golden.__dict__["outputs"] = {}
    run(golden)
    assert golden.compared == set(golden.outputs)


ACTED_ON = [
    ("qwen_vl/processor-images-448", "arguments.image_size", 224),
    ("qwen_vl/processor-train-labels", "arguments.max_len", 20),
    ("qwen_vl/processor-train-labels", "arguments.system_message", "Be brief."),
    ("shikra/processor-images-224", "arguments.image_size", 336),
    ("flamingo/processor-images-224", "arguments.image_size", 112),
    ("blip2/opt-eva", "arguments.max_txt_len", 4),
    ("blip2/opt-eva", "arguments.prompt", "a dog"),
    ("blip2/opt-eva", "predict_answers", {"prompt": "Question: {} Short answer:", "num_beams": 1, "max_len": 3}),
    ("blip/caption-base", "arguments.image_size", 64),
    ("align/processor-image", "arguments", {"resize_size": 300}),
    ("llava/processor-images-336", "image_processor.crop_size", 224),
    ("video_chatgpt/processor-frames", "arguments", {"image_size": 112}),
    ("siglip/processor-tokenizer-tiny", "arguments", {"context_length": 8}),
]


@pytest.mark.parametrize(("name", "option", "value"), ACTED_ON)
def test_an_option_is_acted_on(name, option, value):
    with pytest.raises((AssertionError, ValueError)):
        run(mutated(name, put(option, value)))


def test_a_missing_attention_mask_means_all_ones():
    golden = Golden(OURS / "shikra" / "patch-tokens-only")
    assert torch.equal(golden.mask(), golden.inputs["attention_mask"])
    del golden.inputs["attention_mask"]
    assert torch.equal(golden.mask(), torch.ones_like(golden.inputs["input_ids"]))


@pytest.mark.parametrize("name", ["qwen_vl/one-image-loss", "languagebind/image", "blip/features-base"])
def test_runs_without_an_attention_mask(name):
    golden = Golden(OURS / name)
    masks = [key for key in golden.inputs if key.endswith("attention_mask")]
    whole = all(golden.inputs.pop(key).all() for key in masks)
    golden.compare = lambda name, actual, mask=None: golden.compared.add(name)
    run(golden)
    assert golden.compared
    if whole:
        run(golden)


def test_a_retrieval_file_in_the_matching_class_gives_cosines(monkeypatch):
    golden = mutated("blip/retrieval-base", put("class", "models.blip_itm.BLIP_ITM"))
    seen = {}
    golden.compare = lambda name, actual, mask=None: seen.__setitem__(name, actual)
    golden.__dict__["outputs"] = {}
    run(golden)
    assert seen["itc_sim"].abs().max() <= 1 + 1e-6
    assert seen["itm_output"].shape == (3, 2)


# Key lists


def write_lists(folder, lists: dict[str, list[dict]], notes: dict[str, Any]):
    (folder / "video_chatgpt" / "full").mkdir(parents=True)
    for name, rows in lists.items():
        (folder / "video_chatgpt" / "full" / f"{name}.json").write_text(json.dumps(rows))
    (folder / "video_chatgpt" / "full-notes.json").write_text(json.dumps(notes))
    return folder / "video_chatgpt" / "full"


def rows_of(path) -> list[dict]:
    dtype = {t: str(t).removeprefix("torch.") for t in (torch.float16, torch.float32, torch.bfloat16, torch.int64)}
    return [{"key": k, "shape": list(t.shape), "dtype": dtype[t.dtype]} for k, t in read_key_list(path).items()]


LISTS = {path.name.partition(".json")[0]: path for path in sorted((OURS / "video_chatgpt" / "full").iterdir())}


def test_a_composition_goes_by_the_notes(tmp_path):
    from tests.originals.video_chatgpt import compose, role_of

    notes = json.loads((OURS / "video_chatgpt" / "full-notes.json").read_text())
    names = dict(zip(LISTS, ("zebra", "apple", "llama-that-is-none"), strict=True))
    folder = write_lists(
        tmp_path,
        {names[name]: rows_of(path) for name, path in LISTS.items()},
        {names[name]: notes[name] for name in LISTS},
    )
    for name in names.values():
        parts = parts_of(folder / f"{name}.json", role_of)
        assert {role: path.name.partition(".json")[0] for role, path in parts.items()} == {
            "base": "zebra",
            "vision": "apple",
            "main": "llama-that-is-none",
        }
    _, tables = compose(folder / "apple.json")
    assert len(tables) == 3


@pytest.mark.parametrize("name", LISTS)
def test_a_part_that_a_folder_lacks_is_borrowed(name, tmp_path):
    from tests.originals.video_chatgpt import role_of

    folder = write_lists(tmp_path, {name: rows_of(LISTS[name])}, {})
    parts = parts_of(folder / f"{name}.json", role_of)
    assert set(parts) == {"base", "vision", "main"}
    assert sum(path.is_relative_to(OURS) for path in parts.values()) == 2


@pytest.mark.parametrize("wrapper", ["state_dict/module.", "module.", "state_dict.module.", "model/", "_orig_mod."])
def test_a_trainings_wrappers_are_taken_off(wrapper):
    tensors = read_key_list(OURS / "clip" / "full" / "ViT-B-32.json.gz")
    wrapped = {f"{wrapper}{key}": tensor for key, tensor in tensors.items()} | {"epoch": torch.tensor(3)}
    assert unwrapped(wrapped) == tensors
    assert unwrapped(tensors) == tensors
