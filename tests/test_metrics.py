"""The measures, against oracles that are not ours: MLQA's published rules written out a second time, character by
character; seqeval; searches by brute force; models whose outputs are known."""

import statistics
import string
import unicodedata

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from seqeval.metrics import f1_score, precision_score, recall_score
from seqeval.metrics.sequence_labeling import get_entities

import eval as measure
from data import BOS, EOS, IGNORED, NER_LABELS, PAD, Examples


def cases(n):
    """The same n generated cases in every run, however long they take."""
    return settings(max_examples=n, deadline=None, derandomize=True, database=None)


# --- answers: MLQA's rules (Lewis et al. 2020) ---------------------------------------------------------------

ARTICLES = {
    "en": "a an the",
    "es": "un una unos unas el la los las",
    "de": "ein eine einen einem eines einer der die das den dem des",
    "vi": "của là cái chiếc những",
    "ar": "",  # its article is no word: see published_tokens
    "hi": "",
    "zh": "",
}


def is_punctuation(character):
    return unicodedata.category(character)[0] == "P" or character in string.punctuation


def published_tokens(text, language):
    kept = "".join([c for c in text.lower() if not is_punctuation(c)])
    bare, i, word = "", 0, ""
    if language == "ar":  # the published pattern is `\sال^|ال`, whose first half never matches
        while i < len(kept):
            article = kept[i : i + 2] == "ال"
            bare += " " if article else kept[i]
            i += 2 if article else 1
    else:
        for c in kept + "\n":
            if c.isalnum() or c == "_":  # what \b takes for the inside of a word
                word += c
            else:
                bare += (" " if word in ARTICLES[language].split() else word) + c
                word = ""
    tokens, token = [], ""
    for c in bare + "\n":
        alone = language == "zh" and (0x4E00 <= ord(c) <= 0x9FA5 or is_punctuation(c))
        if alone or c.isspace():
            tokens += ([token] if token else []) + ([c] if alone else [])
            token = ""
        else:
            token += c
    return tokens


def published_f1(prediction, answers, language):
    scores = []
    for answer in answers:
        predicted, gold = published_tokens(prediction, language), published_tokens(answer, language)
        left, common = list(gold), 0
        for token in predicted:
            if token in left:
                left.remove(token)
                common += 1
        if common == 0:
            scores.append(0)
        else:
            precision, recall = 1.0 * common / len(predicted), 1.0 * common / len(gold)
            scores.append((2 * precision * recall) / (precision + recall))
    return max(scores)


def published_match(prediction, answers, language):
    normal = " ".join(published_tokens(prediction, language))
    return max(int(normal == " ".join(published_tokens(answer, language))) for answer in answers)


WORDS = {
    "en": "cat sat then nathe 1990 O'Neil the-cat",
    "es": "gato niño ella unal año niño 3.5 ¿qué?",
    "de": "Straße Katze derer dies ÄRZTE deutsch-französisch 1.000",
    "vi": "Hà Nội làng cáí CỦA của là những người",  # two of them decomposed: not the articles
    "ar": "الكتاب كتاب ال ا ل أل اال والال اللل مدرسةً ـ ٣٤ ،",
    "hi": "भारत नमस्ते क ा ् हिन्दी १९ । ॥ कि",
    "zh": "中国 北京 一 龥 龦 ䷿ 㐀 〇 iPhone北京 GDP增长 2008年 ， 。 《红楼梦》 𠀀",
}
BETWEEN = [" ", " ", " ", "  ", "\u00a0", "\u3000", "\u200b", "\n", "\t", "\u2028", "\x1c", ""]
ANYWHERE = "- ' ’ . , 。 ، ؟ । « » $ + _ < ^ | ~ € … — · ・ ‿ １ Ａ ａ ！ ％ é İ ß Σ ς ǅ ½ ² ﷺ ﬁ x 7".split()
ANYWHERE += ["e\u0301", "\u0301", "\u0327"]  # combining marks


def pieces(language):
    articles = ARTICLES[language].split()
    words = [*WORDS[language].split(), *articles, *[a.upper() for a in articles], *[a.title() for a in articles]]
    other = st.one_of(st.sampled_from(ANYWHERE), st.characters(codec="utf-8"))
    return st.one_of(st.sampled_from(words), st.sampled_from(words), st.sampled_from(BETWEEN), other)


