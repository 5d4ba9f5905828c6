"""How the torch loader's workers hand their batches over: also where /dev/shm is small, as in Docker (64 MB)."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

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


@pytest.mark.parametrize("workers", [2, 3])
def test_slots_are_used_again_only_when_their_batches_are_copied(made, workers):
    """Many more batches than slots, whole and at their ends, while workers run ahead as far as they may."""
    alone, several = made("torch from the source", workers=0), made("torch from the source", workers=workers)
    for expected, batch in zip(alone.batches(0, 0, 3, 0, 40), several.batches(0, 0, 3, 0, 40), strict=True):
        time.sleep(0.01)
        assert all(torch.equal(a, b) for a, b in zip(batch, expected, strict=True))
        assert batch.images.stride() == expected.images.stride()


def test_a_small_shared_memory_is_enough(tmp_path):
    """A real one of 1 MB; a batch of 12 images is 590 kB, and there are five slots."""
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
