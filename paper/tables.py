"""Tables of finished runs: one of any setup, those of the paper, and what the paper concludes from them.

    print(render(run_table(setup)))                     # methods as rows, languages as columns
    print(render(paper_table("table6", setups)))        # the paper's rows and columns, with ours
    print(*claims_of("table6", setups), sep="\n")

A table is rows of Cells, each a quantity of the runs of a setup with certain settings. Below a row may stand its
difference from df, with a 95 % interval, and the paper's numbers: these only beside runs that are of their kind
(Setup.comparable).
"""

import statistics
import textwrap
from dataclasses import replace
from typing import NamedTuple

from data import InputError
from eval import summary
from paper.arguments import TARGETS
from paper.finished import read_log, splits_of
from paper.results import (
    EQUAL_GAP,
    LAST_GAP,
    PAPER,
    TASK_NAMES,
    VARIED,
    described,
    difference,
    interval,
    label_of,
    read_runs,
    scores_of,
    setups_of,
)

NOTHING = "-"

# --- from cells to lines -------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """What stands in one place of a table: a quantity of the runs of a setup (None for no runs) with these settings,
    and the paper's number as text, where it may stand beside them."""

    setup: object
    settings: dict
    quantity: str
    printed: str = NOTHING


def row_lines(lead, cells, seeds=4, minus=False):
    """The lines of a row: `lead`, a list of texts, its label first, and its cells; below, if there is anything to be
    said, the difference from df and the paper's numbers. seeds: another number of them is shown in the cell."""
    lines = [[*lead, *(text_of(cell, seeds) for cell in cells)]]
    below = {"  minus df": [minus_df(cell) for cell in cells if minus], "  paper": [cell.printed for cell in cells]}
    for name, texts in below.items():
        if any(text != NOTHING for text in texts):
            lines.append([name, *[""] * (len(lead) - 1), *texts])
    return lines


def text_of(cell, seeds):
    """ "75.6±0.1 (3)": mean, standard deviation over seeds (of the sample), and their number if it is another."""
    values = [*cell.setup.values(cell.settings, cell.quantity).values()] if cell.setup else []
    return spread(values) + (f" ({len(values)})" if len(values) not in (0, seeds) else "")


def spread(values):
    """Mean±standard deviation, one decimal; one seed has no deviation."""
    if not values:
        return NOTHING
    deviation = f"±{statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{deviation}"


def minus_df(cell):
    df = df_of(cell.settings)
    if not cell.setup or label_of(cell.settings) == label_of(df):
        return NOTHING
    return interval(difference(cell.setup, cell.settings, df, cell.quantity))


def df_of(settings):
    """The settings of the df runs that those with these settings are compared with."""
    return {"method": "df", "shots": settings.get("shots", 0)}


def render(rows, markdown=False):
    """Rows of texts as lines: columns aligned, for a terminal, or a Markdown table."""
    least = 2 if markdown else 0  # of a column, for the "-:" below its header
    widths = [max(least, *(len(row[i]) for row in rows)) for i in range(len(rows[0]))]
    align = [[row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))] for row in rows]
    if not markdown:
        return "\n".join(["  ".join(row).rstrip() for row in align])
    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in [align[0], rule, *align[1:]])


def transposed(rows):
    return [list(column) for column in zip(*rows)]


# --- the table of a setup ------------------------------------------------------------------------------------

TOTALS = {"mean": "mean", "source": "source", "non_source": "others", "gap": "gap"}  # and what stands over them


def views(setup, splits=None, measure=None):
    """The setup on each of these splits (default: all that its runs have, the test sets first), by a measure: with
    those of its runs that have such scores, if any."""
    names = splits or sorted({x for run in setup.runs for x in splits_of(run)}, key=lambda x: (x != "test", x))
    for split in names:
        runs = [run for run in setup.runs if scores_of(run, split, measure)]
        if runs:
            own = runs[0][split].get("measure", "accuracy")
            yield replace(setup, runs=runs, split=split, measure=None if measure == own else measure)


