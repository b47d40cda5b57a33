"""What `import selfpatch` offers, and that it costs nothing."""
import ast
import subprocess
import sys

import pytest
from repository import ROOT

import selfpatch


def test_importing_the_package_is_instant():
    code = "import sys, selfpatch; dir(selfpatch); print(sorted({'torch', 'timm', 'numpy'} & sys.modules.keys()))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (run.stderr, run.stdout) == ("", "[]\n")


def test_names_are_loaded_when_asked_for():
    for name in selfpatch.__all__:
        assert getattr(selfpatch, name).__name__ == name and name in dir(selfpatch)
    with pytest.raises(AttributeError, match="^module 'selfpatch' has no attribute 'load_model'$"):
        _ = selfpatch.load_model


def test_type_checkers_see_the_same_names():
    block = next(node for node in ast.parse((ROOT / "selfpatch" / "__init__.py").read_text()).body
                 if isinstance(node, ast.If) and node.test.id == "TYPE_CHECKING")
    found = {alias.name: node.module for node in block.body for alias in node.names}
    assert found == {name: getattr(selfpatch, name).__module__ for name in selfpatch.__all__}
