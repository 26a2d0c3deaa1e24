"""The runs that the paper's tables and figures need: which there are, and making those that are lacking.

    python -m paper make table6 figure3 --model models/xlm-roberta-base     # runs what they lack, then shows them

Runs are shared: slowfast with seed 1 is one run in all the tables. So is the work: of several processes with the same
command each takes the runs that no other is at, on one machine or, in a shared folder, on many (grid.slurm).
"""

import sys
import textwrap
from dataclasses import replace
from pathlib import Path

from data import InputError
from model import read_config
from paper import options, ranks
from paper.arguments import TARGETS, TASK_NAMES, options_of_run
from paper.figures import FIGURES, draw
from paper.finished import read_log, read_result, read_settings, splits_of
from paper.folder import Taken, is_taken, is_there, tidy_finished
from paper.results import described, read_runs, scored_on, setups_of
from paper.run import digest_of, load_task, resolved, start
from paper.tables import TITLES, claims_of, paper_table, render, settings_of_table

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
    wanted = [pair for target in targets_of(args) for pair in settings_of_target(target, depth)]
    runs = {}
    for seed in args.seeds:
        for task, settings in wanted:
            if task in args.tasks:
                run = options_of_run(args, task, settings | {"seed": seed})
                runs.setdefault(run.directory, run)
    return runs


# --- which of them there are ---------------------------------------------------------------------------------


def lacking_of(args, runs):
    """{directory: whether it is finished, and lacks test sets alone} of the runs that are to be made or completed.
    Raises InputError where another run lies under the name of one, or one that lacks what cannot be added to it."""
    known, lacking = {}, {}
    for folder, run in runs.items():
        there = said_in(folder)
        if there:
            if run.task not in known:  # the runs of a task share what they read
                known[run.task] = contents_of(run)
            check_same(folder, run, there, *known[run.task])
        finished = is_there(folder)
        check_logged(args, run, there if finished else None)
        tests = [name for name in known[run.task][1] if name not in splits_of(there)] if finished else []
        if tests and not any(folder.glob("best*")):
            raise InputError(f"{folder} was not measured on {', '.join(tests)}, and its weights were not kept: remove "
                             "it, and the same command runs it again")  # fmt: skip
        if tests or not finished:
            lacking[folder] = finished
    return lacking


def said_in(folder):
    """What a directory says of the run in it, its result or, of one that is not finished, {"settings"}; or None."""
    if is_there(folder):
        return read_result(folder / "result.json") | {"folder": folder}
    settings = folder / "settings.json"
    return {"settings": read_settings(settings)} if settings.is_file() else None


def contents_of(run):
    """(the settings by which a run knows its data and its model, {test set: its digest})"""
    _, task = load_task(run)
    there = resolved(replace(run, precision="fp32"), task, None)
    settings = {name: getattr(there, name) for name in ("languages", "data_sha256", "model_sha256")}
    return settings, {name: digest_of(sets.values()) for name, sets in task.tests.items()}


def check_same(folder, run, result, settings, tests):
    """Raises InputError if the run that is there is not the one that would be run, by its settings and by the contents
    of its data and its model. A precision that is not asked for is the device's, and not compared."""
    there = {name: f.default for name, f in options.FIELDS.items()} | result["settings"]
    here = run.settings | settings | ({} if run.precision else {"precision": there["precision"]})
    odd = [(name, there.get(name), here.get(name)) for name in options.differing(there, here)]
    digests = {name: result[name].get("data_sha256") for name in tests if name in splits_of(result)}
    odd += [(f"{name}.data_sha256", digests[name], tests[name]) for name in digests if digests[name] != tests[name]]
    if odd:
        what = ", ".join(f"{name} {value} there and {other} here" for name, value, other in odd[:3])
        raise InputError(f"{folder} holds another run ({what}); give another --runs, or remove it")


# rows of figures: what they are in the log, and the option that puts it there
LOGGED = {"gap (points)": ("gap", "gap_every"), "dev score (%)": ("scores", "gap_every"),
          "linear CKA": ("cka", "cka_every")}  # fmt: skip


def check_logged(args, run, result=None):
    """Raises InputError if a figure is to show what the log of a finished run has not, or that of this one will not."""
    for name in targets_of(args):
        shown = name in FIGURES and run.task in FIGURES[name].tasks and run.method in FIGURES[name].methods
        for row in (row for row in FIGURES[name].rows if row in LOGGED) if shown else ():
            key, option = LOGGED[row]
            if not (any(key in line for line in read_log(result)) if result else getattr(run, option)):
                raise InputError(
                    f"{name} shows the {row}, which {run.directory} is without: {'remove it and ' if result else ''}"
                    f"give --args '--{option.replace('_', '-')} N', N from 1 to the number of its updates"
                )


def plan(args):
    """Prints how many runs the targets need, how many are there, and how many are lacking."""
    runs = planned(args)
    lacking = lacking_of(args, runs)
    rows = [["task", "runs", "there", "lacking"]]
    for task in (task for task in TASK_NAMES if any(run.task == task for run in runs.values())):
        there = [folder not in lacking for folder, run in runs.items() if run.task == task]
        rows.append([TASK_NAMES[task], *(str(n) for n in (len(there), sum(there), len(there) - sum(there)))])
    print(render(rows))


# --- making them ---------------------------------------------------------------------------------------------


def make(args):
    """Runs what the targets lack, then prints the tables and draws the figures. Returns the exit status: 2 if a run
    diverged."""
    runs, failed, elsewhere = planned(args), [], []
    ranks.first(tidy_finished, runs)
    lacking = ranks.first(lacking_of, args, runs)
    for n, (folder, tests_alone) in enumerate(lacking.items(), 1):
        there, taken = ranks.first(state_of, folder)
        if there and not tests_alone:  # another process has made it meanwhile
            continue
        if taken:
            elsewhere.append(folder)
            continue
        print(f"run {n} of {len(lacking)}: {folder}", file=sys.stderr)
        try:
            start(runs[folder])
        except Taken:  # while this process was still reading its data another has taken the run, or even made it
            elsewhere.append(folder)
        except FloatingPointError as e:  # it says something of its settings, not of the others
            print(f"paper: {folder}: {e}", file=sys.stderr)
            failed.append(folder)
    ranks.first(show_made, args, runs)
    if elsewhere := ranks.first(lacking_of, args, {folder: runs[folder] for folder in elsewhere}):
        print(f"paper: another process is at {len(elsewhere)} of these runs; the same command shows them when it is "
              "done", file=sys.stderr)  # fmt: skip
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
    return f"{target[:-1].capitalize()} {target[-1]}. {TARGETS[target][0]}"
