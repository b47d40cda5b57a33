"""Private memory of a data worker over 2,000 images of a list of 1.28 million, as tuples and as packed names.

    python benchmarks/worker_memory.py

The list is made: each name leads to one of the few JPEGs that are written here, so that reading is real. What is
measured is the private memory (USS, /proc/PID/smaps_rollup, Linux) of a process forked from one that holds the list,
before it reads and after, images being drawn at random as in training. Neither way counts what the other does: each is
measured in a process of its own.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P leaves it out
from pictures import make_images

from selfpatch.data.augmentations import RandomCrops
from selfpatch.data.files import load_uint8, read_bytes
from selfpatch.data.names import NamedImages

FILES = 16


def private_mib() -> float:
    """Memory of this process that it shares with no other, in MiB."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def make_names(count: int) -> list[str]:
    """Names as long as ImageNet's, 1,000 folders."""
    return [f"n{i // 1281:08}/n{i // 1281:08}_{i:07}.JPEG" for i in range(count)]


def in_a_worker(read, count: int, images: int) -> list[float]:
    """Private MiB of a forked process, before it reads and crops that many images of the list, and after."""
    receiver, sender = os.pipe()
    if not (child := os.fork()):
        crop, order = RandomCrops((0.25, 1.0), (0.05, 0.25), 8), torch.randint(count, (images,)).tolist()
        crop(read(order[0]))  # what decoding and cropping need themselves
        before = private_mib()
        for index in order:
            crop(read(index))
        os.write(sender, json.dumps([before, private_mib()]).encode())
        os._exit(0)
    os.waitpid(child, 0)
    return json.loads(os.read(receiver, 1000))


def measure(way: str, folder: str, count: int, images: int) -> list[float]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    names = make_names(count)
    if way == "tuples":
        samples = [(f"{folder}/{name}", i // 1281) for i, name in enumerate(names)]

        def read(index: int) -> torch.Tensor:
            path, _ = samples[index]
            return load_uint8(path, read_bytes(f"{folder}/made/{index % FILES:03}.jpg"))
    else:
        packed = NamedImages(folder, names)

        def read(index: int) -> torch.Tensor:
            return load_uint8(packed.location(index), read_bytes(f"{folder}/made/{index % FILES:03}.jpg"))
    del names
    return in_a_worker(read, count, images)


def main(args: argparse.Namespace) -> None:
    if args.way:
        print(json.dumps(measure(args.way, args.folder, args.names, args.images)))
        return
    with tempfile.TemporaryDirectory() as folder:
        make_images(Path(folder), FILES)
        print(f"private MiB of a worker, {args.names:,} names, before and after {args.images:,} images")
        for way in ("tuples", "packed"):
            words = [sys.executable, __file__, "--way", way, "--folder", folder, "--names", str(args.names),
                     "--images", str(args.images)]
            rounds = [json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
                      for _ in range(args.rounds)]
            print(f"{way:<8}" + "   ".join(f"{before:7.1f} -> {after:7.1f} (+{after - before:.1f})"
                                           for before, after in rounds))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Private memory of a data worker, by how the names are kept")
    parser.add_argument("--names", type=int, default=1_281_167)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--way", choices=["tuples", "packed"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    main(parser.parse_args())
