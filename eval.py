"""Measuring: predictions, the score of each task by its own rules, the performance gap, linear CKA, and tables of runs.

    measured = evaluate(model, task.dev, MEASURES["mlqa"], device="cuda")   # {"f1": {language: percent}, ...}
    report(measured)                                        # scores, mean, source, non-source, gap

    python eval.py table runs/paper/xnli                    # methods as rows, languages as columns
    python eval.py curves runs/paper/xnli                   # loss, phase and gap against updates
    python eval.py make table6 figure3 --model models/xlm-roberta-base      # runs what they lack, then shows them
    python eval.py report runs --out report                 # one page with all that was run

From top to bottom: predictions, scores, linear CKA, tables of any runs, the paper's tables with what it concludes from
them, its figures, and the runs that these need.
"""

import collections
import csv
import functools
import json
import os
import re
import shlex
import statistics
import string
import sys
import textwrap
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data import (
    IGNORED, MLQA_LANGUAGES, NER_LABELS, NER_LANGUAGES, PAD, SOURCE, InputError, collate, length_sorted_batches,
)  # fmt: skip

# --- predictions ---------------------------------------------------------------------------------------------


def autocast(device, precision):
    """The context in which the model computes: "bf16" runs matrix products in bfloat16, "fp32" everything in float32.
    The weights, Adam's moments and the losses are float32 either way."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")


@torch.no_grad()
def predict(model, examples, device="cpu", precision="fp32", tokens=4096):
    """The model's logits for `examples`, float32: (windows, labels), or (ids, labels) of a model that has some for each
    id, in the order of `examples.ids`.

    Streams batches of at most `tokens` tokens, sorted by length so that next to no padding is computed.
    Raises FloatingPointError for logits that are not finite.
    """
    model.eval()
    result = None
    with autocast(device, precision):
        for windows in length_sorted_batches(examples.lengths, tokens):
            input_ids, _ = collate(examples, windows)
            logits = model(input_ids.to(device)).float().cpu()
            rows, size = torch.from_numpy(windows), len(examples.lengths)
            if logits.dim() == 3:  # of each id; not of padding
                real, place = input_ids != PAD, torch.arange(input_ids.shape[1])
                rows, size = (torch.from_numpy(examples.offsets[windows])[:, None] + place)[real], len(examples.ids)
                logits = logits[real]
            if not logits.isfinite().all():
                raise FloatingPointError("the model's outputs are not finite")
            if result is None:
                result = np.empty((size, logits.shape[1]), np.float32)
            result[rows] = logits
    return result


# --- scores: each task's measures of logits, in percent, the task's own first --------------------------------


@dataclass(frozen=True)
class Measure:
    """What a task is measured by. `counts(logits, examples, language)` is what each example counts, (examples, k), and
    `scores(sums, n)` what the sums (..., k) over n examples say: {name: percent (...)}. The two are apart because a
    bootstrap draws examples and not scores. Called like `counts` it gives the scores."""

    counts: Callable
    scores: Callable

    def __call__(self, logits, examples, language=None):
        return self.of(self.counts(logits, examples, language))

    def of(self, counts):
        """{name: percent} of all these examples."""
        return {name: float(score) for name, score in self.scores(counts.sum(0, dtype=float), len(counts)).items()}


def right_classes(logits, examples, language=None):
    """(windows, 1): whether the highest logit is the label's."""
    return (logits.argmax(1) == examples.labels)[:, None]


accuracy = Measure(right_classes, lambda sums, n: {"accuracy": 100.0 * sums[..., 0] / n})


def entities_of_sentences(logits, examples, language=None):
    """(sentences, 3): how many entities are right, predicted and gold."""
    tokens = examples.labels != IGNORED
    starts = np.zeros(len(examples.ids) + 1, bool)
    starts[examples.offsets[examples.first[:-1]]] = True  # where sentences begin; their first token comes later
    sentence = np.cumsum(starts[:-1])[tokens] - 1
    return entity_counts(examples.labels[tokens], logits[tokens].argmax(1), sentence, len(examples))


def entity_counts(gold, predicted, sentence, sentences, labels=NER_LABELS):
    """(sentences, 3): the right, predicted and gold entities of each, as conlleval and seqeval's default read tags.

    gold, predicted (tokens,) ids of tags in `labels`; sentence (tokens,) the number of each token's sentence, from 0.
    An entity is right if type, first and last token are.
    """
    gold, predicted = (entities(tags, sentence, labels) for tags in (gold, predicted))
    firsts = [np.array([first for first, _, _ in found], int) for found in (gold & predicted, predicted, gold)]
    return np.stack([np.bincount(sentence[first], minlength=sentences) for first in firsts], axis=1)


def entity_f1(sums, n=None):
    """Micro F1, precision and recall, in percent, of sums (..., 3) of right, predicted and gold entities. Without any
    entity, or any right one, the score is 0."""
    right, predicted, gold = np.moveaxis(sums, -1, 0)
    return {
        "f1": 100.0 * 2 * right / np.maximum(predicted + gold, 1),
        "precision": 100.0 * right / np.maximum(predicted, 1),
        "recall": 100.0 * right / np.maximum(gold, 1),
    }


entity_scores = Measure(entities_of_sentences, entity_f1)


def entities(tags, sentence, labels=NER_LABELS):
    """The set of (first token, last token, type) in a sequence of tag ids.

    An entity begins at a B-, and at an I- that follows no tag of its type; it ends before the next token that is no I-
    of its type, and with its sentence (Ramshaw and Marcus 1995; conlleval).
    """
    types = np.array([label.partition("-")[2] for label in labels])[tags]
    prefixes = np.array([label[0] for label in labels])[tags]
    same = np.zeros(len(tags), bool)  # as the token before: type and sentence
    same[1:] = (types[1:] == types[:-1]) & (sentence[1:] == sentence[:-1])
    inside = prefixes != "O"
    begins = inside & ((prefixes == "B") | ~same)
    breaks = np.append(np.flatnonzero(begins | ~inside), len(tags))  # an entity ends before the next of these
    first = np.flatnonzero(begins)
    last = breaks[np.searchsorted(breaks, first, side="right")] - 1
    return set(zip(first.tolist(), last.tolist(), types[first].tolist()))


# MLQA's rules (Lewis et al. 2020): SQuAD's, with the articles of each language, and Chinese character by character.
PUNCTUATION = {c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c)[0] == "P"}
PUNCTUATION |= set(string.punctuation)
ARTICLES = {
    "en": r"\b(a|an|the)\b",
    "es": r"\b(un|una|unos|unas|el|la|los|las)\b",
    "de": r"\b(ein|eine|einen|einem|eines|einer|der|die|das|den|dem|des)\b",
    "vi": r"\b(của|là|cái|chiếc|những)\b",
    "ar": r"ال",  # wherever it stands, for the article is written together with its noun
}


def answer_tokens(text, language):
    """The tokens of an answer by MLQA's rules: lower case, without punctuation and articles, divided at white space; in
    Chinese each character of U+4E00-U+9FA5 is one. A language that MLQA has not is one without articles."""
    text = "".join(c for c in text.lower() if c not in PUNCTUATION)
    if language in ARTICLES:
        text = re.sub(ARTICLES[language], " ", text)
    if language == "zh":
        text = re.sub(r"([\u4e00-\u9fa5])", r" \1 ", text)
    return text.split()


def exact_match(prediction, answers, language):
    """1 if the prediction has the tokens of one of the gold answers, else 0."""
    tokens = answer_tokens(prediction, language)
    return int(any(tokens == answer_tokens(answer, language) for answer in answers))


def answer_f1(prediction, answers, language):
    """F1, 0 to 1, of the prediction's bag of tokens and that of the gold answer that it is nearest to. Two answers that
    have no tokens have F1 0, although they match exactly: so does MLQA's script."""
    predicted = collections.Counter(answer_tokens(prediction, language))
    best = 0.0
    for answer in answers:
        gold = collections.Counter(answer_tokens(answer, language))
        common = (predicted & gold).total()
        if common:
            precision, recall = common / predicted.total(), common / gold.total()
            best = max(best, 2 * precision * recall / (precision + recall))
    return best


LONGEST_ANSWER = 30  # pieces, as in BERT's and XTREME's code


