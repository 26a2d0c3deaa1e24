"""One command a table or figure: which runs there are, that they run, and what several processes make of it."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
from conftest import LANGUAGES, contents, sentences, write_squad, write_wikiann, write_xnli
from made_up import PAPERS, run_of, write
from safetensors.torch import load_file, save_file
from test_tables import NUMBERS

import data
import eval as measures
import model as xlmr
import paper.run
from paper import folder, grid
from paper.arguments import parse
from paper.figures import FIGURES
from paper.finished import lines_of
from paper.options import TASKS

TINY = (
    "--max-updates 1 --batch-size 8 --gap-every 1 --cka-every 1 --log-every 1 --window 1 --gap-examples 4 "
    "--save-every 0 --precision fp32 --device cpu --lr 1e-3"
)
TABLES = [f"table{n}" for n in range(1, 9)]


pytestmark = pytest.mark.usefixtures("one_thread")


def write_data(folder):
    """All four tasks: 24 dev examples a language, for 20 are drawn of them, and as few languages as there can be."""
    write_xnli(folder, dev=24, test=12)
    for split, size in (("dev", 24), ("test", 8)):
        for x in ("de", "en"):
            write_squad(folder / "MLQA_V1" / split / f"{split}-context-{x}-question-{x}.json", x, x, size)
    write_squad(folder / "squad" / "train-v1.1.json", "en", "en", 24)
    for x in ("de", "en"):
        write_wikiann(folder / "panx_dataset" / f"{x}.tar.gz", x, {"train": 24, "dev": 24, "test": 8})
    (folder / "xglue" / "QAM").mkdir(parents=True)
    for x in LANGUAGES:
        for split in ("train", "dev", "test"):
            rows = [(*sentences(x, i), str(i * 5 % 7 % 2)) for i in range(24)]
            text = "".join("\t".join(row) + "\n" for row in rows)
            (folder / "xglue" / "QAM" / f"{x}.{split}.tsv").write_text(text)


@pytest.fixture(scope="module")
def where(make_model, tmp_path_factory):
    """A model of 3 layers and a data folder: where.options(RUNS, ...) are the options of `make` and `plan`."""
    place = tmp_path_factory.mktemp("targets")
    (place / "data").mkdir()
    write_data(place / "data")
    model = make_model(max_position_embeddings=200, num_hidden_layers=3)

    def options(runs, *more, args=TINY, seeds=(1,)):
        args = f"{args} --cache {place / 'cache'}"
        return ["--seeds", *seeds, "--model", model, "--data", place / "data", "--runs", runs, "--args", args, *more]

    return SimpleNamespace(folder=place, model=model, options=options)


def planned(*arguments):
    """{folder: the options of its run} of what `make` would run."""
    return grid.planned(parse(["make", *map(str, arguments)])[1])


def refused(result, *says):
    """The command ended with status 2 and, after the lines that show progress, one that says this."""
    assert result.status == 2 and "Traceback" not in result.err, result
    lines = [line for line in result.err.splitlines() if not re.match(r"run \d+ of \d+: |.*left out: ", line)]
    assert len(lines) == 1 and lines[0].startswith("paper: "), result.err
    assert all(str(text) in lines[0] for text in says), lines


# --- which runs there are ------------------------------------------------------------------------------------

# The figures' tasks and lines: what their captions and axes say in the paper.
THREE = ("xnli", "mlqa", "ner")
LINES = {
    "figure1": (["xnli"], ["df", "fs", "ff", "slowfast"]),
    "figure2": (THREE, ["df"]),
    "figure3": (THREE, ["df", *(f"{kind}-layer-{i}" for kind in ("freeze", "reinit") for i in range(3))]),
    "figure4": (THREE, ["df", "last-1", "last-2", "last-3"]),
    "figure5": (["mlqa", "ner"], ["df", "slowfast"]),
    "figure6": (THREE, ["df"]),
    "figure7": (["qam"], ["df", "slowfast"]),
}


def needed(*targets):
    """{(task, method, shots, c1, c2, r)} of all numbers in these tables and lines in these figures, and of the df runs
    that they are compared with."""
    wanted = [(n.task, n.settings) for n in NUMBERS if n.table in targets and n.mean is not None]
    wanted += [(n.task, {"method": "df", "shots": n.settings.get("shots", 0)}) for n in NUMBERS if n.table in targets]
    of_figures = [LINES[target] for target in targets if target in LINES]
    wanted += [(task, {"method": method}) for tasks, methods in of_figures for task in tasks for method in methods]
    return {(task, *(PAPERS | settings).values()) for task, settings in wanted}


@pytest.mark.parametrize("target", [*TABLES, *LINES, "tables", "figures"])
def test_the_runs_of_a_target(where, target):
    """What it shows, each once, and nothing else: targets share runs."""
    runs = planned(target, *where.options("R")).values()
    targets = {"tables": TABLES, "figures": list(LINES)}.get(target, [target])
    assert sorted((run.task, *(getattr(run, k) for k in PAPERS)) for run in runs) == sorted(needed(*targets))
    assert list(FIGURES) == list(LINES) and len(runs) > 1


def test_what_a_run_is_says_where_it_lies(where):
    for folder_of_run, run in planned("table2", "table5", "--tasks", "ner", *where.options("R")).items():
        assert (run.task, run.setup, run.max_updates, run.lr, run.policy4) == ("ner", "paper", 1, 1e-3, "off")
        *_, setup, task, model, name = folder_of_run.parts
        assert (setup, task, model) == ("paper", "ner", where.model.name)
        assert name.split("-")[0] == run.method and name.endswith("-seed1")
        for k, value in PAPERS.items():  # what is not the paper's is named
            assert k == "method" or (f"-{k}={getattr(run, k)}-" in name) == (getattr(run, k) != value)
    other = planned("table2", "table5", "--tasks", "ner", *where.options("R", args="--lr 2e-3"))
    assert not other.keys() & planned("table2", "table5", "--tasks", "ner", *where.options("R")).keys()


def test_the_first_seed_comes_first(where):
    runs = planned("table3", "table4", *where.options("R", seeds=(3, 1, 3))).values()
    assert [run.seed for run in runs] == [3] * 8 + [1] * 8


def test_the_setup_gives_what_the_options_do_not(where):
    *_, run = planned("table3", "--model", where.model, "--setup", "small", "--args", "--batch-size 7").values()
    assert (run.setup, run.source, run.languages, run.batch_size, run.lr) == ("small", "de", "de", 7, 5e-5)
    assert (run.discard, run.seed) == (True, 4)


def pretend(of_run, run):
    """Writes a finished run that nobody made, with the settings of this one."""
    known, tests = grid.contents_of(run)
    scores = dict.fromkeys(known["languages"], 1.0)
    made = run_of(dict.fromkeys(("dev", *tests), scores), split=None, **run.settings)
    made["settings"] |= known | {"precision": "fp32"}
    for name, digest in tests.items():
        made[name]["data_sha256"] = digest
    write(of_run.parent, made)
    (of_run.parent / "run0").rename(of_run)


def test_plan_counts_what_is_there(where, tmp_path, run_main):
    options = where.options(tmp_path / "runs", seeds=(1, 2))
    runs = planned("table3", "figure1", *options)
    for of_run, run in list(runs.items())[:3]:
        pretend(of_run, run)
    result = run_main("plan", "table3", "figure1", *options)
    rows = [line.split() for line in result.out.splitlines()]
    assert result.status == 0 and result.err == "", result
    assert rows == [["task", "runs", "there", "lacking"], ["XNLI", "8", "1", "7"], ["QAM", "4", "2", "2"]]


# --- making them ---------------------------------------------------------------------------------------------


def tables_in(text):
    """{"table6": {row: its cells of our runs}} of what `make` printed."""
    found = {}
    for number, block in re.findall(r"^Table (\d)\. [^\n]*\n\n(.*?)\n\n", text, re.M | re.S):
        rows = [re.split(" {2,}", line) for line in block.splitlines() if not line.startswith("  ")]
        found[f"table{number}"] = {row: cells for row, *cells in rows}
    return found


@pytest.mark.parametrize(
    "command", ["tables figures --tasks ner qam", "table7 figure1 --tasks xnli", "table4 --tasks mlqa"]
)
def test_every_target_runs(where, tmp_path, run_main, monkeypatch, command):
    """Each table and figure, each method and constant, and each task; made again, nothing is run."""
    names, tasks = (part.split() for part in command.split(" --tasks "))
    command = [*names, *where.options(where.folder / "runs", "--out", tmp_path / "report"), "--tasks", *tasks]
    monkeypatch.setattr("os.fsync", lambda file: None)  # there are many
    result = run_main("make", *command)
    assert result.status == 0 and "Traceback" not in result.err, result.err[-2000:]
    runs = planned(*command)
    assert all(folder.is_there(of_run) for of_run in runs)
    assert not list((where.folder / "runs").rglob("*.safetensors"))
    targets = [*TABLES, *LINES] if "tables" in names else names
    shown = re.findall(r"^(Table|Figure) (\d)\. ", result.out, re.M)
    assert ["".join(pair).lower() for pair in shown] == targets
    files = {f"{target}.{kind}" for target in targets if target in LINES for kind in ("csv", "png", "svg")}
    assert {file.name for file in (tmp_path / "report").glob("*")} == files
    tables = tables_in(result.out)
    assert list(tables) == [target for target in targets if target in TABLES]
    for table, rows in tables.items():
        for row, cells in rows.items():
            numbers = [n for n in NUMBERS if (n.table, n.row) == (table, row) and n.task in tasks and n.mean]
            there = sum(table != "table7" or n.quantity in LANGUAGES for n in numbers)  # XNLI in as many as there are
            assert sum(bool(re.fullmatch(r"\d+\.\d \(1\)", cell)) for cell in cells) == there, (table, row, cells)
    before = contents(where.folder / "runs")
    monkeypatch.setattr(grid, "start", lambda run: pytest.fail(f"{run} would run"))
    monkeypatch.setattr(grid, "draw", lambda name, setups, path: [])
    again = run_main("make", *command)
    assert (again.status, tables_in(again.out)) == (0, tables)
    assert all("are not there and left out" in line for line in again.err.splitlines())  # languages that nobody made
    assert contents(where.folder / "runs") == before


def test_weights_are_kept_if_it_is_asked_for(where, tmp_path, run_main):
    assert run_main("make", "table3", *where.options(tmp_path / "runs", "--keep", "--out", tmp_path)).status == 0
    assert len(list((tmp_path / "runs").rglob("best/model.safetensors"))) == 2


# --- which runs are those that would be made -----------------------------------------------------------------


def other_data(place, file, text):
    """A copy of the data in which a file ends with another text."""
    data = shutil.copytree(place.folder / "data", place.copy / "data")
    with open(data / file, "a") as opened:
        opened.write(text)
    return ["--data", data]


def other_weights(place):
    """A model of the same name and sizes."""
    model = shutil.copytree(place.model, place.copy / place.model.name)
    weights = load_file(model / "model.safetensors")
    name = next(name for name in weights if name.endswith("LayerNorm.weight"))
    weights[name][0] += 1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    return ["--model", model]


def other_settings(place, finished=True, **changes):
    for of_run in place.runs if not finished else ():
        (of_run / "result.json").unlink()
    for file in [file for of_run in place.runs for file in of_run.glob("*.json")]:
        whole = json.loads(file.read_text())
        whole.get("settings", whole).update(changes)
        file.write_text(json.dumps(whole))
    return []


OTHERS = {  # what is not as it was when the runs were made, and what the message says
    "training data": (lambda place: other_data(place, "xglue/QAM/en.train.tsv", "dog\tcat\t1\n"), "(data_sha256 "),
    "dev data": (lambda place: other_data(place, "xglue/QAM/fr.dev.tsv", "chat\tchien\t1\n"), "(data_sha256 "),
    "test data": (lambda place: other_data(place, "xglue/QAM/fr.test.tsv", "chat\tchien\t1\n"), "(test.data_sha256 "),
    "weights": (other_weights, "(model_sha256 "),
    "lr": (lambda place: other_settings(place, lr=0.5), "(lr 0.5 there and 0.001 here)"),
    "unfinished": (lambda place: other_settings(place, False, lr=0.5), "(lr 0.5 there and 0.001 here)"),
    "clip": (lambda place: other_settings(place, clip=2.0), "(clip 2.0 there and 1.0 here)"),
    "a moved folder": (lambda place: other_data(place, "xglue/QAM/NOTES", "copied"), None),
    "a device's precision": (lambda place: ["--args", place.args.replace("--precision fp32", "")], None),
}  # fmt: skip


@pytest.mark.parametrize("what", OTHERS)
def test_make_does_not_take_another_run_for_the_one_it_would_make(where, tmp_path, run_main, monkeypatch, what):
    """By its name alone they are the same; nothing is shown, and nothing is run."""
    options = where.options(tmp_path / "runs", "--out", tmp_path / "report")
    runs = planned("table3", *options)
    for of_run, run in runs.items():
        pretend(of_run, run)
    place = SimpleNamespace(copy=tmp_path / "copy", runs=runs, args=options[options.index("--args") + 1], **vars(where))
    place.copy.mkdir()
    change, says = OTHERS[what]
    options += change(place)
    monkeypatch.setattr(grid, "start", lambda run: pytest.fail(f"{run} would run"))
    for command in ("make", "plan"):
        before, result = contents(tmp_path / "runs"), run_main(command, "table3", *options)
        if says:
            refused(result, f"{next(iter(runs))} holds another run {says}", "; give another --runs, or remove it")
            assert result.out == ""
        else:
            assert (result.status, result.err) == (0, "") and ("1.0 (1)" in result.out or command == "plan")
        assert contents(tmp_path / "runs") == before


def test_a_damaged_run_is_named_before_any_is_made(table3, monkeypatch):
    make, folders = table3
    folders["slowfast"].mkdir(parents=True)
    (folders["slowfast"] / "result.json").write_text("{")
    monkeypatch.setattr(grid, "start", lambda run: pytest.fail(f"{run} would run"))
    refused(make()[0], folders["slowfast"] / "result.json")


def test_make_measures_what_was_not_tested(where, tmp_path, run_main):
    """Of runs that were made with --no-test. If their weights were kept; if not, it says so before anything is run."""
    options = where.options(tmp_path / "runs", "--out", tmp_path / "report")
    untested = where.options(tmp_path / "runs", "--out", tmp_path / "report", args=f"{TINY} --no-test")
    assert run_main("make", "table3", "--keep", *untested).status == 0
    assert run_main("plan", "table3", *options).out.splitlines()[-1].split() == ["QAM", "2", "0", "2"]
    result = run_main("make", "table3", *options)
    assert result.status == 0 and "run 2 of 2" in result.err, result.err
    df, slowfast = (json.loads((of_run / "result.json").read_text()) for of_run in planned("table3", *options))
    assert set(df["test"]["scores"]) == set(slowfast["test"]["scores"]) == {"de", "en", "fr"}
    assert "-" not in tables_in(result.out)["table3"]["df"]
    assert run_main("make", "table3", *options).err == ""
    shutil.rmtree(tmp_path / "runs")
    assert run_main("make", "table3", *untested).status == 0
    before = contents(tmp_path / "runs")
    refused(run_main("make", "table3", *options), "was not measured on test, and its weights were not kept")
    assert contents(tmp_path / "runs") == before


def test_make_wants_in_the_log_what_a_figure_shows(where, tmp_path, run_main):
    """--cka-every is no part of a run's name. What a figure would not have is said before anything is run."""

    def options(args):
        return ["figure6", "--tasks", "ner", *where.options(tmp_path / "runs", "--out", tmp_path, args=args)]

    without = options(TINY.replace("--cka-every 1", "--cka-every 0"))
    refused(run_main("make", *without), "figure6 shows the linear CKA", "give --args '--cka-every N'")
    assert not (tmp_path / "runs").exists()
    (of_run,) = planned(*without)
    pretend(of_run, planned(*without)[of_run])
    text = (of_run / "log.jsonl").read_text()
    assert run_main("plan", *options(TINY)).status == 0
    lines_of.cache_clear()
    (of_run / "log.jsonl").write_text(re.sub(r', "cka": [^\]]*]', "", text))
    refused(run_main("make", *options(TINY)), f"{of_run} is without: remove it and give --args '--cka-every N'")


