"""Finished runs: which of them are of one kind, their scores, and how sure a difference between two methods is.

    setups = setups_of(read_runs(["results"]))
    difference(setups[0], {"method": "slowfast"}, {"method": "df"}, "gap")      # (-0.3, -2.4, 1.7)

A Setup is the runs that may stand in one table: they differ in the seed and in what tables vary, and in nothing else.
"""

import functools
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import MLQA_LANGUAGES, NER_LANGUAGES, SOURCE, InputError
from eval import MEASURES, summary
from paper.arguments import TASK_NAMES, VARIED
from paper.finished import read_counts, read_log, read_result, source_of, splits_of
from paper.methods import METHODS
from paper.options import FIELDS, POLICIES, RESULT, SEED, decides

# {table: {row: {column: [mean, standard deviation over 4 seeds]}}}: Tables 1 to 8 of the paper, as printed
PAPER = json.loads(Path(__file__).with_name("numbers.json").read_text(encoding="utf-8"))
PAPER.pop("about")
POLICY_SETTINGS = {name for name, f in FIELDS.items() if f.metadata.get("group") == POLICIES}
# The languages that the paper's averages are over.
PAPER_LANGUAGES = {
    "xnli": list(PAPER["table7"]["df"]), "ner": NER_LANGUAGES, "mlqa": list(MLQA_LANGUAGES), "qam": ["de", "en", "fr"],
}  # fmt: skip

# --- runs ----------------------------------------------------------------------------------------------------


def read_runs(folders):
    """The finished runs under `folders`: a list of what their result.json holds, and their "folder". Raises InputError
    if one is broken or there is none."""
    files = sorted({file for folder in folders for file in Path(folder).rglob("result.json")})
    if not files:
        raise InputError(f"no result.json under {', '.join(map(str, folders))}: no run has finished there")
    runs, damaged = [], []
    for file in files:
        try:
            runs.append(read_result(file) | {"folder": file.parent})
        except InputError as e:
            damaged.append(str(e))
    if damaged:
        more = f"; {len(damaged) - 1} more of these {len(files)} runs are damaged" if damaged[1:] else ""
        raise InputError(damaged[0] + more)
    say_what_is_twice(runs)
    return runs


def say_what_is_twice(runs):
    """Warns of two runs that settings and seed call one, and whose scores are not the same (of another device)."""
    first = {}
    for run in runs:
        kept = {k: v for k, v in run["settings"].items() if decides(k) in (RESULT, SEED)}
        other = first.setdefault(json.dumps(kept, sort_keys=True), run)
        if any(scores_of(run, split) != scores_of(other, split) for split in {*splits_of(run)} & {*splits_of(other)}):
            what = f"{other['folder']} and {run['folder']} have the same settings and seed, and other scores"
            print(f"paper: {what}: the last is shown; give one of them", file=sys.stderr)


def scores_of(run, split, measure=None):
    """{language: percent} of a run on a split by a measure, by default the task's own; None if it has none."""
    entry = run[split] if split in splits_of(run) else {}
    scores = entry.get("scores" if measure in (None, entry.get("measure", "accuracy")) else measure)
    return scores if isinstance(scores, dict) else None


# --- setups --------------------------------------------------------------------------------------------------


