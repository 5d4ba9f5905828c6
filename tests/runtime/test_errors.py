"""What errors advise."""

import re
from pathlib import Path

import fastrobust
from fastrobust.runtime.errors import installing


def test_the_extras_that_errors_name_can_be_installed():
    code = "".join(file.read_text() for file in Path(fastrobust.__file__).parent.rglob("*.py"))
    extras = set(re.findall(r"installing\(['\"]([\w-]+)", code))
    assert extras >= {"verify", "export", "autoattack", "timm"}
    for extra in extras:
        assert re.fullmatch(r"pip install( '[\w-]+>=[\d.]+')+", installing(extra))


def test_without_metadata_the_extra_itself_is_named():
    assert installing("no-such-extra") == "pip install -e '.[no-such-extra]' in the project's folder"
