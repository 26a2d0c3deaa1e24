"""The network against transformers', its files in both directions, and the conversion of the packed model."""

import copy
import json
import struct
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertModel,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
    XLMRobertaForQuestionAnswering,
    XLMRobertaForSequenceClassification,
    XLMRobertaForTokenClassification,
    XLMRobertaModel,
)

import model as xlmr
import slowfast
from data import InputError

LABELS = ("entailment", "neutral", "contradiction")
TINY = {
    "vocab_size": 100, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 3,
    "max_position_embeddings": 40, "type_vocab_size": 1, "layer_norm_eps": 1e-5,
}  # fmt: skip
BASE = {
    "vocab_size": 1000, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072,
    "num_hidden_layers": 12, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5,
}  # fmt: skip


def reference(kind=XLMRobertaForSequenceClassification, std=0.1, **sizes):
    """A model of transformers', random in every parameter, with the plain attention."""
    config = XLMRobertaConfig(
        **{**TINY, **sizes}, id2label=dict(enumerate(LABELS)), label2id={name: i for i, name in enumerate(LABELS)},
        attn_implementation="eager",
    )  # fmt: skip
    model = kind(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(0.0, std).add_(float(name.endswith("LayerNorm.weight")))
    return model.eval()


def batch(lengths, vocabulary, seed=0):
    """Random <s> ... </s> of these lengths, padded with 1: (batch, longest)."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.ones(len(lengths), max(lengths), dtype=torch.long)
    for row, length in zip(ids, lengths):
        row[:length] = torch.randint(4, vocabulary, (length,), generator=random)
        row[0], row[length - 1] = 0, 2
    return ids


def theirs(model, ids, **options):
    return model(input_ids=ids, attention_mask=(ids != 1).long(), **options)


def near(ours, expected, tolerance=1e-5):
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


def saved(folder, change=None, dtype=torch.float32, **sizes):
    """A folder as transformers saves a classifier; `change` edits {name: tensor} first. Returns the model too."""
    model = reference(**sizes)
    model.save_pretrained(folder)
    weights = {name: w.to(dtype) for name, w in load_file(folder / "model.safetensors").items()}
    if change:
        change(weights)
    save_file({name: w.contiguous() for name, w in weights.items()}, folder / "model.safetensors")
    return model


def fails(*says, folder, **options):
    """load(folder) raises an InputError whose message is one line that says all this."""
    with pytest.raises(InputError) as error:
        xlmr.load(folder, **options)
    message = str(error.value)
    assert "\n" not in message and all(str(text) in message for text in says), message


# --- the network ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "std", "lengths"),
    [
        (TINY, 0.1, (12, 3, 38, 25)),
        ({**TINY, "type_vocab_size": 2, "num_attention_heads": 1, "layer_norm_eps": 1e-12}, 0.1, (9, 9)),
        ({**TINY, "max_position_embeddings": 514}, 0.1, (512, 100)),
        (BASE, 0.03, (30, 17, 5)),
    ],
    ids=["tiny", "another tiny", "full length", "base"],
)
def test_logits_and_all_hidden_states_are_those_of_transformers(sizes, std, lengths):
    expected = reference(std=std, **sizes)
    with torch.device("meta"):
        ours = xlmr.SequenceClassifier(xlmr.Config(**sizes, labels=LABELS))
    ours.load_state_dict(expected.state_dict(), assign=True)  # strict: the names are the same, all of them
    ours.eval()
    ids = batch(lengths, sizes["vocab_size"])
    with torch.no_grad():
        output = theirs(expected, ids, output_hidden_states=True)
        states = ours.roberta.hidden_states(ids)
        near(ours(ids), output.logits)
    real = ids != 1
    assert len(states) == len(output.hidden_states) == sizes["num_hidden_layers"] + 1
    for state, other in zip(states, output.hidden_states):
        near(state[real], other[real])
    assert output.logits.std() > 0.01  # the comparison says something


def test_gradients_are_those_of_transformers():
    expected = reference()
    ours = xlmr.SequenceClassifier(xlmr.Config(**TINY, labels=LABELS)).eval()
    ours.load_state_dict(expected.state_dict())
    ids, labels = batch((12, 3, 30), 100), torch.tensor([2, 0, 1])
    torch.nn.functional.cross_entropy(ours(ids), labels).backward()
    theirs(expected, ids, labels=labels).loss.backward()
    gradients = {name: p.grad for name, p in expected.named_parameters()}
    for name, p in ours.named_parameters():
        near(p.grad, gradients[name])
        assert gradients[name].abs().max() > 1e-4 or name.endswith("key.bias"), name  # that one's is 0 by its nature


def test_padding_changes_nothing():
    ours = xlmr.SequenceClassifier(xlmr.Config(**TINY)).eval()
    ids = batch((5, 12), 100)
    near(ours(ids)[:1], ours(ids[:1, :5]))


def test_dropout_is_active_in_training_alone():
    ours = xlmr.SequenceClassifier(xlmr.Config(**TINY))
    ids = batch((12, 12), 100)
    assert not torch.equal(ours(ids), ours(ids))
    ours.eval()
    assert torch.equal(ours(ids), ours(ids))


def test_initialisation_is_berts():
    part = xlmr.SequenceClassifier(xlmr.Config(**{**TINY, "vocab_size": 1000}))
    with torch.no_grad():
        for p in part.parameters():
            p.fill_(7.0)
    xlmr.initialise(part)
    for name, p in part.named_parameters():
        if "LayerNorm" in name:
            assert (p == float(name.endswith("weight"))).all()
        elif name.endswith("bias"):
            assert (p == 0).all()
        else:
            assert p.abs().max() < 0.12 and (p.numel() < 500 or 0.018 < p.std() < 0.022), name
    assert (part.roberta.embeddings.word_embeddings.weight[1] == 0).all()


# --- the heads of the other tasks ----------------------------------------------------------------------------

TAGS = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG")
IGNORED = -100
LENGTHS = (12, 3, 38, 25)
OTHERS = {  # our class, transformers', what loads either, the labels
    "tokens": (xlmr.TokenClassifier, XLMRobertaForTokenClassification, AutoModelForTokenClassification, TAGS),
    "questions": (xlmr.QuestionAnswering, XLMRobertaForQuestionAnswering, AutoModelForQuestionAnswering,
                  ("start", "end")),
}  # fmt: skip
heads = pytest.mark.parametrize("head", OTHERS)


def pair_of(head):
    """Our model and transformers' with the same weights, random in all of them, without dropout."""
    ours, kind, _, labels = OTHERS[head]
    config = XLMRobertaConfig(**TINY, num_labels=len(labels), attn_implementation="eager")
    expected = kind(config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in expected.named_parameters():
            p.normal_(0.0, 0.1).add_(float(name.endswith("LayerNorm.weight")))
    ours = ours(xlmr.Config(**TINY, labels=labels)).eval()
    ours.load_state_dict(expected.state_dict())  # strict: the names are the same, all of them
    return ours, expected


def logits_of(output):
    """What transformers' model said, in our layout: (batch, length, labels or start and end)."""
    return output.logits if "logits" in output else torch.stack([output.start_logits, output.end_logits], 2)


def some_labels(head, ids):
    """Labels for a batch: tags of some tokens, the others IGNORED, or the first and last token of an answer."""
    random = torch.Generator().manual_seed(1)
    if head == "tokens":
        labels = torch.randint(0, len(TAGS), ids.shape, generator=random)
        unlabelled = (torch.rand(ids.shape, generator=random) < 0.4) | (ids == 1)
        unlabelled[:, 1] = False  # each sentence has a label, or transformers' loss of it is not a number
        return labels.masked_fill(unlabelled, IGNORED)
    lengths = (ids != 1).sum(1)
    return torch.stack([torch.zeros_like(lengths), lengths - 2], 1)


def sum_of_losses(head, expected, ids, labels):
    """The sum of the cross-entropies of all labels by transformers' own losses, means over windows without padding."""
    total = 0.0
    for row, label in zip(ids, labels):
        length = int((row != 1).sum())
        if head == "tokens":
            loss = theirs(expected, row[None, :length], labels=label[None, :length]).loss
            total = total + loss * (label != IGNORED).sum()
        else:
            ends = {"start_positions": label[:1], "end_positions": label[1:]}
            total = total + 2 * theirs(expected, row[None, :length], **ends).loss
    return total


@heads
def test_a_heads_logits_are_those_of_transformers(head):
    ours, expected = pair_of(head)
    ids = batch(LENGTHS, 100)
    with torch.no_grad():
        found, other = ours(ids), logits_of(theirs(expected, ids))
    real = ids != 1
    assert found.shape == (*ids.shape, len(ours.config.labels))
    near(found[real], other[real])
    assert other[real].std() > 0.1  # the comparison says something
    assert head == "tokens" or (found[~real] == -torch.inf).all()


@heads
def test_a_heads_loss_and_its_gradients_are_those_of_transformers(head):
    """On a batch with padding, against transformers' on each window alone."""
    ours, expected = pair_of(head)
    ids = batch(LENGTHS, 100)
    labels = some_labels(head, ids)
    zero = ("key.bias",)  # 0 by its nature; and so is what moves the logits of all tokens alike, if they compete
    zero += ("layer.2.output.LayerNorm.bias", "qa_outputs.bias") if head == "questions" else ()
    loss = ours.loss(ours(ids), labels)
    other = sum_of_losses(head, expected, ids, labels)
    near(loss, other)
    loss.backward()
    other.backward()
    gradients = {name: p.grad for name, p in expected.named_parameters()}
    for name, p in ours.named_parameters():
        near(p.grad, gradients[name], 1e-4)  # of a sum of up to 50 losses
        assert gradients[name].abs().max() > 1e-3 or name.endswith(zero), name


def test_the_loss_of_a_batch_of_tags_is_a_mean_that_transformers_takes():
    ours, expected = pair_of("tokens")
    ids = batch(LENGTHS, 100)
    labels = some_labels("tokens", ids)
    near(ours.loss(ours(ids), labels) / (labels != IGNORED).sum(), theirs(expected, ids, labels=labels).loss)


@heads
def test_a_label_that_is_ignored_adds_nothing_to_the_loss(head):
    ours, _ = pair_of(head)
    ids = batch(LENGTHS, 100)
    labels = some_labels(head, ids)
    logits = ours(ids)
    without = labels.clone()
    without[2] = IGNORED
    others = torch.tensor([0, 1, 3])
    near(ours.loss(logits, without), ours.loss(logits[others], labels[others]))
    assert ours.loss(logits, labels) > ours.loss(logits, without) + 0.1


@pytest.mark.parametrize("head", [*OTHERS, "pairs"])
def test_a_batch_whose_labels_are_all_ignored_has_no_loss_and_no_gradient(head):
    ours = pair_of(head)[0] if head in OTHERS else xlmr.SequenceClassifier(xlmr.Config(**TINY))
    ids = batch(LENGTHS, 100)
    labels = torch.full({"tokens": ids.shape, "questions": (4, 2), "pairs": (4,)}[head], IGNORED)
    loss = ours.loss(ours(ids), labels)
    loss.backward()
    assert loss == 0
    assert all((p.grad == 0).all() for p in ours.parameters())


@heads
def test_padding_changes_no_logits_and_no_loss_of_a_head(head):
    ours, _ = pair_of(head)
    ids = batch((5, 12), 100)
    padded, alone = ours(ids)[:1], ours(ids[:1, :5])
    near(padded[:, :5], alone)
    labels = some_labels(head, ids)[:1]
    near(ours.loss(padded, labels), ours.loss(alone, labels[:, :5]))


@heads
def test_a_head_that_is_saved_loads_in_transformers(tmp_path, head):
    ours, _ = pair_of(head)
    _, kind, auto, labels = OTHERS[head]
    xlmr.save(ours, tmp_path)
    loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert type(loaded) is kind and loaded.config.id2label == dict(enumerate(labels))
    assert loaded.config.label2id == {label: i for i, label in enumerate(labels)}
    ids = batch(LENGTHS, 100)
    real = ids != 1
    near(ours(ids)[real], logits_of(theirs(loaded.eval(), ids))[real])


@heads
def test_a_head_of_transformers_loads_in_ours(tmp_path, head):
    kind, _, _, labels = OTHERS[head]
    _, expected = pair_of(head)
    expected.config.id2label = dict(enumerate(labels))
    expected.save_pretrained(tmp_path)
    ours = xlmr.load(tmp_path, architecture=kind).eval()
    assert type(ours) is kind and ours.config.labels == labels
    ids = batch(LENGTHS, 100)
    real = ids != 1
    near(ours(ids)[real], logits_of(theirs(expected, ids))[real])


@heads
def test_a_head_that_the_file_lacks_is_drawn_from_the_seed(tmp_path, head):
    kind, _, _, labels = OTHERS[head]
    reference(XLMRobertaForMaskedLM).save_pretrained(tmp_path)

    def new(seed):
        torch.manual_seed(seed)
        model = xlmr.load(tmp_path, labels, kind)
        return model.classifier if head == "tokens" else model.qa_outputs

    one, same, other = new(1), new(1), new(2)
    assert one.weight.shape == (len(labels), 32) and (one.bias == 0).all() and 0.01 < one.weight.std() < 0.03
    assert torch.equal(one.weight, same.weight) and not torch.equal(one.weight, other.weight)


# --- dropout -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 1 / 65536, 0.1, 0.3, 0.5, 0.9, 0.99])
def test_dropout_drops_this_part_of_all_that_a_random_number_can_be(monkeypatch, p):
    """p is exact within 1/65536, and the mean is kept: 16 bits decide, and here they take each value once."""

    def every_value(self, *_):
        self.view(torch.int16)[:65536] = torch.arange(-32768, 32768)
        return self

    monkeypatch.setattr(torch.Tensor, "random_", every_value)
    x = xlmr.dropout(torch.ones(65536), p)
    kept = int((x != 0).sum())
    assert abs((65536 - kept) / 65536 - p) <= 0.5 / 65536
    assert len(x[x != 0].unique()) == 1
    assert x.double().mean() == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_what_dropout_drops_looks_random(p):
    """Each place, and each two places at a distance of up to eight, as often as they should: five deviations."""
    torch.manual_seed(0)
    times, places = 4000, 63  # odd: the last random number is used in part
    ones = torch.ones(7, 9)
    dropped = torch.stack([xlmr.dropout(ones, p).flatten() == 0 for _ in range(times)]).double()

    def within(counts, n, q):
        return ((counts - n * q).abs() < 5 * (n * q * (1 - q)) ** 0.5).all()

    assert within(dropped.sum(0), times, p)
    for distance in range(1, 9):
        together = (dropped[:, distance:] * dropped[:, : places - distance]).sum(0)
        assert within(together, times, p * p), distance
    assert within((dropped[1:] * dropped[:-1]).sum(0), times - 1, p * p)  # and from one call to the next


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_keeps_the_mean_and_has_the_variance_it_should(dtype):
    torch.manual_seed(0)
    n, p = 1_000_003, 0.1
    x = xlmr.dropout(torch.full((n,), 2.0, dtype=dtype), p)
    assert x.dtype == dtype
    deviation = 2 * (p / (1 - p)) ** 0.5
    rounding = 2 * torch.finfo(dtype).eps  # of the scale, 1 / 0.9
    assert x.double().mean() == pytest.approx(2.0, abs=5 * deviation / n**0.5 + rounding)
    assert x.double().std() == pytest.approx(deviation, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (3,), (4,), (5, 1, 7), (2, 3, 33), (0, 5)], ids=str)
def test_dropout_takes_every_size(dtype, shape):
    torch.manual_seed(0)
    x = (torch.randn(shape) + 10).to(dtype)
    for _ in range(20):
        y = xlmr.dropout(x, 0.5)
        assert y.shape == x.shape and y.dtype == dtype
        assert torch.equal(y, torch.where(y == 0, 0, 2 * x))


def test_dropout_of_what_does_not_lie_in_one_piece():
    torch.manual_seed(0)
    x = (torch.randn(12, 10, 9) + 10).transpose(0, 2)[:, ::3]
    assert not x.is_contiguous()
    y = xlmr.dropout(x, 0.5)
    assert torch.equal(y, torch.where(y == 0, 0, 2 * x)) and 0.3 < (y == 0).float().mean() < 0.7


def test_the_seed_of_torch_decides_what_dropout_drops():
    def drop(seed):
        torch.manual_seed(seed)
        return xlmr.dropout(torch.ones(500), 0.3), xlmr.dropout(torch.ones(500), 0.3)

    (a, next_a), (b, next_b), (c, _) = drop(1), drop(1), drop(2)
    assert torch.equal(a, b) and torch.equal(next_a, next_b)
    assert not torch.equal(a, c) and not torch.equal(a, next_a)


def test_the_gradient_of_dropout_is_its_mask():
    torch.manual_seed(0)
    x = (torch.randn(31, 5) + 10).requires_grad_()
    y = xlmr.dropout(x, 0.2)
    gradient = torch.randn(31, 5)
    y.backward(gradient)
    near(x.grad, torch.where(y == 0, 0, gradient / 0.8), 1e-4)  # p is rounded
    assert 0 < (y == 0).sum() < 155


def test_dropout_of_zero_is_the_identity():
    x = torch.randn(31, 5)
    assert torch.equal(xlmr.dropout(x, 0.0), x)
    assert torch.equal(xlmr.Dropout(0.0)(x), x)


def test_the_dropout_layer_drops_in_training_alone():
    layer, x = xlmr.Dropout(0.5), torch.randn(31, 5)
    torch.manual_seed(0)
    assert (layer(x) == 0).any()
    assert layer.eval()(x) is x


@pytest.mark.parametrize("head", [*OTHERS, "pairs"])
def test_a_model_that_is_evaluated_drops_nothing(head):
    ours = pair_of(head)[0] if head in OTHERS else xlmr.SequenceClassifier(xlmr.Config(**TINY))
    ids = batch((12, 12), 100)
    assert not torch.equal(ours.train()(ids), ours(ids))
    assert torch.equal(ours.eval()(ids), ours(ids))


def test_attention_with_dropout_is_attention_apart_from_the_dropout(monkeypatch):
    """On a CPU the attention of training is written out: forward and gradients are the fused one's, padding too."""
    dropped = []
    monkeypatch.setattr(xlmr, "dropout", lambda x, p: dropped.append((x, p)) or x)
    torch.manual_seed(0)
    attention = xlmr.SelfAttention(xlmr.Config(**TINY, attention_probs_dropout_prob=0.3)).train()
    mask = (batch((9, 4, 7), 100) != 1)[:, None, None, :]
    x, gradient = torch.randn(3, 9, 32), torch.randn(3, 9, 32)

    def run(compute):
        inputs = x.clone().requires_grad_()
        attention.zero_grad()
        y = compute(inputs)
        y.backward(gradient)
        return [y, inputs.grad, *(p.grad.clone() for p in attention.parameters())]

    def fused(inputs):
        q, k, v = (
            part(inputs).unflatten(2, (4, 8)).transpose(1, 2)
            for part in (attention.query, attention.key, attention.value)
        )
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return y.transpose(1, 2).flatten(2)

    ours, expected = run(lambda inputs: attention(inputs, mask)), run(fused)
    (weights, p), *more = dropped
    assert p == 0.3 and more == []  # the written-out one it was
    assert weights.shape == (3, 4, 9, 9) and (weights.masked_select(~mask) == 0).all()
    near(weights.sum(3), torch.ones(3, 4, 9))
    for found, other in zip(ours, expected, strict=True):
        near(found, other)
    assert expected[1].abs().max() > 0.01


def test_attention_drops_its_weights_in_training():
    torch.manual_seed(0)
    attention = xlmr.SelfAttention(xlmr.Config(**TINY, attention_probs_dropout_prob=0.5))
    x, mask = torch.randn(2, 9, 32), torch.ones(2, 1, 1, 9, dtype=torch.bool)
    mean = torch.stack([attention(x, mask) for _ in range(2000)]).mean(0)
    assert not torch.equal(attention(x, mask), attention(x, mask))
    whole = attention.eval()(x, mask)
    assert (mean - whole).abs().max() < 0.1 * whole.abs().max()  # dropout changes no mean


@pytest.mark.parametrize(
    ("options", "hidden", "attention"),
    [({"hidden_dropout_prob": 0.3}, 0.3, 0.2), ({"attention_probs_dropout_prob": 0.0}, 0.1, 0.0), ({}, 0.1, 0.2)],
)
def test_load_takes_other_dropout_than_the_configs(tmp_path, options, hidden, attention):
    saved(tmp_path / "theirs")
    edit_config(tmp_path / "theirs", attention_probs_dropout_prob=0.2)  # hidden_dropout_prob is 0.1
    ours = xlmr.load(tmp_path / "theirs", **options)
    probabilities = {module.p for module in ours.modules() if isinstance(module, torch.nn.Dropout)}
    assert probabilities == {hidden}
    assert {m.dropout for m in ours.modules() if isinstance(m, xlmr.SelfAttention)} == {attention}
    xlmr.save(ours, tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert (config["hidden_dropout_prob"], config["attention_probs_dropout_prob"]) == (hidden, attention)
    assert xlmr.load(tmp_path / "ours").config == ours.config


# --- loading -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_load_reads_every_float_format(tmp_path, dtype):
    expected = saved(tmp_path, dtype=dtype).to(dtype).float()
    ours = xlmr.load(tmp_path).eval()
    assert {p.dtype for p in ours.parameters()} == {torch.float32} and all(p.requires_grad for p in ours.parameters())
    ids = batch((12, 3, 25), 100)
    near(ours(ids), theirs(expected, ids).logits)
    assert ours.config.labels == LABELS


def test_load_reads_shards(tmp_path):
    expected = reference()
    expected.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2 and not (tmp_path / "model.safetensors").exists()
    ids = batch((12, 3, 25), 100)
    near(xlmr.load(tmp_path).eval()(ids), theirs(expected, ids).logits)


@pytest.mark.parametrize("kind", [XLMRobertaModel, XLMRobertaForMaskedLM], ids=["bare", "masked LM"])
def test_load_takes_the_encoder_and_makes_a_seeded_head(tmp_path, kind):
    expected = reference(kind)
    expected.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    prefix = "" if kind is XLMRobertaModel else "roberta."
    assert f"{prefix}embeddings.LayerNorm.bias" in weights
    weights[f"{prefix}embeddings.position_ids"] = torch.arange(40)[None]
    weights[f"{prefix}pooler.dense.weight"] = torch.zeros(32, 32)
    weights["lm_head.decoder.weight"] = torch.zeros(100, 32)
    save_file(weights, tmp_path / "model.safetensors")

    def load(seed):
        torch.manual_seed(seed)
        return xlmr.load(tmp_path, LABELS).eval()

    ours, same, other = load(1), load(1), load(2)
    ids = batch((12, 3, 25), 100)
    encoder = expected if kind is XLMRobertaModel else expected.roberta
    near(ours.roberta(ids)[ids != 1], theirs(encoder, ids).last_hidden_state[ids != 1])
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), same.parameters(), strict=True))
    assert not torch.equal(ours.classifier.dense.weight, other.classifier.dense.weight)
    assert ours(ids).shape == (3, 3) and ours.config.labels == LABELS
    for part in (ours.classifier.dense, ours.classifier.out_proj):
        assert (part.bias == 0).all() and 0.01 < part.weight.std() < 0.03


