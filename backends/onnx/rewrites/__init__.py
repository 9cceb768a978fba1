"""Rewrites of the exported graph: parts of it become the operators that ONNX has for them."""
