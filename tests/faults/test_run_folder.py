"""A run's folder: its lock, the checkpoint before, leftovers, copies, and disks that fail."""
import errno
import os
import pickle
import random
import shutil
import subprocess
import sys

import pytest
import torch
from networks import assert_same
from processes import SCRIPT
from repository import ROOT
from small_job import load, options

from main_selfpatch import train_dino
from selfpatch.checkpoints.files import CheckpointError, read_checkpoint, write_checkpoint
from selfpatch.errors import ConfigError, TrainingError
from selfpatch.pretraining.run_folder import RunFolder
from selfpatch.whole_files import WriteError

pytestmark = [pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning"),
              pytest.mark.usefixtures("small_network")]


@pytest.fixture
def words(image_folder, tmp_path):
    return ["--epochs", 2, "--data_path", image_folder, "--output_dir", tmp_path]


# ----------------------------------------------------------------------------------------------------------------------
# The lock


def test_a_folder_that_a_live_process_holds_is_refused(tmp_path, words):
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys; from selfpatch.pretraining.run_folder import RunFolder; "
         "f = RunFolder(sys.argv[1]); f.lock(); "
         "print('locked', flush=True); sys.stdin.read()", str(tmp_path)],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "locked\n"
    with pytest.raises(ConfigError, match=rf"is in use by process {holder.pid} on .* since 20.*: wait until"):
        train_dino(options(*words))
    holder.kill()  # the kernel gives its lock up
    holder.wait()
    assert (tmp_path / "run.lock").exists()
    train_dino(options(*words))
    assert not (tmp_path / "run.lock").exists()


def test_a_lock_file_that_is_removed_meanwhile_is_locked_anew(tmp_path, monkeypatch):
    folder, samestat, calls = RunFolder(tmp_path), os.path.samestat, []

    def removed_once(*stats):
        calls.append(stats)
        return len(calls) > 1 and samestat(*stats)

    monkeypatch.setattr(os.path, "samestat", removed_once)
    folder.lock()
    assert len(calls) == 2 and folder.descriptor is not None
    folder.unlock()


def test_leftovers_of_a_killed_process_are_removed_and_nothing_else(tmp_path):
    for name in (".checkpoint.pth.123.tmp", ".checkpoint0010.pth.7.tmp", ".log.txt.9.tmp", ".previous.pth.1.tmp"):
        (tmp_path / name).write_text("half")
    (tmp_path / ".vimrc.tmp").write_text("mine")
    (tmp_path / ".other.tmp").mkdir()
    folder = RunFolder(tmp_path)
    folder.lock()
    folder.unlock()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.tmp", ".vimrc.tmp"]


def test_a_lock_that_cannot_be_made_is_one_line(tmp_path, words):
    (tmp_path / "run.lock").mkdir()
    with pytest.raises(ConfigError, match="cannot lock .*run.lock .Is a directory.*remove it"):
        train_dino(options(*words))


