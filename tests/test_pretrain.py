"""The pretraining demo, run small: what it writes, and that the fused loss trains as the eager one does."""

import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mlxtend", reason="the demo's packages are an extra: pip install sslops[demo]")

STEPS = 6


@pytest.fixture
def pretrain(monkeypatch):
    # By this name the process that measures memory must be able to import it too.
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    import pretrain

    return pretrain


def test_both_losses_train_alike(pretrain, tmp_path, capsys):
    small = ["--data", "digits", "--steps", str(STEPS), "--batch", "64", "--out", str(tmp_path)]
    pretrain.main(small)
    folder = tmp_path / "simclr-digits"

    assert (folder / "curves.csv").read_text().startswith("sslops,eager\n")
    curves = np.loadtxt(folder / "curves.csv", delimiter=",", skiprows=1)
    assert curves.shape == (STEPS, 2)
    assert abs(curves[0, 0] - np.log(2 * 64 - 1)) < 1  # an untrained network tells no view from another
    assert curves[-1, 0] < curves[0, 0]
    np.testing.assert_allclose(curves[:, 0], curves[:, 1], rtol=1e-4)
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")

    report = (folder / "report.txt").read_text()
    assert report in capsys.readouterr().out
    for row in ("step, median ms", "of which the loss, median ms", "the loss's peak memory, MiB"):
        assert re.search(rf"^{row} +\d+\.\d +\d+\.\d$", report, re.MULTILINE), row
    for features in ("raw pixels", "untrained encoder", "pretrained, sslops", "pretrained, eager"):
        assert re.search(rf"^{features} +\d+\.\d% ± \d", report, re.MULTILINE), features
    # Six steps teach nothing: the report has to say so.
    assert report.count("does NOT gain over") == 2

    # Alone it trains as it did in company: same seed, same views, same bits.
    pretrain.main([*small, "--loss", "sslops"])
    alone = np.loadtxt(folder / "curves.csv", skiprows=1)
    np.testing.assert_array_equal(alone, curves[:, 0])


def test_a_run_of_no_steps_is_refused(pretrain, capsys):
    with pytest.raises(SystemExit):
        pretrain.main(["--steps", "0"])
    assert "--steps" in capsys.readouterr().err
