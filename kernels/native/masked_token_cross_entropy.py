"""Linear layer and cross entropy of the labelled rows, by torch's own products in chunks of rows, on any device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..cpu.memory import refuses  # noqa: F401

if TYPE_CHECKING:
    from sslops.ops.masked_token_cross_entropy import Arguments

ROWS = 256  # of a chunk's logits at most: fewer make slower products, more need more memory
BLOCK = 16  # rows of logits that a cache holds


def _losses(logits: Tensor, labels: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """Of rows with labels [R, 1], and their log softmax"""
    log_p = logits.float().log_softmax(1)
    losses = -log_p.gather(1, labels).squeeze(1)
    return losses.lerp(-log_p.mean(1), smoothing) if smoothing else losses, log_p


def _slope(log_p: Tensor, labels: Tensor, smoothing: float, out: Tensor) -> Tensor:
    """The losses' derivatives by the logits, in out or in place"""
    slope = torch.exp(log_p, out=out if out.dtype == log_p.dtype else log_p)
    share = smoothing / slope.shape[1]
    of_labels = slope.gather(1, labels) - (1 - smoothing + share)  # 0 where p is all theirs
    return (slope.sub_(share) if smoothing else slope).scatter_(1, labels, of_labels)


def _sweep(x: Arguments, ready: bool, grad: Tensor | None = None) -> tuple[Tensor, ...]:
    """The loss; if ready the gradients in float32, of it or, under `grad`, of sum(grad * loss)"""
    rows = (x.labels != x.ignore_index).nonzero().flatten()
    share = 1 / max(1, len(rows)) if x.reduction == "mean" else 1.0
    smoothing, operand, device = x.label_smoothing, x.operand_dtype, x.hidden.device
    inputs = zip((x.hidden, x.weight, x.bias), x.needs_grad, strict=True)
    shapes = [tuple(value.shape) if value is not None and needed and ready else (0,) for value, needed in inputs]
    wanted = [shape != (0,) for shape in shapes]
    d_hidden, d_weight, d_bias = (torch.empty(shape, dtype=torch.float32, device=device) for shape in shapes)
    d_hidden.zero_(), d_bias.zero_()
    losses = torch.zeros(x.labels.shape, dtype=torch.float32, device=device)
    weight, bias = x.weight.to(operand), None if x.bias is None else x.bias.to(operand)
    chunks = rows.chunk(max(1, -(-len(rows) // ROWS)))
    memory = torch.empty((len(chunks[0]), len(weight)), dtype=operand, device=device)
    for k, chunk in enumerate(chunks):
        hidden, logits = x.hidden[chunk].to(operand), memory[: len(chunk)]
        if bias is None:
            torch.mm(hidden, weight.t(), out=logits)
        else:
            torch.addmm(bias, hidden, weight.t(), out=logits)
        for some, block in zip(chunk.split(BLOCK), logits.split(BLOCK), strict=True):
            labels = x.labels[some, None]
            losses[some], log_p = _losses(block, labels, smoothing)
            if any(wanted):
                slope = _slope(log_p, labels, smoothing, block)
                if grad is not None and grad.dim():
                    slope *= grad[some, None]
                if wanted[2]:
                    d_bias.add_(slope.sum(0), alpha=share)
                block.copy_(slope)
        if wanted[0]:
            d_hidden[chunk] = (logits @ weight).float().mul_(share)
        if k == 0:
            d_weight.zero_()  # not before: its memory need not be there beside a block's
        if wanted[1] and operand == d_weight.dtype:
            d_weight.addmm_(logits.t(), hidden, alpha=share)
        elif wanted[1]:
            d_weight.add_(logits.t() @ hidden, alpha=share)
    if grad is not None and not grad.dim():  # last, so that the bits are those that forward leaves
        d_weight.mul_(grad), d_bias.mul_(grad)
        d_hidden[rows if wanted[0] else slice(0)] *= grad  # the other rows stay 0
    loss = losses if x.reduction == "none" else losses.sum() if x.reduction == "sum" else losses[rows].mean()
    return loss, d_hidden, d_weight, d_bias


def forward(x: Arguments) -> tuple[Tensor, ...]:
    return _sweep(x, x.reduction != "none")


def backward(grad: Tensor, x: Arguments) -> tuple[Tensor, ...]:
    """All over again, for what forward could not leave: other gradients than one number, and a second use"""
    _, *gradients = _sweep(x, True, grad)
    inputs = (x.hidden, x.weight, x.bias)
    return tuple(d if value is None else d.to(value.dtype) for d, value in zip(gradients, inputs, strict=True))
