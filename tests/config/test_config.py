"""Tests of fastrobust.config: what is filled in, what comes back from a file, and how each mistake is answered."""

import random
import re
import time
from fractions import Fraction
from pathlib import Path

import pytest
import yaml

from fastrobust.config import reading
from fastrobust.config.numbers import parse_number
from fastrobust.config.reading import load
from fastrobust.config.schema import Config, Evaluation, Guard
from fastrobust.runtime.errors import ConfigError
from tests.stress.fuzz import mutate_text

ROOT = Path(__file__).parents[2]
MINIMAL = """\
epsilon: 8/255
data: {dataset: cifar10}
model: {name: preact_resnet18}
method: {name: fgsm}
optimizer: {name: sgd}
schedule: {name: cyclic, max_lr: 0.2}
phases:
  - {epochs: 15, batch_size: 128}
"""
FOLDER = ("data.dataset=image_folder", "data.path=somewhere", "model.name=resnet50")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "minimal.yaml"
    path.write_text(MINIMAL)
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    return str(caught.value)


def refusal_of_text(path: Path, text: str) -> str:
    path.write_text(text)
    return refusal(path)


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


# ---- defaults


def test_every_default_is_resolved(file):
    found = load(file)
    epsilon = 8 / 255
    assert found.name == "minimal" and found.output == "runs" and found.seed == 0
    assert found.device == "auto" and found.engine == "auto" and found.precision == "fp32"
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


# ---- mistakes and their answers


@pytest.mark.parametrize(
    ("wrong", "key", "near"),
    [
        ("method.alhpa=0.1", "method.alhpa", "method.alpha"),
        ("epochs=3", "epochs", "phases.0.epochs"),
        ("max_lr=3", "max_lr", "schedule.max_lr"),
        ("padding=3", "padding", "data.augment.padding"),
        ("scheduler={name: cyclic}", "scheduler", "schedule"),
        ("epslion=0.1", "epslion", "epsilon"),
        ("data.augment.crops=pad", "data.augment.crops", "data.augment.crop"),
        ("phases.0.batchsize=3", "phases.0.batchsize", "phases.0.batch_size"),
        ("optimizer.momentun=0.9", "optimizer.momentun", "optimizer.momentum"),
        ("evaluation.restart=3", "evaluation.restart", "evaluation.restarts"),
        ("guard.stpes=3", "guard.stpes", "guard.steps"),
    ],
)
def test_an_unknown_key_names_the_nearest(file, wrong, key, near):
    assert f"unknown key '{key}'; did you mean '{near}'?" in refusal(file, wrong)


def test_an_unknown_key_like_no_other_lists_the_keys_there(file):
    text = refusal(file, "model.zzzzzz=1")
    assert "unknown key 'model.zzzzzz'" in text and "name, mean, std" in text


@pytest.mark.parametrize(
    ("wrong", "key", "near"),
    [
        ("method.name=fgms", "method", "fgsm"),
        ("method.init=previus", "method.init", "previous"),
        ("data.dataset=cifar", "data.dataset", "cifar10"),
        ("data.augment.crop=padd", "data.augment.crop", "pad"),
        ("precision=fp61", "precision", "fp16"),
        ("schedule={name: multi_step, lr: 0.1}", "schedule", "multistep"),
        ("optimizer.name=sdg", "optimizer", "sgd"),
        ("guard.action=stopp", "guard.action", "stop"),
        ("method.attack_batchnorm=evl", "method.attack_batchnorm", "eval"),
    ],
)
def test_a_wrong_choice_names_the_nearest(file, wrong, key, near):
    text = refusal(file, wrong)
    assert re.search(rf"^  {re.escape(key)}: '.*' is not one of .*; did you mean '{near}'\?$", text, re.MULTILINE), text


