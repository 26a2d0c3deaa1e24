"""Question answering, named entities and question-answer matching from the command line to the table of their runs."""

import collections
import io
import json
import re
import shutil
import tarfile

import pytest
import sentencepiece
import seqeval.metrics
import torch
from test_cli import (  # noqa: F401  (one_thread is a fixture that is used by all tests here, too)
    Killed,
    at,
    contents,
    one_thread,
    outcome,
    read_log,
    read_result,
    refused,
    stop,
)
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import data
import eval as measure
import slowfast

TASKS = ("mlqa", "ner", "qam")
TAGS = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC")
MEASURES = {
    "mlqa": ["f1", "exact_match"],
    "ner": ["f1", "precision", "recall"],
    "qam": ["accuracy"],
}
AUTO = {
    "mlqa": AutoModelForQuestionAnswering,
    "ner": AutoModelForTokenClassification,
    "qam": AutoModelForSequenceClassification,
}
LANGUAGES = {"mlqa": ["de", "en", "es"], "ner": ["de", "en", "fr"], "qam": ["de", "en", "fr"]}
SIZES = {"mlqa": (24, 4, 4), "ner": (24, 9, 8), "qam": (24, 9, 8)}  # train, dev, test
ROOM, STRIDE, QUESTION = 32, 10, 9  # --max-length, --stride, --max-question of question answering
SENTENCE = 8  # --max-length of named entities: some sentences are two windows
WINDOWS = {"mlqa": ["--max-length", ROOM, "--stride", STRIDE, "--max-question", QUESTION], "qam": [],
           "ner": ["--max-length", SENTENCE, "--lr", "3e-2"]}  # fmt: skip
OWN = {"mlqa": ["--tests", "test,xquad,squad,test-7x7"], "ner": [], "qam": []}

each_task = pytest.mark.parametrize("task", TASKS)


@pytest.fixture(scope="module")
def small_model(make_model):
    """Two layers: quick, for what does not depend on the weight sets."""
    return make_model(num_hidden_layers=2)


