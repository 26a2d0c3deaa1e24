"""The paper's figures, drawn from finished runs.

    draw("figure1", setups_of(read_runs(["runs"])), "report/figure1")    # figure1.svg, figure1.png, figure1.csv

A figure is a grid of panels: a column is a setup, a row a quantity, a line a method, a language or a layer. Sizes are
those in print: one column fits a column of an ACL paper, more fit its page, and no letter is smaller than 7 points.
The colours, Okabe and Ito's, differ for the colour-blind too; each has a marker of its own, so that a figure reads in
grey. matplotlib is imported when something is drawn, and not before.
"""

import csv
import statistics
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from paper.arguments import TARGETS, TASK_NAMES
from paper.finished import read_log
from paper.results import Setup

# --- what the runs say ---------------------------------------------------------------------------------------
#
# A line is (label, {update or layer: [y of each seed]}, what matplotlib draws it with), and each row of panels has a
# function that gives the lines of a setup; some may have no points.


def look(i, dash=None):
    """The style of the i-th method or language; `dash` is that of another one."""
    colors = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
    dashes = ("-", "--", "-.", (0, (7, 1.5)))
    return {"color": colors[i % 7], "marker": "os^DvPX"[i % 7], "linestyle": dashes[(i if dash is None else dash) % 4]}


def logged(setup, method, key):
    """{update: [what the log of each seed has under `key`]}, without the updates at which none has it."""
    points = {}
    for run in setup.seeds({"method": method}).values():
        for entry in read_log(run):
            if entry.get(key) is not None:
                points.setdefault(entry["update"], []).append(entry[key])
    return points


def curves(key):
    """A number of the log, a line a method."""
    return lambda setup, methods: [(m, logged(setup, m, key), look(i)) for i, m in enumerate(methods)]


def languages(setup, methods):
    """The score of each language in the course of training; the method is the dash."""
    lines = []
    for dash, method in enumerate(methods):
        found = logged(setup, method, "scores")
        for i, name in enumerate(sorted({name for seeds in found.values() for name in seeds[0]}), len(methods)):
            points = {t: [scores[name] for scores in seeds if name in scores] for t, seeds in found.items()}
            points = {t: y for t, y in points.items() if y}
            lines.append((f"{name}, {method}", points, look(i, dash)))
    return lines


def layers(setup, methods):
    """The final score with each one layer frozen or started anew and, beside them, with none."""
    df, frozen, anew = (
        {n: [*setup.values({"method": method.format(n)}, "mean").values()] for n in range(DEEPEST)}
        for method in methods
    )
    df = {n: df[n] for n in df if frozen[n] or anew[n]}
    dotted = {"color": "0.25", "linestyle": ":", "marker": "_"}
    lines = (("frozen", frozen, look(0)), ("started anew", anew, look(1)), ("df", df, dotted))
    return [(label, {n: y for n, y in points.items() if y}, style) for label, points, style in lines]


def similarity(setup, methods):
    """Linear CKA of each layer with the pre-trained model: a mean, for the bands of so many lines hide each other."""
    found = logged(setup, "df", "cka")
    depth, style = max((len(cka) for (cka, *_) in found.values()), default=0), {"marker": "." * (len(found) == 1)}
    return [(f"layer {i}", {t: [statistics.fmean(cka[i] for cka in seeds if i < len(cka))] for t, seeds in found.items()
                            if any(i < len(cka) for cka in seeds)}, style) for i in range(depth)]  # fmt: skip


def first_phase(logs):
    """[(from, to)] of the updates in P1: from line to line of the log, where more than half were (mean over seeds)."""
    gained, spans = {}, []
    for log in logs:
        for before, line in zip([{"update": 0, "updates_in_first_phase": 0}, *log], log):
            more = line["updates_in_first_phase"] - before["updates_in_first_phase"]
            gained.setdefault((before["update"], line["update"]), []).append(more)
    for (start, end), of_seeds in sorted(gained.items()):
        if 2 * statistics.fmean(of_seeds) > end - start:
            joined = spans and spans[-1][1] == start
            spans[-1:] = [(spans[-1][0], end)] if joined else [*spans[-1:], (start, end)]
    return spans


# --- the figures ---------------------------------------------------------------------------------------------


class Figure(NamedTuple):
    """tasks: a column for each setup of them; methods: {} is a layer; rows: {quantity: f(setup, methods) -> lines}."""

    title: str
    tasks: tuple
    methods: tuple
    rows: dict[str, Callable]
    x: str = "update"


