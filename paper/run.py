"""One run, from its options to its result.json.

A run is its directory: settings.json (what it is), log.jsonl (its curves), checkpoints (where it is), the best model in
Hugging Face's layout and, once it is finished, result.json. Update t is followed by what is due at t: a line of the
log, the gap, an evaluation. What is due is first measured and then recorded, in one go that nothing interrupts, so that
a checkpoint is always either before or after it: a run that was stopped ends like one that was not.

From top to bottom: a run while it trains, the loop around its updates, what is due after one, its start and its end.
folder.py has the files of its directory, progress.py what it shows.
"""

import copy
import dataclasses
import hashlib
import math
import os
import platform
import signal
import time
from pathlib import Path

import numpy as np
import torch

import data
import model as xlmr
import slowfast
from data import InputError, collate, epoch_batches
from eval import MEASURES, count, report, scored, similarity
from paper import fast, ranks, starts
from paper.finished import read_result
from paper.folder import (
    Taken,
    alone,
    best_model,
    drop_models,
    go_on,
    is_finished,
    save_checkpoint,
    tidy,
    write_counts,
    write_json,
    write_log,
)  # fmt: skip
from paper.progress import Progress, name_of_device, print_scores

try:
    import resource
except ImportError:  # Windows has none
    resource = None


class Run:
    """A run while it trains: the model and all that changes with it. `reference` is the pre-trained encoder that CKA
    compares with, or None."""

    def __init__(self, options, task, model, reference, device):
        o = self.options = options
        self.task, self.model, self.reference, self.device = task, model, reference, device
        self.out = o.directory
        self.lengths = task.train.lengths
        self.batches_per_epoch = math.ceil(len(self.lengths) / o.batch_size)
        self.total = min(o.epochs * self.batches_per_epoch, o.max_updates or math.inf)
        self.method = starts.policies_of(o.method)
        self.optimizer = slowfast.Adam(slowfast.param_groups(model), lr=o.lr)
        self.do_update = fast.update_for(o, model, self.optimizer, device)
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for p in self.trained.values():  # as Adam begins: so a checkpoint holds the same tensors from the first on
            self.optimizer.state[p] |= {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        self.schedule = slowfast.warmup_then_decay(self.total, o.warmup)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.schedule)
        try:
            self.policies = slowfast.SlowFast(
                self.optimizer, o.c1, o.c2, o.r, method=self.method, window=o.window, threshold=o.threshold,
                phase=o.phase, fraction=o.fraction, total_updates=self.total, policy4=o.policy4,
            )  # fmt: skip
        except ValueError as e:  # a model of few layers has none for some sets
            raise InputError(f"--method {o.method}: {e}") from e
        self.labelled = task.train.labelled  # of each window: pairs, tokens, or ends of answers
        self.gap_sets = fixed_part(task.dev, o.gap_examples)
        self.fixed = self.windows(0)  # what policy IV compares layers on, a function of the seed alone
        self.update = 0
        self.recorded = 0  # the update up to which all that was due is recorded
        self.best = None  # {"update", "model_sha256", "scores", ...}: the report of the dev sets of the best model
        self.dev_counts = {}  # of it: what eval.count found
        self.gap = self.lr = None
        self.losses = []  # since the last line of the log
        self.log_bytes = 0
        self.tokens, self.training_seconds = 0, 0.0
        self.began = time.monotonic()  # moved back by the time that earlier sessions took
        self.saved = time.monotonic()  # when the last checkpoint was written
        self.place, self.bests = 2, {}  # which of the two it is, and {which: the best model that it goes by}

    # what a checkpoint holds besides tensors, and of which type; those that are OPEN are None at first
    COUNTS = {"update": int, "recorded": int, "best": dict, "gap": float, "lr": float, "losses": list, "log_bytes": int,
              "tokens": int, "training_seconds": float, "seconds": float}  # fmt: skip
    OPEN = ("best", "gap", "lr")

    @property
    def seconds(self):
        return time.monotonic() - self.began

    @property
    def selected_by(self):
        """What the best model is best in: the mean over all languages' dev sets, or the source's (Appendix B)."""
        return "mean" if self.options.select == "all" else "source"

    def moments(self):
        """{name: tensor} of Adam's two moments of all weights that train."""
        kinds = ("exp_avg", "exp_avg_sq")
        return {f"{kind}.{name}": self.optimizer.state[p][kind] for kind in kinds for name, p in self.trained.items()}

    def check_finite(self):
        """Raises FloatingPointError where a weight or a moment is not finite: nothing is measured or kept of it."""
        tensors = self.trained | self.moments()
        # (tensors, 2); NaN is both the least and the greatest. On a CPU 60 ms of 650 MB; isfinite() takes two seconds.
        ends = torch.stack([torch.stack(t.detach().aminmax()) for t in tensors.values()])
        finite = ends.isfinite().all(1).tolist()
        if not all(finite):
            raise FloatingPointError(f"update {self.update}: {list(tensors)[finite.index(False)]} is not finite")

    def tensors(self):
        """{name: tensor} of the model's state, in which the word embeddings are whole, and of the moments."""
        return {f"model.{name}": w for name, w in self.model.state_dict().items()} | self.moments()

    def state_dict(self):
        """(tensors by name, all else as JSON has it) of what changes while a run trains."""
        dev = {f"dev.{language}": torch.from_numpy(counts) for language, counts in self.dev_counts.items()}
        return self.tensors() | dev, {
            "counts": {name: getattr(self, name) for name in self.COUNTS},
            "policies": self.policies.state_dict(),
            "steps": [self.optimizer.state[p]["step"] for p in self.trained.values()],
            "random": torch.get_rng_state().tolist(),
            "random_cuda": torch.cuda.get_rng_state(self.device).tolist() if self.device.type == "cuda" else None,
        }

    def check(self, state):
        """Raises InputError where the second part of a state_dict() cannot be this run's."""
        counts, policies, steps = state["counts"], state["policies"], state["steps"]
        t, best, window = counts["update"], counts["best"], self.policies.curve.window
        updates = [t, counts["recorded"], policies["updates"], policies["updates_in_first_phase"], *steps]
        losses = [*counts["losses"], *policies["losses"], *policies["similarities"]]
        types = counts.keys() == self.COUNTS.keys() and all(
            type(x) is self.COUNTS[name] or (x is None and name in self.OPEN) for name, x in counts.items()
        )
        fits = {
            "types": types and len(steps) == len(self.trained),
            "updates": all(type(n) is int and 0 <= n <= t for n in updates) and policies["updates"] == t <= self.total,
            "sums": types and min(counts[name] for name in ("log_bytes", "tokens", "training_seconds", "seconds")) >= 0,
            "losses": types and len(policies["losses"]) == min(t, 2 * window) and all(type(x) is float for x in losses),
            "best model": types and (best is None or (type(best["update"]) is int and 0 < best["update"] <= t
                                                      and type(best[self.selected_by]) is float)),
        }  # fmt: skip
        for what in (what for what, fit in fits.items() if not fit):
            raise InputError(f"its {what} cannot be this run's")

    def load_state_dict(self, tensors, state):
        """Goes on from a state_dict(), the second part of which is checked. Raises InputError where a tensor is missing
        or unknown, or of another type or shape, and has then changed nothing."""
        dev = {name[4:]: tensors.pop(name).clone().numpy() for name in [*tensors] if name.startswith("dev.")}
        there, here = ({name: f"{t.dtype} of {tuple(t.shape)}" for name, t in of.items()}
                       for of in (tensors, self.tensors()))  # fmt: skip
        for name, _ in sorted(there.items() ^ here.items()):
            raise InputError(f"{name} is {there.get(name, 'missing')}, this run's {here.get(name, 'missing')}")
        sets = self.task.dev if state["counts"]["best"] else {}
        if {x: len(counts) for x, counts in dev.items()} != {x: len(examples) for x, examples in sets.items()}:
            raise InputError("its best model was measured on other dev sets")
        counts = dict(state["counts"])
        self.began, self.dev_counts = time.monotonic() - counts.pop("seconds"), dev
        for name, value in counts.items():
            setattr(self, name, value)
        self.model.load_state_dict({name[6:]: w for name, w in tensors.items() if name.startswith("model.")})
        for name, moment in self.moments().items():
            moment.copy_(tensors[name])
        for p, step in zip(self.trained.values(), state["steps"]):
            self.optimizer.state[p]["step"] = step
        self.policies.load_state_dict(state["policies"])
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.schedule, self.update - 1)
        torch.set_rng_state(torch.tensor(state["random"], dtype=torch.uint8))
        if state["random_cuda"] and self.device.type == "cuda":
            torch.cuda.set_rng_state(torch.tensor(state["random_cuda"], dtype=torch.uint8), self.device)

    def windows(self, update):
        """The indices of the training windows of an update (counted from 0): a function of the seed alone, so that a
        run that goes on sees what it would have seen."""
        epoch, place = divmod(update, self.batches_per_epoch)
        if getattr(self, "epoch", None) != epoch:
            o = self.options
            self.epoch, self.batches = epoch, epoch_batches(self.lengths, o.batch_size, o.seed, epoch)
        return self.batches[place]

    def updates(self):
        """Yields this rank's micro-batches of each update that is still to be done: lists of (input_ids, labels, how
        many labels the whole update has, by the rank)."""
        while self.update < self.total:
            indices = self.windows(self.update)
            mine, times = ranks.share(indices)
            size = self.options.micro_batch or len(mine)
            multiple = 1 if self.do_update is slowfast.update else fast.MULTIPLE
            parts = [collate(self.task.train, mine[i : i + size], multiple) for i in range(0, len(mine), size)]
            labelled = max(int(self.labelled[indices].sum()), 1) * times
            yield [(*pair, torch.tensor(labelled)) for pair in parts]

    def loop(self):
        """The updates that are still to be done, as slowfast.train does them."""
        model, updates = ranks.averaging(self.model, self.updates())
        return slowfast.train(
            model, updates, self.loss, self.optimizer, self.scheduler, self.policies, self.options.clip, self.do_update
        )

    def loss(self, model, batch):
        """A micro-batch's part of the mean cross-entropy over the labels of an update."""
        input_ids, labels, labelled = (part.to(self.device, non_blocking=True) for part in batch)
        return self.model.loss(model(input_ids), labels) / labelled


