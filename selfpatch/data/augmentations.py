"""DINO's multi-crop augmentation in PIL (Caron et al. 2021, Sec. 3.2, with BYOL's colour transforms)."""
import torch
from PIL import Image, ImageFilter
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from selfpatch.data.normalisation import IMAGENET_MEAN, IMAGENET_STD


class GaussianBlur:
    """Gaussian blur with probability p; PIL's radius, the standard deviation in pixels, is uniform in 0.1 … 2."""

    def __init__(self, p: float = 0.5, radius_min: float = 0.1, radius_max: float = 2.0):
        self.p, self.radius_min, self.radius_max = p, radius_min, radius_max

    def __call__(self, image: Image.Image) -> Image.Image:
        if torch.rand(()) >= self.p:
            return image
        radius = torch.empty(()).uniform_(self.radius_min, self.radius_max).item()
        return image.filter(ImageFilter.GaussianBlur(radius))


class DataAugmentationDINO:
    """PIL image -> list of normalised crops: 2 of global_crops_size, then local_crops_number of local_crops_size.

    Args:
        global_crops_scale, local_crops_scale: (least, most) share of the image's area that a crop covers.
    """

    def __init__(self, global_crops_scale: tuple[float, float], local_crops_scale: tuple[float, float],
                 local_crops_number: int, global_crops_size: int = 224, local_crops_size: int = 96):
        self.local_crops_number = local_crops_number
        self.global_transfo1 = self._pipeline(global_crops_size, global_crops_scale, blur=1.0)
        self.global_transfo2 = self._pipeline(global_crops_size, global_crops_scale, blur=0.1, solarize=0.2)
        self.local_transfo = self._pipeline(local_crops_size, local_crops_scale, blur=0.5)

    @staticmethod
    def _pipeline(size: int, scale: tuple[float, float], blur: float, solarize: float = 0.0) -> transforms.Compose:
        return transforms.Compose([
            transforms.RandomResizedCrop(size, tuple(scale), interpolation=InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(0.5),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            transforms.RandomGrayscale(0.2),
            GaussianBlur(blur),
            *([transforms.RandomSolarize(128, solarize)] if solarize else []),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)])

    def __call__(self, image: Image.Image) -> list[torch.Tensor]:
        crops = [self.global_transfo1(image), self.global_transfo2(image)]
        return crops + [self.local_transfo(image) for _ in range(self.local_crops_number)]
