"""muon_extras: which parameters Muon gets and which AdamW, and why."""
import pytest
import torch
from torch import nn

from muon import Muon
from muon_extras.split_params import split_params


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)
        self.gain = nn.Parameter(torch.ones(()))
        self.gate = nn.Parameter(torch.ones(1, width))


class GPT(nn.Module):
    # As GPT-2 medium: as many positions as channels
    def __init__(self, tied, vocabulary=50, width=16, positions=16):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(positions, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(2)])
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.lm_head.weight = self.wte.weight


def names(routes):
    """Names that Muon and AdamW get."""
    return [[name for group in routes[0] for name, _ in group["params"]], [name for name, _ in routes[1]]]


HIDDEN = [f"blocks.{i}.{name}.weight" for i in range(2) for name in ("attention", "project", "up", "down")]


@pytest.mark.parametrize("tied, sizes", [
    (True, {}), (False, {}), (False, dict(vocabulary=64, width=64))])  # squares like the head
def test_of_a_gpt_muon_gets_the_hidden_matrices(tied, sizes):
    model = GPT(tied, **sizes)
    muon, adamw = split_params(model, verbose=False)
    assert names((muon, adamw))[0] == HIDDEN
    routed = [*muon[0]["params"], *adamw]
    assert len(routed) == len({p for _, p in routed}) == len(list(model.parameters())) and len(muon) == 1
    assert all(dict(model.named_parameters())[n] is p for n, p in routed)
    assert ("lm_head.weight" in names((muon, adamw))[1]) != tied
    Muon(muon), torch.optim.AdamW(adamw)  # both take what it returns


def test_the_routing_is_printed_with_its_reasons(capsys):
    model = GPT(True)
    for p in model.blocks[1].parameters():
        p.requires_grad = False
    model.wpe.weight.requires_grad = False
    assert names(split_params(model))[0] == HIDDEN[:4]  # what is frozen is left out
    assert capsys.readouterr().out.splitlines() == [
        "AdamW  wte.weight  (50, 16)  embedding",
        "AdamW  blocks.0.gain  ()  scalar",
        "AdamW  blocks.0.gate  (1, 16)  vector",
        "AdamW  blocks.0.norm.weight  (16,)  vector",
        "AdamW  blocks.0.norm.bias  (16,)  vector",
        "Muon   blocks.0.attention.weight  (48, 16)",
        "AdamW  blocks.0.attention.bias  (48,)  vector",
        "Muon   blocks.0.project.weight  (16, 16)",
        "AdamW  blocks.0.project.bias  (16,)  vector",
        "Muon   blocks.0.up.weight  (64, 16)",
        "Muon   blocks.0.down.weight  (16, 64)"]


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.router, self.bank = nn.Linear(8, 4, bias=False), nn.Parameter(torch.zeros(4, 8, 16))
        self.bank_bias, self.A_log = nn.Parameter(torch.zeros(4, 16)), nn.Parameter(torch.zeros(8, 4))
        self.gate = nn.Linear(8, 16, bias=False)  # of a GLU: it does not narrow
        self.scale = nn.Parameter(torch.ones(1))


def test_convolutions_and_banks_go_to_muon_and_routers_do_not(capsys):
    blocks = nn.ModuleList([nn.ModuleDict(dict(experts=Experts(), gate=nn.Linear(8, 4, bias=False)))])
    model = nn.ModuleDict(dict(
        first=nn.Conv2d(3, 8, 3), depthwise=nn.Conv2d(8, 8, 3, groups=8), norm=nn.BatchNorm2d(8),
        wave=nn.Conv1d(8, 4, 5), blocks=blocks, token_embedding=nn.Linear(9, 8, bias=False),
        bag=nn.EmbeddingBag(7, 8)))
    model.register_parameter("positions", nn.Parameter(torch.zeros(16, 8)))
    muon, adamw = split_params(model)
    whole = ["first.weight", "depthwise.weight", "blocks.0.experts.bank", "blocks.0.experts.gate.weight"]
    assert [(group["flatten"], [name for name, _ in group["params"]]) for group in muon] == [
        (False, whole), (True, ["wave.weight"])]
    printed = capsys.readouterr().out
    for line in ("positions  (16, 8)  positions", "blocks.0.experts.router.weight  (4, 8)  router",
                 "blocks.0.gate.weight  (4, 8)  router", "token_embedding.weight  (8, 9)  embedding",
                 "blocks.0.experts.bank_bias  (4, 16)  entry by entry",
                 "blocks.0.experts.A_log  (8, 4)  entry by entry"):
        assert f"AdamW  {line}" in printed
    assert "Muon   wave.weight  (4, 8, 5)  flatten" in printed
    p = model["wave"].weight  # one matrix (4, 40), not four of (8, 5)
    optimizer, before = Muon(muon, lr=1.0, ns_dtype=torch.float32), p.detach().clone()
    p.grad = torch.randn_like(p)
    optimizer.step()
    assert (torch.linalg.svdvals((p.detach() - before).flatten(1)) < 1.2).all()


@pytest.mark.parametrize("name", ["head", "score", "classifier", "fc", "to_out"])
def test_outputs_go_to_adamw_whatever_they_are_called(name, capsys):
    last = nn.ModuleDict(dict(fc=nn.Linear(6, 6, bias=False)))  # of a list of blocks: no output
    model = nn.ModuleDict(dict(inner=nn.Linear(6, 6, bias=False), body=nn.ModuleList([last])))
    model[name] = nn.Linear(6, 3, bias=False)
    assert names(split_params(model)) == [["inner.weight", "body.0.fc.weight"], [f"{name}.weight"]]
    assert f"AdamW  {name}.weight  (3, 6)  head" in capsys.readouterr().out


def test_a_bare_parameter_that_is_longer_than_hidden_ones_is_asked_about(capsys):
    model = Block(16)
    model.W_U = nn.Parameter(torch.ones(16, 200))
    assert "W_U" in names(split_params(model))[0]  # its name says nothing that is known
    asked = [line for line in capsys.readouterr().out.splitlines() if "embedding or an output?" in line]
    assert len(asked) == 1 and asked[0].startswith("Muon   W_U  (16, 200)  very long")
