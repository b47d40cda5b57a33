"""Pretrain on a Slurm cluster through submitit (pip install submitit), with main_selfpatch.py's own options.

    python run_with_submitit.py --nodes 2 --ngpus 8 --partition gpu --arch vit_small --data_path imagenet/train \
        --output_dir /shared/runs/one

When its time is up the job saves, is requeued, and continues at the next step.
"""
import argparse
import os
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P leaves it out
import main_selfpatch
from selfpatch.checkpoints.published import is_remote
from selfpatch.data.sources import absolute, as_list
from selfpatch.errors import ArgumentParser, require_packages, run_main


def get_args() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, parents=[main_selfpatch.get_args_parser()],
                                  formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    group = parser.add_argument_group("Slurm")
    group.add_argument("--ngpus", default=8, type=int, help="GPUs per node, one process each; 0: one CPU process")
    group.add_argument("--nodes", default=2, type=int, help="number of nodes; submitit's local executor uses one")
    group.add_argument("--timeout", default=2800, type=int, help="minutes after which the job is requeued")
    group.add_argument("--partition", default="learnfair", help="Slurm's partition")
    group.add_argument("--mem_gb_per_gpu", default=40, type=int, help="memory of a node per GPU, in GB")
    group.add_argument("--use_volta32", action="store_true", help="ask for V100s with 32 GB")
    group.add_argument("--comment", default="", help="comment for Slurm's accounting")
    group.add_argument("--cluster", default="slurm", choices=["slurm", "local"], help="local: run it here, as a trial")
    group.add_argument("--wait", action="store_true", help="wait until the job ends, and report how")
    return parser.parse_args()


class Trainer:
    """The callable that submitit pickles, and runs in each process."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.code = args, str(Path(__file__).resolve().parent)

    def __call__(self) -> None:
        sys.path.insert(0, self.code)  # the job may start in another folder
        import submitit

        import main_selfpatch
        from selfpatch.errors import RunStopped, replace_unknown_characters

        replace_unknown_characters()
        job = submitit.JobEnvironment()
        # main_selfpatch reads a launcher's variables, which submitit's local executor does not set
        os.environ.update(RANK=str(job.global_rank), WORLD_SIZE=str(job.num_tasks), LOCAL_RANK=str(job.local_rank))
        os.environ.setdefault("MASTER_ADDR", job.hostnames[0])
        try:
            main_selfpatch.train_dino(self.args)
        except RunStopped as stopped:
            # training has saved and given the signals back: now it is submitit's turn, which calls checkpoint
            if stopped.signal_number:
                signal.raise_signal(stopped.signal_number)
            raise

    def checkpoint(self):
        """Called when the time is up: submit the same job again, which resumes from its checkpoint."""
        import submitit

        return submitit.helpers.DelayedSubmission(type(self)(self.args))


def main() -> None:
    args = get_args()
    require_packages("run_with_submitit.py", "submitit")
    import submitit

    main_selfpatch.check_options(vars(args))
    folder = Path(args.output_dir).absolute()
    args.output_dir, args.data_path = str(folder), [absolute(path) for path in as_list(args.data_path)]
    if args.knn_data:
        args.knn_data = [absolute(path) for path in as_list(args.knn_data)]
    args.knn_val_labels = args.knn_val_labels and absolute(args.knn_val_labels)
    if args.init_weights and not is_remote(args.init_weights):
        args.init_weights = absolute(args.init_weights)
    executor = submitit.AutoExecutor(folder=folder / "submitit", cluster=args.cluster, slurm_max_num_timeout=30)
    executor.update_parameters(
        name="selfpatch", nodes=args.nodes if args.cluster == "slurm" else 1, tasks_per_node=max(args.ngpus, 1),
        gpus_per_node=args.ngpus, cpus_per_task=max(args.num_workers, 1), timeout_min=args.timeout,
        mem_gb=args.mem_gb_per_gpu * max(args.ngpus, 1), slurm_partition=args.partition,
        slurm_comment=args.comment or None, slurm_constraint="volta32gb" if args.use_volta32 else None)
    job = executor.submit(Trainer(args))
    print(f"submitted job {job.job_id}; its logs are in {folder / 'submitit'}")
    if args.wait:
        job.results()


if __name__ == "__main__":
    run_main(main)
