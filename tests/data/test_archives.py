"""Zip and tar archives, read in place by several workers: the index kept beside them, damage, links, odd members."""
import io
import os
import shutil
import struct
import tarfile
import zipfile
import zlib

import pytest
import torch
from image_kinds import epoch, files, write_tar, write_zip
from small_job import load, options

from main_selfpatch import train_dino
from selfpatch.data import archives
from selfpatch.data.archives import ArchiveImages
from selfpatch.data.dataset import build_dataset
from selfpatch.data.files import UnreadableImage
from selfpatch.data.loader import CropLoader
from selfpatch.data.sources import open_images
from selfpatch.distributed.processes import Process
from selfpatch.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning",
                                        "ignore:.*fork.*:DeprecationWarning",
                                        "ignore:This DataLoader will create:UserWarning")
WRITERS = {"zip": write_zip, "tar": write_tar}


@pytest.fixture(params=WRITERS)
def archive(request, image_folder, tmp_path):
    return WRITERS[request.param](image_folder, tmp_path / f"images.{request.param}", "train")


@pytest.mark.parametrize("rank", [0, 1])
def test_four_workers_and_two_ranks_give_the_folders_batches(image_folder, archive, rank):
    found, expected = (epoch(data, num_workers=4, process=Process(rank, 2))[1] for data in (archive, image_folder))
    assert len(found) == 3 and all(map(torch.equal, found, expected))


def test_an_epoch_continues_within_an_archive(image_folder, archive):
    """Also if its first batches came from the folder."""
    expected = epoch(image_folder, num_workers=2)[1]
    for first in (archive, image_folder):
        found = epoch(first, batches=2, num_workers=2)[1]
        rest = epoch(archive, start=2, num_workers=1)[1]
        assert len(rest) == 4 and all(map(torch.equal, found + rest, expected))


@pytest.mark.slow
def test_workers_that_are_started_anew_open_archives_by_themselves(image_folder, tmp_path):
    dataset = build_dataset(write_tar(image_folder, tmp_path / "x.tar"), local_crops_number=0, global_crops_size=16)
    loader = CropLoader(dataset, 6, num_workers=1)
    loader.batches.multiprocessing_context = "spawn"
    assert len(list(loader)) == 2


def test_more_archives_than_are_kept_open(archive, monkeypatch):
    monkeypatch.setattr(archives, "open_archive", archives.lru_cache(maxsize=1)(archives.open_archive.__wrapped__))
    other = shutil.copy(archive, archive.with_stem("other"))
    images = ArchiveImages([str(archive), str(other)])
    assert len(images) == 24 and [images.read(i) == images.read(i - 1) for i in (1, 3)] == [True, True]
    assert images.location(1) == f"{other}/train/class0/00.jpg"


def test_the_index_is_kept_and_made_anew_for_another_archive(archive, monkeypatch):
    def refuse(path):
        pytest.fail("indexed again")

    expected = open_images(archive)
    kept = archive.with_name(f"{archive.name}.index.npz")
    assert kept.is_file() and sorted(os.listdir(archive.parent)) == [archive.name, kept.name]
    with monkeypatch.context() as patch:
        patch.setattr(archives, "make_index", refuse)
        found = open_images(archive)
    assert list(found.names) == list(expected.names) and torch.equal(found.positions, expected.positions)
    whole, indexed = kept.read_bytes(), []
    make = archives.make_index
    monkeypatch.setattr(archives, "make_index", lambda path: indexed.append(path) or make(path))
    for content in (whole[:200], b"", whole[:-30] + bytes(30)):
        kept.write_bytes(content)
        assert list(open_images(archive).names) == list(expected.names) and kept.read_bytes() == whole
    os.utime(archive, (1, 1))
    open_images(archive)
    assert len(indexed) == 4


def test_a_folder_that_cannot_be_written_to_needs_no_index(archive, monkeypatch):
    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(archives.np, "savez", refuse)
    assert len(open_images(archive)) == 12 and os.listdir(archive.parent) == [archive.name]


