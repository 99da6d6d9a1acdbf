"""The Hugging Face hub, in SAELens' layout: REPO/SAE_ID/cfg.json and sae_weights.safetensors."""

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from scale_sae_jax.errors import UserError
from scale_sae_jax.files import download
from scale_sae_jax.interop import files, sae_lens, sparsify
from scale_sae_jax.sae.autoencoder import Autoencoder, Params
from scale_sae_jax.sae.registry import has_experts

REPO = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
WANTED = (sae_lens.CFG, sae_lens.WEIGHTS, sparsify.WEIGHTS)
CFGS = [sae_lens.CFG, f"*/{sae_lens.CFG}"]  # patterns as of fnmatch: * matches folders in folders
README = """---
library_name: saelens
tags:
- sparse-autoencoder
- scale_sae_jax
---

# Sparse autoencoders

Trained with `scale_sae_jax`, in the layout of [SAELens](https://github.com/decoderesearch/SAELens).

    import scale_sae_jax
    sae, params = scale_sae_jax.load("{repo}:{sae_id}")
    codes = sae.encode(params, x)

With SAELens{needs}:

    from sae_lens import SAE
    sae = SAE.from_pretrained("{repo}", "{sae_id}")
"""
PLUGIN = " (many experts: `import scale_sae_jax.interop.sae_lens_plugin` first)"


def split_name(name: str) -> tuple[str, str] | None:
    """(repository, sae_id or '') of 'owner/repo' and 'owner/repo:sae_id'; None for others."""
    repo, _, sae_id = name.partition(":")
    return (repo, sae_id) if REPO.fullmatch(repo) else None


def push_to_hub(
    sae: Autoencoder,
    params: Params,
    repo: str,
    sae_id: str,
    metadata: Mapping[str, Any] | None = None,
    private: bool = False,
    api: Any = None,
) -> str:
    """Uploads the autoencoder as REPO/SAE_ID, and a README where the repository has none.

    Args:
      repo: 'owner/name', created if it is not there. sae_id: such as 'layers.8'.
      api: what stands for `huggingface_hub.HfApi()`.

    Returns the name that `scale_sae_jax.load` takes. Raises UserError as `sae_lens.save` does, for
    names that are none, and when the hub refuses or cannot be reached.
    """
    if split_name(repo) is None or ":" in repo:
        raise UserError(f"'{repo}' is no repository: write owner/name")
    with tempfile.TemporaryDirectory() as local:
        root = Path(local)
        folder = files.inside(root, sae_id, "sae_id")
        sae_lens.save(sae, params, folder, metadata)
        many = has_experts(sae.config)
        try:
            if api is None:
                from huggingface_hub import HfApi  # here: it takes long to import

                api = HfApi()
            api.create_repo(repo, private=private, exist_ok=True)
            if not api.file_exists(repo, "README.md"):
                readme = README.format(repo=repo, sae_id=sae_id, needs=PLUGIN if many else "")
                (root / "README.md").write_text(readme)
            message = f"Add {sae_id}"
            api.upload_folder(repo_id=repo, folder_path=str(root), commit_message=message)
        except Exception as error:  # its own, of its HTTP library, of the socket
            raise UserError(
                f"{repo} cannot be written to on the hub ({type(error).__name__}): log in with "
                "'hf auth login', and check name and network"
            ) from None
    return f"{repo}:{sae_id}"


def fetch(repo: str, sae_id: str) -> Path:
    """The local folder of an autoencoder on the hub, SAELens' or sparsify's layout.

    Args:
      sae_id: its folder in the repository; '' if there is only one.

    Raises UserError: no such repository or autoencoder, several to choose from, no network.
    """
    if sae_id:
        folder = files.inside(_download(repo, [f"{sae_id}/{n}" for n in WANTED]), sae_id, "sae_id")
        if not (folder / sae_lens.CFG).is_file():
            raise UserError(f"{repo} has no {sae_id}/{sae_lens.CFG}: see its files on the hub")
        return folder
    root = _download(repo, CFGS)
    found = choices(root)
    if len(found) != 1:
        raise UserError(f"{repo} holds {len(found)} autoencoders{_named(found)}: write {repo}:NAME")
    prefix = "" if found == ["."] else f"{found[0]}/"
    return _download(repo, [prefix + name for name in WANTED]) / found[0]


def choices(root: Path) -> list[str]:
    """Folders below `root` with a cfg.json, '.' for `root` itself."""
    paths = sorted(path.parent.relative_to(root) for path in root.rglob(sae_lens.CFG))
    return [str(PurePosixPath(path)) for path in paths]


def _named(found: list[str]) -> str:
    return f" ({', '.join(found[:8])}{', ...' if len(found) > 8 else ''})" if found else ""


def _download(repo: str, patterns: list[str]) -> Path:
    return download(repo, patterns, "check the name and the network")
