import pytest
import torch
import torch.nn.functional as F

import sslops
from sslops import _C
from sslops.__main__ import main
from sslops.kernels.cpu import nt_xent as kernel
from sslops.ops.nt_xent import Arguments

from . import oracle

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF)
TARGETS = oracle.targets("nt_xent")
each_target = pytest.mark.parametrize(("device", "backend"), TARGETS)


def views(n: int, d: int, *, dtype=torch.float32, device="cpu", noise: float = 1.0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(n * 1000 + d)
    z0 = torch.randn(n, d, generator=g)
    z1 = z0 + noise * torch.randn(n, d, generator=g)
    return {"z0": z0.to(device, dtype), "z1": z1.to(device, dtype)}


def losses(z0, z1=None, **kwargs):
    return sslops.nt_xent(z0, z1, reduction="none", **kwargs)


def lowered(z0, z1, backend, temperature=0.5, count_exceeding=False, reduction="none"):
    """The arguments of a direct call of the registered op"""
    options = True, False, count_exceeding, "", reduction, torch.float32, backend
    needs_grad = [True, True, isinstance(temperature, torch.Tensor)]
    return oracle.lowered(Arguments(z0, z1, None, None, temperature, *options, needs_grad))


def losses_of_tensor_temperature(z0, z1, temperature, **kwargs):
    return sslops.nt_xent(z0, z1, temperature=temperature, reduction="none", **kwargs)


@each_target
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "d", "temperature"),
    [(2, 3, 0.5), (5, 33, 1.0), (5, 33, 0.1)]  # too few rows for eager's error to be typical at a lower temperature
    + [(n, d, t) for n, d in [(67, 33), (256, 128), (301, 96), (777, 40)] for t in (1.0, 0.1, 0.02, 0.005)],
)
def test_accuracy(device, backend, dtype, n, d, temperature):
    inputs = views(n, d, dtype=dtype, device=device, noise=4.0)  # hard positives: float64 still knows 1 - p
    with oracle.poisoned_memory():
        oracle.check(losses, inputs, backend, temperature=temperature)


@each_target
def test_one_dimension(device, backend):
    """Rows are +1 or -1 and the normalisation leaves no gradient, only terms of size 1 / tau that cancel."""
    inputs = views(30, 1, device=device)
    scale = {name: float((2 / 0.1 / x).square().mean().sqrt()) for name, x in inputs.items()}
    oracle.check(losses, inputs, backend, scale=scale, temperature=0.1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.2, 0.01])
def test_every_instruction_set(isa, dtype, temperature):
    with oracle.poisoned_memory():
        oracle.check(losses, views(350, 72, dtype=dtype, noise=4.0), "cpu", temperature=temperature)


@each_target
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.5, 0.05])
def test_aligned_pairs(device, backend, dtype, temperature):
    """Easy positives: the loss and the pull of the positive are small differences of large numbers."""
    inputs = views(600, 128, dtype=dtype, device=device, noise=1e-2)
    if temperature == 0.05 and dtype == torch.float32:
        assert losses(**inputs, temperature=temperature, backend=backend).max() < 1e-3
    oracle.check(losses, inputs, backend, temperature=temperature)


@each_target
@pytest.mark.parametrize("dtype", DTYPES)
def test_collapsed(device, backend, dtype):
    """All embeddings equal: the gradient is zero, a sum of terms of size 2 / tau per row that cancel."""
    row = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    inputs = {"z0": row.repeat(300, 1), "z1": row.repeat(300, 1)}
    size = 2 / 0.1 / float(row.float().norm()) / 64**0.5
    oracle.check(losses, inputs, backend, temperature=0.1, scale={"z0": size, "z1": size})


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
@pytest.mark.parametrize("logit", [10, 100, 1000])
def test_long_rows(device, backend, logit):
    """Two rows of many columns: the gradient's rounding does not grow with the logits."""
    g = torch.Generator().manual_seed(0)
    size = (logit / 513**0.5) ** 0.5
    inputs = {name: (size * torch.randn(2, 513, generator=g)).to(device) for name in ("z0", "z1")}
    oracle.check(losses, inputs, backend, temperature=1.0, normalize=False)


@each_target
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.5, 0.03])
@pytest.mark.parametrize("normalize", [True, False])
def test_temperature_gradient(device, backend, dtype, temperature, normalize):
    inputs = {name: x * 0.3 for name, x in views(200, 48, dtype=dtype, device=device).items()}
    inputs["temperature"] = torch.tensor(temperature, device=device)
    oracle.check(losses_of_tensor_temperature, inputs, backend, dtype=dtype, normalize=normalize)


