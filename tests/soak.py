"""make soak: the promises of the README, tried for ten minutes rather than for the seconds that `make test` takes.

    make soak                          # results/soak.json; exit status 1 if a promise failed
    make soak SEED=3 QUICK=1           # two minutes, runs/soak.json; SEED repeats what a pass tried
    .venv/bin/python tests/soak.py --only kills --seed 3

A promise is tried in cases, each a function of the seed and its number alone; jobs of some cases each have a process of
their own, forked from this one, which has imported torch: so a process of ours begins in milliseconds, not in seconds.
What damages the files that are read is in mutants.py.
"""

import argparse
import contextlib
import ctypes
import itertools
import json
import multiprocessing.connection
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # a process a core; and what is forked must have no threads
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mutants
import torch
from conftest import ROOT, contents, outcome, write_model, write_tasks, write_tokenizer, write_xnli

import slowfast
from data import whole_file
from paper.__main__ import main
from paper.bench import machine

FORK = multiprocessing.get_context("fork")
TASKS = ("xnli", "mlqa", "ner", "qam")
# 20 updates in both phases, in which there is always something to be written
SETTINGS = (
    "--device cpu --precision fp32 --seed 2 --lr 1e-2 --batch-size 8 --epochs 9 --max-updates 20 --warmup 0 --window 2 "
    "--phase fraction --fraction 0.4 --log-every 5 --gap-every 15 --gap-examples 3 --cka-every 0 --eval-every 5 "
    "--save-every 2"
).split()
READING = {"mlqa": "--max-length 32 --stride 10 --max-question 9".split(), "ner": ["--max-length", "8"]}
PATIENCE = 300  # seconds that a run of under a second may take on a busy machine


# --- processes of the command line ---------------------------------------------------------------------------


class Command:
    """A process of `python -m paper ARGUMENTS`: `plain`, or forked from here, without the start of the interpreter.
    `before` is called in a forked one first."""

    def __init__(self, arguments, folder, plain=False, before=lambda: None):
        self.argv = [str(a) for a in arguments]
        handle, name = tempfile.mkstemp(".txt", dir=folder)
        self.plain, self.said = plain, Path(name)
        with open(handle, "w") as out:
            if plain:
                self.process = subprocess.Popen(
                    [sys.executable, "-m", "paper", *self.argv], cwd=folder, stdin=subprocess.DEVNULL, stdout=out,
                    stderr=out, env={**os.environ, "PYTHONPATH": str(ROOT)},
                )  # fmt: skip
            else:
                self.process = FORK.Process(target=self.forked, args=(out, before))
                self.process.start()

    def forked(self, out, before):
        for descriptor in (1, 2):
            os.dup2(out.fileno(), descriptor)
        status = 70
        try:
            before()
            status = main(self.argv)
        except SystemExit as e:
            status = e.code
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    def end(self, seconds=None):
        """(exit status, what it printed); after so many seconds it is killed, and the status is -9."""
        patience = PATIENCE if seconds is None else seconds
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(patience) if self.plain else self.process.join(patience)
        finally:
            self.process.kill()
        status = self.process.wait() if self.plain else self.process.join() or self.process.exitcode
        said = self.said.read_text(errors="replace")
        self.said.unlink()
        if status == -signal.SIGKILL and seconds is None:
            said = f"it took longer than {PATIENCE} s: {said}"
        return status, said


def one_line(status, said):
    """Whether a process ended with status 2 and one line that says why."""
    return status == 2 and "Traceback" not in said and sum(x.startswith("paper: ") for x in said.splitlines()) == 1


def briefly(what, status, said):
    return f"{what}: status {status}: {' | '.join(said.splitlines()[-3:])[-500:]}"


# --- what they are tried on ----------------------------------------------------------------------------------


