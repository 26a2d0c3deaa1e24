"""The page of all that was run: every setup's scores, differences and curves, and the results in the top README.

    python -m paper report runs --out report                                # report/report.md
    python -m paper report results --out results --readme README.md         # make results: results/README.md, and the
                                                                            # marked blocks in README.md
Runs are grouped by the folder that they lie in, below the one that is given; its NOTES.md says how they were made.
"""

import json
import re
import statistics
import textwrap
from pathlib import Path

from data import InputError, whole_file
from paper.bench import as_written, speed
from paper.figures import caption_of, draw, shows
from paper.finished import read_text
from paper.gains import does_it_work, draw_gains, part_in_P1
from paper.grid import FIGURES, TITLES, titled
from paper.methods import METHODS
from paper.results import described, read_runs, scored_on, setups_of
from paper.tables import claims_of, differences, gaps_besides, render, run_table, score_text, spread, tables_of, views


def report(args):
    """Writes the page and its figures into a folder, and the blocks of a README."""
    groups, out = groups_of(args.runs), Path(args.out)
    page = out / ("README.md" if args.readme else "report.md")
    written = {}
    if args.readme:
        setups = [setup for _, of_group in groups.values() for setup in of_group]
        rows, about = does_it_work(groups)
        blocks = {"does it work": [render(rows, markdown=True), "", *wrapped(about)], "demo": demo(setups)}
        blocks["speed"] = speed(Path(args.runs[0]) / "bench")
        blocks["promises"] = promises(Path(args.runs[0]) / "soak.json")
        written[Path(args.readme)] = with_blocks(Path(args.readme), blocks)
    out.mkdir(parents=True, exist_ok=True)
    written[page] = "\n".join(page_of(groups, out)).rstrip() + "\n"
    for file, text in written.items():
        with whole_file(file) as part:
            part.write_text(text, encoding="utf-8")
        print(file)


def groups_of(folders):
    """{name: (folder, Setups)}: of the runs in each folder below those that are given, the longest runs first."""
    groups = {}
    for top in map(Path, folders):
        for run in read_runs([top]):
            below = run["folder"].relative_to(top).parts
            folder = top / below[0] if len(below) > 1 else top
            groups.setdefault(folder.resolve().name, (folder, []))[1].append(run)
    longest = sorted(groups.items(), key=lambda group: -max(run["updates"] for run in group[1][1]))
    return {name: (folder, setups_of(runs)) for name, (folder, runs) in longest}


# --- the page ------------------------------------------------------------------------------------------------


def page_of(groups, out):
    """Writes figures into out/figures and returns the lines of a Markdown page with all that these runs say."""
    lines = [
        "# What was run, and what came out", "",
        "A multilingual encoder is fine-tuned on one language, the source, and measured in others. The **gap** is the",
        "score in the source minus the mean of the others. `df` is plain fine-tuning, `slowfast` the paper's method.",
        "Scores are percent, ± is the standard deviation over seeds; below a row stands its difference from `df` with",
        "the 95 % interval: over seeds Student's t of the paired differences, with one seed a bootstrap of the test",
        "examples, which knows nothing of the chance in training. In P1: how many updates were in the first phase,",
        "with a star where that was set and not found (`--phase fraction`).",
        "A model that is chosen early has a smaller gap, whatever the method: so where the chosen one is not the last,",
        "the gap at the end stands beside its own (on the part of the dev sets that the log has), and below a",
        "method how much larger its gap is where its score in the source is that of df (interpolated along both runs).",
        "",
        "Runs that differ in more than method, constants and seed have tables of their own. The paper's numbers (XLM-R",
        "base, 4 seeds) stand beside test scores in its languages after whole epochs on the official files alone.", "",
    ]  # fmt: skip
    lines += gains_figure([setup for _, setups in groups.values() for setup in setups], out)
    for name, (folder, setups) in groups.items():
        notes = folder / "NOTES.md"
        lines += [f"## {name}", "", *(read_text(notes).splitlines() if notes.is_file() else []), ""]
        lines += [*methods_of(setups), *unfinished(folder), *figures_of(name, setups, out)]
        for setup in setups:
            lines += section(setup)
    return lines


def gains_figure(setups, out):
    """The lines of the figure of what a method gains in runs of several lengths, if there are such."""
    files = draw_gains(setups, out / "figures" / "gains")
    if not files:
        return []
    svg, png, table = (file.relative_to(out).as_posix() for file in files)
    return [f"![What each method gains over df]({png})", "",
            "What each method has more than df by the number of updates, and slowfast by the part of them in P1, with "
            f"95 % intervals ([vector]({svg}), [numbers]({table}))", ""]  # fmt: skip


def methods_of(setups):
    names = {run["settings"]["method"] for setup in setups for run in setup.runs} - {"df", "slowfast"}
    lines = [f"- `{name}`: {row.about}" for name, row in METHODS.items() if name in names]
    return [*lines, *([""] if lines else [])]


def unfinished(folder):
    """What lies there and has no result: runs that are still at it, or that diverged."""
    runs = [file.parent for file in sorted(folder.rglob("settings.json"))]
    names = [f"`{run.relative_to(folder).as_posix()}`" for run in runs if not (run / "result.json").is_file()]
    return [f"Without a result: {', '.join(names)}.", ""] if names else []


