"""clip, siglip, nearest, and what exceeds pairs: launches for offline.py, calls for sanitize.py and the interpreter."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from unittest import mock

import pytest
import torch
from torch import Tensor

import sslops
from sslops.distributed import Part
from sslops.kernels.triton import clip, exceeding, launch, nearest, pairs, rows, siglip
from sslops.ops.clip import Arguments as CLIP
from sslops.ops.nearest import Arguments as Nearest
from sslops.ops.siglip import Arguments as SigLIP

from .. import oracle
from .. import test_clip as of_clip
from .. import test_nearest as of_nearest
from .. import test_siglip as of_siglip
from .common import OPERANDS, TARGET, case, float32_on, launched, multiply, precision, take_triton


@contextlib.contextmanager
def on_cpu(block: int = 128) -> Iterator[None]:
    """In blocks of W, panels and spans that small inputs have more than one of; block: of W, a multiple of a tile's"""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(launch, "multiply", multiply))
        for module in (pairs, clip, siglip):
            stack.enter_context(mock.patch.object(module, "W_BLOCK", block))
        stack.enter_context(mock.patch.object(pairs, "PANELS", 2))
        stack.enter_context(mock.patch.object(nearest, "PROGRAMS", 4))
        yield


def call(
    op: str, b: int, n: int, d: int, operands: str, device: str, *, learned: bool = True, normalize: bool = True,
    needs_grad: bool = True, part: Part | None = None, k: int = 1, first: int = -1,
    dtype: torch.dtype | None = None,
) -> None:  # fmt: skip
    """Forward and backward; learned: the scale is a tensor, and clip's tops are searched for"""
    compute = OPERANDS[operands]
    left, right = (torch.ones(rows, d, dtype=dtype or compute, device=device) for rows in (b, n))
    number = torch.ones((), device=device) if learned else 10.0
    with mock.patch.object(launch, "precision", return_value=precision(operands)):
        if op == "nearest":
            nearest.forward(Nearest(left, right, k, normalize, first, compute, "triton"))
        elif op == "siglip":
            rest = normalize, False, "", compute, "triton", [needs_grad] * 4
            siglip.forward(SigLIP(left, right, number, number if learned else -10.0, *rest), max(first, 0))
        else:
            x = CLIP(left, right, number, normalize, op != "clip", "", True, compute, "triton", [needs_grad] * 3)
            if op == "exceeding":
                own = exceeding.similarity(x)
                exceeding.count(x, max(first, 0), own, own)
                return
            losses, stats = clip.forward(x, part, None if part is None else lambda sums: sums.repeat(2, 1, 1))
            clip.backward(losses, x, stats, part)


