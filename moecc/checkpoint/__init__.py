"""Tensors on disk, read when they are asked for."""
