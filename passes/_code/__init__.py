"""Coding weights: moments, the metric of errors, codebooks, codes, and parts that experts share."""
