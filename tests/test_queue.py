import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import sslops

from . import oracle

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unit(n: int, d: int) -> torch.Tensor:
    return F.normalize(torch.randn(n, d))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batches", [[10], [3, 3, 3, 3, 3], [7, 10, 1, 0, 9, 4], [4, 23, 5], [11], [40]])
def test_a_ring(dtype, batches):
    """Against a list that forgets its oldest rows, written one by one: batches of more than fit too"""
    queue = sslops.NegativeQueue(10, 4, dtype)
    assert queue.negatives.dtype == dtype
    start = queue.negatives.clone()
    torch.testing.assert_close(start.float().norm(dim=1), torch.ones(10), atol=1e-2, rtol=0)
    written, ids = [], []
    for n in batches:
        keys = 5 * torch.randn(n, 4)
        numbers = torch.arange(len(ids), len(ids) + n)
        queue.enqueue(keys, ids=numbers, labels=numbers % 3)
        assert torch.equal(queue.valid, torch.arange(10) < len(ids) + n)
        written += F.normalize(keys).to(dtype)
        ids += numbers.tolist()
    expected, expected_ids = start, torch.full((10,), -1)
    for position, (key, number) in enumerate(zip(written, ids, strict=True)):
        expected[position % 10], expected_ids[position % 10] = key, number
    assert torch.equal(queue.negatives, expected)
    assert torch.equal(queue.ids, expected_ids)
    assert torch.equal(queue.labels, torch.where(expected_ids < 0, -1, expected_ids % 3))
    assert int(queue.pointer) == sum(batches) % 10
    assert int(queue.filled) == min(10, sum(batches))


def test_keys_of_another_precision_and_magnitude():
    queue = sslops.NegativeQueue(6, 4, torch.float16)
    keys = 1e18 * torch.randn(3, 4, dtype=torch.float64)
    queue.enqueue(keys.requires_grad_())
    assert torch.equal(queue.negatives[:3], F.normalize(keys).half())
    assert not queue.negatives.requires_grad


def test_written_in_place():
    queue = sslops.NegativeQueue(8, 4)
    address = queue.negatives.data_ptr()
    queue.enqueue(unit(5, 4))
    assert queue.negatives.data_ptr() == address


@pytest.mark.parametrize("dtype", DTYPES)
def test_resumes_exactly(dtype):
    queue = sslops.NegativeQueue(9, 4, dtype)
    queue.enqueue(unit(7, 4))
    file = io.BytesIO()
    torch.save(queue.state_dict(), file)
    file.seek(0)
    resumed = sslops.NegativeQueue(9, 4, dtype)
    resumed.load_state_dict(torch.load(file))
    keys = unit(5, 4)
    for each in (queue, resumed):
        each.enqueue(keys, ids=torch.arange(5))
    for name, value in queue.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_from_and_to_moco():
    """As MoCo's buffers are: queue [D, K], written at [:, ptr : ptr + B], and queue_ptr [1]"""
    theirs, pointer = unit(8, 3).t().contiguous(), torch.tensor([4])
    queue = sslops.NegativeQueue.from_moco(theirs, pointer)
    keys = unit(4, 3)
    theirs[:, 4:8], pointer[0] = keys.t(), 0
    queue.enqueue(keys)
    found = queue.to_moco()
    torch.testing.assert_close(found["queue"], theirs)
    assert found["queue"].is_contiguous()
    assert torch.equal(found["queue_ptr"], pointer)
    assert int(queue.filled) == 8


def test_from_and_to_lightly():
    """As lightly 1.6's MemoryBankModule has them: bank [K, D], bank_ptr [1]"""
    bank, pointer = unit(8, 3), torch.tensor([2])
    queue = sslops.NegativeQueue.from_lightly(bank, pointer)
    keys = unit(4, 3)
    bank[2:6], pointer[0] = keys, 6
    queue.enqueue(keys)
    found = queue.to_lightly()
    torch.testing.assert_close(found["bank"], bank)
    assert torch.equal(found["bank_ptr"], pointer)
    assert found["bank"].data_ptr() != queue.negatives.data_ptr()


