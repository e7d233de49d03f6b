import math

import pytest
import torch
import torch.nn.functional as F

import sslops
from sslops import _C
from sslops.kernels.cpu import relic as kernel
from sslops.ops.relic import Arguments

from . import oracle

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF)
TARGETS = oracle.targets("relic")
each_target = pytest.mark.parametrize(("device", "backend"), TARGETS)
WEIGHTS = {"alpha": 1.3, "beta": 0.7}


def views(n: int, d: int, *, dtype=torch.float32, device="cpu", noise: float = 1.0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(n * 1000 + d)
    online = torch.randn(n, d, generator=g)
    target = online + noise * torch.randn(n, d, generator=g)
    return {"online": online.to(device, dtype), "target": target.to(device, dtype)}


def losses(online, target, *, temperature=0.2, **kwargs):
    generator = torch.Generator(online.device).manual_seed(5)
    arguments = {"temperature": temperature, "generator": generator, "reduction": "none", **WEIGHTS, **kwargs}
    return sslops.relic(online, target, **arguments)


def losses_of_tensor_temperature(online, target, temperature, **kwargs):
    return losses(online, target, temperature=temperature, **kwargs)


class TestTheReference:
    def test_against_the_formula(self):
        """As loops, with the negatives as the docstring draws them."""
        online, target = (F.normalize(x.double()) for x in views(7, 3).values())
        for negatives in (None, 1, 3, 5, 6):
            order = torch.randperm(7, generator=torch.Generator().manual_seed(5)).tolist()
            expected = torch.zeros(7, dtype=torch.float64)
            for i in range(7):
                at = order.index(i)
                others = [order[(at + k) % 7] for k in range(1, (negatives or 6) + 1)]
                p = torch.tensor([online[i] @ target[m] / 0.3 for m in [i, *others]]).double().exp()
                q = torch.tensor([target[i] @ online[m] / 0.3 for m in [i, *others]]).double().exp()
                p, q = p / p.sum(), q / q.sum()
                expected[i] = -1.3 * p[0].log() + 0.7 * (p * (p / q).log()).sum()
            ours = losses(online, target, temperature=0.3, num_negatives=negatives)
            torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)

    def test_two_rows_by_hand(self):
        """S = [[1, 0], [1, 1]], temperature 1 / ln 3: p_1 = (3, 1) / 4, q_1 = (3, 3) / 6, p_2 = q_1, q_2 = p_1."""
        online, target = torch.tensor([[1.0, 0.0], [1.0, 1.0]]).double(), torch.eye(2).double()
        found = [
            losses(online, target, temperature=1 / math.log(3), normalize=False, alpha=alpha, beta=1 - alpha).tolist()
            for alpha in (1.0, 0.0)
        ]
        ln2, ln3 = math.log(2), math.log(3)
        assert found[0] == pytest.approx([2 * ln2 - ln3, ln2])
        assert found[1] == pytest.approx([0.75 * ln3 - ln2, ln2 - 0.5 * ln3])

    def test_divergence(self):
        """Its value is that of torch's own KL; exchanging the views exchanges p and q."""
        online, target = (x.double() for x in views(20, 6).values())
        log_p = (F.normalize(online) @ F.normalize(target).t() / 0.2).log_softmax(1)
        log_q = (F.normalize(target) @ F.normalize(online).t() / 0.2).log_softmax(1)
        for views_, first, second in (((online, target), log_p, log_q), ((target, online), log_q, log_p)):
            plain = F.kl_div(second, first, reduction="none", log_target=True).sum(1)
            torch.testing.assert_close(losses(*views_, alpha=0.0, beta=1.0), plain)
            torch.testing.assert_close(losses(*views_, alpha=1.0, beta=0.0), -first.diagonal())

    def test_stop_gradient(self):
        """The gradient is that of the cross entropy -E_p log q, not the divergence's."""
        leaves = [x.double().requires_grad_() for x in views(20, 6).values()]
        online, target = map(F.normalize, leaves)
        log_p, log_q = (s.log_softmax(1) for s in (online @ target.t() / 0.2, target @ online.t() / 0.2))
        weights = torch.rand(20).double()
        ours = torch.autograd.grad(losses(*leaves, alpha=0.0, beta=1.0) @ weights, leaves)
        cross = torch.autograd.grad(-(log_p.exp() * log_q).sum(1) @ weights, leaves, retain_graph=True)
        plain = torch.autograd.grad((log_p.exp() * (log_p - log_q)).sum(1) @ weights, leaves)
        for mine, wanted, other in zip(ours, cross, plain, strict=True):
            torch.testing.assert_close(mine, wanted)
            assert (mine - other).norm() > 0.1 * wanted.norm()

    def test_order_of_the_batch_and_rotations_do_not_matter(self):
        online, target = (x.double() for x in views(20, 6).values())
        expected, order = losses(online, target), torch.randperm(20)
        rotation = torch.linalg.qr(torch.randn(6, 6).double())[0]
        torch.testing.assert_close(losses(online[order], target[order]), expected[order])
        torch.testing.assert_close(losses(online @ rotation, target @ rotation), expected)


