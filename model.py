"""XLM-R in plain PyTorch, with Hugging Face's parameter names and files.

    model = load("models/xlm-roberta-base", labels=("entailment", "neutral", "contradiction"))
    logits = model(input_ids)                          # (batch, labels), float32
    model = load("models/xlm-roberta-base", labels=("start", "end"), head=QuestionAnswering)
    logits = model(input_ids)                          # (batch, length, 2); TokenClassifier: (batch, length, labels)
    model.precision = "bf16"                           # matrix products in bfloat16, in training and prediction
    states = model.roberta.hidden_states(input_ids)    # embeddings, layer 0, ..., layer 11
    save(model, "runs/mine/best")                      # loads in transformers with from_pretrained

XLM-R is RoBERTa (Liu et al. 2019, arXiv 1907.11692) with a vocabulary of 250,002 pieces (Conneau et al. 2019,
arXiv 1911.02116): post-LayerNorm transformer layers, learned positions, the exact GELU.

From top to bottom: the encoder, the heads, the files.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn

from data import InputError, Tokenizer, file_sha256, parse_json, read_json, whole_file

PAD = 1  # XLM-R's <pad>


def bounded(default, least, most):
    """A field of Config, and what a config.json may say there: its numbers decide how much memory a model takes."""
    return field(default=default, metadata={"bounds": (least, most)})


@dataclass
class Config:
    """The numbers of a `config.json` that shape the network; the defaults are XLM-R base's."""

    vocab_size: int = bounded(250002, 4, 10**7)
    hidden_size: int = bounded(768, 1, 2**14)  # XLM-R XXL's: 4,096, in 48 layers
    num_hidden_layers: int = bounded(12, 1, 256)
    num_attention_heads: int = bounded(12, 1, 2**10)
    intermediate_size: int = bounded(3072, 1, 2**16)
    max_position_embeddings: int = bounded(514, 3, 2**17)  # two rows are never a token's: positions count from 2
    type_vocab_size: int = bounded(1, 1, 100)
    layer_norm_eps: float = bounded(1e-5, 1e-20, 1)
    hidden_dropout_prob: float = bounded(0.1, 0, 0.99)
    attention_probs_dropout_prob: float = bounded(0.1, 0, 0.99)
    labels: tuple = field(default=("LABEL_0", "LABEL_1"))


# --- the encoder ---------------------------------------------------------------------------------------------


def dropout(x, p):
    """Dropout (Srivastava et al. 2014). On a CPU drawing the mask is what takes the time, with PyTorch's own a quarter
    of an update of question answering: here one random number of 64 bits decides on four elements, with p rounded to
    1/65536."""
    if p == 0 or x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    dropped = round(p * 65536)
    bits = torch.empty(x.numel() // 4 + 1, dtype=torch.int64).random_(-(2**63), None)
    bits = bits.view(torch.int16)[: x.numel()].view(x.shape)
    keep = torch.ge(bits, dropped - 32768, out=torch.empty_like(x))  # 1 or 0; by way of bool it takes six times as long
    return x * keep.mul_(65536 / (65536 - dropped))


class Dropout(nn.Dropout):
    def forward(self, x):
        return dropout(x, self.p) if self.training else x


def attended(input_ids):
    """(batch, length): the real tokens; of a row that has none the padding, for a softmax over nothing is NaN."""
    real = input_ids != PAD
    return real | ~real.any(1, keepdim=True)


class Embeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=PAD)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size, padding_idx=PAD)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids, real):
        # Positions count the real tokens from PAD + 1; padding stays at PAD, whose row is zero.
        positions = real.cumsum(1) * real + PAD  # (batch, length)
        x = self.word_embeddings(input_ids) + self.position_embeddings(positions)
        x = x + self.token_type_embeddings.weight[0]  # XLM-R has no segments: every token is of type 0
        return self.dropout(self.LayerNorm(x))  # (batch, length, hidden)


