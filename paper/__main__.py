"""The command line: `python -m paper run xnli --method slowfast --model models/xlm-roberta-base`, and so on."""

import signal
import sys

from data import InputError
from paper import fetch, grid, options, ranks, report, tables
from paper.options import OneLineParser
from paper.run import start


def options_of_fetch(parser):
    add = parser.add_argument
    add("what", choices=(*fetch.NAMES, "multilingual-e5-small"), help="a data set, or a pre-trained model")
    add("--data", default="data", metavar="DIR", help="folder for a data set (default: data)")
    add("--out", metavar="DIR", help="folder for a model (default: models/NAME)")


def do_fetch(args):
    fetch.fetch(args.what, args.data, args.out)


# command: (what it does, its options, what does it)
COMMANDS = {
    "make": ("run what tables and figures of the paper lack, then show them", grid.add_options, grid.make),
    "plan": ("how many runs they need, and how many are there", grid.add_options, grid.plan),
    "report": ("one page with all that was run", report.add_options, report.report),
    "table": ("final scores of finished runs", tables.options_of_table, tables.print_tables),
    "curves": ("loss, phase and gap by update", tables.options_of_curves, tables.print_curves),
    "fetch": ("download a data set or a pre-trained model that is not there yet", options_of_fetch, do_fetch),
}


def command(argv):
    """Does what the command line says; returns the exit status, None for 0."""
    if argv[:1] == ["run"]:  # its options have defaults that depend on the task and the setup
        return start(options.parse(argv[1:]))
    parser = OneLineParser(prog="python -m paper", description="The paper's runs, its tables and its figures.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("run", help="one run; `python -m paper run --help` explains its options")
    for name, (about, add_options, _) in COMMANDS.items():
        add_options(commands.add_parser(name, help=about, description=about))
    args = parser.parse_args(argv)
    return COMMANDS[args.command][-1](args)


def main(argv=None):
    """The command line; returns the exit status: 0, 2 for bad input, a full disk or a run that diverged, 130 for
    Ctrl-C. Whatever goes wrong is said in one line."""
    with ranks.joined():
        return status_of(sys.argv[1:] if argv is None else argv)


def status_of(argv):
    try:
        return command(argv) or 0
    except InputError as e:
        says = e
    except FloatingPointError as e:
        says = f"{e}; it has diverged: try another --out with a smaller --lr, or --precision fp32"
    except OSError as e:
        says = f"{e}; nothing is lost: the same command goes on where it was"
    except ModuleNotFoundError as e:
        says = f"{e}; tables and figures need it: pip install -r requirements-figures.txt"
    except KeyboardInterrupt:
        print("\npaper: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    print(f"paper: {says}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a run that a cluster stops ends as with Ctrl-C
    sys.exit(main())
