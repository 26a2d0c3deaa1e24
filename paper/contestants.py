"""What `make bench` measures, each in a process of its own (bench.py starts them and compares what they say).

    ours               paper.run.Run, method slowfast: what `python -m paper run` does between two measurements
    trainer            Hugging Face's Trainer with its best options: bf16 where the device is fast at it, fused Adam,
                       batches of one length, on a GPU 4 processes that load them, no look at each loss
    trainer-compiled   the same with torch_compile
    xtreme             XTREME's recipe in the Trainer: padded to 128, float32

train with the same examples in the same batches. They are made up, with the lengths of XNLI's training pairs, and all
weights are random: neither matters to how long an update takes. Real tokens, without padding, are counted in the
batches that are timed. From top to bottom: examples and models, a process and its clock, the contestants, the parts.
"""

import copy
import functools
import json
import os
import re
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

import data
import model as xlmr
import slowfast
from data import collate
from eval import MEASURES
from paper import fast
from paper.folder import save_checkpoint
from paper.options import parse
from paper.run import Run, bound_memory, fast_precision, measure, measured, one_more, peak_memory

ROOT = Path(__file__).resolve().parent.parent
CONTESTANTS = ("ours", "trainer", "trainer-compiled", "xtreme")
BATCH, LONGEST = 32, 128


@dataclass
class Job:
    """What a process is to do, and on what."""

    do: str  # a name in JOBS
    model: str  # a name in SIZES, or a folder with a config.json
    device: str  # cpu or cuda
    batches: int  # of the training set: a round is one pass over it, or several
    updates: int  # of a round
    warm_up: int  # updates before the first round
    rounds: int
    dev: int  # pairs of each of 15 languages
    test: int


# --- the examples and the models -----------------------------------------------------------------------------

# Of MultiNLI's training pairs under XLM-R's tokeniser: 33 quantiles of their lengths, and how many of the vocabulary's
# pieces the first 90,047 of them hold.
QUANTILES = (6, 16, 19, 21, 23, 25, 27, 28, 30, 31, 33, 35, 36, 38, 39, 41, 42, 44, 45, 47, 49, 50, 52, 54, 56, 59, 61,
             64, 68, 72, 78, 89, 128)  # fmt: skip
PIECES = 24_330
SIZES = {
    "xlm-roberta-base": xlmr.Config(labels=data.NLI_LABELS),
    "multilingual-e5-small": xlmr.Config(
        hidden_size=384, intermediate_size=1536, layer_norm_eps=1e-12, labels=data.NLI_LABELS
    ),
}


def pieces_of(config):
    """The ids that examples are made of: the two special ones, and others spread over the vocabulary."""
    return np.unique(np.array([data.BOS, data.EOS, *np.linspace(4, config.vocab_size - 1, PIECES - 2)], np.int32))


def made_up(count, pieces, seed):
    """So many pairs with XNLI's lengths: Examples."""
    random = np.random.default_rng(seed)
    lengths = np.interp(random.random(count), np.linspace(0, 1, len(QUANTILES)), QUANTILES).round().astype(np.int64)
    offsets = np.concatenate([[0], lengths.cumsum()])
    ids = random.choice(pieces, offsets[-1])
    ids[offsets[:-1]], ids[offsets[1:] - 1] = data.BOS, data.EOS
    return data.Examples(ids, offsets, random.integers(0, len(data.NLI_LABELS), count))


def training_set(batches, pieces):
    """The examples of so many batches, chosen evenly, by length, from a pool of them (data.POOL). There being no more
    than a pool, our batches and those of the Trainer's sampler hold the same examples in every pass."""
    pool = made_up(data.POOL * BATCH, pieces, seed=0)
    of_pool = data.epoch_batches(pool.lengths, BATCH, 0, 0)
    of_pool.sort(key=lambda indices: pool.lengths[indices].max())
    chosen = ((np.arange(batches) + 0.5) * data.POOL / batches).astype(int)
    return pool.take(np.concatenate([of_pool[i] for i in chosen]))


def sets_of(pairs, pieces, seed):
    """So many pairs of each of 15 languages: {language: Examples}."""
    return {f"l{i}" if i else data.SOURCE: made_up(pairs, pieces, seed + i) for i in range(15)}


def config_of(job):
    return SIZES.get(job.model) or xlmr.read_config(Path(job.model, "config.json"), data.NLI_LABELS)


def our_model(job):
    torch.manual_seed(0)
    model = xlmr.SequenceClassifier(config_of(job))
    xlmr.initialise(model)
    model.precision = fast_precision(torch.device(job.device))
    return model


