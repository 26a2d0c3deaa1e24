"""The method and the training loop: weight sets, learning curve, K, Adam, schedule, update and train.

The oracles are written here, apart, from the paper's formulas, or are torch's, transformers' and accelerate's own.
From top to bottom: stand-ins for a model, the paper's rules, then the tests in the order of slowfast.py; at the end
slowfast.py copied alone into an empty folder, and a run of each task done again with transformers and torch's Adam.
"""

import copy
import functools
import inspect
import io
import json
import math
import os
import re
import subprocess
import sys
import textwrap
import types
import warnings
from fractions import Fraction
from pathlib import Path

import accelerate
import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

import data
import slowfast
from model import Config, SequenceClassifier
from slowfast import CELLS, Adam, Method, SlowFast, param_groups, train, update, warmup_then_decay

ROOT = Path(__file__).resolve().parent.parent
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
# No test depends on time: neither on how long an example takes nor on how long it takes to draw.
untimed = [HealthCheck.too_slow, HealthCheck.filter_too_much]
thorough = settings(max_examples=15, deadline=None, suppress_health_check=untimed)

# --- stand-ins for a model: its parameters' names are what the method sees ------------------------------------


def stand_in(names, fill=lambda name: torch.zeros(1, dtype=torch.float64)):
    """A module that has just these parameters, float64."""
    root = torch.nn.Module()
    for name in names:
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, torch.nn.Module())
            module = module._modules[part]
        module.register_parameter(leaf, torch.nn.Parameter(fill(name)))
    return root


def layer(n):
    return [f"encoder.layer.{n}.{name}" for name in ("attention.self.query.weight", "intermediate.dense.weight")]


# One weight of each block of 12 layers, of the embeddings and of the head.
FEW = [f"roberta.{name}" for n in range(12) for name in layer(n)]
FEW = ["roberta.embeddings.word_embeddings.weight", *FEW, "classifier.out_proj.weight"]


def random_stand_in():
    generator = torch.Generator().manual_seed(0)
    return stand_in(FEW, lambda name: torch.randn(6, 4, generator=generator, dtype=torch.float64) * 0.3 + 0.2)


