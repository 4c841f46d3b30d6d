"""The processes of a run over several hosts: how they find and wait for each other."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from efx_jax.config import MeshConfig
from efx_jax.errors import InputError, first_line

# Variables that say how many processes a launcher has started: Slurm, Open MPI, and MPICH or Intel MPI.
_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


class OtherProcessError(InputError):
    """Another process of the run has failed; its own output says why."""


def start_hosts(config: MeshConfig) -> None:
    """Joins the processes of a run over several hosts; does nothing in a run of one process.

    Uses `mesh.coordinator` if it is set, else what `jax.distributed` detects under Slurm, MPI and Kubernetes (an
    indexed Job). A process that is alone on its host, or was given one GPU, uses all that it sees; if a host runs
    several, each uses the GPU of its local rank. Call it before anything touches a device.

    Raises:
        InputError: the processes cannot find each other.
    """
    try:
        if config.coordinator:
            # No detection: under a launcher jax would give this process only the GPU of its local rank.
            jax.distributed.initialize(
                config.coordinator, config.processes, config.process, cluster_detection_method="deactivate"
            )
        elif _in_indexed_job():
            jax.distributed.initialize()
        elif (launcher := _launcher()) is not None:
            # Only Open MPI before 5 sets this variable, by which alone jax 0.10 recognizes Open MPI.
            is_known = launcher == "SLURM_STEP_NUM_TASKS" or "OMPI_MCA_orte_hnp_uri" in os.environ
            method = None if is_known else "mpi4py"
            jax.distributed.initialize(local_device_ids=_own_gpus(), cluster_detection_method=method)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"several hosts: jax.distributed could not start ({first_line(error)}); it needs the package mpi4py under "
            "MPICH, Intel MPI and Open MPI 5, and kubernetes under Kubernetes; or set mesh.coordinator, mesh.processes "
            "and mesh.process, the same coordinator everywhere"
        ) from error


def _in_indexed_job() -> bool:
    """Whether this is a pod of a Kubernetes indexed Job."""
    return "JOB_COMPLETION_INDEX" in os.environ and "KUBERNETES_SERVICE_HOST" in os.environ


def _launcher() -> str | None:
    """The variable by which a launcher says that this process is one of several; None without one."""
    counts = {name: os.environ.get(name, "1") for name in _COUNTS}
    return next((name for name, count in counts.items() if count.isdigit() and int(count) > 1), None)


def _own_gpus() -> list[int] | None:
    """Indices of this process's GPUs among those that it sees; None: left to jax, which takes one by local rank."""
    if "JAX_LOCAL_DEVICE_IDS" in os.environ:
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = Path("/dev").glob("nvidia[0-9]*") if visible is None else filter(None, visible.split(","))
    count = len(list(devices))
    is_alone = 1 in (_count("OMPI_COMM_WORLD_LOCAL_SIZE"), _count("MPI_LOCALNRANKS"))
    is_alone |= _count("SLURM_STEP_NUM_TASKS") == _count("SLURM_STEP_NUM_NODES") > 0
    return list(range(count)) if count and (is_alone or count == 1) else None


def _count(name: str) -> int:
    """The number in a launcher's variable, 0 if it is not set."""
    value = os.environ.get(name, "")
    return int(value) if value.isdigit() else 0


def meet(value: int = 0) -> list[int]:
    """Waits until every process of the run has called it too.

    Args:
        value: what this process tells the others, below 2^31; negative: it has failed, and this is its last call.

    Returns:
        What each process told, in process order; `[value]` in a run of one.

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
    """Whether every process of the run calls this with the same unsigned 32-bit checksum, ignoring its lowest bit."""
    return len(set(meet(checksum >> 1))) == 1


def _gather(value: int) -> list[int]:
    """The value of every process, once all devices of this one have it.

    `multihost_utils.process_allgather` returns with the first device's answer: a process that then exits leaves its
    other devices' transfers unfinished, and both hosts wait forever.
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
    """Runs the body in every process of the run; if it fails in one, the others stop instead of waiting for it.

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
