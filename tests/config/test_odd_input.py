"""Tests of odd, hostile and damaged config files: each gives a config or a ConfigError, at once and in few words."""

import random
import re
import time

import pytest
import yaml
from config_files import MINIMAL, ROOT, refusal, refusal_of_text

from fastrobust.config import reading
from fastrobust.config.reading import load
from fastrobust.runtime.errors import ConfigError
from tests.stress.fuzz import mutate_text


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "minimal.yaml"
    path.write_text(MINIMAL)
    return path


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
    assert "up to 200 of" in refusal_of_text(file, MINIMAL + f"name: {'a' * 300}\n")
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
