"""What several test files share: a tiny model and a tiny data set in the official layouts, and the command line."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# What `make check` leaves out (pytest -m "not slow"), by file or by the name of the test.
SLOW = (
    "test_bad_input.py", "test_bench.py", "test_e5.py", "test_fetch.py", "test_figures.py", "test_folder.py",
    "test_grid.py", "test_main.py", "test_ranks.py", "test_run.py", "test_soak.py",
    "test_alone_", "compiled]", "test_no_damage_is_a_bug", "test_watch.py::test_ranks", "test_the_trainer",
    "that_is_resumed", "test_lightning",
    "test_adam_agrees_with_torchs_over_350_updates", "test_ranks_average_their_losses", "test_the_losses_of_a_run_are",
    "test_train_is_transformers_and_torchs_adam", "[base]", "from_the_command_line", "xnli_tokenises_like_hugging_face",
    "test_a_gold_answer_comes_back", "test_every_token_of_wikiann",
)  # fmt: skip


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: `make check` leaves it out")


def pytest_collection_modifyitems(items):
    for item in items:
        if any(name in item.nodeid for name in SLOW):
            item.add_marker("slow")


LANGUAGES = ("de", "en", "fr")
ANIMALS = {"de": "hund katze kuh", "en": "dog cat cow", "fr": "chien chat vache"}
VERBS = {"de": "schlafen essen trinken", "en": "sleep eat drink", "fr": "dormir manger boire"}
LABELS = ("neutral", "contradiction", "entailment")

XNLI_COLUMNS = """language gold_label sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse
sentence1 sentence2 promptID pairID genre label1 label2 label3 label4 label5 sentence1_tokenized sentence2_tokenized
match""".split()


def sentences(language, i):
    """The i-th premise and hypothesis of a language: of different lengths."""
    animal, verb = ANIMALS[language].split()[i % 3], VERBS[language].split()[i // 3 % 3]
    return " ".join([animal, verb] * (1 + i % 5)), " ".join([verb, *[animal] * (i % 4)])


def write_tokenizer(folder):
    """A sentencepiece.bpe.model that is XLM-R's in kind: unigram, <unk> <s> </s> first. Returns the file."""
    import sentencepiece

    model = io.BytesIO()
    text = [" ".join(sentences(language, i)) for language in LANGUAGES for i in range(60)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=model, vocab_size=60, hard_vocab_limit=False, minloglevel=2
    )
    file = folder / "sentencepiece.bpe.model"
    file.write_bytes(model.getvalue())
    return file


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def write_model(folder, tokenizer, **sizes):
    """A masked language model of these sizes, as transformers saves it, with random weights, and the tokeniser. Returns
    the folder."""
    import sentencepiece
    import torch
    from transformers import XLMRobertaConfig, XLMRobertaForMaskedLM

    pieces = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.read_bytes()).get_piece_size()
    sizes = {
        "vocab_size": pieces + 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64,
        "num_hidden_layers": 12, "max_position_embeddings": 66, "type_vocab_size": 1, "layer_norm_eps": 1e-5,
        **sizes,
    }  # fmt: skip
    model = XLMRobertaForMaskedLM(XLMRobertaConfig(**sizes))
    torch.manual_seed(0)
    with torch.no_grad():  # no parameter is all 0 or all 1
        for name, p in model.named_parameters():
            p.copy_(0.1 * torch.randn_like(p) + name.endswith("LayerNorm.weight"))
    model.save_pretrained(folder)
    (folder / tokenizer.name).write_bytes(tokenizer.read_bytes())
    return folder


@pytest.fixture(scope="session")
def make_model(tiny_tokenizer, tmp_path_factory):
    """make_model(num_hidden_layers=2, ...): a new folder with a model of these sizes."""
    return lambda **sizes: write_model(tmp_path_factory.mktemp("model"), tiny_tokenizer, **sizes)


