"""Skip-gram on the CPU: rows are multiplied where they lie, and gradients summed id by id (csrc/cpu/skip_gram.h)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sslops import _C

from .memory import FLOAT32, empty, refuses, zeros  # noqa: F401

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
    d_input, d_output = x.input_weight.new_empty(0), x.output_weight.new_empty(0)
    mean = x.reduction == "mean"
    if x.needs_grad[0]:
        d_input = _summed(x.input_weight, x.centers, x.sparse, d_center, None, None, grad, mean)
    if x.needs_grad[1]:
        ids = torch.cat([x.contexts[:, None], x.negatives], 1).view(-1)
        d_output = _summed(x.output_weight, ids, x.sparse, x.input_weight, x.centers, slopes, grad, mean)
    return d_input, d_output


def _summed(table: Tensor, ids: Tensor, sparse: bool, *terms: object) -> Tensor:
    """The table's gradient: for each of the ids the sum of its terms"""
    order, begin, unique = (torch.empty(len(ids) + more, dtype=torch.int64, device="cpu") for more in (0, 1, 0))
    count = _C.skip_gram_sort(ids, len(table), order, begin, unique)
    out = (empty if sparse else zeros)(count if sparse else len(table), table.shape[1], dtype=table.dtype)
    _C.skip_gram_sum(*terms, order, begin, unique, count, out)
    if not sparse:
        return out
    found = unique[None, :count]
    return torch.sparse_coo_tensor(found, out, tuple(table.shape), is_coalesced=True, check_invariants=False)
