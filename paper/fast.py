"""The same update, faster on CUDA: compiled kernels, and CUDA graphs in place of a thousand launches.

    update = Replay(capture=True)
    for done in slowfast.train(model, updates, loss, optimizer, scheduler, policies, update=update): ...

slowfast.update is what the method is; what is here gives its losses to rounding, and its K's. On one H200, XLM-R base
and XNLI's lengths, the plain update took 81 to 87 ms, in 1,216 launches of kernels of which the card was busy for 7 ms;
a trial of one graph an update took 8.2 ms, 6.8 with compiled layers.
"""

import sys

import torch

import slowfast
from data import InputError
from paper import ranks

MULTIPLE = 8  # a batch is padded to a multiple of this: an eighth of the graphs, for 7 % more tokens on XNLI


def update_for(options, model, optimizer, device):
    """The update that a run's options ask for: slowfast.update or one with its signature."""
    cuda = device.type == "cuda"
    whole = not options.micro_batch and ranks.WORLD == 1
    if options.replay and not whole:
        raise InputError("--replay does an update at once, in one process: leave it or --micro-batch or torchrun out")
    if (cuda if options.compile is None else options.compile) and compiles(device):
        compile_layers(model)
        optimizer.move = compiled_move()
    if whole and (cuda if options.replay is None else options.replay):
        return Replay(capture=cuda)
    return slowfast.update


# --- compiled kernels ----------------------------------------------------------------------------------------


def compiles(device):
    """Whether torch.compile works here: it needs a C compiler. Says in one line why not, if not."""
    torch._dynamo.reset()  # a process may do many runs: none inherits what another compiled
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception as e:  # whatever it is that it lacks, and each backend has its own error for it
        what = next((line for line in str(e).splitlines() if line.strip()), type(e).__name__)
        print(f"--compile: off, for nothing can be compiled here ({what})", file=sys.stderr)
        return False
    return True


def compile_layers(model):
    """Has each layer's passes over its activations (casts, dropout, GELU, LayerNorm, the gradients of biases) fused: of
    the 7 ms that an H200 is busy for, casts are 1.2 and biases 0.7. One compilation serves all layers and lengths; a
    last layer that makes a few rows alone does little, and is not worth another."""
    layers = model.roberta.encoder.layer
    for layer in layers if model.rows is None else layers[:-1]:
        layer.compile(dynamic=True)


def compiled_move():
    """slowfast.move as a few kernels that read and write each weight once: pass by pass it is 2.2 of the 7 ms."""
    fused = torch.compile(slowfast.move, dynamic=False, fullgraph=True)

    def move(parts, scalars):
        if not isinstance(scalars, torch.Tensor):  # (a number would be compiled in, and it is another each time)
            scalars = torch.tensor(scalars, device=parts[0][0][0].device)
        fused(parts, [row.unbind() for row in scalars])

    return move


# --- CUDA graphs ---------------------------------------------------------------------------------------------


class Replay:
    """slowfast.update with the launches of an update replayed: two CUDA graphs for each shape of a batch, one for the
    optimiser. An instance is for one model and its slowfast.Adam.

    capture: False does the same work on the same static buffers without graphs, on any device.

    The loss is read while the card is busy with the gradient. K and the rate, which follow from it, are then written
    where the optimiser's graph reads them: K(t) is exactly slowfast's, and the card never waits for Python.
    """

    def __init__(self, capture):
        self.capture = capture
        self.optimizer = None
        self.shapes = {}  # shapes of a batch -> Shape

    def __call__(self, model, batches, loss, optimizer, policies, clip=1.0):
        (batch,) = batches  # the whole update at once
        model.train()
        if self.optimizer is None:
            self.begin(optimizer)
        key = tuple(part.shape for part in batch if isinstance(part, torch.Tensor))
        if key not in self.shapes:
            self.shapes[key] = Shape(self, model, batch, loss, clip)
        policies.observe(self.shapes[key].gradient(batch))
        optimizer.step()
        return policies.curve.losses[-1]

    def begin(self, optimizer):
        """Gives each gradient the memory in which it stays: graphs know tensors by their address."""
        self.optimizer = optimizer
        self.params = [p for group in optimizer.param_groups for p in group["params"]]
        self.device = self.params[0].device
        for p in self.params:
            p.grad = torch.zeros_like(p)
        self.pool = torch.cuda.graph_pool_handle() if self.capture else None  # one graph's memory is the next one's too
        self.scalars = None
        self.plain_move, optimizer.move = optimizer.move, self.move

    def move(self, parts, scalars):
        """In place of slowfast.move: writes K and the rate where the graph reads them, and replays it."""
        if self.scalars is None:
            self.scalars = Fed(torch.tensor(scalars), self.device)
            self.moving = Stage(self, lambda: self.plain_move(parts, self.scalars.there))
        self.scalars.put(torch.tensor(scalars))
        self.moving()


class Stage:
    """Work on static buffers. The first time it is done as it is, which sets up what a capture cannot (and is all that
    happens to a shape that comes once, as an epoch's last batch); the second it is captured; then it is replayed.
    Random numbers are the same either way: a replay moves torch's generator on as the work itself does."""

    def __init__(self, replay, work):
        self.replay, self.work = replay, work
        self.calls, self.graph = 0, None

    def __call__(self):
        self.calls += 1
        if not self.replay.capture or self.calls == 1:
            return self.work()
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, pool=self.replay.pool):
                self.work()
        self.graph.replay()


class Shape:
    """The gradient of a batch of one shape."""

    def __init__(self, replay, model, batch, loss, clip):
        self.replay, self.model, self.loss, self.clip = replay, model, loss, clip
        self.batch = [Fed(torch.as_tensor(part), replay.device) for part in batch]
        self.read = torch.empty((), pin_memory=replay.device.type == "cuda")  # L_t, where Python reads it
        self.known = torch.cuda.Event() if replay.device.type == "cuda" else None
        self.forward, self.backward = Stage(replay, self.do_forward), Stage(replay, self.do_backward)

    def gradient(self, batch):
        """Leaves the clipped gradient in each parameter's .grad; returns L_t, a number."""
        for fed, part in zip(self.batch, batch):
            fed.put(torch.as_tensor(part))
        self.forward()
        self.read.copy_(self.L.detach(), non_blocking=True)
        if self.known:
            self.known.record()
        self.backward()
        if self.known:
            self.known.synchronize()  # with the forward pass alone
        return float(self.read)

    def do_forward(self):
        self.L = self.loss(self.model, [fed.there for fed in self.batch])

    def do_backward(self):
        params = self.replay.params
        with torch.no_grad():
            torch._foreach_copy_([p.grad for p in params], torch.autograd.grad(self.L, params))
        # Autograd remembers the stream of each weight for as long as a loss hangs on it, and a capture has another than
        # what was done before it: with such a loss left it fails.
        self.L = self.L.detach()
        if self.clip:
            torch.nn.utils.clip_grad_norm_(params, self.clip)


class Fed:
    """A tensor on the device that stays where it is, and is fed from the host without waiting for the device."""

    def __init__(self, part, device):
        self.here = torch.empty(part.shape, dtype=part.dtype, pin_memory=device.type == "cuda")
        self.there = torch.empty(part.shape, dtype=part.dtype, device=device)

    def put(self, part):
        # What was put before has been taken: Python has since waited for a loss that was computed after it.
        self.here.copy_(part)
        self.there.copy_(self.here, non_blocking=True)
