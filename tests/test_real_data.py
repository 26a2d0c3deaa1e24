"""The official files, where they are at hand (the environment variable DATA, or ../shared/data) with the small model's
tokeniser: skipped elsewhere."""

import collections
import json
import os
from pathlib import Path

import pytest

import data

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("DATA", ROOT.parent / "shared" / "data"))
MODEL = ROOT / "models" / "multilingual-e5-small"

pytestmark = pytest.mark.skipif(not (MODEL / "sentencepiece.bpe.model").is_file(), reason="no small model here")


def files(*patterns):
    found = [pytest.param(path, id=path.stem) for pattern in patterns for path in sorted(DATA.glob(pattern))]
    return found or [pytest.param(None, marks=pytest.mark.skip(reason=f"no {patterns[0]} in {DATA}"))]


@pytest.fixture(scope="module")
def tokenizer():
    return data.Tokenizer(MODEL)


counted = collections.defaultdict(collections.Counter)  # kind of file -> kind of difference -> how often


@pytest.fixture(scope="module", autouse=True)
def report():
    """What `pytest -s` prints at the end: how many gold answers come back, and how the others differ."""
    yield
    for kind, counts in counted.items():
        print(f"\n{kind}: " + ", ".join(f"{n} {what}" for what, n in counts.most_common()), end="")


BLANK = "\u200b\ufeff"  # white space to SentencePiece, though not to str.strip


def all_answers(path):
    """(context, answer, its first character, name of the question) of each gold answer of a file."""
    for article in json.loads(path.read_text(encoding="utf-8"))["data"]:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                for answer in qa["answers"]:
                    yield paragraph["context"], answer["text"], answer["answer_start"], qa["id"]


@pytest.mark.parametrize(
    "path", files("squad/*-v1.1.json", "xquad/*.json", "MLQA_V1/dev/*.json", "MLQA_V1/test/*.json")
)
def test_a_gold_answer_comes_back_from_the_pieces_it_touches(tokenizer, path):
    """An answer that begins or ends inside of a piece, as in `(118)` or German compounds, comes back with the rest of
    that piece and no more; nothing of an answer is ever lost."""
    spans, counts = {}, counted[path.relative_to(DATA).parts[0]]
    assert data.read_squad(path)  # the file is as it should be; the answers behind the first are read here
    for context, gold, begin, name in all_answers(path):
        if not context.startswith(gold, begin):
            counts["not at the offset"] += 1
            continue
        if context not in spans:
            spans.clear()  # questions about a context stand together
            spans[context] = tokenizer.encode_with_spans(context)[1]
        end = begin + len(gold)
        touched = spans[context][(spans[context][:, 0] < end) & (spans[context][:, 1] > begin)].tolist()
        came_back = context[touched[0][0] : touched[-1][1]].strip()
        counts["answers"] += 1
        wanted = gold.strip().strip(BLANK).strip()
        if came_back.strip(BLANK) == wanted:
            continue
        assert wanted in came_back, (name, gold, came_back)
        before, after = touched[0][0] < begin, touched[-1][1] > end
        assert not before or touched[0][1] > begin and not after or touched[-1][0] < end, name
        more = (context[touched[0][0] : begin] if before else "") + (context[end : touched[-1][1]] if after else "")
        kind = "letters or digits" if any(c.isalnum() for c in more) else "punctuation"
        counts[f"with {kind} of the same piece"] += 1


def test_every_token_of_wikiann_has_one_tag_again(tokenizer):
    archives = sorted((DATA / "panx_dataset").glob("*.tar.gz"))
    if not archives:
        pytest.skip(f"no archives of WikiAnn in {DATA}")
    for archive in archives:
        sentences = data.read_wikiann(archive, ("test",))["test"]
        examples = data.tokenize_sentences(sentences, tokenizer, 128)
        bounds = examples.offsets[examples.first]
        for (tokens, tags), begin, end in zip(sentences, bounds[:-1], bounds[1:], strict=True):
            labels = examples.labels[begin:end]
            assert labels[labels != data.IGNORED].tolist() == tags, (archive.name, tokens)
        assert examples.lengths.max() <= 128
