"""The demo does what the README says it does."""

import shutil

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModel, AutoProcessor

from hfvlm.cli.demo import Accuracy, demo, report
from hfvlm.release.hub import write_card
from hfvlm.samples import digits
from hfvlm.samples.digits import Digit


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_demo_learns_two_digits_and_replaces_an_earlier_demo(tmp_path, monkeypatch):
    """It learns in half of the steps, and is measured on a third of the images."""
    every = {split: digits.load_digits(split) for split in ("train", "test")}
    monkeypatch.setattr(digits, "load_digits", (every | {"test": every["test"][::3]}).get)
    monkeypatch.setattr("hfvlm.cli.demo.STEPS", 150)
    output = demo(tmp_path / "demo", seed=0)
    folder = output / "clip-tiny-ten-digits"
    card = ModelCard.load(folder / "README.md")
    one_prompt, ensemble, old, new = (result.metric_value for result in card.data.eval_results)
    assert min(one_prompt, ensemble) >= 0.95
    assert old >= 0.94
    assert new >= 0.5
    for name in ("confusion.png", "retrieval.png"):
        assert (folder / name).stat().st_size > 10_000
    assert "before fine-tuning" in card.text
    assert type(AutoModel.from_pretrained(folder)).__name__ == "HfvlmCLIPModel"
    assert AutoProcessor.from_pretrained(output / "clip-tiny")
    assert sorted(path.name for path in output.iterdir()) == ["clip-tiny", "clip-tiny-ten-digits"]
    monkeypatch.setattr(digits, "load_digits", {split: known[:60] for split, known in every.items()}.get)
    monkeypatch.setattr("hfvlm.cli.demo.STEPS", 1)
    demo(output, seed=1)
    assert "Trained with seed 1" in (folder / "README.md").read_text()


def test_the_numbers_of_a_card_have_names_of_their_own(clip_folder, tmp_path):
    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    before, after = (Accuracy(share, share, share, share / 2, []) for share in (0.5, 0.9))
    held_out = [Digit(None, label) for label in (1, 2, 8)]
    write_card(folder, results=report(before, after, held_out), text="Trained with seed 0.")
    card = ModelCard.load(folder / "README.md")
    names = [result.metric_name for result in card.data.eval_results]
    assert len(set(names)) == 4
    assert all(f"| {name} |" in card.text for name in names)
    assert "```json" not in card.text