@pytest.mark.parametrize("name", ["classifier.out_proj.bias", "classifier.dense.weight"])
def test_a_head_comes_whole_or_not_at_all(tmp_path, name):
    expected = saved(tmp_path, lambda weights: weights.pop(name))
    ours = xlmr.load(tmp_path)
    assert (ours.classifier.out_proj.bias == 0).all() and (ours.classifier.dense.bias == 0).all()
    assert not torch.equal(ours.classifier.out_proj.weight, expected.classifier.out_proj.weight)
    assert torch.equal(ours.roberta.embeddings.LayerNorm.bias, expected.roberta.embeddings.LayerNorm.bias)


def test_a_loaded_model_does_not_hold_the_file(tmp_path):
    saved(tmp_path)
    ours = xlmr.load(tmp_path)
    before = copy.deepcopy(ours.state_dict())
    file = tmp_path / "model.safetensors"
    with open(file, "r+b") as f:
        f.write(bytes(file.stat().st_size))
    assert all(torch.equal(w, before[name]) for name, w in ours.state_dict().items())


# --- saving --------------------------------------------------------------------------------------------------


def test_what_is_saved_loads_in_transformers(tmp_path):
    torch.manual_seed(0)
    ours = xlmr.SequenceClassifier(xlmr.Config(**{**TINY, "layer_norm_eps": 1e-12}, labels=LABELS)).eval()
    xlmr.save(ours, tmp_path / "a" / "b")
    loaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "a" / "b", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert type(loaded) is XLMRobertaForSequenceClassification
    assert loaded.config.id2label == dict(enumerate(LABELS)) and loaded.config.label2id["contradiction"] == 2
    assert (loaded.config.layer_norm_eps, loaded.config.pad_token_id) == (1e-12, 1)
    ids = batch((12, 3, 25), 100)
    near(ours(ids), theirs(loaded.eval(), ids).logits)


