"""The templates under tools/launch parse, and name only commands, configs, files and variables that exist.

None of them was run where it belongs: that needs a cluster.
"""

import re
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


def test_the_image_copies_only_what_is_there():
    text = (LAUNCH / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source
    entry = re.search(r'^ENTRYPOINT \["llm-jax"\]\nCMD \["(\w+)"\]', text, re.MULTILINE)
    assert entry
    assert entry[1] in VERBS
