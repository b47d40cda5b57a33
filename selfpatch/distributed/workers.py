"""Worker processes of a DataLoader that may be killed at any moment, as by the kernel when memory runs out."""
import copy
import gc
import multiprocessing.connection
import signal
from collections.abc import Iterator
from ctypes import c_bool
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import RawValue

from selfpatch.distributed.stopping import SIGNALS


class Flag:
    """multiprocessing.Event without its lock and without wait().

    A process that is killed while it looks at an Event keeps the lock for ever, and the next to look or to set waits
    for it: torch's iterator, even as it is deleted.
    """

    def __init__(self):
        self.value = RawValue(c_bool, False)

    def is_set(self) -> bool:
        return self.value.value

    def set(self) -> None:
        self.value.value = True


def worker_options(num_workers: int) -> dict[str, object]:
    """Arguments of a DataLoader whose workers look at a Flag in the place of an Event."""
    if not num_workers:  # torch takes a context only with workers
        return {"num_workers": 0}
    # get_context() alone would fix the start method for the whole program
    method = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    context = copy.copy(multiprocessing.get_context(method))
    context.Event = Flag
    return {"num_workers": num_workers, "multiprocessing_context": context}


def init_worker(_: int) -> None:
    """Prepare a worker process."""
    gc.enable()  # off in the process that trains, see pretraining/loop.py's rare_collection
    # Ctrl-C and Slurm signal every process of a job: the main one decides when the workers end
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def kill(workers: list[BaseProcess]) -> None:
    """End workers, which ignore SIGTERM."""
    for worker in workers:
        worker.kill()


class WorkerDied(Exception):
    """A data worker ended too early; the message names it and the signal or status."""


def ended_workers() -> Iterator:
    """Stand in for an iterator whose workers failed to start: raise WorkerDied at the first batch."""
    raise WorkerDied("a data worker was ended as it started")
    yield


def raise_for_exit(workers: list[BaseProcess]) -> None:
    """Raise WorkerDied if a worker has ended, or RuntimeError if it ran out of shared memory."""
    ended = multiprocessing.connection.wait([worker.sentinel for worker in workers], timeout=1)
    for worker in workers:
        if worker.sentinel in ended:
            worker.join(1)  # its connections close a moment before it has a status
        if worker.exitcode == -signal.SIGBUS:  # how a full /dev/shm shows itself, which new workers would meet again
            raise RuntimeError("DataLoader worker is killed by signal: Bus error")
        if worker.exitcode:
            how = f"signal {-worker.exitcode}" if worker.exitcode < 0 else f"status {worker.exitcode}"
            raise WorkerDied(f"the data worker with pid {worker.pid} was ended by {how}")
