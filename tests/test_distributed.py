"""Batches spread over 2 and 4 real processes: values and gradients of the whole batch, and refusals on every rank."""

import ctypes
import os
import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import sslops
from sslops import _library, distributed
from sslops import backend as backends
from sslops.ops import barlow_twins, cross_correlation, vicreg
from sslops.ops import nt_xent as nt_xent_op

from . import oracle
from .ranks import Ranks

BACKENDS = ("cpu", "eager")
OPS = [
    sslops.nt_xent,
    sslops.info_nce,
    sslops.clip,
    sslops.siglip,
    sslops.barlow_twins,
    sslops.vicreg,
    sslops.cross_correlation,
]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    ranks = Ranks(2, tmp_path_factory.mktemp("two"))
    yield ranks
    ranks.stop()


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    ranks = Ranks(4, tmp_path_factory.mktemp("four"))
    yield ranks
    ranks.stop()


@pytest.fixture(params=[2, 4])
def ranks(request):
    return request.getfixturevalue({2: "two", 4: "four"}[request.param])


def nt_xent(z0, z1, temperature=None, *, tau=0.5, **options):
    return sslops.nt_xent(z0, z1, temperature=tau if temperature is None else temperature, **options)


def views(n: int, d: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Columns with means and standard deviations of their own."""
    g = torch.Generator().manual_seed(n * 1000 + d)
    z0 = torch.randn(n, d, generator=g) * torch.linspace(0.3, 2, d) + torch.linspace(-1, 1, d)
    return [z.to(dtype) for z in (z0, z0 + 0.5 * torch.randn(n, d, generator=g))]


def cotangent(shape) -> Tensor:
    """That of oracle.evaluate"""
    return torch.rand(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def shard(x: Tensor, rank: int, world: int, parts: int = 1) -> Tensor:
    """A rank's rows of each part of x [parts * N, ..]; a 0-d tensor is everyone's"""
    return x if x.dim() == 0 else torch.cat([part.chunk(world)[rank] for part in x.chunk(parts)])


def evaluate(rank: int, world: int, op, inputs: list[Tensor], options: dict) -> list[Tensor]:
    leaves = [shard(x, rank, world).clone().requires_grad_() for x in inputs]
    out = op(*leaves, group="world", **options)
    weights = cotangent([len(out) * world] if out.dim() == 1 else out.shape)
    if out.dim() == 1:
        weights = shard(weights, rank, world, parts=len(out) // len(leaves[0]))
    return [out.detach(), *torch.autograd.grad(out, leaves, weights.to(out))]


def of_all_ranks(ranks: Ranks, op, inputs: list[Tensor], options: dict) -> list[Tensor]:
    """Value and gradients of the whole batch, averaged as DDP does"""
    values, *gradients = zip(*ranks(evaluate, op, inputs, options), strict=True)
    if options.get("reduction") == "none":
        parts = len(values[0]) * ranks.world // len(inputs[0])
        got = [torch.cat([torch.cat([v.chunk(parts)[part] for v in values]) for part in range(parts)])]
    else:
        assert all(torch.equal(values[0], value) for value in values)
        got = [values[0]]
    world = 1 if options.get("reduction") == "none" else ranks.world
    for x, shards in zip(inputs, gradients, strict=True):
        got.append((torch.cat(shards) if x.dim() else torch.stack(shards).sum()) / world)
    return got


def check(ranks: Ranks, op, inputs: list[Tensor], backend: str, truth_of=None, **options) -> None:
    """The accuracy promise for what all ranks have, against one process with the whole batch."""

    def answers(draw: list[Tensor]):
        whole = (oracle.evaluate(truth_of or op, draw, "eager", dtype, **options) for dtype in (None, torch.float64))
        return of_all_ranks(ranks, op, draw, options | {"backend": backend}), *whole

    names = ["output", "first", "second", "third", "fourth"][: len(inputs) + 1]
    oracle.assert_promise(names, answers, inputs, inputs[0].dtype)


@each_backend
@each_dtype
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("rows", "temperature"), [(2, 0.5), (37, 0.1), (37, 0.02), (280, 0.2)])
def test_nt_xent(ranks, backend, dtype, reduction, rows, temperature):
    check(ranks, nt_xent, views(rows * ranks.world, 40, dtype), backend, reduction=reduction, tau=temperature)


def of_views(*views, tau, query_ids=None, positive_weights=None, group=None, **options):
    """Of views [B, D] in one tensor; the rank's losses in one dimension"""
    beside = {"query_ids": query_ids, "positive_weights": positive_weights}
    if group is not None:
        rank, world = dist.get_rank(), dist.get_world_size()
        beside = {name: x if x is None else x.chunk(world, -1)[rank] for name, x in beside.items()}
    loss = sslops.nt_xent(torch.stack(views), temperature=tau, group=group, **beside, **options)
    return loss.flatten() if loss.dim() else loss


@each_backend
@each_dtype
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("tau", [0.1, 0.02])
def test_nt_xent_of_many_views(ranks, backend, dtype, reduction, tau):
    rows = 37 * ranks.world
    inputs, options = [*views(rows, 40, dtype), views(rows, 40, dtype)[0].flip(1)], {"reduction": reduction, "tau": tau}
    check(ranks, of_views, inputs, backend, **options)
    check(ranks, of_views, inputs[:2], backend, query_ids=torch.arange(rows) % 50, **options)
    weights = torch.linspace(0.5, 1.5, 3 * rows).view(3, rows)
    check(ranks, of_views, inputs, backend, decoupled=True, positive_weights=weights, **options)


def supcon(*views, labels, tau, group=None, **options):
    """Of views [B, D] in one tensor; the rank's losses in one dimension"""
    beside = {name: options.pop(name) for name in ("query_ids", "weights") if name in options} | {"labels": labels}
    if group is not None:
        beside = {name: x.chunk(dist.get_world_size())[dist.get_rank()] for name, x in beside.items()}
    z = torch.stack(views) if len(views) > 1 else views[0]
    if "keys" in options:
        options["keys"] = options["keys"].to(torch.promote_types(z.dtype, torch.float32))
    loss = sslops.supcon(z, temperature=tau, group=group, **beside, **options)
    return loss.flatten() if loss.dim() else loss


@each_backend
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("where", ["out", "in"])
@pytest.mark.parametrize("tau", [0.1, 0.02])
def test_supcon(ranks, backend, reduction, where, tau):
    rows = 37 * ranks.world
    options = {"labels": torch.arange(rows) % 20 - 1, "tau": tau, "reduction": reduction, "where": where}
    check(ranks, supcon, [*views(rows, 40), views(rows, 40)[0].flip(1)], backend, **options)
    check(ranks, supcon, views(rows, 40, torch.bfloat16)[:1], backend, **options)


@each_backend
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_supcon_of_keys_and_ids(ranks, backend, reduction):
    """Keys are everyone's; ids and weights the rank's, as labels are"""
    rows = 37 * ranks.world
    options = {"labels": torch.arange(rows) % 20 - 1, "tau": 0.1, "reduction": reduction}
    options |= {"query_ids": torch.arange(rows) % 50, "weights": torch.arange(rows) % 4 / 2}
    keys = {"keys": torch.stack(views(300, 40)).flatten(0, 1), "key_labels": torch.arange(600) % 21}
    check(ranks, supcon, views(rows, 40)[:1], backend, **options)
    check(ranks, supcon, views(rows, 40), backend, **options, **keys, key_ids=torch.arange(600) % 60)


def nearest_values(query, support, *, reduction, **options):
    return sslops.nearest(query, support, **options).values


@each_backend
@pytest.mark.parametrize("options", [{}, {"normalize": True, "exclude_self": True}], ids=str)
def test_nearest(ranks, backend, options):
    """A rank's neighbours are of all ranks, and so is what comes back to its rows"""
    check(ranks, nearest_values, views(37 * ranks.world, 40), backend, reduction="none", **options)


@each_backend
def test_koleo(ranks, backend):
    check(ranks, sslops.koleo, views(37 * ranks.world, 40)[:1], backend)


@each_backend
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("normalize", [True, False])
def test_temperature_gradient(two, backend, reduction, normalize):
    inputs = [*views(60, 24), torch.tensor(0.3)]
    check(two, nt_xent, inputs, backend, reduction=reduction, normalize=normalize)


def info_nce(query, key, temperature=None, *, tau=0.1, negatives=None, **options):
    if negatives is not None:
        negatives = negatives.to(query.dtype)
    return sslops.info_nce(query, key, negatives, temperature=tau if temperature is None else temperature, **options)


@each_backend
@each_dtype
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("queue", [False, True])
def test_info_nce(ranks, backend, dtype, reduction, queue):
    options = {"negatives": views(700, 40)[0]} if queue else {}
    check(ranks, info_nce, views(37 * ranks.world, 40, dtype), backend, reduction=reduction, **options)


@each_backend
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_temperature_gradient_of_info_nce(two, backend, reduction):
    check(two, info_nce, [*views(60, 24), torch.tensor(0.3)], backend, reduction=reduction)


def clip(image, text, logit_scale=None, *, scale=10.0, **options):
    return sslops.clip(image, text, logit_scale=scale if logit_scale is None else logit_scale, **options)


def siglip(image, text, *numbers, **options):
    names = dict(zip(("logit_scale", "bias"), numbers, strict=False))
    return sslops.siglip(image, text, **names, **options)


@each_backend
@each_dtype
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("rows", "scale"), [(1, 10.0), (2, 3.0), (37, 50.0), (280, 10.0)])
def test_clip(ranks, backend, dtype, reduction, rows, scale):
    check(ranks, clip, views(rows * ranks.world, 40, dtype), backend, reduction=reduction, scale=scale)


