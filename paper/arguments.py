"""The command line of `python -m paper`: its commands, their options, and what is wrong with them.

    command, args = parse(["make", "table6", "--model", "models/xlm-roberta-base"])    # or one line, and exit status 2

It needs the standard library alone: what is wrong is said at once, not after the import of torch. So the Makefile asks
it too, before anything is installed: python3 -m paper.arguments run xnli --method slow
"""

import os
import shlex
import sys

from paper import options
from paper.options import FIELDS, SEEDS, SETUPS, OneLineParser, folder

TASK_NAMES = {"xnli": "XNLI", "ner": "NER", "mlqa": "MLQA", "qam": "QAM"}  # in the paper's order
THREE = ("xnli", "mlqa", "ner")
# {table or figure: (title, the tasks that it is about)}
TARGETS = {
    "table1": ("Training, freezing or enlarging the rate of parts of the model", THREE),
    "table2": ("The method and its rivals, zero-shot (M = 0) and with M examples of each other language", THREE),
    "table3": ("Question-passage matching (QAM)", ("qam",)),
    "table4": ("Source and other languages", THREE),
    "table5": ("The constants c1, c2 and r", THREE),
    "table6": ("Starting parts of the first four layers anew", THREE),
    "table7": ("XNLI by language", ("xnli",)),
    "table8": ("Which weight sets the policies act on", THREE),
    "figure1": ("The gap on XNLI, and the loss", ("xnli",)),
    "figure2": ("Loss and gap while a model is fine-tuned directly", THREE),
    "figure3": ("One layer frozen or started anew", THREE),
    "figure4": ("Only the last layers trained", THREE),
    "figure5": ("The gap on MLQA and NER", ("mlqa", "ner")),
    "figure6": ("Similarity of each layer with the pre-trained model under df", THREE),
    "figure7": ("QAM: each language's score, and the gap", ("qam",)),
}
# What tables vary, and what it is where a row does not name it: all other settings of a run are its setup's.
VARIED = {name: FIELDS[name].default for name in ("method", "shots", "c1", "c2", "r")}
FETCHED = ("xnli", "mlqa", "ner", "qam", "xlm-roberta-base", "xlm-roberta-large")


# --- the options of each command -----------------------------------------------------------------------------


def options_of_make(parser):
    add = parser.add_argument
    add("targets", nargs="+", metavar="TARGET", choices=(*TARGETS, "tables", "figures"),
        help=f"{', '.join(TARGETS)}; tables; figures")  # fmt: skip
    add("--seeds", type=SEEDS, nargs="+", default=[1, 2, 3, 4], metavar="N", help="(default: 1 2 3 4)")
    add("--tasks", nargs="+", choices=TASK_NAMES, default=list(TASK_NAMES), help="these alone (default: all)")
    add("--setup", default="paper", choices=SETUPS, help="hyper-parameters (default: paper)")
    add("--model", type=folder, required=True, metavar="DIR", help="as of `run`")
    add("--data", type=folder, default="data", metavar="DIR", help="as of `run`")
    add("--runs", type=folder, default="runs", metavar="DIR", help="where runs lie (default: runs)")
    add("--keep", action="store_true", help="keep each run's weights (XLM-R base: 1.1 GB a run)")
    add("--args", default="", metavar="TEXT", help='further options of `run`, such as "--max-updates 1500"')
    add("--out", type=folder, default="report", metavar="DIR", help="where figures go (default: report)")


def options_of_report(parser):
    add = parser.add_argument
    add("runs", nargs="+", type=folder, help="folders of runs, searched for result.json")
    add("--out", type=folder, default="report", metavar="DIR",
        help="where report.md and its figures go (default: report)")  # fmt: skip
    add("--readme", metavar="FILE", help="the page is DIR/README.md; fill the marked blocks of this file too")


def options_of_table(parser):
    add = parser.add_argument
    options_of_curves(parser)
    add("--split", help="which sets: dev, test, xquad ... (default: all that the runs have)")
    add("--measure", help="exact_match, precision or recall (default: the task's own measure)")
    add("--by-language", action="store_true", help="languages as rows, methods as columns")
    add("--no-paper", action="store_true", help="without the paper's rows")


