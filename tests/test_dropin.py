"""benchmarks/dropin.py: training with ours in lightly's place gives lightly's loss curves."""

import pytest
import torch

import sslops
from benchmarks import dropin, peers

datasets = pytest.importorskip("sklearn.datasets", reason="the demo's packages are an extra: pip install sslops[demo]")
if peers.lightly() is None:
    pytest.skip("lightly is not installed", allow_module_level=True)


@pytest.mark.parametrize("method", dropin.METHODS)
def test_the_import_changes_nothing_else(method):
    """On real images, imported or patched: float32 rounding apart, the same curve; both ways of ours, the same bits."""
    digits = torch.from_numpy(datasets.load_digits().images).float()[:, None] / 16
    images = torch.nn.functional.interpolate(digits, size=(28, 28), mode="bilinear")
    libraries = {name: dropin.library(name) for name in ("lightly", "sslops")}
    with sslops.patch_lightly():
        libraries["patched"] = dropin.library("lightly")
    torch.manual_seed(0)
    runs = dropin.train(method, libraries, images, batch=32, steps=6)
    assert runs["patched"].losses == runs["sslops"].losses
    assert len(set(runs["sslops"].losses)) == 6
    torch.testing.assert_close(
        torch.tensor(runs["sslops"].losses), torch.tensor(runs["lightly"].losses), rtol=1e-4, atol=0
    )
