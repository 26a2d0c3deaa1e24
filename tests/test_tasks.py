"""The tasks beside XNLI: question answering, named entities and question-answer matching.

Where a piece stands in its text, windows and tags, the readers, the loaders, the cache, few-shot, and the downloads.
What needs the real vocabulary (models/multilingual-e5-small, or $MODEL) skips without it.
"""

import gzip
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from test_data import fails, same, server, tarred, zipped  # noqa: F401 (server is a fixture)

import data
from data import IGNORED

ROOT = Path(__file__).resolve().parent.parent
MODEL = Path(os.environ.get("MODEL") or ROOT / "models" / "multilingual-e5-small")

CONTEXTS = {
    "en": "The town of Ketwick has {} houses and an old mill near the river.",
    "de": "Die Stadt Ketwick hat {} Häuser und eine alte Mühle am Fluss.",
    "zh": "凯特威克镇有{}座房子和一座旧磨坊。",
}
ASKED = {"en": "How many houses has Ketwick?", "de": "Wie viele Häuser hat Ketwick?", "zh": "凯特威克镇有多少房子？"}
CORPUS = """Hello world! The words of the old wall, fine final office affine café naïve.
и мир и мира в мире 你好世界 世界你好 株式会社 ア イ ウ ガ 한 글 صلى الله عليه وسلم नमस्ते สวัสดี שלום Ω 1/2 1⁄2 ... 0 1 2 3 4 5 6 7 8 9
a b c d e f g h i j k l m n o p q r s t u v w x y z A B C D E F G H I J K L M N O P Q R S T U V W X Y Z"""


@pytest.fixture(scope="session")
def many_scripts(tmp_path_factory):
    """A sentencepiece.bpe.model that normalises as XLM-R's does (nmt_nfkc), with pieces of many scripts."""
    model = io.BytesIO()
    lines = [*CORPUS.split("\n"), *(text.format(12) for text in CONTEXTS.values()), *ASKED.values()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 3), model_writer=model, model_type="unigram", vocab_size=260,
        hard_vocab_limit=False, character_coverage=1.0, normalization_rule_name="nmt_nfkc", byte_fallback=False,
        minloglevel=2,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("scripts") / "sentencepiece.bpe.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="session")
def tokenizer(many_scripts):
    return data.Tokenizer(many_scripts)


@pytest.fixture(scope="session")
def processor(many_scripts):
    """SentencePiece itself on the same file, to ask for pieces and normalised text."""
    return sentencepiece.SentencePieceProcessor(model_proto=many_scripts.read_bytes())


@pytest.fixture(scope="session")
def real():
    """XLM-R's own vocabulary, in our tokeniser and in SentencePiece itself."""
    path = MODEL / "sentencepiece.bpe.model"
    if not path.is_file():
        pytest.skip(f"no vocabulary in {MODEL}: `make demo` fetches it")
    return data.Tokenizer(path), sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())


@pytest.fixture(scope="session")
def hugging_face():
    """XLM-R's own vocabulary, in the `tokenizers` library."""
    if not (MODEL / "tokenizer.json").is_file():
        pytest.skip(f"no tokenizer.json in {MODEL}: `make demo` fetches it")
    return tokenizers.Tokenizer.from_file(str(MODEL / "tokenizer.json"))


def check(**options):
    """Settings of a property test: the fixtures are read-only, so that they may last for all its examples."""
    return settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], **options)


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# --- which characters a piece stands for ---------------------------------------------------------------------


def pieces_and_spans(tokenizer, processor, text):
    """[(piece, begin, end)] of a text, with what must hold for every text."""
    ids, spans = tokenizer.encode_with_spans(text)
    assert ids == tokenizer.encode(text) and spans.shape == (len(ids), 2) and spans.dtype == np.int32
    return [(piece, *span) for piece, span in zip(processor.encode(text, out_type=str), spans.tolist(), strict=True)]


def words(pieces, text):
    """The words of a text as the spans of its pieces have them: from the first to the last character of each."""
    found = []
    for piece, begin, end in pieces:
        if piece.startswith("▁"):
            found.append([begin, end])
        elif begin < end:
            found[-1] = [begin, end] if found[-1][0] == found[-1][1] else [found[-1][0], end]
    return [text[begin:end] for begin, end in found]


FRAGMENTS = [
    "Hello", "world", "the", " ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u3000", "\u200b", "\ufeff", "\u00ad", "▁",
    "Ｈｅｌｌｏ", "！", "ﬁ", "ﬃ", "㍿", "ﷺ", "‥", "…", "½", "¨", "e\u0301", "o\u0302\u0301", "\u0301", "\u1112\u1161\u11ab",
    "\u1161", "ｶﾞ", "ﾞ", "é", "你好", "世界", "한", "صلى", "नमस्ते", "สวัสดี", "и\u0306", "😀", "👩\u200d👧", "𓀀", "ꙮ", "\x07",
    "\x00", "<s>", "<unk>",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(FRAGMENTS) | st.characters(exclude_categories=["Cs"]), max_size=12).map("".join)


@given(TEXTS)
@check(max_examples=200)
def test_spans_lie_in_order_in_the_text_and_cover_all_that_is_kept(tokenizer, processor, text):
    pieces = pieces_and_spans(tokenizer, processor, text)
    spans = np.array([span for _, *span in pieces]).reshape(-1, 2)
    assert np.all(spans >= 0) and np.all(spans <= len(text)) and np.all(spans[:, 0] <= spans[:, 1])
    assert np.all(np.diff(spans[:, 0]) >= 0)
    assert np.all(np.diff([end for piece, _, end in pieces if piece != "▁"]) >= 0)
    covered = {i for begin, end in spans for i in range(begin, end)}
    assert {i for i, c in enumerate(text) if processor.normalize(c).strip("▁ ")} <= covered


@given(TEXTS)
@check(max_examples=200)
def test_the_characters_of_a_piece_normalise_to_it(tokenizer, processor, text):
    for piece, begin, end in pieces_and_spans(tokenizer, processor, text):
        assert piece.removeprefix("▁") in processor.normalize(text[begin:end])
        assert (begin == end) == (piece == "▁")
        assert begin == end or processor.normalize(text[begin]).strip("▁ ")  # no white space before it


@given(st.lists(st.text("abcdefgHIJK.,0123456789", min_size=1, max_size=9), min_size=1, max_size=9).map(" ".join))
@check(max_examples=100)
def test_where_nothing_is_normalised_a_span_is_its_piece(tokenizer, processor, text):
    for piece, begin, end in pieces_and_spans(tokenizer, processor, text):
        assert text[begin:end] == piece.removeprefix("▁")


COMPOSED = [  # text, the characters that are normalised as one, and to what
    ("Ｈｅｌｌｏ world", 0, 1, "H"),
    ("Hello ｗｏｒｌｄ", 6, 7, "w"),
    ("a ﬁne", 2, 3, "fi"),
    ("oﬃce", 1, 2, "ffi"),
    ("the ㍿ of", 4, 5, "株式会社"),
    ("x ﷺ y", 2, 3, "صلىاللهعليهوسلم"),
    ("a‥b", 1, 2, ".."),
    ("Hello…", 5, 6, "..."),
    ("a½", 1, 2, "1⁄2"),
    ("the cafe\u0301s", 7, 9, "é"),
    ("e\u0301", 0, 2, "é"),
    ("a \u1112\u1161\u11ab글", 2, 5, "한"),
    ("ｶﾞa", 0, 2, "ガ"),
]


@pytest.mark.parametrize("vocabulary", ["tiny", "real"])
@pytest.mark.parametrize(("text", "begin", "end", "normal"), COMPOSED)
def test_characters_that_become_one_or_several_are_not_divided(request, vocabulary, text, begin, end, normal):
    if vocabulary == "real":
        tokenizer, processor = request.getfixturevalue("real")
    else:
        tokenizer, processor = map(request.getfixturevalue, ("tokenizer", "processor"))
    pieces = pieces_and_spans(tokenizer, processor, text)
    touching = [piece for piece in pieces if piece[1] < end and piece[2] > begin]
    assert normal in "".join(piece.removeprefix("▁") for piece, _, _ in touching)
    assert all(b <= begin and end <= e for _, b, e in touching)
    assert words(pieces, text) == text.split() or "ﷺ" in text  # of which the "words" are all the same character


WHITE = [" ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u3000", "\u2009", "\u2028", "\u200b", "\ufeff", " \t\u3000 "]


@pytest.mark.parametrize("space", WHITE)
def test_white_space_of_every_kind_belongs_to_no_piece(tokenizer, processor, space):
    for text in (f"Hello{space}world", f"{space}Hello{space}{space}world{space}", f"你好{space}😀{space}e\u0301"):
        pieces = pieces_and_spans(tokenizer, processor, text)
        assert words(pieces, text) == text.replace(space, " ").split()
        assert not any(c in text[begin:end] for _, begin, end in pieces for c in space)


@pytest.mark.parametrize("text", ["Hello 😀😀 wor𓀀ld", "ꙮ", "👩‍👩‍👧 Hello", "Ωꙮ 😀", "<s> </s> <unk> <mask>"])
def test_unknown_characters_have_spans_like_others(tokenizer, processor, text):
    pieces = pieces_and_spans(tokenizer, processor, text)
    covered = {i for _, begin, end in pieces for i in range(begin, end)}
    assert covered == {i for i, c in enumerate(text) if processor.normalize(c).strip("▁ ")}


