"""How many experts a token needs: e = 1, 2, 4, 8, 16 of 32, at one total width.

    python -m experiments.sweep --grid=configs/grids/active.py --workdir=runs/active
    python -m experiments.report --workdir=runs/active

More active experts cost more: FLOPs stand beside every result. At e = 1 the gate decides whether
the router learns from the reconstruction at all (`gate=renorm` gives it weight 1 and no gradient).
Arguments: base.py.
"""

from configs.grids import base
from scale_sae_jax.sweep import axis, product


def get_grid(arg=""):
    arg = base.parse(arg, experts=32)
    active = axis("active", (1, 2, 4, 8, 16))
    points = product(axis("preset", ("paper", "ours")), axis("gate", ("prob", "renorm")), active)
    return base.cells(arg, points, lambda axes: {"sae.gate": axes["gate"]})