def tiny(depth=12, family="XLMRoberta", head="ForSequenceClassification", **options):
    """A small model of Hugging Face's, without dropout."""
    config = getattr(transformers, family + "Config")(
        vocab_size=100, hidden_size=32, num_hidden_layers=depth, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=40, pad_token_id=1, num_labels=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    return getattr(transformers, family + head)(config)


def random_batches(updates, size=8):
    """[{"input_ids": (size, 8), "attention_mask": the same, "labels": (size,)}, ...]"""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(4, 100, (updates, size, 8), generator=generator)
    labels = torch.randint(0, 3, (updates, size), generator=generator)
    return [{"input_ids": i, "attention_mask": torch.ones_like(i), "labels": y} for i, y in zip(ids, labels)]


def set_gradients(model):
    """A gradient of 1 for every weight."""
    for p in model.parameters():
        p.grad = torch.ones_like(p)


def measured_K(model, optimizer, rate):
    """{name: K}, from how far one step of plain SGD with gradient 1 moves each weight: rate * K."""
    names, weights = zip(*model.named_parameters())
    if weights[0].grad is None:
        set_gradients(model)
    torch._foreach_zero_([p.data for p in weights])
    optimizer.step()
    moved = torch.cat([p.data for p in weights]) / -rate
    return dict(zip(names, moved.tolist()))


def assert_K(K, expected, *what):
    """`expected` is a function of the name, and of `what`."""
    np.testing.assert_allclose(list(K.values()), [float(expected(name, *what)) for name in K], rtol=1e-9, atol=1e-12)


def rates_of(optimizer):
    return [float(group["lr"]) for group in optimizer.param_groups]


# --- the paper's rules: Sections 2.3 to 4.1 -------------------------------------------------------------------

REACH = {1: (1, 0), 2: (2, 1), 6: (5, 2), 12: (10, 4), 24: (20, 8)}  # depth -> layers of S_I, of which S_II


def block_of(name):
    """roberta.encoder.layer.3.output.dense.bias -> (3, "feed-forward"); None outside of layers."""
    parts = name.split(".")
    if "layer" not in parts:
        return None
    at = parts.index("layer")
    return int(parts[at + 1]), "attention" if parts[at + 2] == "attention" else "feed-forward"


def is_in(name, set_, depth=12):
    slow, key = REACH[depth]
    number, block = block_of(name) or (-1, None)
    return {
        "S_I": 0 <= number < slow,
        "S_II": 0 <= number < key and block == "feed-forward",
        "V_I": slow <= number < depth,
        "V_II": slow <= number < depth and block == "attention",
    }[set_]


def oracle_cell(name, depth=12):
    for cell, set_ in {"S_II": "S_II", "V_II": "V_II", "S_I-S_II": "S_I", "V_I-V_II": "V_I"}.items():
        if is_in(name, set_, depth):
            return cell
    return "rest"


def oracle_K(name, method, in_first_phase, R, c1=0.01, c2=10, policy4=True):
    """Eqs. 1 and 2 for one weight of a 12-layer model."""
    slow, fast = method in ("fs", "slowfast"), method in ("ff", "slowfast")
    if in_first_phase:
        return c1 if slow and is_in(name, "S_I") else 1  # policies I and III
    if slow and is_in(name, "S_II"):
        return R  # policy II
    return c2 if fast and policy4 and is_in(name, "V_II") else 1  # policy IV


def oracle_curve(losses, window=100, r=3, threshold=0.1):
    """(in P1, phi, R) at the last of `losses`, by Section 4.1; phi and R are None until two windows are full."""
    if len(losses) < 2 * window:
        return True, None, None
    x = np.asarray(losses, dtype=np.float64)
    recent = x[len(x) - window :].mean()
    previous = x[len(x) - 2 * window : len(x) - window].mean()
    phi = recent / previous
    return bool(previous - recent > threshold), phi, max(1 - phi**r, 0)


def on_the_edge(losses, window, threshold):
    """Whether rounding could decide whether some update is in P1."""
    x = np.asarray(losses)
    falls = [x[t - 2 * window : t - window].mean() - x[t - window : t].mean() for t in range(2 * window, len(x) + 1)]
    return any(abs(fall - threshold) < 1e-9 for fall in falls)


@st.composite
def traces(draw):
    """A loss curve of plateaus, drops, rises and noise; always above 0."""
    level, losses = draw(st.floats(0.05, 3)), []
    for _ in range(draw(st.integers(2, 6))):
        slope = draw(st.one_of(st.just(0), st.floats(-0.5, 0.5)))
        noise = draw(st.lists(st.floats(0, draw(st.integers(0, 1))), min_size=1, max_size=10))
        for height in noise:
            level = max(level + slope, 0.01)
            losses.append(level + height)
    return losses


def follow(losses, method="slowfast", schedule=lambda t: 0.5, resumed_at=None, **options):
    """Feeds `losses` to a run; yields (t, policies, {name: the K that the optimiser applied}) at each update. Before
    update `resumed_at` another run takes over, with no more than the state_dict."""
    policies, model = policies_of(method=method, **options)
    for t, loss in enumerate(losses, 1):
        if t == resumed_at:
            file, state = io.BytesIO(), policies.state_dict()
            policies.observe(9.0)  # the state is a copy: going on does not change it
            policies.observe_similarity(0.0)
            torch.save(state, file)
            file.seek(0)
            policies, model = policies_of(method=method, **options)
            policies.load_state_dict(torch.load(file, weights_only=True))
        for group in policies.optimizer.param_groups:
            group["lr"] = schedule(t)
        policies.observe(loss)
        yield t, policies, measured_K(model, policies.optimizer, schedule(t))


def policies_of(**options):
    model = stand_in(FEW)
    return SlowFast(torch.optim.SGD(param_groups(model), lr=1.0, foreach=True), **options), model


# --- the weight sets ------------------------------------------------------------------------------------------


def grouped_names(model):
    """{group: set of names}; each parameter at most once."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {group["name"]: [names[id(p)] for p in group["params"]] for group in param_groups(model)}
    assert len(set().union(*groups.values())) == sum(map(len, groups.values()))
    return {cell: set(group) for cell, group in groups.items()}


def listing(model, depth=12):
    """{cell: set of names}, by Section 3, of what trains."""
    cells = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            cells.setdefault(oracle_cell(name, depth), set()).add(name)
    return cells


@pytest.mark.parametrize("depth", REACH)
def test_the_cells_at_any_depth(depth):
    """Of our model and of Hugging Face's."""
    sizes = {"vocab_size": 20, "hidden_size": 4, "intermediate_size": 8, "max_position_embeddings": 10}
    for model in (SequenceClassifier(Config(num_hidden_layers=depth, num_attention_heads=2, **sizes)), tiny(depth)):
        assert grouped_names(model) == listing(model, depth)


def partly(frozen):
    """A model whose blocks of which frozen(block) is true do not train."""
    model = tiny()
    for name, p in model.named_parameters():
        p.requires_grad_(not frozen(block_of(name)))
    return model


FAMILIES, HEADS = ("XLMRoberta", "Roberta", "Bert", "XLMRobertaXL"), ("ForQuestionAnswering", "ForMaskedLM", "Model")
MODELS = {
    **{family: functools.partial(tiny, family=family) for family in FAMILIES},
    **{head: functools.partial(tiny, head=head) for head in HEADS},
    "under another name": lambda: torch.nn.ModuleDict({"my": torch.nn.ModuleDict({"own": tiny()})}),
    "DataParallel": lambda: torch.nn.DataParallel(tiny()),
    "compiled": lambda: torch.compile(tiny()),
    "declared the other way round": lambda: stand_in([name for name, _ in tiny().named_parameters()][::-1]),
    "frozen outside of layers": lambda: partly(lambda at: at is None),
    "frozen S_II": lambda: partly(lambda at: at and at[0] < 4 and at[1] == "feed-forward"),
    "a part of S_I alone": lambda: partly(lambda at: at is None or at[0] in (0, 1, 2, 10, 11)),
}


@pytest.mark.parametrize("kind", MODELS)
def test_the_cells_of_a_model(kind):
    """Under any prefix and in any order; what is frozen is left out and moves no set."""
    model = MODELS[kind]()
    assert grouped_names(model) == listing(model)


OTHERS = {  # -> (the model, or its parameters' names; what the message names)
    "ResNet": (["conv1.weight", "layer1.0.conv1.weight", "fc.bias"], ["layer1.0.conv1.weight", "encoder.layer"]),
    "a name that only ends so": (["myencoder.layer.0.attention.self.query.weight"], ["myencoder.layer.0"]),
    "no parameter": ([], ["none"]),
    "nothing to train": (lambda: stand_in(FEW).requires_grad_(False), ["require"]),
    "a hole": (layer(0) + layer(2), ["encoder.layer.1", "hole"]),
    "adapter": (layer(0) + ["encoder.layer.1.adapter.down.weight"], ["encoder.layer.1.adapter.down.weight"]),
}  # fmt: skip


@pytest.mark.parametrize("other", OTHERS)
def test_a_model_without_the_sets_raises_and_names_what_it_saw(other):
    model, saw = OTHERS[other]
    with pytest.raises(ValueError) as e:
        param_groups(model() if callable(model) else stand_in(model))
    assert all(text in str(e.value) for text in saw), e.value


# --- K --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy4", ["on", "off", "auto"])
@pytest.mark.parametrize("method", ["df", "fs", "ff", "slowfast"])
@thorough
@given(
    traces(), st.integers(1, 5), st.floats(0.5, 5), st.floats(0, 1), st.floats(1, 50), st.floats(-0.1, 0.3), st.data()
)
def test_K_of_each_weight_follows_the_formulas(method, policy4, losses, window, r, c1, c2, threshold, data):
    """At a rate that changes from update to update, in a run that is resumed. Policy IV with auto: on while the mean of
    the last five similarities is below that of the five before."""
    assume(not on_the_edge(losses, window, threshold))
    # 64ths are exact in binary, so that equal means are equal
    similarities = [data.draw(st.integers(48, 64)) / 64 for _ in losses]
    options = {"c1": c1, "c2": c2, "r": r, "window": window, "threshold": threshold, "policy4": policy4}
    in_first_phase, resumed_at = 0, data.draw(st.integers(1, len(losses)))
    for t, policies, K in follow(losses, method, lambda t: 1 / t, resumed_at, **options):
        first, phi, big_R = oracle_curve(losses[:t], window, r, threshold)
        in_first_phase += first
        assert policies.in_first_phase == first
        assert policies.updates_in_first_phase == in_first_phase
        assert policies.phi == (None if phi is None else pytest.approx(phi, rel=1e-12))
        assert policies.R == (None if phi is None else pytest.approx(big_R, rel=1e-9, abs=1e-12))
        seen = similarities[: t - 1]
        falls = len(seen) >= 10 and np.mean(seen[-5:]) < np.mean(seen[-10:-5])
        active = {"on": True, "off": False, "auto": falls}[policy4]
        assert_K(K, oracle_K, method, first, big_R, c1, c2, active)
        policies.observe_similarity(similarities[t - 1])


@pytest.mark.parametrize("method", ["fs", "ff", "slowfast"])
def test_K_with_the_papers_constants(method):
    """100 + 100 updates, threshold 0.1, c1 0.01, c2 10, r 3, the rule of the loss and policy IV are the defaults. 800
    noisy losses: start, plateau, drop (P1 anew), plateau, rise, drop, plateau."""
    turns, heights = [0, 150, 250, 370, 500, 600, 650, 800], [1.1, 1.1, 1.08, 0.5, 0.5, 0.9, 0.3, 0.3]
    noise = np.random.default_rng(1).uniform(-0.05, 0.05, 800)
    losses = (np.interp(np.arange(800), turns, heights) + noise).tolist()
    assert not on_the_edge(losses, 100, 0.1)
    phases = []
    for t, policies, K in follow(losses, method):
        first, _, big_R = oracle_curve(losses[:t])
        phases.append(first)
        assert (policies.in_first_phase, policies.updates_in_first_phase) == (first, sum(phases)), t
        assert_K(K, oracle_K, method, first, big_R)
    assert phases[:199] == [True] * 199, "until both windows are full the run is in P1"
    assert sum(a != b for a, b in zip(phases, phases[1:])) >= 4, "P1 is left, comes back and is left again"


@pytest.mark.parametrize(
    ("losses", "phi", "big_R", "first"),
    [
        ((2, 1), 0.5, 0.875, True),  # a fall by more than 0.1
        ((0.16, 0.08), 0.5, 0.875, False),  # by less
        ((1, 1.5), 1.5, 0, False),  # a rise: S_II stands still
        ((1e-300, 1), 1e300, 0, False),  # its cube overflows
        ((0, 0), 1, 0, False),  # nothing is divided by 0
        ((0, 1), math.inf, 0, False),
        ((0.05, 0), 0, 1, False),
    ],
)
def test_slowfast_by_hand(losses, phi, big_R, first):
    *_, (_, policies, found) = follow(losses, window=1)
    assert (policies.phi, policies.R, policies.in_first_phase) == (pytest.approx(phi), big_R, first)
    K = {"S_I-S_II": 0.01, "S_II": 0.01} if first else {"S_II": big_R, "V_II": 10}
    assert_K(found, lambda name: K.get(oracle_cell(name), 1))


@thorough
@given(traces(), st.integers(1, 4), st.integers(1, 60), st.integers(0, 100))
@example(losses=[1.0] * 40, window=2, total=100, hundredths=29)  # 0.29 * 100 is 28.999... in binary
def test_phase_by_fraction(losses, window, total, hundredths):
    """P1 is the first part of the updates, whatever the loss does; R counts as 1 until both windows are full."""
    options = {"phase": "fraction", "fraction": hundredths / 100, "total_updates": total, "window": window}
    for t, policies, K in follow(losses, **options):
        first = t <= Fraction(hundredths, 100) * total
        _, phi, big_R = oracle_curve(losses[:t], window)
        assert policies.in_first_phase == first
        assert_K(K, oracle_K, "slowfast", first, 1 if phi is None else big_R)


# --- what `observe` and the constructor take ------------------------------------------------------------------

NUMBERS = [0.75, np.float32(0.75), torch.tensor(0.75), torch.tensor([[0.75]]), torch.tensor(0.75).bfloat16()]


@pytest.mark.parametrize("loss", [*NUMBERS, torch.tensor(0.25, requires_grad=True) * 3])
@pytest.mark.filterwarnings("error")
def test_a_loss_is_a_number_or_a_tensor_of_one(loss):
    policies, _ = policies_of()
    policies.observe(loss)
    (kept,) = policies.state_dict()["losses"]
    assert kept == 0.75 and type(kept) is float


@pytest.mark.parametrize(
    ("loss", "error", "says"),
    [
        (math.nan, FloatingPointError, r"update 3\b.*nan"),
        (torch.tensor(math.inf), FloatingPointError, r"update 3\b.*inf"),
        (-0.5, ValueError, r"update 3\b.*-0.5"),
        (torch.ones(3), (ValueError, RuntimeError), None),
    ],
)
def test_another_loss_raises_with_the_updates_number_and_stays_out_of_the_window(loss, error, says):
    *_, (_, policies, _) = follow([1.0, 2.0])
    before = policies.state_dict()
    with pytest.raises(error, match=says):
        policies.observe(loss)
    assert policies.state_dict() == before


def test_a_step_without_a_new_loss_warns():
    """At the caller's line, and in a resumed run too; with a loss there is nothing to warn of. Before any loss K is
    nothing: an error."""
    policies, model = policies_of()
    set_gradients(model)
    with pytest.raises(RuntimeError, match=r"nor observed: .*call policies\.observe"):
        policies.optimizer.step()
    for happens in ("observed", "nothing", "observed", "resumed"):
        if happens == "observed":
            policies.observe(1.0)
        if happens == "resumed":
            policies.load_state_dict(policies.state_dict() | {"updates": 7})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            policies.optimizer.step()
        told = [(w.category, w.filename) for w in caught if "observe" in str(w.message)]
        assert told == ([] if happens == "observed" else [(UserWarning, __file__)])


def a_rank(folder, rank, losses):
    """One of two processes; prints what it was told at each update, and the message of a NaN on one rank."""
    store = torch.distributed.FileStore(folder + "/meeting", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    policies, _ = policies_of(window=1)
    told = []
    for pair in losses:
        policies.observe(torch.tensor(pair[rank], requires_grad=True) if len(told) % 2 else pair[rank])
        told.append([policies.state_dict()["losses"][-1], policies.multipliers, policies.phi])
    try:
        policies.observe(float("nan") if rank else 1.0)
    except FloatingPointError as e:
        told.append(str(e))
    print(json.dumps(told), flush=True)
    store.set(f"done {rank}", "")  # neither leaves while the other may still wait for its part of a sum
    store.wait(["done 0", "done 1"])
    os._exit(0)


def test_ranks_average_their_losses_and_have_the_same_K(tmp_path):
    """Two processes of torch.distributed; a NaN on one of them stops both."""
    losses = [[2.0, 1.0], [1.0, 0.5], [0.75, 0.5], [0.5, 0.625], [0.25, 0.875]]
    carried = "".join(inspect.getsource(function) for function in (layer, stand_in, policies_of, a_rank))
    script = f"import json, os, torch\nfrom slowfast import SlowFast, param_groups\n{carried}\nFEW = {FEW}\n"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    calls = [f"a_rank({str(tmp_path)!r}, {rank}, {losses})" for rank in range(2)]
    ranks = [subprocess.Popen([sys.executable, "-c", script + call], **options) for call in calls]
    answers = [rank.communicate(timeout=300) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], answers
    (*told, stopped), again = (json.loads(out.splitlines()[-1]) for out, _ in answers)
    assert [*told, stopped] == again and "update 6" in stopped
    assert [loss for loss, _, _ in told] == [np.mean(pair) for pair in losses]
    assert [K["S_II"] for _, K, _ in told] == pytest.approx([0.01, 0.01, 0.01, 1 - 0.9**3, 0])


@pytest.mark.parametrize(
    "wrong",
    [
        {"c1": -0.01}, {"c1": math.nan}, {"c1": math.inf}, {"c2": -1}, {"c2": math.nan}, {"r": 0}, {"r": math.nan},
        {"window": 0}, {"phase": "first"}, {"policy4": "yes"}, {"policy4": True}, {"method": "slowfats"},
        {"phase": "fraction"}, {"phase": "fraction", "total_updates": 0},
        {"phase": "fraction", "total_updates": 100, "fraction": 1.1},
        {"phase": "fraction", "total_updates": 100, "fraction": -0.1},
    ],
    ids=str,
)  # fmt: skip
def test_arguments_out_of_range_raise(wrong):
    with pytest.raises(ValueError, match="df, fs, ff, slowfast$" if "method" in wrong else None):
        policies_of(**wrong)


def test_what_cannot_be_raises():
    policies, model = policies_of(window=4)
    for params in (model.parameters(), [{"name": "everything", "params": model.parameters()}]):
        with pytest.raises(ValueError, match="param_groups"):
            SlowFast(torch.optim.SGD(params, lr=1.0))
    with pytest.raises(ValueError, match="9 losses"):
        policies.load_state_dict(policies.state_dict() | {"losses": [1.0] * 9})
    with pytest.raises(ValueError, match="already"):
        SlowFast(policies.optimizer)
    policies.observe(1.0)  # none of this has left anything behind
    assert_K(measured_K(model, policies.optimizer, 1.0), oracle_K, "slowfast", True, None)


# --- the update is scaled -------------------------------------------------------------------------------------


class DecaysAfterwards(torch.optim.SGD):
    """Builds on another optimiser's step. Like a line search, it calls its closure twice."""

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            _ = closure and closure()
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p -= group["lr"] * 0.5
        return loss


RATE, DECAY = 1e-3, {"weight_decay": 0.1}
OPTIMISERS = {
    "SGD": (torch.optim.SGD, DECAY),
    "SGD momentum": (torch.optim.SGD, DECAY | {"momentum": 0.9, "nesterov": True, "foreach": True}),
    "SGD fused": (torch.optim.SGD, DECAY | {"momentum": 0.9, "fused": True}),
    "AdamW": (torch.optim.AdamW, DECAY | {"foreach": False}),
    "AdamW foreach": (torch.optim.AdamW, DECAY | {"foreach": True}),
    "AdamW fused": (torch.optim.AdamW, DECAY | {"fused": True}),
    "AdamW, rate a tensor": (torch.optim.AdamW, DECAY | {"foreach": False, "lr": torch.tensor(RATE).double()}),
    "AdamW fused, rate a tensor": (torch.optim.AdamW, DECAY | {"fused": True, "lr": torch.tensor(RATE)}),
    "Adam": (torch.optim.Adam, DECAY),
    "RAdam": (torch.optim.RAdam, DECAY | {"decoupled_weight_decay": True}),
    "Adagrad": (torch.optim.Adagrad, {"lr_decay": 0.01}),
    "RMSprop": (torch.optim.RMSprop, {"momentum": 0.9}),
    "Adafactor": (torch.optim.Adafactor, DECAY),
    "our Adam": (Adam, {}),
    "on another one's step": (DecaysAfterwards, {}),
}
ON_GPU = {  # the rate a tensor there; the fused kernel takes none but one of float32
    "capturable": {"capturable": True, "foreach": False, "lr": torch.tensor(RATE).double()},
    "capturable foreach": {"capturable": True, "foreach": True, "lr": torch.tensor(RATE).double()},
    "fused": {"fused": True, "lr": torch.tensor(RATE)},
}
A_K_EACH = {"S_I-S_II": 0, "S_II": 0.01, "V_I-V_II": 3, "V_II": 10, "rest": 0.5}
ONE_EACH = Method(P1=A_K_EACH, P2=A_K_EACH)


def one_each(name):
    """The K of ONE_EACH for a weight of 12 layers."""
    return A_K_EACH[oracle_cell(name)]


def weights_of(model):
    return [p.detach().clone() for p in model.parameters()]


def assert_scaled(model, twin, before, rtol=1e-6, atol=1e-12):
    """The change of each weight since `before` is its K of ONE_EACH times the twin's."""
    for (name, p), q, b in zip(model.named_parameters(), twin.parameters(), before):
        torch.testing.assert_close(p - b, one_each(name) * (q - b), rtol=rtol, atol=atol, msg=name)


def made(kind, model, **options):
    optimizer, more = OPTIMISERS[kind]
    return optimizer(param_groups(model), **copy.deepcopy({"lr": RATE, **more, **options}))


@pytest.mark.parametrize(
    ("kind", "options", "device"),
    [
        *(pytest.param(kind, {}, "cpu", id=kind) for kind in OPTIMISERS),
        *(pytest.param("AdamW", more, "cuda", id=f"{kind}, GPU", marks=NO_GPU) for kind, more in ON_GPU.items()),
    ],
)
@pytest.mark.filterwarnings("error")
def test_the_change_of_each_weight_is_K_times_the_unscaled_change(kind, options, device):
    """Weight decay included; with K = 0 none. K scales the update, not the gradient: moments gather all the same."""
    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])  # from the first one on, torch runs hooks in SGD's step
    generator = torch.Generator().manual_seed(0)
    plain, scaled = random_stand_in().to(device), random_stand_in().to(device)
    options = {name: value.to(device) if name == "lr" else value for name, value in options.items()}
    optimizer, twin = made(kind, scaled, **options), made(kind, plain, **options)
    policies = SlowFast(optimizer, method=ONE_EACH)
    for _ in range(8):
        scaled.load_state_dict(plain.state_dict())  # both set out from the same weights
        before = weights_of(plain)
        for p, q in zip(plain.parameters(), scaled.parameters()):
            gradient = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
            p.grad, q.grad = gradient.clone(), gradient.clone()
        policies.observe(1.0)
        optimizer.step()
        twin.step()
        assert_scaled(scaled, plain, before, atol=1e-14)
        for a, b, start in zip(plain.parameters(), scaled.parameters(), before):
            assert (a - start).abs().min() > 1e-10
            for key, value in twin.state[a].items():
                assert torch.equal(torch.as_tensor(optimizer.state[b][key]), torch.as_tensor(value)), key
        for a, b in zip(twin.param_groups, optimizer.param_groups):
            assert a["lr"] == b["lr"] and type(a["lr"]) is type(b["lr"])


