"""The data set's files and shares, the loader's crops, and their way to the device."""
import shutil
from pathlib import Path

import pytest
import torch
from image_cases import refuse_listing, write_damaged_png

from main_selfpatch import choose_augment
from selfpatch.data.dataset import build_dataset
from selfpatch.data.files import UnreadableImage
from selfpatch.data.loader import CropLoader, prefetch
from selfpatch.data.seeds import seeded
from selfpatch.data.sources import open_images
from selfpatch.distributed.processes import Process
from selfpatch.errors import ConfigError, TrainingError

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")


def test_ranks_share_the_images_and_epochs_shuffle_them(image_folder):
    def paths(rank, epoch):
        dataset = build_dataset(image_folder)
        dataset.transform = torch.nn.Identity()
        dataset.loader = lambda path, data: path
        loader = CropLoader(dataset, batch_size=4, process=Process(rank, 2), seed=3)
        loader.set_epoch(epoch)
        return [path for batch, *_ in loader.batches for path in batch]

    first, second = paths(0, 0), paths(1, 0)
    assert len(first) == len(second) == 4  # of 6 each: the last 2 are no whole batch
    assert not set(first) & set(second)
    assert paths(0, 0) == first != paths(0, 1)


@pytest.mark.parametrize("device, augment, expected", [
    ("cuda", "auto", "device"), ("cpu", "auto", "device"), ("mps", "auto", "pil"), ("cuda", "pil", "pil"),
    ("cpu", "pil", "pil"), ("mps", "device", "device")])
def test_where_crops_are_augmented(device, augment, expected):
    assert choose_augment(augment, torch.device(device)) == expected


@pytest.mark.parametrize("augment", ["pil", "device"])
def test_loader_gives_normalised_crops(image_folder, augment):
    """Views in order, of their sizes, with values in the range that normalisation gives."""
    loader = CropLoader(build_dataset(image_folder, local_crops_number=3, global_crops_size=48, local_crops_size=64,
                                      augment=augment), batch_size=4)
    batches = list(loader)
    assert len(batches) == len(loader) == 3
    for crops in batches:
        assert [tuple(crop.shape) for crop in crops] == [(4, 3, 48, 48)] * 2 + [(4, 3, 64, 64)] * 3
        assert all(crop.dtype == torch.float32 and -2.2 < crop.min() < crop.max() < 2.7 for crop in crops)
    assert not torch.equal(batches[0][0], batches[0][1])


@pytest.mark.parametrize("augment", ["pil", "device"])
def test_an_images_crops_depend_on_seed_epoch_and_index_alone(image_folder, augment):
    """Not on workers, batch size, ranks or torch's random state, which they leave alone."""
    dataset = build_dataset(image_folder, local_crops_number=1, global_crops_size=32, local_crops_size=16,
                            augment=augment)

    def crops(epoch=1, seed=3, world_size=1, **options):
        """{index: its crops as one vector} of the images of all ranks."""
        found = {}
        for rank in range(world_size):
            loader = CropLoader(dataset, process=Process(rank, world_size), seed=seed, **{"batch_size": 4, **options})
            loader.set_epoch(epoch)
            torch.manual_seed(len(found))
            before = torch.get_rng_state()
            batches = [torch.cat([crop.flatten(1) for crop in batch], 1) for batch in loader]
            assert torch.equal(torch.get_rng_state(), before)
            found |= dict(zip(loader.sampler, torch.cat(batches), strict=True))
        return found

    expected = crops()
    assert sorted(expected) == list(range(12))
    tolerance = 0 if augment == "pil" else 0.02  # blur's matrix products may round differently in another batch
    for options in ({"num_workers": 1}, {"num_workers": 2}, {"batch_size": 3}, {"world_size": 2, "batch_size": 2}):
        for index, vector in crops(**options).items():
            torch.testing.assert_close(vector, expected[index], atol=tolerance, rtol=0)
    for others in (crops(epoch=2), crops(seed=4)):
        assert not any(torch.equal(others[i], expected[i]) for i in range(12))


def test_seeded_draws_are_uniform_and_independent():
    """Over images of an epoch, over epochs, and between neighbours: within 5 standard errors."""
    def numbers(*numbers):
        with seeded(*numbers):
            return torch.rand(8)

    count = 4000
    for draws in (torch.stack([numbers(0, 5, i) for i in range(count)]),
                  torch.stack([numbers(0, i, 7) for i in range(count)])):
        deciles = torch.stack([torch.histc(column, 10, 0, 1) for column in draws.T]) / count
        assert (deciles - 0.1).abs().max() < 5 * (0.09 / count) ** 0.5
        pairs = torch.cat([draws[1:].T, draws[:-1].T]).corrcoef() - torch.eye(16)
        assert pairs.abs().max() < 5 / count ** 0.5
        assert len(draws.unique(dim=0)) == count


def test_prefetch_gives_every_batch_once_and_in_order():
    batches = [[torch.full((2,), i), torch.full((3,), -i)] for i in range(5)]
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        stream = torch.cuda.Stream() if device == "cuda" else None
        found = [[crop.tolist() for crop in crops] for crops in prefetch(iter(batches), torch.device(device), stream)]
        assert found == [[crop.tolist() for crop in crops] for crops in batches]
        assert list(prefetch([], torch.device(device), stream)) == []


# ---------------------------------------------------------------- other people's folders


@pytest.fixture
def folder(image_folder, tmp_path):
    """A copy of the 12 images that a test may change."""
    return shutil.copytree(image_folder, tmp_path / "data")


def write_cut_jpeg(path):
    path.write_bytes(b"\xff\xd8\xff damaged")


def names(dataset):
    return list(dataset.images.names)


