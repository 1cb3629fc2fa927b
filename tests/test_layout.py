"""What may import what, and how large a file's parts and the top of the repository may be."""

import ast
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

from jetson.bundle import SCRIPTS

# What each folder (or one of its files) may import of ours, besides its own folder. A script may
# import anything, and is imported by scripts alone.
BELOW_KINDS = ("cli", "corpus", "network", "sampling", "model")
MAY_IMPORT = {
    "cli": (),
    "corpus": ("cli",),
    "network": ("cli", "corpus.tokens"),
    "network.encoders": ("cli", "corpus"),
    "network.conditioning": ("cli", "corpus"),
    "network.image_encoders": ("cli", "corpus"),
    "model": ("cli", "corpus.tokens", "network"),
    "sampling": ("cli", "corpus.tokens"),
    "sampling.step": ("cli", "corpus.tokens", "network"),
    "sampling.cached": ("cli", "corpus.tokens", "network"),
    "kinds": (*BELOW_KINDS, "diffusion", "block_diffusion"),
    "diffusion": (*BELOW_KINDS, "kinds"),  # of the same layer
    "block_diffusion": (*BELOW_KINDS, "kinds", "diffusion"),
    "training": (*BELOW_KINDS, "kinds", "diffusion"),
    "measuring": (*BELOW_KINDS, "kinds", "diffusion", "block_diffusion", "training",
                  "jetson.engine_runtime"),
    "jetson": (*BELOW_KINDS, "kinds", "diffusion"),
    "jetson.settings": ("cli",),
    "jetson.engine_builder": ("cli", "corpus.tokens", "sampling"),
    "jetson.engine_runtime": ("cli", "corpus.conditions", "corpus.image_files", "corpus.tokens",
                              "sampling"),
    "jetson.tensorrt_session": ("cli",),
    "jetson.reader": ("corpus.tokens", "sampling"),
}
# What never imports torch, not even when it is called, and what in it may
WITHOUT_TORCH = {"cli": (), "corpus": (), "sampling": ("sampling.step", "sampling.cached"),
                 "jetson.settings": (), "jetson.engine_builder": (), "jetson.engine_runtime": (),
                 "jetson.tensorrt_session": (), "jetson.reader": ()}
HEAVY = {"torch", "onnx", "onnxruntime", "datasets", "matplotlib"}
# The standard library alone, so that a command that does little starts at once
LIGHT = "cli"
MOST_ENTRIES, MOST_SCRIPTS = 27, 13  # at the top of the repository
MOST_LINES = {ast.FunctionDef: 60, ast.AsyncFunctionDef: 60, ast.ClassDef: 250}


def module_name(path: Path) -> str:
    """As it is imported: sampling/loop.py is sampling.loop, and sampling/__init__.py sampling."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FOLDERS = sorted(path.parent for path in ROOT.glob("*/__init__.py"))
FILES = {module_name(path): path
         for path in [*sorted(ROOT.glob("*.py")),
                      *(path for folder in FOLDERS for path in sorted(folder.glob("*.py")))]}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def imported(nodes: Iterator[ast.AST] | list[ast.stmt]) -> set[str]:
    """The modules that these statements import: of ours by their full names, of others the first
    part."""
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module  # one spelling for each import
            # a file of that folder, or something that the module itself holds
            names = [full if (full := f"{node.module}.{alias.name}") in FILES else node.module
                     for alias in node.names]
        else:
            continue
        found |= {name if name in FILES else name.split(".")[0] for name in names}
    return found


def in_use(tree: ast.AST) -> Iterator[ast.AST]:
    """All below a node but what is there for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield node
            yield from in_use(node)


EVERYWHERE = {name: imported(in_use(tree)) for name, tree in TREES.items()}
AT_THE_TOP = {name: imported(tree.body) for name, tree in TREES.items()}


def is_of(name: str, place: str) -> bool:
    """Whether a module is `place` or lies in it."""
    return name == place or name.startswith(f"{place}.")


def rule_of(name: str) -> str | None:
    """The entry of MAY_IMPORT that says most of a module; None for a script."""
    return max((place for place in MAY_IMPORT if is_of(name, place)), key=len, default=None)


