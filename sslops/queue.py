"""NegativeQueue: the keys of the latest batches, MoCo's negatives."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _check, distributed
from ._check import Of
from .ops.nearest import Nearest, nearest

__all__ = ["NegativeQueue"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BESIDE = Of("N", _check.ID_DTYPES, optional=True)
ENQUEUED = {"negatives": Of("K D"), "keys": Of("N D"), "ids": BESIDE, "labels": BESIDE}


class NegativeQueue(nn.Module):
    """The last `size` keys, a ring that is written in place: negatives for `info_nce`.

    It starts with random unit rows, as MoCo's does; `valid` tells them from keys. Nothing in it waits for the device:
    the pointer is a tensor, so a step that enqueues can be captured in a CUDA graph. All of it is in the state_dict,
    which resumes exactly.

    The order is the caller's. In MoCo a batch is no negative of itself, so it is enqueued after its loss::

        queue = sslops.NegativeQueue(65536, 128)
        loss = sslops.info_nce(query, key, queue.negatives, temperature=0.07)  # key: without a gradient
        queue.enqueue(key)  # before loss.backward() or after: the query's gradient is there already
        loss.backward()

    Enqueued before the loss, a key is a negative of its own query, unless ids leave it out::

        queue.enqueue(key, ids=ids)
        loss = sslops.info_nce(query, key, queue.negatives, query_ids=ids, negative_ids=queue.ids)

    In NNCLR the positive is the nearest key of the queue in place of the own one::

        positive = queue.negatives[queue.nearest(z0).ids]
        loss = sslops.info_nce(positive, p1, temperature=0.1)  # p1: the prediction from the other view
        queue.enqueue(z0)

    Args:
        size, dim: K and D, positive.
        dtype: of the storage: float32 (the default), float16 or bfloat16.

    Attributes:
        negatives: [K, D], unit rows, normalised once, when they are enqueued.
        ids, labels: [K] int64, those given to enqueue(); -1 where none were.
        pointer: 0-d int64, the row that is written next.
        filled: 0-d int64, how many rows hold keys.

    Source: He et al., Momentum Contrast for Unsupervised Visual Representation Learning, arXiv:1911.05722, Algorithm 1.
    """

    negatives: Tensor
    ids: Tensor
    labels: Tensor
    pointer: Tensor
    filled: Tensor

    def __init__(self, size: int, dim: int, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        for name, value in (("size", size), ("dim", dim)):
            _check.count("NegativeQueue", name, value, 1, 2**62)
        dtype = torch.float32 if dtype is None else dtype
        if not (isinstance(dtype, torch.dtype) and dtype in DTYPES):
            _check.bad_type("NegativeQueue", "dtype", "float32, float16 or bfloat16", dtype)
        self.register_buffer("negatives", F.normalize(torch.randn(size, dim, dtype=torch.float32)).to(dtype))
        for name in ("ids", "labels"):
            self.register_buffer(name, torch.full((size,), -1))
        for name in ("pointer", "filled"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))

    @property
    def valid(self) -> Tensor:
        """[K] bool, which rows hold keys: all, after the first wrap. A mask on the device: nothing waits for it."""
        return torch.arange(len(self.negatives), device=self.negatives.device) < self.filled

    @torch.no_grad()
    @distributed.in_step
    def enqueue(
        self,
        keys: Tensor,
        *,
        ids: Tensor | None = None,
        labels: Tensor | None = None,
        group: distributed.Group = None,
    ) -> None:
        """Puts the keys in the place of the oldest rows. Of more than K the last K stay, as if they came one by one.

        Args:
            keys: [N, D], floating-point of any precision, on the queue's device.
            ids: [N] int64, what `info_nce` knows the keys by; not negative, which is looked at on the CPU only
                and not in a compiled step.
            labels: [N] int64, classes, say: kept beside the keys; likewise.
            group: None, or "world" or a ProcessGroup: the keys of all its W ranks are enqueued, N on each, in the order
                of the ranks, so that queues that were equal stay so.

        Raises:
            TypeError, ValueError: arguments of the wrong type, shape, device or value; torch.distributed not
                initialised; other shapes on other ranks (see `info_nce`). The queue is as it was.
        """
        size, op = len(self.negatives), "NegativeQueue.enqueue"
        group = distributed.name(op, group)
        beside = {"ids": ids, "labels": labels}
        _check.tensors(op, {"negatives": self.negatives, "keys": keys, **beside}, ENQUEUED)
        for name, x in beside.items():
            if x is None or x.device.type != "cpu" or torch.compiler.is_compiling():
                continue
            if bool((x < 0).any()):
                _check.bad_value(op, name, "no negative numbers (-1 stands for none)", int(x.min()))
        if group:
            keys = torch.ops.sslops.all_gather(keys, group, 0, op)
            beside = {name: distributed.gathered_ids(op, group, x) for name, x in beside.items()}
        n = len(keys)
        first = max(n - size, 0)  # what would be written over at once
        rows = (self.pointer + torch.arange(first, n, device=keys.device)) % size
        wide = torch.promote_types(keys.dtype, torch.float32)
        self.negatives.index_copy_(0, rows, F.normalize(keys[first:].to(wide)).to(self.negatives.dtype))
        for name, x in beside.items():
            getattr(self, name).index_copy_(0, rows, torch.full_like(rows, -1) if x is None else x[first:])
        self.pointer.add_(n).remainder_(size)
        self.filled.add_(n).clamp_(max=size)

    def nearest(self, query: Tensor, *, k: int = 1) -> Nearest:
        """The k rows with the largest cosine to each query, by `sslops.nearest`; those that hold no keys yet count too.

        Args:
            query: [B, D], of any length, float32, float16 or bfloat16.
            k: how many of each query's, at most K.

        Returns:
            (ids, values), [B] each, or for k > 1 [B, k]: the rows of `negatives`, and the cosines, which have the
            query's gradient.

        Raises:
            TypeError, ValueError: arguments of the wrong type, shape, dtype, device or value.
        """
        op = "NegativeQueue.nearest"
        _check.tensors(op, {"negatives": self.negatives, "query": query}, {"negatives": Of("K D"), "query": Of("B D")})
        unit = F.normalize(query.to(torch.promote_types(query.dtype, torch.float32)))
        return nearest(unit, self.negatives, k=k)

    @classmethod
    def from_moco(cls, queue: Tensor, queue_ptr: Tensor) -> "NegativeQueue":
        """From the buffers of MoCo's model: queue [D, K], queue_ptr [1]. All rows count as filled."""
        op = "NegativeQueue.from_moco"
        _check.tensors(op, {"queue": queue}, {"queue": Of("D K")})
        return cls._of(op, queue.t(), queue_ptr=queue_ptr)

    def to_moco(self) -> dict[str, Tensor]:
        """Copies, named as MoCo's buffers: {"queue": [D, K], "queue_ptr": [1]}."""
        return {"queue": self.negatives.t().contiguous(), "queue_ptr": self.pointer.reshape(1).clone()}

    @classmethod
    def from_lightly(cls, bank: Tensor, bank_ptr: Tensor) -> "NegativeQueue":
        """From the buffers of lightly's MemoryBankModule: bank [K, D], bank_ptr [1]. All rows count as filled."""
        op = "NegativeQueue.from_lightly"
        _check.tensors(op, {"bank": bank}, {"bank": Of("K D")})
        return cls._of(op, bank, bank_ptr=bank_ptr)

    @classmethod
    def _of(cls, op: str, bank: Tensor, **named: Tensor) -> "NegativeQueue":
        ((name, pointer),) = named.items()
        _check.tensors(op, {name: pointer, "P": 1}, {name: Of("P", _check.ID_DTYPES)})
        if pointer.is_meta and not bank.is_meta:
            _check.bad_value(op, name, "a tensor with a value", pointer.device)
        with torch.no_grad(), bank.device:
            made = cls(bank.shape[0], bank.shape[1], bank.dtype)
            made.negatives.copy_(bank)
            made.pointer.copy_(pointer.reshape(()) % len(bank))
            made.filled.fill_(len(bank))
        return made

    def to_lightly(self) -> dict[str, Tensor]:
        """Copies, named as lightly's buffers: {"bank": [K, D], "bank_ptr": [1]}."""
        return {"bank": self.negatives.clone(), "bank_ptr": self.pointer.reshape(1).clone()}

    def extra_repr(self) -> str:
        size, dim = self.negatives.shape
        return f"{size}, {dim}, dtype={self.negatives.dtype}"
