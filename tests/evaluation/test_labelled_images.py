"""Images with classes: the same figures from every form of data, files of labels, and what is refused or reported."""
import os
import shutil
import zipfile

import image_kinds
import pytest
import torch
from evaluation_jobs import SMALL, make_class_folders, run_job
from image_kinds import files, write_hub, write_list, write_tar, write_zip

import eval_knn
from selfpatch.errors import ConfigError
from selfpatch.evaluation.image_trees import read_labels
from selfpatch.evaluation.labelled_images import Places, open_labelled, open_pair

CLASSES = ["ant", "bee", "cat"]


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    return make_class_folders(tmp_path_factory.mktemp("colours"), ".jpg", train=4, val=3)


def parts(write, suffix=""):
    """Options for train and val, each written by a function."""
    def make(folder, path):
        return [word for part in ("train", "val")
                for word in (f"--{part}_path", write(folder / part, path.with_name(f"{part}{suffix}")))]
    return make


def write_hub_splits(folder, path):
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    splits = {split: datasets.load_from_disk(write_hub(folder / part, path.with_name(part)).removeprefix("hf:"))
              for part, split in (("train", "train"), ("val", "validation"))}
    datasets.DatasetDict(splits).save_to_disk(path)
    return ["--data_path", f"hf:{path}"]


def write_shards(folder, path):
    images = files(folder / "train")
    shards = [write_tar(folder / "train", path.with_name(f"{i}.tar"), "train", images[i::2]) for i in range(2)]
    return ["--train_path", *shards, "--val_path", folder / "val"]


def write_own_images(folder, path):
    """A function that reads folders."""
    path.with_name("mine.py").write_text(
        "from pathlib import Path\n\ndef open_images(folder):\n"
        "    names = [str(path.relative_to(folder)) for path in Path(folder).rglob('*.jpg')]\n"
        "    return names, lambda name: Path(folder, name).read_bytes()\n")
    return f"{path.with_name('mine.py')}:{folder}"


KINDS = {"own": parts(write_own_images),
         "pattern": lambda folder, path: ["--train_path", image_kinds.write_shards(folder / "train", path),
                                          "--val_path", folder / "val"],
         "one tar": lambda folder, path: ["--data_path", write_tar(folder, path.with_suffix(".tar"), "colours")],
         "list": parts(write_list), "zip": parts(write_zip, ".zip"), "tar": parts(write_tar, ".tar"),
         "hub": parts(write_hub), "shards": write_shards, "splits": write_hub_splits,
         "one list": lambda folder, path: ["--data_path", write_list(folder, path)],
         "one zip": lambda folder, path: ["--data_path", write_zip(folder, path.with_suffix(".zip"), "colours")],
         "list with classes": parts(lambda folder, path: write_list(folder, path, lambda image: f"\t{image.parent.name}"
                                                                    ))}


def features_of(tmp_path, name, *words):
    """What the job of k-NN has extracted: features and classes of training and test images."""
    assert run_job(eval_knn, *SMALL, *words, "--random_weights", "--arch", "vit_tiny", "--nb_knn", 3,
                   "--dump_features", tmp_path / name) == 0
    return [torch.load(tmp_path / name / part) for part in eval_knn.DUMPED]


@pytest.fixture(scope="module")
def expected(colours, tmp_path_factory):
    return features_of(tmp_path_factory.mktemp("folder"), "features", "--data_path", colours)


@pytest.mark.parametrize("kind", KINDS)
def test_every_form_gives_the_figures_of_the_folder(colours, expected, tmp_path, capsys, kind):
    found = features_of(tmp_path, "features", *KINDS[kind](colours, tmp_path / "data"))
    assert len(found[0]) == 12 and len(found[2]) == 9 and all(map(torch.equal, found, expected))
    assert "12 training and 9 test images of 3 classes" in capsys.readouterr().out


def test_a_share_of_an_archive(colours, tmp_path):
    archive = write_tar(colours / "train", tmp_path / "x.tar")
    found, expected = (open_pair(Places(data, val_share=0.5)) for data in (archive, colours / "train"))
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.labels, theirs.labels) and torch.equal(ours.indices, theirs.indices)
    assert torch.equal(found[1][2][0], expected[1][2][0])


