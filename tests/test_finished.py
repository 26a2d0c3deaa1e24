"""What lies in a finished run's directory: every damage to it is named, by file, line and field, and none is a bug."""

import functools
import io
import json
import os
import random
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from made_up import run_of, score_of, write
from mutate import DEEP, mutate_bytes, mutate_json, text_of

from data import InputError
from paper import arguments, figures, finished, grid, report, results
from paper.finished import read_log, read_result
from paper.options import parse
from paper.results import read_runs, setups_of

ROOT = Path(__file__).resolve().parent.parent
LANGUAGES = ("de", "en", "fr")

# --- a run as there are -----------------------------------------------------------------------------------------


def counts_of(task, seed, n=30):
    """{language: what each example counts}"""
    found = {}
    for i, x in enumerate(LANGUAGES):
        counts = np.random.default_rng([seed, i]).integers(0, 2, (n, {"ner": 3, "mlqa": 2}.get(task, 1)))
        found[x] = np.cumsum(counts, axis=1) if task == "ner" else counts
    return found


def write_whole(folder, method, task):
    """Writes a finished run with all of its files, in a folder of its own."""
    settings = parse([task, "--model", "m", "--method", method]).settings
    settings |= {"languages": list(LANGUAGES), "data_sha256": "0" * 64, "model_sha256": "1" * 64, "precision": "fp32"}
    counts = counts_of(task, len(method))
    run = run_of({x: score_of(task, c) for x, c in counts.items()}, **settings)
    run["dev"]["scores"] = dict.fromkeys(LANGUAGES, 50.0)
    run["test"]["data_sha256"] = "2" * 64
    write(folder.parent / "made", run)
    (folder.parent / "made" / "run0").rename(folder)
    lines = [json.loads(line) | {"scores": dict.fromkeys(LANGUAGES, 40.0)} for line in open(folder / "log.jsonl")]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "examples").mkdir()
    np.savez_compressed(folder / "examples" / "test.npz", **counts)


@pytest.fixture
def pair(tmp_path, request):
    """A folder with two runs, df and slowfast, by default of XNLI; df is the one that is damaged."""
    task = getattr(request, "param", "xnli")
    folder = tmp_path / "runs" / "paper" / task / "m"
    folder.mkdir(parents=True)
    for method in ("df", "slowfast"):
        write_whole(folder / f"{method}-seed1", method, task)
    return folder


def forget():
    finished.lines_of.cache_clear()
    results.resampled.cache_clear()


def read_all(folder):
    """All that there is in a folder of runs."""
    forget()
    runs = read_runs([folder])
    for run in runs:
        read_log(run)
    for setup in setups_of(runs):
        results.difference(setup, {"method": "slowfast"}, {"method": "df"}, "gap")


def test_a_whole_run_is_read(pair):
    read_all(pair)
    run, _ = read_runs([pair])
    assert read_log(run)[-1] == {"update": 240, "loss": 0.9, "phase": 2, "updates_in_first_phase": 0, "gap": 5.0,
                                 "cka": [0.9, 0.8], "scores": dict.fromkeys(LANGUAGES, 40.0)}  # fmt: skip


def test_a_kept_run_is_whole():
    runs = read_runs([ROOT / "results"])
    for run in runs:
        log = read_log(run)
        assert log[-1]["update"] == run["updates"]
        for split in finished.splits_of(run):
            file, scores = results.examples_of(run, split)
            assert not file.exists() or finished.read_counts(file, run["settings"]["task"], dict(scores))
    assert len(runs) > 50


# --- what is wrong is named ---------------------------------------------------------------------------------------

GONE = "gone"


def changed(file, field, value):
    """Sets a field "dev.scores.de" of a file of JSON, or removes it."""
    whole = json.loads(file.read_text())
    *path, last = field.split("/")
    inner = functools.reduce(lambda inner, name: inner[name], path, whole)
    if value is GONE:
        del inner[last]
    else:
        inner[last] = value
    file.write_bytes(text_of(whole))


