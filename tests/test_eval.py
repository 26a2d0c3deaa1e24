"""Scores, predictions, linear CKA against its definition, and the tables."""

import copy
import itertools
import json
import re
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import eval as measure
import model as xlmr
from data import BOS, EOS, IGNORED, Examples, InputError

ROOT = Path(__file__).resolve().parent.parent

# --- predictions and scores ----------------------------------------------------------------------------------

SIZES = {
    "vocab_size": 60, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 3,
    "max_position_embeddings": 40, "hidden_dropout_prob": 0.4,
}  # fmt: skip


def network(seed=0, kind=xlmr.SequenceClassifier):
    torch.manual_seed(seed)
    model = kind(xlmr.Config(**SIZES, labels=("a", "b", "c")))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(0.4 * torch.randn_like(p) + name.endswith("LayerNorm.weight"))
        if kind is xlmr.SequenceClassifier:
            model.classifier.out_proj.bias.zero_()  # or one class would be predicted everywhere
    return model


def sentences(n=41, seed=0):
    """Random Examples of 4 to 37 ids."""
    random = np.random.default_rng(seed)
    ids = [[0, *random.integers(4, 60, random.integers(2, 36)).tolist(), 2] for _ in range(n)]
    return Examples.from_lists(ids, random.integers(0, 3, n).tolist())


@torch.no_grad()
def one_by_one(model, examples):
    """The logits, without a batch, padding, or an order of our choice: a row for each window, or for each id."""
    ids = torch.from_numpy(examples.ids).long()
    spans = zip(examples.offsets[:-1], examples.offsets[1:])
    logits = [model.eval()(ids[None, start:end]) for start, end in spans]
    return torch.cat([x[0] if x.dim() == 3 else x for x in logits]).numpy()


@pytest.mark.parametrize("tokens", [1, 8, 100, 10**6])
def test_predictions_do_not_depend_on_the_batches(tokens):
    model, examples = network(), sentences()
    expected = one_by_one(model, examples)
    assert np.bincount(expected.argmax(1)).max() < 33  # of 41: the comparison says something
    found = measure.predict(model.train(), examples, tokens=tokens)
    assert found.dtype == np.float32 and found.shape == (41, 3)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert found.argmax(1).tolist() == expected.argmax(1).tolist()


@pytest.mark.parametrize("tokens", [1, 100, 10**6])
@pytest.mark.parametrize(("kind", "columns"), [(xlmr.TokenClassifier, 3), (xlmr.QuestionAnswering, 2)])
def test_predictions_of_each_id_do_not_depend_on_the_batches(kind, columns, tokens):
    model, examples = network(kind=kind), sentences()
    found = measure.predict(model.train(), examples, tokens=tokens)
    assert found.shape == (len(examples.ids), columns) and found.std() > 0.1
    np.testing.assert_allclose(found, one_by_one(model, examples), atol=1e-4)


def test_predictions_follow_the_order_of_the_examples():
    model, examples = network(), sentences()
    order = np.random.default_rng(1).permutation(len(examples))
    found = measure.predict(model, examples.take(order), tokens=50)
    np.testing.assert_allclose(found, one_by_one(model, examples)[order], atol=1e-4)


def test_predictions_leave_no_gradients():
    model = network()
    measure.predict(model, sentences())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_precision_is_that_of_the_matrix_products(precision, dtype):
    seen = []
    model = network()
    model.roberta.encoder.layer[1].output.dense.register_forward_hook(lambda module, x, y: seen.append(y.dtype))
    measure.predict(model, sentences(), precision=precision)
    assert set(seen) == {dtype} and {p.dtype for p in model.parameters()} == {torch.float32}


def labelled(*labels):
    return Examples.from_lists([[BOS, 5, EOS]] * len(labels), labels)


def test_accuracy_is_in_percent():
    logits = np.array([[1, 0, -1], [-3, -1, -2], [0, 0.1, 0.2], [0, 1, 2]], np.float32)  # 0, 1, 2, 2
    assert measure.accuracy(logits, labelled(0, 1, 2, 1)) == {"accuracy": 75.0}
    assert measure.accuracy(logits, labelled(1, 0, 0, 0)) == {"accuracy": 0.0}
    assert measure.accuracy(logits[:1], labelled(0)) == {"accuracy": 100.0}


def test_evaluate_gives_each_language_its_accuracy():
    model = network()
    sets = {"de": sentences(20, seed=1), "en": sentences(30, seed=2)}
    right = {language: one_by_one(model, part).argmax(1) == part.labels for language, part in sets.items()}
    found = measure.evaluate(model, sets, measure.accuracy, tokens=64)
    assert found == {"accuracy": pytest.approx({language: 100 * np.mean(r) for language, r in right.items()})}
    assert 0 < found["accuracy"]["de"] != found["accuracy"]["en"]


