"""Fine-tune a segmenter on ADE20K from a pretrained backbone.

    cd segmentation/configs; C=semantic_fpn_vit-small-16_8xb4-40k_ade20k-512x512.py
    python ../train.py $C --pretrained checkpoint.pth --data-root /path/to/ADEChallengeData2016
    ../dist_train.sh $C 8 --pretrained checkpoint.pth --data-root /path/to/ADEChallengeData2016
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
