"""`python -m benchmarks`: measures the ops beside what else there is and prints a table; see --help."""

import argparse
import sys
from pathlib import Path

from . import compare, render

OPS = sorted(file.stem.removeprefix("bench_") for file in Path(__file__).parent.glob("bench_*.py"))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.split(": ")[1])
    parser.add_argument("--op", nargs="+", choices=OPS, default=OPS, help="default: all")
    for name, example in (("shapes", "4096x128 8192x512"), ("dtypes", "float32 bfloat16"), ("parts", "forward both")):
        parser.add_argument(f"--{name}", nargs="+", help=f"such as {example}; the op's file says more")
    parser.add_argument("--isa", choices=list(compare.LIBRARIES), help="as on a CPU that has no more, torch's too")
    parser.add_argument("--busy", help="so many processes spin meanwhile, as data loaders do")
    parser.add_argument("--threads", nargs="+", help="on a CPU; default: 1 and all cores")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--seconds", help="spent on timing a row; each variant runs at least three times")
    parser.add_argument("--minutes", help="after which no other row is begun")
    parser.add_argument("--save", action="store_true", help="store the rows in benchmarks/results, render RESULTS.md")
    parser.add_argument("--compare", metavar="REV", help="time our kernels of another commit and of this tree in turn")
    arguments = parser.parse_args()

    options = [f"benchmarks/bench_{op}.py" for op in arguments.op]
    for name in ("shapes", "dtypes", "parts", "threads"):
        if getattr(arguments, name):
            options.append(f"--{name}={' '.join(getattr(arguments, name))}")
    for name in ("isa", "busy", "device", "seconds", "minutes"):
        if getattr(arguments, name):
            options.append(f"--{name}={getattr(arguments, name)}")
    if arguments.compare:
        return compare.main(arguments.compare, arguments.op, options)
    report, failed = compare.measure(options)
    for op, rows in render.rows_of(report, "").items():
        print(f"\n{op} on {report['machine_info']['device']}\n\n{render.tables(rows)}")
    if arguments.save:
        render.store(report)
        render.main()
    return failed


if __name__ == "__main__":
    sys.exit(main())