@each_backend
@each_dtype
@pytest.mark.parametrize("rows", [1, 2, 37, 280])
def test_siglip(ranks, backend, dtype, rows):
    check(ranks, siglip, views(rows * ranks.world, 40, dtype), backend)


def siglip_twice(rank, world, inputs):
    return [evaluate(rank, world, siglip, inputs, {"backend": "cpu"}) for _ in range(2)]


def test_the_same_bits_around_the_ring(four):
    for first, second in four(siglip_twice, views(4 * 37, 40)):
        assert all(map(torch.equal, first, second))


def grown_by_siglip(rank, world, rows, d):
    """MB, of the peak"""

    def in_use(name):
        return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(name))

    leaves = [torch.randn(rows, d, requires_grad=True) for _ in range(2)]
    sslops.siglip(*(x[:64] for x in leaves), group="world", backend="cpu").backward()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls had is not there to be used again
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")
    before = in_use("VmRSS")
    sslops.siglip(*leaves, group="world", backend="cpu").backward()
    return in_use("VmHWM") - before


def test_memory_around_the_ring(four):
    """1024 pairs of 512 a rank: 12 buffers of 2 MB, their size, and scratch; it was 54 MB when texts were gathered"""
    grown = max(four(grown_by_siglip, 1024, 512))
    assert grown < 42, f"{grown:.0f} MB"


@each_backend
def test_gradients_of_scale_and_bias(two, backend):
    inputs = [*views(60, 24), torch.tensor(4.0)]
    check(two, clip, inputs, backend)
    check(two, clip, inputs, backend, reduction="none")
    check(two, siglip, [*inputs, torch.tensor(-3.0)], backend)


def relic(online, target, temperature=0.2, *, drawn=None, **options):
    generator = torch.Generator().manual_seed(9)
    if dist.is_initialized() and dist.get_rank():
        generator.manual_seed(1)  # rank 0 draws the order
    return sslops.relic(
        online,
        target,
        temperature=temperature,
        alpha=1.5,
        beta=0.7,
        num_negatives=drawn,
        generator=generator,
        **options,
    )


@each_backend
@each_dtype
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("drawn", [None, 5])
def test_relic(ranks, backend, dtype, reduction, drawn):
    check(ranks, relic, views(23 * ranks.world, 40, dtype), backend, reduction=reduction, drawn=drawn)


@each_backend
def test_temperature_gradient_of_relic(two, backend):
    check(two, relic, [*views(60, 24), torch.tensor(0.3)], backend)


def multicrop(a, b, **options):
    return sslops.relic_multicrop([a, b], [a * b], [b, a * 2], temperature=0.3, alpha=1.0, beta=0.5, **options)


@each_backend
def test_relic_multicrop(two, backend):
    check(two, multicrop, views(30, 12), backend)


def with_ids(rank, world, inputs, ids, backend):
    z0, z1, ids = (shard(x, rank, world) for x in (*inputs, ids))
    return sslops.info_nce(z0, z1, query_ids=ids, return_metrics=True, group="world", backend=backend)


@each_backend
def test_ids_and_metrics_of_all_ranks(two, backend):
    inputs, ids = views(40, 6), torch.arange(40) % 9
    expected = sslops.info_nce(*inputs, query_ids=ids, return_metrics=True)
    assert expected[0] < 0.999 * sslops.info_nce(*inputs)
    assert 0 < expected[1].top1 < 1
    for got in two(with_ids, inputs, ids, backend):
        torch.testing.assert_close(got, expected)


