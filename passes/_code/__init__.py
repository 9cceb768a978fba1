"""Coding weights: moments, the metric of errors, codebooks, codes, and what experts share."""
