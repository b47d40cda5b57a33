"""What a training step asks of a GPU, counted on a machine without one: launches, products, waits, copies, memory.

    REHEARSE benchmarks/rehearse_gpu.py                                # ours beside the published order of work
    REHEARSE benchmarks/rehearse_gpu.py --compile on --no_plain        # Inductor's and Triton's launches; or a mode
    torchrun --nproc_per_node=2 REHEARSE benchmarks/rehearse_gpu.py --no_plain
    REHEARSE benchmarks/rehearse_gpu.py --fits                         # what fits which card

REHEARSE runs a program with a CUDA runtime that computes nothing and counts what it is asked, and gives the program the
module null_cuda with reset() and counts(). Memory is that of torch's own allocator. Numbers and speed are not known
from it: those are benchmarks/gpu.py's, on a GPU.
"""
import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections import Counter
from functools import cache
from pathlib import Path

import torch
from torch._dynamo.utils import counters

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P leaves it out
from published_order import PARTS
from train_step import Way

from selfpatch.distributed.precision import describe_precision
from selfpatch.distributed.processes import get_world_size, is_main_process, leave_processes
from selfpatch.errors import ArgumentParser, ConfigError, run_main
from selfpatch.method.vision_transformer import ARCHS, RECOMPUTED
from selfpatch.pretraining import engine
from selfpatch.pretraining.auto_options import COMPILE_WAYS, choose_precision, uses_cuda_graphs

GIB = 2**30
CARDS = (16, 24, 40, 80, 141)  # GB on the label of T4 and V100, 3090 and A10, A100, A100 and H100, H200
CONTEXT = 0.6  # GiB, assumed: what the driver, kernels and workspaces take of a card beside the tensors
RECIPE = 1024  # images of a step


def null_runtime():
    """The module that counts.

    Raises:
        ConfigError: the program does not run under it.
    """
    try:
        import null_cuda
    except ImportError:
        raise ConfigError("this command counts under a CUDA runtime that computes nothing, which gives it the module "
                          "null_cuda; on a GPU, run benchmarks/gpu.py") from None
    return null_cuda


@cache
def note_compiled_kernels() -> Counter:
    """The counter of the launches of the compiler's own kernels, and of the bytes that they read and write.

    The bytes are the compiler's count, of tensors that it has generated code for from here on. Its matrix products
    are counted apart, and not their bytes, as those of cuBLAS are not either.
    """
    import torch._inductor.config as config
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner
    config.benchmark_kernel = True  # notes the bytes with each kernel
    # for max-autotune: nothing can be timed here, so each product is the compiler's own, the first that it would try,
    # and no kernel is tried in variants
    CachingAutotuner.coordinate_descent_tuning = lambda self, launcher, *args, **kwargs: launcher
    config.max_autotune_gemm_backends = "TRITON"
    config.benchmark_epilogue_fusion = False
    config.test_configs.max_mm_configs = 1
    counted, launch = Counter(), CachingAutotuner.run

    def run(self, *args, **kwargs):
        counted["compiled_kernels"] += 1
        if "triton_tem_" in self.inductor_meta["kernel_name"]:
            counted["compiled_products"] += 1
        else:
            counted["compiled_gb"] += self.inductor_meta["kernel_num_gb"]
        return launch(self, *args, **kwargs)
    CachingAutotuner.run = run
    return counted


def check_capture() -> None:
    """Raise ConfigError if this runtime cannot record CUDA graphs."""
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            torch.zeros(1, device="cuda")
    except RuntimeError:
        raise ConfigError("this runtime does not record CUDA graphs: choose another --compile, or run "
                          "benchmarks/gpu.py on a GPU") from None


def make_way(args: argparse.Namespace, plain: list[str] | None = None, **changes) -> Way:
    return Way(argparse.Namespace(**vars(args) | {"device": "cuda"} | changes), plain)


def count_step(args: argparse.Namespace, plain: list[str] | None = None, **changes) -> dict[str, float]:
    """What one step asks for, after two in which memory and compiled code settle.

    Args:
        plain: as Way's; [] is the published order of work.
        changes: options that replace those of args.
    """
    torch.cuda.reset_peak_memory_stats()
    null, way = null_runtime(), make_way(args, plain, **changes)
    compiled = note_compiled_kernels() if way.compiled else Counter()
    for _ in range(2):
        take_step(way)
    null.reset()
    compiled.clear()
    if not way.run.cuda_graphs:  # graphs take their memory when they are recorded
        torch.cuda.reset_peak_memory_stats()
    take_step(way)
    counts = null.counts() | {"peak_gib": torch.cuda.max_memory_allocated() / GIB} | compiled
    counts["host_ms"] = statistics.median(host_ms(way) for _ in range(10))
    if way.compiled:
        counts |= {"graphs": counters["stats"]["unique_graphs"], "graph_breaks": sum(counters["graph_break"].values())}
    del way
    gc.collect()
    torch.cuda.empty_cache()
    return counts


def host_ms(way: Way) -> float:
    """What a step takes where the device takes no time: below it, a GPU would wait for the host."""
    start = time.perf_counter()
    take_step(way)
    return 1000 * (time.perf_counter() - start)


def take_step(way: Way) -> None:
    if way.plain:
        way.staged(lambda _: None)
    else:
        engine.train_step(way.run, [way.crops] * way.run.accum_steps)


