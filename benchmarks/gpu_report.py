"""Everything that needs a GPU, in the order of its worth, in little time, on a machine that has just started.

    python -m benchmarks.gpu_report --parts 1 --minutes 9 --out DIR     # docs/gpu.md has the steps around it
    python -m benchmarks.gpu_rows DIR                                   # what was measured, as rows for RECORDS.md

It needs neither make nor pip nor a network. Each part is a process of its own with a limit of time; one that does not end is
killed with its children, and what it had written is kept. All results go into one archive in DIR while a part runs and after
it, so that a kill loses nothing. A part that is done, here or in the archives of `--earlier`, is not done again. Results lie
in runs/gpu_report/, each device's in a folder of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import gpu_probe, gpu_rows

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "runs/gpu_report"
ARCHIVE = "gpu_report.tar.gz"
MARK = "FASTROBUST_GPU_REPORT"  # in the environment of a part and of all that it starts
LARGEST = 2_000_000  # bytes of a file in the archive: weights and checkpoints stay out
GRACE = 10.0  # seconds from SIGINT to SIGKILL: a checkpoint, the reasons of failed tests
RESERVE = 15.0  # seconds at the end, for the last kill and the archive
PACK_EVERY = 30.0  # seconds, while a part runs


class Part(NamedTuple):
    """`command` is what follows `python`; it runs in the part's folder and writes result.json there, or ends with a line of
    JSON. `estimate` and `limit` are seconds; `needs` is a folder beside its own without which it cannot run."""

    group: int
    name: str
    estimate: float
    limit: float
    command: list[str]
    needs: str = ""
    data: bool = False  # whether it reads CIFAR-10


def tests(group: int, name: str, estimate: float, limit: float, word: str, *which: str) -> Part:
    """The tests in files with this word, by up to four processes where pytest-xdist is there: one that crashes is then
    replaced."""
    files = sorted(str(file) for file in (ROOT / "tests").rglob("test_*.py") if word in file.read_text())
    there = importlib.util.find_spec
    options = ["-n", str(max(1, min(4, (os.cpu_count() or 1) // 4))), "--max-worker-restart", "20"] if there("xdist") else []
    options += ["--timeout", "120", "--timeout-method", "thread"] if there("pytest_timeout") else []
    options += ["-o", "addopts=", "-o", "faulthandler_timeout=60", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
    command = ["-m", "pytest", "-v", "--tb=short", "-c", str(ROOT / "pyproject.toml"), *options, *which]
    return Part(group, name, estimate, limit, [*command, *files])


def benchmark(group: int, name: str, estimate: float, limit: float, *words: str) -> Part:
    module, *options = words
    return Part(group, name, estimate, limit, ["-m", f"benchmarks.{module}", "--json", "result.json", *options])


def profile(group: int, engine: str) -> Part:
    estimate, limit = (100, 240) if "compile" in engine else (45, 120) if "fused" in engine else (25, 90)
    return benchmark(group, f"profile_{engine.replace('+', '_')}", estimate, limit, "profile", "--engine", engine)


def train(group: int, seed: int) -> Part:
    """Table 3's FGSM row with 1,000 test images, so that a robust accuracy is there early; `robust` takes all of them."""
    config = str(ROOT / "configs/cifar10_fgsm_fast.yaml")
    options = [f"name=seed{seed}", f"seed={seed}", "output=.", "device=cuda", "evaluation.limit=1000"]
    return Part(group, f"train_{seed}", 110, 300, ["-m", "fastrobust.train", config, *options], data=True)


def robust(group: int, seed: int) -> Part:
    run = f"../train_{seed}/seed{seed}"
    options = ["--attack", "pgd-50-10", "--limit", "10000", "--json"]
    return Part(group, f"robust_{seed}", 170, 420, ["-m", "fastrobust", "evaluate", run, *options], run, data=True)


