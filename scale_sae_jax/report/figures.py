"""The figures of a report, each a function of rows or arrays that returns a matplotlib Figure.

Intervals are 95 % over seeds. Colours are by arm, the same in every figure.
"""

import itertools
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from scale_sae_jax.evaluation.redundancy import THRESHOLDS
from scale_sae_jax.report.arms import Arm, Interval, Row, apart, arms_of

QUALITY = {"fvu": "FVU", "delta_ce": "delta CE, nats"}
COSTS = {"flops_per_token": "FLOPs a token, forward", "train_seconds": "training, seconds"}
BLOCK = 512  # latents compared with all at a time
COLOURS, MARKERS = 20, "os^D"  # after so many arms colours come again, with another marker


def colours(names: list[str]) -> dict[str, Any]:
    """A colour for each arm."""
    from matplotlib import colormaps

    palette = colormaps["tab20"].colors
    return {name: palette[i % COLOURS] for i, name in enumerate(names)}


def quality(arms: list[Arm]) -> Figure | None:
    """FVU and delta CE of each arm, the best one on top."""
    known = [name for name in QUALITY if any(arm.values(name) for arm in arms)]
    if not known:
        return None
    figure, every = _axes(len(known), height=1 + 0.28 * len(arms))
    ranked = sorted(arms, key=lambda arm: _mean(arm, known[0]), reverse=True)
    for axes, column in zip(every, known, strict=True):
        for place, arm in enumerate(ranked):
            found = arm.interval(column)
            if found:
                axes.errorbar(found.mean, place, xerr=found.half, fmt="o", color="C0", capsize=3)
        axes.set(xlabel=QUALITY[column])
    _name_rows(every, ranked)
    return figure


def along(rows: list[Row], axes_names: list[str], axis: str) -> Figure | None:
    """FVU and loss recovered along a number of the grid, a line an arm."""
    columns = {"fvu": "FVU", "recovered": "loss recovered"}
    known = [name for name in columns if any(row.get(name) is not None for row in rows)]
    rows = [row for row in rows if row.get(axis) is not None]
    curves = arms_of(rows, apart(axes_names, axis))
    curves = [arm for arm in curves if len({row[axis] for row in arm.rows}) > 1]
    if not known or not curves:
        return None
    figure, every = _axes(len(known))
    by_name = colours([arm.name for arm in curves])
    for axes, column in zip(every, known, strict=True):
        for arm in curves:
            points = arms_of(arm.rows, [axis])
            points = sorted(points, key=lambda p: p.rows[0][axis])
            x, y, half = _known([(p.rows[0][axis], p.interval(column)) for p in points])
            axes.errorbar(x, y, yerr=half, marker="o", capsize=3, label=arm.name,
                          color=by_name[arm.name])
        axes.set(xlabel=axis, ylabel=columns[column])
        if min(row[axis] for row in rows) > 0:
            axes.set_xscale("log", base=2)
        ticks = sorted({row[axis] for row in rows})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.tick_params(axis="x", rotation=90 if len(ticks) > 6 else 0)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    every[0].legend(fontsize="small")
    return figure