schedulers = torch.optim.lr_scheduler
SCHEDULERS = {
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.99),
    "LambdaLR": lambda o: schedulers.LambdaLR(o, warmup_then_decay(300)),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 300),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 40),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=301, cycle_momentum=False),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, factor=0.7, patience=5),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, 1, 50), schedulers.ExponentialLR(o, 0.98)], milestones=[50]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.LinearLR(o, 0.1, 1, 50), schedulers.StepLR(o, 60, 0.5)]
    ),
}
# 300 updates, from P1 to P2 and back
A_FALL_AND_A_RISE = [*np.linspace(3, 1, 100), *np.full(60, 1.0), *np.linspace(1, 2, 60), *np.linspace(2, 0.5, 80)]


@pytest.mark.parametrize("policies_first", [False, True], ids=["scheduler first", "policies first"])
@pytest.mark.parametrize(
    ("kind", "tensor_rate"),
    [*((kind, False) for kind in SCHEDULERS), ("ExponentialLR", True), ("LambdaLR", True), ("ReduceLROnPlateau", True)],
)
@pytest.mark.filterwarnings("ignore:The epoch parameter:UserWarning")  # SequentialLR's, about itself
def test_over_300_updates_the_rate_reads_what_the_schedule_set(kind, policies_first, tensor_rate):
    """A twin without policies has the same rates outside of the step, in the optimiser's checkpoint too; inside, K is
    on the rate of that update."""
    model, twin_model = stand_in(FEW), stand_in(FEW)
    rate = (lambda: torch.tensor(0.5, dtype=torch.float64)) if tensor_rate else (lambda: 0.5)
    optimizer, twin = (  # of tensors, one for each group: schedulers write into it
        torch.optim.SGD([{**group, "lr": rate()} for group in param_groups(m)], lr=rate(), foreach=not tensor_rate)
        for m in (model, twin_model)
    )
    policies = SlowFast(optimizer, window=5) if policies_first else None
    scheduler, twin_scheduler = SCHEDULERS[kind](optimizer), SCHEDULERS[kind](twin)
    policies = policies or SlowFast(optimizer, window=5)
    for t, loss in enumerate(A_FALL_AND_A_RISE, 1):
        policies.observe(loss)
        K = measured_K(model, optimizer, 1.0)
        unscaled = measured_K(twin_model, twin, 1.0)
        first, _, big_R = oracle_curve(A_FALL_AND_A_RISE[:t], 5)
        expected = {name: oracle_K(name, "slowfast", first, big_R) * k for name, k in unscaled.items()}
        assert_K(K, expected.get)
        for o, s in ((optimizer, scheduler), (twin, twin_scheduler)):
            if t == 150:  # it makes new group dictionaries
                o.load_state_dict(o.state_dict())
            s.step(*[loss] * (kind == "ReduceLROnPlateau"))
        assert rates_of(optimizer) == rates_of(twin), t


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, Adam, DecaysAfterwards])
@pytest.mark.parametrize("by_keyword", [False, True], ids=["step(closure)", "step(closure=)"])
@pytest.mark.filterwarnings("error")
def test_a_closure_reads_the_schedules_rate_and_may_observe(kind, by_keyword):
    """It is evaluated before K is set, once for an optimiser that asks once. A line search's further evaluations are no
    updates."""
    model, twin = random_stand_in(), random_stand_in()
    optimizer, plain = (kind(param_groups(m), lr=0.25) for m in (model, twin))
    scheduler = schedulers.ExponentialLR(optimizer, 0.5)
    policies = SlowFast(optimizer, method=ONE_EACH)
    before, seen = weights_of(model), []

    def closure():
        seen.append(set(rates_of(optimizer)))
        assert torch.is_grad_enabled()
        set_gradients(model)
        policies.observe(3.0)
        return torch.tensor(3.0)

    with torch.no_grad():
        assert (optimizer.step(closure=closure) if by_keyword else optimizer.step(closure)) == 3.0
        plain.step(lambda: set_gradients(twin))
    assert seen[0] == {0.25} and len(seen) == (2 if kind is DecaysAfterwards else 1) and policies.updates == 1
    assert_scaled(model, twin, before)
    scheduler.step()
    assert set(rates_of(optimizer)) == {0.125}


