"""Classes that a Dataset names, calls under no_grad, and arguments that cannot be meant, from Python."""

from __future__ import annotations

import pytest
import torch
import yaml
from conftest import bar_images
from torch import nn
from torch.utils.data import ConcatDataset, Subset

import fastrobust
from fastrobust.runtime.errors import FastrobustError

FEW = {"evaluation.steps": 5, "evaluation.restarts": 1, "optimizer.name": "adam"}
NAMES = tuple("abcdefghij")


class Named(torch.utils.data.Dataset):
    """Bars of these classes of ten; labels are places in `classes`."""

    def __init__(self, count: int, seed: int, classes: tuple[str, ...]):
        pixels, labels = bar_images(count, seed)
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        self.items = [(x, classes.index(NAMES[y])) for x, y in zip(images, labels, strict=True) if NAMES[y] in classes]
        self.classes = list(classes)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, k):
        return self.items[k]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3 * 28 * 28, 10)

    def forward(self, x):
        return self.layer(x.flatten(1))


def fit(folder, test, network=None, **options):
    options = {"epsilon": 0.02, "epochs": 3, "batch_size": 50, "lr": 0.01, "output": folder, "config": FEW} | options
    return fastrobust.fit(network or Net(), Named(600, 1, NAMES), test=test, **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("named"), Named(200, 2, NAMES))


def test_the_test_images_of_fit_are_matched_by_name(run, tmp_path, capsys):
    some = Named(200, 2, ("h", "c"))
    found = fit(tmp_path, some)
    assert "no images of" in capsys.readouterr().out
    assert found.summary["clean_accuracy"] > 0.9 and run.summary["clean_accuracy"] > 0.9
    counts = {name: sum(NAMES.index(name) == NAMES.index(some.classes[y]) for _, y in some.items) for name in NAMES}
    assert found.summary["images"]["test"] == counts


def test_so_are_those_of_evaluate(run, tmp_path, capsys):
    part, options = Named(200, 2, ("h", "c")), {"epsilon": 0.0, "attack": "pgd-1-1"}
    for model in (run.model, fastrobust.load(run.directory, Net())):
        found = fastrobust.evaluate(model, part, **options)
        assert found.clean_accuracy > 0.9 and "no images of" in capsys.readouterr().out
    other = Named(200, 2, NAMES)
    other.classes = [f"class {k}" for k in range(10)]
    assert fastrobust.evaluate(run.model, other, **options).clean_accuracy > 0.9
    assert "are taken for the model's (a, b, c, …) by their numbers" in capsys.readouterr().out
    other.classes[3] = "a"
    with pytest.raises(FastrobustError, match="the model has 10 classes"):
        fastrobust.evaluate(run.model, other, **options)


def test_a_subset_has_the_names_of_its_data_set(run, tmp_path):
    """The classes are in another order: by number nearly all would be wrong."""
    turned, options = Named(200, 2, NAMES[::-1]), {"epsilon": 0.0, "attack": "pgd-1-1"}
    part = Subset(turned, range(50))
    for data in (turned, part, Subset(part, range(30)), ConcatDataset([part, turned])):
        assert fastrobust.evaluate(run.model, data, **options).clean_accuracy > 0.9
    assert fit(tmp_path, part).summary["clean_accuracy"] > 0.9
    with pytest.raises(FastrobustError, match="the parts of the ConcatDataset name other classes"):
        fastrobust.evaluate(run.model, ConcatDataset([turned, Named(200, 2, NAMES)]), **options)


def test_a_run_is_not_given_back_with_other_code_of_its_network(tmp_path):
    fit(tmp_path, Named(200, 2, NAMES))
    assert fit(tmp_path, Named(200, 2, NAMES), resume=True).summary["clean_accuracy"] > 0.9
    other = Net()
    other.layer.register_forward_hook(lambda layer, inputs, logits: logits.tanh())
    with pytest.raises(FastrobustError, match="was trained with other code of the network"):
        fit(tmp_path, Named(200, 2, NAMES), other, resume=True)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_callers_mode_of_gradients_does_not_matter(run, tmp_path, mode):
    x, y = (
        torch.stack(t) if k == 0 else torch.tensor(t) for k, t in enumerate(zip(*Named(50, 2, NAMES).items, strict=True))
    )
    options = {"epsilon": 0.05, "attack": "pgd-3-1"}
    expected, network = fastrobust.evaluate(run.model, x, y, **options), Net()
    with mode():
        inside = x.clone()
        assert torch.equal(fastrobust.evaluate(run.model, inside, y, **options).robust, expected.robust)
        fastrobust.adversarial_images(run.model, inside, y, **options)
        assert fit(tmp_path, Named(200, 2, NAMES), network).summary["clean_accuracy"] > 0.9
        if mode is torch.inference_mode:
            with pytest.raises(FastrobustError, match=r"made under torch\.inference_mode"):
                fit(tmp_path / "other", Named(200, 2, NAMES), Net())
            for call in (fastrobust.evaluate, fastrobust.adversarial_images):
                with pytest.raises(FastrobustError, match=r"made under torch\.inference_mode.*: make it outside"):
                    call(Net(), inside, y, **options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"epsilon": -0.1}, "epsilon must not be negative"),
        ({"epsilon": float("nan")}, "epsilon must be a finite number"),
        ({"epsilon": "a bit"}, "epsilon: 'a bit' is not a number; write 0.03 or 8/255"),
        ({"alpha": 0}, "alpha be more than 0"),
        ({"alpha": -1.0}, "alpha be more than 0"),
        ({"batch_size": 0}, "batch_size must be a whole number from 1"),
        ({"batch_size": 2.5}, "batch_size must be a whole number from 1"),
        ({"seed": 2**70}, "seed must be a whole number from 0"),
        ({"seed": None}, "seed must be a whole number from 0"),
        ({"attack": ["pgd-3-1"]}, "attack must be text"),
    ],
)
def test_arguments_that_cannot_be_meant(run, options, says):
    x, y = torch.zeros(4, 3, 28, 28), torch.tensor([0, 1, 2, 3])
    for call in (fastrobust.evaluate, fastrobust.adversarial_images):
        with pytest.raises(FastrobustError, match=says):
            call(run.model, x, y, **{"epsilon": 0.05, "attack": "pgd-1-1"} | options)
    assert fastrobust.evaluate(run.model, x, y, epsilon="8/255", attack="pgd-1-1").epsilon == 8 / 255


