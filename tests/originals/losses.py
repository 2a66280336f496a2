"""Losses and their gradients on one process and on several.

Ours over several processes returns the whole batch's loss on each, and gradients that average to the whole batch's.
The originals' ranks return their own shares, or gradients of another scale; what they add up to must be the same.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from hfvlm.losses import (
    captioning_loss,
    contrastive_loss,
    late_interaction_loss,
    late_interaction_scores,
    sigmoid_loss,
)
from hfvlm.losses.late_interaction import most_alike
from hfvlm.losses.processes import gather_rows
from tests.support.golden import Golden
from tests.support.processes import run_processes

# What a run's loss is made with; how ranks exchange their features changes none of a loss' values.
SETTINGS = {
    "clip": ("local_loss", "gather_with_grad"),
    "siglip": ("dist_impl", "chunk_size"),
    "coca": ("local_loss", "gather_with_grad", "caption_loss_weight", "clip_loss_weight"),
}


def compare(golden: Golden) -> None:
    case = golden.case
    runs = case.get("runs", {})
    golden.check(
        **{f"runs__{name}": ("cls", "kwargs", "args") for name in runs},
        **{f"runs__{name}__kwargs": SETTINGS[case["kind"]] for name in runs},
    )
    size = case["world_size"]
    run = filip if case["kind"] == "filip" else open_clip
    if size == 1:
        run(golden, [evaluate(0, case, golden.inputs)])
    else:
        run(golden, run_processes(evaluate, size, case, golden.inputs))


def evaluate(rank: int, case: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What one process of ours computes: values by the original's names, and gradients."""
    group = dist.group.WORLD if case["world_size"] > 1 else None
    own = f"rank{rank}/" if group else ""
    given = {name.removeprefix(own): tensor for name, tensor in inputs.items() if name.startswith(own)}
    found: dict[str, Tensor] = {}
    for run, settings in case.get("runs", {"": {}}).items():
        leaves = {k: v.clone().requires_grad_(v.is_floating_point()) for k, v in given.items()}
        values = VALUES[case["kind"]](leaves, settings.get("kwargs", {}), group)
        losses = [value for name, value in values.items() if name.endswith("loss") and value.requires_grad]
        torch.stack(losses).sum().backward()
        prefix = f"{run}/" if run else ""
        found |= {prefix + name: value.detach() for name, value in values.items()}
        found |= {
            f"{prefix}grad_{name}": torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            for name, leaf in leaves.items()
            if leaf.requires_grad
        }
    return found


def clip(x: dict[str, Tensor], settings: dict[str, Any], group: Any) -> dict[str, Tensor]:
    loss = contrastive_loss(x["image_features"], x["text_features"], x["logit_scale"], group=group)
    return {"contrastive_loss": loss}


def siglip(x: dict[str, Tensor], settings: dict[str, Any], group: Any) -> dict[str, Tensor]:
    loss = sigmoid_loss(x["image_features"], x["text_features"], x["logit_scale"], x["logit_bias"], group=group)
    return {"contrastive_loss": loss}


def coca(x: dict[str, Tensor], settings: dict[str, Any], group: Any) -> dict[str, Tensor]:
    weight = settings["clip_loss_weight"]
    contrastive = contrastive_loss(x["image_features"], x["text_features"], x["logit_scale"], group=group)
    caption = captioning_loss(x["logits"], x["labels"], ignore_index=0)  # the original averages each process' tokens
    return {
        "contrastive_loss": weight * contrastive if weight else torch.tensor(0),
        "caption_loss": settings["caption_loss_weight"] * caption,
    }


def dense(x: dict[str, Tensor], settings: dict[str, Any], group: Any) -> dict[str, Tensor]:
    image, text = F.normalize(x["image_dense"], dim=-1), F.normalize(x["text_dense"], dim=-1)
    scale = x["logit_scale_dense"].exp()
    with torch.no_grad():
        image_keys = gather_rows(most_alike(image, text, None, None, 16)[0], group)
        text_keys = gather_rows(most_alike(text, image, None, None, 16)[0], group)
        rank = dist.get_rank() if group else 0
        values = {
            "labels": torch.arange(len(image)) + rank * len(image),
            "dense_logits_per_image": scale * late_interaction_scores(image, text_keys),
            "dense_logits_per_text": scale * late_interaction_scores(text, image_keys),
        }
    return values | {"loss": late_interaction_loss(image, text, scale, top_k=16, group=group)}


VALUES = {"clip": clip, "siglip": siglip, "coca": coca, "filip": dense}


def open_clip(golden: Golden, ours: list[dict[str, Tensor]]) -> None:
    """Every stored number but two kinds, which the notes of the cases explain: the gradient of a softmax' offset is
    rounding error, and features get no gradient from other processes with local_loss and without gather_with_grad."""
    size = len(ours)
    for name in golden.in_order():
        rank, run, output = name.split("/") if size > 1 else ("rank0", *name.split("/"))
        settings = golden.case["runs"][run]["kwargs"]
        local, gathered = settings.get("local_loss"), settings.get("gather_with_grad")
        actual = ours[int(rank.removeprefix("rank"))][f"{run}/{output}"]
        features = output in ("grad_image_features", "grad_text_features")
        if (golden.case["kind"] == "clip" and output == "grad_logit_bias") or (features and local and not gathered):
            golden.compared.add(name)
        elif features and size > 1 and gathered is False:
            golden.compare(name, actual / size)  # their sum, not their average, is the whole batch's
        elif features or output in ("caption_loss", "grad_logits"):
            golden.compare(name, actual)
        else:
            golden.compare(name, averages_as(golden, name, [found[f"{run}/{output}"] for found in ours]))


def averages_as(golden: Golden, name: str, ours: list[Tensor]) -> Tensor:
    """The stored value, moved by as much as our processes' average is off the original's."""
    _rank, _, rest = name.partition("/")
    names = [f"rank{i}/{rest}" for i in range(len(ours))] if len(ours) > 1 else [name]
    off = torch.stack(ours).double().mean() - torch.stack([golden.outputs[n] for n in names]).double().mean()
    return golden.outputs[name] + off


def filip(golden: Golden, ours: list[dict[str, Tensor]]) -> None:
    """The original divides each process' loss by their number, so that its gradients add up to the whole batch's."""
    size = len(ours)
    for name in golden.in_order():
        rank, output = name.split("/") if size > 1 else ("rank0", name)
        actual = ours[int(rank.removeprefix("rank"))][output]
        if output in ("loss", "grad_logit_scale_dense") and size > 1:
            theirs = torch.stack([golden.outputs[f"rank{i}/{output}"] for i in range(size)]).double()
            mine = torch.stack([found[output] for found in ours]).double()
            golden.compare(name, golden.outputs[name] + (mine.mean() - theirs.sum()) / size)
        else:
            golden.compare(name, actual / size if output.startswith("grad_") else actual)
