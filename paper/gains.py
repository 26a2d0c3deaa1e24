"""What the method gains over plain fine-tuning, in every setup with several seeds: the README's first table, and its
figure. Neither is the paper's.

    rows, about = does_it_work(groups)
    draw_gains(setups, "results/figures/gains")
"""

import itertools
import json
import statistics
from pathlib import Path

import numpy as np

from paper.arguments import TASK_NAMES, VARIED
from paper.figures import STYLE, draw_legend, look, written
from paper.options import FIELDS, MEASURING, RESULT, TASKS, decides
from paper.results import EQUAL_GAP, difference, in_epochs, paired
from paper.tables import NOTHING, numbers_of_paper

DF, OURS = {"method": "df"}, {"method": "slowfast"}

# --- the table -----------------------------------------------------------------------------------------------

COLUMNS = {
    "mean": "Δ mean",
    "source": "Δ English",
    "non_source": "Δ others",
    "gap": "Δ gap",
    EQUAL_GAP: "equal English",
}


def does_it_work(groups):
    """(rows, a text about them): what slowfast gains, and what that says of the paper's conclusions, a row a setup of
    evidence_of() below the paper's row of that task."""
    rows = [["run", "updates", "in P1", "n", "df", *COLUMNS.values()]]
    there = evidence_of(groups)
    tasks = [task for task in TASK_NAMES if any(setup.task == task for _, setup in there)]
    for task in tasks:
        df, ours = (numbers_of_paper(task, method) for method in ("df", "slowfast"))
        more = [f"{number(ours[x]) - number(df[x]):+.1f}  " if x in df else NOTHING for x in COLUMNS]
        rows.append([f"{TASK_NAMES[task]}, paper", in_epochs(TASKS[task]["epochs"]), "", "4", f"{number(df['mean'])}"])
        rows[-1] += more
        for name, setup in ((name, setup) for name, setup in there if setup.task == task):
            lead = [name, f"{max(run['updates'] for run in setup.runs):,}", part_in_P1(setup, OURS)]
            seeds = str(len(paired(setup, OURS, DF, "mean")))
            of_df = statistics.fmean(setup.values(DF, "mean").values())
            gains = {x: marked(x, difference(setup, OURS, DF, x)) for x in COLUMNS}
            if (n := len(paired(setup, OURS, DF, EQUAL_GAP))) not in (0, int(seeds)):
                gains[EQUAL_GAP] += f" ({n})"
            rows.append([*lead, seeds, f"{of_df:.1f}", *gains.values()])
    lacking = ", ".join(name for task, name in TASK_NAMES.items() if task not in tasks)
    return rows, (
        "Percent, means over languages and n seeds (or fewer). Δ is slowfast minus df ± half of its 95 % interval, of "
        "the gap also where both have the same English score. The paper concludes higher scores and a smaller gap: ✓ "
        "so it is here, ✗ the other way, ? not distinguishable. * P1 was set to be the first part of the run. Not run "
        f"with two seeds: {lacking or 'none'}."
    )


def evidence_of(groups):
    """[(name, setup)] of the setups that can say something of the method. The longest first; the name is that of the
    group or, if it is not "data", that of the data's folder."""
    found = []
    for group, (_, setups) in groups.items():
        for setup in filter(says_something, setups):
            data = Path(setup.settings["data"]).name
            found.append((group if data == "data" else data, setup))
    return sorted(found, key=lambda pair: -max(run["updates"] for run in pair[1].runs))


def says_something(setup):
    """Whether its runs are of the official files, with two seeds or more of both methods."""
    return not setup.of_the_demos_texts and len(paired(setup, OURS, DF, "mean")) > 1


def number(text):
    """Of the mean in "74.7±0.2"."""
    return float(text.partition("±")[0])


def marked(quantity, found):
    """ "+0.5±0.4 ✓", of what `difference` found: a mean, half its interval, and what that says of the conclusion that a
    score is higher or a gap smaller."""
    if found is None or None in found:
        return NOTHING
    mean, low, high = found
    sign = -1 if quantity in ("gap", EQUAL_GAP) else 1
    said = "?" if low <= 0 <= high else "✓" if sign * mean > 0 else "✗"
    return f"{mean:+.1f}±{(high - low) / 2:.1f} {said}"


def part_of(setup, settings):
    """The part of the updates that were in P1, in the mean over seeds."""
    runs = setup.seeds(settings).values()
    return statistics.fmean(run["updates_in_first_phase"] / run["updates"] for run in runs)


def part_in_P1(setup, settings):
    """ "16 %" of the updates; with a star where that was set and not found: not of the df that such a setup is lent."""
    was_set = any(run["settings"].get("phase") == "fraction" for run in setup.seeds(settings).values())
    return f"{100 * part_of(setup, settings):.0f} %" + "*" * was_set


# --- the figure ----------------------------------------------------------------------------------------------

RIVALS = ("noisytune", "fs", "ff", "slowfast")
PANELS = {"mean": "Δ mean", "source": "Δ source", "gap": "Δ gap"}
BY_PART = "mean by part in P1"
# what runs of one kind may differ in here: their length, and what is measured of them
LENGTH = {"max_updates", "epochs", "window", *(x for x, f in FIELDS.items() if f.metadata.get("group") == MEASURING)}


