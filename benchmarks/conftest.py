import pytest
import torch


@pytest.fixture(params=[1, 2], ids="{}thread".format)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def pytest_terminal_summary(terminalreporter, config):
    """One line a comparison: our median, and how many times longer the others took."""
    session = getattr(config, "_benchmarksession", None)
    shown = [b for b in (session.benchmarks if session else []) if b.extra_info]
    if not shown:
        return
    terminalreporter.section("interleaved medians (others as multiples of ours)")
    for bench in shown:
        info = bench.extra_info
        parts = []
        if "ratios" in info:
            parts.append(f"{info['times_ms']['sslops']['median']:9.2f} ms")
            parts += [f"{name} {ratio:.2f}x" for name, ratio in info["ratios"].items() if name != "sslops"]
        parts += [f"{name} {value:.0f} MB" for name, value in info.get("peak_mb", {}).items()]
        terminalreporter.write_line(f"{bench.name:<58} " + "  ".join(parts))