FIELDS = [  # file, field, value, what the message says of it
    *(("settings.json", name, GONE, f"{name} is missing") for name in finished.NEEDED_SETTINGS),
    *(("settings.json", "lr", value, "lr is ") for value in ("5e-6", True, None, -1.0, 10**400, float("nan"), [1], {})),
    ("settings.json", "batch_size", 32.0, "batch_size is 32.0"), ("settings.json", "shots", 10**400, "shots is 1000"),
    ("settings.json", "seed", -1, "seed is -1"), ("settings.json", "task", "bleu", "task is 'bleu'"),
    ("settings.json", "max_updates", "240", "max_updates is '240'"), ("settings.json", "c1", None, "c1 is None"),
    ("settings.json", "languages", "de,en,fr", "languages is"), ("settings.json", "source", 3, "source is 3"),
    ("settings.json", "epochs", 11, "another epochs than the settings"), ("settings.json", "new", DEEP, "brackets"),
    ("settings.json", "new", "\ud800", "surrogates"),
    ("settings.json", "new", json.loads("[" * 30 + "]" * 30), "more than 20 brackets"),
    ("result.json", "settings", GONE, "settings is missing"),
    ("result.json", "settings/lr", GONE, "settings.lr is missing"),
    ("result.json", "seed", 2, "another seed than the settings"), ("result.json", "updates", "240", "updates is '240'"),
    ("result.json", "updates", 0, "updates is 0"), ("result.json", "seconds", None, "seconds is None"),
    ("result.json", "seconds", float("inf"), "seconds is inf"), ("result.json", "device", 1, "device is 1"),
    ("result.json", "dev", None, "dev is None"), ("result.json", "dev/scores", {}, "dev.scores is {}"),
    ("result.json", "dev/scores", [60.0, 80.0], "dev.scores is [60.0, 80.0]"),
    ("result.json", "dev/scores/de", GONE, "dev.scores is of other languages than the run (de)"),
    ("result.json", "test/scores/de", "high", "test.scores.de is 'high'"),
    ("result.json", "test/scores/de", 10**400, "test.scores.de is 1000"),
    ("result.json", "test/scores/de", True, "test.scores.de is True"),
    ("result.json", "test/scores/de", 100.5, "test.scores.de is 100.5"),
    ("result.json", "test/scores/de", -0.5, "test.scores.de is -0.5"),
    ("result.json", "test/scores/$\\x$", 1.0, "which is no name"), ("result.json", "test", "none", "test is 'none'"),
    ("result.json", "test/scores/fr", GONE, "test.scores is of other languages than the run (fr)"),
    ("result.json", "dev/exact_match", "high", "dev.exact_match is 'high'"),
    ("result.json", "test/scores/en", GONE, "no score of 'en', the source"),
    ("result.json", "test/recall", {"en": 1.0}, "test.recall is of other languages"),
    ("result.json", "test/new", {"en": "high"}, "test.new.en is 'high'"),
    ("result.json", f"test/{'x' * 5000}", {"en": 1.0}, f"test.{'x' * 40} is of other languages"),
    ("result.json", f"settings/{'x' * 5000}", 1, f"settings has another {'x' * 40} than"),
    ("result.json", f"dev/scores/{'x' * 5000}", 1.0, "which is no name"),
    ("result.json", "test/measure", 1, "test.measure is 1"), ("result.json", "../x", {"scores": {"en": 1.0}}, "../x"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "field", "value", "says"), FIELDS)
def test_a_field_that_is_wrong_is_named(pair, run_main, name, field, value, says):
    file = pair / "df-seed1" / name
    if field == "../x":
        file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    else:
        changed(file, field, value)
    forget()
    result = run_main("table", pair)
    assert (result.status, result.out, result.err.count("\n")) == (2, "", 1), result
    of = file.with_name("result.json") if "another epochs" in says else file
    assert result.err.startswith(f"paper: {of}: ") and says in result.err, result.err
    assert result.err.endswith(f"; restore the file, or remove {pair / 'df-seed1'} and run it again\n")


