"""`hfvlm eval` on the small CLIP that ships with hfvlm: it was trained on such scenes."""

import json
import shutil

import numpy as np
import pytest
import soundfile
import torch
from transformers import AutoModel, AutoProcessor, pipeline
from typer.testing import CliRunner

import hfvlm
from hfvlm.cli.commands import app
from hfvlm.evaluation.comparison import compare
from hfvlm.evaluation.tasks import Data, evaluate
from hfvlm.inference import zero_shot
from hfvlm.inference.templates import SETS, template_set
from hfvlm.inference.zero_shot import ZeroShotClassifier
from hfvlm.media.images import read_image
from hfvlm.samples import scenes

CLASSES = ("circle", "square", "triangle", "cross")


@pytest.fixture(scope="module")
def by_class(tmp_path_factory):
    """Images in folders of their classes."""
    folder = tmp_path_factory.mktemp("classes")
    random = np.random.RandomState(0)
    for split, count in (("train", 2), ("test", 1)):
        for i, kind in enumerate([kind for kind in scenes.all_scenes() for _ in range(count)]):
            (folder / split / kind.shape).mkdir(parents=True, exist_ok=True)
            kind.render(random).save(folder / split / kind.shape / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """Images with two captions, a question and ten answers each."""
    folder = tmp_path_factory.mktemp("captions") / "test"
    folder.mkdir()
    random = np.random.RandomState(0)
    with (folder / "metadata.jsonl").open("w") as metadata:
        for i, kind in enumerate(scenes.all_scenes()[:20]):
            kind.render(random).save(folder / f"{i}.png")
            row = {"file_name": f"{i}.png", "captions": [kind.caption(t) for t in scenes.TEMPLATES[:2]]}
            metadata.write(json.dumps(row | {"question": "what shape?", "answers": [kind.shape] * 10}) + "\n")
    return folder.parent


def value(report, metric):
    return next(result for result in report.results if result.metric == metric)


def test_zero_shot_equals_the_same_by_hand(clip_folder, by_class):
    report = evaluate("zero-shot", clip_folder, Data(str(by_class)), templates="a {}")
    model, processor = AutoModel.from_pretrained(clip_folder), AutoProcessor.from_pretrained(clip_folder)
    rows = Data(str(by_class)).rows()
    names = rows.features["label"].names
    with torch.no_grad():
        output = model(
            **processor(images=list(rows["image"]), text=[f"a {name}" for name in names], return_tensors="pt")
        )
    right = (output.logits_per_image.argmax(1).numpy() == np.array(rows["label"])).mean()
    found = value(report, "accuracy")
    assert found.value == pytest.approx(right)
    assert found.low <= found.value <= found.high
    assert right > 0.5
    assert len(report.mistakes) == min(24, round((1 - right) * 48))


def test_retrieval_equals_the_trainers(clip_folder, captioned, tmp_path):
    report = evaluate("retrieval", clip_folder, Data(str(captioned)))
    rows = Data(str(captioned)).rows()
    arguments = hfvlm.ContrastiveTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True)
    trainer = hfvlm.ContrastiveTrainer(
        AutoModel.from_pretrained(clip_folder), arguments, eval_dataset=rows,
        processing_class=AutoProcessor.from_pretrained(clip_folder),
    )  # fmt: skip
    metrics = trainer.evaluate()
    for direction in ("image to text", "text to image"):
        for k in (1, 5, 10):
            name = f"eval_{direction.replace(' ', '_')}_recall@{k}"
            assert value(report, f"{direction} recall@{k}").value == pytest.approx(metrics[name])


def test_probes_learn_from_the_training_rows(clip_folder, by_class):
    probe = evaluate("linear-probe", clip_folder, Data(str(by_class)))
    assert value(probe, "accuracy").value > 0.85
    assert "C chosen on" in probe.protocol
    shots = evaluate("few-shot", clip_folder, Data(str(by_class)), shots=(1, 4, 16, 100))
    curve = [result.value for result in shots.results]
    assert [result.metric for result in shots.results] == [f"accuracy, {n} shots" for n in (1, 4, 16)]
    assert curve[0] < curve[-1]


