import pytest
import torch
import torch.nn.functional as F

import sslops
from sslops import _C
from sslops.kernels.cpu import siglip as kernel

from . import oracle
from .test_clip import DTYPES, pairs

TARGETS = oracle.targets("siglip")
each_target = pytest.mark.parametrize(("device", "backend"), TARGETS)


def loss(image, text, logit_scale=10.0, bias=-10.0, **kwargs):
    return sslops.siglip(image, text, logit_scale=logit_scale, bias=bias, **kwargs)


def test_against_the_formula():
    """Sec. 3.2 of the paper as a loop, and gradients by differences"""
    image, text = pairs(9, 4, torch.float64).values()
    x = F.normalize(image) @ F.normalize(text).T * 3 - 1
    terms = [F.logsigmoid(x[i, j] if i == j else -x[i, j]) for i in range(9) for j in range(9)]
    torch.testing.assert_close(loss(image, text, 3.0, -1.0), -sum(terms) / 9)
    numbers = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (3.0, -1.0))
    assert torch.autograd.gradcheck(loss, (image.requires_grad_(), text.requires_grad_(), *numbers))


@each_target
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 5), (2, 3), (70, 33), (600, 24)])
def test_accuracy(device, backend, dtype, shape):
    for scale, bias in ((10.0, -10.0), (100.0, -15.0), (1.0, 0.0), (5.0, 40.0)):
        inputs = pairs(*shape, dtype=dtype, device=device)
        inputs |= {"logit_scale": torch.tensor(scale, device=device), "bias": torch.tensor(bias, device=device)}
        with oracle.poisoned_memory():
            oracle.check(loss, inputs, backend, dtype=dtype)


@each_target
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [True, False])
def test_easy_pairs(device, backend, dtype, normalize):
    """Nearly all that is summed is nearly 0."""
    inputs = pairs(130, 24, dtype, device, noise=0.1)
    oracle.check(loss, inputs, backend, logit_scale=60.0, bias=-40.0, normalize=normalize)


@each_target
def test_collapsed(device, backend):
    """All embeddings equal: every pair has the same logit."""
    row = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)).to(device) / 8
    inputs = {"image": row.repeat(300, 1), "text": row.repeat(300, 1)}
    oracle.check(loss, inputs, backend, normalize=False)


@each_target
@pytest.mark.parametrize("frozen", [("image",), ("text",), ("image", "text"), ("logit_scale", "bias")])
def test_frozen_towers(device, backend, frozen):
    """Their gradients are not found, and the others are the same."""
    numbers = {"logit_scale": torch.tensor(8.0, device=device), "bias": torch.tensor(-6.0, device=device)}
    inputs = pairs(90, 24, device=device) | numbers
    every = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    sslops.siglip(**every, backend=backend).backward()
    some = {name: x.clone().requires_grad_(name not in frozen) for name, x in inputs.items()}
    sslops.siglip(**some, backend=backend).backward()
    for name, x in some.items():
        assert (x.grad is None) == (name in frozen)
        if name not in frozen:
            torch.testing.assert_close(x.grad, every[name].grad, rtol=1e-5, atol=0)


@each_target
def test_a_second_backward(device, backend):
    """Forward's gradients are handed out once: the next are found anew, and are the same."""
    leaves = [x.requires_grad_() for x in pairs(60, 8, device=device).values()]
    value = sslops.siglip(*leaves, backend=backend) * 3
    first = torch.autograd.grad(value, leaves, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(value, leaves)))


def test_every_instruction_set(isa):
    with oracle.poisoned_memory():
        oracle.check(loss, pairs(600, 40), "cpu")


@pytest.mark.parametrize("bias", [-80.0, -20.0, -3.0, 0.0, 3.0, 20.0])
def test_softplus_of_any_size(isa, bias):
    """Each term by itself: of rows that meet no other but at logits of 0 + bias"""
    image = torch.eye(6, 8)
    value = sslops.siglip(image, image.clone(), logit_scale=1.0, bias=bias, backend="cpu").double()
    logits = torch.eye(6, dtype=torch.float64) + bias
    truth = -F.logsigmoid((2 * torch.eye(6) - 1) * logits).sum() / 6
    torch.testing.assert_close(value, truth, rtol=3e-7, atol=0)


@each_target
def test_a_scale_that_is_not_positive_is_nan(device, backend):
    image, text = pairs(5, 4, device=device).values()
    for scale in (-1.0, torch.nan):
        assert sslops.siglip(image, text, logit_scale=torch.tensor(scale, device=device), backend=backend).isnan()


def test_memory_is_linear():
    """N = 8192, D = 64: forward and backward in their own process grow by a few N x D, where N x N takes 256 MB."""
    grown = oracle.grown_memory(
        "image, text = (torch.randn(8192, 64, requires_grad=True) for _ in range(2)); "
        "sslops.siglip(image[:1200], text[:1200]).backward()",
        "sslops.siglip(image, text).backward()",
    )
    assert grown < 40, f"{grown:.0f} MB"


def test_bad_input():
    image, text = torch.randn(4, 8), torch.randn(4, 8)

    def refused(error, argument, *args, **kwargs):
        oracle.assert_refused(error, "siglip", argument, lambda: sslops.siglip(*args, **kwargs))

    refused(ValueError, "text", image, text[:3])
    refused(ValueError, "logit_scale", image, text, logit_scale=-1.0)
    refused(ValueError, "bias", image, text, bias=float("inf"))
    refused(TypeError, "bias", image, text, bias="0")
    refused(TypeError, "bias", image, text, bias=torch.tensor(1))
    refused(ValueError, "bias", image, text, bias=torch.ones(2))
    refused(TypeError, "normalize", image, text, normalize=1)
    refused(TypeError, "return_metrics", image, text, return_metrics=1)


class TestPlantedFaults:
    """Broken kernels must not pass."""

    def refuse(self, **kwargs):
        with pytest.raises(AssertionError, match="above"):
            oracle.check(loss, pairs(90, 16), "cpu", **kwargs)

    def test_a_bias_in_bf16(self, monkeypatch):
        run = kernel.forward
        monkeypatch.setattr(kernel, "forward", lambda x: run(x._replace(bias=float(torch.tensor(x.bias).bfloat16()))))
        self.refuse(bias=-10.01)

    def test_a_pair_that_counts_as_another(self, monkeypatch):
        run = _C.siglip_forward
        monkeypatch.setattr(_C, "siglip_forward", lambda *x: run(*x[:6], x[6] + 1, *x[7:]))
        self.refuse()

    def test_unwritten_memory(self, monkeypatch):
        monkeypatch.setattr(_C, "siglip_forward", lambda *args: None)
        with oracle.poisoned_memory():
            self.refuse()
