"""What the model card and the report page tell about a model: the same accuracies, exact verdicts and masking checks, each
only if it is about the model's weights. The oracle counts in the files that the commands left."""

from __future__ import annotations

import hashlib
import html
import json
import re
import shutil

import pytest
import torch
from conftest import write_folder
from run_files import digest

from fastrobust.__main__ import main as cli
from fastrobust.evaluation import results
from fastrobust.evaluation.answers import answers
from fastrobust.models.weights import read_weights, save_weights
from fastrobust.reporting import export, known
from fastrobust.runtime.errors import RunError
from fastrobust.runtime.files import write_json

pytest.importorskip("highspy")
SANITY = {"verdict": "masked", "failed": ["single step"], "examples": 300, "epsilon": 8 / 255}


@pytest.fixture(scope="module")
def judged(finished_run, tmp_path_factory):
    """A run with all of AutoAttack on 20 images, checks for masked gradients, and exact verdicts at two radii. At 0.003
    three images are as if they had run out of time."""
    copy = shutil.copytree(finished_run, tmp_path_factory.mktemp("judged") / "run")
    limited = ["--epsilon", "0.6", "--limit", "20", "--device", "cpu"]
    assert cli(["evaluate", str(copy), "--attack", "autoattack", *limited]) == 0
    write_json(copy / results.FOLDER / "sanity_epsilon-0.03.json", SANITY | {"weights": digest(copy)})
    for epsilon in ("0.004", "0.003"):
        asked = ["verify", str(copy), "--epsilon", epsilon, "--limit", "12", "--workers", "1", "--timeout", "20"]
        assert cli(asked) == 0
    file = copy / "verification" / "epsilon-0.003" / "verdicts.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines = [record | ({"verdict": "timeout", "seconds": 20.0} if i % 4 == 1 else {}) for i, record in enumerate(lines)]
    file.write_text("".join(json.dumps(record) + "\n" for record in lines))
    assert cli(asked) == 0  # which decides nothing anew
    return copy


@pytest.fixture
def copied(judged, tmp_path):
    return shutil.copytree(judged, tmp_path / "run")


@pytest.fixture
def told(tmp_path, monkeypatch):
    """told(run) -> (the cells of the card's table of accuracies, the cells of the page's summary, both as plain text)."""
    monkeypatch.setattr(export, "write_onnx", lambda *arguments: None)  # it takes its time

    def make(run):
        assert cli(["export", str(run), "-o", str(tmp_path / "export")]) == 0
        assert cli(["report", str(run), "--limit", "0", "-o", str(tmp_path / "r.html")]) == 0
        card, page = (tmp_path / "export" / "README.md").read_text(), (tmp_path / "r.html").read_text()
        lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in card.splitlines() if line[:2] == "| "]
        rows = dict(re.findall(r"<tr><th>(.*?)</th><td>(.*?)</td></tr>", page.partition("<h2>Training")[0]))
        return card, lines, {key: html.unescape(re.sub("</?small>", "", cell)) for key, cell in rows.items()}

    return make


def counted(run, epsilon: str) -> dict[str, int]:
    lines = (run / "verification" / f"epsilon-{epsilon}" / "verdicts.jsonl").read_text().splitlines()
    verdicts = [json.loads(line)["verdict"] for line in lines]
    return {verdict: verdicts.count(verdict) for verdict in verdicts} | {"all": len(verdicts)}


def test_exact_verdicts_stand_beside_the_accuracies(judged, told):
    card, lines, page = told(judged)
    for epsilon in ("0.004", "0.003"):
        counts = counted(judged, epsilon)
        k, undecided, n = counts.get("verified", 0), counts.get("timeout", 0), counts["all"]
        words = f"{k / 12:.2%} verified ({k} of 12; {undecided} undecided)"
        low, high = results.wilson(k, n)[0], results.wilson(k + undecided, n)[1]
        assert ["exact verification", epsilon, words, f"{low:.2%} to {high:.2%}", "12"] in lines
        row = page[f"exact verification, epsilon {epsilon}"]
        assert row == f"{words} ({low * 100:.1f} to {high * 100:.1f}, n = 12)"
    assert counted(judged, "0.004")["verified"] > 6 and counted(judged, "0.003")["timeout"] == 3
    assert card.count("Exact verification: a verified image") == 1


