"""Adam that shards its work and state over ranks, with cautious weight decay and exact bf16 masters."""
import torch
import torch.distributed as dist
from torch import Tensor

from muon import all_gather_flat, join_halves, reduce_scatter_flat, upper_half

SHARD_FROM = 2**16  # elements; what is smaller travels with all other small ones in one all-reduce
PIECE = 2**22  # elements that an eager update moves at a time: it makes eight fp32 tensors of that size


def adam_update_(p, low, g, m, v, lr, betas, correction, eps, decay, cautious: bool, ranks: int = 1):
    """Take one Adam step in place on p, m, v (n,) with decoupled decay: p <- p - u - decay p.

    Cautious decay leaves out weights that the update u does not shrink. g: (n,) gradient, summed over
    `ranks`; m, v: fp32 moments; correction: 1 - beta^t of both; low: lower halves of the fp32 masters.
    """
    g = g.float() / ranks
    w = p if low is None else join_halves(p, low)

    m.lerp_(g, 1 - betas[0])
    v.lerp_(g * g, 1 - betas[1])
    u = (m / correction[0]).div_((v / correction[1]).sqrt_().add_(eps)).mul_(lr)
    shrink = decay * w
    if cautious:
        shrink = torch.where(u * shrink > 0, shrink, 0.0)
    w.sub_(u).sub_(shrink)

    if low is not None:
        p.copy_(upper_half(w, low))


def adam_update_in_pieces_(p, low, g, m, v, *settings):
    """Do what adam_update_ does, PIECE elements after the other."""
    for first in range(0, len(p), PIECE):
        piece = slice(first, first + PIECE)
        adam_update_(p[piece], None if low is None else low[piece], g[piece], m[piece], v[piece], *settings)


def is_sharded(p: Tensor, world: int) -> bool:
    """Return whether each of so many ranks moves a part of a parameter, and not all of it."""
    return world > 1 and p.numel() % world == 0 and p.numel() >= SHARD_FROM


class Adam(torch.optim.Optimizer):
    """Adam that averages gradients over ranks itself.

    A large parameter is sharded: its gradient is reduce-scattered, each rank updates an equal part and keeps
    the state of that part only, and the new values are all-gathered. All small parameters share one
    all-reduce and are updated everywhere. A parameter without gradient is left alone.
    """

    def __init__(self, groups, eps: float, cautious: bool, rank: int, world: int, compile: bool):
        super().__init__(groups, dict(lr=0.0, betas=(0.9, 0.99), weight_decay=0.0))
        self.eps = eps
        self.cautious = cautious
        self.rank = rank
        self.world = world
        self.pending = None  # parameter -> (its gradient summed over ranks, what to wait for)
        self.gathers = []
        if compile:  # a Python number would be compiled in, anew for every value
            self.update = torch.compile(adam_update_, dynamic=False, fullgraph=True)
            self.number = torch.tensor
        else:
            self.update = adam_update_in_pieces_
            self.number = float
        for p in self.params():
            self.state[p] = self.fresh_state(p)

    def params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def fresh_state(self, p: Tensor) -> dict:
        part = self.part(p)
        state = dict(step=0,
                     exp_avg=torch.zeros_like(part, dtype=torch.float32),
                     exp_avg_sq=torch.zeros_like(part, dtype=torch.float32))
        if p.dtype == torch.bfloat16:
            state["low"] = torch.zeros_like(part, dtype=torch.int16)
        return state

    def sharded(self, p: Tensor) -> bool:
        return is_sharded(p, self.world)

    def part(self, p: Tensor) -> Tensor:
        """Return a flat view of what this rank updates."""
        flat = p.data.view(-1)
        if not self.sharded(p):
            return flat
        n = p.numel() // self.world
        return flat[self.rank * n : (self.rank + 1) * n]

    def start(self):
        """Launch the averaging of all gradients."""
        moving = [p for p in self.params() if p.grad is not None]
        if self.world == 1:
            self.pending = {p: (p.grad.view(-1), None) for p in moving}
            return

        self.pending = {}
        for p in filter(self.sharded, moving):
            mine = torch.empty_like(self.part(p))
            work = reduce_scatter_flat(mine, p.grad.view(-1), async_op=True)
            self.pending[p] = mine, work

        small = [p for p in moving if not self.sharded(p)]
        if small:
            flat = torch.cat([p.grad.view(-1).float() for p in small])
            work = dist.all_reduce(flat, async_op=True)
            for p, g in zip(small, flat.split([p.numel() for p in small])):
                self.pending[p] = g, work

    @torch.no_grad()
    def step(self):
        """Update my part of everything and launch the gathers; finish() waits for them."""
        if self.pending is None:
            self.start()
        for group in self.param_groups:
            for p in group["params"]:
                if p in self.pending:
                    self.step_param(p, group)
        self.pending = None

    def step_param(self, p: Tensor, group: dict):
        g, work = self.pending[p]
        if work is not None:  # at one rank there is nothing to wait for
            work.wait()
        state, part = self.state[p], self.part(p)
        state["step"] += 1
        correction = [self.number(1 - beta ** state["step"]) for beta in group["betas"]]
        lr = self.number(group["lr"])
        decay = self.number(group["lr"] * group["weight_decay"])
        self.update(part, state.get("low"), g, state["exp_avg"], state["exp_avg_sq"], lr, group["betas"],
                    correction, self.eps, decay, self.cautious, self.world)
        if self.sharded(p):
            self.gathers.append(all_gather_flat(p.data.view(-1), part.clone(), async_op=True))

    def finish(self):
        """Wait until every parameter has its new values. Before that, nobody may read them."""
        for work in self.gathers:
            work.wait()
        self.gathers = []

    def full_state(self) -> list[dict]:
        """Return the state of all parameters in order, whole on every rank; a collective."""
        result = []
        for p in self.params():
            state = dict(self.state[p])
            if self.sharded(p):
                for key in [key for key in ("exp_avg", "exp_avg_sq", "low") if key in state]:
                    whole = torch.empty(p.numel(), dtype=state[key].dtype, device=p.device)
                    mine = state[key].view(torch.uint8)  # as bytes: no backend gathers int16
                    all_gather_flat(whole.view(torch.uint8), mine, async_op=True).wait()
                    state[key] = whole
            result.append(state)
        return result

    def load_full_state(self, states: list[dict]):
        """Take this rank's part of what full_state returned, at any world size."""
        for p, whole in zip(self.params(), states, strict=True):
            n = self.part(p).numel()
            begin = self.rank * n if self.sharded(p) else 0
            for key, value in whole.items():
                if key == "step":
                    self.state[p]["step"] = value
                else:
                    self.state[p][key].copy_(value[begin : begin + n])