# --- the loop around the updates -----------------------------------------------------------------------------


def fit(run, show):
    """Trains to the end, from wherever `run` is. Ctrl-C and SIGTERM leave a checkpoint, and KeyboardInterrupt."""
    loop = run.loop()
    with Whole() as whole:
        try:
            while True:
                due = due_at(run)
                if "checkpoint" in due or ("evaluation" in due and run.options.save_every is not None):
                    ranks.first(save_checkpoint, run)
                    run.saved = time.monotonic()
                if due - {"checkpoint"}:
                    found = measure(run, due, show)
                    with whole:
                        record(run, due, *found)
                    if "log" in due:
                        show(run, line=True)
                if run.update == run.total:
                    return
                with whole:
                    one_more(run, loop)
                show(run)
        except KeyboardInterrupt:
            ranks.first(save_checkpoint, run)
            raise


def one_more(run, loop):
    """Does an update and counts it."""
    began = time.perf_counter()
    done = next(loop)
    run.training_seconds += time.perf_counter() - began
    run.tokens += int(run.lengths[run.windows(run.update)].sum())
    run.update += 1
    run.lr = done.lr
    run.losses.append(done.loss)


class Whole:
    """While it is entered, Ctrl-C and SIGTERM raise KeyboardInterrupt, but never in the middle of a block that enters
    it again: they wait until that is done. One of several ranks waits until then in any case, and they all stop at
    the end of the same block, whichever of them was told to."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.depth, self.stop = 0, False

    def __enter__(self):
        if self.depth == 0:
            self.handlers = [signal.signal(number, self.handle) for number in self.SIGNALS]
        self.depth += 1
        return self

    def __exit__(self, error, *_):
        self.depth -= 1
        if self.depth == 0:
            for number, handler in zip(self.SIGNALS, self.handlers):
                signal.signal(number, handler)
        if error is None and ranks.anyone(self.stop):
            raise KeyboardInterrupt

    def handle(self, *_):
        if self.depth == 1 and ranks.WORLD == 1:
            raise KeyboardInterrupt
        self.stop = True


# --- what is due after an update -----------------------------------------------------------------------------


# By time and not by updates: a GPU does a thousand in 8 seconds, a CPU in half an hour, and XLM-R base's is 2 GB.
CHECKPOINT_SECONDS = 300


def due_at(run):
    """The names of what is due after the update that has just been done."""
    t, o = run.update, run.options
    if t == run.recorded:
        return set()
    every = {"log": o.log_every, "gap": o.gap_every, "similarity": o.cka_every, "evaluation": o.eval_every,
             "checkpoint": o.save_every}  # fmt: skip
    if o.policy4 == "auto" and reads_c2(run.method):
        every["policy4"] = 100
    if o.save_every is None and t % 20 == 0 and ranks.anyone(time.monotonic() - run.saved > CHECKPOINT_SECONDS):
        every["checkpoint"] = 20
    due = {what for what, n in every.items() if n and t % n == 0}
    if t == run.total:
        due |= {"log", "evaluation"} | ({"gap"} if o.gap_every else set())
    return due


def reads_c2(method):
    """Whether policy IV is part of a method."""
    return "c2" in [*method.P1.values(), *method.P2.values()]


def measure(run, due, show):
    """What is due, measured: (what the line of the log holds besides, (report of the dev sets, counts) or None)."""
    ranks.together(run.check_finite)
    entry, evaluation = {}, None
    if due & {"similarity", "policy4"}:
        entry["cka"] = ranks.first(similarity_of, run)
    if "gap" in due:
        found, _ = measured(run.options, run.model, run.gap_sets)
        entry |= {key: found[key] for key in ("scores", "mean", "source", "non_source", "gap")}
    if "evaluation" in due:
        show(run, "evaluating")
        evaluation = measured(run.options, run.model, run.task.dev)
    return entry, evaluation


def similarity_of(run):
    """CKA of each layer with the pre-trained model's, on the batch of the update that has just been done; with
    --policy4 auto always on the run's first batch: from batch to batch CKA differs more than from time to time."""
    windows = run.fixed if run.options.policy4 == "auto" else run.windows(run.update - 1)
    input_ids, _ = collate(run.task.train, windows)
    return similarity(run.model, run.reference, input_ids.to(run.device))