def test_autoattack_and_masking_verdicts_are_on_the_page_as_in_the_card(judged, told):
    card, lines, page = told(judged)
    records = [record for record in results.read_all(judged / results.FOLDER) if record.settings["epsilon"] == 0.6]
    robust = int(results.worst_case(records).sum())
    low, high = results.wilson(robust, 20)
    assert ["autoattack", "0.6", f"{robust / 20:.2%}", f"{low:.2%} to {high:.2%}", "20"] in lines
    assert page["autoattack, epsilon 0.6"] == f"{robust / 20:.2%} ({low * 100:.1f} to {high * 100:.1f}, n = 20)"
    assert "at epsilon 8/255 (300 images): masked: single step failed" in card
    assert page["masked gradients, epsilon 8/255"] == "masked: single step failed (300 images)"
    attacks = {(cells[0], cells[1]) for cells in lines[1:] if cells[0] != "none"}
    on_page = {tuple(key.split(", epsilon ")) for key in page if ", epsilon " in key and "masked" not in key}
    assert attacks == on_page
    summary = json.loads((judged / "summary.json").read_text())
    assert page["clean accuracy"].startswith(f"{summary['clean_accuracy']:.2%} (")
    assert page["clean accuracy"].count("<br>") == 1  # on 200 images, and on 20


@pytest.mark.parametrize("older", [False, True])
def test_what_is_about_other_weights_is_left_out(copied, told, older, tmp_path):
    """A summary of earlier versions does not say which weights and code it is about."""
    summary = json.loads((copied / "summary.json").read_text())
    assert summary["weights_sha256"] == digest(copied)
    since = {"weights_sha256", "answers"} if older else set()
    write_json(copied / "summary.json", {key: summary[key] for key in summary if key not in since})
    model, config, classes = read_weights(copied)
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    save_weights(copied, model, config, classes)
    card, lines, page = told(copied)
    text = card + " ".join(page)
    assert not re.search("exact|autoattack|apgd|single step", text)
    assert {cells[0] for cells in lines[1:]} == ({"none", "pgd-7-2"} if older else set())  # of the summary
    named = {"pgd-7-2, epsilon 0.1", "pgd-7-2, epsilon 0.05"} if older else set()
    assert {key for key in page if ", epsilon" in key} == named
    html_page = (tmp_path / "r.html").read_text()
    assert card.count(known.OTHER_WEIGHTS) == html_page.count(html.escape(known.OTHER_WEIGHTS)) == (not older)


@pytest.mark.parametrize("ours", [True, False])
def test_a_summary_of_version_0_1_counts_if_the_weights_file_is_the_one(copied, told, ours):
    folder = copied / "verification" / "epsilon-0.004"
    summary = json.loads((folder / "summary.json").read_text())
    summary = {key: value for key, value in summary.items() if key not in ("weights", "images", "data", "dataset")}
    write_json(folder / "summary.json", summary)
    content = (copied / "model.safetensors").read_bytes() + (b"" if ours else b".")
    about = {"weights_sha256": hashlib.sha256(content).hexdigest(), "dataset": "image_folder", "images_sha256": 64 * "0"}
    write_json(folder / "settings.json", about | {"epsilon": 0.004})
    _, lines, page = told(copied)
    assert (["exact verification", "0.004"] in [cells[:2] for cells in lines]) == ours
    assert ("exact verification, epsilon 0.004" in page) == ours
    assert "exact verification, epsilon 0.003" in page


