"""TFDS builders that pack audio into array_record files, without TensorFlow."""
