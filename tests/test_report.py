"""The page of all that was run, and the results in the README."""

import json
import re
from pathlib import Path

import pytest
import soak
from made_up import run_of, seeds_of, write
from test_tables import everywhere

from paper import gains, report
from paper.results import EQUAL_GAP, setups_of

ROOT = Path(__file__).resolve().parent.parent
BEFORE, BETWEEN, AFTER = "# Title\n\nText with `code`.\n\n", "\n\n## The demo\n\n", "\n\n## Licence\n\nNone.\n"
MARKS = [f"<!-- {text} -->" for name in ("does it work", "demo", "speed", "promises")
         for text in (f"{name}: written by make results", f"end of {name}")]  # fmt: skip
EMPTY = (f"{BEFORE}{MARKS[0]}\n{MARKS[1]}{BETWEEN}{MARKS[2]}\nold\n{MARKS[3]}\n{MARKS[4]}\n{MARKS[5]}\n{MARKS[6]}\n"
         f"{MARKS[7]}{AFTER}")  # fmt: skip


def markdown_tables(text):
    """[[row of cells]] of each Markdown table of a text."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines())
        found.append([header, *rows])
    return found


def links_of(text):
    return re.findall(r"\]\(([^)]*)\)", text)


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are not drawn, which takes the longest."""
    kinds = ("svg", "png", "csv")
    monkeypatch.setattr(report, "draw", lambda name, setups, path, whole: [Path(f"{path}.{kind}") for kind in kinds])
    monkeypatch.setattr(report, "draw_gains", lambda setups, path: [Path(f"{path}.{kind}") for kind in kinds])


@pytest.fixture
def results(tmp_path):
    """A folder results/ as ours is: long runs with notes, some of which have no result, and the demo's."""
    folder = tmp_path / "results"
    long = [everywhere(method, score=score, seed=seed) | {"updates": 9000, "best_update": 3000, "device": "a GPU"}
            for method, score in (("df", 70.0), ("fs", 70.0), ("slowfast", 71.0)) for seed in (1, 2)]  # fmt: skip
    qa = run_of({"test": {"de": 60.0, "en": 80.0}, "test-7x7": {"de-de": 50.0, "en-en": 51.0}}, task="mlqa", split=None)
    qa["test"]["exact_match"] = {"de": 40.0, "en": 77.7}
    write(folder / "long", *long, qa)
    (folder / "long" / "NOTES.md").write_text("How they were made.\n")
    (folder / "long" / "sweep" / "ff-4").mkdir(parents=True)
    (folder / "long" / "sweep" / "ff-4" / "settings.json").write_text("{}")
    about = {"data": "demo/texts", "max_updates": 240}
    write(folder / "demo" / "xnli", *seeds_of(60, "df", **about), *seeds_of(66, "slowfast", **about))
    write(
        folder / "demo" / "ner", *seeds_of(60, "df", task="ner"), *seeds_of(66, "slowfast", task="ner")
    )  # 2 languages
    return folder


def test_the_page_has_all_that_was_run(results, tmp_path, run_main, undrawn):
    """The longest runs first, each setup by itself; the notes; and nothing that is of this machine."""
    result = run_main("report", results, "--out", tmp_path / "out")
    assert result.status == 0 and result.err == "" and result.out.split() == [str(tmp_path / "out" / "report.md")]
    text = (tmp_path / "out" / "report.md").read_text()
    headings = re.findall(r"^##+ (.*)$", text, re.M)
    assert headings == ["long", "XNLI", "MLQA", "demo", "XNLI", "NER"]
    assert "\nHow they were made.\n" in text and "\n- `fs`: fine-tuning slow, policies I and II\n" in text
    assert "\nWithout a result: `sweep/ff-4`.\n" in text and "a GPU" in text and str(tmp_path) not in text
    long, *_ = markdown_tables(text)
    below = ["&emsp;minus df", "&emsp;paper"]
    assert [row[0] for row in long] == ["method", "df", "&emsp;paper", "fs", *below, "slowfast", *below]
    along = ["gap at the end", "gap at equal source"]
    assert long[0] == ["method", "seeds", "mean", "source", "others", "gap", *along, "in P1", "minutes"]
    assert long[6:] == [
        ["slowfast", "2", "71.0±0.0", "71.0±0.0", "71.0±0.0", "0.0±0.0", "5.0±0.0", "-", "47±0 (1 %)", "2"],
        ["&emsp;minus df", "", *["+1.0 [1.0, 1.0]"] * 3, *["+0.0 [0.0, 0.0]"] * 2, "-", "", ""],
        ["&emsp;paper", "", "75.6±0.1", "85.6±0.2", "74.9±0.2", "10.7", "-", "-", "", ""],
    ]
    assert "- Our method beats DF, NoisyTune, FS and FF, zero-shot (4.2): XNLI yes" in text
    assert "not run\n" not in text.replace("comparisons not run", "")
    assert any(["en", "77.7"] in rows for rows in markdown_tables(text))  # by exact match
    assert ["context \\ question", "de", "en"] in [rows[0] for rows in markdown_tables(text)]


