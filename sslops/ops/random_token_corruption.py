"""BERT's masking: some tokens are hidden, some replaced, and the labels say which were and what they had been."""

import math
from collections.abc import Iterable, Sequence
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from .. import _check
from .._check import Of
from .._library import Out, register
from .._random import RandomStream, draw_key, philox

MOST = 32  # units of a span, and runs of special ids: what a kernel holds by value


class Arguments(NamedTuple):
    ids: Annotated[Tensor, Of("...", _check.ID_DTYPES)]
    key: Annotated[Tensor, Of("", (torch.int64,))]
    special_tokens_mask: Annotated[Tensor | None, Of("...", (torch.bool,))]
    words: Annotated[Tensor | None, Of("...", (torch.int64,))]
    mask_token_id: int
    vocab_size: int
    probability: float
    masked: float
    random: float
    special_ids: list[int]  # ascending, no two alike
    span_lengths: list[float]
    backend: str = ""

    @property
    def odds(self) -> tuple[int, int]:
        """Of the mask token, and of that or a random one, in units of 2^-32"""
        mask, mask_or_random = (round(float(share) * 2**32) for share in (self.masked, self.masked + self.random))
        return mask, mask_or_random

    @property
    def begun(self) -> list[int]:
        """[S]: that a span begins at a unit and is longer than k, in units of 2^-32. A unit is in none of them with the
        probability 1 - self.probability = product of (1 - begun[k]).
        """
        total = math.fsum(self.span_lengths)
        longer = [math.fsum(self.span_lengths[k:]) / total for k in range(len(self.span_lengths))]
        low, high = 0.0, 1.0  # of spans that begin at a unit
        for _ in range(64 if len(longer) > 1 else 0):
            middle = (low + high) / 2
            missed = math.prod(1 - middle * each for each in longer)
            low, high = (middle, high) if missed > 1 - self.probability else (low, middle)
        share = high if len(longer) > 1 else self.probability
        return [round(share * each * 2**32) for each in longer]

    @property
    def row(self) -> int:
        return self.ids.shape[-1] if self.ids.dim() else 1

    @property
    def units(self) -> Tensor | None:
        """Which word of its row a token is of, 0, 1, ..; in the shape of the ids"""
        if self.words is None:
            return None
        words = self.words.reshape(-1, self.row) if self.words.numel() else self.words.reshape(0, 1)
        begins = torch.ones_like(words)
        begins[:, 1:] = words[:, 1:] != words[:, :-1]
        return (begins.cumsum(1) - 1).view(self.words.shape)

    @property
    def kept(self) -> Tensor | None:
        """Tokens that are never chosen, whatever their id"""
        if self.words is None:
            return self.special_tokens_mask
        wordless = self.words < 0
        return wordless if self.special_tokens_mask is None else wordless | self.special_tokens_mask

    @property
    def runs(self) -> list[tuple[int, int]]:
        """The special ids as ranges [first, end)"""
        found: list[tuple[int, int]] = []
        for each in self.special_ids:
            follows = bool(found) and found[-1][1] == each
            found[-1:] = [(found[-1][0], each + 1)] if follows else [*found[-1:], (each, each + 1)]
        return found

    @property
    def drawn(self) -> int:
        """How many ids can be drawn"""
        return self.vocab_size - sum(0 <= each < self.vocab_size for each in self.special_ids)


class Outputs(NamedTuple):
    corrupted: Out
    labels: Out


def outputs(x: Arguments) -> Outputs:
    same = Out(tuple(x.ids.shape), torch.int64)
    return Outputs(same, same)


def reference(x: Arguments) -> tuple[Tensor, Tensor]:
    """corrupted, labels, both in the shape of the ids"""
    stream, device, begun = RandomStream.RANDOM_TOKEN_CORRUPTION, x.ids.device, x.begun
    count, spans = math.prod(x.ids.shape[:-1]) if x.ids.dim() else 1, len(begun)
    _, action, word, _ = (
        column.view(count, x.row) for column in philox(x.key, stream, 0, count * x.row, device).unbind(1)
    )
    stride = x.row + spans - 1
    starts = philox(x.key, stream, 0, count * stride, device).view(count, stride, 4)
    units, kept = x.units, x.kept
    units = torch.arange(x.row, device=device).expand(count, -1) if units is None else units.view(count, x.row)
    chosen = torch.zeros_like(units, dtype=torch.bool)
    for back in reversed(range(spans)):  # the nearest span says what becomes of a token
        start = starts.gather(1, (units + (spans - 1 - back))[..., None].expand(-1, -1, 4))
        begins = start[..., 0] < begun[back]
        chosen |= begins
        if spans > 1:
            action = torch.where(begins, start[..., 1], action)
    chosen, action, word = (each.view(x.ids.shape) for each in (chosen, action, word))
    drawn = word * x.drawn >> 32
    if kept is not None:
        chosen &= ~kept
    for first, end in x.runs:
        chosen &= (x.ids < first) | (x.ids >= end)
        drawn += (drawn >= first) * (end - first)
    of_mask, of_mask_or_random = x.odds
    replaced = torch.where(action < of_mask_or_random, drawn, x.ids)
    replaced = torch.where(action < of_mask, x.mask_token_id, replaced)
    return torch.where(chosen, replaced, x.ids), torch.where(chosen, x.ids, -100)


