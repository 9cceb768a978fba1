"""From a transformers model to a program."""
