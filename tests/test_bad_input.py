"""Every bad input, and the one line that it gets, through the real command line: the arguments, the Makefile, the files
of data, of a model and of runs; what a signal or a full disk does; and that a message names nothing that there is not.

What is wrong with the arguments alone is said without torch: these commands run on the standard library (python -S).
"""

import ast
import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import ROOT
from made_up import run_of, write
from test_data import TAGGED, squad, wikiann

import data
import demo.e5
import paper.bench
import paper.run
from paper import fetch
from paper.arguments import COMMANDS, FETCHED, TARGETS, parse
from paper.options import FIELDS, TASKS, TESTS
from paper.tables import column, columns_of

pytestmark = pytest.mark.usefixtures("one_thread")
HELP = r" \(--help tells more\)$"


def one_line(status, out, err, says):
    assert (status, out) == (2, "") and err.count("\n") == 1 and re.search(says, err), err


def alone(*command, cwd):
    """A command on the standard library alone: (status, stdout, stderr)."""
    done = subprocess.run(
        [sys.executable, "-S", *map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


# --- arguments -----------------------------------------------------------------------------------------------

RUN = "run xnli --model m "
CHOICES = {"setup": "large", "select": "de", "phase": "both", "policy4": "maybe", "precision": "fp16"}
RANGES = {
    "c1": "a number from 0 to 1", "c2": "a number from 1 to 1000", "r": "a number above 0 to 10",
    "threshold": "a number from 0 to 100", "fraction": "a number from 0 to 1", "lr": "a number from 0 to 1",
    "warmup": "a number from 0 to 1", "clip": "a number from 0 to 1000000", "dropout": "a number from 0 to 0.99",
    "attention_dropout": "a number from 0 to 0.99", "seed": "a whole number from 0 to 4294967295",
    "shots": "a whole number from 0 to 1000000", "window": "a whole number from 1 to 1000000",
    "batch_size": "a whole number from 1 to 100000", "epochs": "a whole number from 1 to 100000",
    "micro_batch": "a whole number from 1 to 100000", "max_length": "a whole number from 5 to 8192",
    **dict.fromkeys(("stride", "max_question"), "a whole number from 1 to 8192"),
    **dict.fromkeys(("eval_every", "gap_every", "cka_every", "save_every"), "a whole number from 0 to 1000000000"),
    **dict.fromkeys(("max_updates", "dev_examples", "gap_examples", "log_every", "eval_tokens"),
                    "a whole number from 1 to 1000000000"),
}  # fmt: skip
NAMES = {
    **dict.fromkeys(("model", "data", "runs", "out", "cache"), ("the name of a folder", ["", " ", "\n"])),
    "languages": ("a list of names such as en,de", ["", ",", "en;de", "EN", "../en", "en,dé"]),
    "tests": ("a list of names such as en,de", ["", "test;xquad", "Test"]),
    "source": ("a language such as en", ["", "en,de", "EN", "e n", "../en"]),
    "device": ("a device: cpu, cuda or cuda:N", ["", "gpu", "cuda:", "cuda:-1", "CPU", "meta", "cuda:1000"]),
}
NOT_NUMBERS = "nan|NaN|inf|-inf|infinity|1e|one|0x10|1_000|1,5|٣|| |5 | 5|1e999|-1e-5|1j|1/2|true".split("|")
HUGE = ["9" * 400, "1" + "0" * 5000]


def flag(name):
    return "--" + name.replace("_", "-")


def test_every_option_is_in_these_tables():
    given = {name for name, f in FIELDS.items() if "help" in f.metadata and f.metadata["more"].get("action") is None}
    assert given == {*RANGES, *NAMES, *CHOICES, "task", "method"}


@pytest.mark.parametrize("name", RANGES)
def test_a_number_is_named_with_its_value_and_its_range(name, capsys):
    """In this process: the same for all commands (the table below runs one of each in its own)."""
    low, high = (float(x) for x in re.findall(r"[\d.]+", RANGES[name]))
    whole, above = "whole" in RANGES[name], "above" in RANGES[name]
    step = 1 if whole else 1e-9
    outside = [f"{low - 1:g}", f"{high + 1:.0f}" if whole else f"{high * 1.001}", *HUGE, *(["0"] if above else [])]
    task = "mlqa" if name in ("stride", "max_question", "max_length") else "xnli"
    for value in [*NOT_NUMBERS, *outside, *(["1.5", "1e3", "+5", "-0"] if whole else ["1e300", "-1e300", "0x1p3"])]:
        with pytest.raises(SystemExit) as stopped:
            parse(["run", task, "--model", "m", f"{flag(name)}={value}"])
        says = re.escape(f"paper: argument {flag(name)}: {value[:40]!r} is not {RANGES[name]}") + HELP
        one_line(stopped.value.code, *capsys.readouterr(), " ".join(says.split()))
    inside = [low + step if above else low, low + 2 * step, high]
    if task == "xnli":
        for value in (f"{x:.0f}" if whole else repr(x) for x in inside):
            assert getattr(parse(["run", task, "--model", "m", flag(name), value])[1], name) == float(value)


def test_what_is_accepted():
    """The paper's own values (Table 5), and lists as people write them."""
    for text in ("--c1 0", "--c1 0.5", "--c2 100", "--c2 5", "--r 4", "--lr 3e-5", "--lr .1", "--lr 1.", "--lr 5E-6"):
        parse((RUN + text).split())
    for text in ("en, de", "en de", " en ,de,", "en,de,en"):
        assert parse([*RUN.split(), "--languages", text])[1].languages == "en,de"
    run = parse("run mlqa --model m --tests".split() + ["test, xquad"])[1]
    assert (run.tests, run.directory.name) == ("test,xquad", "slowfast-seed1")
    assert parse([*RUN.split(), "--out", "a b"])[1].out == "a b"


ARGUMENTS = {
    # a command line: what it says
    "": "the following arguments are required: COMMAND",
    "frobnicate": "argument COMMAND: invalid choice: 'frobnicate'",
    "run": "the following arguments are required: task, --model",
    "run mnli --model m": "argument task: invalid choice: 'mnli' .*xnli.*mlqa.*ner.*qam",
    "run xnli": "the following arguments are required: --model",
    RUN + "--frobnicate 1": "unrecognized arguments: --frobnicate 1",
    RUN + "--max 5": "ambiguous option: --max could match --max-updates, --max-length, --max-question",
    RUN + "--lr": "argument --lr: expected one argument",
    RUN + "--lr=--": "argument --lr: expected one argument",
    RUN + "--lr -1e-5": "argument --lr: '-1e-5' is not a number from 0 to 1",
    RUN + "--lr -inf": "argument --lr: '-inf' is not a number from 0 to 1",
    RUN + "--c1 2": "argument --c1: '2' is not a number from 0 to 1",
    RUN + "--c2 0.1": "argument --c2: '0.1' is not a number from 1 to 1000",
    RUN + "--lr 1e300": "argument --lr: '1e300' is not a number from 0 to 1",
    RUN + "--seed 1180591620717411303424": "argument --seed: '11805.*24' is not a whole number from 0 to 4294967295",
    RUN + "--method slow": "argument --method: 'slow' is not a method; there are df, .*freeze-layer-i and",
    RUN + "--method freeze-layer-24": ".*'freeze-layer-24' is not a method; .*, i from 0 to 23",
    **{RUN + f"{flag(name)} {value}": f"argument {flag(name)}: invalid choice: '{value}'"
       for name, value in CHOICES.items()},
    RUN + "--stride 8": "--stride is an option of mlqa, not of xnli",
    "run ner --model m --max-question 8": "--max-question is an option of mlqa, not of ner",
    RUN + "--tests test,xquad": "--tests test,xquad: xnli has no test set 'xquad'; there are test",
    "run mlqa --model m --tests devs": ".*mlqa has no test set 'devs'; there are test, xquad, squad, test-7x7, dev-7x7",
    "run mlqa --model m --source de": "--source de: question answering is trained on SQuAD, which is English",
    RUN + "--languages de,fr": "--languages de,fr lacks en, the source: the gap is measured from it",
    "run qam --model m --setup small --source en": "--languages de lacks en, the source",
    "run mlqa --model m --max-length 64": "--max-length 64 leaves 0 pieces .* --max-question 64, fewer than the",
    "run mlqa --model m --stride 317": "--max-length 384 leaves 316 pieces .*, fewer than the --stride 317",
    "run mlqa --model m --max-question 300": "--max-length 384 leaves 80 pieces .* fewer than the --stride 128",
    "make": "the following arguments are required: TARGET, --model",
    "make table99 --model m": "argument TARGET: invalid choice: 'table99'",
    "make table1": "the following arguments are required: --model",
    "make table6 --model m --tasks qam": "table6 is about xnli, mlqa, ner: --tasks qam leaves nothing of it",
    "make tables table3 --model m --tasks ner": "table3 is about qam: --tasks ner leaves nothing of it",
    "plan figure5 --model m --tasks xnli qam": "figure5 is about mlqa, ner: --tasks xnli qam leaves nothing of it",
    "make table6 --model m --tasks no": "argument --tasks: invalid choice: 'no'",
    "make table6 --model m --setup no": "argument --setup: invalid choice: 'no' .*paper.*small.*demo",
    "make table6 --model m --seeds": "argument --seeds: expected at least one argument",
    "make table6 --model m --seeds 1 x": "argument --seeds: 'x' is not a whole number from 0 to 4294967295",
    "make table6 --model m --args=--no-such": "unrecognized arguments: --no-such",
    "make table6 --model m --args=--lr=x": "argument --lr: 'x' is not a number from 0 to 1",
    "make table6 --model m --args=--device='cpu": "--args --device='cpu: No closing quotation",
    **{f"make table6 --model m --args={option}": f"--args {option}: {option.split('=')[0]} is what the tables and "
       "figures themselves set" for option in ("--seed=5", "--c1=0.5", "--method=fs", "--shots=5", "--out=x")},
    "report": "the following arguments are required: runs",
    "table runs --frobnicate": "unrecognized arguments: --frobnicate",
    "curves": "the following arguments are required: runs",
    "fetch everything": "argument what: invalid choice: 'everything' .*xlm-roberta-base",
    # folders that are not there, and files where folders should be
    RUN: "--model m: there is no such folder; `python -m paper fetch xlm-roberta-base` fetches one into models/",
    "run xnli --model file": "--model file is a file: give the folder that it lies in",
    "run xnli --model here --data here": "No module named .*: take .venv/bin/python, or pip install",
    "run xnli --model here --data none": "--data none: there is no such folder; `python -m paper fetch TASK --data",
    "run xnli --model here --data file": "--data file is a file: give the folder",
    "make table6 --model none": "--model none: there is no such folder",
    "plan table2 --model none": "--model none: there is no such folder",
    **{f"{command} here none": "none: there is no such folder" for command in ("table", "curves", "report")},
    "table file": "file is a file: give the folder that it lies in",
    f"table {'n' * 5000}": "n{5000}: there is no such folder",
    "run xnli --model here --data here --out file": "--out file is a file: give a folder",
    "run xnli --model here --data here --cache file": "--cache file is a file: give a folder",
    "make table6 --model here --data here --runs file": "--runs file is a file: give a folder",
    "report here --out file": "--out file is a file: give a folder",
    "fetch xnli --data file": "--data file is a file: give a folder",
}  # fmt: skip


@pytest.mark.parametrize("line", ARGUMENTS, ids=lambda line: line.strip() or "nothing")
def test_what_is_wrong_with_the_arguments_is_said_without_torch(line, tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "file").touch()
    one_line(*alone("-m", "paper", *line.split(), cwd=tmp_path), f"^paper: {ARGUMENTS[line]}")
    assert {file.name for file in tmp_path.iterdir()} == {"here", "file"}


def test_of_several_processes_one_speaks(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    for line in (RUN, RUN + "--lr x", "make table9 --model m"):
        assert alone("-m", "paper", *line.split(), cwd=tmp_path) == (2, "", "")


@pytest.mark.parametrize("main", [demo.e5.main, paper.bench.main], ids=["demo.e5", "paper.bench"])
def test_the_other_command_lines(main, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["a", "--frobnicate"])
    one_line(stopped.value.code, *capsys.readouterr(), "^(demo.e5|paper): unrecognized arguments: .*--frobnicate")


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_none(name, capsys):
    what, values = NAMES[name]
    for value in values:
        with pytest.raises(SystemExit) as stopped:
            parse(["run", "xnli", "--model", "m", f"{flag(name)}={value}"])
        says = " ".join(re.escape(f"paper: argument {flag(name)}: {value!r} is not {what}").split())
        one_line(stopped.value.code, *capsys.readouterr(), says + HELP)


def test_the_tables_of_arguments_are_those_of_the_modules_that_need_more():
    assert FETCHED == fetch.NAMES and TESTS["mlqa"] and {*TASKS} == {*data.LOADERS}
    for table, (_, tasks) in TARGETS.items():
        if table.startswith("table"):
            assert {column(table, name)[0] for name in columns_of(table)} == {*tasks}
    for task in TASKS:
        for name in TESTS.get(task, ("test",)):
            assert data._only([name], task, *TESTS.get(task, ("test",))) is None


# --- the Makefile --------------------------------------------------------------------------------------------

MAKE = {
    "demo TASK=foo": "argument task: invalid choice: 'foo'",
    "demo ARGS=--lr": "argument --lr: expected one argument",
    "TASK=foo": "argument task: invalid choice: 'foo'",  # the first target is demo
    "xnli METHODS=foo": "'foo' is not a method",
    "xnli METHODS=": "METHODS is empty",
    "ner SEEDS=one": "argument --seed: 'one' is not a whole number",
    "qam SETUP=large": "argument --setup: invalid choice: 'large'",
    "mlqa SHOTS=-1": "argument --shots: '-1' is not a whole number",
    "xnli MODEL=models/none": "MODEL=models/none: no model.safetensors is in it, and what can be fetched are",
    "table6 TASKS=qam": "table6 is about xnli, mlqa, ner: --tasks qam leaves nothing of it",
    "figure1 TASKS=": "TASKS is empty",
    "tables TASKS=foo": "argument --tasks: invalid choice: 'foo'",
    "figures SEEDS=": "SEEDS is empty",
    "plan TARGETS=table9": "argument TARGET: invalid choice: 'table9'",
    "xnli MODEL=my\\ model": "MODEL=my model has a space in it, which make cannot take: give a link",
    "table6 DATA=my\\ data": "DATA=my data has a space in it",
    "xnli ARGS=--seed=7": "ARGS has --seed: give METHODS, SEEDS, SETUP, MODEL, DATA or SHOTS",
    "qam ARGS='--lr 1e-5 --runs other'": "ARGS has --runs",
    "table3 ARGS='--languages de'": "--languages de lacks en, the source",
}


@pytest.fixture(scope="module")
def makefile(tmp_path_factory):
    """A folder with the Makefile and what its checks need, and nothing installed."""
    folder = tmp_path_factory.mktemp("make")
    for file in (ROOT / "Makefile", *ROOT.glob("requirements*.txt")):
        shutil.copy(file, folder)
    shutil.copytree(ROOT / "paper", folder / "paper", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def make(folder, *arguments):
    command = ["make", "-n", f"PYTHON={sys.executable} -S", *arguments]  # -n: should a check fail, nothing is fetched
    outer = {
        name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))
    }  # make test's
    done = subprocess.run(command, cwd=folder, env=outer, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("line", MAKE)
def test_make_says_what_is_wrong_before_it_installs_or_downloads(makefile, line):
    one_line(*make(makefile, *shlex.split(line)), rf"^Makefile:\d+: \*\*\* .*{MAKE[line]}.*Stop\.$")


def test_make_goes_on_where_nothing_is_wrong(makefile):
    lines = ("demo TASK=qam", "xnli SHOTS=5 SEEDS=1", "table6 TASKS=ner SETUP=small", "plan TARGETS=figure5 TASKS=ner",
             "table3 ARGS='--source de --max-length 60'", """table3 ARGS='--languages "en, de"'""")  # fmt: skip
    for line in lines:
        status, out, err = make(makefile, *shlex.split(line))
        assert status == 0 and "-m venv .venv" in out and err == ""
    mine = makefile / "mine"
    mine.mkdir()
    (mine / "model-00001-of-00002.safetensors").touch()  # not by its name alone is a model one that is there
    for task, model in (("xnli", "mine/"), ("qam", f"{mine}/../mine")):
        status, out, err = make(makefile, task, "SEEDS=1", "METHODS=df", f"MODEL={model}")
        assert status == 0 and err == "" and f"-m paper table runs/paper/{task}/mine\n" in out and "model/" not in out
    _, printed, _ = make(makefile, "-p", "-q", "clean")
    for target, (_, tasks) in TARGETS.items():
        assert set(re.search(rf"^needs_{target} := (.*)$", printed, re.M)[1].split()) == {*tasks}


# --- data ----------------------------------------------------------------------------------------------------

ARCHIVE, QAM_DEV, TEST = "panx_dataset/fr.tar.gz", "xglue/QAM/fr.dev.tsv", "XNLI-1.0/xnli.test.tsv"
TRAIN, SQUAD = "XNLI-MT-1.0/multinli/multinli.train.en.tsv", "squad/train-v1.1.json"
MLQA_DEV, XQUAD = "MLQA_V1/dev/dev-context-es-question-es.json", "xquad/xquad.es.json"
FETCHES = r"`python -m paper fetch {}` \(--data DIR, where it is not data\) fetches it, or "
HEADER = "premise\thypo\tlabel\n"
FRENCH = TAGGED.replace("en:", "fr:")
FLAT = json.dumps({"id": "q", "context": "a", "question": "b", "answers": {"text": ["a"], "answer_start": [0]}})

# task: [(a file of its data, what it holds or None for no file, what is said)]
DATA = {
    "xnli": [
        (TRAIN, None, f"{TRAIN} is not there: {FETCHES.format('xnli')}unpack https://.*XNLI-MT-1.0.zip"),
        (TRAIN, "", f"{TRAIN} is empty: remove it"),
        (TRAIN, HEADER + "A\tneutral\n", ", line 2: 2 columns where the header has 3"),
        (TRAIN, HEADER + "A\tB\tmaybe\n", ", line 2: unknown label 'maybe'"),
        (TRAIN, HEADER.replace("\t", ",") + "A,B,neutral\n", ", line 1: the header has no tab: this is a copy as CSV"),
        (TRAIN, '"premise"\t"hypo"\t"label"\n', ", line 1: the header is quoted: this is a copy as CSV"),
        (TRAIN, (HEADER + "A\tB\tneutral\n").encode("utf-16"), ", line 1: not valid UTF-8"),
        (TRAIN, (HEADER + "A\tB\tneutral\n").replace("\n", "\r"), "its lines end in .*r alone"),
        (TEST, None, f"{TEST} is not there: {FETCHES.format('xnli')}unpack https://.*XNLI-1.0.zip"),
        (TEST, "language\tsentence1\tsentence2\tgold_label\nen\ta\tb\t-\n", "no label; this looks like XTREME's copy"),
    ],
    "ner": [
        ("panx_dataset/en.tar.gz", None, r"no language 'en' in .*panx_dataset; there are de, fr"),
        (ARCHIVE, "<html>", "is not a whole tar.gz archive"),
        (ARCHIVE, wikiann(TAGGED), "line 1: the token 'en:Paul' does not begin with 'fr:'"),
        (ARCHIVE, wikiann("1\tAufgrund\tO\tO\n"), "does not begin with 'fr:'; .* without an index or other columns"),
        (ARCHIVE, wikiann("# http://a.b\n1\tPaul\tB-PER\tO\n"), "line 2: .* without an index or other columns"),
        (ARCHIVE, wikiann(FRENCH.replace("\tB-PER", "\tB-PER\tO")), "line 1: two columns of tags; one is needed"),
        (ARCHIVE, wikiann(FRENCH.replace("\t", " ")), "line 1: a space stands before the tag, where a tab is needed"),
        (ARCHIVE, wikiann(FRENCH.replace("B-PER", "S-PER")), "unknown tag 'S-PER'; one is needed, of O, B-PER, I-PER"),
        (ARCHIVE, wikiann(FRENCH.replace("B-PER", "b-per")), "unknown tag 'b-per'"),
        (ARCHIVE, wikiann("fr:Paul\nfr:Ketwick\n"), "line 1: a token without a tag; if this is XTREME's copy"),
        (ARCHIVE, wikiann("fr:Paul\tO\n \nfr:a\tO\n"), "holds no tag but O"),
    ],
    "qam": [
        (QAM_DEV, None, "xglue/QAM lacks the dev set of fr, and has other files of it: .* leave it out with --lang"),
        ("xglue/QAM/fr.test.tsv", None, "fr.test.tsv is not there: XGLUE's archive"),
        ("xglue/QAM/en.train.tsv", None, "en.train.tsv is not there: XGLUE's archive"),
        (QAM_DEV, "who?\tthe river\n", ", line 1: no label: this looks like a copy whose test labels are removed"),
        (QAM_DEV, "question\tpassage\tlabel\n", ", line 1: unknown label 'label'; there are 0, 1"),
        (QAM_DEV, "who?,the river,1\n", ", line 1: 1 columns where question, passage and label should be"),
    ],
    "mlqa": [
        (SQUAD, None, f"{SQUAD} is not there: {FETCHES.format('mlqa')}get https://"),
        (SQUAD, FLAT + "\n" + FLAT, "line 2: a second JSON value, where there is to be one .JSON Lines are not read"),
        (SQUAD, FLAT, "not in SQuAD's format .*rows, as `datasets` writes them, are not read"),
        (SQUAD, f'{{"data": [{FLAT}]}}', "not in SQuAD's format .*rows, as `datasets` writes them, are not read"),
        (SQUAD, squad([("Hello", "what?", [])], is_impossible=True), "this is SQuAD 2.0; SQuAD v1.1 is needed"),
        (MLQA_DEV, None, "MLQA_V1/dev lacks the dev set of es, and has other files of it: .*--languages de,en"),
        (MLQA_DEV, squad([("Hello", "what?", [])]), "no answer: this looks like XTREME's copy"),
        (XQUAD, None, "xquad.es.json is not there: "),
    ],
}  # fmt: skip
QUICK = "--device cpu --precision fp32 --max-updates 1 --gap-every 0 --cka-every 0"


@pytest.fixture(scope="module")
def run_arguments(official, tiny_model, tmp_path_factory):
    """run_arguments("ner", "--lr", 1): those of a run of one update."""
    where = ["--data", official, "--cache", tmp_path_factory.mktemp("cache")]

    def arguments(task, *more, model=tiny_model):
        tests = ["--tests", "test,xquad"] if task == "mlqa" else []
        short = ["--max-length", 60, "--max-question", 9, "--stride", 20] if task == "mlqa" else ["--max-length", 30]
        return ["run", task, "--model", model, *where, *QUICK.split(), *short, *tests, *more]

    return arguments


@pytest.mark.parametrize(
    ("task", "file", "content", "says"),
    [pytest.param(task, *row, id=f"{task}: {row[2][:50]}") for task, rows in DATA.items() for row in rows],
)
def test_a_bad_file_of_data(run_main, run_arguments, official, tmp_path, task, file, content, says):
    kept = (official / file).read_bytes()
    try:
        (official / file).unlink()
        if content is not None:
            (official / file).write_bytes(content if isinstance(content, bytes) else content.encode())
        result = run_main(*run_arguments(task, "--out", tmp_path / "run"))
    finally:
        (official / file).write_bytes(kept)
    lines = [line for line in result.err.splitlines(True) if "not there and left out" not in line]
    one_line(result.status, result.out, "".join(lines), f"^paper: .*{says}")
    assert not (tmp_path / "run").exists()


# --- models --------------------------------------------------------------------------------------------------


def test_a_bad_model(run_main, run_arguments, tiny_model, make_model, official, tmp_path):
    """A file of it in place of its folder, a foreign folder, one that lacks files, one too small for the data; and what
    is advised for the last is taken."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    empty = tmp_path / "empty"
    empty.mkdir()
    table = [
        (model / "config.json", "config.json is a file: give the folder that it lies in"),
        (model / "model.safetensors", "model.safetensors is a file: give the folder"),
        (empty, "sentencepiece.bpe.model is not there: `python -m paper fetch xlm-roberta-base` fetches it"),
    ]
    for place, says in table:
        result = run_main(*run_arguments("xnli", model=place))
        one_line(result.status, result.out, result.err, f"^paper: .*{says}")
    (model / "sentencepiece.bpe.model").write_bytes(b"no")
    result = run_main(*run_arguments("xnli", model=model))
    one_line(
        result.status, result.out, result.err, "sentencepiece.bpe.model is not a whole SentencePiece model: remove"
    )
    assert "remove" not in str(pytest.raises(data.InputError, data.Tokenizer, tiny_model / "config.json").value)


def test_what_is_advised_for_long_examples_is_taken(run_main, run_arguments, make_model, official, tmp_path):
    small = make_model(num_hidden_layers=2, max_position_embeddings=34)
    paper_s = ["--max-length", 384, "--max-question", 64, "--stride", 128]
    arguments = run_arguments("mlqa", *paper_s, "--no-test", "--out", tmp_path / "run", model=small)
    kept = (official / SQUAD).read_text()
    try:
        (official / SQUAD).write_text(kept.replace('", "qas"', ' cat dog cow cat dog cow cat dog cow cat", "qas"'))
        refused = run_main(*arguments)
        one_line(refused.status, refused.out, refused.err.split("vi, zh\n")[-1], "the model positions for 32: give ")
        advised = re.search(r"give (--max-length 32 --max-question 14 --stride 14)$", refused.err)[1]
        assert run_main(*arguments, *advised.split()).status == 0
    finally:
        (official / SQUAD).write_text(kept)


@pytest.mark.parametrize("room", [*range(1, 12), 64, 510])
@pytest.mark.parametrize("task", ["xnli", "mlqa"])
def test_advice_about_lengths_is_never_refused(room, task):
    _, options = parse(["run", task, "--model", "m"])
    said = paper.run.shorter(options, room)
    if said.startswith("give "):
        assert parse(["run", task, "--model", "m", *said.split()[1:]])[1].max_length == room
    assert said.startswith("give ") == (room >= (6 if task == "mlqa" else 5))


# --- finished runs -------------------------------------------------------------------------------------------


def test_scores_that_runs_do_not_have(run_main, tmp_path):
    write(tmp_path, run_of({"en": 1.0, "de": 1.0}), run_of({"en": 1.0, "de": 1.0}, "slowfast"))
    for arguments, says in [
        (("--measure", "bleu"), "--measure bleu: these runs have no such measure; they have accuracy"),
        (("--split", "xquad"), "--split xquad: these runs have no such sets; they have dev, test"),
        (("--split", "dev", "--measure", "f1"), "--measure f1: .* they have accuracy"),
    ]:
        result = run_main("table", tmp_path, *arguments)
        one_line(result.status, result.out, result.err, f"^paper: {says}$")


# --- signals, and files that cannot be had -------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_while_the_libraries_are_imported(tmp_path, number):
    """A numpy that is long in coming: one line, status 130."""
    (tmp_path / "numpy.py").write_text("import sys\nprint('imports', flush=True)\nsys.stdin.readline()\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "paper", "run", "xnli", "--model", ".", "--data", "."], cwd=tmp_path, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
    )  # fmt: skip
    assert process.stdout.readline() == "imports\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "\npaper: stopped before it began\n")


def test_places_where_a_run_cannot_be_written(run_main, run_arguments, tmp_path):
    (tmp_path / "file").write_text("mine")
    table = [
        (tmp_path / "file" / "run", os.strerror(errno.ENOTDIR) + ".*; a file and a folder want one name"),
        (tmp_path / ("n" * 300), os.strerror(errno.ENAMETOOLONG) + ".*; give a shorter name"),
    ]
    for out, says in table:
        result = run_main(*run_arguments("xnli", "--out", out))
        assert "nothing is lost" not in result.err and "disk" not in result.err
        one_line(result.status, result.out, result.err, f"^paper: .*{says}")
    assert (tmp_path / "file").read_text() == "mine"


# --- what messages name --------------------------------------------------------------------------------------

PROSE = {"make it", "make room", "make them"}  # "make" is a word, too
OTHERS = {"--nproc_per_node", "--hash"}  # of torchrun and pip


def texts():
    """{text: file} of the texts in the sources that are no docstrings and no other program's options."""
    found = {}
    for file in [*ROOT.glob("*.py"), *ROOT.glob("paper/*.py"), *ROOT.glob("demo/*.py")]:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        pip = [n for n in ast.walk(tree) if isinstance(n, ast.List) and file.name == "e5.py"]
        left_out = {id(x) for n in pip for x in ast.walk(n)}
        left_out |= {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
        for n in ast.walk(tree):
            if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in left_out:
                found[n.value] = file.name
    return found


def named(pattern):
    return {name: file for text, file in texts().items() for name in re.findall(pattern, text)}


def test_messages_name_targets_options_modules_and_files_that_there_are():
    printed = subprocess.run(["make", "-pnq", "clean"], cwd=ROOT, capture_output=True, text=True).stdout
    targets = named(r"\bmake [a-z]\w*")
    assert {"make demo", "make xnli", "make bench"} <= targets.keys()
    odd = [x for x in targets if not re.search(rf"^{x.removeprefix('make ')}:", printed, re.M)]
    assert {*odd} <= PROSE
    sources = "".join((ROOT / "paper" / f"{name}.py").read_text() for name in ("arguments", "bench"))
    known = {flag(name) for name in FIELDS} | {*re.findall(r'"(--[a-z-]+)"', sources)} | {"--help", "--no-test"}
    options = named(r"(?<![\w-])--[a-z][\w-]*")
    assert {"--lr", "--max-length", "--micro-batch", "--out"} <= options.keys()
    assert options.keys() - known == OTHERS
    modules = named(r"python -m ([\w.]+)")
    assert {"paper", "demo.e5"} <= modules.keys()
    assert all((ROOT / name.replace(".", "/")).with_suffix(".py").is_file() for name in modules if name != "paper")
    commands = named(r"python -m paper ([a-z]+)")
    assert {"fetch", "run"} <= commands.keys() <= {*COMMANDS, "run"}
    assert {*named(r"paper fetch ([a-z][\w-]*)")} <= {*FETCHED, "xnli"}
    assert all((ROOT / name).is_file() for name in named(r"requirements[\w-]*\.txt"))