@pytest.mark.parametrize("where", ["the optimiser", "the closure"])
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
def test_a_step_that_raised_leaves_the_schedules_rate_and_nothing_compounds(where, monkeypatch):
    """The loop goes on to its chained scheduler, as `try: step() except OutOfMemoryError: skip` does."""
    policies, model = policies_of(method=ONE_EACH)
    scheduler = schedulers.ExponentialLR(policies.optimizer, 0.5)

    def fails(*_):
        raise MemoryError(where)

    policies.observe(1.0)
    with monkeypatch.context() as patch, pytest.raises(MemoryError, match=where):
        if where == "the optimiser":  # torch's SGD calls it inside of its step, before anything moves
            patch.setattr(policies.optimizer, "_init_group", fails)
        policies.optimizer.step(*[fails] * (where == "the closure"))
    assert set(rates_of(policies.optimizer)) == {1.0}
    scheduler.step()
    policies.observe(1.0)
    assert_K(measured_K(model, policies.optimizer, 0.5), one_each)
    assert set(rates_of(policies.optimizer)) == {0.5}


@pytest.mark.parametrize("kind", ["SGD", "AdamW fused", "our Adam"])
@pytest.mark.filterwarnings("error")
def test_grad_scaler_and_a_step_that_it_skips(kind):
    model, twin = random_stand_in().float(), random_stand_in().float()
    optimizer, plain = made(kind, model), made(kind, twin)
    policies = SlowFast(optimizer, method=ONE_EACH)
    scaler, plain_scaler = (torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in range(2))
    for t, is_skipped in enumerate((False, False, True, False)):
        twin.load_state_dict(model.state_dict())
        before = weights_of(model)
        for m, o, s in ((model, optimizer, scaler), (twin, plain, plain_scaler)):
            loss = told_loss(m, (4.0 - t, 1.0))
            o.zero_grad()
            s.scale(loss).backward()
            if is_skipped:
                next(m.parameters()).grad.fill_(math.inf)
            if o is optimizer:
                policies.observe(loss)
            s.step(o)
            s.update()
        assert policies.state_dict()["losses"][-1] == 4.0 - t, "the loss, not the scaled loss"
        assert_scaled(model, twin, before, rtol=2e-3, atol=3e-7)  # differences of float32
        assert all(map(torch.equal, model.parameters(), before)) == is_skipped
        assert set(rates_of(optimizer)) == {RATE}
    assert scaler.get_scale() == plain_scaler.get_scale() == 512.0


