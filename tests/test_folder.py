"""A run's directory: checkpoints that are damaged, forged or another run's, what a killed process leaves at each of its
writes, and weights that are not finite."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_run import AFTER, Killed, at, checkpoints, contents, ctrl_c, kill, outcome, refused

import data
import model as xlmr
import paper.folder
import paper.run
import slowfast

pytestmark = pytest.mark.usefixtures("one_thread")

# Evaluations after updates 2, 4, 6 and 8, a line of the log after each third, checkpoints after each second.
SETTINGS = (
    "--device cpu --precision fp32 --seed 2 --lr 1e-2 --batch-size 8 --max-updates 8 --warmup 0 --window 2 --phase "
    "fraction --fraction 0.4 --log-every 3 --gap-every 0 --eval-every 2 --cka-every 0"
).split()


@pytest.fixture(scope="module")
def command(make_model, tiny_data, tmp_path_factory):
    """command("--out", DIR, ...): the arguments of a run of 8 updates."""
    model, cache = make_model(num_hidden_layers=2), tmp_path_factory.mktemp("cache")
    where = ["--model", model, "--data", tiny_data, "--cache", cache]
    return lambda *options, save=2: [
        "run", "xnli", *where, *SETTINGS, *([] if save is None else ["--save-every", save]), *options,
    ]  # fmt: skip


@pytest.fixture
def train(run_main, command, tmp_path):
    """train("--lr", 1, ..., out=DIR) runs the command in this process: a Result."""
    return lambda *options, out=tmp_path / "run", save=2: run_main(*command("--out", out, *options, save=save))


@pytest.fixture(scope="module")
def undisturbed(command, tmp_path_factory):
    """The directory of the run that nothing disturbs."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert paper.__main__.main([str(a) for a in command("--out", out)]) == 0
    return out


@pytest.fixture(scope="module")
def stopped(command, tmp_path_factory):
    """(the directory of the run, stopped in its seventh update; the Run). Its checkpoints are of updates 6 and 7."""
    out, runs = tmp_path_factory.mktemp("stopped") / "run", []
    fit = paper.run.fit
    with pytest.MonkeyPatch.context() as patch, at(slowfast, "update", 7, ctrl_c, AFTER):
        patch.setattr(paper.run, "fit", lambda run, show: runs.append(run) or fit(run, show))
        assert paper.__main__.main([str(a) for a in command("--out", out)]) == 130
    assert [c["update"] for c in checkpoints(out)] == [7, 6]
    return out, runs[0]


@pytest.fixture
def run(stopped, tmp_path):
    """That Run, in a copy of its directory."""
    run = stopped[1]
    run.out = shutil.copytree(stopped[0], tmp_path / "run")
    return run


def last_of(out):
    """The JSON of the last checkpoint."""
    return max(out.glob("checkpoint-*.json"), key=lambda f: json.loads(f.read_text())["counts"]["update"])


# --- checkpoints that are not what was written -----------------------------------------------------------------


def flips(size, count=60):
    """Places in a file: its ends, and some between."""
    return sorted({0, 7, size - 1, *np.random.default_rng(size).integers(0, size, count).tolist()})


