"""Ours in place of lightly's, with lightly itself as the oracle."""

import copy
import functools
import importlib
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import sslops
import sslops.compat
from benchmarks import peers
from sslops.compat import lightly as ours

from . import oracle

if peers.lightly() is None:
    pytest.skip("lightly is not installed", allow_module_level=True)
HOMES = {x.__name__: home for home, objects in ours.REPLACED.items() for x in objects}
# What forward takes: [N, D] views, or [N, ..., D] where that is allowed.
LOSSES = [
    ("NTXentLoss", {}, (24, 40)),
    ("NTXentLoss", {"temperature": 0.07}, (257, 33)),
    ("NTXentLoss", {"temperature": 0.07}, (1, 8)),
    ("NTXentLoss", {"temperature": 0.1, "memory_bank_size": (64, 40)}, (24, 40)),
    ("NTXentLoss", {"temperature": 0.1, "memory_bank_size": (1000, 50)}, (96, 50)),
    ("DCLLoss", {}, (24, 40)),
    ("DCLWLoss", {}, (257, 33)),
    ("DCLWLoss", {"temperature": 0.5, "sigma": 0.1}, (24, 40)),
    ("BarlowTwinsLoss", {}, (24, 40)),
    ("BarlowTwinsLoss", {"lambda_param": 0.1}, (65, 300)),
    ("VICRegLoss", {}, (24, 40)),
    ("VICRegLoss", {"lambda_param": 2.0, "mu_param": 3.0, "nu_param": 7.0, "eps": 0.01}, (65, 300)),
    ("VICRegLoss", {}, (12, 2, 3, 16)),
    ("NegativeCosineSimilarity", {}, (24, 40)),
    ("NegativeCosineSimilarity", {"dim": 2, "eps": 0.1}, (3, 5, 16)),
]


def original(name):
    return getattr(importlib.import_module(HOMES[name]), name)


def both(name, options, dtype=torch.float32):
    """lightly's module and ours, from the same random numbers."""
    modules = []
    for make in (original(name), getattr(ours, name)):
        torch.manual_seed(3)
        modules.append(make(**options).to(dtype))
    return modules


def views(shape):
    x = torch.randn(shape)
    return [x + 0.5 * torch.randn(shape) for _ in range(2)]


def run(module, inputs, beside=()):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = module(*leaves, *beside)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def assert_same(name, options, inputs, change=None, beside=()):
    """At most twice lightly's own error against lightly in float64. beside: without gradients"""
    modules = [*both(name, options), both(name, options, torch.float64)[0]]
    for module in modules:
        for attribute, value in (change or {}).items():
            setattr(module, attribute, value)

    def answers(draw):
        theirs, mine, truth = (
            run(m, [x.to(t) for x in draw], [x.to(t) if x.is_floating_point() else x for x in beside])
            for m, t in zip(modules, DTYPES, strict=True)
        )
        return mine, theirs, truth

    oracle.assert_promise(("loss", "gradient 0", "gradient 1"), answers, inputs, torch.float32)


DTYPES = (torch.float32, torch.float32, torch.float64)


@pytest.mark.parametrize(("name", "options", "shape"), LOSSES)
def test_values_and_gradients(name, options, shape):
    assert_same(name, options, views(shape))


def squared_distance(out0, out1):
    """As lightly's documentation weights: with a gradient; and of one view otherwise than of the other"""
    return ((out0 - out1 * 0.5) ** 2).sum(1)


def test_weights_with_a_gradient():
    assert_same("DCLLoss", {"temperature": 0.1, "weight_fn": squared_distance}, views((65, 33)))


@pytest.mark.parametrize("shape", [(5, 4, 24), (33, 7, 40)])
def test_detcon(shape):
    """Masks more than once in a view, and some in one view alone"""
    masks = list(torch.randint(5, (2, *shape[:2])))
    assert_same("DetConSLoss", {"temperature": 0.2}, views(shape), beside=masks)
    assert_same("DetConBLoss", {}, views(shape), beside=views(shape) + masks)
    with pytest.raises(ValueError, match="DetConBLoss: target_view0: wanted targets that want no gradient"):
        ours.DetConBLoss()(*views(shape), *(x.requires_grad_() for x in views(shape)), *masks)


