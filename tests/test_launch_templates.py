"""The templates under tools/launch parse, and name only commands, configs, files and variables that exist.

None of them was run where it belongs: that needs a cluster.
"""

import os
import re
import signal
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from llm_jax.run.cli import VERBS
from llm_jax.run.launch import COORDINATOR, PROCESS_ID, PROCESSES

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "tools" / "launch"
TEMPLATES = sorted(LAUNCH.iterdir())


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_a_template_names_only_what_exists(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 90
    verbs = set(re.findall(r"llm-jax (?:-- )?([a-z-]+) (?!--command)", text)) - {"create"}
    assert verbs <= VERBS.keys() | {"supervise"}, verbs
    for config in re.findall(r"configs/\w+\.py", text):
        assert (ROOT / config).is_file()
    assert set(re.findall(r"LLM_JAX_[A-Z_]+", text)) <= {COORDINATOR, PROCESSES, PROCESS_ID}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert set(re.findall(r"'\.\[(\w+)\]'|EXTRA=(\w+)", text)) <= {
        pair for extra in extras for pair in ((extra, ""), ("", extra))
    }


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.sh")), ids=lambda path: path.name)
def test_a_script_is_bash_and_stops_at_the_first_error(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert "set -euo pipefail" in path.read_text()


def test_the_scripts_inside_the_skypilot_task_are_bash():
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert task["num_nodes"] >= 1
    for part in ("setup", "run"):
        subprocess.run(["bash", "-n"], input=task[part], text=True, check=True)


def test_the_kubernetes_job_and_its_service_fit_together():
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    spec = job["spec"]
    pod = spec["template"]["spec"]
    environment = {e["name"]: e.get("value") for e in pod["containers"][0]["env"]}
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    name, subdomain = job["metadata"]["name"], pod["subdomain"]
    assert environment[COORDINATOR].split(":")[0] == f"{name}-0.{subdomain}"
    assert int(environment[PROCESSES]) == spec["completions"] == spec["parallelism"]
    assert environment.keys() == {COORDINATOR, PROCESSES, PROCESS_ID}
    mounts = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    assert pod["containers"][0]["args"][0] in VERBS


def test_a_pod_that_was_drained_is_started_again_and_not_counted_as_a_failure():
    _, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    rule = {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]}
    assert job["spec"]["podFailurePolicy"]["rules"] == [rule]
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"  # such a policy needs it


def test_slurm_gives_a_step_all_cores_of_the_task():
    text = (LAUNCH / "slurm.sh").read_text()
    wanted = "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK"
    assert text.index("#SBATCH --cpus-per-task") < text.index(wanted) < text.index("srun llm-jax")


GCLOUD = """#!/usr/bin/env bash
# a worker whose home is a folder here: what follows --command runs there, what is copied must find its folder
set -euo pipefail
cd "$HOME"
if [ "$4" = ssh ]; then exec bash -c "${@: -1}"; fi
target=${*: -1}
[ -d "$HOME/${target#*:\\~/}" ]
"""
PYTHON = """#!/usr/bin/env bash
mkdir -p .venv/bin
ln -s "$(type -P true)" .venv/bin/pip
printf '#!/usr/bin/env bash\\ncase $1 in supervise) echo $$ > new; mv new pid; exec sleep 1000;; esac\\n' > .venv/bin/llm-jax
chmod +x .venv/bin/llm-jax
"""


def test_a_tpu_worker_goes_on_when_the_connection_ends(tmp_path):
    """The pipe of the outputs closes when nothing that was started there holds it any more, as ssh waits for."""
    programs, home = tmp_path / "bin", tmp_path / "home"
    programs.mkdir()
    home.mkdir()
    for name, text in (("gcloud", GCLOUD), ("python3", PYTHON)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    environ = {**os.environ, "HOME": str(home), "TPU": "my-pod", "ZONE": "here"}
    environ["PATH"] = f"{programs}:{environ['PATH']}"
    command = ["bash", str(LAUNCH / "tpu_gcloud.sh"), "configs/pretrain_7b_tpu.py", "--run", "a b"]
    try:
        done = subprocess.run(command, env=environ, capture_output=True, timeout=60)
        assert done.returncode == 0, done.stderr
    finally:
        while not (home / "llm-jax" / "pid").exists():
            assert (home / "llm-jax" / "run.log").exists()
        os.kill(int((home / "llm-jax" / "pid").read_text()), signal.SIGTERM)


def test_the_image_copies_only_what_is_there():
    text = (LAUNCH / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source
    entry = re.search(r'^ENTRYPOINT \["llm-jax"\]\nCMD \["(\w+)"\]', text, re.MULTILINE)
    assert entry
    assert entry[1] in VERBS
