"""BERT's masking: some tokens are hidden, some replaced, and the labels say which were and what they had been."""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _check
from .._library_old import register
from .._random import RandomStream, draw_key, philox
from ..backend import kernel, resolve


class _Arguments(NamedTuple):
    ids: Tensor
    key: Tensor
    special_tokens_mask: Tensor | None
    mask_token_id: int
    vocab_size: int
    probability: float
    masked: float
    random: float
    backend: str


def _odds(x: _Arguments) -> tuple[int, int, int]:
    """Of being chosen, of the mask token, of that or a random one, in units of 2^-32"""
    return round(x.probability * 2**32), round(x.masked * 2**32), round((x.masked + x.random) * 2**32)


def reference(x: _Arguments) -> tuple[Tensor, Tensor]:
    """corrupted, labels, both in the shape of the ids"""
    words = philox(x.key, RandomStream.RANDOM_TOKEN_CORRUPTION, 0, x.ids.numel(), x.ids.device)
    choice, action, word, _ = (column.view(x.ids.shape) for column in words.unbind(1))
    of_choice, of_mask, of_mask_or_random = _odds(x)
    chosen = choice < of_choice
    if x.special_tokens_mask is not None:
        chosen &= ~x.special_tokens_mask
    replaced = torch.where(action < of_mask_or_random, word * x.vocab_size >> 32, x.ids)
    replaced = torch.where(action < of_mask, x.mask_token_id, replaced)
    return torch.where(chosen, replaced, x.ids), torch.where(chosen, x.ids, -100)


def _check_tensors(ids: Tensor, special_tokens_mask: Tensor | None) -> None:
    op = "random_token_corruption"
    if not isinstance(ids, Tensor):
        _check.bad_type(op, "ids", "an int64 tensor", type(ids).__name__)
    if ids.dtype != torch.int64 or ids.layout != torch.strided:
        _check.bad_type(op, "ids", "a dense int64 tensor", f"{ids.dtype}, {ids.layout}")
    if special_tokens_mask is not None:
        if not isinstance(special_tokens_mask, Tensor) or special_tokens_mask.dtype != torch.bool:
            got = getattr(special_tokens_mask, "dtype", type(special_tokens_mask).__name__)
            _check.bad_type(op, "special_tokens_mask", "a bool tensor", got)
        if special_tokens_mask.shape != ids.shape:
            got = list(special_tokens_mask.shape)
            _check.bad_value(op, "special_tokens_mask", f"the shape of ids, {list(ids.shape)}", got)
        _check.same_device(op, "ids", ids, special_tokens_mask=special_tokens_mask)


def _forward(x: _Arguments) -> tuple[Tensor, Tensor]:
    _check_tensors(x.ids, x.special_tokens_mask)
    _check.ids("random_token_corruption", "[]", key=x.key)
    _check.same_device("random_token_corruption", "ids", x.ids, key=x.key)
    outputs = _forward_fake(x)
    special = None if x.special_tokens_mask is None else x.special_tokens_mask.contiguous()
    kernel(x.backend, "random_token_corruption").forward(
        x.ids.contiguous(), x.key, special, x.mask_token_id, x.vocab_size, _odds(x), *outputs
    )
    return outputs


def _forward_fake(x: _Arguments) -> tuple[Tensor, Tensor]:
    return x.ids.new_empty(x.ids.shape), x.ids.new_empty(x.ids.shape)


register("random_token_corruption", _Arguments, saved=("labels",), forward=_forward, forward_fake=_forward_fake)


def random_token_corruption(
    ids: Tensor,
    mask_token_id: int,
    vocab_size: int,
    *,
    probability: float = 0.15,
    masked: float = 0.8,
    random: float = 0.1,
    special_tokens_mask: Tensor | None = None,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """BERT's masking: each token is chosen with a probability, and those chosen are to be predicted.

    Of the chosen, a share becomes the mask token, a share a random one, and the rest stay as they are. Drawn by Philox
    under one int64 key, which comes from torch's generator of the device and is not read on the host; the same key
    corrupts the same tokens on every device and backend.

    Args:
        ids: token ids, int64 of any shape.
        mask_token_id: what hides a token.
        vocab_size: random tokens are uniform in [0, vocab_size), 1 to 2^31.
        probability: of being chosen, in [0, 1].
        masked, random: shares of the chosen, at least 0 and together at most 1.
        special_tokens_mask: bool, in the shape of ids: true for tokens that are never chosen, such as padding.
        generator: draws the key; None is torch's default one. Not for use inside torch.compile.
        backend: "cpu", "cuda" or "eager"; the fastest that can run here if None (see `sslops.explain`).

    Returns:
        The corrupted ids, and the labels: the original id of each chosen token, -100 (which F.cross_entropy leaves out)
        for all others; both int64 in the shape of ids.

    Raises:
        TypeError, ValueError: arguments of the wrong type, shape, dtype, device or value.
        RuntimeError: the backend that was asked for cannot run here.

    Source: Devlin et al., BERT: Pre-training of Deep Bidirectional Transformers, arXiv:1810.04805, Section 3.1.
    """
    op = "random_token_corruption"
    _check_tensors(ids, special_tokens_mask)
    _check.count(op, "mask_token_id", mask_token_id, -(2**63), 2**63 - 1)
    _check.count(op, "vocab_size", vocab_size, 1, 2**31)
    _check.probability(op, probability=probability, masked=masked, random=random)
    if masked + random > 1 + 1e-9:  # 0.8 + 0.2 may be rounded up
        _check.bad_value(op, "random", f"at most 1 - masked, {1 - masked}", random)
    backend = resolve(op, ids.device, ids.dtype, backend)
    key = draw_key(op, generator, ids.device)
    if backend == "eager":
        shares = float(probability), float(masked), float(random)
        return reference(_Arguments(ids, key, special_tokens_mask, mask_token_id, vocab_size, *shares, backend))
    outputs: tuple[Tensor, Tensor] = torch.ops.sslops.random_token_corruption(
        ids, key, special_tokens_mask, mask_token_id, vocab_size, probability, masked, random, backend
    )
    return outputs
