"""NegativeSampler: words drawn as often as a power of their counts says, for `skip_gram`."""

import torch
from torch import Tensor, nn

from . import _check
from ._check import Of
from ._random import RandomStream, draw_key, philox

__all__ = ["NegativeSampler"]

_COUNTS = Of("W", (torch.int64, torch.int32, *_check.FLOAT_DTYPES))


class NegativeSampler(nn.Module):
    """Draws ids with probabilities proportional to counts ** power, each by two random numbers and one look-up.

    By an alias table: id w is drawn as itself with the probability threshold[w] / 2^32 where it comes up, and as
    alias[w] otherwise. Drawn by Philox under one int64 key, which comes from torch's generator of the device and is not
    read on the host; the same key draws the same ids on every device. The table is in the state_dict, and moves with
    the module::

        sampler = sslops.NegativeSampler(counts)
        negatives = sampler.draw(len(centers), 5)
        loss = sslops.skip_gram(words.weight, around.weight, centers, contexts, negatives, sparse=True)

    Args:
        counts: [W], how often each word is in the text: finite, not negative, not all 0. What has a count of 0 is never
            drawn.
        power: at least 0; 0 draws all words that are there alike.

    Attributes:
        threshold, alias: [W] int64.

    Raises:
        TypeError, ValueError: arguments of the wrong type, shape or value.

    Source: Mikolov et al., Distributed Representations of Words and Phrases and their Compositionality,
    arXiv:1310.4546, Section 2.2; Walker, An Efficient Method for Generating Discrete Random Variables with General
    Distributions, ACM TOMS 3, 1977.
    """

    threshold: Tensor
    alias: Tensor

    def __init__(self, counts: Tensor, power: float = 0.75) -> None:
        super().__init__()
        op = "NegativeSampler"
        _check.tensors(op, {"counts": counts}, {"counts": _COUNTS})
        _check.non_negative(op, power=power)
        if counts.is_meta:
            _check.bad_value(op, "counts", "a tensor with values", counts.device)
        exact = counts.detach().double().cpu()
        if not (bool((exact >= 0).all()) and 0 < float(exact.sum()) < torch.inf and len(exact) <= 2**31):
            _check.bad_value(op, "counts", "1 to 2^31 finite numbers, not negative, not all 0", exact)
        weights = torch.where(exact > 0, (exact / exact.max()) ** float(power), 0.0)
        threshold, alias = _table(weights * (len(weights) / weights.sum()))
        self.register_buffer("threshold", threshold.to(counts.device))
        self.register_buffer("alias", alias.to(counts.device))

    def draw(self, rows: int, count: int = 5, *, generator: torch.Generator | None = None) -> Tensor:
        """[rows, count] int64 ids, independent of one another, on the table's device.

        Args:
            rows, count: 0 to 2^31 - 1.
            generator: draws the key; None is torch's default one. Not for use inside torch.compile.

        Raises:
            TypeError, ValueError: arguments of the wrong type, device or value.
        """
        op, device, words = "NegativeSampler.draw", self.threshold.device, len(self.threshold)
        for name, value in (("rows", rows), ("count", count)):
            _check.count(op, name, value, 0, 2**31 - 1)
        key, total = draw_key(op, generator, device), rows * count
        first, second = philox(key, RandomStream.NEGATIVES, 0, (total + 1) // 2, device).view(-1, 2)[:total].unbind(1)
        column = first * words >> 32
        return torch.where(second < self.threshold[column], column, self.alias[column]).view(rows, count)

    def extra_repr(self) -> str:
        return f"words={len(self.threshold)}"


def _table(weights: Tensor) -> tuple[Tensor, Tensor]:
    """threshold and alias of weights [W], float64, of which the mean is 1.

    Vose's sweep, all at once: what the light ones lack, one after another, is taken from the heavy ones, one after
    another. A heavy one that has given more than it had over lacks that itself, and the next one gives it.
    """
    share, alias = weights.clone(), torch.arange(len(weights))
    heavy, light = (weights > 1).nonzero()[:, 0], (weights <= 1).nonzero()[:, 0]
    if len(heavy) and len(light):
        given, lacked = (weights[heavy] - 1).cumsum(0), (1 - weights[light]).cumsum(0)
        before = torch.cat([lacked.new_zeros(1), lacked[:-1]])  # what had been lacked when a light one's turn came
        alias[light] = heavy[torch.searchsorted(given, before, right=True).clamp(max=len(heavy) - 1)]
        taken = torch.searchsorted(lacked, given)  # the light one that takes the last of it, or more than there was
        share[heavy] = 1 - (lacked[taken.clamp(max=len(light) - 1)] - given).clamp(min=0)
        share[heavy[-1]] = 1.0  # all else is rounding
        alias[heavy[:-1]] = heavy[1:]
    return (share.clamp(0, 1) * 2**32).round().long(), alias
