"""The epochs of a run: training, saving, evaluating, logging, and the end when one is asked for."""
import argparse
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial

import torch.distributed as dist

from selfpatch.data.loader import CropLoader, TooManyBadImages
from selfpatch.distributed.processes import Processes, is_distributed, is_main_process, on_main_process, together
from selfpatch.distributed.rank_watch import RankWatch
from selfpatch.distributed.stopping import STOP, Interruption
from selfpatch.errors import ConfigError, RunStopped
from selfpatch.method.training_run import TrainingRun
from selfpatch.pretraining.engine import check_logged_steps, check_weights, health_warnings, train_one_epoch
from selfpatch.pretraining.knn_probe import KnnProbe
from selfpatch.pretraining.logs import RunLog, make_row
from selfpatch.pretraining.meters import MetricLogger
from selfpatch.pretraining.resuming import begin_epoch, epoch_state
from selfpatch.pretraining.run_folder import RunFolder, numbered
from selfpatch.pretraining.step_log import StepLog

COLLECT_EVERY = 100  # steps


@contextmanager
def rare_collection() -> Iterator[None]:
    """No collection of garbage by Python within, but what after_step asks for at the same steps of all ranks.

    Otherwise each rank would stop for it at moments of its own, and the others would wait. What exists already is not
    looked at again.
    """
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


class Saver:
    """When and what a run saves: after each epoch, when the clock or a signal asks for it, every so many steps.

    Every rank has one, and calls the same methods at the same steps.

    Args:
        log: whose rows go into the checkpoint; None on other ranks than 0.
        saved_args: the options, from resuming.plain_args.
        every_steps: steps between two saves within an epoch; 0 for none.
    """

    def __init__(self, run: TrainingRun, loader: CropLoader, folder: RunFolder, log: RunLog | None, saved_args: dict,
                 interruption: Interruption, every_steps: int = 0):
        self.run, self.loader, self.folder, self.log, self.saved_args = run, loader, folder, log, saved_args
        self.interruption, self.every_steps, self.recorded = interruption, every_steps, set()

    def save(self, last_chance: bool = False, epoch: int | None = None, within: dict | None = None) -> None:
        """Write checkpoint.pth.

        Args:
            last_chance: raise even if the error may be temporary.
            epoch: keep a copy with this number as well.
            within: what epoch_state returned, within an epoch.
        """
        together(lambda: check_weights(self.run))
        self.record_bad_images()
        state = self.run.state_dict() | {"args": self.saved_args} | (within or {})
        state |= self.log.state_dict() if self.log else {}
        on_main_process(lambda: self.folder.try_save(state, epoch, last_chance))
        self.interruption.saved()

    def after_step(self, logger: MetricLogger) -> None:
        """Save, and collect garbage, if it is time.

        Raises:
            RunStopped: the run was asked to end, and has saved.
        """
        if self.run.step % COLLECT_EVERY == 0:
            gc.collect()
        agreed = self.interruption.agree()
        if agreed or (self.every_steps and self.run.step % self.every_steps == 0):
            logger.read()
            together(lambda: check_logged_steps(self.run, logger))
            self.save(agreed == STOP, within=epoch_state(self.loader, logger))
        if agreed == STOP:
            raise self.stopped()

    def check_stop(self) -> None:
        """Raise RunStopped if the run was asked to end; between saves and steps, when nothing is under way."""
        if self.interruption.agree() == STOP:
            raise self.stopped()

    def record_bad_images(self) -> None:
        """Write what all ranks could not read to bad_images.txt, if there is anything new."""
        errors = [self.loader.bad_images]
        if is_distributed():
            errors = [None] * dist.get_world_size()
            dist.all_gather_object(errors, self.loader.bad_images)
        found = set().union(*errors)
        self.loader.bad_images = found  # from here on every rank counts what all of them have found
        if found != self.recorded:
            on_main_process(lambda: self.folder.add_bad_images(found, len(self.loader.dataset)))
        self.recorded = set(found)

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
    with rare_collection(), Interruption(args.save_every_minutes, timeout) as interruption, \
            RankWatch(processes.rank, processes.world_size, timeout, args.dist_url):
        saver = Saver(run, loader, folder, log, saved_args, interruption, args.save_every_steps)
        if run.epoch and not within and probe_due(run.epoch - 1):
            evaluate_if_missed(probe, saver, steps, run.epoch == args.epochs,
                               numbered(run.epoch - 1, args.saveckp_freq))
        for epoch in range(run.epoch, args.epochs):
            logger = MetricLogger(window=args.log_every)
            begin_epoch(run, loader, logger, within, args.seed, processes)
            within = {}
            gc.collect()  # after the last step of an epoch there is no after_step
            try:
                stats = train_one_epoch(run, loader, args.log_every, logger, partial(saver.after_step, logger),
                                        steps or (lambda _: None))
            except TooManyBadImages:  # on one rank, maybe, so without the others
                folder.add_bad_images(loader.bad_images, len(loader.dataset))
                raise
            last, stop, row = epoch + 1 == args.epochs, interruption.agree() == STOP, make_row(stats, epoch)
            if log:
                log.rows.append(row)
            due, copy = probe_due(epoch), numbered(epoch, args.saveckp_freq)
            saver.save(stop or last and not due, copy)
            on_main_process(lambda: log.write())
            if stop and (due or not last):
                raise saver.stopped()  # what is due is evaluated when the run goes on
            if due:
                evaluate(probe, saver, row, last, copy)
            if steps:
                steps.trackers.log_epoch(row, run.step)
            loader.check_bad_images()
            if log:
                for warning in health_warnings(stats, run.dino_loss, epoch >= args.warmup_epochs,
                                               args.batch_size_per_gpu):
                    print(f"warning: {warning}", flush=True)
    if log:
        print(f"done: {args.epochs} epochs, {folder.last}")


def evaluate(probe: KnnProbe, saver: Saver, row: dict, last_chance: bool, epoch: int | None) -> None:
    """Add the teacher's accuracy to an epoch's row, which has been saved, and save again.

    In a single process an error is a warning.

    Args:
        row: the same object as the last of log.rows on rank 0.
        last_chance, epoch: of Saver.save.

    Raises:
        RunStopped: the run was asked to end meanwhile.
    """
    saver.check_stop()  # a signal of the epoch's last step would be answered after the evaluation
    try:
        row |= probe(saver.run.teacher, saver.check_stop)
    except ConfigError as error:
        if is_distributed():  # the others may wait in an exchange
            raise
        print(f"warning: no k-NN accuracy after epoch {row['epoch']}: {error}", flush=True)
        return
    if is_main_process():
        print(f"epoch {row['epoch']}: k-NN top-1 {row['knn_top1']:.2f} %, top-5 {row['knn_top5']:.2f} % "
              f"({row['knn_seconds']:.0f} s)", flush=True)
    saver.save(last_chance, epoch)
    on_main_process(lambda: saver.log.write())


def evaluate_if_missed(probe: KnnProbe, saver: Saver, steps: StepLog | None, last_chance: bool,
                       epoch: int | None) -> None:
    """Evaluate after the last epoch that is done, if the run was stopped or killed before it could."""
    row = saver.log.rows[-1] if saver.log and saver.log.rows else {}
    missed = on_main_process(lambda: "epoch" in row and "knn_top1" not in row)
    if missed:
        row.setdefault("epoch", saver.run.epoch - 1)  # on other ranks
        evaluate(probe, saver, row, last_chance, epoch)
        if steps:
            steps.trackers.log_epoch(row, saver.run.step)
