import json
import pickle

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import AutoModelForVisualQuestionAnswering

import hfvlm
from hfvlm.models.vilbert import HfvlmViLBERTProcessor
from hfvlm.models.vilbert.tasks import KINDS, TASKS
from hfvlm.training.recipes import run_recipe
from hfvlm.training.regions import RegionCollator, open_regions
from tests.support.paths import EXAMPLES


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return hfvlm.untrained(
        "vilbert", tmp_path_factory.mktemp("vilbert") / "model", model="HfvlmViLBERTForVisionLanguageTasks"
    )


@pytest.fixture(scope="module")
def processor(folder):
    return HfvlmViLBERTProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def regions(processor, tmp_path_factory):
    """Two images' files, as extract_features.py writes them."""
    boxes = np.array([[10.0, 10.0, 50.0, 40.0], [30.0, 0.0, 90.0, 80.0]])
    return written(tmp_path_factory.mktemp("regions"), processor, boxes)


@pytest.fixture(scope="module")
def many(processor, tmp_path_factory):
    """As many detected regions as questions about pointing need, all in the top left."""
    boxes = np.tile(np.array([[0.0, 0.0, 5.0, 5.0]]), (100, 1))
    return written(tmp_path_factory.mktemp("many"), processor, boxes)


@pytest.fixture(scope="module")
def drawn(processor, tmp_path_factory):
    """Three annotated regions of each image."""
    boxes = np.array([[10.0, 10.0, 30.0, 30.0], [40.0, 10.0, 60.0, 30.0], [70.0, 50.0, 90.0, 70.0]])
    return written(tmp_path_factory.mktemp("drawn"), processor, boxes)


def written(folder, processor, boxes):
    random = np.random.RandomState(len(boxes))
    for name in ("dog", "cat"):
        record = {"features": random.randn(len(boxes), processor.feature_size).astype(np.float32)}
        record |= {"bbox": boxes, "image_width": 100, "image_height": 80}
        np.save(folder / f"{name}.npy", record)
    return folder


def test_regions_are_found_by_the_image_s_name(regions, tmp_path):
    opened = open_regions(regions)
    assert list(opened) == ["cat", "dog"]
    assert len(opened["dog"]) == len(opened["photos/dog.jpg"]) == 2
    with pytest.raises(KeyError, match="no regions of 'bird'"):
        opened["bird"]
    with pytest.raises(ValueError, match="neither a folder of npy files nor an lmdb file"):
        open_regions(tmp_path)


@pytest.mark.parametrize(
    ("task", "row", "rows", "labels"),
    [
        ("vqa", {"labels": [1, 3], "scores": [0.3, 1.0]}, 1, {1: 0.3, 3: 1.0}),
        ("gqa", {"labels": 2}, 1, {2: 1.0}),
        ("visual_entailment", {"labels": "entailment"}, 1, {2: 1.0}),
        ("guesswhat", {"labels": "No"}, 1, {1: 1.0}),
        ("nlvr2", {"image": ["dog", "cat"], "labels": 1}, 2, {1: 1.0}),
        ("refcoco", {"box": [10.0, 10.0, 50.0, 40.0]}, 1, {1: 1.0}),
    ],
)
def test_rows_become_examples_of_a_task(processor, regions, task, row, rows, labels):
    collator = RegionCollator(processor, task, regions, classes={"answer": 6, "gqa": 5})
    row = {"image": "dog", "text": "is it a dog ?"} | row
    inputs = collator([row, row])
    assert len(inputs["input_ids"]) == len(inputs["region_features"]) == 2 * rows
    own = inputs["labels"][0]
    assert {i: round(float(own[i]), 6) for i in labels} == labels
    read = {**collator.read(row, None), "index": 0, "replaced": 2}
    again = pickle.loads(pickle.dumps(collator))([read])  # a loader's worker has a copy, which opens the files itself
    assert torch.equal(again["labels"], inputs["labels"][: len(again["labels"])])
    assert again["replaced"].tolist() == [2]


def test_a_choice_is_of_pairs(processor, regions):
    row = {"text": ["a dog", "a cat", "a dog", "a cat"], "image": ["dog", "dog", "cat", "cat"], "label": 3}
    inputs = RegionCollator(processor, "retrieval_coco", regions)([row])
    assert len(inputs["input_ids"]) == 4
    assert inputs["labels"].tolist() == [3]


def test_referring_expressions_have_annotated_regions_in_training(processor, regions, drawn):
    row = {"image": "dog", "text": "the dog", "box": [40.0, 10.0, 60.0, 30.0]}
    collator = RegionCollator(processor, "refcoco", regions, annotated=drawn)
    trained = collator.read(row, np.random.default_rng(0))
    assert trained["region_mask"].sum() == 1 + 2 + 3
    assert trained["labels"][0].nonzero().flatten().tolist() == [4]
    evaluated = collator.read(row, None)
    assert evaluated["region_mask"].sum() == 1 + 2
    assert 0 < evaluated["labels"].max() < 0.5


