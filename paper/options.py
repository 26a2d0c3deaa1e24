"""The options of a run: a dataclass whose fields say what they are for, and the command line that is made of it.

    options = parse(["xnli", "--method", "slowfast", "--model", "models/xlm-roberta-base"])
    options.lr                  # 5e-6, Appendix B's
    options.directory           # runs/paper/xnli/xlm-roberta-base/slowfast-seed1

An option that is not given has its value from the setup, for the task, or else the default of its field.
"""

import argparse
import os
import re
import sys
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path

from paper.methods import METHODS

# Appendix B's hyper-parameters, a row a task. Another setup is what it changes of them.
TASKS = {
    "xnli": {"lr": 5e-6, "batch_size": 32, "epochs": 10, "eval_every": 3000, "max_length": 128, "policy4": "on"},
    "mlqa": {"lr": 3e-5, "batch_size": 12, "epochs": 2, "eval_every": 3000, "max_length": 384, "policy4": "on",
             "stride": 128, "max_question": 64},
    "ner": {"lr": 5e-6, "batch_size": 32, "epochs": 20, "eval_every": 3000, "max_length": 128, "policy4": "off"},
    "qam": {"lr": 5e-6, "batch_size": 32, "epochs": 1, "eval_every": 3000, "max_length": 128, "policy4": "on"},
}  # fmt: skip
# `make demo`: a run takes 1 to 3 minutes on 2 CPU cores, so it is short and its updates are small. P1 and P2 need two
# full windows, so its windows are shorter than the paper's 100 updates.
DEMO = {"lr": 1e-4, "batch_size": 24, "max_updates": 140, "window": 15, "gap_every": 70, "gap_examples": 20,
        "cka_every": 0, "log_every": 20, "save_every": 0}  # fmt: skip
SETUPS = {
    "paper": {},
    # What a CPU can do: multilingual-e5-small on the official files. One evaluation, at the end: the dev sets of 40
    # languages take longer than all of the training.
    "small": {
        "xnli": {"lr": 5e-5, "max_updates": 1500},
        "mlqa": {"lr": 5e-5, "max_updates": 1720, "attention_dropout": 0.0, "eval_every": 0, "gap_every": 430,
                 "gap_examples": 50, "tests": "xquad,squad"},
        "ner": {"lr": 5e-5, "epochs": 1, "eval_every": 0, "dev_examples": 1000},
        "qam": {"lr": 5e-5, "source": "de", "languages": "de"},
    },
    # multilingual-e5-small on demo/texts. In question answering the loss falls all the way through so short a run: by
    # the loss rule it would never leave P1.
    "demo": {
        "xnli": DEMO,
        "ner": {**DEMO, "max_updates": 200, "window": 20},
        "mlqa": {**DEMO, "batch_size": 12, "max_updates": 60, "max_length": 192, "stride": 64,
                 "attention_dropout": 0.0, "phase": "fraction", "gap_every": 30, "gap_examples": 10},
        "qam": {**DEMO, "epochs": 2, "max_updates": 80, "window": 10},
    },
}  # fmt: skip

# What an option decides. Settings stand in a run's settings.json; the others may change from session to session.
RESULT = "what comes out of the run"
SEED = "which of the runs that are one row of a table"
PLACE = "where to find what the run knows by its content: a setting, but not compared"
WAY = "how, where and how often the run does things that do not change what comes out"
SETTINGS = (RESULT, SEED, PLACE)


def option(default, help, *, decides=RESULT, group=None, named=True, **more):
    """A field of Options. group: its heading in --help; named: whether it stands in the name of the run's directory
    where it is not the setup's; more: what argparse is to know."""
    metadata = {"help": help, "decides": decides, "group": group, "named": named, "more": more}
    return field(default=default, metadata=metadata)


# --- what an option may be -----------------------------------------------------------------------------------


def checked(pattern, what, read=str, holds=lambda value: True):
    """A type for argparse: a text that matches a pattern, and whose value holds; `what` says both in words. No other
    spelling is guessed at, of a number nan, 0x10, 1_000 or " 5"."""

    def parse_text(text):
        if re.fullmatch(pattern, text) and holds(value := read(text)):
            return value
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not {what}")

    parse_text.what = what
    return parse_text


def whole(least, most=10**9):
    what = f"a whole number from {least} to {most}"
    return checked("[0-9]{1,19}", what, int, lambda value: least <= value <= most)


def number(least, most, above=False):
    """above: more than `least`."""
    what = f"a number {'above' if above else 'from'} {least} to {most}"
    pattern = r"(?i)[+-]?([0-9]+\.?|[0-9]*\.[0-9]+)(e[+-]?[0-9]+)?"
    return checked(pattern, what, float, lambda value: least <= value <= most and not (above and value == least))