@pytest.mark.parametrize("key", ["epsilon", "method.alpha", "guard.alpha", "evaluation.alpha", "evaluation.epsilon"])
@pytest.mark.parametrize("value", [8, 2])
def test_pixels_on_the_scale_of_255(file, key, value):
    text = refusal(file, f"{key}={value}")
    assert key in text and f"did you mean {value}/255?" in text


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("epsilon=-0.1", "epsilon"),
        ("epsilon=.nan", "epsilon"),
        ("epsilon=nan", "epsilon"),
        ("epsilon=.inf", "epsilon"),
        ("epsilon=8/0", "epsilon"),
        ("epsilon=eight", "epsilon"),
        ("epsilon=true", "epsilon"),
        ("epsilon=[0.1]", "epsilon"),
        ("epsilon=0", "epsilon"),
        ("schedule.max_lr=0", "schedule.max_lr"),
        ("schedule.max_lr=nan", "schedule.max_lr"),
        ("schedule.max_lr=1e999", "schedule.max_lr"),
        ("schedule.peak=1", "schedule.peak"),
        ("optimizer.momentum=1", "optimizer.momentum"),
        ("optimizer.weight_decay=-1e-4", "optimizer.weight_decay"),
        ("phases.0.epochs=0", "phases.0.epochs"),
        ("phases.0.epochs=1.5", "phases.0.epochs"),
        ("phases.0.epochs='3'", "phases.0.epochs"),
        ("phases.0.batch_size=true", "phases.0.batch_size"),
        ("phases=[]", "phases"),
        ("guard.drop=0", "guard.drop"),
        ("evaluation.epsilon=[]", "evaluation.epsilon"),
        ("evaluation.restarts=0", "evaluation.restarts"),
        ("model.std=[0, 1, 1]", "model.std"),
        ("model.mean=[0.5]", "model.mean"),
        ("model.mean=[125, 125, 125]", "model.mean"),
        ("method={name: pgd}", "method.alpha"),
        ("method={name: free, replays: 0}", "method.replays"),
        ("method={alpha: 0.1}", "method"),
        ("method={name: n_fgsm, noise: 0}", "method.noise"),
        ("schedule={name: multistep, lr: 0.1, milestones: [100, 150]}", "schedule.milestones"),
        ("schedule={name: multistep, lr: 0.1, milestones: [1.0]}", "schedule.milestones"),
        ("schedule={name: points, points: [[0, 1]]}", "schedule.points"),
        ("schedule={name: points, points: [[0, 1], [9, 1], [3, 1], [15, 0]]}", "schedule"),
        ("schedule={name: points, points: [[0, 1], [15, -1]]}", "schedule.points"),
        ("name=a b", "name"),
        ("name=../up", "name"),
        ("device=gpu", "device"),
        ("data.download=maybe", "data.download"),
        ("data.limit=0", "data.limit"),
        ("epsilon_warmup=-1", "epsilon_warmup"),
        ("epsilon_warmup=15.5", "epsilon_warmup"),
        ("epsilon_warmup=nan", "epsilon_warmup"),
        ("engine=cudagraph", "engine"),
    ],
)
def test_a_wrong_value_is_refused_with_its_key(file, override, key):
    assert key in refusal(file, override).replace(str(file), "")


@pytest.mark.parametrize("key", ["epsilon", "data", "model", "method", "optimizer", "schedule", "phases"])
def test_a_missing_key_is_named(file, key):
    data = yaml.safe_load(MINIMAL)
    del data[key]
    assert f"{key}: this key is needed" in refusal_of_text(file, yaml.safe_dump(data))


def test_a_missing_key_inside_a_section_is_named(file):
    assert "data.dataset: this key is needed" in refusal(file, "data={flip: true}")
    assert "schedule.max_lr: this key is needed" in refusal(file, "schedule={name: cyclic}")
    assert "phases.0.batch_size: this key is needed" in refusal(file, "phases=[{epochs: 3}]")
    assert "method: this section needs a `name`" in refusal(file, "method={}")


def test_several_mistakes_are_all_told(file):
    text = refusal(file, "epsilon=8", "seed=-1", "data.dataset=cifar")
    assert "epsilon: " in text and "seed: " in text and "data.dataset: " in text and str(file) in text


def test_points_must_reach_the_end(file):
    text = refusal(file, "schedule={name: points, points: [[0, 0], [14, 0.1]]}")
    assert "schedule.points end at epoch 14, but the phases last 15 epochs" in text
    for end in (15, 20):
        assert load(file, [f"schedule={{name: points, points: [[0, 0], [{end}, 0.1]]}}"]).schedule.name == "points"