@pytest.mark.parametrize("text", ["", " ", " \t\n", "\u200b", "\u3000\ufeff"])
def test_a_text_of_nothing_has_no_pieces_and_no_spans(tokenizer, text):
    ids, spans = tokenizer.encode_with_spans(text)
    assert ids == [] and spans.shape == (0, 2) and spans.dtype == np.int32


ORDINARY = [
    "The quick brown fox jumps over the lazy dog; it didn't stop (not even once) in 1,024 days.",
    "Straßenbahnhaltestellen gibt es in München überall – auch am „Marienplatz“.",
    "L'été dernier, nous sommes allés à la plage : c'était génial !",
    "Он родился в Москве 12 апреля 1961 года.",
    "Η Αθήνα είναι η πρωτεύουσα της Ελλάδας.",
    "北京是中华人民共和国的首都，人口超过两千万。",
    "東京タワーは1958年に完成した。",
    "서울은 대한민국의 수도이다.",
    "القاهرة هي عاصمة مصر وأكبر مدنها.",
    "नई दिल्ली भारत की राजधानी है।",
    "กรุงเทพมหานครเป็นเมืองหลวงของประเทศไทย",
    "Hà Nội là thủ đô của Việt Nam, nằm bên sông Hồng.",
    "  Two  blanks\tand a tab ",
]


def test_spans_of_ordinary_sentences_are_those_of_hugging_face(real, hugging_face):
    """Theirs have the white space before a word too, and give a lone "▁" the character behind it."""
    ours, _ = real
    dev = data.read_xnli(ROOT / "sample" / "XNLI-1.0" / "xnli.dev.tsv")
    for text in [*ORDINARY, *(row[0] for rows in dev.values() for row in rows[:20])]:
        text = text.rstrip()  # the package's tokenizer.json makes a piece of white space at the end
        ids, spans = ours.encode_with_spans(text)
        other = hugging_face.encode(text, add_special_tokens=False)
        assert ids == other.ids
        for piece, (begin, end), (b, e) in zip(other.tokens, spans.tolist(), other.offsets, strict=True):
            assert piece == "▁" and begin == end or text[begin:end] == text[b:e].strip(), (text, piece)


# --- the windows of a question -------------------------------------------------------------------------------


def ask(context, answer, start=None, question="the old wall", id="q1"):
    """A Question; its answer is where it first stands, unless said otherwise. start < 0: nowhere."""
    start = context.index(answer) if start is None else start
    return data.Question(id, question, context, (answer,), None if start < 0 else start)


def windows_of(examples, i=0):
    """The windows of an example: (ids, labels, spans) of each, as lists."""
    for j in range(examples.first[i], examples.first[i + 1]):
        part = slice(examples.offsets[j], examples.offsets[j + 1])
        spans = None if examples.spans is None else examples.spans[part].tolist()
        labels = examples.labels[part] if examples.tagged else examples.labels[j]
        yield examples.ids[part].tolist(), labels.tolist(), spans


def whole_answer(label, spans, context):
    return context[spans[label[0]][0] : spans[label[1]][1]]


WORDS = ["Hello", "world", "the", "words", "of", "wall", "office", "Ketwick", "river", "you", "世界你好", "мира", "😀"]


@given(
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=60), st.integers(1, 30), st.integers(16, 60),
    st.integers(0, 99), st.integers(1, 6),
)  # fmt: skip
@check(max_examples=80)
def test_windows_begin_a_stride_apart_and_show_every_piece(tokenizer, context, stride, max_length, at, max_question):
    # One answer of one to three whole words: pieces do not cross words, so the spans lead back to it exactly.
    at %= len(context)
    answer = " ".join(context[at : at + 1 + at % 3])
    start = len(" ".join([*context[:at], ""]))
    context = " ".join(context)
    ids, places = tokenizer.encode_with_spans(context)
    q = tokenizer.encode("the old wall")[:max_question]
    room = max_length - 4 - len(q)
    assume(room >= stride or room >= len(ids))
    examples = data.tokenize_questions([ask(context, answer, start)], tokenizer, max_length, stride, max_question)
    windows = list(windows_of(examples))
    assert len(examples) == 1 and examples.labels.shape == (len(windows), 2)
    touched = [i for i, (b, e) in enumerate(places) if b < start + len(answer) and e > start]
    for j, (window, label, spans) in enumerate(windows):
        part = range(j * stride, min(j * stride + room, len(ids)))
        assert window == [0, *q, 2, 2, *(ids[i] for i in part), 2] and len(window) <= max_length
        head = [[-1, -1]] * (len(q) + 3)
        assert spans == [*head, *(places[i].tolist() for i in part), [-1, -1]]
        if touched[0] in part and touched[-1] in part:
            assert whole_answer(label, spans, context) == answer
        else:
            assert label == [0, 0]
    ends = [j * stride + room for j in range(len(windows))]
    assert ends[-1] >= len(ids) and all(end < len(ids) for end in ends[:-1])  # the last, and only it, is at the end


def test_an_answer_that_begins_within_a_piece_takes_the_whole_piece(tokenizer):
    context = "Hello world"
    examples = data.tokenize_questions([ask(context, "orl")], tokenizer, 40, 20, 8)
    ((_, label, spans),) = windows_of(examples)
    assert "orl" in whole_answer(label, spans, context) and whole_answer(label, spans, context) in "world"


@pytest.mark.parametrize("answer", ["oﬃce", "㍿", "cafe\u0301", "ﷺ", "‥", "\u1112\u1161\u11ab", "Ｗｏｒｌｄ"])
def test_an_answer_that_normalisation_changes_is_found_again(tokenizer, answer):
    context = f"Hello\u3000{answer} of the wall"
    ((_, label, spans),) = windows_of(data.tokenize_questions([ask(context, answer)], tokenizer, 90, 20, 8))
    assert label[0] > 0 and whole_answer(label, spans, context) == answer


def test_an_answer_that_is_not_at_its_place_is_not_learnt(tokenizer):
    context = "Hello world " * 30
    examples = data.tokenize_questions([ask(context, "mill", -1)], tokenizer, 30, 10, 8)
    assert len(examples.labels) > 1 and np.all(examples.labels == IGNORED)
    assert examples.texts == [[context, ["mill"]]]  # but it counts when a model is measured


def test_of_a_long_question_the_end_is_cut(tokenizer):
    long = "How many houses has Ketwick? " * 9
    for max_question in (1, 5, 20):
        examples = data.tokenize_questions([ask("Hello world", "world", question=long)], tokenizer, 99, 9, max_question)
        q = tokenizer.encode(long)[:max_question]
        assert len(q) == max_question and next(windows_of(examples))[0][: max_question + 3] == [0, *q, 2, 2]


def test_a_context_of_thousands_of_words(tokenizer):
    numbers = [str(i) for i in range(4000)]
    context = " ".join(numbers)
    question = ask(context, "3987", context.index(" 3987 ") + 1)
    examples = data.tokenize_questions([question], tokenizer, 384, 128, 64)
    windows = list(windows_of(examples))
    assert len(windows) > 50 and max(len(ids) for ids, _, _ in windows) == 384
    holding = [(label, spans) for _, label, spans in windows if label != [0, 0]]
    assert holding and all(whole_answer(label, spans, context) == "3987" for label, spans in holding)


def test_questions_about_one_context_and_their_texts_keep_their_order(tokenizer):
    text = CONTEXTS["en"].format(12)
    questions = [ask(text, "12", id="a"), ask("Hello world", "world", id="b"), ask(text, "mill", question="Hello")]
    examples = data.tokenize_questions(questions, tokenizer, 24, 6, 8)
    assert len(examples) == 3 and examples.texts == [[q.context, list(q.answers)] for q in questions]
    for i, question in enumerate(questions):
        alone = data.tokenize_questions([question], tokenizer, 24, 6, 8)
        assert same(examples.take([i]), alone)
        labelled = [(label, spans) for _, label, spans in windows_of(alone) if label != [0, 0]]
        assert {whole_answer(*both, question.context) for both in labelled} == set(question.answers)


def test_a_context_that_normalisation_leaves_nothing_of_is_one_empty_window(tokenizer):
    examples = data.tokenize_questions([ask("\u200b", "\u200b")], tokenizer, 40, 8, 8)
    assert [(ids[-3:], label) for ids, label, _ in windows_of(examples)] == [([2, 2, 2], [0, 0])]


@pytest.mark.parametrize(("max_length", "stride"), [(4, 1), (6, 1), (20, 15), (3, 9)])
def test_a_window_too_small_for_the_context_names_the_question(tokenizer, max_length, stride):
    question = ask("Hello world " * 20, "world", id="q77", question="the old wall " * 3)
    message = fails("question q77: ", data.tokenize_questions, [question], tokenizer, max_length, stride, 8)
    assert f"of {max_length} holds" in message and "larger --max-length or a smaller --stride" in message