@pytest.mark.parametrize("name", sorted(HOMES))
def test_signature(name):
    theirs, mine = original(name), getattr(ours, name)
    assert sslops.compat.parameters(mine) == sslops.compat.parameters(theirs)
    if isinstance(mine, type):
        assert sslops.compat.parameters(mine.forward) == sslops.compat.parameters(theirs.forward)
        assert not issubclass(mine, theirs)


@pytest.mark.parametrize(("name", "options"), dict.fromkeys((name, str(options)) for name, options, _ in LOSSES))
def test_attributes_and_state(name, options):
    """The same attributes with the same values, and state_dicts that load into each other."""
    theirs, mine = both(name, eval(options))
    unused = {"cross_entropy"}  # theirs computes with it
    assert public(mine).keys() == public(theirs).keys() - unused
    for attribute, value in public(mine).items():
        if isinstance(value, functools.partial):
            assert value.keywords == getattr(theirs, attribute).keywords
        elif not isinstance(value, nn.Module):
            assert value == getattr(theirs, attribute), attribute
    assert mine.state_dict().keys() == theirs.state_dict().keys() == set()
    for (at, x), (their_at, y) in zip(mine.named_buffers(), theirs.named_buffers(), strict=True):
        assert at == their_at
        assert x.dtype == y.dtype
        if len(x) > 1:  # lightly leaves those of a bank that it does not use uninitialised
            assert torch.equal(x, y)
    mine.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(mine.state_dict())
    for copied in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
        assert public(copied).keys() == public(mine).keys()


def public(module):
    return {n: v for n, v in {**vars(module), **module._modules}.items() if n[0] != "_" and n != "training"}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("NTXentLoss", {"temperature": 0.03}),
        ("BarlowTwinsLoss", {"lambda_param": 1.0}),
        ("VICRegLoss", {"lambda_param": 1.0, "mu_param": 2.0, "nu_param": 3.0, "eps": 0.3}),
        ("NegativeCosineSimilarity", {"dim": 0, "eps": 3.0}),
    ],
)
def test_attributes_change_in_mid_run(name, change):
    assert_same(name, {}, views((24, 40)), change)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("NTXentLoss", {"temperature": 0.0}),
        ("NTXentLoss", {"temperature": -1e-9}),
        ("NTXentLoss", {"memory_bank_size": 10}),
        ("MemoryBankModule", {"size": -1}),
        ("MemoryBankModule", {"size": (4, -1)}),
        ("MemoryBankModule", {"size": (4,)}),
        ("MemoryBankModule", {"size": (4, 3, 2)}),
    ],
)
def test_constructors_refuse(name, options):
    messages = []
    for make in (original(name), getattr(ours, name)):
        with pytest.raises(ValueError, match=r"Illegal|size") as caught:
            make(**options)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("name", ["BarlowTwinsLoss", "VICRegLoss"])
@pytest.mark.parametrize("shapes", [((1, 8), (1, 8)), ((4, 8), (6, 8))])
def test_inputs_are_refused(name, shapes):
    errors = []
    for module in both(name, {}):
        with pytest.raises((ValueError, AssertionError, RuntimeError)) as caught:
            module(*(torch.randn(shape) for shape in shapes))
        errors.append(caught.type)
    if errors[0] is not RuntimeError:  # torch's own, of shapes that do not fit; ours is a ValueError
        assert errors[0] is errors[1]


@pytest.mark.parametrize("feature_dim_first", [True, False])
def test_memory_bank(feature_dim_first):
    """Bits and pointer: batches that fit, that end with the bank, that do not fit and that never could."""
    banks = both("MemoryBankModule", {"size": (10, 3), "feature_dim_first": feature_dim_first})
    for rows, update in [(4, True), (3, False), (6, True), (9, True), (3, True), (0, True), (25, True), (2, True)]:
        batch = torch.randn(rows, 3, requires_grad=True)
        results = [bank(batch, update=update) for bank in banks]
        assert all(output is batch for output, _ in results)
        assert torch.equal(results[0][1], results[1][1])
        assert torch.equal(banks[0].bank, banks[1].bank)
        assert torch.equal(banks[0].bank_ptr, banks[1].bank_ptr)
        assert not results[1][1].requires_grad
    for bank in banks:  # as users do in mid-run
        bank.bank_ptr[0], bank.bank = 7, torch.ones(10, 3)
        bank(batch, update=True)
    assert torch.equal(banks[0].bank, banks[1].bank)