def test_resolutions_of_the_phases(file):
    assert "phases.0.resolution is needed for image_folder" in refusal(file, *FOLDER)
    assert "phases.0.resize is 40, but cifar10 images are 32" in refusal(file, "phases.0.resize=40")
    text = refusal(file, *FOLDER, "phases.0.resolution=128", "phases.0.resize=160")
    assert "a resolution of 128 out of images of 160" in text and "data.augment.crop: random_resized" in text
    assert "random_resized" in refusal(file, "phases.0.resolution=24")
    crop = "data.augment.crop=random_resized"
    assert load(file, [crop, "phases.0.resolution=24"]).phases[0].resize == 32
    phases = "phases=[{epochs: 1, batch_size: 2, resolution: 8}, {epochs: 1, batch_size: 2}]"
    assert "phases.1.resolution is needed" in refusal(file, *FOLDER, crop, phases)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (MINIMAL + "epsilon: 0.1\n", "the key 'epsilon' appears twice.*line 9"),
        (MINIMAL.replace("{name: fgsm}", "{name: fgsm, name: pgd}"), "the key 'name' appears twice"),
        ("epsilon: [1, 2\n", "is not valid YAML"),
        ("a: b: c\n", "is not valid YAML"),
        ("\tepsilon: 1\n", "is not valid YAML"),
        ("- 1\n- 2\n", "must hold `key: value` lines, found list"),
        ("just words\n", "must hold `key: value` lines, found str"),
        ("", "must hold `key: value` lines, found NoneType"),
        ("# a comment\n", "must hold `key: value` lines, found NoneType"),
        (MINIMAL + "a: !!python/object/apply:os.getcwd []\n", "is not valid YAML"),
        (MINIMAL + "? [1, 2]\n: 3\n", "keys must be plain words"),
        (MINIMAL + "---\n" + MINIMAL, "is not valid YAML"),
        (MINIMAL + "5: 3\n", "5: keys should be strings"),
    ],
)
def test_files_that_are_no_config(file, text, words):
    found = refusal_of_text(file, text)
    assert re.search(words, found, re.DOTALL) and str(file) in found


def test_a_missing_file_names_the_nearest(file, monkeypatch):
    assert f"did you mean {file}?" in refusal(file.with_name("minimul.yaml"))
    assert "does not exist" in refusal(file.parent / "no" / "such" / "place.yaml")
    monkeypatch.chdir(file.parent)
    file.with_name("other.yaml").write_text(MINIMAL)
    assert "zzzzzzzz.yml does not exist; there are: minimal.yaml, other.yaml" in refusal(Path("zzzzzzzz.yml"))
    assert "did you mean other.yaml?" in refusal(Path("othr.yaml"))


def test_files_that_cannot_be_read(file):
    assert "cannot be read" in refusal(file.parent)
    file.write_bytes(bytes(range(256)))
    assert "cannot be read" in refusal(file)
    file.write_bytes(b"epsilon: 0.1\x00\n")
    assert "is not valid YAML" in refusal(file)


def test_sections_do_not_take_another_methods_keys(file):
    assert "unknown key 'method.replays'" in refusal(file, "method.replays=3")
    assert "unknown key 'optimizer.momentum'" in refusal(file, "optimizer={name: adam, momentum: 0.9}")


# ---- odd input


def test_off_can_be_written_without_quotes(file):
    assert load(file, ["guard.action=off"]).guard.action == "off"
    file.write_text(MINIMAL + "guard: {action: off}\n")
    assert load(file).guard.action == "off"


@pytest.mark.parametrize(
    "line",
    [
        "a: !!timestamp x",
        "a: 2001-99-99",
        "a: !!map [x]",
        "a: !!set [1]",
        "a: !!bool x",
        'a: !!int ""',
        'a: !!float ""',
    ],
)
def test_tags_that_pyyaml_stumbles_over(file, line):
    assert "is not valid YAML" in refusal_of_text(file, MINIMAL + line + "\n")


