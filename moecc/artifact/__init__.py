"""What compile leaves: a folder that transformers loads, with an account of every weight."""
