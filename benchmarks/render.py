"""Results as data, tables and plots: results/<device>/<op>.json -> RESULTS.md and results/<device>/<op>.svg.

`--add FILE` first stores what the benchmarks wrote to --rows.

A results file has the machine, `runs` (commit -> when and with which versions) and `rows`. A row has what tells it from
others (bench, m, d, dtype, threads, ...), `run`, and what was measured: times_ms {variant: median, low, high, rounds}
and peak_mb {variant: MB}, null where a variant ran out of memory, or failed, as `failed` {variant: error} then says.
"""

import argparse
import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import cores, kernel_report, summary
from .kernel_report import markdown
from .summary import Row, facts, panels

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
OPS = sorted(file.stem for file in (ROOT / "sslops/ops").glob("[a-z]*.py"))
UNITS = {"flop": "GFLOP/s", "bytes": "GB/s"}

INTRO = """# Results

Rendered from [benchmarks/results](benchmarks/results) by `python -m benchmarks.render`; `make bench` measures on your
machine, `python -m benchmarks --save` also stores and renders. The variants of a row are timed in turn in one process,
round after round: what counts is their ratio. Our time is the median, ± half the distance between the quartiles; the
others are multiples of it, **bold** where they are faster. The limit is a variant too: it does only what cannot be
avoided. Memory is what a step adds at its peak.

Each table names the commit that it was measured at. Those of cpu-xeon-amx-2core, and the remarks beside them, are of
2026-11-22, before the CPU's loops over tiles moved into C++ with products of their own (2026-11-29): that machine has
not been measured since.
"""


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    return {k: _rounded(v) for k, v in value.items()} if isinstance(value, dict) else value


def reports(file: Path) -> list[dict]:
    """Of each session that wrote to the file what rows_of() takes; a line that was cut off is left out"""
    found: list[dict] = []
    for line in file.read_text().splitlines():
        try:
            read = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "machine_info" in read:
            found.append(read | {"benchmarks": []})
        else:
            found[-1]["benchmarks"].append(read)
    return found


def rows_of(report: dict, run: str) -> dict[str, list[Row]]:
    """op -> rows"""
    found: dict[str, list[Row]] = {}
    for bench in report["benchmarks"]:
        file, *_, test = bench["fullname"].split("::")
        info = {name: value for name, value in bench["extra_info"].items() if name != "ratios"}
        if "times_ms" in info:
            kept = ("median", "low", "high", "rounds", "host")
            info["times_ms"] = {n: t and {k: t[k] for k in kept if k in t} for n, t in info["times_ms"].items()}
        row = {"bench": test.split("[")[0].removeprefix("test_"), **_rounded(info), "run": run}
        found.setdefault(Path(file).stem.removeprefix("bench_"), []).append(row)
    return found


def _order(row: Row) -> list[tuple]:
    return [(0, v, "") if isinstance(v, int | float) else (1, 0, str(v)) for v in facts(row).values()]


def merge(old: dict, report: dict) -> dict[str, dict]:
    """op -> contents of its results file: `old` (op -> contents), its rows replaced where the report has them"""
    commit, machine = report["commit_info"], report["machine_info"]
    run = (commit["id"][:10] if len(commit["id"]) == 40 else commit["id"]) + "+changes" * commit["dirty"]
    merged = {}
    for op, rows in rows_of(report, run).items():
        before = old.get(op, {"rows": [], "runs": {}})
        new = [facts(row) for row in rows]
        rows = sorted([row for row in before["rows"] if facts(row) not in new] + rows, key=_order)
        runs = {**before["runs"], run: {"date": report["datetime"][:10], **machine["versions"]}}
        used = {row["run"] for row in rows}
        merged[op] = {
            "machine": {name: machine[name] for name in ("device", "isa", "cores", "memory_gb")},
            "runs": {name: value for name, value in runs.items() if name in used},
            "rows": rows,
        }
    return merged