def test_others_of_verify_load_and_fit(run, tmp_path):
    x, y = torch.zeros(2, 3, 28, 28, dtype=torch.uint8), torch.tensor([0, 1])
    with pytest.raises(FastrobustError, match="workers must be a whole number from 1"):
        fastrobust.verify(run.model, x, y, epsilon=0.1, workers=-1)
    with pytest.raises(FastrobustError, match="epsilon must be one number"):
        fastrobust.verify(run.model, x, y, epsilon=[0.1])
    with pytest.raises(FastrobustError, match="it was given a NoneType"):
        fastrobust.load(None)
    for classes in ("abcdefghij", ("a", "a", *NAMES[2:])):
        with pytest.raises(FastrobustError, match="classes must be names, each once"):
            fit(tmp_path, Named(200, 2, NAMES), classes=classes)
    assert not list(tmp_path.iterdir())


def test_a_home_is_written_out_in_paths(run, monkeypatch):
    monkeypatch.setenv("HOME", str(run.directory.parent))
    x = torch.rand(2, 3, 28, 28)
    torch.testing.assert_close(fastrobust.load(f"~/{run.directory.name}", Net())(x), run.model(x))
    with pytest.raises(FastrobustError, match=f"no folder or file {run.directory.parent}/absent"):
        fastrobust.fit("mnist_net", "~/absent", epsilon=0.1)
    with pytest.raises(FastrobustError, match=r"'svhnn' is not one of mnist, .*cifar100, svhn, .*did you mean 'svhn'\?"):
        fastrobust.fit("mnist_net", "svhnn", epsilon=0.1)


def test_classes_that_are_given_are_matched_with_a_datasets_own(tmp_path, capsys):
    """Both Datasets number them otherwise than `classes` does; the test images lack some, as a folder of images may."""
    some, turned, words = Named(200, 2, ("b", "h")), NAMES[::-1], [f"class {k}" for k in range(10)]
    found = fit(tmp_path, some, classes=turned)
    assert found.classes == turned and found.summary["clean_accuracy"] > 0.9
    assert fastrobust.evaluate(found.model, some, epsilon=0.0, attack="pgd-1-1").clean_accuracy > 0.9
    assert "no images of" in capsys.readouterr().out
    assert fit(tmp_path / "words", Named(200, 2, NAMES), classes=words, epochs=1).classes == tuple(words)
    assert "are taken for the model's (class 0, class 1, class 2, …) by their numbers" in capsys.readouterr().out
    with pytest.raises(FastrobustError, match=r"2 classes \(b, h\), but the model has 10 classes \(class 0, class 1"):
        fit(tmp_path / "fewer", some, classes=words)


def test_names_without_images_are_no_matter(run, tmp_path):
    """Two classes of a Dataset that names ten."""
    whole = Named(600, 1, NAMES)
    part = Subset(whole, [k for k, (_, y) in enumerate(whole.items) if NAMES[y] in "bh"])
    options = {"classes": ("h", "b"), "epsilon": 0.02, "epochs": 1, "batch_size": 50, "output": tmp_path, "config": FEW}
    found = fastrobust.fit(nn.Sequential(nn.Flatten(), nn.Linear(3 * 28 * 28, 2)), part, test=part, **options)
    assert found.classes == ("h", "b") and found.summary["images"]["train"].keys() == {"h", "b"}
    assert fastrobust.evaluate(run.model, part, epsilon=0.0, attack="pgd-1-1").clean_accuracy > 0.9


def test_sections_of_config_are_merged_with_those_of_fit(tmp_path):
    """One that names another part takes the place of fit's: its keys are others."""
    sections = {
        "data": {"augment": {"flip": True}},
        "data.augment": {"crop": "pad"},
        "evaluation": {"steps": 5, "restarts": 1},
        "schedule": {"name": "multistep", "lr": 0.01, "milestones": [0.5]},
        "phases.0.epochs": 1,
    }
    found = fit(tmp_path, Named(200, 2, NAMES), config=sections)
    made = yaml.safe_load((found.directory / "config.yaml").read_text())
    assert made["data"]["dataset"] == "arrays"
    assert (made["data"]["augment"]["flip"], made["data"]["augment"]["crop"]) == (True, "pad")
    assert (made["evaluation"]["limit"], made["evaluation"]["steps"]) == (1000, 5)
    assert made["schedule"]["name"] == "multistep" and made["phases"][0]["epochs"] == 1
