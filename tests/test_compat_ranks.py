"""Drop-ins over two real processes: lightly's values and gradients, and for solo-learn those of the whole batch."""

import contextlib
import copy
import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import sslops
from benchmarks import peers
from sslops.compat import lightly, solo

from .ranks import Ranks
from .test_compat_others import open_clip_losses


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    ranks = Ranks(2, tmp_path_factory.mktemp("two"))
    yield ranks
    ranks.stop()


def views(rank, *shape):
    torch.manual_seed(rank)
    return [x.requires_grad_() for x in torch.randn(2, *shape).add(0.5 * torch.randn(shape)).unbind()]


CALLS = {  # of those that take other things than two views
    "SwaVLoss": lambda loss, a, b: loss([a, b], [a + b]),
    "MSNLoss": lambda loss, a, b: loss(torch.cat([a, b]), (a + b).detach(), torch.eye(7, 40)),
    "SIGReg": lambda loss, a, b: loss(torch.stack([a, b])),
    "LeJEPALoss": lambda loss, a, b: loss(global_proj=torch.stack([a, b]), local_proj=(a + b)[None]),
    "DINOLoss": lambda loss, a, b: loss([b.detach(), a.detach()], [b, a]),
    "IBOTPatchLoss": lambda loss, a, b: loss(a.detach(), a + b, torch.ones(2, 2, 3, dtype=torch.bool)),
}
GATHER = {"SwaVLoss": {"sinkhorn_gather_distributed": True}, "DINOLoss": {}, "IBOTPatchLoss": {}}


def run_lightly(rank, world, theirs, name, options, shape):
    """Two steps: losses, gradients, and the bank or the centre."""
    home = lightly
    if theirs:
        peers.lightly()
        home = importlib.import_module("lightly.loss")
    torch.manual_seed(5)
    module = getattr(home, name)(**options, **GATHER.get(name, {"gather_distributed": True}))
    found = []
    for _ in range(2):
        inputs = views(rank, *shape)
        beside = [x.detach() for x in views(rank + 9, *shape)] if name == "DetConBLoss" else []
        if "DetCon" in name:
            beside += torch.randint(5, (2, *shape[:2])).unbind()
        loss = CALLS[name](module, *inputs) if name in CALLS else module(*inputs, *beside)
        if name == "CAPILoss":  # whose teacher gets none
            inputs = inputs[1:]
        found += [loss.detach(), *torch.autograd.grad(loss, inputs)]
    return [*found, *module.buffers()] if {"memory_bank_size", "output_dim"} & {*options} else found


@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [
        ("NTXentLoss", {"temperature": 0.2}, (12, 40)),
        ("NTXentLoss", {"temperature": 0.2, "memory_bank_size": (64, 40)}, (12, 40)),
        ("DetConSLoss", {"temperature": 0.2}, (6, 5, 40)),
        ("DetConBLoss", {"temperature": 0.2}, (6, 5, 40)),
        ("BarlowTwinsLoss", {"lambda_param": 0.1}, (12, 40)),
        ("VICRegLoss", {"lambda_param": 2.0}, (12, 40)),
        ("VICRegLoss", {}, (12, 3, 40)),
        ("CAPILoss", {"teacher_temperature": 0.5}, (12, 3, 40)),
        ("DCLLoss", {"temperature": 0.2}, (12, 40)),
        ("DCLWLoss", {"temperature": 0.2}, (12, 40)),
        ("SwaVLoss", {"sinkhorn_epsilon": 0.5}, (12, 40)),
        ("MSNLoss", {}, (12, 40)),
        ("SIGReg", {"num_vectors": 70}, (12, 40)),
        ("LeJEPALoss", {"sigreg_num_vectors": 70}, (12, 40)),
        ("DINOLoss", {"output_dim": 40, "teacher_temp": 0.5}, (12, 40)),
        ("IBOTPatchLoss", {"output_dim": 40, "teacher_temp": 0.5}, (12, 40)),
    ],
)
def test_gather_distributed(ranks, name, options, shape):
    if peers.lightly() is None:
        pytest.skip("lightly is not installed")
    results = [ranks(run_lightly, theirs, name, options, shape) for theirs in (True, False)]
    for theirs, mine in zip(*results, strict=True):
        for x, y in zip(theirs, mine, strict=True):
            torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-6)
    assert not torch.equal(results[1][0][1], results[1][1][1])