@pytest.fixture(scope="session")
def tiny_model(make_model):
    """A folder with a model of 12 layers and hidden size 32. Not to be written to."""
    return make_model()


def write_xnli(folder, dev, test):
    """XNLI's two files, so many pairs a language, and MultiNLI's English one of 60."""
    (folder / "XNLI-1.0").mkdir()
    for split, start, size in (("dev", 0, dev), ("test", dev, test)):
        lines = ["\t".join(XNLI_COLUMNS)]
        for language in LANGUAGES:
            for i in range(start, start + size):
                row = dict(zip(("sentence1", "sentence2"), sentences(language, i)))
                row |= {"language": language, "gold_label": LABELS[i * 7 % 3]}
                lines.append("\t".join(row.get(column, "") for column in XNLI_COLUMNS))
        (folder / "XNLI-1.0" / f"xnli.{split}.tsv").write_text("\n".join(lines) + "\n")
    train = folder / "XNLI-MT-1.0" / "multinli" / "multinli.train.en.tsv"
    train.parent.mkdir(parents=True)
    rows = ["\t".join([*sentences("en", i), ("neutral", "contradictory", "entailment")[i * 7 % 3]]) for i in range(60)]
    train.write_text("\n".join(["premise\thypo\tlabel", *rows]) + "\n")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """A data folder in the layout of the official archives: German, English and French, 12 dev and 12 test pairs each,
    60 English training pairs. Not to be written to."""
    folder = tmp_path_factory.mktemp("data")
    write_xnli(folder, dev=12, test=12)
    return folder


WORDS = {language: f"{ANIMALS[language]} {VERBS[language]}".split() for language in LANGUAGES}
WORDS["es"] = "perro gato vaca dormir comer beber".split()
# Sentences of NER: the tags of their tokens. In the fourth an I- follows an entity of another type; the last has none.
PATTERNS = (
    "B-PER I-PER O B-LOC", "O B-ORG I-ORG I-ORG O O", "B-LOC", "O B-PER I-LOC O B-ORG B-ORG",
    "B-PER O O O O B-LOC I-LOC", "O O O",
)  # fmt: skip


def write_squad(file, context_language, question_language, questions, start=0):
    """A file in SQuAD's format: two questions a context, contexts of 12 to 32 words, the answers of 1 to 3."""
    paragraphs = []
    for i in range(start, start + questions, 2):
        words, asked = WORDS[context_language], WORDS[question_language]
        context = [words[(i + n * n + n // 3) % 6] for n in range(12 + i * 7 % 21)]
        qas = []
        for j in (i, i + 1):
            begin = j * 5 % (len(context) - 3)
            start_of_text = len(" ".join([*context[:begin], ""]))
            gold = [context[begin : begin + 1 + k % 3] for k in (j, j + 1)]  # two annotators, who differ
            answers = [{"text": " ".join(answer), "answer_start": start_of_text} for answer in gold]
            question = " ".join(asked[(j + n) % 6] for n in range(1 + j % 4)) + "?"
            qas.append({"id": f"{question_language}{j}", "question": question, "answers": answers})
        paragraphs.append({"context": " ".join(context), "qas": qas})
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"version": "1.1", "data": [{"title": "animals", "paragraphs": paragraphs}]}))


