"""Fine-tuning slow and fast (Guo et al., ACL 2023, arXiv 2305.11449): four learning-rate policies that keep a
multilingual encoder's cross-lingual knowledge while it is fine-tuned on English. Adding them to a training loop:

    groups    = param_groups(model)                       # one torch parameter group per cell of the partition
    optimizer = torch.optim.AdamW(groups, lr=5e-6)        # or Adam below, or any other torch optimiser
    policies  = SlowFast(optimizer, c1=0.01, c2=10, r=3)  # scales each group's update by K
    for batch in batches:
        loss = ...; loss.backward()
        policies.observe(loss)                            # once per update, before the step
        optimizer.step(); scheduler.step(); optimizer.zero_grad()

This file is whole: it imports torch and the standard library alone. Copy it. It works with any model that has Hugging
Face's parameter names (`encoder.layer.N.attention...`): XLM-R, RoBERTa, BERT. With gradient accumulation observe the
mean over the micro-batches; with a GradScaler the loss before `scaler.scale`. In Hugging Face's Trainer:

    class SlowFastTrainer(Trainer):                       # Trainer(..., optimizers=(optimizer, None))
        def compute_loss(self, model, *args, **kwargs):
            result = super().compute_loss(model, *args, **kwargs)
            if model.training:                             # it is called in evaluations too
                loss = result[0] if isinstance(result, tuple) else result
                self.losses = getattr(self, "losses", []) + [loss.detach().mean()]
                if self.accelerator.sync_gradients:        # the last micro-batch of this update
                    policies.observe(sum(self.losses) / len(self.losses))
                    self.losses = []
            return result

and save `policies.state_dict()` beside the checkpoints: it carries the loss windows. Who has no loop takes the one at
the end of this file:

    optimizer = Adam(param_groups(model), lr=5e-6)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_then_decay(len(batches)))
    loss      = lambda model, batch: model(**batch).loss  # of a Hugging Face model, for one
    for done in train(model, ([batch] for batch in batches), loss, optimizer, scheduler, SlowFast(optimizer)):
        print(done.loss, done.lr)                         # here: log, measure, save

In the order of the paper: the weight sets, the learning curve, the methods (which set gets which K), the multiplier K,
Adam and its schedule, and the training loop that they stand in.
"""

import functools
import math
import re
import types
import warnings
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

# --- the weight sets (Sections 3.1 and 3.2) ------------------------------------------------------------------
#
#   layer   0  1  2  3 | 4  5  6  7  8  9 | 10  11       (of 12)
#   S_I     all of layers 0-9               |             cross-lingual knowledge: slow
#   S_II    feed-forward |                  |             its key part
#   V_I                                     | all         pre-training-task knowledge: fast
#   V_II                                    | attention   its key part
#
# S_II is part of S_I and V_II of V_I, so five cells share out all parameters. Embeddings and head are the "rest".

CELLS = ("S_I-S_II", "S_II", "V_I-V_II", "V_II", "rest")
S_I, S_II = ("S_I-S_II", "S_II"), ("S_II",)
V_I, V_II = ("V_I-V_II", "V_II"), ("V_II",)

BLOCKS = {"attention": "attention", "intermediate": "feed-forward", "output": "feed-forward"}
BLOCKS["LayerNorm"] = "feed-forward"  # of XLM-R XL, whose layers normalise first: this one is the feed-forward block's


class Place(NamedTuple):
    """Where a parameter stands: part is "embeddings", "layer" or "head"; layer and block are None outside layers."""

    part: str
    layer: int | None = None
    block: str | None = None


def set_sizes(depth):
    """How many layers, from the bottom, S_I and S_II reach: 10 and 4 of 12, the same fractions of other depths."""
    return round(depth * 10 / 12), round(depth * 4 / 12)


