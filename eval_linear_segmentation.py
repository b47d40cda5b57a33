"""Linear segmentation: train BatchNorm and one linear map on frozen patch features, and score the masks it gives.

    python eval_linear_segmentation.py --data voc_aug:VOCdevkit/VOC2012 --pretrained_weights checkpoint.pth
    torchrun --nproc_per_node=4 eval_linear_segmentation.py ...     # shares each step's images, and the tests

Training: images scaled so that the short side is 512 · (0.5 … 2), crops of 512, flips; 40,000 steps of 16 images. Test:
short side 512, windows of 512 at a stride of 341, their logits averaged, scores at the image's own size.
"""
import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P leaves it out
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as tf
from tqdm import tqdm

from selfpatch.checkpoints.backbones import image_statistics
from selfpatch.data.normalisation import normalise
from selfpatch.data.seeds import mixed_seed
from selfpatch.distributed.collectives import sum_over_processes
from selfpatch.distributed.processes import get_rank, get_world_size, is_main_process, together
from selfpatch.distributed.workers import worker_options
from selfpatch.errors import POSITIVE_FLOAT, POSITIVE_INT, ArgumentParser, ConfigError, Number, TrainingError, run_main
from selfpatch.evaluation.common import (
    Column,
    add_evaluation_options,
    add_patch_feature,
    evaluate_each,
    finish,
    start,
)
from selfpatch.evaluation.image_features import PatchFeature, check_finite
from selfpatch.evaluation.linear_segmentation import (
    LinearHead,
    build_linear_head,
    full_size_prediction,
    kept_channels,
    segmentation_loss,
    sliding_logits,
)
from selfpatch.evaluation.model_options import Candidate, load_candidates
from selfpatch.evaluation.segmentation import (
    IGNORE,
    SegmentationData,
    add_segmentation_data,
    confusion_matrix,
    find_segmentation_data,
    mean_iou,
    pixel_accuracy,
)
from selfpatch.evaluation.tables import check_output
from selfpatch.method.schedules import cosine_schedule

SIDE, STRIDE = 512, 341  # of windows, in pixels; the side is rounded down to whole patches
PUBLISHED_STEPS, PUBLISHED_WARMUP, WARMUP_START = 40_000, 1500, 1e-6
SCALES = (0.5, 2.0)


# ---------------------------------------------------------------- images

