"""Pairs that a careless skip-gram gets wrong: words again and again, negatives that are the context, ragged rows; the
sparse gradients that optimizers are given; and how often a sampler draws what.
"""

import copy

import pytest
import torch
import torch.nn.functional as F

import sslops
from sslops import _C
from sslops.kernels.cpu import skip_gram as kernel

from . import oracle

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
each_target = pytest.mark.parametrize(("device", "backend"), oracle.targets("skip_gram"))
# V, D, B, N: one of each, fewer columns than a vector, more than a block of vectors, more pairs than a ticket, more
# negatives than a vector, more words than the sort's digit
SHAPES = [(1, 1, 1, 0), (5, 3, 70, 2), (90, 300, 33, 5), (40, 24, 150, 19), (5000, 7, 900, 5)]


def tables(v, d, dtype=torch.float32, device="cpu", scale=1.0):
    g = torch.Generator().manual_seed(v)
    return {
        name: (scale * torch.randn(v, d, generator=g)).to(device, dtype) for name in ("input_weight", "output_weight")
    }


def pairs(v, b, n, device="cpu"):
    """Nearly half of them are of the first words."""
    g = torch.Generator().manual_seed(b)
    shapes = {"centers": (b,), "contexts": (b,), "negatives": (b, n)}
    draws = {name: torch.rand(shape, generator=g).square() * v for name, shape in shapes.items()}
    return {name: x.long().to(device) for name, x in draws.items()}


def gradients(inputs, **options):
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    loss = sslops.skip_gram(**leaves, **options)
    return [loss.detach(), *torch.autograd.grad(loss.sum(), list(leaves.values()))]


def test_against_the_formula():
    """Eq. 4 of the paper as a loop, word2vec.c's way with negatives that are the context; gradients by differences"""
    inputs, ids = tables(6, 3, torch.float64), pairs(6, 20, 4)
    assert (ids["negatives"] == ids["contexts"][:, None]).any()
    u, v = inputs.values()
    terms = [
        F.logsigmoid((u[c] @ v[o]) if k < 0 else -(u[c] @ v[row[k]]))
        for c, o, row in zip(*ids.values(), strict=True)
        for k in range(-1, 4)
        if k < 0 or row[k] != o
    ]
    torch.testing.assert_close(sslops.skip_gram(**inputs, **ids), -sum(terms) / 20)
    assert torch.autograd.gradcheck(
        lambda u, v: sslops.skip_gram(u, v, **ids), tuple(x.requires_grad_() for x in (u, v))
    )


@each_target
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(device, backend, dtype, shape):
    v, d, b, n = shape
    for reduction, scale in (("mean", d**-0.5), ("sum", 1.0), ("none", 1.0)):
        inputs = tables(v, d, dtype, device, scale)
        with oracle.poisoned_memory():
            oracle.check(sslops.skip_gram, inputs, backend, reduction=reduction, **pairs(v, b, n, device))


def test_large_tables():
    """Their dense gradients lie in memory that the system has cleared, and that a kernel need not"""
    inputs = tables(20000, 60)
    assert inputs["input_weight"].nbytes > _C.WORTH_HUGE_PAGES
    with oracle.poisoned_memory():
        oracle.check(sslops.skip_gram, inputs, "cpu", **pairs(20000, 50, 3))


def test_every_instruction_set(isa):
    with oracle.poisoned_memory():
        oracle.check(sslops.skip_gram, tables(90, 301), "cpu", **pairs(90, 200, 19))


@each_target
def test_one_word_again_and_again(device, backend):
    """All that is summed goes into one row."""
    ids = pairs(1, 3000, 5, device)
    ids["negatives"] += torch.arange(5, device=device) % 2
    oracle.check(sslops.skip_gram, tables(2, 40, device=device), backend, **ids)


@each_target
def test_only_the_context_is_drawn(device, backend):
    """Its negatives do not count: neither in the loss nor in a gradient."""
    inputs, ids = tables(7, 20, device=device), pairs(7, 30, 4, device)
    alone = gradients(inputs, **ids | {"negatives": ids["negatives"][:, :0]}, backend=backend)
    ids["negatives"] = ids["contexts"][:, None].expand(-1, 4)
    assert all(map(torch.equal, gradients(inputs, **ids, backend=backend), alone))