class TrainedRows(nn.Module):
    """A word-embedding table of which only `rows` are trained: those that the training data contains.

    The gradient of the others is 0, and so are both of Adam's moments: without weight decay they never move, and
    leaving them out gives the same weights. It saves most of the optimiser's work, for the table has 250,002 rows: it
    is half (large) to four fifths (multilingual-e5-small) of all parameters. In the state dict the table is whole.
    """

    def __init__(self, table, rows):
        super().__init__()
        rows = torch.unique(torch.cat([torch.as_tensor(rows), torch.tensor([PAD])]))
        self.weight = nn.Parameter(table[rows].clone())  # (rows, hidden)
        self.register_buffer("table", table.clone(), persistent=False)  # (vocabulary, hidden)
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("place", torch.full((len(table),), -1), persistent=False)
        self.place[rows] = torch.arange(len(rows))  # a piece's row in `weight`; looking up any other is an error
        self.padding = int(self.place[PAD])
        self.register_state_dict_post_hook(TrainedRows._whole)
        self.register_load_state_dict_pre_hook(TrainedRows._divide)

    def forward(self, input_ids):
        if self.training:  # and then every piece is one of the rows
            return F.embedding(self.place[input_ids], self.weight, padding_idx=self.padding)
        return F.embedding(input_ids, self.table)

    def train(self, mode=True):
        if not mode:
            self.put_back()
        return super().train(mode)

    @torch.no_grad()
    def put_back(self):
        """The table, with the trained rows in it."""
        self.table[self.rows] = self.weight
        return self.table

    def _whole(self, state, prefix, metadata):
        state[prefix + "weight"] = self.put_back()

    def _divide(self, state, prefix, *_):
        self.table.copy_(state[prefix + "weight"])
        state[prefix + "weight"] = self.table[self.rows]


class SelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = config.attention_probs_dropout_prob

    def forward(self, x, mask, rows=None):
        """x (batch, length, hidden) -> what all of its rows, or the first `rows` of each window, attend to."""
        if rows is None:
            q, k, v = self.heads_of(x, self.query, self.key, self.value)
        else:
            (q,), (k, v) = self.heads_of(x[:, :rows], self.query), self.heads_of(x, self.key, self.value)
        p = self.dropout if self.training else 0.0
        if self.training and x.device.type == "cpu":  # PyTorch's fused attention has no dropout there, and is slower
            q = q * q.shape[3] ** -0.5
            padding = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
            weights = (q @ k.transpose(2, 3)).add_(padding).softmax(3, dtype=q.dtype)
            x = dropout(weights, p) @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
        return x.transpose(1, 2).flatten(2)  # (batch, rows, hidden)

    def heads_of(self, x, *projections):
        """What each of these makes of x, (batch, heads, length, head size); as one matrix product, which is for a GPU:
        a third of the launches. (On 2 CPU cores it is as fast as three: 11.0 ms and 10.8 of hidden size 384.)"""
        weight = torch.cat([projection.weight for projection in projections])
        bias = torch.cat([projection.bias for projection in projections])
        return F.linear(x, weight, bias).unflatten(2, (len(projections), self.heads, -1)).permute(2, 0, 3, 1, 4)


class Residual(nn.Module):
    """The end of either block: project, drop out, add what came in, normalise."""

    def __init__(self, inside, config):
        super().__init__()
        self.dense = nn.Linear(inside, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, x, came_in):
        return self.LayerNorm(self.dropout(self.dense(x)) + came_in)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self = SelfAttention(config)
        self.output = Residual(config.hidden_size, config)

    def forward(self, x, mask, rows=None):
        return self.output(self.self(x, mask, rows), x[:, :rows])


class Intermediate(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)

    def forward(self, x):
        return F.gelu(self.dense(x))


