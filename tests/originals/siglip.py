import re
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from hfvlm.conversion.processors import FILTERS
from hfvlm.conversion.siglip import config_from_original, layout_of
from hfvlm.models.siglip import HfvlmSigLIPImageProcessor, HfvlmSigLIPModel, HfvlmSigLIPTokenizer
from hfvlm.modules.positions import ALIGNED_CORNERS, resize_grid
from tests.originals.common import converted
from tests.support.golden import Golden, Recorder, compare_pixels

PIXELS = ("size", "mode", "mean", "std", "interpolation", "resize_mode", "fill_color")
# open_clip's constructor; the other sections are checked where they are converted.
OPEN_CLIP = {
    "constructor": ("embed_dim", "init_logit_bias", "init_logit_scale", "vision_cfg", "text_cfg", "custom_text"),
    "constructor__vision_cfg": (
        *("image_size", "timm_model_name", "timm_model_pretrained", "timm_pool", "timm_proj", "timm_model_kwargs"),
    ),
}
IMAGE = (
    *("pool_type", "scan", "patch_size", "width", "depth", "mlp_dim", "num_heads", "nposemb", "posemb", "variant"),
)
TEXT = ("width", "depth", "mlp_dim", "num_heads", "vocab_size", "scan", "variant")
# big_vision's; the shapes of the weights say the sizes.
BIG_VISION = {
    "constructor": ("image_model", "image", "text", "text_model", "out_dim", "bias_init", "temperature_init"),
    "constructor__image": IMAGE,
    "constructor__text": TEXT,
}


def compare(golden: Golden) -> None:
    if not golden.state_dict and "settings" in golden.case:
        names = golden.case["settings"]
        golden.check(**{f"settings__{name}": ("call", "cfg", "of") for name in names})
        golden.check(**{f"settings__{name}__cfg": PIXELS for name in names})
        list(compare_pixels(golden, pixels))
    elif not golden.state_dict:
        golden.check(arguments=("context_length",))
        tokens(golden)
    elif layout_of(golden.case) == "big_vision":
        golden.check(**BIG_VISION)
        big_vision(golden)
    else:
        golden.check(**OPEN_CLIP)
        open_clip(golden)


def pixels(setting: dict, path: Path, shape: list[int] | None) -> Tensor:
    config = setting["cfg"]
    size = config["size"]
    processor = HfvlmSigLIPImageProcessor(
        size=size if isinstance(size, int) else {"height": size[0], "width": size[1]},
        resize_mode=config.get("resize_mode", "squash"),
        resample=FILTERS[config.get("interpolation", "bicubic")],
        fill_color=config.get("fill_color", 0),
        image_mean=config.get("mean", [0.5] * 3),
        image_std=config.get("std", [0.5] * 3),
        upright=False,
    )
    return processor(path, return_tensors="pt")["pixel_values"][0]


def tokens(golden: Golden) -> None:
    model = next(name for name in golden.case["files"] if name.endswith(".model"))
    length = golden.section("arguments").get("context_length", len(golden.case["texts"][0]["ids"]))
    tokenizer = HfvlmSigLIPTokenizer.from_vocabulary(golden.folder / model, model_max_length=length)
    for row in golden.case["texts"]:
        assert tokenizer(row["text"])["input_ids"] == row["ids"], row["text"]
        assert tokenizer.cleaned(row["text"]) == row.get("canonicalized", tokenizer.cleaned(row["text"]))


def open_clip(golden: Golden) -> None:
    model = converted("siglip", golden.state_dict, config_from_original(golden.case, golden.state_dict), "open_clip")
    image, text = golden.inputs["image"], golden.inputs["text"].long()
    paths = {name: path for name in golden.in_order() if (path := open_clip_path(name, model))}
    with torch.no_grad(), Recorder(model, sorted({path.removesuffix(":input") for path in paths.values()})) as seen:
        features = {
            "image_features": model.get_image_features(image).pooler_output,
            "text_features": model.get_text_features(text).pooler_output,
        }
        output = model(text, image)
        values = {name: seen[path] for name, path in paths.items()} | features
        pairs = min(len(image), len(text))
        values["sigmoid_loss"] = model(text[:pairs], image[:pairs], return_loss=True).loss
    values |= {f"{name}_normalized": F.normalize(value, dim=-1) for name, value in features.items()}
    values |= {"logits_per_image": output.logits_per_image, "logits_per_text": output.logits_per_text}
    values["probabilities"] = output.logits_per_image.sigmoid()
    for name in golden.in_order():
        golden.compare(name, values[name])


