"""Batches of crops on the device, loaded by worker processes. An epoch can start at any batch, bit for bit.

Killed workers are replaced, without any change to the batches. A worker that hangs raises an error that names the file
it was reading.
"""
import contextlib
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from ctypes import c_int64
from itertools import islice
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import RawArray
from multiprocessing.util import Finalize

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, get_worker_info

from selfpatch.data.augmentations import DeviceAugmentation, RandomCrops
from selfpatch.data.dataset import TrainingImages
from selfpatch.data.seeds import seeded
from selfpatch.distributed.processes import Process
from selfpatch.distributed.workers import WorkerDied, ended_workers, init_worker, kill, raise_for_exit, worker_options
from selfpatch.errors import TrainingError, check_may_start, try_print

MAX_RESTARTS = 3  # of workers, in an epoch
ALONE = Process()  # on the CPU


# ----------------------------------------------------------------------------------------------------------------------
# In the workers


class EpochImages(Dataset):
    """The images of an epoch as its workers load them: the crops of each are seeded by (seed, epoch, index).

    Each worker records the index it is reading in shared memory, for error messages.

    Args:
        sampler: its seed and epoch are those of the crops.
    """

    def __init__(self, dataset: TrainingImages, sampler: DistributedSampler, num_workers: int):
        self.dataset, self.sampler = dataset, sampler
        self.loading = RawArray(c_int64, max(num_workers, 1))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[list[torch.Tensor], str]:
        with seeded(self.sampler.seed, self.sampler.epoch, index):
            return self.dataset.load(index, self.note)

    def note(self, index: int) -> None:
        info = get_worker_info()
        self.loading[info.id if info else 0] = index


# ----------------------------------------------------------------------------------------------------------------------
# In the main process


class RankSampler(DistributedSampler):
    """A rank's share of the images, shuffled by epoch, from the image number `start` on."""

    start = 0

    def __iter__(self) -> Iterator[int]:
        return islice(super().__iter__(), self.start, None)


def prefetch(batches: Iterable[list[torch.Tensor]], device: torch.device,
             copy_stream: torch.cuda.Stream | None = None) -> Iterator[list[torch.Tensor]]:
    """Copy the batches to the device.

    On a GPU, copies from pinned memory run on copy_stream. No operation of a training step waits for the GPU, so the
    host fetches and copies the next batch while the GPU still works on this one.
    """
    for crops in batches:
        if copy_stream is None:
            yield [crop.to(device) for crop in crops]
            continue
        with torch.cuda.stream(copy_stream):
            crops = [crop.to(device, non_blocking=True) for crop in crops]
        stream = torch.cuda.current_stream(device)
        stream.wait_stream(copy_stream)
        for crop in crops:
            crop.record_stream(stream)  # or the allocator could give the memory to the next copy too early
        yield crops


class DataWait:
    """Measure how long training waits for batches, from begin on.

    On a GPU this is its idle time, from the end of one step's work to the arrival of the next batch: the host runs
    ahead, and its own waiting costs nothing while the device is busy.
    """

    def __init__(self, device: torch.device):
        self.device, self.measured, self.events = device, False, []

    def begin(self) -> None:
        """Start to measure, or start anew."""
        self.measured, self.start, self.seconds, self.events = True, time.perf_counter(), 0.0, []

    def timed(self, batches: Iterable) -> Iterator:
        """Yield the batches, adding up the time until each arrives."""
        batches = iter(batches)
        if self.measured:  # what was done between two epochs is no part of either
            self.begin()
        while True:
            before, asked = self.mark(), time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            if before is not None:
                self.events.append((before, self.mark()))
            elif self.measured:
                self.seconds += time.perf_counter() - asked
            yield batch

    def mark(self) -> torch.cuda.Event | None:
        """An event behind the work queued on the GPU so far; None on other devices."""
        if not self.measured or self.device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def share(self) -> float:
        """The share of the time since the last call. Synchronize the device before."""
        for before, after in self.events:
            after.synchronize()
            self.seconds += before.elapsed_time(after) / 1000
        share = self.seconds / max(time.perf_counter() - self.start, 1e-9)
        self.begin()
        return share


