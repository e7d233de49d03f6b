"""Random masks, as masked autoencoders draw them: which tokens of each row are kept, and where the others go."""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _check
from .._library_old import register
from .._random import RandomStream, draw_key, philox
from ..backend import kernel, resolve


def reference(source: Tensor, batch: int, length: int, keep: int, num_prefix: int) -> tuple[Tensor, ...]:
    """ids_keep [B, K], ids_mask [B, L-K], mask [B, L], ids_restore [B, L]; source: noise [B, L], or a key []"""
    if source.dim() == 0:
        blocks = (length + 3) // 4  # of four words, for each row
        words = philox(source, RandomStream.RANDOM_MASK, 0, batch * blocks, source.device)
        source = words.view(batch, 4 * blocks)[:, :length].to(torch.int32)
    lowest = -float("inf") if source.is_floating_point() else torch.iinfo(torch.int32).min
    noise = torch.cat([torch.full_like(source[:, :num_prefix], lowest), source[:, num_prefix:]], dim=1)
    ids_shuffle = torch.argsort(noise, dim=1, stable=True)
    ids_restore = torch.argsort(ids_shuffle, dim=1)
    mask = (ids_restore >= keep).to(torch.float32)
    return ids_shuffle[:, :keep].contiguous(), ids_shuffle[:, keep:].contiguous(), mask, ids_restore


class _Arguments(NamedTuple):
    source: Tensor
    batch: int
    length: int
    keep: int
    num_prefix: int
    backend: str


def _forward(x: _Arguments) -> tuple[Tensor, ...]:
    if x.source.dim() == 0:
        _check.ids("random_mask", "[]", source=x.source)
    else:
        _check_noise("random_mask", x.source, x.batch, x.length)
    if not 0 <= x.num_prefix <= x.length or not 0 <= x.keep <= x.length:
        _check.bad_value("random_mask", "keep, num_prefix", f"counts up to {x.length}", (x.keep, x.num_prefix))
    source = x.source.to(torch.float32).contiguous() if x.source.dim() else x.source
    outputs = _forward_fake(x)
    kernel(x.backend, "random_mask").forward(source, x.num_prefix, *outputs)
    return outputs


def _forward_fake(x: _Arguments) -> tuple[Tensor, ...]:
    def ids(columns: int) -> Tensor:
        return x.source.new_empty((x.batch, columns), dtype=torch.int64)

    mask = x.source.new_empty((x.batch, x.length), dtype=torch.float32)
    return ids(x.keep), ids(x.length - x.keep), mask, ids(x.length)


register(
    "random_mask",
    _Arguments,
    saved=("ids_mask", "mask", "ids_restore"),
    forward=_forward,
    forward_fake=_forward_fake,
)


def _check_sizes(op: str, batch: int, length: int, mask_ratio: float) -> None:
    _check.count(op, "batch", batch, 0, 2**31 - 1)
    _check.count(op, "length", length, 0, 2**31 - 1)
    _check.fraction(op, mask_ratio=mask_ratio)


def _check_noise(op: str, noise: Tensor, batch: int, length: int) -> None:
    _check.floats(op, "[B, L]", noise=noise)
    if noise.shape != (batch, length):
        _check.bad_value(op, "noise", f"shape {[batch, length]}", list(noise.shape))


def _draw(
    op: str,
    batch: int,
    length: int,
    keep: int,
    num_prefix: int,
    noise: Tensor | None,
    generator: torch.Generator | None,
    device: torch.device | str | None,
    backend: str | None,
) -> tuple[Tensor, ...]:
    if noise is not None:
        _check_noise(op, noise, batch, length)
        if generator is not None:
            _check.bad_value(op, "generator", "None beside noise", generator)
        if device is not None and torch.device(device).type != noise.device.type:
            _check.bad_value(op, "noise", f"a tensor on {device}", noise.device)
        source = noise.detach()
    else:
        source = draw_key(op, generator, torch.empty(0, device=device).device)
    backend = resolve("random_mask", source.device, source.dtype, backend)
    if backend == "eager":
        return reference(source, batch, length, keep, num_prefix)
    outputs: tuple[Tensor, ...] = torch.ops.sslops.random_mask(source, batch, length, keep, num_prefix, backend)
    return outputs


def random_mask(
    batch: int,
    length: int,
    mask_ratio: float,
    *,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Keeps K = int(L * (1 - mask_ratio)) random tokens of L in each of B rows, as MAE does.

    Tokens are ranked by their noise, the smallest first: equal ones in the order of their positions, NaN last. Those
    ranked below K are kept. For noise without ties this is what MAE's random_masking computes.

    Args:
        batch, length: B and L.
        mask_ratio: in [0, 1). K is MAE's, rounding error and all: int(20 * (1 - 0.9)) is 1. K = 0 masks all.
        noise: [B, L] float32, float16, bfloat16 or float64 (which runs the eager reference). None draws it: by Philox
            under one int64 key, which comes from torch's generator of the device and is not read on the host. The same
            key gives the same masks on every device and backend; torch's generators give CPU and GPU different keys.
        generator: draws the key; None is torch's default one. Not for use inside torch.compile.
        device: where to draw, if noise is None: torch's default device if None.
        backend: "cpu", "cuda" or "eager"; the fastest that can run here if None (see `sslops.explain`).

    Returns:
        ids_keep [B, K] int64: the positions kept, in the order of their noise.
        mask [B, L] float32: 1 for masked, 0 for kept.
        ids_restore [B, L] int64: the rank of each position, with which `restore_tokens` puts tokens back.

    Raises:
        TypeError, ValueError: arguments of the wrong type, shape, dtype, device or value.
        RuntimeError: the backend that was asked for cannot run here.

    Source: He et al., Masked Autoencoders Are Scalable Vision Learners, arXiv:2111.06377.
    """
    _check_sizes("random_mask", batch, length, mask_ratio)
    keep = int(length * (1 - mask_ratio))
    ids_keep, _, mask, ids_restore = _draw("random_mask", batch, length, keep, 0, noise, generator, device, backend)
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
    _check_sizes("random_token_mask", batch, length, 0.0 if mask_ratio == 1 else mask_ratio)  # the class token is left
    _check.flag("random_token_mask", "mask_class_token", mask_class_token)
    prefix = 0 if mask_class_token or length == 0 else 1
    keep = prefix + int((length - prefix) * (1 - mask_ratio))
    ids_keep, ids_mask, _, _ = _draw(
        "random_token_mask", batch, length, keep, prefix, noise, generator, device, backend
    )
    return ids_keep, ids_mask
