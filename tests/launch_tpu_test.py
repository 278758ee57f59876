"""launch/tpu.sh on the hosts of a cloud that is made here."""

import fake_cloud
import pytest
from fake_cloud import ARGUMENTS, STAY

VERBS = ("create", "status", "sync", "run", "state", "tail", "fetch", "stop")
VERBS += ("delete", "watch")


@pytest.fixture
def cloud(tmp_path):
  cloud = fake_cloud.Cloud(tmp_path)
  yield cloud
  cloud.end()


def flags_of(verb: str) -> list[str]:
  """Returns flags with which a verb of tpu.sh is complete."""
  flags = ["--zone=us-x1-b", "--project=p q", "--ssh_flag=--internal-ip"]
  if verb in ("create", "watch"):
    flags += ["--accelerator=v4-16", "--runtime=tpu-vm", "--spot"]
    flags += ["--create_flag=--network=my net"]
  if verb in ("sync", "watch"):
    flags += ["--setup=echo 'set up' \"$HOME\" >set_up"]
  if verb == "fetch":
    flags += ["--workdir=runs/my run", "--output=here/too far"]
  if verb in ("run", "watch"):
    flags += ["--", *ARGUMENTS]
  return flags


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(cloud, verb):
  assert f"launch/tpu.sh {verb} NAME" in cloud.run(
    "launch/tpu.sh", verb, "--help"
  )
  assert verb in cloud.run("launch/tpu.sh", "--help")


@pytest.mark.parametrize("verb", [v for v in VERBS if v != "watch"])
def test_a_dry_run_prints_what_the_verb_would_run(cloud, verb, tmp_path):
  if verb != "create":
    cloud.tpu("create", *flags_of("create"))
  if verb not in ("create", "status", "sync"):
    cloud.tpu("sync", *flags_of("sync"))
  if verb in ("tail", "fetch", "state", "stop"):
    cloud.tpu("run", "--", "x")
    cloud.wait_until_ended()
  for host in cloud.folder.glob("hosts/*/audiomosaic-jax"):
    (host / "runs/my run").mkdir(parents=True)
  cloud.take()
  before = sorted(cloud.folder.rglob("*"))
  printed = cloud.tpu(verb, "--dry_run", *flags_of(verb))
  assert not cloud.take()
  assert sorted(cloud.folder.rglob("*")) == before
  # As one would paste it, from another folder.
  (tmp_path / "pasted").write_text(printed)
  cloud.run(str(tmp_path / "pasted"))
  pasted = cloud.take()
  if verb == "run":
    cloud.wait_until_ended()
  if verb == "delete":
    cloud.write(state="ACTIVE")
  cloud.tpu(verb, *flags_of(verb))
  assert pasted == cloud.take()
  assert pasted


def test_what_is_asked_for_is_a_slice_or_several(cloud):
  need = ["--accelerator=v4-16", "--runtime=tpu-vm"]
  cloud.tpu("create", *need, "--reserved")
  cloud.tpu("create", *need, "--best_effort", "--nodes=3")
  one, three = [call["words"] for call in cloud.take()]
  resources = ["compute", "tpus", "queued-resources", "create", "am"]
  what = ["--accelerator-type=v4-16", "--runtime-version=tpu-vm"]
  assert one == [
    "gcloud", *resources, *what, "--reserved", "--node-id=am"
  ]  # fmt: skip
  several = ["--node-count=3", "--node-prefix=am"]
  assert three == [
    "gcloud", "alpha", *resources, *what, "--best-effort", *several
  ]  # fmt: skip


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (["create", "am", "--runtime=a"], "create needs --accelerator"),
    (["run", "am"], "run needs -- and the arguments"),
    (["stop", "am", "--", "x"], "stop takes no arguments"),
    (["stop"], "stop needs the name"),
    (["stop", "am", "am2"], "one name"),
    (["tail", "am", "--worker=x"], "--worker=x is no number"),
    (["fetch", "am", "--workdir=a"], "fetch needs --output"),
    (["sync", "am", "--quick"], "--quick is no flag of sync"),
    (["create", "am", "--spot", "--reserved"], "exclude each other"),
  ],
)
def test_a_wrong_command_line_is_refused_before_anything_runs(
  cloud, words, message
):
  assert message in cloud.run("launch/tpu.sh", *words, status=2)
  assert not cloud.take()


def set_up(cloud, *setup):
  cloud.tpu("create", "--accelerator=v4-16", "--runtime=tpu-vm")
  cloud.tpu("sync", *setup)


def states(cloud):
  return cloud.tpu("state").split()


def test_sync_copies_what_is_committed_and_removes_what_is_not(cloud):
  (cloud.tree / "new.py").write_text("x = 1")
  set_up(cloud, "--setup=touch mounted")
  for host in sorted(cloud.folder.glob("hosts/*")):
    tree = host / "audiomosaic-jax"
    assert (tree / "launch/tpu.sh").exists() and (host / "mounted").exists()
    assert (tree / ".venv/bin/python").exists()
    assert not (tree / "new.py").exists()
    (tree / "old.py").write_text("x = 1")
  cloud.tpu("sync")
  assert not list(cloud.folder.glob("hosts/*/audiomosaic-jax/old.py"))