@pytest.mark.parametrize(("device", "backend"), [*TARGETS, ("cpu", "eager")])
@pytest.mark.parametrize("negatives", [None, 40])
@pytest.mark.parametrize("temperature", [0.1, 0.02])
def test_no_divergence_where_views_agree(device, backend, negatives, temperature):
    online = views(700, 32, device=device)["online"]
    arguments = {"temperature": temperature, "num_negatives": negatives, "alpha": 0.0, "beta": 1.0, "backend": backend}
    found = losses(online, online.clone(), **arguments)
    assert found.abs().max() <= (1e-5 if backend == "eager" else 0.0)


@each_target
def test_small_divergences_keep_their_digits(device, backend):
    """Views that nearly agree: eager takes differences of logits of size 1 / temperature."""
    inputs = views(300, 32, device=device, noise=1e-2)
    arguments = {"temperature": 0.5, "alpha": 0.0, "beta": 1.0}
    truth = losses(**{name: x.double() for name, x in inputs.items()}, **arguments)
    assert truth.max() < 2e-4
    ours, eager = (losses(**inputs, **arguments, backend=b) for b in (backend, "eager"))
    assert oracle.errors(ours, truth)[0] < 0.1 * oracle.errors(eager, truth)[0]
    assert ours.min() >= 0


SIZES = [
    (n, d, t, k)
    for n, d in [(67, 33), (301, 96), (777, 40)]
    for t in (1.0, 0.1, 0.02, 0.005)
    for k in (None, n // 4, n - n // 4, n - 2)
]


@each_target
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "d", "temperature", "negatives"),
    # Where few pairs decide eager's error is not typical: no lower temperatures.
    [(2, 3, 0.5, None), (5, 33, 1.0, None), (5, 33, 0.5, 1), (5, 33, 0.5, 3), (777, 40, 0.1, 1), *SIZES],
)
def test_accuracy(device, backend, dtype, n, d, temperature, negatives):
    inputs = views(n, d, dtype=dtype, device=device, noise=4.0)  # hard positives: float64 still knows 1 - p
    with oracle.poisoned_memory():
        oracle.check(losses, inputs, backend, temperature=temperature, num_negatives=negatives)


@each_target
def test_batches_of_more_than_one_route(device, backend):
    """The CPU's forward pass, which finds the gradient, holds all tiles, and some."""
    for n in (70, 1024, 2000):
        oracle.check(mean_loss, views(n, 24, device=device, noise=4.0), backend)


def test_a_batch_of_which_no_tile_is_held():
    found = []
    for reduction in ("mean", "none"):
        leaves = [x.requires_grad_() for x in views(5600, 8).values()]
        loss = sslops.relic(*leaves, temperature=0.3, **WEIGHTS, reduction=reduction, backend="cpu").mean()
        found.append([loss, *torch.autograd.grad(loss, leaves)])
    for whole, of_rows in zip(*found, strict=True):
        torch.testing.assert_close(whole, of_rows, rtol=0, atol=0)


def mean_loss(online, target, **kwargs):
    return losses(online, target, reduction="mean", **kwargs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.2, 0.01])
@pytest.mark.parametrize("negatives", [None, 100])
def test_every_instruction_set(isa, dtype, temperature, negatives):
    with oracle.poisoned_memory():
        inputs = views(350, 72, dtype=dtype, noise=4.0)
        oracle.check(losses, inputs, "cpu", temperature=temperature, num_negatives=negatives)


@each_target
@pytest.mark.parametrize("op", [losses, mean_loss])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.5, 0.05])
def test_aligned_pairs(device, backend, op, dtype, temperature):
    """Easy positives: the loss and the pull of the positive are small differences of large numbers."""
    inputs = views(600, 128, dtype=dtype, device=device, noise=1e-2)
    if temperature == 0.05 and dtype == torch.float32:
        assert losses(**inputs, temperature=temperature, backend=backend).max() < 1e-3
    oracle.check(op, inputs, backend, temperature=temperature)


