"""The report: what it measures against other ways to measure it, what it does with runs that are not whole, and the page
in a real browser."""

from __future__ import annotations

import html
import json
import math
import os
import re
import shutil
import subprocess

import pytest
import torch

from fastrobust.__main__ import main as cli
from fastrobust.attack.pgd import pgd
from fastrobust.attack.threat import Threat
from fastrobust.data import sets
from fastrobust.data.augment import to_unit
from fastrobust.evaluation import results
from fastrobust.models.weights import read_weights
from fastrobust.reporting import inspection, report
from fastrobust.reporting.stored import read_run

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def page(finished_run, tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("report") / "report.html"
    assert cli(["report", str(finished_run), "-o", str(file), "--limit", "60"]) == 0
    return file.read_text()


@pytest.mark.parametrize("k, n", [(0, 20), (20, 20), (7, 20), (896, 1000), (1, 100_000)])
def test_the_interval_inverts_the_score_test(k, n):
    """Wilson's bounds are the p at which the z statistic of k out of n is just 1.96."""
    for p in results.wilson(k, n):
        if 0 < p < 1:
            assert abs(k / n - p) / math.sqrt(p * (1 - p) / n) == pytest.approx(1.959964)
        else:
            assert p == k / n


def test_the_sweep_is_what_pgd_finds(finished_run, bars):
    model, _, _ = read_weights(finished_run)
    data = sets.load("image_folder", "test", bars, resolution=28, limit=80)
    seen = inspection.inspect(model, data, epsilon=0.08, seed=3)
    assert [e for e, _ in seen.radii] == pytest.approx([0, 0.02, 0.04, 0.08, 0.12, 0.16])
    for epsilon, robust in seen.radii[1:]:
        settings = {"threat": Threat(epsilon), "alpha": epsilon / 4, "steps": 10, "restarts": 1, "seed": 3}
        verdicts = pgd(model, data.images, data.labels, **settings)
        assert robust == verdicts.robust.sum()
    assert seen.radii[0][1] == verdicts.clean.sum() == seen.clean.sum()
    assert seen.robust.sum() == dict(seen.radii)[0.08]
    assert seen.radii[-1][1] < seen.radii[1][1]  # the attack bites
    assert len(seen.pictures) == inspection.PICTURES


@pytest.mark.parametrize("epsilon, radii", [(0.6, [0.15, 0.3, 0.6, 0.9, 1.0]), (0.8, [0.2, 0.4, 0.8, 1.0])])
def test_the_sweep_ends_where_the_ball_holds_the_whole_box(finished_run, bars, epsilon, radii):
    data = sets.load("image_folder", "test", bars, resolution=28, limit=20)
    seen = inspection.inspect(read_weights(finished_run)[0], data, epsilon=epsilon)
    assert [e for e, _ in seen.radii] == pytest.approx([0, *radii]) and seen.robust.sum() == dict(seen.radii)[epsilon]
    assert inspection.sweep(20.0, "l2", (1, 28, 28)) == [5.0, 10.0, 20.0, 28.0]


def test_pictures_hold_what_the_model_does(finished_run, bars):
    model, _, _ = read_weights(finished_run)
    data = sets.load("image_folder", "test", bars, resolution=28, limit=80)
    pictures = inspection.inspect(model, data, epsilon=0.2).pictures
    assert len({p.label for p in pictures}) == len(pictures)
    for p in pictures:
        first = next(i for i, label in enumerate(data.labels) if label == p.label)
        assert torch.equal(p.image, data.images[first])
        x = to_unit(p.image[None])
        assert p.delta.abs().max() <= 0.2 + 1e-6
        assert (x + p.delta).min() >= -1e-6 and (x + p.delta).max() <= 1 + 1e-6
        for z, predicted, sure in ((x, p.predicted, p.sure), (x + p.delta, p.adversarial, p.adversarial_sure)):
            probabilities = model(z).softmax(1)[0]
            assert predicted == probabilities.argmax() and sure == pytest.approx(probabilities.max().item(), rel=1e-3)
        z = x.clone().requires_grad_()
        torch.nn.functional.cross_entropy(model(z), torch.tensor([p.label])).backward()
        torch.testing.assert_close(p.gradient, z.grad[0], rtol=1e-3, atol=1e-7)
    assert any(p.adversarial != p.label for p in pictures)


def test_the_page_says_what_the_run_says(page, finished_run):
    summary = json.loads((finished_run / "summary.json").read_text())
    for e in summary["evaluations"]:
        assert f"{e['robust_accuracy']:.2%} <small>(" in page
        low, high = results.wilson(round(e["robust_accuracy"] * 200), 200)
        assert f"({low * 100:.1f} to {high * 100:.1f}, n = 200)" in page
    assert "on 60 test images" in page
    assert page.count("<figure>") == len(report.CURVES) + 1
    assert page.count('src="data:image/png') == 4 * inspection.PICTURES
    assert summary["versions"]["torch"] in page and "max_lr: 0.005" in page
    for what in ("http", "<script", '<link rel="style', "url("):
        assert what not in page


def test_runs_are_compared(finished_run, tmp_path):
    other = shutil.copytree(finished_run, tmp_path / "other")
    (other / "config.yaml").write_text((finished_run / "config.yaml").read_text().replace("max_lr: 0.005", "max_lr: 0.002"))
    assert cli(["report", str(finished_run), str(other), "--limit", "0", "-o", str(tmp_path / "r.html")]) == 0
    text = (tmp_path / "r.html").read_text()
    row = re.search(r"<tr><th>schedule.max_lr</th>(.*?)</tr>", text).group(1)
    assert re.findall(r"<td>(.*?)</td>", row) == ["0.005", "0.002"]
    assert "<tr><th>seed</th><td>0</td><td>0</td>" in text  # in the summary, not among the differences
    assert text.count("<figure>") == text.count("<img") == len(report.CURVES)


def test_a_folder_stands_for_all_runs_below_it(finished_run, tmp_path):
    for place in ("sweep/a", "sweep/b", "c"):
        shutil.copytree(finished_run, tmp_path / "runs" / place)
    shutil.copytree(finished_run, tmp_path / "runs" / "c" / "backup")  # a run is one, whatever is in it
    asked = ["--limit", "0", "-o", str(tmp_path / "r.html")]
    assert cli(["report", str(tmp_path / "runs" / "sweep"), str(tmp_path / "runs" / "c"), *asked]) == 0
    assert "<tr><th></th><th>a</th><th>b</th><th>c</th></tr>" in (tmp_path / "r.html").read_text()


def test_of_many_classes_the_weakest_are_listed(finished_run):
    one = read_run(finished_run)
    one.classes = tuple(f"class {i}" for i in range(30))
    labels = torch.arange(30).repeat(4)
    robust = torch.arange(120) // 30 < labels.flip(0) % 5  # of class 29 - k, k % 5 of 4, at most
    one.seen = inspection.Inspection(120, 0.1, [], torch.ones(120, dtype=torch.bool), robust, labels, [])
    card = report.class_card(one)
    listed = re.findall(r"<th>class (\d+)</th>", card)
    shares = {i: float(robust[labels == i].float().mean()) for i in range(30)}
    assert len(listed) == report.LISTED and "10 of 30 classes" in card
    assert max(shares[int(i)] for i in listed) <= sorted(shares.values())[report.LISTED - 1]


def test_an_unfinished_run_shows_what_it_has(finished_run, tmp_path):
    begun = shutil.copytree(finished_run, tmp_path / "begun")
    for name in ("summary.json", "model.safetensors"):
        (begun / name).unlink()
    lines = (begun / "metrics.jsonl").read_text().splitlines(keepends=True)
    (begun / "metrics.jsonl").write_text("".join(lines[:2]))
    assert cli(["report", str(begun), "-o", str(tmp_path / "r.html")]) == 0
    text = (tmp_path / "r.html").read_text()
    assert "is not finished" in text and "2 of 3 epochs so far" in text and "was not attacked here" in text
    (begun / "metrics.jsonl").unlink()
    assert cli(["report", str(begun), "-o", str(tmp_path / "r.html")]) == 0


def test_without_the_data_the_page_is_made_and_says_so(finished_run, tmp_path, capsys):
    nowhere = str(tmp_path / "nowhere")
    assert cli(["report", str(finished_run), "-o", str(tmp_path / "r.html"), "--data", nowhere]) == 0
    assert re.search("^warning: bars: no attacks were run for the page: .*nowhere", capsys.readouterr().err, re.S)
    assert "was not attacked here" in (tmp_path / "r.html").read_text()


def test_words_from_a_run_directory_are_only_text(finished_run, tmp_path):
    evil = shutil.copytree(finished_run, tmp_path / "<img src=x onerror=alert(1)>")
    summary = json.loads((evil / "summary.json").read_text())
    summary["stopped"] = summary["evaluations"][0]["attack"] = "<script>alert(1)</script>"
    (evil / "summary.json").write_text(json.dumps(summary))
    environment = {"versions": {"<script>": "</details><script>"}, "hardware": {"device": "<script>"}}
    (evil / "environment.json").write_text(json.dumps(environment))
    assert cli(["report", str(evil), "--limit", "0", "-o", str(tmp_path / "r.html")]) == 0
    text = (tmp_path / "r.html").read_text()
    assert "<script" not in text and "<img src" not in text and "&lt;script&gt;" in text


@pytest.mark.parametrize("name, content", [
    ("metrics.jsonl", "{\n"), ("metrics.jsonl", "[1]\n"), ("metrics.jsonl", "{}\n"), ("summary.json", "[]"),
    ("summary.json", "{}"), ("environment.json", "\xff"), ("config.yaml", "name: [\n"),
    ("summary.json", '{"clean_accuracy": "a", "evaluations": [], "train_seconds": 1, "stopped": null, "epochs": 1}'),
    ("metrics.jsonl", '{"epoch": "one", "seconds": "x"}\n'), ("environment.json", '{"versions": 1, "hardware": []}'),
])  # fmt: skip
def test_damaged_files_are_named(finished_run, tmp_path, capsys, name, content):
    damaged = shutil.copytree(finished_run, tmp_path / "damaged")
    (damaged / name).write_text(content, encoding="latin-1")
    assert cli(["report", str(damaged), "--limit", "0", "-o", str(tmp_path / "r.html")]) == 2
    message = capsys.readouterr().err
    assert name in message and "Traceback" not in message
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize("arguments", [["nowhere"], ["RUN", "-o", "/nowhere/r.html"]])
def test_bad_arguments_are_explained(finished_run, capsys, arguments):
    given = [str(finished_run) if a == "RUN" else a for a in arguments]
    assert cli(["report", *given, "--limit", "0"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_negative_number_of_images_is_explained(finished_run, capsys):
    with pytest.raises(SystemExit) as caught:
        cli(["report", str(finished_run), "--limit", "-1"])
    assert caught.value.code == 2
    assert "argument --limit: '-1' is not a whole number" in capsys.readouterr().err


# ---- in a browser


def browse(folder, page: str, width: int, script: str, dark: bool = False) -> tuple[dict, str]:
    """What `script` (the body of a function of the page's document and window) returns in a frame `width` pixels wide, and
    what the browser wrote to its console."""
    wrapper = folder / "wrapper.html"
    wrapper.write_text(
        f'<!doctype html><meta charset="utf-8"><body><iframe width="{width}" height="900" srcdoc="{html.escape(page)}">'
        "</iframe><pre id=found></pre><script>onload = () => { const w = frames[0], d = w.document; "
        f"document.getElementById('found').textContent = JSON.stringify((() => {{ {script} }})()); }}</script>"
    )
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    flags += ["--disable-background-networking", "--disable-component-update", "--enable-logging=stderr", "--dump-dom"]
    flags += [f"--user-data-dir={folder / 'profile'}", f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    environment = {**os.environ, "HOME": str(folder)}
    done = subprocess.run(
        [BROWSER, *flags, f"file://{wrapper}"], capture_output=True, text=True, timeout=90, env=environment
    )
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.S)
    assert found and found.group(1), done.stderr[-2000:]
    return json.loads(html.unescape(found.group(1))), "\n".join(x for x in done.stderr.splitlines() if "CONSOLE" in x)


LOOK = """
return {
  overflow: d.documentElement.scrollWidth - w.innerWidth,
  columns: getComputedStyle(d.querySelector('.grid')).gridTemplateColumns.split(' ').length,
  broken: [...d.images].filter(i => !i.complete || i.naturalWidth == 0).length,
  images: d.images.length,
  small: [...d.querySelectorAll('figure img')].filter(i => i.getBoundingClientRect().width < 250).length,
  behind: getComputedStyle(d.querySelector('figure')).backgroundColor,
  outside: [...d.querySelectorAll('.grid > *, h1, h2, p')]
    .filter(e => e.getBoundingClientRect().right > w.innerWidth).length,
  background: getComputedStyle(d.body).backgroundColor,
  text: getComputedStyle(d.body).color,
};"""


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("width, columns, dark", [(390, 1, False), (1280, 3, True)])
def test_the_page_in_a_browser(page, tmp_path, width, columns, dark):
    found, console = browse(tmp_path, page, width, LOOK, dark)
    assert console == ""
    assert found["overflow"] <= 0 and found["outside"] == 0 and found["columns"] == columns
    assert found["images"] == 4 * inspection.PICTURES + len(report.CURVES) + 1 and found["broken"] == found["small"] == 0

    def light(colour: str) -> float:
        return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3

    assert (light(found["background"]) < 60 and light(found["text"]) > 180) == dark
    assert (light(found["background"]) > 200 and light(found["text"]) < 80) != dark
    assert light(found["behind"]) == 255  # charts are made for a white ground


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_the_browser_would_show_what_is_wrong(tmp_path):
    bad = '<div class="grid"></div><figure></figure>'
    bad += '<script>console.error("no")</script><div style="width:2000px">w</div><img src="data:,">'
    found, console = browse(tmp_path, bad, 390, LOOK)
    assert "no" in console and found["overflow"] > 1000 and found["broken"] == 1


def test_a_page_that_cannot_be_written_is_said_first(finished_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "look_at", None)
    assert cli(["report", str(finished_run), "-o", str(tmp_path)]) == 2
    assert f"{tmp_path} cannot be written" in capsys.readouterr().err
