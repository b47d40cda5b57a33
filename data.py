"""Files become batches of crops on the device: the data set, and the loader that copies the next batch meanwhile."""
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch.utils.data import DataLoader, DistributedSampler
from torchvision.datasets import ImageFolder

from augmentations import DataAugmentationDINO, load_rgb
from device_augmentations import DeviceAugmentation, RandomCrops, load_uint8
from errors import ConfigError


def build_dataset(data_path: str | Path, global_crops_scale: tuple[float, float] = (0.25, 1.0),
                  local_crops_scale: tuple[float, float] = (0.05, 0.25), local_crops_number: int = 8,
                  global_crops_size: int = 224, local_crops_size: int = 96, augment: str = "device") -> ImageFolder:
    """The images of a folder of class folders, each as 2 global crops and local_crops_number local ones.

    Args:
        global_crops_scale, local_crops_scale: (least, most) share of the image's area that a crop covers.
        augment: device, where images become uint8 crops that CropLoader augments in batches; pil, where they become
            normalised crops, augmented one by one.

    Raises:
        ConfigError: there are no class folders, or no images in them.
    """
    transform, loader = (RandomCrops, load_uint8) if augment == "device" else (DataAugmentationDINO, load_rgb)
    transform = transform(global_crops_scale, local_crops_scale, local_crops_number, global_crops_size,
                          local_crops_size)
    try:
        dataset = ImageFolder(data_path, transform, loader=loader, allow_empty=True)
    except FileNotFoundError:
        raise ConfigError(f"--data_path {data_path} has no folders in it: images go into one folder for each class, "
                          f"such as {str(data_path).rstrip('/')}/all/0001.jpg") from None
    if not len(dataset):
        raise ConfigError(f"--data_path {data_path} has class folders, but no images in them")
    return dataset


def prefetch(batches: Iterable[list[torch.Tensor]], device: torch.device,
             copy_stream: torch.cuda.Stream | None = None) -> Iterator[list[torch.Tensor]]:
    """The batches on the device.

    On a GPU, copies from pinned memory run on copy_stream. No operation of a training step waits for the GPU, so the
    next batch is asked for, and copied, while the GPU still works on this one.
    """
    for crops in batches:
        if copy_stream is None:
            yield [crop.to(device) for crop in crops]
            continue
        with torch.cuda.stream(copy_stream):
            crops = [crop.to(device, non_blocking=True) for crop in crops]
        stream = torch.cuda.current_stream(device)
        stream.wait_stream(copy_stream)
        for crop in crops:
            crop.record_stream(stream)  # or the allocator could give the memory to the next copy too early
        yield crops


class CropLoader:
    """Batches of this rank's share of the images, reshuffled by sampler.set_epoch.

    A batch is a list of V normalised crops, float32 [B, 3, H, W], on the device: 2 global ones, then the local ones.

    Args:
        dataset: from build_dataset.
        batch_size: B, images of this rank.
        num_workers: processes that load and crop; 0 does it in this one.
        rank, world_size: which share of how many.
        seed: of the order of images.
        compiled: fuse the augmentation on the device with torch.compile.
    """

    def __init__(self, dataset: ImageFolder, batch_size: int, num_workers: int = 0,
                 device: torch.device | str = "cpu", rank: int = 0, world_size: int = 1, seed: int = 0,
                 compiled: bool = False):
        self.dataset, self.batch_size, self.device = dataset, batch_size, torch.device(device)
        self.sampler = DistributedSampler(dataset, world_size, rank, shuffle=True, seed=seed)
        on_gpu = self.device.type == "cuda"
        # workers start anew each epoch: persistent ones would carry random state that a resumed run does not have
        self.batches = DataLoader(dataset, batch_size, sampler=self.sampler, num_workers=num_workers,
                                  pin_memory=on_gpu, drop_last=True)
        self.copy_stream = torch.cuda.Stream(self.device) if on_gpu else None
        self.augment = None
        if isinstance(dataset.transform, RandomCrops):
            self.augment = DeviceAugmentation(dataset.transform.local_crops_number, compiled).to(self.device)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[torch.Tensor]]:
        for crops in prefetch((crops for crops, _ in self.batches), self.device, self.copy_stream):
            yield self.augment(crops) if self.augment else crops
