"""Data workers that are killed or stopped, files that hang or fail for a moment."""
import errno
import itertools
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from functools import partial
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
import torch
from forked import run_program
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

from selfpatch.data import files as image_files
from selfpatch.data import loader as loader_module
from selfpatch.data.dataset import build_dataset
from selfpatch.data.files import UnreadableImage, load_rgb
from selfpatch.data.loader import CropLoader
from selfpatch.errors import TrainingError
from selfpatch.evaluation.labelled_images import open_labelled, share_loader

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning",
                                        "ignore:.*fork.*:DeprecationWarning")


def make_loader(folder, num_workers=2, augment="device", **kwargs):
    dataset = build_dataset(folder, local_crops_number=1, global_crops_size=32, local_crops_size=16, augment=augment)
    return CropLoader(dataset, 1, num_workers, **kwargs)


def crops(loader, hurt=lambda i: None):
    """All batches of the second epoch, and what hurts the workers after each."""
    loader.set_epoch(1)
    batches = []
    for i, batch in enumerate(loader):
        batches.append(torch.cat([crop.flatten() for crop in batch]))
        hurt(i)
    return batches


@pytest.mark.parametrize("augment", ["device", "pil"])
def test_a_killed_worker_is_replaced_and_changes_nothing(image_folder, augment, capsys):
    loader = make_loader(image_folder, augment=augment)
    expected = crops(make_loader(image_folder, augment=augment))
    found = crops(loader, lambda i: os.kill(loader.workers[0].pid, signal.SIGKILL) if i in (0, 3) else None)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)) and len(found) == 12
    assert capsys.readouterr().out.count("was ended by signal 9; new workers continue at the same batch") in (1, 2)


def die_with_a_lock():
    """Be killed while looking at the flag of torch's iterator; as an Event it has a lock, which is never released."""
    frame = sys._getframe()
    while frame.f_code.co_name != "_worker_loop":
        frame = frame.f_back
    if isinstance(event := frame.f_locals["done_event"], Event):
        event._cond.acquire()
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_with_a_lock_is_replaced(image_folder, tmp_path, capsys):
    loader = make_loader(image_folder)
    load = loader.dataset.loader

    def die_once(path, data):
        if path.endswith("07.jpg") and not (died := tmp_path / "died").exists():
            died.touch()
            die_with_a_lock()
        return load(path, data)

    loader.dataset.loader = die_once
    assert len(crops(loader)) == 12 and "was ended by signal 9" in capsys.readouterr().out


def test_a_worker_of_an_evaluation_that_is_killed_with_a_lock(image_folder):
    images = open_labelled(image_folder, "--data_path", lambda image: die_with_a_lock())
    with pytest.raises(RuntimeError, match="DataLoader worker .* (killed by signal|exited unexpectedly)"):
        list(share_loader(images, 1, num_workers=2))


@pytest.mark.parametrize("error, raised, says", [
    (partial(OSError, errno.EAGAIN, "no more processes"), OSError, "no more processes"),
    (BrokenPipeError, TrainingError, "ended as it started, and workers were restarted 3 times"),
    (None, TrainingError, r"have not started within 1 s \(--loader_timeout\)")])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # torch deletes what it has half made
def test_workers_that_cannot_be_started(image_folder, monkeypatch, error, raised, says):
    """The second of two; a worker that is killed as it starts breaks, or blocks, the pipe that brings it its data."""
    start, count = BaseProcess.start, itertools.count()

    def fail(self):
        if next(count) % 2 == 0:
            return start(self)
        time.sleep(0.2 if error else 60)  # until the first ignores SIGTERM, by which torch would end it
        raise error()

    monkeypatch.setattr(BaseProcess, "start", fail)
    begin = time.monotonic()
    with pytest.raises(raised, match=says):
        crops(make_loader(image_folder, timeout=1))
    assert time.monotonic() - begin < 5  # torch waits 5 s for each worker that does not end


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_threads_that_cannot_be_started(image_folder, monkeypatch):
    """By which torch has already set its handler of SIGCHLD, which would raise as the workers are ended."""
    def fail(self):
        if self.name == "QueueFeederThread":
            raise RuntimeError("can't start new thread")
        return start(self)

    start = threading.Thread.start
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)
    monkeypatch.setattr(threading.Thread, "start", fail)
    with pytest.raises(RuntimeError, match="new thread"):
        crops(make_loader(image_folder))
    assert getattr(signal.getsignal(signal.SIGCHLD), "__module__", "") != signal_handling.__name__


def test_a_loader_does_not_fix_the_start_method(image_folder, monkeypatch):
    monkeypatch.setattr(multiprocessing.context._default_context, "_actual_context", None)
    make_loader(image_folder)
    assert multiprocessing.get_start_method(allow_none=True) is None


