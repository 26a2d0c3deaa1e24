"""The README's results are what `make results` writes of the runs that are kept in results/."""

import json
from pathlib import Path

import eval as measure

ROOT = Path(__file__).resolve().parent.parent


def test_the_readmes_results_are_those_of_the_folder(tmp_path, monkeypatch):
    """Written again, without drawing, into a copy."""
    drawn = []

    def draw(grid, path, caption):
        drawn.append(path.name)
        return [Path(f"{path}.{kind}") for kind in ("svg", "png", "csv")]

    monkeypatch.setattr(measure, "draw", draw)
    readme = tmp_path / "README.md"
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    before, after = (text.partition(mark)[::2] for mark in measure.MARKS)
    readme.write_text(f"{before[0]}{measure.MARKS[0]}\n{measure.MARKS[1]}{after[1]}", encoding="utf-8")
    measure.write_readme([ROOT / "results"], tmp_path / "results" / "report", readme)
    assert readme.read_text(encoding="utf-8") == text
    files = [ROOT / "results" / "report" / f"{name}.{kind}" for name in drawn for kind in ("svg", "png", "csv")]
    assert all(file.is_file() for file in files)


def test_a_kept_run_is_whole():
    for file in (ROOT / "results").rglob("result.json"):
        result, settings = (json.loads((file.parent / name).read_text()) for name in ("result.json", "settings.json"))
        assert result["settings"] == settings
        lines = (file.parent / "log.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["update"] == result["updates"]
