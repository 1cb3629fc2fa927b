"""Do the tests notice? Changes the code in small ways, one at a time, and runs the tests on each.

    python tests/mutate.py                              # 60 mutants of each file, some hours
    python tests/mutate.py --files sampling/loop.py --sample 0      # all of one file
    python tests/mutate.py --files sampling/loop.py --only 12 57    # these, by number

Writes mutants.json: what was sampled, and every mutant that survived. Those that tests/mutants.json
explains are no fault; any other one ends in status 1. A mutant is known by its place (function and
text), so that moved lines change nothing.

torch is read once: every mutant is a fork of this process, in a copy of the repository.
"""

import argparse
import ast
import copy
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXPLAINED = Path(__file__).with_name("mutants.json")

# What is changed, where (functions whose name begins so; all without any), and the tests that must
# notice: those that are the quickest to do so first.
IN_PROCESS = "not as_typed and not stories_finish"
# Of the tests of training, those of its steps, and one start of two processes.
STEPS = ("accumulation or schedule or clipped or counts or reads_its or learns or "
         "learning_rate or average or finite or bit_identical or overflow or broken_weights or "
         "promises or test_optimizers or other_recipes or same_bits or muons or its_share or "
         "seeded or drops_out")
OF_DIFFUSION = ["tests/test_diffusion.py", "tests/test_autoregressive.py",
                "tests/test_conditional.py"]
OF_SAMPLING = ["tests/test_sampler.py", "tests/test_diffusion.py", "tests/test_generate.py", "-k",
               IN_PROCESS]
OF_NETWORK = ["tests/test_layers.py", "tests/test_model.py", "tests/test_generate.py",
              "tests/test_conditional.py", "tests/test_optimizers.py", "-k", IN_PROCESS]
OF_STEPS = ["tests/test_train.py", "tests/test_parallel.py", "-k", STEPS]
TARGETS = {
    "diffusion.py": ((), OF_DIFFUSION),
    "kinds/likelihood.py": ((), OF_DIFFUSION),
    "sampling/step.py": ((), OF_DIFFUSION),
    "sampling/sampler.py": ((), OF_SAMPLING),
    "sampling/loop.py": ((), OF_SAMPLING),
    "sampling/noise.py": ((), OF_SAMPLING),
    "sampling/paces.py": ((), OF_SAMPLING),
    "sampling/rows.py": (("blank_story", "draw_length"), OF_SAMPLING),
    "network/layers.py": ((), OF_NETWORK),
    "network/attention.py": ((), OF_NETWORK),
    "network/dropout.py": ((), OF_NETWORK),
    "network/transformer.py": (("Block",), OF_NETWORK),
    "training/optimizers.py": ((), ["tests/test_optimizers.py", *OF_STEPS]),
    "training/steps.py": (("Steps.learning_rate", "Steps.take", "Steps.gradients", "Steps.update"),
                          OF_STEPS),
    "training/building.py": (("StageModel.synchronise_gradients",), OF_STEPS),
}
TIMEOUT = 400  # seconds; a mutant that hangs is noticed too


# ---- the changes ---------------------------------------------------------------------------------

SWAPS: dict[type, tuple[type, ...]] = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt), ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,), ast.In: (ast.NotIn,), ast.NotIn: (ast.In,),
    ast.Add: (ast.Sub,), ast.Sub: (ast.Add,), ast.Mult: (ast.Div,), ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Div, ast.Mult), ast.Mod: (ast.FloorDiv,), ast.Pow: (ast.Mult,),
    ast.BitAnd: (ast.BitOr,), ast.BitOr: (ast.BitAnd,), ast.And: (ast.Or,), ast.Or: (ast.And,),
}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "floor": "ceil", "ceil": "floor",
         "sin": "cos", "cos": "sin", "minimum": "maximum", "maximum": "minimum"}


@dataclass
class Mutant:
    number: int
    where: str  # the function
    line: int
    before: str
    after: str
    source: str

    @property
    def key(self) -> str:
        return f"{self.where}: {self.before} -> {self.after}"