class World:
    """A tiny model, the data of all tasks and, of each task, a run that nothing disturbed, one that was stopped in
    its thirteenth update, and how long a run takes."""

    def __init__(self, folder):
        self.folder, self.model, self.data = folder, folder / "model", folder / "data"
        self.whole = {task: folder / "whole" / task for task in TASKS}
        self.stopped = {task: folder / "stopped" / task for task in TASKS}
        self.made = folder / "made"

    def command(self, task, out, cache=None, model=None):
        where = ["--model", model or self.model, "--data", self.data, "--cache", cache or self.folder / "cache"]
        return ["run", task, *where, *SETTINGS, *READING.get(task, []), "--out", out]

    def make(self, runs, out, cache):
        args = f"{' '.join(SETTINGS).replace('--seed 2 ', '')} --cache {cache}"
        where = ["--model", self.model, "--data", self.data, "--runs", runs, "--out", out]
        return ["make", "table3", "--tasks", "qam", "--seeds", 1, *where, "--keep", f"--args={args}"]

    def build(self):
        for folder in (self.model, self.data, self.folder / "stopped"):
            folder.mkdir(parents=True)
        write_model(self.model, write_tokenizer(self.model), num_hidden_layers=2)
        write_xnli(self.data, dev=12, test=12)
        write_tasks(self.data)
        for task in TASKS:
            self.run(self.command(task, self.whole[task], self.folder / f"cache-{task}"), self.folder / task)
            self.run(self.command(task, self.stopped[task]), stop_in=13)
        self.run(self.make(self.made, self.folder / "figures", self.folder / "cache"))

    def takes(self, name):
        """How many seconds a run takes, from an empty cache: of a task, or a `plain` process."""
        file = self.folder / f"{name}.seconds"
        if name == "plain" and not file.exists():
            with tempfile.TemporaryDirectory(dir=self.folder) as folder:
                self.run(
                    self.command("qam", Path(folder, "run"), Path(folder, "cache")), self.folder / name, plain=True
                )
        return float(file.read_text())

    def run(self, command, record=None, plain=False, stop_in=None):
        """Runs a command to its end, or stops it in its update of this number; `record` has how long it took."""
        began = time.monotonic()
        before = (lambda: stopping(stop_in)) if stop_in else lambda: None
        status, said = Command(command, self.folder, plain, before).end()
        assert status == (130 if stop_in else 0), briefly(command[:2], status, said)
        if record:
            record.with_suffix(".seconds").write_text(repr(time.monotonic() - began))


def stopping(updates):
    """From here on this process is stopped in its update of this number, as by Ctrl-C."""
    as_from_a_shell()
    update, calls = slowfast.update, []

    def counted(*arguments, **options):
        calls.append(1)
        if len(calls) == updates:
            os.kill(os.getpid(), signal.SIGINT)
        return update(*arguments, **options)

    slowfast.update = counted


# --- the promises: each tries its cases and yields (how many it tried, what failed or None) --------------------


def kills(world, folder, cases, seed):
    """Chains of kills at random moments, each followed by the same command; a case is a kill. In every fifth it is a
    process with an interpreter of its own, imports and all."""
    cases = list(cases)
    for chain in itertools.count():
        if not cases:
            return
        rng = random.Random(f"{seed} kills {cases[0]} {chain}")
        task, chosen = rng.choice(TASKS), cases[: rng.randint(1, 4)]
        out, cache, killed = folder / f"run{chain}", folder / f"cache{chain}", 0
        for n in [*chosen, None]:  # None: nobody kills this one
            plain = n is not None and n % 5 == 4
            begun, process = time.time(), Command(world.command(task, out, cache), folder, plain, as_from_a_shell)
            if training := n is not None and rng.random() < 0.8:  # four in five while it trains
                wait_for(out, begun)
            takes = world.takes("plain" if plain and not training else task)
            status, said = process.end(None if n is None else rng.uniform(0, takes))
            if status != -signal.SIGKILL or n is None:
                break
            killed += 1
        wrong = None if status == 0 else briefly("it did not go on", status, said)
        if not wrong and (odd := differing(outcome(out), outcome(world.whole[task]))):
            wrong = f"it ended otherwise: {odd}"
        if not wrong and (left := [file.name for file in cache.glob("*.part")]):
            wrong = f"left in the cache: {left}"
        if killed or wrong:
            yield max(killed, 1), wrong and f"kills {chosen}: {task}, {killed} kills: {wrong}"
        del cases[: max(killed, bool(wrong))]
        for left in (out, cache):
            shutil.rmtree(left, ignore_errors=True)


def wait_for(out, begun):
    """Waits until a run's directory is taken by a process that was started then."""
    deadline = begun + PATIENCE
    while time.time() < deadline and not (out.is_dir() and out.stat().st_mtime > begun):
        time.sleep(0.005)


