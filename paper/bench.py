"""How fast it is: our training loop against what people would take instead, on the machine that is there.

    make bench                 # XLM-R base and multilingual-e5-small: results/bench/DEVICE-MODEL.json, and a table
    make bench QUICK=1         # the small one, a few updates: runs/bench, which the README's table is not made of
    python -m paper.bench --models base --parts training --rounds 7      # some of it; the file keeps its other parts

The contestants (contestants.py) train with the same examples, in the same batches, for as many updates, and take turns,
round by round: a machine that slows down slows all of them, and ratios are of neighbours. Each has a process of its own
that sleeps while others train, so its peak of memory is its own: on CUDA what torch took at most, on a CPU the whole
process's, with its libraries and what making the model took. From top to bottom: a process, the parts, the files, the
table, the command line.
"""

import contextlib
import dataclasses
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import torch

from data import POOL, InputError
from paper.contestants import BATCH, CONTESTANTS, ROOT, SIZES, Job
from paper.folder import write_json
from paper.options import OneLineParser, whole
from paper.run import choose_device, fast_precision
from paper.tables import render

# --- a process -----------------------------------------------------------------------------------------------


class Child:
    """A process that does a job: `answer` is what it says when it is ready, `go` what the next round took; None of one
    that has failed, or took longer than `limit` seconds and was ended."""

    def __init__(self, job, limit):
        command = [sys.executable, "-m", "paper.contestants", json.dumps(asdict(job))]
        one_gpu = {"CUDA_VISIBLE_DEVICES": "0", **os.environ}  # of several the Trainer would use all
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process, self.limit = subprocess.Popen(command, cwd=ROOT, env=one_gpu, **pipes), limit

    def answer(self):
        timer = threading.Timer(self.limit, self.process.kill)
        timer.start()
        line = self.process.stdout.readline()
        timer.cancel()
        return json.loads(line) if line else None

    def go(self):
        try:
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return None
        return self.answer()

    def end(self):
        """Lets it end, and says why it did if that was not asked for."""
        self.process.stdin.close()
        timer = threading.Timer(20, self.process.kill)
        timer.start()
        status = self.process.wait()
        timer.cancel()
        self.process.stdout.close()
        return {"left_out": f"it failed, or took longer than {self.limit} s (exit status {status})"}


def contest(jobs, limit):
    """{name: [what each round took]} of processes that take turns; of one that fails {"left_out": why}."""
    children, found = {}, {job.do: [] for job in jobs}

    def take(name, ask):
        answer = ask()
        if answer is None:
            found[name] = children.pop(name).end()
        print(f"  {name}: {answer['seconds']:.1f} s" if answer else f"  {name}: left out", file=sys.stderr)
        return answer

    try:
        for job in jobs:
            children[job.do] = Child(job, limit)
            take(job.do, children[job.do].answer)  # the warm-up
        for n in range(max(job.rounds for job in jobs)):
            for name in [job.do for job in jobs if job.do in children and n < job.rounds]:
                took = take(name, children[name].go)
                if took:
                    found[name].append(took)
    finally:
        for process in children.values():
            process.end()
    return found


# --- the parts -----------------------------------------------------------------------------------------------


def training(jobs, there, limit):
    """What the contestants' rounds say, and our real tokens a second and memory in relation to the others'."""
    found = contest(jobs, limit)
    said = {name: of_rounds(rounds) if isinstance(rounds, list) else rounds for name, rounds in found.items()}
    if "left_out" in said["ours"]:
        raise InputError(f"our own training could not be measured: {said['ours']['left_out']}")
    others = [name for name in said if name != "ours" and "left_out" not in said[name]]
    tokens = {name: [took["tokens"] / took["seconds"] for took in found[name]] for name in ("ours", *others)}
    memory = {name: said[name]["peak_memory_bytes"] for name in ("ours", *others)}
    return {
        "precision": fast_precision(torch.device(jobs[0].device)),
        "batch_size": BATCH,
        "contestants": said,
        "ratios": {name: spread_of(tokens["ours"], tokens[name]) for name in others},
        "memory_ratios": {name: memory["ours"] / memory[name] for name in others if memory[name]},
    }


def of_rounds(rounds):
    """What the rounds of a contestant say."""
    sums = {name: sum(took[name] for took in rounds) for name in ("tokens", "computed")}
    rates = {f"{name}_per_second": spread_of([took[name] / took["seconds"] for took in rounds])
             for name in ("updates", "tokens")}  # fmt: skip
    padding = 1 - sums["tokens"] / sums["computed"]
    return {**rates, "padding": padding, "peak_memory_bytes": rounds[-1]["peak_memory_bytes"], "rounds": rounds}