def measured(options, model, sets):
    """(what eval.report says of a model on {language: Examples}, what it is the sum of)."""
    measure = MEASURES[options.task]
    tokens = options.eval_tokens or (65536 if next(model.parameters()).is_cuda else 4096)
    counts = ranks.counted(count, model, sets, measure, tokens)
    return report(scored(counts, measure), options.source), counts


def record(run, due, entry, evaluation):
    """Takes what was measured into the run's state and files."""
    if "policy4" in due:
        run.policies.observe_similarity(sum(entry["cka"][-2:]) / 2)
    if "gap" in due:
        run.gap = entry["gap"]
    if "log" in due or entry:
        ranks.first(write_log, run, entry)
        run.losses.clear()
    if evaluation:
        found, counts = evaluation
        if run.best is None or found[run.selected_by] > run.best[run.selected_by]:
            best = {"update": run.update}
            run.best = best | {"model_sha256": ranks.first(keep_best, run, best), **found}
            run.dev_counts = counts
            ranks.first(drop_models, run)
    run.recorded = run.update


def keep_best(run, best):
    """Saves the model as the best; returns its SHA-256. The one that was the best stays as long as a checkpoint goes by
    it: what is trained again from there may be another, on a GPU or another number of processes."""
    folder = best_model(run.out, best)
    xlmr.save(run.model, folder, tokenizer=Path(run.options.model, "sentencepiece.bpe.model"))
    return xlmr.fingerprint(folder)


