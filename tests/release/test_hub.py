"""Cards that say something, and folders that leave the machine only when they may."""

import json
import re

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModel

import hfvlm
from hfvlm.presets.licences import LicenceError, check_licence
from hfvlm.registry import architectures
from hfvlm.release import hub
from tests.support.processes import run_fresh

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
    printed = run_fresh(code).stdout
    assert printed.split()[-2:] == [
        "hfvlm.models.clip.modeling_clip",
        "hfvlm.models.clip.processing_clip",
    ]


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


@pytest.mark.parametrize(
    "licence", [None, "mit", "apache-2.0", "bsd-3-clause", "cc-by-4.0", "Apache-2.0", "MIT", "apache 2.0", "CC0-1.0"]
)
def test_licences_that_need_none(licence):
    check_licence(licence, accepted=False)


@pytest.mark.parametrize(
    "licence",
    [
        "", " ", "other", "Other", "CC-BY-NC-4.0", "cc-by-nc-nd-4.0", "cc-by-nd-4.0", "gemma", "llama2", "Llama3.1",
        "openrail", "creativeml-openrail-m", "unknown", "proprietary", "mit, research only", "none", 7, ["mit"], {},
    ],
)  # fmt: skip
def test_whatever_is_not_known_to_be_open_is_refused(licence):
    with pytest.raises(LicenceError, match="accept_licence=True"):
        check_licence(licence, accepted=False)
    check_licence(licence, accepted=True)


def edit(path, **changes):
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


@pytest.mark.parametrize("licence", [..., None, "mit"])
@pytest.mark.parametrize("preset", ["imagebind/huge", "llava/llava-v1.5-7b", "clip/absent", "clip", 7])
def test_the_record_is_asked_as_well_as_the_configuration(folder, uploads, licence, preset):
    edit(folder / "config.json", licence=licence, preset=...)
    edit(folder / "conversion.json", preset=preset, licence=...)
    with pytest.raises(LicenceError, match="conversion.json"):
        hfvlm.push(folder, "me/clip")
    assert uploads == []


def test_the_preset_of_the_configuration_is_asked(folder, uploads):
    (folder / "conversion.json").unlink()
    edit(folder / "config.json", licence="mit", preset="imagebind/huge")
    with pytest.raises(LicenceError, match="preset imagebind/huge in config.json"):
        hfvlm.push(folder, "me/clip")


def test_a_tower_s_licence_is_asked(folder, uploads):
    config = json.loads((folder / "config.json").read_text())
    edit(folder / "config.json", vision_config=config["vision_config"] | {"licence": "CC-BY-NC-4.0"})
    with pytest.raises(LicenceError, match="'CC-BY-NC-4.0' .vision_config of config.json"):
        hfvlm.push(folder, "me/clip")


def test_the_card_s_licence_is_asked(folder, uploads):
    card = ModelCard.load(folder / "README.md")
    card.data.license = "gemma"
    card.save(folder / "README.md")
    with pytest.raises(LicenceError, match="'gemma' .README.md"):
        hfvlm.push(folder, "me/clip")


def test_a_damaged_record_is_no_licence(folder, uploads):
    (folder / "conversion.json").write_text('{"preset": ')
    with pytest.raises(LicenceError, match="damaged"):
        hfvlm.push(folder, "me/clip")


@pytest.mark.parametrize("recorded", [True, False])
def test_a_tower_saved_alone_keeps_its_licence(folder, tmp_path, uploads, recorded):
    config = json.loads((folder / "config.json").read_text())
    parts = {name: config[name] | {"licence": None, "preset": None} for name in ("vision_config", "text_config")}
    edit(folder / "config.json", licence="cc-by-nc-4.0", **({} if recorded else parts))
    for kind in (hfvlm.HfvlmCLIPVisionModel, hfvlm.HfvlmCLIPTextModel):
        tower = kind.from_pretrained(folder)
        assert tower.config.licence == "cc-by-nc-4.0"
        with pytest.raises(LicenceError):
            tower.push_to_hub("me/tower")
        tower.save_pretrained(tmp_path / kind.__name__)
        with pytest.raises(LicenceError):
            hfvlm.push(tmp_path / kind.__name__, "me/tower")
    whole = AutoModel.from_pretrained(folder)
    whole.vision_model.save_pretrained(tmp_path / "inside")
    with pytest.raises(LicenceError):
        hfvlm.push(tmp_path / "inside", "me/tower")
    assert uploads == []


