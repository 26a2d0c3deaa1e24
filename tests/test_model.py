"""The network, its heads and its files against transformers', in both directions; dropout; trained rows; bad files."""

import copy
import json
import shutil

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import model as xlmr
import slowfast
from data import IGNORED, InputError

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


@pytest.mark.parametrize("name", ["classifier.out_proj.bias", "classifier.dense.weight"])
def test_a_head_comes_whole_or_not_at_all(tmp_path, folder, name):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    whole = xlmr.load(folder)
    weights_with(lambda weights: weights.pop(name))(tmp_path)
    ours = xlmr.load(tmp_path)
    assert (ours.classifier.out_proj.bias == 0).all() and (ours.classifier.dense.bias == 0).all()
    assert not torch.equal(ours.classifier.out_proj.weight, whole.classifier.out_proj.weight)
    assert torch.equal(ours.roberta.embeddings.LayerNorm.bias, whole.roberta.embeddings.LayerNorm.bias)


@pytest.mark.parametrize(
    ("options", "hidden", "attention"),
    [({"hidden_dropout_prob": 0.3}, 0.3, 0.2), ({"attention_probs_dropout_prob": 0.0}, 0.1, 0.0), ({}, 0.1, 0.2)],
)
def test_load_takes_other_dropout_than_the_configs_and_goes_round(tmp_path, folder, options, hidden, attention):
    shutil.copytree(folder, tmp_path / "theirs")
    config_with(attention_probs_dropout_prob=0.2)(tmp_path / "theirs")  # hidden_dropout_prob is 0.1
    ours = xlmr.load(tmp_path / "theirs", **options)
    assert {module.p for module in ours.modules() if isinstance(module, torch.nn.Dropout)} == {hidden}
    assert {m.dropout for m in ours.modules() if isinstance(m, xlmr.SelfAttention)} == {attention}
    (tmp_path / "pieces").write_bytes(b"pieces")
    xlmr.save(ours, tmp_path / "ours", tokenizer=tmp_path / "pieces")
    again = xlmr.load(tmp_path / "ours")
    assert again.config == ours.config
    assert all(torch.equal(w, again.state_dict()[name]) for name, w in ours.state_dict().items())
    names = [CONFIG, WEIGHTS, "sentencepiece.bpe.model"]
    assert sorted(file.name for file in (tmp_path / "ours").iterdir()) == names
    assert (tmp_path / "ours" / names[2]).read_bytes() == b"pieces"


def test_a_loaded_model_does_not_hold_the_file(tmp_path):
    xlmr.save(fresh(), tmp_path)
    ours = xlmr.load(tmp_path)
    before = copy.deepcopy(ours.state_dict())
    file = tmp_path / "model.safetensors"
    with open(file, "r+b") as f:
        f.write(bytes(file.stat().st_size))
    assert all(torch.equal(w, before[name]) for name, w in ours.state_dict().items())


def test_a_save_that_fails_leaves_the_last_one(tmp_path, monkeypatch):
    xlmr.save(fresh(), tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(weights, file, metadata):
        file.write_bytes(b"half")
        raise xlmr.SafetensorError("No space left on device")

    monkeypatch.setattr(xlmr, "save_file", full)
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
        index = json.loads((folder / INDEX).read_text())
        change(folder, index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return damage


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
    **{f"config {text!r}": (written(CONFIG, text), CONFIG, "not a model's config.json")
       for text in ("", "[]", "null", "\ufeff{}", b"\xff\xfe", "<html></html>")},
    **{f"{name} is {value!r}": (config_with(**{name: value}), CONFIG, "not a model's config.json")
       for name, value in (("hidden_size", "wide"), ("hidden_size", float("inf")), ("vocab_size", None),
                           ("id2label", {"0": "a", "2": "b"}), ("id2label", ["a", "b"]))},
    "another type": (config_with(model_type="bert"), CONFIG, "model_type is 'bert'"),
    "another activation": (config_with(hidden_act="relu"), CONFIG, "hidden_act is 'relu'"),
    "five heads": (config_with(num_attention_heads=5), CONFIG, "hidden_size a multiple of num_attention_heads"),
    "a negative size": (config_with(hidden_size=-32), CONFIG, "sizes must be positive"),
    "no layers": (config_with(num_hidden_layers=0), CONFIG, "sizes must be positive"),
    "an enormous size": (config_with(vocab_size=10**18), CONFIG, "more than ten million"),
    "dropout of all": (config_with(hidden_dropout_prob=1.5), CONFIG, "a dropout probability"),
    # an index of several files
    "no shard": (sharded(lambda folder, files: (folder / files[DENSE]).unlink()), "", ".safetensors: no such file"),
    **{f"shard at {place}": (sharded(lambda folder, files, place=place: files.update({DENSE: place})), INDEX,
                             f"{place!r} is not the name of a file beside it")
       for place in ("../elsewhere.safetensors", "/elsewhere.safetensors")},
    "absent from its shard": (sharded(absent_from_its_shard), "", DENSE),
    "unlisted": (sharded(lambda folder, files: files.pop(DENSE)), "", f"the weight {DENSE} is missing"),
    **{f"index {text!r}": (written(INDEX, text), INDEX, "not an index of safetensors files")
       for text in ("", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}')},
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
