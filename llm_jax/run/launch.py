"""Who takes part in a run of several processes: read from flags, variables, Slurm, MPI or a TPU pod.

The first of these that says something decides, so that a wrong guess can always be overruled:

    1 flags          --coordinator host:port --processes N --process-id I
    2 variables      LLM_JAX_COORDINATOR, LLM_JAX_PROCESSES, LLM_JAX_PROCESS_ID
    3 Slurm          a step of several tasks: `srun llm-jax ...`
    4 MPI            Open MPI, MPICH or Intel MPI: `mpirun llm-jax ...`
    5 a TPU VM       alone, one of a pod, or one of several slices

Then, on every process: a roll call that names who is missing, and `jax.distributed.initialize` with the
coordinator bound to its own address.
"""

import argparse
import logging
import os
import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax

from llm_jax.errors import ConfigError
from llm_jax.run import cli
from llm_jax.run.launch_tpu import number_in, tpu_pod
from llm_jax.run.roll_call import roll_call

log = logging.getLogger(__name__)

# when a process dies the others end as well: after this long, in place of 100 and 300 seconds
HEARTBEAT_SECONDS = 15
SHUTDOWN_SECONDS = 30
JOIN_SECONDS = 300
# above this, ports are nobody's; jobs that share a host rarely meet among 4,096 of them
FIRST_PORT, PORTS = 61440, 4096
TPU_DEVICES = ("/dev/accel0", "/dev/vfio/0")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The processes of one run, as this one of them sees it."""

    source: str  # what said so
    coordinator: str  # host:port of process 0, where the others find it
    processes: int
    index: int  # of this process
    local_device: int | None = None  # the one device that is this process's; None: all of its host

    def __post_init__(self) -> None:
        host, colon, port = self.coordinator.rpartition(":")
        if not (host and colon and port.isdecimal() and 0 < int(port) < 65536):
            raise ConfigError(
                f"{self.source}: coordinator {self.coordinator!r} must be host:port of process 0"
            )
        if not 0 <= self.index < self.processes:
            raise ConfigError(
                f"{self.source}={self.index} must be from 0 to LLM_JAX_PROCESSES - 1 = {self.processes - 1}"
                if self.source == PROCESS_ID
                else f"{self.source}: process {self.index} must be from 0 to {self.processes - 1}"
            )


COORDINATOR, PROCESSES, PROCESS_ID = (
    "LLM_JAX_COORDINATOR",
    "LLM_JAX_PROCESSES",
    "LLM_JAX_PROCESS_ID",
)
FLAGS = ("--coordinator", "--processes", "--process-id")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The three flags of a process of many, and how long to wait for the others."""
    group = parser.add_argument_group("several processes, where they do not find each other")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 is")
    group.add_argument("--processes", type=int, metavar="N", help="how many there are")
    group.add_argument("--process-id", type=int, metavar="I", help="which of them this is, from 0")
    group.add_argument(
        "--join-seconds",
        type=cli.some_seconds,
        default=JOIN_SECONDS,
        help="how long to wait for all of them (default: %(default)s)",
    )


def find_cluster(
    flags: tuple[str | None, int | None, int | None] = (None, None, None),
    environ: Mapping[str, str] = os.environ,
) -> Cluster | None:
    """The processes that belong together; None for a process of its own.

    Raises:
      ConfigError: only a part is said, or it makes no sense.
    """
    if any(flag is not None for flag in flags):
        missing = [name for name, flag in zip(FLAGS, flags, strict=True) if flag is None]
        coordinator, processes, index = flags
        if coordinator is None or processes is None or index is None:
            raise ConfigError(f"{' and '.join(missing)} must be given too, or none of {FLAGS}")
        return Cluster(source="flags", coordinator=coordinator, processes=processes, index=index)
    if PROCESSES in environ or PROCESS_ID in environ:
        return _variables(environ)
    if COORDINATOR in environ and not _mpi(environ):
        return _variables(environ)
    # not before Slurm: `srun --mpi=pmi2` sets a part of what an MPI sets
    return _slurm(environ) or _mpi(environ) or _tpu(environ)


def _variables(environ: Mapping[str, str]) -> Cluster:
    if COORDINATOR not in environ:
        found = PROCESSES if PROCESSES in environ else PROCESS_ID
        raise ConfigError(f"{found} is set, so {COORDINATOR}=host:port must be set too")
    try:
        count, index = int(environ[PROCESSES]), int(environ[PROCESS_ID])
    except (KeyError, ValueError):
        raise ConfigError(
            f"{COORDINATOR} is set, so {PROCESSES} and {PROCESS_ID} must be set to numbers"
        ) from None
    return Cluster(
        source=PROCESS_ID, coordinator=environ[COORDINATOR], processes=count, index=index
    )


