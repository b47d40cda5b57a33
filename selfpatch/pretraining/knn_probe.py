"""k-NN accuracy of the teacher during training, on images with classes, which training does not see.

    probe = KnnProbe("imagenet", image_size=224)
    probe(run.teacher)                          # {"knn_top1": 51.2, "knn_top5": 76.4, "knn_seconds": 30.1}
"""
import time
from collections.abc import Callable, Iterator

import torch
from torch.utils.data import DataLoader

from selfpatch.data.hub import HubImages, OwnImages
from selfpatch.data.sources import check_paths
from selfpatch.distributed.processes import get_world_size
from selfpatch.evaluation.image_features import ImageFeature
from selfpatch.evaluation.knn import knn_accuracy
from selfpatch.evaluation.labelled_images import Paths, Places, eval_transform, open_pair, share_loader
from selfpatch.method.selfpatch_head import MultiCropWrapper

K = 20
HELD_OUT = 0.2  # share of images without train/ and val/ that the rest classifies


class Interruptible:
    """The batches of a rank's share of the images; between them it calls a function, equally often on all ranks."""

    def __init__(self, loader: DataLoader, check: Callable[[], None]):
        self.loader, self.dataset, self.check = loader, loader.dataset, check

    def __iter__(self) -> Iterator:
        # one of several ranks may fail within the batches, and the others would wait for it here
        self.check()
        for batch in self.loader:
            yield batch
            if get_world_size() == 1:
                self.check()


class KnnProbe:
    """Classifies images by the 20 nearest neighbours of SelfPatch's class token (see evaluation/knn.py).

    With fewer than 20 images to compare with, all of them are neighbours.

    Args:
        data: images with classes in any form, with train/ and val/ in it, or without, where every fifth image is
            classified by the others; or Places, where test images have their classes in a file. Its suffixes and
            column are those of the training images, which may be of another form, and then do not count.
        image_size: side of the centre crop.
        batch_size, num_workers: of the loader, in each process.
        dtype: of autocast; float32 for none.
        every: epochs between two evaluations.

    Raises:
        ConfigError: the data does not exist, or its classes or images do not fit; the message names --knn_data.
    """

    def __init__(self, data: Paths | Places, image_size: int = 224, batch_size: int = 64, num_workers: int = 0,
                 device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, every: int = 1):
        places = data if isinstance(data, Places) else Places(data)
        reader, _ = check_paths(places.data or places.train, "--knn_data")
        places = places._replace(option="--knn_data", undivided_share=HELD_OUT,
                                 suffixes=() if reader in (HubImages, OwnImages) else places.suffixes,
                                 column=places.column if reader is HubImages else "")
        pair = open_pair(places, transform=eval_transform(image_size))
        self.device, self.dtype, self.every = torch.device(device), dtype, every
        self.loaders = [share_loader(images, batch_size, num_workers, self.device.type == "cuda") for images in pair]

    def due(self, epoch: int, epochs: int) -> bool:
        """Whether to evaluate after an epoch of a run of so many; always after the last one."""
        return epoch >= 0 and (epoch + 1 == epochs or (epoch + 1) % self.every == 0)

    def __call__(self, teacher: MultiCropWrapper, check: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Accuracies in per cent, and the seconds they took. Every rank must call it.

        Args:
            check: called after each batch (with several ranks, before each set of images); an exception from it ends
                the evaluation.
        """
        start = time.monotonic()
        loaders = [Interruptible(loader, check) for loader in self.loaders]
        feature = ImageFeature(teacher.backbone, "head", head=teacher.ca_head, dtype=self.dtype)
        accuracy = next(iter(knn_accuracy(feature, *loaders, ks=[K], device=self.device).values()))
        return {"knn_top1": accuracy.top1, "knn_top5": accuracy.top5, "knn_seconds": time.monotonic() - start}
