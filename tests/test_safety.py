"""Nothing that is read runs code."""
import ast

import pytest

from conftest import ROOT

FORBIDDEN = {"pickle", "cPickle", "_pickle", "dill", "joblib", "marshal", "shelve", "cloudpickle",
             "runpy", "code"}
CALLS = ("torch.load", "torch.jit.load", "os.system", "os.popen", "importlib.import_module",
         "yaml.load")
FLAGS = ("allow_pickle", "shell", "trust_remote_code")
SCRIPTS = [str(path.relative_to(ROOT)) for path in (*ROOT.glob("*.py"), *ROOT.glob("[!.]*/*.py"))]


def imports_code(node):
    """The names of an import that could run code which is read."""
    names = [alias.name for alias in node.names]
    module = getattr(node, "module", None) or ""
    suspects = [f"from torch import {name}" for name in names
                if module == "torch" and name == "load"]
    for name in [*names, module]:
        if name.split(".")[0] in FORBIDDEN or name in ("eval", "exec"):
            suspects.append(name)
    return suspects


def runs_code(source):
    """What of a script's source could run code that it reads: calls and imports, as text."""
    suspects = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            suspects += imports_code(node)
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        builtin = isinstance(node.func, ast.Name) and name in ("eval", "exec", "compile")
        if builtin or name.startswith("builtins.") or name in CALLS:
            suspects.append(name)
        for flag in node.keywords:
            if flag.arg in FLAGS and ast.unparse(flag.value) != "False":
                suspects.append(f"{name}({ast.unparse(flag)})")
    return suspects


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_no_script_unpickles_or_evaluates_what_it_reads(script):
    assert runs_code((ROOT / script).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("source", [
    "torch.load('x')", "from torch import nn, load", "import pickle", "from pickle import load",
    "import numpy, shelve", "eval(text)", "exec(c)", "builtins.eval('1')",
    "np.load(f, allow_pickle=True)", "os.system('x')", "subprocess.run(x, shell=True)"])
def test_that_test_would_see_it(source):
    harmless = "model.eval(); re.compile('x'); executor.exec_(); np.load('x')"
    assert runs_code(source) and not runs_code(harmless)
