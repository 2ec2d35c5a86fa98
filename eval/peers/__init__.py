"""kvcomm beside the engines people use: the same prompts over HTTP, in turns, on one machine.

The harness itself loads no model: every engine is a server in processes of its own, and what it costs is read from the
system's books. `python -m eval.peers --help` says what is measured; docs/peers.md says how to read it.
"""