def test_what_is_saved_loads_back(tmp_path):
    ours = xlmr.load(saved(tmp_path / "theirs") and tmp_path / "theirs")
    (tmp_path / "pieces").write_bytes(b"pieces")
    xlmr.save(ours, tmp_path / "ours", tokenizer=tmp_path / "pieces")
    again = xlmr.load(tmp_path / "ours")
    assert again.config == ours.config
    assert all(torch.equal(w, again.state_dict()[name]) for name, w in ours.state_dict().items())
    names = ["config.json", "model.safetensors", "sentencepiece.bpe.model"]
    assert sorted(file.name for file in (tmp_path / "ours").iterdir()) == names
    assert (tmp_path / "ours" / "sentencepiece.bpe.model").read_bytes() == b"pieces"


def test_a_save_that_fails_leaves_the_last_one(tmp_path, monkeypatch):
    ours = xlmr.SequenceClassifier(xlmr.Config(**TINY))
    xlmr.save(ours, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(weights, file, metadata):
        file.write_bytes(b"half")
        raise xlmr.SafetensorError("No space left on device")

    monkeypatch.setattr(xlmr, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        xlmr.save(ours, tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


# --- bad files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [lambda c: c[: len(c) // 2], lambda c: c[:-1], lambda c: c[:300], lambda c: c[:4], lambda c: b"",
     lambda c: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", lambda c: b"\x80\x02}q\x00." * 500],
    ids=["half", "a byte short", "in the header", "four bytes", "empty", "pointer", "a pickle"],
)  # fmt: skip
def test_a_file_that_is_not_whole_is_refused(tmp_path, damage):
    saved(tmp_path)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(damage(content))
    fails(file, "not a whole safetensors file", folder=tmp_path)


def test_a_missing_file_is_named(tmp_path):
    saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    fails(tmp_path / "model.safetensors", "no such file", folder=tmp_path)
    fails(tmp_path / "none" / "config.json", "no such file", folder=tmp_path / "none")


@pytest.mark.parametrize("name", ["embeddings.word_embeddings.weight", "encoder.layer.2.output.LayerNorm.bias"])
def test_a_missing_weight_is_named(tmp_path, name):
    saved(tmp_path, lambda weights: weights.pop(f"roberta.{name}"))
    fails(tmp_path, f"roberta.{name}", "missing", folder=tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "roberta.encoder.layer.1.attention.self.query.weight",
        "roberta.embeddings.LayerNorm.bias",
        "classifier.out_proj.weight",
    ],
)
def test_a_wrong_shape_is_named(tmp_path, name):
    saved(tmp_path, lambda weights: weights.update({name: torch.zeros(7, 5)}))
    fails(tmp_path / "model.safetensors", name, "(7, 5)", folder=tmp_path)


