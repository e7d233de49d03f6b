"""Ours in place of solo-learn's: against its own files, where PyPI's 1.0.2 has the same function, or the formula."""

import copy
import importlib
import sys
from inspect import Parameter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import sslops
import sslops.compat
from benchmarks import peers
from sslops.compat import solo as ours

from . import oracle


def simclr(z, indexes, temperature=0.1):
    z = F.normalize(z)
    logits = (z @ z.t() / temperature).fill_diagonal_(-torch.inf)
    positives = logits.masked_fill(indexes[:, None] != indexes, -torch.inf)
    return (logits.logsumexp(1) - positives.logsumexp(1)).mean()


def mae(imgs, pred, mask, patch_size, norm_pix_loss=True):
    p = patch_size
    target = imgs.unfold(2, p, p).unfold(3, p, p).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
    if norm_pix_loss:
        variance, mean = torch.var_mean(target, dim=2, keepdim=True)
        target = (target - mean) / (variance + 1e-6).sqrt()
    return ((pred - target).square().mean(2) * mask).sum() / mask.sum()


def theirs(file, name):
    module = peers.solo_file(f"solo/{file}.py")
    if module is None:
        pytest.skip("solo-learn is not installed")
    return getattr(module, name)


def views(*shape):
    x = torch.randn(shape)
    return [x + 0.5 * torch.randn(shape) for _ in range(2)]


def run(loss, inputs, *rest, dtype=torch.float32, **options):
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    rest = [x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in rest]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # solo-learn makes matrices of its own
    try:
        value = loss(*leaves, *rest, **options)
    finally:
        torch.set_default_dtype(before)
    gradients = torch.autograd.grad(value, leaves, allow_unused=True)
    return [value.detach(), *(x for x in gradients if x is not None)]


def assert_same(mine, their, inputs, *rest, scale=None, **options):
    """At most twice their own error against theirs in float64."""

    def answers(draw):
        ways = ((mine, torch.float32), (their, torch.float32), (their, torch.float64))
        return [run(loss, draw, *rest, dtype=dtype, **options) for loss, dtype in ways]

    learnt = len(run(their, inputs, *rest, **options)) - 1
    names = ["loss", *(f"gradient {k}" for k in range(learnt))]
    oracle.assert_promise(names, answers, inputs, torch.float32, scale)


WEIGHTS = {"sim_loss_weight": 2.0, "var_loss_weight": 3.0, "cov_loss_weight": 5.0}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("barlow", {}),
        ("barlow", {"lamb": 0.1, "scale_loss": 2.0}),
        ("vicreg", {}),
        ("vicreg", WEIGHTS),
        ("byol", {}),
        ("byol", {"simplified": False}),
    ],
)
@pytest.mark.parametrize("shape", [(24, 40), (65, 300)])
def test_two_views(name, options, shape):
    mine, their = getattr(ours, f"{name}_loss_func"), theirs(f"losses/{name}", f"{name}_loss_func")
    assert sslops.compat.parameters(mine) == sslops.compat.parameters(their)
    assert_same(mine, their, views(*shape), **options)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_moco(temperature):
    query, key = (F.normalize(x) for x in views(24, 16))
    queue = F.normalize(torch.randn(2, 16, 100), dim=1)[1]
    assert_same(ours.mocov2plus_loss_func, theirs("losses/moco", "moco_loss_func"), [query, key], queue, temperature)


def mocov3(query, key, temperature=0.2):
    logits = F.normalize(query) @ F.normalize(key).T / temperature
    return F.cross_entropy(logits, torch.arange(len(query))) * 2 * temperature


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_mocov3(temperature):
    """As MoCo v3's own code has it"""
    assert_same(ours.mocov3_loss_func, mocov3, views(24, 16), temperature)


def test_simclr_is_theirs_of_two_views():
    def their(z, temperature):
        return theirs("losses/simclr", "simclr_loss_func")(*z.chunk(2), temperature)

    z = torch.cat(views(24, 16))
    assert_same(
        lambda z, temperature: ours.simclr_loss_func(z, torch.arange(24).repeat(2), temperature), their, [z], 0.2
    )


INDEXES = {
    "two views": torch.randperm(1000)[:24].repeat(2),
    "two views, side by side": torch.arange(24).repeat_interleave(2),
    "two views, one example twice": torch.cat([torch.arange(23), torch.zeros(1, dtype=torch.int64)]).repeat(2),
    "three views of an odd number": torch.arange(17).repeat(3),
    "five views": torch.arange(10).repeat(5),
    "labels": torch.arange(60) % 7 % 4,
    "one image": torch.zeros(4, dtype=torch.int64),
}


@pytest.mark.parametrize("indexes", INDEXES.values(), ids=INDEXES)
@pytest.mark.parametrize("temperature", [0.1, 0.01])
def test_simclr_by_index(indexes, temperature):
    """Logits of up to 1 / temperature cancel in the loss; at 0.01 solo-learn's own formula is NaN."""
    z = torch.randn(int(indexes.max()) + 1, 16)[indexes] + 0.5 * torch.randn(len(indexes), 16)
    assert_same(ours.simclr_loss_func, simclr, [z], indexes, temperature, scale={"loss": 1 / temperature})


