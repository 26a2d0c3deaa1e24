"""A run's directory: what lies in it, and whose it is.

settings.json (what the run is), log.jsonl (its curves), checkpoint.pt (where it is), best/ (the best model in Hugging
Face's layout), examples/ (what each example counts), lock (empty: who is at the run holds it, and it stays), and, once
it is finished, result.json. Each file is whole under its name or not there.
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


class Taken(InputError):
    """Another process is at this run, or has just finished it."""


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
    if out.is_dir() and any(file.name != "lock" for file in out.iterdir()):
        raise InputError(f"{out} is not empty and not a run's directory; give another --out")
    return False


def is_there(out):
    """Whether a finished run lies in this directory."""
    return (out / "result.json").is_file()


def is_taken(out):
    """Whether another process is at the run of this directory."""
    try:
        if (out / "lock").is_file():  # who is at a run has made it
            with alone(out):
                pass
        return False
    except Taken:
        return True


@contextlib.contextmanager
def alone(out):
    """Locks a directory, for all machines that share it. The system lets go of the lock when the process ends, however
    it does. Raises Taken if another process holds it, and OSError on a file system that has no locks; on a system
    without them (Windows) there is none."""
    if fcntl is None:
        yield
        return
    lock = locked(out)
    try:
        os.utime(out)  # on NFS: from here on this machine sees what others have just done in the directory
        yield
    finally:
        (out / "lock").unlink(missing_ok=True)
        os.close(lock)


def locked(out):
    """The descriptor of the locked file `lock` in the directory `out`; who lets go of it removes it."""
    while True:
        # flock, and not lockf: is_taken closes a descriptor of its own, and with it this process would lose lockf's
        # lock. NFS has flock for files alone that are open for writing; Lustre where it is mounted with it.
        lock = os.open(out / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock), os.stat(out / "lock")):
                return lock
        except FileNotFoundError:
            pass
        except BlockingIOError:
            os.close(lock)
            raise Taken(f"{out}: another process is at this run; wait for it, or give another --out") from None
        except OSError as e:
            os.close(lock)
            raise OSError(f"{out}: its file system cannot lock files ({e.strerror}); take another for runs") from e
        os.close(lock)  # another process has removed this file since it was opened


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
