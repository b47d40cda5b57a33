"""JPEGs for timing without a dataset."""
from pathlib import Path

import numpy as np
from PIL import Image


def make_images(folder: Path, count: int = 64, size: tuple[int, int] = (500, 375)) -> None:
    """Write JPEGs that resemble photographs: gradients, texture of every scale, hard edges."""
    rng, (width, height) = np.random.default_rng(0), size
    (folder / "made").mkdir()
    for i in range(count):
        picture = np.zeros((height, width, 3))
        for scale in (2, 5, 20, 80, 400):
            noise = rng.integers(0, 256, (scale * 3 // 4 + 1, scale, 3), dtype=np.uint8)
            picture += np.asarray(Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)) / 5
        x, y = rng.integers(0, width // 2), rng.integers(0, height // 2)
        picture[y:y + height // 3, x:x + width // 3] = rng.integers(0, 256, 3)
        Image.fromarray(picture.astype(np.uint8)).save(folder / "made" / f"{i:03}.jpg", quality=92)
