"""The momentum update against float64, its random rounding against another generator, and EMA over many steps."""

import copy
import itertools
import math
import pickle

import pytest
import torch
from torch import Tensor, nn

import sslops
from sslops import _C, EMA, cosine_momentum, ema_update_
from sslops._random import RandomStream, philox
from sslops.ops.ema_update import round_stochastically

FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
HALVES = [torch.float16, torch.bfloat16]
SIZES = [(), (1,), (7,), (8, 1), (3, 5), (1031,), (0, 4), (16384,), (3, 16385)]
MOMENTA = [0.0, 1e-3, 0.3, 0.5, 0.9, 0.996, 0.99999, 1.0]
needs_cuda = pytest.mark.skipif(
    not (torch.cuda.is_available() and hasattr(_C, "cuda_ema_update")), reason="needs a CUDA device and a CUDA build"
)
DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]


def isas() -> list[str]:
    found, best = [], _C.isa()
    for isa in _C.build_info()["isas"].split(","):
        try:
            _C.set_isa(isa)
        except ValueError:
            continue
        found.append(isa)
    _C.set_isa(best)
    return found


def tensors(dtype: torch.dtype, device: str = "cpu", sizes=SIZES) -> list[Tensor]:
    """Magnitudes from 1e-6 to 1e4: below float16's normal numbers, and where a source is far from its target."""
    made = [torch.randn(size) * torch.randn(size).mul(4).exp().clamp(1e-6, 1e4) for size in sizes]
    return [x.to(device, dtype) for x in made]


