"""The HTTP server: an OpenAI-compatible surface over one engine, for many tenants.

Every surface (chat, completions, models, health, metrics, admin) is a small file with a router of its own; `app.py`
puts them together. What they share stands in `state.py`. Needs the extra `server`; nothing outside this package and
`kvcomm serve` imports it.
"""
