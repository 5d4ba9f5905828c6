"""Tests of what the writers do where files are there already."""

import pytest
from conftest import write_photos
from prepared_files import KINDS, both, files, write

from fastrobust.data.prepared import writing
from fastrobust.runtime.errors import ConfigError


@pytest.fixture
def source(tmp_path):
    return write_photos(tmp_path / "source", 6, 3)


@both
def test_without_it_nothing_is_replaced(kind, source, tmp_path, capsys):
    output = write(kind, source, tmp_path / "out", "--splits", "train")
    before = files(output)
    write(kind, source, output, "--splits", "train")
    assert "left as it is (--overwrite replaces it)" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="quality 90 instead of 50: replace it with --overwrite"):
        write(kind, source, output, "--splits", "train", "--quality", "50")
    (source / "train" / "a" / "000.jpg").unlink()
    with pytest.raises(ConfigError, match="images 6 instead of 5: replace it with --overwrite"):
        write(kind, source, output, "--splits", "train")
    assert files(output) == before


@both
def test_with_it_the_files_are_replaced_as_often_as_one_likes(kind, source, tmp_path):
    output, fresh = tmp_path / "out", tmp_path / "fresh"
    for quality in ("50", "60", "70"):
        write(kind, source, output, "--splits", "train", "--quality", quality, "--overwrite")
        write(kind, source, fresh / quality, "--splits", "train", "--quality", quality)
        found, expected = (KINDS[kind](folder, "train", "original") for folder in (output, fresh / quality))
        assert found.manifest["quality"] == int(quality) and len(found) == 6
        assert [f["sha256"] for f in found.manifest["files"]] == [f["sha256"] for f in expected.manifest["files"]]
        assert len(files(output)) == len(files(fresh / quality))  # the old files are gone


@both
def test_where_it_fails_the_old_files_are_whole(kind, source, tmp_path, monkeypatch):
    output = write(kind, source, tmp_path / "out", "--splits", "train")
    before = files(output)
    for place in ("finish", "write_json"):
        with monkeypatch.context() as patch:
            patch.setattr(writing, place, lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                write(kind, source, output, "--splits", "train", "--quality", "50", "--overwrite")
        assert files(output) == before and len(KINDS[kind](output, "train", "original")) == 6


def test_a_data_set_without_test_images_is_refused_before_anything_is_written(tmp_path):
    source = write_photos(tmp_path / "source", 6, 0)
    with pytest.raises(Exception, match="there are no test images"):
        write("dali", source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
