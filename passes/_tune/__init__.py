"""Tuning what is stored: blocks, the whole model, adapters."""