# --- from the start to the end -------------------------------------------------------------------------------


def start(options):
    """One run, from its options to its result.json; of a run that is finished, the test sets that it lacks."""
    bound_memory()
    device = ranks.together(choose_device, options.device)
    tokenizer, task = ranks.in_turn(load_task, options)
    options = ranks.first(resolved, options, task, device)
    out = options.directory
    if ranks.first(is_finished, out, options.settings):
        with ranks.held(alone(out)):
            ranks.first(tidy, out, options.discard)
            test_finished(options, task, device)
        return
    run = ranks.together(new_run, options, tokenizer, task, device)
    # From here on the directory is the run's (a start that failed before this has left nothing behind).
    ranks.first(out.mkdir, parents=True, exist_ok=True)
    with ranks.held(alone(out)):
        ranks.first(take, out, options.settings)
        ranks.together(go_on, run)
        if len(set(ranks.gathered(run.update))) > 1:
            raise InputError(f"{out}: the machines do not see the same checkpoint there; runs must lie in a folder "
                             "that they share")  # fmt: skip
        ranks.first(drop_models, run)
        ranks.draw_apart(options.seed, run.update)
        with Progress(run) as show:
            fit(run, show)
        finish(run)


def bound_memory():
    """For a process before its first update on a CPU: what is kept of matrix products and GELUs, by their shapes.

    oneDNN keeps the code of its last 1,024 primitives, a quarter of a megabyte a kernel, and torch's layer above
    it as many again. Few return, for the next batch has another length, and lying about the heap they split what is
    free. 24 are enough for a layer's. Question answering, hidden size 128, windows of 40 to 384, 100 updates in bf16:
    634 MB at the most, not 1,620, and 20.7 s of processor time, not 22.3. (In float32 with 8: 618 MB, not 840.)
    """
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(cache, "24")


