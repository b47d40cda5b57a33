"""Every kind of data gives the same batches, and says in one line what is wrong with it."""
import os
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from image_kinds import FORMS, SIZES, epoch, files, write_list, write_tar

from main_selfpatch import get_args_parser
from selfpatch.data import names
from selfpatch.data.dataset import build_dataset
from selfpatch.data.names import NamedImages, PackedNames, Progress, common_top
from selfpatch.data.sources import absolute, expand, open_class_folders, open_folder, open_images
from selfpatch.distributed.processes import Process
from selfpatch.errors import ConfigError
from selfpatch.pretraining.resuming import describe_images

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning",
                                        "ignore:.*fork.*:DeprecationWarning")


@pytest.fixture(scope="module")
def expected(image_folder):
    """What the folder gives: two ranks' batches, and a description of the images."""
    ranks = [epoch(image_folder, process=Process(rank, 2))[1] for rank in range(2)]
    return ranks, describe_images(build_dataset(image_folder, **SIZES))


@pytest.mark.parametrize("kind", FORMS)
def test_every_kind_gives_the_batches_of_the_folder_to_both_ranks(image_folder, expected, tmp_path, kind):
    data_path = FORMS[kind](image_folder, tmp_path / "images")
    ranks, description = expected
    for rank in range(2):
        loader, found = epoch(data_path, process=Process(rank, 2))
        assert len(found) == 3 and all(map(torch.equal, found, ranks[rank]))
    if "relative" not in kind and "spaces" not in kind:  # whose classes are others
        assert describe_images(loader.dataset) == description
    images = loader.dataset.images
    sizes = [(image_folder / name).stat().st_size for name in open_images(image_folder).names]
    assert not loader.bad_images and (images.sizes() is None or images.sizes().tolist() == sizes)
    assert not [note for note in images.notes() if "not read" in note or "same name" in note]


@pytest.mark.parametrize("kind", ["function", "hub"])
def test_other_kinds_in_workers(image_folder, tmp_path, kind):
    data_path = FORMS[kind](image_folder, tmp_path / "images")
    found, expected = epoch(data_path, num_workers=2)[1], epoch(image_folder, num_workers=2)[1]
    assert len(found) == 6 and all(map(torch.equal, found, expected))
    images = open_images(data_path)
    copied = pickle.loads(pickle.dumps(images))  # as for workers that are not forked
    assert copied.read(3) == images.read(3) == (image_folder / images.names[3]).read_bytes()


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


# ---------------------------------------------------------------- what is chosen, and what is told


