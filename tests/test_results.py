"""Finished runs: reading them, which of them are one setup, and the differences between them."""

import json
import re

import numpy as np
import pytest
from made_up import DF, SLOWFAST, by_hand, counted, run_of, score_of, setup_of, write

from data import InputError
from paper import results
from paper.results import EQUAL_GAP, LAST_GAP, along, difference, gap_at_equal_source, read_runs, setups_of

LANGUAGES = ("de", "en", "fr")
FIFTEEN = "ar bg de el en es fr hi ru sw th tr ur vi zh".split()

# --- reading -------------------------------------------------------------------------------------------------


def test_runs_are_read_as_they_were_written(tmp_path):
    runs = [run_of({"en": 80.0, "de": 70.0}), run_of({"en": 81.0, "de": 71.0}, "fs", seed=2, c1=0.5)]
    (tmp_path / "unfinished").mkdir()
    found = read_runs([write(tmp_path / "runs", *runs), tmp_path])  # a run below two folders is one run
    assert found == [run | {"folder": tmp_path / "runs" / f"run{n}"} for n, run in enumerate(runs)]


def test_two_runs_of_the_same_settings_and_seed_are_named(tmp_path, capsys):
    """Of two devices, say; a copy is no news, nor is a run that was measured on more."""
    twice = [run_of({"en": 80.0, "de": 70.0}), run_of({"en": 80.0, "de": 70.5})]
    read_runs([write(tmp_path / "same", twice[0], twice[0])])
    read_runs([write(tmp_path / "more", twice[0], twice[0] | {"xquad": twice[1]["test"]})])
    assert capsys.readouterr().err == ""
    read_runs([write(tmp_path / "other", *twice)])
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and re.search("other/run0 and .*other/run1 have the same settings and seed", said)
    setup = setup_of(*twice)
    assert setup.values(DF, "mean") == {1: 75.25}


