"""The search for `preset=ours`: one change at a time to the paper's options, then some together.

    python -m experiments.sweep --grid=configs/grids/ours.py --workdir=runs/ours
    python -m experiments.table --workdir=runs/ours --by=options --columns=fvu,delta_ce,dead,load_cv

Runs on block 10 of SmolLM2, so that the comparison on the quickstart's block 15 and on synthetic
data is not one on which the options were chosen. Active and total width are the same in every cell.
After the colon: seeds, steps.
"""

from configs import quickstart
from scale_sae_jax.config import parse_arg
from scale_sae_jax.sweep import axis, cell, product

OPTIONS = {
    "paper": {},
    "gate=one": {"sae.gate": "one"},
    "gate=renorm": {"sae.gate": "renorm"},
    "gate=softmax_logits": {"sae.gate": "softmax_logits"},
    "gate_at=code": {"sae.gate_at": "code"},
    "feature_scaling=none": {"sae.feature_scaling": "none"},
    "feature_scaling=gain": {"sae.feature_scaling": "gain"},
    "load_balance=0": {"sae.load_balance": 0.0},
    "load_balance=0.1": {"sae.load_balance": 0.1},
    "balance_rate=0.01": {"sae.load_balance": 0.0, "sae.balance_rate": 0.01},
    "topk_scope=batch": {"sae.topk_scope": "batch"},
    "orthogonality=0.1": {"sae.orthogonality": 0.1},
    "experts=32,active=4": {"sae.experts": 32, "sae.active": 4},
    "experts=64,active=8": {"sae.experts": 64, "sae.active": 8},
    "auxk=off": {"sae.auxk": False},
    "lr=3e-3": {"optim.lr": 3e-3},
    "lr=5e-4": {"optim.lr": 5e-4},
}


def get_grid(arg=""):
    arg = parse_arg(arg, seeds=1, steps=400)
    common = {
        "steps": arg.steps,
        "lm.layer": 10,
        "activations.tokens": 60_000,
        "eval.tokens": 4096,
        "checkpoint_every": 0,
    }
    return [
        cell(
            axes,
            quickstart.get_config(f"seed={axes['seed']}"),
            common | OPTIONS[axes["options"]],
        )
        for axes in product(axis("options", OPTIONS), axis("seed", range(arg.seeds)))
    ]
