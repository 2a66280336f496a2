"""What a processor's upload goes by: the licence of the model that it belongs to."""

import json
import shutil

import pytest
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerBase, ProcessorMixin

from hfvlm.configuration import LicenceError
from hfvlm.models.clip import HfvlmCLIPImageProcessor, HfvlmCLIPProcessor, HfvlmCLIPTokenizer
from hfvlm.presets import list_presets, load_preset
from hfvlm.presets.licences import check_origins, licence_of_preset
from tests.conftest import SHIPPED


@pytest.fixture
def pushed(monkeypatch):
    """What would have gone to the Hub."""
    seen = []
    for kind in (ProcessorMixin, PreTrainedTokenizerBase):
        monkeypatch.setattr(kind, "push_to_hub", lambda self, repo_id, **options: seen.append(repo_id))
    return seen


@pytest.fixture
def restricted(clip_folder, tmp_path):
    """A converted model whose record names a non-commercial licence."""
    folder = shutil.copytree(clip_folder, tmp_path / "restricted")
    record = json.loads((folder / "conversion.json").read_text())
    (folder / "conversion.json").write_text(json.dumps(record | {"licence": {"id": "cc-by-nc-4.0"}}))
    return folder


def own():
    tokenizer = HfvlmCLIPTokenizer.from_vocabulary(SHIPPED / "bpe_simple_vocab.txt.gz")
    return HfvlmCLIPProcessor(HfvlmCLIPImageProcessor(), tokenizer)


@pytest.mark.parametrize("load", [AutoProcessor.from_pretrained, AutoTokenizer.from_pretrained])
def test_what_was_loaded_from_a_restricted_folder_is_refused(restricted, pushed, load):
    loaded = load(restricted)
    with pytest.raises(LicenceError, match="cc-by-nc-4.0.*conversion.json of .*restricted.*accept_licence=True"):
        loaded.push_to_hub("me/refused")
    assert pushed == []
    loaded.push_to_hub("me/accepted", accept_licence=True)
    with pytest.raises(LicenceError):
        loaded.push_to_hub("me/refused-again")
    assert pushed == ["me/accepted"]


def test_a_new_processor_keeps_the_licence_of_its_tokenizer(restricted, pushed):
    processor = HfvlmCLIPProcessor(HfvlmCLIPImageProcessor(), AutoTokenizer.from_pretrained(restricted))
    with pytest.raises(LicenceError):
        processor.push_to_hub("me/refused")


def test_a_copy_elsewhere_still_belongs_to_its_model(restricted, pushed, tmp_path):
    processor = AutoProcessor.from_pretrained(restricted)
    processor.save_pretrained(tmp_path / "alone")
    with pytest.raises(LicenceError):
        processor.push_to_hub("me/refused")
    # Once nothing beside it names a model, there is nothing to go by.
    AutoProcessor.from_pretrained(tmp_path / "alone").push_to_hub("me/alone")
    assert pushed == ["me/alone"]


def test_saving_beside_a_restricted_model_makes_it_belong_there(restricted, pushed):
    processor = own()
    processor.push_to_hub("me/own")
    processor.save_pretrained(restricted)
    with pytest.raises(LicenceError):
        processor.push_to_hub("me/refused")
    with pytest.raises(LicenceError):
        processor._upload_modified_files(restricted, "me/refused")
    assert pushed == ["me/own"]


def test_an_open_model_s_processor_goes(clip_folder, pushed):
    AutoProcessor.from_pretrained(clip_folder).push_to_hub("me/open")
    assert pushed == ["me/open"]


def test_repositories_go_by_their_presets():
    name = next(n for n in list_presets() if load_preset(n).source.get("repository") and "nc" in licence_of_preset(n))
    with pytest.raises(LicenceError, match=name):
        check_origins([load_preset(name).source["repository"]])
    check_origins(["somebody/of-whom-nothing-is-known"])
