"""Fine-tuning slow and fast (Guo et al., ACL 2023, arXiv 2305.11449): four learning-rate policies that keep a
multilingual encoder's cross-lingual knowledge while it is fine-tuned on English. Adding them to a training loop:

    groups    = param_groups(model)                       # one torch parameter group per cell of the partition
    optimizer = torch.optim.AdamW(groups, lr=5e-6)        # or Adam below, or any other torch optimiser
    policies  = SlowFast(optimizer, c1=0.01, c2=10, r=3)  # scales each group's update by K
    for batch in batches:
        loss = ...; loss.backward()
        policies.observe(loss)                            # once per update, before the step
        optimizer.step(); scheduler.step(); optimizer.zero_grad()

This file imports torch and nothing else of ours: copy it. It works with any model that has Hugging Face's parameter
names (`encoder.layer.N.attention...`): XLM-R, RoBERTa, BERT. With gradient accumulation observe the mean over the
micro-batches; with a GradScaler the loss before `scaler.scale`. In Hugging Face's Trainer:

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

and save `policies.state_dict()` beside the checkpoints: it carries the loss windows.

Below, in the order of the paper: the weight sets, the learning curve, the methods (which set gets which K), the
multiplier K, Adam, the schedule. Then the training loop and the command line, `python slowfast.py xnli --help`.
"""

import argparse
import contextlib
import copy
import functools
import hashlib
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import time
import types
import warnings
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
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


# --- the methods: which set gets which K in which phase (Sections 2.3, 2.4 and 4; Tables 1, 6 and 8) ----------


def first_third(depth):
    """The layers 0-3 of 12, where S_II lies."""
    return range(set_sizes(depth)[1])


def one_layer(i):
    return lambda depth: range(i, i + 1)


@dataclass(frozen=True)
class Method:
    """A row of the table. `P1`, `P2`: cell -> K in that phase, a number or one of "c1", "c2", "R"; cells not named
    have K = 1. The others say what is changed before the first update: `noise` (NoisyTune's lambda), `freeze` and
    `reinit` ((layers, block): layers a function of the depth, block None for both), `last` (train these layers and
    the head alone)."""

    about: str
    P1: dict = field(default_factory=dict)
    P2: dict = field(default_factory=dict)
    noise: float = 0.0
    freeze: tuple | None = None
    reinit: tuple | None = None
    last: int | None = None


def K(**sets):
    """K(S_I="c1", V_II=10) -> {cell: K}: a set of the paper is one or two cells."""
    return {cell: k for name, k in sets.items() for cell in SETS[name]}


# "V_I-V_II", the feed-forward of the last two layers, is no set of the paper's, but Table 8 needs it.
SETS = {"S_I": S_I, "S_II": S_II, "V_I": V_I, "V_II": V_II, "V_I_ffn": ("V_I-V_II",)}

# Policy I is S_I="c1" in P1, policy II S_II="R" in P2, policy IV V_II="c2" in P2. Policy III, K = 1 for V_I in P1,
# is the absence of an entry.
METHODS = {
    "df": Method("directly fine-tune: K = 1"),
    "noisytune": Method("U(-0.075, 0.075) std(W) is added to each pre-trained W (Wu et al. 2022)", noise=0.15),
    "fs": Method("fine-tuning slow, policies I and II", P1=K(S_I="c1"), P2=K(S_II="R")),
    "ff": Method("fine-tuning fast, policies III and IV", P2=K(V_II="c2")),
    "slowfast": Method("all four policies", P1=K(S_I="c1"), P2=K(S_II="R", V_II="c2")),
    # Table 1
    "last-1": Method("only the last layer and the head are trained", last=1),
    "last-2": Method("only the last two layers and the head are trained", last=2),
    "last-3": Method("only the last three layers and the head are trained", last=3),
    "freeze-4": Method("layers 0-3 do not train", freeze=(first_third, None)),
    "freeze-4-attention": Method("their attention does not train", freeze=(first_third, "attention")),
    "freeze-4-ffn": Method("their feed-forward does not train", freeze=(first_third, "feed-forward")),
    "enlarge-2": Method("K = 10 for the last two layers", P1=K(V_I=10), P2=K(V_I=10)),
    "enlarge-2-attention": Method("K = 10 for their attention", P1=K(V_II=10), P2=K(V_II=10)),
    "enlarge-2-ffn": Method("K = 10 for their feed-forward", P1=K(V_I_ffn=10), P2=K(V_I_ffn=10)),
    # Figure 3 (as many as XLM-R large has layers)
    **{f"freeze-layer-{i}": Method(f"layer {i} does not train", freeze=(one_layer(i), None)) for i in range(24)},
    **{f"reinit-layer-{i}": Method(f"layer {i} starts anew", reinit=(one_layer(i), None)) for i in range(24)},
    # Table 6
    "reinit-4": Method("layers 0-3 start anew", reinit=(first_third, None)),
    "reinit-4-attention": Method("their attention starts anew", reinit=(first_third, "attention")),
    "reinit-4-ffn": Method("their feed-forward starts anew", reinit=(first_third, "feed-forward")),
    # Table 8: the other pair of policies stays as in slowfast
    "only-S_I": Method("I and II on S_I", P1=K(S_I="c1"), P2=K(S_I="R", V_II="c2")),
    "only-S_II": Method("I and II on S_II", P1=K(S_II="c1"), P2=K(S_II="R", V_II="c2")),
    "swap-S": Method("I on S_II, II on S_I", P1=K(S_II="c1"), P2=K(S_I="R", V_II="c2")),
    "only-V_I": Method("III and IV on V_I", P1=K(S_I="c1"), P2=K(S_II="R", V_I="c2")),
    "only-V_II": Method("III and IV on V_II", P1=K(S_I="c1", V_I_ffn="c1"), P2=K(S_II="R", V_II="c2")),
    "swap-V": Method("III on V_II, IV on V_I", P1=K(S_I="c1", V_I_ffn="c1"), P2=K(S_II="R", V_I="c2")),
}


