import re
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hfvlm.conversion.flava import config_from_original, layout_of
from hfvlm.models.flava import HfvlmFLAVAImageProcessor
from tests.originals.common import converted
from tests.support.golden import Golden

# What FLAVAImageTransform calls the settings of the image processor.
SETTINGS = {
    "encoder_input_size": "size",
    "codebook_input_size": "codebook_size",
    "image_mean": "image_mean",
    "image_std": "image_std",
    "mask_window_size": "input_size_patches",
    "mask_num_patches": "total_mask_patches",
    "mask_max_patches": "mask_group_max_patches",
    "mask_min_patches": "mask_group_min_patches",
}
# Of the transform in training alone.
TRAINING = ("is_train",)


def compare(golden: Golden) -> None:
    name = golden.case.get("class", "").lower()
    if not golden.state_dict:
        golden.check(arguments=(*SETTINGS, *TRAINING))
        return pixels(golden)
    # The constructor's options are checked where they are converted.
    golden.check(arguments=golden.section("arguments"))
    if "pretraining" in name:
        pretraining(golden)
    elif "classification" in name:
        classification(golden)
    else:
        features(golden)
    return None


def pixels(golden: Golden) -> None:
    """All images in one call, for the masks are drawn one after the other."""
    case, stride, arguments = golden.case, golden.case["stride"], golden.section("arguments")
    assert not arguments.get("is_train"), "the training's crops are drawn at random"
    given = {SETTINGS[name]: value for name, value in arguments.items() if name in SETTINGS}
    processor = HfvlmFLAVAImageProcessor(upright=False, return_codebook_pixels=True, return_image_mask=True, **given)
    pictures = [golden.folder / file for file in case["files"].values()]
    made = processor(pictures, mask_seed=0, return_tensors="pt")
    for i, name in enumerate(case["files"]):
        for suffix, key, step in (
            ("", "pixel_values", stride["image"]),
            (".codebook", "codebook_pixel_values", stride["codebook"]),
        ):
            image = made[key][i]
            golden.compare(f"{name}{suffix}", image[:, ::step, ::step])
            exact = image.double().flatten(1)
            golden.compare(f"{name}{suffix}.mean_std", torch.stack([exact.mean(1), exact.std(1, correction=0)]))
        golden.compare(f"{name}.image_patches_mask", made["bool_masked_pos"][i])


def model_of(golden: Golden) -> Any:
    config = config_from_original(golden.case, golden.state_dict)
    return converted("flava", golden.state_dict, config, layout_of(golden.case))


class Calls:
    """Outputs of modules by the original's names, one for each call since the last `clear`."""

    def __init__(self, model: Any):
        self.seen: dict[str, list[Tensor]] = defaultdict(list)
        for name, module in model.named_modules():
            module.register_forward_hook(self.hook(name))

    def hook(self, name: str) -> Any:
        def record(_: Any, args: Any, output: Any) -> None:
            self.seen[name].append(output)
            self.seen[f"{name}:input"].append(args[0] if args else None)

        return record

    def __call__(self, name: str, call: int = 0) -> Tensor:
        tower, _, place = name.partition(".")
        ours = {"image": "vision_model", "text": "text_model", "mm": "multimodal_model"}[
            tower.removesuffix("_encoder")
        ]
        if place == "embeddings":
            return self.seen[f"{ours}.layers.0:input"][call]
        return self.seen[f"{ours}.layers.{re.fullmatch(r'encoder.layer.([0-9]+)', place)[1]}"][call]


