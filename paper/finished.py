"""What lies in a finished run's directory, read and checked against one description: whoever reads it reads it here.

    run = read_result(Path("runs/df-seed1/result.json"))    # {"settings": {...}, "dev": {"scores": {...}, ...}, ...}

Anybody may have touched these files. What is described here is as it says; what is not, other versions may have added.
All functions raise InputError, which names file, line and field, and says what to do.
"""

import argparse
import functools
import io
import json
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from data import SOURCE, InputError, read_arrays
from eval import MEASURES
from paper.options import FIELDS, SETTINGS

# --- the description -----------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """says: what a value is to be; holds: whether it is."""

    says: str
    holds: Callable


class Each(NamedTuple):
    """An object of any names, such as languages, whose values are all of a kind."""

    kind: object


def number(least, most, types=(int, float)):
    says = f"a {'whole ' if types == (int,) else ''}number from {least:g} to {most:g}"
    return Kind(says, lambda value: type(value) in types and least <= value <= most)


def whole(least, most=10**12):
    return number(least, most, (int,))


NAME = re.compile(r"[\w-]{1,40}")  # of a language, of a pair "en-de", of a test set
TEXT = Kind("a text", lambda value: isinstance(value, str))
NAMES = Kind("a list of names", lambda value: isinstance(value, list) and all(TEXT.holds(x) for x in value))
# A layer that does not vary has no CKA: NaN.
CKA = Kind("a list of numbers from 0 to 1", lambda value: isinstance(value, list) and all(
    type(x) in (int, float) and (x != x or 0 <= x <= 1.001) for x in value))  # fmt: skip


def setting(f):
    """The Kind of a setting: what its option takes on the command line."""
    more, types = f.metadata.get("more", {}), (int, float) if f.type is float else (f.type,)

    def holds(value):
        try:
            fits = type(value) in types and abs(value if f.type is not str else 0) < 1e300
            return fits and more.get("type", str)(str(value)) in more.get("choices", [value])
        except (ValueError, argparse.ArgumentTypeError):
            return False

    return Kind(f"what --{f.name.replace('_', '-')} takes", holds)


NEEDED, PERHAPS, OR_NULL = "is there", "may be missing", "may be missing or null"
NEEDED_SETTINGS = ("task", "method", "seed", "shots", "model", "data", "lr", "batch_size")
DESCRIBED = {
    name: (setting(f), NEEDED if name in NEEDED_SETTINGS else OR_NULL if f.default is None else PERHAPS)
    for name, f in FIELDS.items()
    if f.metadata["decides"] in SETTINGS
} | {"languages": (NAMES, OR_NULL)}
SCORES = Each(number(0, 100))
SPLIT = {
    "scores": (SCORES, NEEDED), "measure": (TEXT, PERHAPS), "exact_match": (SCORES, PERHAPS),
    "precision": (SCORES, PERHAPS), "recall": (SCORES, PERHAPS),
}  # fmt: skip
RESULT = {
    "settings": (DESCRIBED, NEEDED), "seed": (whole(0), NEEDED), "dev": (SPLIT, NEEDED), "updates": (whole(1), NEEDED),
    "updates_in_first_phase": (whole(0), NEEDED), "seconds": (number(0, 1e12), NEEDED), "device": (TEXT, NEEDED),
    "best_update": (whole(1), PERHAPS),
    **dict.fromkeys(("test", "xquad", "squad", "test-7x7", "dev-7x7"), (SPLIT, OR_NULL)),
}  # fmt: skip
LINE = {
    "update": (whole(1), NEEDED), "updates_in_first_phase": (whole(0), NEEDED), "loss": (number(0, 1e12), OR_NULL),
    "phase": (whole(1, 2), PERHAPS), "gap": (number(-100, 100), OR_NULL), "scores": (SCORES, PERHAPS),
    "source": (number(0, 100), PERHAPS), "cka": (CKA, PERHAPS),
}  # fmt: skip


