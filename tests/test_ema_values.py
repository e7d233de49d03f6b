"""What the momentum update makes of infinities, NaN, complex numbers and lists that are none, on every backend."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sslops import _C, EMA, cosine_momentum, ema_update_

from .elsewhere import DEVICE, Elsewhere
from .test_ema_update import DEVICES, FLOATS, bits, isas, same_bits

COMPLEX = [torch.complex64, torch.complex128]
MOMENTA = [0.0, 1e-3, 0.3, 0.5, 0.9, 0.996, 1.0]


def on_every_backend(
    device: str, targets: list[Tensor], sources: list[Tensor], momentum, **options
) -> list[list[Tensor]]:
    """Results of the native backend, on each instruction set, and of eager."""
    results = []
    for backend in [*(isas() if device == "cpu" else [None]), "eager"]:
        results.append([x.clone() for x in targets])
        best = _C.isa()
        try:
            if backend not in (None, "eager"):
                _C.set_isa(backend)
            ema_update_(results[-1], sources, momentum, backend="eager" if backend == "eager" else None, **options)
        finally:
            _C.set_isa(best)
    return results


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n", [1, 5, 40, 1000])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_infinities(dtype: torch.dtype, n: int, device: str) -> None:
    """As m t + (1 - m) s has them, among finite numbers: equal ones stay, one is one, of two signs none."""
    inf = math.inf
    for m, (t, s) in itertools.product(MOMENTA, itertools.product((inf, -inf, 2.0), repeat=2)):
        target, source = torch.ones(n, dtype=dtype, device=device), torch.full((n,), 3, dtype=dtype, device=device)
        target[n // 2], source[n // 2] = t, s
        right = t if m == 1 else s if m == 0 else m * t + (1 - m) * s
        plain = torch.tensor(m + (1 - m) * 3, dtype=torch.float64)
        for seed in (None, 3):
            for (result,) in on_every_backend(device, [target], [source], m, seed=seed):
                assert result[n // 2].item() == pytest.approx(right, rel=2e-2, nan_ok=True), (m, t, s)
                others = result[torch.arange(n, device=device) != n // 2].cpu().double()
                assert (others - plain).abs().le(3 * torch.finfo(dtype).eps).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_difference_that_overflows(dtype: torch.dtype, device: str) -> None:
    """The ends are numbers, and so is what lies between; exact in rational numbers, to two roundings."""
    top, wide = torch.finfo(dtype).max, torch.float64 if dtype == torch.float64 else torch.float32
    for m, (t, s) in itertools.product((1e-3, 0.3, 0.5, 0.9), ((top, -top), (-top, top), (top, -top / 2), (top, top))):
        target, source = (torch.full((9,), x, dtype=dtype, device=device) for x in (t, s))
        t, s = Fraction(target[0].item()), Fraction(source[0].item())
        truth = float(Fraction(m) * t + (1 - Fraction(m)) * s)
        for (result,) in on_every_backend(device, [target], [source], m):
            error = abs(result[0].item() - truth)
            assert error <= torch.finfo(dtype).eps * abs(truth) / 2 + 2 * torch.finfo(wide).eps * top, (m, t, s)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("seed", [None, 1])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_momentum_one_leaves_every_bit(dtype: torch.dtype, seed: int | None, as_tensor: bool, device: str) -> None:
    """Of all float16 and bfloat16 numbers, and as many of the others: quiet and signalling NaN of all payloads too."""
    patterns = torch.arange(-(2**15), 2**15)
    size = torch.finfo(dtype).bits
    target = (patterns << (size - 16)).to(getattr(torch, f"int{size}")).view(dtype).to(device)
    momentum = torch.tensor(1.0, device=device) if as_tensor else 1.0
    for (result,) in on_every_backend(device, [target], [torch.ones_like(target)], momentum, seed=seed):
        assert torch.equal(bits(result), bits(target))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", COMPLEX, ids=str)
def test_complex(dtype: torch.dtype, device: str) -> None:
    """Part by part as their real views, bit by bit; strided, conjugated and of the other precision too."""
    other = COMPLEX[1 - COMPLEX.index(dtype)]
    targets = [torch.randn(n, 6, dtype=dtype, device=device) for n in (0, 1, 7, 3000)]
    sources = [
        torch.randn(x.shape, dtype=kind, device=device) for x, kind in zip(targets, [dtype, other] * 2, strict=True)
    ]
    targets += [
        torch.randn(6, 5, dtype=dtype, device=device).t(),
        torch.randn(4, 9, dtype=dtype, device=device)[:, ::2],
    ]
    sources += [torch.randn(5, 6, dtype=dtype, device=device).conj(), torch.randn(4, 5, dtype=dtype, device=device)]
    for m, backend in itertools.product(MOMENTA, (None, "eager")):
        results, expected = ([x.clone() for x in targets] for _ in range(2))
        results[1] = results[1].conj()  # to be written through the conjugation
        expected[1] = expected[1].conj().resolve_conj()
        ema_update_(results, sources, m, backend=backend)
        parts = [[torch.view_as_real(x.resolve_conj().contiguous()) for x in xs] for xs in (expected, sources)]
        ema_update_(*parts, m, backend=backend)
        for result, part in zip(results, parts[0], strict=True):
            assert torch.equal(torch.view_as_real(result.resolve_conj()), part)


def test_complex_beside_others() -> None:
    """A complex tensor takes the places of its parts: the random numbers of those behind it are the same everywhere."""
    results = []
    for backend in ("cpu", "eager"):
        torch.manual_seed(0)
        targets = [torch.randn(9000, dtype=torch.complex64), torch.randn(100).bfloat16()]
        ema_update_(targets, [torch.randn(9000, dtype=torch.complex64), torch.randn(100)], 0.0, seed=3, backend=backend)
        results.append(targets[1])
    assert same_bits(results[:1], results[1:])
    x, z = torch.zeros(3), torch.zeros(3, dtype=torch.complex64)
    for target, source in ((x, z), (z, x)):
        with pytest.raises(TypeError, match=r"sources\[0\]: wanted the dtype of targets\[0\]"):
            ema_update_([target], [source], 0.5)
    with pytest.raises(TypeError, match=r"targets\[0\]: wanted float32, to have a shadow"):
        ema_update_([z], [z.clone()], 0.5, shadows=[torch.zeros(3, dtype=torch.complex64)])


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.999, 1.0, torch.tensor(0.25), torch.tensor(0.999)], ids=str)
def test_devices_without_float64(momentum: float | Tensor, seed: int | None) -> None:
    targets, sources = ([torch.randn(7, 5).to(dtype) for dtype in FLOATS[:3]] for _ in range(2))
    expected = [x.clone() for x in targets]
    ema_update_(expected, sources, momentum, seed=seed, backend="cpu")
    with Elsewhere():
        targets, sources = ([x.to(DEVICE) for x in xs] for xs in (targets, sources))
        ema_update_(targets, sources, momentum.to(DEVICE) if isinstance(momentum, Tensor) else momentum, seed=seed)
        assert all(x.device == DEVICE for x in targets)
        results = [x.cpu() for x in targets]
        with pytest.raises(TypeError, match="no float64"):
            targets[0].double()
    for result, right in zip(results, expected, strict=True):
        torch.testing.assert_close(result, right, rtol=torch.finfo(result.dtype).eps, atol=1e-7)


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16, Fraction], ids=lambda kind: kind.__name__)
def test_numbers_of_other_kinds(kind) -> None:
    """What counts as a real number is one, NumPy's too, in every place where there is a momentum"""
    momentum = kind(0.75)
    online, target = nn.Linear(3, 3), nn.Linear(3, 3)
    expected = torch.lerp(target.weight.detach(), online.weight.detach(), 0.25)
    EMA(target, online, kind(0.5)).step(momentum)
    torch.testing.assert_close(target.weight.detach(), expected)
    for backend in ("cpu", "eager"):
        x = torch.zeros(3)
        ema_update_([x], [torch.ones(3)], momentum, backend=backend)
        assert (x == 0.25).all()
    assert cosine_momentum(10, kind(0.5))(0) == 0.5
    EMA(target, online, lambda k: kind(0.5)).step()


