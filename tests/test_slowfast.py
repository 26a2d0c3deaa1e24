"""The method, the upper half of slowfast.py: weight sets, learning curve, K, the table of methods, Adam, schedule.

The oracles are written here, apart, from the paper's formulas and tables, or are torch's own classes.
"""

import ast
import copy
import io
import json
import math
import os
import subprocess
import sys
import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model import Config, SequenceClassifier  # noqa: E402
from slowfast import (  # noqa: E402
    METHODS,
    Adam,
    LearningCurve,
    Method,
    R,
    SlowFast,
    param_groups,
    prepare,
    warmup_then_decay,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
# No test depends on time: neither on how long an example takes nor on how long it takes to draw.
untimed = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.filter_too_much]}
thorough = settings(max_examples=15, **untimed)

# --- stand-ins for a model: its parameters' names are what the method sees ------------------------------------

ATTENTION = [
    f"attention.{part}.{kind}"
    for part in ("self.query", "self.key", "self.value", "output.dense", "output.LayerNorm")
    for kind in ("weight", "bias")
]
FEED_FORWARD = [
    f"{part}.{kind}" for part in ("intermediate.dense", "output.dense", "output.LayerNorm") for kind in ("weight", "bias")
]
EMBEDDINGS = [f"embeddings.{part}_embeddings.weight" for part in ("word", "position", "token_type")]
EMBEDDINGS += ["embeddings.LayerNorm.weight", "embeddings.LayerNorm.bias"]
HEAD = [f"classifier.{part}.{kind}" for part in ("dense", "out_proj") for kind in ("weight", "bias")]


def layer(n, names=(*ATTENTION, *FEED_FORWARD)):
    return [f"encoder.layer.{n}.{name}" for name in names]


def xlmr_names(depth=12):
    """All the parameter names of XLM-R with a classification head."""
    encoder = EMBEDDINGS + [name for n in range(depth) for name in layer(n)]
    return [f"roberta.{name}" for name in encoder] + HEAD


def few_names(depth=12):
    """One weight of each block, of the embeddings and of the head."""
    each = ("attention.self.query.weight", "intermediate.dense.weight")
    encoder = EMBEDDINGS[:1] + [name for n in range(depth) for name in layer(n, each)]
    return [f"roberta.{name}" for name in encoder] + HEAD[-1:]


def stand_in(names, shape=lambda name: (1,), fill=torch.zeros):
    """A module that has just these parameters, float64."""
    root = torch.nn.Module()
    for name in names:
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, torch.nn.Module())
            module = module._modules[part]
        module.register_parameter(leaf, torch.nn.Parameter(fill(shape(name), dtype=torch.float64)))
    return root