@pytest.mark.parametrize("which", ["json", "safetensors", "best weights", "best config"])
def test_a_flipped_bit_or_a_zeroed_block_is_noticed_and_the_checkpoint_before_is_taken(run, capsys, which):
    last = last_of(run.out)
    best = paper.folder.best_model(run.out, json.loads(last.read_text())["counts"]["best"])
    file = {"json": last, "safetensors": last.with_suffix(".safetensors"), "best weights": best / "model.safetensors",
            "best config": best / "config.json"}[which]  # fmt: skip
    before = next(c for c in checkpoints(run.out) if c["update"] == 6)
    whole = file.read_bytes()
    damages = [whole[:n] + bytes([whole[n] ^ (1 << n % 8)]) + whole[n + 1 :] for n in flips(len(whole))]
    damages += [
        whole[:n] + bytes(512) + whole[n + 512 :] for n in flips(len(whole) - 512, 6) if any(whole[n : n + 512])
    ]
    damages += [b"", whole[:-1], whole + b"\n", whole[: len(whole) // 2]]
    other = before["best"]["update"] == json.loads(last.read_text())["counts"]["best"]["update"]
    for damaged in damages:
        file.write_bytes(damaged)
        if "best" in which and other:  # both go by this model
            with pytest.raises(data.InputError, match="no other is whole"):
                paper.folder.go_on(run)
            continue
        paper.folder.go_on(run)
        said = capsys.readouterr().err.splitlines()
        assert run.update == 6 and len(said) == 2 and str(last) in said[0] and "left out" in said[0], said
    file.write_bytes(whole)
    paper.folder.go_on(run)
    assert run.update == 7 and capsys.readouterr().err == f"{run.out}: going on from update 7\n"


def test_a_run_ends_the_same_from_the_checkpoint_before(stopped, train, tmp_path, undisturbed):
    out = shutil.copytree(stopped[0], tmp_path / "run")
    os.truncate(last_of(out).with_suffix(".safetensors"), 5000)
    gone_on = train()
    assert gone_on.status == 0 and "going on from update 6\n" in gone_on.err
    assert outcome(out) == outcome(undisturbed)


def test_without_a_whole_checkpoint_one_line_says_what_to_do(stopped, train, tmp_path, undisturbed):
    out = shutil.copytree(stopped[0], tmp_path / "run")
    for file in out.glob("checkpoint-*.safetensors"):
        os.truncate(file, 5000)
    before = contents(out)
    refused(train(), out, "not a whole checkpoint", f"remove {out}/checkpoint-*")
    assert contents(out) == before
    for file in out.glob("checkpoint-*"):
        file.unlink()
    assert train().status == 0 and outcome(out) == outcome(undisturbed)


def test_a_checkpoint_of_an_earlier_version_is_not_passed_over(train, tmp_path):
    with at(slowfast, "update", 1, ctrl_c):
        train()
    for file in (tmp_path / "run").glob("checkpoint-*"):
        file.unlink()
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"a pickle")
    refused(train(), tmp_path / "run" / "checkpoint.pt", "an earlier version", "remove it")
    (tmp_path / "run" / "checkpoint.pt").unlink()
    assert train().status == 0


WORDS = "model.roberta.embeddings.word_embeddings.weight"


def of_counts(**values):
    return lambda state, tensors: state["counts"].update(values)


def of_tensor(change, name=WORDS):
    def forge(state, tensors):
        tensors[name] = change(tensors[name])

    return forge


FORGED = {  # what is changed in a checkpoint that is then whole again, and what is said of it
    **{f"update {x!r}": (of_counts(update=x), "updates|losses|types")
       for x in (9, 10**9, -1, True, 6.0, None, "7", [7])},
    **{f"recorded {x!r}": (of_counts(recorded=x), "updates|types") for x in (8, -1, True, 6.0)},
    **{f"log_bytes {x!r}": (of_counts(log_bytes=x), "sums|types") for x in (-1, 1.0, None)},
    **{f"tokens {x!r}": (of_counts(tokens=x), "sums|types") for x in (-1, True)},
    "losses": (of_counts(losses=["a"]), "losses"),
    "no gap": (lambda state, tensors: state["counts"].pop("gap"), "types"),
    "one count more": (of_counts(more=1), "types"),
    "best": (of_counts(best={"update": 2}), "mean"),
    "no policies": (lambda state, tensors: state.pop("policies"), "policies"),
    "policies' updates": (lambda state, tensors: state["policies"].update(updates=6), "updates"),
    "policies' losses": (lambda state, tensors: state["policies"]["losses"].append(1.0), "losses"),
    "steps": (lambda state, tensors: state["steps"].pop(), "types"),
    "a step": (lambda state, tensors: state["steps"].append(state["steps"].pop() + 9), "updates"),
    "settings": (lambda state, tensors: state["settings"].update(seed=3), "other settings: seed"),
    **{f"weights of {kind}": (of_tensor(lambda w, kind=kind: w.to(kind)), "should be|this run's")
       for kind in (torch.int32, torch.int64, torch.uint8, torch.float16, torch.float64)},
    "moments of int32": (of_tensor(lambda w: w.to(torch.int32), "exp_avg." + WORDS[6:]), "this run's"),
    "a shape": (of_tensor(lambda w: w.T.contiguous()), "this run's"),
    "no tensor": (lambda state, tensors: tensors.pop(WORDS), "is missing"),
    "no moment": (lambda state, tensors: tensors.pop("exp_avg_sq.classifier.dense.bias"), "is missing"),
    "one tensor more": (lambda state, tensors: tensors.update(more=torch.zeros(1)), "more is"),
    "other dev sets": (lambda state, tensors: tensors.pop("dev.de"), "dev sets"),
    "fewer examples": (of_tensor(lambda counts: counts[1:].contiguous(), "dev.de"), "dev sets"),
}  # fmt: skip


@pytest.mark.parametrize(("forge", "says"), FORGED.values(), ids=FORGED)
def test_a_checkpoint_that_cannot_be_this_runs_is_refused(run, forge, says):
    """Though its digests fit: the one before is gone."""
    last = last_of(run.out)
    for file in set(run.out.glob("checkpoint-*")) - {last, last.with_suffix(".safetensors")}:
        file.unlink()
    state, tensors = json.loads(last.read_text()), load_file(last.with_suffix(".safetensors"))
    del state["sha256"]
    weights = {name: w.clone() for name, w in run.model.state_dict().items()}
    for change in (lambda *_: None, forge):
        change(state, tensors)
        save_file(tensors, last.with_suffix(".safetensors"))
        state["tensors_sha256"] = data.file_sha256(last.with_suffix(".safetensors"))
        last.write_bytes(paper.folder.sealed(state))
        if change is not forge:
            paper.folder.go_on(run)  # what is not changed is taken
    with pytest.raises(data.InputError, match=f"not a whole checkpoint of this run .*({says})"):
        paper.folder.go_on(run)
    assert all(torch.equal(w, weights[name]) for name, w in run.model.state_dict().items())


@pytest.mark.parametrize("other", [["--seed", "3"], ["--lr", "2e-2"]])
def test_a_checkpoint_of_another_seed_or_other_settings_is_refused(stopped, train, tmp_path, other):
    with at(slowfast, "update", 3, ctrl_c):
        assert train(*other).status == 130
    for file in (tmp_path / "run").glob("checkpoint-*"):
        file.unlink()
    for file in [*stopped[0].glob("checkpoint-*"), *stopped[0].glob("best-*")]:
        (shutil.copytree if file.is_dir() else shutil.copy)(file, tmp_path / "run" / file.name)
    refused(train(*other), "other settings", "begins anew")


# --- the best model ---------------------------------------------------------------------------------------------


def test_a_best_model_that_is_not_the_one_that_was_saved_is_not_measured(undisturbed, train, tmp_path):
    out = shutil.copytree(undisturbed, tmp_path / "run")
    result = json.loads((out / "result.json").read_text())
    result["test"] = None
    (out / "result.json").write_text(json.dumps(result))
    file = out / "best" / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    before = contents(out)
    refused(train(), out / "best", "not the model", f"remove {out}")
    assert contents(out) == before
    file.write_bytes(whole)
    assert train().status == 0 and outcome(out) == outcome(undisturbed)


def test_the_best_model_is_the_one_that_its_scores_are_of(train, tmp_path, monkeypatch):
    """A run that is killed after a better model was saved, and before a checkpoint knew of it, and then finds, on
    another device, that it is not better: what it saved is not the best model."""
    right = iter([6, 7, 5, 4, 3, 2])  # of 12

    def count(model, sets, *_):
        found = next(right)
        return {language: np.arange(len(part))[:, None] < found for language, part in sets.items()}

    monkeypatch.setattr(paper.run, "count", count)
    monkeypatch.setattr(paper.run, "save_checkpoint", lambda run: run.update == 4 or paper.folder.save_checkpoint(run))
    options = ["--no-test", "--save-every", "3"]
    with at(slowfast, "update", 5, kill), pytest.raises(Killed):  # 6 after update 2, 7 after update 4
        train(*options)
    assert train(*options).status == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["best_update"], result["dev"]["mean"]) == (2, 50.0)
    assert result["dev"]["model_sha256"] == xlmr.fingerprint(tmp_path / "run" / "best")
    assert np.load(tmp_path / "run" / "examples" / "dev.npz")["de"].sum() == 6


