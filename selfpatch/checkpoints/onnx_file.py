"""Export a backbone as an ONNX file through torch.onnx, and compare its features with the network's.

    write_onnx(load_backbone("checkpoint.pth"), Path("vit.onnx"), (224, 224))
    onnxruntime.InferenceSession("vit.onnx").run(None, {"images": images})     # any number of images [B, 3, H, W]

Needs the optional packages onnx and onnxscript, and onnxruntime for the comparison.
"""
import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from selfpatch.checkpoints.files import CheckpointError
from selfpatch.errors import ConfigError, is_installed, require
from selfpatch.method.vision_transformer import VisionTransformer
from selfpatch.whole_files import whole_file

LARGEST_SIDE = 4096
TOLERANCE = 1e-3  # relative to the features' largest magnitude; float32 sums depend on their order
INPUT, OUTPUT = "images", "patches"


def check_packages() -> None:
    """Raise ConfigError if torch.onnx lacks a package."""
    require("--to onnx", "onnx", "onnxscript")


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


def write_onnx(model: VisionTransformer, output: Path, image_size: tuple[int, int],
               metadata: dict[str, str] | None = None) -> float | None:
    """Export a backbone for images of one size and any batch size; the file appears after a successful comparison.

    Args:
        image_size: height and width, see check_image_size. They are fixed in the file, since DINO's rule for resizing
            the position embedding depends on them.
        metadata: texts to store in the file.

    Returns:
        The largest difference from the network's features; None without onnxruntime.

    Raises:
        ConfigError: a package is missing, or the size does not fit.
        CheckpointError: the file gives other features than the network.
        WriteError: the file cannot be written.
    """
    check_packages()
    check_image_size(image_size, model.patch_size)
    images = torch.zeros(2, 3, *image_size)  # 2: the exporter would fix a batch of 1
    with quiet():
        program = torch.onnx.export(
            model.eval(), (images,), dynamo=True, input_names=[INPUT], output_names=[OUTPUT], verbose=False,
            dynamic_shapes=({0: torch.export.Dim("batch")},))
    program.model.metadata_props.update(metadata or {})
    with whole_file(output) as temporary:
        program.save(temporary, external_data=False)
        return compare(model, temporary, image_size)


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