NAME = "[a-z][a-z0-9-]*"
folder = checked(r"(?s)(?=.*\S).+", "the name of a folder")
names = checked(rf"[\s,]*{NAME}([\s,]+{NAME})*[\s,]*", "a list of names such as en,de",
                lambda text: ",".join(dict.fromkeys(text.replace(",", " ").split())))  # fmt: skip
known = ", ".join(name for name in METHODS if "layer-" not in name)
known_method = checked(".*", f"a method; there are {known}, freeze-layer-i and reinit-layer-i, i from 0 to 23",
                       holds=METHODS.__contains__)  # fmt: skip
LONGEST = 8192  # pieces: XLM-R reads 512, its longest relatives this
SEEDS = whole(0, 2**32 - 1)
TESTS = {"mlqa": ("test", "xquad", "squad", "test-7x7", "dev-7x7")}  # of the other tasks "test" alone
POLICIES, TRAINING, MEASURING = "the policies", "training", "measuring"


@dataclass
class Options:
    """A run's options. Their order is that of settings.json and of the names of directories."""

    # fmt: off
    task: str = option(
        None, "xnli: sentence pairs, MultiNLI and XNLI; mlqa: questions, SQuAD and MLQA; ner: named entities, WikiAnn; "
        "qam: does a passage answer a question, XGLUE", named=False, choices=TASKS)
    method: str = option("slowfast", "one of those below (default: slowfast, the paper's)", named=False,
                         type=known_method, metavar="NAME")
    seed: int = option(1, "of the head, dropout, order and few-shot draw (paper: 4 seeds)", decides=SEED,
                       type=SEEDS, metavar="N")
    setup: str = option(
        "paper", "hyper-parameters that are not given: paper, Appendix B's; small, for multilingual-e5-small on a CPU; "
        "demo, for the demo's texts (default: paper)", decides=WAY, choices=SETUPS)
    model: str = option(None, "config.json, model.safetensors, sentencepiece.bpe.model of an XLM-R", decides=PLACE,
                        type=folder, required=True, metavar="DIR")
    data: str = option("data", "where the official archives are unpacked (default: data)", decides=PLACE, type=folder,
                       metavar="DIR")
    runs: str = option("runs", "where runs lie: DIR/SETUP/TASK/MODEL/METHOD-... (default: runs)", decides=WAY,
                       type=folder, metavar="DIR")
    out: str = option(None, "the run's own directory (default: below --runs, named by what the run is)", decides=WAY,
                      type=folder, metavar="DIR")
    cache: str = option("cache", "tokenised data is kept here (default: cache)", decides=WAY, type=folder,
                        metavar="DIR")
    languages: str = option(None, "such as en,de,zh (default: all that the data holds)", type=names, metavar="LIST")
    shots: int = option(0, "few-shot: examples of each other language (paper: 0, 5, 10, 20)", type=whole(0, 10**6),
                        metavar="M")
    select: str = option("all", "the best model by the mean of all dev sets, or by English, the source (paper: all)",
                         choices=["all", "en"])
    source: str = option("en", "train on this language, where the data have it, and measure the gap from it "
                         "(paper: en)", type=checked(NAME, "a language such as en"), metavar="LANG")

    c1: float = option(0.01, "K of policy I (paper: 0.01)", group=POLICIES, type=number(0, 1), metavar="K")
    c2: float = option(10.0, "K of policy IV (paper: 10)", group=POLICIES, type=number(1, 1000), metavar="K")
    r: float = option(3.0, "the power in R = max(1 - phi^r, 0) (paper: 3)", group=POLICIES,
                      type=number(0, 10, above=True), metavar="R")
    window: int = option(100, "updates a loss is averaged over for phi (paper: 100)", group=POLICIES,
                         type=whole(1, 10**6), metavar="N")
    threshold: float = option(0.1, "P1: the loss fell by more than this from window to window (paper: 0.1)",
                              group=POLICIES, type=number(0, 100), metavar="X")
    phase: str = option("loss", "P1 by the learning curve (Section 4.1) or as the first part of the run (2.2)",
                        group=POLICIES, choices=["loss", "fraction"])
    fraction: float = option(0.2, "with --phase fraction: this part of the updates (paper: 0.2)", group=POLICIES,
                             type=number(0, 1), metavar="F")
    policy4: str = option("on", "auto: only while the last two layers' CKA still drops (paper: on, off for NER)",
                          group=POLICIES, choices=["on", "off", "auto"])

    lr: float = option(None, "the rate at the end of the warm-up (paper: 5e-6; MLQA 3e-5; small models want 5e-5)",
                       group=TRAINING, type=number(0, 1), metavar="X")
    batch_size: int = option(None, "examples an update (paper: 32; MLQA 12)", group=TRAINING, type=whole(1, 10**5),
                             metavar="N")
    epochs: int = option(None, "passes over the training set (paper: XNLI 10, MLQA 2, NER 20, QAM 1)", group=TRAINING,
                         type=whole(1, 10**5), metavar="N")
    max_updates: int = option(None, "end after this many updates; warm-up and decay fit themselves to it",
                              group=TRAINING, type=whole(1), metavar="N")
    warmup: float = option(0.1, "the rate rises over this part of the updates (default: 0.1)", group=TRAINING,
                           type=number(0, 1), metavar="F")
    clip: float = option(1.0, "the gradient's norm is cut at this, 0 for never (default: 1)", group=TRAINING,
                         type=number(0, 10**6), metavar="X")
    dropout: float = option(None, "of hidden states (default: as the model's config.json says, 0.1)", group=TRAINING,
                            type=number(0, 0.99), metavar="P")
    attention_dropout: float = option(
        None, "of attention weights (default: as config.json says, 0.1); 0 is faster on a CPU", group=TRAINING,
        type=number(0, 0.99), metavar="P")
    max_length: int = option(None, "pieces the model reads at once (paper: 128; MLQA 384)", group=TRAINING,
                             type=whole(5, LONGEST), metavar="N")
    stride: int = option(None, "mlqa: pieces from window to window of a context that is longer (paper: 128)",
                         group=TRAINING, type=whole(1, LONGEST), metavar="N")
    max_question: int = option(None, "mlqa: pieces of a question (paper: 64)", group=TRAINING, type=whole(1, LONGEST),
                               metavar="N")
    micro_batch: int = option(
        None, "compute this many examples at a time, if memory is short (dropout is then drawn otherwise)",
        decides=WAY, group=TRAINING, type=whole(1, 10**5), metavar="N")
    device: str = option(None, "cpu, cuda, cuda:1 (default: cuda if there is one)", decides=WAY, group=TRAINING,
                        type=checked("cpu|cuda(:[0-9]{1,2})?", "a device: cpu, cuda or cuda:N"), metavar="NAME")
    precision: str = option(None, "of the matrix products (default: bf16 where the device is fast at it)", named=False,
                            group=TRAINING, choices=["bf16", "fp32"])
    replay: bool = option(
        None, "replay CUDA graphs instead of launching kernels one by one (default: on one GPU; on a CPU the same work "
        "without graphs)", decides=WAY, group=TRAINING, action=argparse.BooleanOptionalAction)
    compile: bool = option(
        None, "fuse the passes of layers and of Adam with torch.compile (default: on a GPU, if there is a C compiler)",
        decides=WAY, group=TRAINING, action=argparse.BooleanOptionalAction)

    eval_every: int = option(None, "updates between evaluations on the dev sets; there is one at the end (paper: 3000)",
                             group=MEASURING, type=whole(0), metavar="N")
    dev_examples: int = option(
        None, "dev examples a language that models are selected on (default: all; NER has up to 10,000)",
        group=MEASURING, type=whole(1), metavar="N")
    gap_every: int = option(100, "updates between measurements of the gap, 0 for none (paper: 100)", group=MEASURING,
                            type=whole(0), metavar="N")
    gap_examples: int = option(200, "dev examples a language that the gap is measured on (default: 200)",
                               group=MEASURING, type=whole(1), metavar="N")
    cka_every: int = option(
        100, "updates between measurements of each layer's CKA with the pre-trained model, 0 for none (paper: 100)",
        decides=WAY, group=MEASURING, type=whole(0), metavar="N")
    log_every: int = option(100, "updates between lines of log.jsonl (default: 100)", group=MEASURING, type=whole(1),
                            metavar="N")
    save_every: int = option(None, "updates between checkpoints, 0 for only where it stops (default: every 5 minutes)",
                             decides=WAY, group=MEASURING, type=whole(0), metavar="N")
    eval_tokens: int = option(None, "tokens in a batch of an evaluation (default: 4096, on a GPU 65536)", decides=WAY,
                              group=MEASURING, type=whole(1), metavar="N")
    tests: str = option(
        "test", "test sets at the end, and of a run that is finished (default: test; mlqa has xquad, squad, test-7x7 "
        "and dev-7x7 too)", decides=WAY, group=MEASURING, type=names, metavar="LIST")
    discard: bool = option(False, "remove the best model's weights once it is tested (XLM-R base: 1.1 GB a run)",
                           decides=WAY, group=MEASURING, action="store_true")

    # fmt: on
    # Not options, but settings all the same: what a run knows its data and its model by.
    data_sha256: str = field(default=None, metadata={"decides": RESULT, "named": False})
    model_sha256: str = field(default=None, metadata={"decides": RESULT, "named": False})

    @property
    def settings(self):
        """What settings.json holds: everything that decides what comes out of the run."""
        return {name: value for name, value in asdict(self).items() if decides(name) in SETTINGS}

    @property
    def directory(self):
        """Where the run lies: RUNS/SETUP/TASK/MODEL/METHOD-(what is not the setup's)-seedN, or as --out says."""
        if self.out:
            return Path(self.out)
        setups = parse([self.task, "--setup", self.setup, "--model", self.model])
        named = [f.name for f in fields(self) if f.metadata["decides"] == RESULT and f.metadata["named"]]
        values = ((name, getattr(self, name)) for name in named)
        differing = [f"{name}={value}" for name, value in values if value != getattr(setups, name)]
        name = "-".join([self.method, *differing, f"seed{self.seed}"])
        return Path(self.runs, self.setup, self.task, Path(os.path.abspath(self.model)).name, name)


