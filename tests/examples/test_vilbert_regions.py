"""The example of a small model that answers questions about regions; its whole run takes minutes."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from transformers import AutoModel

from hfvlm.models.vilbert.processing_vilbert_tasks import classified
from hfvlm.models.vilbert.regions import Regions
from tests.support.paths import EXAMPLES

STEPS = 75


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("vilbert_regions", EXAMPLES / "vilbert_regions.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example


def test_the_example_runs(example, tmp_path):
    found = example.main(["--output", str(tmp_path), "--steps", "3", "--batch", "4", "--tests", "8"])
    assert found == json.loads((tmp_path / "results.json").read_text())
    assert {name.partition(",")[0] for name in found} == {*example.QUESTIONS, "reference"}
    assert AutoModel.from_pretrained(tmp_path).config.num_answers == len(example.ANSWERS)


def test_questions_have_one_answer(example):
    random = np.random.RandomState(0)
    tiles = example.rendered(random, 1)
    for kind in example.QUESTIONS:
        answers = set()
        for _ in range(200):
            _, placed = example.draw(tiles, random, list(tiles))
            if asked := example.ask(placed, random, kind):
                answers.add(asked[1])
                assert asked[1] in example.ANSWERS
        assert len(answers) == {"colour": 6, "shape": 4, "place": 4, "presence": 2}[kind]


def test_a_short_run_learns_what_the_text_does_not_say(example, tmp_path):
    """The colour of one region, whose pixels are new."""
    found = {}
    for blind in (False, True):
        torch.manual_seed(0)
        random = np.random.RandomState(0)
        train, test = example.rendered(random, 6), example.rendered(random, 2)
        model, processor = example.new_model(tmp_path / "vocab.txt", depth=2)

        def batch(tiles, rows, processor=processor, random=random, blind=blind):
            made = []
            for i in random.randint(24, size=rows):
                colour, shape = list(tiles)[i]
                pixels = tiles[colour, shape][random.randint(len(tiles[colour, shape]))]
                regions = Regions(pixels[None], [[0, 0, 40, 40]], 100, 100)
                answer = {example.ANSWERS.index(colour): 1.0}
                text = f"what colour is the {shape} ?"
                made.append(classified(processor, example.ASKED, text, regions, answer, len(example.ANSWERS)))
            return example.hidden(processor.collate(made), blind=blind)

        optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-3)
        for _ in range(STEPS):
            inputs = batch(train, 16)
            loss = model(**inputs, task="vqa").loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        inputs = batch(test, 100)
        labels = inputs.pop("labels")
        with torch.no_grad():
            logits = model.eval()(**inputs, task="vqa").logits
        found[blind] = example.ASKED.score(logits, labels).mean().item()
    assert found[True] < 0.4 < 0.7 < found[False]
