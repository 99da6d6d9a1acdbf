"""Language models in Flax: GPT-2 and the Llama family, run to a layer and on from a layer."""

from scale_sae_jax.lm.load import (
    LanguageModel,
    ModelSummary,
    inspect_language_model,
    load_language_model,
    load_tokenizer,
)

__all__ = [
    "LanguageModel",
    "ModelSummary",
    "inspect_language_model",
    "load_language_model",
    "load_tokenizer",
]
