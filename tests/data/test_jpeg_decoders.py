"""The decoders that are installed, torchcodec, torchvision and PIL, give the same pixels, turned by none of them."""
import io
import subprocess
import sys

import pytest
import torch
from image_cases import picture
from PIL import Image
from repository import ROOT

from selfpatch.data import files as image_files
from selfpatch.data.files import load_rgb, load_uint8

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")
DECODERS = image_files.installed_decoders()
NAMES = [pytest.param(name, marks=pytest.mark.skipif(name not in DECODERS, reason=f"{name} has no decoder here"))
         for name in ("torchcodec", "torchvision")]


def jpeg(**options):
    file = io.BytesIO()
    picture(width=123, height=77).save(file, "JPEG", **options)
    return file.getvalue()


@pytest.mark.parametrize("name", [*NAMES, "pil"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0, "quality": 95}, {"quality": 20},
                                     {"restart_marker_rows": 1}])
def test_every_decoder_gives_pils_pixels(monkeypatch, name, options):
    monkeypatch.setattr(image_files, "decode_jpeg", DECODERS.get(name))
    data = jpeg(**options)
    expected = torch.tensor(list(load_rgb("x.jpg", data).tobytes())).view(77, 123, 3).permute(2, 0, 1)
    assert torch.equal(load_uint8("x.jpg", data).long(), expected)


@pytest.mark.parametrize("name", [*NAMES, "pil"])
@pytest.mark.parametrize("tag", range(1, 9))
def test_a_rotated_jpeg_is_not_turned(monkeypatch, name, tag):
    monkeypatch.setattr(image_files, "decode_jpeg", DECODERS.get(name))
    exif = Image.Exif()
    exif[0x0112] = tag
    assert torch.equal(load_uint8("x.jpg", jpeg(exif=exif)), load_uint8("x.jpg", jpeg()))


@pytest.mark.parametrize("name", NAMES)
def test_a_decoder_refuses_what_is_damaged_and_leaves_other_modes_to_pil(name):
    for data in (jpeg()[:600], b"\xff\xd8\xff no image"):
        with pytest.raises(RuntimeError):
            DECODERS[name](data)
    for mode, channels in (("L", 1), ("CMYK", 4)):
        file = io.BytesIO()
        picture().convert(mode).save(file, "JPEG")
        assert len(DECODERS[name](file.getvalue())) == channels


def test_torchcodec_comes_first_and_what_cannot_be_loaded_is_passed_over(monkeypatch):
    def broken():
        raise RuntimeError("built for another torch")

    assert list(DECODERS) == [name for name in ("torchcodec", "torchvision") if name in DECODERS]
    monkeypatch.setattr(image_files, "torchcodec_decoder", broken)
    assert "torchcodec" not in image_files.installed_decoders()


WORKERS = """
import sys
import torch
from selfpatch.data.dataset import build_dataset
from selfpatch.data.loader import CropLoader
torch.manual_seed(0)
if __name__ == "__main__":
    dataset = build_dataset(sys.argv[1], local_crops_number=0, global_crops_size=16)
    loader = CropLoader(dataset, 4, num_workers=2)
    loader.batches.multiprocessing_context = sys.argv[2]
    print(len(list(loader)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.long)])
def test_workers_do_not_warn_of_the_end_of_a_decoder(image_folder, tmp_path, start):
    """In fresh processes, where every warning is shown once."""
    (tmp_path / "job.py").write_text(WORKERS)
    result = subprocess.run([sys.executable, "-W", "default::DeprecationWarning", tmp_path / "job.py", image_folder,
                             start], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert result.stdout == "3\n", result.stderr
    assert "decoding" not in result.stderr
