"""A run on two processes (gloo, on the CPU, started by torchrun) against the same run on one."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, Result
from safetensors.torch import load_file
from test_run import checkpoints

import slowfast
from paper import ranks
from paper.__main__ import main

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed"),
]

# In both phases by the learning curve; of the 60 pairs, batches of 59 and of 1: one rank has none then. Some
# evaluations and gaps are measured on sets of an odd size.
SETTINGS = (
    "--device cpu --precision fp32 --dropout 0 --attention-dropout 0 --seed 2 --lr 3e-3 --batch-size 59 --epochs 12 "
    "--warmup 0.2 --window 2 --threshold 0.02 --log-every 1 --gap-every 5 --gap-examples 1 --eval-every 7 "
    "--dev-examples 5 --cka-every 4 --save-every 8"
).split()


@pytest.fixture(scope="module")
def command(make_model, tiny_data, tiny_tasks, tmp_path_factory):
    """command("ner", "--out", DIR, ...): the arguments of a run."""
    model, cache = make_model(num_hidden_layers=2), tmp_path_factory.mktemp("cache")

    def arguments(task, *options):
        data = tiny_data if task == "xnli" else tiny_tasks
        return [str(a) for a in ["run", task, "--model", model, "--data", data, "--cache", cache, *SETTINGS, *options]]

    return arguments


@pytest.fixture
def torchrun(tmp_path):
    """torchrun("run", "xnli", ...): `torchrun --nproc_per_node=2 -m paper run xnli ...`, to its end: a Result. `code`
    in place of `-m paper` is the text of a script that gets the arguments."""

    def run(*arguments, code=None):
        (tmp_path / "script.py").write_text(code or "")
        what = [tmp_path / "script.py"] if code else ["-m", "paper"]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *what]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        environment |= {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
        process = subprocess.run(
            [*map(str, [*command, *arguments])], cwd=tmp_path, env=environment, text=True, capture_output=True,
            timeout=300,
        )  # fmt: skip
        return Result(process.returncode, process.stdout, process.stderr)

    return run


def read_log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def assert_same_but_for_rounding(out, other):
    """Two finished runs: their curves, weights, counts of each example and results."""
    one, two = read_log(out), read_log(other)
    assert [line["K"].keys() for line in one] == [line["K"].keys() for line in two]
    for a, b in zip(one, two):
        for name in a.keys() | b.keys():
            exactly = name not in ("loss", "phi", "R", "K", "cka") or a[name] is None
            assert b[name] == (a[name] if exactly else pytest.approx(a[name], rel=1e-4, abs=1e-5)), (a["update"], name)
    weights = [load_file(folder / "best" / "model.safetensors") for folder in (out, other)]
    # A softmax does not see what adds the same to all of it: that gradient is rounding, which Adam makes large.
    unseen = ["key.bias"]
    if "qa_outputs.bias" in weights[0]:
        unseen += ["qa_outputs.bias", "layer.1.output.LayerNorm.bias"]
    for name, w in weights[0].items():
        if not name.endswith(tuple(unseen)):
            torch.testing.assert_close(weights[1][name], w, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    files = sorted(file.name for file in (out / "examples").iterdir())
    assert files == sorted(file.name for file in (other / "examples").iterdir())
    for counts in ([np.load(folder / "examples" / file) for folder in (out, other)] for file in files):
        assert list(counts[0]) == list(counts[1])
        assert all(np.array_equal(counts[0][language], counts[1][language]) for language in counts[0])
    results = [json.loads((folder / "result.json").read_text()) for folder in (out, other)]
    for result in results:
        del result["dev"]["model_sha256"]
        for name in ("tokens_per_second", "peak_memory_bytes", "seconds", "device"):
            del result[name]
    assert results[0] == results[1]
    assert not list(out.rglob("*.part")) and not list(other.glob("checkpoint*"))


@pytest.fixture(scope="module")
def undisturbed(command, tmp_path_factory):
    """The run of xnli on one process."""
    out = tmp_path_factory.mktemp("one") / "run"
    assert main(command("xnli", "--out", out)) == 0
    return out


def test_two_processes_are_one(torchrun, command, undisturbed, tmp_path):
    done = torchrun(*command("xnli", "--out", tmp_path / "two"))
    assert done.status == 0 and done.messages == [] and done.out.count("finished; ") == 1, done
    assert done.err.count("24/24") == 2  # an evaluation and a line of the log, of one process
    assert_same_but_for_rounding(undisturbed, tmp_path / "two")
    assert json.loads((tmp_path / "two" / "result.json").read_text())["device"] == "2 x cpu, 1 threads"
    log = read_log(tmp_path / "two")
    assert {line["phase"] for line in log} == {1, 2} and {line["R"] == 0 for line in log[3:]} == {True, False}
    # K to the last bit is what one process makes of these losses.
    encoder = torch.nn.Linear(1, 1)
    groups = [{"name": "S_II", "params": encoder.parameters()}]
    policies = slowfast.SlowFast(torch.optim.SGD(groups, lr=1), window=2, threshold=0.02)
    for line in log:
        policies.observe(line["loss"])
        assert (line["phi"], line["R"], line["K"]) == (policies.phi, policies.R, policies.multipliers)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_are_one(torchrun, run_main, command, tmp_path):
    for run, out in ((torchrun, "two"), (run_main, "one")):
        assert run(*command("xnli", "--out", tmp_path / out, "--device", "cuda")).status == 0
    assert_same_but_for_rounding(tmp_path / "one", tmp_path / "two")


STOPPED = """
import signal, sys
import slowfast
from paper import ranks
from paper.__main__ import main