class Layer(nn.Module):
    """One transformer layer: the attention block, then the feed-forward block (intermediate and output)."""

    def __init__(self, config):
        super().__init__()
        self.attention = Attention(config)
        self.intermediate = Intermediate(config)
        self.output = Residual(config.intermediate_size, config)

    def forward(self, x, mask, rows=None):
        """The new states of all of x (batch, length, hidden), or of the first `rows` of each window."""
        x = self.attention(x, mask, rows)
        return self.output(self.intermediate(x), x)


class Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = nn.Module()  # only a name: Hugging Face's parameters are called encoder.layer.N
        self.encoder.layer = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def train_rows(self, rows):
        """From here on trains, of the word embeddings, the given rows only (see TrainedRows)."""
        table = self.embeddings.word_embeddings.weight
        if table.requires_grad:
            self.embeddings.word_embeddings = TrainedRows(table.detach(), rows)

    def states(self, input_ids, rows=None):
        """Yields the hidden states (batch, length, hidden) after the embeddings and after each layer; after the last
        layer those of the first `rows` tokens alone, if that is all that is asked for."""
        real = input_ids != PAD
        mask = attended(input_ids)[:, None, None, :]  # (batch, 1, 1, length): every token attends to the real ones
        x = self.embeddings(input_ids, real)
        yield x
        for layer in self.encoder.layer:
            x = layer(x, mask, rows if layer is self.encoder.layer[-1] else None)
            yield x

    def hidden_states(self, input_ids):
        """All hidden states, a list of layers + 1 tensors (batch, length, hidden): CKA compares them."""
        return list(self.states(input_ids))

    def forward(self, input_ids, rows=None):
        """The last layer's hidden states (batch, length, hidden); input_ids (batch, length), padded with 1."""
        for x in self.states(input_ids, rows):  # noqa: B007
            pass
        return x


# --- the heads -----------------------------------------------------------------------------------------------


class ClassificationHead(nn.Module):
    """Dropout, dense, tanh, dropout, projection, on the state of `<s>`; XLM-R has no pooler."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.out_proj = nn.Linear(config.hidden_size, len(config.labels))

    def forward(self, x):
        x = torch.tanh(self.dense(self.dropout(x[:, 0])))
        return self.out_proj(self.dropout(x))  # (batch, labels)


class Finetuned(nn.Module):
    """An encoder with a task's head: input_ids (batch, length), padded with 1, -> float32 logits.

    `architecture` is Hugging Face's class with the same parameters. `loss` is the sum of the cross-entropies of a
    batch's labels but the IGNORED ones, of which there may be none. `precision`: "bf16" runs the matrix products in
    bfloat16, "fp32" everything in float32; weights, moments, losses and logits are float32 either way.
    """

    precision = "fp32"
    by_label = None  # the part of the head that has a row for each label, by its name
    rows = None  # how many states of each window the head reads, from the first: None for all

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.roberta = Encoder(config)

    def forward(self, input_ids):
        with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.head(self.roberta(input_ids, self.rows), input_ids).float()


class SequenceClassifier(Finetuned):
    """One class a window."""

    architecture = "XLMRobertaForSequenceClassification"
    by_label = "classifier.out_proj"
    rows = 1  # `<s>` alone: the last layer makes no other state, 7 % of all matrix products fewer

    def __init__(self, config):
        super().__init__(config)
        self.classifier = ClassificationHead(config)

    def head(self, x, input_ids):
        return self.classifier(x)  # (batch, labels)

    @staticmethod
    def loss(logits, labels):
        """logits (batch, labels), labels (batch,)."""
        return F.cross_entropy(logits, labels, reduction="sum")


class TokenClassifier(Finetuned):
    """A tag for each token: dropout and a projection on every state."""

    architecture = "XLMRobertaForTokenClassification"
    by_label = "classifier"

    def __init__(self, config):
        super().__init__(config)
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, len(config.labels))

    def head(self, x, input_ids):
        return self.classifier(self.dropout(x))  # (batch, length, labels)

    @staticmethod
    def loss(logits, labels):
        """logits (batch, length, labels), labels (batch, length)."""
        return F.cross_entropy(logits.transpose(1, 2), labels, reduction="sum")


class QuestionAnswering(Finetuned):
    """Points at the first and the last token of the answer: a projection of every state to two numbers."""

    architecture = "XLMRobertaForQuestionAnswering"

    def __init__(self, config):
        super().__init__(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)

    def head(self, x, input_ids):
        # No probability for padding: what a window's neighbours in the batch are must not matter.
        padding = ~attended(input_ids)[:, :, None]
        return self.qa_outputs(x).masked_fill(padding, -torch.inf)  # (batch, length, 2)

    @staticmethod
    def loss(logits, labels):
        """logits (batch, length, 2), labels (batch, 2): the place of the first token and of the last."""
        return F.cross_entropy(logits, labels, reduction="sum")


HEADS = {"xnli": SequenceClassifier, "qam": SequenceClassifier, "ner": TokenClassifier, "mlqa": QuestionAnswering}


def initialise(module):
    """BERT's initialisation in place: N(0, 0.02) matrices, zero biases and padding rows, LayerNorm 1 and 0."""
    for part in module.modules():
        if isinstance(part, nn.LayerNorm):
            part.reset_parameters()
        elif isinstance(part, (nn.Linear, nn.Embedding)):
            nn.init.normal_(part.weight, std=0.02)
            if isinstance(part, nn.Linear):
                nn.init.zeros_(part.bias)
            elif part.padding_idx is not None:
                nn.init.zeros_(part.weight[part.padding_idx])