def test_the_folder_that_a_model_was_loaded_from_is_asked(folder, tmp_path):
    model = AutoModel.from_pretrained(folder)
    edit(folder / "conversion.json", preset="imagebind/huge")
    with pytest.raises(LicenceError, match="imagebind/huge"):
        model.push_to_hub("me/x")
    with pytest.raises(LicenceError, match="imagebind/huge"):
        model.save_pretrained(tmp_path / "saved", push_to_hub=True)
    assert not (tmp_path / "saved").exists()


def adapter(base, tmp_path):
    tuned = hfvlm.lora(AutoModel.from_pretrained(base), "vision", r=2, quiet=True)
    tuned.save_pretrained(tmp_path / "adapter")
    return tuned, tmp_path / "adapter"


def test_adapters_have_the_licence_of_their_base(folder, tmp_path, uploads):
    tuned, saved = adapter(folder, tmp_path)
    hfvlm.push(saved, "me/adapter")
    assert uploads[0] == ("me/adapter", {"exist_ok": True, "private": None})
    del uploads[:]
    edit(folder / "config.json", licence="cc-by-nc-4.0")
    with pytest.raises(LicenceError, match="cc-by-nc-4.0"):
        hfvlm.push(saved, "me/adapter")
    tuned.get_base_model().config.licence = "cc-by-nc-4.0"
    with pytest.raises(LicenceError, match="cc-by-nc-4.0"):
        tuned.push_to_hub("me/adapter")
    merged = tuned.merge_and_unload()
    with pytest.raises(LicenceError, match="cc-by-nc-4.0"):
        merged.push_to_hub("me/merged")
    assert uploads == []


@pytest.mark.parametrize(
    ("base", "licence"),
    [
        ("liuhaotian/LLaVA-v1.5-7b", "llama2"),
        ("somebody/unheard-of", "unknown"),
        ("/nowhere/at/all", "unknown"),
        ("", "unknown"),
        (None, "unknown"),
        (["mit"], "unknown"),
    ],
)
def test_adapters_on_a_base_that_is_not_here(folder, tmp_path, uploads, base, licence):
    _, saved = adapter(folder, tmp_path)
    edit(saved / "adapter_config.json", base_model_name_or_path=base)
    with pytest.raises(LicenceError, match=f"'{licence}'"):
        hfvlm.push(saved, "me/adapter")


def test_adapters_on_themselves_are_refused(folder, tmp_path, uploads):
    _, saved = adapter(folder, tmp_path)
    edit(saved / "adapter_config.json", base_model_name_or_path=str(saved))
    with pytest.raises(LicenceError, match="'unknown'"):
        hfvlm.push(saved, "me/adapter")


def test_the_trainer_asks_before_it_makes_a_repository(folder, tmp_path):
    from transformers import Trainer, TrainingArguments

    model = AutoModel.from_pretrained(folder)
    model.config.licence = "cc-by-nc-4.0"
    arguments = TrainingArguments(tmp_path / "out", use_cpu=True, report_to="none", push_to_hub=True)
    with pytest.raises(LicenceError):
        Trainer(model, arguments)
    trainer = Trainer(model, TrainingArguments(tmp_path / "out", use_cpu=True, report_to="none"))
    with pytest.raises(LicenceError):
        trainer.push_to_hub()
    tuned = hfvlm.lora(model, "vision", quiet=True)
    with pytest.raises(LicenceError):
        Trainer(tuned, TrainingArguments(tmp_path / "out", use_cpu=True, report_to="none")).push_to_hub()


# What is sent


