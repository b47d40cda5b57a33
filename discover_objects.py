"""Object discovery: the box of each image's main object, from one pass of a frozen backbone, by LOST and TokenCut.

    python discover_objects.py --data voc:VOCdevkit/VOC2007 --pretrained_weights checkpoint.pth --random_weights
    python discover_objects.py --data images:photos --pretrained_weights checkpoint.pth --pictures found
    torchrun --nproc_per_node=4 discover_objects.py ...             # shares the images

Prints CorLoc where the data has boxes: the share of images whose box reaches IoU 0.5 with any true one.
"""
import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P leaves it out
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as tf
from tqdm import tqdm

from selfpatch.checkpoints.backbones import image_statistics
from selfpatch.data.files import load_rgb
from selfpatch.data.normalisation import normalise
from selfpatch.data.sources import add_source_options
from selfpatch.distributed.processes import gather_objects, get_rank, get_world_size, is_main_process, together
from selfpatch.distributed.workers import worker_options
from selfpatch.errors import POSITIVE_FLOAT, ArgumentParser, ConfigError, Number, run_main, user_path
from selfpatch.evaluation.common import (
    Column,
    add_evaluation_options,
    add_patch_feature,
    evaluate_each,
    finish,
    start,
)
from selfpatch.evaluation.image_features import PatchFeature, check_finite
from selfpatch.evaluation.image_trees import Item
from selfpatch.evaluation.model_options import Candidate, load_candidates
from selfpatch.evaluation.object_discovery import (
    EPSILON,
    HELP,
    TAU,
    BoxImage,
    box_of,
    find_box_data,
    is_found,
    lost,
    tokencut,
)
from selfpatch.evaluation.tables import check_output, folder_names
from selfpatch.visualization.features import boxes_over
from selfpatch.whole_files import whole_file

METHODS = {"lost": "LOST", "tokencut": "TokenCut"}
MAX_PATCHES = 16_384  # 128 × 128: their correlations take 2 GiB in float64

Box = tuple[int, int, int, int]
Found = tuple[dict[str, Box], dict[str, bool] | None]  # boxes by method, and whether each is right, if that is known


class Images(Dataset):
    """Samples (number, RGB uint8 [3, H, W], true boxes [B, 4] or None)."""

    def __init__(self, images: list[BoxImage], numbers: range):
        self.images, self.numbers = images, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor, np.ndarray | None]:
        image = self.images[self.numbers[index]]
        return self.numbers[index], tf.pil_to_tensor(load_rgb(str(image.image), image.image.read())), image.read_boxes()


def prepare(pixels: torch.Tensor, patch_size: int, statistics: tuple) -> torch.Tensor:
    """uint8 [3, H, W] -> normalised [1, 3, H', W'], with zeros to the right and below up to whole patches."""
    image = normalise(pixels, statistics)[None]
    return F.pad(image, (0, -image.shape[-1] % patch_size, 0, -image.shape[-2] % patch_size))


def discover(feature: PatchFeature, pixels: torch.Tensor, args: argparse.Namespace, device: torch.device,
             item: Item) -> dict[str, Box]:
    """The box of an image, uint8 [3, H, W], by every method asked for.

    Args:
        item: the image, for messages.

    Raises:
        ConfigError: the image has more than MAX_PATCHES patches, or a feature is not finite.
    """
    model = feature.model
    image = prepare(pixels.to(device), model.patch_size, image_statistics(model))
    rows, columns = model.grid_size(image)
    if rows * columns > MAX_PATCHES:
        raise ConfigError(f"{item}: an image of {pixels.shape[2]}×{pixels.shape[1]} has {rows * columns} patches of "
                          f"{model.patch_size}, more than {MAX_PATCHES}, between which every correlation is needed: "
                          "scale it down")
    tokens, grid, masks = feature(image)[0].float(), (rows, columns), {}
    check_finite(tokens, str(item))
    if "lost" in args.method:
        masks["lost"] = lost(tokens, grid)[0]
    if "tokencut" in args.method:
        masks["tokencut"] = tokencut(tokens, grid, args.tau, args.epsilon)
    return {name: box_of(mask, model.patch_size, pixels.shape[1:]) for name, mask in masks.items()}


def discover_all(feature: PatchFeature, images: list[BoxImage], args: argparse.Namespace, device: torch.device,
                 draw: Callable[[BoxImage, torch.Tensor, dict[str, Box], np.ndarray | None], None] | None = None,
                 ) -> dict[int, Found]:
    """What is found in all images, by number; None in the place of right or wrong for an image without true boxes.

    Every process calls it with all images and gets the results of all.

    Args:
        draw: called with every image of this process, its pixels, its boxes and the true ones.

    Raises:
        ConfigError: an image cannot be read, is too large, or cannot be drawn; all processes raise it.
    """
    shares = gather_objects(together(lambda: discover_share(feature, images, args, device, draw)))
    return dict(sorted((i, found) for share in shares for i, found in share.items()))


