"""The speed of k-NN and linear evaluation: the search beside one product and top-k, and extraction beside the backbone.

    python benchmarks/evaluations.py                                             # made rows and images, about 4 minutes
    python benchmarks/evaluations.py --queries 2000 --rows 100000 --json evaluations.json
    python benchmarks/evaluations.py --device cuda --batch_size 256 --workers 16

search: the k most similar of some rows for some queries, by knn.neighbours with the bank as the job keeps it, and by a
single product and topk in float32, which holds all scores at once. Both run in turn, --rounds times; the ratio is of
medians.
extraction: from uint8 tensors to features by image_features.extract, beside forward passes of the same network on one
batch that is already normalised; with --data_path also from JPEGs, decoding included.

CPU times are process times with --threads threads, which other programs affect little; GPU times are wall-clock.
"""
import argparse
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P leaves it out

from data import time_of

from selfpatch.data.normalisation import normalise
from selfpatch.distributed.processes import keep_freed_memory, pick_device
from selfpatch.distributed.workers import worker_options
from selfpatch.errors import ArgumentParser, ConfigError, run_main, user_path
from selfpatch.evaluation.image_features import ImageFeature, extract
from selfpatch.evaluation.knn import bank_dtype, neighbours
from selfpatch.evaluation.labelled_images import open_labelled, share_loader
from selfpatch.evaluation.tables import check_output, format_table, write_json
from selfpatch.method.vision_transformer import ARCHS


class MadeImages(Dataset):
    """One made image, so many times: what is measured is not decoding."""

    def __init__(self, count: int):
        self.count, self.image = count, torch.randint(0, 256, (3, 224, 224), dtype=torch.uint8)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, str]:
        return self.image, index % 10, ""


def in_turn(ways: dict, rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each way; they alternate, so that other load affects both. One round first is not counted."""
    times = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, function in ways.items():
            seconds = time_of(function, device)
            if turn:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def measure_search(args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    queries, bank = (F.normalize(torch.randn(n, args.width, device=device), dim=1) for n in (args.queries, args.rows))
    kept, found = bank.to(bank_dtype(*bank.shape)), {}  # as the job keeps it
    labels = torch.arange(args.rows, device=device)

    def plain() -> None:
        found["plain"] = (queries @ bank.T).topk(args.k, dim=1)

    def ours() -> None:
        found["ours"] = neighbours(queries, kept, labels, args.k)

    times = in_turn({"ours": ours, "plain": plain}, args.rounds, device)
    error = (found["ours"][0] - found["plain"].values).abs().max().item()
    return times | {"ratio": times["plain"] / times["ours"], "largest_difference": error}


def measure_extraction(args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    model = ARCHS[args.arch](16).eval().to(device)
    feature = ImageFeature(model)
    loader = DataLoader(MadeImages(args.images), args.batch_size, pin_memory=device.type == "cuda",
                        **worker_options(args.workers))
    batch = normalise(torch.stack([loader.dataset[0][0]] * args.batch_size).to(device))

    @torch.inference_mode()
    def backbone() -> None:
        for start in range(0, args.images, args.batch_size):
            model(batch[:args.images - start])

    times = in_turn({"ours": lambda: extract(feature, loader, feature.dim, device), "backbone": backbone}, args.rounds,
                    device)
    rates = {f"{name}_images_per_second": args.images / seconds for name, seconds in times.items()}
    rates["share"] = times["backbone"] / times["ours"]
    if args.data_path:
        images = open_labelled(args.data_path, "--data_path")
        images = images.subset(list(range(min(args.images, len(images)))))
        jpegs = share_loader(images, args.batch_size, args.workers, device.type == "cuda")
        seconds = time_of(lambda: extract(feature, jpegs, feature.dim, device), device)
        rates["from_files_images_per_second"] = len(images) / seconds
    return rates


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser(description="speed of k-NN search and of feature extraction")
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--rows", type=int, default=100_000, help="of the bank; the plain product takes 4·queries·rows "
                                                                  "bytes")
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--k", type=int, default=200)
    parser.add_argument("--arch", choices=list(ARCHS), default="vit_small")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=0, help="that load images; on a CPU their time is not counted")
    parser.add_argument("--threads", type=int, default=1, help="of torch on a CPU")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--data_path", type=user_path, help="class folders of images to extract from files as well")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--json", type=user_path, help="file for the figures")
    parser.add_argument("--overwrite", action="store_true", help="replace that file")
    return parser


def main(args: argparse.Namespace) -> None:
    for name in ("queries", "rows", "width", "k", "images", "batch_size", "threads", "rounds"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} {getattr(args, name)}: give 1 or more")
    check_output(args.json, args.overwrite, "--json")
    args.k = min(args.k, args.rows)
    device = pick_device(args.device)
    if device.type == "cpu":
        keep_freed_memory()
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    found, extraction = measure_search(args, device), measure_extraction(args, device)
    print(f"search: {args.queries} queries in {args.rows} rows of {args.width}, k = {args.k}, {device}")
    print(format_table(["", "seconds"], [["ours", f"{found['ours']:.2f}"],
                                         ["one product and topk", f"{found['plain']:.2f}"]]))
    print(f"times as fast: {found['ratio']:.2f}; largest difference of a cosine {found['largest_difference']:.1e}")
    print(f"extraction: {args.arch}, {args.images} images in batches of {args.batch_size}")
    print(format_table(["", "images/s"], [[name.removesuffix("_images_per_second").replace("_", " "), f"{rate:.2f}"]
                                          for name, rate in extraction.items() if name != "share"]))
    print(f"share of the backbone's rate: {extraction['share']:.1%}")
    if args.json:
        write_json({"search": found, "extraction": extraction, "options": {
            name: value for name, value in vars(args).items() if isinstance(value, int | str)}}, args.json)


if __name__ == "__main__":
    run_main(main, get_args_parser())