@each_target
@pytest.mark.parametrize("dtype", HALF)
def test_autocast(device, backend, dtype):
    def autocast():
        return torch.autocast(device, dtype)

    oracle.check(losses, views(300, 64, device=device), backend, dtype=dtype, temperature=0.1, context=autocast)
    with autocast():
        assert losses(**views(4, 8, device=device), backend=backend).dtype == torch.float32


def test_autocast_changes_the_operands():
    inputs = views(300, 64)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = losses(**inputs)
    assert not torch.equal(rounded, losses(**inputs))


@pytest.mark.skipif(_C.isa() != "amx", reason="needs AMX")
def test_bf16_logits_stay_float32():
    """On AMX the logits are never rounded to bf16: the loss is that of the rounded embeddings, exactly."""
    inputs = views(400, 64, dtype=torch.bfloat16)
    rounded = {name: F.normalize(x.float()).bfloat16() for name, x in inputs.items()}
    exact = losses(**{name: x.double() for name, x in rounded.items()}, temperature=0.05, normalize=False)
    ours = losses(**inputs, temperature=0.05)
    assert max(oracle.errors(ours, exact)) < 2e-6


@each_target
@pytest.mark.parametrize("temperature", [0.048, 0.046, 0.03, 0.02])
def test_one_row_opposite_all_others(device, backend, temperature):
    """The smallest exponentials that there are, on both sides of the temperature where the maximum is no longer fixed;
    the loss as GradScaler scales it."""
    row = torch.randn(16, generator=torch.Generator().manual_seed(0))
    noise = 1e-2 * torch.randn(2, 20, 16, generator=torch.Generator().manual_seed(1))
    z0, z1 = noise - row
    z0[0] += 2 * row
    inputs = {"z0": z0.to(device), "z1": z1.to(device)}
    oracle.check(lambda *z, **kwargs: 65536 * losses(*z, **kwargs), inputs, backend, temperature=temperature)


@each_target
@pytest.mark.parametrize("temperature", [1e10, 1e30])
def test_high_temperatures(device, backend, temperature):
    oracle.check(losses, views(30, 8, device=device), backend, temperature=temperature)


@each_target
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_under_another_default_dtype(device, backend, dtype):
    inputs = list(views(80, 16, device=device).values())
    expected = oracle.evaluate(losses, inputs, backend)
    torch.set_default_dtype(dtype)
    try:
        assert all(map(torch.equal, expected, oracle.evaluate(losses, inputs, backend)))
    finally:
        torch.set_default_dtype(torch.float32)


@each_target
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions(device, backend, reduction):
    def op(z0, z1, **kwargs):
        return sslops.nt_xent(z0, z1, reduction=reduction, **kwargs)

    oracle.check(op, views(150, 32, device=device), backend)


def test_against_the_formula():
    """The reference itself, against Eq. 1 of the paper written as loops."""
    inputs = {name: x.double() for name, x in views(4, 3).items()}
    z = F.normalize(torch.cat(list(inputs.values())))
    expected = torch.zeros(8, dtype=torch.float64)
    for i in range(8):
        terms = [torch.exp(z[i] @ z[k] / 0.3) for k in range(8) if k != i]
        expected[i] = -torch.log(torch.exp(z[i] @ z[(i + 4) % 8] / 0.3) / sum(terms))
    torch.testing.assert_close(losses(**inputs, temperature=0.3), expected)


def test_gradients_of_the_reference():
    inputs = [x.double().requires_grad_() for x in views(3, 4).values()]
    temperature = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(losses_of_tensor_temperature, (*inputs, temperature))
    assert torch.autograd.gradgradcheck(losses_of_tensor_temperature, (*inputs, temperature))


@each_target
@pytest.mark.parametrize("backend_of_case", ["eager", "fused"])
def test_empty_and_single(device, backend, backend_of_case):
    backend = "eager" if backend_of_case == "eager" else backend
    empty = torch.zeros(0, 8, device=device, requires_grad=True)
    assert sslops.nt_xent(empty, empty, backend=backend).isnan()
    assert sslops.nt_xent(empty, empty, reduction="sum", backend=backend) == 0
    assert losses(empty, empty, backend=backend).shape == (0,)
    (gradient,) = torch.autograd.grad(sslops.nt_xent(empty, empty, reduction="sum", backend=backend), empty)
    assert gradient.shape == (0, 8)
    loss, *gradients = oracle.evaluate(losses, list(views(1, 8, device=device).values()), backend)
    assert loss.tolist() == [0.0, 0.0]  # the positive is the only candidate
    assert not any(g.any() for g in gradients)


