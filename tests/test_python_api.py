"""fit, evaluate, verify and load from a program: its own network and images, without a config file."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
import torchattacks
from conftest import bar_images
from PIL import Image
from python_runs import FEW, TEST, TRAIN, Net, bars, fit
from torch import nn
from torch.utils.data import TensorDataset

import fastrobust
from fastrobust.__main__ import main as cli
from fastrobust.data import sets
from fastrobust.models import Normalized
from fastrobust.runtime.errors import ConfigError, DataError, FastrobustError, RunError


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.08), ("l2", 1.5)])
@pytest.mark.parametrize("kind", ["uint8", "float"])
def test_adversarial_images_are_what_evaluate_counts(run, norm, epsilon, kind):
    """They lie in the ball and the box; those that changed were right and are wrong now; the others are as they were."""
    images, labels = TEST[0] if kind == "uint8" else TEST[0].float() / 255, TEST[1]
    options = {"epsilon": epsilon, "norm": norm, "attack": "pgd-10-2"}
    found = fastrobust.adversarial_images(run.model.train(), images, labels, **options)
    assert run.model.training and found.device == images.device and found.dtype == torch.float32
    counted = fastrobust.evaluate(run.model.eval(), images, labels, **options)
    x = images.float() / 255 if kind == "uint8" else images
    distance = (found - x).flatten(1).norm(torch.inf if norm == "linf" else 2, dim=1)
    assert found.min() >= 0 and found.max() <= 1 and distance.max() <= epsilon * (1 + 1e-5)
    assert torch.equal(distance > 0, counted.clean & ~counted.robust) and int((distance > 0).sum()) > 0
    with torch.no_grad():
        assert torch.equal(run.model(found).argmax(1) == labels, counted.robust)


def test_adversarial_images_takes_what_evaluate_takes(run):
    options = {"epsilon": 0.08, "attack": "pgd-3-1"}
    expected = fastrobust.adversarial_images(run.model, *TEST, **options)
    last = TEST[0].permute(0, 2, 3, 1).numpy()
    for given in ((last, TEST[1].numpy()), ((last, TEST[1]),), (TensorDataset(*TEST),)):
        assert torch.equal(fastrobust.adversarial_images(run.model, *given, **options), expected)
    with pytest.raises(ConfigError, match="attack"):
        fastrobust.adversarial_images(run.model, *TEST, epsilon=0.1, attack="pgd50")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.manual_seed(0)
    return fit(Net(), tmp_path_factory.mktemp("fit"))


def test_a_network_of_ones_own_learns(run):
    assert run.summary["clean_accuracy"] > 0.8 and run.summary["examples"] == 100
    assert len(run.history) == 3 and "net_fgsm" in repr(run)
    again = fastrobust.evaluate(run.model, *TEST, epsilon=0.05, attack="pgd-5-1", alpha=0.05 / 4)
    assert again.robust_accuracy == run.summary["robust_accuracy"]


OWN_NET = """
import torch
from python_runs import Net