def draw_gains(setups, path):
    """Draws what methods have more than df, with 95 % intervals over seeds. A row of panels for each task: against the
    number of updates, of runs of one kind, that of which there are most lengths; and the mean of slowfast against the
    part of the updates in P1, of all setups. Returns the files, as `draw` does; [] if no task has two lengths."""
    import matplotlib.figure
    import matplotlib.style

    kinds = kinds_of(setups)
    if not kinds:
        return []
    rows = [row for task in kinds for row in [*gains_by_length(task, kinds[task]), *gains_by_part(task, setups)]]
    methods = [method for method in RIVALS if any(method == series for _, _, _, series, *_ in rows)]
    with matplotlib.style.context(["default", STYLE]):
        picture = matplotlib.figure.Figure(figsize=(6.3, 0.5 + 1.5 * len(kinds)), layout="constrained")
        axes = picture.subplots(len(kinds), len(PANELS) + 1, squeeze=False)
        for task, panels in zip(kinds, axes):
            draw_row(panels, task, kinds[task], [row for row in rows if row[0] == task], methods)
        for ax, label in zip(axes[0], [*PANELS.values(), PANELS["mean"]]):
            ax.set_title(label)
        draw_legend(picture, axes, methods)
        header = ["task", "quantity", "x", "series", "minus df", "low", "high"]
        return written(picture, [header, *rows], path)


def draw_row(panels, task, gains, rows, methods):
    """The panels of a task: one for each of PANELS, and one of the part in P1."""
    lengths, s = lengths_of(gains), next(iter(gains.values())).settings
    part = f", P1 {100 * s['fraction']:g} %" if s.get("phase") == "fraction" else ""
    *by_length, by_part = panels
    for ax, quantity in zip(by_length, PANELS):
        draw_bars(ax, [row for row in rows if row[1] == quantity], methods, lambda x, i: x * 1.15**i)
        ax.set_xscale("log")
        ax.set_xticks(lengths, [f"{n:,}" for n in lengths])
        ax.minorticks_off()
        ax.set_xlabel(f"updates of {TASK_NAMES[task]}{part}")
    draw_bars(by_part, [row for row in rows if row[1] == BY_PART], methods, lambda x, i: x)
    by_part.set(xlabel="slowfast: % in P1", xlim=(0, None))
    panels[0].set_ylabel("points")


def kinds_of(setups):
    """{task: its kind of gains_of() that has most lengths}, of the tasks that have two lengths."""
    kinds = sorted(gains_of(setups).items(), key=lambda kind: len(lengths_of(kind[1])))
    longest = {task: gains for (task, _), gains in kinds if len(lengths_of(gains)) > 1}  # the last of a task stays
    return {task: longest[task] for task in TASK_NAMES if task in longest}


def lengths_of(gains):
    return sorted({n for n, _ in gains})


def gains_by_length(task, gains):
    """[(task, quantity, number of updates, method, its difference from df, low, high)] of a kind of gains_of()"""
    return [
        (task, quantity, n, method, *difference(gains[n, method], {"method": method}, DF, quantity))
        for n, method, quantity in itertools.product(lengths_of(gains), RIVALS, PANELS)
        if (n, method) in gains
    ]


def gains_by_part(task, setups):
    """[(task, BY_PART, percent of the updates in P1, "slowfast", its difference from df in the mean, low, high)]"""
    return [
        (task, BY_PART, 100 * part_of(s, OURS), "slowfast", *difference(s, OURS, DF, "mean"))
        for s in setups if s.task == task and says_something(s)
    ]  # fmt: skip


def draw_bars(ax, rows, methods, beside):
    """A point and a bar for each row, a look for each method; beside(x, i) is where those of the i-th from the middle
    stand."""
    ax.axhline(0, color="0.4", linewidth=0.6)
    there = [method for method in methods if any(method == series for _, _, _, series, *_ in rows)]
    for i, method in enumerate(there):
        points = [(beside(x, i - (len(there) - 1) / 2), *found) for _, _, x, series, *found in rows if series == method]
        x, mean, low, high = np.array(points).T
        style = look(methods.index(method)) | {"linestyle": "none"}
        ax.errorbar(x, mean, [mean - low, high - mean], label=method, capsize=1.5, elinewidth=0.8, **style)
    ax.margins(x=0.1)


def gains_of(setups):
    """{(task, what its runs have in common, as text): {(updates, method): the setup with most seeds of it, or else most
    runs}}, of two seeds or more."""
    found = {}
    for setup in setups:
        settings = {k: v for k, v in setup.settings.items() if decides(k) == RESULT and k not in {*VARIED, *LENGTH}}
        kind, updates = (setup.task, json.dumps(settings, sort_keys=True)), max(run["updates"] for run in setup.runs)
        seeds = {method: len(paired(setup, {"method": method}, DF, "mean")) for method in RIVALS}
        for method in (method for method, n in seeds.items() if n > 1):
            there = found.setdefault(kind, {}).setdefault((updates, method), [])
            there.append((seeds[method], sum(seeds.values()), setup))
    return {
        kind: {gain: max(there, key=lambda one: one[:2])[2] for gain, there in gains.items()}
        for kind, gains in found.items()
    }