@each_target
@pytest.mark.parametrize("dtype", DTYPES)
def test_collapsed(device, backend, dtype):
    """All embeddings equal: the gradient is zero, a sum of terms of size 1 / tau per row that cancel."""
    online = views(300, 64, dtype=dtype, device=device)["online"]
    row = online[:1]
    inputs = {"online": row.repeat(len(online), 1), "target": row.repeat(len(online), 1)}
    size = 2 / 0.1 / float(row.float().norm()) / 64**0.5
    oracle.check(losses, inputs, backend, temperature=0.1, scale={"online": size, "target": size})


@each_target
@pytest.mark.parametrize("magnitude", [1e-30, 1e-12, 1e-4, 1e4, 1e18, 1e25])
def test_magnitudes(device, backend, magnitude):
    inputs = {name: x * magnitude for name, x in views(130, 24, device=device).items()}
    oracle.check(losses, inputs, backend, temperature=0.1)


@each_target
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0.1, 1.0, 4.0])
def test_unnormalised(device, backend, dtype, size):
    inputs = {name: x * size for name, x in views(301, 33, dtype=dtype, device=device).items()}
    oracle.check(losses, inputs, backend, temperature=0.7, normalize=False)


@each_target
@pytest.mark.parametrize(("n", "size"), [(2, 0.1), (2, 1.0), (33, 0.3)])
def test_long_rows(device, backend, n, size):
    """Logits that are sums of many terms: their rounding is not to grow with the length."""
    g = torch.Generator().manual_seed(n)
    inputs = {name: (size * torch.randn(n, 700, generator=g)).to(device) for name in ("online", "target")}
    oracle.check(losses, inputs, backend, temperature=1.0, normalize=False)


@pytest.mark.parametrize("n", [2, 4, 8])
def test_few_rows(isa, n):
    """Logits of a hundred that nearly cancel: a BLAS sums such small products in few steps."""
    g = torch.Generator().manual_seed(n)
    row = torch.randn(64, generator=g)
    inputs = {
        name: row + spread * torch.randn(n, 64, generator=g) for name, spread in (("online", 0.02), ("target", 0.3))
    }
    oracle.check(losses, inputs, "cpu", temperature=0.5, alpha=1.0, beta=0.0, normalize=False)


@pytest.mark.parametrize(("weights", "seed"), [({"alpha": 0.0, "beta": 0.5}, 0), (WEIGHTS, 1)])
def test_huge_logits(isa, weights, seed):
    """Of size 1e12: p and q are all at one place, and what pulls at them cancels in one rounding or not at all."""
    g = torch.Generator().manual_seed(seed)
    inputs = {name: 1e4 * torch.randn(33, 700, generator=g) for name in ("online", "target")}
    oracle.check(losses, inputs, "cpu", temperature=0.01, normalize=False, **weights)


def test_a_tie_between_huge_logits(isa):
    """p is all at the other row, q half and half: a divergence of log 2, beside logits of 4e29"""
    online = torch.tensor([[0.6, -0.5], [0.6, -0.5]])
    target = torch.tensor([[4e9, 1e30], [7e9, -3e9]])
    options = {"temperature": 0.5, "alpha": 0.0, "beta": 1.0, "normalize": False}
    found = losses(online, target, **options, backend="cpu")
    torch.testing.assert_close(found, torch.full((2,), math.log(2)), rtol=1e-6, atol=0)


def test_weights_beside_huge_logits(isa):
    """Gradients are linear in the weights: in float64's reference the contrastive one is lost beside a divergence's"""
    inputs = torch.tensor([[1e30, 3e9], [7e9, 3e9]]), torch.tensor([[0.5, 0.3], [0.7, 0.4]])
    options = {"temperature": 0.5, "normalize": False}
    both, first, second = (
        oracle.evaluate(losses, inputs, "cpu", alpha=alpha, beta=beta, **options)
        for alpha, beta in ((1.0, 0.5), (1.0, 0.0), (0.0, 0.5))
    )
    for x, y, z in zip(both, first, second, strict=True):
        torch.testing.assert_close(x, y + z, rtol=1e-5, atol=0)


