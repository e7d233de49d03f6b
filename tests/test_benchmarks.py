"""The measuring itself: what is timed in turn, what is stored, what is refused. Nothing here depends on a time."""

import copy
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import _compare
import compare
import gpu
import kernel_report
import pytest
import render
import torch

ROOT = Path(__file__).parents[1]


def test_results_md_is_what_the_data_say():
    text = render.document(render.load(render.RESULTS))
    assert (ROOT / "RESULTS.md").read_text() == text, "run python benchmarks/render.py"


class TestInterleave:
    def test_variants_take_turns(self):
        calls = []
        variants = {name: (lambda name=name: calls.append(name)) for name in "abc"}
        times = _compare.interleave(variants, rounds=4)
        assert "".join(calls) == "abc" * 5  # a warm-up, four rounds
        assert all(value["rounds"] == 4 and value["min"] <= value["median"] for value in times.values())

    def test_preparation_is_not_timed(self):
        times = _compare.interleave({"a": (lambda: time.sleep(0.05), lambda _: None)}, rounds=3)
        assert times["a"]["min"] < 25

    def test_out_of_memory_is_a_result(self):
        def dies():
            torch.empty(2**60)

        times = _compare.interleave({"a": lambda: None, "b": dies}, rounds=3)
        assert times["b"] is None
        assert times["a"] is not None

    def test_another_error_is_an_error(self):
        with pytest.raises(ZeroDivisionError):
            _compare.interleave({"a": lambda: 1 / 0})


class TestPeakMemory:
    def test_what_a_statement_adds(self):
        assert 60 < _compare.peak_memory("import torch; torch.ones(2**26)", "torch.ones(2**24)") < 80

    def test_out_of_memory(self):
        assert _compare.peak_memory("import torch", "torch.ones(2**60)") is None


def report(ms: float, m: int = 8, commit: str = "a" * 40) -> dict:
    times = {"sslops": ms, "eager": 2 * ms, "fast": ms / 2, "matmuls": ms / 4, "huge": None}
    spread = {n: t and {"median": t, "low": t, "high": t, "min": t, "rounds": 3} for n, t in times.items()}
    info = {"m": m, "dtype": "float32", "threads": 1, "ours": "sslops", "limit": "matmuls", "flop": 1e6}
    info |= {"times_ms": spread, "ratios": {}, "peak_mb": {"sslops": 1.0, "huge": None}}
    return {
        "benchmarks": [{"fullname": "benchmarks/bench_nt_xent.py::test_time[x]", "extra_info": info}],
        "commit_info": {"id": commit, "dirty": False},
        "datetime": "2026-01-02T03:04:05",
        "machine_info": {"device": "cpu-x", "isa": "y", "cores": 2, "memory_gb": 3, "versions": {"torch": "1"}},
    }


class TestResults:
    def test_a_run_replaces_its_own_rows_only(self, tmp_path):
        render.store(report(1.0, m=8), tmp_path)
        render.store(report(2.0, m=16), tmp_path)
        render.store(report(3.0, m=8, commit="b" * 40), tmp_path)
        contents = render.load(tmp_path)["cpu-x"]["nt_xent"]
        assert [(r["m"], r["times_ms"]["sslops"]["median"], r["run"]) for r in contents["rows"]] == [
            (8, 3.0, "b" * 10),
            (16, 2.0, "a" * 10),
        ]
        assert set(contents["runs"]) == {"a" * 10, "b" * 10}
        render.store(report(4.0, m=16, commit="b" * 40), tmp_path)
        assert set(render.load(tmp_path)["cpu-x"]["nt_xent"]["runs"]) == {"b" * 10}

    def test_a_report_is_not_changed_by_reading_it(self):
        read = report(1.0)
        assert render.rows_of(read, "x") == render.rows_of(read, "x")
        assert read == report(1.0)

    def test_losses_and_deaths_show(self, tmp_path):
        render.store(report(1.0), tmp_path)
        text = render.document(render.load(tmp_path), tmp_path)
        line = next(line for line in text.splitlines() if " 1 ms " in line)
        assert "**0.50x**" in line  # fast beat us
        assert " 0.25x " in line  # the limit always does
        assert "out of memory" in line
        assert "25%" in line
        assert "1 GFLOP/s" in line
        assert "not measured yet" in text

    def test_remarks_are_included(self, tmp_path):
        render.store(report(1.0), tmp_path)
        (tmp_path / "cpu-x/nt_xent.md").write_text("Why fast is faster.")
        assert "Why fast is faster." in render.document(render.load(tmp_path), tmp_path)

    def test_a_plot_of_what_died_is_drawn_twice_alike(self, tmp_path):
        pytest.importorskip("matplotlib")
        for m in (8, 16, 32):
            render.store(report(float(m), m), tmp_path)
        rows = render.load(tmp_path)["cpu-x"]["nt_xent"]["rows"]
        assert [panel[:2] for panel in render.panels(rows)] == [("times_ms", "m"), ("peak_mb", "m")]
        for name in ("a.svg", "b.svg"):
            render.plot(copy.deepcopy(rows), tmp_path / name)
        assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
        assert "huge: out of memory" in (tmp_path / "a.svg").read_text()


