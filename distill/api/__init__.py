"""The Python interface; `distill` itself has the names."""