def nt_xent_metrics(rank, world, inputs, backend):
    z0, z1 = (shard(x, rank, world) for x in inputs)
    return sslops.nt_xent(z0, z1, return_metrics=True, group="world", backend=backend)


@each_backend
def test_nt_xent_metrics_of_all_ranks(two, backend):
    inputs = views(40, 6)
    expected = sslops.nt_xent(*inputs, return_metrics=True)
    assert 0 < expected[1].top1 < 1
    for got in two(nt_xent_metrics, inputs, backend):
        torch.testing.assert_close(got, expected)


def pair_metrics(rank, world, op, inputs, backend):
    return op(*(shard(x, rank, world) for x in inputs), return_metrics=True, group="world", backend=backend)


@each_backend
@pytest.mark.parametrize("op", [sslops.clip, sslops.siglip])
@pytest.mark.parametrize(("rows", "dtype"), [(10, torch.float32), (10, torch.bfloat16), (1, torch.float32)])
def test_pair_metrics_of_all_ranks(ranks, backend, op, rows, dtype):
    image, text = views(rows * ranks.world, 6)
    inputs = [image.to(dtype), (text + torch.linspace(-2, 2, 6)).to(dtype)]
    expected = op(*inputs, return_metrics=True, backend=backend)
    if rows > 1:
        assert all(0 < each.top1 < 1 for each in expected[1])
        assert expected[1].image_to_text.top1 != expected[1].text_to_image.top1
    for got in ranks(pair_metrics, op, inputs, backend):
        torch.testing.assert_close(got, expected)


def of_paired(query, key, own, *, negatives, masked, group=None, **options):
    """own: [B, M D]; the rank's rows of masks and weights"""
    k = len(negatives) if negatives is not None else len(query) * (dist.get_world_size() if group else 1)
    beside = {"paired_negatives": own.view(len(own), -1, query.shape[1])}
    if masked:
        rows = len(query) * (dist.get_world_size() if group else 1)
        draw = torch.Generator().manual_seed(rows)
        beside["negative_mask"], beside["paired_mask"] = (
            torch.rand(rows, n, generator=draw) < 0.7 for n in (k, beside["paired_negatives"].shape[1])
        )
        beside["positive_weights"] = torch.linspace(0.5, 2, rows)
        if group:
            for name in ("negative_mask", "paired_mask", "positive_weights"):
                beside[name] = beside[name].chunk(dist.get_world_size())[dist.get_rank()]
    if negatives is not None:
        negatives = negatives.to(query.dtype)
    return sslops.info_nce(query, key, negatives, temperature=0.1, decoupled=masked, group=group, **beside, **options)


@each_backend
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("queue", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_info_nce_of_paired_negatives(two, backend, reduction, queue, masked):
    """Each rank has its queries' own, and the rows of a mask whose columns are all ranks' keys"""
    inputs = [*views(74, 12), views(74, 36)[0]]
    options = {"negatives": views(100, 12)[0] if queue else None, "masked": masked}
    check(two, of_paired, inputs, backend, reduction=reduction, **options)


def silent_backwards(rank, world, inputs):
    """Of nt_xent's first view and of paired negatives, where nothing may travel"""
    z0, z1, paired = (shard(x, rank, world) for x in inputs)
    z0.requires_grad_()
    paired.requires_grad_()
    weights = torch.linspace(0.5, 2, 2 * len(z0)).view(2, -1)
    of_views = sslops.nt_xent(z0, z1, decoupled=True, positive_weights=weights, group="world", backend="cpu")
    ids = torch.arange(len(z0))
    of_paired = sslops.info_nce(z0, z1, query_ids=ids, paired_negatives=paired[:, None], group="world", backend="cpu")
    with mock.patch.object(distributed, "all_gather", side_effect=AssertionError("travels")):
        return [torch.autograd.grad(of_views, z0)[0], torch.autograd.grad(of_paired, paired)[0]]


def test_backward_does_not_communicate(two):
    """... but after "none", with query_ids or for in-batch keys"""
    inputs = [*views(40, 6), views(50, 6)[1][:40]]
    z0, z1, paired = (x.requires_grad_() for x in inputs)
    weights = torch.linspace(0.5, 2, 40).view(2, 20).repeat(1, 2)
    of_views = sslops.nt_xent(z0, z1, decoupled=True, positive_weights=weights)
    of_paired = sslops.info_nce(z0, z1.detach(), query_ids=torch.arange(40) % 20, paired_negatives=paired[:, None])
    expected = torch.autograd.grad(of_views, z0)[0], torch.autograd.grad(of_paired, paired)[0]
    found = zip(*two(silent_backwards, [x.detach() for x in inputs]), strict=True)
    for shards, whole in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.cat(shards) / 2, whole)


def trainable_negatives(rank, world, inputs, negatives, backend):
    negatives = negatives.clone().requires_grad_()
    sslops.info_nce(*(shard(x, rank, world) for x in inputs), negatives, group="world", backend=backend).backward()
    return negatives.grad


@each_backend
def test_trainable_negatives(two, backend):
    inputs, negatives = views(40, 6), views(50, 6)[1].requires_grad_()
    sslops.info_nce(*inputs, negatives).backward()
    got = torch.stack(two(trainable_negatives, inputs, negatives.detach(), backend)).mean(0)
    torch.testing.assert_close(got, negatives.grad)


def enqueued(rank, world, keys, ids):
    torch.manual_seed(5)
    queue = sslops.NegativeQueue(20, 3)
    for k in (12, 12, 24):
        queue.enqueue(shard(keys[:k], rank, world), ids=shard(ids[:k], rank, world), group="world")
    return queue.state_dict()


def test_queue(ranks):
    keys, ids = views(24, 3)[0], torch.arange(24)
    torch.manual_seed(5)
    queue = sslops.NegativeQueue(20, 3)
    for k in (12, 12, 24):  # the last are more than fit
        queue.enqueue(keys[:k], ids=ids[:k])
    for state in ranks(enqueued, keys, ids):
        for name, expected in queue.state_dict().items():
            assert torch.equal(state[name], expected), name


@each_backend
@each_dtype
@pytest.mark.parametrize("route", ["gram", "panels"])
@pytest.mark.parametrize(("rows", "d"), [(2, 13), (33, 100), (20, 700)])
@pytest.mark.parametrize("op", [sslops.barlow_twins, sslops.vicreg])
def test_correlation(ranks, backend, dtype, route, rows, d, op):
    check(ranks, op, views(rows * ranks.world, d, dtype), backend, route=route)


