# the same with a ViT-B/16
_base_ = ['semantic_fpn_vit-small-16_8xb4-40k_ade20k-512x512.py']
model = dict(backbone=dict(embed_dim=768, num_heads=12), neck=dict(in_channels=[768, 768, 768, 768]))
