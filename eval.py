"""Measuring: predictions, the score of each task by its own rules, the performance gap, linear CKA, and tables of runs.

    measured = evaluate(model, task.dev, MEASURES["mlqa"], device="cuda")   # {"f1": {language: percent}, ...}
    report(measured)                                        # scores, mean, source, non-source, gap

    python eval.py table runs/xnli                          # methods as rows, languages as columns
    python eval.py curves runs/xnli                         # loss, phase and gap against updates
"""

import argparse
import collections
import json
import re
import statistics
import string
import sys
import unicodedata
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


def accuracy(logits, examples, language=None):
    """{"accuracy": percent of the windows whose highest logit is their label's}."""
    return {"accuracy": 100.0 * float(np.mean(logits.argmax(1) == examples.labels))}


def entity_scores(logits, examples, language=None):
    """{"f1", "precision", "recall"} of entities, in percent, over all sentences (micro-averaged)."""
    tokens = examples.labels != IGNORED
    starts = np.zeros(len(examples.ids) + 1, bool)
    starts[examples.offsets[examples.first[:-1]]] = True  # where sentences begin; their first token comes later
    sentence = np.cumsum(starts[:-1])[tokens]
    return entity_f1(examples.labels[tokens], logits[tokens].argmax(1), sentence)


def entity_f1(gold, predicted, sentence, labels=NER_LABELS):
    """Entity-level micro F1, precision and recall in percent, as conlleval and seqeval's default read tags.

    gold, predicted (tokens,) ids of tags in `labels`; sentence (tokens,) the number of each token's sentence. An entity
    is right if type, first and last token are. Without any entity, or any right one, the score is 0.
    """
    gold, predicted = (entities(tags, sentence, labels) for tags in (gold, predicted))
    right = len(gold & predicted)
    return {
        "f1": 100.0 * 2 * right / max(len(gold) + len(predicted), 1),
        "precision": 100.0 * right / max(len(predicted), 1),
        "recall": 100.0 * right / max(len(gold), 1),
    }


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


def answer_scores(logits, examples, language):
    """{"f1", "exact_match"} of the best answers by MLQA's rules, in percent, means over the questions.

    language: the context's, which the answer is in; of "en-de" (an English context and a German question) "en"."""
    language = language.partition("-")[0]
    pairs = [(text, gold) for text, (_, gold) in zip(best_answers(logits, examples), examples.texts)]
    return {
        "f1": 100.0 * statistics.fmean(answer_f1(text, gold, language) for text, gold in pairs),
        "exact_match": 100.0 * statistics.fmean(exact_match(text, gold, language) for text, gold in pairs),
    }


MEASURES = {"xnli": accuracy, "qam": accuracy, "ner": entity_scores, "mlqa": answer_scores}


def evaluate(model, sets, measure, device="cpu", precision="fp32", tokens=4096):
    """{name of a measure: {language: percent}} of the model on {language: Examples}; `measure` is one of MEASURES."""
    measured = {}
    for language, examples in sets.items():
        scores = measure(predict(model, examples, device, precision, tokens), examples, language)
        for name, score in scores.items():
            measured.setdefault(name, {})[language] = score
    return measured


def report(measured, source=SOURCE):
    """What a result says of one set of languages: "scores", {language: percent} by the task's own measure, which is
    named in "measure"; the summary of them; and the other measures under their names."""
    own, *others = measured
    more = {name: measured[name] for name in others}
    return {"measure": own, "scores": measured[own], **more, **summary(measured[own], source)}


