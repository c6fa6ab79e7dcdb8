"""Every launcher says what it is for and what it would do; its shell and its YAML hold what their readers expect."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from e2p_jax.errors import RESTART
from e2p_jax.plan.topology import NO_MACHINE

HERE = Path(__file__).parent
LAUNCH = HERE.parent.parent / "launch"
SCRIPTS = ["run.sh", "local.sh", "slurm.sbatch", "tpu_pod.sh"]
SCHEMAS = json.loads((HERE / "schemas.json").read_text())
PYTHON_BIN = Path(sys.executable).parent


def call(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(LAUNCH / script), *arguments]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**kept, **environment})


def test_shell_is_clean() -> None:
    shellcheck = shutil.which("shellcheck", path=f"{PYTHON_BIN}{os.pathsep}{os.environ['PATH']}")
    assert shellcheck is not None, "pip install -e '.[test]' installs it"
    scripts = [*(LAUNCH / name for name in SCRIPTS), *HERE.glob("*.sh")]
    done = subprocess.run([shellcheck, *scripts], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script: str) -> None:
    done = call(script, "--help")
    assert done.returncode == 0 and done.stderr == ""
    assert f"launch/{script}" in done.stdout and "--dry-run" in done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_everything_is_in_the_launch_folder_or_named_in_the_documentation(script: str) -> None:
    assert f"launch/{script}" in (LAUNCH.parent / "docs" / "launch.md").read_text()


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        ("run.sh", ["train"], "unknown argument train"),
        ("run.sh", ["--restarts", "many"], "--restarts needs a number"),
        ("run.sh", ["--dry-run"], "nothing to run"),
        ("run.sh", ["--processes", "0", "--", "train"], "--processes must be positive"),
        ("local.sh", ["--dry-run"], "usage: launch/local.sh N"),
        ("slurm.sbatch", ["--", "train"], "submit it: sbatch"),
        ("slurm.sbatch", ["--dry-run"], "nothing to run"),
        ("tpu_pod.sh", ["start"], "give create, run, logs or delete"),
        ("tpu_pod.sh", ["create", "--name", "n", "--dry-run"], "--name and --zone are needed"),
        ("tpu_pod.sh", ["create", "--name", "n", "--zone", "z", "--dry-run"], "--accelerator and --runtime"),
        ("tpu_pod.sh", ["run", "--name", "n", "--zone", "z", "--dry-run"], "nothing to run"),
    ],
    ids=str,
)
def test_usage_errors(script: str, arguments: list[str], words: str) -> None:
    done = call(script, *arguments)
    assert done.returncode == 2 and words in done.stderr and done.stdout == ""


def test_a_missing_program_is_named() -> None:
    done = call("run.sh", "--", "train", "quickstart", E2P="no-such-e2p")
    assert done.returncode == 2 and "no-such-e2p not found; pip install" in done.stderr


def test_dry_run_of_local_starts_what_run_does() -> None:
    done = call("local.sh", "2", "--restarts", "3", "--dry-run", "--", "train", "a b", E2P="e2p")
    place = "JAX_COORDINATOR_ADDRESS=127.0.0.1:PORT JAX_NUM_PROCESSES=2 JAX_PROCESS_ID={0} JAX_LOCAL_DEVICE_IDS={0} "
    lines = [place.format(i) + r"e2p train a\ b " for i in range(2)]
    assert done.stdout.splitlines()[2:] == [*lines, "# again after 75 or a signal, up to 3 times"]


def flags_of(platform: str, **environment: str) -> dict[str, list[str]]:
    """What run.sh tells XLA on a platform, by variable."""
    said = call("run.sh", "--dry-run", "--", "train", JAX_PLATFORMS=platform, **environment).stdout.splitlines()[:2]
    pairs = (line.removeprefix("# ").split("=", 1) for line in said)
    return {name: words.split() for name, words in pairs}


def test_each_platform_gets_its_own_flags_and_what_was_set_prevails() -> None:
    """XLA takes the last word, and ends at a flag that it does not know: NVIDIA's are for NVIDIA alone."""
    ours = "--xla_gpu_enable_while_loop_double_buffering="
    given = {"XLA_FLAGS": f"{ours}false", "LIBTPU_INIT_ARGS": "--xla_tpu_overlap_compute_collective_tc=false"}
    for platform in ("cpu", "tpu"):
        assert flags_of(platform, **given)["XLA_FLAGS"] == [given["XLA_FLAGS"]]
    card = flags_of("cuda", **given)
    assert f"{ours}true" in card["XLA_FLAGS"] and card["XLA_FLAGS"][-1] == f"{ours}false"
    assert "--xla_enable_async_all_gather=true" in card["LIBTPU_INIT_ARGS"]
    assert card["LIBTPU_INIT_ARGS"][-1] == given["LIBTPU_INIT_ARGS"]


DESCRIBE = "from jax.experimental import topologies as t; t.get_topology_desc('v5e:2x2', 'tpu')"