def spread_of(values, others=None):
    """Median, least and most of these numbers, or of their ratios to others, one by one."""
    values = [a / b for a, b in zip(values, others)] if others else values
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def evaluation(jobs, there, limit):
    """Seconds of 15 test sets, ours and the Trainer's, and how many times ours theirs takes."""
    found = contest(jobs, limit)
    failed = {name: rounds for name, rounds in found.items() if "left_out" in rounds}
    if failed:
        return {"left_out": failed}
    ours, theirs = ([took["seconds"] for took in rounds] for rounds in found.values())
    seconds = {"ours": spread_of(ours), "trainer": spread_of(theirs)}
    return {"pairs": 15 * jobs[0].test, "seconds": seconds, "ratio": spread_of(theirs, ours)}


def by_itself(jobs, there, limit):
    """What the one process of a part says."""
    process = Child(jobs[0], limit)
    found = process.answer()
    why = process.end()
    return why if found is None else found


def adam(jobs, there, limit):
    """Our Adam's step in relation to torch's: how many times theirs it takes."""
    found = by_itself(jobs, there, limit)
    if "left_out" in found:
        return found
    rounds = found["rounds"]
    ratios = {name: spread_of(rounds["ours"], rounds[name]) for name in ("fused", "foreach")}
    return {"seconds": {name: spread_of(values) for name, values in rounds.items()}, "ratios": ratios}


def products(jobs, there, limit):
    """The share of our update that the matrix products would take alone."""
    found = by_itself(jobs, there, limit)
    if "seconds" in found and "training" in there:
        found["share"] = found["seconds"] / seconds_an_update(there)
    return found


def seconds_an_update(there):
    return 1 / there["training"]["contestants"]["ours"]["updates_per_second"]["median"]


# How often each is done in a run of the paper on XNLI; the best model is written at most so often.
TIMES = {"update": 122_720, "evaluation": 41, "gap": 1227, "similarity": 1227, "checkpoint": 4, "best model": 41,
         "tests": 1}  # fmt: skip


def measuring(jobs, there, limit):
    """What is done between updates, and on a GPU (on a CPU only a sample is measured) the minutes of a whole run."""
    found = by_itself(jobs, there, limit)
    tests = there.get("evaluation", {}).get("seconds")
    if jobs[0].device == "cuda" and tests and "seconds" in found and "training" in there:
        seconds = {"update": seconds_an_update(there), "tests": tests["ours"]["median"], **found["seconds"]}
        minutes = {what: times * seconds[what] / 60 for what, times in TIMES.items()}
        found["minutes_of_a_run"] = {**minutes, "all": sum(minutes.values())}
    return found


# name: (the processes that it takes, what makes its result of them and of the parts that are there)
PARTS = {
    "training": (CONTESTANTS, training),
    "products": (["products"], products),
    "adam": (["adam"], adam),
    "tokeniser": (["tokeniser"], by_itself),
    "metrics": (["metrics"], by_itself),
    "evaluation": (["our evaluation", "their evaluation"], evaluation),
    "measuring": (["measuring"], measuring),
}


