"""eval.py against oracles that are not ours: MLQA's published rules written out a second time, character by character;
seqeval; searches by brute force; models whose outputs are known; linear CKA's definition."""

import copy
import itertools
import string
import unicodedata

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from seqeval.metrics import f1_score, precision_score, recall_score

import eval as measure
import model as xlmr
from data import BOS, EOS, IGNORED, NER_LABELS, PAD, Examples


def cases(n):
    """The same n generated cases in every run, however long they take."""
    return settings(max_examples=n, deadline=None, derandomize=True, database=None)


# --- predictions ---------------------------------------------------------------------------------------------


class Model(torch.nn.Module):
    """A function of the ids as a model."""

    def __init__(self, of_ids):
        super().__init__()
        self.forward, self.weight = of_ids, torch.nn.Parameter(torch.ones(()))  # the weight tells the model's device


def network(kind=xlmr.SequenceClassifier):
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64,
             "num_hidden_layers": 3, "max_position_embeddings": 40, "hidden_dropout_prob": 0.4}  # fmt: skip
    model = kind(xlmr.Config(**sizes, labels=("a", "b", "c")))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(0.4 * torch.randn_like(p) + name.endswith("LayerNorm.weight"))
    return model


@pytest.mark.parametrize("tokens", [1, 100, 10**6])
@pytest.mark.parametrize("kind", [xlmr.SequenceClassifier, xlmr.TokenClassifier, xlmr.QuestionAnswering])
def test_predictions_do_not_depend_on_the_batches(kind, tokens):
    """They come in the order of the ids or the windows, without padding: a real model with dropout, that was training,
    against one sentence at a time. No gradients are left."""
    random = np.random.default_rng(0)
    ids = [[0, *random.integers(4, 60, random.integers(2, 36)).tolist(), 2] for _ in range(41)]
    model, examples = network(kind), Examples.from_lists(ids, random.integers(0, 3, 41).tolist())
    found = measure.predict(model.train(), examples, tokens)
    assert all(p.grad is None for p in model.parameters()) and found.std() > 0.1
    with torch.no_grad():
        logits = [model.eval()(torch.tensor([window])) for window in ids]
    expected = torch.cat([x[0] if x.dim() == 3 else x for x in logits]).numpy()
    assert found.shape == expected.shape and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("shape", [(), (3,)], ids=["of windows", "of ids"])
def test_outputs_that_are_not_finite_are_an_error(shape, value):
    def broken(input_ids):
        logits = torch.zeros(len(input_ids), *shape, 2)
        logits[input_ids[:, 1] == 6, ..., 1] = value  # in one window of several
        return logits

    assert measure.predict(Model(broken), Examples.from_lists([[0, 5, 2]] * 3, [0] * 3)).shape == (9 if shape else 3, 2)
    with pytest.raises(FloatingPointError):
        measure.predict(Model(broken), Examples.from_lists([[0, 5, 2], [0, 6, 2], [0, 5, 2]], [0] * 3), tokens=3)


def test_outputs_for_padding_may_be_infinite():
    def masked(input_ids):  # as a model does that gives padding no probability
        return torch.where(input_ids == PAD, -torch.inf, input_ids.float())[:, :, None].expand(-1, -1, 2)

    found = measure.predict(Model(masked), Examples.from_lists([[0, 5, 2], [0, 5, 6, 7, 2]], [0, 0]))
    assert found[:, 1].tolist() == [0, 5, 2, 0, 5, 6, 7, 2]


# --- entities: seqeval ---------------------------------------------------------------------------------------


@st.composite
def tags_of(draw, lengths):
    """Ids of tags of sentences of these lengths: IOB2, any tags at all, or none but O."""
    kind = draw(st.sampled_from(["IOB2", "any", "any", "none"]))
    sentences = []
    for length in lengths:
        tags = draw(st.lists(st.integers(0, 0 if kind == "none" else 6), min_size=length, max_size=length))
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
    gold, predicted = draw(tags_of(lengths)), draw(tags_of(lengths))
    if draw(st.booleans()):
        changed, places = draw(st.sets(st.integers(0, sum(lengths) - 1), max_size=3)), iter(range(sum(lengths)))
        predicted = [[b if next(places) in changed else a for a, b in zip(*pair)] for pair in zip(gold, predicted)]
    return gold, predicted


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