def _slurm(environ: Mapping[str, str]) -> Cluster | None:
    names = ("SLURM_STEP_NODELIST", "SLURM_JOB_ID", "SLURM_PROCID", "SLURM_LOCALID")
    tasks = "SLURM_STEP_NUM_TASKS" if environ.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS"
    count = number_in(environ, tasks, 1)
    if count == 1 or names[0] not in environ:
        return None  # a batch script outside `srun` is one process
    missing = [name for name in names if name not in environ]
    if missing:
        raise ConfigError(f"Slurm step without {', '.join(missing)}; start it by `srun`")
    each = environ.get("SLURM_STEP_TASKS_PER_NODE", environ.get("SLURM_TASKS_PER_NODE", "1"))
    here = max((int(number) for number in re.findall(r"(?:^|,)(\d+)", each)), default=0)
    if not here:
        raise ConfigError(
            f"SLURM_STEP_TASKS_PER_NODE={each!r} must be numbers of tasks as in 2(x3),1; start it by `srun`"
        )
    port = FIRST_PORT + number_in(environ, "SLURM_JOB_ID") % PORTS
    return Cluster(
        source="Slurm",
        coordinator=f"{first_host(environ['SLURM_STEP_NODELIST'])}:{port}",
        processes=count,
        index=number_in(environ, "SLURM_PROCID"),
        local_device=_own_device(here, "SLURM_LOCALID", environ),
    )


def first_host(nodes: str) -> str:
    """`gpu[007-009,12],login` -> `gpu007`: the first of a Slurm node list, where task 0 runs."""
    found = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodes)
    if not found:
        raise ConfigError(f"SLURM_STEP_NODELIST={nodes!r} is no list of hosts")
    return "".join(part or "" for part in found.groups())


# rank, how many, rank on this host, how many on this host
MPI = (
    (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)


def _mpi(environ: Mapping[str, str]) -> Cluster | None:
    for rank, size, local_rank, local_size in MPI:
        count, here = number_in(environ, size, 1), number_in(environ, local_size, 0)
        if count == 1 or rank not in environ:
            continue
        if COORDINATOR not in environ and here != count:
            raise ConfigError(
                f"MPI started {count} processes on several hosts; say where process 0 is by "
                f"{COORDINATOR}=host:port, as in `mpirun -x {COORDINATOR}=$(hostname):61440`"
            )
        # all on one host have the same parent, mpirun's own daemon there
        port = FIRST_PORT + os.getppid() % PORTS
        return Cluster(
            source="MPI",
            coordinator=environ.get(COORDINATOR, f"127.0.0.1:{port}"),
            processes=count,
            index=number_in(environ, rank),
            local_device=_own_device(here, local_rank, environ),
        )
    return None


def _own_device(here: int, local: str, environ: Mapping[str, str]) -> int | None:
    """With several processes on a host each takes one GPU, unless the launcher already gave it one."""
    visible = environ.get("CUDA_VISIBLE_DEVICES", environ.get("ROCR_VISIBLE_DEVICES", ""))
    return None if here < 2 or (visible and "," not in visible) else number_in(environ, local)


def _tpu(environ: Mapping[str, str]) -> Cluster | None:
    if not any(Path(device).exists() for device in TPU_DEVICES):
        return None
    pod = tpu_pod(environ)  # None: TPUs that are no cluster, such as a container's
    if pod is None:
        return None
    coordinator, processes, index = pod
    return Cluster(source="TPU metadata", coordinator=coordinator, processes=processes, index=index)


def listening_address(
    coordinator: str, resolve: Callable[[str], str] = socket.gethostbyname
) -> str:
    """Where process 0 listens: the coordinator's own address, if that is one that others can reach.

    Debian's /etc/hosts gives a machine's own name the address 127.0.1.1; others find it elsewhere.
    """
    host, _, port = coordinator.rpartition(":")
    if host == "localhost" or host.startswith("127."):
        return coordinator
    try:
        found = resolve(host)
    except OSError:
        return coordinator  # the roll call tells, with the address
    if not found.startswith("127."):
        return coordinator
    log.warning("%s is %s on this host, so the coordinator listens on every interface", host, found)
    return f"0.0.0.0:{port}"


def start_processes(cluster: Cluster | None, join_seconds: float = JOIN_SECONDS) -> list[str]:
    """Waits for all processes of the run and joins them: their hosts. Alone without a cluster, nothing.

    A TPU VM alone joins too: without it a preemption notice would reach nobody.

    Raises:
      ConfigError: a process is missing, and which; or there are some that did not join.
    """
    if cluster:
        # of process 0: by default the coordinator listens on every interface, without authentication
        where = cluster.coordinator if cluster.index else listening_address(cluster.coordinator)
        hosts = roll_call(where, cluster.processes, cluster.index, join_seconds)
        local = cluster.local_device
        jax.distributed.initialize(
            cluster.coordinator,
            cluster.processes,
            cluster.index,
            local_device_ids=local,
            # what it would detect by itself was decided above; under Slurm it takes one GPU of many
            cluster_detection_method="deactivate",
            coordinator_bind_address=where if cluster.index == 0 else None,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
        return hosts
    if jax.process_count() > 1:
        raise ConfigError(
            f"{jax.process_count()} processes compute together but did not join; set {COORDINATOR}=host:port, "
            f"{PROCESSES} and {PROCESS_ID} on each of them"
        )
    return [socket.gethostname()]