def test_captions_and_answers_are_generated_and_scored(small_blip, captioned):
    blip_folder = small_blip("HfvlmBLIPForConditionalGeneration")
    report = evaluate("caption", blip_folder, Data(str(captioned)), generate={"max_new_tokens": 5})
    metrics = {result.metric for result in report.results}
    assert metrics == {"BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr-D"}
    assert len(report.mistakes) == 20
    captioner = hfvlm.Captioner.from_pretrained(blip_folder, device="cpu")
    images = list(Data(str(captioned)).rows()["image"])
    several = captioner(images[:5], batch_size=2, max_new_tokens=5)
    assert several[0] == captioner(images[0], max_new_tokens=5)
    assert len(several) == 5
    vqa = evaluate("vqa", blip_folder, Data(str(captioned)), generate={"max_new_tokens": 2})
    assert 0 <= value(vqa, "VQA accuracy").value <= 1


def test_candidates_are_ranked_again_by_matching(small_blip, captioned, clip_folder):
    folder = small_blip("HfvlmBLIPForImageTextRetrieval")
    images, texts = list(Data(str(captioned)).rows()["image"])[:4], ["a circle", "a square", "what shape ?"]
    per_image, per_text = hfvlm.rerank(folder, images, texts, top_k=2)
    assert (per_image.shape, per_text.shape) == ((4, 3), (3, 4))
    assert ((per_image > -100).sum(1) == 2).all()
    assert ((per_text > -100).sum(1) == 2).all()
    with pytest.raises(ValueError, match="HfvlmCLIPModel has only embeddings"):
        hfvlm.rerank(clip_folder, images, texts)


def test_the_pipeline_that_answers_questions(small_blip, captioned):
    folder = small_blip("HfvlmBLIPForQuestionAnswering")
    answer = pipeline("visual-question-answering", model=str(folder), device="cpu")
    images = Data(str(captioned)).rows()["image"]
    image = read_image(images[0])
    found = answer(image, "what shape?", max_new_tokens=4)
    captioner = hfvlm.Captioner.from_pretrained(folder, device="cpu")
    assert found == [{"answer": captioner(image, "what shape?", max_new_tokens=4)}]
    several = answer([image, read_image(images[1])], "what shape?", max_new_tokens=4)
    assert several[0] == found
    assert len(several) == 2
    assert answer({"image": image, "question": "what shape?"}, max_new_tokens=4) == found
    assert answer(image, "what?", answers=["circle", "square"])[0]["answer"] in ("circle", "square")
    with pytest.raises(ValueError, match="3 images and 2 questions are no pairs"):
        answer([image] * 3, ["what?"] * 2)


def test_a_report_is_written_and_goes_into_the_card(clip_folder, by_class, tmp_path):
    import shutil

    folder = shutil.copytree(clip_folder, tmp_path / "model")
    command = ["eval", str(folder), "--task", "zero-shot", "--data", str(by_class), "-o", str(tmp_path / "report")]
    result = CliRunner().invoke(app, [*command, "--templates", "single", "--limit", "30", "--card"])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["rows"] == 30
    assert report["protocol"] == {"templates": "single", "classes": 4, "split": "test"}
    page = (tmp_path / "report" / "report.html").read_text()
    assert "data:image/png;base64" in page
    assert page.count("<figure>") == len(report["mistakes"])
    card = (folder / "README.md").read_text()
    accuracy = next(r["value"] for r in report["results"] if r["metric"] == "accuracy")
    assert f"{accuracy:.4f}".rstrip("0") in card


def test_class_weights_are_means_over_names_and_templates(clip_folder, monkeypatch):
    monkeypatch.setattr(zero_shot, "BATCH_SIZE", 7)
    names, templates = {"square": ["square", "blue square"], "circle": ["circle"]}, ["{}", "a {}.", "one {}", "{} x"]
    classifier = ZeroShotClassifier.from_pretrained(clip_folder, names, templates)
    for found, own in zip(classifier.weights, names.values(), strict=True):
        texts = [template.replace("{}", name) for name in own for template in templates]
        mean = classifier.embedder.encode(text=texts).mean(axis=0)
        np.testing.assert_allclose(found, mean / np.linalg.norm(mean), atol=1e-6)
    with pytest.raises(ValueError, match="Class 'none' has no names"):
        ZeroShotClassifier(classifier.embedder, {"none": []})