@each_target
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("columns", [slice(2, 3), slice(None)], ids=["element", "row"])
def test_non_finite_rows_as_eager(device, backend, bad, normalize, columns):
    inputs = views(40, 8, device=device)
    inputs["z1"][3, columns] = bad
    ours, eager = (oracle.evaluate(losses, list(inputs.values()), b, normalize=normalize) for b in (backend, "eager"))
    for x, y in zip(ours, eager, strict=True):
        assert torch.equal(x.isnan(), y.isnan())
        assert torch.equal(x.isinf(), y.isinf())


@each_target
def test_zero_rows(device, backend):
    inputs = views(40, 8, device=device)
    inputs["z0"][5] = 0
    oracle.check(losses, inputs, backend)


@each_target
def test_overflowing_logits_as_eager(device, backend):
    inputs = [x * 1e20 for x in views(20, 8, device=device).values()]
    ours, eager = (losses(*inputs, normalize=False, backend=b) for b in (backend, "eager"))
    assert torch.equal(ours.isfinite(), eager.isfinite())


@each_target
def test_non_contiguous(device, backend):
    inputs = views(96, 40, device=device)
    strided = {name: x.repeat(2, 2)[::2, 1:41] for name, x in inputs.items()}
    strided["z1"] = inputs["z1"].t().contiguous().t()
    oracle.check(losses, strided, backend)


@each_target
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_every_run(device, backend, dtype):
    inputs = list(views(700, 64, dtype=dtype, device=device).values())
    first = oracle.evaluate(losses, inputs, backend)
    for _ in range(3):
        assert all(map(torch.equal, first, oracle.evaluate(losses, inputs, backend)))


