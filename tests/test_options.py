"""A run's options: the paper's numbers, what a setup changes of them, what decides a run's result and what its
directory is called, and options that make no sense."""

import re
from pathlib import Path

import pytest

from paper import options
from paper.methods import METHODS
from paper.options import PLACE, RESULT, SEED, WAY, parse

# Appendix B and Section 5.1, copied from the paper by hand; lengths as in XTREME, whose recipe it follows.
PAPER = {
    "xnli": {"lr": 5e-6, "batch_size": 32, "epochs": 10, "max_length": 128, "policy4": "on"},
    "mlqa": {"lr": 3e-5, "batch_size": 12, "epochs": 2, "max_length": 384, "policy4": "on"},
    "ner": {"lr": 5e-6, "batch_size": 32, "epochs": 20, "max_length": 128, "policy4": "off"},
    "qam": {"lr": 5e-6, "batch_size": 32, "epochs": 1, "max_length": 128, "policy4": "on"},
}
FOR_ALL = {
    "method": "slowfast", "c1": 0.01, "c2": 10, "r": 3, "window": 100, "threshold": 0.1, "phase": "loss",
    "fraction": 0.2, "eval_every": 3000, "gap_every": 100, "cka_every": 100, "warmup": 0.1, "clip": 1.0, "shots": 0,
    "select": "all", "source": "en", "max_updates": None, "dropout": None, "attention_dropout": None,
    "dev_examples": None, "languages": None, "tests": "test",
}  # fmt: skip


@pytest.mark.parametrize("task", PAPER)
def test_what_is_not_given_is_the_papers(task):
    o = parse([task, "--model", "m"])
    expected = PAPER[task] | FOR_ALL
    assert {name: getattr(o, name) for name in expected} == expected
    assert (o.stride, o.max_question) == ((128, 64) if task == "mlqa" else (None, None))


def test_a_setup_changes_what_it_names_for_its_task_and_what_is_given_comes_first():
    small = parse(["mlqa", "--model", "m", "--setup", "small"])
    assert (small.lr, small.max_updates, small.tests, small.batch_size) == (5e-5, 1720, "xquad,squad", 12)
    assert parse(["ner", "--model", "m", "--setup", "small"]).tests == "test"
    given = parse(["mlqa", "--model", "m", "--setup", "small", "--lr", "1e-4", "--no-test"])
    assert (given.lr, given.max_updates, given.tests) == (1e-4, 1720, "")
    for setup, tasks in options.SETUPS.items():  # they name options that there are
        for task, values in tasks.items():
            assert values.items() <= vars(parse([task, "--model", "m", "--setup", setup])).items()


# What settings.json held before, in this order: directories of then are to be read and gone on with.
SETTINGS = """task method seed model data languages shots select source c1 c2 r window threshold phase fraction policy4
lr batch_size epochs max_updates warmup clip dropout attention_dropout max_length stride max_question precision
eval_every dev_examples gap_every gap_examples log_every data_sha256 model_sha256""".split()


def test_settings_keep_their_names_and_their_order():
    o = parse(["xnli", "--model", "m", "--lr", "1e-3"])
    assert list(o.settings) == SETTINGS
    assert o.settings["lr"] == 1e-3 and o.settings["seed"] == 1


