"""Neighbours that a careless search gets wrong: ties, NaN, edges of tiles, itself; KoLeo of them."""

import pytest
import torch
import torch.nn.functional as F

import sslops
from sslops import _C
from sslops.kernels.cpu import nearest as kernel

from . import oracle
from .cases import nearest_values

TARGETS = oracle.targets("nearest")
each_target = pytest.mark.parametrize(("device", "backend"), [*TARGETS, ("cpu", "eager")])
# B, K, D, k: a vector, a chunk of 64, 128 and 256 candidates, a tile of 256 and a span of 1024 queries, and one more
SHAPES = [(1, 1, 1, 1), (5, 7, 3, 7), (17, 1030, 5, 1), (257, 8193, 2, 3), (1030, 70, 4, 2), (3, 16500, 3, 1)]


def whole(b: int, count: int, d: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Small whole numbers: every product is exact in every dtype, and most are equal to many others."""
    return tuple(torch.randint(-1, 2, (n, d), device=device).float() for n in (b, count))


def sorted_ids(scores: torch.Tensor, k: int) -> torch.Tensor:
    ids = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return ids[:, 0] if k == 1 else ids


@each_target
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ties_go_to_the_lowest_id(device, backend, shape):
    *sizes, k = shape
    q, s = whole(*sizes, device)
    scores = q.double() @ s.double().t()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found = sslops.nearest(q.to(dtype), s.to(dtype), k=k, backend=backend)
        assert torch.equal(found.ids, sorted_ids(scores, k))
        assert torch.equal(found.values.double(), scores.gather(1, found.ids.view(len(q), -1)).view(found.ids.shape))
        assert found.values.dtype == torch.float32


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_instruction_set(isa, shape):
    *sizes, k = shape
    q, s = whole(*sizes)
    assert torch.equal(sslops.nearest(q, s, k=k, backend="cpu").ids, sorted_ids(q @ s.t(), k))


@each_target
@pytest.mark.parametrize(("rows", "k"), [(2, 1), (300, 1), (1100, 4)])
def test_nobody_is_his_own_neighbour(device, backend, rows, k):
    q, s = whole(rows, rows, 3, device)
    scores = (q @ s.t()).fill_diagonal_(-torch.inf)
    found = sslops.nearest(q, s, k=k, exclude_self=True, backend=backend)
    assert torch.equal(found.ids, sorted_ids(scores, k))


@each_target
@pytest.mark.parametrize("k", [1, 3, 6])
def test_numbers_before_nan(device, backend, k):
    """-inf and NaN are the lowest number, by their ids; +inf the highest"""
    nan, inf = torch.nan, torch.inf
    s = torch.tensor([nan, -inf, -1.0, 2.0, nan, inf, 2.0, -3e38], device=device)[:, None]
    q = torch.tensor([[1.0], [-1.0], [nan], [0.0]], device=device)
    expected = [[5, 3, 6, 2, 7, 0], [1, 7, 2, 3, 6, 0], [0, 1, 2, 3, 4, 5], [2, 3, 6, 7, 0, 1]]
    found = sslops.nearest(q, s, k=k, backend=backend)
    ids = found.ids.view(4, k)
    assert ids.tolist() == [row[:k] for row in expected]
    torch.testing.assert_close(found.values.view(4, k), q * s[ids, 0], equal_nan=True)
    q, s = q[2:3].expand(3, 1), q[2:3].expand(3, 1)
    assert sslops.nearest(q, s, exclude_self=True, backend=backend).ids.tolist() == [1, 0, 0]


@each_target
@pytest.mark.parametrize(
    "options", [{}, {"normalize": True, "k": 3}, {"exclude_self": True, "normalize": True}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_their_gradients(device, backend, options, dtype):
    """Gradients in float32 only: in bf16 a row may be nearest that is not"""
    inputs = {name: torch.randn(70, 33, device=device).to(dtype) for name in ("query", "support")}
    if dtype == torch.float32:
        return oracle.check(nearest_values, inputs, backend, **options)

    def answers(draw):
        ways = ((backend, dtype), ("eager", dtype), ("eager", torch.float64))
        return [[nearest_values(*(x.to(t) for x in draw), backend=b, **options)] for b, t in ways]

    oracle.assert_promise(["values"], answers, list(inputs.values()), dtype)


def test_values_have_second_derivatives_and_ids_no_gradient():
    q, s = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    found = sslops.nearest(q, s, k=2, normalize=True)
    assert not found.ids.requires_grad
    gradients = torch.autograd.grad(found.values.square().sum(), (q, s), create_graph=True)
    assert all(x.isfinite().all() for x in torch.autograd.grad(sum(g.square().sum() for g in gradients), (q, s)))


def test_no_queries_and_no_columns():
    found = sslops.nearest(torch.randn(0, 4), torch.randn(5, 4), k=2)
    assert found.ids.shape == found.values.shape == (0, 2)
    assert sslops.nearest(torch.randn(3, 0), torch.randn(5, 0), k=2).ids.tolist() == [[0, 1]] * 3


def test_a_queue_of_another_dtype():
    queue = sslops.NegativeQueue(50, 8, torch.bfloat16)
    query = 7 * torch.randn(20, 8, requires_grad=True)
    found = queue.nearest(query, k=2)
    cosines = F.normalize(query) @ queue.negatives.float().t()
    assert torch.equal(found.ids, cosines.topk(2).indices)
    torch.testing.assert_close(found.values, cosines.topk(2).values)
    assert torch.equal(queue.nearest(query).ids, found.ids[:, 0])
    found.values.sum().backward()
    oracle.assert_refused(ValueError, "NegativeQueue.nearest", "query", lambda: queue.nearest(query[:, :3]))


@pytest.mark.parametrize(("k", "most"), [(1, 4), (200, 40)])
def test_memory_is_linear(k, most):
    """B = 1024, K = 100,000, D = 16: a process of its own grows by little, where B x K takes 410 MB and a copy 6."""
    setup = "q, s = torch.randn(1024, 16), torch.randn(100000, 16); sslops.nearest(q[:300], s[:2000])"
    grown = oracle.grown_memory(setup, f"sslops.nearest(q, s, k={k}, normalize=True)")
    assert grown < most, f"{grown:.0f} MB"


def test_bad_input():
    q, s = torch.randn(4, 8), torch.randn(5, 8)

    def refused(error, argument, *args, **kwargs):
        oracle.assert_refused(error, "nearest", argument, lambda: sslops.nearest(*args, **kwargs))

    refused(ValueError, "support", q, s[:, :3])
    refused(ValueError, "support", q, s.double())
    refused(ValueError, "support", q, s[:0])
    refused(ValueError, "support", q, s[:3], exclude_self=True)
    refused(ValueError, "support", q[:1], s[:1], exclude_self=True)
    refused(ValueError, "k", q, s, k=0)
    refused(ValueError, "k", q, s, k=6)
    refused(ValueError, "k", q, q, k=4, exclude_self=True)
    refused(TypeError, "k", q, s, k=1.0)
    refused(TypeError, "normalize", q, s, normalize=1)
    refused(TypeError, "exclude_self", q, s, exclude_self=None)
    for error, argument, arguments in (
        (ValueError, "x", {"x": q[:1]}),
        (ValueError, "x", {"x": q[0]}),
        (ValueError, "eps", {"x": q, "eps": 0.0}),
    ):
        oracle.assert_refused(error, "koleo", argument, lambda kwargs=arguments: sslops.koleo(**kwargs))


class TestKoLeo:
    @each_target
    @pytest.mark.parametrize("shape", [(2, 5), (65, 33), (300, 16)])
    def test_promise(self, device, backend, shape):
        oracle.check(sslops.koleo, {"x": torch.randn(shape, device=device)}, backend)

    def test_is_the_formula(self):
        """By all distances; the gradient is that of both ends"""
        x = torch.randn(40, 6, dtype=torch.float64, requires_grad=True)
        unit = F.normalize(x)
        distances = (unit[:, None] - unit).square().sum(2).masked_fill(torch.eye(40, dtype=torch.bool), torch.inf)
        expected = -(distances.amin(1).sqrt() + 0.1).log().mean()
        found = sslops.koleo(x, eps=0.1)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(*(torch.autograd.grad(loss, x)[0] for loss in (found, expected)))

    def test_equal_rows(self):
        """Two images that are one: a finite loss, and no gradient that is divided by nothing"""
        x = torch.randn(4, 8)
        x = torch.cat([x, x[:1]]).half().requires_grad_()
        loss = sslops.koleo(x)
        loss.backward()
        assert loss.dtype == torch.float32
        assert loss.isfinite()
        assert x.grad.isfinite().all()

    def test_the_same_bits_on_any_threads(self):
        x, threads, found = torch.randn(700, 16).repeat(2, 1) + 1e-3, torch.get_num_threads(), []
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                leaf = x.clone().requires_grad_()
                found.append(torch.autograd.grad(sslops.koleo(leaf), leaf)[0])
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(each, found[0]) for each in found)

    def test_is_a_module(self):
        x = torch.randn(12, 6)
        module = sslops.nn.KoLeoLoss(eps=0.1)
        assert torch.equal(module(x), sslops.koleo(x, eps=0.1))
        assert repr(module) == "KoLeoLoss(eps=0.1, group=None, backend=None)"
        oracle.assert_compiles(module, x)


class TestPlantedFaults:
    """Broken kernels must not pass."""

    def refuse(self, monkeypatch, forward):
        monkeypatch.setattr(kernel, "forward", forward)
        with pytest.raises(AssertionError):
            test_ties_go_to_the_lowest_id("cpu", "cpu", (257, 8193, 2, 3))

    def test_the_highest_of_equal_ones(self, monkeypatch):
        run = kernel.forward

        def fault(x):
            count = x.support.shape[0]
            return count - 1 - run(x._replace(support=x.support.flip(0)))

        self.refuse(monkeypatch, fault)

    def test_without_the_last_chunk(self, monkeypatch):
        run = kernel.forward
        monkeypatch.setattr(kernel, "forward", lambda x: run(x._replace(support=x.support[:-1])))
        q, s = whole(4, 600, 3)
        s[-1] = 9 * q[0]
        assert sslops.nearest(q, s, backend="eager").ids[0] == 599
        assert sslops.nearest(q, s, backend="cpu").ids[0] != 599

    def test_a_neighbour_by_chance(self):
        """What rounding may do is in the bound of the values, another row is not."""
        x = {"query": torch.randn(70, 33), "support": torch.randn(90, 33)}

        def fault(query, support, backend, **options):
            found = sslops.nearest(query, support, k=2, backend=backend, **options).values
            return found[:, 0] if backend == "eager" else torch.cat([found[:1, 1], found[1:, 0]])

        with pytest.raises(AssertionError, match="above"):
            oracle.check(fault, x, "cpu")

    def test_unwritten_memory(self, monkeypatch):
        monkeypatch.setattr(_C, "nearest_forward", lambda *args: None)
        with oracle.poisoned_memory(), pytest.raises((AssertionError, IndexError)):
            test_ties_go_to_the_lowest_id("cpu", "cpu", (5, 7, 3, 7))
