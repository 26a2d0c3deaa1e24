"""A run's directory: what lies in it, and whose it is.

settings.json (what the run is), log.jsonl (its curves), checkpoint.pt (where it is), best/ (the best model in Hugging
Face's layout), examples/ (what each example counts), and, once it is finished, result.json. Each file is whole under
its name or not there.
"""

import contextlib
import json
import os
import sys

import numpy as np
import torch

from data import InputError, whole_file
from paper.options import differing

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None

# --- whose it is ---------------------------------------------------------------------------------------------


def is_finished(out, settings):
    """Whether the run in `out` is finished. Raises InputError if the directory is something else than this run's."""
    file = out / "settings.json"
    if file.is_file():
        try:
            there = json.loads(file.read_text(encoding="utf-8"))
            names = differing(there, settings)
        except (ValueError, TypeError) as e:
            raise InputError(f"{file}: not a run's settings ({e}); give another --out") from e
        if names:
            what = ", ".join(f"{name} {there.get(name)} there and {settings.get(name)} here" for name in names[:3])
            raise InputError(f"{out} holds a run of other settings ({what}); give another --out")
        return is_there(out)
    if out.is_dir() and any(out.iterdir()):
        raise InputError(f"{out} is not empty and not a run's directory; give another --out")
    return False


def is_there(out):
    """Whether a finished run lies in this directory."""
    return (out / "result.json").is_file()


def is_taken(out):
    """Whether another process is at the run of this directory."""
    try:
        if out.is_dir():
            with alone(out):
                pass
        return False
    except InputError:
        return True


@contextlib.contextmanager
def alone(out):
    """Locks a directory. The system lets go of the lock when the process ends, however it does. Raises InputError if
    another process holds it; on a system without such locks (Windows) there is none."""
    if fcntl is None:
        yield
        return
    directory = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{out}: another process is at this run; wait for it, or give another --out") from None
        yield
    finally:
        os.close(directory)


def tidy(out):
    """Removes what a process that was killed has left: halves of files, the checkpoint of a run that is finished. Only
    for who holds the directory alone."""
    for left in [*out.rglob("*.part"), *([out / "checkpoint.pt"] if is_there(out) else [])]:
        left.unlink(missing_ok=True)


# --- what lies in it -----------------------------------------------------------------------------------------


def write_log(run, entry):
    """Appends a line to log.jsonl; the lines behind a checkpoint are written anew."""
    p = run.policies
    line = {
        "update": run.update,
        "loss": sum(run.losses) / len(run.losses) if run.losses else None,
        "phi": p.phi, "R": p.R, "phase": 1 if p.in_first_phase else 2, "K": p.multipliers,
        "lr": run.lr, "updates_in_first_phase": p.updates_in_first_phase, **entry,
    }  # fmt: skip
    file = run.out / "log.jsonl"
    with open(file, "r+b" if file.exists() else "w+b") as log:
        there = log.read(run.log_bytes)
        if len(there) < run.log_bytes:  # a power cut took its end: the lines that are whole stay
            there = there[: there.rfind(b"\n") + 1]
        log.seek(len(there))
        log.write((json.dumps(line) + "\n").encode())
        log.truncate()
        run.log_bytes = log.tell()
    run.losses.clear()


def write_json(file, value):
    with whole_file(file) as part:
        part.write_text(json.dumps(value, indent=2) + "\n")


def write_counts(out, split, counts):
    """Keeps what each example counts, examples/SPLIT.npz: intervals of differences are drawn from it (results.py)."""
    with whole_file(out / "examples" / f"{split}.npz") as part, open(part, "wb") as file:
        np.savez_compressed(file, **counts)


def save_checkpoint(run):
    file = run.out / "checkpoint.pt"
    with whole_file(file) as part:
        try:
            torch.save(run.state_dict(), part)
        except RuntimeError as e:  # all that torch's writer says of a full disk is "enforce fail ... unexpected pos"
            raise OSError(f"{file} could not be written: is the disk full?") from e


def go_on(run):
    """Takes up the checkpoint of a run that was stopped."""
    file = run.out / "checkpoint.pt"
    if not file.is_file():
        return
    try:
        run.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as e:  # whatever it is that a damaged file provokes
        what = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise InputError(f"{file}: not a whole checkpoint ({what}); delete it, and the run begins anew") from e
    print(f"{run.out}: going on from update {run.update}", file=sys.stderr)