def test_evaluate_gives_all_measures_of_a_task():
    """Gold tags that are the model's own: every score is 100; with every third of them changed to O none is."""
    model, examples = network(kind=xlmr.TokenClassifier), sentences(30)
    labels = measure.predict(model, examples, tokens=50).argmax(1)  # O, B-PER and I-PER
    special = np.isin(examples.ids, (BOS, EOS))
    labels[special] = IGNORED
    assert set(labels) == {IGNORED, 0, 1, 2}
    same = Examples(examples.ids, examples.offsets, labels)
    other = Examples(examples.ids, examples.offsets, np.where(special | (np.arange(len(labels)) % 3 > 0), labels, 0))
    found = measure.evaluate(model, {"de": other, "en": same}, measure.MEASURES["ner"], tokens=50)
    assert list(found) == ["f1", "precision", "recall"]  # the task's own measure first
    for scores in found.values():
        assert list(scores) == ["de", "en"] and 0 < scores["de"] < scores["en"] == 100


def test_summary():
    found = measure.summary({"de": 60.0, "en": 84.0, "fr": 63.0})
    assert found == pytest.approx({"mean": 69.0, "source": 84.0, "non_source": 61.5, "gap": 22.5})
    assert measure.summary({"de": 60.0, "en": 84.0}, source="de")["gap"] == -24.0
    assert measure.summary({"en": 84.0}) == {"mean": 84.0, "source": 84.0, "non_source": None, "gap": None}


# --- linear CKA ----------------------------------------------------------------------------------------------


def cka_by_definition(x, y):
    """HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)), HSIC(K, L) = tr(KHLH) / (n - 1)^2 (Kornblith et al. 2019, Sec. 3)."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    n = len(x)
    K, L, H = x @ x.T, y @ y.T, np.eye(n) - np.ones((n, n)) / n

    def hsic(a, b):
        return np.trace(a @ H @ b @ H) / (n - 1) ** 2

    return hsic(K, L) / np.sqrt(hsic(K, K) * hsic(L, L))


def representations(n, p, q, seed=0):
    """Two that are alike to a degree, far from 0 on average, with features of very different sizes."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(n, p)) * np.logspace(-2, 1, p) + 3
    y = x @ random.normal(size=(p, q)) * 0.3 + random.normal(size=(n, q)) - 5
    return torch.tensor(x), torch.tensor(y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(50, 8, 8), (50, 3, 20), (6, 40, 30), (2, 5, 1), (200, 32, 32)])
def test_linear_cka_is_its_definition(size, dtype):
    x, y = (z.to(dtype) for z in representations(*size))
    assert measure.linear_cka(x, y) == pytest.approx(cka_by_definition(x, y), rel=1e-9)


def test_linear_cka_is_of_the_size_it_should_be():
    x, y = representations(300, 10, 10)
    independent = torch.tensor(np.random.default_rng(5).normal(size=(300, 10)))
    assert measure.linear_cka(x, x) == pytest.approx(1)
    assert 0.05 < measure.linear_cka(x, y) < 0.999
    assert measure.linear_cka(independent, x) < 0.05


@pytest.mark.parametrize(
    "change",
    [
        lambda y: y @ torch.linalg.qr(torch.randn(y.shape[1], y.shape[1], dtype=y.dtype))[0],
        lambda y: -7.3 * y,
        lambda y: y + torch.arange(y.shape[1]),
        lambda y: torch.cat([y, torch.ones(len(y), 3)], 1),
    ],
    ids=["orthogonal", "scaling", "translation", "constant features"],
)
def test_linear_cka_does_not_change_with(change):
    torch.manual_seed(0)
    x, y = representations(60, 12, 9)
    assert measure.linear_cka(x, change(y)) == pytest.approx(measure.linear_cka(x, y), rel=1e-9)
    assert measure.linear_cka(change(x), y) == pytest.approx(measure.linear_cka(y, x), rel=1e-9)


def test_linear_cka_changes_with_an_invertible_map_and_is_not_known_of_a_constant():
    x, y = representations(60, 12, 9)
    assert measure.linear_cka(x / torch.tensor(np.logspace(-2, 1, 12)), y) < 0.9 * measure.linear_cka(x, y)
    assert np.isnan(measure.linear_cka(torch.ones(10, 3), torch.randn(10, 3)))


def padded(lengths=(12, 5, 30)):
    torch.manual_seed(3)
    ids = torch.ones(len(lengths), max(lengths), dtype=torch.long)
    for row, length in zip(ids, lengths):
        row[:length] = torch.randint(2, 60, (length,))
    return ids


