"""Patch features of video frames, computed in batches while the next frames are read."""
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from selfpatch.checkpoints.backbones import Backbone, image_statistics
from selfpatch.data.normalisation import IMAGENET_MEAN, IMAGENET_STD, normalise
from selfpatch.distributed.precision import autocast
from selfpatch.video.davis import DataError, Sequence, load_frame, orientation_note

MEAN = (0.485, 0.456, 0.406)
STD = (0.228, 0.224, 0.225)  # 0.228, not ImageNet's 0.229, as in DINO's published DAVIS protocol


class FrameFeatures:
    """Patch features of frames, in batches; when memory runs out, the batch size is halved for good.

    Args:
        model: the backbone; its final norm, if any, is applied, as in DINO's script.
        dtype: of autocast; float32 disables it.
        batch_size: frames per forward pass.
        layer: block to take the features from; -1 is the last.
    """

    def __init__(self, model: Backbone, device: torch.device | str = "cpu",
                 dtype: torch.dtype = torch.float32, batch_size: int = 6, layer: int = -1):
        self.model, self.device, self.dtype, self.batch_size = model, torch.device(device), dtype, batch_size
        self.layer = layer
        own = image_statistics(model)
        self.statistics = (MEAN, STD) if own == (IMAGENET_MEAN, IMAGENET_STD) else own

    def forward(self, frames: np.ndarray) -> torch.Tensor:
        """Compute __call__ in a single batch."""
        images = normalise(torch.from_numpy(frames).to(self.device).permute(0, 3, 1, 2), self.statistics)
        shape = [n * self.model.patch_size for n in self.model.grid_size(images)]
        if list(images.shape[2:]) != shape:  # patches of 14: they must cover the whole frame, as labels do
            images = F.interpolate(images, shape, mode="bilinear", align_corners=False)
        with autocast(self.device, self.dtype):
            features = self.model.features(images, self.layer).patches
        return F.normalize(features.float(), dim=-1).unflatten(1, self.model.grid_size(images))

    def __call__(self, frames: np.ndarray) -> torch.Tensor:
        """RGB, uint8 [B, H, W, 3] -> features of unit length, float32 [B, h, w, D].

        Raises:
            DataError: out of memory with a single frame.
        """
        features, start = [], 0
        while start < len(frames):
            try:
                features.append(self.forward(frames[start:start + self.batch_size]))
                start += self.batch_size
                continue
            except RuntimeError as error:
                if not (isinstance(error, torch.cuda.OutOfMemoryError) or "allocate memory" in str(error)):
                    raise
            if self.batch_size == 1:
                raise DataError(f"out of memory with a single frame of {frames.shape[2]}×{frames.shape[1]}")
            self.batch_size //= 2
            torch.cuda.empty_cache()
            tqdm.write(f"out of memory: continuing with --bs {self.batch_size}", file=sys.stderr)
        return torch.cat(features)


def prefetch(executor: Executor, function: Callable, items: Iterable, depth: int) -> Iterator:
    """Yield function(item) for every item in order, computing up to depth items ahead in other threads."""
    pending = deque()
    try:
        for item in items:
            pending.append(executor.submit(function, item))
            if len(pending) > depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


def frame_features(sequence: Sequence, extract: FrameFeatures, shape: tuple[int, int],
                   executor: Executor) -> Iterator[torch.Tensor]:
    """Yield the features [h, w, D] of each frame of a video; report the first EXIF orientation tag.

    Args:
        shape: required (height, width) of every frame.
        executor: threads to read frames with.
    """
    batch, noted = [], False
    loaded = prefetch(executor, partial(load_frame, shape=shape), sequence.frames, 2 * extract.batch_size)
    for path, frame in zip(sequence.frames, loaded, strict=True):
        if not noted and (note := orientation_note(path, frame.orientation)):
            tqdm.write(note, file=sys.stderr)
            noted = True
        batch.append(frame.image)
        if len(batch) >= extract.batch_size or path == sequence.frames[-1]:
            yield from extract(np.stack(batch))
            batch = []