@each_backend
@pytest.mark.parametrize("route", ["gram", "panels"])
def test_vicreg_of_one_view(two, backend, route):
    check(two, sslops.vicreg, views(60, 90)[:1], backend, route=route)


@each_backend
@each_dtype
def test_cross_correlation(ranks, backend, dtype):
    check(ranks, sslops.cross_correlation, views(20 * ranks.world, 600, dtype), backend)


def by_gathering(rank, world, op, inputs, options):
    with mock.patch.object(_library, "is_distributed", return_value=False):
        return evaluate(rank, world, op, inputs, options)


@pytest.mark.parametrize("op", [sslops.barlow_twins, sslops.vicreg, sslops.cross_correlation])
def test_a_kernel_without_a_distributed_form_has_the_gathered_batch(two, op):
    """As a GPU's"""
    inputs = views(40, 90)
    apart, together = (two(how, op, inputs, {"backend": "cpu"}) for how in (evaluate, by_gathering))
    torch.testing.assert_close(together, apart)


def one_row(rank, world, op, inputs):
    return op(*(x[rank : rank + 1] for x in inputs), group="world")


@pytest.mark.parametrize("op", [sslops.barlow_twins, sslops.vicreg, sslops.cross_correlation])
def test_one_row_a_rank(two, op):
    inputs = views(2, 9)
    for value in two(one_row, op, inputs):
        torch.testing.assert_close(value, op(*inputs))


@pytest.mark.parametrize("op", [sslops.barlow_twins, sslops.vicreg])
def test_few_live_columns(two, op):
    """The gram route goes by panels after all, on every rank."""
    basis = torch.linalg.qr(torch.randn(64, 20, generator=torch.Generator().manual_seed(0))).Q
    inputs = []
    for k in (1, 2):
        z = torch.full((64, 200), 0.5)
        z[:, :20] = basis + 1e-3 * torch.randn(64, 20, generator=torch.Generator().manual_seed(k))
        inputs.append(z)
    check(two, op, inputs, "cpu", route="gram")


class LocalStatistics:
    """Each rank's rows are normalised by themselves, and C is the mean of the ranks' matrices."""

    def __init__(self, world: int) -> None:
        self.world = world

    def cross_correlation(self, z_a, z_b, backend, synced):
        wide = torch.promote_types(z_a.dtype, torch.float32)
        c = 0
        for parts in zip(z_a.chunk(self.world), z_b.chunk(self.world), strict=True):
            a, b = (F.batch_norm(z.to(wide), None, None, training=True) for z in parts)
            c = c + (a.to(z_a.dtype).t() @ b.to(z_a.dtype)).to(wide) / len(a) / self.world
        return c

    def barlow_twins(self, z_a, z_b, backend, synced, route, lambd):
        c = self.cross_correlation(z_a, z_b, backend, synced)
        on_diagonal = (c.diagonal() - 1).square().sum()
        return on_diagonal + lambd * (c - c.diagonal().diag()).square().sum()


@pytest.mark.parametrize(
    ("backend", "dtype"),  # no eager bfloat16: it rounds C, the formula each rank's share of it
    [("cpu", torch.float32), ("cpu", torch.bfloat16), ("eager", torch.float32)],
)
@pytest.mark.parametrize("route", ["gram", "panels"])
def test_local_statistics(ranks, backend, dtype, route):
    inputs = views(30 * ranks.world, 130, dtype)
    for k, z in enumerate(inputs):  # so that the ranks' statistics differ
        z *= torch.linspace(0.5, 2 + k, len(z))[:, None]
    truth_of = LocalStatistics(ranks.world).barlow_twins
    check(ranks, sslops.barlow_twins, inputs, backend, truth_of, synced=False, route=route, lambd=0.01)


@each_backend
def test_local_statistics_of_cross_correlation(two, backend):
    truth_of = LocalStatistics(2).cross_correlation
    check(two, sslops.cross_correlation, views(60, 130), backend, truth_of, synced=False)


