"""Cards that say something, and folders that leave the machine only when they may."""

import json
import re
import subprocess
import sys

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModel

import hfvlm
from hfvlm import hub
from hfvlm.licences import LicenceError, check_licence
from hfvlm.registry import architectures

RESULT = {
    "task": "zero-shot-image-classification",
    "dataset": "digits",
    "metric": "accuracy",
    "value": 0.97,
    "protocol": "n = 357, one prompt",
}


@pytest.fixture
def folder(clip_folder, tmp_path):
    import shutil

    copy = tmp_path / "model"
    shutil.copytree(clip_folder, copy)
    return copy


@pytest.fixture
def uploads(monkeypatch):
    """What would have gone to the Hub."""
    seen = []

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, **options):
            seen.append((repo_id, options))

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            seen.append(
                {
                    path.name: path.read_text()
                    for path in folder_path.iterdir()
                    if path.suffix in (".json", ".md", ".py")
                }
            )
            return f"https://huggingface.co/{repo_id}/commit/1"

    monkeypatch.setattr(hub, "HfApi", Api)
    return seen


def test_the_card_of_a_conversion(clip_folder):
    card = ModelCard.load(clip_folder / "README.md")
    assert card.data.library_name == "hfvlm"
    assert card.data.pipeline_tag == "zero-shot-image-classification"
    assert card.data.license == "apache-2.0"
    assert "More information needed" not in card.text
    assert "$" not in re.sub(r"```.*?```", "", card.text, flags=re.DOTALL)
    for words in ("import hfvlm", "Intended use", "sha256", "All 101 tensors", "None were measured", "# clip-tiny"):
        assert words in card.text, words
    notice = (clip_folder / "NOTICE").read_text()
    assert "converted (modified) by hfvlm" in notice
    assert "apache-2.0" in notice


def test_the_card_of_measured_numbers(folder):
    hub.write_card(folder, name="mine", base_model="org/clip-tiny", results=[RESULT], text="Trained on mine.")
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "org/clip-tiny"
    assert card.data.eval_results[0].metric_value == 0.97
    assert "| digits | accuracy | 0.97 | n = 357, one prompt |" in card.text
    assert "Trained on mine." in card.text


@pytest.mark.parametrize("name", sorted(architectures()))
def test_every_architecture_has_a_card(name, tmp_path):
    from hfvlm.presets import load_preset

    architecture = architectures()[name]
    config = load_preset(f"{name}/tiny").make_config()
    config.save_pretrained(tmp_path)
    hub.write_card(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "hfvlm"
    assert architecture.model_type in card.data.tags
    assert "arxiv.org/abs" in card.text
    for words in ("## Use", "Intended use", "Licence", "hfvlm.lora", "```bibtex"):
        assert words in card.text, words


def test_push(folder, uploads):
    address = hfvlm.push(folder, "me/clip")
    assert address.endswith("me/clip/commit/1")
    assert uploads[0] == ("me/clip", {"exist_ok": True, "private": None})
    assert "auto_map" not in uploads[1]["config.json"]


def test_push_writes_a_card_where_there_is_none(folder, uploads):
    (folder / "README.md").unlink()
    hfvlm.push(folder, "me/clip")
    assert "library_name: hfvlm" in uploads[1]["README.md"]
    assert not (folder / "README.md").exists(), "the user's folder is not touched"


def test_push_with_a_stub(folder, uploads):
    hfvlm.push(folder, "me/clip", stub=True)
    files = uploads[1]
    config = json.loads(files["config.json"])
    assert config["auto_map"]["AutoModel"] == "hfvlm_stub.HfvlmCLIPModel"
    assert config["auto_map"]["AutoModelForZeroShotImageClassification"] == "hfvlm_stub.HfvlmCLIPModel"
    assert "from hfvlm import HfvlmCLIPConfig" in files["hfvlm_stub.py"]
    assert "auto_map" not in (folder / "config.json").read_text(), "the user's folder is not touched"


def test_the_stub_loads_without_importing_hfvlm_first(folder, tmp_path):
    hub.write_stub(folder)
    code = f"""
import os
os.environ["HF_MODULES_CACHE"] = {str(tmp_path / "modules")!r}
from transformers import AutoModel, AutoProcessor
folder = {str(folder)!r}
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model.save_pretrained({str(tmp_path / "again")!r})
print(type(model).__module__, type(processor).__module__)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.split()[-2:] == ["hfvlm.models.clip.modeling_clip", "hfvlm.models.clip.processing_clip"]


@pytest.mark.parametrize("licence", ["unknown", "other", "cc-by-nc-sa-4.0"])
def test_licences_that_need_a_decision(folder, uploads, licence):
    config = json.loads((folder / "config.json").read_text()) | {"licence": licence}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(LicenceError, match=f"'{licence}'.*accept_licence=True"):
        hfvlm.push(folder, "me/clip")
    assert uploads == []
    with pytest.raises(LicenceError):
        AutoModel.from_pretrained(folder).push_to_hub("me/clip")
    hfvlm.push(folder, "me/clip", accept_licence=True)
    assert len(uploads) == 2


@pytest.mark.parametrize("licence", [None, "mit", "apache-2.0", "bsd-3-clause", "cc-by-4.0", "llama2"])
def test_licences_that_need_none(licence):
    check_licence(licence, accepted=False)


def test_the_licence_travels_with_a_fine_tuned_model(folder, tmp_path):
    model = AutoModel.from_pretrained(folder)
    model.save_pretrained(tmp_path / "tuned")
    assert AutoModel.from_pretrained(tmp_path / "tuned").config.licence == "apache-2.0"
    hub.write_card(tmp_path / "tuned")
    assert ModelCard.load(tmp_path / "tuned" / "README.md").data.license == "apache-2.0"