@st.composite
def answered(draw, language):
    """(prediction, gold answers): the prediction by itself, or one of the gold answers with some changes."""
    piece = pieces(language)
    texts = draw(st.lists(st.lists(piece, max_size=7), min_size=1, max_size=3))
    prediction = list(draw(st.one_of(st.lists(piece, max_size=7), *2 * [st.sampled_from(texts)])))
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(prediction)))
        change = draw(st.sampled_from(["drop", "insert", "upper", "space", "twice"]))
        at = slice(place, place + 1)
        prediction[at] = {
            "drop": [],
            "insert": [draw(piece), *prediction[at]],
            "upper": [p.upper() for p in prediction[at]],
            "space": [" ", *prediction[at], " "],
            "twice": [*prediction[at], " ", *prediction[at]],
        }[change]
    glue = draw(st.sampled_from([" ", " ", ""]))
    return glue.join(prediction), [glue.join(text) for text in texts]


@pytest.mark.parametrize("language", ARTICLES)
def test_single_answers_have_the_published_scores(language):
    seen = set()

    @cases(150)
    @given(answered(language))
    def check(case):
        f1 = measure.answer_f1(*case, language)
        assert f1 == published_f1(*case, language)
        assert measure.exact_match(*case, language) == published_match(*case, language)
        assert measure.answer_tokens(case[0], language) == published_tokens(case[0], language)
        seen.add("none" if f1 == 0 else "all" if f1 == 1 else "some")

    check()
    assert seen == {"none", "some", "all"}  # or the comparison would say little


def cut_out(predictions):
    """(Examples, logits) of one question each, whose best answer is the given text: the whole context, one piece."""
    ids = [[BOS, 7, EOS, EOS, 8, EOS]] * len(predictions)
    spans = [[(-1, -1)] * 4 + [(0, len(text))] + [(-1, -1)] for text, _ in predictions]
    spans = [np.array(span, np.int32) for span in spans]
    logits = np.random.default_rng(0).normal(size=(6 * len(predictions), 2)).astype(np.float32)
    return Examples.from_lists(ids, [(0, 0)] * len(ids), None, spans, [list(p) for p in predictions]), logits


@pytest.mark.parametrize("language", ARTICLES)
@cases(25)
@given(data=st.data())
def test_a_file_of_answers_has_the_published_scores(language, data):
    answers = data.draw(st.lists(answered(language), min_size=1, max_size=6))
    examples, logits = cut_out(answers)
    f1 = sum(100 * published_f1(*case, language) for case in answers) / len(answers)
    exact = sum(100 * published_match(*case, language) for case in answers) / len(answers)
    found = measure.answer_scores(logits, examples, language)
    assert found == {"f1": pytest.approx(f1, abs=1e-9), "exact_match": pytest.approx(exact, abs=1e-9)}
    # A pair is a context and a question: the answer is in the context's language.
    assert measure.answer_scores(logits, examples, f"{language}-xx") == found


@pytest.mark.parametrize(
    ("language", "prediction", "answers", "f1", "exact"),
    [
        ("en", "The cat sat.", ["a cat"], 2 / 3, 0),  # cat sat, cat
        ("en", "AN (apple)!", ["the Apple"], 1, 1),
        ("en", "cat cat dog", ["cat dog dog"], 2 / 3, 0),  # bags: cat and dog in common, once each
        ("en", "Jean-Luc", ["JeanLuc"], 1, 1),  # punctuation leaves nothing behind, not a space
        ("en", "theory", ["ory"], 0, 0),
        ("en", "the", ["a"], 0, 1),  # both without tokens
        ("en", "", [""], 0, 1),
        ("en", "dog", ["cat", "dog and cat", "dog"], 1, 1),
        ("en", "der hund", ["hund"], 2 / 3, 0),  # another language's article
        ("de", "der Hund", ["Hund"], 1, 1),
        ("de", "the Hund", ["Hund"], 2 / 3, 0),
        ("es", "¿Las casas?", ["unas CASAS"], 1, 1),
        ("vi", "của những người", ["người"], 1, 1),
        ("vi", "cu\u0309a người", ["người"], 2 / 3, 0),  # decomposed: not the article
        ("ar", "الكتاب", ["كتاب"], 1, 1),
        ("ar", "والكتاب", ["و كتاب"], 1, 1),  # also inside a word, where a space takes its place
        ("hi", "भारत।", ["भारत"], 1, 1),
        ("zh", "中国，北京", ["北京 中国"], 1, 0),  # the same characters in another order
        ("zh", "北京市", ["北京"], 4 / 5, 0),
        ("zh", "iPhone北京", ["iphone 北京"], 1, 1),
        ("hi", "中国", ["中 国"], 0, 0),  # only Chinese answers are divided by character
    ],
)
def test_scores_of_answers_worked_out_by_hand(language, prediction, answers, f1, exact):
    for score in (measure.answer_f1, published_f1):
        assert score(prediction, answers, language) == pytest.approx(f1)
    for score in (measure.exact_match, published_match):
        assert score(prediction, answers, language) == exact