def write_wikiann(file, language, sizes):
    """An archive of WikiAnn: its members train, dev and test."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w:gz") as archive:
        for m, (member, size) in enumerate(sizes.items()):
            text = ""
            for i in range(m, m + size):
                for n, tag in enumerate(PATTERNS[i % len(PATTERNS)].split()):
                    text += f"{language}:{WORDS[language][(i // 2 + n * (i + 1)) % 6]}\t{tag}\n"
                text += "\n"
            entry = tarfile.TarInfo(member)
            entry.size = len(text.encode())
            archive.addfile(entry, io.BytesIO(text.encode()))


def write_tasks(folder):
    """The official layouts of the other tasks: question answering in German, English and Spanish, all pairs (SQuAD 24
    questions, the others 4 each), named entities and question-answer matching in German, English and French (24 to
    train, 9 dev and 8 test). Returns the folder."""
    for split, start in (("dev", 3), ("test", 6)):
        for context in ("de", "en", "es"):
            for question in ("de", "en", "es"):
                name = f"{split}-context-{context}-question-{question}.json"
                write_squad(folder / "MLQA_V1" / split / name, context, question, 4, start)
    for context in ("de", "en", "es"):
        write_squad(folder / "xquad" / f"xquad.{context}.json", context, context, 4, 9)
    write_squad(folder / "squad" / "train-v1.1.json", "en", "en", 24)
    write_squad(folder / "squad" / "dev-v1.1.json", "en", "en", 4, 12)
    sizes = {"train": 24, "dev": 9, "test": 8}
    (folder / "xglue" / "QAM").mkdir(parents=True)
    for language in LANGUAGES:
        write_wikiann(folder / "panx_dataset" / f"{language}.tar.gz", language, sizes)
        for m, (split, size) in enumerate(sizes.items()):
            rows = [(*sentences(language, i), str(i * 5 % 7 % 2)) for i in range(m, m + size)]
            text = "".join("\t".join(row) + "\n" for row in rows)
            (folder / "xglue" / "QAM" / f"{language}.{split}.tsv").write_text(text)
    return folder


@pytest.fixture(scope="session")
def tiny_tasks(tmp_path_factory):
    """A data folder of write_tasks. Not to be written to."""
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def official(tiny_data, tiny_tasks, tmp_path_factory):
    """The files of all tasks in a folder of its own for each file of tests, which may change and mend it."""
    folder = tmp_path_factory.mktemp("official")
    for tiny in (tiny_data, tiny_tasks):
        shutil.copytree(tiny, folder, dirs_exist_ok=True)
    return folder


def contents(folder):
    """{path: bytes} of all that lies in a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in Path(folder).rglob("*") if file.is_file()}


def outcome(out):
    """All that a finished run left, without what differs from one time to the next."""
    files = contents(out)
    result = json.loads(files["result.json"])
    for name in ("tokens_per_second", "peak_memory_bytes", "seconds"):
        del result[name]
    return files | {"result.json": result}


@dataclass
class Result:
    """What a command came to."""

    status: int
    out: str
    err: str

    @property
    def messages(self):
        """The lines of stderr that address the user; the others show progress."""
        return [line for line in self.err.splitlines() if line.startswith("paper: ")]


@pytest.fixture(scope="module")
def one_thread():
    """A run in this process computes as one in another does."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run_main(capsys):
    """run_main("run", "xnli", ...): `python -m paper run xnli ...` in this process, to its end: a Result."""
    from paper.__main__ import main

    def run(*arguments):
        capsys.readouterr()
        try:
            status = main([str(a) for a in arguments])
        except SystemExit as e:
            status = e.code
        return Result(status, *capsys.readouterr())

    return run


@pytest.fixture
def start_command(tmp_path):
    """start_command("run", "xnli", ...): a Popen of `python -m paper run xnli ...` in a process of its own, one thread,
    in an empty folder. `code` in place of the arguments' module runs that text, as with python -c."""
    started = []

    def start(*arguments, code=None, **options):
        command = [sys.executable, *(["-c", code] if code else ["-m", "paper"]), *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        (tmp_path / "here").mkdir(exist_ok=True)
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        started.append(subprocess.Popen(command, cwd=tmp_path / "here", env=environment, text=True, **pipes, **options))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def run_command(start_command):
    """run_command("run", "xnli", ...): the same, to its end: a Result."""

    def run(*arguments, **options):
        process = start_command(*arguments, **options)
        out, err = process.communicate(timeout=120)
        return Result(process.returncode, out, err)

    return run