def test_photographs_beside_their_masks(colours, expected, tmp_path, capsys):
    data = shutil.copytree(colours, tmp_path / "colours")
    for image in list(data.rglob("*.jpg")):
        shutil.copy(image, image.with_name(f"{image.stem}.seg.jpg"))
    found = features_of(tmp_path, "features", "--data_path", data, "--image_suffix", ".jpg")
    assert all(map(torch.equal, found, expected))
    assert "12" in capsys.readouterr().err  # of each part, a line counts the masks


# ---------------------------------------------------------------- files of labels


@pytest.mark.parametrize("text", [
    "x 1.png ant\ny.png bee\nz.png cat\n", "z.png\t2\ny.png\t1\nx 1.png\t0\n", "0\n1\n2\n\n", "ant\nbee\ncat",
    "ImageId,PredictionString\nw,ant 1 2 3 4\nx 1,ant 85 1 499 272\ny,bee 1 2 3 4 bee 5.0 -6 7 8\nz,cat 1 1 1 1\n",
    "\ufeffy.png,bee\r\nx 1.png,ant\r\nz.png,cat\r\n", "cat z.png\nant x 1\nbee y.png", "2,z\n0,x 1.png\n1,y\n",
    "x 1,ant 5\ny,bee\nx 1,ant 7\nz,cat\n"])
def test_labels_by_name_or_in_order(tmp_path, text):
    (tmp_path / "labels").write_text(text)
    assert read_labels(tmp_path / "labels", ["x 1.png", "y.png", "z.png"], CLASSES) == [0, 1, 2]


def test_class_names_that_are_numbers_or_have_spaces(tmp_path):
    (tmp_path / "labels").write_text("x.png 10\ny.png 2\n")
    assert read_labels(tmp_path / "labels", ["x.png", "y.png"], ["1", "10", "2"]) == [1, 2]
    for text in ("x.png golden retriever\ny.png a, b\n", "golden retriever x\na, b y\n", "golden retriever\na, b\n"):
        (tmp_path / "labels").write_text(text)
        assert read_labels(tmp_path / "labels", ["x.png", "y.png"], ["a, b", "golden retriever"]) == [1, 0]


@pytest.mark.parametrize("text, says", [
    ("x.png ant\n", "labels have 1 lines, and no label for 2 of 3 images, such as y.png: give a line"),
    ("ant\nbee\n", "labels have 2 lines, and no label for 3 of 3 images"),
    ("1\n2\n3\n", "labels give z.png the class 3, which is neither one of the 3 classes .* nor a number from 0 to 2"),
    ("ant\nbee\ndog\n", "labels give z.png the class dog, which is neither"),
    ("x ant hill\ny bee\nz cat\n", "labels give x.png the class ant hill, which is neither"),
    ("cat c1\nant c2\nbee c3\n", "labels give x.png the class cat c1, which is neither"),
    ("x ant\ny bee\nz cat\nx.png cat\n", "labels give x.png two classes, ant and cat: remove one of the lines")])
def test_labels_that_do_not_fit(tmp_path, text, says):
    (tmp_path / "labels").write_text(text)
    with pytest.raises(ConfigError, match=says) as error:
        read_labels(tmp_path / "labels", ["x.png", "y.png", "z.png"], CLASSES)
    assert "\n" not in str(error.value)


def test_labels_whose_order_or_numbers_may_be_others(tmp_path, capsys):
    labels = tmp_path / "labels"
    labels.write_text("ant\nbee\ncat\n")
    for names, one_order in ((["1.png", "10.png", "2.png"], True), (["x.png", "y.png", "z.png"], False)):
        with pytest.raises(ConfigError, match="labels are without names, and the images have more than one order"):
            read_labels(labels, names, CLASSES, one_order)
    assert read_labels(labels, ["01.png", "02.png", "10.png"], CLASSES) == [0, 1, 2]
    labels.write_text("x 1\ny 2\nz 0\n")
    with pytest.raises(ConfigError, match="labels give z.png the class 0, which is neither"):
        read_labels(labels, ["x.png", "y.png", "z.png"], ["1", "2", "3"])
    assert read_labels(labels, ["x.png", "y.png", "z.png"], CLASSES) == [1, 2, 0] and not capsys.readouterr().err
    assert read_labels(labels, ["x.png", "y.png"], CLASSES) == [1, 2]
    assert "labels have no 0, which is the first class, ant: if they count from 1, all" in capsys.readouterr().err


