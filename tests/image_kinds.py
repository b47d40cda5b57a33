"""The same images as a folder, a list, archives, and whatever else they can be read from."""
import os
import sqlite3
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

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