def parts(home: Path) -> list[Part]:
    """In the order of their worth. The estimates are for one H100, and guesses: docs/gpu.md says how they were made."""
    trained = [seed for seed in range(3) if (home / f"train_{seed}/seed{seed}/model.safetensors").exists()]
    run = ["--run", f"../train_{trained[0]}/seed{trained[0]}"] if trained else []
    speed = ["evaluate", "--quick", "--limit", "500", *run]
    epoch, fused = ["epoch", "--quick"], ["--engine", "fused+cuda_graph"]
    return [
        tests(1, "tests", 70, 180, "mark.gpu", "-m", "gpu", "-k", "not compiled"),
        benchmark(1, "epoch_quick", 50, 150, *epoch, "--images", "6400"),
        train(1, 0),
        benchmark(1, "epoch_fused", 60, 150, *epoch, "--images", "6400", *fused),
        robust(1, 0),
        tests(2, "tests_kernels", 60, 150, "triton_kernels"),  # the numbers of Triton's kernels, which nothing else checks
        profile(2, "cuda_graph"),
        profile(2, "fused+cuda_graph"),
        train(2, 1),
        train(2, 2),
        benchmark(2, "evaluate", 90, 200, *speed),
        benchmark(2, "epoch_512", 45, 150, *epoch, "--images", "12800", "--batch-size", "512"),
        benchmark(2, "epoch_512_fused", 60, 150, *epoch, "--images", "12800", "--batch-size", "512", *fused),
        benchmark(2, "epoch", 240, 420, *epoch),
        robust(2, 1),
        robust(2, 2),
        *(profile(3, engine) for engine in ("eager", "fused", "compile", "compile+cuda_graph")),
        tests(3, "tests_compiled", 90, 240, "mark.gpu", "-m", "gpu", "-k", "compiled"),
        benchmark(3, "step_quick", 280, 480, "step", "--quick"),
        benchmark(4, "imagenet", 180, 400, "imagenet", "--repetitions", "3", "--steps", "10", "--images", "1024"),
    ]


# ---- one part


class Ended(NamedTuple):
    status: str  # done, failed or cut
    code: int | None
    seconds: float


def environment(mark: str) -> dict[str, str]:
    """Of a part: this source tree and the folders of PYTHONPATH and FASTROBUST_DATA are found from any folder."""
    paths = [str(ROOT), *(os.path.abspath(p) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p)]
    data = os.environ.get("FASTROBUST_DATA")
    places = {"PYTHONPATH": os.pathsep.join(paths), "FASTROBUST_DATA": os.path.abspath(data) if data else str(ROOT / "data")}
    return os.environ | places | {"PYTHONUNBUFFERED": "1", "COLUMNS": "160", MARK: mark}


def marked(mark: str) -> list[int]:
    """The processes that have this mark in their environment: a part's, also those that left its group or lost their
    parent. Dead ones have none."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if wanted in entry.read_bytes().split(b"\0"):
                found.append(int(entry.parent.name))
    return [number for number in found if number != os.getpid()]


def kill_all(mark: str) -> None:
    """SIGKILL to all of a part, until none is left."""
    for _ in range(100):
        if not (numbers := marked(mark)):
            return
        for number in numbers:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(number, signal.SIGKILL)
        time.sleep(0.02)


def interrupt(process: subprocess.Popen) -> None:
    """Ctrl-C for the part's own process, which may end its children and say what it has; SIGKILL for its group if it does
    not end then."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def run_limited(command: list[str], folder: Path, limit: float, meanwhile=lambda: None) -> Ended:
    """Run a command in a folder, its output in log.txt there, for at most `limit` seconds. Whatever happens, none of its
    processes is left. `meanwhile` is called every now and then."""
    folder.mkdir(parents=True, exist_ok=True)
    began, mark = time.monotonic(), f"{os.getpid()}.{time.monotonic_ns()}"
    with (folder / "log.txt").open("wb") as log:
        settings = {"cwd": folder, "env": environment(mark), "start_new_session": True, "stdin": subprocess.DEVNULL}
        process = subprocess.Popen([sys.executable, *command], stdout=log, stderr=subprocess.STDOUT, **settings)
        try:
            while (left := began + limit - time.monotonic()) > 0:
                try:
                    code = process.wait(min(PACK_EVERY, left))
                    return Ended("failed" if code else "done", code, time.monotonic() - began)
                except subprocess.TimeoutExpired:
                    meanwhile()
            return Ended("cut", None, time.monotonic() - began)
        finally:
            interrupt(process)
            kill_all(mark)
            process.wait()


