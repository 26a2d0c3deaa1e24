"""Fine-tuning slow and fast (Guo et al., ACL 2023, arXiv 2305.11449): four learning-rate policies that keep a
multilingual encoder's cross-lingual knowledge while it is fine-tuned on English. Adding them to a training loop:

    groups    = param_groups(model)                       # one torch parameter group per cell of the partition
    optimizer = torch.optim.AdamW(groups, lr=5e-6)        # or Adam below, or any other torch optimiser
    policies  = SlowFast(optimizer, c1=0.01, c2=10, r=3)  # scales each group's update by K
    for batch in batches:
        loss = ...; loss.backward()
        policies.observe(loss)                            # once per update, before the step: the mean of its losses
        optimizer.step(); scheduler.step(); optimizer.zero_grad()

In a loop of somebody else's (the Trainer's, Lightning's, accelerate's; with accumulation, a GradScaler, DDP)
SlowFast(optimizer, watch=model), or watch=criterion, sees for itself of what loss each update was made, and raises
where it cannot. The optimiser's checkpoints carry the loss windows.

Copy this file: it is whole, and imports torch and the standard library alone. First the method, in the paper's order,
Adam and the training loop; then how models name their weights, and what keeps K from being wrong unnoticed.
"""

import contextlib
import functools
import inspect
import math
import os
import re
import types
import warnings
from collections import deque
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


def param_groups(model, places=None):
    """One torch parameter group per cell of the partition: [{"name": "S_II", "params": [...]}, ...].

    places: ({parameter name: Place}, number of layers), for a model that no row of CONVENTIONS knows. Parameters that
    do not require a gradient are left out, and so are cells that are left empty. A group may be given further options
    ("weight_decay"), or be divided in two of the same name. Raises ValueError for a model or places that do not do."""
    place, depth = placed(model, places)
    cells = {cell: [] for cell in CELLS}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            cells[cell_of(place[name], depth)].append(parameter)
    if not any(cells.values()):
        raise ValueError("no parameter of the model requires a gradient: there is nothing to train")
    return [{"name": cell, "params": parameters} for cell, parameters in cells.items() if parameters]


# --- the learning curve (Section 4.1) ------------------------------------------------------------------------


class LearningCurve:
    """The losses of the last 2 x `window` updates: what phi and P1 are read from."""

    def __init__(self, window=100):
        self.window = window
        self.losses = deque(maxlen=2 * window)

    full = property(lambda self: len(self.losses) == 2 * self.window)

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


class Method(NamedTuple):
    """Cell -> K in phase P1 and in phase P2: a number or one of "c1", "c2", "R". Cells not named have K = 1."""

    P1: dict = {}
    P2: dict = {}


def K(**sets):
    """K(S_I="c1", V_II=10) -> {cell: K}: a set of the paper is one or two cells."""
    return {cell: k for name, k in sets.items() for cell in SETS[name]}


# "V_I-V_II", the feed-forward of the last two layers, is no set of the paper's, but its ablations need it.
SETS = {"S_I": S_I, "S_II": S_II, "V_I": V_I, "V_II": V_II, "V_I_ffn": ("V_I-V_II",)}

# Policy I is S_I="c1" in P1, II is S_II="R" in P2, IV is V_II="c2" in P2; III, K = 1 for V_I in P1, is no entry.
METHODS = {
    "df": Method(),  # directly fine-tune: K = 1
    "fs": Method(P1=K(S_I="c1"), P2=K(S_II="R")),  # fine-tuning slow, policies I and II
    "ff": Method(P2=K(V_II="c2")),  # fine-tuning fast, policies III and IV
    "slowfast": Method(P1=K(S_I="c1"), P2=K(S_II="R", V_II="c2")),  # all four
}


# --- the multiplier K (Eqs. 1 and 2) --------------------------------------------------------------------------


def number_of_ranks():
    group = torch.distributed
    return group.get_world_size() if group.is_available() and group.is_initialized() else 1