# --- several processes, and stops ----------------------------------------------------------------------------


@pytest.fixture
def hold(start_command):
    """hold(FOLDER): another process that holds the folder's lock, until it is killed."""
    pytest.importorskip("fcntl")
    code = """import sys, pathlib, paper.folder
with paper.folder.alone(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()"""

    def start(of_run):
        of_run.mkdir(parents=True, exist_ok=True)
        process = start_command(of_run, code=code)
        assert process.stdout.readline() == "held\n"
        return process

    return start


@pytest.fixture
def table3(where, tmp_path, run_main):
    """(f() that makes Table 3: the Result and {row: cells of its runs}, {method: folder}): two runs of QAM."""
    options = ["table3", *where.options(tmp_path / "runs", "--out", tmp_path / "report")]

    def make():
        result = run_main("make", *options)
        assert "Traceback" not in result.err, result.err
        return result, {row: set(cells) for row, cells in tables_in(result.out).get("table3", {}).items()}

    return make, {run.method: of_run for of_run, run in planned(*options).items()}


def test_what_is_advised_where_a_folder_is_not_a_runs_is_of_make(table3, where, tmp_path, run_main):
    make, runs = table3
    runs["df"].mkdir(parents=True)
    (runs["df"] / "thesis.txt").write_text("text")
    refused(make()[0], runs["df"], "not a run's directory; give another folder (--out of `run`, --runs of `make`)")
    assert run_main("make", "table3", *where.options(tmp_path / "others", "--out", tmp_path / "report")).status == 0


