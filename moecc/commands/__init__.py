"""A file per command, each a function that the command line and Python programs call."""
