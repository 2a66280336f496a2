"""Losses of language models, training steps of LLaVA, and the second turn of a conversation.

python -m benchmarks.language [--quick] [--rounds 7] [--device cuda] [--output language.json]
"""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.loss.loss_utils import ForCausalLMLoss

import hfvlm
from benchmarks.measuring import Growth, Item, Row, Run, Size, peak_memory
from benchmarks.report import main
from hfvlm.losses import summed_token_losses
from hfvlm.modeling.compat import new_cache
from tests.models.llava.tiny import TEXT, VISION, converted

WIDTH = 256
IMAGE = 480


def rows(size: Size) -> Iterator[Item]:
    for masked in (0.0, 0.59, 0.9):
        arguments = size.pick((64, 500), (2048, 32_000))
        ways = {name: step(name, *arguments, masked, size.device) for name in ("hfvlm", "transformers")}
        peaks = {name: ("benchmarks.language", "step", name, *arguments, masked) for name in ways}
        row = f"loss of {arguments[0]} tokens of {arguments[1]:,}, {masked:.0%} without label"
        yield Row(row, ways, memory=peaks if size.device == "cpu" else {})
    yield Growth(
        "memory of the loss with tokens",
        (4096, 8192),
        lambda n: peak_memory("benchmarks.language", "step", "hfvlm", n, 8000, 0.0),
        0.6,
    )
    with TemporaryDirectory() as folder:
        path = converted(Path(folder), **{} if size.quick else larger())
        model = AutoModelForImageTextToText.from_pretrained(path).to(size.device).eval()
        ways = {"hfvlm": training(model, all_logits=False), "transformers": training(model, all_logits=True)}
        yield Row("LLaVA, training step, next to the loss of all logits", ways)
        yield Row("LLaVA, three turns of 8 tokens", turns(model, AutoProcessor.from_pretrained(path)))


def larger() -> dict[str, Any]:
    vision = VISION | {"hidden_size": 256, "intermediate_size": 1024, "image_size": 224, "num_attention_heads": 4}
    text = TEXT | {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "max_position_embeddings": 1024,
    }
    return {"vision_config": vision, "text_config": text}


def plain(head: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """Compute transformers' `ForCausalLMLoss`, summed, of labels that are shifted already."""
    return F.cross_entropy(head(x).flatten(0, 1).float(), labels.flatten(), reduction="sum")


def step(name: str, count: Any, vocabulary: Any, masked: Any, device: str = "cpu") -> Run:
    """Make the forward and backward pass of a loss -> the loss and its gradients."""
    torch.manual_seed(0)
    shape = (1, int(count))
    head = nn.Linear(WIDTH, int(vocabulary), bias=False).to(device)
    x = torch.randn(*shape, WIDTH, device=device, requires_grad=True)
    labels = torch.randint(int(vocabulary), shape).masked_fill(torch.rand(shape) < float(masked), -100).to(device)
    function = {"hfvlm": summed_token_losses, "transformers": plain}[name]

    def run() -> list[Tensor]:
        total = function(head, x, labels)
        return [total.detach(), *torch.autograd.grad(total, (x, head.weight))]

    return run


def training(model: Any, *, all_logits: bool) -> Run:
    """Make a forward and backward pass over two rows with an image, of whose tokens a third have labels."""
    side = model.config.vision_config.image_size
    count = (side // model.config.vision_config.patch_size) ** 2
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(3, IMAGE, (2, 64 + count // 2), generator=generator)
    ids = torch.cat([torch.full((2, count), IMAGE), text], dim=1)
    labels = ids.masked_fill(torch.arange(ids.shape[1]) < count, -100)
    batch = {"input_ids": ids, "labels": labels, "pixel_values": torch.randn(2, 3, side, side, generator=generator)}
    batch = {name: value.to(model.device) for name, value in batch.items()}

    def run() -> Tensor:
        model.train()
        if all_logits:
            given = {name: value for name, value in batch.items() if name != "labels"}
            logits = model(**given).logits
            loss = ForCausalLMLoss(logits, batch["labels"], logits.shape[-1])
        else:
            loss = model(**batch).loss
        loss.backward()
        model.zero_grad()
        model.eval()
        return loss.detach()

    return run


def turns(model: Any, processor: Any) -> dict[str, Run]:
    """Ask three times about an image; by hand, each answer computes the whole conversation again."""
    image = Image.new("RGB", (64, 48), "red")

    def ask(*, keep: bool) -> Run:
        def run() -> list[str]:
            chat = hfvlm.Chat(model, processor, max_new_tokens=8)
            answers = [chat.ask("What is it?", images=[image])]
            for question in ("And the colour?", "And the shape?"):
                if not keep:
                    chat.cache, chat.cached = new_cache(model), []
                answers.append(chat.ask(question))
            return answers

        return run

    return {"hfvlm": ask(keep=True), "careful": ask(keep=False)}


if __name__ == "__main__":
    main({"language": rows}, __doc__)