@pytest.mark.parametrize("training", [True, False])
def test_similarity_is_the_cka_of_each_layer_on_the_real_tokens(training):
    model, ids = network(), padded()
    reference = copy.deepcopy(model.roberta).eval()
    model.train(training)
    assert measure.similarity(model, reference, ids) == pytest.approx([1.0] * 3)
    with torch.no_grad():
        for p in model.roberta.encoder.layer[1].parameters():
            p.add_(0.3 * torch.randn_like(p))
    found = measure.similarity(model, reference, ids)
    assert model.training == training

    def states(encoder):  # each sentence by itself: no padding
        parts = [encoder.hidden_states(row[row != 1][None]) for row in ids]
        return [torch.cat([part[layer][0] for part in parts]).detach() for layer in range(1, 4)]

    expected = [cka_by_definition(a, b) for a, b in zip(states(model.eval().roberta), states(reference))]
    assert found == pytest.approx(expected, abs=1e-5)
    assert found[0] == pytest.approx(1) and max(found[1:]) < 0.99
    wider = torch.cat([ids, torch.ones(3, 7, dtype=torch.long)], 1)
    assert measure.similarity(model, reference, wider) == pytest.approx(found, abs=1e-6)


# --- the paper's numbers -------------------------------------------------------------------------------------

# Table 7 and, for the mean, Table 2 (M = 0): copied from the paper by hand.
PRINTED = {
    "df": "ar 72.2 0.3  bg 78.0 0.3  de 77.3 0.2  el 76.0 0.1  en 84.8 0.3  es 79.5 0.2  fr 78.7 0.3  hi 70.7 0.2  "
    "ru 76.1 0.5  sw 65.1 0.4  th 72.7 0.2  tr 73.1 0.1  ur 66.5 0.5  vi 75.1 0.1  zh 74.5 0.4  mean 74.7 0.2",
    "slowfast": "ar 73.6 0.2  bg 79.0 0.2  de 78.1 0.3  el 76.6 0.2  en 85.6 0.2  es 80.2 0.5  fr 79.5 0.1  "
    "hi 71.5 0.2  ru 77.1 0.3  sw 65.9 0.3  th 73.3 0.1  tr 74.2 0.3  ur 67.1 0.1  vi 76.2 0.1  "
    "zh 75.9 0.2  mean 75.6 0.1",
    "noisytune": "el 75.6 0.1  sw 65.1 0.4  zh 74.5 0.4  mean 74.9 0.2",
    "fs": "ar 73.0 0.2  en 85.2 0.2  ru 76.8 0.4  sw 65.4 0.5  ur 66.5 0.3  zh 75.0 0.3  mean 75.2 0.3",
    "ff": "ar 72.6 0.4  en 85.0 0.0  th 73.6 0.1  ur 67.2 0.6  vi 75.4 0.3  zh 74.9 0.1  mean 75.0 0.2",
}


@pytest.mark.parametrize("method", PRINTED)
def test_the_papers_numbers(method):
    words = PRINTED[method].split()
    printed = dict(zip(words[::3], zip(map(float, words[1::3]), map(float, words[2::3]))))
    found = measure.paper_row("xnli", method)
    assert {column: found[column] for column in printed} == printed and len(found) == 16
    # No column is another's: the row's mean is the printed one, to rounding. (NoisyTune's row repeats most of DF's.)
    if method != "noisytune":
        assert np.mean([found[k][0] for k in found if k != "mean"]) == pytest.approx(found["mean"][0], abs=0.1)


def test_the_papers_numbers_for_qam():
    df = {"de": (70.0, 0.1), "en": (70.2, 0.2), "fr": (69.1, 0.5), "mean": (69.7, 0.2)}
    assert measure.paper_row("qam", "df") == df
    assert measure.paper_row("qam", "slowfast")["fr"] == (70.4, 0.1)


@pytest.mark.parametrize(
    ("row", "mean"),
    [  # Table 2, copied from the paper by hand
        (("ner", "df"), (61.3, 0.2)),
        (("ner", "ff", 10), (70.7, 0.1)),
        (("ner", "slowfast", 20), (72.9, 0.1)),
        (("mlqa", "noisytune", 5), (64.8, 0.2)),
        (("mlqa", "fs", 20), (66.8, 0.2)),
        (("mlqa", "slowfast"), (66.6, 0.2)),
        (("xnli", "fs", 5), (75.5, 0.2)),
        (("xnli", "slowfast", 20), (76.5, 0.2)),
    ],
)
def test_the_papers_averages(row, mean):
    assert measure.paper_row(*row) == {"mean": mean}


