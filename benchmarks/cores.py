"""How an op's work on the CPU spreads over many cores: the parallel regions of a call, and what limits their speed-up.

A model, not a measurement: of each region the tickets that threads draw, in
their order and with those they wait for, as csrc/cpu has them; a ticket's work is its multiplications and additions,
all cores are as fast as one alone, and nothing else costs time. So it is what the order of the work allows at most.
Beside it stand the two cores that could be measured.
"""

import heapq
from collections.abc import Callable, Iterator
from typing import NamedTuple

from .kernel_report import markdown

CORES = (2, 8, 32, 64)
SIDE, GROUP, STRIP, BLOCK, CHUNK = 256, 64, 64, 256, 256  # rows: csrc/cpu's kSide, kGroup, kStrip, kBlock, chunk_rows


class Ticket(NamedTuple):
    work: float  # FLOP
    panels: tuple[int, ...] = ()  # that no other ticket may have at the same time; those before it come first


class Region(NamedTuple):
    name: str
    tickets: list[Ticket]


def seconds(tickets: list[Ticket], cores: int) -> float:
    """Until the last ends, in FLOP of one core: each core takes the next ticket when it is free, and then waits"""
    free = [0.0] * cores
    done: dict[int, float] = {}
    for ticket in tickets:
        end = max(heapq.heappop(free), *(done.get(panel, 0.0) for panel in ticket.panels), 0.0) + ticket.work
        done.update(dict.fromkeys(ticket.panels, end))
        heapq.heappush(free, end)
    return max(free)