class SlowFast:
    """Scales the update of each parameter group of `optimizer` by K (Eqs. 1 and 2), from the learning curve.

    optimizer   any torch optimiser, built from `param_groups(model)`; groups of other names have K = 1
    watch       the module that returns the training loss, a model or a criterion; None if the loop calls `observe`
    c1, c2, r   the paper's constants: K of policy I (< 1), K of policy IV (> 1), the power in R (> 0)
    method      a name in METHODS or a Method: which cell gets which K in which phase
    phase       "loss": P1 is where the mean loss of the last `window` updates is more than `threshold` below that
                of the `window` before (4.1), and the start, until both are full. A run can come back. "fraction": P1
                is the first `fraction` of `total_updates` (Section 2.2)
    policy4     "on", "off", or "auto": while the last two layers still move (3.2), as `observe_similarity` tells
    scale       "rate": K multiplies the learning rate (not the gradient: Adam would cancel that), and with it weight
                decay that is tied to the rate. "update": what the step did to the weights, Eq. 1 to the letter, for
                optimisers that choose their own rate (Prodigy, Adafactor); it takes a copy of the scaled weights

    K is in force during `optimizer.step()` only. What is saved of the optimiser carries the policies. Raises ValueError
    for arguments out of range, an optimiser that cannot be scaled or is already, a method of whose sets no weight is
    trained, a watched sum; RuntimeError in a step that K cannot be on."""

    def __init__(self, optimizer, c1=0.01, c2=10, r=3, *, watch=None, method="slowfast", window=100, threshold=0.1,
                 phase="loss", fraction=0.2, total_updates=None, policy4="on", scale="rate"):  # fmt: skip
        if isinstance(method, str) and method not in METHODS:
            raise ValueError(f"unknown method {method!r}; there are {', '.join(METHODS)}")
        if not (0 <= c1 < math.inf and 0 <= c2 < math.inf and 0 < r < math.inf) or window < 1:
            raise ValueError(f"c1 {c1} and c2 {c2} must not be negative, r {r} positive, window {window} at least 1")
        if phase not in ("loss", "fraction") or policy4 not in ("on", "off", "auto") or scale not in ("rate", "update"):
            raise ValueError(f"{phase=}: loss or fraction; {policy4=}: on, off or auto; {scale=}: rate or update")
        if phase == "fraction" and not (total_updates is not None and total_updates > 0 and 0 <= fraction <= 1):
            raise ValueError(f"phase='fraction' needs total_updates, and a fraction of 0 to 1, not {fraction}")
        self.method = METHODS[method] if isinstance(method, str) else method
        self.optimizer, self.c1, self.c2, self.r, self.policy4, self.scale = optimizer, c1, c2, r, policy4, scale
        self.phase, self.threshold, self.fraction, self.total_updates = phase, threshold, fraction, total_updates
        self.curve, self.similarities = LearningCurve(window), deque(maxlen=10)
        self.updates = self.updates_in_first_phase = 0
        self._undo = contextlib.ExitStack()  # what detach() takes off again
        refuse(optimizer, self.method, scale, watch)
        self._watch = Watch(self, optimizer, watch)
        self._put_around(optimizer)

    def observe(self, loss):
        """Takes L_t, the mean loss of this update, a number or a one-element tensor; call it once, before the step; in
        one (a line search) it does nothing. Under torch.distributed it is averaged over the ranks. One that is not
        finite raises FloatingPointError, a negative one ValueError (phi is a ratio); neither enters the window."""
        if self._watch.stepping:
            return
        self._watch.expect_a_step()
        loss = float(loss.detach()) if isinstance(loss, torch.Tensor) else float(loss)
        if number_of_ranks() > 1:
            device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"  # what the ranks can exchange
            total = torch.tensor(loss, dtype=torch.float64, device=device)
            torch.distributed.all_reduce(total)
            loss = float(total) / number_of_ranks()
        if not math.isfinite(loss):
            raise FloatingPointError(f"update {self.updates + 1}: the loss is {loss}")
        if loss < 0:
            raise ValueError(f"update {self.updates + 1}: the loss is {loss}; phi needs losses that are not negative")
        self.curve.losses.append(loss)
        self.updates += 1
        self.updates_in_first_phase += self.in_first_phase
        self._watch.stepped = None

    def observe_similarity(self, cka):
        """Takes the linear CKA of the last two layers' hidden states with the pre-trained model's (the mean of the
        two), measured at even intervals and on the same tokens each time; for policy4="auto"."""
        self.similarities.append(float(cka))

    @property
    def in_first_phase(self):
        """t in P1 for the update whose loss was observed last."""
        if self.phase == "fraction":
            return self.updates <= self.fraction * self.total_updates + 1e-6  # (0.29 * 100 is 28.999999999999996)
        return not self.curve.full or self.curve.previous - self.curve.recent > self.threshold

    phi = property(lambda self: self.curve.phi)
    R = property(lambda self: None if self.phi is None else R(self.phi, self.r))

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
        """Puts K around the optimiser's step, whatever else is around it already. A compiled step is compiled inside
        of K: a schedule's rate is then a constant of the compiler's, and would be multiplied again and again."""
        own, inner = vars(optimizer), optimizer.step
        earlier = {"step": inner} if "step" in own else {}
        before, after = map(torch.compiler.disable, (self._before_step, self._after_step))

        @functools.wraps(inner)
        def step(optimizer, closure=None, **kwargs):
            kwargs |= {} if closure is None else {"closure": closure}
            scaled = []  # what K is in force on
            try:
                before(kwargs, scaled)
                return inner(**kwargs)
            finally:
                after(scaled)

        ours = optimizer.step = types.MethodType(torch.compiler.disable(step, recursive=False), optimizer)
        self._undo.callback(setattr, self, "optimizer", None)  # what lies around our step calls it still
        self._undo.callback(lambda: own.get("step") is ours and (own.pop("step"), own.update(earlier)))

    def _before_step(self, kwargs, scaled):
        if self.optimizer is None:  # detached
            return
        if "closure" in kwargs:
            kwargs["closure"] = self._watch.evaluate(kwargs["closure"])
        self._watch.begin()  # from here on L_t is known
        multipliers = self.multipliers
        for group in self.optimizer.param_groups:
            k = multipliers.get(group.get("name"), 1.0)
            if k != 1.0 and self.scale == "rate":
                scheduled, group["lr"] = group["lr"], group["lr"] * k  # Eq. 1: theta - K lr update
                scaled.append((group, scheduled, group["lr"]))
            elif k != 1.0:
                scaled += [(p, p.detach().clone(), k) for p in group["params"]]

    @torch.no_grad()
    def _after_step(self, scaled):
        self._watch.stepping = False
        if self.scale == "update":
            for p, old, k in scaled:
                p.copy_(torch.lerp(old, p, k))  # Eq. 1: theta_old + K (theta_new - theta_old)
            return
        kept = [group["lr"] is k and not getattr(k, "_version", 0) for group, _, k in scaled]
        for group, scheduled, _ in scaled:
            group["lr"] = scheduled
        if not all(kept):
            raise RuntimeError("a rate set within the step: call scheduler.step() after it, or have scale='update'")

    def state_dict(self):
        """What a resumed run needs: the loss windows and the counts. Hyper-parameters are the constructor's. It is in
        `optimizer.state_dict()["slowfast"]` too, and loaded with that."""
        lists = {"losses": list(self.curve.losses), "similarities": list(self.similarities)}
        return lists | {"updates": self.updates, "updates_in_first_phase": self.updates_in_first_phase}

    def load_state_dict(self, state):
        """Goes on where `state` was taken. Raises ValueError if it holds more losses than two windows."""
        if len(state["losses"]) > 2 * self.curve.window:
            raise ValueError(f"{len(state['losses'])} losses do not fit into two windows of {self.curve.window}")
        self.curve.losses = deque(state["losses"], maxlen=2 * self.curve.window)
        self.similarities = deque(state["similarities"], maxlen=10)
        self.updates, self.updates_in_first_phase = state["updates"], state["updates_in_first_phase"]
        self._watch.go_on(knows=True)

    def detach(self):
        """Takes everything off the optimiser and off what is watched. The curve stays."""
        self._undo.close()


