"""Every kind of data gives the same batches, and says in one line what is wrong with it."""
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from image_kinds import SIZES, epoch, files, write_hub, write_list, write_sqlite, write_tar, write_two_tars, write_zip
from repository import example

from main_selfpatch import get_args_parser
from selfpatch.data import names as names
from selfpatch.data.dataset import build_dataset
from selfpatch.data.names import NamedImages, PackedNames, Progress, common_top
from selfpatch.data.sources import absolute, open_class_folders, open_folder, open_images, prepare
from selfpatch.distributed.processes import Process
from selfpatch.errors import ConfigError
from selfpatch.pretraining.resuming import describe_images

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning",
                                        "ignore:.*fork.*:DeprecationWarning")


def write_function(folder, path):
    write_sqlite(folder, path)
    code = example("docs/DATA.md", "Anything else")
    assert len(code.splitlines()) <= 14
    path.with_name("sqlite_images.py").write_text(code)
    return f"{path.with_name('sqlite_images.py')}:{path}"


def write_relative_list(folder, path):
    shutil.copytree(folder, path.parent / "copy")
    path = path.with_suffix(".txt")
    path.write_text("".join(f"./copy/{image.relative_to(folder)}\tclass{i % 3}\r\n"
                            for i, image in enumerate(files(folder))))
    return path


KINDS = {"list": write_list, "list with spaces": lambda folder, path: write_list(folder, path, lambda image: " 7"),
         "relative list": write_relative_list, "zip": lambda folder, path: write_zip(folder, path.with_suffix(".zip")),
         "stored zip": lambda folder, path: write_zip(folder, path.with_suffix(".zip"), "train", 0),
         "tar": lambda folder, path: write_tar(folder, path.with_suffix(".tar"), "./train"), "tars": write_two_tars,
         "function": write_function, "hub": write_hub}


@pytest.fixture(scope="module")
def expected(image_folder):
    """What the folder gives: two ranks' batches, and a description of the images."""
    ranks = [epoch(image_folder, process=Process(rank, 2))[1] for rank in range(2)]
    return ranks, describe_images(build_dataset(image_folder, **SIZES))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_batches_of_the_folder_to_both_ranks(image_folder, expected, tmp_path, kind):
    data_path = KINDS[kind](image_folder, tmp_path / "images")
    ranks, description = expected
    for rank in range(2):
        loader, found = epoch(data_path, process=Process(rank, 2))
        assert len(found) == 3 and all(map(torch.equal, found, ranks[rank]))
    if "relative" not in kind and "spaces" not in kind:  # whose classes are others
        assert describe_images(loader.dataset) == description
    assert not loader.bad_images


@pytest.mark.parametrize("kind", ["function", "hub"])
def test_other_kinds_in_workers(image_folder, tmp_path, kind):
    data_path = KINDS[kind](image_folder, tmp_path / "images")
    found, expected = epoch(data_path, num_workers=2)[1], epoch(image_folder, num_workers=2)[1]
    assert len(found) == 6 and all(map(torch.equal, found, expected))
    images = open_images(data_path)
    copied = pickle.loads(pickle.dumps(images))  # as for workers that are not forked
    assert copied.read(3) == images.read(3) == (image_folder / images.name(3)).read_bytes()


# ---------------------------------------------------------------- folders and lists


def test_a_folder_without_class_folders(image_folder, tmp_path):
    for name in ("b.jpg", "a.JPG", "._a.jpg", "c.heic"):
        shutil.copy(image_folder / "class0" / "00.jpg", tmp_path / name)
    (tmp_path / "notes").mkdir()
    images = open_images(tmp_path)
    assert list(images.names) == ["a.JPG", "b.jpg"] and images.classes == [] and images.labels.tolist() == [-1, -1]
    assert images.unread_summary().startswith("not read: 1 .heic")
    assert open_class_folders(str(tmp_path)).classes == ["notes"]
    assert len(epoch(tmp_path)[1]) == 1
    (tmp_path / "notes" / "deep").mkdir()
    shutil.copy(tmp_path / "b.jpg", tmp_path / "notes" / "deep")
    images = open_folder(str(tmp_path))
    assert list(images.names) == ["notes/deep/b.jpg"] and "2 beside the class folders" in images.unread_summary()


def test_classes_of_a_list_sort_as_numbers(image_folder, tmp_path):
    path = write_list(image_folder, tmp_path / "list.txt", lambda image: f",{int(image.stem) % 3 * 5}")
    images = open_images(path)
    assert images.classes == ["0", "5", "10"]
    assert [int(Path(name).stem) % 3 for name in images.names] == images.labels.tolist()


def test_a_name_with_spaces_is_a_name(image_folder, tmp_path):
    shutil.copy(image_folder / "class0" / "00.jpg", tmp_path / "a cat 3.jpg")
    shutil.copy(image_folder / "class0" / "00.jpg", tmp_path / "a")
    for line, classes in (("a cat 3.jpg", []), ("a cat 3.jpg 4", ["4"]), ("a cat 3.jpg  \ttabby cat", ["tabby cat"])):
        (tmp_path / "list").write_text(f"{line}\n\n")
        images = open_images(tmp_path / "list")
        assert list(images.names) == ["a cat 3.jpg"] and images.classes == classes


def test_bad_lists_name_the_line(image_folder, tmp_path):
    good = image_folder / "class0" / "00.jpg"
    for text, message in ((f"{good}\n\nclass0/none.jpg 3\n", "line 3: there is no file .*class0/none.jpg 3"),
                          (f"{good} 1\n{good}\n", "line 2: no class, unlike"),
                          (f"{good}\nnotes.txt\n", "line 2: notes.txt is no image"), ("\n\n", "has no images in it")):
        (tmp_path / "list.txt").write_text(text)
        (tmp_path / "notes.txt").touch()
        with pytest.raises(ConfigError, match=message) as error:
            open_images(tmp_path / "list.txt")
        assert "\n" not in str(error.value) and "list.txt" in str(error.value)