@dataclass
class Setup:
    """Runs of one task that differ in seed and VARIED settings alone."""

    task: str
    name: str  # "NER", or "NER (b)" where there are several
    runs: list
    split: str  # the sets that its scores are of
    measure: str = None  # of its scores; None for the task's own

    @property
    def settings(self):
        """Those of its first run: what is not VARIED they share."""
        return self.runs[0]["settings"]

    @property
    def languages(self):
        """What its scores are of, sorted; pairs "en-de" of the question answering of contexts and questions."""
        return sorted({x for run in self.runs for x in scores_of(run, self.split, self.measure) or ()})

    @property
    def rows(self):
        """{label: the VARIED settings} of its runs, in the order of METHODS."""
        there = [{k: run["settings"].get(k, v) for k, v in VARIED.items()} for run in self.runs]
        place = {method: n for n, method in enumerate(METHODS)}
        there.sort(
            key=lambda s: (place.get(s["method"], len(place)), *((s[k] != VARIED[k], s[k]) for k in list(s)[1:]))
        )
        return {label_of(settings): settings for settings in there}

    @property
    def comparable(self):
        """Whether its scores may stand beside the paper's: of the test sets in the paper's languages, after whole
        epochs on the official files in English. Whatever is short or of the demo's texts is of another kind."""
        s, languages = self.settings, PAPER_LANGUAGES.get(self.task, [])
        return (
            s.get("max_updates") is None and not self.of_the_demos_texts and source_of(self.runs[0]) == SOURCE
            and self.split == "test" and self.measure is None and self.languages == sorted(languages)
        )  # fmt: skip

    @property
    def chose_the_last(self):
        """Whether the chosen model of each run is its last: then the gap at the end is that of the scores."""
        return all(run.get("best_update", run["updates"]) == run["updates"] for run in self.runs)

    @property
    def of_the_demos_texts(self):
        return Path(self.settings["data"]).parts[-2:] in (("demo", "texts"), ("sample",))  # the name that they had

    def seeds(self, settings):
        """{seed: run} of the runs with these settings; what they do not name is the paper's."""
        wanted = VARIED | settings
        return {r["seed"]: r for r in self.runs if all(r["settings"].get(k, VARIED[k]) == v for k, v in wanted.items())}

    def values(self, settings, quantity):
        """{seed: a quantity of the run's scores, or its LAST_GAP}; runs that lack it are left out."""
        found = {}
        for seed, run in self.seeds(settings).items():
            scores = scores_of(run, self.split, self.measure)
            if quantity == LAST_GAP:
                value = next((line["gap"] for line in reversed(gaps_logged(run))), None)
            else:
                value = quantity_of(scores, quantity, source_of(run)) if scores else None
            if value is not None:
                found[seed] = value
        return found


def setups_of(runs):
    """The Setups of a list of runs, in the paper's order of tasks, the longest runs of each first. Scores are of the
    test sets, if all runs of a setup were measured on them, or of XQuAD, or of the dev sets."""
    groups = {}
    for run in map(without_idle_constants, runs):
        groups.setdefault(run["settings"]["task"], {}).setdefault(kind_of(run["settings"]), []).append(run)
    setups = []
    for task in sorted(groups, key=lambda task: [*TASK_NAMES, task].index(task)):
        kinds = sorted(lent(groups[task]), key=lambda members: -max(run["updates"] for run in members))
        for n, members in enumerate(kinds):
            split = next(x for x in ("test", "xquad", "dev") if all(x in splits_of(run) for run in members))
            name = TASK_NAMES.get(task, task) + (f" ({chr(ord('a') + n)})" if len(kinds) > 1 else "")
            setups.append(Setup(task, name, members, split))
    return setups


def kind_of(settings):
    """What makes a setup, as two texts: the settings of the policies, and the others. A setting that the run was older
    than had the value that is now its default."""
    settings = {name: f.default for name, f in FIELDS.items() if name != "task"} | settings
    settings = {k: v for k, v in settings.items() if decides(k) == RESULT and k not in VARIED}
    parts = ({k: v for k, v in settings.items() if (k in POLICY_SETTINGS) == of_policies} for of_policies in (1, 0))
    return tuple(json.dumps(part, sort_keys=True) for part in parts)


def lent(kinds):
    """The runs of each kind, those that it is lent last. A run that no phase matters to, of df above all, knows no
    window and no phase: it stands in each kind that differs from its own in such settings alone and lacks it."""

    def name(run):
        return label_of(run["settings"]), run["seed"]

    plain, more = {}, {}
    for (_, others), runs in kinds.items():
        for run in filter(without_phases, runs):
            plain.setdefault(others, {}).setdefault(name(run), run)
    for kind, runs in kinds.items():
        there = {name(run) for run in runs}
        borrows = not all(map(without_phases, runs))
        more[kind] = [run for what, run in plain.get(kind[1], {}).items() if borrows and what not in there]
    given = {id(run) for runs in more.values() for run in runs}
    return [runs + more[kind] for kind, runs in kinds.items() if not all(id(run) in given for run in runs)]


