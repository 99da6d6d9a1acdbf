"""Whether scaling the high-frequency part of encoders helps, and whether that part matters.

    python -m experiments.sweep --grid=configs/grids/feature_scaling.py --workdir=runs/scaling
    python -m experiments.table --workdir=runs/scaling --by=preset,feature_scaling

`gain` is the control: it scales the whole encoder of an expert. Arguments: base.py.
"""

from configs.grids import base
from scale_sae_jax.sweep import axis, product


def get_grid(arg=""):
    arg = base.parse(arg)
    kinds = axis("feature_scaling", ("none", "mean", "mean_lp", "gain"))
    points = product(axis("preset", ("paper", "ours")), kinds)
    return base.cells(arg, points, lambda axes: {"sae.feature_scaling": axes["feature_scaling"]})
