"""Dense retrieval: segment images by their patches' nearest neighbours among labelled ones, without any training.

    python eval_dense_retrieval.py --data voc_aug:VOCdevkit/VOC2012 --pretrained_weights checkpoint.pth --random_weights
    torchrun --nproc_per_node=4 eval_dense_retrieval.py ...         # shares the memory and the images

"Towards In-context Scene Understanding" (Balažević et al. 2023), as the program open-hummingbird evaluates it. Prints
the mean IoU over all classes (the published figure) and over those that occur.
"""
import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P leaves it out
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import RandomResizedCrop, v2
from torchvision.transforms.v2 import functional as tf
from tqdm import tqdm

from selfpatch.checkpoints.backbones import image_statistics
from selfpatch.data.normalisation import IMAGENET_MEAN, IMAGENET_STD, normalise
from selfpatch.data.seeds import mixed_seed, seeded
from selfpatch.distributed.collectives import sum_over_processes
from selfpatch.distributed.processes import get_rank, get_world_size, is_main_process, together
from selfpatch.distributed.workers import worker_options
from selfpatch.errors import POSITIVE_FLOAT, POSITIVE_INT, ArgumentParser, ConfigError, run_main
from selfpatch.evaluation.common import (
    Column,
    add_evaluation_options,
    add_patch_feature,
    evaluate_each,
    finish,
    start,
)
from selfpatch.evaluation.dense_retrieval import (
    NEIGHBOURS,
    TEMPERATURE,
    PatchMemory,
    label_map,
    patch_labels,
    sample_patches,
)
from selfpatch.evaluation.image_features import PatchFeature
from selfpatch.evaluation.image_trees import Pair
from selfpatch.evaluation.knn import BANK_ROWS
from selfpatch.evaluation.model_options import Candidate, load_candidates
from selfpatch.evaluation.segmentation import (
    IGNORE,
    SegmentationData,
    add_segmentation_data,
    confusion_matrix,
    find_segmentation_data,
    match_predictions,
    mean_iou,
    pixel_accuracy,
)
from selfpatch.evaluation.tables import check_output

PUBLISHED_STD = (0.229, 0.224, 0.255)  # blue is not ImageNet's 0.225; the published figures are made with it
JITTER = ("brightness", "contrast", "saturation", "hue")
BILINEAR, NEAREST = tf.InterpolationMode.BILINEAR, tf.InterpolationMode.NEAREST


# ---------------------------------------------------------------- images

class MemoryImages(Dataset):
    """Training images, once for each pass, with the protocol's augmentation: jittered colours and a random crop.

    A sample is (normalised image [3, S, S], ids [S, S], pass, number of the image); seed, pass and number determine it.

    Args:
        share: this data set's part of the passes · images samples, which are ordered by pass.
    """

    def __init__(self, data: SegmentationData, size: int, statistics: tuple, share: range, seed: int):
        self.data, self.size, self.statistics, self.share, self.seed = data, size, statistics, share, seed
        self.jitter = v2.Compose([v2.RandomApply([v2.ColorJitter(**{name: 0.1})], 0.5) for name in JITTER])

    def __len__(self) -> int:
        return len(self.share)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        repeat, number = divmod(self.share[index], len(self.data.train))
        image, ids = self.data.read(self.data.train[number])
        with seeded(self.seed, repeat, number):
            image = normalise(tf.pil_to_tensor(self.jitter(image)), self.statistics)
            # as published, scales go up to twice the image's area, though no crop exceeds the image
            box = RandomResizedCrop.get_params(image, scale=(0.5, 2), ratio=(3 / 4, 4 / 3))
        image = tf.resized_crop(image, *box, [self.size] * 2, BILINEAR, antialias=True)
        ids = tf.resized_crop(torch.from_numpy(ids)[None], *box, [self.size] * 2, NEAREST)[0]
        return image, ids, repeat, number


class TestImages(Dataset):
    """Images and ids, resized to S × S: (normalised image [3, S, S], ids [S, S]).

    Args:
        pairs: None for an image that is not scored, which fills up a smaller share.
    """

    def __init__(self, data: SegmentationData, size: int, statistics: tuple, pairs: list[Pair | None]):
        self.data, self.size, self.statistics, self.pairs = data, size, statistics, pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self.pairs[index] is None:
            return torch.zeros(3, self.size, self.size), torch.full((self.size, self.size), IGNORE, dtype=torch.uint8)
        image, ids = self.data.read(self.pairs[index])
        image = normalise(tf.pil_to_tensor(image), self.statistics)
        image = tf.resize(image, [self.size] * 2, BILINEAR, antialias=True)
        return image, tf.resize(torch.from_numpy(ids)[None], [self.size] * 2, NEAREST)[0]


def image_size(patch_size: int) -> int:
    """The largest multiple of the patch size up to 512: 504 for patches of 14."""
    return 512 // patch_size * patch_size


# ---------------------------------------------------------------- memory and votes

def batches(dataset: Dataset, args: argparse.Namespace, device: torch.device,
            name: str) -> Iterator[list[torch.Tensor]]:
    """The samples of a data set in batches on the device; the first process shows a progress bar of that name."""
    loader = DataLoader(dataset, args.batch_size_per_gpu, pin_memory=device.type == "cuda",
                        **worker_options(args.num_workers))
    with tqdm(total=len(dataset), desc=name, unit="image", disable=not is_main_process()) as progress:
        for batch in loader:
            yield [part.to(device, non_blocking=True) for part in batch]
            progress.update(len(batch[0]))