def without_phases(run):
    """Whether no update of a run depends on its phase: of a method without policies, or with numbers that are the same
    in both."""
    row = METHODS.get(run["settings"]["method"])
    if row is None or isinstance(row.policies, str):
        return row is not None and row.policies == "df"
    P1, P2 = row.policies
    return P1 == P2 and not any(isinstance(k, str) for k in P1.values())


def without_idle_constants(run):
    """The run; of one that no policy changes, such as df's, with the paper's c1, c2 and r, which it has not used: with
    any others it stands beside the runs that have."""
    settings, idle = run["settings"], {k: VARIED[k] for k in ("c1", "c2", "r")}
    idles = without_phases(run) and any(settings.get(k, value) != value for k, value in idle.items())
    return run | {"settings": settings | idle} if idles else run


def label_of(settings):
    """ "slowfast", "df shots=5", "slowfast c1=0.5": what is not the paper's is named."""
    s = VARIED | settings
    return " ".join([s["method"], *(f"{k}={s[k]:g}" for k in list(VARIED)[1:] if s[k] != VARIED[k])])


def described(setup):
    """One line that says what the runs of a setup are, and how their policies are set."""
    s = setup.settings
    updates = " or ".join(f"{u:,}" for u in sorted({r["updates"] for r in setup.runs}))
    epochs = "" if s.get("max_updates") else f" ({in_epochs(s.get('epochs'))})"
    if s.get("phase") == "fraction":
        phase = f"the first {100 * s['fraction']:g} %"
    else:
        phase = f"by loss, window {s.get('window', FIELDS['window'].default)}"
    said = [
        Path(s["model"]).name, f"trained on {source_of(setup.runs[0])} of the folder {Path(s['data']).name!r}",
        f"{updates} updates{epochs} of {s['batch_size']}", f"lr {s['lr']:g}", str(s.get("precision")),
        f"P1 {phase}", f"policy IV {s.get('policy4')}", f"best model by {s.get('select')}",
    ]  # fmt: skip
    return ", ".join(said)


def in_epochs(n):
    return f"{n} epoch{'s' * (n != 1)}"


def scored_on(setup):
    """ "scores of dev, up to 1,000 examples a language, 39 languages" """
    some = setup.settings.get("dev_examples") if setup.split == "dev" else None
    up_to = f", up to {some:,} examples a language" if some else ""
    return f"scores of {setup.split}{up_to}, {len(setup.languages)} languages"


def quantity_of(scores, quantity, source=SOURCE):
    """ "mean", "source", "non_source" or "gap" of {language: score}, or a language's score; None if there is none."""
    return scores.get(quantity) if quantity in scores else summary(scores, source).get(quantity)


# --- the gap along a run -------------------------------------------------------------------------------------
#
# A model that is chosen early has a smaller gap, whatever the method. So there are two comparisons that the choice does
# not move: at the last update, and where both runs have the same score in the source (Section 1's question).

LAST_GAP = "gap at the end"  # the last that the log has, of a fixed part of the dev sets
EQUAL_GAP = "gap at equal source"


def gaps_logged(run):
    """The lines of a run's log that have a gap; none if the log was not kept."""
    kept = (run["folder"] / "log.jsonl").is_file()
    return [line for line in read_log(run) if line.get("gap") is not None] if kept else []


def gap_at_equal_source(run, other):
    """How much larger the gap of a run is than another's when their scores in the source are equal, in points: at the
    lower of the scores that the two end with. Both are interpolated along the run, where it first has that score. None
    if the log of one has no line of scores, or begins above it."""
    curves = along(run), along(other)
    if not all(len(source) for source, _ in curves):
        return None
    level = min(source[-1] for source, _ in curves)
    gaps = [gap_at(level, *curve) for curve in curves]
    return None if None in gaps else gaps[0] - gaps[1]