def test_class_weights_are_kept_by_their_content(clip_folder, tmp_path):
    first = ZeroShotClassifier.from_pretrained(clip_folder, CLASSES, "imagenet-7", cache=tmp_path)
    kept = list(tmp_path.glob("*.npy"))
    assert len(kept) == 1
    stamp = kept[0].stat().st_mtime_ns
    again = ZeroShotClassifier.from_pretrained(clip_folder, CLASSES, "imagenet-7", cache=tmp_path)
    assert np.array_equal(first.weights, again.weights)
    assert kept[0].stat().st_mtime_ns == stamp
    ZeroShotClassifier.from_pretrained(clip_folder, CLASSES, "single", cache=tmp_path)
    other = ZeroShotClassifier.from_pretrained(clip_folder, {name: [name] for name in CLASSES}, "imagenet-7")
    assert len(list(tmp_path.glob("*.npy"))) == 2
    np.testing.assert_allclose(other.weights, first.weights, atol=1e-6)
    image = scenes.all_scenes()[0].render(np.random.RandomState(0))
    best = first.predict(image, top_k=4)
    assert sum(share for _, share in best) == pytest.approx(1, abs=1e-5)
    assert first.predict([image], top_k=1) == [best[:1]]


def test_templates():
    assert [len(SETS[name]) for name in ("single", "imagenet-7", "imagenet", "imagenet-zh")] == [1, 7, 80, 80]
    assert set(SETS["imagenet-7"]) < set(SETS["imagenet"])
    assert template_set("a scan of {}") == ("a scan of {}",)
    with pytest.raises(ValueError, match="No set of templates is called 'all'"):
        template_set("all")
    with pytest.raises(ValueError, match="a template has one"):
        template_set(["{} {}"])


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("guess", {}, "No task is called 'guess'; there are zero-shot"),
        ("zero-shot", {}, "has no column for label; name one of image, captions"),
        ("vqa", {"columns": {"question": "query"}}, "has no column for question"),
    ],
)
def test_tasks_that_cannot_be_evaluated_are_refused(task, options, message, clip_folder, captioned):
    with pytest.raises(ValueError, match=message):
        evaluate(task, clip_folder, Data(str(captioned), **options))


# Damaged rows, other media, two models


@pytest.fixture
def damaged(by_class, tmp_path):
    """The folder by classes, with damaged images among those that are judged and those that are learnt from."""
    folder = tmp_path / "damaged"
    shutil.copytree(by_class, folder)
    for split, count in (("test", 2), ("train", 1)):
        for path in sorted((folder / split).rglob("*.png"))[:count]:
            path.write_bytes(path.read_bytes()[:40])
    return folder


@pytest.mark.parametrize("task", ["zero-shot", "linear-probe", "few-shot"])
def test_damaged_rows_are_left_out_and_counted(task, clip_folder, by_class, damaged, tmp_path):
    options = {"shots": [1]} if task == "few-shot" else {}
    whole = hfvlm.evaluate(task, clip_folder, Data(str(by_class)), **options)
    report = hfvlm.evaluate(task, clip_folder, Data(str(damaged)), **options)
    assert report.rows == whole.rows - 2
    assert list(report.errors) == [0, 1]
    assert report.errors[0].startswith(str(damaged / "test"))
    if task != "few-shot":
        kept = {row: hit for row, hit in whole.each["accuracy"].items() if row > 1}
        assert set(report.each["accuracy"]) == set(kept)
    if task == "zero-shot":
        assert report.each["accuracy"] == kept
    report.write(tmp_path)
    written = json.loads((tmp_path / "report.json").read_text())
    assert (written["unreadable"], written["rows"], written["about"]["of"]) == (2, report.rows, whole.rows)
    assert written["about"]["dtype"] == "float32"
    assert written["about"]["columns"] == {"image": "image", "label": "label"}
    assert {"torch", "transformers", "python", "hfvlm"} <= written["versions"].keys()
    assert "2 more cannot be read" in report.for_card()[0]["protocol"]
    assert "cannot be read" in (tmp_path / "report.html").read_text()


