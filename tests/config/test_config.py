"""Tests of the config: what is filled in, what comes back from a file, and what an override changes."""

import random
import re
from fractions import Fraction

import pytest
from config_files import FOLDER, MINIMAL, ROOT, refusal

from fastrobust.config import reading
from fastrobust.config.numbers import describe, parse_number
from fastrobust.config.reading import load
from fastrobust.config.schema import Config
from fastrobust.config.sections import Evaluation, Guard


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "minimal.yaml"
    path.write_text(MINIMAL)
    return path


# ---- numbers


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8/255", 8 / 255), ("8 / 255", 8 / 255), ("0.03", 0.03), ("5e-3", 0.005), ("5.0e-3", 0.005), ("1", 1.0),
        ("'0.25'", 0.25), ("1/3", 1 / 3), (".5", 0.5), ("1e-05", 1e-5),
    ],
)  # fmt: skip
def test_numbers_as_people_write_them(file, text, value):
    assert load(file, [f"epsilon={text}"]).epsilon == value
    assert load(file, [f"schedule.max_lr={text}"]).schedule.max_lr == value
    assert load(file, [f"evaluation.epsilon=[{text}]"]).evaluation.epsilon == (value,)


def test_the_authors_numbers():
    found = load(ROOT / "configs/mnist_fgsm.yaml")
    assert (found.epsilon, found.method.alpha, found.schedule.max_lr) == (0.3, 0.375, 0.005)
    assert found.name == "mnist_fgsm" and found.optimizer.name == "adam" and found.model.name == "mnist_net"
    assert (found.phases[0].epochs, found.phases[0].batch_size) == (10, 100)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_of_the_project_is_valid(path):
    assert isinstance(load(path), Config)


def test_fractions_are_exact():
    rng = random.Random(1)
    for _ in range(100):
        a, b = rng.randint(-500, 500), rng.randint(1, 500)
        assert parse_number(f"{a}/{b}") == float(Fraction(a, b)) == a / b
    assert parse_number("123.675 / 255") == 123.675 / 255


@pytest.mark.parametrize(
    "epsilon, text", [(0.3, "0.3"), (0.2, "0.2"), (8 / 255, "8/255"), (1.0, "1"), (0.0, "0"), (0.5 / 255, "0.00196078")]
)
def test_epsilon_is_described_as_people_write_it(epsilon, text):
    assert describe(epsilon) == text


# ---- defaults


def test_every_default_is_resolved(file):
    found = load(file)
    epsilon = 8 / 255
    assert found.name == "minimal" and found.output == "runs" and found.seed == 0
    assert found.device == "auto" and found.engine == "auto" and found.precision == "auto"
    assert found.epsilon_warmup == 0
    assert found.method.init == "random" and found.method.attack_batchnorm == "train"
    assert found.method.alpha == pytest.approx(10 / 255)
    assert found.model.mean == (0.4914, 0.4822, 0.4465) and found.model.std == (0.2471, 0.2435, 0.2616)
    assert (found.optimizer.momentum, found.optimizer.weight_decay) == (0.9, 5e-4)
    assert found.optimizer.decay_batchnorm is True
    assert found.schedule.peak == 0.4
    assert (found.phases[0].resolution, found.phases[0].resize) == (32, 32)
    assert (found.guard.action, found.guard.steps, found.guard.drop) == ("stop", 5, 0.2)
    assert found.guard.alpha == pytest.approx(2 / 255)
    assert found.evaluation.epsilon == (epsilon,)
    assert (found.evaluation.steps, found.evaluation.restarts) == (50, 10)
    assert (found.data.augment.crop, found.data.augment.padding, found.data.augment.flip) == ("none", 4, False)
    assert found.epochs == 15 and found.replays == 1


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("{name: fgsm, init: zero}", {"alpha": 0.125, "init": "zero", "ibp_weight": 0}),
        ("{name: n_fgsm}", {"alpha": 0.1, "noise": 2.0}),
        ("{name: pgd, alpha: 0.02}", {"steps": 7, "init": "random", "skip_misclassified": False}),
        ("{name: free}", {"replays": 8}),
        ("{name: fgsm, alpha: 16/255}", {"alpha": 16 / 255}),
        ("{name: n_fgsm, alpha: 0.05, noise: 1}", {"alpha": 0.05, "noise": 1.0}),
        ("{name: fgsm_uap}", {"alpha": 0.125}),
        ("{name: class_uap}", {"alpha": 0.125}),
        ("{name: liet, every: 7}", {"noise": 2, "every": 7, "consistency": 20}),
        ("{name: trades}", {"alpha": 0.025, "steps": 10}),
        ("{name: n_aaer}", {"alpha": 0.1}),
        ("{name: rs_cs}", {"alpha": 0.1}),
        ("{name: sora}", {"alpha": 0.2}),
        ("{name: awp, of: {name: pgd, alpha: 0.02}}", {"gamma": 0.01, "updates_per_batch": 1}),
    ],
)
def test_defaults_of_the_methods(file, method, expected):
    found = load(file, ["epsilon=0.1", f"method={method}"])
    for key, value in expected.items():
        assert getattr(found.method, key) == pytest.approx(value), key