@each_target
def test_gradient_of_one_view(device, backend):
    z0, z1 = views(50, 16, device=device).values()
    z0.requires_grad_()
    sslops.nt_xent(z0, z1, backend=backend).backward()
    expected, *_ = oracle.evaluate(sslops.nt_xent, [z0, z1], backend)[1:]
    cotangent = torch.rand((), generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    torch.testing.assert_close(z0.grad * cotangent.to(z0.grad), expected)
    assert z1.grad is None


@each_target
@pytest.mark.parametrize("temperature", [0.2, 0.01])
@pytest.mark.parametrize("dtype", DTYPES)
def test_metrics(device, backend, temperature, dtype):
    z0, z1 = views(601, 32, dtype=dtype, device=device, noise=2.0).values()
    loss, found = sslops.nt_xent(z0.requires_grad_(), z1, temperature=temperature, return_metrics=True, backend=backend)
    assert torch.equal(loss, sslops.nt_xent(z0, z1, temperature=temperature, backend=backend))
    assert loss.requires_grad
    z = F.normalize(torch.cat([z0, z1]).detach().double())
    similarity = (z @ z.t()).fill_diagonal_(-2)
    positive = similarity[torch.arange(1202), torch.arange(1202).roll(601)]
    oracle.assert_metrics(found, positive, similarity, dtype)


@each_target
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("with_temperature", [False, True])
def test_opcheck(device, backend, with_temperature, reduction):
    z0, z1 = (x.requires_grad_() for x in views(6, 8, device=device).values())
    temperature = torch.tensor(0.3, device=device, requires_grad=True) if with_temperature else 0.3
    arguments = lowered(z0, z1, backend, temperature, with_temperature, reduction)
    torch.library.opcheck(torch.ops.sslops.nt_xent.default, arguments)
    with torch.no_grad():
        losses, *saved = torch.ops.sslops.nt_xent(*arguments)[:5]
        detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
        torch.library.opcheck(torch.ops.sslops.nt_xent_backward.default, (losses, *detached, *saved))


@each_target
def test_a_temperature_of_one_element(device, backend):
    """As fully_shard wants its parameters"""
    z0, z1 = views(6, 8, device=device).values()
    plain, shaped = (torch.full(shape, 0.3, device=device, requires_grad=True) for shape in ((), (1,)))
    found = [sslops.nt_xent(z0, z1, temperature=x, backend=backend) for x in (plain, shaped)]
    assert torch.equal(*found)
    sum(found).backward()
    assert shaped.grad.shape == (1,)
    assert torch.equal(shaped.grad[0], plain.grad)


@each_target
def test_compile(device, backend):
    def step(z0, z1):
        return sslops.nt_xent(z0 * 2, z1 + 1, temperature=0.2, backend=backend)

    oracle.assert_compiles(step, *views(64, 16, device=device).values())


@each_target
def test_compile_with_inductor_and_tensor_temperature(device, backend):
    def step(z0, z1):
        return sslops.nt_xent(z0, z1, temperature=(z0.detach().mean() * 0 + 0.2), backend=backend)

    oracle.assert_compiles(step, *views(16, 8, device=device).values(), backend="inductor")


def test_export():
    class Head(torch.nn.Module):
        def forward(self, z0, z1):
            return sslops.nt_xent(z0, z1)

    inputs = tuple(views(8, 4).values())
    exported = torch.export.export(Head(), inputs)
    torch.testing.assert_close(exported.module()(*inputs), sslops.nt_xent(*inputs))


@each_target
def test_forward_mode(device, backend):
    inputs = tuple(views(6, 8, device=device).values())
    with pytest.raises(RuntimeError, match="backend='eager'"):
        torch.func.jvp(lambda *z: sslops.nt_xent(*z, backend=backend), inputs, inputs)
    torch.func.jvp(lambda *z: sslops.nt_xent(*z, backend="eager"), inputs, inputs)


@each_target
def test_second_derivative(device, backend):
    z0, z1 = (x.requires_grad_() for x in views(6, 8, device=device).values())
    (gradient,) = torch.autograd.grad(sslops.nt_xent(z0, z1, backend=backend), z0, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='eager'"):
        gradient.sum().backward()


def test_memory_is_linear():
    """M = 16384, D = 64: forward and backward in a process of their own grow by a few M x D, where M x M takes 1 GB."""
    grown = oracle.grown_memory(
        "z0, z1 = (torch.randn(8192, 64, requires_grad=True) for _ in range(2)); "
        "sslops.nt_xent(z0[:600], z1[:600]).backward()",
        "sslops.nt_xent(z0, z1).backward()",
    )
    assert grown < 64, f"{grown:.0f} MB"


def crops(v: int, n: int, d: int, *, dtype=torch.float32, device="cpu", noise: float = 1.0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(v * 10000 + n * 100 + d)
    z = torch.randn(n, d, generator=g) + noise * torch.randn(v, n, d, generator=g)
    return {"z0": z.to(device, dtype)}


def losses_of_ids(z0, z1=None, **kwargs):
    """Of 40 ids, and some rows that have none"""
    n = z0.shape[-2]
    ids = torch.arange(n, device=z0.device) % 40
    return losses(z0, z1, query_ids=ids.where(ids > 3, -1), **kwargs)


def test_many_views_against_the_formula():
    """The reference itself, each pair of views as a loop, with ids and without"""
    (z,) = crops(3, 4, 5, dtype=torch.float64).values()
    unit = F.normalize(z, dim=2)
    for ids in (None, torch.tensor([7, -1, 7, -1])):
        expected = torch.zeros(3, 4, dtype=torch.float64)
        for v in range(3):
            for i in range(4):
                others = [j for j in range(4) if j != i and (ids is None or {i, j} != {0, 2})]
                negatives = [torch.exp(unit[v, i] @ unit[w, j] / 0.3) for w in range(3) for j in others]
                for w in {0, 1, 2} - {v}:
                    positive = torch.exp(unit[v, i] @ unit[w, i] / 0.3)
                    expected[v, i] -= torch.log(positive / (positive + sum(negatives))) / 2
        torch.testing.assert_close(losses(z, temperature=0.3, query_ids=ids), expected)
    assert torch.autograd.gradcheck(lambda x, t: losses_of_tensor_temperature(x, None, t), (z.requires_grad_(), _tau()))


def _tau():
    return torch.tensor(0.4, dtype=torch.float64, requires_grad=True)


@each_target
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", [losses, losses_of_ids])
@pytest.mark.parametrize(("v", "n", "d"), [(3, 90, 33), (5, 67, 16), (2, 301, 24)])
def test_many_views(device, backend, dtype, op, v, n, d):
    for temperature in (1.0, 0.1, 0.02, 0.005):
        with oracle.poisoned_memory():
            oracle.check(op, crops(v, n, d, dtype=dtype, device=device, noise=4.0), backend, temperature=temperature)


@each_target
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 5, 33), (3, 90, 33), (2, 301, 96), (2, 640, 24), (2, 1500, 16)])
def test_the_mean(device, backend, dtype, shape):
    """On a CPU forward makes its gradients, from tiles that it holds or finds again"""
    z = crops(*shape, dtype=dtype, device=device, noise=4.0)
    two = dict(zip(("z0", "z1"), z["z0"], strict=True)) if len(z["z0"]) == 2 else z
    for temperature in (1.0, 0.02):
        for inputs in (z, two):
            with oracle.poisoned_memory():
                oracle.check(sslops.nt_xent, inputs, backend, temperature=temperature)


