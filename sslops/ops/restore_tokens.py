"""What a decoder gets: the visible tokens back in their places, mask tokens in the others, positions added."""

from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from .. import _check
from .._check import Of
from .._library import Out, register


class Arguments(NamedTuple):
    visible: Annotated[Tensor, Of("B P+K D")]
    mask_token: Annotated[Tensor, Of("D")]
    ids_restore: Annotated[Tensor, Of("B L", _check.ID_DTYPES, below=lambda x: x.ids_restore.shape[1])]
    pos_embed: Annotated[Tensor | None, Of("P+L D")]
    num_prefix: int
    counts: Annotated[Tensor | None, Of("B", _check.ID_DTYPES, below=lambda x: x.visible.shape[1] - x.num_prefix + 1)]
    backend: str = ""
    needs_grad: list[bool] = []  # noqa: RUF012

    @property
    def dtype(self) -> torch.dtype:
        """Of the result, as torch promotes them"""
        dtype = torch.promote_types(self.visible.dtype, self.mask_token.dtype)
        return dtype if self.pos_embed is None else torch.promote_types(dtype, self.pos_embed.dtype)


def outputs(x: Arguments) -> Out:
    b, _, d = x.visible.shape
    return Out((b, x.num_prefix + x.ids_restore.shape[1], d), x.dtype)


def reference(x: Arguments) -> Tensor:
    """[B, P + L, D]"""
    prefix, tokens = x.visible[:, : x.num_prefix], x.visible[:, x.num_prefix :]
    (batch, kept, d), ids = tokens.shape, x.ids_restore
    masks = ids.shape[1] - kept
    if x.counts is not None:  # all masked ones in one row
        ids, masks = ids.where(ids < x.counts[:, None].clamp(max=kept), kept), 1
    shuffled = torch.cat([tokens, x.mask_token.expand(batch, masks, -1)], dim=1)
    restored = shuffled.gather(1, ids.unsqueeze(2).expand(-1, -1, d))
    out = torch.cat([prefix, restored], dim=1)
    return out if x.pos_embed is None else out + x.pos_embed


def _check_rows(x: Arguments) -> None:
    op, (_, rows, d), length = "restore_tokens", x.visible.shape, x.ids_restore.shape[1]
    _check.count(op, "num_prefix", x.num_prefix, 0, rows)
    if length < rows - x.num_prefix:
        _check.bad_value(
            op, "ids_restore", f"shape [B, L], L at least {rows - x.num_prefix}", list(x.ids_restore.shape)
        )
    if x.pos_embed is not None and len(x.pos_embed) != x.num_prefix + length:
        _check.bad_value(op, "pos_embed", f"shape {[x.num_prefix + length, d]}", list(x.pos_embed.shape))


_run = register(
    "restore_tokens",
    Arguments,
    outputs,
    reference=reference,
    check=_check_rows,
    gradients=("visible", "mask_token", "pos_embed"),
)


def _without_ones(x: Any, dimensions: int) -> Any:
    """x less dimensions of size 1 in front, if that leaves as many as these"""
    if not isinstance(x, Tensor) or x.layout != torch.strided or x.dim() <= dimensions:
        return x
    shape = x.shape[-dimensions:]
    return x.reshape(shape) if x.numel() == shape.numel() else x


def restore_tokens(
    visible: Tensor,
    mask_token: Tensor,
    ids_restore: Tensor,
    pos_embed: Tensor | None = None,
    num_prefix: int = 0,
    *,
    counts: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The decoder's input in MAE: position j gets visible token ids_restore[b, j] if there is one, else the mask token.

    Args:
        visible: [B, P + K, D], P prefix tokens (MAE's class token: P = 1) before K visible ones; float32, float16,
            bfloat16 or float64.
        mask_token: D elements, [1, 1, D] or [D].
        ids_restore: [B, L] int64 or int32 in [0, L), from `random_mask`. On a GPU they are not looked at: an id outside
            gives a row of NaN (with device-side asserts compiled in, the kernel stops instead).
        pos_embed: [1, P + L, D] or [P + L, D], added to the result.
        num_prefix: P; these tokens stay in front.
        counts: [B] int64 or int32 in [0, K]: only the first counts[b] visible tokens of a row are there, and positions
            of an id above have the mask token; the others are not read, and their gradient is 0. On a GPU a count
            outside is taken as the nearest inside.
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
    token, positions = _without_ones(mask_token, 1), _without_ones(pos_embed, 2)
    x = Arguments(visible, token, _check.ids64(ids_restore), positions, num_prefix, _check.ids64(counts))
    out: Tensor = _run(x, backend)
    return out
