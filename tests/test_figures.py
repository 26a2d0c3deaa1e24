"""Figures: the files that `draw` leaves, their numbers against the logs, and how they look."""

import csv
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import matplotlib.figure
import matplotlib.image
import matplotlib.text
import numpy as np
import pytest
from made_up import run_of

from paper import figures
from paper.figures import FIGURES, caption_of, draw, first_phase, shows
from paper.gains import draw_gains
from paper.results import read_runs, setups_of

ROOT = Path(__file__).resolve().parent.parent
NAMES = {"xnli": "XNLI", "mlqa": "MLQA", "ner": "NER", "qam": "QAM"}
THREE = ("xnli", "mlqa", "ner")
CURVES = {  # what the paper's captions and axes say
    "figure1": (["xnli"], ["df", "fs", "ff", "slowfast"]),
    "figure2": (THREE, ["df"]),
    "figure4": (THREE, ["df", "last-1", "last-2", "last-3"]),
    "figure5": (["mlqa", "ner"], ["df", "slowfast"]),
    "figure7": (["qam"], ["df", "slowfast"]),
}
LAYERS = {"freeze-layer-0": "frozen", "freeze-layer-3": "frozen", "reinit-layer-2": "started anew", "df": "df"}
METHODS = dict.fromkeys([*CURVES["figure1"][1], *CURVES["figure4"][1], *LAYERS])


def write_run(folder, task, method, seed, updates=20, **settings):
    """Leaves a run whose updates 0 to 200 are in P1, with slowfast 600 to 700 too. Returns what it wrote."""
    random = np.random.default_rng([seed, sum(map(ord, task + method))])
    log, phase = [], 0
    for t in range(100, 100 * updates + 1, 100):
        phase += 100 if t <= 200 or (method == "slowfast" and t == 700) else 0
        log.append({"update": t, "updates_in_first_phase": phase, "loss": random.random() + 1})
        if t % 200 == 0:
            scores = dict(zip(("de", "en", "fr"), 50 + 20 * random.random(3)))
            log[-1] |= {"gap": 10 * random.random(), "cka": random.random(4).tolist(), "scores": scores}
    run = {"seed": seed, "updates": 100 * updates, "updates_in_first_phase": phase, "seconds": 1.0, "device": "none"}
    run["dev"] = {"scores": {"de": 60.0, "en": 70.0, "fr": 50.0}}
    run["test"] = {"scores": {"en": 70 + random.random(), "de": 60 + random.random()}}
    named = {"task": task, "method": method, "seed": seed, "shots": 0, "model": "m", "data": "d", "source": "en"}
    run["settings"] = named | {"lr": 1e-5, "batch_size": 32} | settings
    folder = folder / f"{task}-{method}-{seed}-{len(list(folder.iterdir()))}"
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps(run))
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    return {"task": task, "method": method, "log": log, "mean": statistics.fmean(run["test"]["scores"].values())}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """All runs of the figures, of one seed or, of df and slowfast, of two: what they wrote, and their setups."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [write_run(folder, task, m, seed) for task in NAMES for m in METHODS for seed in (1, 2)
            if seed == 1 or m in ("df", "slowfast")]  # fmt: skip
    return SimpleNamespace(folder=folder, runs=runs, setups=setups_of(read_runs([folder])))


@pytest.fixture
def looked(monkeypatch):
    """What matplotlib put into the last picture: its figure, its size, and (text, points, extent) of each text."""
    seen, draw_figure, draw_text = SimpleNamespace(), matplotlib.figure.Figure.draw, matplotlib.text.Text.draw

    def figure(self, renderer):
        seen.texts, seen.figure, seen.size = [], self, self.bbox.frozen()
        draw_figure(self, renderer)

    def text(self, renderer):
        if self.get_visible() and self.get_text().strip():
            seen.texts.append((self.get_text(), self.get_fontsize(), self.get_window_extent(renderer)))
        draw_text(self, renderer)

    monkeypatch.setattr(matplotlib.figure.Figure, "draw", figure)
    monkeypatch.setattr(matplotlib.text.Text, "draw", text)
    return seen


def check_look(seen, png):
    """No text is small, cut off, or over another; the picture's edge is white."""
    for i, (said, points, extent) in enumerate(seen.texts):
        assert points >= 7, said
        assert extent.x0 >= 0 and extent.y0 >= 0 and extent.x1 <= seen.size.x1 and extent.y1 <= seen.size.y1, said
        assert not [other for other, _, e in seen.texts[:i] if e.padded(-1).overlaps(extent.padded(-1))], said
    pixels = matplotlib.image.imread(png)[..., :3]
    assert pixels[:, [0, -1]].min() == pixels[[0, -1]].min() == 1 and (pixels.min(2) < 0.9).mean() > 0.005


