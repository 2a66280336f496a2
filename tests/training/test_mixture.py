"""PaLI's tasks become prompts and answers."""

from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import hfvlm
from hfvlm.training.mixture import PROMPTS, TASKS, Corruption, MixtureCollator, mixed

IMAGE = Image.new("RGB", (80, 40), "red")
ROWS = {
    "span_corruption": {"text": "a small red circle on a dark ground and a large blue square"},
    "split_captioning": {"image": IMAGE, "text": "a small red circle", "language": "FR"},
    "captioning": {"image": IMAGE, "text": "a small red circle"},
    "ocr": {"image": IMAGE, "texts": ["red", "cat"], "language": "EN"},
    "vqa": {"image": IMAGE, "question": "what is red ?", "answer": "circle"},
    "vqg": {"image": IMAGE, "question": "what is red ?", "answer": "circle"},
    "object_aware": {"image": IMAGE, "objects": ["cat", "dog"], "absent": ["circle"]},
    "detection": {"image": IMAGE, "objects": [{"label": "cat", "box": [8, 4, 40, 20]}]},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return hfvlm.untrained("pali", tmp_path_factory.mktemp("pali") / "model")


@pytest.fixture(scope="module")
def processor(folder):
    return AutoProcessor.from_pretrained(folder)


def texts(processor, row, **options):
    """The prompt and the answer of a row."""
    image, ids, labels = MixtureCollator(processor, **options).example(row)
    assert (image is None) == (row["task"] == "span_corruption")
    prompt = processor.tokenizer.decode([i for i in ids if i != processor.image_token_id])
    return prompt.removesuffix("</s>"), processor.tokenizer.decode(labels).removesuffix("</s>")


@pytest.mark.parametrize(
    ("task", "prompt", "answer"),
    [
        ("captioning", "Generate the alt_text in EN at 0: <extra_id_0>", "a small red circle"),
        ("ocr", "Generate the ocr_text in EN: <extra_id_0>", "red cat"),
        ("vqa", "Answer in EN: what is red ? <extra_id_0>", "circle"),
        ("vqg", "Generate a question in EN for circle: <extra_id_0>", "what is red ?"),
        ("detection", "detect: <extra_id_0>", "100 100 500 500 cat"),
    ],
)
def test_prompts_and_answers(processor, task, prompt, answer):
    given, wanted = texts(processor, {"task": task, **ROWS[task]})
    assert (given.replace(" <", "<"), wanted) == (prompt.replace(" <", "<"), answer)


def test_captions_are_split_where_the_position_says(processor):
    splits = set()
    for seed in range(12):
        prompt, answer = texts(processor, {"task": "split_captioning", **ROWS["split_captioning"]}, seed=seed)
        begin, _, rest = prompt.removeprefix("Generate the alt_text in FR at ").partition(":")
        known = rest.removesuffix("<extra_id_0>").strip()
        assert int(begin) == len(known)
        assert f"{known} {answer}".strip() == "a small red circle"
        splits.add(int(begin))
    assert len(splits) > 2


def test_questions_about_objects(processor):
    kinds = {}
    for seed in range(30):
        prompt, answer = texts(processor, {"task": "object_aware", **ROWS["object_aware"]}, seed=seed)
        question = prompt.removeprefix("Answer in EN: ").removesuffix("<extra_id_0>").strip()
        kinds.setdefault(question.split(" ")[0], []).append((question, answer))
    assert set(kinds) == {"List", "Is", "Which"}
    assert all(answer == "cat, dog" for _, answer in kinds["List"])
    assert {answer for _, answer in kinds["Is"]} == {"yes", "no"}
    assert all((answer == "no") == ("circle" in question) for question, answer in kinds["Is"])
    assert all(sorted(answer.split(", ")) == ["cat", "dog"] for _, answer in kinds["Which"])


class TestCorruption:
    @pytest.mark.parametrize("count", [2, 5, 40, 512])
    def test_nothing_is_lost(self, count):
        """Each span stands in the labels behind its sentinel, in its order."""
        random = np.random.default_rng(count)
        ids, sentinels = list(range(100, 100 + count)), list(range(50))
        inputs, labels = Corruption()(ids, sentinels, 99, random)
        assert inputs[-1] == labels[-1] == 99
        spans, mark = {}, None
        for token in labels[:-1]:
            mark = token if token < 50 else mark
            spans.setdefault(mark, []).append(token)
        again = [token for i in inputs[:-1] for token in (spans[i][1:] if i < 50 else [i])]
        assert again == ids
        assert list(spans) == sentinels[: len(spans)]

    def test_shares_and_lengths(self):
        random, corruption = np.random.default_rng(0), Corruption(0.3, 4)
        chosen = np.array([corruption.spans(100, random) for _ in range(200)])
        assert (chosen.sum(axis=1) == 30).all()
        starts = chosen & ~np.pad(chosen, ((0, 0), (1, 0)))[:, :-1]
        assert (starts.sum(axis=1) == 8).all()
        assert not chosen[:, 0].any()

    def test_what_cannot_be_corrupted_is_named(self, processor):
        with pytest.raises(ValueError, match="row 0: 'text' is a text, not ''"):
            MixtureCollator(processor)([{"task": "span_corruption", "text": ""}])
        with pytest.raises(ValueError, match=r"corruption\.share"):
            MixtureCollator(processor, corruption=Corruption(share=1.5))


def test_a_batch_of_all_tasks_trains(processor, folder):
    model = AutoModelForImageTextToText.from_pretrained(folder)
    collate = MixtureCollator(processor)
    rows = [{"task": task, **row} for task, row in ROWS.items()]
    batch = collate(rows)
    assert batch["pixel_values"].shape[0] == len(rows) - 1
    assert (batch["input_ids"] == processor.image_token_id).sum(1).tolist() == [0] + [16] * (len(rows) - 1)
    loss = model(**batch).loss
    loss.backward()
    assert torch.isfinite(loss)


def test_what_is_missing_is_named(processor):
    collate = MixtureCollator(processor)
    with pytest.raises(ValueError, match="row 0: a row of the task 'vqa' needs 'answer'"):
        collate([{"task": "vqa", "image": IMAGE, "question": "what ?"}])
    with pytest.raises(ValueError, match="row 0: task must be one of span_corruption, .*detection, not 'sing'"):
        collate([{"task": "sing"}])
    with pytest.raises(ValueError, match="no task is called sing"):
        MixtureCollator(processor, {"sing": ""})
    assert set(PROMPTS) == set(TASKS)


@pytest.mark.parametrize(
    ("task", "field", "value", "message"),
    [
        ("captioning", "text", None, "needs 'text'"),
        ("captioning", "text", 3, "'text' is a text, not 3"),
        ("split_captioning", "text", " ", "'text' is a text, not ' '"),
        ("ocr", "texts", "hello", "'texts' is a list of texts, not 'hello'"),
        ("vqa", "question", 7, "'question' is a text"),
        ("object_aware", "objects", "dog", "'objects' is a list of texts, not 'dog'"),
        ("detection", "objects", ["dog"], "'objects' is a list of objects, each a label and a box"),
        ("detection", "objects", [{"label": "cat", "box": [8, 4, 4, 20]}], "right and below, not"),
        ("detection", "objects", [{"label": "cat", "box": [8, 4, 40, 90]}], "not within the image of 80 x 40 pixels"),
        ("span_corruption", "text", ["a", "b"], "'text' is a text"),
    ],
)
def test_fields_of_another_kind_are_refused(processor, task, field, value, message):
    """Letters of a text would be its words, and None a question."""
    with pytest.raises(ValueError, match=f"row 0: .*{message}"):
        MixtureCollator(processor)([{"task": task, **ROWS[task], field: value}])


def test_fields_that_other_tasks_rows_have_may_be_none(processor):
    row = {"task": "captioning", **ROWS["captioning"]}
    assert texts(processor, {**row, "language": None, "texts": None, "absent": None}) == texts(processor, row)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("a {box} <extra_id_0>", "no field 'box'; there are"), ("{question}", "has no <extra_id_0>")],
)
def test_prompts_that_lack_or_want_something_are_refused(processor, prompt, message):
    with pytest.raises(ValueError, match=message):
        MixtureCollator(processor, {"vqa": prompt})


def test_sources_are_drawn_by_their_weights():
    sources = {task: [row] for task, row in ROWS.items() if task in ("vqa", "vqg", "ocr")}
    drawn = [row["task"] for row in islice(mixed(sources, {"vqa": 3, "vqg": 1, "ocr": 0}), 400)]
    assert set(drawn) == {"vqa", "vqg"}
    assert 250 < drawn.count("vqa") < 350
    with pytest.raises(ValueError, match="each of vqa, vqg, ocr has one|each of"):
        next(mixed(sources, {"vqa": 1}))
    for weights in ({"vqa": -1}, {"vqa": float("nan")}, {"vqa": "1"}):
        with pytest.raises(ValueError, match=r"weights\['vqa'\] must be a finite number"):
            next(mixed({"vqa": sources["vqa"]}, weights))
    with pytest.raises(ValueError, match="sources: ocr: no rows"):
        next(mixed({"ocr": []}, {"ocr": 1}))
