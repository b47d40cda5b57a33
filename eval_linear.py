"""Linear classification of images on frozen features: one pass of the backbone feeds a grid of heads, the best counts.

    python eval_linear.py --data_path /path/to/imagenet --pretrained_weights checkpoint.pth
    python eval_linear.py --data_path /path/to/imagenet --pretrained_weights dino.pth selfpatch.pth --cache_features
    torchrun --nproc_per_node=8 eval_linear.py ...

Training: random crops of 224 and flips, SGD, a cosine to 0. The heads differ in learning rate, in the number of last
blocks that they see, and in whether they also see the mean of the patches. ImageNet, ViT-S/16: DINO's published network
gives 77.0 % (docs/EVALUATIONS.md).
"""
import argparse
import sys
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P leaves it out
import torch

from selfpatch.distributed.processes import is_main_process, together
from selfpatch.errors import POSITIVE_FLOAT, POSITIVE_INT, ArgumentParser, run_main
from selfpatch.evaluation.common import (
    add_evaluation_options,
    add_image_feature,
    add_image_options,
    evaluate_each,
    leave,
    start,
)
from selfpatch.evaluation.labelled_images import LabelledImages, Places, eval_transform, open_pair, share_loader
from selfpatch.evaluation.linear_probe import (
    LEARNING_RATES,
    CropBatches,
    Inputs,
    TokenFeature,
    build_heads,
    input_grid,
    score_heads,
    train_heads,
    train_transform,
)
from selfpatch.evaluation.model_options import Candidate, check_image_size, load_candidates
from selfpatch.evaluation.tables import check_output, format_table, write_json


class Score(NamedTuple):
    """A head of the grid and its accuracy in per cent."""
    lr: float
    inputs: Inputs
    top1: float
    top5: float

    def describe(self, kind: str) -> str:
        """The head in words, its tokens being of this kind."""
        blocks = f"{self.inputs.blocks} block{'s' * (self.inputs.blocks > 1)}"
        return f"lr {self.lr:g}, {kind} of {blocks}{' and mean of patches' * self.inputs.mean_patches}"


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser(description="linear classification of images on frozen features")
    add_image_options(parser, "train on")
    protocol = parser.add_argument_group("protocol")
    add_image_feature(protocol)
    protocol.add_argument("--n_last_blocks", type=POSITIVE_INT, nargs="+", default=[1, 4],
                          help="numbers of last blocks whose features the heads see, side by side")
    protocol.add_argument("--epochs", type=POSITIVE_INT, default=10,
                          help="of training; DINO's published figures took 100")
    protocol.add_argument("--lr", type=POSITIVE_FLOAT, nargs="+", default=list(LEARNING_RATES),
                          help="learning rates to try, for 256 images in a step; scaled to those of all processes")
    protocol.add_argument("--cache_features", action="store_true",
                          help="keep the features of one crop an image in memory, so that the backbone runs for one "
                               "epoch only; costs some tenths to some per cent of accuracy")
    add_evaluation_options(parser, 128)
    return parser


def train_and_score(feature: TokenFeature, train: LabelledImages, val: LabelledImages, args: argparse.Namespace,
                    device: torch.device) -> list[Score]:
    """Train the grid of heads; the scores of all heads, best first. Unreadable files are listed on stderr."""
    first, on_gpu = is_main_process(), device.type == "cuda"
    batches = CropBatches(train, args.batch_size_per_gpu, args.num_workers, args.seed, on_gpu)
    heads = build_heads(input_grid(feature.feature.kind, args.n_last_blocks), feature.dim, len(train.classes),
                        batches.step_size, args.lr, args.seed, device)
    unreadable = train_heads(heads, batches, feature, args.epochs, device, args.cache_features, first)
    accuracies, not_tested = score_heads(heads, share_loader(val, args.batch_size_per_gpu, args.num_workers, on_gpu),
                                        feature, device, first)
    for line in sorted(unreadable) + not_tested:
        print(f"left out: {line}", file=sys.stderr)
    scores = [Score(lr, one.inputs, *row) for one, rows in zip(heads, accuracies, strict=True)
              for lr, row in zip(args.lr, rows.tolist(), strict=True)]
    return sorted(scores, key=lambda score: -score.top1)  # stable: of equal scores, the grid's first


def report(rows: list[tuple[Candidate, str, list[Score]]], train: LabelledImages, val: LabelledImages,
           args: argparse.Namespace) -> None:
    """Print the table and write the JSON file."""
    print(f"linear, {len(train)} training and {len(val)} test images of {len(train.classes)} classes, {args.epochs} "
          f"epochs, best of {len(rows[0][2])} heads")
    print(format_table(["", "top-1", "top-5", "head"],
                       [[candidate.name, f"{scores[0].top1:.2f}", f"{scores[0].top5:.2f}", scores[0].describe(kind)]
                        for candidate, kind, scores in rows]))
    if args.output:
        networks = [candidate.summary() | {"feature": kind, "layer": args.layer, "heads": [
            {"lr": score.lr, **score.inputs._asdict(), "top1": score.top1, "top5": score.top5} for score in scores]}
            for candidate, kind, scores in rows]
        write_json({"evaluation": "linear", "train": train.source, "val": val.source, "train_images": len(train),
                    "val_images": len(val), "classes": len(train.classes), "image_size": args.image_size,
                    "epochs": args.epochs, "one_crop_an_image": args.cache_features, "networks": networks},
                   args.output)


def main(args: argparse.Namespace) -> None:
    """Raises ConfigError for options, data or checkpoints that cannot be used."""
    get_args_parser().check(vars(args))
    check_output(args.output, args.overwrite)
    device, dtype = start(args.device, args.precision, args.dist_timeout, args.num_workers)
    places = Places(args.data_path, args.train_path, args.val_path, args.val_share, args.val_labels,
                    suffixes=args.image_suffix, column=args.image_column)
    train, val = together(lambda: open_pair(places, train_transform(args.image_size), eval_transform(args.image_size)))
    candidates = load_candidates(args.pretrained_weights, args.arch, args.checkpoint_key, args.patch_size, args.layer,
                                 args.seed if args.random_weights else None, with_heads=args.feature != "mean")
    check_image_size(args.image_size, candidates)
    features = {one.name: TokenFeature(one.image_feature(args.feature, args.layer, dtype), max(args.n_last_blocks))
                for one in candidates}

    def train_heads_on(candidate: Candidate) -> list[Score]:
        feature = features[candidate.name]
        if is_main_process():
            print(f"{candidate.name}: feature {feature.feature.kind}, layer {args.layer}")
        return train_and_score(feature, train, val, args, device)

    table = evaluate_each(candidates, train_heads_on, device)
    if leave():
        report([(one, features[one.name].feature.kind, table[one.name]) for one in candidates], train, val, args)


if __name__ == "__main__":
    run_main(main, get_args_parser())
