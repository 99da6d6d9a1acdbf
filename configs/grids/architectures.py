"""All architectures on the same activations, at equal active width and at equal total width.

    python -m experiments.sweep --grid=configs/grids/architectures.py:seeds=3 --workdir=runs/arch
    python -m experiments.table --workdir=runs/arch --by=preset,match

`match=active` gives an architecture without experts as many latents as a token sees of the
many-expert ones, `match=width` as many as these have in all. The many-expert presets `paper` and
`ours` are one run for both. After the colon: data (a file of configs/), seeds, only (presets,
joined by +), steps, eval_tokens, l0, experts, latents, path (of data=array).
"""

import importlib.util

from scale_sae_jax.config import parse_arg
from scale_sae_jax.errors import UserError
from scale_sae_jax.sweep import axis, cell, product

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
    "ours": 8e-3,
}
MATCHED = ("relu", "gated", "jumprelu", "topk", "batchtopk", "matryoshka", "switch")
MANY_EXPERTS = ("paper", "ours")


def get_grid(arg=""):
    arg = parse_arg(
        arg, data="quickstart", seeds=3, only="", steps=0, eval_tokens=0,
        l0=0, experts=0, latents=0, path="",
    )
    if not arg.data.isidentifier() or importlib.util.find_spec(f"configs.{arg.data}") is None:
        raise UserError(f"data={arg.data}: there is no configs/{arg.data}.py")
    config = importlib.import_module(f"configs.{arg.data}")
    points = product(axis("preset", MATCHED), axis("match", ("active", "width")))
    points += product(axis("preset", MANY_EXPERTS), axis("match", ("both",)))
    only = arg.only.split("+") if arg.only else (*MATCHED, *MANY_EXPERTS)
    for name in set(only) - {*MATCHED, *MANY_EXPERTS}:
        raise UserError(f"only={name}: choose among {', '.join((*MATCHED, *MANY_EXPERTS))}")
    sizes = {name: arg[name] for name in ("l0", "experts", "latents", "path") if arg[name]}
    overrides = {"steps": arg.steps, "eval.tokens": arg.eval_tokens}
    overrides = {name: value for name, value in overrides.items() if value}

    cells = []
    for axes in product([p for p in points if p["preset"] in only], axis("seed", range(arg.seeds))):
        given = {name: value for name, value in {**axes, **sizes}.items() if value != "both"}
        settings = config.get_config(",".join(f"{name}={value}" for name, value in given.items()))
        rate = TUNED[axes["preset"]]
        if settings.sae.match == "width":  # the published rule: falls with the root of the width
            rate *= (settings.sae.active / settings.sae.experts) ** 0.5
        cells.append(cell(axes, settings, overrides | {"optim.lr": rate}))
    return cells
