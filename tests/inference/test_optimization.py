"""Packed weights: what is chosen, that outputs are equal, and that whatever changes a weight is noticed."""

import copy
import logging

import peft
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hfvlm
from hfvlm.inference import optimization
from hfvlm.inference.optimization import PROBED_ROWS, Choice, PackedLinear

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN here"
)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2 = nn.Linear(24, 40), nn.Linear(40, 24, bias=False)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


@pytest.fixture
def gains(monkeypatch):
    """How fast packed weights seem, at every number of rows."""
    given = {"all": 2.0}
    monkeypatch.setattr(optimization, "gain", lambda plain, ours: given["all"])
    return given


@pytest.fixture
def model(gains):
    model = Model().eval()
    report = hfvlm.optimize(model)
    assert report.packed == 2
    return model


def count(model, monkeypatch, x):
    """The output, and how many layers used their packed weights."""
    used = []
    call = optimization.PackedWeight.__call__
    with monkeypatch.context() as patch:
        patch.setattr(optimization.PackedWeight, "__call__", lambda *args: used.append(1) or call(*args))
        with torch.no_grad():
            return model(x), len(used)


@pytest.mark.parametrize("rows", [(1,), (3, 5), (2, 700), ()])
def test_outputs_are_equal(model, monkeypatch, rows):
    x = torch.randn(*rows, 24)
    expected = Model()(x)
    found, used = count(model, monkeypatch, x)
    assert used == 2
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    strided = torch.randn(24, 6).t()
    torch.testing.assert_close(count(model, monkeypatch, strided)[0], Model()(strided), rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bfloat16 on this processor"
)
def test_half_precision(gains, monkeypatch):
    model = Model().bfloat16().eval()
    x = torch.randn(4, 24).bfloat16()
    expected = model(x)
    hfvlm.optimize(model)
    found, used = count(model, monkeypatch, x)
    assert used == 2
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    assert count(model.float(), monkeypatch, x.float())[1] == 0


@pytest.mark.parametrize(("wins", "spans"), [
    ((1, 4, 16), (True, True, False, False, False)),
    ((16, 400), (False, False, False, False, True)),
    ((), (False,) * 5),
    (PROBED_ROWS, (True,) * 5),
])  # fmt: skip
def test_packed_weights_are_used_between_two_gains(wins, spans, monkeypatch):
    gains = {rows: 1.2 if rows in wins else 1.04 for rows in PROBED_ROWS}
    assert Choice((2, 3), torch.float32, 1, gains, 0.0).spans == spans
    measured = iter(2 * list(gains.values()))
    monkeypatch.setattr(optimization, "gain", lambda plain, ours: next(measured))
    model = Model().eval()
    report = hfvlm.optimize(model)
    assert (report.packed, report.plain) == ((2, 0) if any(spans) else (0, 2))
    for rows, on in zip(PROBED_ROWS, spans, strict=True):
        assert count(model, monkeypatch, torch.randn(rows + 1, 24))[1] == 2 * on
    assert type(model.fc1) is (PackedLinear if any(spans) else nn.Linear)
    assert "24 -> 40" in str(report)


def test_a_real_measurement(monkeypatch):
    model = Model().eval()
    report = hfvlm.optimize(model)
    assert [set(choice.gains) for choice in report.choices] == [set(PROBED_ROWS)] * 2
    assert all(gain > 0 for choice in report.choices for gain in choice.gains.values())
    assert all(choice.error < 2e-6 for choice in report.choices)
    x = torch.randn(5, 24)
    torch.testing.assert_close(count(model, monkeypatch, x)[0], Model()(x), rtol=1e-5, atol=1e-6)


def test_what_is_not_exact_stays_plain(gains, monkeypatch, caplog):
    monkeypatch.setitem(optimization.TOLERANCES, torch.float32, -1.0)
    model = Model().eval()
    with caplog.at_level(logging.WARNING, "hfvlm"):
        assert hfvlm.optimize(model).packed == 0
    assert "plain ones are used" in caplog.text
    monkeypatch.setattr(optimization, "packed", lambda weight: (_ for _ in ()).throw(RuntimeError("no such kernel")))
    with caplog.at_level(logging.WARNING, "hfvlm"):
        assert hfvlm.optimize(model).packed == 0
    assert "no such kernel" in caplog.text


CHANGES = {
    "in place": lambda model: model.fc1.weight.mul_(2),
    "its data": lambda model: model.fc1.weight.data.add_(torch.ones(40, 24)),
    "loaded": lambda model: model.load_state_dict({k: 2 * v for k, v in model.state_dict().items()}),
    "replaced": lambda model: setattr(model.fc1, "weight", nn.Parameter(torch.ones(40, 24))),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_weights_are_used(model, monkeypatch, change):
    with torch.no_grad():
        change(model)
    x = torch.randn(3, 24)
    plain = Model()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(count(model, monkeypatch, x)[0], plain(x), rtol=1e-5, atol=1e-6)


def test_gradients_autocast_training_and_graphs_are_plain(model, monkeypatch):
    x = torch.randn(3, 24)
    model(x).sum().backward()
    assert model.fc1.weight.grad is not None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, used = count(model, monkeypatch, x)
    assert (found.dtype, used) == (torch.bfloat16, 0)
    exported = torch.export.export(model, (x,))
    assert not [node for node in exported.graph.nodes if "mkldnn" in str(node.target)]
    assert count(model.train().eval(), monkeypatch, x)[1] == 0
    with pytest.raises(ValueError, match="model.eval"):
        hfvlm.optimize(model.train())


def test_files_and_copies_are_plain(model, monkeypatch):
    plain, x = Model(), torch.randn(3, 24)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    copied, used = count(copy.deepcopy(model), monkeypatch, x)
    assert used == 0
    torch.testing.assert_close(copied, plain(x))
    hfvlm.unoptimize(model)
    assert [type(module) for module in (model.fc1, model.fc2)] == [nn.Linear, nn.Linear]
    assert not any("packed" in vars(module) for module in model.modules())
    assert torch.equal(model(x), plain(x))


def test_adapters_are_left_out(gains):
    adapted = peft.get_peft_model(Model(), peft.LoraConfig(target_modules=["fc1"])).eval()
    report = hfvlm.optimize(adapted)
    assert type(adapted.base_model.model.fc1.base_layer) is nn.Linear
    assert type(adapted.base_model.model.fc2) is PackedLinear
    assert report.packed >= 1


def test_an_embedder_says_what_it_chose(gains, clip_folder, caplog):
    plain = hfvlm.Embedder.from_pretrained(clip_folder, device="cpu")
    assert plain.optimization is None
    with caplog.at_level(logging.INFO, "hfvlm"):
        embedder = hfvlm.Embedder.from_pretrained(clip_folder, device="cpu", optimize=True)
    assert embedder.optimization.packed > 0
    assert "linear layers are packed" in caplog.text
    texts = ["a red circle", "a blue square"]
    torch.testing.assert_close(
        embedder.encode(text=texts, output="torch"), plain.encode(text=texts, output="torch"), rtol=1e-5, atol=1e-6
    )