def dump(contents: dict) -> str:
    """JSON with a row a line"""
    head = json.dumps({name: contents[name] for name in ("machine", "runs")}, indent=1)[:-2]
    return head + ',\n "rows": [\n  ' + ",\n  ".join(map(json.dumps, contents["rows"])) + "\n ]\n}\n"


def load(results: Path) -> dict[str, dict[str, dict]]:
    """device -> op -> contents"""
    found: dict[str, dict[str, dict]] = {}
    for file in sorted(results.glob("*/*.json")):
        found.setdefault(file.parent.name, {})[file.stem] = json.loads(file.read_text())
    return found


def store(report: dict, results: Path = RESULTS) -> None:
    folder = results / report["machine_info"]["device"]
    folder.mkdir(parents=True, exist_ok=True)
    for op, contents in merge(load(results).get(folder.name, {}), report).items():
        (folder / f"{op}.json").write_text(dump(contents))


def _names(rows: list[Row], key: str) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row[key]))


def _time_cells(row: Row, names: list[str]) -> list[str]:
    times, ours, limit = row["times_ms"], row["ours"], row["limit"]
    mine = times[ours]
    cells = [f"{mine['median']:.4g} ms ±{50 * (mine['high'] - mine['low']) / mine['median']:.0f}%"]
    if "host" in mine:
        cells[0] += f", host {mine['host']:.3g} ms"
    for name in names:
        if name not in times:
            cells.append("")
        elif times[name] is None:
            cells.append("failed" if name in row.get("failed", {}) else "out of memory")
        else:
            ratio = times[name]["median"] / mine["median"]
            cells.append(f"**{ratio:.2f}x**" if ratio < 1 and name != limit else f"{ratio:.2f}x")
    rates = [f"{row[work] / mine['median'] / 1e6:.4g} {unit}" for work, unit in UNITS.items() if work in row]
    cells.append(", ".join(rates))
    limit_time = limit and times.get(limit)
    cells.append(f"{100 * limit_time['median'] / mine['median']:.0f}%" if limit_time else "")
    return cells


def tables(rows: Iterable[Row]) -> str:
    """Markdown: of each benchmark its times, then its memory."""
    text = []
    for bench in dict.fromkeys(row["bench"] for row in rows):
        mine = [row for row in rows if row["bench"] == bench]
        timed = [row for row in mine if "times_ms" in row]
        weighed = [row for row in mine if "peak_mb" in row]
        for chosen in filter(None, (timed, weighed)):
            columns = [name for name in _names([{"facts": facts(row)} for row in chosen], "facts") if name != "bench"]
            shown = [[str(row.get(name, "")) for name in columns] for row in chosen]
            if chosen is timed:
                names = [name for name in _names(timed, "times_ms") if name != timed[0]["ours"]]
                header = [*columns, timed[0]["ours"], *names, "rate", "of the limit"]
                lines = [cells + _time_cells(row, names) for cells, row in zip(shown, timed, strict=True)]
            else:
                names = _names(weighed, "peak_mb")
                header = [*columns, *(f"{name}, MB" for name in names)]
                lines = [
                    cells + [_megabytes(row["peak_mb"], name) for name in names]
                    for cells, row in zip(shown, weighed, strict=True)
                ]
            kept = [k for k, column in enumerate(zip(*lines, strict=True)) if any(column)]
            text.append(markdown([header[k] for k in kept], [[line[k] for k in kept] for line in lines]))
    return "\n\n".join(text)


def _megabytes(peak: dict[str, float | None], name: str) -> str:
    if name not in peak:
        return ""
    return "out of memory" if peak[name] is None else f"{peak[name]:.0f}"


def _versions(contents: dict) -> str:
    machine = contents["machine"]
    text = f"{machine['device']}: {machine['cores']} cores, {machine['memory_gb']} GB, {machine['isa']}"
    for run, versions in contents["runs"].items():
        text += f"; commit {run} on {versions['date']}: "
        text += ", ".join(f"{name} {version}" for name, version in versions.items() if name != "date")
    return text