def test_results_on_other_data_say_so(copied, told, tmp_path):
    other = write_folder(tmp_path / "other", 10, 30)
    asked = [str(copied), "--epsilon", "0.01", "--data", str(other)]
    assert cli(["evaluate", *asked, "--attack", "pgd-2-1", "--device", "cpu"]) == 0
    place = str(copied / "verification" / "other")
    assert cli(["verify", *asked, "--limit", "5", "--workers", "1", "-o", place]) == 0
    _, lines, page = told(copied)
    images = {(cells[0], cells[1]): cells[4] for cells in lines[1:] if cells[0] != "none"}
    assert images["pgd-2-1", "0.01"] == f"30 of {other}" and images["exact verification", "0.01"] == f"5 of {other}"
    assert images["autoattack", "0.6"] == "20"
    assert page["pgd-2-1, epsilon 0.01"].endswith(f"n = 30 of {other})")


def test_results_on_images_that_were_replaced_say_so(quick, told, tmp_path, capsys):
    """Subsets of one test set, and of another in its place. The oracle: the digests that the commands give."""
    data = write_folder(tmp_path / "data", 70, 20)
    assert cli(["train", str(quick(data__path=str(data)))]) == 0
    run, images = tmp_path / "runs" / "bars", {}
    for place in ("before", "after"):
        for n in (20, 10):
            capsys.readouterr()
            more = ["--sanity", "--transfer", str(run)] if (place, n) == ("after", 20) else []
            asked = ["--attack", "pgd-3-1", "--limit", str(n), "--device", "cpu", "--json", *more]
            assert cli(["evaluate", str(run), *asked]) == 0
            images[place, n] = json.loads(capsys.readouterr().out.splitlines()[-1])["images"][:8]
        if place == "before":
            _, lines, page = told(run)
            assert {line[4] for line in lines[1:]} == {"20", "10"} and "SHA-256" not in str(page)
        write_folder(data, 0, 90)
        for file in sorted((data / "test").glob("*/*.png")):
            file.unlink() if int(file.stem) < 70 else None
    assert cli(["verify", str(run), "--epsilon", "0.004", "--limit", "5", "--workers", "1"]) == 0
    card, lines, page = told(run)
    other = f", not the summary's, SHA-256 {images['after', 20]}…"
    found = [line[4] for line in lines[1:] if line[0] == "pgd-3-1"]
    tens = [f"10, SHA-256 {images[place, 10]}…" for place in ("before", "after")]
    assert sorted(found) == sorted(["20", f"20{other}", *tens]) and images["before", 10] != images["after", 10]
    (exact,) = [line[4] for line in lines if line[0] == "exact verification"]
    assert re.fullmatch(r"5, not the summary's, SHA-256 [0-9a-f]{8}…", exact)
    assert f"n = 20{other})" in page["pgd-3-1, epsilon 0.05"] and "n = 20)" in page["pgd-3-1, epsilon 0.05"]
    assert f"(20 images{other})" in card and f"(20 images{other})" in page["masked gradients, epsilon 0.05"]
    assert card.count(known.OTHER_IMAGES) == 1


def test_checks_for_masked_gradients_on_other_data_say_so(copied, told):
    checks = SANITY | {"weights": digest(copied), "epsilon": 0.2, "data": "/other"}
    write_json(copied / results.FOLDER / "sanity_epsilon-0.2_0.json", checks)
    card, _, page = told(copied)
    assert "at epsilon 0.2 (300 images of /other): masked" in card and "at epsilon 8/255 (300 images): masked" in card
    assert page["masked gradients, epsilon 0.2"] == "masked: single step failed (300 images of /other)"


def test_the_page_needs_no_data_to_show_them(copied, told):
    config = (copied / "config.yaml").read_text()
    (copied / "config.yaml").write_text(re.sub("path: .*", "path: /nowhere", config))
    _, _, page = told(copied)
    assert "exact verification, epsilon 0.004" in page and "autoattack, epsilon 0.6" in page


def test_a_run_without_weights_shows_its_summary(copied, tmp_path, capsys):
    (copied / "model.safetensors").unlink()
    assert cli(["report", str(copied), "--limit", "0", "-o", str(tmp_path / "r.html")]) == 0
    page = (tmp_path / "r.html").read_text()
    assert "pgd-7-2, epsilon 0.1" in page and "exact verification" not in page and capsys.readouterr().err == ""


