import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hfvlm.checkpoints.conversion import Source
from hfvlm.checkpoints.key_table import Table
from hfvlm.conversion.languagebind import config_from_original, layout_of, merged, settings_from_original, tables_for
from hfvlm.media import read_audio, read_video
from hfvlm.models.languagebind import (
    HfvlmLanguageBindAudioConfig,
    HfvlmLanguageBindAudioModel,
    HfvlmLanguageBindConfig,
    HfvlmLanguageBindDepthFeatureExtractor,
    HfvlmLanguageBindFeatureExtractor,
    HfvlmLanguageBindImageProcessor,
    HfvlmLanguageBindModel,
    HfvlmLanguageBindTokenizer,
    HfvlmLanguageBindVideoFeatureExtractor,
)
from hfvlm.modules.dropout import PatchDropout
from hfvlm.presets import Preset
from tests.originals.common import converted, fitting, vocabulary
from tests.support.golden import Golden, Recorder, notes_of, read_key_list, stem_of

ARGUMENTS = {
    "image": "pixel_values",
    "video": "pixel_values_videos",
    "audio": "input_features",
    "depth": "depth_values",
    "thermal": "thermal_values",
}


DROPOUT = ("B", "T", "prob", "torch_seed", "kept_patch_indices_in_order")
TOWER = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "layer_norm_eps"),
    # Of the whole model's alone a value is read, and these are of training.
    *("projection_dim", "attention_dropout", "initializer_range", "initializer_factor"),
)
MEL = ("num_mel_bins", "target_length", "audio_sample_rate", "audio_mean", "audio_std")
VISION = (
    *("image_size", "patch_size", "num_channels", "add_time_attn", "num_frames", "force_patch_dropout", "max_depth"),
    *("lora_r", "lora_alpha", "lora_dropout", "clip_type", "tube_size", *TOWER, *MEL),
)
MODEL = {
    "config": ("text_config", "vision_config", "projection_dim", "logit_scale_init_value"),
    "config__text_config": ("vocab_size", "max_position_embeddings", *TOWER),
    "config__vision_config": VISION,
    "constructor": (),
}


def compare(golden: Golden) -> None:
    case = golden.case
    if golden.state_dict:
        golden.check(**MODEL)
        model_outputs(golden)
    elif "files" in case:
        options = {"audio": MEL, "video": ("num_frames",), "depth": ("max_depth",)}
        golden.check(config=options.get(case["modality"], ()))
        for name in case["files"]:
            MEDIA[case["modality"]](golden, name)
    elif "texts" in case:
        tokens(golden)
    elif "cases" in case:
        dropped_patches(golden)
    else:
        positions(golden)


def dropped_patches(golden: Golden) -> None:
    golden.check(**{f"cases__{name}": DROPOUT for name in golden.case["cases"]})
    for name, facts in golden.case["cases"].items():
        torch.manual_seed(facts["torch_seed"])
        golden.compare(name, PatchDropout(facts["prob"], prefix=1).train()(golden.inputs[name], facts["T"]))


def positions(golden: Golden) -> None:
    golden.check()
    (table,) = golden.inputs.values()
    for name in golden.outputs:
        size = [int(edge) for edge in re.fullmatch(r".*_(\d+)x(\d+)", name).groups()]
        sizes = {"hidden_size": table.shape[1], "num_attention_heads": 1, "num_hidden_layers": 1}
        model = HfvlmLanguageBindAudioModel(HfvlmLanguageBindAudioConfig(**sizes, image_size=size))
        model.take_positions(table)
        golden.compare(name, model.position)


def tokens(golden: Golden) -> None:
    golden.check()
    case = golden.case
    path = vocabulary(golden.folder, "bpe_simple_vocab_16e6.txt.gz")
    tokenizer = HfvlmLanguageBindTokenizer.from_vocabulary(path, model_max_length=case.get("context_length", 77))
    known = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "padding_id": tokenizer.pad_token_id}
    assert {name: case.get(name, value) for name, value in known.items()} == known
    for text, ids in zip(case["texts"], case["ids"], strict=True):
        assert tokenizer(text)["input_ids"] == ids, text
    whole = tokenizer(case["texts"], padding="max_length", return_tensors="pt")
    for row, mask, ids in zip(whole["input_ids"], whole["attention_mask"], case["ids"], strict=True):
        assert row[mask == 1].tolist() == ids
        assert set(row[mask == 0].tolist()) <= {tokenizer.pad_token_id}