@pytest.mark.parametrize("just_before", [False, True])
def test_make_leaves_a_run_to_the_process_that_is_at_it(table3, hold, monkeypatch, just_before):
    """Of two that begin at once both may see that the first run is free, and both read the data: then one locks it."""
    make, folders = table3
    process = hold(folders["df"])
    with monkeypatch.context() as patch:
        if just_before:
            patch.setattr(grid, "is_taken", lambda out: False)
        result, shown = make()
    assert result.status == 0 and result.messages[-1:] == [
        "paper: another process is at 1 of these runs; the same command shows them when it is done"
    ]
    assert shown["df"] == {"-"} and "-" not in shown["slowfast"]
    assert [file.name for file in folders["df"].iterdir()] == ["lock"]
    process.kill()
    process.wait(timeout=60)
    result, shown = make()
    assert result.status == 0 and result.messages == [] and "-" not in shown["df"]


def test_make_goes_on_if_another_process_finishes_a_run_just_before_it(table3, monkeypatch):
    """After both have read the data, one of them locks the run and ends it before the other asks for the lock."""
    make, folders = table3
    real, begun, others = paper.run.alone, [], []

    def alone(out):
        if out == folders["df"] and not others:
            others.append(out)
            paper.run.start(begun[-1])
        return real(out)

    monkeypatch.setattr(paper.run, "alone", alone)
    monkeypatch.setattr(grid, "start", lambda options: begun.append(options) or paper.run.start(options))
    result, shown = make()
    assert result.status == 0 and others and result.messages == [], result.err
    assert len(begun) == 2 and "-" not in shown["df"] | shown["slowfast"]


