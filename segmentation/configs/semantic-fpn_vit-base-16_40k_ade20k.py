# Semantic FPN with ViT-B/16
_base_ = ['semantic-fpn_vit-small-16_40k_ade20k.py']
model = dict(backbone=dict(embed_dim=768, num_heads=12), neck=dict(in_channels=[768, 768, 768, 768]))