@torch.no_grad()
def features(golden: Golden) -> None:
    model, inputs = model_of(golden), golden.inputs
    hidden = inputs.get("image_patches_mask") if model.config.vision_config.mask_token else None
    calls = Calls(model)
    towers = {
        "image": model.vision_model(inputs["image"], output_hidden_states=True),
        "image_masked": model.vision_model(inputs["image"], hidden),
        "text": model.text_model(inputs["text"], output_hidden_states=True),
        "multimodal": model.get_multimodal_features(inputs["text"], inputs["image"], output_hidden_states=True),
    }
    if "text_masked" in inputs:
        masked = inputs["text_masked"]
        towers["text_masked"] = model.text_model(masked)
        towers["multimodal_masked"] = model.get_multimodal_features(masked, inputs["image"], bool_masked_pos=hidden)
    padded = torch.ones_like(inputs["text"])
    padded[:, -2:] = 0
    values = {
        "image_encoder.embeddings (masked)": calls("image_encoder.embeddings", 1),
        "projected_image_embeddings": model.get_image_features(inputs["image"]).pooler_output,
        "projected_text_embeddings": model.get_text_features(inputs["text"]).pooler_output,
        "encode_text(text_mask)": model.get_text_features(inputs["text"], padded).pooler_output,
    }
    if "image_other_size" in inputs:
        calls.seen.clear()
        model.vision_model(inputs["image_other_size"], interpolate_pos_encoding=True)
        values["embeddings_other_size"] = calls("image_encoder.embeddings")
        model.vision_model(inputs["image"])
        model.text_model(inputs["text"])
    for name in golden.in_order():
        tower, _, rest = name.partition(".")
        if name in values:
            golden.compare(name, values[name])
        elif rest == "hidden_states[-1]":
            golden.compare(name, towers[tower].hidden_states[-1])
        elif tower in towers:
            golden.compare(name, towers[tower][rest])
        else:
            golden.compare(name, calls(name, -1))


@torch.no_grad()
def pretraining(golden: Golden) -> None:
    model, inputs = model_of(golden), golden.inputs
    model.codebook_model.groups[0].register_forward_hook(lambda _, __, output: codebook.append(output))
    codebook: list[Tensor] = []
    calls = Calls(model)
    codes = model.codebook_model(inputs["image_for_codebook"])
    seen = calls.seen
    parts = {
        "codebook.indices": codes.codes,
        "codebook.logits": codes.logits[:, :, ::2, ::2],
        "codebook.input": seen["codebook_model.stem"][0][:, :, ::4, ::4],
        "codebook.group_1": codebook[0][:, :, ::2, ::2],
        "codebook.group_4": seen["codebook_model.groups.3"][0],
    }
    image = {
        "pixel_values": inputs["image"],
        "bool_masked_pos": inputs["image_patches_mask"],
        "codebook_pixel_values": inputs["image_for_codebook"],
    }
    masked = {"input_ids_masked": inputs["text_masked"], "mlm_labels": inputs["mlm_labels"]}
    text = {"input_ids": inputs["text"]} | masked
    towers = model.vision_model(inputs["image"]), model.text_model(inputs["text"])
    calls.seen.clear()
    if not golden.case["arguments"].get("skip_unmasked_mm_encoder", True):
        model.multimodal_model(*(tower.before_norm for tower in towers))
    outputs = {"mm": model(**image, **text, itm_labels=inputs["itm_labels"])}
    first = {name: list(values) for name, values in calls.seen.items()}
    outputs |= {"mm_no_itm_labels": model(**image, **text), "image_only": model(**image), "text_only": model(**masked)}
    calls.seen = first
    parts["encode_image"] = model.get_image_features(inputs["image"]).pooler_output
    parts["encode_text"] = model.get_text_features(inputs["text"]).pooler_output
    parts["logit_scale (after)"] = model.logit_scale.scale.reshape(())
    for name in golden.in_order():
        call, _, rest = name.partition(".")
        if name in parts:
            golden.compare(name, parts[name])
        elif "#" in rest:
            place, _, number = rest.partition("#")
            golden.compare(name, calls(place, int(number)))
        else:
            golden.compare(name, stored(outputs[call], rest))


def stored(output: Any, name: str) -> Tensor:
    """What the original calls a field of its output."""
    matched = output.get("matched_mask")
    rows = slice(None) if matched is None else matched
    if name.startswith("contrastive."):
        logits = {"image": output.logits_per_image, "text": output.logits_per_text}
        kind, _, what = name.removeprefix("contrastive.").partition("_")
        if what == "embedding":
            return output[f"{kind}_embeds"]
        if what == "logits":
            return logits[kind][rows]
        return F.cross_entropy(logits[kind][rows], torch.arange(len(logits[kind]))[rows])
    return output[name.replace("global_", "").replace("_output.logits", "_logits")]


@torch.no_grad()
def classification(golden: Golden) -> None:
    model, inputs = model_of(golden), golden.inputs
    given = {
        "mm": {"pixel_values": inputs["image"], "input_ids": inputs["text"]},
        "image": {"pixel_values": inputs["image"]},
        "text": {"input_ids": inputs["text"]},
    }
    for name, batch in given.items():
        output = model(**batch, labels=inputs["labels"])
        golden.compare(f"{name}.logits", output.logits)
        golden.compare(f"{name}.loss", output.loss)
