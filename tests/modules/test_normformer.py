"""The variants of a transformer's layers, by their definitions."""

import pytest
import torch
from torch import nn

from hfvlm.models.dalle_mini import HfvlmDALLEMiniTextConfig
from hfvlm.modules.normformer import RelativePositions, SelfHeads, SmeLU, VariantLayer, VariantMLP
from tests.support.suite import close

SIZES = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 12, "num_attention_heads": 3}
# Norms of a layer, by where they are: attention's and the MLP's input and output, and the inside of the MLP.
NORMS = {
    "normformer": {"attention_norm", "attention_out_norm", "mlp.norm", "mlp.mid_norm"},
    "cogview": {"attention_norm", "attention_out_norm", "mlp.norm", "mlp.out_norm"},
    "preln": {"attention_norm", "mlp.norm"},
    "subln": {"attention_norm", "attention.mid_norm", "mlp.norm", "mlp.mid_norm"},
    "swinv2": {"attention_out_norm", "mlp.out_norm"},
}


def config(**fields):
    made = HfvlmDALLEMiniTextConfig(**SIZES, **fields)
    made._attn_implementation = "eager"
    return made


def layer(made, index=0):
    return VariantLayer(made, index, SelfHeads(made, index, 5, 5)).eval()


@pytest.mark.parametrize("norms", NORMS)
def test_norms_are_where_they_belong(norms):
    found = {name for name, module in layer(config(norms=norms)).named_modules() if isinstance(module, nn.LayerNorm)}
    assert found == NORMS[norms]
    streams = [i for i in range(12) if isinstance(layer(config(norms=norms), i).stream_norm, nn.LayerNorm)]
    assert streams == ([5] if norms == "swinv2" else [])


def test_a_smooth_rectifier():
    x = torch.tensor([-3.0, -1.0, -0.5, 0.5, 1.0, 3.0])
    assert SmeLU()(x).tolist() == [0.25, 0.25, 0.0625, 0.5625, 1.0, 3.0]


@pytest.mark.parametrize("gated", [True, False])
def test_an_mlp_with_a_gate(gated):
    mlp, x = VariantMLP(config(gated=gated, norms="preln")).eval(), torch.randn(2, 12)
    inner = nn.functional.gelu(mlp.fc1(mlp.norm(x)))
    close(mlp(x), mlp.fc2(inner * mlp.gate(mlp.norm(x)) if gated else inner), 1e-6, "mlp")


def test_a_scaled_residual_stream():
    """DeepNet's alpha multiplies the stream, not the branches."""
    made, x = layer(config(norms="preln", residual_scale=2.0)), torch.randn(1, 5, 12)
    attended = 2 * x + made.attention(made.attention_norm(x))[0]
    close(made(x), 2 * attended + made.mlp(attended), 1e-6, "layer")


def test_cosine_attention_forgets_lengths():
    heads, x = SelfHeads(config(cosine_temperature=0.1), 0, 5, 5).eval(), torch.randn(1, 5, 12)
    before = heads(x)[1]
    with torch.no_grad():
        heads.q_proj.weight.mul_(3)
    close(heads(x)[1], before, 1e-5, "weights")


def test_heads_are_scaled():
    heads, x = SelfHeads(config(head_scale=True), 0, 5, 5).eval(), torch.randn(1, 5, 12)
    with torch.no_grad():
        heads.head_scale.copy_(torch.tensor([1.0, 0.0, 0.0]))
        changed = heads(x)[0]
        heads.v_proj.weight[4:].zero_()  # what the other heads read
    close(heads(x)[0], changed, 1e-6, "the first head alone")


def test_relative_positions_and_masks():
    """A bias alone where all is seen; of what is hidden the lowest number; causal without a mask, if asked."""
    relative = RelativePositions(5, 5, 3)
    with torch.no_grad():
        relative.bias.normal_()
    positions = torch.tensor([2, 3])
    bias = relative(None, positions, 4, causal=False)
    assert torch.equal(bias[0, 1], relative.bias[2:4, :4, 1])
    causal = relative(None, positions, 4, causal=True)
    assert (causal[0, :, 0, 3] == torch.finfo(torch.float32).min).all()
    assert torch.equal(causal[0, :, 1], bias[0, :, 1])
    added = relative(torch.full((1, 1, 2, 4), 0.5), positions, 4, causal=False)
    close(added, bias + 0.5, 1e-6, "added")