def test_an_exported_graph_makes_no_gradients():
    """With a learned temperature: it is for inference"""

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.temperature = torch.nn.Parameter(torch.tensor(0.3))

        def forward(self, z0, z1):
            return sslops.nt_xent(z0, z1, temperature=self.temperature, backend="cpu")

    graph = torch.export.export(Module(), tuple(views(6, 8).values())).graph
    (call,) = (node for node in graph.nodes if "sslops" in str(node.target))
    assert "none" in call.args


@pytest.mark.parametrize("wanted", ["z0", "z1", "temperature"])
def test_the_mean_twice_and_in_part(wanted):
    """The second time the gradient is found anew; each is the same alone"""
    inputs = views(90, 16) | {"temperature": torch.tensor(0.2)}
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    loss = sslops.nt_xent(**leaves, backend="cpu")
    together = torch.autograd.grad(loss, list(leaves.values()), torch.tensor(0.3), retain_graph=True)
    again = torch.autograd.grad(loss, list(leaves.values()), torch.tensor(0.3))
    alone = sslops.nt_xent(**inputs | {wanted: leaves[wanted]}, backend="cpu")
    (only,) = torch.autograd.grad(alone, leaves[wanted], torch.tensor(0.3))
    for first, second in zip(together, again, strict=True):
        assert torch.equal(first, second)
    assert torch.equal(only, together[list(inputs).index(wanted)])


@each_target
@pytest.mark.parametrize("dtype", DTYPES)
def test_ids_of_two_views(device, backend, dtype):
    oracle.check(losses_of_ids, views(150, 24, dtype=dtype, device=device), backend, temperature=0.1)


@each_target
def test_two_views_in_one_tensor(device, backend):
    z0, z1 = (x.requires_grad_() for x in views(70, 16, device=device).values())
    z = torch.stack([z0, z1]).detach().requires_grad_()
    expected, found = losses(z0, z1, backend=backend), losses(z, backend=backend)
    assert torch.equal(found.flatten(), expected)
    (expected * expected).sum().backward()
    (found * found).sum().backward()
    assert torch.equal(z.grad, torch.stack([z0.grad, z1.grad]))


@each_target
@pytest.mark.parametrize("temperature", [0.05, 0.005])
def test_an_easy_and_a_hard_positive(device, backend, temperature):
    """One positive's exponential is beyond float32 where the other's, and the negatives', still count."""
    (z,) = crops(3, 60, 16, device=device, noise=1e-3).values()
    z[2] *= -1
    oracle.check(losses, {"z0": z}, backend, temperature=temperature)


@each_target
def test_temperature_gradient_of_many_views(device, backend):
    inputs = {**crops(3, 80, 24, device=device), "temperature": torch.tensor(0.2, device=device)}

    def op(z0, temperature, **kwargs):
        return losses(z0, temperature=temperature, **kwargs)

    oracle.check(op, inputs, backend)


@each_target
def test_ids_leave_out_what_they_name(device, backend):
    (z,) = crops(3, 10, 8, device=device).values()
    ids = torch.tensor([0, 1, 2, 3, 0, -1, -1, 1 << 32, 4, 0], device=device)
    found = losses(z, query_ids=ids, backend=backend)
    for i in range(10):
        kept = [j for j in range(10) if j == i or ids[j] != ids[i] or ids[j] < 0]
        torch.testing.assert_close(found[:, i], losses(z[:, kept], backend=backend)[:, kept.index(i)])
    small = ids.where(ids < 10, 9)
    assert torch.equal(losses(z, query_ids=small, backend=backend), found)
    assert torch.equal(losses(z, query_ids=small.int(), backend=backend), found)
    assert not losses(z, query_ids=torch.zeros_like(ids), temperature=0.02, backend=backend).any()
    assert torch.equal(losses(z, query_ids=torch.full_like(ids, -1), backend=backend), losses(z, backend=backend))


