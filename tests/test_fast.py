"""The fast paths of an update against slowfast.update: the same losses to rounding, and exactly the K's that the method
makes of them."""

import contextlib
import copy
import types

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


# --- what a capture asks of the work, without a GPU ------------------------------------------------------------


class Tape(TorchDispatchMode):
    """A CUDA graph of a CPU: the operations done while it is entered. As in a capture they are then as if they had not
    been done, and whatever would wait for the device is an error; `replay` does them again, on the same tensors. What
    is a number while they are recorded is the same number ever after, as in a graph."""

    WAIT = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2")

    def __init__(self):
        super().__init__()
        self.operations, self.written, self.replays = [], {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        mask = any(t.dtype == torch.bool for t in tree_leaves(args[1:2]) if isinstance(t, torch.Tensor))
        name = function.overloadpacket.__name__
        if name in self.WAIT or (name.startswith("index") and mask):
            raise RuntimeError(f"{function} waits for the device")
        given = [*zip(function._schema.arguments, args)]
        given += [(argument, kwargs.get(argument.name)) for argument in function._schema.arguments]
        writes = [value for argument, value in given if argument.alias_info and argument.alias_info.is_write]
        for t in (t for t in tree_leaves(writes) if t is not None):
            storage = t.untyped_storage()
            self.written.setdefault(storage.data_ptr(), (storage, storage.clone()))
        made = function(*args, **kwargs)
        is_view = any(one.alias_info and not one.alias_info.is_write for one in function._schema.returns)
        self.operations += [] if is_view else [(function, args, kwargs, tensors_in(made), bool(writes))]
        return made

    def recorded(self):
        """As torch.cuda.graph: records what is done within."""
        random = torch.get_rng_state()
        with self:
            yield
        torch.set_rng_state(random)
        for storage, before in self.written.values():
            storage.copy_(before)

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        known = tuple(t for _, _, _, made, _ in self.operations for t in made)
        with torch.autograd._unsafe_preserve_version_counter(known):
            for function, args, kwargs, made, in_place in self.operations:
                for old, new in zip(made, tensors_in(function(*args, **kwargs))):
                    if not in_place:
                        old.detach().copy_(new)


def tensors_in(found):
    return [t for t in tree_leaves(found) if isinstance(t, torch.Tensor)]


@pytest.fixture
def tapes(monkeypatch):
    """Has a Replay record and replay on a CPU; all tapes that it makes."""
    made = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: made.append(Tape()) or made[-1])
    monkeypatch.setattr(torch.cuda, "graph", lambda tape, pool: contextlib.contextmanager(Tape.recorded)(tape))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    return made


def test_what_is_recorded_can_be_replayed(examples, tapes):
    """To the last bit: nothing of an update is a number of Python's, nor waits for the device, and all that is fed, the
    rates and eps among it, lies where it is read."""
    numbers = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3, "updates": 60}
    losses, multipliers, weights = train(examples, **numbers)
    found, found_multipliers, found_weights = train(examples, prepare=replayed(True), **numbers)
    assert max(tape.replays for tape in tapes) == 59 and len(tapes) > 6  # the optimiser's; two of each length
    assert found == losses and found_multipliers == multipliers
    assert all(torch.equal(found_weights[name], w) for name, w in weights.items())


@pytest.mark.parametrize(("head", "shape"), [(xlmr.TokenClassifier, (4, 16)), (xlmr.QuestionAnswering, (4, 2))])
def test_the_other_heads_can_be_replayed(tapes, head, shape):
    input_ids = torch.randint(4, 200, (4, 16), generator=torch.Generator().manual_seed(1))
    input_ids[:2, 10:] = data.PAD
    labels = torch.arange(shape[0] * shape[1]).view(shape) % 3
    labels[0, 1] = data.IGNORED
    losses = {}
    for capture in (False, True):
        torch.manual_seed(0)
        model = head(xlmr.Config(**NUMBERS))
        xlmr.initialise(model)
        optimizer = slowfast.Adam(slowfast.param_groups(model), lr=1e-3)
        policies, update = slowfast.SlowFast(optimizer), fast.Replay(capture)

        def mean(model, batch):
            return model.loss(model(batch[0]), batch[1]) / batch[2]

        losses[capture] = [update(model, [(input_ids, labels, 7)], mean, optimizer, policies) for _ in range(5)]
    assert losses[True] == losses[False] and losses[True][4] < losses[True][0] and len(tapes) == 3


@pytest.mark.parametrize("way", ["replayed", "compiled"])
def test_autograd_has_forgotten_the_last_update(examples, monkeypatch, way):
    """What adds up a weight's gradient lives for as long as a loss hangs on it, and remembers the stream that it was of
    at first: if that is the default stream, as it is for what is done before a capture, the capture fails."""
    plain, left = loss, []

    def adder(p):
        return p.view_as(p).grad_fn.next_functions[0][0]

    def watched(model, batch):
        left.append([name for name, p in model.named_parameters() if "seen" in adder(p).metadata])
        L = plain(model, batch)
        for p in model.parameters():
            adder(p).metadata["seen"] = True
        assert all("seen" in adder(p).metadata for p in model.parameters())  # while the loss is there
        return L

    monkeypatch.setitem(globals(), "loss", watched)
    train(examples, updates=12, prepare=replayed(False) if way == "replayed" else compiled)
    assert left == 12 * [[]]


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