def build_memory(feature: PatchFeature, data: SegmentationData, args: argparse.Namespace, device: torch.device,
                 statistics: tuple) -> PatchMemory:
    """The memory of this process's share of the training images.

    Args:
        statistics: mean and standard deviation of RGB, for normalisation.

    Raises:
        ConfigError: the memory does not fit the device, or an image or mask cannot be read.
    """
    samples, patch_size = args.passes * len(data.train), feature.model.patch_size
    bounds = [samples * rank // get_world_size() for rank in (get_rank(), get_rank() + 1)]
    size = image_size(patch_size)
    rows = min(args.memory_size // samples, (size // patch_size)**2)
    memory = PatchMemory(rows * (bounds[1] - bounds[0]), feature.dim, data.num_classes, device)
    dataset = MemoryImages(data, size, statistics, range(*bounds), args.seed)
    for images, ids, repeats, numbers in batches(dataset, args, device, "memory"):
        ids = torch.where(ids == IGNORE, 0, ids)  # as published: unscored pixels are class 0 in the memory
        for one, labels, repeat, number in zip(feature(images), patch_labels(ids, data.num_classes, patch_size),
                                               repeats.tolist(), numbers.tolist(), strict=True):
            labels = labels.flatten(0, 1)
            # not the crop's seed: the same numbers would be drawn again
            generator = torch.Generator().manual_seed(mixed_seed(args.seed, repeat, number, 1))
            taken = sample_patches(labels, rows, generator)
            memory.add(one[taken], labels[taken])
    return memory


def score(feature: PatchFeature, data: SegmentationData, args: argparse.Namespace, device: torch.device) -> np.ndarray:
    """The confusion matrix over all test images, int64 [C, C], the same in every process."""
    statistics, model = image_statistics(feature.model), feature.model
    if statistics == (IMAGENET_MEAN, IMAGENET_STD):
        statistics = IMAGENET_MEAN, PUBLISHED_STD
    memory = together(lambda: build_memory(feature, data, args, device, statistics))
    pairs = data.val + [None] * (-len(data.val) % get_world_size())
    dataset = TestImages(data, image_size(model.patch_size), statistics, pairs[get_rank()::get_world_size()])
    confusion = torch.zeros(data.num_classes, data.num_classes, dtype=torch.long, device=device)
    for images, ids in batches(dataset, args, device, "test"):
        votes = memory.vote(feature(images).flatten(0, 1), args.neighbours, args.temperature,
                            memory_rows=args.memory_rows)
        for one, truth in zip(votes.unflatten(0, (len(images), *model.grid_size(images))), ids, strict=True):
            confusion += confusion_matrix(truth, label_map(one, truth.shape), data.num_classes)
    return sum_over_processes(confusion).cpu().numpy()


def figures(confusion: np.ndarray, hungarian: bool) -> Column:
    """The rows of the table, shares from 0 to 1, from a confusion matrix [C, C].

    Args:
        hungarian: add the mean IoU after renaming the predicted classes to fit best.
    """
    column = {"mean IoU, all classes": mean_iou(confusion),
              "mean IoU, true classes": mean_iou(confusion, present_only=True),
              "pixels": pixel_accuracy(confusion)}
    if hungarian:
        column["mean IoU, matched (Hungarian)"] = mean_iou(match_predictions(confusion))
    return column


# ---------------------------------------------------------------- the job

def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser(description="Dense retrieval (Hummingbird): mean IoU by nearest neighbours of patches")
    add_segmentation_data(parser)
    protocol = parser.add_argument_group("protocol")
    protocol.add_argument("--memory_size", type=POSITIVE_INT, default=1_024_000,
                          help="patches in the memory; published are 102400, 1024000 and 10240000")
    protocol.add_argument("--passes", type=POSITIVE_INT, default=2,
                          help="times that every training image gives patches")
    protocol.add_argument("--neighbours", type=POSITIVE_INT, default=NEIGHBOURS, help="patches that vote")
    protocol.add_argument("--temperature", type=POSITIVE_FLOAT, default=TEMPERATURE, help="of the votes' softmax")
    protocol.add_argument("--hungarian", action="store_true",
                          help="also the published program's figure, which renames predicted classes to fit best")
    add_patch_feature(protocol, "patches")
    add_evaluation_options(parser, 8)
    parser.add_argument("--memory_rows", type=POSITIVE_INT, default=BANK_ROWS,
                        help="patches compared at once; less needs less memory, and changes no figure")
    return parser


def main(args: argparse.Namespace) -> None:
    """Raises ConfigError for options, data or checkpoints that cannot be used."""
    get_args_parser().check(vars(args))
    check_output(args.output, args.overwrite)
    device, dtype = start(args.device, args.precision, args.dist_timeout, args.num_workers)
    data = together(lambda: find_segmentation_data(args.data, args.num_classes, args.image_suffix, args.image_column))
    if args.memory_size < args.passes * len(data.train):
        raise ConfigError(f"--memory_size {args.memory_size} is less than one patch of each of {len(data.train)} "
                          f"images in --passes {args.passes}: give {args.passes * len(data.train)} or more")
    candidates = load_candidates(args.pretrained_weights, args.arch, args.checkpoint_key, args.patch_size, args.layer,
                                 args.seed if args.random_weights else None)

    def retrieve(candidate: Candidate) -> Column:
        feature = PatchFeature(candidate.model, args.feature, args.layer, dtype)
        confusion = score(feature, data, args, device)
        data.check_shift(confusion)
        return figures(confusion, args.hungarian)

    table = evaluate_each(candidates, retrieve, device)
    finish(f"dense retrieval, {data.name}", candidates, table, vars(args), train_images=len(data.train),
           test_images=len(data.val))


if __name__ == "__main__":
    run_main(main, get_args_parser())
