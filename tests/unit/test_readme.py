"""The README's snippets run as written."""

import re
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def test_the_library_snippet_runs_as_written() -> None:
    snippets = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    library = [snippet for snippet in snippets if "load_model" in snippet]
    assert len(library) == 1
    exec(compile(library[0], "README.md", "exec"), {})


def test_the_images_of_the_readme_are_there() -> None:
    images = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README.read_text())
    assert images
    for image in images:
        assert (README.parent / image).stat().st_size > 10_000
