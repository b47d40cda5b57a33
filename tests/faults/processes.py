"""Starting the pretraining job as real processes, and hurting them."""
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_job import SMALL

SCRIPT = Path(__file__).with_name("small_main.py")


class Job:
    """A started job: its process, and what it has printed so far."""

    def __init__(self, folder: Path, *words, ranks: int = 1, **env: str):
        self.folder, self.out, self.err = folder, folder / "stdout.txt", folder / "stderr.txt"
        launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        with open(self.out, "w") as out, open(self.err, "w") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "ignore", *launcher, str(SCRIPT), *SMALL, *map(str, words)], stdout=out,
                stderr=err, start_new_session=True, env=inherited | {"OMP_NUM_THREADS": "1"} | env)

    def wait_for(self, text: str, seconds: float = 120, stream: str = "out") -> None:
        end = time.monotonic() + seconds
        while text not in getattr(self, stream).read_text():
            if time.monotonic() > end or self.process.poll() is not None:
                pytest.fail(f"no {text!r}; status {self.process.poll()}: {self.out.read_text()} {self.err.read_text()}")
            time.sleep(0.05)

    def wait(self, seconds: float = 120) -> int:
        return self.process.wait(seconds)

    def errors(self) -> list[str]:
        """Lines on stderr, without torchrun's own."""
        return [line for line in self.err.read_text().splitlines() if line.startswith("small_main.py")]

    def children(self) -> list[int]:
        """The processes of the job that still run, but for the one that was started."""
        # torchrun gives its ranks sessions of their own; the folder is in everybody's command line
        found = subprocess.run(["pgrep", "-f", str(self.folder)], capture_output=True, text=True).stdout.split()
        return [int(pid) for pid in found if int(pid) != self.process.pid]

    def wait_for_all(self, seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while self.children():
            assert time.monotonic() < end, f"still running: {self.children()}"
            time.sleep(0.1)


def run(folder: Path, *words, seconds: float = 180, **kwargs) -> tuple[int, list[str]]:
    """Status and lines on stderr of a whole job."""
    folder.mkdir(exist_ok=True)
    job = Job(folder, *words, **kwargs)
    try:
        return job.wait(seconds), job.errors()
    finally:
        for pid in [job.process.pid, *job.children()]:
            try:
                os.kill(pid, 9)
            except ProcessLookupError:
                pass
