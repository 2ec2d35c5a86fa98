"""Other methods: those that move KV run on the same kernels and the same engine, so that differences are the methods'.

`stock` is what there is without kvcomm: transformers alone, on the same weights and the same token ids.
"""