def discover_share(feature: PatchFeature, images: list[BoxImage], args: argparse.Namespace, device: torch.device,
                   draw: Callable | None = None) -> dict[int, Found]:
    """discover_all for this process's share of the images."""
    dataset = Images(images, range(get_rank(), len(images), get_world_size()))
    loader = DataLoader(dataset, None, **worker_options(args.num_workers))
    outcome = {}
    for i, pixels, truth in tqdm(loader, desc="images", unit="image", disable=not is_main_process()):
        boxes = discover(feature, pixels, args, device, images[i].image)
        known = truth is not None and len(truth) > 0
        outcome[i] = boxes, {name: is_found(box, truth) for name, box in boxes.items()} if known else None
        if draw:
            draw(images[i], pixels, boxes, truth)
    return outcome


def figures(outcome: dict, methods: list[str]) -> Column:
    """CorLoc of every method as a share, and the number of images; without true boxes the number alone."""
    right = [found for _, found in outcome.values() if found is not None]
    column = {f"{METHODS[name]}, CorLoc": float(np.mean([found[name] for found in right]))
              for name in methods if right}
    return column | {"images": len(outcome), "of them scored": len(right)}


# ---------------------------------------------------------------- pictures

def write_picture(folder: Path, image: BoxImage, pixels: torch.Tensor, boxes: dict[str, Box],
                  truth: np.ndarray | None) -> None:
    """Write the image with its boxes to folder/name.png, whole or not at all.

    Raises:
        WriteError: the disk is full or cannot be written.
    """
    path = folder / f"{image.name}.png"
    named = {METHODS[name]: [box] for name, box in boxes.items()}
    if truth is not None:
        named["true"] = [tuple(box) for box in truth.tolist()]
    with whole_file(path) as temporary:
        path.parent.mkdir(parents=True, exist_ok=True)
        boxes_over(tf.to_pil_image(pixels), named).save(temporary, "PNG")


def check_pictures(folder: Path | None, overwrite: bool, data: str = "") -> None:
    """Raise ConfigError if a folder of pictures has something in it that may not be replaced, or cannot be made.

    Also if it lies below a folder of --data, all of which is read: the next run would take its pictures for images.
    """
    if folder is None:
        return
    kind, _, places = data.partition(":")
    for place in map(user_path, places.split(",") if kind in ("images", "folders") else []):
        if place.is_dir() and folder.resolve().is_relative_to(place.resolve()):
            raise ConfigError(f"--pictures {folder} lies in {place}, all of which is read: the next run would take the "
                              "pictures for images. Give a folder beside it")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--pictures {folder} is not a folder: give another name")
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise ConfigError(f"--pictures {folder}: {there} cannot be written to")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise ConfigError(f"--pictures {folder} is not empty: give another name, or --overwrite")


# ---------------------------------------------------------------- the job

def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser(description="Object discovery with LOST and TokenCut")
    parser.add_argument("--data", required=True, help=HELP)
    add_source_options(parser)
    parser.add_argument("--method", nargs="+", choices=list(METHODS), default=list(METHODS), help="default: both")
    add_patch_feature(parser, "keys")
    parser.add_argument("--tau", type=Number(float, above=-1, below=1), default=TAU,
                        help="TokenCut's cosine above which patches are connected")
    parser.add_argument("--epsilon", type=POSITIVE_FLOAT, default=EPSILON, help="TokenCut's weight of other edges")
    parser.add_argument("--pictures", type=user_path, metavar="FOLDER",
                        help="write every image with its boxes to <folder>/<backbone>/<image>.png")
    add_evaluation_options(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    """Raises ConfigError for options, data or checkpoints that cannot be used."""
    get_args_parser().check(vars(args))
    check_output(args.output, args.overwrite)
    device, dtype = start(args.device, args.precision, args.dist_timeout, args.num_workers)
    together(lambda: check_pictures(args.pictures, args.overwrite, args.data))
    images = together(lambda: find_box_data(args.data, args.image_suffix, args.image_column))
    candidates = load_candidates(args.pretrained_weights, args.arch, args.checkpoint_key, args.patch_size, args.layer,
                                 args.seed if args.random_weights else None)
    names, outcomes = [one.name for one in candidates], {}
    folders = dict(zip(names, folder_names(names), strict=True))

    def discover_objects(candidate: Candidate) -> Column:
        draw = args.pictures and partial(write_picture, args.pictures / folders[candidate.name])
        feature = PatchFeature(candidate.model, args.feature, args.layer, dtype)
        outcomes[candidate.name] = discover_all(feature, images, args, device, draw)
        return figures(outcomes[candidate.name], args.method)

    table = evaluate_each(candidates, discover_objects, device)
    boxes = {name: {images[i].name: found for i, (found, _) in outcome.items()}
             for name, outcome in outcomes.items()}
    finish("object discovery", candidates, table, vars(args), boxes=boxes)


if __name__ == "__main__":
    run_main(main, get_args_parser())
