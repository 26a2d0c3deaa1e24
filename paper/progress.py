"""What a run shows while it trains and when it is done."""

import math
import sys
import time

import torch

from paper import ranks


def print_scores(result):
    for name, r in result.items():
        if isinstance(r, dict) and "scores" in r:
            gap = "" if r["gap"] is None else f", others {r['non_source']:.1f}, gap {r['gap']:.1f}"
            print(f"{result['method']} seed {result['seed']}, {name}: {r['measure']} mean {r['mean']:.1f}, "
                  f"source {r['source']:.1f}{gap}")  # fmt: skip


class Progress:
    """The one line that a run shows while it trains, on stderr: renewed in place on a terminal, else now and then."""

    PACE = 5  # updates after which a run says how long it will take: the first are slower

    def __init__(self, run):
        self.began, self.first = time.monotonic(), run.update
        self.shown = 0.0
        self.open = False  # a line on a terminal that is still to be renewed or ended

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.end_line()

    def end_line(self):
        """Whatever is printed next, a message above all, begins on a line of its own."""
        if self.open:
            print(file=sys.stderr)
        self.open = False

    def __call__(self, run, doing="", line=False):
        terminal = sys.stderr.isatty()
        now = time.monotonic()
        if run.update - self.first == self.PACE and not (doing or line):
            self.announce(run)
        if not (doing or line or (terminal and now - self.shown > 0.5)):
            return
        self.shown = now
        text = self.text(run, now) + (f"  {doing}" if doing else "")
        print(f"\r{text}\033[K" if terminal else text, end="" if terminal else "\n", file=sys.stderr, flush=True)
        self.open = terminal

    def text(self, run, now):
        p = run.policies
        loss = f"{p.curve.recent or sum(p.curve.losses) / max(len(p.curve.losses), 1):.3f}"
        multipliers = " ".join(f"{cell} {k:.2g}" for cell, k in p.multipliers.items() if k != 1) or "1"
        gap = "" if run.gap is None else f"  gap {run.gap:.1f}"
        # at the pace of this session, evaluations included
        left = (run.total - run.update) * (now - self.began) / max(run.update - self.first, 1)
        return (f"{run.update}/{run.total}  loss {loss}  P{1 if p.in_first_phase else 2}  K {multipliers}{gap}"
                f"  {run.update / max(run.training_seconds, 1e-9):.2f} updates/s  {duration(left)} left")  # fmt: skip

    def announce(self, run):
        """Says once, early, how long the run will take on this machine."""
        self.end_line()
        print(f"{run.out}: about {duration(seconds_of(run))} on this machine ({name_of_device(run.device)}); Ctrl-C "
              "stops it, and the same command goes on from there", file=sys.stderr)  # fmt: skip


def seconds_of(run):
    """About how long what is left of a run takes, tests and all, from the pace of its first updates: a token that is
    trained costs three times one that is predicted (forward, and backward twice)."""
    o = run.options
    gaps = run.total // o.gap_every if o.gap_every else 0
    evaluations = math.ceil(run.total / o.eval_every) if o.eval_every else 1
    predicted = gaps * tokens_of(run.gap_sets) + evaluations * tokens_of(run.task.dev)
    predicted += sum(map(tokens_of, run.task.tests.values()))
    pace = run.training_seconds / run.update
    return (run.total - run.update) * pace + predicted / 3 * run.training_seconds / run.tokens


def tokens_of(sets):
    return sum(len(examples.ids) for examples in sets.values())


def duration(seconds):
    """3 d 4 h, 2 h 5 min, 7 min or 20 s."""
    s = int(seconds)
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60} min"
    return f"{s // 3600} h {s % 3600 // 60} min" if s < 86400 else f"{s // 86400} d {s % 86400 // 3600} h"


def name_of_device(device):
    several = f"{ranks.WORLD} x " if ranks.WORLD > 1 else ""
    if device.type == "cuda":
        return several + torch.cuda.get_device_name(device)
    return f"{several}cpu, {torch.get_num_threads()} threads"