def ready(part: Part, folder: Path) -> Part:
    """The part as it goes on: a training that was cut is resumed; one that failed begins anew."""
    for word in part.command:
        name = word.removeprefix("name=")
        if name != word and (folder / name / "config.yaml").exists():
            if gpu_rows.state_of(folder).get("status") != "failed":
                return part._replace(command=["-m", "fastrobust.train", "--resume", name])
            shutil.rmtree(folder / name)
    return part


def do(part: Part, home: Path, facts: dict[str, Any], left: float, meanwhile) -> str:
    """Run a part and return its status; its state.json says what is known of it at any time."""
    folder = home / part.name
    part = ready(part, folder)
    with contextlib.suppress(OSError):
        (folder / "result.json").unlink()
    command = " ".join(["python", *part.command]).replace(f"{ROOT}/", "")
    state = {"part": part.name, "command": command, "date": time.strftime("%Y-%m-%d")}
    state |= {"limit": min(part.limit, left), "estimate": part.estimate, "status": "cut", "code": None, "seconds": None}
    state |= {key: facts.get(key) for key in ("device", "simulated", "commit", "sources", *(["data"] if part.data else []))}
    gpu_probe.write(folder / "state.json", state)  # what stands if this report is killed
    state |= run_limited(part.command, folder, min(part.limit, left), meanwhile)._asdict()
    gpu_probe.write(folder / "state.json", state)
    return state["status"]


# ---- results


def home_of(facts: dict[str, Any]) -> Path:
    """The folder of a device's results."""
    name = ("SIMULATED " if facts.get("simulated") else "") + (facts.get("device") or "unknown device")
    return RESULTS / re.sub(r"\W+", "_", name)


def done(folder: Path) -> bool:
    return gpu_rows.state_of(folder).get("status") == "done"


def pack(out: Path) -> None:
    """All results as one archive, in one piece; of a long log its end. Larger files stay here alone, to go on with."""
    out.mkdir(parents=True, exist_ok=True)
    temporary = out / f".{ARCHIVE}"
    with tarfile.open(temporary, "w:gz", compresslevel=6) as archive:
        for file in sorted(RESULTS.rglob("*")):
            if not file.is_file() or file.is_symlink() or file.is_relative_to(out) or file.name.startswith("."):
                continue
            with contextlib.suppress(FileNotFoundError):  # a part that runs may have renamed it
                if file.suffix == ".txt" or file.stat().st_size <= LARGEST:
                    content = file.read_bytes()[-LARGEST:]
                    member = tarfile.TarInfo(str(file.relative_to(RESULTS)))
                    member.size, member.mtime = len(content), int(time.time())
                    archive.addfile(member, io.BytesIO(content))
    os.replace(temporary, out / ARCHIVE)


def take_earlier(archives: list[Path], folder: Path | None) -> None:
    """Put in place what archives, or a folder with unpacked ones, hold of parts that are not done here. A part that is done
    goes before one that is not."""
    scratch = RESULTS / ".earlier"
    gpu_rows.unpack(archives, scratch)
    for place in filter(None, (scratch, folder)):
        for state in sorted(place.rglob("state.json")):
            target = RESULTS / state.parent.parent.name / state.parent.name
            if not done(target) and (done(state.parent) or not target.exists()):
                shutil.copytree(state.parent, target, dirs_exist_ok=True)
    shutil.rmtree(scratch, ignore_errors=True)


# ---- all parts


def probed(out: Path, limit: float) -> dict[str, Any]:
    """The facts of the probe, stored with the device's results; what it found before it failed, if it did."""
    place = RESULTS / ".probe"
    shutil.rmtree(place, ignore_errors=True)
    ended = run_limited(["-m", "benchmarks.gpu_probe"], place, limit)
    try:
        facts = json.loads((place / "result.json").read_text())
    except (OSError, ValueError):
        facts = {"sources": gpu_probe.sources()}
    target = home_of(facts) / "probe"
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    place.rename(target)
    keys = ("device", "simulated", "commit", "sources")
    state = {"part": "probe", "command": "", "date": time.strftime("%Y-%m-%d"), **ended._asdict(), "limit": limit}
    gpu_probe.write(target / "state.json", state | {key: facts.get(key) for key in keys})
    pack(out)
    show(target, ended.status)
    return facts


