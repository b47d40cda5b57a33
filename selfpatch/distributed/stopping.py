"""Stop a run between two steps, on a signal or when the launcher ends, and make all ranks agree on the step.

A signal only sets a flag. After each step the ranks start to reduce their wishes to the maximum, and read the result a
step later, so that nobody waits for it; then all of them save and end after the same step.
"""
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist

from selfpatch.distributed.processes import is_distributed, is_lost_contact, is_main_process
from selfpatch.errors import TrainingError, program_name

CONTINUE, SAVE, STOP = range(3)
LAUNCHER = os.getppid()
# those that this system has; Slurm and submitit send SIGUSR1 or SIGUSR2 before the time is up
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
           if hasattr(signal, name)]
USER_SIGNALS = [number for number in SIGNALS if number.name.startswith("SIGUSR")]


class Interruption:
    """While entered, a signal or the launcher's end asks the run to stop, and the clock asks it to save.

    A signal that the process ignored before, such as SIGHUP under nohup, stays ignored. A second Ctrl-C ends the
    process at once.

    Args:
        save_every_minutes: minutes between two saves, 0 for none within an epoch.
        timeout: of the exchange between ranks.
    """

    def __init__(self, save_every_minutes: float = 0, timeout: timedelta = timedelta(minutes=30)):
        self.timeout, self.seconds = timeout, save_every_minutes * 60
        self.signal: int | None = None
        self.pid, self.interrupts = os.getpid(), 0
        self.last_save, self.handlers = time.monotonic(), {}
        self.flag, self.exchange, self.group = None, None, None

    def __enter__(self) -> "Interruption":
        if is_distributed():
            # a separate group, since this runs concurrently with a step's collectives
            try:
                self.group = dist.new_group(backend="gloo", timeout=self.timeout)
            except RuntimeError as error:
                if is_lost_contact(error):
                    raise
                first = (str(error).splitlines() or [""])[0]
                raise TrainingError(f"the processes cannot reach each other by Gloo ({first}): set GLOO_SOCKET_IFNAME "
                                    "to the network interface that joins the machines") from None
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self.handlers[number] = signal.signal(number, self.receive)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def receive(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self.pid:  # a data worker that has no handlers of its own yet
            return
        self.interrupts += number == signal.SIGINT
        if self.interrupts > 1:
            for child in multiprocessing.active_children():
                child.kill()
            with contextlib.suppress(OSError):
                os.write(sys.stderr.fileno(), f"{program_name()}: interrupted twice: ended without a save\n".encode())
            os._exit(128 + signal.SIGINT)
        # submitit submits a job again by the signal that Slurm was asked to send, which a SIGTERM may come before
        if self.signal is None or (self.signal == signal.SIGTERM and number in USER_SIGNALS):
            self.signal = number

    @property
    def reason(self) -> str:
        """Why this rank wants to stop, in words."""
        if self.signal:
            return "Ctrl-C" if self.signal == signal.SIGINT else signal.Signals(self.signal).name
        return "torchrun is gone" if launcher_gone() else "another process was asked to stop"

    def wish(self) -> int:
        """What this rank wants after the current step."""
        if self.signal or launcher_gone():
            return STOP
        due = self.seconds and is_main_process() and time.monotonic() - self.last_save >= self.seconds
        return SAVE if due else CONTINUE

    def agree(self) -> int:
        """What all ranks do after this step: the maximum of their wishes a step ago. Call it after every step."""
        if not is_distributed():
            return self.wish()
        verdict = CONTINUE
        if self.exchange:
            self.exchange.wait()
            verdict = int(self.flag)
        wish = self.wish()
        # a verdict is carried out before the next step, so it need not be wished again
        self.flag = torch.tensor(wish if wish > verdict else CONTINUE)
        self.exchange = dist.all_reduce(self.flag, dist.ReduceOp.MAX, group=self.group, async_op=True)
        return verdict

    def saved(self) -> None:
        """Restart the clock of save_every_minutes."""
        self.last_save = time.monotonic()


def launcher_gone() -> bool:
    """Whether torchrun started this process, and has ended since."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != LAUNCHER
