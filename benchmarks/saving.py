"""What keeping a run safe costs: a save, the check of a checkpoint's checksums, and the exchange after each step.

    python benchmarks/saving.py --arch vit_small --output_dir /path/to/the/disk
"""
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from selfpatch.checkpoints.files import check_sums, read_checkpoint
from selfpatch.distributed.stopping import Interruption
from selfpatch.errors import ArgumentParser, run_main, user_path
from selfpatch.method.fused_loss import FusedDINOLoss
from selfpatch.method.optim import build_optimizer
from selfpatch.method.training_run import TrainingRun, build_networks, build_schedules
from selfpatch.method.vision_transformer import ARCHS
from selfpatch.pretraining.run_folder import RunFolder

MINUTES = 15  # --save_every_minutes


def build_run(arch: str) -> TrainingRun:
    """A run with the published heads whose optimiser has its moments."""
    student, teacher = build_networks(arch)
    run = TrainingRun(student, teacher, FusedDINOLoss(65536, 4096, 10), build_optimizer(student),
                      build_schedules(100, 1000))
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    run.set_rates()
    run.optimizer.step()
    return run


def seconds(function, *args) -> float:
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--arch", default="vit_small", choices=list(ARCHS))
    parser.add_argument("--output_dir", default=tempfile.gettempdir(), type=user_path, help="where to write and remove")
    parser.add_argument("--repeats", default=5, type=int)
    args = parser.parse_args()
    run, path = build_run(args.arch), Path(tempfile.mkdtemp(dir=args.output_dir))
    try:
        folder = RunFolder(path)
        times = sorted(seconds(folder.save, run.state_dict()) for _ in range(args.repeats))
        size = folder.last.stat().st_size / 1e6
        print(f"save, {args.arch}: {times[0]:.2f} to {times[-1]:.2f} s, {size:.0f} MB: at most "
              f"{100 * times[-1] / (60 * MINUTES):.2f} % of {MINUTES} minutes")
        print(f"checksums: {seconds(check_sums, folder.last):.2f} s; "
              f"reading with them: {seconds(read_checkpoint, folder.last):.2f} s")
        with Interruption(MINUTES) as interruption:
            print(f"after a step, one process: {seconds(interruption.agree) * 1e6:.0f} µs")
    finally:
        shutil.rmtree(path)


if __name__ == "__main__":
    run_main(main)
