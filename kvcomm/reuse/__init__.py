"""Approximate reuse: what of a prompt is moved, at which rung, on what grounds, and what is learned from it."""
