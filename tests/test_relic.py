import math

import oracle
import pytest
import torch
import torch.nn.functional as F

import sslops

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