def test_moco_steps():
    """Query, then enqueue, and only where out0 requires grad: losses and banks of several steps."""
    modules = both("NTXentLoss", {"temperature": 0.1, "memory_bank_size": (50, 8)})
    for step in range(6):
        out0, out1 = views((16, 8))
        out0.requires_grad_(step != 2)
        losses = [module(out0, out1) for module in modules]
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*(module.memory_bank.bank for module in modules), rtol=0, atol=0)
        if step != 2:
            torch.testing.assert_close(*(torch.autograd.grad(loss, out0)[0] for loss in losses))


def test_update_momentum():
    models = []
    for update in (original("update_momentum"), ours.update_momentum):
        torch.manual_seed(0)
        online, target = (nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30)) for _ in range(2))
        for momentum in (0.996, 0, 1, 0.5):
            update(online, target, momentum)
            online(torch.randn(9, 20))
            target[0].weight.requires_grad_(momentum == 0.996)
        models.append(target)
    assert not models[1][1].running_mean.any()  # parameters only
    for x, y in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


def test_nn_memory_bank():
    """The rows, and the bank after each step; also from rows of any length"""
    banks = both("NNMemoryBankModule", {"size": (50, 8)})
    assert public(banks[1]) == public(banks[0])
    for rows, update in [(16, True), (9, False), (40, True), (30, True), (5, True)]:
        batch = 3 * torch.randn(rows, 8, requires_grad=True)
        theirs, mine = (bank(batch, update=update) for bank in banks)
        assert torch.equal(mine, theirs)
        assert torch.equal(banks[0].bank, banks[1].bank)
        assert not mine.requires_grad
    for bank in both("NNMemoryBankModule", {"size": 0}):
        with pytest.raises(AssertionError):
            bank(batch)


@pytest.mark.parametrize(("options", "shape"), [({}, (65, 33)), ({"p": 1, "eps": 1e-3}, (24, 40))])
def test_koleo(options, shape):
    theirs, mine = both("KoLeoLoss", options)
    assert public(mine).keys() == public(theirs).keys()
    modules = [mine, theirs, theirs]

    def answers(draw):
        dtypes = (torch.float32, torch.float32, torch.float64)
        return [run(m, [x.to(t) for x in draw]) for m, t in zip(modules, dtypes, strict=True)]

    oracle.assert_promise(("loss", "gradient"), answers, [torch.randn(shape)], torch.float32)
    oracle.assert_compiles(mine, torch.randn(shape))


@pytest.mark.parametrize("size", [(3, 50), (2, 1), (4, 0), (0, 9)])
@pytest.mark.parametrize(
    "options", [{}, {"mask_ratio": 0.75}, {"mask_ratio": 0.0}, {"mask_ratio": 1.0}, {"mask_class_token": True}]
)
def test_random_token_mask(size, options):
    """The same seed gives the same mask."""
    results = []
    for mask in (original("random_token_mask"), ours.random_token_mask):
        torch.manual_seed(5)
        results.append(mask(size, **options, device="cpu"))
    for theirs, mine in zip(*results, strict=True):
        assert torch.equal(theirs, mine)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_tokens(dtype):
    """The bits of lightly's values; gradients up to the order in which those of a repeated index are added up."""
    index = torch.stack([torch.randperm(9)[:4] for _ in range(3)])
    calls = {
        "get_at_index": lambda f, tokens: f(tokens, index),
        "set_at_index": lambda f, tokens: f(tokens, index, tokens[:, :4] + 1),
        "repeat_token": lambda f, tokens: f(tokens[:1, :1], (3, 5)),
        "patchify": lambda f, tokens: f(tokens.view(1, 3, 6, 6), 2),
    }
    for name, call in calls.items():
        results = []
        for f in (original(name), getattr(ours, name)):
            tokens = torch.arange(108).view(3, 9, 4).to(dtype).requires_grad_(dtype.is_floating_point)
            out = call(f, tokens)
            results.append([out.detach()])
            if out.requires_grad:
                results[-1].append(torch.autograd.grad((out * out.detach()).sum(), tokens)[0])
        assert all(map(torch.equal, *results)), name


def test_mae_functions_compile():
    tokens = torch.randn(3, 10, 4, requires_grad=True)

    def step(tokens):
        keep, masked = ours.random_token_mask(tuple(tokens.shape[:2]), 0.5)
        tokens = ours.set_at_index(ours.repeat_token(tokens[:1, :1], (3, 10)), keep, ours.get_at_index(tokens, keep))
        return ours.get_at_index(tokens, masked)

    results = []
    for f in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(1)
        results.append([out := f(tokens), *torch.autograd.grad(out.square().sum(), tokens)])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize(("name", "options", "shape"), [row for row in LOSSES if row[2][0] >= 24])
