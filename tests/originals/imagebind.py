import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hfvlm.conversion.imagebind import config_from_original, layout_of
from hfvlm.media import read_audio, read_video
from hfvlm.media.recordings import resample
from hfvlm.models.imagebind import (
    HfvlmImageBindFeatureExtractor,
    HfvlmImageBindImageProcessor,
    HfvlmImageBindModel,
    HfvlmImageBindTokenizer,
    HfvlmImageBindVideoFeatureExtractor,
)
from tests.originals.common import converted, vocabulary
from tests.support.golden import Golden, Recorder, UnknownOptionError

# The original's name of a modality: ours, and the argument of the model.
ARGUMENTS = {
    "vision": ("image", "pixel_values"),
    "text": ("text", "input_ids"),
    "audio": ("audio", "input_features"),
    "depth": ("depth", "depth_values"),
    "thermal": ("thermal", "thermal_values"),
    "imu": ("imu", "imu_values"),
}


# Of a loader, and ours.
AUDIO = {
    "target_length": "num_frames",
    "clip_duration": "clip_seconds",
    "clips_per_video": "num_clips",
    "sample_rate": "sampling_rate",
    "num_mel_bins": "num_mel_bins",
    "mean": "mean",
    "std": "std",
}
VIDEO = {"clip_duration": "clip_seconds", "clips_per_video": "num_clips"}


def compare(golden: Golden) -> None:
    case = golden.case
    if golden.state_dict:
        # The constructor's options are checked where they are converted.
        golden.check(config=golden.section("config"), constructor=())
        model_outputs(golden)
    elif "files" in case:
        golden.check()
        for name in case["files"]:
            media(golden, name)
    else:
        tokens(golden)


def tokens(golden: Golden) -> None:
    golden.check()
    case = golden.case
    path = vocabulary(golden.folder, "bpe_simple_vocab_16e6.txt.gz")
    tokenizer = HfvlmImageBindTokenizer.from_vocabulary(path, model_max_length=case.get("context_length", 77))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (case.get("sot", 49406), case.get("eot", 49407))
    for text, ids in zip(case["texts"], case["ids"], strict=True):
        assert tokenizer(text)["input_ids"] == ids, text


def media(golden: Golden, name: str) -> None:
    path = golden.folder / name
    if path.suffix in (".mp4", ".avi", ".mkv", ".webm"):
        video(golden, name, path, given(golden, name, VIDEO))
    elif path.suffix == ".wav":
        audio(golden, name, path, given(golden, name, AUDIO))
    else:
        given(golden, name, {})
        image(golden, name, path)


def given(golden: Golden, name: str, known: dict[str, str]) -> dict[str, Any]:
    """The arguments that a file was loaded with, as settings of ours."""
    facts = golden.case["files"]
    arguments = (facts[name].get("arguments") or {}) if isinstance(facts, dict) else {}
    if unknown := sorted(set(arguments) - set(known)):
        raise UnknownOptionError(f"{golden.folder.name}: {name} has {', '.join(unknown)}")
    return {known[key]: value for key, value in arguments.items() if value is not None}


def image(golden: Golden, name: str, path: Path) -> None:
    pixels = HfvlmImageBindImageProcessor(upright=False)(path, return_tensors="pt")["pixel_values"]
    assert list(pixels.shape) == golden.section("shapes").get(name, list(pixels.shape))
    golden.compare(f"{name}.pixel_values_stride97", pixels.flatten()[::97])
    golden.compare(f"{name}.mean_std", mean_and_std(pixels[0].flatten(1)))


def video(golden: Golden, name: str, path: Path, settings: dict[str, Any]) -> None:
    facts, stored = golden.case["files"][name], read_video(path)
    frames = golden.inputs[f"{name}.frames"]
    assert torch.equal(torch.from_numpy(stored.frames(range(len(stored)))), frames)
    assert (stored.fps, stored.seconds) == (facts["fps"], facts["duration"])
    extractor = HfvlmImageBindVideoFeatureExtractor(**settings)
    places = extractor.places(stored, {key: getattr(extractor, key) for key in extractor.SETTINGS})
    assert places == facts["frames_taken"]
    for source in (path, path.read_bytes(), (frames, facts["fps"]), (list(frames.numpy()), facts["fps"])):
        pixels = extractor([source], return_tensors="pt")["pixel_values_videos"]
        assert list(pixels.shape) == facts["shape"]
        golden.compare(f"{name}.stride997", pixels.flatten()[::997])
        golden.compare(f"{name}.mean_std_per_view", mean_and_std(pixels[0].flatten(1)))
        golden.compare(f"{name}.corner", pixels[0, :, :, :, :6, :6])