@pytest.mark.parametrize(
    "override",
    [
        "name=2001-99-99",
        "method.alpha=!!bool x",
        'seed=!!int ""',
        "seed=" + "1" * 5000,
        "name=" + "[" * 500,
        "phases.²=1",
        "phases.²={}",
        "epsilon=" + "1" * 400 + "/1",
        "data={dataset: mnist, dataset: cifar10}",
    ],
)
def test_odd_overrides_are_config_errors(file, override):
    assert refusal(file, override)


@pytest.mark.parametrize(
    "override",
    ["method.replays=3", "method.steps=3", "optimizer={name: adam, momentum: 0.9}"],
)
def test_another_methods_key_is_not_recommended_against_itself(file, override):
    text = refusal(file, override)
    key = re.search(r"unknown key '([\w.]+)'", text).group(1)
    assert f"did you mean '{key}'" not in text


@pytest.mark.parametrize(
    "override",
    ["phases.0.epohcs=1", "evaluation.epsilon=8", "phases.0.epochs=0"],
)
def test_one_mistake_in_a_list_is_told_once(file, override):
    assert "at least 1 item" not in refusal(file, override)


# ---- hostile YAML


def bomb(levels: int) -> str:
    """A few lines whose last value, a9, holds 9 ** levels numbers."""
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]
    return "\n".join(lines) + "\n"


def without(key: str) -> str:
    """MINIMAL without one of its keys."""
    return yaml.safe_dump({name: value for name, value in yaml.safe_load(MINIMAL).items() if name != key})


@pytest.mark.parametrize("key", ["name", "precision", "epsilon", "method", "phases", "model", "other"])
def test_a_document_that_aliases_blow_up_is_refused_at_once(file, key):
    before = time.process_time()
    text = refusal_of_text(file, bomb(10) + without(key) + f"{key}: *a9\n")
    assert "is not valid YAML: with its aliases written out it has more than 10000 values" in text
    assert time.process_time() - before < 2


@pytest.mark.parametrize("line", ["other: &a [*a]", "name: &a {b: *a}", "phases: &a [*a]"])
def test_a_value_inside_itself_is_refused(file, line):
    assert "is not valid YAML" in refusal_of_text(file, without(line.partition(":")[0]) + line + "\n")


def test_aliases_are_fine_as_such(file):
    file.write_text(MINIMAL + "evaluation: {epsilon: [&e 0.1, *e]}\n")
    assert load(file).evaluation.epsilon == (0.1, 0.1)


def test_a_number_too_long_to_write_is_refused(file):
    """YAML 1.1 reads 59:59:... as base 60, past the limit that Python sets for decimal digits."""
    text = refusal_of_text(file, MINIMAL + "seed: " + ":".join(["59"] * 5000) + "\n")
    assert "seed: input should be less than 2147483648, got a number of thousands of digits" in text


def test_messages_stay_short(file):
    text = refusal_of_text(file, MINIMAL + "".join(f"k{i}: 1\n" for i in range(500)))
    assert "and 480 more" in text and len(text) < 8000
    assert "at most 200 characters" in refusal_of_text(file, MINIMAL + f"name: {'a' * 300}\n")
    assert len(refusal_of_text(file, MINIMAL + f"precision: {'a' * 30_000}\n")) < 1000


# ---- noise


def test_random_edits_give_a_config_or_a_config_error(file):
    original = (ROOT / "configs/mnist_fgsm.yaml").read_bytes()
    rng = random.Random(0)
    good = bad = 0
    for _ in range(300):
        file.write_bytes(mutate_text(original, rng))
        try:
            found = load(file)
        except ConfigError as error:
            assert str(error).startswith((str(file), "config file"))
            bad += 1
        else:
            assert 0 < found.epsilon <= 1 and reading.parse(found.to_dict(), "again") == found
            good += 1
    assert good > 20 and bad > 100


def test_fractions_are_exact():
    rng = random.Random(1)
    for _ in range(100):
        a, b = rng.randint(-500, 500), rng.randint(1, 500)
        assert parse_number(f"{a}/{b}") == float(Fraction(a, b)) == a / b
