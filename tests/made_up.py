"""Finished runs that nobody made: what read_runs would return of them."""

import json
from pathlib import Path

import numpy as np

from paper.results import setups_of

DF, SLOWFAST = {"method": "df"}, {"method": "slowfast"}
PAPERS = {"method": "slowfast", "shots": 0, "c1": 0.01, "c2": 10.0, "r": 3.0}  # what a row does not name


def run_of(scores, method="df", seed=1, task="xnli", split="test", folder="none", **settings):
    """scores {language: percent}; or {split: such scores} with split=None. Settings that are not given are the
    paper's."""
    s = {
        "task": task,
        **PAPERS,
        "method": method,
        "seed": seed,
        "lr": 5e-6,
        "batch_size": 32,
        "model": "m",
        "data": "d",
    }
    s |= {"source": "en", "epochs": 10, "max_updates": None, **settings}
    splits = {"dev": {"en": 1.0, "de": 1.0}} | ({split: scores} if split else scores)
    run = {"method": method, "seed": seed, "shots": s["shots"], "settings": s, "updates": 240, "device": "a device"}
    run |= {"updates_in_first_phase": 47, "seconds": 90.0, "folder": Path(folder)}
    return run | {name: {"measure": "accuracy", "scores": of_split} for name, of_split in splits.items()}


def seeds_of(mean, method, changes=(0, 0), gap=10.0, **settings):
    """Two runs of a method, means of 0.5 apart, and what is added to each."""
    means = [mean + 0.5 * seed + change for seed, change in enumerate(changes)]
    return [run_of({"en": m + gap / 2, "de": m - gap / 2}, method, seed, **settings) for seed, m in enumerate(means)]


def setup_of(*runs):
    """The one Setup that these runs are."""
    (setup,) = setups_of(list(runs))
    return setup


def write(folder, *runs):
    """Writes result.json, settings.json and a log of two lines for each run, in a folder of its own; a text is a broken
    result.json. Returns the folder."""
    for n, run in enumerate(runs):
        of_run = folder / f"run{n}"
        of_run.mkdir(parents=True)
        if isinstance(run, str):
            (of_run / "result.json").write_text(run)
            continue
        (of_run / "result.json").write_text(json.dumps(run | {"folder": None}))
        (of_run / "settings.json").write_text(json.dumps(run["settings"]))
        log(of_run, (run["updates"] // 2, 1.1, 1, 3.0), (run["updates"], 0.9, 2, 5.0))
    return folder


def log(folder, *lines):
    """Writes a log.jsonl: (update, loss, phase, gap or None where it was not measured)."""
    entries = [
        {"update": t, "loss": loss, "phase": phase, "updates_in_first_phase": t if phase == 1 else 0, "cka": [0.9, 0.8]}
        | ({} if gap is None else {"gap": gap})
        for t, loss, phase, gap in lines
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def counted(folder, counts, method="df", **settings):
    """A run that kept what each example counts, {language: (examples, k)}."""
    folder = folder / f"{method}-{len(list(folder.iterdir()))}"
    (folder / "examples").mkdir(parents=True)
    np.savez(folder / "examples" / "test.npz", **counts)
    task = settings.get("task", "xnli")
    return run_of({x: score_of(task, c) for x, c in counts.items()}, method, folder=folder, **settings)


def score_of(task, counts):
    """By hand, of what examples count."""
    if task == "ner":
        right, predicted, gold = counts.sum(0)
        return 200 * right / (predicted + gold)
    return 100 * counts[:, 0].mean()


def by_hand(scores, quantity):
    """A quantity of {language: score}, written down apart from eval.summary."""
    others = np.mean([score for language, score in scores.items() if language != "en"])
    known = {"mean": np.mean([*scores.values()]), "source": scores["en"], "non_source": others}
    known["gap"] = scores["en"] - others
    return known[quantity] if quantity in known else scores.get(quantity)
