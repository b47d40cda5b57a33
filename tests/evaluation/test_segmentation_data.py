"""Data sets of masks: what is found, and what is refused in one line."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from dense_data import TRUE_BOXES, make_ade20k, make_folders, make_voc, write_pair
from PIL import Image

from selfpatch.data import archives
from selfpatch.data.files import load_ids
from selfpatch.errors import ConfigError
from selfpatch.evaluation.object_discovery import find_box_data
from selfpatch.evaluation.segmentation import IGNORE, find_segmentation_data


def test_voc_with_and_without_sbd(tmp_path):
    root = make_voc(tmp_path / "VOC2012")
    plain, augmented = (find_segmentation_data(f"{kind}:{root}") for kind in ("voc", "voc_aug"))
    assert [(len(data.train), len(data.val), data.num_classes) for data in (plain, augmented)] == [(3, 3, 21),
                                                                                                   (4, 3, 21)]
    assert Path(str(augmented.train[3].mask)).parent.name == "SegmentationClassAug"
    assert Path(str(augmented.val[0].mask)).parent.name == "SegmentationClass"
    image, ids = plain.read(plain.train[0])
    assert image.size == (96, 64) and ids.shape == (64, 96) and set(np.unique(ids)) == {0, 1, 2}


def test_ade20k_ids_count_from_one(tmp_path):
    root = make_ade20k(tmp_path / "ade")
    data = find_segmentation_data(f"ade20k:{root}")
    ids = data.read(data.val[0])[1]
    assert data.num_classes == 150 and set(np.unique(ids)) == {0, 1, IGNORE}
    assert ids[0, 0] == IGNORE and ids[10, 10] == 0
    write_pair(*(Path(str(one)) for one in data.val[0]), 0, lambda ids: np.where(ids == 1, 151, ids).astype(np.uint8))
    with pytest.raises(ConfigError, match="has the id 151, but ADE20K has 150 classes, 1 to 150: if the ids count"):
        data.read(data.val[0])


def test_folders_of_pairs(tmp_path):
    data = find_segmentation_data(f"folders:{make_folders(tmp_path)}", 3)
    assert len(data.train) == len(data.val) == 4 and data.num_classes == 3
    with pytest.raises(ConfigError, match="has the id 2, but images has 2 classes"):
        find_segmentation_data(f"folders:{tmp_path / 'images'},{tmp_path / 'masks'}", 2).read(data.val[0])


@pytest.mark.parametrize("split, change, says", [
    ("val", lambda ids: np.full_like(ids, IGNORE), "the 4 masks of val have no pixel that counts .255 is not scored"),
    ("train", lambda ids: np.full_like(ids, IGNORE), "the 4 masks of train have no pixel that counts"),
    ("val", lambda ids: ids * 0, "the 4 masks of val have only the class 0 .255 is not scored.*nothing to tell apart"),
    ("train", lambda ids: np.where(ids, IGNORE, 0).astype(np.uint8), "the 4 masks of train have only the class 0")])
def test_masks_without_two_classes(tmp_path, split, change, says):
    data = f"folders:{make_folders(tmp_path)}"
    for i in range(4):
        write_pair(tmp_path / f"images/{split}/{i}.jpg", tmp_path / f"masks/{split}/{i}.png", i, change)
    with pytest.raises(ConfigError, match=says) as error:
        find_segmentation_data(data, 3)
    assert "\n" not in str(error.value)
    write_pair(tmp_path / f"images/{split}/3.jpg", tmp_path / f"masks/{split}/3.png", 3)
    assert len(find_segmentation_data(data, 3).val) == 4  # one mask is enough


def test_two_masks_of_one_name(tmp_path):
    data = f"folders:{make_folders(tmp_path)}"
    (tmp_path / "masks/val/1.bmp").write_bytes((tmp_path / "masks/val/1.png").read_bytes())
    for find in (find_box_data, lambda text: find_segmentation_data(text, 3)):
        with pytest.raises(ConfigError, match="1.bmp and 1.png are masks of the same name"):
            find(data)


# ---------------------------------------------------------------- archives, lists and data sets


def pack(folder, archive):
    """All files below a folder, as archives are published: with the folder itself as their top."""
    return shutil.make_archive(str(archive.with_suffix("")), archive.suffix[1:], folder.parent, folder.name)


def write_list(folder):
    path = folder.with_suffix(".txt")
    path.write_text("".join(f"{one}\n" for one in sorted(folder.rglob("*.*"))))
    return path


def contents(data):
    """What a data set of masks gives, in order."""
    return [[(image.tobytes(), ids.tobytes()) for image, ids in map(data.read, pairs)]
            for pairs in (data.train, data.val)]


@pytest.mark.parametrize("form", ["zip", "tar"])
def test_published_data_sets_in_archives(tmp_path, monkeypatch, form):
    """Also their lists and boxes; threads read their headers, whatever others do to the cache of open archives."""
    monkeypatch.setattr(archives, "open_archive", archives.lru_cache(maxsize=0)(archives.open_archive.__wrapped__))
    voc, ade = make_voc(tmp_path / "VOC2012"), make_ade20k(tmp_path / "ADE")
    packed = [pack(folder, tmp_path / f"{folder.name}.{form}") for folder in (voc, ade)]
    for kind, *places in (("voc", voc, packed[0]), ("voc_aug", voc, packed[0]), ("ade20k", ade, packed[1])):
        expected, ours = (find_segmentation_data(f"{kind}:{place}") for place in places)
        assert contents(ours) == contents(expected)
    ours, expected = (find_box_data(f"voc:{place}") for place in (packed[0], voc))
    assert [image.name for image in ours] == [image.name for image in expected] == [f"{i:06}" for i in range(3)]
    assert [image.read_boxes().tolist() for image in ours] == [image.read_boxes().tolist() for image in expected]
    assert [image.image.read() for image in ours] == [image.image.read() for image in expected]


@pytest.mark.parametrize("form", ["zip", "tar", "txt"])
def test_pairs_in_archives_and_lists(tmp_path, form):
    folders = make_folders(tmp_path)
    places = [write_list(tmp_path / name) if form == "txt" else pack(tmp_path / name, tmp_path / f"{name}.{form}")
              for name in ("images", "masks")]
    ours, expected = (find_segmentation_data(f"folders:{place}", 3)
                      for place in (f"{places[0]},{places[1]}", folders))
    assert contents(ours) == contents(expected) and len(ours.train) == 4
    boxes, expected = (find_box_data(f"folders:{place}") for place in (f"{places[0]},{places[1]}", folders))
    assert [(one.name, one.read_boxes().tolist()) for one in boxes] == [
        (one.name, one.read_boxes().tolist()) for one in expected]
    assert [one.name for one in find_box_data(f"images:{places[0]}")] == [one.name for one in expected]
    with pytest.raises(ConfigError, match=f"images.{form} is not a VOC folder.*: there is no ImageSets/"):
        find_segmentation_data(f"voc:{places[0]}")
    (tmp_path / "masks/val/2.png").unlink()
    with pytest.raises(ConfigError, match="1 of 4 images in .*val have no mask in .*masks/val, such as 2.jpg"):
        find_segmentation_data(f"folders:{places[0]},{tmp_path / 'masks'}", 3)
    if form != "txt":  # images in one folder
        places = [pack(tmp_path / name / "train", tmp_path / f"{name}.{form}") for name in ("images", "masks")]
        for data in (f"folders:{places[0]},{places[1]}", f"images:{places[0]}"):
            assert [one.name for one in find_box_data(data)] == ["0", "1", "2", "3"]


def test_images_of_cocos_file_in_an_archive(tmp_path):
    make_folders(tmp_path)
    archive = pack(tmp_path / "images/val", tmp_path / "val2017.zip")
    for names in (["0.jpg", "1.jpg"], ["val/0.jpg", "val/1.jpg"]):
        content = {"images": [{"id": i, "file_name": name} for i, name in enumerate(names)],
                   "annotations": [{"image_id": 1, "bbox": [8, 8, 32, 32]}]}
        (tmp_path / "boxes.json").write_text(json.dumps(content))
        images = find_box_data(f"coco:{tmp_path / 'boxes.json'},{archive}")
        assert [one.image.read() for one in images] == [(tmp_path / f"images/val/{i}.jpg").read_bytes() for i in (0, 1)]
        assert images[1].read_boxes().tolist() == [[8, 8, 40, 40]]
    (tmp_path / "boxes.json").write_text(json.dumps(content | {"images": [{"id": 1, "file_name": "train/0.jpg"}]}))
    with pytest.raises(ConfigError, match="1 of 1 images are missing, such as .*val2017.zip/train/0.jpg"):
        find_box_data(f"coco:{tmp_path / 'boxes.json'},{archive}")


def test_a_name_in_a_list_is_no_path_out_of_the_pictures(tmp_path):
    root = make_voc(tmp_path / "voc")
    (root / "ImageSets/Main/trainval.txt").write_text("../JPEGImages/000000\n000001 -1\n000002.a\n")
    shutil.copy(root / "JPEGImages/000002.jpg", root / "JPEGImages/000002.a.jpg")
    for name in ("JPEGImages/000000", "Annotations/000002.a"):
        (root / f"{name}.xml").write_text("<annotation/>")
    assert [image.name for image in find_box_data(f"voc:{root}")] == ["JPEGImages/000000", "000001", "000002.a"]


def test_masks_in_a_column(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    folders, splits = make_folders(tmp_path), {}
    features = datasets.Features(image=datasets.Image(), annotation=datasets.Image())
    for part, split in (("train", "train"), ("val", "validation")):
        # masks in another order of names than their images
        rows = [{name: {"bytes": path.read_bytes(), "path": f"{9 - i if name == 'annotation' else i}.png"}
                 for name, path in (("image", tmp_path / f"images/{part}/{i}.jpg"),
                                    ("annotation", tmp_path / f"masks/{part}/{i}.png"))} for i in range(4)]
        splits[split] = datasets.Dataset.from_list(rows, features=features)
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    place = f"hf:{tmp_path / 'saved'}"
    assert contents(find_segmentation_data(f"{place},annotation", 3)) == contents(
        find_segmentation_data(f"folders:{folders}", 3))
    assert [one.read_boxes().tolist() for one in find_box_data(f"{place}:validation,annotation")][0] == TRUE_BOXES
    assert len(find_box_data(f"images:{place}")) == 4
    with pytest.raises(ConfigError, match="name the column of masks too, hf:NAME,COLUMN"):
        find_segmentation_data(place, 3)


def test_lists_of_two_paths_and_images_in_both(tmp_path):
    root = make_voc(tmp_path / "voc")
    path = root / "ImageSets/Segmentation/trainaug.txt"
    expected = contents(find_segmentation_data(f"voc_aug:{root}"))
    path.write_text("".join(f"/JPEGImages/{i:06}.jpg /SegmentationClassAug/{i:06}.png\n" for i in range(4)))
    assert contents(find_segmentation_data(f"voc_aug:{root}")) == expected
    for line, says in (("/JPEGImages/000000.jpg", "trainaug.txt: /JPEGImages/000000.jpg: give a name, or the paths"),
                       ("/JPEGImages/000000.jpg /Masks/000000.png", "1 of 1 masks of trainaug.txt are missing, such as "
                                                                    ".*voc/Masks/000000.png")):
        path.write_text(line)
        with pytest.raises(ConfigError, match=says):
            find_segmentation_data(f"voc_aug:{root}")
    path.write_text("000000\n000010\n000011\n")
    for i in (10, 11):
        shutil.copy(root / f"SegmentationClass/{i:06}.png", root / "SegmentationClassAug")
    with pytest.raises(ConfigError, match="2 of 3 test images are training images too, such as .*000010.jpg"):
        find_segmentation_data(f"voc_aug:{root}")


def test_ids_that_count_from_zero_are_reported(tmp_path, capsys):
    data = find_segmentation_data(f"ade20k:{make_ade20k(tmp_path)}")
    confusion = np.zeros((150, 150), np.int64)
    data.check_shift(confusion)
    assert "no test mask of ADE20K has the id 150: if the ids count from 0, give folders:" in capsys.readouterr().err
    confusion[149, 3] = 1
    data.check_shift(confusion)
    find_segmentation_data(f"folders:{make_folders(tmp_path / 'pairs')}", 3).check_shift(confusion * 0)
    assert not capsys.readouterr().err


# ---------------------------------------------------------------- what is refused


def damage(root, what):
    """Spoil one thing of what make_folders, make_voc and make_ade20k have made."""
    mask = root / "masks" / "val" / "1.png"
    if what == "size":
        write_pair(root / "other.jpg", mask, 1, width=92)
    elif what == "missing":
        mask.unlink()
    elif what == "text":
        mask.write_text("no image")
    elif what == "aug":
        (root / "voc" / "SegmentationClassAug" / "000003.png").unlink()
    elif what == "split":
        (root / "masks" / "val").rename(root / "masks" / "test")


@pytest.mark.parametrize("what, data, says", [
    ("size", "folders:{0}/images,{0}/masks", "val/1.png: is 92×64, its image .*1.jpg 96×64"),
    ("missing", "folders:{0}/images,{0}/masks", "1 of 4 images in .* have no mask in .*, such as 1.jpg"),
    ("text", "folders:{0}/images,{0}/masks", "cannot read the image .*val/1.png .not an image"),
    ("split", "folders:{0}/images,{0}/masks", "there is no folder val or validation with images .* in .*masks"),
    ("aug", "voc_aug:{0}/voc", "1 of 4 masks of trainaug.txt are missing, such as .*000003.png"),
    ("", "voc:{0}/ade", "is not a VOC folder.*there is no ImageSets/Segmentation/train.txt"),
    ("", "ade20k:{0}/voc", "is not ADEChallengeData2016: there is no folder images"),
    ("", "voc:{0}/nowhere", "there is no folder .*nowhere"),
    ("", "cityscapes:{0}", "--data cityscapes:.*: give voc:PLACE"),
    ("", "folders:{0}/images", "give two folders, folders:IMAGES,MASKS")])
def test_refusals(tmp_path, what, data, says):
    make_folders(tmp_path)
    make_voc(tmp_path / "voc")
    make_ade20k(tmp_path / "ade")
    damage(tmp_path, what)
    with pytest.raises(ConfigError, match=says) as error:
        find_segmentation_data(data.format(tmp_path), 3 if data.startswith("folders") else None)
    assert "\n" not in str(error.value)


def test_number_of_classes_where_it_belongs(tmp_path):
    with pytest.raises(ConfigError, match="needs --num_classes"):
        find_segmentation_data(f"folders:{make_folders(tmp_path)}")
    with pytest.raises(ConfigError, match="--num_classes 3: is for folders: and hf: only"):
        find_segmentation_data(f"voc:{make_voc(tmp_path / 'voc')}", 3)


def test_ids_of_few_bits(tmp_path):
    for bits in (1, 8):
        image = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8) * (255 if bits == 1 else 1))
        image.convert("1" if bits == 1 else "L").save(tmp_path / "mask.png")
        assert load_ids(tmp_path / "mask.png")[0].tolist() == [[0, 1], [1, 0]]
    Image.new("RGB", (2, 2)).save(tmp_path / "mask.png")
    with pytest.raises(ConfigError, match="is RGB, not an indexed PNG"):
        load_ids(tmp_path / "mask.png")
