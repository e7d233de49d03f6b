"""Random masks, as masked autoencoders draw them: which tokens of each row are kept, and where the others go."""

from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from .. import _check
from .._check import Of
from .._library import Out, register
from .._random import RandomStream, draw_key, philox
from ..backend import check_name


class Arguments(NamedTuple):
    noise: Annotated[Tensor, Of("...", (*_check.FLOAT_DTYPES, torch.int64))]  # [B, L], or a key [] int64 that draws it
    batch: int
    length: int
    keep: int
    num_prefix: int  # tokens that come first, whatever their noise
    backend: str = ""


class Outputs(NamedTuple):
    ids_keep: Out
    ids_mask: Out
    mask: Out
    ids_restore: Out


def outputs(x: Arguments) -> Outputs:
    return Outputs(
        ids_keep=Out((x.batch, x.keep), torch.int64),
        ids_mask=Out((x.batch, x.length - x.keep), torch.int64),
        mask=Out((x.batch, x.length)),
        ids_restore=Out((x.batch, x.length), torch.int64),
    )


def reference(x: Arguments) -> tuple[Tensor, ...]:
    """ids_keep [B, K], ids_mask [B, L-K], mask [B, L], ids_restore [B, L]"""
    noise = x.noise
    if noise.dim() == 0:
        blocks = (x.length + 3) // 4  # of four words, for each row
        words = philox(noise, RandomStream.RANDOM_MASK, 0, x.batch * blocks, noise.device)
        noise = words.view(x.batch, 4 * blocks)[:, : x.length].to(torch.int32)
    lowest = -float("inf") if noise.is_floating_point() else torch.iinfo(torch.int32).min
    first = torch.full_like(noise[:, : x.num_prefix], lowest)
    ids_shuffle = torch.argsort(torch.cat([first, noise[:, x.num_prefix :]], dim=1), dim=1, stable=True)
    ids_restore = torch.argsort(ids_shuffle, dim=1)
    mask = (ids_restore >= x.keep).to(torch.float32)
    return ids_shuffle[:, : x.keep].contiguous(), ids_shuffle[:, x.keep :].contiguous(), mask, ids_restore


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


_run = register("random_mask", Arguments, outputs, reference=reference, check=_check_counts)


def _there(op: str, device: torch.device | str | None) -> torch.device:
    """The device, or torch's default one"""
    try:
        return torch.empty(0, device=device).device
    except (
        AssertionError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:  # no name of a device, or of none that is here
        return _check.bad_value(op, "device", "a device that is there", f"{device!r}: {error}")


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
) -> tuple[Tensor, ...]:
    """What `outputs` says; of the tokens after `prefix` the share mask_ratio, a number, is masked. Errors name op."""
    _check.count(op, "batch", batch, 0, 2**31 - 1)
    _check.count(op, "length", length, 0, 2**31 - 1)
    check_name(op, backend)
    keep = prefix + int((length - prefix) * (1 - mask_ratio))
    if noise is None:
        noise = draw_key(op, generator, _there(op, device))
    else:
        _check.tensors(op, {"noise": noise, "B": batch, "L": length}, {"noise": Of("B L")})
        if generator is not None:
            _check.bad_value(op, "generator", "None beside noise", generator)
        if device is not None and _there(op, device).type != noise.device.type:
            _check.bad_value(op, "noise", f"a tensor on {device}", noise.device)
    found: tuple[Tensor, ...] = _run(Arguments(noise.detach(), batch, length, keep, prefix), backend)
    return found


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
    _check.fraction("random_mask", mask_ratio=mask_ratio)
    ids_keep, _, mask, ids_restore = draw(
        "random_mask", batch, length, mask_ratio, 0, noise, generator, device, backend
    )
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
