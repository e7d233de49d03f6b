"""examples/tour.py, cell after cell as a reader runs it."""

import re
import runpy
from pathlib import Path

import pytest

TOUR = Path(__file__).parents[1] / "examples/tour.py"


def test_the_tour_runs_and_shows_what_it_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pyplot = pytest.importorskip(
        "matplotlib.pyplot", reason="the demo's packages are an extra: pip install sslops[demo]"
    )
    pyplot.switch_backend("Agg")
    monkeypatch.syspath_prepend(TOUR.parent)
    names = runpy.run_path(str(TOUR))
    assert len(pyplot.gcf().axes) == 3
    assert names["losses"][-1] < names["losses"][0] - 0.5
    assert names["after"] > names["before"]
    values = re.findall(r"^(\w+) +([\d.]+)  eager +([\d.]+)$", capsys.readouterr().out, re.MULTILINE)
    assert [name for name, *_ in values] == ["nt_xent", "info_nce", "barlow_twins", "vicreg"]
    assert all(float(ours) == pytest.approx(float(eager), rel=1e-4) for _, ours, eager in values)
