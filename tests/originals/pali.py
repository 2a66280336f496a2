"""PaLI, which has no original, as its paper describes it; a folder of cases may have PaliGemma's with it."""

from typing import Any

import torch
from torch.nn import functional as F
from transformers import T5Config

from hfvlm.conversion.pali import VIT_OPTIONS, config_from_original
from tests.originals import paligemma
from tests.originals.common import converted
from tests.originals.paligemma import placed
from tests.support.golden import Golden

compose = paligemma.compose
# transformers' versions differ in what every configuration has.
T5_OPTIONS = (*T5Config().to_dict(), "decoder_start_token_id")


def compare(golden: Golden) -> None:
    options = golden.section("arguments")
    if "mt5" not in options:
        paligemma.compare(golden)
        return
    golden.check(
        arguments=("vit", "projection", "new_tokens", "mt5"), arguments__vit=VIT_OPTIONS, arguments__mt5=T5_OPTIONS
    )
    composed(golden, options)


def composed(golden: Golden, options: dict[str, Any]) -> None:
    tensors = golden.state_dict
    config = config_from_original(golden.case, tensors)
    assert bool(config.projector_depth) == options["projection"]
    assert config.vision_config.image_size == options["vit"]["image_size"]
    model = converted("pali", tensors, config, "parts")
    count = config.count_tokens()
    text = {"input_ids": placed(model, golden.inputs["input_ids"], count)}
    text["attention_mask"] = F.pad(golden.mask(), (count, 0), value=1)
    pixel_values = golden.inputs["pixel_values"]
    with torch.no_grad():
        output = model(**text, pixel_values=pixel_values, labels=golden.inputs["labels"])
    ids = model.generate(
        **text, pixel_values=pixel_values, max_new_tokens=options["new_tokens"], do_sample=False, eos_token_id=None
    )
    values = {
        "image_tokens": torch.stack(list(output.image_outputs.pooler_output)),
        "encoder_output": output.encoder_last_hidden_state,
        "logits": output.logits,
        "loss": output.loss.reshape(1),
        "greedy": ids[:, 1:],
    }
    for name in golden.in_order():
        golden.compare(name, values[name])
