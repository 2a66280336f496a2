"""Train a small VQGAN and a small DALL-E mini on rendered scenes, and let it draw what texts say.

The scenes have one large shape each, of six colours and four shapes. Of the 24 kinds, four are held out: the model is
to draw them without ever having seen such a combination. A small classifier, trained on rendered scenes alone, judges
the colour and the shape of what is drawn; it never sees a text. Beside it: what is drawn for the empty text, the
classifier on rendered scenes, and on these after the VQGAN.

    python examples/draw_scenes.py --output dalle-scenes        # about twenty minutes on a core
"""

import argparse
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoProcessor, set_seed

import hfvlm  # noqa: F401  (registers the models)
from hfvlm.conversion.dalle_mini import processor_for
from hfvlm.models.dalle_mini import HfvlmDALLEMiniConfig
from hfvlm.samples import scenes

HELD_OUT, PIXELS, BATCH = 4, 16, 48
COLOURS, SHAPES = list(scenes.COLOURS), list(scenes.SHAPES)
# A code for each 4 x 4 pixels.
CODEC = {
    "hidden_size": 32,
    "channel_ratios": [1, 1, 2],
    "blocks_per_level": 1,
    "attention_levels": [],
    "latent_channels": 32,
    "code_size": 16,
    "num_codes": 128,
    "image_size": PIXELS,
}
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
TEXT_LENGTH = 24


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--codec-steps", type=int, default=500)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--pictures", type=int, default=60, help="of each kind in training")
    parser.add_argument("--drawings", type=int, default=10, help="of each kind that is judged")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    set_seed(options.seed)
    random = np.random.RandomState(options.seed)
    kinds = [kind for kind in scenes.all_scenes() if kind.size == "large"]
    order = random.permutation(len(kinds))
    test, train = [kinds[i] for i in order[:HELD_OUT]], [kinds[i] for i in order[HELD_OUT:]]
    seen = [kind for kind in train for _ in range(options.pictures)]
    pixels = rendered(seen, random)
    options.output.mkdir(parents=True, exist_ok=True)
    model, processor = new_model(options.output)
    fit_codec(model.codec, pixels, options.codec_steps)
    fit(model, processor, seen, pixels, options.steps)
    model.save_pretrained(options.output)
    processor.save_pretrained(options.output)
    judge = fit_judge(kinds, random, max(options.steps // 2, 1))
    found = judged(options.output, judge, train, test, random, options.drawings)
    (options.output / "results.json").write_text(json.dumps(found, indent=2) + "\n")
    for name, value in found.items():
        print(f"{name}: {value:.2f}")
    return found


def rendered(kinds: list[scenes.Scene], random: np.random.RandomState) -> Tensor:
    """Images of kinds as `(B, 3, 16, 16)` in 0..1."""
    images = np.stack([np.asarray(kind.render(random, PIXELS)) for kind in kinds])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def new_model(folder: Path) -> tuple[Any, Any]:
    """A model that knows nothing, and a vocabulary that is learned from the captions."""
    captions = [kind.caption(template) for kind in scenes.all_scenes() for template in scenes.TEMPLATES]
    engine = Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    engine.train_from_iterator([f" {caption.replace(',', ', ')}" for caption in captions], trainer)
    engine.model.save(str(folder))
    codes = CODEC["num_codes"]
    special_ids = {"bos_token_id": codes, "pad_token_id": codes, "eos_token_id": codes}
    config = HfvlmDALLEMiniConfig(
        text_config={
            **SIZES,
            "num_hidden_layers": 2,
            "vocab_size": engine.get_vocab_size(),
            "max_position_embeddings": TEXT_LENGTH,
        },
        decoder_config={
            **SIZES,
            "num_hidden_layers": 2,
            "vocab_size": codes + 1,
            "max_position_embeddings": (PIXELS // 4) ** 2,
            "context_length": TEXT_LENGTH,
            **special_ids,
        },
        codec_config=dict(CODEC),
        guidance_scale=2.0,
    )
    return AutoModel.from_config(config), processor_for(config, {}, folder / "vocab.json")


def optimizer_for(model: nn.Module, steps: int, rate: float) -> tuple[Any, Any]:
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.98), weight_decay=0.01)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, max(steps, 2))


def fit_codec(codec: Any, pixels: Tensor, steps: int) -> None:
    """Train the VQGAN by its own loss; codes that no latent is near begin again where latents are."""
    codec.requires_grad_(requires_grad=True)
    optimizer, schedule = optimizer_for(codec, steps, 2e-3)
    for step in range(steps):
        batch = pixels[torch.randint(len(pixels), (BATCH,))]
        output = codec(batch, return_loss=True)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0 and step < steps * 3 // 4:
            revive(codec, output)
    codec.requires_grad_(requires_grad=False)


