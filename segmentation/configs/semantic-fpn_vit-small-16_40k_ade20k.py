# Semantic FPN, 40k iterations, 8 GPUs × 4 images: published mIoU 41.2 (DINO 38.3)
_base_ = [
    '_base_/models/semantic-fpn_vit.py',
    '_base_/datasets/ade20k.py',
    '_base_/schedules/schedule_40k.py',
    '_base_/default_runtime.py',
]
