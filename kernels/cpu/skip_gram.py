"""Skip-gram on the CPU: rows are multiplied where they lie, and gradients summed id by id (csrc/cpu/skip_gram.h)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sslops import _C

from .memory import FLOAT32, empty, refuses  # noqa: F401

if TYPE_CHECKING:
    from sslops.ops.skip_gram import Arguments


def forward(x: Arguments) -> tuple[Tensor, ...]:
    pairs, terms = len(x.centers), 1 + x.negatives.shape[1]
    loss = torch.empty(pairs if x.reduction == "none" else (), **FLOAT32)
    slopes = torch.empty(pairs if any(x.needs_grad) else 0, terms, **FLOAT32)
    d_center = empty(pairs if x.needs_grad[0] else 0, x.input_weight.shape[1])
    tables, ids = (x.input_weight, x.output_weight), (x.centers, x.contexts, x.negatives)
    _C.skip_gram_forward(*tables, *ids, x.reduction == "mean", loss, slopes, d_center)
    return loss, slopes, d_center


def backward(grad: Tensor, x: Arguments, slopes: Tensor, d_center: Tensor) -> tuple[Tensor, Tensor]:
    pairs, terms = slopes.shape
    weights = (grad / pairs if x.reduction == "mean" else grad).expand(pairs)
    d_input, d_output = x.input_weight.new_empty(0), x.input_weight.new_empty(0)
    if x.needs_grad[0]:
        runs = _runs(x.centers, x.input_weight)
        d_input = _summed(x.input_weight, d_center, runs.order, weights[runs.order], runs, x.sparse)
    if x.needs_grad[1]:
        runs = _runs(torch.cat([x.contexts[:, None], x.negatives], 1).view(-1), x.output_weight)
        source, factors = x.centers[runs.order // terms], (slopes * weights[:, None]).view(-1)[runs.order]
        d_output = _summed(x.output_weight, x.input_weight, source, factors, runs, x.sparse)
    return d_input, d_output


class _Runs(NamedTuple):
    order: Tensor  # [n], the places of ids in ascending order of these
    begin: Tensor  # [n + 1], where each run of equal ones begins in it
    unique: Tensor  # [n], their ids
    found: int  # how many runs there are


def _runs(ids: Tensor, table: Tensor) -> _Runs:
    order, begin, unique = (torch.empty(len(ids) + more, dtype=torch.int64, device="cpu") for more in (0, 1, 0))
    return _Runs(order, begin, unique, _C.skip_gram_sort(ids, len(table), order, begin, unique))


def _summed(table: Tensor, rows: Tensor, source: Tensor, weights: Tensor, runs: _Runs, sparse: bool) -> Tensor:
    """The table's gradient: for each run the sum of its weighted rows"""
    count, shape = runs.found, tuple(table.shape)
    out = empty(count if sparse else shape[0], shape[1], dtype=table.dtype)
    _C.skip_gram_sum(rows, source, weights, runs.begin, runs.unique, count, not sparse, out)
    if not sparse:
        return out
    return torch.sparse_coo_tensor(runs.unique[None, :count], out, shape, is_coalesced=True, check_invariants=False)
