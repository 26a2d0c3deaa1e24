"""The network, its heads and its files against transformers', in both directions; dropout; trained rows; bad files."""

import copy
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import data
import model as xlmr
import slowfast
from data import IGNORED, InputError, Tokenizer

LABELS = ("entailment", "neutral", "contradiction")
TAGS = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG")
KINDS = {  # our class, transformers', what loads either, the labels
    "pairs": (xlmr.SequenceClassifier, hf.XLMRobertaForSequenceClassification, hf.AutoModelForSequenceClassification,
              LABELS),
    "tokens": (xlmr.TokenClassifier, hf.XLMRobertaForTokenClassification, hf.AutoModelForTokenClassification, TAGS),
    "questions": (xlmr.QuestionAnswering, hf.XLMRobertaForQuestionAnswering, hf.AutoModelForQuestionAnswering,
                  ("start", "end")),
}  # fmt: skip
kinds = pytest.mark.parametrize("kind", KINDS)
TINY = {
    "vocab_size": 100, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 3,
    "max_position_embeddings": 40, "type_vocab_size": 1, "layer_norm_eps": 1e-5,
}  # fmt: skip
BASE = {
    **TINY, "vocab_size": 1000, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072,
    "num_hidden_layers": 12, "max_position_embeddings": 514,
}  # fmt: skip
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LENGTHS = (12, 3, 38, 25)


def reference(cls, labels=LABELS, std=0.1, **sizes):
    """A model of transformers', random in every parameter, without dropout, with the plain attention."""
    config = hf.XLMRobertaConfig(
        **{**TINY, **sizes}, id2label=dict(enumerate(labels)), label2id={name: i for i, name in enumerate(labels)},
        attn_implementation="eager",
    )  # fmt: skip
    model = cls(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(0.0, std).add_(float(name.endswith("LayerNorm.weight")))
    return model.eval()


def twins(kind, std=0.1, **sizes):
    """Our model and transformers' with the same weights, without dropout."""
    ours, cls, _, labels = KINDS[kind]
    expected = reference(cls, labels, std, **sizes)
    with torch.device("meta"):
        model = ours(xlmr.Config(**{**TINY, **sizes}, labels=labels))
    weights = {name: w.clone() for name, w in expected.state_dict().items()}
    model.load_state_dict(weights, assign=True)  # strict: the names are the same, all of them
    return model.eval(), expected


def fresh(kind="pairs", **numbers):
    ours, _, _, labels = KINDS[kind]
    return ours(xlmr.Config(**{**TINY, **numbers}, labels=labels))


def batch(lengths, vocabulary=100, seed=0):
    """Random <s> ... </s> of these lengths, padded with 1: (batch, longest)."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.ones(len(lengths), max(lengths), dtype=torch.long)
    for row, length in zip(ids, lengths):
        row[:length] = torch.randint(4, vocabulary, (length,), generator=random)
        row[0], row[length - 1] = 0, 2
    return ids


def theirs(model, ids, **options):
    return model(input_ids=ids, attention_mask=(ids != 1).long(), **options)


def logits_of(output):
    """What transformers' model said, in our layout: (batch, labels) or (batch, length, labels)."""
    return output.logits if "logits" in output else torch.stack([output.start_logits, output.end_logits], 2)


def near(ours, expected, tolerance=1e-5):
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


def same_logits(ours, expected, ids):
    """Both models say the same of these windows; of padding, where there are logits of each token, anything."""
    with torch.no_grad():
        found, other = ours(ids), logits_of(theirs(expected, ids))
    real = ids != 1 if found.dim() == 3 else slice(None)
    assert found.shape == other.shape and other[real].std() > 0.01  # the comparison says something
    near(found[real], other[real])
    if isinstance(ours, xlmr.QuestionAnswering):
        assert (found[~real] == -torch.inf).all()


# --- the network ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "sizes", "std", "lengths"),
    [
        *[(kind, TINY, 0.1, LENGTHS) for kind in KINDS],
        ("pairs", {"type_vocab_size": 2, "num_attention_heads": 1, "layer_norm_eps": 1e-12}, 0.1, (9, 9)),
        ("pairs", {"max_position_embeddings": 514}, 0.1, (512, 100)),
        ("pairs", BASE, 0.03, (30, 17, 5)),
    ],
    ids=[*KINDS, "another tiny", "full length", "base"],
)
def test_logits_and_all_hidden_states_are_those_of_transformers(kind, sizes, std, lengths):
    ours, expected = twins(kind, std, **sizes)
    ids = batch(lengths)
    same_logits(ours, expected, ids)
    with torch.no_grad():
        states = ours.roberta.hidden_states(ids)
        others = theirs(expected, ids, output_hidden_states=True).hidden_states
    assert len(states) == ours.config.num_hidden_layers + 1
    for state, other in zip(states, others, strict=True):
        near(state[ids != 1], other[ids != 1])


def some_labels(kind, ids):
    """Labels of a batch: classes, tags of some tokens, or an answer's ends; the third window has none."""
    if kind == "tokens":
        random = torch.Generator().manual_seed(1)
        labels = torch.randint(0, len(TAGS), ids.shape, generator=random)
        unlabelled = (torch.rand(ids.shape, generator=random) < 0.4) | (ids == 1)
        unlabelled[:, 1] = False  # each sentence but the third has a label
        labels.masked_fill_(unlabelled, IGNORED)
    else:
        ends = torch.stack([torch.zeros(len(ids), dtype=torch.long), (ids != 1).sum(1) - 2], 1)
        labels = torch.arange(len(ids)) % 3 if kind == "pairs" else ends
    labels[2] = IGNORED
    return labels


