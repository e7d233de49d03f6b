import functools
import math

import pytest
import torch

import sslops
from sslops._patches import patchify

from . import oracle

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# [B, C, ...], patch size, K: several patches' worth of lanes, ragged ones, one patch, one pixel, more than L, none.
CASES = [
    ((3, 3, 64, 48), 16, 5),
    ((2, 3, 28, 42), 14, 4),
    ((2, 1, 20, 30), (5, 3), 7),
    ((2, 5, 34, 17), 17, 3),
    ((1, 3, 8, 8), 8, 1),
    ((3, 2, 2, 3), 1, 9),
    ((2, 3, 8, 8), 4, 0),
    ((0, 3, 8, 8), 4, 2),
    ((3, 2, 60), 20, 4),
    ((2, 3, 4, 32, 48), (2, 16, 16), 5),
    ((2, 1, 6, 10, 9), (3, 5, 3), 7),
]
each_target = pytest.mark.parametrize(("device", "backend"), oracle.targets("gather_patches"))
each_case = pytest.mark.parametrize(("shape", "patch", "k"), CASES)
each_layout = pytest.mark.parametrize("layout", ["chw", "hwc"])


def sizes(shape, patch):
    return (patch,) * (len(shape) - 2) if isinstance(patch, int) else patch


def images_and_ids(shape, patch, k, *, dtype=torch.float32, device="cpu"):
    """Ids in no order, some of them several times where there are enough."""
    g = torch.Generator().manual_seed(sum(shape))
    count = math.prod(side // p for side, p in zip(shape[2:], sizes(shape, patch), strict=True))
    ids = torch.randint(count, (shape[0], k), generator=g)
    if dtype == torch.uint8:
        return torch.randint(256, shape, generator=g).to(device, dtype), ids.to(device)
    return torch.randn(shape, generator=g).to(device, dtype), ids.to(device)


def gather(images, **options):
    return sslops.gather_patches(images, **options)


@each_target
@each_case
@each_layout
@pytest.mark.parametrize("dtype", FLOATS)
def test_accuracy(device, backend, shape, patch, k, layout, dtype):
    images, ids = images_and_ids(shape, patch, k, dtype=dtype, device=device)
    means, stds = [0.5 - 0.1 * c for c in range(shape[1])], [0.2 + 0.1 * c for c in range(shape[1])]
    op = functools.partial(sslops.gather_patches, ids=ids, patch_size=patch, layout=layout)
    with oracle.poisoned_memory():
        oracle.check(op, {"images": images}, backend)
        oracle.check(functools.partial(op, mean=means), {"images": images}, backend)
        oracle.check(functools.partial(op, mean=means, std=stds, dtype=torch.float32), {"images": images}, backend)


@each_target
@each_layout
def test_pixels_are_copied_bit_by_bit(device, backend, layout):
    for dtype in FLOATS:
        images, ids = images_and_ids((2, 3, 32, 48), 16, 6, dtype=dtype, device=device)
        images *= torch.exp(10 * torch.randn_like(images))
        images[0, 0, 0, :4] = torch.tensor([float("inf"), float("-inf"), float("nan"), 6e-8])
        expected = patchify(images, (16, 16), layout).gather(1, ids[:, :, None].expand(-1, -1, 768))
        got = sslops.gather_patches(images, ids, 16, layout=layout, backend=backend)
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@each_target
@each_case
@each_layout
@pytest.mark.parametrize("dtype", [None, *FLOATS])
def test_uint8(device, backend, shape, patch, k, layout, dtype):
    images, ids = images_and_ids(shape, patch, k, dtype=torch.uint8, device=device)
    means, stds = [0.485] * shape[1], [0.2 + 0.1 * c for c in range(shape[1])]
    for options in ({}, {"mean": means}, {"std": stds}, {"mean": means, "std": stds}):
        call = functools.partial(sslops.gather_patches, images, ids, patch, layout=layout, dtype=dtype, **options)
        with oracle.poisoned_memory():
            got = call(backend=backend)
        mean, std = (
            torch.tensor(options.get(name, [default] * shape[1]), dtype=torch.float64, device=device).view(
                -1, *[1] * len(shape[2:])
            )
            for name, default in (("mean", 0.0), ("std", 1.0))
        )
        truth = patchify((images.double() / 255 - mean) / std, sizes(shape, patch), layout)
        truth = truth.gather(1, ids[:, :, None].expand(-1, -1, truth.shape[2]))
        answers = [[got], [call(backend="eager")], [truth]]
        oracle.assert_promise(["patches"], lambda _, answers=answers: answers, [], dtype or torch.float32)


@each_target
@each_layout
@pytest.mark.parametrize("dtype", [*FLOATS, torch.uint8])
@pytest.mark.parametrize("view", ["channels_last", "transposed", "frames", "slice", "expanded", "negated"])
def test_any_strides(device, backend, layout, dtype, view):
    images, ids = images_and_ids((3, 3, 32, 24), 8, 5, dtype=dtype, device=device)
    images = {
        "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
        "transposed": lambda x: x.transpose(2, 3),
        "frames": lambda x: x.view(3, 3, 4, 8, 24)[:, :, ::2].transpose(2, 3),
        "slice": lambda x: x[:, :2, 8:, ::3],
        "expanded": lambda x: x[:1, :1].expand(3, 4, -1, -1),
        "negated": lambda x: torch._neg_view(x) if x.is_floating_point() else x[..., 1:17],
    }[view](images)
    patch = 8 if images.dim() == 4 else (4, 2, 8)
    patches = math.prod(side // p for side, p in zip(images.shape[2:], sizes(images.shape, patch), strict=True))
    options = {"patch_size": patch, "ids": ids % patches, "layout": layout}
    if dtype == torch.uint8:
        expected = sslops.gather_patches(images.contiguous(), **options, backend=backend)
        assert torch.equal(sslops.gather_patches(images, **options, backend=backend), expected)
    else:
        oracle.check(functools.partial(gather, **options), {"images": images}, backend)


@each_target
def test_each_pixel_of_each_patch(device, backend):
    """Every value of an image knows where it was: both layouts against einops-like indexing, written out."""
    shape, (height, width) = (2, 3, 6, 8), (3, 2)
    images = torch.arange(2 * 3 * 6 * 8, dtype=torch.float32, device=device).view(shape)
    ids = torch.arange(8, device=device).expand(2, -1)
    chw, hwc = (sslops.gather_patches(images, ids, (height, width), layout=x, backend=backend) for x in ("chw", "hwc"))
    for i in range(8):
        y, x = i // 4 * height, i % 4 * width
        patch = images[:, :, y : y + height, x : x + width]
        assert torch.equal(chw[:, i], patch.flatten(1))
        assert torch.equal(hwc[:, i], patch.permute(0, 2, 3, 1).flatten(1))


@each_target
def test_each_value_of_a_tubelet(device, backend):
    """VideoMAE's "chw" is a Conv3d's weight; MAE-ST's and VideoMAE's target "hwc": frames, rows, columns, channels"""
    images = torch.arange(2 * 3 * 4 * 6 * 8, dtype=torch.float32, device=device).view(2, 3, 4, 6, 8)
    ids = torch.arange(2 * 2 * 4, device=device).expand(2, -1)
    chw, hwc = (sslops.gather_patches(images, ids, (2, 3, 2), layout=x, backend=backend) for x in ("chw", "hwc"))
    for i in range(16):
        t, y, x = 2 * (i // 8), 3 * (i // 4 % 2), 2 * (i % 4)
        patch = images[:, :, t : t + 2, y : y + 3, x : x + 2]
        assert torch.equal(chw[:, i], patch.flatten(1))
        assert torch.equal(hwc[:, i], patch.permute(0, 2, 3, 4, 1).flatten(1))
    signal = images[:, :, 0, 0]
    pieces = sslops.gather_patches(signal, ids[:, :4], 2, layout="hwc", backend=backend)
    assert torch.equal(pieces, signal.transpose(1, 2).reshape(2, 4, 6))


@each_target
@pytest.mark.parametrize("dtype", FLOATS)
def test_ids_that_repeat_add_up(device, backend, dtype):
    """In float32, whatever the dtype: 300 ones are 300 in bfloat16 too, which a running sum in it never reaches."""
    images = torch.zeros(2, 1, 4, 8, device=device, dtype=dtype, requires_grad=True)
    ids = torch.tensor([[1] * 300, [0] * 299 + [1]], device=device)
    (grad,) = torch.autograd.grad(sslops.gather_patches(images, ids, 4, backend=backend).sum(), images)
    sums = grad.float().view(2, 4, 2, 4).mean((1, 3))
    assert sums.tolist() == [[0, 300], [float(torch.tensor(299.0).to(dtype)), 1]]


@each_target
@each_layout
def test_same_bits_every_run(device, backend, layout):
    images, ids = images_and_ids((5, 3, 64, 64), 16, 40, device=device)
    threads = torch.get_num_threads()
    op = functools.partial(gather, ids=ids, patch_size=16, layout=layout)
    first = oracle.evaluate(op, [images], backend)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert all(map(torch.equal, first, oracle.evaluate(op, [images], backend)))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_instruction_set(isa, dtype):
    for layout in ("chw", "hwc"):
        images, ids = images_and_ids((2, 3, 32, 38), (16, 19), 5, dtype=dtype)
        oracle.check(functools.partial(gather, ids=ids, patch_size=(16, 19), layout=layout), {"images": images}, "cpu")


@each_target
def test_int32_ids(device, backend):
    images, ids = images_and_ids((2, 3, 16, 16), 4, 5, device=device)
    for chosen in (backend, "eager"):
        got, expected = (oracle.evaluate(functools.partial(gather, ids=i, patch_size=4), [images], chosen)
                         for i in (ids.int(), ids))  # fmt: skip
        assert all(map(torch.equal, got, expected))


def test_gradients_of_the_reference():
    images, ids = images_and_ids((2, 2, 4, 6), 2, 4)
    op = functools.partial(gather, ids=ids, patch_size=2, layout="hwc", mean=[0.1, 0.2], std=[2.0, 3.0])
    assert torch.autograd.gradcheck(op, images.double().requires_grad_())
    assert torch.autograd.gradgradcheck(op, images.double().requires_grad_())


@each_target
@pytest.mark.parametrize("factors", [[], [0.5, 2.0, 3.0]])
def test_opcheck(device, backend, factors):
    images, ids = images_and_ids((2, 3, 8, 12), 4, 3, device=device)
    arguments = (images.requires_grad_(), ids, [4, 4], "hwc", factors, factors, torch.float32, backend)
    torch.library.opcheck(torch.ops.sslops.gather_patches.default, arguments)
    with torch.no_grad():
        patches = torch.ops.sslops.gather_patches(*arguments)
        detached = (patches, images.detach(), *arguments[1:])
        torch.library.opcheck(torch.ops.sslops.gather_patches_backward.default, detached)


@each_target
def test_compile(device, backend):
    images, ids = images_and_ids((12, 3, 16, 16), 4, 6, device=device)
    oracle.assert_compiles(
        lambda x: sslops.gather_patches(x * 2, ids[: len(x)], 4, mean=[0.1] * 3, backend=backend), images
    )


@each_target
def test_second_derivative(device, backend):
    images, ids = images_and_ids((2, 3, 8, 8), 4, 2, device=device)
    images.requires_grad_()
    patches = sslops.gather_patches(images, ids, 4, backend=backend)
    (gradient,) = torch.autograd.grad(patches.square().sum(), images, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='eager'"):
        gradient.sum().backward()


def test_bad_input():
    images, ids = images_and_ids((2, 3, 8, 12), 4, 3)

    def refused(error, argument, *args, **kwargs):
        oracle.assert_refused(error, "gather_patches", argument, lambda: sslops.gather_patches(*args, **kwargs))

    refused(TypeError, "images", [images], ids, 4)
    refused(TypeError, "images", images.int(), ids, 4)
    refused(TypeError, "images", images.to_sparse(), ids, 4)
    refused(ValueError, "images", images[0, 0], ids, 4)
    refused(ValueError, "images", images[:, :, None, None], ids, 4)
    refused(ValueError, "images", images, ids, 5)
    refused(ValueError, "images", images[:, :, :0], ids, 4)
    refused(TypeError, "ids", images, ids.tolist(), 4)
    refused(TypeError, "ids", images, ids.short(), 4)
    refused(ValueError, "ids", images, ids[0], 4)
    refused(ValueError, "ids", images, ids[:1], 4)
    refused(ValueError, "ids", images, ids.to("meta"), 4)
    refused(TypeError, "patch_size", images, ids, 4.0)
    refused(ValueError, "patch_size", images, ids, (4, 4, 4))
    refused(TypeError, "patch_size", images, ids, (4, 4.0))
    refused(TypeError, "patch_size", images, ids, ())
    refused(ValueError, "patch_size", images, ids, 0)
    refused(ValueError, "layout", images, ids, 4, layout="nhwc")
    refused(TypeError, "dtype", images, ids, 4, dtype=torch.uint8)
    for name in ("mean", "std"):
        refused(TypeError, name, images, ids, 4, **{name: torch.ones(3)})
        refused(TypeError, name, images, ids, 4, **{name: ["0.5"] * 3})
        refused(ValueError, name, images, ids, 4, **{name: [0.5]})
        refused(ValueError, name, images, ids, 4, **{name: [0.5, 0.5, float("nan")]})
    refused(ValueError, "std", images, ids, 4, std=[1.0, 0.0, 1.0])
    refused(ValueError, "backend", images, ids, 4, backend="tpu")
    for bad in (-1, 6):
        wrong = ids.clone()
        wrong[1, 2] = bad
        for backend in ("cpu", "eager"):
            refused(ValueError, "ids[1, 2]", images, wrong, 4, backend=backend)


def test_bad_input_to_the_registered_op():
    images, ids = images_and_ids((2, 3, 8, 12), 4, 3)
    good = (images, ids, [4, 4], "chw", [], [], torch.float32, "cpu")
    patches = torch.ops.sslops.gather_patches(*good)
    for at, bad, named in (
        (1, ids + 6, "ids"),
        (1, ids[:1], "ids"),
        (2, [3, 4], "images"),
        (2, [0, 4], "patch_size"),
        (2, [4, -4], "patch_size"),
        (2, [4], "patch_size"),
        (3, "nhwc", "layout"),
        (4, [1.0], "mean"),
        (5, [1.0] * 2, "std"),
        (5, [1.0, 0.0, 1.0], "std"),
    ):
        arguments = [*good[:at], bad, *good[at + 1 :]]
        with pytest.raises(ValueError, match=f"gather_patches: {named}"):
            torch.ops.sslops.gather_patches(*arguments)
        with pytest.raises(ValueError, match=f"gather_patches: {named}"):
            torch.ops.sslops.gather_patches_backward(patches, *arguments)
    for dtype in (torch.uint8, torch.int64):  # stored as if it were half precision: past the end
        arguments = (*good[:6], dtype, "cpu")
        with pytest.raises(TypeError, match="gather_patches: dtype"):
            torch.ops.sslops.gather_patches(*arguments)
        with pytest.raises(TypeError, match="gather_patches: dtype"):
            torch.ops.sslops.gather_patches_backward(patches.to(dtype), *arguments)
    with pytest.raises(TypeError, match="gather_patches: images: wanted a floating-point tensor"):
        torch.ops.sslops.gather_patches_backward(patches, images.byte(), *good[1:])
    with pytest.raises(RuntimeError, match="gather_patches: backend 'cpu' cannot run here"):
        torch.ops.sslops.gather_patches(*good[:6], torch.float64, "cpu")
    for bad in (patches[:1], patches.half()):
        with pytest.raises(ValueError, match="gather_patches: grad"):
            torch.ops.sslops.gather_patches_backward(bad, *good)
