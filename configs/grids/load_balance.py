"""How much load balance, counted from which experts, or by a bias without a loss.

    python -m experiments.sweep --grid=configs/grids/load_balance.py --workdir=runs/balance
    python -m experiments.table --workdir=runs/balance --by=how,alpha --columns=fvu,dead,load_cv

Arguments: base.py.
"""

from configs.grids import base
from scale_sae_jax.sweep import axis, product


def get_grid(arg=""):
    arg = base.parse(arg)
    points = product(axis("how", ("argmax", "selected")), axis("alpha", (0.0, 0.3, 3.0, 30.0)))
    points += product(axis("how", ("bias",)), axis("alpha", (0.001, 0.01)))

    def changes(axes):
        if axes["how"] == "bias":
            return {"sae.load_balance": 0.0, "sae.balance_rate": axes["alpha"]}
        return {"sae.load_balance": axes["alpha"], "sae.load_balance_from": axes["how"]}

    return base.cells(arg, points, changes)