def edit_config(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return file


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"vocab_size": 99}, "roberta.embeddings.word_embeddings.weight is (100, 32), config.json asks for (99, 32)"),
        ({"max_position_embeddings": 514}, "roberta.embeddings.position_embeddings.weight"),
        ({"intermediate_size": 128}, "intermediate.dense"),
        ({"num_hidden_layers": 4}, "roberta.encoder.layer.3."),
        ({"num_hidden_layers": 2}, "roberta.encoder.layer.2."),
        ({"id2label": {"0": "no", "1": "yes"}}, "classifier.out_proj"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_that_does_not_fit_the_weights(tmp_path, values, says):
    saved(tmp_path)
    edit_config(tmp_path, **values)
    fails(tmp_path, says, folder=tmp_path)


@pytest.mark.parametrize("kind", [XLMRobertaModel, XLMRobertaForMaskedLM], ids=["bare", "masked LM"])
def test_more_layers_than_the_config_says(tmp_path, kind):
    reference(kind).save_pretrained(tmp_path)
    edit_config(tmp_path, num_hidden_layers=2)
    fails(tmp_path / "model.safetensors", "encoder.layer.2.", folder=tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"text"', "\ufeff{}", b"\xff\xfe", "<html></html>"])
def test_a_config_that_is_not_json_of_a_model(tmp_path, text):
    saved(tmp_path)
    file = tmp_path / "config.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    fails(file, "not a model's config.json", folder=tmp_path)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"model_type": "bert"}, "model_type is 'bert'"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"num_attention_heads": 5}, "hidden_size"),
        ({"num_hidden_layers": 0}, ""),
        ({"hidden_size": -32}, ""),
        ({"hidden_size": "wide"}, "wide"),
        ({"hidden_size": float("inf")}, ""),
        ({"vocab_size": None}, ""),
        ({"vocab_size": 10**18}, ""),
        ({"hidden_dropout_prob": 1.5}, ""),
        ({"id2label": {"0": "a", "2": "b"}}, ""),
        ({"id2label": ["a", "b"]}, ""),
    ],
    ids=lambda value: "-".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_a_config_of_another_model_or_of_none(tmp_path, values, says):
    saved(tmp_path)
    fails(edit_config(tmp_path, **values), says, folder=tmp_path)


def shards(tmp_path):
    """A sharded model: its folder, its index file, and what the index holds."""
    reference().save_pretrained(tmp_path, max_shard_size="30KB")
    index = tmp_path / "model.safetensors.index.json"
    return index, json.loads(index.read_text())


def test_a_missing_shard_is_named(tmp_path):
    _, content = shards(tmp_path)
    shard = tmp_path / content["weight_map"]["roberta.encoder.layer.1.output.dense.weight"]
    shard.unlink()
    fails(shard, "no such file", folder=tmp_path)


@pytest.mark.parametrize("place", ["../elsewhere.safetensors", "/elsewhere.safetensors", "a/b.safetensors"])
def test_an_index_that_leads_outside_the_folder(tmp_path, place):
    folder = tmp_path / "model"
    index, content = shards(folder)
    name = "roberta.encoder.layer.1.output.dense.weight"
    save_file({name: torch.zeros(32, 64)}, tmp_path / "elsewhere.safetensors")
    content["weight_map"][name] = place
    index.write_text(json.dumps(content))
    fails(index, place, folder=folder)


@pytest.mark.parametrize("change", ["absent", "unlisted"])
def test_an_index_that_does_not_fit_its_shards(tmp_path, change):
    index, content = shards(tmp_path)
    name = "roberta.encoder.layer.1.output.dense.weight"
    if change == "absent":
        content["weight_map"]["roberta.encoder.layer.1.output.dense.weight"] = content["weight_map"][
            "roberta.encoder.layer.1.attention.self.query.weight"
        ]
        other = tmp_path / content["weight_map"][name]
        save_file({k: w for k, w in load_file(other).items() if k != name}, other)
    else:
        del content["weight_map"][name]
    index.write_text(json.dumps(content))
    fails(tmp_path, name, folder=tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_an_index_that_is_none(tmp_path, text):
    index, _ = shards(tmp_path)
    index.write_text(text)
    fails(index, folder=tmp_path)


# --- training some rows of the word embeddings ----------------------------------------------------------------


def trained(rows, updates=6):
    """A model after some updates of Adam, on three pieces of its vocabulary more in each: all rows or these trained."""
    torch.manual_seed(0)
    config = xlmr.Config(**TINY, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, labels=LABELS)
    model = xlmr.SequenceClassifier(config)
    xlmr.initialise(model)
    with torch.no_grad():
        model.roberta.embeddings.word_embeddings.weight[1] = 0.5  # so that a change of it would show
    if rows is not None:
        model.roberta.train_rows(rows)
    optimizer = slowfast.Adam(slowfast.param_groups(model), lr=1e-2)
    for update in range(updates):
        model.train()
        ids = batch((12, 3, 25), 10 + 3 * update, seed=update)
        torch.nn.functional.cross_entropy(model(ids), torch.tensor([2, 0, 1])).backward()
        optimizer.step()
        optimizer.zero_grad()
        if update == 2:  # a look at other pieces in between
            model.eval()(batch((30,), 100))
    return model


ROWS = torch.tensor([0, 2, *range(4, 25)])
WORDS = "roberta.embeddings.word_embeddings.weight"


def test_training_the_rows_that_occur_is_training_the_table():
    whole, some = trained(None), trained(ROWS)
    expected, found = whole.state_dict(), some.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], w) for name, w in expected.items())
    assert sum(p.numel() for p in some.parameters()) == sum(p.numel() for p in whole.parameters()) - 32 * 76
    ids = batch((38, 20), 100, seed=9)  # pieces that are not among the rows, too
    assert not set(ids.unique().tolist()) <= {1, *ROWS.tolist()}
    assert torch.equal(some.eval()(ids), whole.eval()(ids))
    assert torch.equal(some.train()(batch((9,), 25)), whole.train()(batch((9,), 25)))  # and back in training