def test_normalisation_and_size_follow_the_data_set(file):
    for dataset in ("mnist", "fashion_mnist"):
        found = load(file, [f"data.dataset={dataset}"])
        assert (found.model.mean, found.model.std) == ((0.0,), (1.0,))
        assert (found.phases[0].resolution, found.phases[0].resize) == (28, 28)
    found = load(file, [*FOLDER, "phases.0.resolution=96"])
    assert found.model.mean == (0.485, 0.456, 0.406) and found.model.std == (0.229, 0.224, 0.225)
    assert (found.phases[0].resolution, found.phases[0].resize) == (96, 96)
    own = load(file, ["model.mean=[0.5, 0.4, 0.3]", "model.std=[1/4, 1/4, 1/5]"])
    assert own.model.mean == (0.5, 0.4, 0.3) and own.model.std == (0.25, 0.25, 0.2)


def test_resolved_defaults_are_not_shared_between_configs(file):
    one, other = load(file), load(file, ["epsilon=0.2"])
    assert one.guard.alpha == pytest.approx(2 / 255) and other.guard.alpha == pytest.approx(0.05)
    assert one.evaluation.epsilon == (8 / 255,) and other.evaluation.epsilon == (0.2,)
    assert Guard().alpha is None and Evaluation().epsilon is None


def test_the_step_size_of_the_evaluation_is_resolved_for_each_radius(file):
    """A quarter of each radius; one value is for all; as many as there are radii are one for each, in their order."""
    radii = "evaluation.epsilon=[0.2, 8/255, 0.1]"
    for given, expected in (
        ((), (0.05, 2 / 255, 0.025)),
        (("evaluation.alpha=0.01",), (0.01, 0.01, 0.01)),
        (("evaluation.alpha=[1/255, 0.03, 0.02]",), (1 / 255, 0.03, 0.02)),
    ):
        found = load(file, [radii, *given]).evaluation
        assert found.alpha == pytest.approx(expected)
        assert [found.alpha_at(epsilon) for epsilon in (0.2, 8 / 255, 0.1)] == list(found.alpha)
        assert found.alpha_at(0.3) == pytest.approx(0.075)  # a radius of the command line
    found = load(file).evaluation
    assert found.alpha == (2 / 255,) and found.alpha_at(8 / 255) == 2 / 255
    assert load(file, ["evaluation.alpha=0.004"]).evaluation.alpha_at(8 / 255) == 0.004


@pytest.mark.parametrize(
    ("epsilon", "alpha", "counts"),
    [("[0.2, 0.1]", "[0.1, 0.2, 0.3]", "3 values for the 2"), ("0.2", "[0.1, 0.2]", "2 values for the 1")],
)
def test_as_many_step_sizes_as_radii_or_one(file, epsilon, alpha, counts):
    text = refusal(file, f"evaluation.epsilon={epsilon}", f"evaluation.alpha={alpha}")
    assert f"evaluation.alpha has {counts} of evaluation.epsilon: give one value, or one for each radius" in text


def test_passes_over_the_data_are_epochs_divided_by_replays(file):
    table = [("{name: free, replays: 8}", 15, 2), ("{name: free, replays: 4}", 16, 4), ("{name: free}", 1, 1)]
    for method, epochs, passes in [*table, ("{name: fgsm}", 15, 15)]:
        found = load(file, [f"method={method}", f"phases.0.epochs={epochs}"])
        assert found.passes(found.phases[0]) == passes and found.epochs == epochs


# ---- there and back


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("method={name: pgd, alpha: 2/255, steps: 8, skip_misclassified: true}", "precision=bf16", "epsilon_warmup=5"),
        ("method={name: free, replays: 4}", "optimizer={name: adam, weight_decay: 1e-05}", "guard.action='off'"),
        ("method={name: n_fgsm}", "schedule={name: multistep, lr: 1/3, milestones: [1/2, 3/4], factor: 0.1}"),
        ("method={name: standard}", "schedule={name: points, points: [[0, 0], [5, 0.1], [5, 1e-7], [15, 0]]}"),
        (
            *FOLDER,
            "data.augment={crop: random_resized, flip: true}",
            "phases.0={epochs: 2, batch_size: 8, resolution: 64, resize: 80}",
            "name=1e5",
            "output='null'",
            "evaluation={epsilon: [2/255, 4/255], alpha: 1/255}",
        ),
    ],
)
def test_to_yaml_and_back_is_the_same(file, tmp_path, overrides):
    found = load(file, overrides)
    copy = tmp_path / "stored.yaml"
    copy.write_text(found.to_yaml())
    again = load(copy)
    assert again == found and reading.differences(found, again) == []
    assert again.to_yaml() == found.to_yaml()
    assert reading.parse(found.to_dict(), "dict") == found


