import re
from pathlib import Path

import torch
from hfvlm.conversion import FILTERS
from hfvlm.conversion.clip import config_from_original, layout_of
from torch import Tensor
from torch.nn import functional as F

from hfvlm.models.clip import (
    HfvlmCLIPConfig,
    HfvlmCLIPImageProcessor,
    HfvlmCLIPModel,
    HfvlmCLIPResNetConfig,
    HfvlmCLIPTokenizer,
)
from tests.golden import Golden, Recorder, compare_pixels
from tests.originals.common import converted, vocabulary


def compare(golden: Golden) -> None:
    case = golden.case
    if "settings" in case:
        list(compare_pixels(golden, pixels))
    elif "texts" in case:
        tokens(golden)
    elif "new" in case:
        positions(golden)
    else:
        model_outputs(golden)


def pixels(setting: dict, path: Path) -> Tensor:
    config = setting.get("cfg", {})
    size = config.get("size") or int(re.search(r"\d+", setting["call"]).group())
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


def tokens(golden: Golden) -> None:
    facts = golden.case["facts"]
    path = vocabulary(golden.folder, "bpe_simple_vocab_16e6.txt.gz")
    tokenizer = HfvlmCLIPTokenizer.from_vocabulary(path, model_max_length=facts["context_length"])
    assert (len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id) == tuple(
        facts[name] for name in ("vocab_size", "start", "end")
    )
    for row in golden.case["texts"]:
        assert tokenizer(row["text"])["input_ids"] == row["ids"], row["text"]


def positions(golden: Golden) -> None:
    old = golden.case["old"]
    for new in golden.case["new"]:
        size = new["image_size"]
        vision = {"image_size": old["image_size"], "patch_size": old["patch_size"]}
        tables = golden.inputs["visual.positional_embedding"], golden.inputs["positional_embedding"]
        width = {"hidden_size": tables[0].shape[1], "num_hidden_layers": 1, "num_attention_heads": 1}
        text = {"max_position_embeddings": old["context_length"], "vocab_size": 4, "eos_token_id": 3}
        text |= {"bos_token_id": 2, "pad_token_id": 3}
        model = HfvlmCLIPModel(HfvlmCLIPConfig(vision_config=width | vision, text_config=width | text))
        model.vision_model.position.data, model.text_model.embeddings.position.data = tables
        model.resize_positions(size, new["context_length"])
        name = f"{size if isinstance(size, int) else 'x'.join(map(str, size))}_ctx{new['context_length']}"
        golden.compare(f"{name}/visual.positional_embedding", model.vision_model.position)
        golden.compare(f"{name}/positional_embedding", model.text_model.embeddings.position)


def model_outputs(golden: Golden) -> None:
    config = config_from_original(golden.case, golden.state_dict)
    model = converted("clip", golden.state_dict, config, layout_of(golden.case))
    resnet = isinstance(config.vision_config, HfvlmCLIPResNetConfig)
    paths = {name: path for name in golden.in_order() if (path := module_path(name, model, resnet))}
    image, text = golden.inputs["image"], golden.inputs["text"]
    pairs = min(len(image), len(text))
    with torch.no_grad(), Recorder(model, sorted(set(paths.values()))) as seen:
        features = {
            "image_features": model.get_image_features(image).pooler_output,
            "text_features": model.text_model(text).embeds,
        }
        values = {name: seen[path] for name, path in paths.items()} | features
        output = model(text, image)
        loss = model(text[:pairs], image[:pairs], return_loss=True).loss
    values |= {f"{name}_normalized": F.normalize(value, dim=-1) for name, value in features.items()}
    values |= {"logits_per_image": output.logits_per_image, "logits_per_text": output.logits_per_text}
    values["contrastive_loss"] = loss
    for name in golden.in_order():
        golden.compare(name, values[name])


def module_path(name: str, model: HfvlmCLIPModel, resnet: bool) -> str | None:
    """Where an intermediate of the original is in ours."""
    tower, _, place = name.partition(".")
    if tower not in ("vision", "text"):
        return None
    if resnet and tower == "vision":
        fixed = {"stem_conv1": "stem.conv1.conv", "stem": "stem"}
        stage = re.fullmatch(r"layer(\d)(?:_block(\d+))?", place)
        path = fixed.get(place) or f"stage{stage[1]}" + (f".{stage[2]}" if stage[2] else "")
        return f"vision_model.{path}"
    last = model.config.get_text_config().num_hidden_layers if tower == "text" else len(model.vision_model.layers)
    fixed = {
        "patch_embeddings": "patches.projection",
        "embeddings": "embeddings",
        "ln_pre": "pre_norm",
        "ln_final": "post_norm",
        "pooled": "post_norm",
        "last_block": f"layers.{last - 1}",
    }
    block = re.fullmatch(r"block(\d+)(_attention)?", place)
    return f"{tower}_model." + (f"layers.{block[1]}{'.attention' if block[2] else ''}" if block else fixed[place])
