"""Adapters, as `hfvlm train` and PEFT save them, stand wherever a model's folder does."""

import json
import shutil

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline
from typer.testing import CliRunner

import hfvlm
from hfvlm.cli.commands import app
from hfvlm.inference.adapters import base_of, config_of, load_model
from hfvlm.release.merging import merge, whole
from tests.models.llava.tiny import converted

runner = CliRunner()


def invoked(*arguments, code=0):
    result = runner.invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def changed(tuned):
    """An adapter that has learned something."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return tuned.eval()


@pytest.fixture(scope="module")
def tuned(clip_folder):
    return changed(hfvlm.lora(AutoModel.from_pretrained(clip_folder), "vision+text+scale", r=4, quiet=True))


@pytest.fixture(scope="module")
def adapter(tuned, clip_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    tuned.save_pretrained(folder)
    AutoProcessor.from_pretrained(clip_folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images():
    random = np.random.RandomState(0)
    return [random.randint(0, 256, (40, 40, 3), dtype=np.uint8) for _ in range(3)]


def expected(tuned, clip_folder, images):
    inputs = AutoProcessor.from_pretrained(clip_folder)(images=images, text=["a red circle"])
    with torch.no_grad():
        return tuned(**inputs)


def test_the_embedder_loads_it(adapter, clip_folder, tuned, images):
    found = hfvlm.Embedder.from_pretrained(adapter).encode(image=images, output="torch")
    wanted = expected(tuned, clip_folder, images).image_embeds
    assert torch.allclose(found, wanted, atol=1e-5)
    plain = hfvlm.Embedder.from_pretrained(clip_folder).encode(image=images, output="torch")
    assert not torch.allclose(found, plain, atol=1e-2)


def test_merged_it_is_a_model_of_its_own(adapter, clip_folder, tuned, images, tmp_path):
    folder = merge(adapter, tmp_path / "merged")
    model = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(**AutoProcessor.from_pretrained(folder)(images=images, text=["a red circle"])).logits_per_image
    assert torch.allclose(logits, expected(tuned, clip_folder, images).logits_per_image, rtol=1e-5, atol=1e-4)
    assert not (folder / "adapter_config.json").exists()
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "apache-2.0"
    assert "LoRA adapter of rank 4, `adapter`, merged into `clip-tiny`" in card.text
    assert (folder / "NOTICE").exists()
    with pytest.raises(FileExistsError):
        merge(adapter, folder)
    invoked("merge", adapter, "-o", folder, "--overwrite")
    invoked("verify", folder)


def test_commands_take_it(adapter, images, tmp_path):
    from PIL import Image

    folder = tmp_path / "data" / "test"
    for i, image in enumerate(images):
        (folder / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / "ab"[i % 2] / f"{i}.png")
    copy = tmp_path / "adapter"
    shutil.copytree(adapter, copy)
    assert "accuracy" in invoked("eval", copy, "--task", "zero-shot", "--data", tmp_path / "data", "--card").output
    invoked("verify", copy)
    invoked("card", copy)
    card = ModelCard.load(copy / "README.md")
    assert card.data.library_name == "peft"
    assert "Adapters (LORA of rank 4) for a model of the architecture clip, clip/tiny" in card.text
    assert card.data.license == "apache-2.0"
    invoked("export", copy, "-o", tmp_path / "native")
    invoked("embed", tmp_path / "data", "-m", copy, "-o", tmp_path / "out", "--split", "test")
    assert len(invoked("search", tmp_path / "out", "--text", "a red circle").stdout.splitlines()) == 3


def test_it_can_be_pushed(adapter, monkeypatch):
    uploads = {}
    monkeypatch.setattr(hfvlm.release.hub.HfApi, "create_repo", lambda *_, **__: None)
    monkeypatch.setattr(
        hfvlm.release.hub.HfApi, "upload_folder", lambda _, **given: uploads.update(given) or "commit/1"
    )
    assert "commit/1" in invoked("push", adapter, "me/x").output
    assert uploads["repo_id"] == "me/x"


def test_stock_classes_take_it(adapter, tuned, clip_folder, images):
    from PIL import Image

    model = AutoModel.from_pretrained(adapter).eval()
    with torch.no_grad():
        inputs = AutoProcessor.from_pretrained(adapter)(images=images, text=["a red circle"])
        assert torch.allclose(
            model(**inputs).image_embeds, expected(tuned, clip_folder, images).image_embeds, atol=1e-5
        )
    classify = pipeline("zero-shot-image-classification", model=str(adapter))
    assert len(classify(Image.fromarray(images[0]), candidate_labels=["one", "two"])) == 2


def test_the_base_is_found_beside_it_and_named_if_it_is_not(adapter, clip_folder, tmp_path, monkeypatch):
    copy = tmp_path / "models" / "adapter"
    shutil.copytree(adapter, copy)
    shutil.copytree(clip_folder, tmp_path / "models" / "base")
    settings = json.loads((copy / "adapter_config.json").read_text())

    def name_base(name):
        (copy / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": name}))

    name_base("base")
    assert config_of(copy).model_type == "hfvlm_clip"
    monkeypatch.chdir(tmp_path / "models")
    assert base_of("adapter", {"base_model_name_or_path": "base"}) == "base"
    name_base("/no/such/model")
    with pytest.raises(ValueError, match=r"adapter of /no/such/model, which is not there.*--base MODEL"):
        hfvlm.Embedder.from_pretrained(copy)
    merge(copy, tmp_path / "merged", base=clip_folder)
    name_base(None)
    with pytest.raises(ValueError, match="names no base_model_name_or_path"):
        load_model(copy)
    (copy / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match="an adapter's settings are an object"):
        load_model(copy)
    (copy / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        load_model(copy)


def test_an_adapter_of_another_model_is_refused(adapter, clip_folder, imagebind_folder, tmp_path):
    with pytest.raises(ValueError, match="this adapter does not fit"):
        load_model(adapter, base=imagebind_folder)
    with pytest.raises(ValueError, match="holds no adapter"):
        merge(clip_folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_soft_prompt_is_refused(tmp_path):
    settings = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 8, "base_model_name_or_path": "llava"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="a PROMPT_TUNING adapter is tokens before inputs.*peft.PeftModel"):
        load_model(tmp_path)


def test_a_whole_folder_stays_itself(clip_folder, adapter):
    with whole(clip_folder) as folder:
        assert folder == clip_folder
    with whole(adapter) as folder:
        assert (folder / "model.safetensors").exists()
    assert not folder.exists()


def test_chat_captioner_and_pipelines_of_ours(tmp_path):
    (tmp_path / "llava").mkdir()
    base = converted(tmp_path / "llava")
    model = AutoModelForImageTextToText.from_pretrained(base)
    tuned = changed(hfvlm.lora(model, "language+projection", r=2, quiet=True))
    tuned.save_pretrained(tmp_path / "adapter")
    image = np.zeros((28, 28, 3), np.uint8)
    processor = AutoProcessor.from_pretrained(base)
    inputs = processor(images=image, text="<image>")
    with torch.no_grad():
        wanted = tuned(**inputs).logits
    for loaded in (
        hfvlm.Captioner.from_pretrained(tmp_path / "adapter", device="cpu").model,
        hfvlm.Chat.from_pretrained(tmp_path / "adapter").model,
    ):
        assert type(loaded).__name__ == type(model).__name__
        with torch.no_grad():
            assert torch.allclose(loaded(**inputs).logits, wanted, atol=1e-4)


def test_a_part_that_the_base_has_not_is_not_left_out(clip_folder, tmp_path):
    """As a classifier's last layer, which was trained in full beside an adapter."""
    model = hfvlm.HfvlmCLIPForImageClassification.from_pretrained(clip_folder, num_labels=3)
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["classifier"])
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    message = "does not fit HfvlmCLIPModel: it holds classifier, which HfvlmCLIPModel has not"
    with pytest.raises(ValueError, match=message):
        hfvlm.Embedder.from_pretrained(tmp_path / "adapter")
    result = CliRunner().invoke(app, ["merge", str(tmp_path / "adapter"), "-o", str(tmp_path / "merged")])
    assert message in str(result.exception)
    assert not (tmp_path / "merged").exists()