DEEPEST = 24  # layers: XLM-R large
CURVES = {"training loss": curves("loss"), "gap (points)": curves("gap")}
FIGURES = {
    "figure1": Figure(*TARGETS["figure1"], ("df", "fs", "ff", "slowfast"), CURVES),
    "figure2": Figure(*TARGETS["figure2"], ("df",), CURVES),
    "figure3": Figure(*TARGETS["figure3"], ("df", "freeze-layer-{}", "reinit-layer-{}"),
                      {"mean score (%)": layers}, "layer"),
    "figure4": Figure(*TARGETS["figure4"], ("df", "last-1", "last-2", "last-3"), CURVES),
    "figure5": Figure(*TARGETS["figure5"], ("df", "slowfast"), CURVES),
    "figure6": Figure(*TARGETS["figure6"], ("df",),
                      {"linear CKA": similarity}),
    "figure7": Figure(*TARGETS["figure7"], ("df", "slowfast"),
                      CURVES | {"dev score (%)": languages}),
}  # fmt: skip


def columns_of(figure, setups):
    """(title, the lines of each row, {method: spans of P1}) of each setup; of a task without one there are none."""
    for task in figure.tasks:
        for setup in [s for s in setups if s.task == task] or [Setup(task, TASK_NAMES[task], [], "test")]:
            timed = figure.methods if figure.x == "update" else ()
            phases = {m: first_phase(map(read_log, setup.seeds({"method": m}).values())) for m in timed}
            rows = [[line for line in lines(setup, figure.methods) if line[1]] for lines in figure.rows.values()]
            yield setup.name, rows, phases


def seeds_of(figure, setup):
    """[how many seeds a setup has] of each of a figure's methods that it has."""
    methods = {method.format(n) for method in figure.methods for n in range(DEEPEST)}
    return [n for n in (len(setup.seeds({"method": m})) for m in methods if setup.task in figure.tasks) if n]


def shows(name, setup):
    """Whether a setup has what a figure compares, two of its methods or its only one, and a line to draw of them."""
    enough = len(seeds_of(FIGURES[name], setup)) >= min(2, len(FIGURES[name].methods))
    return enough and any(any(panels) for _, panels, _ in columns_of(FIGURES[name], [setup]))


def caption_of(name, setups):
    """What a figure is of, and what its lines are of several seeds."""
    seeds = sorted({n for setup in setups for n in seeds_of(FIGURES[name], setup)})
    said = f"{FIGURES[name].title}; {' or '.join(map(str, seeds)) or 'no'} seed{'' if seeds == [1] else 's'}"
    if seeds and seeds[-1] > 1:
        bands = "" if name == "figure6" else " and the bands go from the lowest to the highest"
        said += f", the lines are means{bands}"
    return f"{said}."


# --- drawing -------------------------------------------------------------------------------------------------

LONG = 300  # points; lines of more would hide each other
STYLE = {
    "font.size": 7, "axes.titlesize": 8, "figure.labelsize": 7, "lines.linewidth": 1, "lines.markersize": 3,
    "legend.frameon": False, "legend.handlelength": 2.6, "legend.columnspacing": 1, "axes.linewidth": 0.6,
    "axes.spines.top": False, "axes.spines.right": False, "axes.xmargin": 0.03, "axes.formatter.useoffset": False,
    "svg.fonttype": "path", "svg.hashsalt": "slowfast",
}  # fmt: skip


def draw(name, setups, path, whole=True):
    """Draws a figure of these setups. Returns the files: `path`.svg, `path`.png (200 dpi) and `path`.csv, the exact
    numbers. The same runs give the same bytes, whatever the user's settings of matplotlib.

    A task without a setup has a column that says "not run". Without `whole` there are only columns with lines, and if
    there is none, nothing is drawn: []."""
    import matplotlib.style

    figure = FIGURES[name]
    columns = [column for column in columns_of(figure, setups) if whole or any(column[1])]
    if not columns:
        return []
    with matplotlib.style.context(["default", STYLE]):
        return written(picture_of(figure, columns, caption_of(name, setups)), table_of(figure, columns), path)


