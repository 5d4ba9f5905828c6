"""Tests of the loaders where files are damaged and workers die: an error at once, and nothing is left behind."""

import fcntl
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from data_files import need
from loader_batches import collect

from fastrobust.data.loaders.dali import Dali
from fastrobust.data.prepared import beton, shards
from fastrobust.runtime.errors import DataError

ROOT = Path(__file__).resolve().parents[2]


def copied(written, tmp_path, folder):
    return shutil.copytree(written / "jpeg" / folder, tmp_path / folder)


@pytest.mark.parametrize("name", ["ffcv", "dali", "torch"])
@pytest.mark.parametrize("damage", ["cut short", "one bit", "overwritten, with its checksum"])
def test_damage_while_training_is_an_error_at_once(made, written, tmp_path, name, damage):
    """A file that shrinks, or whose bytes go bad, after it was opened."""
    need(name)
    folder = copied(written, tmp_path, "x-ffcv" if name == "ffcv" else "x-dali")
    found = (beton if name == "ffcv" else shards).read(folder, "train", 64)
    loader = made(name)
    loader.records = loader.data = found
    for descriptor in loader.files:
        os.close(descriptor)
    loader.files = found.open()
    middle = int(found.offset[18])
    with open(found.files[0], "r+b") as file:
        if damage == "cut short":
            file.truncate(middle + 20)
        elif damage == "one bit":  # the decoders would not notice
            file.seek(middle + int(found.length[18]) - 20)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))
        else:
            file.seek(middle)
            zeros = bytes(int(found.length[18]))
            file.write(zeros)
            found.crc[18] = zlib.crc32(zeros)
    began = time.monotonic()
    said = {"cut short": "cut short", "one bit": "its checksum differs"}.get(damage, "is damaged")
    with pytest.raises(DataError, match=said):
        collect(loader, 0, 0, 8, 0, 6)
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("name", ["ffcv", "dali", "torch"])
def test_a_file_cut_short_before_the_start_is_refused(written, tmp_path, name):
    folder = copied(written, tmp_path, "x-ffcv" if name == "ffcv" else "x-dali")
    read = beton.read if name == "ffcv" else shards.read
    file = read(folder, "train", 64).files[0]
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(DataError, match="bytes instead of"):
        read(folder, "train", 64)


def test_a_dead_worker_is_an_error_within_seconds(made):
    """Also one that looks whether all is done, as it does again and again: with Python's own Event it would hold a lock."""
    loader = made("torch from the source")

    def die(i):
        frame = sys._getframe()
        while "done_event" not in frame.f_locals:  # torch's loop
            frame = frame.f_back
        lock = getattr(frame.f_locals["done_event"], "_cond", None)
        if lock is not None:
            lock.acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    loader.data = loader.data._replace(image=die)
    began = time.monotonic()
    with pytest.raises(DataError, match="a worker of the torch loader died"):
        collect(loader, 0, 0, 8, 0, 6)
    assert time.monotonic() - began < 30


def test_a_corrupt_source_names_the_file(made):
    loader = made("torch from the source")
    image = loader.data.image

    def spoilt(i):
        if i == 5:
            raise DataError("photo 5 is not a usable image")
        return image(i)

    loader.data = loader.data._replace(image=spoilt)
    with pytest.raises(DataError, match="photo 5 is not a usable image"):
        collect(loader, 0, 0, 8, 0, 6)


def test_a_worker_that_dies_during_a_step_is_an_error_at_the_next_batch(made):
    """Not in the middle of whatever the step is doing. A batch is 98 kB: more than a pipe takes at once."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a DataLoader of another test may have left torch's handler
    loader = made("torch from the source")
    batches = loader.batches(0, 0, 32, 0, 200)
    next(batches)
    time.sleep(0.3)  # the workers are as far ahead as they may be
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, signal.SIGKILL)
        os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)  # the step: what SIGCHLD brings, it brings here
    with pytest.raises(DataError, match="a worker of the torch loader died"):
        for _ in batches:
            pass


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's prctl")
def test_workers_die_with_the_process_that_they_work_for(tmp_path):
    """A worker in the middle of a long batch holds the locks that it inherited. Killed, its parent takes it along."""
    script = tmp_path / "parent.py"
    script.write_text("""
import fcntl, os, sys, time
import numpy as np, torch
from fastrobust.data.loaders.torch_workers import Torch
from fastrobust.data.sets import Pictures

lock = open("lock", "w")
fcntl.flock(lock, fcntl.LOCK_EX)

def image(i):
    open(f"busy{i}", "w").close()
    time.sleep(600)

data = Pictures(image, str, str, np.zeros(8, np.int64), ("a",), "x")
next(Torch(data, 8, 3, 8, None, torch.device("cpu"), 2).batches(0, 0, 1, 0, 8))
""")
    parent = subprocess.Popen([sys.executable, str(script)], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("busy*"))) < 2 and parent.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(list(tmp_path.glob("busy*"))) == 2
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    with open(tmp_path / "lock") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                assert time.monotonic() < deadline, "a worker still holds the lock"
                time.sleep(0.05)


def test_dali_gives_its_batches_on_the_stream_of_the_steps(monkeypatch):
    """Without a stream `run` waits until the batch is decoded, and the next step is queued only then."""
    asked = []

    class Pipeline:
        def run(self, stream=None):
            asked.append(stream)
            raise RuntimeError("Error: enough for this test")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")
    loader = Dali.__new__(Dali)
    loader.records = SimpleNamespace(files=["shard"])
    for device in ("cuda:1", "cpu"):
        loader.device = torch.device(device)
        with pytest.raises(DataError, match="enough for this test"):
            loader._take(Pipeline(), deque())
    assert asked == ["the stream of cuda:1", None]
