"""What every room speaks about: programs, experts nodes, ops, gates and the format of compressed experts."""