@each_target
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_sparse_gradients_are_the_dense_ones(device, backend, dtype, reduction):
    """Each row that was looked at once, in ascending order, and no other; to the bit"""
    inputs, ids = tables(700, 33, dtype, device), pairs(300, 150, 5, device)
    dense = gradients(inputs, **ids, reduction=reduction, backend=backend)
    sparse = gradients(inputs, **ids, reduction=reduction, backend=backend, sparse=True)
    assert torch.equal(sparse[0], dense[0])
    looked_at = ids["centers"].unique(), torch.cat([ids["contexts"], ids["negatives"].flatten()]).unique()
    for found, expected, rows in zip(sparse[1:], dense[1:], looked_at, strict=True):
        assert found.is_coalesced()
        assert torch.equal(found.indices()[0], rows)
        assert torch.equal(found.to_dense(), expected)
        assert found.dtype == dtype
    torch.sparse_coo_tensor(found.indices(), found.values(), found.shape, is_coalesced=True, check_invariants=True)


@pytest.mark.parametrize("optimizer", [torch.optim.SparseAdam, torch.optim.SGD, torch.optim.Adagrad])
def test_optimizers_take_them(optimizer):
    """What trains with them goes where the reference's dense gradients go, and untouched rows stay as they are."""
    ids, trained = pairs(30, 64, 5), []
    for backend in ("cpu", "eager"):
        words = [torch.nn.Embedding.from_pretrained(x.clone(), freeze=False) for x in tables(50, 12).values()]
        steps = optimizer([x.weight for x in words], lr=0.1)
        for _ in range(5):
            steps.zero_grad()
            sslops.skip_gram(*(x.weight for x in words), **ids, sparse=True, backend=backend).backward()
            steps.step()
        trained.append([x.weight.detach() for x in words])
    for ours, theirs, before in zip(*trained, tables(50, 12).values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert torch.equal(ours[30:], before[30:])
        assert not torch.equal(ours[:30], before[:30])


def test_they_add_up_and_are_scaled():
    """GradScaler's factor to the bit, a second loss of the same table, and tied tables"""
    (u, v), ids = tables(40, 8).values(), pairs(40, 30, 5)
    u.requires_grad_()
    loss = sslops.skip_gram(u, v, **ids, sparse=True)
    once = torch.autograd.grad(loss, u, retain_graph=True)[0].to_dense()
    (loss * 2.0**16).backward()
    assert torch.equal(u.grad.to_dense(), once * 2.0**16)
    sslops.skip_gram(u, v, **pairs(40, 31, 5), sparse=True).backward()
    (other,) = torch.autograd.grad(sslops.skip_gram(u, v, **pairs(40, 31, 5)), u)
    torch.testing.assert_close(u.grad.to_dense(), once * 2.0**16 + other)
    (tied,) = torch.autograd.grad(sslops.skip_gram(u, u, **ids, sparse=True), u)
    (expected,) = torch.autograd.grad(sslops.skip_gram(u, u, **ids, backend="eager"), u)
    torch.testing.assert_close(tied.to_dense(), expected)


@pytest.mark.parametrize("sparse", [True, False])
def test_the_same_bits_on_any_threads(sparse):
    inputs, ids = tables(3000, 65), pairs(3000, 2000, 5)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append([x.to_dense() for x in gradients(inputs, **ids, sparse=sparse, backend="cpu")])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other, strict=True))


@each_target
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("frozen", ["input_weight", "output_weight", "both"])
def test_frozen_tables(device, backend, sparse, frozen):
    inputs, ids = tables(30, 9, device=device), pairs(30, 70, 5, device)
    every = dict(zip(inputs, gradients(inputs, **ids, backend=backend)[1:], strict=True))
    leaves = {name: x.clone().requires_grad_(frozen not in (name, "both")) for name, x in inputs.items()}
    loss = sslops.skip_gram(**leaves, **ids, sparse=sparse, backend=backend)
    assert loss.requires_grad == (frozen != "both")
    if loss.requires_grad:
        loss.backward()
    for name, x in leaves.items():
        assert (x.grad is None) != x.requires_grad
        assert x.grad is None or torch.equal(x.grad.to_dense(), every[name])


