"""The recipes of docs/extending.md, followed to the letter on a copy of the package: they work, and touch few files."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RECIPES = (ROOT / "docs" / "extending.md").read_text()


@pytest.fixture
def package(tmp_path):
    """A copy of the package whose weights are links."""
    shutil.copytree(ROOT / "segadapt", tmp_path / "segadapt", ignore=shutil.ignore_patterns("weights", "__pycache__"))
    (tmp_path / "segadapt" / "weights").symlink_to(ROOT / "segadapt" / "weights")
    return tmp_path / "segadapt"


def blocks(title):
    """Code blocks of a section, in order."""
    (section,) = re.findall(rf"^## {title}.*?(?=^## |\Z)", RECIPES, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"```(?:python|yaml)\n(.*?)```", section, flags=re.DOTALL)


def hashes(package):
    files = (path for path in package.rglob("*") if path.suffix in (".py", ".yaml"))
    return {path.relative_to(package): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def register(file, name, *, line, module):
    """An import at the top of the others, and an entry at the end of the dict."""
    text = file.read_text()
    assert line not in text
    text = re.sub(
        rf"^({name}\b[^\n]*= \{{.*?)(\n?\}})", rf"\1\n    {line}\2", text, count=1, flags=re.MULTILINE | re.DOTALL
    )
    assert line in text
    file.write_text(re.sub(r"^(from segadapt)", rf"{module}\n\1", text, count=1, flags=re.MULTILINE))


def run(package, *commands):
    """Several commands one after the other, in one process of the copy: its imports take longer than they do."""
    ends = ("runtime=cpu", f"logging.root={package.parent / 'runs'}")
    code = "import sys; from segadapt.__main__ import main\n"
    code += "".join(f"sys.argv = {['segadapt', *command, *ends]}; main()\n" for command in commands)
    command = [sys.executable, "-c", code]
    environment = os.environ | {"PYTHONPATH": str(package.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=package.parent, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_recipe_of_a_method(package):
    before = hashes(package)
    code, values = blocks("A method")
    (package / "methods" / "confident.py").write_text(code)
    (package / "conf" / "tta" / "confident.yaml").write_text(values)
    register(
        package / "methods" / "__init__.py",
        "METHODS",
        line='"confident": Confident,',
        module="from segadapt.methods.confident import Confident",
    )
    after = hashes(package)
    assert len([path for path in after if after[path] != before.get(path)]) <= 3
    fog = ("experiment=toytown_c", "data.corruptions=[fog]", "data.limit=1", "data.workers=0")
    said = run(package, ["adapt", *fog, "tta.method=confident", "tta.options.power=2"])
    assert "method confident" in said
    assert "power 2" in said
    assert "mIoU %:" in said


def test_recipe_of_a_data_set(package, saved_models):
    two_classes = next(given for given in saved_models(("dark", "light")) if "discriminative.checkpoint" in given)
    before = hashes(package)
    code, values = blocks("A data set of another kind")
    (package / "datasets" / "stripes.py").write_text(code)
    (package / "conf" / "data" / "stripes.yaml").write_text(values)
    register(
        package / "datasets" / "build.py",
        "DATASETS",
        line='"stripes": Stripes,',
        module="from segadapt.datasets.stripes import Stripes",
    )
    after = hashes(package)
    assert len([path for path in after if after[path] != before.get(path)]) <= 3
    data = ("data=stripes", "data.corruptions=[fog]")
    order = (*data, "data.order=mixed", "data.rounds=2", "data.workers=0")
    said = run(
        package,
        ["check", *data, "tta.method=source"],
        ["adapt", *order, "tta.method=bn", "model/discriminative=local", two_classes],
    )
    assert "light" in said
    assert "64 x 96" in said
    assert "mIoU %:" in said