def document(results: dict[str, dict[str, dict]], folder: Path = RESULTS) -> str:
    """RESULTS.md. Remarks on the numbers are written by hand, in results/<device>/<op>.md."""
    text = [INTRO]
    for device, contents in results.items():
        if {*contents} & {*summary.USUAL}:
            text += [f"**{device}**, float32, forward and backward, all cores:", summary.table(contents)]
            if summary.pictures_both(contents):
                text.append(f"![nt_xent on {device}](benchmarks/results/{device}/nt_xent.svg)")
    if all(device.startswith("cpu") for device in results):
        text.append("No GPU has been measured yet.")
    for op in ["limits", *OPS, "routes"]:
        if any(op in contents for contents in results.values()):
            text.append(f"## {op}")
        for device, contents in results.items():
            if op not in contents:
                continue
            text += [f"### {op} on {device}", _versions(contents[op]), tables(contents[op]["rows"])]
            remarks = folder / device / f"{op}.md"
            if remarks.exists():
                text.append(remarks.read_text().strip())
            if panels(contents[op]["rows"]):
                picture = f"benchmarks/results/{device}/{op}.svg"
                text.append(f"![time and memory of {op} on {device}]({picture})")
    text += [cores.section(results), kernel_report.section(), (ROOT / "benchmarks/trust.md").read_text()]
    return "\n\n".join(part.strip() for part in text) + "\n"


def plot(rows: list[Row], file: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "sslops"  # the same ids each time
    import matplotlib.pyplot as plt

    shown = panels(rows)
    figure, all_axes = plt.subplots(1, len(shown), figsize=(6 * len(shown), 4.5), squeeze=False, layout="constrained")
    for axes, (measure, x, series) in zip(all_axes[0], shown, strict=True):
        dead: dict[int, list[str]] = {}
        for name in _names(series, measure):
            points = [(row[x], row[measure][name]) for row in series if name in row[measure]]
            alive = [(at, value["median"] if measure == "times_ms" else value) for at, value in points if value]
            style = {"lw": 3} if name == series[0]["ours"] else {"ls": ":"} if name == series[0].get("limit") else {}
            xs, ys = zip(*alive, strict=True) if alive else ((), ())
            axes.plot(xs, ys, marker="o", ms=4, label=name, **style)
            for at in (at for at, value in points if value is None):
                dead.setdefault(at, []).append(name)
        for at, names in dead.items():
            axes.axvline(at, color="gray", ls="--", lw=0.8)
            axes.annotate(f"{', '.join(names)}: out of memory", (at, 0.98), xycoords=("data", "axes fraction"),
                          rotation=90, ha="right", va="top", fontsize="small")  # fmt: skip
        rest = {k: v for k, v in facts(series[0]).items() if k not in (x, "bench")}
        said = {"dtype": "{}", "part": "{}", "threads": "{} threads"}
        title = ", ".join(said.get(k, f"{k.upper()} = {{}}").format(v) for k, v in rest.items())
        axes.set(xscale="log", yscale="log", xlabel=x.upper(), ylabel="ms" if measure == "times_ms" else "peak MB")
        axes.set_xticks([row[x] for row in series], [str(row[x]) for row in series], minor=False)
        axes.set_xticks([], minor=True)
        axes.set_title(title.replace("both", "forward and backward"), fontsize="medium")
        axes.legend(fontsize="small")
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def main(added: Iterable[Path] = ()) -> None:
    for file in added:
        for report in reports(file):
            store(report)
    results = load(RESULTS)
    (ROOT / "RESULTS.md").write_text(document(results))
    readme = ROOT / "README.md"
    readme.write_text(summary.with_headlines(readme.read_text(), results))
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: matplotlib is not installed")
        return
    for device, contents in results.items():
        for op, content in contents.items():
            if panels(content["rows"]):
                plot(content["rows"], RESULTS / device / f"{op}.svg")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--add", nargs="*", type=Path, default=[], metavar="FILE")
    main(parser.parse_args().add)