def random_stand_in(names, matrix=(6, 4), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return stand_in(
        names,
        lambda name: matrix if name.endswith("weight") and "LayerNorm" not in name else matrix[:1],
        lambda shape, dtype: torch.randn(shape, generator=generator, dtype=dtype) * 0.3 + 0.2,
    )


def set_gradients(model):
    """A gradient of 1 for every weight."""
    for p in model.parameters():
        p.grad = torch.ones_like(p)


def measured_K(model, optimizer, rate):
    """{name: K}, from how far one step of plain SGD with gradient 1 moves each weight: rate * K."""
    names, weights = zip(*model.named_parameters(), strict=True)
    if weights[0].grad is None:
        set_gradients(model)
    torch._foreach_zero_([p.data for p in weights])
    optimizer.step()
    moved = torch.cat([p.data for p in weights]) / -rate
    return dict(zip(names, moved.tolist(), strict=True))


def assert_K(K, expected):
    """`expected` is a function of the name."""
    np.testing.assert_allclose(list(K.values()), [float(expected(name)) for name in K], rtol=1e-9, atol=1e-12)


# --- the oracle: Sections 2.3 to 4.1 --------------------------------------------------------------------------

ATT, FFN = "attention", "feed-forward"
OF_TWELVE = {  # set -> (layers, blocks), of 12
    "S_I": (range(0, 10), (ATT, FFN)),
    "S_II": (range(0, 4), (FFN,)),
    "V_I": (range(10, 12), (ATT, FFN)),
    "V_II": (range(10, 12), (ATT,)),
}
# Which set each of the policies I, II, III and IV is applied to.
POLICIES = {
    "fs": ("S_I", "S_II", None, None),
    "ff": (None, None, "V_I", "V_II"),
    "slowfast": ("S_I", "S_II", "V_I", "V_II"),
    "only-S_I": ("S_I", "S_I", "V_I", "V_II"),
    "only-S_II": ("S_II", "S_II", "V_I", "V_II"),
    "swap-S": ("S_II", "S_I", "V_I", "V_II"),
    "only-V_I": ("S_I", "S_II", "V_I", "V_I"),
    "only-V_II": ("S_I", "S_II", "V_II", "V_II"),
    "swap-V": ("S_I", "S_II", "V_II", "V_I"),
}
ENLARGED = {"enlarge-2": (ATT, FFN), "enlarge-2-attention": (ATT,), "enlarge-2-ffn": (FFN,)}
WITHOUT_K = ["df", "noisytune", "last-1", "last-2", "last-3"]
WITHOUT_K += [f"{verb}-4{block}" for verb in ("freeze", "reinit") for block in ("", "-attention", "-ffn")]
WITHOUT_K += [f"{verb}-layer-{i}" for verb in ("freeze", "reinit") for i in range(12)]
WITH_K = [*POLICIES, *ENLARGED]


def block_of(name):
    """roberta.encoder.layer.3.output.dense.bias -> (3, "feed-forward"); None outside of layers."""
    parts = name.split(".")
    if "layer" not in parts:
        return None
    at = parts.index("layer")
    return int(parts[at + 1]), ATT if parts[at + 2] == "attention" else FFN


def is_in(name, set_):
    where = block_of(name)
    return where is not None and set_ is not None and where[0] in OF_TWELVE[set_][0] and where[1] in OF_TWELVE[set_][1]


def oracle_K(name, method, in_first_phase, R, c1=0.01, c2=10, policy4=True):
    """Eqs. 1 and 2 for one weight of a 12-layer model."""
    if method in ENLARGED:
        where = block_of(name)
        return 10 if where and where[0] >= 10 and where[1] in ENLARGED[method] else 1
    if method not in POLICIES:
        return 1
    one, two, three, four = POLICIES[method]
    if in_first_phase:
        slowed = is_in(name, one)
        if three is not None and is_in(name, "V_I") and not is_in(name, three):
            slowed = True  # policy III does not keep it at 1
        return c1 if slowed else 1
    if is_in(name, two):
        return R
    return c2 if policy4 and is_in(name, four) else 1


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
    for t in range(2 * window, len(x) + 1):
        fall = x[t - 2 * window : t - window].mean() - x[t - window : t].mean()
        if abs(fall - threshold) < 1e-9:
            return True
    return False


@st.composite
def traces(draw, longest=10):
    """A loss curve of plateaus, drops, rises, jumps and noise; always above 0."""
    level, losses = draw(st.floats(0.05, 3)), []
    for _ in range(draw(st.integers(2, 6))):
        kind = draw(st.sampled_from(["plateau", "drop", "rise", "jump", "noise"]))
        speed = draw(st.floats(0.01, 0.5))
        for _ in range(draw(st.integers(1, longest))):
            if kind == "noise":
                losses.append(level + draw(st.floats(0, 1)))
                continue
            level = max(level + {"plateau": 0, "drop": -speed, "rise": speed, "jump": 4 * speed}[kind], 0.01)
            losses.append(level)
            kind = "plateau" if kind == "jump" else kind
    return losses


def long_trace(seed):
    """800 noisy losses: start, plateau, drop (P1 anew), plateau, rise, drop, plateau."""
    noise = np.random.default_rng(seed)
    parts = [np.full(150, 1.1), np.linspace(1.1, 1.08, 100), np.linspace(1.08, 0.5, 120), np.full(130, 0.5),
             np.linspace(0.5, 0.9, 100), np.linspace(0.9, 0.3, 50), np.full(150, 0.3)]  # fmt: skip
    return (np.concatenate(parts) + noise.uniform(-0.05, 0.05, 800)).tolist()


def follow(names, losses, method, schedule=lambda t: 0.5, **options):
    """Feeds `losses` to a run; yields (t, policies, {name: the K that the optimiser applied}) at each update."""
    model = stand_in(names)
    optimizer = torch.optim.SGD(param_groups(model), lr=1.0, foreach=True)
    policies = SlowFast(optimizer, method=method, **options)
    for t, loss in enumerate(losses, 1):
        for group in optimizer.param_groups:
            group["lr"] = schedule(t)
        policies.observe(loss)
        yield t, policies, measured_K(model, optimizer, schedule(t))


# --- K --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["df", *WITH_K])
@thorough
@given(traces(), st.integers(1, 5), st.floats(0.5, 5), st.floats(0, 1), st.floats(1, 50), st.floats(-0.1, 0.3))
def test_K_of_each_weight_follows_the_formulas(method, losses, window, r, c1, c2, threshold):
    assume(not on_the_edge(losses, window, threshold))
    constants = {"c1": c1, "c2": c2}
    run = follow(few_names(), losses, method, lambda t: 1 / t, window=window, r=r, threshold=threshold, **constants)
    in_first_phase = 0
    for t, policies, K in run:
        first, phi, big_R = oracle_curve(losses[:t], window, r, threshold)
        in_first_phase += first
        assert policies.in_first_phase == first
        assert policies.updates_in_first_phase == in_first_phase
        assert policies.phi == (None if phi is None else pytest.approx(phi, rel=1e-12))
        assert policies.R == (None if phi is None else pytest.approx(big_R, rel=1e-9, abs=1e-12))
        assert_K(K, lambda name: oracle_K(name, method, first, big_R, **constants))


@pytest.mark.parametrize("method", ["fs", "ff", "slowfast", "swap-V"])
def test_K_with_the_papers_windows(method):
    """100 + 100 updates, threshold 0.1, c1 0.01, c2 10, r 3, which are the defaults; the run comes back to P1."""
    losses, phases = long_trace(1), []
    assert not on_the_edge(losses, 100, 0.1)
    for t, policies, K in follow(few_names(), losses, method):
        first, phi, big_R = oracle_curve(losses[:t])
        phases.append(first)
        assert (policies.in_first_phase, policies.updates_in_first_phase) == (first, sum(phases)), t
        assert_K(K, lambda name: oracle_K(name, method, first, big_R))
    changes = [t for t in range(2, 801) if phases[t - 1] != phases[t - 2]]
    assert phases[:199] == [True] * 199, "until both windows are full the run is in P1"
    assert len(changes) >= 4, "the trace should leave P1, come back and leave it again"


@pytest.mark.parametrize("method", [*WITHOUT_K, *WITH_K])
@pytest.mark.parametrize(
    ("losses", "first"), [([2.0, 1.5], True), ([2.0, 1.95], False), ([2.0, 2.5], False)], ids=["P1", "P2", "rise"]
)
def test_the_K_of_every_parameter_of_xlmr(method, losses, first):
    """With all 201 names: encoder.layer.3.intermediate.dense.weight, ..., classifier.out_proj.bias."""
    *_, (_, policies, K) = follow(xlmr_names(), losses, method, window=1)
    _, _, big_R = oracle_curve(losses, window=1)
    assert policies.in_first_phase == first
    assert len(K) == 5 + 12 * 16 + 4
    assert_K(K, lambda name: oracle_K(name, method, first, big_R))


@pytest.mark.parametrize(
    ("name", "P1", "P2"),
    [
        ("roberta.embeddings.word_embeddings.weight", 1, 1),
        ("roberta.encoder.layer.0.attention.self.query.weight", 0.01, 1),
        ("roberta.encoder.layer.3.attention.output.LayerNorm.weight", 0.01, 1),
        ("roberta.encoder.layer.3.intermediate.dense.weight", 0.01, 0.875),
        ("roberta.encoder.layer.3.output.LayerNorm.bias", 0.01, 0.875),
        ("roberta.encoder.layer.4.output.dense.weight", 0.01, 1),
        ("roberta.encoder.layer.9.output.dense.weight", 0.01, 1),
        ("roberta.encoder.layer.10.attention.self.key.bias", 1, 10),
        ("roberta.encoder.layer.11.attention.output.dense.weight", 1, 10),
        ("roberta.encoder.layer.11.intermediate.dense.weight", 1, 1),
        ("classifier.out_proj.weight", 1, 1),
    ],
)
def test_slowfast_by_hand(name, P1, P2):
    """A loss of 2 halves to 1 (P1), then 0.16 halves to 0.08, which is less than 0.1 (P2): phi 1/2, R 1 - 1/8."""
    by_update = {t: K[name] for t, _, K in follow(xlmr_names(), [2, 1, 0.16, 0.08], "slowfast", window=1)}
    assert (by_update[2], by_update[4]) == (pytest.approx(P1), pytest.approx(P2))


def test_a_rise_gives_R_0_and_a_weight_that_stands_still():
    *_, (_, policies, K) = follow(few_names(), [1.0, 1.5], "slowfast", window=1)
    assert policies.R == 0 and not policies.in_first_phase
    assert K["roberta.encoder.layer.3.intermediate.dense.weight"] == 0


@pytest.mark.parametrize(("losses", "phi", "big_R"), [([0.0, 0.0], 1, 0), ([0.0, 1.0], math.inf, 0), ([1.0, 0.0], 0, 1)])
def test_a_loss_of_0_divides_nothing_by_0(losses, phi, big_R):
    *_, (_, policies, K) = follow(few_names(), losses, "slowfast", window=1, threshold=5)
    assert (policies.phi, policies.R) == (phi, big_R)
    assert all(math.isfinite(k) for k in K.values())


@pytest.mark.parametrize("policy4", ["on", "off", "auto"])
@pytest.mark.parametrize("method", ["slowfast", "swap-V", "enlarge-2-attention"])
@thorough
@given(traces(), st.data())
def test_policy_4_on_off_and_auto(method, policy4, losses, data):
    """auto: active while the mean of the last five similarities is below that of the five before."""
    assume(not on_the_edge(losses, 2, 0.1))
    measured = []
    # 64ths are exact in binary, so that equal means are equal
    size = {"min_size": len(losses), "max_size": len(losses)}
    similarities = [n / 64 for n in data.draw(st.lists(st.integers(48, 64), **size))]
    for t, policies, K in follow(few_names(), losses, method, window=2, policy4=policy4):
        first, _, big_R = oracle_curve(losses[:t], 2)
        falls = len(measured) >= 10 and np.mean(measured[-5:]) < np.mean(measured[-10:-5])
        active = {"on": True, "off": False, "auto": falls}[policy4]
        assert_K(K, lambda name: oracle_K(name, method, first, big_R, policy4=active))
        measured.append(similarities[t - 1])
        policies.observe_similarity(similarities[t - 1])


@thorough
@given(traces(), st.integers(1, 4), st.integers(1, 60), st.integers(0, 100))
@example(losses=[1.0] * 40, window=2, total=100, hundredths=29)  # 0.29 * 100 is 28.999... in binary
def test_phase_by_fraction(losses, window, total, hundredths):
    """P1 is the first part of the updates, whatever the loss does; R counts as 1 until both windows are full."""
    fraction = hundredths / 100
    options = {"phase": "fraction", "fraction": fraction, "total_updates": total, "window": window}
    for t, policies, K in follow(few_names(), losses, "slowfast", **options):
        first = t <= Fraction(hundredths, 100) * total
        _, phi, big_R = oracle_curve(losses[:t], window)
        assert policies.in_first_phase == first
        assert_K(K, lambda name: oracle_K(name, "slowfast", first, 1 if phi is None else big_R))


def test_the_loss_rule_is_the_default():
    model = stand_in(few_names())
    assert SlowFast(torch.optim.SGD(param_groups(model), lr=1.0)).phase == "loss"


@thorough
@given(
    traces(),
    st.integers(1, 4),
    st.sampled_from(["slowfast", "swap-V", "only-S_I"]),
    st.sampled_from(["on", "auto"]),
    st.data(),
)
def test_state_dict_goes_on_identically(losses, window, method, policy4, data):
    stop = data.draw(st.integers(0, len(losses)))

    def run(policies, model, part):
        for loss in part:
            policies.observe(loss)
            K = measured_K(model, policies.optimizer, 1.0)
            shown = policies.multipliers, policies.phi, policies.R, policies.in_first_phase
            yield K, *shown, policies.updates_in_first_phase
            policies.observe_similarity(loss / 4)

    def new():
        model = stand_in(few_names())
        optimizer = torch.optim.SGD(param_groups(model), lr=1.0)
        return SlowFast(optimizer, method=method, window=window, policy4=policy4), model

    whole = list(run(*new(), losses))
    first_part, *model = new()
    assert list(run(first_part, *model, losses[:stop])) == whole[:stop]
    state = json.loads(json.dumps(first_part.state_dict()))
    list(run(first_part, *model, losses[stop:]))  # the state is a copy: going on does not change it
    second_part, *model = new()
    second_part.load_state_dict(state)
    assert list(run(second_part, *model, losses[stop:])) == whole[stop:]


def test_state_dict_survives_a_safe_load():
    *_, (_, policies, _) = follow(few_names(), [2.0, 1.5, 1.4], "slowfast", window=1)
    file = io.BytesIO()
    torch.save(policies.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == policies.state_dict()


def test_more_losses_than_two_windows_are_refused():
    *_, (_, policies, _) = follow(few_names(), [1.0] * 8, "slowfast", window=4)
    *_, (_, smaller, _) = follow(few_names(), [1.0], "slowfast", window=3)
    with pytest.raises(ValueError, match="8 losses"):
        smaller.load_state_dict(policies.state_dict())


@settings(**untimed)
@given(st.lists(st.floats(0, 100), max_size=30), st.integers(1, 8))
def test_learning_curve_windows(losses, window):
    curve = LearningCurve(window)
    for t, loss in enumerate(losses, 1):
        curve.losses.append(loss)
        if t < 2 * window:
            assert not curve.full and curve.recent is curve.previous is curve.phi is None
        else:
            assert curve.recent == pytest.approx(np.mean(losses[t - window : t]))
            assert curve.previous == pytest.approx(np.mean(losses[t - 2 * window : t - window]))


@pytest.mark.parametrize(("phi", "r", "expected"), [(0, 3, 1), (0.5, 3, 0.875), (0.5, 1, 0.5), (1, 3, 0), (1.7, 3, 0),
                                                    (math.inf, 3, 0), (1e300, 5, 0), (0.25, 0.5, 0.5)])  # fmt: skip
def test_R(phi, r, expected):
    assert R(phi, r) == expected


# --- what `observe` takes -------------------------------------------------------------------------------------


def policies_of(names=None, optimizer=lambda groups: torch.optim.SGD(groups, lr=1.0), **options):
    model = stand_in(names or few_names())
    return SlowFast(optimizer(param_groups(model)), **options), model


@pytest.mark.parametrize(
    "loss",
    [
        0.75,
        np.float32(0.75),
        torch.tensor(0.75),
        torch.tensor([[0.75]]),
        torch.tensor(0.75, dtype=torch.bfloat16),
        torch.tensor(0.25, requires_grad=True) * 3,
    ],
    ids=["float", "numpy", "0-dimensional", "1x1", "bf16", "with a graph"],
)
def test_a_loss_is_a_number_or_a_tensor_of_one(loss):
    policies, _ = policies_of()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policies.observe(loss)
    assert policies.state_dict()["losses"] == [0.75]
    assert type(policies.state_dict()["losses"][0]) is float


def test_a_loss_of_several_numbers_is_refused():
    policies, _ = policies_of()
    with pytest.raises((ValueError, RuntimeError)):
        policies.observe(torch.ones(3))
    assert policies.updates == 0


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, torch.tensor(math.nan)])
def test_a_loss_that_is_not_finite_stops_the_run_and_stays_out_of_the_window(loss):
    policies, _ = policies_of(window=2)
    for good in (1.0, 2.0):
        policies.observe(good)
    before = policies.state_dict()
    with pytest.raises(FloatingPointError, match=r"\b3\b"):
        policies.observe(loss)
    assert policies.state_dict() == before


