"""The README's promises, each over all ops and backends (cases.py); EXEMPT says where one does not hold, and why."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import sslops
from sslops import _C, backend

from . import oracle
from .cases import CASES, Case

# (promise, op): why not
EXEMPT = {
    ("listed", "ema_update"): "updates in place: tests/test_ema_update.py",
    ("fullgraph", "dino"): "eager mode scales the gradient that forward left: the last bit may differ",
    ("fullgraph", "ibot"): "eager mode scales the gradient that forward left: the last bit may differ",
    ("fullgraph", "masked_prediction"): "eager mode scales the gradient that forward left: the last bit may differ",
    ("second_use", "dino"): "eager mode scales the gradient that forward left: the last bit may differ",
    ("second_use", "ibot"): "eager mode scales the gradient that forward left: the last bit may differ",
    ("second_use", "masked_prediction"): "eager mode scales the gradient that forward left: the last bit may differ",
    ("same_bits", "masked_token_cross_entropy"): "torch's own products: their last bit may differ with the threads",
    ("meta_tensors", "masked_token_cross_entropy"): "the reference has a row for each label that is in memory",
    ("empty_batch", "nearest"): "refused: no candidate",
    ("empty_batch", "barlow_twins"): "refused: no variance",
    ("empty_batch", "cross_correlation"): "refused: no variance",
    ("empty_batch", "vicreg"): "refused: no variance",
}

TARGETS = [(case, *target) for case in CASES for target in oracle.targets(case.op)]
each_target = pytest.mark.parametrize(("case", "device", "backend"), TARGETS, ids=str)
GRADED = [target for target in TARGETS if target[0].graded]
each_graded = pytest.mark.parametrize(("case", "device", "backend"), GRADED, ids=str)


def skip_exempt(promise: str, case: Case) -> None:
    reason = EXEMPT.get((promise, case.op))
    if reason:
        pytest.skip(reason)


def on(device: str, case: Case) -> Case:
    """Its tensors there"""

    def moved(values: dict) -> dict:
        return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in values.items()}

    return case._replace(inputs=moved(case.inputs), options=moved(case.options))


class Calls(TorchDispatchMode):
    """The calls of sslops' registered ops, with their arguments"""

    def __init__(self) -> None:
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "sslops":
            self.found.append((func, args))
        return func(*args, **(kwargs or {}))


def calls(case: Case, backend: str) -> list:
    with Calls() as mode:
        case.run_with_gradients(backend)
    assert mode.found
    return mode.found


def test_every_op_is_listed():
    assert set(backend.ops()) - {case.op for case in CASES} == {op for promise, op in EXEMPT if promise == "listed"}


def test_every_exemption_is_of_an_op_and_a_promise():
    promises = {"listed", *re.findall(r"^def test_(\w+)\(case", Path(__file__).read_text(), re.M)}
    assert {promise for promise, _ in EXEMPT} <= promises
    assert {op for _, op in EXEMPT} <= set(backend.ops())


@each_target
def test_opcheck(case, device, backend):
    for op, arguments in calls(on(device, case), backend):
        with torch.no_grad():
            torch.library.opcheck(op, arguments)


@each_target
def test_fullgraph(case, device, backend):
    """Without a graph break: the plain call's bits, and one graph for all batch sizes after the first"""
    case = on(device, case)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def step(inputs):
        return case.run(backend, inputs)

    if case.call.__name__ == "drawn":
        pytest.skip("a generator cannot be an argument of a graph")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    sizes = range(12, 8, -1) if case.batched else (None,)
    for size in sizes:
        inputs = {name: x[:size].clone() for name, x in case.inputs.items()}
        expected = case.run_with_gradients(backend, inputs)
        found = case._replace(
            call=lambda backend, **inputs: compiled({k: v for k, v in inputs.items() if k in case.inputs})
        )
        for ours, theirs in zip(found.run_with_gradients(backend, inputs), expected, strict=True):
            last_bit = 1e-6 if ("fullgraph", case.op) in EXEMPT else 0.0
            torch.testing.assert_close(ours, theirs, rtol=last_bit, atol=last_bit / 1e6)
    assert counter.frame_count <= 2


