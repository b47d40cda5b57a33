# Mask R-CNN 1x with ViT-S/16 and 6 heads as in pretraining; recommended for fine-tuning
_base_ = [
    '_base_/models/mask-rcnn_vit.py',
    '_base_/datasets/coco_instance.py',
    '_base_/schedules/schedule_1x.py',
    '_base_/default_runtime.py']
