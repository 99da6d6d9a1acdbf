"""All architectures on the same activations, at equal active width and at equal total width.

    python -m experiments.sweep --grid=configs/grids/architectures.py:seeds=3 --workdir=runs/arch
    python -m experiments.table --workdir=runs/arch --by=preset,match

`match=active` gives an architecture without experts as many latents as a token sees of the
many-expert ones, `match=width` as many as these have in all. The many-expert presets `paper` and
`ours` are one run for both. Beside the arguments of every grid (base.py): only (presets, joined
by +).
"""

from configs.grids import base
from scale_sae_jax.errors import UserError
from scale_sae_jax.sweep import axis, product

MATCHED = ("relu", "gated", "jumprelu", "topk", "batchtopk", "matryoshka", "switch")
MANY_EXPERTS = ("paper", "ours")


def get_grid(arg=""):
    arg = base.parse(arg, only="")
    points = product(axis("preset", MATCHED), axis("match", ("active", "width")))
    points += product(axis("preset", MANY_EXPERTS), axis("match", ("both",)))
    only = arg.only.split("+") if arg.only else (*MATCHED, *MANY_EXPERTS)
    for name in set(only) - {*MATCHED, *MANY_EXPERTS}:
        raise UserError(f"only={name}: choose among {', '.join((*MATCHED, *MANY_EXPERTS))}")
    return base.cells(arg, [point for point in points if point["preset"] in only])