def their_model(job):
    from transformers import XLMRobertaConfig, XLMRobertaForSequenceClassification

    torch.manual_seed(0)
    sizes = asdict(config_of(job))
    return XLMRobertaForSequenceClassification(XLMRobertaConfig(num_labels=len(sizes.pop("labels")), **sizes))


# --- a process and its clock ---------------------------------------------------------------------------------


def main(argv):
    """Does a job, given as JSON: says on stdout, with a line of JSON, when its warm-up is done and what each round took
    that a line on stdin asked for. Ends when stdin does."""
    job = Job(**json.loads(argv[0]))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def say(found):
        print(json.dumps(found), file=answers, flush=True)
        if not sys.stdin.readline():
            raise SystemExit

    with tempfile.TemporaryDirectory() as folder:
        JOBS[job.do](job, Clock(job, say), folder)


class Clock:
    """Times the rounds of a job and counts their tokens. When one is over it says what it took, and waits."""

    def __init__(self, job, say):
        self.say, self.device = say, torch.device(job.device)
        self.size, self.later = job.warm_up, job.updates
        self.restart()

    def restart(self):
        self.updates = self.tokens = self.computed = 0  # computed: tokens and padding
        self.began = time.perf_counter()

    def update_done(self):
        self.updates += 1
        if self.updates == self.size:
            self.round_done()

    def round_done(self):
        wait_for(self.device)
        seconds = time.perf_counter() - self.began
        self.say({"updates": self.updates, "seconds": seconds, "tokens": self.tokens, "computed": self.computed,
                  "peak_memory_bytes": peak_memory(self.device)})  # fmt: skip
        self.size = self.later
        self.restart()


def wait_for(device):
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(function, device, repeats=1):
    """Seconds that a call takes on average."""
    wait_for(device)
    began = time.perf_counter()
    for _ in range(repeats):
        function()
    wait_for(device)
    return (time.perf_counter() - began) / repeats


# --- the contestants -----------------------------------------------------------------------------------------


def our_run(job, folder, reference=False):
    """A Run as paper.run.start makes it, of made-up examples. reference: with the encoder that CKA compares with."""
    bound_memory()
    device, model = torch.device(job.device), our_model(job)
    pieces = pieces_of(model.config)
    task = data.Task("xnli", data.NLI_LABELS, training_set(job.batches, pieces), sets_of(job.dev, pieces, 100), {})
    command = ["xnli", "--model", job.model, "--out", folder, "--precision", model.precision, "--epochs", "100000"]
    pretrained = copy.deepcopy(model.roberta).eval().to(device) if reference else None
    model.roberta.train_rows(torch.from_numpy(pieces).long())  # as many as XNLI's training set has
    return Run(parse(command), task, model.to(device), pretrained, device)


def train_ours(job, clock, folder):
    run = our_run(job, folder)
    updates = run.updates

    def counted():
        for parts in updates():
            clock.computed += sum(part[0].numel() for part in parts)  # of (input_ids, labels, ...)
            yield parts

    run.updates = counted
    loop = run.loop()
    while True:
        before = run.tokens
        one_more(run, loop)
        clock.tokens += run.tokens - before
        clock.update_done()


class Pairs:
    """Examples as a data set of the Trainer's."""

    def __init__(self, examples):
        self.examples = examples

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, i):
        begin, end = self.examples.offsets[i : i + 2]
        return {"input_ids": self.examples.ids[begin:end], "labels": int(self.examples.labels[i])}


def padded(items, multiple):
    """A batch for the Trainer, of items of Pairs: as long as the longest, and a multiple of `multiple`."""
    input_ids, labels = (list(values) for values in zip(*(item.values() for item in items)))
    input_ids, labels = collate(data.Examples.from_lists(input_ids, labels), np.arange(len(items)))
    input_ids = torch.nn.functional.pad(input_ids, (0, -input_ids.shape[1] % multiple), value=data.PAD)
    real = input_ids != data.PAD
    return {"input_ids": input_ids, "attention_mask": real.long(), "labels": labels, "tokens": int(real.sum())}


class Passes(torch.utils.data.Sampler):
    """Passes over a set, in the order that the Trainer's train_sampling_strategy "group_by_length" gives a large one:
    50 batches are sorted by length together. (Of fewer than 200 it would sort fewer together, and pad more.)"""

    def __init__(self, lengths, batch, passes):
        self.lengths, self.batch, self.passes = lengths.tolist(), batch, passes

    def __len__(self):
        return self.passes * len(self.lengths)

    def __iter__(self):
        from transformers.trainer_pt_utils import get_length_grouped_indices

        for _ in range(self.passes):
            yield from get_length_grouped_indices(self.lengths, self.batch, mega_batch_mult=50)


