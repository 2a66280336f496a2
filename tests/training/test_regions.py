import json
import pickle

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import AutoModelForVisualQuestionAnswering

import hfvlm
from hfvlm.models.vilbert import HfvlmViLBERTProcessor
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
    folder, random = tmp_path_factory.mktemp("regions"), np.random.RandomState(0)
    for name in ("dog", "cat"):
        record = {"features": random.randn(2, processor.feature_size).astype(np.float32)}
        record |= {"bbox": np.array([[10.0, 10.0, 50.0, 40.0], [30.0, 0.0, 90.0, 80.0]])}
        record |= {"image_width": 100, "image_height": 80}
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


def test_what_cannot_be_is_refused(processor, regions):
    with pytest.raises(ValueError, match="no examples of visual7w; they are of vqa"):
        RegionCollator(processor, "visual7w", regions)
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
    base = AutoModelForVisualQuestionAnswering.from_pretrained(folder)
    state = get_peft_model_state_dict(PeftModel.from_pretrained(base, tmp_path / "out"))
    parts = {key.removeprefix("base_model.model.").partition(".")[0] for key in state}
    assert parts == {"text_model", "vision_model", "connections", "answer_head"}
    assert HfvlmViLBERTProcessor.from_pretrained(tmp_path / "out").feature_size == processor_size(folder)


def processor_size(folder):
    return HfvlmViLBERTProcessor.from_pretrained(folder).feature_size
