# UperNet with ViT-B/16
_base_ = ['upernet_vit-small-16_160k_ade20k.py']
model = dict(
    backbone=dict(embed_dim=768, num_heads=12),
    neck=dict(in_channels=[768, 768, 768, 768], out_channels=768),
    decode_head=dict(in_channels=[768, 768, 768, 768]),
    auxiliary_head=dict(in_channels=768))
