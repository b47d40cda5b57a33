"""Images per second and core, for each way from a file to crops: 2 global ones of 224² and 8 local ones of 96².

    python benchmarks/data.py                                           # on JPEGs of 500×375 made here, one thread
    python benchmarks/data.py --data_path /path/to/imagenet/train --json data.json
    python benchmarks/data.py --device cuda --workers 16 --data_path /path/to/imagenet/train

`pil` is all of --augment pil. `decode and crop` is what --augment device does in the workers, `photometric` what it
does on the device (on a CPU in one thread), `device, whole` the sum of the two where one core does both. CPU times are
process times, which other programs affect little; GPU times are wall-clock. Each round runs every way once, so that
other load affects all of them; the first round is a warm-up and not counted. The decoders that are installed
(torchcodec, torchvision, and PIL always) are compared on the same files, decoding alone. With --workers, also images
per second (wall-clock) of the loader that training uses.
"""
import argparse
import io
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P leaves it out
from pictures import make_images

from selfpatch.data.augmentations import DataAugmentationDINO, DeviceAugmentation, RandomCrops
from selfpatch.data.dataset import build_dataset
from selfpatch.data.files import installed_decoders, is_image_name, load_rgb, load_uint8, read_bytes, walk
from selfpatch.data.loader import CropLoader
from selfpatch.distributed.processes import (
    Process,
    pick_device,
)
from selfpatch.errors import ConfigError, run_main


def find_images(folder: Path, count: int) -> list[str]:
    """A sample of count images from the folder and its subfolders, drawn with a fixed seed."""
    paths = sorted(filter(is_image_name, walk(folder)))
    if not paths:
        raise ConfigError(f"--data_path {folder} has no images in it: give a folder of images")
    return random.Random(0).sample(paths, min(count, len(paths)))


def is_compiled(args: argparse.Namespace, device: torch.device) -> bool:
    """Whether the photometric part is; by itself only on a GPU."""
    return device.type == "cuda" if args.compile == "auto" else args.compile == "on"


# ---------------------------------------------------------------- ways from a file to crops, on one core

def time_of(function, device: torch.device) -> float:
    """CPU seconds that function takes, or wall-clock seconds until a GPU has finished it."""
    if device.type != "cuda":
        start = time.process_time()
        function()
        return time.process_time() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure(paths: list[str], device: torch.device, rounds: int, batch_size: int,
            compiled: bool) -> dict[str, list[float]]:
    """Milliseconds per image of each way, one value per round."""
    sizes = ((0.25, 1.0), (0.05, 0.25), 8)
    pil, crop = DataAugmentationDINO(*sizes), RandomCrops(*sizes)
    photometric = DeviceAugmentation(8).to(device)
    if compiled:
        photometric.fuse()
    samples = [crop(load_uint8(path)) for path in paths[:batch_size]]
    batch = [torch.stack(kind).to(device) for kind in zip(*samples, strict=True)]

    # name: (what to run, how many images that is, where)
    cpu, passes = torch.device("cpu"), 1 if device.type == "cpu" else 20
    ways = {"pil": (lambda: [pil(load_rgb(path)) for path in paths], len(paths), cpu),
            "decode and crop": (lambda: [crop(load_uint8(path)) for path in paths], len(paths), cpu),
            "photometric": (lambda: [photometric(batch) for _ in range(passes)], passes * len(samples), device)}
    times = {name: [] for name in ways}
    for turn in tqdm(range(rounds + 1), "rounds", leave=False):
        for name, (function, images, where) in ways.items():
            seconds = time_of(function, where)
            if turn:
                times[name].append(1000 * seconds / images)
    if device.type == "cpu":
        times["device, whole"] = [sum(pair) for pair in
                                  zip(times["decode and crop"], times["photometric"], strict=True)]
    return times


