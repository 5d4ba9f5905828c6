"""Tests of `data.labels`: classes that a CSV file says."""

import pytest
from conftest import photo
from loader_batches import CPU, config_for
from prepared_files import write

from fastrobust.data import layouts, loaders, sets
from fastrobust.data.held_out import Choice
from fastrobust.runtime.errors import ConfigError, DataError


@pytest.fixture
def flat(tmp_path):
    """flat(rows, files, header) -> a folder of photos and labels.csv."""

    def make(rows, files=(), header="file,label"):
        for i, name in enumerate(files or [row.split(",")[0] for row in rows]):
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            photo(i, 40, 40).save(file)
        (tmp_path / "labels.csv").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8-sig")
        return tmp_path

    return make


def names(folder, split="train", labels="labels.csv", **choice):
    found = sets.list_images("image_folder", split, folder, Choice(labels=labels, **choice))
    return [(member.name, found.classes[label]) for member, label in zip(found.members, found.labels, strict=True)]


ROWS = ["train/1.png,cat", "train/deep/2.png,dog", "train/3.png,cat", "test/1.png,dog"]


def test_folders_say_the_split_and_the_file_says_the_class(flat):
    folder = flat(ROWS)
    assert names(folder) == [("train/1.png", "cat"), ("train/3.png", "cat"), ("train/deep/2.png", "dog")]
    assert names(folder, "test") == [("test/1.png", "dog")]


def test_a_column_says_the_split(flat):
    folder = flat(["1.png,cat,train", "2.png,dog,train", "3.png,dog,val"], header="file,label,split")
    assert names(folder) == [("1.png", "cat"), ("2.png", "dog")] and names(folder, "test") == [("3.png", "dog")]


def test_files_may_be_named_from_their_splits_folder(flat):
    folder = flat(["1.png,cat", "2.png,dog"], files=["train/1.png", "train/2.png"])
    assert names(folder) == [("train/1.png", "cat"), ("train/2.png", "dog")]


def test_a_folder_without_splits_is_training_images_of_which_some_are_held_out(flat):
    folder = flat([f"{i}.png,{'ab'[i % 2]}" for i in range(12)])
    assert len(names(folder)) == 12 and len(names(folder, "held_out", held_out=4)) == 4
    with pytest.raises(DataError, match=r"has images of train, so there are no test images; give a place"):
        names(folder, "test")
    config = config_for(folder, data={"labels": "labels.csv", "held_out": 4})
    config = loaders.resolve(config, CPU)
    assert config.data.labels == str(folder / "labels.csv")
    assert len(loaders.test_set(config, None).labels) == 4 and len(loaders.Phases(config, CPU).enter(0)) == 8


@pytest.mark.parametrize(
    ("rows", "files", "header", "message"),
    [
        (["1.png,a", "2.png,b", "3.png,b"], ["1.png"], "file,label", r"names 2 files that are not in .*:\n2.png\n3.png"),
        (["1.png,a"], (), "id,label", "has the columns id, label: it needs the columns file, label"),
        (["1.png,a"], (), "file,label,extra", "has the columns file, label, extra"),
        (["1.png,a", "2.png,a"], (), "file,label", "all images are of one class, 'a'"),
        (["1.png,a", "1.png,b"], (), "file,label", "line 3: 1.png is in line 2 too"),
        (["1.png,a", "2.png,"], ["1.png", "2.png"], "file,label", "line 3, has no file or no label"),
        (["1.png,a,trian"], ["1.png"], "file,label,split", "line 2, has the split 'trian', which is none of train, test"),
        (["1.png,a"], ["train/1.png", "test/1.png"], "file,label", "line 2: 1.png means train/1.png and test/1.png"),
    ],
)
def test_mistakes_are_explained(flat, rows, files, header, message):
    with pytest.raises(DataError, match=message):
        names(flat(rows, files, header))