def test_a_negative_loss_is_refused():
    policies, _ = policies_of()
    with pytest.raises(ValueError, match="-0.5"):
        policies.observe(-0.5)
    assert policies.state_dict()["losses"] == []


def test_a_step_without_a_new_loss_warns():
    policies, model = policies_of()
    set_gradients(model)
    policies.observe(1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policies.optimizer.step()
    with pytest.warns(UserWarning, match="observe") as caught:
        policies.optimizer.step()
    assert caught[0].filename == __file__, "the warning points at the caller's line"
    policies.observe(1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policies.optimizer.step()


def test_a_loop_that_never_observes_is_warned():
    policies, model = policies_of()
    set_gradients(model)
    with pytest.warns(UserWarning, match="observe"):
        for _ in range(2):
            policies.optimizer.step()


def test_a_resumed_loop_that_never_observes_is_warned():
    *_, (_, stopped, _) = follow(few_names(), [1.0, 1.0], "slowfast")
    policies, model = policies_of()
    policies.load_state_dict(stopped.state_dict())
    set_gradients(model)
    with pytest.warns(UserWarning, match="observe"):
        policies.optimizer.step()


RANK = """
import json, os, sys, torch
sys.path.insert(0, sys.argv[1])
from slowfast import SlowFast, param_groups
rank = int(sys.argv[2])
store = torch.distributed.FileStore(sys.argv[3], 2)
torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
model = torch.nn.Module()
model.encoder = torch.nn.Module()
model.encoder.layer = torch.nn.ModuleList()
for _ in range(12):
    block = torch.nn.Module()
    block.attention, block.output = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    model.encoder.layer.append(block)
policies = SlowFast(torch.optim.SGD(param_groups(model), lr=1.0), window=1)
told = []
for losses in json.loads(sys.argv[4]):
    loss = losses[rank]
    policies.observe(torch.tensor(loss, requires_grad=True) if len(told) % 2 else loss)
    told.append([policies.state_dict()["losses"][-1], policies.multipliers, policies.phi])
try:
    policies.observe(float("nan") if rank else 1.0)
except FloatingPointError as e:
    told.append(str(e))
print(json.dumps(told), flush=True)
store.set(f"done {rank}", "")  # neither leaves while the other may still wait for its part of a sum
store.wait(["done 0", "done 1"])
os._exit(0)
"""


def test_ranks_average_their_losses_and_have_the_same_K(tmp_path):
    """Two processes of torch.distributed; a NaN on one of them stops both."""
    losses = [[2.0, 1.0], [1.0, 0.5], [0.75, 0.5], [0.5, 0.625], [0.25, 0.875]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(ROOT), str(rank), str(tmp_path / "meeting"), json.dumps(losses)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for rank in range(2)
    ]  # fmt: skip
    answers = [rank.communicate(timeout=300) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], answers
    (*told, stopped), (*told_2, stopped_2) = (json.loads(out.splitlines()[-1]) for out, _ in answers)
    assert told == told_2
    assert [loss for loss, _, _ in told] == [np.mean(pair) for pair in losses]
    assert [K["S_II"] for _, K, _ in told] == pytest.approx([0.01, 0.01, 0.01, 1 - 0.9**3, 0])
    assert "6" in stopped and "6" in stopped_2


# --- misuse ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"c1": -0.01}, {"c1": math.nan}, {"c2": -1}, {"c2": math.nan}, {"r": 0}, {"r": -3}, {"r": math.nan},
        {"window": 0}, {"window": -100}, {"phase": "first"}, {"policy4": "yes"}, {"policy4": True}, {"phase": "fraction"},
        {"phase": "fraction", "total_updates": 100, "fraction": 1.1},
        {"phase": "fraction", "total_updates": 100, "fraction": -0.1},
        {"phase": "fraction", "total_updates": 0}, {"phase": "fraction", "total_updates": -5},
    ],
    ids=str,
)  # fmt: skip
def test_arguments_out_of_range_raise(wrong):
    with pytest.raises(ValueError):
        policies_of(**wrong)


