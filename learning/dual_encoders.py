"""Models that compare images with texts: they name kinds of shapes that they never saw."""

from collections.abc import Callable, Sequence
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hfvlm.samples import scenes
from learning.entries import Scores, learns
from learning.fitting import Batch, count_of, example, fit, grey, steps_of, untrained

HELD_OUT, VIEWS, TESTS = 8, 30, 20
NAMES = "zero-shot accuracy among 48 captions, of kinds that are held out"
BLIND = "the same model on grey images"
Caption = Callable[[scenes.Scene, str], str]


def english(kind: scenes.Scene, template: str) -> str:
    return kind.caption(template)


class Pairs:
    """Rendered scenes with captions, of kinds that are seen and of such that are held out.

    Args:
        processor: of the model.
        random: of what is drawn.
        caption: writes a caption.
        templates: of captions.
        noise: share of the captions of a batch that belong to other images.
        effort: of which there are fewer images.
    """

    def __init__(
        self,
        processor: Any,
        random: np.random.RandomState,
        *,
        caption: Caption = english,
        templates: Sequence[str] = scenes.TEMPLATES,
        noise: float = 0.0,
        effort: float = 1.0,
    ):
        self.processor, self.random, self.noise = processor, random, noise
        self.views = count_of(VIEWS, effort)
        self.kinds = scenes.all_scenes()
        order = random.permutation(len(self.kinds))
        self.train, self.test = ([self.kinds[i] for i in part] for part in (order[HELD_OUT:], order[:HELD_OUT]))
        self.templates = len(templates)
        self.texts = self.tokens([caption(kind, each) for kind in self.train for each in templates])
        self.images = self.pixels([kind.render(random) for kind in self.train for _ in range(self.views)])
        self.names = self.tokens([caption(kind, templates[0]) for kind in self.kinds])
        self.asked = [kind for kind in self.test for _ in range(count_of(TESTS, effort))]
        self.shown = [kind.render(random) for kind in self.asked]

    def pixels(self, images: Sequence[Any]) -> Tensor:
        return self.processor.image_processor(list(images), return_tensors="pt")["pixel_values"]

    def tokens(self, texts: list[str]) -> Batch:
        inputs = self.processor(text=texts, padding="max_length", return_tensors="pt")
        return {name: value for name, value in inputs.items() if name in ("input_ids", "attention_mask")}

    def batch(self) -> Batch:
        """Draw an image and a caption of every kind that is seen."""
        count = len(self.train)
        rows = np.arange(count)
        if self.noise:
            wrong = np.flatnonzero(self.random.rand(count) < self.noise)
            rows[wrong] = np.roll(rows[wrong], 1)
        image = torch.from_numpy(np.arange(count) * self.views + self.random.randint(self.views, size=count))
        text = torch.from_numpy(rows * self.templates + self.random.randint(self.templates, size=count))
        inputs = {name: value[text] for name, value in self.texts.items()}
        return inputs | {"pixel_values": self.images[image]}

    @torch.no_grad()
    def named(self, model: Any) -> Scores:
        """Choose among the captions of all kinds, for new images of those that are held out."""
        truth = np.array([self.kinds.index(kind) for kind in self.asked])
        found = []
        for images in (self.shown, grey(self.shown)):
            logits = model(**self.names, pixel_values=self.pixels(images)).logits_per_image
            found.append((logits.argmax(dim=1).numpy() == truth).astype(float))
        return Scores(*found)


def loss_of_pairs(model: Any, inputs: Batch) -> Tensor:
    return model(**inputs, return_loss=True).loss


def zero_shot(
    name: str, seed: int, effort: float, steps: int, *, noise: float = 0.0, rate: float = 2e-3
) -> dict[str, Scores]:
    """Train an architecture's tiny model on pairs, and let it name what it never saw."""
    torch.manual_seed(seed)
    model, processor = untrained(name, seed)
    pairs = Pairs(processor, np.random.RandomState(seed), noise=noise, effort=effort)
    fit(model, pairs.batch, steps_of(steps, effort), rate=rate, loss_of=loss_of_pairs)
    return {NAMES: pairs.named(model)}


@learns("clip", "names images by texts alone, by a softmax over pairs", BLIND)
def clip(seed: int, effort: float) -> dict[str, Scores]:
    return zero_shot("clip", seed, effort, 400, rate=1e-3)


@learns("siglip", "the same by a sigmoid of each pair", BLIND)
def siglip(seed: int, effort: float) -> dict[str, Scores]:
    return zero_shot("siglip", seed, effort, 500)


