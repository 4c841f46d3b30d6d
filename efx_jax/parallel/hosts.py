"""The processes of a run over several hosts: how they find each other, and wait for each other."""

import contextlib
import os
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from efx_jax.config import MeshConfig
from efx_jax.errors import InputError, first_line

# Which variable says how many processes a launcher has started; jax finds the rest of what it needs by itself.
_LAUNCHERS = {"SLURM_STEP_NUM_TASKS": "Slurm", "OMPI_COMM_WORLD_SIZE": "Open MPI", "PMI_SIZE": "MPICH"}


class OtherProcessError(InputError):
    """Another process of the run has failed, and says there why."""


def start_hosts(config: MeshConfig) -> None:
    """Joins the processes of a run over several hosts; does nothing in a run of one process.

    By `mesh.coordinator` if it is given, else as found by `jax.distributed` under Slurm, MPI and Kubernetes (an indexed
    Job). Call it before anything touches a device.

    Raises:
        InputError: the processes do not find each other.
    """
    by_hand = bool(config.coordinator)
    if not by_hand and not _launched():
        return
    try:
        if by_hand:
            jax.distributed.initialize(config.coordinator, config.processes, config.process)
        else:
            jax.distributed.initialize()
    except (RuntimeError, ValueError) as error:
        reason = first_line(error)
        raise InputError(
            f"several hosts: jax.distributed could not start ({reason}); set mesh.coordinator, mesh.processes and "
            "mesh.process, the same coordinator everywhere"
        ) from error


def _launched() -> bool:
    """Whether a launcher has started this process as one of several."""
    counts = [os.environ.get(name, "1") for name in _LAUNCHERS]
    in_indexed_job = "JOB_COMPLETION_INDEX" in os.environ and "KUBERNETES_SERVICE_HOST" in os.environ
    return in_indexed_job or any(count.isdigit() and int(count) > 1 for count in counts)


def meet(value: int = 0) -> list[int]:
    """Waits until every process of the run has come here too.

    Args:
        value: what this process tells the others, below 2^31; negative: it has failed, and meets for the last time.

    Returns:
        What each process has told, in the order of the processes; `[value]` in a run of one.

    Raises:
        OtherProcessError: another process has failed.
    """
    if jax.process_count() == 1:
        return [value]
    told = _gather(value)
    failed = [process for process, number in enumerate(told) if number < 0]
    if failed and value >= 0:
        raise OtherProcessError(f"process {failed[0]} has failed, so this one stops; its own message says why")
    return told


def are_alike(checksum: int) -> bool:
    """Whether every process of the run comes here with the same unsigned 32-bit checksum, but for its lowest bit."""
    return len(set(meet(checksum >> 1))) == 1


def _gather(value: int) -> list[int]:
    """The value of every process, once all devices of this one have it.

    `multihost_utils.process_allgather` returns with the first device's answer: a process that ends then leaves those of
    its other devices halfway, and both hosts wait for ever.
    """
    devices = np.array(jax.devices()).reshape(jax.process_count(), jax.local_device_count())
    mesh = jax.sharding.Mesh(devices, ("process", "device"))
    apart = NamedSharding(mesh, PartitionSpec("process"))
    own = jax.make_array_from_process_local_data(apart, np.array([value], np.int32))
    gathered = jax.jit(_identity, out_shardings=NamedSharding(mesh, PartitionSpec()))(own)
    told: list[int] = np.asarray(gathered.block_until_ready()).tolist()
    return told


def _identity(told: jax.Array) -> jax.Array:
    return told


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Runs the body in every process of the run; if it fails in one, no other waits for that one in vain.

    Raises:
        OtherProcessError: the body has failed in another process.
    """
    try:
        yield
    except OtherProcessError:
        raise
    except BaseException:
        meet(-1)
        raise
    meet()
