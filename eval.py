"""Measuring: from logits to the score of each task by its own rules, the performance gap, and linear CKA.

    measured = evaluate(model, task.dev, MEASURES["mlqa"])  # {"f1": {language: percent}, "exact_match": {...}}
    report(measured)                                        # scores, mean, source, non-source, gap

From top to bottom: predictions, scores, the gap, linear CKA.
"""

import collections
import re
import string
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from data import IGNORED, NER_LABELS, PAD, SOURCE, Examples, collate, length_sorted_batches

# --- predictions ---------------------------------------------------------------------------------------------


@torch.no_grad()
def predict(model, examples, tokens=4096):
    """The model's logits for `examples`, float32: (windows, labels), or (ids, labels) of a model that has some for each
    id, in the order of `examples.ids`.

    Streams batches of at most `tokens` tokens, sorted by length so that next to no padding is computed, and reads the
    device once, at the end: it never waits for Python.
    Raises FloatingPointError for logits that are not finite.
    """
    model.eval()
    device = next(model.parameters()).device
    logits, rows = [], []
    for windows in length_sorted_batches(examples.lengths, tokens):
        input_ids, _ = collate(examples, windows)
        of_batch = model(input_ids.to(device, non_blocking=True))
        if of_batch.dim() == 3:  # of each id; not of padding
            real = (input_ids != PAD).numpy()
            place = np.arange(input_ids.shape[1])
            windows = (examples.offsets[windows, None] + place)[real]
            of_batch = of_batch.flatten(0, 1)[torch.from_numpy(np.flatnonzero(real)).to(device)]
        logits.append(of_batch)
        rows.append(windows)
    if not logits:
        return None
    logits = torch.cat(logits).cpu()
    if not logits.isfinite().all():
        raise FloatingPointError("the model's outputs are not finite")
    result = np.empty(logits.shape, np.float32)
    result[np.concatenate(rows)] = logits.numpy()
    return result


# --- scores: each task's measures of logits, in percent, the task's own first --------------------------------


@dataclass(frozen=True)
class Measure:
    """What a task is measured by. `counts(logits, examples, language)` is what each example counts, (examples, k), and
    `scores(sums, n)` what the sums (..., k) over n examples say: {name: percent (...)}. The two are apart because a
    bootstrap draws examples and not scores. Called like `counts` it gives the scores."""

    counts: Callable
    scores: Callable

    def __call__(self, logits, examples, language=None):
        return self.of(self.counts(logits, examples, language))

    def of(self, counts):
        """{name: percent} of all these examples."""
        return {name: float(score) for name, score in self.scores(counts.sum(0, dtype=float), len(counts)).items()}


def right_classes(logits, examples, language=None):
    """(windows, 1): whether the highest logit is the label's."""
    return (logits.argmax(1) == examples.labels)[:, None]


accuracy = Measure(right_classes, lambda sums, n: {"accuracy": 100.0 * sums[..., 0] / n})


def entities_of_sentences(logits, examples, language=None):
    """(sentences, 3): how many entities are right, predicted and gold."""
    tokens = examples.labels != IGNORED
    starts = np.zeros(len(examples.ids) + 1, bool)
    starts[examples.offsets[examples.first[:-1]]] = True  # where sentences begin; their first token comes later
    sentence = np.cumsum(starts[:-1])[tokens] - 1
    return entity_counts(examples.labels[tokens], logits[tokens].argmax(1), sentence, len(examples))


def entity_counts(gold, predicted, sentence, sentences, labels=NER_LABELS):
    """(sentences, 3): the right, predicted and gold entities of each, as conlleval and seqeval's default read tags.

    gold, predicted (tokens,) ids of tags in `labels`; sentence (tokens,) the number of each token's sentence, from 0.
    An entity is right if type, first and last token are.
    """
    gold, predicted = (entities(tags, sentence, labels) for tags in (gold, predicted))
    firsts = [np.array([first for first, _, _ in found], int) for found in (gold & predicted, predicted, gold)]
    return np.stack([np.bincount(sentence[first], minlength=sentences) for first in firsts], axis=1)


def entity_f1(sums, n=None):
    """Micro F1, precision and recall, in percent, of sums (..., 3) of right, predicted and gold entities. Without any
    entity, or any right one, the score is 0."""
    right, predicted, gold = np.moveaxis(sums, -1, 0)
    return {
        "f1": 100.0 * 2 * right / np.maximum(predicted + gold, 1),
        "precision": 100.0 * right / np.maximum(predicted, 1),
        "recall": 100.0 * right / np.maximum(gold, 1),
    }