def test_labels_alone_go_with_a_folder_but_not_with_a_list(colours, tmp_path):
    (tmp_path / "flat").mkdir()
    for i, image in enumerate(sorted((colours / "val").rglob("*.jpg"))):
        shutil.copy(image, tmp_path / f"flat/{i}.jpg")
    labels = tmp_path / "labels.txt"
    labels.write_text("".join(f"{name}\n" for name in ("blue", "green", "red") for _ in range(3)))
    _, val = open_pair(Places(train=colours / "train", val=tmp_path / "flat", val_labels=labels))
    assert val.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    refuse("labels.txt are without names", train=colours / "train", val_labels=labels,
           val=write_list(tmp_path / "flat", tmp_path / "list.txt"))
    labels.write_text("red\n" * 9)
    refuse("^--val_labels .*labels.txt gives all images one class, red: there is nothing to tell apart",
           train=colours / "train", val=tmp_path / "flat", val_labels=labels)


@pytest.mark.parametrize("form", [lambda folder: folder, lambda folder: write_tar(folder, folder.with_suffix(".tar")),
                                  lambda folder: write_list(folder, folder.with_suffix(".txt"))])
def test_a_flat_folder_of_test_images_with_a_file_of_labels(colours, expected, tmp_path, form):
    """As ImageNet's validation images are downloaded."""
    flat, labels = tmp_path / "flat", []
    flat.mkdir()
    for i, image in enumerate(sorted((colours / "val").rglob("*.jpg"))):
        shutil.copy(image, flat / f"{i:08}.jpg")
        labels.append(f"{i:08}.jpg {image.parent.name}\n")
    (tmp_path / "labels.txt").write_text("".join(labels[::-1]))
    found = features_of(tmp_path, "features", "--train_path", colours / "train", "--val_path", form(flat),
                        "--val_labels", tmp_path / "labels.txt")
    assert all(map(torch.equal, found, expected))


# ---------------------------------------------------------------- what is refused or reported


def test_a_class_without_images_is_reported_and_does_not_count(colours, tmp_path, capsys):
    shutil.copytree(colours, tmp_path, dirs_exist_ok=True)
    for part in ("train", "val"):
        (tmp_path / part / "dog").mkdir()
    pair = open_pair(Places(tmp_path))
    assert [images.classes for images in pair] == [["blue", "green", "red"]] * 2
    assert f"warning: --data_path {tmp_path}/val: no images of dog: 3 classes count\n" in capsys.readouterr().err
    shutil.copy(tmp_path / "val/red/00.jpg", tmp_path / "val/dog")
    with pytest.raises(ConfigError, match="differ in class folders: dog is in one of them only"):
        open_pair(Places(tmp_path))


def test_images_without_a_class_are_reported(colours, tmp_path, capsys):
    shutil.copytree(colours / "train", tmp_path, dirs_exist_ok=True)
    shutil.copy(tmp_path / "red/00.jpg", tmp_path / "beside.jpg")
    (tmp_path / "list.txt").write_text("".join(f"{path.relative_to(tmp_path)}\n" for path in files(tmp_path)))
    images = open_labelled(tmp_path / "list.txt", "--data_path")
    assert len(images) == 12 and "1 images without a class are left out" in capsys.readouterr().err


def refuse(says, **places):
    with pytest.raises(ConfigError, match=says) as error:
        open_pair(Places(**places))
    assert "\n" not in str(error.value)


def test_images_that_are_in_both(colours, tmp_path):
    (tmp_path / "link").symlink_to(colours / "train")
    archive, text = write_zip(colours / "train", tmp_path / "x.zip"), tmp_path / "val.txt"
    text.write_text("".join(f"{path}\n" for path in files(colours / "train")[3:]))
    train = write_list(colours / "train", tmp_path / "train.txt")
    for a, b in ((colours / "train", tmp_path / "link"), (archive, archive)):
        refuse("^12 of 12 test images are training images too, such as .*blue/00.jpg", train=a, val=b)
    for a in (train, colours / "train"):
        refuse("^9 of 9 test images are training images too", train=a, val=text)


