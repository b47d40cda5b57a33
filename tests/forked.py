"""Programs run in processes forked from one that has imported torch and timm, which takes seconds of CPU time.

For tests that compare what several processes compute. How users start jobs is tested with real launchers.
"""
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
from multiprocessing.process import BaseProcess
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "timm", "torchvision.transforms.v2", "cv2", "safetensors.torch", "tqdm"])


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def ranks(count: int = 2) -> list[dict[str, str]]:
    """The environment that a launcher gives to each of several ranks."""
    port = free_port()
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": port} for rank in range(count)]


def take(env: dict[str, str]) -> None:
    """Set the environment, without what a launcher of the tests themselves may have set."""
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            del os.environ[name]
    os.environ.update(env)


def _program(source: str | Path, words: list[str], env: dict[str, str], folder: str) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT), number)
    take(env)
    if isinstance(source, Path):
        sys.argv = [str(source), *words]
        sys.path.insert(0, str(source.parent))
        runpy.run_path(str(source), run_name="__main__")
    else:
        sys.argv = ["-c", *words]
        exec(compile(source, "<string>", "exec"), {"__name__": "__main__"})


def run_program(source: str | Path, *words, envs: tuple | list = ({},), seconds: float = 120) -> list[tuple]:
    """Run a script, or the text of one, once with each of the environments, all at the same time.

    Returns:
        Exit status, stdout and stderr of each.
    """
    source = Path(source) if Path(str(source)[:255]).suffix == ".py" else source
    with tempfile.TemporaryDirectory() as root:
        folders = [tempfile.mkdtemp(dir=root) for _ in envs]
        processes = [CONTEXT.Process(target=_program, args=(source, [*map(str, words)], env, folder))
                     for env, folder in zip(envs, folders, strict=True)]
        start(processes, seconds)
        return [(process.exitcode, *((Path(folder) / name).read_text() for name in ("stdout", "stderr")))
                for process, folder in zip(processes, folders, strict=True)]


def _rank(function, env: dict[str, str], args: tuple) -> None:
    take(env)
    function(*args)


def run_ranks(function, *args, count: int = 2, seconds: float = 120) -> None:
    """Call a module's function on several ranks, whose environment says which one each is."""
    processes = [CONTEXT.Process(target=_rank, args=(function, env, args)) for env in ranks(count)]
    start(processes, seconds)
    assert [process.exitcode for process in processes] == [0] * count


def start(processes: list[BaseProcess], seconds: float) -> None:
    """Start processes and wait for all of them; none outlives the call."""
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(seconds)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()
