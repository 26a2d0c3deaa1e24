"""Figures: the files that `draw` leaves, and what they show."""

import csv
import html
import math
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import matplotlib.image
import numpy as np
import pytest

from eval import LONG_NOTE, Panel, Series, blocks, draw, running_mean


ROOT = Path(__file__).resolve().parent.parent


def methods(points=40, names=("df", "fs", "ff", "slowfast")):
    """A noisy curve of each method, with a band and two spells of P1."""
    noise = np.random.default_rng(0).standard_normal((len(names), points)).cumsum(1)
    x, phases = list(range(0, 100 * points, 100)), [(0, 500), (900, 1200)]
    return [
        Series(name, x, y.tolist(), (y - 1).tolist(), (y + 1).tolist(), i, i, phases)
        for i, (name, y) in enumerate(zip(names, noise))
    ]


def layers(n):
    return [Series(f"layer {i}", [0, 50, 100], [1.0, 1 - i / n, 0.9 - i / n]) for i in range(n)]


def layer_scores():
    return [Series(name, list(range(12)), [74.0 + i] * 12, color=i) for i, name in enumerate(["freeze", "renew"])]


GRIDS = {
    "methods": [[Panel("XNLI", "training loss", methods())], [Panel("XNLI", "gap (points)", methods())]],
    "one run": [[Panel(task, q, methods(names=["df"])) for task in ("XNLI", "NER")] for q in ("training loss", "gap")],
    "long": [[Panel("XNLI", "training loss", methods(1200))]],
    "layers": [[Panel(task, "accuracy (%)", layer_scores(), "layer", 74.7, "full df") for task in ("XNLI", "NER")]],
    "similarity": [[Panel("a", "CKA", layers(12), ordered=True), Panel("b", "CKA", layers(24), ordered=True)]],
    "languages": [
        [Panel("QAM", "accuracy (%)", methods(names=["de, df", "de, slowfast"]))],
        [Panel("QAM", "gap (points)", methods(names=["df", "slowfast"]))],
    ],
    "some": [[Panel("XNLI", "gap", []), Panel("NER", "gap", methods())], [Panel("", "", []), Panel("", "", [])]],
    "none": [[Panel("XNLI", "training loss", [])], [Panel("XNLI", "gap (points)", [])]],
    "holes": [[Panel("<&>", "$loss_1$", [Series("one", [3], [2.5]), Series("h", [1, 2, 3], [None, 1.0, math.nan], color=1)])]],
}  # fmt: skip


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The files of each grid."""
    folder = tmp_path_factory.mktemp("figures") / "new"
    return {name: draw(grid, folder / f"{name}.v1", "What it is.") for name, grid in GRIDS.items()}


def texts(svg):
    """What an SVG says whose letters are paths: a comment before each text."""
    parser = ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
    return [html.unescape(e.text).strip() for e in ElementTree.parse(svg, parser).iter(ElementTree.Comment)]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", GRIDS)
def test_files(name, drawn, tmp_path):
    """The same files again, with all labels, each once in a legend, and nothing at the picture's edge."""
    assert [file.name for file in drawn[name]] == [f"{name}.v1.{kind}" for kind in ("svg", "png", "csv")]
    again = draw(GRIDS[name], tmp_path / "again", "What it is.")
    assert [file.read_bytes() for file in drawn[name]] == [file.read_bytes() for file in again]
    shown, panels = texts(again[0]), [panel for row in GRIDS[name] for panel in row]
    assert shown.count("not run") == sum(not panel.series for panel in panels)
    assert {text for panel in panels for text in (panel.title, panel.y_label) if text} <= set(shown)
    assert all(shown.count(s.label) == 1 for panel in panels for s in panel.series if not panel.ordered)
    assert "What it is." in " ".join(shown)
    pixels = matplotlib.image.imread(again[1])[..., :3]
    assert 0.005 < (pixels.min(2) < 0.9).mean() < 0.5
    assert pixels[:, [0, -1]].min() == pixels[[0, -1]].min() == 1


@pytest.mark.parametrize("name", GRIDS)
def test_numbers(name, drawn):
    """The table has every number as it was given, and no other."""
    expected = [["panel", "quantity", "series", "x", "y", "low", "high"]]
    for panel in (panel for row in GRIDS[name] for panel in row):
        for s in panel.series:
            for i in range(len(s.x)):
                band = [s.low[i], s.high[i]] if s.low else [None, None]
                expected.append([panel.title, panel.y_label, s.label, s.x[i], s.y[i], *band])
        if panel.baseline is not None:
            expected.append([panel.title, panel.y_label, panel.baseline_label, None, panel.baseline, None, None])
    with open(drawn[name][2], newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [["" if v is None else str(v) for v in row] for row in expected]


def test_legends():
    """One for the grid if its panels have common lines, else one for a row, else one for a panel."""
    assert blocks(GRIDS["one run"]) == [[(0, 0), (0, 1), (1, 0), (1, 1)]]
    upper, lower = (row[0] for row in GRIDS["languages"])
    assert blocks([[upper, upper], [lower, lower]]) == [[(0, 0), (0, 1)], [(1, 0), (1, 1)]]
    assert blocks(GRIDS["similarity"]) == [[(0, 0)], [(0, 1)]]
    assert len(blocks([[Panel("a", "b", [Series("df", [1], [1], color=color)]) for color in (0, 1)]])) == 2


def test_phases(drawn):
    """One run's P1 is in the legend, several runs' beside the strips of each panel."""
    count = {name: texts(files[0]).count("P1") for name, files in drawn.items()}
    assert count["one run"] == 1 and count["methods"] == 2 and count["layers"] == 0


def test_long_lines(drawn):
    """A long line is a running mean, which the figure says."""
    assert running_mean(np.array([1, 2, 6, np.nan, 4.0]), 3)[:3].tolist() == [1.5, 3, 4]
    assert np.isnan(running_mean(np.array([1, np.nan, 3.0]), 3)).tolist() == [False, True, False]
    assert {name for name, files in drawn.items() if LONG_NOTE in " ".join(texts(files[0]))} == {"long"}


def test_lines_of_unequal_length(tmp_path):
    with pytest.raises(ValueError):
        draw([[Panel("a", "b", [Series("df", [1, 2], [1])])]], tmp_path / "figure")


def test_matplotlib_is_not_needed_to_import():
    subprocess.run([sys.executable, "-c", "import sys, eval; assert 'matplotlib' not in sys.modules"], check=True, cwd=ROOT)
