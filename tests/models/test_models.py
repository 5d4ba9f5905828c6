"""Tests of fastrobust.models: parameter counts by formula, networks against the same layers written out."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastrobust import models
from fastrobust.models.paper_preact_resnet import PaperPreActBlock
from fastrobust.models.patch_resnet import patch_resnet14
from fastrobust.models.preact_resnet import PreActResNet18
from fastrobust.runtime.errors import ConfigError
from fastrobust.runtime.operations import Operations
from fastrobust.runtime.torchvision_compat import import_torchvision

CIFAR = {"channels": 3, "mean": (0.4914, 0.4822, 0.4465), "std": (0.2471, 0.2435, 0.2616)}
MNIST = {"channels": 1, "mean": (0.0,), "std": (1.0,)}


def create(name: str, facts: dict = CIFAR, classes: int = 10) -> nn.Module:
    torch.manual_seed(0)
    return models.create(name, classes=classes, **facts)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def preact_resnet18_parameters(channels: int, classes: int, width: int) -> int:
    """Convolutions without bias, two numbers per normalised channel, a linear layer with bias."""
    total = channels * width * 9
    inputs = width
    for stage in range(4):
        outputs = width * 2**stage
        total += 2 * inputs + 9 * inputs * outputs + 2 * outputs + 9 * outputs * outputs  # the block that widens
        total += inputs * outputs if inputs != outputs else 0  # its shortcut
        total += 2 * (2 * outputs + 9 * outputs * outputs)
        inputs = outputs
    return total + 2 * inputs + inputs * classes + classes


def test_preact_resnet18_has_11_17_million_parameters():
    count = parameters(create("preact_resnet18"))
    assert count == preact_resnet18_parameters(3, 10, 64) == 11_172_170
    assert parameters(create("preact_resnet18_w16")) == preact_resnet18_parameters(3, 10, 16) < count / 10
    assert parameters(PreActResNet18(1, 100, width=8)) == preact_resnet18_parameters(1, 100, 8)


def unlike_at_the_start(model: nn.Module) -> dict[str, torch.Tensor]:
    """Moves statistics, scales and shifts away from 0 and 1; returns the weights. The model is in eval mode."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return model.eval().state_dict()


def norm_relu(x, weights, name):
    mean, var = weights[f"{name}.running_mean"], weights[f"{name}.running_var"]
    x = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
    return (x * weights[f"{name}.weight"][:, None, None] + weights[f"{name}.bias"][:, None, None]).clamp(min=0)


def test_preact_resnet18_is_the_network_of_he_et_al():
    """The forward pass written out with functions on the same weights, in eval mode with moved statistics."""
    model = PreActResNet18(3, 10, width=4)
    weights = unlike_at_the_start(model)
    x = torch.rand(2, 3, 32, 32)
    out = F.conv2d(x, weights["conv.weight"], padding=1)
    for k in range(8):
        stride = 2 if k in (2, 4, 6) else 1
        inner = norm_relu(out, weights, f"blocks.{k}.bn1")
        shortcut = F.conv2d(inner, weights[f"blocks.{k}.shortcut.weight"], stride=stride) if stride == 2 else out
        inner = F.conv2d(inner, weights[f"blocks.{k}.conv1.weight"], stride=stride, padding=1)
        inner = norm_relu(inner, weights, f"blocks.{k}.bn2")
        out = F.conv2d(inner, weights[f"blocks.{k}.conv2.weight"], padding=1) + shortcut
    assert out.shape == (2, 32, 4, 4)
    out = norm_relu(out, weights, "bn").mean((2, 3)) @ weights["linear.weight"].T + weights["linear.bias"]
    torch.testing.assert_close(model(x), out, rtol=1e-4, atol=1e-4)


def test_patch_resnet14_is_the_last_stages_of_preact_resnet18():
    """Of twice the width, on the same weights: its stem is a convolution over the patches, written out with `unfold`."""
    model, whole = patch_resnet14(3, 10, width=8), PreActResNet18(3, 10, width=8)
    weights = unlike_at_the_start(model)
    whole.blocks = whole.blocks[:6]  # of 8, 16 and 32 channels
    whole.bn, whole.linear, whole.conv = nn.BatchNorm2d(32), nn.Linear(32, 10), nn.Identity()
    whole.load_state_dict({name: t for name, t in weights.items() if name != "conv.weight"})
    x = torch.rand(2, 3, 32, 32)
    patches = F.unfold(F.pad(x, (1, 1, 1, 1)), 4, stride=2)  # N x 48 x 256
    stem = (weights["conv.weight"].flatten(1) @ patches).unflatten(2, (16, 16))
    torch.testing.assert_close(model(x), whole.eval()(stem), rtol=1e-4, atol=1e-4)


