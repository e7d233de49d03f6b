"""What a decoder gets: the visible tokens back in their places, mask tokens in the others, positions added."""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _check
from .._library_old import register
from ..backend import kernel, resolve


def reference(
    visible: Tensor, mask_token: Tensor, ids_restore: Tensor, pos_embed: Tensor | None, num_prefix: int
) -> Tensor:
    """[B, P + L, D]"""
    prefix, tokens = visible[:, :num_prefix], visible[:, num_prefix:]
    masked = mask_token.expand(len(tokens), ids_restore.shape[1] - tokens.shape[1], -1)
    shuffled = torch.cat([tokens, masked], dim=1)
    restored = shuffled.gather(1, ids_restore.unsqueeze(2).expand(-1, -1, visible.shape[2]))
    out = torch.cat([prefix, restored], dim=1)
    return out if pos_embed is None else out + pos_embed


class _Arguments(NamedTuple):
    visible: Tensor
    mask_token: Tensor  # [D]
    ids_restore: Tensor
    pos_embed: Tensor | None  # [P + L, D]
    num_prefix: int
    pos_grad: bool  # pos_embed gets its gradient
    backend: str


def _dtype(visible: Tensor, mask_token: Tensor, pos_embed: Tensor | None) -> torch.dtype:
    """Of the result, as torch promotes them"""
    dtype = torch.promote_types(visible.dtype, mask_token.dtype)
    return dtype if pos_embed is None else torch.promote_types(dtype, pos_embed.dtype)


def _check_all(
    visible: Tensor, mask_token: Tensor, ids_restore: Tensor, pos_embed: Tensor | None, num_prefix: int
) -> None:
    op = "restore_tokens"
    _check.floats(op, "[B, P + K, D]", visible=visible)
    _check.ids(op, "[B, L]", ids_restore=ids_restore)
    b, rows, d = visible.shape
    _check.count(op, "num_prefix", num_prefix, 0, rows)
    length = ids_restore.shape[1]
    if len(ids_restore) != b or length < rows - num_prefix:
        wanted = f"shape [{b}, L], L at least {rows - num_prefix}"
        _check.bad_value(op, "ids_restore", wanted, list(ids_restore.shape))
    _check.same_device(op, "visible", visible, ids_restore=ids_restore)
    parts = {"mask_token": (mask_token, (d,)), "pos_embed": (pos_embed, (num_prefix + length, d))}
    for name, (x, shape) in parts.items():
        if x is None and name == "pos_embed":
            continue
        if not isinstance(x, Tensor):
            _check.bad_type(op, name, "a tensor", type(x).__name__)
        if x.dtype not in _check.FLOAT_DTYPES or x.layout != torch.strided:
            _check.bad_type(op, name, "a dense floating-point tensor", f"{x.dtype}, {x.layout}")
        if x.shape[-len(shape) :] != shape or x.numel() != torch.Size(shape).numel():
            _check.bad_value(op, name, f"shape {list(shape)}, with ones in front or not", list(x.shape))
        _check.same_device(op, "visible", visible, **{name: x})


def _checked(x: _Arguments) -> _Arguments:
    _check_all(*x[:5])
    _check.id_range("restore_tokens", x.ids_restore.shape[1], ids_restore=x.ids_restore)
    if _dtype(x.visible, x.mask_token, x.pos_embed) == torch.float64:
        _check.bad_type("restore_tokens", "pos_embed, mask_token", "no float64: for backend='eager'", "float64")
    return x._replace(
        visible=x.visible.contiguous(), mask_token=x.mask_token.reshape(-1).contiguous(),
        ids_restore=x.ids_restore.contiguous(), pos_embed=None if x.pos_embed is None else x.pos_embed.contiguous(),
    )  # fmt: skip


def _forward(x: _Arguments) -> Tensor:
    x = _checked(x)
    out = _forward_fake(x)
    kernel(x.backend, "restore_tokens").forward(*x[:5], out)
    return out


