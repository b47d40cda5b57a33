"""A backbone as an ONNX file, through torch.onnx, held against the network before it counts as written.

    write_onnx(load_backbone("checkpoint.pth"), Path("vit.onnx"), (224, 224))
    onnxruntime.InferenceSession("vit.onnx").run(None, {"images": images})     # any number of images [B, 3, H, W]

Needs the optional packages onnx and onnxscript, and to compare the features onnxruntime.
"""
import contextlib
import importlib.util
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from selfpatch.checkpoints.files import CheckpointError
from selfpatch.errors import ConfigError
from selfpatch.method.vision_transformer import VisionTransformer
from selfpatch.whole_files import whole_file

NEEDED = ("onnx", "onnxscript")
LARGEST_SIDE = 4096
TOLERANCE = 1e-3  # of the features' largest magnitude: another library sums float32 numbers in another order
INPUT, OUTPUT = "images", "patches"


def check_packages() -> None:
    """Raise ConfigError if a package that torch.onnx needs is missing."""
    missing = [name for name in NEEDED if not is_installed(name)]
    if missing:
        raise ConfigError(f"--to onnx needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not "
                          f"installed: pip install {' '.join(NEEDED)} onnxruntime")


def is_installed(name: str) -> bool:
    with contextlib.suppress(ImportError, ValueError):  # ValueError: a module that was put there without a spec
        return importlib.util.find_spec(name) is not None
    return False


def check_image_size(image_size: tuple[int, int], patch_size: int) -> None:
    """Raise ConfigError unless both sides are multiples of the patch size and within reason."""
    for side in image_size:
        if not patch_size <= side <= LARGEST_SIDE or side % patch_size:
            raise ConfigError(f"--image_size {image_size[0]} {image_size[1]}: give height and width as multiples of "
                              f"the patch size {patch_size}, at most {LARGEST_SIDE}")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's remarks, which are about its own versions of operators."""
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
    """Export a backbone for images of one size, in batches of any number; the file appears once it has been compared.

    Args:
        image_size: height and width, see check_image_size. The position embedding is resized for it now: DINO's rule
            for that depends on the size, so an ONNX file has one size.
        metadata: texts that go into the file.

    Returns:
        the largest difference to the network's features, None where onnxruntime is not installed.

    Raises:
        ConfigError: a package is missing, or the size does not fit.
        CheckpointError: the file gives other features than the network.
        WriteError: the file cannot be written.
    """
    check_packages()
    check_image_size(image_size, model.patch_size)
    images = torch.zeros(2, 3, *image_size)  # 2: a batch of 1 would be taken as a constant
    with whole_file(output) as temporary:
        with quiet():
            program = torch.onnx.export(
                model.eval(), (images,), dynamo=True, input_names=[INPUT], output_names=[OUTPUT], verbose=False,
                dynamic_shapes=({0: torch.export.Dim("batch")},))
        program.model.metadata_props.update(metadata or {})
        program.save(temporary, external_data=False)
        return compare(model, temporary, image_size)


@torch.inference_mode()
def compare(model: VisionTransformer, path: Path, image_size: tuple[int, int]) -> float | None:
    """Largest difference between the features of an ONNX file and the network's, None without onnxruntime.

    Raises:
        CheckpointError: it is larger than rounding explains, or onnxruntime cannot run the file.
    """
    if not is_installed("onnxruntime"):
        return None
    import onnxruntime
    images = torch.randn(3, 3, *image_size, generator=torch.Generator().manual_seed(0))  # not the 2 of the export
    expected = model(images)
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        features = torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])
    except Exception as error:  # its classes have no common base of their own
        raise CheckpointError(f"onnxruntime cannot run the ONNX file ({error}): try another version of onnxscript or "
                              "onnxruntime") from None
    difference = float((features - expected).abs().max())
    if not difference <= TOLERANCE * float(expected.abs().max()):
        raise CheckpointError(f"the features of the ONNX file differ by up to {difference:.2g} from the network's: try "
                              "another version of onnxscript")
    return difference