def test_groups_of_the_users():
    """Unnamed ones and ones of other names have K = 1. A cell may be two groups (biases without weight decay, say) or
    come later (layers that are unfrozen). All may be there from the start or be added."""
    model, extra = stand_in(FEW), [torch.nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(3)]
    cells = {group["name"]: group["params"] for group in param_groups(model)}
    late, (one, *others) = cells.pop("V_II"), cells.pop("S_II")
    groups = [{"name": name, "params": p} for name, p in cells.items()]
    groups = [{"params": extra[0], "lr": 0.25}, *groups, {"name": "adapter", "params": extra[1]}]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    policies = SlowFast(optimizer, method=ONE_EACH)
    optimizer.add_param_group({"params": extra[2], "lr": 0.5})
    optimizer.add_param_group({"name": "S_II", "params": [one], "weight_decay": 0.1})
    optimizer.add_param_group({"name": "S_II", "params": others})
    optimizer.add_param_group({"name": "V_II", "params": late})
    for p in extra:
        p.grad = torch.ones_like(p)
    policies.observe(1.0)
    assert_K(measured_K(model, optimizer, 1.0), one_each)
    assert [p.item() for p in extra] == [-0.25, -1.0, -0.5]


# --- Adam -----------------------------------------------------------------------------------------------------


