"""One run: what it leaves behind, its scores by other means, its options, runs that are stopped and go on, and
directories, disks and losses that are not as they should be."""

import collections
import contextlib
import csv
import errno
import fcntl
import itertools
import json
import os
import re
import resource
import shutil
import signal
import sys
import tarfile
import types
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import seqeval.metrics
import torch
import transformers
from conftest import contents, outcome
from safetensors.torch import load_file

import eval as measure
import model as xlmr
import paper.folder
import paper.progress
import paper.run
import slowfast
from paper import fast
from paper.__main__ import main

CELLS = ["S_I-S_II", "S_II", "V_I-V_II", "V_II", "rest"]
TASKS = ("xnli", "mlqa", "ner", "qam")
LANGUAGES = {task: ["de", "en", "es" if task == "mlqa" else "fr"] for task in TASKS}
# how mlqa and ner read: some contexts and some sentences are several windows
ROOM, STRIDE, QUESTION, SENTENCE = 32, 10, 9, 8
READING = {"mlqa": ["--max-length", ROOM, "--stride", STRIDE, "--max-question", QUESTION], "xnli": [], "qam": [],
           "ner": ["--max-length", SENTENCE, "--lr", "3e-2"]}  # fmt: skip
SETS = ["test", "xquad", "squad", "test-7x7"]
OWN = {task: ["--tests", ",".join(SETS)] if task == "mlqa" else [] for task in TASKS}
MEASURES = {"xnli": ["accuracy"], "qam": ["accuracy"], "ner": ["f1", "precision", "recall"],
            "mlqa": ["f1", "exact_match"]}  # fmt: skip

each_task = pytest.mark.parametrize("task", TASKS)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def small_model(make_model):
    """Two layers: quick, for what does not depend on the weight sets."""
    return make_model(num_hidden_layers=2)


@pytest.fixture(scope="module")
def command(small_model, tiny_data, tiny_tasks, tmp_path_factory):
    """command("ner", "--out", DIR, ...): the arguments of a run of 20 updates, in both phases, with two evaluations:
    enough that what the best model says depends on what it reads."""
    cache = tmp_path_factory.mktemp("cache")

    settings = (
        "--device cpu --precision fp32 --seed 2 --lr 1e-2 --batch-size 8 --epochs 9 --max-updates 20 --warmup 0 "
        "--window 2 --phase fraction --fraction 0.4 --log-every 5 --gap-every 15 --gap-examples 3 --eval-every 10 "
        "--save-every 8"
    ).split()

    def arguments(task, *options):
        data = tiny_data if task == "xnli" else tiny_tasks
        where = ["--model", small_model, "--data", data, "--cache", cache]
        return ["run", task, *where, *settings, *READING[task], *options]

    return arguments


SHORT = ["--max-updates", "2", "--gap-every", "0", "--eval-every", "0"]


@pytest.fixture
def train(run_main, command, tmp_path):
    """train("ner", "--lr", 1, ..., out=DIR) runs the command in this process: a Result."""

    def run(task, *options, out=tmp_path / "run"):
        return run_main(*command(task, "--out", out, *options))

    return run


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory):
    """{task: folder of a finished run}; that of mlqa was measured on all test sets. Not to be written to."""
    folders = {task: tmp_path_factory.mktemp("finished") / task for task in TASKS}
    for task, out in folders.items():
        assert main([str(a) for a in command(task, "--out", out, *OWN[task])]) == 0
    return folders


@pytest.fixture
def again(finished, tmp_path, monkeypatch, train):
    """again("ner", ...): the command on a copy of the finished run, tmp_path / "run", where nothing may train."""

    monkeypatch.setattr(slowfast, "update", None)

    def run(task, *options):
        if not (tmp_path / "run").exists():
            shutil.copytree(finished[task], tmp_path / "run")
        return train(task, *options)

    return run


def read_log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def read_result(out):
    return json.loads((out / "result.json").read_text())


def checkpoints(out):
    """[counts] of the checkpoints in a run's directory, the last one first."""
    counts = [json.loads(file.read_text())["counts"] for file in out.glob("checkpoint-*.json")]
    return sorted(counts, key=lambda c: (c["update"], c["recorded"]), reverse=True)


def refused(result, *says):
    """The command ended with status 2 and one line that says this: returns the line."""
    assert result.status == 2 and "Traceback" not in result.err, result
    assert len(result.messages) == 1 and result.messages[0] == result.err.splitlines()[-1], result.err
    assert all(str(text) in result.messages[0] for text in says), result.messages
    return result.messages[0]


# --- what a run leaves behind --------------------------------------------------------------------------------


@each_task
def test_a_run_leaves_its_settings_log_result_and_best_model(finished, task):
    out, sets = finished[task], SETS if OWN[task] else ["test"]
    assert set(contents(out)) == {"settings.json", "log.jsonl", "result.json", "best/config.json",
                                  "best/model.safetensors", "best/sentencepiece.bpe.model",
                                  "best/tokenizer.json", "best/tokenizer_config.json",
                                  *(f"examples/{split}.npz" for split in ["dev", *sets])}  # fmt: skip
    settings, result = json.loads((out / "settings.json").read_text()), read_result(out)
    assert settings == result["settings"] and list(settings)[-1] == "model_sha256"
    lr = 3e-2 if task == "ner" else 1e-2
    assert (settings["task"], settings["lr"], settings["languages"]) == (task, lr, LANGUAGES[task])
    assert (result["method"], result["seed"], result["shots"], result["updates"]) == ("slowfast", 2, 0, 20)
    assert result["best_update"] == result["dev"]["update"] in (10, 20) and result["updates_in_first_phase"] == 8
    assert result["versions"]["torch"] == torch.__version__ and result["device"] == "cpu, 1 threads"
    assert result["tokens_per_second"] > 0 and result["peak_memory_bytes"] > 1e7 and result["seconds"] >= 0
    assert result["test"]["data_sha256"] != settings["data_sha256"]
    assert [line["update"] for line in read_log(out)] == [5, 10, 15, 20]
    own, *others = MEASURES[task]
    for split in ("dev", "test"):  # the scores are those of what each example counts
        report, counts = result[split], np.load(out / "examples" / f"{split}.npz")
        assert report["measure"] == own and report.keys() & sum(MEASURES.values(), []) == set(others)
        de, en, other = report["scores"].values()
        assert report["gap"] == pytest.approx(en - (de + other) / 2)
        assert list(counts) == list(report["scores"]) == LANGUAGES[task]
        for language, score in report["scores"].items():
            right, *totals = counts[language].astype(float).sum(0)
            of_all = 200 * right / max(sum(totals), 1) if task == "ner" else 100 * right / len(counts[language])
            assert score == pytest.approx(of_all)