@pytest.mark.parametrize(
    "row", [("xnli", "last-1"), ("ner", "last-1"), ("qam", "fs"), ("qam", "df", 5), ("xnli", "df", 1), ("other", "df")]
)
def test_what_the_paper_has_no_row_for(row):
    assert measure.paper_row(*row) == {}


def paper_tables():
    file = ROOT.parent / "shared" / "paper" / "tables.json"
    if not file.is_file():
        pytest.skip("the paper's tables lie outside the repository, and not here")
    return json.loads(file.read_text(encoding="utf-8"))


def test_all_averages_are_those_of_table_2():
    table = paper_tables()["table2"]
    rows = [(task, method) for task, methods in table.items() for method in methods]
    assert len(rows) == 15
    for task, method in rows:
        assert set(table[task][method]) == {"0", "5", "10", "20"}
        for shots, printed in table[task][method].items():
            assert measure.paper_row(task, method, int(shots))["mean"] == tuple(printed)


@pytest.mark.parametrize(("task", "number"), [("xnli", "table7"), ("qam", "table3")])
def test_all_numbers_by_language_are_those_of_tables_3_and_7(task, number):
    tables = paper_tables()
    rows = tables[number]["qam"] if task == "qam" else tables[number]
    assert len(rows) == (2 if task == "qam" else 5)
    for method, printed in rows.items():
        printed = {"mean" if language == "avg" else language: tuple(pair) for language, pair in printed.items()}
        if task == "xnli":
            printed["mean"] = tuple(tables["table2"]["xnli"][method]["0"])
        assert measure.paper_row(task, method) == printed


# --- the tables ----------------------------------------------------------------------------------------------


def result(method="df", seed=1, dev=(60.0, 80.0), test=(62.0, 82.0), languages=("de", "en"), **settings):
    """A run's result.json, made up."""

    def split(scores):
        return {"update": 10, "scores": dict(zip(languages, scores))} if scores else None

    s = {"task": "xnli", "method": method, "seed": seed, "shots": 0, "lr": 5e-6, "model": "m", "data": "d", **settings}
    return {"method": method, "seed": seed, "shots": s["shots"], "settings": s, "dev": split(dev), "test": split(test)}


@pytest.fixture
def runs(tmp_path):
    """runs(result, result, ...) writes them to a folder of runs and gives that."""

    def write(*results):
        for n, content in enumerate(results):
            folder = tmp_path / "runs" / "xnli" / f"run{n}"
            folder.mkdir(parents=True)
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / "result.json").write_text(text)
        return tmp_path / "runs"

    return write


def rows_of(folder, split="test"):
    """{label: {column: cell}} of a table; the paper's rows by the label of the row above them."""
    header, *rows = measure.table(measure.read_runs([folder]), split)
    found, above = {}, None
    for row in rows:
        above, label = (row[0], row[0]) if row[0].strip() == row[0] else (above, f"{above}: paper")
        assert label not in found and len(row) == len(header)
        found[label] = dict(zip(header, row))
    return found


def test_a_row_holds_means_and_sample_standard_deviations(runs):
    tests = [(60.0, 80.0), (61.0, 82.0), (65.0, 81.0)]
    table = rows_of(runs(*(result(seed=n, test=test) for n, test in enumerate(tests)), result("fs", test=(70.0, 90.0))))
    df = table["df"]
    assert df["seeds"] == "3" and df["de"] == f"62.0±{statistics.stdev([60, 61, 65]):.1f}" == "62.0±2.6"
    assert df["en"] == df["source"] == "81.0±1.0"
    assert df["others"] == df["de"]
    assert df["mean"] == "71.5±1.5"  # of 70, 71.5, 73
    assert df["gap"] == "19.0±2.6"  # of 20, 21, 16
    one = table["fs"]
    assert (one["seeds"], one["de"], one["mean"], one["gap"]) == ("1", "70.0", "80.0", "20.0")


FIFTEEN = tuple("ar bg de el en es fr hi ru sw th tr ur vi zh".split())


def everywhere(method, score=50.0, **options):
    """A made-up result in all 15 languages."""
    return result(method, languages=FIFTEEN, dev=(score,) * 15, test=(score,) * 15, **options)


def test_the_papers_row_stands_under_ours(runs):
    folder = runs(
        everywhere("slowfast", seed=1), everywhere("slowfast", seed=2), everywhere("last-1"), everywhere("df", shots=1)
    )
    table = rows_of(folder)
    paper = table["slowfast: paper"]
    assert (paper["de"], paper["en"], paper["zh"], paper["mean"]) == ("78.1±0.3", "85.6±0.2", "75.9±0.2", "75.6±0.1")
    # The sum of the 14 languages but English in PRINTED is 1048.2; 1048.2 / 14 = 74.87.
    assert (paper["source"], paper["others"], paper["gap"], paper["seeds"]) == ("85.6", "74.9", "10.7", "4")
    assert set(table) == {"slowfast", "slowfast: paper", "last-1", "df"}  # none for one shot, none for last-1
    assert set(rows_of(folder, "dev")) == {"slowfast", "last-1", "df"}  # the paper's scores are the test sets'


