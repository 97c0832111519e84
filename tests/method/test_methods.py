import ast
import sys
from pathlib import Path

import hfedmoe.method
from hfedmoe.method.methods import METHODS
from hfedmoe.method.scores import SCORES


def test_the_table_names_itself_and_known_scores():
    assert {"hfedmoe", "fedavg", "random", "frequency"} <= set(METHODS)
    for name, method in METHODS.items():
        assert method.name == name
        assert method.score in SCORES or (method.score is None and method.residency == "all")


def test_the_method_imports_torch_and_nothing_else_of_ours():
    for path in Path(hfedmoe.method.__path__[0]).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                root = name.split(".")[0]
                assert root == "torch" or root in sys.stdlib_module_names or name.startswith("hfedmoe.method."), name
