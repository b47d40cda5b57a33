"""k-nearest-neighbour classification of images by frozen features, as DINO evaluates.

    python eval_knn.py --data_path /path/to/imagenet --pretrained_weights checkpoint.pth
    python eval_knn.py --data_path /path/to/imagenet --pretrained_weights dino.pth selfpatch.pth --random_weights
    python eval_knn.py --data_path /path/to/imagenet --arch timm:vit_small_patch14_dinov2 --pretrained_weights v2.pth
    torchrun --nproc_per_node=8 eval_knn.py ...       # shares the images and the bank among GPUs or processes

Images: short side 256, bicubic, centre 224; features of unit length; the k nearest training images vote with
exp(cosine / 0.07). ImageNet, ViT-S/16: DINO's published 800 epochs give 74.5 % with k = 20 (docs/EVALUATIONS.md).
"""
import argparse
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P leaves it out
from selfpatch.checkpoints.files import write_checkpoint
from selfpatch.distributed.collectives import gather_rows
from selfpatch.distributed.processes import is_main_process, on_main_process, together
from selfpatch.errors import POSITIVE_FLOAT, POSITIVE_INT, ArgumentParser, ConfigError, run_main, user_path
from selfpatch.evaluation.common import (
    add_evaluation_options,
    add_image_feature,
    add_image_options,
    evaluate_each,
    leave,
    start,
)
from selfpatch.evaluation.knn import KS, TEMPERATURE, Accuracy, KnnResult, knn_classification
from selfpatch.evaluation.labelled_images import LabelledImages, Places, eval_transform, open_pair, share_loader
from selfpatch.evaluation.model_options import Candidate, check_image_size, load_candidates
from selfpatch.evaluation.tables import check_output, folder_names, format_table, write_json

DUMPED = ("trainfeat.pth", "trainlabels.pth", "testfeat.pth", "testlabels.pth")


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser(description="k-NN classification of images by frozen features")
    add_image_options(parser, "compare with")
    protocol = parser.add_argument_group("protocol")
    add_image_feature(protocol)
    protocol.add_argument("--nb_knn", type=POSITIVE_INT, nargs="+", default=list(KS),
                          help="numbers of neighbours; 20 is usual")
    protocol.add_argument("--temperature", type=POSITIVE_FLOAT, default=TEMPERATURE,
                          help="a neighbour votes exp(cosine / this)")
    protocol.add_argument("--dump_features", type=user_path,
                          help=f"folder for the features and classes, a tensor each: {' '.join(DUMPED)}, below a "
                               "folder for each network where there are several")
    add_evaluation_options(parser, 128)
    return parser


def dump_folders(args: argparse.Namespace, candidates: list[Candidate]) -> dict[str, Path]:
    """Create the folders for features; each by its network's name.

    Raises:
        ConfigError: a file exists and may not be replaced, or a folder cannot be created or written to.
    """
    if not args.dump_features:
        return {}
    names = [one.name for one in candidates]
    parts = folder_names(names) if len(names) > 1 else [""]
    folders = {name: args.dump_features / part for name, part in zip(names, parts, strict=True)}
    for path in (folder / name for folder in folders.values() for name in DUMPED):
        if path.exists() and not args.overwrite:
            raise ConfigError(f"--dump_features: {path} exists: give another folder, or --overwrite")
    for folder in folders.values():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--dump_features {folder}: cannot be made a folder ({error.strerror})") from None
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ConfigError(f"--dump_features {folder}: cannot be written to")
    return folders


def dump(result: KnnResult, folder: Path) -> None:
    """Write the features [n, D] and classes [n] of all processes, process by process; every process calls it.

    Raises:
        ConfigError: a file cannot be written.
    """
    parts = [gather_rows(part) for extracted in (result.train, result.val) for part in extracted[:2]]

    def write() -> None:
        for part, name in zip(parts, DUMPED, strict=True):
            write_checkpoint(part.cpu(), folder / name)
        print(f"wrote {' '.join(DUMPED)} to {folder}")

    on_main_process(write)


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
        write_json({"evaluation": "knn", "train": train.source, "val": val.source, "train_images": len(train),
                    "val_images": len(val), "classes": len(train.classes), "image_size": args.image_size,
                    "temperature": args.temperature, "networks": networks}, args.output)


def main(args: argparse.Namespace) -> None:
    """Raises ConfigError for options, data or checkpoints that cannot be used."""
    get_args_parser().check(vars(args))
    check_output(args.output, args.overwrite)
    device, dtype = start(args.device, args.precision, args.dist_timeout, args.num_workers)
    places = Places(args.data_path, args.train_path, args.val_path, args.val_share, args.val_labels,
                    suffixes=args.image_suffix, column=args.image_column)
    train, val = together(lambda: open_pair(places, transform=eval_transform(args.image_size)))
    candidates = load_candidates(args.pretrained_weights, args.arch, args.checkpoint_key, args.patch_size, args.layer,
                                 args.seed if args.random_weights else None, with_heads=args.feature != "mean")
    check_image_size(args.image_size, candidates)
    features = {one.name: one.image_feature(args.feature, args.layer, dtype) for one in candidates}
    folders, first = on_main_process(lambda: dump_folders(args, candidates)), is_main_process()
    if first and max(args.nb_knn) > len(train):
        print(f"--nb_knn {max(args.nb_knn)}: there are {len(train)} training images, so k is at most that")

    def classify_images(candidate: Candidate) -> dict[int, Accuracy]:
        feature = features[candidate.name]
        if first:
            print(f"{candidate.name}: feature {feature.kind}, layer {args.layer}")
        loaders = [share_loader(images, args.batch_size_per_gpu, args.num_workers, device.type == "cuda")
                   for images in (train, val)]
        result = knn_classification(feature, *loaders, args.nb_knn, args.temperature, device, progress=first)
        for line in result.train.unreadable + result.val.unreadable:
            print(f"left out: {line}", file=sys.stderr)
        if folders:
            dump(result, folders[candidate.name])
        return result.accuracies

    table = evaluate_each(candidates, classify_images, device)
    if leave():
        report([(one, features[one.name].kind, table[one.name]) for one in candidates], train, val, args)


if __name__ == "__main__":
    run_main(main, get_args_parser())