def test_what_is_of_another_kind_does_not_stand_beside_the_papers_numbers(results, tmp_path, run_main, undrawn):
    assert run_main("report", results, "--out", tmp_path / "out").status == 0
    text = (tmp_path / "out" / "report.md").read_text()
    demo = text.partition("## demo")[2]
    assert "&emsp;paper" in text.partition("## demo")[0].partition("## long")[2]
    assert "&emsp;paper" not in demo and "+6.0 [6.0, 6.0]" in demo
    assert "Our method improves the source (4.5): XNLI yes, +6.0 [6.0, 6.0]" in demo  # but what it says is asked of all


def test_claims_of_one_seed_say_so(tmp_path, run_main, undrawn):
    write(tmp_path / "runs" / "one", *(run_of({"en": 9.0, "de": 8.0}, method) for method in ("df", "slowfast")))
    write(tmp_path / "runs" / "two", *seeds_of(60, "df"), *seeds_of(66, "slowfast"))
    assert run_main("report", tmp_path / "runs", "--out", tmp_path / "out").status == 0
    one, two = (tmp_path / "out" / "report.md").read_text().partition("## one")[2].split("## two")
    assert "(one seed: how sure they are leaves out the chance in training):" in one and "one seed" not in two


def test_figures_are_drawn_of_the_setup_that_has_most_of_them(tmp_path, run_main):
    folder = tmp_path / "runs" / "some"
    runs = [run_of({"en": 9.0, "de": 8.0}, method) for method in ("df", "slowfast")]
    runs = [run | {"updates": 9000} for run in runs]
    runs += [run_of({"en": 9.0, "de": 8.0}, method, lr=1e-3) for method in ("df", "fs", "ff", "slowfast")]
    write(folder / "xnli", *runs)
    assert run_main("report", tmp_path / "runs", "--out", tmp_path / "out").status == 0
    text = (tmp_path / "out" / "report.md").read_text()
    found = re.findall(r"^Figure (\d)\..*: (XNLI \(\w\))", text, re.M)
    assert found == [("1", "XNLI (b)"), ("2", "XNLI (a)"), ("6", "XNLI (a)")]
    links = links_of(text)
    assert len(links) == 9 and all(re.fullmatch(r"figures/some-figure[126]\.(svg|png|csv)", link) for link in links)
    assert all((tmp_path / "out" / link).is_file() for link in links)


