"""What other libraries want to know of a run: the model, the place that was read, and the text."""

from pathlib import Path
from typing import Any

from scale_sae_jax.config import Config
from scale_sae_jax.files import PACKAGE, local

FILES = (".gguf", ".json", ".jsonl", ".txt", ".parquet", ".gz")  # no ends of a hub name


def metadata(config: Config) -> dict[str, Any]:
    """SAELens' metadata of a run; nothing where activations come from an array or are synthetic."""
    if not config.lm.path:
        return {}
    return {
        "model_name": public_name(config.lm.path),
        "hook_name": f"blocks.{config.lm.layer}.hook_resid_post",
        "prepend_bos": config.text.bos,
        "context_size": config.text.context,
        "dataset_path": public_name(config.text.path),
    }


def hookpoint(config: Config) -> str:
    """Name of the block that was read in sparsify and delphi, for Llama models."""
    return f"layers.{config.lm.layer}"


def public_name(path: str) -> str:
    """A hub name as it is, of a local path its last part: folders are nobody's business."""
    path = path.removeprefix(PACKAGE)
    place = Path(path)
    is_local = path[:1] in ("/", ".", "~") or path.count("/") > 1 or local(path).exists()
    return place.name if is_local or place.suffix in FILES else path