@pytest.fixture(scope="module")
def plain_model(make_model):
    """Two layers without dropout: what they compute is a function of weights and data alone."""
    return make_model(num_hidden_layers=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


@pytest.fixture(scope="module")
def command(small_model, tiny_tasks, tmp_path_factory):
    """command("ner", "--out", DIR, ...): the arguments of a run of 20 updates, in both phases, with two evaluations:
    enough that what the best model says depends on what it reads."""
    cache = tmp_path_factory.mktemp("cache")

    def arguments(task, *options):
        return [
            task, "--model", small_model, "--data", tiny_tasks, "--cache", cache, "--device", "cpu",
            "--precision", "fp32", "--seed", "2", "--lr", "1e-2", "--batch-size", "8", "--epochs", "9",
            "--max-updates", "20", "--warmup", "0", "--window", "2", "--phase", "fraction", "--fraction", "0.4",
            "--log-every", "5", "--gap-every", "15", "--gap-examples", "3", "--eval-every", "10",
            "--save-every", "8", *WINDOWS[task], *options,
        ]  # fmt: skip

    return arguments


@pytest.fixture
def train(run_main, command, tmp_path):
    """train("ner", "--lr", 1, ..., out=DIR) runs the command in this process: a Result."""

    def run(task, *options, out=tmp_path / "run"):
        return run_main(*command(task, "--out", out, *options))

    return run


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory):
    """{task: folder of a finished run}; that of mlqa was measured on all test sets. Not to be written to."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    runs = tmp_path_factory.mktemp("finished")
    folders = {task: runs / task for task in TASKS}
    for task, out in folders.items():
        assert slowfast.main([str(a) for a in command(task, "--out", out, *OWN[task])]) == 0
    torch.set_num_threads(threads)
    return folders


@pytest.fixture
def again(finished, tmp_path, monkeypatch, train):
    """again("ner", ...): the command on a copy of the finished run, tmp_path / "run", where nothing may train."""

    def run(task, *options):
        if not (tmp_path / "run").exists():
            shutil.copytree(finished[task], tmp_path / "run")
        with monkeypatch.context() as patch:
            patch.setattr(slowfast, "train_one_update", None)
            return train(task, *options)

    return run


@pytest.fixture
def copied(tiny_tasks, tmp_path):
    """A copy of the data that a test may damage."""
    return shutil.copytree(tiny_tasks, tmp_path / "data")


# --- what a run leaves behind --------------------------------------------------------------------------------


@each_task
def test_a_run_leaves_its_settings_log_result_and_best_model(finished, task):
    out = finished[task]
    splits = {"dev", "test", "xquad", "squad", "test-7x7"} if task == "mlqa" else {"dev", "test"}
    assert set(contents(out)) == {"settings.json", "log.jsonl", "result.json", "best/config.json",
                                  "best/model.safetensors", "best/sentencepiece.bpe.model",
                                  *(f"examples/{split}.npz" for split in splits)}  # fmt: skip
    settings, result = json.loads((out / "settings.json").read_text()), read_result(out)
    assert settings == result["settings"] and "tests" not in settings
    assert (settings["task"], settings["source"], settings["languages"]) == (task, "en", LANGUAGES[task])
    assert settings["policy4"] == ("off" if task == "ner" else "on")
    reading = (STRIDE, QUESTION) if task == "mlqa" else (None, None)
    assert (settings.get("stride"), settings.get("max_question")) == reading
    assert result["best_update"] == result["dev"]["update"] in (10, 20)
    assert [line["update"] for line in read_log(out)] == [5, 10, 15, 20]
    assert {line["phase"] for line in read_log(out)} == {1, 2}


@each_task
def test_a_result_reports_the_tasks_measure_by_language_and_the_others_besides(finished, task):
    result = read_result(finished[task])
    own, *others = MEASURES[task]
    for split in ("dev", "test"):
        report = result[split]
        assert report["measure"] == own and list(report["scores"]) == LANGUAGES[task]
        assert {name for name in report if name in ("f1", "exact_match", "precision", "recall")} == set(others)
        assert all(list(report[name]) == LANGUAGES[task] for name in others)
        scores = dict(report["scores"])
        assert all(0 <= score <= 100 for score in scores.values())
        source, non_source = scores.pop("en"), sum(v for name, v in report["scores"].items() if name != "en") / 2
        assert report["mean"] == pytest.approx((source + sum(scores.values())) / 3)
        assert (report["source"], report["non_source"]) == (source, pytest.approx(non_source))
        assert report["gap"] == pytest.approx(source - non_source)
    assert max(result["test"]["scores"].values()) > 0
    assert result["test"]["data_sha256"] != result["settings"]["data_sha256"]


# --- the scores, by other means -------------------------------------------------------------------------------


class Pieces:
    """SentencePiece itself, with XLM-R's ids."""

    def __init__(self, folder):
        self.model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "sentencepiece.bpe.model"))

    def __call__(self, text):
        return [i + 1 if i else 3 for i in self.model.encode(text)]

    def spans(self, text):
        """The characters of each piece of a text with one space between words, which "▁" stands for."""
        spans, end = [], -1
        for piece in self.model.encode(text, out_type=str):
            begin, end = end, end + len(piece)
            spans.append((begin + piece.startswith("▁"), end))
        return spans