def launches(chip: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Every listed config; of the launches without one, which other ops' are like, none but on one chip"""

    def matmuls(*arguments: object, **options: object) -> None:
        listed = ((pairs, "_unit"), (clip, "_close"), (siglip, "_finish"), (nearest, "_join"))
        with contextlib.ExitStack() as stack:
            for module, name in ((rows, "_gradient"), (rows, "_inv_norms"), *(listed if chip != "sm_90" else ())):
                stack.enter_context(mock.patch.object(module, name, mock.MagicMock()))
            call(*arguments, **options)

    for operands in ("f16" if chip.startswith("default") else "bf16", *float32_on(chip)):
        yield f"{operands} clip search", partial(matmuls, "clip", 8192, 8192, 512, operands, "meta")
        yield f"{operands} exceeding", partial(matmuls, "exceeding", 8192, 8192, 512, operands, "meta")
        yield f"{operands} siglip", partial(matmuls, "siglip", 8192, 8192, 512, operands, "meta")
        options = {"normalize": False}
        yield f"{operands} nearest", partial(matmuls, "nearest", 256, 65536, 256, operands, "meta", **options)
    if chip == "sm_90":
        options = {"dtype": torch.float32}
        yield "bf16 nearest unit", partial(matmuls, "nearest", 256, 65536, 100, "bf16", "meta", **options)


def small() -> Iterator[Callable[[], None]]:
    """Ragged shapes down every path"""
    for op, b, n, d, options in (
        ("clip", 1, 1, 1, {}),
        ("clip", 150, 150, 20, {}),
        ("clip", 40, 80, 100, {"learned": False, "part": Part(40, 40, None)}),
        ("exceeding", 150, 150, 20, {}),
        ("exceeding", 40, 40, 100, {"first": 40}),
        ("siglip", 150, 150, 20, {}),
        ("siglip", 40, 80, 100, {"learned": False, "normalize": False, "first": 40}),
        ("siglip", 40, 40, 20, {"first": 40}),
        ("nearest", 70, 300, 100, {"k": 2, "first": 3}),
        ("nearest", 70, 130, 20, {"normalize": False}),
    ):
        yield partial(call, op, b, n, d, "f16", "cpu", **options)


def tuning(operands: str, width: int, kernel: str, device: str) -> Callable[[], tuple[Tensor, ...]]:
    """The call that tune.py times for `kernel`"""
    compute = torch.bfloat16 if operands == "half" else torch.float32
    left, right = torch.randn(2, 2048 if operands == "ieee" else 4096, width, dtype=compute, device=device)
    if kernel == "nearest":
        x = Nearest(left[:256], right, 1, False, -1, compute, "triton")
        return lambda: ((x.query.float() * x.support[nearest.forward(x)[:, 0]].float()).sum(1),)
    scale = torch.tensor(10.0, device=device)
    if kernel == "siglip":
        of_siglip = SigLIP(left, right, scale, -scale, True, False, "", compute, "triton", [True] * 4)
        return lambda: siglip.forward(of_siglip)
    of_clip = CLIP(left, right, scale, True, False, "", True, compute, "triton", [True] * 3)
    losses, stats = clip.forward(of_clip)
    if kernel == "sums":
        return lambda: clip.forward(of_clip)
    return lambda: clip.backward(torch.full_like(losses, 1 / len(losses)), of_clip, stats)


# ---- by the interpreter: test_interpreter.py starts these in a process of their own ----


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The triton backend on CPU tensors; what is read before it was written shows"""
    take_triton(monkeypatch)
    with oracle.poisoned_memory(), on_cpu(64):
        yield


OPS = (sslops.clip, sslops.siglip)


def of_both(n: int, d: int, dtype: torch.dtype, scale: float, noise: float = 1.0) -> None:
    """All gradients; clip's tops are searched for, as the scale is learned"""
    inputs = of_clip.pairs(n, d, dtype, noise=noise) | {"logit_scale": torch.tensor(scale)}
    oracle.check(of_clip.losses, inputs, "triton", dtype=dtype)
    oracle.check(of_siglip.loss, inputs | {"bias": torch.tensor(-scale / 2)}, "triton", dtype=dtype)


def fixed_tops(n: int, d: int, dtype: torch.dtype, scale: float) -> None:
    oracle.check(of_clip.losses, of_clip.pairs(n, d, dtype), "triton", logit_scale=scale)


def biases(scale: float, bias: float) -> None:
    oracle.check(of_siglip.loss, of_clip.pairs(40, 20), "triton", logit_scale=scale, bias=bias)


def collapsed(scale: float) -> None:
    """All embeddings equal: terms of size 2 scale cancel in the gradients"""
    image = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)).div(8).repeat(70, 1)
    inputs = {"image": image, "text": image.clone()}
    size = dict.fromkeys(inputs, 2 * scale / float(image[0].norm()) / 64**0.5)
    oracle.check(of_clip.losses, inputs, "triton", logit_scale=scale, normalize=False, scale=size)
    oracle.check(of_siglip.loss, inputs, "triton", normalize=False)


CASES = [
    case(of_both, 1, 3, torch.float32, 10.0),
    *(
        case(of_both, 70, d, dtype, 8.0)
        for d, dtype in ((20, torch.float32), (20, torch.float16), (70, torch.bfloat16))
    ),
    *(case(of_both, 50, 24, dtype, 30.0, 0.1) for dtype in (torch.float32, torch.bfloat16)),  # losses of 1e-7
    case(fixed_tops, 70, 20, torch.float32, 60.0),
    *(case(biases, *numbers) for numbers in ((100.0, -15.0), (5.0, 40.0))),
    case(collapsed, 100.0),
    case(of_clip.test_frozen_towers, *TARGET, ("image", "text")),
    case(of_siglip.test_frozen_towers, *TARGET, ("image",)),
    case(of_clip.test_a_scale_that_is_not_positive_is_nan, *TARGET),
    case(of_siglip.test_a_scale_that_is_not_positive_is_nan, *TARGET),
    *(case(of_clip.test_metrics, *TARGET, dtype, sslops.siglip) for dtype in (torch.float32, torch.bfloat16)),
    *(case(of_nearest.test_ties_go_to_the_lowest_id, *TARGET, shape) for shape in ((5, 7, 3, 7), (70, 300, 5, 1))),
    *(case(of_nearest.test_nobody_is_his_own_neighbour, *TARGET, *each) for each in ((2, 1), (70, 2))),
    case(of_nearest.test_numbers_before_nan, *TARGET, 6),
    case(of_nearest.test_values_and_their_gradients, *TARGET, {"normalize": True, "k": 3}, torch.bfloat16),
    case(of_nearest.test_values_and_their_gradients, *TARGET, {"exclude_self": True, "normalize": True}, torch.float32),
]


@pytest.mark.parametrize("test", CASES)
def test_as_on_the_cpu(test: Callable[[], None]) -> None:
    test()