def test_imports_have_no_circle():
    left = {name: {other for other in names if other in FILES and other != name}
            for name, names in EVERYWHERE.items()}
    while free := [name for name, names in left.items() if not names & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"in a circle, or behind one: {sorted(left)}"


@pytest.mark.parametrize("name", FILES)
def test_a_module_imports_what_its_folder_may(name):
    rule = rule_of(name)
    if rule is None:
        assert "." not in name, "a folder without a rule"
        return
    allowed = (name.split(".")[0], *MAY_IMPORT[rule])
    ours = {other for other in EVERYWHERE[name] if other in FILES}
    wrong = {other for other in ours if not any(is_of(other, place) for place in allowed)}
    assert not wrong, f"{name} may not import these"


def test_the_rules_are_of_what_there_is():
    for place in {*MAY_IMPORT, *(other for others in MAY_IMPORT.values() for other in others)}:
        assert place in FILES, place
    for place in WITHOUT_TORCH:
        assert place in FILES, place


@pytest.mark.parametrize("place", WITHOUT_TORCH)
def test_some_never_import_torch(place):
    for name in FILES:
        if is_of(name, place) and name not in WITHOUT_TORCH[place]:
            assert "torch" not in EVERYWHERE[name], name
            # nor through another of ours
            for other in EVERYWHERE[name] & FILES.keys():
                assert "torch" not in AT_THE_TOP[other], f"{name} imports {other}"


def test_cli_needs_the_standard_library_alone():
    for name in FILES:
        if is_of(name, LIGHT):
            assert not {other for other in EVERYWHERE[name] - FILES.keys()
                        if other not in sys.stdlib_module_names}, name


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name.endswith(".py")])
def test_what_a_bundle_copies_is_whole_and_without_torch(script):
    copied = {module_name(ROOT / name) for name in SCRIPTS}
    names = AT_THE_TOP[module_name(ROOT / script)]
    assert not names & HEAVY
    assert names & FILES.keys() <= copied
    assert script.split("/")[0] in copied or "/" not in script  # a folder is read by its __init__


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_folder_says_what_lives_there(folder):
    named = set(re.findall(r"[\w/]+\.(?:py|html)\b", ast.get_docstring(TREES[folder.name]) or ""))
    there = {path.name for path in folder.iterdir() if path.is_file() and path.name[0] != "_"}
    assert there <= named
    gone = {name for name in named if not ((folder / name).exists() or (ROOT / name).exists())}
    assert not gone


@pytest.mark.parametrize("name", FILES)
def test_a_file_says_what_it_is(name):
    assert ". " in f"{ast.get_docstring(TREES[name])} ", "a sentence at least"


@pytest.mark.parametrize("name", FILES)
def test_no_function_or_class_is_too_long(name):
    long = {}
    for node in ast.walk(TREES[name]):
        if type(node) in MOST_LINES:
            first = min([node.lineno, *(part.lineno for part in node.decorator_list)])
            if (lines := node.end_lineno - first + 1) > MOST_LINES[type(node)]:
                long[node.name] = lines
    assert not long


def test_the_top_of_the_repository_is_small():
    try:
        done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    if done.returncode or not done.stdout:
        pytest.skip("this is no git repository")
    top = {name.split("/")[0] for name in done.stdout.splitlines()}
    assert len([name for name in top if not name.startswith(".")]) <= MOST_ENTRIES
    assert len([name for name in top if name.endswith(".py")]) <= MOST_SCRIPTS


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="ARM's torch needs them")
def test_numpy_multiplies_in_one_thread_beside_those_of_torch():
    """Two pools of threads that spin on the same cores slow each other down; who sets the variable
    decides. NumPy reads it once, so it must not be there before."""
    def threads(**given: str) -> str:
        clean = {name: x for name, x in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
        return subprocess.run(
            [sys.executable, "-c", "import cli, os, sys\n"
             "print(os.environ['OPENBLAS_NUM_THREADS'], 'numpy' in sys.modules)"],
            cwd=ROOT, env=clean | given, capture_output=True, text=True, check=True).stdout.strip()

    assert threads() == "1 False"
    assert threads(OPENBLAS_NUM_THREADS="4") == "4 False"
