"""The measuring itself: what is timed in turn, what is stored, what is refused. Nothing here depends on a time."""

import collections
import copy
import importlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from benchmarks import _compare, compare, cores, gpu, kernel_report, peers, render, smoke, summary
from sslops import backend

from .triton_kernels import resources

ROOT = Path(__file__).parents[1]


def test_results_md_is_what_the_data_say():
    text = render.document(render.load(render.RESULTS))
    assert (ROOT / "RESULTS.md").read_text() == text, "run python -m benchmarks.render"


def test_every_measured_op_has_its_row_in_the_first_table():
    results = render.load(render.RESULTS).values()
    for op in render.OPS:
        stored = [contents[op] for contents in results if op in contents]
        assert not stored or any(summary.usual(op, contents) for contents in stored), op


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks").glob("bench_*.py")), ids=lambda file: file.stem)
def test_every_benchmark_has_cases_for_every_device(file):
    """One without is an error of the whole collection"""
    cases = getattr(importlib.import_module(f"benchmarks.{file.stem}"), "CASES", None)
    assert cases is None or {"cpu", "cuda", "small"} <= cases.keys()
    readme = (ROOT / "README.md").read_text()
    assert readme == summary.with_headlines(readme, render.load(render.RESULTS)), "run python -m benchmarks.render"
    assert all(f"{name}, {summary.USUAL[op][0]}" in readme for op, name in summary.HEADLINES.items())


class TestInterleave:
    def test_variants_take_turns(self):
        calls = []
        variants = {name: (lambda name=name: calls.append(name)) for name in "abc"}
        times = _compare.interleave(variants, rounds=6)
        assert calls[:3] == ["a", "b", "c"]  # a warm-up
        rounds = [calls[k : k + 3] for k in range(3, 21, 3)]
        assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
        after = collections.Counter(pair for each in rounds for pair in itertools.pairwise(each))
        assert after == dict.fromkeys(itertools.permutations("abc", 2), 2)
        assert all(value["rounds"] == 6 and value["min"] <= value["median"] for value in times.values())

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


def test_what_is_slower_is_explained():
    """In <op>.md beside the rows, where another's form takes less than 0.95 of our time"""
    for file in (ROOT / "benchmarks/results").glob("cpu-*/*.json"):
        for row in json.loads(file.read_text())["rows"]:
            times = {name: each["median"] for name, each in row.get("times_ms", {}).items() if each}
            lost = [name for name in times if summary.is_theirs(name, row) and times[name] < 0.95 * times[row["ours"]]]
            assert not lost or file.with_suffix(".md").exists(), f"{file.parent.name}/{file.stem}: {lost} {row}"


def test_the_model_of_many_cores_has_the_panels_of_the_code():
    source = (ROOT / "csrc/cpu/correlation.h").read_text()
    assert int(re.search(r"kSide = (\d+);", source)[1]) == cores.SIDE


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
        assert "No GPU has been measured yet." in text

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


class TestFailures:
    def test_a_peers_failure_costs_only_its_own_time(self):
        calls = []

        def sometimes():
            calls.append(1)
            if len(calls) > 3:
                raise ValueError("no private rounding")

        def broken():
            raise ImportError("moved")

        failed = {}
        variants = {"sslops": lambda: None, "late": sometimes, "broken": broken}
        times = _compare.interleave(variants, rounds=3, failed=failed, ours="sslops")
        assert times["sslops"]["rounds"] == 3
        assert times["late"] is None
        assert times["broken"] is None
        assert failed == {"late": "ValueError: no private rounding", "broken": "ImportError: moved"}

    def test_ours_is_an_error(self):
        with pytest.raises(ZeroDivisionError):
            _compare.interleave({"sslops": lambda: 1 / 0}, failed={}, ours="sslops")

    def test_a_peer_that_cannot_be_made_fails_where_it_is_timed(self):
        @peers.or_failing
        def make():
            raise ImportError("moved")

        with pytest.raises(ImportError, match="moved"):
            make()(1, 2)

    def test_failed_is_not_out_of_memory(self, tmp_path):
        broken = report(1.0)
        broken["benchmarks"][0]["extra_info"]["failed"] = {"huge": "ImportError: moved"}
        render.store(broken, tmp_path)
        line = next(x for x in render.document(render.load(tmp_path), tmp_path).splitlines() if " 1 ms " in x)
        assert " failed " in line
        assert "out of memory" not in line


