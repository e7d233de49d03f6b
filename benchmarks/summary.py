"""What a reader sees first: of each op one row, in RESULTS.md for each machine and three of them in README.md."""

import json
from typing import Any

from .kernel_report import markdown

Row = dict[str, Any]

# What is not a fact that tells a row from others.
MEASURED = ("run", "ours", "limit", "flop", "bytes", "times_ms", "ratios", "peak_mb", "failed")

# Of each op the row that a reader looks for: what it is of, and its facts; None: without that fact
USUAL: dict[str, tuple[str, dict[str, Any]]] = {
    "nt_xent": ("4,096 embeddings of 128", {"m": 4096, "d": 128}),
    "info_nce": ("256 queries against 65,536 of 128", {"b": 256, "k": 65536, "d": 128}),
    "supcon": ("4,096 embeddings of 128", {"m": 4096, "d": 128}),
    "clip": ("4,096 pairs of 512", {"n": 4096, "d": 512}),
    "siglip": ("4,096 pairs of 512", {"n": 4096, "d": 512}),
    "nearest": ("256 queries, 65,536 rows of 256", {"b": 256, "k": 65536, "d": 256, "part": "forward"}),
    "relic": ("4,096 pairs of 128, all negatives", {"b": 4096, "d": 128, "k": 4095}),
    "barlow_twins": ("256 pairs of 8,192", {"n": 256, "d": 8192}),
    "cross_correlation": ("1,024 pairs of 2,048", {"n": 1024, "d": 2048}),
    "vicreg": ("256 pairs of 8,192", {"n": 256, "d": 8192}),
    "sigreg": ("8 views, 128 embeddings of 64, 1,024 slices", {"v": 8, "n": 128, "d": 64, "m": 1024}),
    "dino": ("10 crops of 32 images, 65,536 prototypes", {"v": 10, "b": 32, "k": 65536, "d": None}),
    "ibot": ("1,024 patches, 8,192 prototypes", {"r": 1024, "k": 8192, "d": None}),
    "sinkhorn": ("128 samples, 65,536 prototypes", {"b": 128, "k": 65536}),
    "skip_gram": ("8,192 pairs, 100,000 words of 300", {"b": 8192, "v": 100000, "d": 300}),
    "masked_prediction": ("64 images of 224, patches of 16", {"images": 64, "pixels": 224, "patch": 16}),
    "gather_patches": ("64 images of 224, patches of 16", {"images": 64, "pixels": 224, "patch": 16}),
    "gather_tokens": ("64 images, 49 of 196 tokens of 768", {"b": 64, "l": 196, "k": 49, "d": 768}),
    "restore_tokens": ("64 images, 49 to 196 tokens of 512", {"b": 64, "l": 196, "d": 512, "positions": "fixed"}),
    "random_mask": ("64 images of 196 tokens", {"b": 64, "l": 196}),
    "random_token_corruption": ("64 texts of 512 tokens", {"b": 64, "l": 512}),
    "masked_token_cross_entropy": ("2,048 tokens of 768, 30,522 words", {"n": 2048, "v": 30522, "d": 768}),
    "ema_update": ("ViT-B", {"bench": "vit", "target": "float32", "source": "float32"}),
}
# Variants that are no rivals: ours in a mode of another row, as are those that begin with our name, and a second limit
NO_RIVALS = ("padded", "ratios", "blocks", "tubes", "counts", "copy")


def usual(op: str, contents: dict) -> Row | None:
    """The stored row of USUAL, on all cores"""
    defaults = {"dtype": "float32", "part": "both", "threads": contents["machine"]["cores"]}
    wanted = {"bench": "time", **defaults, **USUAL[op][1]}
    for row in contents["rows"]:
        if all(row.get(name, value) == value for name, value in wanted.items()) and "busy" not in row:
            return row
    return None


def is_theirs(name: str, row: Row) -> bool:
    return name not in (row["ours"], row.get("limit"), *NO_RIVALS) and not name.startswith("sslops")


def fastest(row: Row, compiled: bool) -> tuple[float, str] | None:
    """The milliseconds and the name of the best form that is not ours, compiled or not"""
    others = [
        (times["median"], name)
        for name, times in row["times_ms"].items()
        if times and is_theirs(name, row) and ("compile" in name) == compiled
    ]
    return min(others, default=None)