def test_the_scores_of_a_model_are_seqevals_of_the_sentences():
    """In its default mode, which reads tags as conlleval does. An entity goes on in the next window of its sentence,
    and not in the next sentence."""
    seen = set()

    @cases(300)
    @given(tagged(), st.randoms(use_true_random=False))
    def check(case, random):
        examples, logits = in_windows(*case, random)
        found = measure.entity_scores(logits, examples)
        gold, predicted = ([[NER_LABELS[tag] for tag in tags] for tags in sentences] for sentences in case)
        of = {"f1": f1_score, "precision": precision_score, "recall": recall_score}
        expected = {name: 100 * float(f(gold, predicted, zero_division=0)) for name, f in of.items()}
        assert found == pytest.approx(expected, abs=1e-9)
        seen.add("none" if found["f1"] == 0 else "all" if found["f1"] == 100 else "some")

    check()
    assert seen == {"none", "some", "all"}  # or the comparison would say little


# --- answers: MLQA's rules (Lewis et al. 2020) ---------------------------------------------------------------

ARTICLES = {
    "en": "a an the",
    "es": "un una unos unas el la los las",
    "de": "ein eine einen einem eines einer der die das den dem des",
    "vi": "của là cái chiếc những",
    **{"ar": "", "hi": "", "zh": ""},  # the Arabic article is no word: see published_tokens
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
                bare += (" " if word in ARTICLES.get(language, "").split() else word) + c
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


def published_scores(prediction, answers, language):
    """(F1, exact match): of the gold answer that gives the most."""
    predicted, f1, exact = published_tokens(prediction, language), 0, 0
    for answer in answers:
        gold = published_tokens(answer, language)
        left, common = list(gold), 0
        for token in predicted:
            if token in left:
                left.remove(token)
                common += 1
        if common:
            precision, recall = 1.0 * common / len(predicted), 1.0 * common / len(gold)
            f1 = max(f1, (2 * precision * recall) / (precision + recall))
        exact = max(exact, int(" ".join(predicted) == " ".join(gold)))
    return f1, exact


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
        assert (f1, measure.exact_match(*case, language)) == published_scores(*case, language)
        assert measure.answer_tokens(case[0], language) == published_tokens(case[0], language)
        seen.add("none" if f1 == 0 else "all" if f1 == 1 else "some")

    check()
    assert seen == {"none", "some", "all"}


@pytest.mark.parametrize(
    ("language", "prediction", "answers", "f1", "exact"),
    [
        ("en", "The cat sat.", ["a cat"], 2 / 3, 0),  # cat sat, cat
        ("en", "cat cat dog", ["cat dog dog"], 2 / 3, 0),  # bags: cat and dog in common, once each
        ("en", "Jean-Luc", ["JeanLuc"], 1, 1),  # punctuation leaves nothing behind, not a space
        ("en", "the", ["a"], 0, 1),  # both without tokens
        ("en", "", [""], 0, 1),
        ("en", "dog", ["cat", "dog and cat", "dog"], 1, 1),
        ("de", "der Hund", ["Hund"], 1, 1),
        ("vi", "cu\u0309a người", ["người"], 2 / 3, 0),  # decomposed: not the article
        ("ar", "والكتاب", ["و كتاب"], 1, 1),  # also inside a word, where a space takes its place
        ("hi", "中国", ["中 国"], 0, 0),  # only Chinese answers are divided by character
        ("zh", "中国，北京", ["北京 中国"], 1, 0),  # the same characters in another order
        ("zh", "iPhone北京", ["iphone 北京"], 1, 1),
        ("fr", "le chat", ["chat"], 2 / 3, 0),  # MLQA has no articles of French
    ],
)
def test_scores_of_answers_worked_out_by_hand(language, prediction, answers, f1, exact):
    found = measure.answer_f1(prediction, answers, language), measure.exact_match(prediction, answers, language)
    assert found == published_scores(prediction, answers, language) == (pytest.approx(f1), exact)


def cut_out(predictions):
    """(Examples, logits) of one question each, whose best answer is the given text: the whole context, one piece."""
    ids = [[BOS, 7, EOS, EOS, 8, EOS]] * len(predictions)
    spans = [[(-1, -1)] * 4 + [(0, len(text))] + [(-1, -1)] for text, _ in predictions]
    spans = [np.array(span, np.int32) for span in spans]
    logits = np.random.default_rng(0).normal(size=(6 * len(predictions), 2)).astype(np.float32)
    return Examples.from_lists(ids, [(0, 0)] * len(ids), None, spans, [list(p) for p in predictions]), logits


@cases(80)
@given(language=st.sampled_from(list(ARTICLES)), data=st.data())
def test_a_file_of_answers_has_the_published_scores(language, data):
    answers = data.draw(st.lists(answered(language), min_size=1, max_size=6))
    examples, logits = cut_out(answers)
    f1, exact = 100 * np.mean([published_scores(*case, language) for case in answers], axis=0)
    found = measure.answer_scores(logits, examples, language)
    assert found == {"f1": pytest.approx(f1, abs=1e-9), "exact_match": pytest.approx(exact, abs=1e-9)}
    # A pair is a context and a question: the answer is in the context's language.
    other = data.draw(st.sampled_from(list(ARTICLES)))
    assert measure.answer_scores(logits, examples, f"{language}-{other}") == found


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
    """(the texts of the answers with the highest score, the number of answers) of a question."""
    context, answers = examples.texts[question][0], []
    for window in range(examples.first[question], examples.first[question + 1]):
        places = range(examples.offsets[window], examples.offsets[window + 1])
        places = [p for p in places if examples.spans[p][0] != -1]  # of the context
        for start, end in itertools.product(places, places):
            if 0 <= end - start <= longest - 1:
                text = context[examples.spans[start][0] : examples.spans[end][1]].strip()
                answers.append((float(logits[start, 0]) + float(logits[end, 1]), text))
    best = max(answers, default=(0, ""))[0]
    return {text for score, text in answers if score == best}, len(answers)


def test_the_best_answer_is_what_a_search_over_all_finds():
    seen = set()

    @cases(200)
    @given(questions(), st.sampled_from([1, 2, 3, 5, 30]))
    def check(case, longest):
        examples, logits = case
        found = measure.best_answers(logits, examples, longest)
        assert len(found) == len(examples)
        for question, text in enumerate(found):
            texts, n = all_best(examples, logits, question, longest)
            assert text in texts if n else text == ""
            seen.add("none" if n == 0 else "one" if len(texts) == 1 < n else "tie")

    check()
    assert seen == {"none", "one", "tie"}


def test_an_answer_has_at_most_thirty_pieces():
    letters = string.ascii_letters[:40]
    spans = [np.array([(-1, -1)] * 3 + [(i, i + 1) for i in range(40)] + [(-1, -1)], np.int32)]
    examples = Examples.from_lists([[BOS, EOS, EOS, *[8] * 40, EOS]], [(0, 0)], None, spans, [[letters, ["a"]]])
    logits = np.zeros((44, 2), np.float32)
    logits[3 + 2, 0] = 9  # start
    logits[3 + 2 + 29, 1], logits[3 + 2 + 30, 1] = 5, 8  # the end that makes it thirty pieces, and thirty-one
    assert measure.best_answers(logits, examples) == [letters[2:32]]


# --- from logits to what a result says -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", [xlmr.SequenceClassifier, xlmr.TokenClassifier])
def test_languages_are_predicted_as_one_set_and_counted_one_by_one(kind, monkeypatch):
    random, model, sets = np.random.default_rng(0), network(kind), {}
    for language, n in (("en", 7), ("de", 1), ("zh", 4)):
        ids = [[0, *random.integers(4, 60, random.integers(2, 36)).tolist(), 2] for _ in range(n)]
        sets[language] = Examples.from_lists(ids, [0] * n)
    seen, predict = [], measure.predict
    monkeypatch.setattr(measure, "predict", lambda *args: seen.append(args) or predict(*args))
    of_logits = measure.Measure(lambda logits, examples, language: (language, logits), None)
    found = measure.count(model, sets, of_logits, tokens=50)
    assert len(seen) == 1 and list(found) == list(sets)
    for language, examples in sets.items():
        assert found[language][0] == language
        np.testing.assert_allclose(found[language][1], predict(model, examples, 50), rtol=1e-4, atol=1e-5)


def test_evaluate_measures_each_language_by_its_own_rules():
    """It hands each set's name to the measure: "der" is an article in German contexts alone. The scores are those of
    what the examples count, which may be drawn from and added up."""
    examples, _ = cut_out([("der Hund", ["Hund"]), ("Hund", ["Hund"])])

    def pointer(input_ids):  # starts at the id and ends at its place
        return torch.stack([input_ids, torch.arange(input_ids.shape[1]).expand_as(input_ids)], 2).float()

    model, sets, answers = Model(pointer), {"de": examples, "en": examples}, measure.MEASURES["mlqa"]
    expected = {"f1": {"de": 100, "en": pytest.approx(250 / 3)}, "exact_match": {"de": 100, "en": 50}}
    assert measure.evaluate(model, sets, answers, tokens=6) == expected
    counts = measure.count(model, sets, answers)
    assert {language: c.tolist() for language, c in counts.items()} == {
        "de": [[1, 1], [1, 1]], "en": [[pytest.approx(2 / 3), 0], [1, 1]]
    }  # fmt: skip
    assert measure.scored(counts, answers) == expected
    drawn = np.stack([counts["en"][[0, 0]].sum(0), counts["en"].sum(0)])  # two draws at once
    assert answers.scores(drawn, 2)["f1"] == pytest.approx([200 / 3, 250 / 3])


@pytest.mark.parametrize(
    ("scores", "source", "expected"),  # mean, source, non-source, gap
    [
        ({"de": 60.0, "en": 80.0, "fr": 40.0}, "en", (60, 80, 50, 30)),
        ({"de": 60.0, "en": 80.0, "fr": 40.0}, "de", (60, 60, 60, 0)),
        ({"xx": 80.0}, "xx", (80, 80, None, None)),
        # of pairs the source with itself is the source
        ({"en-en": 80.0, "en-de": 60.0, "de-en": 50.0, "de-de": 70.0}, "en", (65, 80, 60, 20)),
    ],
)
def test_a_report_has_the_tasks_own_measure_the_others_by_name_and_the_summary_of_its_own(scores, source, expected):
    others = dict.fromkeys(scores, 1.0)
    found = measure.report({"f1": scores, "exact_match": others}, source)
    summary = dict(zip(("mean", "source", "non_source", "gap"), expected))
    assert found == {"measure": "f1", "scores": scores, "exact_match": others, **summary}


# --- linear CKA ----------------------------------------------------------------------------------------------


def cka_by_definition(x, y):
    """HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)), HSIC(K, L) = tr(KHLH) / (n - 1)^2 (Kornblith et al. 2019, Sec. 3)."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    n = len(x)
    K, L, H = x @ x.T, y @ y.T, np.eye(n) - np.ones((n, n)) / n

    def hsic(a, b):
        return np.trace(a @ H @ b @ H) / (n - 1) ** 2

    return hsic(K, L) / np.sqrt(hsic(K, K) * hsic(L, L))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(50, 8, 8), (50, 3, 20), (6, 40, 30), (2, 5, 1), (200, 32, 32)])
def test_linear_cka_is_its_definition(size, dtype):
    """Of two that are alike to a degree, far from 0 on average, with features of very different sizes."""
    n, p, q = size
    random = np.random.default_rng(0)
    x = random.normal(size=(n, p)) * np.logspace(-2, 1, p) + 3
    y = x @ random.normal(size=(p, q)) * 0.3 + random.normal(size=(n, q)) - 5
    x, y = torch.tensor(x).to(dtype), torch.tensor(y).to(dtype)
    found = measure.linear_cka(x, y)
    assert found == pytest.approx(cka_by_definition(x, y), rel=1e-9) and 0 < found < 1 + 1e-9
    assert measure.linear_cka(x, x) == pytest.approx(1) and np.isnan(measure.linear_cka(x, torch.ones_like(y)))


@pytest.mark.parametrize("training", [True, False])
def test_similarity_is_the_cka_of_each_layer_on_the_real_tokens(training):
    model = network()
    torch.manual_seed(3)
    ids = torch.ones(3, 37, dtype=torch.long)  # PAD
    for row, length in zip(ids, (12, 5, 30)):
        row[:length] = torch.randint(2, 60, (length,))
    reference = copy.deepcopy(model.roberta).eval()
    model.train(training)
    with torch.no_grad():
        for p in model.roberta.encoder.layer[1].parameters():
            p.add_(0.3 * torch.randn_like(p))
    found = measure.similarity(model, reference, ids)
    assert model.training == training

    def states(encoder):  # each sentence by itself: no padding
        parts = [encoder.hidden_states(row[row != 1][None]) for row in ids]
        return [torch.cat([part[layer][0] for part in parts]).detach() for layer in range(1, 4)]

    expected = [cka_by_definition(a, b) for a, b in zip(states(model.eval().roberta), states(reference))]
    assert found == pytest.approx(expected, abs=1e-5)
    assert found[0] == pytest.approx(1) and max(found[1:]) < 0.99
