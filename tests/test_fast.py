"""The fast paths of an update against slowfast.update: the same losses to rounding, and exactly the K's that the method
makes of them."""

import copy
import types

import numpy as np
import pytest
import torch

import data
import model as xlmr
import slowfast
from data import InputError
from paper import fast

NUMBERS = {"vocab_size": 200, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
NUMBERS |= {"intermediate_size": 32, "max_position_embeddings": 64, "labels": ("a", "b", "c")}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
UPDATES, WINDOW = 200, 8

cuda = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))


def loss(model, batch):
    input_ids, labels, labelled = (torch.as_tensor(part).to(model.classifier.out_proj.weight.device) for part in batch)
    return model.loss(model(input_ids), labels) / labelled


@pytest.fixture(scope="module")
def examples():
    """330 windows of 3 to 30 ids and a class that their first piece tells: 20 batches of 16 and one of 10."""
    random = np.random.default_rng(0)
    windows = [[0, *random.integers(4, 200, n), 2] for n in random.integers(1, 29, 330)]
    return data.Examples.from_lists(windows, [window[1] % 3 for window in windows])


def train(examples, device="cpu", updates=UPDATES, prepare=lambda model, optimizer: slowfast.update, **numbers):
    """(losses, K's, weights) of a run; prepare(model, optimizer) gives the update."""
    torch.manual_seed(0)
    model = xlmr.SequenceClassifier(xlmr.Config(**NUMBERS, **(NO_DROPOUT | numbers)))
    xlmr.initialise(model)
    model.roberta.train_rows(torch.arange(200))
    model.to(device)
    optimizer = slowfast.Adam(slowfast.param_groups(model), lr=1e-3)
    policies = slowfast.SlowFast(optimizer, window=WINDOW, threshold=0.02)
    schedule = slowfast.warmup_then_decay(updates)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    epochs = [data.epoch_batches(examples.lengths, 16, 1, epoch) for epoch in range(updates // 21 + 1)]
    batches = [(*data.collate(examples, batch, 8), len(batch)) for epoch in epochs for batch in epoch][:updates]
    update = prepare(model, optimizer)
    loop = slowfast.train(
        model, ([b] for b in batches), loss, optimizer, scheduler, policies, 1.0, update
    )  # fmt: skip
    losses, multipliers = zip(*((done.loss, policies.multipliers) for done in loop))
    return losses, multipliers, {name: w.cpu() for name, w in model.state_dict().items()}


def multipliers_of(losses):
    """The K's that the method makes of a run's losses, alone."""
    groups = [{"name": cell, "params": [torch.zeros(1)]} for cell in slowfast.CELLS]
    policies = slowfast.SlowFast(torch.optim.SGD(groups, lr=1.0), window=WINDOW, threshold=0.02)
    found = []
    for L in losses:
        policies.observe(L)
        found.append(policies.multipliers)
    return found


def replayed(capture):
    return lambda model, optimizer: fast.Replay(capture)


def compiled(model, optimizer):
    options = types.SimpleNamespace(compile=True, replay=True, micro_batch=None)
    update = fast.update_for(options, model, optimizer, next(model.parameters()).device)
    if optimizer.move is slowfast.move:
        pytest.skip("no compiler")
    return update


@pytest.mark.parametrize(
    ("device", "way"),
    [
        ("cpu", "replayed"),
        ("cpu", "compiled"),
        pytest.param("cuda", "replayed", marks=cuda.marks),
        pytest.param("cuda", "compiled", marks=cuda.marks),
    ],
)
def test_a_fast_update_is_the_plain_one(examples, device, way):
    prepare = replayed(device == "cuda") if way == "replayed" else compiled
    losses, multipliers, weights = train(examples, device)
    found, found_multipliers, found_weights = train(examples, device, prepare=prepare)
    assert losses[0] > 1.0 > losses[-1] and len(losses) == UPDATES  # it learns, with K's of both phases
    assert {k["V_II"] for k in multipliers} == {1.0, 10.0} and any(0 < k["S_II"] < 1 for k in multipliers[50:])
    np.testing.assert_allclose(found, losses, rtol=2e-3, atol=2e-4)
    np.testing.assert_allclose(found[:50], losses[:50], rtol=1e-5)
    assert list(found_multipliers) == multipliers_of(found)
    assert [k["V_II"] for k in found_multipliers] == [k["V_II"] for k in multipliers]
    for name, w in weights.items():
        torch.testing.assert_close(found_weights[name], w, rtol=1e-2, atol=2e-3)
    if way == "replayed" and device == "cpu":  # the same work on the same shapes
        assert found == losses and found_multipliers == multipliers


def test_dropout_is_the_plain_updates(examples):
    """On a CPU to the last bit: the same random numbers, another at every update."""
    numbers = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3, "updates": 30}
    losses, _, weights = train(examples, **numbers)
    found, _, found_weights = train(examples, prepare=replayed(False), **numbers)
    assert found == losses != train(examples, updates=30)[0]
    assert all(torch.equal(found_weights[name], w) for name, w in weights.items())


@pytest.mark.parametrize("device", [cuda])
def test_dropout_differs_from_replay_to_replay(examples, device):
    """The same batch again and again, and weights that do not move: only dropout can change the loss. Captured or not,
    the random numbers are the same."""
    rows = examples.take(np.arange(16))
    batch = [(*data.collate(rows, np.arange(16), 8), 16)]

    def losses(capture, first=0):
        torch.manual_seed(0)
        model = xlmr.SequenceClassifier(xlmr.Config(**NUMBERS, hidden_dropout_prob=0.3))
        xlmr.initialise(model)
        optimizer = slowfast.Adam(slowfast.param_groups(model.to(device)), lr=0.0)
        policies, update = slowfast.SlowFast(optimizer), fast.Replay(capture)
        torch.cuda.manual_seed(7)
        if first:  # as a run that goes on
            torch.cuda.set_rng_state(states[first])
        found = []
        for t in range(first, 12):
            states[t] = torch.cuda.get_rng_state()
            found.append(update(model, batch, loss, optimizer, policies))
        return found

    states = {}
    whole = losses(True)
    assert len({round(L, 4) for L in whole}) > 9
    np.testing.assert_allclose(losses(True, first=5), whole[5:], rtol=1e-4)
    np.testing.assert_allclose(losses(False), whole, rtol=1e-4)


def test_a_loss_that_is_not_finite_moves_nothing(examples):
    """As in the plain update: FloatingPointError with the update's number, before the step."""
    torch.manual_seed(0)
    model = xlmr.SequenceClassifier(xlmr.Config(**NUMBERS))
    xlmr.initialise(model)
    optimizer = slowfast.Adam(slowfast.param_groups(model), lr=1.0)
    policies, update, before = slowfast.SlowFast(optimizer), fast.Replay(False), copy.deepcopy(model.state_dict())
    batch = [(*data.collate(examples, np.arange(4), 8), 4)]
    with pytest.raises(FloatingPointError, match="update 1: the loss is nan"):
        update(model, batch, lambda *args: loss(*args) * float("nan"), optimizer, policies)
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())


