"""Every architecture's learning rate, tuned on block 10 of SmolLM2 at equal active width.

    python -m experiments.sweep --grid=configs/grids/learning_rates.py --workdir=runs/lr
    python -m experiments.table --workdir=runs/lr --by=preset,lr --columns=fvu,l0,dead

The best ones are TUNED in configs/grids/architectures.py. After the colon: seeds, steps.
"""

from configs import quickstart
from configs.grids.architectures import MANY_EXPERTS, MATCHED
from scale_sae_jax.config import parse_arg
from scale_sae_jax.sweep import axis, cell, product


def get_grid(arg=""):
    arg = parse_arg(arg, seeds=1, steps=200)
    common = {
        "steps": arg.steps,
        "lm.layer": 10,
        "activations.tokens": 60_000,
        "eval.tokens": 1024,
        "checkpoint_every": 0,
    }
    return [
        cell(
            axes,
            quickstart.get_config(f"preset={axes['preset']},match=active,seed={axes['seed']}"),
            common | {"optim.lr": axes["lr"]},
        )
        for axes in product(
            axis("preset", MATCHED + MANY_EXPERTS),
            axis("lr", (2e-3, 4e-3, 8e-3, 1.6e-2)),
            axis("seed", range(arg.seeds)),
        )
    ]