def test_patch_resnet14_with_silu_is_the_network_with_silu_in_the_place_of_relu(monkeypatch):
    torch.manual_seed(0)
    model = patch_resnet14(width=8, activation="silu")
    plain = patch_resnet14(width=8)
    plain.load_state_dict(model.state_dict())
    x = torch.rand(4, 3, 32, 32)
    out, relu = model(x), plain(x)
    monkeypatch.setattr("torch.nn.functional.relu", lambda z: z * torch.sigmoid(z))
    assert torch.allclose(out, plain(x), atol=1e-5) and not torch.allclose(out, relu, atol=1e-2)
    with pytest.raises(ConfigError, match=r"model\.options: .* there is no activation 'tanh', only relu and silu"):
        create("patch_resnet14", CIFAR | {"options": {"activation": "tanh"}})


def test_patch_resnet14_has_a_fifth_of_the_operations():
    """Counted, and by the formula: a convolution takes 2 x inputs x outputs x its area for each place that it gives."""
    model, widths = create("patch_resnet14").eval(), (64, 128, 256)
    assert parameters(model) == 2_778_250
    with Operations() as counted, torch.no_grad():
        model(torch.rand(1, 3, 32, 32))
    total, inputs = 2 * 3 * 64 * 16 * 16**2, 64
    for stage, width in enumerate(widths):
        places = (16 // 2**stage) ** 2
        total += 2 * places * (9 * inputs * width + 27 * width * width + (inputs * width if stage else 0))
        inputs = width
    assert counted.number == total + 2 * 256 * 10
    assert counted.number == pytest.approx(0.19 * 1.11e9, rel=0.01)


# ---- the layout of the paper's published code


def papers_layout(channels: int, classes: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of the paper's published weights: conv1; layer1 to layer4, two blocks each; bn;
    linear."""
    shapes = {"conv1.weight": (64, channels, 3, 3)}

    def batchnorm(name: str, width: int) -> None:
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{part}"] = (width,)
        shapes[f"{name}.num_batches_tracked"] = ()

    for layer, (inputs, outputs) in enumerate(((64, 64), (64, 128), (128, 256), (256, 512)), 1):
        for block, width in enumerate((inputs, outputs)):
            name = f"layer{layer}.{block}"
            batchnorm(f"{name}.bn1", width)
            shapes[f"{name}.conv1.weight"] = (outputs, width, 3, 3)
            batchnorm(f"{name}.bn2", outputs)
            shapes[f"{name}.conv2.weight"] = (outputs, outputs, 3, 3)
            if width != outputs:
                shapes[f"{name}.shortcut.0.weight"] = (outputs, width, 1, 1)
    batchnorm("bn", 512)
    return shapes | {"linear.weight": (classes, 512), "linear.bias": (classes,)}


@pytest.mark.parametrize(("facts", "classes"), [(CIFAR, 10), (MNIST, 7)])
def test_the_papers_layout_takes_the_papers_weights(facts, classes):
    network = create("preact_resnet18_paper", facts, classes).network
    layout = papers_layout(facts["channels"], classes)
    assert {name: tuple(t.shape) for name, t in network.state_dict().items()} == layout
    stored = {name: torch.zeros(shape, dtype=network.state_dict()[name].dtype) for name, shape in layout.items()}
    network.load_state_dict(stored, strict=True)
    wrapped = {f"network.{name}" for name in layout} | {"mean", "std"}
    assert set(create("preact_resnet18_paper", facts, classes).state_dict()) == wrapped


def test_the_papers_layout_has_as_many_parameters_as_ours():
    count = parameters(create("preact_resnet18_paper"))
    assert count == preact_resnet18_parameters(3, 10, 64) == 11_172_170


def test_the_papers_shortcuts_start_at_the_raw_input():
    """The forward pass written out with functions on the same weights, in eval mode with moved statistics."""
    network = create("preact_resnet18_paper").network
    weights = unlike_at_the_start(network)
    x = torch.rand(2, 3, 32, 32)
    out = F.conv2d(x, weights["conv1.weight"], padding=1)
    for name in [f"layer{layer}.{block}" for layer in (1, 2, 3, 4) for block in (0, 1)]:
        raw = out
        stride = 2 if name in ("layer2.0", "layer3.0", "layer4.0") else 1
        inner = F.conv2d(norm_relu(raw, weights, f"{name}.bn1"), weights[f"{name}.conv1.weight"], stride=stride, padding=1)
        inner = F.conv2d(norm_relu(inner, weights, f"{name}.bn2"), weights[f"{name}.conv2.weight"], padding=1)
        out = inner + (F.conv2d(raw, weights[f"{name}.shortcut.0.weight"], stride=2) if stride == 2 else raw)
    assert out.shape == (2, 512, 4, 4)
    pooled = F.avg_pool2d(norm_relu(out, weights, "bn"), 4).flatten(1)
    expected = F.linear(pooled, weights["linear.weight"], weights["linear.bias"])
    torch.testing.assert_close(network(x), expected, rtol=1e-4, atol=1e-4)


def test_a_block_of_the_paper_whose_branch_is_silent_gives_its_projected_input():
    """Negative pixels reach the output: a shortcut behind the first ReLU would lose them."""
    block = PaperPreActBlock(2, 4, 2).eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(3, 2, 8, 8)
    projected = torch.einsum("nchw,oc->nohw", x[:, :, ::2, ::2], block.shortcut[0].weight[:, :, 0, 0])
    torch.testing.assert_close(sum(block((x, None))), projected, rtol=1e-5, atol=1e-6)
    plain = PaperPreActBlock(4, 4, 1).eval()
    nn.init.zeros_(plain.conv2.weight)
    assert torch.equal(sum(plain((projected, None))), projected) and (projected < 0).any()


@pytest.mark.parametrize(("name", "classes"), [("preact_resnet18_w16", 7), ("preact_resnet18_paper", 3), ("resnet18", 5)])
def test_logits_and_memory_layout(name, classes):
    model = create(name, classes=classes)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, classes)
    x = torch.rand(2, 3, 32, 32, requires_grad=True)
    (gradient,) = torch.autograd.grad(model.eval()(x).sum(), x)
    assert gradient.is_contiguous() and gradient.view(2, -1).shape == (2, 3 * 32 * 32)  # as other tools expect it
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())


def test_normalisation_inside_is_normalisation_outside():
    model = create("preact_resnet18_w16").eval()
    x = torch.rand(4, 3, 32, 32)
    outside = torch.stack([(x[:, c] - CIFAR["mean"][c]) / CIFAR["std"][c] for c in range(3)], 1)
    torch.testing.assert_close(model(x), model.network(outside), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(x), model.network(x), atol=1e-3)


def test_normalisation_is_stored_but_not_trained():
    model = create("preact_resnet18_w16")
    state = model.state_dict()
    assert state["mean"].flatten().tolist() == pytest.approx(CIFAR["mean"])
    assert state["std"].flatten().tolist() == pytest.approx(CIFAR["std"])
    assert not {"mean", "std"} & {name for name, _ in model.named_parameters()}


def test_mnist_net_is_the_network_of_the_paper():
    """Its ReLU stands behind the flattening; in the paper it stands before."""
    model = create("mnist_net", MNIST)
    paper = nn.Sequential(
        nn.Conv2d(1, 16, 4, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 4, stride=2, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(32 * 7 * 7, 100), nn.ReLU(),
        nn.Linear(100, 10),
    )  # fmt: skip
    for p, q in zip(paper.parameters(), model.parameters(), strict=True):
        p.data = q.detach().clone()
    x, y = torch.rand(6, 1, 28, 28, requires_grad=True), torch.arange(6)
    torch.testing.assert_close(model(x), paper(x), rtol=1e-5, atol=1e-6)
    (found,) = torch.autograd.grad(F.cross_entropy(model(x), y), x)
    (expected,) = torch.autograd.grad(F.cross_entropy(paper(x), y), x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-8)
    assert parameters(model) == (16 * 16 + 16) + (32 * 16 * 16 + 32) + (1568 * 100 + 100) + (100 * 10 + 10)


def test_weights_depend_on_the_seed():
    a, b = create("mnist_net", MNIST), create("mnist_net", MNIST)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    other = models.create("mnist_net", classes=10, **MNIST)
    assert not torch.equal(other.network[0].weight, a.network[0].weight)


def test_torchvision_by_name():
    """Torchvision's ResNet-18: 11,689,512 parameters with 1000 classes."""
    assert parameters(create("resnet18", classes=1000)) == 11_689_512
    assert parameters(create("resnet18", classes=10)) == 11_689_512 - 513 * 990


def test_torchvision_can_be_imported_again():
    first = import_torchvision()
    assert import_torchvision() is first and first.__name__ == "torchvision"
    assert "resnet50" in first.models.list_models()


def test_torchvision_models_take_three_channels():
    with pytest.raises(ConfigError, match=r"model\.name: torchvision's resnet18 takes 3 channels, the images have 1"):
        create("resnet18", MNIST)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("preact_resnet81", "preact_resnet18"),
        ("mnist-net", "mnist_net"),
        ("resnet-18", "resnet18"),
        ("ResNet50", "resnet50"),
    ],
)
def test_an_unknown_model_names_the_nearest(name, near):
    with pytest.raises(ConfigError, match=rf"there is no model '{name}'; did you mean '{near}'"):
        create(name)