def best_answers(logits, examples, longest=LONGEST_ANSWER):
    """The text of the best answer to each question: a list of str.

    The best is the highest sum of a start logit and an end logit, of two pieces of the context in the same window, the
    end not before the start and at most `longest` pieces in all, over all windows of the question.
    logits: (ids, 2). The answer is cut from the original context, without white space at its ends.
    """
    context = examples.spans[:, 0] >= 0
    start, end = np.where(context[:, None], logits, -np.inf).T
    window = np.repeat(np.arange(len(examples.lengths)), examples.lengths)
    best = np.full(len(start), -np.inf)  # of the answers that begin at each piece: the highest sum
    extra = np.zeros(len(start), np.int64)  # and how many pieces more it has
    for more in range(min(longest, len(start))):
        n = len(start) - more
        score = np.where(window[:n] == window[more:], start[:n] + end[more:], -np.inf)
        better = score > best[:n]
        best[:n][better] = score[better]
        extra[:n][better] = more
    texts = []
    bounds = examples.offsets[examples.first]
    for i, (text, _) in enumerate(examples.texts):
        first = bounds[i] + int(best[bounds[i] : bounds[i + 1]].argmax())
        begin, stop = examples.spans[first, 0], examples.spans[first + extra[first], 1]
        texts.append(text[max(begin, 0) : max(stop, 0)].strip())
    return texts


def scores_of_answers(logits, examples, language):
    """(questions, 2): F1 and exact match, 0 to 1, of the best answers by MLQA's rules.

    language: the context's, which the answer is in; of "en-de" (an English context and a German question) "en"."""
    language = language.partition("-")[0]
    pairs = [(text, gold) for text, (_, gold) in zip(best_answers(logits, examples), examples.texts)]
    scores = [(answer_f1(*pair, language), exact_match(*pair, language)) for pair in pairs]
    return np.array(scores, float).reshape(-1, 2)


answer_scores = Measure(
    scores_of_answers,
    lambda sums, n: {"f1": 100.0 * sums[..., 0] / n, "exact_match": 100.0 * sums[..., 1] / n},
)
MEASURES = {"xnli": accuracy, "qam": accuracy, "ner": entity_scores, "mlqa": answer_scores}


def count(model, sets, measure, device="cpu", precision="fp32", tokens=4096):
    """{language: what each example counts, (examples, k)} of the model on {language: Examples}; see Measure."""
    return {
        language: measure.counts(predict(model, examples, device, precision, tokens), examples, language)
        for language, examples in sets.items()
    }


def scored(counts, measure):
    """{name of a measure: {language: percent}} of what `count` found; `measure` is one of MEASURES."""
    measured = {}
    for language, of_examples in counts.items():
        for name, score in measure.of(of_examples).items():
            measured.setdefault(name, {})[language] = score
    return measured


def evaluate(model, sets, measure, device="cpu", precision="fp32", tokens=4096):
    """{name of a measure: {language: percent}} of the model on {language: Examples}."""
    return scored(count(model, sets, measure, device, precision, tokens), measure)


def report(measured, source=SOURCE):
    """What a result says of one set of languages: "scores", {language: percent} by the task's own measure, which is
    named in "measure"; the summary of them; and the other measures under their names."""
    own, *others = measured
    more = {name: measured[name] for name in others}
    return {"measure": own, "scores": measured[own], **more, **summary(measured[own], source)}


def summary(scores, source=SOURCE):
    """The paper's numbers of a {language: score}: "mean" over all languages, the source included; "source";
    "non_source", the mean over the others; "gap" = source - non_source (Section 1). Without others there is no gap.
    Of pairs "en-de", contexts and questions of question answering, the source is "en-en". Scores may be arrays."""
    source = source if source in scores else f"{source}-{source}"
    of_source = scores[source]
    others = [score for language, score in scores.items() if language != source]
    non_source = sum(others) / len(others) if others else None
    return {
        "mean": sum(scores.values()) / len(scores),
        "source": of_source,
        "non_source": non_source,
        "gap": of_source - non_source if others else None,
    }


def linear_cka(x, y):
    """Linear centred kernel alignment (Kornblith et al. 2019, Eq. 3 with linear kernels) of two representations of the
    same tokens, x (tokens, p) and y (tokens, q): ||y^T x||^2 / (||x^T x|| ||y^T y||) of the centred features, 0 to 1.

    Computed on p x q matrices in float64; nothing of the size tokens x tokens is made. NaN if one does not vary at all.
    """
    x, y = (z.double() - z.double().mean(0) for z in (x, y))
    return float((y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm()))


@torch.no_grad()
def similarity(model, reference, input_ids):
    """Linear CKA of each layer between the working model's encoder and the pre-trained one's, on the real tokens of a
    batch (Section 3.2 and Appendix D): [layer 0, ..., last layer]. Without dropout, in float32."""
    was_training = model.training
    model.eval()
    real = input_ids != PAD
    pairs = zip(model.roberta.states(input_ids), reference.states(input_ids))
    layers = [linear_cka(ours[real], theirs[real]) for ours, theirs in pairs]
    model.train(was_training)
    return layers[1:]  # the embeddings come first


# --- the table of a set of runs ------------------------------------------------------------------------------

# {table: {row: {column: [mean, standard deviation over 4 seeds]}}}: Tables 1 to 8 of the paper, as printed
PAPER = json.loads((Path(__file__).parent / "results" / "paper.json").read_text(encoding="utf-8"))
# The languages that the paper's averages are over: beside a table of others they would mislead.
PAPER_LANGUAGES = {
    "xnli": list(PAPER["table7"]["df"]), "ner": NER_LANGUAGES, "mlqa": list(MLQA_LANGUAGES), "qam": ["de", "en", "fr"],
}  # fmt: skip


def paper_row(task, method, shots=0):
    """{language or "mean": (mean, standard deviation)} of the paper for a method, as far as it goes; {} for no row."""
    table = {"xnli": "table7", "qam": "table3"}.get(task) if shots == 0 else None
    row = {**PAPER[table].get(method, {})} if table else {}
    if mean := PAPER["table2"].get(method, {}).get(f"{task} M={shots}"):
        row["mean"] = mean
    return {column: tuple(printed) for column, printed in row.items()}


def read_runs(folders):
    """The result.json files under `folders`, finished runs only, as a list of dicts. Raises InputError if one is broken
    or there is none."""
    files = sorted({file for folder in folders for file in Path(folder).rglob("result.json")})
    if not files:
        raise InputError(f"no result.json under {', '.join(map(str, folders))}: no run has finished there")
    runs = []
    for file in files:
        try:
            runs.append(json.loads(file.read_text(encoding="utf-8")) | {"folder": file.parent})
            for key in ("task", "method", "seed", "shots"):
                runs[-1]["settings"][key]
            for split in ("dev", *splits_of(runs[-1])):
                summary(runs[-1][split]["scores"], source_of(runs[-1]))
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise InputError(f"{file}: not a run's result ({type(e).__name__}: {e})") from e
    return runs


def splits_of(run):
    """The names of the sets that a run was measured on."""
    return [name for name, value in run.items() if isinstance(value, dict) and "scores" in value]


def all_splits(runs):
    """The names of all sets that any of these runs was measured on, the test sets first."""
    return sorted({name for run in runs for name in splits_of(run)}, key=lambda name: (name != "test", name))


def scores_of(run, split, measure=None):
    """{language: percent} of a run on a split by a measure, by default the task's own; None if it has none."""
    entry = run[split] if split in splits_of(run) else {}
    scores = entry.get("scores" if measure in (None, entry.get("measure", "accuracy")) else measure)
    return scores if isinstance(scores, dict) else None


def source_of(run):
    return run["settings"].get("source", SOURCE)


# Settings that do not make two runs different rows of a table.
NOT_A_ROW = {"seed", "data", "model"}


def group_runs(runs):
    """[(label, runs that differ in the seed alone)]; the label: method and the settings in which its runs differ."""
    groups = {}
    for run in runs:
        key = json.dumps({k: v for k, v in run["settings"].items() if k not in NOT_A_ROW}, sort_keys=True)
        groups.setdefault(key, []).append(run)
    labelled = []
    for members in groups.values():
        settings = members[0]["settings"]
        rivals = [m[0]["settings"] for m in groups.values() if m[0]["settings"]["method"] == settings["method"]]
        differing = [k for k in settings if k not in NOT_A_ROW and any(r.get(k) != settings[k] for r in rivals)]
        labelled.append((" ".join([settings["method"], *(name_of(settings, k) for k in differing)]), members))
    return sorted(labelled, key=lambda row: row[0])


def name_of(settings, key):
    """A setting for a label; the model and the data are compared by their content and shown by their path."""
    path = settings.get(key.removesuffix("_sha256"))
    return f"{key.removesuffix('_sha256')}={path if key.endswith('_sha256') else settings[key]}"


def cell(values):
    """Mean ± standard deviation over seeds (of the sample), one decimal; one seed has no deviation."""
    if not values:
        return "-"
    spread = f"±{statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"