# --- files ---------------------------------------------------------------------------------------------------


# How to come by a good file; `fetch` leaves what is there.
GET = "copy it anew, or `python -m paper fetch xlm-roberta-base --out DIR` fetches what the model's folder DIR lacks"
AGAIN = f"remove it, then {GET}"
MOST_HEADER = 1 << 24  # bytes of a safetensors file's header: XLM-R large's has 50 thousand
MOST_LABELS = 1000  # of config.json: a head has a row for each
CONVERT = (  # makes model.safetensors of what torch.save wrote
    'python -c "import glob, torch, safetensors.torch as s; s.save_file({name: w.contiguous().clone() for file in '
    "glob.glob('pytorch_model*.bin') for name, w in torch.load(file, weights_only=True).items()}, "
    "'model.safetensors', {'format': 'pt'})\""
)


def load(folder, labels=None, head=SequenceClassifier, **numbers):
    """Loads `config.json` and `model.safetensors` (one file or sharded; F32, F16, BF16) of `folder` in float32.

    `labels`: the names of the task's classes; None takes those of config.json and the head that is there, so that a
    saved run loads back.
    `head`: one of HEADS.
    `numbers`: in place of config.json's, such as hidden_dropout_prob.
    A head of other labels or another task than the task's is not taken over, which is said on stderr; one of the same
    labels in another order is, by their names. A new one is drawn from torch's global generator. Keys that the model
    has no place for outside the encoder (`lm_head.*`, a pooler, `position_ids`) are ignored. Raises InputError for a
    missing file, one that is cut short, a missing or misshapen weight, and a config that does not fit the weights.
    """
    folder = Path(folder)
    config = read_config(folder / "config.json")
    named, labels = config.labels, tuple(labels or ())
    config = dataclasses.replace(config, labels=labels or named, **numbers)
    with torch.device("meta"):  # no memory and no time for weights that are about to be replaced
        model = head(config)
    wanted = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    there = stored(folder, wanted)
    old = any(name.startswith(("classifier.", "qa_outputs.")) for name in there)
    other = other_head(model, there, wanted, named) if labels or not old else None
    if other:
        if old:
            print(InputError(f"{folder}: its head is not taken over ({other}); a new one is trained"), file=sys.stderr)
        wanted = {name: shape for name, shape in wanted.items() if name.startswith("roberta.")}
    weights = read_weights(folder, there, wanted)
    if labels and not other and model.by_label:
        rows = [lower(named).index(label) for label in lower(labels)]
        for name in (f"{model.by_label}.weight", f"{model.by_label}.bias"):
            weights[name] = weights[name][rows]
    model.load_state_dict(weights, strict=False, assign=True)
    for name, part in model.named_children():
        if other and name != "roberta":  # a head comes whole or not at all
            initialise(part.to_empty(device="cpu"))
    return model.requires_grad_(True)