def sum_of_losses(kind, expected, ids, labels):
    """The sum of the cross-entropies by transformers' own losses, means over the labels of a window, of each window
    that has one, alone and without padding."""
    total = 0.0
    for row, label in zip(ids, labels):
        row, number = row[None, row != 1], int((label != IGNORED).sum())
        if kind == "questions":
            label = {"start_positions": label[:1], "end_positions": label[1:]}
        else:
            label = {"labels": label[None, : row.shape[1]] if kind == "tokens" else label[None]}
        total += number * theirs(expected, row, **label).loss if number else 0.0
    return total


@kinds
def test_a_heads_loss_and_its_gradients_are_those_of_transformers(kind):
    """On a batch with padding and with a window to be ignored, against transformers' on each of the others alone; and
    where all are ignored there is no loss and no gradient."""
    ours, expected = twins(kind)
    ids = batch(LENGTHS)
    labels = some_labels(kind, ids)
    loss = ours.loss(ours(ids), torch.full_like(labels, IGNORED))
    loss.backward()
    assert loss == 0 and all((p.grad == 0).all() for p in ours.parameters())
    zero = ("key.bias",)  # 0 by its nature; and so is what moves the logits of all tokens alike, if they compete
    zero += ("layer.2.output.LayerNorm.bias", "qa_outputs.bias") if kind == "questions" else ()
    loss, other = ours.loss(ours(ids), labels), sum_of_losses(kind, expected, ids, labels)
    near(loss, other)
    loss.backward()
    other.backward()
    gradients = {name: p.grad for name, p in expected.named_parameters()}
    for name, p in ours.named_parameters():
        near(p.grad, gradients[name], 1e-4)  # of a sum of up to 50 losses
        assert gradients[name].abs().max() > 1e-3 or name.endswith(zero), name


@kinds
def test_bf16_is_in_the_matrix_products_alone(kind):
    ours, expected = twins(kind)
    ids = batch(LENGTHS)
    labels = some_labels(kind, ids)
    exact, inside = ours(ids).detach(), []
    ours.precision = "bf16"
    ours.roberta.encoder.layer[1].intermediate.dense.register_forward_hook(lambda *seen: inside.append(seen[2].dtype))
    logits = ours(ids)
    ours.loss(logits, labels).backward()
    assert inside == [torch.bfloat16] and logits.dtype == torch.float32
    assert {p.dtype for p in ours.parameters()} == {p.grad.dtype for p in ours.parameters()} == {torch.float32}
    finite = exact.isfinite()
    assert 0 < (logits - exact)[finite].abs().max() < 0.1 * exact[finite].std()
    with torch.autocast("cpu", torch.bfloat16):  # and so they are in transformers' under autocast
        other = logits_of(theirs(expected, ids)).float()
    near(logits[finite], other[finite], 0.05)


@kinds
@pytest.mark.parametrize("training", [True, False])
def test_a_row_that_is_all_padding_is_finite_and_changes_nothing(kind, training):
    """Not the other rows' logits, and of those that are not ignored neither loss nor gradients."""
    ours = fresh(kind, **NO_DROPOUT).train(training)
    ids, rows = batch((12, 9, 7)), [0, 1, 2]
    labels = some_labels(kind, ids)
    labels[2] = labels[1]
    padded = torch.cat([ids, torch.ones(1, 12, dtype=torch.long)])

    def found(ids, labels):
        ours.zero_grad()
        logits = ours(ids)
        loss = ours.loss(logits, labels)
        loss.backward()
        return logits, loss, [p.grad.clone() for p in ours.parameters()]

    alone = found(ids, labels)
    logits, *others = found(padded, torch.cat([labels, torch.full_like(labels[:1], IGNORED)]))
    assert logits[3].isfinite().all() and torch.equal(logits[rows].isfinite(), alone[0].isfinite())
    near((logits[rows], *others), alone)


