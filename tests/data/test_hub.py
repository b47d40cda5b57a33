"""Images that a function of the user or a Hugging Face data set gives."""
from pathlib import Path

import pytest
from image_kinds import SIZES, files

from main_selfpatch import get_args_parser
from selfpatch.data.dataset import build_dataset
from selfpatch.data.files import UnreadableImage
from selfpatch.data.loader import CropLoader
from selfpatch.data.sources import absolute, open_images, prepare
from selfpatch.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning",
                                        "ignore:.*fork.*:DeprecationWarning")


# ---------------------------------------------------------------- functions of users


def write_own(folder: Path, returned: str, before: str = "") -> str:
    (folder / "f.py").write_text(f"from __future__ import annotations\n{before}\ndef open_images(a):\n    "
                                 f"return {returned}\n")
    return f"{folder}/f.py:a"


@pytest.mark.parametrize("value, message", [
    ("{}[name]", "cannot read the image .*f.py:a: x.jpg .'x.jpg'"), ("None", "x.jpg .the function .* returned None"),
    ("b''", "x.jpg .0 bytes"), ("exit(3)", "cannot read the image .*x.jpg .3"),
    ("memoryview(b'x')", "x.jpg: the function that open_images returns gave a memoryview"), ("'x'", "gave a str, and"),
    ("__import__('io').BytesIO(b'x')", "gave a BytesIO, and should give the bytes")])
def test_what_a_function_gives_for_an_image(tmp_path, value, message):
    images = open_images(write_own(tmp_path, f"['x.jpg'], lambda name: {value}"))
    with pytest.raises(ConfigError, match=message) as error:
        images.read(0)
    # one image is at fault, and another takes its place; or the function is, and nothing goes on
    assert isinstance(error.value, UnreadableImage) == ("gave a" not in message)


@pytest.mark.parametrize("returned, message", [
    ("None", "open_images returned None, and should return two values"), ("'x', read", "returned a str, a function"),
    ("read, ['x']", "returned a function, a list, and should"), ("['x'], read, 1", "a list, a function, a int"),
    ("[b'x'], read", "must be text, and b'x' is a bytes"), ("range(3), read", "must be text, and 0 is a int"),
    ("[__import__('pathlib').Path('x')], read", "and PosixPath.'x'. is a PosixPath"),
    ("[], read", "has no images in it: its open_images returned no names"),
    ("(1 / 0 for _ in 'x'), read", "f.py, line 4: ZeroDivisionError: division by zero"),
    ("exit('locked')", "f.py, line 4: SystemExit: locked")])
def test_what_else_a_function_returns(tmp_path, returned, message):
    with pytest.raises(ConfigError, match=message) as error:
        open_images(write_own(tmp_path, returned, "read = lambda name: b'x'"))
    assert "\n" not in str(error.value)
    (tmp_path / "f.py").write_text("def f(:\n")
    with pytest.raises(ConfigError, match="f.py: SyntaxError: "):
        open_images(f"{tmp_path}/f.py:a")


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.long)])
def test_a_function_with_a_dataclass_and_a_module_beside_it(image_folder, tmp_path, context):
    (tmp_path / "beside_it.py").write_text("ROOT = " + repr(str(image_folder)))
    (tmp_path / "later_too.py").write_text("def read(path):\n    return open(path, 'rb').read()")
    data = write_own(tmp_path, "[f'class{i % 2}/{i:02}.jpg' for i in range(12)], read", """
from dataclasses import dataclass
import beside_it
@dataclass
class Row:
    path: str
def read(name):
    import later_too
    return later_too.read(Row(f'{beside_it.ROOT}/{name}').path)
""")
    loader = CropLoader(build_dataset(data, **SIZES), 6, num_workers=1)
    loader.batches.multiprocessing_context = context
    loader.set_epoch(1)
    assert len(list(loader)) == 2 and not loader.bad_images


def test_one_value_stays_a_text(image_folder, tmp_path, monkeypatch):
    parse = get_args_parser().parse_args
    assert parse(["--data_path", "x"]).data_path == "x" and parse([]).data_path == "/path/to/imagenet/train"
    assert parse(["--data_path", "x.tar", "y.tar", "--epochs", "3"]).data_path == ["x.tar", "y.tar"]
    for text in (f"x/{{{','.join(map(str, range(100)))}}}.tar", f"f.py:{300 * 'x'}"):  # no name of 255 bytes
        assert parse(["--data_path", text]).data_path == text
    monkeypatch.chdir(tmp_path)
    assert [absolute(path) for path in ("x", "hf:a/b", "f.py:x")] == [f"{tmp_path}/x", "hf:a/b", f"{tmp_path}/f.py:x"]
    prepare(image_folder)


