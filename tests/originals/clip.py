import re
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from hfvlm.checkpoints.originals import UnsupportedOriginalError
from hfvlm.conversion.clip import config_from_original, layout_of
from hfvlm.conversion.processors import FILTERS
from hfvlm.modeling.timm_trunks import HfvlmTimmTrunkConfig
from hfvlm.models.clip import (
    HfvlmCLIPATokenizer,
    HfvlmCLIPConfig,
    HfvlmCLIPImageProcessor,
    HfvlmCLIPModel,
    HfvlmCLIPResNetConfig,
    HfvlmCLIPTokenizer,
    HfvlmCLIPXLMTokenizer,
)
from hfvlm.processing.cleaning import CLEANINGS
from tests.originals.common import converted, needs_timm, vocabulary
from tests.support.golden import Golden, Recorder, compare_pixels

# OpenAI's constructor, whose values the shapes of the weights say; open_clip's are checked where they are converted.
OPENAI = (
    *("embed_dim", "image_resolution", "vision_layers", "vision_width", "vision_patch_size", "context_length"),
    *("vocab_size", "transformer_width", "transformer_heads", "transformer_layers"),
)
PIXELS = ("size", "mode", "mean", "std", "interpolation", "resize_mode", "fill_color")


def compare(golden: Golden) -> None:
    case = golden.case
    if golden.state_dict:
        open_clip = "vision_cfg" in golden.section("constructor")
        golden.check(constructor=golden.section("constructor") if open_clip else OPENAI)
        model_outputs(golden)
    elif "settings" in case:
        settings = {f"settings__{name}__cfg": PIXELS for name in case["settings"]}
        golden.check(
            **settings, **{f"settings__{name}": ("call", "cfg", "mean", "std", "of") for name in case["settings"]}
        )
        list(compare_pixels(golden, pixels))
    elif "texts" in case:
        tokens(golden)
    else:
        positions(golden)


def pixels(setting: dict, path: Path, shape: list[int] | None) -> Tensor:
    config = setting.get("cfg", {})
    size = config.get("size") or (shape or [224])[-1]
    processor = HfvlmCLIPImageProcessor(
        size=size if isinstance(size, int) else {"height": size[0], "width": size[1]},
        resize_mode=config.get("resize_mode", "shortest"),
        resample=FILTERS[config.get("interpolation", "bicubic")],
        fill_color=config.get("fill_color", 0),
        image_mean=config.get("mean", setting.get("mean")),
        image_std=config.get("std", setting.get("std")),
        upright=False,
    )
    return processor(path, return_tensors="pt")["pixel_values"][0]


OPENAI_FILE = "bpe_simple_vocab_16e6.txt.gz"
TOKENIZERS = {
    OPENAI_FILE: HfvlmCLIPTokenizer,
    "vocab.txt": HfvlmCLIPATokenizer,
    "sentencepiece.bpe.model": HfvlmCLIPXLMTokenizer,
}


def tokens(golden: Golden) -> None:
    golden.check()
    facts, file = golden.section("facts"), next(iter(golden.section("files")), OPENAI_FILE)
    if file not in TOKENIZERS:
        raise UnsupportedOriginalError(f"hfvlm's CLIP has no tokenizer of {file}.")
    path = vocabulary(golden.folder, file)
    tokenizer = TOKENIZERS[file].from_vocabulary(path, model_max_length=facts.get("context_length", 77))
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "cls", "sep", "pad", "unk")}
    known = {"vocab_size": len(tokenizer), "start": ids["bos"], "end": ids["eos"]}
    if "padded_to" in facts:
        known |= {"start": ids["cls"], "end": ids["sep"], "pad": ids["pad"]}
        known |= {"unknown": ids["unk"]} if "unknown" in facts else {}
    assert {name: facts.get(name, value) for name, value in known.items()} == known
    options = {"padding": "max_length"} if "padded_to" in facts else {}
    for row in golden.case["texts"]:
        assert tokenizer(row["text"], **options)["input_ids"] == row["ids"], row["text"]
        clean = CLEANINGS[tokenizer.clean](row["text"])
        assert clean == row.get("cleaned", clean)


def positions(golden: Golden) -> None:
    old = golden.case["old"]
    golden.check()
    for new in golden.case["new"]:
        size, length = new["image_size"], new.get("context_length", old["context_length"])
        vision = {"image_size": old["image_size"], "patch_size": old["patch_size"]}
        tables = golden.inputs["visual.positional_embedding"], golden.inputs["positional_embedding"]
        width = {"hidden_size": tables[0].shape[1], "num_hidden_layers": 1, "num_attention_heads": 1}
        text = {"max_position_embeddings": old["context_length"], "vocab_size": 4, "eos_token_id": 3}
        text |= {"bos_token_id": 2, "pad_token_id": 3}
        model = HfvlmCLIPModel(HfvlmCLIPConfig(vision_config=width | vision, text_config=width | text))
        model.vision_model.position.data, model.text_model.embeddings.position.data = tables
        model.resize_positions(size, length)
        name = f"{size if isinstance(size, int) else 'x'.join(map(str, size))}_ctx{length}"
        golden.compare(f"{name}/visual.positional_embedding", model.vision_model.position)
        golden.compare(f"{name}/positional_embedding", model.text_model.embeddings.position)