def _peaks(contents: dict, op: str) -> str:
    wanted = {name: value for name, value in USUAL[op][1].items() if name != "bench"}
    for row in contents["rows"]:
        if row["bench"] == "memory" and all(row.get(n, v) == v for n, v in (wanted | {"dtype": "float32"}).items()):
            ours = row["peak_mb"][row["ours"]]
            others = [mb for name, mb in row["peak_mb"].items() if mb is not None and is_theirs(name, row)]
            return f"{ours:.0f} MB, {min(others):.0f} MB" if others else f"{ours:.0f} MB"
    return ""


def table(contents: dict[str, dict]) -> str:
    """Of one device: each op at a usual shape"""
    lines = []
    for op, (shape, _) in USUAL.items():
        row = usual(op, contents[op]) if op in contents else None
        if row is None:
            continue
        ours = row["times_ms"][row["ours"]]["median"]
        cells = []
        for compiled in (False, True):
            best = fastest(row, compiled)
            if best:
                ratio = best[0] / ours
                cell = f"{ratio:.{0 if ratio >= 10 else 2}f}x ({best[1]})"
            cells.append("" if best is None else f"**{cell}**" if ratio < 1 else cell)
        limit = row["limit"] and row["times_ms"][row["limit"]]
        share = f"{100 * limit['median'] / ours:.0f}%" if limit else ""
        lines.append([op, shape, f"{ours:.3g} ms", *cells, share, _peaks(contents[op], op)])
    header = [
        "op",
        "of",
        "sslops",
        "best eager form",
        "best compiled form",
        "of the limit",
        "memory: ours, least other",
    ]
    return markdown(header, lines)


# README's rows, of each machine
HEADLINES = {"nt_xent": "SimCLR", "info_nce": "MoCo", "relic": "RELIC"}


def headlines(results: dict[str, dict[str, dict]]) -> str:
    """Markdown, with the picture: our time, and the fastest of the eager forms and of the compiled ones"""
    text = []
    for device, contents in results.items():
        lines = []
        for op, name in HEADLINES.items():
            if row := usual(op, contents[op]) if op in contents else None:
                ours = row["times_ms"][row["ours"]]["median"]
                others = [best[0] for compiled in (False, True) if (best := fastest(row, compiled))]
                cells = [f"{t:,.1f} ms, {t / ours:.1f}x" for t in others]
                lines.append([f"{name}, {USUAL[op][0]}", f"{ours:,.1f} ms", *cells])
        if not lines:
            continue
        text.append(markdown([f"forward and backward, float32, {device}", "sslops", "eager", "torch.compile"], lines))
    for device, contents in results.items():
        if pictures_both(contents):
            picture = f"benchmarks/results/{device}/nt_xent.svg"
            text.append(f"![time and memory of SimCLR's loss against the batch size on {device}]({picture})")
            break
    return "\n\n".join(text)


def with_headlines(readme: str, results: dict[str, dict[str, dict]]) -> str:
    """README's text, its lines between the two marks replaced"""
    begin, end = "<!-- by benchmarks/render.py -->\n\n", "\n<!-- end -->\n"
    before, rest = readme.split(begin)
    return before + begin + headlines(results) + "\n" + end + rest.split(end)[1]


def pictures_both(contents: dict[str, dict]) -> bool:
    """Whether nt_xent's picture shows times and memory"""
    return "nt_xent" in contents and len(panels(contents["nt_xent"]["rows"])) == 2


def panels(rows: list[Row]) -> list[tuple[str, str, list[Row]]]:
    """(times_ms or peak_mb, the fact that varies, the rows along it): the longest series of each, from 3 points on, on
    the most threads
    """
    found = []
    for measure in ("times_ms", "peak_mb"):
        for x in ("m", "n", "d", "k"):
            series: dict[str, list[Row]] = {}
            for row in rows:
                if measure in row and x in row:
                    rest = {name: value for name, value in facts(row).items() if name != x}
                    series.setdefault(json.dumps(rest), []).append(row)
            longest = max(series.values(), key=lambda s: (len(s), s[0].get("threads", 0)), default=[])
            if len(longest) >= 3:
                found.append((measure, x, sorted(longest, key=lambda row: row[x])))
    return found


def facts(row: Row) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in MEASURED}
