"""Conversations whose images have no place of their own."""

import numpy as np
import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainingArguments

import hfvlm
from hfvlm.training import ChatCollator, ChatTrainer
from tests.models.llava.tiny import converted

IMAGE = Image.fromarray(np.random.RandomState(0).randint(0, 256, (30, 40, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return converted(tmp_path_factory.mktemp("llava"))


def example(i, question="What is this?"):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": f"A cat {i}."}]
    return {"conversations": turns, "image": IMAGE}


def is_first(collator, row):
    """Whether the image comes before the question."""
    ids = collator.row(row)[0].ids
    token = collator.processor.image_token_id
    text = collator.processor.decode([i for i in ids[max(i for i, x in enumerate(ids) if x == token) :] if i != token])
    assert ids.count(token) > 1
    return "What is this?" in text


def test_images_come_before_or_after_the_question_at_random(folder):
    processor = AutoProcessor.from_pretrained(folder)
    rows = [example(i) for i in range(40)]
    collator = ChatCollator(processor, image_place="random", seed=1)
    places = [is_first(collator, row) for row in rows]
    assert 8 < sum(places) < 32
    assert places == [is_first(ChatCollator(processor, image_place="random", seed=1), row) for row in rows]
    assert places != [is_first(ChatCollator(processor, image_place="random", seed=2), row) for row in rows]
    assert all(is_first(ChatCollator(processor), row) for row in rows)
    named = [example(i, "<image>\nWhat is this?") for i in range(20)]
    assert all(is_first(collator, row) for row in named)
    last = next(row for row, first in zip(rows, places, strict=True) if not first)
    written = example(0)["conversations"][0] | {"value": "What is this?\n<image>"}
    ids, labels = (collator.row(last)[0][i] for i in (0, 1))
    text = processor.decode([i for i, label in zip(ids, labels, strict=True) if label != -100])
    assert "A cat" in text
    assert "What" not in text
    assert is_first(
        collator, last | {"conversations": [written, last["conversations"][1]]}
    )  # where the authors put it


def test_evaluations_put_images_first(folder, tmp_path):
    processor = AutoProcessor.from_pretrained(folder)
    rows = [example(i) for i in range(8)]
    collator = ChatCollator(processor, image_place="random", seed=1)
    arguments = TrainingArguments(str(tmp_path), remove_unused_columns=False, report_to="none", use_cpu=True)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    trainer = ChatTrainer(model, arguments, collator, train_dataset=rows, eval_dataset=rows)
    assert (
        next(iter(trainer.get_eval_dataloader()))["input_ids"].tolist()
        == ChatCollator(processor)(rows)["input_ids"].tolist()
    )
    assert trainer.get_train_dataloader().collate_fn.image_place == "random"
    assert trainer.data_collator is collator


def test_models_that_fix_the_place_refuse(folder):
    processor = AutoProcessor.from_pretrained(folder)
    with pytest.raises(ValueError, match="image_place must be one of first, random, not 'last'"):
        ChatCollator(processor, image_place="last")
    other = hfvlm.HfvlmFlamingoProcessor.__new__(hfvlm.HfvlmFlamingoProcessor)
    with pytest.raises(ValueError, match="HfvlmFlamingoProcessor puts images where its model was trained on them"):
        ChatCollator(other, image_place="random")
