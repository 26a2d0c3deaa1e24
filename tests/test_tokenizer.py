"""Our tokeniser against the `tokenizers` library and transformers: on a tiny vocabulary made here, and on the real one.

The real one needs a model folder with tokenizer.json (models/multilingual-e5-small, or $MODEL) and skips without it.
"""

import base64
import io
import json
import os
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import XLMRobertaTokenizer

import data

ROOT = Path(__file__).resolve().parent.parent
MODEL = Path(os.environ.get("MODEL") or ROOT / "models" / "multilingual-e5-small")
DATA = ROOT.parent / "shared" / "data"

CORPUS = """Hello world! The hello of the world, and the words of the old wall.
fine final office affine Der Hund und die Hunde in der Welt и мир и мира в мире 你好世界 世界你好 ア イ ウ 1 2 3 1/2 ... e é
a b c d e f g h i j k l m n o p q r s t u v w x y z"""

TEXTS = [
    "", " ", "   \t ", "Hello world!", "  Hello   world! ", "Hello\tworld\u3000Hello\u00a0world", "hello\u200bworld",
    "😀", "Hello 😀😀 world", "👩‍👩‍👧 Hello", "Ω", "ΩΩ Ω hello Ω", "\u200b", "\ufeff", "\u00ad", "\u200d\ufeff", "\u0007",
    "Ｈｅｌｌｏ　ｗｏｒｌｄ！", "ﬁne oﬃce", "½", "…", "ｱｲ", "e\u0301 é", "你好，世界", "мир", "▁Hello▁world", "a" * 300,
    "Hello\u2028world", "\ufffd", "x\u0000y",
]  # fmt: skip


def fields(message):
    """The fields of a protobuf message: (number, value). Written apart from data.py, which only writes."""
    stream = io.BytesIO(message)

    def varint():
        value = shift = 0
        while True:
            byte = stream.read(1)[0]
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while stream.tell() < len(message):
        number, wire = divmod(varint(), 8)
        yield number, {0: varint, 2: lambda: stream.read(varint()), 5: lambda: stream.read(4)}[wire]()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with the tokenizer.json of a small unigram model that has SentencePiece's own nmt_nfkc character map."""
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.split("\n") * 3), model_writer=trained, vocab_size=110, hard_vocab_limit=False,
        character_coverage=1.0, normalization_rule_name="nmt_nfkc", minloglevel=2,
    )  # fmt: skip
    trained = trained.getvalue()
    model = sentencepiece.SentencePieceProcessor(model_proto=trained)
    character_map = dict(fields(dict(fields(trained))[3]))[2]
    vocabulary = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary += [(model.id_to_piece(i), model.get_score(i)) for i in range(3, model.get_piece_size())]
    vocabulary += [("<mask>", 0.0)]
    folder = tmp_path_factory.mktemp("tiny")
    reference = hugging_face(vocabulary, character_map)
    (folder / "tokenizer.json").write_text(reference.to_str(), encoding="utf-8")
    (folder / "sentencepiece.bpe.model").write_bytes(data.sentencepiece_model(folder / "tokenizer.json"))
    return folder


def hugging_face(vocabulary, character_map):
    """XLM-R's tokeniser as transformers builds it, a tokenizers.Tokenizer."""
    return XLMRobertaTokenizer(vocab=vocabulary, _spm_precompiled_charsmap=character_map).backend_tokenizer


def ids(reference, texts):
    return [encoding.ids for encoding in reference.encode_batch(texts, add_special_tokens=False)]


def test_tiny_vocabulary_tokenises_like_hugging_face(tiny):
    ours = data.Tokenizer(tiny)
    theirs = tokenizers.Tokenizer.from_file(str(tiny / "tokenizer.json"))
    assert dict(zip(TEXTS, ours.encode_batch(TEXTS))) == dict(zip(TEXTS, ids(theirs, TEXTS)))
    assert ours.vocab_size == theirs.get_vocab_size()
    assert ours.encode("") == ours.encode("\u200b") == []
    assert data.UNK in ours.encode("Hello 😀") and data.UNK not in ours.encode("Ｈｅｌｌｏ")


# Left out: the special pieces in the text (text is only text to us), U+0085 (white space to Hugging Face alone), and
# combining marks and other characters that extend the one before them: where that one is ½ or the like, Hugging Face
# normalises the two as one and loses the second, SentencePiece does not.
LEFT_OUT = "<\x85\u200c\u200d\u0e33\u0eb3\uff9e\uff9f"
TEXT = st.text(st.characters(exclude_categories=["Cs", "M"], exclude_characters=LEFT_OUT) | st.sampled_from("he lo wrd世界"))


@given(TEXT)
@settings(max_examples=200, deadline=None)
def test_any_text_tokenises_like_hugging_face(tiny, text):
    theirs = tokenizers.Tokenizer.from_file(str(tiny / "tokenizer.json"))
    assert data.Tokenizer(tiny).encode(text) == theirs.encode(text, add_special_tokens=False).ids


def test_special_pieces_in_a_text_are_text(tiny):
    for text in ("<s>", "</s>", "<mask>", "<pad>", "<unk>"):
        assert not {0, 1, 2} & set(data.Tokenizer(tiny).encode(f"Hello {text} world"))