def cell_of(place, depth):
    """The one cell that holds a parameter."""
    if place.part != "layer":
        return "rest"
    slow, key = set_sizes(depth)
    if place.layer < slow:
        return "S_II" if place.layer < key and place.block == "feed-forward" else "S_I-S_II"
    return "V_II" if place.block == "attention" else "V_I-V_II"


def places(model):
    """({parameter name: Place}, number of layers) of a model with Hugging Face's names, under any prefix.

    Raises ValueError, naming what it saw, for a model without layers, with more than one stack of layers, with a
    hole in their numbering, or with a weight in a layer that is neither attention nor feed-forward.
    """
    found, stacks = {}, {}
    for name, _ in model.named_parameters():
        match = re.search(r"(?:^|\.)encoder\.layer\.(\d+)\.(\w+)", name)
        if match is None:
            found[name] = Place("embeddings" if "embeddings." in name else "head")
            continue
        layer, block = int(match[1]), BLOCKS.get(match[2])
        if block is None:
            raise ValueError(f"{name}: neither of the attention block nor of the feed-forward block of its layer")
        found[name] = Place("layer", layer, block)
        stacks.setdefault(name[: match.start(1)], set()).add(layer)
    if not stacks:
        saw = sorted(found, key=lambda name: re.search(r"\.\d+\.", name) is None)[:4]  # names of layers, if any, first
        raise ValueError(
            "no parameter is called encoder.layer.N.attention... as in Hugging Face's BERT, RoBERTa and XLM-R; "
            f"this model's are called {', '.join(saw) or 'nothing: it has none'}, ..."
        )
    if len(stacks) > 1:
        raise ValueError(f"more than one stack of layers: {', '.join(sorted(stacks))}; pass the encoder alone")
    (prefix, layers), *_ = stacks.items()
    if layers != set(range(len(layers))):
        raise ValueError(f"the layers of {prefix} are numbered {sorted(layers)}: there is a hole")
    return found, len(layers)


def param_groups(model):
    """One torch parameter group per cell of the partition: [{"name": "S_II", "params": [...]}, ...].

    Parameters that do not require a gradient are left out, and so are cells that are left empty. A group may be
    given further options ("weight_decay"), or be divided in two of the same name. Raises ValueError as `places`
    does, and if nothing is left to train.
    """
    place, depth = places(model)
    cells = {cell: [] for cell in CELLS}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            cells[cell_of(place[name], depth)].append(parameter)
    groups = [{"name": cell, "params": parameters} for cell, parameters in cells.items() if parameters]
    if not groups:
        raise ValueError("no parameter of the model requires a gradient: there is nothing to train")
    # Eq. 1 gives every weight exactly one K.
    grouped = [id(p) for group in groups for p in group["params"]]
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert len(grouped) == len(trained) and set(grouped) == trained, "the cells are not a partition"
    return groups


# --- the learning curve (Section 4.1) ------------------------------------------------------------------------


class LearningCurve:
    """The losses of the last 2 x `window` updates: what phi and P1 are read from."""

    def __init__(self, window=100):
        self.window = window
        self.losses = deque(maxlen=2 * window)

    @property
    def full(self):
        return len(self.losses) == 2 * self.window

    @property
    def recent(self):
        """Mean loss of the last `window` updates; None until both windows are full, like all that is read here."""
        return math.fsum(list(self.losses)[self.window :]) / self.window if self.full else None

    @property
    def previous(self):
        """Mean loss of the `window` updates before those."""
        return math.fsum(list(self.losses)[: self.window]) / self.window if self.full else None

    @property
    def phi(self):
        """phi(L_t) = recent / previous: near 0 while the loss drops quickly, near 1 when it is flat."""
        if not self.full:
            return None
        if self.previous == 0:  # the loss has been 0: it cannot drop
            return 1.0 if self.recent == 0 else math.inf
        return self.recent / self.previous


def R(phi, r):
    """Eq. 3: R = max(1 - phi^r, 0). A phi above 1, a rising loss, gives 0 (min: it must not overflow)."""
    return max(1 - min(phi, 1.0) ** r, 0.0)


