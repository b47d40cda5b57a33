"""Evaluate a detector on COCO, box and mask AP, and draw its predictions.

    python detection/test.py detection/configs/mask-rcnn_vit-small-16_1x_coco.py detector.pth --show-dir drawn
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
    from detection.backbone import check_channels
    from selfpatch.openmmlab.config import config_from_args, get_test_parser

    args = get_test_parser(__doc__.split("\n\n")[0]).parse_args()
    cfg = config_from_args(args)
    check_channels(cfg)
    if args.show_dir:  # every image, with annotations on the left and predictions on the right
        cfg.default_hooks.visualization.update(draw=True, test_out_dir=os.path.abspath(args.show_dir))
    openmmlab.evaluate(cfg, args.checkpoint)


if __name__ == "__main__":
    run_main(main)
