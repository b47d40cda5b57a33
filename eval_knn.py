"""k-nearest-neighbour classification of images by frozen features, as DINO evaluates.

    python eval_knn.py --data_path /path/to/imagenet --pretrained_weights checkpoint.pth
    python eval_knn.py --data_path /path/to/imagenet --pretrained_weights dino.pth selfpatch.pth --random_weights
    python eval_knn.py --data_path /path/to/imagenet --arch timm:vit_small_patch14_dinov2 --pretrained_weights v2.pth
    torchrun --nproc_per_node=8 eval_knn.py ...       # shares the images and the bank among GPUs or processes

Images: short side 256, bicubic, centre 224; features of unit length; the k nearest training images vote with
exp(cosine / 0.07). ImageNet, ViT-S/16: DINO's published 800 epochs give 74.5 % with k = 20 (docs/EVALUATIONS.md).
"""
import argparse
import sys
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from checkpoint_files import write_checkpoint
from collectives import gather_rows
from distributed import Processes, init_distributed_mode, is_distributed, keep_freed_memory
from errors import ArgumentParser, ConfigError, run_main, user_path
from image_features import (
    KINDS,
    ImageFeature,
    LabelledImages,
    build_feature,
    eval_transform,
    open_pair,
    share_loader,
)
from knn import KS, TEMPERATURE, Accuracy, KnnResult, knn_classification
from model_options import (
    Candidate,
    add_model_options,
    add_run_options,
    check_image_size,
    check_run_options,
    load_candidates,
    pick_dtype,
)
from results import check_output, format_table, write_json

DUMPED = ("trainfeat.pth", "trainlabels.pth", "testfeat.pth", "testlabels.pth")


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser(description="k-NN classification of images by frozen features")
    data = parser.add_argument_group("images")
    data.add_argument("--data_path", type=user_path, help="folder with train/ and val/ in it, of class folders")
    data.add_argument("--train_path", type=user_path, help="class folders to compare with, instead of --data_path")
    data.add_argument("--val_path", type=user_path, help="class folders to test, instead of --data_path")
    data.add_argument("--val_share", type=float,
                      help="--data_path itself has class folders, and this share of each class is tested, such as 0.1")
    data.add_argument("--image_size", type=int, default=224, help="side of the images; rounded to whole patches")
    add_model_options(parser.add_argument_group("backbone"), several=True)
    protocol = parser.add_argument_group("protocol")
    protocol.add_argument("--feature", choices=KINDS,
                          help="cls: class token; head: SelfPatch's class token; mean: mean of the patches; default: "
                               "the first of these that the checkpoint offers")
    protocol.add_argument("--nb_knn", type=int, nargs="+", default=list(KS), help="numbers of neighbours; 20 is usual")
    protocol.add_argument("--temperature", type=float, default=TEMPERATURE, help="a neighbour votes exp(cosine / this)")
    output = parser.add_argument_group("output")
    output.add_argument("--output", type=user_path, help="JSON file for the figures")
    output.add_argument("--dump_features", type=user_path, help="folder for the features and classes, a tensor each: "
                                                                f"{' '.join(DUMPED)}, below a folder for each network "
                                                                "where there are several")
    output.add_argument("--overwrite", action="store_true", help="replace existing files")
    add_run_options(parser.add_argument_group("running"))
    return parser


def check_options(args: argparse.Namespace) -> None:
    check_run_options(args)
    if min(args.nb_knn) < 1:
        raise ConfigError(f"--nb_knn {min(args.nb_knn)}: give 1 or more")
    if not args.temperature > 0:
        raise ConfigError(f"--temperature {args.temperature:g}: give more than 0")
    if args.image_size < 16:
        raise ConfigError(f"--image_size {args.image_size}: give 16 or more")
    check_output(args.output, args.overwrite)