@pytest.mark.parametrize("rows", [None, ROWS], ids=["table", "rows"])
def test_the_padding_row_does_not_move(rows):
    before, after = trained(rows, updates=0).state_dict()[WORDS], trained(rows).state_dict()[WORDS]
    assert (after[1] == 0.5).all()
    assert torch.equal(after[25:], before[25:]) and not torch.equal(after[4:25], before[4:25])


@pytest.mark.parametrize("rows", [None, ROWS], ids=["table", "rows"])
def test_the_padding_row_has_no_gradient(rows):
    model = trained(rows, updates=0)
    ids = batch((12, 3), 25)
    (model.roberta(ids) ** 3).sum().backward()  # of the padding's states, too
    words = model.roberta.embeddings.word_embeddings.weight
    assert (words.grad[1] == 0).all() and (words.grad[0] != 0).any()  # ROWS are 0, 2, ...: in both its place is 1


def test_the_state_of_trained_rows_goes_round():
    some = trained(ROWS)
    state = copy.deepcopy(some.state_dict())
    fresh = trained(torch.tensor([0, 2, 4, 5, 6]), updates=0)
    plain = xlmr.SequenceClassifier(some.config)
    for other in (fresh, plain):
        other.load_state_dict(state)
        assert all(torch.equal(w, state[name]) for name, w in other.state_dict().items())
        ids = batch((38, 20), 100, seed=9)
        assert torch.equal(other.eval()(ids), some.eval()(ids))
        assert torch.equal(other.train()(batch((9,), 7)), some.train()(batch((9,), 7)))
    assert all(torch.equal(w, state[name]) for name, w in some.state_dict().items())  # and the state was not changed


