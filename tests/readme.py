"""README.md is `nbs/index.ipynb` as Markdown. `python tests/readme.py` writes it; a test compares the two."""
import json
import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK, README = ROOT / "nbs" / "index.ipynb", ROOT / "README.md"

# The target of a Markdown link or image, or of an HTML src= or href=.
LINK = re.compile(r"""(?P<before>\]\(|\b(?:src|href)=["'])(?P<target>[^\s)"'>]+)""")


def is_relative(target: str) -> bool:
    "True for a path beside the notebook; False for a URL, an absolute path and a place on the same page."
    return not re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:|/|#", target)


def from_the_top(markdown: str, folder: str = "nbs") -> str:
    "The same text, with links relative to `folder` made relative to the top of the project."

    def rewrite(link: re.Match) -> str:
        target = link["target"]
        return link["before"] + (posixpath.normpath(posixpath.join(folder, target)) if is_relative(target) else target)

    return LINK.sub(rewrite, markdown)


def render(notebook: dict) -> str:
    """Markdown cells as they are; code cells without directives, fenced, each followed by the text that it printed.

    A cell of which the website shows only what it made, which GitHub would not, is left out.
    """
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"]).strip()
        if cell["cell_type"] == "markdown":
            parts.append(from_the_top(source))
        elif cell["cell_type"] == "code" and not re.search(r"^#\|\s*(hide|echo:\s*false)\s*$", source, re.MULTILINE):
            code = re.sub(r"^#\|.*\n?", "", source, flags=re.MULTILINE).strip()
            parts.append(f"```python\n{code}\n```")
            parts += [f"```text\n{text}\n```" for output in cell["outputs"] if (text := text_of(output))]
    return "\n\n".join(part for part in parts if part) + "\n"


def text_of(output: dict) -> str:
    "What an output says in plain text; a picture has to be a file in images/, for GitHub shows no other."
    if any(kind.startswith("image/") for kind in output.get("data", {})):
        raise ValueError("expected pictures of index.ipynb as files in nbs/images, got one in the output of a code cell")
    return "".join(output.get("text") or output.get("data", {}).get("text/plain", "")).rstrip()


if __name__ == "__main__":
    README.write_text(render(json.loads(NOTEBOOK.read_text(encoding="utf-8"))), encoding="utf-8")
