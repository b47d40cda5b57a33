"""The data set's shares, the loader's crops, and their way to the device."""
import pytest
import torch

from data import CropLoader, build_dataset, prefetch
from main_selfpatch import choose_augment

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")


def test_ranks_share_the_images_and_epochs_shuffle_them(image_folder):
    def paths(rank, epoch):
        dataset = build_dataset(image_folder)
        dataset.transform = torch.nn.Identity()
        dataset.loader = str
        loader = CropLoader(dataset, batch_size=4, rank=rank, world_size=2, seed=3)
        loader.sampler.set_epoch(epoch)
        return [path for batch, _ in loader.batches for path in batch]

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


def test_prefetch_gives_every_batch_once_and_in_order():
    batches = [[torch.full((2,), i), torch.full((3,), -i)] for i in range(5)]
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        stream = torch.cuda.Stream() if device == "cuda" else None
        found = [[crop.tolist() for crop in crops] for crops in prefetch(iter(batches), torch.device(device), stream)]
        assert found == [[crop.tolist() for crop in crops] for crops in batches]
        assert list(prefetch([], torch.device(device), stream)) == []
