"""Which processes belong together: as launchers say it, half-said, and said wrongly."""

import http.server
import os
import socket
import threading

import pytest

from llm_jax.errors import ConfigError
from llm_jax.run.launch import FIRST_PORT, Cluster, find_cluster, first_host, listening_address
from llm_jax.run.launch_tpu import PORT, tpu_pod
from llm_jax.run.roll_call import roll_call

NO_FLAGS = (None, None, None)
SLURM = {
    "SLURM_STEP_NODELIST": "gpu[007-009]",
    "SLURM_JOB_ID": "4097",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "12",
    "SLURM_STEP_TASKS_PER_NODE": "4(x3)",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
INTEL_MPI = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
OURS = {
    "LLM_JAX_COORDINATOR": "a:1",
    "LLM_JAX_PROCESSES": "2",
    "LLM_JAX_PROCESS_ID": "1",
}


def found(environ: dict[str, str]) -> Cluster:
    cluster = find_cluster(NO_FLAGS, environ)
    assert cluster is not None
    return cluster


def test_without_a_launcher_a_process_is_on_its_own():
    assert find_cluster(NO_FLAGS, {}) is None
    assert find_cluster(NO_FLAGS, {**SLURM, "SLURM_NTASKS": "1"}) is None


def test_flags_overrule_variables_and_variables_overrule_slurm():
    by_flags = find_cluster(("b:2", 4, 3), OURS)
    assert by_flags
    assert by_flags.coordinator == "b:2"
    assert found({**SLURM, **OURS}).coordinator == "a:1"


def test_a_slurm_step_says_where_task_0_runs_and_gives_each_task_one_gpu():
    cluster = found(SLURM)
    assert cluster.coordinator == f"gpu007:{FIRST_PORT + 1}"
    assert (cluster.processes, cluster.index, cluster.local_device) == (12, 5, 1)


def test_one_slurm_task_a_host_has_all_gpus_of_it():
    assert found({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "1(x12)"}).local_device is None


def test_a_task_that_was_given_one_gpu_takes_that_one():
    assert found({**SLURM, "CUDA_VISIBLE_DEVICES": "3"}).local_device is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node1", "node1"), ("node1,node2", "node1"), ("n[01-04,9],x", "n01"), ("r[2,4]-ib", "r2-ib")],
)
def test_the_first_host_of_a_slurm_list(nodes, first):
    assert first_host(nodes) == first


def test_mpi_on_one_host_needs_nothing_else():
    cluster = found(OPEN_MPI)
    assert cluster.coordinator == f"127.0.0.1:{FIRST_PORT + os.getppid() % 4096}"
    assert (cluster.processes, cluster.index, cluster.local_device) == (2, 1, 1)


def test_mpi_on_several_hosts_needs_the_address_of_process_0_and_nothing_else():
    with pytest.raises(ConfigError, match="LLM_JAX_COORDINATOR=host:port"):
        find_cluster(NO_FLAGS, INTEL_MPI)
    cluster = found({**INTEL_MPI, "LLM_JAX_COORDINATOR": "a:1"})
    assert (cluster.coordinator, cluster.processes, cluster.index) == ("a:1", 4, 3)


@pytest.mark.parametrize(
    ("flags", "environ", "said"),
    [
        (("a:1", 2, None), {}, "--process-id must be given too"),
        ((None, 2, None), {}, "--coordinator and --process-id must be given too"),
        (("a", 2, 0), {}, "coordinator 'a' must be host:port"),
        (("a:1", 2, 2), {}, "flags: process 2 must be from 0 to 1"),
        (NO_FLAGS, {"LLM_JAX_PROCESSES": "2"}, "LLM_JAX_PROCESSES is set, so LLM_JAX_COORDINATOR"),
        (NO_FLAGS, {"LLM_JAX_COORDINATOR": "a:1"}, "LLM_JAX_PROCESSES and LLM_JAX_PROCESS_ID must"),
        (NO_FLAGS, {**OURS, "LLM_JAX_PROCESS_ID": "2"}, "LLM_JAX_PROCESS_ID=2 must be from 0 to"),
        (
            NO_FLAGS,
            {k: v for k, v in SLURM.items() if k != "SLURM_PROCID"},
            "Slurm step without SLURM_PROCID",
        ),
        (NO_FLAGS, {**SLURM, "SLURM_NTASKS": "x"}, "SLURM_NTASKS='x' must be a whole number"),
        (NO_FLAGS, {**SLURM, "SLURM_JOB_ID": "4_1"}, "SLURM_JOB_ID='4_1' must be a whole number"),
        (NO_FLAGS, {**SLURM, "SLURM_PROCID": "-1"}, "SLURM_PROCID='-1' must be a whole number"),
        (NO_FLAGS, {**SLURM, "SLURM_LOCALID": "a"}, "SLURM_LOCALID='a' must be a whole number"),
        (
            NO_FLAGS,
            {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "x"},
            "SLURM_STEP_TASKS_PER_NODE='x' must be numbers of tasks",
        ),
        (
            NO_FLAGS,
            {**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "x"},
            "OMPI_COMM_WORLD_SIZE='x' must be a whole number",
        ),
        (
            NO_FLAGS,
            {**OPEN_MPI, "OMPI_COMM_WORLD_RANK": "1.0"},
            "OMPI_COMM_WORLD_RANK='1.0' must be a whole number",
        ),
    ],
)
def test_what_is_half_said_or_wrong_is_named(flags, environ, said):
    with pytest.raises(ConfigError, match=said) as raised:
        find_cluster(flags, environ)
    assert "\n" not in str(raised.value)


