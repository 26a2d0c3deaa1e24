"""The methods that the paper compares and takes apart, a row each: what is changed before the first update, and which
weight set gets which K in which phase.

    row = METHODS["freeze-4-ffn"]
    row.start(model)                       # before param_groups
    SlowFast(optimizer, method=row.policies)

A new method is a new row.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

import slowfast
from slowfast import K, Method, places, set_sizes


class Row(NamedTuple):
    """A method. start(model) changes a model in place before its first update, from torch's global generator, and
    raises ValueError for a layer that the model does not have; `policies` are what SlowFast scales updates by."""

    about: str
    policies: Method = slowfast.METHODS["df"]
    start: Callable = lambda model: None


# --- what is changed before the first update (Sections 2.3 and 2.4, Appendix C) ------------------------------------
#
# Each of these makes a `start`. `layers` is a function of the depth. Whatever is neither embeddings nor in a layer
# counts as the head, a pooler too.


def noise(size):
    """NoisyTune (Wu et al. 2022): U(-size/2, size/2) std(W) is added to each pre-trained W, vectors too."""

    @torch.no_grad()
    def start(model):
        place, _ = places(model)
        for name, W in model.named_parameters():
            if place[name].part != "head" and W.numel() > 1:  # one number has no deviation
                W += (torch.rand_like(W) - 0.5) * size * W.std()

    return start


def freeze(layers, block=None):
    """These layers, or a block of them, do not train; the embeddings do."""

    def start(model):
        for _, parameter in parameters_of(model, layers, block):
            parameter.requires_grad_(False)

    return start


def reinit(layers, block=None):
    """These layers, or a block of them, start anew, as BERT is initialised: N(0, 0.02) matrices, zero biases,
    LayerNorm 1 and 0."""

    @torch.no_grad()
    def start(model):
        for name, parameter in parameters_of(model, layers, block):
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.02)
            else:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)

    return start


def last(k):
    """Only the last k layers and the head are trained; the embeddings are not."""

    def start(model):
        place, depth = places(model)
        for name, parameter in model.named_parameters():
            at = place[name]
            if at.part != "head" and (at.layer is None or at.layer < depth - k):
                parameter.requires_grad_(False)

    return start


def parameters_of(model, layers, block):
    """[(name, parameter)] of a block ("attention", "feed-forward", None for both) of these layers."""
    place, depth = places(model)
    if not set(layers(depth)) <= set(range(depth)):
        raise ValueError(f"layer {max(layers(depth))}: the model has layers 0-{depth - 1}")
    chosen = [name for name, at in place.items() if at.layer in layers(depth) and block in (None, at.block)]
    return [(name, parameter) for name, parameter in model.named_parameters() if name in set(chosen)]


def first_third(depth):
    """The layers 0-3 of 12, where S_II lies."""
    return range(set_sizes(depth)[1])


def one_layer(i):
    return lambda depth: range(i, i + 1)


# --- the rows ------------------------------------------------------------------------------------------------

METHODS = {
    "df": Row("directly fine-tune: K = 1"),
    "noisytune": Row("U(-0.075, 0.075) std(W) is added to each pre-trained W (Wu et al. 2022)", start=noise(0.15)),
    "fs": Row("fine-tuning slow, policies I and II", slowfast.METHODS["fs"]),
    "ff": Row("fine-tuning fast, policies III and IV", slowfast.METHODS["ff"]),
    "slowfast": Row("all four policies", slowfast.METHODS["slowfast"]),
    # Table 1
    "last-1": Row("only the last layer and the head are trained", start=last(1)),
    "last-2": Row("only the last two layers and the head are trained", start=last(2)),
    "last-3": Row("only the last three layers and the head are trained", start=last(3)),
    "freeze-4": Row("layers 0-3 do not train", start=freeze(first_third)),
    "freeze-4-attention": Row("their attention does not train", start=freeze(first_third, "attention")),
    "freeze-4-ffn": Row("their feed-forward does not train", start=freeze(first_third, "feed-forward")),
    "enlarge-2": Row("K = 10 for the last two layers", Method(P1=K(V_I=10), P2=K(V_I=10))),
    "enlarge-2-attention": Row("K = 10 for their attention", Method(P1=K(V_II=10), P2=K(V_II=10))),
    "enlarge-2-ffn": Row("K = 10 for their feed-forward", Method(P1=K(V_I_ffn=10), P2=K(V_I_ffn=10))),
    # Figure 3 (as many as XLM-R large has layers)
    **{f"freeze-layer-{i}": Row(f"layer {i} does not train", start=freeze(one_layer(i))) for i in range(24)},
    **{f"reinit-layer-{i}": Row(f"layer {i} starts anew", start=reinit(one_layer(i))) for i in range(24)},
    # Table 6
    "reinit-4": Row("layers 0-3 start anew", start=reinit(first_third)),
    "reinit-4-attention": Row("their attention starts anew", start=reinit(first_third, "attention")),
    "reinit-4-ffn": Row("their feed-forward starts anew", start=reinit(first_third, "feed-forward")),
    # Table 8: the other pair of policies stays as in slowfast
    "only-S_I": Row("I and II on S_I", Method(P1=K(S_I="c1"), P2=K(S_I="R", V_II="c2"))),
    "only-S_II": Row("I and II on S_II", Method(P1=K(S_II="c1"), P2=K(S_II="R", V_II="c2"))),
    "swap-S": Row("I on S_II, II on S_I", Method(P1=K(S_II="c1"), P2=K(S_I="R", V_II="c2"))),
    "only-V_I": Row("III and IV on V_I", Method(P1=K(S_I="c1"), P2=K(S_II="R", V_I="c2"))),
    "only-V_II": Row("III and IV on V_II", Method(P1=K(S_I="c1", V_I_ffn="c1"), P2=K(S_II="R", V_II="c2"))),
    "swap-V": Row("III on V_II, IV on V_I", Method(P1=K(S_I="c1", V_I_ffn="c1"), P2=K(S_II="R", V_I="c2"))),
}
