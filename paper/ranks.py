"""One run on several processes, its ranks: those that torchrun starts, a GPU each, on one machine or on many.

    torchrun --nproc_per_node=4 -m paper run xnli --method slowfast --model models/xlm-roberta-base

Each rank has the whole model. Of the windows of an update it trains its share, and the gradients are averaged: the
batch stays the paper's, the loss that K is made of is the mean over the ranks (slowfast.py sees to that), and so K and
the weights are the same on all. Rank 0 writes the run's directory and speaks; the others wait where they need what it
wrote. Nothing of a run says how many ranks it had: it goes on with any number.

All ranks must come by the same collective calls in the same order. So what can fail on one alone fails on all
(`together`, `first`), and all are stopped after the same update (`anyone`). Without torchrun there is one rank, and
each function here does the plain thing, without torch.distributed.
"""

import contextlib
import datetime
import gc
import math
import os
import signal

import numpy as np
import torch
import torch.distributed as dist

from data import InputError

# torchrun's environment
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))  # on this machine
PATIENCE = datetime.timedelta(hours=3)  # that the ranks have with one another: while the first tokenises, for one


@contextlib.contextmanager
def joined():
    """Inside, the ranks are one group, and those but the first are silent, unless they fail in a way of their own."""
    if WORLD == 1:
        yield
        return
    # gloo carries what is not on a GPU: losses, counts, messages
    on_gpus = torch.cuda.is_available() and dist.is_nccl_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo", timeout=PATIENCE)
    with contextlib.ExitStack() as silent:
        if RANK > 0:
            nowhere = silent.enter_context(open(os.devnull, "w", encoding="utf-8"))
            silent.enter_context(contextlib.redirect_stdout(nowhere))
            silent.enter_context(contextlib.redirect_stderr(nowhere))
        yield
    for number in (signal.SIGINT, signal.SIGTERM):  # torchrun sends them to who ends a little later than another
        signal.signal(number, signal.SIG_IGN)
    gc.collect()  # what is left of DistributedDataParallel would keep the group's threads beyond Python's end: an abort
    dist.destroy_process_group()


def own(device):
    """This rank's device: where all compute on GPUs, the one with its number."""
    if WORLD == 1 or device.type != "cuda":
        return device
    if device.index is not None:
        raise InputError(f"--device {device}: of several processes each has a GPU of its own; give --device cuda")
    if LOCAL_RANK >= torch.cuda.device_count():
        raise InputError(f"process {LOCAL_RANK + 1} of this machine, and it has {torch.cuda.device_count()} GPUs: give "
                         "torchrun as many --nproc_per_node, or --device cpu")  # fmt: skip
    torch.cuda.set_device(LOCAL_RANK)
    return torch.device("cuda", LOCAL_RANK)


# --- what the ranks tell each other --------------------------------------------------------------------------


def gathered(value):
    """[the value of rank 0, of rank 1, ...], on all of them."""
    if WORLD == 1:
        return [value]
    values = [None] * WORLD
    dist.all_gather_object(values, value)
    return values


def together(do, *args, here=True, **options):
    """do(*args), on all ranks or on those where it is to be done `here`. What one of them raises all raise, as far as
    it is of the kind that the command line says in one line."""
    if WORLD == 1:
        return do(*args, **options)
    result = error = None
    try:
        result = do(*args, **options) if here else None
    except (InputError, FloatingPointError, OSError, ModuleNotFoundError) as e:
        error = e
    for e in gathered(error):
        if e is not None:
            raise e
    return result


def first(do, *args, **options):
    """do(*args) on rank 0 alone, while the others wait. All have what it returns."""
    return gathered(together(do, *args, here=RANK == 0, **options))[0]


def in_turn(do, *args):
    """do(*args) on rank 0 and then on the others, which find what it has left: a cache."""
    results = [together(do, *args, here=turn) for turn in ([RANK == 0, RANK > 0] if WORLD > 1 else [True])]
    return results[RANK > 0]


@contextlib.contextmanager
def held(context):
    """Rank 0 is in this context while all are in here."""
    with contextlib.ExitStack() as stack:
        first(stack.enter_context, context)
        yield


def anyone(flag):
    """Whether it is true on any rank."""
    if WORLD == 1:
        return flag
    flags = torch.tensor(int(flag))
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)


# --- how they share a run's work -----------------------------------------------------------------------------


def share(windows):
    """(this rank's of an update's windows, what to multiply the number of the update's labels by): its loss counts
    WORLD times, for then all are averaged.

    The windows come sorted by length, so that the shares are about equally long. Who is left without one (an odd last
    batch) takes the first, and it counts nothing: all take part in the exchange of gradients.
    """
    mine = windows[RANK::WORLD]
    return (mine, 1 / WORLD) if len(mine) else (windows[:1], math.inf)


def averaging(model, updates):
    """(the model, the updates) as slowfast.train takes them: with the gradients averaged over the ranks, once an
    update. The parameters are `model`'s own."""
    if WORLD == 1:
        return model, updates
    gpus = [LOCAL_RANK] if next(model.parameters()).is_cuda else None
    model = torch.nn.parallel.DistributedDataParallel(model, device_ids=gpus, gradient_as_bucket_view=True)
    model.broadcast_buffers = False  # they (the embeddings that are not trained, above all) are the same and stay so
    return model, (_exchanged_after_the_last(model, parts) for parts in updates)


def _exchanged_after_the_last(model, parts):
    for n, part in enumerate(parts, 1):
        model.require_backward_grad_sync = n == len(parts)  # what DDP.no_sync() sets
        yield part


def draw_apart(seed, update):
    """From here on each rank draws its own random numbers (dropout); the first goes on with the run's."""
    if RANK > 0:
        torch.manual_seed(int(np.random.SeedSequence([seed, RANK, update]).generate_state(1)[0]))


def counted(count, model, sets, measure, tokens):
    """What eval.count finds on {language: Examples}, with the examples of each shared out: rank r takes every
    WORLD-th from the r-th on (where there is none for it, others that do not count)."""
    if WORLD == 1:
        return count(model, sets, measure, tokens)
    mine = {language: part.take(range(RANK % len(part), len(part), WORLD)) for language, part in sets.items()}
    shares = gathered(together(count, model, mine, measure, tokens))
    whole = {}
    for language, part in sets.items():
        counts = shares[0][language]
        whole[language] = np.empty((len(part), *counts.shape[1:]), counts.dtype)
        for rank in range(min(WORLD, len(part))):
            whole[language][rank::WORLD] = shares[rank][language]
    return whole