def test_what_another_process_has_ended_meanwhile_is_not_said_to_be_elsewhere(table3, hold, where, monkeypatch):
    """It stands in the table."""
    make, folders = table3
    process, real, begun = hold(folders["df"]), grid.start, []

    def start(options):  # while ours is at slowfast, the other ends df
        process.kill()
        process.wait(timeout=60)
        real(next(run for of_run, run in planned("table3", *begun).items() if of_run == folders["df"]))
        real(options)

    begun += where.options(folders["df"].parents[4] / "runs")
    monkeypatch.setattr(grid, "start", start)
    result, shown = make()
    assert result.status == 0 and result.messages == [] and "-" not in shown["df"] | shown["slowfast"]


def test_make_goes_on_where_a_process_was_killed(table3, tmp_path):
    """Before anything of a run was there, and after its result was."""
    make, folders = table3
    assert make()[0].status == 0
    whole = contents(tmp_path / "runs")
    shutil.rmtree(folders["df"])
    folders["df"].mkdir()
    (folders["df"] / "settings.json.elsewhere.1.part").write_text("{")
    (folders["slowfast"] / "best-00000001").mkdir()
    for name in ("lock", "checkpoint-1.json", "checkpoint-2.safetensors", "best-00000001/config.json"):
        (folders["slowfast"] / name).write_text("")
    result, shown = make()
    assert result.status == 0 and result.messages == [] and "-" not in shown["df"] | shown["slowfast"]
    assert contents(tmp_path / "runs").keys() == whole.keys()


