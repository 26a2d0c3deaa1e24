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
import json
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from data import InputError, whole_file

PAD = 1  # XLM-R's <pad>


@dataclass
class Config:
    """The numbers of a `config.json` that shape the network; the defaults are XLM-R base's."""

    vocab_size: int = 250002
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 514  # two of these rows are never a token's: positions count from 2
    type_vocab_size: int = 1
    layer_norm_eps: float = 1e-5
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
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
        mask = real[:, None, None, :]  # (batch, 1, 1, length): every token attends to the real ones
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
        padding = (input_ids == PAD)[:, :, None]
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


def load(folder, labels=None, head=SequenceClassifier, **numbers):
    """Loads `config.json` and `model.safetensors` (one file or sharded; F32, F16, BF16) of `folder` in float32.

    `labels`: the names of the task's classes; None takes those of config.json, so that a saved run loads back.
    `head`: one of HEADS.
    `numbers`: in place of config.json's, such as hidden_dropout_prob.
    A head that the file lacks is new, drawn from torch's global generator. Keys that the model has no place for
    outside the encoder (`lm_head.*`, a pooler, `position_ids`) are ignored. Raises InputError for a missing file,
    one that is cut short, a missing or misshapen weight, and a config that does not fit the weights.
    """
    folder = Path(folder)
    config = dataclasses.replace(read_config(folder / "config.json", labels), **numbers)
    with torch.device("meta"):  # no memory and no time for weights that are about to be replaced
        model = head(config)
    wanted = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    weights = {}
    for file, names in weight_files(folder).items():
        weights.update(read_weights(folder / file, names, wanted))

    missing = [name for name in wanted if name not in weights]
    lost = [name for name in missing if name.startswith("roberta.")]
    if lost:
        raise InputError(
            f"{folder}: the weight {lost[0]} is missing"
            + (f" (and {len(lost) - 1} more)" if len(lost) > 1 else "")
            + "; this is not a whole XLM-R checkpoint: fetch it again"
        )
    model.load_state_dict(weights, strict=False, assign=True)
    for name, part in model.named_children():
        if missing and name != "roberta":  # a head comes whole or not at all
            initialise(part.to_empty(device="cpu"))
    return model.requires_grad_(True)


def read_config(file, labels=None):
    """config.json -> Config. Raises InputError where it is not XLM-R's."""
    if not file.is_file():
        raise InputError(f"{file}: no such file; a model folder holds config.json, model.safetensors and "
                         "sentencepiece.bpe.model (`python -m paper fetch xlm-roberta-base` fetches one)")  # fmt: skip
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
        numbers = {f.name: type(f.default)(read.get(f.name, f.default)) for f in fields(Config) if f.name != "labels"}
        names = read.get("id2label") or {}
        names = tuple(names[str(i)] for i in range(len(names))) or Config.labels
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError) as e:
        raise InputError(f"{file}: not a model's config.json ({type(e).__name__}: {e})") from e
    config = Config(**numbers, labels=tuple(labels or names))
    if read.get("hidden_act", "gelu") != "gelu":
        raise InputError(f"{file}: hidden_act is {read['hidden_act']!r}; XLM-R's is 'gelu'")
    if read.get("model_type", "xlm-roberta") not in ("xlm-roberta", "roberta"):
        raise InputError(f"{file}: model_type is {read['model_type']!r}; this code runs 'xlm-roberta'")
    if min(v for v in numbers.values() if isinstance(v, int)) < 1 or config.hidden_size % config.num_attention_heads:
        raise InputError(f"{file}: sizes must be positive and hidden_size a multiple of num_attention_heads")
    if not all(0 <= p < 1 for p in (config.hidden_dropout_prob, config.attention_probs_dropout_prob)):
        raise InputError(f"{file}: a dropout probability is at least 0 and less than 1")
    if max(v for v in numbers.values() if isinstance(v, int)) > 10**7:
        raise InputError(f"{file}: a size of more than ten million is no model's")
    return config


def weight_files(folder):
    """{file name: the keys to take from it, or None for all}, from the index of a sharded model or the one file."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return {"model.safetensors": None}
    try:
        files = {}
        for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
            if Path(file).name != file:
                raise InputError(f"{index}: {file!r} is not the name of a file beside it")
            files.setdefault(file, set()).add(name)
        return files
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        if isinstance(e, InputError):
            raise
        raise InputError(f"{index}: not an index of safetensors files ({e})") from e


def read_weights(file, names, wanted):
    """The tensors of `file` that the model wants, as {name in our model: float32}. Shapes are checked."""
    if not file.is_file():
        raise InputError(f"{file}: no such file; fetch the model again")
    weights = {}
    try:
        with safe_open(file, framework="pt") as f:
            for key in f.keys() if names is None else sorted(names):
                # A bare encoder (AutoModel) is saved without the prefix that the models with a head give it.
                name = key if key in wanted or f"roberta.{key}" not in wanted else f"roberta.{key}"
                if name not in wanted:
                    if key.removeprefix("roberta.").startswith("encoder.layer."):
                        raise InputError(f"{file}: {key} has no place in a model of config.json's size")
                    continue
                shape = tuple(f.get_slice(key).get_shape())
                if shape != wanted[name]:
                    raise InputError(f"{file}: {key} is {shape}, config.json asks for {wanted[name]}")
                # copy: a safetensors file is mapped, and must be free to be replaced while the model lives
                weights[name] = f.get_tensor(key).to(torch.float32, copy=True)
    except (SafetensorError, OSError) as e:
        raise InputError(f"{file}: not a whole safetensors file ({e}); fetch it again") from e
    return weights


def save(model, folder, tokenizer=None):
    """Writes `config.json` and `model.safetensors` (float32) for transformers' from_pretrained, and copies the
    `tokenizer` file (a sentencepiece.bpe.model) beside them. Each file is whole under its name or not there."""
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
        write_weights(weights, part)
    if tokenizer is not None:
        with whole_file(folder / "sentencepiece.bpe.model") as part:
            part.write_bytes(Path(tokenizer).read_bytes())
    with whole_file(folder / "config.json") as part:
        part.write_text(json.dumps(config, indent=2) + "\n")


def write_weights(weights, file):
    try:
        save_file(weights, file, metadata={"format": "pt"})
    except SafetensorError as e:  # it wraps the system's error (a full disk) in one of its own
        raise OSError(f"{file}: {e}") from e
    file.chmod(0o644)  # safetensors makes its files unreadable to others
