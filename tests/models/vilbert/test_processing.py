import pickle
import random
import sys
import types

import numpy as np
import pytest
import torch
from transformers import AutoProcessor
from transformers.models.detr.modeling_detr import DetrObjectDetectionOutput

from hfvlm.media.errors import MediaError
from hfvlm.models.vilbert import HfvlmViLBERTProcessor, HfvlmViLBERTTokenizer
from hfvlm.models.vilbert import processing_vilbert_tasks as examples
from hfvlm.models.vilbert.processing_vilbert_pretraining import masked_example
from hfvlm.models.vilbert.regions import (
    RegionFile,
    Regions,
    detected_regions,
    overlaps,
    read_npy,
    read_record,
    regions_of_record,
)
from hfvlm.models.vilbert.tasks import DETECTED, TASKS, Task
from tests.support.suite import close

PIECES = (
    "[PAD] [UNK] [CLS] [SEP] [MASK] a man dog cat rid ##ing # the red on left ? is it yes no start stop answer riley"
)
WORDS = PIECES.split()
SMALL = Task(1, "answer", 8, 4)


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join(WORDS) + "\n")
    return HfvlmViLBERTProcessor(HfvlmViLBERTTokenizer.from_vocabulary(path, model_max_length=32), feature_size=6)


def found(count=3, seed=0, **fields):
    state = np.random.RandomState(seed)
    corners = state.uniform(0, 40, (count, 2))
    boxes = np.concatenate([corners, corners + state.uniform(5, 50, (count, 2))], axis=1)
    return Regions(state.randn(count, 6), boxes, 100, 90, **fields)


# Regions


def test_the_whole_image_comes_first():
    regions = Regions([[1.0, 2.0], [3.0, 6.0]], [[10, 0, 60, 45], [0, 0, 100, 90]], 100, 90)
    features, locations, boxes = regions.with_mean()
    assert features.tolist() == [[2, 4], [1, 2], [3, 6]]
    close(
        torch.from_numpy(locations),
        torch.tensor([[0, 0, 1, 1, 1], [0.1, 0, 0.6, 0.5, 0.25], [0, 0, 1, 1, 1]]),
        1e-6,
        "",
    )
    assert boxes[0].tolist() == [0, 0, 100, 90]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (([[1.0]], [[0, 0, 1]], 9, 9), r"boxes \(n, 4\), not \(1, 1\) and \(1, 3\)"),
        (([[1.0]], [[0, 0, 1, 1], [0, 0, 1, 1]], 9, 9), r"\(2, 4\)"),
        (([[np.nan]], [[0, 0, 1, 1]], 9, 9), "features: contains NaN"),
        (([[1.0]], [[5, 0, 1, 1]], 9, 9), "ends before it begins"),
        (([[1.0]], [[0, 0, 1, 1]], 0, 9), "0 x 9 pixels"),
        (([[1.0]], [[0, 0, 1, 1]], 9, 9, [[0.5], [0.5]]), "2, 1.* of 1 regions"),
    ],
)
def test_arrays_that_are_no_regions_are_refused(arrays, message):
    with pytest.raises(MediaError, match=message):
        Regions(*arrays)


def test_overlaps_count_pixels():
    boxes = np.array([[0, 0, 9, 9], [0, 0, 4, 9], [20, 20, 29, 29]])
    assert overlaps(boxes, [0, 0, 9, 9]).tolist() == [1, 0.5, 0]
    assert overlaps(boxes, boxes).shape == (3, 3)


def record(name="7"):
    regions = found()
    return {
        "image_id": name,
        "image_h": 90,
        "image_w": 100,
        "num_boxes": 3,
        "boxes": regions.boxes,
        "features": regions.features,
    }


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_records_of_any_protocol_are_read(protocol):
    regions = regions_of_record(read_record(pickle.dumps(record(), protocol)))
    close(torch.from_numpy(regions.features), torch.from_numpy(found().features), 0.0, "features")
    assert (regions.width, regions.height) == (100, 90)


class Harmful:
    def __reduce__(self):
        return (print, ("run",))


def test_records_run_nothing(capsys):
    with pytest.raises(MediaError, match=r"builtins\.print, and only arrays"):
        read_record(pickle.dumps({"features": Harmful()}), "bad.lmdb")
    assert capsys.readouterr().out == ""
    with pytest.raises(MediaError, match="no record"):
        read_record(b"nothing")
    with pytest.raises(MediaError, match="has no boxes or bbox; it has features"):
        regions_of_record({"features": np.ones((1, 2))})
    with pytest.raises(MediaError, match="no features of 3 boxes"):
        regions_of_record(record() | {"features": np.ones(7)})


