"""Fine-tune a segmenter on ADE20K from a pretrained backbone.

    python segmentation/train.py segmentation/configs/semantic-fpn_vit-small-16_40k_ade20k.py --pretrained runs/small
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root
from selfpatch.errors import run_main


def main() -> None:
    from selfpatch.openmmlab.jobs import run_job  # here, so that missing packages are reported in one line
    run_job("train", "segmentation.backbone", __doc__.split("\n\n")[0])


if __name__ == "__main__":
    run_main(main)