def figures_of(group, setups, out):
    """Draws each figure once, of the setup of each task that has most of what it compares."""
    lines = []
    for name, figure in FIGURES.items():
        drawn = []
        for task in figure.tasks:
            there = [setup for setup in setups if setup.task == task and shows(name, setup)]
            if there:
                drawn.append(max(there, key=lambda s: sum(bool(s.seeds({"method": m})) for m in figure.methods)))
        files = draw(name, drawn, out / "figures" / f"{group}-{name}", whole=False) if drawn else []
        if files:
            svg, png, table = (file.relative_to(out).as_posix() for file in files)
            of = ", ".join(setup.name for setup in drawn)
            lines += [f"![{caption_of(name, drawn)}]({png})", "",
                      f"{titled(name)}: {of} ([vector]({svg}), [numbers]({table}))", ""]  # fmt: skip
    return lines


def section(setup):
    """The lines about a setup: its summary, what follows from it if it is of the paper's kind, and its scores by
    language."""
    summary = [[name.replace("  ", "&emsp;"), *cells] for name, *cells in summary_table(setup)]
    devices = "; ".join(sorted({run["device"] for run in setup.runs}))
    lines = [f"### {setup.name}", "", f"{described(setup)}, {scored_on(setup)}. Run on: {devices}.", ""]
    lines += [render(summary, markdown=True), ""]
    claims = [claim for table in TITLES for claim in claims_of(table, [setup], whole=False)]
    if claims:
        alone = len({run["seed"] for run in setup.runs}) == 1
        of_one = " (one seed: how sure they are leaves out the chance in training)" if alone else ""
        lines += [f"What the paper concludes (its section), and what these runs say of it{of_one}:", ""]
        lines += [*(f"- {claim}" for claim in claims), ""]
    lines += ["<details><summary>By language</summary>", ""]
    for measure in (None, "exact_match"):
        for view in views(setup, measure=measure):
            for title, rows in tables_of(view, by_language=True):
                lines += [f"{title}:", "", render(rows, markdown=True), ""]
    return [*lines, "</details>", ""]


def summary_table(setup):
    """run_table without languages, with what each method's runs took."""
    header, *rows = run_table(setup, languages=False, minus=True, more=gaps_besides(setup))
    for row in rows:
        settings = setup.rows.get(row[0])
        runs = [*setup.seeds(settings).values()] if settings else []
        in_P1 = spread([run["updates_in_first_phase"] for run in runs]).replace(".0", "")
        row += [f"{in_P1} ({part_in_P1(setup, settings)})" if runs else "",
                f"{statistics.fmean(run['seconds'] for run in runs) / 60:.0f}" if runs else ""]  # fmt: skip
    return [[*header, "in P1", "minutes"], *rows]


# --- the results in the README -------------------------------------------------------------------------------


def with_blocks(file, blocks):
    """The text of a file with each block between its marks. Raises InputError if a mark is not there."""
    text = read_text(file)
    for name, lines in blocks.items():
        first, last = f"<!-- {name}: written by make results -->", f"<!-- end of {name} -->"
        found = re.search(rf"^{first}\n(.*?)^{last}$", text, re.M | re.S)
        if not found:
            raise InputError(f"{file}: the lines {first!r} and {last!r} are not there, one after the other")
        text = text[: found.start(1)] + "\n".join(["", *lines, "", ""]) + text[found.end(1) :]
    return text


def demo(setups):
    """What `make demo` prints, of the first seed, and the same of all seeds in a few words."""
    setup = next((s for s in setups if s.task == "xnli" and s.of_the_demos_texts), None)
    if setup is None:
        raise InputError("there are no runs of make demo among these")
    first = min(run["seed"] for run in setup.runs)
    text = score_text(setups_of([run for run in setup.runs if run["seed"] == first])[0], ["test"], paper=False)
    said = [f"`{x}` mean {mean_of(setup, s, 'mean')}, gap {mean_of(setup, s, 'gap')}" for x, s in setup.rows.items()]
    seeds = len({run["seed"] for run in setup.runs})
    return ["```text", text, "```", "", *wrapped(f"Over {seeds} seeds: {'; '.join(said)};", *differences(setup))]


def promises(file):
    """What `make soak` tried, a row a promise, of the file that it wrote."""
    if not file.is_file():
        return ["Nothing was tried yet: `make soak`."]
    with as_written(file, "make soak"):
        found = json.loads(file.read_text(encoding="utf-8"))
        rows = [["promise", "tried", "held", "failed"]]
        rows += [[p["what"], *(f"{p[name]:,}" for name in rows[0][1:])] for p in found["promises"]]
        about = f"{found['machine']['cores']} CPU cores, {found['seconds'] / 60:.0f} minutes, seed {found['seed']}"
        unfinished = "" if found["complete"] else " It was stopped before its end."
    return [render(rows, markdown=True), "", *wrapped(f"`make soak`: {about}.{unfinished}")]


def mean_of(setup, settings, quantity):
    return spread([*setup.values(settings, quantity).values()])


def wrapped(*sentences):
    return textwrap.wrap(" ".join(sentences), 120, break_on_hyphens=False)