@each_target
@pytest.mark.parametrize("op", [losses, losses_of_ids])
def test_metrics_of_many_views(device, backend, op):
    (z,) = crops(3, 130, 24, device=device).values()
    _, found = op(z, return_metrics=True, backend=backend)
    unit = F.normalize(z.double(), dim=2).flatten(0, 1)
    similarity, example = unit @ unit.t(), torch.arange(390, device=device) % 130
    ids = (example % 40).where(example % 40 > 3, -1 - example) if op is losses_of_ids else example
    negatives = similarity.masked_fill((ids[:, None] == ids) | (example[:, None] == example), -2)
    rows = torch.arange(390, device=device)
    positive = torch.cat([similarity[rows, rows.roll(-130 * k)] for k in (1, 2)])
    oracle.assert_metrics(found, positive, negatives.repeat(2, 1), torch.float32)


def decoupled(z0, z1=None, **kwargs):
    """DCLW's weights where there are two views, others where there are more"""
    v, n = z0.shape[:2] if z1 is None else (2, len(z0))
    weights = torch.linspace(0.3, 1.9, v * n, device=z0.device, dtype=torch.float64).view(v, n).to(z0.dtype)
    if z1 is not None:
        weights[:] = 2 - n * ((F.normalize(z0.detach()) * F.normalize(z1.detach())).sum(1) / 0.5).softmax(0)
    return losses(z0, z1, decoupled=True, positive_weights=weights, **kwargs)


def test_decoupled_against_the_formula():
    (z,) = crops(3, 4, 5, dtype=torch.float64).values()
    unit, weights, ids = F.normalize(z, dim=2), torch.rand(3, 4), torch.tensor([3, 3, -1, 4])
    expected = torch.zeros(3, 4, dtype=torch.float64)
    for v in range(3):
        for i in range(4):
            others = [j for j in range(4) if j != i and {i, j} != {0, 1}]
            negatives = torch.stack([unit[v, i] @ unit[w, j] / 0.3 for w in range(3) for j in others])
            positives = [unit[v, i] @ unit[w, i] / 0.3 for w in {0, 1, 2} - {v}]
            expected[v, i] = negatives.logsumexp(0) - weights[v, i] * sum(positives) / 2
    found = losses(z, temperature=0.3, query_ids=ids, decoupled=True, positive_weights=weights)
    torch.testing.assert_close(found, expected)


@each_target
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("many", [False, True])
def test_decoupled(device, backend, dtype, many):
    inputs = crops(3, 67, 24, dtype=dtype, device=device) if many else views(301, 33, dtype=dtype, device=device)
    for temperature in (1.0, 0.1, 0.01):
        with oracle.poisoned_memory():
            oracle.check(decoupled, inputs, backend, temperature=temperature)
    oracle.check(lambda *z, **kwargs: losses(*z, decoupled=True, **kwargs), inputs, backend)


@each_target
@pytest.mark.parametrize("normalize", [True, False])
def test_temperature_gradient_when_decoupled(device, backend, normalize):
    inputs = {name: x * 0.3 for name, x in views(100, 24, device=device).items()}
    inputs["temperature"] = torch.tensor(0.1, device=device)

    def op(z0, z1, temperature, **kwargs):
        return decoupled(z0, z1, temperature=temperature, **kwargs)

    oracle.check(op, inputs, backend, normalize=normalize)


@each_target
def test_decoupled_without_negatives(device, backend):
    """-inf of one example, or of several with one id; the positives pull all the same"""
    for n, temperature in ((1, 0.5), (5, 0.5), (5, 0.01)):
        z0, z1 = (z.requires_grad_() for z in views(n, 8, device=device).values())
        tau = torch.tensor(temperature, device=device, requires_grad=True)
        options = {"decoupled": True, "query_ids": torch.zeros(n, dtype=torch.int32, device=device) if n > 1 else None}
        for tau_, leaves in ((temperature, (z0, z1)), (tau, (z0, z1, tau))):
            found = [losses(z0, z1, temperature=tau_, **options, backend=each) for each in (backend, "eager")]
            assert found[0].eq(-torch.inf).all()
            gradients = (torch.autograd.grad(each.sum(), leaves) for each in found)
            torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5 / temperature)


