"""Random operations on the engine's public API while exceptions are thrown into it, held against cold runs."""