def test_a_language_that_mlqa_has_not_has_no_articles():
    assert measure.answer_f1("le chat", ["chat"], "fr") == pytest.approx(2 / 3)
    assert measure.exact_match("Chat!", ["chat"], "fr") == 1 != measure.exact_match("the chat", ["chat"], "fr")


def test_the_article_of_a_pair_is_that_of_the_contexts_language():
    examples, logits = cut_out([("the dog", ["dog"]), ("der dog", ["dog"]), ("der dog", ["der dog"])])
    english = {"f1": pytest.approx((1 + 2 / 3 + 1) / 3 * 100), "exact_match": pytest.approx(200 / 3)}
    assert measure.answer_scores(logits, examples, "en-de") == english
    assert measure.answer_scores(logits[:6], examples.take([0]), "en-de")["exact_match"] == 100
    assert measure.answer_scores(logits[:6], examples.take([0]), "de-en")["exact_match"] == 0


# --- entities: seqeval ---------------------------------------------------------------------------------------


@st.composite
def tags_of(draw, lengths):
    """Ids of tags of sentences of these lengths: IOB2, any tags at all, or none but O."""
    kind = draw(st.sampled_from(["IOB2", "any", "any", "none"]))
    sentences = []
    for length in lengths:
        tags = [0] * length if kind == "none" else draw(st.lists(st.integers(0, 6), min_size=length, max_size=length))
        for i, tag in enumerate(tags):  # I-X is B-X + 1
            before = tags[i - 1] if i else 0
            if kind == "IOB2" and tag in (2, 4, 6) and before not in (tag, tag - 1):
                tags[i] = tag - 1
        sentences.append(tags)
    return sentences


@st.composite
def tagged(draw):
    """(gold, predicted) of some sentences; the predicted tags by themselves, or the gold ones with some changes."""
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    gold = draw(tags_of(lengths))
    predicted = draw(tags_of(lengths))
    if draw(st.booleans()):
        changed = draw(st.sets(st.integers(0, sum(lengths) - 1), max_size=3))
        places = iter(range(sum(lengths)))
        predicted = [
            [new if next(places) in changed else old for old, new in zip(*pair)] for pair in zip(gold, predicted)
        ]
    return gold, predicted


def named(sentences):
    return [[NER_LABELS[tag] for tag in tags] for tags in sentences]


def flat(sentences):
    return np.array([tag for tags in sentences for tag in tags], np.int64)


def numbers(sentences):
    return np.repeat(np.arange(len(sentences)), [len(tags) for tags in sentences])


def seqevals(gold, predicted):
    """seqeval's scores in its default mode, which reads tags as conlleval does."""
    pair = named(gold), named(predicted)
    of = {"f1": f1_score, "precision": precision_score, "recall": recall_score}
    return {name: pytest.approx(100 * float(f(*pair, zero_division=0)), abs=1e-9) for name, f in of.items()}


@cases(120)
@given(tagged())
def test_entities_are_those_that_seqeval_reads(case):
    for sentences in case:
        expected, begin = set(), 0
        for tags in named(sentences):
            expected |= {(begin + first, begin + last, kind) for kind, first, last in get_entities(tags)}
            begin += len(tags)
        assert measure.entities(flat(sentences), numbers(sentences)) == expected