def test_npy_files_of_the_authors_are_read(tmp_path):
    regions = found()
    info = {
        "image_id": "7",
        "image_height": 90,
        "image_width": 100,
        "bbox": regions.boxes,
        "features": regions.features,
    }
    np.save(tmp_path / "7.npy", info | {"cls_prob": np.full((3, 5), 0.2, dtype=np.float32)})
    read = read_npy(tmp_path / "7.npy")
    close(torch.from_numpy(read.boxes), torch.from_numpy(regions.boxes), 0.0, "boxes")
    assert read.probabilities.shape == (3, 5)
    np.save(tmp_path / "array.npy", regions.features)
    with pytest.raises(MediaError, match=r"array \(3, 6\) of float32, not a dictionary"):
        read_npy(tmp_path / "array.npy")
    np.save(tmp_path / "bad.npy", np.array(Harmful(), dtype=object))
    with pytest.raises(MediaError, match="only arrays"):
        read_npy(tmp_path / "bad.npy")


def test_lmdb_files_of_the_authors_are_read(tmp_path, monkeypatch):
    """By lmdb where it is installed, else by a stand-in of the three calls that are used."""
    stored = {b"keys": pickle.dumps([b"7", b"9"]), b"7": pickle.dumps(record())}
    try:
        import lmdb

        with lmdb.open(str(tmp_path), map_size=2**24) as file, file.begin(write=True) as transaction:
            for key, value in stored.items():
                transaction.put(key, value)
    except ImportError:
        monkeypatch.setitem(sys.modules, "lmdb", types.SimpleNamespace(open=lambda *_, **__: Stored(stored)))
    file = RegionFile(tmp_path)
    assert list(file) == ["7", "9"]
    close(torch.from_numpy(file[7].features), torch.from_numpy(found().features), 0.0, "features")
    with pytest.raises(KeyError, match="has no image 8"):
        file[8]
    assert "8" not in file
    with pytest.raises(MediaError, match="no such file"):
        RegionFile(tmp_path / "other")


class Stored:
    """The part of lmdb that a reader uses."""

    def __init__(self, stored):
        self.stored = stored

    def begin(self, *, write):
        assert not write
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def get(self, key):
        return self.stored.get(key)


def test_without_lmdb_the_command_that_installs_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(ImportError, match=r"pip install 'hfvlm\[regions\]'"):
        RegionFile(tmp_path)


def test_a_detector_of_transformers_gives_regions():
    output = DetrObjectDetectionOutput(
        logits=torch.tensor([[[0.0, 1.0, 5.0], [4.0, 0.0, 0.0], [0.0, 2.0, 1.0]]]),
        pred_boxes=torch.tensor([[[0.5, 0.5, 0.1, 0.1], [0.5, 0.5, 1.0, 0.5], [0.1, 0.1, 0.4, 0.2]]]),
        last_hidden_state=torch.arange(12.0).reshape(1, 3, 4),
    )
    (regions,) = detected_regions(output, [(90, 100)], most=2)
    assert regions.features.tolist() == [[4, 5, 6, 7], [8, 9, 10, 11]]
    close(torch.from_numpy(regions.boxes), torch.tensor([[0, 22.5, 100, 67.5], [0, 0, 30, 18]]), 1e-6, "boxes")
    close(torch.from_numpy(regions.probabilities), output.logits[0, 1:].softmax(-1), 1e-6, "probabilities")
    (sure,) = detected_regions(output, [(90, 100)], threshold=0.9)
    assert len(sure) == 1
    (sigmoid,) = detected_regions(output, [(90, 100)], background=False)
    assert sigmoid.features[0, 0] == 0
    with pytest.raises(ValueError, match="token for each box, as DETR"):
        detected_regions(DetrObjectDetectionOutput(logits=output.logits), [(90, 100)])
    with pytest.raises(ValueError, match="sizes has 2 images"):
        detected_regions(output, [(90, 100)] * 2)


# The processor


