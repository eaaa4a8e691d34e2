"""examples/cluster/ as a cluster runs it: a real Slurm of two nodes, which the test starts on this machine."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fastdistil.run import checkpoint
from fastdistil.run.command import STOPPED
from fastdistil.run.recipes import parse
from tests.support import forked, launch, runs, slurm
from tests.support.launch import ROOT
from tests.support.processes import processes_of, workers_of
from tests.support.runs import long_arguments, status

EXAMPLES = ROOT / "examples" / "cluster"
SCRIPT = EXAMPLES / "slurm.sbatch"
LAUNCH = EXAMPLES / "launch.py"
PAGE = ROOT / "docs" / "how-to" / "cluster.md"
TWO_NODES = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", "--signal=TERM@60"]
ONE_TASK = ["--nodes=1", *TWO_NODES[1:]]
"""In the place of the script's own, for CPUs."""

slurmed = pytest.mark.skipif(bool(why := slurm.unavailable()), reason=why)


@pytest.fixture(scope="module")
def cluster():
    with slurm.cluster() as found:
        yield found


def words(root, run, **changes):
    given = {"optim__duration": 100, "log__checkpoint_every": 1000, "engine__threads": 1, "engine__zero_stage": 0}
    return long_arguments(root, run, **given | changes)


@pytest.fixture(scope="module")
def quiet(root, tmp_path_factory):
    """The run of two ranks in one go."""
    run = tmp_path_factory.mktemp("quiet") / "run"
    forked.run("fastdistil.pretrain", *words(root, run), ranks=2)
    return run


def wait_until_it_works(cluster, job, life=1):
    """Return when a job that is in its `life` has done some updates in it."""

    def works(log: str) -> bool:
        lives = log.split("resuming after")
        return len(lives) >= life and lives[life - 1].count("tokens/s") > 3

    cluster.wait_until(job, f"updates of life {life}", works)