@each_target
def test_export(case, device, backend):
    """For inference, any batch size"""
    case = on(device, case)
    if not case.inputs or case.call.__name__ == "drawn":
        pytest.skip("a generator cannot be an argument of a graph")

    class Module(torch.nn.Module):
        def forward(self, inputs):
            return case.run(backend, inputs)

    dynamic = {name: {0: torch.export.Dim.AUTO} if case.batched else None for name in case.inputs}
    exported = torch.export.export(Module(), (case.inputs,), dynamic_shapes=(dynamic,)).module()
    inputs = {name: x[:9] for name, x in case.inputs.items()} if case.batched else case.inputs
    assert torch.equal(exported(inputs), case.run(backend, inputs))


@each_target
def test_autocast(case, device, backend):
    """The result's dtype is eager's outside autocast; bf16 shows in nothing but the operands of matmuls"""
    case = on(device, case)
    plain = case.run_with_gradients("eager")
    with torch.autocast(device, dtype=torch.bfloat16):
        found = case.run_with_gradients(backend)
    for ours, theirs in zip(found, plain, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0.1, atol=0.1, check_dtype=False)


@each_graded
def test_gradient_scaling(case, device, backend):
    """GradScaler's factor is a power of two, and goes through to the last bit"""
    case = on(device, case)
    scaled = case._replace(
        call=lambda **kwargs: case.run(kwargs["backend"], {k: kwargs[k] for k in case.inputs}) * 2.0**16
    )
    for ours, theirs in zip(scaled.run_with_gradients(backend), case.run_with_gradients(backend), strict=True):
        assert torch.equal(ours, theirs * 2.0**16)


@each_graded
def test_second_use(case, device, backend):
    """What forward left is given away at the first one: the same bits are found anew"""
    skip_exempt("second_use", case)
    case = on(device, case)
    leaves = {name: x.clone().requires_grad_(name in case.graded) for name, x in case.inputs.items()}
    given = [leaves[name] for name in case.graded]
    out = case.run(backend, leaves)
    first, second = (torch.autograd.grad(out, given, torch.full_like(out, 0.3), retain_graph=True) for _ in range(2))
    for ours, theirs in zip(second, first, strict=True):
        assert torch.equal(ours, theirs)


@each_graded
def test_second_derivative_is_refused(case, device, backend):
    case = on(device, case)
    leaves = {name: x.clone().requires_grad_(name in case.graded) for name, x in case.inputs.items()}
    out = case.run(backend, leaves)
    gradients = torch.autograd.grad((out * out).sum(), [leaves[name] for name in case.graded], create_graph=True)
    with pytest.raises(RuntimeError, match=rf"{case.op}: fused kernels have no second derivative"):
        sum(g.square().sum() for g in gradients).backward()


@each_graded
def test_torch_func(case, device, backend):
    """grad, vjp outside its transform, jacrev; vmap inside and outside: each row's own bits"""
    case = on(device, case)
    if case.call.__name__ == "drawn":
        pytest.skip("random numbers in a vmap are torch's to refuse")
    given = {name: case.inputs[name] for name in case.graded}

    def loss(given, backend=backend):
        return case.run(backend, case.inputs | given).sum()

    expected = torch.func.grad(lambda x: loss(x, "eager"))(given)
    _, pull_back = torch.func.vjp(loss, given)
    for found in (
        torch.func.grad(loss)(given),
        torch.func.jacrev(loss)(given),
        *pull_back(torch.ones((), device=device)),
    ):
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-6)
    many = {name: torch.stack([x, 2 * x + 1]) for name, x in given.items()}
    inside = torch.func.vmap(torch.func.grad(loss))(many)
    outside = torch.func.grad(lambda many: torch.func.vmap(loss)(many).sum())(many)
    for k in range(2):
        alone = torch.func.grad(loss)({name: x[k] for name, x in many.items()})
        for name in given:
            assert torch.equal(inside[name][k], alone[name])
            assert torch.equal(outside[name][k], alone[name])