def as_from_a_shell():
    """Ctrl-C is heard: jobs, from which this process is forked, do not."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def differing(there, expected):
    """The names of the files that are not what they should be."""
    return [name for name in sorted({*there, *expected}) if there.get(name) != expected.get(name)][:5]


def flips(world, folder, cases, seed):
    """A bit or a block of the last checkpoint, of the best model of a run, or of the model that it began with: the run
    says so, and does not end, or ends like one that nothing happened to."""
    for n in cases:
        rng, task = random.Random(f"{seed} flips {n}"), TASKS[n % 4]
        out, model = folder / "run", folder / "model"
        where = rng.choice(("checkpoint", "checkpoint", "finished", "model"))
        shutil.copytree(world.whole[task] if where == "finished" else world.stopped[task], out)
        if where == "model":
            shutil.copytree(world.model, model)
        file = file_to_flip(rng, where, out, model)
        what = flip(rng, file)
        status, said = Command(world.command(task, out, model=model if where == "model" else None), folder).end()
        noticed = one_line(status, said)
        if status == 0 and where == "checkpoint" and "left out" in said:
            noticed = not differing(outcome(out), outcome(world.whole[task]))
        yield 1, None if noticed else briefly(f"flips {n}: {task}, {file.relative_to(folder)}, {what}", status, said)
        shutil.rmtree(out)
        shutil.rmtree(model, ignore_errors=True)


def file_to_flip(rng, where, out, model):
    name = rng.choice(("model.safetensors", "model.safetensors", "config.json"))
    if where == "model":
        return model / name
    if where == "finished":  # its best model is measured again where a test set is lacking
        result = json.loads((out / "result.json").read_text())
        (out / "result.json").write_text(json.dumps(result | {"test": None}))
        return out / "best" / name
    counts = {file: json.loads(file.read_text())["counts"] for file in out.glob("checkpoint-*.json")}
    last = max(counts, key=lambda file: counts[file]["update"])
    best = out / f"best-{counts[last]['best']['update']:08}"
    return rng.choice((last, last.with_suffix(".safetensors"), last.with_suffix(".safetensors"), best / name))


def flip(rng, file):
    content = bytearray(file.read_bytes())
    at, block = rng.randrange(len(content)), rng.random() < 0.2
    if block and any(content[at : at + 512]):
        content[at : at + 512] = bytes(len(content[at : at + 512]))
    else:
        content[at] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
    return f"{'a block' if block else 'a bit'} at {at}"


def inputs(world, folder, cases, seed, kind):
    """A file or a command line with one damage or a few."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    mutants.bound_memory(2 << 30)
    case = mutants.KINDS[kind](world, folder)
    for n in cases:
        signal.setitimer(signal.ITIMER_REAL, 60)  # which ends the process
        yield 1, mutants.tried(case, random.Random(f"{seed} {kind} {n}"), f"{kind} {n}")
    signal.setitimer(signal.ITIMER_REAL, 0)


def disk(world, folder, cases, seed, levels):
    """A disk of so many levels of room, from next to none to enough, and then more room for the same command."""
    place, mounted = folder / "disk", own_mounts()
    place.mkdir()
    stopped = sum(map(len, contents(world.stopped["xnli"]).values()))
    biggest = max(map(len, contents(world.stopped["xnli"]).values()))
    for n in cases:
        task = TASKS[n % 4]
        room = int((2 * stopped if mounted else biggest) * (n + 1) / levels)
        if mounted:
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", place], check=True)
        command = world.command(task, place / "run", place / "cache")
        status, said = Command(command, folder, before=lambda room=room: None if mounted else file_limit(room)).end()
        fits = status == 0 or (one_line(status, said) and "make room there" in said)
        wrong = None if fits else briefly("without room", status, said)
        if mounted:
            subprocess.run(["mount", "-o", "remount,size=1g", place], check=True)
        if fits:
            status, said = Command(command, folder).end()
            wrong = None if status == 0 else briefly("with room again", status, said)
        if not wrong and (odd := differing(outcome(place / "run"), outcome(world.whole[task]))):
            wrong = f"it ended otherwise: {odd}"
        yield 1, wrong and f"disk {n}: {task}, {room} bytes of {'a tmpfs' if mounted else 'a file'}: {wrong}"
        if mounted:
            subprocess.run(["umount", place], check=True)
        else:
            shutil.rmtree(place)


