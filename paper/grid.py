"""The runs that the paper's tables and figures need: which there are, and making those that are lacking.

    python -m paper make table6 figure3 --model models/xlm-roberta-base     # runs what they lack, then shows them

Runs are shared: slowfast with seed 1 is one run in all the tables. So is the work: of several processes with the same
command each takes the runs that no other is at, on one machine or, in a shared folder, on many (grid.slurm).
"""

import shlex
import sys
import textwrap
from pathlib import Path

from data import InputError
from model import read_config
from paper import options, ranks
from paper.figures import FIGURES, draw
from paper.folder import Taken, is_taken, is_there
from paper.results import TASK_NAMES, described, read_runs, scored_on, setups_of
from paper.run import start
from paper.tables import TITLES, claims_of, paper_table, render, settings_of_table

TARGETS = (*TITLES, *FIGURES)


def add_options(parser):
    """Of `make` and `plan`."""
    add = parser.add_argument
    add("targets", nargs="+", metavar="TARGET", choices=(*TARGETS, "tables", "figures"),
        help=f"{', '.join(TARGETS)}; tables; figures")  # fmt: skip
    add("--seeds", type=int, nargs="+", default=[1, 2, 3, 4], metavar="N", help="(default: 1 2 3 4)")
    add("--tasks", nargs="+", choices=TASK_NAMES, default=list(TASK_NAMES), help="these alone (default: all)")
    add("--setup", default="paper", help="hyper-parameters: paper, small, demo (default: paper)")
    add("--model", required=True, metavar="DIR", help="as of `run`")
    add("--data", default="data", metavar="DIR", help="as of `run`")
    add("--runs", default="runs", metavar="DIR", help="where runs lie (default: runs)")
    add("--keep", action="store_true", help="keep each run's weights (XLM-R base: 1.1 GB a run)")
    add("--args", default="", metavar="TEXT", help='further options of `run`, such as "--max-updates 1500"')
    add("--out", default="report", metavar="DIR", help="where figures go (default: report)")


# --- which runs there are to be ------------------------------------------------------------------------------


def targets_of(args):
    whole = {"tables": TITLES, "figures": FIGURES}
    return list(dict.fromkeys(target for name in args.targets for target in whole.get(name, [name])))


def settings_of_target(target, depth):
    """[(task, settings)] of the runs that a table or a figure shows, and of df, which it is compared with; a model has
    `depth` layers."""
    if target in TITLES:
        return settings_of_table(target)
    methods = [m.format(i) for m in FIGURES[target].methods for i in range(depth if "{}" in m else 1)]
    return [(task, {"method": method}) for task in FIGURES[target].tasks for method in methods]


def planned(args):
    """{directory: Options} of the runs that args.targets need, in the order to run them in: all with the first seed
    before any with the next."""
    depth = read_config(Path(args.model, "config.json")).num_hidden_layers
    try:
        more = shlex.split(args.args)
    except ValueError as e:
        raise InputError(f"--args {args.args}: {e}") from e
    wanted = [pair for target in targets_of(args) for pair in settings_of_target(target, depth)]
    runs = {}
    for seed in args.seeds:
        for task, settings in wanted:
            if task in args.tasks:
                run = options_of_run(args, task, settings | {"seed": seed}, more)
                runs.setdefault(run.directory, run)
    return runs


def options_of_run(args, task, settings, more):
    command = [task, "--setup", args.setup, "--model", args.model, "--data", args.data, "--runs", args.runs]
    command += [*(f"--{k}={v}" for k, v in settings.items()), *more, *([] if args.keep else ["--discard"])]
    run = options.parse(command)
    for name, value in (settings | {"out": None}).items():
        if getattr(run, name) != value:
            raise InputError(f"--args {args.args}: --{name} is what the tables and figures themselves set")
    return run


def plan(args):
    """Prints how many runs the targets need, how many are there, and how many are lacking."""
    runs = planned(args)
    rows = [["task", "runs", "there", "lacking"]]
    for task in (task for task in TASK_NAMES if any(run.task == task for run in runs.values())):
        there = [is_there(folder) for folder, run in runs.items() if run.task == task]
        rows.append([TASK_NAMES[task], *(str(n) for n in (len(there), sum(there), len(there) - sum(there)))])
    print(render(rows))


# --- making them ---------------------------------------------------------------------------------------------


def make(args):
    """Runs what the targets lack, then prints the tables and draws the figures. Returns the exit status: 2 if a run
    diverged."""
    runs, failed, elsewhere = planned(args), [], 0
    lacking = ranks.first(lambda: [folder for folder in runs if not is_there(folder)])
    for n, folder in enumerate(lacking, 1):
        there, taken = ranks.first(state_of, folder)
        if there:  # another process has made it meanwhile
            continue
        if taken:
            elsewhere += 1
            continue
        print(f"run {n} of {len(lacking)}: {folder}", file=sys.stderr)
        try:
            start(runs[folder])
        except Taken:  # while this process was still reading its data another has taken the run, or even made it
            elsewhere += not ranks.first(is_there, folder)
        except FloatingPointError as e:  # it says something of its settings, not of the others
            print(f"paper: {folder}: {e}", file=sys.stderr)
            failed.append(folder)
    ranks.first(show_made, args, runs)
    if elsewhere:
        print(f"paper: another process is at {elsewhere} of these runs; the same command shows them when it is done",
              file=sys.stderr)  # fmt: skip
    if failed:
        print(f"paper: {len(failed)} runs diverged and are not shown: {', '.join(map(str, failed))}", file=sys.stderr)
    return 2 if failed else 0


def state_of(folder):
    """(whether its run is finished, whether another process is at it)"""
    return is_there(folder), is_taken(folder)


def show_made(args, runs):
    made = [folder for folder in runs if is_there(folder)]
    show(targets_of(args), setups_of(read_runs(made)) if made else [], Path(args.out))


LEGEND = (
    "Percent, means over the languages; ± is the standard deviation over seeds, (n) their number where it is not 4. "
    "Below a row: its difference from df with the 95 % interval, paired over seeds, or over test examples where there "
    "is one seed; and the paper's numbers (XLM-R base, 4 seeds), where the runs are of their kind: whole epochs of the "
    "official files, the test sets of its languages."
)


def show(targets, setups, out):
    """Prints tables, and draws figures into the folder `out`."""
    for target in targets:
        if target in FIGURES:
            files = draw(target, setups, out / target)
            print(f"{titled(target)}: {', '.join(map(str, files))}\n")
        else:
            print(f"{titled(target)}\n\n{render(paper_table(target, setups))}\n")
            print(*(f"- {claim}" for claim in claims_of(target, setups)), "", sep="\n")
    if any(target in TITLES for target in targets):
        print(textwrap.fill(LEGEND, 120), "", sep="\n")
    for setup in setups:
        print(textwrap.fill(f"{setup.name}: {described(setup)}, {scored_on(setup)}", 120))


def titled(target):
    """ "Table 6. Starting parts of ..." """
    return f"{target[:-1].capitalize()} {target[-1]}. {TITLES[target] if target in TITLES else FIGURES[target].title}"