@each_target
def test_no_pairs_and_no_columns(device, backend):
    for inputs, ids in (
        (tables(5, 4, device=device), pairs(5, 0, 3, device)),
        (tables(5, 0, device=device), pairs(5, 6, 3, device)),
    ):
        for options in ({}, {"sparse": True}, {"reduction": "sum"}, {"reduction": "none"}):
            found = gradients(inputs, **ids, **options, backend=backend)
            expected = gradients(inputs, **ids, **options, backend="eager")
            for x, y in zip(found, expected, strict=True):
                torch.testing.assert_close(x.to_dense(), y.to_dense(), equal_nan=True)


def test_memory_is_of_the_rows_that_are_looked_at():
    """V = 200,000, D = 128: forward and backward of 500 pairs grow by little, where a dense gradient takes 100 MB."""
    grown = oracle.grown_memory(
        "u, v = (torch.randn(200000, 128, requires_grad=True) for _ in range(2)); "
        "ids = torch.randint(200000, (500, 7)); words = ids[:, 0], ids[:, 1], ids[:, 2:]; "
        "sslops.skip_gram(u, v, *(x[:9] for x in words), sparse=True).backward(); u.grad = v.grad = None",
        "sslops.skip_gram(u, v, *words, sparse=True).backward()",
    )
    assert grown < 8, f"{grown:.0f} MB"


def test_module():
    (u, v), ids = tables(9, 4).values(), pairs(9, 5, 2)
    module = copy.deepcopy(sslops.nn.SkipGramLoss(reduction="sum"))
    assert torch.equal(module(u, v, *ids.values()), sslops.skip_gram(u, v, **ids, reduction="sum"))


def test_bad_input():
    (u, v), ids = tables(9, 4).values(), pairs(9, 5, 2)

    def refused(error, argument, **other):
        arguments = {"input_weight": u, "output_weight": v, **ids} | other
        oracle.assert_refused(error, "skip_gram", argument, lambda: sslops.skip_gram(**arguments))

    refused(ValueError, "output_weight", output_weight=v[:, :3])
    refused(ValueError, "output_weight", output_weight=v.half())
    refused(ValueError, "contexts", contexts=ids["contexts"][:3])
    refused(ValueError, "negatives", negatives=ids["negatives"][:3])
    refused(TypeError, "centers", centers=ids["centers"].float())
    refused(ValueError, "centers[0]", centers=ids["centers"] + 9)
    refused(ValueError, "negatives[0, 0]", negatives=ids["negatives"] - 9)
    refused(ValueError, "reduction", reduction="max")
    refused(TypeError, "sparse", sparse=1)
    with pytest.raises(Exception, match=r"skip_gram: sparse: wanted False under torch\.compile"):
        torch.compile(sslops.skip_gram, backend="eager", fullgraph=True)(u, v, **ids, sparse=True)


class TestPlantedFaults:
    """Broken kernels must not pass."""

    def refuse(self, **kwargs):
        with pytest.raises(AssertionError, match="above"):
            oracle.check(sslops.skip_gram, tables(40, 16), "cpu", **pairs(40, 60, 5), **kwargs)

    def test_a_context_among_the_negatives_counts(self, monkeypatch):
        run = kernel.forward
        monkeypatch.setattr(kernel, "forward", lambda x: run(x._replace(contexts=(x.contexts + 1) % 40)))
        self.refuse()

    def test_a_run_that_ends_early(self, monkeypatch):
        run = _C.skip_gram_sum
        monkeypatch.setattr(_C, "skip_gram_sum", lambda *x: run(*x[:8], x[8] - 1, *x[9:]))
        self.refuse()

    def test_places_out_of_order(self, monkeypatch):
        run = _C.skip_gram_sort

        def shuffled(ids, highest, order, *runs):
            count = run(ids, highest, order, *runs)
            order.copy_(order.flip(0))
            return count

        monkeypatch.setattr(_C, "skip_gram_sort", shuffled)
        self.refuse()

    def test_unwritten_memory(self, monkeypatch):
        monkeypatch.setattr(_C, "skip_gram_forward", lambda *args: None)
        with oracle.poisoned_memory():
            self.refuse()