def test_a_model_like_no_other_lists_ours():
    with pytest.raises(ConfigError, match=r"no model '0000'; ours: mnist_net, cifar_net, preact_resnet18, .*timm/NAME"):
        create("0000")


def test_timm_by_name():
    pytest.importorskip("timm")
    model = create("timm/resnet10t", classes=7)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 7)
    grey = create("timm/resnet10t", MNIST, classes=4)
    assert grey(torch.rand(2, 1, 32, 32)).shape == (2, 4)
    with pytest.raises(ConfigError, match=r"timm has no model 'resnet10'; did you mean 'timm/resnet"):
        create("timm/resnet10")


def test_timm_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)  # makes `import timm` an ImportError
    with pytest.raises(ConfigError, match=r"timm/resnet18 needs timm: pip install 'timm>="):
        create("timm/resnet18")


# ---- models of the user's own


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module in the current folder."""
    (tmp_path / "own_models.py").write_text(
        "from torch import nn\n"
        "def small(channels, classes):\n"
        "    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))\n"
        "def nothing(channels, classes):\n"
        "    return None\n"
        "a_word = 'word'\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield "own_models"
    sys.modules.pop("own_models", None)


def test_an_own_model(own):
    model = create(f"{own}:small", MNIST, classes=4)
    assert model(torch.rand(2, 1, 9, 9)).shape == (2, 4)
    assert parameters(model) == 8 and isinstance(model, models.Normalized)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("absent", "'own_models:absent': the module has no 'absent'"),
        ("a_word", r"own_models:a_word must be a function of \(channels, classes\), it is a str"),
        ("nothing", "own_models:nothing must return an nn.Module, it returns NoneType"),
    ],
)
def test_an_own_model_that_is_none(own, name, said):
    with pytest.raises(ConfigError, match=rf"model\.name: {said}"):
        create(f"{own}:{name}")
    with pytest.raises(ConfigError, match=r"model\.name: 'absent_models:small': there is no module 'absent_models'"):
        create("absent_models:small")


def test_drop_path_of_torchvisions_models():
    facts = {"channels": 3, "classes": 10, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    made = models.create("convnext_tiny", **facts, options={"stochastic_depth_prob": 0.3})
    shares = [module.p for module in made.modules() if type(module).__name__ == "StochasticDepth"]
    assert len(shares) == 18 and max(shares) == 0.3
    with pytest.raises(ConfigError, match=r"model.options: resnet18 does not take .*'stochastic_depth_prob'"):
        models.create("resnet18", **facts, options={"stochastic_depth_prob": 0.3})


def test_options_reach_the_model(tmp_path, monkeypatch):
    pytest.importorskip("timm")
    facts = {"channels": 3, "classes": 10, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    made = models.create("timm/convnext_atto", **facts, options={"drop_path_rate": 0.5})
    assert "drop_prob=0.500" in str(made)
    with pytest.raises(ConfigError, match=r"model.options: timm/convnext_atto does not take .*'dorp'"):
        models.create("timm/convnext_atto", **facts, options={"dorp": 0.5})
    with pytest.raises(ConfigError, match=r"model.options: mnist_net does not take"):
        models.create("mnist_net", **facts, options={"width": 3})
