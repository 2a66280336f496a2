"""Batches spread over processes: every process holds equally many rows of one large batch."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup


def rank_and_size(group: ProcessGroup | None) -> tuple[int, int]:
    """Return this process's rank in the group, and its size; None is a group of one."""
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))


def all_processes() -> ProcessGroup | None:
    """Return the group of all processes; None without a process group."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def check_equal_rows(rows: Tensor, group: ProcessGroup | None) -> None:
    """Refuse different numbers of rows, of which collectives return garbage or wait for ever."""
    if group is None:
        return
    count = torch.tensor([len(rows)], device=rows.device)
    counts = gather_rows(count, group).tolist()
    if len(set(counts)) > 1:
        raise ValueError(
            f"The processes hold {counts} rows; a loss over all of them needs as many on each: drop the last batch "
            "(dataloader_drop_last=True)."
        )


def gather_rows(rows: Tensor, group: ProcessGroup | None) -> Tensor:
    """Gather `(B, ...)` to `(processes * B, ...)`, in the order of the ranks, without a gradient."""
    _, size = rank_and_size(group)
    if size == 1:
        return rows
    gathered = rows.new_empty(size * len(rows), *rows.shape[1:])
    dist.all_gather(list(gathered.chunk(size)), rows.contiguous(), group=group)
    return gathered


def positives(size: int, pair_ids: Tensor | None, device: torch.device, group: ProcessGroup | None) -> Tensor:
    """Mark which of the rows of all processes belong to each of this one's `size` rows -> `(size, all)`.

    Args:
        pair_ids: `(size,)`, equal numbers for rows that belong together; None for each row to itself.
    """
    if pair_ids is not None:
        ids = pair_ids.reshape(-1)
        return ids[:, None] == gather_rows(ids, group)
    rank, ranks = rank_and_size(group)
    return torch.eye(size * ranks, dtype=torch.bool, device=device)[rank * size : (rank + 1) * size]


def scatter_sum(rows: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sum `(processes * B, ...)` over the processes to this one's `(B, ...)`: the gradient of a gather."""
    rank, size = rank_and_size(group)
    if size == 1:
        return rows
    own = torch.empty_like(rows.chunk(size)[rank])
    # gloo adds up in the parts themselves, and a gradient may be shared.
    dist.reduce_scatter(own, [part.clone() for part in rows.chunk(size)], group=group)
    return own


def sum_over(value: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sum over the processes, in place."""
    if group is not None:
        dist.all_reduce(value, group=group)
    return value


def pass_on(tensors: list[Tensor], group: ProcessGroup | None) -> list[Tensor]:
    """Give the tensors to the next process of a ring and take those of the one before."""
    rank, size = rank_and_size(group)
    if size == 1 or group is None:
        return tensors
    after, before = (dist.get_global_rank(group, (rank + step) % size) for step in (1, -1))
    received = [torch.empty_like(tensor) for tensor in tensors]
    moves = [dist.P2POp(dist.isend, tensor.contiguous(), after, group) for tensor in tensors]
    moves += [dist.P2POp(dist.irecv, tensor, before, group) for tensor in received]
    for move in dist.batch_isend_irecv(moves):
        move.wait()
    return received


class GatherRows(torch.autograd.Function):
    """`gather_rows` with a gradient: each process receives the gradients of its rows in all of them."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: ProcessGroup | None) -> Tensor:
        ctx.group = group
        return gather_rows(rows, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return scatter_sum(gradients[0], ctx.group), None
