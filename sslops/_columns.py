"""What losses on columns share."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _check, distributed
from .backend import kernel

ROUTES = ("gram", "panels")  # by [N, N] matrices or by rows of the [D, D] one; "" in an op's arguments: the cheaper


def batch_norm(z: Tensor, eps: float, batches: int) -> Tensor:
    """z [N, D] with each of `batches` runs of N / batches rows normalised by its own biased statistics"""
    side_by_side = z.unflatten(0, (batches, -1)).transpose(0, 1).flatten(1)  # [N / batches, batches * D]
    normalized = F.batch_norm(side_by_side, None, None, training=True, eps=eps)
    return normalized.unflatten(1, (batches, -1)).transpose(0, 1).flatten(0, 1)


def correlation(x: Any) -> Tensor:
    """C [D, D], the maths as it is written: float32 (float64 for float64) around a matmul in operand_dtype"""
    wide = torch.promote_types(x.z_a.dtype, torch.float32)
    a, b = (batch_norm(z.to(wide), x.eps, batches(x)).to(x.operand_dtype) for z in (x.z_a, x.z_b))
    return (a.t() @ b).to(wide) / len(a)


def off_identity(c: Tensor, lambd: float) -> Tensor:
    """Barlow Twins' loss [] of C"""
    diagonal = c.diagonal()
    return (1 - diagonal).square().sum() + lambd * (c - torch.diag(diagonal)).square().sum()


def batches(x: Any) -> int:
    """Into how many runs of rows the batch of all ranks falls that are normalised by themselves"""
    return 1 if x.synced else distributed.size(x.group)


def check_batch(op: str, x: Any) -> None:
    _check.batch(op, "z_a", x.z_a, distributed.size(x.group) if getattr(x, "synced", True) else 1)


def kept_width(x: Any) -> Any:
    """Columns of what the routes keep for backward. Where the cheaper route is taken, the fewer: so traces need not
    know which it is.
    """
    n, d = x.z_a.shape[0] * distributed.size(x.group), x.z_a.shape[1]
    return {"gram": n, "panels": d, "": torch.sym_min(n, d)}[x.route]


def own_part(x: Any) -> tuple[distributed.Part, ...]:
    """What a kernel is told of a batch that lies over ranks"""
    return (distributed.part(x.group, len(x.z_a)),) if x.group else ()


Kernel = Callable[..., tuple[Tensor, ...]]


def by_route(op: str, route: Callable[[Any], str]) -> tuple[Kernel, Kernel]:
    """forward and backward by an op's kernels, of x by the route it takes, and with the views of all ranks for its own
    if that needs them: the last output, if there are others.
    """

    def of_all_ranks(x: Any, views: Tensor) -> Any:
        return x._replace(**dict(zip(("z_a", "z_b"), views.unbind(), strict=False))) if views.numel() else x

    def forward(x: Any) -> tuple[Tensor, ...]:
        x, views = x._replace(route=route(x)), x.z_a.new_empty(0)
        if x.group and x.route == "gram":
            views = distributed.gather_views([z for z in (x.z_a, x.z_b) if z is not None], x.group)
        return *kernel(x.backend, op).forward(of_all_ranks(x, views), *own_part(x)), views

    def backward(grad: Tensor, x: Any, *kept: Tensor) -> tuple[Tensor, ...]:
        *saved, views = kept
        run, grad = kernel(x.backend, op).backward, grad * distributed.size(x.group)
        whole = of_all_ranks(x._replace(route=route(x)), views)
        gradients: tuple[Tensor, ...] = run(grad, whole, *saved, *own_part(x))
        return gradients

    return forward, backward
