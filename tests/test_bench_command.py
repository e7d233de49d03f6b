"""`python -m sslops bench`, which an installed package has; benchmarks/ and its tests are elsewhere."""

import math

import pytest
import torch

from sslops import _bench, backend

SMALL = {
    "supcon": "8x4", "nt_xent": "8x4", "info_nce": "4x6x3", "relic": "6x4", "barlow_twins": "6x4",
    "cross_correlation": "6x4", "vicreg": "6x4", "dino": "3x2x5", "ibot": "4x5", "sinkhorn": "6x5", "sigreg": "2x6x4x5",
    "random_mask": "3x8", "multi_block_mask": "3x6x8", "random_token_corruption": "3x8",
    "gather_tokens": "2x6x3x4", "restore_tokens": "2x3x6x4",
    "clip": "6x4", "siglip": "6x4",
    "gather_patches": "2x8x4", "masked_prediction": "2x8x4", "masked_token_cross_entropy": "12x7x4",
    "ema_update": "3x10", "nearest": "3x9x4", "skip_gram": "9x4x5",
}  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda run, dynamic: run)
    monkeypatch.setattr(_bench, "SECONDS", 0.0)


def test_every_op_can_be_measured() -> None:
    assert _bench.SUBJECTS.keys() == set(backend.ops())


@pytest.mark.parametrize("op", _bench.SUBJECTS)
def test_a_step_of_each_op_goes_through_every_backend(op: str) -> None:
    shape = [int(n) for n in SMALL[op].split("x")]
    assert len(shape) == _bench.SUBJECTS[op].default.count("x") + 1
    function, arguments = _bench.SUBJECTS[op].make(_bench.Inputs(torch.device("cpu"), torch.bfloat16), *shape)
    gradients = []
    for name in (None, "eager"):
        leaves = [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]
        out = function(*arguments, backend=name)
        found = torch.autograd.grad(out.float().sum(), leaves) if leaves else ()
        gradients.append([x.to_dense() for x in found])
    torch.testing.assert_close(*gradients, atol=0.05, rtol=0.05)
    for step in _bench.variants(op, shape, torch.float32, torch.device("cpu")).values():
        step()


def test_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    weigh = _bench.peak_memory
    monkeypatch.setattr(_bench, "peak_memory", lambda setup, step: weigh(setup, step) if "'sslops'" in setup else 1.0)
    _bench.main(["nt_xent", "--shape", "64x16", "--dtype", "bfloat16"])
    head, backend, _, _, *rows = capsys.readouterr().out.splitlines()
    assert head == "nt_xent, M x D, M = 2N: 64x16, bfloat16, forward and backward"
    assert backend.endswith("sslops takes its cpu backend")
    names, times, memory = zip(*((row.split()[0], row.split()[1], row.split()[-1]) for row in rows[:3]), strict=True)
    assert names == ("sslops", "eager", "torch.compile")
    assert all(math.isfinite(float(x)) and float(x) >= 0 for x in times + memory)


def test_a_variant_that_fails_is_named_and_ours_may_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_compiler(run: object, dynamic: bool) -> object:
        def fails(*_: object) -> None:
            raise RuntimeError("no C++ compiler")

        return fails

    monkeypatch.setattr(torch, "compile", no_compiler)
    monkeypatch.setattr(_bench, "peak_memory", lambda *_: 1.0)
    _bench.main(["barlow_twins", "--shape", "6x4"])
    assert "torch.compile  RuntimeError: no C++ compiler" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["nt_xent", "--shape", "64"], ["nt_xent", "--shape", "axb"], ["nothing"]])
def test_what_it_refuses(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _bench.main(words)
    said = capsys.readouterr().err
    assert "wanted M x D, M = 2N, such as 4096x128, got" in said or "invalid choice: 'nothing'" in said
