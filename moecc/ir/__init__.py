"""The IR: programs, experts nodes, ops, gates and the format of compressed experts."""