def their_options(job):
    """The Trainer's arguments beside those that all its contestants have."""
    if job.do == "xtreme":
        return {"optim": "adamw_torch"}
    cuda, bf16 = job.device == "cuda", fast_precision(torch.device(job.device)) == "bf16"
    return {
        "optim": "adamw_torch_fused", "bf16": bf16, "tf32": True if cuda and bf16 else None,
        "dataloader_num_workers": 4 if cuda else 0, "torch_compile": job.do == "trainer-compiled",
        "logging_nan_inf_filter": False,
    }  # fmt: skip


def their_trainer(job, clock, folder, **more):
    """A Trainer that counts the tokens of its batches."""
    from transformers import Trainer, TrainingArguments

    multiple = LONGEST if job.do == "xtreme" else 8 if job.device == "cuda" else 1
    model = their_model(job)
    examples = training_set(job.batches, pieces_of(model.config))

    class Counting(Trainer):
        def _get_train_sampler(self, *_):
            return Passes(examples.lengths, BATCH, 10_000)  # without end: bench.py says when it is enough

        def _get_eval_sampler(self, pairs):
            return Passes(pairs.examples.lengths, self.args.eval_batch_size, 1)

        def _prepare_inputs(self, inputs):
            clock.tokens += inputs.pop("tokens")
            clock.computed += inputs["input_ids"].numel()
            return super()._prepare_inputs(inputs)

    arguments = TrainingArguments(
        folder, per_device_train_batch_size=BATCH, per_device_eval_batch_size=128, num_train_epochs=1,
        learning_rate=5e-6, logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True,
        remove_unused_columns=False, use_cpu=job.device == "cpu", **their_options(job),
    )  # fmt: skip
    batch = functools.partial(padded, multiple=multiple)
    return Counting(model, arguments, data_collator=batch, train_dataset=Pairs(examples), **more)


def train_theirs(job, clock, folder):
    from transformers import TrainerCallback

    class Rounds(TrainerCallback):
        def on_step_end(self, *_, **__):
            clock.update_done()

    their_trainer(job, clock, folder, callbacks=[Rounds()]).train()


def evaluate_ours(job, clock, folder):
    """A round is XNLI's 15 test sets."""
    model = our_model(job).to(job.device)
    sets = sets_of(job.test, pieces_of(model.config), 200)
    options = parse(["xnli", "--model", job.model])
    while True:
        measured(options, model, sets)
        clock.round_done()


def evaluate_theirs(job, clock, folder):
    from transformers import PrinterCallback

    def accuracy(found):
        return {"accuracy": float((found.predictions.argmax(1) == found.label_ids).mean())}

    trainer = their_trainer(job, clock, folder, compute_metrics=accuracy)
    trainer.remove_callback(PrinterCallback)
    sets = sets_of(job.test, pieces_of(trainer.model.config), 200)
    while True:
        for examples in sets.values():
            trainer.evaluate(Pairs(examples))
        clock.round_done()


# --- the parts by themselves: each says once what it found ---------------------------------------------------


def products(job, clock, folder):
    """Seconds an update of ours that the matrix products of the layers would take alone: of the projections and the
    feed-forward, and of the gradients of their inputs and their weights."""
    c, device = config_of(job), torch.device(job.device)
    lengths = np.sort(training_set(job.batches, pieces_of(c)).lengths).reshape(-1, BATCH)[:, -1]  # (batches,)
    lengths += -lengths % (fast.MULTIPLE if device.type == "cuda" else 1)
    make = {"device": device, "dtype": torch.bfloat16 if fast_precision(device) == "bf16" else torch.float32}
    h, inner = c.hidden_size, c.intermediate_size
    shapes = [(3 * h, h), (h, h), (inner, h), (h, inner)] * (c.num_hidden_layers - 1)
    shapes += [(2 * h, h)]  # the last layer's keys and values; the rest of it is of `<s>` alone, and as good as nothing
    weights = [torch.randn(shape, **make) for shape in shapes]

    def seconds(length):
        ends = {size: torch.randn(BATCH * int(length), size, **make) for size in {h, 2 * h, 3 * h, inner}}

        def multiply():
            for w in weights:
                gradient, x = (ends[size] for size in w.shape)
                x @ w.T, gradient @ w, gradient.T @ x

        return timed(launched_once(multiply, device), device, repeats=10 if device.type == "cuda" else 1)

    clock.say({"seconds": statistics.fmean(map(seconds, lengths))})


