"""What a method's row (methods.py) stands for: how a model is changed before its first update (Sections 2.3 and 2.4,
Appendix C), and the policies that its updates are scaled by.

Whatever is neither embeddings nor in a layer counts as the head, a pooler too.
"""

import torch

import slowfast
from paper.methods import FIRST_THIRD, METHODS
from slowfast import places, set_sizes


def policies_of(method):
    """What SlowFast scales the updates of a method by."""
    policies = METHODS[method].policies
    if isinstance(policies, str):
        return slowfast.METHODS[policies]
    return slowfast.Method(*(slowfast.K(**sets) for sets in policies))


@torch.no_grad()
def start(method, model):
    """Changes a model in place before its first update, from torch's global generator. Raises ValueError for a layer
    that the model does not have."""
    if METHODS[method].start:
        change, *arguments = METHODS[method].start
        STARTS[change](model, *arguments)


def noise(model, size):
    """NoisyTune (Wu et al. 2022): U(-size/2, size/2) std(W) is added to each pre-trained W, vectors too."""
    place, _ = places(model)
    for name, W in model.named_parameters():
        if place[name].part != "head" and W.numel() > 1:  # one number has no deviation
            W += (torch.rand_like(W) - 0.5) * size * W.std()


def freeze(model, layers, block=None):
    """These layers, or a block of them, do not train; the embeddings do."""
    for _, parameter in parameters_of(model, layers, block):
        parameter.requires_grad_(False)


def reinit(model, layers, block=None):
    """These layers, or a block of them, start anew, as BERT is initialised: N(0, 0.02) matrices, zero biases,
    LayerNorm 1 and 0."""
    for name, parameter in parameters_of(model, layers, block):
        if parameter.dim() > 1:
            parameter.normal_(0.0, 0.02)
        else:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)


def last(model, k):
    """Only the last k layers and the head are trained; the embeddings are not."""
    place, depth = places(model)
    for name, parameter in model.named_parameters():
        at = place[name]
        if at.part != "head" and (at.layer is None or at.layer < depth - k):
            parameter.requires_grad_(False)


STARTS = {"noise": noise, "freeze": freeze, "reinit": reinit, "last": last}


def parameters_of(model, layers, block):
    """[(name, parameter)] of a block ("attention", "feed-forward", None for both) of a layer, or of the first third."""
    place, depth = places(model)
    layers = range(set_sizes(depth)[1]) if layers == FIRST_THIRD else [layers]
    if not set(layers) <= set(range(depth)):
        raise ValueError(f"layer {max(layers)}: the model has layers 0-{depth - 1}")
    chosen = {name for name, at in place.items() if at.layer in layers and block in (None, at.block)}
    return [(name, parameter) for name, parameter in model.named_parameters() if name in chosen]
