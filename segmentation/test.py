"""Evaluate a fine-tuned segmenter on ADE20K, one of ours or a released one, and draw what it predicts.

    python segmentation/test.py segmentation/configs/semantic-fpn_vit-small-16_40k_ade20k.py model.pth --show-dir drawn
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the backbone and what the jobs share

import openmmlab
from segmentation.backbone import annotation_errors, check_widths


def show(cfg: openmmlab.Config, folder: str) -> None:
    """Have mmseg draw every image with its annotation (left) and prediction (right) into folder, an absolute path."""
    cfg.default_hooks.visualization.update(draw=True, interval=1)  # stock mmseg would draw every 50th image alone
    cfg.visualizer.vis_backends = [{"type": "LocalVisBackend", "img_save_dir": folder}]


if __name__ == "__main__":
    args = openmmlab.get_test_parser(__doc__.split("\n\n")[0]).parse_args()
    with annotation_errors():
        openmmlab.test(args, show, check=check_widths)