def test_texts_and_regions_are_padded_to_the_longest_or_as_a_task(processor):
    inputs = processor(text=["a man", "the red dog on the left"], regions=[found(3), found(2)])
    assert inputs["input_ids"].shape == (2, 8)
    assert inputs["region_features"].shape == (2, 4, 6)
    assert inputs["region_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert inputs["region_locations"][0, 0].tolist() == [0, 0, 1, 1, 1]
    inputs = processor(text="a man", regions=found(3), task="vqa")
    assert inputs["input_ids"].shape == (1, 23)
    assert inputs["region_features"].shape == (1, 101, 6)
    assert inputs["task_ids"].tolist() == [1]
    assert "region_mask" not in processor(text="a man")
    assert isinstance(processor(regions=found(), return_tensors=None)["region_mask"], list)
    assert isinstance(processor(regions=found(), return_tensors="np")["region_mask"], np.ndarray)
    few = HfvlmViLBERTProcessor(processor.tokenizer, feature_size=6, max_regions=3)
    assert few(regions=found(9))["region_mask"].shape == (1, 3)


def test_what_the_processor_cannot_take_is_refused(processor):
    with pytest.raises(ValueError, match="needs text, regions or both"):
        processor()
    with pytest.raises(ValueError, match="1 texts and regions of 2 images"):
        processor(text="a man", regions=[found(), found()])
    with pytest.raises(ValueError, match="features of 2 numbers, the model takes 6"):
        processor(regions=Regions([[1.0, 2.0]], [[0, 0, 1, 1]], 9, 9))
    with pytest.raises(TypeError, match=r"regions\.Regions, not ndarray"):
        processor(regions=[np.ones((3, 6))])
    with pytest.raises(TypeError, match="region"):
        processor(text="a man", region=found())
    with pytest.raises(ValueError, match="feature_size must be an integer"):
        HfvlmViLBERTProcessor(processor.tokenizer, feature_size=0)
    with pytest.raises(ValueError, match="padding_side must be 'right'"):
        processor(text="a man", padding_side="left")


def test_it_survives_a_round_trip(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is HfvlmViLBERTProcessor
    assert again.feature_size == 6
    expected = processor(text="a man riding", regions=found(), task="vqa")
    for name, value in again(text="a man riding", regions=found(), task="vqa").items():
        assert torch.equal(value, expected[name]), name


# Tasks


def words_of(processor, inputs, row=0):
    ids = inputs["input_ids"][row][inputs["attention_mask"][row] == 1]
    return " ".join(processor.tokenizer.convert_ids_to_tokens(ids))


def test_answers_have_shares(processor):
    example = examples.classified(processor, SMALL, "is it red ?", found(), {1: 0.6, 3: 1.0}, 4)
    close(example["labels"], torch.tensor([[0, 0.6, 0, 1.0]]), 1e-6, "labels")
    assert words_of(processor, example) == "[CLS] is it red ? [SEP]"
    with pytest.raises(ValueError, match=r"\[4\] are none of the model's 4"):
        examples.classified(processor, SMALL, "is it red ?", found(), {4: 1.0}, 4)


def test_pairs_are_padded_each_for_itself_unless_as_released(processor):
    task = Task(12, "pair", 8, 4)
    images = found(2), found(3, seed=1)
    example = examples.paired(processor, task, "a man", images, {1: 1.0})
    assert example["region_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert example["labels"].tolist() == [[0, 1]]
    released = examples.paired(processor, task, "a man", images, {1: 1.0}, as_released=True)
    assert released["region_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    full = found(3), found(3, seed=1)
    pair = (examples.paired(processor, task, "a man", full, {1: 1.0}, as_released=each) for each in (False, True))
    first, second = pair
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_grounding_adds_the_truth_in_training(processor):
    task, detected, truth = Task(9, "grounding", 8, 6), found(2), found(2, seed=5)
    box = truth.boxes[1]
    example = examples.grounded(processor, task, "the red dog", detected, box, truth)
    assert example["region_mask"].tolist() == [[1, 1, 1, 1, 1, 0]]
    assert example["labels"][0, 4] == 1
    assert ((example["labels"] == 0) | (example["labels"] >= 0.5)).all()
    alone = examples.grounded(processor, task, "the red dog", detected, box)
    close(alone["labels"][0, 1:3], torch.from_numpy(overlaps(detected.boxes, box)), 1e-6, "overlaps")


def test_pointing_picks_annotated_regions(processor):
    task, detected, truth = Task(4, "pointing", 8, 106), found(DETECTED - 1), found(3, seed=5)
    example = examples.pointed(processor, task, "the dog", detected, truth, truth.boxes[1], [0, 1], most=3)
    assert example["candidates"].tolist() == [[0, 1, 4]]
    assert example["labels"][0, 1] == 1
    assert example["labels"][0, 2] == 0
    with pytest.raises(ValueError, match="100 detected regions, not 3"):
        examples.pointed(processor, task, "the dog", found(3), truth, truth.boxes[1], [0])
    with pytest.raises(ValueError, match=r"\[3\] are none of the 3"):
        examples.pointed(processor, task, "the dog", detected, truth, truth.boxes[1], [3])
    assert examples.guesswhat_text([("is it red ?", "yes")]) == "start is it red ? answer yes stop "


def test_dialogues_cut_their_history_from_the_front(processor):
    task = Task(3, "choice", 12, 4)
    turns = [("is it red", "yes"), ("is it a dog", "no")]
    example = examples.conversed(processor, task, "a man", turns, [["yes", "no"], ["no", "yes"]], found())
    assert words_of(processor, example, 0) == "[CLS] is it red [SEP] yes [SEP] a man [SEP]"
    assert words_of(processor, example, 2) == "[CLS] is it a dog [SEP] no [SEP] [SEP] a man [SEP]"
    assert example["token_type_ids"][0].tolist() == [0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0]
    assert example["labels"].tolist() == [0, 0]
    np.random.seed(0)
    options = examples.dialog_options(7)
    assert options[0] == 7
    assert len(set(options)) == 4


def test_reasoning_encodes_words_twice(processor):
    task = Task(5, "choice", 12, 6)
    example = examples.reasoned(
        processor,
        task,
        ["is", [0], "riding", "?"],
        [["yes"], ["no", [0, 1]]],
        ["riley", "dog"],
        found(2),
        found(2, 5),
        1,
    )
    assert words_of(processor, example, 0) == "[CLS] is riley rid # # [UNK] ? [SEP] yes [SEP]"
    assert example["region_mask"].tolist() == [[1, 1, 1, 1, 1, 0]] * 2
    first, second = (each.with_mean()[0][0] for each in (found(2), found(2, 5)))
    close(example["region_features"][0, 0], torch.from_numpy((first + second) / 2), 1e-5, "mean of both")
    random.seed(0)
    assert examples.person_names(["person", "dog"], ["riley"]) == ["riley", "dog"]


def test_retrieval_draws_others(processor):
    random.seed(0)
    np.random.seed(0)
    captions = {"a": ["a man"], "b": ["a dog"], "c": ["a cat"]}
    for _ in range(20):
        caption, other, hard = examples.retrieval_negatives("a", list(captions), captions, ["a", "c"])
        assert caption in ("a dog", "a cat")
        assert other in ("b", "c")
        assert hard == "a cat"
    with pytest.raises(ValueError, match="no other image"):
        examples.retrieval_negatives("a", ["a"], captions)
    task = TASKS["retrieval_coco"]
    pairs = [examples.retrieved(processor, task, ["a man", "a dog"], [found()] * 2) for _ in range(3)]
    batch = processor.collate(pairs)
    assert batch["input_ids"].shape == (6, 30)
    assert batch["labels"].tolist() == [0, 0, 0]


# Pretraining


def test_words_and_regions_are_masked_at_their_rates(processor):
    random.seed(0)
    np.random.seed(0)
    regions, text = found(30, probabilities=np.full((30, 5), 0.2)), "a man riding a red dog on the left " * 3
    rows = [masked_example(processor, text, regions, others=["no cat"]) for _ in range(100)]
    batch = processor.collate(rows)
    swapped = batch["alignment_labels"].float().mean()
    assert 0.35 < swapped < 0.65
    words = batch["mlm_labels"][batch["alignment_labels"] == 0]
    assert 0.1 < (words >= 0).float().sum() / (len(words) * 30) < 0.2
    chosen = batch["region_labels"] == 1
    assert 0.12 < chosen[:, :30].float().mean() < 0.18
    assert not chosen[:, 30:].any()
    emptied = (batch["region_features"][:, 1:] == 0).all(-1)
    assert 0.8 < emptied[chosen].float().mean() < 1
    assert not emptied[:, :30][~chosen[:, :30]].any()


def test_nothing_is_masked_where_it_is_not_wanted(processor):
    example = masked_example(processor, "a man", found(), features_as_targets=True, mask=False, most_regions=5)
    assert (example["mlm_labels"] == -1).all()
    assert (example["region_labels"] == -1).all()
    close(example["region_features"][0, 0], torch.from_numpy(found().features.mean(0)), 1e-5, "mean")
    close(example["region_targets"][0, :3], torch.from_numpy(found().features), 0.0, "targets")
    with pytest.raises(ValueError, match="no probabilities"):
        masked_example(processor, "a man", found())
