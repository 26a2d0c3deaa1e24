"""A run's directory: what lies in it, and whose it is.

settings.json (what the run is), log.jsonl (its curves), lock (empty: who is at the run holds it) and

- while it trains: checkpoint-1 and checkpoint-2 (where it is, and where it was at the checkpoint before), each a .json
  and a .safetensors, and best-UPDATE/, the best model, for each of them;
- once it is finished: result.json, best/ (the model in Hugging Face's layout), examples/ (what each example counts).

Each file is whole under its name or not there.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys

import numpy as np
from safetensors import safe_open

from data import InputError, file_sha256, whole_file
from model import fingerprint, write_tensors
from paper.finished import read_settings
from paper.options import differing

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None

# --- whose it is ---------------------------------------------------------------------------------------------


ELSEWHERE = "another folder (--out of `run`, --runs of `make`)"


class Taken(InputError):
    """Another process is at this run, or has just finished it."""


def is_finished(out, settings):
    """Whether the run in `out` is finished. Raises InputError if the directory is something else than this run's."""
    file = out / "settings.json"
    if file.is_file():
        there = read_settings(file)
        names = differing(there, settings)
        if names:
            what = ", ".join(f"{name} {there.get(name)} there and {settings.get(name)} here" for name in names[:3])
            mine = "the --model it began with, or " if "model_sha256" in names else ""
            raise InputError(f"{out} holds a run of other settings ({what}); give {mine}{ELSEWHERE}, or remove it")
        return is_there(out)
    born = ("lock", "settings.json.*.part")  # all that there is of a run whose process was killed as it began
    if out.is_dir() and not all(any(map(file.match, born)) for file in out.iterdir()):
        raise InputError(f"{out} is not empty and not a run's directory; give {ELSEWHERE}")
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
            raise Taken(f"{out}: another process is at this run; wait for it, or give {ELSEWHERE}") from None
        except OSError as e:
            os.close(lock)
            raise OSError(f"{out}: its file system cannot lock files ({e.strerror}); take another for runs") from e
        os.close(lock)  # another process has removed this file since it was opened


def tidy(out, discard=False):
    """Removes what a process that was killed has left: halves of files, and of a run that is finished the checkpoints;
    its best model becomes `best`, or goes (discard). Only for who holds the directory alone."""
    for left in [*out.rglob("*.part"), *(out.glob("checkpoint*") if is_there(out) else [])]:
        left.unlink(missing_ok=True)
    models = sorted(out.glob("best-*")) if is_there(out) else []
    best = models.pop() if models and not discard else None
    for model in models:  # those that were the best before go first: the last that is left is the best
        shutil.rmtree(model)
    if best:
        shutil.rmtree(out / "best", ignore_errors=True)
        os.replace(best, out / "best")


def tidy_finished(runs):
    """The same for those of {directory: Options} that are finished, as nobody starts them again."""
    for out, options in runs.items():
        left = ("lock", "checkpoint*", "best-*", "*.part", "examples/*.part")
        if is_there(out) and any(any(out.glob(name)) for name in left):
            with contextlib.suppress(Taken, OSError), alone(out):  # (somebody else's, it may be)
                tidy(out, options.discard)


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


def best_model(out, best):
    """The folder of the best model of a run that trains; `best` is Run.best."""
    return out / f"best-{best['update']:08}"


def drop_models(run):
    """Removes the models that neither the run nor one of its checkpoints goes by."""
    needed = [best_model(run.out, best) for best in [run.best, *run.bests.values()] if best]
    for model in set(run.out.glob("best-*")) - set(needed):
        shutil.rmtree(model)


# --- checkpoints ---------------------------------------------------------------------------------------------


def save_checkpoint(run):
    """Writes a run's state in place of the checkpoint before the last, which stays. Raises FloatingPointError, and
    writes nothing, where a weight is not finite."""
    run.check_finite()
    tensors, state = run.state_dict()
    place = 3 - run.place
    file = run.out / f"checkpoint-{place}.json"
    file.with_suffix(".safetensors").unlink(missing_ok=True)  # so that a disk holds two at a time, not three
    with whole_file(file.with_suffix(".safetensors")) as part:
        state |= {"settings": run.options.settings, "tensors_sha256": write_tensors(tensors, part)}
    with whole_file(file) as part:
        part.write_bytes(sealed(state))
    run.place, run.bests[place] = place, run.best
    drop_models(run)


def sealed(state):
    """A state as JSON, in bytes, that ends with the SHA-256 of what stands before."""
    sha256 = hashlib.sha256(json.dumps(state).encode()).hexdigest()
    return json.dumps(state | {"sha256": sha256}).encode()


def go_on(run):
    """Takes up the last checkpoint of a run that was stopped or, where that is damaged, the one before. Raises
    InputError if there are some and none is whole."""
    there = [file for place in (1, 2) if (file := run.out / f"checkpoint-{place}.json").is_file()]
    damaged = []
    states = {file: state for file in there if (state := attempt(damaged, file, read_state, run))}
    order = sorted(states, key=lambda file: [states[file]["counts"][name] for name in ("update", "recorded")])
    while order and not attempt(damaged, order[-1], take_up, run, states[order[-1]]):
        order.pop()
    if there and not order:
        raise InputError(f"{damaged[0]}, and no other is whole: remove {run.out}/checkpoint-*, and the run begins anew")
    if not there and (run.out / "checkpoint.pt").is_file():
        raise InputError(f"{run.out}/checkpoint.pt is an earlier version's, which alone can go on from it: remove it, "
                         "and the run begins anew")  # fmt: skip
    for file in order:
        run.place, run.bests[run.place] = int(file.stem[-1]), states[file]["counts"]["best"]
    if order:
        print(*(f"{what}: it is left out\n" for what in damaged), sep="", end="", file=sys.stderr)
        print(f"{run.out}: going on from update {run.update}", file=sys.stderr)


def attempt(damaged, file, do, run, *state):
    """do(run, file, *state), or None where the checkpoint is damaged, which is then noted."""
    try:
        return do(run, file, *state)
    except MemoryError:
        raise
    except Exception as e:  # whatever it is that a damaged file provokes
        what = (str(e).splitlines() or [type(e).__name__])[0]
        damaged.append(f"{file}: not a whole checkpoint of this run ({what})")


def read_state(run, file):
    """A checkpoint's JSON, of which all holds that can be checked by itself."""
    content = file.read_bytes()
    state = json.loads(content)
    state.pop("sha256")
    if sealed(state) != content:
        raise InputError("its SHA-256 is another")
    if names := differing(state["settings"], run.options.settings):
        raise InputError(f"it is of other settings: {', '.join(names[:3])}")
    run.check(state)
    return state


def take_up(run, file, state):
    """Loads a checkpoint into a run; its tensors and its best model are as they were written."""
    tensors, best = file.with_suffix(".safetensors"), state["counts"]["best"]
    if file_sha256(tensors) != state["tensors_sha256"]:
        raise InputError(f"the SHA-256 of {tensors.name} is another")
    if best and fingerprint(best_model(run.out, best)) != best["model_sha256"]:
        raise InputError(f"{best_model(run.out, best).name} is not the model that was saved there")
    with safe_open(tensors, framework="pt") as f:
        run.load_state_dict({name: f.get_tensor(name) for name in f.keys()}, state)
    return True
