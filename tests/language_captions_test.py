"""Captions are measured as coco-caption measures them."""

import json
import pathlib
import sys
import types

import numpy as np
import pytest

from audiomosaic_jax.language import captions

GOLDEN = json.loads(
  (pathlib.Path(__file__).parent / "golden" / "captions.json").read_text()
)
CANDIDATES = [clip["candidate"] for clip in GOLDEN["clips"]]
REFERENCES = [clip["references"] for clip in GOLDEN["clips"]]


def cut(texts):
  return [captions.words(text) for text in texts]


def test_every_metric_is_that_of_coco_caption():
  found = captions.measure(CANDIDATES, REFERENCES)
  expected = {
    "cider": GOLDEN["cider"],
    **{f"bleu_{n}": value for n, value in enumerate(GOLDEN["bleu"], 1)},
    "rouge_l": GOLDEN["rouge_l"],
  }
  assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", ["cider", "rouge_l"])
def test_every_clip_has_the_score_that_coco_caption_gives_it(name):
  metric = getattr(captions, name)
  found = metric(cut(CANDIDATES), [cut(texts) for texts in REFERENCES])
  np.testing.assert_allclose(found, GOLDEN[f"{name}_each"], rtol=1e-9)


def test_case_and_punctuation_do_not_count():
  loud = [f"{text.upper()}!" for text in CANDIDATES]
  found = captions.measure(loud, REFERENCES)
  assert found == captions.measure(CANDIDATES, REFERENCES)


def test_what_people_wrote_is_best_and_other_words_are_worst():
  texts = [
    "a dog barks in the yard",
    "rain falls on a tin roof",
    "a bell rings",
  ]
  references = [[text] for text in texts]
  best = captions.measure(texts, references)
  # Three words have no phrase of four.
  assert best["cider"] == pytest.approx((10 + 10 + 7.5) / 3)
  worst = captions.measure(["x y z w v"] * 3, references)
  assert best["bleu_4"] == pytest.approx(1) == best["rouge_l"]
  assert worst["cider"] == 0 == worst["rouge_l"]


@pytest.mark.parametrize(
  ("candidates", "references", "message"),
  [
    (["a"], [["a"], ["b"]], "1 captions but 2 lists of references"),
    ([], [], "0 captions but 0 lists"),
    (["a", "b"], [["a"], []], "clip 1 has no reference"),
  ],
)
def test_captions_without_references_are_refused(
  candidates, references, message
):
  with pytest.raises(ValueError, match=message):
    captions.measure(candidates, references)


def test_spice_says_what_it_lacks(monkeypatch):
  with pytest.raises(ValueError, match="pip install pycocoevalcap"):
    captions.spice(["a dog"], [["a dog"]])
  module = types.ModuleType("pycocoevalcap.spice.spice")
  module.Spice = None
  monkeypatch.setitem(sys.modules, "pycocoevalcap", types.ModuleType("p"))
  monkeypatch.setitem(sys.modules, "pycocoevalcap.spice", types.ModuleType("s"))
  monkeypatch.setitem(sys.modules, "pycocoevalcap.spice.spice", module)
  monkeypatch.setattr(captions.shutil, "which", lambda name: None)
  with pytest.raises(ValueError, match="needs Java 8"):
    captions.spice(["a dog"], [["a dog"]])
