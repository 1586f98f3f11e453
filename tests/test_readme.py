"""The README's Python examples run as they stand."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLES = re.findall(r"(?:<!-- needs: (\w+) -->\n)?```python\n(.*?)```", README, re.DOTALL)


def test_examples_are_found():
    assert len(EXAMPLES) >= 3


@pytest.mark.parametrize(("needs", "code"), EXAMPLES)
def test_example(needs, code):
    if needs:
        pytest.importorskip(needs)
    exec(compile(code, "README.md", "exec"), {})
