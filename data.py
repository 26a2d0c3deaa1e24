"""Everything between a file on disk and a batch of integers.

    tokenizer = Tokenizer("models/multilingual-e5-small")
    task = load("xnli", "data", tokenizer)                   # a Task: train, dev and test sets, tokenised
    train, dev = few_shot(task.train, task.dev, shots=10, seed=1)
    for indices in epoch_batches(train.lengths, batch_size=32, seed=1, epoch=0):
        input_ids, labels = collate(train, indices)          # (batch, longest), (batch,)

The module reads from top to bottom: the tokeniser, tokenised examples, what makes examples of the texts of a task, the
readers of the official files, the four tasks, and last the batches. Whatever is wrong with the input raises
`InputError` with one line fit for the user.
"""

import base64
import contextlib
import gzip
import hashlib
import io
import json
import os
import socket
import stat
import sys
import tarfile
import zipfile
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
import torch


class InputError(ValueError):
    """Bad input: one line that says what is wrong, in which file and line, and what to do.

    The command line prints it and exits with status 2.
    """

    def __init__(self, message):
        line = " ".join(message.splitlines())  # what it quotes, a file or a library's words, may be of any length
        super().__init__(line if len(line) <= 2000 else f"{line[:1400]} ... {line[-500:]}")


@contextlib.contextmanager
def whole_file(path):
    """Yields a temporary path beside `path`, whose file gets its name when the block ends without an error: who reads
    `path` sees all of it or nothing, after a power cut too. Its folder is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_parts(path.parent)
    # Runs side by side must not write to the same name, nor may those of two machines that share the folder.
    part = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.part")
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


# A file's content decides how much memory it takes to read. The bounds: several times what any official file has.
MOST_FILE = 1 << 29  # bytes of a file: MultiNLI in one language has up to 200 million
MOST_TEXT = 100_000  # characters of one text, and of a token: MLQA's longest context has 13,000
MOST_UNPACKED = 1 << 26  # bytes of an archive of WikiAnn, unpacked: the largest has 16 million
MOST_MEMBERS = 100  # of such an archive: there are three
MOST_PIECES = 1 << 27  # in all windows of a file: SQuAD's have 34 million
MOST_ARRAYS = 1 << 31  # bytes of a .npz file, unpacked: SQuAD's tokenised ones are 300 million
MOST_MODEL_FILE = 1 << 26  # bytes of a model's small files: XLM-R's sentencepiece.bpe.model has 5 million


def read_json(path, get):
    """What a small JSON file says, as parse_json does; `get` is how to come by a good one."""
    return parse_json(_read_bytes(path, get, MOST_MODEL_FILE), path, f"remove it, then {get}")


def parse_json(content, where, again):
    """What JSON (bytes) says. Raises InputError, which says `where` it stands and what to do (`again`), also for what
    Python's parser takes: a name that stands twice, NaN and infinity, an integer of more than 64 bits."""
    try:
        return json.loads(_text(content, where, again), object_pairs_hook=_named)
    except json.JSONDecodeError as error:
        what = f"not whole JSON ({error.msg})"
        if error.msg == "Extra data":
            what = "a second JSON value, where there is to be one (JSON Lines are not read)"
        raise InputError(f"{where}, line {error.lineno}: {what}: {again}") from None
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON as it should be ({error}): {again}") from None


def _named(pairs):
    found = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name[:40]} stands there twice")
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, (int, float)) and not -(2**63) <= number < 2**64:  # nor NaN, which is nowhere
                raise ValueError(f"{name[:40]} is {str(number)[:20]}")
        found[name] = value
    return found


def remove_parts(folder):
    """Removes what processes of this machine that were killed have left of whole_file in a folder."""
    if os.name == "nt":  # where os.kill ends whom it only asks for elsewhere
        return
    here = f".{socket.gethostname()}."
    for part in folder.glob(f"*{here}*.part"):
        with contextlib.suppress(OSError, ValueError, OverflowError):  # the process lives, or it was another machine's
            try:
                os.kill(int(part.stem.rpartition(here)[2]), 0)
            except ProcessLookupError:
                part.unlink()


# --- the tokeniser -------------------------------------------------------------------------------------------

BOS, PAD, EOS, UNK = 0, 1, 2, 3  # XLM-R inherited fairseq's ids, not SentencePiece's
XLMR_URL = "https://huggingface.co/FacebookAI/xlm-roberta"


