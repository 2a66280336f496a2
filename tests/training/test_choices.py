import json

import av
import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from PIL import Image
from transformers import AutoModelForMultipleChoice, EvalPrediction

from hfvlm.models.merlot_reserve import (
    HfvlmMERLOTReserveAudioConfig,
    HfvlmMERLOTReserveFeatureExtractor,
    HfvlmMERLOTReserveForVideoMultipleChoice,
    HfvlmMERLOTReserveImageProcessor,
    HfvlmMERLOTReserveModel,
    HfvlmMERLOTReserveProcessor,
    HfvlmMERLOTReserveTokenizer,
)
from hfvlm.training.choices import ChoiceCollator, VideoChoiceCollator, choice_accuracies
from hfvlm.training.recipes import run_recipe
from tests.models.merlot_reserve.test_modeling import AUDIO, config
from tests.models.merlot_reserve.vocabulary import written_vocabulary
from tests.support.paths import EXAMPLES


@pytest.fixture
def processor(tmp_path):
    tokenizer = HfvlmMERLOTReserveTokenizer.from_vocabulary(written_vocabulary(tmp_path / "vocabulary.json"))
    size = {"height": 16, "width": 24}
    return HfvlmMERLOTReserveProcessor(
        HfvlmMERLOTReserveImageProcessor(size=size), tokenizer, HfvlmMERLOTReserveFeatureExtractor()
    )


@pytest.fixture
def rows():
    return [
        {
            "image": Image.new("RGB", (24, 16), (60 * i, 90, 0)),
            "question": "who is it ?",
            "choices": ["the dog", "a cat", "nothing"],
            "label": i % 3,
        }
        for i in range(4)
    ]


def test_rows_become_questions_with_labels(processor, rows):
    collator = ChoiceCollator(processor, max_length=12)
    read = [{**collator.read(row, None), "replaced": i} for i, row in enumerate(rows)]
    inputs = collator(read)
    assert inputs["input_ids"].shape == (4, 3, 12)
    assert inputs["pixel_values"].shape == (4, 3, 16, 24)
    assert inputs["labels"].tolist() == [0, 1, 2, 0]
    assert inputs["replaced"].tolist() == [0, 1, 2, 3]
    alone = collator(rows)
    assert "replaced" not in alone
    assert torch.equal(alone["input_ids"], inputs["input_ids"])


def test_reasons_are_a_second_question(processor, rows):
    told = [row | {"reasons": ["it does", "a dog does"], "reason_label": 1} for row in rows]
    with pytest.raises(ValueError, match="as many reasons"):
        ChoiceCollator(processor)(told)
    told = [row | {"reasons": ["it does", "a dog", "a cat"]} for row in told]
    inputs = ChoiceCollator(processor, max_length=16)(told)
    assert inputs["input_ids"].shape == (4, 2, 3, 16)
    assert inputs["labels"].tolist() == [[0, 1], [1, 1], [2, 1], [0, 1]]


def test_what_a_row_lacks_is_named(processor, rows):
    renamed = [{("answers" if name == "choices" else name): value for name, value in rows[0].items()}]
    assert ChoiceCollator(processor, {"choices": "answers"})(renamed)["labels"].tolist() == [0]
    with pytest.raises(KeyError, match="no column choices; it has image, question, answers, label"):
        ChoiceCollator(processor)(renamed)
    with pytest.raises(ValueError, match="label 3 is none of the 3 choices"):
        ChoiceCollator(processor)([rows[0] | {"label": 3}])


def test_accuracy_counts_every_question():
    logits = np.array([[[0.0, 1.0], [1.0, 0.0]], [[0.0, 1.0], [0.0, 1.0]]])
    labels = np.array([[1, 0], [0, 1]])
    assert choice_accuracies(EvalPrediction(predictions=logits, label_ids=labels)) == {"accuracy": 0.75}
    several = EvalPrediction(predictions=(logits, labels), label_ids=labels)
    assert choice_accuracies(several) == {"accuracy": 0.75}


# Videos


def video(seconds=10, fps=3):
    frames = np.random.default_rng(0).integers(0, 255, (seconds * fps, 16, 24, 3), dtype=np.uint8)
    wave = 0.3 * np.sin(np.arange(seconds * 22_050) * 0.1)
    return (frames, float(fps)), (wave.astype(np.float32), 22_050)