entity_scores = Measure(entities_of_sentences, entity_f1)


def entities(tags, sentence, labels=NER_LABELS):
    """The set of (first token, last token, type) in a sequence of tag ids.

    An entity begins at a B-, and at an I- that follows no tag of its type; it ends before the next token that is no I-
    of its type, and with its sentence (Ramshaw and Marcus 1995; conlleval).
    """
    types = np.array([label.partition("-")[2] for label in labels])[tags]
    prefixes = np.array([label[0] for label in labels])[tags]
    same = np.zeros(len(tags), bool)  # as the token before: type and sentence
    same[1:] = (types[1:] == types[:-1]) & (sentence[1:] == sentence[:-1])
    inside = prefixes != "O"
    begins = inside & ((prefixes == "B") | ~same)
    breaks = np.append(np.flatnonzero(begins | ~inside), len(tags))  # an entity ends before the next of these
    first = np.flatnonzero(begins)
    last = breaks[np.searchsorted(breaks, first, side="right")] - 1
    return set(zip(first.tolist(), last.tolist(), types[first].tolist()))


# MLQA's rules (Lewis et al. 2020): SQuAD's, with the articles of each language, and Chinese character by character.
PUNCTUATION = {c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c)[0] == "P"}
PUNCTUATION |= set(string.punctuation)
ARTICLES = {
    "en": r"\b(a|an|the)\b",
    "es": r"\b(un|una|unos|unas|el|la|los|las)\b",
    "de": r"\b(ein|eine|einen|einem|eines|einer|der|die|das|den|dem|des)\b",
    "vi": r"\b(của|là|cái|chiếc|những)\b",
    "ar": r"ال",  # wherever it stands, for the article is written together with its noun
}


def answer_tokens(text, language):
    """The tokens of an answer by MLQA's rules: lower case, without punctuation and articles, divided at white space; in
    Chinese each character of U+4E00-U+9FA5 is one. A language that MLQA has not is one without articles."""
    text = "".join(c for c in text.lower() if c not in PUNCTUATION)
    if language in ARTICLES:
        text = re.sub(ARTICLES[language], " ", text)
    if language == "zh":
        text = re.sub(r"([\u4e00-\u9fa5])", r" \1 ", text)
    return text.split()


def exact_match(prediction, answers, language):
    """1 if the prediction has the tokens of one of the gold answers, else 0."""
    tokens = answer_tokens(prediction, language)
    return int(any(tokens == answer_tokens(answer, language) for answer in answers))


def answer_f1(prediction, answers, language):
    """F1, 0 to 1, of the prediction's bag of tokens and that of the gold answer that it is nearest to. Two answers that
    have no tokens have F1 0, although they match exactly: so does MLQA's script."""
    predicted = collections.Counter(answer_tokens(prediction, language))
    best = 0.0
    for answer in answers:
        gold = collections.Counter(answer_tokens(answer, language))
        common = (predicted & gold).total()
        if common:
            precision, recall = common / predicted.total(), common / gold.total()
            best = max(best, 2 * precision * recall / (precision + recall))
    return best


LONGEST_ANSWER = 30  # pieces, as in BERT's and XTREME's code


def best_answers(logits, examples, longest=LONGEST_ANSWER):
    """The text of the best answer to each question: a list of str.

    The best is the highest sum of a start logit and an end logit, of two pieces of the context in the same window, the
    end not before the start and at most `longest` pieces in all, over all windows of the question.
    logits: (ids, 2). The answer is cut from the original context, without white space at its ends.
    """
    context = examples.spans[:, 0] >= 0
    start, end = np.where(context[:, None], logits, -np.inf).T
    window = np.repeat(np.arange(len(examples.lengths)), examples.lengths)
    best = np.full(len(start), -np.inf)  # of the answers that begin at each piece: the highest sum
    extra = np.zeros(len(start), np.int64)  # and how many pieces more it has
    for more in range(min(longest, len(start))):
        n = len(start) - more
        score = np.where(window[:n] == window[more:], start[:n] + end[more:], -np.inf)
        better = score > best[:n]
        best[:n][better] = score[better]
        extra[:n][better] = more
    texts = []
    bounds = examples.offsets[examples.first]
    for i, (text, _) in enumerate(examples.texts):
        first = bounds[i] + int(best[bounds[i] : bounds[i + 1]].argmax())
        begin, stop = examples.spans[first, 0], examples.spans[first + extra[first], 1]
        texts.append(text[max(begin, 0) : max(stop, 0)].strip())
    return texts


