"""On guard: nothing that happens to an optimiser leaves K silently without effect, and K is on whatever is stepped.

The oracle is a twin without policies, stepped from the same weights with the same gradients: the change of each weight
is its K times the twin's. Everybody else's part (torch.compile, SAM, Prodigy, torch's distributed checkpoints) is real,
but for SAM, which is written here by its published interface. From top to bottom: a model with one weight a cell, what
the step may be wrapped in, copies and checkpoints, who else moves the weights, steps and losses that do not pair, the
optimisers, and scale="update".
"""

import contextlib
import copy
import functools
import io
import pickle
import warnings

import pytest
import torch

from slowfast import CELLS, Adam, Method, SlowFast

A_K_EACH = dict(zip(CELLS, (0.25, 0.01, 3.0, 10.0, 0.5)))
ONE_EACH = Method(P1=A_K_EACH, P2=A_K_EACH)
RATE = 1e-3


class Model(torch.nn.Module):
    """One weight a cell, and a loss that is never negative; float64."""

    def __init__(self, cells=CELLS, dtype=torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.cells = cells
        for cell in cells:
            weight = torch.randn(4, 3, generator=generator, dtype=torch.float64).to(dtype)
            self.register_parameter(cell, torch.nn.Parameter(weight))

    def forward(self, t=0):
        x = torch.linspace(-1, 1, 12, dtype=torch.float64).add(0.1 * t).view(4, 3)
        return sum(((p - x) ** 2).sum() for p in self.parameters())

    def groups(self):
        return [{"name": cell, "params": [self.get_parameter(cell)]} for cell in self.cells]


def weights_of(model):
    return [p.detach().clone() for p in model.parameters()]


def adamw(groups):
    return torch.optim.AdamW(groups, lr=RATE, weight_decay=0.1)


def sgd(groups):
    return torch.optim.SGD(groups, lr=RATE)


class Pair:
    """A model whose optimiser has policies, ONE_EACH, and a twin whose optimiser has none."""

    def __init__(self, make=adamw, watch=False, **options):
        self.model, self.twin = Model(), Model()
        self.optimizer, self.plain = make(self.model.groups()), make(self.twin.groups())
        options = {"method": ONE_EACH, "watch": self.model if watch else None, **options}
        self.policies = SlowFast(self.optimizer, **options)
        self.watch, self.before, self.t = watch, None, 0

    def backward(self):
        """Both from the same weights, to the same gradients; the loss is observed, or watched."""
        self.t += 1
        for p, q in zip(self.model.parameters(), self.twin.parameters()):
            p.data.copy_(q)
        self.before = weights_of(self.twin)
        for model in (self.twin, self.model):
            model.zero_grad()
            loss = model(self.t)
            loss.backward()
        if not self.watch:
            self.policies.observe(loss)
        return loss.item()

    def update(self, step=None, plain_step=None):
        self.backward()
        (step or self.optimizer.step)()
        (plain_step or self.plain.step)()
        self.assert_scaled()

    def assert_scaled(self, K=A_K_EACH, rtol=1e-7):
        for (cell, p), q, b in zip(self.model.named_parameters(), self.twin.parameters(), self.before):
            assert (q - b).abs().max() > 1e-9, f"{cell}: the twin's did not move"
            torch.testing.assert_close(p - b, K[cell] * (q - b), rtol=rtol, atol=1e-13, msg=cell)


@pytest.fixture(autouse=True)
def no_warnings(recwarn):
    """A warning of ours that a test does not ask for is an error."""
    yield
    assert not [w for w in recwarn if issubclass(w.category, UserWarning) and "observe" in str(w.message)]


both = pytest.mark.parametrize("watch", [False, True], ids=["observe", "watch"])

# --- around the step ----------------------------------------------------------------------------------------------

lr_schedulers = torch.optim.lr_scheduler


A_TENSOR = torch.tensor(RATE, dtype=torch.float64)


@pytest.mark.parametrize(
    ("what", "rate", "backend"),
    [
        ("lambda", RATE, "eager"),
        ("step", RATE, "eager"),
        ("step, compiled before", RATE, "aot_eager"),
        ("lambda", A_TENSOR, "eager"),
    ],
    ids=str,
)
def test_a_compiled_step_has_the_rates_and_weights_of_one_that_is_not(what, backend, rate):
    """Were K on the rate within the compiled part, the scaled rate would come back out of it, to be scaled again."""
    torch.compiler.reset()

    def make(groups):
        return torch.optim.SGD([{**g, "lr": copy.deepcopy(rate)} for g in groups], lr=copy.deepcopy(rate))

    pair = Pair(make)
    schedules = [lr_schedulers.ExponentialLR(o, 0.9) for o in (pair.optimizer, pair.plain)]
    if what == "step, compiled before":
        pair.policies.detach()
        pair.optimizer.step = torch.compile(pair.optimizer.step, backend=backend)
        pair.policies = SlowFast(pair.optimizer, method=ONE_EACH)
        step = pair.optimizer.step
    else:
        step = torch.compile(pair.optimizer.step if what == "step" else lambda: pair.optimizer.step(), backend=backend)
    for _ in range(10):  # a number is a constant of the compiler's at first, and then an input
        pair.update(step)
        for schedule in schedules:
            schedule.step()
        ours, plain = ([float(g["lr"]) for g in o.param_groups] for o in (pair.optimizer, pair.plain))
        assert ours == plain


def fill(optimizer, rate):
    """A user's own schedule, of rates that are tensors."""
    for group in optimizer.param_groups:
        group["lr"] = group["lr"].fill_(rate) if torch.is_tensor(group["lr"]) else rate


@both
@pytest.mark.parametrize("rate", [RATE, A_TENSOR], ids=["number", "tensor"])
@pytest.mark.parametrize("hook", ["before", "after", "scheduler"])
def test_a_rate_set_within_the_step_raises(hook, rate, watch):
    def make(groups):
        own = [{**group, "lr": copy.deepcopy(rate)} for group in groups]
        return torch.optim.AdamW(own, lr=copy.deepcopy(rate), weight_decay=0.1, foreach=False)

    pair = Pair(make, watch=watch)
    schedule = lr_schedulers.ExponentialLR(pair.optimizer, 0.9)
    if hook == "before":
        handle = pair.optimizer.register_step_pre_hook(lambda optimizer, *_: fill(optimizer, RATE / 2))
    elif hook == "after":
        handle = pair.optimizer.register_step_post_hook(lambda optimizer, *_: fill(optimizer, RATE / 2))
    else:
        handle = pair.optimizer.register_step_post_hook(lambda *_: schedule.step())
    pair.backward()
    with pytest.raises(RuntimeError, match=r"call scheduler.step\(\) after"):
        pair.optimizer.step()
    handle.remove()
    pair.plain.step()
    scheduled = [g["lr"] for g in pair.optimizer.param_groups]
    assert scheduled == [rate] * len(CELLS)
    if hook != "before":
        pair.update()


def test_groups_that_are_added_later_have_their_K():
    pair = Pair(lambda groups: adamw(groups[:2]))
    for model, optimizer in ((pair.model, pair.optimizer), (pair.twin, pair.plain)):
        for group in model.groups()[2:]:
            optimizer.add_param_group(group)
    pair.update()
    nameless = pair.optimizer.state_dict()
    for group in nameless["param_groups"]:
        del group["name"]
    pair.optimizer.load_state_dict(nameless)
    pair.update()


@pytest.mark.parametrize("when", ["before", "between", "after"])
def test_detached_and_put_on_again(when):
    """With a scheduler, which puts something around the step too."""
    pair = Pair(watch=True)

    def schedule():
        lr_schedulers.ExponentialLR(pair.optimizer, 0.9)

    _ = when == "before" and schedule()
    pair.update()
    _ = when == "between" and schedule()
    pair.policies.detach()
    pair.watch = None
    pair.policies.observe = lambda loss: None
    pair.backward()
    pair.optimizer.step(), pair.plain.step()
    pair.assert_scaled(dict.fromkeys(CELLS, 1.0))
    for group in pair.optimizer.param_groups:
        assert set(group) - {"initial_lr"} == set(pair.plain.param_groups[0])
    assert "slowfast" not in pair.optimizer.state_dict()
    assert when == "after" or pair.optimizer.step._wrapped_by_lr_sched  # what came after ours stays
    state = pair.policies.state_dict()
    pair.policies = SlowFast(pair.optimizer, method=ONE_EACH)
    _ = when == "after" and schedule()
    pair.policies.load_state_dict(state)
    pair.update()
    pair.update()
    assert pair.policies.updates == 3


def test_two_on_one_optimiser_raise():
    pair = Pair()
    with pytest.raises(ValueError, match=r"has policies already.*detach"):
        SlowFast(pair.optimizer)
    pair.update()
    pair.policies.detach()
    SlowFast(pair.optimizer)


@pytest.mark.parametrize("first", ["optimiser", "wrapper"])
def test_one_on_an_optimiser_and_one_on_fabrics_wrapper_raise(first):
    """The wrapper has its dictionary, and so the hooks, but attributes of its own."""
    fabric = pytest.importorskip("lightning.fabric").Fabric(accelerator="cpu")
    model = Model()
    plain = adamw(model.groups())
    _, wrapped = fabric.setup(model, plain)
    one, other = (plain, wrapped) if first == "optimiser" else (wrapped, plain)
    SlowFast(one)
    with pytest.raises(ValueError, match=r"has policies already.*detach"):
        SlowFast(other)


def test_what_is_wrapped_around_an_optimiser_raises():
    accelerate = pytest.importorskip("accelerate")
    with pytest.raises(ValueError, match="give torch's optimiser itself"):
        SlowFast(accelerate.Accelerator(cpu=True).prepare(adamw(Model().groups())))


# --- copies and checkpoints ---------------------------------------------------------------------------------------

COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda o: pickle.loads(pickle.dumps(o)),
    "torch.save": lambda o: torch.save(o, io.BytesIO()),
    "within something": lambda o: copy.deepcopy({"optimizers": [o]}),
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_the_optimiser_raises_until_the_policies_are_off(how):
    pair = Pair()
    pair.update()
    with pytest.raises(TypeError, match=r"without K: copy its state_dict, or detach\(\)"):
        COPIES[how](pair.optimizer)
    pair.update()
    pair.policies.detach()
    COPIES[how](pair.optimizer)


@both
def test_a_copy_of_what_is_watched_is_not_watched(watch):
    """An average of the weights, for one. Neither is it hindered."""
    pair = Pair(watch=watch)
    pair.update()
    for average in (copy.deepcopy(pair.model), pickle.loads(pickle.dumps(pair.model))):
        average().backward()
    pair.update()
    assert pair.policies.updates == 2


@pytest.mark.parametrize("make", [adamw, sgd, lambda groups: Adam(groups, lr=RATE)], ids=["AdamW", "SGD", "our Adam"])
@both
def test_a_state_without_the_policies_raises_until_theirs_is_loaded(make, watch):
    """And the groups of such a state need not have names."""
    first, pair = Pair(make, watch=watch), Pair(make, watch=watch)
    first.update()
    bare = make([{k: v for k, v in group.items() if k != "name"} for group in first.twin.groups()])
    bare.load_state_dict(first.plain.state_dict())
    state = bare.state_dict()
    for group in state["param_groups"]:
        group.pop("name", None)
    pair.optimizer.load_state_dict(copy.deepcopy(state)), pair.plain.load_state_dict(state)
    pair.backward()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"stepped without these policies .*load their state"):
            pair.optimizer.step()
        assert all(map(torch.equal, pair.model.parameters(), pair.before))
    pair.policies.load_state_dict(first.policies.state_dict())
    pair.update()
    assert pair.policies.updates == 2
    pair.update()