def table(runs, split="test", measure=None, paper=True):
    """The rows of a table, the first the header: languages and their summary as columns, a row a method, under it the
    paper's, where it has one for these languages. Runs without scores on `split` are left out.

    measure: another than the task's own, such as "exact_match". paper: whether its rows are wanted."""
    runs = [run for run in runs if scores_of(run, split, measure)]
    if not runs:
        return None
    languages = sorted({language for run in runs for language in run[split]["scores"]})
    totals = ("mean", "source", "non_source", "gap")
    rows = [["method", "seeds", *languages, "mean", "source", "others", "gap"]]
    for label, members in group_runs(runs):
        scores = [scores_of(run, split, measure) for run in members]
        summaries = [summary(s, source_of(run)) for s, run in zip(scores, members)]
        by_language = [cell([s[language] for s in scores if language in s]) for language in languages]
        by_total = [cell([s[total] for s in summaries if s[total] is not None]) for total in totals]
        rows.append([label, str(len(members)), *by_language, *by_total])
        s = members[0]["settings"]
        theirs = paper_row(s["task"], s["method"], s["shots"]) if paper and split == "test" and measure is None else {}
        if theirs and languages == PAPER_LANGUAGES[s["task"]]:
            printed = ["{}±{}".format(*theirs[k]) if k in theirs else "" for k in [*languages, "mean"]]
            if source_of(members[0]) in theirs:
                s = summary({k: mean for k, (mean, _) in theirs.items() if k != "mean"}, source_of(members[0]))
                printed += [f"{s[k]:.1f}" for k in totals[1:]]
            rows.append(["  paper, XLM-R base", "4", *printed, *[""] * (len(rows[0]) - 2 - len(printed))])
    return rows


def matrices(runs, split, measure=None):
    """[(label, rows)]: for each method the table of a split whose scores are of pairs "context-question": contexts as
    rows, questions as columns (MLQA's generalised setting)."""
    found = []
    for label, members in group_runs([run for run in runs if scores_of(run, split, measure)]):
        scores = [scores_of(run, split, measure) for run in members]
        names = sorted({pair.split("-")[0] for s in scores for pair in s})
        rows = [["context \\ question", *names]]
        rows += [[c, *(cell([s[f"{c}-{q}"] for s in scores if f"{c}-{q}" in s]) for q in names)] for c in names]
        found.append((label, rows))
    return found


def curves(runs):
    """The rows of a table of the curves that runs logged: by update the loss (mean since the line before), the phase
    and the gap (English minus the mean of the others, on the fixed part of the dev sets) of each run."""
    labels = [(label, run) for label, members in group_runs(runs) for run in members]
    header, columns = ["update"], []
    for label, run in labels:
        columns.append({line["update"]: line for line in read_log(run)})
        header += [f"{label} seed {run['settings']['seed']}: loss", "phase", "gap"]
    rows = [header]
    for update in sorted(set().union(*columns)):
        lines = [column.get(update, {}) for column in columns]
        rows.append([str(update), *(shown(line, key) for line in lines for key in ("loss", "phase", "gap"))])
    return rows


def shown(line, key):
    """A number of a log line: the loss with three decimals, the gap with one, the phase as P1 or P2."""
    form = {"loss": "{:.3f}", "phase": "P{}", "gap": "{:.1f}"}[key]
    return "" if line.get(key) is None else form.format(line[key])


def render(rows, markdown=False):
    """Rows of strings as lines: columns aligned, for a terminal, or a Markdown table."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    align = [[row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))] for row in rows]
    if not markdown:
        return "\n".join(["  ".join(row) for row in align])
    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in [align[0], rule, *align[1:]])


def transposed(rows):
    return [list(column) for column in zip(*rows)]


def titled_tables(runs, splits, measure=None, by_language=False, paper=True):
    """Yields (title, rows) of what `table` and `matrices` make of these splits."""
    for split in splits:
        name = {"test": "test sets", "dev": "dev sets"}.get(split, split)
        by = measure or next((run[split].get("measure", "accuracy") for run in runs if split in splits_of(run)), None)
        title = f"{name}, {by} in %, mean±standard deviation over seeds"
        if any("-" in language for run in runs for language in scores_of(run, split) or ()):
            for label, rows in matrices(runs, split, measure):
                yield f"{label}: {title}", rows
        elif rows := table(runs, split, measure, paper):
            yield f"{title}; gap = source-others", transposed(rows) if by_language else rows


# --- the paper's tables --------------------------------------------------------------------------------------
#
# PAPER has their rows and columns; here is what these mean and what the paper concludes from them. A row is a method
# or one constant of slowfast's, a column a task with a number of shots or a part of the languages. So a cell is a task,
# the settings that its runs have, and what is taken of their scores.

TITLES = {
    "table1": "Training, freezing or enlarging the rate of parts of the model",
    "table2": "The method and its rivals, zero-shot (M = 0) and with M examples of each other language",
    "table3": "Question-passage matching (QAM)",
    "table4": "Source and other languages",
    "table5": "The constants c1, c2 and r",
    "table6": "Starting parts of the first four layers anew",
    "table7": "XNLI by language",
    "table8": "Which weight sets the policies act on",
}
TASK_NAMES = {"xnli": "XNLI", "ner": "NER", "mlqa": "MLQA", "qam": "QAM"}  # in the paper's order
# What tables vary: all other settings of a run are its setup's.
VARIED = {"method": "slowfast", "shots": 0, "c1": 0.01, "c2": 10.0, "r": 3.0}


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


def columns(table):
    """The names of a table's columns, in the paper's order."""
    return list(dict.fromkeys(name for row in PAPER[table].values() for name in row))


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


@dataclass
class Setup:
    """Runs of one task that differ in seed and VARIED settings alone."""

    task: str
    name: str  # "NER", or "NER (b)" where there are several
    runs: list
    split: str  # the sets that its scores are of: the test sets if all runs were measured on them

    def seeds(self, settings):
        """{seed: run} of the runs with these settings; what they do not name is the paper's."""
        wanted = VARIED | settings
        return {r["seed"]: r for r in self.runs if all(r["settings"][k] == v for k, v in wanted.items())}

    def values(self, settings, quantity):
        """{seed: a quantity of the run's scores}; runs that lack it are left out."""
        runs = self.seeds(settings)
        found = {seed: quantity_of(r[self.split]["scores"], quantity, source_of(r)) for seed, r in runs.items()}
        return {seed: value for seed, value in found.items() if value is not None}


def setups_of(runs):
    """The Setups of a list of runs, in the paper's order of tasks."""
    groups = {}
    for run in runs:
        s = run["settings"]
        rest = {k: v for k, v in s.items() if k not in NOT_A_ROW and k not in VARIED and k != "task"}
        groups.setdefault(s["task"], {}).setdefault(json.dumps(rest, sort_keys=True), []).append(run)
    setups = []
    for task in (task for task in TASK_NAMES if task in groups):
        for n, members in enumerate(groups[task].values()):
            split = next(x for x in ("test", "xquad", "dev") if all(x in splits_of(run) for run in members))
            name = TASK_NAMES[task] + (f" ({chr(ord('a') + n)})" if len(groups[task]) > 1 else "")
            setups.append(Setup(task, name, members, split))
    return setups


def quantity_of(scores, quantity, source=SOURCE):
    """ "mean", "source", "non_source" or "gap" of {language: score}, or a language's score; None if there is none."""
    return scores.get(quantity) if quantity in scores else summary(scores, source).get(quantity)


# --- differences and how sure they are -----------------------------------------------------------------------

DRAWS = 1000
# Student's t at 97.5 %, by degrees of freedom
T975 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131]


def difference(setup, a, b, quantity):
    """(mean of a - b, low, high), or None without a common seed: the difference of a quantity between the runs of two
    settings with its 95 % interval, paired.

    Over the seeds that both have (Student's t) or, with one, by a bootstrap of the examples (Efron and Tibshirani 1993,
    percentiles), which knows nothing of the chance in training. Without what each example counted there is no interval:
    low and high are None. For the gap less is better, so that it is b - a."""
    one, other = setup.values(a, quantity), setup.values(b, quantity)
    sign = -1 if quantity == "gap" else 1
    seeds = sorted(one.keys() & other.keys())
    if not seeds:
        return None
    differences = [round(sign * (one[seed] - other[seed]), 9) for seed in seeds]
    mean = statistics.fmean(differences)
    if len(seeds) > 1:
        t = T975[min(len(seeds) - 1, len(T975)) - 1]
        margin = t * statistics.stdev(differences) / len(seeds) ** 0.5
        return mean, mean - margin, mean + margin
    drawn = [resampled(setup.seeds(s)[seeds[0]]["folder"], setup.split, setup.task) for s in (a, b)]
    if None in drawn:
        return mean, None, None
    source = source_of(setup.runs[0])
    one, other = (quantity_of(scores, quantity, source) for scores in drawn)
    low, high = np.percentile(sign * (one - other), [2.5, 97.5])
    return mean, float(low), float(high)