def test_a_frozen_table_stays_a_table():
    model = xlmr.SequenceClassifier(xlmr.Config(**TINY))
    model.roberta.embeddings.requires_grad_(False)
    model.roberta.train_rows(ROWS)
    assert not any(p.requires_grad for p in model.roberta.embeddings.parameters())


def test_trained_rows_save_as_a_table(tmp_path):
    some = trained(ROWS)
    xlmr.save(some, tmp_path)
    near(theirs(AutoModelForSequenceClassification.from_pretrained(tmp_path).eval(), batch((9, 30), 100)).logits,
         some.eval()(batch((9, 30), 100)))  # fmt: skip


# --- the packed model ----------------------------------------------------------------------------------------

HIDDEN, LAYERS, HEADS, INSIDE, ROWS_STORED, PIECES, POSITIONS, TYPES = 32, 2, 4, 64, 40, 37, 20, 2
BERT_LAYER = {  # the packed name of a part of a layer, and BERT's
    "q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value",
    "ao": "attention.output.dense", "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense", "fo": "output.dense", "oln": "output.LayerNorm",
}  # fmt: skip


def bert_tensors():
    """{packed name: (BERT's name, shape)}."""
    tensors = {
        "emb.word": ("embeddings.word_embeddings.weight", (ROWS_STORED, HIDDEN)),
        "emb.pos": ("embeddings.position_embeddings.weight", (POSITIONS, HIDDEN)),
        "emb.type": ("embeddings.token_type_embeddings.weight", (TYPES, HIDDEN)),
        "emb.ln.w": ("embeddings.LayerNorm.weight", (HIDDEN,)),
        "emb.ln.b": ("embeddings.LayerNorm.bias", (HIDDEN,)),
    }
    for n in range(LAYERS):
        for short, name in BERT_LAYER.items():
            out = INSIDE if short == "fi" else HIDDEN
            shape = (HIDDEN,) if "ln" in short else (out, INSIDE if short == "fo" else HIDDEN)
            tensors[f"l{n}.{short}.w"] = (f"encoder.layer.{n}.{name}.weight", shape)
            tensors[f"l{n}.{short}.b"] = (f"encoder.layer.{n}.{name}.bias", (out,))
    return tensors