def test_simclr_by_index_under_autocast():
    """In float32 from the embeddings on; indexes of any dtype."""
    z, indexes = torch.randn(8, 16).repeat(3, 1) + 0.01 * torch.randn(24, 16), torch.arange(8).repeat(3)
    expected = ours.simclr_loss_func(z, indexes, 0.05)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ours.simclr_loss_func(z, indexes.float(), 0.05), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("indexes", "wanted"), [(torch.arange(8), "two of each"), (torch.arange(4), r"shape \[8\]")])
def test_simclr_refuses(indexes, wanted):
    with pytest.raises(ValueError, match=f"simclr_loss_func: indexes: wanted .*{wanted}"):
        ours.simclr_loss_func(torch.randn(8, 3), indexes)


def test_simclr_compiles():
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours.simclr_loss_func, fullgraph=True, backend=graphs)
    for images in (24, 10, 17):
        z, indexes = torch.cat(views(images, 16)), torch.randperm(images).repeat(2)
        for got, expected in zip(*(run(f, [z], indexes) for f in (compiled, ours.simclr_loss_func)), strict=True):
            assert torch.equal(got, expected)
    assert graphs.frame_count == 2
    with pytest.raises(RuntimeError, match="wanted two views"):
        compiled(z, torch.arange(len(z)))


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_nnclr(temperature):
    mine, their = ours.nnclr_loss_func, theirs("losses/nnclr", "nnclr_loss_func")
    assert sslops.compat.parameters(mine) == sslops.compat.parameters(their)
    assert_same(mine, their, views(24, 16), temperature=temperature)


def test_find_nn(solo):
    """solo-learn's own modules want Lightning: by their formula, in the classes that they are patched into"""
    solo()
    z, queue, labels, index = (
        F.normalize(torch.randn(9, 8)),
        F.normalize(torch.randn(40, 8)),
        *torch.randint(9, (2, 40)),
    )
    scores = z @ queue.t()
    with sslops.patch_solo():
        for path, owner in (("nnclr", "NNCLR"), ("nnbyol", "NNBYOL"), ("nnsiam", "NNSiam"), ("all4one", "All4One")):
            method = getattr(importlib.import_module(f"solo.methods.{path}"), owner)()
            method.queue, method.queue_y, method.queue_index = queue, labels, index
            first, *found = method.find_nn(z.clone().requires_grad_())
            assert torch.equal(first, scores.argmax(1))
            ids = scores.topk(5).indices if owner == "All4One" else first
            expected = [queue[ids], index[ids], labels[ids]][: len(found)]
            assert len(found) == (3 if owner == "All4One" else 1)
            assert all(map(torch.equal, found, expected))
    assert method.find_nn(z) == "theirs"


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_mae(norm_pix_loss):
    imgs, mask = torch.randn(5, 3, 32, 32), (torch.rand(5, 16) < 0.75).float()
    pred = torch.randn(5, 16, 192)
    mine, their = (lambda p, *rest, f=f: f(imgs.to(p), p, *rest) for f in (ours.mae_loss_func, mae))
    assert_same(mine, their, [pred], mask, 8, norm_pix_loss)


DINO = {"num_prototypes": 30, "warmup_teacher_temp": 0.04, "teacher_temp": 0.07, "warmup_teacher_temp_epochs": 4,
        "num_epochs": 10}  # fmt: skip


@pytest.mark.parametrize("epoch", [0, 2, 7])
@pytest.mark.parametrize("crops", [2, 4])
def test_dino(epoch, crops):
    their = theirs("losses/dino", "DINOLoss")
    assert sslops.compat.parameters(ours.DINOLoss) == sslops.compat.parameters(their)
    modules = [make(**DINO, num_large_crops=crops) for make in (ours.DINOLoss, their, their)]
    modules[2].double()
    for _ in range(3):
        student, teacher = torch.randn(crops * 6, 30) * 0.3, torch.randn(12, 30) * 0.3
        dtypes = (torch.float32, torch.float32, torch.float64)
        for module in modules:
            module.epoch = epoch

        def answers(draw, teacher=teacher, dtypes=dtypes):
            pairs = zip(modules, dtypes, strict=True)
            return [run(copy.deepcopy(module), draw, teacher, dtype=dtype) for module, dtype in pairs]

        oracle.assert_promise(("loss", "gradient"), answers, [student], torch.float32)
        for module, dtype in zip(modules, dtypes, strict=True):
            module(student.to(dtype), teacher.to(dtype))
    torch.testing.assert_close(modules[0].center, modules[1].center)
    assert modules[0].state_dict().keys() == modules[1].state_dict().keys()


