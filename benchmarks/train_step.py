"""Speed of one training step on synthetic crops: images/s, ms per stage, peak memory, model-FLOPs utilisation.

    python benchmarks/train_step.py --plain                                # beside the published order of work
    python benchmarks/train_step.py --plain loss --json loss.json          # ours with one part in the published order
    python benchmarks/train_step.py --batch_size 128 --device cuda --plain

Each way runs in its own process, so that peak memory is its own, and the two take turns, step by step, so that other
load affects both. Warm-up steps (compilation, clocks, caches) are not timed. Utilisation is model FLOPs (multiply and
add counted as two, nothing for recomputation) over the rate of a large matrix product, measured in the same process.
"""
import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P leaves it out
from published_order import PARTS, PlainBackbone, PlainHead, PlainLoss, fused_update, plain_update

import main_selfpatch as job
from selfpatch.distributed.precision import autocast
from selfpatch.distributed.processes import init_distributed_mode, keep_freed_memory, peak_memory_gb, pick_device
from selfpatch.errors import ArgumentParser, TrainingError, run_main
from selfpatch.method.fused_loss import FusedDINOLoss
from selfpatch.method.optim import get_params_groups
from selfpatch.method.training_run import build_networks
from selfpatch.method.vision_transformer import ARCHS, RECOMPUTED
from selfpatch.pretraining import engine
from selfpatch.pretraining.auto_options import COMPILE_WAYS
from selfpatch.pretraining.flops import flops_per_image
from selfpatch.pretraining.options import get_args_parser as pretraining_options

GLOBAL, LOCAL = 224, 96


# ---------------------------------------------------------------- a way to step

