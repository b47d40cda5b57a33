"""torch.hub finds the entry points of the checkout and loads checkpoints through them, beside other projects."""
import copy
import os
import pickle
import sys
from pathlib import Path

import pytest
import torch

import hubconf
from vision_transformer import vit_tiny

CHECKOUT = str(Path(__file__).parent.parent)


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
    private = [name for name in sys.modules if name.startswith("selfpatch_")]
    for name in [*private, *(path.stem for path in Path(CHECKOUT).glob("*.py"))]:
        monkeypatch.setitem(sys.modules, name, None)  # so that what the test imports is undone as well
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))


@pytest.fixture
def other_project(tmp_path):
    """A checkout whose hubconf imports modules of its own, as DINO's does."""
    folder = tmp_path / "dino"
    folder.mkdir()
    (folder / "hubconf.py").write_text("dependencies = []\nimport vision_transformer as vits\nfrom utils import scale\n"
                                       "def dino_vits16():\n    return scale(vits.vit_small())\n")
    (folder / "vision_transformer.py").write_text("def vit_small():\n    return 21\n")
    (folder / "utils.py").write_text("def scale(x):\n    return 2 * x\n")
    return str(folder)


def snapshot():
    """Loaded modules and search path, without the private package of the entries."""
    return {k: v for k, v in sys.modules.items() if not k.startswith("selfpatch_")}, list(sys.path)


@pytest.mark.parametrize("dino_first", [True, False])
def test_other_project_in_one_process(bare_process, other_project, dino_first):
    if dino_first:
        assert torch.hub.load(other_project, "dino_vits16", source="local") == 42
    before = snapshot()
    model = hub("vit_tiny", patch_size=32)
    assert snapshot() == before
    assert torch.hub.load(other_project, "dino_vits16", source="local") == 42
    assert sys.modules["utils"].__file__ == f"{other_project}/utils.py"
    assert type(hub("vit_tiny", patch_size=32)) is type(model)  # one copy, however often


@torch.no_grad()
@pytest.mark.parametrize("imported", [True, False])
def test_modules_of_the_users_own(bare_process, monkeypatch, tmp_path, imported):
    for name in ("checkpoints", "utils", "errors", "vision_transformer"):
        (tmp_path / f"{name}.py").write_text("mine = True\n")
    # not syspath_prepend, whose undoing would leave the shortened path of bare_process to the tests after this one
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    if imported:
        import errors
        assert errors.mine
    before = snapshot()
    model, x = hub("vit_tiny", patch_size=32), torch.randn(1, 3, 96, 64)
    assert snapshot() == before
    import checkpoints
    assert checkpoints.mine

    features = model(x)
    state = pickle.loads(pickle.dumps(model.state_dict()))
    assert model.load_state_dict(state).missing_keys == []
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), features)
    compiled = torch.compile(model, backend="eager")(x)
    torch.testing.assert_close(compiled, features)


def test_imports_inside_functions_find_ours(bare_process, monkeypatch, tmp_path):
    for name, text in {"hubconf.py": (Path(CHECKOUT) / "hubconf.py").read_text(), "errors.py": "who = 'ours'\n",
                       "checkpoints.py": "import os, errors as e\n\ndef load_backbone(*args, **kwargs):\n"
                                         "    from errors import who\n    import errors\n"
                                         "    return who, errors.who, e.who, os.sep\n"}.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setitem(sys.modules, "errors", object())
    assert torch.hub.load(str(tmp_path), "vit_tiny", source="local") == ("ours", "ours", "ours", "/")
    (tmp_path / "errors.py").write_text("who = 'newer'\n")  # as force_reload leaves them
    os.utime(tmp_path / "errors.py", (2 ** 31, 2 ** 31))
    assert torch.hub.load(str(tmp_path), "vit_tiny", source="local") == ("newer", "newer", "newer", "/")
    assert hub("vit_tiny", patch_size=32).embed_dim == 192  # another checkout is another package