# --- processes that are killed ----------------------------------------------------------------------------------


def test_a_second_ctrl_c_while_a_checkpoint_is_written_leaves_the_one_before(train, tmp_path, undisturbed):
    with at(slowfast, "update", 6, ctrl_c), at(paper.folder, "write_tensors", 3, ctrl_c, AFTER):
        assert train().status == 130
    assert checkpoints(tmp_path / "run")[0]["update"] == 4
    gone_on = train()
    assert "going on from update 4\n" in gone_on.err and outcome(tmp_path / "run") == outcome(undisturbed)


def test_parts_of_files_are_removed_when_their_process_is_no_more(train, tmp_path, tiny_data):
    """In the cache, for one: by who reads from it as by who writes to it. Other machines' processes may live."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as alive:
        dead = subprocess.Popen([sys.executable, "-c", ""])
        dead.wait()
        host, cache = socket.gethostname(), tmp_path / "cache"
        endings = (
            f"{host}.{alive.pid}",
            f"{host}.{os.getpid()}",
            f"not{host}.{dead.pid}",
            f"{host}.x.{dead.pid}",
            host,
        )
        kept = [f"a.npz.{ending}.part" for ending in (*endings, f"{host}.{10**30}")]
        for out in ("writes", "reads"):
            cache.mkdir(exist_ok=True)
            for name in (*kept, f"a.npz.{host}.{dead.pid}.part", f"{'b' * 50}.npz.{host}.{dead.pid}.part"):
                (cache / name).write_bytes(b"half")
            assert train("--cache", cache, "--max-updates", "1", "--no-test", out=tmp_path / out).status == 0
            assert {file.name for file in cache.glob("*.part")} == set(kept)
        alive.communicate(b"\n")


class Watch:
    """Calls `see` before whatever creates, writes, renames or removes a file below a folder: Python tells of it
    (sys.audit). What it finds there is what a process leaves that is killed at that moment."""

    CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")
    hooked, folder, see = False, None, None

    @classmethod
    def hear(cls, event, arguments):
        if cls.folder is None or not (event in cls.CHANGES or (event == "open" and arguments[2] & os.O_ACCMODE)):
            return
        names = [os.fsdecode(x) for x in arguments if isinstance(x, (str, bytes, os.PathLike))]
        if event in ("os.remove", "os.rmdir") or any(name.startswith(str(cls.folder)) for name in names):
            folder, cls.folder = cls.folder, None
            cls.see()
            cls.folder = folder

    @classmethod
    @contextlib.contextmanager
    def on(cls, folder, see):
        if not cls.hooked:  # once and for all: a hook cannot be taken away
            sys.addaudithook(cls.hear)
        cls.hooked, cls.folder, cls.see = True, folder, see
        try:
            yield
        finally:
            cls.folder = None


def put(files, out):
    """Has a directory hold these files and empty folders (None) alone."""
    shutil.rmtree(out, ignore_errors=True)
    for name, content in files.items():
        path = out / name
        (path if content is None else path.parent).mkdir(parents=True, exist_ok=True)
        if content is not None:
            path.write_bytes(content)


def all_of(out):
    folders = {str(path.relative_to(out)): None for path in out.rglob("*") if path.is_dir() and not any(path.iterdir())}
    return contents(out) | folders


@pytest.mark.parametrize("discard", [False, True])
def test_a_run_that_is_killed_at_any_of_its_writes_ends_like_one_that_was_not(
    train, command, tmp_path, monkeypatch, discard
):
    """It goes on, or begins anew, from whatever lies there before each of them, and leaves nothing else behind; what
    lies there of a run that is finished `make` tidies, which does not start it."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
    out, options, seen = tmp_path / "run", ["--max-updates", "5", *["--discard"] * discard], {}

    def see():
        if out.is_dir():
            files = all_of(out)
            seen.setdefault(repr(sorted((name, hash(content)) for name, content in files.items())), files)

    with Watch.on(out, see):
        assert train(*options).status == 0
    end, states = outcome(out), list(seen.values())
    whole = {"settings.json", "log.jsonl", "result.json", "examples/dev.npz", "examples/test.npz"}
    assert set(all_of(out)) - whole == set() if discard else {"best"} == {Path(x).parts[0] for x in set(end) - whole}
    finished = [files for files in states if "result.json" in files]
    assert len(states) > 45 and len(finished) > 5 and any("lock" in files for files in finished)
    for files in finished:
        put(files, out)
        paper.folder.tidy_finished({out: paper.options.parse([str(x) for x in command("--out", out, *options)[1:]])})
        assert outcome(out) == end and all_of(out).keys() == end.keys()
    for files in finished if discard else states:
        put(files, out)
        if "log.jsonl" in files and "result.json" not in files:
            (out / "log.jsonl").write_bytes(files["log.jsonl"] + b'{"update": 3, "lo')
        done = train(*options)
        assert done.status == 0 and done.messages == [] and "left out" not in done.err, (sorted(files), done.err)
        assert outcome(out) == end and all_of(out).keys() == end.keys(), sorted(files)