def best_of(out, task):
    """The model in best/ as transformers loads it, and its pieces."""
    model, info = AUTO[task].from_pretrained(out / "best", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model.eval(), Pieces(out / "best")


@torch.no_grad()
def logits_of(model, ids):
    """(ids, labels) of one window by itself; the two ends of answers as columns."""
    output = model(input_ids=torch.tensor([ids]))
    return output.logits[0] if "logits" in output else torch.stack([output.start_logits[0], output.end_logits[0]], 1)


def test_the_accuracies_of_qam_are_those_of_the_best_model_in_transformers(finished, tiny_tasks):
    model, pieces = best_of(finished["qam"], "qam")
    assert model.config.id2label == {0: "0", 1: "1"}
    for split in ("dev", "test"):
        for language in LANGUAGES["qam"]:
            lines = (tiny_tasks / "xglue" / "QAM" / f"{language}.{split}.tsv").read_text().splitlines()
            right = []
            for question, passage, label in (line.split("\t") for line in lines):
                logits = logits_of(model, [0, *pieces(question), 2, 2, *pieces(passage), 2])
                right.append(int(logits.argmax()) == int(label))
            score = read_result(finished["qam"])[split]["scores"][language]
            assert score == pytest.approx(100 * sum(right) / len(right)) and len(right) > 7


def tagged(file, member):
    """The sentences of a member of one of WikiAnn's archives, each a list of [token, tag]."""
    with tarfile.open(file) as archive:
        text = archive.extractfile(member).read().decode()
    language = file.name[:2]
    blocks = [block.splitlines() for block in text.strip().split("\n\n")]
    return [[line.removeprefix(f"{language}:").split("\t") for line in block] for block in blocks]


def tags_of(model, pieces, tokens):
    """The tags that transformers' model gives to tokens: at the first piece of each, in as few windows as hold them."""
    windows = [[]]
    for token in tokens:
        ids = pieces(token)
        if sum(map(len, windows[-1])) + len(ids) > SENTENCE - 2:
            windows.append([])
        windows[-1].append(ids)
    tags = []
    for window in windows:
        logits, place = logits_of(model, [0, *(i for ids in window for i in ids), 2]), 1
        for ids in window:
            tags.append(model.config.id2label[int(logits[place].argmax())])
            place += len(ids)
    return tags, len(windows)


def test_the_entity_scores_of_ner_are_those_of_seqeval_on_the_best_model_in_transformers(finished, tiny_tasks):
    model, pieces = best_of(finished["ner"], "ner")
    assert tuple(model.config.id2label.values()) == TAGS
    several, found = 0, []
    for split in ("dev", "test"):
        report = read_result(finished["ner"])[split]
        for language in LANGUAGES["ner"]:
            sentences = tagged(tiny_tasks / "panx_dataset" / f"{language}.tar.gz", split)
            gold = [[tag for _, tag in sentence] for sentence in sentences]
            predicted = []
            for sentence in sentences:
                tags, windows = tags_of(model, pieces, [token for token, _ in sentence])
                predicted.append(tags)
                several += windows > 1
            metrics = seqeval.metrics
            assert report["scores"][language] == pytest.approx(100 * metrics.f1_score(gold, predicted))
            assert report["precision"][language] == pytest.approx(100 * metrics.precision_score(gold, predicted))
            assert report["recall"][language] == pytest.approx(100 * metrics.recall_score(gold, predicted))
            found.append(report["scores"][language])
    assert several and max(found) > 0  # sentences of more than one window, and entities that are right


def best_span(model, pieces, question, context):
    """The text of the best answer: all windows, all starts, all ends of at most 30 pieces."""
    head, ids, spans = [0, *pieces(question)[:QUESTION], 2, 2], pieces(context), pieces.spans(context)
    room = ROOM - len(head) - 1
    best, text, windows = -float("inf"), None, 0
    for begin in range(0, len(ids), STRIDE):
        part = ids[begin : begin + room]
        start, end = logits_of(model, [*head, *part, 2]).T.tolist()
        windows += 1
        for first in range(len(part)):
            for last in range(first, min(first + 30, len(part))):
                score = start[len(head) + first] + end[len(head) + last]
                if score > best:
                    best, text = score, context[spans[begin + first][0] : spans[begin + last][1]].strip()
        if begin + room >= len(ids):
            break
    return text, windows


def word_f1(prediction, gold):
    predicted, right = prediction.split(), gold.split()
    common = (collections.Counter(predicted) & collections.Counter(right)).total()
    return 2 * common / (len(predicted) + len(right))


def file_of(split, name):
    """Where the official data have the questions of a set of a run's result."""
    context, question = (name.split("-") * 2)[:2]
    if split == "xquad":
        return f"xquad/xquad.{name}.json"
    half = split.removesuffix("-7x7")
    mlqa = f"MLQA_V1/{half}/{half}-context-{context}-question-{question}.json"
    return "squad/dev-v1.1.json" if split == "squad" else mlqa


@pytest.mark.parametrize("split", ["dev", "test", "xquad", "squad", "test-7x7"])
def test_the_answers_of_mlqa_are_those_of_the_best_model_in_transformers(finished, tiny_tasks, split):
    """A search through all spans. The words have no article and no punctuation: F1 is that of their bags."""
    model, pieces = best_of(finished["mlqa"], "mlqa")
    assert model.config.id2label == {0: "start", 1: "end"}
    report, several = read_result(finished["mlqa"])[split], 0
    pairs = [f"{context}-{question}" for context in ("de", "en", "es") for question in ("de", "en", "es")]
    assert list(report["scores"]) == {"squad": ["en"], "test-7x7": pairs}.get(split, ["de", "en", "es"])
    for name in report["scores"]:
        f1, exact = [], []
        (article,) = json.loads((tiny_tasks / file_of(split, name)).read_text())["data"]
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                found, windows = best_span(model, pieces, qa["question"], paragraph["context"])
                several += windows > 1
                f1.append(max(word_f1(found, answer["text"]) for answer in qa["answers"]))
                exact.append(found in [answer["text"] for answer in qa["answers"]])
        assert len(f1) == 4
        assert report["scores"][name] == pytest.approx(25 * sum(f1))
        assert report["exact_match"][name] == pytest.approx(25 * sum(exact))
    assert several and max(report["scores"].values()) > 0


# --- training ------------------------------------------------------------------------------------------------


def loss_in_transformers(task, model, ids, labels):
    """The mean loss of a batch, by transformers' own losses."""
    if task != "mlqa":
        return model(input_ids=ids, attention_mask=(ids != 1).long(), labels=labels).loss
    total = 0.0
    for row, (start, end) in zip(ids, labels):  # one by one: there padding is a place where an answer may begin
        row = row[row != 1][None]
        total = total + model(input_ids=row, start_positions=start[None], end_positions=end[None]).loss
    return total / len(ids)


@each_task
def test_the_losses_are_those_of_transformers_and_torchs_adam(train, tmp_path, plain_model, tiny_tasks, task):
    """Without dropout a run is transformers' model, torch.optim.Adam, clipping and the schedule."""
    options = ["--model", plain_model, "--method", "df", "--seed", "5", "--log-every", "1", "--gap-every", "0",
               "--no-test", "--clip", "0.5", "--max-updates", "6"]  # fmt: skip
    train(task, *options, "--lr", "0", "--max-updates", "1", out=tmp_path / "start")
    train(task, *options, "--lr", "5e-3", out=tmp_path / "run")
    found = [line["loss"] for line in read_log(tmp_path / "run")]

    model = AUTO[task].from_pretrained(tmp_path / "start" / "best").eval()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, eps=1e-8)
    reading = {
        "mlqa": {"max_length": ROOM, "stride": STRIDE, "max_question": QUESTION},
        "ner": {"max_length": SENTENCE},
        "qam": {},
    }
    tokenizer = data.Tokenizer(plain_model)
    examples = data.load(task, tiny_tasks, tokenizer, cache=tmp_path / "cache", **reading[task]).train
    batches = data.epoch_batches(examples.lengths, 8, seed=5, epoch=0) + data.epoch_batches(examples.lengths, 8, 5, 1)
    expected, padded = [], 0
    for update, indices in enumerate(batches[:6]):
        ids, labels = data.collate(examples, indices)
        padded += int((ids == 1).any())
        loss = loss_in_transformers(task, model, ids, labels)
        expected.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * (6 - update) / 6
        optimizer.step()
    assert found == pytest.approx(expected, rel=1e-4)
    assert padded and max(found) - min(found) > 0.01


