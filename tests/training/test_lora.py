"""Recipes adapt what they say and nothing else."""

import copy

import pytest
import torch
from peft import PeftModel
from transformers import AutoModel, AutoProcessor

import hfvlm
from hfvlm.models.clip import HfvlmCLIPVisionModel
from hfvlm.models.siglip import HfvlmSigLIPModel
from hfvlm.presets import load_preset
from hfvlm.release.verification import sample_inputs
from tests.models.align import test_modeling as align
from tests.models.clip import test_modeling as clip


@pytest.fixture
def model(clip_folder):
    return AutoModel.from_pretrained(clip_folder)


def trained(model):
    return {name.replace("base_model.model.", "") for name, p in model.named_parameters() if p.requires_grad}


def test_vision_alone(model):
    tuned = hfvlm.lora(model, "vision", quiet=True)
    names = trained(tuned)
    assert names
    assert all(name.startswith("vision_model.layers") and "lora_" in name for name in names)
    assert {name.split(".")[4] for name in names} == {"q_proj", "v_proj"}


def test_all_towers_by_default(model):
    names = trained(hfvlm.lora(model, quiet=True))
    assert {name.split(".")[0] for name in names} == {"vision_model", "text_model"}
    assert all("lora_" in name for name in names)


def test_projections_and_temperature_are_trained_in_full(model):
    names = trained(hfvlm.lora(model, "text+projection+scale", quiet=True))
    assert not any("vision_model.layers" in name for name in names)
    whole = {name for name in names if "lora_" not in name}
    assert whole == {
        "vision_model.projection.modules_to_save.default.weight",
        "text_model.projection.modules_to_save.default.weight",
        "logit_scale.modules_to_save.default.scale",
    }


def test_other_layers_and_ranks(model):
    tuned = hfvlm.lora(model, "vision", r=3, alpha=5, layers=["fc1", "fc2", "out_proj"], quiet=True)
    names = trained(tuned)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in names} == {"fc1", "fc2", "out_proj"}
    assert all(3 in p.shape for n, p in tuned.named_parameters() if p.requires_grad)
    assert tuned.peft_config["default"].lora_alpha == 5


def test_a_tower_without_such_layers_is_named(model):
    with pytest.raises(ValueError, match="No layer of the vision tower is called query: name its `layers`"):
        hfvlm.lora(model, "vision+text", layers=["query"])


def test_a_tower_of_its_own(clip_folder):
    tower = HfvlmCLIPVisionModel.from_pretrained(clip_folder)
    assert trained(hfvlm.lora(tower, quiet=True))


def test_pooling_heads_are_adapted_with_their_tower():
    names = trained(hfvlm.lora(HfvlmSigLIPModel(load_preset("siglip/tiny").make_config()), "vision", quiet=True))
    assert any("vision_model.pool.attention.q_proj" in name for name in names)


def test_unknown_parts_are_named(model):
    with pytest.raises(
        ValueError, match="HfvlmCLIPModel has no part audio; a recipe joins vision, text, projection, scale"
    ):
        hfvlm.lora(model, "vision+audio")
    with pytest.raises(ValueError, match="adapts no tower; name at least one of vision, text"):
        hfvlm.lora(model, "scale")


def test_prints_a_row_for_each_tower(model, capsys):
    hfvlm.lora(model, "vision", r=4)
    printed = capsys.readouterr().err
    assert "vision_model" in printed
    assert "8,192" in printed
    assert "0.00%" in printed


def test_everything_that_trained_is_saved_and_merged(model, clip_folder, tmp_path):
    """The temperature and the projections travel with the adapter."""
    inputs = sample_inputs(AutoProcessor.from_pretrained(clip_folder))
    tuned = hfvlm.lora(model, "vision+text+projection+scale", quiet=True)
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.1)
    before = {name: p.detach().clone() for name, p in tuned.named_parameters()}
    for _ in range(2):
        tuned(**inputs, return_loss=True).loss.backward()
        optimizer.step()
    moved = {name for name, p in tuned.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in tuned.named_parameters() if p.requires_grad}
    tuned.eval()
    expected = tuned(**inputs).logits_per_image
    tuned.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(AutoModel.from_pretrained(clip_folder), tmp_path).eval()
    assert torch.allclose(again(**inputs).logits_per_image, expected, atol=1e-5)
    merged = again.merge_and_unload()
    assert torch.allclose(merged(**inputs).logits_per_image, expected, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.allclose(
        AutoModel.from_pretrained(tmp_path / "merged")(**inputs).logits_per_image, expected, atol=1e-4
    )


@pytest.mark.filterwarnings("ignore")
def test_qlora_on_a_quantised_model(clip_folder):
    pytest.importorskip("bitsandbytes", reason="comes with hfvlm[quantization]")
    from transformers import BitsAndBytesConfig

    quantised = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["projection"])
    model = AutoModel.from_pretrained(clip_folder, quantization_config=quantised)
    assert type(model.vision_model.layers[0].mlp.fc1).__name__ == "Linear4bit"
    assert type(model.vision_model.projection).__name__ == "Projection"
    inputs = sample_inputs(AutoProcessor.from_pretrained(clip_folder))
    tuned = hfvlm.lora(model, "vision+text+projection", quiet=True)
    tuned(**inputs, return_loss=True).loss.backward()
    gradients = {n: p.grad.abs().max() for n, p in tuned.named_parameters() if p.requires_grad and "lora_A" not in n}
    assert gradients
    assert all(value > 0 for value in gradients.values())


@pytest.mark.parametrize("suite", [align.TestALIGN, clip.TestCLIPWithResNet], ids=["ALIGN", "CLIP-ResNet"])
@pytest.mark.parametrize("recipe", ["text", None])
def test_an_adapter_holds_all_that_training_changed(suite, recipe, tmp_path):
    """Batch norms beside frozen weights keep their statistics, which no adapter stores; others move theirs."""
    torch.manual_seed(0)
    model, batch = suite.model_class(suite().config()), suite().inputs()
    base = copy.deepcopy(model)
    tuned = hfvlm.lora(model, recipe, quiet=True).train()
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.1)
    for _ in range(4):
        tuned(**batch, return_loss=True).loss.backward()
        optimizer.step()
    tuned.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        expected, found = (m.eval()(**batch).logits_per_image for m in (tuned, again))
    assert torch.allclose(found, expected, atol=1e-5)
    whole = suite.model_class(suite().config()).train()
    before = {name: value.clone() for name, value in whole.named_buffers() if name.endswith("running_mean")}
    whole(**batch)
    assert before
    assert all(not torch.equal(value, before[name]) for name, value in whole.named_buffers() if name in before)
