"""Muon, SGD or AdamW for the filters of a small convolutional network: the airbench of CIFAR-10.

    python examples/convnet.py                                      Fashion-MNIST, a minute on one CPU core
    python examples/convnet.py --optimizer=sgd --epochs=1.5         one of the others, trained longer
    python examples/convnet.py --data=cifar10 --width=full --batch_size=2000 --epochs=8 --shift=2 \\
        --lr=0.24 --momentum=0.6 --head_lr=0.67 --views=6           as airbench94_muon.py, meant for a GPU

Muon is used here as in a project of your own: the file is imported, the filters go to it, all else to another
optimizer. A filter of a convolution, (out, in, height, width), is the matrix (out, in height width) to it.

The network and its training are those of airbench94_muon.py in
https://github.com/KellerJordan/cifar10-airbench: a frozen whitening convolution, three groups of two
convolutions, the loss summed over a batch with label smoothing, the rate falling to zero on a straight line,
filters kept at a fixed norm under Muon. Left out: the early end of the training of the whitening's biases,
and decay. `--width=small` is for CPUs. bench/AIRBENCH.md has what was measured; the setting of airbench94 has
not been run on a GPU.

Legend: B images of a batch, C channels, H x W pixels.
"""
import math
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # as a script, Python looks for modules in examples/ only
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

# Idle OpenMP threads soon sleep: with two of them a step takes many times as long once another program works.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.errors import UsageError, run_program
from engine.settings import POSITIVE, SEED, ZERO_OR_MORE, Rule, between, one_of, setting
from engine.settings import check_rules, parse_settings
from examples.images import CLASSES, ImageSet, Labelled, load_images
from muon import Muon

WIDTHS = {"small": (16, 48, 64), "full": (64, 256, 256)}  # channels of the three groups
RATES = {  # optimizer -> its settings for Fashion-MNIST, `small`, as `bench.airbench` found them
    "muon": dict(lr=0.18, head_lr=0.18, momentum=0.85),
    "sgd": dict(lr=0.003, head_lr=0.18, momentum=0.85),
    "adamw": dict(lr=0.01, head_lr=0.01, momentum=0.6),
}
BIAS_SHARE = 0.08  # of head_lr, for biases: airbench's 0.053 / 0.67
LABEL_SMOOTHING = 0.2
TEST_BATCH = 1000
SMALLEST = 9  # pixels of a side that three halvings leave one of


@dataclass(frozen=True)
class AirbenchSettings:
    data: str = setting("fashion", "fashion, cifar10, or a folder with files as MNIST's")
    optimizer: str = setting("muon", "optimizer of the filters", one_of(*RATES))
    width: str = setting("small", "width of the network", one_of(*WIDTHS))
    epochs: float = setting(1.0, "passes over the training images; the rate ends at zero", POSITIVE)
    batch_size: int = setting(500, "images of a step", POSITIVE)
    lr: float = setting(0.0, "learning rate of the filters; 0: as in RATES", ZERO_OR_MORE)
    head_lr: float = setting(0.0, "learning rate of the head; 0: as in RATES", ZERO_OR_MORE)
    momentum: float = setting(0.0, "momentum of the filters, AdamW's first beta; 0: as in RATES",
                              between(0.0, 0.999))
    shift: int = setting(0, "pixels by which images move at random", between(0, 4))
    views: int = setting(1, "views of a test image: 1; 2 with its mirror image; 6 moved by a pixel, too",
                         Rule("1, 2 or 6", lambda x: x in (1, 2, 6)))
    seed: int = setting(0, "seed of the first run", SEED)
    seeds: int = setting(3, "runs, each with a seed of its own", POSITIVE)
    device: str = setting("", "such as cuda or cpu; nothing: a GPU where there is one")

    def __post_init__(self):
        check_rules(self)

    def rate(self, name: str) -> float:
        """Return lr, head_lr or momentum, as given or as tuned."""
        return getattr(self, name) or RATES[self.optimizer][name]


# ------------------------------------------------------------------------------------------------------------
# Network


class Convolution(nn.Conv2d):
    """A 3 x 3 convolution in the dtype of its input that starts as the identity on its first channels."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__(channels_in, channels_out, 3, padding=1, bias=False)
        with torch.no_grad():
            nn.init.dirac_(self.weight[:channels_in])

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight.to(x.dtype), padding=1)


class BatchNorm(nn.BatchNorm2d):
    """Batch normalization with a short memory, as the training is short, and with a bias but no gain."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-12, momentum=0.4)
        self.weight.requires_grad = False


