"""The same images as a folder, a list, archives, and whatever else they can be read from: FORMS."""
import os
import shutil
import sqlite3
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from repository import example

from selfpatch.data.dataset import build_dataset
from selfpatch.data.loader import CropLoader

SIZES = {"local_crops_number": 1, "global_crops_size": 32, "local_crops_size": 16}


def files(folder: Path) -> list[Path]:
    """In no particular order."""
    return sorted((path for path in folder.rglob("*.jpg")), key=lambda path: path.name[::-1])


def write_list(folder: Path, path: Path, class_of=None) -> Path:
    path.write_text("".join(f"{image}{class_of(image) if class_of else ''}\n" for image in files(folder)))
    return path


def write_zip(folder: Path, path: Path, top: str = "", method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for image in files(folder):
            archive.write(image, os.path.join(top, image.relative_to(folder)))
        archive.writestr(os.path.join(top, "class0/._00.jpg"), b"what a Mac adds")
    return path


def write_tar(folder: Path, path: Path, top: str = "", images: list[Path] | None = None) -> Path:
    with tarfile.open(path, "w") as archive:
        for image in files(folder) if images is None else images:
            archive.add(image, os.path.join(top, image.relative_to(folder)))
    return path


def write_two_tars(folder: Path, path: Path) -> list[str]:
    images = files(folder)
    return [str(write_tar(folder, path.with_name(f"{name}.tar"), "train", part))
            for name, part in (("one", images[:5]), ("two", images[5:]))]


def write_sqlite(folder: Path, path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE images (name TEXT, data BLOB)")
        for image in files(folder):
            database.execute("INSERT INTO images VALUES (?, ?)", (str(image.relative_to(folder)), image.read_bytes()))
    database.close()


def write_hub(folder: Path, path: Path) -> str:
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    images = files(folder)
    classes = sorted({image.parent.name for image in images})
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=classes))
    rows = {"image": [{"bytes": image.read_bytes(), "path": image.name} for image in images],
            "label": [image.parent.name for image in images]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(path)
    return f"hf:{path}"


def write_function(folder: Path, path: Path) -> str:
    write_sqlite(folder, path)
    code = example("docs/DATA.md", "Anything else")
    assert len(code.splitlines()) <= 14
    path.with_name("sqlite_images.py").write_text(code)
    return f"{path.with_name('sqlite_images.py')}:{path}"


def write_relative_list(folder: Path, path: Path) -> Path:
    shutil.copytree(folder, path.parent / "copy")
    path = path.with_suffix(".txt")
    path.write_text("".join(f"./copy/{image.relative_to(folder)}\tclass{i % 3}\r\n"
                            for i, image in enumerate(files(folder))))
    return path


def write_shards(folder: Path, path: Path) -> str:
    images = files(folder)
    for i in range(3):
        write_tar(folder, path.with_name(f"shard{i:04}.tar"), images=images[i::3])
    open(path.with_name("shard0000.tar.index.npz"), "w").close()  # as an earlier run leaves them
    return str(path.with_name("shard{0000..0002}.tar"))


def write_joined_tars(folder: Path, path: Path) -> Path:
    parts = write_two_tars(folder, path)
    path.with_suffix(".tar").write_bytes(b"".join(Path(part).read_bytes() for part in parts))
    return path.with_suffix(".tar")


def write_links(folder: Path, path: Path) -> Path:
    """As a cache of Hugging Face: links to files without suffixes that come later, or are hidden."""
    with tarfile.open(path.with_suffix(".tar"), "w") as archive:
        for i, image in enumerate(files(folder)):
            blob, link = f"{'.' * (i % 2)}blobs/{i}", tarfile.TarInfo(f"top/snapshot/{image.relative_to(folder)}")
            link.type, link.linkname = tarfile.SYMTYPE, f"../../../{blob}"
            archive.addfile(link)
            archive.add(image, blob)
    return path.with_suffix(".tar")


def write_backslashes(folder: Path, path: Path) -> Path:
    """A zip as some programs for Windows write it, under the name of another kind of archive."""
    with zipfile.ZipFile(path.with_suffix(".tar"), "w") as archive:
        for image in files(folder):
            archive.writestr(f"train\\{image.parent.name}\\{image.name}", image.read_bytes())
    return path.with_suffix(".tar")


FORMS = {"list": write_list, "list with spaces": lambda folder, path: write_list(folder, path, lambda image: " 7"),
         "relative list": write_relative_list, "zip": lambda folder, path: write_zip(folder, path.with_suffix(".zip")),
         "stored zip": lambda folder, path: write_zip(folder, path.with_suffix(".zip"), "train", 0),
         "zip with backslashes": write_backslashes,
         "tar": lambda folder, path: write_tar(folder, path.with_suffix(".tar"), "./train"), "tars": write_two_tars,
         "joined tars": write_joined_tars, "tar of links": write_links, "shards": write_shards,
         "glob": lambda folder, path: write_shards(folder, path) and str(path.with_name("shard*")),
         "function": write_function, "hub": write_hub}


def epoch(data_path, batches: int = 0, start: int = 0, **options) -> tuple[CropLoader, list[torch.Tensor]]:
    """A loader and its batches of the second epoch from number start on, each as one vector; all, or so many."""
    loader = CropLoader(build_dataset(data_path, **SIZES), 2, **options)
    loader.set_epoch(1, start)
    found = []
    for crops in loader:
        found.append(torch.cat([crop.flatten() for crop in crops]))
        if len(found) == batches:
            break
    return loader, found
