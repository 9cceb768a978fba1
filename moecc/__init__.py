"""moecc: a compiler for Mixture-of-Experts language models."""

__version__ = "0.1.0"

from moecc import hf as hf  # registers the artifact format with transformers