# --- the methods: which set gets which K in which phase (Sections 2.3 and 4) ----------------------------------------


@dataclass(frozen=True)
class Method:
    """Cell -> K in phase P1 and in phase P2: a number or one of "c1", "c2", "R". Cells not named have K = 1."""

    P1: dict = field(default_factory=dict)
    P2: dict = field(default_factory=dict)


def K(**sets):
    """K(S_I="c1", V_II=10) -> {cell: K}: a set of the paper is one or two cells."""
    return {cell: k for name, k in sets.items() for cell in SETS[name]}


# "V_I-V_II", the feed-forward of the last two layers, is no set of the paper's, but its ablations need it.
SETS = {"S_I": S_I, "S_II": S_II, "V_I": V_I, "V_II": V_II, "V_I_ffn": ("V_I-V_II",)}

# Policy I is S_I="c1" in P1, policy II S_II="R" in P2, policy IV V_II="c2" in P2. Policy III, K = 1 for V_I in P1,
# is the absence of an entry.
METHODS = {
    "df": Method(),  # directly fine-tune: K = 1
    "fs": Method(P1=K(S_I="c1"), P2=K(S_II="R")),  # fine-tuning slow, policies I and II
    "ff": Method(P2=K(V_II="c2")),  # fine-tuning fast, policies III and IV
    "slowfast": Method(P1=K(S_I="c1"), P2=K(S_II="R", V_II="c2")),  # all four
}


# --- the multiplier K (Eqs. 1 and 2) --------------------------------------------------------------------------