def _forward_fake(x: _Arguments) -> Tensor:
    (b, _, d), rows = x.visible.shape, x.num_prefix + x.ids_restore.shape[1]
    return x.visible.new_empty((b, rows, d), dtype=_dtype(x.visible, x.mask_token, x.pos_embed))


def _backward(grad: Tensor, x: _Arguments) -> tuple[Tensor, ...]:
    x = _checked(x)
    wanted = _forward_fake(x)
    if grad.shape != wanted.shape or grad.dtype != wanted.dtype or grad.device != wanted.device:
        got = f"{grad.dtype} {list(grad.shape)}"
        _check.bad_value("restore_tokens", "grad", f"{wanted.dtype} {list(wanted.shape)}", got)
    outputs = _backward_fake(grad, x)
    kernel(x.backend, "restore_tokens").backward(grad.contiguous(), x.ids_restore, x.num_prefix, *outputs)
    return outputs


def _backward_fake(grad: Tensor, x: _Arguments) -> tuple[Tensor, ...]:
    """The positions' gradient has no elements if nobody wants it."""
    positions = (
        x.pos_embed.new_empty(x.pos_embed.shape) if x.pos_embed is not None and x.pos_grad else grad.new_empty(0)
    )
    return x.visible.new_empty(x.visible.shape), x.mask_token.new_empty(x.mask_token.shape), positions


register(
    "restore_tokens",
    _Arguments,
    gradients=("visible", "mask_token", "pos_embed"),
    forward=_forward,
    forward_fake=_forward_fake,
    backward=_backward,
    backward_fake=_backward_fake,
)


def restore_tokens(
    visible: Tensor,
    mask_token: Tensor,
    ids_restore: Tensor,
    pos_embed: Tensor | None = None,
    num_prefix: int = 0,
    *,
    backend: str | None = None,
) -> Tensor:
    """The decoder's input in MAE: position j gets visible token ids_restore[b, j] if there is one, else the mask token.

    Args:
        visible: [B, P + K, D], P prefix tokens (MAE's class token: P = 1) before K visible ones; float32, float16,
            bfloat16 or float64.
        mask_token: D elements, [1, 1, D] or [D].
        ids_restore: [B, L] int64 in [0, L), from `random_mask`. On a GPU they are not looked at: an id outside gives a
            row of NaN (with device-side asserts compiled in, the kernel stops instead).
        pos_embed: [1, P + L, D] or [P + L, D], added to the result.
        num_prefix: P; these tokens stay in front.
        backend: "cpu", "cuda" or "eager"; the fastest that can run here if None (see `sslops.explain`).

    Returns:
        [B, P + L, D] in the dtype that torch promotes visible, mask_token and pos_embed to (float64 runs the eager
        reference). Gradients go to all three and are the same bits every run; those of mask_token and pos_embed are
        added up in float64.

    Raises:
        TypeError, ValueError: arguments of the wrong type, shape, dtype, device or value; ids on the CPU out of range.
        RuntimeError: the backend that was asked for cannot run here; a second derivative of a fused backend.

    Source: He et al., Masked Autoencoders Are Scalable Vision Learners, arXiv:2111.06377.
    """
    _check_all(visible, mask_token, ids_restore, pos_embed, num_prefix)
    backend = resolve("restore_tokens", visible.device, _dtype(visible, mask_token, pos_embed), backend)
    d, rows = visible.shape[2], num_prefix + ids_restore.shape[1]
    token, positions = mask_token.reshape(d), None if pos_embed is None else pos_embed.reshape(rows, d)
    if backend == "eager":
        if not torch.compiler.is_compiling():
            _check.id_range("restore_tokens", ids_restore.shape[1], ids_restore=ids_restore)
        return reference(visible, token, ids_restore, positions, num_prefix)
    pos_grad = positions is not None and positions.requires_grad
    out: Tensor = torch.ops.sslops.restore_tokens(visible, token, ids_restore, positions, num_prefix, pos_grad, backend)
    return out