def test_initialisation_is_berts():
    part = fresh(vocab_size=1000)
    with torch.no_grad():
        for p in part.parameters():
            p.fill_(7.0)
    xlmr.initialise(part)
    for name, p in part.named_parameters():
        if "LayerNorm" in name or name.endswith("bias"):
            assert (p == float(name.endswith("LayerNorm.weight"))).all()
        else:
            assert p.abs().max() < 0.12 and (p.numel() < 500 or 0.018 < p.std() < 0.022), name
    assert (part.roberta.embeddings.word_embeddings.weight[1] == 0).all()


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
@pytest.mark.parametrize("shape", [(1,), (3,), (4,), (5, 1, 7), (2, 3, 33), (0, 5), "in pieces"], ids=str)
def test_dropout_of_every_size_and_its_gradient(dtype, shape):
    torch.manual_seed(0)
    x = torch.randn(12, 10, 9).transpose(0, 2)[:, ::3] if shape == "in pieces" else torch.randn(shape)
    x = (x + 10).to(dtype).requires_grad_()
    assert x.is_contiguous() == (shape != "in pieces")
    for _ in range(20):
        y = xlmr.dropout(x, 0.5)
        assert y.shape == x.shape and y.dtype == dtype
        assert torch.equal(y, torch.where(y == 0, 0, 2 * x))
        (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
        assert torch.equal(gradient, torch.where(y == 0, 0, 2 * torch.ones_like(y)))


def test_the_seed_of_torch_decides_what_dropout_drops():
    def drop(seed):
        torch.manual_seed(seed)
        return xlmr.dropout(torch.ones(500), 0.3), xlmr.dropout(torch.ones(500), 0.3)

    (a, next_a), (b, next_b), (c, _) = drop(1), drop(1), drop(2)
    assert torch.equal(a, b) and torch.equal(next_a, next_b)
    assert not torch.equal(a, c) and not torch.equal(a, next_a)


@kinds
@pytest.mark.parametrize("where", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_a_model_drops_in_training_alone(kind, where):
    ids = batch((12, 12))
    ours, none = fresh(kind, **{**NO_DROPOUT, where: 0.3}), fresh(kind, **NO_DROPOUT)
    assert not torch.equal(ours(ids), ours(ids)) and torch.equal(none(ids), none(ids))
    ours.eval()
    assert torch.equal(ours(ids), ours(ids))


def test_attention_with_dropout_is_attention_apart_from_the_dropout(monkeypatch):
    """On a CPU the attention of training is written out: forward and gradients are the fused one's, padding too. What
    stands for dropout doubles its input, and so everything is twice as large."""
    dropped = []
    monkeypatch.setattr(xlmr, "dropout", lambda x, p: dropped.append((x, p)) or 2 * x)
    torch.manual_seed(0)
    attention = xlmr.SelfAttention(xlmr.Config(**TINY, attention_probs_dropout_prob=0.3)).train()
    parts = (attention.query, attention.key, attention.value)
    mask = (batch((9, 4, 7)) != 1)[:, None, None, :]
    x, gradient = torch.randn(3, 9, 32, requires_grad=True), torch.randn(3, 9, 32)
    q, k, v = (part(x).unflatten(2, (4, 8)).transpose(1, 2) for part in parts)
    fused = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
    ours, expected = (
        [y, *torch.autograd.grad(y, [x, *attention.parameters()], gradient)] for y in (attention(x, mask), 2 * fused)
    )
    ((weights, p),) = dropped  # the written-out one it was
    assert p == 0.3 and weights.shape == (3, 4, 9, 9) and (weights.masked_select(~mask) == 0).all()
    near(weights.sum(3), torch.ones(3, 4, 9))
    for found, other in zip(ours, expected, strict=True):
        near(found, other)
    assert expected[1].abs().max() > 0.01


@pytest.mark.parametrize("training", [True, False])
def test_a_classifier_computes_of_the_last_layer_what_its_head_reads(training):
    """The state of <s>: logits and gradients are those of a last layer that computes all rows."""
    torch.manual_seed(0)
    model = xlmr.SequenceClassifier(xlmr.Config(**TINY, labels=LABELS)).train(training)
    for part in model.modules():
        if isinstance(part, xlmr.Dropout):
            part.p = 0.0
        elif isinstance(part, xlmr.SelfAttention):
            part.dropout = 0.0
    seen, input_ids = [], batch((9, 4, 7))
    model.roberta.encoder.layer[-1].register_forward_hook(lambda _, __, x: seen.append(x.shape[1]))

    def found():
        logits = model(input_ids)
        gradients = torch.autograd.grad(logits.square().sum(), model.parameters())
        return [logits, *gradients]

    one = found()
    model.rows = None
    for ours, expected in zip(one, found(), strict=True):
        near(ours, expected)
    assert seen == [1, 9] and one[1].abs().max() > 0


# --- files: from transformers and to it ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "dtype", "shard"),
    [*[(kind, torch.float32, "1GB") for kind in KINDS], ("pairs", torch.float16, "1GB"),
     ("pairs", torch.bfloat16, "1GB"), ("pairs", torch.float32, "30KB")],
    ids=[*KINDS, "F16", "BF16", "shards"],
)  # fmt: skip
def test_what_transformers_saves_loads_in_ours(tmp_path, kind, dtype, shard):
    head, cls, _, labels = KINDS[kind]
    expected = reference(cls, labels).to(dtype)
    expected.save_pretrained(tmp_path, max_shard_size=shard)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 or shard == "30KB"
    assert (tmp_path / "model.safetensors").exists() == (shard != "30KB")
    ours = xlmr.load(tmp_path, head=head).eval()
    assert {p.dtype for p in ours.parameters()} == {torch.float32} and all(p.requires_grad for p in ours.parameters())
    assert type(ours) is head and ours.config.labels == labels
    same_logits(ours, expected.float(), batch(LENGTHS))


@kinds
def test_what_is_saved_loads_in_transformers(tmp_path, kind):
    _, cls, auto, labels = KINDS[kind]
    ours, _ = twins(kind, layer_norm_eps=1e-12)
    xlmr.save(ours, tmp_path / "a" / "b")
    loaded, info = auto.from_pretrained(tmp_path / "a" / "b", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert type(loaded) is cls and loaded.config.id2label == dict(enumerate(labels))
    assert loaded.config.label2id == {label: i for i, label in enumerate(labels)}
    assert (loaded.config.layer_norm_eps, loaded.config.pad_token_id) == (1e-12, 1)
    same_logits(ours, loaded.eval(), batch(LENGTHS))


@kinds
@pytest.mark.parametrize("cls", [hf.XLMRobertaModel, hf.XLMRobertaForMaskedLM], ids=["bare", "masked LM"])
def test_load_takes_the_encoder_and_draws_the_head_from_the_seed(tmp_path, cls, kind):
    head, _, _, labels = KINDS[kind]
    expected = reference(cls)
    expected.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    prefix = "" if cls is hf.XLMRobertaModel else "roberta."
    assert f"{prefix}embeddings.LayerNorm.bias" in weights
    weights[f"{prefix}embeddings.position_ids"] = torch.arange(40)[None]
    weights[f"{prefix}pooler.dense.weight"] = torch.zeros(32, 32)
    weights["lm_head.decoder.weight"] = torch.zeros(100, 32)
    save_file(weights, tmp_path / "model.safetensors")

    def load(seed):
        torch.manual_seed(seed)
        return xlmr.load(tmp_path, labels, head=head).eval()

    ours, again, other = load(1), load(1), load(2)
    ids = batch(LENGTHS)
    encoder = expected if cls is hf.XLMRobertaModel else expected.roberta
    near(ours.roberta(ids)[ids != 1], theirs(encoder, ids).last_hidden_state[ids != 1])
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), again.parameters(), strict=True))
    assert ours.config.labels == labels and ours(ids).shape[-1] == len(labels)
    drawn = {name: p for name, p in ours.named_parameters() if not name.startswith("roberta.")}
    for name, p in drawn.items():
        if name.endswith("bias"):
            assert (p == 0).all()
        else:
            assert 0.01 < p.std() < 0.03 and not torch.equal(p, other.get_parameter(name))
    assert drawn


