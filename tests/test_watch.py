"""Watching: the loss of each update, in other people's loops. `SlowFast(optimizer, watch=...)` is given nothing else.

The oracle of every situation is written apart from hooks: the loop, or the method of theirs that the test overrides,
computes each micro-batch's loss anew, or notes it, and the test means them as the loop's own gradient does.
"""

import collections
import contextlib
import copy
import gc
import importlib.util
import io
import json
import os
import subprocess
import sys
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

import slowfast
from slowfast import SlowFast

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.filterwarnings("error:.*observe")


class Net(torch.nn.Module):
    """Ten numbers in, three classes out; returns what `returns` makes of the loss and the logits."""

    def __init__(self, returns=lambda loss, logits: {"loss": loss, "logits": logits}):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.returns = torch.nn.Linear(10, 6), torch.nn.Linear(6, 3), returns

    def forward(self, x, y):
        logits = self.head(self.body(x).tanh())
        return self.returns(cross_entropy(logits, y), logits)


def groups(model):
    """The body is S_II: in P1 its K is c1."""
    body = [p for name, p in model.named_parameters() if "head" not in name]
    return [
        {"name": "S_II", "params": body},
        {"name": "rest", "params": [p for name, p in model.named_parameters() if "head" in name]},
    ]


def sgd_of(model, lr=0.5):
    return torch.optim.SGD(groups(model), lr=lr)


def batches(n=8):
    """[(x (4, 10), y (4,)), ...]: each of a distribution of its own, so that no two losses are the same."""
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(4, 10, generator=generator) * (1 + i % 3), torch.randint(0, 3, (4,), generator=generator))
        for i in range(n)
    ]


def seen(policies):
    return list(policies.curve.losses)


def close(losses):
    assert losses and len(set(losses)) == len(losses)
    return pytest.approx(losses, rel=1e-5)


def mean(parts):
    return sum(parts) / len(parts)


# --- loops of one's own: each does its updates with a net and returns what their losses were ------------------


def plain(net, optimizer):
    """With evaluations before the backward pass, after it, and after the step; with and without gradients."""
    losses = []
    for x, y in batches():
        loss = net(x, y)["loss"]
        with torch.no_grad():
            net(-x, y)
        net(3 * x, y)
        loss.backward()
        net(2 * x, y)["loss"] + 1
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        with torch.inference_mode():
            net(4 * x, y)
    return losses


def accumulated(shares, zero_first=False, scale=1.0):
    def loop(net, optimizer):
        losses, each = [], iter(batches(3 * len(shares)))
        for _ in range(3):
            parts = []
            if zero_first:
                optimizer.zero_grad()
            for share in shares:
                loss = net(*next(each))["loss"]
                (scale * share * loss).backward()
                parts.append(share * loss.item())
            losses.append(sum(parts) / sum(shares))
            optimizer.step()
            if not zero_first:
                optimizer.zero_grad()
        return losses

    return loop


def two_in_one_backward(net, optimizer):
    """R-drop: the batch twice, and how far the two answers are apart, which is no loss of the model's."""
    losses = []
    for x, y in batches():
        once, again = net(x, y), net(x + 0.1, y)
        apart = (once["logits"] - again["logits"]).square().mean()
        ((once["loss"] + again["loss"]) / 2 + apart).backward()
        losses.append(mean([once["loss"].item(), again["loss"].item()]))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def closure(net, optimizer):
    losses = []
    for x, y in batches():

        def evaluate(x=x, y=y):
            optimizer.zero_grad()
            loss = net(x, y)["loss"]
            loss.backward()
            losses.append(loss.item())
            return loss

        assert optimizer.step(evaluate).item() == losses[-1]
    return losses