@functools.lru_cache(maxsize=200)
def resampled(folder, split, task):
    """{language: (DRAWS,) scores} of a run's predictions, on as many sets of examples drawn with replacement; None if
    the run did not keep what each example counts."""
    file = folder / "examples" / f"{split}.npz"
    if not file.is_file():
        return None
    measure, scores = MEASURES[task], {}
    try:
        with np.load(file, allow_pickle=False) as counts:
            for language in counts:
                of_examples, n = counts[language].astype(np.float32), len(counts[language])
                scores[language] = next(iter(measure.scores(draws(n) @ of_examples, n).values()))
    except Exception as e:  # numpy has no one error for a damaged file
        raise InputError(f"{file}: damaged ({type(e).__name__}: {e}); remove it and measure the run again") from e
    return scores


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


def verdict(setup, table, comparisons):
    """What a setup's runs say of a claim: yes if all its comparisons are above 0 with their whole intervals, no if one
    is below, else not distinguishable. Comparisons that the paper's table lacks for this task do not count; None if
    these are all."""
    rows = [settings_of_row(row) for row, cells in PAPER[table].items()
            if any(column(table, name)[0] == setup.task for name in cells)]  # fmt: skip
    known = [pair for pair in comparisons if all(any(r.items() <= side.items() for r in rows) for side in pair[:2])]
    if not known:
        return None
    found = [pair for pair in (difference(setup, *pair) for pair in known) if pair]
    if not found:
        return "not run"
    above = sum(low is not None and low > 0 for _, low, _ in found)
    below = sum(high is not None and high < 0 for _, _, high in found)
    said = "no" if below else "yes" if above == len(found) else "not distinguishable"
    lacking = f"; {len(known) - len(found)} of {len(known)} comparisons not run" if len(found) < len(known) else ""
    if len(found) == 1:
        return f"{said}, {interval(found[0])}{lacking}"
    return f"{said} ({above} of {len(found)} comparisons for it, {below} against{lacking})"


def paper_table(table, setups, whole=True):
    """One of the paper's tables with these runs: (rows of strings, the first the header; lines about its claims).

    A cell is mean±standard deviation over seeds, "(n)" the number of seeds where it is not 4; under each row that has
    any stand the difference from df with its interval and the paper's numbers. whole: also the rows and columns that no
    run is of."""
    cells = []  # (name, setup or None, the paper's column, settings, quantity) of each column
    for name in columns(table):
        task, settings, quantity = column(table, name)
        there = [setup for setup in setups if setup.task == task] or [None]
        for setup in there:
            there_are = setup and any(setup.values(settings_of_row(r) | settings, quantity) for r in PAPER[table])
            if not whole and not there_are:
                continue
            shown = name.replace(task, setup.name if setup else TASK_NAMES[task], 1) if name.startswith(task) else name
            several = f" {setup.name}" if setup and len(there) > 1 and not name.startswith(task) else ""
            cells.append((shown.replace("non_source", "others") + several, setup, name, settings, quantity))
    rows = [["", *(name for name, *_ in cells)]]
    for row, printed in PAPER[table].items():
        ours, minus = [], []
        for _, setup, name, settings, quantity in cells:
            wanted = settings_of_row(row) | settings
            values = list(setup.values(wanted, quantity).values()) if setup and name in printed else []
            ours.append(cell(values) + (f" ({len(values)})" if len(values) not in (0, 4) else ""))
            found = values and difference(setup, wanted, {"method": "df", **settings}, quantity)
            minus.append(interval(found) if found and row != "df" else "-")
        if not whole and all(text == "-" for text in ours):
            continue
        rows.append([row, *ours])
        if any(text != "-" for text in minus):
            rows.append(["  minus df", *minus])
        rows.append(["  paper", *("{}±{}".format(*printed[c[2]]) if c[2] in printed else "-" for c in cells)])
    claims = []
    tasks = {column(table, name)[0] for name in columns(table)}
    for text, comparisons in CLAIMS[table]:
        said = [(setup.name, verdict(setup, table, comparisons)) for setup in setups if setup.task in tasks]
        said = [f"{name} {v}" for name, v in said if v and (whole or v != "not run")]
        if said or whole:
            claims.append(f"{text}: {'; '.join(said) or 'not run'}")
    return rows, claims


# --- drawing: grids of line panels ---------------------------------------------------------------------------
#
# The colours, Okabe and Ito's, differ for the colour-blind too; each has a marker of its own, and lines may be dashed,
# so that a figure reads in grey. Sizes are those in print: one column of panels fits a column of an ACL paper, more fit
# its page, and no letter is smaller than 7 points.

PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # all but the pale yellow
MARKERS = "os^DvPX"  # of the colours
DASHES = ["-", (0, (4, 1.5)), (0, (6, 1.5, 1, 1.5)), (0, (9, 2))]  # dots are the baseline's
BASELINE = {"color": "0.25", "linestyle": ":", "linewidth": 1.2}
SHADE = {"color": "0.88", "linewidth": 7, "solid_capstyle": "butt"}  # of P1; in a legend it is a thick line
STRIP = 0.045  # the height of a strip that shows P1, as a part of the panel's
LONG = 300  # points; of a longer line the running mean is drawn, over it the points would hide each other
LONG_NOTE = f"Lines of more than {LONG} points are running means over 2% of them; the points are pale."
STYLE = {
    "font.size": 7, "legend.frameon": False, "legend.handlelength": 2.6, "legend.columnspacing": 1.2,
    "lines.linewidth": 1.0, "lines.markersize": 3.2, "axes.linewidth": 0.6, "axes.xmargin": 0.02,
    "axes.spines.top": False, "axes.spines.right": False, "axes.formatter.useoffset": False,
    "xtick.major.width": 0.6, "ytick.major.width": 0.6, "xtick.major.size": 2.5, "ytick.major.size": 2.5,
    "text.parse_math": False, "svg.fonttype": "path", "svg.hashsalt": "slowfast",
}  # fmt: skip


@dataclass
class Series:
    """A line. x: updates or layers; y: means over seeds, None or NaN for a gap in the line; low, high: the lowest and
    the highest seed, a light band; color, dash: indices into PALETTE and DASHES; first_phase: [(from update, to
    update), ...] in which the run was in phase P1."""

    label: str
    x: list
    y: list
    low: list = None
    high: list = None
    color: int = 0
    dash: int = 0
    first_phase: list = ()


@dataclass
class Panel:
    """Lines in one pair of axes; "not run" without any. baseline: the height of a dotted line. ordered: the series are
    steps of a scale, "layer 0", "layer 1", ..., which a colour bar explains."""

    title: str
    y_label: str
    series: list
    x_label: str = "update"
    baseline: float = None
    baseline_label: str = ""
    ordered: bool = False


