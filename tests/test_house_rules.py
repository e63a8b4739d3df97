"""The rules of the house, read off the source with `ast`: who imports whom, sizes, configs, names."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIBRARY = sorted((ROOT / "llm_jax").rglob("*.py"))

# package or module of llm_jax -> the ones it may import besides itself; None: everything
MAY_IMPORT: dict[str, set[str] | None] = {
    "errors": set(),
    "config": {"errors"},
    "tokenizer": {"config", "errors"},
    "sharding": {"config", "errors"},
    "kernels": {"config", "errors"},
    "data": {"config", "errors", "tokenizer"},
    "model": {"config", "errors", "kernels", "sharding"},
    "train": {"config", "errors", "model", "sharding", "data.batch"},
    "checkpoint": {"config", "errors", "model", "sharding"},
    "generate": {"config", "errors", "model", "sharding", "tokenizer"},
    "instruct": {"config", "errors", "data", "tokenizer"},
    "eval": {"config", "errors", "model", "generate", "data", "tokenizer", "sharding"},
    "plan": {"config", "errors", "train", "model", "sharding", "kernels", "data.batch"},
    "report": {"config", "errors"},
    "api": None,
    "__init__": None,
    "run": None,
}

# third-party package -> the parts of llm_jax that may import it
FENCES = {
    "flax": {"model", "sharding"},
    "optax": {"train"},
    "orbax": {"checkpoint"},
    "safetensors": {"checkpoint"},
    "grain": {"data", "instruct"},
    "sentencepiece": {"tokenizer"},
    "tokenizers": {"tokenizer"},
    "apache_beam": {"data"},
}
NO_JAX = {"tokenizer", "data", "config", "errors"}  # data workers must start fast
MAX_LINES, MAX_KERNEL_LINES, MAX_FUNCTION_LINES = 400, 600, 60


def part_of(path: Path) -> str:
    """`data` for .../llm_jax/data/batch.py, `config` for .../llm_jax/config.py."""
    parts = path.parts
    below = len(parts) - 1 - parts[::-1].index("llm_jax")
    return parts[below + 1].removesuffix(".py")


def imports(path: Path) -> list[str]:
    """Dotted names of everything a file imports, wherever in it."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import; write it out"
            found.append(node.module or "")
            if node.module == "llm_jax":
                found += [f"llm_jax.{alias.name}" for alias in node.names]
    return found


def violations(path: Path) -> list[str]:
    part, wrong = part_of(path), []
    allowed = MAY_IMPORT[part]
    for name in imports(path):
        top = name.split(".")[0]
        if part in NO_JAX and top in ("jax", "jaxlib"):
            wrong.append(f"{path.name} imports {name}: {part} must load without jax")
        if top in FENCES and part not in FENCES[top]:
            wrong.append(f"{path.name} imports {name}: only {FENCES[top]} may")
        if top != "llm_jax" or name == "llm_jax" or allowed is None:
            continue
        inner = name.removeprefix("llm_jax.")
        own = inner == part or inner.startswith(part + ".")
        if not own and not any(inner == a or inner.startswith(a + ".") for a in allowed):
            wrong.append(f"{path.name} imports {name}: {part} may import only {sorted(allowed)}")
    return wrong


def test_every_file_imports_only_what_its_layer_may():
    assert [v for path in LIBRARY for v in violations(path)] == []


def test_a_planted_violation_of_each_kind_is_caught(tmp_path):
    planted = tmp_path / "llm_jax" / "data" / "planted.py"
    planted.parent.mkdir(parents=True)
    planted.write_text(
        "import jax\nimport optax\nfrom llm_jax.train import loop\nfrom llm_jax import run\n"
    )
    assert len(violations(planted)) == 4


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_is_small_documented_and_well_named(path):
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    limit = MAX_KERNEL_LINES if part_of(path) == "kernels" else MAX_LINES
    assert text.count("\n") <= limit, "does it hold more than one idea?"
    assert ast.get_docstring(tree), "a module says what it is"
    assert path.stem not in {"utils", "common", "helpers", "misc"}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} is {length} lines"
        # config.py itself walks the fields of dataclasses it does not know
        if isinstance(node, ast.Call) and path.name != "config.py":
            called, subject = node.func, node.args[:1]
            by_name = isinstance(called, ast.Name) and called.id == "getattr"
            of_config = [a for a in subject if isinstance(a, ast.Name) and a.id == "config"]
            assert not (by_name and of_config), "a setting is read as an attribute"


def test_importing_llm_jax_loads_neither_jax_nor_any_extra():
    import subprocess
    import sys

    code = "import llm_jax, sys; print([m for m in ('jax', 'flax', 'torch', 'transformers', 'wandb', 'apache_beam') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_readme_shows_every_package_and_names_both_commands():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for folder in sorted({part_of(p) for p in LIBRARY if p.parent != ROOT / "llm_jax"}):
        assert f"{folder}/" in readme, f"the tree does not show {folder}/"
    assert "bash tools/demo.sh" in readme
    assert "bash tools/test.sh" in readme
