"""What losses on columns share."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _check, distributed

ROUTES = ("gram", "panels")  # by [N, N] matrices or by rows of the [D, D] one; "" in an op's arguments: the cheaper


def batch_norm(z: Tensor, eps: float, batches: int) -> Tensor:
    """z [N, D] with each of `batches` runs of N / batches rows normalised by its own biased statistics"""
    side_by_side = z.unflatten(0, (batches, -1)).transpose(0, 1).flatten(1)  # [N / batches, batches * D]
    normalized = F.batch_norm(side_by_side, None, None, training=True, eps=eps)
    return normalized.unflatten(1, (batches, -1)).transpose(0, 1).flatten(0, 1)


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


def gathered(x: Any, route: str) -> tuple[Any, Tensor]:
    """x by `route`, with the views of all ranks if that needs them, and these, if there are others"""
    views = x.z_a.new_empty(0)
    if x.group and route == "gram":
        views = distributed.gather_views([z for z in (x.z_a, x.z_b) if z is not None], x.group)
    return of_all_ranks(x, route, views), views


def of_all_ranks(x: Any, route: str, views: Tensor) -> Any:
    """x by `route`, with `views` for its own, if there are any"""
    x = x._replace(route=route)
    return x._replace(**dict(zip(("z_a", "z_b"), views.unbind(), strict=False))) if views.numel() else x