def check(value, kind, field=""):
    """Raises ValueError, which names the field, unless a value is of a kind: a Kind, an Each, or {name: (kind, whether
    it must be there)}."""
    if isinstance(kind, Kind):
        if not kind.holds(value):
            raise ValueError(f"{field} is {quoted(value)}, not {kind.says}")
        return
    if not isinstance(value, dict) or not (value or isinstance(kind, dict)):
        raise ValueError(f"{field or 'it'} is {quoted(value)}, not {{name: value, ...}}")
    if isinstance(kind, Each):
        odd = [name for name in value if not NAME.fullmatch(name)]
        if odd:
            raise ValueError(f"{field} has {quoted(odd[0])}, which is no name")
        kind = dict.fromkeys(value, (kind.kind, NEEDED))
    for name, (of, needed) in kind.items():
        full = f"{field}.{name}" if field else name
        if name not in value and needed == NEEDED:
            raise ValueError(f"{full} is missing")
        if name in value and not (value[name] is None and needed == OR_NULL):
            check(value[name], of, full)


def quoted(value):
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:36]} ..."


# --- reading -------------------------------------------------------------------------------------------------

MOST_BYTES = {".json": 2**20, ".md": 2**20, ".jsonl": 2**28, ".npz": 2**26}  # of a file; .npz: unpacked too
MOST_DEEP, MOST_EXAMPLES = 20, 100_000  # objects in objects; examples of a language: a bootstrap takes 4 KB for each


def read_bytes(file):
    """What is in a file. Raises ValueError if there is none, or too much in it."""
    try:
        if not file.is_file():  # a pipe would be waited for
            raise ValueError("it is not there, or not a file")
        with open(file, "rb") as opened:
            read = opened.read(MOST_BYTES[file.suffix] + 1)
    except OSError as e:
        raise ValueError(f"it cannot be read ({e.strerror})") from e
    if len(read) > MOST_BYTES[file.suffix]:
        raise ValueError(f"it is larger than {MOST_BYTES[file.suffix]:,} bytes")
    return read


def read_text(file):
    """A Markdown file's."""
    try:
        return read_bytes(file).decode("utf-8")
    except ValueError as e:
        raise InputError(f"{file}: {e}; make it a text in UTF-8") from e


def parsed(text):
    """The value of JSON, bytes. Raises ValueError where Python's reader does, or would come to other things."""
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=once)
    except RecursionError:
        raise ValueError("too many brackets in brackets") from None
    check_depth(value)
    if b"\\u" in text:  # half a pair of \u escapes is nothing that could be printed
        json.dumps(value, ensure_ascii=False).encode()
    return value


def once(pairs):
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice in one object")
    return found


def check_depth(value, left=MOST_DEEP):
    if left == 0:
        raise ValueError(f"more than {MOST_DEEP} brackets in brackets")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        check_depth(inner, left - 1)


def damaged(where, error, folder):
    return InputError(f"{where}: {error}; restore the file, or remove {folder} and run it again")


def read_settings(file):
    """What a settings.json holds."""
    try:
        settings = parsed(read_bytes(file))
        check(settings, DESCRIBED)
    except ValueError as e:
        raise damaged(file, e, file.parent) from e
    return settings


def read_result(file):
    """What a result.json holds; the settings.json beside it says the same of the run, if there is one."""
    beside = file.with_name("settings.json")
    settings = read_settings(beside) if beside.exists() else None
    try:
        run = parsed(read_bytes(file))
        check(run, RESULT)
        check_same("settings", run["settings"], run["settings"] if settings is None else settings)
        check_same("it", {name: run[name] for name in ("method", "seed", "shots") if name in run}, run["settings"])
        for split in splits_of(run):
            check_split(run, split)
    except ValueError as e:
        raise damaged(file, e, file.parent) from e
    return run


def check_same(field, values, others):
    """Raises ValueError unless what `values` has under its names is what the run's settings have."""
    odd = [name for name in values if values[name] != others.get(name, others)]
    if odd:
        raise ValueError(f"{field} has another {odd[0][:40]} than the settings: {quoted(values[odd[0]])}")