@pytest.mark.parametrize("names", ["theirs", "none", "others"])
def test_a_state_with_the_policies_goes_on(names):
    first, pair = Pair(), Pair()
    first.update()
    state = copy.deepcopy(first.optimizer.state_dict())
    for group in state["param_groups"]:
        if names != "theirs":
            del group["name"]
        if names == "others":
            group["name"] = "with decay"
    pair.optimizer.load_state_dict(state), pair.plain.load_state_dict(first.plain.state_dict())
    pair.update()
    assert pair.policies.updates == 2


@both
def test_an_optimiser_that_has_stepped_already_raises_until_it_is_told_to_begin_anew(watch):
    pair = Pair()
    pair.update()
    pair.policies.detach()
    pair.policies, pair.watch = SlowFast(pair.optimizer, method=ONE_EACH, watch=watch and pair.model or None), watch
    pair.backward()
    with pytest.raises(RuntimeError, match=r"to begin anew"):
        pair.optimizer.step()
    pair.policies.load_state_dict(pair.policies.state_dict())
    pair.update()


def test_a_state_that_the_optimiser_refuses_is_not_half_loaded():
    """The windows are those of the weights and moments that are there."""
    first, pair = Pair(), Pair()
    first.update(), pair.update()
    losses = pair.policies.state_dict()["losses"]
    state = first.optimizer.state_dict()
    del state["param_groups"][-1]
    with pytest.raises(ValueError, match="parameter group"):
        pair.optimizer.load_state_dict(state)
    assert pair.policies.state_dict()["losses"] == losses and pair.policies.updates == 1
    pair.backward()
    with pytest.raises(RuntimeError, match="to begin anew"):
        pair.optimizer.step()
    pair.policies.load_state_dict(pair.policies.state_dict())
    pair.update()