def test_refused_and_unchanged():
    queue = sslops.NegativeQueue(4, 3)
    before = copy.deepcopy(queue.state_dict())
    keys, op = unit(2, 3), "NegativeQueue.enqueue"
    for error, argument, call in [
        (ValueError, "keys", lambda: queue.enqueue(unit(2, 4))),
        (ValueError, "keys", lambda: queue.enqueue(keys[0])),
        (ValueError, "keys", lambda: queue.enqueue(keys.to("meta"))),
        (TypeError, "keys", lambda: queue.enqueue(keys.long())),
        (TypeError, "keys", lambda: queue.enqueue([1.0])),
        (TypeError, "ids", lambda: queue.enqueue(keys, ids=torch.zeros(2))),
        (ValueError, "ids", lambda: queue.enqueue(keys, ids=torch.arange(3))),
        (ValueError, "ids", lambda: queue.enqueue(keys, ids=torch.arange(2, device="meta"))),
        (ValueError, "ids", lambda: queue.enqueue(keys, ids=torch.tensor([3, -1]))),
        (ValueError, "labels", lambda: queue.enqueue(keys, ids=torch.arange(2), labels=torch.tensor([-7, 1]))),
        (ValueError, "labels", lambda: queue.enqueue(keys, labels=torch.arange(3))),
        (TypeError, "labels", lambda: queue.enqueue(keys, labels=torch.zeros(2))),
    ]:
        oracle.assert_refused(error, op, argument, call)
        assert all(torch.equal(before[name], value) for name, value in queue.state_dict().items())
    for pointer in (torch.arange(6), torch.empty(0, dtype=torch.int64)):
        oracle.assert_refused(
            ValueError, "NegativeQueue.from_lightly", "bank_ptr", lambda p=pointer: queue.from_lightly(unit(4, 3), p)
        )
    pointer = torch.zeros(1, dtype=torch.int64, device="meta")
    oracle.assert_refused(
        ValueError, "NegativeQueue.from_lightly", "bank_ptr", lambda: queue.from_lightly(unit(4, 3), pointer)
    )
    oracle.assert_refused(ValueError, "NegativeQueue", "size", lambda: sslops.NegativeQueue(0, 3))
    oracle.assert_refused(ValueError, "NegativeQueue", "dim", lambda: sslops.NegativeQueue(3, 0))
    oracle.assert_refused(TypeError, "NegativeQueue", "size", lambda: sslops.NegativeQueue(3.0, 3))
    for dtype in (torch.int8, oracle.Array()):
        oracle.assert_refused(TypeError, "NegativeQueue", "dtype", lambda d=dtype: sslops.NegativeQueue(3, 3, d))


def test_labels_and_ids_are_forgotten_with_their_keys():
    queue = sslops.NegativeQueue(4, 3)
    queue.enqueue(unit(3, 3), labels=torch.tensor([7, 8, 9]))
    assert queue.labels.tolist() == [7, 8, 9, -1]
    queue.enqueue(unit(2, 3), ids=torch.tensor([5, 6]))
    assert queue.labels.tolist() == [-1, 8, 9, -1]
    assert queue.ids.tolist() == [6, -1, -1, 5]
    assert queue.valid.all()


def test_from_lightly_on_its_own_device():
    """Not on the default one, which may have no memory"""
    bank = unit(8, 3)
    torch.set_default_device("meta")
    try:
        queue = sslops.NegativeQueue.from_lightly(bank, torch.zeros(1, dtype=torch.int64, device="cpu"))
        queue.enqueue(bank[:3], ids=torch.arange(3, device="cpu"))
    finally:
        torch.set_default_device(None)
    assert queue.ids.tolist() == [0, 1, 2, -1, -1, -1, -1, -1]


