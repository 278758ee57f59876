"""How close captions are to what people wrote: CIDEr, BLEU and ROUGE-L.

All compare words, in lower case and without punctuation. Of a corpus: a metric
is defined over all clips together, and CIDEr weighs a phrase by how few clips
it is said of, so that scores of other clips are of another scale.

Reference: coco-caption, whose numbers of the same words are equal to 1e-9
relative; the published evaluation removes punctuation likewise.
"""

import collections
import math
import re
import shutil
from collections.abc import Callable, Sequence

import numpy as np

Captions = Sequence[str]
References = Sequence[Sequence[str]]
Counts = collections.Counter
NGRAMS = 4
# Of CIDEr's penalty on another length, and of ROUGE-L's weight on recall.
SIGMA, BETA = 6.0, 1.2
# What coco-caption adds so that nothing is divided by zero.
TINY, SMALL = 1e-15, 1e-9


def words(caption: str) -> list[str]:
  """Returns the words of a caption: lower case, no punctuation."""
  return re.sub(r"[^\w\s]", "", caption.lower()).split()


def measure(candidates: Captions, references: References) -> dict[str, float]:
  """Returns every metric of METRICS for a corpus.

  Args:
    candidates: a caption for each clip.
    references: those of people for each clip, one at least.

  Raises:
    ValueError: other numbers of clips, or a clip without a reference.
  """
  given = [words(caption) for caption in candidates]
  wanted = [[words(text) for text in texts] for texts in references]
  _check(given, wanted)
  found: dict[str, float] = {}
  for metric in METRICS:
    found |= metric(given, wanted)
  return found


def cider(
  candidates: Sequence[Sequence[str]],
  references: Sequence[Sequence[Sequence[str]]],
) -> np.ndarray:
  """Returns [n] CIDEr of each clip, 0 to 10; the corpus has their mean.

  Phrases of 1 to 4 words are vectors of tf-idf; a score is 10 times the mean
  over lengths and references of their cosine, in which a phrase counts no more
  often than in the reference, times exp(-d^2 / (2 SIGMA^2)) of the difference
  d of lengths.

  Args:
    candidates: words of a caption for each clip.
    references: words of captions for each clip.

  Reference: Vedantam et al. 2015 (arXiv 1411.5726), CIDEr-D as coco-caption
    computes it, which takes the number of word pairs for a caption's length.
  """
  cooked = [[_phrases(text) for text in texts] for texts in references]
  documents = Counts(
    phrase for texts in cooked for phrase in set().union(*texts)
  )
  log_count = math.log(len(references))

  def weigh(counts: Counts) -> list[dict]:
    vectors: list[dict] = [{} for _ in range(NGRAMS)]
    for phrase, count in counts.items():
      idf = log_count - math.log(max(1, documents[phrase]))
      vectors[len(phrase) - 1][phrase] = count * idf
    return vectors

  def similarity(candidate: Counts, reference: Counts) -> float:
    pairs = [_pairs(candidate), _pairs(reference)]
    penalty = math.exp(-((pairs[0] - pairs[1]) ** 2) / (2 * SIGMA**2))
    cosines = map(_clipped_cosine, weigh(candidate), weigh(reference))
    return penalty * sum(cosines) / NGRAMS

  return np.array(
    [
      10 * np.mean([similarity(_phrases(text), other) for other in texts])
      for text, texts in zip(candidates, cooked, strict=True)
    ]
  )


def bleu(
  candidates: Sequence[Sequence[str]],
  references: Sequence[Sequence[Sequence[str]]],
) -> list[float]:
  """Returns BLEU-1 to BLEU-4 of the corpus.

  BLEU-n is the geometric mean of the shares of phrases of 1 to n words that a
  reference has, too, times exp(1 - r / c) if all captions together, c words,
  are shorter than the references that are nearest in length, r words.

  Args:
    candidates: as of `cider`.
    references: as of `cider`.

  Reference: Papineni et al. 2002, as coco-caption computes it.
  """
  correct, guessed = np.zeros(NGRAMS), np.zeros(NGRAMS)
  length = closest = 0
  for text, texts in zip(candidates, references, strict=True):
    most = Counts()
    for other in texts:
      most |= _phrases(other)
    for phrase, count in (_phrases(text) & most).items():
      correct[len(phrase) - 1] += count
    guessed += [max(0, len(text) - n) for n in range(NGRAMS)]
    length += len(text)
    closest += min((abs(len(o) - len(text)), len(o)) for o in texts)[1]
  shares = np.cumprod((correct + TINY) / (guessed + SMALL))
  means = shares ** (1 / np.arange(1, NGRAMS + 1))
  ratio = (length + TINY) / (closest + SMALL)
  return (means * (math.exp(1 - 1 / ratio) if ratio < 1 else 1)).tolist()