def samples(dataset):
    """(path, class) of each image, as torchvision's ImageFolder has them."""
    return [(dataset.images.location(i), label) for i, label in enumerate(dataset.images.labels.tolist())]


def test_order_is_torchvisions(folder):
    from torchvision.datasets import ImageFolder
    for name in ("class0/a/z.jpg", "class0/a-b/y.jpg", "class0/a/b/x.png", "class1/B/w.webp"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "class0" / "00.jpg", folder / name)
    assert samples(build_dataset(folder)) == ImageFolder(folder).samples


def test_hidden_files_and_folders_are_no_data(folder):
    expected = names(build_dataset(folder))
    for name in ("class0/._00.jpg", ".ipynb_checkpoints/00.jpg", "class1/.thumbnails/00.jpg", ".class2/00.jpg"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"no image")
    dataset = build_dataset(folder)
    assert names(dataset) == expected and dataset.classes == ["class0", "class1"]


def test_each_file_once_where_links_lead_back(folder):
    expected = samples(build_dataset(folder))
    (folder / "class0" / "loop").symlink_to(folder)
    (folder / "class1" / "other").symlink_to(folder / "class0")
    assert samples(build_dataset(folder)) == expected


def test_a_class_folder_once_whatever_leads_to_it(folder):
    expected = samples(build_dataset(folder))
    (folder / "a").symlink_to(folder / "class1")  # before it in the alphabet
    (folder / "z").symlink_to("class0")
    (folder / "up").symlink_to("..")
    (folder / "top").symlink_to(folder)
    (folder.parent / "beside.jpg").touch()
    dataset = build_dataset(folder)
    assert [path for path, _ in samples(dataset)] == [path for path, _ in expected] + [str(folder / "up/beside.jpg")]
    assert dataset.classes == ["class0", "class1", "up"]


def test_images_beside_class_folders_are_counted(folder):
    for name in ("one.jpg", "two.PNG", "._one.jpg", "notes.txt"):
        (folder / name).touch()
    assert build_dataset(folder).images.unread_summary() == "not read: 2 beside the class folders (move them into one)"
    (folder / "class.jpg").mkdir()
    assert open_images(folder, suffixes=[".jpg"]).outside == 1


@pytest.mark.parametrize("locked", ["", "class1", "class1/deep"])
def test_a_folder_that_cannot_be_listed_is_named(folder, locked, monkeypatch):
    (folder / "class1" / "deep").mkdir()
    refuse_listing(monkeypatch, folder / locked)
    with pytest.raises(ConfigError, match=f"cannot list the folder {folder / locked} .Permission denied"):
        build_dataset(folder)


def test_formats_that_are_not_read_are_counted(folder):
    for name in ("class0/a.heic", "class0/b.HEIC", "class1/c.gif", "class1/notes.txt"):
        (folder / name).touch()
    assert build_dataset(folder).images.unread_summary().startswith("not read: 1 .gif, 2 .heic (only .jpg")
    for path in folder.rglob("*.jpg"):
        path.unlink()
    with pytest.raises(ConfigError, match="has no images in it: not read: 1 .gif, 2 .heic .only .jpg"):
        build_dataset(folder)


@pytest.mark.parametrize("augment, workers, damage", [
    ("device", 0, write_cut_jpeg), ("pil", 0, write_cut_jpeg), ("device", 2, write_cut_jpeg),
    ("device", 0, write_damaged_png), ("pil", 0, write_damaged_png)])
def test_an_unreadable_image_is_replaced_and_named(folder, augment, workers, damage):
    """By the next readable one of the data set, and all other samples stay where they are."""
    def epoch(dataset):
        loader = CropLoader(dataset, batch_size=4, num_workers=workers, max_bad_images=0.5)
        loader.set_epoch(1)
        return loader, list(loader)

    sizes = {"local_crops_number": 1, "global_crops_size": 48, "local_crops_size": 48, "augment": augment}
    dataset = build_dataset(folder, **sizes)
    order = list(CropLoader(dataset, 4).sampler)
    paths = [path for path, _ in samples(dataset)]
    expected, bad = [paths[i] for i in order], paths[3]
    loaded, load = [], dataset.loader
    damage(Path(bad))
    dataset.loader = lambda path, data: loaded.append(path) or load(path, data)
    if not workers:
        for i in order:
            dataset[i]
        place = expected.index(bad)
        assert loaded == expected[:place + 1] + [paths[4]] + expected[place + 1:]
    dataset.loader = load
    loader, batches = epoch(dataset)
    assert len(batches) == 3 and len(loader.bad_images) == 1
    assert next(iter(loader.bad_images)).startswith(f"cannot read the image {bad} (")


def test_too_many_unreadable_images_end_the_epoch_with_a_list(folder):
    for name in ("00", "02", "04"):
        (folder / "class0" / f"{name}.jpg").write_bytes(b"")
    loader = CropLoader(build_dataset(folder, local_crops_number=0), batch_size=4, max_bad_images=0.2)
    with pytest.raises(TrainingError, match=r"00.jpg.*; .*02.jpg.*; .*04.jpg.*\(3 of 12 images.*--max_bad_images 0.2"):
        list(loader)


@pytest.mark.parametrize("path, augment, message", [
    ("nowhere", "pil", "no folder nowhere"), (__file__, "pil", "give .*test_data.py:ARGUMENT"),
    (".", "auto", "must be device or pil")])
def test_arguments_that_make_no_data_set(path, augment, message):
    with pytest.raises(ConfigError, match=message):
        build_dataset(path, augment=augment)


def test_a_data_set_without_one_readable_image(folder):
    for path in folder.rglob("*.jpg"):
        path.write_bytes(b"")
    with pytest.raises(UnreadableImage, match="neither can the 11 images after it"):
        build_dataset(folder)[0]