observe, last = slowfast.SlowFast.observe, int(sys.argv.pop(1))

def stopping(policies, loss):
    observe(policies, loss)
    if policies.updates == last and ranks.RANK == ranks.WORLD - 1:
        signal.raise_signal(signal.SIGINT)

slowfast.SlowFast.observe = stopping
sys.exit(main())
"""


def test_a_run_that_was_stopped_on_two_goes_on_on_one(torchrun, run_main, command, undisturbed, tmp_path):
    """Ctrl-C reaches one of them alone, in an update that an evaluation follows."""
    stopped = torchrun(14, *command("xnli", "--out", tmp_path / "run"), code=STOPPED)
    assert stopped.status != 0 and stopped.messages == ["paper: stopped; the same command goes on from here"], stopped
    assert "exitcode  : 130" in stopped.err and stopped.err.count("Traceback") <= 1  # torchrun's own
    last = checkpoints(tmp_path / "run")[0]
    assert (last["update"], last["recorded"]) == (14, 13)
    assert "going on from update 14" in run_main(*command("xnli", "--out", tmp_path / "run")).err
    assert_same_but_for_rounding(undisturbed, tmp_path / "run")


def test_a_run_that_was_stopped_on_one_goes_on_on_two(torchrun, run_main, command, undisturbed, tmp_path, monkeypatch):
    observe = slowfast.SlowFast.observe

    def stopping(policies, loss):
        observe(policies, loss)
        if policies.updates == 10:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(slowfast.SlowFast, "observe", stopping)
        assert run_main(*command("xnli", "--out", tmp_path / "run")).status == 130
    # in small parts: of 30 and of 29 windows they are as many, of one they are not
    done = torchrun(*command("xnli", "--out", tmp_path / "run", "--micro-batch", 29))
    assert done.status == 0 and done.err.count("going on from update 10") == 1, done
    assert_same_but_for_rounding(undisturbed, tmp_path / "run")


SEVERAL = """
import json, sys
import paper.run
import slowfast
from data import InputError
from paper import ranks
from paper.arguments import parse
from paper.commands import status_of

# A rate of 1 is the highest that there is, and so tiny a model survives it.
real = slowfast.warmup_then_decay
slowfast.warmup_then_decay = lambda total, warmup: lambda t: real(total, warmup)(t) * (1e30 if warmup == 0 else 1)