def names(labels):
    """What makes config.json name the classes so."""
    return config_with(id2label=dict(enumerate(labels)), label2id={name: i for i, name in enumerate(labels)})


@pytest.mark.parametrize("kind", ["pairs", "tokens"])
@pytest.mark.parametrize("where", ["both", "label2id", "generic id2label"])
def test_a_head_of_other_order_is_taken_over_by_the_names_of_its_labels(tmp_path, kind, where, capsys):
    """Each class has the logits that transformers' model gives to the class of that name."""
    head, cls, _, labels = KINDS[kind]
    there = [label.upper() for label in (*labels[2:], *labels[:2])]
    expected = reference(cls, there)
    expected.save_pretrained(tmp_path)
    names(there)(tmp_path)
    if where != "both":
        generic = None if where == "label2id" else {i: f"LABEL_{i}" for i in range(len(there))}
        config_with(id2label=generic)(tmp_path)
    capsys.readouterr()  # a progress bar of transformers'
    ours, ids = xlmr.load(tmp_path, labels, head).eval(), batch((12, 12))
    with torch.no_grad():
        found, other = ours(ids), logits_of(theirs(expected, ids))
    for i, label in enumerate(labels):
        near(found[..., i], other[..., there.index(label.upper())])
    assert ours.config.labels == labels and not capsys.readouterr().err


@pytest.mark.parametrize(
    ("saved", "labels", "damage", "says"),
    [
        ("pairs", LABELS, ["LABEL_0", "LABEL_1", "LABEL_2"], "labels are LABEL_0, LABEL_1, LABEL_2; the task's are"),
        ("pairs", LABELS, ["yes", "maybe", "no"], "labels are yes, maybe, no; the task's are entailment, neutral, "),
        ("pairs", LABELS, ["entailment", "neutral", "Neutral"], "its labels are entailment, neutral, Neutral"),
        ("pairs", LABELS[:2], None, "its labels are entailment, neutral; the task's"),
        ("pairs", ("1", "2", "3", "4", "5"), None, "its labels are 1, 2, 3, 4, 5; the task's"),
        ("pairs", LABELS, {"num_labels": 3, "id2label": None, "label2id": None}, "its labels are LABEL_0, LABEL_1;"),
        ("pairs", LABELS, "classifier.out_proj.bias", "not whole"),
        ("pairs", LABELS, "classifier.dense.weight", "not whole"),
        ("pairs", LABELS, {"classifier.dense.weight": torch.zeros(7, 32)}, "another shape"),
        ("tokens", TAGS, None, "another task's"),
        ("questions", ("start", "end"), None, "another task's"),
    ],
    ids=["generic", "unknown", "one twice", "two", "five", "none", "no bias", "no matrix", "shape", "tags", "answers"],
)  # fmt: skip
def test_another_head_is_not_taken_over_and_that_is_said(tmp_path, capsys, saved, labels, damage, says):
    expected = reference(KINDS[saved][1], labels)
    expected.save_pretrained(tmp_path)
    if isinstance(damage, list):
        names(damage)(tmp_path)
    elif isinstance(damage, str):
        weights_with(lambda weights: weights.pop(damage))(tmp_path)
    elif damage:
        of_weights = isinstance(next(iter(damage.values())), torch.Tensor)
        (weights_with(lambda weights: weights.update(damage)) if of_weights else config_with(**damage))(tmp_path)
    capsys.readouterr()
    ours = xlmr.load(tmp_path, LABELS).eval()
    assert (ours.classifier.out_proj.bias == 0).all() and (ours.classifier.dense.bias == 0).all()
    assert ours.classifier.dense.weight.abs().max() < 0.12 < expected.roberta.encoder.layer[0].output.dense.weight.max()
    assert ours.classifier.out_proj.weight.shape == (3, 32) and ours.config.labels == LABELS
    ids = batch(LENGTHS)
    near(ours.roberta(ids)[ids != 1], theirs(expected.roberta, ids).last_hidden_state[ids != 1])
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{tmp_path}: its head is not taken over" in said and says in said, said