def by_hand_too(net, optimizer):
    """`observe` of what this loop calls its loss, in every other update, beside the watch."""
    losses = []
    for i, (x, y) in enumerate(batches()):
        loss = net(x, y)["loss"]
        loss.backward()
        losses.append(loss.item() + i)
        if i % 2:
            optimizer.policies.observe(losses[-1])
        else:
            losses[-1] = loss.item()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def by_hand_before(net, optimizer):
    """The same, observed before the backward pass."""
    losses = []
    for x, y in batches():
        loss = net(x, y)["loss"]
        losses.append(2 * loss.item())
        optimizer.policies.observe(losses[-1])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def adversarial(net, optimizer):
    """An attack differentiates the loss by the inputs; that is no part of the update's loss."""
    losses = []
    for x, y in batches():
        x.requires_grad_()
        for _ in range(2):
            (g,) = torch.autograd.grad(net(x, y)["loss"], x)
            x = (x + 0.1 * g.sign()).detach().requires_grad_()
        loss = net(x, y)["loss"]
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def checkpointed(reentrant):
    def loop(net, optimizer):
        """The forward pass is done again in the backward pass."""
        losses = []
        for x, y in batches():
            again = torch.utils.checkpoint.checkpoint(
                lambda x, y: net(x, y)["loss"], x.requires_grad_(), y, use_reentrant=reentrant
            )
            again.backward()
            losses.append(again.item())
            optimizer.step()
            optimizer.zero_grad()
        return losses

    return loop


class Broken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        raise MemoryError


def out_of_memory(net, optimizer):
    """Every other batch breaks off in its backward pass and is left out."""
    losses = []
    for i, (x, y) in enumerate(batches()):
        forward = net.body.forward
        if i % 2:
            net.body.forward = lambda x, forward=forward: Broken.apply(forward(x))
        loss = net(x, y)["loss"]
        net.body.forward = forward
        try:
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        except MemoryError:
            assert i % 2
        optimizer.zero_grad()
    return losses


def masked(net, optimizer):
    """Every other batch counts for nothing, and yet all of its weights have a gradient, of 0, as DDP asks for."""
    losses = []
    for i, (x, y) in enumerate(batches()):
        loss = net(x, y)["loss"]
        (loss * (i % 2)).backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def gradient_penalty(net, optimizer):
    """Differentiated twice, once to look at the gradient."""
    losses = []
    for x, y in batches():
        loss = net(x, y)["loss"]
        (g,) = torch.autograd.grad(loss, net.body.bias, create_graph=True)
        (loss + g.square().sum()).backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


LOOPS = {
    "plain": plain,
    "accumulation, divided": accumulated([0.25] * 4),
    "accumulation, not divided": accumulated([1.0] * 4),
    "accumulation by the number of examples": accumulated([0.5, 0.3, 0.2]),
    "accumulation, zero_grad first": accumulated([0.25] * 4, zero_first=True),
    "a loss scale": accumulated([0.5] * 2, scale=1024.0),
    "two losses in one backward pass": two_in_one_backward,
    "a closure": closure,
    "observe beside it": by_hand_too,
    "observe before it": by_hand_before,
    "a gradient penalty": gradient_penalty,
    "an attack on the inputs": adversarial,
    "checkpointing": checkpointed(False),
    "checkpointing, reentrant": checkpointed(True),
    "out of memory": out_of_memory,
    "a batch that counts for nothing": masked,
}


@pytest.mark.parametrize("loop", LOOPS)
def test_a_loop_of_ones_own(loop):
    """Watched, the losses are right and the updates are K's: those of a loop at rates that are multiplied by hand."""
    net = Net()
    optimizer = sgd_of(net)
    optimizer.policies = policies = SlowFast(optimizer, watch=net, c1=0.5)
    losses = LOOPS[loop](net, optimizer)
    assert seen(policies) == close(losses)
    if "observe" not in loop:
        twin = Net()
        by_hand = sgd_of(twin)
        by_hand.param_groups[0]["lr"] *= 0.5
        LOOPS[loop](twin, by_hand)
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters()))


Named = collections.namedtuple("Named", ["logits", "loss"])
RETURNS = {
    "a tuple": (lambda loss, logits: (loss, logits), lambda out: out[0]),
    "a tensor": (lambda loss, logits: loss, lambda out: out),
    "a vector, as of DataParallel": (lambda loss, logits: {"loss": loss.expand(2) * 1}, lambda out: out["loss"].mean()),
    "an object": (lambda loss, logits: type("Output", (), {"loss": loss})(), lambda out: out.loss),
    "a namedtuple": (lambda loss, logits: Named(logits, loss), lambda out: out.loss),
    "the logits first": (lambda loss, logits: {"logits": logits, "loss": loss}, lambda out: out["loss"]),
}


@pytest.mark.parametrize("kind", RETURNS)
def test_what_a_model_returns(kind):
    returns, loss_of = RETURNS[kind]
    net, losses = Net(returns), []
    optimizer = sgd_of(net)
    policies = SlowFast(optimizer, watch=net)
    for x, y in batches():
        loss = loss_of(net(x, y))
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert seen(policies) == close(losses)