class SlowFast:
    """Scales the update of each parameter group of `optimizer` by K (Eqs. 1 and 2), from the learning curve.

    optimizer   any torch optimiser, built from `param_groups(model)`; groups of other names have K = 1
    c1, c2, r   the paper's constants: K of policy I (< 1), K of policy IV (> 1), the power in R (> 0)
    method      a name in METHODS or a Method: which cell gets which K in which phase
    phase       "loss": P1 is where the mean loss of the last `window` updates is more than `threshold` below that
                of the `window` before (Section 4.1), and the start, until both windows are full. It has no memory:
                a run can come back. "fraction": P1 is the first `fraction` of `total_updates` (Section 2.2)
    policy4     "on", "off", or "auto": on while the last two layers still move away from the pre-trained model,
                as told by `observe_similarity` (Section 3.2)

    K multiplies the rate, not the gradient (Adam would cancel that), for the time of `optimizer.step()` only: outside
    of it, and in a closure passed to it, `group["lr"]` reads what the schedule set, and nothing compounds.
    An optimiser whose update is not proportional to its rate is scaled as far as it lets itself (Adafactor caps the
    rate; weight decay that is tied to the rate is scaled too).
    Raises ValueError for arguments out of range, for an optimiser without named groups, and for one that has
    policies already.
    """

    def __init__(self, optimizer, c1=0.01, c2=10, r=3, *, method="slowfast", window=100, threshold=0.1,
                 phase="loss", fraction=0.2, total_updates=None, policy4="on"):  # fmt: skip
        if isinstance(method, str):
            if method not in METHODS:
                raise ValueError(f"unknown method {method!r}; there are {', '.join(METHODS)}")
            method = METHODS[method]
        if not (0 <= c1 < math.inf and 0 <= c2 < math.inf and 0 < r < math.inf) or window < 1:
            raise ValueError(f"c1 {c1} and c2 {c2} must not be negative, r {r} positive, window {window} at least 1")
        if phase not in ("loss", "fraction") or policy4 not in ("on", "off", "auto"):
            raise ValueError(f"phase is loss or fraction, policy4 is on, off or auto; not {phase!r} and {policy4!r}")
        if phase == "fraction" and not (total_updates is not None and total_updates > 0 and 0 <= fraction <= 1):
            raise ValueError(f"phase='fraction' needs total_updates, and a fraction of 0 to 1, not {fraction}")
        if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
            raise ValueError("give torch's optimiser itself, not what accelerator.prepare wraps around it")
        if not any(group.get("name") in CELLS for group in optimizer.param_groups):
            raise ValueError("the optimiser's groups have no names: build it with param_groups(model)")
        hooks = optimizer._optimizer_step_pre_hooks.values()
        if any(isinstance(getattr(hook, "__self__", None), SlowFast) for hook in hooks):
            raise ValueError("this optimiser has policies already: K would be applied twice")
        self.optimizer, self.method, self.c1, self.c2, self.r = optimizer, method, c1, c2, r
        self.threshold, self.phase, self.policy4 = threshold, phase, policy4
        # (a little more than the product: 0.29 x 100 is 28.999999999999996 in floating point)
        self.first_updates = fraction * total_updates + 1e-6 if phase == "fraction" else None
        self.curve = LearningCurve(window)
        self.similarities = deque(maxlen=10)
        self.updates = self.updates_in_first_phase = 0
        self._stepped_at = 0  # the last update for which the optimiser stepped
        self._scheduled = []  # (group, the schedule's rate, the rate in force) while the optimiser steps
        self._depth = 0  # an optimiser that builds on another one's step has torch run the hooks for both
        self._put_around(optimizer)

    def observe(self, loss):
        """Takes L_t, the training loss of this update, a number or a one-element tensor; call it before the step.

        Under torch.distributed it is averaged over the ranks, so that all have the same K. A loss that is not
        finite raises FloatingPointError and a negative one ValueError (phi is a ratio); neither enters the window.
        """
        loss = self._mean_over_ranks(loss)
        if not math.isfinite(loss):
            raise FloatingPointError(f"update {self.updates + 1}: the loss is {loss}")
        if loss < 0:
            raise ValueError(f"update {self.updates + 1}: the loss is {loss}; phi needs losses that are not negative")
        self.curve.losses.append(loss)
        self.updates += 1
        self.updates_in_first_phase += self.in_first_phase

    @staticmethod
    def _mean_over_ranks(loss):
        loss = float(loss.detach()) if isinstance(loss, torch.Tensor) else float(loss)
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
            return loss
        device = "cuda" if distributed.get_backend() == "nccl" else "cpu"  # what the ranks can exchange
        total = torch.tensor(loss, dtype=torch.float64, device=device)
        distributed.all_reduce(total)
        return float(total) / distributed.get_world_size()

    def observe_similarity(self, cka):
        """Takes the linear CKA of the last two layers' hidden states with the pre-trained model's (the mean of the
        two), measured at even intervals; for policy4="auto"."""
        self.similarities.append(float(cka))

    @property
    def in_first_phase(self):
        """t in P1 for the update whose loss was observed last."""
        if self.phase == "fraction":
            return self.updates <= self.first_updates
        return not self.curve.full or self.curve.previous - self.curve.recent > self.threshold

    @property
    def phi(self):
        return self.curve.phi

    @property
    def R(self):
        return None if self.phi is None else R(self.phi, self.r)

    @property
    def policy4_active(self):
        """Whether policy IV applies; "auto": the last five similarities are below the five before, on average."""
        if self.policy4 != "auto":
            return self.policy4 == "on"
        s = list(self.similarities)
        return len(s) == 10 and sum(s[5:]) < sum(s[:5])

    @property
    def multipliers(self):
        """{cell: K} for this update (Eq. 2)."""
        # With phase="fraction" P2 may begin before the windows are full; a curve that is not known is not slow: 1.
        value = {"c1": self.c1, "c2": self.c2 if self.policy4_active else 1, "R": 1 if self.R is None else self.R}
        row = self.method.P1 if self.in_first_phase else self.method.P2
        return {cell: float(value.get(row.get(cell, 1), row.get(cell, 1))) for cell in CELLS}

    def _put_around(self, optimizer):
        """Has torch call _before_step and _after_step, inside of all other hooks, and puts the schedule's rates back
        even if the step raises: torch runs no hook then."""
        before = optimizer.register_step_pre_hook(self._before_step)
        after = optimizer.register_step_post_hook(self._after_step)
        inner = optimizer.step

        @functools.wraps(inner)
        def step(optimizer, *args, **kwargs):
            optimizer._optimizer_step_pre_hooks.move_to_end(before.id)
            optimizer._optimizer_step_post_hooks.move_to_end(after.id, last=False)
            try:
                return inner(*args, **kwargs)
            finally:
                self._depth = 0
                self._restore()

        optimizer.step = types.MethodType(step, optimizer)

    def _before_step(self, optimizer, args, kwargs):
        self._depth += 1
        if self._depth > 1:
            return None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimiser
        if closure is None:
            return self._scale()

        def at_the_schedules_rates():  # the closure is the user's, and may observe the loss
            self._restore()
            loss = closure()
            self._scale()
            return loss

        return (optimizer,), {**kwargs, "closure": at_the_schedules_rates}

    def _after_step(self, optimizer, args, kwargs):
        self._depth -= 1
        if self._depth == 0:
            self._restore()

    def _scale(self):
        if self.updates == self._stepped_at:
            warnings.warn("optimizer.step() without a new policies.observe(loss): K stays as it was", stacklevel=5)
        self._stepped_at = self.updates
        multipliers = self.multipliers
        for group in self.optimizer.param_groups:
            k = multipliers.get(group.get("name"), 1.0)
            if k != 1.0:
                scheduled, group["lr"] = group["lr"], group["lr"] * k
                self._scheduled.append((group, scheduled, group["lr"]))

    def _restore(self):
        for group, scheduled, scaled in self._scheduled:
            if group["lr"] is scaled:  # else a schedule has set another since
                group["lr"] = scheduled
        self._scheduled.clear()

    def state_dict(self):
        """What a resumed run needs: the loss windows and the counts. Hyper-parameters are the constructor's."""
        return {
            "losses": list(self.curve.losses),
            "similarities": list(self.similarities),
            "updates": self.updates,
            "updates_in_first_phase": self.updates_in_first_phase,
        }

    def load_state_dict(self, state):
        """Goes on where `state` was taken. Raises ValueError if it holds more losses than two windows."""
        if len(state["losses"]) > 2 * self.curve.window:
            raise ValueError(f"{len(state['losses'])} losses do not fit into two windows of {self.curve.window}")
        self.curve.losses = deque(state["losses"], maxlen=2 * self.curve.window)
        self.similarities = deque(state["similarities"], maxlen=10)
        self.updates = state["updates"]
        self.updates_in_first_phase = state["updates_in_first_phase"]
        self._stepped_at = self.updates