@pytest.mark.parametrize("variable", ["XLA_FLAGS", "LIBTPU_INIT_ARGS"])
def test_the_installed_compilers_know_the_flags(variable: str) -> None:
    if variable == "LIBTPU_INIT_ARGS" and find_spec("libtpu") is None:
        pytest.skip("libtpu is absent: pip install 'e2p-jax[tpu]'")
    flags = flags_of("cuda", XLA_FLAGS="", LIBTPU_INIT_ARGS="")[variable]
    program = "import jax; jax.devices('cpu')" if variable == "XLA_FLAGS" else DESCRIBE
    for more, known in ([], True), (["--xla_no_such_flag=1"], False):
        environment = {**os.environ, **NO_MACHINE, "JAX_PLATFORMS": "cpu", variable: " ".join([*flags, *more])}
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=False)
        assert (done.returncode == 0) == known, done.stderr


def test_dry_run_of_slurm() -> None:
    done = call("slurm.sbatch", "--restarts", "5", "--dry-run", "--", "train", "x", SLURM_SUBMIT_DIR="/checkout")
    hosts, start, again = done.stdout.splitlines()
    assert hosts.startswith("E2P_HOSTS=$(srun bash -c ")
    assert start == "srun --wait=60 --kill-on-bad-exit=0 /checkout/launch/run.sh -- train x "
    assert again == "# after 75 or a signal, up to 5 times: scontrol requeue JOB"


SLICE = ["--name", "n", "--zone", "z", "--accelerator", "v5litepod-16", "--runtime", "v2", "--dry-run"]


@pytest.mark.parametrize(("more", "end"), [([], "--runtime-version v2 "), (["--spot"], "--runtime-version v2 --spot ")])
def test_dry_run_of_creating_a_slice(more: list[str], end: str) -> None:
    first, *_ = call("tpu_pod.sh", "create", *SLICE, *more).stdout.splitlines()
    start = "gcloud compute tpus queued-resources create n --node-id n --zone z --accelerator-type v5litepod-16 "
    assert first == start + end


def test_dry_run_of_a_pod_copies_installs_and_runs_on_all_hosts() -> None:
    lines = call("tpu_pod.sh", "run", *SLICE, "--restarts", "2", "--", "train", "a b").stdout.splitlines()
    assert lines[0].startswith("git archive") and lines[1].startswith("gcloud compute tpus tpu-vm scp")
    for line in lines[2:4]:
        assert line.startswith("gcloud compute tpus tpu-vm ssh n --zone z --worker all --command ")
    assert "requirements-tpu.txt" in lines[2] and r"launch/run.sh\ --restarts\ 2\ --\ train\ a\\\ b" in lines[3]
    assert lines[4].startswith("# where the slice was taken away, up to 2 times")


def test_dry_run_of_logs_and_delete() -> None:
    logs = call("tpu_pod.sh", "logs", "--name", "n", "--zone", "z", "--worker", "3", "--dry-run").stdout
    assert (
        logs == r"gcloud compute tpus tpu-vm ssh n --zone z --worker 3 --command tail\ -n\ +1\ -F\ e2p/e2p.log " + "\n"
    )
    delete = call("tpu_pod.sh", "delete", "--name", "n", "--zone", "z", "--dry-run").stdout
    assert delete == "gcloud compute tpus queued-resources delete n --zone z --force --quiet \n"


def jobsets() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((LAUNCH / "jobset.yaml").read_text()))


@pytest.mark.parametrize("accelerator", ["gpu", "tpu"])
def test_jobset(accelerator: str) -> None:
    """The schema, and what no schema says: names, counts and addresses that must fit each other."""
    (jobset,) = [one for one in jobsets() if one["metadata"]["labels"]["accelerator"] == accelerator]
    jsonschema.validate(jobset, SCHEMAS["jobset"])
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    assert job["completions"] == job["parallelism"] and job["completionMode"] == "Indexed" and job["backoffLimit"] == 0
    assert container["command"][:2] == ["launch/run.sh", "--"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [1, 2]}
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in job["template"]["spec"]["volumes"]}
    environment = {entry["name"]: entry for entry in container.get("env", ())}
    if accelerator == "gpu":
        name = jobset["metadata"]["name"]
        pods = [f"{name}-{replicated['name']}-0-{i}" for i in range(job["completions"])]
        assert environment["JAX_COORDINATOR_ADDRESS"]["value"] == f"{pods[0]}.{name}:8476"
        assert environment["JAX_NUM_PROCESSES"]["value"] == str(len(pods))
        assert environment["E2P_HOSTS"]["value"] == ",".join(pods)


def test_sky() -> None:
    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    jsonschema.validate(task, SCHEMAS["sky"])
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [RESTART]
    program = task["run"].replace("launch/run.sh", "env; echo")
    nodes = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    said = subprocess.run(
        ["bash", "-euc", program], env={**os.environ, **nodes}, capture_output=True, text=True, check=True
    )
    for line in (
        "JAX_COORDINATOR_ADDRESS=10.0.0.1:8476",
        "JAX_NUM_PROCESSES=2",
        "JAX_PROCESS_ID=1",
        "E2P_HOSTS=10.0.0.1,10.0.0.2",
        "--restarts 3 -- train persona_chat --workdir /runs/persona_chat",
    ):
        assert line in said.stdout.splitlines()


@pytest.mark.parametrize("break_it", [("action", "Restart"), ("onJobFailureReasons", ["Whatever"]), ("names", [])])
def test_the_schema_refuses_what_kubernetes_does(break_it: tuple[str, Any]) -> None:
    (first, _) = jobsets()
    first["spec"]["failurePolicy"]["rules"][0][break_it[0]] = break_it[1]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(first, SCHEMAS["jobset"])
