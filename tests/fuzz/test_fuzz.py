"""Random calls of every op on every instruction set, against float64 by the accuracy promise; and none kills a process.

SSLOPS_FUZZ=1000 tries so many of each (`make fuzz`); otherwise a few, always the same.
"""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import sslops
from sslops import backend

from .. import oracle
from ..cases import Case
from . import draws

ROOT = Path(__file__).parents[2]
EXAMPLES = int(os.environ.get("SSLOPS_FUZZ", "0"))
fuzzed = settings(
    max_examples=EXAMPLES or 8,
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
each_op = pytest.mark.parametrize("op", sorted(draws.CALLS))
RANDOM = {"ema_update", "multi_block_mask", "random_mask", "random_token_corruption"}  # whose own tests draw enough


def test_every_op_is_drawn():
    assert set(draws.CALLS) | RANDOM == set(backend.ops())


def converted(case: Case, dtype: torch.dtype, layout: str) -> Case:
    return case._replace(inputs={name: draws.LAYOUTS[layout](x.to(dtype)) for name, x in case.inputs.items()})


CONTRASTIVE = ("nt_xent", "info_nce", "supcon", "clip", "relic")


def cancelling(case: Case) -> dict[str, float]:
    """How large the terms of a result are that cancel: two softmaxes with the same winner, or one whose sum is 1 and a
    little. Of a softmax that is 1 at its own positive, float64 knows no better.
    """
    options = case.options
    if case.op == "siglip":  # a term below e^-87 is 0
        return dict.fromkeys(("output", *case.graded), 1e-30)
    if case.op in CONTRASTIVE:  # rows over the temperature; of a divergence they cancel where it is small
        weight = options.get("logit_scale") or 1 / options["temperature"]
        # a fixed maximum, 1 / temperature, is part of the logarithm
        output = weight / 4 if options["normalize"] and weight < 43 / 2.02 else 1e-10
        weight *= 0.1 * options.get("alpha", 1.0) + options.get("beta", 0.0)
        views = [case.inputs[name] for name in case.graded]
        if options["reduction"] == "mean":
            weight /= views[0].shape[-2]
        if options["normalize"]:
            sizes = [(1 / x.norm(dim=-1).clamp(min=1e-12)).square().mean() / x.shape[-1] for x in views]
        else:
            sizes = [max(x.square().mean() for x in views)] * len(views)
        return {"output": output} | {
            name: max(1e-10, weight * float(size.sqrt())) for name, size in zip(case.graded, sizes, strict=True)
        }
    if case.op not in ("dino", "ibot"):
        return {}
    rows, k = case.inputs["student"].shape[-2:]
    size = 0.5 / (options["student_temp"] * rows)  # of the terms of a row, all k together
    if "prototypes" not in case.inputs:
        return {"output": 1.0, "student": size / k**0.5}
    of = {name: float(x.double().square().mean()) ** 0.5 for name, x in case.inputs.items()}
    count, width = case.inputs["prototypes"].shape
    length = of["prototypes"] * width**0.5 if options["unit_prototypes"] and of["prototypes"] else 1.0
    of_prototypes = size * of["student"] * (rows / count) ** 0.5
    return {"output": 1.0, "student": size * of["prototypes"] / length, "prototypes": of_prototypes / length}


def determined(case: Case, dtype: torch.dtype) -> bool:
    """Whether the inputs, in dtype, say what a result is"""
    if case.op in ("cross_correlation", "barlow_twins"):
        return len(case.inputs["z_a"]) > 2  # a column of two normalised numbers is a sign, whose derivative is 0
    # The rounding of unit rows moves a cosine by eps, its logit by eps / temperature: of collapsed rows beyond all that
    # tells them apart, the same way in all draws. In half precision the reference rounds all to 1, which happens to be
    # right.
    options = case.options
    return not options.get("normalize") or options.get("temperature", 1.0) > max(4 * torch.finfo(dtype).eps, 1e-3)


def rounded_anew(inputs: list[torch.Tensor], draw: int) -> list[torch.Tensor]:
    """The oracle's draw with columns that are longer by some units in the last place: unit rows of longer rows are the
    same. What collapses or agrees still does.
    """
    if not draw:
        return inputs
    found = []
    for x in inputs:
        units = torch.randint(8, x.shape[-1:], generator=torch.Generator().manual_seed(draw))
        found.append(x * (1 + units * torch.finfo(x.dtype).eps).to(x) if x.dim() > 1 else x)
    return found


@each_op
def test_promise(op, isa, counted):
    @fuzzed
    @given(draws.CALLS[op], st.sampled_from(draws.DTYPES))
    def run(case, dtype):
        counted("calls against float64")
        case = converted(case, dtype, "contiguous")
        names = list(case.inputs)
        assume(determined(case, dtype))
        # a zero row's gradient, divided by the smallest norm, overflows half precision
        assume(dtype == torch.float32 or all(x.isfinite().all() for x in case.run_with_gradients("eager")))

        count = itertools.count()

        def answers(draw):
            inputs = dict(zip(names, rounded_anew(draw, next(count)), strict=True))
            wide = {name: x.double() for name, x in inputs.items()}
            return *(case.run_with_gradients(b, inputs) for b in ("cpu", "eager")), case.run_with_gradients(
                "eager", wide
            )

        oracle.assert_promise(["output", *case.graded], answers, list(case.inputs.values()), dtype, cancelling(case))

    run()


@each_op
def test_layouts(op, isa, counted):
    """A tensor counts by its values: the bits of a contiguous one"""

    @fuzzed
    @given(draws.CALLS[op], st.sampled_from(draws.DTYPES), st.sampled_from(sorted(draws.LAYOUTS)))
    def run(case, dtype, layout):
        counted("calls with other strides")
        assume(op != "masked_token_cross_entropy" or layout != "shifted")  # bits of torch's own products vary with it
        case = converted(case, dtype, layout)
        dense = {name: x.clone(memory_format=torch.contiguous_format) for name, x in case.inputs.items()}
        for ours, same in zip(case.run_with_gradients("cpu"), case.run_with_gradients("cpu", dense), strict=True):
            assert torch.equal(ours.nan_to_num(), same.nan_to_num())

    run()


@each_op
def test_wild_values(op, isa, counted):
    """NaN, infinities, overflows, denormals: finite where the reference is and is right, and NaN where it must show"""

    @fuzzed
    @given(draws.CALLS[op], st.sampled_from(sorted(draws.WILD)), draws.SEEDS)
    def run(case, kind, seed):
        counted("calls with a wild number")
        # beside a divergence's terms of 1e30, float64 loses the contrastive one
        assume(kind != "huge" or not (case.options.get("alpha") and case.options.get("beta")))
        assume(kind != "huge" or case.op != "sigreg")  # phases of 1e10 turns
        names = list(case.inputs)
        name = names[seed % len(names)]
        inputs = case.inputs | {name: draws.planted(case.inputs[name], kind, seed)}
        wide = {each: x.double() for each, x in inputs.items()}
        ours, eager, truth = (
            case.run_with_gradients(b, i) for b, i in (("cpu", inputs), ("eager", inputs), ("eager", wide))
        )
        assume(not any(x.numel() and float(x.abs().max()) > 1e35 for x in truth[1:]))  # on the way there, an overflow
        if not all(x[0].isfinite().all() for x in (eager, truth)):
            if kind not in ("huge", "tiny"):
                assert torch.equal(ours[0].isfinite(), eager[0].isfinite())
            return
        terms = cancelling(case._replace(inputs=inputs))
        for name, x, y, z in zip(("output", *case.graded), ours, eager, truth, strict=True):
            floor = max(1e-10, 10 * torch.finfo(torch.float32).eps * terms.get(name, 0.0))
            if y.numel() and y.isfinite().all() and float((y - z).abs().max()) <= 1e-3 * float(z.abs().max()):
                torch.testing.assert_close(x.double(), z, rtol=1e-2, atol=1e-2 * float(z.abs().max()) + floor)

    run()


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="a column's mass below e^-87 counts as none")
def test_columns_that_no_row_wants():
    scores = torch.tensor([[-2.2, 0.0, 2.2]])
    found = sslops.sinkhorn(scores, temperature=0.05, iterations=1, start="probabilities", backend="cpu")
    torch.testing.assert_close(found, torch.tensor([44.0, 0.0, -44.0]))


def test_a_small_divergence_of_large_logits():
    online = torch.tensor([[1.5476, -0.2908, -2.1782], [1.5472, -0.2979, -2.1805]])
    target = torch.tensor([[1.9143, -0.2110, -2.1376], [1.2671, -0.2769, -2.8050]])
    options = {"temperature": 1e-3, "alpha": 0.0, "beta": 0.5, "normalize": False}
    oracle.check(sslops.relic, {"online": online, "target": target}, "cpu", **options)


def test_hostile_calls(counted):
    """Wrong arguments of public functions and lies to torch.ops.sslops, in another process; hostile.py says which"""
    share = [] if EXAMPLES else ["--every", "160", "--seconds", "60"]
    run = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.hostile", *share], cwd=ROOT, capture_output=True, text=True, timeout=3000
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    for line in run.stdout.splitlines():
        number, what = line.split(maxsplit=1)
        counted(what, int(number))