def test_statistics_of_all_ranks_are_the_official_ones(two):
    """Barlow Twins' own code: BatchNorm without an affine part, its statistics those of all ranks; C over the batch."""
    z = [x.double() for x in views(24, 7)]
    a, b = ((x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt() for x in z)
    c = a.T @ b / 24
    off_diagonal = c.flatten()[:-1].view(6, 8)[:, 1:]
    expected = (c.diagonal() - 1).pow(2).sum() + 0.0051 * off_diagonal.pow(2).sum()
    for value, *_ in two(evaluate, sslops.barlow_twins, [x.float() for x in z], {"lambd": 0.0051}):
        torch.testing.assert_close(value, expected.float())


def test_the_route_goes_by_the_whole_batch(two):
    routes = two(chosen_route, views(60, 60))
    assert routes == [["panels", "gram"]] * 2  # 60 rows of 60 columns; 30


def chosen_route(rank, world, inputs):
    from sslops.ops import barlow_twins as module

    taken, by_cost = [], module.cheaper_route
    module.cheaper_route = lambda n, d: taken.append(by_cost(n, d)) or taken[-1]
    for group in ("world", None):
        sslops.barlow_twins(*(shard(x, rank, world) for x in inputs), group=group)
    module.cheaper_route = by_cost
    return taken


# ---- prototypes: each rank keeps its logits, what travels is K floats ----


def crops(views: int, rows: int, k: int) -> Tensor:
    return 0.5 * torch.randn(views, rows, k, generator=torch.Generator().manual_seed(views * rows + k))


def uneven(rows: int, rank: int, world: int) -> slice:
    """More rows on later ranks: a third and two, or of four ranks none on the first"""
    rise = 1 if world == 2 else -1
    first, end = (rows * k * (k + rise) // (world * (world + rise)) for k in (rank, rank + 1))
    return slice(first, end)


def potentials(rank, world, scores, options):
    return sslops.sinkhorn(scores[:, uneven(scores.shape[1], rank, world)], group="world", **options)


@each_backend
@pytest.mark.parametrize("scale", [0.1, 20.0])
@pytest.mark.parametrize("start", ["scores", "probabilities"])
def test_sinkhorn(ranks, backend, scale, start):
    scores = scale * crops(2, 60, 300)
    options = {"start": start, "temperature": 0.05 if start == "scores" else scale}

    def answers(draw):
        first, *others = ranks(potentials, draw[0], options | {"backend": backend})
        assert all(torch.equal(first, b) for b in others)
        return [[first], *([sslops.sinkhorn(x, backend="eager", **options)] for x in (draw[0], draw[0].double()))]

    oracle.assert_promise(["b"], answers, [scores], torch.float32)


def drawn(op, views, group=None, **options):
    """Of views [B, D] in one tensor; the ranks' generators are not in step"""
    seed = 3 if group is None else 3 + dist.get_rank()
    return op(torch.stack(views), generator=torch.Generator().manual_seed(seed), slices=70, group=group, **options)


def sigreg(*views, **options):
    return drawn(sslops.sigreg, views, **options)


def lejepa(*views, local=None, **options):
    """Of views of which the first are global ones, but for `local`"""
    if local is not None:
        views, options = views[:-local], options | {"local_views": torch.stack(views[-local:])}
    return drawn(sslops.lejepa, views, **options)


@each_backend
@each_dtype
@pytest.mark.parametrize("op", [sigreg, lejepa])
def test_sigreg(ranks, backend, dtype, op):
    for rows in (1, 37):
        check(ranks, op, views(rows * ranks.world, 40, dtype), backend)


def other_prototypes(rank, world):
    with pytest.raises(ValueError, match="sinkhorn: group"):
        sslops.sinkhorn(torch.zeros(3, 4 + rank), group="world")
    return float(sslops.sinkhorn(torch.zeros(3, 4), group="world").sum())


def test_sinkhorn_of_other_prototypes_is_refused(two):
    assert len(set(two(other_prototypes))) == 1


def of_own_crops(rank, world, op, student, teacher, options, per_row):
    rows = uneven(student.shape[-2], rank, world)
    options = {name: x[rows] if name in per_row else x for name, x in options.items()}
    own = student[..., rows, :].clone().requires_grad_()
    loss, found = op(own, teacher[..., rows, :], group="world", return_metrics=True, **options)
    if loss.dim():
        return loss.detach(), torch.zeros_like(own), found
    (grad,) = torch.autograd.grad(loss * 0.7, own)
    return loss.detach(), grad, found


def check_prototypes(ranks, op, student, teacher, per_row=(), **options):
    whole = student.clone().requires_grad_()
    expected, metrics = op(whole, teacher, return_metrics=True, **options)
    answers = ranks(of_own_crops, op, student, teacher, options, per_row)
    if expected.dim():
        torch.testing.assert_close(torch.cat([loss for loss, *_ in answers]), expected)
    else:
        (grad,) = torch.autograd.grad(expected * 0.7, whole)
        torch.testing.assert_close(torch.cat([g for _, g, _ in answers], -2) / ranks.world, grad)
        assert all(torch.equal(loss, answers[0][0]) for loss, *_ in answers)
        torch.testing.assert_close(answers[0][0], expected)
    for *_, found in answers:
        torch.testing.assert_close(found, metrics)


@each_backend
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_dino(ranks, backend, reduction):
    student, teacher = crops(5, 24, 70), crops(2, 24, 70)
    bias = sslops.sinkhorn(teacher)
    check_prototypes(ranks, sslops.dino, student, teacher, bias=bias, reduction=reduction, backend=backend)


@each_backend
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [True, False])
def test_ibot(ranks, backend, reduction, weighted):
    student, teacher = crops(2, 60, 70)
    options = {"weights": torch.rand(60, generator=torch.Generator().manual_seed(0))} if weighted else {}
    check_prototypes(ranks, sslops.ibot, student, teacher, options, reduction=reduction, backend=backend, **options)


def of_no_images(rank, world, op, lead):
    student, teacher = (torch.zeros(*views, 0, 5) for views in lead)
    loss, metrics = op(student, teacher, group="world", return_metrics=True)
    return [loss, *metrics]


@pytest.mark.parametrize(("op", "lead"), [(sslops.dino, ((3,), (2,))), (sslops.ibot, ((), ()))])
def test_no_images_on_any_rank(two, op, lead):
    """NaN, as without a group"""
    for found in two(of_no_images, op, lead):
        assert torch.stack(found).isnan().all()


def of_own_features(rank, world, op, tensors, options):
    student, prototypes, teacher, of_teacher = tensors
    rows = uneven(student.shape[-2], rank, world)
    leaves = [x.clone().requires_grad_() for x in (student[..., rows, :], prototypes)]
    layers = {"prototypes": leaves[1], "teacher_prototypes": of_teacher, "group": "world"}
    loss = op(leaves[0], teacher[..., rows, :], **layers, **options)
    return [loss.detach(), *torch.autograd.grad(loss * 0.7, leaves)]


@each_backend
@pytest.mark.parametrize("op", [sslops.dino, sslops.ibot])
def test_a_last_layer(ranks, backend, op):
    """The prototypes' gradient is the mean of the ranks', as DDP takes it."""
    g = torch.Generator().manual_seed(0)
    lead = ((3,), (2,)) if op is sslops.dino else ((), ())
    shapes = (*lead[0], 24, 8), (20, 8), (*lead[1], 24, 6), (20, 6)
    tensors = [torch.randn(shape, generator=g) for shape in shapes]
    whole = [x.clone().requires_grad_() for x in tensors[:2]]
    loss = op(whole[0], tensors[2], prototypes=whole[1], teacher_prototypes=tensors[3], unit_prototypes=True)
    expected = [loss.detach(), *torch.autograd.grad(loss * 0.7, whole)]
    answers = ranks(of_own_features, op, tensors, {"unit_prototypes": True, "backend": backend})
    found = torch.cat([each[1] for each in answers], -2) / ranks.world
    means = [torch.stack([each[k] for each in answers]).mean(0) for k in (0, 2)]
    for x, y in zip([means[0], found, means[1]], expected, strict=True):
        torch.testing.assert_close(x, y)


def swav(student, teacher, **options):
    return sslops.swav(student, **options)


@each_backend
def test_swav(ranks, backend):
    student = crops(4, 24, 70)
    check_prototypes(ranks, swav, student, student[:2], backend=backend)


def masked_tokens(rank, world, tensors, labels, reduction, backend):
    rows = uneven(len(labels), rank, world)
    leaves = [x.clone().requires_grad_() for x in (tensors[0][rows], *tensors[1:])]
    hidden, weight, bias = leaves
    loss = sslops.masked_token_cross_entropy(
        hidden, weight, labels[rows], bias=bias, reduction=reduction, group="world", backend=backend
    )
    return [loss.detach(), *torch.autograd.grad(loss.sum() * 0.7, leaves)]


@each_backend
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("share", [0.4, 0.0])
def test_masked_token_cross_entropy(ranks, backend, reduction, share):
    """The mean is over the labelled tokens of all ranks, of which each has its own number."""
    g = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=g) for shape in ((60, 8), (20, 8), (20,))]
    labels = torch.randint(20, (60,), generator=g).masked_fill(torch.rand(60, generator=g) >= share, -100)
    whole = [x.clone().requires_grad_() for x in tensors]
    loss = sslops.masked_token_cross_entropy(whole[0], whole[1], labels, bias=whole[2], reduction=reduction)
    expected = [loss.detach(), *torch.autograd.grad(loss * 0.7, whole)]
    answers = ranks(masked_tokens, tensors, labels, reduction, backend)
    assert all(torch.equal(found[0], answers[0][0]) for found in answers) or expected[0].isnan()
    hidden = torch.cat([found[1] for found in answers]) / ranks.world
    means = [torch.stack([found[k] for found in answers]).mean(0) for k in (0, 2, 3)]
    for x, y in zip([means[0], hidden, *means[1:]], expected, strict=True):
        torch.testing.assert_close(x, y, equal_nan=True)