@pytest.mark.slow
def test_the_job_continues_a_folders_run_on_an_archive_of_it(two_epochs, archive, small_network, tmp_path):
    """Whose images are the same: nothing is refused, and the numbers are the uninterrupted run's."""
    shutil.copy(two_epochs / "checkpoint0000.pth", tmp_path / "checkpoint.pth")
    train_dino(options("--epochs", 2, "--data_path", archive, "--output_dir", tmp_path))
    found, expected = (load(folder / "checkpoint.pth") for folder in (tmp_path, two_epochs))
    rows = [(folder / "log.txt").read_text().splitlines()[-1] for folder in (tmp_path, two_epochs)]
    assert rows[0] == rows[1] and found["args"]["data"] == expected["args"]["data"]
    assert all(torch.equal(found["student"][name], value) for name, value in expected["student"].items())


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("share", [0.02, 0.5, 0.7])
def test_an_archive_that_is_cut_off_is_one_line(archive, share):
    data = archive.read_bytes()
    archive.write_bytes(data[:int(share * len(data))])
    with pytest.raises(ConfigError, match=rf"{archive} is cut off.*: copy or download it again") as error:
        open_images(archive)
    assert "\n" not in str(error.value)


def test_two_zips_in_one_file_and_a_part_of_a_split_one(image_folder, tmp_path):
    first, second = (write_zip(image_folder, tmp_path / name).read_bytes() for name in ("a.zip", "b.zip"))
    (tmp_path / "joined.zip").write_bytes(first + second)
    (tmp_path / "part.zip").write_bytes(first[len(first) // 2:])
    (tmp_path / "program.zip").write_bytes(b"#!/bin/sh\nexit\n" + first)
    for name, message in (("joined.zip", f"is two zip archives in one file.*begins at byte {len(first):,}: "),
                          ("part.zip", "part.zip is a part of a split zip archive: join its parts")):
        with pytest.raises(ConfigError, match=message):
            open_images(tmp_path / name)
    assert len(open_images(tmp_path / "program.zip")) == 12


def test_what_follows_a_tar(image_folder, tmp_path):
    path = write_tar(image_folder, tmp_path / "x.tar")
    whole = path.read_bytes()
    path.write_bytes(whole + b"more")
    with pytest.raises(ConfigError, match=f"x.tar is followed by something .* no tar archive at byte {len(whole):,}"):
        open_images(path)
    path.write_bytes(bytes(1024))  # an empty one
    with pytest.raises(ConfigError, match="x.tar has no images in it: files ending in"):
        open_images(path)
    with tarfile.open(path, "w") as archive:
        part = tarfile.TarInfo("a.jpg")
        part.type = b"M"
        archive.addfile(part)
    with pytest.raises(ConfigError, match="a part of a tar archive of several volumes .a.jpg began in another one"):
        open_images(path)


def test_a_tar_that_is_cut_off_between_members(image_folder, tmp_path):
    path = write_tar(image_folder, tmp_path / "x.tar")
    with tarfile.open(path) as archive:
        start = archive.getmembers()[5].offset
    path.write_bytes(path.read_bytes()[:start])
    with pytest.raises(ConfigError, match=f"x.tar is cut off or damaged at byte {start:,}"):
        open_images(path)


@pytest.mark.parametrize("name, content, message", [
    ("x.zip", b"no zip", "cut off, or no zip archive"), ("x.tar", b"no tar", "cut off, or no tar archive"),
    ("x.tar", b"", "no tar archive"), ("x.tar", b"\x1f\x8b\x08 and so on", r"compressed as a whole \(gzip\).*gunzip")])
def test_what_is_no_archive(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        open_images(tmp_path / name)


def test_a_damaged_member_is_replaced_and_named(archive):
    images = open_images(archive)
    start, stored = images.positions[3].tolist()[:2]
    data = bytearray(archive.read_bytes())
    data[start + 100:start + 100 + stored // 2] = bytes(stored // 2)
    archive.write_bytes(data)
    loader, found = epoch(archive, num_workers=2, max_bad_images=0.1)
    assert len(found) == 6 and len(loader.bad_images) == 1
    assert loader.bad_images.pop().startswith(f"cannot read the image {archive}/train/{images.names[3]} (")


def test_a_size_beyond_the_archive_takes_no_memory(archive):
    images = open_images(archive)
    images.positions[0, 1] = 2**50
    with pytest.raises(UnreadableImage, match="its directory is damaged"):
        images.read(0)


def test_an_archive_that_becomes_shorter_while_it_is_read(archive):
    images = open_images(archive)
    archives.open_archive.cache_clear()
    archive.write_bytes(b"")
    with pytest.raises(UnreadableImage, match="train/class0/00.jpg .the archive has become shorter"):
        images.read(0)
    archive.unlink()
    archives.open_archive.cache_clear()
    with pytest.raises(UnreadableImage, match="No such file"):
        images.read(0)


@pytest.mark.parametrize("field, value, message", [("flag_bits", 1, "is encrypted .a.jpg"),
                                                   ("compress_type", 14, "is compressed by method 14 .a.jpg")])
def test_zips_that_are_not_read(tmp_path, monkeypatch, field, value, message):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a.jpg", b"x")
    infolist = zipfile.ZipFile.infolist

    def changed(self):
        for member in infolist(self):
            setattr(member, field, value)
        return infolist(self)

    monkeypatch.setattr(zipfile.ZipFile, "infolist", changed)
    with pytest.raises(ConfigError, match=message):
        open_images(tmp_path / "x.zip")


# ---------------------------------------------------------------- what archives hold besides


def test_names_in_an_archive_are_never_paths(image_folder, tmp_path):
    data = (image_folder / "class0" / "00.jpg").read_bytes()
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name in ("../../etc/a.jpg", "/abs/b.jpg", "./.hidden/c.jpg", "._d.jpg"):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    images = open_images(tmp_path / "x.tar")
    assert sorted(images.names) == ["../../etc/a.jpg", "abs/b.jpg"] and images.read(0) == images.read(1) == data
    assert sorted(os.listdir(tmp_path)) == ["x.tar", "x.tar.index.npz"]


def test_links_and_later_members_in_a_tar(image_folder, tmp_path):
    first, second = ((image_folder / "class0" / name).read_bytes() for name in ("00.jpg", "02.jpg"))
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, data in (("a/1.jpg", first), ("a/2.jpg", first), ("a/1.jpg", second)):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        for name, kind, target in (("b/hard.jpg", tarfile.LNKTYPE, "a/2.jpg"), ("c/broken.jpg", tarfile.SYMTYPE, "x"),
                                   ("b/soft.jpg", tarfile.SYMTYPE, "../a/1.jpg")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            archive.addfile(member)
    images = open_images(tmp_path / "x.tar")
    assert list(images.names) == ["a/1.jpg", "a/2.jpg", "b/hard.jpg", "b/soft.jpg", "c/broken.jpg"]
    assert [images.read(i) for i in range(4)] == [second, first, first, second]
    with pytest.raises(UnreadableImage, match="c/broken.jpg .a link to a file that is not in the archive"):
        images.read(4)


def test_links_lead_through_links_and_are_stored_in_zips_too(image_folder, tmp_path):
    images = [(image_folder / "class0" / name).read_bytes() for name in ("00.jpg", "02.jpg")]
    links = {"a/1.jpg": "../b/1.jpg", "b": ".store/deep", ".store/deep/1.jpg": "blob", "a/2.jpg": "/c/3.jpg",
             "c/3.jpg": "4.JPG", "d/circle.jpg": "circle.jpg", "d/out.jpg": "../../../etc/passwd"}
    with tarfile.open(tmp_path / "x.tar", "w") as tar, zipfile.ZipFile(tmp_path / "x.zip", "w") as zipped:
        for name, target in links.items():
            link, member = tarfile.TarInfo(name), zipfile.ZipInfo(name)
            link.type, link.linkname, member.external_attr = tarfile.SYMTYPE, target, 0o120777 << 16
            tar.addfile(link)
            zipped.writestr(member, target)
        for name, data in ((".store/deep/blob", images[0]), ("c/4.JPG", images[1])):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
            zipped.writestr(name, data)
    for kind in WRITERS:
        found = open_images(tmp_path / f"x.{kind}")
        assert list(found.names) == ["a/1.jpg", "a/2.jpg", "b/1.jpg", "c/3.jpg", "c/4.JPG", "d/circle.jpg", "d/out.jpg"]
        assert [found.read(i) for i in range(5)] == [images[i] for i in (0, 1, 0, 1, 1)]
        for i in (5, 6):
            with pytest.raises(UnreadableImage, match="a link to a file that is not in the archive"):
                found.read(i)


def test_links_to_folders_are_entered_as_on_a_disk(image_folder, tmp_path):
    """To hidden ones, one of them twice, and one with a link in it; a folder that is not hidden counts where it is."""
    for i, path in enumerate(("set/cat/0.jpg", "set/.store/a/1.jpg", "set/.store/a/.x/2.jpg", "set/.store/b/3.jpg")):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(files(image_folder)[i].read_bytes())
    for link, target in {"set/dog": ".store/a", "set/dog2": ".store/a", "set/.store/a/4.jpg": "../b/3.jpg",
                         "set/cat/deep": "../.store/b", "set/cat2": "cat", "set/gone": ".store/c"}.items():
        (tmp_path / link).symlink_to(target)
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(tmp_path / "set", "set")
    folder, packed = (open_images(tmp_path / name) for name in ("set", "x.tar"))
    assert list(packed.names) == list(folder.names) == ["cat/0.jpg", "cat/deep/3.jpg", "dog/1.jpg", "dog/4.jpg"]
    assert [packed.read(i) for i in range(4)] == [folder.read(i) for i in range(4)]


def test_members_with_holes_are_read_whole(image_folder, tmp_path):
    """As tar -S writes them; here in the PAX form: a map of what is stored, then that."""
    whole = bytes(5000) + (image_folder / "class0" / "00.jpg").read_bytes()
    stored = f"1\n5000\n{len(whole) - 5000}\n".encode().ljust(512, b"\0") + whole[5000:]
    for path, size in ((tmp_path / "x.tar", len(whole)), (tmp_path / "y.tar", 2**40)):
        with tarfile.open(path, "w") as archive:
            for name in ("a/0.jpg", "a/1.jpg"):
                member = tarfile.TarInfo("GNUSparseFile.0/x")
                member.size, member.pax_headers = len(stored), {
                    "GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": name,
                    "GNU.sparse.realsize": str(size)}
                archive.addfile(member, io.BytesIO(stored))
    images = open_images(tmp_path / "x.tar")
    assert list(images.names) == ["a/0.jpg", "a/1.jpg"] and images.read(0) == images.read(1) == whole
    with pytest.raises(UnreadableImage, match="1,099,511,627,776 bytes, more than"):
        open_images(tmp_path / "y.tar").read(0)


def test_shards_whose_members_have_the_same_names(image_folder, tmp_path):
    """As WebDataset's: in the order of the shards' names, whatever that of the arguments; others are told apart."""
    def pack(*numbers):
        for shard, start in zip("ab", numbers, strict=True):
            with tarfile.open(tmp_path / f"{shard}.tar", "w") as archive:
                for i in range(3):
                    archive.add(paths[start + i], f"{i:04}.jpg")
        return open_images([tmp_path / "b.tar", tmp_path / "a.tar"])

    paths = sorted(image_folder.rglob("*.jpg"))
    images = pack(0, 3)
    assert [images.read(i) for i in range(6)] == [paths[i].read_bytes() for i in (0, 3, 1, 4, 2, 5)]
    assert images.notes() == ["3 images have the same name as another one, and count as images of their own"]
    others = pack(3, 0)
    assert list(others.names) == list(images.names) and not torch.equal(others.sizes(), images.sizes())


def test_an_archive_without_images_or_with_images_beside_its_folders(image_folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("n01.tar", b"x")
        archive.writestr("photo.heic", b"x")
    with pytest.raises(ConfigError, match="x.zip has no images in it: not read: 1 .heic, 1 .tar.*, unpacked from"):
        open_images(tmp_path / "x.zip")
    with zipfile.ZipFile(tmp_path / "x.zip", "a") as archive:
        archive.write(files(image_folder)[0], "cover.jpg")
    assert list(open_images(tmp_path / "x.zip").names) == ["cover.jpg"]
    with zipfile.ZipFile(tmp_path / "x.zip", "a") as archive:
        archive.write(files(image_folder)[0], "dog/1.jpg")
    images = open_images(tmp_path / "x.zip")
    assert list(images.names) == ["dog/1.jpg"] and "1 beside the class folders" in images.unread_summary()


def test_no_more_is_unpacked_than_the_directory_says(tmp_path, monkeypatch):
    """A member that would fill the memory."""
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/1.jpg", bytes(10**7))
    data = (tmp_path / "x.zip").read_bytes()
    (tmp_path / "x.zip").write_bytes(data.replace(struct.pack("<I", 10**7), struct.pack("<I", 100)))
    images, sizes, crc32 = open_images(tmp_path / "x.zip"), [], zlib.crc32
    monkeypatch.setattr(zlib, "crc32", lambda data: sizes.append(len(data)) or crc32(data))
    with pytest.raises(UnreadableImage, match="damaged in the archive"):
        images.read(0)
    assert all(size <= 101 for size in sizes)