def test_small_divergences_of_small_logits(isa):
    """Unnormalised, of size 1e-12: beneath a maximum that is known they keep their digits"""
    inputs = {name: x * 1e-3 for name, x in views(20, 6).items()}
    options = {"temperature": 0.5, "alpha": 0.0, "beta": 1.0, "normalize": False}
    truth = losses(**{name: x.double() for name, x in inputs.items()}, **options)
    assert oracle.errors(losses(**inputs, **options, backend="cpu"), truth)[0] < 1e-2


@each_target
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.5, 0.03])
@pytest.mark.parametrize("negatives", [None, 20])
def test_temperature_gradient(device, backend, dtype, temperature, negatives):
    inputs = {name: x * 0.3 for name, x in views(200, 48, dtype=dtype, device=device).items()}
    inputs["temperature"] = torch.tensor(temperature, device=device)
    oracle.check(losses_of_tensor_temperature, inputs, backend, dtype=dtype, num_negatives=negatives)


@each_target
def test_temperature_gradient_under_equal_weights(device, backend):
    inputs = views(200, 48, device=device) | {"temperature": torch.tensor(0.2, device=device)}
    oracle.check(lambda *x, **kwargs: losses_of_tensor_temperature(*x, **kwargs).mean(), inputs, backend)


@each_target
@pytest.mark.parametrize("weights", [{"alpha": 0.0}, {"beta": 0.0}, {"alpha": 0.0, "beta": 0.0}])
def test_terms(device, backend, weights):
    oracle.check(losses, views(150, 32, device=device), backend, **weights)


@each_target
@pytest.mark.parametrize("dtype", HALF)
def test_autocast(device, backend, dtype):
    def autocast():
        return torch.autocast(device, dtype)

    inputs = views(300, 64, device=device)
    oracle.check(losses, inputs, backend, dtype=dtype, context=autocast)
    with autocast():
        rounded = losses(**inputs, backend=backend)
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, losses(**inputs, backend=backend))


@each_target
def test_no_rows_and_one(device, backend):
    for n in (0, 1):
        inputs = views(n, 8, device=device)
        oracle.check(losses, inputs, backend)
        assert not losses(**inputs, backend=backend).any()
        assert sslops.relic(**inputs, temperature=0.1, **WEIGHTS, backend=backend).isnan() == (n == 0)


@each_target
def test_not_a_number_as_eager(device, backend):
    inputs = views(20, 8, device=device)
    inputs["online"][3] = torch.nan
    for negatives in (None, 4):
        ours, eager = (losses(**inputs, num_negatives=negatives, backend=b) for b in (backend, "eager"))
        assert torch.equal(ours.isnan(), eager.isnan())


@each_target
def test_non_contiguous(device, backend):
    inputs = views(96, 40, device=device)
    strided = {name: x.repeat(2, 2)[::2, 1:41] for name, x in inputs.items()}
    strided["target"] = inputs["target"].t().contiguous().t()
    oracle.check(losses, strided, backend)


@each_target
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_every_run(device, backend, dtype):
    inputs = list(views(700, 64, dtype=dtype, device=device).values())
    first = oracle.evaluate(losses, inputs, backend, num_negatives=600)
    threads = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        again = oracle.evaluate(losses, inputs, backend, num_negatives=600)
        torch.set_num_threads(threads)
        assert all(map(torch.equal, first, again))


@each_target
@pytest.mark.parametrize("op", [losses, mean_loss])
def test_gradient_of_one_view(device, backend, op):
    """Without the target's, as in training: the same numbers for online, and none for the target."""
    online, target = views(300, 16, device=device).values()
    expected = oracle.evaluate(op, [online, target], backend)[1]
    found = oracle.evaluate(lambda x, **kwargs: op(x, target, **kwargs), [online], backend)[1]
    torch.testing.assert_close(found, expected)
    other = oracle.evaluate(lambda x, **kwargs: op(online, x, **kwargs), [target], backend)[1]
    torch.testing.assert_close(other, oracle.evaluate(op, [online, target], backend)[2])


@each_target
def test_backward_twice(device, backend):
    """What forward keeps is not used up."""
    leaves = [x.requires_grad_() for x in views(60, 16, device=device).values()]
    loss = mean_loss(*leaves, backend=backend)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, leaves)))