def test_sentencepiece_model_is_the_message_it_should_be(tiny):
    message = list(fields((tiny / "sentencepiece.bpe.model").read_bytes()))
    pieces = [dict(fields(value)) for number, value in message if number == 1]
    assert [(piece[1], piece[3]) for piece in pieces[:3]] == [(b"<unk>", 2), (b"<s>", 3), (b"</s>", 3)]
    assert all(3 not in piece for piece in pieces[3:]) and b"<mask>" not in [piece[1] for piece in pieces]
    assert dict(fields(dict(message)[2])) == {3: 1, 4: len(pieces)}


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model": {"vocab": [["a", 0]]}, "normalizer": null}', "null"])
def test_a_wrong_tokenizer_json_is_refused(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(data.InputError, match="tokenizer.json"):
        data.sentencepiece_model(tmp_path / "tokenizer.json")


def test_wrong_model_files_are_refused(tmp_path, tiny):
    path = tmp_path / "sentencepiece.bpe.model"
    with pytest.raises(data.InputError, match="is not there.*fetch"):
        data.Tokenizer(tmp_path)
    for content, says in ((b"", "empty"), (b"version https://git-lfs", "not a whole"), (b"\x0a\xff", "not a whole")):
        path.write_bytes(content)
        with pytest.raises(data.InputError, match=says):
            data.Tokenizer(tmp_path)
    other = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.split("\n")), model_writer=other, vocab_size=110, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    path.write_bytes(other.getvalue())  # T5's order of special pieces
    with pytest.raises(data.InputError, match="not XLM-R's"):
        data.Tokenizer(path)


def test_fingerprint_follows_the_file(tiny, tmp_path):
    copy = tmp_path / "copy.model"
    copy.write_bytes((tiny / "sentencepiece.bpe.model").read_bytes())
    assert data.Tokenizer(copy).fingerprint == data.Tokenizer(tiny).fingerprint
    copy.write_bytes(copy.read_bytes() + b"\x9a\x06\x00")  # an extension field, which SentencePiece skips
    assert data.Tokenizer(copy).fingerprint != data.Tokenizer(tiny).fingerprint


# --- truncation ----------------------------------------------------------------------------------------------


@given(st.integers(0, 40), st.integers(1, 40), st.integers(5, 90))
@settings(max_examples=150, deadline=None)
def test_pairs_are_cut_as_transformers_cuts_them(tiny, first, second, max_length):
    reference = XLMRobertaTokenizer(vocab=[("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.0)])
    a, b = "a " * first, "a " * second
    theirs = reference(a, b, truncation="longest_first", max_length=max_length)["input_ids"]
    assert data.join_pair([4] * first, [4] * second, max_length) == theirs


def test_a_pair(tiny):
    tokenizer = data.Tokenizer(tiny)
    a, b = tokenizer.encode("Hello world!"), tokenizer.encode("мир")
    assert tokenizer.pair("Hello world!", "мир", 128) == [0, *a, 2, 2, *b, 2]
    assert tokenizer.pair("", "", 128) == [0, 2, 2, 2]
    with pytest.raises(data.InputError, match="no room"):
        tokenizer.pair("Hello", "world", 3)


# --- the real vocabulary -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real():
    if not (MODEL / "tokenizer.json").is_file():
        pytest.skip(f"no tokenizer.json in {MODEL}: `make demo` fetches it")
    return data.Tokenizer(MODEL)


def test_hello_world(real):
    assert real.pair("Hello world!", "", 128) == [0, 35378, 8999, 38, 2, 2, 2]
    assert real.vocab_size == 250002


def test_xnli_dev_tokenises_like_hugging_face(real):
    """The 49,775 different sentences of the 15 dev sets: none differs from transformers' XLM-R tokeniser.

    The package's tokenizer.json lacks one step of it, and of SentencePiece: it keeps white space at the end. So one
    sentence differs by a last "▁": a Hindi one that ends in U+FEFF, which normalises to a space.
    """
    path = DATA / "XNLI-1.0" / "xnli.dev.tsv"
    if not path.is_file():
        pytest.skip(f"no {path}")
    pairs = [row for rows in data.read_xnli(path).values() for row in rows]
    texts = list(dict.fromkeys(text for row in pairs for text in row[:2]))
    content = json.loads((MODEL / "tokenizer.json").read_text(encoding="utf-8"))
    character_map = content["normalizer"]["normalizers"][0]["precompiled_charsmap"]
    transformers = hugging_face([tuple(v) for v in content["model"]["vocab"]], base64.b64decode(character_map))
    package = tokenizers.Tokenizer.from_file(str(MODEL / "tokenizer.json"))

    ours = real.encode_batch(texts)
    assert [text for text, a, b in zip(texts, ours, ids(transformers, texts)) if a != b] == []
    differ = [(text, a, b) for text, a, b in zip(texts, ours, ids(package, texts)) if a != b]
    print(f"{len(differ)} of {len(texts)} sentences differ from tokenizer.json")
    assert [text[-1] for text, _, _ in differ] == ["\ufeff"] and all(b == [*a, 6] for _, a, b in differ)