@each_graded
def test_tensors_that_outlived_their_transform(case, device, backend):
    """A wrapper that torch.func has left behind stands for its tensor"""
    case, left = on(device, case), {}

    def keep(inputs):
        left.update(inputs)
        return sum(x.sum() for x in inputs.values())

    torch.func.grad(keep)(case.inputs)
    torch.testing.assert_close(case.run(backend, left), case.run(backend), rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(case.run(backend, left), case.run(backend), rtol=0, atol=0)


@each_graded
def test_torch_func_is_refused_by_name(case, device, backend):
    case = on(device, case)
    (name, *_), refused = case.graded, f"{case.op}: fused kernels have no "

    def loss(x):
        return case.run(backend, case.inputs | {name: x}).square().sum()

    x = case.inputs[name]
    with pytest.raises(RuntimeError, match=refused + "second derivative"):
        torch.func.grad(lambda x: torch.func.grad(loss)(x).square().sum())(x)
    with pytest.raises(RuntimeError, match=refused + "forward-mode derivative"):
        torch.func.jvp(loss, (x,), (x,))
    if case.call.__name__ != "drawn":
        with pytest.raises(ValueError, match=rf"{case.op}: vmap: wanted at least one in the batch, got none"):
            torch.func.vmap(loss)(x.new_empty(0, *x.shape))


@each_target
def test_same_bits(case, device, backend):
    case = on(device, case)
    skip_exempt("same_bits", case)
    threads, expected = torch.get_num_threads(), case.run_with_gradients(backend)
    try:
        for count in (threads, 1, 2, 3):
            torch.set_num_threads(count)
            for ours, theirs in zip(case.run_with_gradients(backend), expected, strict=True):
                assert torch.equal(ours, theirs)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_instruction_set(case, isa):
    """The promise of accuracy by each; what is drawn is the same"""
    if not case.run("cpu").is_floating_point():
        assert torch.equal(case.run("cpu"), case.run("eager"))
        return

    def answers(draw):
        inputs = dict(zip(case.inputs, draw, strict=True))
        truth = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
        return [case.run_with_gradients(*call) for call in (("cpu", inputs), ("eager", inputs), ("eager", truth))]

    oracle.assert_promise(["output", *case.graded], answers, list(case.inputs.values()), torch.float32)


@each_target
def test_strides(case, device, backend):
    """Whatever its memory looks like, a tensor counts by its values"""
    case = on(device, case)
    expected = case.run_with_gradients(backend)

    def transposed(x: Tensor) -> Tensor:
        return x.transpose(0, -1).contiguous().transpose(0, -1)

    def spaced(x: Tensor) -> Tensor:
        return torch.stack([x, x], -1)[..., 0]

    def shifted(x: Tensor) -> Tensor:
        memory = x.new_empty(x.numel() + 1)
        return memory[1:].view(x.shape).copy_(x)

    for laid_out in (transposed, spaced, shifted):
        inputs = {name: laid_out(x) for name, x in case.inputs.items()}
        for ours, theirs in zip(case.run_with_gradients(backend, inputs), expected, strict=True):
            assert torch.equal(ours, theirs), laid_out.__name__


@each_graded
def test_negated_views(case, device, backend):
    """Of z.conj().imag, say: the sign is not in the memory"""
    case = on(device, case)
    expected = case.run_with_gradients(backend)
    negated = {name: torch._neg_view(-x) for name, x in case.inputs.items()}
    for ours, theirs in zip(case.run_with_gradients(backend, negated), expected, strict=True):
        assert torch.equal(ours, theirs)
    leaves = {name: x.clone().requires_grad_(name in case.graded) for name, x in case.inputs.items()}
    out = case.run(backend, leaves)
    given = [leaves[name] for name in case.graded]
    plain = torch.autograd.grad(out, given, torch.ones_like(out) * 3, retain_graph=True)
    negative = torch.autograd.grad(out, given, torch._neg_view(torch.ones_like(out) * -3))
    for ours, theirs in zip(negative, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-12)


@each_target
def test_nan(case, device, backend):
    """Shows where it shows in the reference"""
    case = on(device, case)
    skip_exempt("nan", case)
    for name, x in case.inputs.items():
        inputs = case.inputs | {name: x.clone()}
        inputs[name].view(-1)[x.numel() // 2] = torch.nan
        for ours, theirs in zip(
            case.run_with_gradients(backend, inputs), case.run_with_gradients("eager", inputs), strict=True
        ):
            assert torch.equal(ours.isnan(), theirs.isnan()), name


@each_target
def test_empty_batch(case, device, backend):
    case = on(device, case)
    skip_exempt("empty_batch", case)
    if not case.batched:
        pytest.skip("other arguments hold its size")
    inputs = {name: x[:0] for name, x in case.inputs.items()}
    for ours, theirs in zip(
        case.run_with_gradients(backend, inputs), case.run_with_gradients("eager", inputs), strict=True
    ):
        assert ours.shape == theirs.shape
        assert torch.equal(ours.isnan(), theirs.isnan())


@each_target
def test_float64_takes_the_reference(case, device, backend):
    case = on(device, case)
    inputs = {name: x.double() for name, x in case.inputs.items()}
    if inputs:
        assert torch.equal(case.run(None, inputs), case.run("eager", inputs))
        with pytest.raises(RuntimeError, match=rf"{case.op}: backend '{backend}' cannot run here: "):
            case.run(backend, inputs)


@pytest.mark.parametrize("case", [case for case in CASES if case.inputs], ids=str)
def test_meta_tensors(case):
    """What a call would give, without memory"""
    skip_exempt("meta_tensors", case)
    if case.call.__name__ == "drawn":
        pytest.skip("there is no generator on meta")
    found, expected = on("meta", case).run(None), case.run(None)
    assert (found.shape, found.dtype, found.device.type) == (expected.shape, expected.dtype, "meta")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bad_input(case):
    """By name, before anything runs, for every tensor: no tensor, of another kind, of another rank, elsewhere"""
    for name, x in case.inputs.items():
        for error, bad in (
            (TypeError, x.tolist()),
            (TypeError, x.to(torch.complex64)),
            (TypeError, x.to_sparse()),
            (ValueError, x.sum()),
            (ValueError, x.to("meta")),
        ):
            first = len(case.inputs) == 1 or (
                name == next(iter(case.inputs)) and isinstance(bad, Tensor) and bad.is_meta
            )
            if first and isinstance(bad, Tensor) and bad.is_meta:
                continue  # the others are elsewhere then, or all are meta: a trace
            with pytest.raises(error) as caught:
                case.run(None, case.inputs | {name: bad})
            assert re.match(rf"{case.op}: \w+(\[\d+\])?: wanted .*, got ", str(caught.value)), f"{name}: {caught.value}"


def lies(arguments: tuple) -> list[tuple]:
    """The arguments with one tensor that is not what the others say"""
    found = []
    for k, value in enumerate(arguments):
        x, *rest = value if isinstance(value, list) and value else [value]
        if not isinstance(x, Tensor):
            continue
        others = [x[None], x.to(torch.complex64), x.to("meta"), x.to_sparse()]
        if x.dim():
            others += [x[:-1], x[..., :-1], torch.cat([x, x], -1)]
        others.append(x.half() if x.dtype == torch.float32 else x.float())
        for other in others:
            found.append((*arguments[:k], [other, *rest] if isinstance(value, list) else other, *arguments[k + 1 :]))
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_lies_to_the_registered_op(case):
    """torch.ops.sslops can be called by anyone. A call is refused by name, or is one that makes sense."""
    refused = 0
    for op, arguments in calls(case, "cpu"):
        for lie in lies(arguments):
            try:
                with torch.no_grad():
                    op(*lie)
                message = ""
            except (TypeError, ValueError, RuntimeError) as error:
                message = str(error)
                refused += 1
            assert not message or message.startswith(case.op), message
    assert refused


def test_light_import():
    """import sslops brings neither Triton nor torch._dynamo"""
    script = "import sys, sslops; print([m for m in ('triton', 'torch._dynamo') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "[]"


def test_compile_warns_of_nothing():
    script = (
        "import sslops, torch; z = torch.ones(4, 8, requires_grad=True); "
        "torch.compile(sslops.nt_xent, fullgraph=True, backend='aot_eager')(z, z).backward()"
    )
    run = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert not run.stderr


def test_build():
    assert sslops.__version__ == _C.build_info()["version"]