def title_of(setup):
    name = {"test": "test sets", "dev": "dev sets"}.get(setup.split, setup.split)
    measure = setup.measure or setup.runs[0][setup.split].get("measure", "accuracy")
    return f"{name}, {measure} in %, mean±standard deviation over seeds"


def tables_of(setup, by_language=False, paper=True):
    """Yields (title, rows) of the table of a setup's scores; of pairs of languages, of one table a method."""
    if has_pairs(setup):
        for label, settings in setup.rows.items():
            yield f"{label}: {title_of(setup)}", pair_table(setup, settings)
    else:
        rows = run_table(setup, paper=paper, more=[name for name in gaps_besides(setup) if name == LAST_GAP])
        yield f"{title_of(setup)}; gap = source-others", transposed(rows) if by_language else rows


def gaps_besides(setup):
    """The gaps to show besides that of the scores, which moves more with the choice of the model than with most
    methods: the last one too, if an earlier model was chosen, and at an equal source score. By the task's own measure,
    which the log is of."""
    if setup.measure:
        return ()
    return (EQUAL_GAP,) if setup.chose_the_last else (LAST_GAP, EQUAL_GAP)


def has_pairs(setup):
    return any("-" in language for language in setup.languages)


def run_table(setup, languages=True, minus=False, paper=True, more=()):
    """The rows of a table, the first the header: a row a method, languages, their summary and `more` quantities as
    columns."""
    names = {x: x for x in setup.languages if languages} | TOTALS | {quantity: quantity for quantity in more}
    rows = [["method", "seeds", *names.values()]]
    for label, settings in setup.rows.items():
        printed = numbers_of_paper(setup.task, label) if paper and setup.comparable else {}
        cells = [Cell(setup, settings, quantity, printed.get(quantity, NOTHING)) for quantity in names]
        seeds = len(setup.seeds(settings))
        rows += row_lines([label, str(seeds)], cells, seeds, minus)
    return rows


def pair_table(setup, settings):
    """Contexts as rows, questions as columns: MLQA's generalised setting, whose scores are of pairs."""
    names = sorted({language.split("-")[0] for language in setup.languages})
    rows, seeds = [["context \\ question", *names]], len(setup.seeds(settings))
    for context in names:
        rows += row_lines([context], [Cell(setup, settings, f"{context}-{question}") for question in names], seeds)
    return rows


def differences(setup):
    """Lines: what each method has more than df, in the mean and in the gap, with 95 % intervals; and in the
    gaps_besides()."""
    lines = []
    for label, settings in setup.rows.items():
        said = {
            quantity: minus_df(Cell(setup, settings, quantity)) for quantity in ("mean", "gap", *gaps_besides(setup))
        }
        if said["mean"] != NOTHING:
            n = len(setup.seeds(settings).keys() & setup.seeds(df_of(settings)).keys())
            over = f"{n} seeds" if n > 1 else "the examples of one seed"
            said = ", ".join(f"{quantity} {text}" for quantity, text in said.items() if text != NOTHING)
            lines.append(f"{label} minus df: {said} (95 %, over {over})")
    return lines


def curve_table(setup):
    """The rows of a table of the curves that runs logged: by update the loss (mean since the line before), the phase
    and the gap (English minus the mean of the others, on the fixed part of the dev sets) of each run."""
    header, columns = ["update"], []
    for label, settings in setup.rows.items():
        for seed, run in sorted(setup.seeds(settings).items()):
            columns.append({line["update"]: line for line in read_log(run)})
            header += [f"{label} seed {seed}: loss", "phase", "gap"]
    rows, forms = [header], {"loss": "{:.3f}", "phase": "P{}", "gap": "{:.1f}"}
    for update in sorted(set().union(*columns)):
        lines = [column.get(update, {}) for column in columns]
        numbers = [(form, line.get(key)) for line in lines for key, form in forms.items()]
        rows.append([str(update), *("" if number is None else form.format(number) for form, number in numbers)])
    return rows


