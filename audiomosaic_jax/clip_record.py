"""Which clips a job began with, so that it goes on and is tested with them.

A folder that is cut into splits is cut otherwise when a clip comes or goes. A
classifier would then be tested on clips that it was trained on.
"""

import hashlib
import json
import pathlib
from collections.abc import Iterable

import jax

from audiomosaic_jax import files
from audiomosaic_jax.data import supervised

FILE = "clips.json"


def digest(ids: Iterable[str]) -> str:
  """Returns a hash of names of clips, in any order."""
  text = "\n".join(sorted(ids))
  # Names of files need not be text.
  return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def check(
  splits: supervised.Splits,
  workdir: pathlib.Path,
  fold: int,
  *,
  begun: pathlib.Path,
) -> None:
  """Notes the clips of a fold, or finds that they are those that were noted.

  Args:
    splits: of the fold.
    workdir: of the job, where `FILE` is.
    fold: from 0.
    begun: exists if something was trained; what was noted holds only then.

  Raises:
    ValueError: they are others.
  """
  path, name = workdir / FILE, str(fold)
  noted = json.loads(path.read_text()) if path.exists() else {}
  found = {
    split: {"clips": len(source), "sha256": digest(source.ids)}
    for split, source in splits.named().items()
  }
  if begun.exists() and noted.get(name, found) != found:
    changed = [
      f"{split} had {noted[name].get(split, {}).get('clips', 0)} clips, has "
      f"{found.get(split, {}).get('clips', 0)}, not the same"
      for split in noted[name] | found
      if noted[name].get(split) != found.get(split)
    ]
    raise ValueError(
      f"the clips are not those that {workdir} was trained with: "
      f"{'; '.join(changed)}. It would be tested on clips that it knows: give "
      f"the clips it began with, another --workdir, or remove {begun} to train "
      "anew"
    )
  if noted.get(name) != found and jax.process_index() == 0:
    workdir.mkdir(parents=True, exist_ok=True)
    files.write_text(path, json.dumps(noted | {name: found}, indent=2) + "\n")