def test_bad_input():
    z0, z1 = views(4, 8).values()

    def refused(error, argument, *args, **kwargs):
        oracle.assert_refused(error, "nt_xent", argument, lambda: sslops.nt_xent(*args, **kwargs))

    refused(ValueError, "z1", z0, z1[:3])
    refused(ValueError, "z1", z0, z1[:, :3])
    refused(ValueError, "z1", z0, z1.double())
    refused(ValueError, "z1", z0, z1.to("meta"))
    refused(ValueError, "z0", z0[0], z1[0])
    refused(ValueError, "z0", z0[None], z1[None])
    refused(TypeError, "z0", z0.int(), z1.int())
    refused(TypeError, "z0", z0.tolist(), z1)
    for temperature in (0, 0.0, -1.0, float("nan"), float("inf"), -float("inf")):
        refused(ValueError, "temperature", z0, z1, temperature=temperature)
    refused(ValueError, "temperature", z0, z1, temperature=torch.ones(2))
    refused(ValueError, "temperature", z0, z1, temperature=torch.ones((), device="meta"))
    refused(TypeError, "temperature", z0, z1, temperature=torch.ones((), dtype=torch.int64))
    refused(TypeError, "temperature", z0, z1, temperature="warm")
    refused(TypeError, "temperature", z0, z1, temperature=None)
    refused(ValueError, "temperature", z0, z1, temperature=10**400)
    refused(ValueError, "reduction", z0, z1, reduction="median")
    refused(ValueError, "reduction", z0, z1, reduction=oracle.Array())
    refused(TypeError, "backend", z0, z1, backend=oracle.Array())
    refused(ValueError, "backend", z0, z1, backend="tpu")
    refused(ValueError, "backend", z0, z1, backend="")
    refused(TypeError, "backend", z0, z1, backend=["cpu"])
    refused(TypeError, "normalize", z0, z1, normalize="no")
    refused(TypeError, "return_metrics", z0, z1, return_metrics=1)
    refused(TypeError, "z0", z0.to_sparse(), z1.to_sparse())
    refused(ValueError, "z0", z0)
    refused(ValueError, "z0", z0[None])
    refused(ValueError, "z0", z0[None, None])
    refused(TypeError, "z0", [z0, z1])
    refused(ValueError, "query_ids", z0, z1, query_ids=torch.arange(3))
    refused(ValueError, "query_ids", torch.stack([z0, z1]), query_ids=torch.arange(2))
    refused(TypeError, "query_ids", z0, z1, query_ids=torch.ones(4))
    refused(TypeError, "query_ids", z0, z1, query_ids=[0, 1, 2, 3])
    refused(TypeError, "decoupled", z0, z1, decoupled=1)
    refused(ValueError, "positive_weights", z0, z1, positive_weights=torch.ones(2, 4))
    refused(ValueError, "positive_weights", z0, z1, decoupled=True, positive_weights=torch.ones(4))
    refused(ValueError, "positive_weights", z0, z1, decoupled=True, positive_weights=torch.ones(2, 3))


def test_bad_input_to_the_registered_op():
    """torch.ops.sslops can be called by anyone: nothing that reaches a pointer goes unchecked."""
    z0, z1 = views(4, 8).values()
    arguments = lowered(z0, z1, "cpu")
    _, logged, inv_norm, stats, views_of_all, *_ = torch.ops.sslops.nt_xent(*arguments)
    grad = torch.ones(8)
    for backend in ("eager", "tpu"):
        with pytest.raises(ValueError, match="nt_xent: backend"):
            torch.ops.sslops.nt_xent(*arguments[:-2], backend, arguments[-1])
    for backend, operand in (("triton", torch.float32), ("cpu", torch.float64)):
        with pytest.raises(RuntimeError, match="nt_xent: backend"):
            torch.ops.sslops.nt_xent(*arguments[:-3], operand, backend, arguments[-1])
    for bad in ((z0, z1[:3]), (z0, z1.double()), (z0[0], z1[0])):
        with pytest.raises(ValueError, match="nt_xent: z"):
            torch.ops.sslops.nt_xent(*bad, *arguments[2:])
    for bad in (
        (grad[:7], inv_norm, stats),
        (grad, inv_norm[:7], stats),
        (grad, inv_norm, stats[:2]),
        (grad.double(), inv_norm, stats),
    ):
        with pytest.raises(ValueError, match=r"nt_xent: (grad|inv_norm|stats)"):
            torch.ops.sslops.nt_xent_backward(bad[0], *arguments, logged, *bad[1:], views_of_all)


def test_macl_as_docs_have_it():
    """docs/methods/simclr.md, beside the formula of Huang et al., arXiv:2207.07874, row by row"""
    z0, z1 = views(6, 5, dtype=torch.float64).values()
    z = F.normalize(torch.cat([z0, z1])).requires_grad_()
    similarity = z @ z.t()
    tau = 0.1 * (1 + 0.5 * (torch.stack([similarity[i, (i + 6) % 12] for i in range(12)]).mean().detach() - 0.2))
    expected = []
    for i in range(12):
        p = (similarity[i, torch.arange(12) != i] / tau).softmax(0)[(i + 6) % 12 - (i < (i + 6) % 12)]
        expected.append(-p.log() / (1 - p + 1e-8).detach())
    expected = torch.stack(expected).mean()

    found = sslops.nt_xent(z[:6], z[6:], temperature=tau, reduction="none", normalize=False)
    found = (found / (1 - (-found).exp() + 1e-8).detach()).mean()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, z)[0] for loss in (found, expected)))