ROWS = (("peak memory allocated, GiB", lambda c, n: f"{c['peak_gib']:.1f}"),
        ("launches, of kernels and CUDA graphs", lambda c, n: f"{c['kernels']:,}"),
        ("  of them matrix products of cuBLAS", lambda c, n: f"{c['products']:,}"),
        ("waits of the host for the device", lambda c, n: f"{c['waits']}"),
        ("ms of this host, the driver's work not counted", lambda c, n: f"{c['host_ms']:.1f}"),
        ("GFLOP an image in products", lambda c, n: f"{c['flops'] / n / 1e9:.1f}"),
        ("  of them in float32", lambda c, n: f"{c['flops_fp32'] / n / 1e9:.1f}"),
        ("memory that had to be asked of the driver, times", lambda c, n: f"{c['mallocs']}"),
        ("MB copied to the host, to the device",
         lambda c, n: f"{c['bytes_to_host'] / 1e6:.1f}, {c['bytes_to_device'] / 1e6:.1f}"),
        ("all-reduces", lambda c, n: f"{c['all_reduces']}"),
        ("  MB in them", lambda c, n: f"{c['all_reduced_bytes'] / 1e6:.1f}"))
COMPILED_ROWS = (("launches of kernels that the compiler made", lambda c, n: f"{c.get('compiled_kernels', 0):,}"),
                 ("  of them matrix products", lambda c, n: f"{c.get('compiled_products', 0):,}"),
                 ("  GB that the others read and write", lambda c, n: f"{c.get('compiled_gb', 0):.1f}"),
                 ("graphs, breaks in them", lambda c, n: f"{c.get('graphs', 0)}, {c.get('graph_breaks', 0)}"))


def show(results: dict[str, dict], images: int) -> None:
    """A table of counts; images of a step in this process."""
    print(f"{'a step':<50}" + "".join(f"{name:>18}" for name in results))
    rows = ROWS + (COMPILED_ROWS if "graphs" in results["ours"] else ())
    for label, text in rows:
        print(f"{label:<50}" + "".join(f"{text(counts, images):>18}" for counts in results.values()))


# ---------------------------------------------------------------- what fits which card

def memory_line(args: argparse.Namespace, **changes) -> tuple[float, float]:
    """Peak memory in GiB as a + b · images, from two batches."""
    small, large = (count_step(args, batch_size=size, **changes)["peak_gib"] for size in (16, 32))
    slope = (large - small) / 16
    return small - 16 * slope, slope


def largest_batch(fixed: float, slope: float, gigabytes: int) -> int:
    """Images that fit a card with so many GB, a multiple of 8 above 8 and at most the recipe's; 0 for none."""
    # a label of 16 to 141 GB is taken for GiB, of which 2 % are left for error correction and the driver
    images = int((gigabytes * 0.98 - CONTEXT - fixed) / slope)
    return min(images - images % 8 if images >= 8 else max(images, 0), RECIPE)


def fits(args: argparse.Namespace) -> list[dict]:
    """Rows of arch, patch size and checkpointing, with the largest batch for each card."""
    rows = []
    print("| arch, patch | checkpointing | " + " | ".join(f"{card} GB" for card in CARDS) + " |")
    print("|---" * (2 + len(CARDS)) + "|")
    for arch in ("vit_tiny", "vit_small", "vit_base"):
        for patch_size in (16, 8):
            for checkpointing in (False, True):
                fixed, slope = memory_line(args, arch=arch, patch_size=patch_size,
                                           checkpoint_activations="block" if checkpointing else "")
                batches = {card: largest_batch(fixed, slope, card) for card in CARDS}
                rows.append({"arch": arch, "patch_size": patch_size, "checkpoint_activations": checkpointing,
                             "fixed_gib": fixed, "gib_per_image": slope, "batches": batches})
                print(f"| {arch}/{patch_size} | {'yes' if checkpointing else 'no'} | "
                      + " | ".join(describe(batch) for batch in batches.values()) + " |", flush=True)
    return rows


def describe(batch: int) -> str:
    """The batch, and the small batches that make the recipe's step of it on one GPU."""
    if not batch:
        return "none"
    power = 2 ** (batch.bit_length() - 1)  # which divides the recipe's step
    return f"{batch} ({power} × {RECIPE // power})"


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--arch", default="vit_small", choices=list(ARCHS))
    parser.add_argument("--patch_size", default=16, type=int)
    parser.add_argument("--batch_size", default=128, type=int)
    parser.add_argument("--accum_steps", default=1, type=int)
    parser.add_argument("--local_crops_number", default=8, type=int)
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    parser.add_argument("--compile", default="off", choices=[way for way in COMPILE_WAYS if way != "auto"])
    parser.add_argument("--pack_crops", default="auto", choices=["auto", "on", "off"])
    parser.add_argument("--checkpoint_activations", default="", nargs="?", const="block", choices=RECOMPUTED)
    parser.add_argument("--no_plain", action="store_true", help="leave out the published order of work")
    parser.add_argument("--fits", action="store_true", help="the largest batch by arch, patch size and card instead")
    parser.add_argument("--json", type=os.path.expanduser, help="also write the figures to this file")
    args = parser.parse_args()
    null_runtime()
    if uses_cuda_graphs(args.compile):
        check_capture()
    device = torch.device("cuda")
    precision = describe_precision(device, choose_precision(args.precision, True, device))
    if args.fits:
        print(f"in {precision} on compute capability {'.'.join(map(str, torch.cuda.get_device_capability()))}\n")
        results = fits(args)
    else:
        results = {"ours": count_step(args)}
        if not args.no_plain:
            results["published order"] = count_step(args, plain=list(PARTS))
    if is_main_process():
        if not args.fits:
            print(f"{args.arch}/{args.patch_size}, {args.batch_size} × {args.accum_steps} images, {precision}, "
                  f"compile {args.compile}, {get_world_size()} process(es), torch {torch.__version__}")
            show(results, args.batch_size * args.accum_steps)
        if args.json:
            Path(args.json).write_text(json.dumps({"options": vars(args), "torch": torch.__version__,
                                                   "results": results}, indent=1))
    leave_processes()


if __name__ == "__main__":
    run_main(main)
