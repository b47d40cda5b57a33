"""Where the repository is, and the examples on its pages."""
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def example(page: str, heading: str) -> str:
    """The Python block below a heading of a page, such as docs/LIBRARY.md."""
    section = (ROOT / page).read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