def test_a_killed_worker_is_replaced_after_another_loader(image_folder, monkeypatch):
    """Such as that of --knn_data, whose handler of SIGCHLD raises for a dead worker, whatever runs then."""
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)
    list(DataLoader([0], num_workers=1))
    assert signal.getsignal(signal.SIGCHLD).__module__ == signal_handling.__name__
    loader = make_loader(image_folder)

    def kill_and_wait(i):
        if i == 3:
            loader.workers[0].kill()
            time.sleep(0.2)

    assert len(crops(loader, kill_and_wait)) == 12


@pytest.mark.long
def test_workers_that_die_again_and_again_end_the_run(image_folder, monkeypatch):
    monkeypatch.setattr(loader_module, "init_worker", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(TrainingError, match="was ended (by signal 9|as it started), and workers were restarted "
                                            "3 times.*--num_workers"):
        crops(make_loader(image_folder))


LEFT_OPEN = """
import sys
import test_loader
loader = test_loader.make_loader(sys.argv[1])
loader.dataset.loader = None
try:
    next(iter(loader))
except TypeError as error:
    kept = error  # as Python keeps the last error that it has printed; by its frames it keeps the iterator
print("done")
"""


def test_a_process_that_leaves_a_loader_open_ends(image_folder):
    [(status, printed, errors)] = run_program(LEFT_OPEN, image_folder, seconds=20)
    assert (status, printed) == (0, "done\n"), errors


def test_workers_outlive_the_signals_that_a_job_gets(image_folder):
    loader = make_loader(image_folder)
    found = crops(loader, lambda _: [os.kill(worker.pid, number) for worker in loader.workers
                                     for number in (signal.SIGINT, signal.SIGTERM)])
    assert all(torch.equal(a, b) for a, b in zip(found, crops(make_loader(image_folder)), strict=True))


def test_a_stopped_worker_is_an_error_that_names_file_and_worker(image_folder):
    loader = make_loader(image_folder, timeout=2)
    start = time.monotonic()
    with pytest.raises(TrainingError, match=r"data worker [01] has given nothing for 2 s \(--loader_timeout\); the "
                                            rf"last image that it began to read is {image_folder}/class[01]/\d+.jpg"):
        crops(loader, lambda i: [os.kill(worker.pid, signal.SIGSTOP) for worker in loader.workers])
    assert time.monotonic() - start < 20
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("num_workers, who", [(0, "loading"), (1, "data worker 0")])
def test_a_file_that_hangs(image_folder, num_workers, who):
    """Here the replacement of one that is damaged, in the main process or a worker."""
    def hang(path, data):
        if path.endswith(f"{bad:02}.jpg"):
            raise UnreadableImage(f"{path} is damaged")
        time.sleep(60)

    loader = make_loader(image_folder, num_workers=num_workers, timeout=4)
    loader.set_epoch(1)
    first = next(iter(loader.sampler))
    bad = int(Path(loader.dataset.images.names[first]).stem)
    loader.dataset.loader = hang
    replacement = re.escape(loader.dataset.images.location((first + 1) % 12))
    with pytest.raises(TrainingError, match=f"{who} has given nothing for 4 s .*began to read is {replacement}"):
        crops(loader)


def write_image(path):
    Image.new("RGB", (8, 8)).save(path)
    return path


@pytest.mark.parametrize("place, call", [(Path, "read_bytes"), (os, "stat")])
@pytest.mark.parametrize("number, failures, readable", [
    (errno.EIO, 2, True), (errno.ESTALE, 1, True), (errno.EIO, 3, False), (errno.EACCES, 1, False)])
def test_a_transient_error_is_tried_again(tmp_path, monkeypatch, number, failures, readable, place, call):
    path, calls, original = write_image(tmp_path / "x.png"), [], getattr(place, call)

    def fail(file, *args, **kwargs):
        if file != path:
            return original(file, *args, **kwargs)
        calls.append(file)
        if len(calls) <= failures:
            raise OSError(number, os.strerror(number))
        return original(file)

    monkeypatch.setattr(place, call, fail)
    monkeypatch.setattr(image_files, "RETRY_SECONDS", (0, 0))
    if readable:
        assert load_rgb(path).size == (8, 8) and len(calls) == failures + 1
    else:
        with pytest.raises(UnreadableImage, match=os.strerror(number)):
            load_rgb(path)


def test_a_fifo_among_the_images_is_replaced(image_folder, tmp_path):
    for path in image_folder.rglob("*.jpg"):
        target = tmp_path / path.relative_to(image_folder)
        target.parent.mkdir(exist_ok=True)
        target.symlink_to(path)
    os.mkfifo(tmp_path / "class0" / "pipe.jpg")
    loader = make_loader(tmp_path, num_workers=1, max_bad_images=0.1, timeout=20)
    assert len(crops(loader)) == 13
    assert loader.bad_images == {f"{tmp_path / 'class0' / 'pipe.jpg'} is not a regular file"}