def changes(node: ast.AST) -> Iterator[Callable[[], ast.AST | None]]:
    """What may stand in the place of a node; None takes a statement away."""
    def same() -> ast.AST:
        return copy.deepcopy(node)

    def replaced(**fields) -> ast.AST:
        new = same()
        for name, value in fields.items():
            setattr(new, name, value)
        return new

    if isinstance(node, ast.Compare):
        for i, operator in enumerate(node.ops):
            for other in SWAPS.get(type(operator), ()):
                yield lambda i=i, other=other: replaced(
                    ops=[*node.ops[:i], other(), *node.ops[i + 1:]])
    elif isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign):
        for other in SWAPS.get(type(node.op), ()):
            yield lambda other=other: replaced(op=other())
    elif isinstance(node, ast.UnaryOp):
        yield lambda: copy.deepcopy(node.operand)
    elif isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            yield lambda: replaced(value=not node.value)
        elif isinstance(node.value, int | float):
            yield lambda: replaced(value=node.value + 1)
            yield lambda: replaced(value=node.value - 1)
    elif isinstance(node, ast.IfExp):
        yield lambda: replaced(body=node.orelse, orelse=node.body)
    elif isinstance(node, ast.If):
        yield lambda: replaced(test=ast.UnaryOp(ast.Not(), node.test))
    elif isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else (
            getattr(node.func, "id", ""))
        if name in NAMES:
            field = "attr" if isinstance(node.func, ast.Attribute) else "id"
            yield lambda: replaced(func=_with(node.func, field, NAMES[name]))
        if isinstance(node.func, ast.Attribute) and not node.args:
            yield lambda: copy.deepcopy(node.func.value)  # x.f() -> x
        if len(node.args) == 2 and not any(isinstance(a, ast.Starred) for a in node.args) and (
                name not in ("require", "min", "max", "minimum", "maximum")):
            yield lambda: replaced(args=node.args[::-1])
        for i in range(len(node.keywords)):
            yield lambda i=i: replaced(keywords=node.keywords[:i] + node.keywords[i + 1:])
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call | ast.Yield) or isinstance(
            node, ast.AugAssign | ast.Continue | ast.Break | ast.Raise) or (
            isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript)):
        yield lambda: None


def _with(node: ast.AST, field: str, value: str) -> ast.AST:
    new = copy.deepcopy(node)
    setattr(new, field, value)
    return new


