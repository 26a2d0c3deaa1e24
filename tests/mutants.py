"""What people's files and command lines may hold, and what becomes of it: a result or an InputError, nothing else.

    case = KINDS["squad"](world, folder)             # world: .model and .data, folders; folder: to be written to
    tried(case, random.Random(1), "squad 1")         # None, or what else came of one damaged file

A kind is a function that returns `case(rng)`: it damages something of its kind and gives it to the project.
"""

import contextlib
import gzip
import io
import json
import re
import shutil
import tarfile
import traceback
import zipfile
from pathlib import Path

import numpy as np
import pytest
import test_finished
from conftest import write_squad
from mutate import ODD, mutate_bytes, mutate_json, text_of

import data
import model as xlmr
from data import InputError
from paper import arguments, fetch
from paper.__main__ import main
from paper.options import FIELDS

try:
    import resource
except ImportError:  # Windows
    resource = None


def bound_memory(more):
    """From here on this process may take so many bytes more than it has: beyond that it is a MemoryError. (Linux; who
    else has no /proc/self/statm is not bounded.)"""
    taken = Path("/proc/self/statm")
    if resource and taken.is_file():
        limit = int(taken.read_text().split()[0]) * resource.getpagesize() + more
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def tried(case, rng, name):
    """What a case came to: None for a result or an InputError of one line."""
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            case(rng)
    except InputError as e:
        if "\n" in str(e) or len(str(e)) > 3000:
            return f"{name}: {str(e)[:300]!r} is not a line"
    except (Exception, SystemExit) as e:
        where = traceback.extract_tb(e.__traceback__)[-1]
        return f"{name}: {type(e).__name__} {str(e)[:300]} ({Path(where.filename).name}:{where.lineno})"
    return None


def damaged(rng, content):
    """Bytes of a file, damaged; of JSON mostly what it says."""
    if content[:1] == b"{" and rng.random() < 0.7:
        return text_of(mutate_json(rng, json.loads(content)))
    return mutate_bytes(rng, content)


# --- data ----------------------------------------------------------------------------------------------------


def tables(world, folder):
    """The tab-separated files: a cell, a line or a byte; what is read is tokenised."""
    tokenizer = data.Tokenizer(world.model)
    files = {
        "XNLI-MT-1.0/multinli/multinli.train.en.tsv": lambda file: {"": data.read_multinli(file)},
        "XNLI-1.0/xnli.dev.tsv": data.read_xnli,
        "xglue/QAM/en.train.tsv": lambda file: {"": data.read_qam(file)},
    }
    whole = {name: (world.data / name).read_bytes() for name in files}

    def case(rng):
        name = rng.choice([*files])
        file = folder / Path(name).name
        file.write_bytes((mutate_cells if rng.random() < 0.5 else mutate_bytes)(rng, whole[name]))
        for rows in files[name](file).values():
            data.tokenize_pairs(rows, tokenizer, 32)

    return case


def mutate_cells(rng, content):
    lines = [line.split(b"\t") for line in content.split(b"\n")]
    for _ in range(rng.choice((1, 1, 3))):
        cells = rng.choice(lines)
        n = rng.randrange(len(cells) + 1)
        odd = str(rng.choice([*ODD, "\t", "\t\t", '"', "\u2028", "\ufeff", "neutral"])).encode(errors="surrogatepass")
        cells[n : n + 1] = rng.choice(([odd], [odd], [], 2 * cells[n : n + 1]))
    return b"\n".join(b"\t".join(cells) for cells in lines)


def squad(world, folder):
    """SQuAD's format, and the windows of what is read."""
    tokenizer, file = data.Tokenizer(world.model), folder / "train-v1.1.json"
    write_squad(file, "en", "en", 6)
    whole = file.read_bytes()

    def case(rng):
        file.write_bytes(damaged(rng, whole))
        data.tokenize_questions(data.read_squad(file), tokenizer, 32, 10, 9)

    return case


def caches(world, folder):
    """A file of the cache: what is damaged is made again, and nothing else comes of it."""
    tokenizer, file = data.Tokenizer(world.model), world.data / "panx_dataset" / "en.tar.gz"

    def make(path):
        read = data.read_wikiann(path)
        return {split: data.tokenize_sentences(rows, tokenizer, 8) for split, rows in read.items()}

    def load():
        made = data.tokenized_file(file, make, tokenizer, "soak", folder / "cache")
        return {(name, key): values for name, part in made.items() for key, values in part.arrays().items()}

    right = load()
    (cached,) = (folder / "cache").iterdir()
    whole = cached.read_bytes()

    def case(rng):
        cached.write_bytes(mutate_bytes(rng, whole))
        found = load()
        assert found.keys() == right.keys() and all(np.array_equal(found[key], right[key]) for key in right)

    return case


