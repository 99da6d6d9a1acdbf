"""One evaluator for every architecture: held-out activations in, one flat dict of results out."""

from scale_sae_jax.evaluation.evaluator import EvalBatch, evaluate

__all__ = ["EvalBatch", "evaluate"]