def test_the_stride_may_be_longer_than_a_window_that_holds_the_whole_context(tokenizer):
    examples = data.tokenize_questions([ask("Hello", "Hello")], tokenizer, 30, 500, 8)
    assert len(examples.labels) == 1


@pytest.mark.parametrize(("max_length", "stride"), [(384, 128), (64, 20), (40, 25)])
def test_windows_are_those_of_hugging_face(real, hugging_face, max_length, stride):
    """Their `stride` is what two windows have in common, ours how far they are apart."""
    ours, _ = real
    context = " ".join(text.strip() for text in ORDINARY * 4)
    for question, answer in (("When did the fox stop?", "1,024"), ("首都在哪里？", "北京"), ("Wo?", "Marienplatz")):
        examples = data.tokenize_questions([ask(context, answer, question=question)], ours, max_length, stride, 64)
        overlap = max_length - 4 - len(ours.encode(question)) - stride
        hugging_face.enable_truncation(max_length, stride=overlap, strategy="only_second")
        first = hugging_face.encode(question, context)
        hugging_face.no_truncation()
        windows = [ids for ids, _, _ in windows_of(examples)]
        assert len(windows) > 1 and windows == [e.ids for e in (first, *first.overflowing)]
        found = [whole_answer(label, spans, context) for _, label, spans in windows_of(examples) if label != [0, 0]]
        assert found and all(answer in text for text in found)


# --- the tags of a sentence ----------------------------------------------------------------------------------

TOKENS = ["Hello", "world", "Ketwick", "the", "\u200b", "", " ", "𓀀", "Straßenbahnhaltestelle", "世界你好", "．", "wall" * 9]


@given(st.lists(st.lists(st.tuples(st.sampled_from(TOKENS), st.integers(0, 6)), min_size=1, max_size=20), min_size=1,
                max_size=6), st.integers(3, 30))  # fmt: skip
@check(max_examples=80)
def test_every_token_has_one_tag_on_its_first_piece(tokenizer, rows, max_length):
    sentences = [([token for token, _ in row], [tag for _, tag in row]) for row in rows]
    examples = data.tokenize_sentences(sentences, tokenizer, max_length)
    assert len(examples) == len(sentences) and examples.tagged and examples.lengths.max() <= max_length
    for i, row in enumerate(rows):
        pieces = [(tokenizer.encode(token) or [3])[: max_length - 2] for token, _ in row]
        expected = [(p, tag if k == 0 else IGNORED) for ids, (_, tag) in zip(pieces, row) for k, p in enumerate(ids)]
        windows = [list(zip(ids, labels)) for ids, labels, _ in windows_of(examples, i)]
        assert all(w[0] == (0, IGNORED) and w[-1] == (2, IGNORED) for w in windows)
        assert [pair for w in windows for pair in w[1:-1]] == expected
        # A window begins with a whole token, and only because that had no room in the one before.
        starts = np.cumsum([0, *(len(w) - 2 for w in windows[:-1])])
        begins = dict(zip(np.cumsum([0, *map(len, pieces[:-1])]).tolist(), map(len, pieces)))
        for before, start in zip(windows, starts[1:].tolist()):
            assert start in begins and len(before) + begins[start] > max_length


def test_a_short_sentence_is_one_window(tokenizer):
    hello, world = tokenizer.encode("Hello"), tokenizer.encode("Ketwicks")
    assert len(world) > 1
    examples = data.tokenize_sentences([(["Hello", "Ketwicks", "\u200b"], [0, 5, 2])], tokenizer, 64)
    expected = [IGNORED, 0, *[IGNORED] * (len(hello) - 1), 5, *[IGNORED] * (len(world) - 1), 2, IGNORED]
    assert list(windows_of(examples)) == [([0, *hello, *world, data.UNK, 2], expected, None)]


def test_of_a_token_longer_than_a_window_the_end_is_lost_and_its_neighbours_are_not(tokenizer):
    long = "wall" * 50
    examples = data.tokenize_sentences([(["Hello", long, "world"], [1, 3, 5])], tokenizer, 20)
    windows = list(windows_of(examples))
    assert len(windows) == 3 and windows[1][0] == [0, *tokenizer.encode(long)[:18], 2]
    assert [[tag for tag in labels if tag != IGNORED] for _, labels, _ in windows] == [[1], [3], [5]]


@pytest.mark.parametrize("max_length", [0, 1, 2])
def test_a_length_without_room_for_a_piece_is_refused(tokenizer, max_length):
    fails(f"a length of {max_length} leaves no room", data.tokenize_sentences, [(["a"], [0])], tokenizer, max_length)


# --- examples of several windows -----------------------------------------------------------------------------

KINDS = ("classes", "places", "tags")


@st.composite
def nested(draw, kind, min_size=1):
    """Examples as nested lists: windows of (ids, label or labels, spans), and the texts."""
    window = st.lists(st.integers(0, 250001), min_size=2, max_size=7)
    examples = draw(st.lists(st.lists(window, min_size=1, max_size=4), min_size=min_size, max_size=8))
    number = iter(range(10**6))
    label = {"classes": lambda ids: next(number), "places": lambda ids: [next(number), next(number)],
             "tags": lambda ids: [next(number) for _ in ids]}[kind]  # fmt: skip
    spans = (lambda ids: [[next(number), next(number)] for _ in ids]) if kind == "places" else lambda ids: None
    nested = [[(ids, label(ids), spans(ids)) for ids in windows] for windows in examples]
    texts = [[f"context {i}\u2028é", [f"answer {i}", ""]] for i in range(len(nested))]
    return nested, texts if kind == "places" else None


def build(nested, texts, kind):
    windows = [window for example in nested for window in example]
    labels = [label for _, label, _ in windows]
    if kind == "tags":
        labels = [tag for window in labels for tag in window]
    first = np.cumsum([0, *map(len, nested)])
    spans = [np.array(s, np.int32) for _, _, s in windows] if kind == "places" else None
    return data.Examples.from_lists([ids for ids, _, _ in windows], labels, first, spans, texts)


def lists(examples):
    return [list(windows_of(examples, i)) for i in range(len(examples))]


@pytest.mark.parametrize("kind", KINDS)
@given(st.data())
@check(max_examples=50)
def test_taking_and_joining_examples_is_that_of_lists(kind, draw):
    listed, texts = draw.draw(nested(kind))
    examples = build(listed, texts, kind)
    assert lists(examples) == listed and examples.tagged == (kind == "tags")
    indices = draw.draw(st.lists(st.integers(0, len(listed) - 1), max_size=12))
    taken = examples.take(indices)
    assert lists(taken) == [listed[i] for i in indices]
    assert taken.texts == (None if texts is None else [texts[i] for i in indices])
    both = data.Examples.concat([examples, taken, examples])
    assert both.spans is None and both.texts is None
    bare = [[(ids, label, None) for ids, label, _ in example] for example in listed]
    assert lists(both) == bare + [bare[i] for i in indices] + bare


@pytest.mark.parametrize("kind", KINDS)
@given(st.data())
@check(max_examples=25)
def test_examples_are_what_their_arrays_say(kind, draw):
    examples = build(*draw.draw(nested(kind)), kind)
    stored = io.BytesIO()
    np.savez(stored, **examples.arrays())
    stored.seek(0)
    with np.load(stored, allow_pickle=False) as file:
        assert same(data.Examples.from_arrays(dict(file)), examples)


@pytest.mark.parametrize("lose", ["ids", "labels", "offsets", "first"])
def test_arrays_that_do_not_fit_together_are_refused(lose):
    arrays = data.Examples.from_lists([[0, 5, 6, 2], [0, 7, 2]], [1, 1], [0, 2]).arrays()
    with pytest.raises(ValueError):
        data.Examples.from_arrays({**arrays, lose: arrays[lose][:-1]})


@pytest.mark.parametrize("kind", KINDS)
@given(st.data())
@check(max_examples=40)
def test_a_batch_holds_windows_and_labels_side_by_side(kind, draw):
    listed, texts = draw.draw(nested(kind))
    windows = [window for example in listed for window in example]
    indices = draw.draw(st.lists(st.integers(0, len(windows) - 1), min_size=1, max_size=6))
    input_ids, labels = data.collate(build(listed, texts, kind), np.array(indices))
    longest = max(len(windows[i][0]) for i in indices)
    assert input_ids.tolist() == [windows[i][0] + [1] * (longest - len(windows[i][0])) for i in indices]
    expected = [windows[i][1] for i in indices]
    if kind == "tags":
        expected = [tags + [IGNORED] * (longest - len(tags)) for tags in expected]
    assert labels.tolist() == expected and str(labels.dtype) == "torch.int64"


# --- question answering: the reader --------------------------------------------------------------------------


def squad(questions, **more):
    """A file in SQuAD's layout, of (context, question, [(answer, start)]), each a paragraph of its own."""
    paragraphs = [
        {"context": context, "qas": [{"id": f"q{i}", "question": question, **more,
                                      "answers": [{"text": text, "answer_start": start} for text, start in answers]}]}
        for i, (context, question, answers) in enumerate(questions)
    ]  # fmt: skip
    return json.dumps({"version": "1.1", "data": [{"title": "T", "paragraphs": paragraphs}]}, ensure_ascii=False)