def written(picture, rows, path):
    """The files of a figure and its numbers."""
    svg, png, table = files = [Path(f"{path}.{kind}") for kind in ("svg", "png", "csv")]
    svg.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(svg, metadata={"Date": None})
    picture.savefig(png, metadata={"Software": None}, dpi=200)
    with open(table, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    return files


def table_of(figure, columns):
    """The header, then each point of each line."""
    yield ["panel", "quantity", "series", "x", "y", "low", "high"]
    for title, panels, _ in columns:
        for quantity, lines in zip(figure.rows, panels):
            for label, points, _ in lines:
                for x, y, *band in zip(*numbers(points)):
                    yield [title, quantity, label, x, y, *(band or ["", ""])]


def numbers(points):
    """[x, the means over seeds] and, of several seeds, the lowest and the highest."""
    x = sorted(points)
    ends = (min, max) if any(len(points[t]) > 1 for t in x) else ()
    return [x, *([of_seeds(points[t]) for t in x] for of_seeds in (statistics.fmean, *ends))]


def picture_of(figure, columns, caption):
    """The matplotlib figure."""
    import matplotlib.figure

    width = 3.1 if len(columns) == 1 else max(6.3, 1.26 * len(columns))  # inches
    picture = matplotlib.figure.Figure(figsize=(width, 1), layout="constrained")
    axes = picture.subplots(len(figure.rows), len(columns), sharex="col", squeeze=False)
    for (_, panels, _), column in zip(columns, axes.T):
        for ax, lines in zip(column, panels):
            draw_panel(ax, lines)
        ax.set_xlabel(figure.x)
        ax.xaxis.set_major_formatter("{x:,.0f}")
        ax.locator_params(axis="x", integer=True, nbins=int(1.6 * width / len(columns)))
        if not any(panels):
            ax.set_xticks([])
    for ax, quantity in zip(axes[:, 0], figure.rows):
        ax.set_ylabel(quantity)
    picture.align_ylabels()
    above = draw_scale(picture, axes) if "linear CKA" in figure.rows else draw_legend(picture, axes, figure.methods)
    draw_titles(axes, columns)
    if any(len(points) > LONG for _, panels, _ in columns for lines in panels for _, points, _ in lines):
        caption += f" Lines of more than {LONG} points are running means over 2 % of them."
    caption = textwrap.fill(caption, int(20 * width))
    picture.supxlabel(caption, x=0.01, ha="left")
    picture.set_figheight(1.4 * len(axes) + 0.6 + 0.14 * (caption.count("\n") + above))
    return picture


def draw_panel(ax, lines):
    """Each line over its band; of many points some have a marker, other ones than those of the next line."""
    for i, (label, points, style) in enumerate(lines):
        n = len(points) // 50 if len(points) > LONG else 1
        x, y, *band = (np.convolve(v, np.ones(n) / n, "valid") for v in numbers(points))
        step = 1 if len(x) < 20 else len(x) // 8
        ax.plot(x, y, label=label, markevery=(step * i // len(lines), step), **style)
        if band:
            ax.fill_between(x, *band, color=style["color"], alpha=0.15, linewidth=0)
    if lines:
        ax.locator_params(axis="y", nbins=5)
    else:
        ax.text(0.5, 0.5, "not run", color="0.4", ha="center", va="center", transform=ax.transAxes)
        ax.set_yticks([])


def draw_titles(axes, columns):
    """Titles and, below them, when methods were in P1: a strip for each, in the order of the legend, and in the panels
    a shade, the darker the more of them."""
    methods = list(columns[0][2])
    shown = [method for method in methods if any(spans[method] for _, _, spans in columns)]
    for (title, _, spans), column in zip(columns, axes.T):
        ax = column[0]
        ax.set_title(title, y=1.06 + 0.06 * len(shown))
        if any(spans.values()):
            centre, place = (0, 1.05 + 0.03 * len(shown)), {"xycoords": "axes fraction", "textcoords": "offset points"}
            ax.annotate("P1", centre, (-4, 0), ha="right", va="center", **place)
        for i, method in enumerate(reversed(shown)):
            style, y = look(methods.index(method)), 1.06 + 0.06 * i  # of the panel's height
            for start, end in spans[method]:
                ax.axvspan(start, end, y, y + 0.04, color=style["color"], linewidth=0, clip_on=False)
                ax.plot(start, y + 0.02, transform=ax.get_xaxis_transform(), clip_on=False, **style)
                for panel in column:
                    panel.axvspan(start, end, color="black", alpha=0.12 / len(shown), linewidth=0, zorder=0)


def draw_legend(picture, axes, first):
    """One legend for all panels, above them. Returns its lines."""
    found = {}
    for ax in axes.flat:
        found |= dict(zip(*reversed(ax.get_legend_handles_labels())))
    labels = sorted(found, key=[*first, *found].index)
    inches = 0.45 + 0.052 * len("".join(labels)) / max(len(labels), 1)  # of an entry, in the mean
    columns = int(picture.get_figwidth() / inches)
    picture.legend([found[label] for label in labels], labels, loc="outside upper center", ncols=columns)
    return -(-len(labels) // columns)


def draw_scale(picture, axes):
    """Colours the lines, of layers 0, 1, ..., by a scale beside the panels. Returns the lines of a legend: none."""
    from matplotlib.cm import ScalarMappable

    depth = max(len(ax.lines) for ax in axes.flat)
    scale = ScalarMappable(cmap="viridis")
    scale.set_clim(0, 1.12 * depth)  # without the last, pale part
    for ax in axes.flat:
        ax.set_ylim(0, 1.03)
        for i, line in enumerate(ax.lines):
            line.set_color(scale.to_rgba(i))
    if depth:
        bounds, ticks = [i - 0.5 for i in range(depth + 1)], range(0, depth, -(-depth // 6))
        picture.colorbar(scale, ax=axes, label="layer", boundaries=bounds, ticks=ticks)
    return 0
