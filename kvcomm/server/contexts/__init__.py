"""Contexts over HTTP: what a tenant keeps, what its messages continue, and files of it."""