def answer_of(context, question, numbers, repeat=1):
    """Questions about the contexts of a language; the number is the answer, so that each can be told apart."""
    rows = []
    for n in numbers:
        text = " ".join([CONTEXTS[context].format(n)] * repeat)
        rows.append((text, ASKED[question], [(str(n), text.index(str(n)))]))
    return rows


PLAIN = [("Hello old world", "what?", [("old", 6), ("old world", 6)]), ("世界 你好", "谁？", [("你好", 3)])]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_read_squad(tmp_path, mark, end):
    indented = json.dumps(json.loads(squad(PLAIN)), indent=1, ensure_ascii=end == "\n").replace("\n", end)
    assert data.read_squad(put(tmp_path / "a.json", mark + indented.encode())) == [
        data.Question("q0", "what?", "Hello old world", ("old", "old world"), 6),
        data.Question("q1", "谁？", "世界 你好", ("你好",), 3),
    ]


def test_an_answer_counts_in_characters_not_in_bytes_or_utf_16(tmp_path):
    context = "😀 é 你 end"
    (question,) = data.read_squad(put(tmp_path / "a.json", squad([(context, "?", [("end", 6)])])))
    assert question.start == 6 and context[6:] == "end"


@pytest.mark.parametrize("start", [0, 5, -9, 10**9])
def test_an_answer_that_is_not_at_its_offset_is_counted_and_reported(tmp_path, capsys, start):
    good = [("Hello old world", "what?", [("old", 6)])]
    path = put(tmp_path / "a.json", squad(good * 98 + [("Hello old world", "what?", [("old", start), ("world", 10)])]))
    questions = data.read_squad(path)
    assert [question.start for question in questions] == [6] * 98 + [None]
    assert questions[-1].answers == ("old", "world")
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and str(path) in message
    assert "1 of 100 answers do not stand at their offset in the context (the first: question q98)" in message
    put(path, squad(good * 97 + [("Hello old world", "what?", [("old", start)])]))
    message = fails("1 of 98 answers do not stand at their offset", data.read_squad, path)
    assert str(path) in message and "more than 1 %" in message and "`make mlqa`" in message


def test_of_several_answers_only_the_first_is_learnt(tmp_path, capsys):
    good = [("Hello old world", "what?", [("old", 6)])] * 99
    path = put(tmp_path / "a.json", squad([*good, ("Hello", "what?", [("Hello", 0), ("no", 3)])]))
    (*_, last) = data.read_squad(path)
    assert last.start == 0 and "1 of 101 answers" in capsys.readouterr().err


def test_an_answer_of_blanks_before_a_real_one_is_not_learnt(tmp_path):
    (question,) = data.read_squad(put(tmp_path / "a.json", squad([("Hello you", "what?", [(" ", 5), ("you", 6)])])))
    assert question.start is None and question.answers == (" ", "you")


def replaced(old, new):
    text = squad(PLAIN)
    assert old in text
    return text.replace(old, new, 1)


GET_MLQA = "`make mlqa` fetches it, or get https://dl.fbaipublicfiles.com/MLQA/MLQA_V1.zip"
LINES = json.dumps(json.loads(squad(PLAIN)), indent=1)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, [" is not there: ", GET_MLQA]),
        ("", [" is empty: remove it, then ", GET_MLQA]),
        (LINES[: LINES.index('"paragraphs"') + 20], [", line 7: not whole JSON", "remove it, then", GET_MLQA]),
        (squad(PLAIN)[:-30], [", line 1: not whole JSON", GET_MLQA]),
        ("<html>Not found</html>", [", line 1: not whole JSON", GET_MLQA]),
        ("[1]", [": not in SQuAD's format", GET_MLQA]),
        ("7", [": not in SQuAD's format", GET_MLQA]),
        ("null", [": not in SQuAD's format", GET_MLQA]),
        ("{}", [": not in SQuAD's format (KeyError: 'data')", GET_MLQA]),
        ('{"data": {"a": 1}}', [": not in SQuAD's format", GET_MLQA]),
        ('{"data": [{"title": "T"}]}', [": not in SQuAD's format (KeyError: 'paragraphs')", GET_MLQA]),
        ("[" * 100_000, [": not in SQuAD's format (RecursionError"]),
        ('{"data": []}', [" holds no question: remove it, then ", GET_MLQA]),
        ('{"data": [{"paragraphs": [{"context": "a", "qas": []}]}]}', [" holds no question"]),
        ('{"data": [{"paragraphs": ["a"]}]}', [", article 1, paragraph 1: not in SQuAD's format"]),
        ('{"data": [{"paragraphs": []}, {"paragraphs": [{"context": 1}]}]}', [", article 2, paragraph 1: not in"]),
        (replaced('"qas"', '"questions"'), [", article 1, paragraph 1: not in SQuAD's format (KeyError: 'qas')"]),
        (replaced('"id"', '"key"'), [", article 1, paragraph 1: not in SQuAD's format (KeyError: 'id')"]),
        (replaced('"question"', '"asked"'), ["paragraph 1: not in SQuAD's format (KeyError: 'question')"]),
        (replaced('"what?"', "null"), ["paragraph 1: not in SQuAD's format (AttributeError"]),
        (replaced('"text"', '"string"'), ["paragraph 1: not in SQuAD's format (KeyError: 'text')"]),
        (replaced('"answer_start": 3', '"start": 3'), ["paragraph 2: not in SQuAD's format (KeyError"]),
        (replaced('"answer_start": 3', '"answer_start": null'), ["paragraph 2: not in SQuAD's format (TypeError"]),
        (replaced('"answer_start": 3', '"answer_start": 3.5'), ["paragraph 2: not in SQuAD's format (TypeError"]),
        # What Python's json refuses with an error of another kind, and what would make two lines of the message.
        (replaced('"answer_start": 3', '"answer_start": ' + "9" * 5000), [": not "]),
        (squad([("Hello", " ", [("Hello", 0)])]).replace("q0", "q\\n0"), [": the question is empty"]),
        (replaced("Hello old world", ""), [", article 1, paragraph 1: the context is empty"]),
        (replaced("世界 你好", " \\n\u3000"), [", article 1, paragraph 2: the context is empty"]),
        (replaced("谁？", " "), [", article 1, paragraph 2, question q1: the question is empty"]),
        (replaced('"question"', '"is_impossible": true, "question"'), ["question q0", "SQuAD 2.0; SQuAD v1.1 is"]),
        (squad([("Hello", "what?", [])], is_impossible=True), ["question q0", "this is SQuAD 2.0"]),
        (squad([("Hello", "what?", [])]), ["question q0: no answer: this looks like XTREME's copy", GET_MLQA]),
        (squad([("Hello", "what?", [("", 0)])]), ["question q0: no answer: this looks like XTREME's copy", GET_MLQA]),
        (squad([("Hello", "what?", [(" ", 0)])]), ["question q0: no answer"]),
        (replaced("old world", "old \\ud83d world"), ["paragraph 1, question q0: half of a surrogate pair"]),
        (replaced("what?", "what\\udc00?"), ["paragraph 1, question q0: half of a surrogate pair"]),
        (replaced('"text": "你好"', '"text": "\\udc00"'), ["paragraph 2, question q1: half of a surrogate pair"]),
        (LINES.encode().replace(b"what", b"wh\xff"), [", line ", ": not valid UTF-8", "remove it, then", GET_MLQA]),
        (squad(PLAIN).encode("utf-16"), [", line 1: not valid UTF-8"]),
    ],
)
def test_bad_files_of_questions(tmp_path, content, says):
    path = tmp_path / "dev.json"
    if content is not None:
        put(path, content)
    message = fails(str(path), data.read_squad, path)
    assert all(part in message for part in says), message


def test_a_question_that_can_be_answered_may_say_so(tmp_path):
    """MLQA's files have no such field; some copies of SQuAD v1.1 do."""
    assert len(data.read_squad(put(tmp_path / "a.json", squad(PLAIN, is_impossible=False)))) == 2


def test_a_whole_pair_of_surrogates_is_a_character(tmp_path):
    path = put(tmp_path / "a.json", replaced("old world", "old \\ud83d\\ude00 world").replace('"old world"', '"old"'))
    assert data.read_squad(path)[0].context == "Hello old 😀 world"


# --- named entities: the readers -----------------------------------------------------------------------------

O, B_PER, I_PER, B_ORG, I_ORG, B_LOC, I_LOC = range(7)
PANX = "Paul\tB-PER\nKetwick\tI-PER\nof\tO\n\nthe\tO\nTown\tB-LOC\n\n"


def wikiann(text, language="en"):
    """The lines of XTREME's format as WikiAnn's own archives have them."""
    return "".join(f"{language}:{line}" if line.strip() else line for line in text.splitlines(keepends=True))


SENTENCES = [(["Paul", "Ketwick", "of"], [B_PER, I_PER, O]), (["the", "Town"], [O, B_LOC])]


