"""The tokens that an encoder is to see: rows of each sequence, picked by their positions."""

from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from .. import _check
from .._check import Of
from .._library import Out, register


class Arguments(NamedTuple):
    tokens: Annotated[Tensor, Of("B L D", strided=True)]
    ids: Annotated[Tensor, Of("B K", _check.ID_DTYPES, below=lambda x: x.tokens.shape[1], counts="counts")]
    counts: Annotated[Tensor | None, Of("B", _check.ID_DTYPES, below=lambda x: x.ids.shape[1] + 1)]
    unique: bool
    backend: str = ""


def outputs(x: Arguments) -> Out:
    return Out((*x.ids.shape, x.tokens.shape[2]), x.tokens.dtype)


def reference(x: Arguments) -> Tensor:
    """[B, K, D]"""
    tokens, ids = x.tokens, x.ids
    if x.counts is not None:  # behind the tokens there is a row of zeros
        tokens = torch.nn.functional.pad(tokens, (0, 0, 0, 1))
        ids = ids.where(torch.arange(ids.shape[1], device=ids.device) < x.counts[:, None], x.tokens.shape[1])
    return tokens.gather(1, ids.unsqueeze(2).expand(-1, -1, tokens.shape[2]))


_run = register("gather_tokens", Arguments, outputs, reference=reference, gradients=("tokens",))


def gather_tokens(
    tokens: Tensor, ids: Tensor, *, counts: Tensor | None = None, unique: bool = False, backend: str | None = None
) -> Tensor:
    """out[b, k] = tokens[b, ids[b, k]], with a gradient that is the same bits every run, for repeated ids too.

    Args:
        tokens: [B, L, D] float32, float16, bfloat16 or float64 (float64 runs the eager reference). Rows may lie apart
            (tokens[:, 1:] is not copied).
        ids: [B, K] int64 or int32 in [0, L). On a GPU they are not looked at: an id outside gives a row of NaN, and
            takes no part in the gradient (with device-side asserts compiled in, the kernel stops instead).
        counts: [B] int64 or int32 in [0, K]: only the first counts[b] ids of a row are looked at, whatever the others
            are; those make rows of zeros, without a gradient. On a GPU a count outside is taken as the nearest inside.
        unique: the caller knows that no id comes twice in a row of ids; a GPU then finds the gradient by a plain
            scatter. Wrongly said, one of the rows that share an id is all that counts.
        backend: "cpu", "cuda" or "eager"; the fastest that can run here if None (see `sslops.explain`).

    Returns:
        [B, K, D] in the dtype of the tokens. Gradients of a repeated id are added up in float32, in the order of k.

    Raises:
        TypeError, ValueError: arguments of the wrong type, shape, dtype, device or value; ids on the CPU out of range.
        RuntimeError: the backend that was asked for cannot run here; a second derivative of a fused backend.
    """
    _check.flag("gather_tokens", "unique", unique)
    out: Tensor = _run(Arguments(tokens, _check.ids64(ids), _check.ids64(counts), unique), backend)
    return out