def simclr(z, indexes):
    logits = (F.normalize(z) @ F.normalize(z).t() / 0.1).fill_diagonal_(-torch.inf)
    positives = logits.masked_fill(indexes[:, None] != indexes, -torch.inf)
    return logits.logsumexp(1) - positives.logsumexp(1)


def run_simclr(rank, world, indexes):
    z = torch.cat(views(rank, len(indexes[0]) // 2, 16)).detach().requires_grad_()
    loss = solo.simclr_loss_func(z, indexes[rank])
    return z.detach(), loss.detach(), torch.autograd.grad(loss, z)[0]


@pytest.mark.parametrize(
    "indexes",
    [torch.randperm(20).view(2, 10).repeat(1, 2), torch.arange(10).repeat(2, 1), torch.arange(6).repeat(2, 3)],
    ids=["two views", "the same images on both ranks", "three views"],
)
def test_simclr_by_index(ranks, indexes):
    """A rank's loss is its rows' mean; gradients are those of the sum over ranks, for DDP to average."""
    results = ranks(run_simclr, indexes)
    z = torch.cat([z for z, _, _ in results]).double().requires_grad_()
    losses = simclr(z, indexes.flatten()).view(2, -1).mean(1)
    (gradient,) = torch.autograd.grad(losses.sum(), z)
    torch.testing.assert_close(torch.stack([loss for _, loss, _ in results]).double(), losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.cat([g for _, _, g in results]).double(), gradient, rtol=1e-4, atol=1e-6)


def run_solo(rank, world, name):
    inputs = views(rank, 12, 40)
    loss = getattr(solo, name)(*inputs)
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("barlow_loss_func", lambda: (lightly.BarlowTwinsLoss, {}, 0.025)),
        ("vicreg_loss_func", lambda: (lightly.VICRegLoss, {"mu_param": 50.0}, 1.0)),
    ],
)
def test_solo_is_lightly_up_to_its_factors(ranks, name, make):
    loss, options, factor = make()
    theirs = ranks(run_lightly, False, loss.__name__, options, (12, 40))
    for x, y in zip(theirs, ranks(run_solo, name), strict=True):
        for expected, got in zip(x, y, strict=False):  # of the first step
            torch.testing.assert_close(got, factor * expected)


def train(rank, world, steps):
    """DDP, NT-Xent over the ranks, and the momentum update of what DDP wraps."""
    torch.manual_seed(0)
    online, images = nn.Linear(8, 4), torch.randn(steps, 2, 12, 8)
    target = copy.deepcopy(online)
    model = DistributedDataParallel(online) if world > 1 else online
    loss, ema = sslops.nn.NTXentLoss(0.2, group="world" if world > 1 else None), sslops.nn.EMA(target, model, 0.9)
    optimizer = torch.optim.SGD(online.parameters(), 0.1)
    for x in images:
        loss(*model(x.chunk(world, 1)[rank].flatten(0, 1)).chunk(2)).backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.step()
    return [p.detach() for p in target.parameters()]


