"""BERT's masking: some tokens are hidden, some replaced, and the labels say which were and what they had been."""

from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from .. import _check
from .._check import Of
from .._library import Out, register
from .._random import RandomStream, draw_key, philox


class Arguments(NamedTuple):
    ids: Annotated[Tensor, Of("...", _check.ID_DTYPES)]
    key: Annotated[Tensor, Of("", (torch.int64,))]
    special_tokens_mask: Annotated[Tensor | None, Of("...", (torch.bool,))]
    mask_token_id: int
    vocab_size: int
    probability: float
    masked: float
    random: float
    backend: str = ""

    @property
    def odds(self) -> tuple[int, int, int]:
        """Of being chosen, of the mask token, of that or a random one, in units of 2^-32"""
        shares = self.probability, self.masked, self.masked + self.random
        chosen, mask, mask_or_random = (round(float(share) * 2**32) for share in shares)
        return chosen, mask, mask_or_random


class Outputs(NamedTuple):
    corrupted: Out
    labels: Out


def outputs(x: Arguments) -> Outputs:
    same = Out(tuple(x.ids.shape), torch.int64)
    return Outputs(same, same)


def reference(x: Arguments) -> tuple[Tensor, Tensor]:
    """corrupted, labels, both in the shape of the ids"""
    words = philox(x.key, RandomStream.RANDOM_TOKEN_CORRUPTION, 0, x.ids.numel(), x.ids.device)
    choice, action, word, _ = (column.view(x.ids.shape) for column in words.unbind(1))
    of_choice, of_mask, of_mask_or_random = x.odds
    chosen = choice < of_choice
    if x.special_tokens_mask is not None:
        chosen &= ~x.special_tokens_mask
    replaced = torch.where(action < of_mask_or_random, word * x.vocab_size >> 32, x.ids)
    replaced = torch.where(action < of_mask, x.mask_token_id, replaced)
    return torch.where(chosen, replaced, x.ids), torch.where(chosen, x.ids, -100)


def _check_options(x: Arguments) -> None:
    op = "random_token_corruption"
    _check.count(op, "mask_token_id", x.mask_token_id, -(2**63), 2**63 - 1)
    _check.count(op, "vocab_size", x.vocab_size, 1, 2**31)
    _check.probability(op, probability=x.probability, masked=x.masked, random=x.random)
    if x.masked + x.random > 1 + 1e-9:  # 0.8 + 0.2 may be rounded up
        _check.bad_value(op, "random", f"at most 1 - masked, {1 - x.masked}", x.random)


_run = register("random_token_corruption", Arguments, outputs, reference=reference, check=_check_options)


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
    key = draw_key(op, generator, ids.device if isinstance(ids, Tensor) else torch.device("cpu"))
    x = Arguments(ids, key, special_tokens_mask, mask_token_id, vocab_size, probability, masked, random)
    corrupted, labels = _run(x, backend)
    return corrupted, labels