@learns("align", "the same from noisy pairs: a quarter of the captions belong to other images", BLIND)
def align(seed: int, effort: float) -> dict[str, Scores]:
    return zero_shot("align", seed, effort, 400, noise=0.25)


@learns("filip", "the same by comparing words with patches", BLIND)
def filip(seed: int, effort: float) -> dict[str, Scores]:
    return zero_shot("filip", seed, effort, 500)


@learns("wukong", "the same in Chinese, by comparing characters with sums of patches", BLIND)
def wukong(seed: int, effort: float) -> dict[str, Scores]:
    script = example("wukong_scenes")
    torch.manual_seed(seed)
    with TemporaryDirectory() as folder:
        model, processor = script.new_model("wukong", script.Path(folder) / "vocab.txt")
    random = np.random.RandomState(seed)
    pairs = Pairs(processor, random, caption=script.caption, templates=script.TEMPLATES, effort=effort)
    fit(model, pairs.batch, steps_of(400, effort), rate=1e-3, loss_of=loss_of_pairs)
    return {NAMES: pairs.named(model)}


@learns("flava", "one model for images, texts and both: fills gaps of captions by the image, and names images", BLIND)
def flava(seed: int, effort: float) -> dict[str, Scores]:
    torch.manual_seed(seed)
    model, processor = untrained("flava", seed, "HfvlmFLAVAForPreTraining")
    pairs = Pairs(processor, np.random.RandomState(seed), effort=effort)
    mask = processor.tokenizer.mask_token_id
    words = torch.tensor(processor.tokenizer.convert_tokens_to_ids([*scenes.COLOURS, *scenes.SHAPES, *scenes.SIZES]))

    def hidden(inputs: Batch) -> Batch:
        """Hide one word of each text that the image shows."""
        ids = inputs["input_ids"]
        place = (torch.isin(ids, words) * torch.rand(ids.shape)).argmax(dim=1, keepdim=True)
        labels = torch.full_like(ids, -100).scatter(1, place, ids.gather(1, place))
        return inputs | {"input_ids_masked": ids.scatter(1, place, mask), "mlm_labels": labels}

    fit(model, lambda: hidden(pairs.batch()), steps_of(500, effort), loss_of=loss_of_pairs)
    found = {NAMES: pairs.named(model)}
    texts = hidden(pairs.tokens([kind.caption() for kind in pairs.asked]))
    labels, right = texts.pop("mlm_labels"), []
    with torch.no_grad():
        for images in (pairs.shown, grey(pairs.shown)):
            output = model(**texts, pixel_values=pairs.pixels(images))
            said = output.mmm_text_logits[labels >= 0].argmax(dim=1)
            right.append((said == labels[labels >= 0]).numpy().astype(float))
    return found | {"words that a gap in a caption hides": Scores(*right)}


def bound(name: str, seed: int, effort: float, pair: tuple[str, str]) -> dict[str, Scores]:
    """Bind sensors to an anchor, and let two of them find each other that were never paired."""
    script = example("six_modalities")
    torch.manual_seed(seed)
    model, processor = script.build(script.load_preset(f"{name}/tiny"))
    train = script.prepare(processor, range(1000 * seed, 1000 * seed + count_of(20, effort)))
    script.train(model, train, steps_of(150, effort), 2e-3)
    model.eval()
    first = 900_000 + 10 * seed
    inputs = script.prepare(processor, range(first, first + count_of(8, effort)))
    embeds = {}
    with torch.no_grad():
        for modality in pair:
            flat = {key: value.flatten(0, 1) for key, value in inputs[modality].items()}
            features = getattr(model, f"get_{modality}_features")(**flat).pooler_output
            embeds[modality] = torch.nn.functional.normalize(features, dim=-1).unflatten(0, (-1, len(script.EVENTS)))
    query, gallery = (embeds[modality] for modality in pair)
    truth, found = torch.arange(len(script.EVENTS)), []
    for given in (query, query[:, :1].expand_as(query)):
        best = (given @ gallery.roll(1, 0).mT).argmax(-1)
        found.append((best == truth).flatten().numpy().astype(float))
    return {f"{pair[0]} that finds {pair[1]} of its event among 24, never trained together": Scores(*found)}


@learns("imagebind", "binds sensors by images alone", "one event's audio for all")
def imagebind(seed: int, effort: float) -> dict[str, Scores]:
    return bound("imagebind", seed, effort, ("audio", "text"))


@learns("languagebind", "binds sensors by captions alone", "one event's audio for all")
def languagebind(seed: int, effort: float) -> dict[str, Scores]:
    return bound("languagebind", seed, effort, ("audio", "depth"))