def twins(dtype, device):
    """Two lists of the same parameters, of many shapes; the last two are not contiguous."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(7, 5), (5,), (), (1,), (0, 3), (2, 3, 4), (300,)]
    start = [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes]
    return [[torch.nn.Parameter(x) for x in (*(x.clone() for x in start), start[0].clone().t(), start[0].clone()[::2])]
            for _ in range(2)]  # fmt: skip


def give_gradients(pairs, t, missing):
    """The same to both of a pair: of very different sizes; some are missing."""
    generator = torch.Generator().manual_seed(t)
    for pair in pairs:
        gradient = torch.randn(pair[0].shape, generator=generator, dtype=torch.float64)
        gradient *= 10 ** (4 * torch.rand((), generator=generator) - 3)
        gone = torch.rand((), generator=generator) < missing
        for p in pair:
            p.grad = None if gone else gradient.to(p)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NO_GPU)])
@pytest.mark.parametrize(
    ("betas", "eps", "missing"),
    [((0.9, 0.999), 1e-8, 0.0), ((0.9, 0.999), 0.0, 0.3), ((0.8, 0.95), 1e-3, 0.3), ((0.0, 0.5), 1e-6, 0.3)],
    ids=str,
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.float64, 1e-12)], ids=str)
def test_adam_agrees_with_torchs_over_350_updates(dtype, tolerance, betas, eps, missing, device):
    """At a rate that changes from update to update, with gradients that are missing at times, in two groups."""
    ours, theirs = twins(dtype, device)
    adam, oracle = (
        kind([{"params": p[:3], "betas": (0.7, 0.9), "lr": torch.tensor(0.01).double()}, {"params": p[3:]}],
             betas=betas, eps=eps, **options)
        for kind, p, options in ((Adam, ours, {}), (torch.optim.Adam, theirs, {"foreach": False}))
    )  # fmt: skip
    before = [p.detach().clone() for p in ours]
    for t in range(350):
        for optimizer in (adam, oracle):
            optimizer.param_groups[1]["lr"] = 1e-2 * (1 + math.cos(t / 20)) / 2
        give_gradients(zip(ours, theirs), t, missing)
        adam.step()
        oracle.step()
    for p, q, b in zip(ours, theirs, before):
        assert p.dtype == dtype
        # float32 rounds each of 350 additions to a weight of about 1: an error of some 1e-6
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
        assert p.numel() == 0 or (p - b).abs().max() > 1e-3
        for moment in ("exp_avg", "exp_avg_sq"):
            found, expected = adam.state[p][moment], oracle.state[q][moment]
            torch.testing.assert_close(found, expected, rtol=10 * tolerance, atol=tolerance)


def test_adam_leaves_rows_and_weights_without_a_gradient_where_they_are():
    """Rows of an embedding that no example contains: their gradient is 0. Weights that have none: no state either."""
    table, idle = torch.nn.Embedding(50, 8), torch.nn.Parameter(torch.ones(3))
    (before,), adam = weights_of(table), Adam([table.weight, idle], lr=0.1)
    for _ in range(30):
        adam.zero_grad()
        table(torch.tensor([3, 7, 7])).square().sum().backward()
        assert adam.step() is None
    assert (table.weight != before).any(dim=1).nonzero().flatten().tolist() == [3, 7]
    assert torch.equal(idle, torch.ones(3)) and idle not in adam.state


@pytest.mark.parametrize(
    "wrong", [{"lr": -1e-6}, {"lr": math.nan}, {"eps": -1e-8}, {"betas": (1.0, 0.999)}, {"betas": (0.9, -0.1)}], ids=str
)
def test_adam_refuses_values_out_of_range(wrong):
    with pytest.raises(ValueError):
        Adam([torch.nn.Parameter(torch.ones(1))], **wrong)


def test_adam_refuses_sparse_gradients():
    """The first ones, and such as come after others."""
    table = torch.nn.Embedding(5, 2, sparse=True)
    adam = Adam(table.parameters())
    for _ in range(2):
        (before,) = weights_of(table)
        table(torch.tensor([1])).sum().backward()
        with pytest.raises(RuntimeError, match="[Ss]parse"):
            adam.step()
        assert torch.equal(table.weight, before)
        table.weight.grad = torch.ones_like(table.weight)
        adam.step()
        adam.zero_grad()


@pytest.mark.parametrize(
    ("total", "warmup"), [(100, 0.1), (1000, 0.06), (37, 0.3), (20, 0.0), (10, 1.0), (7, 0.5), (5, 0.1), (1, 0.1)]
)
def test_the_schedule_is_transformers_linear_one(total, warmup):
    """Rates over all updates and some beyond the last."""

    def rates(make):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
        scheduler = make(optimizer)
        for _ in range(total + 3):
            yield optimizer.param_groups[0]["lr"]
            optimizer.step()
            scheduler.step()

    ours = list(rates(lambda o: schedulers.LambdaLR(o, warmup_then_decay(total, warmup))))
    theirs = list(rates(lambda o: transformers.get_linear_schedule_with_warmup(o, round(total * warmup), total)))
    assert ours == pytest.approx(theirs, rel=1e-12, abs=1e-15)
    assert (0 < max(ours)) and ours[total:] == [0, 0, 0]


# --- update and train -----------------------------------------------------------------------------------------


def replay(model, batches, loss_of, K, lr, warmup, clip):
    """The training loop in other people's parts: torch.optim.Adam, transformers' linear schedule, each weight's rate
    times its K. K(name, t, losses). Returns [(loss, the schedule's rate)] of the updates."""
    names, weights = zip(*model.named_parameters())
    optimizer = torch.optim.Adam([{"params": [p]} for p in weights], lr=lr, eps=1e-8)
    scheduler = transformers.get_linear_schedule_with_warmup(optimizer, warmup, len(batches))
    told = []
    for t, batch in enumerate(batches, 1):
        loss = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, clip)
        scheduled = scheduler.get_last_lr()[0]
        told.append((loss.item(), scheduled))
        for group, name in zip(optimizer.param_groups, names):
            group["lr"] = scheduled * K(name, t, [loss for loss, _ in told])
        optimizer.step()
        scheduler.step()
    return told


def by_fraction(method, first, window):
    """K(name, t, losses) of a method whose phase P1 is the `first` updates."""

    def K(name, t, losses):
        _, phi, big_R = oracle_curve(losses, window)
        return oracle_K(name, method, t <= first, 1 if phi is None else big_R)

    return K


def share_of_eight(model, batch):
    """A loss of Hugging Face's, in parts of the mean over eight examples."""
    return model(**batch).loss * len(batch["labels"]) / 8


@pytest.mark.parametrize("micro_batch", [8, 3], ids=["whole batches", "3 + 3 + 2"])
@pytest.mark.parametrize("method", ["df", "slowfast"])
def test_train_is_transformers_and_torchs_adam_step_for_step(method, micro_batch):
    """Losses, rates and all weights of 12 updates in float64; micro-batches change no more than rounding. It yields
    when an update is done and the next not begun, and the caller may do what it likes, such as evaluating."""
    batches = random_batches(12)
    model, oracle = tiny().double(), tiny().double().train()
    told = replay(oracle, batches, share_of_eight, by_fraction(method, 4, 2), lr=2e-3, warmup=3, clip=0.5)
    optimizer = Adam(param_groups(model), lr=2e-3)
    scheduler = schedulers.LambdaLR(optimizer, warmup_then_decay(12, 0.25))
    policies = SlowFast(optimizer, method=method, window=2, phase="fraction", fraction=1 / 3, total_updates=12)
    asked = []

    def updates():
        for batch in batches:
            asked.append(batch)
            yield [{key: x[i : i + micro_batch] for key, x in batch.items()} for i in range(0, 8, micro_batch)]

    def loss(model, batch):
        assert model.training
        return share_of_eight(model, batch)

    for t, done in enumerate(train(model, updates(), loss, optimizer, scheduler, policies, clip=0.5), 1):
        assert tuple(done) == pytest.approx(told[t - 1], rel=1e-8, abs=1e-15)
        stepped = next(iter(optimizer.state.values()))["step"]
        assert t == stepped == scheduler.last_epoch == policies.updates == len(asked)
        model.eval()
    assert t == 12 and policies.updates_in_first_phase == 4
    for (name, p), q in zip(model.named_parameters(), oracle.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9, msg=name)
    assert np.ptp([loss for loss, _ in told]) > 0.01


def told_loss(model, batch):
    """batch: (a loss, the gradient of every weight)."""
    loss, gradient = batch
    return loss + gradient * sum((p - p.detach()).sum() for p in model.parameters())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 1], ids=["first micro-batch", "last micro-batch"])
