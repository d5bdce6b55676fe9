"Every notebook runs from top to bottom; task notebooks run by papermill and refuse bad input."

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image
from trees import make_iu

from cvt2distilgpt2.tasks import Study, write_annotation

root = Path(__file__).resolve().parent.parent
TASK_NOTEBOOKS = (
    "index",
    "00d_data",
    "03_train",
    "04_results",
    "05_report",
    "06_benchmark",
    "06a_loading",
    "tour",
)
quiet = {"TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
small = dict(n_train=64, n_val=12, n_test=24, warm_start=1, epochs=1)


def papermill(
    name: str, out: Path, home: Path, cwd: Path = root, **parameters
) -> subprocess.CompletedProcess:
    "Run a notebook as a user does, with data and runs in `home`."
    words = [w for n, v in parameters.items() for w in ("-p", n, str(v))]
    notebook = root / "nbs" / f"{name}.ipynb"
    command = [sys.executable, "-m", "papermill", str(notebook), str(out), *words]
    where = dict(cwd=cwd, env={**os.environ, **quiet, "CVT2DISTILGPT2_HOME": str(home)})
    return subprocess.run(command, capture_output=True, text=True, timeout=900, **where)


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    "A place with a small finished run of the demo, its test, and the executed notebooks."
    home = tmp_path_factory.mktemp("home")
    for name, given in (("03_train", small), ("04_results", dict(n_test=24))):
        done = papermill(name, home / f"{name}.ipynb", home, **given)
        assert done.returncode == 0, done.stderr[-3000:]
    return home


@pytest.mark.parametrize(
    "path",
    [p for p in sorted((root / "nbs").glob("*.ipynb")) if p.stem not in TASK_NOTEBOOKS],
    ids=lambda p: p.stem,
)
def test_notebook_runs(path, monkeypatch):
    if path.stem == "01ba_kernels":
        pytest.importorskip("triton", reason="there is no Triton")
    for n, v in quiet.items():
        monkeypatch.setenv(n, v)
    where = {"metadata": {"path": str(root / "nbs")}}
    NotebookClient(nbformat.read(path, as_version=4), timeout=600, resources=where).execute()


def test_train_leaves_a_whole_run(home):
    run = home / "runs" / "demo" / (home / "runs" / "demo" / "latest").read_text()
    assert {p.name for p in run.iterdir()} >= {
        "model",
        "config.json",
        "metrics.json",
        "predictions_val.csv",
        "predictions_test.csv",
        "logs",
    }
    assert {p.name for p in (run / "model").iterdir()} >= {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "preprocessor_config.json",
        "README.md",
    }
    metrics = json.loads((run / "metrics.json").read_text())
    assert {"code", "data", "seed", "versions", "hardware", "val", "history"} <= set(metrics)


def test_executed_training_shows_curves_table_and_reports(home):
    cells = nbformat.read(home / "03_train.ipynb", as_version=4).cells
    kinds = [kind for c in cells for o in c.get("outputs", ()) for kind in o.get("data", ())]
    assert kinds.count("image/png") >= 2 and kinds.count("text/html") >= 3


@pytest.mark.parametrize(
    "name, given",
    [
        ("index", {}),
        ("00d_data", dict(n_train=64, n_val=12, n_test=24)),
        ("05_report", {}),
        ("06_benchmark", dict(model="demo", new_tokens=8, images=4, repeats=1)),
        ("06a_loading", dict(images=4, seconds=0.5, memory_workers=2, memory_images=1600)),
    ],
    ids=["index", "00d_data", "05_report", "06_benchmark", "06a_loading"],
)
def test_notebook_on_the_demo(name, given, home, tmp_path):
    done = papermill(name, tmp_path / "out.ipynb", home, cwd=root / "nbs", **given)
    assert done.returncode == 0, done.stderr[-3000:]


def test_tour_runs_and_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    brief = dict(n_train=48, n_test=8, naming_epochs=1, writing_epochs=1)
    home = tmp_path / "home"
    done = papermill("tour", tmp_path / "out.ipynb", home, cwd=root / "nbs", **brief)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not home.exists()
    assert list(tmp_path.rglob("annotation.json")) == []


def test_published_task_runs_by_papermill(tmp_path):
    "IU X-Ray in its published layout, made up: two views, Chen's labels, no drawn findings."
    make_iu(tmp_path / "data", n=16)
    quick = dict(
        model="small", resize=66, image_size=64, epochs=1, val_beams=1, max_length=40, lr=1e-3
    )
    for name, given in (("03_train", quick), ("04_results", {})):
        done = papermill(name, tmp_path / f"{name}.ipynb", tmp_path, task="iu_x_ray", **given)
        assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "runs" / "iu_x_ray" / (tmp_path / "runs" / "iu_x_ray" / "latest").read_text()
    assert json.loads((run / "results.json").read_text())["task"] == "iu_x_ray"


@pytest.fixture(scope="session")
def broken(tmp_path_factory) -> Path:
    "Two folders as tasks: one with a damaged image, one whose annotation names a missing file."
    top = tmp_path_factory.mktemp("broken")
    for name in ("damaged", "missing"):
        (top / name / "images").mkdir(parents=True)
        for i in "abc":
            Image.linear_gradient("L").resize((64, 64)).save(top / name / "images" / f"{i}.png")
        splits = zip("abc", ("train", "val", "test"), strict=True)
        studies = [Study(i, "Lungs are clear.", (f"{i}.png",), split) for i, split in splits]
        write_annotation(studies, top / name / "annotation.json")
    damaged = top / "damaged" / "images" / "b.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    (top / "missing" / "images" / "c.png").unlink()
    return top


@pytest.mark.parametrize(
    "given, said",
    [
        (dict(task="mimic_cxr"), ["mimic_cxr/annotation.json", "mimic_cxr/images", "PhysioNet"]),
        (dict(task="iu_x_ray"), ["iu_x_ray/annotation.json", "iu_x_ray/images", "Open-i"]),
        (dict(task="mimic"), ["unknown task 'mimic'", "demo, mimic_cxr, iu_x_ray"]),
        (dict(task="demo", epoch=3), ["unknown parameter 'epoch'", "did you mean 'epochs'?"]),
        (dict(task="demo", run="2026_01"), ["parameter 'run' must be text", "`-r run WORD`"]),
        (dict(task="{broken}/damaged"), ["b.png", "1 problem in the data"]),
        (dict(task="{broken}/missing"), ["c.png", "1 problem in the data"]),
    ],
    ids=["mimic_cxr", "iu_x_ray", "task", "parameter", "number", "damaged", "missing"],
)
def test_bad_input_ends_training_at_once(given, said, broken, tmp_path):
    given = {n: str(v).format(broken=broken) for n, v in given.items()}
    done = papermill("03_train", tmp_path / "out.ipynb", tmp_path, **given)
    assert done.returncode != 0
    assert [s for s in said if s not in done.stderr] == []
    cells = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells
    executed = [c for c in cells if c.cell_type == "code" and c.execution_count]
    assert len(executed) <= 9, "it went on to the model"
    left = [p.name for p in (tmp_path / "runs").rglob("*") if p.is_file()]
    assert set(left) <= {"problems.csv"}
