"""Fine-tune Mask R-CNN on COCO from a pretrained backbone.

    python detection/train.py detection/configs/mask-rcnn_vit-small-16_1x_coco.py --pretrained checkpoint.pth
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root
from selfpatch.errors import run_main


def main() -> None:
    # here and in this order, so that missing packages are reported in one line
    from selfpatch.openmmlab.jobs import run_job
    # isort: split
    from detection import backbone
    run_job("train", backbone, __doc__)


if __name__ == "__main__":
    run_main(main)