def words(rank, world, tables, ids, options):
    leaves, rows = [x.clone().requires_grad_() for x in tables], uneven(len(ids[0]), rank, world)
    loss = sslops.skip_gram(*leaves, *(x[rows] for x in ids), group="world", **options)
    return [loss.detach(), *(x.to_dense() for x in torch.autograd.grad(loss.sum() * 0.7, leaves))]


@each_backend
@pytest.mark.parametrize(("reduction", "sparse"), [("mean", True), ("sum", False)])
def test_skip_gram(ranks, backend, reduction, sparse):
    """The mean is over the pairs of all ranks, of which each has its own number."""
    g = torch.Generator().manual_seed(0)
    tables = [torch.randn(30, 8, generator=g) for _ in range(2)]
    ids = [torch.randint(30, shape, generator=g) for shape in ((60,), (60,), (60, 5))]
    options = {"reduction": reduction, "sparse": sparse, "backend": backend}
    whole = [x.clone().requires_grad_() for x in tables]
    loss = sslops.skip_gram(*whole, *ids, reduction=reduction)
    expected = [loss.detach(), *torch.autograd.grad(loss * 0.7, whole)]
    answers = ranks(words, tables, ids, options)
    assert all(torch.equal(found[0], answers[0][0]) for found in answers)
    for found, y in zip(zip(*answers, strict=True), expected, strict=True):
        torch.testing.assert_close(torch.stack(found).mean(0), y)


def centered(rank, world, batches):
    center = sslops.nn.PrototypeCenter(batches[0].shape[-1])
    for batch in batches:
        center.update(batch[:, uneven(batch.shape[1], rank, world)], group="world")
    return center.center


def test_center(ranks):
    """The mean over all rows, however many each rank has."""
    batches = [crops(2, rows, 30) for rows in (24, 10, 60)]
    center = sslops.nn.PrototypeCenter(30)
    for batch in batches:
        center.update(batch)
    for found in ranks(centered, batches):
        torch.testing.assert_close(found, center.center)


# ---- training ----


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8))
        self.temperature = nn.Parameter(torch.tensor(0.4))

    def forward(self, x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.layers(x0), self.layers(x1), self.temperature * 1


def train(network: nn.Module, inputs: list[Tensor], group: str | None, backend: str) -> list[Tensor]:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    for _ in range(3):
        z0, z1, temperature = network(*inputs)
        loss = sslops.nt_xent(z0, z1, temperature=temperature, group=group, backend=backend)
        (loss + sslops.vicreg(z0, z1, group=group, backend=backend) / 50).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in network.parameters()]


def train_with_ddp(rank, world, inputs, backend):
    network = DistributedDataParallel(Network())
    return train(network, [shard(x, rank, world) for x in inputs], "world", backend)


@each_backend
def test_ddp_trains_as_one_process(ranks, backend):
    inputs = list(torch.randn(2, 8 * ranks.world, 6, generator=torch.Generator().manual_seed(1)))
    before = [p.clone() for p in Network().parameters()]
    expected = train(Network(), inputs, None, backend)
    assert all((x - y).abs().max() > 1e-3 for x, y in zip(before, expected, strict=True))
    for parameters in ranks(train_with_ddp, inputs, backend):
        torch.testing.assert_close(parameters, expected, rtol=2e-5, atol=2e-6)


def compiled(rank, world, inputs, options, by_name):
    torch._dynamo.reset()
    group = "world" if by_name else dist.group.WORLD

    def step(z0, z1):
        z0, z1 = z0 * 2, z1 + 1
        return (
            sslops.nt_xent(z0, z1, group=group, **options)
            + sslops.info_nce(z0, z1, group=group, **options)
            + sslops.siglip(z0, z1, group=group, **options)
            + sslops.relic(z0, z1, temperature=0.2, alpha=1.0, beta=0.5, group=group, **options)
            + sslops.barlow_twins(z0, z1, group=group, **options)
            + sslops.vicreg(z0, z1, group=group, **options)
            + sslops.cross_correlation(z0, z1, group=group, **options).square().mean()
        )

    results = []
    for call in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [shard(x, rank, world).requires_grad_() for x in inputs]
        out = call(*leaves)
        results.append([out.detach(), *torch.autograd.grad(out, leaves)])
    return results


@each_backend
@pytest.mark.parametrize("by_name", [True, False])
def test_compile(two, backend, by_name):
    for plain, traced in two(compiled, views(16, 6), {"backend": backend}, by_name):
        torch.testing.assert_close(plain, traced)


def opcheck(rank, world, inputs):
    name = distributed.name("opcheck", "world")
    z0, z1 = (shard(x, rank, world).requires_grad_() for x in inputs)
    ops = torch.ops.sslops
    torch.library.opcheck(ops.all_gather.default, (z0, name, 0, "opcheck"))
    torch.library.opcheck(ops.reduce_scatter.default, (z0, name, 0, "opcheck"))
    float32, both = torch.float32, [True, True]
    calls = [
        (
            ops.nt_xent,
            nt_xent_op.Arguments(
                z0, z1, None, None, 0.3, True, False, True, name, "mean", float32, "cpu", [*both, False]
            ),
        ),
        (ops.cross_correlation, cross_correlation.Arguments(z0, z1, 1e-5, name, True, float32, both, "cpu")),
    ]
    for route in ("gram", "panels"):
        calls += [
            (ops.barlow_twins, barlow_twins.Arguments(z0, z1, 0.01, 1e-5, route, name, True, float32, both, "cpu")),
            (ops.vicreg, vicreg.Arguments(z0, z1, 25.0, 25.0, 1.0, 1e-4, route, name, float32, both, "cpu")),
        ]
    for op, x in calls:
        torch.library.opcheck(op.default, oracle.lowered(x))


def test_opcheck(two):
    two(opcheck, views(12, 8))


