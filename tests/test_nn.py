"""The modules beside what they replace."""

import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sslops.nn

from . import oracle

# Each loss: its op, its options, and the inputs that forward takes.
LOSSES = {
    "NTXentLoss": (sslops.nt_xent, {"temperature": 0.2}),
    "BarlowTwinsLoss": (sslops.barlow_twins, {"lambd": 0.01, "scale": 0.1, "route": "gram"}),
    "InfoNCELoss": (sslops.info_nce, {"temperature": 0.2}),
    "CLIPLoss": (sslops.clip, {"logit_scale": 5.0}),
    "SigLIPLoss": (sslops.siglip, {"logit_scale": 5.0, "bias": -3.0}),
    "RELICLoss": (sslops.relic, {"temperature": 0.2, "alpha": 1.0, "beta": 0.5}),
    "VICRegLoss": (sslops.vicreg, {"variance": 5.0, "route": "gram"}),
}


def views(rows: int = 12, width: int = 6) -> list[Tensor]:
    return [torch.randn(rows, width) for _ in range(2)]


def gradients(loss, inputs):
    leaves = [x.clone().requires_grad_() for x in inputs]
    value = loss(*leaves)
    return [value, *torch.autograd.grad(value.sum(), leaves)]


def test_info_nce_of_named_tensors():
    query, key = views()
    named = {"paired_negatives": query[:, None] + torch.randn(12, 3, 6), "negative_mask": torch.rand(12, 12) < 0.5}
    assert torch.equal(
        sslops.nn.InfoNCELoss(0.2)(query, key, **named), sslops.info_nce(query, key, temperature=0.2, **named)
    )


