# Semantic FPN with ViT-S/8: four times as many tokens
_base_ = ['semantic-fpn_vit-small-16_40k_ade20k.py']
model = dict(backbone=dict(patch_size=8))