class ConvGroup(nn.Sequential):
    """Two convolutions; the image is half as high and wide after the first."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__(
            Convolution(channels_in, channels_out),
            nn.MaxPool2d(2),
            BatchNorm(channels_out),
            nn.GELU(),
            Convolution(channels_out, channels_out),
            BatchNorm(channels_out),
            nn.GELU())


class AirbenchNet(nn.Module):
    """Maps images (B, C, H, W) to logits (B, 10)."""

    def __init__(self, widths: tuple[int, int, int], images: Tensor):
        """images: (B, C, H, W) float, of the training set, from which the whitening is computed."""
        super().__init__()
        whitened = 8 * images.size(1)
        self.whitening = nn.Conv2d(images.size(1), whitened, 2)
        self.whitening.weight.requires_grad = False
        channels = (whitened, *widths)
        self.groups = nn.Sequential(*(ConvGroup(*pair) for pair in zip(channels, widths)))
        self.head = nn.Linear(widths[-1], CLASSES, bias=False)
        with torch.no_grad():
            self.whitening.weight.copy_(whitening_filters(images))
            self.head.weight.div_(self.head.weight.std())

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.whitening.weight.to(x.dtype), self.whitening.bias.to(x.dtype))
        x = self.groups(F.gelu(x)).amax((2, 3)).float()
        return self.head(x) / x.size(1)


def whitening_filters(images: Tensor) -> Tensor:
    """Return (8 C, C, 2, 2) filters that make patches of 2 x 2 pixels uncorrelated, each with either sign."""
    C = images.size(1)
    patches = F.unfold(images, 2).transpose(1, 2).reshape(-1, 4 * C)
    values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    filters = (vectors / (values + 5e-4).sqrt()).T.reshape(-1, C, 2, 2)
    return torch.cat((filters, -filters))


# ------------------------------------------------------------------------------------------------------------
# Optimizers


def make_optimizers(net: AirbenchNet, cfg: AirbenchSettings) -> list[torch.optim.Optimizer]:
    """Return the optimizer of the filters and that of head and biases, with `base` rates in their groups."""
    filters = [p for p in net.groups.parameters() if p.ndim == 4]
    biases = [p for p in net.parameters() if p.ndim == 1 and p.requires_grad]
    lr, head_lr, momentum = map(cfg.rate, ("lr", "head_lr", "momentum"))
    rest = [dict(params=[net.head.weight], lr=head_lr),
            dict(params=biases, lr=BIAS_SHARE * head_lr)]

    if cfg.optimizer == "adamw":
        betas = momentum, 0.99
        optimizers = [torch.optim.AdamW(filters, lr=lr, betas=betas, weight_decay=0),
                      torch.optim.AdamW(rest, betas=betas, weight_decay=0)]
    else:
        optimizers = [torch.optim.SGD(rest, momentum=0.85, nesterov=True)]
        if cfg.optimizer == "muon":
            # Three steps and a steep slope at zero are enough here; more cost time and gain nothing upstream.
            filters_by = Muon(filters, lr=lr, momentum=momentum, ns_coefficients="jordan", ns_steps=3,
                              adjust_lr_fn="identity")
        else:
            filters_by = torch.optim.SGD(filters, lr=lr, momentum=momentum, nesterov=True)
        optimizers.insert(0, filters_by)

    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base"] = group["lr"]
    return optimizers


@torch.no_grad()
def fix_norms(filters: list[Tensor]) -> None:
    """Scale the filters of each layer to a mean square norm of 1: BatchNorm undoes their size, and the step
    that Muon takes is relative to it."""
    for p in filters:
        p.mul_(math.sqrt(len(p)) / p.norm())


# ------------------------------------------------------------------------------------------------------------
# Training


def device_of(name: str) -> torch.device:
    """Return a device on which tensors can be. Raises UsageError."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        found = str(error).partition("\n")[0]
        raise UsageError(f"--device: expected a device of this machine, such as cpu, found {name!r} "
                         f"({found}); choose another") from None


