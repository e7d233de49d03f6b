"""Random masks, as masked autoencoders draw them: which tokens of each row are kept, and where the others go."""

import math
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from .. import _check
from .._check import Of
from .._library import Out, register
from .._random import RandomStream, draw_key, on_device, philox
from ..backend import check_name


class Arguments(NamedTuple):
    noise: Annotated[Tensor, Of("...", (*_check.FLOAT_DTYPES, torch.int64))]  # [B, L], or a key [] int64 that draws it
    batch: int
    length: int
    keep: int
    num_prefix: int  # tokens that come first, whatever their noise
    # of a row: its tokens, behind which there is padding; those it keeps, at most `keep`
    lengths: Annotated[Tensor | None, Of("batch", _check.ID_DTYPES, below=lambda x: x.length + 1)] = None
    counts: Annotated[Tensor | None, Of("batch", _check.ID_DTYPES, below=lambda x: x.keep + 1)] = None
    # squares of a grid, drawn with the key: how many, of a side, the grid's width; their tokens are first, or else last
    blocks: int = 0
    block_size: int = 1
    width: int = 1
    blocks_first: bool = True
    backend: str = ""


class Outputs(NamedTuple):
    ids_keep: Out
    ids_mask: Out  # of rank K and above
    mask: Out
    ids_restore: Out


def outputs(x: Arguments) -> Outputs:
    return Outputs(
        ids_keep=Out((x.batch, x.keep), torch.int64),
        ids_mask=Out((x.batch, x.length - x.keep), torch.int64),
        mask=Out((x.batch, x.length)),
        ids_restore=Out((x.batch, x.length), torch.int64),
    )


def in_blocks(x: Arguments) -> Tensor:
    """[B, L] bool: the tokens in a square around one of the centers that are drawn"""
    fours = (x.blocks + 3) // 4  # of words, for each row
    words = philox(x.noise, RandomStream.MASK_BLOCKS, 0, x.batch * fours, x.noise.device)
    centers = words.view(x.batch, 4 * fours, 1)[:, : x.blocks] * x.length >> 32
    token = torch.arange(x.length, device=x.noise.device)
    off = [of_token - of_center + x.block_size // 2 for of_token, of_center in (
        (token // x.width, centers // x.width), (token % x.width, centers % x.width)
    )]  # fmt: skip
    there = (off[0] >= 0) & (off[0] < x.block_size) & (off[1] >= 0) & (off[1] < x.block_size)
    return there.any(dim=1)


def reference(x: Arguments) -> tuple[Tensor, ...]:
    """ids_keep [B, K], ids_mask [B, L-K], mask [B, L], ids_restore [B, L]"""
    noise = x.noise
    if noise.dim() == 0:
        blocks = (x.length + 3) // 4  # of four words, for each row
        words = philox(noise, RandomStream.RANDOM_MASK, 0, x.batch * blocks, noise.device)
        words = words.view(x.batch, 4 * blocks)[:, : x.length]
        if x.blocks:
            later = in_blocks(x) != x.blocks_first
            words = words & 2**31 - 1 | (~later).long() << 31  # the sign bit is that of a number which comes first
        noise = words.to(torch.int32)
    token = torch.arange(x.length, device=noise.device)
    tokens = x.length if x.lengths is None else x.lengths[:, None]
    kept = x.keep if x.counts is None else x.counts[:, None].clamp(max=x.keep)
    lowest, highest = (-float("inf"), float("nan")) if noise.is_floating_point() else (-(2**31), 2**31 - 1)
    noise = torch.cat([torch.full_like(noise[:, : x.num_prefix], lowest), noise[:, x.num_prefix :]], dim=1)
    if x.lengths is not None:
        noise = noise.masked_fill(token >= tokens, highest)
    ids_shuffle = torch.argsort(noise, dim=1, stable=True)
    ids_restore = torch.argsort(ids_shuffle, dim=1)
    ids_keep, ids_mask = ids_shuffle[:, : x.keep].contiguous(), ids_shuffle[:, x.keep :].contiguous()
    mask = ids_restore >= kept
    if not (x.lengths is None is x.counts):
        mask &= ids_restore < tokens
        ids_keep *= (token < kept)[..., : x.keep] & (token < tokens)[..., : x.keep]
    return ids_keep, ids_mask, mask.to(torch.float32), ids_restore