def pareto(arms: list[Arm]) -> Figure | None:
    """FVU against what it costs; arms on the line are beaten by none that costs less."""
    arms = [arm for arm in arms if arm.values("fvu")]
    known = [name for name in COSTS if any(arm.values(name) for arm in arms)]
    if not known or not arms:
        return None
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    figure, every = _axes(len(known), height=max(4.5, 1 + 0.22 * len(arms)))
    by_name = colours([arm.name for arm in arms])
    for axes, column in zip(every, known, strict=True):
        points = []
        for place, arm in enumerate(arms):
            cost, fvu = arm.interval(column), arm.interval("fvu")
            if cost is None:
                continue
            points.append((cost.mean, fvu.mean))
            marker = MARKERS[place // COLOURS % len(MARKERS)]
            axes.errorbar(cost.mean, fvu.mean, xerr=cost.half, yerr=fvu.half, fmt=marker,
                          capsize=2, color=by_name[arm.name], label=arm.name)
        front = pareto_front(points)
        axes.plot(*zip(*front, strict=True), color="0.6", lw=1, zorder=0)
        axes.set(xlabel=COSTS[column], ylabel="FVU")
        if max(points)[0] > 10 * min(points)[0]:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
    every[-1].legend(fontsize="small", bbox_to_anchor=(1.02, 1), loc="upper left")
    return figure


def pareto_front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (cost, loss) that no other one beats or equals in both, by rising cost."""
    front = []
    for cost, loss in sorted(points):
        if not front or loss < front[-1][1]:
            front.append((cost, loss))
    return front


def generalisation(arms: list[Arm]) -> Figure | None:
    """FVU on the held-out text of training, and on each other text that cells were evaluated on."""
    columns = dict.fromkeys(
        name for arm in arms for name in arm.rows[0]
        if name.endswith("_fvu") and arm.values(name)
    )
    if not columns:
        return None
    figure, (axes,) = _axes(1, height=1.3 + 0.28 * len(arms))
    for column, mark in zip(["fvu", *columns], itertools.cycle("os^vD*PX"), strict=False):
        y, x, half = _known([(place, arm.interval(column)) for place, arm in enumerate(arms)])
        label = "held-out text of training" if column == "fvu" else column.removesuffix("_fvu")
        axes.errorbar(x, y, xerr=half, fmt=mark, capsize=3, label=label)
    axes.set(xlabel="FVU")
    _name_rows([axes], arms)
    figure.legend(loc="outside upper center", ncols=3)
    return figure


def redundancy(arms: list[Arm]) -> Figure | None:
    """How alike live latents are: mean of the largest cosine with another one, and the share of
    those with a twin, by the cosine that makes one; in the same expert and in others, each next to
    what as many random directions give.
    """
    panels = {"max_cosine_mean": "mean of the largest cosine"}
    panels |= {f"redundancy_{t}": f"share over cosine {t}" for t in THRESHOLDS}
    parts = {"_intra": ("same expert", "o"), "_intra_null": ("same expert, random", "x"),
             "_inter": ("another expert", "s"), "_inter_null": ("another expert, random", "+")}
    return _by_arm(arms, panels, parts)


def specialisation(arms: list[Arm]) -> Figure | None:
    """What experts are chosen by: information that token ids give about them, next to that of
    shuffled tokens; how sure the router is; and how uneven the load is.
    """
    arms = [arm for arm in arms if any(arm.values("load_cv"))]
    panels = {"expert_mi": "token and expert, nats", "router_entropy": "router entropy, nats",
              "load_cv": "CV of load"}
    return _by_arm(arms, panels, {"": ("measured", "o"), "_null": ("shuffled tokens", "x")})


def _by_arm(
    arms: list[Arm], panels: dict[str, str], parts: dict[str, tuple[str, str]]
) -> Figure | None:
    """A row an arm, axes a panel, and in them a mark for each part of its column: name, mark."""
    arms = [arm for arm in arms if any(arm.values(f"{c}{p}") for c in panels for p in parts)]
    panels = {column: title for column, title in panels.items()
              if any(arm.values(column + part) for arm in arms for part in parts)}
    if not panels:
        return None
    figure, every = _axes(len(panels), height=1.3 + 0.28 * len(arms), width=3.4)
    for axes, (column, title) in zip(every, panels.items(), strict=True):
        for part, (label, mark) in parts.items():
            found = [(place, arm.interval(column + part)) for place, arm in enumerate(arms)]
            y, x, half = _known(found)
            if len(x):
                axes.errorbar(x, y, xerr=half, fmt=mark, capsize=2, label=label)
        axes.set(xlabel=title)
        low, high = axes.get_xlim()
        if high - low < 0.01:  # differences as small as that are none
            axes.set_xlim(low - 0.01, high + 0.01)
        axes.locator_params(axis="x", nbins=5)
    _name_rows(every, arms)
    figure.legend(*every[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def expert_load(loads: dict[str, Float[np.ndarray, " N"]]) -> Figure | None:
    """Share of the routing that each expert gets, the busiest first, against an even share."""
    curves = {name: np.sort(load)[::-1] * len(load) for name, load in loads.items()}
    labels = "experts, the busiest first", "share of the routing / even share"
    return _over_experts(curves, 1.0, *labels)


def omega(values: dict[str, Float[np.ndarray, " N"]]) -> Figure | None:
    """omega of each expert: what feature scaling learned (Scale SAE, section 3)."""
    curves = {name: np.sort(value) for name, value in values.items()}
    return _over_experts(curves, 0.0, "experts, by omega", "omega")


def _over_experts(
    curves: dict[str, Float[np.ndarray, " N"]], level: float, xlabel: str, ylabel: str
) -> Figure | None:
    """A curve an arm over its experts, and a line where nothing has happened."""
    if not curves:
        return None
    figure, (axes,) = _axes(1)
    by_name = colours(list(curves))
    for name, curve in curves.items():
        axes.plot(curve, marker=".", label=name, color=by_name[name])
    axes.axhline(level, color="0.6", lw=1)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.locator_params(axis="x", integer=True)
    axes.legend(fontsize="small")
    return figure


def similarity(decoders: dict[str, Float[np.ndarray, "N M D"]]) -> Figure | None:
    """How alike experts are: for the latents of one, the mean largest cosine with another's."""
    if not decoders:
        return None
    figure, every = _axes(len(decoders), height=3.6)
    alike = [expert_similarity(decoder) for decoder in decoders.values()]
    most = max(image.max() for image in alike)
    for axes, name, values in zip(every, decoders, alike, strict=True):
        image = axes.imshow(values, vmin=0, vmax=most, cmap="viridis")
        axes.set(title=name, xlabel="expert", ylabel="expert")
        axes.title.set_fontsize("small")
        axes.locator_params(integer=True)
    figure.colorbar(image, ax=list(every), shrink=0.8, label="largest cosine, mean")
    return figure


def expert_similarity(decoder: Float[np.ndarray, "N M D"]) -> Float[np.ndarray, "N N"]:
    """Entry i, j: mean over the latents of i of the largest cosine with one of j, not itself."""
    experts, size, _ = decoder.shape
    unit = decoder / np.maximum(np.linalg.norm(decoder, axis=-1, keepdims=True), 1e-12)
    flat = unit.reshape(-1, unit.shape[-1])
    alike = np.zeros((experts, experts))
    for first in range(0, experts * size, BLOCK):
        rows = np.arange(first, min(first + BLOCK, experts * size))
        cosines = flat[rows] @ flat.T  # [BLOCK, N * M]
        cosines[np.arange(len(rows)), rows] = -1
        np.add.at(alike, rows // size, cosines.reshape(-1, experts, size).max(-1))
    return alike / size


def _axes(count: int, height: float = 3.6, width: float = 4.6) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(width * count + 1.5, height), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _known(
    found: list[tuple[int | float, Interval | None]],
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Places, means and half-widths of the intervals that there are; all empty if there is none."""
    known = [(place, i.mean, i.half) for place, i in found if i]
    return tuple(np.reshape(known, (-1, 3)).T)


def _name_rows(every: list[Any], arms: list[Arm]) -> None:
    """A row an arm, named at the left of the first axes."""
    for axes in every:
        axes.set(yticks=range(len(arms)), yticklabels=[])
        axes.grid(axis="x", alpha=0.3)
    every[0].set_yticklabels([arm.name for arm in arms])


def _mean(arm: Arm, column: str) -> float:
    found = arm.interval(column)
    return found.mean if found else np.inf

