"""Features of frozen backbones, one for each image or patch; labelled images, and extraction shared by processes.

    images = open_labelled("/path/to/imagenet/val", "--data_path")
    feature = ImageFeature(model)                                    # class token, head or mean of patches
    features, labels, unreadable = extract(feature, share_loader(images, batch_size=128), feature.dim)
"""
import copy
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from tqdm import tqdm

from selfpatch.checkpoints.backbones import Backbone, image_statistics
from selfpatch.data.files import IMAGE_SUFFIXES, UnreadableImage, load_rgb
from selfpatch.data.names import NamedImages
from selfpatch.data.normalisation import normalise
from selfpatch.data.sources import open_class_folders
from selfpatch.distributed.precision import autocast
from selfpatch.distributed.processes import get_rank, get_world_size
from selfpatch.errors import ConfigError

IMAGE_FEATURES = ("cls", "head", "mean")  # in the order of preference
PATCH_FEATURES = ("patches", "keys")


# ---------------------------------------------------------------- images

def eval_transform(size: int = 224) -> v2.Transform:
    """PIL image -> uint8 [3, size, size]: short side 256/224 of size, bicubic, then the centre (DINO's evaluation)."""
    return v2.Compose([v2.Resize(round(size * 256 / 224), v2.InterpolationMode.BICUBIC), v2.CenterCrop(size),
                       v2.PILToTensor()])


class LabelledImages(Dataset):
    """Images of class folders in order: (uint8 [3, H, W], class, error or "").

    An unreadable file is a black image of class -1.

    Args:
        images: of all class folders.
        indices: the images of this data set; None for all.
    """

    def __init__(self, images: NamedImages, transform: Callable, indices: Sequence[int] | None = None):
        self.images, self.transform = images, transform
        self.indices = torch.arange(len(images)) if indices is None else torch.tensor(indices, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def root(self) -> str:
        return self.images.root

    @property
    def classes(self) -> list[str]:
        return self.images.classes

    @property
    def labels(self) -> torch.Tensor:
        """The class of each image, int32 [n]."""
        return self.images.labels[self.indices]

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, str]:
        number = int(self.indices[index])
        try:
            image = load_rgb(self.images.location(number), self.images.read(number))
        except UnreadableImage as error:
            return torch.zeros_like(self.transform(v2.functional.to_pil_image(torch.zeros(3, 8, 8)))), -1, str(error)
        return self.transform(image), int(self.images.labels[number]), ""

    def subset(self, indices: list[int]) -> "LabelledImages":
        """These images alone; the classes stay."""
        part = copy.copy(self)
        part.indices = self.indices[torch.tensor(indices, dtype=torch.int64)]
        return part


def open_labelled(folder: str | Path, option: str, transform: Callable | None = None) -> LabelledImages:
    """The images of a folder of class folders; transform None is eval_transform().

    Raises:
        ConfigError: no such folder, no class folders or no images in it; the message names the option.
    """
    if not os.path.isdir(folder):
        raise ConfigError(f"{option}: there is no folder {folder}")
    images = open_class_folders(str(folder))
    if not images.classes:
        raise ConfigError(f"{option}: {folder} has no folders in it: images go into one folder for each class, such as "
                          f"{str(folder).rstrip('/')}/dog/0001.jpg")
    if not len(images):
        raise ConfigError(f"{option}: {folder} has class folders, but no images in them: "
                          + (images.unread_summary() or f"files ending in {' '.join(IMAGE_SUFFIXES)}"))
    return LabelledImages(images, transform or eval_transform())


def hold_out(images: LabelledImages, share: float) -> tuple[LabelledImages, LabelledImages]:
    """Split every class into training images and a share of test images, evenly spaced in the order.

    Raises:
        ConfigError: the share is not between 0 and 1, or leaves no image on one side.
    """
    if not 0 < share < 1:
        raise ConfigError(f"--val_share {share:g}: give a share between 0 and 1, such as 0.1")
    train, val, seen = [], [], {}
    for i, label in enumerate(images.labels.tolist()):
        n = seen[label] = seen.get(label, 0) + 1
        (val if int(n * share) > int((n - 1) * share) else train).append(i)
    if not train or not val:
        raise ConfigError(f"--val_share {share:g} leaves {len(train)} images to compare with and {len(val)} to test: "
                          "give another share")
    return images.subset(train), images.subset(val)


def open_pair(data_path: str | Path | None, train_path: str | Path | None, val_path: str | Path | None,
              val_share: float | None = None, train_transform: Callable | None = None,
              transform: Callable | None = None) -> tuple[LabelledImages, LabelledImages]:
    """Training and test images from a job's options: DATA/train and DATA/val, two folders, or a share of one.

    Raises:
        ConfigError: a folder is missing or without images, the two have different classes, or options contradict.
    """
    if val_share is not None:
        if not data_path or train_path or val_path:
            raise ConfigError("--val_share divides one folder of class folders, --data_path: give that alone")
        train, val = hold_out(open_labelled(data_path, "--data_path", transform), val_share)
        train.transform = train_transform or train.transform
        return train, val
    if data_path and (train_path or val_path) or not data_path and not (train_path and val_path):
        raise ConfigError("give either --data_path, a folder with train/ and val/ in it, or both --train_path and "
                          "--val_path")
    train = open_labelled(train_path or Path(data_path) / "train", "--train_path" if train_path else "--data_path",
                          train_transform or transform)
    val = open_labelled(val_path or Path(data_path) / "val", "--val_path" if val_path else "--data_path", transform)
    if train.classes != val.classes:
        only = sorted(set(train.classes) ^ set(val.classes))
        raise ConfigError(f"{train.root} and {val.root} differ in class folders: {', '.join(only[:5])}"
                          f"{', …' if len(only) > 5 else ''} {'is' if len(only) == 1 else 'are'} in one of them only")
    return train, val


