"""What the scripts of detection/ and segmentation/ do without OpenMMLab's packages."""
import importlib
import sys

import pytest
from openmmlab_data import script_error

from selfpatch.errors import ConfigError

MESSAGE = r"OpenMMLab's packages are not all installed \(.*mmcv.*\): run \./install_openmmlab\.sh"


@pytest.fixture(autouse=True)
def no_mmcv(monkeypatch):
    monkeypatch.setitem(sys.modules, "mmcv", None)
    for module in ("selfpatch.openmmlab.jobs", "selfpatch.openmmlab.config", "mmcv.ops"):
        monkeypatch.delitem(sys.modules, module, raising=False)


def test_import_raises_config_error():
    with pytest.raises(ConfigError, match=MESSAGE):
        importlib.import_module("selfpatch.openmmlab.jobs")


@pytest.mark.parametrize("script", ["detection/train.py", "detection/test.py", "segmentation/train.py",
                                    "segmentation/test.py"])
def test_scripts_end_with_one_line(capsys, script):
    error = script_error(capsys, script, "--help")
    assert "not all installed" in error and error.endswith("run ./install_openmmlab.sh\n")
