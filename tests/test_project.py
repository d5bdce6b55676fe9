"The project's promises: requirements and pins agree, notebooks keep their form."

import ast
import json
import os
import re
from configparser import ConfigParser
from importlib.metadata import version
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from packaging.requirements import Requirement

root = Path(__file__).resolve().parent.parent
parser = ConfigParser(delimiters=["="])
parser.read(root / "settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]
wanted = [
    Requirement(r)
    for key in ("requirements", "study_requirements", "dev_requirements")
    for r in settings[key].split()
]
pins = dict(
    re.findall(r"^ *- ([A-Za-z0-9_-]+)==(\S+)$", (root / "environment.yml").read_text(), re.M)
)
notebooks = sorted((root / "nbs").glob("*.ipynb"))


def source(cell):
    return "".join(cell["source"])


def test_every_requirement_is_pinned_within_its_bounds():
    assert {r.name for r in wanted} == set(pins)
    assert [r.name for r in wanted if not r.specifier.contains(pins[r.name])] == []


@pytest.mark.skipif(
    "CVT2DISTILGPT2_PINNED" not in os.environ, reason="only CI installs the pinned versions"
)
def test_the_pinned_versions_are_the_installed_ones():
    assert {name: version(name).split("+")[0] for name in pins} == pins


def test_every_import_is_a_requirement():
    import sys

    names = {"PIL": "pillow", "IPython": "ipython"}
    known = {r.name for r in map(Requirement, settings["requirements"].split())} | {
        "triton"
    }  # comes with PyTorch where it serves; the search does without
    for path in (root / "cvt2distilgpt2").glob("[a-z]*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module]
                if isinstance(node, ast.ImportFrom) and not node.level
                else []
            )
            for top in (
                {m.split(".")[0] for m in modules}
                - set(sys.stdlib_module_names)
                - {"cvt2distilgpt2"}
            ):
                assert names.get(top, top) in known, (
                    f"{path.name} imports {top}, which settings.ini does not require"
                )


def test_modules_import_only_what_is_below_them():
    order = [json.loads(p.read_text()) for p in notebooks]
    order = [
        m[1]
        for nb in order
        for c in nb["cells"]
        if (m := re.match(r"#\|\s*default_exp (\w+)", source(c)))
    ]
    assert len(order) >= 9
    for i, name in enumerate(order):
        tree = ast.parse((root / "cvt2distilgpt2" / f"{name}.py").read_text())
        used = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "") in ("", "cvt2distilgpt2"):
                used |= {a.name for a in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level:
                used.add(node.module)
        assert used - {"__version__"} <= set(order[:i]), f"{name} imports what is above it"


def test_exported_code_needs_no_development_tools():
    for path in (root / "cvt2distilgpt2").glob("[a-z]*.py"):
        assert not re.search(
            r"^\s*(from|import) (fastcore|nbdev|pytest)", path.read_text(), re.M
        ), path.name


def most_lines(text: str) -> int:
    "Tell how many lines a code cell may have: a class may have more, the model most."
    if re.search(r"^class CvT2DistilGPT2\(", text, re.M):
        return 180
    statements = ast.parse(re.sub(r"^[%!].*$", "pass", text, flags=re.M)).body
    classes = sum(isinstance(s, ast.ClassDef) for s in statements)
    others = [
        s for s in statements if not isinstance(s, (ast.ClassDef, ast.Import, ast.ImportFrom))
    ]
    return 70 if classes == 1 and not others else 40


@pytest.mark.parametrize("path", notebooks, ids=lambda p: p.stem)
def test_notebook_form(path):
    nb = json.loads(path.read_text())
    code = [c for c in nb["cells"] if c["cell_type"] == "code" and source(c).strip()]
    assert re.match(r"# .+\n\n> .+", source(nb["cells"][0]))
    assert path.stat().st_size < 300 * 1024
    for cell in code:
        text = source(cell)
        lines = sum(bool(line.strip()) for line in text.splitlines())
        assert lines <= most_lines(text), f"{lines} lines: {text[:200]}"
    assert not [
        c
        for c in code
        if re.search(r"^#\|\s*(eval:\s*false|slow|notest)|nbdev_export\(", source(c), re.M)
    ]
    shown = json.dumps([c.get("outputs", []) for c in code])
    assert not re.search(r"\d+%\||/tmp/|/work/|/root/|\"stderr\"|widget-view|Traceback", shown), (
        "progress bars, paths or errors in the outputs"
    )
    assert any(c["outputs"] for c in code), "it was never run"


@pytest.mark.parametrize("name", ["03_train", "04_results", "00d_data"])
def test_parameters_are_fields_of_a_task(name):
    from dataclasses import fields

    from cvt2distilgpt2.tasks import Task

    nb = json.loads((root / "nbs" / f"{name}.ipynb").read_text())
    (cell,) = [c for c in nb["cells"] if "parameters" in c["metadata"].get("tags", [])]
    names = [n.target.id for n in ast.parse(source(cell)).body]
    own = {
        "task",
        "run",
        "init",
        "checkpoint",
        "predictions",
        "id_column",
        "report_column",
        "compare",
        "chexbert",
        "vocabulary",
    }  # of the notebooks, no fields
    assert set(names) <= {f.name for f in fields(Task)} | own and "task" in names


def test_the_architecture_is_drawn_from_the_model():
    spec = spec_from_file_location("architecture", root / ".ci" / "architecture.py")
    script = module_from_spec(spec)
    spec.loader.exec_module(script)
    drawn = script.draw_architecture()
    committed = script.PATH.read_text(encoding="utf-8")
    assert committed == drawn, "run .ci/architecture.py and commit nbs/architecture.svg"


def test_links_of_notebooks_lead_to_files():
    links, broken = 0, []
    for path in notebooks:
        for cell in json.loads(path.read_text())["cells"]:
            if cell["cell_type"] != "markdown":
                continue
            for link in re.findall(r"\]\(([^)\s:#]+)\)", source(cell)):
                links += 1
                if not (path.parent / link).exists():
                    broken.append(f"{path.name}: {link}")
    assert links and not broken


def test_workflow_runs_the_readme_command_on_the_versions_it_names():
    workflow = (root / ".github" / "workflows" / "test.yml").read_text()
    readme = (root / "README.md").read_text()
    assert "grep -m 1 'bin/pytest' README.md" in workflow
    command = next(line for line in readme.splitlines() if "bin/pytest" in line)
    assert command.startswith("python3 -m venv")
    low, high = map(int, re.search(r"Python 3\.(\d+) to 3\.(\d+)", readme).groups())
    assert re.findall(r'"3\.(\d+)"', workflow) == [str(minor) for minor in range(low, high + 1)]
    assert settings["min_python"] == f"3.{low}"


def test_readme_says_how_to_do_without_cuda_before_the_first_command():
    text = (root / "README.md").read_text()
    assert 0 < text.index("pytorch.org/get-started") < text.index("pip install")
