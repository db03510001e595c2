"""Hooks of the site (mkdocs.yml): pages that the navigation need not name, and links to code.

A page of docs/ that no list of mkdocs.yml names goes under More; a list entry FOLDER/ stands for
all pages of a folder. A link from a page to a file of the repository outside docs/ becomes a link
to a page with that file's content, so that the site has no dead ends, wherever it is read.
"""

import json
import pathlib
import posixpath
import re
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = pathlib.Path(__file__).parents[1]
SOURCES = "source/"
"""Where the site has the repository's files."""
_LINK = re.compile(r"(?<=\]\()([^)\s#]+)(?=[#)])")
_origins: dict[str, str] = {}
"""Path in the repository of a page that is not in docs/."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files that pages link to, and fills the navigation."""
    _origins.clear()
    pages = [file.src_uri for file in files.documentation_pages()]
    waiting = [(f"docs/{page}", (ROOT / "docs" / page).read_text("utf-8")) for page in pages]
    while waiting:
        origin, text = waiting.pop()
        for link in _LINK.findall(text):
            target = _target(origin, link)
            uri = _uri(target)
            if not uri.startswith(SOURCES) or uri in _origins or not (ROOT / target).is_file():
                continue
            _origins[uri] = target
            content = (ROOT / target).read_text("utf-8")
            files.append(File.generated(config, uri, content=_page(target, content)))
            if target.endswith(".md"):
                waiting.append((target, content))
    config.nav = _complete(config.nav or [], pages)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links between files of the repository into links between pages."""
    here = page.file.src_uri
    origin = _origins.get(here, f"docs/{here}")
    if not origin.endswith(".md"):
        return markdown

    def rewritten(found: re.Match[str]) -> str:
        if ":" in found[1]:
            return found[1]
        return posixpath.relpath(_uri(_target(origin, found[1])), posixpath.dirname(here) or ".")

    return _LINK.sub(rewritten, markdown)


def _target(origin: str, link: str) -> str:
    """The path in the repository that a link in one of its files leads to."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), link))
    return f"{path}/README.md" if (ROOT / path / "README.md").is_file() else path


def _uri(target: str) -> str:
    """Where the site's sources have a file of the repository."""
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    return SOURCES + target + ("" if target.endswith(".md") else ".md")


def _page(path: str, content: str) -> str:
    """A file of the repository as a page."""
    hidden = "---\nsearch: { exclude: true }\n---\n\n"
    if path.endswith(".md"):
        return hidden + content
    if path.endswith(".ipynb"):
        return hidden + f"# {path}\n\n" + "\n\n".join(map(_cell, json.loads(content)["cells"]))
    kind = {".py": "python", ".yaml": "yaml", ".sh": "bash", ".sbatch": "bash"}
    language = kind.get(posixpath.splitext(path)[1], "text")
    return f"{hidden}# {path}\n\n````{language}\n{content}\n````\n"


def _cell(cell: dict[str, Any]) -> str:
    """A cell of a notebook, without its output."""
    source = "".join(cell["source"])
    return source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```"


def _complete(nav: list[Any], pages: list[str]) -> list[Any]:
    """The navigation with folders written out, and with every page somewhere."""
    named: list[str] = []

    def expanded(entry: Any) -> Any:
        if isinstance(entry, dict):
            return {title: expanded(below) for title, below in entry.items()}
        if isinstance(entry, list):
            return [expanded(below) for below in entry]
        if entry.endswith("/"):
            found = sorted(page for page in pages if page.startswith(entry))
            named.extend(found)
            return found
        named.append(entry)
        return entry

    complete = [expanded(entry) for entry in nav]
    if more := sorted(set(pages) - set(named)):
        complete.append({"More": more})
    return complete
