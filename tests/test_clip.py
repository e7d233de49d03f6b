import pytest
import torch
import torch.nn.functional as F

import sslops
from sslops import _C
from sslops.kernels.cpu import clip as kernel
from sslops.kernels.cpu import exceeding

from . import oracle

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TARGETS = oracle.targets("clip")
each_target = pytest.mark.parametrize(("device", "backend"), TARGETS)


def pairs(n: int, d: int, dtype=torch.float32, device="cpu", noise: float = 1.0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(n * 1000 + d)
    image = torch.randn(n, d, generator=g)
    text = image + noise * torch.randn(n, d, generator=g)
    return {"image": image.to(device, dtype), "text": text.to(device, dtype)}


def losses(image, text, logit_scale=10.0, **kwargs):
    return sslops.clip(image, text, logit_scale=logit_scale, reduction="none", **kwargs)


def test_against_the_formula():
    """Fig. 3 of the paper, and gradients by differences"""
    image, text = pairs(9, 4, torch.float64).values()
    logits = F.normalize(image) @ F.normalize(text).T * 7
    own = torch.arange(9)
    expected = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    torch.testing.assert_close(sslops.clip(image, text, logit_scale=7.0), expected)
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(losses, (image.requires_grad_(), text.requires_grad_(), scale))


@each_target
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 5), (2, 3), (70, 130), (70, 33), (600, 24)])
def test_accuracy(device, backend, dtype, shape):
    """Below and above the scale from which the maxima are looked for"""
    for scale in (1.0, 20.0, 100.0):
        with oracle.poisoned_memory():
            oracle.check(losses, pairs(*shape, dtype=dtype, device=device), backend, logit_scale=scale)


@each_target
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 5), (33, 70), (64, 130), (70, 33), (600, 24), (2100, 16)])
def test_accuracy_of_the_mean(device, backend, dtype, shape):
    """On a CPU forward makes its gradients, from a product that it holds or finds again"""
    for scale in (1.0, 100.0):
        with oracle.poisoned_memory():
            oracle.check(sslops.clip, pairs(*shape, dtype=dtype, device=device), backend, logit_scale=scale)


@each_target
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [20.0, 100.0])
def test_easy_pairs(device, backend, dtype, scale):
    """Losses far below 1: what is left of 1 is what counts"""
    oracle.check(losses, pairs(130, 24, dtype, device, noise=0.1), backend, logit_scale=scale)


@each_target
@pytest.mark.parametrize("scale", [10.0, 100.0])
@pytest.mark.parametrize("normalize", [True, False])
def test_collapsed(device, backend, scale, normalize):
    """All embeddings equal: the loss is log N, whatever the scale; terms of size 2 scale cancel in the gradients."""
    row = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)).to(device) / 8
    size = 2 * scale / float(row.norm()) / 64**0.5
    z = row.repeat(300, 1)
    oracle.check(
        losses, {"image": z, "text": z.clone()}, backend, logit_scale=scale, normalize=normalize,
        scale={"image": size, "text": size},
    )  # fmt: skip


@each_target
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [True, False])
def test_gradient_of_the_scale(device, backend, dtype, normalize):
    inputs = {name: x * 0.3 for name, x in pairs(90, 24, dtype, device).items()}
    inputs["logit_scale"] = torch.tensor(8.0, device=device)
    oracle.check(losses, inputs, backend, dtype=dtype, normalize=normalize)


@each_target
@pytest.mark.parametrize("frozen", [("image",), ("text",), ("image", "text")])
def test_frozen_towers(device, backend, frozen):
    """Their gradients are not found, and the others are the same."""
    inputs = pairs(90, 24, device=device) | {"logit_scale": torch.tensor(8.0, device=device)}
    every = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    sslops.clip(**every, backend=backend).backward()
    some = {name: x.clone().requires_grad_(name not in frozen) for name, x in inputs.items()}
    sslops.clip(**some, backend=backend).backward()
    for name, x in some.items():
        assert (x.grad is None) == (name in frozen)
        if name not in frozen:
            torch.testing.assert_close(x.grad, every[name].grad, rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [5.0, 100.0])
def test_every_instruction_set(isa, scale):
    with oracle.poisoned_memory():
        oracle.check(losses, pairs(600, 40), "cpu", logit_scale=scale)


@each_target
def test_it_is_half_of_two_info_nce(device, backend):
    image, text = pairs(150, 16, device=device).values()
    each = [sslops.info_nce(*views, temperature=0.1) for views in ((image, text), (text, image))]
    torch.testing.assert_close(sslops.clip(image, text, logit_scale=10.0, backend=backend), sum(each) / 2)


