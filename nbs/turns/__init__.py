"""*Your turn*: you write a function, `grade` says whether it is right.

    grade(my_function)       not written yet / wrong: …, try … / right
    answer("my_function")    shows one way to write it

The graders stand in day1.py, day2.py and so on beside this file, one function each, named like
the function that it judges. Read them only after you have tried: they say what is looked at. The
answers are in the folder answers/.
"""

import importlib
import inspect
import traceback
from collections.abc import Callable
from pathlib import Path

GRADERS: dict[str, Callable] = {}            # name of the learner's function → its grader
HERE = Path(__file__).resolve().parent


class Wrong(Exception):
    """What is wrong with an answer (with the smallest input that shows it), and what to try."""

    def __init__(self, what: str, hint: str = ""):
        super().__init__(what, hint)
        self.what, self.hint = what, hint


def turn(grader: Callable) -> Callable:
    """Make `grader` the judge of the functions of its name: it raises Wrong, or returns."""
    if grader.__name__ in GRADERS and GRADERS[grader.__name__].__module__ != grader.__module__:
        raise ValueError(f"there are two turns named {grader.__name__}")
    GRADERS[grader.__name__] = grader
    return grader


def modules(folder: Path = HERE) -> list[str]:
    """The names of the files in `folder`: day1, …, then the appendices."""
    names = [path.stem for path in folder.glob("*.py") if path.stem != "__init__"]
    return sorted(names, key=lambda name: (not name.startswith("day"), name))


def grader_of(name: str) -> Callable:
    """The grader for the function `name`. Raises KeyError where no turn has this name."""
    for module in modules():
        if name in GRADERS:
            break
        importlib.import_module(f"turns.{module}")
    if name not in GRADERS:
        raise KeyError(f"no turn is named {name!r}; the turns so far: {', '.join(GRADERS)}")
    return GRADERS[name]


def verdict(written: Callable) -> str:
    """What the grader says of `written`: "not written yet", "right" or "wrong: …"."""
    grader = grader_of(written.__name__)
    try:
        grader(written)
    except NotImplementedError:
        return "not written yet"
    except Wrong as wrong:
        return f"wrong: {wrong.what}" + (f"\n    try: {wrong.hint}" if wrong.hint else "")
    except Exception as error:               # the learner's code failed, or gave the wrong kind
        where = traceback.extract_tb(error.__traceback__)[-1]
        return (f"wrong: {type(error).__name__}: {error}\n"
                f"    in {where.name}, line {where.lineno}: {where.line}")
    return "right"


def grade(written: Callable) -> None:
    """Print what the grader of this function's name says."""
    print(f"{written.__name__}: {verdict(written)}")


def answer(name: str) -> None:
    """Print one solution of the turn or exercise `name`."""
    for module in modules(HERE / "answers"):
        found = getattr(importlib.import_module(f"turns.answers.{module}"), name, None)
        if found is not None:
            print(inspect.getsource(found))
            return
    raise KeyError(f"no answer is named {name!r}")
