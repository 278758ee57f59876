"""What others report for closed-ended sets and captions, in percent.

Reference: LTU-7B from its paper (Gong et al. 2024, arXiv 2305.10790);
AudioMosaic-LTU from the paper of AudioMosaic. Both let the model write an
answer and compare it with the labels by OpenAI's text-embedding-ada-002,
which needs a network and a key; nothing here does.
"""

MODELS = ("AudioMosaic-LTU", "LTU-7B")
CLOSED_ENDED = {
  "esc50": (86.5, 83.1),
  "dcase17": (48.9, 45.9),
  "vocalsound": (68.2, 55.6),
  "tut17": (25.0, 32.5),
  "beijing_opera": (66.1, 69.9),
  "vggsound": (54.6, 50.3),
  "fsd50k": (46.9, 46.3),
  "audioset": (21.0, 18.7),
}
# SPICE, which only `captions.spice` computes.
CAPTIONS = {"audiocaps": (17.1, 17.0), "clotho": (12.5, 11.9)}

NOT_COMPARABLE = """\
Published figures compare a written answer with the labels by OpenAI's
text-embedding-ada-002. The scorer here is {scorer}: the figures stand side by
side, but they do not measure the same."""
