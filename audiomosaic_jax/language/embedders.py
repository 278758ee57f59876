"""What turns texts into vectors, on this machine: name -> texts -> [n, D]."""

import pathlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from audiomosaic_jax.language import chat
from audiomosaic_jax.models import lora
from audiomosaic_jax.models.llama import causal_mask, positions_of

Embedder = Callable[[Sequence[str]], np.ndarray]
LLAMA = "llama"


def open_embedder(name: str, talker: chat.Chat) -> Embedder:
  """Returns an embedder of texts.

  Args:
    name: "llama", or the folder of a model of sentence-transformers.
    talker: whose base "llama" is.

  Raises:
    FileNotFoundError: there is no such folder.
    ValueError: sentence-transformers is not installed.
  """
  if name == LLAMA:
    return lambda texts: _by_llama(talker, texts)
  folder = pathlib.Path(name).expanduser()
  if not folder.is_dir():
    raise FileNotFoundError(
      f"evaluation.embedder {name} is no folder; download a model of "
      "sentence-transformers there, or use 'llama'"
    )
  try:
    import sentence_transformers
  except ImportError as error:
    raise ValueError(
      f"evaluation.embedder {name} needs `pip install sentence-transformers`"
    ) from error
  model = sentence_transformers.SentenceTransformer(
    str(folder), local_files_only=True, trust_remote_code=False
  )
  return lambda texts: np.asarray(model.encode(list(texts)))


def _by_llama(talker: chat.Chat, texts: Sequence[str]) -> np.ndarray:
  """Returns the mean over tokens of the base's last hidden states."""
  llama = talker.model.llama
  adapters, base = lora.split(talker.params["llama"])
  silent = jax.tree.map(jnp.zeros_like, adapters)
  params = {"params": lora.join(silent, base)}
  tokenizer = talker.tokenizer
  rows = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in texts]
  length = max(map(len, rows))

  @jax.jit
  def embed(ids, valid):
    embeds = llama.apply(params, ids, method="embed")
    decoded = llama.apply(
      params, embeds, positions_of(valid), causal_mask(valid), train=False
    )
    hidden = decoded.hidden.astype(jnp.float32)
    return hidden.mean(axis=1, where=valid[:, :, None])

  found = []
  for row in rows:
    ids = np.zeros((1, length), np.int32)
    ids[0, : len(row)] = row
    valid = np.arange(length)[None] < len(row)
    found.append(np.asarray(embed(jnp.asarray(ids), jnp.asarray(valid)))[0])
  return np.stack(found)