class TestGpuTimes:
    def test_the_launch_queue_is_filled_first(self, monkeypatch):
        """Kernels wait for a sleeping GPU, not for the host, whose time is another number"""
        log = []

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                log.append("record")

            def elapsed_time(self, end):
                return 0.25

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("sleep"))

        def launch():
            log.append("launch")
            time.sleep(0.002)

        times = _compare.interleave({"a": launch}, rounds=3)
        assert log[:5] == ["wait", "record", "launch", "record", "wait"]  # the first, which compiles
        assert log[-6:] == ["wait", "sleep", "record", "launch", "record", "wait"]
        assert times["a"]["median"] == 0.25
        assert 1.9 < times["a"]["host"] < 50


class TestRows:
    def test_each_is_kept_as_soon_as_it_is_measured(self, tmp_path):
        """In the order of the command line; a line that was being written when all was killed is left out"""
        file = tmp_path / "rows.jsonl"
        benches = ["benchmarks/bench_random_mask.py", "benchmarks/bench_gather_tokens.py"]
        options = ["--device=cpu", "--small", "--threads=1", "--seconds=0", "--beside=eager", f"--rows={file}"]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *benches, *options]
        alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=alone)
        file.write_text(file.read_text() + '{"fullname": "cut')
        (found,) = render.reports(file)
        names = [row["fullname"].split("::")[0] for row in found["benchmarks"]]
        assert names == [benches[0]] * 2 + [benches[1]] * 4
        times = found["benchmarks"][0]["extra_info"]["times_ms"]
        assert set(times) == {"sslops", "eager", "outputs written"}
        render.store(found, tmp_path / "results")
        (device,) = render.load(tmp_path / "results").values()
        assert set(device) == {"random_mask", "gather_tokens"}


class TestSmoke:
    def test_it_has_every_op_with_a_kernel_on_a_gpu(self):
        wanted = {op for op in backend.ops() if backend._home("cuda", op) or backend._home("triton", op)}
        assert {case.op for case in smoke.CASES} == wanted

    def test_each_case_is_a_line_at_once(self, tmp_path):
        smoke.run("gather_tokens", "cpu", tmp_path / "smoke.jsonl")
        lines = [json.loads(line) for line in (tmp_path / "smoke.jsonl").read_text().splitlines()]
        assert {line["dtype"] for line in lines} == {"float32", "bfloat16", "float16"}
        assert all(line["ok"] for line in lines)

    def test_a_wrong_kernel_shows(self, tmp_path, monkeypatch):
        def wrong(x, backend):
            return x * (1.001 if backend == "cpu" else 1.0)

        def broken(x, backend):
            raise RuntimeError("illegal address")

        cases = [smoke.Case("gather_tokens", call, smoke.normal((4, 5)), smoke.ONE) for call in (wrong, broken)]
        monkeypatch.setattr(smoke, "CASES", cases)
        smoke.run("gather_tokens", "cpu", tmp_path / "smoke.jsonl")
        lines = [json.loads(line) for line in (tmp_path / "smoke.jsonl").read_text().splitlines()]
        assert not any(line["ok"] for line in lines)
        assert "illegal address" in lines[-1]["trace"]