def test_differences_name_what_differs(file):
    assert reading.differences(load(file), load(file)) == []
    lines = reading.differences(load(file), load(file, ["seed=3", "phases.0.epochs=30"]))
    assert sorted(lines) == ["phases.0.epochs: 15 in one, 30 in the other", "seed: 0 in one, 3 in the other"]
    lines = reading.differences(load(file), load(file, ["method={name: free, replays: 4}"]))
    assert any(line.startswith("method.name: fgsm in one, free") for line in lines)
    assert "method.replays: absent in one, 4 in the other" in lines
    assert any(line.startswith("method.alpha:") and line.endswith("absent in the other") for line in lines)
    longer = MINIMAL + "  - {epochs: 5, batch_size: 64}\n"
    file.with_name("longer.yaml").write_text(longer)
    lines = reading.differences(load(file), load(file.with_name("longer.yaml"), ["name=minimal"]))
    assert "phases.1.epochs: absent in one, 5 in the other" in lines


def test_what_a_run_chooses_is_no_difference(file):
    """Nor is it one that a config leaves the choice and the other is what was chosen, whichever comes first."""
    chosen = ["loader=ffcv", "engine=cuda_graph", "data.prepared=somewhere"]
    pair = load(file), load(file, chosen)
    for a, b in (pair, reversed(pair)):
        assert reading.differences(a, b) == []
    other = load(file, ["loader=torch", "engine=eager", "data.prepared=elsewhere"])
    assert reading.differences(pair[1], other, ("then", "now")) == [
        "data.prepared: somewhere then, elsewhere now",
        "engine: cuda_graph then, eager now",
        "loader: ffcv then, torch now",
    ]
    assert reading.differences(pair[0], load(file, [*chosen, "seed=1"])) == ["seed: 0 in one, 1 in the other"]
    assert reading.differences(load(file, ["device=auto"]), load(file, ["device=cpu"])) == [
        "device: auto in one, cpu in the other"  # only these three are chosen by a run
    ]


# ---- overrides


def test_overrides(file):
    found = load(
        file,
        ["seed=4", "phases.0.batch_size=64", "data.augment.crop=pad", "data.augment.flip=true", "name=other",
         "data.limit=9", "data.path=a=b", "evaluation.epsilon=4/255", "phases.0.epochs=2", "phases.0.epochs=3"],
    )  # fmt: skip
    assert found.seed == 4 and found.name == "other" and found.data.path == "a=b" and found.data.limit == 9
    assert found.phases[0].batch_size == 64 and found.phases[0].epochs == 3  # the last one wins
    assert found.data.augment.crop == "pad" and found.data.augment.flip is True
    assert found.evaluation.epsilon == (4 / 255,)
    assert found.model == load(file).model


def test_an_override_reaches_one_item_of_a_list(file):
    file.write_text(MINIMAL + "  - {epochs: 5, batch_size: 64}\n")
    found = load(file, ["phases.1.epochs=7"])
    assert [phase.epochs for phase in found.phases] == [15, 7]
    assert load(file, ["phases.1={epochs: 1, batch_size: 2}"]).phases[1].batch_size == 2


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed", "'seed' is not of the form key=value"),
        ("=3", "'=3' is not of the form key=value"),
        ("", "is not of the form key=value"),
        ("epsilon.x=3", "'epsilon' holds a value, not a section"),
        ("name.a.b=3", "'name'|unknown key 'name"),
        ("phases.1.epochs=3", "'1' must be a number from 0 to 0"),
        ("phases.-1.epochs=3", "'-1' must be a number from 0 to 0"),
        ("phases.x=3", "'x' must be a number from 0 to 0"),
        ("phases.epochs=3", "'epochs' must be a number from 0 to 0"),
        ("data={dataset: mnist", "is not valid YAML"),
        ("method.alhpa=0.1", "'method.alhpa'; did you mean 'method.alpha'"),
        ("scheduler.max_lr=0.1", "unknown key 'scheduler'; did you mean 'schedule'"),
        ("data=mnist", "data: "),
        ("phases=3", "phases: "),
        ("seed=1.5", "seed: "),
        ("seed=-1", "seed: "),
        ("seed=true", "seed: "),
        ("epsilon=", "epsilon: .*None"),
        ("model.mean.x=1", "model.mean"),
    ],
)
def test_wrong_overrides(file, override, words):
    assert re.search(words, refusal(file, override), re.DOTALL)
