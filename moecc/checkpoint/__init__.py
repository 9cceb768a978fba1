"""Tensors on disk, read on demand."""
