# Mask R-CNN 1x with ViT-B/16
_base_ = ['mask-rcnn_vit-small-16_1x_coco.py']
model = dict(backbone=dict(embed_dim=768, num_heads=12), neck=dict(in_channels=[768, 768, 768, 768]))
