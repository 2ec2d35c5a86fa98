"""A load generator: workloads, a client that streams and takes the time, and what its times add up to.

It knows a server only by its URL, so any server with OpenAI's chat endpoint can be measured; nothing of the server's
own code is imported. Names of options and figures are those of the benchmarks of vLLM and SGLang.
"""
