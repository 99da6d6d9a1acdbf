"""Several processes that run one program: how they find each other, and who writes.

Every process calls everything alike; process 0 leads, which means that it alone writes files and
talks to the user. Files are shared: all processes see the same folders.
"""

import importlib.util
import os
import socket
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.errors import JaxRuntimeError
from jax.experimental import multihost_utils
from jaxtyping import Int64

from scale_sae_jax.errors import UserError
from scale_sae_jax.parallel.watch import Watch

HEARTBEAT_SECONDS = 30  # silence after which a process counts as lost
MESSAGE_BYTES = 2048


def join(coordinator: str = "", num_processes: int = 0, process_id: int = -1) -> Watch | None:
    """Joins the other processes of this program, if there are any, and watches over them.

    Returns the watch, to be told when this process ends as it should.

    Args:
      coordinator: HOST:PORT of process 0. Without it, the environment of a SLURM step or of a TPU
        pod tells; without that either, there is one process.

    Call it before anything that uses a device. Raises UserError for half an answer, or if the
    others do not come within five minutes.
    """
    given = bool(coordinator), num_processes > 0, process_id >= 0
    if any(given) and not all(given):
        raise UserError(
            "--coordinator=HOST:PORT, --num_processes and --process_id belong together: give all"
        )
    if all(given) and process_id >= num_processes:
        raise UserError(f"--process_id={process_id} must lie below {num_processes} processes")
    if not any(given) and not _in_a_cluster():
        return None
    where = {"coordinator_address": coordinator, "num_processes": num_processes,
             "process_id": process_id} if any(given) else {}
    try:
        jax.distributed.initialize(
            **where,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        if not any(given) and "coordinator_address" in str(error):
            return None  # JAX finds nothing that tells of others: libtpu lies on other machines too
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(
            f"the processes do not find each other: {reason}; check --coordinator and that all "
            f"{num_processes or ''} of them run"
        ) from None
    if not several():
        return None
    watch = Watch(jax.process_index())
    port = watch.expect(jax.process_count() - 1) if leads() else 0
    host = _said_by_lead(coordinator.rpartition(":")[0] or socket.gethostname())
    port = int(_said_by_lead(str(port)))
    if not leads():
        try:
            watch.connect(host, port)
        except OSError:  # closed between machines: the heartbeat has to do
            pass
    return watch


def _in_a_cluster() -> bool:
    """Whether this is a task of a SLURM step with several, or may be a TPU machine."""
    tasks = os.environ.get("SLURM_NTASKS", "1") if "SLURM_STEP_NODELIST" in os.environ else "1"
    return tasks != "1" or importlib.util.find_spec("libtpu") is not None


def several() -> bool:
    """Whether others run this program with this process."""
    return jax.process_count() > 1


def lost(error: Exception) -> bool:
    """Whether an error may mean that another process is gone, so that no more can be done."""
    return several() and isinstance(error, JaxRuntimeError)


def leads() -> bool:
    """Whether this process writes and talks."""
    return jax.process_index() == 0


def any_of(flag: bool) -> bool:
    """Whether `flag` is set in any process."""
    if not several():
        return flag
    return bool(multihost_utils.process_allgather(np.asarray(flag)).any())


def total(counts: Int64[np.ndarray, " N"]) -> Int64[np.ndarray, " N"]:
    """The sum over all processes, of numbers below 2^62."""
    if not several():
        return counts
    halves = np.stack([counts >> 31, counts & (2**31 - 1)]).astype(np.int32)  # JAX has no int64
    high, low = multihost_utils.process_allgather(halves).astype(np.int64).sum(0)
    return (high << 31) + low


def lead_alone(act: Callable[[], Any]) -> Any:
    """`act()` in the leading process, while the others wait; returns its result there, else None.

    A UserError is raised in all of them.
    """
    if not several():
        return act()
    result, message = None, ""
    if leads():
        try:
            result = act()
        except UserError as error:
            message = str(error)
    told = _said_by_lead(message)
    if told:
        raise UserError(told)
    return result


def _said_by_lead(text: str) -> str:
    """The text of the leading process, in all."""
    raw = np.zeros(MESSAGE_BYTES, np.uint8)
    encoded = text.encode()[:MESSAGE_BYTES]
    raw[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    told = bytes(np.asarray(multihost_utils.broadcast_one_to_all(raw)).astype(np.uint8))
    return told.rstrip(b"\0").decode(errors="replace")


def everywhere(tree: Any) -> Any:
    """Arrays, split over the processes or not, whole and on the host of each."""

    def whole(array: Any) -> Any:
        split = isinstance(array, jax.Array) and not array.is_fully_addressable
        return multihost_utils.process_allgather(array, tiled=True) if split else array

    return jax.device_get(jax.tree.map(whole, tree))
