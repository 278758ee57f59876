"""A checkpoint that is not what was saved is refused, whatever happened."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from audiomosaic_jax.checkpoint import Checkpointer, load_meta, load_params

META = {"rollbacks": 1, "config": {"lr": 6e-4, "order": ("a", "b")}}


def make_state():
  """Returns leaves of which some are files of their own and some are not."""
  bits = jax.random.normal(jax.random.key(0), (4, 300, 40))
  return {
    "params": {
      "kernel": bits[0],
      "encoder": {"kernel": bits[1], "bias": bits[2, 0].astype(jnp.bfloat16)},
    },
    "step": jnp.int32(7),
    "valid": jnp.array([True, False]),
  }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A folder of checkpoints with the steps 4 and 7."""
  folder = tmp_path_factory.mktemp("saved")
  with Checkpointer(folder, keep_last=2, keep_every=0) as checkpoints:
    for step in (4, 7):
      checkpoints.save(step, make_state(), META)
  return folder


@pytest.fixture
def copied(saved, tmp_path):
  """A copy of it, to be damaged."""
  return pathlib.Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def restore(folder):
  with Checkpointer(folder, keep_last=2, keep_every=0) as checkpoints:
    return checkpoints.restore(7, make_state())


def flip(file: pathlib.Path, position: int):
  """Flips one bit of a file."""
  content = bytearray(file.read_bytes())
  content[position] ^= 1 << position % 8
  file.write_bytes(content)


def largest_file(folder: pathlib.Path) -> pathlib.Path:
  files = [file for file in (folder / "7").rglob("*") if file.is_file()]
  return max(files, key=lambda file: file.stat().st_size)


def edit_meta(folder, change):
  file = folder / "7" / "meta" / "metadata"
  meta = json.loads(file.read_text())
  change(meta)
  file.write_text(json.dumps(meta))


def test_the_description_comes_back_without_the_fingerprints(copied):
  wanted = json.loads(json.dumps(META))
  assert restore(copied)[1] == wanted
  assert load_meta(copied) == wanted


def test_a_flipped_bit_that_orbax_restores_is_refused_by_the_name_of_its_leaf(
  copied,
):
  file = largest_file(copied)
  flip(file, file.stat().st_size // 2)
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    silent = reader.restore(copied / "7" / "state")
  state = make_state()
  changed = [
    jax.tree_util.keystr(path, simple=True, separator="/")
    for (path, a), b in zip(
      jax.tree_util.tree_leaves_with_path(silent),
      jax.tree.leaves(state),
      strict=True,
    )
    if np.asarray(a).tobytes() != np.asarray(b).tobytes()
  ]
  assert changed  # Orbax said nothing.
  message = (
    rf"{copied}/7 is damaged: {changed[0]} has the fingerprint float32\S+ but "
    r"was saved with float32\S+ \(\d+ of 5 leaves differ\); copy it again.* 4$"
  )
  with pytest.raises(ValueError, match=message):
    restore(copied)
  with pytest.raises(ValueError, match=rf"is damaged: {changed[0]} has"):
    load_params(copied, {"params": state["params"]})
  # Step 4 is whole, and so is what was not asked for.
  load_params(copied / "4", {"params": state["params"]})
  load_params(copied, {"valid": state["valid"]})


def test_damage_is_found_before_parameters_are_cast(copied):
  state = make_state()
  wanted = {"params": {"kernel": state["params"]["kernel"].astype("bfloat16")}}
  kernel = load_params(copied, wanted)["params"]["kernel"]
  np.testing.assert_array_equal(kernel, wanted["params"]["kernel"])

  def change(meta):
    leaves = meta["fingerprints"]["state"]
    leaves["params/kernel"] = leaves["params/encoder/kernel"]

  edit_meta(copied, change)
  with pytest.raises(ValueError, match="damaged: params/kernel has"):
    load_params(copied, wanted)


def damages():
  """Yields (name, function of a file) of what storage and copying do."""

  def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

  yield "removed", pathlib.Path.unlink
  yield "cut short", cut
  for part in (0.1, 0.5, 0.8):
    yield (
      f"flipped at {part}",
      lambda file, part=part: flip(file, int(part * file.stat().st_size)),
    )


# Orbax leaves the other reads of a tree behind when one of them fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_file_is_refused_or_changes_nothing(saved, tmp_path):
  files = [
    file.relative_to(saved)
    for file in (saved / "7").rglob("*")
    if file.is_file() and file.stat().st_size
  ]
  wanted = [
    np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(make_state())
  ]
  outcomes = {"refused": 0, "restored": 0}
  for number, file in enumerate(files):
    for name, damage in damages():
      if file.name == "commit_success.txt":
        continue  # Another test has it.
      folder = tmp_path / f"{number} {name}"
      shutil.copytree(saved / "7", folder / "7")
      damage(folder / file)
      try:
        state, meta = restore(folder)
      except ValueError as error:
        assert f"checkpoint {folder}/7 " in str(error), (file, name)
        assert "copy it again" in str(error)
        outcomes["refused"] += 1
        continue
      found = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]
      assert found == wanted, (file, name)
      assert meta == json.loads(json.dumps(META)), (file, name)
      outcomes["restored"] += 1
  # Some files are of no use to a reader. How many differs from save to save.
  assert min(outcomes.values()) > 10


def test_a_copy_that_has_not_ended_is_no_checkpoint(copied):
  (copied / "7" / "commit_success.txt").unlink()
  wanted = {"step": jnp.int32(0)}
  with pytest.raises(FileNotFoundError, match=r"/7 has no commit.*step.* 4$"):
    load_params(copied / "7", wanted)
  with pytest.raises(FileNotFoundError, match="not complete"):
    load_meta(copied / "7")
  assert load_params(copied, wanted)["step"] == 7
  with Checkpointer(copied, keep_last=2, keep_every=0) as checkpoints:
    assert checkpoints.all_steps() == [4]
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 7"):
      checkpoints.restore(7, make_state())


def test_a_changed_description_is_refused(copied):
  edit_meta(copied, lambda meta: meta.update(rollbacks=2))
  message = r"damaged: meta has the fingerprint \w+ but was saved with \w+;"
  with pytest.raises(ValueError, match=message):
    restore(copied)
  with pytest.raises(ValueError, match=message):
    load_meta(copied)


def test_a_checkpoint_of_an_older_version_is_read_with_a_warning(
  copied, caplog
):
  edit_meta(copied, lambda meta: meta.pop("fingerprints"))
  with caplog.at_level("WARNING", logger="absl"):
    state, meta = restore(copied)
  assert "has no fingerprints; it cannot be verified" in caplog.text
  assert meta == json.loads(json.dumps(META))
  np.testing.assert_array_equal(
    state["params"]["kernel"], make_state()["params"]["kernel"]
  )


def test_the_name_of_the_fingerprints_is_taken(tmp_path):
  with (
    Checkpointer(tmp_path, keep_last=1, keep_every=0) as checkpoints,
    pytest.raises(ValueError, match="give it another name"),
  ):
    checkpoints.save(1, make_state(), {"fingerprints": 3})
