"""The house: who imports whom, what the four packages are needed for, and that the README speaks of what there is."""

import ast
import functools
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOP = ("slowfast", "model", "data", "eval")
FILES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts): file
    for file in [*(ROOT / f"{name}.py" for name in TOP), *ROOT.glob("paper/*.py"), *ROOT.glob("demo/*.py")]
}
RUN_TIME = {"torch", "numpy", "sentencepiece", "safetensors"}
LAZY = {
    "matplotlib",
    "scipy",
    "huggingface_hub",
    "pooch",
    "transformers",
    "accelerate",
}  # and these where they are used, so that a run needs none


@functools.cache
def imports(name, inside_functions=False):
    """The dotted names that a module imports, all of them or those inside of its functions alone; of
    `from a import b` both "a" and "a.b"."""
    tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
    functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))]
    found = set()
    for root in functions if inside_functions else [tree]:
        for node in ast.walk(root):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name}: a relative import"
                found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def ours(name):
    return {other for other in imports(name) if other in FILES and other != name}


def reached(name, seen):
    for other in ours(name) - seen:
        seen.add(other)
        reached(other, seen)
    return seen


@pytest.mark.parametrize("name", FILES)
def test_no_import_goes_in_a_circle(name):
    assert name not in reached(name, set())


def test_who_imports_whom():
    assert not ours("slowfast") and not ours("data")
    assert ours("model") == {"data"} and ours("eval") == {"data"}
    for name in FILES:
        if name.startswith("demo."):
            assert ours(name) <= {"model", "data"}
        if name.startswith("paper."):
            assert not any(other.startswith("demo.") for other in ours(name))
    assert reached("paper.arguments", set()) == {"paper.options", "paper.methods"}
    assert "paper.run" not in reached("paper.results", set())


@pytest.mark.parametrize("name", FILES)
def test_imports_stand_at_the_top_and_are_the_four_packages(name):
    outside = {module.partition(".")[0] for module in imports(name) - imports(name, inside_functions=True)}
    outside -= {*TOP, "paper", "demo", *sys.stdlib_module_names}
    assert outside <= RUN_TIME
    inside = imports(name, inside_functions=True)
    if name == "paper.__main__":  # what is wrong with the arguments is said before torch is imported, and by it alone
        assert inside == {"paper", "paper.commands"}
    else:
        assert {module.partition(".")[0] for module in inside} <= LAZY


def test_slowfast_needs_torch_alone():
    assert {module.partition(".")[0] for module in imports("slowfast")} - sys.stdlib_module_names == {"torch"}


def test_the_four_modules_work_without_the_folders(tmp_path):
    for name in TOP:
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    command = [sys.executable, "-c", f"import {', '.join(TOP)}"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).returncode == 0


# --- the README ----------------------------------------------------------------------------------------------

README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def test_the_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 250 and max(map(len, lines)) <= 120


def test_the_readme_names_targets_and_files_that_there_are():
    targets = subprocess.run(["make", "-pnq"], cwd=ROOT, capture_output=True, text=True).stdout
    named = set(
        re.findall(r"make (?:-j \d )?([a-z]+[a-z0-9-]*)", "\n".join(re.findall(r"`[^`\n]+`|^    .*", README, re.M)))
    )
    assert {"demo", "test", "xnli"} <= named
    assert not [name for name in named if not re.search(rf"^{name}:", targets, re.M)]
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", README)
    assert links and not [link for link in links if not (ROOT / link).exists()]


def test_ci_runs_the_test_command_of_the_readme():
    assert re.search(r"^    make test\b", README, re.M)
    assert re.search(r"^make test$", (ROOT / ".ci" / "run").read_text(), re.M)
