"""The search for `preset=ours`: one change at a time to the paper's options, then some together.

    python -m experiments.sweep --grid=configs/grids/ours.py --workdir=runs/ours
    python -m experiments.table --workdir=runs/ours --by=options --columns=fvu,delta_ce,dead,load_cv

Runs on block 10 of SmolLM2, so that the comparison on the quickstart's block 15 and on synthetic
data is not one on which the options were chosen. Active and total width are the same in every cell.
Beside the arguments of every grid (base.py): lr.
"""

from configs.grids import base
from scale_sae_jax.sweep import axis

SCALED = {"sae.input_scale": True, "sae.load_balance": 0.03}
BASE = SCALED | {"sae.gate_at": "code"}
BATCH = BASE | {"sae.gate": "renorm", "sae.topk_scope": "batch"}
OPTIONS = {
    "paper": {},
    "gate=one": {"sae.gate": "one"},
    "load_balance=0.1": {"sae.load_balance": 0.1},
    "input_scale": SCALED,
    "input_scale gate=renorm": SCALED | {"sae.gate": "renorm"},
    "input_scale gate_at=code": BASE,
    "input_scale gate_at=code gate=renorm": BASE | {"sae.gate": "renorm"},
    "input_scale gate_at=code load_balance=0.003": BASE | {"sae.load_balance": 0.003},
    "input_scale gate_at=code balance_rate=0.01": BASE
    | {"sae.load_balance": 0.0, "sae.balance_rate": 0.01},
    "input_scale gate_at=code feature_scaling=none": BASE | {"sae.feature_scaling": "none"},
    "input_scale gate_at=code topk_scope=batch": BASE | {"sae.topk_scope": "batch"},
    "input_scale gate_at=code orthogonality=0.1": BASE | {"sae.orthogonality": 0.1},
    "input_scale gate_at=code experts=32 active=4": BASE | {"sae.experts": 32, "sae.active": 4},
    "input_scale gate_at=code gate=renorm topk_scope=batch": BATCH,
    "input_scale gate_at=code gate=renorm topk_scope=batch load_balance=0.003": BATCH
    | {"sae.load_balance": 0.003},
}


def get_grid(arg=""):
    arg = base.parse(arg, seeds=1, steps=300, lr=4e-3)
    common = base.TUNING | {"optim.lr": arg.lr}
    return base.cells(
        arg, axis("options", OPTIONS), lambda axes: common | OPTIONS[axes["options"]]
    )