# --- the paper's tables --------------------------------------------------------------------------------------
#
# PAPER has their rows and columns; here is what these mean and what the paper concludes from them. A row is a method
# or one constant of slowfast's, a column a task with a number of shots or a part of the languages.

TITLES = {name: title for name, (title, _) in TARGETS.items() if name in PAPER}


def settings_of_row(row):
    """ "fs" -> {"method": "fs"}; "c1=0.5" -> {"c1": 0.5}, of slowfast."""
    name, is_constant, value = row.partition("=")
    return {name: float(value)} if is_constant else {"method": row}


def column(table, name):
    """(task, settings, quantity) of a column: "ner", "xnli M=5", "mlqa source"; of Tables 3 and 7 a language."""
    task, _, rest = name.partition(" ")
    if task not in TASK_NAMES:
        return {"table3": "qam", "table7": "xnli"}[table], {}, name
    if rest.startswith("M="):
        return task, {"shots": int(rest[2:])}, "mean"
    return task, {}, rest or "mean"


def columns_of(table):
    """The names of a table's columns, in the paper's order."""
    return list(dict.fromkeys(name for row in PAPER[table].values() for name in row))


def settings_of_table(table):
    """[(task, VARIED settings)] of the runs that a table shows, and of df, which it compares with."""
    rows = {"df": dict.fromkeys(columns_of(table)), **PAPER[table]}
    cells = [(row, *column(table, name)[:2]) for row, cells in rows.items() for name in cells]
    return [(task, VARIED | settings_of_row(row) | settings) for row, task, settings in cells]


def numbers_of_paper(task, label):
    """{quantity: text} of all that the paper prints of the runs of a task with this label, Table 2 before others; the
    rest of the summary follows from its numbers by language, or from those of Table 4."""
    found = {}
    for table in ("table2", *(t for t in PAPER if t != "table2")):
        for row, cells in PAPER[table].items():
            for name, printed in cells.items():
                of_task, settings, quantity = column(table, name)
                if (of_task, label_of(settings_of_row(row) | settings)) == (task, label):
                    found.setdefault(quantity, printed)
    texts = {quantity: "{}±{}".format(*printed) for quantity, printed in found.items()}
    means = {quantity: mean for quantity, (mean, _) in found.items()}
    by_language = {quantity: mean for quantity, mean in means.items() if quantity not in TOTALS}
    if by_language:
        means = summary(by_language)
    elif "source" in means:
        means["gap"] = means["source"] - means["non_source"]
    return {quantity: f"{mean:.1f}" for quantity, mean in means.items()} | texts


def paper_table(table, setups):
    """One of the paper's tables with these runs: rows of texts, the first the header. A column is a setup's, and "(n)"
    the number of seeds where it is not 4."""
    columns = []  # (what stands over it, the paper's name, setup or None)
    for name in columns_of(table):
        task = column(table, name)[0]
        there = [setup for setup in setups if setup.task == task] or [None]
        for setup in there:
            ours = setup.name if setup else TASK_NAMES[task]
            over = name.replace(task, ours, 1) if name.startswith(task) else name + f" {ours}" * (len(there) > 1)
            columns.append((over.replace("non_source", "others"), name, setup))
    rows = [["", *(over for over, _, _ in columns)]]
    for row in PAPER[table]:
        rows += row_lines([row], [cell_of(table, row, name, setup) for _, name, setup in columns], minus=True)
    return rows


def cell_of(table, row, name, setup):
    """The Cell in a row and a column of one of the paper's tables. What the paper leaves out is not run; its number
    stands there too while there are no runs of ours."""
    _, settings, quantity = column(table, name)
    if name not in PAPER[table][row]:
        return Cell(None, {}, quantity)
    beside = setup is None or setup.comparable
    printed = "{}±{}".format(*PAPER[table][row][name]) if beside else NOTHING
    return Cell(setup, settings_of_row(row) | settings, quantity, printed)


# --- what the paper concludes --------------------------------------------------------------------------------