@pytest.mark.parametrize(
    "text",
    [
        PANX,
        PANX.replace("\n", "\r\n"),
        PANX.rstrip("\n"),
        PANX.replace("\n\n", "\n\n\n\n"),  # several empty lines are as good as one: no sentence is without tokens
        "\n\n" + PANX,
        "\ufeff" + PANX,
    ],
)
def test_read_panx(tmp_path, text):
    assert data.read_panx(put(tmp_path / "dev-en.tsv", text)) == SENTENCES


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("dot", ["", "./"])
def test_read_wikiann(tmp_path, end, dot):
    text = wikiann(PANX).replace("\n", end)
    one = "en:Ketwick\tB-ORG\n"
    members = {f"{dot}train": text, f"{dot}dev": one, f"{dot}test": text, "extra": "x"}
    archive = put(tmp_path / "en.tar.gz", tarred(members))
    assert data.read_wikiann(archive) == {"train": SENTENCES, "dev": [(["Ketwick"], [B_ORG])], "test": SENTENCES}
    assert data.read_wikiann(archive, ("dev",)) == {"dev": [(["Ketwick"], [B_ORG])]}


def test_the_prefix_is_cut_off_once_and_tokens_may_hold_anything(tmp_path):
    tokens = ["en:x", ":", "", "a b", "a\tb", "\u2028", "\u0085", '"', "\x0b"]
    text = "".join(f"en:{token}\tB-ORG\n" for token in tokens)
    archive = put(tmp_path / "en.tar.gz", tarred({"dev": text}))
    assert data.read_wikiann(archive, ("dev",)) == {"dev": [(tokens, [B_ORG] * len(tokens))]}


def test_an_inside_tag_may_begin_an_entity(tmp_path):
    path = put(tmp_path / "dev-en.tsv", "Ketwick\tI-ORG\nof\tO\nPaul\tI-PER\nTown\tI-LOC\n")
    assert data.read_panx(path) == [(["Ketwick", "of", "Paul", "Town"], [I_ORG, O, I_PER, I_LOC])]


GET_NER = f"`make ner` fetches it, or unpack {data.WIKIANN_URL}/panx_dataset.zip into the data folder"
BAD_TAGS = [
    ("a\tO\nPaul\tB-PRS\n", [", line 2: unknown tag 'B-PRS'; there are O, B-PER, I-PER, B-ORG, I-ORG, B-LOC, I-LOC"]),
    ("Paul\tb-per\n", [", line 1: unknown tag 'b-per'"]),
    (PANX + "Paul\n", [", line 8: a token without a tag; if this is XTREME's copy", GET_NER]),
    ("Paul\n", [", line 1: a token without a tag"]),
    ("Paul\tB-PER\n\nof\t\n", [", line 3: a token without a tag", GET_NER]),
    ("Paul B-PER\n", [", line 1: a token without a tag"]),
    ("\n\n\r\n", [" holds no sentence: its tags may have been removed; ", GET_NER]),
    ("of\tO\n\nthe\tO\n", [" holds no tag but O: its tags may have been removed; ", GET_NER]),
]


@pytest.mark.parametrize(("text", "says"), BAD_TAGS)
def test_bad_tables_of_tags(tmp_path, text, says):
    path = put(tmp_path / "test-en.tsv", text)
    message = fails(str(path), data.read_panx, path)
    assert all(part in message for part in says), message


@pytest.mark.parametrize(("text", "says"), BAD_TAGS)
def test_bad_tags_in_an_archive(tmp_path, text, says):
    path = put(tmp_path / "en.tar.gz", tarred({"train": wikiann(PANX), "dev": wikiann(PANX), "test": wikiann(text)}))
    message = fails(f"{path}, member test", data.read_wikiann, path)
    assert all(part in message for part in says), message


def test_tables_that_are_missing_empty_or_not_utf_8(tmp_path):
    path = tmp_path / "dev-en.tsv"
    assert GET_NER in fails(f"{path} is not there: ", data.read_panx, path)
    assert GET_NER in fails(f"{path} is empty", data.read_panx, put(path, ""))
    assert GET_NER in fails(f"{path}, line 2: not valid UTF-8", data.read_panx, put(path, b"a\tO\n\xe4\tB-PER\n"))


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("en.tar.gz", None, [" is not there: ", GET_NER]),
        ("en.tar.gz", b"", [" is empty", GET_NER]),
        ("en.tar.gz", b"<html>Not found</html>", [" is not a whole tar.gz archive", GET_NER]),
        ("en.tar.gz", zipped({"train": "x"}), [" is not a whole tar.gz archive", GET_NER]),
        ("en.tar.gz", gzip.compress(b"not a tar" * 99), [" is not a whole tar.gz archive", GET_NER]),
        ("en.tar.gz", tarred({"train": wikiann(PANX), "dev": wikiann(PANX)}), [" lacks test: remove it", GET_NER]),
        ("en.tar.gz", tarred({"x/train": "", "x/dev": "", "x/test": ""}), [" lacks train, dev, test", GET_NER]),
        ("en.tar.gz", tarred({"train": "", "dev": "", "test": ""}), [", member train holds no sentence"]),
        ("de.tar.gz", tarred(dict.fromkeys(("train", "dev", "test"), wikiann(PANX))),
         [", member train, line 1: the token 'en:Paul' does not begin with 'de:'"]),
        ("en.tar.gz", tarred({"train": wikiann(PANX), "dev": wikiann(PANX), "test": PANX}),
         [", member test, line 1: the token 'Paul' does not begin with 'en:'"]),
        ("en.tar.gz", tarred({"train": b"en:a\tO\nen:\xff\tO\n", "dev": "", "test": ""}),
         [", member train, line 2: not valid UTF-8", GET_NER]),
        ("en.tar.gz", tarred({"train": "x", "../dev": "x"}), ["holds '../dev', which leads outside"]),
        ("en.tar.gz", tarred({"train": "x", "/etc/dev": "x"}), ["holds '/etc/dev', which leads outside"]),
        ("en.tar.gz", tarred({"train": "x"}, dev="/etc/passwd"), ["holds 'dev', which leads outside"]),
    ],
)  # fmt: skip
def test_bad_archives_of_tags(tmp_path, file, content, says):
    path = tmp_path / file
    if content is not None:
        put(path, content)
    message = fails(str(path), data.read_wikiann, path)
    assert all(part in message for part in says), message


def many_sentences(start=0):
    return "".join(f"en:Paul{i * 7919 % 997}\tB-PER\nen:x{i}\tO\n\n" for i in range(start, start + 60))


def test_an_archive_that_is_cut_anywhere_is_refused_or_whole(tmp_path):
    """Behind the last member a tar archive has nothing but padding, which it may do without."""
    content = tarred({"train": many_sentences(), "dev": many_sentences(9), "test": many_sentences(5)})
    path = put(tmp_path / "en.tar.gz", content)
    whole, refused = data.read_wikiann(path), 0
    for length in range(1, len(content), 23):
        put(path, content[:length])
        try:
            assert data.read_wikiann(path) == whole
        except data.InputError as error:
            refused += 1
            assert str(path) in str(error) and "remove it" in str(error) and "\n" not in str(error)
    assert refused > len(content) / 23 * 0.8


def uncompressed(files, old, new):
    """A tar.gz archive in which these bytes were changed: stored, so that nothing but gzip's checksum shows it."""
    content = gzip.compress(gzip.decompress(tarred(files)), compresslevel=0)
    assert old in content and len(old) == len(new)
    return content.replace(old, new)


def test_a_damaged_archive_of_tags_is_not_read_as_other_words(tmp_path):
    content = uncompressed(dict.fromkeys(("train", "dev", "test"), wikiann(PANX)), b"Ketwick", b"Ketwock")
    fails("is not a whole tar.gz archive", data.read_wikiann, put(tmp_path / "en.tar.gz", content))


def test_a_damaged_archive_is_not_unpacked_as_other_words(tmp_path):
    archive = put(tmp_path / "a.tar.gz", uncompressed({"a": "Hello world"}, b"Hello", b"Jello"))
    fails("is not a whole tar.gz archive", data.unpack, archive, tmp_path / "in")


# --- question-answer matching: the reader --------------------------------------------------------------------

QAM = "what is it?\tit is a mill\t1\nwho?\tthe river\t0\n"


@pytest.mark.parametrize("text", [QAM, QAM.replace("\n", "\r\n"), QAM[:-1], "\ufeff" + QAM])
def test_read_qam(tmp_path, text):
    path = put(tmp_path / "xglue.qam.en.dev", text)
    assert data.read_qam(path) == [("what is it?", "it is a mill", 1), ("who?", "the river", 0)]


@pytest.mark.parametrize("passage", ['"', 'an "open quote', "a\u2028b", "a\u0085b", "a\x0bb", "a\rb", "\u200b"])
def test_what_other_readers_stumble_over_is_text_in_qam_too(tmp_path, passage):
    assert data.read_qam(put(tmp_path / "en.dev.tsv", f"who?\t{passage}\t1\n")) == [("who?", passage, 1)]