def random_crop(image: Image.Image, ids: np.ndarray, size: int,
                rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A scaled, cropped and perhaps flipped image, uint8 [3, size, size], and its ids [size, size].

    An image smaller than the crop is padded with grey pixels that are not scored.
    """
    scale = SIDE * rng.uniform(*SCALES) / min(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    left, top = (int(rng.integers(0, max(side - size, 0) + 1)) for side in (width, height))
    image = image.resize((width, height), Image.Resampling.BILINEAR).crop(
        (left, top, min(left + size, width), min(top + size, height)))
    mask = Image.fromarray(ids).resize((width, height), Image.Resampling.NEAREST).crop(
        (left, top, min(left + size, width), min(top + size, height)))
    pixels, mask = tf.pil_to_tensor(image), tf.pil_to_tensor(mask)
    missing = [0, 0, size - pixels.shape[2], size - pixels.shape[1]]
    pixels, mask = tf.pad(pixels, missing, fill=[124, 116, 104]), tf.pad(mask, missing, fill=IGNORE)
    if rng.random() < 0.5:
        pixels, mask = pixels.flip(2), mask.flip(2)
    return pixels, mask[0]


class TrainingCrops(Dataset):
    """This process's crops of all steps, in order: (uint8 [3, S, S], ids [S, S]).

    Seed, step and place in the step determine a crop, so that any number of processes takes the same steps.
    """

    def __init__(self, data: SegmentationData, size: int, batch: int, steps: int, seed: int):
        self.data, self.size, self.batch, self.seed = data, size, batch, seed
        self.own = batch // get_world_size()  # images of a step
        self.first, self.length = self.own * get_rank(), steps * self.own

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        step, place = divmod(index, self.own)
        number = step * self.batch + self.first + place
        epoch, place = divmod(number, len(self.data.train))
        order = np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.data.train))
        rng = np.random.default_rng([self.seed, 1, number])
        return random_crop(*self.data.read(self.data.train[order[place]]), self.size, rng)


class TestImages(Dataset):
    """This process's test images, the short side scaled to SIDE: (uint8 [3, h, w], ids of the original [H, W])."""

    def __init__(self, data: SegmentationData):
        self.data, self.pairs = data, data.val[get_rank()::get_world_size()]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, ids = self.data.read(self.pairs[index])
        scale = SIDE / min(image.size)
        size = [round(side * scale) for side in image.size]
        return tf.pil_to_tensor(image.resize(size, Image.Resampling.BILINEAR)), torch.from_numpy(ids)


# ---------------------------------------------------------------- training and test

def train(feature: PatchFeature, data: SegmentationData, args: argparse.Namespace, device: torch.device) -> LinearHead:
    """A head trained on the frozen backbone, in eval mode, the same in every process.

    Raises:
        ConfigError: an image or mask cannot be read.
        TrainingError: the loss is not finite.
    """
    model, first = feature.model, is_main_process()
    size = SIDE // model.patch_size * model.patch_size
    head = build_linear_head(feature.dim, data.num_classes, device, args.seed)
    optimizer = torch.optim.AdamW(head.parameters(), weight_decay=args.weight_decay)
    warmup = round(args.iterations * PUBLISHED_WARMUP / PUBLISHED_STEPS) if args.warmup is None else args.warmup
    schedule = cosine_schedule(args.lr, 0.0, args.iterations, warmup, WARMUP_START)
    crops = TrainingCrops(data, size, args.batch_size, args.iterations, args.seed)
    loader = DataLoader(crops, crops.own, pin_memory=device.type == "cuda", **worker_options(args.num_workers))
    with tqdm(loader, "training", unit="step", disable=not first) as progress:
        for step, (pixels, ids) in enumerate(progress):
            pixels, ids = (part.to(device, non_blocking=True) for part in (pixels, ids))
            images = normalise(pixels, image_statistics(model))
            kept = kept_channels(head, len(images), mixed_seed(args.seed, step))
            loss = segmentation_loss(head(feature(images), kept), ids, model.grid_size(images))
            optimizer.zero_grad()
            loss.backward()
            for parameter in head.parameters():
                sum_over_processes(parameter.grad)
            for group in optimizer.param_groups:
                group["lr"] = schedule(step)
            optimizer.step()
            if step % 50 == 0 or step == args.iterations - 1:
                total = float(sum_over_processes(loss.detach()))
                progress.set_postfix(loss=f"{total:.3f}")
                if not np.isfinite(total):
                    raise TrainingError(f"the loss is {total} at step {step}: try a lower --lr, or --precision fp32")
    return head.eval()


@torch.no_grad()
def score(feature: PatchFeature, head: LinearHead, data: SegmentationData, num_workers: int,
          device: torch.device) -> np.ndarray:
    """The confusion matrix over all test images at full size, int64 [C, C], the same in every process.

    Raises:
        ConfigError: an image or mask cannot be read, or a feature is not finite; all processes raise it.
    """
    model = feature.model
    window = SIDE // model.patch_size * model.patch_size

    def logits_of(images: torch.Tensor) -> torch.Tensor:
        features = feature(images)
        check_finite(features)
        return head(features).transpose(1, 2).unflatten(2, model.grid_size(images))

    def share() -> torch.Tensor:
        confusion = torch.zeros(data.num_classes, data.num_classes, dtype=torch.long, device=device)
        loader = DataLoader(TestImages(data), None, **worker_options(num_workers))
        for pixels, ids in tqdm(loader, "test", unit="image", disable=not is_main_process()):
            image = normalise(pixels.to(device), image_statistics(model))
            prediction = full_size_prediction(
                sliding_logits(image, logits_of, data.num_classes, window, STRIDE), ids.shape)
            confusion += confusion_matrix(ids.to(device), prediction, data.num_classes)
        return confusion

    return sum_over_processes(together(share)).cpu().numpy()


def train_and_score(feature: PatchFeature, data: SegmentationData, args: argparse.Namespace,
                    device: torch.device) -> Column:
    """Train a head and score it: the rows of the table, shares from 0 to 1."""
    confusion = score(feature, train(feature, data, args, device), data, args.num_workers, device)
    data.check_shift(confusion)
    return {"mean IoU, true classes": mean_iou(confusion, present_only=True),
            "mean IoU, all classes": mean_iou(confusion),
            "pixels": pixel_accuracy(confusion)}


# ---------------------------------------------------------------- the job

def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser(description="Linear segmentation on frozen features: mean IoU")
    add_segmentation_data(parser)
    training = parser.add_argument_group("training")
    training.add_argument("--iterations", type=POSITIVE_INT, default=PUBLISHED_STEPS, help="steps")
    training.add_argument("--batch_size", type=Number(int, least=2), default=16,
                          help="images of a step, over all processes")
    training.add_argument("--lr", type=POSITIVE_FLOAT, default=1e-3,
                          help="of AdamW, after the warm-up; a cosine leads to 0")
    training.add_argument("--weight_decay", type=Number(float, least=0), default=1e-3)
    training.add_argument("--warmup", type=Number(int, least=0),
                          help="steps of the warm-up; default: 1500 of 40000, in proportion")
    add_patch_feature(parser, "patches")
    add_evaluation_options(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    """Raises ConfigError for options, data or checkpoints that cannot be used."""
    get_args_parser().check(vars(args))
    check_output(args.output, args.overwrite)
    if (args.warmup or 0) > args.iterations:
        raise ConfigError(f"--warmup {args.warmup} is more than --iterations {args.iterations}: give at most that")
    device, dtype = start(args.device, args.precision, args.dist_timeout, args.num_workers)
    data = together(lambda: find_segmentation_data(args.data, args.num_classes, args.image_suffix, args.image_column))
    if args.batch_size % get_world_size():
        raise ConfigError(f"--batch_size {args.batch_size} cannot be shared by {get_world_size()} processes: give a "
                          "multiple")
    candidates = load_candidates(args.pretrained_weights, args.arch, args.checkpoint_key, args.patch_size, args.layer,
                                 args.seed if args.random_weights else None)

    def segment(candidate: Candidate) -> Column:
        return train_and_score(PatchFeature(candidate.model, args.feature, args.layer, dtype), data, args, device)

    table = evaluate_each(candidates, segment, device)
    finish(f"linear segmentation, {data.name}", candidates, table, vars(args),
           train_images=len(data.train), test_images=len(data.val))


if __name__ == "__main__":
    run_main(main, get_args_parser())
