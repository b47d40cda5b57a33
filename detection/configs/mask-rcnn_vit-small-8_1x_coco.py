# Mask R-CNN 1x with ViT-S/8: four times as many tokens
_base_ = ['mask-rcnn_vit-small-16_1x_coco.py']
model = dict(backbone=dict(patch_size=8))