GET_QAM = "`make qam` fetches it, or unpack https://xglue.blob.core.windows.net/xglue/xglue_full_dataset.tar.gz"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, [" is not there: ", GET_QAM]),
        ("", [" is empty: ", GET_QAM]),
        (QAM + "who?\tthe river\n", [", line 3: no label: this looks like a copy whose test labels are", GET_QAM]),
        (QAM + "who?\tthe river\t\n", [", line 3: no label", GET_QAM]),
        (QAM + "who?\n", [", line 3: 1 columns where question, passage and label should be"]),
        (QAM + "\n", [", line 3: 1 columns"]),
        (QAM + "who?\tthe river\tagain\t0\n", [", line 3: 4 columns"]),
        ("who?\tthe river\tyes\n", [", line 1: unknown label 'yes'; there are 0, 1"]),
        ("who?\tthe river\t2\n", [", line 1: unknown label '2'"]),
        (" \tthe river\t1\n", [", line 1: the question is empty"]),
        (QAM + "who?\t\t1\n", [", line 3: the passage is empty"]),
        (QAM + "who?\tthe ri", [", line 3 (the last, without a newline, so the file may be cut short", GET_QAM]),
        (QAM.encode() + b"who?\t\xff\t1\n", [", line 3: not valid UTF-8", GET_QAM]),
    ],
)
def test_bad_files_of_qam(tmp_path, content, says):
    path = tmp_path / "xglue.qam.en.test"
    if content is not None:
        put(path, content)
    message = fails(str(path), data.read_qam, path)
    assert all(part in message for part in says), message


# --- the loaders ---------------------------------------------------------------------------------------------


NUMBERS = {"train": range(100, 110), "squad": range(200, 203), "dev": range(300, 306), "test": range(400, 404),
           "xquad": range(500, 502)}  # fmt: skip


def mlqa_files(languages=tuple(CONTEXTS)):
    """{name: content} of question answering, as the official archives and sites have it. Answers tell sets apart."""
    files = {f"squad/{name}-v1.1.json": squad(answer_of("en", "en", NUMBERS[of]))
             for name, of in (("train", "train"), ("dev", "squad"))}  # fmt: skip
    for language in languages:
        text = language if language in CONTEXTS else "en"
        files[f"xquad/xquad.{language}.json"] = squad(answer_of(text, text, NUMBERS["xquad"]))
        for other in languages:
            asked = other if other in ASKED else "en"
            for split in ("dev", "test"):
                name = f"MLQA_V1/{split}/{split}-context-{language}-question-{other}.json"
                files[name] = squad(answer_of(text, asked, NUMBERS[split]))
    return files


def ner_files(languages=("de", "en", "zh"), sentences=6):
    """{name: content} of WikiAnn: the splits differ in length, the sentences in their number."""
    files = {}
    for language in languages:
        sentence = "{0}:Paul\tB-PER\n{0}:Ketwick\tI-PER\n{0}:{1}\tO\n\n".format
        lines = [sentence(language, i) for i in range(2 * sentences)]
        splits = {"train": lines, "dev": lines[:sentences], "test": lines[: sentences - 2]}
        files[f"panx_dataset/{language}.tar.gz"] = tarred({split: "".join(part) for split, part in splits.items()})
    return files


def qam_files(rows=6):
    """{name: content} of QAM, English, German and French."""
    line = "{0} {1}?\tthe mill of {1}\t{2}\n".format
    sets = [(x, split, n) for x in ("de", "en", "fr") for split, n in (("dev", rows), ("test", 4))]
    sets.append(("en", "train", 2 * rows))
    return {f"xglue/QAM/xglue.qam.{x}.{split}": "".join(line(x, i, i % 2) for i in range(n)) for x, split, n in sets}


SHORT = {"mlqa": {"max_length": 30, "stride": 9}, "ner": {"max_length": 8}, "qam": {"max_length": 16}}
FILES = {"mlqa": mlqa_files(), "ner": ner_files(), "qam": qam_files()}
SETS = {  # the sizes of the training, dev and test sets, and the languages
    "mlqa": (10, 6, 4, ["de", "en", "zh"]),
    "ner": (12, 6, 4, ["de", "en", "zh"]),
    "qam": (12, 6, 4, ["de", "en", "fr"]),
}


@pytest.fixture
def folder(tmp_path):
    """A data folder with the files of all three tasks."""
    for files in FILES.values():
        for name, content in files.items():
            put(tmp_path / "data" / name, content)
    return tmp_path / "data"


@pytest.fixture
def load(folder, tokenizer, tmp_path):
    """load(task, **options): from that folder, with a cache of its own."""
    return lambda name, **options: data.load(name, folder, tokenizer, **{"cache": tmp_path / "cache", **options})


def answers(examples):
    return [int(gold) for _, (gold,) in examples.texts]


@pytest.mark.parametrize("name", FILES)
def test_a_task_has_a_training_set_and_dev_and_test_sets_for_each_language(load, name):
    task = load(name)
    train, dev, test, languages = SETS[name]
    assert (task.name, task.source, len(task.train)) == (name, "en", train)
    assert list(task.dev) == list(task.tests["test"]) == languages and list(task.tests) == ["test"]
    assert [len(part) for part in task.dev.values()] == [dev] * 3
    assert [len(part) for part in task.tests["test"].values()] == [test] * 3
    fewer = load(name, languages=[languages[2], "en"])
    assert list(fewer.dev) == list(fewer.tests["test"]) == ["en", languages[2]]
    assert all(same(fewer.dev[language], task.dev[language]) for language in fewer.dev)
    assert load(name, tests=()).tests == {}
    short = load(name, **SHORT[name])
    assert short.train.lengths.max() <= SHORT[name]["max_length"] < task.train.lengths.max()
    assert len(short.train) == train


def test_labels_of_the_tasks(load):
    assert load("ner").labels == ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC")
    assert load("qam").labels == ("0", "1") and load("mlqa").labels == ("start", "end")


def test_the_test_sets_of_question_answering(load):
    names = ("squad", "test", "xquad", "test-7x7", "dev-7x7")
    task = load("mlqa", tests=names)
    assert list(task.tests) == list(names) and list(task.tests["squad"]) == ["en"]
    pairs = [f"{c}-{q}" for c in ("de", "en", "zh") for q in ("de", "en", "zh")]
    assert list(task.tests["test-7x7"]) == list(task.tests["dev-7x7"]) == pairs
    found = {name: {tuple(answers(part)) for part in parts.values()} for name, parts in task.tests.items()}
    expected = {"squad": "squad", "test": "test", "xquad": "xquad", "test-7x7": "test", "dev-7x7": "dev"}
    assert found == {name: {tuple(NUMBERS[of])} for name, of in expected.items()}
    assert answers(task.train) == list(NUMBERS["train"]) and answers(task.dev["de"]) == list(NUMBERS["dev"])
    for name in ("test-7x7", "dev-7x7"):
        own = task.tests["test"] if name == "test-7x7" else task.dev
        assert all(same(task.tests[name][f"{x}-{x}"], own[x]) for x in own)


def test_a_pair_is_the_language_of_the_context_and_then_of_the_question(load, tokenizer):
    part = load("mlqa", tests=("test-7x7",)).tests["test-7x7"]["en-de"]
    assert part.texts[0] == [CONTEXTS["en"].format(400), ["400"]]
    ids, label, spans = next(windows_of(part))
    asked = tokenizer.encode(ASKED["de"])
    assert ids[: len(asked) + 1] == [0, *asked] and whole_answer(label, spans, part.texts[0][0]) == "400"


def test_questions_are_cut_and_contexts_divided_as_the_options_say(load, tokenizer):
    task = load("mlqa", max_length=24, stride=7, max_question=3)
    text = CONTEXTS["en"].format(100)
    question = data.Question("", ASKED["en"], text, ("100",), text.index("100"))
    assert same(task.train.take([0]), data.tokenize_questions([question], tokenizer, 24, 7, 3))


def test_named_entities_of_a_loaded_task(load, tokenizer):
    rows = [(["Paul", "Ketwick", str(i)], [B_PER, I_PER, O]) for i in range(4)]
    assert same(load("ner").tests["test"]["de"], data.tokenize_sentences(rows, tokenizer, 128))


def test_pairs_of_a_loaded_task(load, tokenizer):
    rows = [(f"fr {i}?", f"the mill of {i}", i % 2) for i in range(4)]
    assert same(load("qam").tests["test"]["fr"], data.tokenize_pairs(rows, tokenizer, 128))


def test_the_source_of_named_entities_and_qam_may_be_another_language(folder, load):
    task = load("ner", source="de")
    english = load("ner")
    assert task.source == "de" and len(task.train) == 12
    put(folder / "xglue/QAM/xglue.qam.de.train", "wer?\tder Fluss\t1\n")
    assert len(load("qam", source="de").train) == 1
    assert list(task.dev) == list(english.dev)


def test_qam_under_the_names_of_its_readme(folder, load):
    task = load("qam")
    for path in list((folder / "xglue/QAM").iterdir()):
        _, _, language, split = path.name.split(".")
        path.rename(path.with_name(f"{language}.{split}.tsv"))
    again = load("qam")
    assert same(again.train, task.train) and list(again.dev) == list(task.dev)


def test_named_entities_in_the_format_of_xtreme(folder, load):
    task = load("ner")
    for archive in list((folder / "panx_dataset").iterdir()):
        language = archive.name.split(".")[0]
        with tarfile.open(archive) as opened:
            for split in ("train", "dev", "test"):
                text = opened.extractfile(split).read().decode().replace(f"{language}:", "")
                put(folder / "panx" / f"{split}-{language}.tsv", text)
        archive.unlink()
    (folder / "panx_dataset").rmdir()
    again = load("ner")
    assert list(again.dev) == list(task.dev) and same(again.train, task.train)
    assert all(same(again.tests["test"][x], task.tests["test"][x]) for x in task.dev)