def test_an_optimiser_that_has_a_state_before_its_first_step_has_not_stepped():
    Pair(lambda groups: torch.optim.Adagrad(groups, lr=RATE)).update()


@pytest.mark.parametrize("make", [adamw, sgd], ids=["AdamW", "SGD"])
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@both
def test_torchs_distributed_checkpoints(make, flat, watch):
    """They have an optimiser make its state by a step at a rate of 0, and carry nothing that they do not know."""
    checkpoint = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    options = checkpoint.StateDictOptions(flatten_optimizer_state_dict=flat)
    first, pair = Pair(make, watch=watch), Pair(make, watch=watch)
    checkpoint.get_optimizer_state_dict(first.model, first.optimizer, options=options)  # before the first step
    checkpoint.get_optimizer_state_dict(first.twin, first.plain, options=options)
    first.update()
    first.update()
    state = checkpoint.get_optimizer_state_dict(first.model, first.optimizer, options=options)
    checkpoint.get_optimizer_state_dict(first.twin, first.plain, options=options)
    first.update()
    pair.plain.load_state_dict(first.plain.state_dict())
    checkpoint.set_optimizer_state_dict(pair.model, pair.optimizer, copy.deepcopy(state), options=options)
    checkpoint.set_optimizer_state_dict(pair.twin, pair.plain, copy.deepcopy(state), options=options)
    pair.backward()
    with pytest.raises(RuntimeError, match=r"stepped without these policies .*load their state"):
        pair.optimizer.step()
    pair.policies.load_state_dict(first.policies.state_dict())
    pair.update()
    assert pair.policies.updates == 4