def take(out, settings):
    """Makes a directory that is held alone a run's."""
    if is_finished(out, settings):
        raise Taken(f"{out}: another process has finished this run meanwhile")
    tidy(out)
    write_json(out / "settings.json", settings)


def load_task(options):
    """(tokeniser, the data's Task) that the options ask for."""
    tokenizer = data.Tokenizer(options.model)
    reading = {name: getattr(options, name) for name in ("max_length", "stride", "max_question", "source", "cache")}
    reading = {name: value for name, value in reading.items() if value is not None}
    languages = options.languages.split(",") if options.languages else None
    tests = [name for name in options.tests.split(",") if name]
    task = data.load(options.task, options.data, tokenizer, languages=languages, tests=tests, **reading)
    return tokenizer, task


def resolved(options, task, device):
    """The options with what they leave open: where the run lies, its languages, its precision, and the digests by which
    it knows its data and its model."""
    return dataclasses.replace(
        options,
        out=str(options.directory),
        languages=sorted(task.dev),
        precision=options.precision or fast_precision(device),
        data_sha256=digest_of([task.train, *task.dev.values()]),
        model_sha256=xlmr.fingerprint(options.model),
    )


def digest_of(parts):
    """The SHA-256, in hexadecimal, of all that there is of several Examples."""
    digest = hashlib.sha256()
    for part in parts:
        for values in part.arrays().values():
            digest.update(values.tobytes())
    return digest.hexdigest()


def choose_device(name):
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        device = ranks.own(device)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as e:
        raise InputError(f"--device {name}: {str(e).splitlines()[0]}") from e
    return device


def fast_precision(device):
    """bf16 where the device has instructions for it: elsewhere it is emulated, and slower than float32."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return "bf16" if has_bf16() else "fp32"


def new_run(options, tokenizer, task, device):
    """A Run before its first update. Draws `task`'s few-shot examples."""
    o = options
    task.train, task.dev = data.few_shot(task.train, task.dev, o.shots, o.seed, o.source)
    if o.dev_examples:
        task.dev = fixed_part(task.dev, o.dev_examples)

    torch.manual_seed(o.seed)
    dropout = {"hidden_dropout_prob": o.dropout, "attention_probs_dropout_prob": o.attention_dropout}
    dropout = {name: p for name, p in dropout.items() if p is not None}
    model = xlmr.load(o.model, task.labels, xlmr.HEADS[o.task], **dropout)
    model.precision = o.precision
    check_fit(o, model.config, tokenizer, task)
    similar = o.cka_every or o.policy4 == "auto"
    reference = copy.deepcopy(model.roberta).eval().to(device) if similar else None
    try:
        starts.start(o.method, model)
    except ValueError as e:
        raise InputError(f"--method {o.method}: {e}") from e
    model.roberta.train_rows(torch.from_numpy(task.train.ids).long().unique())
    return Run(o, task, model.to(device), reference, device)