def archives(world, folder):
    """WikiAnn's tar.gz, and the archives that are fetched by hand, unpacked."""
    ner, place = folder / "en.tar.gz", folder / "data"
    whole = (world.data / "panx_dataset" / ner.name).read_bytes()
    by_hand = {"qam": "xglue_full_dataset.tar.gz", "xnli": "XNLI-1.0.zip"}
    packed = {name: pack(name, files_of(world, task)) for task, name in by_hand.items()}
    rest = pack("XNLI-MT-1.0.zip", files_of(world, "mt"))

    def case(rng):
        if rng.random() < 0.5:
            ner.write_bytes(mutate_bytes(rng, whole) if rng.random() < 0.3 else mutate_inside(rng, whole))
            data.read_wikiann(ner)
            return
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        task = rng.choice([*by_hand])
        content, name = packed[by_hand[task]], by_hand[task]
        inside = name.endswith(".gz") and rng.random() < 0.5
        (place / name).write_bytes((mutate_inside if inside else mutate_bytes)(rng, content))
        (place / "XNLI-MT-1.0.zip").write_bytes(rest)
        fetch.fetch(task, place)
        assert not list(place.glob(".fetch-*"))

    return case


def mutate_inside(rng, content):
    return gzip.compress(mutate_bytes(rng, gzip.decompress(content)), compresslevel=1)


def files_of(world, task):
    """{name in the official archive: bytes} of what is fetched."""
    if task == "qam":
        names = [Path(file).name for file in fetch.SOURCES["qam"][0].files]
        folder = world.data / "xglue" / "QAM"
        return {name: (folder / f"{name.removeprefix('xglue.qam.')}.tsv").read_bytes() for name in names}
    source = fetch.SOURCES["xnli"][task == "mt"]
    return {name: (world.data / name).read_bytes() for name in source.files}


def pack(name, files):
    content = io.BytesIO()
    if name.endswith(".zip"):
        with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
            for file, text in files.items():
                archive.writestr(file, text)
    else:
        with tarfile.open(fileobj=content, mode="w:gz") as archive:
            for file, text in files.items():
                entry = tarfile.TarInfo(file)
                entry.size = len(text)
                archive.addfile(entry, io.BytesIO(text))
    return content.getvalue()


# --- models --------------------------------------------------------------------------------------------------


def copied(world, folder):
    """A copy of the model, with 2 layers: (its folder, {file: bytes})."""
    model = shutil.copytree(world.model, folder / "model")
    return model, {file: file.read_bytes() for file in model.iterdir()}


def configs(world, folder):
    """A config.json: read, and one in four times with the weights."""
    model, whole = copied(world, folder)
    file = model / "config.json"

    def case(rng):
        file.write_bytes(damaged(rng, whole[file]))
        xlmr.read_config(file)
        if rng.random() < 0.25:
            xlmr.load(model, ("a", "b"), rng.choice([*xlmr.HEADS.values()]))

    return case


def headers(world, folder):
    """The header of a safetensors file, and the index of several."""
    model, whole = copied(world, folder)
    file, index = model / "model.safetensors", model / "model.safetensors.index.json"
    content = whole[file]
    length = int.from_bytes(content[:8], "little")
    header, tensors = content[8 : 8 + length], content[8 + length :]
    names = [name for name in json.loads(header) if name != "__metadata__"]
    listed = text_of({"metadata": {}, "weight_map": dict.fromkeys(names, "part.safetensors")})

    def case(rng):
        if rng.random() < 0.1:
            file.unlink(missing_ok=True)
            (model / "part.safetensors").write_bytes(content)
            index.write_bytes(damaged(rng, listed))
        else:
            index.unlink(missing_ok=True)
            new = damaged(rng, header)
            size = len(new) if rng.random() < 0.9 else rng.choice((0, 1, length, 2**24, 2**31, 2**63))
            file.write_bytes(size.to_bytes(8, "little") + new + tensors)
        xlmr.load(model, ("a", "b"), rng.choice([*xlmr.HEADS.values()]))

    return case


TEXTS = ["", " ", "dog cat", "hund  KATZE ﬁ e\u0301 \u3000 世界", "x" * 300]