def own_mounts():
    """Whether this process may mount a small disk, that nobody else sees and that goes with it: on Linux, as root. The
    next best is a limit on the size of files."""
    if sys.platform != "linux" or os.geteuid() != 0 or ctypes.CDLL(None).unshare(0x00020000) != 0:  # CLONE_NEWNS
        return False
    private = subprocess.run(["mount", "--make-rprivate", "/"], capture_output=True)
    return private.returncode == 0


def file_limit(size):
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def together(world, folder, cases, seed):
    """Three processes at once, one of which may be killed: at one run, with one cache, or with one `make`."""
    for n in cases:
        rng, task = random.Random(f"{seed} together {n}"), TASKS[n // 3 % 4]
        place = folder / str(n)
        place.mkdir()
        kind = ("run", "cache", "make")[n % 3]
        outs = [place / "run"] * 3 if kind == "run" else [place / f"run{i}" for i in range(3)]
        commands = [world.command(task, out, place / "cache") for out in outs]
        if kind == "make":
            commands = [world.make(place / "runs", place / "figures", place / "cache")] * 3
        wrong = at_once(rng, commands, place)
        if not wrong and kind == "make":
            wrong = differing(results_in(place / "runs"), results_in(world.made))
        elif not wrong:
            wrong = [odd for out in outs if (odd := differing(outcome(out), outcome(world.whole[task])))]
        wrong = wrong or [file.name for file in place.rglob("*.part")]
        yield 1, f"together {n}: {kind}, {task}: {wrong}" if wrong else None
        shutil.rmtree(place)


def at_once(rng, commands, folder):
    """Starts the commands side by side, and those that another was faster than, or that were killed, again. Returns
    what was wrong, or None."""
    processes = []
    for command in commands:
        processes.append(Command(command, folder, before=as_from_a_shell))
        time.sleep(rng.choice((0, 0, 0.02, 0.2)))
    killed = rng.randrange(2 * len(commands))  # or none
    ends = [process.end(rng.uniform(0.01, 0.4) if i == killed else None) for i, process in enumerate(processes)]
    for command, (status, said) in zip(commands, ends):
        if not (status in (0, -signal.SIGKILL) or (one_line(status, said) and "another process" in said)):
            return briefly("at once", status, said)
        status, said = Command(command, folder).end()
        if status != 0:
            return briefly("afterwards", status, said)
    return None


def results_in(runs):
    return {
        f"{file.parent.relative_to(runs)}/{name}": content
        for file in runs.rglob("result.json")
        for name, content in outcome(file.parent).items()
    }


# --- who does it, and what is written of it -------------------------------------------------------------------

PROMISES = {  # name of the function: (what it says, cases)
    "kills": ("A run killed at any moment, and started again, ends bit for bit the same", 200),
    "flips": ("A flipped bit in a checkpoint or a saved model is noticed", 500),
    "inputs": ("A damaged file or a wrong option is one line, in bounded time and memory", 100_000),
    "disk": ("A full disk is one line; with room again the run ends bit for bit the same", 50),
    "together": ("Three processes at one run, one cache or one `make` end like one", 30),
}
QUICK = 0.1  # of all cases


def jobs_of(names, share, workers):
    """[(promise, further arguments of its function, cases)]: several of each promise, so that all cores are busy."""
    jobs = []
    for name in names:
        count = max(3, round(share * PROMISES[name][1]))
        if name == "inputs":
            for kind, of_all in mutants.SHARES.items():
                of_kind = round(share * of_all)
                jobs += [(name, {"kind": kind}, part) for part in parts(of_kind, min(2 * workers, of_kind // 50 + 1))]
        else:
            more = {"levels": count} if name == "disk" else {}
            jobs += [(name, more, part) for part in parts(count, 3 * workers)]
    return jobs


def parts(count, number):
    bounds = [count * i // number for i in range(number + 1)]
    return [range(a, b) for a, b in zip(bounds, bounds[1:]) if a < b]


def do(job, world, seed, connection):
    """Some cases of a promise, in a process of its own: sends each result. What is wrong here itself fails a case."""
    name, more, cases = job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one process that ends the others
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    silent = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(silent, descriptor)
    folder = Path(tempfile.mkdtemp(dir=world.folder))
    try:
        for result in globals()[name](world, folder, cases, seed, **more):
            connection.send(result)
    except Exception:
        connection.send((1, traceback.format_exc()[-1000:]))
    shutil.rmtree(folder, ignore_errors=True)


def work(jobs, world, seed, workers, tell):
    """Does the jobs, so many at a time; tell(promise, tried, failure or None) of each result. A process that dies has
    failed the case that it was at; another does those behind it."""
    waiting, at = jobs[::-1], {}
    try:
        while waiting or at:
            while waiting and len(at) < workers:
                job = waiting.pop()
                here, there = FORK.Pipe(duplex=False)
                process = FORK.Process(target=do, args=(job, world, seed, there))
                process.start()
                there.close()
                at[here] = [process, job, 0]
            for connection in multiprocessing.connection.wait(at):
                process, (name, more, cases), done = at[connection]
                try:
                    result = connection.recv()
                    at[connection][2] += result[0]
                    tell(name, *result)
                except EOFError:  # it has ended
                    process.join()
                    del at[connection]
                    if process.exitcode:
                        tell(name, 1, f"{more.get('kind', name)} {cases[done]}: its process died ({process.exitcode})")
                        done += 1
                    if done < len(cases):
                        waiting.append((name, more, cases[done:]))
    finally:
        for process, *_ in at.values():
            process.terminate()


def scratch():
    """A folder for what is thrown away: in memory, where there is such a one."""
    memory = Path("/dev/shm")
    return tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None, prefix="soak-",
                                       ignore_cleanup_errors=True)  # fmt: skip


def soak(names, seed, share, workers, out):
    """Tries the promises and writes the file; returns the exit status: 1 if one failed, 130 if it was interrupted."""
    torch.set_num_threads(1)
    found = {name: {"name": name, "what": PROMISES[name][0], "tried": 0, "held": 0, "failed": 0, "seconds": 0.0,
                    "failures": []} for name in names}  # fmt: skip
    began, complete = time.monotonic(), False

    def tell(name, tried, failure):
        p = found[name]
        p["first"] = p.get("first", time.monotonic())
        p["tried"] += tried
        p["failed" if failure else "held"] += tried
        p["seconds"] = round(time.monotonic() - p["first"], 1)
        if failure:
            print(f"{name}: {failure}", file=sys.stderr, flush=True)
            p["failures"] = [*p["failures"], failure][:5]

    with scratch() as folder:
        world = World(Path(folder) / "world")
        try:
            builder = FORK.Process(target=world.build)
            builder.start()
            builder.join()
            if builder.exitcode:
                return 1
            work(jobs_of(names, share, workers), world, seed, workers, tell)
            complete = True
        except KeyboardInterrupt:
            print("\nsoak: stopped; what was tried until now is written", file=sys.stderr)
        finally:
            promises = [{key: value for key, value in p.items() if key != "first"} for p in found.values()]
            write(out, seed, share, complete, time.monotonic() - began, promises)
    for p in promises:
        print(f"{p['what']}: {p['tried']:,} tried, {p['held']:,} held, {p['failed']:,} failed ({p['seconds']:.0f} s)")
    print(out)
    return 1 if any(p["failed"] for p in promises) else 0 if complete else 130


def write(out, seed, share, complete, seconds, promises):
    about = {"seed": seed, "share": share, "complete": complete, "seconds": round(seconds)}
    with whole_file(out) as part:
        part.write_text(json.dumps({**machine(torch.device("cpu")), **about, "promises": promises}, indent=1) + "\n")


def options_of(argv):
    parser = argparse.ArgumentParser(prog="tests/soak.py", description="The README's promises, tried at length.")
    add = parser.add_argument
    add("--seed", type=int, help="of all that is random (default: another each time; it is printed)")
    add("--share", type=float, default=1.0, help="of the cases (default: all)")
    add("--quick", action="store_const", dest="share", const=QUICK, help="a tenth of them: about two minutes")
    add("--only", nargs="+", choices=PROMISES, default=[*PROMISES], metavar="PROMISE", help=", ".join(PROMISES))
    add("--workers", type=int, default=os.cpu_count(), help="processes at a time (default: one a core)")
    add("--out", type=Path, help="the file (default: results/soak.json, of all cases; else runs/soak.json)")
    args = parser.parse_args(argv)
    args.seed = random.SystemRandom().randrange(2**32) if args.seed is None else args.seed
    whole = args.share == 1 and set(args.only) == {*PROMISES}
    args.out = args.out or ROOT / ("results" if whole else "runs") / "soak.json"
    return args


if __name__ == "__main__":
    given = options_of(sys.argv[1:])
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    print(f"SEED={given.seed}", flush=True)
    sys.exit(soak(given.only, given.seed, given.share, given.workers, given.out))