def show(folder: Path, status: str) -> None:
    """A part's figures; and the end of its log, if it did not end well. Short: a caller may see the last 12,000 characters
    alone."""
    for line in gpu_rows.lines(folder):
        print(f"  {line[:200]}")
    if status != "done":
        if code := gpu_rows.state_of(folder).get("code"):
            print(f"  exit status {code}{' (a signal: it crashed)' if code < 0 else ''}")
        log = (folder / "log.txt").read_text(errors="replace").replace("\r", "\n")
        for line in [line for line in log.splitlines() if line.strip()][-8:]:
            print(f"  | {line[:160]}")
    sys.stdout.flush()


def obstacle(part: Part, home: Path, facts: dict[str, Any], left: float) -> str | None:
    """Why a part is not run now."""
    weights = os.path.normpath(home / part.name / part.needs / "model.safetensors")  # the part's own folder may not be there
    if part.needs and not os.path.exists(weights):
        return f"the weights of {part.needs.split('/')[1]} are not on this machine"
    if part.data and not facts.get("data"):
        return f"CIFAR-10 was not found: {facts.get('data_error', 'the probe did not get there')}"
    return f"no time left (needs about {part.estimate:g} s, {max(left, 0):.0f} s left)" if left < part.estimate / 2 else None


def report(groups: list[int], minutes: float, out: Path, earlier: Path | None) -> int:
    end = time.monotonic() + 60 * minutes - RESERVE
    take_earlier([*out.glob(ARCHIVE), *(sorted(earlier.rglob("*.tar.gz")) if earlier else [])], earlier)
    facts = probed(out, max(10.0, min(180.0, end - time.monotonic())))
    if facts.get("missing"):
        print(f"error: missing here: {', '.join(facts['missing'])}: see docs/gpu.md", file=sys.stderr)
        return 2
    if facts.get("gpu") is False:
        print("error: no CUDA GPU is visible; this report is about one", file=sys.stderr)
        return 2
    if facts.get("gpu") and not facts.get("device"):
        print("error: the probe did not come to know the device; its log is in the archive", file=sys.stderr)
        return 2
    home, outcome = home_of(facts), {}
    for name in [part.name for part in parts(home) if part.group in groups]:
        part = next(one for one in parts(home) if one.name == name)  # anew: it may depend on those before it
        if done(home / name):
            outcome[name] = "done before"
            continue
        left = end - time.monotonic()
        if reason := obstacle(part, home, facts, left):
            outcome[name] = "left out"
            print(f"{name}: left out: {reason}", flush=True)
            continue
        limit = min(part.limit, left)
        print(f"{name}: about {part.estimate:g} s, at most {limit:.0f} s, {left:.0f} s left in all", flush=True)
        began = time.monotonic()
        try:
            outcome[name] = do(part, home, facts, left, lambda: pack(out))
        except OSError as error:
            outcome[name] = "failed"
            print(f"  {error}", flush=True)
        print(f"{name}: {outcome[name].upper()} after {time.monotonic() - began:.0f} s", flush=True)
        show(home / name, outcome[name])
        pack(out)
    print(f"\n{gpu_rows.device_name(facts)}")
    for name, status in outcome.items():
        print(f"  {name}: {status}")
    print(f"{out / ARCHIVE}: all results. As rows: python -m benchmarks.gpu_rows {out}", flush=True)
    return 1 if {"failed", "cut"} & set(outcome.values()) else 0


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--parts", type=int, nargs="+", choices=[1, 2, 3, 4], default=[1, 2, 3, 4], help="default: all")
    p.add_argument("--minutes", type=float, default=25, help="for everything together (default: 25)")
    p.add_argument("--out", type=Path, default=RESULTS / "archive", help="the folder of the archive (default: %(default)s)")
    p.add_argument("--earlier", type=Path, help="a folder with archives of earlier reports")
    options = p.parse_args(argv)
    if options.earlier and not options.earlier.is_dir():
        p.error(f"--earlier {options.earlier}: there is no such folder")
    if not options.minutes > 0:
        p.error(f"--minutes {options.minutes:g}: give a positive number")
    out = options.out.resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        p.error(f"--out {options.out}: {error.strerror}")
    for number in (signal.SIGTERM, signal.SIGINT):  # the part at work is ended, and results are packed, on the way out
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        return report(options.parts, options.minutes, out, options.earlier)
    finally:
        pack(out)


if __name__ == "__main__":
    sys.exit(main())
