"""Evaluate a detector on COCO, box and mask AP, and draw what it finds.

    python detection/test.py detection/configs/mask-rcnn_vit-small-16_1x_coco.py detector.pth --show-dir drawn
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import openmmlab
from detection.backbone import check_widths


def show(cfg: openmmlab.Config, folder: str) -> None:
    """Have mmdet draw every image with its annotations (left) and predictions (right) into folder."""
    cfg.default_hooks.visualization.update(draw=True, test_out_dir=folder)


if __name__ == "__main__":
    openmmlab.test(openmmlab.get_test_parser(__doc__.split("\n\n")[0]).parse_args(), show, check_widths)