def test_seeds_of_other_kinds() -> None:
    results = []
    for seed in (7, np.int64(7), torch.tensor(7)):
        results.append(torch.zeros(100, dtype=torch.bfloat16))
        ema_update_([results[-1]], [torch.linspace(0, 1, 100)], 0.5, seed=seed)
    assert same_bits(results[:2], results[1:])
    with pytest.raises(TypeError, match="momentum: wanted a number"):
        ema_update_([torch.zeros(1)], [torch.ones(1)], np.bool_(True))


@pytest.mark.parametrize("bad", [3.0, None, torch.ones(2), nn.Linear(2, 2)], ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("which", ["targets", "sources", "shadows"])
def test_lists_that_are_none(which: str, bad: object) -> None:
    if which == "shadows" and bad is None:
        return
    given = {"targets": [torch.zeros(2)], "sources": [torch.ones(2)], "shadows": None} | {which: bad}
    with pytest.raises(TypeError, match=rf"^ema_update_: {which}: wanted tensors, .* got {type(bad).__name__}"):
        ema_update_(given["targets"], given["sources"], 0.5, shadows=given["shadows"])
    assert not given["targets"][0].any() if which != "targets" else True


def test_parameters_without_a_shape() -> None:
    with pytest.raises(ValueError, match=r"ema_update_: targets\[1\]: wanted a tensor that has its shape, got Uninit"):
        ema_update_([torch.zeros(2), *nn.LazyLinear(3).parameters()], [torch.ones(2)] * 3, 0.5)
