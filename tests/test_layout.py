"""The layers of the package: imports run down between its folders, and none leaves it."""
import ast
import re

from repository import JOBS, ROOT

IMPORTS = [(path.relative_to(ROOT), name)
           for path in (ROOT / "selfpatch").rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))
           for name in ([node.module] if isinstance(node, ast.ImportFrom) else
                        [alias.name for alias in node.names] if isinstance(node, ast.Import) else [])]


def test_imports_run_down_the_picture_in_the_readme():
    picture = (ROOT / "README.md").read_text().split("(pip install .)")[1].split("\n\n")[0]
    rows = [line.split()[0].strip(",") for line in picture.splitlines()[1:]] + ["whole_files"]
    wrong = [(path, name) for path, name in IMPORTS if name.startswith("selfpatch.") and len(path.parts) > 2
             and rows.index(path.parts[1]) > rows.index(name.split(".")[1])]
    assert not wrong and len(rows) == len(set(rows)) == 11


def test_the_package_imports_nothing_of_the_root():
    roots = {path.stem for path in ROOT.glob("*.py")} | {"detection", "segmentation", "benchmarks", "tests"}
    assert not [(path, name) for path, name in IMPORTS if name.split(".")[0] in roots - {"selfpatch"}]


def test_a_folder_has_at_most_a_dozen_modules():
    folders = [path.parent for path in (ROOT / "selfpatch").rglob("__init__.py")]
    assert not {folder.name: count for folder in folders if (count := len(list(folder.glob("[!_]*.py")))) > 12}


def test_every_loader_has_its_workers_from_worker_options():
    files = [*(ROOT / "selfpatch").rglob("*.py"), *JOBS]
    calls = [node for path in files for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    loaders = [text for text in map(ast.unparse, calls) if re.match(r"([\w.]+\.)?DataLoader\(", text)]
    assert len(loaders) >= 8 and all("worker_options" in text for text in loaders)
