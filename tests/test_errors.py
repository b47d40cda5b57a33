"""Options that name a path: ~ is the home folder in every job."""
import os

import pytest

import convert_checkpoint
import davis_metrics
import eval_video_segmentation
import main_selfpatch
import visualize
from selfpatch.errors import ArgumentParser, Number

HOME = os.path.expanduser("~")


@pytest.mark.parametrize("parser, words, options", [
    (main_selfpatch, ["--data_path=~/images", "--output_dir=~/x"], ["data_path", "output_dir"]),
    (eval_video_segmentation, ["--data_path=~/d", "--output_dir=~/x", "--pretrained_weights=~/w.pth"],
     ["data_path", "output_dir", "pretrained_weights"]),
    (davis_metrics, ["--davis_path=~/d", "--results_path=~/x"], ["davis_path", "results_path"]),
    (visualize, ["overlay", "--davis_path=~/d", "--results", "~/x", "--output=~/o.gif"], ["davis_path", "output"]),
    (visualize, ["attention", "--image_path=~/i.jpg", "--pretrained_weights=~/w", "--output=~/o.png"],
     ["image_path", "pretrained_weights", "output"]),
    (convert_checkpoint, ["~/a.pth", "~/b.pth", "--to", "timm"], ["input", "output"])])
def test_tilde_is_the_home_folder(parser, words, options):
    args = parser.get_args_parser().parse_args(words)
    for name in options:
        assert str(getattr(args, name)).startswith(f"{HOME}/"), name


@pytest.mark.parametrize("limits, text, says", [
    ({"kind": int, "least": 1}, "0", "it is 0, and must be at least 1"),
    ({"kind": int}, "1.5", "invalid int value: '1.5'"),
    ({"kind": float, "above": 0}, "nan", "it is nan, and must be above 0 and finite"),
    ({"kind": float, "above": 0}, "inf", "it is inf, and must be above 0 and finite"),
    ({"kind": float, "above": -1, "below": 1}, "1", "it is 1.0, and must be above -1 and below 1")])
def test_numbers_out_of_range(limits, text, says, capsys):
    parser = ArgumentParser()
    parser.add_argument("--x", type=Number(**limits))
    with pytest.raises(SystemExit) as end:
        parser.parse_args(["--x", text])
    assert end.value.code == 2 and f"argument --x: {says} (--help" in capsys.readouterr().err
    assert parser.parse_args(["--x", "0.5" if limits["kind"] is float else "2"]).x in (0.5, 2)