def test_ddp_with_the_momentum_update(ranks):
    """The targets of one process that has the whole batch, the same bits on both ranks."""
    alone = train(0, 1, 5)
    first, second = ranks(train, 5)
    assert all(map(torch.equal, first, second))
    for x, y in zip(first, alone, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def train_sharded(rank, world, shard):
    """The momentum update between two models that fully_shard shards; the target is used in forward only."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    online = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    target = copy.deepcopy(online).requires_grad_(False)
    images = torch.randn(3, 12, 8)
    if shard:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (world,))
        for module in (online, target):
            fully_shard(module[2], mesh=mesh)
            fully_shard(module, mesh=mesh)
    ema, optimizer = sslops.EMA(target, online, 0.9), torch.optim.SGD(online.parameters(), 0.1)
    for x in images:
        (online(x) - target(x)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.step()
    target(images[0])  # leaves the root gathered
    ema.step()
    return [getattr(x, "full_tensor", lambda x=x: x)() for x in target.state_dict().values()]


def test_the_momentum_update_of_shards(ranks):
    whole = train_sharded(0, 1, False)
    for found in ranks(train_sharded, True):
        for x, y in zip(found, whole, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def pair_up(rank, world):
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (world,))
    models = [nn.Linear(4, 4), nn.Linear(4, 4)]
    for model, placement in zip(models, (Shard(0), Replicate()), strict=True):
        model.weight = nn.Parameter(DTensor.from_local(model.weight.detach(), mesh, [placement]))
    try:
        sslops.EMA(*models, 0.9)
    except ValueError as error:
        return str(error)


def test_differently_placed_models_are_refused(ranks):
    assert all(text.startswith("EMA: online.weight: wanted placed as in target") for text in ranks(pair_up))


def run_open_clip(rank, world, name, options, patched):
    """The loss and gradients of the rank's features, of the scale and of the bias"""
    with pytest.MonkeyPatch.context() as context:
        loss = getattr(open_clip_losses(context), name)(rank=rank, world_size=world, **options)
        inputs = [F.normalize(x.detach()).requires_grad_() for x in views(rank, 12, 40)]
        inputs += [torch.tensor(x, requires_grad=True) for x in ((20.0,) if name == "ClipLoss" else (20.0, -8.0))]
        with sslops.patch_open_clip() if patched else contextlib.nullcontext():
            value = loss(*inputs)
        return [value.detach(), *torch.autograd.grad(value, inputs)]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ClipLoss", {}),
        ("ClipLoss", {"gather_with_grad": True}),
        ("ClipLoss", {"local_loss": True, "gather_with_grad": True}),
        ("SigLipLoss", {}),
        ("SigLipLoss", {"dist_impl": "gather"}),
    ],
)
def test_open_clip(ranks, name, options, monkeypatch):
    open_clip_losses(monkeypatch)
    theirs, ours = ([*zip(*ranks(run_open_clip, name, options, patched), strict=True)] for patched in (False, True))
    values = [torch.stack(x) for x in (theirs[0], ours[0])]
    torch.testing.assert_close(values[0] if name == "ClipLoss" else values[0].mean().expand(2), values[1])
    for x, y in zip(theirs[1:3], ours[1:3], strict=True):  # the features'
        x, y = torch.cat(x), torch.cat(y)
        assert (x - y).norm() < 1e-5 * x.norm()
    for x, y in zip(theirs[3:], ours[3:], strict=True):  # what DDP makes of the numbers'
        torch.testing.assert_close(sum(x), sum(y), rtol=1e-4, atol=1e-7)


def run_mocov3(rank, world):
    query, key = views(rank, 12, 40)
    loss = solo.mocov3_loss_func(query, key)
    return query.detach(), key.detach(), loss.detach(), *torch.autograd.grad(loss, query)


def test_mocov3(ranks):
    """Each rank's own queries, against the keys of all"""
    found = ranks(run_mocov3)
    keys = F.normalize(torch.cat([key for _, key, *_ in found]))
    for rank, (query, _, value, gradient) in enumerate(found):
        query.requires_grad_()
        loss = F.cross_entropy(F.normalize(query) @ keys.T / 0.2, torch.arange(12) + 12 * rank) * 0.4
        torch.testing.assert_close(value, loss.detach())
        torch.testing.assert_close(gradient, *torch.autograd.grad(loss, query), rtol=1e-4, atol=1e-7)