def test_patterns_are_those_of_a_shell(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b1.tar", "a10.tar", "a9.tar", "a9.tar.index.npz", "{x}.tar"):
        (tmp_path / name).touch()
    assert expand("{a,b}{09..11}.tar") == [f"{name}{i:02}.tar" for i in (9, 10, 11) for name in "ab"]
    assert expand("s{8..10}") == ["s8", "s9", "s10"] == expand("s{10..8}") and expand("{x}.tar") == ["{x}.tar"]
    assert expand(["a*", "b?.tar"]) == ["a10.tar", "a9.tar", "b1.tar"] and expand("{z}") == ["{z}"]
    assert expand(["hf:a*", "f.py:s3://{0..9}"]) == ["hf:a*", "f.py:s3://{0..9}"]
    for pattern, message in (("c*.tar", "there is no file of such a name"), ("{0..9999999}", "more than 1,000,000")):
        with pytest.raises(ConfigError, match=f"--knn_data .*{message}"):
            expand(pattern, "--knn_data")


@pytest.mark.parametrize("form", ["folder", "list", "tar"])
def test_photographs_and_masks_of_one_name(image_folder, tmp_path, form):
    source = tmp_path / "source"
    for i, image in enumerate(files(image_folder)):
        for suffix in (".jpg", ".seg.jpg"):
            (source / image.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(image, source / image.parent.name / f"{i:04}{suffix}")
    data = source if form == "folder" else {"list": write_list, "tar": write_tar}[form](source, tmp_path / f"x.{form}")
    everything = open_images(data)
    assert len(everything) == 24 and everything.notes() == [
        "12 images differ from another one only behind the first dot of the name (12 .jpg, 12 .seg.jpg): if some are "
        "masks, --image_suffix chooses"]
    images = open_images(data, suffixes=[".jpg"])
    assert len(images) == 12 and images.notes() == ["not read: 12 .seg.jpg (only .jpg are)"]
    assert not [name for name in images.names if "seg" in name] and len(open_images(data, suffixes=[".seg.jpg"])) == 12
    with pytest.raises(ConfigError, match="has no images in it: not read: 12 .jpg, 12 .seg.jpg .only .png are"):
        open_images(data, suffixes=[".png"])


def test_numbers_between_dots_are_no_suffixes(tmp_path):
    for name in ("2012.000001", "2012.000002", "x.seg.7"):
        (tmp_path / f"{name}.jpg").write_bytes(b"x")
    (tmp_path / "2012.000001.seg.png").write_bytes(b"x")
    images = open_images(tmp_path, suffixes=[".jpg"])
    assert list(images.names) == ["2012.000001.jpg", "2012.000002.jpg"]
    assert open_images(tmp_path).notes() == ["1 images differ from another one only behind the first dot of the name "
                                             "(2 .jpg, 1 .seg.jpg, 1 .seg.png): if some are masks, --image_suffix "
                                             "chooses"]
    (tmp_path / "2012.000001.seg.png").unlink()
    assert open_images(tmp_path).notes() == []


def test_options_for_other_kinds_of_data(image_folder, capsys):
    for words, message in (({"suffixes": [".jpg"], "paths": "f.py:x"}, "--image_suffix .jpg: is for folders, lists"),
                           ({"column": "mask", "paths": image_folder}, "--image_column mask: is for hf:NAME only"),
                           ({"paths": []}, "--data_path: give a folder of images, a text file")):
        with pytest.raises(ConfigError, match=message):
            open_images(**words)
    parse = get_args_parser().parse_args
    assert parse(["--image_suffix", "JPG", ".seg.png"]).image_suffix == [".jpg", ".seg.png"]
    with pytest.raises(SystemExit):
        parse(["--image_suffix", ".cls"])
    assert "'.cls' is no suffix of images" in capsys.readouterr().err


# ---------------------------------------------------------------- what is none of these


@pytest.mark.parametrize("words, message", [
    (["{0}", "{0}"], "each must be a .zip or .tar archive"), (["{0}/class0/00.jpg"], "is no folder, archive or text"),
    (["{1}/x.tar.gz"], "compressed as a whole.*decompress it"), (["nowhere"], "no folder nowhere, and no file"),
    (["{1}/none.py:3"], "there is no file .*none.py"), (["{1}/empty.py:3"], "has no function open_images"),
    (["{1}/empty.py"], "give .*empty.py:ARGUMENT"), (["{1}/x.tar", "{1}/x.tar"], "x.tar is given twice"),
    (["{1}/x.tar", "{1}/link.tar"], "link.tar is the same archive as .*x.tar"),
    (["{1}"], "has no images in it: not read: 2 .tar .*give the archives in it themselves")])
def test_what_cannot_be_read_is_one_line(image_folder, tmp_path, words, message):
    (tmp_path / "x.tar.gz").touch()
    (tmp_path / "empty.py").touch()
    (tmp_path / "x.tar").touch()
    (tmp_path / "link.tar").symlink_to("x.tar")
    words = [sys.intern(word.format(image_folder, tmp_path)) for word in words]  # one object if given twice
    with pytest.raises(ConfigError, match=message) as error:
        open_images(words)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- names


def test_packed_names_are_the_names():
    undecoded = "ü.jpg".encode().decode("ascii", "surrogateescape")  # of a folder, where Python takes names for ASCII
    names = ["a/b.jpg", "", "ü.jpg", os.fsdecode(b"not\xffutf8.jpg"), undecoded, "z"]
    packed = PackedNames(iter(names))
    assert list(packed) == names and [packed[i] for i in range(6)] == names and packed[-1] == "z"
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
