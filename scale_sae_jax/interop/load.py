"""`scale_sae_jax.load`: an autoencoder by its path or hub name, whatever format it is in."""

from pathlib import Path
from types import ModuleType

import jax
from jax.sharding import Mesh

from scale_sae_jax import run
from scale_sae_jax.errors import UserError
from scale_sae_jax.files import local
from scale_sae_jax.interop import dictionary_learning, hub, sae_lens, sparsify
from scale_sae_jax.parallel.experts import on_mesh
from scale_sae_jax.parallel.mesh import param_specs, placed
from scale_sae_jax.sae.autoencoder import Autoencoder, Params


def load(
    path: str | Path, step: int | str = "latest", mesh: Mesh | None = None
) -> tuple[Autoencoder, Params]:
    """An autoencoder and its parameters.

    Args:
      path: the --workdir of a run; a folder of SAELens, sparsify or dictionary_learning, or one
        that holds a single SAELens or sparsify folder; or a hub name, 'owner/repo' or
        'owner/repo:sae_id'.
      step: of a run: a checkpoint's step, 'latest', or 'best' (lowest running FVU).
      mesh: devices to put it on, whatever mesh it was trained on; one device if not given.

    Raises UserError when there is no such thing, a file is damaged, or ours cannot express it.
    """
    folder = _folder(path)
    if folder is None:
        return run.load(_run_folder(path), step, mesh)
    if step != "latest":
        raise UserError(f"{path} is not the folder of a run, and has no checkpoint {step}")
    sae, params = _reader(folder).load(folder)
    if mesh is None:
        return sae, params
    specs = param_specs(params, sae.module.by_expert)
    return on_mesh(sae, mesh), jax.device_put(params, placed(mesh, specs))


def _reader(folder: Path) -> ModuleType:
    others = (m for m in (dictionary_learning, sparsify) if (folder / m.WEIGHTS).is_file())
    return next(others, sae_lens)


def _run_folder(path: str | Path) -> Path:
    folder = local(path)
    if (folder / "config.json").is_file():
        return folder
    what = "holds no autoencoder" if folder.is_dir() else "is no folder"
    raise UserError(
        f"{folder} {what}: name the --workdir of a run, or a folder of SAELens, sparsify or "
        "dictionary_learning"
    )


def _folder(path: str | Path) -> Path | None:
    """The folder of an autoencoder of another library; None for what must be a run."""
    folder = local(path)
    if not folder.exists():
        name = hub.split_name(str(path))
        return hub.fetch(*name) if name else None
    if (folder / sae_lens.CFG).is_file() or (folder / dictionary_learning.WEIGHTS).is_file():
        return folder
    if (folder / "config.json").is_file():
        return None
    inner = sorted(child.parent for child in folder.glob(f"*/{sae_lens.CFG}"))
    if len(inner) > 1:
        names = ", ".join(child.name for child in inner[:8])
        raise UserError(f"{folder} holds {len(inner)} autoencoders ({names}): name one of them")
    return inner[0] if inner else None
