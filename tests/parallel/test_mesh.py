"""The mesh over devices and processes, and when and how processes are joined."""

import dataclasses
from typing import Any

import jax
import pytest

from efx_jax.config import MeshConfig
from efx_jax.errors import InputError
from efx_jax.parallel.hosts import start_hosts
from efx_jax.parallel.mesh import AXES, active_mesh, make_mesh, mesh_size

SLURM = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2"}
FOUR_GPUS = {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}
# What the launcher says, and what jax is asked for besides what it finds by itself.
LAUNCHED: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "Slurm, several on a host": (
        {**SLURM, **FOUR_GPUS, "SLURM_STEP_NUM_TASKS": "8"},
        {"local_device_ids": None, "cluster_detection_method": None},
    ),
    "Slurm, one on each host": (
        SLURM | FOUR_GPUS,
        {"local_device_ids": [0, 1, 2, 3], "cluster_detection_method": None},
    ),
    "Slurm, that gives each its GPU": (
        {**SLURM, "SLURM_STEP_NUM_TASKS": "8", "CUDA_VISIBLE_DEVICES": "3"},
        {"local_device_ids": [0], "cluster_detection_method": None},
    ),
    "Slurm, and the user says which": (
        {**SLURM, **FOUR_GPUS, "JAX_LOCAL_DEVICE_IDS": "2,3"},
        {"local_device_ids": None, "cluster_detection_method": None},
    ),
    "Slurm on hosts without GPUs": (
        SLURM | {"CUDA_VISIBLE_DEVICES": ""},
        {"local_device_ids": None, "cluster_detection_method": None},
    ),
    "Open MPI 4": (
        {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_MCA_orte_hnp_uri": "0", **FOUR_GPUS},
        {"local_device_ids": [0, 1, 2, 3], "cluster_detection_method": None},
    ),
    "Open MPI 5": (
        {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2", **FOUR_GPUS},
        {"local_device_ids": None, "cluster_detection_method": "mpi4py"},
    ),
    "MPICH": (
        {"PMI_SIZE": "16", "MPI_LOCALNRANKS": "4", **FOUR_GPUS},
        {"local_device_ids": None, "cluster_detection_method": "mpi4py"},
    ),
    "Kubernetes": ({"JOB_COMPLETION_INDEX": "0", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}, {}),
}
ALONE: dict[str, dict[str, str]] = {
    "no launcher": {},
    "Slurm with one task": {"SLURM_STEP_NUM_TASKS": "1", "SLURM_JOB_ID": "7"},
    "a batch script of Slurm, outside srun": {"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"},
    "MPI with one process": {"OMPI_COMM_WORLD_SIZE": "1"},
    "a pod that belongs to no indexed job": {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
    "an index without a cluster": {"JOB_COMPLETION_INDEX": "0"},
    "a count that is none": {"PMI_SIZE": "many"},
}


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    """What `make_mesh` asks of a device."""

    id: int
    process_index: int
    platform: str = "gpu"
    device_kind: str = "H100"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Arguments of every call of `jax.distributed.initialize`, in an environment without a launcher or GPUs."""
    found: list[tuple[Any, ...]] = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *places, **names: found.append((places, names)))
    for variables in (*(variables for variables, _ in LAUNCHED.values()), *ALONE.values()):
        for name in variables:
            monkeypatch.delenv(name, raising=False)
    return found


@pytest.mark.parametrize("launcher", LAUNCHED)
def test_a_launcher_of_several_processes_is_recognised(
    launcher: str, calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    variables, asked = LAUNCHED[launcher]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    start_hosts(MeshConfig())
    assert calls == [((), asked)]


@pytest.mark.parametrize("case", ALONE)
def test_one_process_joins_nothing(case: str, calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ALONE[case].items():
        monkeypatch.setenv(name, value)
    start_hosts(MeshConfig(data=2))
    assert calls == []


def test_flags_go_before_what_a_launcher_says(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    start_hosts(MeshConfig(coordinator="10.0.0.1:1234", processes=2, process=1))
    assert calls == [(("10.0.0.1:1234", 2, 1), {"cluster_detection_method": "deactivate"})]


@pytest.mark.parametrize("error", [RuntimeError("refused\nby 10.0.0.1"), ValueError("")])
def test_processes_that_do_not_find_each_other_are_told_in_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, cluster_detection_method: str) -> None:
        raise error

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(InputError, match=r"several hosts: .*(refused|ValueError).* set mesh.coordinator") as caught:
        start_hosts(MeshConfig(coordinator="10.0.0.1:1234", processes=2, process=1))
    assert "\n" not in str(caught.value)


def test_the_mesh_has_its_axes_in_order_over_the_first_devices() -> None:
    config = MeshConfig(data=1, fsdp=3, tensor=2)
    mesh = make_mesh(config)
    assert mesh.axis_names == AXES and dict(mesh.shape) == {"data": 1, "fsdp": 3, "tensor": 2}
    assert set(mesh.devices.flat) == set(jax.devices()[:6]) and mesh_size(config) == 6
    # Neighbours along `tensor`, which talk most, are neighbours on the machine.
    assert [device.id for device in mesh.devices[0, 0]] == [0, 1]


def test_too_few_devices_are_told_in_one_line() -> None:
    with pytest.raises(InputError, match=r"data 3 x fsdp 2 x tensor 2 needs 12 devices, found 8 of cpu; .*") as caught:
        make_mesh(MeshConfig(3, 2, 2))
    assert "\n" not in str(caught.value) and "JAX_NUM_CPU_DEVICES=12" in str(caught.value)
    gpus: Any = [FakeDevice(0, 0)]
    with pytest.raises(InputError, match="needs 2 devices, found 1 of H100; lower one of them$"):
        make_mesh(MeshConfig(data=2), gpus)


def test_a_process_without_devices_is_refused() -> None:
    devices: Any = [FakeDevice(number, number // 4) for number in range(8)]
    with pytest.raises(InputError, match="4 of 8 devices leave process 1 without any"):
        make_mesh(MeshConfig(fsdp=4), devices)


def test_only_our_mesh_of_several_devices_is_active() -> None:
    assert active_mesh() is None
    with jax.set_mesh(make_mesh(MeshConfig())):
        assert active_mesh() is None
    with jax.set_mesh(jax.make_mesh((2,), ("users",), axis_types=(jax.sharding.AxisType.Auto,))):
        assert active_mesh() is None
    with jax.set_mesh(make_mesh(MeshConfig(tensor=2))):
        found = active_mesh()
        assert found is not None and dict(found.shape) == {"data": 1, "fsdp": 1, "tensor": 2}