def test_the_scores_of_entities_are_seqevals():
    seen = set()

    @cases(120)
    @given(tagged())
    def check(case):
        counts = measure.entity_counts(*map(flat, case), numbers(case[0]), len(case[0]))
        found = measure.entity_f1(counts.sum(0))
        assert found == seqevals(*case)
        seen.add("none" if found["f1"] == 0 else "all" if found["f1"] == 100 else "some")

    check()
    assert seen == {"none", "some", "all"}


def in_windows(gold, predicted, random):
    """(Examples, logits) of sentences as the model reads them: windows between special tokens, tokens of one to three
    pieces, of which the first has the label. The logits of the other pieces are of any tag."""
    windows, labels, first, best = [], [], [0], []
    for golden, found in zip(gold, predicted):
        of_sentence = [[]]
        for pair in zip(golden, found):
            if random.random() < 0.3:
                of_sentence.append([])
            of_sentence[-1] += [pair] + [(IGNORED, random.randrange(7)) for _ in range(random.choice([0, 0, 1, 2]))]
        for window in of_sentence:
            special = [(IGNORED, random.randrange(7))]
            marks = special + window + special
            windows.append([BOS, *[random.randrange(4, 90) for _ in window], EOS])
            labels += [label for label, _ in marks]
            best += [tag for _, tag in marks]
        first.append(len(windows))
    noise = np.random.default_rng(random.randrange(10**6)).random((len(best), len(NER_LABELS)))
    logits = (noise + 2 * np.eye(len(NER_LABELS))[best] - 3).astype(np.float32)
    return Examples.from_lists(windows, labels, first), logits


@cases(100)
@given(tagged(), st.randoms(use_true_random=False))
def test_the_scores_of_a_model_are_seqevals_of_the_sentences(case, random):
    examples, logits = in_windows(*case, random)
    assert len(examples) == len(case[0])
    assert measure.entity_scores(logits, examples) == seqevals(*case)


def test_an_entity_goes_on_in_the_next_window_of_its_sentence_and_not_in_the_next_sentence():
    b, i = NER_LABELS.index("B-PER"), NER_LABELS.index("I-PER")
    windows = [[BOS, 5, 6, EOS], [BOS, 7, EOS]]
    gold = [IGNORED, 0, b, IGNORED, IGNORED, i, IGNORED]
    only_first_token = np.eye(7, dtype=np.float32)[[0, 0, b, 0, 0, 0, 0]]
    both_tokens = np.eye(7, dtype=np.float32)[[0, 0, b, 0, 0, i, 0]]
    two_entities = np.eye(7, dtype=np.float32)[[0, 0, b, 0, 0, b, 0]]
    one, two = Examples.from_lists(windows, gold, [0, 2]), Examples.from_lists(windows, gold, [0, 1, 2])

    def score(logits, examples):
        return measure.entity_scores(logits, examples)

    perfect = {"f1": 100, "precision": 100, "recall": 100}
    # In one sentence it is one entity of two tokens: its first token alone is wrong, and so are two entities.
    assert score(both_tokens, one) == perfect
    assert score(only_first_token, one) == score(two_entities, one) == {"f1": 0, "precision": 0, "recall": 0}
    # In two sentences there are two entities.
    assert score(both_tokens, two) == score(two_entities, two) == perfect
    assert score(only_first_token, two) == {"f1": pytest.approx(200 / 3), "precision": 100, "recall": 50}


def test_sentences_without_any_entity_score_nothing():
    examples = Examples.from_lists([[BOS, 5, EOS]], [IGNORED, 0, IGNORED])
    found = measure.entity_scores(np.eye(7, dtype=np.float32)[[0, 0, 0]], examples)
    assert found == {"f1": 0, "precision": 0, "recall": 0}


# --- the best answer: all answers tried ----------------------------------------------------------------------


