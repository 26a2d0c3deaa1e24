"""`make bench`: what is counted, what is compared, what is kept."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from data import PAD, POOL
from paper import bench, contestants
from paper.contestants import BATCH, Clock, Job


@pytest.fixture(scope="module")
def model(make_model):
    return str(make_model(max_position_embeddings=140, num_hidden_layers=2))


def job(do, model, **sizes):
    return Job(**{"do": do, "model": model, "device": "cpu", "batches": 3, "updates": 2, "warm_up": 3, "rounds": 1,
                  "dev": 2, "test": 2} | sizes)  # fmt: skip


def rounds_of(job, rounds, folder):
    """What a job says of its warm-up and so many rounds, and the batches that its model saw: [(ids, padding too)]."""
    said, saw = [], []

    def say(found):
        said.append(found)
        if len(said) > rounds:
            raise SystemExit

    def look(module, *inputs):
        ids = next(x for x in (*inputs[0], *inputs[-1].values()) if x is not None)
        saw.append((int((ids != PAD).sum()), ids.numel()))

    def watched(make):
        def made(job):
            model = make(job)
            model.register_forward_pre_hook(look, with_kwargs=True)
            return model

        return made

    with pytest.MonkeyPatch.context() as patch:
        for name in ("our_model", "their_model"):
            patch.setattr(contestants, name, watched(getattr(contestants, name)))
        with pytest.raises(SystemExit):
            contestants.JOBS[job.do](job, Clock(job, say), str(folder))
    return said, saw


@pytest.mark.parametrize("do", ["ours", "trainer", "xtreme"])
def test_the_tokens_that_are_counted_are_those_of_the_timed_batches(do, model, tmp_path):
    """Not of the warm-up, nor of a pass that is longer than a round."""
    said, saw = rounds_of(job(do, model), 2, tmp_path)
    bounds = [0, 3, 5, 7]
    assert [found["updates"] for found in said] == [3, 2, 2]
    for found, begin, end in zip(said, bounds, bounds[1:]):
        assert (found["tokens"], found["computed"]) == tuple(map(sum, zip(*saw[begin:end])))
    assert len({found["tokens"] for found in said}) > 1 and all(found["seconds"] > 0 for found in said)
    if do == "xtreme":
        assert {computed for _, computed in saw} == {BATCH * 128}


def test_ours_and_the_trainers_batches_are_the_same(model, tmp_path):
    (_, ours), (_, theirs) = (rounds_of(job(do, model), 0, tmp_path) for do in ("ours", "trainer"))
    assert sorted(ours) == sorted(theirs) and len(set(ours)) == 3


def test_the_examples_have_the_lengths_of_xnli():
    examples = contestants.made_up(20_000, np.arange(4, 5000, dtype=np.int32), seed=1)
    places = np.linspace(0, 1, 33)
    assert np.abs(np.quantile(examples.lengths, places[1:-1]) - contestants.QUANTILES[1:-1]).max() <= 2
    few, all_of_them = (contestants.training_set(n, np.arange(4, 5000, dtype=np.int32)) for n in (6, POOL))
    assert (len(few), len(all_of_them)) == (6 * BATCH, POOL * BATCH)
    assert abs(few.lengths.mean() / all_of_them.lengths.mean() - 1) < 0.05


# --- the comparison ------------------------------------------------------------------------------------------


def took(seconds, tokens, memory):
    return {"updates": 2, "seconds": seconds, "tokens": tokens, "computed": 2 * tokens, "peak_memory_bytes": memory}


ROUNDS = {
    "ours": [took(1.0, 100, 30), took(2.0, 100, 40), took(1.0, 80, 40)],
    "trainer": [took(2.0, 100, 90), took(3.0, 100, 90), took(4.0, 80, 100)],
    "trainer-compiled": {"left_out": "no compiler"},
    "xtreme": [took(4.0, 40, 50)],
}


def test_ratios_are_of_real_tokens_a_second_round_by_round(monkeypatch):
    monkeypatch.setattr(bench, "contest", lambda jobs, limit: ROUNDS)
    found = bench.training([job("ours", "m")], {}, 1)
    assert found["ratios"] == {"trainer": pytest.approx({"median": 2.0, "min": 1.5, "max": 4.0}),
                               "xtreme": {"median": 10.0, "min": 10.0, "max": 10.0}}  # fmt: skip
    assert found["memory_ratios"] == {"trainer": 0.4, "xtreme": 0.8}
    ours = found["contestants"]["ours"]
    assert ours["tokens_per_second"] == {"median": 80.0, "min": 50.0, "max": 100.0}
    assert ours["updates_per_second"] == {"median": 2.0, "min": 1.0, "max": 2.0} and ours["padding"] == 0.5
    assert found["contestants"]["trainer-compiled"] == {"left_out": "no compiler"}


def test_the_other_parts(monkeypatch):
    there = {"training": {"contestants": {"ours": {"updates_per_second": {"median": 4.0}}}},
             "evaluation": {"seconds": {"ours": {"median": 60.0}}}}  # fmt: skip
    said = {"rounds": {"ours": [2.0, 3.0, 9.0], "fused": [1.0, 2.0, 3.0], "foreach": [4.0, 4.0, 4.0]}}
    monkeypatch.setattr(bench, "by_itself", lambda *_: dict(said))
    assert bench.adam([job("adam", "m")], there, 1)["ratios"] == {
        "fused": {"median": 2.0, "min": 1.5, "max": 3.0}, "foreach": {"median": 0.75, "min": 0.5, "max": 2.25}
    }  # fmt: skip
    said = {"seconds": 0.1}
    assert bench.products([job("products", "m")], there, 1)["share"] == pytest.approx(0.4)
    assert "share" not in bench.products([job("products", "m")], {}, 1)
    said = {"seconds": dict.fromkeys(("evaluation", "gap", "similarity", "checkpoint", "best model"), 0.0)}
    said["seconds"]["gap"] = 2.0
    minutes = bench.measuring([job("measuring", "m", device="cuda")], there, 1)["minutes_of_a_run"]
    assert minutes["update"] == pytest.approx(122_720 / 4 / 60) and minutes["gap"] == pytest.approx(1227 * 2 / 60)
    assert minutes["all"] == pytest.approx(122_720 / 4 / 60 + 1227 * 2 / 60 + 1)
    assert "minutes_of_a_run" not in bench.measuring([job("measuring", "m")], there, 1)
    times = {"our evaluation": [took(1.0, 1, 1), took(2.0, 1, 1)], "their evaluation": [took(4.0, 1, 1)] * 2}
    monkeypatch.setattr(bench, "contest", lambda jobs, limit: times)
    assert bench.evaluation([job("", "m")], there, 1)["ratio"] == {"median": 3.0, "min": 2.0, "max": 4.0}


def test_the_products_are_those_of_our_updates(model, tmp_path):
    """PyTorch counts as many operations in both, but for the head's and those of `<s>` in the last layer."""

    def operations(work):
        with FlopCounterMode(display=False) as counter, pytest.raises(SystemExit):
            work()
        found = counter.get_flop_counts()["Global"]
        return sum(n for kind, n in found.items() if kind in (torch.ops.aten.mm, torch.ops.aten.addmm))

    def end(_):
        raise SystemExit

    one = job("products", model)
    twice = operations(lambda: contestants.products(one, SimpleNamespace(say=end), None))  # the first not timed
    ours = operations(lambda: contestants.train_ours(one, Clock(one, end), str(tmp_path)))
    assert 0.93 < twice / 2 / ours <= 1