# --- who else moves the weights -----------------------------------------------------------------------------------


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation (Foret et al. 2021), with the interface of davda54/sam: first_step climbs to where
    the loss is high within rho, second_step goes back and has the base optimiser step by the gradient found there."""

    def __init__(self, params, base, rho=0.05):
        super().__init__(params, {"rho": rho})
        self.base_optimizer = base(self.param_groups)
        self.param_groups = self.base_optimizer.param_groups
        self.defaults.update(self.base_optimizer.defaults)

    def weights(self):
        return [p for group in self.param_groups for p in group["params"] if p.grad is not None]

    @torch.no_grad()
    def first_step(self, zero_grad=False):
        norm = torch.stack([p.grad.norm() for p in self.weights()]).norm()
        for p in self.weights():
            self.state[p]["old_p"] = p.data.clone()
            p.add_(p.grad * self.param_groups[0]["rho"] / norm)
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad=False):
        for p in self.weights():
            p.data = self.state[p]["old_p"]
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure=None):
        closure = torch.enable_grad()(closure)
        self.first_step(zero_grad=True)
        closure()
        self.second_step()


def sam(groups):
    return SAM(groups, adamw)


class SAMPair(Pair):
    """A SAM, whose base or who itself has the policies, and a SAM without."""

    def __init__(self, on_base, watch=False):
        super().__init__(sam, watch)
        if on_base:
            self.policies.detach()
            watched = self.model if watch else None
            self.policies = SlowFast(self.optimizer.base_optimizer, method=ONE_EACH, watch=watched)

    def closure_of(self, model):
        def closure():
            loss = model(self.t)
            loss.backward()
            return loss

        return closure

    def update_in_two(self):
        self.backward()
        for optimizer, model in ((self.optimizer, self.model), (self.plain, self.twin)):
            optimizer.first_step(zero_grad=True)
            model(self.t).backward()
            optimizer.second_step(zero_grad=True)


def test_sam_in_two_steps_is_told_to_give_its_base():
    pair = SAMPair(on_base=False)
    pair.update_in_two()
    with pytest.raises(RuntimeError, match=r"(?s)weights moved .* not by the step .*of SAM the base"):
        pair.update_in_two()
    for on_base in (False, True):
        pair = SAMPair(on_base, watch=True)
        with pytest.raises(RuntimeError, match=r"(?s)weights moved .*of SAM the base, and call observe"):
            pair.update_in_two()


def test_sam_in_two_steps_with_policies_on_its_base():
    pair = SAMPair(on_base=True)
    for t in range(1, 4):
        pair.update_in_two()
        pair.assert_scaled()
        assert pair.policies.updates == t


@both
def test_sam_with_a_closure(watch):
    pair = SAMPair(on_base=False, watch=watch)
    for t in range(1, 4):
        loss = pair.backward()
        pair.optimizer.step(pair.closure_of(pair.model)), pair.plain.step(pair.closure_of(pair.twin))
        pair.assert_scaled()
        assert pair.policies.updates == t
        assert pair.policies.state_dict()["losses"][-1] == pytest.approx(loss, rel=1e-12)


@torch.no_grad()
def by_hand(pair):
    for p in pair.model.parameters():
        p -= RATE * p.grad


def by_hand_data(pair):
    for p in pair.model.parameters():
        p.data.sub_(RATE * p.grad)


def by_another_optimiser(pair):
    sgd(pair.model.parameters()).step()


def by_the_class(pair):
    type(pair.optimizer).step(pair.optimizer)


def by_a_step_taken_before(pair):
    pair.step_before()


MOVES = [by_hand, by_hand_data, by_another_optimiser, by_the_class, by_a_step_taken_before]


@pytest.mark.parametrize("move", MOVES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("to_none", [True, False], ids=["gradients None", "gradients 0"])
@both
def test_weights_that_move_without_our_step_raise_at_the_next_loss(move, to_none, watch):
    pair = Pair(watch=watch)
    pair.policies.detach()
    pair.step_before = pair.optimizer.step
    pair.policies = SlowFast(pair.optimizer, method=ONE_EACH, watch=pair.model if watch else None)
    pair.update()
    for raises in (False, True):
        loss = pair.model()
        pair.optimizer.zero_grad(set_to_none=to_none)
        if raises:
            with pytest.raises(RuntimeError, match="weights moved between two losses, but not by the step"):
                loss.backward() if watch else pair.policies.observe(loss)
            return
        loss.backward()
        _ = watch or pair.policies.observe(loss)
        move(pair)


def test_one_weight_that_never_moves_does_not_hide_the_others():
    """Among the smallest, which are looked at: the bias of a pooler that no loss uses."""
    model, unused = Model(), torch.nn.Parameter(torch.zeros(1))
    optimizer = sgd([*model.groups(), {"params": [unused]}])
    SlowFast(optimizer, watch=model)
    model().backward()
    for p in model.parameters():
        p.data -= RATE * p.grad
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="weights moved"):
        model().backward()


@both
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_grad_scaler_leaves_out_is_nobodys_fault(fused, watch):
    """Its loss joins the mean of no other; observed by hand, it is a loss of its own. A fused optimiser's step is
    called all the same, and leaves itself out."""
    pair = Pair(lambda groups: torch.optim.AdamW(groups, lr=RATE, fused=fused), watch=watch)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for is_skipped in (False, True, True, False):
        pair.t += 1
        before = weights_of(pair.model)
        loss = pair.model(pair.t)
        pair.optimizer.zero_grad()
        scaler.scale(loss).backward()
        if is_skipped:
            pair.model.get_parameter("rest").grad.fill_(torch.inf)
        _ = watch or pair.policies.observe(loss)
        scaler.step(pair.optimizer)
        scaler.update()
        assert all(map(torch.equal, before, pair.model.parameters())) == is_skipped
        assert watch and is_skipped or pair.policies.state_dict()["losses"][-1] == pytest.approx(loss.item(), rel=1e-12)
        average_in_and_out(pair)
    assert pair.policies.updates == (2 if watch else 4)


def average_in_and_out(pair):
    """As an evaluation of an average of the weights does."""
    own = copy.deepcopy(pair.model.state_dict())
    pair.model.load_state_dict({name: 0.5 * value for name, value in own.items()})
    with torch.no_grad():
        pair.model(3)
    pair.model.load_state_dict(own)


@torch.no_grad()
def clamp(pair):
    for p in pair.model.parameters():
        p.clamp_(-0.1, 0.1)


def load_others(pair):
    pair.model.load_state_dict({name: value + 1 for name, value in pair.model.state_dict().items()})


@pytest.mark.parametrize("what", [average_in_and_out, clamp, load_others], ids=lambda f: f.__name__)
@both
def test_weights_that_change_between_updates_are_nobodys_fault(what, watch):
    pair = Pair(watch=watch)
    for _ in range(3):
        what(pair)
        loss = pair.model()
        pair.optimizer.zero_grad()
        loss.backward()
        _ = watch or pair.policies.observe(loss)
        pair.optimizer.step()
    assert pair.policies.updates == 3


# --- steps and losses that do not pair ----------------------------------------------------------------------------


@both
def test_never_observing_raises(watch):
    pair = Pair()
    if watch:
        pair.policies.detach()
        SlowFast(pair.optimizer, watch=torch.nn.MSELoss())
    pair.optimizer.step()  # before there is any gradient, to silence a scheduler: it moves nothing
    pair.policies.observe = lambda loss: None
    pair.backward()
    says = "no loss was differentiated.*, nor observed: .*call policies.observe"
    for _ in range(2):
        with pytest.raises(RuntimeError, match=says):
            pair.optimizer.step()
    assert all(map(torch.equal, pair.model.parameters(), pair.before))


def test_stepping_twice_for_one_loss_warns_or_raises():
    pair = Pair()
    pair.update()
    with pytest.warns(UserWarning, match="without a new policies.observe") as warned:
        pair.optimizer.step()
    warned.clear()
    pair = Pair(watch=True)
    pair.update()
    with pytest.raises(RuntimeError, match="no loss was differentiated"):
        pair.optimizer.step()


@pytest.mark.parametrize("to_none", [True, False], ids=["gradients None", "within the backward pass"])
@both
def test_one_step_a_group_needs_one_loss(to_none, watch):
    """As those do that step each layer as soon as its gradient is there, and drop that."""
    pair = Pair(watch=watch)
    for t in range(1, 4):
        pair.backward()
        for optimizer, model in ((pair.optimizer, pair.model), (pair.plain, pair.twin)):
            gradients = {name: p.grad for name, p in model.named_parameters()}
            for name in reversed(gradients):
                model.zero_grad()
                model.get_parameter(name).grad = gradients[name]
                optimizer.step()
        pair.assert_scaled()
        assert pair.policies.updates == t


@both
def test_one_optimiser_a_layer(watch):
    """Each has policies of its own, but for the one of the rest, where K is 1 (as its groups' names say)."""
    model, twin, stepped = Model(), Model(), []
    watched = model if watch else None
    cells = {cell: k for cell, k in A_K_EACH.items() if cell != "rest"}
    method = Method(P1=cells, P2=cells)
    optimizers = {group["name"]: adamw([group]) for group in model.groups()}
    policies = {cell: SlowFast(optimizers[cell], method=method, watch=watched) for cell in cells}
    plain = adamw(twin.groups())
    for t in range(3):
        before = weights_of(twin)
        model.load_state_dict(twin.state_dict())
        loss = model(t)
        for of_cell in policies.values():
            _ = watch or of_cell.observe(loss)
        loss.backward(), twin(t).backward(), plain.step(), plain.zero_grad()
        for optimizer in optimizers.values():
            optimizer.step(), optimizer.zero_grad()
        for (cell, p), q, b in zip(model.named_parameters(), twin.parameters(), before):
            torch.testing.assert_close(p - b, cells.get(cell, 1.0) * (q - b), rtol=1e-7, atol=1e-13)
            stepped.append(cell)
    assert {of_cell.updates for of_cell in policies.values()} == {3} and len(stepped) == 15


def test_steps_within_the_backward_pass():
    """One optimiser, stepped by each gradient as it comes."""
    pair = Pair(watch=True)
    for t in range(3):
        pair.t += 1
        pair.model.load_state_dict(pair.twin.state_dict())
        pair.before = weights_of(pair.twin)
        pair.twin(t).backward(), pair.plain.step(), pair.plain.zero_grad()

        def step(p):
            pair.optimizer.step()
            p.grad = None

        handles = [p.register_post_accumulate_grad_hook(step) for p in pair.model.parameters()]
        pair.model(t).backward()
        for handle in handles:
            handle.remove()
        pair.assert_scaled()
    assert pair.policies.updates == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_of_16_bits_warn_once(dtype):
    model = Model(dtype=dtype)
    optimizer = sgd(model.groups())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        policies = SlowFast(optimizer)
        for t in range(3):
            loss = model(t)
            loss.backward()
            policies.observe(loss)
            optimizer.step(), optimizer.zero_grad()
    ours = [w for w in caught if "float32" in str(w.message)]
    assert len(ours) == (dtype != torch.float32)
    assert all(w.filename == __file__ for w in ours), "not at the caller's line"


def test_a_method_of_no_trained_cell_raises():
    """As PEFT's prefix tuning has it: all that is trained is outside of the layers."""
    with pytest.raises(ValueError, match="no weight of .*S_II.* is trained: the method would change nothing"):
        SlowFast(adamw(Model(("rest",)).groups()))
    with pytest.raises(ValueError, match="no weight of V_II is trained"):
        SlowFast(adamw(Model(("rest", "S_II")).groups()), method="ff")
    SlowFast(adamw(Model(("rest",)).groups()), method="df")
    with pytest.raises(ValueError, match="groups have no names.*build it with param_groups"):
        SlowFast(adamw(Model().parameters()))
    for name in ("S_I", "V_I", "V_I_ffn"):  # which would have K = 1
        with pytest.raises(ValueError, match="a set's for a cell's.*param_groups"):
            SlowFast(adamw([*Model().groups(), {"name": name, "params": [torch.nn.Parameter(torch.ones(2))]}]))
    empty = [{**group, "params": group["params"] * (group["name"] == "rest")} for group in Model().groups()]
    with pytest.raises(ValueError, match="no weight of"):
        SlowFast(adamw(empty))


# --- whose rate is not a rate -------------------------------------------------------------------------------------


def of(module, name, **options):
    """An optimiser of somebody's package, made of groups."""
    return pytest.param(lambda groups: getattr(pytest.importorskip(module), name)(groups, **options), id=module + name)


HEED = [
    of("torch.optim", "Adafactor"),
    of("torch.optim", "ASGD"),
    of("torch.optim", "SGD", lr=0.0),
    of("torch.optim", "AdamW", lr=torch.tensor(RATE)),
    of("torch.optim", "AdamW", lr=1e-9),
    of("torch.optim", "AdamW", fused=True),
    of("torch.optim", "Muon"),
    of("transformers.optimization", "Adafactor", lr=RATE, relative_step=False),
    of("pytorch_optimizer", "Lamb"),
    of("pytorch_optimizer", "AdamP"),
    of("pytorch_optimizer", "Ranger"),
    of("pytorch_optimizer", "ScheduleFreeAdamW"),
    of("pytorch_optimizer", "MADGRAD"),
    of("pytorch_optimizer", "Kron"),
    pytest.param(sam, id="SAM, which cannot be tried"),
]
CHOOSE = [
    of("prodigyopt", "Prodigy"),
    of("prodigyopt", "Prodigy", lr=1e-3),  # its moves are lost in float32
    of("dadaptation", "DAdaptAdam"),
    of("dadaptation", "DAdaptSGD"),
    of("dadaptation", "DAdaptSGD", lr=0.1),
    of("dadaptation", "DAdaptAdaGrad", lr=0.01),
    of("pytorch_optimizer", "DAdaptLion", lr=0.01),
    of("transformers.optimization", "Adafactor", lr=None),
    of("torch.optim", "Rprop"),
    of("pytorch_optimizer", "DAdaptAdam"),
    of("pytorch_optimizer", "AdaFactor"),
    of("pytorch_optimizer", "ApolloDQN"),
    of("pytorch_optimizer", "FTRL"),
    of("pytorch_optimizer", "A2Grad"),
    of("pytorch_optimizer", "AliG"),
]


@pytest.mark.parametrize("make", CHOOSE)
def test_an_optimiser_whose_rate_says_nothing_is_refused(make):
    optimizer = make(Model().groups())
    with pytest.raises(ValueError, match=f"{type(optimizer).__name__} chooses its own rate: give SlowFast scale='upd"):
        SlowFast(optimizer)
    SlowFast(optimizer, scale="update")  # nothing was put on it before


@pytest.mark.parametrize("make", HEED)
def test_an_optimiser_whose_rate_is_one_is_not(make):
    """And to find that out neither draws a random number nor does anything to the optimiser or the weights."""
    model = Model()
    optimizer = make(model.groups())
    before, drawn = weights_of(model), torch.get_rng_state()
    state, groups = copy.deepcopy(dict(optimizer.state)), copy.deepcopy(optimizer.param_groups)
    SlowFast(optimizer)
    assert torch.equal(torch.get_rng_state(), drawn) and all(map(torch.equal, before, model.parameters()))
    assert str(dict(optimizer.state)) == str(state) and str(optimizer.param_groups) == str(groups)


@pytest.mark.parametrize("name", ["Prodigy", "AdamW"])
def test_what_heeds_its_rate_is_told_on_any_default_device(name):
    """Not every device has float64, nor can what is on meta be compared."""
    optimizer = pytest.importorskip("pytorch_optimizer").Prodigy if name == "Prodigy" else torch.optim.AdamW
    made = optimizer(Model().groups(), lr=RATE)
    with torch.device("meta"), pytest.raises(ValueError) if name == "Prodigy" else contextlib.nullcontext():
        SlowFast(made)


def test_a_line_search_is_refused():
    lbfgs = torch.optim.LBFGS(Model(("S_II",)).groups(), line_search_fn="strong_wolfe")
    with pytest.raises(ValueError, match="LBFGS chooses its own rate"):
        SlowFast(lbfgs)


def test_an_optimiser_that_differentiates_twice_or_takes_more_arguments():
    """Either is as it is alone."""
    hessian = pytest.importorskip("pytorch_optimizer").AdaHessian

    class Explains(hessian):
        def step(self, closure=None, *, why, **more):
            self.why = why, more
            return super().step(closure, **more)

    pair = Pair(Explains)
    pair.backward()
    with pytest.raises(TypeError, match="why"):
        pair.optimizer.step()
    for t in range(2):
        pair.backward()
        for model, optimizer in ((pair.model, pair.optimizer), (pair.twin, pair.plain)):
            optimizer.zero_grad()
            model(t).backward(create_graph=True)
            torch.manual_seed(t)
            optimizer.step(why="asked", hessian=None)
        assert pair.optimizer.why == pair.plain.why == ("asked", {"hessian": None})
        pair.assert_scaled()


# --- scale="update": Eq. 1 to the letter ----------------------------------------------------------------------------

TO_THE_LETTER = [
    pytest.param(sgd, id="SGD"),
    pytest.param(adamw, id="AdamW"),
    of("torch.optim", "AdamW", fused=True, weight_decay=0.1),
    of("torch.optim", "Rprop"),
    of("prodigyopt", "Prodigy", d0=1e-3),
    of("dadaptation", "DAdaptAdam", d0=1e-3),
    of("transformers.optimization", "Adafactor", lr=None),
    of("pytorch_optimizer", "FTRL"),
]


@pytest.mark.parametrize("make", TO_THE_LETTER)
@both
def test_theta_is_theta_old_and_K_times_the_change(make, watch):
    pair = Pair(make, watch=watch, scale="update")
    for _ in range(4):
        rates = [group["lr"] for group in pair.optimizer.param_groups]
        pair.update()
        assert [group["lr"] for group in pair.optimizer.param_groups] == rates
        for p, q in zip(pair.model.parameters(), pair.twin.parameters()):
            for name, value in pair.plain.state[q].items():
                assert torch.equal(torch.as_tensor(pair.optimizer.state[p][name]), torch.as_tensor(value)), name


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
@both
def test_lbfgs_of_one_group_to_the_letter(line_search, watch):
    """Its step has many evaluations, of which the first is L_t."""
    model, twin = Model(("S_II",)), Model(("S_II",))
    optimizer, plain = (
        torch.optim.LBFGS(m.groups(), lr=0.1, max_iter=4, line_search_fn=line_search) for m in (model, twin)
    )
    policies = SlowFast(optimizer, method=ONE_EACH, scale="update", watch=model if watch else None)
    for t in range(3):
        model.load_state_dict(twin.state_dict())
        (before,), losses, plain_losses = weights_of(twin), [], []

        def closure(m, losses, t):
            m.zero_grad()
            loss = m(t)
            loss.backward()
            _ = watch or m is twin or policies.observe(loss)
            losses.append(loss.item())
            return loss

        first = plain.step(functools.partial(closure, twin, plain_losses, t))
        assert optimizer.step(functools.partial(closure, model, losses, t)).item() == first.item()
        assert losses == plain_losses and len(losses) > 1
        assert policies.state_dict()["losses"][-1] == losses[0]
        (p,), (q,) = model.parameters(), twin.parameters()
        torch.testing.assert_close(p - before, 0.01 * (q - before), rtol=1e-7, atol=1e-13)
    assert policies.updates == 3


def test_a_step_that_raised_is_scaled_as_far_as_it_went():
    """No weight is left with a change that K was not on."""
    pair = Pair(scale="update")
    pair.backward()
    pair.optimizer.register_step_post_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pair.optimizer.step()
    pair.plain.step()
    pair.assert_scaled()