def test_odd_temperatures_on_a_tensor():
    z0, z1 = views(10, 8).values()
    for value in (-0.5, 0.0, float("nan")):
        assert losses(z0, z1, temperature=torch.tensor(value), backend="cpu").isnan().all()


def test_float64_takes_the_reference():
    inputs = {name: x.double() for name, x in views(4, 8).items()}
    assert losses(**inputs).dtype == torch.float64
    with pytest.raises(RuntimeError, match=r"nt_xent: backend 'cpu' cannot run here: no torch\.float64 kernel"):
        losses(**inputs, backend="cpu")


class TestTheOracleItself:
    """Broken kernels must not pass. Each breaks one thing that a refactoring could."""

    def refuse(self, inputs, **kwargs):
        with pytest.raises(AssertionError, match="above"):
            oracle.check(losses, inputs, "cpu", **kwargs)

    def plant(self, monkeypatch, direction, fault):
        """fault(run, *arguments) in place of a direction of the kernel"""
        run = getattr(kernel, direction)
        monkeypatch.setattr(kernel, direction, lambda *arguments: fault(run, *arguments))

    def test_a_lost_tile(self, monkeypatch):
        def fault(run, x):
            losses, logged, inv_norm, stats = run(x)
            z = F.normalize(torch.cat([x.z0, x.z1]))
            tile = ((z[:64] @ z[128:192].t() - 1) / x.temperature).exp().sum(1)  # of the sums 1 / stats[1]
            losses[:64] += torch.log1p(-tile * stats[1, :64])
            return losses, logged, inv_norm, stats

        self.plant(monkeypatch, "forward", fault)
        self.refuse(views(300, 32))

    def test_a_forgotten_mirror_image(self, monkeypatch):
        def fault(run, grad, x, inv_norm, stats):
            return run(grad.clone().index_fill_(0, torch.arange(64), 0), x, inv_norm, stats)

        self.plant(monkeypatch, "backward", fault)
        self.refuse(views(300, 32))

    def test_a_sloppy_temperature(self, monkeypatch):
        """About 10 roundings of float32 too far: as an exp of too few terms would be."""
        self.plant(monkeypatch, "forward", lambda run, x: run(x._replace(temperature=x.temperature * (1 + 1e-5))))
        self.refuse(views(300, 32))

    def test_positives_rounded_to_bf16(self, monkeypatch):
        """The pull of the positive as one bf16 number W_ip - 2: it drowns where pairs are aligned."""

        def fault(run, x):
            *rows, stats = run(x)
            stats[2] = 1 - (1 - stats[2]).bfloat16().float()
            return *rows, stats

        self.plant(monkeypatch, "forward", fault)
        self.refuse(views(300, 128, noise=1e-2, dtype=torch.bfloat16), temperature=0.05)

    def test_the_gradients_of_a_sum_for_a_mean(self, monkeypatch):
        run = kernel.forward
        monkeypatch.setattr(kernel, "forward", lambda x, factor=0.0: run(x, factor=factor and 1.0))
        with pytest.raises(AssertionError, match="above"):
            oracle.check(sslops.nt_xent, views(90, 16), "cpu")

    def test_unwritten_memory(self, monkeypatch):
        monkeypatch.setattr(_C, "nt_xent_backward", lambda *args: None)
        with oracle.poisoned_memory():
            self.refuse(views(40, 8))


def test_backends_are_explained(monkeypatch, capsys):
    z0, z1 = views(4, 8).values()
    assert "cpu     taken" in sslops.explain("nt_xent", z0, z1)
    assert "eager   taken" in sslops.explain("nt_xent", z0.double(), z1.double())
    monkeypatch.setenv("SSLOPS_BACKEND", "eager")
    assert "eager   taken" in sslops.explain("nt_xent", z0, z1)
    monkeypatch.setenv("SSLOPS_BACKEND", "triton")
    with pytest.raises(RuntimeError, match=r"nt_xent: backend 'triton' cannot run here: .*cpu tensors"):
        sslops.nt_xent(z0, z1)
    assert "cannot run here" in sslops.explain("nt_xent", z0, z1)
    with pytest.raises(ValueError, match="explain: op"):
        sslops.explain("nt_xnet")
    main()
    assert "cannot run here" in capsys.readouterr().out