def test_rows_without_texts_are_left_out_of_retrieval(clip_folder, captioned, tmp_path):
    folder = tmp_path / "captioned"
    shutil.copytree(captioned, folder)
    for path in folder.rglob("metadata.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        name = next(name for name in rows[0] if name in ("text", "caption", "captions"))
        rows[1][name] = None
        path.write_text("\n".join(map(json.dumps, rows)))
    report = hfvlm.evaluate("retrieval", clip_folder, Data(str(folder)))
    assert list(report.errors) == [1]
    assert "text: text: a caption or a list of captions is needed" in report.errors[1]
    assert 1 not in report.each["image to text recall@1"]
    result = CliRunner().invoke(app, ["eval", str(clip_folder), "--task", "retrieval", "--data", str(folder)])
    assert result.exit_code == 0, result.output
    assert "rows could not be read and are left out:\n  row 1: text" in result.output


@pytest.fixture(scope="module")
def scenes_of_sensors(tmp_path_factory):
    """Six rows of audio with texts and depth, in a table; the audio of one is damaged."""
    import datasets

    folder = tmp_path_factory.mktemp("sensors")
    random = np.random.RandomState(0)
    rows = []
    for i in range(6):
        soundfile.write(folder / f"{i}.wav", random.randn(16000).astype(np.float32) / 10, 16000)
        np.save(folder / f"{i}.npy", random.rand(40, 40).astype(np.float32) * 4 + 1)
        rows.append({"audio": str(folder / f"{i}.wav"), "depth": str(folder / f"{i}.npy"), "text": f"sound {i}"})
        rows[-1]["label"] = "rain" if i % 2 else "wind"
    (folder / "3.wav").write_bytes(b"RIFF")
    (folder / "table").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(folder / "table" / "test.parquet")
    return folder / "table"


def test_any_modality_by_any_other(imagebind_folder, scenes_of_sensors):
    data = Data(str(scenes_of_sensors))
    report = hfvlm.evaluate("retrieval", imagebind_folder, data)
    assert {r.metric.split(" recall")[0] for r in report.results} == {
        "text to audio", "audio to text", "text to depth", "depth to text", "audio to depth", "depth to audio",
    }  # fmt: skip
    assert (report.rows, list(report.errors)) == (5, [3])
    some = hfvlm.evaluate("retrieval", imagebind_folder, data, between=["audio", "text"])
    embedder = hfvlm.Embedder.from_pretrained(imagebind_folder)
    rows = [0, 1, 2, 4, 5]
    audio = embedder.encode(audio=[str(scenes_of_sensors.parent / f"{i}.wav") for i in rows])
    scores = audio @ embedder.encode(text=[f"sound {i}" for i in rows]).T
    expected = {row: float(scores[i, i] >= scores[i].max()) for i, row in enumerate(rows)}
    assert some.each["audio to text recall@1"] == expected
    by_label = hfvlm.evaluate("zero-shot", imagebind_folder, data, modality="audio", labels=["rain", "wind"])
    assert (by_label.rows, list(by_label.errors), by_label.protocol["modality"]) == (5, [3], "audio")
    with pytest.raises(ValueError, match="has no column for image"):
        hfvlm.evaluate("retrieval", imagebind_folder, data, between=["image", "text"])
    with pytest.raises(ValueError, match="embeds .*, not smell"):
        hfvlm.evaluate("retrieval", imagebind_folder, data, between=["smell", "text"])


def test_two_models_are_compared_row_by_row(clip_folder, by_class, tmp_path):
    torch.manual_seed(0)
    shutil.copytree(clip_folder, tmp_path / "untrained")
    AutoModel.from_config(AutoModel.from_pretrained(clip_folder).config).save_pretrained(tmp_path / "untrained")
    data = Data(str(by_class))
    one, two = (hfvlm.evaluate("zero-shot", folder, data) for folder in (tmp_path / "untrained", clip_folder))
    same, _ = compare(two, two)
    assert (same.gain, same.low, same.high, same.rows) == (0, 0, 0, two.rows)
    found, fifth = compare(one, two)
    assert (found.metric, fifth.metric) == ("accuracy", "accuracy@5")
    assert found.gain == pytest.approx(value(two, "accuracy").value - value(one, "accuracy").value, abs=1e-5)
    assert found.low <= found.gain <= found.high
    assert (found.low > 0) == ("not significant" not in str(found))
    (tmp_path / "report").mkdir()
    one.write(tmp_path / "report")
    assert compare(tmp_path / "report", two) == [found, fifth]
    command = ["eval", str(clip_folder), "--task", "zero-shot", "--data", str(by_class)]
    result = CliRunner().invoke(app, [*command, "--against", str(tmp_path / "report")])
    assert result.exit_code == 0, result.output
    assert f"accuracy: {found.first:.4f} -> {found.second:.4f}" in result.output
    with pytest.raises(ValueError, match="another split or limit"):
        compare(one, hfvlm.evaluate("zero-shot", clip_folder, Data(str(by_class), limit=4)))
    with pytest.raises(FileNotFoundError, match="no such report"):
        compare(tmp_path / "nothing.json", two)
    (tmp_path / "old.json").write_text('{"task": "zero-shot"}')
    with pytest.raises(ValueError, match="evaluate again with this version"):
        compare(tmp_path / "old.json", two)