def audio(golden: Golden, name: str, path: Path, settings: dict[str, Any]) -> None:
    extractor, facts = HfvlmImageBindFeatureExtractor(**settings), golden.case["files"][name]
    recording = read_audio(path)
    assert recording.sampling_rate == facts["sample_rate"]
    samples = resample(torch.from_numpy(recording.samples), recording.sampling_rate, extractor.sampling_rate)
    assert samples.shape[1] == facts.get("samples_at_16k", samples.shape[1])
    golden.compare(f"{name}.waveform16k_stride53", samples.flatten()[::53])
    for source in (path, path.read_bytes(), (recording.samples, recording.sampling_rate)):
        spectrum = extractor([source], return_tensors="pt")["input_features"]
        assert list(spectrum.shape) == facts["mel_shape"]
        golden.compare(f"{name}.mel_stride61", spectrum.flatten()[::61])
        golden.compare(f"{name}.mel_clip0", spectrum[0, 0, 0, ::3, ::5])
        golden.compare(f"{name}.mean_std_per_clip", mean_and_std(spectrum[0].flatten(1)))


def mean_and_std(rows: Tensor) -> Tensor:
    return torch.stack([rows.mean(dim=1), rows.std(dim=1, correction=0)])


def model_outputs(golden: Golden) -> None:
    config = config_from_original(golden.case, golden.state_dict)
    model = converted("imagebind", golden.state_dict, config, layout_of(golden.case))
    paths = {name: path for name in golden.in_order() if (path := module_path(name, model))}
    values: dict[str, Tensor] = {}
    for original, (modality, argument) in ARGUMENTS.items():
        if original not in golden.inputs:
            continue
        inputs, vision = golden.inputs[original], original == "vision"
        if vision and inputs.ndim > 4:
            modality, argument = "video", "pixel_values_videos"
        options = {"interpolate_pos_encoding": True} if vision else {}
        own = {name: path for name, path in paths.items() if name.startswith(f"{original}.")}
        with torch.no_grad(), Recorder(model, sorted({path.removesuffix(":input") for path in own.values()})) as seen:
            features = getattr(model, f"get_{modality}_features")(**{argument: inputs}, **options).pooler_output
        values |= {name: seen[path] for name, path in own.items()}
        units = torch.nn.functional.normalize(values[f"{original}.head_out"], dim=-1)
        values |= {f"{original}.clip_embeds": units * model.scale(modality), f"{original}.embeds": features}
    for name in golden.in_order():
        if name.startswith("similarity."):
            a, b = name.removeprefix("similarity.").split("_")
            values[name] = values[f"{a}.embeds"] @ values[f"{b}.embeds"].t()
        golden.compare(name, values[name].detach())
    whole(golden, model)


def whole(golden: Golden, model: HfvlmImageBindModel) -> None:
    """The same in one call, as far as the original has it."""
    inputs = {}
    for original, (_, argument) in ARGUMENTS.items():
        if original in golden.inputs:
            value = golden.inputs[original]
            inputs["pixel_values_videos" if original == "vision" and value.ndim > 4 else argument] = value
    size = model.config.vision_config.image_size
    if (
        "vision" in golden.inputs
        and golden.inputs["vision"].shape[-1] // model.config.vision_config.patch_size
        != size // model.config.vision_config.patch_size
    ):
        return
    with torch.no_grad():
        output = model(**inputs)
    ours = {"vision": "video" if "pixel_values_videos" in inputs else "image"}
    for name in golden.in_order():
        if name.startswith("similarity."):
            a, b = (ours.get(part, part) for part in name.removeprefix("similarity.").split("_"))
            golden.compare(name, output.logits(a, b))


def module_path(name: str, model: HfvlmImageBindModel) -> str | None:
    """Where an intermediate of the original is in ours."""
    tower, _, place = name.partition(".")
    if tower not in ARGUMENTS:
        return None
    if block := re.fullmatch(r"block(\d+)", place):
        return f"{tower}_model.layers.{block[1]}"
    first = "pre_norm:input" if tower == "vision" else "layers.0:input"
    last = len(getattr(model, f"{tower}_model").layers) - 1
    places = {"tokens": first, "pre_trunk": "pre_norm", "trunk_out": f"layers.{last}", "head_out": "projection"}
    return f"{tower}_model.{places[place]}" if place in places else None