@pytest.mark.parametrize(("name", "op", "options"), [(name, *row) for name, row in LOSSES.items()])
class TestLosses:
    def test_is_its_op(self, name, op, options):
        module, inputs = getattr(sslops.nn, name)(**options), views()
        expected = gradients(lambda *tensors: op(*tensors, **options), inputs)
        copies = [module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
        for copied in copies:
            assert all(map(torch.equal, gradients(copied, inputs), expected))
        assert not module.state_dict()
        assert all(f"{option}={value!r}" in repr(module) for option, value in options.items())

    def test_arguments(self, name, op, options):
        """Those of the op that are no tensors, in its order, with its defaults; they may change between calls."""
        make, inputs = getattr(sslops.nn, name), views()
        theirs = inspect.signature(op).parameters
        arguments = inspect.signature(make).parameters
        assert list(arguments) == [n for n, p in theirs.items() if p.annotation not in (Tensor, Tensor | None)]
        assert all(p.default == theirs[n].default for n, p in arguments.items())
        first, *_ = options
        module = make(**options)
        assert getattr(module, first) == options[first]
        setattr(module, first, 2.0)
        assert torch.equal(module(*inputs), op(*inputs, **{**options, first: 2.0}))
        with pytest.raises(TypeError, match="lamdb"):
            make(**options, lamdb=1.0)

    def test_compiles_and_exports(self, name, op, options):
        module = getattr(sslops.nn, name)(**options)
        oracle.assert_compiles(module, *views())
        inputs, other = views(), views(20)
        rows = torch.export.Dim("rows", min=2)
        exported = torch.export.export(module, tuple(inputs), dynamic_shapes=(({0: rows}, {0: rows}),)).module()
        for tensors in (inputs, other):
            torch.testing.assert_close(exported(*tensors), module(*tensors), rtol=0, atol=0)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_in_a_training_step(self, name, op, options, dtype):
        """Under autocast with a GradScaler and activation checkpointing: the plain step's weights, float32 losses."""
        losses, weights = [], []
        images = [torch.randn(12, 8) for _ in range(2)]
        for plain in (True, False):
            torch.manual_seed(0)
            encoder, loss = nn.Linear(8, 6), getattr(sslops.nn, name)(**options)
            optimizer, scaler = torch.optim.SGD(encoder.parameters(), 0.01), torch.amp.GradScaler("cpu", 256.0)
            for _ in range(3):
                with torch.autocast("cpu", dtype):
                    z = [encoder(x) for x in images]
                    value = loss(*z) if plain else checkpoint(loss, *z, use_reentrant=False)
                assert value.dtype == torch.float32
                scaler.scale(value).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                losses.append(value.item())
            weights.append(encoder.weight)
        assert losses[:3] == losses[3:]
        assert losses[2] < losses[0]
        assert torch.equal(*weights)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_cuda_graph(self, name, op, options):
        """Captured once, replayed on other embeddings."""
        module, static = getattr(sslops.nn, name)(**options), [x.cuda().requires_grad_() for x in views()]

        def step() -> list[Tensor]:
            loss = module(*static)
            return [loss, *torch.autograd.grad(loss, static)]

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for x, other in zip(static, views(), strict=True):
            x.data.copy_(other)
        graph.replay()
        torch.testing.assert_close(captured, step())


def test_options_that_forward_is_given():
    """The model's scale, which is another at every step"""
    module, inputs, scale = sslops.nn.CLIPLoss(reduction="sum"), views(), torch.tensor(3.0, requires_grad=True)
    value = module(*inputs, logit_scale=scale)
    assert torch.equal(value, sslops.clip(*inputs, logit_scale=3.0, reduction="sum"))
    value.backward()
    assert scale.grad is not None
    assert module.logit_scale == 1 / 0.07


@pytest.mark.parametrize(
    "module",
    [sslops.nn.MaskedPatchMSE(8, norm_pix=False), sslops.nn.MaskedPredictionLoss(8, "smooth_l1", norm="layer")],
)
def test_masked_prediction(module):
    images, mask = torch.randn(5, 3, 32, 32), torch.rand(5, 16) < 0.75
    pred, op = torch.randn(5, 16, 192), getattr(sslops, type(module)._op.__name__)
    options = {name: getattr(module, name) for name in inspect.signature(type(module)).parameters}
    expected = gradients(lambda p: op(p, images, mask, **options), [pred])
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    exported = torch.export.export(module, (pred, images, mask)).module()
    for same in (module, pickle.loads(pickle.dumps(module)), compiled):
        assert all(map(torch.equal, gradients(lambda p, f=same: f(p, images, mask), [pred]), expected))
    assert torch.equal(exported(pred, images, mask), expected[0])
    assert repr(module).startswith(f"{type(module).__name__}(patch_size=8, ")


def test_subclass():
    class Halved(sslops.nn.NTXentLoss):
        def forward(self, z0, z1):
            return super().forward(z0, z1) / 2

    inputs = views()
    assert torch.equal(Halved(0.3)(*inputs), sslops.nt_xent(*inputs, temperature=0.3) / 2)

    class Inverse(sslops.nn.NTXentLoss):
        def __init__(self, scale):
            super().__init__(1 / scale)

    assert list(inspect.signature(Inverse).parameters) == ["scale"]
    assert Inverse(5.0).temperature == 0.2


def test_a_learned_temperature_is_a_parameter():
    module = sslops.nn.NTXentLoss(nn.Parameter(torch.tensor(0.3)))
    module(*views()).backward()
    assert module.temperature.grad
    assert list(module.state_dict()) == ["temperature"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("size", "patch", "convolution"),
    [((32, 48), (8, 16), nn.Conv2d), ((96,), 8, nn.Conv1d), ((4, 12, 8), (2, 4, 4), nn.Conv3d)],
)
def test_masked_patch_embed(bias, size, patch, convolution):
    """The tokens and gradients of convolution, positions and gather; the weights travel by name."""
    module = sslops.nn.MaskedPatchEmbed(size, patch, 3, 20, bias=bias)
    conv = nn.ModuleDict({"proj": convolution(3, 20, patch, stride=patch, bias=bias)})
    module.load_state_dict(conv.state_dict())
    images, positions = torch.randn(5, 3, *size), torch.randn(1, 12, 20)
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
    for shape in ((1, 13, 20), (5, 12, 20), (12,)):  # with a class token's, one for each image, of no width
        oracle.assert_refused(
            ValueError, "MaskedPatchEmbed", "pos_embed", lambda s=shape: module(images, ids, torch.randn(s))
        )


@pytest.mark.parametrize(
    ("size", "patch", "other", "mode"),
    [((32, 48), 8, (24, 64), "bicubic"), ((96,), 8, (40,), "linear"), ((4, 12, 8), (2, 4, 4), (6, 8, 8), "trilinear")],
)
def test_masked_patch_embed_at_another_size(size, patch, other, mode):
    """24 patches where the module has 24, too, but elsewhere: a table of the module's grid is interpolated"""
    module = sslops.nn.MaskedPatchEmbed(size, patch, 3, 20)
    images, table = torch.randn(2, 3, *other), torch.randn(1, module.num_patches, 20, requires_grad=True)
    every = module.proj(images).flatten(2).transpose(1, 2)
    grid = module.proj(images).shape[2:]
    ids = torch.rand(2, grid.numel()).argsort(1)[:, :3]
    shaped = table.mT.reshape(1, 20, *module.grid_size)
    expected = every + F.interpolate(shaped, grid, mode=mode, align_corners=False).flatten(2).mT
    expected = expected.gather(1, ids[:, :, None].expand(-1, -1, 20))
    found = module(images, ids, table)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(tokens.square().sum(), table)[0] for tokens in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-4)
    given = torch.randn(grid.numel(), 20)
    if len(given) != module.num_patches:
        torch.testing.assert_close(module(images, None, given), every + given, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="MaskedPatchEmbed: images: wanted a size that patches of"):
        module(images[..., 1:])


