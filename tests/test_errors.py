"""Options that name a path: ~ is the home folder in every job."""
import os

import pytest

import convert_checkpoint
import davis_metrics
import eval_video_segmentation
import main_selfpatch
import visualize

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
