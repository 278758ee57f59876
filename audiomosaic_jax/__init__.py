"""AudioMosaic in JAX: contrastive masked audio representation learning."""


def __getattr__(name: str):
  # JAX is imported when an encoder is loaded, not by every data worker.
  if name == "load_encoder":
    from audiomosaic_jax.encoder_files import load_encoder

    return load_encoder
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
