"""Export a backbone as an ONNX file through torch.onnx, and compare its features with the network's.

    write_onnx(load_backbone("checkpoint.pth"), Path("vit.onnx"))
    onnxruntime.InferenceSession("vit.onnx").run(None, {"images": images})     # any [B, 3, H, W] of whole patches

Needs the optional packages onnx and onnxscript, and onnxruntime for the comparison.
"""
import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from selfpatch.checkpoints.files import CheckpointError
from selfpatch.errors import ConfigError, is_installed, require_packages
from selfpatch.method.vision_transformer import VisionTransformer
from selfpatch.whole_files import whole_file

LARGEST_SIDE = 4096
TOLERANCE = 1e-3  # relative to the features' largest magnitude; float32 sums depend on their order
INPUT, OUTPUT = "images", "patches"


def check_packages() -> None:
    """Raise ConfigError if torch.onnx lacks a package."""
    require_packages("--to onnx", "onnx", "onnxscript")


def check_image_size(image_size: tuple[int, int], patch_size: int) -> None:
    """Raise ConfigError unless both sides are multiples of the patch size, up to 4096."""
    for side in image_size:
        if not patch_size <= side <= LARGEST_SIDE or side % patch_size:
            raise ConfigError(f"--image_size {image_size[0]} {image_size[1]}: give height and width as multiples of "
                              f"the patch size {patch_size}, at most {LARGEST_SIDE}")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporter's remarks about its own versions of operators."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def resized_positions(model: VisionTransformer, grid: tuple[int, int]) -> torch.Tensor:
    """model.interpolate_pos_encoding in operations that torch.export keeps for any grid: [1, rows·columns, D].

    The exporter would turn F.interpolate's factors, and the choice of no interpolation, into constants.
    """
    pos = model.pos_embed[0, model.num_prefix_tokens:]
    side = round(len(pos) ** 0.5)
    rows, columns = (torch.arange(n, dtype=torch.float32) for n in grid)
    same = ((rows[-1:] + 1 == side) & (columns[-1:] + 1 == side)).float()
    pos = (bicubic_weights(rows, side, same) @ pos.reshape(side, -1)).unflatten(1, (side, -1))
    return (bicubic_weights(columns, side, same) @ pos).flatten(0, 1)[None]


def bicubic_weights(places: torch.Tensor, side: int, same: torch.Tensor) -> torch.Tensor:
    """Weights [n, side] that resize `side` values to n by F.interpolate's bicubic rule, for places 0 … n - 1.

    Args:
        same: 1 for a factor of n / side, 0 for (n + 0.1) / side.
    """
    source = (places + 0.5) * side / (places[-1:] + 1.1 - 0.1 * same) - 0.5
    first, weights = source.floor(), torch.zeros(1)
    for tap in range(-1, 3):  # of the four values around the source, repeated at the border
        d = (source - first - tap).abs()
        weight = torch.where(d <= 1, (1.25 * d - 2.25) * d * d + 1, ((3.75 - 0.75 * d) * d - 6) * d + 3)
        is_there = (first + tap).clamp(0, side - 1)[:, None] == torch.arange(side)
        weights = weights + weight[:, None] * is_there
    return weights


def write_onnx(model: VisionTransformer, output: Path, image_size: tuple[int, int] | None = None,
               metadata: dict[str, str] | None = None) -> float | None:
    """Export a backbone for batches of any size; the file appears after a successful comparison.

    Args:
        image_size: height and width that are fixed in the file, see check_image_size; None for any whole patches, up to
            4096 pixels a side.
        metadata: texts to store in the file.

    Returns:
        The largest difference from the network's features; None without onnxruntime.

    Raises:
        ConfigError: a package is missing, or the size does not fit.
        CheckpointError: the file gives other features than the network.
        WriteError: the file cannot be written.
    """
    check_packages()
    patch_size, side = model.patch_size, round((model.pos_embed.shape[1] - model.num_prefix_tokens) ** 0.5)
    dims, exported = {0: torch.export.Dim("batch")}, model.eval()
    sizes = [image_size or (3 * patch_size, 5 * patch_size)]
    check_image_size(sizes[0], patch_size)
    if image_size is None:
        sizes += [(side * patch_size, n * patch_size) for n in (side, side + 2) if n * patch_size <= LARGEST_SIDE]
        dims |= {i: patch_size * torch.export.Dim(name, min=1, max=LARGEST_SIDE // patch_size)
                 for i, name in ((2, "rows"), (3, "columns"))}
        exported = copy.copy(model)
        exported.interpolate_pos_encoding = lambda grid: resized_positions(model, grid)
    images = torch.zeros(2, 3, *sizes[0])  # 2: the exporter would fix a batch of 1
    with quiet():
        program = torch.onnx.export(exported, (images,), dynamo=True, input_names=[INPUT], output_names=[OUTPUT],
                                    verbose=False, dynamic_shapes=(dims,))
    program.model.metadata_props.update(metadata or {})
    with whole_file(output) as temporary:
        program.save(temporary, external_data=False)
        differences = [compare(model, temporary, size) for size in sizes]
        return None if None in differences else max(differences)


@torch.inference_mode()
def compare(model: VisionTransformer, path: Path, image_size: tuple[int, int]) -> float | None:
    """Return the largest difference between the features of an ONNX file and the network's; None without onnxruntime.

    Raises:
        CheckpointError: the difference exceeds rounding, or onnxruntime cannot run the file.
    """
    if not is_installed("onnxruntime"):
        return None
    import onnxruntime
    images = torch.randn(3, 3, *image_size, generator=torch.Generator().manual_seed(0))  # not 2 as in the export
    expected = model(images)
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        features = torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])
    except Exception as error:  # its errors have no common base class
        raise CheckpointError(f"onnxruntime cannot run the ONNX file ({error}): try another version of onnxscript or "
                              "onnxruntime") from None
    difference = float((features - expected).abs().max())
    if not difference <= TOLERANCE * float(expected.abs().max()):
        raise CheckpointError(f"the features of the ONNX file differ by up to {difference:.2g} from the network's: try "
                              "another version of onnxscript")
    return difference
