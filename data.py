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

import contextlib
import gzip
import hashlib
import io
import json
import os
import socket
import sys
import tarfile
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
        super().__init__(" ".join(message.splitlines()))  # what it quotes from a file may hold line ends


@contextlib.contextmanager
def whole_file(path):
    """Yields a temporary path beside `path`, whose file gets its name when the block ends without an error: who reads
    `path` sees all of it or nothing, after a power cut too. Its folder is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Runs side by side must not write to the same name, nor may those of two machines that share the folder.
    part = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.part")
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


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
        question, passage, label = values
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
# a line `en:token<TAB>TAG` for each token and an empty one behind each sentence.

WIKIANN_URL = "https://s3.amazonaws.com/datasets.huggingface.co/wikiann/1.1.0"
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
                if member.isfile():
                    members[member.name.removeprefix("./")] = archive.extractfile(member).read()
    except Exception as error:  # tarfile and gzip have no one error for a broken archive
        raise InputError(f"{path} is not a whole tar.gz archive ({error}): {again}") from None
    if lacking := [split for split in splits if split not in members]:
        raise InputError(f"{path} lacks {', '.join(lacking)}: {again}")
    where = {split: f"{path}, member {split}" for split in splits}
    return {split: _tagged(_text(members[split], where[split], again), where[split], prefix) for split in splits}


def _tagged(text, where, prefix):
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
    languages = _languages(languages, sorted({name.split(".")[0] for name in names}), source, folder, GET_QAM)
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

    there = [x for x in MLQA_LANGUAGES if (folder / "dev" / f"dev-context-{x}-question-{x}.json").is_file()]
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
        with whole_file(cached) as part, open(part, "wb") as file:
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