@torch.no_grad()
def prepare(model, method):
    """Makes the changes that a Method asks for before the first update, in place, from torch's global generator.

    Call it before `param_groups`. Whatever is neither embeddings nor in a layer counts as the head, a pooler too.
    Raises ValueError for a layer that the model does not have.
    """
    place, depth = places(model)

    def chosen(part, at):
        layers, block = part
        if not set(layers(depth)) <= set(range(depth)):
            raise ValueError(f"layer {max(layers(depth))}: the model has layers 0-{depth - 1}")
        return at.layer in layers(depth) and block in (None, at.block)

    for name, parameter in model.named_parameters():
        at = place[name]
        if method.reinit and chosen(method.reinit, at):
            reinitialise(name, parameter)
        if method.noise and at.part != "head" and parameter.numel() > 1:  # one number has no deviation
            parameter += (torch.rand_like(parameter) - 0.5) * method.noise * parameter.std()
        if method.freeze and chosen(method.freeze, at):
            parameter.requires_grad_(False)
        if method.last and at.part != "head" and (at.layer is None or at.layer < depth - method.last):
            parameter.requires_grad_(False)


def reinitialise(name, parameter):
    """BERT's initialisation: N(0, 0.02) matrices, zero biases, LayerNorm 1 and 0."""
    if parameter.dim() > 1:
        parameter.normal_(0.0, 0.02)
    else:
        parameter.fill_(1.0 if name.endswith("weight") else 0.0)


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


class Adam(torch.optim.Optimizer):
    """Adam (Kingma & Ba 2015, Algorithm 1) without weight decay, all tensors of a group at a time.

    Uses the order of computation of their Section 2: the bias corrections go into the rate and eps.
    Raises ValueError for values out of range, RuntimeError for sparse gradients.
    """

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
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self.update(params, [p.grad for p in params], [self.state_of(p) for p in params], group)
        return loss

    def state_of(self, p):
        state = self.state[p]
        if not state:
            if p.grad.is_sparse:
                raise RuntimeError("Adam does not take sparse gradients")
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return state

    @staticmethod
    def update(params, gradients, states, group):
        """theta <- theta - lr * m_hat / (sqrt(v_hat) + eps), for lists of tensors."""
        beta1, beta2 = group["betas"]
        for state in states:
            state["step"] += 1
        m = [state["exp_avg"] for state in states]
        v = [state["exp_avg_sq"] for state in states]
        torch._foreach_lerp_(m, gradients, 1 - beta1)  # m = beta1 m + (1 - beta1) g
        torch._foreach_mul_(v, beta2)  # v = beta2 v + (1 - beta2) g^2
        torch._foreach_addcmul_(v, gradients, gradients, 1 - beta2)

        # m_hat / (sqrt(v_hat) + eps) = m / (sqrt(v) + eps c) * c / (1 - beta1^t), with c = sqrt(1 - beta2^t):
        # one pass over the weights fewer than with the corrected moments.
        lr = float(group["lr"])
        c = [math.sqrt(1 - beta2 ** state["step"]) for state in states]
        rates = [-lr * c_t / (1 - beta1 ** state["step"]) for c_t, state in zip(c, states)]
        denominators = torch._foreach_sqrt(v)
        torch._foreach_add_(denominators, [group["eps"] * c_t for c_t in c])
        torch._foreach_addcdiv_(params, m, denominators, rates)


def warmup_then_decay(total_updates, warmup=0.1):
    """The factor on the rate as a function of the updates done, for torch's LambdaLR: linear warm-up from 0 over the
    first `warmup` (a fraction) of `total_updates`, then linear decay to 0. BERT's schedule (Devlin et al. 2018)."""
    rising = round(warmup * total_updates)

    def factor(done):
        if done < rising:
            return done / rising
        return max(total_updates - done, 0) / max(total_updates - rising, 1)

    return factor


# ===== If you copied this file, you may delete everything below this line: what stands above runs alone. =====

# --- the training loop ---------------------------------------------------------------------------------------
#
# A run is its directory: settings.json (what it is), log.jsonl (its curves), checkpoint.pt (where it is), best/ (the
# best model in Hugging Face's layout) and, once it is finished, result.json. Update t is followed by what is due at t:
# a line of the log, the gap, an evaluation. A checkpoint holds everything up to update t and nothing of what is due at
# t: whoever goes on from it begins with that, so a run that was stopped ends like one that was not.


