"""State that outlives a request: pages, the radix tree over them, segments and their renditions.

Owners are `PagePool` (slots and reference counts), `RadixTree` (token paths to exact pages) and
`RenditionStore` (stored KV of segments, exact or not). Each has `check_integrity()`; none knows about requests or
models.
"""
