"""Fine-tune a segmenter on ADE20K from a pretrained backbone.

    python segmentation/train.py segmentation/configs/semantic-fpn_vit-small-16_40k_ade20k.py --pretrained runs/small
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root
from selfpatch.errors import run_main


def main() -> None:
    # imported here so that missing packages are reported in one line
    from selfpatch.openmmlab import jobs as openmmlab
    # isort: split
    from segmentation.backbone import check_channels
    from selfpatch.openmmlab.config import config_from_args, get_train_parser

    args = get_train_parser(__doc__.split("\n\n")[0]).parse_args()
    cfg = config_from_args(args)
    check_channels(cfg)
    openmmlab.train(cfg, args.pretrained, args.checkpoint_key, args.random_weights, args.resume, args.amp,
                    keep_grid=False)


if __name__ == "__main__":
    run_main(main)