def test_a_loss_that_is_not_finite_stops_before_any_weight_moves(bad, at):
    model = random_stand_in()
    optimizer = Adam(param_groups(model), lr=1e-2)
    policies = SlowFast(optimizer)
    good, wrong = [(0.5, 1.0), (0.25, 2.0)], [(0.5, 1.0), (0.25, 2.0)]
    wrong[at] = (bad, bad)
    loop = train(model, [good, good, wrong], told_loss, optimizer, schedulers.ConstantLR(optimizer, 1.0), policies)
    assert [next(loop).loss, next(loop).loss] == [0.75, 0.75]
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"], policies.state_dict()))
    with pytest.raises(FloatingPointError, match=r"update 3\b"):
        next(loop)
    after = (model.state_dict(), optimizer.state_dict()["state"], policies.state_dict())
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.parametrize("clip", [0, 0.5, 1.0, 1e6, None])
def test_the_gradients_norm_is_cut_before_K_scales_the_step(clip):
    """0 is never; the default 1, which Appendix B's recipe has."""
    policies, model = policies_of(method=ONE_EACH)
    arguments = {} if clip is None else {"clip": clip}
    assert update(model, [(0.25, 2.0), (0.5, 1.0)], told_loss, policies.optimizer, policies, **arguments) == 0.75
    norm = 3.0 * math.sqrt(len(FEW))
    cut = 1.0 if clip is None else clip or math.inf
    for name, p in model.named_parameters():
        assert p.item() == pytest.approx(-one_each(name) * 3.0 * min(cut / norm, 1), rel=1e-5)
        assert p.grad is None or not p.grad.any()


# --- the file alone -------------------------------------------------------------------------------------------
#
# slowfast.py alone in an empty folder, on a model of Hugging Face's: in a loop with torch's AdamW, in accelerate's, in
# the Trainer and in its own. The functions alone_... are run there, with the file's copy for `slowfast`.


def alone_begin(watching):
    """(model, its AdamW, policies, what is seen at each step: {group: the rate in force}, the rates left behind)."""
    in_force, left = [], []

    class AdamW(torch.optim.AdamW):
        def _init_group(self, group, *args, **kwargs):  # AdamW calls it for each group, inside its step
            if group is self.param_groups[0]:
                in_force.append({group["name"]: group["lr"] for group in self.param_groups})
            return super()._init_group(group, *args, **kwargs)

    model = tiny()
    optimizer = AdamW(param_groups(model), lr=1e-2)
    policies = SlowFast(optimizer, window=2, threshold=0.0, watch=model if watching else None)
    step = optimizer.step

    def stepped(optimizer, *args, **kwargs):
        step(*args, **kwargs)
        left.append(sorted({group["lr"] for group in optimizer.param_groups}))

    optimizer.step = types.MethodType(stepped, optimizer)
    return model, optimizer, policies, {"in force": in_force, "left": left}


def alone_end(policies, losses, seen):
    return {**seen, "losses": losses, "updates": policies.updates, "in P1": policies.updates_in_first_phase}


def alone_plain(accelerated):
    """The docstring's loop; with accelerate too, watched, and what that wraps around the optimiser is refused."""
    model, optimizer, policies, seen = alone_begin(watching=accelerated)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    step, zero_grad, backward, losses = optimizer.step, optimizer.zero_grad, torch.Tensor.backward, []
    if accelerated:
        accelerator = accelerate.Accelerator(cpu=True)
        model, prepared, scheduler = accelerator.prepare(model, optimizer, scheduler)
        step, zero_grad, backward = prepared.step, prepared.zero_grad, accelerator.backward
        with pytest.raises(ValueError, match="accelerator.prepare"):
            SlowFast(prepared)
    for batch in random_batches(8):
        loss = model(**batch).loss
        backward(loss)
        if not accelerated:
            policies.observe(loss)
        step()
        losses.append(loss.item())
        scheduler.step()
        zero_grad()
    return alone_end(policies, losses, seen)


