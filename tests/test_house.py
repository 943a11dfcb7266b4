"""The house: imports run one way, and what only reads files starts without transformers."""

import ast
import subprocess
import sys

from conftest import ROOT

FIVE = {"torch", "transformers", "safetensors", "numpy", "tqdm"}
SCRIPTS = {"train_steering", "eval_steering", "export_vector"}
SHARED = {"hook_model", "data_filter"}  # plain modules that scripts import


def product_files():
    return [
        path
        for folder in (".", "steering", "evaluation", "interop")
        for path in (ROOT / folder).glob("*.py")
    ]


def imports_of(tree):
    """Modules that a tree imports: "steering.run_folder", "torch", ..."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "plain modules: no relative imports"
            yield node.module


def test_imports_run_from_scripts_to_interop_and_evaluation_to_steering():
    forbidden = {
        "steering": SCRIPTS | SHARED | {"evaluation", "interop"},
        "evaluation": SCRIPTS | SHARED | {"interop"},
        "interop": SCRIPTS | SHARED,
        "hook_model": SCRIPTS | {"data_filter", "evaluation", "interop"},
        "data_filter": SCRIPTS | {"hook_model", "evaluation", "interop"},
        **{script: SCRIPTS - {script} for script in SCRIPTS},
    }
    seen = set()
    for path in product_files():
        room = path.stem if path.parent == ROOT else path.parent.name
        seen.add(room)
        roots = {module.split(".")[0] for module in imports_of(ast.parse(path.read_text()))}
        assert not roots & forbidden[room], f"{path.relative_to(ROOT)} imports {roots}"
    assert seen == set(forbidden)


def test_packages_beyond_the_five_are_imported_where_they_are_used():
    for path in product_files():
        tree = ast.parse(path.read_text())
        at_top = ast.Module(
            [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)], []
        )
        roots = {module.split(".")[0] for module in imports_of(at_top)}
        ours = SCRIPTS | SHARED | {"steering", "evaluation", "interop"}
        assert roots <= sys.stdlib_module_names | FIVE | ours, path


def test_scripts_start_without_transformers_and_the_table_of_rows_without_torch():
    for module, absent in (
        ("train_steering", "transformers"),
        ("eval_steering", "transformers"),
        ("export_vector", "transformers"),
        ("data_filter", "torch"),
    ):
        program = f"import sys, {module}; sys.exit({absent!r} in sys.modules)"
        assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0, module
