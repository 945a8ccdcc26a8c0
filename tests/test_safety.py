"""Nothing that is read runs code."""
import ast
import os
import re
import subprocess

import numpy as np
import pytest
import torch

import model
from conftest import ROOT


FORBIDDEN = {"pickle", "cPickle", "_pickle", "dill", "joblib", "marshal", "shelve", "cloudpickle", "runpy", "code"}


def runs_code(source):
    """What of a script's source could run code that it reads: calls and imports, as text."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found += [f"from torch import {name}" for name in names if names[-1:] == ["torch"] and name == "load"]
            found += [name for name in names if name.split(".")[0] in FORBIDDEN or name in ("eval", "exec")]
        if not isinstance(node, ast.Call):
            continue
        name, owner = ast.unparse(node.func), isinstance(node.func, ast.Name)
        options = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if owner and name in ("eval", "exec", "compile") or name.startswith("builtins."):
            found.append(name)
        if name in ("torch.load", "torch.jit.load", "os.system", "os.popen", "importlib.import_module", "yaml.load"):
            found.append(name)
        if options.get("allow_pickle", "False") != "False" or options.get("shell", "False") != "False":
            found.append(f"{name}({options})")
        if options.get("trust_remote_code", "False") != "False":
            found.append(f"{name}({options})")
    return found


@pytest.mark.parametrize("script", sorted(str(path.relative_to(ROOT)) for path in
                                          (*ROOT.glob("*.py"), *ROOT.glob("[!.]*/*.py"))))
def test_no_script_unpickles_or_evaluates_what_it_reads(script):
    assert runs_code((ROOT / script).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("source", [
    "torch.load('x')", "from torch import nn, load", "import pickle", "from pickle import load",
    "import numpy, shelve", "eval(text)", "exec(c)", "builtins.eval('1')", "np.load(f, allow_pickle=True)",
    "os.system('x')", "subprocess.run(x, shell=True)"])
def test_that_test_would_see_it(source):
    assert runs_code(source) and not runs_code("model.eval(); re.compile('x'); executor.exec_(); np.load('x')")
