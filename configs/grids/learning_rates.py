"""Every architecture's learning rate, tuned on block 10 of SmolLM2 at equal active width.

    python -m experiments.sweep --grid=configs/grids/learning_rates.py --workdir=runs/lr
    python -m experiments.table --workdir=runs/lr --by=preset,lr --columns=fvu,l0,dead

The best ones are TUNED in base.py, which also has the arguments that go after the colon.
"""

from configs.grids import base
from configs.grids.architectures import MANY_EXPERTS, MATCHED
from scale_sae_jax.sweep import axis, product


def get_grid(arg=""):
    arg = base.parse(arg, seeds=1, steps=200)
    presets = product(axis("preset", MATCHED), axis("match", ("active",)))
    presets += product(axis("preset", (*MANY_EXPERTS, "authors")), axis("match", ("both",)))
    points = product(presets, axis("lr", (2e-3, 4e-3, 8e-3, 1.6e-2)))
    return base.cells(arg, points, lambda axes: base.TUNING | {"optim.lr": axes["lr"]})