def make(channels, classes):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net()
"""


def test_the_weights_are_those_of_the_same_run_by_a_config(tmp_path, config_file):
    """The same images as a folder, the same network by import path: bit for bit."""
    own = tmp_path / "own_net.py"
    own.write_text(OWN_NET)
    sys.path.insert(0, str(tmp_path))
    data = {"dataset": "arrays", "path": str(tmp_path / "images.npz")}
    arrays = {f"{s}_{k}": a for s, (x, y) in (("train", TRAIN), ("test", TEST)) for k, a in (("images", x), ("labels", y))}
    arrays = {k: (t.permute(0, 2, 3, 1) if t.dim() == 4 else t).numpy() for k, t in arrays.items()}
    np.savez(data["path"], **arrays)
    changes = {
        "data": data, "model": {"name": "own_net:make", "mean": [0, 0, 0], "std": [1, 1, 1]}, "optimizer": {"name": "adam"},
        "schedule": {"name": "cyclic", "max_lr": 5e-3}, "phases": [{"epochs": 3, "batch_size": 30}],
        "evaluation": {"steps": 5, "restarts": 1, "limit": 1000},
    }  # fmt: skip
    assert cli(["train", str(config_file(tmp_path, **changes))]) == 0
    torch.manual_seed(0)
    network = Net()
    found = fit(network, tmp_path / "api", config=FEW)
    expected = fastrobust.load(tmp_path / "runs" / "bars").state_dict()
    assert all(torch.equal(t, expected[name]) for name, t in found.model.state_dict().items())


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_trains_a_given_network_without_normalisation(tmp_path, channels, capsys):
    """Its files decide how many channels there are; the run that is resumed is the same."""
    for split, (images, labels) in (("train", bars(60, 0)), ("val", bars(20, 1))):
        for k, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            file = tmp_path / "photos" / split / f"{label}" / f"{k}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L" if channels == 1 else "RGB").save(file)
    options = {"epochs": 1, "resolution": 28, "name": "photos"}

    def run(**more):
        network = nn.Sequential(nn.Flatten(), nn.Linear(channels * 784, 10))
        return fit(network, tmp_path, str(tmp_path / "photos"), None, **(options | more))

    made = run()
    assert (made.model.mean.flatten().tolist(), made.model.std.flatten().tolist()) == ([0] * channels, [1] * channels)
    again = run(resume=True)
    assert again.summary == made.summary and torch.equal(again.model.network[1].weight, made.model.network[1].weight)
    assert run(name="other", mean=[0.5] * channels).model.mean.flatten().tolist() == [0.5] * channels
    capsys.readouterr()
    with pytest.raises(ConfigError, match=r"Sequential cannot take 28 x 28 pixels \(mat1 and mat2 shapes"):
        run(name="wrong", config=FEW | {"data.channels": 4 - channels})


def test_data_in_every_form_gives_the_same_run(run, tmp_path):
    class Items(torch.utils.data.Dataset):
        def __init__(self, images, labels):
            self.images, self.labels = images, labels

        def __len__(self):
            return len(self.labels)

        def __getitem__(self, i):
            return self.images[i].float() / 255, int(self.labels[i])

    floats = (TRAIN[0].double() / 255, TRAIN[1].tolist())
    arrays = (TRAIN[0].permute(0, 2, 3, 1).numpy(), TRAIN[1].numpy())
    reference = {name: t.clone() for name, t in run.model.state_dict().items()}
    for i, data in enumerate((floats, arrays, Items(*TRAIN))):
        torch.manual_seed(0)
        found = fit(Net(), tmp_path / str(i), data=data, test=Items(*TEST))
        assert all(torch.equal(t, reference[name]) for name, t in found.model.state_dict().items()), i


def test_one_number_is_the_normalisation_of_all_channels_and_bfloat16_is_read(tmp_path):
    few = {"epochs": 1, "data": (TRAIN[0].bfloat16() / 255, TRAIN[1])}
    for name, network in (("given", Net()), ("named", "mnist_net")):
        found = fit(network, tmp_path, name=name, mean=0.5, std="1/4", **few).model
        assert (found.mean.flatten().tolist(), found.std.flatten().tolist()) == ([0.5] * 3, [0.25] * 3)


def test_it_leaves_signals_and_random_numbers_alone(tmp_path):
    """In another thread too, as notebooks may do."""
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    torch.manual_seed(5)
    expected, network = torch.rand(3), Net()
    torch.manual_seed(5)
    thread = threading.Thread(target=lambda: fit_quietly(network, tmp_path))
    thread.start()
    thread.join()
    fit_quietly(network, tmp_path / "again")
    assert torch.equal(torch.rand(3), expected)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers


def fit_quietly(network, folder):
    fastrobust.fit(network, TRAIN, test=TEST, epsilon=0.05, epochs=1, output=folder, config=FEW)


def test_ctrl_c_is_a_keyboard_interrupt(tmp_path, monkeypatch):
    def interrupted(self, batch):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastrobust.train.step.Step.__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(Net(), tmp_path)


def test_a_run_is_resumed_and_guarded_against_mistakes(run, tmp_path):
    with pytest.raises(RunError, match=r"give another name=, or resume=True"):
        fit(Net(), run.directory.parent)
    again = fit(Net(), run.directory.parent, resume=True)
    assert again.summary == run.summary
    with pytest.raises(DataError, match="begun with other train images"):
        fit(Net(), run.directory.parent, data=(255 - TRAIN[0], TRAIN[1]), resume=True)
    with pytest.raises(RunError, match=r"epsilon: 0.05 in one, 0.1 in the other"):
        fit(Net(), run.directory.parent, epsilon=0.1, resume=True)


def test_a_network_that_was_given_is_needed_to_open_the_run(run, capsys):
    opened = fastrobust.load(run.directory, model=Net())
    x = TEST[0].float() / 255
    assert torch.equal(opened(x), run.model(x))
    with pytest.raises(RunError, match=r"it is the class Net: give Net\("):
        fastrobust.load(run.directory, model=Net)
    with pytest.raises(RunError, match="it is a function: give the network itself"):
        fastrobust.load(run.directory, model=fit)
    with pytest.raises(RunError, match=r"Net was given from Python .*fastrobust.load\(RUN, model=NETWORK\)"):
        fastrobust.load(run.directory)
    assert cli(["evaluate", str(run.directory)]) == 2
    assert "was given from Python" in capsys.readouterr().err


def test_a_named_model_on_given_images_can_be_used_by_every_command(tmp_path, capsys):
    found = fit("mnist_net", tmp_path, epochs=1)
    (found.directory / "images.npz").rename(tmp_path / "moved.npz")
    assert isinstance(fastrobust.load(found.directory), Normalized)  # without its images
    assert cli(["evaluate", str(found.directory)]) == 2
    assert "images.npz" in capsys.readouterr().err
    assert cli(["evaluate", str(found.directory), "--data", str(tmp_path / "moved.npz"), "--attack", "pgd-2-1"]) == 0
    assert f"{found.summary['clean_accuracy']:.2%}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"test": None}, DataError, r"give test=\(images, labels\) too"),
        ({"epsilon": 8}, ConfigError, "did you mean 8/255"),
        ({"data": (TRAIN[0].float(), TRAIN[1])}, DataError, "must lie in .0, 1.; they reach from 0 to 255: divide by 255"),
        ({"data": (TRAIN[0].float() / 128 - 1, TRAIN[1])}, DataError, "leave their normalisation out"),
        ({"data": (TRAIN[0].float() * float("nan"), TRAIN[1])}, DataError, "no finite numbers"),
        ({"data": (TRAIN[0], TRAIN[1] * 0)}, DataError, "are of one class"),
        ({"data": (TRAIN[0], TRAIN[1] - 1)}, DataError, "label -1 is negative"),
        ({"data": (TRAIN[0], TRAIN[1].float())}, DataError, "labels must be whole numbers"),
        ({"data": (TRAIN[0][:5], TRAIN[1])}, DataError, "5 images and 600 labels"),
        ({"data": (TRAIN[0][..., :20], TRAIN[1])}, DataError, "must be N x C x H x W with C 1 or 3, and square"),
        ({"test": (TEST[0], TEST[1] + 1)}, DataError, "label 10 is none of the 10 classes"),
        ({"data": "cifra10", "test": None}, DataError, "did you mean 'cifar10'"),
        ({"data": 7}, DataError, "not a int"),
        ({"data": TRAIN[0]}, DataError, "the labels are missing"),
        ({"data": (TRAIN[0][:0], TRAIN[1][:0])}, DataError, "there are no images"),
        ({"data": TensorDataset(TRAIN[0][:0], TRAIN[1][:0])}, DataError, "there are no images: the TensorDataset is empty"),
        ({"data": (TensorDataset(*TRAIN), TRAIN[1])}, DataError, "a Dataset holds its labels: give it alone"),
        ({"test": (TEST[0][..., :20, :20], TEST[1])}, DataError, "images are 28 x 28 x 3 and the test images 20 x 20 x 3"),
        ({"epsilon": [0.1]}, ConfigError, r"epsilon must be one number; it is \[0.1\]"),
        ({"mean": (0.5, "a", 0.5)}, ConfigError, "mean: 'a' is not a number"),
        ({"model": nn.Sequential(nn.Flatten(), nn.LazyLinear(10))}, ConfigError, "has lazy layers .*: call it once"),
        ({"model": Net().half()}, ConfigError, r"its weights are torch.float16, give model.float\(\)"),
        ({"name": "a/b"}, ConfigError, "name: 'a/b' is no name for a folder"),
        ({"name": ".."}, ConfigError, "name: '..' is no name for a folder"),
        ({"name": "caf\udce9"}, ConfigError, "is no name for a folder"),
        ({"model": type("Größe", (Net,), {})()}, ConfigError, "'größe_fgsm' is no name for a folder.*give name="),
        ({"config": {"name": "other"}}, ConfigError, "config: name is an argument of fit: give name="),
        ({"config": {"output": "other"}}, ConfigError, "config: output is an argument of fit: give output="),
        ({"method": "fgms"}, ConfigError, "did you mean 'fgsm'"),
        ({"config": {"precison": "bf16"}}, ConfigError, "did you mean 'precision'"),
        ({"model": nn.Sequential(nn.Flatten(), nn.Linear(9, 10))}, ConfigError, "cannot take 28 x 28 pixels"),
        ({"model": nn.Sequential(nn.Flatten(), nn.Linear(2352, 7))}, ConfigError, r"must give logits, N x 10 .*\(1, 7\)"),
    ],
)  # fmt: skip
def test_mistakes_are_named_and_leave_nothing(tmp_path, change, error, says):
    network = change.pop("model", None) or Net()
    with pytest.raises(error, match=says):
        fit(network, tmp_path / "out", **change)
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


def test_a_run_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    found = fit("mnist_net", "~/out", epochs=1, name="a", data=(TRAIN[0][:60], TRAIN[1][:60]))
    assert found.directory == tmp_path / "home/out/a" and (found.directory / "images.npz").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["home"]


class Pair(Net):
    def forward(self, x):
        return super().forward(x), x


@pytest.mark.parametrize(
    ("network", "images", "labels", "options", "says"),
    [
        (Pair(), *TEST, {}, "must give logits, N x classes; for one image it gives a tuple"),
        (Net(), TEST[0][..., :20, :20], TEST[1], {}, "does not take images of 3 x 20 x 20"),
        (Net(), TEST[0].float(), TEST[1], {}, "divide them by 255"),
        (Net(), TEST[0], TEST[1] + 1, {}, "label 10 is none of the model's 10 classes"),
        (Net(), *TEST, {"epsilon": 8}, "did you mean 8/255"),
        (Net(), *TEST, {"attack": "pgd50"}, "'pgd50' is not one of pgd, pgd-t, apgd-ce"),
        (Net().to("meta"), *TEST, {}, "on the device `meta`, where it has no values"),
        (lambda x: x, *TEST, {}, "must be an nn.Module; it is a function: give the network itself"),
        (Net, *TEST, {}, r"it is the class Net: give Net\("),
        (nn.Flatten(), *TEST, {}, "must be an nn.Module with parameters, a Flatten has none"),
        (nn.Sequential(nn.Flatten(), nn.LazyLinear(10)), *TEST, {}, "has lazy layers .*: call it once"),
        (Net().half(), *TEST, {}, r"its weights are torch.float16, give model.float\(\)"),
        (Net().double(), *TEST, {}, r"its weights are torch.float64, give model.float\(\)"),
        (Net(), TensorDataset(*TEST), TEST[1], {}, "not a TensorDataset; a Dataset holds its labels: give it alone"),
        (Net(), TEST[0], None, {}, "the labels are missing"),
        (Net(), TEST[0].numpy(), None, {}, "the labels are missing"),
        (Net(), TEST[0][:0], TEST[1][:0], {}, "there are no images"),
        (Net(), *TEST, {"epsilon": [0.1, 0.2]}, r"epsilon must be one number; it is \[0.1, 0.2\]"),
    ],
)
def test_what_cannot_be_evaluated_is_named(network, images, labels, options, says):
    with pytest.raises(FastrobustError, match=says):
        fastrobust.evaluate(network, images, labels, **{"epsilon": 0.05} | options)


def test_the_l2_norm_gives_the_commands_figures(tmp_path, capsys):
    """Trained in L2 by fit, evaluated by the command, and by the function from a file of images alone."""
    trained = fit("mnist_net", tmp_path, epsilon=1.5, config=FEW | {"norm": "l2"})
    assert trained.summary["norm"] == "l2" and "at L2, epsilon 1.5, 100 test images" in repr(trained)
    assert cli(["evaluate", str(trained.directory), "--json", "--device", "cpu"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    found = fastrobust.evaluate(trained.model, *TEST, epsilon=1.5, norm="l2", attack="pgd-5-1")
    for key in ("clean_accuracy", "robust_accuracy", "norm", "epsilon", "attack", "weights"):
        assert getattr(found, key) == told[key]
    assert found.robust_accuracy == trained.summary["robust_accuracy"] < found.clean_accuracy
    with pytest.raises(FastrobustError, match=r"did you mean 1\.5/255"):
        fastrobust.evaluate(trained.model, *TEST, epsilon=1.5)
    with pytest.raises(ConfigError, match="norm: 'l3' is not one of linf, l2"):
        fastrobust.evaluate(trained.model, *TEST, epsilon=1.5, norm="l3")


def test_evaluate_agrees_with_torchattacks_on_a_model_of_fit(run):
    """The same PGD in other hands breaks about the same images; what they break in ours is broken by theirs too."""
    x, y = TEST[0].float() / 255, TEST[1]
    attack = torchattacks.PGD(run.model, eps=0.05, alpha=0.0125, steps=20, random_start=True)
    theirs = (run.model(attack(x, y)).argmax(1) == y).double().mean().item()
    ours = fastrobust.evaluate(run.model, x, y, epsilon=0.05, attack="pgd-20-1")
    assert abs(theirs - ours.robust_accuracy) <= 0.03
    assert ours.robust.sum() == round(ours.robust_accuracy * 100) and ours.attacks[0]["attacked"] == ours.clean.sum()


SCRIPT = """
import torch, fastrobust
from torch import nn
torch.manual_seed(0)
x, y = torch.randint(0, 256, (12, 1, 6, 6), dtype=torch.uint8), torch.arange(12) % 3
net = nn.Sequential(nn.Flatten(), nn.Linear(36, 10), nn.ReLU(), nn.Linear(10, 3))
print(fastrobust.verify(net, x, y, epsilon=0.01, workers=2).verdicts)
"""


def test_verify_in_a_script_without_a_main_guard(tmp_path):
    """Worker processes must not run the script again; the verdicts are those of the decider in this process."""
    pytest.importorskip("highspy")
    from small_networks import decide

    from fastrobust.verification.decide import Decider

    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    torch.manual_seed(0)
    x, y = torch.randint(0, 256, (12, 1, 6, 6), dtype=torch.uint8), torch.arange(12) % 3
    network = nn.Sequential(nn.Flatten(), nn.Linear(36, 10), nn.ReLU(), nn.Linear(10, 3)).eval()
    found = decide(Decider(Normalized(network, (0.0,), (1.0,)), (1, 6, 6), 0.01), list(range(12)), x, y, 60.0)
    assert done.stdout.splitlines()[-1] == str([v.verdict for v in found])
    with pytest.raises(FastrobustError, match=r"GELU \('1'\) is not supported"):
        fastrobust.verify(nn.Sequential(Net(), nn.GELU()), *TEST, epsilon=0.01)


def test_arrays_are_a_data_set_for_configs(tmp_path):
    file = tmp_path / "a.npz"
    images, labels = bar_images(20, 0)
    np.savez(file, train_images=images, train_labels=labels, test_images=images[:10], test_labels=labels[:10])
    found = sets.load("arrays", "test", file)
    assert np.array_equal(found.images.permute(0, 2, 3, 1).numpy(), images[:10]) and found.classes == tuple("0123456789")
    np.savez(file, train_images=images[..., 0], train_labels=labels, classes=list("abcdefghij"))
    assert sets.load("arrays", "train", file).images.shape == (20, 1, 28, 28)
    assert sets.load("arrays", "train", file).classes == tuple("abcdefghij")
    with pytest.raises(DataError, match="has no test_images and no test_labels"):
        sets.load("arrays", "test", file)


def test_a_model_of_fit_works_in_art_as_it_is(run):
    """The Adversarial Robustness Toolbox attacks it, and sees the accuracies that we see."""
    pytest.importorskip("art", reason="needs the Adversarial Robustness Toolbox")
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    loss, x, y = nn.CrossEntropyLoss(), (TEST[0].float() / 255).numpy(), TEST[1].numpy()
    classifier = PyTorchClassifier(run.model, loss, (3, 28, 28), 10, clip_values=(0.0, 1.0), device_type="cpu")
    ours = fastrobust.evaluate(run.model, *TEST, epsilon=0.05, attack="pgd-20-1")
    assert (classifier.predict(x).argmax(1) == y).mean() == ours.clean_accuracy
    options = {"eps": 0.05, "eps_step": 0.0125, "max_iter": 20, "num_random_init": 1, "verbose": False}
    points = ProjectedGradientDescentPyTorch(classifier, **options).generate(x, y)
    assert abs((classifier.predict(points).argmax(1) == y).mean() - ours.robust_accuracy) <= 0.03