def check_fit(options, config, tokenizer, task):
    """Raises InputError where a model has too few rows for the tokeniser's pieces or for the length of an example."""
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(f"the tokeniser has {tokenizer.vocab_size} pieces and the model a vocab_size of "
                         f"{config.vocab_size}: they do not belong together")  # fmt: skip
    sets = [task.train, *task.dev.values(), *(part for test in task.tests.values() for part in test.values())]
    longest = max(int(part.lengths.max()) for part in sets)
    room = config.max_position_embeddings - 2
    if longest > room:
        raise InputError(f"an example has {longest} pieces, the model positions for {room}: {shorter(options, room)}")


def shorter(o, room):
    """The options that make examples of at most `room` pieces."""
    given = {"max_length": room}
    if o.task == "mlqa" and room - 4 - o.max_question < o.stride:
        question = min(o.max_question, (room - 4) // 2)
        given |= {"max_question": question, "stride": min(o.stride, room - 4 - question)}
    if room < 5 or min(given.values()) < 1:
        return "no option makes them so short; take another model"
    return "give " + " ".join(f"--{name.replace('_', '-')} {n}" for name, n in given.items())


def fixed_part(dev, examples):
    """So many examples of each dev set, the same in every run: the gap is measured on them while a run trains."""
    return {
        language: part.take(np.sort(np.random.default_rng(0).permutation(len(part))[:examples]))
        for language, part in dev.items()
    }


def finish(run):
    """Tests the best model and writes result.json; from then on the run is finished."""
    folder = best_model(run.out, run.best)
    ranks.first(write_result, run, tested(run.options, run.task, run.device, folder, run.best))


def write_result(run, tests):
    o = run.options
    result = {
        "method": o.method, "seed": o.seed, "shots": o.shots, "settings": o.settings,
        "dev": run.best,
        "test": None,
        **tests,
        "best_update": run.best["update"],
        "updates": run.total,
        "updates_in_first_phase": run.policies.updates_in_first_phase,
        "tokens_per_second": round(run.tokens / run.training_seconds, 1),
        "peak_memory_bytes": peak_memory(run.device),
        "seconds": round(run.seconds, 1),
        "device": name_of_device(run.device),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }  # fmt: skip
    write_counts(run.out, "dev", run.dev_counts)
    write_json(run.out / "result.json", result)
    tidy(run.out, o.discard)
    print_scores(result)
    print(f"{run.out}: finished; {run.policies.updates_in_first_phase} of {run.total} updates were in P1")


def peak_memory(device):
    """The bytes of memory that this process has used at most: the GPU's, or else its own; None where nobody knows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def tested(options, task, device, folder, best):
    """{name of a test set: report} of the best model, which lies in `folder`, as far as the task has test sets."""
    out = options.directory
    if not task.tests:
        return {}
    if not folder.is_dir():
        raise InputError(f"{out}: its weights were not kept (--discard); remove it to run it again")
    if best.get("model_sha256") not in (None, ranks.first(xlmr.fingerprint, folder)):  # None: a run of long ago
        raise InputError(f"{folder}: not the model that was saved there; remove {out} to run it again")
    model = ranks.together(xlmr.load, folder, head=xlmr.HEADS[options.task]).to(device)
    model.precision = options.precision
    found = {}
    for name, sets in task.tests.items():
        said, counts = measured(options, model, sets)
        ranks.first(write_counts, out, name, counts)
        found[name] = {**said, "data_sha256": digest_of(sets.values())}
    return found


def test_finished(options, task, device):
    """Adds to the result of a finished run the test sets that it was not measured on yet."""
    out = options.directory
    result = read_result(out / "result.json")
    counted = {name for name in task.tests if (out / "examples" / f"{name}.npz").is_file()}
    task.tests = {name: sets for name, sets in task.tests.items() if not (result.get(name) and name in counted)}
    if task.tests:
        found = tested(options, task, device, out / "best", result["dev"])
        ranks.first(write_json, out / "result.json", result | found)
        print_scores({"method": options.method, "seed": options.seed, **found})
    print(f"{out}: this run is finished; its result is in result.json")
