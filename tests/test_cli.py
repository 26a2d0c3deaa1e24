"""The command line: what a run leaves behind, runs that are stopped and go on, and bad input."""

import json
import math
import os
import re
import resource
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

import data
import eval as measure
import model as xlmr
import slowfast

CELLS = ["S_I-S_II", "S_II", "V_I-V_II", "V_II", "rest"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """A run in this process computes as one in another does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def small_model(make_model):
    """Two layers: quick, for what does not depend on the weight sets."""
    return make_model(num_hidden_layers=2)


@pytest.fixture(scope="module")
def plain_model(make_model):
    """12 layers without dropout: what it computes is a function of weights and data alone."""
    return make_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


@pytest.fixture(scope="module")
def command(small_model, tiny_data, tmp_path_factory):
    """command("--out", DIR, ...): the arguments of a run of eight updates. With windows of two it sees both phases; it is
    evaluated at 4 and 8, and saves a checkpoint at 3 and 6 as well."""
    cache = tmp_path_factory.mktemp("cache")

    def arguments(*options):
        return [
            "xnli", "--model", small_model, "--data", tiny_data, "--cache", cache, "--device", "cpu", "--precision", "fp32",
            "--seed", "2", "--lr", "1e-2", "--batch-size", "8", "--max-updates", "8", "--warmup", "0.25", "--window", "2",
            "--threshold", "0", "--log-every", "2", "--gap-every", "4", "--gap-examples", "5", "--eval-every", "4",
            "--save-every", "3", *options,
        ]  # fmt: skip

    return arguments


@pytest.fixture
def train(run_main, command, tmp_path):
    """train("--lr", 1, ..., out=DIR) runs the command in this process: a Result."""

    def run(*options, out=tmp_path / "run"):
        return run_main(*command("--out", out, *options))

    return run


def read_log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def read_result(out):
    return json.loads((out / "result.json").read_text())


def contents(folder):
    """{path: bytes} of all that lies in a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in Path(folder).rglob("*") if file.is_file()}


TIMING = {"tokens_per_second", "peak_memory_bytes", "seconds"}


def outcome(out):
    """All that a finished run left, without what differs from one time to the next."""
    files = contents(out)
    files["result.json"] = {k: v for k, v in json.loads(files["result.json"]).items() if k not in TIMING}
    return files


def refused(result, *says):
    """The command ended with status 2 and one line that says this: returns the line."""
    assert result.status == 2 and "Traceback" not in result.err, result
    assert len(result.messages) == 1 and result.messages[0] == result.err.splitlines()[-1], result.err
    assert all(str(text) in result.messages[0] for text in says), result.messages
    return result.messages[0]


# --- what a run leaves behind --------------------------------------------------------------------------------


def test_a_run_leaves_its_settings_log_result_and_best_model(train, tmp_path):
    done = train("--seed", "3")
    out = tmp_path / "run"
    assert done.status == 0 and done.messages == []
    assert set(contents(out)) == {"settings.json", "log.jsonl", "result.json", "best/config.json", "best/model.safetensors",
                                  "best/sentencepiece.bpe.model", "examples/dev.npz", "examples/test.npz"}  # fmt: skip
    settings, result = json.loads((out / "settings.json").read_text()), read_result(out)
    assert settings == result["settings"]
    expected = {
        "task": "xnli", "method": "slowfast", "seed": 3, "shots": 0, "select": "all", "lr": 1e-2, "batch_size": 8,
        "max_updates": 8, "languages": ["de", "en", "fr"], "precision": "fp32", "c1": 0.01, "c2": 10.0, "r": 3.0,
    }  # fmt: skip
    assert expected.items() <= settings.items()
    assert (result["method"], result["seed"], result["shots"], result["updates"]) == ("slowfast", 3, 0, 8)
    for split in ("dev", "test"):
        scores = result[split]["scores"]
        assert list(scores) == ["de", "en", "fr"]
        assert result[split]["mean"] == pytest.approx(sum(scores.values()) / 3)
        assert result[split]["source"] == scores["en"]
        assert result[split]["non_source"] == pytest.approx((scores["de"] + scores["fr"]) / 2)
        assert result[split]["gap"] == pytest.approx(scores["en"] - (scores["de"] + scores["fr"]) / 2)
    assert result["best_update"] == result["dev"]["update"] in (4, 8)
    assert 2 <= result["updates_in_first_phase"] <= 8
    assert result["tokens_per_second"] > 0 and result["seconds"] > 0 and result["peak_memory_bytes"] > 1e7
    assert result["versions"]["torch"] == torch.__version__ and result["versions"]["python"]
    assert (result["dev"]["measure"], result["test"]["measure"]) == ("accuracy", "accuracy")
    assert "finished" in done.out and "tests" not in settings
    for split in ("dev", "test"):
        mean = result[split]["mean"]
        assert re.search(rf"^slowfast seed 3, {split}: accuracy mean {mean:.1f}, source \d", done.out, re.M)