def test_wrong_kernels_have_no_speed(tmp_path, monkeypatch):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_nt_xent.py").write_text("def test_it():\n    assert False\n")
    monkeypatch.setattr(compare, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit, match="the tests of there are red: no speed is reported"):
        compare.compare({"there": tmp_path, "here": ROOT}, ["nt_xent"], [])


class TestGpuScript:
    def test_dry_run_says_what_each_stage_would_do(self, tmp_path):
        command = [sys.executable, "benchmarks/gpu.py", "--out", str(tmp_path / "out"), "--dry-run"]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        for stage in gpu.STAGES:
            assert f"{stage}: " in done.stdout
        for step in ("setup.py", "test_nt_xent.py", "memcheck", "tune.py", "--op nt_xent"):
            assert step in done.stdout
        assert not (tmp_path / "out").exists()

    def test_what_the_sanitizer_would_run_runs(self):
        """Every benchmark, on small shapes"""
        step = next(step for step in gpu.steps([], 9) if step.stage == "sanitizer")
        command = [*step.command[step.command.index(sys.executable) :], "--device=cpu", "--threads=1", "-k", "not ema"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout

    def test_a_failing_stage_does_not_stop_the_others(self, tmp_path, monkeypatch, capsys):
        def step(stage, code):
            return gpu.Step(stage, "planted", [sys.executable, "-c", code])

        planted = [
            step("build", "print('built')"),
            step("tests", "raise SystemExit(3)"),
            gpu.Step("sanitizer", "planted", ["no-such-tool"]),
            step("tune", "import time; time.sleep(60)"),
            step("tune", "print('never')"),
            step("bench", "print('measured')"),
        ]
        monkeypatch.setattr(gpu, "steps", lambda wheels, minutes: planted)
        monkeypatch.setattr(gpu, "CHANGED", ("RESULTS.md",))
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path), "--minutes", str(4 / 60)])
        assert gpu.main() == 1
        results = [line.split(" s  ")[1] for line in (tmp_path / "summary.txt").read_text().splitlines()]
        assert results[:2] == ["ok", "failed with status 3"]
        assert results[2].startswith("failed: ")
        assert results[3].startswith("stopped after ")
        assert results[4:] == ["no time left", "ok"]
        printed = capsys.readouterr().out
        assert "measured" in printed
        assert "never" not in printed
        assert len(list(tmp_path.iterdir())) <= 8


