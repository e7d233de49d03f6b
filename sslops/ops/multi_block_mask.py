"""I-JEPA's masks: blocks of the image that are to be predicted, and the part that they are predicted from."""

import math
from collections.abc import Sequence
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from .. import _check
from .._check import Of
from .._library import Out, register
from .._random import RandomStream, draw_key, on_device, philox
from ..backend import check_name

MOST_TARGETS, TRIES, ONE = 32, 20, 2**24  # as csrc/common/multi_block_mask.h has them


class Arguments(NamedTuple):
    key: Annotated[Tensor, Of("", (torch.int64,))]
    batch: int
    height: int
    width: int
    targets: int
    target_scale: list[float]
    aspect_ratio: list[float]
    context_scale: list[float]
    min_keep: int
    backend: str = ""

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """Of the targets' area, their aspect and the context's area: the lowest and the span, in units of 2^-24"""
        found = ([round(each * ONE) for each in (low, high)] for low, high in self[5:8])
        return [(low, high - low) for low, high in found]

    def _largest(self, scale: tuple[int, int], aspect: tuple[int, int]) -> int:
        """Tokens of a block: over its heights, the width of the flattest block of the largest area"""
        area = self.height * self.width * sum(scale) // ONE
        low, high = aspect[0] / ONE, sum(aspect) / ONE
        found = 1
        for height in range(1, min(self.height, max(1, math.floor(math.sqrt(area * high) + 0.5))) + 1):
            width = math.sqrt(area / low)
            if height > 1:  # the aspect at which this height begins
                width = min(width, area / (height - 0.5))
            found = max(found, height * max(1, min(self.width, math.floor(width + 0.5 + 1e-6))))
        return found

    @property
    def most(self) -> int:
        return self._largest(*self.ranges[:2])

    @property
    def most_context(self) -> int:
        return self._largest(self.ranges[2], (ONE, 0))


class Outputs(NamedTuple):
    ids_context: Out
    context_counts: Out
    ids_targets: Out
    target_counts: Out


def outputs(x: Arguments) -> Outputs:
    return Outputs(
        ids_context=Out((x.batch, x.most_context), torch.int64),
        context_counts=Out((x.batch,), torch.int64),
        ids_targets=Out((x.targets, x.batch, x.most), torch.int64),
        target_counts=Out((x.targets, x.batch), torch.int64),
    )


class Blocks(NamedTuple):
    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor


def blocks_of(x: Arguments, scale: tuple[int, int], aspect: tuple[int, int], words: Tensor) -> Blocks:
    """Of [.., 4] words: of area, aspect, row and column one each"""

    def root(square: Tensor, most: int) -> Tensor:
        return (square.sqrt() + 0.5).long().clamp(1, most)

    area = x.height * x.width * (scale[0] + (words[..., 0] * scale[1] >> 32)) // ONE
    ratio = aspect[0] + (words[..., 1] * aspect[1] >> 32)
    height = root((area * ratio).double() / ONE, x.height)
    width = root((area * ONE).double() / ratio.double(), x.width)
    top, left = words[..., 2] * (x.height - height + 1) >> 32, words[..., 3] * (x.width - width + 1) >> 32
    return Blocks(top, left, height, width)


def inside(blocks: Blocks, row: Tensor, column: Tensor) -> Tensor:
    """[.., L] bool: which tokens are in it"""
    top, left, height, width = (each[..., None] for each in blocks)
    return (row >= top) & (row < top + height) & (column >= left) & (column < left + width)