def clones(xs: list[Tensor]) -> list[Tensor]:
    return [x.clone() for x in xs]


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def same_bits(xs: list[Tensor], ys: list[Tensor]) -> bool:
    return all(torch.equal(bits(x), bits(y)) for x, y in zip(xs, ys, strict=True))


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The spacing of `dtype` at the float64 numbers x."""
    info = torch.finfo(dtype)
    leading = torch.ldexp(torch.ones_like(x), torch.frexp(x).exponent - 1)
    return leading.clamp(min=info.smallest_normal) * info.eps


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("target", "source"), list(itertools.product(FLOATS, FLOATS)), ids=str)
def test_rounded_once(target: torch.dtype, source: torch.dtype, device: str) -> None:
    """Half a unit in the last place, and what the step lost: its difference and its weight were rounded, 2^-24 each."""
    targets, sources = tensors(target, device), tensors(source, device)
    wide = torch.float64 if target == torch.float64 else torch.float32
    for m in MOMENTA:
        results = clones(targets)
        ema_update_(results, sources, m)
        for t, s, result in zip(targets, sources, results, strict=True):
            s = s.to(wide)
            near, far, weight = (t.double(), s.double(), 1 - m) if m >= 0.5 else (s.double(), t.double(), m)
            truth = near + weight * (far - near)
            lost = 1.01 * torch.finfo(wide).eps * weight * (far - near).abs()
            if target in HALVES:  # float32's own rounding comes before
                lost += ulp(truth, torch.float32) / 2
            bound = ulp(truth, target) / 2 + lost
            if target == torch.float64:  # the truth is rounded as well
                bound += 2 * ulp(truth, target) + lost
            assert ((result.double() - truth).abs() <= bound).all(), m


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("target", FLOATS, ids=str)
def test_ends_are_copies(target: torch.dtype, device: str) -> None:
    special = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 1.0, 1e-45, 3e38], device=device)
    ones = torch.ones(8, device=device)
    for seed, as_tensor in itertools.product((None, 1), (False, True)):
        one, zero = (torch.tensor(m, device=device) if as_tensor else m for m in (1.0, 0.0))
        kept, other = special.to(target, copy=True), ones.clone()
        ema_update_([kept, other], [ones, special], one, seed=seed)
        assert same_bits([kept, other], [special.to(target), ones])
        copied, other = ones.to(target, copy=True), special.clone()
        ema_update_([copied, other], [special.to(target), ones], zero, seed=seed)
        torch.testing.assert_close(copied, special.to(target), rtol=0, atol=0, equal_nan=True)
        assert same_bits([other], [ones])


def test_equal_tensors_stay() -> None:
    for dtype in FLOATS:
        targets = tensors(dtype)
        results = clones(targets)
        for m in MOMENTA:
            ema_update_(results, clones(targets), m, seed=3)
        assert all(map(torch.equal, results, targets))


def test_nonfinite_data() -> None:
    target = torch.tensor([math.nan, 1.0, math.inf, 1.0, math.inf])
    source = torch.tensor([1.0, math.nan, 1.0, math.inf, math.inf])
    results = []
    for backend in ("cpu", "eager"):
        results.append(target.clone())
        ema_update_([results[-1]], [source], 0.9, backend=backend)
    torch.testing.assert_close(*results, equal_nan=True)


def test_isas_and_threads_give_the_same_bits() -> None:
    best, threads = _C.isa(), torch.get_num_threads()
    starts = [x for dtype in FLOATS for x in tensors(dtype, sizes=[*SIZES, (100003,)])]
    sources = [x for dtype in FLOATS[::-1] for x in tensors(dtype, sizes=[*SIZES, (100003,)])]
    results = []
    try:
        for isa, number in itertools.product(isas(), (1, 2, 3)):
            _C.set_isa(isa)
            torch.set_num_threads(number)
            for seed in (None, 5):
                results.append((seed, clones(starts)))
                ema_update_(results[-1][1], sources, 0.9, seed=seed)
    finally:
        _C.set_isa(best)
        torch.set_num_threads(threads)
    assert all(same_bits(result, results[seed is not None][1]) for seed, result in results)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "momentum"), [(torch.float32, 0.75), (torch.float64, 0.1)])
def test_momentum_in_a_tensor(dtype: torch.dtype, momentum: float, device: str) -> None:
    targets, sources = tensors(torch.float32, device), tensors(torch.bfloat16, device)
    expected = clones(targets)
    ema_update_(expected, sources, momentum)
    ema_update_(targets, sources, torch.tensor(momentum, dtype=dtype, device=device))
    assert same_bits(targets, expected)
    before = clones(targets)
    ema_update_(targets, sources, torch.tensor(1.0001, device=device))
    assert same_bits(targets, before)
    ema_update_(targets, sources, torch.tensor(math.nan, device=device))
    assert all(x.isnan().all() for x in targets)


def test_strided() -> None:
    """Channels last, transposed, sliced, interleaved, expanded: each as its contiguous copy would be."""

    def views() -> tuple[list[Tensor], list[Tensor]]:
        torch.manual_seed(1)
        base, other = torch.randn(4, 6, 8, 10), torch.randn(4, 6, 8, 10)
        rows, columns = torch.randn(40, 30), torch.randn(7)
        last = base.contiguous(memory_format=torch.channels_last)
        sources = [other.contiguous(memory_format=torch.channels_last), other, torch.randn(30, 40), torch.randn(40, 5),
                   torch.randn(40, 5), columns.expand(6, 7), torch.randn(40, 4)]  # fmt: skip
        grid = torch.randn(40, 8)
        targets = [last, torch.randn(4, 6, 10, 8).transpose(2, 3), rows.t(),
                   torch.randn(40, 10)[:, ::2], torch.randn(40, 10)[:, 1::2], torch.randn(6, 7)]  # fmt: skip
        return [*targets, grid[:, ::2], grid[:, 1::2]], [*sources, torch.randn(40, 4)]

    targets, sources = views()
    expected = [x.contiguous() for x in clones(targets)]
    ema_update_(expected, [x.contiguous() for x in sources], 0.9)
    ema_update_(targets, sources, 0.9)
    for target, other in zip(targets, expected, strict=True):
        assert torch.equal(target, other)


@pytest.mark.parametrize("shadow", HALVES, ids=str)
def test_shadows(shadow: torch.dtype) -> None:
    targets, sources = tensors(torch.float32), tensors(torch.bfloat16)
    shadows = [torch.full_like(x, 7, dtype=shadow) for x in targets]
    strided = torch.zeros(9, 7, dtype=shadow).t()
    targets, sources, shadows = [*targets, torch.randn(7, 9)], [*sources, torch.randn(7, 9)], [*shadows, strided]
    for m in (0.9, 1.0):
        ema_update_(targets, sources, m, shadows=shadows)
        assert same_bits(shadows, [x.to(shadow) for x in targets])
        for x in shadows:
            x.zero_()


def test_philox_known_answers() -> None:
    """Random123's kat_vectors for philox4x32 10 fix a generator in Python integers, and that ours."""
    low = 0xFFFFFFFF

    def plain(counter: list[int], key: list[int]) -> list[int]:
        for _ in range(10):
            p0, p1 = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
            counter = [p1 >> 32 ^ counter[1] ^ key[0], p1 & low, p0 >> 32 ^ counter[3] ^ key[1], p0 & low]
            key = [(key[0] + 0x9E3779B9) & low, (key[1] + 0xBB67AE85) & low]
        return counter

    assert plain([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert plain([low] * 4, [low] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    for seed, block in ((0, 0), (-1, 5), (1 << 40, (1 << 33) + 7)):
        expected = plain([block & low, block >> 32, 1, 0], [seed & low, seed >> 32 & low])
        assert philox(seed, RandomStream.EMA_UPDATE, block, 1, torch.device("cpu")).tolist() == [expected]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("seed", [0, -3, 2**63 - 1])
def test_stochastic_rounding_is_the_reference(dtype: torch.dtype, seed: int, device: str) -> None:
    """Copies (momentum 0) are exact before they are rounded, so every bit must agree; subnormal results included."""
    sources = [x * scale for scale in (1.0, 1e-4, 1e-7, 1e-38) for x in tensors(torch.float32, device)]
    sources.append(torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 65519.0, 65530.0, 3.4e38], device=device))
    targets = [torch.zeros_like(x, dtype=dtype) for x in sources]
    ema_update_(targets, sources, 0.0, seed=torch.tensor(seed, device=device))
    first = 0
    for target, source in zip(targets, sources, strict=True):
        expected = round_stochastically(source, dtype, seed, first)
        torch.testing.assert_close(target, expected, rtol=0, atol=0, equal_nan=True)
        first += math.ceil(source.numel() / 16384) * 16384


def test_random_numbers_go_by_the_place_in_the_lists() -> None:
    """Strided pairs, shared ones and empty ones in front do not shift those of the others."""
    results = []
    for backend in ("cpu", "eager"):
        torch.manual_seed(0)
        shapes = (10, 10), (64, 32), (100,), (0,)
        grid, turned, flat, empty = (torch.zeros(shape, dtype=torch.bfloat16) for shape in shapes)
        targets = [grid[:, ::2], turned.t(), flat, empty]
        sources = [torch.rand(10, 5), torch.rand(32, 64), torch.rand(100), torch.empty(0)]
        order = (3, 0, 0, 1, 2)
        ema_update_([targets[k] for k in order], [sources[k] for k in order], 0.0, seed=5, backend=backend)
        results.append(targets)
    assert same_bits(*results)


def test_overlap_checks_take_memory_by_the_elements() -> None:
    """A column of a large matrix spans all of it: 256 MiB here, 16,384 elements."""
    import resource

    matrix = torch.empty(1 << 14, 1 << 12)
    columns = matrix[:, 0], matrix[:, 5]
    for x in columns:
        x.zero_()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ema_update_(columns, [torch.ones(1 << 14)] * 2, 0.5)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 20_000  # KiB
    assert all((x == 0.5).all() for x in columns)


def test_stochastic_rounding_is_unbiased() -> None:
    """1/3 of the way between two bfloat16 numbers, a million times: within five standard deviations of a third."""
    n = 1_000_000
    target = torch.zeros(n, dtype=torch.bfloat16)
    ema_update_([target], [torch.full((n,), 1 + 2**-7 / 3)], 0.0, seed=11)
    ups = (target.float() == 1 + 2**-7).sum().item()
    assert ((target.float() == 1) | (target.float() == 1 + 2**-7)).all()
    assert abs(ups - n / 3) < 5 * math.sqrt(n * 2 / 9)


def test_bf16_average_moves_only_with_stochastic_rounding() -> None:
    """100 steps at momentum 0.999 towards 2 from 1, 9.5% of the way: 12 bfloat16 numbers, none of them a step apart.

    Each rounding adds variance of at most ulp^2 / 4, damped by the momentum afterwards: after k steps at most
    k / 4 ulp^2 (ulp = 2^-7 in [1, 2)). Over n elements the mean stays within 5 sqrt(k / 4 / n) ulp of the truth.
    """
    n, steps, m = 20_000, 100, 0.999
    truth = 2 - m**steps
    source = torch.full((n,), 2.0, dtype=torch.bfloat16)
    nearest, stochastic = (torch.ones(n, dtype=torch.bfloat16) for _ in range(2))
    for step in range(steps):
        ema_update_([nearest], [source], m)
        ema_update_([stochastic], [source], m, seed=step)
    bound = 5 * math.sqrt(steps / 4 / n) * 2**-7
    assert abs(stochastic.double().mean().item() - truth) < bound
    assert (stochastic.double() - truth).abs().max() < 5 * math.sqrt(steps / 4) * 2**-7
    assert (nearest == 1).all()
    assert abs(nearest.double().mean().item() - truth) > 10 * bound


def test_a_frozen_layer_does_not_drift() -> None:
    """m and 1 - m, each rounded to float32, do not add up to one: equal tensors drift apart, by 1e-5 here."""
    source = torch.randn(1000)
    target, other = source.clone(), source.clone()
    for _ in range(5000):
        ema_update_([target], [source], 0.999)
        other.mul_(0.999).add_(source, alpha=0.001)
    assert torch.equal(target, source)
    assert ((other - source) / source).abs().max() > 5e-6


def test_nothing_to_do() -> None:
    ema_update_([], [], 0.9)
    ema_update_([torch.empty(0), torch.empty(3, 0)], [torch.empty(0), torch.empty(3, 0)], 0.9)
    with pytest.raises(ValueError, match="momentum"):
        ema_update_([], [], 2.0)


def test_shared_parameters_are_updated_once() -> None:
    target, source, other = torch.zeros(5), torch.ones(5), torch.ones(5)
    ema_update_([target, other, target], [source, other.clone(), source], 0.5)
    assert (target == 0.5).all()
    with pytest.raises(ValueError, match=r"targets\[1\]"):
        ema_update_([target, target], [source, other], 0.5)


def test_version_counters_move() -> None:
    weight = torch.randn(3, requires_grad=True)
    target = torch.randn(3)
    loss = (weight * target).sum()
    ema_update_([target], [weight], 0.9)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert not target.requires_grad


def test_inference_tensors() -> None:
    with torch.inference_mode():
        target = torch.zeros(3)
        ema_update_([target], [torch.ones(3)], 0.5)
        assert (target == 0.5).all()


def bad_input() -> dict[str, tuple]:
    T, S, HALF, BASE = torch.zeros(2), torch.ones(2), torch.zeros(2).half(), torch.arange(20.0)
    return {
        "length": ([T, T.clone()], [S], 0.9, {}, ValueError, r"sources: wanted one for each of the 4 targets, got 3"),
        "shape": ([T, torch.zeros(2, 3)], [S, torch.zeros(6)], 0.9, {}, ValueError,
                  r"sources\[2\]: wanted the shape of targets\[2\], \[2, 3\], got \[6\]"),
        "integer target": ([T, T.long()], [S, S], 0.9, {}, TypeError, r"targets\[2\]: wanted a floating-point .*int64"),
        "integer source": ([T], [S.int()], 0.9, {}, TypeError, r"sources\[1\].*int32"),
        "complex": ([T], [S * 1j], 0.9, {}, TypeError, r"sources\[1\].*complex64"),
        "no tensor": ([T], [3.0], 0.9, {}, TypeError, r"sources\[1\]: wanted a tensor, got float"),
        "storage": ([T], [S.untyped_storage()], 0.9, {}, TypeError, r"sources\[1\].*got UntypedStorage"),
        "device": ([T], [S.to("meta")], 0.9, {}, ValueError,
                   r"sources\[1\]: wanted the device of targets\[0\], cpu, got meta"),
        "sparse": ([T], [S.to_sparse()], 0.9, {}, ValueError, r"sources\[1\].*sparse"),
        "requires grad": ([T, T.clone().requires_grad_()], [S, S], 0.9, {}, ValueError,
                          r"targets\[2\]: wanted torch.no_grad\(\) around the call"),
        "above one": ([T], [S], 1.01, {}, ValueError, r"momentum: wanted a number in \[0, 1\], got 1.01"),
        "negative": ([T], [S], -0.1, {}, ValueError, "momentum"),
        "nan": ([T], [S], math.nan, {}, ValueError, "momentum"),
        "bool": ([T], [S], True, {}, TypeError, "momentum"),
        "momentum's dtype": ([T], [S], torch.tensor(0.999).bfloat16(), {}, TypeError, "momentum"),
        "momentum's shape": ([T], [S], torch.zeros(1), {}, ValueError, "momentum"),
        "momentum's device": ([T], [S], torch.zeros((), device="meta"), {}, ValueError, "momentum"),
        "seed": ([T], [S], 0.9, {"seed": 0.5}, TypeError, "seed"),
        "seed's dtype": ([T], [S], 0.9, {"seed": torch.tensor(1.0)}, TypeError, "seed"),
        "shadow's dtype": ([T], [S], 0.9, {"shadows": [BASE[:2]]}, TypeError, r"shadows\[1\]: wanted float16"),
        "shadowed dtype": ([HALF], [S], 0.9, {"shadows": [HALF.clone()]}, TypeError, r"targets\[1\]: wanted float32"),
        "shadows' number": ([T, T.clone()], [S, S], 0.9, {"shadows": [HALF]}, ValueError, "shadows: wanted one"),
        "itself": ([BASE], [BASE], 0.9, {}, ValueError, r"targets\[1\]: wanted memory that no other .*sources\[1\]"),
        "overlap": ([BASE[:10], BASE[9:]], [torch.ones(10), torch.ones(11)], 0.9, {}, ValueError,
                    r"targets\[1\]: .*overlaps targets\[2\]"),
        "overlapping strides": ([BASE[::2]], [BASE[10:]], 0.9, {}, ValueError, "overlaps"),
        "expanded target": ([BASE[:1].expand(4)], [torch.ones(4)], 0.9, {}, ValueError, r"targets\[1\].*strides \[0\]"),
        "backend": ([T], [S], 0.9, {"backend": "tpu"}, ValueError, "backend"),
    }  # fmt: skip


@pytest.mark.parametrize("case", bad_input())
def test_bad_input_changes_nothing(case: str) -> None:
    targets, sources, momentum, options, error, message = bad_input()[case]
    targets, sources = [torch.zeros(3), *targets, torch.zeros(3)], [torch.ones(3), *sources, torch.ones(3)]
    if "shadows" in options:
        shadows = [torch.zeros(3).half(), *options["shadows"], torch.zeros(3).half()]
        if case == "shadows' number":
            shadows.pop()
        options = {**options, "shadows": shadows}
    written = [*targets, *options.get("shadows", [])]
    before = copy.deepcopy(written)
    with pytest.raises(error, match=message) as raised:
        ema_update_(targets, sources, momentum, **options)
    assert str(raised.value).startswith("ema_update")
    assert all(map(torch.equal, written, before))


def test_a_backend_that_cannot_run_says_so() -> None:
    with pytest.raises(RuntimeError, match="does not run on cpu"):
        ema_update_([torch.zeros(2)], [torch.zeros(2)], 0.9, backend="cuda")
    assert "taken" in sslops.explain("ema_update")


@pytest.mark.parametrize(
    ("momentum", "value", "seed", "error"),
    [
        (None, 7.0, None, ValueError),
        (None, math.nan, None, ValueError),
        (torch.tensor([0.5, 0.5]), 0.0, None, ValueError),
        (torch.tensor(0.5).bfloat16(), 0.0, None, TypeError),
        (None, 0.5, torch.tensor(1.0), TypeError),
    ],
)
def test_the_registered_op_checks_too(momentum, value: float, seed, error) -> None:
    target = torch.zeros(2)
    with pytest.raises(error, match=r"ema_update_: (momentum|seed)"):
        torch.ops.sslops.ema_update_([target], [torch.ones(2)], [], momentum, value, seed, None, "")
    assert (target == 0).all()


@pytest.mark.parametrize("negated", ["target", "source"])
def test_negated_views(negated: str) -> None:
    """The imaginary part of a conjugate is a view, its sign flipped when it is read; of one element, it is dense."""
    for n in (1, 3):
        whole = torch.full((n,), 1 + 1j).conj().imag
        target, source = (whole, torch.ones(n)) if negated == "target" else (torch.ones(n), whole)
        ema_update_([target], [source], 0.75)
        assert torch.equal(target, torch.full((n,), -0.5 if negated == "target" else 0.5))


def test_tensors_without_memory_are_named() -> None:
    with pytest.raises(ValueError, match=r"ema_update_: targets\[0\]: wanted a tensor with memory of its own"):
        torch.func.vmap(lambda t, s: ema_update_([t], [s], 0.5))(torch.zeros(2, 3), torch.ones(2, 3))


def test_cuda_is_refused_where_the_binary_has_no_code(monkeypatch: pytest.MonkeyPatch) -> None:
    from sslops.kernels.cuda import device as of_device
    from sslops.kernels.cuda.ema_update import refuses

    monkeypatch.setattr(of_device, "_trouble", lambda device: None)
    monkeypatch.setattr(_C, "build_info", lambda: {"cuda_archs": "sm_80,sm_90,compute_90"})
    for capability, runs in (((7, 5), False), ((8, 0), True), ((8, 9), True), ((9, 0), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        reason = refuses(torch.device("cuda"), torch.float32)
        assert runs == (reason is None)
        assert runs or "sm_75" in reason
    monkeypatch.setattr(_C, "build_info", lambda: {"cuda_archs": "sm_80,compute_80"})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert refuses(torch.device("cuda"), torch.float32) is None
    monkeypatch.setattr(_C, "build_info", lambda: {"cuda_archs": "sm_80"})
    assert "sm_90" in refuses(torch.device("cuda"), torch.float32)
    monkeypatch.setattr(_C, "build_info", lambda: {"cuda_archs": "sm_90"})
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "ROCm" in refuses(torch.device("cuda"), torch.float32)


def test_cuda_is_refused_where_it_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """An older driver than the CUDA runtime in the binary needs, say. Asked for once"""
    from contextlib import nullcontext
    from types import SimpleNamespace

    from sslops.kernels.cuda import device as of_device

    asked = []

    def iota(*_: object) -> None:
        asked.append(1)
        raise RuntimeError("the driver here is for CUDA 12.4")

    of_device._trouble.cache_clear()
    monkeypatch.setattr(_C, "cuda_iota", iota, raising=False)  # a build without CUDA has none
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(_C, "build_info", lambda: {"cuda_archs": "sm_90"})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    reasons = [of_device.refuses(torch.device("cuda"), torch.float32) for _ in range(2)]
    of_device._trouble.cache_clear()
    assert reasons == ["sslops' CUDA code does not run here: the driver here is for CUDA 12.4"] * 2
    assert len(asked) == 1


def test_cuda_table_is_kept_for_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import nullcontext
    from types import SimpleNamespace

    from sslops.kernels.cuda.ema_update import forward

    uploads, used = [], []
    stream = SimpleNamespace(cuda_stream=1)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(_C, "cuda_ema_upload", lambda *arguments: uploads.append(arguments[1:]), raising=False)
    monkeypatch.setattr(_C, "cuda_ema_update", lambda *a: used.append((a[1], a[-1])), raising=False)
    work, memory = _C.EmaPairs().work, {}
    for stream.cuda_stream in (1, 1, 2, 2):
        forward(work, torch.device("cpu"), 0.5, None, memory)
    forward(_C.EmaPairs().work, torch.device("cpu"), 0.5, None, memory)
    assert [at for _, at in uploads] == [1, 2, 2]
    assert used == [uploads[k] for k in (0, 0, 1, 1, 2)]


@pytest.mark.filterwarnings("ignore")
def test_traces_record_the_update_or_raise() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    def step(target: Tensor, source: Tensor) -> Tensor:
        ema_update_([target], [source], 0.5)
        return target + 0

    for mode in ("real", "fake"):
        graph = make_fx(step, tracing_mode=mode)(torch.zeros(3), torch.ones(3))
        assert (graph(torch.zeros(3), torch.ones(3)) == 0.5).all()
    with pytest.raises(RuntimeError, match="ema_update_: the trace would not record it"):
        torch.jit.trace(step, (torch.zeros(3), torch.ones(3)))
    ema = EMA(*pair(), 0.5)
    with pytest.raises(RuntimeError, match="EMA: the trace would not record it"):
        make_fx(lambda x: (ema.step(), x + 1)[1])(torch.zeros(3))
    assert ema.steps == 0


def test_compiled_step() -> None:
    """One graph: the targets are mutated in it, and a schedule in a tensor does not recompile."""
    targets, sources = tensors(torch.bfloat16, sizes=SIZES[1:6]), tensors(torch.float32, sizes=SIZES[1:6])
    expected = clones(targets)
    compilations = 0

    def count(graph, inputs):
        nonlocal compilations
        compilations += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    @torch.compile(fullgraph=True, backend=count)
    def step(targets: list[Tensor], sources: list[Tensor], momentum: Tensor, seed: Tensor) -> Tensor:
        doubled = [2 * x for x in sources]
        ema_update_(targets, doubled, momentum, seed=seed)
        return targets[0] + 1

    for k in range(12):
        momentum, seed = torch.tensor(0.9 + 0.001 * k), torch.tensor(k)
        result = step(targets, sources, momentum, seed)
        ema_update_(expected, [2 * x for x in sources], momentum, seed=seed)
        assert same_bits(targets, expected)
        assert torch.equal(result, expected[0] + 1)
    assert compilations == 1


def test_opcheck() -> None:
    lists = tensors(torch.float32, sizes=SIZES[1:4]), tensors(torch.bfloat16, sizes=SIZES[1:4])
    shadows = [x.half() for x in lists[0]]
    torch.library.opcheck(torch.ops.sslops.ema_update_, (*lists, shadows, None, 0.9, torch.tensor(3), None, "cpu"))


class Net(nn.Module):
    """Shared weights, float and integer buffers, a buffer that is not saved, something frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.LazyLinear(8))
        self.body(torch.zeros(2, 3, 6, 6))
        self.first, self.tied = nn.Linear(8, 8), nn.Linear(8, 8)
        self.tied.weight = self.first.weight
        self.register_buffer("scale", torch.rand(4))
        self.register_buffer("cache", torch.rand(4), persistent=False)
        self.first.bias.requires_grad_(False)


def pair() -> tuple[Net, Net]:
    online = Net()
    target = copy.deepcopy(online)
    perturb(online)
    return target, online


@torch.no_grad()
def perturb(module: nn.Module) -> None:
    for x in [*module.parameters(), *module.buffers()]:
        if x.is_floating_point():
            x.add_(torch.randn_like(x), alpha=0.1)
        else:
            x.add_(1)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("buffers", ["average", "copy"])
def test_ema_of_a_model(buffers: str, backend: str) -> None:
    target, online = pair()
    truth = {name: x.double() for name, x in target.state_dict().items()}
    cache = target.cache.clone()
    ema = EMA(target, online, lambda step: 0.5 + 0.1 * step, buffers=buffers, backend=backend)
    for k in range(4):
        perturb(online)
        ema.step()
        parameters = dict(online.named_parameters(remove_duplicate=False))
        for name, x in online.state_dict().items():
            averaged = x.is_floating_point() and (name in parameters or buffers == "average")
            truth[name] = torch.lerp(truth[name], x.double(), 0.5 - 0.1 * k) if averaged else x.double()
    for name, x in target.state_dict().items():
        torch.testing.assert_close(x.double(), truth[name], rtol=1e-6, atol=1e-7, msg=name)
    assert torch.equal(target.cache, cache)
    assert target.tied.weight is target.first.weight
    assert ema.steps == 4


def imported_timm():
    try:  # torchvision from PyPI, which timm imports, wants its operators in a CPU build of torch, too
        torchvision = torch.library.Library("torchvision", "DEF")
        for op in ("nms", "qnms"):
            torchvision.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    except RuntimeError:
        pass  # it has them
    return pytest.importorskip("timm.utils.model_ema")


def test_ema_is_timms() -> None:
    timm = imported_timm()
    target, online = (module.body for module in pair())  # shared parameters it would move twice a step
    theirs = timm.ModelEmaV3(target, decay=0.99)
    ours = EMA(target, online, 0.99)
    for _ in range(3):
        perturb(online)
        ours.step()
        theirs.update(online)
    for name, x in theirs.module.state_dict().items():
        torch.testing.assert_close(target.state_dict()[name], x, rtol=1e-6, atol=1e-7, msg=name)


def rebind(module: nn.Module) -> None:
    for x in module.parameters():
        x.data = x.data.clone()


def replace(module: nn.Module) -> None:
    module.first.bias = nn.Parameter(torch.randn(8))
    module.body[3] = nn.Linear(128, 8)


def reshape(module: nn.Module) -> None:
    module.to(memory_format=torch.channels_last)


def swap(module: nn.Module) -> None:
    for x in list(module.parameters()):
        torch.utils.swap_tensors(x, nn.Parameter(x.detach().clone(), x.requires_grad))


@pytest.mark.parametrize("change", [rebind, replace, reshape, swap, nn.Module.double, nn.Module.half])
@pytest.mark.parametrize("side", ["target", "online"])
def test_ema_follows_its_tensors(change, side: str) -> None:
    """The table is kept between steps: tensors that moved, were replaced or changed their layout must be noticed."""
    target, online = pair()
    ema = EMA(target, online, 0.9, half="nearest")
    ema.step()
    change(target if side == "target" else online)
    expected = copy.deepcopy(target)
    with torch.no_grad():
        ema_update_(expected.parameters(), online.parameters(), 0.9)
    ema.step()
    assert same_bits(list(target.parameters()), list(expected.parameters()))


@pytest.mark.parametrize("half", ["stochastic", "master"])
def test_ema_of_a_model_that_is_cast_later(half: str) -> None:
    """Module.to keeps the parameters and gives them other data; no buffer is there to be replaced."""
    online = nn.Linear(50, 50)
    target = copy.deepcopy(online)
    nn.init.constant_(target.weight, 1)
    nn.init.constant_(online.weight, 1.25)
    ema = EMA(target, online, 0.999, half=half)
    target.bfloat16()
    for _ in range(300):
        ema.step()
    truth = 1.25 - 0.25 * 0.999**300
    assert target.weight.double().mean().item() == pytest.approx(truth, abs=2**-8)
    target.float()
    nn.init.constant_(target.weight, 1)
    ema.step()
    assert target.weight.mean().item() == pytest.approx(1.00025, abs=1e-6)
    target.bfloat16()  # a master of before would bring the old average back
    ema.step(1.0)
    assert (target.weight == 1).all()


def test_masters_follow_a_parameter_of_another_shape() -> None:
    online = nn.Linear(3, 4).bfloat16()
    target = copy.deepcopy(online)
    ema = EMA(target, online, 0.5, half="master")
    ema.step()
    for module in (target, online):
        module.weight = nn.Parameter(torch.ones(5, 3).bfloat16())
    ema.step()
    assert (target.weight == 1).all()


def test_a_failed_pairing_fails_again() -> None:
    target, online = pair()
    ema = EMA(target, online, 0.5)
    before = clones(list(target.parameters()))
    nn.utils.parametrizations.weight_norm(online.first)
    for _ in range(2):
        with pytest.raises(ValueError, match="none of that name"):
            ema.step()
    assert same_bits(before, list(target.parameters()))
    assert ema.steps == 0


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.untyped_storage().resize_(0), "memory of its own"),
        (lambda x: setattr(x, "data", torch.zeros(1, dtype=torch.long)), "the shape of"),
        (lambda x: setattr(x, "data", torch.zeros(4)), "the dtype of"),
    ],
    ids=["freed", "shape", "dtype"],
)
def test_ema_checks_copied_buffers_first(change, message: str, backend: str) -> None:
    online = nn.Linear(3, 3)
    online.register_buffer("count", torch.arange(4))
    target = copy.deepcopy(online)
    with torch.no_grad():
        online.weight += 1
    ema = EMA(target, online, 0.5, backend=backend)
    before = target.weight.clone()
    change(online.count)
    with pytest.raises((TypeError, ValueError), match=message):
        ema.step()
    assert torch.equal(target.weight, before)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_ema_copies_other_buffers(dtype: torch.dtype) -> None:
    target, online = nn.Module(), nn.Module()
    target.register_buffer("flat", torch.zeros(70001, dtype=dtype))
    online.register_buffer("flat", torch.randint(0, 2, (70001,)).to(dtype))
    target.register_buffer("strided", torch.zeros(5, 3, dtype=dtype))
    online.register_buffer("strided", torch.randint(0, 2, (3, 5)).to(dtype).t())
    EMA(target, online, buffers="copy").step()
    for name, x in online.named_buffers():
        assert torch.equal(getattr(target, name).to(torch.complex64), x.to(torch.complex64))


def test_copies_convert_floats_to_nearest() -> None:
    target, online = nn.BatchNorm1d(1000).bfloat16(), nn.BatchNorm1d(1000)
    nn.init.normal_(online.running_mean)
    EMA(target, online, 0.5, buffers="copy").step()
    assert torch.equal(target.running_mean, online.running_mean.bfloat16())


def test_work_that_was_handed_out_stays() -> None:
    """A thread that updates has let go of the interpreter: another one may read moved tensors meanwhile."""
    target, source = torch.zeros(3), torch.ones(3)
    pairs = _C.EmaPairs()
    pairs.read([target], [source], [], False)
    work = pairs.work
    pairs.read([target], [source], [], False)
    assert pairs.work is work
    first, target.data = target.data, torch.zeros(5)
    kept, source.data = source.data, torch.ones(5)
    pairs.read([target], [source], [], False)
    assert pairs.work is not work
    _C.ema_update(work, 0.0, None)
    assert torch.equal(first, kept)
    assert (target == 0).all()


def test_ema_is_copied_and_pickled() -> None:
    target, online = (module.bfloat16() for module in pair())
    both = online, EMA(target, online, cosine_momentum(10, 0.5), half="master")
    both[1].step()
    for other_online, other in (copy.deepcopy(both), pickle.loads(pickle.dumps(both))):
        assert other.online is other_online
        other.step()
        expected = copy.deepcopy(both)[1]
        expected.step()
        assert same_bits(list(other.target.parameters()), list(expected.target.parameters()))
        assert other.steps == 2


def test_ema_storage_that_was_freed() -> None:
    """FSDP resizes storages: a tensor without memory is an error, and its return with other memory is noticed."""
    target, online = pair()
    ema = EMA(target, online, 0.0)
    weight = online.first.weight.detach()
    saved, size = weight.clone(), weight.untyped_storage().size()
    weight.untyped_storage().resize_(0)
    before = clones(list(target.parameters()))
    with pytest.raises(ValueError, match=r"EMA: sources.*a tensor with memory of its own"):
        ema.step()
    assert same_bits(before, list(target.parameters()))
    weight.untyped_storage().resize_(size)
    weight.copy_(saved)
    ema.step()
    assert same_bits(list(target.parameters()), list(online.parameters()))


@pytest.mark.parametrize("half", ["stochastic", "master", "nearest"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_targets(half: str, dtype: torch.dtype) -> None:
    """1,000 steps at 0.999 end 63% of the way, or have never begun."""
    online = nn.Linear(100, 100).to(dtype)
    target = copy.deepcopy(online)
    nn.init.constant_(target.weight, 1)
    nn.init.constant_(online.weight, 1.25)
    ema = EMA(target, online, 0.999, half=half)
    for _ in range(1000):
        ema.step()
    truth, found = 1.25 - 0.25 * 0.999**1000, target.weight.double().mean().item()
    if half == "nearest":
        assert found == 1
    elif half == "master":
        assert (target.weight == torch.tensor(truth).to(dtype)).all()
    else:
        assert abs(found - truth) < 5 * math.sqrt(1000 / 4 / 10_000) * torch.finfo(dtype).eps


@pytest.mark.parametrize("half", ["stochastic", "master"])
def test_ema_resumes_exactly(half: str) -> None:
    def new(steps: int) -> tuple[nn.Module, nn.Module, EMA]:
        torch.manual_seed(4)
        target, online = (module.bfloat16() for module in pair())
        ema = EMA(target, online, cosine_momentum(10, 0.9), half=half, seed=7)
        for _ in range(steps):
            perturb(online)
            ema.step()
        return target, online, ema

    target, online, ema = new(3)
    saved = copy.deepcopy((target.state_dict(), online.state_dict(), ema.state_dict()))
    for _ in range(3):
        ema.step()
    other_target, other_online, other = new(0)
    other_target.load_state_dict(saved[0])
    other_online.load_state_dict(saved[1])
    other.load_state_dict(saved[2])
    for _ in range(3):
        other.step()
    assert same_bits(list(target.parameters()), list(other_target.parameters()))
    assert other.steps == 6
    if half == "master":
        del saved[2]["masters.first.weight"]
        with pytest.raises(RuntimeError, match=r'EMA:\n.*Missing.*"masters.first.weight"'):
            other.load_state_dict(saved[2])


def test_wrapped_models() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    target, online = pair()
    plain = copy.deepcopy(target)
    compiled = copy.deepcopy(online)
    compiled.first = checkpoint_wrapper(compiled.first)
    compiled.body = torch.compile(compiled.body, backend="eager")
    EMA(plain, online, 0.9).step()
    EMA(target, torch.compile(nn.DataParallel(compiled), backend="eager"), 0.9).step()
    assert same_bits(list(plain.parameters()), list(target.parameters()))


@pytest.mark.filterwarnings("error:Dynamo")
def test_ema_in_a_compiled_step_is_a_graph_break() -> None:
    target, online = pair()
    plain = copy.deepcopy(target)
    ema, other = EMA(target, online, cosine_momentum(20)), EMA(plain, online, cosine_momentum(20))
    graphs = 0

    def count(graph, inputs):
        nonlocal graphs
        graphs += 1
        return graph

    @torch.compile(backend=count)
    def step(x: Tensor) -> Tensor:
        y = x * 2
        ema.step()
        return y + 1

    for _ in range(12):
        perturb(online)
        step(torch.ones(3))
        other.step()
    assert graphs == 2
    assert same_bits(list(plain.parameters()), list(target.parameters()))


def test_distributed_wrapper(tmp_path) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        target, online = pair()
        plain = copy.deepcopy(target)
        EMA(plain, online, 0.9).step()
        EMA(target, nn.parallel.DistributedDataParallel(online), 0.9).step()
    finally:
        dist.destroy_process_group()
    assert same_bits(list(plain.parameters()), list(target.parameters()))


def test_ema_refuses() -> None:
    target, online = pair()
    with pytest.raises(ValueError, match=r"EMA: online\.body\.0\.weight.*none of that name"):
        EMA(target, online.body)
    with pytest.raises(ValueError, match=r"EMA: target\.body.*wanted a tensor of its own"):
        EMA(online, online)
    with pytest.raises(ValueError, match="half"):
        EMA(target, online, half="up")
    with pytest.raises(ValueError, match="momentum"):
        EMA(target, online, 1.5)
    for seed, error in ((0.5, TypeError), (None, TypeError), (2**63, ValueError)):
        with pytest.raises(error, match="EMA: seed"):
            EMA(target, online, seed=seed)
    with pytest.raises(AttributeError):
        EMA(target, online).online = online
    ema = EMA(target, online)
    for name, bad in (("seed", None), ("steps", torch.tensor(1.5)), ("steps", torch.zeros(2, dtype=torch.int64))):
        with pytest.raises(RuntimeError, match=f"EMA: {name}: wanted a tensor, torch.int64"):
            ema.load_state_dict({"steps": torch.tensor(9), "seed": torch.tensor(9)} | {name: bad})
    with pytest.raises(RuntimeError, match=r'EMA:\n.*Missing.*"steps", "seed"'):
        ema.load_state_dict({})
    assert ema.state_dict() == {"steps": 0, "seed": 0}
    online.predictor = nn.Linear(3, 3)
    before = clones(list(target.parameters()))
    with pytest.raises(ValueError, match="momentum"):
        EMA(target, online, lambda step: 1.5).step()
    assert same_bits(before, list(target.parameters()))
    EMA(target, online).step(0.0)
    assert same_bits(list(target.parameters()), [x for n, x in online.named_parameters() if "predictor" not in n])


def test_cosine_momentum() -> None:
    momentum = cosine_momentum(100)
    assert momentum(0) == 0.996
    assert momentum(50) == pytest.approx(0.998, abs=1e-12)
    assert momentum(100) == momentum(1000) == 1
    assert all(momentum(k) <= momentum(k + 1) for k in range(100))
    for arguments in ((0,), (math.nan,), (10, 1.1), (10, 0.9, math.nan)):
        with pytest.raises(ValueError, match="cosine_momentum"):
            cosine_momentum(*arguments)


@needs_cuda
def test_cuda_gives_the_cpus_bits() -> None:
    for target, source, seed in itertools.product(FLOATS, FLOATS, (None, 5)):
        targets, sources = tensors(target), tensors(source)
        on_cuda = [x.cuda() for x in targets]
        ema_update_(on_cuda, [x.cuda() for x in sources], 0.99, seed=seed)
        ema_update_(targets, sources, 0.99, seed=seed)
        assert same_bits([x.cpu() for x in on_cuda], targets)


@needs_cuda
def test_cuda_graph_takes_current_momentum_and_seed() -> None:
    targets, sources = tensors(torch.bfloat16, "cuda"), tensors(torch.float32, "cuda")
    expected = clones(targets)
    momentum, seed = torch.tensor(0.5, device="cuda"), torch.tensor(0, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ema_update_(targets, sources, momentum, seed=seed)
    for k in range(3):
        momentum.fill_(0.5 + 0.1 * k)
        seed.fill_(k)
        graph.replay()
        ema_update_(expected, sources, momentum, seed=seed)
    assert same_bits(targets, expected)


@needs_cuda
def test_cuda_runs_on_the_current_stream() -> None:
    target, source = torch.zeros(1 << 20, device="cuda"), torch.zeros(1 << 20, device="cuda")
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        source.fill_(2)
        ema_update_([target], [source], 0.5)
    stream.synchronize()
    assert (target == 1).all()