def test_the_papers_row_does_not_stand_beside_other_languages(runs):
    assert set(rows_of(runs(result("slowfast"), result("df", languages=("en", "xx"))))) == {"slowfast", "df"}


def test_the_papers_few_shot_rows_are_averages_alone(runs):
    table = rows_of(runs(everywhere("df", shots=0), everywhere("df", shots=5), everywhere("df", shots=20)))
    assert {label for label in table if "paper" not in label} == {"df shots=0", "df shots=5", "df shots=20"}
    assert table["df shots=0: paper"]["ar"] == "72.2±0.3"
    for shots, mean in ((5, "75.1±0.2"), (20, "75.5±0.3")):
        paper = table[f"df shots={shots}: paper"]
        assert {column: paper[column] for column in paper if paper[column]} == {
            "method": "  paper, XLM-R base", "seeds": "4", "mean": mean,
        }  # fmt: skip


@pytest.mark.parametrize(
    ("task", "method", "n", "mean"),
    [("mlqa", "slowfast", 7, "66.6±0.2"), ("ner", "df", 40, "61.3±0.2"), ("qam", "slowfast", 3, "70.5±0.2")],
)
def test_the_papers_row_stands_beside_the_papers_languages_alone(runs, task, method, n, mean):
    def over(languages, **settings):
        scores = (60.0,) * len(languages)
        return result(method, task=task, languages=languages, dev=scores, test=scores, **settings)

    languages = {"mlqa": data.MLQA_LANGUAGES, "ner": tuple(data.NER_LANGUAGES), "qam": ("de", "en", "fr")}[task]
    assert len(languages) == n
    folder = runs(over(languages, seed=1), {**over(languages, seed=2), "xquad": over(languages)["test"]})
    table = rows_of(folder)
    assert table[f"{method}: paper"]["mean"] == mean and table[method]["seeds"] == "2"
    paper = table[f"{method}: paper"]
    if task == "qam":  # the paper has its languages
        assert (paper["en"], paper["source"]) == ("70.5±0.2", "70.5")
        assert float(paper["gap"]) == pytest.approx(70.5 - (70.7 + 70.4) / 2, abs=0.051)
    else:  # and of these the average alone
        assert {column for column in paper if paper[column]} == {"method", "seeds", "mean"}
    # Not beside dev sets, nor other test sets, nor fewer languages
    assert set(rows_of(folder, "dev")) == set(rows_of(folder, "xquad")) == {method}
    few = [{**run, "test": over(languages[:-1])["test"]} for run in measure.read_runs([folder])]
    assert len(measure.table(few)) == 2
    assert len(measure.table(measure.read_runs([folder]), paper=False)) == 2
    others = (*languages[:-1], "xx")  # as many, but not the paper's
    assert len(measure.table([{**run, "test": over(others)["test"]} for run in few])) == 2


def test_the_papers_row_does_not_stand_beside_another_measure(runs):
    run = everywhere("slowfast", task="xnli")
    run["test"]["second"] = run["test"]["scores"]
    folder = runs(run)
    assert len(measure.table(measure.read_runs([folder]))) == 3
    assert len(measure.table(measure.read_runs([folder]), measure="second")) == 2


def test_different_settings_are_different_rows(runs):
    folder = runs(result(seed=1), result(seed=2), result(seed=1, lr=5e-5), result("fs"), result("fs", shots=5, lr=1e-5))
    table = rows_of(folder)
    labels = {label for label in table if not label.endswith(": paper")}
    assert labels == {"df lr=5e-06", "df lr=5e-05", "fs shots=0 lr=5e-06", "fs shots=5 lr=1e-05"}
    assert table["df lr=5e-06"]["seeds"] == "2" and table["df lr=5e-05"]["seeds"] == "1"


def test_different_models_are_different_rows(runs):
    one, other = (result(model=f"models/{name}", model_sha256=name * 32) for name in "ab")
    assert set(rows_of(runs(one, other))) == {"df model=models/a", "df model=models/b"}


def test_where_model_and_data_lie_makes_no_row(runs):
    table = rows_of(runs(result(seed=1), result(seed=2, model="elsewhere", data="elsewhere")))
    assert table["df"]["seeds"] == "2"