@st.composite
def questions(draw):
    """(Examples, logits): contexts of letters that come once each, so that a text tells where it was cut; windows that
    begin anywhere, overlap, or hold no piece; logits of few values (ties) or many."""
    ids, spans, texts, first = [], [], [], [0]
    for _ in range(draw(st.integers(1, 3))):
        context, characters = "", []
        for k in range(draw(st.integers(0, 8))):
            kind = draw(st.sampled_from(["word", "word", "word", "with its space", "nothing"]))
            begin, space = len(context), draw(st.sampled_from(["", " ", "\u3000", " \n"]))
            context += space + string.ascii_letters[4 * k : 4 * k + draw(st.integers(1, 4))]
            begin += 0 if kind == "with its space" else len(space)
            characters.append((begin, begin if kind == "nothing" else len(context)))
        context += draw(st.sampled_from(["", " .", "!"]))
        for _ in range(draw(st.integers(1, 3))):
            begin = draw(st.integers(0, len(characters)))
            window = characters[begin : draw(st.integers(begin, len(characters)))]
            head = [BOS, *[9] * draw(st.integers(0, 3)), EOS, EOS]
            ids.append([*head, *[8] * len(window), EOS])
            spans.append(np.array([*[(-1, -1)] * len(head), *window, (-1, -1)], np.int32))
        first.append(len(ids))
        texts.append([context, ["gold"]])
    examples = Examples.from_lists(ids, [(0, 0)] * len(ids), first, spans, texts)
    largest = draw(st.sampled_from([1, 2, 400]))
    random = np.random.default_rng(draw(st.integers(0, 10**6)))
    # Eighths, so that sums are exact and ties are ties; often all below 0, as a model's are.
    logits = random.integers(-largest, largest + 1, (len(examples.ids), 2)) / 8 - draw(st.sampled_from([0, 50, 5000]))
    return examples, logits.astype(np.float32)


def all_best(examples, logits, question, longest):
    """(the highest score, the texts of the answers that have it, the number of answers) of a question."""
    best, texts, n = -np.inf, set(), 0
    context = examples.texts[question][0]
    for window in range(examples.first[question], examples.first[question + 1]):
        places = range(examples.offsets[window], examples.offsets[window + 1])
        places = [p for p in places if examples.spans[p][0] != -1]  # of the context
        for start in places:
            for end in places:
                if not 0 <= end - start <= longest - 1:
                    continue
                n += 1
                score = float(logits[start, 0]) + float(logits[end, 1])
                text = context[examples.spans[start][0] : examples.spans[end][1]].strip()
                if score > best:
                    best, texts = score, set()
                if score == best:
                    texts.add(text)
    return best, texts, n


def test_the_best_answer_is_what_a_search_over_all_finds():
    seen = set()

    @cases(200)
    @given(questions(), st.sampled_from([1, 2, 3, 5, 30]))
    def check(case, longest):
        examples, logits = case
        found = measure.best_answers(logits, examples, longest)
        assert len(found) == len(examples)
        for question, text in enumerate(found):
            _, texts, n = all_best(examples, logits, question, longest)
            assert text in texts if n else text == ""
            seen.add("none" if n == 0 else "one" if len(texts) == 1 < n else "tie")

    check()
    assert seen == {"none", "one", "tie"}


def test_an_answer_has_at_most_thirty_pieces():
    letters = string.ascii_letters[:40]
    spans = [(-1, -1)] * 3 + [(i, i + 1) for i in range(40)] + [(-1, -1)]
    examples = Examples.from_lists(
        [[BOS, EOS, EOS, *[8] * 40, EOS]], [(0, 0)], None, [np.array(spans, np.int32)], [[letters, ["a"]]]
    )
    logits = np.zeros((44, 2), np.float32)
    logits[3 + 2, 0] = 9  # start
    logits[3 + 2 + 29, 1], logits[3 + 2 + 30, 1] = 5, 8  # the end that makes it thirty pieces, and thirty-one
    assert measure.best_answers(logits, examples) == [letters[2:32]]
    assert measure.best_answers(logits, examples, longest=31) == [letters[2:33]]


def test_an_answer_is_cut_out_of_the_context_by_its_characters():
    context = "«北京» 是\u3000中国 的首都。"
    spans = [(-1, -1), (-1, -1), (-1, -1), (-1, -1), (0, 1), (1, 3), (3, 5), (5, 7), (7, 10), (10, 12), (-1, -1)]
    examples = Examples.from_lists(
        [[BOS, 9, EOS, EOS, *range(10, 16), EOS]], [(0, 0)], None, [np.array(spans, np.int32)], [[context, ["北京"]]]
    )

    def best(start, end):
        logits = np.full((11, 2), -4, np.float32)
        logits[start, 0] = logits[end, 1] = 1
        logits[[0, 1, 2, 3, 10]] = 50  # special tokens and the question are no answers
        return measure.best_answers(logits, examples)

    assert best(5, 5) == ["北京"]
    assert best(7, 8) == ["是\u3000中国"]  # white space inside stays as it was, and goes at the ends
    assert best(4, 6) == ["«北京»"]
    assert best(9, 9) == ["的首"]


