"""Files about the project say the same as the code: dependencies, citation, public CI, the page for DINO's users."""
import os
import re

import pytest
from repository import ROOT

import main_selfpatch
import selfpatch
from selfpatch.pretraining.options import get_args_parser

PAGE = (ROOT / "docs" / "FROM_DINO.md").read_text()


def requirements(name):
    """The packages that a requirement file names itself, without those of other files."""
    lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return [line for line in lines if line and not line.startswith("-r")]


def test_both_lists_of_dependencies_agree():
    tomllib = pytest.importorskip("tomllib", reason="the standard library reads TOML from Python 3.11 on")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert sorted(project["dependencies"]) == sorted(requirements("requirements.txt"))
    assert sorted(project["optional-dependencies"]["dev"]) == sorted(requirements("requirements-dev.txt"))
    assert "-r requirements.txt" in (ROOT / "requirements-dev.txt").read_text()


def test_the_citation_is_the_readmes():
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    citation, readme = yaml.safe_load((ROOT / "CITATION.cff").read_text()), (ROOT / "README.md").read_text()
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    paper = citation["preferred-citation"]
    authors = " and ".join(f"{author['family-names']}, {author['given-names']}" for author in paper["authors"])
    assert authors in readme and paper["title"] in readme and f"{{{paper['year']}}}" in readme
    assert paper["identifiers"][0]["value"].removeprefix("arXiv:") in readme
    assert citation["version"] == selfpatch.__version__  # pyproject.toml takes it from there


def test_the_public_ci_runs_the_projects_own():
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    job = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]["tests"]
    matrix = job["strategy"]["matrix"]["include"]
    assert {(one["script"], one["python-version"]) for one in matrix} == {
        (".ci/floor", "3.10"), (".ci/run", "3.12"), (".ci/run", "3.13"), (".ci/extras", "3.12")}
    assert all(os.access(ROOT / one["script"], os.X_OK) for one in matrix)
    assert job["steps"][-1]["run"] == "${{ matrix.script }}"


def test_the_floor_is_what_the_project_promises():
    floor = dict(line.split("==") for line in requirements(".ci/floor.txt"))
    asked = dict(line.split(">=") for line in requirements("requirements.txt") if ">=" in line)
    assert floor.keys() == asked.keys() == {"torch", "torchvision", "timm", "pillow"}
    assert all(version.removesuffix(".0") == asked[name].removesuffix(".0") for name, version in floor.items())
    project = (ROOT / "pyproject.toml").read_text()
    assert 'requires-python = ">=3.10"' in project and "python3.10" in (ROOT / ".ci" / "floor").read_text()
    assert f"Python 3.10 and PyTorch {asked['torch']} or later" in (ROOT / "README.md").read_text()


def here(table):
    """The cells of a table's other columns than the first."""
    return [cell for row in table.splitlines() if row.startswith("|") for cell in row.split("|")[2:]]


def test_the_page_for_dinos_users_names_what_there_is():
    _, where, command, differs, oddities = re.split(r"\n## .*\n", PAGE)
    cells = here(where) + here(differs) + here(oddities)
    files = {name for cell in cells for name in re.findall(r"[\w/-]+\.py\b", cell)}
    assert len(files) > 25
    gone = {"eval_image_retrieval.py", "eval_copy_detection.py", "video_generation.py"}
    assert not {name for name in files - gone if not (ROOT / name).is_file()}
    options = set(re.findall(r"--\w+", "".join([*cells, *here(command)])))
    known = set(get_args_parser()._option_string_actions)
    for option in options - known - {"--standalone"}:  # the last one is torchrun's
        assert f'"{option}"' in (ROOT / "eval_video_segmentation.py").read_text()


def test_parts_are_where_the_page_says():
    table = PAGE.split("## What is where")[1].split("\n## ")[0]
    for row in re.findall(r"^\| [\w.]+: (.+) \| (.+) \|$", table, re.MULTILINE):
        sources = "".join((ROOT / name).read_text() for name in re.findall(r"[\w/]+\.py\b", row[1]))
        for name in re.findall(r"`(\w+)`", row[0].replace("`load_pretrained_weights`", "")):  # which is load_backbone
            assert re.search(rf"\b{name}\b", sources), name


def test_the_oddities_are_where_the_page_says():
    for row in PAGE.split("## Oddities that are kept")[1].splitlines():
        for place in (row.split("|")[2].split(";") if row.startswith("|") else ()):
            if match := re.match(r"\s*([\w/]+)\.py: (.+)", place):
                for name in re.findall(r"`(\w+)`", match[2]):
                    assert name in (ROOT / f"{match[1]}.py").read_text(), (match[1], name)


def test_the_defaults_on_the_page_are_the_programs():
    args = vars(main_selfpatch.get_args_parser().parse_args([]))
    rows = re.findall(r"^\| `--(\w+)` \| [^|]+ \| ([^|,]+)", PAGE, re.MULTILINE)
    assert len(rows) == 5
    for name, value in rows:
        default = args[name]
        expected = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else str(default)
        assert value.strip() == expected, name


def test_the_changelog_names_options_that_there_are():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    sources = "".join(path.read_text() for path in [*ROOT.glob("*.py"), *ROOT.glob("selfpatch/**/*.py")])
    assert not {option for option in re.findall(r"--\w+", changelog) if f'"{option}"' not in sources}