@pytest.mark.parametrize("task", ["visual7w", "guesswhat_pointing"])
def test_an_answer_is_one_of_the_annotated_regions(processor, many, drawn, task):
    """Of what the last of two candidates is, in the order of these."""
    row = {"image": "dog", "text": "which one ?", "box": [70.0, 50.0, 90.0, 70.0], "candidates": [0, 2]}
    if task == "guesswhat_pointing":
        row["text"] = [["is it red ?", "yes"], ["is it big ?", "no"]]
    inputs = RegionCollator(processor, task, many, annotated=drawn)([row, row | {"image": "cat"}])
    padding = 204 if task == "guesswhat_pointing" else 2
    assert inputs["candidates"].shape == inputs["labels"].shape == (2, padding)
    assert inputs["candidates"][0, :2].tolist() == [0, 2]
    assert inputs["labels"].nonzero().tolist() == [[0, 1], [1, 1]]
    assert inputs["region_mask"].sum(dim=1).tolist() == [104, 104]
    words = processor.tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=True)
    assert words == processor.tokenizer.decode(
        processor.tokenizer.pieces("start is it red? answer yes stop start is it big? answer no stop")
        if task == "guesswhat_pointing"
        else processor.tokenizer.pieces("which one?")
    )


def test_a_dialogue_has_options_of_each_question(processor, regions):
    texts = ["yes", "no", "a dog", "two", "it is red", "a cat"]
    row = {"image": "dog", "text": "a dog", "turns": [["is it a dog ?", "yes"], ["what is it ?", "a dog"]]}
    row |= {"options": [texts, texts], "labels": [0, 2]}
    collator = RegionCollator(processor, "visual_dialog", regions)
    inputs = collator([row])
    assert len(inputs["input_ids"]) == 2 * 6
    assert inputs["labels"].tolist() == [0, 0]  # the right one comes first
    answers = [processor.tokenizer.pieces(texts[i]) for i in (0, 2)]
    for first, answer in zip(inputs["input_ids"][::6], answers, strict=True):
        question = first.tolist().index(processor.tokenizer.sep_token_id)
        assert first[question + 1 : question + 1 + len(answer)].tolist() == answer
    trained = [collator.read(row, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert [len(example["input_ids"]) for example in trained] == [2 * 4] * 3
    assert torch.equal(trained[0]["input_ids"], trained[1]["input_ids"])
    assert not torch.equal(trained[0]["input_ids"], trained[2]["input_ids"])
    assert torch.equal(trained[0]["input_ids"][::4], inputs["input_ids"][::6])
    with pytest.raises(ValueError, match="label 6 is none of the 6 options"):
        collator([row | {"labels": [0, 6]}])
    with pytest.raises(ValueError, match="2 turns, 1 lists of options and 2 labels"):
        collator([row | {"options": [texts]}])
    with pytest.raises(ValueError, match="all questions of a dialogue need as many"):
        collator([row | {"options": [texts, texts[:3]]}])
    with pytest.raises(ValueError, match=r"options: the rows of a batch of visual_dialog need as many, not \[3, 6\]"):
        collator([row, row | {"options": [texts[:3]] * 2}])


@pytest.mark.parametrize("task", ["vcr_answer", "vcr_rationale"])
def test_words_name_annotated_regions(processor, regions, drawn, task):
    row = {"image": "dog", "names": ["casey", "dog", "riley"], "label": 1}
    row |= {"text": ["what", "is", [0, 1], "doing", "?"], "options": [[[2], "runs"], ["nothing"], ["it", "is"]]}
    row["text"] += ["[SEP]", "nothing"] if task == "vcr_rationale" else []
    inputs = RegionCollator(processor, task, regions, annotated=drawn)([row])
    assert len(inputs["input_ids"]) == 3
    assert inputs["labels"].tolist() == [1]
    assert inputs["region_mask"].sum(dim=1).tolist() == [1 + 2 + 3] * 3
    as_words = row | {"text": [str(word) for word in row["text"]], "options": [["[2]", "runs"], *row["options"][1:]]}
    assert torch.equal(
        RegionCollator(processor, task, regions, annotated=drawn)([as_words])["input_ids"], inputs["input_ids"]
    )
    with pytest.raises(ValueError, match="names: 1 of 3 annotated regions"):
        RegionCollator(processor, task, regions, annotated=drawn)([row | {"names": ["casey"]}])


def test_what_cannot_be_is_refused(processor, regions):
    for task in ("visual7w", "guesswhat_pointing", "vcr_answer"):
        with pytest.raises(ValueError, match=f"annotated: {task} is about regions that people drew"):
            RegionCollator(processor, task, regions)
    with pytest.raises(ValueError, match="image: a row of retrieval_coco has a list of images"):
        RegionCollator(processor, "retrieval_coco", regions)([{"image": "dog", "text": ["a"], "label": 0}])
    with pytest.raises(ValueError, match="labels .'entailment'. are no numbers, nor Yes, No, N/A"):
        RegionCollator(processor, "guesswhat", regions)([{"image": "dog", "text": "a", "labels": "entailment"}])
    with pytest.raises(ValueError, match="task 'dream' is none of vqa"):
        RegionCollator(processor, "dream", regions)
    row = {"image": "dog", "text": "a dog"}
    with pytest.raises(KeyError, match="no column 'box'"):
        RegionCollator(processor, "refcoco", regions)([row])
    with pytest.raises(ValueError, match="1 labels and 2 scores"):
        RegionCollator(processor, "gqa", regions, classes={"gqa": 5})([row | {"labels": 1, "scores": [1.0, 0.0]}])
    with pytest.raises(ValueError, match="labels .'maybe'. are no numbers"):
        RegionCollator(processor, "visual_entailment", regions)([row | {"labels": "maybe"}])


def test_the_recipe_trains_adapters_and_a_head(folder, regions, tmp_path):
    rows = [
        {"image": name, "text": "is it a dog ?", "labels": [i], "scores": [1.0]}
        for i, name in enumerate(("dog", "cat"))
    ]
    (tmp_path / "questions").mkdir()
    for split in ("train", "test"):
        (tmp_path / "questions" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    small = {"model": folder, "dataset": tmp_path / "questions", "output_dir": tmp_path / "out", "regions": regions}
    small |= {"max_steps": 2, "dataloader_num_workers": 0, "bf16": False, "disable_tqdm": True, "warmup_steps": 0}
    small |= {"use_cpu": True, "per_device_train_batch_size": 2, "lora_rank": 2, "eval_strategy": "no"}
    metrics = run_recipe(EXAMPLES / "recipes" / "vilbert-lora.yaml", [f"{k}={v}" for k, v in small.items()])
    assert metrics["train_loss"] > 0
    assert metrics["eval_loss"] > 0
    assert 0 <= metrics["eval_score"] <= 1
    base = AutoModelForVisualQuestionAnswering.from_pretrained(folder)
    state = get_peft_model_state_dict(PeftModel.from_pretrained(base, tmp_path / "out"))
    parts = {key.removeprefix("base_model.model.").partition(".")[0] for key in state}
    assert parts == {"text_model", "vision_model", "connections", "answer_head"}
    assert HfvlmViLBERTProcessor.from_pretrained(tmp_path / "out").feature_size == processor_size(folder)


def row_of(task, image, i):
    """A row of a task, the i-th."""
    text = ["is", "[0]", "it"]
    answers = ["yes", "no", "two", "a dog", "red"]
    reasoned = {"text": text, "options": [["yes"], ["[1]"]], "names": ["a", "b", "c"], "label": i % 2}
    pairs = {"text": ["a dog", "a cat"], "image": [image, "cat"], "label": i % 2}
    own = {
        "pair": {"image": ["dog", image], "labels": [i % 2]},
        "grounding": {"box": [10.0, 10.0, 30.0, 30.0]},
        "pointing": {"box": [10.0, 10.0, 30.0, 30.0], "candidates": [i, (i + 1) % 3]},
        "choice": pairs if task.startswith("retrieval") else reasoned,
        "visual_dialog": {"turns": [["is it ?", "yes"]], "options": [answers], "labels": [i]},
    }
    plain = {"image": image, "text": "is it a dog ?", "labels": [i]}
    return plain | own.get(task, own.get(TASKS[task].kind, {}))


@pytest.mark.parametrize("task", list(TASKS))
def test_every_task_trains_and_is_scored(folder, regions, many, drawn, tmp_path, task):
    """A run's score is the mean of the task's own, over the rows one by one."""
    kind, rows = TASKS[task].kind, [row_of(task, image, i) for i, image in enumerate(("dog", "cat", "dog"))]
    (tmp_path / "rows").mkdir()
    for split in ("train", "test"):
        (tmp_path / "rows" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    small = {"model": folder, "dataset": tmp_path / "rows", "output_dir": tmp_path / "out", "region_task": task}
    small |= {"regions": many if kind == "pointing" else regions, "annotated_regions": drawn, "lora_recipe": "null"}
    small |= {"lora_whole": "null", "max_steps": 1, "dataloader_num_workers": 0, "bf16": False, "disable_tqdm": True}
    small |= {"use_cpu": True, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "warmup_steps": 0}
    small |= {"eval_strategy": "no", "save_strategy": "no"}
    metrics = run_recipe(EXAMPLES / "recipes" / "vilbert-lora.yaml", [f"{k}={v}" for k, v in small.items()])
    model = AutoModelForVisualQuestionAnswering.from_pretrained(tmp_path / "out").eval()
    processor = HfvlmViLBERTProcessor.from_pretrained(tmp_path / "out")
    classes = {"answer": model.config.num_answers, "gqa": model.config.num_gqa_answers}
    collator = RegionCollator(processor, task, small["regions"], classes=classes, annotated=drawn)
    scores = []
    for row in rows:
        inputs = collator([row])
        with torch.no_grad():
            output = model(**inputs, task=task)
        logits = output[KINDS[kind].head]
        scores.append(float(TASKS[task].score(logits, inputs["labels"], inputs.get("candidates"))))
    assert metrics["eval_score"] == pytest.approx(np.mean(scores), abs=1e-6)
    assert metrics["eval_loss"] > 0


def processor_size(folder):
    return HfvlmViLBERTProcessor.from_pretrained(folder).feature_size