def test_nothing_hidden_or_linked_is_sent(folder, tmp_path, uploads):
    secret = tmp_path / "secret.txt"
    secret.write_text("mine")
    (folder / "notes.txt").symlink_to(secret)
    (folder / "home").symlink_to(tmp_path)
    (folder / ".env").write_text("TOKEN=1")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("[remote]")
    (folder / "runs").mkdir()
    (folder / "runs" / "log.md").write_text("loss")
    (folder / "runs" / ".key").write_text("1")
    (folder / "runs" / "linked.json").symlink_to(secret)
    (folder / "checkpoint-10").mkdir()
    (folder / "checkpoint-10" / "optimizer.pt").write_bytes(b"1")
    plan = hfvlm.push(folder, "me/clip", dry_run=True)
    assert uploads == []
    assert {"config.json", "model.safetensors", "README.md", "runs/log.md"} <= set(plan.files)
    assert set(plan.left_out) == {
        ".env", ".git", "checkpoint-10", "home", "notes.txt", "runs/.key", "runs/linked.json"
    }  # fmt: skip
    assert plan.files["model.safetensors"] == (folder / "model.safetensors").stat().st_size
    assert "# me/clip" in plan.card
    assert "not sent: notes.txt (a symbolic link)" in str(plan)
    assert "model.safetensors" in str(plan)
    hfvlm.push(folder, "me/clip")
    assert "notes.txt" not in str(uploads)


def test_the_files_that_are_sent(folder, monkeypatch):
    seen = {}

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, *_, **__):
            pass

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            seen.update({p.relative_to(folder_path).as_posix(): p.read_bytes() for p in folder_path.rglob("*.*")})

    monkeypatch.setattr(hub, "HfApi", Api)
    (folder / ".env").write_text("TOKEN=1")
    plan = hfvlm.push(folder, "me/clip", dry_run=True)
    hfvlm.push(folder, "me/clip")
    assert {name: len(content) for name, content in seen.items()} | {"NOTICE": plan.files["NOTICE"]} == dict(
        plan.files
    )
    assert seen["model.safetensors"] == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_model_whose_files_are_links_is_refused(folder, tmp_path, uploads, name):
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(hub.UploadError, match=rf"{name} would not be sent \(a symbolic link\)"):
        hfvlm.push(folder, "me/clip")
    assert uploads == []


def test_a_folder_without_a_model_is_refused(tmp_path, uploads):
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(hub.UploadError, match="no model to push"):
        hfvlm.push(tmp_path, "me/x")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(hub.UploadError, match="bert is no model_type of hfvlm"):
        hfvlm.push(tmp_path, "me/x")


CODE = "X\nimport os\nos.system('true') #"


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", {"architectures": [CODE]}),
        ("config.json", {"architectures": ["HfvlmCLIPModel, os"]}),
        ("config.json", {"architectures": ["os"]}),
        ("config.json", {"architectures": []}),
        ("config.json", {"architectures": None}),
        ("config.json", {"architectures": [["HfvlmCLIPModel"]]}),
        ("config.json", {"architectures": "HfvlmCLIPModel as x"}),
        ("config.json", {"model_type": CODE}),
        ("config.json", {"model_type": ["hfvlm_clip"]}),
        ("processor_config.json", {"processor_class": CODE}),
        ("processor_config.json", {"processor_class": "CLIPProcessor"}),
        ("processor_config.json", {"processor_class": ...}),
        ("processor_config.json", {"image_processor": {"image_processor_type": CODE}}),
        ("processor_config.json", {"anything": {"image_processor_type": "__import__('os')"}}),
    ],
)
def test_a_stub_names_classes_of_hfvlm_alone(folder, uploads, file, change):
    before = (folder / "config.json").read_text()
    edit(folder / file, **change)
    written = (folder / file).read_text()
    with pytest.raises(ValueError, match=rf"{file}: "):
        hfvlm.push(folder, "me/clip", stub=True)
    with pytest.raises(ValueError, match=rf"{file}: "):
        hub.write_stub(folder)
    assert uploads == []
    assert not (folder / "hfvlm_stub.py").exists()
    assert (folder / file).read_text() == written
    assert file == "config.json" or (folder / "config.json").read_text() == before


# Cards of what is pushed


def test_a_pushed_card_names_the_repository(folder, uploads):
    hub.write_card(folder, name="a-local-name", results=[RESULT])
    hfvlm.push(folder, "me/clip")
    card = uploads[1]["README.md"]
    assert "a-local-name" not in card
    assert "# me/clip\n" in card
    assert 'AutoModel.from_pretrained("me/clip")' in card
    assert ModelCard(card).data.model_name == "me/clip"
    assert "a-local-name" in (folder / "README.md").read_text(), "the user's folder is not touched"


