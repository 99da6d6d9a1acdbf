"""A finished run on the small model, for tests that look inside one."""

import json
from pydoc_data.topics import topics
from threading import Event

from small_model import write_model

from scale_sae_jax.config import (
    ActivationsConfig,
    Config,
    EvalConfig,
    LMConfig,
    OptimConfig,
    TextConfig,
)
from scale_sae_jax.run import run
from scale_sae_jax.sae.presets import preset


def train_small(folder, words=()):
    """The folder of a run of 64 latents in 4 experts; `words` stand in its text, a token each."""
    documents = [text[:1500] for text in topics.values()]
    mixed = [f" {words[i % len(words)]} ".join(text.split(". ")) if words else text
             for i, text in enumerate(documents)]
    lines = [json.dumps({"text": text}) + "\n" for text in mixed]
    (folder / "docs.jsonl").write_text("".join(lines))
    write_model(folder / "model", documents, words=words)
    config = Config(
        mesh="data:1,expert:1",
        steps=60,
        batch_size=64,
        lm=LMConfig(path=str(folder / "model"), layer=0, rows_per_batch=8),
        text=TextConfig(path=str(folder / "docs.jsonl"), heldout_fraction=0.3, context=32),
        activations=ActivationsConfig(tokens=2000),
        sae=preset("paper", latents=64, experts=4, active=2, k=4),
        optim=OptimConfig(lr=3e-3),
        eval=EvalConfig(tokens=256, bootstrap=5),
    )
    run(config, folder / "run", Event())
    return folder / "run"