def zero_by_hand(net, optimizer):
    for p in net.parameters():
        p.grad = None


ZERO = {
    "set to None": lambda net, optimizer: optimizer.zero_grad(),
    "zeros": lambda net, optimizer: optimizer.zero_grad(set_to_none=False),
    "the model's": lambda net, optimizer: net.zero_grad(),
    "the model's zeros": lambda net, optimizer: net.zero_grad(set_to_none=False),
    "by hand": zero_by_hand,
}


@pytest.mark.parametrize("zero", ZERO)
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_and_steps_that_it_skips(fused, zero, passes):
    """Two of the updates, one after the other, overflow: their losses join no mean. In 1 or 2 micro-batches."""
    net, losses, skipped = Net(), [], (2, 3)
    optimizer = torch.optim.SGD(groups(net), lr=0.5, fused=fused)  # which leaves itself out
    policies, scaler = SlowFast(optimizer, watch=net), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    each = iter(batches(7 * passes))
    for t in range(7):
        parts = []
        for i in range(passes):
            loss = net(*next(each))["loss"]
            scaler.scale(loss / passes).backward()
            parts.append(loss.item())
            if t in skipped and i == 0:
                net.head.bias.grad[0] = torch.inf
        if t not in skipped:
            losses.append(mean(parts))
        before = [p.detach().clone() for p in net.parameters()]
        scaler.step(optimizer)
        scaler.update()
        assert all(map(torch.equal, before, net.parameters())) == (t in skipped)
        ZERO[zero](net, optimizer)
    assert len(losses) == 5 and seen(policies) == close(losses)


def test_the_closure_of_lbfgs():
    """L_t is the loss at the weights of before the step, the search's other evaluations are none; K is in force."""
    net, twin, losses, evaluations = Net(), Net(), [], []
    x, y = torch.cat([x for x, _ in batches()]), torch.cat([y for _, y in batches()])

    def run(net, optimizer):
        def evaluate():
            optimizer.zero_grad()
            loss = net(x, y)["loss"]
            loss.backward()
            evaluations.append(loss.item())
            return loss

        for _ in range(5):
            before = len(evaluations)
            optimizer.step(evaluate)
            losses.append(evaluations[before])
            assert len(evaluations) > before + 2

    by_hand = torch.optim.LBFGS(twin.parameters(), lr=0.01, max_iter=4)
    optimizer = torch.optim.LBFGS([{"name": "S_II", "params": net.parameters()}], lr=0.1, max_iter=4)
    policies = SlowFast(optimizer, c1=0.1, watch=net)
    run(net, optimizer)
    assert seen(policies) == close(losses)
    run(twin, by_hand)
    assert losses[:5] == pytest.approx(losses[5:], rel=1e-5)
    for a, b in zip(net.parameters(), twin.parameters()):
        torch.testing.assert_close(a, b)


# --- what cannot be right raises ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "missed", ["logits alone", "another loss", "no gradient", "gradients of one's own", "a second step"]
)
def test_a_step_for_which_no_loss_was_seen_raises(missed):
    net = Net()
    optimizer = sgd_of(net)
    policies = SlowFast(optimizer, watch=net)
    (x, y), *_ = batches()
    out = net(x, y)
    if missed == "a second step":
        out["loss"].backward()
        optimizer.step()
    elif missed == "gradients of one's own":
        for p, g in zip(net.parameters(), torch.autograd.grad(out["loss"], list(net.parameters()))):
            p.grad = g
    elif missed == "no gradient":
        for p in net.parameters():
            p.grad = torch.ones_like(p)
    else:
        net.returns = lambda loss, logits: {"logits": logits} if missed == "logits alone" else (loss, logits)
        out = net(x, y)
        cross_entropy(out["logits"] if missed == "logits alone" else out[1], y, weight=torch.ones(3)).backward()
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(RuntimeError, match=r"no loss was differentiated.*watch.*criterion.*observe"):
        optimizer.step()
    assert all(map(torch.equal, before, net.parameters()))
    policies.observe(0.7)  # which is what the message says one can do
    optimizer.step()
    assert seen(policies)[-1] == 0.7 and not all(map(torch.equal, before, net.parameters()))