class TestNegativeSampler:
    @pytest.mark.parametrize("words", [1, 2, 4, 7, 5000])
    @pytest.mark.parametrize("power", [0.0, 0.75, 1.0])
    def test_the_table_is_the_distribution(self, words, power):
        """Added up from the table itself: what a word is drawn as, and what is drawn in others' place"""
        counts = (torch.arange(words) - words // 4).clamp(min=0) ** 3
        counts[-1] += 1
        if words == 4:  # what is over and what is lacked end in one place
            counts = torch.tensor([5, 5, 0, 0])
        sampler = sslops.NegativeSampler(counts, power)
        kept = sampler.threshold.double() / 2**32
        assert ((kept >= 0) & (kept <= 1)).all()
        found = kept.index_add(0, sampler.alias, 1 - kept) / words
        expected = torch.where(counts > 0, counts.double() ** power, 0.0)
        torch.testing.assert_close(found, expected / expected.sum(), rtol=1e-6, atol=1e-9 / words)
        assert not found[counts == 0].any()

    def test_one_word_outweighs_all(self):
        sampler = sslops.NegativeSampler(torch.tensor([1e-30, 1e30, 0.0, 1.0]), 1.0)
        assert (sampler.draw(1000, 3, generator=torch.Generator().manual_seed(0)) == 1).all()

    def test_draws(self):
        """As often as they should, by chi squared of 9 degrees (99.99% are below 33.7), in rows and in columns"""
        counts = torch.arange(10).flip(0) ** 2
        sampler = sslops.NegativeSampler(counts)
        drawn = sampler.draw(20000, 5, generator=torch.Generator().manual_seed(0))
        assert drawn.shape == (20000, 5)
        expected = counts.double() ** 0.75 / (counts.double() ** 0.75).sum()
        for some in (drawn, drawn[:, 0], drawn[:, 4], drawn[:4000]):
            observed = some.flatten().bincount(minlength=10)[:9]
            often = expected[:9] * some.numel()
            assert ((observed - often).square() / often).sum() < 33.7
        assert not (drawn == 9).any()

    def test_the_same_for_the_same_key(self):
        sampler, made = sslops.NegativeSampler(torch.rand(100)), torch.Generator().manual_seed
        first = sampler.draw(9, 5, generator=made(3))
        assert torch.equal(sampler.draw(9, 5, generator=made(3)), first)
        assert not torch.equal(sampler.draw(9, 5, generator=made(4)), first)
        assert torch.equal(sampler.draw(45, 1, generator=made(3)).view(9, 5), first)
        other = sslops.NegativeSampler(torch.ones(100))
        other.load_state_dict(sampler.state_dict())
        assert torch.equal(other.draw(9, 5, generator=made(3)), first)
        assert sampler.draw(0, 5).shape == (0, 5)

    def test_bad_input(self):
        def refused(error, argument, *args, **kwargs):
            oracle.assert_refused(error, "NegativeSampler", argument, lambda: sslops.NegativeSampler(*args, **kwargs))

        for counts in ([], [0, 0], [1, -1], [1.0, float("nan")], [1.0, float("inf")]):
            refused(ValueError, "counts", torch.tensor(counts))
        refused(TypeError, "counts", [1, 2])
        refused(ValueError, "counts", torch.ones(3, device="meta"))
        refused(ValueError, "power", torch.ones(3), -1.0)
        sampler = sslops.NegativeSampler(torch.ones(3))
        for error, argument, arguments in (
            (ValueError, "rows", {"rows": -1}),
            (TypeError, "count", {"rows": 1, "count": 1.0}),
            (TypeError, "generator", {"rows": 1, "generator": 3}),
        ):
            oracle.assert_refused(
                error, "NegativeSampler.draw", argument, lambda kwargs=arguments: sampler.draw(**kwargs)
            )