def open_clip_path(name: str, model: HfvlmSigLIPModel) -> str | None:
    tower, _, place = name.partition(".")
    if tower not in ("vision", "text"):
        return None
    module = model.get_submodule(f"{tower}_model")
    fixed = {
        "patch_embeddings": "patches",
        "embeddings": "layers.0:input",
        "norm": "post_norm",
        "ln_final": "post_norm",
        "pool_attention": "pool.attention",
        "pooled": "pool",
        "last_block": f"layers.{len(module.layers) - 1}",
    }
    block = re.fullmatch(r"block(\d+)", place)
    return f"{tower}_model." + (f"layers.{block[1]}" if block else fixed[place])


def big_vision(golden: Golden) -> None:
    model = converted("siglip", golden.state_dict, config_from_original(golden.case, golden.state_dict), "big_vision")
    image, real = image_inputs(golden)
    text = golden.inputs["text"].long()
    paths = {name: path for name in golden.in_order() if (path := big_vision_path(name))}
    with torch.no_grad(), Recorder(model, sorted({path.removesuffix(":input") for path in paths.values()})) as seen:
        output = model(input_ids=text, **image)
        values = {name: seen[path] for name, path in paths.items()}
        pairs = min(len(text), len(output.image_embeds))
        firsts = {key: value[:pairs] for key, value in image.items()}
        values["loss"] = model(input_ids=text[:pairs], **firsts, return_loss=True).loss
    values |= {
        "zimg": output.image_embeds,
        "ztxt": output.text_embeds,
        "t": model.logit_scale.exp(),
        "b": model.logit_scale.bias,
        "img/norm": output.vision_model_output.pooler_output.norm(dim=-1, keepdim=True),
        "txt/norm": output.text_model_output.pooler_output.norm(dim=-1, keepdim=True),
        "txt/pre_logits": output.text_model_output.last_hidden_state[:, -1],
        "txt/logits": output.text_model_output.pooler_output,
        "logits": output.logits_per_image,
        "probabilities": output.logits_per_image.sigmoid(),
    }
    for name in golden.in_order():
        stored = golden.description(name).get("shape", list(golden.outputs[name].shape))
        if name == "resampled_pos_embedding":
            edge = int(stored[1] ** 0.5)
            table = resize_grid(
                model.vision_model.position, model.config.vision_config.grid, (edge, edge), **ALIGNED_CORNERS
            )
            golden.compare(name, table[None])
            continue
        value = values[name].reshape(stored) if name == "img/stem" else values[name]
        padded = real is not None and (name == "img/encoded" or ("block" in name and name.startswith("img")))
        golden.compare(name, value, real if padded else None)


def image_inputs(golden: Golden) -> tuple[dict[str, Tensor], Tensor | None]:
    """Our inputs, and for NaFlex where the patches are real: the original's values elsewhere mean nothing."""
    if "patches" not in golden.inputs:
        return {"pixel_values": golden.inputs["image"].permute(0, 3, 1, 2)}, None
    mask, y, x = (golden.inputs[name] for name in ("type", "yidx", "xidx"))
    shapes = torch.stack([y.amax(dim=1) + 1, x.amax(dim=1) + 1], dim=1).long()
    image = {"pixel_values": golden.inputs["patches"], "pixel_attention_mask": mask.long(), "spatial_shapes": shapes}
    return image, mask.bool().unsqueeze(-1)


def big_vision_path(name: str) -> str | None:
    tower, _, place = name.partition("/")
    if tower not in ("img", "txt"):
        return None
    fixed = {
        "img/stem": "vision_model.patches",
        "img/with_posemb": "vision_model.layers.0:input",
        "img/encoded": "vision_model.post_norm",
        "img/head_input": "vision_model.pool",
        "img/pre_logits": "vision_model.pool",
        "txt/embedded": "text_model.embeddings.token",
        "txt/transformed": "text_model.post_norm",
    }
    block = re.fullmatch(r"block(\d+)/(sa|\+mlp)", place)
    if block is None:
        return fixed.get(name)
    prefix = "vision_model" if tower == "img" else "text_model"
    return f"{prefix}.layers.{int(block[1])}" + (".attention" if block[2] == "sa" else "")