@slurmed
def test_a_run_on_two_nodes_is_put_back_four_ways_and_ends_as_if_nothing_had_been(cluster, root, quiet, tmp_path):
    run = tmp_path / "run"
    job = cluster.submit(*TWO_NODES, SCRIPT, *words(root, run))
    # SIGTERM to the job's processes, as --signal=TERM@300 sends it: the script puts the job back.
    wait_until_it_works(cluster, job)
    cluster.ask("scancel", "--signal=TERM", job)
    cluster.wait_until(job, "status 75: back to the queue, requeue 1 of at most 50")
    assert (status(run)["state"], status(run)["reason"]) == ("stopped", "SIGTERM")
    # Preemption with a time of grace.
    wait_until_it_works(cluster, job, life=2)
    urgent = cluster.submit("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    cluster.wait_until(job, "status 75: back to the queue, requeue 2 of at most 50")
    assert cluster.end(urgent)["ExitCode"] == "0:0"
    assert status(run)["state"] == "stopped"
    # Put back from outside: the processes have KillWait, and the script does not put it back once more.
    wait_until_it_works(cluster, job, life=3)
    cluster.ask("scontrol", "requeue", job)
    # A node is lost: Slurm puts the job back itself.
    wait_until_it_works(cluster, job, life=4)
    cluster.ask("scontrol", "update", f"NodeName={slurm.NODES[1]}", "State=DOWN", "Reason=lost")
    cluster.ask("scontrol", "update", f"NodeName={slurm.NODES[1]}", "State=RESUME")
    ended = cluster.end(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "4"), cluster.log(job)
    assert not processes_of(run)
    runs.same_ends(quiet, run)
    assert runs.exact_metrics(run) == runs.exact_metrics(quiet)


@slurmed
def test_what_is_cancelled_stays_cancelled_and_goes_on_when_it_is_sent_again(cluster, root, quiet, tmp_path):
    run = tmp_path / "run"
    job = cluster.submit(*TWO_NODES, SCRIPT, *words(root, run))
    wait_until_it_works(cluster, job)
    cluster.ask("scancel", job)
    ended = cluster.end(job)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0")
    assert not processes_of(run)
    assert checkpoint.newest(run) == checkpoint.folder_of(run, status(run)["update"])
    assert cluster.end(cluster.submit(*TWO_NODES, SCRIPT, *words(root, run)))["ExitCode"] == "0:0"
    runs.same_ends(quiet, run)


@slurmed
def test_an_array_of_seeds(cluster, root, tmp_path):
    """%a is the number in the array, and who is put back is one of it."""
    given = words(root, tmp_path / "seed-%a", optim__duration=60)
    array = cluster.submit("--array=0-2", *ONE_TASK, SCRIPT, *given, "--seed", "%a")
    cluster.wait_until(f"{array}_2", "update 5/60")
    cluster.ask("scancel", "--signal=TERM", f"{array}_2")
    ended = [cluster.end(f"{array}_{seed}") for seed in range(3)]
    assert [found["ExitCode"] for found in ended] == ["0:0"] * 3
    assert [found["Restarts"] for found in ended] == ["0", "0", "1"]
    losses = set()
    for seed in range(3):
        run = tmp_path / f"seed-{seed}"
        assert status(run)["state"] == "finished"
        losses.add(runs.metrics_of(run)[-1]["loss"])
    assert len(losses) == 3


def a_python(cluster, folder, does):
    """A PATH on which `python` is a shell script that `does` this, whatever it is asked."""
    (folder / "python").write_text(f"#!/bin/sh\n{does}\n")
    (folder / "python").chmod(0o755)
    return f"{folder}:{cluster.environment['PATH']}"


@slurmed
@pytest.mark.parametrize(
    ("number", "state", "code", "restarts"),
    [
        (0, "COMPLETED", "0:0", "0"),
        (1, "FAILED", "1:0", "0"),
        (2, "FAILED", "2:0", "0"),
        (75, "FAILED", "75:0", "2"),  # at most MOST_REQUEUES
        (130, "FAILED", "130:0", "0"),
        (137, "FAILED", "137:0", "0"),
        (143, "FAILED", "143:0", "0"),
    ],
)
def test_what_becomes_of_each_exit_status(cluster, tmp_path, number, state, code, restarts):
    path = a_python(cluster, tmp_path, f"exit {number}")
    ended = cluster.end(cluster.submit(*ONE_TASK, SCRIPT, PATH=path, MOST_REQUEUES="2"))
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == (state, code, restarts)


@slurmed
def test_preempted_while_it_loads(cluster, tmp_path):
    """There is nothing to save yet, and 143 is the status; the second life ends with it, and was not preempted."""
    loads = f"trap 'exit 143' TERM; test $SLURM_RESTART_COUNT && exit 143; touch {tmp_path}/began; sleep 60 & wait"
    job = cluster.submit(*TWO_NODES, SCRIPT, PATH=a_python(cluster, tmp_path, loads))
    cluster.wait_until(job, "its beginning", lambda _: (tmp_path / "began").exists())
    cluster.end(cluster.submit("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true"))
    ended = cluster.end(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "143:0", "1"), cluster.log(job)


@slurmed
def test_a_mistake_is_a_line_and_the_end(cluster, tmp_path):
    job = cluster.submit(*TWO_NODES, SCRIPT, "mlm", "--data.shards", tmp_path / "nowhere", "--out", tmp_path / "run")
    assert (ended := cluster.end(job))["ExitCode"] == "2:0", cluster.log(job)
    assert ended["Restarts"] == "0"
    assert f"error: {tmp_path / 'nowhere'}" in cluster.log(job)
    assert "Traceback" not in cluster.log(job)


@pytest.mark.soak
@slurmed
def test_the_time_is_up(cluster, root, tmp_path):
    """The signal before it; a minute is the least that Slurm knows."""
    run = tmp_path / "run"
    job = cluster.submit(*TWO_NODES, "--time=1", "--signal=TERM@30", SCRIPT, *words(root, run, optim__duration=9999))
    cluster.wait_until(job, "status 75: back to the queue, requeue 1 of at most 50")
    assert status(run)["reason"] == "SIGTERM"
    cluster.ask("scancel", job)
    assert cluster.end(job)["JobState"] == "CANCELLED"


@pytest.mark.parametrize(("program", "file"), [("shellcheck", "slurm.sbatch"), ("hadolint", "Dockerfile")])
def test_linters_have_nothing_to_say(program, file):
    found = shutil.which(program, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"{program} is not installed")
    done = subprocess.run([found, EXAMPLES / file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_job_is_valid_for_kubernetes():
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    service, job = yaml.safe_load_all((EXAMPLES / "job.yaml").read_text())
    for resource in (service, job):
        kubernetes_validate.validate(resource, kubernetes_validate.latest_version(), strict=True)


def test_the_job_knows_the_exit_statuses_and_finds_the_first_pod():
    """What the schema does not hold: names that must agree, and what the rules make of a status."""
    service, job = yaml.safe_load_all((EXAMPLES / "job.yaml").read_text())
    spec, template = job["spec"], job["spec"]["template"]["spec"]
    (container,) = template["containers"]
    name, subdomain = job["metadata"]["name"], template["subdomain"]
    assert service["metadata"]["name"] == subdomain
    assert service["spec"]["selector"] == {"job-name": name}
    assert f"--master-addr={name}-0.{subdomain}" in container["command"]
    assert f"--nnodes={spec['completions']}" in container["command"]
    assert f"--nproc-per-node={container['resources']['limits']['nvidia.com/gpu']}" in container["command"]
    assert spec["completions"] == spec["parallelism"]
    assert template["restartPolicy"] == "Never"  # podFailurePolicy wants it
    actions = {}
    for rule in spec["podFailurePolicy"]["rules"]:
        assert rule["action"] in ("FailJob", "Ignore")
        if on := rule.get("onExitCodes"):
            assert (on["containerName"], on["operator"]) == (container["name"], "In")
            actions |= dict.fromkeys(on["values"], rule["action"])
        else:
            assert rule["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert actions == {2: "FailJob", STOPPED: "Ignore", 143: "Ignore"}
    options = container["command"][container["command"].index("distilbert") :]
    assert parse(options, quiet=True).resume == "auto"


@slurmed
def test_torchrun_in_the_place_of_srun_as_the_page_has_it(cluster, root, quiet, tmp_path):
    """A rank a node by launch.py, which ends with the status of its rank, so that the script puts the job back."""
    code = PAGE.read_text().partition("With torchrun nevertheless")[2].partition("    srun")[2].partition("\n\n")[0]
    code = f"srun{code}\n".replace("launch.py", str(LAUNCH)).replace("per-node=8", "per-node=1")
    before, _, rest = SCRIPT.read_text().partition("srun --wait")
    script = tmp_path / "torchrun.sbatch"
    script.write_text(before + code + rest.partition("--resume auto\n")[2])
    run = tmp_path / "run"
    job = cluster.submit(*TWO_NODES, script, *words(root, run))
    wait_until_it_works(cluster, job)
    cluster.ask("scancel", "--signal=TERM", job)
    ended = cluster.end(job)
    assert (ended["ExitCode"], ended["Restarts"]) == ("0:0", "1"), cluster.log(job)
    assert not processes_of(run)
    assert runs.exact_metrics(run) == runs.exact_metrics(quiet)


def launched(module, *given):
    """launch.py with two processes of `module`."""
    words = launch.command(LAUNCH, "-m", module, *given, script=True)
    return [*words[:2], "--nproc-per-node=2", "--standalone", *words[2:]]


@pytest.mark.parametrize("who", ["a process", "the launcher"])
def test_launch_ends_with_the_status_of_what_it_starts(root, tmp_path, who):
    run = tmp_path / "run"
    process = launch.start_until("update 3/", launched("fastdistil.pretrain", *words(root, run)))
    os.kill(workers_of(run)[1] if who == "a process" else process.pid, signal.SIGTERM)
    printed = launch.rest_of(process)
    assert process.returncode == STOPPED, printed
    assert status(run)["state"] == "stopped"
    assert checkpoint.newest(run) == checkpoint.folder_of(run, status(run)["update"])
    assert not processes_of(run)


def test_launch_says_what_is_refused_without_a_traceback(tmp_path):
    process = launch.start_until("error: ", launched("fastdistil.pretrain", "distilbert", "--data.shards", tmp_path))
    assert "Traceback" not in launch.rest_of(process)
    assert process.returncode == 2
