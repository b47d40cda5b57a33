"""Features of frozen backbones, one for each image or patch, and extraction shared by processes.

    images = open_labelled("/path/to/imagenet/val", "--data_path")           # of labelled_images.py
    feature = ImageFeature(model)                                    # class token, head or mean of patches
    features, labels, unreadable = extract(feature, share_loader(images, batch_size=128), feature.dim)
"""
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from selfpatch.checkpoints.backbones import Backbone, image_statistics
from selfpatch.data.normalisation import normalise
from selfpatch.distributed.precision import autocast
from selfpatch.errors import ConfigError

IMAGE_FEATURES = ("cls", "head", "mean")  # in the order of preference
PATCH_FEATURES = ("patches", "keys")


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