def summary(scores, source=SOURCE):
    """The paper's numbers of a {language: score}: "mean" over all languages, the source included; "source";
    "non_source", the mean over the others; "gap" = source - non_source (Section 1). Without others there is no gap.
    Of pairs "en-de", contexts and questions of question answering, the source is "en-en"."""
    source = source if source in scores else f"{source}-{source}"
    others = [score for language, score in scores.items() if language != source]
    non_source = statistics.fmean(others) if others else None
    return {
        "mean": statistics.fmean(scores.values()),
        "source": scores[source],
        "non_source": non_source,
        "gap": scores[source] - non_source if others else None,
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

# XNLI in the paper: Table 7, accuracy per language (mean ± standard deviation over 4 seeds), with Table 2's average.
PAPER_XNLI = """
languages     ar   bg   de   el   en   es   fr   hi   ru   sw   th   tr   ur   vi   zh  mean
df          72.2 78.0 77.3 76.0 84.8 79.5 78.7 70.7 76.1 65.1 72.7 73.1 66.5 75.1 74.5  74.7
±            0.3  0.3  0.2  0.1  0.3  0.2  0.3  0.2  0.5  0.4  0.2  0.1  0.5  0.1  0.4   0.2
noisytune   72.2 78.0 77.3 75.6 84.8 79.5 78.7 70.7 76.1 65.1 72.7 73.1 66.5 75.1 74.5  74.9
±            0.3  0.3  0.2  0.1  0.3  0.2  0.3  0.2  0.5  0.4  0.2  0.1  0.5  0.1  0.4   0.2
fs          73.0 78.4 77.6 76.6 85.2 80.0 79.3 71.1 76.8 65.4 72.9 74.0 66.5 75.7 75.0  75.2
±            0.2  0.5  0.2  0.3  0.2  0.1  0.1  0.1  0.4  0.5  0.1  0.3  0.3  0.1  0.3   0.3
ff          72.6 78.0 77.4 76.1 85.0 79.1 78.5 70.7 76.1 65.4 73.6 73.8 67.2 75.4 74.9  75.0
±            0.4  0.2  0.1  0.2  0.0  0.4  0.4  0.2  0.4  0.4  0.1  0.4  0.6  0.3  0.1   0.2
slowfast    73.6 79.0 78.1 76.6 85.6 80.2 79.5 71.5 77.1 65.9 73.3 74.2 67.1 76.2 75.9  75.6
±            0.2  0.2  0.3  0.2  0.2  0.5  0.1  0.2  0.3  0.3  0.1  0.3  0.1  0.1  0.2   0.1
"""


# The other averages of Table 2, M = 0, 5, 10 and 20 shots; and Table 3, QAM
PAPER_MEANS = """
xnli  df         74.7±0.2 75.1±0.2 75.4±0.3 75.5±0.3
xnli  noisytune  74.9±0.2 75.1±0.1 75.5±0.2 75.6±0.1
xnli  fs         75.2±0.3 75.5±0.2 75.5±0.3 76.0±0.1
xnli  ff         75.0±0.2 75.4±0.2 75.6±0.4 75.9±0.2
xnli  slowfast   75.6±0.1 75.7±0.3 76.1±0.2 76.5±0.2
ner   df         61.3±0.2 68.1±0.1 70.6±0.1 72.5±0.1
ner   noisytune  61.3±0.1 67.8±0.3 70.7±0.2 72.7±0.2
ner   fs         62.3±0.2 68.5±0.2 71.2±0.3 72.7±0.2
ner   ff         62.1±0.2 68.3±0.3 70.7±0.1 72.5±0.2
ner   slowfast   62.5±0.1 69.1±0.2 71.7±0.1 72.9±0.1
mlqa  df         64.7±0.2 64.8±0.3 64.8±0.2 64.9±0.2
mlqa  noisytune  64.8±0.2 64.8±0.2 64.9±0.3 65.0±0.2
mlqa  fs         66.1±0.5 66.3±0.3 66.4±0.5 66.8±0.2
mlqa  ff         66.4±0.2 66.5±0.3 66.5±0.2 66.7±0.3
mlqa  slowfast   66.6±0.2 66.8±0.3 66.8±0.2 67.0±0.3
"""
PAPER_QAM = """
languages    de   en   fr  mean
df          70.0 70.2 69.1 69.7
±            0.1  0.2  0.5  0.2
slowfast    70.7 70.5 70.4 70.5
±            0.2  0.2  0.1  0.2
"""
# The languages that the paper's averages are over: beside a table of others they would mislead.
PAPER_LANGUAGES = {
    "xnli": PAPER_XNLI.split("mean")[0].split()[1:], "ner": NER_LANGUAGES, "mlqa": list(MLQA_LANGUAGES),
    "qam": ["de", "en", "fr"],
}  # fmt: skip


def paper_row(task, method, shots=0):
    """{language or "mean": (mean, standard deviation)} of the paper for a method, as far as it goes; {} for no row."""
    by_language = {"xnli": PAPER_XNLI, "qam": PAPER_QAM}.get(task) if shots == 0 else None
    if by_language:
        header, *lines = (line.split() for line in by_language.strip().splitlines())
        for means, deviations in zip(lines[::2], lines[1::2]):
            if means[0] == method:
                return dict(zip(header[1:], zip(map(float, means[1:]), map(float, deviations[1:]))))
    for line in PAPER_MEANS.strip().splitlines():
        row, shot = line.split(), {0: 2, 5: 3, 10: 4, 20: 5}.get(shots)
        if row[:2] == [task, method] and shot:
            return {"mean": tuple(map(float, row[shot].split("±")))}
    return {}


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
        file = run["folder"] / "log.jsonl"
        try:
            lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            columns.append({line["update"]: line for line in lines})
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise InputError(f"{file}: not a run's log ({type(e).__name__}: {e})") from e
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


def main(argv=None):
    parser = argparse.ArgumentParser(description="Tables of finished runs.")
    parser.add_argument("command", choices=["table", "curves"], help="final scores, or loss, phase and gap by update")
    parser.add_argument("runs", nargs="+", help="folders of runs, searched for result.json")
    parser.add_argument("--markdown", action="store_true", help="a Markdown table (default: for a terminal)")
    parser.add_argument("--split", help="which sets: dev, test, xquad ... (default: all that the runs have)")
    parser.add_argument("--measure", help="exact_match, precision or recall (default: the task's own measure)")
    parser.add_argument("--by-language", action="store_true", help="languages as rows, methods as columns")
    parser.add_argument("--no-paper", action="store_true", help="without the paper's rows, for other data than its own")
    args = parser.parse_args(argv)
    try:
        runs = read_runs(args.runs)
        tasks = sorted({run["settings"]["task"] for run in runs})
        found = []
        for task in tasks:
            headed = f"{task}: " if len(tasks) > 1 else ""
            part = [run for run in runs if run["settings"]["task"] == task]
            there = dict.fromkeys(name for run in part for name in splits_of(run))
            splits = [args.split] if args.split else sorted(there, key=lambda name: (name != "test", name))
            tables = [("curves" if headed else "", curves(part))] if args.command == "curves" else titled_tables(
                part, splits, args.measure, args.by_language, not args.no_paper
            )  # fmt: skip
            found += [(f"{headed}{title}", rows) for title, rows in tables]
    except InputError as e:
        print(f"eval.py: {e}", file=sys.stderr)
        return 2
    if not found:
        has = ", ".join(sorted({name for run in runs for name in splits_of(run)}))
        print(f"eval.py: these runs have no such scores; they have {has}", file=sys.stderr)
        return 2
    for title, rows in found:
        print(f"{title}\n\n" if title else "", render(rows, args.markdown), "\n", sep="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
