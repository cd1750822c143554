"""tools/mutants.py: each change can still be made, and has tests to notice it."""

import ast
from pathlib import Path

import pytest

from tools.mutants import MUTANTS, REST, ROOT, nearest_tests


@pytest.mark.parametrize("name, module, before, after", MUTANTS, ids=[m[0] for m in MUTANTS])
def test_the_text_occurs_once(name, module, before, after):
    text = (ROOT / "nanovllm" / module).read_text(encoding="utf-8")
    assert text.count(before) == 1 and before != after
    if module.endswith(".py"):
        ast.parse(text.replace(before, after))
    assert Path(nearest_tests(module)[0]).exists()


def test_names_are_those_of_one_mutant():
    assert len({mutant[0] for mutant in MUTANTS}) == len(MUTANTS)
    assert all(Path(path).exists() for path in REST)
