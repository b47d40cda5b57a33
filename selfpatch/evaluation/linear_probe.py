"""Linear classifiers on frozen features, many at once: one pass of the backbone feeds a grid of heads.

Data and features are DINO's (Caron et al. 2021, Sec. 4.1), the grid is DINOv2's (Oquab et al. 2023, App. B.3): heads
differ in learning rate, in how many blocks they see, and in whether they see the mean of the patches; the best counts.
"""
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from tqdm import tqdm

from selfpatch.checkpoints.backbones import Backbone
from selfpatch.data.normalisation import normalise
from selfpatch.data.seeds import seeded
from selfpatch.distributed.collectives import sum_over_processes
from selfpatch.distributed.precision import autocast
from selfpatch.distributed.processes import get_rank, get_world_size, together
from selfpatch.distributed.workers import worker_options
from selfpatch.errors import ConfigError
from selfpatch.evaluation.image_features import ImageFeature, check_finite
from selfpatch.evaluation.labelled_images import LabelledImages

LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)  # for 256 images
MOMENTUM = 0.9


# ---------------------------------------------------------------- features

def train_transform(size: int = 224) -> v2.Transform:
    """PIL image -> uint8 [3, size, size]: a random crop of 8 to 100 % of the area, bilinear, flipped or not."""
    return v2.Compose([v2.RandomResizedCrop(size, (0.08, 1.0)), v2.RandomHorizontalFlip(), v2.PILToTensor()])


class TokenFeature:
    """uint8 images [B, 3, H, W] on the device -> tokens [B, n + 1, D], float32: what heads see of a frozen backbone.

    Row i < n is the class token of the i-th of the last n blocks, or for kind mean, the mean of its patches; for kind
    head, n is 1 and the row is the SelfPatch head's class token. The last row is the mean of the last block's patches.

    Args:
        feature: backbone, kind, last block, head and dtype.
        blocks: n.

    Raises:
        ConfigError: there are fewer than n blocks up to the feature's layer.
    """

    def __init__(self, feature: ImageFeature, blocks: int):
        model: Backbone = feature.model
        last = range(len(model.blocks))[feature.layer]
        self.blocks = 1 if feature.kind == "head" else blocks
        if self.blocks > last + 1:
            raise ConfigError(f"--n_last_blocks {blocks}: there are {last + 1} blocks up to --layer {feature.layer}")
        self.layers = list(range(last + 1 - self.blocks, last + 1))
        self.feature, self.dim = feature, feature.dim

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        f = self.feature
        x = normalise(images, f.statistics)
        with autocast(x.device, f.dtype):
            found = f.model.intermediate_features(x, self.layers)
            mean = found[-1].patches.mean(1)
            if f.kind == "head":
                tokens = [f.head.image_token(found[-1].patches)[:, 0]]
            elif f.kind == "cls":
                tokens = [one.class_token for one in found]
            else:
                tokens = [one.patches.mean(1) for one in found]
        return torch.stack([*tokens, mean], dim=1).float()


