"""pytorch-metric-learning 2's NTXentLoss, SupConLoss and CrossBatchMemory on our ops: the same arguments, for the
default distance and reducers.

In NTXentLoss each pair of equal labels is one query and its positive, beside the rows of all other labels: `info_nce`
with ids. Where every label comes twice it is `nt_xent`'s value; a pair's loss does not end at -log(1e-7), as theirs.
SupConLoss is `supcon`, and the mean, as theirs, that of the rows whose loss is above 0. CrossBatchMemory is a
`NegativeQueue` of unit rows. Its labels are not negative, and its state_dict is not theirs.

What differs: losses are float32 for bf16 and float16 embeddings. What is not here, refused by name: miners and
indices_tuple, other distances, reducers and regularizers, SupConLoss with a ref_emb that wants a gradient; and all
other losses.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .. import _check
from ..ops.info_nce import info_nce
from ..ops.supcon import supcon
from ..queue import NegativeQueue


class NTXentLoss(nn.Module):
    def __init__(self, temperature: float = 0.07, **kwargs: object) -> None:
        super().__init__()
        _default("NTXentLoss", kwargs)
        self.temperature = temperature

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """embeddings: [M, D]; labels: [M]; ref_emb [K, D] and ref_labels [K]: where positives and negatives are."""
        _none("NTXentLoss", indices_tuple=indices_tuple)
        if ref_emb is None:
            return self._among(embeddings, labels, embeddings, labels, torch.arange(len(labels)))
        assert ref_labels is not None, "NTXentLoss: ref_labels: wanted those of ref_emb"
        return self._among(embeddings, labels, ref_emb, ref_labels)

    def _among(
        self, embeddings: Tensor, labels: Tensor, rows: Tensor, row_labels: Tensor, own: Tensor | None = None
    ) -> Tensor:
        """own: [M], the rows that are the embeddings themselves, no positives of theirs"""
        labels = torch.cat([x.to(embeddings.device) for x in (labels, row_labels)]).unique(return_inverse=True)[1]
        labels, row_labels = labels.split([len(embeddings), len(rows)])
        equal = labels[:, None] == row_labels
        negatives = equal.numel() - int(equal.sum())
        if own is not None:
            equal[torch.arange(len(own)), own] = False
        query, key = equal.nonzero().unbind(1)
        if not negatives or not len(query) or negatives == len(query) == 1:
            return embeddings.sum() * 0  # as theirs, without a negative or a pair, and with one of each
        return info_nce(
            embeddings[query], rows[key], rows, query_ids=labels[query], negative_ids=row_labels,
            temperature=self.temperature,
        )  # fmt: skip


class SupConLoss(nn.Module):
    def __init__(self, temperature: float = 0.1, **kwargs: object) -> None:
        super().__init__()
        _default("SupConLoss", kwargs)
        self.temperature = temperature

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """embeddings: [M, D]; labels: [M]; ref_emb [K, D] and ref_labels [K]: where positives and negatives are."""
        _none("SupConLoss", indices_tuple=indices_tuple)
        if ref_emb is not None:
            if ref_emb.requires_grad:
                _check.bad_value("SupConLoss", "ref_emb", "a tensor that wants no gradient", "one that does")
            assert ref_labels is not None, "SupConLoss: ref_labels: wanted those of ref_emb"
            return self._among(embeddings, labels, ref_emb, ref_labels)
        labels = labels.to(embeddings.device).unique(return_inverse=True)[1]  # negative ones are labels to them
        return self._mean(supcon(embeddings, labels, temperature=self.temperature, reduction="none"), labels)

    def _among(
        self, embeddings: Tensor, labels: Tensor, rows: Tensor, row_labels: Tensor, own: Tensor | None = None
    ) -> Tensor:
        """own: [M], the rows that are the embeddings themselves, no candidates of theirs"""
        both = torch.cat([x.to(embeddings.device) for x in (labels, row_labels)]).unique(return_inverse=True)[1]
        if len(labels) * len(rows) - (0 if own is None else len(own)) <= 2:
            return embeddings.sum() * 0  # as theirs, with one pair of each kind at most
        ids = torch.full_like(both, -1)
        if own is not None:
            ids[: len(own)] = ids[len(labels) + own] = torch.arange(len(own), device=ids.device)
        labels, row_labels = both.split([len(labels), len(rows)])
        query_ids, key_ids = ids.split([len(labels), len(rows)])
        losses = supcon(
            embeddings, labels, keys=rows, key_labels=row_labels, query_ids=query_ids, key_ids=key_ids,
            temperature=self.temperature, reduction="none",
        )  # fmt: skip
        return self._mean(losses, both)

    def _mean(self, losses: Tensor, labels: Tensor) -> Tensor:
        counted = (losses > 0) & labels.any()  # of one class alone: no negative, and no loss
        return losses.where(counted, 0).sum() / counted.sum().clamp(min=1)


class CrossBatchMemory(nn.Module):
    queue: NegativeQueue

    def __init__(
        self,
        loss: NTXentLoss | SupConLoss,
        embedding_size: int,
        memory_size: int = 1024,
        miner: None = None,
        **kwargs: object,
    ) -> None:
        super().__init__()
        _default("CrossBatchMemory", kwargs)
        _none("CrossBatchMemory", miner=miner)
        if not isinstance(loss, (NTXentLoss, SupConLoss)):
            _check.bad_type("CrossBatchMemory", "loss", "sslops' NTXentLoss or SupConLoss", type(loss).__name__)
        self.loss, self.embedding_size, self.memory_size = loss, embedding_size, memory_size
        self.reset_queue()

    def reset_queue(self) -> None:
        self.queue = NegativeQueue(self.memory_size, self.embedding_size)

    def forward(
        self, embeddings: Tensor, labels: Tensor, indices_tuple: None = None, enqueue_mask: Tensor | None = None
    ) -> Tensor:
        """embeddings: [M, D]; labels: [M]; enqueue_mask: [M] bool, those for the memory, the others being anchors.
        Without it all are both, and no row is its own positive.
        """
        _none("CrossBatchMemory", indices_tuple=indices_tuple)
        queue, labels, own = self.queue.to(embeddings.device), labels.to(embeddings.device), None
        if enqueue_mask is None:
            assert len(embeddings) <= self.memory_size, "CrossBatchMemory: wanted no more embeddings than memory_size"
            own = (queue.pointer + torch.arange(len(labels), device=labels.device)) % self.memory_size
            queue.enqueue(embeddings, labels=labels)
        else:
            queue.enqueue(embeddings[enqueue_mask], labels=labels[enqueue_mask])
            embeddings, labels = embeddings[~enqueue_mask], labels[~enqueue_mask]
        filled = int(queue.filled)
        rows = queue.negatives[:filled].to(embeddings.dtype, copy=True)  # backward may come after the next batch
        return self.loss._among(embeddings, labels, rows, queue.labels[:filled], own)


def _default(name: str, kwargs: Mapping[str, object]) -> None:
    if kwargs:
        _check.bad_type(name, ", ".join(kwargs), "the default distance, reducer and regularizers", "others")


def _none(name: str, **given: object) -> None:
    for argument, value in given.items():
        if value is not None:
            _check.bad_type(name, argument, "None", type(value).__name__)
