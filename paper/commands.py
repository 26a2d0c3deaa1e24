"""What each command does, and one line for whatever goes wrong in it."""

import errno
import sys

from data import InputError
from paper import fetch, grid, ranks, report, tables
from paper.run import start

DOES = {
    "run": start,
    "make": grid.make,
    "plan": grid.plan,
    "report": report.report,
    "table": tables.print_tables,
    "curves": tables.print_curves,
    "fetch": lambda args: fetch.fetch(args.what, args.data, args.out),
}
GOES_ON = "the same command goes on where it was"
# What to do about an error of the system, where that is known.
ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), f"make room there: nothing is lost, {GOES_ON}"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "its permissions forbid it: change them, or give another folder"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), f"raise the limit of open files (ulimit -n): {GOES_ON}"),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST, errno.EISDIR), "a file and a folder want one name: give another"),
    **dict.fromkeys((errno.EIO, errno.ESTALE, errno.ETIMEDOUT), f"see to the disk or its network: then {GOES_ON}"),
    errno.EROFS: "its file system is read-only: give a folder elsewhere",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ENOENT: "it was removed, or never there: see that it is there, and that nothing else removes files of a run",
    errno.ENOMEM: f"end other processes, or give a smaller --micro-batch: {GOES_ON}",
}  # fmt: skip


def do(command, args):
    """Does it, on all ranks; returns the exit status: 0, 2 for bad input, for a file that cannot be had and for a run
    that diverged, 130 for Ctrl-C. Whatever goes wrong is said in one line."""
    with ranks.joined():
        return status_of(command, args)


def status_of(command, args):
    try:
        return DOES[command](args) or 0
    except InputError as e:
        says = e
    except FloatingPointError as e:
        says = f"{e}; it has diverged: try another --out with a smaller --lr, or --precision fp32"
    except OSError as e:
        advice = ADVICE.get(e.errno)
        says = f"{e}; {advice}" if advice else e
    except ModuleNotFoundError as e:
        says = f"{e}; tables and figures need it: pip install -r requirements-figures.txt"
    except KeyboardInterrupt:
        print("\npaper: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    print("paper:", *str(says).splitlines(), file=sys.stderr)
    return 2
