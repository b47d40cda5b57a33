"""Evaluate a fine-tuned or released segmenter on ADE20K, and draw its predictions.

    python segmentation/test.py segmentation/configs/semantic-fpn_vit-small-16_40k_ade20k.py model.pth --show-dir drawn
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root
from selfpatch.errors import run_main


def main() -> None:
    # here and in this order, so that missing packages are reported in one line
    from selfpatch.openmmlab.jobs import run_job
    # isort: split
    from segmentation import backbone
    run_job("test", backbone, __doc__)


if __name__ == "__main__":
    run_main(main)
