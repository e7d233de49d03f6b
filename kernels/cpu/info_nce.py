"""InfoNCE on the CPU: candidates pass by in tiles of rows, nothing of size B x K.

r_i = sum over the negatives of exp((s_ij - m_i) / tau), m_i the maximum. In the same pass, o_i sums the negatives with
these weights: the query's gradient is (o_i / r_i - share of the negatives in r_i * key_i) / tau. 4 B K D FLOP.
A second pass, for the candidates' own gradient, makes the weights again: W^T Q, 4 B K D FLOP more.
"""

import torch
from torch import Tensor

from sslops import _C

from .tiles import DTYPE_CODES, FLOAT32, Stream, ranges, refuses, softmax_scale, stream_for  # noqa: F401


def _scale(temperature: float | Tensor, normalize: bool, operand: torch.dtype) -> tuple[float, bool, bool]:
    """As softmax_scale, and whether candidates are normalised in a copy: at a low temperature the rounding of 1 / norm
    shows in the logits of a column.
    """
    tau, fixed = softmax_scale(temperature, normalize)
    return tau, fixed, normalize and not fixed and operand == torch.float32


def _inv_norm(x: Tensor, normalize: bool, out: Tensor | None = None) -> Tensor:
    """[N], 1 without normalisation"""
    n, d = x.shape
    out = torch.empty(n, **FLOAT32) if out is None else out
    _C.embeddings_normalize(x.data_ptr(), DTYPE_CODES[x.dtype], n, d, normalize, 0, 0, out.data_ptr())
    return out


def _operand(x: Tensor, normalize: bool, operand: torch.dtype) -> tuple[Tensor, Tensor]:
    """Unit rows (or as they are) [N, D] in float32, rounded to the operand's dtype; inv_norm [N]"""
    n, d = x.shape
    z, inv_norm = torch.empty(n, d, **FLOAT32), torch.empty(n, **FLOAT32)
    _C.embeddings_normalize(
        x.data_ptr(), DTYPE_CODES[x.dtype], n, d, normalize, DTYPE_CODES[operand], z.data_ptr(), inv_norm.data_ptr()
    )
    return z, inv_norm


def _load(stream: Stream, c: Tensor, normalize: bool, in_copy: bool, factors: Tensor) -> None:
    """Makes c the stream's tile; factors: what its logits are still to be multiplied by, 1 / norm."""
    if in_copy:
        c, _ = _operand(c, True, torch.float32)
    _inv_norm(c, normalize and not in_copy, factors)
    stream.load(c)


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def forward(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None,
    query_ids: Tensor | None,
    negative_ids: Tensor | None,
    temperature: float | Tensor,
    first: int,
    normalize: bool,
    operand: torch.dtype,
    needs_grad: bool,
) -> tuple[Tensor, ...]:
    """losses, similarity, above [B]; dquery [B, D] and dtemperature [B] of each row's loss; stats [3, B] (see
    csrc/cpu/info_nce.h)
    """
    (b, d), code = query.shape, DTYPE_CODES[query.dtype]
    tau, fixed, in_copy = _scale(temperature, normalize, operand)
    q, inv_query = _operand(query, normalize, operand)
    positive = key[first : first + b]
    inv_positive = _inv_norm(positive, normalize)
    similarity = torch.empty(b, **FLOAT32)
    rows = (query.data_ptr(), code, b, d, inv_query.data_ptr(), positive.data_ptr(), inv_positive.data_ptr())
    _C.info_nce_positives(*rows, similarity.data_ptr())

    candidates, column = (key, first) if negatives is None else (negatives, -1)
    maximum = torch.full((b,), 1.0 if fixed else torch.finfo(torch.float32).min, **FLOAT32)
    r, above = torch.zeros(b, **FLOAT32), torch.zeros(b, **FLOAT32)
    stream = stream_for(q, operand)
    o = stream.zeros(b if needs_grad else 0)
    weights, factors = stream.weights(), torch.empty(stream.COLUMNS, **FLOAT32)
    to = (weights.data_ptr() if needs_grad else 0, DTYPE_CODES[weights.dtype], weights.stride(0))
    state = (maximum.data_ptr(), r.data_ptr(), above.data_ptr(), similarity.data_ptr(), o.data_ptr(), d, o.stride(0))
    excluded = (column, _address(query_ids), _address(negative_ids))
    for j in ranges(len(candidates), stream.COLUMNS):
        _load(stream, candidates[j], normalize, in_copy, factors)
        for i in ranges(b, stream.ROWS):
            s = stream.logits(i)
            _C.info_nce_forward_tile(
                s.data_ptr(), s.stride(0), *s.shape, i.start, j.start, factors.data_ptr(), *excluded, *to, *state,
                tau, fixed,
            )  # fmt: skip
            if needs_grad:
                stream.add(o, i)

    losses, stats = torch.empty(b, **FLOAT32), torch.empty(3, b, **FLOAT32)
    dquery, dtemperature = (torch.empty(b if needs_grad else 0, *size, **FLOAT32) for size in ((d,), ()))
    _C.info_nce_finish_forward(
        *rows, normalize, tau, maximum.data_ptr(), r.data_ptr(), similarity.data_ptr(), o.data_ptr(), o.stride(0),
        losses.data_ptr(), stats.data_ptr(), dquery.data_ptr(), dtemperature.data_ptr(),
    )  # fmt: skip
    return losses, similarity, above, dquery, dtemperature, stats