def lowered(online, target, backend, *, negatives=None, temperature=0.3, of_target=True, reduction="none") -> list:
    """The arguments of torch.ops.sslops.relic"""
    order = None
    if negatives is not None:
        pairs = len(online) * len(target) if online.dim() == 3 else 1
        order = torch.arange(online.shape[-2], device=online.device).flip(0).repeat(pairs, 1)
    needs_grad = [True, of_target, isinstance(temperature, torch.Tensor)]
    options = (negatives, order, True, True, reduction, torch.float32, needs_grad, backend)
    return oracle.lowered(Arguments(online, target, temperature, 1.0, 2.0, *options))


@each_target
@pytest.mark.parametrize("negatives", [None, 3])
@pytest.mark.parametrize(("of_target", "reduction"), [(False, "none"), (True, "none"), (False, "mean"), (True, "sum")])
def test_opcheck(device, backend, negatives, of_target, reduction):
    online, target = views(6, 8, device=device).values()
    online.requires_grad_()
    target.requires_grad_(of_target)
    temperature = torch.tensor(0.3, device=device, requires_grad=True) if negatives else 0.3
    options = {"negatives": negatives, "temperature": temperature, "of_target": of_target, "reduction": reduction}
    arguments = lowered(online, target, backend, **options)
    torch.library.opcheck(torch.ops.sslops.relic.default, arguments)
    with torch.no_grad():
        found, stats, *_ = torch.ops.sslops.relic(*arguments)
        detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
        torch.library.opcheck(torch.ops.sslops.relic_backward.default, (found, *detached, stats))


@pytest.mark.parametrize(("device", "backend"), [*TARGETS, ("cpu", "eager")])
def test_a_temperature_of_one_element(device, backend):
    """As fully_shard wants its parameters"""
    inputs = views(6, 8, device=device)
    plain, shaped = (torch.full(shape, 0.3, device=device, requires_grad=True) for shape in ((), (1,)))
    found = [losses(**inputs, temperature=x, backend=backend) for x in (plain, shaped)]
    assert torch.equal(*found)
    sum(found).sum().backward()
    assert shaped.grad.shape == (1,)
    assert torch.equal(shaped.grad[0], plain.grad)


@each_target
@pytest.mark.parametrize("return_metrics", [False, True])
def test_compile(device, backend, return_metrics):
    def step(online, target):
        arguments = {"temperature": 0.2, **WEIGHTS, "return_metrics": return_metrics, "backend": backend}
        found = sslops.relic(online * 2, target + 1, **arguments)
        return found[0] + found[1].top1 if return_metrics else found

    oracle.assert_compiles(step, *views(64, 16, device=device).values())


@each_target
def test_compile_with_drawn_negatives(device, backend):
    """fullgraph with the default generator: the loss of some draw."""

    def step(online, target):
        return sslops.relic(online, target, temperature=0.2, **WEIGHTS, num_negatives=3, backend=backend)

    inputs = views(64, 16, device=device).values()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    draws = torch.stack([compiled(*inputs) for _ in range(8)])
    expected = torch.stack([step(*inputs) for _ in range(8)])
    assert len(draws.unique()) > 1
    assert (draws.mean() - expected.mean()).abs() < 4 * (draws.std() + expected.std())


