"""What the grids share: their arguments, sizes and data, and each preset's learning rate.

After its colon every grid takes: data (a file of configs/), seeds, steps, eval_tokens, l0, experts,
latents, batch, path (of data=array), lm and text (local files in the place of the data's), rates,
and what its own docstring adds. 0 or nothing leaves a setting as the data's config file has it.
rates=tuned takes the learning rates below, found for runs of a few hundred steps; rates=published
the rule of the published runs, for long ones:

    python -m experiments.sweep --grid=configs/grids/l0_by_experts.py:data=owt,rates=published ...
"""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

from scale_sae_jax.config import OF_A_TEXT, TextConfig, parse_arg
from scale_sae_jax.errors import UserError
from scale_sae_jax.sweep import Axes, Cell, axis, cell, product

# Best of configs/grids/learning_rates.py, on other activations than the quickstart's.
TUNED = {
    "relu": 8e-3,
    "gated": 8e-3,
    "jumprelu": 4e-3,  # at 8e-3, a little lower FVU, a tenth of its latents are dead
    "topk": 8e-3,
    "batchtopk": 8e-3,
    "matryoshka": 8e-3,
    "switch": 4e-3,
    "paper": 4e-3,
    "authors": 4e-3,
    "ours": 8e-3,
}
# Where options and learning rates are chosen: not the block that the comparisons report.
TUNING = {
    "lm.layer": 10,
    "activations.tokens": 60_000,
    "eval.tokens": 1024,
    "checkpoint_every": 0,
}
SIZES = ("l0", "experts", "active", "latents", "preset", "match", "seed", "path")


def parse(arg: str, **more: Any) -> Any:
    """A grid's argument, with `more` of its own. Raises UserError as `parse_arg`."""
    shared = dict(
        data="quickstart", seeds=3, steps=0, eval_tokens=0, l0=0, experts=0, latents=0, batch=0,
        path="", lm="", text="", rates="tuned",
    )
    parsed = parse_arg(arg, **shared | more)
    if parsed.seeds < 1:
        raise UserError(f"seeds={parsed.seeds}: a grid needs at least 1")
    if parsed.rates not in ("tuned", "published"):
        raise UserError(f"rates={parsed.rates}: choose tuned or published")
    return parsed


def harvests(name: str) -> bool:
    """Whether it is a setting of the language model, its text, or what is kept of both."""
    return name.startswith(("lm.", "text.", "activations."))


def cells(
    arg: Any,
    points: list[Axes],
    changes: Callable[[Axes], dict[str, Any]] = lambda axes: {},
    texts: Mapping[str, TextConfig] | None = None,
) -> list[Cell]:
    """A cell for each point and seed.

    Args:
      points: axes with the names of a config's argument (experts, active, latents, preset, match,
        and k, which is l0 there) are passed to the data's config; 'both' of match leaves it out.
      changes: settings by dotted names for what other axes mean.
      texts: to evaluate on beside the data's own held-out text, by name.

    Raises UserError for an unknown config file or preset, and sizes that do not fit.
    """
    if not arg.data.isidentifier() or importlib.util.find_spec(f"configs.{arg.data}") is None:
        raise UserError(f"data={arg.data}: there is no configs/{arg.data}.py")
    config = importlib.import_module(f"configs.{arg.data}")
    common = {"steps": arg.steps, "eval.tokens": arg.eval_tokens, "batch_size": arg.batch,
              "lm.path": arg.lm, "text.path": arg.text}
    common = {name: value for name, value in common.items() if value}
    if arg.text:
        common |= {f"text.{name}": getattr(TextConfig(), name) for name in OF_A_TEXT}
    sizes = {name: arg[name] for name in ("l0", "experts", "latents", "path") if arg[name]}
    found = []
    for axes in product(points, axis("seed", range(arg.seeds))):
        given = {**sizes, **axes}
        given = {"l0" if name == "k" else name: value for name, value in given.items()}
        passed = {n: v for n, v in given.items() if n in SIZES and v != "both"}
        settings = config.get_config(",".join(f"{name}={v}" for name, v in passed.items()))
        rate = 0.0
        if arg.rates == "tuned":
            rate = TUNED.get(axes.get("preset"), TUNED["paper"])
            if settings.sae.match == "width":  # as in the published rule, by the root of the width
                rate *= (settings.sae.active / settings.sae.experts) ** 0.5
        changed = changes(axes)
        if not settings.lm.path:  # an array or synthetic data: there is nothing to harvest
            changed = {name: value for name, value in changed.items() if not harvests(name)}
        found.append(cell(axes, settings, common | {"optim.lr": rate} | changed, texts))
    return found