@pytest.mark.parametrize("buffer", ["a sum of the tasks' gradients", "a buffer of clipped ones"])
def test_gradients_of_several_losses_put_together_by_hand_raise(buffer):
    """PCGrad and DP-SGD: what was seen last is one loss of several."""
    net = Net()
    optimizer = sgd_of(net)
    policies = SlowFast(optimizer, watch=net)
    for t, (x, y) in enumerate(batches(3)):
        total = [torch.zeros_like(p) for p in net.parameters()]
        for i in range(4):
            optimizer.zero_grad()
            net(x[i : i + 1], y[i : i + 1])["loss"].backward()
            if buffer == "a buffer of clipped ones":
                torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            total = [b + p.grad / 4 for b, p in zip(total, net.parameters())]
        for p, b in zip(net.parameters(), total):
            p.grad = b
        with pytest.raises(RuntimeError, match=r"put together by hand: call policies.observe"):
            optimizer.step()
        policies.observe(0.7 + t)
        optimizer.step()
    assert seen(policies) == [0.7, 1.7, 2.7]


class Divided(torch.nn.CrossEntropyLoss):
    """What divides a sum itself is a mean."""

    def forward(self, logits, y):
        return super().forward(logits, y) / len(y)


def test_what_returns_a_sum_or_is_no_module_is_not_watched():
    net = Net()
    optimizer = sgd_of(net)
    for criterion in (torch.nn.CrossEntropyLoss(reduction="sum"), cross_entropy, net.forward):
        with pytest.raises(ValueError, match="watch a module that returns a mean loss"):
            SlowFast(optimizer, watch=criterion)
    criterion, losses = Divided(reduction="sum"), []
    policies = SlowFast(optimizer, watch=criterion)  # nothing was put on it before
    for x, y in batches():
        loss = criterion(net(x, y)["logits"], y)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert seen(policies) == close(losses)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_a_weight_moves(bad):
    net = Net()
    optimizer = sgd_of(net)
    policies = SlowFast(optimizer, watch=net)
    for i, (x, y) in enumerate(batches(4)):
        if i == 2:
            net.returns = lambda loss, logits: {"loss": loss + torch.tensor(bad)}
        net(x, y)["loss"].backward()
        before = [p.detach().clone() for p in net.parameters()]
        if i == 2:
            with pytest.raises(FloatingPointError, match="update 3"):
                optimizer.step()
            assert all(map(torch.equal, before, net.parameters())) and len(seen(policies)) == 2
            break
        optimizer.step()
        optimizer.zero_grad()


# --- copies, and off again ------------------------------------------------------------------------------------


def saved(net):
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


class Plain(Net):
    """One that pickles."""

    def __init__(self):
        super().__init__()
        del self.returns

    def returns(self, loss, logits):
        return {"loss": loss, "logits": logits}


@pytest.mark.parametrize("make_copy", [copy.deepcopy, copy.copy, saved])
def test_a_copy_of_what_is_watched_is_not_watched(make_copy):
    """(A shallow copy shares its hooks with the original: what it returns is a loss of the same weights.)"""
    net, losses = Plain(), []
    optimizer = sgd_of(net)
    policies = SlowFast(optimizer, watch=net)
    for x, y in batches(4):
        if make_copy is not copy.copy:
            make_copy(net)(3 * x, y)["loss"].backward()
        loss = make_copy(net)(x, y)["loss"] if make_copy is copy.copy else net(x, y)["loss"]
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert seen(policies) == close(losses)


def hooks_of(net):
    return [len(hooks) for m in net.modules() for name, hooks in vars(m).items() if name.endswith("hooks")]


def test_detach_takes_everything_off():
    net = Net()
    optimizer = sgd_of(net)
    hooks, attributes = hooks_of(net), set(vars(optimizer))
    at_first = copy.deepcopy(optimizer.state_dict())
    policies = SlowFast(optimizer, watch=net)
    assert hooks_of(net) != hooks
    plain(net, optimizer)
    before = seen(policies)
    policies.detach()
    assert hooks_of(net) == hooks and "step" not in set(vars(optimizer)) - attributes
    optimizer.load_state_dict(optimizer.state_dict())
    assert set(optimizer.state_dict()) == set(at_first)
    twin = copy.deepcopy(net)
    plain(net, optimizer)  # with no K
    plain(twin, sgd_of(twin))
    assert seen(policies) == before and len(before) == 8
    assert all(map(torch.equal, net.parameters(), twin.parameters()))
    again = SlowFast(optimizer, watch=net)
    assert close(plain(net, optimizer)) == seen(again)


