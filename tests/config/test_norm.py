"""The key `norm`: what a config without it means, and what radii and methods each norm takes."""

import pytest
from config_files import MINIMAL, refusal

from fastrobust.config import reading
from fastrobust.config.numbers import ball_in_words
from fastrobust.runtime.errors import ConfigError


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "minimal.yaml"
    path.write_text(MINIMAL)
    return path


def test_linf_is_the_default_and_is_stored(file):
    config = reading.load(file)
    assert config.norm == "linf" and config.to_dict()["norm"] == "linf" and "norm: linf" in config.to_yaml()
    assert config == reading.load(file, ["norm=linf"])
    stored = config.to_dict()
    del stored["norm"]  # as every run before the key stored it
    assert reading.parse(stored, "stored") == config and not reading.changed_since(stored, config)


def test_another_norm_is_another_run(file):
    stored = reading.load(file, ["epsilon=0.5"]).to_dict()
    assert reading.changed_since(stored, reading.load(file, ["epsilon=0.5", "norm=l2"])) == ["norm: linf then, l2 now"]


def test_l2_radii_and_step_sizes_may_be_above_1(file):
    changes = [
        "norm=l2",
        "epsilon=2",
        "evaluation.epsilon=[1.5, 3]",
        "evaluation.alpha=1.25",
        "guard.alpha=2",
        "method.alpha=4",
    ]
    config = reading.load(file, changes)
    assert (config.epsilon, config.evaluation.epsilon, config.method.alpha, config.guard.alpha) == (2, (1.5, 3), 4, 2)
    assert reading.parse(config.to_dict(), "stored") == config
    assert config.in_words().endswith("L2, epsilon 2")
    assert reading.load(file, ["norm=l2", "epsilon=2"]).method.alpha == 2.5


@pytest.mark.parametrize("key", ["epsilon", "evaluation.epsilon"])
def test_no_radius_is_larger_than_the_box(file, key):
    text = refusal(file, "norm=l2", f"{key}=128")
    assert f"{key} is 128, but no two images of 32 x 32 pixels are further apart than 55.43" in text
    assert "did you mean 128/255?" in text


def test_pixel_means_stay_in_the_pixel_range(file):
    assert "model.mean.0: 2 is larger than the pixel range" in refusal(file, "norm=l2", "model.mean=[2, 0, 0]")


def test_the_box_of_grey_images_is_smaller_and_known_later(file):
    changes = ["norm=l2", "epsilon=20", "data={dataset: image_folder, path: x}", "phases.0.resolution=16"]
    config = reading.load(file, changes)
    with pytest.raises(ConfigError, match="epsilon is 20, but no two images of 16 x 16 pixels are further apart than 16 in"):
        config.with_channels(1)
    assert config.with_channels(3).epsilon == 20


def test_what_needs_the_box_refuses_l2_by_name(file):
    text = refusal(file, "norm=l2", "epsilon=0.5", "method.ibp_weight=0.1")
    assert "norm is l2, but method.ibp_weight is for the L-infinity ball alone" in text
    assert reading.load(file, ["method.ibp_weight=0.1"]).norm == "linf"


@pytest.mark.parametrize("name", ["fgsm_uap", "class_uap", "liet", "fgsm_pgi", "sora", "gradalign"])
def test_methods_of_signs_refuse_l2_by_name(file, name):
    for method in (f"{{name: {name}}}", f"{{name: awp, of: {{name: {name}}}}}"):
        assert f"method {name} is for the L-infinity ball alone" in refusal(
            file, "norm=l2", "epsilon=0.5", f"method={method}"
        )


def test_an_unknown_norm_names_the_nearest(file):
    assert "norm: 'l22' is not one of 'linf' or 'l2'" in refusal(file, "norm=l22")
    assert "did you mean 'linf'" in refusal(file, "norm=lin")


def test_a_ball_in_words():
    assert ball_in_words(8 / 255) == "epsilon 8/255"
    assert ball_in_words(0.5, "l2") == "L2, epsilon 0.5" and ball_in_words(128 / 255, "l2") == "L2, epsilon 128/255"
