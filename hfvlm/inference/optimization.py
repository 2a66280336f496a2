"""Linear layers on oneDNN's kernels with packed weights, where these are faster on this machine.

PyTorch multiplies float32 matrices by MKL, which on some processors is slower than oneDNN, for some shapes up to 2.3
times. Which is faster depends on the processor, the shape and the number of rows: it is measured.
"""

import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hfvlm.logs import logger

# Numbers of rows at which both kernels are timed; between two of them packed weights are used if both gain.
PROBED_ROWS = (1, 4, 16, 64, 400)
LEAST_GAIN = 1.05
ROUNDS = 5
SECONDS = 0.002
# Relative errors that come of another order of sums; others mean that an operation does not do what it did.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
SAMPLES = 64


@dataclass(frozen=True)
class Choice:
    """What was found for the linear layers of one shape.

    Args:
        shape: output and input width.
        dtype: of the weights.
        layers: how many layers have it.
        gains: how many times as fast as plain ones packed weights are, by number of rows; none if they are not exact.
        error: largest relative difference of the outputs.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    layers: int
    gains: dict[int, float]
    error: float

    @property
    def spans(self) -> tuple[bool, ...]:
        """Whether packed weights are used from each of `PROBED_ROWS` to the next, the last without end."""
        wins = [self.gains.get(rows, 0.0) >= LEAST_GAIN for rows in PROBED_ROWS]
        return tuple(a and b for a, b in zip(wins, [*wins[1:], wins[-1]], strict=True))

    def __str__(self) -> str:
        out, width = self.shape
        gains = ", ".join(f"{gain:.2f}x at {rows}" for rows, gain in self.gains.items()) or "not exact"
        ends = [*map(str, PROBED_ROWS[1:]), ""]
        used = [f"{a}-{b}" for a, b, on in zip(PROBED_ROWS, ends, self.spans, strict=True) if on]
        return f"{self.layers} of {width} -> {out}: {gains}; packed for rows {', '.join(used) or 'none'}"


@dataclass(frozen=True)
class Optimization:
    """What `optimize` chose.

    Args:
        choices: one for each shape of linear layers that could be packed.
        packed: the number of layers that are packed.
        plain: the number of linear layers that stayed as they were.
    """

    choices: tuple[Choice, ...]
    packed: int
    plain: int

    def __str__(self) -> str:
        head = f"{self.packed} of {self.packed + self.plain} linear layers are packed."
        return "\n".join([head, *map(str, self.choices)])


class PackedWeight:
    """A linear layer's weight in oneDNN's layout, and what the weight was when it was packed."""

    def __init__(self, weight: Tensor, spans: tuple[bool, ...]):
        self.weight, self.spans, self.state = packed(weight), spans, state_of(weight)
        self.current = weight.detach().view(-1)[:: max(1, weight.numel() // SAMPLES)]
        self.samples = self.current.clone()

    def takes(self, x: Tensor, weight: Tensor) -> bool:
        """Decide whether it computes `x @ weight.T`, faster. `parameter.data` changes values without a new version, by
        which adapters are merged: some values are compared."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_grad_enabled():
            return False
        if x.dtype != self.samples.dtype or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return False
        span = bisect_right(PROBED_ROWS, x.numel() // x.shape[-1]) - 1
        if span < 0 or not self.spans[span] or state_of(weight) != self.state:
            return False
        return torch.equal(self.current, self.samples)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, bias, "none", [], "")


class PackedLinear(nn.Linear):
    """A linear layer that uses its packed weight where that is faster, and is a plain one everywhere else: for
    gradients, under autocast, in compiled and exported graphs, and once its weight changes."""

    packed: PackedWeight | None = None

    def forward(self, input: Tensor) -> Tensor:
        if self.packed is not None and self.packed.takes(input, self.weight):
            return self.packed(input, self.bias)
        return F.linear(input, self.weight, self.bias)

    def train(self, mode: bool = True) -> "PackedLinear":  # noqa: FBT001, FBT002 (PyTorch's signature)
        if mode:  # what is trained would be packed in vain
            self.packed = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "packed"}