def tournament(panels: int) -> Iterator[tuple[int, int]]:
    """csrc/cpu/tournament.h"""
    yield from ((i, i) for i in range(panels))
    seats = panels + panels % 2
    for turn in range(seats - 1):
        for table in range(seats // 2):
            a = (turn + table) % (seats - 1) if table else seats - 1
            b = (turn - table) % (seats - 1) if table else turn
            if max(a, b) < panels:
                yield min(a, b), max(a, b)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _rows(name: str, count: int, d: int) -> Region:
    """Rows that are normalised, rounded or written, GROUP a ticket"""
    return Region(name, [Ticket(4.0 * GROUP * d)] * ceil_div(count, GROUP))


def nt_xent(m: int, d: int) -> list[Region]:
    side = 64 if m <= 512 else 128 if m <= 8192 else 256

    def tiles(products: int) -> list[Ticket]:
        own = side // GROUP * (side // GROUP + 1) / 2 * GROUP**2  # of a panel with itself, in halves
        pairs = tournament(ceil_div(m, side))
        return [Ticket(2.0 * d * products * (own if i == j else side**2), tuple({i, j})) for i, j in pairs]

    forward = [_rows("rows", m, d), Region("positives", [Ticket(2.0 * 32 * 32 * d)] * (m // 64))]
    backward = [_rows("rows", m, d), _rows("zeros", m, d), Region("tiles", tiles(3)), _rows("rows out", m, d)]
    return [*forward, Region("tiles", tiles(1)), _rows("close", m, 4), *backward]


def info_nce(b: int, k: int, d: int) -> list[Region]:
    chunk = 64 if k <= 1024 else 128 if k <= 8192 else CHUNK
    blocks, chunks = ceil_div(b, BLOCK), ceil_div(k, chunk)
    length = ceil_div(chunks, min(chunks, ceil_div(64, blocks), 8 if k < 8 * 512 else k // 512))
    parts = ceil_div(chunks, length)
    scan = [Ticket(4.0 * d * min(b, BLOCK) * chunk * min(length, chunks - part * length)) for part in range(parts)]
    scan = [ticket for ticket in scan for _ in range(blocks)]
    join = Region("join", [Ticket(2.0 * 4 * parts * d)] * ceil_div(b, 4))
    return [_rows("rows", b, d), _rows("positives", b, d), Region("candidates", scan), join, _rows("keys", b, d)]


def _strips(name: str, d: int, work: float) -> Region:
    return Region(name, [Ticket(work * STRIP)] * ceil_div(d, STRIP))


def _gram(n: int, d: int, views: int) -> list[Region]:
    side = 32 if n <= 128 else 64 if n <= 512 else 128
    wide = ceil_div(n, side)
    tiles = [Ticket(2.0 * views * d * side**2 / (2 if i == j else 1)) for i in range(wide) for j in range(i, wide)]
    return [_strips("strips", d, 10.0 * views * n), Region("Gram", tiles)]


def barlow_twins(n: int, d: int) -> list[Region]:
    if n < d:
        return [*_gram(n, d, 2), _strips("back", d, 2 * (2.0 * n * n + 20 * n))]
    panels = ceil_div(d, SIDE)
    pairs = ((i, (i + turn) % panels) for turn in range(panels) for i in range(panels))
    tiles = [Ticket(6.0 * n * SIDE**2, (i, panels + j)) for i, j in pairs]
    return [_strips("strips", d, 20.0 * n), Region("panels", tiles), _strips("back", d, 40.0 * n)]


def vicreg(n: int, d: int) -> list[Region]:
    """Of both views, one after the other"""
    if n < d:
        one = [*_gram(n, d, 1), _strips("back", d, 2.0 * n * n + 20 * n)]
    else:
        tiles = [
            Ticket((4.0 if i == j else 6.0) * n * SIDE**2, tuple({i, j})) for i, j in tournament(ceil_div(d, SIDE))
        ]
        one = [_strips("strips", d, 10.0 * n), Region("panels", tiles), _strips("back", d, 20.0 * n)]
    return [*one, *one]


MODELS: dict[str, tuple[Callable[..., list[Region]], list[tuple[int, ...]]]] = {
    "nt_xent": (nt_xent, [(512, 128), (4096, 128), (8192, 128), (65536, 128)]),
    "info_nce": (info_nce, [(256, 4096, 128), (256, 65536, 128)]),
    "barlow_twins": (barlow_twins, [(256, 2048), (256, 8192), (4096, 2048)]),
    "vicreg": (vicreg, [(256, 2048), (256, 8192), (4096, 2048)]),
}


def speed_up(regions: list[Region], cores: int) -> float:
    total = sum(ticket.work for region in regions for ticket in region.tickets)
    return total / sum(seconds(region.tickets, cores) for region in regions)


def measured(rows: list[dict], shape: tuple[int, ...]) -> str:
    """By how much the second core helped where it was measured: float32, forward and backward"""
    times = {}
    for row in rows:
        sizes = tuple(row[name] for name in ("m", "b", "n", "k", "d") if name in row)
        wanted = {"bench": "time", "dtype": "float32", "part": "both", "busy": None}
        if sizes == shape and all(row.get(name) == value for name, value in wanted.items()):
            times[row["threads"]] = row["times_ms"][row["ours"]]["median"]
    return f"{times[1] / times[2]:.1f}" if {1, 2} <= times.keys() else ""


def section(results: dict[str, dict[str, dict]]) -> str:
    """Markdown; results: device -> op -> contents of its file"""
    devices = [device for device in results if device.startswith("cpu")]
    lines = []
    for op, (model, shapes) in MODELS.items():
        for shape in shapes:
            regions = model(*shape)
            tickets = ", ".join(f"{region.name} {len(region.tickets)}" for region in regions)
            found = [measured(results[device].get(op, {"rows": []})["rows"], shape) for device in devices]
            expected = [f"{speed_up(regions, cores):.1f}" for cores in CORES]
            lines.append([op, "x".join(map(str, shape)), tickets, *found, *expected])
    head = [*(f"{device}, measured" for device in devices), *(f"{cores} cores" for cores in CORES)]
    note = __doc__.split("\n\n")[1].replace("\n", " ")
    return f"## Many cores\n\n{note}\n\n" + markdown(["op", "shape", "regions of a call: tickets", *head], lines)