def pack(random, shape):
    """A random tensor in the packed form: its bytes, and its values worked out weight by weight."""
    if len(shape) == 1:
        values = random.normal(0, 0.2, shape).astype("<f4")
        return values.tobytes(), values
    packed, values = b"", []
    for _ in range(shape[0] * shape[1] // 32):
        scale = np.float16(random.uniform(0.01, 0.06))
        nibbles = [int(n) for n in random.integers(0, 16, 32)]
        packed += scale.tobytes() + bytes(nibbles[i] | nibbles[i + 16] << 4 for i in range(16))
        values += [float(scale) * (n - 8) for n in nibbles]
    return packed, np.array(values, np.float32).reshape(shape)


def packed_model():
    """The bytes of a packed model, and {BERT's name: values}."""
    random = np.random.default_rng(0)
    blobs, values, shapes = {}, {}, bert_tensors()
    for short, (name, shape) in shapes.items():
        blobs[short], values[name] = pack(random, shape)
    text = b"".join(b"piece%d" % i for i in range(PIECES))
    head = b"E5S1\x01\x00\x00\x00"
    head += struct.pack("<7i", HIDDEN, LAYERS, HEADS, INSIDE, ROWS_STORED, POSITIONS, TYPES)
    head += struct.pack("<f", 1e-12) + struct.pack("<i", 32) + struct.pack("<5i", PIECES, 0, 2, 1, 3)
    head += struct.pack("<Q", len(text)) + bytes(4 * (PIECES + 1)) + bytes(4 * PIECES) + text
    head += struct.pack("<iI", 1, 9) + b"normalise"
    head += struct.pack("<i", len(blobs))
    at = len(head) + sum(2 + len(short) + struct.calcsize("<BIQQ") for short in blobs)
    directory = b""
    for short, blob in blobs.items():
        shape = shapes[short][1]
        directory += struct.pack("<H", len(short)) + short.encode()
        directory += struct.pack("<BIQQ", len(shape) > 1, int(np.prod(shape)), at, len(blob))
        at += len(blob)
    return head + directory + b"".join(blobs.values()), values


def test_the_packed_model_becomes_the_xlmr_it_should(tmp_path):
    content, bert = packed_model()
    (tmp_path / "packed.bin").write_bytes(content)
    xlmr.convert_e5(tmp_path / "packed.bin", tmp_path / "out")

    expected = {f"roberta.{name}": torch.tensor(values) for name, values in bert.items()}
    words, positions, types = (
        f"roberta.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")
    )
    expected[words] = expected[words][:PIECES]
    expected[positions] = torch.cat([torch.zeros(2, HIDDEN), expected[positions]])
    expected[types] = expected[types][:1]
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, w in expected.items():
        assert torch.equal(found[name], w), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["layer_norm_eps"], config["max_position_embeddings"], config["type_vocab_size"]) == (1e-12, 22, 1)
    assert (config["vocab_size"], config["num_attention_heads"], config["num_hidden_layers"]) == (PIECES, HEADS, LAYERS)


