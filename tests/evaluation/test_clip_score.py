"""CLIPScore and RefCLIPScore by the paper's formulas, on the small CLIP that ships."""

import json

import numpy as np
import pytest
import torch
from sklearn.preprocessing import normalize
from transformers import AutoModel, AutoProcessor
from typer.testing import CliRunner

from hfvlm.cli.commands import app
from hfvlm.evaluation.clip_score import clip_scores, ref_clip_scores
from hfvlm.evaluation.tasks import Data, evaluate
from hfvlm.samples import scenes

KINDS = scenes.all_scenes()[::6]


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """Images with two references each and a candidate: every other one of another image; one candidate is missing."""
    folder = tmp_path_factory.mktemp("judged") / "test"
    folder.mkdir()
    with (folder / "metadata.jsonl").open("w") as metadata:
        for i, kind in enumerate(KINDS):
            kind.render(np.random.RandomState(i)).save(folder / f"{i}.png")
            candidate = KINDS[(i + i % 2) % len(KINDS)].caption() if i != 5 else None
            references = [kind.caption(template) for template in scenes.TEMPLATES[1:3]]
            metadata.write(json.dumps({"file_name": f"{i}.png", "candidate": candidate, "text": references}) + "\n")
    return folder.parent


@pytest.fixture(scope="module")
def by_hand(clip_folder, judged):
    """The scores of rows, as the paper defines them."""
    model, processor = AutoModel.from_pretrained(clip_folder), AutoProcessor.from_pretrained(clip_folder)
    rows = [json.loads(line) for line in (judged / "test" / "metadata.jsonl").read_text().splitlines()]
    found = {}
    for i, row in enumerate(rows):
        if row["candidate"] is None:
            continue
        texts = [f"A photo depicts {text}" for text in (row["candidate"], *row["text"])]
        inputs = processor(images=[str(judged / "test" / f"{i}.png")], text=texts, return_tensors="pt", padding=True)
        with torch.no_grad():
            outputs = model(**inputs)
        image, (candidate, *references) = (normalize(x.numpy()) for x in (outputs.image_embeds, outputs.text_embeds))
        score = 2.5 * max(float(image[0] @ candidate), 0)
        nearest = max(max(float(candidate @ reference) for reference in references), 0)
        found[i] = score, 2 / (1 / score + 1 / nearest) if score and nearest else 0.0
    return found


def value(report, metric):
    return next(result for result in report.results if result.metric == metric)


def test_the_formulas():
    images = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    captions = np.array([[0.6, 0.8], [0.6, -0.8], [0.8, 0.6]])
    scores = clip_scores(images, captions)
    np.testing.assert_allclose(scores, [1.5, 0, 2.0])
    references = [np.array([[0.6, 0.8], [1.0, 0.0]]), np.array([[0.6, -0.8]]), np.array([[-0.8, -0.6]])]
    np.testing.assert_allclose(ref_clip_scores(scores, captions, references), [2 * 1.5 * 1 / 2.5, 0, 0])


def test_given_captions_are_scored(clip_folder, judged, by_hand):
    report = evaluate("clip-score", clip_folder, Data(str(judged)))
    assert report.each["CLIPScore"] == pytest.approx({i: score for i, (score, _) in by_hand.items()}, abs=1e-5)
    assert report.each["RefCLIPScore"] == pytest.approx({i: score for i, (_, score) in by_hand.items()}, abs=1e-5)
    assert value(report, "CLIPScore").value == pytest.approx(np.mean([score for score, _ in by_hand.values()]))
    assert (value(report, "CLIPScore").n, report.rows, list(report.errors)) == (len(KINDS) - 1, len(KINDS) - 1, [5])
    right = [score for i, (score, _) in by_hand.items() if i % 2 == 0]
    wrong = [score for i, (score, _) in by_hand.items() if i % 2]
    assert np.mean(right) > np.mean(wrong)
    worst = min(by_hand, key=lambda i: by_hand[i][0])
    assert report.mistakes[0].path.endswith(f"{worst}.png")


def test_texts_without_candidates_are_scored_themselves(clip_folder, judged):
    report = evaluate("clip-score", clip_folder, Data(str(judged), columns={"candidate": "none"}))
    assert [result.metric for result in report.results] == ["CLIPScore"]
    assert value(report, "CLIPScore").n == 2 * len(KINDS)
    assert report.protocol["captions"] == 2 * len(KINDS)
    alone = evaluate("clip-score", clip_folder, Data(str(judged), columns={"text": "none"}))
    assert [result.metric for result in alone.results] == ["CLIPScore"]


def test_generated_captions_are_scored(small_blip, clip_folder, judged):
    command = [
        "eval",
        str(small_blip("HfvlmBLIPForConditionalGeneration")),
        "--task",
        "caption",
        "--data",
        str(judged),
    ]
    result = CliRunner().invoke(app, [*command, "--judge", str(clip_folder), "--limit", "3", "--json"])
    assert result.exit_code == 0, result.stdout
    report = json.loads(result.stdout)
    metrics = {r["metric"]: r for r in report["results"]}
    assert {"CIDEr-D", "CLIPScore", "RefCLIPScore"} <= metrics.keys()
    assert {r["n"] for r in metrics.values()} == {3}
    assert report["protocol"]["judge"] == str(clip_folder)
    assert 0 <= metrics["CLIPScore"]["value"] <= 2.5


def test_what_cannot_be_scored_is_refused(clip_folder, judged, tmp_path):
    with pytest.raises(ValueError, match="has no column for text"):
        evaluate("clip-score", clip_folder, Data(str(judged), columns={"candidate": "x", "text": "y"}))
    (tmp_path / "test").mkdir()
    KINDS[0].render().save(tmp_path / "test" / "0.png")
    (tmp_path / "test" / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "candidate": "", "text": []}))
    with pytest.raises(ValueError, match="No row can be read; the first: text: a caption"):
        evaluate("clip-score", clip_folder, Data(str(tmp_path)))