def second_derivative(rank, world, inputs):
    leaves = [shard(x, rank, world).double().requires_grad_() for x in inputs]
    loss = sslops.nt_xent(*leaves, group="world")
    (gradient,) = torch.autograd.grad(loss, leaves[:1], create_graph=True)
    return torch.autograd.grad(gradient.square().sum(), leaves[0])[0]


def test_second_derivative_of_the_reference(two):
    inputs = views(12, 5)
    leaves = [x.double().requires_grad_() for x in inputs]
    (gradient,) = torch.autograd.grad(sslops.nt_xent(*leaves), leaves[:1], create_graph=True)
    expected = torch.autograd.grad(gradient.square().sum(), leaves[0])[0]
    torch.testing.assert_close(torch.cat(two(second_derivative, inputs)) / 4, expected)  # W in either gradient


# ---- groups, and what is refused ----


def refusals(rank, world, op, backend, sizes):
    """The errors of calls with these many rows on each rank, None where there is none"""
    errors = []
    for rows in sizes:
        try:
            op(*views(rows[rank], 6), group="world", backend=backend)
            errors.append(None)
        except ValueError as error:
            errors.append(str(error))
    return errors


@pytest.mark.parametrize("op", OPS)
@each_backend
def test_uneven_batches_are_refused(ranks, op, backend):
    sizes = [(5, 4, 4, 4), (4, 4, 4, 4), (4, 4, 4, 7), (4, 4, 4, 4)]
    for first, second, third, fourth in ranks(refusals, op, backend, [size[-ranks.world :] for size in sizes]):
        assert second is None
        assert fourth is None
        assert third.startswith(f"{op.__name__}: group: wanted batches of one size on all ranks, got [4")
        assert ranks.world == 2 or "[5, 4, 4, 4]" in first


def without_waiting(rank, world, op):
    """As on a GPU, where the host does not wait for what the others have."""
    distributed._HOST_WAITS.clear()
    try:
        assert op(*views(6, 5), group="world").isfinite().all()
        assert op(*views(6, 5), group="world").isfinite().all()
        results = []
        for _ in range(2):
            try:
                results.append(op(*views(6 - rank, 5), group="world"))
            except ValueError as error:
                results.append(str(error))
                break
        return results
    finally:
        distributed._HOST_WAITS.add("cpu")


@pytest.mark.parametrize("op", [sslops.nt_xent, sslops.info_nce, sslops.barlow_twins, sslops.vicreg])
def test_a_gpu_host_is_not_kept_waiting(two, op):
    (value, later), (at_once,) = two(without_waiting, op)
    assert value.isnan()
    assert "[6, 5] rows" in later
    assert "[6, 5] rows" in at_once


def different_widths(rank, world):
    with pytest.raises(ValueError, match="nt_xent: group: wanted inputs of one shape"):
        sslops.nt_xent(*views(4, 5 + rank), group="world")


def test_different_widths_are_refused(two):
    two(different_widths)


def caught(op, inputs, options):
    try:
        op(*inputs, group="world", **options)
        return None
    except (TypeError, ValueError, RuntimeError) as error:
        return str(error)


INPUTS = {
    sslops.dino: lambda: [torch.stack(views(4, 6)), torch.stack(views(4, 6))],
    sslops.swav: lambda: [torch.stack(views(4, 6))],
    sslops.sinkhorn: lambda: views(4, 6)[:1],
    sslops.supcon: lambda: [views(4, 6)[0], torch.arange(4) % 2],
    sslops.koleo: lambda: views(4, 6)[:1],
    sslops.masked_token_cross_entropy: lambda: [*views(4, 6), torch.arange(4)],
    sslops.skip_gram: lambda: [*views(4, 6), *torch.arange(8).view(2, 4) % 4, torch.zeros(4, 2).long()],
}


def one_rank_is_wrong(rank, world, op, options, wrong):
    """What each rank says when the last one has other options; and then all go on."""
    inputs = INPUTS.get(op, lambda: views(4, 6))()
    message = caught(op, inputs, options | (wrong if rank == world - 1 else {}))
    assert caught(op, inputs, options) is None
    return message


RELIC = {"temperature": 0.3, "alpha": 1.0, "beta": 0.5}
WRONG = [
    (sslops.nt_xent, {}, {"temperature": -1.0}),
    (sslops.nt_xent, {}, {"reduction": "nonsense"}),
    (sslops.nt_xent, {}, {"backend": "triton"}),
    (sslops.info_nce, {}, {"normalize": 1}),
    (sslops.info_nce, {}, {"query_ids": torch.zeros(3, dtype=torch.int64)}),
    (sslops.relic, RELIC, {"alpha": -1.0}),
    (sslops.barlow_twins, {}, {"route": "nonsense"}),
    (sslops.vicreg, {}, {"eps": -1.0}),
    (sigreg, {}, {"knots": 1}),
    (lejepa, {}, {"lambd": 2.0}),
    (sslops.clip, {}, {"logit_scale": -1.0}),
    (sslops.siglip, {}, {"bias": float("inf")}),
    (sslops.nearest, {}, {"normalize": 1}),
    (sslops.koleo, {}, {"eps": -1.0}),
    (sslops.cross_correlation, {}, {"eps": float("nan")}),
    (sslops.supcon, {}, {"where": "nonsense"}),
    (sslops.sinkhorn, {}, {"iterations": 0}),
    (sslops.dino, {}, {"student_temp": -1.0}),
    (sslops.dino, {}, {"bias": torch.zeros(7)}),
    (sslops.ibot, {}, {"index": torch.arange(4) + 1}),
    (sslops.ibot, {}, {"weights": torch.ones(3)}),
    (sslops.ibot, {}, {"teacher_prototypes": torch.ones(6, 6)}),
    (sslops.ibot, {}, {"backend": "triton"}),
    (sslops.swav, {}, {"assign": 0}),
    (sslops.masked_token_cross_entropy, {}, {"label_smoothing": 2.0}),
    (sslops.masked_token_cross_entropy, {}, {"reduction": "nonsense"}),
    (sslops.skip_gram, {}, {"reduction": "nonsense"}),
]
OTHER = [
    (sslops.nt_xent, {}, {"reduction": "none"}),
    (sslops.nt_xent, {}, {"temperature": 0.7}),
    (sslops.nt_xent, {}, {"backend": "eager"}),
    (sslops.nt_xent, {"backend": "eager"}, {"normalize": False}),
    (sslops.info_nce, {}, {"query_ids": torch.zeros(4, dtype=torch.int64)}),
    (sslops.relic, RELIC, {"num_negatives": 2}),
    (sslops.barlow_twins, {"route": "gram"}, {"route": "panels"}),
    (sslops.vicreg, {"route": "gram"}, {"covariance": 3.0}),
    (sslops.supcon, {}, {"where": "in"}),
    (sslops.supcon, {}, {"weights": torch.ones(4)}),
    (sslops.sinkhorn, {}, {"iterations": 4}),
    (sslops.sinkhorn, {}, {"start": "probabilities"}),
    (sslops.dino, {}, {"reduction": "none"}),
    (sslops.dino, {}, {"teacher_temp": 0.05}),
    (sslops.ibot, {}, {"return_metrics": True}),
    (sslops.ibot, {}, {"reduction": "sum"}),
    (sslops.ibot, {}, {"prototypes": torch.ones(6, 6)}),
    (sslops.ibot, {}, {"weights": torch.ones(4)}),
    (sslops.masked_token_cross_entropy, {}, {"reduction": "none"}),
    (sslops.skip_gram, {}, {"reduction": "none"}),
    (sigreg, {}, {"t_max": 2.0}),
    (lejepa, {}, {"lambd": 0.5}),
    (lejepa, {}, {"local": 1}),
    (sslops.clip, {}, {"reduction": "none"}),
    (sslops.siglip, {}, {"normalize": False}),
    (sslops.koleo, {}, {"eps": 1e-6}),
]