def test_masked_patch_embed_of_bytes():
    means, stds = [0.4, 0.5, 0.6], [0.2, 0.3, 0.5]
    module = sslops.nn.MaskedPatchEmbed(32, 8, mean=means, std=stds, embed_dim=20)
    images, ids = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8), torch.tensor([[3, 1], [15, 0]])
    mean, std = (torch.tensor(x)[:, None, None] for x in (means, stds))
    expected = module.proj((images / 255 - mean) / std).flatten(2).mT.gather(1, ids[:, :, None].expand(-1, -1, 20))
    torch.testing.assert_close(module(images, ids), expected, rtol=1e-5, atol=1e-5)


def test_bad_input_to_masked_patch_embed():
    module = sslops.nn.MaskedPatchEmbed((32, 48), (8, 16), 3, 20)
    images, ids = torch.randn(5, 3, 32, 48), torch.zeros(5, 7, dtype=torch.int32)
    assert torch.equal(module(images, ids), module(images, ids.long()))
    beyond = ids.clone()
    beyond[1, 2] = 12

    def refused(error, argument, *args, make=module):
        oracle.assert_refused(error, "MaskedPatchEmbed", argument, lambda: make(*args))

    refused(TypeError, "images", None)
    refused(TypeError, "images", images.int())
    refused(ValueError, "images", images[:, :2])
    refused(ValueError, "images", images[0])
    refused(TypeError, "ids", images, ids.tolist())
    refused(TypeError, "ids", images, ids.float())
    refused(ValueError, "ids", images, ids[0])
    refused(ValueError, "ids", images, ids[:2])
    refused(ValueError, "ids[1, 2]", images, beyond)
    refused(ValueError, "images", images.to("meta"))
    refused(TypeError, "pos_embed", images, ids, 1.0)
    refused(TypeError, "pos_embed", images, ids, torch.ones(12, 20, dtype=torch.int64))
    refused(ValueError, "pos_embed", images, ids, torch.ones(12, 20, device="meta"))
    make = sslops.nn.MaskedPatchEmbed
    refused(TypeError, "img_size", "224", make=make)
    refused(ValueError, "patch_size", 224, 17, make=make)
    refused(ValueError, "patch_size", (224, 224), (2, 16, 16), make=make)
    refused(ValueError, "img_size", (2, 2, 2, 2), 2, make=make)
    refused(TypeError, "in_chans", 224, 16, 3.0, make=make)
    refused(ValueError, "embed_dim", 224, 16, 3, 0, make=make)