def test_damaged_weights_are_named_and_the_summary_is_shown(copied, tmp_path, capsys):
    (copied / "model.safetensors").write_bytes(b"damaged")
    assert cli(["report", str(copied), "--limit", "0", "-o", str(tmp_path / "r.html")]) == 0
    assert "only the summary's accuracies are shown" in capsys.readouterr().err
    assert "pgd-7-2, epsilon 0.1" in (tmp_path / "r.html").read_text()


OLDER = '{"verified": 9, "examples": 9, "timeout": 0, "epsilon": 0.1}'  # settings.json says what it is about
EXACT, CHECKS = "verification/epsilon-0.004/summary.json", "evaluations/sanity_epsilon-0.03.json"


@pytest.mark.parametrize("name, content", [
    (EXACT, "{"), (EXACT, "[]"), (EXACT, "{}"), (EXACT, OLDER), (EXACT, '{"weights": "OURS"}'),
    (EXACT, '{"weights": "OURS", "verified": 9, "examples": 0, "timeout": 0, "epsilon": 0.1}'),
    (EXACT, '{"weights": "OURS", "verified": 9, "examples": 9, "timeout": 1, "epsilon": 0.1}'),
    (EXACT, '{"weights": "OURS", "verified": "a", "examples": 9, "timeout": 0, "epsilon": 1}'),
    (CHECKS, "{"), (CHECKS, '{"weights": "OURS"}'), ("evaluations/x.safetensors", "x"),
])  # fmt: skip
def test_damaged_files_are_named(copied, tmp_path, capsys, name, content):
    (copied / "verification" / "epsilon-0.004" / "settings.json").write_text("{")
    (copied / name).write_text(content.replace("OURS", digest(copied)))
    for command in (["export", str(copied)], ["report", str(copied), "--limit", "0", "-o", str(tmp_path / "r.html")]):
        assert cli(command) == 2
        error = capsys.readouterr().err
        named = str(copied / name) if content != OLDER else str(copied / name).replace("summary", "settings")
        assert f"{named} is damaged" in error and "Traceback" not in error
    assert not (tmp_path / "r.html").exists()


