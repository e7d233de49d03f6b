import math

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


@pytest.mark.parametrize("layout", ["chw", "hwc"])
@pytest.mark.parametrize(
    ("size", "patch"), [((12, 8), 4), ((6,), (2,)), ((4, 6, 8), (2, 3, 4)), ((2, 3, 8), (1, 3, 2))]
)
def test_unpatchify(layout, size, patch):
    images = torch.randn(2, 3, *size)
    sides = (patch,) * len(size) if isinstance(patch, int) else patch
    ids = torch.arange(math.prod(side // p for side, p in zip(size, sides, strict=True))).expand(2, -1)
    patches = sslops.gather_patches(images, ids, patch, layout=layout)
    assert torch.equal(sslops.unpatchify(patches, patch, size, layout=layout), images)


@pytest.mark.parametrize("layout", ["chw", "hwc"])
@pytest.mark.parametrize("norm", ["patch", "channel", "layer"])
def test_denormalize_patches(layout, norm):
    """What has no error at all is the image"""
    images = torch.randint(256, (2, 3, 4, 6, 8), dtype=torch.uint8)
    options = {"norm": norm, "layout": layout, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}
    target = torch.zeros(2, 8, 72, requires_grad=True)
    optimizer = torch.optim.SGD([target], 36 * 16.0)  # the mean of 8 * 72 squares each: one step
    mask = torch.ones(2, 8)
    sslops.masked_prediction(target, images, mask, (2, 3, 4), **options).backward()
    optimizer.step()
    patches = sslops.denormalize_patches(target.detach(), images, (2, 3, 4), **options)
    mean, std = (torch.tensor(options[name])[:, None, None, None] for name in ("mean", "std"))
    expected = (images / 255 - mean) / std
    torch.testing.assert_close(sslops.unpatchify(patches, (2, 3, 4), (4, 6, 8), layout=layout), expected)


def test_bad_input_to_pictures():
    patches, images = torch.randn(2, 6, 48), torch.randn(2, 3, 12, 8)

    def refused(error, function, argument, *args, **kwargs):
        oracle.assert_refused(error, function.__name__, argument, lambda: function(*args, **kwargs))

    refused(TypeError, sslops.unpatchify, "patches", None, 4, (12, 8))
    refused(ValueError, sslops.unpatchify, "patches", patches[:, 1:], 4, (12, 8))
    refused(ValueError, sslops.unpatchify, "patches", patches[..., 1:], 4, (12, 8))
    refused(ValueError, sslops.unpatchify, "size", patches, 4, (12, 9))
    refused(ValueError, sslops.unpatchify, "size", patches, (4, 4), (12, 8, 8))
    refused(TypeError, sslops.unpatchify, "patch_size", patches, 4.0, (12, 8))
    refused(ValueError, sslops.unpatchify, "layout", patches, 4, (12, 8), layout="nhwc")
    refused(ValueError, sslops.denormalize_patches, "pred", patches[:, 1:], images, 4)
    refused(TypeError, sslops.denormalize_patches, "pred", patches.int(), images, 4)
    refused(TypeError, sslops.denormalize_patches, "images", patches, images.int(), 4)
    refused(ValueError, sslops.denormalize_patches, "images", patches, images[..., 1:], 4)
    refused(ValueError, sslops.denormalize_patches, "norm", patches, images, 4, norm="pix")


def test_mae_learns_signals():
    """From patches to loss along one axis: masked pieces of sines of any frequency and phase are filled in"""
    torch.manual_seed(0)
    length, patch, width = 64, 8, 32

    def signals(count: int) -> torch.Tensor:
        frequency, phase = torch.empty(count, 1, 1).uniform_(0.15, 0.5), 2 * math.pi * torch.rand(count, 1, 1)
        return torch.sin(frequency * torch.arange(length) + phase)

    def transformer() -> torch.nn.Module:
        return torch.nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)

    embed = sslops.nn.MaskedPatchEmbed((length,), (patch,), 1, width)
    encoder, decoder, head = transformer(), transformer(), torch.nn.Linear(width, patch)
    mask_token, positions = (torch.nn.Parameter(0.1 * torch.randn(*size)) for size in ((width,), (8, width)))
    parameters = [mask_token, positions, *(x for each in (embed, encoder, decoder, head) for x in each.parameters())]
    optimizer = torch.optim.Adam(parameters, 5e-3)

    def loss(batch: torch.Tensor, backend: str | None = None) -> torch.Tensor:
        ids, mask, ids_restore = sslops.random_mask(len(batch), length // patch, 0.5, backend=backend)
        tokens = encoder(embed(batch, ids, positions))
        tokens = sslops.restore_tokens(tokens, mask_token, ids_restore, positions, backend=backend)
        predicted = head(decoder(tokens))
        return sslops.masked_prediction(predicted, batch, mask, (patch,), backend=backend)

    for _ in range(150):
        optimizer.zero_grad()
        loss(signals(64)).backward()
        optimizer.step()
    held_out = signals(256)
    torch.manual_seed(1)
    error = loss(held_out)
    torch.manual_seed(1)
    torch.testing.assert_close(loss(held_out, "eager"), error)
    assert error < 0.25 * held_out.var()  # of the mean, which is all that can be said of a piece without the others