# --- weights that are not finite ---------------------------------------------------------------------------------


@contextlib.contextmanager
def nan_in(what, update):
    """Inside, one number of a gradient or of a weight is NaN, or a moment infinite, in that update, and no loss knows
    of it yet."""
    step, calls = slowfast.Adam.step, []

    def wrapped(optimizer, *arguments):
        if "name" not in optimizer.param_groups[0]:  # SlowFast tries the like of it first
            return step(optimizer, *arguments)
        calls.append(1)
        p = optimizer.param_groups[0]["params"][0]
        if len(calls) == update and what == "gradient":
            p.grad.view(-1)[3] = torch.nan
        step(optimizer, *arguments)
        if len(calls) == update and what == "weight":
            p.data.view(-1)[3] = torch.nan
        if len(calls) == update and what == "moment":
            optimizer.state[p]["exp_avg_sq"].view(-1)[3] = torch.inf

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slowfast.Adam, "step", wrapped)
        yield


@pytest.mark.parametrize("what", ["gradient", "weight", "moment"])
@pytest.mark.parametrize(
    ("update", "before", "every"),  # the checkpoint that there is then; updates between evaluations and checkpoints
    [(6, 4, (2, 2)), (8, 6, (2, 2)), (3, 2, (3, 2)), (8, None, (0, 0)), (4, None, (2, None)), (8, None, (0, None))],
)
def test_what_is_not_finite_is_never_saved(train, tmp_path, undisturbed, what, update, before, every):
    with nan_in(what, update):
        refused(train("--eval-every", every[0], save=every[1]), f"update {update}: ", "is not finite", "diverged")
    out = tmp_path / "run"
    found = checkpoints(out)
    assert (found[0]["update"] if found else None) == before and not (out / "result.json").exists()
    for file in out.rglob("*.safetensors"):
        assert all(w.isfinite().all() for w in load_file(file).values())
    gone_on = train("--eval-every", every[0], save=every[1])
    assert gone_on.status == 0 and (f"going on from update {before}\n" in gone_on.err) == (before is not None)
    assert every[0] != 2 or outcome(out) == outcome(undisturbed)


@pytest.mark.parametrize("what", ["gradient", "weight"])
def test_ctrl_c_saves_nothing_that_is_not_finite(train, tmp_path, undisturbed, what):
    with nan_in(what, 5), at(slowfast, "update", 5, ctrl_c, AFTER):
        refused(train(), "update 5: ", "is not finite")
    assert train().status == 0 and outcome(tmp_path / "run") == outcome(undisturbed)
