"""A model as the rest of kvcomm sees it: where it comes from, what its KV means, and how runs are computed.

Owns fetching and loading (`packaged`, `loading`), identity (`weights`, `namespace`), geometry and the runner.
Knows nothing about page ownership, trees, requests or agents. Importing this package imports neither torch
nor transformers; its modules do.
"""