# --- predictions ---------------------------------------------------------------------------------------------


class Known(torch.nn.Module):
    """A model whose logits can be worked out from the ids: of each id (id, its place, the sum of its window), of the
    window as a whole the sum and the first and last id."""

    def __init__(self, of_each_id):
        super().__init__()
        self.of_each_id, self.batches = of_each_id, []

    def forward(self, input_ids):
        self.batches.append(input_ids)
        real = input_ids != PAD
        total = (input_ids * real).sum(1)
        if not self.of_each_id:
            return torch.stack([total, input_ids[:, 0], input_ids[:, 1]], 1).float()
        place = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        return torch.stack([input_ids, place, total[:, None].expand_as(input_ids)], 2).float()


@st.composite
def windows(draw):
    lists = draw(st.lists(st.lists(st.integers(2, 9999), min_size=2, max_size=9), min_size=1, max_size=9))
    # labels of each id or of each window: predict does not depend on them
    labels = [0] * (sum(map(len, lists)) if draw(st.booleans()) else len(lists))
    return lists, Examples.from_lists(lists, labels)


@cases(60)
@given(windows(), st.sampled_from([1, 4, 9, 20, 4096]))
def test_predictions_of_each_id_come_in_the_order_of_the_ids(case, tokens):
    lists, examples = case
    model = Known(of_each_id=True)
    found = measure.predict(model, examples, tokens=tokens)
    expected = [[i, place, sum(window)] for window in lists for place, i in enumerate(window)]
    assert found.tolist() == expected and found.dtype == np.float32  # as many as there are ids: no padding
    assert all(len(batch) == 1 or batch.numel() <= tokens for batch in model.batches)


@cases(60)
@given(windows(), st.sampled_from([1, 4, 9, 20, 4096]))
def test_predictions_of_each_window_come_in_the_order_of_the_windows(case, tokens):
    lists, examples = case
    found = measure.predict(Known(of_each_id=False), examples, tokens=tokens)
    assert found.tolist() == [[sum(window), window[0], window[1]] for window in lists]


