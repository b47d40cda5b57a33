"""Files become batches of crops on the device: the data set, its loader, and the copy of the next batch meanwhile."""
import argparse
from collections.abc import Iterable, Iterator

import torch
from torch.utils.data import DataLoader, DistributedSampler
from torchvision.datasets import ImageFolder

import utils
from augmentations import DataAugmentationDINO, load_rgb
from device_augmentations import DeviceAugmentation, RandomCrops, load_uint8
from options import images_per_step


def augments_on_device(args: argparse.Namespace) -> bool:
    """What --augment says; auto is the faster one, by benchmarks/data.py: the device, on a CPU by 1.3 to 1.5 times.

    MPS has not been measured, and stays with PIL.
    """
    if args.augment == "auto":
        return args.device.type in ("cuda", "cpu")
    return args.augment == "device"


def build_dataset(args: argparse.Namespace) -> ImageFolder:
    transform, loader = (RandomCrops, load_uint8) if augments_on_device(args) else (DataAugmentationDINO, load_rgb)
    transform = transform(args.global_crops_scale, args.local_crops_scale, args.local_crops_number,
                          args.global_crops_size, args.local_crops_size)
    try:
        dataset = ImageFolder(args.data_path, transform, loader=loader, allow_empty=True)
    except FileNotFoundError:
        utils.fail(f"--data_path {args.data_path} has no folders in it: images go into one folder for each class, "
                   f"such as {args.data_path.rstrip('/')}/all/0001.jpg")
    global_batch = images_per_step(args)
    if not len(dataset):
        utils.fail(f"--data_path {args.data_path} has class folders, but no images in them")
    if len(dataset) < global_batch:
        utils.fail(f"--data_path {args.data_path} has {len(dataset)} images, fewer than the {global_batch} of one step "
                   f"({args.batch_size_per_gpu} × {args.accum_steps} small batches × {args.world_size} processes): "
                   "lower --batch_size_per_gpu or --accum_steps")
    return dataset


def prefetch(batches: Iterable[list[torch.Tensor]], device: torch.device,
             side: torch.cuda.Stream | None = None) -> Iterator[list[torch.Tensor]]:
    """The batches on the device.

    Copies to a GPU run on the side stream, from pinned memory: as nothing in a step waits for the GPU, the next batch
    is asked for, and copied, while the GPU is still at work on this one.
    """
    for crops in batches:
        if side is None:
            yield [crop.to(device) for crop in crops]
            continue
        with torch.cuda.stream(side):
            crops = [crop.to(device, non_blocking=True) for crop in crops]
        stream = torch.cuda.current_stream(device)
        stream.wait_stream(side)
        for crop in crops:
            crop.record_stream(stream)  # so that the side stream does not take the memory again too early
        yield crops


class CropLoader:
    """Batches of this rank's share of the images, shuffled anew at each sampler.set_epoch.

    Each batch is its V normalised crops, float32 [B, 3, H, W], on the device: 2 global, then the local ones.
    """

    def __init__(self, args: argparse.Namespace, dataset: ImageFolder, compiled: bool = False):
        self.dataset, self.device = dataset, args.device
        self.sampler = DistributedSampler(dataset, args.world_size, args.rank, shuffle=True, seed=args.seed)
        # workers begin anew each epoch: those that persist would go on from a state that a resumed run has not
        self.batches = DataLoader(dataset, args.batch_size_per_gpu, sampler=self.sampler, num_workers=args.num_workers,
                                  pin_memory=args.device.type == "cuda", drop_last=True)
        self.side = torch.cuda.Stream(args.device) if args.device.type == "cuda" else None
        self.augment = None
        if augments_on_device(args):
            self.augment = DeviceAugmentation(args.local_crops_number, compiled).to(args.device)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[torch.Tensor]]:
        for crops in prefetch((crops for crops, _ in self.batches), self.device, self.side):
            yield self.augment(crops) if self.augment else crops
