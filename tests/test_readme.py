"""The README's Python examples run as they stand, and print what it says they print."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLES = re.findall(r"(?:<!-- needs: (\w+) -->\n)?```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", README, re.DOTALL)


def test_examples_are_found():
    assert len(EXAMPLES) == README.count("```python\n") >= 3
    assert sum(bool(printed) for *_, printed in EXAMPLES) == README.count("```text\n") >= 1


@pytest.mark.parametrize(("needs", "code", "printed"), EXAMPLES)
def test_example(needs, code, printed, capsys):
    if needs:
        pytest.importorskip(needs)
    exec(compile(code, "README.md", "exec"), {})
    if printed or "print(" in code:
        assert capsys.readouterr().out == printed
