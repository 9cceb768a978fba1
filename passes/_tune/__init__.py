"""Tuning stored tensors: block by block, over the whole model, and by adapters."""
