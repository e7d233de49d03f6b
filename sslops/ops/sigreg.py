"""SIGReg: embeddings that are standard normal along random directions; and LeJEPA's loss, which is made of it."""

from collections.abc import Sequence
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from .. import _check, distributed
from .._check import Of
from .._library import Out, register
from .._random import RandomStream, draw_key, normals
from .._sums import mean
from ..backend import kernel


class Arguments(NamedTuple):
    z: Annotated[Tensor, Of("V N D", spread=True)]
    directions: Annotated[Tensor | None, Of("M D", (torch.float32, torch.float64))]
    key: Annotated[Tensor | None, Of("", (torch.int64,))]  # of the directions, if they are to be drawn
    slices: int  # M
    knots: int
    t_max: float
    group: str
    backend: str = ""


class Outputs(NamedTuple):
    loss: Out
    sums: Out  # over all rows, of cos(t u) - exp(-t^2 / 2) and of sin(t u), at all t but the first, which is 0
    drawn: Out  # the directions


def outputs(x: Arguments) -> Outputs:
    views, _, d = x.z.shape
    drawn = (x.slices, d) if x.directions is None else (0,)
    return Outputs(Out(()), Out((views, 2, x.knots - 1, x.slices)), Out(drawn))


def draw(key: Tensor, slices: int, d: int) -> Tensor:
    """[M, D] in float64: unit vectors, as csrc/cpu/sigreg.cpp draws them"""
    rows = normals(key, RandomStream.SIGREG, slices * (-(-d // 4))).view(slices, -1)[:, :d]
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)


def reference(x: Arguments) -> tuple[Tensor]:
    """loss [], the maths as it is written, in float32 (float64 for float64), phases too"""
    z = x.z.to(torch.promote_types(x.z.dtype, torch.float32))
    directions = x.directions if x.key is None else draw(x.key, x.slices, z.shape[2])
    assert directions is not None
    step = x.t_max / (x.knots - 1)
    t = torch.arange(x.knots, dtype=z.dtype, device=z.device) * step
    phi = (-t.square() / 2).exp()
    weights = 2 * step * phi  # of the trapezoidal rule from -t_max to t_max
    weights = torch.cat([weights[:1] / 2, weights[1:-1], weights[-1:] / 2])
    with torch.autocast("cpu" if z.is_meta else z.device.type, enabled=False):  # there is none on meta
        phases = (z @ directions.to(z.dtype).t())[..., None] * t  # [V, N, M, K]
        apart = (phases.cos().mean(1) - phi).square() + phases.sin().mean(1).square()
        return (z.shape[1] * (apart @ weights).mean(),)


def _check_arguments(x: Arguments) -> None:
    _check.count("sigreg", "slices", x.slices, 1, 2**31 - 1)
    _check.count("sigreg", "knots", x.knots, 2, 129)
    _check.positive("sigreg", t_max=x.t_max)
    if (x.directions is None) == (x.key is None):
        _check.bad_value("sigreg", "key", "one, or directions", "both" if x.key is not None else "neither")
    if x.directions is not None and len(x.directions) != x.slices:
        _check.bad_value("sigreg", "directions", f"shape [{x.slices}, {x.z.shape[2]}]", list(x.directions.shape))


def _scale(x: Arguments) -> float:
    """What the statistic of sums is to be multiplied by: N / N^2, and 1 / (V M) for the mean; NaN of nothing"""
    terms = x.z.shape[0] * x.z.shape[1] * x.slices * distributed.size(x.group)
    return 1 / terms if terms else float("nan")


def _forward(x: Arguments) -> tuple[Tensor, ...]:
    part = distributed.part(x.group, x.z.shape[1]) if x.group else None
    found: tuple[Tensor, ...] = kernel(x.backend, "sigreg").forward(x, _scale(x), part)
    return found


def _backward(grad: Tensor, x: Arguments, *saved: Tensor) -> Tensor:
    dz: Tensor = kernel(x.backend, "sigreg").backward(grad * distributed.size(x.group), x, _scale(x), *saved)
    return dz


_run = register(
    "sigreg",
    Arguments,
    outputs,
    reference=reference,
    check=_check_arguments,
    gradients=("z",),
    forward=_forward,
    backward=_backward,
)


@distributed.in_step
def sigreg(
    z: Tensor,
    *,
    slices: int = 1024,
    knots: int = 17,
    t_max: float = 3.0,
    directions: Tensor | None = None,
    generator: torch.Generator | None = None,
    group: distributed.Group = None,
    backend: str | None = None,
) -> Tensor:
    """SIGReg, Epps and Pulley's statistic of embeddings along random directions: 0 for a standard normal distribution.

    N times the integral over t, from -t_max to t_max, of exp(-t^2 / 2) |mean_n exp(i t u_n) - exp(-t^2 / 2)|^2, with
    u_n = <z_n, direction>: the mean over M directions and over the views. Nothing of size [N, M] is stored: sums over
    the batch are, [V, 2, knots - 1, M].

    Args:
        z: [N, D], or V views [V, N, D], each a distribution of its own; float32, float16, bfloat16 or float64 (float64
            runs the eager reference). Projections and phases are float32, under autocast too.
        slices: M, how many directions are drawn: normal vectors, normalised, by Philox under one int64 key. The key
            comes from torch's generator of z's device and is not read on the host. The same key gives the same random
            words on every device and backend, and directions that are those of float64, rounded to float32.
        knots: at which t the integral is taken by the trapezoidal rule, from 0 to t_max; 2 to 129. Even in t, it is
            twice the half.
        t_max: positive.
        directions: [M, D] to use in place of drawn ones, as they are; M is then theirs. No gradient.
        generator: draws the key, on z's device; None is torch's default one. Not for use inside torch.compile.
        group: None, or "world" or a ProcessGroup over whose W ranks the batch lies, N rows of each view on each: the
            loss is that of all rows, the same on every rank, and so must be what is built on it. The sums are summed
            over the ranks, and nothing is gathered but the key, of which all take rank 0's. Gradients are W times the
            rank's share, which DDP's averaging makes those of the whole batch. `directions` must be the same on all.
        backend: "cpu", "triton" or "eager"; the fastest that can run here if None (see `sslops.explain`).

    Returns:
        The loss, 0-d, in float32 (float64 for float64 input). NaN for no rows.

    Raises:
        TypeError, ValueError: arguments of the wrong type, shape, dtype, device or value; torch.distributed not
            initialised; other shapes or options on other ranks, or an error there.
        RuntimeError: the backend that was asked for cannot run here; a second derivative of a fused backend.

    Source: Balestriero and LeCun, LeJEPA: Provable and Scalable Self-Supervised Learning Without the Heuristics,
    arXiv:2511.08544.
    """
    name, key = distributed.name("sigreg", group), None
    if isinstance(z, Tensor):
        if directions is None:
            key = draw_key("sigreg", generator, z.device)
        elif generator is not None:
            _check.bad_value("sigreg", "generator", "None beside directions", generator)
        if isinstance(directions, Tensor) and directions.dim() and directions.is_floating_point():
            slices = len(directions)
            directions = directions.detach().to(torch.promote_types(z.dtype, torch.float32))
        z = z[None] if z.dim() == 2 else z

    def with_rank_0s_key(x: Arguments) -> Arguments:
        if not name or x.key is None:
            return x
        return x._replace(key=torch.ops.sslops.all_gather(x.key[None], name, 0, "sigreg's key")[0])

    loss: Tensor = _run(Arguments(z, directions, key, slices, knots, t_max, name), backend, with_rank_0s_key)[0]
    return loss


@distributed.in_step
def lejepa(
    global_views: Tensor | Sequence[Tensor],
    local_views: Tensor | Sequence[Tensor] | None = None,
    *,
    lambd: float = 0.05,
    slices: int = 1024,
    knots: int = 17,
    t_max: float = 3.0,
    directions: Tensor | None = None,
    generator: torch.Generator | None = None,
    group: distributed.Group = None,
    backend: str | None = None,
) -> Tensor:
    """LeJEPA's loss: lambd `sigreg` of all views + (1 - lambd) of how far they are from the mean of the global ones.

    The latter is the mean over views, images and columns of (z - mean of the image's global views)^2.

    Args:
        global_views: [G, N, D], or a list of views [N, D].
        local_views: [L, N, D], or a list of views, of the same N, D and dtype; None: there are none.
        lambd: in [0, 1].
        slices, knots, t_max, directions, generator, group, backend: as `sigreg` has them.

    Returns, Raises: as `sigreg` does.

    Source: Balestriero and LeCun, LeJEPA: Provable and Scalable Self-Supervised Learning Without the Heuristics,
    arXiv:2511.08544; without local views, the mean is over the pair, say, that SimCLR has.
    """
    name = distributed.name("lejepa", group)
    _check.probability("lejepa", lambd=lambd)
    views = _views("global_views", global_views)
    if not sum(map(len, views)):
        _check.bad_value("lejepa", "global_views", "at least one view", "none")
    everyone = views if local_views is None else [*views, *_views("local_views", local_views, views[0])]
    z = torch.cat(everyone)
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    regularity = sigreg(
        z, slices=slices, knots=knots, t_max=t_max, directions=directions, generator=generator, group=group,
        backend=backend,
    )  # fmt: skip
    count = sum(map(len, views))
    apart = mean((wide - wide[:count].mean(0)).square().mean(2))
    options = distributed.options({"z": z, "lambd": lambd, "global_views": count}) if name else ""
    return lambd * regularity + (1 - lambd) * distributed.mean(apart, name, "lejepa", options)


def _views(name: str, views: Tensor | Sequence[Tensor], like: Tensor | None = None) -> list[Tensor]:
    """[V_i, N, D] each, all like the first one or that which is given"""
    given = [views] if isinstance(views, Tensor) else list(views) if isinstance(views, (list, tuple)) else []
    if not given or not all(isinstance(z, Tensor) and z.dim() in (2, 3) and z.is_floating_point() for z in given):
        wanted = "floating-point views, [V, N, D] or a list of [N, D]"
        _check.bad_type("lejepa", name, wanted, [list(getattr(z, "shape", [type(z).__name__])) for z in given])
    found = [z[None] if z.dim() == 2 else z for z in given]
    like = found[0] if like is None else like
    for z in found:
        if (z.shape[1:], z.dtype, z.device) != (like.shape[1:], like.dtype, like.device):
            wanted = f"views {list(like.shape[1:])} of {like.dtype} on {like.device}"
            _check.bad_value("lejepa", name, wanted, f"{list(z.shape[1:])} of {z.dtype} on {z.device}")
    return found