def standardized(images: ImageSet, device: str = "") -> ImageSet:
    """Return the images with mean 0 and variance 1 in the training set, on the device (default: a GPU where
    there is one), in bf16 with channels last: together six times as fast on a CPU as plain fp32."""
    place = device_of(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    height, width = images.train.images.shape[2:]
    if min(height, width) < SMALLEST:
        raise UsageError(f"--data: expected images of {SMALLEST} x {SMALLEST} pixels or more, found "
                         f"{height} x {width}; choose others")
    pixels = images.train.images.float()
    mean = pixels.mean((0, 2, 3), keepdim=True)
    std = pixels.std((0, 2, 3), keepdim=True).clamp(min=1e-3)

    def prepared(data: Labelled) -> Labelled:
        x = ((data.images - mean) / std).bfloat16()
        return Labelled(x.to(place, memory_format=torch.channels_last), data.labels.to(place))

    return ImageSet(*map(prepared, images))


class AirbenchRun:
    """One training and its test."""

    def __init__(self, cfg: AirbenchSettings, images: ImageSet, seed: int):
        """images: as `standardized` returns them."""
        self.cfg = cfg
        self.train_set, self.test_set = images
        self.device = self.train_set.images.device
        self.random = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        count = len(self.train_set.images)
        if count < cfg.batch_size:
            raise UsageError(f"--batch_size: expected at most the {count:,} training images, found "
                             f"{cfg.batch_size:,}; lower it")
        seen = self.train_set.images[:5000].float().cpu()
        self.net = AirbenchNet(WIDTHS[cfg.width], seen)
        self.net.to(self.device, memory_format=torch.channels_last)
        self.optimizers = make_optimizers(self.net, cfg)

    def batches(self):
        """Yield images and labels of every step; half of them are mirrored in even epochs, half in odd."""
        images, labels = self.train_set
        batch_size = self.cfg.batch_size
        mirrored = torch.rand(len(images), generator=self.random) < 0.5
        while True:
            order = torch.randperm(len(images), generator=self.random)
            for chosen in order.split(batch_size)[:len(images) // batch_size]:
                x = images[chosen]
                flip = mirrored[chosen].to(self.device)[:, None, None, None]
                x = torch.where(flip, x.flip(3), x)
                yield self.shifted(x), labels[chosen]
            mirrored = ~mirrored

    def shifted(self, x: Tensor) -> Tensor:
        """Return images (B, C, H, W) moved by up to `shift` pixels; what comes in is a reflection."""
        s = self.cfg.shift
        if not s:
            return x
        padded = F.pad(x, (s, s, s, s), "reflect")
        windows = padded.unfold(2, x.size(2), 1).unfold(3, x.size(3), 1)  # (B, C, places, places, H, W)
        row, column = torch.randint(2 * s + 1, (2, len(x)), generator=self.random).to(x.device)
        moved = windows[torch.arange(len(x), device=x.device), :, row, column]
        return moved.contiguous(memory_format=torch.channels_last)

    def train(self) -> None:
        """Train all steps. A loss that is not finite makes weights that are not; test() then says so."""
        cfg = self.cfg
        steps_per_epoch = len(self.train_set.images) // cfg.batch_size
        steps = max(1, round(cfg.epochs * steps_per_epoch))
        filters = self.optimizers[0].param_groups[0]["params"]
        self.net.train()
        for step, (x, labels) in zip(range(steps), self.batches()):
            loss = F.cross_entropy(self.net(x), labels, label_smoothing=LABEL_SMOOTHING, reduction="sum")
            loss.backward()
            if cfg.optimizer == "muon":
                fix_norms(filters)
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["base"] * (1 - step / steps)
                optimizer.step()
                optimizer.zero_grad()

    @torch.no_grad()
    def test(self) -> float:
        """Return the part of the test images whose class is the most likely one; 0 after a divergence."""
        self.net.eval()
        right = 0
        for x, labels in zip(*(part.split(TEST_BATCH) for part in self.test_set)):
            logits = sum(self.net(view) for view in self.views(x))
            hits = logits.argmax(1) == labels
            right += hits[logits.isfinite().all(1)].sum().item()
        return right / len(self.test_set.labels)

    def views(self, x: Tensor) -> list[Tensor]:
        """Return the test images as the network sees them, in the number of the setting; two views that are
        not moved weigh as much as four that are."""
        if self.cfg.views == 1:
            return [x]
        found = [x, x.flip(3)]
        if self.cfg.views == 6:
            padded = F.pad(x, (1, 1, 1, 1), "reflect")
            moved = [padded[:, :, :-2, :-2], padded[:, :, 2:, 2:]]
            found = 2 * found + [turned for view in moved for turned in (view, view.flip(3))]
        return found


def run_once(cfg: AirbenchSettings, images: ImageSet, seed: int) -> dict:
    """Train and test once. Return the settings with accuracy and seconds."""
    run = AirbenchRun(cfg, images, seed)
    started = time.perf_counter()
    run.train()
    accuracy = run.test()
    return dict(optimizer=cfg.optimizer, epochs=cfg.epochs, seed=seed, accuracy=accuracy,
                seconds=round(time.perf_counter() - started, 2))


def main(argv: list[str]) -> None:
    _, changes = parse_settings(AirbenchSettings, argv, __doc__, {})
    cfg = AirbenchSettings(**changes)
    images = standardized(load_images(cfg.data), cfg.device)
    accuracies = []
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        result = run_once(cfg, images, seed)
        accuracies.append(100 * result["accuracy"])
        print(f"{cfg.optimizer}, seed {seed}: {accuracies[-1]:.2f} % after {cfg.epochs:g} epochs, "
              f"{result['seconds']:.1f} s", flush=True)
    spread = f" ± {statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
    print(f"{cfg.optimizer}: {statistics.mean(accuracies):.2f}{spread} % (n = {len(accuracies)})")


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:], "convnet.py"))