def options_of_curves(parser):
    add = parser.add_argument
    add("runs", nargs="+", type=folder, help="folders of runs, searched for result.json")
    add("--markdown", action="store_true", help="a Markdown table (default: for a terminal)")


def options_of_fetch(parser):
    add = parser.add_argument
    add("what", choices=(*FETCHED, "multilingual-e5-small"), help="a data set, or a pre-trained model")
    add("--data", type=folder, default="data", metavar="DIR", help="folder for a data set (default: data)")
    add("--out", type=folder, metavar="DIR", help="folder for a model (default: models/NAME)")


# command: (what it does, its options)
COMMANDS = {
    "make": ("run what tables and figures of the paper lack, then show them", options_of_make),
    "plan": ("how many runs they need, and how many are there", options_of_make),
    "report": ("one page with all that was run", options_of_report),
    "table": ("final scores of finished runs", options_of_table),
    "curves": ("loss, phase and gap by update", options_of_curves),
    "fetch": ("download a data set or a pre-trained model that is not there yet", options_of_fetch),
}


# --- what is wrong with them ---------------------------------------------------------------------------------


def parse(argv):
    """(command, its options) of a command line. A wrong one ends the process with one line and status 2."""
    if argv[:1] == ["run"]:  # its options have defaults that depend on the task and the setup
        return "run", options.parse(argv[1:])
    parser = OneLineParser(prog="python -m paper", description="The paper's runs, its tables and its figures.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("run", help="one run; `python -m paper run --help` explains its options")
    for name, (about, add_options) in COMMANDS.items():
        add_options(commands.add_parser(name, help=about, description=about))
    args = parser.parse_args(argv)
    if args.command in ("make", "plan"):
        check_targets(parser, args)
    return args.command, args


def check_targets(parser, args):
    """Of `make` and `plan`: tasks that a target is not about, and --args that no run takes."""
    for target in args.targets:
        _, tasks = TARGETS.get(target, ("", TASK_NAMES))
        if not set(tasks) & set(args.tasks):
            parser.error(f"{target} is about {', '.join(tasks)}: --tasks {' '.join(args.tasks)} leaves nothing of it")
    try:
        args.args = shlex.split(args.args)
    except ValueError as e:
        parser.error(f"--args {args.args}: {e}")
    shown = {task for target in args.targets for task in TARGETS.get(target, ("", TASK_NAMES))[1]}
    for task in args.tasks:
        if task in shown:
            options_of_run(args, task, VARIED | {"seed": args.seeds[0]})


def options_of_run(args, task, settings):
    """The Options of a run of `make`; one that --args changes what a target itself sets ends the process."""
    command = [task, "--setup", args.setup, "--model", args.model, "--data", args.data, "--runs", args.runs]
    command += [*(f"--{k}={v}" for k, v in settings.items()), *args.args, *([] if args.keep else ["--discard"])]
    run = options.parse(command)
    for name, value in (settings | {"out": None}).items():
        if getattr(run, name) != value:
            said = f"--args {shlex.join(args.args)}"
            OneLineParser().error(f"{said}: --{name} is what the tables and figures themselves set")
    return run


# command: the folders that it reads, and those that it writes
FOLDERS = {"run": (["model", "data"], ["out", "runs", "cache"]), "make": (["model", "data"], ["runs", "out"]),
           "plan": (["model"], ["runs"]), "fetch": ([], ["data", "out"]), "report": (["runs"], ["out"])}  # fmt: skip
HOW = {"model": "; `python -m paper fetch xlm-roberta-base` fetches one into models/xlm-roberta-base",
       "data": "; `python -m paper fetch TASK --data DIR` fetches the official files"}  # fmt: skip


def misplaced(command, args):
    """What is wrong with the folders that a command is given, or None."""
    read, written = FOLDERS.get(command, (["runs"], []))
    for name in read + written:
        given = getattr(args, name)
        for place in given if isinstance(given, list) else filter(None, [given]):
            what = place if isinstance(given, list) else f"--{name} {place}"
            if os.path.isfile(place):
                return f"{what} is a file: give {'the folder that it lies in' if name in read else 'a folder'}"
            if name in read and not os.path.isdir(place):
                return f"{what}: there is no such folder{HOW.get(name, '')}"
    return None


if __name__ == "__main__":
    parse(sys.argv[1:])
