"""The packaged audio: what may be trained on, and whose it is."""

import pytest

from audiomosaic_jax.data import datasets, sources


def test_the_demo_never_pretrains_on_notes_it_is_tested_on():
  pretrain = datasets.make_dataset("demo", "pretrain", sample_rate_hz=16_000)
  assert len(pretrain) == 848 + 373
  assert set(pretrain.labels.tolist()) == {-1}
  used = {
    (source.root, path.split("#")[0])
    for source in pretrain.sources
    for path in source.paths
  }
  for split, size in (("train", 373), ("valid", 51), ("test", 355)):
    notes = datasets.make_dataset(
      "demo", f"instruments_{split}", sample_rate_hz=16_000
    )
    assert len(notes) == size and len(notes.class_names) == 10
    assert set(notes.labels.tolist()) == set(range(10))
    overlap = {(notes.root, path) for path in notes.paths} & used
    assert len(overlap) == (size if split == "train" else 0)


def test_no_instrument_library_is_both_pretrained_on_and_tested_on():
  # A file name can hide that two recordings are the same; the library cannot.
  clips = sources.tables.read_csv(
    datasets.DEMO_DIR / "pretrain" / "clips.csv", ["source", "category"]
  )
  notes = sources.tables.read_csv(
    datasets.DEMO_DIR / "instruments" / "labels.csv", ["source", "split"]
  )
  trained = {r["source"] for _, r in clips if r["category"] != "effects"}
  held_out = {r["source"] for _, r in notes if r["split"] != "train"}
  assert not trained & held_out
  trained |= {r["source"] for _, r in notes if r["split"] == "train"}
  tested = {r["source"] for _, r in notes if r["split"] == "test"}
  assert not trained & tested


@pytest.mark.parametrize(
  "table", ["pretrain/clips.csv", "instruments/labels.csv"]
)
def test_every_packaged_clip_exists_and_has_a_licence_and_a_credit(table):
  path = datasets.DEMO_DIR / table
  readme = (datasets.DEMO_DIR / "README.md").read_text()
  columns = ["path", "source", "licence"]
  listed = set()
  for _, row in sources.tables.read_csv(path, columns):
    listed.add(path.parent / row["path"])
    name = "tonejs-instrument-*"
    if not row["source"].startswith("tonejs-instrument-"):
      name = row["source"]
    assert f"| {name} |" in readme and f"| {row['licence']} |" in readme
  assert listed == set(path.parent.rglob("*.opus"))
