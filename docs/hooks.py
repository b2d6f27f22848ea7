"""The pages of the site that lie at the root of the repository, where code hosts look for them."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add these pages."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=moved((ROOT / source).read_text())))
    return files


def moved(text: str) -> str:
    """Return the text of a file of the root for a place in docs/: links to pages follow, other files are only named."""
    places = {source: page for page, source in PAGES.items()}

    def link(found: re.Match[str]) -> str:
        label, path, anchor = found.groups()
        if re.match("https?:", path):
            return found[0]
        path = path.removeprefix("docs/") if path.startswith("docs/") else places.get(path)
        return label if path is None else f"[{label}]({path}{anchor})"

    return re.sub(r"\[([^\]]+)\]\(([^)#]+)([^)]*)\)", link, text)
