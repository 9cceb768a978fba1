"""Passes: their interface, their order, and running them."""
