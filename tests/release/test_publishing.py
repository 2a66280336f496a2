"""Every way to the Hub, against a small Hub on this machine."""

import pytest
from huggingface_hub import ModelCard

from tests.support.hub import COMMIT, loopback_hub, problems_of
from tests.support.processes import run_fresh

ROADS = """
import sys
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, AutoProcessor, Trainer, TrainingArguments
import hfvlm

folder, out = sys.argv[1:]
model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
print(hfvlm.push(folder, "me/pushed"))
model.push_to_hub("me/model", commit_message="mine", tags=["digits"])
model.save_pretrained(out + "/saved", push_to_hub=True, repo_id="me/saved")
processor.push_to_hub("me/processor")
model.vision_model.push_to_hub("me/tower")
tuned = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
tuned.push_to_hub("me/adapter")
arguments = TrainingArguments(out + "/trained", use_cpu=True, report_to="none", hub_model_id="me/trained")
Trainer(tuned, arguments).push_to_hub()
whole = TrainingArguments(out + "/whole", use_cpu=True, report_to="none", push_to_hub=True, hub_model_id="me/whole")
Trainer(tuned.merge_and_unload(), whole, processing_class=processor).push_to_hub()
model.config.licence = "cc-by-nc-4.0"
for attempt in (
    lambda: model.push_to_hub("me/refused"),
    lambda: model.save_pretrained(out + "/refused", push_to_hub=True, repo_id="me/refused"),
    lambda: get_peft_model(model, LoraConfig(target_modules=["q_proj"])).push_to_hub("me/refused"),
):
    try:
        attempt()
    except hfvlm.presets.licences.LicenceError:
        print("refused")
model.push_to_hub("me/accepted", accept_licence=True)
loaded, again = AutoModel.from_pretrained("me/pushed"), AutoProcessor.from_pretrained("me/pushed")
weights = AutoModel.from_pretrained(folder).state_dict()
assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.state_dict().items())
print("loaded", type(loaded).__name__, type(again).__name__)
"""


@pytest.fixture(scope="module")
def pushed(clip_folder, tmp_path_factory):
    """The Hub, and the output of the process that pushed to it."""
    out = tmp_path_factory.mktemp("roads")
    with loopback_hub() as hub:
        result = run_fresh(ROADS, clip_folder, out, check=False, **hub.settings(out / "home"))
    assert result.returncode == 0, result.stderr[-3000:]
    return hub, result.stdout


@pytest.mark.parametrize(
    ("repo", "library"),
    [
        ("me/pushed", "hfvlm"),
        ("me/model", "hfvlm"),
        ("me/saved", "hfvlm"),
        ("me/tower", "hfvlm"),
        ("me/adapter", "peft"),
        ("me/trained", "peft"),
        ("me/whole", "hfvlm"),
    ],
)
def test_the_cards(pushed, repo, library, clip_folder):
    card = ModelCard(pushed[0].files[repo]["README.md"].decode())
    assert card.data.library_name == library
    assert card.data.license == "apache-2.0"
    assert {"hfvlm", "hfvlm_clip"} <= set(card.data.tags)
    assert "Trained by hfvlm on scikit-learn's digits" in card.text, "the licence's note"
    assert "More Information Needed" not in card.text
    assert str(clip_folder) not in card.content
    assert "clip-tiny\n" not in card.text
    if repo not in ("me/whole", "me/trained"):  # which transformers' Trainer heads with the name alone
        assert f"# {repo}\n" in card.text


@pytest.mark.parametrize(
    ("repo", "weights"),
    [
        ("me/pushed", "model.safetensors"),
        ("me/model", "model.safetensors"),
        ("me/saved", "model.safetensors"),
        ("me/tower", "model.safetensors"),
        ("me/adapter", "adapter_model.safetensors"),
        ("me/trained", "adapter_model.safetensors"),
        ("me/whole", "model.safetensors"),
    ],
)
def test_the_weights_arrive(pushed, repo, weights):
    assert len(pushed[0].files[repo][weights]) > 1000


def test_tags_of_the_call_are_kept(pushed):
    assert "digits" in ModelCard(pushed[0].files["me/model"]["README.md"].decode()).data.tags


def test_the_pushed_folder_is_the_converted_one(pushed, clip_folder):
    sent = pushed[0].files["me/pushed"]
    assert set(sent) == {path.name for path in clip_folder.iterdir()}
    for name in ("model.safetensors", "config.json", "conversion.json", "tokenizer.json"):
        assert sent[name] == (clip_folder / name).read_bytes()
    assert f"/me/pushed/commit/{COMMIT}" in pushed[1]


def test_a_processor_is_no_model(pushed):
    assert "processor_config.json" in pushed[0].files["me/processor"]


def test_a_refused_licence_makes_no_repository(pushed):
    assert pushed[1].count("refused") == 3
    assert "me/refused" not in pushed[0].made
    assert "me/accepted" in pushed[0].files


def test_what_was_pushed_is_loaded_by_its_name(pushed):
    assert "loaded HfvlmCLIPModel HfvlmCLIPProcessor" in pushed[1]


def test_the_hub_takes_every_card(pushed):
    cards = {name: files["README.md"].decode() for name, files in pushed[0].files.items() if "README.md" in files}
    assert {name: problems for name, card in cards.items() if (problems := problems_of(card))} == {}
    assert len(cards) > 6


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ("license: [", "no YAML"),
        ("library_name: 3", "library_name must be a text"),
        ("base_model: /home/me/model", "base_model: /home/me/model"),
        ("model-index: [{name: mine}]", "results is missing"),
        ("model-index: [{name: mine, results: [{task: {}, dataset: {type: x}, metrics: []}]}]", "has no name"),
    ],
)
def test_the_hub_refuses(metadata, problem):
    assert any(problem in text for text in problems_of(f"---\n{metadata}\n---\n"))