def fails(*_):
    raise InputError("a disk of the second machine")

with ranks.joined():
    statuses = [status_of(*parse(arguments)) for arguments in json.loads(sys.argv[1])]
    if ranks.RANK == 1:
        paper.run.load_task = fails
    statuses.append(status_of(*parse(json.loads(sys.argv[2]))))
    assert ranks.gathered(statuses) == [statuses] * 2
    print(json.dumps(statuses))
"""


def test_tasks_make_and_what_goes_wrong(torchrun, run_main, command, tmp_path, make_model):
    """Labels a token, of which the ranks have not equally many; few-shot; answers; a run that is finished; runs of a
    table; a run that diverges, an option that several processes cannot have, and a failure on one alone."""
    few = ["--max-updates", 8, "--epochs", 9, "--batch-size", 7, "--eval-every", 4, "--lr", "1e-2", "--save-every", 0]
    runs = {
        "ner": command("ner", *few, "--shots", 2, "--max-length", 8, "--lr", "3e-2", "--policy4", "auto"),
        "mlqa": command("mlqa", *few, "--max-length", 32, "--stride", 10, "--max-question", 9, "--micro-batch", 2),
    }
    again = [*runs["mlqa"], "--tests", "test,xquad"]
    xnli = command("xnli", "--max-updates", 2, "--out", tmp_path / "wrong")
    data, cache = (xnli[xnli.index(name) + 1] for name in ("--data", "--cache"))
    model = str(make_model(num_hidden_layers=3))  # the fewest with which all sets have a layer
    more = f"--max-updates 1 --no-test --device cpu --precision fp32 --gap-every 0 --dev-examples 2 --cache {cache} "
    more += "--dropout 0 --attention-dropout 0"
    make = ["make", "table7", "--keep", "--seeds", "1", "--model", model, "--data", data, "--args", more]

    def all_of(folder):
        with_out = [[*runs[task], "--out", str(folder / task)] for task in runs]
        return [*with_out, [*again, "--out", str(folder / "mlqa")], [*make, "--runs", str(folder / "made")]]

    wrong = [[*xnli, "--lr", "1", "--warmup", "0"], [*xnli, "--device", "cuda:1"]]
    done = torchrun(json.dumps([*all_of(tmp_path / "two"), *wrong]), json.dumps(xnli), code=SEVERAL)
    assert done.status == 0 and json.loads(done.out.splitlines()[-1]) == [0, 0, 0, 0, 2, 2, 2], done
    diverged, device, alone = done.messages
    assert "it has diverged" in diverged and "give --device cuda" in device
    assert alone == "paper: a disk of the second machine" and "Traceback" not in done.err
    for arguments in all_of(tmp_path / "one"):
        assert run_main(*arguments).status == 0
    made = [file.parent.relative_to(tmp_path / "one") for file in (tmp_path / "one").rglob("log.jsonl")]
    assert len(made) > 3
    for folder in made:
        assert_same_but_for_rounding(tmp_path / "one" / folder, tmp_path / "two" / folder)


def test_a_wrong_option_is_said_once(torchrun, command, tmp_path):
    refused = torchrun(*command("xnli", "--out", tmp_path / "run", "--window", "0"))
    assert refused.status != 0 and len(refused.messages) == 1 and "--window" in refused.messages[0], refused


def test_the_ranks_drop_out_other_units(monkeypatch):
    """The first goes on with the run's random numbers; those of the others are their own in each session."""
    drawn = []
    for rank, update in [(0, 5), (0, 6), (1, 5), (2, 5), (1, 6)]:
        monkeypatch.setattr(ranks, "RANK", rank)
        torch.manual_seed(3)
        ranks.draw_apart(3, update)
        drawn.append(tuple(torch.rand(3).tolist()))
    assert drawn[0] == drawn[1] and len(set(drawn)) == 4
    torch.manual_seed(3)
    assert drawn[0] == tuple(torch.rand(3).tolist())
