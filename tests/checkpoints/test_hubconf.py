"""torch.hub finds the entry points of the checkout and loads checkpoints through them, beside other projects."""
import copy
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from repository import ROOT

import hubconf
from selfpatch.method.vision_transformer import vit_tiny

CHECKOUT = str(ROOT)


def hub(entry, **kwargs):
    return torch.hub.load(CHECKOUT, entry, source="local", **kwargs)


def test_entry_points_are_the_three_networks():
    entries = [name for name, value in vars(hubconf).items() if callable(value) and not name.startswith("_")]
    assert entries == ["vit_tiny", "vit_small", "vit_base"]  # what torch.hub.list shows


@torch.no_grad()
def test_pretrained_file(tmp_path, capsys):
    source = vit_tiny(patch_size=8).eval()
    torch.save({"student": {f"module.backbone.{k}": v for k, v in source.state_dict().items()}}, tmp_path / "run.pth")
    model = hub("vit_tiny", pretrained=str(tmp_path / "run.pth"), checkpoint_key="student", drop_path_rate=0.1)
    x = torch.randn(1, 3, 40, 48)
    assert torch.equal(model(x), source(x))
    assert model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)
    assert "key student, vit_tiny, patch size 8" in capsys.readouterr().out


@pytest.mark.parametrize("entry, width", [("vit_tiny", 192), ("vit_small", 384), ("vit_base", 768)])
def test_random_weights_without_a_file(entry, width, capsys):
    with torch.device("meta"):  # its shapes are enough
        model = hub(entry, patch_size=32)
    assert (model.embed_dim, model.patch_size, model.training) == (width, 32, False)
    assert f"random weights: {entry}, patch size 32" in capsys.readouterr().out


def test_file_of_another_network_is_an_error(tmp_path):
    torch.save(vit_tiny().state_dict(), tmp_path / "tiny.pth")
    with pytest.raises(ValueError, match="^arch vit_base contradicts .*tiny.pth.* vit_tiny, or for none$"):
        hub("vit_base", pretrained=str(tmp_path / "tiny.pth"))
    with pytest.raises(ValueError, match="^patch size 8 contradicts .*tiny.pth.* 16, or for none$"):
        hub("vit_tiny", pretrained=str(tmp_path / "tiny.pth"), patch_size=8)
    with pytest.raises(ValueError, match="^patch size 0 is not"):
        hub("vit_tiny", patch_size=0)
    with pytest.raises(ValueError, match="cannot be read"):
        hub("vit_tiny", pretrained=str(tmp_path / "none.pth"))


def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save(vit_tiny().state_dict(), tmp_path / "tiny.pth")
    assert hub("vit_tiny", pretrained="~/tiny.pth").embed_dim == 192


@pytest.fixture
def bare_process(monkeypatch):
    """The modules of this project are not loaded, nor is their folder on the path."""
    monkeypatch.setattr(sys, "path", [path for path in sys.path if Path(path) != Path(CHECKOUT)])
    ours = [name for name in sys.modules if name.partition(".")[0] == "selfpatch"]
    for name in [*ours, *(path.stem for path in Path(CHECKOUT).glob("*.py"))]:
        monkeypatch.setitem(sys.modules, name, None)  # so that what the test imports is undone as well
        monkeypatch.delitem(sys.modules, name)


def write_project(folder):
    """A checkout whose hubconf imports modules of its own, as DINO's does."""
    folder.mkdir()
    (folder / "hubconf.py").write_text("dependencies = []\nimport vision_transformer as vits\nfrom utils import scale\n"
                                       "def dino_vits16():\n    return scale(vits.vit_small())\n")
    (folder / "vision_transformer.py").write_text("def vit_small():\n    return 21\n")
    (folder / "utils.py").write_text("def scale(x):\n    return 2 * x\n")
    return str(folder)


@torch.no_grad()
@pytest.mark.parametrize("dino_first", [True, False])
def test_beside_dinos_own_modules(bare_process, tmp_path, dino_first):
    dino = write_project(tmp_path / "dino")
    if dino_first:
        assert torch.hub.load(dino, "dino_vits16", source="local") == 42
    path = list(sys.path)
    model, x = hub("vit_tiny", patch_size=32), torch.randn(1, 3, 96, 64)
    assert sys.path == path and ("utils" in sys.modules) == dino_first
    assert torch.hub.load(dino, "dino_vits16", source="local") == 42
    assert sys.modules["utils"].__file__ == f"{dino}/utils.py"
    assert type(hub("vit_tiny", patch_size=32)) is type(model)  # one copy, however often

    features = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), features)
    torch.testing.assert_close(torch.compile(model, backend="eager")(x), features)


def test_a_second_checkout_is_refused(tmp_path):
    shutil.copy(Path(CHECKOUT) / "hubconf.py", tmp_path)
    with pytest.raises(ImportError) as error:
        torch.hub.load(str(tmp_path), "vit_tiny", source="local")
    assert str(error.value) == (f"the package selfpatch of {CHECKOUT} is loaded already, so that of {tmp_path} cannot "
                                "be: use one of them in a process")