# --- Adam and its schedule (Appendix B: "the Adam optimizer with warm-up") -----------------------------------------


def move(parts, scalars):
    """Adam's update of lists of tensors, in place. Each of parts: (parameters, gradients, m, v, (beta1, beta2));
    scalars: the (rate, eps) of each part, numbers or one-element tensors on the parameters' device."""
    for (params, gradients, m, v, (beta1, beta2)), (rate, eps) in zip(parts, scalars):
        torch._foreach_lerp_(m, gradients, 1 - beta1)  # m = beta1 m + (1 - beta1) g
        torch._foreach_mul_(v, beta2)  # v = beta2 v + (1 - beta2) g^2
        torch._foreach_addcmul_(v, gradients, gradients, 1 - beta2)
        denominators = torch._foreach_sqrt(v)  # theta = theta - rate m / (sqrt(v) + eps)
        torch._foreach_add_(denominators, eps, **{"alpha": 1} if torch.is_tensor(eps) else {})  # or a tensor is read
        torch._foreach_div_(denominators, rate)
        torch._foreach_addcdiv_(params, m, denominators, -1)


class Adam(torch.optim.Optimizer):
    """Adam (Kingma & Ba 2015, Algorithm 1) without weight decay; as in their Section 2 the bias corrections go into the
    rate and eps. Raises ValueError for values out of range, RuntimeError for sparse gradients."""

    move = staticmethod(move)  # a faster one may stand in for it, such as one that is compiled

    def __init__(self, params, lr=5e-6, betas=(0.9, 0.999), eps=1e-8):
        if not lr >= 0 or not eps >= 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"lr {lr} and eps {eps} must not be negative, betas {betas} in [0, 1)")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        parts, scalars = [], []
        for group in self.param_groups:
            (beta1, beta2), by_step = group["betas"], {}  # {(t, ...): what is at its t-th step}: as a rule one t
            for p in group["params"]:
                if p.grad is not None:
                    t, row = self.of_one(p)
                    # A CPU takes each tensor by itself, in its cache from pass to pass: XLM-R base 0.20 s, not 0.38.
                    by_step.setdefault((t, p if p.is_cpu else None), []).append(row)
            for (t, _), rows in by_step.items():
                # m_hat / (sqrt(v_hat) + eps) = m / (sqrt(v) + eps c) * c / (1 - beta1^t): a pass over m, v saved
                c = math.sqrt(1 - beta2**t)
                parts.append((*map(list, zip(*rows)), group["betas"]))
                scalars.append((float(group["lr"]) * c / (1 - beta1**t), group["eps"] * c))
        self.move(parts, scalars)
        return loss

    def of_one(self, p):
        """Which of its steps this is for a parameter, and (it, its gradient, m, v)."""
        state = self.state[p]
        if not state:
            if p.grad.is_sparse:
                raise RuntimeError("Adam does not take sparse gradients")
            state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        state["step"] += 1
        return state["step"], (p, p.grad, state["exp_avg"], state["exp_avg_sq"])


