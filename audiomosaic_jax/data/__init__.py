"""Host data: audio files to batches of 16-bit waveforms. Never imports jax."""
