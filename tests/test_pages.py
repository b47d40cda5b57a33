"""Links, file names, options and commands on the README and the other pages are true."""
import importlib
import re
import shlex

import pytest
from repository import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in ("benchmarks", "detection", "docs", "segmentation", "weights")
                                      for page in (ROOT / folder).glob("*.md"))])
# files of DINO's repository, and of users
ELSEWHERE = {"main_dino.py", "eval_image_retrieval.py", "eval_copy_detection.py", "video_generation.py",
             "visualize_attention.py", "mine.py", "FILE.py", "sqlite_images.py"}
# options of pip, pytest, torchrun, Slurm, and of mmengine's jobs
OTHER_OPTIONS = {"--standalone", "--nnodes", "--nproc_per_node", "--rdzv_endpoint", "--signal", "--nodes",
                 "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task", "--no-build-isolation", "--help"}
SOURCES = "".join(path.read_text() for folder in (".", "benchmarks", "detection", "segmentation")
                  for path in (ROOT / folder).glob("*.py")) + "".join(
                      path.read_text() for path in (ROOT / "selfpatch").glob("**/*.py"))
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def anchors(page):
    """GitHub's names of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@each_page
def test_files_exist(page):
    text = re.sub(r"\[[^]]*\]\(", "(", page.read_text())  # of links, their targets
    for name in set(re.findall(r"(?<![\w/.-])[\w./-]*\w\.py\b", text)) - ELSEWHERE:
        # the pages of folders leave out the folder's name
        assert any((folder / name).is_file() for folder in (ROOT, page.parent, page.parent / "configs")), name


@each_page
def test_options_exist(page):
    for option in set(re.findall(r"(?<![\w-])--[a-z][\w-]+", page.read_text())) - OTHER_OPTIONS:
        parts = {option, option.replace("_", "-"), option + "s"}  # argparse completes --epoch
        assert any(f'"{part}"' in SOURCES for part in parts), option


def test_the_picture_names_what_there_is():
    picture = (ROOT / "README.md").read_text().split("(pip install .)")[1].split("\n## ")[0]
    rows = re.findall(r"^    (\w+)  +(.+)$", picture, re.MULTILINE)
    assert {folder for folder, _ in rows} == {path.parent.name for path in ROOT.glob("selfpatch/*/__init__.py")}
    for folder, names in rows:
        for name in names.split(", "):
            assert (ROOT / "selfpatch" / folder / f"{name}.py").is_file(), (folder, name)


def commands():
    """(job, arguments) of every printed command that starts a job of the root."""
    found = []
    for page in PAGES:
        text = re.sub(r" \\\n +", " ", page.read_text())
        for block, inline in re.findall(r"^    (.+)$|`([^`\n]+ --[^`\n]+)`", text, re.MULTILINE):
            if match := re.match(r"(?:python|torchrun|srun) (?:.* )?(\w+)\.py(\s(?!--help).+)", block or inline):
                found.append((match[1], shlex.split(match[2], comments=True)))
    return [(job, arguments) for job, arguments in found if (ROOT / f"{job}.py").is_file()]


def test_commands_are_understood(monkeypatch):
    assert len(commands()) > 50
    for job, arguments in commands():
        module = importlib.import_module(job)
        if hasattr(module, "get_args_parser"):
            module.get_args_parser().parse_args(arguments)
        else:
            monkeypatch.setattr("sys.argv", [f"{job}.py", *arguments])
            module.get_args()