def test_an_optimiser_made_anew_takes_the_watch_over():
    """A notebook's cell run again, Lightning's next fit: the former one is let go, and says so if it is stepped."""
    net = Net()
    optimizer = sgd_of(net)
    hooks = hooks_of(net)
    first = SlowFast(optimizer, watch=net)
    watched = hooks_of(net)
    plain(net, optimizer)
    again = sgd_of(net)
    second = SlowFast(again, watch=net)
    assert plain(net, again) == pytest.approx(seen(second), rel=1e-5)
    assert hooks_of(net) == watched and len(seen(first)) == len(seen(second)) == 8
    (x, y), *_ = batches()
    net(x, y)["loss"].backward()
    with pytest.raises(RuntimeError, match=r"no loss was differentiated.*watch"):
        optimizer.step()
    lifetime = weakref.ref(optimizer)
    del optimizer, first
    gc.collect()
    assert lifetime() is None
    second.detach()
    assert hooks_of(net) == hooks


def test_two_optimisers_of_one_model_watch_it_both():
    net, losses = Net(), []
    both = [torch.optim.SGD([group], lr=0.5) for group in groups(net)]
    policies = [SlowFast(optimizer, watch=net, method="df") for optimizer in both]
    for x, y in batches():
        loss = net(x, y)["loss"]
        loss.backward()
        losses.append(loss.item())
        for optimizer in both:
            optimizer.step()
            optimizer.zero_grad()
    assert [seen(p) for p in policies] == [close(losses)] * 2


# --- torch.compile --------------------------------------------------------------------------------------------


def inner_layers(net):
    net.body = torch.compile(net.body, backend="eager")
    return net, net


def within_a_function(net):
    return torch.compile(lambda x, y: net(x, y), backend="eager"), net


def in_place(net):
    net.compile(backend="eager")
    return net, net


def outer(watched):
    def make(net):
        compiled = torch.compile(net, backend="aot_eager")
        return compiled, net if watched == "inner" else compiled

    return make


COMPILED = {"outer": outer("outer"), "outer, inner watched": outer("inner"), "in place": in_place,
            "inner layers": inner_layers, "within a function": within_a_function}  # fmt: skip


@pytest.mark.parametrize("watch_first", [True, False])
@pytest.mark.parametrize("kind", COMPILED)
def test_compiled_models(kind, watch_first):
    """Also one that had run before it was watched."""
    torch.compiler.reset()
    net = Net()
    model, target = COMPILED[kind](net)
    optimizer = sgd_of(net)
    if not watch_first:
        model(*batches()[0])["loss"].backward()
        optimizer.zero_grad()
    policies = SlowFast(optimizer, watch=target)
    if kind == "within a function" and not watch_first:  # the compiler looks for new hooks of models alone
        with pytest.raises(RuntimeError, match="no loss was differentiated"):
            plain(model, optimizer)
        return
    assert close(plain(model, optimizer)) == seen(policies)
    assert close(accumulated([0.5] * 2)(model, optimizer)) == seen(policies)[-3:]


# --- several processes ----------------------------------------------------------------------------------------


def of_a_net(kind, rank):
    """What was seen, and [(sum, count) of each micro-batch of this rank] of each update."""
    net, mesh = Net(), torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    if "FSDP2" in kind:
        for module in (net.body, net):
            torch.distributed.fsdp.fully_shard(module, mesh=mesh)
        model = net
    else:
        model = torch.nn.parallel.DistributedDataParallel(net)
    optimizer = sgd_of(net)
    policies = SlowFast(optimizer, watch=model if kind == "DDP" else net)
    parts, each = [], iter(batches(24)[rank::2])
    for _ in range(4):
        parts.append([])
        for i in range(3):
            if "FSDP2" in kind:
                model.set_requires_gradient_sync(i == 2)
            with model.no_sync() if "DDP" in kind and i < 2 else contextlib.nullcontext():
                loss = model(*next(each))["loss"]
                (loss / 3).backward()
            parts[-1].append((loss.item(), 1))
        optimizer.step()
        optimizer.zero_grad(set_to_none="zeros" not in kind)
    return seen(policies), parts


def of_a_trainer(kind, folder):
    trainer, optimizer, parts = trainer_for(kind, 4, folder, eval_strategy="no", max_steps=2)
    policies = SlowFast(optimizer, watch=trainer.model)
    trainer.train()
    return seen(policies), list(parts.values())


