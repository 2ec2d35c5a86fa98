"""KV events: routers are told which prefixes are cached here, in the words of vLLM.

From the inside out: `blocks` names blocks of tokens as vLLM does, `announcer` turns what the radix tree tells into
vLLM's events, `wire` makes bytes of them, `publisher` sends those, and `feed` is the thread that drives all of it. Only
what is in the tree is announced, and only exact KV ever is.
"""
