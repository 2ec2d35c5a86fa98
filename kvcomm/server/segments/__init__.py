"""Segments over HTTP: how requests bring them, how they are joined, where named ones are kept."""
