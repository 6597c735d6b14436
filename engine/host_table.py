"""A table of n-grams in host memory: each step gets the rows that it reads, and sends their gradients back.

    e_t = sum_n table[h_n(x_t, ..., x_{t-n+1})];   h_n: a hash of the last n tokens of the same document

A table of many million rows does not fit beside a model, but a step reads few of them. One thread beside the
training does all that concerns the table, job after job: it hashes the batches that the loader has made ahead
of the step, finds their distinct rows, copies these to the device, and moves rows by the gradients that come
back. Rows are read after the last update before their step and never earlier, so that a run is the one with
the same table on the device, to the last bit. (The idea is that of public proposals 360 and 366.)

Each of W ranks holds one W-th of the rows, in order. Ids, rows and gradients go to their owners and back by
all-to-all among the hosts, over a group that nothing else uses: at most one row for each token and order,
each way. Replicas would save half of that traffic, but take W times the memory and updates.

The rule is Adam by row, without momentum. Of each row that was read, with g its gradient:

    v <- b v + (1 - b) mean(g^2);   s <- b s + (1 - b);   w <- w - lr g / (sqrt(v / s) + eps)

Other rows stay as they are, moments included. A row comes up once in many steps, where a momentum would be of
another time; and v and s of a row instead of two numbers for each weight save two thirds of the memory.

Shapes: T tokens of a batch, d width of a row (of one head), U distinct rows of a step. On a GPU, copies are
pinned and on a stream of their own; that part is not measured.
"""
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.errors import UsageError
from data.loader import Batch
from engine.ranks import Hosts
from engine.lookup import table_gradient

MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio, odd


def hash_ngrams(tokens: Tensor, ids: Tensor, orders: tuple[int, ...], rows: int) -> Tensor:
    """Return (T, orders) row numbers of the n-grams that end at each token, one for each n in `orders`. ids:
    (T,) number of each token's document. What lies before it counts as one more token, 0."""
    tokens = tokens.cpu().numpy().astype(np.uint64) + np.uint64(1)
    ids = ids.cpu().numpy()
    code = np.zeros_like(tokens)
    columns = []
    for back in range(orders[-1]):
        token = np.zeros_like(tokens)
        left = max(len(tokens) - back, 0)
        token[back:] = np.where(ids[back:] == ids[:left], tokens[:left], 0)
        code = (code ^ token) * MULTIPLIER  # wraps around
        code ^= code >> np.uint64(32)
        if back + 1 in orders:
            columns.append(code % np.uint64(rows))
    return torch.from_numpy(np.stack(columns, 1).astype(np.int64))


def update_rows_(w: Tensor, state: Tensor, g: Tensor, lr: float, beta: float, eps: float) -> None:
    """Move rows w (n, d) by their gradients g (n, d), in place. state: (n, 2), v and s of each row."""
    squares = torch.stack([g.square().mean(1), torch.ones(len(g))], 1)
    state.lerp_(squares, 1 - beta)
    v, s = state.unbind(1)
    size = (v / s).sqrt_().add_(eps)
    w.sub_(g.div(size[:, None]).mul_(lr))


def row_bytes(cfg) -> int:
    """Return the bytes of host memory that a row takes, with its state."""
    return 4 * (cfg.head_dim + 2)


class Request(NamedTuple):
    """The distinct rows that some batches read, and those of this rank's shard that any rank reads."""
    batches: list[Batch]
    index: list[Tensor]  # of each batch: (T, orders), numbers among the distinct rows
    sent: list[int]  # distinct rows by owner
    asked: Tensor  # numbers within the shard, rank by rank
    received: list[int]  # how many of them by rank


class Fetched(NamedTuple):
    request: Request
    rows: Tensor  # (U, d), on the device
    event: torch.cuda.Event | None  # after which they are there


