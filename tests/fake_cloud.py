"""A cloud and a cluster for the launchers, made of small programs.

`gcloud`, `kubectl`, `srun`, `scontrol`, `curl` and the interpreters write down
what they were called with. That of `gcloud` has two hosts, which are folders,
and really runs on them what it is sent.
"""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]
STOPPED = 75
# What shells, YAML and JSON could stumble over.
ARGUMENTS = [
  "--config=configs/a b.py:demo,x=1",
  """--workdir=it's "here" \\ & $HOME `id` * #1""",
  "--config.empty=",
  "--config.lines=one\ntwo\tthree",
  "__NAME__",
]

RECORD = """
import json, os, pathlib, shutil, signal, subprocess, sys
cloud = pathlib.Path(os.environ["CLOUD"])
name, words = pathlib.Path(sys.argv[0]).name, sys.argv[1:]
def record(file="calls", **more):
  line = json.dumps({"words": [name, *words], **more})
  with (cloud / file).open("a") as log:
    log.write(line + "\\n")
def read(file):
  path = cloud / file
  return path.read_text() if path.exists() else ""
"""
# `on_sleep` is what happens next in the cloud, a line per sleep.
PROGRAMS = {
  "sleep": """
steps = read("on_sleep").splitlines()
if steps:
  file, text = steps[0].split("=")
  (cloud / file).write_text(text)
  (cloud / "on_sleep").write_text("\\n".join(steps[1:]))
os.execv("/bin/sleep", ["sleep", "0.05"])
""",
  "gcloud": """
record()
flags = dict(w[2:].split("=", 1) for w in words if w[:2] == "--" and "=" in w)
verb, resource = words[words.index("queued-resources") + 1 :][:2]
every_host = sorted((cloud / "hosts").iterdir())
hosts = every_host if flags.get("worker") == "all" else every_host[:1]
if verb == "create":
  (cloud / "state").write_text("ACTIVE")
elif verb == "delete":
  (cloud / "state").unlink()
  for host in every_host:
    process = host / "audiomosaic-jax-run" / "process"
    if process.exists() and not (process.parent / "status").exists():
      os.killpg(int(process.read_text()), signal.SIGKILL)
    shutil.rmtree(host)
    host.mkdir()
elif verb == "describe":
  if not read("state"):
    sys.exit("ERROR: NOT_FOUND: no such resource")
  print(read("state"))
elif verb == "scp":
  source, target = words[words.index("scp") + 1 :][:2]
  for host in hosts:
    if target.endswith(":"):
      shutil.copy(source, host)
    else:
      shutil.copy(host / source.split(":")[1], target)
elif verb == "ssh":
  command = flags["command"].replace("tail -n 100 -F", "tail -n 100")
  statuses = [
    subprocess.run(
      ["bash", "-c", command],
      cwd=host,
      env=os.environ | {"HOME": str(host), "HOST": host.name},
    ).returncode
    for host in hosts
  ]
  sys.exit(max(statuses))
""",
  "curl": """
key = words[-1].rpartition("/")[2]
answers = json.loads(read("metadata"))
if key not in answers:
  sys.exit(22)
print(answers[key][int(os.environ["HOST"])])
""",
  "kubectl": "record(stdin=sys.stdin.read())",
  "srun": """
record()
sys.exit(subprocess.run(["bash", "-c", read("job")]).returncode)
""",
  "scontrol": "record()",
  # Installs by putting the next one where the environment would be.
  "python3": """
if words[:3] == ["-m", "uv", "venv"]:
  os.makedirs(".venv/bin", exist_ok=True)
  shutil.copy(cloud / "bin" / "job", ".venv/bin/python")
""",
  "job": """
names = "COORDINATOR_ADDRESS NUM_PROCESSES PROCESS_ID".split()
record("jobs", env=[os.environ.get("JAX_" + n) for n in names])
os.execvp("bash", ["bash", "-c", read("job")])
""",
}
STAY = """
trap 'exit 75' TERM
echo '{}' >>"$CLOUD/ready"
while true; do /bin/sleep 0.02; done
"""


class Cloud:
  """A copy of launch/ in a repository, and programs for it to call."""

  def __init__(self, folder: pathlib.Path):
    self.folder, self.tree = folder, folder / "a tree"
    for place in ("bin", "hosts/0", "hosts/1"):
      (folder / place).mkdir(parents=True)
    for name, text in PROGRAMS.items():
      path = folder / "bin" / name
      path.write_text(f"#!{sys.executable} -SE{RECORD}{text}")
      path.chmod(0o755)
    self.write(job="exit 0")
    endpoints = ["10.0.0.1,10.0.0.2"] * 2
    self.metadata(endpoints, ["0", "1"])
    shutil.copytree(ROOT / "launch", self.tree / "launch")
    (self.tree / ".gitignore").write_text("dist/\n.venv/\n")
    for command in (
      "init --quiet",
      "add --all",
      "-c user.name=a -c user.email=a@b commit --quiet --message=a",
    ):
      subprocess.run(["git", *command.split()], cwd=self.tree, check=True)
    self.environ = os.environ | {
      "CLOUD": str(folder),
      "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
    }
    for name in ("SLURM_SUBMIT_DIR", "SLURM_JOB_ID", "SLURM_CPUS_PER_TASK"):
      self.environ.pop(name, None)

  def write(self, **files: str) -> None:
    for name, text in files.items():
      (self.folder / name).write_text(text)

  def metadata(self, endpoints, numbers, tpu_env=None) -> None:
    answers = {
      "worker-network-endpoints": endpoints,
      "agent-worker-number": numbers,
    }
    if tpu_env:
      answers["tpu-env"] = tpu_env
    self.write(metadata=json.dumps(answers))

  def run(self, *words: str, status: int = 0) -> str:
    """Runs a launcher, which must end with a status; returns its output."""
    done = subprocess.run(
      ["bash", *words],
      cwd=self.tree,
      env=self.environ,
      capture_output=True,
      text=True,
      timeout=60,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + (done.stderr if status else "")

  def tpu(self, verb: str, *words: str, status: int = 0) -> str:
    return self.run("launch/tpu.sh", verb, "am", *words, status=status)

  def start(self, *words: str) -> subprocess.Popen:
    return subprocess.Popen(
      ["bash", *words], cwd=self.tree, env=self.environ, text=True
    )

  def records(self, file: str = "calls") -> list[dict]:
    path = self.folder / file
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]

  def take(self, file: str = "calls") -> list[dict]:
    """Returns what was recorded and forgets it."""
    records = self.records(file)
    (self.folder / file).unlink(missing_ok=True)
    return records

  def wait_for(self, file: str, count: int) -> list[dict]:
    deadline = time.monotonic() + 20
    while len(self.records(file)) < count:
      assert time.monotonic() < deadline, self.records(file)
      time.sleep(0.02)
    return self.records(file)

  def wait_until_ended(self) -> None:
    deadline = time.monotonic() + 20
    while len(list(self.folder.glob("hosts/*/*-run/status"))) < 2:
      assert time.monotonic() < deadline
      time.sleep(0.02)

  def end(self) -> None:
    """Kills the jobs that are left."""
    for path in self.folder.glob("hosts/*/audiomosaic-jax-run/process"):
      if not (path.parent / "status").exists():
        os.killpg(int(path.read_text()), signal.SIGKILL)
