"""The documentation becomes a site: strictly, whole, and with nothing in it that comes from elsewhere."""

import re
from collections import Counter
from importlib import import_module

import pytest
from pages import DOCS, ROOT

import bd3lm_hf


pytest.importorskip("mkdocs", reason="needs MkDocs: pip install 'bd3lm-hf[docs]'")

from mkdocs.commands.build import build  # noqa: E402
from mkdocs.config import load_config  # noqa: E402
from mkdocs.exceptions import Abort  # noqa: E402


CONFIG = ROOT / "mkdocs.yml"
# What the pages of the API describe, and whether they show its whole path.
API = {
    path: bool(options)
    for page in (DOCS / "api").glob("*.md")
    for path, options in re.findall(r"^::: (\S+)\n( +options:\n +show_root_full_path: true)?", page.read_text(), re.M)
}
# What a browser fetches by itself.
FETCHED = re.compile(
    r"""(?:<(?:script|img|link|iframe|source)\b[^>]*?\b(?:src|href)=|url\()["']?((?:https?:)?//[^"')\s>]+)"""
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site. To build strictly is to fail at the first warning."""
    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(CONFIG), site_dir=str(folder), strict=True))
    return folder


def pages_of(nav):
    for item in nav:
        for target in item.values() if isinstance(item, dict) else [item]:
            yield from [target] if isinstance(target, str) else pages_of(target)


def test_the_site_has_every_page_of_the_documentation(site):
    pages = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    assert set(pages_of(load_config(str(CONFIG)).nav)) == pages
    for page in pages:
        assert (site / page).with_suffix(".html").is_file(), page


def test_nothing_is_fetched_from_elsewhere(site):
    assert FETCHED.findall('<script src="https://example.org/x.js">') and FETCHED.findall("url(//example.org/x.woff)")
    fetched = {
        (path.name, url)
        for suffix in ("html", "css")
        for path in site.rglob(f"*.{suffix}")
        for url in FETCHED.findall(path.read_text(encoding="utf-8"))
    }
    assert fetched == set()


def test_every_public_name_has_its_place_on_one_page_of_the_api(site):
    places = Counter(path.rsplit(".", 1)[1] for path in API)
    assert set(places.values()) == {1} and set(bd3lm_hf.__all__) <= set(places)
    shown = "".join(page.read_text(encoding="utf-8") for page in (site / "api").glob("*.html"))
    for path in API:
        module, name = path.rsplit(".", 1)
        described = getattr(import_module(module), name)
        assert f'id="{path}"' in shown, path
        # What is not imported from the package itself has its whole path above its description.
        assert API[path] == (name not in bd3lm_hf.__all__), path
        assert API[path] or described is getattr(bd3lm_hf, name), path


def test_docstrings_come_out_as_sections_and_links(site):
    for page in (site / "api").glob("*.html"):
        text = page.read_text(encoding="utf-8")
        # A section that was not understood stays a paragraph, and a name that was not found stays in brackets.
        assert not re.search(r"(?:<p>|\n)\s*(?:Args|Returns|Raises|Attributes|Yields):", text), page.name
        assert "[<code>" not in text and "<autoref" not in text, page.name


@pytest.mark.parametrize(
    ("text", "nav", "warning"),
    [
        ("[b](b.md#part)", ["a.md", "b.md"], None),
        ("[b](c.md)", ["a.md", "b.md"], "c.md"),
        ("[b](b.md#parts)", ["a.md", "b.md"], "#parts"),
        ("[b](b.md#part)", ["a.md"], "b.md"),
        ("[b](b.md#part)", ["a.md", "b.md", "c.md"], "c.md"),
    ],
    ids=["whole", "link", "anchor", "page outside the navigation", "navigation to nowhere"],
)
def test_what_leads_nowhere_is_an_error(tmp_path, caplog, text, nav, warning):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text(text)
    (tmp_path / "docs" / "b.md").write_text("# B\n\n## Part\n")
    paths = {"docs_dir": str(tmp_path / "docs"), "site_dir": str(tmp_path / "site")}
    config = load_config(str(CONFIG), nav=nav, plugins=[], hooks=[], strict=True, **paths)
    if warning is None:
        return build(config)
    with pytest.raises(Abort):
        build(config)
    assert [record for record in caplog.records if record.levelname == "WARNING" and warning in record.getMessage()]
