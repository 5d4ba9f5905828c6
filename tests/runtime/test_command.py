"""What every command does when its output is shut: it ends quietly, as other programs do."""

import os
import subprocess
import sys

import pytest

BOUND = {"PYTHONUNBUFFERED": "1"}


@pytest.mark.parametrize("environment", [{}, BOUND], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("words", [["configs"], ["configs", "mnist_fgsm"]], ids=" ".join)
def test_a_shut_pipe_ends_a_command_quietly(words, environment):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "fastrobust", *words]
    found = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, env=os.environ | environment, timeout=60)
    os.close(writer)
    assert (found.returncode, found.stderr) == (141, b"")
