"""All figures that need a GPU in one command: the step, its parts, the data path, training from JPEGs, DAVIS.

    python benchmarks/gpu.py --output gpu_figures                     # all of it, with several compilations
    python benchmarks/gpu.py --output gpu_figures --only step jpegs   # some of it
    python benchmarks/gpu.py --output gpu_figures --data_path /path/to/imagenet/train

Each part is a command that can be run by itself; it is printed, and its output goes to <output>/<part>.txt. The table
at the end compares the figures with their targets. Without --data_path the JPEGs are made here.
"""
import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P leaves it out
from pictures import make_images
from train_step import PARTS as ORDERS

from selfpatch.errors import ArgumentParser, ConfigError, TrainingError, run_main, user_path

ROOT = Path(__file__).resolve().parents[1]
VARIANTS = {"no_compile": ["--compile", "off"], "not_packed": ["--pack_crops", "off"],
            "checkpointed": ["--checkpoint_activations"], "checkpointed_mlp": ["--checkpoint_activations", "mlp"],
            "small_batch": ["--batch_size", "32"]}
# to be compared with step, and with small_batch
MODES = {"max_autotune": ["--compile", "max-autotune-no-cudagraphs"],
         "small_batch_graphs": ["--batch_size", "32", "--compile", "reduce-overhead"]}
PARTS = ("tests", "step", *ORDERS, *VARIANTS, *MODES, "data", "jpegs", "davis", "davis_patch8")


def commands(args: argparse.Namespace, images: Path) -> dict[str, list[str]]:
    """The command of each part, without the python before it."""
    size = ["--arch", args.arch, "--batch_size", args.batch_size]
    step = ["benchmarks/train_step.py", "--device", "cuda", *size, "--compile", args.compile, "--warmup",
            str(min(5, args.steps)), "--steps", str(args.steps)]
    davis = ["benchmarks/davis.py", "--device", "cuda", "--precision", "bf16", "--arch", args.arch, "--frames", "50",
             "--no_plain"]
    jobs = {"step": [*step, "--plain"],
            **{part: [*step, "--plain", part] for part in ORDERS},
            **{part: [*step, *words] for part, words in (VARIANTS | MODES).items()}}
    jobs = {name: [*words, "--json", str(args.output / f"{name}.json")] for name, words in jobs.items()}
    return jobs | {
        "tests": ["-m", "pytest", "tests/method", "tests/pretraining/test_engine.py",
                  "tests/data/test_device_augmentations.py", "tests/data/test_data.py"],
        "data": ["benchmarks/data.py", "--device", "cuda", "--workers", args.workers, "--batch_size", args.batch_size,
                 "--compile", args.compile, "--images", "256", "--data_path", str(images), "--json",
                 str(args.output / "data.json")],
        "jpegs": ["main_selfpatch.py", "--device", "cuda", "--arch", args.arch, "--data_path", str(images),
                  "--output_dir", str(args.output / "run"), "--batch_size_per_gpu", args.batch_size, "--num_workers",
                  args.workers, "--epochs", "2", "--warmup_epochs", "0", "--log_every", "10", "--compile",
                  args.compile],
        "davis": davis, "davis_patch8": [*davis, "--patch_size", "8"]}


def many_images(folder: Path, count: int) -> None:
    """A folder of count JPEGs, most of them links to a few: decoding them is the same work."""
    folder.mkdir()
    make_images(folder, 512)
    made = sorted((folder / "made").iterdir())
    for i in range(len(made), count):
        os.link(made[i % len(made)], folder / "made" / f"{i:05}.jpg")


def run(name: str, words: list[str], output: Path) -> bool:
    """Run one part, showing its output and writing it to a file; whether it succeeded."""
    print(f"\n== {name}: python {' '.join(words)}", flush=True)
    with open(output / f"{name}.txt", "w") as kept:
        process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, text=True)
        for line in process.stdout:
            print(line, end="", flush=True)
            kept.write(line)
    return process.wait() == 0


def read(output: Path, name: str) -> dict:
    path = output / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def jpeg_rate(output: Path) -> float:
    """Images/s of training from JPEGs: median over the second epoch, when all is compiled, without its first 40 steps,
    whose batches the workers had prefetched."""
    path = output / "jpegs.txt"
    rates = re.findall(r"^epoch 1/.* ([\d.]+) images/s", path.read_text(), re.MULTILINE) if path.is_file() else []
    return statistics.median(map(float, rates[4:])) if len(rates) > 4 else float("nan")


def table(output: Path) -> None:
    """Print the figures of all parts that have been run, now or earlier."""
    step = read(output, "step")
    ours, plain = step.get("ours"), step.get("plain")
    if ours and plain:
        print(f"\n{'':<44}{'measured':>10}{'target':>10}")
        rows = [("images/s", f"{ours['images_per_second']:.0f}", ""),
                ("model-FLOPs utilisation", f"{ours['utilisation']:.1%}", "45 %"),
                ("speed-up over the published order of work", f"{plain['seconds'] / ours['seconds']:.2f}", "3"),
                ("share of its peak memory", f"{ours['peak_gib'] / plain['peak_gib']:.0%}", "60 %"),
                ("from JPEGs, share of the synthetic rate", f"{jpeg_rate(output) / ours['images_per_second']:.0%}",
                 "90 %")]
        for row in rows:
            print(f"{row[0]:<44}{row[1]:>10}{row[2]:>10}")
    for name, asked in (("davis", "3 s"), ("davis_patch8", "20 GiB")):
        said = (output / f"{name}.txt").read_text() if (output / f"{name}.txt").is_file() else ""
        figures = re.findall(r"^end to end: ([\d.]+ s)|^peak GPU memory: ([\d.]+ GiB)", said, re.MULTILINE)
        if len(figures) == 2:
            print(f"{name + ', 50 frames':<44}{figures[0][0]:>10}{figures[1][1]:>10}  (target: under {asked})")
    for name in (*ORDERS, *VARIANTS, *MODES):
        result = read(output, name)
        if result:
            one = result.get("plain", result["ours"])
            print(f"{name + (' as published' if 'plain' in result else ''):<44}{one['images_per_second']:>10.0f} "
                  f"images/s {one['peak_gib']:8.1f} GiB")


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True, type=user_path, help="folder for the output of all parts")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--arch", default="vit_small")
    parser.add_argument("--batch_size", default="128")
    parser.add_argument("--workers", default="16")
    parser.add_argument("--steps", default=20, type=int, help="timed ones, of each way to take a step")
    parser.add_argument("--compile", default="auto", choices=["auto", "on", "off"])
    parser.add_argument("--data_path", type=user_path, help="folder of class folders of images")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise ConfigError("torch sees no CUDA GPU here: benchmarks/train_step.py, data.py and davis.py measure CPUs")
    args.output = args.output.resolve()
    args.output.mkdir(parents=True, exist_ok=True)
    if "jpegs" in args.only and (args.output / "run").exists():
        raise ConfigError(f"{args.output / 'run'} exists, and training would resume from it: give another --output")
    with tempfile.TemporaryDirectory() as folder:
        images = args.data_path and args.data_path.resolve()
        if not images and {"data", "jpegs"} & set(args.only):
            images = Path(folder) / "images"
            many_images(images, 200 * int(args.batch_size))
        jobs = commands(args, images)
        failed = [name for name in args.only if not run(name, jobs[name], args.output)]
    table(args.output)
    if failed:
        raise TrainingError(f"failed: {', '.join(failed)}; their output is in {args.output}")


if __name__ == "__main__":
    run_main(main)