@pytest.mark.parametrize(("op", "options", "wrong"), WRONG)
def test_an_error_on_one_rank_is_raised_on_all(ranks, op, options, wrong):
    *others, own = ranks(one_rank_is_wrong, op, options, wrong)
    assert own.startswith(f"{op.__name__}: {next(iter(wrong))}")
    first = {sslops.swav: "sinkhorn", sigreg: "sigreg's key", lejepa: "sigreg's key"}  # what comes first in it
    name = first.get(op, op.__name__)
    for message in others:
        assert message == f"{name}: group: wanted no error on any rank, got one on ranks [{ranks.world - 1}]"


@pytest.mark.parametrize(("op", "options", "wrong"), OTHER)
def test_other_options_on_one_rank_are_refused_on_all(ranks, op, options, wrong):
    alike = f"[{list(range(ranks.world - 1))}, [{ranks.world - 1}]]"
    for message in ranks(one_rank_is_wrong, op, options, wrong):
        wanted = (
            f"{op.__name__}: group: wanted the same options on all ranks, got equal ones on ranks {alike} only; here "
        )
        assert message.startswith(wanted), message


def other_crops(rank, world):
    """Sinkhorn is through when one rank's crops are found to be wrong"""
    crops = [*views(4, 6), views(4, 6 if rank else 5)[0]]
    with pytest.raises(ValueError, match="dino: group: wanted no error" if rank else "dino: student"):
        sslops.swav(crops, group="world")
    return float(sslops.swav(crops[:2], group="world"))


def test_an_error_on_one_rank_in_the_middle_of_swav(two):
    assert len(set(two(other_crops))) == 1


def updated_by_one(rank, world):
    center = sslops.nn.PrototypeCenter(6)
    with pytest.raises(ValueError, match="update: group: wanted no error" if rank else "update: teacher: wanted "):
        center.update(views(4, 6 if rank else 5)[0], group="world")
    center.update(views(4, 6)[0], group="world")


def test_an_error_on_one_rank_of_a_center(two):
    two(updated_by_one)


def enqueued_by_one(rank, world):
    queue = sslops.NegativeQueue(8, 6)
    with pytest.raises(ValueError, match="NegativeQueue.enqueue: group: wanted no error" if rank else "keys: wanted "):
        queue.enqueue(views(4, 6 if rank else 5)[0], group="world")
    queue.enqueue(views(4, 6)[0], group="world")


def test_an_error_on_one_rank_of_a_queue(two):
    two(enqueued_by_one)


def late_or_dying(rank, world, inputs):
    """One rank comes a second later, which shows nowhere; then it dies, and the others do not wait for it."""
    if rank == world - 1:
        time.sleep(1)
    value = sslops.nt_xent(*(shard(x, rank, world) for x in inputs), group="world")
    if rank == world - 1:
        os._exit(1)
    begin = time.monotonic()
    with pytest.raises(RuntimeError):
        sslops.nt_xent(*(shard(x, rank, world) for x in inputs), group="world")
    return value, time.monotonic() - begin


def test_a_rank_that_is_late_and_dies(tmp_path):
    ranks, inputs = Ranks(2, tmp_path), views(8, 4)
    try:
        for pipe in ranks._pipes:
            pipe.send((late_or_dying, (inputs,)))
        assert ranks._pipes[0].poll(60)
        fine, answer = ranks._pipes[0].recv()
        assert fine, answer
        torch.testing.assert_close(answer[0], sslops.nt_xent(*inputs))
        assert answer[1] < 20
    finally:
        for process in ranks._processes:
            process.kill()


def in_subgroups(rank, world, inputs):
    pairs, alone = dist.new_subgroups(2)[0], dist.new_subgroups(1)[0]
    one = dist.new_group([0])
    if rank:
        with pytest.raises(ValueError, match="nt_xent: group: wanted a group that this process is in"):
            sslops.nt_xent(*inputs, group=one)
    own = [shard(x, rank % 2, 2) for x in inputs]
    values = [sslops.nt_xent(*own, group=pairs), sslops.siglip(*own, group=pairs)]
    return [*values, sslops.nt_xent(*inputs, group=alone)]


def test_subgroups(four):
    inputs = views(10, 4)
    for value in four(in_subgroups, inputs):
        whole = sslops.nt_xent(*inputs)
        torch.testing.assert_close(value, [whole, sslops.siglip(*inputs), whole])


@pytest.mark.parametrize("op", OPS)
def test_bad_groups(op):
    inputs = views(4, 6)
    for error, group in ((ValueError, "world"), (ValueError, "wrld"), (ValueError, object())):
        oracle.assert_refused(error, op.__name__, "group", lambda group=group: op(*inputs, group=group))


def bad_group(rank, world):
    with pytest.raises(TypeError, match='nt_xent: group: wanted "world", a ProcessGroup or None, got int'):
        sslops.nt_xent(*views(4, 6), group=3)


def test_a_group_of_another_type(two):
    two(bad_group)


def test_kernels_without_a_distributed_form_are_not_taken():
    here = (torch.device("cpu"), torch.float32)
    assert backends.refusal("cpu", "ema_update", *here) is None
    assert backends.refusal("cpu", "ema_update", *here, True) == "ema_update's cpu kernel has no distributed form"
