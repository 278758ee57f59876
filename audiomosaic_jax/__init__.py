"""AudioMosaic in JAX: contrastive masked audio representation learning."""