def scores_of_answers(logits, examples, language):
    """(questions, 2): F1 and exact match, 0 to 1, of the best answers by MLQA's rules.

    language: the context's, which the answer is in; of "en-de" (an English context and a German question) "en"."""
    language = language.partition("-")[0]
    pairs = [(text, gold) for text, (_, gold) in zip(best_answers(logits, examples), examples.texts)]
    scores = [(answer_f1(*pair, language), exact_match(*pair, language)) for pair in pairs]
    return np.array(scores, float).reshape(-1, 2)


answer_scores = Measure(
    scores_of_answers,
    lambda sums, n: {"f1": 100.0 * sums[..., 0] / n, "exact_match": 100.0 * sums[..., 1] / n},
)
MEASURES = {"xnli": accuracy, "qam": accuracy, "ner": entity_scores, "mlqa": answer_scores}


# --- from counts to the gap ----------------------------------------------------------------------------------


def count(model, sets, measure, tokens=4096):
    """{language: what each example counts, (examples, k)} of the model on {language: Examples}; see Measure.

    All languages are predicted as one set: a few large batches in place of many small ones, which on a GPU is most of
    the time that the gap takes."""
    joined = Examples.concat(list(sets.values()))
    logits = predict(model, joined, tokens)
    of_each_id = len(logits) == len(joined.ids)  # or of each window: these are fewer, for each has several ids
    ends = np.cumsum([len(part.ids if of_each_id else part.lengths) for part in sets.values()])
    return {
        language: measure.counts(of_set, examples, language)
        for (language, examples), of_set in zip(sets.items(), np.split(logits, ends[:-1]))
    }


def scored(counts, measure):
    """{name of a measure: {language: percent}} of what `count` found; `measure` is one of MEASURES."""
    measured = {}
    for language, of_examples in counts.items():
        for name, score in measure.of(of_examples).items():
            measured.setdefault(name, {})[language] = score
    return measured


def evaluate(model, sets, measure, tokens=4096):
    """{name of a measure: {language: percent}} of the model on {language: Examples}."""
    return scored(count(model, sets, measure, tokens), measure)


def report(measured, source=SOURCE):
    """What a result says of one set of languages: "scores", {language: percent} by the task's own measure, which is
    named in "measure"; the summary of them; and the other measures under their names."""
    own, *others = measured
    more = {name: measured[name] for name in others}
    return {"measure": own, "scores": measured[own], **more, **summary(measured[own], source)}


def summary(scores, source=SOURCE):
    """The paper's numbers of a {language: score}: "mean" over all languages, the source included; "source";
    "non_source", the mean over the others; "gap" = source - non_source (Section 1). Without others there is no gap.
    Of pairs "en-de", contexts and questions of question answering, the source is "en-en". Scores may be arrays."""
    source = source if source in scores else f"{source}-{source}"
    of_source = scores[source]
    others = [score for language, score in scores.items() if language != source]
    non_source = sum(others) / len(others) if others else None
    return {
        "mean": sum(scores.values()) / len(scores),
        "source": of_source,
        "non_source": non_source,
        "gap": of_source - non_source if others else None,
    }


# --- linear CKA ----------------------------------------------------------------------------------------------


def linear_cka(x, y):
    """Linear centred kernel alignment (Kornblith et al. 2019, Eq. 3 with linear kernels) of two representations of the
    same tokens, x (tokens, p) and y (tokens, q): ||y^T x||^2 / (||x^T x|| ||y^T y||) of the centred features, 0 to 1.

    Computed on p x q matrices in float64; nothing of the size tokens x tokens is made. NaN if one does not vary at all.
    """
    x, y = (z.double() - z.double().mean(0) for z in (x, y))
    return float((y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm()))


@torch.no_grad()
def similarity(model, reference, input_ids):
    """Linear CKA of each layer between the working model's encoder and the pre-trained one's, on the real tokens of a
    batch (Section 3.2 and Appendix D): [layer 0, ..., last layer]. Without dropout, in float32."""
    was_training = model.training
    model.eval()
    real = input_ids != PAD
    pairs = zip(model.roberta.states(input_ids), reference.states(input_ids))
    layers = [linear_cka(ours[real], theirs[real]) for ours, theirs in pairs]
    model.train(was_training)
    return layers[1:]  # the embeddings come first