def test_the_packed_model_becomes_xlmr_exactly(tmp_path):
    content, values = packed_model()
    (tmp_path / "packed.bin").write_bytes(content)
    xlmr.convert_e5(tmp_path / "packed.bin", tmp_path / "out")
    bert = BertModel(BertConfig(
        vocab_size=ROWS_STORED, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        intermediate_size=INSIDE, max_position_embeddings=POSITIONS, type_vocab_size=TYPES, layer_norm_eps=1e-12,
        attn_implementation="eager",
    ), add_pooling_layer=False).eval()  # fmt: skip
    bert.load_state_dict({name: torch.tensor(w) for name, w in values.items()}, strict=True)
    ids = batch((20, 4, 11), PIECES)
    real = ids != 1
    expected = theirs(bert, ids, output_hidden_states=True).hidden_states
    for ours, other in zip(
        xlmr.load(tmp_path / "out", LABELS).eval().roberta.hidden_states(ids), expected, strict=True
    ):
        near(ours[real], other[real])
    near(theirs(AutoModel.from_pretrained(tmp_path / "out").eval(), ids).last_hidden_state[real], expected[-1][real])


@pytest.mark.parametrize("end", [0, 3, 20, 60, 70, 200, 700, 1500, 5000, -1])
def test_a_packed_model_that_is_not_whole(tmp_path, end):
    (tmp_path / "packed.bin").write_bytes(packed_model()[0][:end])
    with pytest.raises(InputError) as error:
        xlmr.convert_e5(tmp_path / "packed.bin", tmp_path / "out")
    assert str(tmp_path / "packed.bin") in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_convert_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["model.py", "convert", str(tmp_path / "packed.bin"), str(tmp_path / "out")])
    with pytest.raises(SystemExit) as end:
        xlmr.main()
    message = capsys.readouterr().err
    assert end.value.code == 2 and message.startswith("model.py: ") and message.count("\n") == 1
    (tmp_path / "packed.bin").write_bytes(packed_model()[0])
    xlmr.main()
    assert xlmr.load(tmp_path / "out").config.vocab_size == PIECES