@torch.no_grad()
def revive(codec: Any, output: Any) -> None:
    used = torch.bincount(output.codes.flatten(), minlength=codec.config.num_codes) > 0
    latents = output.latents.permute(0, 2, 3, 1).flatten(0, 2)
    codec.codes.weight[~used] = latents[torch.randint(len(latents), (int((~used).sum()),))]


def fit(model: Any, processor: Any, kinds: list[scenes.Scene], pixels: Tensor, steps: int) -> None:
    """Train the transformer by its own loss on the codes; a tenth of the texts is empty, for guidance."""
    codes = torch.cat([model.codec.encode(part).codes.flatten(1) for part in pixels.split(256)])
    texts = {kind: processor(text=[kind.caption(t) for t in scenes.TEMPLATES]) for kind in dict.fromkeys(kinds)}
    empty = processor(text=[""])
    trained = nn.ModuleList([model.text_model, model.image_decoder])
    optimizer, schedule = optimizer_for(trained, steps, 3e-3)
    model.train()
    for _ in range(steps):
        rows = torch.randint(len(kinds), (BATCH,))
        chosen = torch.randint(len(scenes.TEMPLATES), (BATCH,))
        inputs = {}
        for name in ("input_ids", "attention_mask"):
            chosen_texts = torch.stack([texts[kinds[r]][name][t] for r, t in zip(rows, chosen, strict=True)])
            inputs[name] = torch.where(torch.rand(BATCH, 1) < 0.1, empty[name], chosen_texts)
        loss = model(**inputs, labels=codes[rows]).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


class Judge(nn.Module):
    """Colours and shapes of images, which it has learned from rendered scenes without their captions."""

    def __init__(self) -> None:
        super().__init__()
        widths = [3, 32, 64, 64]
        layers = [nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU()) for a, b in pairwise(widths)]
        self.layers = nn.Sequential(*layers, nn.Flatten())
        self.colour, self.shape = nn.Linear(64 * 4, len(COLOURS)), nn.Linear(64 * 4, len(SHAPES))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        x = self.layers(pixels)
        return self.colour(x), self.shape(x)


def answers(kinds: list[scenes.Scene]) -> tuple[Tensor, Tensor]:
    return (
        torch.tensor([COLOURS.index(kind.colour) for kind in kinds]),
        torch.tensor([SHAPES.index(kind.shape) for kind in kinds]),
    )


def fit_judge(kinds: list[scenes.Scene], random: np.random.RandomState, steps: int) -> Judge:
    judge = Judge()
    given = [kind for kind in kinds for _ in range(60 if steps > 1 else 1)]
    pixels, (colours, shapes) = rendered(given, random), answers(given)
    optimizer, schedule = optimizer_for(judge, steps, 2e-3)
    for _ in range(steps):
        rows = torch.randint(len(given), (BATCH,))
        # Noise, so that a drawing's small faults do not mislead it.
        colour, shape = judge(
            pixels[rows] + 0.05 * torch.randn(BATCH, 1, 1, 1) + 0.03 * torch.randn_like(pixels[rows])
        )
        loss = F.cross_entropy(colour, colours[rows]) + F.cross_entropy(shape, shapes[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return judge.eval()


@torch.no_grad()
def right(judge: Judge, pixels: Tensor, kinds: list[scenes.Scene]) -> dict[str, float]:
    """The shares of images whose colour, shape and both are those of the kinds."""
    found = [scores.argmax(-1) == answer for scores, answer in zip(judge(pixels), answers(kinds), strict=True)]
    colour, shape = found
    return {
        "colour": colour.float().mean().item(),
        "shape": shape.float().mean().item(),
        "both": (colour & shape).float().mean().item(),
    }


def judged(
    folder: Path,
    judge: Judge,
    train: list[scenes.Scene],
    test: list[scenes.Scene],
    random: np.random.RandomState,
    count: int,
) -> dict[str, float]:
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    results = {}
    for name, kinds in (("seen", train), ("held out", test)):
        asked = [kind for kind in kinds for _ in range(count)]
        drawn = model.draw(**processor(text=[kind.caption() for kind in asked]), top_k=0)
        results |= {f"{part}, {name}": value for part, value in right(judge, drawn, asked).items()}
    asked = [kind for kind in train for _ in range(count)]
    blind = model.draw(**processor(text=[""] * len(asked)), top_k=0, guidance_scale=1)
    results |= {f"{part}, without the text": value for part, value in right(judge, blind, asked).items()}
    real = rendered(asked, random)
    again = model.codec.decode(model.codec.encode(real).codes).clamp(0, 1)
    results |= {f"{part}, rendered": value for part, value in right(judge, real, asked).items()}
    return results | {f"{part}, rendered and coded": value for part, value in right(judge, again, asked).items()}


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