@pytest.mark.parametrize("scale", [torch.tensor(20.0), 10.0])
def test_parts_of_the_batch(scale: float | Tensor) -> None:
    """As ranks have them: clip's joined sums and the shares of the gradients, siglip's of the others' texts too"""
    image, text = of_clip.pairs(40, 20).values()
    rest = torch.float32, "triton", [True] * 4
    parts = [Part(0, 20, None), Part(20, 20, None)]
    images = [image[part.first : part.first + part.rows] for part in parts]
    x = CLIP(image, text, scale, True, False, "", True, *rest[:2], [True] * 3)
    losses, stats = clip.forward(x)
    sums: list[list[Tensor]] = []
    for part, own in zip(parts, images, strict=True):
        sums.append([])

        def keep(found: Tensor) -> Tensor:
            sums[-1].append(found)
            return torch.stack([found, found])

        clip.forward(x._replace(image=own), part, keep)
    of_all = iter([torch.stack(each) for each in zip(*sums, strict=True)])
    found = clip.forward(x._replace(image=images[0]), parts[0], lambda _: next(of_all))
    torch.testing.assert_close(found[0], losses)
    torch.testing.assert_close(found[1][4], stats[4])
    grad = torch.linspace(0, 2, 40)
    shares = [clip.backward(grad, x._replace(image=own), found[1], p) for own, p in zip(images, parts, strict=True)]
    assert_whole(shares, clip.backward(grad, x, stats))

    y = SigLIP(image, text, scale, -10.0, True, False, "", *rest)
    whole, *gradients = siglip.forward(y)
    each = [siglip.forward(y._replace(image=own), part.first) for own, part in zip(images, parts, strict=True)]
    torch.testing.assert_close(sum(share[0] for share in each), whole)
    assert_whole([share[1:] for share in each], gradients)
    texts, order = text.split(20), (2, 0, 1, 3, 4)  # texts' gradients, which lie beside each other, first
    for i, share in enumerate(each):
        blocks = [siglip.forward(y._replace(image=images[i], text=texts[j]), 20 * (i != j)) for j in range(2)]
        assert_whole([[block[k] / 2 for k in order] for block in blocks], [share[k] for k in order])


def assert_whole(shares: list, whole: list) -> None:
    """The rows of the first lie beside each other, all else adds up"""
    rows, *others = zip(*shares, strict=True)
    for found, expected in zip([torch.cat(rows), *map(sum, others)], whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_the_same_bits_and_empty_batches() -> None:
    for op in OPS:
        leaves = [x.requires_grad_() for x in of_clip.pairs(20, 20).values()]
        runs = [torch.autograd.grad(op(*leaves, backend="triton"), leaves) for _ in range(2)]
        assert all(map(torch.equal, *runs))
        none = [torch.zeros(0, 5, requires_grad=True) for _ in range(2)]
        loss = op(*none, backend="triton")
        assert loss.isnan()
        assert all(x.shape == (0, 5) for x in torch.autograd.grad(loss, none))
    assert sslops.nearest(torch.zeros(0, 5), torch.zeros(3, 5), backend="triton").ids.shape == (0,)


@pytest.mark.parametrize("d", [200, 77])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", OPS)
def test_metrics_of_pairs_that_are_alike(op: Callable, dtype: torch.dtype, d: int) -> None:
    """None exceeds another, whichever tile it is in: by one bit it would"""
    for seed in range(4):
        image = torch.randn(1, d, generator=torch.Generator().manual_seed(seed)).to(dtype).repeat(70, 1)
        for metrics in op(image, image, return_metrics=True, backend="triton")[1]:
            assert metrics.top1 == metrics.top5 == 1


def test_few_launches() -> None:
    """However large: a block of W is one more"""
    image, text = (x.requires_grad_() for x in of_clip.pairs(60, 20).values())
    scale = torch.tensor(8.0, requires_grad=True)
    found = launched(lambda: sslops.clip(image, text, logit_scale=scale, backend="triton").backward())
    assert found == ["_unit", "_unit", "_sums", "_close", "_unit", "_unit", "_weigh", "_gradient", "_gradient"]
    found = launched(lambda: sslops.siglip(image, text, logit_scale=scale, backend="triton").backward())
    assert found == ["_unit", "_unit", "_weigh", "_finish", "_gradient", "_gradient"]
    with torch.no_grad():
        metrics = ["_unit", "_unit", "_similarity", "_unit", "_unit", "_exceeding"]
        of_both = [launched(lambda op=op: op(image, text, return_metrics=True, backend="triton")) for op in OPS]
    assert of_both[0] == ["_unit", "_unit", "_sums", "_close", *metrics]
    assert of_both[1] == ["_unit", "_unit", "_weigh", "_finish", *metrics]
    x = Nearest(image.detach(), text.detach(), 2, False, -1, image.dtype, "triton")
    assert launched(lambda: nearest.forward(x)) == ["_unit", *["_search", "_join"] * 2]