def test_an_unknown_method_raises_with_the_list():
    with pytest.raises(ValueError, match="slowfats") as e:
        policies_of(method="slowfats")
    assert all(name in str(e.value) for name in ("df", "noisytune", "slowfast", "swap-V"))


def test_an_optimiser_without_named_groups_raises():
    model = stand_in(few_names())
    for params in (model.parameters(), [{"name": "everything", "params": model.parameters()}]):
        with pytest.raises(ValueError, match="param_groups"):
            SlowFast(torch.optim.SGD(params, lr=1.0))


def test_a_second_set_of_policies_raises():
    policies, model = policies_of()
    with pytest.raises(ValueError, match="already"):
        SlowFast(policies.optimizer)
    policies.observe(1.0)
    assert_K(measured_K(model, policies.optimizer, 1.0), lambda name: oracle_K(name, "slowfast", True, None))


# --- the update is scaled -------------------------------------------------------------------------------------

RATE = 1e-3
OPTIMISERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=RATE, weight_decay=0.1),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=RATE, momentum=0.9, nesterov=True, weight_decay=0.1, foreach=True),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=RATE, momentum=0.9, weight_decay=0.1, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=RATE, weight_decay=0.1, foreach=False),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=RATE, weight_decay=0.1, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=RATE, weight_decay=0.1, fused=True),
    "AdamW, rate a tensor": lambda p: torch.optim.AdamW(
        p, lr=torch.tensor(RATE).double(), weight_decay=0.1, foreach=False
    ),
    "AdamW fused, rate a tensor": lambda p: torch.optim.AdamW(p, lr=torch.tensor(RATE), weight_decay=0.1, fused=True),
    "AdamW amsgrad": lambda p: torch.optim.AdamW(p, lr=RATE, weight_decay=0.1, amsgrad=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=RATE, weight_decay=0.1),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=RATE),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=RATE, weight_decay=0.1, decoupled_weight_decay=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=RATE, weight_decay=0.1, decoupled_weight_decay=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=RATE, lr_decay=0.01),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=RATE),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=RATE, momentum=0.9),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=RATE, weight_decay=0.1),
    "our Adam": lambda p: Adam(p, lr=RATE),
}
A_K_EACH = {"S_I-S_II": 0.25, "S_II": 0.01, "V_I-V_II": 3, "V_II": 10, "rest": 0.5}
ONE_EACH = Method("every cell has a K of its own", P1=A_K_EACH, P2=A_K_EACH)


def one_each(name):
    """The K of ONE_EACH for a weight of 12 layers."""
    for cell in ("S_II", "V_II"):
        if is_in(name, cell):
            return A_K_EACH[cell]
    return A_K_EACH["S_I-S_II" if is_in(name, "S_I") else "V_I-V_II" if is_in(name, "V_I") else "rest"]


def random_gradients(*models, generator):
    for parameters in zip(*(m.parameters() for m in models), strict=True):
        gradient = torch.randn(parameters[0].shape, generator=generator, dtype=torch.float64).to(parameters[0])
        for p in parameters:
            p.grad = gradient.clone()


