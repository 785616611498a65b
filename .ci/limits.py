"""Size limits of the code base (files and functions), counted on tracked and new files; exits 1 and names what is over.

An op front has at most 250 lines, a Triton or CUDA file 600, any other Python file 400, a Python function 50 lines
without its docstring. Kernels are exempt from the function limit.
"""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def limit_of(path: str) -> int | None:
    """Line limit of a repository file, None where none applies."""
    if path.startswith("mimfast/ops/") and path.endswith(".py"):
        return 250
    if path.endswith(".cu") or (path.startswith("kernels/") and path.endswith(".py")):
        return 600
    return 400 if path.endswith(".py") else None


def body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function from its `def` on, without the docstring."""
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    first = node.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        lines -= (first.end_lineno or first.lineno) - first.lineno + 1
    return lines


def problems(path: str) -> list[str]:
    limit = limit_of(path)
    if limit is None:
        return []
    text = (ROOT / path).read_text()
    found = []
    count = len(text.splitlines())
    if count > limit:
        found.append(f"{path}: {count} lines, at most {limit}")
    if path.endswith(".py") and not path.startswith("kernels/"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and body_lines(node) > 50:
                found.append(f"{path}:{node.lineno}: {node.name} has {body_lines(node)} lines, at most 50")
    return found


def main() -> int:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    found = [line for path in listed if path and (ROOT / path).is_file() for line in problems(path)]
    if (ROOT / "kernels" / "__init__.py").exists():
        found.append("kernels/__init__.py: must not exist, it would shadow Hugging Face's `kernels` package")
    print("\n".join(found) or "size limits: ok")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