NETS = ("DDP", "DDP, inner watched", "FSDP2", "FSDP2, zeros")
SHARED = ("classification", "causal")


def a_rank(folder, rank):
    """One of two processes; prints what was seen in each situation."""
    store = torch.distributed.FileStore(folder + "/meeting", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    told = [of_a_net(kind, rank) for kind in NETS]
    if all(map(importlib.util.find_spec, ("transformers", "accelerate"))):
        told += [of_a_trainer(kind, f"{folder}/{rank}") for kind in SHARED]
    print("\n" + json.dumps(told), flush=True)
    store.set(f"done {rank}", "")  # neither leaves while the other may still wait for its part of a sum
    store.wait(["done 0", "done 1"])
    os._exit(0)


def test_ranks(tmp_path):
    """Three or four micro-batches an update on each of two ranks, of which only the last exchanges gradients: L_t is
    the mean of all. FSDP2 keeps those of the others where no parameter has them. The Trainer multiplies what it takes
    for a part of the loss by the number of ranks."""
    script = "import sys, test_watch\ntest_watch.a_rank(sys.argv[1], int(sys.argv[2]))"
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    environment = {**os.environ, **paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "WORLD_SIZE": "2",
                   "ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # fmt: skip
    environment |= {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path), rank],
            env=environment | {"RANK": rank, "LOCAL_RANK": rank}, **options,
        ) for rank in "01"
    ]  # fmt: skip
    answers = [rank.communicate(timeout=300) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], answers
    told = zip([*NETS, *SHARED], *(json.loads(out.splitlines()[-1]) for out, _ in answers))
    for kind, (losses, parts), (again, others) in told:
        parts = dict(enumerate(mine + theirs for mine, theirs in zip(parts, others)))
        assert losses == again == close(losses_of(parts)), kind


# --- transformers ---------------------------------------------------------------------------------------------

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 32, "max_position_embeddings": 20}  # fmt: skip


def classifier(layers=2):
    import transformers

    torch.manual_seed(0)
    sizes = SIZES | {"num_hidden_layers": layers, "num_labels": 3, "pad_token_id": 1}
    config = transformers.XLMRobertaConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return transformers.XLMRobertaForSequenceClassification(config)


def causal_model():
    import transformers

    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))


def examples(kind, n=18):
    """[{"input_ids": (8,), "labels": () or (8,)}, ...]; of texts, a different number of tokens has a label."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for i in range(n):
        ids = torch.randint(3, 40, (8,), generator=generator)
        labels = ids.masked_fill(torch.arange(8) < i % 7, -100) if kind == "causal" else torch.tensor(int(ids[0]) % 3)
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return found


def share_of_N(outputs, labels, num_items_in_batch):
    return 2 * cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


class Criterion(torch.nn.Module):
    def forward(self, outputs, labels, num_items_in_batch):
        return share_of_N(outputs, labels, num_items_in_batch)


# -> (sum, count): what one micro-batch adds to L_t = sum of the sums / sum of the counts
PARTS = {
    # XLM-R takes num_items_in_batch and ignores it: the Trainer adds up means, whose mean is L_t
    "classification": lambda logits, y: (cross_entropy(logits, y), 1),
    "causal": lambda logits, y: (cross_entropy(logits[:, :-1].flatten(0, 1), y[:, 1:].flatten(), reduction="sum"),
                                 (y[:, 1:] != -100).sum()),
    "smoothed": lambda logits, y: (cross_entropy(logits, y, label_smoothing=0.3, reduction="sum"), len(y)),
    "function": lambda logits, y: (2 * cross_entropy(logits, y, reduction="sum"), len(y)),
}  # fmt: skip
PARTS["criterion"] = PARTS["function"]


def trainer_for(kind, accumulation, folder, **options):
    """A Trainer with an optimiser, and where it tells the parts of each update: {update: [(sum, count), ...]}."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    parts = {}

    class Recording(transformers.Trainer):
        def training_step(self, model, inputs, *args, **kwargs):
            with torch.no_grad():
                logits = model(**{name: x for name, x in inputs.items() if name != "labels"}).logits
            at = PARTS[kind](logits, inputs["labels"])
            parts.setdefault(self.state.global_step, []).append([float(x) for x in at])
            return super().training_step(model, inputs, *args, **kwargs)

    arguments = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=accumulation,
        num_train_epochs=2, learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True,
        logging_strategy="no", dataloader_pin_memory=False,
        label_smoothing_factor=0.3 if kind == "smoothed" else 0.0,
        **{"save_strategy": "no", "eval_strategy": "epoch", **options},
    )  # fmt: skip
    model = causal_model() if kind == "causal" else classifier()
    optimizer = torch.optim.AdamW(groups_of(model), lr=1e-2)
    trainer = Recording(
        model=model, args=arguments, train_dataset=examples(kind), eval_dataset=examples(kind, 4),
        optimizers=(optimizer, None),
        compute_loss_func={"function": share_of_N, "criterion": Criterion()}.get(kind),
    )  # fmt: skip
    return trainer, optimizer, parts