@each_target
def test_second_derivative(device, backend):
    online, target = (x.requires_grad_() for x in views(6, 8, device=device).values())
    (gradient,) = torch.autograd.grad(mean_loss(online, target, backend=backend), online, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='eager'"):
        gradient.sum().backward()


@pytest.mark.parametrize("negatives", [None, 4000])
def test_memory_is_linear(negatives):
    """Forward and backward in a process of their own grow by a few B x D, where B x B takes 1 GB."""
    options = f"temperature=0.1, alpha=1.0, beta=1.0, num_negatives={negatives}"
    grown = oracle.grown_memory(
        "o, t = (torch.randn(16384, 64, requires_grad=True) for _ in range(2)); "
        "sslops.relic(o[:600], t[:600], temperature=0.1, alpha=1.0, beta=1.0).backward()",
        f"sslops.relic(o, t, {options}).backward()",
    )
    assert grown < 96, f"{grown:.0f} MB"


class TestNegatives:
    @pytest.mark.parametrize("backend", ["cpu", "eager"])
    @pytest.mark.parametrize("rows", [1, 2, 3, 10, 11])
    def test_a_last_batch_of_fewer_rows(self, backend, rows):
        """All that there are"""
        inputs = views(rows, 8)
        found = losses(**inputs, num_negatives=10, backend=backend)
        assert torch.equal(found, losses(**inputs, backend=backend))

    def test_all_backends_draw_the_same(self):
        """... and advance the generator alike."""
        inputs = views(40, 8)
        states = []
        for backend in ["eager", *(backend for device, backend in TARGETS if device == "cpu")]:
            generator = torch.Generator().manual_seed(3)
            drawn = [losses(**inputs, num_negatives=5, generator=generator, backend=backend) for _ in range(2)]
            assert not torch.equal(*drawn)
            states.append((*drawn, generator.get_state()))
        for one, other in zip(states[0], states[-1], strict=True):
            torch.testing.assert_close(one, other)

    def test_nothing_is_drawn_for_all(self):
        generator = torch.Generator().manual_seed(3)
        state = generator.get_state()
        expected = losses(**views(40, 8))
        assert torch.equal(losses(**views(40, 8), num_negatives=39, generator=generator), expected)
        assert torch.equal(generator.get_state(), state)

    def test_each_subset_is_as_likely_as_any_other(self):
        """Of 4 other rows 2 are drawn: the loss of row 0 tells which."""
        online, target = views(5, 4).values()
        generator = torch.Generator().manual_seed(0)
        found = [
            float(sslops.relic(online, target, temperature=0.5, alpha=1.0, beta=0.0, num_negatives=2,
                               generator=generator, reduction="none", backend="eager")[0])
            for _ in range(1200)
        ]  # fmt: skip
        counts = torch.tensor(found).mul(1e4).round().unique(return_counts=True)[1].double()
        assert len(counts) == 6
        assert float((counts - 200).square().sum() / 200) < 20.5  # chi-squared, 5 degrees of freedom: p = 0.001


@pytest.mark.parametrize(("device", "backend"), [*TARGETS, ("cpu", "eager")])
@pytest.mark.parametrize("negatives", [None, 30])
def test_metrics(device, backend, negatives):
    online, target = views(300, 16, device=device, noise=2.0).values()
    arguments = {"num_negatives": negatives, "backend": backend, "reduction": "mean"}
    loss, found = losses(online.requires_grad_(), target, return_metrics=True, **arguments)
    torch.testing.assert_close(loss, losses(online, target, **arguments))
    o, t = (F.normalize(x.detach().double()) for x in (online, target))
    similarities = o @ t.t()
    if negatives:
        order = torch.randperm(len(o), generator=torch.Generator(device).manual_seed(5), device=device)
        at = order.argsort()
        left_out = (at - at[:, None]) % len(o) > negatives
        similarities.masked_fill_(left_out, -torch.inf)
    positive = (o * t).sum(1)
    oracle.assert_metrics(found, positive, similarities.fill_diagonal_(-torch.inf), online.dtype)


class TestMultiCrop:
    def crops(self, large=2, small=3, n=40, d=8):
        g = torch.Generator().manual_seed(0)
        image = torch.randn(n, d, generator=g)
        return [[image + torch.randn(n, d, generator=g) for _ in range(k)] for k in (large, small, large)]

    @pytest.mark.parametrize("backend", ["cpu", "eager"])
    @pytest.mark.parametrize("small", [3, 0])
    @pytest.mark.parametrize("negatives", [None, 5])
    def test_sum_and_scale(self, backend, small, negatives):
        large_crops, small_crops, targets = self.crops(small=small)
        generator = torch.Generator().manual_seed(5)
        arguments = {"temperature": 0.2, **WEIGHTS, "num_negatives": negatives, "backend": backend}
        expected = sum(
            sslops.relic(o, t, generator=generator, **arguments) for o in large_crops + small_crops for t in targets
        ) / ((2 + small) * 2)
        generator.manual_seed(5)
        ours, logged = sslops.relic_multicrop(
            large_crops, small_crops, targets, generator=generator, return_metrics=True, **arguments
        )
        torch.testing.assert_close(ours, expected)
        assert 0 <= logged.top1 <= logged.top5 <= 1
        stacked = [
            torch.stack(each) if each else torch.empty(0, 40, 16) for each in (large_crops, small_crops, targets)
        ]
        generator.manual_seed(5)
        assert torch.equal(sslops.relic_multicrop(*stacked, generator=generator, **arguments), ours)

    @each_target
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("n", "negatives"), [(300, None), (300, 20)])
    def test_accuracy(self, device, backend, dtype, n, negatives):
        def op(*crops, **kwargs):
            *crops, temperature = crops
            generator = torch.Generator(device).manual_seed(5)
            options = {"temperature": temperature, "num_negatives": negatives, "generator": generator}
            return sslops.relic_multicrop(crops[:2], crops[2:5], crops[5:], **options, **WEIGHTS, **kwargs)

        crops = {f"crop {k}": x.to(device, dtype) for k, x in enumerate(x for each in self.crops(n=n) for x in each)}
        oracle.check(op, crops | {"temperature": torch.tensor(0.1, device=device)}, backend)

    @each_target
    @pytest.mark.parametrize("negatives", [None, 3])
    @pytest.mark.parametrize("reduction", ["none", "mean"])
    def test_opcheck(self, device, backend, negatives, reduction):
        crops = torch.randn(5, 6, 8, device=device, requires_grad=True)
        arguments = lowered(crops[:3], crops[3:], backend, negatives=negatives, reduction=reduction)
        torch.library.opcheck(torch.ops.sslops.relic.default, arguments)
        with torch.no_grad():
            found, stats, *_ = torch.ops.sslops.relic(*arguments)
            detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
            torch.library.opcheck(torch.ops.sslops.relic_backward.default, (found, *detached, stats))

    @each_target
    def test_bad_input_to_the_registered_op(self, device, backend):
        crops = torch.randn(5, 6, 8, device=device)

        def refused(argument, online, target, negatives=None, pairs=6):
            arguments = lowered(online, target, backend, negatives=negatives)
            order = [k for k, x in enumerate(arguments) if isinstance(x, torch.Tensor) and not x.is_floating_point()]
            for k in order:
                arguments[k] = arguments[k][:pairs]
            oracle.assert_refused(ValueError, "relic", argument, lambda: torch.ops.sslops.relic(*arguments))

        refused("online", crops[:0], crops[3:])
        refused("target", crops[:3], crops[3:, :5])
        refused("target", crops[:3], crops[:0])
        refused("target", crops[:3], crops[0])
        refused("order", crops[:3], crops[3:], negatives=3, pairs=5)

    def test_bad_input(self):
        large, small, targets = self.crops()

        def refused(error, argument, *crops, **kwargs):
            arguments = {"temperature": 0.2, **WEIGHTS, **kwargs}
            oracle.assert_refused(
                error, "relic_multicrop", argument, lambda: sslops.relic_multicrop(*crops, **arguments)
            )

        refused(ValueError, "online_small[1]", large, [small[0], small[1][:-1]], targets)
        refused(ValueError, "target_large[1]", large, small, [targets[0], targets[1].double()])
        refused(ValueError, "target_large", large, small, targets[:1])
        refused(ValueError, "online_large", [], small, [])
        refused(TypeError, "online_large", large[0], small, targets)
        refused(TypeError, "online_small", large, None, targets)
        refused(TypeError, "target_large[0]", large, small, [None, None])
        refused(ValueError, "num_negatives", large, small, targets, num_negatives=0)
        refused(ValueError, "temperature", large, small, targets, temperature=0.0)
        refused(ValueError, "alpha", large, small, targets, alpha=-1.0)
        refused(ValueError, "backend", large, small, targets, backend="tpu")


