"""Scripts in benchmarks/ are not run by tests; what they import is there, and each says what it takes."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = [path.stem for path in sorted(BENCHMARKS.glob("*.py")) if "__main__" in path.read_text(encoding="utf-8")]
HELP = """
import runpy, sys
names, sys.argv[1:] = sys.argv[1:], ["--help"]
for name in names:
    print("script", name)
    try:
        runpy.run_path(name + ".py", run_name="__main__")
    except SystemExit as end:
        assert end.code == 0, name
"""


def test_what_they_import_of_the_package_is_there():
    for path in BENCHMARKS.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):  # those inside functions, too
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("e2p_jax"):
                module = importlib.import_module(str(node.module))
                for name in (alias.name for alias in node.names):
                    if not hasattr(module, name):  # a module of its own, or not there
                        assert importlib.import_module(f"{node.module}.{name}"), path


def test_each_says_what_it_takes():
    done = subprocess.run([sys.executable, "-c", HELP, *SCRIPTS], cwd=BENCHMARKS, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr
    helps = dict(text.split("\n", 1) for text in done.stdout.split("script ")[1:])
    assert set(helps) == set(SCRIPTS) and {"training", "generation", "growth"} <= set(SCRIPTS)
    assert all("--help" in text for text in helps.values())
