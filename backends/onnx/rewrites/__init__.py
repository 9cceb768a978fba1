"""Rewrites of the exported graph: parts of it that ONNX has an operator for."""