def along(run):
    """(scores in the source, gaps) by update, arrays; of a line of more than 9 points the means over each fifth of
    it, since each is of few examples and the highest of many such would be luck. Fewer than 3 points are no line."""
    lines = [line for line in gaps_logged(run) if "source" in line]
    n = max(len(lines) // 5, 1)
    return [np.convolve([line[key] for line in lines], np.ones(n) / n, "valid") if len(lines) > 2 else np.array([])
            for key in ("source", "gap")]  # fmt: skip


def gap_at(level, source, gap):
    """The gap where the score in the source first reaches a level that it ends at or above; None if it begins above."""
    i = int(np.argmax(source >= level))
    if i == 0:
        return float(gap[0]) if source[0] == level else None
    return float(np.interp(level, source[i - 1 : i + 1], gap[i - 1 : i + 1]))


# --- differences, and how sure they are ----------------------------------------------------------------------

DRAWS = 1000


def difference(setup, a, b, quantity):
    """(mean of a - b, low, high), or None without a common seed: the difference of a quantity between the runs of two
    settings with its 95 % interval, paired.

    Over the seeds that both have (Student's t) or, with one, by a bootstrap of the examples (Efron and Tibshirani 1993,
    percentiles), which knows nothing of the chance in training. Without what each example counted there is no interval:
    low and high are None."""
    found = paired(setup, a, b, quantity)
    if not found:
        return None
    mean = statistics.fmean(found.values())
    if len(found) > 1:
        margin = students_t(len(found) - 1) * statistics.stdev(found.values()) / len(found) ** 0.5
        return mean, mean - margin, mean + margin
    if quantity in (LAST_GAP, EQUAL_GAP):  # of which no examples were kept
        return mean, None, None
    (seed,) = found
    drawn = [resampled(*examples_of(setup.seeds(s)[seed], setup.split), setup.task, setup.measure) for s in (a, b)]
    if None in drawn:
        return mean, None, None
    one, other = (quantity_of(scores, quantity, source_of(setup.runs[0])) for scores in drawn)
    low, high = np.percentile(one - other, [2.5, 97.5])
    return mean, float(low), float(high)


def paired(setup, a, b, quantity):
    """{seed: how much more the runs of one setting have of a quantity than those of another}, the seeds that both
    have."""
    if quantity == EQUAL_GAP:
        one, other = setup.seeds(a), setup.seeds(b)
        found = {seed: gap_at_equal_source(one[seed], other[seed]) for seed in sorted(one.keys() & other.keys())}
        return {seed: value for seed, value in found.items() if value is not None}
    one, other = setup.values(a, quantity), setup.values(b, quantity)
    # (what is a rounding error is none)
    return {seed: round(one[seed] - other[seed], 9) for seed in sorted(one.keys() & other.keys())}


def students_t(freedom):
    """Student's t at 97.5 %."""
    import scipy.stats  # not at the top: tables and figures need it, and what trains does not

    return float(scipy.stats.t.ppf(0.975, freedom))


def examples_of(run, split):
    """(the file with what each example of a split counts, the scores that these come to, pairs)"""
    return run["folder"] / "examples" / f"{split}.npz", tuple(run[split]["scores"].items())


@functools.lru_cache(maxsize=200)
def resampled(file, scores, task, measure=None):
    """{language: (DRAWS,) scores} of a run's predictions, on as many sets of examples drawn with replacement; None if
    the run did not keep what each example counts, or by this measure nothing."""
    if not file.exists():
        return None
    found = {}
    for language, of_examples in read_counts(file, task, dict(scores)).items():
        n = len(of_examples)
        drawn = MEASURES[task].scores(draws(n) @ of_examples, n)
        if measure and measure not in drawn:
            return None
        found[language] = drawn[measure or next(iter(drawn))]
    return found


@functools.lru_cache(maxsize=4)
def draws(n):
    """(DRAWS, n): how often each of n examples is drawn. The same for each language with n examples, because XNLI and
    XQuAD are parallel: their languages share what is hard about an example."""
    random = np.random.default_rng(n)
    drawn = (np.bincount(random.integers(0, n, n), minlength=n) for _ in range(DRAWS))
    return np.array([*drawn], np.float32)


def interval(found):
    """ "+0.5 [0.1, 0.9]" of what `difference` found."""
    if found is None:
        return "-"
    mean, low, high = found
    return f"{mean:+.1f}" + (" (no interval)" if low is None else f" [{low:.1f}, {high:.1f}]")
