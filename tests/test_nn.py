"""The modules beside what they replace."""

import pytest
import torch
from torch import nn

import sslops.nn


@pytest.mark.parametrize("bias", [True, False])
def test_masked_patch_embed(bias):
    """The tokens and gradients of convolution, positions and gather; the weights travel by name."""
    module = sslops.nn.MaskedPatchEmbed((32, 48), (8, 16), 3, 20, bias=bias)
    conv = nn.ModuleDict({"proj": nn.Conv2d(3, 20, (8, 16), stride=(8, 16), bias=bias)})
    module.load_state_dict(conv.state_dict())
    images, positions = torch.randn(5, 3, 32, 48), torch.randn(1, 12, 20)
    ids = torch.rand(5, 12).argsort(1)[:, :7]
    results = []
    for model in (module, conv):
        leaves = [x.clone().requires_grad_() for x in (images, positions)]
        if model is module:
            tokens = module(leaves[0], ids, leaves[1])
        else:
            every = conv["proj"](leaves[0]).flatten(2).transpose(1, 2) + leaves[1]
            tokens = every.gather(1, ids[:, :, None].expand(-1, -1, 20))
        gradients = torch.autograd.grad(tokens.square().sum(), [*model.parameters(), *leaves])
        results.append([tokens, *gradients])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(module(images), conv["proj"](images).flatten(2).transpose(1, 2), rtol=1e-5, atol=1e-5)