@pytest.mark.parametrize("with_closure", [False, True], ids=["", "closure"])
@pytest.mark.parametrize("steps_before", [0, 7])
@pytest.mark.parametrize("kind", OPTIMISERS)
def test_the_change_of_each_weight_is_K_times_the_unscaled_change(kind, steps_before, with_closure):
    """Weight decay included."""
    generator = torch.Generator().manual_seed(0)
    plain, scaled = random_stand_in(few_names()), random_stand_in(few_names())
    optimizers = [OPTIMISERS[kind](param_groups(m)) for m in (plain, scaled)]
    for _ in range(steps_before):
        random_gradients(plain, scaled, generator=generator)
        for optimizer in optimizers:
            optimizer.step()
    before = {name: p.detach().clone() for name, p in plain.named_parameters()}
    policies = SlowFast(optimizers[1], method=ONE_EACH)
    random_gradients(plain, scaled, generator=generator)
    policies.observe(1.0)
    for optimizer in optimizers:
        optimizer.step(*[lambda: 1.0] * with_closure)
    for (name, a), b in zip(plain.named_parameters(), scaled.parameters(), strict=True):
        change = a - before[name]
        assert change.abs().min() > 1e-10
        torch.testing.assert_close(b - before[name], one_each(name) * change, rtol=1e-6, atol=1e-14, msg=name)
    for a, b in zip(optimizers[0].param_groups, optimizers[1].param_groups, strict=True):
        assert a["lr"] == b["lr"] and type(a["lr"]) is type(b["lr"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(
    "options", [{"capturable": True, "foreach": True}, {"capturable": True, "foreach": False}, {"fused": True}], ids=str
)
def test_the_change_is_K_times_the_unscaled_one_on_a_gpu(options):
    generator = torch.Generator().manual_seed(0)
    plain, scaled = random_stand_in(few_names()).cuda(), random_stand_in(few_names()).cuda()
    rate = torch.tensor(RATE, dtype=torch.float64, device="cuda")
    optimizers = [torch.optim.AdamW(param_groups(m), lr=rate, **options) for m in (plain, scaled)]
    before = {name: p.detach().clone() for name, p in plain.named_parameters()}
    policies = SlowFast(optimizers[1], method=ONE_EACH)
    random_gradients(plain, scaled, generator=generator)
    policies.observe(torch.tensor(1.0, device="cuda"))
    for optimizer in optimizers:
        optimizer.step()
    for (name, a), b in zip(plain.named_parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(b - before[name], one_each(name) * (a - before[name]), rtol=1e-6, atol=1e-14)


@pytest.mark.parametrize("kind", ["AdamW", "our Adam"])
def test_a_slow_weight_still_gathers_its_moments(kind):
    """K scales the update, not the gradient: after K = 0 the optimiser's state is that of an unscaled run."""
    generator = torch.Generator().manual_seed(0)
    plain, scaled = random_stand_in(few_names()), random_stand_in(few_names())
    optimizers = [OPTIMISERS[kind](param_groups(m)) for m in (plain, scaled)]
    policies = SlowFast(optimizers[1], c1=0)
    for _ in range(5):
        random_gradients(plain, scaled, generator=generator)
        policies.observe(1.0)
        for optimizer in optimizers:
            optimizer.step()
    for (name, a), b in zip(plain.named_parameters(), scaled.parameters(), strict=True):
        assert torch.equal(a, b) == (not is_in(name, "S_I")), name
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizers[0].state[a][moment], optimizers[1].state[b][moment])


# --- nothing compounds ----------------------------------------------------------------------------------------

schedulers = torch.optim.lr_scheduler
SCHEDULERS = {
    "none": lambda o: None,
    "StepLR": lambda o: schedulers.StepLR(o, 20, 0.8),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda t: 0.99),
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


def rates_of(optimizer):
    return [float(group["lr"]) for group in optimizer.param_groups]


@pytest.mark.parametrize("policies_first", [False, True], ids=["scheduler first", "policies first"])
@pytest.mark.parametrize(
    ("kind", "tensor_rate"),
    [*((kind, False) for kind in SCHEDULERS), ("ExponentialLR", True), ("LambdaLR", True), ("ReduceLROnPlateau", True)],
)
@pytest.mark.filterwarnings("ignore:The epoch parameter:UserWarning")  # SequentialLR's, about itself
def test_over_300_updates_the_rate_reads_what_the_schedule_set(kind, policies_first, tensor_rate):
    """A twin without policies has the same rates outside of the step; inside, K is on the rate of that update."""
    model, twin_model = stand_in(few_names()), stand_in(few_names())
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
        assert_K(K, lambda name: oracle_K(name, "slowfast", first, big_R) * unscaled[name])
        assert rates_of(optimizer) == rates_of(twin), t
        if scheduler is not None:
            for s in (scheduler, twin_scheduler):
                s.step(*[loss] * (kind == "ReduceLROnPlateau"))
        assert rates_of(optimizer) == rates_of(twin), t


class Twice(torch.optim.Optimizer):
    """Like a line search, calls its closure more than once before it moves; the last gradient counts."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for _ in range(2):
            with torch.enable_grad():
                loss = closure() if closure else None
        for group in self.param_groups:
            for p in group["params"]:
                p -= group["lr"] * p.grad
        return loss


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, Adam, Twice])
@pytest.mark.parametrize("by_keyword", [False, True], ids=["step(closure)", "step(closure=)"])
def test_a_closure_reads_the_schedules_rate_and_may_observe(kind, by_keyword):
    model, twin = random_stand_in(few_names()), random_stand_in(few_names())
    optimizer, plain = (kind(param_groups(m), lr=0.25) for m in (model, twin))
    scheduler = schedulers.ExponentialLR(optimizer, 0.5)
    policies = SlowFast(optimizer, method=ONE_EACH)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    seen = []

    def closure():
        seen.append({group["lr"] for group in optimizer.param_groups})
        assert torch.is_grad_enabled()
        set_gradients(model)
        policies.observe(3.0)
        return torch.tensor(3.0)

    def plain_closure():
        set_gradients(twin)
        return torch.tensor(3.0)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = optimizer.step(closure=closure) if by_keyword else optimizer.step(closure)
        plain.step(plain_closure)
    assert result == 3.0
    assert seen and all(rates == {0.25} for rates in seen)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p - before[name], one_each(name) * (q - before[name]), rtol=1e-6, atol=1e-12)
    scheduler.step()
    assert {group["lr"] for group in optimizer.param_groups} == {0.125}


class DecaysAfterwards(torch.optim.SGD):
    """Builds on another optimiser's step: torch runs the hooks for either of the two."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p -= group["lr"] * 0.5
        return loss


@pytest.mark.parametrize("with_closure", [False, True], ids=["", "closure"])
def test_an_optimiser_that_builds_on_another_ones_step(with_closure):
    """K scales all that it does, once, and there is nothing to warn of."""
    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])  # from the first one on, torch runs hooks in SGD's step
    policies, model = policies_of(optimizer=lambda groups: DecaysAfterwards(groups, lr=1.0), method=ONE_EACH)
    set_gradients(model)
    policies.observe(1.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        policies.optimizer.step(*[lambda: 1.0] * with_closure)
    assert {group["lr"] for group in policies.optimizer.param_groups} == {1.0}
    assert_K({name: -p.item() / 1.5 for name, p in model.named_parameters()}, one_each)
    assert not caught


def test_a_closure_that_raises_leaves_the_schedules_rate():
    policies, model = policies_of(method=ONE_EACH)
    policies.observe(1.0)

    def closure():
        raise KeyError("from the closure")

    with pytest.raises(KeyError):
        policies.optimizer.step(closure)
    assert {group["lr"] for group in policies.optimizer.param_groups} == {1.0}
    policies.observe(1.0)
    assert_K(measured_K(model, policies.optimizer, 1.0), one_each)


class Fails(torch.optim.Optimizer):
    """Raises inside its first step, before anything moved; then it is SGD."""

    failed = False

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        if not self.failed:
            self.failed = True
            raise MemoryError("inside the optimiser")
        for group in self.param_groups:
            for p in group["params"]:
                p.data -= group["lr"] * p.grad


def test_hooks_of_the_users_see_the_schedules_rate():
    """Hooks that torch calls around the step, registered before and after the policies."""
    model = stand_in(few_names())
    optimizer = torch.optim.SGD(param_groups(model), lr=1.0)
    seen = []

    def look(optimizer, *_):
        seen.append({group["lr"] for group in optimizer.param_groups})

    def register():
        optimizer.register_step_pre_hook(look)
        optimizer.register_step_post_hook(look)

    register()
    policies = SlowFast(optimizer, method=ONE_EACH)
    register()
    policies.observe(1.0)
    assert_K(measured_K(model, optimizer, 1.0), one_each)
    assert seen == [{1.0}] * 4


def test_a_step_that_raised_leaves_the_schedules_rate():
    policies, _ = policies_of(optimizer=lambda groups: Fails(groups, lr=1.0), method=ONE_EACH)
    policies.observe(1.0)
    with pytest.raises(MemoryError):
        policies.optimizer.step()
    assert {group["lr"] for group in policies.optimizer.param_groups} == {1.0}


@pytest.mark.parametrize("at", ["next observe", "next step"])
def test_after_an_optimiser_that_raised_the_rate_is_put_right(at):
    policies, model = policies_of(optimizer=lambda groups: Fails(groups, lr=1.0), method=ONE_EACH)
    policies.observe(1.0)
    with pytest.raises(MemoryError):
        policies.optimizer.step()
    policies.observe(1.0)
    if at == "next step":
        assert_K(measured_K(model, policies.optimizer, 1.0), one_each)
    assert {group["lr"] for group in policies.optimizer.param_groups} == {1.0}


def test_nothing_compounds_in_a_loop_that_survives_a_raised_step():
    """The loop goes on to its chained scheduler, as `try: step() except OutOfMemoryError: skip` does."""
    policies, model = policies_of(optimizer=lambda groups: Fails(groups, lr=1.0), method=ONE_EACH)
    scheduler = schedulers.ExponentialLR(policies.optimizer, 0.5)
    policies.observe(1.0)
    with pytest.raises(MemoryError):
        policies.optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about a scheduler's step before the optimiser's
        scheduler.step()
    policies.observe(1.0)
    assert_K(measured_K(model, policies.optimizer, 0.5), one_each)
    assert {group["lr"] for group in policies.optimizer.param_groups} == {0.5}


def test_the_optimisers_checkpoint_holds_the_schedules_rate_and_may_be_loaded_mid_run():
    policies, model = policies_of(method=ONE_EACH)
    scheduler = schedulers.ExponentialLR(policies.optimizer, 0.5)
    policies.observe(1.0)
    measured_K(model, policies.optimizer, 1.0)
    scheduler.step()
    state = copy.deepcopy(policies.optimizer.state_dict())
    assert {group["lr"] for group in state["param_groups"]} == {0.5}
    policies.optimizer.load_state_dict(state)  # it makes new group dictionaries
    policies.observe(1.0)
    assert_K(measured_K(model, policies.optimizer, 0.5), one_each)
    assert {group["lr"] for group in policies.optimizer.param_groups} == {0.5}


# --- GradScaler, accumulation, groups of the user's -----------------------------------------------------------


@pytest.mark.parametrize("kind", ["SGD", "SGD fused", "AdamW", "AdamW fused", "our Adam"])
def test_grad_scaler_and_a_step_that_it_skips(kind):
    names = few_names()
    model, twin = random_stand_in(names).float(), random_stand_in(names).float()
    optimizer, plain = (OPTIMISERS[kind](param_groups(m)) for m in (model, twin))
    policies = SlowFast(optimizer, window=1, c1=0.0)
    scaler, plain_scaler = (torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in range(2))
    losses = [4.0, 3.0, 2.95, 2.9, 2.85]  # P1, P1, P2, P2 with a skipped step, P2
    for t, value in enumerate(losses, 1):
        start = [p.detach().clone() for p in model.parameters()]
        for m, o, s in ((model, optimizer, scaler), (twin, plain, plain_scaler)):
            for p, begin in zip(m.parameters(), start, strict=True):
                p.data.copy_(begin)
            loss = value + sum((p - p.detach()).sum() for p in m.parameters())  # gradients of 1
            o.zero_grad()
            s.scale(loss).backward()
            if t == 4:
                next(iter(m.parameters())).grad.fill_(math.inf)
            if o is optimizer:
                policies.observe(loss)
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message=".*observe.*")
                s.step(o)
            s.update()
        assert policies.state_dict()["losses"][-1] == pytest.approx(value), "the loss, not the scaled loss"
        first, _, big_R = oracle_curve(losses[:t], 1)
        for (name, p), q, begin in zip(model.named_parameters(), twin.parameters(), start, strict=True):
            if t == 4:
                assert torch.equal(p, begin), "a skipped step moves nothing"
            K = oracle_K(name, "slowfast", first, big_R, c1=0)
            torch.testing.assert_close(p - begin, K * (q - begin), rtol=2e-3, atol=3e-7)  # differences of float32
        assert {group["lr"] for group in optimizer.param_groups} == {RATE}
    assert scaler.get_scale() == plain_scaler.get_scale() == 512.0


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_gradient_accumulation(micro_batches):
    """With the mean over micro-batches observed once an update, the run is that of the whole batches."""
    names, generator = few_names(), torch.Generator().manual_seed(0)
    inputs = torch.randn(12, 8, len(names), generator=generator, dtype=torch.float64)  # (updates, examples, weights)
    targets = torch.randn(12, 8, generator=generator, dtype=torch.float64)

    def run(parts):
        model = stand_in(names)
        policies = SlowFast(torch.optim.SGD(param_groups(model), lr=0.002), window=1, threshold=10)
        told = []
        for x, y in zip(inputs, targets, strict=True):
            mean = 0.0
            for x_part, y_part in zip(x.chunk(parts), y.chunk(parts), strict=True):
                loss = (x_part @ torch.cat(list(model.parameters())) - y_part).square().mean() / parts
                loss.backward()
                mean += loss.detach()
            policies.observe(mean)
            policies.optimizer.step()
            policies.optimizer.zero_grad()
            told.append(policies.multipliers["S_II"])
        assert policies.updates == len(inputs)
        return torch.cat(list(model.parameters())), told

    (weights, K), (whole_weights, whole_K) = run(micro_batches), run(1)
    assert K == pytest.approx(whole_K, rel=1e-6, abs=1e-9) and len(set(whole_K)) > 2
    torch.testing.assert_close(weights, whole_weights, rtol=1e-9, atol=1e-12)


