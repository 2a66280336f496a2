import re

import torch

from hfvlm.conversion.wukong import (
    CONVERSION,
    OPTIONS,
    SWIN_OPTIONS,
    TEXT_OPTIONS,
    VISION_OPTIONS,
    config_from_original,
)
from hfvlm.models.wukong import HfvlmWukongTokenizer
from tests.originals.common import converted
from tests.support.golden import Golden, Recorder

CONSTRUCTOR = {
    "constructor": OPTIONS,
    "constructor__visual": {*VISION_OPTIONS, *SWIN_OPTIONS},
    "constructor__visual__token_reduction": ("num_tokens",),
    "constructor__text": TEXT_OPTIONS,
}


def compare(golden: Golden) -> None:
    if golden.state_dict:
        golden.check(**CONSTRUCTOR)
        model_outputs(golden)
    else:
        tokens(golden)


def tokens(golden: Golden) -> None:
    golden.check()
    facts = golden.section("facts")
    tokenizer = HfvlmWukongTokenizer.from_vocabulary(
        golden.folder / "vocab.txt", model_max_length=facts.get("context_length", 32)
    )
    known = {"vocab_size": len(tokenizer), "start": tokenizer.cls_token_id, "end": tokenizer.sep_token_id}
    known |= {"pad": tokenizer.pad_token_id, "unknown": tokenizer.unk_token_id}
    assert {name: facts.get(name, value) for name, value in known.items()} == known
    for row in golden.case["texts"]:
        assert tokenizer(row["text"])["input_ids"] == row["ids"], row["text"]
        if "pieces" in row:
            assert tokenizer.tokenize(row["text"]) == row["pieces"], row["text"]


def model_outputs(golden: Golden) -> None:
    config = config_from_original(golden.case, golden.state_dict)
    model = converted("wukong", golden.state_dict, config, CONVERSION.layout_of(golden.case))
    paths = {name: path for name in golden.in_order() if (path := module_path(name, model))}
    image, text = golden.inputs["image"], golden.inputs["text"]
    with torch.no_grad(), Recorder(model, sorted(set(paths.values()))) as seen:
        vision, words = model.vision_model(image), model.text_model(text)
        output = model(text, image)
        values = {name: seen[path] for name, path in paths.items()}
        values |= {"image_features": vision.embeds, "text_features": words.embeds}
        if hasattr(model, "score"):
            values["image_features"] = image_tokens(model, vision)
    scale = model.logit_scale.exp()
    values |= {
        "image_features_processed": output.image_embeds,
        "text_features_processed": output.text_embeds,
        "logits_per_image": output.logits_per_image / scale,
        "logits_per_text": output.logits_per_text / scale,
    }
    for name in golden.in_order():
        golden.compare(name, values[name])


def image_tokens(model, vision):
    """What the original returns of an image: of a vision transformer a class token, which nothing is compared with,
    before the others."""
    tokens = model.token_reduction(vision.embeds)
    if hasattr(model.vision_model, "trunk"):
        return tokens
    return torch.cat([model.vision_model.projection(vision.pooler_output).unsqueeze(1), tokens], dim=1)


def module_path(name: str, model) -> str | None:
    """Where an intermediate of the original is in ours."""
    if stage := re.fullmatch(r"vision\.layer(\d+)", name):
        return f"vision_model.trunk.encoder.layers.{stage[1]}"
    if hasattr(model.vision_model, "trunk"):
        fixed = {"vision.norm": "vision_model.trunk.layernorm"}
    else:
        fixed = {
            "vision.ln_pre": "vision_model.pre_norm",
            "vision.last_block": f"vision_model.layers.{len(model.vision_model.layers) - 1}",
            "vision.ln_post": "vision_model.post_norm",
        }
    return (fixed | {"text.ln_final": "text_model.post_norm", "vision.reduced": "token_reduction"}).get(name)