def test_what_decides_the_result_and_what_does_not():
    there = parse(["xnli", "--model", "m"]).settings
    argv = ["xnli", "--model", "elsewhere", "--data", "elsewhere", "--seed", "2", "--lr", "1", "--micro-batch", "3",
            "--cka-every", "1", "--save-every", "1", "--eval-tokens", "9", "--no-test", "--discard", "--cache", "x",
            "--device", "cpu", "--runs", "r", "--out", "o"]  # fmt: skip
    here = parse(argv).settings
    assert options.differing(there, here) == ["lr", "seed"]
    assert options.differing(there, here, [SEED]) == ["seed"]
    assert options.differing(there, here, [PLACE]) == ["data", "model"]
    assert options.differing(there, {**there, "once": 1}) == ["once"]  # one that there is not any more
    kinds = {f.name: f.metadata["decides"] for f in options.fields(options.Options)}
    assert {name for name, kind in kinds.items() if kind == WAY} == set(kinds) - set(SETTINGS)
    assert {kinds[name] for name in SETTINGS} == {RESULT, SEED, PLACE}


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        ("xnli", "runs/paper/xnli/m/slowfast-seed1"),
        ("ner --setup small --method reinit-4-ffn --seed 3", "runs/small/ner/m/reinit-4-ffn-seed3"),
        ("xnli --c1 0.5 --shots 5 --lr 5e-6", "runs/paper/xnli/m/slowfast-shots=5-c1=0.5-seed1"),
        ("xnli --setup small --max-updates 1500 --r 1", "runs/small/xnli/m/slowfast-r=1.0-seed1"),
        ("qam --runs there --languages en,de --no-test", "there/paper/qam/m/slowfast-languages=en,de-seed1"),
        ("xnli --precision bf16 --data d --cache c --micro-batch 2 --discard", "runs/paper/xnli/m/slowfast-seed1"),
        ("mlqa --out here --stride 64", "here"),
    ],
)
def test_a_directory_is_named_by_what_the_run_is(argv, name):
    assert parse([*argv.split(), "--model", "models/m/"]).directory == Path(name)


def test_a_link_to_a_model_has_its_own_name(tmp_path):
    """That under which `make` looks for its runs."""
    (tmp_path / "5a3f").mkdir()
    (tmp_path / "xlm-r").symlink_to("5a3f")
    for given in (tmp_path / "xlm-r", f"{tmp_path}/xlm-r/", f"{tmp_path}/5a3f/../xlm-r"):
        assert parse(["xnli", "--model", str(given)]).directory == Path("runs/paper/xnli/xlm-r/slowfast-seed1")


def test_help_names_every_option_and_method(capsys):
    with pytest.raises(SystemExit) as done:
        parse(["xnli", "--help"])
    out = capsys.readouterr().out
    assert done.value.code == 0
    for name in [*SETTINGS[1:-2], "setup", "runs", "out", "cache", "tests", "no_test", "discard", "device"]:
        assert re.search(rf"^ +--{name.replace('_', '-')}\b.*", out, re.M), name
    for method in METHODS:
        assert method in out or "-layer-" in method
    assert "freeze-layer-i" in out and "paper: 5e-6" in out


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("", "task"),
        ("mnli", "'mnli'"),
        ("xnli --out x", "--model"),
        ("xnli --method slow", "'slow' is not a method; there are df, noisytune,"),
        ("xnli --shots -1", "--shots"),
        ("xnli --seed one", "--seed: 'one' is not a whole number from 0 to 4294967295"),
        ("xnli --lr nan", "--lr"),
        ("xnli --lr -1", "--lr"),
        ("xnli --r 0", "--r"),
        ("xnli --warmup 1.5", "--warmup"),
        ("xnli --batch-size 0", "--batch-size"),
        ("xnli --max-length 4", "--max-length"),
        ("xnli --select de", "--select"),
        ("xnli --phase both", "--phase"),
        ("xnli --policy4 maybe", "--policy4"),
        ("xnli --precision fp16", "--precision"),
        ("xnli --setup large", "--setup"),
        ("xnli --frobnicate", "--frobnicate"),
        ("xnli --stride 8", "--stride is an option of mlqa, not of xnli"),
        ("ner --max-question 8", "--max-question is an option of mlqa, not of ner"),
        ("qam --stride 8", "of mlqa, not of qam"),
        ("xnli --shots 5 --languages en", "--shots 5: --languages en has no other language"),
    ],
)
def test_options_that_make_no_sense(capsys, argv, says):
    """One line that names the option, and status 2."""
    with pytest.raises(SystemExit) as stopped:
        parse([*argv.split(), *([] if "--out" in argv else ["--model", "m"])])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.count("\n") == 1 and says in err
    assert err.startswith("paper: ") and err.endswith("(--help tells more)\n")
