"""Fine-tune a segmenter on ADE20K from a pretrained backbone.

    python segmentation/train.py segmentation/configs/semantic-fpn_vit-small-16_40k_ade20k.py --pretrained runs/small
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the backbone and what the jobs share

import openmmlab
from segmentation.backbone import annotation_errors, check_widths

if __name__ == "__main__":
    args = openmmlab.get_train_parser(__doc__.split("\n\n")[0]).parse_args()
    with annotation_errors():
        openmmlab.train(args, own_grid=False, check=check_widths)