class Inputs(NamedTuple):
    """The tokens that a head sees: those of the last blocks, perhaps with the mean of the last block's patches."""
    blocks: int
    mean_patches: bool

    def width(self, dim: int) -> int:
        """Inputs of a head for tokens of width dim."""
        return dim * (self.blocks + self.mean_patches)

    def select(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens [B, n + 1, D] of TokenFeature -> [B, width]."""
        n = tokens.shape[1] - 1
        return tokens[:, n - self.blocks:n + self.mean_patches].flatten(1)


def input_grid(kind: str, blocks: Sequence[int]) -> list[Inputs]:
    """The inputs to try for a kind of feature; kind mean has the mean only once."""
    counts = (1,) if kind == "head" else sorted(set(blocks))
    return [Inputs(n, mean) for n in counts for mean in ((False,) if kind == "mean" else (False, True))]


# ---------------------------------------------------------------- heads

class Heads:
    """Linear classifiers on the same inputs, one for each learning rate, trained by SGD with momentum, without decay.

    Weights [L, C, width] start as N(0, 0.01²), biases [L, C] as 0. Gradients are computed by hand rather than by
    autograd: for cross-entropy they are two products, which all heads share.

    Args:
        inputs: the tokens that the heads see.
        dim: width of a token.
        lrs: L learning rates, at the start of a cosine to 0.
        generator: of the initial weights; None for torch's global one.
    """

    def __init__(self, inputs: Inputs, dim: int, num_classes: int, lrs: Sequence[float],
                 generator: torch.Generator | None = None, device: torch.device | str = "cpu"):
        self.inputs, self.lrs = inputs, torch.tensor(lrs, device=device)
        shape = len(lrs), num_classes, inputs.width(dim)
        self.weight = (0.01 * torch.randn(shape, generator=generator)).to(device)
        self.bias = torch.zeros(shape[:2], device=device)
        self.momenta = [torch.zeros_like(self.weight), torch.zeros_like(self.bias)]

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens [B, n + 1, D] -> [B, L, C]."""
        x = self.inputs.select(tokens)
        return (x @ self.weight.flatten(0, 1).T).unflatten(1, self.bias.shape) + self.bias

    def step(self, tokens: torch.Tensor, labels: torch.Tensor, count: int, factor: float) -> torch.Tensor:
        """Take a step with every head; returns their cross-entropies [L], summed over the images and divided by count.

        Args:
            tokens, labels: of this process's images, [B, n + 1, D] and [B].
            count: images in the step over all processes.
            factor: multiplies the learning rates.
        """
        log_probs = self.logits(tokens).log_softmax(-1)
        index = labels[:, None, None].expand(-1, len(self.lrs), 1)
        loss = -log_probs.gather(2, index).sum((0, 2)) / count
        slope = log_probs.exp_().scatter_add_(2, index, log_probs.new_full((1, 1, 1), -1).expand_as(index)) / count
        gradients = [(slope.flatten(1).T @ self.inputs.select(tokens)).view_as(self.weight), slope.sum(0)]
        for parameter, gradient, momentum in zip((self.weight, self.bias), gradients, self.momenta, strict=True):
            momentum.mul_(MOMENTUM).add_(sum_over_processes(gradient))
            parameter -= momentum * (factor * self.lrs).view(-1, *(1,) * (parameter.dim() - 1))
        return loss


def build_heads(inputs: list[Inputs], dim: int, num_classes: int, batch_size: int,
                lrs: Sequence[float] = LEARNING_RATES, seed: int = 0,
                device: torch.device | str = "cpu") -> list[Heads]:
    """The grid of heads, the same in every process.

    Args:
        inputs: from input_grid.
        batch_size: images in a step over all processes.
        lrs: learning rates to try, for 256 images in a step.
        seed: of the initial weights.
    """
    generator = torch.Generator().manual_seed(seed)
    scaled = [lr * batch_size / 256 for lr in lrs]
    return [Heads(one, dim, num_classes, scaled, generator, device) for one in inputs]


# ---------------------------------------------------------------- training and testing

class CropDataset(torch.utils.data.Dataset):
    """(crop, class, error) of LabelledImages; seed, epoch and image determine the crop."""

    def __init__(self, images: LabelledImages, seed: int = 0):
        self.images, self.seed, self.epoch = images, seed, 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, str]:
        with seeded(self.seed, self.epoch, index):
            return self.images[index]


