"""Values between the tests and a program that is not trusted: frames of JSON in which Python's types survive.

What can be passed: None, bool, int of any size, float, complex, str with any code points, bytes, list, tuple, set,
frozenset, dict with any such keys, bytearray, deque, range, Decimal, Fraction, the views of a dict; and from the
program also iterators, which stay there and are asked item by item. Objects of a subclass arrive as what the base
class holds, so no method of theirs, such as an `__eq__` that always agrees, ever comes to the reader.

A message is a table of nodes and values that refer to them, so that two references to one list stay two references to
one list, and cycles can be passed. The answer to a call begins with the nodes of the call: their contents are written
back into the caller's own lists, dicts and sets, as if the function had run in the caller's process.

Reading builds exact built-in types and nothing else; whatever is out of shape is a `WireError`.
"""

import json
import os
import struct
from collections import deque
from decimal import Decimal
from fractions import Fraction

MAX_FRAME = 16 << 20
"""Bytes of one message."""
_SMALL = 1 << 53
_LENGTH = struct.Struct(">I")


class WireError(Exception):
    """A message has a shape that it must not have, or a value cannot be passed."""


class Closed(Exception):
    """Nobody is at the other end any more."""


def send(fd, message):
    """Write one message."""
    content = json.dumps(message, separators=(",", ":")).encode("ascii")
    if len(content) > MAX_FRAME:
        raise WireError(f"a message of {len(content)} bytes is more than {MAX_FRAME}")
    left = memoryview(_LENGTH.pack(len(content)) + content)
    while left:
        try:
            left = left[os.write(fd, left) :]
        except BrokenPipeError:
            raise Closed from None


def receive(fd):
    """Read one message."""
    (length,) = _LENGTH.unpack(_read(fd, _LENGTH.size))
    if length > MAX_FRAME:
        raise WireError(f"a message of {length} bytes is more than {MAX_FRAME}")
    try:
        return json.loads(_read(fd, length))
    except (ValueError, RecursionError):
        raise WireError("a message is not JSON") from None


def _read(fd, count):
    parts = []
    while count:
        part = os.read(fd, min(count, 1 << 20))
        if not part:
            raise Closed
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


_VIEWS = {"keys": type({}.keys()), "values": type({}.values()), "items": type({}.items())}
_MUTABLE = {"list": list, "dict": dict, "set": set, "bytearray": bytearray, "deque": deque}
_IMMUTABLE = {"tuple": tuple, "frozenset": frozenset, **_VIEWS}
_KINDS = {type_: kind for kind, type_ in (_MUTABLE | _IMMUTABLE).items()}
_PLAIN = (bool, int, float, complex, str, bytes, range, Decimal, Fraction)


class Writer:
    """Turns objects into values and nodes.

    Args:
        known: the objects of a table that the reader has; they keep their places, and what is new in them is written.
        before: the nodes of that table.
        keep: takes an iterator and gives its number; None: iterators cannot be passed.
    """

    def __init__(self, known=(), before=(), keep=None):
        self.objects = list(known)  # holds them: an id is of no use once its object is gone
        self.nodes = [None] * len(self.objects)
        self._before = before
        self._places = {id(each): place for place, each in enumerate(self.objects)}
        self._keep = keep
        self._open = [place for place, each in enumerate(self.objects) if _kind_of(type(each)) in _MUTABLE]

    def value(self, x):
        """The value that stands for an object; `finish` has to be called before `nodes` is complete.

        Raises:
            WireError: an object of this type cannot be passed.
        """
        type_ = type(x)
        if x is None or type_ is bool:
            return x
        for base in type_.__mro__:
            if base in _KINDS:
                return ["ref", self._place(x, _KINDS[base])]
            if base in _PLAIN:
                return _WRITE[base](x)
        if self._keep is not None and hasattr(type_, "__next__") and hasattr(type_, "__iter__"):
            return ["iterator", self._keep(x)]
        raise WireError(f"a value of the type {type_.__name__} cannot be passed")

    def finish(self):
        """Write what is in lists, dicts and sets that were met; the finished table."""
        while self._open:
            place = self._open.pop()
            x = self.objects[place]
            kind = _kind_of(type(x))
            node = [kind, self._contents(x, kind)]
            # Their reprs, because as values 1, 1.0 and True are the same.
            is_old = place < len(self._before) and repr(node) == repr(self._before[place])
            self.nodes[place] = None if is_old else node
        return self.nodes

    def _place(self, x, kind):
        known = self._places.get(id(x))
        if known is not None:
            return known
        # What is in a tuple has to stand before it; what is in a list may come later, and may be the list itself.
        node = [kind, self._contents(x, kind)] if kind in _IMMUTABLE else None
        place = self._places[id(x)] = len(self.objects)
        self.objects.append(x)
        self.nodes.append(node)
        if node is None:
            self._open.append(place)
        return place

    def _contents(self, x, kind):
        if kind == "bytearray":
            return bytes(x).hex()
        if kind == "dict":
            return [self.value(each) for pair in dict.items(x) for each in pair]
        if kind == "items":
            return [self.value(each) for pair in x for each in pair]
        if kind == "deque":
            return [deque.maxlen.__get__(x), *map(self.value, deque.__iter__(x))]
        type_ = (_MUTABLE | _IMMUTABLE)[kind]
        return [self.value(each) for each in type_.__iter__(x)]