def test_no_finished_run(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(InputError, match=re.escape(str(folder))):
            read_runs([folder])


# --- setups --------------------------------------------------------------------------------------------------


def test_what_tables_vary_and_seeds_make_no_setup():
    scores = {"en": 80.0, "de": 70.0}
    more = {"seed": 2, "method": "ff", "shots": 5, "c1": 0.5, "c2": 5.0, "r": 1.0, "model": "n", "data": "e"}
    fs = {"method": "fs"}
    runs = [run_of(scores, **fs), *(run_of(scores, **fs | {name: value}) for name, value in more.items())]
    setup = setup_of(*runs)
    assert (setup.task, setup.name, setup.split, setup.runs) == ("xnli", "XNLI", "test", runs)
    assert list(setup.rows) == ["fs", "fs r=1", "fs c2=5", "fs c1=0.5", "fs shots=5", "ff"]
    assert setup.seeds(fs) == {1: runs[8], 2: runs[1]} and setup.seeds({"method": "df"}) == {}
    assert setup.seeds(fs | {"c1": 0.5}) == {1: runs[4]} and setup_of(*runs[:7]).seeds(fs)[1] is runs[0]


@pytest.mark.parametrize("method", ["df", "noisytune", "freeze-4"])
@pytest.mark.parametrize("name", ["c1", "c2", "r"])
def test_constants_that_a_method_does_not_use_are_no_row_of_it(method, name):
    """So `make xnli METHODS="df slowfast" ARGS="--c1 0.1"` has a difference from df."""
    plain, given = (run_of({"en": 80.0, "de": 70.0}, method, **more) for more in ({}, {name: 0.5}))
    setup = setup_of(given, run_of({"en": 81.0, "de": 72.0}, "slowfast", **{name: 0.5}))
    assert set(setup.rows) == {method, f"slowfast {name}=0.5"}
    assert list(setup_of(plain, given).seeds({"method": method})) == [1]


def test_a_task_of_ones_own_stands_after_the_papers():
    runs = [run_of({"en": 80.0, "de": 70.0}, task=task, epochs=1) for task in ("paws", "qam")]
    ours, papers = reversed(setups_of(runs))
    assert [(s.task, s.name, s.runs) for s in (papers, ours)] == [("qam", "QAM", runs[1:]), ("paws", "paws", runs[:1])]
    assert not ours.comparable


OTHER = {"lr": 1e-5, "batch_size": 8, "phase": "fraction", "source": "de", "model_sha256": "0", "data_sha256": "1",
         "max_updates": 240, "something_new": 1}  # fmt: skip


@pytest.mark.parametrize("name", OTHER)
def test_any_other_setting_makes_a_setup(name):
    scores, change = {"en": 80.0, "de": 70.0}, {name: OTHER[name]}
    runs = [run_of(scores), *(run_of(scores, m, **change) for m in ("df", "slowfast")), run_of(scores, task="ner")]
    setups = setups_of([runs[3], *runs[:3]])
    assert [(s.name, s.task, s.runs) for s in setups] == [
        ("XNLI (a)", "xnli", runs[:1]), ("XNLI (b)", "xnli", runs[1:3]), ("NER", "ner", runs[3:])
    ]  # fmt: skip


def test_a_method_without_phases_stands_in_each_setup_of_others():
    """df, noisytune, what freezes or starts anew and what is as fast in P1 as in P2 know no window, phase, threshold or
    policy IV: they are lent to setups that differ in these alone and have none of their own with that seed. What is
    lent is no setup besides."""
    scores = {"en": 80.0, "de": 70.0}
    short = {"window": 20, "max_updates": 240}
    plain = [run_of(scores, m, seed) for m in ("df", "noisytune", "freeze-4") for seed in (1, 2)]
    own, longer = run_of(scores, "df", 1, phase="fraction"), run_of(scores, "df", 1, **short)
    others = [run_of(scores, "slowfast", 1, phase="fraction"), run_of(scores, "fs", 1, threshold=0.2),
              run_of(scores, "enlarge-2", 1, policy4="off")]  # fmt: skip
    setups = setups_of([*plain, own, longer, *others])
    assert [setup.runs for setup in setups] == [
        [own, others[0], plain[1], *plain[2:], others[2]], [longer], [others[1], *plain, others[2]]
    ]  # fmt: skip
    assert [setup.settings["phase"] for setup in setups[:1]] == ["fraction"]
    assert difference(setups[0], SLOWFAST, DF, "mean") is not None and setups[0].seeds(DF)[1] is own
    assert [setup.runs for setup in setups_of(plain)] == [plain]  # with nobody to be lent to they are one
    with_shots = run_of(scores, "df", 1, shots=5)
    assert setups_of([with_shots, others[0]])[0].runs == [others[0], with_shots]


def test_the_longest_runs_come_first():
    runs = [run_of({"en": 80.0, "de": 70.0}, lr=lr) | {"updates": n} for lr, n in ((1e-5, 5), (2e-5, 50), (3e-5, 7))]
    assert [setup.runs for setup in setups_of(runs)] == [[runs[1]], [runs[2]], [runs[0]]]


def test_a_run_that_is_older_than_a_setting_had_its_default():
    """So had the runs of before --source, --dropout and --dev-examples, which are kept."""
    new = run_of({"en": 80.0, "de": 70.0}, dropout=None, dev_examples=None, window=100)
    old = run_of({"en": 81.0, "de": 71.0}, seed=2)
    del old["settings"]["source"]
    assert setup_of(new, old).values(DF, "mean") == {1: 75.0, 2: 76.0}
    assert len(setups_of([new, run_of({"en": 80.0, "de": 70.0}, dropout=0.0)])) == 2


@pytest.mark.parametrize(
    ("splits", "expected"),
    [(["xquad test", "test xquad squad"], "test"), (["xquad", "squad xquad"], "xquad"), (["test", "xquad"], "dev"),
     (["test xquad", "xquad"], "xquad"), (["squad", "squad"], "dev"), (["", ""], "dev"), (["dev-7x7"] * 2, "dev")],
)  # fmt: skip
def test_which_scores_are_shown(splits, expected):
    """The test sets', if all of the setup's runs have them; or XQuAD's; or the dev sets'."""
    values = {"test": 60.0, "xquad": 50.0, "squad": 40.0, "dev": 30.0, "dev-7x7": 20.0}
    runs = []
    for seed, names in enumerate(splits):
        scores = {name: {"en": values[name] + seed, "de": values[name] + seed} for name in ("dev", *names.split())}
        runs.append(run_of(scores, seed=seed, task="mlqa", split=None))
    setup = setup_of(*runs)
    assert setup.split == expected
    assert setup.values(DF, "mean") == {0: values[expected], 1: values[expected] + 1}


@pytest.mark.parametrize("quantity", ["mean", "source", "non_source", "gap", "fr", "zh"])
def test_values_are_of_the_scores(quantity):
    """By another measure than the task's own too; zh was not measured."""
    scores = {"de": 60.0, "en": 84.0, "fr": 63.0}
    run = run_of(scores)
    run["test"]["exact_match"] = {x: score / 2 for x, score in scores.items()}
    setup, expected = setup_of(run), by_hand(scores, quantity)
    assert setup.values(DF, quantity) == ({} if quantity == "zh" else {1: pytest.approx(expected)})
    setup.measure = "exact_match"
    assert setup.values(DF, quantity) == ({} if quantity == "zh" else {1: pytest.approx(expected / 2)})
    assert setup.values(SLOWFAST, quantity) == {}
    setup.measure = "recall"
    assert setup.values(DF, quantity) == {}


@pytest.mark.parametrize(
    ("change", "is_comparable"),
    [({}, True), ({"lr": 5e-5, "epochs": 5}, True), ({"max_updates": 240}, False), ({"data": "demo/texts"}, False),
     ({"data": "/home/me/demo/texts"}, False), ({"data": "sample"}, False), ({"source": "de"}, False),
     ({"split": "dev"}, False), ({"languages": FIFTEEN[:-1]}, False), ({"languages": [*FIFTEEN[:-1], "xx"]}, False)],
)  # fmt: skip
def test_what_may_stand_beside_the_papers_numbers(change, is_comparable):
    change = dict(change)
    scores = dict.fromkeys(change.pop("languages", FIFTEEN), 70.0)
    assert setup_of(run_of(scores, **change)).comparable == is_comparable


def test_a_setup_is_described_in_a_line():
    about = {"phase": "loss", "policy4": "on", "select": "all", "precision": "fp32", "model": "models/small"}
    run = run_of({"en": 80.0, "de": 70.0}, split="dev", dev_examples=1000, epochs=1, **about) | {"updates": 1500}
    assert results.described(setup_of(run)) == (
        "small, trained on en of the folder 'd', 1,500 updates (1 epoch) of 32, lr 5e-06, fp32, P1 by loss, "
        "window 100, policy IV on, best model by all"
    )
    assert results.scored_on(setup_of(run)) == "scores of dev, up to 1,000 examples a language, 2 languages"
    run["settings"]["max_updates"] = 1500
    assert "1,500 updates of 32" in results.described(setup_of(run))
    for settings, said in (({"window": 20}, "P1 by loss, window 20,"),
                           ({"phase": "fraction", "fraction": 0.125}, "P1 the first 12.5 %,")):  # fmt: skip
        run["settings"] |= settings
        assert said in results.described(setup_of(run))


# --- the gap along a run -------------------------------------------------------------------------------------


def run_along(folder, points, method="df", seed=1, best=240, **settings):
    """A run that logged (update, score in the source, gap), and the model of update `best` chosen."""
    run = run_of({"en": 80.0, "de": 70.0}, method, seed, folder=folder / f"{method}-{seed}", **settings)
    run["folder"].mkdir()
    lines = [{"update": t, "loss": 1.0, "phase": 2, "updates_in_first_phase": 0}
             | ({} if gap is None else {"source": source, "gap": gap}) for t, source, gap in points]  # fmt: skip
    (run["folder"] / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run | {"best_update": best}


def test_the_gap_at_the_end(tmp_path):
    """The last that was logged, if one was; it says something new if a model was chosen before the end."""
    logged = run_along(tmp_path, [(60, 50.0, 3.0), (180, 60.0, 4.5), (240, 60.0, None)], seed=1)
    without = [run_along(tmp_path, [(240, 0, None)], seed=2), run_of({"en": 80.0, "de": 68.0}, seed=3)]
    setup = setup_of(logged, *without)
    assert setup.values(DF, LAST_GAP) == {1: 4.5} and setup.chose_the_last
    assert not setup_of(logged, without[1] | {"best_update": 60}).chose_the_last


# English rises by 10 points from each measurement to the next, the gap of the one by 2 and of the other by 3
DF_POINTS = [(60, 40.0, 1.0), (120, 50.0, 3.0), (180, 60.0, 5.0), (240, 70.0, 7.0)]
OTHERS = [
    ([(60, 35.0, 1.0), (120, 45.0, 4.0), (180, 55.0, 7.0), (240, 65.0, 10.0)], 10.0 - 6.0),  # at 65
    ([(60, 40.0, 1.0), (120, 60.0, 2.0), (240, 90.0, 5.0)], 3.0 - 7.0),  # at 70: a third of the way from 60 to 90
    ([(60, 40.0, 1.0), (120, 52.0, 9.0), (180, 45.0, 2.0), (240, 50.0, 8.0)], (1 + 8 * 10 / 12) - 3),  # first at 50
    ([(60, 70.0, 6.5), (120, 60.0, 2.0), (240, 90.0, 9.0)], 6.5 - 7.0),  # begins at what the other ends with
    ([(60, 71.0, 6.5), (120, 70.0, 2.0), (240, 90.0, 9.0)], None),  # begins above it
    ([(120, 60.0, 6.5), (240, 90.0, 9.0)], None),  # no line
    ([(240, 0.0, None)], None),  # logged none
]


@pytest.mark.parametrize(("points", "expected"), OTHERS)
def test_the_gap_at_an_equal_score_in_the_source(tmp_path, points, expected):
    """By hand; either way round, and no other quantity of the two runs matters."""
    runs = [run_along(tmp_path, DF_POINTS), run_along(tmp_path, points, "slowfast")]
    found, back = (difference(setup_of(*runs), a, b, EQUAL_GAP) for a, b in ((SLOWFAST, DF), (DF, SLOWFAST)))
    if expected is None:
        assert found is None and back is None
    else:
        assert found == (pytest.approx(expected), None, None) and back[0] == pytest.approx(-expected)


def test_its_interval_is_over_seeds(tmp_path):
    """4 and -4, and a seed that has no such score."""
    runs = [run_along(tmp_path, DF_POINTS, "df", seed) for seed in (1, 2, 3)]
    runs += [run_along(tmp_path, points, "slowfast", seed)
             for seed, (points, _) in zip((1, 2, 3), [OTHERS[0], OTHERS[1], OTHERS[4]])]  # fmt: skip
    found = difference(setup_of(*runs), SLOWFAST, DF, EQUAL_GAP)
    assert found == pytest.approx((0.0, -T975[1] * 4, T975[1] * 4), rel=1e-3)


def test_a_line_of_many_points_is_smoothed(tmp_path):
    """Means over a fifth of them: one lucky measurement among twenty does not decide where the score was reached."""
    ramp = [(12 * n, 40.0 + n, 0.5 * n) for n in range(1, 21)]
    lucky = [(t, source + 20 * (t == 24), gap) for t, source, gap in ramp]
    steady, odd = run_along(tmp_path, ramp), run_along(tmp_path, lucky, "slowfast")
    source, gap = along(odd)
    assert len(source) == 17 and source[0] == pytest.approx((41 + 62 + 43 + 44) / 4) and gap[0] == 1.25
    assert abs(gap_at_equal_source(odd, steady)) < 1e-9  # both end alike; the one of 62 alone would have made it -9


# --- differences ---------------------------------------------------------------------------------------------

QUANTITIES = ["mean", "source", "non_source", "gap", "fr"]
T975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 8: 2.306, 15: 2.131, 30: 2.042}  # from a printed table


def test_students_t():
    assert {freedom: round(results.students_t(freedom), 3) for freedom in T975} == T975


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("seeds", [2, 3, 4, 9])
def test_the_interval_over_seeds(seeds, quantity):
    """Paired by seed, in whatever order the runs lie; seeds that only one of the two has do not count."""
    random = np.random.default_rng(seeds)
    scores = {
        method: {seed: dict(zip(LANGUAGES, random.normal(70 + 3 * seed, 1, 3))) for seed in range(seeds)}
        for method in ("df", "slowfast")
    }
    runs = [run_of(s, method, seed) for method, of_seeds in scores.items() for seed, s in of_seeds.items()]
    runs += [run_of(dict.fromkeys(LANGUAGES, 99.0), "df", 70), run_of(dict.fromkeys(LANGUAGES, 1.0), "slowfast", 80)]
    runs = [runs[i] for i in random.permutation(len(runs))]
    df, ours = (np.array([by_hand(scores[m][seed], quantity) for seed in range(seeds)]) for m in ("df", "slowfast"))
    margin = T975[seeds - 1] * (ours - df).std(ddof=1) / seeds**0.5
    mean, low, high = difference(setup_of(*runs), SLOWFAST, DF, quantity)
    assert mean == pytest.approx((ours - df).mean())
    assert (high - mean, mean - low) == pytest.approx((margin, margin), rel=1e-3)


def bootstrap(task, one, other, quantity, apart=False, n=3000):
    """(2.5 %, 97.5 %, deviation) of the difference of two runs' quantities over drawn examples, written down as it is
    defined: languages with equally many examples are drawn together, unless they are drawn apart."""
    random, found = np.random.default_rng(77), []
    for _ in range(n):
        places = {}
        for x, counts in one.items():
            places.setdefault(x if apart else len(counts), random.integers(0, len(counts), len(counts)))
        drawn = [{x: c[places[x if apart else len(c)]] for x, c in run.items()} for run in (one, other)]
        a, b = (by_hand({x: score_of(task, c) for x, c in run.items()}, quantity) for run in drawn)
        found.append(a - b)
    return *np.percentile(found, [2.5, 97.5]), np.std(found)


def parallel_pairs(better, seed, n=160):
    """{language: (n, 1)} of pairs that are hard in all languages or in none."""
    random = np.random.default_rng(seed)
    hard = np.random.default_rng(0).random(n)  # of both runs alike
    luck = random.normal(0, 0.15, n)
    return {x: (hard + luck + random.normal(0, 0.05, n) < 0.6 + better)[:, None] for x in LANGUAGES}


def entity_sentences(chance, seed):
    """{language: (sentences, 3)} of right, predicted and gold entities."""
    random, found = np.random.default_rng(seed), {}
    for x, n in (("de", 90), ("en", 90), ("fr", 60)):
        gold = np.random.default_rng(n).integers(0, 4, n)
        predicted = np.maximum(gold + random.integers(-1, 2, n), 0)
        found[x] = np.stack([random.binomial(np.minimum(gold, predicted), chance), predicted, gold], axis=1)
    return found


def answered(seed):
    """{language: (questions, 2)} of F1 and exact match, which have nothing to do with each other."""
    random = np.random.default_rng(seed)
    return {x: np.stack([random.random(120), random.integers(0, 2, 120)], axis=1) for x in LANGUAGES}


@pytest.mark.parametrize(
    ("task", "one", "other", "quantity"),
    [("xnli", parallel_pairs(0.08, 1), parallel_pairs(0, 2), quantity) for quantity in QUANTITIES]
    + [("ner", entity_sentences(0.8, 1), entity_sentences(0.7, 2), quantity) for quantity in QUANTITIES]
    + [("mlqa", answered(1), answered(2), "mean")],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_interval_of_one_seed_is_a_bootstraps(tmp_path, task, one, other, quantity):
    """Of examples, not scores: F1 is of the sums over the sentences that are drawn; of answers it is of F1 alone. In
    parallel languages an example is drawn in all of them or in none."""
    setup = setup_of(counted(tmp_path, one, "slowfast", task=task), counted(tmp_path, other, task=task))
    mean, low, high = difference(setup, SLOWFAST, DF, quantity)
    scores = [{x: score_of(task, c) for x, c in run.items()} for run in (one, other)]
    assert mean == pytest.approx(by_hand(scores[0], quantity) - by_hand(scores[1], quantity))
    a, b, deviation = bootstrap(task, one, other, quantity)
    assert (low, high) == pytest.approx((a, b), abs=0.35 * deviation) and deviation > 0.5
    if (task, quantity) == ("xnli", "mean"):  # drawn apart, the interval of the mean would be too narrow
        assert bootstrap(task, one, other, quantity, apart=True, n=1000)[2] < 0.8 * deviation
    if (task, quantity) == ("xnli", "gap"):  # ... and that of the gap too wide
        assert bootstrap(task, one, other, quantity, apart=True, n=1000)[2] > 1.25 * deviation


def test_the_interval_of_another_measure(tmp_path):
    """Exact match is the second number that an answer counts."""
    one, other = answered(1), answered(2)
    setup = setup_of(counted(tmp_path, one, "slowfast", task="mlqa"), counted(tmp_path, other, task="mlqa"))
    for run, counts in zip(setup.runs, (one, other)):
        run["test"]["exact_match"] = {x: 100 * c[:, 1].mean() for x, c in counts.items()}
    setup.measure = "exact_match"
    mean, low, high = difference(setup, SLOWFAST, DF, "mean")
    a, b, deviation = bootstrap("mlqa", *({x: c[:, 1:] for x, c in run.items()} for run in (one, other)), "mean")
    assert low < mean < high and (low, high) == pytest.approx((a, b), abs=0.35 * deviation)


def test_the_same_predictions_do_not_differ(tmp_path):
    """With as many sizes of test sets as MLQA has: no draw is forgotten between the runs and made anew otherwise."""
    random = np.random.default_rng(0)
    counts = {x: random.random((30 + i, 2)) for i, x in enumerate(("ar", "de", "en", "es", "hi", "vi", "zh"))}
    for task, of_task in (("mlqa", counts), ("xnli", parallel_pairs(0, 1)), ("ner", entity_sentences(0.7, 1))):
        setup = setup_of(*(counted(tmp_path, of_task, method, task=task) for method in ("df", "slowfast")))
        assert all(difference(setup, SLOWFAST, DF, quantity) == (0, 0, 0) for quantity in ("mean", "gap"))


def test_without_counts_there_is_no_interval(tmp_path):
    runs = [counted(tmp_path, parallel_pairs(0.3, 1), "slowfast"), counted(tmp_path, parallel_pairs(0, 2))]
    for i in range(2):  # of either of them
        some = [{**run, "folder": tmp_path / "none"} if i == j else run for j, run in enumerate(runs)]
        mean, low, high = difference(setup_of(*some), SLOWFAST, DF, "mean")
        assert mean > 10 and low is high is None
    assert results.interval((mean, None, None)) == f"{mean:+.1f} (no interval)"
    assert (results.interval((1.0, -0.04, 2.0)), results.interval(None)) == ("+1.0 [-0.0, 2.0]", "-")


def test_damaged_counts_are_named(tmp_path):
    runs = [counted(tmp_path, parallel_pairs(0, seed), method) for seed, method in enumerate(("df", "slowfast"))]
    file = runs[1]["folder"] / "examples" / "test.npz"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match=re.escape(str(file))):
        difference(setup_of(*runs), SLOWFAST, DF, "mean")


def test_a_difference_of_rounding_is_none():
    """The same scores, summed in another order, may have means that differ in the last digit."""
    runs = [run_of({"en": s, "de": s}, m, n) for m, s in (("slowfast", 70 + 1e-12), ("df", 70.0)) for n in range(3)]
    assert difference(setup_of(*runs), SLOWFAST, DF, "mean") == (0, 0, 0)


def test_runs_without_a_common_seed_are_not_compared():
    setup = setup_of(run_of({"en": 80.0, "de": 70.0}, "df", seed=1), run_of({"en": 9.0, "de": 8.0}, "slowfast", seed=2))
    assert difference(setup, SLOWFAST, DF, "mean") is None
    assert difference(setup, {"method": "ff"}, DF, "mean") is None