def test_bad_input():
    online, target = views(4, 8).values()

    def refused(error, argument, *args, **kwargs):
        arguments = {"temperature": 0.2, **WEIGHTS, **kwargs}
        oracle.assert_refused(error, "relic", argument, lambda: sslops.relic(*args, **arguments))

    refused(ValueError, "target", online, target[:3])
    refused(ValueError, "target", online, target.double())
    refused(ValueError, "target", online, target.to("meta"))
    refused(ValueError, "online", online[0], target[0])
    refused(ValueError, "online", online[None], target[None])
    refused(ValueError, "target", online, target[None])
    refused(TypeError, "target", online, target.tolist())
    refused(TypeError, "alpha", online, target, alpha="1")
    refused(TypeError, "online", online.int(), target.int())
    refused(TypeError, "online", online.tolist(), target)
    for temperature in (0, -1.0, float("nan"), float("inf")):
        refused(ValueError, "temperature", online, target, temperature=temperature)
    refused(ValueError, "temperature", online, target, temperature=torch.ones(2))
    for name in ("alpha", "beta"):
        for value in (-1.0, float("nan"), float("inf")):
            refused(ValueError, name, online, target, **{name: value})
        refused(TypeError, name, online, target, **{name: "1"})
    for negatives in (0, -1):
        refused(ValueError, "num_negatives", online, target, num_negatives=negatives)
    for negatives in (2.0, True, "all"):
        refused(TypeError, "num_negatives", online, target, num_negatives=negatives)
    refused(TypeError, "generator", online, target, num_negatives=2, generator=0)
    refused(ValueError, "reduction", online, target, reduction="median")
    refused(TypeError, "normalize", online, target, normalize="no")
    refused(TypeError, "return_metrics", online, target, return_metrics=1)
    refused(ValueError, "backend", online, target, backend="tpu")