def other_head(model, there, wanted, named):
    """Why the head in a model's files, whose classes config.json has `named`, is not the head of `model`, or None."""
    head = [name for name in wanted if not name.startswith("roberta.")]
    if any(name not in there for name in head):
        return "it is another task's, or not whole"
    if model.by_label and sorted(lower(named)) != sorted(lower(model.config.labels)):
        return f"its labels are {', '.join(named)[:80]}; the task's are {', '.join(model.config.labels)[:80]}"
    if any(there[name][3] != wanted[name] for name in head):
        return "it has another shape than config.json says"
    return None


def lower(labels):
    return [label.lower() for label in labels]


def read_config(file, labels=None):
    """config.json -> Config. Raises InputError where it is not XLM-R's."""
    if not file.is_file():
        raise InputError(f"{file}: no such file; a model folder holds config.json, model.safetensors and "
                         "sentencepiece.bpe.model (`python -m paper fetch xlm-roberta-base` fetches one)")  # fmt: skip
    read = read_json(file, GET)
    if not isinstance(read, dict):
        raise InputError(f"{file}: not a model's config.json: {AGAIN}")
    for name, known in (("model_type", ("xlm-roberta", "roberta")), ("hidden_act", ("gelu",)),
                        ("position_embedding_type", ("absolute",)), ("pad_token_id", (PAD,))):  # fmt: skip
        if read.get(name, known[0]) not in known:
            raise InputError(f"{file}: {name} is {quoted(read[name])}; this code runs XLM-R, whose is {known[0]!r}")
    numbers = {f.name: number_of(read, f, file) for f in fields(Config) if f.name != "labels"}
    if numbers["hidden_size"] % numbers["num_attention_heads"]:
        raise InputError(f"{file}: num_attention_heads is {numbers['num_attention_heads']}, which does not divide "
                         f"hidden_size, {numbers['hidden_size']}")  # fmt: skip
    return Config(**numbers, labels=tuple(labels or labels_of(read, file)))


def number_of(read, f, file):
    """What config.json says of a field of Config; dropout alone may be left out: of the others libraries differ in what
    they then take."""
    value, (least, most), kind = read.get(f.name), f.metadata["bounds"], type(f.default)
    if f.name.endswith("dropout_prob") and f.name not in read:
        return f.default
    if type(value) not in (kind, int) or not least <= value <= most:
        what = "a whole number" if kind is int else "a number"
        raise InputError(f"{file}: {f.name} is {quoted(value)}; it must be {what} from {least} to {most}")
    return kind(value)


def quoted(value):
    return repr(value)[:40]


def labels_of(read, file):
    """The names of the classes in their order: of id2label, or of label2id where that has none but LABEL_0, LABEL_1."""
    try:
        by_id = {int(i): name for i, name in (read.get("id2label") or {}).items()}
        by_name = {i: name for name, i in (read.get("label2id") or {}).items()}
        generic = all(name == f"LABEL_{i}" for i, name in by_id.items())
        found = by_name if generic and len(by_name) >= len(by_id) else by_id
        names = tuple(found[i] for i in range(len(found))) or Config.labels
        if not all(isinstance(name, str) for name in names) or len(names) > MOST_LABELS:
            raise ValueError(f"a label that is no text, or more than {MOST_LABELS}")
    except (ValueError, TypeError, AttributeError, KeyError) as e:
        raise InputError(f"{file}: id2label does not name classes 0, 1, ... ({type(e).__name__}: {e})") from e
    return names


