# 12 epochs, 1000 iterations of warm-up, learning rate divided by 10 after 8 and 11 epochs
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=12, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type='MultiStepLR', begin=0, end=12, by_epoch=True, milestones=[8, 11], gamma=0.1)]

# matched by name, as published: only the backbone's norm1 and norm2 match 'norm', so fpn1's SyncBN (fpn1.1) is decayed
optim_wrapper = dict(
    type='AmpOptimWrapper',  # mixed precision with a dynamic loss scale, as published; float32 without a GPU
    optimizer=dict(type='AdamW', lr=5e-5, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(custom_keys={
        'pos_embed': dict(decay_mult=0.0), 'cls_token': dict(decay_mult=0.0), 'norm': dict(decay_mult=0.0)}))