def test_what_is_said_by_variables_or_slurm_overrules_the_rest_of_an_mpi():
    assert found({**OURS, "OMPI_COMM_WORLD_SIZE": "x"}).coordinator == "a:1"
    pmi2 = {"PMI_RANK": "5", "PMI_SIZE": "12"}  # as `srun --mpi=pmi2` sets them
    assert found({**SLURM, **pmi2}).source == "Slurm"


def test_a_worker_of_a_pod_without_a_number_is_one_line():
    names = {"TPU_WORKER_HOSTNAMES": "t-0.svc,t-1.svc", "TPU_WORKER_ID": "one"}
    with pytest.raises(ConfigError, match="TPU_WORKER_ID='one' must be a whole number"):
        tpu_pod(names)


def test_a_gke_pod_is_read_from_its_environment_also_with_several_slices():
    names = {"TPU_WORKER_HOSTNAMES": "t-0.svc,t-1.svc", "TPU_WORKER_ID": "1"}
    assert tpu_pod(names) == (f"t-0.svc:{PORT}", 2, 1)
    slices = {
        "MEGASCALE_NUM_SLICES": "3",
        "MEGASCALE_SLICE_ID": "2",
        "MEGASCALE_COORDINATOR_ADDRESS": "s0:81",
    }
    assert tpu_pod({**names, **slices}) == (f"s0:{PORT}", 6, 5)


class Metadata(http.server.BaseHTTPRequestHandler):
    """Answers as the metadata server of a TPU VM does."""

    attributes = {  # noqa: RUF012
        "agent-worker-number": "2",
        "worker-network-endpoints": "w:0:10.0.0.1,w:1:10.0.0.2,w:2:10.0.0.3,w:3:10.0.0.4",
        "tpu-env": "ACCELERATOR_TYPE: 'v5p-32'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n",
    }

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        known = name in self.attributes and self.headers["Metadata-Flavor"] == "Google"
        self.send_response(200 if known else 404)
        self.end_headers()
        self.wfile.write(self.attributes.get(name, "").encode())

    def log_message(self, format: str, *_: object) -> None:
        """Silent."""


def test_a_gcloud_pod_is_read_from_the_metadata_server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        where = {"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}"}
        assert tpu_pod(where) == (f"10.0.0.1:{PORT}", 8, 6)
        assert tpu_pod({**where, "TPU_SKIP_MDS_QUERY": "1"}) is None
        server.shutdown()


def test_a_machine_without_a_metadata_server_is_no_pod():
    assert tpu_pod({"GCE_METADATA_IP": f"127.0.0.1:{free_port()}"}) is None


@pytest.mark.parametrize(
    ("coordinator", "resolved", "listens"),
    [
        ("gpu007:61441", "10.0.0.7", "gpu007:61441"),
        ("gpu007:61441", "127.0.1.1", "0.0.0.0:61441"),  # Debian, of its own name
        ("127.0.0.1:5", "127.0.0.1", "127.0.0.1:5"),
        ("localhost:5", "127.0.0.1", "localhost:5"),
    ],
)
def test_process_0_listens_on_its_own_address_if_others_can_reach_that(
    coordinator, resolved, listens
):
    assert listening_address(coordinator, lambda _: resolved) == listens


# ---- the roll call -------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def call(told: list[tuple[int, int]], seconds: float = 2.0, stranger: bool = False) -> list[str]:
    """What each process (number, how many it was told of) hears: its hosts, or the error."""
    where = f"127.0.0.1:{free_port()}"
    heard = [""] * len(told)

    def one(place: int, number: int, count: int) -> None:
        try:
            heard[place] = ",".join(roll_call(where, count, number, seconds))
        except ConfigError as error:
            heard[place] = str(error)

    threads = [
        threading.Thread(target=one, args=(place, *who), daemon=True)
        for place, who in enumerate(told)
    ]
    for thread in threads:
        thread.start()
    if stranger:
        host, _, port = where.rpartition(":")
        while True:
            try:
                with socket.create_connection((host, int(port))) as connection:
                    connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
                break
            except ConnectionRefusedError:
                continue
    for thread in threads:
        thread.join()
    return heard


def test_when_all_are_there_everyone_hears_their_hosts():
    here = socket.gethostname()
    assert call([(2, 3), (0, 3), (1, 3)], seconds=20) == [f"{here},{here},{here}"] * 3


def test_a_missing_process_is_named_to_all_that_are_there():
    for told in call([(0, 4), (2, 4)]):
        assert "process 1, 3 of 4 did not come within 2 s (there: 0 on " in told


def test_a_missing_process_0_is_named_with_its_address():
    (told,) = call([(1, 2)], seconds=0.5)
    assert told.startswith("process 0 did not answer at 127.0.0.1:")


def test_one_started_twice_and_one_told_of_another_number_are_named():
    heard = call([(0, 3), (1, 3), (1, 3)])
    assert "process 1 was started twice" in heard[0]
    heard = call([(0, 3), (1, 2)])
    assert "told of 2 processes, process 0 of 3" in heard[0]


def test_a_stranger_at_the_port_does_not_count():
    here = socket.gethostname()
    assert call([(0, 2)], seconds=1.5, stranger=True)[0].startswith("process 1 of 2 did not come")
    assert call([(0, 2), (1, 2)], seconds=20) == [f"{here},{here}"] * 2


def test_a_coordinator_address_of_another_machine_is_refused_by_process_0():
    with pytest.raises(ConfigError, match=r"process 0 cannot listen at 192\.0\.2\.1:1"):
        roll_call("192.0.2.1:1", 2, 0, 1.0)
