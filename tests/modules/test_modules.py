"""The shared parts, against independent formulations."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hfvlm.checkpoints.key_table import grouped
from hfvlm.configuration import TowerConfig
from hfvlm.modules.embeddings import present
from hfvlm.modules.pooling import AttentionPool, end_of_text
from hfvlm.modules.positions import ALIGNED_CORNERS, BICUBIC, resize_grid, resize_line, sampled_grid, sine_grid
from hfvlm.modules.transformer import MLP, Attention, PreNormLayer, QuickGELU
from tests.support.suite import close


@pytest.fixture
def config():
    config = TowerConfig(hidden_size=24, intermediate_size=48, num_attention_heads=3, hidden_act="gelu")
    config._attn_implementation = "eager"
    return config


def reference(attention: Attention, width: int) -> nn.MultiheadAttention:
    """PyTorch's own multi-head attention with the same weights."""
    theirs = nn.MultiheadAttention(width, 3, batch_first=True)
    parts = [attention.q_proj, attention.k_proj, attention.v_proj]
    theirs.in_proj_weight.data = torch.cat([part.weight for part in parts])
    theirs.in_proj_bias.data = torch.cat([part.bias for part in parts])
    theirs.out_proj.load_state_dict(attention.out_proj.state_dict())
    return theirs.eval()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention(config, implementation):
    config._attn_implementation = implementation
    attention, x = Attention(config).eval(), torch.randn(2, 5, 24)
    close(attention(x)[0], reference(attention, 24)(x, x, x)[0], 1e-5, "self-attention")


def test_attention_over_a_context_with_a_mask(config):
    attention, x, context = Attention(config).eval(), torch.randn(2, 3, 24), torch.randn(2, 7, 24)
    hidden = torch.arange(7) >= torch.tensor([[7], [4]])
    mask = torch.zeros(2, 1, 1, 7).masked_fill(hidden[:, None, None], -torch.inf)
    expected = reference(attention, 24)(x, context, context, key_padding_mask=hidden)[0]
    close(attention(x, mask, context=context)[0], expected, 1e-5, "cross-attention")


def test_pre_norm_layer(config):
    layer, x = PreNormLayer(config).eval(), torch.randn(2, 5, 24)
    theirs = nn.TransformerEncoderLayer(24, 3, 48, activation="gelu", batch_first=True, norm_first=True).eval()
    theirs.self_attn.load_state_dict(reference(layer.attention, 24).state_dict())
    theirs.norm1.load_state_dict(layer.attention_norm.state_dict())
    theirs.norm2.load_state_dict(layer.mlp_norm.state_dict())
    theirs.linear1.load_state_dict(layer.mlp.fc1.state_dict())
    theirs.linear2.load_state_dict(layer.mlp.fc2.state_dict())
    close(layer(x), theirs(x), 1e-5, "layer")


def test_attention_pool_reads_only_what_is_not_masked(config):
    pool, x = AttentionPool(config).eval(), torch.randn(1, 6, 24)
    mask = torch.zeros(1, 1, 1, 6)
    mask[..., 4:] = -torch.inf
    close(pool(x, mask), pool(x[:, :4]), 1e-5, "pooled")


def test_end_of_text():
    ids = torch.tensor([[1, 9, 3, 9], [1, 2, 8, 8], [12, 9, 1, 1], [0, 0, 0, 0]])
    assert end_of_text(ids, 9).tolist() == [1, 2, 1, 0]
    assert end_of_text(ids, None).tolist() == [1, 2, 0, 0]


def test_resizing_keeps_what_has_the_size():
    table = torch.randn(1 + 12, 5)
    for rule in (BICUBIC, ALIGNED_CORNERS):
        close(resize_grid(table, (3, 4), (3, 4), **rule), table, 1e-6, "same size")
    close(resize_line(table, 13), table, 1e-6, "same length")
    assert resize_grid(table.half(), (3, 4), (6, 2), **BICUBIC).dtype == torch.float16


def test_aligned_corners_keep_the_corners():
    table = torch.randn(9, 2)
    big = resize_grid(table, (3, 3), (7, 5), **ALIGNED_CORNERS).reshape(7, 5, 2)
    for corner, row in (((0, 0), 0), ((0, -1), 2), ((-1, 0), 6), ((-1, -1), 8)):
        close(big[corner], table[row], 1e-6, str(corner))


@pytest.mark.parametrize("grid", [(16, 16), (3, 40), (7, 9), (1, 1), (64, 2)])
def test_sampled_positions_equal_a_resized_table(grid):
    table = torch.randn(16, 16, 5)
    expected = F.interpolate(table.permute(2, 0, 1)[None], size=grid, mode="bilinear", antialias=True)[0]
    index = torch.arange(math.prod(grid))[None]
    actual = sampled_grid(table, index // grid[1], index % grid[1], torch.tensor([grid]))[0]
    close(actual, expected.flatten(1).t(), 1e-5, str(grid))


def test_sines_of_the_column_come_before_those_of_the_row():
    table = sine_grid(3, 16)
    for row in range(3):
        for column in range(3):
            angles = [[place / 10000 ** (k / 4) for k in range(4)] for place in (column, row)]
            expected = [wave(angle) for line in angles for wave in (math.sin, math.cos) for angle in line]
            close(table[3 * row + column], torch.tensor(expected), 1e-6, f"{row}, {column}")


def test_grouped_parts_come_apart_and_together():
    """Megatron's order: query, key and value of each head."""
    heads, size = 2, 3
    names = [f"{part}{head}.{i}" for head in range(heads) for part in "qkv" for i in range(size)]
    change = grouped(heads, 3)
    parts = change.apply(torch.arange(len(names)))
    assert [[names[i] for i in part] for part in parts] == [
        [f"{part}{head}.{i}" for head in range(heads) for i in range(size)] for part in "qkv"
    ]
    assert torch.equal(change.undo(*parts), torch.arange(len(names)))


@pytest.mark.parametrize("trained", [True, False])
def test_quick_gelu(trained):
    x = torch.linspace(-60, 60, 2001).requires_grad_(trained)
    again, stored = x.detach().clone().requires_grad_(trained), []
    with torch.set_grad_enabled(trained):
        expected = again * torch.sigmoid(1.702 * again)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: stored.append(t) or t, lambda t: t):
            found = QuickGELU()(x)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(x, again)
    assert len([each for each in stored if each.ndim]) == trained
    if trained:
        (expected * expected.detach().cos()).sum().backward()
        (found * expected.detach().cos()).sum().backward()
        assert torch.allclose(x.grad, again.grad, rtol=1e-5, atol=1e-5)
        double = torch.linspace(-3, 3, 7, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(QuickGELU(), double)


def test_an_mlp_uses_it():
    assert isinstance(MLP(TowerConfig(hidden_size=8, num_attention_heads=2, hidden_act="quick_gelu")).act, QuickGELU)


def test_what_is_no_padding():
    ids = torch.tensor([[5, 6, 0], [7, 0, 0]])
    assert present(ids, 0).tolist() == [[True, True, False], [True, False, False]]
    assert present(ids, 0, torch.tensor([[0, 1, 1], [1, 1, 1]])).tolist() == [[False, True, True], [True, True, True]]
    assert present(ids, None).all()