def stored(folder, wanted):
    """{name in our model: (file, name there, type, shape)} of all weights in a folder's files, from their headers."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    whole = single.is_file() or not index.is_file()
    if whole and not single.is_file() and (old := sorted(folder.glob("pytorch_model*.bin"))):
        how = f"cd {shlex.quote(str(folder))} && {CONVERT}"
        raise InputError(f"{folder} holds {old[0].name} and no model.safetensors; to convert it: {how}")
    found = {}
    for file, keys in ({single: None} if whole else shards(index)).items():
        header = read_header(file)
        for key in header if keys is None else keys:
            if key not in header:
                raise InputError(f"{file}: {key[:80]} is not in it, which {index.name} says; {AGAIN}")
            found[our_name(key, wanted)] = (file, key, *header[key])
    return found


def shards(index):
    """{file: the keys that it holds} of a model in several files."""
    files = {}
    try:
        for key, name in read_json(index, GET)["weight_map"].items():
            if not re.fullmatch(r"\w[\w.-]{,199}", name, re.ASCII):
                raise InputError(f"{index}: {name[:40]!r} is not the name of a file beside it")
            files.setdefault(index.parent / name, []).append(key)
    except (TypeError, KeyError, AttributeError) as e:
        raise InputError(f"{index}: not an index of safetensors files ({type(e).__name__}: {e}); {AGAIN}") from e
    return files


def our_name(key, wanted):
    """A weight's name in our model: TensorFlow's LayerNorm has a gamma and a beta, and a bare encoder (AutoModel) is
    saved without the prefix that the models with a head give it."""
    name = key.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
    return f"roberta.{name}" if name not in wanted and f"roberta.{name}" in wanted else name


def read_header(file):
    """{key: (dtype, shape)} of a safetensors file, after a look at everything that it says of itself: the tensors lie
    one behind the other, as they are listed, without holes or overlaps, to the file's end. Raises InputError."""
    if not file.is_file():
        raise InputError(f"{file}: no such file; {GET}")
    try:
        with open(file, "rb") as f:
            size = os.fstat(f.fileno()).st_size
            length = int.from_bytes(f.read(8), "little")
            if length > min(size - 8, MOST_HEADER):
                raise ValueError(f"a header of {length} bytes")
            header, at, found = parse_json(f.read(length), file, AGAIN), 0, {}
        header.pop("__metadata__", None)
        for key, entry in header.items():
            dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            if len(shape) > 8 or not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
                raise ValueError(f"{key[:80]} has no shape or place")
            # a type's name holds its bits: F32, BF16, I64, F8_E4M3
            bits = 8 if dtype == "BOOL" else int(re.search(r"\d+", dtype)[0])
            if begin != at or (end - begin) * 8 != bits * math.prod(shape):
                raise ValueError(f"{key[:80]} does not lie where it should or is of another size")
            found[key], at = (dtype, shape), end
        if at != size - 8 - length:
            raise ValueError(f"{size} bytes where there should be {at + 8 + length}")
    except InputError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as e:
        raise InputError(f"{file}: not a whole safetensors file ({e}); {AGAIN}") from e
    return found