def test_named_entities_are_those_of_xtreme_unless_other_languages_are_asked_for(folder, load):
    put(folder / "panx_dataset/als.tar.gz", ner_files(["als"])["panx_dataset/als.tar.gz"])
    assert list(load("ner").dev) == ["de", "en", "zh"]
    assert list(load("ner", languages=["als", "en"]).dev) == ["als", "en"]


HOME = {"mlqa": "MLQA_V1/dev", "ner": "panx_dataset", "qam": "xglue/QAM"}


@pytest.mark.parametrize("name", FILES)
def test_wrong_names_of_languages_and_test_sets(load, folder, name):
    def wrong(says, **options):
        return fails(says, lambda: load(name, **options))

    third = SETS[name][3][2]
    assert wrong("no language 'xx' in ", languages=["en", "xx"]).endswith(f"there are de, en, {third}")
    assert str(folder / HOME[name]) in wrong("no language 'xx' in ", languages=["en", "xx"])
    wrong(f"the languages de, {third} lack en, the source", languages=["de", third])
    known = {"mlqa": "test, xquad, squad, test-7x7, dev-7x7"}.get(name, "test")
    assert wrong(f"{name} has no test set 'other'; there are ", tests=("test", "other")).endswith(known)
    if name == "mlqa":
        wrong("--source de: question answering is trained on SQuAD, which is English", source="de")
    else:
        wrong("no language 'xx' in ", source="xx")
        wrong("the languages en lack de, the source", source="de", languages=["en"])


@pytest.mark.parametrize("name", FILES)
def test_a_missing_folder_says_how_to_get_it(tokenizer, tmp_path, name):
    for folder in (tmp_path / "none", tmp_path):
        message = fails(f"`make {name}` fetches it", data.load, name, folder, tokenizer)
        assert message.startswith(f"{folder / HOME[name]} holds no data")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "file", "options"),
    [
        ("mlqa", "squad/train-v1.1.json", {}),
        ("mlqa", "squad/dev-v1.1.json", {"tests": ("squad",)}),
        ("mlqa", "xquad/xquad.zh.json", {"tests": ("xquad",)}),
        ("mlqa", "MLQA_V1/test/test-context-de-question-de.json", {}),
        ("mlqa", "MLQA_V1/test/test-context-de-question-zh.json", {"tests": ("test-7x7",)}),
        ("qam", "xglue/QAM/xglue.qam.fr.test", {}),
        ("qam", "xglue/QAM/xglue.qam.en.train", {}),
    ],
)
def test_a_missing_file_says_how_to_get_it_and_is_not_missed_where_it_is_not_read(folder, load, name, file, options):
    (folder / file).unlink()
    named = file if name == "mlqa" else "xglue/QAM/" + ".".join([*file.split(".")[2:], "tsv"])
    assert f"`make {name}` fetches it" in fails(f"{folder / named} is not there", lambda: load(name, **options))
    if "train" not in file:
        assert load(name, tests=()).tests == {}


def test_a_language_without_a_dev_set_is_not_there(folder, load):
    (folder / "MLQA_V1/dev/dev-context-zh-question-zh.json").unlink()
    assert list(load("mlqa").dev) == ["de", "en"]
    fails("no language 'zh' in", lambda: load("mlqa", languages=["en", "zh"]))


def test_a_missing_table_of_xtreme_says_how_to_get_it(tokenizer, tmp_path):
    put(tmp_path / "panx/dev-en.tsv", PANX)
    fails(f"{tmp_path / 'panx/test-en.tsv'} is not there: `make ner` fetches it", data.load, "ner", tmp_path, tokenizer)


def test_a_window_too_small_names_the_question_of_the_file(load):
    fails("question q0: ", lambda: load("mlqa", max_length=20, stride=19))


def test_a_length_too_small_for_a_pair_or_a_sentence(load):
    fails("a length of 3 leaves no room for a pair", lambda: load("qam", max_length=3))
    fails("a length of 2 leaves no room for a sentence", lambda: load("ner", max_length=2))


# --- the cache -----------------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch):
    """A list that grows by one whenever a set is tokenised."""
    calls = []
    for name in ("tokenize_pairs", "tokenize_questions", "tokenize_sentences"):
        real = getattr(data, name)
        monkeypatch.setattr(data, name, lambda *arguments, real=real: calls.append(1) or real(*arguments))
    return calls


def every_set(task):
    return [task.train, *task.dev.values(), *(part for parts in task.tests.values() for part in parts.values())]


@pytest.mark.parametrize("name", FILES)
def test_the_cache_gives_back_what_was_tokenised(load, counted, name):
    first = load(name, **SHORT[name])
    made = len(counted)
    again = load(name, **SHORT[name])
    assert len(counted) == made > 0
    assert all(same(a, b) for a, b in zip(every_set(first), every_set(again), strict=True))
    if name != "qam":  # the windows of an example are put together again
        assert len(again.train.labels) > len(again.train) and len(again.train.first) == len(again.train) + 1
    assert (again.train.spans is None) == (again.train.texts is None) == (name != "mlqa")


@pytest.mark.parametrize(
    ("name", "options"),
    [("mlqa", {"max_length": 200}), ("mlqa", {"stride": 60}), ("mlqa", {"max_question": 5}),
     ("ner", {"max_length": 64}), ("qam", {"max_length": 64})],
)  # fmt: skip
def test_other_options_are_not_answered_from_the_cache(load, counted, name, options):
    load(name)
    made = len(counted)
    load(name, **options)
    assert len(counted) == 2 * made
    load(name)
    assert len(counted) == 2 * made


def test_the_cache_keeps_what_different_readers_make_of_one_file_apart(tokenizer, tmp_path, counted):
    path = put(tmp_path / "en.dev.tsv", "a\tb\t0\n")

    def make(path):
        return {"": data.tokenize_pairs(data.read_qam(path), tokenizer, 128)}

    for made_from in ("qam 128", "128", "qam 128"):
        data.tokenized_file(path, make, tokenizer, made_from, tmp_path / "cache")
    assert len(counted) == 2