class TestTuner:
    @pytest.fixture
    def tune(self, monkeypatch):
        pytest.importorskip("triton")
        monkeypatch.syspath_prepend(ROOT / "tests/triton_kernels")
        import tune

        return tune

    def test_it_writes_a_table_as_it_found_it(self, tune):
        for file in (ROOT / "kernels/triton").glob("*.json"):
            assert tune.dump(json.loads(file.read_text())) + "\n" == file.read_text()

    def test_only_a_winner_replaces_a_config(self, tune, tmp_path):
        (tmp_path / "kernels/triton").mkdir(parents=True)
        (tmp_path / "benchmarks").mkdir()
        file = tmp_path / "kernels/triton/nt_xent.json"
        shutil.copy(ROOT / "kernels/triton/nt_xent.json", file)
        task, config = tune.listed("nt_xent", "sm_90")[0]
        before = file.read_text()
        tune.keep(task, "sm_90", "gpu", {"config": config, "ms": 1.0}, tmp_path)
        assert file.read_text() == before
        tune.keep(task, "sm_90", "gpu", {"config": config, "ms": 9.0}, tmp_path)
        assert json.loads((tmp_path / "benchmarks/tuned/gpu.json").read_text())[" ".join(task)]["ms"] == 1.0
        other = tune.near(config)[0]
        assert other != config
        tune.keep(task, "sm_90", "gpu", {"config": other, "ms": 0.5}, tmp_path)
        found = json.loads(file.read_text())["sm_90"][task.operands][task.width]
        assert found[task.kernel] == other
        assert json.loads((tmp_path / "benchmarks/tuned/gpu.json").read_text())[" ".join(task)]["ms"] == 0.5

    def test_the_fastest_config_with_the_same_result_wins(self, tune, monkeypatch):
        task, listed = tune.listed("nt_xent", "sm_90")[0]
        milliseconds = {listed["num_stages"]: 8, 7: 4, 8: 2, 9: 0}

        def call(task, device):
            def run():
                config = tune.launch.configs(task.op)["sm_90"][task.operands][task.width][task.kernel]
                time.sleep(milliseconds[config["num_stages"]] / 1e3)
                return (torch.tensor(2.0 if config["num_stages"] == 9 else 1.0),)

            return run

        monkeypatch.setattr(tune, "call", call)
        candidates = [listed | {"num_stages": stages} for stages in (7, 8, 9)]
        found = tune.best(task, "sm_90", listed, iter(candidates), time.monotonic() + 60)
        assert (found["config"], found["listed"], found["tried"]) == (candidates[1], listed, 2)
        found = tune.best(task, "sm_90", candidates[1], iter([listed]), time.monotonic() + 60)
        assert found["config"] == candidates[1]

    def test_a_config_that_spills_is_not_tried(self, tune):
        task, config = next(pair for pair in tune.listed("nt_xent", "sm_90") if pair[0][1:] == ("half", "128", "flash"))
        assert tune.faults(task, "sm_90", config) == []
        (fault,) = tune.faults(task, "sm_90", config | {"BLOCK_N": 256})
        assert "spills" in fault


class TestKernelReport:
    def test_occupancy(self):
        chip = kernel_report.CHIPS["sm_90"]
        assert kernel_report.occupancy(chip, 128, 0, 256) == "25%"  # registers for two blocks of eight warps
        assert kernel_report.occupancy(chip, 32, 100 * 1024, 256) == "25%"  # shared memory for two
        assert kernel_report.occupancy(chip, 32, 0, 256) == "100%"

    def test_cuda_kernels_are_as_the_table_says(self):
        if kernel_report.nvcc() is None:
            pytest.skip("needs nvcc")
        rows = list(kernel_report.cuda_rows())
        assert kernel_report.faults(rows) == []
        compilers, listed = kernel_report.read()
        if compilers.endswith(f"nvcc {kernel_report.nvcc()}"):
            listed = [row for row in listed if row.call == "CUDA"]
            assert kernel_report.text(rows) == kernel_report.text(listed), "run benchmarks/kernel_report.py --write"

    def test_the_table_has_every_triton_kernel(self):
        """test_offline.py compiles them; this holds the two tables together."""
        compilers, listed = kernel_report.read()
        version = compilers.split()[1]
        lines = (ROOT / f"tests/triton_kernels/resources-{version}.tsv").read_text().splitlines()[1:]
        golden = [line.split("\t")[:8] for line in lines if "default on" not in line]
        found = [list(map(str, row[:8])) for row in listed if row.call != "CUDA"]
        assert found == golden, "run benchmarks/kernel_report.py --write"