def share_loader(images: LabelledImages, batch_size: int, num_workers: int = 0, on_gpu: bool = False) -> DataLoader:
    """Batches of this process's share of the images: r, r + world size, …"""
    share = images.subset(list(range(get_rank(), len(images), get_world_size())))
    return DataLoader(share, batch_size, num_workers=num_workers, pin_memory=on_gpu)


# ---------------------------------------------------------------- features

class ImageFeature:
    """uint8 images [B, 3, H, W] on the device -> one feature each, float32 [B, D].

    cls is the class token of a block, mean the mean of its patches, both after the final norm, if any; head is the
    class token of the SelfPatch head over the patches.

    Args:
        model, head: in eval mode; head is SelfPatch's, or None.
        kind: cls, head or mean; None takes the first that the network has.
        layer: block, 0 being the first and -1 the last.
        dtype: of autocast; float32 for none.

    Raises:
        ConfigError: the kind needs a class token or a head that the network lacks.
    """

    def __init__(self, model: Backbone, kind: str | None = None, layer: int = -1, head: nn.Module | None = None,
                 dtype: torch.dtype = torch.float32):
        there_is = {"cls": model.has_class_token, "head": head is not None, "mean": True}
        self.kind = kind or next(kind for kind in IMAGE_FEATURES if there_is[kind])
        if not there_is[self.kind]:
            offered = ", ".join(kind for kind in IMAGE_FEATURES if there_is[kind])
            raise ConfigError(f"--feature {self.kind}: the network has none; it offers {offered}")
        self.model, self.head, self.layer, self.dtype = model, head, layer, dtype
        self.statistics = image_statistics(model)

    @property
    def dim(self) -> int:
        """D, the width of a feature."""
        return self.model.embed_dim

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        x = normalise(images, self.statistics)
        with autocast(x.device, self.dtype):
            class_token, patches, _ = self.model.features(x, self.layer)
            if self.kind == "cls":
                return class_token.float()
            return (patches.mean(1) if self.kind == "mean" else self.head.image_token(patches)[:, 0]).float()


class PatchFeature:
    """Normalised images [B, 3, H, W] on the device -> features of their patches [B, N, D], without gradients.

    Args:
        model: in eval mode.
        kind: patches, the output of a block, or keys, those of its attention.
        layer: block, 0 being the first and -1 the last.
        dtype: of autocast; float32 for none.
    """

    def __init__(self, model: Backbone, kind: str = "patches", layer: int = -1, dtype: torch.dtype = torch.float32):
        self.model, self.kind, self.layer, self.dtype = model, kind, layer, dtype

    @property
    def dim(self) -> int:
        """D; keys of grouped-query attention are narrower than the network."""
        if self.kind == "patches":
            return self.model.embed_dim
        side = 2 * self.model.patch_size
        return self(torch.zeros(1, 3, side, side, device=next(self.model.parameters()).device)).shape[2]

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        with autocast(images.device, self.dtype):
            return getattr(self.model.features(images, self.layer, keys=self.kind == "keys"), self.kind)


class Extracted(NamedTuple):
    """Features [n, D] of unit length and classes [n], both on the device, and the errors of files left out."""
    features: torch.Tensor
    labels: torch.Tensor
    unreadable: list[str]


@torch.inference_mode()
def extract(feature: Callable[[torch.Tensor], torch.Tensor], loader: DataLoader, dim: int,
            device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
            progress: str | None = None) -> Extracted:
    """Features of a loader's images, in its order, without unreadable images.

    Args:
        feature: uint8 images [B, 3, H, W] -> [B, dim].
        dim: width of a feature.
        dtype: to keep the features in.
        progress: name of a progress bar; None for none.

    Raises:
        ConfigError: a feature is not finite.
    """
    device = torch.device(device)
    n = len(loader.dataset)
    features = torch.empty(n, dim, dtype=dtype, device=device)  # allocated whole: growing would take twice the memory
    labels, unreadable, start = torch.empty(n, dtype=torch.long, device=device), [], 0
    with tqdm(total=n, desc=progress, unit="image", disable=progress is None) as bar:
        for images, classes, errors in loader:
            readable = classes >= 0
            unreadable += filter(None, errors)
            if not readable.all():
                images, classes = images[readable], classes[readable]
            if len(images):
                stop = start + len(images)
                found = feature(images.to(device, non_blocking=True))
                check_finite(found)
                features[start:stop] = F.normalize(found, dim=1)
                labels[start:stop] = classes.to(device, non_blocking=True)
                start = stop
            bar.update(len(readable))
    return Extracted(features[:start], labels[:start], unreadable)


def check_finite(features: torch.Tensor, image: str = "") -> None:
    """Raise ConfigError if a feature is NaN or infinite: comparisons with NaN would count as hits.

    Args:
        image: named in the message, if it is known.
    """
    if not features.isfinite().all():
        raise ConfigError((f"{image}: " if image else "") + "some features are NaN or infinite: use --precision fp32, "
                          "or another checkpoint")