def test_runs_of_different_languages_share_a_table(runs):
    table = rows_of(runs(result(), result("fs", languages=("en", "fr"))))
    assert (table["df"]["fr"], table["fs"]["de"], table["fs"]["fr"]) == ("-", "-", "82.0")


def test_a_run_of_the_source_alone_has_no_gap(runs):
    table = rows_of(runs(result(languages=("en",), test=(82.0,), dev=(80.0,))))
    assert (table["df"]["mean"], table["df"]["others"], table["df"]["gap"]) == ("82.0", "-", "-")


def test_a_run_without_test_scores_is_in_the_dev_table_alone(runs, capsys):
    folder = runs(result(), result("fs", test=None))
    assert set(rows_of(folder)) == {"df"} and set(rows_of(folder, "dev")) == {"df", "fs"}
    assert measure.main(["table", str(folder)]) == 0
    out = capsys.readouterr().out
    assert out.index("test sets, accuracy in %") < out.index("dev sets, accuracy in %")


def test_the_terminals_table_is_aligned(runs, capsys):
    folder = runs(result("slowfast", seed=1), result("slowfast", seed=2, test=(5.0, 100.0)), result("df"))
    assert measure.main(["table", str(folder), "--split", "test"]) == 0
    title, *lines = [line for line in capsys.readouterr().out.split("\n") if line]
    assert "test sets" in title and len(lines) == 3 and len({len(line) for line in lines}) == 1
    assert lines[0].split() == "method seeds de en mean source others gap".split()
    assert lines[1].split()[:4] == ["df", "1", "62.0", "82.0"]
    assert lines[2].split()[:4] == ["slowfast", "2", "33.5±40.3", "91.0±12.7"]


def test_the_markdown_table_is_one(runs, capsys):
    folder = runs(result(), result("fs"), result("fs", lr=1e-3))
    assert measure.main(["table", str(folder), "--markdown"]) == 0
    lines = capsys.readouterr().out.split("\n")
    blocks = [
        list(block) for is_table, block in itertools.groupby(lines, lambda line: line.startswith("|")) if is_table
    ]
    assert len(blocks) == 2  # test and dev, something else between them
    for header, rule, *rows in blocks:
        cells = [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in (header, *rows)]
        assert {len(row) for row in cells} == {8} and cells[0][0].strip() == "method"
        assert [row[0].strip() for row in cells if "paper" not in row[0]][1:] == ["df", "fs lr=0.001", "fs lr=5e-06"]
        assert re.fullmatch(r"\|( -+:? \|){8}", rule)


QA = {"task": "mlqa"}


def answers(method="df", f1=(60.0, 80.0), exact=(40.0, 70.0), **options):
    """A made-up result with two measures, as question answering has them."""
    run = result(method, dev=f1, test=f1, **QA, **options)
    for split in ("dev", "test"):
        run[split] |= {"measure": "f1", "exact_match": dict(zip(options.get("languages", ("de", "en")), exact))}
    return run


def crossed(method="df", first=50.0, seed=1):
    """A made-up result of contexts and questions in two languages: 50, 51, 52, 53 %."""
    pairs = ("de-de", "de-en", "en-de", "en-en")
    scores = {pair: first + i for i, pair in enumerate(pairs)}
    exact = {pair: score - 20 for pair, score in scores.items()}
    run = answers(method, seed=seed)
    run["test-7x7"] = {"update": 10, "measure": "f1", "scores": scores, "exact_match": exact}
    return run


def sections(capsys, *arguments):
    """{title: [cells of each line]} of what eval.py prints."""
    assert measure.main([str(a) for a in arguments]) == 0
    blocks = [block for block in capsys.readouterr().out.split("\n\n") if block.strip()]
    assert len(blocks) % 2 == 0
    lines = [[re.split(r" {2,}", line.strip()) for line in block.strip("\n").split("\n")] for block in blocks[1::2]]
    found = dict(zip((title.strip() for title in blocks[::2]), lines))
    assert len(found) == len(blocks) // 2  # no two with the same title
    return found


def test_a_table_by_another_measure(runs, capsys):
    folder = runs(answers(), answers(seed=2, exact=(42.0, 72.0)), answers("fs", exact=(30.0, 50.0)), result("ff", **QA))
    own = rows_of(folder)
    assert (own["df"]["de"], own["df"]["gap"], set(own)) == ("60.0±0.0", "20.0±0.0", {"df", "fs", "ff"})
    (title, rows), *others = sections(capsys, "table", folder, "--split", "test", "--measure", "exact_match").items()
    assert not others and "exact_match in %" in title
    assert rows[0] == "method seeds de en mean source others gap".split()
    assert rows[1] == "df 2 41.0±1.4 71.0±1.4 56.0±1.4 71.0±1.4 41.0±1.4 30.0±0.0".split()
    assert rows[2:] == ["fs 1 30.0 50.0 40.0 50.0 30.0 20.0".split()]  # ff has no such scores