def check_split(run, split):
    """Raises ValueError unless the scores on a split are percents, of the source among other languages."""
    check(run[split], SPLIT, split)
    scores, source = run[split]["scores"], source_of(run)
    if not NAME.fullmatch(split) or not {source, f"{source}-{source}"} & scores.keys():
        raise ValueError(f"{quoted(split)} has no score of {quoted(source)}, the source")
    for name, values in run[split].items():
        if isinstance(values, dict):
            check(values, SCORES, f"{split}.{name[:40]}")
            check_languages(f"{split}.{name[:40]}", values, scores)
    if split in ("dev", "test"):
        check_languages(f"{split}.scores", scores, run["settings"].get("languages") or scores)


def check_languages(field, there, expected):
    odd = sorted(set(there) ^ set(expected))
    if odd:
        raise ValueError(f"{field} is of other languages than the run ({', '.join(odd[:5])[:80]})")


def splits_of(run):
    """The names of the sets that a run was measured on."""
    return [name for name, value in run.items() if isinstance(value, dict) and "scores" in value]


def source_of(run):
    return run["settings"].get("source", SOURCE)


def read_log(run):
    """The lines of a run's log.jsonl, dicts, up to its last update."""
    return lines_of(run["folder"] / "log.jsonl", tuple(run["dev"]["scores"]), run["updates"])


@functools.cache
def lines_of(file, languages, updates):
    lines, where = [], file
    try:
        for n, text in enumerate(read_bytes(file).splitlines(), 1):
            where = f"{file}, line {n}"
            lines.append(parsed(text))
            check(lines[-1], LINE)
            check_line(lines[-1], lines[-2:-1], languages)
        where = file
        if not lines or lines[-1]["update"] != updates:
            raise ValueError(f"it does not end at update {updates}, as the run does")
    except ValueError as e:
        raise damaged(where, e, file.parent) from e
    return lines


def check_line(line, before, languages):
    """Raises ValueError unless a line of the log is one that may follow those `before`, a list of at most one."""
    if any(line["update"] <= other["update"] for other in before):
        raise ValueError(f"update {line['update']} comes after update {before[0]['update']}")
    if line["updates_in_first_phase"] > line["update"]:
        raise ValueError(f"updates_in_first_phase is {line['updates_in_first_phase']} at update {line['update']}")
    check_languages("scores", line.get("scores", languages), languages)


def read_counts(file, task, scores):
    """{language: (examples, k)} of an examples/SPLIT.npz, float32, which come to these scores of the run, {language:
    percent}."""
    try:
        found = read_arrays(io.BytesIO(read_bytes(file)), MOST_BYTES[file.suffix])
        check_languages("it", found, scores)
        for language, counts in found.items():
            check_counts(language, counts)
            (score, *_) = MEASURES[task].of(counts).values()
            if not abs(score - scores[language]) < 1e-3:
                raise ValueError(f"{language} comes to {score:.2f}, in result.json it is {scores[language]:.2f}")
    except Exception as e:  # zip files and arrays have no one error for what is damaged
        says = f"{file}: {e or type(e).__name__}; restore it, or remove it: then there is no interval"
        raise InputError(says) from e
    return {language: counts.astype(np.float32) for language, counts in found.items()}


def check_counts(language, counts):
    """Raises ValueError unless an array is what each of some examples may count."""
    examples, numbers = counts.shape if counts.ndim == 2 else (0, 0)
    if counts.dtype.kind not in "biuf" or not 1 <= examples <= MOST_EXAMPLES or not 1 <= numbers <= 3:
        raise ValueError(f"{language} is {counts.dtype} {counts.shape}, not up to {MOST_EXAMPLES:,} examples' counts")
    if not (np.isfinite(counts).all() and (counts >= 0).all()):
        raise ValueError(f"{language} has counts that are not finite, or below 0")
