"""A server of completions without a model, for `eval.peers`: `python fake_engine.py PORT [broken|busy|dead|child]`.

It says the number of its prompt's tokens as often as tokens are wanted. broken: every answer but the first is an error.
busy: it works without being asked. dead: it ends at once. child: another process of it answers and outlives it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Handler(BaseHTTPRequestHandler):
    """Answers as an engine does."""

    num_answers = 0
    way = ""

    def do_GET(self) -> None:
        self._send(200, json.dumps({"data": [{"id": "fake"}]}))

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        Handler.num_answers += 1
        if Handler.way == "broken" and Handler.num_answers > 1:
            self._send(500, "it broke")
            return
        num = len(asked["prompt"])
        events: list[dict[str, Any]] = [{"choices": [{"text": f"{num} "}]}] * asked["max_tokens"]
        usage = {"prompt_tokens": num, "completion_tokens": asked["max_tokens"]}
        events.append({"choices": [{"text": "", "finish_reason": "length"}], "usage": usage})
        self._send(200, "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n")

    def _send(self, status: int, content: str) -> None:
        body = content.encode()
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing."""


def work() -> None:
    """Without an end."""
    while True:
        sum(range(10_000))


def main() -> None:
    """Serve until the process ends."""
    port, way = sys.argv[1], (sys.argv[2:] or [""])[0]
    sys.stdout.write(f"this is a fake, {way}\n")
    sys.stdout.flush()
    if way == "dead":
        sys.exit(3)
    if way == "child":
        subprocess.Popen([sys.executable, __file__, port])
        threading.Event().wait()
    if way == "busy":
        threading.Thread(target=work, daemon=True).start()
    Handler.way = way
    ThreadingHTTPServer(("127.0.0.1", int(port)), Handler).serve_forever()


if __name__ == "__main__":
    main()