def written_video(path):
    (frames, fps), (wave, rate) = video(5)
    with av.open(str(path), "w") as container:
        shown = container.add_stream("libx264", rate=int(fps))
        shown.height, shown.width, shown.pix_fmt = *frames.shape[1:3], "yuv420p"
        heard = container.add_stream("aac", rate=rate, layout="mono")
        for array in frames:
            container.mux(shown.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(shown.encode())
        block = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
        block.sample_rate = rate
        container.mux(heard.encode(block))
        container.mux(heard.encode())
    return path


@pytest.fixture
def video_rows():
    frames, sound = video()
    row = {"video": frames, "audio": sound, "question": "who is it ?", "choices": ["the dog", "a cat"], "label": 1}
    return [row, row | {"start": 2.0, "end": 4.0, "label": 0, "subtitles": [{"start": 2, "end": 3, "text": "a dog"}]}]


def test_rows_with_videos_become_questions_with_labels(processor, video_rows):
    collator = VideoChoiceCollator(processor, num_segments=2, max_length=60)
    inputs = collator(video_rows)
    assert inputs["input_ids"].shape == inputs["audio_input_ids"].shape == (2, 2, 60)
    assert inputs["pixel_values"].shape == (2, 2, 3, 16, 24)
    assert inputs["input_features"].shape == (2, 6, 60, 65)
    assert inputs["labels"].tolist() == [1, 0]
    segments, place = processor.moment(
        video_rows[1]["video"],
        video_rows[1]["audio"],
        span=(2.0, 4.0),
        subtitles=video_rows[1]["subtitles"],
        num_segments=2,
    )
    expected = processor.video_question(
        segments, "who is it ?", ["the dog", "a cat"], place, num_segments=2, max_length=60
    )
    for name, value in expected.items():
        assert torch.equal(inputs[name][1:], value), name
    read = [{**collator.read(row, None), "replaced": i} for i, row in enumerate(video_rows)]
    assert torch.equal(collator(read)["input_ids"], inputs["input_ids"])
    assert collator(read)["replaced"].tolist() == [0, 1]
    with pytest.raises(KeyError, match="no column video"):
        collator([{name: value for name, value in video_rows[0].items() if name != "video"}])
    with pytest.raises(ValueError, match="both start and end"):
        collator([video_rows[0] | {"start": 1.0}])
    with pytest.raises(ValueError, match=r"need as many, not \[2, 3\]"):
        collator([video_rows[0], video_rows[1] | {"choices": ["a", "b", "c"]}])


def test_the_recipe_trains_on_videos(processor, tmp_path):
    """A file of a video with audio, as TVQA's frames and audio are two."""
    torch.manual_seed(0)
    sizes = config()
    sizes.audio_config = HfvlmMERLOTReserveAudioConfig(
        **AUDIO | {"num_frames": 60, "num_channels": 65, "num_tokens": 6}
    )
    HfvlmMERLOTReserveModel(sizes).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    (tmp_path / "questions").mkdir()
    path = written_video(tmp_path / "clip.mp4")
    rows = [
        {"video": str(path), "question": "who is it ?", "choices": ["the dog", "a cat"], "label": i % 2}
        | {"start": 1.0, "end": 3.0, "subtitles": [{"start": 1.0, "end": 2.0, "text": "a dog"}]}
        for i in range(3)
    ]
    for split in ("train", "test"):
        (tmp_path / "questions" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    small = {"model": tmp_path / "model", "dataset": tmp_path / "questions", "output_dir": tmp_path / "out"}
    small |= {"max_steps": 2, "dataloader_num_workers": 0, "bf16": False, "disable_tqdm": True, "warmup_steps": 0}
    small |= {"use_cpu": True, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "lora_rank": 2}
    small |= {"eval_strategy": "no", "model_class": "HfvlmMERLOTReserveForVideoMultipleChoice"}
    small |= {"lora_recipe": "vision+audio+joint"}
    recipe = EXAMPLES / "recipes" / "merlot-reserve-lora.yaml"
    metrics = run_recipe(recipe, [f"{name}={value}" for name, value in small.items()])
    assert metrics["train_loss"] > 0
    assert 0 <= metrics["eval_accuracy"] <= 1
    base = HfvlmMERLOTReserveForVideoMultipleChoice.from_pretrained(tmp_path / "model")
    tuned = PeftModel.from_pretrained(base, tmp_path / "out")
    parts = {key.removeprefix("base_model.model.").partition(".")[0] for key in get_peft_model_state_dict(tuned)}
    assert parts == {"vision_model", "audio_model", "joint", "classifier"}


def test_the_recipe_trains_adapters_and_the_score(processor, rows, tmp_path):
    torch.manual_seed(0)
    model = HfvlmMERLOTReserveModel(config())
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    (tmp_path / "questions").mkdir()
    for i, row in enumerate(rows):
        row["image"].save(tmp_path / f"{i}.png")
    lines = [json.dumps(row | {"image": str(tmp_path / f"{i}.png")}) for i, row in enumerate(rows)]
    for split in ("train", "test"):
        (tmp_path / "questions" / f"{split}.jsonl").write_text("\n".join(lines))
    small = {"model": tmp_path / "model", "dataset": tmp_path / "questions", "output_dir": tmp_path / "out"}
    small |= {"max_steps": 2, "dataloader_num_workers": 0, "bf16": False, "disable_tqdm": True, "warmup_steps": 0}
    small |= {"use_cpu": True, "per_device_train_batch_size": 2, "lora_rank": 2, "eval_strategy": "no"}
    recipe = EXAMPLES / "recipes" / "merlot-reserve-lora.yaml"
    metrics = run_recipe(recipe, [f"{name}={value}" for name, value in small.items()])
    assert metrics["train_loss"] > 0
    assert 0 <= metrics["eval_accuracy"] <= 1
    base = AutoModelForMultipleChoice.from_pretrained(tmp_path / "model")
    tuned = PeftModel.from_pretrained(base, tmp_path / "out")
    parts = {key.removeprefix("base_model.model.").partition(".")[0] for key in get_peft_model_state_dict(tuned)}
    assert parts == {"vision_model", "joint", "classifier"}