def test_compiled_step():
    def step(query, keys, queue):
        loss = sslops.info_nce(query * 2, keys, queue.negatives, backend="cpu")
        queue.enqueue(keys, labels=torch.arange(12))
        return loss

    torch._dynamo.reset()
    plain = sslops.NegativeQueue(30, 8)
    compiled_queue = copy.deepcopy(plain)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        query, keys = torch.randn(12, 8, requires_grad=True), torch.randn(12, 8)
        results = []
        for run, queue in ((step, plain), (compiled, compiled_queue)):
            loss = run(query, keys, queue)
            results.append((loss, *torch.autograd.grad(loss, query), queue.negatives.clone(), queue.pointer.clone()))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_moby():
    """Two queues, a predictor on one side and a momentum encoder on the other, by its loss as it is usually written"""

    def run(loss, average):
        torch.manual_seed(0)
        encoder = nn.Sequential(nn.Linear(12, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 8))
        predictor, target = nn.Linear(8, 8), copy.deepcopy(encoder).requires_grad_(False)
        queues, step = [sslops.NegativeQueue(40, 8) for _ in range(2)], average(target, encoder)
        optimizer = torch.optim.SGD([*encoder.parameters(), *predictor.parameters()], 0.1)
        found = []
        for _ in range(4):
            views = [torch.randn(16, 12), torch.randn(16, 12)]
            q0, q1 = (predictor(encoder(x)) for x in views)
            with torch.no_grad():
                k0, k1 = (target(x) for x in views)
            value = loss(q0, k1, queues[1].negatives) + loss(q1, k0, queues[0].negatives)
            for queue, keys in zip(queues, (k0, k1), strict=True):
                queue.enqueue(keys)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            step()
            found.append(value.detach())
        return torch.stack(found), *target.state_dict().values()

    def usual(query, key, negatives):
        query, key, negatives = F.normalize(query), F.normalize(key), negatives.clone()
        logits = torch.cat([(query * key).sum(1, keepdim=True), query @ negatives.t()], 1) / 0.2
        return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.int64))

    def usual_average(target, online):
        @torch.no_grad()
        def step():
            for average, x in zip(target.parameters(), online.parameters(), strict=True):
                average.mul_(0.9).add_(x, alpha=1 - 0.9)

        return step

    ours = run(
        lambda query, key, negatives: sslops.info_nce(query, key, negatives, temperature=0.2),
        lambda target, online: sslops.EMA(target, online, momentum=0.9).step,
    )
    for found, expected in zip(ours, run(usual, usual_average), strict=True):
        torch.testing.assert_close(found, expected)
    assert ours[0].std() > 0.01


class TestEnqueueBeforeBackward:
    """The gradient is that of the negatives that the loss was computed with, or there is an error."""

    def step(self, query, key, queue, loss=sslops.info_nce):
        value = loss(query, key, queue.negatives, temperature=0.2, backend="cpu")
        queue.enqueue(torch.randn(6, 8))
        return torch.autograd.grad(value, [x for x in (query, key) if x.requires_grad])

    def test_a_query_alone_has_its_gradient_already(self):
        query, key, queue = torch.randn(6, 8, requires_grad=True), torch.randn(6, 8), sslops.NegativeQueue(40, 8)
        expected = torch.autograd.grad(sslops.info_nce(query, key, queue.negatives, temperature=0.2), query)
        assert torch.equal(*self.step(query, key, queue), *expected)

    @pytest.mark.parametrize("backend", ["cpu", "eager"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("normalize", [True, False])
    def test_on_every_backend(self, normalize, dtype, backend):
        query, key = torch.randn(6, 8, dtype=dtype, requires_grad=True), torch.randn(6, 8, dtype=dtype)
        queue = sslops.NegativeQueue(40, 8, dtype)
        options = {"temperature": 0.2, "normalize": normalize, "backend": backend}
        expected = torch.autograd.grad(sslops.info_nce(query, key, queue.negatives, **options), query)
        loss = sslops.info_nce(query, key, queue.negatives, **options)
        queue.enqueue(key)
        assert torch.equal(*torch.autograd.grad(loss, query), *expected)

    def test_what_is_still_needed_raises(self):
        query, key = (torch.randn(6, 8, requires_grad=True) for _ in range(2))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            self.step(query, key, sslops.NegativeQueue(40, 8))

    @pytest.mark.parametrize(
        ("closed_over", "determinism_check", "message"),
        [
            (False, "default", "modified by an inplace operation"),  # torch's own check, of the arguments
            (True, "default", "different metadata"),  # ... and of the shapes of what is saved
            (True, "none", "enqueue after backward"),  # ours, where that is switched off
        ],
    )
    def test_a_recomputation_raises(self, closed_over, determinism_check, message):
        def loss(query, key, negatives, **kwargs):
            options = {"use_reentrant": False, "determinism_check": determinism_check}
            if closed_over:
                return checkpoint(lambda q: sslops.info_nce(q, key, negatives, **kwargs), query, **options)
            return checkpoint(sslops.info_nce, query, key, negatives, **kwargs, **options)

        query, key, queue = torch.randn(6, 8, requires_grad=True), torch.randn(6, 8), sslops.NegativeQueue(40, 8)
        with pytest.raises(RuntimeError, match=message):
            self.step(query, key, queue, loss)

    def test_a_recomputation_of_the_same_queue_is_fine(self):
        query, key, queue = torch.randn(6, 8, requires_grad=True), torch.randn(6, 8), sslops.NegativeQueue(40, 8)
        queue.enqueue(torch.randn(9, 8))
        plain = sslops.info_nce(query, key, queue.negatives)
        again = checkpoint(sslops.info_nce, query, key, queue.negatives, use_reentrant=False)
        assert torch.equal(*torch.autograd.grad(plain, query), *torch.autograd.grad(again, query))