def better(a, *others, by="mean", **settings):
    """The comparisons of a claim that row `a` is better than each of the others: [(a, b, by)], a and b settings."""
    return [(settings_of_row(a) | settings, settings_of_row(b) | settings, by) for b in others]


def more_shots(row):
    m = (0, 5, 10, 20)
    return [({"method": row, "shots": more}, {"method": row, "shots": few}, "mean") for few, more in zip(m, m[1:])]


XNLI_LANGUAGES = list(PAPER["table7"]["df"])
OTHER_C1, OTHER_C2, OTHER_R = ([row for row in PAPER["table5"] if row.startswith(name) and row not in (
    "c1=0.01", "c2=10", "r=3")] for name in ("c1=", "c2=", "r="))  # fmt: skip

# {table: [(what the paper says, the comparisons that it follows from)]}
CLAIMS = {
    "table1": [
        ("The fewer of the last layers are trained, the worse (2.4)",
         better("df", "last-3") + better("last-3", "last-2") + better("last-2", "last-1")),
        ("Freezing the feed-forward of the first four layers is better than freezing their attention, or all (3.1)",
         better("freeze-4-ffn", "freeze-4-attention", "freeze-4")),
        ("Freezing that feed-forward beats DF (2.3, 3.1)", better("freeze-4-ffn", "df")),
        ("Enlarging the rate of the last two layers' attention is better than of their feed-forward, or all (3.2)",
         better("enlarge-2-attention", "enlarge-2-ffn", "enlarge-2")),
    ],
    "table2": [
        ("Our method beats DF, NoisyTune, FS and FF, zero-shot (4.2)",
         better("slowfast", "df", "noisytune", "fs", "ff")),
        ("... and few-shot (4.3)",
         [pair for m in (5, 10, 20) for pair in better("slowfast", "df", "noisytune", "fs", "ff", shots=m)]),
        ("The more shots the better (4.3)", more_shots("df") + more_shots("slowfast")),
    ],
    "table3": [("Our method beats DF with a large training corpus (4.4)", better("slowfast", "df"))],
    "table4": [
        ("Our method improves the source (4.5)", better("slowfast", "df", by="source")),
        ("... and the other languages (4.5)", better("slowfast", "df", by="non_source")),
        ("... and these more: the gap is smaller (4.5)", better("slowfast", "df", by="gap")),
    ],
    "table5": [
        ("c1 = 0.01 is the best (4.6)", better("c1=0.01", *OTHER_C1)),
        ("c2 = 10 is the best (4.6)", better("c2=10", *OTHER_C2)),
        ("r = 3 is the best (4.6)", better("r=3", *OTHER_R)),
    ],
    "table6": [
        ("Starting weights of the first four layers anew is worse than DF (App. C)",
         better("df", "reinit-4", "reinit-4-attention", "reinit-4-ffn")),
        ("Starting their feed-forward anew is worse than their attention (App. C)",
         better("reinit-4-attention", "reinit-4-ffn")),
    ],
    "table7": [
        ("Fine-tuning slow improves almost all languages (App. F)",
         [pair for x in XNLI_LANGUAGES for pair in better("fs", "df", by=x)]),
        ("Fine-tuning fast improves the source (App. F)", better("ff", "df", by="source")),
        ("Our method beats DF on every language (App. F)",
         [pair for x in XNLI_LANGUAGES for pair in better("slowfast", "df", by=x)]),
        ("... low-resource ones above all: Swahili and Urdu (App. F)",
         better("slowfast", "df", by="sw") + better("slowfast", "df", by="ur")),
    ],
    "table8": [
        ("The method as it is beats each other use of the sets (4.7)",
         better("slowfast", "only-S_I", "only-S_II", "swap-S", "only-V_I", "only-V_II", "swap-V")),
        ("S_II to S_I is the worst (App. G)",
         [(b, a, by) for a, b, by in better("swap-S", "only-S_I", "only-S_II", "only-V_I", "only-V_II", "swap-V")]),
    ],
}  # fmt: skip