# Texts for people, types, and how a class is made: their changes are no matter of behaviour.
def skipped(node: ast.AST, field: str) -> bool:
    return (field in ("annotation", "returns", "decorator_list") or isinstance(node, ast.JoinedStr)
            or isinstance(node, ast.Import | ast.ImportFrom)
            or isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)
            or isinstance(node, ast.Call) and field == "args" and (
                isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument"))


def mutants(source: str, functions: tuple[str, ...] = ()) -> list[Mutant]:
    """All mutants of a source text, or of those of its functions."""
    tree, found = ast.parse(source), []
    unchanged = ast.unparse(tree)

    def visit(node: ast.AST, path: tuple[str, ...], statement: ast.AST | None) -> None:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            path = (*path, node.name)
        for field, value in ast.iter_fields(node):
            if skipped(node, field):
                continue
            for index, child in enumerate(value if isinstance(value, list) else [value]):
                if not isinstance(child, ast.AST):
                    continue
                inside = child if isinstance(child, ast.stmt) else statement
                where = ".".join(path)
                if not functions or where.startswith(functions):
                    for change in changes(child):
                        new = change()
                        shown = inside if inside is child or not hasattr(inside, "body") else child
                        before = _short(shown)
                        put(node, field, index, ast.Pass() if new is None else new)
                        after = _short(new) if shown is child else _short(shown)
                        text = ast.unparse(ast.fix_missing_locations(tree))
                        put(node, field, index, child)
                        if text != unchanged:  # as where two equal arguments are swapped
                            found.append(Mutant(len(found), where, child.lineno, before, after,
                                                text))
                visit(child, path, inside)

    visit(tree, (), None)
    return found


def put(node: ast.AST, field: str, index: int, child: ast.AST) -> None:
    value = getattr(node, field)
    if isinstance(value, list):
        value[index] = child
    else:
        setattr(node, field, child)


def _short(node: ast.AST | None) -> str:
    """The text of a statement; of one with a body its head."""
    return "(nothing)" if node is None else ast.unparse(node).splitlines()[0]


# ---- running -------------------------------------------------------------------------------------

def preload() -> None:
    """Reads what all tests need, none of which is changed."""
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import tokenizers  # noqa: F401
    import torch  # noqa: F401
    import torch.distributed.tensor  # noqa: F401


def run(work: Path, name: str, source: str, tests: list[str]) -> tuple[str, str]:
    """Runs the tests on a copy of the repository with that text in the place of a file.

    Returns: "killed", "timeout" or "survived", and the first test that failed.
    """
    (work / name).write_text(source)
    log = work.parent / "log"
    child = os.fork()
    if not child:
        os.setsid()  # so that what the tests start ends with them
        descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.chdir(work)
        sys.path[0] = str(work)
        import pytest
        status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--basetemp",
                              str(work.parent / "tmp"), *tests])
        os._exit(int(status))
    deadline = time.monotonic() + TIMEOUT
    while (done := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.05)
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:
        pass
    if done[0] == 0:
        os.waitpid(child, 0)
        return "timeout", ""
    failed = [line for line in log.read_text(errors="replace").splitlines()
              if line.startswith(("FAILED", "ERROR"))]
    return "survived" if done[1] == 0 else "killed", failed[0][:150] if failed else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--sample", type=int, default=60, help="mutants of each file; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", type=int, help="numbers of mutants")
    parser.add_argument("--output", default="mutants.json")
    config = parser.parse_args()
    # One thread: a fork of a process with several would wait for locks that nobody holds.
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false",
                      PYTHONDONTWRITEBYTECODE="1")
    sys.dont_write_bytecode = True
    # A shell's & ignores the one, nohup the other, and so would all that is started here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    preload()
    known = json.loads(EXPLAINED.read_text()) if EXPLAINED.exists() else {}
    results, unexplained = {}, 0
    with tempfile.TemporaryDirectory(prefix="mutants_") as folder:
        work = Path(folder, "work")
        shutil.copytree(ROOT, work, ignore=shutil.ignore_patterns(
            ".git", "__pycache__", ".*_cache", "bench", "*.pt"))
        for name in config.files:
            functions, tests = TARGETS[name]
            source = (ROOT / name).read_text()
            every = mutants(source, functions)
            chosen = every
            if config.only:
                chosen = [every[number] for number in config.only]
            elif config.sample and config.sample < len(every):
                chosen = random.Random(f"{config.seed} {name}").sample(every, config.sample)
            started = time.monotonic()
            outcome, failed = run(work, name, source, tests)
            if outcome != "survived":
                sys.exit(f"error: the tests of {name} fail as it is: {failed}")
            print(f"{name}: {len(chosen)} of {len(every)} mutants; unchanged, its tests take "
                  f"{time.monotonic() - started:.0f} s", flush=True)
            counts, survivors = Counter(), []
            for mutant in sorted(chosen, key=lambda mutant: mutant.number):
                outcome, failed = run(work, name, mutant.source, tests)
                counts[outcome] += 1
                why = known.get(name, {}).get(mutant.key)
                print(f"{outcome:9s}{mutant.number:5d} line {mutant.line} {mutant.key}"
                      + (f"  [{failed}]" if failed else f"  (explained: {why})" if why else ""),
                      flush=True)
                if outcome == "survived":
                    survivors.append({"number": mutant.number, "line": mutant.line,
                                      "mutant": mutant.key, "why": why})
                    unexplained += why is None
            (work / name).write_text(source)
            explained = sum(survivor["why"] is not None for survivor in survivors)
            results[name] = {"mutants": len(every), "sampled": len(chosen), **counts,
                             "explained": explained, "survivors": survivors}
            share = 1 - len(survivors) / len(chosen)
            print(f"{name}: {share:.1%} killed, {explained} of {len(survivors)} survivors "
                  "explained", flush=True)
    Path(config.output).write_text(json.dumps({"seed": config.seed, "files": results}, indent=1)
                                   + "\n")
    sys.exit(1 if unexplained else 0)


if __name__ == "__main__":
    main()