def test_a_kill_between_the_two_renames_leaves_nothing_behind(tmp_path):
    folder = RunFolder(tmp_path)
    for number in (1, 2):
        folder.save({"number": number})
    os.link(folder.last, tmp_path / ".previous.pth.123.tmp")
    folder.previous.unlink()
    os.link(folder.last, folder.previous)  # both names are of one file now
    folder.lock()
    for number in (3, 4):
        folder.save({"number": number})
    folder.unlock()
    assert (load(folder.last)["number"], load(folder.previous)["number"]) == (4, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pth", "previous.pth"]


def test_errors_reach_other_ranks_whole(tmp_path):
    error = pickle.loads(pickle.dumps(WriteError(tmp_path / "x", OSError(errno.ENOSPC, "No space left on device"))))
    assert error.errno == errno.ENOSPC and "x cannot be written: No space left on device" in str(error)


@pytest.mark.parametrize("change", [{"args": "x"}, {"step_of_epoch": "x"},
                                    {"step_of_epoch": -1}, {"ranks": [{}]}, {"ranks": 5}, {"older_log": 5},
                                    {"older_log": ["x"]}, {"epoch": None},
                                    {"student": 3}, {"optimizer": {}}, {"dino_loss": {"center": torch.zeros(2)}}])
def test_checkpoints_of_other_shapes_are_one_line(two_epochs, tmp_path, words, change):
    torch.save(load(two_epochs / "checkpoint0000.pth") | change, tmp_path / "checkpoint.pth")
    with pytest.raises(ConfigError, match="^[^\n]*$"):
        train_dino(options(*words))


# ----------------------------------------------------------------------------------------------------------------------
# The checkpoint before


def damage(path, position=-2000):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(two_epochs, tmp_path, words, capsys):
    shutil.copytree(two_epochs, tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "checkpoint.pth", len((tmp_path / "checkpoint.pth").read_bytes()) // 2)
    broken = (tmp_path / "checkpoint.pth").read_bytes()
    train_dino(options(*words))
    out = capsys.readouterr().out
    assert "checkpoint.pth is truncated or damaged" in out
    assert f"continuing from the one before, {tmp_path / 'previous.pth'}" in out
    ours, other = load(tmp_path / "checkpoint.pth"), load(two_epochs / "checkpoint.pth")
    assert_same(ours["student"], other["student"])
    assert (tmp_path / "damaged.pth").read_bytes() == broken
    assert load(tmp_path / "previous.pth")["epoch"] == 1


def test_without_a_sound_checkpoint_the_copies_are_named(two_epochs, tmp_path, words):
    shutil.copytree(two_epochs, tmp_path, dirs_exist_ok=True)
    for name in ("checkpoint.pth", "previous.pth"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ConfigError, match=r"checkpoint.pth is empty.*rename it to checkpoint.pth "
                                          r".checkpoint0000.pth, checkpoint0001.pth."):
        train_dino(options(*words))
    for name in ("checkpoint.pth", "previous.pth"):
        (tmp_path / name).unlink()
    before = (tmp_path / "checkpoint0000.pth").read_bytes()
    with pytest.raises(ConfigError, match="there is no .*checkpoint.pth, but a run was saved here"):
        train_dino(options(*words))
    assert (tmp_path / "checkpoint0000.pth").read_bytes() == before


def test_where_the_last_one_is_missing_the_one_before_is_used(two_epochs, tmp_path, words, capsys):
    shutil.copytree(two_epochs, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoint.pth").unlink()
    train_dino(options(*words))
    assert "continuing from the one before" in capsys.readouterr().out
    assert load(tmp_path / "checkpoint.pth")["epoch"] == 2


def test_a_copy_that_was_due_is_written(two_epochs, tmp_path, words):
    shutil.copytree(two_epochs, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoint0001.pth").unlink()  # killed between checkpoint.pth and it
    train_dino(options(*words))
    assert (tmp_path / "checkpoint0001.pth").read_bytes() == (tmp_path / "checkpoint.pth").read_bytes()


@pytest.mark.parametrize("name", ["checkpoint.pth", "previous.pth"])
@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: path.symlink_to("nothing")])
def test_a_folder_or_a_link_to_nothing_is_refused_at_the_start(tmp_path, words, name, make):
    make(tmp_path / name)
    with pytest.raises(ConfigError, match=rf"{name} is a (folder|broken link), not a checkpoint to resume from"):
        train_dino(options(*words))


def test_a_file_system_without_hard_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    folder = RunFolder(tmp_path)
    for number in (1, 2, 3):
        folder.save({"number": number})
    assert (load(folder.last)["number"], load(folder.previous)["number"]) == (3, 2)
    assert len(list(tmp_path.iterdir())) == 2


# ----------------------------------------------------------------------------------------------------------------------
# Bytes


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    path = tmp_path_factory.mktemp("sound") / "checkpoint.pth"
    write_checkpoint({"student": {f"w{i}": torch.randn(40, 30) for i in range(5)}, "epoch": 3, "args": {}}, path)
    return path


def same_content(path, sound):
    try:
        assert_same(read_checkpoint(path), read_checkpoint(sound))
    except CheckpointError as error:
        return "\n" not in str(error)
    return True


def test_no_flipped_bit_is_loaded_without_a_word(sound, tmp_path):
    """400 places: each file is refused, or holds what was written (a bit of the padding between records)."""
    data, rng, refused = sound.read_bytes(), random.Random(0), 0
    for _ in range(400):
        changed, place = bytearray(data), rng.randrange(len(data))
        changed[place] ^= 1 << rng.randrange(8)
        (tmp_path / "x.pth").write_bytes(changed)
        assert same_content(tmp_path / "x.pth", sound), place
        try:
            read_checkpoint(tmp_path / "x.pth")
        except CheckpointError:
            refused += 1
    assert refused > 300


def test_no_cut_file_is_loaded(sound, tmp_path):
    """100 lengths."""
    data, rng = sound.read_bytes(), random.Random(1)
    for length in [*range(10), *rng.sample(range(10, len(data)), 90)]:
        (tmp_path / "x.pth").write_bytes(data[:length])
        with pytest.raises(CheckpointError, match="^[^\n]*$"):
            read_checkpoint(tmp_path / "x.pth")


def test_files_without_checksums_load(sound, tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(load(sound), tmp_path / "x.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same(read_checkpoint(tmp_path / "x.pth"), load(sound))


# ----------------------------------------------------------------------------------------------------------------------
# Disks


@pytest.mark.parametrize("closed", [False, True])
def test_an_output_that_cannot_be_written_does_not_end_a_run(tmp_path, words, monkeypatch, closed):
    """A log on a full disk; the pipe of `| tee log`, which Ctrl-C ends before the run has saved."""
    read, write = os.pipe()
    os.close(read)
    output = open(write if closed else "/dev/full", "w")
    monkeypatch.setattr("sys.stdout", output)
    train_dino(options(*words, "--log_every", 1))
    with pytest.raises(BrokenPipeError if closed else OSError):
        output.close()
    assert load(tmp_path / "checkpoint.pth")["epoch"] == 2


def failing_save(monkeypatch, number, times):
    save, calls = torch.save, []

    def fail(state, file):
        calls.append(1)
        if len(calls) in times:
            raise OSError(number, os.strerror(number))
        save(state, file)

    monkeypatch.setattr(torch, "save", fail)
    return calls


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_save_that_fails_for_now_is_tried_again(tmp_path, words, two_epochs, monkeypatch, capsys, number):
    calls = failing_save(monkeypatch, number, times={1})
    train_dino(options(*words))
    assert f"cannot be written: {os.strerror(number)}; training goes on" in capsys.readouterr().out and len(calls) == 2
    assert_same(load(tmp_path / "checkpoint.pth")["student"], load(two_epochs / "checkpoint.pth")["student"])
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 2


@pytest.mark.parametrize("number, times", [(errno.EROFS, {1}), (errno.ENOSPC, {2}), (errno.ENOENT, {2})])
def test_a_save_that_cannot_succeed_ends_the_run(tmp_path, words, monkeypatch, number, times):
    failing_save(monkeypatch, number, times)
    with pytest.raises(TrainingError, match="cannot be written"):
        train_dino(options(*words))
    assert not list(tmp_path.glob(".*")) and not (tmp_path / "run.lock").exists()


@pytest.mark.slow
def test_a_disk_that_is_really_full(tmp_path, image_folder):
    """A tmpfs that has room for one checkpoint: the first save is kept, the later ones are tried, the last one ends."""
    script = (f"mount -t tmpfs -o size=1200k none {tmp_path} && {sys.executable} -W ignore {SCRIPT} --arch vit_tiny "
              "--global_crops_size 48 --local_crops_size 48 --local_crops_number 1 --out_dim 64 --out_dim_selfpatch 32 "
              f"--batch_size_per_gpu 4 --num_workers 0 --warmup_epochs 1 --device cpu --saveckp_freq 0 --epochs 3 "
              f"--data_path {image_folder} --output_dir {tmp_path}/run; echo status $?; ls -A {tmp_path}/run")
    result = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, timeout=180)
    if "status" not in result.stdout:
        pytest.skip(f"no mounts in a user namespace here: {result.stderr.strip()[-100:]}")
    assert "status 1" in result.stdout and "training goes on" in result.stdout
    assert result.stderr.count("\n") == 1 and "No space left on device" in result.stderr
    assert "checkpoint.pth" in result.stdout.split("status 1")[1] and ".tmp" not in result.stdout.split("status 1")[1]


def test_a_copy_that_finds_no_room_is_tried_again(tmp_path, monkeypatch, capsys):
    folder, link = RunFolder(tmp_path), os.link

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder.try_save({"number": 0})
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", lambda source, target: full() if "0001" in str(target) else link(source, target))
        patch.setattr("shutil.copyfile", full)
        folder.try_save({"number": 1}, epoch=1)
        assert "checkpoint0001.pth cannot be written: No space left" in capsys.readouterr().out
        folder.try_save({"number": 1.5})  # still full
        assert not folder.numbered(1).exists() and load(folder.last)["number"] == 1.5
        folder.try_save({"number": 2}, epoch=2)
        folder.numbered(2).unlink()
        folder.overdue_copy = 2
    folder.try_save({"number": 3}, epoch=3)
    assert [load(folder.numbered(epoch))["number"] for epoch in (2, 3)] == [2, 3]
    assert load(folder.previous)["number"] == 2


def test_bad_images_on_a_full_disk_are_a_warning(tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder = RunFolder(tmp_path)
    folder.add_bad_images({"a.jpg"}, 10)
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", full)
        folder.add_bad_images({"b.jpg"}, 10)
    out = capsys.readouterr().out
    assert "bad_images.txt (No space left on device); the next save will try again" in out
    folder.add_bad_images({"a.jpg", "b.jpg", "\udcff.jpg"}, 10)
    assert (tmp_path / "bad_images.txt").read_bytes().splitlines() == [b"a.jpg", b"b.jpg", b"\xff.jpg"]
    assert [path.name for path in tmp_path.iterdir()] == ["bad_images.txt"]