# --- Adam and its schedule (Appendix B: "the Adam optimizer with warm-up") -----------------------------------------


def move(parts, scalars):
    """Adam's update of lists of tensors, in place. Each of parts: (parameters, gradients, m, v, (beta1, beta2));
    scalars: the (rate, eps) of each part, numbers or one-element tensors on the parameters' device."""
    for (params, gradients, m, v, (beta1, beta2)), (rate, eps) in zip(parts, scalars):
        torch._foreach_lerp_(m, gradients, 1 - beta1)  # m = beta1 m + (1 - beta1) g
        torch._foreach_mul_(v, beta2)  # v = beta2 v + (1 - beta2) g^2
        torch._foreach_addcmul_(v, gradients, gradients, 1 - beta2)
        denominators = torch._foreach_sqrt(v)  # theta = theta - rate m / (sqrt(v) + eps)
        torch._foreach_add_(denominators, eps)
        torch._foreach_div_(denominators, rate)
        torch._foreach_addcdiv_(params, m, denominators, -1)


class Adam(torch.optim.Optimizer):
    """Adam (Kingma & Ba 2015, Algorithm 1) without weight decay, all tensors of a group at a time.

    Uses the order of computation of their Section 2: the bias corrections go into the rate and eps.
    Raises ValueError for values out of range, RuntimeError for sparse gradients.
    """

    move = staticmethod(move)  # a faster one may stand in for it, such as one that is compiled

    def __init__(self, params, lr=5e-6, betas=(0.9, 0.999), eps=1e-8):
        if not lr >= 0 or not eps >= 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"lr {lr} and eps {eps} must not be negative, betas {betas} in [0, 1)")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parts, scalars = [], []
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for t, lists in self.by_step(group["params"]).items():
                # m_hat / (sqrt(v_hat) + eps) = m / (sqrt(v) + eps c) * c / (1 - beta1^t), with c = sqrt(1 - beta2^t):
                # one pass over the weights fewer than with the corrected moments.
                c = math.sqrt(1 - beta2**t)
                parts.append((*lists, group["betas"]))
                scalars.append((float(group["lr"]) * c / (1 - beta1**t), group["eps"] * c))
        self.move(parts, scalars)
        return loss

    def by_step(self, params):
        """{t: lists of the parameters whose t-th step this is, of their gradients, m and v}: as a rule one t."""
        found = {}
        for p in params:
            if p.grad is not None:
                state = self.state_of(p)
                state["step"] += 1
                lists = found.setdefault(state["step"], ([], [], [], []))
                for of_all, of_one in zip(lists, (p, p.grad, state["exp_avg"], state["exp_avg_sq"])):
                    of_all.append(of_one)
        return found

    def state_of(self, p):
        state = self.state[p]
        if not state:
            if p.grad.is_sparse:
                raise RuntimeError("Adam does not take sparse gradients")
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return state