def test_archives_that_are_in_both(colours, tmp_path):
    images = files(colours / "train")
    for write, end in ((write_tar, "tar"), (lambda *args: write_zip(*args[:2]), "zip")):
        shards = [write(colours / "train", tmp_path / f"{i}.{end}", "", images[i::2]) for i in range(2)]
        (tmp_path / f"link.{end}").symlink_to(shards[1])
        refuse(f"^{12 if end == 'zip' else 6} of .* test images are training images too", train=shards,
               val=tmp_path / f"link.{end}")
    refuse("^6 of 6 test images are training images too, such as .*1.tar/", train=str(tmp_path / "?.tar"),
           val=tmp_path / "1.tar")


@pytest.mark.parametrize("copy", [
    lambda folder, path: write_zip(folder, path.with_suffix(".zip"), "top"),
    lambda folder, path: shutil.copytree(folder, path),
    lambda folder, path: shutil.copytree(folder, path, copy_function=os.symlink)])
def test_copies_of_training_images(colours, tmp_path, copy):
    refuse("^12 of 12 test images are copies of training images, by their names and the bytes of some, such as",
           train=colours / "train", val=copy(colours / "train", tmp_path / "copy"))


def test_a_split_of_a_data_set_by_two_names(colours, tmp_path, capsys):
    name = write_hub_splits(colours, tmp_path / "set")[1]
    open_labelled(name, "--val_path")
    line = f"warning: --val_path {name}: images of the column image, classes of the column label\n"
    assert capsys.readouterr().err.endswith(line)
    refuse("^12 of 12 test images are copies of training images", train=name, val=f"{name}:train")
    refuse("^12 of 12 test images are training images too", train=name, val=name)


def test_an_image_that_is_listed_twice_stays_on_one_side(colours, tmp_path):
    names = [f"{path}\n" for path in files(colours / "train")]
    (tmp_path / "list.txt").write_text("".join(names + names[:9]))
    train, val = open_pair(Places(tmp_path / "list.txt", val_share=0.5))
    sides = [{images.images.names[i] for i in images.indices.tolist()} for images in (train, val)]
    assert not sides[0] & sides[1] and [len(side) for side in sides] == [6, 6] and len(train) + len(val) == 21


def test_folders_of_splits_are_no_classes(colours, tmp_path):
    shutil.copytree(colours, tmp_path / "a")
    shutil.copytree(colours / "val", tmp_path / "a/test")
    refuse("a has the folders test, train, val, which are no classes: leave --val_share out", data=tmp_path / "a",
           val_share=0.5)
    refuse("a has the folders test, train, val, .*: name them train and val, or give one", train=tmp_path / "a",
           val=colours / "val")
    for folder, *names in (("b", "train", "test"), ("c", "Train", "Val")):
        for part, name in zip(("train", "val"), names, strict=True):
            shutil.copytree(colours / part, tmp_path / folder / name)
        refuse(f"{names[-1]}.* are no classes: name them train and val", data=tmp_path / folder,
               option="--knn_data", undivided_share=0.2)


def test_a_second_data_set_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("selfpatch.data.hub.require_packages", lambda *names: None)
    refuse("^--data_path hf:A: of several values each must be a .zip or .tar archive", data=["hf:A", "hf:B"])


def test_one_class(colours, tmp_path):
    for part in ("train", "val"):
        shutil.copytree(colours / part, tmp_path / part / "animals")
    refuse("train has images of one class only, animals: .*one level deeper", data=tmp_path)
    refuse("one class only, animals", data=tmp_path / "train", val_share=0.5)


def test_forms_without_classes(colours, tmp_path):
    with zipfile.ZipFile(tmp_path / "flat.zip", "w") as archive:
        for i, image in enumerate(files(colours / "val")):
            archive.write(image, f"{i}.jpg")
    refuse("--val_path: .*flat.zip has no folders in it that could be classes.*; or give --val_labels$",
           train=colours / "train", val=tmp_path / "flat.zip")
    refuse("--train_path: .*flat.zip has no folders in it that could be classes.* needs a column of them$",
           train=tmp_path / "flat.zip", val=colours / "val")
    refuse("flat.zip has no train/ and val/ in it: give --train_path", data=tmp_path / "flat.zip")
    refuse("which are no classes: leave --val_share out", data=colours, val_share=0.5)
    refuse("^--val_labels .*: there is no regular file of that name", train=colours / "train", val=colours / "val",
           val_labels=colours)
    refuse("give that alone", data=colours, val_share=0.5, val_labels="x")
    refuse("give either --data_path", data=colours, val=colours)
