"""kvcomm in vLLM: exact KV from a shared tier, and segments moved within a bound, through vLLM's connector interface.

`params` says what a request may carry, `adapter` holds every private name of vLLM. Nothing here is imported by the rest
of the package, and only `adapter`, `connector` and `worker` import vLLM.
"""
