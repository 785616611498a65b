"""The wheel holds everything, and nobody's `import kernels` ever finds our folder."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def python(code: str, cwd: Path, **env: str) -> str:
    """Run `code` in a fresh interpreter and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_kernels_folder_is_a_link_and_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    link = ROOT / "mimfast" / "kernels"
    assert link.is_symlink()
    assert os.readlink(link) == "../kernels"


@pytest.mark.parametrize("cwd", [ROOT, Path("/")], ids=["repository", "elsewhere"])
def test_kernels_import_under_our_name_only(cwd):
    where = python("import mimfast.kernels.noop as m; print(m.__file__)", cwd)
    assert where.endswith("kernels/noop.py")
    found = python("import importlib.util as u; s = u.find_spec('kernels'); print(s.origin if s else None)", cwd)
    assert found == "None" or "site-packages" in found


def test_runs_uninstalled_from_the_source_tree(tmp_path):
    """A source tree on PYTHONPATH is enough: what a GPU machine without network has."""
    code = "import mimfast, mimfast.ops, mimfast.kernels.noop; print(mimfast.__file__)"
    assert python(code, tmp_path, PYTHONPATH=str(ROOT)).startswith(str(ROOT))


def test_import_is_light():
    code = "import sys, mimfast; print('torch' in sys.modules, 'numpy' in sys.modules)"
    assert python(code, ROOT) == "False False"


def test_ops_import_creates_no_cuda_context_and_no_torchvision():
    code = (
        "import sys, torch, mimfast.ops.mask_plan, mimfast.ops.pixel_loss, mimfast.methods.mae;"
        "print(torch.cuda.is_initialized(), 'torchvision' in sys.modules, 'triton' in sys.modules)"
    )
    assert python(code, ROOT) == "False False False"


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """A wheel of this tree without the native core (its build is tested in test_native.py)."""
    out = tmp_path_factory.mktemp("wheel")
    tree = out / "tree"
    # a copy, so that what an earlier build left in build/ cannot enter the wheel
    shutil.copytree(ROOT, tree, symlinks=True, ignore=shutil.ignore_patterns(".git", "build", "dist", "runs", "*.so"))
    env = {**os.environ, "MIMFAST_NATIVE": "0"}
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(out), str(tree)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(next(out.glob("mimfast-*.whl")))


def test_wheel_holds_every_module_and_kernel(wheel):
    held = set(wheel.namelist())
    sources = [p.relative_to(ROOT).as_posix() for p in (ROOT / "mimfast").rglob("*.py")]
    sources += ["mimfast/" + p.relative_to(ROOT).as_posix() for p in (ROOT / "kernels").glob("*.py")]
    missing = sorted(set(sources) - held)
    assert not missing
    assert "mimfast/verified.json" in held


def test_wheel_holds_nothing_else_at_top_level(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"mimfast"}