def test_the_title_names_the_tasks_own_measure(runs, capsys):
    titles = list(sections(capsys, "table", runs(answers())))
    assert [title.split(" in %")[0] for title in titles] == ["test sets, f1", "dev sets, f1"]


def test_results_that_name_no_measure_are_of_accuracy(runs, capsys):
    folder = runs(result())
    assert "measure" not in measure.read_runs([folder])[0]["test"]
    titles = list(sections(capsys, "table", folder))
    assert [title.split(" in %")[0] for title in titles] == ["test sets, accuracy", "dev sets, accuracy"]


def test_a_table_by_language_has_languages_as_rows(runs, capsys):
    folder = runs(result(), result("fs", test=(70.0, 90.0)))
    ((_, rows),) = sections(capsys, "table", folder, "--split", "test", "--by-language").items()
    assert rows == [
        ["method", "df", "fs"], ["seeds", "1", "1"], ["de", "62.0", "70.0"], ["en", "82.0", "90.0"],
        ["mean", "72.0", "80.0"], ["source", "82.0", "90.0"], ["others", "62.0", "70.0"], ["gap", "20.0", "20.0"],
    ]  # fmt: skip


def test_each_split_has_its_table_the_test_sets_first(runs, capsys):
    more = {name: {"update": 10, "measure": "f1", "scores": {"de": score, "en": score + 1}} for name, score in
            (("xquad", 30.0), ("another", 10.0))}  # fmt: skip
    folder = runs({**answers(), **more}, answers("fs"))
    found = sections(capsys, "table", folder)
    assert [title.split(",")[0] for title in found] == ["test sets", "another", "dev sets", "xquad"]
    assert [[row[0] for row in rows[1:]] for rows in found.values()] == [["df", "fs"], ["df"], ["df", "fs"], ["df"]]
    ((title, rows),) = sections(capsys, "table", folder, "--split", "xquad").items()
    assert title.startswith("xquad, f1") and rows[1][:4] == ["df", "1", "30.0", "31.0"]
    assert "another, dev, test, xquad" in refused(capsys, "table", folder, "--split", "train")


def test_pairs_of_languages_are_matrices_of_contexts_by_questions(runs):
    folder = runs(crossed(), crossed(seed=2, first=54.0), crossed("fs"))
    assert measure.matrices(measure.read_runs([folder]), "test-7x7") == [
        ("df", [["context \\ question", "de", "en"], ["de", "52.0±2.8", "53.0±2.8"], ["en", "54.0±2.8", "55.0±2.8"]]),
        ("fs", [["context \\ question", "de", "en"], ["de", "50.0", "51.0"], ["en", "52.0", "53.0"]]),
    ]


def test_a_matrix_of_pairs_that_were_not_all_measured(runs):
    run = crossed()
    del run["test-7x7"]["scores"]["de-en"]
    ((_, rows),) = measure.matrices(measure.read_runs([runs(run, answers("fs"))]), "test-7x7")
    assert rows[1:] == [["de", "50.0", "-"], ["en", "52.0", "53.0"]]


def test_matrices_stand_among_the_tables(runs, capsys):
    found = sections(capsys, "table", runs(crossed(), crossed("fs", first=10.0), answers("ff")))
    starts = [title.split(" in %")[0] for title in found]
    assert starts == ["test sets, f1", "dev sets, f1", "df: test-7x7, f1", "fs: test-7x7, f1"]
    header, *rows = list(found.values())[3]
    assert header == ["context \\ question", "de", "en"]
    assert rows == [["de", "10.0", "11.0"], ["en", "12.0", "13.0"]]


def test_matrices_by_another_measure_hold_that_measure(runs, capsys):
    options = ("--split", "test-7x7", "--measure", "exact_match")
    ((title, rows),) = sections(capsys, "table", runs(crossed()), *options).items()
    assert "exact_match in %" in title
    assert rows[1:] == [["de", "30.0", "31.0"], ["en", "32.0", "33.0"]]


def test_two_tasks_have_tables_of_their_own(runs, capsys):
    folder = runs(result(seed=1), answers(seed=1), answers("fs", seed=2), result(seed=2))
    found = sections(capsys, "table", folder)
    assert [title.split(" in %")[0] for title in found] == [
        "mlqa: test sets, f1", "mlqa: dev sets, f1", "xnli: test sets, accuracy", "xnli: dev sets, accuracy",
    ]  # fmt: skip
    seeds = [{row[0]: row[1] for row in rows[1:]} for rows in found.values()]
    assert seeds == 2 * [{"df": "1", "fs": "1"}] + 2 * [{"df": "2"}]
    # A measure that one of them has: the other has no table.
    by_exact_match = sections(capsys, "table", folder, "--measure", "exact_match")
    assert [title.split(":")[0] for title in by_exact_match] == ["mlqa", "mlqa"]