LINES = [  # a field of the log's second line
    ("update", GONE, "update is missing"), ("update", 120, "update 120 comes after update 120"), ("update", 7.5, "7.5"),
    ("update", True, "update is True"), ("updates_in_first_phase", 241, "updates_in_first_phase is 241 at update 240"),
    ("loss", "0.9", "loss is '0.9'"), ("loss", float("nan"), "loss is nan"), ("loss", 10**400, "loss is 1000"),
    ("phase", 3, "phase is 3"), ("gap", [1], "gap is [1]"), ("gap", 200, "gap is 200"), ("cka", [0.5, 2], "cka is"),
    ("cka", [0.5, 10**400], "cka is"),
    ("cka", 0.5, "cka is 0.5"), ("scores", {"en": 1.0}, "scores is of other languages than the run (de, fr)"),
    ("scores", None, "scores is None"), ("new", DEEP, "brackets"),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value", "says"), LINES)
def test_a_line_of_the_log_is_named(pair, run_main, field, value, says):
    file = pair / "df-seed1" / "log.jsonl"
    first, second = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(second)
    changed(file, field, value)
    file.write_bytes(first + file.read_bytes())
    forget()
    result = run_main("curves", pair)
    assert (result.status, result.out, result.err.count("\n")) == (2, "", 1), result
    assert result.err.startswith(f"paper: {file}, line 2: ") and says in result.err, result.err


def test_a_log_ends_where_the_run_does(pair):
    file = pair / "df-seed1" / "log.jsonl"
    for text in (file.read_text().splitlines()[0], ""):
        file.write_text(text)
        with pytest.raises(InputError, match=re.escape(f"{file}: it does not end at update 240")):
            read_all(pair)


TEXTS = {b"": "", b"{": "Expecting", b"[]": "it is []", b"null": "it is None", b"\xff\xfe\x00": "utf-8", bytes(100): "",
         b"[" * 100_000: "brackets", b'{"a": 1, "a": 2}': "stands twice", b"9" * 5000: "", b"{} {}": "Extra data",
         b'"' + b"x" * 2**20 + b'"': ""}  # fmt: skip


@pytest.mark.parametrize("name", ["settings.json", "result.json", "log.jsonl"])
@pytest.mark.parametrize("n", range(len(TEXTS)))
def test_a_file_that_is_something_else_is_named(pair, name, n):
    file, (text, says) = pair / "df-seed1" / name, list(TEXTS.items())[n]
    file.write_bytes(text)
    says = "larger than 1,048,576 bytes" if len(text) > 2**20 and name != "log.jsonl" else says
    with pytest.raises(InputError, match=rf"^{re.escape(str(file))}(, line 1)?: [^\n]*restore the file") as raised:
        read_all(pair)
    assert says in str(raised.value) and len(str(raised.value)) < 500 + 2 * len(str(file))


def as_folder(file):
    file.unlink()
    file.mkdir()


def as_link(file):
    file.unlink()
    file.symlink_to(file.parent / "none")


def as_pipe(file):
    file.unlink()
    os.mkfifo(file)


def unreadable(file):
    file.chmod(0)
    if os.access(file, os.R_OK):
        pytest.skip("root reads all")


@pytest.mark.skipif(os.name == "nt", reason="no pipes, no modes")
@pytest.mark.parametrize("name", ["settings.json", "result.json", "log.jsonl", "examples/test.npz"])
@pytest.mark.parametrize("turn", [as_folder, as_link, as_pipe, unreadable])
def test_what_is_no_file_is_named(pair, name, turn):
    file = pair / "df-seed1" / name
    turn(file)
    if turn is as_link and name != "log.jsonl":  # as if it were not there
        (file.parent / "result.json").unlink() if name == "result.json" else None  # pathlib's versions differ
        return read_all(pair)
    with pytest.raises(InputError, match=re.escape(str(file))):
        read_all(pair)


def member(file, name="de", text=None, shape=(30, 1), descr="|b1", order=False, size=30):
    """Replaces an array of an .npz by one with this header, and so many bytes."""
    kept = {}
    with zipfile.ZipFile(file) as archive:
        kept = {other: archive.read(other) for other in archive.namelist()}
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"shape": shape, "fortran_order": order, "descr": descr})
    kept[f"{name}.npy"] = header.getvalue() + bytes(size) if text is None else text
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for other, content in kept.items():
            archive.writestr(other, content)


