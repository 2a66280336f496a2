"""Train a small MERLOT Reserve on videos that are made of scenes and tones, and let it find the audio that is masked.

In these videos a shape's colour decides the pitch of its tone, and nothing that is spoken names it: only who sees the
frames knows which audio a mask stands for. A second model, which is trained on the same videos with black frames, is
the blind baseline: it shows what can be guessed from the rest.

    python examples/merlot_reserve_sounds.py --output merlot-reserve-tones      # three minutes on a core

The right one of six tones is the best for these shares of masks in new videos; 17 % would be by chance:

    model          audio that is masked
    with frames    1.00
    blind          0.18
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import set_seed

from hfvlm.conversion.merlot_reserve import processor_for
from hfvlm.models.merlot_reserve import (
    HfvlmMERLOTReserveConfig,
    HfvlmMERLOTReserveForPreTraining,
    HfvlmMERLOTReserveModel,
)
from hfvlm.models.merlot_reserve.masking import ReserveMasking, Speech, batches
from hfvlm.models.merlot_reserve.modeling_merlot_reserve import unit
from hfvlm.samples import scenes

SEGMENTS, CLIPS, FRAMES, RATE = 4, 3, 12, 22_050
# Tones of each colour, and images of each kind of scene.
EACH = 8
TONES = dict(zip(scenes.COLOURS, (220.0, 350.0, 560.0, 890.0, 1400.0, 2200.0), strict=True))
SPECIAL = ("PAD", "START", "END", "MASK", "MASKAUDIO", "AUDIOSPAN", "LTOVPOOL", "unused0", "UNK", "RESETCTX")
WORDS = ("here", "is", "a", *scenes.SHAPES, *scenes.SIZES)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=16, help="videos in a step")
    parser.add_argument("--videos", type=int, default=100, help="new ones that are judged")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, blind in (("with frames", False), ("blind", True)):
        set_seed(options.seed)
        model, processor = new_model(options.output / "vocabulary.json")
        fit(model, Videos(processor, np.random.default_rng(options.seed), blind=blind), options)
        folder = options.output / name.replace(" ", "-")
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        new = Videos(processor, np.random.default_rng(options.seed + 1), blind=blind)
        found[name] = judge(folder, new, options.videos)
        print(f"masked audio that is found, {name}: {found[name]:.2f}")
    (options.output / "results.json").write_text(json.dumps(found, indent=2) + "\n")
    return found


def new_model(vocabulary: Path) -> tuple[HfvlmMERLOTReserveForPreTraining, Any]:
    """A model of a few hundred thousand parameters that knows nothing, and a vocabulary of a few words."""
    pieces = [*(f"<|{name}|>" for name in SPECIAL), *WORDS]
    engine = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<|UNK|>"))
    engine.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    engine.add_special_tokens(pieces[: len(SPECIAL)])
    engine.save(str(vocabulary))
    width = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    width |= {"initializer_range": 0.1}
    config = HfvlmMERLOTReserveConfig(
        vision_config=width | {"image_size": [32, 32], "patch_size": 8, "projection_dim": 64},
        audio_config=width | {"num_frames": FRAMES, "num_tokens": 2, "projection_dim": 64},
        **width,
        vocab_size=len(pieces),
        num_span_layers=1,
        num_target_spans=6,
        video_split_rate=0.0,
    )
    return HfvlmMERLOTReserveForPreTraining(config), processor_for(config, {}, vocabulary)


class Videos:
    """Makes batches of videos, each of four segments: a shape, what is spoken of it, and its tone.

    Args:
        processor: of the model.
        generator: of what is drawn.
        blind: with black frames.
    """

    def __init__(self, processor: Any, generator: np.random.Generator, *, blind: bool):
        self.processor, self.generator, self.blind = processor, generator, blind
        self.masking = ReserveMasking(length=20, longest=32, audio_tokens=2, text_spans=3, span_length=4)
        self.kinds = scenes.all_scenes()
        self.sounds = {colour: self.clips([colour] * EACH) for colour in TONES}
        self.images = {kind: self.frames([kind] * EACH) for kind in self.kinds}

    def tone(self, colour: str) -> np.ndarray:
        """A colour's tone of a second, somewhat loud and somewhat high."""
        seconds = np.arange(int(1.15 * RATE)) / RATE
        hertz, phase = TONES[colour] * self.generator.uniform(0.97, 1.03), self.generator.uniform(0, 2 * np.pi)
        tone = self.generator.uniform(0.3, 0.8) * np.sin(2 * np.pi * hertz * seconds + phase)
        return (tone + 0.02 * self.generator.standard_normal(len(seconds))).astype(np.float32)

    def clips(self, colours: list[str]) -> Tensor:
        """The spectrograms of tones, three clips each."""
        sources = [(self.tone(colour), RATE) for colour in colours]
        return self.processor.prepare("audio", sources)["input_features"].unflatten(0, (-1, CLIPS))

    def frames(self, kinds: list[scenes.Scene]) -> Tensor:
        random = np.random.RandomState(self.generator.integers(2**31))
        images = [Image.new("RGB", (32, 32)) if self.blind else kind.render(random) for kind in kinds]
        return self.processor.prepare("image", images)["pixel_values"]

    def said(self, kind: scenes.Scene) -> list[int]:
        """Six words about a scene, two in each of its clips, of which none is its colour."""
        return self.processor.ids(f"here is a {kind.size} {kind.shape} here")

    def batch(self, count: int) -> tuple[dict[str, Tensor], list[list[scenes.Scene]]]:
        """The inputs of pretraining for a few videos, and what these show."""
        shown = [[self.kinds[i] for i in self.generator.permutation(len(self.kinds))[:SEGMENTS]] for _ in range(count)]
        rows, number = [], SEGMENTS * CLIPS
        for kinds in shown:
            ids = np.array([token for kind in kinds for token in self.said(kind)])
            clips = np.arange(number).repeat(2)
            limits = np.stack([np.arange(number), np.arange(number) + 1], axis=1).astype(np.float32)
            speech = Speech(ids, clips, clips + np.tile([0.3, 0.6], number), limits)
            others = self.generator.permutation(len(self.kinds))[:6]
            other = np.array([token for i in others for token in self.said(self.kinds[i])])
            rows.append(self.masking(speech, other, self.generator))
        inputs = {name: torch.from_numpy(values) for name, values in batches(rows, self.generator).items()}
        every = [kind for kinds in shown for kind in kinds]
        which = self.generator.integers(EACH, size=(2, len(every)))
        frames = torch.stack([self.images[kind][i] for kind, i in zip(every, which[0], strict=True)])
        clips = torch.stack([self.sounds[kind.colour][i] for kind, i in zip(every, which[1], strict=True)])
        inputs["pixel_values"] = frames.unflatten(0, (count, SEGMENTS))
        inputs["input_features"] = clips.flatten(0, 1).unflatten(0, (count, number))
        return inputs, shown


