"""Ours in place of transformers', pytorch-metric-learning's and stable-pretraining's: against their own code."""

import copy
import importlib
import importlib.util
import sys
from types import ModuleType

import pytest
import torch
from torch import nn

import sslops
from benchmarks import peers
from sslops.compat import pytorch_metric_learning, stable_pretraining


def against(theirs, ours, inputs, *rest):
    """Values and gradients, theirs in float64 and float32 being the truth and the yardstick"""

    def run(loss, dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        value = loss(*leaves, *rest)
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    for ours_, theirs_, truth in zip(
        run(ours, torch.float32), run(theirs, torch.float32), run(theirs, torch.float64), strict=True
    ):
        allowed = 2 * (theirs_ - truth).norm() + 4e-7 * truth.norm()
        assert (ours_ - truth).norm() <= allowed, ((ours_ - truth).norm(), allowed)


class TestTransformers:
    @pytest.fixture
    def models(self):
        """A small model, and its twin to be patched"""
        pytest.importorskip("transformers")
        peers._let_torchvision_load()  # which transformers imports where it is installed
        home = importlib.import_module("transformers.models.vit_mae.modeling_vit_mae")
        config = home.ViTMAEConfig(
            image_size=32, patch_size=8, hidden_size=24, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=32, decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
            decoder_intermediate_size=24, norm_pix_loss=True,
        )  # fmt: skip
        model = home.ViTMAEForPreTraining(config)
        nn.init.normal_(model.vit.embeddings.position_embeddings)
        nn.init.normal_(model.decoder.decoder_pos_embed)
        return model, copy.deepcopy(model)

    def step(self, model, images, **options):
        torch.manual_seed(3)
        out = model(images, **options)
        out.loss.backward()
        return out, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    @pytest.mark.parametrize("interpolate", [False, True])
    def test_the_loss_and_all_gradients_are_theirs(self, models, interpolate):
        images = torch.rand(3, 3, 48, 48) if interpolate else torch.rand(3, 3, 32, 32)
        theirs, gradients = self.step(models[0], images, interpolate_pos_encoding=interpolate)
        with sslops.patch_transformers():
            ours, found = self.step(models[1], images, interpolate_pos_encoding=interpolate)
        assert torch.equal(ours.ids_restore, theirs.ids_restore)  # the same seed, the same mask
        assert torch.equal(ours.mask, theirs.mask)
        torch.testing.assert_close(ours.loss, theirs.loss)
        torch.testing.assert_close(ours.logits, theirs.logits)
        torch.testing.assert_close(found, gradients)

    def test_our_ops_ran_and_unpatch_brings_theirs_back(self, models, monkeypatch):
        home, ran = importlib.import_module("sslops.compat.transformers"), []
        for name in ("random_mask", "restore_tokens", "masked_patch_mse"):
            op = getattr(home, name)
            monkeypatch.setattr(home, name, lambda *a, op=op, name=name, **k: (ran.append(name), op(*a, **k))[1])
        with sslops.patch_transformers():
            with sslops.patch_transformers():
                pass
            self.step(models[0], torch.rand(2, 3, 32, 32))
            assert models[0](torch.rand(2, 3, 32, 32), return_dict=False)[0].ndim == 0
        assert set(ran) == {"random_mask", "restore_tokens", "masked_patch_mse"}
        ran.clear()
        self.step(models[0], torch.rand(2, 3, 32, 32))
        assert ran == []

    def test_it_compiles_as_theirs_does(self, models):
        images, noise = torch.rand(2, 3, 32, 32), torch.rand(2, 16)
        with sslops.patch_transformers():
            wanted = models[0](images, noise=noise).loss
            found = torch.compile(models[0], fullgraph=True, backend="eager")(images, noise=noise).loss
            torch.testing.assert_close(found, wanted)

    def test_images_of_another_size_are_refused(self, models):
        with (
            sslops.patch_transformers(),
            pytest.raises(ValueError, match=r"pixel_values: wanted shape \[2, 3, 32, 32\]"),
        ):
            models[0](torch.rand(2, 3, 48, 48))

    def test_another_version_is_refused(self, models, monkeypatch):
        home = importlib.import_module("transformers.models.vit_mae.modeling_vit_mae")
        monkeypatch.delattr(home.ViTMAEEmbeddings, "random_masking")
        with pytest.raises(ImportError, match="wanted the ViTMAE of transformers 5, got that of"):
            sslops.patch_transformers()


LABELS = {
    "two views": torch.arange(8).repeat(2),
    "classes": torch.tensor([0, 0, 0, 1, 1, 2, 3, 3, 3, 3, 4, 5, 5, 0, 1, 1]),
    "no pair": torch.arange(16),
    "no negative": torch.zeros(16, dtype=torch.int64),
    "negative labels": torch.arange(16) % 4 - 2,
}


class TestPytorchMetricLearning:
    @pytest.mark.parametrize("name", ["NTXentLoss", "SupConLoss"])
    @pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
    def test_losses(self, labels, name):
        losses = pytest.importorskip("pytorch_metric_learning.losses")
        theirs, ours = (getattr(home, name)(0.2) for home in (losses, pytorch_metric_learning))
        against(theirs, ours, [torch.randn(len(labels), 12)], labels)

    def test_supcon_is_of_the_rows_with_a_loss(self):
        """Rows without a positive are not among those of the mean, which supcon's own counts"""
        z, labels = torch.randn(16, 12), LABELS["classes"]
        ours = pytorch_metric_learning.SupConLoss(0.2)(z, labels)
        torch.testing.assert_close(ours, sslops.supcon(z, labels, temperature=0.2) * 16 / 14)

    def test_references(self):
        losses = pytest.importorskip("pytorch_metric_learning.losses")
        labels, others, rest = torch.arange(6), torch.arange(9) % 7, torch.randn(9, 12)

        def by(loss):
            return lambda x, y: loss(x, labels, ref_emb=y, ref_labels=others)

        against(by(losses.NTXentLoss()), by(pytorch_metric_learning.NTXentLoss()), [torch.randn(6, 12), rest])

    def test_one_pair_of_each_kind_is_no_loss(self):
        losses = pytest.importorskip("pytorch_metric_learning.losses")
        for home in (losses, pytorch_metric_learning):
            z, rows = torch.randn(1, 12), torch.randn(2, 12)
            assert home.NTXentLoss()(z, torch.zeros(1), ref_emb=rows, ref_labels=torch.arange(2.0)) == 0

    def test_references_of_supcon(self):
        losses = pytest.importorskip("pytorch_metric_learning.losses")
        labels, others, rest = torch.arange(6), torch.arange(9) % 7, torch.randn(9, 12)

        def by(loss):
            return lambda x: loss(x, labels, ref_emb=rest.to(x.dtype), ref_labels=others)

        against(by(losses.SupConLoss()), by(pytorch_metric_learning.SupConLoss()), [torch.randn(6, 12)])
        for home in (losses, pytorch_metric_learning):
            z, rows = torch.randn(1, 12), torch.randn(2, 12)
            assert home.SupConLoss()(z, torch.zeros(1), ref_emb=rows, ref_labels=torch.arange(2.0)) == 0

    @pytest.mark.parametrize("name", ["NTXentLoss", "SupConLoss"])
    @pytest.mark.parametrize("masked", [False, True])
    def test_cross_batch_memory(self, masked, name):
        """Filling, full, wrapped; masked as MoCo does it: half are keys for the memory. All backwards at the end"""
        losses = pytest.importorskip("pytorch_metric_learning.losses")
        batches, labels = torch.randn(5, 8, 12), torch.arange(40).view(5, 8) % 3
        mask = torch.arange(8) < 4 if masked else None

        def by(home):
            def run(x):
                memory = home.CrossBatchMemory(getattr(home, name)(0.2), 12, memory_size=20)
                steps = zip(x, labels, strict=True)
                return torch.stack([memory(z, of, enqueue_mask=mask) for z, of in steps]).square().sum()

            return run

        against(by(losses), by(pytorch_metric_learning), [batches])

    def test_two_views_are_nt_xent(self):
        z = torch.randn(16, 12)
        loss = pytorch_metric_learning.NTXentLoss(0.2)(z, torch.arange(8).repeat(2))
        torch.testing.assert_close(loss, sslops.nt_xent(*z.chunk(2), temperature=0.2))

    def test_what_it_refuses(self):
        z, labels = torch.randn(4, 2), torch.arange(4)
        for name in ("NTXentLoss", "SupConLoss"):
            make = getattr(pytorch_metric_learning, name)
            with pytest.raises(TypeError, match=f"{name}: distance: wanted the default"):
                make(distance=None)
            with pytest.raises(TypeError, match=f"{name}: indices_tuple: wanted None"):
                make()(z, labels, (1, 2, 3))
        with pytest.raises(ValueError, match="SupConLoss: ref_emb: wanted a tensor that wants no gradient"):
            make()(z, labels, ref_emb=z.clone().requires_grad_(), ref_labels=labels)
        with pytest.raises(
            TypeError, match="CrossBatchMemory: loss: wanted sslops' NTXentLoss or SupConLoss, got Linear"
        ):
            pytorch_metric_learning.CrossBatchMemory(nn.Linear(2, 2), 2)
        with pytest.raises(TypeError, match="CrossBatchMemory: miner: wanted None"):
            pytorch_metric_learning.CrossBatchMemory(pytorch_metric_learning.NTXentLoss(), 2, miner=print)


class TestStablePretraining:
    @pytest.fixture
    def theirs(self, monkeypatch):
        """Their file of losses, by itself: the package brings Lightning and more. One process gathers nothing."""
        spec = importlib.util.find_spec("stable_pretraining")
        if spec is None or not spec.submodule_search_locations:
            pytest.skip("stable-pretraining is not installed")
        root = ModuleType("stable_pretraining")
        root.__path__ = list(spec.submodule_search_locations)
        utils = ModuleType("stable_pretraining.utils")
        utils.all_gather, utils.all_reduce = lambda x: [x], lambda x: x
        utils.get_rank, utils.get_world_size = lambda: 0, lambda: 1
        package = ModuleType("stable_pretraining.losses")
        package.__path__ = [f"{root.__path__[0]}/losses"]
        for module in (root, utils, package):
            monkeypatch.setitem(sys.modules, module.__name__, module)
        for name in ("utils", "joint_embedding"):
            monkeypatch.delitem(sys.modules, f"stable_pretraining.losses.{name}", raising=False)
        return importlib.import_module("stable_pretraining.losses.joint_embedding")

    @pytest.mark.parametrize("name", ["NTXEntLoss", "VICRegLoss"])
    def test_losses(self, theirs, name):
        x = torch.randn(16, 12)
        views = [x, x + 0.5 * torch.randn(16, 12)]
        against(getattr(theirs, name)(), getattr(stable_pretraining, name)(), views)
        options = {"temperature": 0.1} if name == "NTXEntLoss" else {"sim_coeff": 3.0, "std_coeff": 2.0, "epsilon": 0.1}
        against(getattr(theirs, name)(**options), getattr(stable_pretraining, name)(**options), views)

    def test_sliced_epps_pulley(self, theirs, monkeypatch):
        """The module is by itself, too; their directions are of the counter"""
        backbone, root = ModuleType("stable_pretraining.backbone"), sys.modules["stable_pretraining"]
        backbone.MLP = root.Module = nn.Module
        methods = ModuleType("stable_pretraining.methods")
        methods.__path__ = [f"{root.__path__[0]}/methods"]
        transformers, utils = ModuleType("transformers"), ModuleType("transformers.utils")
        utils.ModelOutput = object
        for module in (backbone, methods, ModuleType("timm"), transformers, utils):
            monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.delitem(sys.modules, "stable_pretraining.methods.lejepa", raising=False)
        original = importlib.import_module("stable_pretraining.methods.lejepa").SlicedEppsPulley
        modules = [make(num_slices=70, n_points=9) for make in (original, stable_pretraining.SlicedEppsPulley)]
        assert modules[0].state_dict().keys() == modules[1].state_dict().keys()
        modules[1].load_state_dict(modules[0].state_dict())
        for _ in range(3):
            x = torch.randn(40, 12, requires_grad=True)
            found = [[loss := module(x), *torch.autograd.grad(loss, x)] for module in modules]
            torch.testing.assert_close(*found)


def open_clip_losses(monkeypatch):
    """open_clip's file of losses, by itself: the package brings torchvision and tokenizers."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("open_clip is not installed")
    root = ModuleType("open_clip")
    root.__path__ = list(spec.submodule_search_locations)
    monkeypatch.setitem(sys.modules, "open_clip", root)
    monkeypatch.delitem(sys.modules, "open_clip.loss", raising=False)
    return importlib.import_module("open_clip.loss")


class TestOpenClip:
    @pytest.fixture
    def theirs(self, monkeypatch):
        return open_clip_losses(monkeypatch)

    def features(self):
        g = torch.Generator().manual_seed(0)
        image = torch.randn(20, 12, generator=g)
        text = image + 0.5 * torch.randn(20, 12, generator=g)
        return [*(nn.functional.normalize(x) for x in (image, text)), torch.tensor(30.0)]

    @pytest.mark.parametrize("local_loss", [False, True])
    def test_clip(self, theirs, local_loss):
        loss = theirs.ClipLoss(local_loss=local_loss)

        def patched(*inputs):
            with sslops.patch_open_clip():
                return loss(*inputs)

        against(loss, patched, self.features())

    def test_siglip(self, theirs):
        loss = theirs.SigLipLoss()

        def patched(*inputs):
            with sslops.patch_open_clip():
                return loss(*inputs)

        against(loss, patched, [*self.features(), torch.tensor([-10.0])])

    def test_outputs(self, theirs):
        """A bias that is nothing to a softmax, but a parameter of the model; none; CoCa's contrastive half"""
        image, text, scale = self.features()
        bias = torch.zeros(1, requires_grad=True)
        logits, labels = torch.randn(20, 5, 7), torch.randint(7, (20, 5))
        coca = theirs.CoCaLoss(2.0, 1.0)
        calls = [
            lambda: theirs.ClipLoss()(image, text, scale, logit_bias=bias * 1, output_dict=True),
            lambda: theirs.SigLipLoss()(image, text, scale, None, output_dict=True),
            lambda: coca(image, text, logits, labels, scale, output_dict=True),
        ]
        expected = [call() for call in calls]
        with sslops.patch_open_clip():
            found = [call() for call in calls]
        torch.testing.assert_close(found, expected)
        assert torch.autograd.grad(found[0]["contrastive_loss"], bias)[0] == 0

    def test_our_ops_ran_and_unpatch_brings_theirs_back(self, theirs, monkeypatch):
        home, ran = importlib.import_module("sslops.compat.open_clip"), []
        for name in ("clip", "siglip"):
            op = getattr(home, name)
            monkeypatch.setattr(home, name, lambda *a, op=op, name=name, **k: (ran.append(name), op(*a, **k))[1])
        losses = theirs.ClipLoss(), theirs.SigLipLoss()
        before = [type(loss).forward for loss in losses]
        with sslops.patch_open_clip():
            with sslops.patch_open_clip():
                pass
            losses[0](*self.features()), losses[1](*self.features(), None)
        assert ran == ["clip", "siglip"]
        assert [type(loss).forward for loss in losses] == before

    def test_what_it_refuses(self, theirs, monkeypatch):
        with sslops.patch_open_clip():
            with pytest.raises(ValueError, match="ClipLoss: use_horovod: wanted False"):
                theirs.ClipLoss(use_horovod=True)(*self.features())
            with pytest.raises(ValueError, match="ClipLoss: gather_with_grad: wanted True beside local_loss=True"):
                theirs.ClipLoss(local_loss=True, world_size=2)(*self.features())
        monkeypatch.setattr(theirs.SigLipLoss, "forward", lambda self, features: features)
        with pytest.raises(ImportError, match=r"wanted open_clip_torch 3, got one with another SigLipLoss.forward"):
            sslops.patch_open_clip()