def draw(grid, path, caption=""):
    """Draws a grid, a list of equally long rows of Panels. Returns the files: `path`.svg, `path`.png (200 dpi) and
    `path`.csv, the exact numbers. The same grid gives the same bytes, whatever the user's settings of matplotlib.

    Panels of a column share the x axis if all are of the same quantity, and panels with common lines share a legend."""
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels, wide = [panel for row in grid for panel in row], len(grid[0]) > 1
    if any(len(s.x) > LONG for panel in panels if not panel.ordered for s in panel.series):
        caption = f"{caption} {LONG_NOTE}".strip()
    files = [Path(f"{path}.{kind}") for kind in ("svg", "png", "csv")]
    files[0].parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(6.3 if wide else 3.1, 1))
        FigureCanvasAgg(figure)  # needs no display
        figure.set_layout_engine("constrained", h_pad=0.03, w_pad=0.05)
        spec = figure.add_gridspec(2 * len(grid), len(grid[0]), height_ratios=[1e-3, 1] * len(grid))
        axes = draw_panels(figure, spec, grid)
        caption = textwrap.fill(caption, int(18 * figure.get_figwidth()))
        figure.supxlabel(caption, x=0.01, ha="left", fontsize=7)
        lines = caption.count("\n") + sum(draw_legend(figure, spec, axes, grid, block) for block in blocks(grid))
        figure.set_figheight((1.4 if wide else 1.5) * len(grid) + 0.7 + 0.14 * lines)
        settle(figure)
        figure.savefig(files[0], metadata={"Date": None})
        figure.savefig(files[1], metadata={"Software": None}, dpi=200)
    with open(files[2], "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(numbers(panels))
    return files


def settle(figure):
    """Lays the figure out for good, to five decimals: the solver's last ones differ from call to call."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for ax in figure.axes:
        ax.set_position(np.round(ax.get_position().bounds, 5))


def numbers(panels):
    """The rows of a table: the header, then each point of each series, and each baseline, without x."""
    yield ["panel", "quantity", "series", "x", "y", "low", "high"]
    for panel in panels:
        for s in panel.series:
            nothing = [None] * len(s.x)
            for point in zip(s.x, s.y, s.low or nothing, s.high or nothing, strict=True):
                yield [panel.title, panel.y_label, s.label, *point]
        if panel.baseline is not None:
            yield [panel.title, panel.y_label, panel.baseline_label, None, panel.baseline, None, None]


# The panels.


def draw_panels(figure, spec, grid):
    """Draws the panels, with the titles, labels and numbers that the one above or to the left does not have already.
    Returns rows of axes. In `spec` a row of panels has a flat one above it, for legends."""
    width = figure.get_figwidth() / len(grid[0])
    same_x = len({panel.x_label for row in grid for panel in row if panel.series}) == 1
    same_y = all(panel.ordered for row in grid for panel in row if panel.series)
    axes = [[None] * len(row) for row in grid]
    for r, row in enumerate(grid):
        for c, panel in enumerate(row):
            shared = {"sharex": axes[0][c] if same_x else None, "sharey": axes[r][0] if same_y else None}
            ax = axes[r][c] = figure.add_subplot(spec[2 * r + 1, c], **shared)
            draw_panel(ax, panel, width)
            last = not (same_x and any(below[c].series for below in grid[r + 1 :]))
            ax.tick_params(labelbottom=last, labelleft=not (same_y and c and row[c - 1].series))
            if panel.series and last:
                ax.set_xlabel(panel.x_label)
            if r == 0 or panel.title != grid[r - 1][c].title:
                ax.set_title(textwrap.fill(panel.title, int(13 * width)))
            if c == 0 or panel.y_label != row[c - 1].y_label:
                ax.set_ylabel(textwrap.fill(panel.y_label, 24))
            if not panel.series:
                ax.tick_params(bottom=False, left=False, labelbottom=False, labelleft=False)
    figure.align_ylabels()
    return axes


def draw_panel(ax, panel, width):
    """width: the panel's, in inches."""
    if not panel.series:
        ax.text(0.5, 0.5, "not run", color="0.5", ha="center", va="center", transform=ax.transAxes)
        ax.spines[:].set_color("0.8")
        return
    colors = layer_colors(ax, len(panel.series)).to_rgba(range(len(panel.series)))
    for s, color in zip(panel.series, colors):
        draw_series(ax, s, {"color": color, "marker": "."} if panel.ordered else look(s), panel)
    if panel.baseline is not None:
        ax.axhline(panel.baseline, **BASELINE)
    right, (low, high) = ax.dataLim.xmax, ax.dataLim.intervaly
    if low < 0 < high:
        ax.axhline(0, color="0.6", linewidth=0.5, zorder=0)
    ax.locator_params(axis="x", integer=True, nbins=6 if width > 3 or right < 1000 else 3)
    ax.locator_params(axis="y", nbins=5)
    ax.xaxis.set_major_formatter("{x:,.0f}")
    draw_phases(ax, panel)


def look(s):
    return {"color": PALETTE[s.color], "marker": MARKERS[s.color], "linestyle": DASHES[s.dash]}


def layer_colors(ax, n):
    """matplotlib's map of 0, ..., n - 1 to colours: viridis without its last, pale part."""
    return ax.scatter([], [], c=[], cmap="viridis", vmin=0, vmax=1.12 * max(n - 1, 1))


def draw_series(ax, s, style, panel):
    """Markers: on each of a few points; on some of many, other ones than in another colour, if there is more than one
    line; always on a point between two gaps, where there is no line. Ordered lines have but these last ones."""
    x, y = np.array(s.x, float), np.array(s.y, float)
    there = np.isfinite(y)
    alone = np.flatnonzero(there & ~np.append(False, there[:-1]) & ~np.append(there[1:], False))
    points = np.flatnonzero(there)
    step = max(1, len(points) // 6) if len(points) > 16 else 1
    markers = () if panel.ordered or step > 1 and len(panel.series) == 1 else points[step * s.color // 7 :: step]
    if len(y) > LONG and not panel.ordered:
        ax.plot(x, y, color=style["color"], linewidth=0.4, alpha=0.25, zorder=1)
        y = running_mean(y, len(y) // 50)
    ax.plot(x, y, markevery=sorted({*alone, *markers}), **style)
    if s.low and s.high:
        low, high = np.array(s.low, float), np.array(s.high, float)
        ax.fill_between(x, low, high, color=style["color"], alpha=0.18, linewidth=0)
        ax.vlines(x[alone], low[alone], high[alone], color=style["color"], alpha=0.5)


def running_mean(y, n):
    """The mean of each point and those of its nearest n - 1 that are there; a gap stays one."""
    there = np.isfinite(y)
    total = np.convolve(np.where(there, y, 0), np.ones(n), "same")
    return np.where(there, total / np.maximum(np.convolve(there, np.ones(n), "same"), 1), np.nan)


def phased(panel):
    """The series whose first phase is shown. Ordered ones are of one run."""
    return [s for s in panel.series if s.first_phase][: 1 if panel.ordered else None]


def draw_phases(ax, panel):
    """Shows when runs were in P1: one run by a shade, several by strips in their colours, below the data."""
    runs = phased(panel)
    if len(runs) == 1:
        for start, end in runs[0].first_phase:
            ax.axvspan(start, end, color=SHADE["color"], linewidth=0, zorder=-1)
    if len(runs) < 2:
        return
    low, high = ax.get_ylim()
    band = STRIP * (len(runs) + 0.5)
    ax.set_yticks([tick for tick in ax.get_yticks() if low <= tick <= high])
    ax.set_ylim(high - (high - low) / (1 - band), high)
    ax.axhline(low, color="0.7", linewidth=0.5)
    ax.text(-0.02, band / 2, "P1", ha="right", va="center", transform=ax.transAxes)
    for i, s in enumerate(reversed(runs)):
        for start, end in s.first_phase:
            ax.axvspan(start, end, (i + 0.1) * STRIP, (i + 0.9) * STRIP, color=PALETTE[s.color], linewidth=0)
        style = look(s) | {"markersize": 2.6, "clip_on": False}
        ax.plot(1.015, (i + 0.5) * STRIP, transform=ax.transAxes, **style)


# The legends.


def entries(panel):
    """What a legend of the panel explains: {label: how its line looks; of an ordered series its place, (i, n)}."""
    n = len(panel.series)
    found = {s.label: (i, n) if panel.ordered else look(s) for i, s in enumerate(panel.series)}
    if n and panel.baseline is not None and panel.baseline_label:
        found[panel.baseline_label] = BASELINE
    if len(phased(panel)) == 1:
        found["P1" if n == 1 or panel.ordered else f"P1 of {phased(panel)[0].label}"] = SHADE
    return found


def one_legend(panels):
    """Whether one legend does for all: each has a label of the largest, and no label means two things."""
    found = [entries(panel) for panel in panels if panel.series]
    union = {label: meant for labels in found for label, meant in labels.items()}
    largest = max(found, key=len, default={})
    return all(labels.keys() & largest.keys() and labels.items() <= union.items() for labels in found)


def blocks(grid):
    """The sets of panels with one legend, as lists of (row, column): the grid, else each row, else each panel."""
    rows = [[(r, c) for c in range(len(row))] for r, row in enumerate(grid)]
    if one_legend([panel for row in grid for panel in row]):
        return [[cell for row in rows for cell in row]]
    return [block for row, cells in zip(grid, rows) for block in ([cells] if one_legend(row) else [[c] for c in cells])]


def draw_legend(figure, spec, axes, grid, block):
    """Draws a block's legend above it, and the colour bar of ordered series beside it. Returns the legend's lines."""
    found = {label: meant for r, c in block for label, meant in entries(grid[r][c]).items()}
    (top, left), (_, right) = block[0], block[-1]
    if ordered := [label for label, meant in found.items() if isinstance(meant, tuple)]:
        draw_bar(figure, [axes[r][c] for r, c in block], ordered)
    labels = [label for label in found if label not in ordered]
    if not labels:
        return 0
    host = figure.add_subplot(spec[2 * top, left : right + 1])
    host.set_axis_off()
    names = [textwrap.fill(label, 40) for label in labels]
    lone = sum("marker" in found[label] for label in labels) == 1  # its line needs no markers
    for label, name in zip(labels, names):
        host.plot([], [], label=name, **found[label] | ({"marker": ""} if lone else {}))
    columns = fitting(names, figure.get_figwidth() * (right + 1 - left) / len(grid[0]) - 0.3)
    host.legend(loc="lower center", bbox_to_anchor=(0.5, 0), borderaxespad=-0.5, ncols=columns)
    return -(-len(names) // columns) + sum(name.count("\n") for name in names)


def fitting(names, width):
    """The columns of a legend that is at most `width` inches wide, by the mean width of a letter, as even as can be."""
    for lines in range(1, len(names) + 1):
        columns = [names[i : i + lines] for i in range(0, len(names), lines)]
        if sum(0.42 + 0.052 * max(map(len, column)) for column in columns) <= width:
            return len(columns)
    return 1


def draw_bar(figure, axes, labels):
    """A colour bar for "layer 0", "layer 1", ...: the numbers beside it, the word along it."""
    n = len(labels)
    ticks = range(0, n, -(-n // 6))
    bar = figure.colorbar(layer_colors(axes[0], n), ax=axes, boundaries=np.arange(n + 1) - 0.5, aspect=30, pad=0.02)
    bar.set_ticks(ticks, labels=[labels[i].rpartition(" ")[2] for i in ticks])
    bar.set_label(labels[0].rpartition(" ")[0])
    bar.ax.minorticks_off()


# --- the paper's figures -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """A figure of the paper: which tasks (panels) and methods (lines), and the function that makes the grid of panels
    of the setups that there are of each task."""

    title: str
    tasks: tuple
    methods: tuple
    grid: Callable


def seeds_and_logs(setup, method):
    """[lines of log.jsonl] of each seed of a method."""
    return [read_log(run) for run in setup.seeds({"method": method}).values()]


@functools.cache
def log_of(file):
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        for line in lines:
            line["update"]
        return lines
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(f"{file}: not a run's log ({type(e).__name__}: {e})") from e


def read_log(run):
    """The lines of a run's log.jsonl, dicts. Raises InputError if it is broken."""
    return log_of(run["folder"] / "log.jsonl")


def line_of(logs, label, value, **look):
    """A Series of what value(line of a log) gives, by update, over the logs of several seeds; None where there is no
    seed that has any."""
    points = {}
    for log in logs:
        for line in log:
            if (y := value(line)) is not None:
                points.setdefault(line["update"], []).append(y)
    return over_seeds(label, points, first_phase=first_phase(logs), **look) if points else None


def over_seeds(label, points, **look):
    """The Series of {x: [y of each seed]}: means, and with several seeds the band from the lowest to the highest."""
    x = sorted(points)
    y = [points[t] for t in x]
    bands = [[min(v) for v in y], [max(v) for v in y]] if max(map(len, y)) > 1 else [None, None]
    return Series(label, x, [statistics.fmean(v) for v in y], *bands, **look)


def first_phase(logs):
    """[(from, to)] of the updates in P1: from line to line of the log, where more than half were (mean over seeds)."""
    shares = {}
    for log in logs:
        before, counted = 0, 0
        for line in log:
            share = (line["updates_in_first_phase"] - counted) / max(line["update"] - before, 1)
            shares.setdefault((before, line["update"]), []).append(share)
            before, counted = line["update"], line["updates_in_first_phase"]
    spans = []
    for (start, end), of_seeds in sorted(shares.items()):
        if sum(of_seeds) * 2 > len(of_seeds):
            joined = spans and spans[-1][1] == start
            spans[-1:] = [(spans[-1][0], end)] if joined else [*spans[-1:], (start, end)]
    return spans


def present(series):
    return [s for s in series if s is not None]


def curve_grid(figure, setups):
    """Loss above, gap below: Figures 1, 2, 4 and 5."""

    def row(y_label, key):
        return [
            Panel(name, y_label, present(
                line_of(seeds_and_logs(setup, method), method, lambda line: line.get(key), color=color,
                        dash=color % len(DASHES))
                for color, method in enumerate(figure.methods)
            ) if setup else [])
            for name, setup in setups
        ]  # fmt: skip

    upper, lower = row("training loss", "loss"), row("gap (points)", "gap")
    for panel in lower if len(figure.methods) > 1 else []:
        for s in panel.series:
            s.first_phase = ()  # the strips stand in the panel above
    return [upper, lower]


def language_grid(figure, setups):
    """Loss, gap, and below them the score of each language: Figure 7."""

    def lines(setup):
        languages = sorted({x for r in setup.runs for line in read_log(r) for x in line.get("scores") or ()})
        return present(
            line_of(seeds_and_logs(setup, method), f"{language}, {method}",
                    lambda line, language=language: (line.get("scores") or {}).get(language),
                    color=color % len(PALETTE), dash=dash)
            for dash, method in enumerate(figure.methods)
            for color, language in enumerate(languages)
        )  # fmt: skip

    scores = [Panel(name, "dev score (%)", lines(setup) if setup else []) for name, setup in setups]
    for panel in scores:
        for s in panel.series:
            s.first_phase = ()  # the loss's panel shows it
    return [*curve_grid(figure, setups), scores]


def layer_grid(figure, setups):
    """The score with each one layer frozen or started anew, and without: Figure 3."""
    panels = []
    for name, setup in setups:
        panel = Panel(name, f"{name} score, mean (%)", [], x_label="layer")
        for color, (kind, label) in enumerate((("freeze", "frozen"), ("reinit", "started anew"))):
            methods = {i: {"method": f"{kind}-layer-{i}"} for i in range(24)}
            found = {i: list(setup.values(method, "mean").values()) for i, method in methods.items()} if setup else {}
            points = {i: values for i, values in found.items() if values}
            if points:
                panel.series.append(over_seeds(label, points, color=color))
        if panel.series and (base := list(setup.values({"method": "df"}, "mean").values())):
            panel.baseline, panel.baseline_label = statistics.fmean(base), "df"
        panels.append(panel)
    return [panels]


def similarity_grid(figure, setups):
    """Linear CKA of each layer with the pre-trained model: Figure 6."""
    panels = []
    for name, setup in setups:
        logs = seeds_and_logs(setup, figure.methods[0]) if setup else []
        depth = max((len(line["cka"]) for log in logs for line in log if "cka" in line), default=0)
        value = [lambda line, i=i: line["cka"][i] if "cka" in line else None for i in range(depth)]
        lines = [line_of(logs, f"layer {i}", value[i]) for i in range(depth)]
        for s in lines:
            s.low = s.high = None  # twelve bands would hide each other
        panels.append(Panel(name, "linear CKA", lines, ordered=True))
    return [panels]


SWEEP = ("freeze-layer-{}", "reinit-layer-{}")  # a method for each layer of the model
THREE = ("xnli", "mlqa", "ner")
FIGURES = {
    "figure1": Figure("The gap on XNLI, and the loss", ("xnli",), ("df", "fs", "ff", "slowfast"), curve_grid),
    "figure2": Figure("Loss and gap while a model is fine-tuned directly", THREE, ("df",), curve_grid),
    "figure3": Figure("One layer frozen or started anew", THREE, ("df", *SWEEP), layer_grid),
    "figure4": Figure("Only the last layers trained", THREE, ("df", "last-1", "last-2", "last-3"), curve_grid),
    "figure5": Figure("The gap on MLQA and NER", ("mlqa", "ner"), ("df", "slowfast"), curve_grid),
    "figure6": Figure("Similarity of each layer with the pre-trained model under df", THREE,
                      ("df",), similarity_grid),
    "figure7": Figure("QAM: each language's score, and the gap", ("qam",), ("df", "slowfast"), language_grid),
}  # fmt: skip


def grid_of(name, setups):
    """The panels of a figure with these runs: a column a setup, or a task that has none."""
    figure = FIGURES[name]
    columns = []
    for task in figure.tasks:
        there = [(setup.name, setup) for setup in setups if setup.task == task]
        columns += there or [(TASK_NAMES[task], None)]
    return figure.grid(figure, columns)


def has_series(grid):
    return any(panel.series for row in grid for panel in row)


def caption_of(name, setups):
    """What a figure is of, and what its lines are of several seeds."""
    figure = FIGURES[name]
    setups = [setup for setup in setups if setup.task in figure.tasks]
    seeds = sorted({len(setup.seeds({"method": figure.methods[0]})) for setup in setups} - {0})
    n = " or ".join(map(str, seeds)) or "no"
    means = ", the lines are means" if seeds and seeds[-1] > 1 else ""
    if means and figure.grid is not similarity_grid:
        means += " and the bands go from the lowest to the highest"
    return f"{figure.title}; {n} seed{'' if n == '1' else 's'}{means}."


# --- one command each: the runs that tables and figures need -------------------------------------------------

TARGETS = (*TITLES, *FIGURES)


def settings_of_target(target, depth=12):
    """[(task, settings)] of the runs that a table or a figure shows, and of df, which it is compared with; a model has
    `depth` layers."""
    found = []
    if target in FIGURES:
        methods = [m.format(i) for m in FIGURES[target].methods for i in range(depth if "{}" in m else 1)]
        found = [(task, {"method": method}) for task in FIGURES[target].tasks for method in methods]
    else:
        for row, cells in {"df": dict.fromkeys(columns(target)), **PAPER[target]}.items():
            for task, settings, _ in (column(target, name) for name in cells):
                found.append((task, {"method": "slowfast"} | settings_of_row(row) | settings))
    return found


def planned(args):
    """The runs that args.targets need, in the order to run them in, as the parsed options of slowfast.py: all with the
    first seed before any with the next."""
    import slowfast
    from model import read_config

    depth = read_config(Path(args.model, "config.json")).num_hidden_layers
    try:
        more = shlex.split(args.args)
    except ValueError as e:
        raise InputError(f"--args {args.args}: {e}") from e
    wanted = [pair for target in args.targets for pair in settings_of_target(target, depth)]
    runs = {}
    for seed in args.seeds:
        for task, settings in wanted:
            if task in args.tasks:
                options = [task, "--setup", args.setup, "--model", args.model, "--data", args.data, "--runs", args.runs]
                options += ["--seed", str(seed), *(f"--{k}={v}" for k, v in settings.items()), *more]
                options += [] if args.keep else ["--discard"]
                run = slowfast.parse(options)
                undone = [k for k, v in {**settings, "seed": seed, "out": None}.items() if getattr(run, k) != v]
                if undone:
                    raise InputError(f"--args {args.args}: --{undone[0]} is what the tables and figures themselves set")
                runs.setdefault(slowfast.directory_of(run), run)
    return runs


def is_there(folder):
    return (folder / "result.json").is_file()


def plan(args):
    """Prints how many runs the targets need, how many are there, and how long the others will take on this machine."""
    import slowfast

    runs = planned(args)
    rows, total = [["task", "runs", "there", "lacking", "a run takes", "in all", "measured on"]], 0.0
    for task in (task for task in TASK_NAMES if any(run.task == task for run in runs.values())):
        of_task = {folder: run for folder, run in runs.items() if run.task == task}
        lacking = {folder: run for folder, run in of_task.items() if not is_there(folder)}
        seconds, source = 0.0, "-"
        if lacking:
            seconds, source = seconds_of_a_run(task, of_task, next(iter(lacking.values())))
        total += seconds * len(lacking)
        each, of_all = (slowfast.duration(t) if lacking else "-" for t in (seconds, seconds * len(lacking)))
        there = len(of_task) - len(lacking)
        rows.append([TASK_NAMES[task], str(len(of_task)), str(there), str(len(lacking)), each, of_all, source])
    print(render(rows), f"\n{' '.join(args.targets)}: {slowfast.duration(total)} with one process; several of the same "
          "command, on cores or GPUs of their own, share the runs.", sep="\n")  # fmt: skip


def seconds_of_a_run(task, of_task, run):
    """(seconds that one of these runs takes on this machine, what that was measured on): finished ones of the
    same device, or else a few updates and predictions."""
    import slowfast

    device = slowfast.name_of_device(slowfast.choose_device(run.device))
    there = [folder for folder in of_task if is_there(folder)]
    done = [r["seconds"] for r in (read_runs(there) if there else []) if r["device"] == device]
    if done:
        return statistics.median(done), f"{len(done)} finished"
    print(f"measuring {TASK_NAMES[task]} ...", file=sys.stderr)
    return slowfast.estimate(run), "a few updates"


def make(args):
    """Runs what the targets lack, then prints the tables and draws the figures. Returns the exit status."""
    import slowfast

    runs, failed, elsewhere = planned(args), [], 0
    lacking = [folder for folder in runs if not is_there(folder)]
    for n, folder in enumerate(lacking, 1):
        if is_there(folder):  # another process has made it meanwhile
            continue
        if slowfast.is_taken(folder):
            elsewhere += 1
            continue
        print(f"run {n} of {len(lacking)}: {folder}", file=sys.stderr)
        try:
            slowfast.start(runs[folder])
        except InputError:
            if not is_there(folder):  # else another process has made it while this one was still reading its data
                if not slowfast.is_taken(folder):
                    raise
                elsewhere += 1  # or has taken it
        except FloatingPointError as e:  # it says something of its settings, not of the others
            print(f"eval.py: {folder}: {e}", file=sys.stderr)
            failed.append(folder)
    made = [folder for folder in runs if is_there(folder)]
    show(args.targets, read_runs(made) if made else [], Path(args.out))
    if elsewhere:
        print(f"eval.py: another process is at {elsewhere} of these runs; the same command shows them when it is done",
              file=sys.stderr)  # fmt: skip
    if failed:
        print(f"eval.py: {len(failed)} runs diverged and are not shown: {', '.join(map(str, failed))}", file=sys.stderr)
    return 2 if failed else 0


LEGEND = (
    "Percent, means over the languages; ± is the standard deviation over seeds, (n) their number where it is not 4. "
    "Below a row: its difference from df with the 95 % interval, paired over seeds, or over test examples where there "
    "is one seed; and the paper's numbers (XLM-R base, 4 seeds)."
)


def show(targets, runs, out):
    """Prints tables, and draws figures into the folder `out`, both of these runs."""
    setups = setups_of(runs)
    for target in targets:
        if target in FIGURES:
            files = draw(grid_of(target, setups), out / target, caption_of(target, setups))
            print(f"{titled(target)}: {', '.join(map(str, files))}\n")
        else:
            rows, claims = paper_table(target, setups)
            print(f"{titled(target)}\n\n{render(rows)}\n")
            print(*(f"- {claim}" for claim in claims), "", sep="\n")
    if any(target in TITLES for target in targets):
        print(textwrap.fill(LEGEND, 120), "", sep="\n")
    for setup in setups:
        print(described(setup))


def titled(target):
    """ "Table 6. Starting parts of ..." """
    kind, number = target[:-1].capitalize(), target[-1]
    return f"{kind} {number}. {TITLES[target] if target in TITLES else FIGURES[target].title}"


def described(setup):
    """One line that says what a setup's runs are."""
    s, run = setup.runs[0]["settings"], setup.runs[0]
    updates = sorted({r["updates"] for r in setup.runs})
    said = [
        Path(s["model"]).name, f"trained on {s.get('source', SOURCE)} of the folder {Path(s['data']).name!r}",
        f"{' or '.join(f'{u:,}' for u in updates)} updates of {s['batch_size']}",
        f"lr {s['lr']:g}", str(s["precision"]),
        f"P1 by {s['phase']}", f"policy IV {s['policy4']}", f"best model by {s['select']}",
        f"scores of {setup.split}, {len(run[setup.split]['scores'])} languages",
    ]  # fmt: skip
    return f"{setup.name}: {', '.join(said)}"


# --- the report ----------------------------------------------------------------------------------------------


def report_page(runs, out):
    """Writes figures into the folder `out` and returns the lines of a Markdown page with all that these runs say."""
    setups = setups_of(runs)
    lines = [
        "A multilingual encoder is fine-tuned on one language, the source, and measured in others. The **gap** is the",
        "score in the source minus the mean of the others. `df` is plain fine-tuning, `slowfast` the paper's method.",
        "", *methods_of(runs), "### What was run", "", *(f"- {described(setup)}" for setup in setups), "",
        render(list_of_runs(setups), markdown=True), "",
        "In P1 counts the updates of the first phase, as detected. Devices: "
        + "; ".join(sorted({run["device"] for run in runs})) + ".", "",
    ]  # fmt: skip
    for table in TITLES:
        of_table = [setup for setup in setups if compares(table, setup)]
        if of_table:
            rows, claims = paper_table(table, of_table, whole=False)
            lines += [f"### {titled(table)}", "", render(upright(rows), markdown=True), ""]
            if claims:
                lines += ["What the paper concludes, and what these runs say of it:", ""]
                lines += [*(f"- {claim}" for claim in claims), ""]
    lines += [LEGEND, ""] if any(line.startswith("### Table") for line in lines) else []
    for name, figure in FIGURES.items():
        drawn = [setup for setup in setups if compares(name, setup) and has_series(grid_of(name, [setup]))]
        if drawn:
            columns_with_lines = [column for column in zip(*grid_of(name, drawn)) if has_series([column])]
            files = draw([list(row) for row in zip(*columns_with_lines)], out / name, caption_of(name, drawn))
            lines += [f"### {titled(name)}", "", f"![{figure.title}]({files[1].name})", "",
                      f"([vector]({files[0].name}), [numbers]({files[2].name}))", ""]  # fmt: skip
    for setup in setups:
        for measure in (None, "exact_match"):
            tables = titled_tables(setup.runs, all_splits(setup.runs), measure, by_language=True, paper=False)
            for title, rows in tables:
                lines += [f"<details><summary>{setup.name} by language: {title}</summary>", ""]
                lines += [render(rows, markdown=True), "", "</details>", ""]
    return lines


def upright(rows, widest=9):
    """A table for a page: indented in Markdown; or, if it is too wide, with its columns as rows, and then what stands
    below a row names it."""
    if len(rows[0]) <= widest:
        return [[name.replace("  ", "&emsp;"), *cells] for name, *cells in rows]
    named, above = [rows[0]], ""
    for name, *cells in rows[1:]:
        above = above if name.startswith(" ") else name
        named.append([f"{above}: {name.strip()}" if name.startswith(" ") else name, *cells])
    return transposed(named)


def compares(target, setup):
    """Whether a setup has what a table or figure compares: two different rows or lines, or the one line of a figure."""
    wanted = {json.dumps(VARIED | settings) for task, settings in settings_of_target(target, 24) if task == setup.task}
    if target in PAPER and "df" not in PAPER[target]:
        wanted = {text for text in wanted if json.loads(text)["method"] != "df"}
    have = {json.dumps({k: run["settings"][k] for k in VARIED}) for run in setup.runs}
    alone = target in FIGURES and len(FIGURES[target].methods) == 1
    return len(wanted & have) >= (1 if alone else 2)


def methods_of(runs):
    from slowfast import METHODS

    names = sorted({run["method"] for run in runs} - {"df", "slowfast"}, key=list(METHODS).index)
    return [*(f"- `{name}`: {METHODS[name].about}" for name in names), *([""] if names else [])]


def list_of_runs(setups):
    """The header and a row for each method (and its constants) of each setup."""
    rows = [["runs", "method", "seeds", "updates", "in P1", "minutes"]]
    for setup in setups:
        for label, members in group_runs(setup.runs):
            rows.append([
                setup.name, label, str(len(members)), f"{members[0]['updates']:,}",
                cell([run["updates_in_first_phase"] for run in members]).replace(".0", ""),
                f"{statistics.fmean(run['seconds'] for run in members) / 60:.0f}",
            ])  # fmt: skip
    return rows


def write_report(folders, out):
    """Writes report.md and its figures into the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    page = out / "report.md"
    page.write_text("\n".join(["# Fine-tuning slow and fast: what was run and what came out", "", *report_page(
        read_runs(folders), out)]).rstrip() + "\n", encoding="utf-8")  # fmt: skip
    print(page)


MARKS = "<!-- results: written by `make results` -->", "<!-- end of results -->"


def write_readme(folders, out, readme):
    """Puts the report between two marks in the README, with the figures' paths seen from there."""
    text = readme.read_text(encoding="utf-8")
    before, mark, rest = text.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not mark or not end:
        raise InputError(f"{readme}: the lines {MARKS[0]!r} and {MARKS[1]!r} are not there")
    page = "\n".join(report_page(read_runs(folders), out)).strip()
    seen = Path(os.path.relpath(out, readme.parent)).as_posix()
    page = re.sub(r"\]\((figure\d\.\w+)\)", lambda m: f"]({seen}/{m[1]})", page)
    readme.write_text(f"{before}{mark}\n\n{page}\n\n{end}{after}", encoding="utf-8")
    print(readme)


# --- the command line ----------------------------------------------------------------------------------------


def print_tables(args):
    """`table` and `curves`: the scores, or the curves, of finished runs."""
    runs = read_runs(args.runs)
    tasks = sorted({run["settings"]["task"] for run in runs})
    found = []
    for task in tasks:
        headed = f"{task}: " if len(tasks) > 1 else ""
        part = [run for run in runs if run["settings"]["task"] == task]
        splits = [args.split] if args.split else all_splits(part)
        tables = [("curves" if headed else "", curves(part))] if args.command == "curves" else titled_tables(
            part, splits, args.measure, args.by_language, not args.no_paper
        )  # fmt: skip
        found += [(f"{headed}{title}", rows) for title, rows in tables]
    if not found:
        has = ", ".join(sorted({name for run in runs for name in splits_of(run)}))
        raise InputError(f"these runs have no such scores; they have {has}")
    for title, rows in found:
        print(f"{title}\n\n" if title else "", render(rows, args.markdown), "\n", sep="")


def parse(argv=None):
    from slowfast import OneLineParser

    parser = OneLineParser(prog="eval.py", description="Tables and figures of runs, and of the paper.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, about in (("table", "final scores of finished runs"), ("curves", "loss, phase and gap by update")):
        options_of_tables(commands.add_parser(name, help=about).add_argument)
    for name, about in (
        ("make", "run what tables and figures of the paper lack, then show them"),
        ("plan", "how many runs they need, how many are there, and how long the others take on this machine"),
    ):
        options_of_targets(commands.add_parser(name, help=about).add_argument)
    options_of_report(commands.add_parser("report", help="one page with all that was run").add_argument)
    args = parser.parse_args(argv)
    if args.command in ("make", "plan"):
        whole = {"tables": [*TITLES], "figures": [*FIGURES]}
        args.targets = list(dict.fromkeys(t for name in args.targets for t in whole.get(name, [name])))
    return args


def options_of_tables(add):
    add("runs", nargs="+", help="folders of runs, searched for result.json")
    add("--markdown", action="store_true", help="a Markdown table (default: for a terminal)")
    add("--split", help="which sets: dev, test, xquad ... (default: all that the runs have)")
    add("--measure", help="exact_match, precision or recall (default: the task's own measure)")
    add("--by-language", action="store_true", help="languages as rows, methods as columns")
    add("--no-paper", action="store_true", help="without the paper's rows, for other data than its own")


def options_of_targets(add):
    add("targets", nargs="+", metavar="TARGET", choices=(*TARGETS, "tables", "figures"),
        help=f"{', '.join(TARGETS)}; tables; figures")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3, 4], metavar="N", help="(default: 1 2 3 4)")
    add("--tasks", nargs="+", choices=TASK_NAMES, default=list(TASK_NAMES), help="these alone (default: all)")
    add("--setup", default="paper", help="hyper-parameters: paper, small, demo (default: paper)")
    add("--model", required=True, metavar="DIR", help="as of slowfast.py")
    add("--data", default="data", metavar="DIR", help="as of slowfast.py")
    add("--runs", default="runs", metavar="DIR", help="where runs lie (default: runs)")
    add("--keep", action="store_true", help="keep each run's weights (XLM-R base: 1.1 GB a run)")
    add("--args", default="", metavar="TEXT", help='further options of slowfast.py, such as "--max-updates 1500"')
    add("--out", default="report", metavar="DIR", help="where figures go (default: report)")


def options_of_report(add):
    add("runs", nargs="+", help="folders of runs, searched for result.json")
    add("--out", default="report", metavar="DIR", help="where report.md and its figures go (default: report)")
    add("--readme", metavar="FILE", help="put the page into this file, between its two marks, instead")


def main(argv=None):
    """The command line; returns the exit status: 0, 2 for bad input or a full disk, 130 for Ctrl-C."""
    args = parse(argv)
    try:
        if args.command == "make":
            return make(args)
        if args.command == "plan":
            plan(args)
        elif args.command == "report":
            out = Path(args.out)
            write_readme(args.runs, out, Path(args.readme)) if args.readme else write_report(args.runs, out)
        else:
            print_tables(args)
    except InputError as e:
        print(f"eval.py: {e}", file=sys.stderr)
        return 2
    except OSError as e:
        print(f"eval.py: {e}; finished runs stay, and the same command goes on with the others", file=sys.stderr)
        return 2
    except ModuleNotFoundError as e:
        print(f"eval.py: {e}; figures need it: pip install -r requirements-figures.txt", file=sys.stderr)
        return 2
    except FloatingPointError as e:
        print(f"eval.py: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\neval.py: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    from eval import main  # under its own name, so that there is one InputError and one cache of draws

    sys.exit(main())
