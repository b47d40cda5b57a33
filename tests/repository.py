"""Where the repository and its jobs are, and the examples on its pages."""
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
JOBS = [path for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("*tion/t*.py"), *ROOT.glob("benchmarks/*.py")])
        if re.search(r"    run_main\(main[,)]", path.read_text())]  # not a user's script with another loss


def example(page: str, heading: str) -> str:
    """The Python block below a heading of a page, such as docs/LIBRARY.md."""
    section = (ROOT / page).read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