def dump_folders(args: argparse.Namespace, candidates: list[Candidate]) -> list[Path]:
    """Where each network's features go, after a check that nothing is there."""
    if not args.dump_features:
        return []
    names = [candidate.name.replace("/", "_") for candidate in candidates]
    folders = [args.dump_features / name if len(names) > 1 else args.dump_features for name in names]
    for path in (folder / name for folder in folders for name in DUMPED):
        if path.exists() and not args.overwrite:
            raise ConfigError(f"--dump_features: {path} exists: give another folder, or --overwrite")
    return folders


def dump(result: KnnResult, folder: Path, rank: int) -> None:
    """Write the features [n, D] and classes [n] of all processes, process by process."""
    parts = [gather_rows(part) for extracted in (result.train, result.val) for part in extracted[:2]]
    if rank == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--dump_features {folder}: {error.strerror}") from None
        for part, name in zip(parts, DUMPED, strict=True):
            write_checkpoint(part.cpu(), folder / name)
        print(f"wrote {' '.join(DUMPED)} to {folder}")


def evaluate(feature: ImageFeature, train: LabelledImages, val: LabelledImages, args: argparse.Namespace,
             processes: Processes) -> KnnResult:
    on_gpu = processes.device.type == "cuda"
    loaders = [share_loader(images, args.batch_size_per_gpu, args.num_workers, on_gpu) for images in (train, val)]
    result = knn_classification(feature, *loaders, args.nb_knn, args.temperature, processes.device,
                                progress=processes.rank == 0)
    for line in result.train.unreadable + result.val.unreadable:
        print(f"left out: {line}", file=sys.stderr)
    return result


def report(rows: list[tuple[Candidate, str, dict[int, Accuracy]]], train: LabelledImages, val: LabelledImages,
           args: argparse.Namespace) -> None:
    """Print the table and write the JSON file."""
    ks = list(rows[0][2])
    print(f"k-NN, {len(train)} training and {len(val)} test images of {len(train.classes)} classes, top-1 / top-5 in %")
    print(format_table(["", "feature", *(f"k = {k}" for k in ks)],
                       [[candidate.name, kind, *("{:.2f} / {:.2f}".format(*accuracies[k]) for k in ks)]
                        for candidate, kind, accuracies in rows]))
    if args.output:
        networks = [candidate.summary() | {"feature": kind, "layer": args.layer, "knn": {
            str(k): accuracy._asdict() for k, accuracy in accuracies.items()}} for candidate, kind, accuracies in rows]
        write_json({"evaluation": "knn", "train": str(train.root), "val": str(val.root), "train_images": len(train),
                    "val_images": len(val), "classes": len(train.classes), "image_size": args.image_size,
                    "temperature": args.temperature, "networks": networks}, args.output)


def main(args: argparse.Namespace) -> None:
    """Raises ConfigError for options, data or checkpoints that cannot be used."""
    check_options(args)
    train, val = open_pair(args.data_path, args.train_path, args.val_path, args.val_share,
                           transform=eval_transform(args.image_size))
    processes = init_distributed_mode(args.device, timeout=timedelta(minutes=args.dist_timeout))
    rank, device = processes.rank, processes.device
    if device.type == "cpu":
        keep_freed_memory()
    candidates = load_candidates(args, quiet=rank > 0)
    check_image_size(args.image_size, candidates)
    folders = dump_folders(args, candidates)
    features = [build_feature(c.model, c.info, args.feature, args.layer, dtype=pick_dtype(args.precision, device))
                for c in candidates]
    if rank == 0 and max(args.nb_knn) > len(train):
        print(f"--nb_knn {max(args.nb_knn)}: there are {len(train)} training images, so k is at most that")
    rows = []
    for i, (candidate, feature) in enumerate(zip(candidates, features, strict=True)):
        if rank == 0:
            print(f"{candidate.name}: feature {feature.kind}, layer {args.layer}")
        result = evaluate(feature.to(device), train, val, args, processes)
        if folders:
            dump(result, folders[i], rank)
        feature.to("cpu")
        rows.append((candidate, feature.kind, result.accuracies))
    if is_distributed():
        dist.destroy_process_group()
    if rank == 0:
        report(rows, train, val, args)


if __name__ == "__main__":
    run_main(main, get_args_parser().parse_args())