def test_no_graph_breaks(name, options, shape):
    module = getattr(ours, name)(**options)
    torch._dynamo.reset()
    assert torch._dynamo.explain(module)(*views(shape)).graph_break_count == 0
    if "memory_bank_size" not in options:
        oracle.assert_compiles(module, *views((24, shape[-1])))


def test_a_compiled_bank_keeps_its_state():
    torch._dynamo.reset()
    plain = ours.NTXentLoss(memory_bank_size=(50, 8))
    compiled, graphs = copy.deepcopy(plain), CompileCounterWithBackend("aot_eager")
    step = torch.compile(compiled, fullgraph=True, backend=graphs)
    for rows in (16, 16, 24, 30):
        inputs = views((rows, 8))
        results = []
        for module in (step, plain):
            out0 = inputs[0].clone().requires_grad_()
            loss = module(out0, inputs[1])
            results.append([loss, *torch.autograd.grad(loss, out0)])
        assert all(map(torch.equal, *results))
        assert torch.equal(compiled.memory_bank.bank, plain.memory_bank.bank)
        assert torch.equal(compiled.memory_bank.bank_ptr, plain.memory_bank.bank_ptr)
    assert graphs.frame_count == 2


@pytest.mark.parametrize(("name", "options", "shape"), [row for row in LOSSES if row[0] != "NegativeCosineSimilarity"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(name, options, shape, dtype):
    """A float32 loss, and no further than twice lightly's distance from the loss without autocast."""
    inputs = [x.to(dtype) for x in views(shape)]
    theirs, mine = both(name, options)
    exact = both(name, options, torch.float64)[0](*(x.double() for x in inputs))
    with torch.autocast("cpu", dtype):
        losses = [float((module(*inputs) - exact).abs()) for module in (theirs, mine)]
        loss = mine(*inputs)
    assert loss.dtype == torch.float32
    assert losses[1] <= 2 * losses[0] + 1e-3 * abs(float(exact))


@pytest.mark.parametrize("options", [{}, {"knots": 5, "t_max": 2.0, "num_vectors": 70}])
def test_sigreg(options):
    """Along the directions that lightly draws"""
    z, (theirs, mine), exact = torch.randn(3, 40, 12), both("SIGReg", options), both("SIGReg", options)[0].double()
    assert mine.state_dict().keys() == theirs.state_dict().keys()
    mine.load_state_dict(theirs.state_dict())
    assert all(torch.equal(x, y) for x, y in zip(mine.buffers(), theirs.buffers(), strict=True))
    assert public(mine).keys() == public(theirs).keys()

    directions = nn.functional.normalize(torch.randn(12, mine.num_vectors), dim=0)
    exact._generate_unit_vectors = lambda *_: directions.double()
    theirs._generate_unit_vectors = lambda *_: directions
    torch.manual_seed(5)
    found = mine(z)
    torch.manual_seed(5)
    torch.testing.assert_close(found, original("SIGReg")(**options)(z))

    def ours_along(z):
        return sslops.sigreg(z, knots=len(mine.t), t_max=mine._t_max, directions=directions.t())

    def answers(draw):
        return run(ours_along, draw), run(theirs, draw), run(exact, [draw[0].double()])

    oracle.assert_promise(("loss", "gradient"), answers, [z], torch.float32)
    assert mine(z.view(3, 2, 20, 12)).shape == mine(z[0]).shape == ()


def test_lejepa():
    found = []
    for module in both("LeJEPALoss", {"lambda_param": 0.3, "sigreg_num_vectors": 70}):
        torch.manual_seed(5)
        views = torch.randn(5, 40, 12, requires_grad=True)
        loss = module(global_proj=views[:2], local_proj=views[2:])
        found.append([loss, *torch.autograd.grad(loss, views)])
        with pytest.raises(ValueError, match="local_proj must have shape"):
            module(global_proj=views[:2], local_proj=views[2])
        with pytest.raises(ValueError, match="local_proj must have at least one local view"):
            module(global_proj=views[:2], local_proj=views[:0])
        for other in (views[2:, 1:], views[2:, :, 1:]):
            with pytest.raises(ValueError, match="local_proj and global_proj must have"):
                module(global_proj=views[:2], local_proj=other)
    torch.testing.assert_close(*found)
    with sslops.patch_lightly():
        world_model = importlib.import_module("lightly.loss.lewm_loss").LeWMLoss()
        assert isinstance(world_model.sigreg, ours.SIGReg)


# ---- prototypes: what forward takes, as lists that run() can make leaves of ----


def units(*shape):
    return nn.functional.normalize(torch.randn(*shape), dim=-1)


def prototype_inputs(name, k=30):
    """Tensors, then how forward has them"""
    if name == "DINOLoss":
        teacher, student = torch.randn(2, 6, k) * 0.3, torch.randn(5, 6, k) * 0.3
        return [student], lambda student: ([t.to(student) for t in teacher], list(student))
    if name == "IBOTPatchLoss":
        mask = torch.rand(4, 3, 3) < 0.4
        mask[1] = False
        student, teacher = torch.randn(2, int(mask.sum()), k) * 0.2
        return [student], lambda student: (teacher.to(student), student, mask)
    if name == "IBOTPlusPlusPatchLoss":
        mask = torch.rand(4, 3, 3) < 0.4
        mask[1], mask[2] = False, True
        student, teacher = torch.randn(2, 4, 9, k) * 0.2
        return [student], lambda student: (teacher.to(student), student, mask)
    if name == "CAPILoss":
        student, teacher = torch.randn(2, 6, 5, k) * 0.3
        return [student], lambda student: (teacher.to(student), student)
    prototypes = units(k, 8)
    if name == "SwaVLoss":
        crops, queue = units(5, 6, 8) @ prototypes.t(), units(2, 9, 8) @ prototypes.t()
        return [crops], lambda crops: (list(crops[:2]), list(crops[2:]), [x.to(crops) for x in queue])
    anchors, targets = units(12, 8) * 3, units(6, 8)
    return [anchors, prototypes * 2], lambda anchors, prototypes: (anchors, targets.to(anchors), prototypes)


INDEX = torch.tensor([[4, 0, 0, 2, 1]]).repeat(6, 1)


def uneven(mean):
    return torch.arange(len(mean), 0, -1) / (len(mean) * (len(mean) + 1) / 2)


PROTOTYPES = [
    ("DINOLoss", {"output_dim": 30}, {}),
    ("DINOLoss", {"output_dim": 30, "student_temp": 0.2, "center_momentum": 0.5}, {"teacher_temp": 0.06}),
    ("DINOLoss", {"output_dim": 30, "warmup_teacher_temp": 0.03, "warmup_teacher_temp_epochs": 5}, {"epoch": 2}),
    ("DINOLoss", {"output_dim": 30, "teacher_temp": 0.07}, {"epoch": 40}),
    ("IBOTPatchLoss", {"output_dim": 30}, {}),
    ("IBOTPatchLoss", {"output_dim": 30, "center_momentum": 0.5}, {"teacher_temp": 0.06}),
    ("SwaVLoss", {}, {}),
    ("SwaVLoss", {"temperature": 0.2, "sinkhorn_iterations": 5, "sinkhorn_epsilon": 0.07}, {}),
    ("MSNLoss", {}, {}),
    ("MSNLoss", {"temperature": 0.2, "sinkhorn_iterations": 0, "regularization_weight": 0.0}, {}),
    ("MSNLoss", {"sinkhorn_iterations": 1}, {"target_sharpen_temperature": 0.5}),
    ("PMSNLoss", {"power_law_exponent": 0.5}, {}),
    ("PMSNCustomLoss", {"target_distribution": uneven}, {}),
    ("IBOTPlusPlusPatchLoss", {"output_dim": 30}, {}),
    ("IBOTPlusPlusPatchLoss", {"output_dim": 30}, {"teacher_temp": 0.06, "visible_loss_weight": 0.3}),
    ("CAPILoss", {}, {}),
    ("CAPILoss", {"student_temperature": 0.2, "sinkhorn_iterations": 5}, {"teacher_index": INDEX}),
]


@pytest.mark.parametrize(("name", "options", "call"), PROTOTYPES)
def test_prototypes(name, options, call):
    """Three steps, so that a centre has moved; at most twice lightly's own error, and the same buffers."""
    modules = [*both(name, options), both(name, options, torch.float64)[0]]
    for _ in range(3):
        inputs, arguments = prototype_inputs(name)

        def forward(module, arguments=arguments):
            return lambda *x: module(*arguments(*x), **call)  # noqa: B023

        def answers(draw, forward=forward):
            pairs = zip(modules, DTYPES, strict=True)
            theirs, mine, truth = (
                run(forward(copy.deepcopy(module)), [x.to(dtype) for x in draw]) for module, dtype in pairs
            )
            return mine, theirs, truth

        oracle.assert_promise(("loss", "gradient 0", "gradient 1")[: 1 + len(inputs)], answers, inputs, torch.float32)
        for module, dtype in zip(modules, DTYPES, strict=True):
            forward(module)(*(x.to(dtype) for x in inputs))
    theirs, mine = (module.state_dict() for module in modules[:2])
    assert theirs.keys() == mine.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(mine[key], value)


def test_dino_of_one_crop_is_refused():
    for module in both("DINOLoss", {"output_dim": 30}):
        with pytest.raises(ValueError, match=r"at least two views|a crop to pair"):
            module([torch.randn(2, 30)], [torch.randn(2, 30)])


def test_ibot_plus_plus_takes_tokens_of_any_shape():
    """Without a mask the mean over them; what is wrong is said as lightly says it."""
    student, teacher = torch.randn(2, 3, 8, 30)
    mask = torch.rand(3, 8) < 0.4
    calls = [
        (teacher, student), (teacher, student, mask.view(3, 2, 4)),
        (teacher.flatten(0, 1), student.flatten(0, 1), mask), (teacher, student[:2]), (teacher[None], student[None]),
        (teacher[0], student[0]), (teacher[0, :7], student[0, :7], mask),
    ]  # fmt: skip
    for number, call in enumerate(calls):
        theirs, mine = both("IBOTPlusPlusPatchLoss", {"output_dim": 30})
        if number < 3:
            torch.testing.assert_close(mine(*call), theirs(*call))
            continue
        said = ("have the same shape", "rank 2 or 3", "mask is required", "not divisible by batch size")[number - 3]
        for module in (theirs, mine):
            with pytest.raises(ValueError, match=said):
                module(*call)


def test_co2_is_lightlys_own_without_a_gradient():
    """As the package's text says; the bank in it is ours"""
    with sslops.patch_lightly():
        regularizer = importlib.import_module("lightly.loss.regularizer").CO2Regularizer(memory_bank_size=(16, 8))
    assert type(regularizer.memory_bank) is ours.MemoryBankModule
    with pytest.warns(UserWarning, match="clone"):
        assert not regularizer(*(x.requires_grad_() for x in views((4, 8)))).requires_grad


@pytest.mark.parametrize(
    "name", ["DINOLoss", "SwaVLoss", "MSNLoss", "IBOTPatchLoss", "IBOTPlusPlusPatchLoss", "CAPILoss"]
)
def test_prototypes_compile(name):
    module = getattr(ours, name)(**({"output_dim": 30} if name.startswith(("DINO", "IBOT")) else {}))
    inputs, arguments = prototype_inputs(name)
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager")
    for plain, other in zip(*(run(lambda *x, m=m: m(*arguments(*x)), inputs) for m in (module, compiled)), strict=True):
        torch.testing.assert_close(other, plain)


@pytest.mark.parametrize(("name", "options"), [("DINOLoss", {"output_dim": 3}), ("Center", {"size": (1, 3)})])
def test_center_modes(name, options):
    for make in (original(name), getattr(ours, name)):
        with pytest.raises(ValueError, match=r"Unknown mode .median.\. Valid modes are"):
            make(**options, **{"mode" if name == "Center" else "center_mode": "median"})


def test_center():
    theirs, mine = both("Center", {"size": (1, 1, 30), "momentum": 0.7})
    for rows in (4, 7):
        x = torch.randn(2, rows, 30)
        theirs.update(x)
        mine.update(x)
    torch.testing.assert_close(mine.value, theirs.value)
    assert mine.state_dict().keys() == theirs.state_dict().keys()


def bindings():
    modules = {path: module for path, module in list(importlib.sys.modules.items()) if path.split(".")[0] == "lightly"}
    return {(path, name): id(value) for path, module in modules.items() for name, value in vars(module).items()}


class TestPatch:
    def test_every_name_and_back(self):
        importlib.import_module("lightly.loss.memory_bank")
        before = bindings()
        originals = {name: original(name) for name in HOMES}
        with sslops.patch_lightly():
            assert importlib.import_module("lightly.loss").NTXentLoss is ours.NTXentLoss
            assert importlib.import_module("lightly.loss.memory_bank").MemoryBankModule is ours.MemoryBankModule
            assert all(original(name) is getattr(ours, name) for name in HOMES)
            assert not {id(x) for x in originals.values()} & set(bindings().values())
            patched = bindings()
            again = sslops.patch_lightly()
            assert bindings() == patched
        assert bindings() == before
        again.unpatch()
        assert bindings() == before

    def test_a_block_inside_a_block_leaves_it_patched(self):
        with sslops.patch_lightly():
            with sslops.patch_lightly():
                pass
            assert original("NTXentLoss") is ours.NTXentLoss
        assert original("NTXentLoss") is not ours.NTXentLoss

    def test_other_versions_are_refused(self, monkeypatch):
        monkeypatch.setattr(sslops.compat, "version", lambda _: "2.0.1")
        before = bindings()
        with pytest.raises(ImportError, match=r"wanted lightly 1\.6, got 2\.0\.1"):
            sslops.patch_lightly()
        assert bindings() == before

    def test_what_is_not_there_is_refused(self, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
        with pytest.raises(ImportError, match=r"wanted lightly 1\.6, which is not installed"):
            sslops.patch_lightly()

    def test_a_clone_on_the_path_is_judged_by_its_signatures(self, monkeypatch):
        def version(distribution):
            raise importlib.metadata.PackageNotFoundError(distribution)

        monkeypatch.setattr(sslops.compat, "version", version)
        with sslops.patch_lightly():
            assert original("NTXentLoss") is ours.NTXentLoss

    def test_another_signature_is_refused(self, monkeypatch):
        class BarlowTwinsLoss(nn.Module):
            def __init__(self, lambd=0.1):
                super().__init__()

        home = importlib.import_module("lightly.loss.barlow_twins_loss")
        monkeypatch.setattr(home, "BarlowTwinsLoss", BarlowTwinsLoss)
        before = bindings()
        with pytest.raises(ImportError, match=r"wanted BarlowTwinsLoss\(lambda_param.*has \(lambd=0\.1\); wanted 1\.6"):
            sslops.patch_lightly()
        assert bindings() == before

    def test_patched_names_are_pickled_as_ours(self):
        with sslops.patch_lightly():
            loss = importlib.import_module("lightly.loss").VICRegLoss(mu_param=3.0)
            assert type(pickle.loads(pickle.dumps(loss))) is ours.VICRegLoss


@pytest.mark.parametrize("name", ["MACLLoss", "DirectCLRLoss"])
def test_lines_of_the_docs(name):
    """docs/methods/simclr.md has these losses by nt_xent"""
    module = importlib.import_module(f"lightly.loss.{name.removesuffix('Loss').lower()}_loss")
    h0, h1 = (h.requires_grad_() for h in views((24, 80)))
    if name == "MACLLoss":
        similarity = nn.functional.cosine_similarity(h0, h1).mean().detach()
        losses = sslops.nt_xent(h0, h1, temperature=0.1 * (1 + 0.5 * (similarity - 0.0)), reduction="none")
        loss = (losses / (1 - (-losses).exp() + 1e-8).detach()).mean()
    else:
        loss = sslops.nt_xent(h0.flatten(1)[:, :64], h1.flatten(1)[:, :64])
    theirs = getattr(module, name)()(h0, h1)
    torch.testing.assert_close(loss, theirs)
    for x, y in zip(*(torch.autograd.grad(each, [h0, h1]) for each in (loss, theirs)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)


def test_mmcr_of_the_docs():
    """The lines of docs/methods/plain.md: lightly's value and gradient, more images than columns and fewer"""
    page = (Path(__file__).parents[1] / "docs/methods/plain.md").read_text().split("## MMCR")[1]
    code = compile(re.search(r"```python\n(.*?)```", page, re.S)[1], "plain.md", "exec")
    theirs = importlib.import_module("lightly.loss.mmcr_loss").MMCRLoss(lmda=5e-3)
    for shape in ((24, 2, 40), (40, 3, 24)):
        online, momentum = (nn.functional.normalize(x, dim=-1).requires_grad_() for x in torch.randn(2, *shape))
        names = {"torch": torch, "online": online, "momentum": momentum}
        exec(code, names)
        found, expected = ([x, *torch.autograd.grad(x, online)] for x in (names["loss"], theirs(online, momentum)))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