def warmup_then_decay(total_updates, warmup=0.1):
    """The factor on the rate as a function of the updates done, for torch's LambdaLR: linear warm-up from 0 over the
    first `warmup` (a fraction) of `total_updates`, then linear decay to 0. BERT's schedule (Devlin et al. 2018)."""
    rising = round(warmup * total_updates)
    falling = max(total_updates - rising, 1)
    return lambda done: done / rising if done < rising else max(total_updates - done, 0) / falling


# --- the training loop ---------------------------------------------------------------------------------------


class Update(NamedTuple):
    """What `train` yields after each update."""

    loss: float  # L_t, before the step
    lr: float  # the rate that the schedule gave it, which K has multiplied


def update(model, batches, loss, optimizer, policies, clip=1.0):
    """One update: loss, gradient, clipping, K, Adam. Returns L_t, a number.

    batches: its micro-batches, several if memory is short. loss(model, batch): what one adds to L_t, a tensor with one
    element. clip: what the gradient's norm is cut at (1.0, as in XTREME, whose recipe the paper follows), 0 for never.
    A loss that is not finite raises FloatingPointError before any weight has moved."""
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
    """The plain training loop, a generator: does an update for each of `updates`, lists of micro-batches, and yields an
    `Update` after it. What is done between them (logging, measuring, saving) is the caller's. For `loss` and `clip` see
    `update`, in whose place a faster one may stand; scheduler: any of torch's. Of a Hugging Face model, for one:

        loss = lambda model, batch: model(**batch).loss
        for done in train(model, ([batch] for batch in batches), loss, optimizer, scheduler, SlowFast(optimizer)):
            print(done.loss, done.lr)
    """
    for batches in updates:
        lr = scheduler.get_last_lr()[0]
        L = update(model, batches, loss, optimizer, policies, clip)
        scheduler.step()
        yield Update(L, lr)


# --- models: naming conventions, as of encoder.layer.3.attention.self.query.weight ---------------------------------

BLOCKS = ("attention", "feed-forward")


class Convention(NamedTuple):
    """How a family of models calls its parameters: regular expressions for whole names between dots; one that means two
    things may look ahead at all names. Add yours: CONVENTIONS.append(...). A norm of both blocks is the attention's."""

    layers: str  # the numbered list of layers
    attention: str
    feed_forward: str
    embeddings: str = "embeddings"  # outside of layers, besides names with "embed" in them; all else is the head


