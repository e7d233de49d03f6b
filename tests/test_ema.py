"""EMA as a part of training: what it averages, on which device, what it saves, and in other libraries' hands."""

import contextlib
import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import sslops
from sslops import EMA, cosine_momentum, ema_avg_fn

from .elsewhere import DEVICE, Elsewhere, moved
from .test_ema_update import Net, imported_timm, needs_cuda, pair, perturb, same_bits

BACKENDS = ["cpu", "eager"]
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def values(module: nn.Module) -> list[Tensor]:
    return [x.detach().clone() for x in [*module.parameters(), *module.buffers()]]


def with_buffer(x: Tensor) -> nn.Module:
    module = nn.Module()
    module.register_buffer("mask", x)
    return module


class TestWhatIsAveraged:
    @each_backend
    def test_equal_values_of_any_kind_stay(self, backend):
        x = torch.tensor([-math.inf, math.inf, 0.0, 1.5])
        target = with_buffer(x.clone())
        EMA(target, with_buffer(x.clone()), 0.9, backend=backend).step()
        assert torch.equal(target.mask, x)

    @each_backend
    def test_quantised_parameters_are_copied(self, backend):
        target, online = nn.Linear(2, 2), nn.Linear(2, 2)
        for module, value in ((target, 3), (online, 200)):
            module.packed = nn.Parameter(torch.full((5,), value, dtype=torch.uint8), requires_grad=False)
            module.eighths = nn.Parameter(torch.full((5,), value / 256).to(torch.float8_e4m3fn), requires_grad=False)
        expected = torch.lerp(target.weight.detach(), online.weight.detach(), 0.25)
        EMA(target, online, 0.75, backend=backend).step()
        assert (target.packed == 200).all()
        assert torch.equal(target.eighths.float(), online.eighths.float())
        torch.testing.assert_close(target.weight.detach(), expected)

    @each_backend
    def test_a_shared_frozen_base_stays(self, backend):
        online = nn.Sequential(nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 4, bias=False))
        target = nn.Sequential(online[0], copy.deepcopy(online[1]))
        base = values(online[0])
        perturb(online[1])
        expected = torch.lerp(target[1].weight.detach(), online[1].weight.detach(), 0.25)
        EMA(target, online, 0.75, backend=backend).step()
        assert same_bits(values(target[0]), base)
        torch.testing.assert_close(target[1].weight.detach(), expected)

    def test_what_is_trained_must_not_be_shared(self):
        online = nn.Linear(3, 3)
        for target in (online, copy.copy(online), nn.DataParallel(online)):
            with pytest.raises(ValueError, match=r"EMA: target\.weight: wanted a tensor of its own, or a frozen one"):
                EMA(target, online)

    @each_backend
    def test_complex_parameters(self, backend):
        target, online = nn.Linear(3, 3, dtype=torch.complex64), nn.Linear(3, 3, dtype=torch.complex64)
        expected = 0.75 * target.weight.detach() + 0.25 * online.weight.detach()
        EMA(target, online, 0.75, backend=backend).step()
        torch.testing.assert_close(target.weight.detach(), expected)

    def test_lazy_parameters_are_named(self):
        for lazy, made in ((nn.LazyLinear(3), nn.Linear(4, 3)), (nn.Linear(4, 3), nn.LazyLinear(3))):
            for side, models in (("target", (lazy, made)), ("online", (made, lazy))):
                if isinstance(models[side == "online"], nn.LazyLinear):
                    with pytest.raises(
                        ValueError, match=rf"EMA: {side}\.weight: wanted a parameter that has its shape"
                    ):
                        EMA(*models)

    @each_backend
    @pytest.mark.parametrize(
        ("options", "averaged", "copied"),
        [
            ({"include": "first.weight"}, {"first.weight"}, set()),
            ({"include": ["first", "scale"]}, {"first.weight", "first.bias", "scale"}, set()),
            ({"include": ["*.bias"], "exclude": "body"}, {"first.bias", "tied.bias"}, set()),
            ({"include": lambda name, x: x.requires_grad, "exclude": "body"}, {"first.weight", "tied.bias"}, set()),
            ({"exclude": "body", "copied": ["scale", "tied"]}, {"first.weight", "first.bias"}, {"tied.bias", "scale"}),
            ({"exclude": ("body", "*weight"), "buffers": "copy"}, {"first.bias", "tied.bias"}, {"scale"}),
            ({"exclude": "body", "copied": lambda name, x: x.dim() == 1}, {"first.weight"},
             {"first.bias", "tied.bias", "scale"}),
        ],
        ids=["name", "module", "pattern", "requires_grad", "copied", "buffers", "function"],
    )  # fmt: skip
    def test_a_choice_by_name(self, options, averaged, copied, backend):
        target, online = pair()
        before, current = (dict(m.state_dict()) for m in (copy.deepcopy(target), online))
        del before["cache" if "cache" in before else "tied.weight"], current["tied.weight"]  # first.weight itself
        EMA(target, online, 0.75, backend=backend, **options).step()
        for name, old in before.items():
            new = target.state_dict()[name]
            if name in averaged:
                torch.testing.assert_close(new, torch.lerp(old, current[name], 0.25), msg=name)
            else:
                assert torch.equal(new, current[name] if name in copied else old), name

    def test_what_is_excluded_need_not_be_online(self):
        online = nn.Sequential(nn.Linear(3, 3))
        target = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        with pytest.raises(ValueError, match=r"online\.1\.weight"):
            EMA(target, online)
        EMA(target, online, 0.0, exclude="1").step()
        assert same_bits(values(target[0]), values(online))

    def test_names_that_are_none(self):
        models = pair()
        for argument in ("include", "exclude", "copied"):
            with pytest.raises(ValueError, match=rf"EMA: {argument}: wanted names of .* got 'bodi\.0'"):
                EMA(*models, **{argument: ["first", "bodi.0"]})
            for bad in (3, [3], [], models[0], torch.ones(()), torch.ones(2)):
                with pytest.raises(TypeError, match=rf"EMA: {argument}: wanted names"):
                    EMA(*models, **{argument: bad})

    def test_arguments_are_refused_at_once_and_by_name(self):
        target, online = pair()
        for models, name in (((3, online), "target"), ((target, None), "online"), ((target, Net), "online")):
            with pytest.raises(TypeError, match=rf"^EMA: {name}: wanted a module"):
                EMA(*models)
        with pytest.raises(ValueError, match=r"^EMA: backend: wanted one of"):
            EMA(target, online, backend="nonsense")
        with pytest.raises(TypeError, match=r"^EMA: backend: wanted a name"):
            EMA(target, online, backend=3)
        with pytest.raises(RuntimeError, match=r"^EMA: backend 'cuda' cannot run here: .* cpu"):
            EMA(target, online, backend="cuda")


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*deprecated")
@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, parametrizations.spectral_norm], ids=["old", "new"])
class TestSpectralNorm:
    """Its vectors belong to a weight: an average of them belongs to none."""

    @pytest.mark.parametrize("buffers", ["average", "copy"])
    def test_a_direction_that_turns(self, norm, buffers):
        """By 60 degrees: the average of the vectors is no unit vector, and norms came out a third too large."""
        original = "weight_orig" if norm is nn.utils.spectral_norm else "parametrizations.weight.original"
        turn = torch.tensor([[0.5, -(0.75**0.5)], [0.75**0.5, 0.5]])
        target = norm(nn.Linear(2, 2, bias=False))
        online = copy.deepcopy(target)
        for module, direction in ((target, torch.tensor([1.0, 0.0])), (online, turn @ torch.tensor([1.0, 0.0]))):
            with torch.no_grad():
                module.get_parameter(original).copy_(torch.outer(direction, direction))
            module.train()
            for _ in range(20):
                module(torch.ones(1, 2))
        EMA(target, online, 0.5, buffers=buffers).step()
        assert not any(part.training for part in target.eval().modules())
        found = torch.linalg.matrix_norm(target(torch.eye(2)).detach(), 2)
        assert found.item() == pytest.approx(1, abs=1e-5)

    def test_a_network_in_training(self, norm):
        """Six layers of gain 1 have gain 1 together at most; it is the product of what power iteration misses."""
        online = nn.Sequential(*(norm(nn.Linear(64, 64, bias=False)) for _ in range(6)))
        target = copy.deepcopy(online).eval()
        ema, optimizer = EMA(target, online, 0.996), torch.optim.Adam(online.parameters(), 1e-3)
        for _ in range(400):
            x = torch.randn(32, 64)
            loss = (online(x) - x.roll(1, 1)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ema.step()
        with torch.no_grad():
            gain = torch.linalg.matrix_norm(target(torch.eye(64)), 2).item()
            norms = [torch.linalg.matrix_norm(layer(torch.eye(64)), 2).item() for layer in target]
        assert gain <= 1
        assert max(norms) < 1.05
        assert all(not part.training for part in target.modules())


class TestDevices:
    @pytest.mark.parametrize("half", ["stochastic", "master", "nearest"])
    @pytest.mark.parametrize("there", ["target", "online", "a layer of target", "a layer of both"])
    def test_each_target_on_its_own(self, there, half):
        """The same numbers as on one device: but for stochastic rounding, where each device has its own."""
        target, online = pair()
        target.body[3].bfloat16()
        target.first.half()
        plain = copy.deepcopy((target, online))
        parts = {"target": [target], "online": [online], "a layer of target": [target.body[3]]}
        for module in parts.get(there, [target.first, online.first]):
            moved(module)
        expected = EMA(*plain, 0.75, half=half, backend="eager")
        for _ in range(3):
            expected.step()
        with Elsewhere():
            devices = {name: x.device for name, x in target.state_dict(keep_vars=True).items()}
            assert (DEVICE in devices.values()) == (there != "online")
            momentum = torch.tensor(0.75, device=next(target.parameters()).device)
            ema = EMA(target, online, momentum, half=half, backend="eager")
            for _ in range(3):
                ema.step()
            assert devices == {name: x.device for name, x in target.state_dict(keep_vars=True).items()}
        for name, x in target.state_dict().items():
            apart = half == "stochastic" and x.dtype in (torch.float16, torch.bfloat16)
            tolerance = 8 * torch.finfo(x.dtype).eps if apart else 0
            torch.testing.assert_close(x, plain[0].state_dict()[name], rtol=tolerance, atol=tolerance, msg=name)

    def test_devices_round_apart(self):
        online = nn.ModuleList(nn.Linear(50, 50).bfloat16() for _ in range(2))
        target = copy.deepcopy(online)
        for module in (target, online):
            moved(module[1])
            for x in module.parameters():
                nn.init.constant_(x, 1.0 if module is target else 1.5)
        with Elsewhere():
            EMA(target, online, 0.999).step()
        first, second = (layer.weight > 1 for layer in target)
        assert 0 < first.sum() < first.numel()
        assert not torch.equal(first, second)

    def test_a_model_that_moves_later(self):
        target, online = pair()
        plain = copy.deepcopy((target, online))
        ema, expected = EMA(target, online, 0.75, backend="eager"), EMA(*plain, 0.75, backend="eager")
        for tensors in (None, online, target):
            with Elsewhere():
                if tensors is not None:
                    moved(tensors)
                ema.step()
            expected.step()
        assert same_bits(values(target.body), values(plain[0].body))

    def test_a_source_that_changes_its_shape(self):
        """A copy of it on the target's device would take another shape by broadcasting."""
        target, online = nn.Linear(3, 4), moved(nn.Linear(3, 4))
        with Elsewhere():
            ema = EMA(target, online)
            ema.step()
            online.weight = nn.Parameter(torch.ones(3))
            moved(online)
            with pytest.raises(ValueError, match=r"EMA: online\.weight: wanted the shape of target's, \[4, 3\]"):
                ema.step()

    def test_the_default_device_does_not_matter(self):
        target, online = (module.bfloat16() for module in pair())
        plain = copy.deepcopy((target, online))
        EMA(*plain, 0.9).step()
        torch.set_default_device("meta")
        try:
            ema = EMA(target, online, 0.9)
            ema.step()
            ema.load_state_dict(ema.state_dict())
        finally:
            torch.set_default_device(None)
        assert same_bits(list(target.parameters()), list(plain[0].parameters()))

    @needs_cuda
    def test_average_on_the_cpu(self):
        target, online = pair()
        plain = copy.deepcopy((target, online))
        online.cuda()
        for ema in (EMA(target, online, 0.75), EMA(*plain, 0.75)):
            ema.step()
        assert same_bits(list(target.parameters()), list(plain[0].parameters()))


class TestSwap:
    @each_backend
    def test_there_and_back(self, backend):
        target, online = pair()
        ema = EMA(target, online, 0.75, backend=backend)
        ema.step()
        perturb(online)
        averages, weights = target.state_dict(), online.state_dict()
        before = copy.deepcopy((averages, weights))
        places = [x.data_ptr() for x in (*averages.values(), *weights.values())]
        cached = online.cache.clone()
        for fails in (False, True):
            with pytest.raises(KeyError) if fails else contextlib.nullcontext(), ema.swap() as model:
                assert model is online
                assert torch.is_grad_enabled()
                for name, x in online.state_dict().items():
                    assert torch.equal(x, before[0][name]), name
                for name, x in target.state_dict().items():
                    assert torch.equal(x, before[1][name]), name
                for call in (ema.step, lambda: ema.swap().__enter__()):
                    with pytest.raises(RuntimeError, match=r"EMA: .* inside swap\(\)"):
                        call()
                if fails:
                    raise KeyError
            for module, state in zip((target, online), before, strict=True):
                for name, x in module.state_dict().items():
                    assert torch.equal(x, state[name]), name
        assert places == [x.data_ptr() for x in (*target.state_dict().values(), *online.state_dict().values())]
        assert torch.equal(online.cache, cached)
        ema.step()

    @pytest.mark.parametrize("half", ["target", "online"])
    def test_other_dtypes_lose_no_bit(self, half):
        target, online = pair()
        (target if half == "target" else online).bfloat16()
        ema = EMA(target, online)
        before = copy.deepcopy((target.state_dict(), online.state_dict()))
        with ema.swap():
            for name, x in online.state_dict().items():
                assert torch.equal(x, before[0][name].to(x.dtype)), name
        for module, state in zip((target, online), before, strict=True):
            assert all(torch.equal(x, state[name]) for name, x in module.state_dict().items())

    def test_what_cannot_be_swapped_changes_nothing(self):
        target, online = pair()
        ema = EMA(target, online)
        before = values(target), values(online)
        kept = online.tied.bias.data
        online.tied.bias.data = torch.zeros(3)
        with pytest.raises(ValueError, match=r"EMA: online\.tied\.bias: wanted the shape of"), ema.swap():
            pass
        online.tied.bias.data = kept
        assert same_bits([*before[0][:5]], values(target)[:5])
        ema.step()
        with ema.swap():
            pass

    def test_tensors_of_one_memory_are_exchanged_once(self):
        target, online = nn.Linear(3, 3), nn.Linear(3, 3)
        for module in (target, online):
            module.other = nn.Parameter(module.weight.data)
        average = target.weight.detach().clone()
        with EMA(target, online).swap():
            assert torch.equal(online.other, average)


class Moco(nn.Module):
    """As README shows it: a module that holds the two models, the average and the queue."""

    def __init__(self, half: str) -> None:
        super().__init__()
        self.online = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8))
        self.target = copy.deepcopy(self.online).bfloat16().requires_grad_(False)
        self.ema = EMA(self.target, self.online, cosine_momentum(20, 0.9), half=half)
        self.queue = sslops.NegativeQueue(40, 8)

    def loss(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.key = self.target((x + 0.1).bfloat16()).float()
        return sslops.info_nce(self.online(x), self.key, self.queue.negatives, temperature=0.2)


class TestState:
    @pytest.mark.parametrize("half", ["stochastic", "master"])
    def test_a_run_resumes_to_the_bit(self, half):
        def run(module: Moco, optimizer: torch.optim.Optimizer, steps: range) -> None:
            for step in steps:
                x = torch.randn(16, 12, generator=torch.Generator().manual_seed(step))
                loss = module.loss(x)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                module.ema.step()
                module.queue.enqueue(module.key, ids=torch.arange(16), labels=torch.arange(16) + step)

        def new() -> tuple[Moco, torch.optim.Optimizer]:
            module = Moco(half)
            return module, torch.optim.SGD(module.online.parameters(), 0.1, momentum=0.9)

        module, optimizer = new()
        run(module, optimizer, range(4))
        file = io.BytesIO()
        torch.save((module.state_dict(), optimizer.state_dict()), file)
        run(module, optimizer, range(4, 9))
        file.seek(0)
        resumed, other = new()  # of other random numbers
        for part, state in zip((resumed, other), torch.load(file), strict=True):
            part.load_state_dict(state)
        assert resumed.ema.steps == 4
        run(resumed, other, range(4, 9))
        state = resumed.state_dict()
        assert list(state) == list(module.state_dict())
        assert any("masters." in name for name in state) == (half == "master")
        for name, x in module.state_dict().items():
            assert torch.equal(x, state[name]), name
        assert resumed.ema.steps == 9

    def test_of_a_module_that_holds_it(self):
        """Its steps, seed and masters, beside the models', which are nobody's twice"""
        module = Moco("master")
        for _ in range(4):
            module.ema.step()
        names = [name for name in module.state_dict() if name.startswith("ema.")]
        half = [n for n, x in module.target.state_dict().items() if x.is_floating_point()]
        assert sorted(names) == sorted(["ema.steps", "ema.seed", *(f"ema.masters.{name}" for name in half)])
        assert len(list(module.parameters())) == 12
        assert not list(module.ema.children())
        other = Moco("master")
        other.load_state_dict(module.state_dict())
        for _ in range(3):
            other.ema.step()
        assert other.ema.steps == 7

    def test_what_is_wrong_changes_nothing(self):
        module, other = Moco("master"), Moco("master")
        module.ema.step()
        state = module.state_dict()
        before = copy.deepcopy(other.ema.state_dict())
        name = "masters.0.weight"
        for change, message in (
            (lambda s: s.pop(name), f'Missing .*"{name}"'),
            (
                lambda s: s.update({name: torch.ones(3)}),
                rf"EMA: {name}: wanted a tensor, torch.float32 \[16, 12\], got",
            ),
            (lambda s: s.update({"masters.7.weight": torch.ones(3)}), 'Unexpected .*"masters.7.weight"'),
        ):
            wrong = {key.removeprefix("ema."): x for key, x in state.items() if key.startswith("ema.")}
            change(wrong)
            with pytest.raises(RuntimeError, match=message):
                other.ema.load_state_dict(wrong)
            if "Unexpected" not in message:
                assert all(torch.equal(x, before[key]) for key, x in other.ema.state_dict().items())

    def test_masters_of_a_model_that_was_cast_since(self):
        """A checkpoint may be loaded before the first step notices."""
        module, other = Moco("master"), Moco("master")
        other.target.float()
        other.ema.step()
        other.target.bfloat16()
        module.ema.step()
        other.load_state_dict(module.state_dict())
        for key, x in module.ema.state_dict().items():
            assert torch.equal(x, other.ema.state_dict()[key])

    def test_moves_and_casts_leave_it_alone(self):
        module = Moco("master")
        module.ema.step()
        module.bfloat16()
        masters = [x for name, x in module.ema.state_dict().items() if "masters" in name]
        assert masters
        assert all(x.dtype == torch.float32 for x in masters)

    def test_a_model_that_holds_its_own_average(self):
        """The online model is the one that is being made, copied or unpickled while EMA is."""
        online = Net()
        online.ema = EMA(copy.deepcopy(online), online, 0.5)
        perturb(online)
        online.ema.step()
        for other in (copy.deepcopy(online), pickle.loads(pickle.dumps(online))):
            assert other.ema.online is other
            assert other.ema.steps == 1
            other.ema.step()
            expected = copy.deepcopy(online)
            expected.ema.step()
            assert same_bits(values(other.ema.target.body), values(expected.ema.target.body))
        assert "ema.steps" in online.state_dict()
        assert not any("target" in name for name in online.state_dict())


class TestPlugs:
    @pytest.mark.parametrize("use_buffers", [False, True])
    def test_averaged_model(self, use_buffers):
        online = Net().body
        averaged = [AveragedModel(online, multi_avg_fn=fn, use_buffers=use_buffers)
                    for fn in (ema_avg_fn(0.9), get_ema_multi_avg_fn(0.9))]  # fmt: skip
        for _ in range(4):
            perturb(online)
            for each in averaged:
                each.update_parameters(online)
        ours, theirs = (each.module.state_dict() for each in averaged)
        for name, x in ours.items():
            if x.is_floating_point():
                torch.testing.assert_close(x, theirs[name], rtol=1e-6, atol=1e-7, msg=name)
            else:
                assert torch.equal(x, online.state_dict()[name])
        with pytest.raises(ValueError, match="ema_avg_fn: momentum"):
            ema_avg_fn(1.5)

    def test_averaged_model_moves_in_bfloat16_and_resumes(self):
        online = nn.Linear(100, 100).bfloat16()
        nn.init.constant_(online.weight, 1)
        averaged = AveragedModel(online, multi_avg_fn=ema_avg_fn(0.999))
        averaged.update_parameters(online)
        nn.init.constant_(online.weight, 1.25)
        for _ in range(500):
            averaged.update_parameters(online)
        resumed = pickle.loads(pickle.dumps(averaged))
        for _ in range(500):
            for each in (averaged, resumed):
                each.update_parameters(online)
        truth = 1.25 - 0.25 * 0.999**1000
        assert abs(averaged.module.weight.double().mean().item() - truth) < 5 * math.sqrt(1000 / 4 / 10_000) * 2**-7
        assert same_bits(values(averaged.module), values(resumed.module))

    def test_timm(self):
        """Its schedule, device and dtype, and our update"""
        timm = imported_timm()
        online = pair()[1].body
        ours, theirs = (timm.ModelEmaV3(online, decay=0.9, use_warmup=True) for _ in range(2))
        average = EMA(ours.module, online)
        ours.apply_update_ = lambda model, decay: average.step(decay)
        for step in range(6):
            perturb(online)
            for each in (ours, theirs):
                each.update(online, step)
        assert average.steps == 6
        for name, x in theirs.module.state_dict().items():
            torch.testing.assert_close(ours.module.state_dict()[name], x, rtol=1e-6, atol=1e-7, msg=name)

    def test_lightning(self, tmp_path):
        lightning = pytest.importorskip("lightning.pytorch")
        from lightning.pytorch.callbacks import WeightAveraging

        class Regression(lightning.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(4, 1)
                self.weights = []

            def training_step(self, batch: Tensor, index: int) -> Tensor:
                return F.mse_loss(self.layer(batch), batch.sum(1, keepdim=True))

            def on_train_batch_end(self, *_: object) -> None:
                self.weights.append(self.layer.weight.detach().clone())

            def configure_optimizers(self) -> torch.optim.Optimizer:
                return torch.optim.SGD(self.parameters(), 0.1)

        results = []
        for function in (ema_avg_fn(0.9), get_ema_multi_avg_fn(0.9)):
            torch.manual_seed(0)
            module = Regression()
            trainer = lightning.Trainer(
                max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                enable_model_summary=False, default_root_dir=tmp_path,
                callbacks=[WeightAveraging(multi_avg_fn=function)],
            )  # fmt: skip
            trainer.fit(module, torch.utils.data.DataLoader(torch.randn(40, 4), batch_size=8))
            results.append((module.layer.weight.detach(), module.weights[-1]))
        torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=1e-7)
        assert not torch.allclose(*results[0])
