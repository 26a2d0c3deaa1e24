"""The rows of paper/methods.py against METHOD.md's table, which is written here apart: what a method changes before the
first update, parameter by parameter of Hugging Face's XLM-R, and which cell gets which K in which phase."""

import math
import re

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)

from paper.methods import METHODS
from paper.starts import policies_of, start
from slowfast import SlowFast, param_groups

ATTENTION, FFN = "attention", "feed-forward"
BOTH = (ATTENTION, FFN)
ONE_BLOCK = {"": BOTH, "-attention": (ATTENTION,), "-ffn": (FFN,)}


def xlmr(depth=12, hidden=8):
    """A small XLM-R with a classification head, all of its parameters random and of different spread."""
    sizes = {"vocab_size": 20, "hidden_size": hidden, "intermediate_size": 2 * hidden, "max_position_embeddings": 9}
    model = XLMRobertaForSequenceClassification(
        XLMRobertaConfig(num_hidden_layers=depth, num_attention_heads=2, type_vocab_size=2, num_labels=3, **sizes)
    )
    generator = torch.Generator().manual_seed(0)
    for i, p in enumerate(model.parameters()):
        p.data = torch.randn(p.shape, generator=generator) * (1 + i % 5) + 0.5
    return model


def started(method, model, seed=0):
    """(names of the parameters that `start` changed, of those that do not train any more)."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.manual_seed(seed)
    start(method, model)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    return changed, {name for name, p in model.named_parameters() if not p.requires_grad}


def of_layers(model, layers, blocks=BOTH):
    """The names of a block, or of both, of these layers."""
    found = set()
    for name, _ in model.named_parameters():
        at = re.search(r"\.encoder\.layer\.(\d+)\.(attention)?", name)
        if at and int(at[1]) in layers and (ATTENTION if at[2] else FFN) in blocks:
            found.add(name)
    return found


def pretrained(model):
    return {name for name, _ in model.named_parameters() if name.startswith("roberta.")}


# --- the table of Section 5 -----------------------------------------------------------------------------------

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
ENLARGED = {f"enlarge-2{block}": blocks for block, blocks in ONE_BLOCK.items()}
FROZEN = {f"freeze-4{block}": (range(4), blocks) for block, blocks in ONE_BLOCK.items()}
FROZEN |= {f"freeze-layer-{i}": ([i], BOTH) for i in range(12)}
ANEW = {name.replace("freeze", "reinit"): where for name, where in FROZEN.items()}
LAST = {f"last-{k}": k for k in (1, 2, 3)}
TABLE = ["df", "noisytune", *POLICIES, *ENLARGED, *FROZEN, *ANEW, *LAST]

CELLS = {"S_I-S_II": {"S_I"}, "S_II": {"S_I", "S_II"}, "V_I-V_II": {"V_I"}, "V_II": {"V_I", "V_II"}, "rest": set()}


def oracle_K(cell, method, in_first_phase, R, c1, c2, policy4):
    if method in ENLARGED:
        block = {"V_I-V_II": FFN, "V_II": ATTENTION}.get(cell)
        return 10 if block in ENLARGED[method] else 1
    one, two, three, four = POLICIES.get(method, (None,) * 4)
    sets = CELLS[cell]
    if in_first_phase:
        not_kept = three is not None and "V_I" in sets and three not in sets  # policy III does not keep it at 1
        return c1 if one in sets or not_kept else 1
    if two in sets:
        return R
    return c2 if four in sets and policy4 else 1


@pytest.mark.parametrize("policy4", ["on", "off"])
@pytest.mark.parametrize("method", TABLE)
def test_K_of_each_cell_in_each_phase(method, policy4):
    """The loss halves from 2 to 1 (P1) and from 0.16 to 0.08 (P2)."""
    optimizer = torch.optim.SGD([{"name": cell, "params": [torch.zeros(1)]} for cell in CELLS], lr=1.0)
    policies = SlowFast(optimizer, 0.02, 7, 2, method=policies_of(method), window=1, policy4=policy4)
    for loss, first in ((2, None), (1, True), (0.16, None), (0.08, False)):
        policies.observe(loss)
        if first is not None:
            assert policies.in_first_phase == first
            expected = {cell: oracle_K(cell, method, first, 1 - 0.5**2, 0.02, 7, policy4 == "on") for cell in CELLS}
            assert policies.multipliers == pytest.approx(expected)


def test_the_table_has_every_method_and_says_what_it_is():
    assert set(TABLE) <= set(METHODS)
    beyond = {f"{verb}-layer-{i}" for verb in ("freeze", "reinit") for i in range(12, 24)}  # of XLM-R large
    assert set(METHODS) - set(TABLE) == beyond
    assert all(row.about for row in METHODS.values())


# --- what is changed before the first update ------------------------------------------------------------------


@pytest.mark.parametrize("method", [method for method in TABLE if method != "noisytune"])
def test_what_a_method_freezes_and_starts_anew(method):
    model = xlmr()
    anew, frozen = (of_layers(model, *table.get(method, ((), BOTH))) for table in (ANEW, FROZEN))
    if method in LAST:  # the head trains, the embeddings do not
        frozen = pretrained(model) - of_layers(model, range(12 - LAST[method], 12))
    assert started(method, model) == (anew, frozen)


@pytest.mark.parametrize(
    ("method", "depth", "layers"),
    [("freeze-4", 6, range(2)), ("freeze-4", 24, range(8)), ("reinit-4", 24, range(8)), ("freeze-layer-23", 24, [23])],
)
def test_other_depths(method, depth, layers):
    model = xlmr(depth)
    assert set.union(*started(method, model)) == of_layers(model, layers)


def test_a_pooler_counts_as_the_head():
    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(num_hidden_layers=3, **sizes))
    names = {name for name, _ in model.named_parameters()}
    head = {name for name in names if name.startswith(("bert.pooler.", "classifier."))}
    assert len(head) == 4
    assert started("last-1", model) == (set(), names - head - {name for name in names if ".layer.2." in name})


def test_frozen_layers_leave_the_optimiser_and_the_others_keep_their_cells():
    whole, model = xlmr(), xlmr()
    _, frozen = started("freeze-4-ffn", model)
    cells, left = (
        {name: group["name"] for group in param_groups(m) for name, p in m.named_parameters()
         if any(p is q for q in group["params"])}
        for m in (whole, model)
    )  # fmt: skip
    assert left == {name: cell for name, cell in cells.items() if name not in frozen}
    assert "S_II" in cells.values() and "S_II" not in left.values()


def test_reinit_draws_berts_initialisation():
    """N(0, 0.02) matrices, each its own and seeded; zero biases; LayerNorm 1 and 0."""
    models = [xlmr(1, hidden=80) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2)):
        started("reinit-layer-0", model, seed)
    first, same, other = (dict(model.named_parameters()) for model in models)
    matrices = []
    for name in of_layers(models[0], [0]):
        p = first[name].detach()
        assert torch.equal(p, same[name])
        if p.dim() == 1:
            assert (p == float(name.endswith("LayerNorm.weight"))).all(), name
        else:
            assert not torch.equal(p, other[name])
            assert abs(p.mean()) < 5 * 0.02 / math.sqrt(p.numel())
            assert p.std().item() == pytest.approx(0.02, rel=5 / math.sqrt(2 * p.numel()))
            assert p.abs().max() > 0.06  # a normal distribution's tail; a uniform one would end at 0.035
            matrices.append(p)
    assert len(matrices) == 6 and not torch.equal(matrices[0][:80, :80], matrices[1][:80, :80])


def test_noisytune():
    """Uniform noise within 0.075 standard deviations of each pre-trained tensor, vectors too; none for the head, and
    none for a tensor of one number."""
    models = [xlmr(1, hidden=80).double() for _ in range(3)]
    for model in models:
        model.roberta.encoder.layer[0].attention.self.query.bias = torch.nn.Parameter(torch.tensor([0.7]))
    before = {name: p.detach().clone() for name, p in models[0].named_parameters()}
    changed = [started("noisytune", model, seed)[0] for model, seed in zip(models, (1, 1, 2))]
    first, same, other = (dict(model.named_parameters()) for model in models)
    noisy = pretrained(models[0]) - {"roberta.encoder.layer.0.attention.self.query.bias"}
    assert changed == [noisy] * 3 and all(p.requires_grad for p in first.values())
    for name in noisy:
        assert torch.equal(first[name], same[name]) and not torch.equal(first[name], other[name])
        relative = (first[name].detach() - before[name]).flatten().numpy() / np.std(before[name].numpy(), ddof=1)
        n, spread = relative.size, 0.15 / math.sqrt(12)  # of a uniform distribution of width 0.15
        assert 0.075 * (1 - 20 / n) < np.abs(relative).max() <= 0.075 * (1 + 1e-9), name
        assert abs(relative.mean()) < 5 * spread / math.sqrt(n), name
        assert relative.std() == pytest.approx(spread, rel=5 / math.sqrt(n)), name
        # every number is drawn by itself: neighbours do not go together
        assert abs(np.corrcoef(relative[:-1], relative[1:])[0, 1]) < 6 / math.sqrt(n), name


@pytest.mark.parametrize(
    ("method", "depth"),
    [("freeze-layer-6", 6), ("reinit-layer-12", 12), ("freeze-layer-23", 12), ("reinit-layer-1", 1)],
)
def test_a_layer_that_is_not_there_raises(method, depth):
    with pytest.raises(ValueError, match=rf"layer {method.rpartition('-')[2]}\b.* 0-{depth - 1}\b"):
        start(method, xlmr(depth))
