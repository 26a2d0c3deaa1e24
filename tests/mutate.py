"""Damage to files, at random: what a flipped bit, an editor, another program or a mischievous hand leaves.

mutate_json(random.Random(1), {"loss": 1.5})    # {"loss": "1.5"}, or {}, or {"loss": [[[[...
mutate_bytes(random.Random(1), b"...")          # with a bit flipped, a part zeroed, doubled, cut off ...
"""

import copy
import json

DEEP = "deep"  # stands for brackets in brackets that no writer of JSON could write: see `text_of`
ODD = (
    None, True, False, 0, 1, -1, 0.5, -0.5, 2**31, 2**53 + 1, 2**70, 10**400, 10**4000, 1e300, -1e300, 1e-320,
    float("nan"), float("inf"), float("-inf"), "", "0.5", "en", "nan", "..", "../..", "/dev/zero", "a\0b", "\n",
    "$\\x$", "\ud800", "x" * 5000, [], {}, [None], [[]], [1.0, "a"], {"": 1}, {"scores": 1}, {"scores": {"en": 200}},
    DEEP,
)  # fmt: skip


def places(value):
    """[(container, key)] of all values inside a value."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [found for key in keys for found in ((value, key), *places(value[key]))]


def odd(rng):
    return copy.deepcopy(rng.choice(ODD))  # what is put in may be changed in its turn


def mutate_json(rng, value):
    """A copy of a value of JSON with one to three changes: values that are gone, odd, another's, or of another name."""
    whole = [copy.deepcopy(value)]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        there = places(whole)
        container, key = rng.choice(there)
        _, other = rng.choice(there)
        what = rng.choice(("remove", "odd", "odd", "odd", "text", "number", "another's", "wrap", "rename", "add"))
        if what == "remove" and container is not whole:
            del container[key]
        elif what == "text":
            container[key] = str(container[key])[:100]
        elif what == "number" and type(container[key]) in (int, float) and abs(container[key]) < 2**60:
            container[key] *= rng.choice((-1, 0, 0.5, 10, 1000, 10**6))
        elif what == "another's":
            of, name = rng.choice(there)
            container[key] = copy.deepcopy(of[name])
        elif what == "wrap":
            container[key] = rng.choice(([container[key]], {"x": container[key]}))
        elif what == "rename" and isinstance(container, dict):
            container[rng.choice((str(other), "x", key.upper(), ""))] = container.pop(key)
        elif what == "add" and isinstance(container[key], dict):
            container[key][rng.choice((str(other), "x", "scores"))] = odd(rng)
        elif what == "add" and isinstance(container[key], list):
            container[key].append(odd(rng))
        else:
            container[key] = odd(rng)
    return whole[0]


def text_of(value, deep=100_000):
    """The bytes of JSON of a value, with so many brackets in brackets where DEEP stands."""
    return json.dumps(value).encode().replace(json.dumps(DEEP).encode(), b"[" * deep + b"]" * deep)


def mutate_bytes(rng, data):
    """Bytes with one change."""
    n = len(data)
    start = rng.randrange(n + 1)
    end = min(n, start + rng.choice((1, 2, 16, 512, n)))
    part, rest = data[start:end], data[end:]
    new = rng.choice((
        lambda: bytes([part[0] ^ 1 << rng.randrange(8)]) + part[1:] if part else b"\xff",
        lambda: bytes(len(part)),
        lambda: b"",
        lambda: part + part,
        lambda: rng.randbytes(len(part)),
        lambda: part + rng.choice((b"\xff", b"\0", b"\r\n", b"\n\n", b'"', b"[", b"}", b"9" * 5000, b"NaN")),
    ))()  # fmt: skip
    return data[:start] + new + (rest if rng.random() < 0.8 else b"")