_OUT_OF_SHAPE = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError)
"""What building of a message raises that no `Writer` has written."""


class Reader:
    """Turns a table of nodes and its values into objects.

    Args:
        nodes: the table, as it was received.
        known: the objects of the table's beginning, which are there already; lists, dicts and sets get new contents.
        make_iterator: gives an iterator for a number; None: there are none.

    Raises:
        WireError: something is out of shape.
    """

    def __init__(self, nodes, known=(), make_iterator=None):
        self._make_iterator = make_iterator
        _require(type(nodes) is list and len(nodes) >= len(known), "the table is too short")
        self.objects = list(known)
        new = nodes[len(known) :]
        for node in new:
            _require(type(node) is list and len(node) == 2 and type(node[0]) is str, "a node is out of shape")
            _require(node[0] in _MUTABLE or node[0] in _IMMUTABLE, "a node is of no known kind")
        try:
            self.objects += [self._begun(*node) for node in new]
            for place, (kind, content) in enumerate(new, start=len(known)):
                if kind in _IMMUTABLE:
                    self.objects[place] = self._immutable(kind, content)
            for x, node in zip(self.objects, nodes, strict=True):
                kind = _kind_of(type(x))
                if kind in _MUTABLE and node is not None:
                    _require(type(node) is list and len(node) == 2 and node[0] == kind, "a node changed its kind")
                    self._fill(x, kind, node[1])
        except _OUT_OF_SHAPE as error:
            raise WireError(f"a node is out of shape ({type(error).__name__})") from None

    def value(self, v):
        """The object for which a value stands."""
        if v is None or type(v) in (bool, int, float, str):
            return v
        _require(type(v) is list and len(v) >= 2 and type(v[0]) is str, "a value is out of shape")
        tag, *parts = v
        try:
            if tag == "ref":
                (place,) = parts
                _require(type(place) is int and 0 <= place < len(self.objects), "a value refers to no node")
                _require(self.objects[place] is not _Missing, "a tuple stands before what is in it")
                return self.objects[place]
            if tag == "iterator" and self._make_iterator is not None:
                (number,) = parts
                _require(type(number) is int, "an iterator has no number")
                return self._make_iterator(number)
            return _READ[tag](*parts)
        except _OUT_OF_SHAPE:
            raise WireError("a value is out of shape") from None

    def _begun(self, kind, content):
        if kind == "deque":
            return deque(maxlen=content[0])
        return _MUTABLE[kind]() if kind in _MUTABLE else _Missing

    def _values(self, content):
        _require(type(content) is list, "a node's contents are out of shape")
        return [self.value(each) for each in content]

    def _pairs(self, content):
        values = self._values(content)
        return zip(values[::2], values[1::2], strict=True)

    def _immutable(self, kind, content):
        if kind == "keys":
            return dict.fromkeys(self._values(content)).keys()
        if kind == "values":
            return dict(enumerate(self._values(content))).values()
        if kind == "items":
            return dict(self._pairs(content)).items()
        return _IMMUTABLE[kind](self._values(content))

    def _fill(self, x, kind, content):
        if kind == "bytearray":
            x[:] = bytes.fromhex(content)
        elif kind == "list":
            x[:] = self._values(content)
        elif kind == "deque":
            values = self._values(content[1:])
            x.clear()
            x.extend(values)
        else:
            pairs_or_values = dict(self._pairs(content)) if kind == "dict" else self._values(content)
            x.clear()
            x.update(pairs_or_values)


class _Missing:
    """Stands where a tuple will be once what is in it is there."""


def _kind_of(type_):
    return next((_KINDS[base] for base in type_.__mro__ if base in _KINDS), None)


def _require(holds, text):
    if not holds:
        raise WireError(text)


def _write_int(x):
    number = int.__index__(x)
    return number if -_SMALL < number < _SMALL else ["int", f"{number:x}"]


def _write_str(x):
    text = str.__str__(x)
    # JSON cannot tell a pair of surrogates from the character that they make.
    has_surrogates = any("\ud800" <= char <= "\udfff" for char in text)
    return ["str", text.encode("utf-8", "surrogatepass").hex()] if has_surrogates else text


_WRITE = {
    int: _write_int,
    float: float.__float__,
    complex: lambda x: ["complex", x.real, x.imag],
    str: _write_str,
    bytes: lambda x: ["bytes", bytes.hex(x)],
    range: lambda x: ["range", *map(_write_int, (x.start, x.stop, x.step))],
    Decimal: lambda x: ["decimal", Decimal.__str__(x)],
    Fraction: lambda x: ["fraction", _write_int(x.numerator), _write_int(x.denominator)],
}


def _read_int(v):
    return v if type(v) is int else _READ["int"](*v[1:])


def _floats(*parts):
    if any(type(each) is not float for each in parts):
        raise TypeError(parts)
    return parts


_READ = {
    "int": lambda text: int(text, 16),
    "str": lambda text: bytes.fromhex(text).decode("utf-8", "surrogatepass"),
    "bytes": bytes.fromhex,
    "complex": lambda real, imag: complex(*_floats(real, imag)),
    "range": lambda *parts: range(*map(_read_int, parts)),
    "decimal": Decimal,
    "fraction": lambda *parts: Fraction(*map(_read_int, parts)),
}