def reference(x: Arguments) -> tuple[Tensor, ...]:
    """ids_context [B, K], context_counts [B], ids_targets [T, B, M], target_counts [T, B]"""
    device, count, width = x.key.device, TRIES * (x.targets + 1), x.width
    scale, aspect, context_scale = x.ranges
    words = philox(x.key, RandomStream.MULTI_BLOCK_MASK, 0, x.batch * (x.targets + count), device)
    words = words.view(x.batch, x.targets + count, 4)
    targets = Blocks(*(each.t() for each in blocks_of(x, scale, aspect, words[:, : x.targets])))  # [T, B]
    slot = torch.arange(x.most, device=device)
    first, wide = (targets.top * width + targets.left)[..., None], targets.width[..., None]
    target_counts = targets.height * targets.width
    ids_targets = (first + slot // wide * width + slot % wide).where(slot < target_counts[..., None], 0)

    token = torch.arange(x.height * width, device=device)
    row, column = token // width, token % width
    number = torch.arange(x.targets, device=device)[:, None, None]
    covered = number.where(inside(targets, row, column), x.targets)  # [T, B, L]
    lowest = torch.cat([covered, covered.new_full((1, x.batch, len(token)), x.targets)]).amin(0)  # target there
    tried = blocks_of(x, context_scale, (ONE, 0), words[:, x.targets :])  # [B, tries]
    free = []
    for overlapped in range(x.targets + 1):
        table = (lowest >= x.targets - overlapped).view(x.batch, x.height, width).long().cumsum(1).cumsum(2)
        sums = torch.nn.functional.pad(table, (1, 0, 1, 0)).flatten(1)  # of all tokens above and to the left
        top, left, high, wide = (each[:, overlapped * TRIES :][:, :TRIES] for each in tried)
        near, far = top * (width + 1) + left, (top + high) * (width + 1) + left
        a, b, c, d = (sums.gather(1, corner) for corner in (near, near + wide, far, far + wide))
        free.append(d - c - b + a)
    counts = torch.cat(free, 1)  # [B, tries]
    attempt = torch.arange(count, device=device)
    chosen = attempt.where(counts >= x.min_keep, count - 1).amin(1, keepdim=True)
    context = Blocks(*(each.gather(1, chosen).squeeze(1) for each in tried))
    there = inside(context, row, column) & (lowest >= x.targets - chosen // TRIES)
    context_counts = there.sum(1)
    ids_context = torch.argsort(~there, dim=1, stable=True)[:, : x.most_context]
    ids_context = ids_context.where(torch.arange(x.most_context, device=device) < context_counts[:, None], 0)
    return ids_context, context_counts, ids_targets, target_counts


def _check_options(x: Arguments) -> None:
    op = "multi_block_mask"
    _check.count(op, "batch", x.batch, 0, 2**31 - 1)
    for name in ("height", "width"):
        _check.count(op, name, getattr(x, name), 1, 2**14)
    _check.count(op, "targets", x.targets, 0, MOST_TARGETS)
    _check.count(op, "min_keep", x.min_keep, 0, x.height * x.width)
    for name, most in (("target_scale", 1.0), ("aspect_ratio", 64.0), ("context_scale", 1.0)):
        ends = getattr(x, name)
        _check.finite(op, **{f"{name}[{k}]": each for k, each in enumerate(ends)})
        least = 1 / 64 if name == "aspect_ratio" else 0.0
        if len(ends) != 2 or not least <= ends[0] <= ends[1] <= most:
            _check.bad_value(op, name, f"two numbers, {least} <= low <= high <= {most}", ends)


_run = register("multi_block_mask", Arguments, outputs, reference=reference, check=_check_options)


def multi_block_mask(
    batch: int,
    grid: Sequence[int],
    *,
    targets: int = 4,
    target_scale: Sequence[float] = (0.15, 0.2),
    aspect_ratio: Sequence[float] = (0.75, 1.5),
    context_scale: Sequence[float] = (0.85, 1.0),
    min_keep: int = 10,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """I-JEPA's masks: for each image some target blocks, and a context block without what is in them.

    Every block has an area and a place of its own, uniform in what is possible, and every target an aspect ratio; the
    context is square. A context that keeps fewer than min_keep tokens is drawn again; after 20 times the last target is
    no longer taken out, after 20 more the one before it, and so on.

    I-JEPA's own code draws the sizes once for a batch, area and aspect ratio by one number, no block in the last row
    and column, and cuts all rows to the shortest of the batch. Here none is cut: counts say how long each one is.

    Args:
        batch: B.
        grid: (H, W), the tokens of an image, row by row.
        targets: T, at most 32.
        target_scale: the least and the largest share of H * W that a target covers, in [0, 1].
        aspect_ratio: the least and the largest height / width of a target, in [1/64, 64]: sides are rounded, and cut to
            the grid's.
        context_scale: as target_scale, of the context before the targets are taken out.
        min_keep: tokens of a context, at least, if its block is as large.
        generator: draws an int64 key for Philox; None is torch's default one. Not for use inside torch.compile. The
            same key gives the same masks on every device and backend.
        device: where to draw; torch's default device if None.
        backend: "cpu", "cuda" or "eager"; the fastest that can run here if None (see `sslops.explain`).

    Returns:
        ids_context [B, K] int64: the context's positions, ascending; 0 behind the first context_counts[b].
        context_counts [B] int64.
        ids_targets [T, B, M] int64: the targets' positions, ascending; 0 behind the first target_counts[t, b].
        target_counts [T, B] int64.

        K and M are the most that the scales allow. `gather_tokens(tokens, ids_context, counts=context_counts)` is what
        the encoder sees, `gather_tokens(features, ids_targets[t], counts=target_counts[t])` what it is to predict.

    Raises:
        TypeError, ValueError: arguments of the wrong type, shape or value.
        RuntimeError: the backend that was asked for cannot run here.

    Source: Assran et al., Self-Supervised Learning from Images with a Joint-Embedding Predictive Architecture,
    arXiv:2301.08243, Section 3.
    """
    op = "multi_block_mask"
    height, width = _check.grid(op, grid, (2,))
    ranges = {"target_scale": target_scale, "aspect_ratio": aspect_ratio, "context_scale": context_scale}
    for name, ends in ranges.items():
        if not isinstance(ends, Sequence) or isinstance(ends, str):
            _check.bad_type(op, name, "two numbers", type(ends).__name__)
    check_name(op, backend)
    key = draw_key(op, generator, on_device(op, device))
    x = Arguments(
        key, batch, height, width, targets, list(target_scale), list(aspect_ratio), list(context_scale), min_keep
    )
    ids_context, context_counts, ids_targets, target_counts = _run(x, backend)
    return ids_context, context_counts, ids_targets, target_counts