def fit(model: HfvlmMERLOTReserveForPreTraining, videos: Videos, options: argparse.Namespace) -> None:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=options.steps + 1, pct_start=0.1)
    for step in range(options.steps):
        inputs, _ = videos.batch(options.batch)
        output = model(**inputs)
        optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            losses = [f"{name} {output[f'{name}_loss'].item():.2f}" for name in ("image", "audio", "span")]
            print(f"step {step}: {', '.join(losses)}", flush=True)


def judge(folder: Path, videos: Videos, count: int) -> float:
    """The share of masks of audio whose best tone, of one for each colour, is that of the segment's colour."""
    return float(np.mean(masks_found(folder, videos, count)))


@torch.no_grad()
def masks_found(folder: Path, videos: Videos, count: int) -> list[bool]:
    """Whether the best tone is the right one, for each mask."""
    model = HfvlmMERLOTReserveModel.from_pretrained(folder).eval()
    clips = torch.cat([videos.sounds[colour][:3].flatten(0, 1) for colour in TONES])
    tones = unit(model.get_audio_features(clips).pooler_output).unflatten(0, (len(TONES), -1)).mean(dim=1)
    right, groups, each = [], model.config.num_segment_groups, SEGMENTS // model.config.num_segment_groups
    for _ in range(0, count, 20):
        inputs, shown = videos.batch(min(count, 20))
        rows = inputs["text_to_audio"].flatten(0, 1)
        frames = inputs["pixel_values"].unflatten(1, (groups, each)).flatten(0, 1)
        found = model(rows[..., 0], frames, segment_ids=(rows[..., 1] // CLIPS) % each).embeds
        for row, place in (rows[..., 0] == model.config.audio_mask_token_id).nonzero().tolist():
            colour = shown[row // groups][int(rows[row, place, 1]) // CLIPS].colour
            right.append(list(TONES)[int((tones @ found[row, place]).argmax())] == colour)
    return right


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