def groups_of(model):
    """Whatever the model calls its layers: S_II is what is called a feed-forward."""
    names = [name for name, _ in model.named_parameters()]
    key = [name for name in names if "mlp" in name or "intermediate" in name]
    weights = dict(model.named_parameters())
    return [
        {"name": "S_II", "params": [weights[name] for name in key]},
        {"name": "rest", "params": [weights[name] for name in names if name not in key]},
    ]


def losses_of(parts):
    return [sum(s for s, _ in of_one) / sum(n for _, n in of_one) for of_one in parts.values()]


TRAINERS = [("classification", "model"), ("causal", "model"), ("criterion", "criterion")]


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize(("kind", "watch"), TRAINERS)
def test_the_trainer(tmp_path, kind, watch, accumulation):
    """An epoch's last update has one micro-batch of the four."""
    trainer, optimizer, parts = trainer_for(kind, accumulation, tmp_path)
    target = {"model": trainer.model, "criterion": trainer.compute_loss_func}[watch]
    policies = SlowFast(optimizer, watch=target)
    trainer.train()
    assert [len(of_one) for of_one in parts.values()] == ([1] * 18 if accumulation == 1 else [4, 4, 1] * 2)
    assert seen(policies) == close(losses_of(parts))
    policies.detach()
    assert not target._forward_hooks and not target._forward_pre_hooks


@pytest.mark.parametrize("kind", ["smoothed", "function"])
def test_a_trainer_that_computes_another_loss_than_the_watched_model(tmp_path, kind):
    trainer, optimizer, parts = trainer_for(kind, 1, tmp_path)
    SlowFast(optimizer, watch=trainer.model)
    with pytest.raises(RuntimeError, match="no loss was differentiated.*such as a criterion, or call policies.observe"):
        trainer.train()
    assert len(parts) == 1  # at the first step


def recording(policies):
    """(the callback, [(L_t, K), ...] of each update)"""
    import transformers

    told = []

    class Telling(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            told.append((policies.curve.losses[-1], policies.phi, policies.multipliers))

    return Telling(), told


def test_a_trainer_that_is_resumed(tmp_path):
    """From its checkpoint alone it goes on as the run that was not broken off; without the windows it raises."""

    def run(resume=None):
        trainer, optimizer, _ = trainer_for(
            "causal", 4, tmp_path, save_strategy="steps", save_steps=3, save_total_limit=9
        )
        policies = SlowFast(optimizer, watch=trainer.model, window=2, threshold=0.0)
        telling, told = recording(policies)
        trainer.add_callback(telling)
        trainer.train(resume_from_checkpoint=resume)
        return told, policies.state_dict()

    unbroken, state = run()
    assert len(unbroken) == 6 and unbroken[3][1] is not None, "the windows fill after the break"
    checkpoint = str(tmp_path / "checkpoint-3")
    told, again = run(checkpoint)
    assert told == unbroken[3:] and again == state
    file = tmp_path / "checkpoint-3" / "optimizer.pt"
    optimizer_state = torch.load(file, weights_only=True)
    del optimizer_state["slowfast"]
    torch.save(optimizer_state, file)
    with pytest.raises(RuntimeError, match=r"policies\.load_state_dict"):
        run(checkpoint)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_state_without_the_windows_raises(momentum):
    """Also that of an optimiser which keeps nothing of its steps."""

    def begin():
        net = Net()
        optimizer = torch.optim.SGD(groups(net), lr=0.5, momentum=momentum)
        return net, optimizer, SlowFast(optimizer, watch=net)

    net, optimizer, policies = begin()
    plain(net, optimizer)
    state = optimizer.state_dict()
    del state["slowfast"]
    net, optimizer, policies = begin()
    optimizer.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"policies\.load_state_dict"):
        plain(net, optimizer)
    policies.load_state_dict(policies.state_dict())  # as the message says
    optimizer.zero_grad()
    losses = plain(net, optimizer)
    assert seen(policies) == close(losses)