def test_the_card_and_the_page_say_which_steps_were_in_bf16(finished_run, told, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    (run / results.FOLDER).mkdir(exist_ok=True)
    clean = torch.arange(20) > 1
    for attack, more in (("pgd-3-1", {"arithmetic": "bf16"}), ("pgd-4-1", {})):
        settings = {"attack": attack, "epsilon": 0.7, "examples": 20, "data": "some", "weights": digest(run)}
        record = results.Record({"settings": settings | more, "finished": True}, clean, clean.clone(), torch.arange(20) > 11)
        record.save(run / results.FOLDER)
    summary = json.loads((run / "summary.json").read_text())
    summary["evaluations"][0] |= {"arithmetic": "bf16", "attack": "pgd-9-9"}
    write_json(run / "summary.json", summary)
    _, lines, page = told(run)
    names = {line[0] for line in lines}
    assert {"pgd-3-1, steps in bf16", "pgd-4-1", "pgd-9-9, steps in bf16"} <= names and "pgd-3-1" not in names
    assert page["pgd-3-1, epsilon 0.7"].endswith("n = 20, steps in bf16)")
    assert page["pgd-4-1, epsilon 0.7"].endswith("n = 20)")


def test_the_card_the_page_and_the_json_say_the_size_of_the_steps(finished_run, told, tmp_path, capsys):
    run = shutil.copytree(finished_run, tmp_path / "run")
    for alpha in ("1e-6", "0.025"):
        asked = ["--attack", "pgd-3-1", "--epsilon", "0.1", "--alpha", alpha, "--limit", "20", "--device", "cpu"]
        assert cli(["evaluate", str(run), *asked]) == 0
    _, lines, page = told(run)
    names = [line[0] for line in lines if line[4] == "20"]
    assert sorted(names) == ["none", "pgd-3-1", "pgd-3-1, alpha 1e-06", "worst case over pgd-3-1"]
    assert re.search(r"n = 20, alpha 1e-06\).*n = 20\)$", page["pgd-3-1, epsilon 0.1"])
    capsys.readouterr()
    assert cli(["export", str(run), "-o", str(tmp_path / "export"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["accuracies"]
    assert [row["alpha"] for row in rows if row["attack"] == "pgd-3-1"] == [1e-6, 0.025]


def test_a_path_that_is_no_directory_tells_nothing(finished_run):
    found = known.read(finished_run / "model.safetensors", "0")
    assert found == known.Known()


def test_records_of_other_code_do_not_count(finished_run, tmp_path):
    run, model = shutil.copytree(finished_run, tmp_path / "run"), read_weights(finished_run)[0]
    clean = torch.ones(10, dtype=torch.bool)
    about = {"epsilon": 0.1, "examples": 10, "data": "ten images", "weights": digest(run), "resolution": 28}
    for attack, found in (("square", answers(model, (3, 28, 28))), ("fab-t", answers(model, (3, 28, 28))[::-1])):
        facts = {"settings": about | {"attack": attack}, "finished": True, "answers": found}
        results.Record(facts, clean, clean.clone(), ~clean).save(run / results.FOLDER)
    assert {row.attack for row in known.read(run, digest(run), model).accuracies} == {"none", "pgd-7-2", "square"}


BENT = """
import os
from torch import nn

def network(channels, classes):
    bend = getattr(nn, os.environ["BEND"])()
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * 28 * 28, 16), bend, nn.Linear(16, classes))
"""


@pytest.mark.parametrize("older", [False, True])
def test_results_of_other_code_do_not_count(quick, tmp_path, monkeypatch, told, older):
    """The summary, the exact verdicts and the masking checks of one activation, then the other's. Files of earlier versions
    do not tell the code, and are believed."""
    (tmp_path / "bent_model.py").write_text(BENT)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("BEND", "ReLU")
    assert cli(["train", str(quick(model={"name": "bent_model:network"}))]) == 0
    run = tmp_path / "runs" / "bars"
    checks = ["--attack", "pgd-1-1", "--sanity", "--transfer", str(run), "--device", "cpu"]
    assert cli(["evaluate", str(run), *checks, "--limit", "10"]) == 0
    assert cli(["verify", str(run), "--epsilon", "0.004", "--limit", "5", "--workers", "1"]) == 0
    for file in run.rglob("*.json") if older else ():
        found = json.loads(file.read_text())
        write_json(file, {key: value for key, value in found.items() if key != "answers"})
    card, lines, _ = told(run)
    names = {line[0] for line in lines[1:]}
    assert {"none", "pgd-1-1", "exact verification"} <= names and "masked gradients at" in card
    monkeypatch.setenv("BEND", "Tanh")
    assert cli(["evaluate", str(run), "--attack", "pgd-2-1", "--device", "cpu"]) == 0
    card, lines, page = told(run)
    names = {line[0] for line in lines[1:]}
    assert ({"none", "pgd-2-1"} == names) == ("masked gradients were not made" in card) == (not older)
    assert ("exact verification" in names) == any("pgd-1-1" in key for key in page) == older
    assert (known.OTHER_CODE in card) == (html.escape(known.OTHER_CODE) in (tmp_path / "r.html").read_text()) == (not older)
    entry = json.loads((tmp_path / "export" / "robustbench.json").read_text())
    assert (entry["clean_acc"] is None) == (not older)


def test_records_that_are_not_finished_do_not_count(finished_run, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    (run / results.FOLDER).mkdir(exist_ok=True)
    clean = torch.ones(10, dtype=torch.bool)
    settings = {"attack": "square", "epsilon": 0.1, "examples": 10, "data": "ten images", "weights": digest(run)}
    results.Record({"settings": settings, "finished": False}, clean, clean.clone(), ~clean).save(run / results.FOLDER)
    assert {row.attack for row in known.read(run, digest(run)).accuracies} == {"none", "pgd-7-2"}


def test_a_damaged_summary_is_named(finished_run, tmp_path):
    (tmp_path / "summary.json").write_text('{"evaluations": [{"examples": 0, "clean_accuracy": 1}]}')
    with pytest.raises(RunError, match=r"summary\.json is damaged"):
        known.read(tmp_path, None)
