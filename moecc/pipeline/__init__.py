"""What passes are, in which order they run, and running them."""