def test_groups_of_the_users_have_K_1():
    """Unnamed ones and ones of other names, there from the start or added later."""
    model, extra = stand_in(few_names()), [torch.nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(3)]
    groups = [{"params": extra[0], "lr": 0.25}, *param_groups(model), {"name": "adapter", "params": extra[1]}]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    policies = SlowFast(optimizer, method=ONE_EACH)
    optimizer.add_param_group({"params": extra[2], "lr": 0.5})
    for p in extra:
        p.grad = torch.ones_like(p)
    policies.observe(1.0)
    assert_K(measured_K(model, optimizer, 1.0), one_each)
    assert [p.item() for p in extra] == [-0.25, -1.0, -0.5]


def test_two_groups_of_one_cell_and_a_cell_added_later():
    """E.g. the biases of a cell without weight decay; layers that are unfrozen later."""
    model = stand_in(few_names())
    groups = {group["name"]: group["params"] for group in param_groups(model)}
    half = len(groups["S_II"]) // 2
    late = groups.pop("V_II")
    optimizer = torch.optim.SGD([{"name": name, "params": p} for name, p in groups.items() if name != "S_II"], lr=1.0)
    policies = SlowFast(optimizer, method=ONE_EACH)
    optimizer.add_param_group({"name": "S_II", "params": groups["S_II"][:half], "weight_decay": 0.1})
    optimizer.add_param_group({"name": "S_II", "params": groups["S_II"][half:]})
    optimizer.add_param_group({"name": "V_II", "params": late})
    policies.observe(1.0)
    assert_K(measured_K(model, optimizer, 1.0), one_each)


# --- the weight sets ------------------------------------------------------------------------------------------

REACH = {1: (1, 0), 2: (2, 1), 6: (5, 2), 12: (10, 4), 24: (20, 8)}  # depth -> layers of S_I, of which S_II


def listing(depth, frozen=()):
    """{cell: set of names}, written out from Section 3."""
    slow, key = REACH[depth]
    cells = {
        "S_II": {name for n in range(key) for name in layer(n, FEED_FORWARD)},
        "S_I-S_II": {name for n in range(key) for name in layer(n, ATTENTION)}
        | {name for n in range(key, slow) for name in layer(n)},
        "V_II": {name for n in range(slow, depth) for name in layer(n, ATTENTION)},
        "V_I-V_II": {name for n in range(slow, depth) for name in layer(n, FEED_FORWARD)},
        "rest": set(EMBEDDINGS) | set(HEAD),
    }
    return {cell: names - set(frozen) for cell, names in cells.items() if names - set(frozen)}


def grouped_names(model, prefix="roberta."):
    """{group: set of names without the encoder's prefix}; each parameter at most once."""
    names = {id(p): name.removeprefix(prefix) for name, p in model.named_parameters()}
    groups = {group["name"]: [names[id(p)] for p in group["params"]] for group in param_groups(model)}
    assert len(set().union(*groups.values())) == sum(map(len, groups.values()))
    return {cell: set(group) for cell, group in groups.items()}


@pytest.mark.parametrize("depth", REACH)
def test_the_cells_of_our_model(depth):
    config = Config(vocab_size=20, hidden_size=4, num_hidden_layers=depth, num_attention_heads=2, intermediate_size=8,
                    max_position_embeddings=10)  # fmt: skip
    model = SequenceClassifier(config)
    assert grouped_names(model) == listing(depth)


@pytest.mark.parametrize("prefix", ["", "roberta.", "bert.", "module.", "module.roberta.", "_orig_mod.bert.", "my.own."])
@pytest.mark.parametrize("depth", [12, 24])
def test_the_cells_under_any_prefix(prefix, depth):
    encoder = EMBEDDINGS + [name for n in range(depth) for name in layer(n)]
    model = stand_in([prefix + name for name in encoder] + HEAD)
    assert grouped_names(model, prefix) == listing(depth)


def test_the_order_in_which_parameters_are_declared_does_not_matter():
    names = xlmr_names()
    assert grouped_names(stand_in(names[::-1])) == grouped_names(stand_in(names)) == listing(12)