def warmup_then_decay(total_updates, warmup=0.1):
    """The factor on the rate as a function of the updates done, for torch's LambdaLR: linear warm-up from 0 over the
    first `warmup` (a fraction) of `total_updates`, then linear decay to 0. BERT's schedule (Devlin et al. 2018)."""
    rising = round(warmup * total_updates)

    def factor(done):
        if done < rising:
            return done / rising
        return max(total_updates - done, 0) / max(total_updates - rising, 1)

    return factor


# --- the training loop ---------------------------------------------------------------------------------------


class Update(NamedTuple):
    """What `train` yields after each update."""

    loss: float  # L_t, before the step
    lr: float  # the rate that the schedule gave it, which K has multiplied


def update(model, batches, loss, optimizer, policies, clip=1.0):
    """One update: loss, gradient, clipping, K, Adam. Returns L_t, a number.

    batches: the micro-batches of this update, one or several if memory is short. loss(model, batch): a micro-batch's
    part of L_t, a tensor with one element; the parts are added up. clip: what the norm of the gradient is cut at
    (1.0, as in XTREME, whose recipe the paper follows), 0 for never.
    Raises FloatingPointError for a loss that is not finite, before any weight has moved.
    """
    model.train()
    total = 0.0
    for batch in batches:
        part = loss(model, batch)
        part.backward()
        total = total + part.detach()
    if clip:
        torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)
    policies.observe(total)
    optimizer.step()
    optimizer.zero_grad()
    return policies.curve.losses[-1]


def train(model, updates, loss, optimizer, scheduler, policies, clip=1.0, update=update):
    """The plain training loop, a generator: does an update for each of `updates`, an iterable of lists of
    micro-batches, and yields an `Update` after it. What is done between updates (logging, measuring, saving) is the
    caller's. For `loss` and `clip` see `update`, in whose place a faster one may stand; the scheduler is any of
    torch's."""
    for batches in updates:
        lr = scheduler.get_last_lr()[0]
        L = update(model, batches, loss, optimizer, policies, clip)
        scheduler.step()
        yield Update(L, lr)
