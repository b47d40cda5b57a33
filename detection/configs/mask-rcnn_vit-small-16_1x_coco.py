# Mask R-CNN 1x with ViT-S/16 as it is pretrained, with 6 heads: the one to fine-tune
_base_ = [
    '_base_/models/mask-rcnn_vit.py',
    '_base_/datasets/coco_instance.py',
    '_base_/schedules/schedule_1x.py',
    '_base_/default_runtime.py']