def optimize(model: nn.Module) -> Optimization:
    """Pack the weights of linear layers on the CPU where this machine multiplies by them faster so, shape by shape.

    Results differ by rounding alone: less than 2e-6 in float32, which is checked. The layers keep their own weights,
    so that files, adapters and training are as before; packed copies take as much memory again. Layers of adapters are
    left out: merge these first.

    Args:
        model: in inference mode.

    Returns:
        What was measured and chosen; it is logged, too.

    Raises:
        ValueError: the model is in training mode.
    """
    if model.training:
        raise ValueError("optimize() is for inference: call model.eval() first.")
    unoptimize(model)
    linears = [module for module in model.modules() if type(module) is nn.Linear]
    shapes: dict[tuple[Any, ...], list[nn.Linear]] = {}
    for module in packable(model):
        key = (module.out_features, module.in_features, module.weight.dtype, module.bias is None)
        shapes.setdefault(key, []).append(module)
    choices, count = [], 0
    for modules in shapes.values():
        choices.append(choice := measured(modules))
        if any(choice.spans):
            count += len(modules)
            for module in modules:
                pack(module, choice.spans)
    report = Optimization(tuple(choices), count, len(linears) - count)
    logger.info("%s", report)
    return report


def pack(module: Any, spans: tuple[bool, ...]) -> None:
    """Turn a plain linear layer into a packed one."""
    module.__class__ = PackedLinear
    module.packed = PackedWeight(module.weight, spans)


def unoptimize(model: nn.Module) -> None:
    """Make all linear layers plain again, and free packed weights."""
    packed: list[Any] = [module for module in model.modules() if isinstance(module, PackedLinear)]
    for module in packed:
        vars(module).pop("packed", None)
        module.__class__ = nn.Linear


def packable(model: nn.Module) -> Iterator[nn.Linear]:
    """Yield the linear layers whose weights can be packed."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return
    adapted = {
        id(part) for each in model.modules() if type(each).__module__.startswith("peft.") for part in each.children()
    }
    for module in model.modules():
        if type(module) is not nn.Linear or id(module) in adapted or type(module.weight) is not nn.Parameter:
            continue
        weight = module.weight
        plain = weight.device.type == "cpu" and weight.is_contiguous() and not weight.is_inference()
        if plain and weight.dtype in TOLERANCES:
            yield module


def packed(weight: Tensor) -> Tensor:
    """Put a weight into oneDNN's layout for many rows."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), PROBED_ROWS[-1])


def state_of(weight: Tensor) -> tuple[Any, ...]:
    """Describe a weight; equal as long as it is not replaced or changed in place."""
    return weight._version, weight.data_ptr(), weight.dtype, weight.shape


@torch.no_grad()
def measured(modules: list[nn.Linear]) -> Choice:
    """Time linear layers of one shape, plain and packed, and compare what they compute."""
    weight, bias = modules[0].weight, modules[0].bias
    gains, errors, generator = {}, [0.0], torch.Generator().manual_seed(0)
    try:
        weights = packed(weight)
        for rows in PROBED_ROWS:
            x = torch.randn(rows, weight.shape[1], generator=generator).to(weight.dtype)

            def plain(x: Tensor = x) -> Tensor:
                return F.linear(x, weight, bias)

            def ours(x: Tensor = x) -> Tensor:
                return torch.ops.mkldnn._linear_pointwise(x, weights, bias, "none", [], "")

            expected = plain().float()
            errors.append(float((ours().float() - expected).norm() / expected.norm().clamp_min(1e-12)))
            gains[rows] = gain(plain, ours)
    except RuntimeError as error:
        logger.warning("Packed weights cannot be used here, plain ones are: %s", error)
        gains, errors = {}, [float("inf")]
    exact = max(errors) <= TOLERANCES[weight.dtype]
    if gains and not exact:
        logger.warning("Packed weights are off by %.1e, plain ones are used.", max(errors))
    shape = (weight.shape[0], weight.shape[1])
    return Choice(shape, weight.dtype, len(modules), gains if exact else {}, max(errors))


def gain(plain: Callable[[], Any], ours: Callable[[], Any]) -> float:
    """Return how many times as fast `ours` is, by the best of interleaved rounds."""
    repeats = max(1, int(SECONDS / max(timed(plain, 1), 1e-7)))
    pairs = [(timed(plain, repeats), timed(ours, repeats)) for _ in range(ROUNDS)]
    return min(a for a, _ in pairs) / max(min(b for _, b in pairs), 1e-9)


def timed(function: Callable[[], Any], repeats: int) -> float:
    """Return the seconds of a call."""
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - start) / repeats