def test_seeds_that_logged_other_layers_or_languages_are_drawn_as_far_as_they_go(tmp_path):
    """Of runs of before settings named their languages and their model."""
    for seed in (1, 2):
        write_run(tmp_path, "qam", "df", seed)
    (file,) = tmp_path.glob("qam-df-2-*/log.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        line["cka"] = line.get("cka", [0.5])[:3]
        line["scores"] = {"de": 1.0, "en": 2.0}
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = file.with_name("result.json")
    result.write_text(json.dumps(json.loads(result.read_text()) | {"dev": {"scores": {"de": 1.0, "en": 2.0}}}))
    (setup,) = setups_of(read_runs([tmp_path]))
    of_languages = {label: points for label, points, _ in figures.languages(setup, ["df"])}
    assert [len(of_languages[f"{x}, df"][200]) for x in ("de", "fr")] == [2, 1] and 100 not in of_languages["fr, df"]
    of_layers = [points for _, points, _ in figures.similarity(setup, ["df"])]
    assert len(of_layers) == 4 and all(len(points[200]) == 1 for points in of_layers)


def points_of(made, figure):
    """{(panel, quantity, series, x): [y of each seed]} of a figure, from what the runs wrote."""
    found = defaultdict(list)
    tasks, methods = CURVES.get(figure, (THREE, [*LAYERS]))
    for run in (run for run in made.runs if run["task"] in tasks and run["method"] in methods):
        name, method = NAMES[run["task"]], run["method"]
        if figure == "figure3":
            for layer in (0, 2, 3) if method == "df" else [int(method[-1])]:
                found[name, "mean score (%)", LAYERS[method], layer].append(run["mean"])
        for line in run["log"]:
            if figure in CURVES:
                found[name, "training loss", method, line["update"]].append(line["loss"])
            if figure in CURVES and "gap" in line:
                found[name, "gap (points)", method, line["update"]].append(line["gap"])
            for language, score in line.get("scores", {}).items() if figure == "figure7" else ():
                found[name, "dev score (%)", f"{language}, {method}", line["update"]].append(score)
            for i, cka in enumerate(line.get("cka", ())) if figure == "figure6" and method == "df" else ():
                found[name, "linear CKA", f"layer {i}", line["update"]].append(cka)
    return found


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", FIGURES)
def test_each_figure(name, made, looked, tmp_path):
    """It has all numbers of the logs, all its labels, and the same bytes again whatever the user's settings are."""
    files = draw(name, made.setups, tmp_path / "new" / "a.1")
    assert [file.name for file in files] == ["a.1.svg", "a.1.png", "a.1.csv"]
    with open(files[2], newline="", encoding="utf-8") as file:
        rows = {(r["panel"], r["quantity"], r["series"], int(r["x"])): r for r in csv.DictReader(file)}
    expected = points_of(made, name)
    assert rows.keys() == expected.keys()
    for key, seeds in expected.items():
        assert float(rows[key]["y"]) == pytest.approx(statistics.fmean(seeds), rel=1e-12)
        several = len(seeds) > 1 and name != "figure6"
        assert [rows[key]["low"], rows[key]["high"]] == ([str(min(seeds)), str(max(seeds))] if several else ["", ""])
    check_look(looked, files[1])
    shown = [said for said, *_ in looked.texts]
    labels = {said for key in expected for said in key[:2]} | {key[2] for key in expected if name != "figure6"}
    assert all(shown.count(said) == 1 for said in labels) and "not run" not in shown
    assert ("layer" if name == "figure3" else "1,000") in shown
    caption = caption_of(name, made.setups)
    assert caption in " ".join(" ".join(shown).split()) and caption.startswith(FIGURES[name].title)
    assert looked.figure.get_figwidth() == (3.1 if len(CURVES.get(name, (THREE,))[0]) == 1 else 6.3)
    theirs = {"font.size": 20, "savefig.bbox": "tight", "svg.fonttype": "none", "svg.hashsalt": "x", "axes.grid": True,
              "lines.linewidth": 9, "savefig.dpi": 50, "figure.constrained_layout.use": False}  # fmt: skip
    with matplotlib.rc_context(theirs):
        again = draw(name, made.setups, tmp_path / "again")
    assert [file.read_bytes() for file in files] == [file.read_bytes() for file in again]


def test_several_setups_and_tasks_that_were_not_run(tmp_path, looked):
    """A column for each, with room for all that it says; or, if that is asked for, only those with lines."""
    for lr in range(8):
        write_run(tmp_path, "ner" if lr == 7 else "xnli", "slowfast" if lr == 2 else "df", 1, updates=150, lr=lr / 10)
    setups = setups_of(read_runs([tmp_path]))
    _, png, _ = draw("figure2", setups, tmp_path / "whole")
    shown = [said for said, *_ in looked.texts]
    columns = [f"XNLI ({x})" for x in "abcdefg"] + ["MLQA", "NER"]
    assert [said for said in shown if said[:4] in ("XNLI", "MLQA", "NER")] == columns
    assert shown.count("not run") == 4 and shown.count("training loss") == shown.count("df") == 1
    assert looked.figure.get_figwidth() > 1.2 * len(columns)
    check_look(looked, png)
    draw("figure2", setups, tmp_path / "part", whole=False)
    shown = [said for said, *_ in looked.texts if said in [*columns, "not run"]]
    assert shown == [s.name for s in setups if s.seeds({"method": "df"})] and len(shown) == 7
    assert draw("figure3", setups, tmp_path / "none", whole=False) == [] and not [*tmp_path.glob("none*")]
    for name in ("figure5", "figure6"):
        check_look(looked, draw(name, [], tmp_path / name)[1])
        shown = [said for said, *_ in looked.texts]
        assert shown.count("not run") == len(FIGURES[name].tasks) * len(FIGURES[name].rows)
        assert not any(said[-1].isdigit() for said in shown)  # nor has an axis numbers


def test_what_a_setup_shows(made, tmp_path):
    """Two methods of a figure that compares some, or the one of a figure of one."""
    assert {name for name in FIGURES if shows(name, made.setups[0])} == {*FIGURES} - {"figure5", "figure7"}  # XNLI
    for method, shown in (("df", ["figure2", "figure6"]), ("last-1", ["figure2", "figure4", "figure6"])):
        write_run(tmp_path, "ner", method, 1)
        (setup,) = setups_of(read_runs([tmp_path]))
        assert [name for name in FIGURES if shows(name, setup)] == shown


def test_a_long_line_is_a_running_mean_which_the_caption_says(tmp_path, looked):
    run = write_run(tmp_path, "xnli", "df", 1, updates=400)
    draw("figure1", setups_of(read_runs([tmp_path])), tmp_path / "figure")
    loss, gap = (next(line for line in ax.lines if line.get_label() == "df") for ax in looked.figure.axes)
    window = [line["loss"] for line in run["log"][:8]]  # 2 %
    assert loss.get_xydata()[0] == pytest.approx([450, statistics.fmean(window)]) and len(loss.get_xdata()) == 393
    assert gap.get_ydata() == pytest.approx([line["gap"] for line in run["log"] if "gap" in line])
    assert any("running means" in " ".join(said.split()) for said, *_ in looked.texts)


def log(*lines):
    return [{"update": t, "updates_in_first_phase": n} for t, n in lines]


A = log((10, 10), (20, 16), (30, 16), (40, 26))  # in P1: 1, 0.6, 0 and 1 of the updates
B = log((10, 10), (20, 10), (30, 19), (40, 20))  # 1, 0, 0.9, 0.1


@pytest.mark.parametrize(
    ("logs", "expected"),
    [([A], [(0, 20), (30, 40)]), ([B], [(0, 10), (20, 30)]), ([A, B], [(0, 10), (30, 40)]), ([], []),
     ([log((10, 5))], []), ([log((10, 6))], [(0, 10)]), ([log((10, 0), (25, 15), (30, 15))], [(10, 25)])],
)  # fmt: skip
def test_the_first_phase(logs, expected):
    """From line to line, where more than half of the updates were in P1, in the mean over seeds."""
    assert first_phase(logs) == expected


def test_the_first_phase_is_shown(made, looked, tmp_path):
    """By a strip for each method, above the panels and in the order of the legend, and by a shade in each panel."""
    draw("figure1", made.setups, tmp_path / "figure")
    top, below = looked.figure.axes
    spans, spans_below = ([p.get_patch_transform().transform_path(p.get_path()).get_extents() for p in ax.patches]
                          for ax in (top, below))  # fmt: skip
    above = sorted((-s.y0, round(s.x0), round(s.x1)) for s in spans if s.y0 > 1)
    assert [(start, end) for _, start, end in above] == [(0, 200)] * 4 + [(600, 700)]
    assert len({y for y, *_ in above}) == 4
    assert max(p.get_window_extent().y1 for p in top.patches) < top.title.get_window_extent().y0
    for shades in (spans_below, [s for s in spans if s.y0 == 0]):
        assert sorted((round(s.x0), round(s.x1)) for s in shades) == [(0, 200)] * 4 + [(600, 700)]


def test_another_process_draws_the_same(made, tmp_path):
    """Whatever the order of its sets; and matplotlib is not needed to import what draws."""
    code = """import sys; from paper.figures import draw; from paper.results import read_runs, setups_of
assert "matplotlib" not in sys.modules
draw("figure7", setups_of(read_runs([sys.argv[1]])), sys.argv[2])"""
    ours = draw("figure7", made.setups, tmp_path / "ours")
    for seed in ("1", "2"):
        command, env = [sys.executable, "-c", code, made.folder, tmp_path / seed], os.environ | {"PYTHONHASHSEED": seed}
        subprocess.run(command, check=True, cwd=ROOT, env=env)
        assert [file.read_bytes() for file in ours] == [(tmp_path / f"{seed}{f.suffix}").read_bytes() for f in ours]


# --- what a method gains, by the length of the run and its part in P1 ----------------------------------------


@pytest.mark.filterwarnings("error")
def test_what_methods_gain_by_length(tmp_path, looked):
    """Of the runs of one kind, which differ in length, window and what they measure; each method once a length, of
    the setup with most seeds of it, or else most runs; not of one seed; with the intervals that `difference` has. And
    slowfast of all setups, by its part in P1: here 47 updates. A row of panels for each task of two lengths."""
    place = {"df": 0, "slowfast": 1, "fs": 2, "noisytune": 3, "ff": 4}

    def gaining(methods, n, seeds, times=1, **settings):
        return [run_of({"en": 80.0 + seed, "de": 60.0 + place[m] * seed * times}, m, seed, max_updates=n, **settings)
                | {"updates": n} for m in ["df", *methods] for seed in seeds]  # fmt: skip

    runs = gaining(["slowfast", "fs"], 240, (1, 2, 3)) + gaining(["noisytune", "ff", "slowfast"], 14070, (1, 2))
    runs += gaining(["slowfast", "fs"], 960, (1, 2), window=80) + gaining(["ff"], 960, (1, 2), dev_examples=9)
    again = gaining(["slowfast", "fs", "noisytune", "ff"], 240, (1, 2), dev_examples=9)  # most runs, not most seeds
    again += gaining(["slowfast"], 960, (1, 2), times=0, dev_examples=8)  # of as many seeds, and fewer runs
    drawn = {240: "slowfast fs noisytune ff", 960: "slowfast fs ff", 14070: "slowfast noisytune ff"}
    expected = {(n, m): 2 for n in drawn for m in drawn[n].split()} | {(240, "slowfast"): 3, (240, "fs"): 3}  # seeds
    alone = [run_of({"en": 5.0, "de": 4.0}, m, max_updates=30) | {"updates": 30} for m in ("df", "fs")]
    other = [run_of({"en": 5.0, "de": 4.0}, m, seed, lr=0.1, max_updates=n) | {"updates": n}
             for m in ("df", "slowfast") for n in (480, 720) for seed in (1, 2)]  # fmt: skip
    ner = [gaining(["slowfast"], n, (1, 2), task="ner", lr=rate, phase="fraction", fraction=0.3)
           for n, rate in ((500, 1), (300, 1), (300, 2))]  # fmt: skip
    qam = gaining(["slowfast"], 600, (1, 2), task="qam")
    made = [*again, *runs, *alone, *other, *qam, *itertools.chain(*ner)]
    files = draw_gains(setups_of(made), tmp_path / "gains")
    assert [file.name for file in files] == ["gains.svg", "gains.png", "gains.csv"]
    with open(files[2], newline="", encoding="utf-8") as file:
        rows = [*csv.DictReader(file)]
    assert [task for task, _ in itertools.groupby(row["task"] for row in rows)] == ["xnli", "ner"]
    found = [(row["quantity"], float(row["x"]), float(row["minus df"])) for row in rows if row["task"] == "ner"]
    assert [name for name, *_ in found] == ["mean", "source", "gap"] * 2 + ["mean by part in P1"] * 3
    by_length = [(n, gain) for n in (300, 500) for gain in (0.75, 0, -1.5)]
    np.testing.assert_allclose([x for _, *x in found[:6]], by_length, atol=1e-9)
    by_part = sorted((4700 / n, 0.75) for n in (500, 300, 300))
    np.testing.assert_allclose(sorted(x for _, *x in found[6:]), by_part, atol=1e-9)
    rows = [row for row in rows if row["task"] == "xnli"]
    rows, by_part = rows[: 3 * len(expected)], rows[3 * len(expected) :]
    assert {(int(r["x"]), r["series"]) for r in rows} == {*expected}
    for row in rows:
        n = expected[int(row["x"]), row["series"]]
        gap = [-place[row["series"]] * seed for seed in range(1, n + 1)]  # more than df's, by hand
        seeds = {"mean": [-x / 2 for x in gap], "source": [0] * n, "gap": gap}[row["quantity"]]
        margin = {2: 12.706, 3: 4.3027}[n] * statistics.stdev(seeds) / n**0.5
        found = [float(row[name]) for name in ("minus df", "low", "high")]
        assert found == pytest.approx([statistics.fmean(seeds) + d for d in (0, -margin, margin)], rel=1e-4), row
    # slowfast's, of all setups
    gains = [(240, 1), (240, 0.75), (960, 0.75), (960, 0), (14070, 0.75), (480, 0), (720, 0)]
    found = sorted((float(row["x"]), float(row["minus df"])) for row in by_part)
    np.testing.assert_allclose(found, sorted((4700 / updates, gain) for updates, gain in gains), atol=1e-9)
    check_look(looked, files[1])
    shown = [said for said, *_ in looked.texts]
    labels = {"updates of XNLI", "updates of NER, P1 30 %"}
    assert {*"noisytune fs ff slowfast 240 960 14,070 300 500".split(), *labels} <= {*shown}
    again = draw_gains(setups_of(made), tmp_path / "again")
    assert [file.read_bytes() for file in files] == [file.read_bytes() for file in again]


def test_of_one_length_nothing_is_drawn(tmp_path):
    runs = [run_of({"en": 5.0, "de": 4.0}, m, seed) for m in ("df", "slowfast") for seed in (1, 2)]
    assert draw_gains(setups_of(runs), tmp_path / "gains") == [] and not [*tmp_path.iterdir()]
    assert draw_gains([], tmp_path / "gains") == []
