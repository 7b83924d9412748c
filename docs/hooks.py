"""What MkDocs does not know of these pages: links to files of the repository, and how docstrings name each other."""

import re
from pathlib import Path


# [label](../path): out of the documentation, which a site does not hold.
OUTSIDE_LINK = re.compile(r"\[([^\]]+)\]\(\.\./[^)]+\)")
# [`name`] of a docstring, as it comes out of Markdown.
NAME = re.compile(r"\[<code>([\w.]+)</code>\]")
API = Path(__file__).parent / "api"


def public_paths(folder: Path = API) -> dict[str, str]:
    """Where each public name of the pages on the API is defined: name -> module path."""
    pages = [page.read_text(encoding="utf-8") for page in folder.glob("*.md")]
    paths = [path for text in pages for path in re.findall(r"^::: (\S+)", text, re.MULTILINE)]
    return {path.rsplit(".", 1)[1]: path for path in paths}


def on_page_markdown(markdown: str, page, **kwargs) -> str:
    """Names files of the repository without a link, except where a page of the documentation is meant."""
    return markdown if page.file.src_uri.startswith("api/") else OUTSIDE_LINK.sub(r"\1", markdown)


def on_page_content(html: str, **kwargs) -> str:
    """Links what docstrings write as [`name`], or [`Class.member`], where it is public."""
    paths = public_paths()

    def link(match: re.Match) -> str:
        name, _, member = match[1].partition(".")
        code = f"<code>{match[1]}</code>"
        if name not in paths:
            return code
        return f'<autoref optional identifier="{paths[name]}{member and "." + member}">{code}</autoref>'

    return NAME.sub(link, html)
