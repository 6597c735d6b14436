"""Adam that shards its work and state over ranks, with cautious weight decay and exact bf16 masters."""
import torch
import torch.distributed as dist
from torch import Tensor


def adam_update_(p, low, g, m, v, lr, betas, correction, eps, decay, cautious: bool, ranks: int = 1):
    """One Adam step in place on p, m, v (n,) with decoupled decay: p <- p - u - decay p, where cautious decay leaves out
    weights that the update u does not shrink. g: (n,) gradient, summed over `ranks`; m, v: fp32 moments; correction: 1 -
    beta^t of both. low: lower halves of the fp32 master weights of a bf16 p, else None."""
    g = g.float() / ranks
    w = p if low is None else ((p.view(torch.int16).int() << 16) | (low.int() & 0xFFFF)).view(torch.float32)
    m.lerp_(g, 1 - betas[0])
    v.lerp_(g * g, 1 - betas[1])
    u = (m / correction[0]).div_((v / correction[1]).sqrt_().add_(eps)).mul_(lr)
    shrink = decay * w
    w.sub_(u).sub_(torch.where(u * shrink > 0, shrink, 0.0) if cautious else shrink)
    if low is not None:
        bits = w.view(torch.int32)
        low.copy_(bits.to(torch.int16))
        p.copy_((bits >> 16).to(torch.int16).view(torch.bfloat16))


class Adam(torch.optim.Optimizer):
    """Adam that averages gradients over ranks itself. A large parameter is sharded: its gradient is reduce-scattered, each
    rank updates an equal part and keeps the state of that part only, and the new values are all-gathered. All small
    parameters share one all-reduce and are updated everywhere. A parameter without gradient is left alone."""

    def __init__(self, groups, eps: float, cautious: bool, rank: int, world: int, compile: bool):
        super().__init__(groups, dict(lr=0.0, betas=(0.9, 0.99), weight_decay=0.0))
        self.eps, self.cautious, self.rank, self.world = eps, cautious, rank, world
        self.pending, self.gathers = None, []
        self.update = torch.compile(adam_update_, dynamic=False, fullgraph=True) if compile else adam_update_
        self.number = (lambda x: torch.tensor(x)) if compile else float  # a Python number would be compiled in
        for group in self.param_groups:
            for p in group["params"]:
                part = self.part(p)
                self.state[p] = dict(step=0, exp_avg=torch.zeros_like(part, dtype=torch.float32),
                                     exp_avg_sq=torch.zeros_like(part, dtype=torch.float32))
                if p.dtype == torch.bfloat16:
                    self.state[p]["low"] = torch.zeros_like(part, dtype=torch.int16)

    def sharded(self, p: Tensor) -> bool:
        return self.world > 1 and p.numel() % self.world == 0 and p.numel() >= 2**16

    def part(self, p: Tensor) -> Tensor:
        """Flat view of what this rank updates."""
        n = p.numel() // self.world
        return p.data.view(-1)[self.rank * n : (self.rank + 1) * n] if self.sharded(p) else p.data.view(-1)

    def start(self):
        """Launch the averaging of all gradients."""
        moving = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        small = [p for p in moving if not self.sharded(p)]
        self.pending = {}
        for p in moving:
            if self.sharded(p):
                mine = torch.empty_like(self.part(p))
                self.pending[p] = mine, reduce_scatter(mine, p.grad.view(-1))
        flat = torch.cat([p.grad.view(-1).float() for p in small]) if small else None
        work = dist.all_reduce(flat, async_op=True) if small and self.world > 1 else None
        for p, g in zip(small, flat.split([p.numel() for p in small]) if small else ()):
            self.pending[p] = (g, work)

    @torch.no_grad()
    def step(self):
        """Update my part of everything and launch the gathers; finish() waits for them."""
        if self.pending is None:
            self.start()
        for group in self.param_groups:
            for p in group["params"]:
                if p not in self.pending:
                    continue
                g, work = self.pending[p]
                if work is not None:
                    work.wait()
                state, part = self.state[p], self.part(p)
                state["step"] += 1
                correction = [self.number(1 - b ** state["step"]) for b in group["betas"]]
                self.update(part, state.get("low"), g, state["exp_avg"], state["exp_avg_sq"],
                            self.number(group["lr"]), group["betas"], correction, self.eps,
                            self.number(group["lr"] * group["weight_decay"]), self.cautious, self.world)
                if self.sharded(p):
                    self.gathers.append(all_gather(p.data.view(-1), part.clone()))
        self.pending = None

    def finish(self):
        """Wait until every parameter has its new values. Before that, nobody may read them."""
        for work in self.gathers:
            work.wait()
        self.gathers = []

    def full_state(self) -> list[dict]:
        """State of all parameters in order, whole on every rank; a collective."""
        result = []
        for group in self.param_groups:
            for p in group["params"]:
                result.append(dict(self.state[p]))
                for key in ("exp_avg", "exp_avg_sq", "low") if self.sharded(p) else ():
                    if key in self.state[p]:
                        whole = torch.empty(p.numel(), dtype=self.state[p][key].dtype, device=p.device)
                        mine = self.state[p][key].view(torch.uint8)  # as bytes: no backend gathers int16
                        all_gather(whole.view(torch.uint8), mine).wait()
                        result[-1][key] = whole
        return result

    def load_full_state(self, states: list[dict]):
        """Take this rank's part of what full_state returned, at any world size."""
        params = [p for group in self.param_groups for p in group["params"]]
        for p, whole in zip(params, states, strict=True):
            n = self.part(p).numel()
            begin = self.rank * n if self.sharded(p) else 0
            for key, value in whole.items():
                if key == "step":
                    self.state[p]["step"] = value
                else:
                    self.state[p][key].copy_(value[begin : begin + n])


def reduce_scatter(output: Tensor, whole: Tensor):
    call = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # renamed in torch 2.13
    return call(output, whole, async_op=True)


def all_gather(whole: Tensor, part: Tensor):
    call = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return call(whole, part, async_op=True)