def test_images_below_a_hidden_folder_are_used_where_a_list_names_them(image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / ".cache" / "images")
    paths = sorted((tmp_path / ".cache" / "images").rglob("*.jpg"))
    (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in paths))
    assert len(open_images(tmp_path / "list.txt")) == 12


def test_paths_for_a_process_that_starts_in_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "saved").mkdir()
    assert [absolute(path) for path in ("a", "mine.py:s3://bucket/x", "hf:saved:train", "hf:owner/name")] == [
        f"{tmp_path}/a", f"{tmp_path}/mine.py:s3://bucket/x", f"hf:{tmp_path}/saved:train", "hf:owner/name"]


# ---------------------------------------------------------------- what is none of these


@pytest.mark.parametrize("words, message", [
    (["{0}", "{0}"], "each must be a .zip or .tar archive"), (["{0}/class0/00.jpg"], "is no folder, archive or text"),
    (["{1}/x.tar.gz"], "compressed as a whole.*decompress it"), (["nowhere"], "no folder nowhere, and no file"),
    (["{1}/none.py:3"], "there is no file .*none.py"), (["{1}/empty.py:3"], "has no function open_images"),
    (["{1}"], "has no images in it: not read: 1 .tar .*give the archives in it themselves")])
def test_what_cannot_be_read_is_one_line(image_folder, tmp_path, words, message):
    (tmp_path / "x.tar.gz").touch()
    (tmp_path / "empty.py").touch()
    (tmp_path / "x.tar").touch()
    with pytest.raises(ConfigError, match=message) as error:
        open_images([word.format(image_folder, tmp_path) for word in words])
    assert "\n" not in str(error.value)


def test_an_error_of_the_function_is_about_its_image(tmp_path):
    (tmp_path / "f.py").write_text("def open_images(a):\n    return ['x.jpg'], lambda name: {}[name]\n")
    with pytest.raises(ConfigError, match="cannot read the image .*f.py:a: x.jpg .'x.jpg'"):
        open_images(f"{tmp_path}/f.py:a").read(0)


def test_one_value_stays_a_text(image_folder, tmp_path, monkeypatch):
    parse = get_args_parser().parse_args
    assert parse(["--data_path", "x"]).data_path == "x" and parse([]).data_path == "/path/to/imagenet/train"
    assert parse(["--data_path", "x.tar", "y.tar", "--epochs", "3"]).data_path == ["x.tar", "y.tar"]
    monkeypatch.chdir(tmp_path)
    assert [absolute(path) for path in ("x", "hf:a/b", "f.py:x")] == [f"{tmp_path}/x", "hf:a/b", f"{tmp_path}/f.py:x"]
    prepare(image_folder)


# ---------------------------------------------------------------- Hugging Face


def test_data_sets_that_cannot_be_read(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.Dataset.from_dict({"text": ["a"], "label": [1]}).save_to_disk(tmp_path / "text")
    datasets.DatasetDict(a=datasets.Dataset.from_dict({"x": [1]}), b=datasets.Dataset.from_dict({"x": [1]})
                         ).save_to_disk(tmp_path / "splits")
    for path, message in ((f"hf:{tmp_path}/text", "has no column of images, but text, label"),
                          (f"hf:{tmp_path}/splits", "has no split train, but a, b"), ("hf:", "give the name"),
                          (f"hf:{tmp_path}/splits:a", "has no column of images"),
                          ("hf:nobody/nothing", "hf:nobody/nothing cannot be loaded")):
        with pytest.raises(ConfigError, match=message) as error:
            open_images(path)
        assert "\n" not in str(error.value)


def test_rows_without_names_keep_their_order(image_folder, tmp_path):
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    rows = [{"bytes": path.read_bytes(), "path": None} for path in files(image_folder)] + [None]
    datasets.Dataset.from_dict({"picture": rows}, features=datasets.Features(picture=datasets.Image())
                               ).save_to_disk(tmp_path / "saved")
    images = open_images(f"hf:{tmp_path / 'saved'}")
    assert [images.read(i) for i in range(12)] == [row["bytes"] for row in rows[:12]] and images.classes == []
    with pytest.raises(ConfigError, match="row 12 .00000012. .the row has none"):
        images.read(12)


# ---------------------------------------------------------------- names


def test_packed_names_are_the_names():
    names = ["a/b.jpg", "", "ü.jpg", os.fsdecode(b"not\xffutf8.jpg"), "z"]
    packed = PackedNames(iter(names))
    assert list(packed) == names and [packed[i] for i in range(5)] == names and packed[-1] == "z"
    assert list(PackedNames([])) == [] and len(NamedImages("x", [])) == 0


def test_the_folders_above_the_class_folders():
    assert common_top(["x/train/a/1.jpg", "x/train/b/c/2.jpg"]) == "x/train/"
    assert common_top(["all/1.jpg", "all/2.jpg"]) == common_top(["1.jpg", "a/2.jpg"]) == common_top([]) == ""
    assert common_top(["/d/all/1.jpg"]) == "/d/"


def test_a_long_scan_shows_progress(monkeypatch, capsys):
    monkeypatch.setattr(names, "PROGRESS_SECONDS", 0)
    assert len(list(Progress("listing x")(range(600)))) == 600
    assert capsys.readouterr().out == "listing x: 256 files so far\nlisting x: 512 files so far\n"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert list(Progress("listing x")(range(600))) and not capsys.readouterr().out