@each_target
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", [sslops.clip, sslops.siglip])
def test_metrics(device, backend, dtype, op):
    image, text = pairs(401, 32, dtype, device, noise=2.0).values()
    loss, found = op(image.requires_grad_(), text, return_metrics=True, backend=backend)
    assert torch.equal(loss, op(image, text, backend=backend))
    assert loss.requires_grad
    similarity = F.normalize(image.detach().double()) @ F.normalize(text.double()).T
    positive = similarity.diagonal().clone()
    similarity.fill_diagonal_(-2)
    oracle.assert_metrics(found.image_to_text, positive, similarity, dtype)
    oracle.assert_metrics(found.text_to_image, positive, similarity.T, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_metrics_of_pairs_that_are_alike(isa, dtype):
    """None exceeds another, whichever tile it is in."""
    image = torch.randn(1, 33, generator=torch.Generator().manual_seed(0)).to(dtype).repeat(300, 1)
    for rows in (5, 300):
        for metrics in sslops.clip(image[:rows], image[:rows], return_metrics=True, backend="cpu")[1]:
            assert metrics.top1 == 1


@each_target
def test_a_scale_that_is_not_positive_is_nan(device, backend):
    image, text = pairs(5, 4, device=device).values()
    for scale in (-1.0, torch.nan):
        assert sslops.clip(image, text, logit_scale=torch.tensor(scale, device=device), backend=backend).isnan()


def test_memory_is_linear():
    """N = 8192, D = 64: forward and backward in their own process grow by a few N x D, where N x N takes 256 MB."""
    grown = oracle.grown_memory(
        "image, text = (torch.randn(8192, 64, requires_grad=True) for _ in range(2)); "
        "sslops.clip(image[:1200], text[:1200]).backward()",
        "sslops.clip(image, text).backward()",
    )
    assert grown < 40, f"{grown:.0f} MB"


def test_bad_input():
    image, text = torch.randn(4, 8), torch.randn(4, 8)

    def refused(error, argument, *args, **kwargs):
        oracle.assert_refused(error, "clip", argument, lambda: sslops.clip(*args, **kwargs))

    refused(ValueError, "text", image, text[:3])
    refused(ValueError, "text", image, text.half())
    refused(ValueError, "logit_scale", image, text, logit_scale=0.0)
    refused(ValueError, "logit_scale", image, text, logit_scale=torch.ones(2))
    refused(ValueError, "reduction", image, text, reduction="median")
    refused(TypeError, "normalize", image, text, normalize=1)
    refused(TypeError, "return_metrics", image, text, return_metrics=1)


class TestPlantedFaults:
    """Broken kernels must not pass."""

    def refuse(self, inputs, **kwargs):
        with pytest.raises(AssertionError, match="above"):
            oracle.check(losses, inputs, "cpu", **kwargs)

    def test_the_same_softmax_for_rows_and_columns(self, monkeypatch):
        run = kernel.backward
        swapped = [2, 3, 0, 1, 4]
        monkeypatch.setattr(kernel, "backward", lambda grad, x, stats, *kept: run(grad, x, stats[swapped], *kept))
        self.refuse(pairs(90, 16))

    def test_a_softmax_in_bf16(self, monkeypatch):
        run = kernel.backward
        monkeypatch.setattr(
            kernel, "backward", lambda grad, x, stats, *kept: run(grad, x, stats.bfloat16().float(), *kept)
        )
        self.refuse(pairs(130, 24, noise=0.1))

    def test_unwritten_memory(self, monkeypatch):
        monkeypatch.setattr(_C, "clip_backward", lambda *args: None)
        with oracle.poisoned_memory():
            self.refuse(pairs(40, 8))

    def test_the_gradients_of_a_sum_for_a_mean(self, monkeypatch):
        run = kernel.with_gradients
        monkeypatch.setattr(kernel, "with_gradients", lambda x, factor: run(x, 1.0))
        with pytest.raises(AssertionError, match="above"):
            oracle.check(sslops.clip, pairs(40, 8), "cpu")

    def test_metrics_without_the_last_text(self, monkeypatch):
        run = exceeding.count

        def lost(x, first, of_images, of_texts):
            rows, columns = run(x._replace(text=x.text[:-1]), first, of_images, of_texts[:-1])
            return rows, F.pad(columns, (0, 1))

        monkeypatch.setattr(exceeding, "count", lost)
        with pytest.raises(AssertionError, match="not close"):
            test_metrics("cpu", "cpu", torch.float32, sslops.clip)