@pytest.mark.parametrize(
    "frozen",
    [
        EMBEDDINGS,
        [name for n in range(4) for name in layer(n)],
        [name for n in range(6) for name in layer(n, FEED_FORWARD)],
        [name for n in (0, 1, 2, 10, 11) for name in layer(n)] + EMBEDDINGS + HEAD,
    ],
    ids=["embeddings", "lowest four", "feed-forward of six", "leaves S_I alone"],
)
def test_frozen_parameters_are_left_out_and_move_no_set(frozen):
    model = stand_in(xlmr_names())
    for name, p in model.named_parameters():
        p.requires_grad_(name.removeprefix("roberta.") not in frozen)
    assert grouped_names(model) == listing(12, frozen)


def test_nothing_to_train_raises():
    model = stand_in(few_names()).requires_grad_(False)
    with pytest.raises(ValueError, match="require"):
        param_groups(model)


@pytest.mark.parametrize(
    ("names", "saw"),
    [
        (["conv1.weight", "layer1.0.conv1.weight", "fc.bias"], ["layer1.0.conv1.weight", "encoder.layer"]),
        (["albert.encoder.albert_layer_groups.0.albert_layers.0.attention.query.weight"], ["albert_layer_groups"]),
        (["transformer.layer.0.attention.q_lin.weight"], ["transformer.layer.0.attention.q_lin.weight"]),
        (["encoder.layers.0.attention.q_proj.weight"], ["encoder.layers.0"]),
        (["myencoder.layer.0.attention.self.query.weight"], ["myencoder.layer.0"]),
        ([], ["none"]),
        (layer(0) + layer(2), ["[0, 2]", "hole"]),
        (layer(1) + layer(2), ["[1, 2]"]),
        ([f"{at}.{name}" for at in ("left", "right") for name in layer(0)], ["left.encoder.layer", "right.encoder.layer"]),
        (layer(0) + ["encoder.layer.1.adapter.down.weight"], ["encoder.layer.1.adapter.down.weight"]),
        (layer(0) + ["encoder.layer.0.crossattention.self.query.weight"], ["crossattention"]),
        (layer(0) + ["encoder.layer.0.layernorm_before.weight"], ["layernorm_before"]),
    ],
    ids=["ResNet", "ALBERT", "DistilBERT", "ViT's layers", "a name that only ends so", "no parameter", "hole", "from 1", "two towers",
         "adapter", "decoder", "pre-norm"],
)  # fmt: skip
def test_a_model_without_the_sets_raises_and_names_what_it_saw(names, saw):
    with pytest.raises(ValueError) as e:
        param_groups(stand_in(names))
    assert all(text in str(e.value) for text in saw), e.value


# --- Adam -----------------------------------------------------------------------------------------------------

SHAPES = [(7, 5), (5,), (), (1,), (0, 3), (2, 3, 4), (300,)]


def twins(shapes, dtype, device):
    generator = torch.Generator().manual_seed(1)
    start = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [[torch.nn.Parameter(x.to(device, dtype, copy=True)) for x in start] for _ in range(2)]


def give_gradients(parameters, t, missing=0.0):
    """The same for both twins: of very different sizes; some are missing, some are 0."""
    generator = torch.Generator().manual_seed(t)
    for pair in zip(*parameters, strict=True):
        gradient = torch.randn(pair[0].shape, generator=generator, dtype=torch.float64)
        gradient *= 10 ** (4 * torch.rand((), generator=generator) - 3)
        gone = torch.rand((), generator=generator) < missing
        for p in pair:
            p.grad = None if gone else gradient.to(p)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("missing", [0.0, 0.3], ids=["", "gradients that are missing at times"])
@pytest.mark.parametrize(
    "betas_and_eps", [((0.9, 0.999), 1e-8), ((0.8, 0.95), 1e-3), ((0.0, 0.5), 1e-6), ((0.9, 0.999), 0.0)], ids=str
)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.float64, 1e-12)], ids=["float32", "float64"]
)
def test_adam_agrees_with_torchs_over_350_updates(dtype, tolerance, betas_and_eps, missing, device):
    """At a rate that changes from update to update."""
    betas, eps = betas_and_eps
    ours, theirs = parameters = twins(SHAPES, dtype, device)
    adam = Adam(ours, lr=1.0, betas=betas, eps=eps)
    oracle = torch.optim.Adam(theirs, lr=1.0, betas=betas, eps=eps, foreach=False)
    begin = [p.detach().clone() for p in ours]
    for t in range(350):
        for optimizer in (adam, oracle):
            optimizer.param_groups[0]["lr"] = 1e-2 * (1 + math.cos(t / 20)) / 2
        give_gradients(parameters, t, missing)
        adam.step()
        oracle.step()
    for p, q, b in zip(ours, theirs, begin, strict=True):
        assert p.dtype == dtype
        # float32 rounds each of 350 additions to a weight of about 1: an error of some 1e-6
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
        assert p.numel() == 0 or (p - b).abs().max() > 0.01
    for name in ("exp_avg", "exp_avg_sq"):
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(adam.state[p][name], oracle.state[q][name], rtol=10 * tolerance, atol=tolerance)


def test_adam_takes_groups_of_their_own_rates_and_tensors_of_any_layout():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    pairs = [[torch.nn.Parameter(start.clone().t()), torch.nn.Parameter(start.clone()[::2])] for _ in range(2)]
    rate = torch.tensor(0.1, dtype=torch.float64)
    groups = [[{"params": p[0], "lr": rate}, {"params": p[1], "betas": (0.5, 0.9), "eps": 1e-4}] for p in pairs]
    ours, theirs = Adam(groups[0], lr=0.01), torch.optim.Adam(groups[1], lr=0.01, foreach=False)
    for t in range(20):
        give_gradients(pairs, t)
        ours.step()
        theirs.step()
    for p, q in zip(*pairs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
def test_adam_goes_on_bit_for_bit_from_a_saved_state(device):
    """Through torch.save and a safe torch.load."""
    ours, copies = parameters = twins(SHAPES, torch.float32, device)
    whole, part = Adam(ours, lr=1e-2), Adam(copies, lr=1e-2)
    for t in range(40):
        if t == 17:
            file = io.BytesIO()
            torch.save({"optimizer": part.state_dict(), "weights": [p.detach() for p in copies]}, file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
            copies[:] = [torch.nn.Parameter(w) for w in saved["weights"]]
            part = Adam(copies, lr=123.0, betas=(0.1, 0.2))
            part.load_state_dict(saved["optimizer"])
        give_gradients(parameters, t, missing=0.2)
        whole.step()
        part.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, copies, strict=True))


def test_adam_leaves_rows_without_a_gradient_where_they_are():
    """Rows of an embedding that no example contains: their gradient is 0."""
    table = torch.nn.Embedding(50, 8)
    before = table.weight.detach().clone()
    adam = Adam(table.parameters(), lr=0.1)
    for _ in range(30):
        adam.zero_grad()
        table(torch.tensor([3, 7, 7])).square().sum().backward()
        adam.step()
    moved = (table.weight != before).any(dim=1)
    assert moved.nonzero().flatten().tolist() == [3, 7]


def test_adam_runs_a_closure_with_gradients_on():
    p = torch.nn.Parameter(torch.tensor([2.0]))
    adam = Adam([p], lr=0.5)

    def closure():
        adam.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert adam.step(closure) == 4.0
    assert p.item() == pytest.approx(1.5)  # the first update of Adam is the rate times the gradient's sign
    assert not adam.state_dict()["state"][0]["exp_avg"].requires_grad


def test_adam_without_gradients_does_nothing():
    p = torch.nn.Parameter(torch.ones(3))
    adam = Adam([p])
    assert adam.step() is None
    assert torch.equal(p, torch.ones(3)) and not adam.state