def _check_counts(x: Arguments) -> None:
    op, key = "random_mask", x.noise.dim() == 0
    if x.noise.is_floating_point() == key:
        _check.bad_type(op, "noise", "an int64 key []" if key else "a floating-point tensor [B, L]", x.noise.dtype)
    if not key and tuple(x.noise.shape) != (x.batch, x.length):
        _check.bad_value(op, "noise", f"shape {[x.batch, x.length]}", list(x.noise.shape))
    for name in ("batch", "length"):
        _check.count(op, name, getattr(x, name), 0, 2**31 - 1)
    for name in ("keep", "num_prefix"):
        _check.count(op, name, getattr(x, name), 0, x.length)
    _check.count(op, "blocks", x.blocks, 0, 2**31 - 1 if key else 0)
    for name in ("block_size", "width"):
        _check.count(op, name, getattr(x, name), 1, 2**31 - 1)
    if x.length % x.width:
        _check.bad_value(op, "width", f"a divisor of {x.length}", x.width)


_run = register("random_mask", Arguments, outputs, reference=reference, check=_check_counts)


def draw(
    op: str,
    batch: int,
    length: int,
    mask_ratio: float,
    prefix: int,
    noise: Tensor | None,
    generator: torch.Generator | None,
    device: torch.device | str | None,
    backend: str | None,
    keep: int | None = None,
    **more: Any,
) -> tuple[Tensor, ...]:
    """What `outputs` says; of the tokens after `prefix` the share mask_ratio, a number, is masked, or all but `keep`.
    Errors name op.
    """
    _check.count(op, "batch", batch, 0, 2**31 - 1)
    _check.count(op, "length", length, 0, 2**31 - 1)
    check_name(op, backend)
    keep = prefix + int((length - prefix) * (1 - mask_ratio)) if keep is None else keep
    if noise is None:
        noise = draw_key(op, generator, on_device(op, device))
    else:
        _check.tensors(op, {"noise": noise, "B": batch, "L": length}, {"noise": Of("B L")})
        if generator is not None:
            _check.bad_value(op, "generator", "None beside noise", generator)
        if device is not None and on_device(op, device).type != noise.device.type:
            _check.bad_value(op, "noise", f"a tensor on {device}", noise.device)
    found: tuple[Tensor, ...] = _run(Arguments(noise.detach(), batch, length, keep, prefix, **more), backend)
    return found