def test_two_languages_with_the_same_content_are_read_each_for_itself(folder, load):
    """The prefix of a token is the language of its archive, so the same archive under another name is an error."""
    load("ner")
    put(folder / "panx_dataset/de.tar.gz", (folder / "panx_dataset/en.tar.gz").read_bytes())
    fails("does not begin with 'de:'", lambda: load("ner"))


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_cache_is_made_again(load, tmp_path, capsys, name):
    first = load(name)
    kept = {path: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    for path, content in kept.items():
        path.write_bytes(content[: len(content) // 2])
    capsys.readouterr()
    again = load(name)
    assert capsys.readouterr().err.count("is damaged and will be made again\n") == len(kept)
    assert all(same(a, b) for a, b in zip(every_set(first), every_set(again), strict=True))
    assert {path: path.read_bytes() for path in kept} == kept


def test_what_is_reported_of_misplaced_answers_is_reported_when_the_file_is_read(folder, load, capsys):
    """A warning when the file is tokenised; the cache has nothing to warn of."""
    rows = answer_of("en", "en", range(100, 250))
    rows[7] = (*rows[7][:2], [("107", 0)])
    put(folder / "squad/train-v1.1.json", squad(rows))
    train = load("mlqa").train
    assert "1 of 150 answers do not stand" in capsys.readouterr().err
    assert np.flatnonzero(train.labels[:, 0] == IGNORED).tolist() == [train.first[7]] and train.texts[7][1] == ["107"]
    assert same(load("mlqa").train, train) and "answers" not in capsys.readouterr().err


# --- few-shot ------------------------------------------------------------------------------------------------


def bare(examples):
    """Every example as a value that can be counted and compared: its windows and labels."""
    return [repr([(ids, labels) for ids, labels, _ in windows_of(examples, i)]) for i in range(len(examples))]


@pytest.mark.parametrize("name", FILES)
def test_drawn_examples_join_training_with_their_labels_and_all_their_windows(load, name):
    task = load(name, **SHORT[name])
    train, dev = data.few_shot(task.train, task.dev, 2, seed=3, source=task.source)
    assert bare(train)[: len(task.train)] == bare(task.train) and len(train) == len(task.train) + 2 * 2
    assert same(dev["en"], task.dev["en"])
    drawn = bare(train)[len(task.train) :]
    for i, language in enumerate(x for x in task.dev if x != "en"):
        before = bare(task.dev[language])
        assert len(set(before)) == len(before)  # so that each can be found again
        ours = drawn[2 * i : 2 * i + 2]
        assert sorted(ours + bare(dev[language])) == sorted(before) and len(dev[language]) == len(before) - 2
        if name == "mlqa":  # the rest is still measured by its texts
            kept = [example[1] for example in dev[language].texts]
            assert kept == [gold for own, (_, gold) in zip(before, task.dev[language].texts) if own not in ours]
    assert train.tagged == task.train.tagged and int(train.first[-1]) == len(train.lengths)


@pytest.mark.parametrize("name", FILES)
def test_a_draw_from_another_source_leaves_that_dev_set_whole(load, name):
    task = load(name)
    _, dev = data.few_shot(task.train, task.dev, 2, seed=3, source="de")
    assert same(dev["de"], task.dev["de"]) and len(dev["en"]) == len(task.dev["en"]) - 2


def test_more_shots_than_sentences_are_refused(load):
    task = load("ner", max_length=4)  # more windows than sentences: it is the sentences that count
    assert len(task.dev["de"].lengths) > 6
    fails("6 shots: the dev set of de has 6, and some must be left", data.few_shot, task.train, task.dev, 6, 1)


# --- downloads -----------------------------------------------------------------------------------------------

SEVEN = ("ar", "de", "en", "es", "hi", "vi", "zh")
JUNK = {"__MACOSX/MLQA_V1/._dev": "x", "MLQA_V1/.DS_Store": "x", "MLQA_V1/README.md": "x"}


def below(files, top):
    return {name: content for name, content in files.items() if name.startswith(f"{top}/")}


def official_ner(around="panx_dataset/"):
    archives = ner_files((*data.NER_LANGUAGES, "als", "zh-classical"), 3)
    renamed = {around + name.removeprefix("panx_dataset/"): content for name, content in archives.items()}
    return zipped({**renamed, f"{around}README.txt": "x"})


def official_qam(lacking=()):
    files = {f"xglue_full_dataset/QAM/{Path(name).name}": content for name, content in qam_files().items()}
    others = {"xglue_full_dataset/NER/en.train": "x", "xglue_full_dataset/README": "x"}
    return tarred({name: text for name, text in (files | others).items() if name.rpartition("/")[2] not in lacking})


@pytest.fixture
def official(server, monkeypatch):  # noqa: F811
    """The server with the archives and files of all three tasks, in their official layouts."""
    monkeypatch.setattr(os, "fsync", lambda file: None)  # a hundred small files a test, and no power cut to survive
    everything = mlqa_files(SEVEN)
    server.files["/mlqa/MLQA_V1.zip"] = zipped(below(everything, "MLQA_V1") | JUNK)
    for top in ("squad", "xquad"):
        server.files.update({f"/{name}": content.encode() for name, content in below(everything, top).items()})
    server.files["/ner/panx_dataset.zip"] = official_ner()
    server.files["/qam/xglue_full_dataset.tar.gz"] = official_qam()
    return server


def fetch(name, folder, url):
    more = (f"{url}/squad", f"{url}/xquad") if name == "mlqa" else ()
    data.FETCHERS[name](folder, f"{url}/{name}", *more)


FETCHED = {
    "mlqa": mlqa_files(SEVEN), "ner": [f"panx_dataset/{x}.tar.gz" for x in data.NER_LANGUAGES], "qam": qam_files(),
}  # fmt: skip
ARCHIVES = {"mlqa": "MLQA_V1.zip", "ner": "panx_dataset.zip", "qam": "xglue_full_dataset.tar.gz"}


@pytest.mark.parametrize("name", FETCHED)
def test_what_is_fetched_is_what_is_loaded_and_nothing_is_fetched_twice(official, tokenizer, tmp_path, name):
    folder = tmp_path / "data"
    fetch(name, folder, official.url)
    assert files_below(folder) == sorted(FETCHED[name])  # the archive is gone
    asked = len(official.requests)
    assert asked == (1 + 2 + 7 if name == "mlqa" else 1)
    fetch(name, folder, official.url)
    assert len(official.requests) == asked
    tests = ("test", "xquad", "squad", "test-7x7", "dev-7x7") if name == "mlqa" else ("test",)
    task = data.load(name, folder, tokenizer, cache=tmp_path / "cache", tests=tests)
    languages = {"mlqa": SEVEN, "ner": data.NER_LANGUAGES, "qam": ("de", "en", "fr")}[name]
    assert tuple(task.dev) == tuple(languages)


def test_forty_languages_of_wikiann():
    assert len(set(data.NER_LANGUAGES)) == 40 and data.NER_LANGUAGES == sorted(data.NER_LANGUAGES)


@pytest.mark.parametrize("around", ["", "panx_dataset/", "a/b/"])
def test_the_archive_of_named_entities_with_and_without_a_folder(official, tmp_path, around):
    official.files["/ner/panx_dataset.zip"] = official_ner(around)
    fetch("ner", tmp_path, official.url)
    assert files_below(tmp_path) == FETCHED["ner"]


@pytest.mark.parametrize(
    ("name", "file"),
    [("mlqa", "squad/dev-v1.1.json"), ("mlqa", "xquad/xquad.hi.json"), ("ner", "panx_dataset/fi.tar.gz"),
     ("mlqa", "MLQA_V1/test/test-context-vi-question-de.json"), ("qam", "xglue/QAM/xglue.qam.fr.test")],
)  # fmt: skip
def test_one_missing_file_is_fetched_again(official, tmp_path, name, file):
    fetch(name, tmp_path, official.url)
    before = len(official.requests)
    (tmp_path / file).unlink()
    fetch(name, tmp_path, official.url)
    expected = f"/{file}" if f"/{file}" in official.files else f"/{name}/{ARCHIVES[name]}"
    assert [path for path, _ in official.requests[before:]] == [expected]
    assert files_below(tmp_path) == sorted(FETCHED[name])


@pytest.mark.parametrize("name", FETCHED)
def test_an_archive_put_there_by_hand_is_used_and_kept(official, tmp_path, name):
    archive = put(tmp_path / ARCHIVES[name], official.files.pop(f"/{name}/{ARCHIVES[name]}"))
    content = archive.read_bytes()
    fetch(name, tmp_path, official.url)
    assert files_below(tmp_path) == sorted([*FETCHED[name], archive.name]) and archive.read_bytes() == content


def spoilt(name, how):
    """The official archive of a task, spoilt: it lacks a file, is cut, or also holds what leads outside."""
    pack = tarred if name == "qam" else zipped
    one = {"mlqa": {"MLQA_V1/dev/dev-context-en-question-en.json": "{}"}, "ner": {"panx_dataset/en.tar.gz": "x"},
           "qam": {"xglue_full_dataset/QAM/xglue.qam.en.train": QAM}}[name]  # fmt: skip
    content = pack(one) if how == "lacking" else pack({**one, how: "x"})
    if how == "link":
        return pack(one, link="/etc/passwd")
    return content[: len(content) // 2] if how == "cut" else content


@pytest.mark.parametrize("how", ["lacking", "cut", "link", "../x", "/x"])
@pytest.mark.parametrize("name", FETCHED)
def test_a_spoilt_archive_is_refused_and_leaves_nothing_behind(official, tmp_path, name, how):
    folder = tmp_path / "data"
    official.files[f"/{name}/{ARCHIVES[name]}"] = spoilt(name, how)
    says = {"lacking": " lacks ", "cut": " is not a whole "}.get(how, "which leads outside")
    message = fails(says, fetch, name, folder, official.url)
    assert message.startswith(str(folder / ARCHIVES[name]))
    if how in ("lacking", "cut"):
        assert message.endswith("remove it and fetch it again")
    # Nothing but the archive, which is named so that the user can look at it and remove it.
    assert files_below(tmp_path) == [f"data/{ARCHIVES[name]}"]


@pytest.mark.parametrize("name", FETCHED)
def test_a_file_that_is_not_on_the_server(official, tmp_path, name):
    del official.files[f"/{name}/{ARCHIVES[name]}"]
    message = fails("could not be fetched from ", fetch, name, tmp_path, official.url)
    assert f"{official.url}/{name}/{ARCHIVES[name]}" in message and "404" in message
    assert message.endswith(f"fetch it by hand and put it at {tmp_path / ARCHIVES[name]}") and not files_below(tmp_path)


def test_a_file_of_xquad_that_is_not_on_the_server_keeps_the_rest(official, tmp_path):
    missing = official.files.pop("/xquad/xquad.es.json")
    message = fails("xquad.es.json could not be fetched", fetch, "mlqa", tmp_path, official.url)
    assert message.endswith(f"put it at {tmp_path / 'xquad/xquad.es.json'}")
    official.files["/xquad/xquad.es.json"] = missing
    before = len(official.requests)
    fetch("mlqa", tmp_path, official.url)
    asked = [path for path, _ in official.requests[before:]]
    later = [*(f"/xquad/xquad.{x}.json" for x in ("es", "hi", "vi", "zh")), "/squad/dev-v1.1.json", "/squad/train-v1.1.json"]
    assert asked == later and files_below(tmp_path) == sorted(FETCHED["mlqa"])


@pytest.mark.parametrize("name", FETCHED)
def test_the_command_line_fetches_each_task(official, tmp_path, monkeypatch, capsys, name):
    urls = (f"{official.url}/{name}", f"{official.url}/squad", f"{official.url}/xquad")
    monkeypatch.setattr(data.FETCHERS[name], "__defaults__", urls if name == "mlqa" else urls[:1])
    assert data.main(["fetch", name, "--data", str(tmp_path / "data")]) == 0
    assert files_below(tmp_path / "data") == sorted(FETCHED[name])
    official.files.clear()
    capsys.readouterr()
    assert data.main(["fetch", name, "--data", str(tmp_path / "other")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