@pytest.mark.parametrize(
    "wrong",
    [{"lr": -1e-6}, {"lr": math.nan}, {"eps": -1e-8}, {"eps": math.nan}, {"betas": (1.0, 0.999)}, {"betas": (0.9, -0.1)},
     {"betas": (math.nan, 0.9)}],
    ids=str,
)  # fmt: skip
def test_adam_refuses_values_out_of_range(wrong):
    with pytest.raises(ValueError):
        Adam([torch.nn.Parameter(torch.ones(1))], **wrong)


@pytest.mark.parametrize("dense_first", [False, True])
def test_adam_refuses_sparse_gradients(dense_first):
    table = torch.nn.Embedding(5, 2, sparse=True)
    adam = Adam(table.parameters())
    if dense_first:
        table.weight.grad = torch.ones_like(table.weight)
        adam.step()
        adam.zero_grad()
    before = table.weight.detach().clone()
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="[Ss]parse"):
        adam.step()
    assert torch.equal(table.weight, before)


# --- the schedule ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("total", "warmup"), [(100, 0.1), (20, 0.0), (10, 1.0), (7, 0.5), (1, 0.1)])
def test_warmup_then_decay(total, warmup):
    """A straight line from 0 up to 1, and one down to 0 at the end; 0 from there on."""
    factor = warmup_then_decay(total, warmup)
    top = round(total * warmup)
    x, y = ([0, top, total], [0, 1, 0]) if 0 < top < total else ([0, total], [1, 0] if top == 0 else [0, 1])
    values = [factor(t) for t in range(total)]
    assert values == pytest.approx(np.interp(range(total), x, y))
    assert [factor(t) for t in (total, total + 1, 2 * total)] == [0, 0, 0]


# --- what a method does before the first update ---------------------------------------------------------------


def changed_by(method):
    """(names of the parameters whose value changed, names of those that train)."""
    model = random_stand_in(xlmr_names())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.manual_seed(0)
    prepare(model, METHODS[method])
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    return changed, {name for name, p in model.named_parameters() if p.requires_grad}


def of_layers(layers, blocks=(ATT, FFN)):
    names = [name for name in xlmr_names() if block_of(name) is not None]
    return {name for name in names if block_of(name)[0] in layers and block_of(name)[1] in blocks}


@pytest.mark.parametrize("method", ["df", *WITH_K])
def test_these_methods_change_nothing_at_the_start(method):
    assert changed_by(method) == (set(), set(xlmr_names()))


FROZEN = {
    "freeze-4": of_layers(range(4)),
    "freeze-4-attention": of_layers(range(4), (ATT,)),
    "freeze-4-ffn": of_layers(range(4), (FFN,)),
    **{f"freeze-layer-{i}": of_layers([i]) for i in range(12)},
    **{f"last-{k}": set(xlmr_names()) - of_layers(range(12 - k, 12)) - set(HEAD) for k in (1, 2, 3)},
}


@pytest.mark.parametrize("method", FROZEN)
def test_what_freeze_and_last_train(method):
    assert changed_by(method) == (set(), set(xlmr_names()) - FROZEN[method])


ANEW = {
    "reinit-4": of_layers(range(4)),
    "reinit-4-attention": of_layers(range(4), (ATT,)),
    "reinit-4-ffn": of_layers(range(4), (FFN,)),
    **{f"reinit-layer-{i}": of_layers([i]) for i in range(12)},
}


@pytest.mark.parametrize("method", ANEW)
def test_what_reinit_changes(method):
    assert changed_by(method) == (ANEW[method], set(xlmr_names()))


def test_reinit_draws_berts_initialisation():
    """N(0, 0.02) matrices, each its own and seeded; zero biases; LayerNorm 1 and 0."""
    models = [random_stand_in([f"roberta.{name}" for name in layer(0)] + HEAD, matrix=(150, 100)) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        torch.manual_seed(seed)
        prepare(model, METHODS["reinit-layer-0"])
    matrices = []
    for (name, p), same, other in zip(models[0].named_parameters(), *(m.parameters() for m in models[1:]), strict=True):
        if "layer" not in name.split("."):
            continue
        assert torch.equal(p, same)
        if name.endswith("bias"):
            assert not p.any(), name
        elif "LayerNorm" in name:
            assert (p == 1).all(), name
        else:
            assert not torch.equal(p, other)
            assert abs(p.mean()) < 5 * 0.02 / math.sqrt(p.numel())
            assert p.std().item() == pytest.approx(0.02, rel=0.03)
            assert p.abs().max() > 0.06  # a normal distribution's tail; a uniform one would end at 0.035
            matrices.append(p.detach())
    assert len(matrices) == 6 and not torch.equal(matrices[0], matrices[1])


def test_noisytune():
    """Uniform noise within 0.075 standard deviations of each pre-trained tensor, vectors too; none for the head."""
    names = [*EMBEDDINGS, *layer(0), "encoder.layer.1.attention.self.query.bias", *HEAD]
    models = [random_stand_in(names, matrix=(200, 100)) for _ in range(3)]
    for model in models:
        for p in model.parameters():
            p.data[::3] *= 5  # so that deviations differ
        one = model.encoder._modules["layer"]._modules["1"].attention._modules["self"].query
        one.bias = torch.nn.Parameter(torch.tensor([0.7], dtype=torch.float64))
    before = {name: p.detach().clone() for name, p in models[0].named_parameters()}
    for model, seed in zip(models, (1, 1, 2), strict=True):
        torch.manual_seed(seed)
        prepare(model, METHODS["noisytune"])
    for (name, p), same, other in zip(models[0].named_parameters(), *(m.parameters() for m in models[1:]), strict=True):
        assert torch.equal(p, same) and p.requires_grad
        noise = (p.detach() - before[name]).flatten()
        if name in HEAD or noise.numel() == 1:
            assert not noise.any(), name
            continue
        assert not torch.equal(p, other)
        relative = noise / np.std(before[name].numpy(), ddof=1)
        n = relative.numel()
        spread = 0.15 / math.sqrt(12)  # of a uniform distribution of width 0.15
        assert relative.abs().max() <= 0.075 * (1 + 1e-9), name
        assert relative.abs().max() > 0.075 * (1 - 20 / n), name
        assert abs(relative.mean()) < 5 * spread / math.sqrt(n), name
        assert relative.std().item() == pytest.approx(spread, rel=5 / math.sqrt(n)), name
        # every number is drawn by itself: neighbours do not go together
        assert abs(np.corrcoef(relative[:-1], relative[1:])[0, 1]) < 6 / math.sqrt(n), name


@pytest.mark.parametrize(
    ("method", "depth"), [("freeze-layer-6", 6), ("reinit-layer-12", 12), ("freeze-layer-23", 12), ("reinit-layer-1", 1)]
)
def test_a_layer_that_is_not_there_raises(method, depth):
    with pytest.raises(ValueError, match=rf"layer {method.rpartition('-')[2]}\b"):
        prepare(stand_in(xlmr_names(depth)), METHODS[method])


def test_the_table_has_every_method():
    assert {*WITHOUT_K, *WITH_K} <= set(METHODS)


def test_frozen_layers_leave_the_optimiser_and_the_others_keep_their_K():
    model = stand_in(xlmr_names())
    prepare(model, METHODS["freeze-4-ffn"])
    assert grouped_names(model) == listing(12, [name for n in range(4) for name in layer(n, FEED_FORWARD)])


# --- the file ------------------------------------------------------------------------------------------------


def test_what_stands_above_the_line_imports_torch_and_the_standard_library_alone():
    """Also within functions."""
    above, line, below = (ROOT / "slowfast.py").read_text(encoding="utf-8").partition("# ===== If you copied this file")
    assert line and "def main" in below and "def main" not in above
    imported = set()
    for node in ast.walk(ast.parse(above)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").partition(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"torch"}