def model_outputs(golden: Golden) -> None:
    config = config_from_original(golden.case, golden.state_dict)
    needs_timm(config)
    model = converted("clip", golden.state_dict, config, layout_of(golden.case))
    paths = {name: path for name in golden.in_order() if (path := module_path(name, model) or timm_path(golden, name))}
    image, text = golden.inputs["image"], golden.inputs["text"].long()
    pairs = min(len(image), len(text))
    with torch.no_grad(), Recorder(model, sorted({path.removesuffix(":input") for path in paths.values()})) as seen:
        features = {
            "image_features": model.get_image_features(image).pooler_output,
            "text_features": model.text_model(text).embeds,
        }
        values = {name: tokens_of(seen[path]) for name, path in paths.items()} | features
        values["text.pooled"] = model.text_model(text).pooler_output
        values.setdefault("vision.pooled", model.vision_model(image).pooler_output)
        output = model(text, image)
        loss = model(text[:pairs], image[:pairs], return_loss=True).loss
    values |= {f"{name}_normalized": F.normalize(value, dim=-1) for name, value in features.items()}
    values |= {"logits_per_image": output.logits_per_image, "logits_per_text": output.logits_per_text}
    values |= {"contrastive_loss": loss, "sigmoid_loss": loss}
    for name in golden.in_order():
        golden.compare(name, values[name])


def tokens_of(value) -> Tensor:
    """The tokens in what a module returns."""
    return value["last_hidden_state"] if isinstance(value, dict) else value


# Where intermediates of the originals are in trunks of transformers, by its model_type; `{}` is a layer's number.
TRUNKS = {
    "convnext": {"stem": "embeddings", "stage": "encoder.stages.{}", "pooled": "layernorm"},
    "swin": {"norm": "layernorm"},
    "roberta": {"embeddings": "embeddings", "block": "encoder.layer.{}"},
    "xlm-roberta": {"embeddings": "embeddings", "block": "encoder.layer.{}"},
    "m2m_100": {"embeddings": "layers.0:input", "block": "layers.{}", "last_hidden_state": "layer_norm"},
    "mt5": {"embeddings": "embed_tokens", "block": "block.{}", "last_hidden_state": "final_layer_norm"},
}


def timm_path(golden: Golden, name: str) -> str | None:
    """Where an intermediate of a trunk that timm runs is in ours: under its own name; None for other outputs."""
    path = golden.description(name).get("original_module", "")
    return path.replace("visual.trunk.", "vision_model.trunk.timm_model.") if "visual.trunk." in path else None


def module_path(name: str, model: HfvlmCLIPModel) -> str | None:
    """Where an intermediate of the original is in ours."""
    tower, _, place = name.partition(".")
    if tower not in ("vision", "text") or name == "text.pooled":
        return None
    config = getattr(model.config, f"{tower}_config")
    if isinstance(config, HfvlmTimmTrunkConfig):
        return None
    if hasattr(config, "trunk_config"):
        trunk = config.trunk_config
        return (
            f"{tower}_model.trunk.{in_trunk(place, TRUNKS[trunk.model_type], getattr(trunk, 'num_hidden_layers', 0))}"
        )
    if isinstance(config, HfvlmCLIPResNetConfig):
        fixed = {"stem_conv1": "stem.conv1.conv", "stem": "stem"}
        stage = re.fullmatch(r"layer(\d)(?:_block(\d+))?", place)
        path = fixed.get(place) or f"stage{stage[1]}" + (f".{stage[2]}" if stage[2] else "")
        return f"vision_model.{path}"
    parts = model.get_submodule(f"{tower}_model")
    fixed = {
        "patch_embeddings": "patches.projection",
        "embeddings": "pre_norm" if hasattr(parts, "pre_norm") else "embeddings",
        "ln_pre": "pre_norm",
        "norm_pre": "pre_norm",
        "norm": "post_norm",
        "ln_final": "post_norm",
        "pooled": "pool" if hasattr(parts, "pool") else "post_norm",
        "last_block": f"layers.{len(parts.layers) - 1}",
    }
    block = re.fullmatch(r"block(\d+)(_attention)?", place)
    return f"{tower}_model." + (f"layers.{block[1]}{'.attention' if block[2] else ''}" if block else fixed[place])


def in_trunk(place: str, paths: dict[str, str], depth: int) -> str:
    place = place.replace("last_block", f"block{depth - 1}")
    numbered = re.fullmatch(r"(stage|block)(\d+)", place)
    return paths[numbered[1]].format(numbered[2]) if numbered else paths[place]