class Run:
    """A run while it trains: the model and all that changes with it."""

    def __init__(self, model, task, s, out, device):
        self.model, self.task, self.s, self.out, self.device = model, task, s, out, device
        self.batches_per_epoch = math.ceil(len(task.train.lengths) / s["batch_size"])
        self.total = s["epochs"] * self.batches_per_epoch
        if s["max_updates"]:
            self.total = min(self.total, s["max_updates"])
        self.optimizer = Adam(param_groups(model), lr=s["lr"])
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, warmup_then_decay(self.total, s["warmup"]))
        self.policies = SlowFast(
            self.optimizer, s["c1"], s["c2"], s["r"], method=s["method"], window=s["window"], threshold=s["threshold"],
            phase=s["phase"], fraction=s["fraction"], total_updates=self.total, policy4=s["policy4"],
        )  # fmt: skip
        self.update = 0
        self.best = None  # {"update", "scores", ...}: the report of the dev sets of the best model
        self.gap = self.lr = None
        self.losses = []  # since the last line of the log
        self.log_bytes = 0
        self.tokens, self.training_seconds = 0, 0.0
        self.began = time.monotonic()  # moved back by the time that earlier sessions took
        self.mark()

    COUNTS = ("update", "best", "gap", "lr", "losses", "log_bytes", "tokens", "training_seconds", "seconds")

    @property
    def seconds(self):
        return time.monotonic() - self.began

    def mark(self):
        """Notes the counts right after an update: they are what a checkpoint holds, even one that is saved while what
        is due at the update (which changes them, but no tensor) is being done."""
        self.marked = {
            "counts": copy.deepcopy({name: getattr(self, name) for name in self.COUNTS}),
            "policies": self.policies.state_dict(),
        }

    def state_dict(self):
        return {
            **self.marked,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def load_state_dict(self, state):
        counts = dict(state["counts"])
        self.began = time.monotonic() - counts.pop("seconds")
        for name, value in counts.items():
            setattr(self, name, value)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.policies.load_state_dict(state["policies"])
        torch.set_rng_state(state["random"])
        if state["random_cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["random_cuda"], self.device)
        self.mark()


def batch_of(run, update):
    """The indices of the training windows of an update (counted from 0): a function of the seed alone, so that a run
    that goes on sees what it would have seen."""
    from data import epoch_batches

    epoch, place = divmod(update, run.batches_per_epoch)
    if getattr(run, "epoch", None) != epoch:
        run.epoch, run.batches = epoch, epoch_batches(run.task.train.lengths, run.s["batch_size"], run.s["seed"], epoch)
    return run.batches[place]


def train_one_update(run):
    """One update: loss, gradient, clipping, K, Adam, schedule. `micro_batch` divides the batch if memory is short."""
    from data import IGNORED, collate
    from eval import autocast

    began = time.perf_counter()
    indices = batch_of(run, run.update)
    size = run.s["micro_batch"] or len(indices)
    parts = [collate(run.task.train, indices[start : start + size]) for start in range(0, len(indices), size)]
    labelled = max(sum(int((labels != IGNORED).sum()) for _, labels in parts), 1)  # pairs, tokens, or ends of answers
    loss = 0.0
    run.model.train()
    for input_ids, labels in parts:
        with autocast(run.device, run.s["precision"]):
            logits = run.model(input_ids.to(run.device, non_blocking=True))
        part = run.model.loss(logits.float(), labels.to(run.device, non_blocking=True)) / labelled
        part.backward()
        loss = loss + part.detach()
    if run.s["clip"]:
        trained = [p for group in run.optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(trained, run.s["clip"])
    run.policies.observe(loss)
    run.lr = run.scheduler.get_last_lr()[0]
    run.optimizer.step()
    run.scheduler.step()
    run.optimizer.zero_grad()
    run.update += 1
    run.losses.append(run.policies.curve.losses[-1])
    run.tokens += int(run.task.train.lengths[indices].sum())
    run.training_seconds += time.perf_counter() - began
    run.mark()


def fit(run, gap_sets, reference, show):
    """Trains to the end, from wherever `run` is. Ctrl-C and SIGTERM leave a checkpoint, and KeyboardInterrupt."""
    with WholeUpdates() as updates:
        try:
            while True:
                due = due_at(run)
                if due["checkpoint"] or due["evaluation"]:
                    save_checkpoint(run)
                do_what_is_due(run, due, gap_sets, reference, show)
                if run.update == run.total:
                    return
                with updates.whole():
                    train_one_update(run)
                show(run)
        except KeyboardInterrupt:
            save_checkpoint(run)
            raise


def due_at(run):
    """What is due after the update that has just been done."""
    t, s = run.update, run.s
    every = {"log": s["log_every"], "gap": s["gap_every"], "similarity": s["cka_every"], "evaluation": s["eval_every"],
             "checkpoint": s["save_every"]}  # fmt: skip
    due = {what: bool(n) and t > 0 and t % n == 0 for what, n in every.items()}
    due["policy4"] = s["policy4"] == "auto" and t > 0 and t % 100 == 0 and reads_c2(run.policies.method)
    due["evaluation"] |= t == run.total
    due["log"] |= t == run.total
    return due


def reads_c2(method):
    """Whether policy IV is part of a method."""
    return "c2" in [*method.P1.values(), *method.P2.values()]


def measured(run, sets, model=None):
    """What eval.report says of the run's model, or another, on {language: Examples}, and what it is the sum of."""
    import eval

    s, measure = run.s, eval.MEASURES[run.s["task"]]
    counts = eval.count(model or run.model, sets, measure, run.device, s["precision"], s["eval_tokens"])
    return eval.report(eval.scored(counts, measure), s["source"]), counts


def write_counts(out, split, counts):
    """Keeps what each example counts, examples/SPLIT.npz: intervals of differences are drawn from it (eval.py)."""
    import numpy

    from model import replace

    (out / "examples").mkdir(parents=True, exist_ok=True)

    def write(part):
        with open(part, "wb") as file:
            numpy.savez_compressed(file, **counts)

    replace(out / "examples" / f"{split}.npz", write)


def do_what_is_due(run, due, gap_sets, reference, show):
    import eval
    from data import collate
    from model import save

    entry = {}
    if due["similarity"] or due["policy4"]:
        input_ids, _ = collate(run.task.train, batch_of(run, run.update - 1))
        entry["cka"] = eval.similarity(run.model, reference, input_ids.to(run.device))
        if due["policy4"]:
            run.policies.observe_similarity(sum(entry["cka"][-2:]) / 2)
    if due["gap"]:
        report, _ = measured(run, gap_sets)
        entry |= {k: report[k] for k in ("scores", "mean", "source", "non_source", "gap")}
        run.gap = entry["gap"]
    if due["log"] or entry:
        write_log(run, entry)
    if due["evaluation"]:
        show(run, "evaluating")
        report, counts = measured(run, run.task.dev)
        # what the best model is best in: the mean over all languages' dev sets, or the source's (Appendix B)
        by = "mean" if run.s["select"] == "all" else "source"
        if run.best is None or report[by] > run.best[by]:
            run.best = {"update": run.update, **report}
            write_counts(run.out, "dev", counts)
            save(run.model, run.out / "best", tokenizer=Path(run.s["model"], "sentencepiece.bpe.model"))
    if due["log"]:
        show(run, line=True)


def write_log(run, entry):
    """Appends a line to log.jsonl; the lines behind a checkpoint are written anew."""
    p = run.policies
    line = {
        "update": run.update,
        "loss": sum(run.losses) / len(run.losses) if run.losses else None,
        "phi": p.phi, "R": p.R, "phase": 1 if p.in_first_phase else 2, "K": p.multipliers,
        "lr": run.lr, "updates_in_first_phase": p.updates_in_first_phase, **entry,
    }  # fmt: skip
    file = run.out / "log.jsonl"
    with open(file, "r+b" if file.exists() else "w+b") as log:
        there = log.read(run.log_bytes)
        if len(there) < run.log_bytes:  # a power cut took its end: the lines that are whole stay
            there = there[: there.rfind(b"\n") + 1]
        log.seek(len(there))
        log.write((json.dumps(line) + "\n").encode())
        log.truncate()
        run.log_bytes = log.tell()
    run.losses.clear()


def save_checkpoint(run):
    from model import replace

    def write(file):
        try:
            torch.save(run.state_dict(), file)
        except RuntimeError as e:  # all that torch's writer says of a full disk is "enforce fail ... unexpected pos"
            raise OSError(f"{file} could not be written: is the disk full?") from e

    replace(run.out / "checkpoint.pt", write)


class WholeUpdates:
    """While it is entered, Ctrl-C and SIGTERM raise KeyboardInterrupt, but never in the middle of an update: inside
    `with updates.whole():` they wait until the block is done."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __enter__(self):
        self.inside = self.stop = False
        self.handlers = [signal.signal(number, self.handle) for number in self.SIGNALS]
        return self

    def __exit__(self, *_):
        for number, handler in zip(self.SIGNALS, self.handlers):
            signal.signal(number, handler)

    def handle(self, *_):
        if not self.inside:
            raise KeyboardInterrupt
        self.stop = True

    @contextlib.contextmanager
    def whole(self):
        self.inside = True
        try:
            yield
        finally:
            self.inside = False
        if self.stop:
            raise KeyboardInterrupt


# --- the command line ----------------------------------------------------------------------------------------

# Named sets of hyper-parameters. The paper's (Appendix B) are a row a task; another setup is what it changes of them.
TASKS = {
    "xnli": {"lr": 5e-6, "batch_size": 32, "epochs": 10, "eval_every": 3000, "max_length": 128, "policy4": "on"},
    "mlqa": {"lr": 3e-5, "batch_size": 12, "epochs": 2, "eval_every": 3000, "max_length": 384, "policy4": "on",
             "stride": 128, "max_question": 64},
    "ner": {"lr": 5e-6, "batch_size": 32, "epochs": 20, "eval_every": 3000, "max_length": 128, "policy4": "off"},
    "qam": {"lr": 5e-6, "batch_size": 32, "epochs": 1, "eval_every": 3000, "max_length": 128, "policy4": "on"},
}  # fmt: skip
# P1 and P2 need two full windows, so those of the shortest runs are shorter than the paper's 100 updates.
SHORT = {"lr": 5e-5, "window": 20, "gap_every": 20, "gap_examples": 60, "log_every": 20, "save_every": 0}
SETUPS = {
    "paper": {},
    # What a CPU can do: multilingual-e5-small on the official files. One evaluation, at the end: the dev sets of 40
    # languages take longer than all of the training.
    "small": {
        "xnli": {"lr": 5e-5, "max_updates": 1500, "save_every": 500},
        "mlqa": {"lr": 5e-5, "max_updates": 1720, "save_every": 500, "attention_dropout": 0.0, "eval_every": 0,
                 "gap_every": 430, "gap_examples": 50, "tests": "xquad,squad"},
        "ner": {"lr": 5e-5, "epochs": 1, "save_every": 500, "eval_every": 0, "dev_examples": 1000},
        "qam": {"lr": 5e-5, "save_every": 500, "source": "de", "languages": "de"},
    },
    # `make demo`: multilingual-e5-small on sample/. In question answering the loss falls all the way through so short a
    # run: by the loss rule it would never leave P1.
    "demo": {
        "xnli": {**SHORT, "max_updates": 240},
        "ner": {**SHORT, "max_updates": 240},
        "mlqa": {**SHORT, "lr": 1e-4, "max_updates": 120, "max_length": 192, "stride": 64, "attention_dropout": 0.0,
                 "phase": "fraction", "gap_every": 60, "gap_examples": 10},
        "qam": {**SHORT, "epochs": 6, "max_updates": 300},
    },
}  # fmt: skip


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong with an option in one line."""

    def error(self, message):
        print(f"{self.prog.split()[0]}: {message} (--help tells more)", file=sys.stderr)
        sys.exit(2)


def parse(argv=None):
    """The options of a run. Where one is not given it is the setup's, for this task, or else the default."""
    parser = OneLineParser(
        prog="slowfast.py",
        description="Fine-tunes a multilingual encoder on English and measures it in every language.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="methods:\n" + "\n".join(f"  {name:20} {m.about}" for name, m in METHODS.items() if "layer-" not in name)
        + "\n  freeze-layer-i, reinit-layer-i: layer i does not train, starts anew (i from 0)",
    )  # fmt: skip
    for add_options in (options_of_the_run, options_of_the_policies, options_of_training, options_of_measuring):
        add_options(parser)
    given, _ = parser.parse_known_args(argv)
    parser.set_defaults(**TASKS[given.task] | SETUPS[given.setup].get(given.task, {}))
    args = parser.parse_args(argv)
    for name in ("stride", "max_question"):
        if name not in TASKS[args.task] and getattr(args, name) is not None:
            parser.error(f"--{name.replace('_', '-')} is an option of mlqa, not of {args.task}")
    if args.method not in METHODS:
        parser.error(f"unknown method {args.method!r}; there are {', '.join(m for m in METHODS if 'layer-' not in m)}, "
                     "freeze-layer-i and reinit-layer-i")  # fmt: skip
    return args


def options_of_the_run(parser):
    add = parser.add_argument
    add("task", choices=TASKS,
        help="xnli: sentence pairs, MultiNLI and XNLI; mlqa: questions, SQuAD and MLQA; ner: named entities, WikiAnn; "
        "qam: does a passage answer a question, XGLUE")
    add("--method", default="slowfast", metavar="NAME", help="one of those below (default: slowfast, the paper's)")
    add("--seed", type=whole(0), default=1, metavar="N",
        help="of the head, dropout, order and few-shot draw (paper: 4 seeds)")
    add("--setup", choices=SETUPS, default="paper",
        help="hyper-parameters that are not given: paper, Appendix B's; small, for multilingual-e5-small on a CPU; "
        "demo, for the sample (default: paper)")
    add("--model", required=True, metavar="DIR",
        help="config.json, model.safetensors, sentencepiece.bpe.model of an XLM-R")
    add("--data", default="data", metavar="DIR", help="where the official archives are unpacked (default: data)")
    add("--runs", default="runs", metavar="DIR", help="where runs lie: DIR/SETUP/TASK/MODEL/METHOD-... (default: runs)")
    add("--out", metavar="DIR", help="the run's own directory (default: below --runs, named by what the run is)")
    add("--cache", default="cache", metavar="DIR", help="tokenised data is kept here (default: cache)")
    add("--languages", metavar="LIST", help="such as en,de,zh (default: all that the data holds)")
    add("--shots", type=whole(0), default=0, metavar="M",
        help="few-shot: examples of each other language (paper: 0, 5, 10, 20)")
    add("--select", choices=["all", "en"], default="all",
        help="the best model by the mean of all dev sets, or by English, the source (paper: all)")
    add("--source", default="en", metavar="LANG",
        help="train on this language, where the data have it, and measure the gap from it (paper: en)")


def options_of_the_policies(parser):
    add = parser.add_argument_group("the policies").add_argument
    add("--c1", type=number(0), default=0.01, metavar="K", help="K of policy I, at most 1 (paper: 0.01)")
    add("--c2", type=number(0), default=10.0, metavar="K", help="K of policy IV, at least 1 (paper: 10)")
    add("--r", type=number(0, above=True), default=3.0, metavar="R",
        help="the power in R = max(1 - phi^r, 0) (paper: 3)")
    add("--window", type=whole(1), default=100, metavar="N",
        help="updates a loss is averaged over for phi (paper: 100)")
    add("--threshold", type=number(), default=0.1, metavar="X",
        help="P1: the loss fell by more than this from window to window (paper: 0.1)")
    add("--phase", choices=["loss", "fraction"], default="loss",
        help="P1 by the learning curve (Section 4.1) or as the first part of the run (2.2)")
    add("--fraction", type=number(0, 1), default=0.2, metavar="F",
        help="with --phase fraction: this part of the updates (paper: 0.2)")
    add("--policy4", choices=["on", "off", "auto"],
        help="auto: only while the last two layers' CKA still drops (paper: on, off for NER)")


def options_of_training(parser):
    add = parser.add_argument_group("training").add_argument
    add("--lr", type=number(0), metavar="X",
        help="the rate at the end of the warm-up (paper: 5e-6; MLQA 3e-5; small models want 5e-5)")
    add("--batch-size", type=whole(1), metavar="N", help="examples an update (paper: 32; MLQA 12)")
    add("--epochs", type=whole(1), metavar="N",
        help="passes over the training set (paper: XNLI 10, MLQA 2, NER 20, QAM 1)")
    add("--max-updates", type=whole(1), metavar="N",
        help="end after this many updates; warm-up and decay fit themselves to it")
    add("--warmup", type=number(0, 1), default=0.1, metavar="F",
        help="the rate rises over this part of the updates (default: 0.1)")
    add("--clip", type=number(0), default=1.0, metavar="X",
        help="the gradient's norm is cut at this, 0 for never (default: 1)")
    add("--dropout", type=number(0, 0.99), metavar="P",
        help="of hidden states (default: as the model's config.json says, 0.1)")
    add("--attention-dropout", type=number(0, 0.99), metavar="P",
        help="of attention weights (default: as config.json says, 0.1); 0 is faster on a CPU")
    add("--max-length", type=whole(5), metavar="N", help="pieces the model reads at once (paper: 128; MLQA 384)")
    add("--stride", type=whole(1), metavar="N",
        help="mlqa: pieces from window to window of a context that is longer (paper: 128)")
    add("--max-question", type=whole(1), metavar="N", help="mlqa: pieces of a question (paper: 64)")
    add("--micro-batch", type=whole(1), metavar="N", help="compute this many examples at a time, if memory is short")
    add("--device", help="cpu, cuda, cuda:1 (default: cuda if there is one)")
    add("--precision", choices=["bf16", "fp32"],
        help="of the matrix products (default: bf16 where the device is fast at it)")


def options_of_measuring(parser):
    add = parser.add_argument_group("measuring").add_argument
    add("--eval-every", type=whole(0), metavar="N",
        help="updates between evaluations on the dev sets; there is one at the end (paper: 3000)")
    add("--dev-examples", type=whole(1), metavar="N",
        help="dev examples a language that models are selected on (default: all; NER has up to 10,000)")
    add("--gap-every", type=whole(0), default=100, metavar="N",
        help="updates between measurements of the gap, 0 for none (paper: 100)")
    add("--gap-examples", type=whole(1), default=200, metavar="N",
        help="dev examples a language that the gap is measured on (default: 200)")
    add("--cka-every", type=whole(0), default=100, metavar="N",
        help="updates between measurements of each layer's CKA with the pre-trained model, 0 for none (paper: 100)")
    add("--log-every", type=whole(1), default=100, metavar="N",
        help="updates between lines of log.jsonl (default: 100)")
    add("--save-every", type=whole(0), default=1000, metavar="N",
        help="updates between checkpoints, 0 for only where it stops (default: 1000)")
    add("--eval-tokens", type=whole(1), default=4096, metavar="N",
        help="tokens in a batch of an evaluation (default: 4096)")
    add("--tests", default="test", metavar="LIST",
        help="test sets at the end, and of a run that is finished (default: test; mlqa has xquad, squad, test-7x7 and "
        "dev-7x7 too)")
    add("--no-test", action="store_const", const="", dest="tests", help="none")
    add("--discard", action="store_true",
        help="remove the best model's weights once it is tested (XLM-R base: 1.1 GB a run)")


def whole(least):
    """An argparse type: an integer of at least `least`."""

    def parse_whole(text):
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return value

    parse_whole.__name__ = "whole number"
    return parse_whole


def number(least=-math.inf, most=math.inf, above=False):
    """An argparse type: a finite number in a range."""

    def parse_number(text):
        value = float(text)
        if not math.isfinite(value) or not least <= value <= most or (above and value == least):
            raise argparse.ArgumentTypeError(f"{text} is out of range")
        return value

    parse_number.__name__ = "number"
    return parse_number


def fast_precision(device):
    """bf16 where the device has instructions for it: elsewhere it is emulated, and slower than float32."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return "bf16" if has_bf16() else "fp32"


# Options that do not change what comes out: a run may be gone on with under others. (The model and the data are
# known by their content, not by where they lie.)
NOT_A_SETTING = {
    "setup", "runs", "out", "cache", "device", "micro_batch", "save_every", "cka_every", "eval_tokens", "tests",
    "discard",
}  # fmt: skip
NOT_COMPARED = {"model", "data"}


def settings_of(args, task, device):
    """What a run is: everything that decides its result, for settings.json."""
    from data import file_sha256

    files = [Path(args.model, "config.json"), *sorted(Path(args.model).glob("*.safetensors"))]
    weights = "".join(file_sha256(file) for file in files if file.is_file())
    s = {name: value for name, value in vars(args).items() if name not in NOT_A_SETTING}
    s["languages"] = sorted(task.dev)
    s["precision"] = args.precision or fast_precision(device)
    s["data_sha256"] = digest_of([task.train, *task.dev.values()])
    s["model_sha256"] = hashlib.sha256(weights.encode()).hexdigest()
    return s


def digest_of(parts):
    """The SHA-256, in hexadecimal, of all that there is of several Examples."""
    digest = hashlib.sha256()
    for part in parts:
        for values in part.arrays().values():
            digest.update(values.tobytes())
    return digest.hexdigest()


def directory_of(args):
    """Where a run lies: RUNS/SETUP/TASK/MODEL/METHOD-(what differs from the setup)-seedN, or as --out says."""
    if args.out:
        return Path(args.out)
    defaults = vars(parse([args.task, "--setup", args.setup, "--model", args.model]))
    ignored = NOT_A_SETTING | NOT_COMPARED | {"task", "method", "seed", "precision"}
    differing = [f"{k}={v}" for k, v in vars(args).items() if k not in ignored and v != defaults[k]]
    name = "-".join([args.method, *differing, f"seed{args.seed}"])
    return Path(args.runs, args.setup, args.task, Path(args.model).resolve().name, name)


def is_finished(out, s):
    """Whether the run in `out` is finished. Raises InputError if the directory is something else than this run's."""
    from data import InputError

    file = out / "settings.json"
    if file.is_file():
        try:
            there = json.loads(file.read_text(encoding="utf-8"))
            differing = [k for k in sorted(s | there) if k not in NOT_COMPARED and there.get(k) != s.get(k)]
        except (ValueError, TypeError) as e:
            raise InputError(f"{file}: not a run's settings ({e}); give another --out") from e
        if differing:
            what = ", ".join(f"{k} {there.get(k)} there and {s.get(k)} here" for k in differing[:3])
            raise InputError(f"{out} holds a run of other settings ({what}); give another --out")
        return (out / "result.json").is_file()
    if out.is_dir() and any(out.iterdir()):
        raise InputError(f"{out} is not empty and not a run's directory; give another --out")
    return False


@contextlib.contextmanager
def run_directory(out, s):
    """From here on the directory is the run's (a start that failed before this has left nothing behind), and while this
    is entered it is this process's alone."""
    from model import replace

    out.mkdir(parents=True, exist_ok=True)
    with alone(out):
        replace(out / "settings.json", lambda file: file.write_text(json.dumps(s, indent=2) + "\n"))
        yield


def is_taken(out):
    """Whether another process is at the run of this directory."""
    from data import InputError

    try:
        if out.is_dir():
            with alone(out):
                pass
        return False
    except InputError:
        return True


@contextlib.contextmanager
def alone(out):
    """Locks a directory. The system lets go of the lock when the process ends, however it does. Raises InputError if
    another process holds it; on a system without such locks (Windows) there is none."""
    from data import InputError

    try:
        import fcntl
    except ImportError:
        yield
        return
    directory = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{out}: another process is at this run; wait for it, or give another --out") from None
        yield
    finally:
        os.close(directory)


def start(args):
    """One run, from its options to its result.json."""
    from data import InputError

    tokenizer, task = load_task(args)
    device = choose_device(args.device)
    s = settings_of(args, task, device)
    out = directory_of(args)
    if is_finished(out, s):
        with alone(out):
            test_finished(out, task, {**vars(args), **s}, device)
        return
    run, reference = new_run(args, tokenizer, task, s, out, device)
    with run_directory(out, s):
        if (out / "result.json").is_file():
            raise InputError(f"{out}: another process has finished this run meanwhile")
        go_on(run)
        with Progress(run) as show:
            fit(run, fixed_part(task.dev, s["gap_examples"]), reference, show)
        finish(run, s)


def load_task(args):
    """(tokeniser, the data's Task) that the options ask for."""
    import data

    tokenizer = data.Tokenizer(args.model)
    reading = ("max_length", "stride", "max_question", "source", "cache")
    reading = {name: getattr(args, name) for name in reading if getattr(args, name) is not None}
    languages = args.languages.split(",") if args.languages else None
    tests = [name for name in args.tests.split(",") if name]
    return tokenizer, data.load(args.task, args.data, tokenizer, languages=languages, tests=tests, **reading)


def new_run(args, tokenizer, task, s, out, device):
    """(a Run before its first update, the pre-trained encoder for CKA or None). Draws `task`'s few-shot examples."""
    import data
    import model as xlmr

    task.train, task.dev = data.few_shot(task.train, task.dev, s["shots"], s["seed"], s["source"])
    if s["dev_examples"]:
        task.dev = fixed_part(task.dev, s["dev_examples"])

    torch.manual_seed(s["seed"])
    dropout = {"hidden_dropout_prob": args.dropout, "attention_probs_dropout_prob": args.attention_dropout}
    dropout = {name: p for name, p in dropout.items() if p is not None}
    model = xlmr.load(args.model, task.labels, xlmr.HEADS[args.task], **dropout)
    check_fit(model.config, tokenizer, task)
    similar = args.cka_every or s["policy4"] == "auto"
    reference = copy.deepcopy(model.roberta).eval().to(device) if similar else None
    try:
        prepare(model, METHODS[s["method"]])
    except ValueError as e:
        raise data.InputError(f"--method {s['method']}: {e}") from e
    model.roberta.train_rows(torch.from_numpy(task.train.ids).long().unique())
    model.to(device)
    # micro_batch, eval_tokens and the like may change from session to session: they are no part of settings.json
    return Run(model, task, {**vars(args), **s}, out, device), reference


def estimate(args, updates=8, examples=20):
    """The seconds that a run would take on this machine, from a few updates and predictions; nothing is left behind."""
    tokenizer, task = load_task(args)
    device = choose_device(args.device)
    s = settings_of(args, task, device)
    run, _ = new_run(args, tokenizer, task, s, directory_of(args), device)
    part = fixed_part(task.dev, examples)
    for _ in range(2):  # the first is slower: memory, caches
        run.training_seconds, trained = 0.0, run.update
        for _ in range(updates):
            train_one_update(run)
        began = time.perf_counter()
        measured(run, part)
        per_token = (time.perf_counter() - began) / tokens_of(part)
    gaps = run.total // s["gap_every"] * tokens_of(fixed_part(task.dev, s["gap_examples"])) if s["gap_every"] else 0
    evaluations = math.ceil(run.total / s["eval_every"]) if s["eval_every"] else 1
    tests = sum(map(tokens_of, task.tests.values()))
    per_update = run.training_seconds / (run.update - trained)
    return run.total * per_update + (gaps + evaluations * tokens_of(task.dev) + tests) * per_token


def tokens_of(sets):
    return sum(len(examples.ids) for examples in sets.values())


def check_fit(config, tokenizer, task):
    """Raises InputError where a model has too few rows for the tokeniser's pieces or for the length of an example."""
    from data import InputError

    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(f"the tokeniser has {tokenizer.vocab_size} pieces and the model a vocab_size of "
                         f"{config.vocab_size}: they do not belong together")  # fmt: skip
    sets = [task.train, *task.dev.values(), *(part for test in task.tests.values() for part in test.values())]
    longest = max(int(part.lengths.max()) for part in sets)
    room = config.max_position_embeddings - 2
    if longest > room:
        raise InputError(f"an example has {longest} pieces, the model positions for {room}: give --max-length {room}")


def choose_device(name):
    from data import InputError

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as e:
        raise InputError(f"--device {name}: {str(e).splitlines()[0]}") from e
    return device


def name_of_device(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"


def fixed_part(dev, examples):
    """So many examples of each dev set, the same in every run: the gap is measured on them while a run trains."""
    import numpy

    return {
        language: part.take(numpy.sort(numpy.random.default_rng(0).permutation(len(part))[:examples]))
        for language, part in dev.items()
    }


def go_on(run):
    """Takes up the checkpoint of a run that was stopped."""
    from data import InputError

    file = run.out / "checkpoint.pt"
    if not file.is_file():
        return
    try:
        run.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as e:  # whatever it is that a damaged file provokes
        what = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise InputError(f"{file}: not a whole checkpoint ({what}); delete it, and the run begins anew") from e
    print(f"{run.out}: going on from update {run.update}", file=sys.stderr)


def finish(run, s):
    """Tests the best model and writes result.json; from then on the run is finished."""
    import resource  # here, because Windows has none and the upper half of this file is to run everywhere

    on_cuda = run.device.type == "cuda"
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    peak = torch.cuda.max_memory_allocated(run.device) if on_cuda else resident
    result = {
        "method": s["method"], "seed": s["seed"], "shots": s["shots"], "settings": s,
        "dev": run.best,
        "test": None,
        **tested(run),
        "best_update": run.best["update"],
        "updates": run.total,
        "updates_in_first_phase": run.policies.updates_in_first_phase,
        "tokens_per_second": round(run.tokens / run.training_seconds, 1),
        "peak_memory_bytes": peak,
        "seconds": round(run.seconds, 1),
        "device": name_of_device(run.device),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }  # fmt: skip
    write_result(run.out, result)
    (run.out / "checkpoint.pt").unlink(missing_ok=True)
    if run.s["discard"]:
        shutil.rmtree(run.out / "best")
    print_scores(result)
    print(f"{run.out}: finished; {run.policies.updates_in_first_phase} of {run.total} updates were in P1")


def tested(run):
    """{name of a test set: report} of the best model, as far as the task has test sets."""
    from data import InputError
    from model import HEADS, load

    if not run.task.tests:
        return {}
    if not (run.out / "best").is_dir():
        raise InputError(f"{run.out}: its weights were not kept (--discard); remove it to run it again")
    model = load(run.out / "best", architecture=HEADS[run.s["task"]]).to(run.device)
    found = {}
    for name, sets in run.task.tests.items():
        report, counts = measured(run, sets, model)
        write_counts(run.out, name, counts)
        found[name] = {**report, "data_sha256": digest_of(sets.values())}
    return found


def test_finished(out, task, s, device):
    """Adds to the result of a finished run the test sets that it was not measured on yet."""
    from data import InputError

    try:
        result = json.loads((out / "result.json").read_text(encoding="utf-8"))
        result["dev"]["scores"]
        counted = {name for name in task.tests if (out / "examples" / f"{name}.npz").is_file()}
        task.tests = {name: sets for name, sets in task.tests.items() if not (result.get(name) and name in counted)}
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        what = f"{type(e).__name__}: {e}"
        raise InputError(f"{out}/result.json: not a run's result ({what}); remove {out} and run it again") from e
    if task.tests:
        found = tested(types.SimpleNamespace(task=task, s=s, out=out, device=device))
        write_result(out, result | found)
        print_scores({"method": s["method"], "seed": s["seed"], **found})
    print(f"{out}: this run is finished; its result is in result.json")


def write_result(out, result):
    from model import replace

    replace(out / "result.json", lambda file: file.write_text(json.dumps(result, indent=2) + "\n"))


def print_scores(result):
    for name, r in result.items():
        if isinstance(r, dict) and "scores" in r:
            gap = "" if r["gap"] is None else f", others {r['non_source']:.1f}, gap {r['gap']:.1f}"
            print(f"{result['method']} seed {result['seed']}, {name}: {r['measure']} mean {r['mean']:.1f}, "
                  f"source {r['source']:.1f}{gap}")  # fmt: skip


class Progress:
    """The one line that a run shows while it trains, on stderr: renewed in place on a terminal, else now and then."""

    SLOW = 6 * 3600  # seconds: a run on a CPU that takes longer is announced

    def __init__(self, run):
        self.began, self.first = time.monotonic(), run.update
        self.shown = 0.0
        self.announced = False
        self.open = False  # a line on a terminal that is still to be renewed or ended

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.end_line()

    def end_line(self):
        """Whatever is printed next, a message above all, begins on a line of its own."""
        if self.open:
            print(file=sys.stderr)
        self.open = False

    def __call__(self, run, doing="", line=False):
        terminal = sys.stderr.isatty()
        now = time.monotonic()
        if not (doing or line or (terminal and now - self.shown > 0.5)):
            return self.announce(run, now)
        self.shown = now
        text = self.text(run, now) + (f"  {doing}" if doing else "")
        print(f"\r{text}\033[K" if terminal else text, end="" if terminal else "\n", file=sys.stderr, flush=True)
        self.open = terminal

    def text(self, run, now):
        p = run.policies
        loss = f"{p.curve.recent or sum(p.curve.losses) / max(len(p.curve.losses), 1):.3f}"
        multipliers = " ".join(f"{cell} {k:.2g}" for cell, k in p.multipliers.items() if k != 1) or "1"
        gap = "" if run.gap is None else f"  gap {run.gap:.1f}"
        return (f"{run.update}/{run.total}  loss {loss}  P{1 if p.in_first_phase else 2}  K {multipliers}{gap}"
                f"  {run.update / max(run.training_seconds, 1e-9):.2f} updates/s"
                f"  {duration(self.left(run, now))} left")  # fmt: skip

    def left(self, run, now):
        """Seconds until the end at the pace of this session, evaluations included."""
        return (run.total - run.update) * (now - self.began) / max(run.update - self.first, 1)

    def announce(self, run, now):
        """Says once, early, that a run on a CPU will take very long; it goes on all the same."""
        if self.announced or run.device.type != "cpu" or run.update - self.first < 3:
            return
        self.announced = True
        left = self.left(run, now)
        if left > self.SLOW:
            self.end_line()
            print(f"slowfast.py: on this CPU this will take about {duration(left)}. It goes on; Ctrl-C stops it, and "
                  "the same command goes on from there. A CPU can do with `make demo`'s small model and --max-updates.",
                  file=sys.stderr)  # fmt: skip


def duration(seconds):
    """3 d 4 h, 2 h 5 min, 7 min or 20 s."""
    s = int(seconds)
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60} min"
    return f"{s // 3600} h {s % 3600 // 60} min" if s < 86400 else f"{s // 86400} d {s % 86400 // 3600} h"


def main(argv=None):
    """The command line; returns the exit status: 0, 2 for bad input or a full disk, 130 for Ctrl-C."""
    from data import InputError

    args = parse(argv)
    try:
        start(args)
        return 0
    except InputError as e:
        print(f"slowfast.py: {e}", file=sys.stderr)
        return 2
    except FloatingPointError as e:
        advice = "it has diverged: try another --out with a smaller --lr, or --precision fp32"
        print(f"slowfast.py: {e}; {advice}", file=sys.stderr)
        return 2
    except OSError as e:
        print(f"slowfast.py: {e}; nothing is lost: the same command goes on from the last checkpoint", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nslowfast.py: stopped; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
