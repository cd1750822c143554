"""What you change in a cell is what the engine runs.

The package holds the same definitions as the notebooks. After `edits.count()`, each cell that
begins with `#| export layers.layernorm` is compared with the module of that name when it has run:

- what says the same stays as it is, and the notebook's name means the package's object;
- what you changed is put into the module, in place: whoever holds the class or function, in this
  notebook or inside the package, runs your version from now on.

Run the unchanged cell again to have the old version back; restarting the kernel does it too. The
files do not change (`python tools/export.py` writes them). A method that you delete stays until the
kernel restarts, and the other processes of an engine on several ranks import the files.

Every notebook imports this before anything of the package, so it also sees whether that is ours.
"""

import ast
import importlib
import importlib.util
import linecache
import re
import sys
from enum import EnumMeta
from pathlib import Path
from types import FunctionType, ModuleType

PACKAGE = "nanovllm"
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_now: dict[str, dict[str, str]] = {}         # module → {what it defines: its text as it runs now}


def check_package() -> None:
    """ImportError if there is no package, or another project's: nano-vllm has the same name."""
    spec = importlib.util.find_spec(PACKAGE)
    remedy = "`pip install -e .` at the top of this repository, then restart the kernel"
    if spec is None or spec.origin is None:
        raise ImportError(f"{PACKAGE} is not installed for this kernel: {remedy}")
    if "nbs/01_foundations.ipynb" not in Path(spec.origin).read_text(encoding="utf-8"):
        raise ImportError(f"{spec.origin} is not this course's {PACKAGE}: the project nano-vllm "
                          "has the same import name. Give each an environment of its own, or here: "
                          f"`pip uninstall nano-vllm`, {remedy}")


check_package()


def names_of(node: ast.stmt) -> list[str]:
    """The names that a statement binds."""
    if isinstance(node, DEFINITIONS):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [name.id for target in targets if target for name in ast.walk(target)
            if isinstance(name, ast.Name)]


def texts(source: str, package: str) -> dict[str, str]:
    """Name → text of each definition in `source`; a class has one for each part of its body."""
    tree = ast.parse(source)
    for node in ast.walk(tree):              # the package's imports are relative
        if isinstance(node, ast.ImportFrom) and node.level:
            node.module = importlib.util.resolve_name("." * node.level + (node.module or ""),
                                                      package)
            node.level = 0
    found = {}
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        text = ast.unparse(node)
        if isinstance(node, ast.ClassDef):
            for part in node.body:
                name = "".join(names_of(part)) or ast.unparse(part)
                found[f"{node.name}.{name}"] = ast.unparse(part)
            bases = list(map(ast.unparse, node.bases))
            if bases != [node.name]:         # a later piece of a class says nothing of its bases
                found[node.name] = "\n".join(map(ast.unparse, node.decorator_list + node.bases))
        else:
            found["".join(names_of(node)) or text] = text
    return found


def replace(old, new, name: str, module: ModuleType) -> None:
    """Let `module` and all who imported `name` from it have `new` in place of `old`."""
    for other in [module, *(m for key, m in sys.modules.items() if key.startswith(PACKAGE))]:
        if vars(other).get(name) is old:
            setattr(other, name, new)


def put(old, new, name: str, module: ModuleType) -> None:
    """Make `old` behave like `new` where it stands; replace it where that cannot be done."""
    if isinstance(old, FunctionType) and isinstance(new, FunctionType) \
            and old.__code__.co_freevars == new.__code__.co_freevars == ():
        for part in ("__code__", "__defaults__", "__kwdefaults__", "__annotations__", "__doc__"):
            setattr(old, part, getattr(new, part))
        setattr(module, name, old)
    elif isinstance(old, type) and isinstance(new, type) and not isinstance(old, EnumMeta) \
            and not issubclass(old, tuple) and "__slots__" not in vars(new):
        for part, value in vars(new).items():
            function = getattr(value, "__func__", getattr(value, "fget", value))
            for variable, cell in zip(getattr(getattr(function, "__code__", None),
                                              "co_freevars", ()),
                                      getattr(function, "__closure__", None) or ()):
                if variable == "__class__":  # what super() looks at
                    cell.cell_contents = old
            if part not in ("__dict__", "__weakref__", "__module__", "__qualname__", "__doc__"):
                setattr(old, part, value)
        setattr(module, name, old)
    else:
        setattr(module, name, old)           # where `replace` looks for it
        replace(old, new, name, module)


def apply(source: str, module: ModuleType) -> list[str]:
    """Put into `module` what `source` says otherwise; returns the names of what changed."""
    if module.__name__ not in _now:
        with open(module.__file__, encoding="utf-8") as file:
            _now[module.__name__] = texts(file.read(), module.__package__)
    now, here = _now[module.__name__], texts(source, module.__package__)
    changed = [name for name, text in here.items() if now.get(name) != text]
    tops = {name.partition(".")[0] for name in changed}
    file = f"<your {module.__name__} {len(linecache.cache)}>"
    linecache.cache[file] = len(source), None, source.splitlines(True), file   # for tracebacks
    for node in ast.parse(source).body:
        names = names_of(node)
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            wanted = [a.asname or a.name.partition(".")[0] for a in node.names]
            needed = changed and not all(hasattr(module, name) for name in wanted)
        else:
            needed = bool(tops & set(names)) or ast.unparse(node) in changed
        if needed:
            before = {name: getattr(module, name, None) for name in names}
            exec(compile(ast.Module([node], []), file, "exec"), vars(module))
            for name, old in before.items():
                new = getattr(module, name)
                if old is not None:
                    put(old, new, name, module)
    now.update(here)
    return changed


def after_cell(result) -> None:
    """Called by IPython after each cell: `result.info.raw_cell` is its source."""
    source = result.info.raw_cell or ""
    found = re.match(r"#\s*\|\s*export +([\w.]+)", source)
    if not found or not result.success:
        return
    name = PACKAGE if found[1] == "__init__" else f"{PACKAGE}.{found[1]}"
    try:
        module = importlib.import_module(name)
    except ImportError as error:             # a module that needs what is not installed
        if error.name and error.name.startswith(PACKAGE):
            print(f"edits: {name} is not there: run `python tools/export.py` once")
        return
    from IPython import get_ipython
    if changed := apply(source, module):
        print(f"edits: in {name} now runs your {', '.join(changed)}")
    for node in ast.parse(source).body:
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            for defined in names_of(node):
                if hasattr(module, defined):
                    get_ipython().user_ns[defined] = getattr(module, defined)


def count() -> None:
    """From the next cell on, what an export cell says is what the package runs."""
    from IPython import get_ipython
    shell = get_ipython()
    if shell is None:
        raise RuntimeError("edits.count() works in a notebook: there are no cells here")
    callbacks = shell.events.callbacks["post_run_cell"]
    if after_cell.__name__ not in [callback.__name__ for callback in callbacks]:
        shell.events.register("post_run_cell", after_cell)