def rouge_l(
  candidates: Sequence[Sequence[str]],
  references: Sequence[Sequence[Sequence[str]]],
) -> np.ndarray:
  """Returns [n] ROUGE-L of each clip; the corpus has their mean.

  With P and R the longest common subsequence over the words of caption and
  reference, each the best over references: (1 + b^2) P R / (R + b^2 P), b 1.2.

  Args:
    candidates: as of `cider`.
    references: as of `cider`.

  Reference: Lin 2004, as coco-caption computes it, which takes an empty
    caption for one word that no reference has.
  """

  def score(text, texts):
    common = [_longest_common(text, other) for other in texts]
    precision = max(common) / max(1, len(text))
    recall = max(
      c / max(1, len(other)) for c, other in zip(common, texts, strict=True)
    )
    if not precision:
      return 0.0
    weight = BETA**2
    return (1 + weight) * precision * recall / (recall + weight * precision)

  return np.array(list(map(score, candidates, references)))


def spice(candidates: Captions, references: References) -> float:
  """Returns SPICE of the corpus, by pycocoevalcap and the Java it calls.

  Its parser is downloaded when it runs for the first time.

  Args:
    candidates: a caption for each clip.
    references: those of people for each clip.

  Raises:
    ValueError: the package or Java is missing; no other number stands in.
  """
  try:
    from pycocoevalcap.spice.spice import Spice
  except ImportError as error:
    raise ValueError("SPICE needs `pip install pycocoevalcap`") from error
  if shutil.which("java") is None:
    raise ValueError("SPICE needs Java 8 as the command `java`")
  value, _ = Spice().compute_score(
    dict(enumerate(references)), {i: [c] for i, c in enumerate(candidates)}
  )
  return float(value)


def _phrases(text: Sequence[str]) -> Counts:
  """Returns how often each phrase of 1 to NGRAMS words is said."""
  return Counts(
    tuple(text[start : start + n])
    for n in range(1, NGRAMS + 1)
    for start in range(len(text) - n + 1)
  )


def _pairs(counts: Counts) -> int:
  return sum(count for phrase, count in counts.items() if len(phrase) == 2)


def _clipped_cosine(candidate: dict, reference: dict) -> float:
  shared = math.fsum(
    min(weight, reference[phrase]) * reference[phrase]
    for phrase, weight in candidate.items()
    if phrase in reference
  )
  norms = [math.hypot(*vector.values()) for vector in (candidate, reference)]
  return shared / (norms[0] * norms[1]) if all(norms) else shared


def _longest_common(a: Sequence[str], b: Sequence[str]) -> int:
  """Returns the length of the longest common subsequence."""
  row = [0] * (len(b) + 1)
  for word in a:
    above = row
    row = [0]
    for place, other in enumerate(b):
      row.append(
        above[place] + 1 if word == other else max(above[place + 1], row[place])
      )
  return row[-1]


def _check(candidates: Sequence, references: Sequence) -> None:
  if len(candidates) != len(references) or not candidates:
    raise ValueError(
      f"{len(candidates)} captions but {len(references)} lists of references; "
      "give one of each for every clip, and a clip at least"
    )
  for number, texts in enumerate(references):
    if not texts:
      raise ValueError(f"clip {number} has no reference; leave it out")


def _corpus_cider(candidates, references):
  return {"cider": float(cider(candidates, references).mean())}


def _corpus_bleu(candidates, references):
  values = bleu(candidates, references)
  return {f"bleu_{n}": value for n, value in enumerate(values, 1)}


def _corpus_rouge(candidates, references):
  return {"rouge_l": float(rouge_l(candidates, references).mean())}


# (words of candidates, words of references) -> name -> value of the corpus.
METRICS: tuple[Callable[..., dict[str, float]], ...] = (
  _corpus_cider,
  _corpus_bleu,
  _corpus_rouge,
)
