"""What `make test` says about the tests that it skipped."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_every_reason_is_said_once_with_its_count(tmp_path):
    (tmp_path / "test_x.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('n', range(3))\n"
        "def test_a(n): pytest.skip('there is no GPU')\n"
        "@pytest.mark.skipif(True, reason='FFCV is not installed')\n"
        "def test_b(): pass\n"
        "def test_c(): pass\n"
    )
    folder = str(Path(__file__).parent)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "-p", "no:cacheprovider", "test_x.py"]
    path = os.pathsep.join([folder, str(Path(folder).parent)])
    told = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert told.returncode == 0, told.stdout + told.stderr
    assert "    3 skipped: there is no GPU" in told.stdout and "    1 skipped: FFCV is not installed" in told.stdout
    assert "1 passed, 4 skipped in " in told.stdout, "with the duration"