def test_the_scores_are_those_of_the_best_model_in_transformers(train, tmp_path, tiny_data, small_model):
    train()
    out = tmp_path / "run"
    best, info = AutoModelForSequenceClassification.from_pretrained(out / "best", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert list(best.config.id2label.values()) == ["entailment", "neutral", "contradiction"]
    tokenizer = data.Tokenizer(out / "best")
    assert tokenizer.fingerprint == data.Tokenizer(small_model).fingerprint
    for split in ("dev", "test"):
        for language, rows in data.read_xnli(tiny_data / "XNLI-1.0" / f"xnli.{split}.tsv").items():
            with torch.no_grad():
                logits = [best.eval()(torch.tensor([tokenizer.pair(a, b, 128)])).logits[0] for a, b, _ in rows]
            right = sum(int(one.argmax()) == label for one, (_, _, label) in zip(logits, rows, strict=True))
            assert read_result(out)[split]["scores"][language] == pytest.approx(100 * right / 12)


def test_the_log_holds_the_curves(train, tmp_path):
    """Every value of the log against its definition, from the losses of the log itself."""
    train("--log-every", "1", "--lr", "3e-3", "--max-updates", "30", "--batch-size", "4", "--threshold", "0.01")
    log = read_log(tmp_path / "run")
    assert [line["update"] for line in log] == list(range(1, 31))
    losses, in_first_phase = [line["loss"] for line in log], 0
    for t, line in enumerate(log, start=1):
        first, phi, r = True, None, None
        if t >= 4:
            recent, previous = (losses[t - 1] + losses[t - 2]) / 2, (losses[t - 3] + losses[t - 4]) / 2
            first, phi = previous - recent > 0.01, recent / previous
            r = max(1 - phi**3, 0)
        in_first_phase += first
        assert line["phase"] == (1 if first else 2) and line["updates_in_first_phase"] == in_first_phase
        assert line["phi"] == pytest.approx(phi) and line["R"] == pytest.approx(r, abs=1e-12)
        k = {"S_I-S_II": 0.01, "S_II": 0.01} if first else {"S_II": r, "V_II": 10}
        assert list(line["K"]) == CELLS and line["K"] == pytest.approx(
            {cell: k.get(cell, 1) for cell in CELLS}, abs=1e-12
        )
        done = t - 1
        assert line["lr"] == pytest.approx(3e-3 * (done / 8 if done < 8 else (30 - done) / 22))  # round(0.25 * 30) = 8
        assert ("gap" in line) == (t % 4 == 0)
        if t % 4 == 0:
            assert line["gap"] == pytest.approx(line["source"] - line["non_source"])
    assert {line["phase"] for line in log[4:]} == {1, 2} and any(0 < line["R"] < 1 for line in log[4:])
    assert read_result(tmp_path / "run")["updates_in_first_phase"] == in_first_phase


def test_a_line_of_the_log_has_the_mean_loss_since_the_one_before(train, tmp_path):
    train("--log-every", "1", "--gap-every", "0", out=tmp_path / "every")
    train("--log-every", "3", "--gap-every", "4", out=tmp_path / "some")
    every = [line["loss"] for line in read_log(tmp_path / "every")]
    some = {line["update"]: line["loss"] for line in read_log(tmp_path / "some")}
    means = {3: sum(every[:3]) / 3, 4: every[3], 6: (every[4] + every[5]) / 2, 8: (every[6] + every[7]) / 2}
    assert some == pytest.approx(means)


def cell_of(name):
    """The cell of a parameter of a model of 12 layers."""
    layer = re.search(r"encoder\.layer\.(\d+)\.(attention)?", name)
    if layer is None:
        return "rest"
    attention = layer[2] is not None
    if int(layer[1]) < 10:
        return "S_II" if int(layer[1]) < 4 and not attention else "S_I-S_II"
    return "V_II" if attention else "V_I-V_II"


@pytest.mark.parametrize("method", ["df", "slowfast"])
def test_the_losses_are_those_of_transformers_and_torchs_adam(train, tmp_path, plain_model, tiny_data, method):
    """Without dropout a run is transformers' model, torch.optim.Adam, clipping, the schedule, and K times each rate."""
    options = [
        "--model",
        plain_model,
        "--seed",
        "5",
        "--log-every",
        "1",
        "--gap-every",
        "0",
        "--no-test",
        "--clip",
        "0.5",
    ]
    train(*options, "--lr", "0", "--method", "df", "--max-updates", "1", out=tmp_path / "start")
    train(*options, "--lr", "2e-3", "--method", method, "--threshold", "0.05", out=tmp_path / "run")
    log = read_log(tmp_path / "run")

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "start" / "best").eval()
    cells = {cell: [p for name, p in model.named_parameters() if cell_of(name) == cell] for cell in CELLS}
    optimizer = torch.optim.Adam([{"params": params} for params in cells.values()], lr=0.0, eps=1e-8)
    task = data.load_xnli(tiny_data, data.Tokenizer(plain_model), cache=tmp_path / "cache")
    for update, indices in enumerate(data.epoch_batches(task.train.lengths, 8, seed=5, epoch=0)[:8]):
        ids, labels = data.collate(task.train, indices)
        loss = model(input_ids=ids, attention_mask=(ids != 1).long(), labels=labels).loss
        assert log[update]["loss"] == pytest.approx(loss.item(), rel=1e-4)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group, k in zip(optimizer.param_groups, log[update]["K"].values()):
            group["lr"] = k * 2e-3 * (update / 2 if update < 2 else (8 - update) / 6)
        optimizer.step()
    assert max(line["loss"] for line in log) - min(line["loss"] for line in log) > 0.01
    assert method == "df" or {line["phase"] for line in log} == {1, 2}


def test_a_finished_run_is_not_run_again(train, tmp_path, monkeypatch):
    train()
    before = contents(tmp_path / "run")
    monkeypatch.setattr(slowfast, "train_one_update", None)
    again = train()
    assert again.status == 0 and "finished" in again.out and contents(tmp_path / "run") == before


@pytest.mark.parametrize("options", [("--no-test",), ("--tests", "")], ids=["no test", "tests of no name"])
def test_a_run_without_test_sets_is_tested_later(train, tmp_path, options):
    assert train(*options).status == 0
    result = read_result(tmp_path / "run")
    assert result["test"] is None and result["dev"]["scores"]
    assert train().status == 0  # "test" is the default
    train(out=tmp_path / "at once")
    later, at_once = read_result(tmp_path / "run"), read_result(tmp_path / "at once")
    assert later["test"] == at_once["test"] and later == result | {"test": later["test"]}


