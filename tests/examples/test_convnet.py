"""The network and the three optimizers on made-up images, and on the real ones where they are at hand."""
import re

import pytest
import torch

from data.errors import UsageError
from examples import convnet
from examples.convnet import AirbenchRun, AirbenchSettings
from examples.convnet import fix_norms, run_once, standardized, whitening_filters
from examples.images import DEBIAN, ImageSet, Labelled, load_images
from muon import Muon, orthogonalize
from tests.helpers.pictures import made_up, patterns, write_mnist


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return standardized(made_up(tmp_path_factory.mktemp("pictures")))


def settings(**changes) -> AirbenchSettings:
    return AirbenchSettings(**dict(batch_size=50, epochs=2.0) | changes)


@pytest.mark.parametrize("optimizer", ["muon", "sgd", "adamw"])
def test_each_optimizer_learns_ten_patterns_and_the_program_says_so(tmp_path, capsys, optimizer):
    convnet.main([f"--data={write_mnist(tmp_path)}", "--batch_size=50", "--seeds=2", "--epochs=2",
                   f"--optimizer={optimizer}"])
    out = capsys.readouterr().out
    seeds = re.findall(rf"^{optimizer}, seed [01]: (\d+\.\d\d) % after 2 epochs, \d+\.\d s$", out, re.M)
    assert len(seeds) == 2 and min(map(float, seeds)) > 50  # 10 is guessing
    assert re.search(rf"^{optimizer}: \d+\.\d\d ± \d+\.\d\d % \(n = 2\)$", out, re.M)
    convnet.main([f"--data={tmp_path}", "--batch_size=50", "--seeds=1", "--optimizer=sgd", "--lr=1e30"])
    assert capsys.readouterr().out.endswith("sgd: 0.00 % (n = 1)\n")  # a divergence is a result


def test_a_run_follows_from_its_seed(pictures):
    weights = []
    for seed in (3, 3, 4):
        run = AirbenchRun(settings(shift=2, epochs=0.5), pictures, seed)
        run.train()
        weights.append(run.net.head.weight.detach())
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_muon_gets_the_filters_flat_and_nothing_else(pictures):
    run = AirbenchRun(settings(lr=0.5, momentum=0.6), pictures, 0)
    muon, rest = run.optimizers
    filters = muon.param_groups[0]["params"]
    assert isinstance(muon, Muon) and [tuple(p.shape[1:]) for p in filters[:2]] == [(8, 3, 3), (16, 3, 3)]
    owned = [p for optimizer in run.optimizers for group in optimizer.param_groups for p in group["params"]]
    assert len(owned) == len(set(owned))
    assert set(owned) == {p for p in run.net.parameters() if p.requires_grad}

    p = filters[3]
    before = p.detach().clone()
    p.grad = torch.randn_like(p)
    muon.step()
    expected = before.flatten(1) - 0.5 * orthogonalize(p.grad.flatten(1), 3, "jordan").float()
    assert torch.allclose(p.flatten(1), expected, atol=5e-3)  # 0.5 of a rounding of bf16


def test_the_filters_keep_their_norm_under_muon_alone(pictures):
    layers = [torch.randn(6, 2, 3, 3), torch.randn(4, 6, 3, 3)]
    fix_norms(layers)
    assert [round(p.norm().item() ** 2, 3) for p in layers] == [6, 4]
    run = AirbenchRun(settings(lr=1e-9), pictures, 0)
    run.train()
    for p in run.optimizers[0].param_groups[0]["params"]:
        assert p.norm().item() ** 2 == pytest.approx(len(p), rel=1e-3)


def test_whitened_patches_are_uncorrelated():
    torch.manual_seed(0)
    images = torch.nn.functional.avg_pool2d(torch.randn(64, 3, 30, 30), 3, 1)
    filters = whitening_filters(images)
    assert filters.shape == (24, 3, 2, 2) and torch.equal(filters[:12], -filters[12:])
    found = torch.nn.functional.conv2d(images, filters[:12]).transpose(0, 1).flatten(1)
    covariance = found @ found.T / found.size(1)
    values = covariance.diagonal()
    assert (covariance - values.diag()).abs().max() < 1e-3 and 0.5 < values.min() and values.max() < 1.001


def test_images_are_mirrored_in_one_of_two_epochs_each(pictures):
    run = AirbenchRun(settings(), pictures, 0)
    seen = {}
    batches = run.batches()
    for _ in range(2 * 6):
        for image in next(batches)[0]:
            turned = image.flip(2)
            key = min(image.float().numpy().tobytes(), turned.float().numpy().tobytes())
            seen.setdefault(key, []).append(image.float().numpy().tobytes())
    assert len(seen) == 300 and all(len(set(views)) == 2 for views in seen.values())


def test_a_shift_moves_an_image_and_reflects_what_comes_in(pictures):
    run = AirbenchRun(settings(shift=2), pictures, 0)
    x = run.test_set.images[:40]
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2), "reflect")
    places = set()
    for image, options in zip(run.shifted(x), padded):
        found = [(i, j) for i in range(5) for j in range(5)
                 if torch.equal(image, options[:, i:i + 28, j:j + 28])]
        assert found
        places.add(found[0])
    assert len(places) > 10


def test_six_views_are_weighed_as_upstream(pictures):
    run = AirbenchRun(settings(views=6), pictures, 0)
    x = run.test_set.images[:2]
    views = run.views(x)
    assert len(views) == 8 and all(view.shape == x.shape for view in views)
    assert sum(torch.equal(view, x) for view in views) == 2
    assert sum(torch.equal(view, x.flip(3)) for view in views) == 2


@pytest.mark.parametrize("flags, message", [
    (["--optimizer=lion"], "one of muon, sgd, adamw"), (["--epochs=0"], "a positive number"),
    (["--epochs=nan"], "finite"), (["--views=3"], "1, 2 or 6"), (["--width=94"], "one of small, full"),
    (["--batch_size=301"], "at most the 300 training images"), (["--seeds=0"], "a positive number"),
    (["--momentum=1"], "0.0 to 0.999"), (["--shift=-1"], "0 to 4"), (["--device=sofa"], "a device of this"),
    (["--data=nowhere"], "expected fashion, cifar10 or a folder"), (["--rate=1"], "expected a setting")])
def test_bad_input_is_a_sentence(tmp_path, flags, message):
    data = [] if flags[0].startswith("--data") else [f"--data={write_mnist(tmp_path)}"]
    with pytest.raises(UsageError, match="(?s)expected .*found .*") as error:
        convnet.main([*data, *flags])
    assert message in str(error.value)


def test_images_that_three_halvings_would_leave_empty_are_refused():
    pixels, labels = patterns(60, 0, size=8)
    tiny = Labelled(torch.tensor(pixels)[:, None], torch.tensor(labels).long())
    with pytest.raises(UsageError, match="expected images of 9 x 9 pixels or more, found 8 x 8"):
        standardized(ImageSet(tiny, tiny))
    pixels, labels = patterns(60, 0, size=9)
    small = Labelled(torch.tensor(pixels)[:, None], torch.tensor(labels).long())
    assert 0 <= run_once(settings(epochs=1.0), standardized(ImageSet(small, small)), 0)["accuracy"] <= 1


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_muon_reads_clothes(monkeypatch):
    images = load_images("fashion")
    part = images._replace(test=type(images.test)(*(each[:2000] for each in images.test)))
    result = run_once(AirbenchSettings(epochs=0.25), standardized(part), 0)
    assert result["accuracy"] > 0.8, result