class Clock:
    """In its seconds a plan of ten minutes takes none"""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class TestGpuScript:
    @pytest.mark.parametrize("call", [1, 2, 3])
    def test_dry_run_says_what_each_step_would_do(self, tmp_path, call):
        command = [sys.executable, "-m", "benchmarks.gpu", "--out", tmp_path / "out", "--dry-run", f"--call={call}"]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        expected = {1: ("setup.py", "-m benchmarks.ahead", "-m benchmarks.smoke", "--key", "-k cuda"),
                    2: ("ncu", "memcheck", "racecheck"), 3: ("-m benchmarks.ahead", "all rows")}  # fmt: skip
        at = [done.stdout.index(word) for word in expected[call]]
        assert at == sorted(at)
        assert not (tmp_path / "out").exists()
        assert re.findall(r" to +(\d+) s: ", done.stdout)[-1] == "564"

    @pytest.mark.parametrize("call", [1, 2, 3])
    @pytest.mark.parametrize("takes", ["nothing", "all", "beyond", "some"])
    def test_the_plan_ends_in_its_time_and_is_written_after_every_step(self, tmp_path, call, takes):
        clock, written = Clock(), []

        def run(step, seconds, log):
            files = {file.name for file in tmp_path.iterdir()}
            assert {"summary.txt", "changes.tar.gz"} <= files
            written.append((tmp_path / "summary.txt").read_text())
            took = {"nothing": 0.0, "all": seconds, "beyond": seconds, "some": seconds / 3}[takes]
            clock.now += took
            return f"stopped after {seconds:.0f} s" if takes == "beyond" else "ok"

        plan = gpu.steps(call, tmp_path, again=tmp_path / "tests.jsonl")
        lines = gpu.go(plan, 564, tmp_path, run, clock)
        assert clock.now <= 100 + 564 + 1e-6
        assert len(lines) == len(plan)
        assert [len(text.splitlines()) for text in written[1:]] == list(range(1, len(plan)))
        assert len(list(tmp_path.iterdir())) <= 2  # and log, smoke, rows, tests.jsonl, tests.xml: seven of eight

    def test_the_files_of_each_bench_in_the_order_of_what_matters(self):
        found = gpu.benches()
        assert found[:3] == [f"benchmarks/bench_{op}.py" for op in ("limits", "nt_xent", "info_nce")]
        assert set(found) == {str(file.relative_to(ROOT)) for file in ROOT.glob("benchmarks/bench_*.py")}

    def test_tests_of_modules_queues_and_other_libraries_are_in(self, tmp_path):
        (step,) = (step for step in gpu.steps(1, tmp_path) if step.what == "tests")
        for name in ("nn", "masking", "queue", "compat_lightly", "compat_solo", "nt_xent", "ema_update"):
            assert f"tests/test_{name}.py" in step.command

    def test_what_the_sanitizer_would_run_runs(self, tmp_path):
        """Every benchmark, on small shapes"""
        step = next(step for step in gpu.steps(2, tmp_path, rehearse=True) if step.what.startswith("small"))
        command = [part.replace("{minutes}", "9") for part in step.command]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout

    def planted(self, *codes: str) -> list:
        return [gpu.Step(f"step {k}", 1, [sys.executable, "-c", code]) for k, code in enumerate(codes)]

    def test_a_failing_step_does_not_stop_the_others(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(gpu, "GRACE", 0.5)
        sleeps = "import time; print('begun', flush=True); time.sleep(60)"
        plan = self.planted("print('built')", "raise SystemExit(3)", sleeps, "print('measured')")
        plan.insert(1, gpu.Step("a tool", 1, ["no-such-tool"]))
        start = time.monotonic()
        lines = gpu.go(plan, 12, tmp_path)
        assert time.monotonic() - start < 12
        results = [line.split("  ")[-1] for line in lines]
        assert results[0] == "ok"
        assert results[1].startswith("failed: ")
        assert results[2] == "failed with status 3"
        assert results[3].startswith("stopped after ")
        assert results[4] == "ok"
        printed = capsys.readouterr().out
        assert "measured" in printed
        assert "begun" in (tmp_path / "log.txt").read_text()

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
    def test_killed_in_the_middle_it_leaves_its_files_and_no_process(self, tmp_path, number):
        out = tmp_path / "out"
        code = f"""
import pathlib, sys
from benchmarks import gpu
sleeps = "import os, time; print('pid', os.getpid(), flush=True); time.sleep(600)"
codes = ("print('done')", sleeps)
plan = [gpu.Step("a step", 1, [sys.executable, "-c", code]) for code in codes]
with gpu.stoppable():
    gpu.go(plan, 600, pathlib.Path({str(out)!r}))
"""
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
        log = out / "log.txt"
        until = time.monotonic() + 60
        while not (log.exists() and (found := re.search(r"^pid (\d+)$", log.read_text(), re.MULTILINE))):
            assert time.monotonic() < until
            time.sleep(0.05)
        process.send_signal(number)
        process.wait(30)
        child = int(found[1])
        while Path(f"/proc/{child}").exists() and "zombie" not in Path(f"/proc/{child}/status").read_text():
            assert time.monotonic() < until + 30
            time.sleep(0.05)
        summary = (out / "summary.txt").read_text()
        assert summary.splitlines()[0].endswith(" ok")
        assert ("SIGTERM stopped all" in summary) == (number == signal.SIGTERM)
        with tarfile.open(out / "changes.tar.gz") as archive:
            assert "kernels/triton/nt_xent.json" in archive.getnames()

    def test_a_file_too_large_keeps_its_end(self, tmp_path, monkeypatch):
        monkeypatch.setattr(gpu, "SIZE", 100)
        monkeypatch.setattr(gpu, "CHANGED", ())
        (tmp_path / "log.txt").write_bytes(b"x" * 500 + b"end")
        gpu.write(tmp_path, [])
        assert (tmp_path / "log.txt").read_bytes() == b"x" * 97 + b"end"

    def test_outcomes_are_kept_one_by_one(self, tmp_path):
        """With tracebacks, from xdist's workers too; and what failed can be run again, alone"""
        (tmp_path / "test_it.py").write_text(
            "import os, pytest\n@pytest.mark.parametrize('k', range(4))\ndef test_it(k):\n"
            "    assert k != 1, 'planted'\n    if k == 3: os._exit(1)\n"
        )
        file = tmp_path / "tests.jsonl"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_it.py"]
        command += ["-p", "benchmarks.outcomes"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run([*command, f"--outcomes={file}", "-n1"], cwd=tmp_path, env=environment, capture_output=True)
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        assert [line["outcome"] for line in lines[:3]] == ["passed", "failed", "passed"]
        assert "planted" in lines[1]["trace"]
        again = [*command, f"--again={file}", f"--outcomes={tmp_path / 'again.jsonl'}", "-k", "1"]
        subprocess.run(again, cwd=tmp_path, env=environment, capture_output=True)
        (line,) = (tmp_path / "again.jsonl").read_text().splitlines()
        assert json.loads(line)["test"] == "test_it.py::test_it[1]"

    def test_compiled_ahead_is_found_by_the_jit(self, tmp_path):
        """Under its own key: a second process compiles nothing"""
        pytest.importorskip("triton")
        command = [sys.executable, "-m", "benchmarks.ahead", "--op", "relic", "--workers", "2"]
        caches = []
        for _ in range(2):
            environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
            subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
            caches.append({file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.cubin")})
        assert caches[0] == caches[1]
        assert len(caches[0]) > 10


class TestTuner:
    @pytest.fixture
    def tune(self, monkeypatch):
        pytest.importorskip("triton")
        from benchmarks import tune

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

    def test_what_paper_speaks_for_is_tried_first(self, tune):
        for task, config in tune.listed("nt_xent", "sm_90"):
            found = tune.candidates(task, config)
            assert sorted(map(str, found)) == sorted({*map(str, found)})
            if task[1:] == ("half", "128", "flash"):
                assert found[0].items() >= {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4}.items()
            if task.operands == "tf32x3":  # what more columns cost is no difference that tune finds
                assert max(other["BLOCK_K"] for other in found) == config["BLOCK_K"]
        for op, kernel, width in tune.SEEDS:
            assert tune.Task(op, "half", width, kernel) in dict(tune.listed(op, "sm_90"))

    def test_a_config_that_spills_is_not_tried(self, tune):
        task, config = next(pair for pair in tune.listed("nt_xent", "sm_90") if pair[0][1:] == ("half", "128", "flash"))
        assert tune.faults(task, "sm_90", config) == []
        (fault,) = tune.faults(task, "sm_90", config | {"BLOCK_N": 256})
        assert "spills" in fault


class TestKernelReport:
    def test_blocks_of_a_multiprocessor(self):
        row = resources.Row("op", "sm_90", "call", "kernel", "64x64 w8 s2", 128, 0, 0, "wgmma", *[0] * 10, "-")
        assert kernel_report.blocks(row) == 2  # registers for two blocks of eight warps
        assert kernel_report.blocks(row._replace(registers=32, shared=100 * 1024)) == 2  # shared memory for two
        assert kernel_report.blocks(row._replace(registers=32)) == 8
        assert kernel_report.blocks(row._replace(registers=32, config="64x64 w16 s2")) == 4

    def test_a_tile_is_the_loop_that_multiplies(self):
        code = """
        /*0000*/  MUFU.EX2 R1, R2 ;
        /*0010*/  @P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/  HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT ;
        /*0030*/  @!P0 BRA 0x20 ;
        /*0040*/  @P1 BRA P2, 0x60 ;
        /*0050*/  F2F.F64.F32 R4, R5 ;
        /*0060*/  MUFU.EX2 R1, R2 ;
        /*0070*/  STG.E.U16 desc[UR4][R2.64], R4 ;
        /*0080*/  @!P1 BRA 0x10 ;
        /*0090*/  BRA 0x90;"""
        product = 64 * 64 * 16 // 4
        assert resources.tile(code, 1) == [2, 2, product, 1024, 0, 0]
        assert resources.tile(code, 3) == [6 + 5, 5, 3 * product, 3 * 1024, 32, 32 * 18]
        assert resources.tile(code.replace("HGMMA", "FFMA"), 1) == [7, 7, 0, 0, 32, 32 * 18]

    def test_share_of_the_limit(self):
        row = resources.Row("op", "sm_90", "bf16", "kernel", "64x64 w8 s2", 128, 0, 0, "wgmma", *[0] * 4,
                            396, 396, 189200, 0, 0, 0, "-")  # fmt: skip
        assert kernel_report.share(row) == "100% (matrix)"
        assert kernel_report.share(row._replace(registers=200)) == "50% (turns)"  # one block
        assert kernel_report.share(row._replace(registers=200, apart=0)) == "100% (turns)"
        assert kernel_report.share(row._replace(call="tf32")) == "100% (matrix)"
        three = row._replace(call="tf32x3", issued=3 * 396 * 2, apart=0, macs=3 * 189200)
        assert kernel_report.share(three) == "100% (matrix)"
        assert kernel_report.share(row._replace(call="ieee")) == "-"
        assert kernel_report.share(row._replace(issued=1600)) == "25% (instructions)"
        assert kernel_report.share(row._replace(exps=6400)) == "100% (exps)"  # they are part of the limit
        assert kernel_report.share(row._replace(macs=0)) == "-"
        moves = row._replace(macs=0, instruction="-", moved=1282)
        assert kernel_report.share(moves) == "100% (bytes)"

    def test_cuda_kernels_are_as_the_table_says(self):
        if kernel_report.nvcc() is None:
            pytest.skip("needs nvcc")
        compilers, listed = resources.read()
        listed = [row for row in listed if row.call == "CUDA"]
        same = compilers.endswith(f"nvcc {kernel_report.nvcc()}")
        rows = list(kernel_report.cuda_rows([row for row in listed if same and row.op != "gather_tokens"]))
        assert [row for row in rows if row.stack] == []
        if same:
            assert not resources.changes(rows, listed), "run python -m benchmarks.kernel_report --write"