def test_a_run_without_out_lies_below_runs_and_is_found_again_and_another_seed_is_another(
    run_main, command, tmp_path, small_model
):
    arguments = command("xnli", *SHORT, "--no-test", "--runs", tmp_path)
    assert run_main(*arguments).status == 0
    (file,) = tmp_path.glob(f"paper/xnli/{small_model.name}/slowfast-*-lr=0.01-*seed2/result.json")
    before = contents(tmp_path)
    done = run_main(*arguments)
    assert done.status == 0 and "finished" in done.out and contents(tmp_path) == before
    assert run_main(*arguments, "--seed", "3").status == 0
    other = Path(str(file.parent).replace("seed2", "seed3"))
    assert [line["loss"] for line in read_log(file.parent)] != [line["loss"] for line in read_log(other)]


# --- the scores, by other means -------------------------------------------------------------------------------


class Best:
    """The best model as transformers loads it, and SentencePiece itself with XLM-R's ids."""

    KINDS = {"mlqa": transformers.AutoModelForQuestionAnswering, "ner": transformers.AutoModelForTokenClassification}

    def __init__(self, out, task):
        kind = self.KINDS.get(task, transformers.AutoModelForSequenceClassification)
        model, info = kind.from_pretrained(out / "best", output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        self.model = model.eval()
        self.names = list(model.config.id2label.values())
        self.processor = sentencepiece.SentencePieceProcessor(model_file=str(out / "best" / "sentencepiece.bpe.model"))

    def pieces(self, text):
        return [i + 1 if i else 3 for i in self.processor.encode(text)]

    def spans(self, text):
        """The characters of each piece of a text with one space between words, which "▁" stands for."""
        spans, end = [], -1
        for piece in self.processor.encode(text, out_type=str):
            begin, end = end, end + len(piece)
            spans.append((begin + piece.startswith("▁"), end))
        return spans

    @torch.no_grad()
    def logits(self, ids):
        """(labels,), (ids, labels) or the two ends of answers as columns, of one window by itself."""
        out = self.model(input_ids=torch.tensor([ids]))
        return out.logits[0] if "logits" in out else torch.stack([out.start_logits[0], out.end_logits[0]], 1)


def pairs_of(task, folder, split, language):
    """The [first text, second text, label] of the official files."""
    if task == "qam":
        return [line.split("\t") for line in (folder / f"xglue/QAM/{language}.{split}.tsv").read_text().splitlines()]
    with open(folder / f"XNLI-1.0/xnli.{split}.tsv") as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t") if row["language"] == language]
    return [[row["sentence1"], row["sentence2"], row["gold_label"]] for row in rows]


@pytest.mark.parametrize("task", ["xnli", "qam"])
def test_accuracies_are_those_of_the_best_model_in_transformers(finished, tiny_data, tiny_tasks, task):
    best = Best(finished[task], task)
    assert best.names == (["entailment", "neutral", "contradiction"] if task == "xnli" else ["0", "1"])
    for split, language in itertools.product(("dev", "test"), LANGUAGES[task]):
        right = []
        for a, b, label in pairs_of(task, tiny_data if task == "xnli" else tiny_tasks, split, language):
            logits = best.logits([0, *best.pieces(a), 2, 2, *best.pieces(b), 2])
            right.append(best.names[int(logits.argmax())] == label)
        score = read_result(finished[task])[split]["scores"][language]
        assert score == pytest.approx(100 * sum(right) / len(right)) and len(right) > 7


def tagged(file, member):
    """The sentences of a member of one of WikiAnn's archives, each (its tokens, its tags)."""
    with tarfile.open(file) as archive:
        text = archive.extractfile(member).read().decode()
    for block in text.strip().split("\n\n"):
        yield zip(*(line.removeprefix(f"{file.name[:2]}:").split("\t") for line in block.splitlines()))


def tags_of(best, tokens):
    """(The tags that transformers' model gives to tokens: at the first piece of each, in as few windows as hold them;
    how many windows these are)."""
    windows, tags = [[]], []
    for ids in map(best.pieces, tokens):
        if sum(map(len, windows[-1])) + len(ids) > SENTENCE - 2:
            windows.append([])
        windows[-1].append(ids)
    for window in windows:
        logits = best.logits([0, *sum(window, []), 2])
        firsts = itertools.accumulate(map(len, window[:-1]), initial=1)
        tags += [best.names[int(logits[place].argmax())] for place in firsts]
    return tags, len(windows)


def test_the_entity_scores_of_ner_are_those_of_seqeval_on_the_best_model_in_transformers(finished, tiny_tasks):
    best, several, found = Best(finished["ner"], "ner"), 0, []
    assert best.names == ["O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC"]
    for split, language in itertools.product(("dev", "test"), LANGUAGES["ner"]):
        report, gold, predicted = read_result(finished["ner"])[split], [], []
        for tokens, tags in tagged(tiny_tasks / "panx_dataset" / f"{language}.tar.gz", split):
            answer, windows = tags_of(best, tokens)
            gold.append(list(tags))
            predicted.append(answer)
            several += windows > 1
        for name, key in (("f1", "scores"), ("precision", "precision"), ("recall", "recall")):
            expected = 100 * getattr(seqeval.metrics, f"{name}_score")(gold, predicted, zero_division=0)
            assert report[key][language] == pytest.approx(expected)
        found.append(report["scores"][language])
    assert several and max(found) > 0  # sentences of more than one window, and entities that are right


def best_span(best, question, context):
    """(The text of the best answer: all windows, all starts, all ends of at most 30 pieces; how many windows)."""
    head = [0, *best.pieces(question)[:QUESTION], 2, 2]
    ids, spans, room = best.pieces(context), best.spans(context), ROOM - len(head) - 1
    begins, found = range(0, max(len(ids) - room, 0) + STRIDE, STRIDE), []
    for begin in begins:
        part, places = ids[begin : begin + room], spans[begin : begin + room]
        start, end = best.logits([*head, *part, 2])[len(head) : -1].T.tolist()
        for first, last in itertools.combinations_with_replacement(range(len(part)), 2):
            if last - first < 30:
                found.append((start[first] + end[last], context[places[first][0] : places[last][1]].strip()))
    return max(found, key=lambda answer: answer[0])[1], len(begins)


def word_f1(prediction, gold):
    predicted, right = prediction.split(), gold.split()
    common = (collections.Counter(predicted) & collections.Counter(right)).total()
    return 2 * common / (len(predicted) + len(right))


def file_of(split, name):
    """Where the official data have the questions of a set of a run's result."""
    half, (context, question) = split.removesuffix("-7x7"), (name.split("-") * 2)[:2]
    mlqa = f"MLQA_V1/{half}/{half}-context-{context}-question-{question}.json"
    return {"xquad": f"xquad/xquad.{name}.json", "squad": "squad/dev-v1.1.json"}.get(split, mlqa)


@pytest.mark.parametrize("split", ["dev", *SETS])
def test_the_answers_of_mlqa_are_those_of_the_best_model_in_transformers(finished, tiny_tasks, split):
    """A search through all spans. The words have no article and no punctuation: F1 is that of their bags."""
    best, several = Best(finished["mlqa"], "mlqa"), 0
    report = read_result(finished["mlqa"])[split]
    pairs = ["-".join(pair) for pair in itertools.product(LANGUAGES["mlqa"], repeat=2)]
    assert list(report["scores"]) == {"squad": ["en"], "test-7x7": pairs}.get(split, LANGUAGES["mlqa"])
    for name in report["scores"]:
        f1, exact = [], []
        (article,) = json.loads((tiny_tasks / file_of(split, name)).read_text())["data"]
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                found, windows = best_span(best, qa["question"], paragraph["context"])
                several += windows > 1
                f1.append(max(word_f1(found, answer["text"]) for answer in qa["answers"]))
                exact.append(found in [answer["text"] for answer in qa["answers"]])
        assert len(f1) == 4 and report["scores"][name] == pytest.approx(25 * sum(f1))
        assert report["exact_match"][name] == pytest.approx(25 * sum(exact))
    assert several and max(report["scores"].values()) > 0


# --- the log -------------------------------------------------------------------------------------------------


def test_the_log_holds_the_curves(train, tmp_path):
    """Every value of the log against its definition, from the losses of the log itself; a line has the mean loss since
    the one before."""
    options = ["--phase", "loss", "--threshold", "0.01", "--lr", "3e-3", "--max-updates", "30", "--batch-size", "4",
               "--warmup", "0.25", "--eval-every", "0"]  # fmt: skip
    train("xnli", *options, "--log-every", "1", "--gap-every", "4")
    log, in_first_phase = read_log(tmp_path / "run"), 0
    losses = [line["loss"] for line in log]
    assert [line["update"] for line in log] == list(range(1, 31))
    for t, line in enumerate(log, start=1):
        first, phi, r = True, None, None
        if t >= 4:
            recent, previous = sum(losses[t - 2 : t]) / 2, sum(losses[t - 4 : t - 2]) / 2
            first, phi = previous - recent > 0.01, recent / previous
            r = max(1 - phi**3, 0)
        in_first_phase += first
        assert (line["phase"], line["updates_in_first_phase"]) == (1 if first else 2, in_first_phase)
        assert (line["phi"], line["R"]) == (pytest.approx(phi), pytest.approx(r, abs=1e-12))
        k = {"S_I-S_II": 0.01, "S_II": 0.01} if first else {"S_II": r, "V_II": 10}
        assert line["K"] == pytest.approx({cell: k.get(cell, 1) for cell in CELLS}, abs=1e-12)
        assert line["lr"] == pytest.approx(3e-3 * min((t - 1) / 8, (31 - t) / 22))  # round(0.25 * 30) = 8
        assert ("gap" in line) == (t % 4 == 0 or t == 30)
        if "gap" in line:
            assert line["gap"] == pytest.approx(line["source"] - line["non_source"])
            assert list(line["scores"]) == LANGUAGES["xnli"]
    assert {line["phase"] for line in log[4:]} == {1, 2}

    train("xnli", *options, "--log-every", "3", "--gap-every", "10", "--no-test", out=tmp_path / "some")
    some, begin = {line["update"]: line["loss"] for line in read_log(tmp_path / "some")}, 0
    assert list(some) == [3, 6, 9, 10, *range(12, 19, 3), 20, *range(21, 31, 3)]
    for update, loss in some.items():
        assert loss == pytest.approx(sum(losses[begin:update]) / (update - begin))
        begin = update


def similarities_more_often(patch, every):
    """Has policy4=auto measure after so many updates what it measures after 100."""
    real = paper.run.due_at

    def due_at(run):
        new = run.options.policy4 == "auto" and run.update != run.recorded and run.update % every == 0
        return real(run) | ({"policy4"} if new else set())

    patch.setattr(paper.run, "due_at", due_at)


def test_policy4_auto_follows_the_similarity(train, tmp_path, monkeypatch):
    """Falling ones switch policy IV on after the tenth."""
    similarities_more_often(monkeypatch, every=1)
    values = iter([0.9, *(0.8 - 0.01 * n for n in range(11)), *[0.9] * 20])
    monkeypatch.setattr(paper.run, "similarity", lambda *_: [0.1, next(values)])
    train("xnli", "--policy4", "auto", "--fraction", "0", "--log-every", "1", "--no-test")
    log = read_log(tmp_path / "run")
    # The log of an update is written after the measurement that follows it.
    on = [line["update"] for line in log if line["K"]["V_II"] == 10]
    seen = [line["cka"][1] for line in log]  # the other layer's is constant: the mean falls when this does
    expected = [t for t in range(10, 21) if sum(seen[t - 5 : t]) < sum(seen[t - 10 : t - 5])]
    assert on == expected and 10 in on and 20 not in on


def test_policy4_auto_compares_the_same_tokens_each_time(train, tmp_path, monkeypatch):
    """After each update, before and after a stop; the log of another run has those of the update before."""
    similarities_more_often(monkeypatch, every=1)
    real, seen = paper.run.similarity, []
    monkeypatch.setattr(paper.run, "similarity", lambda *args: seen.append(args[2].tolist()) or real(*args))
    options = ["xnli", "--cka-every", "1", "--log-every", "1", "--no-test"]
    with at(paper.run, "one_more", 8, ctrl_c):
        train(*options, "--policy4", "auto")
    train(*options, "--policy4", "auto")
    assert len(seen) == 20 and all(tokens == seen[0] for tokens in seen)
    seen.clear()
    train(*options, out=tmp_path / "on")
    assert len(seen) == 20 and any(tokens != seen[0] for tokens in seen)


def test_what_is_due():
    """policy4=auto measures every 100 updates, where there is a policy IV; all but checkpoints is due once. After the
    last update the gap is, if it ever is."""
    o = types.SimpleNamespace(log_every=100, gap_every=150, cka_every=0, eval_every=120, save_every=70, policy4="auto")

    def due(t, recorded=0, method="slowfast"):
        run = types.SimpleNamespace(update=t, recorded=recorded, total=310, options=o, method=slowfast.METHODS[method])
        return paper.run.due_at(run)

    assert {t: due(t) for t in range(311) if due(t)} == {
        70: {"checkpoint"}, 100: {"log", "policy4"}, 120: {"evaluation"}, 140: {"checkpoint"}, 150: {"gap"},
        200: {"log", "policy4"}, 210: {"checkpoint"}, 240: {"evaluation"}, 280: {"checkpoint"},
        300: {"log", "gap", "policy4"}, 310: {"log", "gap", "evaluation"},
    }  # fmt: skip
    assert due(100, method="fs") == due(100, method="df") == {"log"} and due(100, method="ff") == {"log", "policy4"}
    assert due(300, recorded=300) == due(310, recorded=310) == set()
    o.gap_every = 0
    assert due(310) == {"log", "evaluation"}


# --- the options ---------------------------------------------------------------------------------------------


def test_a_method_is_begun_and_its_policies_are_in_force(train, tmp_path, small_model, tiny_model):
    train("xnli", *SHORT, "--method", "reinit-layer-1", "--lr", "0", "--no-test")
    before, after = load_file(small_model / "model.safetensors"), load_file(tmp_path / "run/best/model.safetensors")
    encoder = [name for name in after if name.startswith("roberta.")]
    assert [x for x in encoder if not torch.equal(before[x], after[x])] == [x for x in encoder if "layer.1." in x]
    enlarged = ("--method", "enlarge-2-ffn")
    train("xnli", *SHORT, *enlarged, "--no-test", "--model", tiny_model, out=tmp_path / "enlarged")
    (line,) = read_log(tmp_path / "enlarged")
    assert line["K"] == {cell: 10 if cell == "V_I-V_II" else 1 for cell in CELLS}
    refused(train("xnli", *enlarged, out=tmp_path / "none"), "--method enlarge-2-ffn", "V_I-V_II")
    refused(train("xnli", "--method", "freeze-layer-2", out=tmp_path / "none"), "--method freeze-layer-2", "0-1")


def test_dropout_and_precision_are_what_the_options_say(train, tmp_path, finished):
    options = [*SHORT, "--log-every", "1", "--dropout", "0", "--attention-dropout", "0.3"]
    train("ner", *options, "--precision", "bf16")
    train("ner", *options, out=tmp_path / "fp32")
    first, exact = (read_log(tmp_path / name)[0]["loss"] for name in ("run", "fp32"))
    assert first == pytest.approx(exact, rel=0.03) and first != exact
    assert load_file(tmp_path / "run/best/model.safetensors")["classifier.weight"].dtype == torch.float32
    for out, p in ((tmp_path / "run", (0.0, 0.3)), (finished["ner"], (0.1, 0.1))):  # else the model's own
        config = json.loads((out / "best" / "config.json").read_text())
        assert (config["hidden_dropout_prob"], config["attention_probs_dropout_prob"]) == p


@pytest.mark.parametrize(
    ("task", "options", "sizes"),  # of the training set and, by language, of the dev and of the test sets
    [
        ("xnli", ("--shots", 3), [60 + 6, (9, 12, 9), (12, 12, 12)]),
        ("mlqa", ("--shots", 3), [24 + 6, (1, 4, 1), (4, 4, 4)]),
        ("ner", ("--shots", 3, "--source", "de"), [24 + 6, (9, 6, 6), (8, 8, 8)]),
        ("ner", ("--dev-examples", 3), [24, (3, 3, 3), (8, 8, 8)]),
    ],
)
def test_few_shots_of_all_but_the_source_join_training_and_models_may_be_selected_on_few(
    train, monkeypatch, task, options, sizes
):
    seen, fit, count = [], paper.run.fit, paper.run.count
    monkeypatch.setattr(paper.run, "fit", lambda run, show: [seen.append(len(run.task.train)), fit(run, show)])
    monkeypatch.setattr(paper.run, "count", lambda m, sets, *o: seen.append(sets) or count(m, sets, *o))
    assert train(task, *SHORT, *options).status == 0
    assert [seen[0], *(tuple(map(len, sets.values())) for sets in seen[1:])] == sizes


@pytest.mark.parametrize(("select", "best"), [("all", 2), ("en", 4)])
def test_the_best_model_is_the_selected_one(train, tmp_path, monkeypatch, select, best):
    dev = {2: (60.0, 50.0, 61.0), 4: (40.0, 70.0, 41.0), 6: (50.0, 70.0, 51.0)}  # German, English, French
    scripted, models = iter([*dev.values(), (33.0, 34.0, 35.0)]), []  # the last for the test sets

    def count(model, *_):
        models.append({name: w.clone() for name, w in model.state_dict().items()})
        return {x: np.arange(100)[:, None] < score for x, score in zip(LANGUAGES["xnli"], next(scripted))}

    monkeypatch.setattr(paper.run, "count", count)
    train("xnli", "--select", select, "--eval-every", "2", "--max-updates", "6", "--gap-every", "0")
    result = read_result(tmp_path / "run")
    assert result["dev"]["update"] == best  # the first of equals
    assert [tuple(result[x]["scores"].values()) for x in ("dev", "test")] == [dev[best], (33.0, 34.0, 35.0)]
    saved = load_file(tmp_path / "run" / "best" / "model.safetensors")
    for model in (models[best // 2 - 1], models[3]):  # and it is the one that was tested
        assert all(torch.equal(w, saved[name]) for name, w in model.items())


def test_another_source_is_trained_on_and_the_gap_is_measured_from_it(train, tmp_path, finished):
    assert train("qam", "--source", "de").status == 0
    result, english = read_result(tmp_path / "run"), read_result(finished["qam"])
    assert result["settings"]["data_sha256"] != english["settings"]["data_sha256"]
    assert result["test"]["data_sha256"] == english["test"]["data_sha256"]  # the sets that are measured stay
    scores = result["test"]["scores"]
    assert result["test"]["gap"] == pytest.approx(scores["de"] - (scores["en"] + scores["fr"]) / 2)
    line, *_ = [line for line in read_log(tmp_path / "run") if "gap" in line]
    assert (line["update"], line["source"]) == (15, line["scores"]["de"])


def test_the_languages_of_a_run_are_those_that_are_asked_for(train, tmp_path, finished):
    done = train("mlqa", "--languages", "en,de")
    result = read_result(tmp_path / "run")
    assert done.status == 0 and f"slowfast seed 2, test: f1 mean {result['test']['mean']:.1f}, " in done.out
    assert list(result["dev"]["scores"]) == list(result["test"]["scores"]) == ["de", "en"]
    both = read_log(finished["mlqa"]), read_log(tmp_path / "run")  # what trains is the same
    assert [line["loss"] for line in both[0]] == [line["loss"] for line in both[1]]
    assert "finished" in train("mlqa", "--languages", "de,en").out
    train("mlqa", *SHORT, "--languages", "en", out=tmp_path / "alone")
    assert read_result(tmp_path / "alone")["test"]["gap"] is None


# --- what a run shows ----------------------------------------------------------------------------------------


def test_how_long_a_run_takes():
    """The pace of the first updates; a token that is predicted takes a third of one that is trained."""
    of = types.SimpleNamespace
    sets = {"de": of(ids=range(60)), "en": of(ids=range(40))}
    run = of(total=100, update=5, training_seconds=10.0, tokens=500, gap_sets=sets)
    run.task, run.options = of(dev=sets, tests={"test": sets}), of(gap_every=20, eval_every=40)
    # 95 updates of 2 s; 5 gaps, 3 evaluations and 1 test of 100 tokens of 20/3 ms
    assert paper.progress.seconds_of(run) == pytest.approx(190 + 900 / 150)


def test_on_a_terminal_progress_is_one_line_renewed_and_a_message_has_a_line_of_its_own(train, monkeypatch, tmp_path):
    """The message is of a loss that is not finite, which stops the run."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for options, lines in ((), 1), (("--method", "df"), 2):
        if lines == 2:  # a rate beyond all that --lr takes
            monkeypatch.setattr(slowfast, "warmup_then_decay", lambda *_: lambda t: 1e32)
        done = train("xnli", "--max-updates", "4", "--log-every", "2", *options, out=tmp_path / str(lines))
        *first, last = done.err.split("\n")
        assert last == "" and len(first) == lines
        start, *shown = first[0].split("\r")
        assert start == "" and all(re.match(r"\d/4 .*\033\[K$", line) for line in shown)
        if lines == 1:
            assert shown[-1].startswith("4/4 ") and any("evaluating" in line for line in shown)
    assert re.search(r"update [234]: the loss is (nan|inf)", refused(done, "--lr"))
    assert not (tmp_path / "2" / "result.json").exists()


# --- runs that are stopped -----------------------------------------------------------------------------------
#
# 26 updates that other things are due after: a line of the log (5), the gap (7), an evaluation (8), a checkpoint (6),
# the similarity (3), and (2) that which policy IV goes by: from the tenth on it may let V_II loose.

STOPS = ["--max-updates", "26", "--policy4", "auto", "--fraction", "0.1", "--shots", "2", "--log-every", "5",
         "--gap-every", "7", "--eval-every", "8", "--save-every", "6", "--cka-every", "3"]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(command, tmp_path_factory):
    """What the run leaves that nothing disturbs."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        similarities_more_often(patch, every=2)
        assert main([str(a) for a in command("xnli", *STOPS, "--out", out)]) == 0
    assert {line["K"]["V_II"] for line in read_log(out)} == {1, 10}  # what is stopped below does depend on them
    return outcome(out)


@pytest.fixture
def session(train, monkeypatch):
    """session("--option", ...): the run, from where it is to its end or to where it is stopped: a Result."""
    similarities_more_often(monkeypatch, every=2)
    return lambda *options: train("xnli", *STOPS, *options)


class Killed(BaseException):
    """The end of a process that had no time to do anything about it."""


def kill():
    raise Killed


def ctrl_c():
    signal.raise_signal(signal.SIGINT)


@contextlib.contextmanager
def at(owner, name, n, action, after=False):
    """Inside, does `action` before the n-th call of a function, or after it."""
    real, calls = getattr(owner, name), itertools.count(1)

    def wrapped(*arguments, **options):
        now = next(calls) == n
        if now and not after:
            action()
        returned = real(*arguments, **options)
        if now and after:
            action()
        return returned

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, wrapped)
        yield


BEFORE, AFTER = False, True
# where, and the update that Ctrl-C leaves a checkpoint of, and up to which all that was due is recorded in it
PLACES = {
    "in the first update": (slowfast, "update", 1, BEFORE, (1, 0)),
    "in an update that an evaluation follows": (slowfast, "update", 8, AFTER, (8, 7)),
    "in the last update": (slowfast, "update", 26, BEFORE, (26, 25)),
    "while the gap is measured": (paper.run, "count", 1, AFTER, (7, 6)),
    "in the midst of an evaluation": (measure, "predict", 2, BEFORE, (8, 7)),
    "while a similarity is recorded": (slowfast.SlowFast, "observe_similarity", 4, AFTER, (8, 8)),
    "while the log is written": (paper.run, "write_log", 7, AFTER, (8, 8)),
    "while the best model is saved": (xlmr, "write_tensors", 1, AFTER, (8, 8)),
    "while a checkpoint is written": (paper.folder, "write_tensors", 3, AFTER, (12, 10)),
    "while the run is tested": (paper.run, "count", 8, AFTER, (26, 25)),
    "after its result is written": (paper.run, "write_json", 2, AFTER, (26, 25)),
}


@pytest.mark.parametrize("how", [ctrl_c, kill])
@pytest.mark.parametrize("place", PLACES)
def test_a_run_that_was_stopped_ends_like_one_that_was_not(session, tmp_path, undisturbed, place, how):
    owner, name, n, after, reached = PLACES[place]
    out, handlers = tmp_path / "run", [signal.getsignal(n) for n in paper.run.Whole.SIGNALS]
    with at(owner, name, n, how, after):
        if how is kill:
            with pytest.raises(Killed):
                session()
        else:
            stopped = session()
            assert stopped.status == 130 and stopped.messages == ["paper: stopped; the same command goes on from here"]
            last = checkpoints(out)[0]
            assert (last["update"], last["recorded"]) == reached
    assert [signal.getsignal(n) for n in paper.run.Whole.SIGNALS] == handlers
    before = checkpoints(out) and not (out / "result.json").exists()
    gone_on = session()
    assert gone_on.status == 0 and gone_on.messages == [] and bool(before) == ("going on from update" in gone_on.err)
    assert outcome(tmp_path / "run") == undisturbed


def test_a_run_that_is_stopped_again_and_again(session, tmp_path, undisturbed):
    places = [(slowfast, "update", 2), (paper.run, "write_log", 1), (paper.run, "save_checkpoint", 1)]
    statuses = []
    while len(statuses) < 60 and 0 not in statuses:
        with at(*places[len(statuses) % 3], ctrl_c):
            statuses.append(session().status)
    assert statuses[:9] == [130] * 9 and statuses[-1] == 0 and outcome(tmp_path / "run") == undisturbed


def test_a_second_ctrl_c_while_the_checkpoint_of_the_first_is_written(session, tmp_path, undisturbed):
    with at(slowfast, "update", 5, ctrl_c), at(paper.folder, "write_tensors", 1, ctrl_c, AFTER):
        assert session().status == 130
    assert set(contents(tmp_path / "run")) == {"settings.json", "log.jsonl"}  # no half of a checkpoint
    assert session().status == 0 and outcome(tmp_path / "run") == undisturbed


def test_replayed_updates_are_the_plain_ones_and_go_on_where_they_were_stopped(train, tmp_path):
    """On a CPU the work that graphs replay, without graphs. Without dropout a run is the plain one; with it, one that
    is stopped, and has its buffers made anew, draws the same random numbers as one that is not."""
    for name, options in {"plain": [], "replayed": ["--replay"]}.items():
        assert train("xnli", *options, "--dropout", "0", "--attention-dropout", "0", out=tmp_path / name).status == 0
    plain, replayed = (read_log(tmp_path / name) for name in ("plain", "replayed"))
    assert [line["phase"] for line in plain] == [line["phase"] for line in replayed]
    np.testing.assert_allclose([x["loss"] for x in replayed], [x["loss"] for x in plain], rtol=1e-4)
    assert train("xnli", "--replay", out=tmp_path / "whole").status == 0
    with at(fast.Replay, "__call__", 12, ctrl_c):
        assert train("xnli", "--replay", out=tmp_path / "stopped").status == 130
    assert train("xnli", "--replay", out=tmp_path / "stopped").status == 0
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")


def test_lines_of_the_log_behind_the_checkpoint_are_gone(session, tmp_path):
    with at(slowfast, "update", 12, kill), pytest.raises(Killed):
        session()
    assert [line["update"] for line in read_log(tmp_path / "run")][-3:] == [8, 9, 10]
    with at(paper.run, "write_log", 1, ctrl_c):
        assert "going on from update 8" in session().err
    assert [line["update"] for line in read_log(tmp_path / "run")][-3:] == [6, 7, 8]


def test_a_run_goes_on_in_other_ways(session, tmp_path, undisturbed, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with at(slowfast, "update", 8, ctrl_c):
        assert session().status == 130
    others = ["--micro-batch", "8", "--eval-tokens", "9", "--save-every", "1", "--cache", "other"]
    assert session(*others).status == 0 and outcome(tmp_path / "run") == undisturbed


# --- disks, directories, models and data that are not as they should be ---------------------------------------


@pytest.mark.parametrize(
    ("owner", "name", "call", "room"),
    [(paper.run, "write_json", 1, 20), (paper.run, "write_log", 7, 1000), (paper.run, "save_checkpoint", 1, 20_000),
     (paper.run, "save_checkpoint", 2, 20_000), (xlmr, "save", 1, 20_000), (paper.run, "finish", 1, 100),
     (slowfast, "update", 9, 20_000)],
    ids=["settings", "log", "checkpoint", "later checkpoint", "best model", "result", "Ctrl-C's checkpoint"],
)  # fmt: skip
def test_a_disk_that_fills_up(session, tmp_path, undisturbed, owner, name, call, room):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fills():  # from here on no file of this process can grow beyond so many bytes
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        if owner is slowfast:
            ctrl_c()

    with at(owner, name, call, fills):
        try:
            full = session()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    refused(full, "the same command goes on")
    assert not (tmp_path / "run" / "result.json").exists() and not list((tmp_path / "run").rglob("*.part"))
    assert session().status == 0 and outcome(tmp_path / "run") == undisturbed


@pytest.mark.parametrize("is_finished", [True, False], ids=["finished", "stopped"])
def test_out_of_a_run_of_other_settings(train, tmp_path, make_model, is_finished):
    with at(slowfast, "update", 0 if is_finished else 2, ctrl_c):
        assert train("xnli", *SHORT).status == (0 if is_finished else 130)
    before = contents(tmp_path / "run")
    for option, value, says in [
        ("--lr", "2e-2", "lr 0.01 there and 0.02 here"), ("--seed", "3", "seed 2 there and 3 here"),
        ("--languages", "de,en", "languages"), ("--dev-examples", "2", "dev_examples"),
        ("--model", make_model(num_hidden_layers=2, intermediate_size=96), "model_sha256"),
    ]:  # fmt: skip
        refused(train("xnli", *SHORT, option, value), tmp_path / "run", says, "--out")
    assert contents(tmp_path / "run") == before


def test_data_are_known_by_what_is_in_them(train, tmp_path, tiny_data):
    train("xnli", *SHORT)
    file = shutil.copytree(tiny_data, tmp_path / "data") / "XNLI-MT-1.0/multinli/multinli.train.en.tsv"
    assert train("xnli", *SHORT, "--data", tmp_path / "data").status == 0  # the same, elsewhere
    file.write_text(file.read_text().replace("cow", "dog"))
    refused(train("xnli", *SHORT, "--data", tmp_path / "data"), "data_sha256")


def test_out_that_is_no_runs_directory(train, tmp_path):
    (tmp_path / "run").mkdir()
    file = tmp_path / "run" / "thesis.txt"
    file.write_text("text")
    for out in (tmp_path / "run", file, file / "run"):
        refused(train("xnli", *SHORT, out=out), out if out == tmp_path / "run" else file)
    assert contents(tmp_path / "run") == {"thesis.txt": b"text"}
    file.unlink()
    assert train("xnli", *SHORT).status == 0  # an empty one is taken


@pytest.mark.parametrize("lose", [lambda log: os.truncate(log, 300), Path.unlink], ids=["cut", "gone"])
def test_a_log_that_lost_its_end(session, tmp_path, lose):
    """What lies behind the loss cannot come back, but what is written from then on is a log."""
    with at(slowfast, "update", 9, ctrl_c):
        session()
    lose(tmp_path / "run" / "log.jsonl")
    assert session().status == 0 and {10, 25, 26} <= {line["update"] for line in read_log(tmp_path / "run")}


def test_a_run_that_another_process_is_at(train, tmp_path):
    """While it trains, and while a finished one is measured on more. (The lock is of the open file: a second command in
    this process is as good as one in another.)"""
    out, refusals = tmp_path / "run", []

    def another():
        assert paper.folder.is_taken(out)
        refusals.append(refused(train("xnli", *SHORT, "--no-test"), out, "another process is at this run"))

    for owner, name, tests in ((slowfast, "update", ["--no-test"]), (paper.run, "count", [])):
        with at(owner, name, 1, another):
            assert train("xnli", *SHORT, *tests).status == 0
    assert len(refusals) == 2 and read_result(out)["test"]
    assert not paper.folder.is_taken(out) and not paper.folder.is_taken(tmp_path / "none")


def test_runs_in_a_folder_that_machines_share(train, tmp_path, monkeypatch):
    """On NFS only what is open for writing can be locked (flock(2)); without locks there is no run."""
    flock = fcntl.flock

    def of_nfs(descriptor, operation):
        if not fcntl.fcntl(descriptor, fcntl.F_GETFL) & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", of_nfs)
    asked = []
    with at(slowfast, "update", 2, lambda: asked.append([paper.folder.is_taken(tmp_path / "run") for _ in "ab"])):
        assert train("xnli", *SHORT).status == 0
    assert asked == [[True, True]] and not paper.folder.is_taken(tmp_path / "run")

    def none(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)
    refused(train("xnli", *SHORT, out=tmp_path / "other"), tmp_path / "other", "cannot lock files (Function not")
    assert contents(tmp_path / "other") == {"lock": b""}
    with pytest.raises(OSError, match="cannot lock files"):
        paper.folder.is_taken(tmp_path / "other")  # nobody knows: `make` does not pass it over in silence


def test_a_run_that_another_process_finishes_while_this_one_reads_its_data(train, tmp_path):
    other = ["xnli", *SHORT, "--no-test"]
    with at(paper.run, "new_run", 1, lambda: train(*other)):
        refused(train(*other), "another process has finished this run meanwhile")
    with at(paper.run, "new_run", 1, lambda: train(*other, "--lr", "1", out=tmp_path / "other")):
        refused(train(*other, out=tmp_path / "other"), "other settings")
    assert read_result(tmp_path / "other")["settings"]["lr"] == 1


def test_a_run_bounds_what_is_kept_of_matrix_products(train, monkeypatch):
    """Before the first of them, where oneDNN and torch look; what somebody has set himself stays."""
    names = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    monkeypatch.delenv(names[0], raising=False)
    monkeypatch.setenv(names[1], "7")
    found = []
    with at(paper.run, "load_task", 1, lambda: found.append([os.environ.get(name) for name in names])):
        assert train("xnli", *SHORT).status == 0
    assert found == [["24", "7"]]


# --- finished runs -------------------------------------------------------------------------------------------


def test_a_finished_run_is_measured_on_more_without_training(again, tmp_path, finished, monkeypatch):
    before = contents(finished["mlqa"])
    done = again("mlqa", "--tests", "test,dev-7x7")
    assert done.status == 0 and "finished" in done.out and "slowfast seed 2, dev-7x7: f1 mean" in done.out
    assert "slowfast seed 2, test: " not in done.out  # it is there
    after = contents(tmp_path / "run")
    assert after.pop("examples/dev-7x7.npz")
    old, new = json.loads(before.pop("result.json")), json.loads(after.pop("result.json"))
    added = new.pop("dev-7x7")
    assert after == before and list(new.items()) == list(old.items())  # and the directory holds nothing else
    assert {x: added["scores"][f"{x}-{x}"] for x in LANGUAGES["mlqa"]} == old["dev"]["scores"]
    assert added["source"] == added["scores"]["en-en"] and added["data_sha256"] != old["test-7x7"]["data_sha256"]

    monkeypatch.setattr(paper.run, "count", None)  # whoever measures now fails
    whole = contents(tmp_path / "run")
    for tests in (("--tests", "test,dev-7x7"), ("--tests", "squad"), ("--no-test",), ()):
        done = again("mlqa", *tests)
        assert done.status == 0 and "finished" in done.out and contents(tmp_path / "run") == whole


@each_task
def test_a_run_that_is_stopped_and_tested_later_ends_like_one_that_was_not(train, tmp_path, finished, task):
    with at(slowfast, "update", 13, ctrl_c):
        assert train(task, "--no-test").status == 130
    gone_on = train(task, "--no-test")
    assert gone_on.status == 0 and "going on from update 13\n" in gone_on.err
    without = read_result(tmp_path / "run")
    assert without["test"] is None and "xquad" not in without
    assert train(task, *OWN[task]).status == 0
    assert outcome(tmp_path / "run") == outcome(finished[task])
    assert read_result(tmp_path / "run")["seconds"] == without["seconds"]  # the run's, as it was


def test_discarded_weights(train, tmp_path, finished):
    """The scores and all else stay; what the run was not measured on then cannot be measured any more."""
    assert train("mlqa", *OWN["mlqa"], "--discard").status == 0
    files = outcome(finished["mlqa"])
    assert outcome(tmp_path / "run") == {name: x for name, x in files.items() if not name.startswith("best/")}
    assert train("mlqa", *OWN["mlqa"]).status == 0
    refused(train("mlqa", "--tests", "dev-7x7"), tmp_path / "run", "--discard")


@pytest.mark.parametrize("name", ["settings.json", "result.json"])
@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"\xff\xfe\x00"])
def test_a_finished_run_that_is_damaged_is_named(again, tmp_path, name, text):
    again("ner")
    (tmp_path / "run" / name).write_bytes(text)
    before = contents(tmp_path / "run")
    refused(again("ner"), tmp_path / "run" / name)
    assert contents(tmp_path / "run") == before


def test_what_does_not_fit_together(train, tmp_path, make_model, small_model):
    broken = shutil.copytree(small_model, tmp_path / "broken") / "model.safetensors"
    os.truncate(broken, 200)
    short = make_model(num_hidden_layers=2, max_position_embeddings=12)
    refused(train("xnli", "--model", broken.parent), broken)
    refused(train("xnli", "--model", make_model(num_hidden_layers=2, vocab_size=30)), "vocab_size")
    refused(train("xnli", "--model", short), "--max-length")
    refused(train("xnli", "--data", tmp_path / "none"), tmp_path / "none")
    refused(train("xnli", "--languages", "en,xx"), "no language 'xx' in")
    refused(train("xnli", "--tests", "test,xquad"), "no test set 'xquad'")
    refused(train("xnli", "--shots", "12"), "12 shots")
    refused(train("xnli", "--device", "abacus"), "--device: 'abacus' is not a device")
    refused(train("mlqa", "--max-length", "20", "--stride", "18"), "--stride")
    assert not (tmp_path / "run").exists()  # and the same command runs once what is wrong is mended:
    assert train("xnli", *SHORT, "--model", short, "--max-length", "10").status == 0  # positions count from 2
