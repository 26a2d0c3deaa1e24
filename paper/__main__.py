"""The command line: `python -m paper run xnli --method slowfast --model models/xlm-roberta-base`, and so on."""

import os
import signal
import sys

SIGNALS = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C, and how a cluster stops a run


def leave(*_):
    """Ends the process while it still imports: there is nothing to be saved, and no library is asked what it makes of
    an exception in its midst."""
    if os.environ.get("RANK", "0") == "0":  # of several processes one says it
        os.write(2, b"\npaper: stopped before it began\n")
    os._exit(130)


if __name__ == "__main__":  # before the imports, which take seconds
    for number in SIGNALS:
        signal.signal(number, leave)

from paper import arguments  # noqa: E402


def main(argv=None):
    """Does what the command line says; returns the exit status (commands.do). A wrong command line ends the process
    with status 2."""
    command, args = arguments.parse(sys.argv[1:] if argv is None else argv)
    if wrong := arguments.misplaced(command, args):
        arguments.OneLineParser().error(wrong)
    try:
        # Not at the top, alone of all: it imports torch, for which what is wrong with the arguments does not wait.
        from paper import commands
    except ModuleNotFoundError as e:
        arguments.OneLineParser().error(f"{e}: take .venv/bin/python, or pip install -r requirements.txt")
    for number in SIGNALS:
        if signal.getsignal(number) is leave:
            signal.signal(number, signal.default_int_handler)
    return commands.do(command, args)


if __name__ == "__main__":
    sys.exit(main())