def alone_trainer(accumulation):
    """Hugging Face's Trainer, the model watched."""
    model, optimizer, policies, seen = alone_begin(watching=True)
    losses = {}

    class Recording(transformers.Trainer):
        def compute_loss(self, *args, **kwargs):
            result = super().compute_loss(*args, **kwargs)
            if torch.is_grad_enabled():
                losses.setdefault(self.state.global_step, []).append(result.item())
            return result

    arguments = transformers.TrainingArguments(
        output_dir="out", per_device_train_batch_size=4, gradient_accumulation_steps=accumulation, num_train_epochs=2,
        learning_rate=1e-2, lr_scheduler_type="linear", warmup_steps=2, report_to=[], save_strategy="no", use_cpu=True,
        logging_strategy="no", eval_strategy="epoch", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    examples = [{key: x[0] for key, x in batch.items()} for batch in random_batches(28, size=1)]
    datasets = {"train_dataset": examples, "eval_dataset": examples}
    run = Recording(model=model, args=arguments, **datasets, optimizers=(optimizer, None))
    run.train()
    assert list(losses) == list(range(run.state.global_step)) and sum(map(len, losses.values())) == 14
    return alone_end(policies, [sum(parts) / len(parts) for parts in losses.values()], seen)


def alone_own_loop():
    """The loop in the docstring of `train`, word for word."""
    loop = re.search(r"^( +loss = lambda.*?print\(done\.loss, done\.lr\)\n)", slowfast.train.__doc__, re.S | re.M)[1]
    told, model = [], tiny()
    optimizer = slowfast.Adam(param_groups(model), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, slowfast.warmup_then_decay(12))
    space = {**vars(slowfast), **locals(), "batches": random_batches(12), "print": lambda *said: told.append(said)}
    exec(textwrap.dedent(loop), space)
    return told


CARRIED = [tiny, random_batches, alone_begin, alone_end, alone_plain, alone_trainer, alone_own_loop]
ALONE = f"""
import json, re, sys, textwrap, types, warnings
import accelerate, pytest, torch, transformers
import slowfast
from slowfast import SlowFast, param_groups
warnings.filterwarnings("error", message=".*observe.*")
{"".join(inspect.getsource(function) for function in CARRIED)}
runs = {{"plain": alone_plain(False), "accelerate": alone_plain(True), "Trainer 1": alone_trainer(1),
         "Trainer 2": alone_trainer(2), "own loop": alone_own_loop()}}
imported = sorted({{"data", "model", "eval", "paper"}} & set(sys.modules))
print(json.dumps([slowfast.__file__, imported, sys.path, runs]))
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """{name: what is told of a run} of slowfast.py in a folder of its own."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "slowfast.py").write_bytes((ROOT / "slowfast.py").read_bytes())
    (folder / "script.py").write_text(ALONE, encoding="utf-8")
    environment = {"PYTHONPATH": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    options = {"env": os.environ | environment, "capture_output": True, "text": True, "timeout": 600}
    done = subprocess.run([sys.executable, "script.py"], cwd=folder, **options)
    assert done.returncode == 0, done.stderr[-4000:]
    file, imported, path, runs = json.loads(done.stdout.splitlines()[-1])
    assert Path(file) == folder / "slowfast.py" and imported == [] and str(ROOT) not in path
    return runs


def linear(updates):
    return [1e-2 * (t / 2 if t < 2 else (updates - t) / (updates - 2)) for t in range(updates)]


HALVED = [1e-2 * 0.5**t for t in range(8)]
# The Trainer has 14 micro-batches in 2 epochs, of which an epoch's last update may have one alone.
SCHEDULED = {"plain": HALVED, "accelerate": HALVED, "Trainer 1": linear(14), "Trainer 2": linear(8)}


@pytest.mark.parametrize("name", SCHEDULED)
def test_alone_in_other_peoples_loops(alone, name):
    """Each update is observed once, by the mean over its micro-batches: each step was made at K of these means times
    the schedule's rate. The schedule's rate is what was left behind."""
    run, phases = alone[name], []
    losses = run["losses"]
    assert run["updates"] == len(losses) == len(run["in force"]) == len(run["left"]) == len(SCHEDULED[name])
    for t, (scheduled, in_force, left) in enumerate(zip(SCHEDULED[name], run["in force"], run["left"]), 1):
        first, _, big_R = oracle_curve(losses[:t], 2, threshold=0.0)
        phases.append(first)
        K = dict.fromkeys(CELLS, 1) | ({"S_I-S_II": 0.01, "S_II": 0.01} if first else {"S_II": big_R, "V_II": 10})
        assert in_force == pytest.approx({cell: k * scheduled for cell, k in K.items()}, rel=1e-6, abs=1e-8)
        assert left == [pytest.approx(scheduled, rel=1e-12)]
    assert run["in P1"] == sum(phases) and set(phases) == {True, False}


def test_alone_its_own_loop_is_transformers_and_torchs_adam(alone):
    """As the docstring writes it: the paper's constants, which hold S_I back in a run of 12 updates."""
    in_P1 = by_fraction("slowfast", 12, 100)
    expected = replay(tiny(), random_batches(12), share_of_eight, in_P1, lr=1e-3, warmup=1, clip=1.0)
    assert alone["own loop"] == [pytest.approx(list(pair), rel=1e-4) for pair in expected]


# --- runs of the paper's, done again in other people's parts --------------------------------------------------

SEQUENCES = transformers.AutoModelForSequenceClassification
TASKS = {  # transformers' model; how the data are read
    "xnli": (SEQUENCES, {}),
    "qam": (SEQUENCES, {}),
    "mlqa": (transformers.AutoModelForQuestionAnswering, {"max_length": 32, "stride": 10, "max_question": 9}),
    "ner": (transformers.AutoModelForTokenClassification, {"max_length": 8}),
}


def loss_by_tokens(model, batch):
    """The mean loss of a batch (ids, labels), by transformers' own losses."""
    ids, labels = batch
    return model(input_ids=ids, attention_mask=(ids != 1).long(), labels=labels).loss


def loss_by_spans(model, batch):
    """The same of question answering, one by one: there padding is a place where an answer may begin."""
    ends = {"start_positions": batch[1][:, :1], "end_positions": batch[1][:, 1:]}
    rows = [{"input_ids": ids[ids != 1][None], **{k: v[i] for k, v in ends.items()}} for i, ids in enumerate(batch[0])]
    return sum(model(**row).loss for row in rows) / len(rows)


@pytest.fixture(scope="module")
def plain_model(make_model):
    """Without dropout: what it computes is a function of weights and data alone."""
    return make_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


@pytest.mark.parametrize("task", TASKS)
def test_the_losses_of_a_run_are_those_of_transformers_and_torchs_adam(
    run_main, tmp_path, plain_model, tiny_data, tiny_tasks, task
):
    """In whole batches and in micro-batches, which hold different numbers of labels."""
    method, folder = ("slowfast", tiny_data) if task == "xnli" else ("df", tiny_tasks)
    (auto, reading), cache = TASKS[task], tmp_path / "cache"
    options = ["--model", plain_model, "--data", folder, "--cache", cache, "--device", "cpu", "--precision", "fp32",
               "--seed", 5, "--epochs", 9, "--batch-size", 8, "--warmup", 0.25, "--clip", 0.5, "--window", 2, "--phase",
               "fraction", "--fraction", 0.5, "--log-every", 1, "--gap-every", 0, "--eval-every", 0, "--no-test",
               "--method", method]  # fmt: skip
    options += [o for name, value in reading.items() for o in ("--" + name.replace("_", "-"), value)]
    runs = {"start": ("--lr", 0, "--max-updates", 1), "whole": (), "parts": ("--micro-batch", 3)}
    for name, more in runs.items():
        done = run_main("run", task, *options, "--lr", 2e-3, "--max-updates", 8, *more, "--out", tmp_path / name)
        assert done.status == 0, done.err

    examples = data.load(task, folder, data.Tokenizer(plain_model), cache=cache, **reading).train
    epochs = [data.epoch_batches(examples.lengths, 8, seed=5, epoch=epoch) for epoch in range(3)]
    batches = [data.collate(examples, indices) for indices in sum(epochs, [])[:8]]
    assert any((ids == 1).any() for ids, _ in batches), "some are padded"
    model, K = auto.from_pretrained(tmp_path / "start" / "best"), by_fraction(method, 4, 2)
    loss_of = loss_by_spans if task == "mlqa" else loss_by_tokens
    expected = [loss for loss, _ in replay(model, batches, loss_of, K, lr=2e-3, warmup=2, clip=0.5)]
    assert max(expected) - min(expected) > 0.01
    for name in ("whole", "parts"):
        log = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        assert [line["loss"] for line in log] == pytest.approx(expected, rel=1e-4), name
