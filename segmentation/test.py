"""Evaluate a fine-tuned or released segmenter on ADE20K, and draw its predictions.

    python segmentation/test.py segmentation/configs/semantic-fpn_vit-small-16_40k_ade20k.py model.pth --show-dir drawn
"""
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root
from selfpatch.errors import run_main


def main() -> None:
    # imported here so that missing packages are reported in one line
    from selfpatch.openmmlab import jobs as openmmlab
    # isort: split
    from segmentation.backbone import check_channels
    from selfpatch.openmmlab.config import config_from_args, get_test_parser

    args = get_test_parser(__doc__.split("\n\n")[0]).parse_args()
    cfg = config_from_args(args)
    check_channels(cfg)
    if args.show_dir:  # every image (by default mmseg draws each 50th), annotation on the left, prediction on the right
        cfg.default_hooks.visualization.update(draw=True, interval=1)
        cfg.visualizer.vis_backends = [{"type": "LocalVisBackend", "img_save_dir": os.path.abspath(args.show_dir)}]
    openmmlab.evaluate(cfg, args.checkpoint)


if __name__ == "__main__":
    run_main(main)