def pixels(golden: Golden, name: str, antialias: bool) -> Tensor | None:
    return HfvlmLanguageBindImageProcessor(antialias=antialias, upright=False)(
        golden.folder / name, return_tensors="pt"
    )["pixel_values"]


def metres(golden: Golden, name: str, antialias: bool) -> Tensor:
    settings = settings_from_original(original(golden), {}).get("depth_feature_extractor", {})
    extractor = HfvlmLanguageBindDepthFeatureExtractor(antialias=antialias, **settings)
    with Image.open(golden.folder / name) as image:
        # The original takes 8 bits for millimetres, too.
        source = np.array(image, np.uint16) if image.mode == "L" else golden.folder / name
    return extractor(source, return_tensors="pt")["depth_values"]


def original(golden: Golden) -> dict:
    return {"modality": golden.case["modality"], "config": {"vision_config": golden.section("config")}}


def image_input(golden: Golden, name: str) -> None:
    """Images, depth maps and thermal images, which to the original are images."""
    facts, read = golden.case["files"][name], metres if golden.case["modality"] == "depth" else pixels
    if "raises" in facts:
        return
    for prefix, antialias in ((name, False), (f"{name}.antialias", True)):
        values = read(golden, name, antialias)
        assert list(values.shape) == facts["shape"]
        golden.compare(f"{prefix}.pixel_values_stride97", values.flatten()[::97])
        golden.compare(f"{prefix}.mean_std", mean_and_std(values[0].flatten(1)))


def video_input(golden: Golden, name: str) -> None:
    path, facts, frames = golden.folder / name, golden.case["files"][name], golden.inputs[f"{name}.frames"]
    stored = read_video(path)
    assert (len(stored), stored.fps) == (facts["frames"], facts["fps"])
    assert torch.equal(torch.from_numpy(stored.frames(range(len(stored)))), frames)
    extractor = HfvlmLanguageBindVideoFeatureExtractor(**golden.section("config"))
    for source in (path, path.read_bytes(), (frames, facts["fps"]), list(frames.numpy())):
        values = extractor([source], return_tensors="pt")["pixel_values_videos"]
        assert list(values.shape) == facts["decord"]
        golden.compare(f"{name}.decord.stride997", values.flatten()[::997])
        golden.compare(f"{name}.decord.mean_std_per_frame", mean_and_std(values[0].transpose(0, 1).flatten(1)))
        golden.compare(f"{name}.decord.corner", values[0, :, :, :6, :6])


def audio_input(golden: Golden, name: str) -> None:
    path, facts, config = golden.folder / name, golden.case["files"][name], golden.section("config")
    names = {"num_mel_bins": "num_mel_bins", "target_length": "num_frames"}
    sizes = {ours: config[theirs] for theirs, ours in names.items() if theirs in config}
    extractor = HfvlmLanguageBindFeatureExtractor(
        **sizes, **settings_from_original(original(golden), {}).get("feature_extractor", {})
    )
    settings = {key: getattr(extractor, key) for key in extractor.SETTINGS}
    mel = extractor.spectrogram(read_audio(path), settings)
    assert mel.shape[1] == facts["mel_frames"]
    golden.compare(f"{name}.mel_stride101", mel.t().flatten()[::101])
    if drawn := facts.get("chunk_starts"):
        ours = extractor.starts(mel.shape[1], extractor.num_frames)
        assert all(start <= theirs for start, theirs in zip(ours, drawn, strict=True))
        extractor.starts = lambda *_: drawn
    for source in (path, path.read_bytes()):
        values = extractor([source], return_tensors="pt")["input_features"]
        assert list(values.shape) == facts["shape"]
        golden.compare(f"{name}.pixel_values_stride397", values.flatten()[::397])
        golden.compare(f"{name}.mean_std_per_chunk", mean_and_std(values[0].flatten(1)))
        golden.compare(f"{name}.corner", values[0, :, ::9, ::37])


