"""llama.cpp's own server out of the Python package xllamacpp, for machines that have no `llama-server`.

Runs under an interpreter that has that package and nothing of kvcomm:

    python llama_server.py MODEL.gguf PORT THREADS SLOTS CONTEXT_TOKENS
"""

from __future__ import annotations

import signal
import sys

import xllamacpp


def main() -> None:
    """Serve until a signal ends the process."""
    model, *numbers = sys.argv[1:]
    port, threads, slots, context = map(int, numbers)
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.hostnames = ["127.0.0.1"]
    params.port = port
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.n_parallel, params.kv_unified = slots, True
    params.n_ctx = context
    params.ui = False
    server = xllamacpp.Server(params)
    sys.stdout.write(f"{server.listening_address} {xllamacpp.get_system_info()}\n")
    sys.stdout.flush()
    signal.pause()


if __name__ == "__main__":
    main()