def backward(
    grad: Tensor,
    stats: Tensor,
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None,
    query_ids: Tensor | None,
    negative_ids: Tensor | None,
    temperature: float | Tensor,
    first: int,
    normalize: bool,
    operand: torch.dtype,
    key_grad: bool,
    negatives_grad: bool,
) -> tuple[Tensor, Tensor]:
    """dkey, dnegatives in their inputs' dtypes, [0] for what is not asked for; from grad [B] float32"""
    b, code = len(query), DTYPE_CODES[query.dtype]
    tau, _, in_copy = _scale(temperature, normalize, operand)
    q, inv_query = _operand(query, normalize, operand)
    maximum, a, pull = stats[0], grad * stats[1], grad * stats[2]
    stream = stream_for(q, operand)

    def gradient(x: Tensor, with_pull: bool, with_weights: bool) -> Tensor:
        out = torch.empty_like(x)
        inv_norm, factors, dc = (
            _inv_norm(x, normalize),
            torch.empty(stream.COLUMNS, **FLOAT32),
            stream.zeros(stream.COLUMNS),
        )
        column = first if with_pull else -1
        for j in ranges(len(x), stream.COLUMNS):
            dc.zero_()
            _load(stream, x[j], normalize, in_copy, factors)
            for i in ranges(b, stream.ROWS) if with_weights else ():
                s = stream.logits(i)
                _C.info_nce_backward_tile(
                    s.data_ptr(), s.stride(0), *s.shape, i.start, j.start, factors.data_ptr(),
                    column, _address(query_ids), _address(negative_ids), tau, maximum.data_ptr(), a.data_ptr(),
                )  # fmt: skip
                stream.add_transposed(dc, i, s)
            _C.info_nce_finish_candidates(
                x.data_ptr(), DTYPE_CODES[x.dtype], *x.shape, inv_norm.data_ptr(), j.start, j.stop - j.start,
                normalize, dc.data_ptr(), dc.stride(0), query.data_ptr(), code, b, inv_query.data_ptr(),
                pull.data_ptr(), column, tau, out.data_ptr(),
            )  # fmt: skip
        return out

    dkey = gradient(key, True, negatives is None) if key_grad else key.new_empty(0)
    wanted = negatives_grad and negatives is not None
    return dkey, gradient(negatives, False, True) if wanted and negatives is not None else key.new_empty(0)