def epoch_order(count: int, seed: int, epoch: int) -> torch.Tensor:
    """The order [count] of an epoch's images, the same in every process."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed + epoch))


class CropBatches:
    """Batches of crops in a new order each epoch; every process gets its share of each step's images.

    An incomplete last step is dropped. The images of a step do not depend on the number of processes.

    Args:
        batch_size: images of a process in a step; fewer if a step would exceed all images.
        seed: of the order and the crops.
        on_gpu: whether the batches go to a GPU.

    Raises:
        ConfigError: there are fewer images than processes.
    """

    def __init__(self, images: LabelledImages, batch_size: int, num_workers: int = 0, seed: int = 0,
                 on_gpu: bool = False):
        if len(images) < get_world_size():
            raise ConfigError(f"there are {len(images)} training images for {get_world_size()} processes: start fewer")
        self.dataset, self.seed = CropDataset(images, seed), seed
        self.step_size = min(batch_size * get_world_size(), len(images))  # images of a step over all processes
        self.steps = len(images) // self.step_size
        self.num_workers, self.on_gpu = num_workers, on_gpu

    def epoch(self, number: int) -> DataLoader:
        """(crops uint8 [B, 3, H, W], classes [B], errors) of an epoch, a batch a step."""
        order = epoch_order(len(self.dataset), self.seed, number)[:self.steps * self.step_size]
        return self._load(number, [step[get_rank()::get_world_size()] for step in order.split(self.step_size)])

    def share(self, epoch: int = 0) -> DataLoader:
        """One crop of each image of this process's share, images r, r + world size, …, in that order."""
        images = torch.arange(get_rank(), len(self.dataset), get_world_size())
        return self._load(epoch, images.split(-(-self.step_size // get_world_size())))

    def _load(self, epoch: int, batches: Iterable[torch.Tensor]) -> DataLoader:
        self.dataset.epoch = epoch
        return DataLoader(self.dataset, batch_sampler=[batch.tolist() for batch in batches],
                          pin_memory=self.on_gpu, **worker_options(self.num_workers))


def tokens_of(batches: Iterable, feature: TokenFeature, device: torch.device,
              unreadable: set[str]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of images -> (tokens [B, n + 1, D], classes [B]) on the device.

    Unreadable images are left out, and their errors added to unreadable.
    """
    for images, labels, errors in batches:
        unreadable.update(filter(None, errors))
        readable = labels >= 0
        images, labels = images[readable], labels[readable]
        if len(images):
            tokens = feature(images.to(device, non_blocking=True))
            check_finite(tokens)
            yield tokens, labels.to(device)
        else:  # every process must take every step
            yield torch.zeros(0, feature.blocks + 1, feature.dim, device=device), labels.to(device)


class CachedTokens:
    """Tokens of one crop per image, kept in memory in half precision, in place of CropBatches and their features.

    Each process keeps its own share of the images and contributes what it has of each step's: as gradients are summed
    over processes, the contributions may differ in size.
    """

    def __init__(self, batches: CropBatches, feature: TokenFeature, device: torch.device, unreadable: set[str],
                 progress: bool = False):
        self.batches, self.device = batches, device
        loader, parts, images = batches.share(), [], []
        for batch in tqdm(loader, "one crop an image", unit="batch", disable=not progress):
            images.append(batch[1] >= 0)
            parts += [(tokens.half().cpu(), labels.cpu()) for tokens, labels in
                      tokens_of([batch], feature, device, unreadable)]
        self.tokens, self.labels = (torch.cat(part) for part in zip(*parts, strict=True))
        readable = torch.cat(images)
        # each image's row in tokens and labels; -1 for an unreadable file
        self.rows = torch.where(readable, readable.cumsum(0) - 1, -1)

    def epoch(self, number: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(tokens [B, n + 1, D], classes [B]) on the device: this process's images of each step."""
        batches, rank, world_size = self.batches, get_rank(), get_world_size()
        order = epoch_order(len(batches.dataset), batches.seed, number)[:batches.steps * batches.step_size]
        for step in order.split(batches.step_size):
            rows = self.rows[step[step % world_size == rank] // world_size]
            rows = rows[rows >= 0]
            yield self.tokens[rows].float().to(self.device), self.labels[rows].to(self.device)


@torch.inference_mode()
def train_heads(heads: list[Heads], batches: CropBatches, feature: TokenFeature, epochs: int, device: torch.device,
                cache: bool = False, progress: bool = False) -> set[str]:
    """Train all heads, with learning rates on a cosine to 0. Every process calls it.

    Args:
        heads, feature: on the device; the same in every process.
        cache: take one crop per image for all epochs, so that the backbone runs for one epoch only.
        progress: show a progress bar.

    Returns:
        The errors of this process's unreadable files.

    Raises:
        ConfigError: none of the images can be read, or a feature is not finite.
    """
    unreadable = set()
    cached = together(lambda: CachedTokens(batches, feature, device, unreadable, progress)) if cache else None
    total, done, seen = epochs * batches.steps, 0, torch.zeros(1, dtype=torch.long, device=device)
    with tqdm(total=total, desc="training heads", unit="step", disable=not progress) as bar:
        for epoch in range(epochs):
            source = cached.epoch(epoch) if cached else tokens_of(batches.epoch(epoch), feature, device, unreadable)
            for tokens, labels in source:
                factor = 0.5 * (1 + math.cos(math.pi * done / total))
                losses = [one.step(tokens, labels, batches.step_size, factor) for one in heads]
                done += 1
                seen += len(labels)
                bar.update()
                if progress and done % 20 == 0:
                    bar.set_postfix(best_loss=f"{get_world_size() * min(loss.min().item() for loss in losses):.3f}")
    if not sum_over_processes(seen):
        raise ConfigError("none of the training images can be read")
    return unreadable


@torch.inference_mode()
def score_heads(heads: list[Heads], loader: DataLoader, feature: TokenFeature, device: torch.device,
               progress: bool = False) -> tuple[list[torch.Tensor], list[str]]:
    """Top-1 and top-5 accuracy in per cent of each list of heads, [L, 2], over the images of all processes.

    Every process calls it with its share of the images.

    Returns:
        The accuracies, and the errors of this process's unreadable files.

    Raises:
        ConfigError: none of the images can be read, or a feature is not finite.
    """
    hits = torch.zeros(len(heads), len(heads[0].lrs), 2, device=device, dtype=torch.long)
    count, unreadable = torch.zeros(1, device=device, dtype=torch.long), set()
    for tokens, labels in tqdm(tokens_of(loader, feature, device, unreadable), "test images", len(loader), unit="batch",
                               disable=not progress):
        count += len(labels)
        for i, one in enumerate(heads):
            logits = one.logits(tokens)
            own = logits.gather(2, labels[:, None, None].expand(-1, logits.shape[1], 1))
            better = (~(logits <= own)).sum(2)  # classes before the true one; all for a head that is NaN
            hits[i] += torch.stack([(better < 1).sum(0), (better < 5).sum(0)], dim=1)
    if not sum_over_processes(count):
        raise ConfigError("none of the test images can be read")
    # divided on the CPU: MPS has no float64
    return list(100 * sum_over_processes(hits).cpu().double() / count.cpu()), sorted(unreadable)
