"""Words that stand near each other in a text: Word2Vec's skip-gram, on the King James Bible."""

from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sslops

from .base import Method
from .bert import SPECIAL, VOCABULARY

WINDOW, NEGATIVES = 5, 5
OFTEN = 1e-3  # words that are more of the text than this are left out of it at random


def eager_word2vec(centers: Tensor, contexts: Tensor, negatives: Tensor, words: Tensor, around: Tensor) -> Tensor:
    """As it is usually written, with the rows of all negatives, `[B, N, D]`."""
    look_up = partial(F.embedding, sparse=True)
    center = look_up(centers, words)
    positive = (center * look_up(contexts, around)).sum(dim=1)
    negative = torch.bmm(look_up(negatives, around), center[:, :, None])[:, :, 0]
    negative = F.logsigmoid(-negative).masked_fill(negatives == contexts[:, None], 0.0)
    return -(F.logsigmoid(positive) + negative.sum(dim=1)).mean()


def fused_word2vec(centers: Tensor, contexts: Tensor, negatives: Tensor, words: Tensor, around: Tensor) -> Tensor:
    return sslops.skip_gram(words, around, centers, contexts, negatives, sparse=True)


class Word2Vec(Method):
    """A vector for each word where it is in the middle, and one for where it is near another."""

    data = ("kjv",)
    steps, batch, learning_rate = 600, 256, 2e-2
    losses: ClassVar = {"sslops": fused_word2vec, "eager": eager_word2vec}

    def __init__(self, side: int, width: int = 128):
        super().__init__()
        self.words, self.around = (nn.Embedding(VOCABULARY, width) for _ in range(2))
        for table in (self.words, self.around):
            nn.init.normal_(table.weight, std=0.1)

    def see(self, passages: Tensor, known: Any) -> None:
        counts = passages.flatten().bincount(minlength=VOCABULARY)
        counts[list(SPECIAL)] = 0
        self.sampler = sslops.NegativeSampler(counts)
        self.kept = (OFTEN * counts.sum() / counts).sqrt().where(counts > 0, 0.0)

    def optimizer(self, trained: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SparseAdam(trained)  # moves the words that a step looks at

    def views(self, passages: Tensor) -> tuple[Tensor, ...]:
        """Pairs of words at most as far from each other as is drawn for the one in the middle, and negatives."""
        kept, reach = torch.rand(passages.shape) < self.kept[passages], torch.randint(1, WINDOW + 1, passages.shape)
        pairs = []
        for far in range(1, WINDOW + 1):
            first, second = (slice(None), slice(-far)), (slice(None), slice(far, None))
            for middle, near in ((first, second), (second, first)):
                taken = kept[middle] & kept[near] & (reach[middle] >= far)
                pairs.append(torch.stack([passages[middle][taken], passages[near][taken]]))
        centers, contexts = torch.cat(pairs, dim=1)
        return centers, contexts, self.sampler.draw(len(centers), NEGATIVES)

    def forward(self, *pairs: Tensor) -> tuple[Tensor, ...]:
        return *pairs, self.words.weight, self.around.weight