def pickled():
    file = io.BytesIO()
    np.save(file, np.array([[{}]], object), allow_pickle=True)
    return file.getvalue()


def infinite():
    file = io.BytesIO()
    np.save(file, np.full((30, 1), np.inf))
    return file.getvalue()


NPZ = {  # what is done to the file, and what is said of it
    "cut": (lambda f: f.write_bytes(f.read_bytes()[:100]), "zip"), "text": (lambda f: f.write_text("counts"), "zip"),
    "a pickle": (lambda f: member(f, text=pickled()), "OBJECT"), "no array": (lambda f: member(f, text=b"none"), ""),
    "a bomb": (lambda f: member(f, shape=(7 * 10**7, 1), size=7 * 10**7), "unpacked it is larger"),
    "noughts": (lambda f: member(f, text=bytes(10**7)), "magic string"),
    "infinite": (lambda f: member(f, text=infinite()), "not finite"),
    "a huge shape": (lambda f: member(f, shape=(10**12, 1)), "(1000000000000,1)"),
    "short": (lambda f: member(f, size=29), "reshape"), "others' scores": (lambda f: member(f), "de comes to 0.00"),
    "many examples": (lambda f: member(f, shape=(200_000, 1), size=200_000), "not up to 100,000 examples"),
    "one dimension": (lambda f: member(f, shape=(30,)), "de is bool (30,), not up"),
    "empty": (lambda f: member(f, shape=(0, 1), size=0), "not up"),
    "wide": (lambda f: member(f, shape=(1, 30)), "not up"),
    "dates": (lambda f: member(f, descr="<M8[s]", size=240), "not up"),
    "another language": (lambda f: member(f, name="zh"), "other languages than the run (zh)"),
    "a language less": (lambda f: np.savez(f, **{x: c for x, c in counts_of("xnli", 2).items() if x != "de"}), "(de)"),
}  # fmt: skip


@pytest.mark.parametrize("damage", NPZ)
def test_damaged_counts_are_named(pair, run_main, damage):
    file, (do, says) = pair / "df-seed1" / "examples" / "test.npz", NPZ[damage]
    do(file)
    forget()
    result = run_main("table", pair)
    assert (result.status, result.err.count("\n")) == (2, 1) and result.err.startswith(f"paper: {file}: "), result
    assert says in result.err
    file.unlink()  # as the message says
    assert "(no interval)" in run_main("table", pair).out


def test_all_that_is_damaged_is_counted(pair):
    (pair / "df-seed1" / "result.json").write_text("{")
    (pair / "slowfast-seed1" / "settings.json").write_text("{")
    shutil.copytree(pair / "slowfast-seed1", pair / "more")
    with pytest.raises(InputError, match=r"df-seed1.result\.json: .*; 2 more of these 3 runs are damaged$"):
        read_runs([pair])


def test_what_others_have_added_is_let_be(pair):
    for name in ("settings.json", "result.json", "log.jsonl"):
        file = pair / "df-seed1" / name
        texts = [json.dumps(json.loads(line) | {"a new one": {"of": [1, None]}}) for line in open(file)]
        if name != "settings.json":
            file.write_text("\n".join(texts))
    read_all(pair)
    (pair / "df-seed1" / "settings.json").unlink()  # results were kept without
    read_all(pair)


# --- whatever is done to them --------------------------------------------------------------------------------------


def numbers_alone(name, setups, path, whole=True):
    """figures.draw, without the picture: that takes the longest."""
    columns = [column for column in figures.columns_of(figures.FIGURES[name], setups) if whole or any(column[1])]
    assert all(isinstance(row, list) for row in figures.table_of(figures.FIGURES[name], columns))
    return [Path(f"{path}.{kind}") for kind in ("svg", "png", "csv")] if columns else []