@each_task
def test_micro_batches_change_no_more_than_rounding(train, tmp_path, plain_model, task):
    options = ["--model", plain_model, "--method", "df", "--lr", "5e-3", "--log-every", "1", "--max-updates", "6",
               "--gap-every", "0", "--no-test"]  # fmt: skip
    for name, micro in (("whole", 8), ("parts", 3)):  # 3, 3 and 2: in ner of different numbers of labels
        assert train(task, *options, "--micro-batch", micro, out=tmp_path / name).status == 0
    whole, parts = ([line["loss"] for line in read_log(tmp_path / name)] for name in ("whole", "parts"))
    assert parts == pytest.approx(whole, rel=1e-4) and max(whole) - min(whole) > 0.01


@pytest.mark.parametrize(
    ("task", "update", "kind"), [("mlqa", 11, KeyboardInterrupt), ("ner", 13, Killed), ("qam", 1, KeyboardInterrupt)]
)
def test_a_run_that_was_stopped_ends_like_one_that_was_not(train, tmp_path, monkeypatch, finished, task, update, kind):
    """Ctrl-C, or an end that leaves no time for a checkpoint: the last one was saved before the evaluation at 10."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        at(patch, slowfast, "train_one_update", update, stop(kind))
        if kind is Killed:
            with pytest.raises(Killed):
                train(task, *OWN[task])
        else:
            assert train(task, *OWN[task]).status == 130
    assert not (out / "result.json").exists()
    gone_on = train(task, *OWN[task])
    reached = update if kind is KeyboardInterrupt else 10
    assert gone_on.status == 0 and f"going on from update {reached}\n" in gone_on.err
    assert outcome(out) == outcome(finished[task])


@each_task
def test_policy4_auto_measures_the_similarity(train, tmp_path, monkeypatch, task):
    """Every 100 updates; at every update here."""
    real = slowfast.due_at
    monkeypatch.setattr(slowfast, "due_at", lambda run: real(run) | {"policy4": run.update > 0})
    assert train(task, "--policy4", "auto", "--no-test", "--max-updates", "6").status == 0
    measured = [line["cka"] for line in read_log(tmp_path / "run")]
    assert len(measured) == 6  # there is a line for each
    assert all(len(layers) == 2 and all(0 < cka < 1 + 1e-9 for cka in layers) for layers in measured)
    assert max(measured[-1]) < min(measured[0]) < 1  # the model moves away from what it was


@each_task
def test_the_default_of_policy4_holds_in_the_second_phase(train, tmp_path, task):
    """Off for named entities (the paper's Section 3.2), on for the others."""
    train(task, "--phase", "fraction", "--fraction", "0", "--max-updates", "5", "--no-test", "--gap-every", "0")
    assert {line["K"]["V_II"] for line in read_log(tmp_path / "run")} == {1 if task == "ner" else 10}


@pytest.mark.parametrize(
    ("options", "p"),
    [
        (("--dropout", "0", "--attention-dropout", "0.3"), (0.0, 0.3)),
        (("--dropout", "0.25"), (0.25, 0.1)),
        ((), (0.1, 0.1)),
    ],
    ids=["both", "one", "neither"],
)
@pytest.mark.parametrize("task", ["mlqa", "ner"])
def test_dropout_is_what_the_options_say_or_the_config(train, tmp_path, task, options, p):
    assert train(task, *options, "--max-updates", "1", "--no-test", "--gap-every", "0").status == 0
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    given = {name.lstrip("-").replace("-", "_"): float(value) for name, value in zip(options[::2], options[1::2])}
    assert {k: settings[k] for k in ("dropout", "attention_dropout")} == {
        "dropout": given.get("dropout"), "attention_dropout": given.get("attention_dropout")
    }  # fmt: skip
    config = json.loads((tmp_path / "run" / "best" / "config.json").read_text())
    assert (config["hidden_dropout_prob"], config["attention_probs_dropout_prob"]) == p


@each_task
def test_bf16_trains_and_measures_every_task(train, tmp_path, finished, task):
    done = train(task, "--precision", "bf16", "--max-updates", "5", "--log-every", "1")
    assert done.status == 0, done.err
    first = read_log(tmp_path / "run")[0]["loss"]
    assert 0 < first < 5 and read_result(tmp_path / "run")["settings"]["precision"] == "bf16"
    train(task, "--max-updates", "5", "--log-every", "1", out=tmp_path / "fp32")
    exact = read_log(tmp_path / "fp32")[0]["loss"]
    assert first == pytest.approx(exact, rel=0.03) and first != exact


# --- languages, shots and the source --------------------------------------------------------------------------


@pytest.fixture
def sizes(monkeypatch):
    """What the runs of a test train and are measured on: "train": examples, "sets": [{language: examples}, ...]."""
    seen = {"sets": []}
    real_fit, real_count = slowfast.fit, measure.count

    def fit(run, *arguments):
        seen["train"] = len(run.task.train)
        return real_fit(run, *arguments)

    def count(model, sets, *options):
        seen["sets"].append({language: len(examples) for language, examples in sets.items()})
        return real_count(model, sets, *options)

    monkeypatch.setattr(slowfast, "fit", fit)
    monkeypatch.setattr(measure, "count", count)
    return seen


@pytest.mark.parametrize(
    ("task", "source"), [("mlqa", "en"), ("ner", "en"), ("qam", "en"), ("ner", "de"), ("qam", "de")]
)
def test_few_shots_of_all_but_the_source_join_the_training_set(train, tmp_path, sizes, task, source):
    done = train(task, "--shots", "2", "--source", source, "--gap-every", "0", "--eval-every", "0",
                 "--max-updates", "2")  # fmt: skip
    assert done.status == 0, done.err
    languages, (examples, dev, test) = LANGUAGES[task], SIZES[task]
    assert sizes["sets"] == [
        {language: dev if language == source else dev - 2 for language in languages}, dict.fromkeys(languages, test)
    ]  # fmt: skip
    assert sizes["train"] == examples + 2 * 2
    assert read_result(tmp_path / "run")["shots"] == 2


@each_task
def test_models_are_selected_on_a_part_of_the_dev_sets(train, tmp_path, sizes, task):
    done = train(task, "--dev-examples", "3", "--gap-every", "0", "--eval-every", "0", "--max-updates", "1")
    assert done.status == 0, done.err
    languages, (_, _, test) = LANGUAGES[task], SIZES[task]
    assert sizes["sets"] == [dict.fromkeys(languages, 3), dict.fromkeys(languages, test)]
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert settings["dev_examples"] == 3
    done = train(task, "--dev-examples", "2", "--gap-every", "0", "--eval-every", "0", "--max-updates", "1")
    assert done.status == 2 and "dev_examples 3 there and 2 here" in done.err


@pytest.mark.parametrize("task", ["ner", "qam"])
def test_another_source_is_trained_on_and_the_gap_is_measured_from_it(train, tmp_path, finished, task):
    done = train(task, "--source", "de")
    assert done.status == 0, done.err
    result, english = read_result(tmp_path / "run"), read_result(finished[task])
    assert result["settings"]["source"] == "de"
    assert result["settings"]["data_sha256"] != english["settings"]["data_sha256"]
    assert result["test"]["data_sha256"] == english["test"]["data_sha256"]  # the sets that are measured stay
    for split in ("dev", "test"):
        scores = result[split]["scores"]
        assert list(scores) == ["de", "en", "fr"] and result[split]["source"] == scores["de"]
        assert result[split]["gap"] == pytest.approx(scores["de"] - (scores["en"] + scores["fr"]) / 2)
    (line,) = [line for line in read_log(tmp_path / "run") if "gap" in line]
    assert (line["update"], line["gap"]) == (15, pytest.approx(line["source"] - line["non_source"]))


def test_question_answering_has_one_source(train, tmp_path):
    refused(train("mlqa", "--source", "de"), "--source de", "English")
    assert not (tmp_path / "run").exists()


@each_task
def test_the_languages_of_a_run_are_those_that_are_asked_for(train, tmp_path, finished, task):
    assert train(task, "--languages", "en,de").status == 0
    result = read_result(tmp_path / "run")
    assert result["settings"]["languages"] == ["de", "en"]
    assert list(result["dev"]["scores"]) == list(result["test"]["scores"]) == ["de", "en"]
    # what trains is the same, and so is what the same best model says of the languages that are left
    both = finished[task], tmp_path / "run"
    assert [line["loss"] for line in read_log(both[0])] == [line["loss"] for line in read_log(both[1])]
    if read_result(finished[task])["best_update"] == result["best_update"]:
        scores = read_result(finished[task])["test"]["scores"]
        assert result["test"]["scores"] == {language: pytest.approx(scores[language]) for language in ("de", "en")}


@pytest.mark.parametrize("option", ["--stride", "--max-question"])
@pytest.mark.parametrize("task", ["xnli", "ner", "qam"])
def test_options_of_question_answering_are_refused_elsewhere(run_main, tmp_path, tiny_model, task, option):
    done = run_main(task, "--model", tiny_model, "--out", tmp_path / "run", option, "8")
    refused(done, option, "mlqa", task)
    assert not (tmp_path / "run").exists()


# --- test sets, at once and later -----------------------------------------------------------------------------


def test_a_run_of_question_answering_is_tested_on_what_is_asked_for(train, tmp_path, finished):
    done = train("mlqa", "--tests", "xquad,squad,test-7x7")
    assert done.status == 0
    result, whole = read_result(tmp_path / "run"), read_result(finished["mlqa"])
    assert result["test"] is None
    for name in ("xquad", "squad", "test-7x7"):
        assert result[name] == whole[name]
        assert re.search(rf"^slowfast seed 2, {name}: f1 mean {result[name]['mean']:.1f}, source \d", done.out, re.M)
    assert (result["squad"]["source"], result["squad"]["gap"]) == (result["squad"]["mean"], None)
    scores = dict(result["test-7x7"]["scores"])
    source = scores.pop("en-en")
    assert result["test-7x7"]["source"] == source and len(scores) == 8
    assert result["test-7x7"]["gap"] == pytest.approx(source - sum(scores.values()) / 8)


def test_pairs_of_a_language_with_itself_are_its_own_test_set(finished):
    result = read_result(finished["mlqa"])
    for measured in (lambda r: r["scores"], lambda r: r["exact_match"]):
        pairs, own = measured(result["test-7x7"]), measured(result["test"])
        assert {x: pairs[f"{x}-{x}"] for x in own} == own
    assert len(set(result["test-7x7"]["scores"].values())) > 3


def test_a_finished_run_is_measured_on_more_without_training(again, tmp_path, finished, monkeypatch):
    before = contents(finished["mlqa"])
    done = again("mlqa", "--tests", "test,dev-7x7")
    assert done.status == 0 and "finished" in done.out and "slowfast seed 2, dev-7x7: f1 mean" in done.out
    assert "slowfast seed 2, test: " not in done.out  # it is there
    after = contents(tmp_path / "run")
    assert after.pop("examples/dev-7x7.npz")
    old, new = json.loads(before.pop("result.json")), json.loads(after.pop("result.json"))
    assert after == before  # and the directory holds nothing else
    added = new.pop("dev-7x7")
    assert new == old and list(new) == list(old)
    assert {x: added["scores"][f"{x}-{x}"] for x in ("de", "en", "es")} == old["dev"]["scores"]
    assert len(added["data_sha256"]) == 64 and added["data_sha256"] != old["test-7x7"]["data_sha256"]

    monkeypatch.setattr(measure, "count", None)  # whoever measures now fails
    whole = contents(tmp_path / "run")
    for tests in (("--tests", "test,dev-7x7"), ("--tests", "squad"), ("--no-test",), ()):
        done = again("mlqa", *tests)
        assert done.status == 0 and "finished" in done.out and contents(tmp_path / "run") == whole


@each_task
def test_a_run_without_test_sets_is_tested_later_like_one_with_them(train, tmp_path, finished, task):
    assert train(task, "--no-test").status == 0
    without = read_result(tmp_path / "run")
    assert without["test"] is None and "xquad" not in without
    assert train(task, *OWN[task]).status == 0
    assert outcome(tmp_path / "run") == outcome(finished[task])
    assert read_result(tmp_path / "run")["seconds"] == without["seconds"]  # the run's, as it was


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '"text"', b"\xff\xfe\x00", None])
def test_a_result_that_is_damaged_is_named(again, finished, tmp_path, text):
    again("ner")
    file = tmp_path / "run" / "result.json"
    whole = file.read_bytes()
    text = whole[: len(whole) // 2] if text is None else text
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    before = contents(tmp_path / "run")
    refused(again("ner"), file)
    assert contents(tmp_path / "run") == before


def test_a_finished_run_that_lost_its_best_model_says_so(again, tmp_path):
    again("mlqa")
    (tmp_path / "run" / "best" / "model.safetensors").unlink()
    refused(again("mlqa", "--tests", "dev-7x7"), tmp_path / "run" / "best" / "model.safetensors")


@each_task
@pytest.mark.parametrize("name", ["xquad2", "test-9x9", "test, xquad", "dev"])
def test_a_test_set_that_there_is_not_is_named(train, again, tmp_path, task, name):
    refused(train(task, "--tests", f"test,{name}"), task, "no test set", "there are test")
    assert not (tmp_path / "run").exists()
    again(task)
    before = contents(tmp_path / "run")
    refused(again(task, "--tests", name), "no test set")
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("task", ["ner", "qam"])
def test_test_sets_of_question_answering_are_no_other_tasks(train, tmp_path, task):
    refused(train(task, "--tests", "xquad"), task, "'xquad'", "there are test")
    assert not (tmp_path / "run").exists()


# --- tables --------------------------------------------------------------------------------------------------


@pytest.fixture
def table(capsys):
    """table(folder, "--split", ...): what eval.py prints: [(title, rows of words), ...]."""

    def run(folder, *options):
        capsys.readouterr()
        assert measure.main(["table", str(folder), *options]) == 0
        found = []
        for block in capsys.readouterr().out.strip().split("\n\n"):
            lines = block.splitlines()
            if len(lines) == 1:
                found.append((lines[0], []))
            else:
                found[-1][1].extend(re.split(r"  +", line.strip()) for line in lines)
        return found

    return run


@each_task
def test_the_table_of_a_run(finished, table, task):
    result = read_result(finished[task])
    found = table(finished[task])
    tables = {re.split("[:,] ", title.removeprefix("slowfast: "))[0]: (title, rows) for title, rows in found}
    names = {"dev": "dev sets", "test": "test sets"}
    assert set(tables) == {names.get(k, k) for k, v in result.items() if isinstance(v, dict) and "scores" in v}
    for split, name in names.items():
        title, (header, row, *paper) = tables[name]
        assert f", {MEASURES[task][0]} in %" in title
        assert header == ["method", "seeds", *LANGUAGES[task], "mean", "source", "others", "gap"]
        report = result[split]
        values = [*report["scores"].values(), *(report[k] for k in ("mean", "source", "non_source", "gap"))]
        assert row == ["slowfast", "1", *(f"{value:.1f}" for value in values)]
        # of these three languages the paper has numbers: Table 3
        of_qam = [["paper, XLM-R base", "4", *"70.7±0.2 70.5±0.2 70.4±0.1 70.5±0.2".split(), "70.5", "70.6", "-0.1"]]
        assert paper == (of_qam if (task, split) == ("qam", "test") else [])


@pytest.mark.parametrize(("task", "name"), [("mlqa", "exact_match"), ("ner", "precision"), ("ner", "recall")])
def test_the_table_of_another_measure(finished, table, task, name):
    ((title, (_, row)),) = table(finished[task], "--split", "test", "--measure", name)
    scores = read_result(finished[task])["test"][name]
    assert f"{name} in %" in title
    assert row[2:6] == [*(f"{score:.1f}" for score in scores.values()), f"{sum(scores.values()) / 3:.1f}"]


@pytest.mark.parametrize("options", [(), ("--measure", "exact_match")], ids=["f1", "exact_match"])
def test_the_table_of_pairs_is_a_matrix_of_contexts_and_questions(finished, table, options):
    ((title, rows),) = table(finished["mlqa"], "--split", "test-7x7", *options)
    name = options[-1] if options else "f1"
    report = read_result(finished["mlqa"])["test-7x7"]
    scores = report["exact_match"] if options else report["scores"]
    assert title.startswith("slowfast: test-7x7") and f"{name} in %" in title
    assert rows[0] == ["context \\ question", "de", "en", "es"]
    assert rows[1:] == [[c, *(f"{scores[f'{c}-{q}']:.1f}" for q in ("de", "en", "es"))] for c in ("de", "en", "es")]


def test_the_table_of_runs_of_several_tasks_names_them(finished, table):
    titles = [title for title, _ in table(finished["ner"].parent, "--split", "test")]
    assert [title.split(" in %")[0] for title in titles] == [
        "mlqa: test sets, f1", "ner: test sets, f1", "qam: test sets, accuracy"
    ]  # fmt: skip


# --- bad input -----------------------------------------------------------------------------------------------


@each_task
def test_a_data_folder_that_is_not_there(train, tmp_path, task):
    line = refused(train(task, "--data", tmp_path / "none"), tmp_path / "none")
    assert f"make {task}" in line and not (tmp_path / "run").exists()


def cut(content):
    return content[: len(content) // 2]


def changed(change):
    """What damages a file of question answering: change(first paragraph of the first article)."""

    def damage(content):
        squad = json.loads(content)
        change(squad["data"][0]["paragraphs"][0])
        return json.dumps(squad).encode()

    return damage


def archive_of(text):
    """A whole archive of WikiAnn whose members all hold this text."""
    with io.BytesIO() as buffer:
        with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            for member in ("train", "dev", "test"):
                entry = tarfile.TarInfo(member)
                entry.size = len(text)
                archive.addfile(entry, io.BytesIO(text))
        return buffer.getvalue()


MLQA = "MLQA_V1/dev/dev-context-de-question-de.json"
BAD = {
    "a broken archive": ("ner", "panx_dataset/de.tar.gz", cut),
    "an archive that is a page": ("ner", "panx_dataset/en.tar.gz", lambda c: b"<html>404</html>"),
    "a tag that is none": ("ner", "panx_dataset/fr.tar.gz", lambda c: archive_of(b"fr:chat\tB-CAT\n\n")),
    "no tag at all": ("ner", "panx_dataset/fr.tar.gz", lambda c: archive_of(b"fr:chat\n\n")),
    "an empty context": ("mlqa", MLQA, changed(lambda p: p.update(context=" "))),
    "an empty question": ("mlqa", "squad/train-v1.1.json", changed(lambda p: p["qas"][0].update(question=""))),
    "no answer": ("mlqa", MLQA, changed(lambda p: p["qas"][0].update(answers=[]))),
    "answers elsewhere": ("mlqa", MLQA, changed(lambda p: p.update(context=f"x {p['context']}"))),
    "half of a JSON": ("mlqa", "squad/train-v1.1.json", cut),
    "a test set that is missing": ("mlqa", "MLQA_V1/test/test-context-es-question-es.json", None),
    "a training set that is missing": ("qam", "xglue/QAM/en.train.tsv", None),
    "a label that is none": ("qam", "xglue/QAM/fr.test.tsv", lambda c: c.replace(b"\t1\n", b"\t2\n", 1)),
    "no labels": ("qam", "xglue/QAM/fr.test.tsv", lambda c: c.replace(b"\t1\n", b"\n").replace(b"\t0\n", b"\n")),
    "not UTF-8": ("qam", "xglue/QAM/de.dev.tsv", lambda c: b"\xff" + c),
    "an empty file": ("qam", "xglue/QAM/de.dev.tsv", lambda c: b""),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_file_that_is_missing_or_damaged_is_named_and_no_run_begins(train, tmp_path, copied, bad):
    task, name, damage = BAD[bad]
    file = copied / name
    content = file.read_bytes()
    file.unlink()
    if damage:
        file.write_bytes(damage(content))
    refused(train(task, "--data", copied), file)
    assert not (tmp_path / "run").exists()


def test_windows_that_would_leave_pieces_of_a_context_unread(train, tmp_path):
    refused(train("mlqa", "--max-length", "20", "--stride", "18"), "--stride")
    assert not (tmp_path / "run").exists()
