"""Mask R-CNN, Semantic FPN and UperNet through mmdetection and mmsegmentation."""