CONVENTIONS = [
    # BERT, RoBERTa, XLM-R, ELECTRA, RemBERT, DeBERTa, MPNet, ESM, LayoutLM, Megatron-BERT, DINOv2, ViLT
    Convention("layer", "attention|norm1|layernorm_before|layer_scale1|lambda_1",
               "intermediate|output|LayerNorm|ln|norm2|mlp|layernorm_after|layer_scale2|lambda_2",
               r"relative_\w+_bias|rel_pos_\w*bias|conv\.(conv|LayerNorm)|feature_(extractor|projection)"
               r"|(?<!\w\.)(LayerNorm|norm)(?=.*\b(rel_embeddings|patch_embed)\b)"),  # DeBERTa and LayoutLMv3
    # DistilBERT, XLNet
    Convention("layer", "attention|sa_layer_norm|rel_attn", "ffn|output_layer_norm|ff", "mask_emb"),
    # T5, mT5, UMT5: their encoders (layer.1 of a decoder is a second attention)
    Convention("block", r"layer\.0\.(\w*SelfAttention|layer_norm)", r"layer\.1\.(Dense\w+|mlp|layer_norm)", "shared"),
    # GPT-2, GPT-J, BLOOM, Falcon, MPT, CTRL, timm's
    Convention("h|blocks", "attn|self_attention|multi_head_attention|ln_(1|attn)|(layer)?norm_?1|input_layernorm|ls1",
               "mlp|ffn|ln_(2|mlp)|(layer)?norm_?2|post_attention_layernorm|ls2", r"wte|wpe|w\.weight|norm_pre"),
    # Llama, Qwen, Gemma, EuroBERT, ModernBERT, Nomic, OPT, mBART, Whisper, CLIP, ViT, Wav2Vec2, torch's own
    Convention("layers", "(self_)?attn|(post_)?attention|input_layernorm|(attn|attention)_(layer)?norm|norm1|lambda_1"
               "|(post_)?self_attn_layer_?norm|layer_norm1?|layernorm_before"
               # Of Gemma, OLMo, Nomic; in the others, as in GLM-4, this norm is the feed-forward's.
               r"|post_attention_layernorm(?=.*\d\.post_(feedforward|mlp)_layernorm)(?!.*\bpost_self_attn)",
               "mlp|fc[12]|linear[12]|feed_forward|block_sparse_moe|intermediate|output|post_(attention|mlp)_layernorm"
               "|(mlp|ffn)_norm|((pre|post)_)?feedforward_layernorm|final_layer_norm|layer_norm2|layernorm_after|norm2"
               "|lambda_2", r"shared|conv([12]|_layers)|feature_projection|project_in|pre_layrnorm|relative_\w+_bias"),
]  # fmt: skip
FOR_ALL_LAYERS = "relative_attention_bias|rel_attn_embed"  # if layer 0 alone has it: in T5 and WavLM, not in UMT5
EMBEDDINGS = r"(?!embed_out)\w*embed\w*|(cls|mask|dist|reg)_token"  # GPT-NeoX's embed_out is its head
# What torch.compile, checkpointing, FSDP, DDP and PEFT put into names.
WRAPPERS = r"\b(_orig_mod|_(checkpoint|fsdp)_wrapped_module|(original_)?module|base_layer|modules_to_save\.[^.]+)\."
OWN = "append a row to CONVENTIONS, or give param_groups places of your own"


def places(model):
    """({parameter name: Place}, number of layers) of a model whose names CONVENTIONS knows, under any prefix. Raises
    ValueError, naming what it saw, for no list of layers or several, and layers that share weights or lack a part."""
    names = {name: re.sub(WRAPPERS, "", name) for name, _ in model.named_parameters()}
    path, listed = the_list(names.values()), " ".join(names.values())
    found = {name: place_of(plain, path, listed) for name, plain in names.items()}
    number, first = re.compile(rf"{re.escape(path)}\.(\d+)\."), {}  # the layer that a weight was met in first
    for name, p in model.named_parameters(remove_duplicate=False):
        layer = number.match(re.sub(WRAPPERS, "", name))
        if layer and first.setdefault(id(p), layer[1]) != layer[1]:
            raise ValueError(f"{name}: one set of weights serves layers {first[id(p)]} and {layer[1]}")
    blocks = {(place.layer, place.block) for place in found.values() if place.part == "layer"}
    depth = 1 + max(n for n, _ in blocks)
    for n, block in sorted({(n, block) for n in range(depth) for block in BLOCKS} - blocks):
        raise ValueError(f"{path}.{n} has no {block}: there is a hole, or layers are of several kinds; {OWN}")
    return found, depth


def the_list(plain_names):
    """What the model's one list of layers is called: "roberta.encoder.layer". Any numbered list with attention in it is
    one; one without, of a row's name, too, unless it is of the embeddings (convolutions)."""
    known = re.compile(rf"(?<![^.])(?:{'|'.join(row.layers for row in CONVENTIONS)})(?=\.\d+\.)")
    attention, lists = re.compile(r"(?i)(?=\.\d+\.(.*\.)?\w*att(n|ention|\b))"), set()
    for plain in plain_names:
        row, other = known.search(plain), attention.search(plain)
        if other or row and not re.search(EMBEDDINGS, plain[: row.end()]):
            lists.add(plain[: (row or other).end()])
    if len(lists) == 1 and known.search(f"{min(lists)}.0."):
        return min(lists)
    saw = sorted(lists) or sorted(plain_names, key=lambda plain: re.search(r"\.\d+\.", plain) is None)[:4]
    if any("albert_layer_groups" in plain for plain in saw):
        raise ValueError(f"{saw[0]}: one set of weights serves all layers, so that none can be slower than another")
    if len(lists) > 1:
        raise ValueError(f"more than one stack of layers: {', '.join(saw)}. Give param_groups the module that holds "
                         "one, such as the encoder, and the optimiser all else in further groups")  # fmt: skip
    raise ValueError(f"no list of layers that CONVENTIONS knows, such as encoder.layer.N: {OWN}. "
                     f"This model's parameters are called {', '.join(saw) or 'nothing: it has none'}, ...")  # fmt: skip