def test_a_contestant_that_fails_is_left_out(monkeypatch, capsys):
    """It, and one that takes too long; the others go on."""
    code = {"good": "import sys\nprint('{\"seconds\": 1}', flush=True)\nfor _ in sys.stdin: "
                    "print('{\"seconds\": 2}', flush=True)",
            "bad": "raise SystemExit(3)", "slow": "import time; time.sleep(60)",
            "late": "print('{\"seconds\": 1}', flush=True); input(); raise SystemExit(4)"}  # fmt: skip
    popen = bench.subprocess.Popen

    def start(command, **options):
        return popen([command[0], "-c", code[json.loads(command[-1])["do"]]], **options)

    monkeypatch.setattr(bench, "subprocess", SimpleNamespace(Popen=start, PIPE=bench.subprocess.PIPE))
    found = bench.contest([job(name, "m", rounds=2) for name in code], limit=3)
    assert found["good"] == [{"seconds": 2}] * 2
    assert "status 3" in found["bad"]["left_out"] and "status 4" in found["late"]["left_out"]
    assert "longer than 3 s" in found["slow"]["left_out"]


# --- the files and the table ---------------------------------------------------------------------------------


def test_bench_from_the_command_line(model, tmp_path, capsys):
    """Each part is kept beside those that are there."""
    options = ["--models", model, "--device", "cpu", "--out", str(tmp_path), "--rounds", "2", "--updates", "2"]
    assert not bench.main([*options, "--parts", "training", "--contestants", "trainer"])
    assert not bench.main([*options, "--parts", "products", "evaluation"])
    (file,) = tmp_path.iterdir()
    kept = json.loads(file.read_text())
    assert file.name == f"cpu-{kept['model']}.json" and kept["versions"]["torch"] == torch.__version__
    assert [*kept] == ["model", "machine", "versions", "training", "products", "evaluation"]
    assert {*kept["training"]["contestants"]} == {"ours", "trainer"}
    assert len(kept["training"]["contestants"]["trainer"]["rounds"]) == 2
    assert (
        0 < kept["products"]["share"] and kept["evaluation"]["pairs"] == 300 and 0 < kept["evaluation"]["ratio"]["min"]
    )
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert kept["model"] in table[-1]
    file.write_text(json.dumps(kept | {"machine": {"cpu": "another"}}))
    assert not bench.main([*options, "--parts", "metrics"])
    assert [*json.loads(file.read_text())] == ["model", "machine", "versions", "metrics"]