def test_a_user_s_own_card_stays(folder, uploads):
    mine = "---\nlicense: mit\n---\n# Mine\n\nIt is mine.\n"
    (folder / "README.md").write_text(mine)
    hfvlm.push(folder, "me/clip")
    assert uploads[1]["README.md"] == mine


def test_a_name_cannot_leave_the_card_s_code(folder):
    hub.write_card(folder, name='x")\nimport os\n# ("$name')
    card = (folder / "README.md").read_text()
    assert "import os\n" not in card
    for line in re.findall(r"from_pretrained\(.*", card):
        assert line.count('"') % 2 == 0


def test_results_of_one_metric_have_names(folder):
    hub.write_card(folder, results=[RESULT | {"name": "ten classes"}, RESULT | {"name": "two classes", "value": 1.0}])
    card = ModelCard.load(folder / "README.md")
    assert [result.metric_name for result in card.data.eval_results] == ["ten classes", "two classes"]
    assert "| digits | two classes | 1 | n = 357, one prompt |" in card.text


@pytest.fixture
def align(folder):
    """A folder of a preset whose release has a repository and a note on its licence."""
    edit(folder / "config.json", preset="align/align-base")
    edit(folder / "conversion.json", preset="align/align-base")
    return folder


def reported(card):
    return card.data.base_model == "kakaobrain/align-base" and "coyo-align-b7-base, states Apache-2.0" in card.text


def test_cards_after_merging_keep_base_model_and_note(align, tmp_path):
    tuned, saved = adapter(align, tmp_path)
    card = ModelCard.load(saved / "README.md")
    assert reported(card)
    assert (card.data.library_name, card.data.license) == ("peft", hfvlm.load_preset("align/align-base").licence["id"])
    assert {"hfvlm", "lora"} <= set(card.data.tags)
    assert "More Information Needed" not in card.text
    assert 'hfvlm.HfvlmCLIPModel.from_pretrained("model")' in card.text
    tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
    hub.write_card(tmp_path / "merged")
    card = ModelCard.load(tmp_path / "merged" / "README.md")
    assert reported(card)
    assert card.data.library_name == "hfvlm"
    assert "trained or merged since" in card.text


def test_the_trainer_s_card(align, tmp_path):
    from transformers import Trainer, TrainingArguments

    for number, model in enumerate((AutoModel.from_pretrained(align), adapter(align, tmp_path)[0])):
        out = tmp_path / f"out{number}"
        trainer = Trainer(model, TrainingArguments(out, use_cpu=True, report_to="none"))
        trainer.save_model()
        trainer.create_model_card(model_name="tuned")
        card = ModelCard.load(out / "README.md")
        assert reported(card), card
        assert card.data.library_name == ("peft" if number else "hfvlm")
        assert card.data.license
        assert "hfvlm" in card.data.tags


def test_the_licence_travels_with_a_fine_tuned_model(folder, tmp_path):
    model = AutoModel.from_pretrained(folder)
    model.save_pretrained(tmp_path / "tuned")
    assert AutoModel.from_pretrained(tmp_path / "tuned").config.licence == "apache-2.0"
    hub.write_card(tmp_path / "tuned")
    assert ModelCard.load(tmp_path / "tuned" / "README.md").data.license == "apache-2.0"


def test_an_exported_folder_says_whose_weights_it_has(align, tmp_path):
    card = ModelCard.load(hfvlm.export(align, tmp_path / "exported") / "README.md")
    assert reported(card)
    assert (card.data.library_name, card.data.license) == ("transformers", "apache-2.0")
    assert card.data.pipeline_tag == "zero-shot-image-classification"
    assert "# exported\n" in card.text
    assert "apache-2.0" in (tmp_path / "exported" / "NOTICE").read_text()


@pytest.mark.parametrize(
    "record", ["", "{", "[]", "{}", '{"preset": 3}', '{"source": 7}', '{"source": {"name": "x"}}']
)
def test_a_damaged_record_stops_no_card(folder, record):
    (folder / "conversion.json").write_text(record)
    hub.write_card(folder)
    assert ModelCard.load(folder / "README.md").data.license == "apache-2.0"
