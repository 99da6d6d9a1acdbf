"""Which weight a selected expert gets, before the top-k or after it.

    python -m experiments.sweep --grid=configs/grids/gate.py --workdir=runs/gate
    python -m experiments.table --workdir=runs/gate --by=active,gate,gate_at

At active = 1, 'renorm' and 'softmax_probs' are the constant 1: the router gets no gradient from the
reconstruction. Arguments: base.py.
"""

from configs.grids import base
from scale_sae_jax.sweep import axis, product

GATES = ("prob", "renorm", "softmax_probs", "softmax_logits", "one")


def get_grid(arg=""):
    arg = base.parse(arg)
    where = product(axis("gate", GATES), axis("gate_at", ("output", "code")))
    points = product(axis("active", (1, 2)), where)
    return base.cells(
        arg, points, lambda axes: {"sae.gate": axes["gate"], "sae.gate_at": axes["gate_at"]}
    )