class Way:
    """The job's training run on synthetic crops, with the parts named in `plain` in the published order of work.

    Args:
        plain: None for the job's own step, [] for all parts as published, or some of PARTS.
    """

    def __init__(self, args: argparse.Namespace, plain: list[str] | None):
        self.plain = PARTS if plain == [] else plain or ()
        options = self.options(args, as_published=plain == [])
        if not self.plain and args.device != "cuda":
            keep_freed_memory()
        processes = init_distributed_mode(options.device)
        self.device, self.compiled = processes.device, job.choose_compile(options.compile, processes.device)
        torch.manual_seed(0)
        dtype = job.choose_precision(options.precision, options.use_fp16, self.device)
        self.run = job.build_run(options, processes, 1000, dtype, self.compiled,
                                 PlainLoss if "loss" in self.plain else FusedDINOLoss)
        for model in (self.run.student, self.run.teacher):
            if "backbone" in self.plain:  # attention weights formed whole, dropped samples computed
                for block in model.backbone.blocks:
                    block.attn.fused_attn = False
                model.backbone.__class__ = PlainBackbone
            if "head" in self.plain:
                model.ca_head.__class__ = PlainHead
        if "update" in self.plain:
            self.run.optimizer = torch.optim.AdamW(get_params_groups(self.run.student))
        self.update = plain_update if "update" in self.plain else fused_update
        torch.manual_seed(1)
        self.crops = [torch.randn(args.batch_size, 3, size, size, device=self.device)
                      for size in [GLOBAL] * 2 + [LOCAL] * options.local_crops_number]

    def options(self, args: argparse.Namespace, as_published: bool) -> argparse.Namespace:
        """The job's options; as published: not compiled, in float16 on a GPU."""
        options = pretraining_options().parse_args([
            "--arch", args.arch, "--patch_size", str(args.patch_size), "--batch_size_per_gpu", str(args.batch_size),
            "--local_crops_number", str(args.local_crops_number), "--precision", args.precision,
            "--compile", args.compile, "--device", args.device, "--freeze_last_layer", "0",
            "--accum_steps", str(getattr(args, "accum_steps", 1))])
        options.pack_crops = "off" if "backbone" in self.plain else getattr(args, "pack_crops", "auto")
        options.checkpoint_activations = "" if self.plain else args.checkpoint_activations
        if as_published:
            options.compile = "off"
            on_gpu = pick_device(args.device).type == "cuda"
            options.precision = "fp32" if not on_gpu else "fp16" if args.precision == "auto" else args.precision
        return options

    def wait(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def step(self) -> float:
        """Seconds of a whole step, the job's own unless a part is as published. On a GPU the mean of five steps,
        since training does not wait between them either."""
        steps = 5 if self.device.type == "cuda" else 1
        start = self.wait()
        for _ in range(steps):
            if self.plain:
                self.staged(lambda _: None)
            else:
                engine.train_step(self.run, [self.crops])
        return (self.wait() - start) / steps

    def reset_peak(self) -> None:
        """Start measuring peak memory from here, where that is possible: on a GPU."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def staged(self, mark) -> float:
        """The step in pieces, mark(name) being called after each; the loss."""
        run = self.run
        run.begin_step()
        with autocast(self.device, run.dtype):
            with torch.no_grad():
                targets = run.dino_loss.targets(run.teacher, self.crops)
            mark("teacher")
            output = run.student(self.crops)
            mark("student")
            loss = run.dino_loss(output, targets, 0).total
        run.dino_loss.update_centers([run.dino_loss.batch_means(targets)])
        mark("loss")
        run.scaler.scale(loss).backward()
        mark("backward")
        run.scaler.unscale_(run.optimizer)
        self.update(run)
        mark("update")
        run.step += 1
        return loss

    def first_loss(self) -> float:
        """The loss of a first step that all ways take, on the same crops and random draws."""
        torch.manual_seed(1)
        return self.staged(lambda _: None).item()

    def stages(self) -> dict[str, float]:
        """Seconds by stage, waiting for the device after each."""
        seconds, last = {}, self.wait()

        def mark(name):
            nonlocal last
            now = self.wait()
            seconds[name], last = now - last, now
        self.staged(mark)
        return seconds

    def matrix_rate(self) -> float:
        """FLOP/s of a large product in this way's precision: the best of several."""
        n, repeats = (8192, 10) if self.device.type == "cuda" else (2048, 1)
        a, b = (torch.randn(n, n, device=self.device, dtype=self.run.dtype) for _ in range(2))
        best = float("inf")
        for _ in range(6):
            start = self.wait()
            for _ in range(repeats):
                a @ b
            best = min(best, (self.wait() - start) / repeats)
        return 2 * n ** 3 / best

    def peak_memory(self) -> float:
        return peak_memory_gb(self.device)

    def describe(self) -> str:
        return (f"{self.device.type} in {str(self.run.dtype).removeprefix('torch.')}"
                f"{', compiled' if self.compiled else ''}"
                f"{', as published: ' + ', '.join(self.plain) if self.plain else ''}")


# ---------------------------------------------------------------- processes that take turns

def serve(pipe, args: argparse.Namespace, plain: list[str] | None) -> None:
    """A way in a process of its own, which runs the methods whose names arrive."""
    way = Way(args, plain)
    while order := pipe.recv():
        pipe.send(getattr(way, order)())


def start(args: argparse.Namespace, plain: list[str] | None):
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    process = context.Process(target=serve, args=(other, args, plain), daemon=True)
    process.start()
    other.close()

    def ask(order):
        """Result of the method of that name; an empty name ends the process."""
        try:
            pipe.send(order)
            return pipe.recv() if order else process.join()
        except (EOFError, ConnectionError):  # a process that is killed resets the connection
            process.join(10)
            raise TrainingError(f"a way's process has ended with status {process.exitcode}; see its error above, if "
                                "it could write one") from None
    return ask


def measure(args: argparse.Namespace) -> dict[str, dict]:
    ways = {"ours": start(args, None)}
    if args.plain is not None:
        ways["plain"] = start(args, args.plain)
    seconds, results = {name: [] for name in ways}, {}
    for name, ask in ways.items():
        results[name] = {"way": ask("describe"), "first_loss": ask("first_loss")}
        print(f"{name}: {results[name]['way']}; loss of the first step {results[name]['first_loss']:.5f}", flush=True)
        for _ in range(args.warmup):
            ask("step")
        ask("reset_peak")
    for _ in range(args.steps):
        for name, ask in ways.items():
            time.sleep(0.3)  # the other way's threads spin for a while after their work
            seconds[name].append(ask("step"))
    with torch.device("meta"):
        network, _ = build_networks(args.arch, args.patch_size)
    flops = flops_per_image(network, [GLOBAL] * 2 + [LOCAL] * args.local_crops_number)
    for name, ask in ways.items():
        memory, median = ask("peak_memory"), statistics.median(seconds[name])
        rate = ask("matrix_rate")
        results[name] |= {
            "images_per_second": args.batch_size / median, "seconds": median,
            "spread": statistics.pstdev(seconds[name]), "peak_gib": memory, "matrix_tflops": rate / 1e12,
            "gflop_per_image": flops / 1e9, "utilisation": flops * args.batch_size / median / rate,
            "stages": {stage: 1000 * s for stage, s in ask("stages").items()}}
        ask("")
    return results


def show(results: dict[str, dict]) -> None:
    print(f"{'':<22}" + "".join(f"{name:>12}" for name in results))
    for label, key, form in (("images/s", "images_per_second", ".2f"), ("seconds per step", "seconds", ".3f"),
                             ("  spread", "spread", ".3f"), ("peak memory, GiB", "peak_gib", ".2f"),
                             ("matrix rate, TFLOP/s", "matrix_tflops", ".2f"), ("utilisation", "utilisation", ".1%")):
        print(f"{label:<22}" + "".join(f"{format(result[key], form):>12}" for result in results.values()))
    for stage in results["ours"]["stages"]:
        print(f"{'ms, ' + stage:<22}" + "".join(f"{result['stages'][stage]:12.0f}" for result in results.values()))
    if "plain" in results:
        ours, plain = results["ours"], results["plain"]
        print(f"ours is {plain['seconds'] / ours['seconds']:.2f} times as fast, "
              f"with {ours['peak_gib'] / plain['peak_gib']:.0%} of the peak memory")


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--arch", default="vit_small", choices=list(ARCHS))
    parser.add_argument("--patch_size", default=16, type=int)
    parser.add_argument("--batch_size", default=4, type=int)
    parser.add_argument("--local_crops_number", default=8, type=int)
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "cpu"])
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    parser.add_argument("--compile", default="auto", choices=COMPILE_WAYS)
    parser.add_argument("--pack_crops", default="auto", choices=["auto", "on", "off"])
    parser.add_argument("--checkpoint_activations", default="", nargs="?", const="block", choices=RECOMPUTED)
    parser.add_argument("--plain", nargs="*", choices=PARTS,
                        help="also time the published order of work: all of it (on a GPU in float16, not compiled), or "
                             "the given parts")
    parser.add_argument("--warmup", default=2, type=int, help="steps before the first timed one")
    parser.add_argument("--steps", default=8, type=int)
    parser.add_argument("--json", type=os.path.expanduser, help="also write the figures to this file")
    args = parser.parse_args()
    print(f"{args.arch}/{args.patch_size}, {args.batch_size} images, 2×{GLOBAL} + {args.local_crops_number}×{LOCAL}, "
          f"heads 65536/4096, torch {torch.__version__}, {torch.get_num_threads()} threads, "
          f"load {os.getloadavg()[0]:.1f}")
    results = measure(args)
    show(results)
    if args.json:
        Path(args.json).write_text(json.dumps({"options": vars(args), "torch": torch.__version__, **results}, indent=1))


if __name__ == "__main__":
    run_main(main)