class TimeLimit(BaseException):
    """A call took too long. Not an Exception, or a reader of images could take it for an unreadable file."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeLimit if the body takes longer, e.g. a read from a stopped worker or an unreachable file server.

    No limit with 0, or outside the main thread. Uses SIGALRM, which interrupts a blocking read from a socket.
    """
    def end(*_) -> None:
        raise TimeLimit

    if not seconds or threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


class TooManyBadImages(TrainingError):
    """More unreadable images than --max_bad_images allows."""


class CropLoader:
    """Batches of this rank's share of the images, reshuffled by set_epoch.

    A batch is a list of V normalised crops, float32 [B, 3, H, W], on the device: 2 global ones, then the local ones.
    Images that cannot be read are replaced; bad_images has the reasons. The crops of an image depend on seed, epoch and
    its index in the data set alone: not on num_workers, batch_size or rank.

    Args:
        dataset: from dataset.build_dataset.
        batch_size: B, images of this rank.
        num_workers: processes that load and crop; 0 does it in this one.
        process: rank and world size give the share of the images, device where batches go.
        seed: of the order of images, and of their crops.
        max_bad_images: share of the images that may be unreadable.
        timeout: seconds that a batch, or the start of the workers, may take; 0 for no limit.

    Raises:
        TooManyBadImages: while iterating.
        ConfigError: this process may not start workers.
        OSError: while iterating, if a worker cannot be started.
        TrainingError: while iterating, if workers, or the reading of a file, hang, or workers are killed.
    """

    def __init__(self, dataset: TrainingImages, batch_size: int, num_workers: int = 0, process: Process = ALONE,
                 seed: int = 0, max_bad_images: float = 0.001, timeout: float = 600):
        check_may_start(num_workers)
        self.dataset, self.batch_size, self.device = dataset, batch_size, process.device
        self.max_bad_images, self.bad_images, self.timeout = max_bad_images, set(), timeout
        self.wait = DataWait(self.device)
        self.sampler = RankSampler(dataset, process.world_size, process.rank, shuffle=True, seed=seed)
        on_gpu = self.device.type == "cuda"
        self.images = EpochImages(dataset, self.sampler, num_workers)
        # workers start anew each epoch, with the sampler's epoch; a generator of its own, or the DataLoader would draw
        # their seeds from the one that training uses
        self.batches = DataLoader(self.images, batch_size, sampler=self.sampler, pin_memory=on_gpu,
                                  drop_last=True, worker_init_fn=init_worker, generator=torch.Generator(),
                                  **worker_options(num_workers))
        self.copy_stream = torch.cuda.Stream(self.device) if on_gpu else None
        self.augment = None
        if isinstance(dataset.transform, RandomCrops):
            self.augment = DeviceAugmentation(dataset.transform.local_crops_number).to(self.device)
        self.position = self.next_start = 0
        self.workers = []
        # at its exit, the interpreter would wait for the workers of a loader that an error has left open
        Finalize(self, kill, (self.workers,), exitpriority=0)

    def __len__(self) -> int:
        return len(self.batches)

    def compile(self) -> None:
        """Fuse the augmentation on the device, if there is one, with torch.compile."""
        if self.augment:
            self.augment.fuse()

    def __iter__(self) -> Iterator[list[torch.Tensor]]:
        for crops in self.wait.timed(prefetch(self.readable(), self.device, self.copy_stream)):
            yield self.augment(crops) if self.augment else crops

    def set_epoch(self, epoch: int, batch: int = 0) -> None:
        """Make the next iteration give the epoch's batches from number `batch` on."""
        self.sampler.set_epoch(epoch)
        self.next_start = batch

    def readable(self) -> Iterator[list[torch.Tensor]]:
        """Yield the crops of each batch, on the CPU, and collect the reasons of unreadable images."""
        self.position, self.next_start = self.next_start, 0
        batches, restarts = self.start(), 0
        while True:
            try:
                crops, errors = self.next_batch(batches)
            except StopIteration:
                return
            except WorkerDied as died:
                restarts += 1
                if restarts > MAX_RESTARTS:
                    raise TrainingError(f"{died}, and workers were restarted {MAX_RESTARTS} times in this epoch: they "
                                        "may be short of memory, lower --num_workers") from None
                try_print(f"warning: {died}; new workers continue at the same batch")
                batches = self.start()
                continue
            self.position += 1
            self.bad_images.update(filter(None, errors))
            self.check_bad_images()
            yield crops

    def start(self) -> Iterator:
        """An iterator of the DataLoader from this position on.

        Raises:
            OSError: a worker cannot be started.
            TrainingError: the workers did not start within the timeout.
        """
        self.close()
        self.first = self.position
        self.sampler.start = self.first * self.batch_size
        others, handler = set(multiprocessing.active_children()), signal.getsignal(signal.SIGCHLD)
        try:
            with time_limit(self.timeout):
                batches = iter(self.batches)
        except BaseException as error:
            self.take_workers(others, handler)
            self.close()  # or torch would wait for each of them
            if isinstance(error, TimeLimit):
                raise TrainingError(f"the data workers have not started within {self.timeout:g} s "
                                    "(--loader_timeout)") from None
            # raised by torch's handler, or by the pipe to a worker, if one ends before all have started
            if isinstance(error, BrokenPipeError) or "DataLoader worker" in str(error):
                return ended_workers()
            raise
        self.take_workers(others, handler)
        return batches

    def take_workers(self, others: set[BaseProcess], handler: Callable | int | None) -> None:
        """Note the processes that are not among the others, after the DataLoader has started workers.

        Args:
            handler: of SIGCHLD, before.
        """
        if threading.current_thread() is threading.main_thread():
            # torch's handler, of this loader or of one before it (--knn_data), would raise in the middle of a step;
            # without it, next_batch finds dead workers
            is_torchs = (getattr(handler, "__module__", None) or "").startswith("torch.utils.data")
            signal.signal(signal.SIGCHLD, signal.SIG_DFL if is_torchs else handler)
        self.workers[:] = [child for child in multiprocessing.active_children() if child not in others]

    def next_batch(self, batches: Iterator) -> tuple:
        """The next batch of the workers.

        Raises:
            WorkerDied: a worker was killed.
            TrainingError: no batch came within the timeout.
        """
        try:
            with time_limit(self.timeout):
                return next(batches)
        except TimeLimit:
            worker = (self.position - self.first) % max(len(self.workers), 1)
            path = self.dataset.images.location(self.images.loading[worker])
            who = f"data worker {worker}" if self.workers else "loading"
            self.close()  # or torch would wait for each worker again
            raise TrainingError(f"{who} has given nothing for {self.timeout:g} s (--loader_timeout); the last image "
                                f"that it began to read is {path}") from None
        except (RuntimeError, OSError, EOFError) as error:
            # raised by torch, by its pinning thread, or by the connection through which workers share memory
            by_words = any(words in str(error) for words in ("DataLoader worker", "Pin memory thread"))
            if by_words or isinstance(error, (ConnectionError, FileNotFoundError, EOFError)):
                raise_for_exit(self.workers)
            raise

    def check_bad_images(self) -> None:
        """Raise TooManyBadImages if more than the share max_bad_images of the data set is in bad_images."""
        if len(self.bad_images) > self.max_bad_images * len(self.dataset):
            listed = sorted(self.bad_images)
            shown = "; ".join(listed[:5]) + (f"; and {len(listed) - 5} more" if listed[5:] else "")
            raise TooManyBadImages(f"{shown} ({len(listed)} of {len(self.dataset)} images, which is more than "
                                   f"--max_bad_images {self.max_bad_images:g})")

    def close(self) -> None:
        """End the workers."""
        kill(self.workers)
        self.workers.clear()