def damage(rng, folder):
    """Changes a file of a run. Returns it."""
    file = folder / rng.choice(
        ("settings.json", "result.json", "result.json", "log.jsonl", "examples/test.npz", "both")
    )
    if file.name == "both":  # the settings, where the two files agree
        file = folder / "settings.json"
        settings = mutate_json(rng, json.loads(file.read_text()))
        file.write_bytes(text_of(settings))
        result = json.loads((folder / "result.json").read_text()) | {"settings": settings}
        (folder / "result.json").write_bytes(text_of(result))
    elif file.suffix == ".npz" or rng.random() < 0.3:
        file.write_bytes(mutate_bytes(rng, file.read_bytes()))
    else:
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        n = rng.randrange(len(lines))
        lines[n] = mutate_json(rng, lines[n])
        file.write_bytes(b"\n".join(map(text_of, lines)))
    return file


def commands(folder, out, rng):
    runs = folder.parents[2]
    measure = rng.choice(([], [], ["--measure", "exact_match"], ["--measure", "recall"], ["--split", "test"]))
    task = folder.parent.name
    targets = {"xnli": ["table7", "figure1", "figure6"], "qam": ["table3", "figure7"]}.get(task, ["table4", "figure5"])
    make = ["make", *targets, "--tasks", task, "--seeds", 1, "--model", folder, "--data", folder, "--runs", runs]
    return [["table", runs, *measure], ["curves", runs], ["report", runs, "--out", out], [*make, "--out", out]]


def stand_ins(patch):
    """`make` without a model and data, which takes the runs for its own; no figure is drawn."""
    config = type("Config", (), {"num_hidden_layers": 12})
    known = {"languages": list(LANGUAGES), "data_sha256": "0" * 64, "model_sha256": "1" * 64}
    patch.setattr(arguments, "misplaced", lambda command, args: None)  # there is no folder "m"
    patch.setattr(grid, "read_config", lambda file: config)
    patch.setattr(grid, "contents_of", lambda run: (known, {"test": "2" * 64}))
    patch.setattr(grid, "start", lambda run: None)
    patch.setattr(grid, "draw", numbers_alone)
    patch.setattr(report, "draw", numbers_alone)
    patch.setattr("os.fsync", lambda file: None)


@pytest.mark.parametrize(("pair", "seed"), [("xnli", 1), ("ner", 2), ("mlqa", 3), ("qam", 4)], indirect=["pair"])
def test_no_damage_is_a_bug(pair, tmp_path, run_main, monkeypatch, seed):
    """Each command does what it does, or says in one line which run is damaged."""
    stand_ins(monkeypatch)
    planned = {}
    monkeypatch.setattr(grid, "planned", lambda args, do=grid.planned: planned or planned.update(do(args)) or planned)
    rng, whole, refused = random.Random(seed), {f: f.read_bytes() for f in pair.rglob("*") if f.is_file()}, 0
    for n in range(60):
        file = damage(rng, pair / "df-seed1") if n else pair
        for command in rng.sample(commands(pair, tmp_path / "out", rng), 2 if n else 4):
            forget()
            try:
                result = run_main(*command)
            except Exception as e:
                raise AssertionError(f"{n}: {command} of {file}: {file.read_bytes()[:2000] if n else ''}") from e
            lines = [line for line in result.err.splitlines() if not re.match(r"run \d+ of ", line)]
            assert (result.status, len(lines)) in ((0, 0), (2, 1)), (n, result)
            if lines and "these runs have no such" not in lines[0]:
                assert n > 0, lines
                assert str(pair / "df-seed1") in lines[0] and "nothing is lost" not in lines[0], (n, lines)
                refused += 1
        for name, content in whole.items():
            name.write_bytes(content)
    assert 30 < refused < 120  # neither is everything refused nor nothing


def test_read_result_is_of_the_file_alone(pair):
    """Whatever was damaged: read again, it is what the file says."""
    file = pair / "df-seed1" / "result.json"
    assert read_result(file) == json.loads(file.read_text())


def test_a_source_of_any_length_is_cut(pair):
    """Both files agree in it: then it is the scores that lack it."""
    for name, at in (("settings.json", ()), ("result.json", ("settings",))):
        file = pair / "df-seed1" / name
        value = json.loads(file.read_text())
        (value[at[0]] if at else value)["source"] = "x" * 5000
        file.write_text(json.dumps(value))
    with pytest.raises(InputError, match="has no score of 'xxx") as e:
        read_result(pair / "df-seed1" / "result.json")
    assert len(str(e.value)) < 500 + 2 * len(str(pair))