def claims_of(table, setups, whole=True):
    """A line for each thing that the paper concludes from a table: what the runs of each setup say of it."""
    claims, tasks = [], {column(table, name)[0] for name in columns_of(table)}
    for text, comparisons in CLAIMS[table]:
        said = [(setup.name, verdict(setup, table, comparisons)) for setup in setups if setup.task in tasks]
        said = [f"{name} {v}" for name, v in said if v and (whole or v != "not run")]
        if said or whole:
            claims.append(f"{text}: {'; '.join(said) or 'not run'}")
    return claims


def verdict(setup, table, comparisons):
    """What a setup's runs say of a claim: yes if all its comparisons are above 0 with their whole intervals, no if one
    is below, else not distinguishable. Of the gap less is better. Comparisons that the paper's table lacks for this
    task do not count; None if these are all."""
    rows = [settings_of_row(row) for row, cells in PAPER[table].items()
            if any(column(table, name)[0] == setup.task for name in cells)]  # fmt: skip
    known = [pair for pair in comparisons if all(any(r.items() <= side.items() for r in rows) for side in pair[:2])]
    if not known:
        return None
    pairs = [(b, a, by) if by == "gap" else (a, b, by) for a, b, by in known]
    found = [pair for pair in (difference(setup, *pair) for pair in pairs) if pair]
    if not found:
        return "not run"
    above = sum(low is not None and low > 0 for _, low, _ in found)
    below = sum(high is not None and high < 0 for _, _, high in found)
    said = "no" if below else "yes" if above == len(found) else "not distinguishable"
    lacking = f"; {len(known) - len(found)} of {len(known)} comparisons not run" if len(found) < len(known) else ""
    if len(found) == 1:
        return f"{said}, {interval(found[0])}{lacking}"
    return f"{said} ({above} of {len(found)} comparisons for it, {below} against{lacking})"


# --- the command line ----------------------------------------------------------------------------------------


def print_tables(args):
    """`table`: the scores of finished runs, a setup at a time. Raises InputError if there are none such."""
    runs = read_runs(args.runs)
    options = ([args.split] if args.split else None, args.measure, args.by_language, not args.no_paper, args.markdown)
    texts = [text for text in (score_text(setup, *options) for setup in setups_of(runs)) if text]
    if not texts:
        raise InputError(nothing_of(runs, args.split, args.measure))
    print(*texts, sep="\n\n")


def nothing_of(runs, split, measure):
    """Why there are no scores of a split by a measure: which there are."""
    splits = {name for run in runs for name in splits_of(run)}
    if split and split not in splits:
        return f"--split {split}: these runs have no such sets; they have {', '.join(sorted(splits))}"
    of = [run[name] for run in runs for name in splits_of(run) if split in (None, name)]
    measures = {x for part in of for x in (part.get("measure", "accuracy"), *part)
                if x != "scores" and isinstance(part.get(x, {}), dict)}  # fmt: skip
    return f"--measure {measure}: these runs have no such measure; they have {', '.join(sorted(measures))}"


def score_text(setup, splits=None, measure=None, by_language=False, paper=True, markdown=False):
    """What `table` prints of a setup: what it is, then each split's table and differences; "" without such scores."""
    blocks = []
    for view in views(setup, splits, measure):
        for title, rows in tables_of(view, by_language, paper):
            blocks += [title, render(rows, markdown)]
        if not has_pairs(view):
            blocks.append("\n".join(textwrap.fill(line, 120, subsequent_indent="  ") for line in differences(view)))
    return "\n\n".join([about(setup), *filter(None, blocks)]) if blocks else ""


def print_curves(args):
    """`curves`: loss, phase and gap by update, a setup at a time."""
    blocks = [
        text for s in setups_of(read_runs(args.runs)) for text in (about(s), render(curve_table(s), args.markdown))
    ]
    print(*blocks, sep="\n\n")


def about(setup):
    return textwrap.fill(f"{setup.name}: {described(setup)}", 120)