# --- which update a run takes ---------------------------------------------------------------------------------


def options(**given):
    return types.SimpleNamespace(**({"compile": None, "replay": None, "micro_batch": None} | given))


def test_a_cpu_takes_the_plain_update_unless_told_otherwise():
    model, optimizer, cpu = torch.nn.Linear(2, 2), types.SimpleNamespace(move=slowfast.move), torch.device("cpu")
    assert fast.update_for(options(), model, optimizer, cpu) is slowfast.update
    assert fast.update_for(options(micro_batch=4), model, optimizer, cpu) is slowfast.update
    assert fast.update_for(options(replay=True), model, optimizer, cpu).capture is False
    with pytest.raises(InputError, match="--replay.*--micro-batch"):
        fast.update_for(options(replay=True, micro_batch=4), model, optimizer, cpu)


def test_without_a_compiler_one_line_says_so(monkeypatch, capsys):
    """torch.compile's own errors are pages long."""

    def broken(function):
        raise RuntimeError("\nno C compiler was found\nand so on\nfor pages")

    monkeypatch.setattr(torch, "compile", broken)
    optimizer = types.SimpleNamespace(move=slowfast.move)
    assert fast.update_for(options(compile=True), None, optimizer, torch.device("cpu")) is slowfast.update
    assert optimizer.move is slowfast.move
    assert capsys.readouterr().err == "--compile: off, for nothing can be compiled here (no C compiler was found)\n"