def test_swav():
    crops = [F.normalize(torch.randn(6, 8)) @ F.normalize(torch.randn(30, 8)).t() for _ in range(3)]
    their = theirs("utils/sinkhorn_knopp", "SinkhornKnopp")
    assert sslops.compat.parameters(ours.SinkhornKnopp) == sslops.compat.parameters(their)
    mine, other = ([make(4, 0.07)(x) for x in crops] for make in (ours.SinkhornKnopp, their))
    torch.testing.assert_close(mine, other)
    func = theirs("losses/swav", "swav_loss_func")
    assert sslops.compat.parameters(ours.swav_loss_func) == sslops.compat.parameters(func)

    def of(loss):
        return lambda *preds: loss(list(preds), [a.to(preds[0]) for a in other], 0.2)

    assert_same(of(ours.swav_loss_func), of(func), crops)


@pytest.mark.parametrize("options", [{}, {"temperature_q": 0.2, "temperature_k": 0.07}])
def test_ressl(options):
    mine, their = ours.ressl_loss_func, theirs("losses/ressl", "ressl_loss_func")
    assert sslops.compat.parameters(mine) == sslops.compat.parameters(their)
    q, k, queue = (F.normalize(torch.randn(n, 16)) for n in (24, 24, 300))
    assert_same(mine, their, [q], k, queue, **options)
    k, queue = k.requires_grad_(), queue.requires_grad_()  # the queue has one, the key none
    found = [torch.autograd.grad(loss(q, k, queue), [k, queue], allow_unused=True) for loss in (mine, their)]
    assert found[0][0] is None
    torch.testing.assert_close(found[0][1], found[1][1])


def test_momentum_updater():
    updaters = [make(0.9, 1.0) for make in (theirs("utils/momentum", "MomentumUpdater"), ours.MomentumUpdater)]
    online = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))
    targets = [nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))]
    targets.append(copy.deepcopy(targets[0]))
    memory = [p.data_ptr() for p in targets[1].parameters()]
    for step in range(5):
        for updater, target in zip(updaters, targets, strict=True):
            updater.update(online, target)
            updater.update_tau(step, 4)
        assert vars(updaters[0]) == vars(updaters[1])
        for x, y in zip(targets[0].parameters(), targets[1].parameters(), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)
    assert memory == [p.data_ptr() for p in targets[1].parameters()]
    for bad in ((-0.1, 1), (0.5, 1.1), (0.9, 0.8)):
        for make in (type(updaters[0]), ours.MomentumUpdater):
            with pytest.raises(AssertionError):
                make(*bad)


@pytest.fixture
def solo(tmp_path, monkeypatch):
    """A package with solo-learn 1.0.6's modules and signatures, and methods that have bound the names."""

    def package(signature="z, indexes, temperature=0.1", found="1.0.6"):
        for home, objects in ours.REPLACED.items():
            path, _, owner = home.partition(":")
            file = tmp_path / (path.replace(".", "/") + ".py")
            file.parent.mkdir(parents=True, exist_ok=True)
            for folder in (file.parent, file.parents[1]):
                (folder / "__init__.py").touch()
            name = objects[0].__name__
            parameters = {"simclr_loss_func": signature}.get(name) or plain(objects[0])
            if owner:
                file.write_text(f"class {owner}:\n    def {name}({parameters}): return 'theirs'\n")
                continue
            file.write_text(
                f"class {name}:\n    def __init__(self, {parameters}): pass\n"
                if isinstance(objects[0], type)
                else f"def {name}({parameters}): return 'theirs'\n"
            )
        (tmp_path / "solo/methods/__init__.py").write_text(
            "from solo.losses.simclr import simclr_loss_func\nfrom solo.utils.momentum import MomentumUpdater\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(sslops.compat, "version", lambda distribution: found)

    yield package
    for name in [name for name in sys.modules if name.split(".")[0] == "solo"]:
        del sys.modules[name]


def plain(x):
    parameters = sslops.compat.parameters(x)
    return ", ".join(name if default is Parameter.empty else f"{name}={default!r}" for name, _, default in parameters)


def test_patch_reaches_names_that_methods_bound(solo):
    solo()
    methods = importlib.import_module("solo.methods")
    losses = importlib.import_module("solo.losses.simclr")
    with sslops.patch_solo():
        sslops.patch_solo()
        assert methods.simclr_loss_func is losses.simclr_loss_func is ours.simclr_loss_func
        assert methods.MomentumUpdater is ours.MomentumUpdater
    assert methods.simclr_loss_func is losses.simclr_loss_func
    assert methods.simclr_loss_func(0, 0) == "theirs"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"signature": "z1, z2, temperature=0.1"}, r"wanted simclr_loss_func\(z: .*has \(z1, z2, temperature=0\.1\)"),
        ({"found": "2.0"}, r"wanted solo-learn 1\.0\.6 .*, got 2\.0"),
    ],
)
def test_other_versions_are_refused(solo, options, message):
    solo(**options)
    methods = importlib.import_module("solo.methods")
    with pytest.raises(ImportError, match=message):
        sslops.patch_solo()
    assert methods.simclr_loss_func(0, 0) == "theirs"


def test_what_does_not_import_is_named(solo):
    solo()
    Path(importlib.import_module("solo.losses.mae").__file__).unlink()
    del sys.modules["solo.losses.mae"]
    importlib.invalidate_caches()
    with pytest.raises(ImportError, match=r"patch_solo: solo-learn 1\.0\.6 does not import solo\.losses\.mae"):
        sslops.patch_solo()
