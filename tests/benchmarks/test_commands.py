"""Every benchmark runs, on a small network and few images, and its figures belong together."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from benchmarks import epoch, evaluate, loader, measure, profile, step


@pytest.fixture
def call(monkeypatch, capsys):
    """call(module, *options) -> the line of JSON that the benchmark ends with."""
    monkeypatch.setattr(step, "MODEL", "preact_resnet18_w16")

    def made(module, *options) -> dict:
        monkeypatch.setattr("sys.argv", [module.__name__, "--device", "cpu", *map(str, options)])
        assert not module.main()
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return made


def test_a_step(call, tmp_path):
    result = call(step, "--quick", "--batch-size", 4, "--json", tmp_path / "step.json")
    assert result == json.loads((tmp_path / "step.json").read_text())
    assert result["model"] == "preact_resnet18_w16" and {"versions", "hardware", "commit"} <= result.keys()
    times = result["seconds_per_step"]
    assert times.keys() == {"standard eager fp32", "fgsm eager fp32", "usual loop fp32"}
    assert all(0 < t["min"] <= t["median"] <= t["max"] for t in times.values())
    fgsm, standard, usual = (times[name] for name in ("fgsm eager fp32", "standard eager fp32", "usual loop fp32"))
    assert fgsm["min"] / standard["max"] <= result["fgsm_over_standard"] <= fgsm["max"] / standard["min"]
    assert usual["min"] / fgsm["max"] <= result["speedup_over_usual_loop"] <= usual["max"] / fgsm["min"]


def test_an_epoch(call):
    result = call(epoch, "--quick", "--images", 16, "--batch-size", 4)
    times = {name: t["median"] for name, t in result["seconds_per_pass_of_50000"].items()}
    assert times.keys() == {"standard", "fgsm", "data", "usual loop"} and result["images_timed"] == 16
    for name, parts in result["split"].items():
        assert sum(parts.values()) == pytest.approx(times[name])


def test_a_profile(call):
    result = call(profile, "--batch-size", 4, "--steps", 1, "--method", "pgd-7")
    shares = [row["share"] for row in result["top"]]
    assert shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 1
    calls = {row["name"]: row["calls"] for row in result["top"]}
    assert calls["aten::convolution_backward"] == 8 * 20  # seven attack passes and the update, of 20 convolutions each


def test_annotations_are_no_kernels():
    """On a GPU the profiler lists an optimiser's step beside the kernels that it spans: counted twice, they would make more
    than the whole."""
    from torch.autograd import DeviceType

    event = lambda device, annotation: SimpleNamespace(device_type=device, is_user_annotation=annotation)
    kernel, copy = event(DeviceType.CUDA, False), event(DeviceType.CUDA, False)
    events = [kernel, event(DeviceType.CUDA, True), event(DeviceType.CPU, False), copy]
    assert profile.kernels(events, cuda=True) == [kernel, copy]
    assert profile.kernels(events, cuda=False) == events


def test_an_epoch_prepares_its_images_as_its_steps(call, monkeypatch):
    """Else what a graph saves in cropping would be subtracted from the update."""
    prepared, real = [], epoch.engine.prepare
    monkeypatch.setattr(epoch.engine, "prepare", lambda engine, *rest: prepared.append(engine) or real(engine, *rest))
    assert call(epoch, "--quick", "--images", 8, "--batch-size", 4)["engine"] == "eager"
    assert len(prepared) == 3 and set(prepared) == {"eager"}  # two methods, and the cropping alone


def test_an_evaluation_needs_no_data_set(call, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(evaluate, "there", lambda name: False)
    made = evaluate.generated
    monkeypatch.setattr(evaluate, "generated", lambda count, seed: made(min(count, 4000), seed))
    result = call(evaluate, "--quick", "--limit", 12)
    assert (result["examples"], result["dataset"], result["different_verdicts"]) == (12, "generated", 0)
    one, again, other = (made(50, seed).checksum() for seed in (1, 1, 2))
    assert one == again != other


def test_the_evaluation_agrees_with_a_plain_attack(call, finished_run):
    result = call(evaluate, "--quick", "--limit", 10, "--run", finished_run)
    assert (result["examples"], result["different_verdicts"], result["epsilon"]) == (10, 0, 0.1)
    assert 0 < result["robust_accuracy"] < 1


def test_loaders(call, monkeypatch, tmp_path):
    monkeypatch.setenv("FASTROBUST_DATA", str(tmp_path / "absent"))
    monkeypatch.setattr(loader, "PHASES", loader.PHASES[::3])  # the first, and the one without random crops
    result = call(loader, "--limit", 16, "--batch-size", 8, "--repetitions", 1, "--workers", 1)
    assert (result["images"], result["of"]) == (16, "generated images of 500 x 375")
    for size, crop, augment in loader.PHASES:
        phase = f"{size} to {crop}" + ("" if augment else ", middle")
        assert result["rows"][f"{phase}, DataLoader"]["over_DataLoader"] == 1
        assert result["rows"][f"{phase}, torch shards jpeg"]["median"] > 0


def test_a_wrong_option_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["loader", "--limit", "3"])
    assert loader.main() == 2
    monkeypatch.setattr("sys.argv", ["evaluate", "--run", str(tmp_path)])
    assert evaluate.main() == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "--limit" in lines[0] and str(tmp_path) in lines[1]


def test_rows_are_timed_in_turn():
    called = []
    rows = {name: lambda name=name: called.append(name) for name in "ab"}
    times = measure.interleaved(rows, step.torch.device("cpu"), repetitions=2, inner=2, lead=1)
    assert "".join(called) == "ab" + 2 * "aaabbb" and [len(t) for t in times.values()] == [2, 2]
    assert measure.ratio([2.0, 6.0, 3.0], [1.0, 2.0, 3.0]) == 2.0