def test_arguments_reach_every_host_unchanged(cloud):
  set_up(cloud)
  cloud.tpu("run", "--", *ARGUMENTS)
  jobs = cloud.wait_for("jobs", 2)
  for job in jobs:
    assert job["words"][1:] == [
      "-m",
      "audiomosaic_jax.main",
      "--stopped_status=75",
      *ARGUMENTS,
    ]
  assert sorted(job["env"] for job in jobs) == [
    ["10.0.0.1:8476", "2", "0"],
    ["10.0.0.1:8476", "2", "1"],
  ]
  assert "start: '--config=configs/a b.py" in cloud.tpu("tail")


def test_hosts_of_several_slices_are_counted_through(cloud):
  lines = "A: '1'\nMEGASCALE_COORDINATOR_ADDRESS: '10.9.9.9:8080'\n"
  lines += "MEGASCALE_NUM_SLICES: '3'\nMEGASCALE_SLICE_ID: '{}'\n"
  # The older form of an endpoint; both hosts are the second of their slice.
  endpoints = ["a:0:10.0.0.1,b:1:10.0.0.2"] * 2
  cloud.metadata(endpoints, ["1", "1"], [lines.format(i) for i in (0, 2)])
  set_up(cloud)
  cloud.tpu("run", "--", "x")
  jobs = cloud.wait_for("jobs", 2)
  assert sorted(job["env"] for job in jobs) == [
    ["10.9.9.9:8476", "6", "1"],
    ["10.9.9.9:8476", "6", "5"],
  ]


def test_a_host_alone_is_not_told_of_peers(cloud):
  cloud.metadata(["10.0.0.1"] * 2, ["0", "0"])
  set_up(cloud)
  cloud.tpu("run", "--", "x")
  assert cloud.wait_for("jobs", 2)[0]["env"] == [None] * 3


def test_a_job_is_stopped_and_continued(cloud):
  set_up(cloud)
  assert states(cloud) == ["none"] * 2
  cloud.write(job=STAY)
  cloud.tpu("run", "--", "x")
  cloud.wait_for("ready", 2)
  assert states(cloud) == ["running"] * 2
  assert "a job is running" in cloud.tpu("run", "--", "x", status=2)
  assert cloud.tpu("stop").split() == ["stopped"] * 2
  assert states(cloud) == ["stopped"] * 2
  cloud.write(job="exit 3")
  cloud.tpu("run", "--", "x")
  cloud.wait_until_ended()
  assert states(cloud) == ["failed", "3"] * 2


def test_fetch_leaves_the_checkpoints_where_they_are(cloud):
  set_up(cloud)
  run = cloud.folder / "hosts/0/audiomosaic-jax/runs/my run"
  for name in ("metrics.jsonl", "seed_1/report.html"):
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).write_text(name)
  for name in ("checkpoints/5/state", "seed_1/checkpoints/5", "compiled/x"):
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).write_text(name)
  cloud.tpu("fetch", "--workdir=runs/my run", "--output=my copy")
  copy = cloud.tree / "my copy"
  files = {
    path.relative_to(copy).as_posix()
    for path in copy.rglob("*")
    if path.is_file()
  }
  assert files == {"metrics.jsonl", "seed_1/report.html"}


WATCH = ["--accelerator=v4-16", "--runtime=tpu-vm", "--spot"]


def verbs_called(cloud):
  calls = [call["words"] for call in cloud.records()]
  return [words[words.index("queued-resources") + 1] for words in calls]


def test_watch_outlives_a_preemption_and_ends_with_the_job(cloud):
  cloud.write(
    job=STAY,
    on_sleep="\n".join(
      [
        "state=WAITING_FOR_RESOURCES",
        "state=ACTIVE",
        "unused=",
        "state=SUSPENDED",
        "job=exit 0",
        "unused=",
        "unused=",
      ]
    ),
  )
  output = cloud.tpu("watch", *WATCH, "--", "x")
  assert "slice: SUSPENDED" in output
  assert output.splitlines()[-1].endswith("job: finished")
  called = verbs_called(cloud)
  assert called.count("create") == 2 and called.count("delete") == 1
  assert called.index("delete") > called.index("create")


def test_watch_goes_on_after_a_stop_without_another_installation(cloud):
  set_up(cloud)
  cloud.write(job="exit 75")
  cloud.tpu("run", "--", "x")
  cloud.wait_until_ended()
  cloud.take()
  cloud.write(on_sleep="job=exit 0\nunused=\n")
  cloud.tpu("watch", *WATCH, "--", "x")
  assert "scp" not in verbs_called(cloud)
  assert "create" not in verbs_called(cloud)


def test_watch_gives_up_on_a_job_that_keeps_failing(cloud):
  cloud.write(job="exit 1")
  output = cloud.tpu("watch", *WATCH, "--failures=1", "--", "x", status=1)
  assert "the job failed 2 times" in output
  assert len(cloud.records("jobs")) == 4


def test_a_dry_watch_runs_nothing(cloud):
  printed = cloud.tpu("watch", "--dry_run", *flags_of("watch"))
  assert not cloud.take()
  for verb in ("create", "describe", "scp", "ssh", "delete"):
    assert f" queued-resources {verb} " in printed
