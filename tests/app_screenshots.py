"""
Visits the app of a trained model and takes the screenshots of `docs/`: a script.

    python tests/app_screenshots.py bd3lm-demo docs

Arguments: a checkpoint, such as `make demo` leaves, and the folder of the pictures. Fails where the page does not do
what the pictures are to show.
"""

import sys
import tempfile
from pathlib import Path

from visitor import Visitor, chromium, served

from bd3lm_hf.cli import main


PROMPT = "def read_file(self, path):\n"
GAPS = "def ___(self, path):\n    with open(path) as file:\n        return ___\n"


def settings(visitor, **values):
    for name, value in values.items():
        visitor.type(name, value)


def take_screenshots(checkpoint: str, folder: Path) -> None:
    """Writes `app.png` and its kind into the folder."""
    with tempfile.TemporaryDirectory() as space:
        if main(["app", checkpoint, "--space", space]) != 0:
            raise SystemExit(2)
        with served(Path(space)) as address, chromium() as browser:

            def save(name: str) -> None:
                # What is pointed at looks different.
                browser.execute_script("document.activeElement.blur(); window.scrollTo(0, 0)")
                browser.save_screenshot(str(folder / name))
                print(f"{folder / name}: {(folder / name).stat().st_size / 1000:.0f} kB")

            visitor = Visitor(browser, address)
            settings(visitor, prompt=PROMPT, seed="1", top_p="0.8", pause="0.3", max_new_tokens="96")
            visitor.press("write")
            visitor.until(lambda: len(visitor.all("#text .token")) >= 62)
            assert visitor.all("#text .masked") and visitor.all("#text .now")
            save("app.png")
            browser.get("about:blank")

            visitor = Visitor(browser, f"{address}/?__theme=dark")
            settings(visitor, prompt=PROMPT, seed="1", top_p="0.8", pause="0", max_new_tokens="96")
            visitor.choose("confidence")
            visitor.until(lambda: visitor.all("#denoising_steps"))
            visitor.type("denoising_steps", "2")
            visitor.press("write")
            figures = visitor.finish()
            assert float(figures["tokens/forward"]) > 1.8 and float(figures["perplexity"]) > 1
            print(figures)
            save("app_dark.png")

            visitor = Visitor(browser, address)
            visitor.open_tab("Fill gaps")
            visitor.until(lambda: visitor.all("#gapped textarea")[0].is_displayed())
            settings(visitor, gapped=GAPS, seed="1", top_p="0.8", pause="0")
            visitor.press("fill")
            print(visitor.finish())
            assert "with open(path) as file:" in visitor.text("text") and "___" not in visitor.text("text")
            save("app_fill.png")

            visitor.type("gapped", "def main():\n")
            visitor.press("fill")
            assert "`inputs` must mark gaps by '___', but got a text without one" in visitor.error()
            save("app_error.png")


if __name__ == "__main__":
    take_screenshots(sys.argv[1], Path(sys.argv[2]))