FIELDS = {f.name: f for f in fields(Options)}


def decides(name):
    """What the setting of that name decides; one that there was once, or will be, counts as deciding the result."""
    return FIELDS[name].metadata["decides"] if name in FIELDS else RESULT


def differing(settings, others, kinds=(RESULT, SEED)):
    """The names of the settings that decide one of these things and are not the same in both."""
    names = sorted(settings | others)
    return [name for name in names if decides(name) in kinds and settings.get(name) != others.get(name)]


# --- the command line ----------------------------------------------------------------------------------------


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong with an option in one line."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self._negative_number_matcher = re.compile(r"-(\d|\.\d|inf|nan)", re.I)  # its own takes -1e-5 for an option

    def parse_known_args(self, args=None, namespace=None):
        for arg in args or ():
            if arg.startswith("--") and arg.endswith("=--"):  # of which some versions of argparse make []
                self.error(f"argument {arg[:-3]}: expected one argument")
        return super().parse_known_args(args, namespace)

    def error(self, message):
        if os.environ.get("RANK", "0") == "0":  # of the processes that torchrun starts one speaks
            print(f"paper: {' '.join(message.split())} (--help tells more)", file=sys.stderr)
        sys.exit(2)


def add_options(parser):
    """The options of a run, under their headings."""
    groups = {None: parser}
    for f in fields(Options):
        if "help" not in f.metadata:
            continue
        heading = f.metadata["group"]
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        flags = ["task"] if f.name == "task" else [f"--{f.name.replace('_', '-')}"]
        default = {} if f.name == "task" or f.default is MISSING else {"default": f.default}
        what = getattr(f.metadata["more"].get("type"), "what", "")
        about = f.metadata["help"] + (f": {what}" if "number" in what else "")
        groups[heading].add_argument(*flags, help=about, **default, **f.metadata["more"])
    groups[MEASURING].add_argument("--no-test", action="store_const", const="", dest="tests", help="no test sets")


