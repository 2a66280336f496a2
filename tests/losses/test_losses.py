"""Losses against their definitions; the originals' values and gradients are in the goldens."""

import math
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from hfvlm.losses import (
    affinity_loss,
    best_query_loss,
    blocks,
    captioning_loss,
    contrastive_loss,
    distilled_targets,
    focal_contrastive_loss,
    late_interaction,
    late_interaction_loss,
    late_interaction_scores,
    nt_xent_loss,
    sigmoid_loss,
    soft_contrastive_loss,
    token_losses,
)
from tests.support.processes import run_fresh, run_processes

SCALE, BIAS = torch.tensor(10.0, dtype=torch.float64), torch.tensor(-5.0, dtype=torch.float64)


@pytest.fixture
def pairs():
    return [F.normalize(torch.randn(6, 8, dtype=torch.float64), dim=-1) for _ in range(2)]


@pytest.fixture
def tokens():
    return [F.normalize(torch.randn(6, n, 8, dtype=torch.float64), dim=-1) for n in (5, 4)]


@pytest.fixture(params=[16, 2**22], ids=["blocks", "one block"])
def any_blocks(request, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", request.param)
    monkeypatch.setattr(blocks, "CPU_SIDE", math.isqrt(request.param))
    monkeypatch.setattr(blocks, "STORED", 2 * request.param)
    monkeypatch.setattr(late_interaction, "BLOCK", request.param * 20)


def plain_contrastive(a, b, scale, smoothing=0.0):
    logits, target = scale * a @ b.t(), torch.arange(len(a))
    return sum(F.cross_entropy(x, target, label_smoothing=smoothing) for x in (logits, logits.t())) / 2


def plain_focal(a, b, scale, bias, gamma=2.0):
    right = (scale * a @ b.t() + bias) * (2 * torch.eye(len(a), dtype=a.dtype) - 1)
    return -((1 - right.sigmoid()) ** gamma * F.logsigmoid(right)).sum() / len(a)


def plain_nt_xent(a, b, scale):
    """The paper's equation 1, pair by pair."""
    views, count = torch.cat([a, b]), len(a)
    losses = []
    for i in range(2 * count):
        others = [torch.exp(scale * views[i] @ views[k]) for k in range(2 * count) if k != i]
        assert len(others) == 2 * count - 2 + 1  # the negatives, and the other view
        losses.append(-torch.log(torch.exp(scale * views[i] @ views[(i + count) % (2 * count)]) / sum(others)))
    return sum(losses) / (2 * count)


def plain_scores(queries, keys, query_mask, key_mask):
    rows = []
    for query, kept in zip(queries, query_mask, strict=True):
        tokens = [
            [max(q @ k for k in key[mask]) for q in query[kept]] for key, mask in zip(keys, key_mask, strict=True)
        ]
        rows.append(torch.stack([torch.stack(best).mean() for best in tokens]))
    return torch.stack(rows)


def same_values_and_gradients(ours, plain, *leaves):
    results = []
    for loss in (ours, plain):
        copies = [leaf.clone().requires_grad_() for leaf in leaves]
        value = loss(*copies)
        results.append([value, *torch.autograd.grad(3 * value, copies)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("any_blocks")
class TestBlockedEqualsPlain:
    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    def test_contrastive(self, pairs, smoothing):
        same_values_and_gradients(
            lambda a, b, s: contrastive_loss(a, b, s, label_smoothing=smoothing),
            lambda a, b, s: plain_contrastive(a, b, s, smoothing),
            *(*pairs, SCALE),
        )

    def test_sigmoid(self, pairs):
        same_values_and_gradients(sigmoid_loss, lambda *x: plain_focal(*x, gamma=0.0), *pairs, SCALE, BIAS)

    @pytest.mark.parametrize("gamma", [0.5, 2.0])
    def test_focal(self, pairs, gamma):
        same_values_and_gradients(
            lambda *x: focal_contrastive_loss(*x, gamma=gamma),
            lambda *x: plain_focal(*x, gamma=gamma),
            *(*pairs, SCALE, BIAS),
        )

    def test_nt_xent(self, pairs):
        same_values_and_gradients(nt_xent_loss, plain_nt_xent, *pairs, SCALE)

    def test_affinity(self, pairs):
        teachers = [F.normalize(torch.randn(6, 5, dtype=torch.float64), dim=-1) for _ in range(2)]
        wanted = 7 * teachers[0] @ teachers[1].t()

        def plain(a, b, scale):
            logits = scale * a @ b.t()
            soft = zip((logits, logits.t()), (wanted, wanted.t()), strict=True)
            return sum(F.cross_entropy(ours, theirs.softmax(1)) for ours, theirs in soft) / 2

        def ours(a, b, scale):
            return affinity_loss(a, b, *teachers, scale, torch.tensor(7.0))

        same_values_and_gradients(ours, plain, *pairs, SCALE)

    def test_late_interaction(self, tokens):
        masks = [torch.arange(n) < torch.randint(1, n + 1, (6, 1)) for n in (5, 4)]

        def plain(a, b, scale):
            one = scale * plain_scores(a, b, *masks)
            other = scale * plain_scores(b, a, *masks[::-1])
            return sum(F.cross_entropy(logits, torch.arange(6)) for logits in (one, other)) / 2

        def ours(a, b, scale):
            return late_interaction_loss(a, b, scale, a_mask=masks[0], b_mask=masks[1])

        same_values_and_gradients(ours, plain, *tokens, SCALE)
        scores = late_interaction_scores(*tokens, *masks)
        torch.testing.assert_close(scores, plain_scores(*tokens, *masks))


@pytest.mark.parametrize("pair_ids", [None, torch.tensor([3, 1, 4, 1, 5, 9])])
@pytest.mark.usefixtures("any_blocks")
def test_the_best_query_by_the_plain_formula(tokens, pairs, pair_ids):
    def plain(a, b, scale):
        scores = torch.stack([torch.stack([max(q @ vector for q in row) for vector in b]) for row in a]) * scale
        ids = torch.arange(6) if pair_ids is None else pair_ids
        same = (ids[:, None] == ids).double()
        target = 0.9 * same / same.sum(1, keepdim=True) + 0.1 / 6
        return sum(-(x.log_softmax(1) * target).sum(1).mean() for x in (scores, scores.t())) / 2

    def ours(a, b, scale):
        return best_query_loss(a, b, scale, pair_ids=pair_ids, label_smoothing=0.1)

    same_values_and_gradients(ours, plain, tokens[0], pairs[0], SCALE)
    with pytest.raises(ValueError, match="Row i belongs to row i"):
        ours(tokens[0], pairs[0][:3], SCALE)


def test_top_k_keeps_the_tokens_that_resemble_the_positive(tokens):
    a, b = tokens
    whole = late_interaction_loss(a, b, SCALE)
    assert torch.equal(late_interaction_loss(a, b, SCALE, top_k=4), late_interaction_loss(a, b, SCALE, top_k=4))
    assert not torch.isclose(late_interaction_loss(a, b, SCALE, top_k=2), whole)
    chosen, kept = late_interaction.most_alike(a, b, torch.arange(5).expand(6, 5) < 3, None, 2)
    assert kept.all()
    likeness = (a @ b.transpose(1, 2)).sum(dim=2)[:, :3]
    for row in range(6):
        best = likeness[row].topk(2).indices
        assert torch.equal(chosen[row], a[row, best])
    with pytest.raises(ValueError, match="top_k is 5, a row has 4 tokens"):
        late_interaction_loss(a, b, SCALE, top_k=5)


def test_captioning_loss_averages_over_what_counts():
    logits, labels = torch.randn(2, 3, 5), torch.tensor([[1, 0, -100], [4, -100, -100]])
    expected = torch.stack([-logits[r, c].log_softmax(-1)[t] for r, c, t in [(0, 0, 1), (0, 1, 0), (1, 0, 4)]]).mean()
    torch.testing.assert_close(captioning_loss(logits, labels), expected)
    assert captioning_loss(logits, torch.full((2, 3), -100)) == 0


def test_captioning_losses_of_tokens_add_up():
    logits, labels = torch.randn(2, 3, 5), torch.tensor([[1, 4, -100], [0, -100, -100]])
    losses = token_losses(logits, labels, label_smoothing=0.1)
    assert (losses == 0).tolist() == [[False, False, True], [False, True, True]]
    whole = captioning_loss(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(losses.sum() / 3, whole)
    parts = [
        captioning_loss(a[None], b[None], label_smoothing=0.1, num_items=3)
        for a, b in zip(logits, labels, strict=True)
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_single_precision_is_as_exact_as_the_plain_formula():
    a, b = (F.normalize(torch.randn(300, 64), dim=-1).requires_grad_() for _ in range(2))
    scale, bias = torch.tensor(20.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
    for ours, plain in (
        (contrastive_loss(a, b, scale), plain_contrastive(a, b, scale)),
        (sigmoid_loss(a, b, scale, bias), plain_focal(a, b, scale, bias, 0.0)),
    ):
        assert abs(ours.item() - plain.item()) <= 1e-6 * plain.item()
        leaves = [a, b, scale]
        for one, other in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(plain, leaves), strict=True):
            assert (one - other).abs().max() <= 1e-5 * other.abs().max()


def test_half_precision_embeddings_are_compared_in_full_precision():
    a, b = (F.normalize(torch.randn(64, 32), dim=-1).bfloat16() for _ in range(2))
    expected = contrastive_loss(a.float(), b.float(), torch.tensor(100.0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        leaf = a.clone().requires_grad_()
        loss = contrastive_loss(leaf, b, torch.tensor(100.0))
        loss.backward()
    assert loss.dtype == torch.float32
    assert loss == expected
    assert leaf.grad.dtype == torch.bfloat16


def test_large_temperatures_do_not_overflow():
    a, b = torch.eye(4), torch.eye(4).flip(0)  # every row prefers a wrong one
    assert contrastive_loss(a, b, torch.tensor(1000.0)).item() == pytest.approx(1000.0)
    assert sigmoid_loss(a, b, torch.tensor(1000.0), torch.tensor(-500.0)).item() == pytest.approx(1000.0)


def test_perfect_pairs_cost_nothing():
    eye = torch.eye(5)
    assert contrastive_loss(eye, eye, torch.tensor(100.0)) < 1e-6
    assert sigmoid_loss(eye, eye, torch.tensor(100.0), torch.tensor(-50.0)) < 1e-6


def test_nt_xent_by_hand():
    """Two images of which both views are equal, at right angles to the other's: of three views, one is right."""
    eye = torch.eye(2)
    expected = math.log(math.exp(2) + 2) - 2
    assert nt_xent_loss(eye, eye, torch.tensor(2.0)).item() == pytest.approx(expected)
    half = nt_xent_loss(eye.half(), eye.half(), torch.tensor(100.0))
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(0, abs=1e-6)


def test_a_teacher_has_as_many_rows(pairs):
    with pytest.raises(ValueError, match="The teacher embedded 3 rows, and the student 6"):
        affinity_loss(*pairs, *(side[:3] for side in pairs), SCALE, SCALE)


def test_one_pair_is_no_choice():
    one = torch.ones(1, 1)
    assert contrastive_loss(one, one, torch.tensor(10.0)).item() == 0
    assert sigmoid_loss(one, one, torch.tensor(1.0), torch.tensor(0.0)).item() == pytest.approx(
        math.log1p(math.exp(-1))
    )


@pytest.mark.parametrize("loss", [contrastive_loss, sigmoid_loss, focal_contrastive_loss])
def test_rows_must_pair_up(pairs, loss):
    a, b = pairs
    with pytest.raises(ValueError, match=r"compares row i with row i, but got \(6, 8\) and \(3, 8\)"):
        loss(a, b[:3], 1.0, 0.0)


@pytest.mark.parametrize("by_blocks", [False, True])
def test_soft_targets_by_the_plain_formula(monkeypatch, by_blocks):
    monkeypatch.setattr("hfvlm.losses.blocks.BLOCK", 25)
    torch.manual_seed(0)
    rows, candidates, teacher = (F.normalize(torch.randn(n, 8, dtype=torch.float64), dim=-1) for n in (7, 12, 7))
    right = torch.rand(7, 12) < 0.3
    right[:, 0] = True
    scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    rows.requires_grad_()
    logits = scale * rows @ candidates.t()
    shares = right / right.sum(1, keepdim=True)
    targets = 0.4 * (scale.detach() * teacher @ candidates.t()).softmax(1) + 0.6 * shares
    expected = F.cross_entropy(logits, targets)
    gradients = torch.autograd.grad(expected, (rows, scale))
    mixed = distilled_targets(teacher, candidates, scale, right, 0.4)
    torch.testing.assert_close(mixed, targets)
    value = soft_contrastive_loss(rows, candidates, (lambda part: mixed[part]) if by_blocks else mixed, scale)
    torch.testing.assert_close(value, expected)
    for found, gradient in zip(torch.autograd.grad(value, (rows, scale)), gradients, strict=True):
        torch.testing.assert_close(found, gradient)


MEMORY = """
import torch
from torch.nn import functional as F
from hfvlm.losses import contrastive_loss, sigmoid_loss
def status(key): return int(next(x for x in open("/proc/self/status") if x.startswith(key)).split()[1]) / 1024
a, b = (F.normalize(torch.randn(8192, 64), dim=-1).requires_grad_() for _ in range(2))
contrastive_loss(a[:64], b[:64], 10.0).backward()
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
(contrastive_loss(a, b, torch.tensor(20.0)) + sigmoid_loss(a, b, torch.tensor(20.0), torch.tensor(-10.0))).backward()
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="measures memory through /proc")
def test_the_matrix_of_logits_is_never_held():
    assert float(run_fresh(MEMORY).stdout) < 200  # MiB; 8,192 x 8,192 logits alone are 256


QUEUE = F.normalize(torch.arange(45, dtype=torch.float64).sin().view(9, 5), dim=-1)
LOSSES = {
    "nt-xent": lambda a, b, scale, bias, group: nt_xent_loss(a.mean(1), b.mean(1), scale, group=group),
    "affinity": lambda a, b, scale, bias, group: affinity_loss(
        a.mean(1), b.mean(1), b[:, 0, :3], a[:, 1, :3], scale, torch.tensor(3.0), group=group
    ),
    "contrastive": lambda a, b, scale, bias, group: contrastive_loss(
        a.mean(1), b.mean(1), scale, label_smoothing=0.1, group=group
    ),
    "sigmoid": lambda a, b, scale, bias, group: sigmoid_loss(a.mean(1), b.mean(1), scale, bias, group=group),
    "focal": lambda a, b, scale, bias, group: focal_contrastive_loss(a.mean(1), b.mean(1), scale, bias, group=group),
    "late interaction": lambda a, b, scale, bias, group: late_interaction_loss(a, b, scale, top_k=2, group=group),
    "best query": lambda a, b, scale, bias, group: best_query_loss(
        a, b.mean(1), scale, label_smoothing=0.1, group=group
    ),
    "distilled": lambda a, b, scale, bias, group: soft_contrastive_loss(
        a.mean(1),
        QUEUE,
        distilled_targets(b.mean(1).detach(), QUEUE, 3.0, torch.ones(len(a), 9), 0.4),
        scale,
        group=group,
    ),
    "captioning": lambda a, b, scale, bias, group: captioning_loss(
        scale * a, (100 * b).long().sum(-1) % 5, ignore_index=0, group=group
    ),
}


def gradients_of(rows, group):
    """What training would see: each loss and the gradient of every parameter of two small encoders."""
    torch.manual_seed(0)
    inputs = torch.randn(2, 8, 3, 6, dtype=torch.float64)[:, rows]
    found = {}
    for name, loss in LOSSES.items():
        torch.manual_seed(1)
        encoders = nn.ModuleList(nn.Linear(6, 5, dtype=torch.float64) for _ in range(2))
        factors = nn.ParameterList(torch.tensor(x, dtype=torch.float64) for x in (7.0, -3.0))
        a, b = (F.normalize(encode(x), dim=-1) for encode, x in zip(encoders, inputs, strict=True))
        value = loss(a, b, *factors, group)
        value.backward()
        parameters = [*encoders.parameters(), *factors]
        found[name] = [value.detach(), *(torch.zeros_like(p) if p.grad is None else p.grad for p in parameters)]
    return found


def one_of(rank, size):
    found = gradients_of(slice(8 // size * rank, 8 // size * (rank + 1)), dist.group.WORLD)
    for values in found.values():
        for gradient in values[1:]:
            dist.all_reduce(gradient)
            gradient /= size
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_processes_together_do_what_one_does_with_the_whole_batch(size):
    whole = gradients_of(slice(None), None)
    for found in run_processes(one_of, size, size):
        for name, values in whole.items():
            for one, other in zip(found[name], values, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12, msg=name)


def unequal(rank):
    rows = torch.eye(4)[: 2 + rank]
    with pytest.raises(ValueError, match=r"The processes hold \[2, 3\] rows"):
        contrastive_loss(rows, rows, torch.tensor(1.0), group=dist.group.WORLD)


def test_processes_must_hold_equally_many_rows():
    run_processes(unequal, 2)


def test_the_sigmoid_loss_needs_an_offset(pairs):
    with pytest.raises(ValueError, match="needs a logit_bias, which this model has not"):
        sigmoid_loss(*pairs, SCALE, None)