def _check_options(x: Arguments) -> None:
    op = "random_token_corruption"
    _check.count(op, "mask_token_id", x.mask_token_id, -(2**63), 2**63 - 1)
    _check.count(op, "vocab_size", x.vocab_size, 1, 2**31)
    _check.probability(op, probability=x.probability, masked=x.masked, random=x.random)
    if x.masked + x.random > 1 + 1e-9:  # 0.8 + 0.2 may be rounded up
        _check.bad_value(op, "random", f"at most 1 - masked, {1 - x.masked}", x.random)
    for k, each in enumerate(x.special_ids):
        _check.count(op, f"special_ids[{k}]", each, 0, 2**31)
    if x.special_ids != sorted({*x.special_ids}) or len(x.runs) > MOST:
        _check.bad_value(op, "special_ids", f"different ids in ascending order, in at most {MOST} runs", x.special_ids)
    if x.drawn < 1:
        _check.bad_value(op, "special_ids", "an id of the vocabulary that is left", f"all {x.vocab_size}")
    _check.non_negative(op, **{f"span_lengths[{k}]": each for k, each in enumerate(x.span_lengths)})
    if not 1 <= len(x.span_lengths) <= MOST or not sum(x.span_lengths) > 0:
        _check.bad_value(op, "span_lengths", f"1 to {MOST} numbers, not all 0", x.span_lengths)


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
    special_ids: Iterable[int] = (),
    words: Tensor | None = None,
    span_lengths: Sequence[float] = (1.0,),
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """BERT's masking: each token is chosen with a probability, and those chosen are to be predicted.

    Of the chosen, a share becomes the mask token, a share a random one, and the rest stay as they are. Drawn by Philox
    under one int64 key, which comes from torch's generator of the device and is not read on the host; the same key
    corrupts the same tokens on every device and backend. With the defaults it is BERT's and RoBERTa's; with `words`,
    whole-word masking; with `span_lengths=[0.8**k for k in range(10)]` SpanBERT's.

    Args:
        ids: token ids, int64 of any shape; the last dimension is a row, of which words and spans are.
        mask_token_id: what hides a token.
        vocab_size: random tokens are uniform in [0, vocab_size), 1 to 2^31, but for the special ids.
        probability: of being chosen, in [0, 1].
        masked, random: shares of the chosen, at least 0 and together at most 1.
        special_tokens_mask: bool, in the shape of ids: true for tokens that are never chosen, such as padding.
        special_ids: ids that are neither chosen nor drawn, a tokenizer's all_special_ids say, padding among them; in at
            most 32 runs of consecutive ones.
        words: int64 or int32, in the shape of ids: tokens side by side with the same number are a word, chosen as one,
            and what becomes of each is drawn token by token. Below 0 are tokens of no word, which are never chosen.
        span_lengths: how often, one to another, spans are 1, 2, .. tokens long, or words where these are given; at most
            32. Spans begin anywhere and may overlap, so often that each token is in one with `probability`; what
            becomes of the tokens is drawn for all of a span.
        generator: draws the key; None is torch's default one. Not for use inside torch.compile.
        backend: "cpu", "cuda" or "eager"; the fastest that can run here if None (see `sslops.explain`).

    Returns:
        The corrupted ids, and the labels: the original id of each chosen token, -100 (which F.cross_entropy leaves out)
        for all others; both int64 in the shape of ids.

    Raises:
        TypeError, ValueError: arguments of the wrong type, shape, dtype, device or value.
        RuntimeError: the backend that was asked for cannot run here.

    Source: Devlin et al., BERT: Pre-training of Deep Bidirectional Transformers, arXiv:1810.04805, Section 3.1;
    Joshi et al., SpanBERT: Improving Pre-training by Representing and Predicting Spans, arXiv:1907.10529, Section 3.1.
    """
    op = "random_token_corruption"
    key = draw_key(op, generator, ids.device if isinstance(ids, Tensor) else torch.device("cpu"))
    for name, values in (("special_ids", special_ids), ("span_lengths", span_lengths)):
        if not isinstance(values, Iterable) or isinstance(values, (str, Tensor)):
            _check.bad_type(op, name, "a sequence of numbers", type(values).__name__)
    special, lengths = list(special_ids), list(span_lengths)
    if all(isinstance(each, int) for each in special):  # else they are refused
        special = sorted({*special})
    x = Arguments(
        ids, key, special_tokens_mask, _check.ids64(words), mask_token_id, vocab_size, probability, masked, random,
        special, lengths,
    )  # fmt: skip
    corrupted, labels = _run(x, backend)
    return corrupted, labels
