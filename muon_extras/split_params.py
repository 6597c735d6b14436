"""Which parameters of a model belong to Muon."""

from torch import Tensor, nn

HEADS = {"head", "lm_head", "classifier", "score"}  # names of output layers, wherever they are
ROUTERS = {"router", "gate", "gating"}  # a Linear of this name that narrows chooses experts
ENTRYWISE = "bias", "a_log"  # ends of the names of what is added or multiplied entry by entry, per expert too
POSITIONS = "pos_emb", "position", "pos_enc", "wpe"
CONV1D = nn.Conv1d, nn.ConvTranspose1d
HIDDEN_ASPECT = 8  # hidden matrices are seldom longer; tables and outputs that are bare parameters are


def split_params(model: nn.Module, verbose: bool = True) -> tuple[list[dict], list[tuple[str, Tensor]]]:
    """Propose (parameter groups for Muon, [(name, parameter)] for AdamW) and print the reasons.

    Muon gets matrices, banks and convolutions inside the network, weights of 1-D convolutions in a group of
    their own with flatten. AdamW gets the rest: scalars and vectors (also as a matrix with one row or column,
    or one row per expert), embeddings and positions, what shares its tensor with one, routers of experts, and
    outputs: a Linear called as in HEADS, and the last Linear of the model unless it lies in a list of blocks.
    Frozen parameters are left out. Look at the print-out: another network may call for another choice."""
    tables = {m.weight for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    conv1d = {m.weight for m in model.modules() if isinstance(m, CONV1D)}
    outputs = output_weights(model)
    routers = router_weights(model)
    hidden = []
    flat = []
    rest = []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        why = reason(name, p, tables, outputs, routers)
        note = why or ("flatten" if p in conv1d else doubt(p))
        kind = rest if why else flat if p in conv1d else hidden
        kind.append((name, p))
        if verbose:
            owner = "AdamW" if why else "Muon "
            print(f"{owner}  {name}  {tuple(p.shape)}  {note}".rstrip())
    groups = [dict(params=hidden, flatten=False), dict(params=flat, flatten=True)]
    return [group for group in groups if group["params"]], rest


def reason(name: str, p: Tensor, tables: set, outputs: set, routers: set) -> str:
    """Say why AdamW gets a parameter; nothing if Muon does."""
    lower = name.lower()
    if p.numel() == 0 or not p.is_floating_point():
        return "not real" if p.numel() else "empty"
    if p in tables or "embed" in lower:
        return "embedding"
    if any(position in lower for position in POSITIONS):
        return "positions"
    if p.ndim < 2 or max(p.shape) == p.numel():
        return "vector" if p.numel() > 1 else "scalar"
    if lower.endswith(ENTRYWISE):
        return "entry by entry"
    if p in routers:
        return "router"
    return "head" if p in outputs else ""


def doubt(p: Tensor) -> str:
    """Ask back about a matrix for Muon that looks like none of the hidden ones."""
    m, n = p.shape[-2:]
    long = p.ndim < 4 and max(m, n) > HIDDEN_ASPECT * min(m, n)
    return "very long: an embedding or an output? Then give it to AdamW" if long else ""


def output_weights(model: nn.Module) -> set[Tensor]:
    """Return the weights of Linear layers named as outputs, or the last one outside of all lists."""
    found = set()
    last = None
    lists = []  # names of lists of blocks seen so far
    for name, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            lists.append(name + ".")
        if isinstance(module, nn.Linear):
            last = name
            if name.rpartition(".")[2].lower() in HEADS or name == "fc":
                found.add(module.weight)
    if last is not None and not any(last.startswith(prefix) for prefix in lists):
        found.add(model.get_submodule(last).weight)
    return found


def router_weights(model: nn.Module) -> set[Tensor]:
    """Return what maps channels to the scores of experts: fewer of them than channels."""
    found = {p for name, p in model.named_parameters() if "router" in name.lower()}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if name.rpartition(".")[2].lower() in ROUTERS and isinstance(weight, Tensor) and weight.ndim == 2:
            outputs, inputs = weight.shape
            if outputs < inputs:
                found.add(weight)
    return found
