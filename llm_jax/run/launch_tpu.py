"""The hosts of a TPU pod, from its environment (GKE, xpk) or the metadata server of the VM (gcloud).

Both name the workers of a slice in the order of their numbers; several slices add a coordinator, a
count and a number of their own (`MEGASCALE_...`). Fields as JAX's own cloud_tpu_cluster reads them.
"""

import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import NamedTuple

from llm_jax.errors import ConfigError

PORT = 8482  # the port that JAX uses on TPU pods; firewalls of pods are made for it
SECONDS = 5  # the metadata server answers in milliseconds, or is not there


class Pod(NamedTuple):
    """What `launch.Cluster` needs."""

    coordinator: str
    processes: int
    process: int


def tpu_pod(environ: Mapping[str, str]) -> Pod | None:
    """The pod that this TPU VM belongs to; None where nothing says so."""
    names = environ.get("TPU_PROCESS_ADDRESSES", environ.get("TPU_WORKER_HOSTNAMES"))
    number = environ.get("TPU_WORKER_ID")
    facts: Mapping[str, str] = environ
    if not names or number is None or " " in names:  # libtpu may put a sentence there
        if "TPU_SKIP_MDS_QUERY" in environ:
            return None
        server = environ.get("GCE_METADATA_IP", "metadata.google.internal")
        number, names = _attribute(server, "agent-worker-number"), ""
        if number is None:
            return None
        names = _attribute(server, "worker-network-endpoints") or ""
        facts = _pairs(_attribute(server, "tpu-env") or "")
    workers = [_address(worker) for worker in names.split(",")]
    slices, this = (
        number_in(facts, "MEGASCALE_NUM_SLICES", 1),
        number_in(facts, "MEGASCALE_SLICE_ID"),
    )
    worker = number_in({"TPU_WORKER_ID": number}, "TPU_WORKER_ID")
    first = facts.get("MEGASCALE_COORDINATOR_ADDRESS") or workers[0]
    host = first.split(":")[0]
    return Pod(f"{host}:{PORT}", slices * len(workers), this * len(workers) + worker)


def number_in(facts: Mapping[str, str], name: str, default: int = 0) -> int:
    """What a launcher says. Raises ConfigError naming the variable if that is no number."""
    text = facts.get(name) or str(default)
    if not (text.isascii() and text.isdecimal()):
        raise ConfigError(
            f"{name}={text!r} must be a whole number, as its launcher sets it; unset it, or say by --coordinator, "
            "--processes and --process-id who takes part"
        )
    return int(text)


def _address(worker: str) -> str:
    """`host`, `host:port`, or the older `name:id:ip`."""
    parts = worker.strip().split(":")
    return parts[2] if len(parts) == 3 else parts[0]


def _attribute(server: str, name: str) -> str | None:
    request = urllib.request.Request(
        f"http://{server}/computeMetadata/v1/instance/attributes/{name}",
        headers={"Metadata-Flavor": "Google"},
    )
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            return answer.read().decode()
    except (urllib.error.URLError, OSError):
        return None


def _pairs(text: str) -> dict[str, str]:
    """Lines like `MEGASCALE_NUM_SLICES: '2'`."""
    lines = (line.partition(":") for line in text.splitlines() if ":" in line)
    return {name.strip(): value.strip().strip("'") for name, _, value in lines}