def test_bad_input_to_the_registered_op():
    """torch.ops.sslops can be called by anyone: nothing that reaches a pointer goes unchecked."""
    online, target = views(4, 8).values()
    good = lowered(online, target, "cpu", negatives=2)
    _, stats, *_ = torch.ops.sslops.relic(*good)

    def refused(error, k, value):
        with pytest.raises(error, match=r"^relic: "):
            torch.ops.sslops.relic(*good[:k], value, *good[k + 1 :])

    names = [*Arguments._fields[:2], "temperature", "temperature_value", *Arguments._fields[3:]]
    refused(ValueError, names.index("target"), target[:3])
    refused(ValueError, names.index("target"), target.double())
    refused(ValueError, names.index("temperature"), torch.ones(2))
    refused(ValueError, names.index("num_negatives"), 4)
    refused(ValueError, names.index("order"), torch.arange(3))
    refused(TypeError, names.index("order"), torch.arange(4.0))
    refused(ValueError, names.index("backend"), "tpu")
    refused(ValueError, names.index("order"), torch.arange(4) + 1)
    for k, name in enumerate(("grad", "stats")):
        tensors = [torch.ones(4), stats]
        tensors[k] = torch.ones(4, 4)
        with pytest.raises(ValueError, match=f"relic: {name}"):
            torch.ops.sslops.relic_backward(tensors[0], *good, *tensors[1:])


def test_odd_temperatures_on_a_tensor():
    for value in (-0.5, 0.0, float("nan")):
        assert losses(**views(10, 8), temperature=torch.tensor(value), backend="cpu").isnan().all()


class TestTheOracleItself:
    """Broken kernels must not pass."""

    def refuse(self, **kwargs):
        with pytest.raises(AssertionError, match="above"):
            oracle.check(losses, views(300, 32), "cpu", **kwargs)

    def plant(self, monkeypatch, direction, fault):
        """fault(run, *arguments) in place of a direction of the kernel"""
        run = getattr(kernel, direction)
        monkeypatch.setattr(kernel, direction, lambda *arguments: fault(run, *arguments))

    def test_a_lost_tile(self, monkeypatch):
        def fault(run, x):
            losses, stats, *of_sum = run(x)
            o, t = F.normalize(x.online), F.normalize(x.target)
            tile = ((o[:64] @ t[128:192].t() - 1) / x.temperature).exp().sum(1)  # of the sums 1 / stats[1]
            losses[:64] += x.alpha * torch.log1p(-tile * stats[1, :64])
            return losses, stats, *of_sum

        self.plant(monkeypatch, "forward", fault)
        self.refuse()

    def test_a_forgotten_mirror_image(self, monkeypatch):
        def fault(run, grad, *rest):
            return run(grad.clone().index_fill_(0, torch.arange(64), 0), *rest)

        self.plant(monkeypatch, "backward", fault)
        self.refuse()

    @pytest.mark.parametrize("direction", ["forward", "backward"])
    def test_a_band_that_ends_too_early(self, monkeypatch, direction):
        def fault(run, *arguments):
            return run(*(x._replace(num_negatives=99) if isinstance(x, Arguments) else x for x in arguments))

        self.plant(monkeypatch, direction, fault)
        self.refuse(num_negatives=100)

    def test_a_sloppy_temperature(self, monkeypatch):
        """About 10 roundings of float32 too far: as an exp of too few terms would be."""
        self.plant(monkeypatch, "forward", lambda run, x: run(x._replace(temperature=x.temperature * (1 + 1e-5))))
        self.refuse()

    def test_the_gradients_of_a_sum_for_a_mean(self, monkeypatch):
        run = kernel.forward
        monkeypatch.setattr(kernel, "forward", lambda x, factor=0.0: run(x, factor=factor and 1.0))
        with pytest.raises(AssertionError, match="above"):
            oracle.check(mean_loss, views(300, 32), "cpu")

    def test_unwritten_memory(self, monkeypatch):
        monkeypatch.setattr(_C, "relic_backward", lambda *args: None)
        with oracle.poisoned_memory():
            self.refuse()
