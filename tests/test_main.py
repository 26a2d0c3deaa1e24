"""The command line as a whole: `python -m paper`, what it says when something goes wrong, and processes that are
signalled."""

import os
import re
import signal

import pytest
from test_run import outcome, refused

import paper.__main__
from data import InputError
from paper import commands
from paper.arguments import COMMANDS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def command(make_model, tiny_data, tmp_path_factory):
    """command("--out", DIR, ...): the arguments of a run of eight updates that saves a checkpoint at 3 and 6."""
    model, cache = make_model(num_hidden_layers=2), tmp_path_factory.mktemp("cache")

    def arguments(*options):
        return [
            "run", "xnli", "--model", model, "--data", tiny_data, "--cache", cache, "--device", "cpu",
            "--precision", "fp32", "--lr", "1e-2", "--batch-size", "8", "--max-updates", "8", "--window", "2",
            "--log-every", "2", "--gap-every", "4", "--eval-every", "5", "--save-every", "3", *options,
        ]  # fmt: skip

    return arguments


@pytest.fixture(scope="module")
def undisturbed(command, tmp_path_factory):
    """What the run leaves that nothing disturbs; on one thread, as the processes are."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert paper.__main__.main([str(a) for a in command("--out", out)]) == 0
    return outcome(out)


# --- processes -----------------------------------------------------------------------------------------------


def test_a_run_in_a_process_of_its_own(run_command, command, tmp_path, undisturbed):
    done = run_command(*command("--out", tmp_path / "run"))
    assert done.status == 0 and outcome(tmp_path / "run") == undisturbed
    lines = [line for line in done.err.splitlines() if not re.match(r"\d+/8 ", line)]
    assert len(lines) == 1 and " on this machine " in lines[0]  # progress, how long it takes, and nothing else
    assert done.out.splitlines()[-1].startswith(f"{tmp_path / 'run'}: finished; ")


# Waits at the n-th call of a function until a line comes in; where it saves a checkpoint, with half of it written.
WAITING = """
import sys, paper.folder, slowfast
from paper.__main__ import main
owner, name, n = {place}
real, calls = getattr(owner, name), []
def waits(*arguments):
    calls.append(1)
    if len(calls) == n:
        if owner is paper.folder:
            arguments[1].write_bytes(b"half")
        print("waits", flush=True)
        sys.stdin.readline()
    return real(*arguments)
setattr(owner, name, waits)
sys.exit(main())
"""
UPDATE, CHECKPOINT = 'slowfast, "update", 5', 'paper.folder, "write_tensors", 2'


@pytest.mark.parametrize(
    ("place", "number", "status", "reached"),
    [(UPDATE, signal.SIGINT, 130, 5), (CHECKPOINT, signal.SIGTERM, 130, 5), (CHECKPOINT, signal.SIGKILL, -9, 3)],
    ids=["Ctrl-C", "SIGTERM", "SIGKILL"],
)
def test_a_process_that_is_signalled(
    start_command, run_main, command, tmp_path, undisturbed, place, number, status, reached
):
    """While it is at its run another process is not let in. Ctrl-C and SIGTERM end it after a whole update and with a
    checkpoint, SIGKILL on the spot; the same command goes on, to the same end."""
    arguments = command("--out", tmp_path / "run")
    process = start_command(*arguments, code=WAITING.format(place=place))
    assert process.stdout.readline() == "waits\n"
    if number == signal.SIGKILL:
        refused(run_main(*arguments), tmp_path / "run", "another process is at this run")
    process.send_signal(number)
    out, err = process.communicate("\n", timeout=120)
    assert (process.returncode, out) == (status, "") and "Traceback" not in err
    if status == 130:
        assert err.splitlines()[-1] == "paper: stopped; the same command goes on from here"
    done = run_main(*arguments)
    assert done.status == 0 and f"going on from update {reached}\n" in done.err
    assert outcome(tmp_path / "run") == undisturbed


# --- one line, whatever goes wrong ---------------------------------------------------------------------------


# That nothing is lost, and that the command goes on, is said where it is so.
ADVICE = [
    *[(number, "make room there: nothing is lost, the same command goes on") for number in (28, 122, 27)],
    *[(number, "(?!.*(lost|goes on|disk))") for number in (2, 13, 1, 17, 20, 21, 30, 36)],
    *[(number, "raise the limit .* goes on") for number in (24, 23)],
]


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (InputError("x.tsv: no such file"), 2, "paper: x.tsv: no such file"),
        (FloatingPointError("update 3: the loss is nan"), 2, "paper: update 3: the loss is nan; .*--lr"),
        *[(OSError(number, os.strerror(number), "x.pt"), 2, f"paper: .*'x.pt'; {says}") for number, says in ADVICE],
        (OSError("x: no locks"), 2, "paper: x: no locks$"),
        (ModuleNotFoundError("No module named 'scipy'"), 2, "paper: .*'scipy'; tables .* requirements-figures.txt$"),
        (KeyboardInterrupt(), 130, "paper: stopped; the same command goes on"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, BaseException) else "",
)
def test_an_error_is_one_line_and_a_status(run_main, tmp_path, monkeypatch, error, status, says):
    def fails(options):
        raise error

    monkeypatch.setitem(commands.DOES, "run", fails)
    result = run_main("run", "xnli", "--model", tmp_path, "--data", tmp_path)
    (line,) = result.err.strip("\n").splitlines()
    assert (result.status, result.out) == (status, "") and re.match(says, line)


def test_what_is_no_error_of_input_keeps_its_traceback(run_main, tmp_path, monkeypatch):
    def fails(options):
        raise ZeroDivisionError

    monkeypatch.setitem(commands.DOES, "run", fails)
    with pytest.raises(ZeroDivisionError):
        run_main("run", "xnli", "--model", tmp_path, "--data", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "COMMAND"),
        (("frobnicate",), "'frobnicate'"),
        (("run",), "task"),
        (("run", "xnli", "--model", "m", "--frobnicate"), "--frobnicate"),
        (("table", "runs", "--frobnicate"), "--frobnicate"),
        (("fetch", "everything"), "'everything'"),
        (("make", "table99", "--model", "m"), "'table99'"),
        (("run", "xnli", "--model", "none"), "none"),
        (("table", "none"), "none"),
        (("plan", "table2", "--model", "none"), "none"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else "",
)
def test_what_the_command_line_does_not_take(run_main, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    result = run_main(*arguments)
    assert result.out == "" and says in refused(result)
    assert result.err.count("\n") == 1 and list(tmp_path.iterdir()) == []


def test_help(run_main):
    for arguments in ((), *((name,) for name in ("run", *COMMANDS))):
        result = run_main(*arguments, "--help")
        assert (result.status, result.err) == (0, "") and result.out.startswith("usage: python -m paper")
        assert arguments or all(re.search(rf"^ +{name} ", result.out, re.M) for name in ("run", *COMMANDS))
