"""Learning rates of towers and of their layers."""

import pytest
import torch
from torch import nn

from hfvlm.models.clip import HfvlmCLIPConfig, HfvlmCLIPModel
from hfvlm.training import ContrastiveTrainer, ContrastiveTrainingArguments
from hfvlm.training.parameters import decay_by_layer, layer_numbers, split_by_tower

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}


@pytest.fixture
def model():
    vision = SIZES | {"image_size": 28, "patch_size": 14}
    return HfvlmCLIPModel(HfvlmCLIPConfig(vision_config=vision, text_config=SIZES | {"vocab_size": 60}))


def rates(optimizer, model):
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p]: group["lr"] for group in optimizer.param_groups for p in group["params"]}


def test_rates_shrink_towards_the_input(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    decay_by_layer(optimizer, {"vision": model.vision_model}, {"vision": 0.5})
    found = rates(optimizer, model)
    assert len(found) == len(list(model.parameters()))
    for i, expected in enumerate((0.125, 0.25, 0.5)):
        own = {rate for name, rate in found.items() if name.startswith(f"vision_model.layers.{i}.")}
        assert own == {expected}
    first = {
        rate
        for name, rate in found.items()
        if name.startswith("vision_model.")
        and "layers" not in name
        and not name.startswith(("vision_model.post_norm", "vision_model.projection"))
    }
    assert first == {0.0625}
    assert found["vision_model.post_norm.weight"] == 1.0
    assert {rate for name, rate in found.items() if not name.startswith("vision_model")} == {1.0}
    split_by_tower(optimizer, {"vision": model.vision_model}, {"vision": 0.1})
    assert rates(optimizer, model)["vision_model.layers.0.attention.q_proj.weight"] == pytest.approx(0.0125)


def test_a_trainer_decays_by_layer(model, tmp_path):
    arguments = ContrastiveTrainingArguments(
        str(tmp_path), learning_rate=0.1, weight_decay=0.2, report_to="none", use_cpu=True
    )
    trainer = ContrastiveTrainer(model, arguments, data_collator=lambda rows: rows)
    trainer.layer_decay = {"text": 0.5}
    found = rates(trainer.create_optimizer(), model)
    assert found["text_model.layers.1.mlp.fc1.weight"] == pytest.approx(0.025)
    assert found["vision_model.layers.1.mlp.fc1.weight"] == 0.1
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.0, 0.2}


def test_towers_without_a_list_of_layers_are_refused():
    stage = [nn.Linear(2, 2), nn.Linear(2, 2)]
    for tower in (nn.Linear(4, 4), nn.ModuleDict({"a": nn.ModuleList(stage), "b": nn.Sequential(*stage)})):
        with pytest.raises(
            ValueError, match=rf"the vision tower .{type(tower).__name__}. has no single list of layers"
        ):
            layer_numbers(tower, "vision")
