"""pytorch-metric-learning 2's NTXentLoss on our ops: the same arguments, for its default distance and reducer.

Each pair of equal labels is one query and its positive, beside the rows of all other labels: `info_nce` with ids. Where
every label comes twice it is `nt_xent`'s value; a pair's loss does not end at -log(1e-7) as theirs does. What is not
here: miners (indices_tuple), other distances, reducers and regularizers, which are refused by name, and other losses.
"""

from torch import Tensor, nn

from .. import _check
from ..ops.info_nce import info_nce


class NTXentLoss(nn.Module):
    def __init__(self, temperature: float = 0.07, **kwargs: object) -> None:
        super().__init__()
        if kwargs:
            wanted = "the default distance, reducer and regularizers"
            _check.bad_type("NTXentLoss", ", ".join(kwargs), wanted, "others")
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
        if indices_tuple is not None:
            _check.bad_type("NTXentLoss", "indices_tuple", "None", type(indices_tuple).__name__)
        labels = labels.to(embeddings.device)
        rows, row_labels = (embeddings, labels) if ref_emb is None else (ref_emb, ref_labels)
        assert row_labels is not None, "NTXentLoss: ref_labels: wanted those of ref_emb"
        row_labels = row_labels.to(rows.device)
        equal = labels[:, None] == row_labels
        alone = bool(equal.all())
        if ref_emb is None:
            equal.fill_diagonal_(False)
        query, key = equal.nonzero().unbind(1)
        if alone or len(query) == 0:
            return embeddings.sum() * 0  # as theirs, without a negative or a pair
        return info_nce(
            embeddings[query], rows[key], rows, query_ids=labels[query], negative_ids=row_labels,
            temperature=self.temperature,
        )  # fmt: skip