def test_make_goes_on_after_a_run_that_diverges(table3, monkeypatch):
    make, folders = table3

    def start(options):
        if options.method == "df":
            raise FloatingPointError("the loss is not finite")
        paper.run.start(options)

    monkeypatch.setattr(grid, "start", start)
    result, shown = make()
    assert result.status == 2 and shown["df"] == {"-"} and "-" not in shown["slowfast"]
    assert result.messages[-2:] == [f"paper: {folders['df']}: the loss is not finite",
                                    f"paper: 1 runs diverged and are not shown: {folders['df']}"]  # fmt: skip


def test_ctrl_c_in_make(table3, monkeypatch):
    """It stops the run with a checkpoint, and make with it; the same command goes on from there."""
    make, folders = table3
    real = xlmr.SequenceClassifier.forward

    def forward(self, *arguments, **options):
        if self.training and not folder.is_there(folders["slowfast"]) and folder.is_there(folders["df"]):
            raise KeyboardInterrupt
        return real(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(xlmr.SequenceClassifier, "forward", forward)
        result, _ = make()
    assert result.status == 130 and "goes on from here" in result.err
    assert folder.is_there(folders["df"]) and (folders["slowfast"] / "settings.json").is_file()
    result, shown = make()
    assert result.status == 0 and "-" not in shown["slowfast"]


# --- what the README says of adding to it ---------------------------------------------------------------------


def test_a_task_is_added_in_the_four_places_that_the_readme_names(where, tmp_path, run_main, monkeypatch):
    for known in (data.LOADERS, xlmr.HEADS, measures.MEASURES, TASKS):
        monkeypatch.setitem(known, "paws", known["qam"])
    runs, options = tmp_path / "runs", [*TINY.split(), "--cache", tmp_path / "cache"]
    for task, epochs in (("paws", 1), ("paws", 2), ("qam", 1)):  # whole epochs and a part, beside one of the paper's
        short = options if epochs == 2 else options[2:]
        of_run = ["--model", where.model, "--data", where.folder / "data", "--runs", runs, *short, "--epochs", epochs]
        assert run_main("run", task, *of_run, "--method", "df").status == 0
    for command in ("table", "curves"):
        result = run_main(command, runs)
        assert result.status == 0 and re.search(r"^paws \(a\)", result.out, re.M), result
    assert run_main("report", runs, "--out", tmp_path / "report").status == 0
    assert "paws (b)" in (tmp_path / "report" / "report.md").read_text()


# --- bad command lines ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [("--model", "none", "none"), ("--setup", "none", "none"), ("--data", "none", "none"), ("--tasks", "no", "--tasks"),
     ("--seeds", "-1", "--seed"), ("--seeds", "one", "--seed"), ("--args", "--lr x", "--lr"),
     ("--args", "--no-such 1", "--no-such"), ("--args", '--device "cpu', "--args"), ("--args", "--epochs 0", "--epoch"),
     ("--args", "--languages xx,en --precision fp32", "xx"), ("--args", "--out elsewhere", "--out"),
     ("--args", "--seed 5", "--seed is what the tables and figures themselves set")],
)  # fmt: skip
def test_what_make_does_not_take(where, tmp_path, run_main, monkeypatch, option, value, says):
    monkeypatch.chdir(tmp_path)
    refused(run_main("make", "table3", *where.options("runs"), f"{option}={value}"), says)
    assert list(tmp_path.iterdir()) == []
