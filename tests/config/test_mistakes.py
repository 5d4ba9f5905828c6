"""Tests of the answers to mistakes in a config: each names the key and the nearest right one."""

import re
from pathlib import Path

import pytest
import yaml
from config_files import FOLDER, MINIMAL, refusal, refusal_of_text

from fastrobust.config.reading import load


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "minimal.yaml"
    path.write_text(MINIMAL)
    return path


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
        ("optimizer.lr=0.1", "optimizer.lr", "schedule.max_lr"),  # a key of the schedule that this config has
        ("schedule.lr=0.1", "schedule.lr", "schedule.max_lr"),
        ("num_workers=2", "num_workers", "data.workers"),
    ],
)
def test_an_unknown_key_names_the_nearest(file, wrong, key, near):
    assert f"unknown key '{key}'; did you mean '{near}'?" in refusal(file, wrong)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("averaging=true", "averaging={} for its defaults, or its keys, such as averaging.decay"),
        ("guard=off", "guard.action=off"),
        ("model=resnet18", "model.name=resnet18"),
        ("data=mnist", "data.dataset=mnist"),
        ("data=birds", "data.path=birds"),
        ("phases=3", "phases.0.epochs=3"),
        ("method=fgsm", "method.name=fgsm"),
        ("method={name: awp, of: fgsm}", "method.of.name=fgsm"),
        ("method=", "its keys, such as method.name"),
        ("schedule=0.1", "schedule.max_lr=0.1"),
    ],
)
def test_a_section_that_is_given_as_a_value_tells_its_form(file, wrong, right):
    key = wrong.partition("=")[0]
    assert re.search(rf"  {key}.*: this is a section .*: write {re.escape(right)}$", refusal(file, wrong)), wrong


def test_a_list_and_a_section_of_options_are_told_in_words(file):
    assert "logging: input should be a valid list, got 3" in refusal(file, "logging=3")
    assert "model.options: input should be a valid section, got 3" in refusal(file, "model.options=3")


def test_an_unknown_key_like_no_other_lists_the_keys_there(file):
    text = refusal(file, "model.zzzzzz=1")
    assert "unknown key 'model.zzzzzz'" in text and "name, options, weights, mean, std" in text


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


@pytest.mark.parametrize(
    ("wrong", "meaning"),
    [
        ("method={name: pgd}", "method.alpha: this key is needed (step size)"),
        ("method={name: awp, of: {name: pgd}}", "method.of.alpha: this key is needed (step size)"),
        ("schedule={name: multistep}", "schedule.lr: this key is needed (the first rate)"),
        ("schedule={name: cosine}", "schedule.max_lr: this key is needed (the highest rate)"),
        ("phases=[{epochs: 3}]", "phases.0.batch_size: this key is needed (images in a batch, of all processes together)"),
        ("padding=3", "did you mean 'data.augment.padding'? (width of the border of `pad`)"),
        ("data.balanced=true", "'data.balance'? (every class comes equally often, whatever the number of its images)"),
        ("held_out=3", "'data.held_out'? (so many training images, the same number of each class, are never trained on)"),
    ],
)
def test_the_meaning_of_a_key_is_told(file, wrong, meaning):
    lines = refusal(file, wrong).splitlines()
    assert any(line.endswith(meaning) for line in lines), lines


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
        ("method={name: awp}", "method.of: this key is needed"),
        ("method={name: awp, of: {name: trades, beta: x}}", "method.of.beta"),
        ("method={name: awp, of: {name: trades, bete: 1}}", "did you mean 'method.of.beta'"),
        ("method={name: awp, of: {name: awp, of: {name: fgsm}}}", "method.of is awp again"),
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
    first, _, lines = refusal(file, override).partition("\n")
    assert first == f"{file} with {override}:" and key in lines


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
    assert all(f"  {key}: " in text for key in ("epsilon", "seed", "data.dataset"))
    assert text.startswith(f"{file} with epsilon=8 seed=-1 data.dataset=cifar:")  # the file may be right


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
    (folder := file.with_suffix("")).mkdir()
    assert f"cannot be read: it is a folder; did you mean {file}?" in refusal(folder)
    assert "it is a folder: give a YAML file" in refusal(file.parent)
    (folder / "config.yaml").write_text(MINIMAL)
    assert f"`fastrobust train --resume {folder}`" in refusal(folder) and load(folder / "config.yaml")
    file.write_bytes(bytes(range(256)))
    assert "cannot be read" in refusal(file)
    file.write_bytes(b"epsilon: 0.1\x00\n")
    assert "is not valid YAML" in refusal(file)


def test_sections_do_not_take_another_methods_keys(file):
    there = "the keys there are: name, attack_batchnorm, init"
    assert f"unknown key 'method.replays', which belongs to another `name`; {there}" in refusal(file, "method.replays=3")
    assert "unknown key 'optimizer.momentum'" in refusal(file, "optimizer={name: adam, momentum: 0.9}")


@pytest.mark.parametrize("wrong", ["device=mps", "device=meta", "device=cuda:x", "name=a/b", "name=.hidden", "name=''"])
def test_words_that_are_none_are_refused_in_words(file, wrong):
    text = refusal(file, wrong)
    assert re.search(r"  (device|name): '.*' is (none of auto, cpu|no name for a folder)", text) and "pattern" not in text


def test_places_are_written_out_and_none_is_a_folder_of_that_name(file, monkeypatch):
    """A folder called `~` is one `rm -r ~` away from the end of a home."""
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DISK", "/disk")
    found = load(file, ["output=~/runs", "data.path=$DISK/photos", "data.prepared=${DISK}/made"])
    assert (found.output, found.data.path, found.data.prepared) == ("/home/me/runs", "/disk/photos", "/disk/made")
    assert "data.path: the environment variable ABSENT is not set" in refusal(file, "data.path=$ABSENT/x")
    assert "output: there is no home folder for '~nobody-here'" in refusal(file, "output=~nobody-here/runs")


def test_a_config_is_found_at_home_and_a_name_with_a_dollar_is_one_where_it_is_there(file, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(file.parent))
    assert load(f"~/{file.name}").name == load(file).name
    (odd := tmp_path / "a$b").mkdir()
    assert load(file, [f"data.path={odd}"]).data.path == str(odd)


def test_names_that_are_not_utf8_are_told_in_words(file, tmp_path, monkeypatch):
    """A config is text: what it names has to be text."""
    told = r"'.*nu\\udce9.*' is not UTF-8, and a config cannot hold it: rename it, or give a link to it with a plain name"
    for override in ("data.path=/tmp/nu\udce9dir", "output=nu\udce9", r'name="nu\udce9"', r'model.name="nu\udce9:make"'):
        assert re.search(told, text := refusal(file, override)) and text.encode(), override
    (folder := tmp_path / "nu\udce9").mkdir()
    (named := folder / "nu\udce9.yaml").write_bytes(file.read_bytes())
    assert re.search(told, refusal(named))
    monkeypatch.setenv("HOME", str(folder))
    assert re.search(f"data.path: {told}", refusal(file, "data.path=~/x"))
    monkeypatch.chdir(folder)
    assert re.search(f"model.weights: {told}", refusal(file, "model.weights=x"))  # a run stores it with the folder
    assert load(file, ["output=x", "data.path=/tmp/é"]).output == "x"