MEDIA = {
    "image": image_input,
    "depth": image_input,
    "thermal": image_input,
    "video": video_input,
    "audio": audio_input,
}


def mean_and_std(rows: Tensor) -> Tensor:
    return torch.stack([rows.mean(dim=1), rows.std(dim=1, correction=0)])


def released(golden: Golden) -> Source:
    """The case's weights as a release has them: beside its config.json."""
    return Source(golden.folder / "pytorch_model.bin", golden.state_dict, golden.case["config"])


def model_outputs(golden: Golden) -> None:
    modality = layout_of(golden.case)
    config = config_from_original(golden.case, golden.state_dict)
    model = converted("languagebind", merged(released(golden)), config, modality)
    assert model.modalities == tuple(name for name in config.towers if name in (modality, "text"))
    tower, inputs = model.towers[modality], {ARGUMENTS[modality]: golden.inputs["pixel_values"]}
    text = {"input_ids": golden.inputs["input_ids"], "attention_mask": golden.mask()}
    paths = {name: path for name in golden.in_order() if (path := module_path(name, tower))}
    with torch.no_grad(), Recorder(model, sorted({path.removesuffix(":input") for path in paths.values()})) as seen:
        seen_image, seen_text = model.tower(modality)(**inputs), model.text_model(**text)
    values = {name: seen[path] for name, path in paths.items()}
    values |= outputs_of(model, modality, inputs, text)
    values |= {
        "image_embeds_unnormalised": seen_image.embeds,
        "text_embeds_unnormalised": seen_text.embeds,
        "text.last_hidden_state": seen_text.last_hidden_state,
        "text.pooled": seen_text.pooler_output,
        # The original has a row a frame.
        "vision.last_hidden_state": seen_image.last_hidden_state.flatten(0, -3),
        "vision.pooled": seen_image.pooler_output,
    }
    for name in golden.in_order():
        golden.compare(name, values[name].reshape(golden.outputs[name].shape) if name == "loss" else values[name])


def outputs_of(
    model: HfvlmLanguageBindModel, modality: str, inputs: dict[str, Tensor], text: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Of the whole model, and of the original's wrapper around several."""
    with torch.no_grad():
        output = model(**inputs, **text, return_loss=len(*inputs.values()) == len(text["input_ids"]))
        return {
            "text_embeds": output.text_embeds,
            "image_embeds": output[f"{modality}_embeds"],
            "logits_per_image": output[f"logits_per_{modality}"],
            "logits_per_text": output.logits("text", modality),
            "loss": output.loss,
            "nomask.text_embeds": model(input_ids=text["input_ids"]).text_embeds,
            f"wrapper.{modality}": getattr(model, f"get_{modality}_features")(**inputs).pooler_output,
            "wrapper.language": model.get_text_features(**text).pooler_output,
        }


def module_path(name: str, tower: str) -> str | None:
    """Where an intermediate of the original is in ours."""
    kind, _, place = name.partition(".")
    own = {"vision": tower, "text": "text_model"}.get(kind, "")
    if layer := re.fullmatch(r"layer(\d+)(\.temporal_attn)?", place):
        return f"{own}.layers.{layer[1]}" + (".temporal_attention" if layer[2] else "")
    places = {
        "vision.embeddings": f"{own}.pre_norm:input",
        "vision.pre_layrnorm": f"{own}.pre_norm",
        "text.embeddings": f"{own}.embeddings",
    }
    return places.get(name)


def compose(path: Path) -> tuple[HfvlmLanguageBindConfig, list[Table]]:
    """A released file as its preset and its own configuration, which agree, read it."""
    return fitting("languagebind", stem_of(path), lambda preset: composed(path, preset))


def composed(path: Path, preset: Preset) -> tuple[HfvlmLanguageBindConfig, list[Table]]:
    config, modality = preset.make_config(), preset.source["layout"]
    notes, tensors = notes_of(path), read_key_list(path)
    own = config_from_original({"modality": modality, "config": notes["config"]}, tensors)
    assert own.to_dict() == config.to_dict()
    return config, tables_for(config, modality, {"main": Source(path, tensors, notes["config"])})