# --- the curves ----------------------------------------------------------------------------------------------


def log(folder, run, *lines):
    """Writes a made-up log.jsonl: (update, loss, phase, gap or None where it was not measured)."""
    entries = [
        {"update": t, "loss": loss, "phase": phase} | ({} if gap is None else {"gap": gap})
        for t, loss, phase, gap in lines
    ]
    file = folder / "xnli" / f"run{run}" / "log.jsonl"
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return file


def test_curves_hold_loss_phase_and_gap_by_update(runs, capsys):
    folder = runs(result("fs"), result("df", seed=3))
    log(folder, 0, (100, 1.0986, 1, None), (200, 0.98765, 2, 12.34))
    log(folder, 1, (100, 1.1, 1, 0.0), (150, 1.0, 1, -1.25), (200, 0.5, 2, 10.0))
    header, *rows = measure.curves(measure.read_runs([folder]))
    assert header == ["update", "df seed 3: loss", "phase", "gap", "fs seed 1: loss", "phase", "gap"]
    assert rows == [
        ["100", "1.100", "P1", "0.0", "1.099", "P1", ""],
        ["150", "1.000", "P1", "-1.2", "", "", ""],
        ["200", "0.500", "P2", "10.0", "0.988", "P2", "12.3"],
    ]
    assert measure.main(["curves", str(folder)]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.split("\n") if line] == ["update", "100", "150", "200"]


@pytest.mark.parametrize("text", ['{"update": 100, "lo', "[]\n", "text\n", '{"loss": 1.0}\n', b"\0\0\xff"])
def test_a_broken_log_is_named(runs, capsys, text):
    folder = runs(result())
    file = log(folder, 0, (100, 1.0, 1, None))
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert str(file) in refused(capsys, "curves", folder)


# --- bad input -----------------------------------------------------------------------------------------------


def refused(capsys, *arguments):
    """The one line that eval.py says before it exits with 2."""
    assert measure.main([str(a) for a in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("eval.py: ") and captured.err.count("\n") == 1
    return captured.err


def test_no_finished_run(tmp_path, capsys):
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "settings.json").write_text("{}")
    assert str(tmp_path) in refused(capsys, "table", tmp_path)
    assert "none" in refused(capsys, "table", tmp_path / "none")


BROKEN = {
    "empty": "",
    "cut": json.dumps(result())[:200],
    "list": "[]",
    "null": "null",
    "no dev": json.dumps({**result(), "dev": None}),
    "no source": json.dumps(result(languages=("de", "fr"))),
    "no scores": json.dumps({**result(), "dev": {"scores": {}}}),
    "scores in a list": json.dumps({**result(), "dev": {"scores": [60.0, 80.0]}}),
    "scores in words": json.dumps(result(dev=("high", "low"))),
    "no settings": json.dumps({k: v for k, v in result().items() if k != "settings"}),
    "settings cut": json.dumps({**result(), "settings": {"method": "df"}}),
    "test without source": json.dumps({**result(), "test": {"scores": {"de": 60.0}}}),
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_a_broken_result_is_named(runs, capsys, text):
    folder = runs(result(), text)
    assert str(folder / "xnli" / "run1" / "result.json") in refused(capsys, "table", folder)


@pytest.mark.parametrize(
    "options",
    [("--split", name) for name in ("train", "settings", "method", "seed")]
    + [("--measure", name) for name in ("nothing", "mean", "gap", "update", "measure")],
    ids=" ".join,
)
def test_what_is_no_split_or_no_measure_is_refused(runs, capsys, options):
    run = answers()
    run["test"] |= measure.summary(run["test"]["scores"])
    assert "they have dev, test" in refused(capsys, "table", runs(run), *options)


def test_read_runs_raises_what_the_command_line_prints(tmp_path):
    with pytest.raises(InputError):
        measure.read_runs([tmp_path])


def test_a_table_from_the_command_line(runs, run_command):
    found = run_command("eval.py", "table", runs(result(), result(seed=2, test=(64.0, 84.0))))
    assert found.status == 0 and found.err == ""
    assert re.search(r"^df +2 +63\.0±1\.4 +83\.0±1\.4", found.out, re.M)
    none = run_command("eval.py", "table", "none")
    assert (none.status, none.out, none.err.count("\n")) == (2, "", 1) and none.err.startswith("eval.py: ")
