import re
from typing import Any

import torch
from torch import Tensor

from hfvlm.conversion.mammut import config_from_original
from hfvlm.models.mammut import HfvlmMaMMUTModel
from hfvlm.modules.context import Context
from tests.originals.common import converted
from tests.support.golden import Golden, Recorder

GENERATE = ("sot", "eos", "pad", "seq_len", "min_seq_len")


@torch.no_grad()
def compare(golden: Golden) -> None:
    # The constructor's options are checked where they are converted.
    golden.check(constructor=golden.section("constructor"), generate=GENERATE)
    config = config_from_original(golden.case, golden.state_dict)
    model: HfvlmMaMMUTModel = converted("mammut", golden.state_dict, config, "open_clip")
    paths = {name: path for name in golden.in_order() if (path := module_path(name, model))}
    image, text, values = golden.inputs["image"], golden.inputs["text"], {}
    for tower in ("vision", "contrastive", "generative"):
        own = {name: path for name, path in paths.items() if name.startswith(tower)}
        with Recorder(model, sorted({path.removesuffix(":input") for path in paths.values()})) as seen:
            if tower == "generative":
                context = model.read(image)
                model.text_model(text[:, :-1], None, context)
            else:
                vision, read = model.vision_model(image), model.text_model(text)
        values |= {name: seen[path] for name, path in own.items()}
        if tower == "contrastive":
            values |= {name: seen[path] for name, path in paths.items() if name.startswith("text.")}
    output = model(text, image, return_loss=True)
    values |= {
        "vision.mean_pooled": vision.last_hidden_state.mean(dim=1),
        "image_features": vision.embeds,
        "image_embs": vision.last_hidden_state,
        "image_embs_projected": context.tokens,
        "text_features": read.embeds,
        "image_features_normalized": output.image_embeds,
        "text_features_normalized": output.text_embeds,
        "logits": output.logits[:, :-1],
        "labels": text[:, 1:],
        "logits_per_image": output.logits_per_image,
        "logits_is_training_false": output.logits,
        "loss": output.loss,
        "caption_loss": 2 * output.text_losses.sum() / output.text_lengths.sum(),
    }
    values["contrastive_loss"] = output.loss - values["caption_loss"]
    values |= generated(golden, model)
    for name in golden.in_order():
        golden.compare(name, values[name])


def generated(golden: Golden, model: HfvlmMaMMUTModel) -> dict[str, Tensor]:
    image, setting = golden.inputs["image"], golden.section("generate")
    if not setting:
        return {}
    tokens = {"bos_token_id": setting["sot"], "eos_token_id": setting["eos"], "pad_token_id": setting["pad"]}
    model.generation_config.update(**tokens)
    length = setting["seq_len"]
    whole: dict[str, Any] = {"eos_token_id": None, "return_dict_in_generate": True, "output_logits": True}
    free = model.generate(image, max_length=length, **whole)
    forced = {"min_length": setting["min_seq_len"], "forced_eos_token_id": setting["eos"]}
    greedy = model.generate(image, max_length=length, **forced)
    # A group of its beams is a search of its own, and all groups find the same.
    kinds = {name: re.fullmatch(r"generate_beam_(\d+)(?:_in_(\d+)_groups)?", name) for name in golden.outputs}
    groups = {name: int(kind[1]) // int(kind[2] or 1) for name, kind in kinds.items() if kind}
    return {
        "greedy_free_running_ids": free.sequences,
        "greedy_free_running_logits": torch.stack(free.logits, dim=1),
        "generate_greedy": torch.nn.functional.pad(greedy, (0, length - greedy.shape[1]), value=setting["pad"]),
        **{
            name: padded([search(model, picture[None], setting, beams) for picture in image], setting["pad"])
            for name, beams in groups.items()
        },
    }


def search(model: HfvlmMaMMUTModel, image: Tensor, setting: dict[str, int], beams: int) -> list[int]:
    """Its beams, which add up scores that are no log probabilities, and are compared over the whole text's length."""
    context, end = model.read(image), setting["eos"]
    running, finished = [(0.0, [setting["sot"]])], []
    while len(running[0][1]) < setting["seq_len"]:
        ids = torch.tensor([row for _, row in running])
        scores = model.text_model(ids, None, Context(context.tokens)).logits[:, -1]
        if ids.shape[1] < setting["min_seq_len"]:
            scores[:, end] = -torch.inf
        scores = scores + torch.tensor([[score] for score, _ in running])
        best = scores.flatten().topk(2 * beams)
        grown = [
            (score, running[place // scores.shape[1]][1], place % scores.shape[1])
            for score, place in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        size = ids.shape[1] + 1
        finished += [(score / size, [*row, end]) for score, row, token in grown[:beams] if token == end]
        finished = sorted(finished, reverse=True)[:beams]
        running = [(score, [*row, token]) for score, row, token in grown if token != end][:beams]
        if len(finished) == beams and finished[-1][0] >= grown[0][0] / size:
            return finished[0][1]
    return max(finished + [(score / len(row), row) for score, row in running])[1]


def padded(rows: list[list[int]], pad: int) -> Tensor:
    longest = max(len(row) for row in rows)
    return torch.tensor([row + [pad] * (longest - len(row)) for row in rows])


def module_path(name: str, model: HfvlmMaMMUTModel) -> str | None:
    """Where an intermediate of the original is in ours."""
    fixed = {
        "vision.patch_embeddings": "vision_model.patches.projection",
        "vision.ln_pre": "vision_model.pre_norm",
        "vision.ln_post": "vision_model.post_norm",
        "text.embeddings": "text_model.layers.0:input",
        "generative.last_cross_block": f"text_model.grounding_layers.{len(model.text_model.grounding_layers) - 1}",
    }
    if block := re.fullmatch(r"(vision|contrastive|generative)\.(cross_)?block(\d+)", name):
        tower = "vision_model" if block[1] == "vision" else "text_model"
        return f"{tower}.{'grounding_layers' if block[2] else 'layers'}.{block[3]}"
    return "text_model.post_norm" if name.endswith(".ln_final") else fixed.get(name)