class Tokenizer:
    """XLM-R's tokeniser (Conneau et al. 2020), which is a SentencePiece unigram model with its ids shifted by one.

    path: a folder that holds sentencepiece.bpe.model, or that file. Raises InputError if it is missing or not XLM-R's.
    Text is only ever text: "<s>" or "<mask>" inside a sentence is spelt out in ordinary pieces.

    `fingerprint` is the SHA-256 of the model file, `vocab_size` the rows an embedding table needs (250,002 for XLM-R).
    """

    def __init__(self, path):
        path = Path(path)
        if path.is_dir():
            path = path / "sentencepiece.bpe.model"
        get = f"`python -m paper fetch xlm-roberta-base` fetches it, or take it from {XLMR_URL}-base"
        model = _read_bytes(path, get, MOST_MODEL_FILE)
        self._content, self.fingerprint = model, hashlib.sha256(model).hexdigest()
        what = "remove it and fetch it again" if path.name == "sentencepiece.bpe.model" else "give a model's folder"
        self._not_whole = f"{path} is not a whole SentencePiece model: {what}"
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
            first = self._model.id_to_piece([*range(self._model.get_piece_size())])[:3]  # of all: each is a text
        except (RuntimeError, OSError, IndexError, TypeError, UnicodeDecodeError) as error:
            raise InputError(self._not_whole) from error
        if first != ["<unk>", "<s>", "</s>"]:
            raise InputError(f"{path} is not XLM-R's: it begins with {' '.join(first)}, not <unk> <s> </s>")
        self.vocab_size = self._model.get_piece_size() + 2  # <pad> and <mask> are not in the file

    def encode(self, text):
        """The ids of a text, a list of int, without special tokens; [] if nothing of it is left after normalisation."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts):
        """The ids of each of a list of texts: SentencePiece encodes them side by side on all cores."""
        # SentencePiece counts <unk> 0, <s> 1, </s> 2, pieces; XLM-R <s> 0, <pad> 1, </s> 2, <unk> 3, the same pieces.
        return [[i + 1 if i else UNK for i in ids] for ids in self._model.encode(texts, out_type=int)]

    def pair(self, a, b, max_length):
        """Two texts as the model reads them, `<s> A </s></s> B </s>`: at most max_length ids (see join_pair)."""
        return join_pair(*self.encode_batch([a, b]), max_length)

    def encode_with_spans(self, text):
        """The ids of a text, and which of its characters each stands for: (list of n ids, (n, 2) int32).

        text[begin:end] is what a piece was made from, before normalisation and without the white space before it. A
        character that becomes several (a ligature) belongs whole to every piece that holds a part of it, and so do
        several that become one (a letter and its combining marks). A lone "▁" stands for no character: begin == end.
        """
        try:
            normalized, offsets = self._model.normalize(text, with_offsets=True)
            pieces = self._model.encode(text, out_type=str)
        except UnicodeDecodeError as error:  # its table of characters is damaged
            raise InputError(self._not_whole) from error
        assert "".join(pieces) == normalized  # SentencePiece cuts the normalised text, and offsets lead back from there
        offsets = np.asarray(offsets, np.int64)  # of each normalised character, and of the end; it never falls
        lengths = np.array([len(piece) for piece in pieces], np.int64)
        ends = np.cumsum(lengths)
        space = np.array([piece.startswith("▁") for piece in pieces], bool)
        begin = offsets[ends - lengths + space]
        last = offsets[np.maximum(ends - 1, 0)]
        end = offsets[np.minimum(np.searchsorted(offsets, last, side="right"), len(offsets) - 1)]
        spans = np.stack([begin, np.where(space & (lengths == 1), begin, end)], axis=1).astype(np.int32)
        return self.encode(text), spans

    def files(self, max_length):
        """{file name: bytes} of this tokeniser for a model's folder: what AutoTokenizer.from_pretrained makes the same
        ids with, without SentencePiece, and, last, SentencePiece's own. `max_length` is the model's."""
        special = {"<s>": BOS, "<pad>": PAD, "</s>": EOS, "<unk>": UNK, "<mask>": self.vocab_size - 1}
        first, last = ([[name, 0.0] for name in names] for names in ([*special][:4], [*special][4:]))
        pieces = [[self._model.id_to_piece(i), self._model.get_score(i)] for i in range(3, self.vocab_size - 2)]
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        spec = _protobuf(_protobuf(self._content).get(3, b""))  # normalizer_spec; its second is precompiled_charsmap
        space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
        characters = base64.b64encode(spec.get(2, b"")).decode()
        normal = [{"type": "Precompiled", "precompiled_charsmap": characters}] if characters else []
        for pattern, content in (("^ +| +$", ""), (" {2,}", " ")):  # SentencePiece's remove_extra_whitespaces
            normal.append({"type": "Replace", "pattern": {"Regex": pattern}, "content": content})
        tokenizer = {
            "version": "1.0",
            "added_tokens": [{"id": i, "content": name, **flags} for name, i in special.items()],
            "normalizer": {"type": "Sequence", "normalizers": normal},
            "pre_tokenizer": space, "decoder": space,
            "post_processor": {"type": "RobertaProcessing", "cls": ["<s>", BOS], "sep": ["</s>", EOS],
                               "trim_offsets": True, "add_prefix_space": True},
            "model": {"type": "Unigram", "unk_id": UNK, "vocab": first + pieces + last},
        }  # fmt: skip
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length,
                  "model_input_names": ["input_ids", "attention_mask"], "bos_token": "<s>", "cls_token": "<s>",
                  "eos_token": "</s>", "sep_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>",
                  "mask_token": "<mask>"}  # fmt: skip
        files = {"tokenizer.json": tokenizer, "tokenizer_config.json": config}
        files = {name: json.dumps(file, ensure_ascii=False).encode() for name, file in files.items()}
        return {**files, "sentencepiece.bpe.model": self._content}


def _protobuf(message):
    """{number of a field: its last value} of those fields of a protobuf message that are not numbers."""
    found, at = {}, 0
    while at < len(message):
        tag, at = _varint(message, at)
        size = {1: 8, 5: 4}.get(tag & 7)
        if size is None:  # a number, or the length of what follows
            size, at = _varint(message, at)
        if tag & 7:
            found[tag >> 3], at = message[at : at + size], at + size
    return found


def _varint(message, at):
    """(a number in protobuf's form, seven bits a byte; the place behind it)."""
    value = shift = 0
    while message[at] > 127:
        value, shift, at = value | (message[at] & 127) << shift, shift + 7, at + 1
    return value | message[at] << shift, at + 1


def join_pair(a, b, max_length):
    """`<s> A </s></s> B </s>` of two lists of ids, cut as truncation="longest_first" of Hugging Face's tokenizers does.

    The longer text gives way until both are equal, then both; an odd place goes to the one that was longer, or to b.
    """
    room = max_length - 4
    if room < 0:
        raise InputError(f"a length of {max_length} leaves no room for a pair: it has four special tokens")
    if len(a) + len(b) > room:
        short, long = sorted((len(a), len(b)))
        short = min(short, room // 2)
        long = room - short
        a, b = (a[:long], b[:short]) if len(a) > len(b) else (a[:short], b[:long])
    return [BOS, *a, EOS, EOS, *b, EOS]


# --- tokenised examples --------------------------------------------------------------------------------------


IGNORED = -100  # the label of a piece or window that has none; PyTorch's cross-entropy skips it by default


@dataclass(frozen=True, eq=False)
class Examples:
    """Tokenised examples, one after another in flat arrays (400,000 lists would be slow to load and to take from).

    An example (a pair, a sentence, a question) is read as one window, or as several where it is too long for one:

    first (n + 1,) int64    example i is the windows first[i]:first[i + 1]
    offsets (w + 1,) int64  window j is ids[offsets[j]:offsets[j + 1]], special tokens included
    ids (total,) int32
    labels int64            of each window, (w,) its class or (w, 2) the places of the answer's first and last piece in
                            it; or of each id, (total,) its tag. IGNORED where there is none
    spans (total, 2) int32  question answering: the characters of the context that an id stands for, -1 for none
    texts                   question answering: (context, [gold answers]) of each example
    """

    ids: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray
    first: np.ndarray = None  # None: each example is one window
    spans: np.ndarray = None
    texts: list = None

    def __post_init__(self):
        if self.first is None:
            object.__setattr__(self, "first", np.arange(len(self.offsets)))

    @classmethod
    def from_lists(cls, windows, labels, first=None, spans=None, texts=None):
        """Examples of an iterable of lists of ids, and what else there is of them, lists too."""
        ids, offsets = array("i"), array("q", [0])
        for window in windows:
            ids.extend(window)
            offsets.append(len(ids))
        first = None if first is None else np.array(first, np.int64)
        spans = None if spans is None else np.concatenate([np.zeros((0, 2), np.int32), *spans])
        labels = np.array(labels, np.int64)
        return cls(np.array(ids, np.int32), np.array(offsets, np.int64), labels, first, spans, texts)

    @classmethod
    def concat(cls, parts):
        """The examples of several Examples, in order, to train on: without spans and texts."""
        return cls(
            np.concatenate([part.ids for part in parts]),
            _joined([part.offsets for part in parts]),
            np.concatenate([part.labels for part in parts]),
            _joined([part.first for part in parts]),
        )

    def __len__(self):
        return len(self.first) - 1

    @property
    def lengths(self):
        """Ids of each window, special tokens included: (w,) int64."""
        return np.diff(self.offsets)

    @property
    def labelled(self):
        """Labels of each window, the IGNORED ones left out: (w,) int64."""
        labels = self.labels != IGNORED
        if self.tagged:
            return np.add.reduceat(labels, self.offsets[:-1], dtype=np.int64)
        return labels.reshape(len(self.lengths), -1).sum(1)

    @property
    def tagged(self):
        """Whether each id has a label of its own (a window has two special tokens, so there are more ids)."""
        return len(self.labels) == len(self.ids)

    def take(self, indices):
        """The examples at these places, in that order."""
        indices = np.asarray(indices, np.int64)
        windows, first = _ranges(self.first, indices)
        places, offsets = _ranges(self.offsets, windows)
        labels = self.labels[places if self.tagged else windows]
        spans = None if self.spans is None else self.spans[places]
        texts = None if self.texts is None else [self.texts[i] for i in indices]
        return Examples(self.ids[places], offsets, labels, first, spans, texts)

    def arrays(self):
        """{name: array}, all that there is of the examples: for the cache, and to tell data sets apart."""
        arrays = {name: value for name, value in vars(self).items() if value is not None}
        if self.texts is not None:
            arrays["texts"] = np.frombuffer(json.dumps(self.texts, ensure_ascii=False).encode(), np.uint8)
        return arrays

    @classmethod
    def from_arrays(cls, arrays):
        """What `arrays` was called on. Raises ValueError if they do not fit together."""
        if "texts" in arrays:
            arrays = {**arrays, "texts": json.loads(arrays["texts"].tobytes())}
        examples = cls(**arrays)
        if any(bounds[0] or (np.diff(bounds) < 0).any() for bounds in (examples.offsets, examples.first)):
            raise ValueError("the bounds of its ranges do not rise from 0")
        fits = len(examples.ids) == examples.offsets[-1] and len(examples.offsets) - 1 == examples.first[-1]
        if not fits or len(examples.labels) not in (len(examples.ids), len(examples.offsets) - 1):
            raise ValueError("the arrays do not fit together")
        return examples


def _ranges(bounds, indices):
    """The places of the ranges bounds[i]:bounds[i + 1] for i in `indices`, one after another, and their new bounds."""
    lengths = np.diff(bounds)[indices]
    new = np.concatenate([[0], np.cumsum(lengths)])
    return np.arange(new[-1]) + np.repeat(bounds[indices] - new[:-1], lengths), new


def _joined(bounds):
    """The bounds of several arrays of ranges that are put one after another."""
    return np.concatenate([[0], np.cumsum(np.concatenate([np.diff(b) for b in bounds]))])


# --- from the texts of a task to its examples ----------------------------------------------------------------


def tokenize_pairs(rows, tokenizer, max_length):
    """Examples of rows (premise, hypothesis, label id). A premise comes with three hypotheses: it is encoded once."""
    texts = dict.fromkeys(text for row in rows for text in row[:2])
    texts = dict(zip(texts, tokenizer.encode_batch(list(texts))))
    windows = (join_pair(texts[a], texts[b], max_length) for a, b, _ in rows)
    return Examples.from_lists(windows, [label for _, _, label in rows])


def tokenize_sentences(sentences, tokenizer, max_length):
    """Examples of sentences (tokens, tag ids): `<s> pieces </s>`, each token's tag on its first piece.

    A sentence of more than max_length ids is read as several windows, divided between tokens, so that every token has
    exactly one tag. A token that SentencePiece leaves nothing of is `<unk>`; one longer than a window loses its end.
    """
    room = max_length - 2
    if room < 1:
        raise InputError(f"a length of {max_length} leaves no room for a sentence: it has two special tokens")
    vocabulary = dict.fromkeys(token for tokens, _ in sentences for token in tokens)
    pieces = dict(zip(vocabulary, tokenizer.encode_batch(list(vocabulary))))
    windows, labels, first = [], [], [0]
    for tokens, tags in sentences:
        ids, marks = [], []
        for token, tag in zip(tokens, tags):
            new = (pieces[token] or [UNK])[:room]
            if len(ids) + len(new) > room:
                windows.append([BOS, *ids, EOS])
                labels += [IGNORED, *marks, IGNORED]
                ids, marks = [], []
            ids += new
            marks += [tag] + [IGNORED] * (len(new) - 1)
        windows.append([BOS, *ids, EOS])
        labels += [IGNORED, *marks, IGNORED]
        first.append(len(windows))
    return Examples.from_lists(windows, labels, first)


def tokenize_questions(questions, tokenizer, max_length, stride, max_question):
    """Examples of Questions: `<s> question </s></s> context </s>`, as many windows as the context needs.

    max_length: ids of a window. stride: how many pieces further each window begins than the one before (BERT's and
    XTREME's doc_stride). max_question: what is left of a longer question, in pieces.
    A window that does not hold the whole answer has the label (0, 0), `<s>`, as in BERT. Raises InputError if beside a
    question so little of the context has room that pieces between two windows would never be seen.
    """
    contexts = {}
    asked = [ids[:max_question] for ids in tokenizer.encode_batch([q.question for q in questions])]
    windows, labels, first, spans = [], [], [0], []
    for question, q in zip(questions, asked):
        if question.context not in contexts:
            contexts[question.context] = tokenizer.encode_with_spans(question.context)
        ids, characters = contexts[question.context]
        room = max_length - 4 - len(q)
        if room < 1 or (room < stride and room < len(ids)):
            raise InputError(
                f"question {question.id}: it has {len(q)} pieces, so a window of {max_length} holds {max(room, 0)} of "
                f"its context's {len(ids)}, fewer than the stride of {stride}: give a larger --max-length or a smaller "
                "--stride"
            )
        if len(windows) * max_length > MOST_PIECES:
            raise InputError(f"question {question.id}: more windows than memory is meant for; give a larger --stride")
        begins = range(0, max(len(ids) - room, 0) + stride, stride)
        head = [BOS, *q, EOS, EOS]
        for begin in begins:
            part = slice(begin, begin + room)
            windows.append([*head, *ids[part], EOS])
            labels.append(_answer_places(question, characters, part, len(head)))
            nothing = np.full((1, 2), -1, np.int32)
            spans += [nothing.repeat(len(head), 0), characters[part], nothing]
            if begin + room >= len(ids):
                break
        first.append(len(windows))
    texts = [[question.context, list(question.answers)] for question in questions]
    return Examples.from_lists(windows, np.reshape(labels, (-1, 2)), first, spans, texts)


def _answer_places(question, characters, part, head):
    """The places of the answer's first and last piece in the window that holds the pieces `part` of the context."""
    if question.start is None:
        return IGNORED, IGNORED
    begin, end = question.start, question.start + len(question.answers[0])
    (touched,) = np.nonzero((characters[:, 0] < end) & (characters[:, 1] > begin))
    if not len(touched) or touched[0] < part.start or touched[-1] >= part.stop:
        return 0, 0
    return head + touched[0] - part.start, head + touched[-1] - part.start


# --- the readers of the official files -----------------------------------------------------------------------

# The files are not quoted (a `"` is a character), and only \n ends a line: U+2028 and U+0085 are text. So neither the
# csv module nor str.splitlines will do.

SOURCE = "en"  # the language of the training set, unless another is asked for
_FETCHES = "`python -m paper fetch {}` (--data DIR, where it is not data) fetches it, or "

XNLI_URL = "https://dl.fbaipublicfiles.com/XNLI"
_GET_XNLI = f"{_FETCHES.format('xnli')}unpack {XNLI_URL}/XNLI-1.0.zip into the data folder"
NLI_LABELS = ("entailment", "neutral", "contradiction")  # a label's id is its place here
_LABEL_IDS = {label: i for i, label in enumerate(NLI_LABELS)} | {"contradictory": 2}  # MultiNLI's file says this


def read_multinli(path):
    """XNLI-MT-1.0/multinli/multinli.train.en.tsv: a list of (premise, hypothesis, label id)."""
    fetches = _FETCHES.format("xnli") if Path(path).name == "multinli.train.en.tsv" else ""  # not the translated ones
    get = f"{fetches}unpack {XNLI_URL}/XNLI-MT-1.0.zip into the data folder"
    rows = _read_tsv(path, ("premise", "hypo", "label"), get)
    return [(premise, hypothesis, _nli_label(label, where, get)) for where, (premise, hypothesis, label) in rows]


def read_xnli(path):
    """XNLI-1.0/xnli.{dev,test}.tsv: {language: list of (premise, hypothesis, label id)}, in alphabetical order.

    XNLI is parallel: a language with fewer pairs than another means that the file was cut, and raises InputError.
    """
    get = _GET_XNLI
    no_label = "this looks like XTREME's copy, whose test labels are removed: use the official XNLI-1.0.zip"
    pairs = {}
    for where, row in _read_tsv(path, ("language", "sentence1", "sentence2", "gold_label"), get):
        language, premise, hypothesis, label = row
        pairs.setdefault(language, []).append((premise, hypothesis, _nli_label(label, where, no_label)))
    counts = {language: len(rows) for language, rows in pairs.items()}
    if len(set(counts.values())) > 1:
        few, many = min(counts, key=counts.get), max(counts, key=counts.get)
        raise InputError(
            f"{path}: {few[:40]} has {counts[few]} pairs and {many[:40]} {counts[many]}, but XNLI is parallel: "
            f"the file is cut short or was changed; remove it, then {get}"
        )
    return dict(sorted(pairs.items()))


def _nli_label(label, where, get):
    label = label.strip(" ")
    if label in ("", "-"):
        raise InputError(f"{where}: no label; {get}")
    if label not in _LABEL_IDS:
        raise InputError(f"{where}: unknown label {label[:40]!r}; there are {', '.join(NLI_LABELS)}")
    return _LABEL_IDS[label]


QAM_LANGUAGES = ("de", "en", "fr")
QAM_LABELS = ("0", "1")  # whether the passage answers the question
# Its server answers 409: the archive is gone, so no command fetches it.
GET_QAM = (
    "XGLUE's archive, xglue_full_dataset.tar.gz, is no longer on its server: take a copy's QAM files, "
    "xglue.qam.xx.train, .dev and .test, and put them into the data folder's xglue/QAM"
)


def read_qam(path):
    """XGLUE's QAM/xx.{train,dev,test}.tsv, which have no header: a list of (question, passage, label id)."""
    get = GET_QAM
    rows = []
    for where, values in _lines_of_tsv(path, get):
        if len(values) == 2 or (len(values) == 3 and not values[2]):
            raise InputError(f"{where}: no label: this looks like a copy whose test labels are removed; {get}")
        if len(values) != 3:
            raise InputError(f"{where}: {len(values)} columns where question, passage and label should be; {get}")
        question, passage, label = values[0], values[1], values[2].strip(" ")
        if not question.strip() or not passage.strip():
            raise InputError(
                f"{where}: the {'passage' if question.strip() else 'question'} is empty; mend it, or {get}"
            )
        if label not in QAM_LABELS:
            raise InputError(f"{where}: unknown label {label[:40]!r}; there are {', '.join(QAM_LABELS)}")
        rows.append((question, passage, QAM_LABELS.index(label)))
    return rows


def _read_tsv(path, columns, get):
    """Yields (where, values of these columns) for each row behind the header."""
    lines = _lines_of_tsv(path, get)
    _, header = next(lines, ("", [""]))
    if len(header) == 1 or header[0].startswith('"'):
        what = "has no tab" if len(header) == 1 else "is quoted"
        raise InputError(f"{path}, line 1: the header {what}: this is a copy as CSV, not the official file; {get}")
    header = [name.strip(" ") for name in header]
    lacking = [name for name in columns if name not in header]
    if lacking:
        raise InputError(f"{path}, line 1: the header lacks {', '.join(map(repr, lacking))}; remove it, then {get}")
    places = [header.index(name) for name in columns]
    where = None
    for where, values in lines:
        if len(values) != len(header):
            raise InputError(f"{where}: {len(values)} columns where the header has {len(header)}")
        yield where, [values[place] for place in places]
    if where is None:
        raise InputError(f"{path} has a header and no rows; remove it, then {get}")


def _lines_of_tsv(path, get):
    """Yields (where, values) for each line that is not blank; `where` names file and line for a message about it."""
    lines = _read_text(path, get).split("\n")
    whole = lines[-1] == ""  # the last line has its newline
    for number, line in enumerate(lines[:-1] if whole else lines, start=1):
        where = f"{path}, line {number}"
        if number == len(lines) and not whole:
            where += f" (the last, without a newline, so the file may be cut short: if so, remove it, then {get})"
        values = line.removesuffix("\r").split("\t")
        if line.strip(" \r"):
            yield where, _bounded(where, *values)


def _bounded(where, *texts):
    """The texts, none of which is longer than any that is meant to be read."""
    if (longest := max(map(len, texts))) > MOST_TEXT:
        raise InputError(f"{where}: a text of {longest:,} characters, where {MOST_TEXT:,} are the most: is it damaged?")
    return texts


# Named entities: WikiAnn (Pan et al. 2017) with the balanced splits of Rahimi et al. 2019, one archive a language, with
# a line `en:token<TAB>TAG` for each token and an empty one behind each sentence.

WIKIANN_URL = "https://s3.amazonaws.com/datasets.huggingface.co/wikiann/1.1.0"
NER_LABELS = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC")
_UNPACK_WIKIANN = f"unpack {WIKIANN_URL}/panx_dataset.zip into the data folder"
_GET_WIKIANN = _FETCHES.format("ner") + _UNPACK_WIKIANN
SPLITS = ("train", "dev", "test")


def read_wikiann(path, splits=SPLITS):
    """panx_dataset/xx.tar.gz: {split: list of (tokens, tag ids)}. The language is the file's name: `xx:` is cut off."""
    language = Path(path).name.split(".")[0]
    get = _GET_WIKIANN if language in NER_LANGUAGES else _UNPACK_WIKIANN  # others than XTREME's are not fetched
    data = _read_bytes(path, get)
    prefix, again = f"{language}:", f"remove it, then {get}"
    try:
        members = _members(data, splits)
    except Exception as error:  # tarfile and gzip have no one error for a broken archive
        raise InputError(f"{path} is not a whole tar.gz archive of WikiAnn's ({error}): {again}") from None
    if lacking := [split for split in splits if split not in members]:
        raise InputError(f"{path} lacks {', '.join(lacking)}: {again}")
    where = {split: f"{path}, member {split}" for split in splits}
    return {split: _tagged(_text(members[split], where[split], again), where[split], prefix, get) for split in splits}


def _members(data, wanted):
    """{name: bytes} of the wanted members of a tar.gz. Raises ValueError where it would take too much memory."""
    with gzip.open(io.BytesIO(data)) as file:
        # all of it first: tarfile stops at the last member, and never comes to gzip's check sum
        unpacked = file.read(MOST_UNPACKED + 1)
    if len(unpacked) > MOST_UNPACKED:
        raise ValueError(f"unpacked it is larger than {MOST_UNPACKED >> 20} MiB")
    members = {}
    with tarfile.open(fileobj=io.BytesIO(unpacked), mode="r:") as archive:
        for number, member in enumerate(archive):
            if number == MOST_MEMBERS or member.issparse():  # whose size is what it says itself, not what is there
                raise ValueError("its members are sparse" if member.issparse() else f"more than {MOST_MEMBERS} members")
            if member.isfile() and member.name.removeprefix("./") in wanted:
                members[member.name.removeprefix("./")] = archive.extractfile(member).read()
    return members


def _tagged(text, where, prefix, get):
    """The sentences of `token<TAB>TAG` lines; blank lines stand between them, and more than one is as good as one.
    Other people's comments (# ...) and document marks are no tokens, for these have the prefix. An entity may begin
    with I-, as in IOB1."""
    sentences, tokens, tags = [], [], []
    for number, line in enumerate((text + "\n\n").split("\n"), start=1):
        line = line.removesuffix("\r")
        if len(line) > MOST_TEXT:
            _bounded(f"{where}, line {number}", line)
        if line.startswith(("#", "-DOCSTART-")):
            continue
        if line.strip():
            token, tab, tag = line.rstrip(" \t").rpartition("\t")
            if not line.startswith(prefix):
                raise InputError(
                    f"{where}, line {number}: the token {(token or line)[:40]!r} does not begin with {prefix!r}; each "
                    "line is to be a prefix, the token, a tab and the tag, without an index or other columns"
                )
            if not tab or not tag:
                what = f"a token without a tag; if this is XTREME's copy of a test set, whose tags are removed, {get}"
                if line.rpartition(" ")[2] in NER_LABELS:
                    what = "a space stands before the tag, where a tab is needed"
                raise InputError(f"{where}, line {number}: {what}")
            if tag not in NER_LABELS or token.rpartition("\t")[2] in NER_LABELS:
                what = f"unknown tag {tag[:40]!r}" if tag not in NER_LABELS else "two columns of tags"
                raise InputError(f"{where}, line {number}: {what}; one is needed, of {', '.join(NER_LABELS)}")
            tokens.append(token.removeprefix(prefix))
            tags.append(NER_LABELS.index(tag))
        elif tokens:
            sentences.append((tokens, tags))
            tokens, tags = [], []
    if not any(any(tags) for _, tags in sentences):
        what = "no tag but O" if sentences else "no sentence"
        raise InputError(f"{where} holds {what}: its tags may have been removed; {get}")
    return sentences


# Question answering: SQuAD v1.1 (Rajpurkar et al. 2016) to train on, MLQA (Lewis et al. 2020) and XQuAD (Artetxe et al.
# 2020), all in SQuAD's JSON.

MLQA_URL = "https://dl.fbaipublicfiles.com/MLQA"
SQUAD_URL = "https://rajpurkar.github.io/SQuAD-explorer/dataset"
XQUAD_URL = "https://raw.githubusercontent.com/google-deepmind/xquad/master"
_GET_QA = f"{_FETCHES.format('mlqa')}get {MLQA_URL}/MLQA_V1.zip, {SQUAD_URL} and {XQUAD_URL} by hand"
_NESTED = "SQuAD's file is one object of articles, paragraphs, questions; rows, as `datasets` writes them, are not read"
MISPLACED = 0.01  # of the answers of a file may stand elsewhere than it says


@dataclass(frozen=True)
class Question:
    """A question about a context, its gold answers, and where the first of them begins in the context (in characters),
    None if it does not stand where the file says."""

    id: str
    question: str
    context: str
    answers: tuple
    start: int | None


def read_squad(path):
    """A file in the format of SQuAD v1.1: a list of Questions.

    Answers that do not stand at their offset are counted and reported on stderr (a dev or test question keeps its text,
    and counts); more than one in a hundred, and whatever else the format does not allow, raises InputError.
    """
    read = parse_json(_read_bytes(path, _GET_QA), path, f"remove it, then {_GET_QA}")
    try:
        articles = read["data"]
        paragraphs = [(a, p) for a, article in enumerate(articles, 1) for p in enumerate(article["paragraphs"], 1)]
    except (KeyError, TypeError) as error:
        what = f"not in SQuAD's format ({type(error).__name__}: {error}). {_NESTED}"
        raise InputError(f"{path}: {what}; {_GET_QA}") from None
    questions, misplaced, answers = [], [], 0
    for a, (p, paragraph) in paragraphs:
        where = f"{path}, article {a}, paragraph {p}"
        try:
            context = paragraph["context"]
            if not context.strip():
                raise InputError(f"{where}: the context is empty; mend it, or {_GET_QA}")
            for qa in paragraph["qas"]:
                questions.append(_question(qa, context, where))
                answers += len(qa["answers"])
                misplaced += [qa["id"] for answer in qa["answers"] if not _stands(answer, context)]
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{where}: not in SQuAD's format ({type(error).__name__}: {error}): {_GET_QA}") from None
    if not questions:
        raise InputError(f"{path} holds no question: remove it, then {_GET_QA}")
    if misplaced:
        message = (f"{path}: {len(misplaced)} of {answers} answers do not stand at their offset in the context (the "
                   f"first: question {misplaced[0]})")  # fmt: skip
        if len(misplaced) > MISPLACED * answers:
            raise InputError(f"{message}, more than 1 %: the file was changed; remove it, then {_GET_QA}")
        print(f"{InputError(message)}; no answer is learnt from them", file=sys.stderr)
    return questions


def _stands(answer, context):
    """Whether an answer stands in the context where it says."""
    return answer["answer_start"] >= 0 and context.startswith(answer["text"], answer["answer_start"])


def _question(qa, context, where):
    where = f"{where}, question {qa['id']}"
    if not qa["question"].strip():
        raise InputError(f"{where}: the question is empty; mend it, or {_GET_QA}")
    if qa.get("is_impossible"):
        raise InputError(f"{where}: it has no answer: this is SQuAD 2.0; SQuAD v1.1 is needed")
    answers = tuple(answer["text"] for answer in qa.get("answers") or ())
    if not any(answer.strip() for answer in answers):
        raise InputError(f"{where}: no answer: this looks like XTREME's copy, whose answers are removed; {_GET_QA}")
    try:
        "".join([qa["question"], context, *answers]).encode()
    except UnicodeEncodeError:
        raise InputError(f"{where}: half of a surrogate pair stands in its text; mend it, or {_GET_QA}") from None
    _bounded(where, qa["question"], context, *answers)
    first = qa["answers"][0]
    start = first["answer_start"] if first["text"].strip() and _stands(first, context) else None
    return Question(str(qa["id"]), qa["question"], context, answers, start)


def _read_text(path, get):
    return _text(_read_bytes(path, get), path, f"remove it, then {get}")


def _text(data, where, again):
    data = data.removeprefix(b"\xef\xbb\xbf")  # a byte order mark, if an editor left one
    if b"\r" in data and b"\n" not in data:
        raise InputError(f"{where}: its lines end in \\r alone, which nobody writes any more; make them end in \\n")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{where}, line {line}: not valid UTF-8 ({error.reason}); {again}") from None


def _read_bytes(path, get, most=MOST_FILE):
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            what = "directory" if os.path.isdir(path) else "device or a pipe"
            raise InputError(f"{path} is a {what} where a file should be: remove it, then {get}")
        if os.path.getsize(path) > most:
            raise InputError(f"{path} is larger than {most >> 20} MiB, the most that is read: remove it, then {get}")
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path} is not there: {get}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if not data:
        raise InputError(f"{path} is empty: remove it, then {get}")
    return data


# --- the tasks: what a run trains and is measured on ---------------------------------------------------------


@dataclass
class Task:
    """A tokenised task: training examples in the source language, and a dev set and test sets for each language."""

    name: str
    labels: tuple  # the names of the classes or tags; for question answering what the two outputs are
    train: Examples
    dev: dict  # language -> Examples
    tests: dict  # name of a test set -> {language: Examples}; "test" is the task's own
    source: str = SOURCE


def load(name, data, tokenizer, **options):
    """The task of that name ("xnli", "mlqa", "ner", "qam") from the folder that its official archives were unpacked to.

    Every loader takes
    data: the folder. Which files a task reads in it is said at its loader.
    max_length: ids of a window, special tokens included.
    languages: codes such as ["en", "de"]; None takes all that the files hold. The source must be among them.
    cache: a folder for the tokenised files.
    source: the language to train on. tests: the names of the test sets to load.
    Raises InputError for whatever is wrong with the files, the languages or the names.
    """
    return LOADERS[name](data, tokenizer, **options)


def load_xnli(data, tokenizer, max_length=128, languages=None, cache="cache", source=SOURCE, tests=("test",)):
    """XNLI (paper, section 4.1 and appendix B): XNLI-1.0/xnli.{dev,test}.tsv, and, to train on,
    XNLI-MT-1.0/multinli/multinli.train.en.tsv."""
    folder = Path(data) / "XNLI-1.0"
    _only(tests, "xnli", "test")

    def pairs(path, read):
        def make(path):
            return {name: tokenize_pairs(rows, tokenizer, max_length) for name, rows in read(path).items()}

        return tokenized_file(path, make, tokenizer, f"{max_length}", cache)

    dev = pairs(folder / "xnli.dev.tsv", read_xnli)
    languages = _languages(languages, dev, source, folder)
    test = pairs(folder / "xnli.test.tsv", read_xnli) if tests else None
    if tests and dev.keys() != test.keys():
        odd = ", ".join(sorted(dev.keys() ^ test.keys()))
        raise InputError(
            f"{folder}: only one of xnli.dev.tsv and xnli.test.tsv holds {odd}: remove both, then {_GET_XNLI}"
        )
    path = Path(data) / "XNLI-MT-1.0" / "multinli" / f"multinli.train.{source}.tsv"
    train = pairs(path, lambda path: {"": read_multinli(path)})[""]
    tests = {"test": _choose(test, languages)} if tests else {}
    return Task("xnli", NLI_LABELS, train, _choose(dev, languages), tests, source)


def load_qam(data, tokenizer, max_length=128, languages=None, cache="cache", source=SOURCE, tests=("test",)):
    """Question-answer matching (paper, appendix E) from XGLUE's files: xglue/QAM/xx.{train,dev,test}.tsv, or under
    their names in XGLUE's own archive, xglue.qam.xx.{train,dev,test}."""
    folder = Path(data) / "xglue" / "QAM"
    _only(tests, "qam", "test")

    def pairs(language, split):
        path = folder / f"xglue.qam.{language}.{split}"
        path = path if path.is_file() else folder / f"{language}.{split}.tsv"

        def make(path):
            return {"": tokenize_pairs(read_qam(path), tokenizer, max_length)}

        return tokenized_file(path, make, tokenizer, f"qam {max_length}", cache)[""]

    names = [file.name.removeprefix("xglue.qam.").split(".") for file in folder.glob("*.*")]
    there = sorted({language for language, split, *_ in names if split == "dev"})
    if not languages:
        partly = {language for language, split, *_ in names if split in SPLITS}
        _say_what_is_missing(QAM_LANGUAGES, there, partly, source, folder, GET_QAM)
    languages = _languages(languages, there, source, folder, GET_QAM)
    dev = {language: pairs(language, "dev") for language in languages}
    test = {name: {language: pairs(language, name) for language in languages} for name in tests}
    return Task("qam", QAM_LABELS, pairs(source, "train"), dev, test, source)


# XTREME's 40 languages, over which the paper averages; WikiAnn has 282
NER_LANGUAGES = """af ar bg bn de el en es et eu fa fi fr he hi hu id it ja jv ka kk ko ml mr ms my nl pt ru sw ta te th
tl tr ur vi yo zh""".split()


def load_ner(data, tokenizer, max_length=128, languages=None, cache="cache", source=SOURCE, tests=("test",)):
    """Named-entity recognition: WikiAnn's panx_dataset/xx.tar.gz. Without `languages` those of XTREME's 40 that are
    there."""
    folder = Path(data) / "panx_dataset"
    _only(tests, "ner", "test")
    if not folder.is_dir() and (Path(data) / "panx").is_dir():
        raise InputError(f"{Path(data) / 'panx'} is XTREME's copy, whose test tags are removed: {_GET_WIKIANN}")
    there = {file.name.split(".")[0] for file in folder.glob("*.tar.gz")}

    def sentences(language, splits):
        def make(path):
            read = read_wikiann(path, splits)
            return {split: tokenize_sentences(rows, tokenizer, max_length) for split, rows in read.items()}

        made_from = f"ner {max_length} {language} {splits}"
        return tokenized_file(folder / f"{language}.tar.gz", make, tokenizer, made_from, cache)

    if not languages:
        _say_what_is_missing(NER_LANGUAGES, there, there, source, folder, _GET_WIKIANN)
    wanted = languages or [language for language in NER_LANGUAGES if language in there]
    languages = _languages(wanted, sorted(there), source, folder, _GET_WIKIANN)
    splits = ("dev", *tests)
    sets = {language: sentences(language, splits) for language in languages}
    of = {split: {language: parts[split] for language, parts in sets.items()} for split in splits}
    train = sentences(source, ("train",))["train"]
    return Task("ner", NER_LABELS, train, of["dev"], {name: of[name] for name in tests}, source)


MLQA_LANGUAGES = ("ar", "de", "en", "es", "hi", "vi", "zh")


def load_mlqa(data, tokenizer, max_length=384, languages=None, cache="cache", source=SOURCE, tests=("test",),
              stride=128, max_question=64):  # fmt: skip
    """Question answering: squad/train-v1.1.json to train on, MLQA_V1/dev/dev-context-xx-question-xx.json as dev sets.

    Test sets: "test", MLQA's own; "xquad", xquad/xquad.xx.json; "squad", squad/dev-v1.1.json, English; "test-7x7" and
    "dev-7x7", MLQA with the context in one language and the question in another, where "en-de" is a German question
    about an English context. For stride and max_question see tokenize_questions.
    """
    data = Path(data)
    _only(tests, "mlqa", "test", "xquad", "squad", "test-7x7", "dev-7x7")
    if source != SOURCE:
        raise InputError(f"--source {source}: question answering is trained on SQuAD, which is English")
    folder = data / "MLQA_V1"

    def questions(path):
        def make(path):
            return {"": tokenize_questions(read_squad(path), tokenizer, max_length, stride, max_question)}

        return tokenized_file(path, make, tokenizer, f"mlqa {max_length} {stride} {max_question}", cache)[""]

    def mlqa(split, context, question):
        return questions(folder / split / f"{split}-context-{context}-question-{question}.json")

    def in_files(split):
        files = {x: folder / split / f"{split}-context-{x}-question-{x}.json" for x in MLQA_LANGUAGES}
        return [x for x, file in files.items() if file.is_file()]

    there = in_files("dev")
    if not languages:
        _say_what_is_missing(MLQA_LANGUAGES, there, in_files("test"), source, folder / "dev", _GET_QA)
    languages = _languages(languages, there, source, folder / "dev", _GET_QA)
    pairs = [(context, question) for context in languages for question in languages]
    files = {
        "test": lambda: {x: mlqa("test", x, x) for x in languages},
        "xquad": lambda: {x: questions(data / "xquad" / f"xquad.{x}.json") for x in languages},
        "squad": lambda: {source: questions(data / "squad" / "dev-v1.1.json")},
        "test-7x7": lambda: {f"{c}-{q}": mlqa("test", c, q) for c, q in pairs},
        "dev-7x7": lambda: {f"{c}-{q}": mlqa("dev", c, q) for c, q in pairs},
    }
    dev = {x: mlqa("dev", x, x) for x in languages}
    tests = {name: files[name]() for name in tests}
    return Task("mlqa", ("start", "end"), questions(data / "squad" / "train-v1.1.json"), dev, tests, source)


LOADERS = {"xnli": load_xnli, "mlqa": load_mlqa, "ner": load_ner, "qam": load_qam}


def _only(tests, task, *known):
    for name in tests:
        if name not in known:
            raise InputError(f"{task} has no test set {name!r}; there are {', '.join(known)}")


def _languages(wanted, there, source, folder, get=""):
    """The languages of a run, in alphabetical order: those that are wanted, or all that are there."""
    if not there:
        raise InputError(f"{folder} holds no data: {get}")
    languages = sorted(set(wanted or there))
    for language in (*languages, source):
        if language not in there:
            raise InputError(f"no language {language!r} in {folder}; there are {', '.join(there)}")
    if source not in languages:
        named = ", ".join(languages)
        raise InputError(f"the languages {named} lack {source}, the source: the gap is measured from it")
    return languages


def _say_what_is_missing(known, there, partly, source, folder, get):
    """Where no languages were asked for: says which of the paper's have no files. One that has some and no dev set
    raises InputError: as likely as not a file was lost."""
    for language in sorted({*partly} - {*there}) if there else ():
        without = f", or leave it out with --languages {','.join(there)}" if source in there else ""
        raise InputError(f"{folder} lacks the dev set of {language}, and has other files of it: {get}{without}")
    missing = [language for language in known if language not in there]
    if there and missing:
        print(f"{folder}: of the paper's {len(known)} languages {len(missing)} are not there and left out: "
              f"{', '.join(missing)}", file=sys.stderr)  # fmt: skip


def _choose(sets, languages):
    return {language: sets[language] for language in languages}


def few_shot(train, dev, shots, seed, source=SOURCE):
    """Few-shot training (paper, section 4.1): `shots` examples of each non-source dev set join the training set.

    Returns (train, dev): what was not drawn is the new dev set, and the source's stays whole. A language's draw depends
    on the seed and its name alone, not on the other languages. Raises InputError if nothing would be left of a dev set.
    """
    drawn, rest = [], dict(dev)
    for language, examples in dev.items():
        if language == source or shots == 0:
            continue
        if not 0 < shots < len(examples):
            raise InputError(f"{shots} shots: the dev set of {language} has {len(examples)}, and some must be left")
        order = np.random.default_rng([seed, *language.encode()]).permutation(len(examples))
        drawn.append(examples.take(np.sort(order[:shots])))
        rest[language] = examples.take(np.sort(order[shots:]))
    return Examples.concat([train, *drawn]), rest


CACHE_FORMAT = 2  # count up when the tokenisation or the layout of the cache changes


def tokenized_file(path, make, tokenizer, made_from, cache):
    """{name: Examples} of a file, tokenised once, by make(path), and then taken from the folder `cache`.

    The cached file is named by all that decides its content: the file's, the tokeniser's, and made_from, which names
    the reader and its options.
    """
    path = Path(path)
    if not path.is_file():
        make(path)  # it knows what to say
    key = f"{CACHE_FORMAT} {tokenizer.fingerprint} {made_from} {file_sha256(path)}"
    cached = Path(cache) / f"{path.name.split('.')[0]}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
    remove_parts(cached.parent)
    if os.path.isfile(cached):
        try:
            return _load_cached(cached)
        except Exception:  # numpy has no one error for a damaged file, and the remedy is the same for all
            print(f"{cached} is damaged and will be made again", file=sys.stderr)
    examples = make(path)
    arrays = {f"{name}/{key}": value for name, part in examples.items() for key, value in part.arrays().items()}
    try:
        with whole_file(cached) as part, open(part, "wb") as file:
            np.savez(file, **arrays)
    except OSError as error:
        print(f"{cached} cannot be written ({error.strerror}): the next run tokenises again", file=sys.stderr)
    return examples


def _load_cached(path):
    parts = {}
    for key, values in read_arrays(path).items():
        name, _, array = key.partition("/")
        parts.setdefault(name, {})[array] = values
    if not parts:
        raise ValueError("the file is empty")
    return {name: Examples.from_arrays(arrays) for name, arrays in sorted(parts.items())}


def read_arrays(file, most=MOST_ARRAYS):
    """{name: array} of a .npz file, of at most so many bytes in all. What a header says of an array's size is compared
    with the bytes that there are before any memory is taken, which np.load does not. Raises ValueError, among others,
    for a damaged file."""
    found = {}
    with zipfile.ZipFile(file) as archive:
        archive.fp.seek(-22, os.SEEK_END)  # its end says how many there are, which zipfile does not read
        if int.from_bytes(archive.fp.read()[10:12], "little") != len(archive.infolist()):
            raise ValueError("not all of its arrays are listed")
        if sum(member.file_size for member in archive.infolist()) > most:
            raise ValueError("unpacked it is larger than any of ours")
        for member in archive.infolist():
            content = io.BytesIO(archive.read(member))
            if np.lib.format.read_magic(content) != (1, 0):
                raise ValueError(f"{member.filename} is of another format")
            shape, by_column, dtype = np.lib.format.read_array_header_1_0(content)
            values = np.frombuffer(bytearray(content.read()), dtype)
            found[member.filename.removesuffix(".npy")] = values.reshape(shape, order="F" if by_column else "C")
    return found


def file_sha256(path):
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# --- batches -------------------------------------------------------------------------------------------------

POOL = 50  # batches sorted by length together: enough that little is padding, few enough that the order stays random


def epoch_batches(lengths, batch_size, seed, epoch):
    """The batches of one epoch: a list of index arrays that hold every window once; only one batch can be short.

    A pure function of its arguments: a run that was stopped calls it again and skips the batches it has seen.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))
    batches = []
    for start in range(0, len(order), POOL * batch_size):
        pool = order[start : start + POOL * batch_size]
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        batches += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
    return [batches[i] for i in random.permutation(len(batches))]


def length_sorted_batches(lengths, tokens):
    """Batches for evaluation: a list of index arrays, longest windows first, each at most `tokens` ids with padding.

    A window longer than that is a batch of its own.
    """
    order = np.argsort(-lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        size = max(1, int(tokens // lengths[order[start]]))
        batches.append(order[start : start + size])
        start += size
    return batches


def collate(examples, indices, multiple=1):
    """The windows at these places as one batch of torch tensors: input_ids (batch, longest) int64, padded with 1, and
    labels int64, (batch,), (batch, 2), or, where each id has its own, (batch, longest), padded with IGNORED. `longest`
    is rounded up to a multiple of this: fewer shapes, for who does something once a shape."""
    indices = np.asarray(indices, np.int64)
    lengths = examples.offsets[indices + 1] - examples.offsets[indices]
    longest = -(-int(lengths.max(initial=0)) // multiple) * multiple
    places = np.arange(longest)
    real = places < lengths[:, None]  # (batch, longest)
    source = (examples.offsets[indices, None] + places)[real]
    input_ids = np.full(real.shape, PAD, np.int64)
    input_ids[real] = examples.ids[source]
    if examples.tagged:
        labels = np.full(real.shape, IGNORED, np.int64)
        labels[real] = examples.labels[source]
    else:
        labels = examples.labels[indices]
    return torch.from_numpy(input_ids), torch.from_numpy(labels)
