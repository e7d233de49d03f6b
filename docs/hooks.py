"""The pages of the site that the project has elsewhere, under their own names, so that links hold; lines of README.

In a page `{{ README: # SimCLR }}` becomes the paragraph of README's code that begins with "# SimCLR", and
`{{ results: nt_xent }}` that op's pictures of every machine.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "RESULTS.md", "CHANGELOG.md")


def on_files(files: Files, config: Any) -> Files:
    pictures = sorted(ROOT.glob("benchmarks/results/**/*.svg"))
    for path in [*(ROOT / name for name in PAGES), *pictures]:
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, content=path.read_bytes() if path in pictures else path.read_text()))
    return files


def _lines(start: str) -> str:
    """Of README, the paragraph of a code block that begins so"""
    found = []
    for kind, code in re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.S | re.M):
        found += [f"```{kind}\n{text.strip()}\n```" for text in code.split("\n\n") if text.startswith(start)]
    if len(found) != 1:
        raise ValueError(f"README has {len(found)} paragraphs of code that begin with {start!r}")
    return found[0]


def _pictures(op: str) -> str:
    files = sorted(ROOT.glob(f"benchmarks/results/*/{op}.svg"))
    if not files:
        raise ValueError(f"there are no pictures of {op}")
    return "\n\n".join(f"![{op} on {f.parent.name}](../{f.relative_to(ROOT)} '{op} on {f.parent.name}')" for f in files)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    markdown = re.sub(r"\[([^]]+)\]\((benchmarks|tests)/[^)]*(?<!svg)\)", r"\1", markdown)  # of which there is no page
    markdown = re.sub(r"\{\{ README: (.*?) \}\}", lambda m: _lines(m[1]), markdown)
    return re.sub(r"\{\{ results: (\w+) \}\}", lambda m: _pictures(m[1]), markdown)