def decoders(paths: list[str], rounds: int) -> dict[str, list[float]]:
    """Milliseconds per image of each decoder, one value per round, the files being in memory; PIL's includes a tensor.

    JPEGs of other modes than RGB are left out: load_uint8 gives them to PIL.
    """
    native = installed_decoders()
    files = [data for data in map(read_bytes, paths)
             if data.startswith(b"\xff\xd8") and Image.open(io.BytesIO(data)).mode == "RGB"]
    if not files:
        return {}
    ways = native | {"pil": lambda data: pil_to_tensor(load_rgb("", data))}
    times = {f"decoding: {name}": [] for name in ways}
    for turn in tqdm(range(rounds + 1), "decoders", leave=False):
        for name, decode in ways.items():
            seconds = time_of(lambda decode=decode: [decode(data) for data in files], torch.device("cpu"))
            if turn:
                times[f"decoding: {name}"].append(1000 * seconds / len(files))
    return times


# ---------------------------------------------------------------- the loader that training uses

def loader_rates(folder: Path, args: argparse.Namespace, device: torch.device) -> dict[str, list[float]]:
    """Images per second of --augment pil and device, one value per round; a third of the batches are a warm-up."""
    loaders = {}
    for augment in ("pil", "device"):
        loaders[f"{augment}, {args.workers} workers"] = loader = CropLoader(
            build_dataset(folder, augment=augment), args.batch_size, args.workers, Process(device=device))
        if is_compiled(args, device):
            loader.compile()
    rates = {name: [] for name in loaders}
    for _ in tqdm(range(args.rounds), "loaders", leave=False):
        for name, loader in loaders.items():
            batches = max(min(len(loader), 6 * args.workers), 3)
            start = None
            for number, _ in enumerate(loader):
                if number == batches // 3:
                    start = read_clock(device)
                if number == batches - 1:
                    break
            if start is None or number == batches // 3:
                raise ConfigError(f"--data_path {folder} has {len(loader.dataset)} images, under 3 batches: "
                                  "lower --batch_size")
            rates[name].append((number - batches // 3) * args.batch_size / (read_clock(device) - start))
    return rates


def read_clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# ---------------------------------------------------------------- the table

def mean_and_spread(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.mean(values), "spread": statistics.stdev(values) if len(values) > 1 else 0.0}


def print_table(results: dict) -> None:
    print("                            ms an image           images/s")
    for name, row in results["ms_per_image"].items():
        print(f"{name:<23}  {row['mean']:8.2f} ± {row['spread']:<6.2f}  {1000 / row['mean']:12.1f}")
    for name, row in results.get("loader_images_per_second", {}).items():
        print(f"{name:<39}  {row['mean']:12.1f} ± {row['spread']:.1f}")
    print(f"decode and crop: {results['crop_speedup']:.1f} times pil's images/s of a core")


def main(args: argparse.Namespace) -> None:
    device = pick_device(args.device)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(args.data_path or made)
        if not args.data_path:
            make_images(folder)
        paths = find_images(folder, args.images)
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        print(f"{len(paths)} images of {args.data_path or 'this script'}, photometric part on {where}, {args.rounds} "
              f"rounds, torch {torch.__version__}, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
        times = measure(paths, device, args.rounds, args.batch_size, is_compiled(args, device))
        times |= decoders(paths, args.rounds)
        results = {"device": where, "torch": torch.__version__, "images": len(paths), "rounds": args.rounds,
                   "ms_per_image": {name: mean_and_spread(values) for name, values in times.items()},
                   # pairs of the same round, which had the same other load
                   "crop_speedup": statistics.median(a / b for a, b in zip(times["pil"], times["decode and crop"],
                                                                           strict=True))}
        if args.workers:
            results["loader_images_per_second"] = {name: mean_and_spread(values) for name, values
                                                   in loader_rates(folder, args, device).items()}
    print_table(results)
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Images per second and core, for each way from a file to crops")
    parser.add_argument("--data_path", type=os.path.expanduser,
                        help="folder of class folders of images; made here if not given")
    parser.add_argument("--images", type=int, default=64, help="number of images to use")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=16, help="of the photometric part and of the loaders")
    parser.add_argument("--workers", type=int, default=0, help="also time the loader with this many workers")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    parser.add_argument("--compile", default="auto", choices=["auto", "on", "off"], help="of the photometric part")
    parser.add_argument("--json", type=os.path.expanduser, metavar="FILE", help="also write the figures to this file")
    run_main(main, parser)
