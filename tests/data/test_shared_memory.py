"""The torch loader where /dev/shm is small, as in Docker (64 MB): batches go through pipes, and none waits for ever."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loader_batches import collect

from fastrobust.data.loaders import torch_workers

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys
import numpy as np, torch
from PIL import Image
from fastrobust.data.loaders.torch_workers import Torch
from fastrobust.data.sets import Pictures

pixels = np.random.default_rng(0).integers(0, 256, (24, 128, 128, 3), np.uint8)
data = Pictures(lambda i: Image.fromarray(pixels[i]), str, str, np.arange(24), tuple(map(str, range(24))), "x")
loader = Torch(data, 128, 3, 128, None, torch.device("cpu"), int(sys.argv[1]))
for batch in loader.batches(0, 0, 12, 0, 4):
    print(batch.labels.tolist(), batch.images.long().sum().item())
"""


def test_batches_are_the_same_through_pipes(made, monkeypatch):
    made_batches, chosen = torch_workers._Batches, []

    def noted(loader, jobs, through_pipes):
        chosen.append(through_pipes)
        return made_batches(loader, jobs, through_pipes)

    monkeypatch.setattr(torch_workers, "_Batches", noted)
    found = []
    for free in (1 << 40, 0):
        monkeypatch.setattr(torch_workers, "free_shared_memory", lambda free=free: free)
        found.append(collect(made("torch from the source"), 0, 0, 8, 0, 6))
    assert chosen == [False, True]
    assert all(torch.equal(a, b) for one, other in zip(*found, strict=True) for a, b in zip(one, other, strict=True))


def test_a_small_shared_memory_is_enough(tmp_path):
    """A real one of 1 MB; a batch of 12 images is 590 kB, and four may be on their way."""
    small = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"', "sh"]
    if shutil.which("unshare") is None or subprocess.run([*small, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    def said(before, workers):
        command = [*before, sys.executable, str(script), str(workers)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60).stdout

    assert said(small, 2) == said([], 0) and said([], 0).count("\n") == 4