def place_of(plain, path, names):
    """The Place of one of the names. Raises ValueError for what no row knows in a layer."""
    rows = [row for row in CONVENTIONS if re.search(rf"(?<![^.])({row.layers})$", path)]
    layer = re.match(rf"{re.escape(path)}\.(\d+)\.", plain)
    if not layer:  # what stands before the encoder's own names says nothing (embedder.encoder...)
        own = plain[len(os.path.commonprefix([path, plain]).rpartition(".")[0]) :]
        patterns = "|".join([EMBEDDINGS, *(row.embeddings for row in rows)])
        return Place("embeddings" if re.match(rf"(\S*\.)?({patterns})(?![^. ])", f"{own} {names}") else "head")
    own = plain[layer.end() :]
    if re.search(FOR_ALL_LAYERS, own) and f"{path}.1.{own}" not in names:
        return Place("embeddings")
    for row in rows:
        for block, pattern in zip(BLOCKS, (row.attention, row.feed_forward)):
            if re.match(rf"({pattern})(?![^. ])", f"{own} {names}"):
                return Place("layer", int(layer[1]), block)
    raise ValueError(f"{plain}: neither of the attention nor of the feed-forward of its layer (are there layers within "
                     f"layers? did FSDP flatten them? then use_orig_params=True); {OWN}")  # fmt: skip


def placed(model, own):
    """A user's own places, checked; those of CONVENTIONS if there are none."""
    found, depth = own or places(model)
    kinds = {("embeddings", None), ("head", None), *(("layer", block) for block in BLOCKS)}
    for name in [name for name, p in model.named_parameters() if p.requires_grad] + [*found]:
        if name not in found or (found[name].part, found[name].block) not in kinds:
            raise ValueError(f"{name} is trained and has no place, or none of {sorted(kinds, key=str)}")
    numbers = {place.layer for place in found.values() if place.part == "layer"}
    if numbers != set(range(depth)):
        raise ValueError(f"there are {depth} layers, but places in {sorted(numbers)}")
    return found, depth


# --- on watch: K is never silently wrong or without effect ---------------------------------------------------------


def refuse(optimizer, method, scale, watch):  # raises ValueError where K would have no effect, or a wrong one
    groups = {group.get("name"): group for group in optimizer.param_groups if group["params"]}
    sets = {*method.P1, *method.P2}
    if not hasattr(optimizer, "_optimizer_state_dict_post_hooks"):
        raise ValueError("give torch's optimiser itself, not what accelerator.prepare wraps around it")
    if any(getattr(hook, "__module__", 0) == __name__ for hook in optimizer._optimizer_state_dict_post_hooks.values()):
        raise ValueError("this optimiser has policies already: K would be applied twice; detach() those first")
    if not groups.keys() & {*CELLS} or groups.keys() & SETS.keys() - {*CELLS}:
        raise ValueError("the optimiser's groups have no names, or a set's for a cell's: build it with param_groups")
    if sets and not groups.keys() & sets:
        raise ValueError(f"no weight of {', '.join(sorted(sets))} is trained: the method would change nothing")
    sums = getattr(watch, "reduction", None) == "sum" and type(watch).__module__ == "torch.nn.modules.loss"
    if sums or not isinstance(watch, torch.nn.Module | None):
        raise ValueError("watch a module that returns a mean loss (a sum grows with the batch), or call observe")
    own = any(group.get("lr") is None or group.get("line_search_fn") for group in optimizer.param_groups)
    if scale == "rate" and (own or not heeds_its_rate(optimizer)):
        raise ValueError(f"{type(optimizer).__name__} chooses its own rate: give SlowFast scale='update'")
    if any(p.dtype.itemsize < 4 for name in groups.keys() & sets for p in groups[name]["params"]):
        warnings.warn("weights of 16 bits: what K makes small is rounded away; keep them in float32", stacklevel=3)