def launched_once(function, device):
    """A function, called once; on CUDA its kernels as one graph: what the device takes, without the host."""
    function()
    if device.type != "cuda":
        return function
    wait_for(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def adam(job, clock, folder):
    """Seconds of a step of our Adam, the way that runs do it on the device, and of torch's two, on the same tensors:
    {name: [of each round]}."""
    device, model = torch.device(job.device), our_model(job)
    model.roberta.train_rows(torch.from_numpy(pieces_of(model.config)).long())
    groups = slowfast.param_groups(model.to(device))
    parameters = [p for group in groups for p in group["params"]]
    ours = slowfast.Adam(groups)
    update = fast.update_for(parse(["xnli", "--model", job.model]), model, ours, device)
    if update is not slowfast.update:
        update.begin(ours)
    for p in parameters:
        p.grad = torch.randn_like(p) if p.grad is None else p.grad.normal_()
    optimizers = {"ours": ours, "fused": torch.optim.Adam(parameters, 5e-6, fused=True),
                  "foreach": torch.optim.Adam(parameters, 5e-6, foreach=True)}  # fmt: skip
    found = {name: [] for name in optimizers}
    for n in range(2 + job.rounds):
        for name, optimizer in optimizers.items():
            seconds = timed(optimizer.step, device, repeats=20 if device.type == "cuda" else 2)
            found[name] += [seconds] if n >= 2 else []  # the first two make moments, and compile
    clock.say({"rounds": found})


def tokeniser(job, clock, folder):
    """Pieces a second, of the demo's sentence pairs."""
    known = [name for name in (job.model, ROOT / "models/xlm-roberta-base", ROOT / "models/multilingual-e5-small")
             if Path(name, "sentencepiece.bpe.model").is_file()]  # fmt: skip
    if not known:
        clock.say({"left_out": "there is no model's tokeniser (`make demo`, or `make xnli`, fetches one)"})
    tokenizer = data.Tokenizer(known[0])
    rows = [row for rows in data.read_xnli(ROOT / "demo/texts/XNLI-1.0/xnli.test.tsv").values() for row in rows]
    tokenize = functools.partial(data.tokenize_pairs, rows, tokenizer, LONGEST)
    pieces = len(tokenize().ids)
    clock.say({"pieces_per_second": pieces / timed(tokenize, torch.device("cpu"), repeats=5)})


def metrics(job, clock, folder, count=2000):
    """Examples a second, from logits to what each counts: sentences of NER of 20 words, questions about 100."""
    random, found = np.random.default_rng(0), {}
    tags = random.integers(0, len(data.NER_LABELS), count * 22)
    tags[::22] = tags[21::22] = data.IGNORED
    sentences = data.Examples(np.full(len(tags), 9), np.arange(0, len(tags) + 1, 22), tags)
    words = "the river runs through an old town and turns the wheels of its mills".split()
    text = " ".join(words[i] for i in random.integers(0, len(words), 100))
    spans = np.array([match.span() for match in re.finditer(r"\S+", text)] * count, np.int32)
    ids, offsets = np.full(len(spans), 9), np.arange(0, len(spans) + 1, 100)
    questions = data.Examples(ids, offsets, np.zeros((count, 2)), None, spans, [(text, [text[:20]])] * count)
    for task, examples, outputs in (("ner", sentences, len(data.NER_LABELS)), ("mlqa", questions, 2)):
        logits = random.standard_normal((len(examples.ids), outputs), np.float32)
        score = functools.partial(MEASURES[task].counts, logits, examples, "en")
        found[task] = count / timed(score, torch.device("cpu"))
    clock.say({"examples_per_second": found})


def measuring(job, clock, folder):
    """Seconds of what is due between the updates of a run, each once more after it was done once."""
    run, found = our_run(job, folder, reference=True), {}
    one_more(run, run.loop())
    parts = {
        **{what: functools.partial(measure, run, {what}, lambda *_: None)
           for what in ("evaluation", "gap", "similarity")},
        "checkpoint": functools.partial(save_checkpoint, run),
        "best model": functools.partial(xlmr.save, run.model, Path(folder, "best")),
    }  # fmt: skip
    for what, do in parts.items():
        do()
        found[what] = timed(do, run.device)
    clock.say({"seconds": found})


JOBS = {
    "ours": train_ours, "trainer": train_theirs, "trainer-compiled": train_theirs, "xtreme": train_theirs,
    "our evaluation": evaluate_ours, "their evaluation": evaluate_theirs,
    "products": products, "adam": adam, "tokeniser": tokeniser, "metrics": metrics, "measuring": measuring,
}  # fmt: skip

if __name__ == "__main__":
    main(sys.argv[1:])