class HostTable:
    """The rows, and the thread that works on them.

    In a step: take(), embed() for each batch, backward(), step(). All ranks call the same methods in the same
    order. An error of the thread is raised by every method that waits for it from then on.
    """

    def __init__(self, cfg, device: torch.device, dtype: torch.dtype, rank=0, world=1, beta=0.0):
        self.cfg, self.device, self.dtype = cfg, device, dtype
        self.hosts, self.beta = Hosts(rank, world), beta
        self.shard = -(-cfg.ngram_rows // world)  # rows of a rank; the last ones may have fewer
        try:
            self.rows = torch.zeros(self.shard, cfg.head_dim)
            self.state = torch.zeros(self.shard, 2)
        except RuntimeError:
            wanted = self.shard * row_bytes(cfg) / 2**30
            raise UsageError(f"--ngram_rows: expected {wanted:.1f} GiB of host memory on each of {world} "
                             f"ranks, found less for {cfg.ngram_rows} rows; lower it") from None
        self.worker = ThreadPoolExecutor(1, "ngrams")
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.error = None  # the thread's first one
        self.forget()

    def forget(self):
        """Drop what is on its way, gradients included."""
        self.pending = []  # (numbers within the shard, gradients of these rows) since the last update
        self.asked = None  # future of the next step's request
        self.ahead = None  # future of the next step's rows
        self.current = self.leaf = None  # of this step: what was fetched, and its rows as autograd sees them

    # Called by the training thread

    def submit(self, function, *args) -> Future:
        """Queue a job of the thread. After an error it does no other: ranks would no longer agree."""
        def job():
            if self.error is not None:
                raise self.error
            try:
                with torch.no_grad():
                    return function(*args)
            except BaseException as error:
                self.error = error
                raise

        return self.worker.submit(job)

    def take(self, batches: list[Batch], upcoming: Future | None = None):
        """Wait for the rows of a step's batches. upcoming: the loader's future of the next step's batches,
        whose rows are looked for meanwhile."""
        found = self.ahead.result() if self.ahead is not None else None
        if found is None or found.request.batches is not batches:  # the first step, or the loader moved
            found = self.submit(self.fetch, batches).result()
        self.current = found
        self.leaf = self.arrived(found).requires_grad_()
        self.ahead = None
        self.asked = self.submit(self.ask_ahead, upcoming)

    def embed(self, i: int) -> Tensor:
        """Return the (T, d) embedding of the i-th batch taken."""
        return self.look_up(self.current.request.index[i], self.leaf)

    def step(self, lr: float | None):
        """Send the gradients back. lr: learning rate of an update by all that have come since the last one;
        None: no update is due, so that the next rows need not wait for these gradients."""
        if lr is None:
            self.ahead = self.submit(self.gather_ahead, self.asked)
        self.submit(self.collect, self.current.request, *self.to_host(self.leaf.grad), lr)
        if lr is not None:
            self.ahead = self.submit(self.gather_ahead, self.asked)
        self.leaf = None

    def read(self, batch: Batch | None) -> Tensor | None:
        """Return the (T, d) embedding of a batch, without gradient; None where only other ranks have one."""
        found = self.submit(self.fetch, [] if batch is None else [batch]).result()
        rows = self.arrived(found)
        return None if batch is None else self.look_up(found.request.index[0], rows)

    def read_alone(self, batch: Batch) -> Tensor:
        """Do read() on rank 0, while all others serve()."""
        self.submit(self.hosts.agree, True).result()
        return self.read(batch)

    def dismiss(self):
        """Say on rank 0 that no read_alone() follows."""
        self.submit(self.hosts.agree, False).result()

    def serve(self):
        """Answer rank 0's read_alone(), until its dismiss()."""
        while self.submit(self.hosts.agree, False).result():
            self.read(None)

    def full_state(self) -> dict[str, Tensor | None]:
        """Return the numbers of the rows that have ever moved, these rows and their state on rank 0, None for
        each elsewhere. All others are zero: three quarters of them after a run of track shakespeare."""
        rows, state = (self.submit(self.hosts.gather, shard).result() for shard in (self.rows, self.state))
        if rows is None:
            return {"moved": None, "rows": None, "state": None}
        moved = state[:, 1].nonzero()[:, 0]
        return {"moved": moved, "rows": rows[moved], "state": state[moved]}

    def load_full_state(self, state: dict[str, Tensor]):
        """Take this rank's shard of what full_state returned, at any world size."""
        self.reset()
        own = state["moved"] // self.shard == self.hosts.rank
        here = state["moved"][own] % self.shard
        self.rows[here] = state["rows"][own]
        self.state[here] = state["state"][own]

    def reset(self):
        """Begin anew, with zeros; also touches all memory, which the clock would see page by page."""
        self.submit(self.forget).result()
        self.rows.zero_()
        self.state.zero_()

    # Copies and lookups

    def arrived(self, found: Fetched) -> Tensor:
        if found.event is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(found.event)
            found.rows.record_stream(stream)
        return found.rows.detach()

    def look_up(self, index: Tensor, rows: Tensor) -> Tensor:
        return F.embedding(index.to(self.device, non_blocking=True), rows).sum(1)

    def to_host(self, grad: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        """Return a copy in host memory, and the event after which it is there. A CPU needs neither."""
        if self.copies is None:
            return grad, None
        self.copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.copies):
            host = torch.empty(grad.shape, dtype=grad.dtype, pin_memory=True)
            host.copy_(grad, non_blocking=True)
            grad.record_stream(self.copies)
            return host, self.copies.record_event()

    # Jobs of the thread

    def ask(self, batches: list[Batch]) -> Request:
        """Find the distinct rows of some batches, and tell their owners."""
        orders, rows = self.cfg.ngram_orders, self.cfg.ngram_rows
        hashed = [hash_ngrams(batch.inputs, batch.docs.ids, orders, rows) for batch in batches]
        none = torch.empty(0, len(orders), dtype=torch.int64)
        ids, index = torch.unique(torch.cat([none, *hashed]), return_inverse=True)  # sorted, so by owner

        sent = torch.bincount(ids // self.shard, minlength=self.hosts.world)
        one_each = [1] * self.hosts.world
        received = self.hosts.exchange(sent[:, None], one_each, one_each)[:, 0].tolist()
        sent = sent.tolist()
        asked = self.hosts.exchange(ids[:, None], sent, received)[:, 0] - self.hosts.rank * self.shard

        if self.copies is not None:
            with torch.cuda.stream(self.copies):  # on this device, whatever the thread's is
                index = index.pin_memory()
        return Request(batches, list(index.split(list(map(len, hashed)))), sent, asked, received)

    def gather(self, request: Request) -> Fetched:
        """Copy the rows of a request to the device."""
        mine = self.rows[request.asked].to(self.dtype)
        rows = self.hosts.exchange(mine, request.received, request.sent)
        if self.copies is None:
            return Fetched(request, rows, None)
        with torch.cuda.stream(self.copies):
            rows = rows.pin_memory().to(self.device, non_blocking=True)
            return Fetched(request, rows, self.copies.record_event())

    def fetch(self, batches: list[Batch]) -> Fetched:
        return self.gather(self.ask(batches))

    def ask_ahead(self, upcoming: Future | None) -> Request | None:
        """Ask for the rows of the loader's next batches. Its own errors it tells the trainer itself."""
        return self.ask(upcoming.result()[0]) if upcoming and not upcoming.exception() else None

    def gather_ahead(self, asked: Future) -> Fetched | None:
        request = asked.result()
        return None if request is None else self.gather(request)

    def collect(self, request: Request, grad: Tensor, event: torch.cuda.Event | None, lr: float | None):
        """Bring the gradients of rows to their owners, and move all rows with gradients if lr is given."""
        if event is not None:
            event.synchronize()
        self.pending.append((request.asked, self.hosts.exchange(grad, request.sent, request.received)))
        if lr is not None:
            self.move(lr)

    def move(self, lr: float):
        """Update the rows with gradients, which are added in the order of steps and ranks."""
        asked, gradients = map(torch.cat, zip(*self.pending))
        self.pending = []
        touched, place = torch.unique(asked, return_inverse=True)
        g = table_gradient(gradients.float(), place, len(touched)) / self.hosts.world
        rows, state = self.rows[touched], self.state[touched]
        update_rows_(rows, state, g, lr, self.beta, self.cfg.adam_eps)
        self.rows[touched] = rows
        self.state[touched] = state
