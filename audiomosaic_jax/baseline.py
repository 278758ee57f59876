"""The row to beat: statistics of log-mel frames and a logistic regression."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import threadpoolctl
from jaxtyping import Float
from sklearn import linear_model, metrics, multiclass, pipeline, preprocessing

from audiomosaic_jax import features, predict
from audiomosaic_jax.data import audio_io, supervised
from audiomosaic_jax.data.sources import Source

# Inverse strengths of the penalty to choose from on the validation clips.
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)


def log_mel_statistics(
  source: Source, fbank: ml_collections.ConfigDict
) -> predict.Windows:
  """Returns the mean and the standard deviation over the frames of each clip.

  Args:
    source: clips; one that a `TolerantSource` replaced is left out.
    fbank: arguments of `features.log_mel_fbank`.

  Returns:
    One row of 2 F numbers per clip: it is one window, however long.
  """
  shift = round(fbank.sample_rate_hz * fbank.frame_shift_ms / 1000)
  frame = round(fbank.sample_rate_hz * fbank.frame_length_ms / 1000)

  @jax.jit
  def moments(waveform, num_frames):
    fbanks = features.log_mel_fbank(waveform, **fbank)
    real = (jnp.arange(len(fbanks)) < num_frames)[:, None]
    mean = jnp.sum(fbanks, 0, where=real) / num_frames
    square = jnp.sum(jnp.square(fbanks - mean), 0, where=real) / num_frames
    return jnp.concatenate([mean, jnp.sqrt(square)])

  rows, clip = [], []
  for index in range(len(source)):
    element = source[index]
    if int(element["id"]) != index:
      continue
    # In 16 bits, as encoders hear it: the logarithm of what lies below tells
    # decoders apart, not sounds.
    pcm = audio_io.as_pcm16(element["waveform"])
    waveform = audio_io.pcm16_to_float(pcm)
    num_frames = max(1 + (len(waveform) - frame) // shift, 1)
    # Whole seconds, so that few lengths are compiled.
    whole = -len(waveform) % fbank.sample_rate_hz
    rows.append(moments(np.pad(waveform, (0, whole)), num_frames))
    clip.append(index)
  return predict.Windows(np.stack(rows), np.array(clip))


def logistic_regression(c: float, multi_label: bool):
  """Returns a classifier of standardised features, classes weighed alike."""
  model = linear_model.LogisticRegression(
    C=c, class_weight="balanced", max_iter=1000
  )
  if multi_label:
    model = multiclass.OneVsRestClassifier(model)
  return pipeline.make_pipeline(preprocessing.StandardScaler(), model)


def best(fit: Callable, values: Sequence, value_of: Callable):
  """Returns the model, `fit(value)` for one of the values, of highest value."""
  # Matrices this small are slower by ten times where threads share them.
  with threadpoolctl.threadpool_limits(1):
    return max(map(fit, values), key=value_of)


def log_mel_logits(
  splits: supervised.Splits, fbank: ml_collections.ConfigDict
) -> dict[str, predict.Windows]:
  """Returns test split -> logits of a regression of log-mel statistics.

  The strength of its penalty is the best on the validation clips, by balanced
  accuracy or, of several labels, mean average precision; 1 without such clips.
  A class without a training clip has the lowest logit of all.
  """
  sources = splits.named()
  stored = {name: log_mel_statistics(s, fbank) for name, s in sources.items()}

  def labels(name):
    return sources[name].labels[stored[name].clip]

  num_classes = len(splits.train.class_names)
  multi_label = splits.train.multi_hot

  def fit(c):
    model = logistic_regression(c, multi_label)
    return model.fit(stored["train"].rows, labels("train"))

  def value(model):
    rows = stored["valid"].rows
    if not multi_label:
      guess = model.predict(rows)
      return metrics.balanced_accuracy_score(labels("valid"), guess)
    present = labels("valid").any(0)
    return metrics.average_precision_score(
      labels("valid")[:, present], model.decision_function(rows)[:, present]
    )

  if splits.valid is None:
    chosen = best(fit, (1.0,), lambda model: 0.0)
  else:
    chosen = best(fit, STRENGTHS, value)
  known = chosen.classes_
  if multi_label:
    known = np.flatnonzero(labels("train").any(0))

  def logits(rows):
    decision = chosen.decision_function(rows)
    if multi_label:
      decision = decision[:, known]
    return _spread(decision, known, num_classes)

  return {
    name: predict.Windows(logits(stored[name].rows), stored[name].clip)
    for name in splits.tests
  }


def _spread(
  decision: np.ndarray, known: np.ndarray, num_classes: int
) -> Float[np.ndarray, "W C"]:
  """Returns a logit for every class; of two classes there is one decision."""
  if decision.ndim == 1:
    decision = np.stack([-decision, decision], axis=1) / 2
  logits = np.full((len(decision), num_classes), decision.min(initial=0.0))
  logits[:, known] = decision
  return logits
