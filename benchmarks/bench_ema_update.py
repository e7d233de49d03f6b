"""The momentum update beside torch's foreach, swa_utils and the libraries' updates, on whole models' tensors."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sslops import EMA, ema_update_

from ._compare import record
from .peers import _installed, _let_torchvision_load, or_failing, solo_file

MOMENTUM = 0.996
F32, BF16 = torch.float32, torch.bfloat16


def vit(width: int, depth: int) -> list[tuple[int, ...]]:
    """The shapes of a ViT with patches of 16 at 224: (768, 12) is ViT-B, 86.6M; (1024, 24) ViT-L, 304M"""
    norm = [(width,)] * 2
    block = [*norm, (3 * width, width), (3 * width,), (width, width), (width,),
             *norm, (4 * width, width), (4 * width,), (width, 4 * width), (width,)]  # fmt: skip
    return [(1, 1, width), (1, 197, width), (width, 3, 16, 16), (width,), *block * depth, *norm, (1000, width), (1000,)]


VIT_B = sum(map(math.prod, vit(768, 12)))
WORK = {("update", "ViT-B, float32"): {"bytes": 12 * VIT_B}, ("update", "ViT-B, bf16"): {"bytes": 6 * VIT_B}}


class ResNet50(nn.Module):
    """The parameters (161) and buffers (159) of torchvision's resnet50, not its forward."""

    def __init__(self) -> None:
        super().__init__()
        convs = [(3, 64, 7)]
        inputs = 64
        for planes, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
            for block in range(blocks):
                convs += [(inputs, planes, 1), (planes, planes, 3), (planes, 4 * planes, 1)]
                convs += [(inputs, 4 * planes, 1)] * (block == 0)
                inputs = 4 * planes
        self.layers = nn.ModuleList(nn.Sequential(nn.Conv2d(*c, bias=False), nn.BatchNorm2d(c[1])) for c in convs)
        self.fc = nn.Linear(inputs, 1000)


def tensors(shapes: list[tuple[int, ...]], dtype: torch.dtype, device: str) -> list[Tensor]:
    return [torch.randn(shape, device=device).to(dtype) for shape in shapes]


def by_foreach(targets: list[Tensor], sources: list[Tensor]) -> Callable[[], None]:
    return lambda: torch._foreach_lerp_(targets, sources, 1 - MOMENTUM)


def by_two_foreach(targets: list[Tensor], sources: list[Tensor]) -> Callable[[], None]:
    """Two passes that promote inside: what lightly and, in mixed precision, timm do."""

    def run() -> None:
        torch._foreach_mul_(targets, MOMENTUM)
        torch._foreach_add_(targets, sources, alpha=1 - MOMENTUM)

    return run


def by_cast(targets: list[Tensor], sources: list[Tensor]) -> Callable[[], None]:
    return lambda: torch._foreach_lerp_(targets, [x.to(targets[0].dtype) for x in sources], 1 - MOMENTUM)


def in_place_pass(targets: list[Tensor], sources: list[Tensor]) -> Callable[[], object]:
    """The limit: a flat tensor that another is added to, the same bytes read and written without any bookkeeping."""
    n = sum(x.numel() for x in targets)
    target, source = (torch.randn(n, device=xs[0].device).to(xs[0].dtype) for xs in (targets, sources))
    return lambda: target.add_(source)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("target", "source"), [(F32, F32), (F32, BF16), (BF16, BF16)], ids=str)
@pytest.mark.parametrize("model", ["ViT-B", "ViT-L"])
def test_vit(benchmark, device, model, target, source):
    if device == "cpu" and model == "ViT-L":
        pytest.skip("as ViT-B")
    shapes = vit(768, 12) if model == "ViT-B" else vit(1024, 24)
    lists = tensors(shapes, target, device), tensors(shapes, source, device)
    variants = {"sslops": lambda: ema_update_(*lists, MOMENTUM), "two foreach": by_two_foreach(*lists)}
    variants |= {"foreach": by_foreach(*lists)} if target == source else {"cast, foreach": by_cast(*lists)}
    limit = None
    if target == source == F32:
        limit = "in-place pass"
        variants[limit] = in_place_pass(*lists)
    n = sum(x.numel() for x in lists[0])
    record(
        benchmark, variants, limit=limit, model=model, target=target, source=source,
        bytes=n * (2 * target.itemsize + source.itemsize),
    )  # fmt: skip


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("source", [F32, BF16], ids=str)
def test_stochastic_rounding(benchmark, device, source):
    lists = tensors(vit(768, 12), BF16, device), tensors(vit(768, 12), source, device)
    variants = {"sslops": lambda: ema_update_(*lists, MOMENTUM, seed=1)}

    @or_failing
    def timm() -> Callable[[], object]:
        _let_torchvision_load()
        from timm.utils.model_ema import _lerp_stochastic_round_bf16_

        generator = torch.Generator(device)
        return lambda: _lerp_stochastic_round_bf16_(*lists, 1 - MOMENTUM, generator=generator)

    if _installed("timm"):
        variants["timm"] = timm()
    record(benchmark, variants, model="ViT-B", target=BF16, source=source, rounding="stochastic")


def model_updates(online: nn.Module) -> dict[str, Callable[[], object]]:
    """Whole updates with all that they check and look up, buffers included where they do that."""
    ours = EMA(copy.deepcopy(online), online, MOMENTUM)
    swa = AveragedModel(online, multi_avg_fn=get_ema_multi_avg_fn(MOMENTUM), use_buffers=True)
    found: dict[str, Callable[[], object]] = {"sslops": ours.step, "swa_utils": lambda: swa.update_parameters(online)}

    @or_failing
    def timm() -> Callable[[], object]:
        _let_torchvision_load()
        from timm.utils import ModelEmaV3

        theirs = ModelEmaV3(online, decay=MOMENTUM)
        return lambda: theirs.update(online)

    @or_failing
    def lightly() -> Callable[[], object]:
        _let_torchvision_load()
        from lightly.models.utils import update_momentum

        target = copy.deepcopy(online)
        return lambda: update_momentum(online, target, MOMENTUM)

    @or_failing
    def solo() -> Callable[[], object]:
        updater = solo_file("solo/utils/momentum.py").MomentumUpdater(MOMENTUM)
        rebound = copy.deepcopy(online)
        return lambda: updater.update(online, rebound)

    packages = {"timm": ("timm", timm), "lightly": ("lightly", lightly), "solo-learn": ("solo", solo)}
    return found | {name: make() for name, (package, make) in packages.items() if _installed(package)}


@pytest.mark.usefixtures("threads")
def test_resnet50(benchmark, device):
    online = ResNet50().to(device)
    record(benchmark, model_updates(online), model="ResNet-50", target=F32, source=F32)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("ours", ["EMA", "ema_update_"])
def test_overhead(benchmark, device, ours):
    """161 tensors of 64 floats: nothing but the call. A hundred calls, so milliseconds mean 10 us."""
    online = nn.ParameterList([nn.Parameter(torch.randn(64, device=device)) for _ in range(161)])
    lists = [p.detach() for p in copy.deepcopy(online)], [p.detach() for p in online]
    step = EMA(copy.deepcopy(online), online, MOMENTUM).step
    calls = {
        "sslops": step if ours == "EMA" else lambda: ema_update_(*lists, MOMENTUM),
        "foreach": by_foreach(*lists),
        "two foreach": by_two_foreach(*lists),
    }

    def repeated(call: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(100):
                call()

        return run

    variants = {name: repeated(call) for name, call in calls.items()}
    record(benchmark, variants, model="161 x 64", target=F32, source=F32, call=ours)
