"""C++ sources, compiled once per machine."""
