"""Dense retrieval: label an image's patches by the most similar patches of other images.

"Towards In-context Scene Understanding" (Balažević et al. 2023, Sec. 3), with exact search. From a memory of patch
features and their soft labels,

    memory = PatchMemory(rows, dim, num_classes)
    memory.add(features, patch_labels(masks, num_classes, patch_size))
    votes = memory.vote(queries)                    # [Q, num_classes]
    prediction = label_map(votes.unflatten(0, (h, w)), (512, 512))
"""
import torch
import torch.nn.functional as F

from selfpatch.distributed.collectives import gather, sum_over_processes
from selfpatch.distributed.processes import get_rank, get_world_size
from selfpatch.errors import ConfigError
from selfpatch.evaluation.image_features import check_finite
from selfpatch.evaluation.knn import BANK_ROWS, QUERY_ROWS, nearest

NEIGHBOURS, TEMPERATURE = 30, 0.02


def patch_labels(masks: torch.Tensor, num_classes: int, patch_size: int) -> torch.Tensor:
    """Ids of pixels [B, H, W] -> the share of each class in every patch, float32 [B, h, w, C]."""
    rows, columns = masks.shape[1] // patch_size, masks.shape[2] // patch_size
    pixels = masks[:, :rows * patch_size, :columns * patch_size].long()
    pixels = pixels.reshape(-1, rows, patch_size, columns, patch_size).transpose(2, 3).flatten(3).flatten(0, 2)
    patches = torch.arange(len(pixels), device=masks.device)[:, None]
    counts = torch.bincount((patches * num_classes + pixels).flatten(), minlength=len(pixels) * num_classes)
    return counts.reshape(len(masks), rows, columns, num_classes) / patch_size**2


def patch_scores(labels: torch.Tensor) -> torch.Tensor:
    """How common the classes of each patch of one image are, [N]; sampling prefers low scores, i.e. rare classes.

    The score sums, over the classes in a patch, how many of the image's patches contain the class.

    Args:
        labels: [N, C], from patch_labels.
    """
    contains = (labels > 0).float()
    return contains @ contains.sum(0)


def sample_patches(labels: torch.Tensor, count: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """Indices of the count patches of one image with the lowest score times a random factor in 0 … 1.

    Args:
        labels: [N, C] on any device, from patch_labels.
        count: all N patches if larger.
        generator: of the random factors, on the CPU.
    """
    factors = torch.rand(len(labels), generator=generator).to(labels.device)
    return (patch_scores(labels) * factors).topk(min(count, len(labels)), largest=False).indices


def label_map(votes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Votes of patches [h, w, C] -> ids of pixels [H, W], by bilinear interpolation of the votes."""
    votes = F.interpolate(votes.permute(2, 0, 1)[None], size, mode="bilinear", align_corners=False)
    return votes[0].argmax(0)


class PatchMemory:
    """Patch features with soft labels, distributed over the processes of a job: each holds the rows it has added.

    A million rows 384 wide take 0.8 GB in half precision.

    Args:
        rows: capacity for this process's rows.
        dim, num_classes: of a feature and of a label.
        dtype: of both in memory.

    Raises:
        ConfigError: the device has too little memory.
    """

    def __init__(self, rows: int, dim: int, num_classes: int, device: torch.device | str = "cpu",
                 dtype: torch.dtype = torch.float16):
        try:
            self._features = torch.empty(rows, dim, dtype=dtype, device=device)
            self._labels = torch.empty(rows, num_classes, dtype=dtype, device=device)
        except RuntimeError:
            size = rows * (dim + num_classes) * dtype.itemsize / 1e9
            raise ConfigError(f"a memory of {rows} patches takes {size:.1f} GB, which {device} does not have: give a "
                              "smaller --memory_size, or more processes", every_rank=True) from None
        self._rows = 0

    def __len__(self) -> int:
        """Number of this process's rows."""
        return self._rows

    @property
    def features(self) -> torch.Tensor:
        """Features of the rows added so far, of unit length, [rows, D]."""
        return self._features[:self._rows]

    @property
    def labels(self) -> torch.Tensor:
        """Labels of the rows added so far, [rows, C]."""
        return self._labels[:self._rows]

    def add(self, features: torch.Tensor, labels: torch.Tensor) -> None:
        """Add rows: features [R, D] of any length, and their soft labels [R, C].

        Raises:
            ConfigError: a feature is not finite.
            ValueError: the rows exceed the capacity.
        """
        check_finite(features)
        end = self._rows + len(features)
        if end > len(self._features):
            raise ValueError(f"{end} rows in a memory for {len(self._features)}")
        self._features[self._rows:end] = F.normalize(features.float(), dim=-1)
        self._labels[self._rows:end] = labels
        self._rows = end

    def vote(self, queries: torch.Tensor, neighbours: int = NEIGHBOURS, temperature: float = TEMPERATURE,
             query_rows: int = QUERY_ROWS, memory_rows: int = BANK_ROWS) -> torch.Tensor:
        """Mean label of the most similar rows of all processes, weighted by softmax(cosine / temperature).

        Every process calls this at the same time, with the same number of queries.

        Args:
            queries: features of any length, [Q, D].
            query_rows, memory_rows: rows of a chunk of the search; they affect only speed and memory.

        Returns:
            float32 [Q, C], rows sum to 1.

        Raises:
            ConfigError: a feature is not finite; all processes raise it.
        """
        queries = gather(F.normalize(queries.float(), dim=-1)).flatten(0, 1)
        check_finite(queries)  # those of all processes, so that all raise together
        votes = sum_over_processes(self._vote(queries, neighbours, temperature, query_rows, memory_rows))
        return votes.chunk(get_world_size())[get_rank()]

    def _vote(self, queries: torch.Tensor, neighbours: int, temperature: float, query_rows: int,
              memory_rows: int) -> torch.Tensor:
        """The contribution of this process's rows to the votes of queries [Q, D] from all processes."""
        cosines, rows = nearest(queries, self.features, neighbours, query_rows, memory_rows)
        missing = neighbours - cosines.shape[1]
        candidates = gather(F.pad(cosines, (0, missing), value=-torch.inf))  # [processes, Q, neighbours]
        candidates = candidates.transpose(0, 1).flatten(1)
        values, best = candidates.sort(dim=1, descending=True, stable=True)
        weights = torch.zeros_like(candidates).scatter_(
            1, best[:, :neighbours], (values[:, :neighbours] / temperature).softmax(-1))
        own = weights.chunk(get_world_size(), dim=1)[get_rank()][:, :cosines.shape[1]]
        return torch.cat([torch.einsum("qk,qkc->qc", part, self.labels[chosen].float())
                          for part, chosen in zip(own.split(query_rows), rows.split(query_rows), strict=True)])