def heeds_its_rate(optimizer):
    """Whether, of two weights, one that has a tenth of the rate moves less. True for what cannot be tried so."""
    kind = {"dtype": torch.float64, "device": "cpu"}  # in which the smallest moves count, and which all machines have
    weights, start = [torch.nn.Parameter(torch.ones(4, 4, **kind)) for _ in range(2)], None
    try:
        with torch.random.fork_rng(devices=[]):
            known = inspect.signature(type(optimizer)).parameters.keys() & optimizer.defaults
            tried = type(optimizer)([{"params": [w]} for w in weights], **{k: optimizer.defaults[k] for k in known})
            for t in range(24):
                if t == 4:
                    start = torch.stack(weights).detach()
                    tried.param_groups[1]["lr"] = tried.param_groups[1]["lr"] * 0.1
                for w in weights:
                    w.grad = 0.1 * torch.arange(16.0, **kind).add(t).mul(t + 1).sin().view(4, 4)
                tried.step()
    except Exception:  # once the rates differ: those that have one for all weights say so
        return start is None
    one, other = (torch.stack(weights).detach() - start).norm(dim=(1, 2))
    return not other > 0.5 * one


def local(x):  # this rank's part of a tensor of FSDP's
    return getattr(x, "_local_tensor", x)


class Watch:
    """Sees to it that each step has its loss and each loss its step. The losses are those that are differentiated among
    what a module returns: what is called "loss", the first of a tuple, or a tensor without dimensions. The gradient g
    that arrives at a loss is what it was multiplied by, 1/accumulation or a loss scale: L_t = sum(g loss) / sum(g), the
    mean. Losses divided by Hugging Face's num_items_in_batch, the tensor, that of all micro-batches, are added up."""

    policies = None  # of a copy, which watches nothing: the hooks are copied with a module
    __getstate__ = dict  # {}

    def __init__(self, policies, optimizer, module):
        self.policies, self.optimizer, self.on, self.stepping = policies, optimizer, module is not None, False
        self.seen, self.left, self.gone = [], [], False  # losses, see mean(); what was written; was a loss dropped?
        self.go_on(knows=not any(isinstance(s, dict) and s and s.get("step", 1) > 0 for s in optimizer.state.values()))
        optimizer.__reduce_ex__ = self.refuse_copy  # where copy and pickle look first
        policies._undo.callback(delattr, optimizer, "__reduce_ex__")
        hooks = [
            optimizer.register_state_dict_post_hook(lambda _, state: state.update(slowfast=policies.state_dict())),
            optimizer.register_load_state_dict_pre_hook(self.load),
            optimizer.register_load_state_dict_post_hook(lambda _: self.held and policies.load_state_dict(self.held)),
        ]
        policies._undo.callback(lambda: [hook.remove() for hook in hooks])
        if self.on:
            for known in (module._forward_pre_hooks, module._forward_hooks):
                for key, hook in [*known.items()]:
                    former = getattr(hook, "__self__", None)  # of an optimiser that had these weights before
                    if isinstance(former, Watch) and former.policies and {*former.params()} & {*self.params()}:
                        del known[key]
            before, after = (types.MethodType(torch.compiler.disable(f), self) for f in (Watch.before, Watch.after))
            hooks += [module.register_forward_pre_hook(before, with_kwargs=True)]
            hooks += [module.register_forward_hook(after, with_kwargs=True)]

    def refuse_copy(self, protocol):
        raise TypeError("a copy of this optimiser would step without K: copy its state_dict, or detach() the policies")

    def load(self, optimizer, state):
        self.knows, self.held = False, state.get("slowfast")  # until all of it is loaded
        groups = [dict(group) for group in state["param_groups"]]  # which may have no names, or others
        for loaded, group in zip(groups, optimizer.param_groups):
            loaded.update({"name": group["name"]} if "name" in group else {})
        return state | {"param_groups": groups}

    def go_on(self, knows):
        self.knows = knows  # of all steps that the optimiser has made
        self.stepped = set(range(len(self.optimizer.param_groups)))  # since the last loss; None while it waits
        self.mark = []  # of a loss that has had no step yet: some small weights, and their values then

    def params(self):
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def writes(self):  # tells whether anything has been written to weights or gradients between two calls
        return [(p._version, id(p.grad), getattr(p.grad, "_version", None)) for p in self.params()]

    def evaluate(self, closure):  # before K is set; not again, unless weights or gradients are new meanwhile, as SAM's
        with torch.enable_grad():
            first, then = [closure()], self.writes()
        return lambda: first.pop() if first and self.writes() == then else closure()

    def begin(self):  # the optimiser is about to step: takes what was watched; raises, or warns, if that is nothing
        if not self.knows:
            raise RuntimeError("the optimiser has stepped without these policies (a resumed run?): load their state, "
                               "or policies.load_state_dict(policies.state_dict()) to begin anew")  # fmt: skip
        groups, self.mark = self.optimizer.param_groups, []
        if bool(getattr(self.optimizer, "found_inf", False)):  # GradScaler leaves it to a fused one to skip a step
            self.seen, self.gone, self.stepping = [], False, True
            return
        if self.seen and self.stepped is not None:  # (not observed by hand)
            if self.gone and [grad for _, grad, _ in self.writes()] != [grad for _, grad, _ in self.left]:
                raise RuntimeError("gradients of several losses, put together by hand: call policies.observe(loss)")
            self.policies.observe(self.mean())
        self.seen, self.gone = [], False
        moving = {i for i, group in enumerate(groups) if any(p.grad is not None for p in group["params"])}
        self.stepped = self.stepped or set()
        # (a step at rates of 0 is how torch's distributed checkpoints have an optimiser make its state)
        if moving & self.stepped and any(group.get("lr") != 0 for group in groups):
            if self.on or self.policies.updates == 0:
                raise RuntimeError("no loss was differentiated that a watched module returned, nor observed: watch "
                                   "what computes it, such as a criterion, or call policies.observe(loss)")  # fmt: skip
            warnings.warn("optimizer.step() without a new policies.observe(loss): K stays as it was", stacklevel=6)
        self.stepped |= moving
        self.mark, self.stepping = [], True

    def expect_a_step(self):  # a loss has come; raises if the one before had no step of ours and yet weights have moved
        if any(not torch.equal(local(p), value) for p, value in self.mark):
            raise RuntimeError("weights moved between two losses, but not by the step of the optimiser SlowFast has: "
                               "detach(), or give the one that steps (of SAM the base, and call observe)")  # fmt: skip
        some = sorted(self.params(), key=lambda p: (p.grad is None, local(p).numel() == 0, p.numel()))[:3]
        self.mark = [(p, local(p).detach().clone()) for p in some]

    def before(self, module, args, kwargs):  # lets num_items_in_batch have a gradient, if the loss is divided by it
        n = kwargs.get("num_items_in_batch")
        if n is not None and torch.is_grad_enabled():
            kwargs = kwargs | {"num_items_in_batch": torch.as_tensor(n).detach().float().clone().requires_grad_()}
        return args, kwargs

    def after(self, module, args, kwargs, result):
        named = isinstance(result, dict) or hasattr(result, "loss")
        loss = result[0] if isinstance(result, (tuple, list)) and result and not named else result
        loss = loss.get("loss") if isinstance(loss, dict) else getattr(loss, "loss", loss)
        if isinstance(loss, torch.Tensor) and loss.requires_grad and (named or loss.dim() == 0) and self.policies:
            value, divided, n = loss.detach().clone(), [], kwargs.get("num_items_in_batch")
            if n is not None:
                n.register_hook(divided.append)
            loss.register_hook(lambda g: self.differentiated(value, g.detach().clone(), divided))

    def differentiated(self, *loss):
        now = torch._C._current_graph_task_id()
        if self.stepping:  # an evaluation of a line search is no update
            return
        before, params = self.writes(), self.params()
        if all(backward != now for *_, backward in self.seen):
            # What broke off has no part in L_t, nor has what was dropped without a step (by GradScaler).
            gone = before != self.left and not any(p.grad is not None and local(p.grad).any() for p in params)
            self.gone |= gone and self.seen != [] and local(params[0]) is params[0]
            self.seen = [one for one in self.seen if one[-1] is None and not gone]
        if not self.seen:
            self.expect_a_step()
        one = [*loss, now]  # the loss, g, whether it was divided, and the pass that it is in: None after it
        self.seen.append(one)

        def arrived():  # at the pass's end: an attack on the inputs has written nothing; FSDP holds gradients back
            self.left, one[-1] = self.writes(), None
            if self.left == before and local(params[0]) is params[0]:
                self.seen = [other for other in self.seen if other is not one]

        torch.autograd.Variable._execution_engine.queue_callback(arrived)

    def mean(self):  # L_t of what was seen since the last step
        total = math.fsum(float((g.double() * loss.double()).sum()) for loss, g, *_ in self.seen)
        weights, ranks = [float(g.sum()) for _, g, *_ in self.seen], number_of_ranks()
        weight = math.fsum(weights)
        if self.seen[0][2]:  # each is a part of L_t, and g the loss scale; or the ranks', by which DDP divides again
            if ranks > 1 and weights[0] not in (1, ranks):
                raise RuntimeError("several ranks share one batch at a loss scale: call policies.observe(loss)")
            weight = weights[0] if ranks == 1 else 1.0
        if not any(weights):  # loss * 0: a batch that was masked out
            total, weight = math.fsum(float(loss.mean()) for loss, *_ in self.seen), len(self.seen)
        return total / weight if weight else math.nan