def jobs_of(names, model, args):
    """The jobs of a part, of the size that the device can do in a few minutes."""
    cuda = args.device == "cuda"
    updates = args.updates or (200 if cuda else 6 if model == "xlm-roberta-base" else 12) // (3 if args.quick else 1)
    updates = max(updates // POOL, 1) * POOL if updates > POOL else updates  # of more than a pool whole passes
    dev, test = (2490, 5010) if cuda else (20, 20)
    job = Job("", model, args.device, min(updates, POOL), updates, updates, args.rounds, dev, test)
    jobs = [dataclasses.replace(job, do=name) for name in names if name not in set(CONTESTANTS) - {*args.contestants}]
    for job in jobs:
        if job.do == "xtreme" and not cuda:  # ten times slower, and all its batches have the same shape
            job.warm_up, job.updates, job.rounds = 1, *((1, 1) if args.quick else (2, args.rounds))
    return jobs


# --- the files -----------------------------------------------------------------------------------------------


def bench(args):
    """Measures what was asked for. Every part is in its file as soon as it is done."""
    here = machine(torch.device(args.device))
    device = re.sub(r"[^a-z0-9]+", "-", here["machine"].get("gpu", "cpu").lower())
    for model in args.models:
        file = Path(args.out) / f"{device}-{Path(model).name}.json"
        there = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if {name: there.get(name) for name in here} != here:  # of another machine: what it says is not of this one
            there = {"model": Path(model).name, **here}
        for part in args.parts:
            print(f"{file}: {part}", file=sys.stderr)
            names, make = PARTS[part]
            found = make(jobs_of(names, model, args), there, args.limit)
            there[part] = {"date": time.strftime("%Y-%m-%d"), "command": args.command, **found}
            write_json(file, there)
            print(f"{file}: {part}", json.dumps(shown(found), indent=2))
    print("\n".join(speed(args.out)))


def machine(device):
    """What the numbers depend on."""
    import accelerate
    import transformers

    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*:\s*(.*)", info.read_text()) if info.is_file() else None
    found = {
        "cpu": named[1] if named else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None,
        "bf16_instructions": fast_precision(torch.device("cpu")) == "bf16",
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        found |= {"gpu": gpu.name, "gpu_memory_bytes": gpu.total_memory}
    versions = {"python": platform.python_version(), "torch": torch.__version__,
                "transformers": transformers.__version__, "accelerate": accelerate.__version__}  # fmt: skip
    return {"machine": found, "versions": versions}


def shown(found):
    """What was found, without the single rounds, in four digits."""
    if isinstance(found, dict):
        return {name: shown(value) for name, value in found.items() if name != "rounds"}
    return float(f"{found:.4g}") if isinstance(found, float) else found


# --- the table -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def as_written(file, by):
    """Raises InputError for a file that anybody may have touched and that is read within."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        says = f"{type(e).__name__} {e}"[:200]
        raise InputError(f"{file} is not as `{by}` writes it ({says}): restore it, or run that again") from e


def speed(folder):
    """Lines of Markdown: a table of a folder's files, a row each."""
    rows = ["device, model, updates/s, tokens/s, × Trainer, × compiled, × XTREME, memory".split(", ")]
    for file in sorted(Path(folder).glob("*.json")):
        with as_written(file, "make bench"):
            found = json.loads(file.read_text(encoding="utf-8"))
            rows += [row_of(found)] if found.get("training") else []
    if len(rows) == 1:
        return ["Nothing was measured yet: `make bench`."]
    rows = list(zip(*(column for column in zip(*rows) if set(column[1:]) != {"-"})))  # what nobody measured
    about = "Median [least, most] of the rounds; ×: our real tokens/s by theirs; memory: our peak by the Trainer's."
    return [render(rows, markdown=True), "", about]


def row_of(found):
    t = found["training"]
    rates, memory = t["contestants"]["ours"], t["memory_ratios"].get("trainer")
    times = [t["ratios"].get(name) for name in CONTESTANTS[1:]]
    return [
        f"{found['machine'].get('gpu', str(found['machine']['threads']) + ' CPU threads')}, {t['precision']}",
        found["model"],
        f"{rates['updates_per_second']['median']:.3g}",
        f"{rates['tokens_per_second']['median']:,.0f}",
        *("{median:.3g} [{min:.3g}, {max:.3g}]".format(**ratio) if ratio else "-" for ratio in times),
        f"{100 * memory:.0f} %" if memory else "-",
    ]


# --- the command line ----------------------------------------------------------------------------------------


def options_of(argv):
    parser = OneLineParser(prog="python -m paper.bench", description="Our training loop against others'.")
    add = parser.add_argument
    add("--models", nargs="+", metavar="MODEL",
        help="base (XLM-R's), small (multilingual-e5-small's), or a folder with a config.json (default: base small; "
        "quick small)")  # fmt: skip
    add("--parts", nargs="+", default=[*PARTS], choices=PARTS, help="what to measure (default: all)")
    add("--contestants", nargs="+", choices=CONTESTANTS, help="who trains beside us (default: all)")
    add("--rounds", type=whole(1), metavar="N", help="how often each has its turn (default: 5, quick 2)")
    add("--updates", type=whole(1), metavar="N", help="of a round (default: on a CPU 6 of base, else 12; 200)")
    add("--device", choices=["cpu", "cuda"], help="(default: cuda if there is one)")
    add("--limit", type=whole(1), default=900, metavar="SECONDS", help="for a round, or to be ready (default: 900)")
    add("--quick", action="store_true", help="a third of the updates, 2 rounds, one update of XTREME's")
    add("--out", metavar="DIR", help="where the files go (default: results/bench, quick runs/bench)")
    args = parser.parse_args(argv)
    args.command = shlex.join(["python", "-m", "paper.bench", *argv])
    names = dict(zip(("base", "small"), SIZES))
    args.models = args.models or (["small"] if args.quick else [*names])
    args.models = [names.get(name) or str(Path(name).resolve()) for name in args.models]
    args.device = choose_device(args.device).type
    args.rounds = args.rounds or (2 if args.quick else 5)
    args.out = args.out or ("runs/bench" if args.quick else "results/bench")
    # (on a CPU compiling takes longer than all the rest of a quick one)
    chosen = args.contestants or [x for x in CONTESTANTS if x != "trainer-compiled" or not args.quick or
                                  args.device == "cuda"]  # fmt: skip
    args.contestants = {"ours", *chosen}
    return args


def main(argv=None):
    try:
        return bench(options_of(sys.argv[1:] if argv is None else argv))
    except InputError as e:
        print(f"paper: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
