"""The demo for several seeds: every figure before and after, each on scenes of its own that were not trained on.

    python benchmarks/demo_seeds.py                     # seeds 0, 1 and 2 in runs/demo_seeds, one after the other

Exit status 1 if a figure of a seed is not better after training. Options that it does not know are demo.py's.
"""
import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from selfpatch.errors import ArgumentParser, run_main, user_path  # noqa: E402
from selfpatch.evaluation.tables import format_table  # noqa: E402


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser(description="The demo for several seeds, before and after")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output_dir", type=user_path, default=Path("runs/demo_seeds"), help="a folder for each seed")
    return parser


def cpu_seconds() -> float:
    """User and system time of the processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def compare(before: dict[str, float], after: dict[str, float]) -> list[str]:
    return [f"{before[name]:.3f} -> {after[name]:.3f}" for name in after]


def main(args: argparse.Namespace, others: list[str]) -> int:
    """Exit status: that of a demo that failed, else 1 if a figure is not better, else 0."""
    rows, worse, names = [], [], []
    for seed in args.seeds:
        folder, start = args.output_dir / f"seed{seed}", cpu_seconds()
        command = [sys.executable, str(ROOT / "demo.py"), "--output_dir", str(folder), "--seed", str(seed), *others]
        if status := subprocess.run(command).returncode:
            return status
        figures = json.loads((folder / "figures.json").read_text())
        before, after = figures["before"], figures["after"]
        names = list(after)
        worse += [f"seed {seed}, {name}" for name in after if after[name] <= before[name]]
        rows.append([str(seed), *compare(before, after), f"{cpu_seconds() - start:.0f}"])
    print(f"\nbefore -> after, of {len(rows)} seeds")
    print(format_table(["seed", *names, "CPU s"], rows))
    print(f"not better: {'; '.join(worse)}" if worse else "all figures of all seeds are better after training")
    return int(bool(worse))


if __name__ == "__main__":
    run_main(main, *get_args_parser().parse_known_args())
