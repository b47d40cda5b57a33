"""The epochs of a run: training, saving, evaluating, logging, and the end when one is asked for."""
import argparse
from datetime import timedelta
from functools import partial

import torch.distributed as dist

from distributed import Processes, is_distributed, is_main_process, on_main_process, together
from engine import check_weights, health_warnings, train_one_epoch
from errors import ConfigError, RunStopped
from finite import check_logged_steps
from knn_probe import KnnProbe
from loader import CropLoader, TooManyBadImages
from logger import MetricLogger, RunLog, make_row
from rank_watch import RankWatch
from resuming import begin_epoch, epoch_state
from run_folder import RunFolder
from step_log import StepLog
from stopping import STOP, Interruption
from training_run import TrainingRun


class Saver:
    """When and what a run saves: after each epoch, when the clock or a signal asks for it, every so many steps.

    Every rank has one, and calls the same methods at the same steps.

    Args:
        log: whose rows go into the checkpoint; None on other ranks than 0.
        saved_args: of resuming.plain_args.
        every_steps: steps between two saves within an epoch; 0 for none.
    """

    def __init__(self, run: TrainingRun, loader: CropLoader, folder: RunFolder, log: RunLog | None, saved_args: dict,
                 interruption: Interruption, every_steps: int = 0):
        self.run, self.loader, self.folder, self.log, self.saved_args = run, loader, folder, log, saved_args
        self.interruption, self.every_steps = interruption, every_steps

    def save(self, last_chance: bool = False, epoch: int | None = None, within: dict | None = None) -> None:
        """Write checkpoint.pth.

        Args:
            last_chance: an error is one even if it may pass.
            epoch: keep a copy with this number as well.
            within: of epoch_state, where an epoch is under way.
        """
        together(lambda: check_weights(self.run))
        state = self.run.state_dict() | {"args": self.saved_args} | (within or {})
        state |= self.log.state_dict() if self.log else {}
        on_main_process(lambda: self.folder.try_save(state, epoch, last_chance))
        self.interruption.saved()

    def after_step(self, logger: MetricLogger) -> None:
        """Save if it is time.

        Raises:
            RunStopped: the run was asked to end, and has saved.
        """
        agreed = self.interruption.agree()
        if agreed or (self.every_steps and self.run.step % self.every_steps == 0):
            logger.read()
            together(lambda: check_logged_steps(self.run, logger))
            self.save(agreed == STOP, within=epoch_state(self.loader, logger))
        if agreed == STOP:
            record_bad_images(self.loader, self.folder)
            raise self.stopped()

    def stopped(self) -> RunStopped:
        epoch, step = divmod(self.run.step, self.run.steps_per_epoch)
        return RunStopped(f"{self.interruption.reason}: saved after step {step} of epoch {epoch} in "
                          f"{self.folder.last}; the same command continues from there", self.interruption.signal)


def train(run: TrainingRun, loader: CropLoader, folder: RunFolder, log: RunLog | None, steps: StepLog | None,
          saved_args: dict, args: argparse.Namespace, processes: Processes, within: dict,
          probe: KnnProbe | None = None) -> None:
    """The epochs that are left.

    Args:
        log, steps: None on other ranks than 0.
        within: of resume, the state within the first of them.
        probe: evaluates the teacher after every --knn_every-th epoch and the last.
    """
    def probe_due(epoch: int) -> bool:
        return probe is not None and (epoch + 1 == args.epochs or (epoch + 1) % args.knn_every == 0)

    timeout = timedelta(minutes=args.dist_timeout)
    with Interruption(args.save_every_minutes, timeout) as interruption, \
            RankWatch(processes.rank, processes.world_size, timeout, args.dist_url):
        saver = Saver(run, loader, folder, log, saved_args, interruption, args.save_every_steps)
        if run.epoch and not within and probe_due(run.epoch - 1):
            evaluate_if_missed(probe, saver, log, steps)
        for epoch in range(run.epoch, args.epochs):
            logger = MetricLogger(window=args.log_every)
            begin_epoch(run, loader, logger, within, args.seed, processes)
            within = {}
            try:
                stats = train_one_epoch(run, loader, args.log_every, logger, partial(saver.after_step, logger),
                                        steps or (lambda _: None))
            except TooManyBadImages:  # on one rank, maybe, so without the others
                folder.add_bad_images(loader.bad_images, len(loader.dataset))
                raise
            last, stop, row = epoch + 1 == args.epochs, interruption.agree() == STOP, make_row(stats, epoch)
            if log:
                log.rows.append(row)
            copy = epoch if args.saveckp_freq and epoch % args.saveckp_freq == 0 else None
            saver.save(last or stop, copy)
            if probe_due(epoch) and not stop:  # which would take too long then; a resumed run does it
                evaluate(probe, run, row)
                saver.save(last, copy)
            write_logs(row, log, steps, run)
            record_bad_images(loader, folder)
            loader.check_bad_images()
            if log:
                for warning in health_warnings(stats, run.dino_loss, epoch >= args.warmup_epochs,
                                               args.batch_size_per_gpu):
                    print(f"warning: {warning}", flush=True)
            if stop and not last:
                raise saver.stopped()
    if log:
        print(f"done: {args.epochs} epochs, {folder.last}")


def evaluate(probe: KnnProbe, run: TrainingRun, row: dict) -> None:
    """Add the teacher's accuracy to an epoch's row; in a single process an error is a warning."""
    try:
        row |= probe(run.teacher)
    except ConfigError as error:
        if is_distributed():  # the others may wait in an exchange
            raise
        print(f"warning: no k-NN accuracy after epoch {row['epoch']}: {error}", flush=True)
        return
    if is_main_process():
        print(f"epoch {row['epoch']}: k-NN top-1 {row['knn_top1']:.2f} %, top-5 {row['knn_top5']:.2f} % "
              f"({row['knn_seconds']:.0f} s)", flush=True)


def evaluate_if_missed(probe: KnnProbe, saver: Saver, log: RunLog | None, steps: StepLog | None) -> None:
    """Evaluate after the last epoch that is done, if the run was stopped or killed before it could."""
    row = on_main_process(lambda: log.rows[-1] if log.rows else {})
    if "epoch" not in row or "knn_top1" in row:
        return
    evaluate(probe, saver.run, row)
    if log:
        log.rows[-1] = row
    saver.save()
    write_logs(row, log, steps, saver.run)


def write_logs(row: dict, log: RunLog | None, steps: StepLog | None, run: TrainingRun) -> None:
    """Write an epoch's row, which log.rows has already, to log.txt and to the trackers."""
    on_main_process(lambda: log.write())
    if steps:
        steps.trackers.log_epoch(row, run.step)


def record_bad_images(loader: CropLoader, folder: RunFolder) -> None:
    """Write what all ranks could not read to bad_images.txt, if there is anything."""
    errors = [loader.bad_images]
    if is_distributed():
        errors = [None] * dist.get_world_size()
        dist.all_gather_object(errors, loader.bad_images)
    loader.bad_images = set().union(*errors)  # from here on every rank counts what all of them have found
    if loader.bad_images:
        on_main_process(lambda: folder.add_bad_images(loader.bad_images, len(loader.dataset)))
