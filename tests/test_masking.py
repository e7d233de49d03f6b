import pytest
import torch

import sslops

from . import oracle

each_target = pytest.mark.parametrize(("device", "backend"), oracle.targets("gather_tokens"))


def of_mae(x: torch.Tensor, noise: torch.Tensor, ratio: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    keep = int(x.shape[1] * (1 - ratio))
    shuffle = noise.argsort(dim=1)
    restore = shuffle.argsort(dim=1)
    mask = torch.ones_like(noise)
    mask[:, :keep] = 0
    visible = x.gather(1, shuffle[:, :keep, None].expand(-1, -1, x.shape[2]))
    return visible, mask.gather(1, restore), restore


@each_target
@pytest.mark.parametrize(("length", "ratio"), [(196, 0.75), (10, 0.0), (5, 0.95), (0, 0.5)])
def test_is_mae(device, backend, length, ratio):
    noise = torch.rand(3, length, device=device)
    results = []
    for masking in (
        lambda x: sslops.random_masking(x, ratio, noise=noise, backend=backend),
        lambda x: of_mae(x, noise, ratio),
    ):
        x = torch.randn(3, length, 24, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
        visible, mask, ids_restore = masking(x)
        visible.square().sum().backward()
        results.append([visible.detach(), mask, ids_restore, x.grad])
    assert all(map(torch.equal, *results))


@each_target
def test_checkpointing_draws_the_same_mask(device, backend):
    from torch.utils.checkpoint import checkpoint

    x = torch.randn(3, 50, 8, device=device, requires_grad=True)

    def run(x):
        visible, mask, _ = sslops.random_masking(x, 0.5, backend=backend)
        return visible.square().sum() + (mask.unsqueeze(2) * x).sum()

    gradients = []
    for call in (run, lambda x: checkpoint(run, x, use_reentrant=False)):
        torch.manual_seed(4)
        gradients.append(torch.autograd.grad(call(x), x)[0])
    assert torch.equal(*gradients)


@each_target
def test_compiles(device, backend):
    x = torch.randn(16, 50, 8, device=device)

    def visible(x):
        noise = (x[:, :, 0] * 1e4).sin()
        return sslops.random_masking(x, 0.5, noise=noise.detach(), backend=backend)[0]

    oracle.assert_compiles(visible, x)


def test_bad_input():
    x = torch.randn(3, 50, 8)

    def refused(error, op, argument, *args, **kwargs):
        oracle.assert_refused(error, op, argument, lambda: sslops.random_masking(*args, **kwargs))

    refused(ValueError, "random_masking", "tokens", x[0], 0.5)
    refused(TypeError, "random_masking", "tokens", x.int(), 0.5)
    refused(ValueError, "random_masking", "noise", x, 0.5, noise=torch.rand(3, 50, device="meta"))
    refused(ValueError, "random_masking", "noise", x, 0.5, noise=torch.rand(3, 49))
    refused(ValueError, "random_masking", "mask_ratio", x, 1.0)
