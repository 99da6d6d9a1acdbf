"""How the router spreads tokens over experts, and how far experts specialise in token ids."""

import numpy as np
from jaxtyping import Float, Int

from scale_sae_jax.evaluation.bootstrap import ratio


def expert_load(experts: Int[np.ndarray, "T e"], n_experts: int) -> Float[np.ndarray, " N"]:
    """Share of the (token, selected expert) pairs that each expert gets; sums to 1."""
    counts = np.bincount(experts.ravel(), minlength=n_experts)
    return ratio(counts, counts.sum())


def load_cv(load: Float[np.ndarray, " N"]) -> float:
    """Coefficient of variation: 0 if the load is even, sqrt(N − 1) if one expert has all of it."""
    return float(np.std(load) / np.mean(load))


def mutual_information(
    tokens: Int[np.ndarray, " T"], experts: Int[np.ndarray, "T e"], n_experts: int
) -> float:
    """Plug-in mutual information, in nats, of token id and expert over all selected pairs.

    The estimate from counts is biased upward, the more so the rarer the token ids: compare it
    with `shuffled_information`, which would be 0 without the bias.
    """
    _, token = np.unique(tokens, return_inverse=True)
    pairs = token[:, None] * n_experts + experts  # [T, e]
    cells, counts = np.unique(pairs, return_counts=True)
    token, expert = np.divmod(cells, n_experts)
    joint = counts / pairs.size
    p_token, p_expert = np.bincount(token, joint), np.bincount(expert, joint)
    return float(np.sum(joint * np.log(joint / (p_token[token] * p_expert[expert]))))


def shuffled_information(
    tokens: Int[np.ndarray, " T"], experts: Int[np.ndarray, "T e"], n_experts: int, seed: int
) -> float:
    """`mutual_information` after token ids are shuffled among tokens: the bias of the estimate."""
    shuffled = np.random.default_rng(seed).permutation(tokens)
    return mutual_information(shuffled, experts, n_experts)


def expert_metrics(
    tokens: Int[np.ndarray, " T"] | None,
    experts: Int[np.ndarray, "T e"],
    n_experts: int,
    seed: int,
) -> dict[str, float | list[float] | None]:
    """Load and specialisation of the experts selected for T >= 1 tokens, ids None if unknown."""
    load = expert_load(experts, n_experts)
    known = tokens is not None
    return {
        "expert_load": load.tolist(),
        "load_cv": load_cv(load),
        "expert_mi": mutual_information(tokens, experts, n_experts) if known else None,
        "expert_mi_null": (
            shuffled_information(tokens, experts, n_experts, seed) if known else None
        ),
    }