def read_weights(folder, there, wanted):
    """{name: float32} of the wanted weights. Their shapes and types are checked before any memory is taken."""
    if lost := [name for name in wanted if name not in there]:
        more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
        what = f"this is not a whole XLM-R checkpoint (it has {min(there, default='none')[:80]})"
        raise InputError(f"{folder}: the weight {lost[0]} is missing{more}; {what}: {AGAIN}")
    for name, (file, key, dtype, shape) in there.items():
        if name not in wanted and name.removeprefix("roberta.").startswith("encoder.layer."):
            raise InputError(f"{file}: {key[:80]} has no place in a model of config.json's size")
        if name in wanted and shape != wanted[name]:
            raise InputError(f"{file}: {key[:80]} is {shape}, config.json asks for {wanted[name]}")
        if name in wanted and dtype not in ("F64", "F32", "F16", "BF16"):
            raise InputError(f"{file}: {key[:80]} is of type {dtype[:20]}; weights are F32, F16 or BF16: {AGAIN}")
    weights = {}
    for file in {there[name][0] for name in wanted}:
        try:
            with safe_open(file, framework="pt") as f:
                for name in (name for name in wanted if there[name][0] == file):
                    # copy: a safetensors file is mapped, and must be free to be replaced while the model lives
                    weights[name] = f.get_tensor(there[name][1]).to(torch.float32, copy=True)
                    if not weights[name].sum().isfinite():
                        raise InputError(f"{file}: {there[name][1]} is not finite; {AGAIN}")
        except (SafetensorError, OSError) as e:
            raise InputError(f"{file}: not a whole safetensors file ({e}); {AGAIN}") from e
    return weights


def save(model, folder, tokenizer=None):
    """Writes `config.json` and `model.safetensors` (float32) for transformers' from_pretrained, and the files of the
    `tokenizer` (a sentencepiece.bpe.model) for it and for us. Each file is whole under its name or not there."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    c = model.config
    config = {f.name: getattr(c, f.name) for f in fields(Config) if f.name != "labels"}
    config |= {
        "architectures": [model.architecture], "model_type": "xlm-roberta", "hidden_act": "gelu",
        "bos_token_id": 0, "pad_token_id": PAD, "eos_token_id": 2, "initializer_range": 0.02,
        "position_embedding_type": "absolute", "torch_dtype": "float32",
        "id2label": {str(i): name for i, name in enumerate(c.labels)},
        "label2id": {name: i for i, name in enumerate(c.labels)},
    }  # fmt: skip
    weights = {name: w.detach().to("cpu", torch.float32).contiguous() for name, w in model.state_dict().items()}
    with whole_file(folder / "model.safetensors") as part:
        write_tensors(weights, part)
    if tokenizer is not None:
        there = folder / "sentencepiece.bpe.model"  # the last of its files
        if not there.is_file() or there.read_bytes() != Path(tokenizer).read_bytes():
            for name, content in Tokenizer(tokenizer).files(c.max_position_embeddings - 2).items():
                with whole_file(folder / name) as part:
                    part.write_bytes(content)
    with whole_file(folder / "config.json") as part:
        part.write_text(json.dumps(config, indent=2) + "\n")


def fingerprint(folder):
    """The SHA-256, in hexadecimal, of a model: of its config.json and its weights."""
    files = [Path(folder, "config.json"), *sorted(Path(folder).glob("*.safetensors"))]
    return hashlib.sha256("".join(file_sha256(file) for file in files if file.is_file()).encode()).hexdigest()


DTYPES = {torch.float64: "F64", torch.int64: "I64", torch.float32: "F32", torch.int32: "I32", torch.bool: "BOOL"}


def write_tensors(tensors, file):
    """Writes {name: tensor} as a safetensors file and returns its SHA-256, in hexadecimal. One tensor at a time leaves
    its device: safetensors' own writer holds all of them a second time."""
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # so each is aligned
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name in names:
        t, begin, end = tensors[name], end, end + tensors[name].nbytes
        header[name] = {"dtype": DTYPES[t.dtype], "shape": list(t.shape), "data_offsets": [begin, end]}
    head = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)
    content = (tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy() for name in names)
    digest = hashlib.sha256()
    with open(file, "wb") as out:
        for block in itertools.chain((len(head).to_bytes(8, "little"), head), content):
            out.write(block)
            digest.update(block)
    return digest.hexdigest()
