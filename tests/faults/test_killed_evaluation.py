"""A killed evaluation: the same command keeps the videos that it finished, and removes its temporary folders."""
import shutil

import numpy as np
import pytest
from davis_folder import UNTRAINED, make_davis, run

import eval_video_segmentation as job
from selfpatch.video.davis import read_mask

DEAD_PID = 2**22 + 1  # above the largest that Linux gives


@pytest.fixture
def data(tmp_path):
    return make_davis(tmp_path / "data", "a", "b", "c")


def interrupt_at(monkeypatch, name):
    """Interrupt the job at a video; return the list of videos that it segments."""
    segment, done = job.segment, []

    def interrupted(sequence, *args, **kwargs):
        if sequence.name == name:
            raise KeyboardInterrupt
        done.append(sequence.name)
        return segment(sequence, *args, **kwargs)

    monkeypatch.setattr(job, "segment", interrupted)
    return done


def masks_of(output):
    return {path.relative_to(output): read_mask(path).ids for path in sorted(output.rglob("*.png"))}


def test_the_same_command_goes_on(data, tmp_path, monkeypatch, capsys):
    whole, output = tmp_path / "whole", tmp_path / "masks"
    assert run(data, whole, *UNTRAINED) == 0
    expected = capsys.readouterr().out
    with monkeypatch.context() as patch:
        interrupt_at(patch, "c")
        with pytest.raises(KeyboardInterrupt):
            run(data, output, *UNTRAINED)
    done = interrupt_at(monkeypatch, None)
    capsys.readouterr()
    assert run(data, output, *UNTRAINED) == 0
    out, err = capsys.readouterr()
    assert done == ["c"] and "a: kept from the call before" in err and out == expected
    ours, other = masks_of(output), masks_of(whole)
    assert ours.keys() == other.keys() and all(np.array_equal(ours[name], other[name]) for name in ours)
    assert not list(output.glob(".*"))
    run(data, output, *UNTRAINED)  # after a run that ended, everything is computed again
    assert done == ["c", "a", "b", "c"]


@pytest.mark.parametrize("words", [["--seed", "1"], ["--topk", "3"]])
def test_with_other_options_everything_is_done_anew(data, tmp_path, monkeypatch, words):
    with monkeypatch.context() as patch:
        interrupt_at(patch, "b")
        with pytest.raises(KeyboardInterrupt):
            run(data, tmp_path / "masks", *UNTRAINED)
    done = interrupt_at(monkeypatch, None)
    run(data, tmp_path / "masks", *UNTRAINED, *words)
    assert done == ["a", "b", "c"]


def test_older_results_are_not_taken_for_finished_ones(data, tmp_path, monkeypatch):
    """A whole run with other options, then one that is interrupted at its first video."""
    run(data, tmp_path / "masks", *UNTRAINED, "--seed", "1")
    with monkeypatch.context() as patch:
        interrupt_at(patch, "a")
        with pytest.raises(KeyboardInterrupt):
            run(data, tmp_path / "masks", *UNTRAINED)
    done = interrupt_at(monkeypatch, None)
    run(data, tmp_path / "masks", *UNTRAINED)
    assert done == ["a", "b", "c"]


def test_leftovers_of_a_killed_process_are_removed_or_put_back(data, tmp_path):
    output = tmp_path / "masks"
    assert run(data, output, *UNTRAINED) == 0
    (output / "a").rename(output / f".a.{DEAD_PID}.old")  # killed between the two renames
    shutil.copytree(output / "b", output / f".b.{DEAD_PID}.tmp")
    job.Unfinished(output, {}).begin()
    assert sorted(path.name for path in output.iterdir()) == [".unfinished.json", "a", "b", "c"]
