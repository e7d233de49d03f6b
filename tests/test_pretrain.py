"""The pretraining demo, run small: what it writes, and that the fused losses train as the eager ones do."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("mlxtend", reason="the demo's packages are an extra: pip install sslops[demo]")

STEPS, BATCH = 6, 64
METHODS = [
    "simclr", "supcon", "barlow", "vicreg", "lejepa", "moco", "nnclr", "byol", "relicv2", "dino", "swav", "mae",
    "data2vec", "bert", "word2vec",
]  # fmt: skip


@pytest.fixture
def pretrain(monkeypatch):
    # By this name the process that measures memory must be able to import it too.
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    import pretrain

    monkeypatch.setattr(pretrain, "DRAWS", 2)
    yield pretrain
    for name in [each for each in sys.modules if each == "pretrain" or each.split(".")[0] == "methods"]:
        del sys.modules[name]


def test_the_methods_are_all_here(pretrain):
    assert list(pretrain.METHODS) == METHODS


@pytest.mark.parametrize("method", METHODS)
def test_both_losses_train_alike(pretrain, tmp_path, capsys, monkeypatch, method):
    if method != "simclr":  # two new processes, alike for all

        def peak_memory(method, loss, run):  # in this one, where it says little
            pretrain.resident_growth(method, loss, [(x.detach().numpy(), x.requires_grad) for x in run.leaves])
            return "0.0"

        monkeypatch.setattr(pretrain, "peak_memory", peak_memory)
    data = "kjv" if method in ("bert", "word2vec") else "digits"
    if data == "kjv":  # enough to be tried on
        train, test, words = pretrain.king_james()
        monkeypatch.setattr(pretrain, "king_james", lambda: (train[:1000], test[:20], words))
    small = ["--method", method, "--data", data, "--steps", str(STEPS), "--batch", str(BATCH)]
    pretrain.main([*small, "--out", str(tmp_path)])
    folder = tmp_path / f"{method}-{data}"

    assert (folder / "curves.csv").read_text().startswith("sslops,eager\n")
    curves = np.loadtxt(folder / "curves.csv", delimiter=",", skiprows=1)
    assert curves.shape == (STEPS, 2)
    if method != "dino":  # whose centre, 0 at first, makes the targets' entropy rise for some tens of steps
        assert curves[-1, 0] < curves[0, 0]
    alike = STEPS // 2 if method == "nnclr" else STEPS  # then rounding has made another row the nearest
    np.testing.assert_allclose(curves[:alike, 0], curves[:alike, 1], rtol=1e-4)
    if method == "simclr":
        assert abs(curves[0, 0] - np.log(2 * BATCH - 1)) < 1  # an untrained network tells no view from another
    pictures = {path.name for path in folder.glob("*.png") if path.read_bytes().startswith(b"\x89PNG")}
    own = dict.fromkeys(("simclr", "barlow", "vicreg"), "cross_correlation.png") | {"mae": "reconstructions.png"}
    own |= dict.fromkeys(("dino", "swav"), "prototypes.png")
    assert pictures == ({own[method]} if method in own else set())
    assert "<svg" in (folder / "curves.svg").read_text()

    report = (folder / "report.txt").read_text()
    assert report in capsys.readouterr().out
    for row in ("step, median ms", "of which the loss, median ms", "the loss's peak memory, MiB"):
        assert re.search(rf"^{row} +\d+\.\d +\d+\.\d$", report, re.MULTILINE), row
    if method == "bert":
        for title in ("always '.*'", "untrained encoder", "pretrained, sslops", "pretrained, eager"):
            assert re.search(rf"^{title} +\d+\.\d%$", report, re.MULTILINE), title
        assert len(re.findall(r"^- .*[\[(]", report, re.MULTILINE)) == 5  # passages, filled in
        return
    if method == "word2vec":
        for title in ("untrained encoder", "pretrained, sslops", "pretrained, eager"):
            assert re.search(rf"^{title} +\d+\.\d%$", report, re.MULTILINE), title
        assert len(re.findall(r"^- \w+: \S+(, \S+){5}$", report, re.MULTILINE)) == len(pretrain.ASKED)
        return
    for features in ("raw pixels", "untrained encoder", "pretrained, sslops", "pretrained, eager"):
        assert re.search(rf"^{features} +\d+\.\d% ± \d", report, re.MULTILINE), features
    # Six steps teach nothing: the report has to say so.
    assert report.count("does NOT gain over") == 2


@pytest.mark.parametrize("method", ["simclr", "moco", "dino", "mae", "bert"])  # of each kind of draws and state
def test_alone_it_trains_as_in_company(pretrain, method):
    def curve(names: list[str]) -> list[float]:
        torch.manual_seed(0)
        network = pretrain.METHODS[method](side=8)
        data = torch.randint(2, 4096, (96, 8)) if method == "bert" else torch.rand(96, 1, 8, 8)
        return pretrain.pretrain(network, names, data, BATCH, STEPS)["sslops"].losses

    assert curve(["sslops"]) == curve(["sslops", "eager"])


def test_a_run_of_no_steps_is_refused(pretrain, capsys):
    with pytest.raises(SystemExit):
        pretrain.main(["--steps", "0"])
    assert "--steps" in capsys.readouterr().err


def test_a_method_is_trained_on_its_own_data(pretrain, capsys):
    with pytest.raises(SystemExit):
        pretrain.main(["--method", "mae", "--data", "kjv"])
    assert "--data mnist or digits" in capsys.readouterr().err


def test_two_processes_train_as_one(pretrain, tmp_path):
    small = ["--data", "digits", "--steps", str(STEPS), "--batch", "64", "--method", "simclr", "--loss", "sslops"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun's processes: another rounding of the convolutions grows with every step
    try:
        pretrain.main([*small, "--out", str(tmp_path / "one")])
    finally:
        torch.set_num_threads(threads)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    here = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [*torchrun, pretrain.__file__, *small, "--out", str(tmp_path / "two")]
    subprocess.run(command, check=True, timeout=300, env=here)
    one, two = (np.loadtxt(tmp_path / runs / "simclr-digits" / "curves.csv", skiprows=1) for runs in ("one", "two"))
    np.testing.assert_allclose(two, one, rtol=1e-5)