def test_old_names_are_read(tmp_path, folder):
    """TensorFlow's of a LayerNorm, which old checkpoints have; their position_ids are left out."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)

    def rename(weights):
        for name in [name for name in weights if "LayerNorm" in name]:
            weights[name.replace(".weight", ".gamma").replace(".bias", ".beta")] = weights.pop(name)
        weights["roberta.embeddings.position_ids"] = torch.arange(40)[None]

    weights_with(rename)(tmp_path)
    expected, ours = xlmr.load(folder).state_dict(), xlmr.load(tmp_path, LABELS).state_dict()
    assert list(ours) == list(expected) and all(torch.equal(w, ours[name]) for name, w in expected.items())


@pytest.mark.parametrize("parts", [1, 2])
def test_what_is_advised_for_a_pytorch_model_bin_makes_it_readable(tmp_path, folder, parts):
    shutil.copytree(folder, tmp_path / "a model's")
    weights = list(load_file(folder / WEIGHTS).items())
    weights.append(("lm_head.decoder.weight", weights[0][1].T))  # the same memory, and not contiguous
    for part in range(parts):
        torch.save(dict(weights[part::parts]), tmp_path / "a model's" / f"pytorch_model{f'-{part}' * (parts - 1)}.bin")
    (tmp_path / "a model's" / WEIGHTS).unlink()
    with pytest.raises(InputError, match="holds pytorch_model.*bin and no model.safetensors; to convert it: ") as error:
        xlmr.load(tmp_path / "a model's")
    command = str(error.value).partition("to convert it: ")[2]
    subprocess.run(command.replace("python", shlex.quote(sys.executable), 1), shell=True, check=True)
    expected, ours = xlmr.load(folder).state_dict(), xlmr.load(tmp_path / "a model's").state_dict()
    assert all(torch.equal(w, ours[name]) for name, w in expected.items())
    assert hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "a model's")


TEXTS = ["dog cat sleep", "  the  cow\teats  ", "hund?  ﬁ Ａ ① é", "", "\u2028 katze\u00a0kuh\u3000", "chien" * 3]
E5 = Path(__file__).parent.parent / "models" / "multilingual-e5-small" / "sentencepiece.bpe.model"


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.skipif(not E5.is_file(), reason="none"))])
def test_auto_tokenizer_makes_our_ids_of_what_is_saved(tmp_path, tiny_tokenizer, real):
    """Without SentencePiece's file. The oracle is that library, by way of data.Tokenizer."""
    file = E5 if real else tiny_tokenizer
    model = fresh(vocab_size=100)
    xlmr.save(model, tmp_path / "best", tokenizer=file)
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "best").iterdir()}
    xlmr.save(model, tmp_path / "best", tokenizer=file)  # and is not made again each time
    kept = {name for name, time in before.items() if (tmp_path / "best" / name).stat().st_mtime_ns == time}
    assert kept == {*before} - {CONFIG, WEIGHTS} and len(kept) == 3
    (tmp_path / "best" / "sentencepiece.bpe.model").unlink()
    theirs, ours = hf.AutoTokenizer.from_pretrained(tmp_path / "best"), Tokenizer(file)
    for a, b in zip(TEXTS, [*TEXTS[1:], TEXTS[0]], strict=True):
        (first, second), found = ours.encode_batch([a, b]), theirs([a], [b])
        assert theirs(a)["input_ids"] == [0, *first, 2] and found["input_ids"] == [[0, *first, 2, 2, *second, 2]]
        assert set(found) == {"input_ids", "attention_mask"}
    special = theirs.convert_tokens_to_ids(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    assert special == [0, 1, 2, 3, ours.vocab_size - 1]
    assert (theirs.pad_token_id, theirs.model_max_length, len(theirs)) == (1, 38, ours.vocab_size)
    assert theirs.decode(theirs("dog cat")["input_ids"], skip_special_tokens=True) == "dog cat"


@pytest.mark.parametrize(
    ("options", "hidden", "attention"),
    [({"hidden_dropout_prob": 0.3}, 0.3, 0.2), ({"attention_probs_dropout_prob": 0.0}, 0.1, 0.0), ({}, 0.1, 0.2)],
)
def test_load_takes_other_dropout_than_the_configs_and_goes_round(
    tmp_path, folder, tiny_tokenizer, options, hidden, attention
):
    shutil.copytree(folder, tmp_path / "theirs")
    config_with(attention_probs_dropout_prob=0.2)(tmp_path / "theirs")  # hidden_dropout_prob is 0.1
    ours = xlmr.load(tmp_path / "theirs", **options)
    assert {module.p for module in ours.modules() if isinstance(module, torch.nn.Dropout)} == {hidden}
    assert {m.dropout for m in ours.modules() if isinstance(m, xlmr.SelfAttention)} == {attention}
    xlmr.save(ours, tmp_path / "ours", tokenizer=tiny_tokenizer)
    again = xlmr.load(tmp_path / "ours")
    assert again.config == ours.config
    assert all(torch.equal(w, again.state_dict()[name]) for name, w in ours.state_dict().items())
    names = [CONFIG, WEIGHTS, "sentencepiece.bpe.model", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(file.name for file in (tmp_path / "ours").iterdir()) == names
    assert (tmp_path / "ours" / names[2]).read_bytes() == tiny_tokenizer.read_bytes()


def test_a_loaded_model_does_not_hold_the_file(tmp_path):
    xlmr.save(fresh(), tmp_path)
    ours = xlmr.load(tmp_path)
    before = copy.deepcopy(ours.state_dict())
    file = tmp_path / "model.safetensors"
    with open(file, "r+b") as f:
        f.write(bytes(file.stat().st_size))
    assert all(torch.equal(w, before[name]) for name, w in ours.state_dict().items())


def test_tensors_are_written_as_safetensors_writes_them(tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    tensors = {"b é": torch.randn(3, 5), "a": torch.randn(()), "none": torch.zeros(0, 3), "c": torch.randn(4, 2).T}
    kinds = (torch.float64, torch.int64, torch.int32, torch.bool)
    for more in ({}, {f"{kind}": torch.arange(-1, 6).to(kind) for kind in kinds}):
        tensors |= more
        sha256 = xlmr.write_tensors(tensors, ours)
        assert sha256 == data.file_sha256(ours)
        found = load_file(ours)
        assert all(found[name].dtype == t.dtype and torch.equal(found[name], t) for name, t in tensors.items())
        save_file({name: t.contiguous() for name, t in tensors.items()}, theirs, metadata={"format": "pt"})
        assert more or ours.read_bytes() == theirs.read_bytes()
        assert ours.stat().st_size == theirs.stat().st_size and found.keys() == tensors.keys()


def test_a_save_that_fails_leaves_the_last_one(tmp_path, monkeypatch):
    xlmr.save(fresh(), tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(weights, file):
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(xlmr, "write_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        xlmr.save(fresh(), tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


# --- bad files -----------------------------------------------------------------------------------------------

WEIGHTS, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"
LAYER = "roberta.encoder.layer.1"
DENSE = f"{LAYER}.output.dense.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder as transformers saves a classifier. Not to be written to."""
    folder = tmp_path_factory.mktemp("classifier")
    reference(hf.XLMRobertaForSequenceClassification).save_pretrained(folder)
    return folder


def written(file, content):
    """What writes this (bytes, a text, or a function of what is there; None: nothing) into the file of a folder."""

    def damage(folder):
        new = content((folder / file).read_bytes()) if callable(content) else content
        (folder / file).unlink(missing_ok=True)
        if new is not None:
            (folder / file).write_bytes(new.encode() if isinstance(new, str) else new)

    return damage


def weights_with(change, file=WEIGHTS):
    def damage(folder):
        weights = load_file(folder / file)
        change(weights)
        save_file(weights, folder / file)

    return damage


def config_with(**values):
    return written(CONFIG, lambda content: json.dumps(json.loads(content) | values))


def bare_encoder_of_two_layers(folder):
    reference(hf.XLMRobertaModel).save_pretrained(folder)
    config_with(num_hidden_layers=2)(folder)


def sharded(change):
    """What makes a model of several files of the one in a folder, and then `change(folder, {weight: file name})`s."""

    def damage(folder):
        reference(hf.XLMRobertaForSequenceClassification).save_pretrained(folder, max_shard_size="30KB")
        (folder / WEIGHTS).unlink()  # which transformers would read, and so do we
        index = json.loads((folder / INDEX).read_text())
        change(folder, index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return damage


def index_alone(text):
    def damage(folder):
        (folder / WEIGHTS).unlink()
        (folder / INDEX).write_text(text)

    return damage


def header_with(change):
    """What writes the header anew: `change(header)` is what it says from then on, or does it in place."""

    def content(file):
        length = int.from_bytes(file[:8], "little")
        header = json.loads(file[8 : 8 + length])
        new = change(header)
        text = (json.dumps(header) if new is None else new).encode()
        return len(text).to_bytes(8, "little") + text + file[8 + length :]

    return written(WEIGHTS, content)


def entry(change, name=DENSE):
    return header_with(lambda header: header[name].update(change(header[name])))


def swapped(header):
    """Two tensors of one shape stand where the other does."""
    a, b = (header[f"roberta.encoder.layer.{n}.output.dense.weight"] for n in (0, 1))
    a["data_offsets"], b["data_offsets"] = b["data_offsets"], a["data_offsets"]


def a_hole(header):
    """From here on everything lies 4 bytes further."""
    for name in [*header][-3:]:
        header[name]["data_offsets"] = [at + 4 for at in header[name]["data_offsets"]]


HEADERS = {
    "swapped": header_with(swapped),
    "overlapping": entry(lambda e: {"data_offsets": [at - 4 for at in e["data_offsets"]]}),
    "a hole": header_with(a_hole),
    "beyond the file": entry(lambda e: {"data_offsets": [at + 10**9 for at in e["data_offsets"]]}),
    "backwards": entry(lambda e: {"data_offsets": e["data_offsets"][::-1]}),
    "negative": entry(lambda e: {"data_offsets": [-8192, 0]}),
    "another type": entry(lambda e: {"dtype": "F16"}),
    "an unknown type": entry(lambda e: {"dtype": "FLOAT"}),
    "a shape of 10^18": entry(lambda e: {"shape": [10**9, 10**9]}),
    "a shape of too few": entry(lambda e: {"shape": [32, 63]}),
    "a shape of text": entry(lambda e: {"shape": "3264"}),
    "a shape of fractions": entry(lambda e: {"shape": [32.0, 64.0]}),
    "a long shape": entry(lambda e: {"shape": [32, 64] + [1] * 100_000}),
    "three places": entry(lambda e: {"data_offsets": [*e["data_offsets"], 0]}),
    "no shape": header_with(lambda h: h[DENSE].pop("shape") and None),
    "a list": header_with(lambda h: "[]"),
    "nested": header_with(lambda h: '{"a":' * 100_000),
    "of 2^60 bytes": written(WEIGHTS, lambda c: (2**60).to_bytes(8, "little") + c[8:]),
}  # fmt: skip


def absent_from_its_shard(folder, files):
    weights_with(lambda weights: weights.pop(DENSE), files[DENSE])(folder)


BAD = {  # how a folder is damaged, the file that the message names, what it says
    **{name: (written(WEIGHTS, content), WEIGHTS, "not a whole safetensors file")
       for name, content in {"a byte short": lambda c: c[:-1], "cut in the header": lambda c: c[:300],
                             "four bytes": lambda c: c[:4], "no bytes": b"", "a pickle": b"\x80\x02}q\x00." * 500,
                             "a pointer": "version https://git-lfs.github.com/spec/v1\n"}.items()},
    **{f"no {file}": (written(file, None), file, "no such file") for file in (WEIGHTS, CONFIG)},
    # a weight that is not there, or of another shape
    **{f"no {name}": (weights_with(lambda w, name=name: w.pop(name)), "", f"the weight {name} is missing")
       for name in ("roberta.embeddings.word_embeddings.weight", f"{LAYER}.output.LayerNorm.bias")},
    **{f"shape of {name}": (weights_with(lambda w, name=name: w.update({name: torch.zeros(7, 5)})), WEIGHTS,
                            f"{name} is (7, 5)") for name in (DENSE, "classifier.out_proj.weight")},
    # a config that does not fit the weights
    "vocabulary": (config_with(vocab_size=99), WEIGHTS,
                   "roberta.embeddings.word_embeddings.weight is (100, 32), config.json asks for (99, 32)"),
    "too few layers": (config_with(num_hidden_layers=4), "", "roberta.encoder.layer.3."),
    "too many layers": (config_with(num_hidden_layers=2), WEIGHTS, "roberta.encoder.layer.2."),
    "too many layers of a bare encoder": (bare_encoder_of_two_layers, WEIGHTS, "encoder.layer.2."),
    "labels": (config_with(id2label={"0": "no", "1": "yes"}), WEIGHTS, "classifier.out_proj"),
    # a config that is none, or of another model
    **{f"config {text!r}": (written(CONFIG, text), CONFIG, says)
       for text, says in (("", "is empty"), ("[]", "not a model's config.json"), ("null", "not a model's config.json"),
                          ("{}", "vocab_size is None"), (b"\xff\xfe", "not valid UTF-8"),
                          ("<html></html>", "not whole JSON"), ("[" * 100_000, "not JSON as it should be"),
                          ('{"a": 1, "a": 1}', "a stands there twice"), ('{"a": ' + "9" * 400 + "}", "a is 99999"))},
    **{f"{name} is {value!r}": (config_with(**{name: value}), CONFIG, f"{name} is {value!r:.20}")
       for name, value in (
           ("hidden_size", "wide"), ("hidden_size", 16.9), ("hidden_size", 32.0), ("hidden_size", True),
           ("hidden_size", -32), ("hidden_size", [32]), ("vocab_size", None), ("vocab_size", 10**12), ("vocab_size", 3),
           ("num_hidden_layers", 10**5), ("num_hidden_layers", 0), ("num_hidden_layers", "3"),
           ("num_attention_heads", 0), ("num_attention_heads", 5), ("intermediate_size", 10**9),
           ("max_position_embeddings", 1), ("max_position_embeddings", 2), ("max_position_embeddings", 10**9),
           ("type_vocab_size", 0), ("layer_norm_eps", -1), ("layer_norm_eps", 0), ("layer_norm_eps", 1e300),
           ("layer_norm_eps", "1e-5"), ("layer_norm_eps", False), ("hidden_dropout_prob", 1.5),
           ("hidden_dropout_prob", 1), ("hidden_dropout_prob", None), ("attention_probs_dropout_prob", -0.1),
           ("model_type", "bert"), ("model_type", "xlm-roberta-xl"), ("model_type", ["roberta"]),
           ("hidden_act", "relu"), ("position_embedding_type", "relative_key"), ("pad_token_id", 0))},
    **{f"layer_norm_eps is {value}": (config_with(layer_norm_eps=value), CONFIG, f"layer_norm_eps is {value}")
       for value in (float("nan"), float("inf"), float("-inf"))},
    **{f"id2label is {value!r:.20}": (config_with(id2label=value), CONFIG, "id2label does not name classes 0, 1, ...")
       for value in ({"0": "a", "2": "b"}, ["a", "b"], {"0": 3}, {"no": "a"}, dict.fromkeys(range(1001), "a"))},
    "an enormous number": (written(CONFIG, lambda c: c.replace(b"100", b"1e999")), CONFIG, "vocab_size is inf"),
    # a header that does not say what lies in the file
    **{f"header: {name}": (damage, WEIGHTS, "not JSON" if name == "nested" else "not a whole safetensors")
       for name, damage in HEADERS.items()},
    "a long name of no place": (weights_with(lambda w: w.update({f"{LAYER}.{'x' * 5000}": torch.zeros(1)})), WEIGHTS,
                                f"{f'{LAYER}.{chr(120) * 5000}'[:80]} has no place"),
    "an integer type": (weights_with(lambda w: w.update({DENSE: torch.zeros(32, 64, dtype=torch.int32)})), WEIGHTS,
                        f"{DENSE} is of type I32"),
    "an infinite weight": (weights_with(lambda w: w[DENSE][3].fill_(torch.inf)), WEIGHTS, f"{DENSE} is not finite"),
    "header: of the whole file": (written(WEIGHTS, lambda c: (len(c) - 8).to_bytes(8, "little") + c[8:]), WEIGHTS,
                                  "not valid UTF-8"),
    "a name twice": (header_with(lambda h: json.dumps(h)[:-1] + f', "{DENSE}": {{}}}}'), WEIGHTS, "stands there twice"),
    "BERT's names": (weights_with(lambda w: [w.update({"bert." + n: w.pop(n)}) for n in [*w]]), "", "(it has bert."),
    "another head": (weights_with(lambda w: w.pop("classifier.dense.bias")), "", "the weight classifier.dense.bias is"),
    # an index of several files
    "no shard": (sharded(lambda folder, files: (folder / files[DENSE]).unlink()), "", ".safetensors: no such file"),
    **{f"shard at {place}": (sharded(lambda folder, files, place=place: files.update({DENSE: place})), INDEX,
                             f"{place!r} is not the name of a file beside it")
       for place in ("../elsewhere.safetensors", "/elsewhere.safetensors")},
    "a shard of a long name": (sharded(lambda folder, files: files.update({DENSE: "x" * 5000})), INDEX,
                               f"{'x' * 40!r} is not the name of a file beside it"),
    "absent from its shard": (sharded(absent_from_its_shard), "", DENSE),
    "unlisted": (sharded(lambda folder, files: files.pop(DENSE)), "", f"the weight {DENSE} is missing"),
    **{f"index {text!r}": (index_alone(text), INDEX, says)
       for text, says in (("", "is empty"), *[(text, "not an index of safetensors files") for text in
                          ("[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}')])},
}  # fmt: skip


@pytest.mark.parametrize(("damage", "file", "says"), BAD.values(), ids=BAD)
def test_a_bad_folder_is_refused_with_one_line(tmp_path, folder, damage, file, says):
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "elsewhere.safetensors").write_bytes((folder / WEIGHTS).read_bytes())
    damage(tmp_path / "model")
    with pytest.raises(InputError) as error:
        xlmr.load(tmp_path / "model")
    message = str(error.value)
    assert "\n" not in message and str(tmp_path / "model" / file) in message and says in message, message


# --- training some rows of the word embeddings ----------------------------------------------------------------


def trained(rows, updates=6):
    """A model after some updates of Adam, on three pieces of its vocabulary more in each: all rows or these trained."""
    torch.manual_seed(0)
    model = fresh(**NO_DROPOUT)
    xlmr.initialise(model)
    with torch.no_grad():
        model.roberta.embeddings.word_embeddings.weight[1] = 0.5  # so that a change of it would show
    if rows is not None:
        model.roberta.train_rows(rows)
    optimizer = slowfast.Adam(model.parameters(), lr=1e-2)
    for update in range(updates):
        model.train()
        ids = batch((12, 3, 25), 10 + 3 * update, seed=update)
        model.loss(model(ids), torch.tensor([2, 0, 1])).backward()
        optimizer.step()
        optimizer.zero_grad()
        if update == 2:  # a look at other pieces in between
            model.eval()(batch((30,)))
    return model


ROWS = torch.tensor([0, 2, *range(4, 25)])
WORDS = "roberta.embeddings.word_embeddings.weight"


def test_training_the_rows_that_occur_is_training_the_table():
    whole, some = trained(None), trained(ROWS)
    ids = batch((38, 20), seed=9)  # pieces that are not among the rows, too
    assert not set(ids.unique().tolist()) <= {1, *ROWS.tolist()}
    assert torch.equal(some.eval()(ids), whole.eval()(ids))
    expected, found = whole.state_dict(), some.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], w) for name, w in expected.items())
    assert sum(p.numel() for p in some.parameters()) == sum(p.numel() for p in whole.parameters()) - 32 * 76
    assert torch.equal(some.train()(batch((9,), 25)), whole.train()(batch((9,), 25)))  # and back in training


@pytest.mark.parametrize("rows", [None, ROWS], ids=["table", "rows"])
def test_the_padding_row_has_no_gradient_and_does_not_move(rows):
    model = trained(rows, updates=0)
    (model.roberta(batch((12, 3), 25)) ** 3).sum().backward()  # of the padding's states, too
    words = model.roberta.embeddings.word_embeddings.weight
    assert (words.grad[1] == 0).all() and (words.grad[0] != 0).any()  # ROWS are 0, 2, ...: in both its place is 1
    before, after = model.state_dict()[WORDS], trained(rows).state_dict()[WORDS]
    assert (after[1] == 0.5).all()
    assert torch.equal(after[25:], before[25:]) and not torch.equal(after[4:25], before[4:25])


def test_the_state_of_trained_rows_goes_round():
    some = trained(ROWS)
    state = copy.deepcopy(some.state_dict())
    for other in (trained(torch.tensor([0, 2, 4, 5, 6]), updates=0), fresh(**NO_DROPOUT)):
        other.load_state_dict(state)
        assert all(torch.equal(w, state[name]) for name, w in other.state_dict().items())
        ids = batch((38, 20), seed=9)
        assert torch.equal(other.eval()(ids), some.eval()(ids))
        assert torch.equal(other.train()(batch((9,), 7)), some.train()(batch((9,), 7)))
    assert all(torch.equal(w, state[name]) for name, w in some.state_dict().items())  # and the state was not changed


def test_trained_rows_save_as_a_table_and_a_frozen_table_stays_one(tmp_path):
    some = trained(ROWS).eval()
    xlmr.save(some, tmp_path)
    same_logits(some, hf.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval(), batch((9, 30)))
    frozen = fresh()
    frozen.roberta.embeddings.requires_grad_(False)
    frozen.roberta.train_rows(ROWS)
    assert not any(p.requires_grad for p in frozen.roberta.embeddings.parameters())
