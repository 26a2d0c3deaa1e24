"""Measuring: predictions, accuracy per language, the performance gap, linear CKA, and the table of a set of runs.

    scores = evaluate(model, task.dev, device="cuda")       # {language: accuracy in percent}
    summary(scores)                                         # mean, source, non-source, gap

    python eval.py table runs/xnli                          # methods as rows, languages as columns
    python eval.py curves runs/xnli                         # loss, phase and gap against updates
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import numpy as np
import torch

from data import SOURCE, InputError, collate, length_sorted_batches

# --- predictions and scores ----------------------------------------------------------------------------------


def autocast(device, precision):
    """The context in which the model computes: "bf16" runs matrix products in bfloat16, "fp32" everything in float32.
    The weights, Adam's moments and the losses are float32 either way."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")


@torch.no_grad()
def predict(model, examples, device="cpu", precision="fp32", tokens=4096):
    """The class with the highest logit for each of `examples`: (n,) int64.

    Streams batches of at most `tokens` tokens, sorted by length so that next to no padding is computed.
    """
    model.eval()
    predictions = np.empty(len(examples), np.int64)
    with autocast(device, precision):
        for indices in length_sorted_batches(examples.lengths, tokens):
            input_ids, _ = collate(examples, indices)
            logits = model(input_ids.to(device))
            if not logits.isfinite().all():
                raise FloatingPointError("the model's outputs are not finite")
            predictions[indices] = logits.argmax(-1).cpu()
    return predictions


def accuracy(predictions, labels):
    """Percent of predictions that equal the label."""
    return 100.0 * float(np.mean(predictions == labels))


def evaluate(model, sets, device="cpu", precision="fp32", tokens=4096):
    """{language: accuracy in percent} of the model on {language: Examples}."""
    return {
        language: accuracy(predict(model, examples, device, precision, tokens), examples.labels)
        for language, examples in sets.items()
    }


def summary(scores, source=SOURCE):
    """The paper's numbers of a {language: score}: "mean" over all languages, the source included; "source";
    "non_source", the mean over the others; "gap" = source - non_source (Section 1). Without others there is no gap."""
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
    real = input_ids != 1
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


def paper_xnli(method):
    """{language or "mean": (mean, standard deviation)} of the paper's row for a method, or None."""
    header, *lines = (line.split() for line in PAPER_XNLI.strip().splitlines())
    for means, deviations in zip(lines[::2], lines[1::2]):
        if means[0] == method:
            numbers = zip(map(float, means[1:]), map(float, deviations[1:]))
            return dict(zip(header[1:], numbers))
    return None


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
            summary(runs[-1]["dev"]["scores"])
            if runs[-1]["test"]:
                summary(runs[-1]["test"]["scores"])
            for key in ("method", "seed", "shots"):
                runs[-1]["settings"][key]
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise InputError(f"{file}: not a run's result ({type(e).__name__}: {e})") from e
    return runs


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


def table(runs, split="test"):
    """The rows of a table, the first the header: languages and their summary as columns, a row a method, the paper's
    row (where it has one: M = 0 on XNLI) under it. Runs without scores on `split` are left out."""
    runs = [run for run in runs if run.get(split)]
    if not runs:
        return None
    languages = sorted({language for run in runs for language in run[split]["scores"]})
    totals = ("mean", "source", "non_source", "gap")
    rows = [["method", "seeds", *languages, "mean", "source", "others", "gap"]]
    for label, members in group_runs(runs):
        scores = [run[split]["scores"] for run in members]
        summaries = [summary(s) for s in scores]
        by_language = [cell([s[language] for s in scores if language in s]) for language in languages]
        by_total = [cell([s[total] for s in summaries if s[total] is not None]) for total in totals]
        rows.append([label, str(len(members)), *by_language, *by_total])
        paper = paper_xnli(members[0]["settings"]["method"])
        # Its average is over 15 languages: beside a table of others it would mislead.
        if paper and split == "test" and not members[0]["settings"]["shots"] and {*languages, "mean"} == paper.keys():
            printed = [f"{paper[k][0]}±{paper[k][1]}" for k in [*languages, "mean"]]
            s = summary({language: mean for language, (mean, _) in paper.items() if language != "mean"})
            printed += [f"{s[k]:.1f}" for k in ("source", "non_source", "gap")]
            rows.append(["  paper, XLM-R base", "4", *printed])
    return rows


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


def main(argv=None):
    parser = argparse.ArgumentParser(description="Tables of finished runs.")
    parser.add_argument("command", choices=["table", "curves"], help="final scores, or loss, phase and gap by update")
    parser.add_argument("runs", nargs="+", help="folders of runs, searched for result.json")
    parser.add_argument("--markdown", action="store_true", help="a Markdown table (default: for a terminal)")
    parser.add_argument("--split", choices=["dev", "test"], help="which sets (default: both, where a run has them)")
    args = parser.parse_args(argv)
    try:
        runs = read_runs(args.runs)
        tables = {"": curves(runs)} if args.command == "curves" else {
            f"{split} sets, accuracy in %, mean±standard deviation over seeds; gap = source-others": table(runs, split)
            for split in ([args.split] if args.split else ["test", "dev"])
        }  # fmt: skip
    except InputError as e:
        print(f"eval.py: {e}", file=sys.stderr)
        return 2
    if not any(tables.values()):
        print("eval.py: these runs have no scores on the test sets (they were made with --no-test)", file=sys.stderr)
        return 2
    for title, rows in tables.items():
        if rows:
            print(f"{title}\n\n" if title else "", render(rows, args.markdown), "\n", sep="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
