import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import sslops
from benchmarks import peers

from . import oracle

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# [B, C, ...] and patch size: lanes' worth, ragged ones, another channel count, one patch, a signal, tubelets.
CASES = [
    ((3, 3, 64, 48), 16),
    ((2, 3, 28, 42), 14),
    ((2, 1, 20, 30), (5, 3)),
    ((2, 5, 34, 17), 17),
    ((1, 3, 8, 8), 8),
    ((3, 2, 60), 20),
    ((2, 3, 4, 16, 24), (2, 8, 8)),
]
each_target = pytest.mark.parametrize(("device", "backend"), oracle.targets("masked_prediction"))
each_case = pytest.mark.parametrize(("shape", "patch"), CASES)
each_norm = pytest.mark.parametrize("norm", ["patch", None])


def inputs(shape, patch, *, dtype=torch.float32, device="cpu", scale=1.0, shift=0.0):
    """pred, images and a mask of about three quarters, never of none."""
    g = torch.Generator().manual_seed(sum(shape))
    sides = (patch,) * (len(shape) - 2) if isinstance(patch, int) else patch
    count = math.prod(side // p for side, p in zip(shape[2:], sides, strict=True))
    images = scale * torch.randn(shape, generator=g) + shift
    pred = torch.randn(shape[0], count, shape[1] * math.prod(sides), generator=g)
    mask = (torch.rand(shape[0], count, generator=g) < 0.75).float()
    mask[:, -1] = 1
    return pred.to(device, dtype), images.to(device, dtype), mask.to(device)


def check(pred, images, mask, patch, backend, **options):
    """Against the reference, the images in float64 for the truth."""
    options = {"norm": "patch"} | options

    def op(pred, *, backend):
        wide = images.double() if pred.dtype == torch.float64 and images.is_floating_point() else images
        return sslops.masked_prediction(pred, wide, mask, patch, backend=backend, **options)

    with oracle.poisoned_memory():
        oracle.check(op, {"pred": pred}, backend)


@each_target
@each_case
@each_norm
@pytest.mark.parametrize("dtype", FLOATS)
def test_accuracy(device, backend, shape, patch, norm, dtype):
    check(*inputs(shape, patch, dtype=dtype, device=device), patch, backend, norm=norm)


@each_target
@each_norm
@pytest.mark.parametrize("dtype", FLOATS)
def test_other_dtype_of_pred(device, backend, norm, dtype):
    pred, images, mask = inputs((2, 3, 32, 32), 8, device=device)
    check(pred.to(dtype), images, mask, 8, backend, norm=norm)
    check(pred, images.to(dtype), mask, 8, backend, norm=norm)


@each_target
@each_norm
@pytest.mark.parametrize(("shape", "patch"), [((2, 3, 32, 32), 16), ((2, 1, 4, 10, 6), (2, 5, 3))])
def test_uint8_images(device, backend, norm, shape, patch):
    pred, images, mask = inputs(shape, patch, device=device)
    images = (images * 80 + 128).clamp(0, 255).byte()
    means, stds = [0.4, 0.5, 0.6][: shape[1]], [0.2, 0.3, 0.5][: shape[1]]
    check(pred, images, mask, patch, backend, norm=norm)
    check(pred, images, mask, patch, backend, norm=norm, mean=means, std=stds)
    check(pred, images.float(), mask, patch, backend, norm=norm, mean=means)


@each_target
@pytest.mark.parametrize(
    ("scale", "shift"), [(1e-3, 0.0), (1e-8, 0.0), (1e4, 0.0), (1.0, 1e3), (1e-2, 1.0), (1e18, 0.0)]
)
def test_magnitudes(device, backend, scale, shift):
    pred, images, mask = inputs((2, 3, 32, 32), 16, device=device, scale=scale, shift=shift)
    check(pred, images, mask, 16, backend)


@each_target
def test_trained(device, backend):
    """A loss near zero: the difference is what float32 leaves of two numbers. The images are drawn anew, too."""
    pred, images, mask = inputs((2, 3, 32, 32), 16, device=device)
    target = sslops._patches.patchify(images.double(), (16, 16), "hwc")
    mean, scale = sslops._patches.moments(target, 3, "hwc", "patch", 1e-6)
    pred = ((target - mean) / scale + 1e-3 * pred).float()

    def answers(draw):
        def loss(pred, *, backend):
            return sslops.masked_patch_mse(pred, draw[1].to(pred.dtype), mask, 16, backend=backend)

        found = [oracle.evaluate(loss, draw[:1], each) for each in (backend, "eager")]
        return *found, oracle.evaluate(loss, draw[:1], "eager", torch.float64)

    oracle.assert_promise(["output", "pred"], answers, [pred, images], torch.float32)


@each_target
@pytest.mark.parametrize("value", [0.0, 0.3, -1e4])
def test_constant_patches(device, backend, value):
    pred, images, mask = inputs((2, 3, 32, 32), 16, device=device)
    images[0], images[1, :, :16] = value, torch.tensor([0.1, 0.2, value], device=device)[:, None, None]
    check(pred, images, mask, 16, backend)


@each_target
def test_eps(device, backend):
    pred, images, mask = inputs((2, 3, 32, 32), 16, device=device, scale=1e-3)
    check(pred, images, mask, 16, backend, eps=1e-2)
    check(pred, images, mask, 16, backend, eps=0.0)


@each_target
@each_norm
def test_masks(device, backend, norm):
    pred, images, mask = inputs((2, 3, 32, 48), 8, device=device)
    one = torch.zeros_like(mask)
    one[1, 7] = 1
    for weights in (
        mask.bool(),
        mask.long(),
        mask.int(),
        mask.byte(),
        mask.half(),
        mask.double(),
        torch.ones_like(mask),
        one,
        torch.rand_like(mask),
        mask.t().contiguous().t(),
    ):
        check(pred, images, weights, 8, backend, norm=norm)


@each_target
@pytest.mark.filterwarnings("ignore:var")  # torch's, about no patches
@pytest.mark.parametrize("batch", [2, 0])
def test_nothing_masked(device, backend, batch):
    pred, images, mask = (x[:batch] for x in inputs((2, 3, 32, 32), 8, device=device))
    for chosen in (backend, "eager"):
        leaf = pred.clone().requires_grad_()
        loss = sslops.masked_prediction(leaf, images, torch.zeros_like(mask), 8, backend=chosen)
        (grad,) = torch.autograd.grad(loss, leaf)
        assert loss.item() == 0
        assert grad.shape == pred.shape
        assert not grad.any()


@each_target
def test_visible_patches_are_not_read(device, backend):
    pred, images, mask = inputs((2, 3, 32, 32), 8, device=device)
    expected = oracle.evaluate(
        lambda p, backend: sslops.masked_prediction(p, images, mask, 8, backend=backend), [pred], backend
    )
    visible = (mask == 0).view(2, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    pred[mask == 0] = float("nan")
    images = images.masked_fill(visible, float("inf"))
    got, eager = (
        oracle.evaluate(
            lambda p, backend: sslops.masked_prediction(p, images, mask, 8, backend=backend), [pred], chosen
        )
        for chosen in (backend, "eager")
    )
    assert all(map(torch.equal, got, expected))
    torch.testing.assert_close(eager, expected)
    images[0, 0, -1, -1] = float("nan")
    assert sslops.masked_prediction(pred, images, mask, 8, backend=backend).isnan()


@each_target
@each_norm
@pytest.mark.parametrize("dtype", FLOATS)
def test_any_strides(device, backend, norm, dtype):
    pred, images, mask = inputs((2, 3, 32, 48), 8, dtype=dtype, device=device)
    with_class = torch.cat([torch.full_like(pred[:, :1], float("nan")), pred], 1)[:, 1:]
    turned = pred.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    last = images.contiguous(memory_format=torch.channels_last)
    upright = images.transpose(2, 3).contiguous().transpose(2, 3)
    for p, x in ((with_class, images), (turned, images), (pred, last), (with_class, upright), (pred, images.flip(3))):
        check(p, x, mask, 8, backend, norm=norm)


def mae_loss(imgs, pred, mask, patch, norm):
    """By the paper: patches with channels last, their own mean and variance, the mean over the masked ones."""
    total, masked = 0.0, 0
    axes = [range(0, side, p) for side, p in zip(imgs.shape[2:], patch, strict=True)]
    corners = list(itertools.product(*axes))
    for n, i in mask.nonzero().tolist():
        window = imgs[n][(slice(None), *(slice(at, at + p) for at, p in zip(corners[i], patch, strict=True)))]
        pixels = window.movedim(0, -1).flatten()
        if norm:
            variance = ((pixels - pixels.mean()) ** 2).sum() / (len(pixels) - 1)
            pixels = (pixels - pixels.mean()) / (variance + 1e-6) ** 0.5
        total, masked = total + ((pred[n, i] - pixels) ** 2).sum() / len(pixels), masked + 1
    return total / masked


@each_norm
@pytest.mark.parametrize(
    ("shape", "patch"), [((2, 3, 12, 8), (4, 4)), ((2, 3, 12), (4,)), ((2, 3, 4, 6, 8), (2, 3, 4))]
)
def test_against_the_formula(norm, shape, patch):
    pred, images, mask = (x.double() for x in inputs(shape, patch))
    expected = mae_loss(images, pred, mask, patch, norm)
    torch.testing.assert_close(sslops.masked_prediction(pred, images, mask, patch, norm=norm), expected)


LOSSES = [
    {"loss": "l1", "layout": "chw"},  # SimMIM
    {"loss": "squared", "norm": "channel"},  # VideoMAE
    {"loss": "smooth_l1", "beta": 0.5, "norm": "layer", "eps": 1e-5},  # I-JEPA
    {"loss": "cosine"},
    {"loss": "cosine", "norm": "channel", "layout": "chw"},
]
each_loss = pytest.mark.parametrize("options", LOSSES, ids=lambda options: "-".join(map(str, options.values())))


@each_target
@each_loss
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_losses(device, backend, options, reduction, dtype):
    for shape, patch in (CASES[1], CASES[2], CASES[-1]):
        pred, images, mask = inputs(shape, patch, dtype=dtype, device=device)
        check(pred, images, mask * 0.5, patch, backend, reduction=reduction, **({"norm": None} | options))


@each_target
@each_loss
def test_features(device, backend, options):
    """Of a teacher, and given patches: any strides, as a decoder's and a teacher's without their class tokens"""
    options = {key: value for key, value in options.items() if value != "channel"}
    for width in (40, 7):
        pred, target = (torch.randn(3, 7, width, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
        pred, target = pred.to(device)[:, 1:], target.to(device)[:, 1:]
        mask = torch.tensor([[1, 1, 0, 0, 1, 0], [0, 0, 0, 1, 0, 0], [0] * 6], dtype=torch.int16, device=device)
        for p, t in ((pred, target), (pred, target.mT.contiguous().mT), (pred, target.bfloat16())):
            check(p, t, mask, None, backend, **({"norm": None} | options))


def test_losses_against_their_formulas():
    pred, target = (torch.randn(2, 6, 48, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
    mask = torch.tensor([[1, 0, 1, 1, 0, 0], [0, 0, 1, 0, 0, 1]], dtype=torch.bool)
    p, t = pred[mask], target[mask]
    layer = F.layer_norm(t, (48,))
    for expected, options in (
        (F.smooth_l1_loss(p, layer), {"loss": "smooth_l1", "norm": "layer", "eps": 1e-5}),
        (F.smooth_l1_loss(p, t, beta=2.0), {"loss": "smooth_l1", "beta": 2.0}),
        (F.l1_loss(p, t), {"loss": "l1"}),
        ((1 - F.cosine_similarity(p, t, dim=-1)).mean(), {"loss": "cosine"}),
    ):
        torch.testing.assert_close(sslops.masked_prediction(pred, target, mask, **options), expected)
        rows = sslops.masked_prediction(pred, target, mask, reduction="none", **options)
        assert not rows[~mask].any()
        torch.testing.assert_close(rows[mask].mean(), expected)
    # The same pixels as patches; SimMIM's order of them is that of a convolution's weight.
    images = torch.randn(2, 3, 8, 12)
    for layout in ("chw", "hwc"):
        patches = sslops._patches.patchify(images, (4, 4), layout)
        a = sslops.masked_prediction(pred, images, mask, 4, loss="l1", layout=layout)
        torch.testing.assert_close(a, sslops.masked_prediction(pred, patches, mask, loss="l1"))


def test_videomae():
    """Its code's target: each channel of a tubelet less its mean, over its unbiased deviation + 1e-6"""
    videos, patch = torch.randn(2, 3, 4, 8, 12), (2, 4, 4)
    videos[0, :, :, :4, :4] *= 1e-5
    tubelets = videos.view(2, 3, 2, 2, 2, 4, 3, 4).permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(2, 12, 32, 3)
    target = (tubelets - tubelets.mean(-2, keepdim=True)) / (tubelets.var(-2, keepdim=True).sqrt() + 1e-6)
    pred, mask = torch.randn(2, 12, 96), torch.rand(2, 12) < 0.9
    expected = F.mse_loss(pred[mask], target.flatten(2)[mask])
    torch.testing.assert_close(sslops.masked_prediction(pred, videos, mask, patch, norm="channel"), expected)


@pytest.mark.parametrize("model", ["ViTMAE", "VideoMAE"])
def test_transformers(model):
    """The values of the library's own models"""
    transformers = pytest.importorskip("transformers")
    peers._let_torchvision_load()
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    sizes |= {"decoder_" + name: value for name, value in sizes.items()} | {"image_size": 16, "patch_size": 4}
    if model == "ViTMAE":
        net = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(norm_pix_loss=True, **sizes)).eval()
        images = torch.randn(2, 3, 16, 16)
        out = net(images)
        found = sslops.masked_patch_mse(out.logits, images, out.mask, 4)
    else:
        config = transformers.VideoMAEConfig(num_frames=4, tubelet_size=2, num_channels=3, **sizes)
        net = transformers.VideoMAEForPreTraining(config).eval()
        videos, mask = torch.randn(2, 4, 3, 16, 16), sslops.tube_mask(2, (2, 4, 4), 0.9)[1].bool()
        out = net(videos, bool_masked_pos=mask)
        assert out.logits.shape == (2, 2 * int(16 * 0.9), 96)
        pred = torch.zeros(2, 32, 96).masked_scatter(mask[..., None], out.logits)
        std, mean = (torch.tensor(x)[:, None, None] for x in ((0.229, 0.224, 0.225), (0.485, 0.456, 0.406)))
        pixels = (videos * std + mean).transpose(1, 2)
        found = sslops.masked_prediction(pred, pixels, mask, (2, 4, 4), norm="channel")
    torch.testing.assert_close(found, out.loss, rtol=1e-5, atol=1e-6)
    ours, theirs = (torch.autograd.grad(loss, out.logits, retain_graph=True)[0] for loss in (found, out.loss))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


@each_target
def test_cosine_of_nothing(device, backend):
    """A row of zeros has no direction: F.normalize's gradient, 1e12 times the other's, in float32 and bounded above"""
    pred, target = torch.randn(1, 3, 8, device=device), torch.randn(1, 3, 8, device=device)
    pred[0, 0], target[0, 1] = 0, 0
    mask = torch.ones(1, 3, device=device)
    got, eager = (
        oracle.evaluate(
            lambda p, backend: sslops.masked_prediction(p, target, mask, loss="cosine", backend=backend), [pred], chosen
        )
        for chosen in (backend, "eager")
    )
    for ours, theirs in zip(got, eager, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_gradients_of_the_reference():
    pred, images, mask = (x.double() for x in inputs((2, 2, 4, 6), 2))
    op = functools.partial(sslops.masked_prediction, target=images, mask=mask, patch_size=2)
    assert torch.autograd.gradcheck(op, pred.requires_grad_())
    assert torch.autograd.gradgradcheck(op, pred)


@each_target
def test_images_get_no_gradient(device, backend):
    pred, images, mask = inputs((2, 3, 16, 16), 8, device=device)
    for chosen in (backend, "eager"):
        leaves = pred.clone().requires_grad_(), images.clone().requires_grad_()
        sslops.masked_prediction(*leaves, mask, 8, backend=chosen).backward()
        assert leaves[0].grad is not None
        assert leaves[1].grad is None


@each_target
@each_norm
def test_same_bits_every_run(device, backend, norm):
    pred, images, mask = inputs((7, 3, 64, 48), 16, device=device)
    op = functools.partial(sslops.masked_prediction, target=images, mask=mask, patch_size=16, norm=norm)
    threads = torch.get_num_threads()
    first = oracle.evaluate(op, [pred], backend)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert all(map(torch.equal, first, oracle.evaluate(op, [pred], backend)))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_instruction_set(isa, dtype):
    for shape, patch in CASES[:3]:
        check(*inputs(shape, patch, dtype=dtype), patch, "cpu")


@each_target
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("first", [1, 2])
def test_backward_twice_and_without_grad(device, backend, dtype, first):
    pred, images, mask = inputs((2, 3, 32, 32), 8, dtype=dtype, device=device)
    leaf = pred.clone().requires_grad_()
    loss = sslops.masked_prediction(leaf, images, mask, 8, backend=backend)
    once = torch.autograd.grad(first * loss, leaf, retain_graph=True)[0]
    expected = once / first
    once.zero_()  # the caller's own, not what the next backward will give
    for factor in (1, 2):
        again = torch.autograd.grad(factor * loss, leaf, retain_graph=True)[0]
        torch.testing.assert_close(again, factor * expected, rtol=0, atol=1e-7 if dtype == torch.float16 else 0)
    assert torch.equal(loss, sslops.masked_prediction(pred, images, mask, 8, backend=backend))


@each_target
@pytest.mark.parametrize("upstream", [float("inf"), float("nan")])
def test_an_upstream_gradient_that_is_no_number(device, backend, upstream):
    """The first backward and the second agree: what is not masked has no part in the loss."""
    pred, images, mask = inputs((2, 3, 32, 32), 8, device=device)
    for chosen in (backend, "eager"):
        loss = sslops.masked_prediction(pred.requires_grad_(), images, mask, 8, backend=chosen)
        for _ in range(2):
            (gradient,) = torch.autograd.grad(loss, pred, loss.new_tensor(upstream), retain_graph=True)
            assert not gradient[mask == 0].any()
            assert not gradient[mask != 0].isfinite().any()


def test_pixels_whose_squares_overflow(isa):
    """Finite, as in the reference: their variance is infinite, and the target 0."""
    pred, images, mask = inputs((2, 3, 32, 32), 8, scale=1e30)
    got, eager = (sslops.masked_patch_mse(pred, images, mask, 8, backend=b) for b in ("cpu", "eager"))
    assert eager.isfinite()
    torch.testing.assert_close(got, eager)


@each_target
def test_batched_gradients(device, backend):
    pred, images, mask = inputs((2, 3, 12, 12), 4, device=device)
    loss = sslops.masked_prediction(pred.requires_grad_(), images, mask, 4, backend=backend)
    factors = torch.tensor([1.0, 3.0], device=device)
    together = torch.autograd.grad(loss, pred, factors, retain_graph=True, is_grads_batched=True)[0]
    apart = [torch.autograd.grad(loss, pred, factor, retain_graph=True)[0] for factor in factors]
    torch.testing.assert_close(together, torch.stack(apart))


@each_target
@each_norm
@pytest.mark.parametrize("needs_grad", [True, False])
def test_opcheck(device, backend, norm, needs_grad):
    pred, images, mask = inputs((2, 3, 8, 12), 4, device=device)
    arguments = (pred.requires_grad_(), images, mask, [4, 4], "hwc", [], [], norm or "", 1e-6)
    arguments = (*arguments, "squared", 1.0, "mean", needs_grad, backend)
    torch.library.opcheck(torch.ops.sslops.masked_prediction.default, arguments)
    with torch.no_grad():
        loss, inverse, _ = torch.ops.sslops.masked_prediction(*arguments)
        detached = (loss, pred.detach(), *arguments[1:], inverse)
        torch.library.opcheck(torch.ops.sslops.masked_prediction_backward.default, detached)


@each_target
def test_compile(device, backend):
    pred, images, mask = inputs((12, 3, 16, 16), 4, device=device)
    oracle.assert_compiles(
        lambda p: sslops.masked_prediction(p * 2, images[: len(p)], mask[: len(p)], 4, backend=backend), pred
    )


@each_target
def test_second_derivative(device, backend):
    pred, images, mask = inputs((2, 3, 8, 8), 4, device=device)
    pred.requires_grad_()
    loss = sslops.masked_prediction(pred, images, mask, 4, backend=backend)
    (gradient,) = torch.autograd.grad(loss, pred, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='eager'"):
        gradient.sum().backward()


def test_autocast():
    """Nothing here is a matmul: float32 stays what it is."""
    pred, images, mask = inputs((2, 3, 16, 16), 8)
    expected = sslops.masked_prediction(pred, images, mask, 8)
    with torch.autocast("cpu", torch.bfloat16):
        for backend in ("cpu", "eager"):
            torch.testing.assert_close(sslops.masked_prediction(pred, images, mask, 8, backend=backend), expected)


def test_memory():
    """64 images of 224^2: beside the gradient (37 MB) nothing; every intermediate of the formula would be as large."""
    grown = oracle.grown_memory(
        "pred, images = torch.randn(64, 196, 768, requires_grad=True), torch.randn(64, 3, 224, 224)\n"
        "mask = torch.ones(64, 196)\n"
        "sslops.masked_patch_mse(pred[:2, :4], images[:2, :, :32, :32], mask[:2, :4], 16).backward(); pred.grad = None",
        "sslops.masked_patch_mse(pred, images, mask, 16).backward()",
    )
    assert grown < 48, f"{grown:.0f} MB"


def test_bad_input():
    pred, images, mask = inputs((2, 3, 8, 12), 4)

    def refused(error, argument, *args, **kwargs):
        oracle.assert_refused(error, "masked_prediction", argument, lambda: sslops.masked_prediction(*args, **kwargs))

    refused(TypeError, "pred", None, images, mask, 4)
    refused(TypeError, "pred", pred.int(), images, mask, 4)
    refused(ValueError, "pred", pred[:, 1:], images, mask, 4)
    refused(ValueError, "target", pred.to("meta"), images, mask, 4)
    refused(ValueError, "mask", pred, images, mask.to("meta"), 4)
    refused(TypeError, "target", pred, images.int(), mask, 4)
    refused(ValueError, "target", pred, images[:, :, 1:], mask, 4)
    refused(ValueError, "target", pred, images, mask)
    refused(TypeError, "target", pred, None, mask)
    refused(ValueError, "pred", pred, torch.ones(2, 6, 47), mask)
    refused(TypeError, "mask", pred, images, mask.to(torch.complex64), 4)
    refused(TypeError, "pred", torch.quantize_per_tensor(pred, 0.1, 0, torch.qint8), images, mask, 4)
    refused(TypeError, "mask", pred, images, torch.quantize_per_tensor(mask, 0.1, 0, torch.qint8), 4)
    refused(ValueError, "norm", pred, images, mask, 4, norm=mask)
    refused(ValueError, "mask", pred, images, mask[..., None], 4)
    refused(ValueError, "pred", pred, images, mask, 2)
    refused(ValueError, "patch_size", pred, images, mask, (2, 4, 4))
    refused(ValueError, "patch_size", pred, images, mask, -4)
    refused(ValueError, "mean", pred, images, mask, 4, mean=[0.5])
    refused(ValueError, "std", pred, images, mask, 4, std=[1.0, 0.0, 1.0])
    for name, wrong in (("loss", "huber"), ("norm", "pix"), ("layout", "nhwc"), ("reduction", "sum")):
        refused(ValueError, name, pred, images, mask, 4, **{name: wrong})
    refused(ValueError, "beta", pred, images, mask, 4, loss="smooth_l1", beta=0.0)
    with pytest.raises(TypeError, match="masked_patch_mse: norm_pix: wanted True or False"):
        sslops.masked_patch_mse(pred, images, mask, 4, norm_pix=1)
    for bad in (-1e-6, float("nan"), float("inf")):
        refused(ValueError, "eps", pred, images, mask, 4, eps=bad)
    refused(ValueError, "backend", pred, images, mask, 4, backend="tpu")


def test_bad_input_to_the_registered_op():
    pred, images, mask = inputs((2, 3, 8, 12), 4)
    good = (pred, images, mask, [4, 4], "hwc", [], [], "patch", 1e-6, "squared", 1.0, "mean", True, "cpu")
    loss, inverse, _ = torch.ops.sslops.masked_prediction(*good)
    for at, bad, named in ((0, pred[:, 1:], "pred"), (1, images[:, :, 1:], "target"), (2, mask[:, 1:], "mask")):
        arguments = [*good[:at], bad, *good[at + 1 :]]
        with pytest.raises(ValueError, match=f"masked_prediction: {named}"):
            torch.ops.sslops.masked_prediction(*arguments)
        with pytest.raises(ValueError, match=f"masked_prediction: {named}"):
            torch.ops.sslops.masked_prediction_backward(loss, *arguments, inverse)
    for bad, named in (((loss[None], inverse), "grad"), ((loss, inverse.double()), "inverse")):
        with pytest.raises(ValueError, match=f"masked_prediction: {named}"):
            torch.ops.sslops.masked_prediction_backward(bad[0], *good, bad[1])


def test_a_gradient_of_new_pages():
    """A large gradient lies in memory of its own, and is what those of its parts are"""
    pred, images = torch.randn(64, 196, 768), torch.randn(64, 3, 224, 224)
    mask = (torch.rand(64, 196) < 0.75).float()

    def gradient(i, j):
        x = pred[i:j].clone().requires_grad_()
        loss = sslops.masked_prediction(x, images[i:j], mask[i:j], 16, norm="patch", reduction="none", backend="cpu")
        return torch.autograd.grad(loss.sum(), x)[0]

    found = gradient(0, 64)
    assert found.nbytes > 32 << 20
    assert torch.equal(found, torch.cat([gradient(i, i + 16) for i in range(0, 64, 16)]))