def tokenizers(world, folder):
    """A sentencepiece.bpe.model, which SentencePiece reads in C++: a process that dies is a failure, too."""
    file = folder / "sentencepiece.bpe.model"
    whole = (world.model / file.name).read_bytes()

    def case(rng):
        file.write_bytes(mutate_bytes(rng, whole))
        tokenizer = data.Tokenizer(file)
        tokenizer.encode_batch(TEXTS)
        for text in TEXTS:
            tokenizer.encode_with_spans(text)
        tokenizer.files(64)

    return case


# --- runs, options -------------------------------------------------------------------------------------------


def runs(world, folder):
    """A finished run: what reads it, and one in ten times a command that shows it."""
    tasks = ("xnli", "ner", "mlqa", "qam")
    pairs = {task: folder / task / "runs" / "paper" / task / "m" for task in tasks}
    for task, pair in pairs.items():
        pair.mkdir(parents=True)
        for method in ("df", "slowfast"):
            test_finished.write_whole(pair / f"{method}-seed1", method, task)
    whole = {task: {file: file.read_bytes() for file in pair.rglob("*") if file.is_file()}
             for task, pair in pairs.items()}  # fmt: skip
    test_finished.stand_ins(pytest.MonkeyPatch())

    def case(rng):
        task = rng.choice(tasks)
        file = test_finished.damage(rng, pairs[task] / "df-seed1")
        try:
            if rng.random() < 0.9:
                test_finished.read_all(pairs[task])
            else:
                test_finished.forget()
                shown(rng.choice(test_finished.commands(pairs[task], folder / "out", rng)))
        finally:
            for name in {file, *file.parent.glob("*.json")} & whole[task].keys():
                name.write_bytes(whole[task][name])

    return case


def shown(command):
    """A command in this process, whose status is 0, or 2 with one line."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        status = main([str(a) for a in command])
    lines = [line for line in said.getvalue().splitlines() if not re.match(r"run \d+ of ", line)]
    assert (status, len(lines)) in ((0, 0), (2, 1)), (command[0], status, lines)


def options(world, folder):
    """A command line: words that are gone, odd, doubled or another's."""
    (folder / "file").touch()
    flags = ["--" + name.replace("_", "-") for name, f in FIELDS.items() if "help" in f.metadata]
    lines = [
        "run xnli --model . --data . --lr 1e-5 --seed 3 --method slowfast --languages en,de --out x",
        "run mlqa --model . --data . --max-length 64 --stride 8 --max-question 9 --tests test,xquad --shots 5",
        "run ner --model . --data . --setup small --c1 0.1 --c2 10 --r 3 --policy4 auto --device cpu",
        "make table6 figure1 --model . --data . --seeds 1 2 --tasks xnli --args=--max-updates=5",
        "plan tables --model . --setup demo", "report . --out x --readme y",
        "table . --split dev --measure f1 --by-language --no-paper", "curves . --markdown", "fetch xnli --data x",
    ]  # fmt: skip
    words = [*flags, *(word for line in lines for word in line.split())]
    words += "file --help -- = --seed= -1 1e-400 +3 0x1 ９ nan inf en,,de --args ' --args=--seed=2 none/none".split()

    def case(rng):
        line = rng.choice(lines).split()
        for _ in range(rng.choice((1, 1, 2, 4))):
            n, odd = rng.randrange(len(line) + 1), rng.choice([rng.choice(words), str(rng.choice(ODD))])
            line[n : n + rng.choice((0, 1, 1, 1, 2))] = rng.choice(([odd], [odd], [], [f"{rng.choice(flags)}={odd}"]))
        said = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace", write_through=True)
        try:
            with contextlib.redirect_stderr(said):
                command, args = arguments.parse([word.replace("\0", "") for word in line])
                if wrong := arguments.misplaced(command, args):
                    arguments.OneLineParser().error(wrong)
        except SystemExit as e:
            lines_said = said.buffer.getvalue().decode().splitlines()
            assert e.code == 0 or (e.code == 2 and len(lines_said) == 1), (line, e.code, lines_said)

    return case


KINDS = {
    "tables": tables, "squad": squad, "caches": caches, "archives": archives, "configs": configs, "headers": headers,
    "tokenizers": tokenizers, "runs": runs, "options": options,
}  # fmt: skip
SHARES = {  # of 100,000
    "tables": 20_000, "squad": 15_000, "caches": 5_000, "archives": 10_000, "configs": 12_000, "headers": 12_000,
    "tokenizers": 6_000, "runs": 10_000, "options": 10_000,
}  # fmt: skip
assert KINDS.keys() == SHARES.keys() and sum(SHARES.values()) == 100_000