# ---------------------------------------------------------------- Hugging Face


def test_data_sets_that_cannot_be_read(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.Dataset.from_dict({"text": ["a"], "label": [1]}).save_to_disk(tmp_path / "text")
    datasets.DatasetDict(a=datasets.Dataset.from_dict({"x": [1]}), b=datasets.Dataset.from_dict({"x": [1]})
                         ).save_to_disk(tmp_path / "splits")
    datasets.Dataset.from_dict({"image": []}, features=datasets.Features(image=datasets.Image())
                               ).save_to_disk(tmp_path / "empty")
    for path, message in ((f"hf:{tmp_path}/text", "has no column of images, but text, label"),
                          (f"hf:{tmp_path}/empty", "has a split without rows|its split has no rows"),
                          (f"hf:{tmp_path}/splits:c:a", "without configurations: give hf:.*/splits:a"),
                          (f"hf:{tmp_path}/splits", "has no split train, but a, b"), ("hf:", "give the name"),
                          (f"hf:{tmp_path}/splits:a", "has no column of images"),
                          ("hf:nobody/nothing", "hf:nobody/nothing cannot be loaded")):
        with pytest.raises(ConfigError, match=message) as error:
            open_images(path)
        assert "\n" not in str(error.value)


def test_configurations_and_columns(image_folder, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = [path.read_bytes() for path in files(image_folder)]
    columns = {"photo": data, "mask": data[::-1], "raw": data[1:] + data[:1]}
    features = datasets.Features(photo=datasets.Image(), mask=datasets.Image(), raw=datasets.Value("binary"))
    (tmp_path / "x").mkdir()
    for name, count in (("big", 12), ("small", 3)):
        datasets.Dataset.from_dict({name: values[:count] for name, values in columns.items()}, features=features
                                   ).to_parquet(tmp_path / "x" / f"{name}.parquet")
    (tmp_path / "x" / "README.md").write_text("---\nconfigs:\n" + "".join(
        f"- config_name: {name}\n  data_files: {{split: {split}, path: {name}.parquet}}\n".replace(
            "{split", "\n  - {split") for name, split in (("big", "train"), ("small", "test"))) + "---\n")
    start = f"hf:{tmp_path / 'x'}"
    for column, first in (("", data[0]), ("photo", data[0]), ("mask", data[-1]), ("raw", data[1])):
        images = open_images(f"{start}:big:train", column=column)
        assert len(images) == 12 and images.read(0) == first
        assert f"images of the column {column or 'photo'} (there are also " in images.notes()[0]
    assert len(open_images(f"{start}:small:test")) == len(open_images(f"{start}:small:")) == 3
    for path, column, message in (("", "", "has the configurations big, small: give one with .*:big:SPLIT"),
                                  (":no:train", "", "has no configuration no, but big, small: give hf:.*:big:SPLIT"),
                                  (":small:train", "", "has no split train, but test: give hf:.*/x:small:test"),
                                  (":a:b:c", "", "hf:NAME:CONFIG:SPLIT"),
                                  (":big:train", "text", "no column of images text, but photo, mask: give one")):
        with pytest.raises(ConfigError, match=message) as error:
            open_images(start + path, column=column)
        assert "\n" not in str(error.value) and "load_dataset" not in str(error.value)


def test_rows_without_names_keep_their_order(image_folder, tmp_path):
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    rows = [{"bytes": path.read_bytes(), "path": None} for path in files(image_folder)] + [None]
    datasets.Dataset.from_dict({"picture": rows}, features=datasets.Features(picture=datasets.Image())
                               ).save_to_disk(tmp_path / "saved")
    images = open_images(f"hf:{tmp_path / 'saved'}")
    assert [images.read(i) for i in range(12)] == [row["bytes"] for row in rows[:12]] and images.classes == []
    with pytest.raises(ConfigError, match="row 12 .00000012. .the row has none"):
        images.read(12)