def test_images_that_are_not_in_the_file_are_counted(flat, capsys):
    folder = flat(["1.png,a", "2.png,b"], ["1.png", "2.png", "3.png", "4.png"])
    assert len(names(folder)) == 2 and "2 images are not in" in capsys.readouterr().out


def test_a_file_that_is_not_there_and_a_data_set_with_labels_of_its_own(flat):
    folder = flat(ROWS)
    with pytest.raises(DataError, match=r"data.labels: there is no file labls.csv nor .*labls.csv"):
        loaders.resolve(config_for(folder, data={"labels": "labls.csv"}), CPU)
    with pytest.raises(ConfigError, match=r"data.labels is for folders of images; cifar10 has labels of its own"):
        phases = [{"epochs": 1, "batch_size": 8}]
        config_for(folder, data={"labels": "labels.csv", "dataset": "cifar10", "augment": {}}, phases=phases)


def test_prepared_files_have_the_classes_of_the_file(flat, tmp_path_factory):
    folder, output = flat(ROWS), tmp_path_factory.mktemp("out")
    write("dali", folder, output, "--labels", "labels.csv")
    config = config_for(folder, data={"prepared": str(output)}, phases=[
        {"epochs": 1, "batch_size": 1, "resolution": 32, "resize": "original"}], loader="torch")  # fmt: skip
    found = loaders.Phases(loaders.resolve(config, CPU), CPU).enter(0)
    assert found.classes == ("cat", "dog") and found.labels.tolist() == [0, 0, 1]
    assert layouts.find_labels("labels.csv", folder) == folder / "labels.csv"


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("file;label\nA;b.png;cat\n2.png;dog\n".replace("A;b", '"A;b"'), "utf-8"),
        ("File, LABEL \nA;b.png,cat\n2.png,dog\n", "utf-8"),
        ("file\tlabel\nA;b.png\tcat\n2.png\tdog\n", "utf-16"),  # Excel's "Unicode text"
        ("file,label,\r\nA;b.png,cat,\r\n2.png,dog,\r\n", "utf-16-be"),
        ('sep=;\nfile;label\n"A;b.png";cat\n2.png;dog\n', "utf-8-sig"),
        ("file,label\n.\\A;b.png,cat\n.\\2.png,dog\n", "utf-8"),
    ],
)
def test_what_spreadsheets_write_is_read(flat, text, encoding):
    folder = flat([], ["A;b.png", "2.png"])
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    (folder / "labels.csv").write_bytes((mark + text).encode(encoding))
    assert names(folder) == [("A;b.png", "cat"), ("2.png", "dog")]


def test_names_and_splits_as_windows_and_others_write_them(flat):
    rows = [r"Train\deep\1.png,cat,Training", "2.png,dog,train", "3.png,dog,VAL"]
    folder = flat(rows, ["Train/deep/1.png", "2.png", "3.png"], "file,label,split")
    assert names(folder) == [("train/deep/1.png", "cat"), ("2.png", "dog")] and names(folder, "test") == [("3.png", "dog")]


def test_a_name_that_is_there_as_it_stands_counts(flat):
    folder = flat(["Train/1.png,cat", "train/1.png,dog"])
    assert names(folder) == [("Train/1.png", "cat"), ("train/1.png", "dog")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("file,label\n1.png,a\n".encode("utf-16-le"), "labels.csv is no text in UTF-8, .*: save it as CSV UTF-8"),
        (b"file,label\n1.png,cat, big\n", r"line 2, has more fields than the first line: put names with ',' in quotes"),
        (b"file,label\n1.png," + b"x" * 200_000, "labels.csv cannot be read: field larger"),
        (
            b"image|class\n1.png|a\n",
            r"has the columns image\|class: it needs the columns .*separated by , ; or tab",
        ),
    ],
)
def test_a_file_of_labels_that_cannot_be_read(flat, content, message):
    folder = flat([], ["1.png"])
    (folder / "labels.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        names(folder)