def test_the_table_of_the_readme(monkeypatch, tmp_path):
    assert bench.speed(tmp_path / "none") == ["Nothing was measured yet: `make bench`."]
    monkeypatch.setattr(bench, "contest", lambda jobs, limit: ROUNDS)
    found = {"model": "m", "machine": {"threads": 2}, "training": bench.training([job("ours", "m")], {}, 1)}
    (tmp_path / "a.json").write_text(json.dumps(found))
    (tmp_path / "b.json").write_text(json.dumps({"model": "no training", "machine": {"threads": 2}}))
    table, _, *said = bench.speed(tmp_path)
    header, _, row = table.splitlines()
    precision = found["training"]["precision"]
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        f"2 CPU threads, {precision}", "m", "2", "80", "2 [1.5, 4]", "10 [10, 10]", "40 %"
    ]  # fmt: skip
    assert "XTREME" in header and "compiled" not in header  # that nobody measured
    assert max(map(len, said)) <= 120


def test_sizes_of_a_job():
    """More updates than a pool are whole passes over it; of XTREME's recipe a quick one does one update."""
    args = bench.options_of(["--device", "cpu", "--updates", "120", "--quick"])
    ours, trainer, xtreme = bench.jobs_of(contestants.CONTESTANTS, "m", args)
    assert (ours.do, ours.batches, ours.updates, ours.warm_up, ours.rounds) == ("ours", POOL, 2 * POOL, 2 * POOL, 2)
    assert trainer.do == "trainer"  # and nobody compiles
    assert (xtreme.do, xtreme.updates, xtreme.warm_up, xtreme.rounds) == ("xtreme", 1, 1, 1)
    assert len(bench.jobs_of(contestants.CONTESTANTS, "m", bench.options_of(["--device", "cpu"]))) == 4
