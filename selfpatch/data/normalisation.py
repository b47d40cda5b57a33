"""Normalisation of RGB images by the mean and standard deviation of each channel."""
import torch

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalise(pixels: torch.Tensor, statistics: tuple = (IMAGENET_MEAN, IMAGENET_STD)) -> torch.Tensor:
    """RGB uint8 [..., 3, H, W] -> float32 [..., 3, H, W].

    Args:
        statistics: mean and standard deviation of each channel, of values in 0 … 1.
    """
    mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in statistics)
    return (pixels / 255 - mean) / std
