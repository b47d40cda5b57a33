# the same with patches of 8 pixels: four times as many tokens
_base_ = ['semantic_fpn_vit-small-16_8xb4-40k_ade20k-512x512.py']
model = dict(backbone=dict(patch_size=8))
