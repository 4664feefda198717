"""Values as text: what a function was given and what it returned, in a form that can carry nothing but values.

Generated programs run in one process and are judged in another. Between the two goes JSON, in which what JSON does not
know is an object of one key: its kind. The kinds are a closed set, made of their parts by the code below, so whatever a
program sends, the judge gets plain values whose comparison runs no code of the program's. Pickle and marshal cannot
promise that. An instance of a class of the program's own arrives as what it inherits from (a namedtuple is a tuple, an
``IntEnum`` an int), or as `Unknown`, which equals nothing.

A long list is not sent at all where a `digest` of it shows that it is the expected one: some are of gigabytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import marshal
import sys
from array import array
from base64 import b64decode, b64encode
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

PLAIN = frozenset({type(None), bool, int, float, str})
LARGE = 2**63  # Python refuses to read or write very long integers in decimal
LONG = 50_000  # elements


class Unknown:
    """Something that was returned, but nothing that any expected output can equal."""


def dumps(value: Any) -> bytes:
    """Raises RecursionError where values are nested too deeply or contain themselves."""
    return json.dumps(_encoded(value), separators=(",", ":")).encode()


def loads(text: bytes) -> Any:
    """Raises an exception of whatever class if the text was not made by `dumps`."""
    return json.loads(text, object_hook=_decoded)


def digest(value: Any) -> bytes | None:
    """Of a long list of plain values; equal digests mean equal values of equal classes. None of anything else."""
    if type(value) is not list or len(value) < LONG:
        return None
    found = hashlib.sha256()
    try:
        for start in range(0, len(value), LONG):
            found.update(_bytes(value[start : start + LONG]))
    except ValueError:
        return None
    return found.digest()


def _bytes(values: list[Any]) -> bytes:
    """The same for equal values of equal classes alone. Raises ValueError if there is more than plain values."""
    if set(map(type, values)) == {tuple}:
        with contextlib.suppress(TypeError):  # tuples of text alone: one MBPP problem has a hundred million
            text = "\0".join(map("\1".join, values))
            return b"t" + array("q", map(len, values)).tobytes() + text.encode("utf-8", "surrogatepass")
    return b"m" + marshal.dumps(values, 0)  # the version that depends on nothing but values


def _encoded(value: Any) -> Any:
    kind = type(value)
    if kind in PLAIN and not (kind is int and abs(value) >= LARGE):
        return value
    if kind is list:
        return _encoded_list(value)
    if (numbers := _encoded_numpy(value)) is not None:
        return numbers
    for known in kind.__mro__:
        if known in ENCODE:
            name, parts = ENCODE[known]
            return {name: parts(value)}
    return {"unknown": None}


def _encoded_list(values: list[Any]) -> Any:
    """Quickly if all are plain."""
    kinds = set(map(type, values))
    if kinds <= PLAIN and not (int in kinds and any(abs(value) >= LARGE for value in values if type(value) is int)):
        return values
    return [_encoded(value) for value in values]


def _encoded_numpy(value: Any) -> Any:
    numpy = sys.modules.get("numpy")
    if numpy is None or not isinstance(value, numpy.generic | numpy.ndarray) or value.dtype.kind not in "biufc":
        return None
    return {"numpy": [value.dtype.str, list(value.shape), b64encode(value.tobytes()).decode()]}


def _all(values: Any) -> list[Any]:
    return _encoded_list(list(values))


def _pairs(values: Any) -> list[Any]:
    return [[_encoded(key), _encoded(value)] for key, value in values.items()]


ENCODE: dict[type, tuple[str, Callable[[Any], Any]]] = {
    str: ("str", str.__str__),
    float: ("float", float.__float__),
    int: ("int", lambda value: hex(int(value))),
    complex: ("complex", lambda value: [value.real, value.imag]),
    bytes: ("bytes", lambda value: b64encode(value).decode()),
    bytearray: ("bytearray", lambda value: b64encode(value).decode()),
    list: ("list", _all),
    tuple: ("tuple", _all),
    set: ("set", _all),
    frozenset: ("frozenset", _all),
    type({}.keys()): ("set", _all),  # they equal sets
    type({}.items()): ("set", _all),
    Counter: ("Counter", _pairs),
    OrderedDict: ("OrderedDict", _pairs),
    defaultdict: ("defaultdict", _pairs),
    dict: ("dict", _pairs),
    Decimal: ("Decimal", str),
    Fraction: ("Fraction", lambda value: [hex(value.numerator), hex(value.denominator)]),
}


def _decoded(found: dict[str, Any]) -> Any:
    ((name, parts),) = found.items()
    return DECODE[name](parts)


def _numpy(parts: list[Any]) -> Any:
    import numpy

    name, shape, packed = parts
    kind = numpy.dtype(str(name))
    if kind.kind not in "biufc":
        raise ValueError(f"{name} is no kind of number")
    return numpy.frombuffer(b64decode(packed), kind).reshape(shape)[()]  # a scalar where there are no dimensions


DECODE: dict[str, Callable[[Any], Any]] = {
    "str": str,
    "float": float,
    "int": lambda parts: int(parts, 16),
    "complex": lambda parts: complex(*parts),
    "bytes": b64decode,
    "bytearray": lambda parts: bytearray(b64decode(parts)),
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "Counter": lambda parts: Counter(dict(parts)),
    "OrderedDict": OrderedDict,
    "defaultdict": lambda parts: defaultdict(None, parts),
    "dict": dict,
    "Decimal": Decimal,
    "Fraction": lambda parts: Fraction(int(parts[0], 16), int(parts[1], 16)),
    "numpy": _numpy,
    "unknown": lambda parts: Unknown(),
}
