"""English prose that is already on the machine: the documentation strings of installed packages.

1. List the Python files of the running interpreter's site-packages and standard library.
2. Order them by a hash of their module name, so that any prefix is a fair sample of all packages.
3. Parse each (never import it) and join the docstrings of its module, classes and functions.

Nothing is copied into this project; the text is read in place.
"""

import ast
import gc
import hashlib
import inspect
import os
import sysconfig
import warnings
from collections.abc import Iterator

from llm_jax.config import nearest
from llm_jax.data.documents import Document, Rejects
from llm_jax.errors import DataError

MIN_CHARACTERS = 80  # shorter ones are mostly "Returns the name." and the like
# tests, and copies of other packages that would repeat their text
SKIPPED_FOLDERS = {
    *("__pycache__", "site-packages", "dist-packages", "_distutils"),
    *("test", "tests", "testing", "idle_test", "conftest"),
    *("vendor", "vendored", "_vendor", "_vendored", "third_party", "externals", "extern"),
}


def read(source: str, packages: tuple[str, ...], rejects: Rejects) -> Iterator[Document]:
    """Yields one document per module: its docstrings, cleaned, joined by blank lines.

    Args:
      source: name of the source.
      packages: top-level names, such as ("numpy", "jax"); empty means all of them.
      rejects: gets the count of documents.

    Raises:
      DataError: a package is not installed.
    """
    seen: set[bytes] = set()
    for module, file in _modules(packages):
        texts = []
        for text in _docstrings(file):
            key = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).digest()
            if key not in seen:
                seen.add(key)
                texts.append(text)
        if texts and (document := rejects.accept("\n\n".join(texts), source, module)):
            yield document


def _modules(packages: tuple[str, ...]) -> list[tuple[str, str]]:
    """(module name, file) of every module, in the order of a hash of the name."""
    paths = sysconfig.get_paths()
    found: dict[str, str] = {}
    for root in dict.fromkeys(paths[key] for key in ("purelib", "platlib", "stdlib")):
        for folder, folders, names in os.walk(root):
            folders[:] = sorted(f for f in folders if f not in SKIPPED_FOLDERS and "." not in f)
            for name in names:
                if name.endswith(".py") and not name.startswith("test_"):
                    parts = os.path.relpath(os.path.join(folder, name[:-3]), root).split(os.sep)
                    module = ".".join(parts).removesuffix(".__init__")
                    found.setdefault(module, os.path.join(folder, name))
    tops = {module.partition(".")[0] for module in found}
    for package in packages:
        if package not in tops:
            raise DataError(
                f"package-docs: no package {package!r} is installed; {nearest(package, list(tops))}"
            )
    chosen = [m for m in found if not packages or m.partition(".")[0] in packages]
    chosen.sort(key=lambda module: hashlib.sha256(module.encode()).digest())
    return [(module, found[module]) for module in chosen]


def _docstrings(file: str) -> Iterator[str]:
    """Docstrings of a file in the order they stand; none when it cannot be read or parsed."""
    try:
        with open(file, "rb") as stream:
            code = stream.read()
    except OSError:
        return
    if b'"""' not in code and b"'''" not in code:
        return
    collecting = gc.isenabled()
    gc.disable()  # parsing makes many small objects and no cycles: a quarter faster without
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    finally:
        if collecting:
            gc.enable()
    yield from _walk(tree)


def _walk(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef,
) -> Iterator[str]:
    text = ast.get_docstring(node, clean=False)
    if text is not None and len(text := inspect.cleandoc(text).strip()) >= MIN_CHARACTERS:
        yield text
    bodies: list[list[ast.stmt]] = [node.body]
    while bodies:
        for child in bodies.pop():
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _walk(child)
            elif isinstance(child, ast.If | ast.Try):  # version switches and optional imports
                bodies += [child.orelse, child.body]
