"""One answer made of those of all replicas."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from kvcomm.integrations.ray.messages import Headers, Whole

SAMPLE = re.compile(rb"([A-Za-z_:][A-Za-z0-9_:]*)(?:\{(.*)\})?( .*)")
LENGTHS = frozenset({b"content-length", b"etag"})


def listed(answers: Sequence[Whole]) -> Whole:
    """Lists of the shape `{"data": [...]}` behind one another."""
    lists = [json.loads(each.body) for each in answers]
    joined = {**lists[0], "data": [item for each in lists for item in each["data"]]}
    return _with_body(answers[0], json.dumps(joined, ensure_ascii=False, separators=(",", ":")).encode())


def metrics_of(answers: Sequence[Whole]) -> Whole:
    """Prometheus's text format: every sample of every replica, under its name in the label `replica`."""
    families: dict[bytes, list[bytes]] = {}
    for each in sorted(answers, key=lambda each: each.replica):
        about = b""
        for line in each.body.splitlines():
            if line.startswith(b"# "):
                about = line.split(b" ", 3)[2]
                if line not in families.setdefault(about, []):
                    families[about].append(line)
            elif line:
                families.setdefault(about, []).append(_labelled(line, each.replica.encode()))
    body = b"".join(line + b"\n" for lines in families.values() for line in lines)
    return _with_body(answers[0], body)


def _labelled(line: bytes, replica: bytes) -> bytes:
    found = SAMPLE.fullmatch(line)
    if found is None:
        return line
    name, labels, rest = found.groups()
    more = b"," + labels if labels else b""
    return name + b'{replica="' + replica + b'"' + more + b"}" + rest


def _with_body(answer: Whole, body: bytes) -> Whole:
    headers: Headers = [(name, value) for name, value in answer.headers if name.lower() not in LENGTHS]
    return answer._replace(headers=[*headers, (b"content-length", str(len(body)).encode())], body=body)