@pytest.mark.parametrize(
    ("given", "groups"), [("runs", ["paper", "small"]), ("runs/small", ["ner"]), ("runs/small/ner", ["ner"])]
)
def test_runs_are_grouped_by_the_folder_below_the_one_that_is_given(
    tmp_path, run_main, monkeypatch, undrawn, given, groups
):
    """However deep that is; a folder of a run is no group."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "runs" / "small" / "ner", run_of({"en": 9.0, "de": 8.0}, task="ner"))
    write(tmp_path / "runs" / "paper" / "xnli" / "model", run_of({"en": 9.0, "de": 8.0}) | {"updates": 9000})
    assert run_main("report", given, "--out", "out").status == 0
    assert re.findall(r"^## (.*)$", (tmp_path / "out" / "report.md").read_text(), re.M) == groups


# --- the README ----------------------------------------------------------------------------------------------


@pytest.fixture
def readme(tmp_path):
    file = tmp_path / "README.md"
    file.write_text(EMPTY)
    return file


def test_the_blocks_of_the_readme(results, tmp_path, run_main, readme, undrawn):
    """Between their marks, and the page beside the runs; written again, nothing changes."""
    command = ["report", results, "--out", results, "--readme", readme]
    assert run_main(*command).status == 0
    whole = text = readme.read_text()
    page = (results / "README.md").read_text()
    assert text.startswith(f"{BEFORE}{MARKS[0]}\n") and text.endswith(f"\n{MARKS[7]}{AFTER}")
    text, _, promises = text.partition(f"\n{MARKS[6]}\n")
    assert promises == f"\nNothing was tried yet: `make soak`.\n\n{MARKS[7]}{AFTER}"
    text, _, speed = text.partition(f"\n{MARKS[4]}\n")
    assert speed == f"\nNothing was measured yet: `make bench`.\n\n{MARKS[5]}"
    work, _, demo = text.removeprefix(BEFORE).partition(BETWEEN)
    assert work.splitlines()[-1] == MARKS[1] and demo.splitlines()[0] == MARKS[2] and "\nold\n" not in demo
    (header, *rows) = markdown_tables(work)[0]
    assert header == "run|updates|in P1|n|df|Δ mean|Δ English|Δ others|Δ gap|equal English".split("|")
    assert rows == [
        ["XNLI, paper", "10 epochs", "", "4", "74.7", "+0.9", "+0.8", "+0.9", "-0.1", "-"],
        ["d", "9,000", "1 %", "2", "70.0", *["+1.0±0.0 ✓"] * 3, "+0.0±0.0 ?", "-"],
        ["NER, paper", "20 epochs", "", "4", "61.3", "+1.2", "+0.0", "+1.3", "-1.3", "-"],
        ["d", "240", "20 %", "2", "60.2", *["+6.0±0.0 ✓"] * 3, "+0.0±0.0 ?", "-"],
    ]
    assert "Not run with two seeds: MLQA, QAM." in " ".join(work.split())
    of_one_seed = [results / "demo" / "xnli" / name for name in ("run0", "run2")]
    printed = run_main("table", *of_one_seed, "--split", "test", "--no-paper")
    assert f"```text\n{printed.out}```" in demo  # what `make demo` prints of one seed
    assert " ".join(demo.split("```")[2].partition("<!--")[0].split()) == (
        "Over 2 seeds: `df` mean 60.2±0.4, gap 10.0±0.0; `slowfast` mean 66.2±0.4, gap 10.0±0.0; slowfast minus df: "
        "mean +6.0 [6.0, 6.0], gap +0.0 [0.0, 0.0] (95 %, over 2 seeds)"
    )
    assert max(map(len, text.splitlines())) <= 120
    assert run_main(*command).status == 0 and (readme.read_text(), (results / "README.md").read_text()) == (whole, page)


def test_which_setups_are_evidence():
    """Of the official files, with two seeds of both; the longest first, named by their group or their data."""
    scores = {"en": 9.0, "de": 8.0}
    kinds = [("ner", {}), ("xnli", {}), ("xnli", {"data": "demo/texts"}), ("xnli", {"lr": 1.0})]
    runs = [[*seeds_of(60, "df", task=task, **s), *seeds_of(61, "slowfast", task=task, **s)] for task, s in kinds]
    runs[3] = [run | {"updates": 241} for run in runs[3]]
    runs += [[run_of(scores, "df", task="qam"), *seeds_of(60, "slowfast", task="qam")]]
    runs[0] = [run | {"updates": 239, "settings": run["settings"] | {"data": "/x/data"}} for run in runs[0]]
    setups = [setup for of_kind in runs for setup in setups_of(of_kind)]
    groups = {"a": (None, setups[:2]), "b": (None, setups[2:])}
    assert gains.evidence_of(groups) == [("d", setups[3]), ("d", setups[1]), ("a", setups[0])]


@pytest.mark.parametrize(
    ("found", "of_the_mean", "of_the_gap"),
    [((1.04, 0.54, 1.54), "+1.0±0.5 ✓", "+1.0±0.5 ✗"), ((-1.04, -1.54, -0.54), "-1.0±0.5 ✗", "-1.0±0.5 ✓"),
     ((0.5, -0.1, 1.1), "+0.5±0.6 ?", "+0.5±0.6 ?"), ((0.0, 0.0, 0.0), "+0.0±0.0 ?", "+0.0±0.0 ?"),
     ((1.0, None, None), "-", "-"), (None, "-", "-")],
)  # fmt: skip
def test_what_a_difference_says_of_the_papers_conclusion(found, of_the_mean, of_the_gap):
    assert [gains.marked(x, found) for x in ("mean", "source", "non_source")] == [of_the_mean] * 3
    assert [gains.marked(x, found) for x in ("gap", EQUAL_GAP)] == [of_the_gap] * 2


@pytest.mark.parametrize("name", ["soak.json", "bench/cpu.json"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff", b"[]", b"{}", b'{"training": 1, "promises": [{"what": 1}]}', b"[" * 10**5]
)
def test_measurements_that_are_damaged(results, run_main, readme, undrawn, name, content):
    """One line with the file; {} is a measurement of nothing for the one, and damaged for the other."""
    file = results / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    done = run_main("report", results, "--out", results, "--readme", readme)
    if (name, content) == ("bench/cpu.json", b"{}"):
        assert done.status == 0
    else:
        assert done.status == 2 and done.err.count("\n") == 1 and str(file) in done.err, done


@pytest.mark.parametrize("complete", [True, False])
def test_the_promises(results, run_main, readme, undrawn, complete):
    """A row for each, of what tests/soak.py wrote."""
    found = [{"name": name, "what": what, "tried": 100_000, "held": 99_999, "failed": 1}
             for name, (what, _) in soak.PROMISES.items()]  # fmt: skip
    about = {"machine": {"cores": 2}, "seed": 3, "complete": complete, "seconds": 1500, "promises": found}
    (results / "soak.json").write_text(json.dumps(about))
    assert run_main("report", results, "--out", results, "--readme", readme).status == 0
    block = readme.read_text().partition(f"{MARKS[6]}\n")[2].partition(MARKS[7])[0]
    header, *rows = markdown_tables(block)[0]
    assert header == ["promise", "tried", "held", "failed"]
    assert rows == [[what, "100,000", "99,999", "1"] for what, _ in soak.PROMISES.values()]
    stopped = "" if complete else " It was stopped before its end."
    assert block.endswith(f"\n\n`make soak`: 2 CPU cores, 25 minutes, seed 3.{stopped}\n\n")
    assert len(block.strip().splitlines()) <= 12 and max(map(len, block.splitlines())) <= 120


@pytest.mark.parametrize("i", range(8))
def test_a_readme_without_a_mark_stays_as_it_is(results, tmp_path, run_main, readme, i):
    text = EMPTY.replace(MARKS[i], "")
    readme.write_text(text)
    result = run_main("report", results, "--out", tmp_path / "out", "--readme", readme)
    assert (result.status, result.err.count("\n"), readme.read_text()) == (2, 1, text)
    assert str(readme) in result.err and MARKS[i] in result.err and not (tmp_path / "out").exists()


def test_what_is_not_there(results, tmp_path, run_main, readme):
    for command, says in (
        (["report", tmp_path / "none"], "none"),
        (["report", results, "--readme", tmp_path / "none.md"], "none.md"),
        (["report", results / "long", "--readme", readme], "demo"),
    ):
        result = run_main(*command, "--out", tmp_path / "out")
        assert (result.status, result.err.count("\n")) == (2, 1) and says in result.err
        assert not (tmp_path / "out").exists() and readme.read_text() == EMPTY


def test_the_kept_results_are_those_of_the_kept_runs(tmp_path, run_main, undrawn):
    """README.md and results/README.md are what `make results` writes of results/. (The figures are not drawn again:
    other versions of matplotlib draw other bytes. Their files are there.)"""
    readme = tmp_path / "README.md"
    readme.write_text((ROOT / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    result = run_main("report", ROOT / "results", "--out", tmp_path / "results", "--readme", readme)
    assert result.status == 0, result.err
    for name in ("README.md", "results/README.md"):
        assert (tmp_path / name).read_text(encoding="utf-8") == (ROOT / name).read_text(encoding="utf-8"), name
    page = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
    links = {link for link in links_of(page) if "://" not in link}
    assert len(links) > 8 and all((ROOT / "results" / link).is_file() for link in links)
    drawn = {file.relative_to(ROOT / "results").as_posix() for file in (ROOT / "results" / "figures").iterdir()}
    assert drawn <= links  # and none is of a run that is gone


def test_each_interval_in_words_stands_in_a_table():
    """No text says another than make results has computed. (But for one of an older commit, which says so.)"""
    page = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
    tables, kind = "\n".join(re.findall(r"^\|.*$", page, re.M)), r"[+-]\d+\.\d \[-?\d+\.\d, -?\d+\.\d\]"
    found = []
    for file in (ROOT / "README.md", ROOT / "Makefile", *(ROOT / "results").glob("*/NOTES.md")):
        text = re.sub(r"```text.*?```", "", file.read_text(encoding="utf-8"), flags=re.S)  # of one seed
        text = " ".join(text.split())
        found += [(file.name, said) for said in re.findall(kind, re.sub(rf"commit 76c6ddc.*?{kind}", "", text))]
    assert len(found) > 8 and not [(name, said) for name, said in found if said not in tables]


def test_the_part_in_P1_has_a_star_where_it_was_set():
    """Which is the one for slowfast, and the other for the df that its setup is lent."""
    scores = {"en": 80.0, "de": 70.0}
    (setup,) = setups_of([run_of(scores), run_of(scores, "slowfast", phase="fraction")])
    assert [gains.part_in_P1(setup, {"method": m}) for m in ("df", "slowfast")] == ["20 %", "20 %*"]