def test_a_run_without_out_is_named_by_what_it_is(run_main, command, tmp_path, monkeypatch, small_model):
    monkeypatch.chdir(tmp_path)
    options = ["--method", "df", "--gap-every", "0", "--no-test"]
    assert run_main(*command(*options)).status == run_main(*command(*options, "--seed", "3", "--c1", "0.5")).status == 0
    results = sorted(tmp_path.glob(f"runs/paper/xnli/{small_model.name}/*/result.json"))
    assert len(results) == 2
    assert all(file.parent.name.startswith("df-") for file in results)
    assert [("-c1=0.5-" in f.parent.name, "seed3" in f.parent.name) for f in results].count((True, True)) == 1


def test_the_seed_decides_and_nothing_else(train, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train("--seed", seed, "--gap-every", "0", out=tmp_path / name)
        torch.rand(7)  # whatever the process has drawn before
    a, b, c = ((tmp_path / name / "log.jsonl").read_text() for name in "abc")
    assert a == b and a != c
    assert outcome(tmp_path / "a") == outcome(tmp_path / "b")


# --- the methods and the options -----------------------------------------------------------------------------


def frozen(layers, block=None):
    """Whether a name is of these layers, of both blocks or of one."""

    def holds(name):
        match = re.search(r"encoder\.layer\.(\d+)\.(attention)?", name)
        return match is not None and int(match[1]) in layers and block in (None, "attention" if match[2] else "ffn")

    return holds


def either(*conditions):
    return lambda name: any(condition(name) for condition in conditions)


def embeddings(name):
    return "embeddings" in name


def nothing(name):
    return False


S_I, S_II = frozen(range(10)), frozen(range(4), "ffn")
V_I, V_II, V_I_FFN = frozen([10, 11]), frozen([10, 11], "attention"), frozen([10, 11], "ffn")
P1, P2 = ("--c1", "0"), ("--c2", "0", "--phase", "fraction", "--fraction", "0")


@pytest.mark.parametrize(
    ("method", "options", "still"),
    [
        ("df", P1, nothing),
        ("df", P2, nothing),
        ("fs", P1, S_I),
        ("fs", P2, nothing),
        ("ff", P1, nothing),
        ("ff", P2, V_II),
        ("slowfast", P1, S_I),
        ("slowfast", P2, V_II),
        ("slowfast", (*P2, "--policy4", "off"), nothing),
        ("last-1", (), either(embeddings, frozen(range(11)))),
        ("last-3", (), either(embeddings, frozen(range(9)))),
        ("freeze-4", (), frozen(range(4))),
        ("freeze-4-attention", (), frozen(range(4), "attention")),
        ("freeze-4-ffn", (), S_II),
        ("enlarge-2-ffn", (*P1, "--c2", "0"), nothing),
        ("freeze-layer-7", (), frozen([7])),
        ("only-S_I", P1, S_I),
        ("only-S_II", P1, S_II),
        ("swap-S", P1, S_II),
        ("only-V_I", P2, V_I),
        ("only-V_II", P1, either(S_I, V_I_FFN)),
        ("only-V_II", P2, V_II),
        ("swap-V", P1, either(S_I, V_I_FFN)),
        ("swap-V", P2, V_I),
    ],
)
def test_what_a_method_does_not_train(train, tmp_path, tiny_model, method, options, still):
    """With c1 = 0 in the first phase, with c2 = 0 in the second, the weights that a policy holds do not move at all."""
    done = train("--method", method, "--model", tiny_model, "--max-updates", "2", "--warmup", "0", "--window", "100",
                 "--languages", "en", "--gap-every", "0", "--eval-every", "0", "--no-test", *options)  # fmt: skip
    assert done.status == 0, done.err
    before, after = (
        load_file(tiny_model / "model.safetensors"),
        load_file(tmp_path / "run" / "best" / "model.safetensors"),
    )
    encoder = {name for name in after if name.startswith("roberta.")}
    unchanged = {name for name in encoder if torch.equal(after[name], before[name])}
    keys = {name for name in encoder if name.endswith("key.bias")}  # their gradient is 0 by its nature
    assert unchanged - keys == {name for name in encoder if still(name)} - keys


@pytest.mark.parametrize(
    ("method", "anew"),
    [("reinit-4", frozen(range(4))), ("reinit-4-attention", frozen(range(4), "attention")), ("reinit-4-ffn", S_II),
     ("reinit-layer-11", frozen([11]))],
)  # fmt: skip
def test_what_a_method_starts_anew(train, tmp_path, tiny_model, method, anew):
    train("--method", method, "--model", tiny_model, "--max-updates", "1", "--lr", "0", "--no-test")
    before, after = (
        load_file(tiny_model / "model.safetensors"),
        load_file(tmp_path / "run" / "best" / "model.safetensors"),
    )
    for name in (name for name in after if name.startswith("roberta.")):
        if not anew(name):
            assert torch.equal(after[name], before[name]), name
        elif after[name].dim() == 1:
            assert (after[name] == float(name.endswith("LayerNorm.weight"))).all(), name
        else:
            assert 0.017 < after[name].std() < 0.023 and after[name].mean().abs() < 0.003, name


def test_noisytune_adds_its_noise_to_all_that_is_pretrained(train, tmp_path, tiny_model):
    for method in ("noisytune", "df"):
        train(
            "--method",
            method,
            "--model",
            tiny_model,
            "--max-updates",
            "1",
            "--lr",
            "0",
            "--no-test",
            out=tmp_path / method,
        )
    before = load_file(tiny_model / "model.safetensors")
    after, df = (load_file(tmp_path / method / "best" / "model.safetensors") for method in ("noisytune", "df"))
    for name, w in after.items():
        if name.startswith("roberta."):
            noise = (w - before[name]) / before[name].std()
            assert 0.05 < noise.abs().max() < 0.0751, name
            assert w.numel() < 1000 or 0.9 < noise.std() / (0.15 / math.sqrt(12)) < 1.1, name
        else:
            assert torch.equal(w, df[name]), name  # the head is as without noise


def test_enlarge_is_in_force_from_the_first_update(train, tmp_path):
    train("--method", "enlarge-2-ffn", "--log-every", "1")
    assert all(
        line["K"] == {cell: 10.0 if cell == "V_I-V_II" else 1.0 for cell in CELLS}
        for line in read_log(tmp_path / "run")
    )


def test_phase_by_fraction(train, tmp_path):
    train("--phase", "fraction", "--fraction", "0.4", "--log-every", "1")
    log = read_log(tmp_path / "run")
    assert [line["phase"] for line in log] == [1] * 3 + [2] * 5  # 0.4 * 8 = 3.2
    assert [line["K"]["S_I-S_II"] for line in log] == [0.01] * 3 + [1] * 5
    assert [line["K"]["V_II"] for line in log] == [1] * 3 + [10] * 5
    assert read_result(tmp_path / "run")["updates_in_first_phase"] == 3


def test_few_shots_join_the_training_set(train, tmp_path, monkeypatch):
    sizes, real = [], measure.count

    def count(model, sets, *options):
        sizes.append({language: len(examples) for language, examples in sets.items()})
        return real(model, sets, *options)

    monkeypatch.setattr(measure, "count", count)
    done = train("--shots", "3", "--epochs", "1", "--max-updates", "99", "--gap-every", "0", "--eval-every", "0")
    assert done.status == 0
    result = read_result(tmp_path / "run")
    assert result["shots"] == 3 and result["updates"] == math.ceil((60 + 2 * 3) / 8)
    assert sizes == [{"de": 9, "en": 12, "fr": 9}, {"de": 12, "en": 12, "fr": 12}]  # dev, then test


@pytest.mark.parametrize(("select", "best"), [("all", 2), ("en", 4)])
def test_the_best_model_is_the_selected_one(train, tmp_path, monkeypatch, select, best):
    dev = {2: (60.0, 50.0, 61.0), 4: (40.0, 70.0, 41.0), 6: (50.0, 70.0, 51.0)}  # German, English, French
    scripted = iter([*dev.values(), (33.0, 34.0, 35.0)])  # the last for the test sets
    models = []

    def count(model, *_):
        models.append({name: w.clone() for name, w in model.state_dict().items()})
        return {x: np.arange(100)[:, None] < score for x, score in zip(("de", "en", "fr"), next(scripted))}

    monkeypatch.setattr(measure, "count", count)
    train("--select", select, "--eval-every", "2", "--max-updates", "6", "--gap-every", "0")
    result = read_result(tmp_path / "run")
    assert result["dev"]["update"] == best  # the first of equals
    assert tuple(result["dev"]["scores"].values()) == dev[best]
    assert tuple(result["test"]["scores"].values()) == (33.0, 34.0, 35.0)
    saved = load_file(tmp_path / "run" / "best" / "model.safetensors")
    assert all(torch.equal(w, saved[name]) for name, w in models[best // 2 - 1].items())
    assert all(torch.equal(w, saved[name]) for name, w in models[3].items())  # and it is the one that was tested


def test_policy4_auto_follows_the_similarity(train, tmp_path, monkeypatch):
    """The measurements, every 100 updates, at every update here: falling ones switch policy IV on after the tenth."""
    real = slowfast.due_at
    monkeypatch.setattr(slowfast, "due_at", lambda run: real(run) | {"policy4": run.update > 0})
    values = iter([0.9, *(0.8 - 0.01 * n for n in range(11)), *[0.9] * 20])
    monkeypatch.setattr(measure, "similarity", lambda *_: [0.1, next(values)])
    train("--policy4", "auto", "--phase", "fraction", "--fraction", "0", "--max-updates", "20", "--log-every", "1")
    log = read_log(tmp_path / "run")
    # The log of an update is written after the measurement that follows it.
    on = [line["update"] for line in log if line["K"]["V_II"] == 10]
    seen = [line["cka"][1] for line in log]  # the other layer's is constant: the mean falls when this does
    expected = [t for t in range(10, 21) if sum(seen[t - 5 : t]) < sum(seen[t - 10 : t - 5])]
    assert on == expected and 10 in on and 20 not in on


def test_policy4_auto_measures_every_hundred_updates(train, tmp_path):
    options = [
        "--policy4",
        "auto",
        "--phase",
        "fraction",
        "--fraction",
        "0",
        "--max-updates",
        "201",
        "--batch-size",
        "1",
    ]
    train(*options, "--epochs", "9", "--log-every", "50", "--gap-every", "0", "--eval-every", "0", "--save-every", "0")
    log = read_log(tmp_path / "run")
    measured = {line["update"]: line["cka"] for line in log if "cka" in line}
    assert list(measured) == [100, 200]
    assert all(len(cka) == 2 and all(0 < layer < 1 for layer in cka) for cka in measured.values())
    assert {line["K"]["V_II"] for line in log} == {1}  # two measurements are too few to tell


def test_micro_batches_change_no_more_than_rounding(train, tmp_path, plain_model):
    options = [
        "--model",
        plain_model,
        "--method",
        "df",
        "--lr",
        "2e-3",
        "--log-every",
        "1",
        "--max-updates",
        "5",
        "--no-test",
    ]
    for name, micro in (("whole", 8), ("parts", 3)):  # 3, 3 and 2
        train(*options, "--micro-batch", micro, out=tmp_path / name)
    whole, parts = ([line["loss"] for line in read_log(tmp_path / name)] for name in ("whole", "parts"))
    assert parts == pytest.approx(whole, rel=1e-4) and max(whole) - min(whole) > 0.01


def test_the_source_alone(train, tmp_path):
    done = train("--languages", "en")
    assert done.status == 0
    result = read_result(tmp_path / "run")
    assert list(result["test"]["scores"]) == ["en"] and result["test"]["gap"] is None
    assert result["settings"]["languages"] == ["en"]


def test_the_order_of_languages_makes_no_other_run(train):
    train("--languages", "de,en")
    again = train("--languages", "en,de")
    assert again.status == 0 and "finished" in again.out


def test_bf16(train, tmp_path):
    assert train("--precision", "bf16").status == 0
    assert load_file(tmp_path / "run" / "best" / "model.safetensors")["classifier.dense.weight"].dtype == torch.float32
    assert read_result(tmp_path / "run")["settings"]["precision"] == "bf16"


def test_progress_is_shown(train):
    lines = [line for line in train().err.splitlines() if re.match(r"\d+/8 ", line)]
    assert {line.split("/")[0] for line in lines} == {"2", "4", "6", "8"}
    for part in ("loss", "  P", "  K ", "gap", "updates/s", "left"):
        assert part in lines[-1]


@pytest.fixture
def terminal(monkeypatch):
    """Makes the streams of the command line look like a terminal's: terminal() once they are there."""
    return lambda: monkeypatch.setattr(sys.stderr, "isatty", lambda: True)


def test_progress_on_a_terminal_is_one_line_renewed(train, terminal):
    terminal()
    err = train().err
    assert err.endswith("\n") and err.count("\n") == 1
    shown = err.strip("\n").split("\r")
    assert shown[0] == "" and all(re.match(r"\d/8 .*\033\[K$", line) for line in shown[1:])
    assert shown[-1].startswith("8/8 ") and any("evaluating" in line for line in shown)


@pytest.mark.parametrize(
    "options", [("--lr", "1e30", "--warmup", "0"), ("--save-every", "1")], ids=["nan", "full disk"]
)
def test_a_message_on_a_terminal_has_a_line_of_its_own(train, terminal, monkeypatch, small_disk, options):
    terminal()
    at(monkeypatch, slowfast, "save_checkpoint", 3, lambda: small_disk(20_000), BEFORE)
    try:
        stopped = train(*options)
    finally:
        small_disk()
    refused(stopped)


@pytest.mark.parametrize(("seconds", "announced"), [(-1, 1), (math.inf, 0)])
def test_a_run_that_will_take_long_on_a_cpu_says_so_and_goes_on(train, tmp_path, monkeypatch, seconds, announced):
    monkeypatch.setattr(slowfast.Progress, "SLOW", seconds)
    done = train()
    assert done.status == 0 and (tmp_path / "run" / "result.json").exists()
    assert len(done.messages) == announced and all("on this CPU" in line for line in done.messages)


def test_help_names_every_option_and_method(run_main):
    done = run_main("xnli", "--help")
    assert done.status == 0
    options = """method seed model data out shots select phase policy4 lr batch-size epochs max-updates eval-every
        gap-every warmup clip c1 c2 r device precision"""
    for option in options.split():
        assert re.search(rf"^ +--{option}\b.*", done.out, re.M), option
    for method in slowfast.METHODS:
        assert method in done.out or "-layer-" in method
    assert "freeze-layer-i" in done.out and "paper: 5e-6" in done.out


# --- runs that are stopped -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(command, tmp_path_factory):
    """What the run leaves that nothing disturbs."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert slowfast.main([str(a) for a in command("--out", out)]) == 0
    torch.set_num_threads(threads)
    assert set(line["phase"] for line in read_log(out)) == {1, 2}  # policies have something to go on from
    return outcome(out)


class Killed(BaseException):
    """The end of a process that had no time to do anything about it."""


def at(monkeypatch, owner, name, call, action, after=True):
    """Does `action` before or after the n-th call of a function, once."""
    real, calls = getattr(owner, name), []

    def wrapped(*arguments, **options):
        calls.append(1)
        if not after and len(calls) == call:
            action()
        returned = real(*arguments, **options)
        if after and len(calls) == call:
            action()
        return returned

    monkeypatch.setattr(owner, name, wrapped)


def stop(kind):
    def action():
        raise kind

    return action


BEFORE, AFTER = False, True
PLACES = {
    "before the first update": (slowfast, "train_one_update", 1, BEFORE),
    "after update 1": (slowfast, "train_one_update", 1, AFTER),
    "after update 3, of a checkpoint": (slowfast, "train_one_update", 3, AFTER),
    "after update 4, of an evaluation": (slowfast, "train_one_update", 4, AFTER),
    "after update 5": (slowfast, "train_one_update", 5, AFTER),
    "after the last update": (slowfast, "train_one_update", 8, AFTER),
    "before the first line of the log": (slowfast, "write_log", 1, BEFORE),
    "after a line of the log": (slowfast, "write_log", 1, AFTER),
    "after a line of the log with a gap": (slowfast, "write_log", 2, AFTER),
    "before a checkpoint": (slowfast, "save_checkpoint", 2, BEFORE),
    "after a checkpoint": (slowfast, "save_checkpoint", 2, AFTER),
    "in the measurement of the gap": (measure, "count", 1, AFTER),
    "in the evaluation": (measure, "count", 2, AFTER),
    "in the midst of a prediction": (measure, "predict", 8, BEFORE),
    "in the last evaluation": (measure, "count", 4, BEFORE),
    "before the best model is saved": (xlmr, "save", 1, BEFORE),
    "in the midst of saving it": (xlmr, "replace", 6, BEFORE),
    "after it is saved": (xlmr, "save", 1, AFTER),
    "in the test": (measure, "count", 5, AFTER),
}


@pytest.mark.parametrize("kind", [KeyboardInterrupt, Killed])
@pytest.mark.parametrize("place", PLACES)
def test_a_run_that_was_stopped_ends_like_one_that_was_not(train, tmp_path, monkeypatch, undisturbed, place, kind):
    *where, after = PLACES[place]
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        at(patch, *where, stop(kind), after)
        if kind is Killed:
            with pytest.raises(Killed):
                train()
        else:
            stopped = train()
            assert stopped.status == 130 and len(stopped.messages) == 1
            assert "the same command goes on" in stopped.messages[0]
            assert (out / "checkpoint.pt").exists()
    assert not (out / "result.json").exists() and not list(out.rglob("*.part"))
    saved = (out / "checkpoint.pt").exists()
    gone_on = train()
    assert gone_on.status == 0 and gone_on.messages == [] and saved == ("going on from update" in gone_on.err)
    assert outcome(out) == undisturbed


def test_a_run_that_is_stopped_at_every_update(train, tmp_path, monkeypatch, undisturbed):
    for update in range(1, 9):
        with monkeypatch.context() as patch:
            at(patch, slowfast, "train_one_update", 1, stop(KeyboardInterrupt))
            assert train().status == 130
        state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
        assert state["counts"]["update"] == update
    done = train()
    assert done.status == 0 and "going on from update 8" in done.err
    assert outcome(tmp_path / "run") == undisturbed


def test_lines_of_the_log_behind_the_checkpoint_are_gone(train, tmp_path, monkeypatch):
    options = ["--log-every", "1", "--save-every", "0"]  # so the one checkpoint is that before the evaluation at 4
    with monkeypatch.context() as patch:
        at(patch, slowfast, "train_one_update", 7, stop(Killed))
        with pytest.raises(Killed):
            train(*options)
    assert [line["update"] for line in read_log(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    with monkeypatch.context() as patch:
        at(patch, slowfast, "write_log", 1, stop(KeyboardInterrupt))
        assert train(*options).status == 130
    assert [line["update"] for line in read_log(tmp_path / "run")] == [1, 2, 3, 4]


def test_ctrl_c_while_a_checkpoint_is_written(train, tmp_path, monkeypatch, undisturbed):
    at(monkeypatch, torch, "save", 2, stop(KeyboardInterrupt))
    assert train().status == 130
    assert not list((tmp_path / "run").rglob("*.part"))
    assert train().status == 0 and outcome(tmp_path / "run") == undisturbed


def test_similarities_and_shots_go_on_too(train, tmp_path, monkeypatch):
    real = slowfast.due_at
    monkeypatch.setattr(slowfast, "due_at", lambda run: real(run) | {"policy4": run.update > 0})
    options = ["--policy4", "auto", "--shots", "3", "--max-updates", "15", "--phase", "fraction"]
    train(*options, out=tmp_path / "undisturbed")
    with monkeypatch.context() as patch:
        at(patch, slowfast, "write_log", 7, stop(KeyboardInterrupt))
        assert train(*options).status == 130
    assert train(*options).status == 0
    assert "cka" in read_log(tmp_path / "run")[-1]
    assert outcome(tmp_path / "run") == outcome(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    "options", [("--micro-batch", "8"), ("--eval-tokens", "9"), ("--save-every", "1")], ids=lambda o: o[0]
)
def test_a_run_goes_on_under_options_that_change_no_result(train, tmp_path, monkeypatch, undisturbed, options):
    with monkeypatch.context() as patch:
        at(patch, slowfast, "train_one_update", 5, stop(KeyboardInterrupt))
        assert train().status == 130
    assert train(*options).status == 0 and outcome(tmp_path / "run") == undisturbed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("owner", "name", "done"), [(slowfast, "batch_of", 3), (measure, "predict", 4)],
                         ids=["in an update", "in an evaluation"])  # fmt: skip
def test_signals_stop_a_run_after_whole_updates(train, tmp_path, monkeypatch, undisturbed, number, owner, name, done):
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        at(patch, owner, name, 3, lambda: signal.raise_signal(number))
        assert train().status == 130
    assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert state["counts"]["update"] == done
    assert train().status == 0 and outcome(tmp_path / "run") == undisturbed


# Says that it is in update 3, and goes on when a line comes in.
WAITING = """
import sys, slowfast
real = slowfast.train_one_update
def train_one_update(run):
    if run.update == 2:
        print("in update 3", flush=True)
        sys.stdin.readline()
    real(run)
slowfast.train_one_update = train_one_update
sys.exit(slowfast.main())
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_process_that_is_signalled(start_command, command, train, tmp_path, undisturbed, number):
    process = start_command(None, *command("--out", tmp_path / "run"), code=WAITING)
    assert process.stdout.readline() == "in update 3\n"
    process.send_signal(number)
    out, err = process.communicate("\n", timeout=120)
    assert process.returncode == 130 and "Traceback" not in err
    assert err.splitlines()[-1] == "slowfast.py: stopped; the same command goes on from here"
    done = train()
    assert done.status == 0 and "going on from update 3" in done.err
    assert outcome(tmp_path / "run") == undisturbed


def test_a_run_in_a_process_of_its_own(run_command, command, tmp_path, undisturbed):
    done = run_command("slowfast.py", *command("--out", tmp_path / "run"))
    assert done.status == 0 and outcome(tmp_path / "run") == undisturbed
    assert all(re.match(r"\d+/8 ", line) for line in done.err.splitlines()), done.err  # progress and nothing else


# --- disks that fill up and directories that cannot be written ------------------------------------------------


@pytest.fixture
def small_disk():
    """small_disk(n): from then on no file of this process can grow beyond n bytes; small_disk() ends that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size=soft):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    yield limit
    limit()


@pytest.mark.parametrize(
    ("owner", "name", "call", "room"),
    [
        (slowfast, "run_directory", 1, 20),
        (slowfast, "write_log", 1, 60),
        (slowfast, "write_log", 2, 400),
        (slowfast, "save_checkpoint", 1, 20_000),
        (slowfast, "save_checkpoint", 2, 20_000),
        (xlmr, "save", 1, 20_000),
        (xlmr, "save", 1, 0),
        (slowfast, "finish", 1, 100),
    ],
    ids=[
        "settings",
        "log",
        "later in the log",
        "checkpoint",
        "later checkpoint",
        "best model",
        "no room at all",
        "result",
    ],
)
def test_a_disk_that_fills_up(train, tmp_path, monkeypatch, small_disk, undisturbed, owner, name, call, room):
    with monkeypatch.context() as patch:
        at(patch, owner, name, call, lambda: small_disk(room), BEFORE)
        try:
            full = train()
        finally:
            small_disk()
    refused(full)
    assert not (tmp_path / "run" / "result.json").exists() and not list((tmp_path / "run").rglob("*.part"))
    assert train().status == 0 and outcome(tmp_path / "run") == undisturbed


def test_a_process_whose_disk_fills_up(run_command, command, train, tmp_path, undisturbed):
    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    train("--max-updates", "1", out=tmp_path / "fills the cache")
    full = run_command("slowfast.py", *command("--out", tmp_path / "run"), preexec_fn=limited)
    refused(full, "the same command goes on")
    assert train().status == 0 and outcome(tmp_path / "run") == undisturbed


def test_ctrl_c_on_a_full_disk(train, tmp_path, monkeypatch, small_disk, undisturbed):
    def full_and_stopped():
        small_disk(20_000)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        at(patch, slowfast, "train_one_update", 5, full_and_stopped)
        try:
            refused(train())
        finally:
            small_disk()
    assert train().status == 0 and outcome(tmp_path / "run") == undisturbed


def test_out_under_a_file(train, tmp_path):
    (tmp_path / "file").write_text("text")
    refused(train(out=tmp_path / "file" / "run"), tmp_path / "file")
    refused(train(out=tmp_path / "file"), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "text"


def test_out_that_cannot_be_made(train, tmp_path):
    place = tmp_path / "locked"
    place.mkdir(mode=0o500)
    if os.access(place, os.W_OK):  # for root nothing is locked, but nobody makes a folder in /proc
        place = Path("/proc/self")
        if not place.is_dir():
            pytest.skip("nothing that this user cannot write")
    refused(train(out=place / "run"), place / "run")


def test_a_cache_that_cannot_be_written_does_not_stop_a_run(train, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    done = train("--cache", tmp_path / "cache", "--max-updates", "1")
    assert done.status == 0 and "cannot be written" in done.err


# --- a run's directory that is not as it should be -----------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [(("--lr", "2e-2"), "lr 0.01 there and 0.02 here"), (("--method", "df"), "method slowfast there and df here"),
     (("--seed", "3"), "seed 2 there and 3 here"), (("--languages", "de,en"), "languages"), (("--shots", "2"), "shots"),
     (("--precision", "bf16"), "precision")],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)  # fmt: skip
@pytest.mark.parametrize("finished", [True, False], ids=["finished", "stopped"])
def test_out_of_a_run_of_other_settings(train, tmp_path, monkeypatch, finished, options, says):
    with monkeypatch.context() as patch:
        if not finished:
            at(patch, slowfast, "train_one_update", 3, stop(KeyboardInterrupt))
        assert train().status == (0 if finished else 130)
    before = contents(tmp_path / "run")
    refused(train(*options), tmp_path / "run", says, "--out")
    assert contents(tmp_path / "run") == before


def test_out_of_a_run_of_another_model_or_other_data(train, tmp_path, make_model, tiny_data):
    train()
    other = make_model(num_hidden_layers=2, intermediate_size=96)
    refused(train("--model", other), "model_sha256")
    copy = tmp_path / "data"
    for name, content in contents(tiny_data).items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(content)
    assert train("--data", copy).status == 0  # the same, elsewhere
    train_file = copy / "XNLI-MT-1.0/multinli/multinli.train.en.tsv"
    train_file.write_text(train_file.read_text().replace("cow", "dog"))
    refused(train("--data", copy), "data_sha256")


def test_out_that_is_no_runs_directory(train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("text")
    refused(train(), tmp_path / "run", "--out")
    assert contents(tmp_path / "run") == {"thesis.txt": b"text"}


def test_an_empty_out_is_taken(train, tmp_path):
    (tmp_path / "run").mkdir()
    assert train().status == 0


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", b"\xff\xfe\x00"])
def test_settings_that_are_damaged(train, tmp_path, text):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "settings.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(train(), tmp_path / "run" / "settings.json", "--out")


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: c[: len(c) // 2],
        lambda c: b"",
        lambda c: b"text",
        lambda c: c[:-100],
        lambda c: c[:3000] + bytes(3000) + c[6000:],
    ],
    ids=["half", "empty", "text", "the end", "the middle"],
)
def test_a_checkpoint_that_is_damaged(train, tmp_path, monkeypatch, undisturbed, damage):
    with monkeypatch.context() as patch:
        at(patch, slowfast, "train_one_update", 5, stop(KeyboardInterrupt))
        train()
    file = tmp_path / "run" / "checkpoint.pt"
    file.write_bytes(damage(file.read_bytes()))
    refused(train(), file, "delete it")
    file.unlink()
    assert train().status == 0 and outcome(tmp_path / "run") == undisturbed


def test_a_checkpoint_of_another_model(train, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        at(patch, slowfast, "train_one_update", 5, stop(KeyboardInterrupt))
        train()
    file = tmp_path / "run" / "checkpoint.pt"
    state = torch.load(file, weights_only=True)
    lacking = dict(state["model"])
    del lacking["classifier.dense.bias"]
    for change in ({"policies": None}, {"model": lacking}, {"optimizer": {}}, {"counts": {}}):
        torch.save({**state, **change}, file)
        refused(train(), file, "delete it")


@pytest.mark.parametrize("kept", [0, 100, None], ids=["empty", "cut", "gone"])
def test_a_log_that_lost_its_end(train, tmp_path, monkeypatch, kept):
    """What lies behind the loss cannot come back, but what is written from then on is a log."""
    with monkeypatch.context() as patch:
        at(patch, slowfast, "train_one_update", 5, stop(KeyboardInterrupt))
        train()
    log = tmp_path / "run" / "log.jsonl"
    if kept is None:
        log.unlink()
    else:
        log.write_bytes(log.read_bytes()[:kept])
    done = train()
    if done.status:  # to stop is as good
        return refused(done, log)
    lines = [line for line in log.read_bytes().splitlines() if not line.startswith(b"{") or not line.endswith(b"}")]
    assert lines == [] and {6, 8} <= {line["update"] for line in read_log(tmp_path / "run")}


# --- losses that are not finite ------------------------------------------------------------------------------


def test_a_loss_that_becomes_nan_stops_the_run_with_the_updates_number(train, tmp_path):
    done = train("--lr", "1e30", "--warmup", "0", "--method", "df")
    number = re.search(r"update (\d+): the loss is (nan|inf)", refused(done))
    assert number and 2 <= int(number[1]) <= 8
    assert not (tmp_path / "run" / "result.json").exists()


def with_weights(source, folder, change):
    """A copy of a model with other weights."""
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_weight_that_is_not_finite(train, tmp_path, small_model, value):
    name = "roberta.encoder.layer.0.output.dense.weight"
    broken = with_weights(small_model, tmp_path / "model", lambda weights: weights[name].fill_(value))
    refused(train("--model", broken), "update 1: the loss is nan")


# --- options that make no sense ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--method", "slow"), "unknown method 'slow'; there are df, noisytune,"),
        (("--languages", "en,xx"), "no language 'xx' in"),
        (("--languages", "de,fr"), "lack en"),
        (("--shots", "12"), "12 shots: the dev set of de has 12"),
        (("--shots", "-1"), "--shots"),
        (("--seed", "one"), "--seed: invalid whole number value: 'one'"),
        (("--lr", "nan"), "--lr"),
        (("--lr", "-1"), "--lr"),
        (("--r", "0"), "--r"),
        (("--warmup", "1.5"), "--warmup"),
        (("--batch-size", "0"), "--batch-size"),
        (("--max-length", "4"), "--max-length"),
        (("--select", "de"), "--select"),
        (("--phase", "both"), "--phase"),
        (("--policy4", "maybe"), "--policy4"),
        (("--precision", "fp16"), "--precision"),
        (("--device", "abacus"), "--device abacus"),
        (("--frobnicate",), "--frobnicate"),
        (("--method", "freeze-layer-2"), "freeze-layer-2"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_options_that_make_no_sense(train, tmp_path, options, says):
    refused(train(*options), says)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments", [("mnli", "--model", "m"), (), ("xnli",)])
def test_a_task_that_is_none(run_main, arguments):
    refused(run_main(*arguments))


# --- models and data that are not there or not whole ----------------------------------------------------------


@pytest.fixture
def copied(tmp_path, small_model, tiny_data):
    """{"model": folder, "data": folder}: copies that a test may damage."""
    for name, source in (("model", small_model), ("data", tiny_data)):
        for file, content in contents(source).items():
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_bytes(content)
    return {"model": tmp_path / "model", "data": tmp_path / "data"}


def cut(content):
    return content[: len(content) // 2]


@pytest.mark.parametrize(
    ("what", "name", "damage"),
    [
        ("model", "model.safetensors", None),
        ("model", "model.safetensors", cut),
        ("model", "model.safetensors", lambda c: b"<html>404</html>"),
        ("model", "config.json", None),
        ("model", "config.json", cut),
        ("model", "config.json", lambda c: c.replace(b'"num_hidden_layers": 2', b'"num_hidden_layers": 3')),
        ("model", "sentencepiece.bpe.model", None),
        ("model", "sentencepiece.bpe.model", lambda c: c[:100]),
        ("data", "XNLI-1.0/xnli.dev.tsv", None),
        ("data", "XNLI-1.0/xnli.test.tsv", cut),
        ("data", "XNLI-1.0/xnli.test.tsv", lambda c: c.replace(b"neutral", b"")),
        ("data", "XNLI-MT-1.0/multinli/multinli.train.en.tsv", lambda c: b""),
        ("data", "XNLI-MT-1.0/multinli/multinli.train.en.tsv", lambda c: c.replace(b"entailment", b"entails", 1)),
    ],
)
def test_a_file_that_is_missing_or_damaged(train, copied, what, name, damage):
    """One line that names the file; and when the file is mended, the same command runs."""
    file = copied[what] / name
    content = file.read_bytes()
    file.unlink()
    if damage:
        file.write_bytes(damage(content))
    options = ["--model", copied["model"], "--data", copied["data"]]
    message = refused(train(*options))
    assert str(file) in message or (name == "config.json" and str(file.parent) in message)
    file.write_bytes(content)
    assert train(*options).status == 0


def test_a_model_of_fewer_pieces_than_its_tokenizer(train, make_model):
    refused(train("--model", make_model(num_hidden_layers=2, vocab_size=30)), "vocab_size")


def test_examples_longer_than_the_models_positions(train, make_model):
    model = make_model(num_hidden_layers=2, max_position_embeddings=12)
    refused(train("--model", model), "--max-length")
    assert train("--model", model, "--max-length", "10").status == 0  # positions count from 2


@pytest.mark.parametrize("missing", ["--model", "--data"])
def test_a_folder_that_is_not_there(train, tmp_path, missing):
    refused(train(missing, tmp_path / "none"), tmp_path / "none")
    assert not (tmp_path / "run").exists()


# --- from runs to the table ----------------------------------------------------------------------------------


def test_the_table_of_real_runs(train, tmp_path, capsys):
    for method, seed in (("df", 1), ("df", 2), ("slowfast", 1)):
        train("--method", method, "--seed", seed, out=tmp_path / "runs" / f"{method}{seed}")
    assert measure.main(["table", str(tmp_path / "runs")]) == 0
    out = capsys.readouterr().out
    scores = [read_result(tmp_path / "runs" / f"df{seed}")["test"]["mean"] for seed in (1, 2)]
    row = next(line for line in out.splitlines() if line.startswith("df ")).split()
    assert row[1] == "2" and row[5].startswith(f"{sum(scores) / 2:.1f}±")
