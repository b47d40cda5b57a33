"""Fine-tune Mask R-CNN on COCO from a pretrained backbone.

    python detection/train.py detection/configs/mask-rcnn_vit-small-16_1x_coco.py --pretrained checkpoint.pth
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import openmmlab
from detection.backbone import check_widths

if __name__ == "__main__":
    openmmlab.train(openmmlab.get_train_parser(__doc__.split("\n\n")[0]).parse_args(), own_grid=True,
                    check=check_widths)
