"""The epochs of a run: training, saving, evaluating, logging, and stopping when asked to."""
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from selfpatch.data.loader import CropLoader, TooManyBadImages
from selfpatch.distributed.processes import Process, gather_objects, is_distributed, on_main_process, together
from selfpatch.distributed.stopping import STOP, Interruption
from selfpatch.errors import ConfigError, RunStopped, try_print
from selfpatch.method.training_run import TrainingRun
from selfpatch.pretraining.engine import check_logged_steps, check_weights, health_warnings, train_one_epoch
from selfpatch.pretraining.knn_probe import KnnProbe
from selfpatch.pretraining.logs import RunLog, epoch_row
from selfpatch.pretraining.meters import MetricLogger
from selfpatch.pretraining.resuming import begin_epoch, epoch_state
from selfpatch.pretraining.run_folder import RunFolder

COLLECT_EVERY = 100  # steps


@contextmanager
def rare_collection() -> Iterator[None]:
    """Disable Python's garbage collector; after_step runs it instead, at the same steps on every rank.

    Otherwise each rank would pause at moments of its own while the others wait. Objects that exist already are not
    examined again.
    """
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


class TrainingLoop:
    """Trains a run to its last epoch. Saves after each epoch, when the clock or a signal asks, and every so many steps.

    Every rank has one, and calls the same methods at the same steps.

    Args:
        log: None on ranks other than 0.
        saved_args: the options for the checkpoint, from resuming.plain_args.
        interruption: entered.
        save_every_steps: steps between two saves within an epoch; 0 for none.
    """

    def __init__(self, run: TrainingRun, loader: CropLoader, folder: RunFolder, log: RunLog | None, saved_args: dict,
                 interruption: Interruption, save_every_steps: int = 0):
        self.run, self.loader, self.folder, self.log, self.saved_args = run, loader, folder, log, saved_args
        self.interruption, self.save_every_steps, self.recorded = interruption, save_every_steps, set()

    def train(self, within: dict, seed: int, process: Process, log_every: int = 10,
              probe: KnnProbe | None = None) -> None:
        """Train the epochs that are left.

        Args:
            within: from resume, the state within the first of them.
            seed: of the run.
            log_every: steps between two lines of progress.
            probe: evaluates the teacher after the epochs it is due, and after the last.

        Raises:
            RunStopped: the run was asked to end, and has saved.
        """
        run, epochs = self.run, self.run.schedules.epochs
        if probe and not within and probe.due(run.epoch - 1, epochs):
            row = on_main_process(lambda: self.log.last_row)
            # the run was stopped or killed before it could evaluate the last epoch that is done
            if row and row["epoch"] == run.epoch - 1 and "knn_top1" not in row:
                self.evaluate(probe)
                self.track_epoch()
        for epoch in range(run.epoch, epochs):
            logger = MetricLogger(window=log_every)
            begin_epoch(run, self.loader, logger, within, seed, process)
            within = {}
            gc.collect()  # after_step is not called after an epoch's last step
            try:
                stats = train_one_epoch(run, self.loader, log_every, logger, partial(self.after_step, logger),
                                        self.log.log_step if self.log else lambda _: None)
            except TooManyBadImages:  # perhaps on one rank only, so do not wait for the others
                self.folder.add_bad_images(self.loader.bad_images, len(self.loader.dataset))
                raise
            self.end_epoch(stats, probe if probe and probe.due(epoch, epochs) else None)
        if self.log:
            try_print(f"done: {epochs} epochs, {self.folder.last}")

    def end_epoch(self, stats: dict[str, float], probe: KnnProbe | None) -> None:
        """Save and log the epoch that has ended; evaluate it if there is a probe."""
        epoch, is_last = self.run.epoch - 1, self.run.epoch == self.run.schedules.epochs
        stop = self.interruption.agree() == STOP
        self.save(stop or is_last, epoch_row(stats, epoch))
        if stop and (probe or not is_last):
            raise self.stopped()  # when the run continues, it begins with the evaluation
        if probe:
            self.evaluate(probe)
        self.track_epoch()
        self.loader.check_bad_images()
        if self.log:
            warmed_up = epoch >= self.run.schedules.warmup_epochs
            for warning in health_warnings(stats, self.run.dino_loss, warmed_up, self.loader.batch_size):
                try_print(f"warning: {warning}")

    def after_step(self, logger: MetricLogger) -> None:
        """Save, and collect garbage, if it is time.

        Raises:
            RunStopped: the run was asked to end, and has saved.
        """
        if self.run.step % COLLECT_EVERY == 0:
            gc.collect()
        agreed = self.interruption.agree()
        if agreed or (self.save_every_steps and self.run.step % self.save_every_steps == 0):
            logger.read()
            together(lambda: check_logged_steps(self.run, logger))
            self.save(agreed == STOP, within=epoch_state(self.loader, logger))
        if agreed == STOP:
            raise self.stopped()

    def save(self, last_chance: bool = False, row: dict | None = None, within: dict | None = None) -> None:
        """Write checkpoint.pth.

        Args:
            last_chance: raise even if the error may be temporary.
            row: for log.txt, if an epoch has ended.
            within: from epoch_state, otherwise.
        """
        together(lambda: check_weights(self.run))
        self.record_bad_images()
        state = self.run.state_dict() | {"args": self.saved_args} | (within or {})
        on_main_process(lambda: self.write(state, row, last_chance))
        self.interruption.saved()

    def write(self, state: dict, row: dict | None, last_chance: bool) -> None:
        """Write the log's rows, then the checkpoint: a row without its checkpoint is dropped when the run resumes."""
        if row:
            self.log.log_epoch(row)
        self.log.flush()
        self.folder.try_save(state | self.log.state_dict(), row and row["epoch"], last_chance)
        if self.folder.has_run():
            self.log.saved()

    def record_bad_images(self) -> None:
        """Append to bad_images.txt what the ranks could not read, if there is anything new."""
        found = set().union(*gather_objects(self.loader.bad_images))
        self.loader.bad_images = found  # from here on every rank counts those of all ranks
        if found != self.recorded:
            on_main_process(lambda: self.folder.add_bad_images(found, len(self.loader.dataset)))
        self.recorded = set(found)

    def evaluate(self, probe: KnnProbe) -> None:
        """Add the teacher's accuracy to the row of the epoch that has ended, and has been saved.

        In a single process an error is a warning.

        Raises:
            RunStopped: the run was asked to end meanwhile.
        """
        epoch = self.run.epoch - 1
        self.check_stop()  # a signal of the epoch's last step would be answered after the evaluation
        try:
            accuracy = probe(self.run.teacher, self.check_stop)
        except ConfigError as error:
            if is_distributed():  # the others may be waiting in an exchange
                raise
            try_print(f"warning: no k-NN accuracy after epoch {epoch}: {error}")
            return
        if self.log:
            try_print(f"epoch {epoch}: k-NN top-1 {accuracy['knn_top1']:.2f} %, top-5 {accuracy['knn_top5']:.2f} % "
                      f"({accuracy['knn_seconds']:.0f} s)")
        on_main_process(lambda: self.log.amend_epoch(accuracy))

    def track_epoch(self) -> None:
        if self.log:
            self.log.trackers.log_epoch(self.log.last_row, self.run.step)

    def check_stop(self) -> None:
        """Raise RunStopped if the run was asked to end; for moments when everything is saved."""
        if self.interruption.agree() == STOP:
            raise self.stopped()

    def stopped(self) -> RunStopped:
        epoch, step = divmod(self.run.step, self.run.steps_per_epoch)
        return RunStopped(f"{self.interruption.reason}: saved after step {step} of epoch {epoch} in "
                          f"{self.folder.last}; the same command continues from there", self.interruption.signal)
