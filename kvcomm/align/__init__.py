"""Approximate reuse: moving KV to another context, correcting it, and knowing how far it may be trusted."""