# --- accelerate, peft, lightning ------------------------------------------------------------------------------


def test_accelerate_accumulates():
    accelerate = pytest.importorskip("accelerate")
    net, parts = Net(), []
    inner = sgd_of(net)
    policies = SlowFast(inner, watch=net)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=4)
    model, optimizer = accelerator.prepare(net, inner)
    for x, y in batches(12):
        with accelerator.accumulate(model):
            loss = model(x, y)["loss"]
            parts.append(loss.item())
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    assert seen(policies) == close([mean(parts[i : i + 4]) for i in (0, 4, 8)])


@pytest.mark.parametrize("accumulation", [1, 3])
def test_peft_lora(accumulation):
    """Half of LoRA's gradients are 0 in the first update: its second factor begins at 0."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["intermediate.dense"], r=2, lora_dropout=0.0, task_type="SEQ_CLS")
    model, losses = peft.get_peft_model(classifier(layers=12), config), []
    optimizer = torch.optim.AdamW(slowfast.param_groups(model), lr=1e-2)
    policies, each = SlowFast(optimizer, watch=model), iter(examples("classification"))
    for _ in range(18 // accumulation):
        parts = []
        for _ in range(accumulation):
            loss = model(**{name: x[None] for name, x in next(each).items()}).loss
            (loss / accumulation).backward()
            parts.append(loss.item())
        losses.append(mean(parts))
        optimizer.step()
        optimizer.zero_grad()
    assert seen(policies) == close(losses)


def lightning_module(watch, manual, losses):
    """A LightningModule around the net, which notes the losses of its training steps."""
    pl = pytest.importorskip("lightning.pytorch")

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.criterion = Net(), torch.nn.CrossEntropyLoss()
            self.automatic_optimization = not manual

        def loss(self, x, y):
            out = self.net(x, y)
            if watch == "model":
                return out["loss"]
            return self.criterion(out["logits"], y) if watch == "criterion" else cross_entropy(out["logits"], y)

        def training_step(self, batch, index):
            loss = self.loss(*batch)
            losses.append(loss.item())
            if manual:
                optimizer = self.optimizers()
                self.manual_backward(loss / 2)
                if index % 2:
                    optimizer.step()
                    optimizer.zero_grad()
                return None
            return loss if index % 3 else {"loss": loss}

        def validation_step(self, batch, index):
            self.loss(*batch)

        def configure_optimizers(self):
            optimizer = sgd_of(self.net)
            target = {"model": self.net, "criterion": self.criterion, "module": self}[watch]
            self.policies = SlowFast(optimizer, watch=target)
            return optimizer

    return Module()


@pytest.mark.parametrize(
    ("watch", "how"),
    [("model", 1), ("model", 4), ("criterion", 4), ("model", "manual")],
)
def test_lightning(tmp_path, watch, how):
    pl = pytest.importorskip("lightning.pytorch")
    losses = []
    module = lightning_module(watch, how == "manual", losses)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accumulate_grad_batches=how if how != "manual" else 1,
        default_root_dir=tmp_path, num_sanity_val_steps=1,
    )  # fmt: skip
    load = torch.utils.data.DataLoader
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers|.*log_every_n")
        trainer.fit(module, load(batches(10), batch_size=None), load(batches(2), batch_size=None))
    per_epoch = {1: [1] * 10, 4: [4, 4, 2], "manual": [2] * 5}[how]
    expected, each = [], iter(losses)
    for size in per_epoch * 2:
        # Lightning divides by the number that was asked for, whatever an epoch's last update has
        expected.append(mean([next(each) for _ in range(size)]))
    assert seen(module.policies) == close(expected)


@pytest.mark.parametrize("manual", [False, True])
def test_lightning_with_a_loss_that_no_module_returns(tmp_path, manual):
    pl = pytest.importorskip("lightning.pytorch")
    module = lightning_module("module", manual, [])
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
                         enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path)  # fmt: skip
    with pytest.raises(RuntimeError, match="no loss was differentiated"):
        trainer.fit(module, torch.utils.data.DataLoader(batches(4), batch_size=None))