def random_mask(
    batch: int,
    length: int,
    mask_ratio: float | Tensor,
    *,
    lengths: Tensor | None = None,
    min_keep: int = 0,
    max_keep: int | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """Keeps K = int(L * (1 - mask_ratio)) random tokens of L in each of B rows, as MAE does.

    Tokens are ranked by their noise, the smallest first: equal ones in the order of their positions, NaN last. Those
    ranked below K are kept. For noise without ties this is what MAE's random_masking computes.

    With lengths, or a tensor of ratios, each row keeps a number of its own: int(length * (1 - ratio)), in the limits of
    min_keep and max_keep, and never more than the row has. Padding is neither kept nor masked.

    Args:
        batch, length: B and L.
        mask_ratio: in [0, 1). K is MAE's, rounding error and all: int(20 * (1 - 0.9)) is 1. K = 0 masks all. Or a ratio
            for each row, [B] float32, float16, bfloat16 or float64, which is not looked at: what is outside [0, 1]
            keeps as much as the nearest in it, NaN min_keep.
        lengths: [B] int64 or int32 in [0, L], how many tokens a row has; those behind are padding. On a GPU they are
            not looked at, and one outside is taken as the nearest inside.
        min_keep, max_keep: limits of what a row keeps. max_keep makes K no wider, and of ratios narrower than L.
        noise: [B, L] float32, float16, bfloat16 or float64 (which runs the eager reference). None draws it: by Philox
            under one int64 key, which comes from torch's generator of the device and is not read on the host. The same
            key gives the same masks on every device and backend; torch's generators give CPU and GPU different keys.
        generator: draws the key; None is torch's default one. Not for use inside torch.compile.
        device: where to draw, if noise is None: that of lengths or of the ratios, or torch's default device if None.
        backend: "cpu", "cuda" or "eager"; the fastest that can run here if None (see `sslops.explain`).

    Returns:
        ids_keep [B, K] int64: the positions kept, in the order of their noise.
        mask [B, L] float32: 1 for masked, 0 for kept and for padding.
        ids_restore [B, L] int64: the rank of each position, with which `restore_tokens` puts tokens back. Padding is
            ranked last, in its order.
        counts [B] int64, with lengths or a tensor of ratios only: how many tokens each row keeps. K is then the most
            that one can keep, and ids_keep is 0 behind the first counts[b]: `gather_tokens` and `restore_tokens` take
            the counts, too.

    Raises:
        TypeError, ValueError: arguments of the wrong type, shape, dtype, device or value.
        RuntimeError: the backend that was asked for cannot run here.

    Source: He et al., Masked Autoencoders Are Scalable Vision Learners, arXiv:2111.06377.
    """
    op = "random_mask"
    for name, value in (("batch", batch), ("length", length)):
        _check.count(op, name, value, 0, 2**31 - 1)
    _check.count(op, "min_keep", min_keep, 0, length)
    keep = length
    if max_keep is not None:
        _check.count(op, "max_keep", max_keep, min_keep, length)
        keep = max_keep
    ratios, share = None, 0.0
    if isinstance(mask_ratio, Tensor):
        ratios = mask_ratio
    else:
        _check.fraction(op, mask_ratio=mask_ratio)
        share = 1 - mask_ratio
        keep = min(keep, max(min_keep, int(length * share)))
    lengths, counts = _check.ids64(lengths), None
    if (rows := ratios if lengths is None else lengths) is not None:
        given = {"mask_ratio": ratios, "lengths": lengths, "B": batch}
        wanted = {"mask_ratio": Of("B", optional=True), "lengths": Of("B", _check.ID_DTYPES, optional=True)}
        _check.tensors(op, given, wanted)
        device = rows.device if device is None and noise is None else device
        tokens = torch.full_like(rows, length, dtype=torch.int64) if lengths is None else lengths.clamp(0, length)
        shares = tokens.double() * (share if ratios is None else 1 - ratios.detach().double())
        counts = shares.nan_to_num(0.0).clamp(min_keep, keep).long().minimum(tokens)
    ids_keep, _, mask, ids_restore = draw(
        op, batch, length, 0.0, 0, noise, generator, device, backend, keep, lengths=lengths, counts=counts
    )
    return (ids_keep, mask, ids_restore) if counts is None else (ids_keep, mask, ids_restore, counts)


def tube_mask(
    batch: int,
    grid: Sequence[int],
    mask_ratio: float,
    *,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """VideoMAE's masks: `random_mask` for one frame of each video, the same in all of its frames.

    Args:
        batch: B.
        grid: (T, H, W), the frames of tokens and the tokens of a frame; L = T * H * W, frame after frame.
        mask_ratio: in [0, 1). Of the S = H * W tokens of a frame int(S * mask_ratio) are masked, as VideoMAE has it.
        noise: [B, S], else as `random_mask` has it.
        generator, device, backend: as `random_mask` has them.

    Returns:
        ids_keep [B, K] int64, K = T * (S - int(S * mask_ratio)): frame after frame, in each in the order of the noise.
        mask [B, L] float32: 1 for masked. `mask.bool()` is VideoMAE's bool_masked_pos.
        ids_restore [B, L] int64: for `restore_tokens`; the masked ones come behind all that are kept.

    Raises:
        TypeError, ValueError, RuntimeError: as `random_mask` does.

    Source: Tong et al., VideoMAE: Masked Autoencoders are Data-Efficient Learners, arXiv:2203.12602, Section 3.3.
    """
    op = "tube_mask"
    frames, height, width = _check.grid(op, grid, (3,))
    _check.fraction(op, mask_ratio=mask_ratio)
    size = height * width
    keep = size - int(size * mask_ratio)
    ids, _, mask, rank = draw(op, batch, size, mask_ratio, 0, noise, generator, device, backend, keep=keep)
    frame = torch.arange(frames, device=ids.device)[:, None]
    kept_before = frame * keep  # of a token's rank in its frame, what is to be added
    masked_before = frame * (size - keep) + (frames - 1) * keep
    ids_restore = rank[:, None] + torch.where(mask[:, None] == 0, kept_before, masked_before)
    return (ids[:, None] + frame * size).flatten(1), mask.repeat(1, frames), ids_restore.flatten(1)


def block_mask(
    batch: int,
    grid: Sequence[int],
    mask_ratio: float,
    *,
    block_size: int = 3,
    adjust: float = 0.07,
    inverse: bool = True,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """data2vec 2.0's masks: blocks around random centers are kept, and just as many tokens in every row.

    The centers are int(L * (1 - mask_ratio + adjust) / block_size^axes), each anywhere, so that blocks overlap and are
    cut off at the edges. Where they hold more than K tokens, random ones of theirs are kept; where they hold fewer, all
    of theirs and random others. Several masks of an image, as data2vec 2.0 takes them, are further rows.

    Args:
        batch: B.
        grid: (H, W) or (L,), the tokens of an image, row by row, or of a signal; L = H * W.
        mask_ratio: in [0, 1). K = int(L * (1 - mask_ratio)).
        block_size: tokens on a side of a block.
        adjust: the share of tokens for which blocks are drawn beyond what is to be kept, since blocks overlap.
        inverse: blocks are what is kept; if not, what is masked: of int(L * (mask_ratio + adjust) / block_size^axes)
            blocks, and int(L * mask_ratio) tokens.
        generator, device, backend: as `random_mask` has them.

    Returns:
        ids_keep [B, K], mask [B, L] and ids_restore [B, L], as `random_mask` has them.

    Raises:
        TypeError, ValueError, RuntimeError: as `random_mask` does.

    Source: Baevski et al., Efficient Self-supervised Learning with Contextualized Target Representations for Vision,
    Speech and Language, arXiv:2212.07525, Section 3.2.
    """
    op = "block_mask"
    axes = _check.grid(op, grid, (1, 2))
    _check.fraction(op, mask_ratio=mask_ratio)
    _check.count(op, "block_size", block_size, 1, 2**15)
    _check.finite(op, adjust=adjust)
    _check.flag(op, "inverse", inverse)
    length = math.prod(axes)
    share = 1 - mask_ratio if inverse else mask_ratio
    blocks = max(0, int(length * (share + adjust) / block_size ** len(axes)))
    of_blocks = int(length * share)
    ids_keep, _, mask, ids_restore = draw(
        op, batch, length, mask_ratio, 0, None, generator, device, backend,
        keep=of_blocks if inverse else length - of_blocks,
        blocks=blocks, block_size=block_size, width=max(1, axes[-1]), blocks_first=inverse,
    )  # fmt: skip
    return ids_keep, mask, ids_restore


def random_token_mask(
    batch: int,
    length: int,
    mask_ratio: float,
    *,
    mask_class_token: bool = False,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`random_mask` as the positions kept [B, K] and masked [B, L - K], in the order of their noise.

    L counts a class token at position 0: it is kept and comes first, so that K = 1 + int((L - 1) * (1 - mask_ratio)),
    unless mask_class_token makes it a token like any other. These are the index pairs of lightly's random_token_mask.
    """
    op = "random_token_mask"
    _check.probability(op, mask_ratio=mask_ratio)  # at 1 the class token is left
    _check.flag(op, "mask_class_token", mask_class_token)
    prefix = 0 if mask_class_token or length == 0 else 1
    ids_keep, ids_mask, _, _ = draw(op, batch, length, mask_ratio, prefix, noise, generator, device, backend)
    return ids_keep, ids_mask