def test_batches_are_padded_and_the_padding_has_no_rows():
    model = Known(of_each_id=True)
    found = measure.predict(model, Examples.from_lists([[0, 5, 2], [0, 5, 6, 7, 2]], [0, 0]))
    assert [batch.tolist() for batch in model.batches] == [[[0, 5, 6, 7, 2], [0, 5, 2, PAD, PAD]]]
    assert found.shape == (8, 3) and PAD not in found[:, 0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", [(), (3,)], ids=["of windows", "of ids"])
def test_outputs_that_are_not_finite_are_an_error(shape, value):
    class Broken(torch.nn.Module):
        def forward(self, input_ids):
            logits = torch.zeros(len(input_ids), *shape, 2)
            logits[input_ids[:, 1] == 6, ..., 1] = value  # in one window of several
            return logits

    sound = Examples.from_lists([[0, 5, 2]] * 3, [0] * 3)
    assert measure.predict(Broken(), sound).shape == (9 if shape else 3, 2)
    with pytest.raises(FloatingPointError):
        measure.predict(Broken(), Examples.from_lists([[0, 5, 2], [0, 6, 2], [0, 5, 2]], [0] * 3), tokens=3)


def test_outputs_for_padding_may_be_infinite():
    class Masked(torch.nn.Module):  # as a model does that gives padding no probability
        def forward(self, input_ids):
            return torch.where(input_ids == PAD, -torch.inf, input_ids.float())[:, :, None].expand(-1, -1, 2)

    found = measure.predict(Masked(), Examples.from_lists([[0, 5, 2], [0, 5, 6, 7, 2]], [0, 0]))
    assert found[:, 1].tolist() == [0, 5, 2, 0, 5, 6, 7, 2]


def test_each_language_is_measured_by_its_own_rules():
    """evaluate hands each set's name to the measure: "der" is an article in German contexts alone."""
    examples, _ = cut_out([("der Hund", ["Hund"])])

    class Pointer(Known):
        def forward(self, input_ids):
            return super().forward(input_ids)[:, :, :2]  # start and end

    found = measure.evaluate(Pointer(of_each_id=True), {"de": examples, "en": examples}, measure.MEASURES["mlqa"])
    assert found == {
        "f1": {"de": 100, "en": pytest.approx(200 / 3)},
        "exact_match": {"de": 100, "en": 0},
    }


def test_each_task_has_its_measures_its_own_first():
    tags = Examples.from_lists([[BOS, 5, EOS]], [IGNORED, 1, IGNORED])
    pairs = Examples.from_lists([[BOS, 5, EOS]], [1])
    asked, logits = cut_out([("a", ["a"])])
    examples = {"xnli": (pairs, np.eye(3)[[1]]), "qam": (pairs, np.eye(2)[[0]]), "ner": (tags, np.eye(7)[[0, 1, 0]])}
    examples["mlqa"] = (asked, logits)
    found = {task: measure.MEASURES[task](logits, part, "es") for task, (part, logits) in examples.items()}
    assert found == {
        "xnli": {"accuracy": 100},
        "qam": {"accuracy": 0},
        "ner": {"f1": 100, "precision": 100, "recall": 100},
        "mlqa": {"f1": 100, "exact_match": 100},
    }
    assert {task: next(iter(scores)) for task, scores in found.items()} == {
        "xnli": "accuracy", "qam": "accuracy", "ner": "f1", "mlqa": "f1",
    }  # fmt: skip


# --- what a result says of the scores ------------------------------------------------------------------------

scores_of = st.floats(0, 100)


@cases(40)
@given(st.dictionaries(st.sampled_from(["ar", "de", "es", "zh"]), scores_of), scores_of, st.sampled_from(["en", "xx"]))
def test_the_summary_is_of_the_source_and_the_others(others, source, name):
    found = measure.summary({**others, name: source}, name)
    assert found["source"] == source
    assert found["mean"] == pytest.approx((sum(others.values()) + source) / (len(others) + 1))
    if others:
        assert found["non_source"] == pytest.approx(statistics.mean(others.values()))
        assert found["gap"] == pytest.approx(source - statistics.mean(others.values()))
    else:
        assert found["non_source"] is found["gap"] is None


def test_the_source_of_pairs_is_the_source_with_itself():
    pairs = {"en-en": 80.0, "en-de": 60.0, "de-en": 50.0, "de-de": 70.0}
    assert measure.summary(pairs) == {"mean": 65, "source": 80, "non_source": 60, "gap": 20}
    assert measure.summary(pairs, "de") == {"mean": 65, "source": 70, "non_source": pytest.approx(190 / 3),
                                            "gap": pytest.approx(20 / 3)}  # fmt: skip


def test_a_report_has_the_tasks_own_measure_and_the_others_by_name():
    measured = {"f1": {"de": 60.0, "en": 80.0}, "exact_match": {"de": 40.0, "en": 70.0}}
    measured["third"] = {"de": 1.0, "en": 2.0}
    expected = {"measure": "f1", "scores": measured["f1"], "exact_match": measured["exact_match"]}
    expected |= {"third": measured["third"], "mean": 70, "non_source": 60, "source": 80, "gap": 20}
    assert measure.report(measured) == expected
    other = measure.report(measured, "de")
    assert (other["source"], other["non_source"], other["gap"]) == (60, 80, -20)
    assert measure.report({"accuracy": {"en": 50.0}}) == {
        "measure": "accuracy", "scores": {"en": 50.0}, "mean": 50, "source": 50, "non_source": None, "gap": None,
    }  # fmt: skip


def test_a_report_of_pairs_is_of_the_pair_of_the_source():
    pairs = {"de-de": 60.0, "de-en": 50.0, "en-de": 70.0, "en-en": 90.0}
    found = measure.report({"f1": pairs, "exact_match": {pair: score / 2 for pair, score in pairs.items()}})
    assert (found["source"], found["non_source"], found["gap"]) == (90, 60, 30)
    assert found["scores"] == pairs and found["exact_match"]["en-en"] == 45