def describe(parser):
    """Has --help explain the methods."""
    parser.description = "Fine-tunes a multilingual encoder on English and measures it in every language."
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    rows = [f"  {name:20} {row.about}" for name, row in METHODS.items() if "layer-" not in name]
    rows.append("  freeze-layer-i, reinit-layer-i: layer i does not train, starts anew (i from 0)")
    parser.epilog = "\n".join(["methods:", *rows])


def parse(argv=None):
    """The Options of a run from its command line. A wrong one ends the process with one line and status 2."""
    parser = OneLineParser(prog="python -m paper run")
    describe(parser)
    add_options(parser)
    given, _ = parser.parse_known_args(argv)
    parser.set_defaults(**TASKS[given.task] | SETUPS[given.setup].get(given.task, {}))
    options = Options(**vars(parser.parse_args(argv)))
    if wrong := clash(options):
        parser.error(wrong)
    return options


def clash(o):
    """What options say that does not go together, or None."""
    for name in ("stride", "max_question"):
        if name not in TASKS[o.task] and getattr(o, name) is not None:
            return f"--{name.replace('_', '-')} is an option of mlqa, not of {o.task}"
    known = TESTS.get(o.task, ("test",))
    for name in filter(None, o.tests.split(",")):
        if name not in known:
            return f"--tests {o.tests}: {o.task} has no test set {name!r}; there are {', '.join(known)}"
    if o.task == "mlqa" and o.source != "en":
        return f"--source {o.source}: question answering is trained on SQuAD, which is English"
    if o.shots and o.languages == o.source:
        return f"--shots {o.shots}: --languages {o.languages} has no other language to draw them from"
    if o.languages and o.source not in o.languages.split(","):
        return f"--languages {o.languages} lacks {o.source}, the source: the gap is measured from it"
    if o.task == "mlqa" and (room := o.max_length - 4 - o.max_question) < o.stride:
        what = f"{max(room, 0)} pieces for the context beside a question of --max-question {o.max_question}"
        return (
            f"--max-length {o.max_length} leaves {what}, fewer than the --stride {o.stride}: some would never be seen"
        )
    return None
