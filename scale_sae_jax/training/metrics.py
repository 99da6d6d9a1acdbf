"""Where the numbers of a run go: metrics.jsonl, TensorBoard, and Weights & Biases if asked."""

import contextlib
import json
import uuid
from pathlib import Path
from typing import Any

from scale_sae_jax.errors import UserError, telling


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics file; one that is cut short, by a kill say, is left out."""
    texts = path.read_bytes().splitlines() if path.exists() else []
    return [line for line in map(_read_line, texts) if line is not None]


def _read_line(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) and type(line.get("step")) is int else None


def keep_until(path: Path, step: int) -> list[dict[str, Any]]:
    """Drops the lines after `step`, which a resumed run writes again; returns the rest."""
    kept = [line for line in read_lines(path) if line["step"] <= step]
    text = "".join(json.dumps(line) + "\n" for line in kept)
    partial = path.with_suffix(".partial")
    with _telling(path.parent):
        partial.write_text(text)
        partial.replace(path)
    return kept


def _telling(workdir: Path) -> contextlib.AbstractContextManager:
    remedy = "make room, then the same command goes on from the last checkpoint"
    return telling(f"records cannot be written to {workdir}", remedy)


class MetricsWriter:
    """Writes records, one a logging step, to every sink. A context manager."""

    def __init__(self, workdir: Path, resumed_step: int, wandb_config: dict | None):
        from tensorboardX import SummaryWriter  # here: it imports torch, if there is one

        self._workdir = workdir
        self._wandb = _start_wandb(workdir, wandb_config) if wandb_config is not None else None
        with _telling(self._workdir):
            self._file = open(workdir / "metrics.jsonl", "ab", buffering=0)
            self._board = SummaryWriter(
                str(workdir / "tensorboard"), purge_step=resumed_step or None
            )

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_) -> None:
        with _telling(self._workdir):
            self._file.close()
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def write(self, record: dict[str, Any]) -> None:
        """`record` holds `step` and numbers."""
        with _telling(self._workdir):
            self._file.write((json.dumps(record) + "\n").encode())
            for name, value in record.items():
                if name != "step":
                    self._board.add_scalar(name, value, record["step"])
        if self._wandb is not None:
            self._wandb.log(record, step=record["step"])


def import_wandb() -> Any:
    """The module. Raises UserError if it is not installed."""
    try:
        import wandb
    except ImportError:
        raise UserError("config.wandb needs Weights & Biases: pip install wandb") from None
    return wandb


def _start_wandb(workdir: Path, settings: dict):
    """The run there, the same one whenever this folder's run goes on: its id is in wandb_id.txt."""
    path = workdir / "wandb_id.txt"
    if not path.exists():
        path.write_text(uuid.uuid4().hex)
    known = {"id": path.read_text().strip(), "name": workdir.name, "config": settings}
    try:
        return import_wandb().init(dir=str(workdir), resume="allow", **known)
    except Exception as error:  # its own, of the network, of its service
        raise UserError(
            f"Weights & Biases does not begin: {str(error)[:200] or type(error).__name__}; log in "
            "with 'wandb login', set WANDB_MODE=offline, or leave config.wandb out"
        ) from error
