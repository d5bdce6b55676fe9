"The task notebooks on legal data unlike the demo's: each runs to its end, or says why not."

import ast
import dis
import os
import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from cvt2distilgpt2.model import CvT2DistilGPT2
from cvt2distilgpt2.tasks import Study, get_task, write_annotation
from cvt2distilgpt2.train import make_model

ROOT = Path(__file__).resolve().parent.parent
SMALL = dict(
    model="small",
    resize=66,
    image_size=64,
    epochs=1,
    warm_start=0,
    val_beams=1,
    lr=1e-3,
    max_length=40,
    batch_size=4,
    device_batch=4,
)
PHRASES = ("Lungs are clear.", "The heart is enlarged.", "Small left effusion.", "No pneumothorax.")
QUIET = {"TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def write_picture(path: Path, seed: int, channels: int = 1) -> None:
    "Write a smooth picture of 64 pixels; the same seed gives the same picture."
    shape = (6, 6) if channels == 1 else (6, 6, channels)
    coarse = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse).resize((64, 64), Image.Resampling.BICUBIC).save(path)


def make_studies(splits="train " * 8 + "val " * 4 + "test " * 4, **kinds) -> list[dict]:
    "Describe plain studies, one a word of `splits`; functions of the place set other fields."
    studies = []
    for place, split in enumerate(splits.split()):
        report = f"{PHRASES[place % 4]} {PHRASES[place // 2 % 4]}"
        study = dict(id=f"s{place}", split=split, report=report, pictures=[place])
        studies.append(study | {name: kind(place) for name, kind in kinds.items()})
    return studies


def write_task(folder: Path, studies: list[dict], beside: bool = False) -> Path:
    "Write a task; `beside`: its pictures lie beside the annotation, not in images/."
    images, written = folder if beside else folder / "images", []
    for study in studies:
        paths = tuple(f"{study['id']}-{view}.png" for view in range(len(study["pictures"])))
        for path, seed in zip(paths, study["pictures"], strict=True):
            write_picture(images / path, seed, study.get("channels", 1))
        more = {name: study[name] for name in ("reports", "findings") if name in study}
        written.append(Study(study["id"], study["report"], paths, study["split"], **more))
    write_annotation(written, folder / "annotation.json")
    return folder


def several(place: int) -> tuple[str, ...]:
    "Give one to three references."
    return tuple(f"{PHRASES[(place + i) % 4]} {PHRASES[i]}" for i in range(1 + place % 3))


def long_and_short(place: int) -> str:
    "Give a report of one word, or of 400."
    return " ".join([f"word{place}."] if place % 2 else [f"w{i}" for i in range(400)])


def edema(place: int) -> list[dict]:
    "Give a finding of a phantom's kind, with more fields than a phantom's has."
    return ({"type": "edema", "certainty": 1},) if place % 2 else ()


DATA = {
    "one study a split": make_studies("train val test"),
    "duplicates": make_studies(pictures=lambda i: [i // 2]),
    "short and long reports": make_studies(report=long_and_short),
    "several references": make_studies(report=lambda i: several(i)[0], reports=several),
    "ids like 003": [s | dict(id=f"{i:03d}") for i, s in enumerate(make_studies())],
    "three channels": make_studies(channels=lambda i: 3 if i % 2 else 1),
    "one and three views": make_studies(pictures=lambda i: [i] if i % 2 else [i, i + 50, i + 99]),
    "one report for all": make_studies(report=lambda i: "Clear."),
    "findings with more fields": make_studies(findings=edema),
    "reports without letters": make_studies(report=lambda i: "1. 2. 3." if i % 2 else "..."),
}


def run_notebook(name: str, out: Path, home: Path, /, more=(), **parameters):
    "Run a notebook by papermill with data and runs in `home`; `more` are options of papermill."
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", *more]
    command += [str(ROOT / "nbs" / f"{name}.ipynb"), str(out)]
    for parameter, value in parameters.items():
        command += ["-r" if isinstance(value, str) else "-p", parameter, str(value)]
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    where = {"PYTHONPATH": paths, "CVT2DISTILGPT2_HOME": str(home), "OMP_NUM_THREADS": "1"}
    how = dict(env={**os.environ, **QUIET, **where}, capture_output=True, text=True, timeout=900)
    return subprocess.run(command, cwd=home, **how)


def shown(path: Path) -> str:
    "Return all that an executed notebook shows as text."
    outputs = [o for c in nbformat.read(path, as_version=4).cells for o in c.get("outputs", ())]
    data = [o.get("data", {}) for o in outputs]
    return "\n".join(str(d.get("text/markdown") or d.get("text/plain", "")) for d in data)


def latest(home: Path, task: str) -> Path:
    "Return the folder of a task's newest run."
    return home / "runs" / task / (home / "runs" / task / "latest").read_text()


def run_all(task: Path, home: Path, **parameters) -> dict[str, str]:
    "Run every notebook of one task; returns what each shows."
    named, texts = dict(task=str(task)), {}
    for name in ("00d_data", "03_train", "04_results", "05_report"):
        given = named
        if name == "00d_data":
            given = named | dict(resize=66, image_size=64)
        if name == "03_train":
            given = named | SMALL | parameters
        if name == "05_report":
            run = latest(home, task.name)
            given = dict(paths=str(task), checkpoint=str(run), out=str(home / "reports.csv"))
        done = run_notebook(name, home / f"{name}.ipynb", home, **given)
        assert done.returncode == 0, f"{name}: {done.stderr[-3000:]}"
        texts[name] = shown(home / f"{name}.ipynb")
    return texts


@pytest.mark.full
@pytest.mark.parametrize("name", DATA)
def test_notebooks_run_on_legal_data(name, tmp_path):
    task = write_task(tmp_path / "data" / "task", DATA[name])
    run_all(task, tmp_path)
    table = latest(tmp_path, "task") / "predictions_test.csv"
    tested = pd.read_csv(table, dtype=str, keep_default_na=False)
    assert tested.id.tolist() == [s["id"] for s in DATA[name] if s["split"] == "test"]


@pytest.mark.full
def test_pictures_may_lie_beside_the_annotation(tmp_path):
    task = write_task(tmp_path / "data" / "beside", DATA["three channels"], beside=True)
    assert "16" in run_all(task, tmp_path)["00d_data"]


@pytest.mark.full
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_may_be_asked_for(precision, tmp_path):
    "On a CPU training and tests are in fp32 all the same."
    run_all(
        write_task(tmp_path / "data" / "task", DATA["one study a split"]),
        tmp_path,
        precision=precision,
    )


@pytest.mark.full
@pytest.mark.parametrize("name", ["04_results", "05_report"])
@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_half_precision_checkpoint(kind, name, checkpoint, tmp_path):
    "A model that was saved in half precision computes in it, on a CPU too."
    saved = CvT2DistilGPT2.from_pretrained(checkpoint).to(getattr(torch, kind))
    saved.save_pretrained(tmp_path / "half")
    task = write_task(tmp_path / "data" / "task", DATA["duplicates"])
    given = dict(checkpoint=str(tmp_path / "half"), max_length=24)
    given |= dict(task=str(task)) if name == "04_results" else dict(paths=str(task))
    done = run_notebook(name, tmp_path / "out.ipynb", tmp_path, **given)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.full
def test_benchmark_in_half_precision_on_the_cpu(tmp_path):
    quick = dict(model="demo", device="cpu", new_tokens=8, images=4, repeats=1)
    command = ["-y", "dtypes: [float16, bfloat16]", "-y", "batch_sizes: [1, 3]"]
    done = run_notebook("06_benchmark", tmp_path / "out.ipynb", tmp_path, more=command, **quick)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.full
def test_loading_of_small_images_without_workers(tmp_path):
    quick = dict(images=3, width=300, height=280, seconds=0.2, memory_workers=0)
    command = ["-y", "workers: [0]"]
    done = run_notebook("06a_loading", tmp_path / "out.ipynb", tmp_path, more=command, **quick)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    "A small model with random weights, as a saved one."
    task = get_task(str(tmp_path_factory.mktemp("none")), **SMALL)
    folder = tmp_path_factory.mktemp("saved") / "model"
    make_model(task, list(PHRASES)).save_pretrained(folder)
    return folder


@pytest.mark.full
def test_demo_of_three_training_studies(tmp_path):
    "Fewer than a batch: its encoder is warmed up by a smaller one."
    given = dict(n_train=3, n_val=2, n_test=2, warm_start=1, epochs=1)
    done = run_notebook("03_train", tmp_path / "out.ipynb", tmp_path, **given)
    assert done.returncode == 0, done.stderr[-3000:]


def test_exploring_without_training_studies_or_augmentation(tmp_path):
    "What there is takes their place, and a sentence says so; a whole crop moves nothing."
    task = write_task(tmp_path / "data" / "task", make_studies("test test test"))
    still = dict(resize=40, image_size=40, rotation=0.0)
    given = dict(task=str(task), profile="chen", style="iu_x_ray", **still)
    done = run_notebook("00d_data", tmp_path / "out.ipynb", tmp_path, **given)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "This task has no training studies" in shown(tmp_path / "out.ipynb")


def test_training_with_reports_longer_than_max_length(tmp_path):
    task = write_task(tmp_path / "data" / "task", DATA["short and long reports"])
    given = dict(task=str(task), n_train=3, **SMALL)
    done = run_notebook("03_train", tmp_path / "out.ipynb", tmp_path, **given)
    assert done.returncode == 0, done.stderr[-3000:]


def test_training_without_training_studies_is_refused_in_words(tmp_path):
    task = write_task(tmp_path / "data" / "task", make_studies("test test"))
    done = run_notebook("03_train", tmp_path / "out.ipynb", tmp_path, task=str(task), **SMALL)
    assert done.returncode != 0 and "has no studies for train and val" in done.stderr


@pytest.mark.parametrize("kind", ["duplicates", "only a test split"])
def test_results_of_a_checkpoint(kind, checkpoint, tmp_path):
    studies = DATA.get(kind) or make_studies("test test test")
    task = write_task(tmp_path / "data" / "task", studies)
    given = dict(task=str(task), checkpoint=str(checkpoint), max_length=8, beams=1)
    done = run_notebook("04_results", tmp_path / "out.ipynb", tmp_path, **given)
    assert done.returncode == 0, done.stderr[-3000:]


def names_set(cell: str) -> set[str]:
    "Return the names that a cell sets outside of functions, classes and comprehensions."
    definitions = (ast.FunctionDef, ast.ClassDef)
    lines = [line for line in ast.parse(cell).body if not isinstance(line, definitions)]
    code = compile(ast.Module(lines, []), "cell", "exec")
    return {i.argval for i in dis.get_instructions(code) if i.opname == "STORE_NAME"}


@pytest.mark.parametrize("name", ["00d_data", "03_train", "04_results", "05_report"])
def test_no_notebook_writes_over_its_parameters(name):
    notebook = nbformat.read(ROOT / "nbs" / f"{name}.ipynb", as_version=4)
    cells = [c for c in notebook.cells if c.cell_type == "code"]
    place = next(i for i, c in enumerate(cells) if "parameters" in c.metadata.get("tags", ()))
    later = set().union(*(names_set(c.source) for c in cells[place + 1 :]))
    assert names_set(cells[place].source) & later == set()


PARAMETERS = 'task:str = "demo"\nepochs:int = None\nrun:str = None'
CALL = (
    "from cvt2distilgpt2.tasks import notebook_parameters, task_parameters\n"
    "settings = task_parameters(globals(), extra=('run',))\nsettings.epochs"
)
VARIABLES = "studies, state, epoch = {'train': []}, 1, 5"


def run_cells(*cells: str) -> list[str]:
    "Run cells in one kernel; returns what each shows, an error's text included."
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    nbclient.NotebookClient(notebook, timeout=120, allow_errors=True).execute()
    outputs = [c.outputs[-1] if c.outputs else {} for c in notebook.cells]
    return [o.get("evalue") or o.get("data", {}).get("text/plain", "") for o in outputs]


def test_run_all_again_and_again():
    "A notebook's variables are no parameters, an edited value counts, a misspelt name is refused."
    edited = PARAMETERS.replace("epochs:int = None", "epochs:int = 7")
    first = [PARAMETERS, "# Parameters\nepochs = 3", CALL, VARIABLES]
    misspelt = [PARAMETERS, "# Parameters\nepoch = 9", CALL]
    said = run_cells(*first, *first, edited, CALL, VARIABLES, *misspelt)
    assert said[2] == said[6] == "3" and said[9] == "7"
    assert "unknown parameter 'epoch'" in said[-1] and "'epochs'" in said[-1]


@pytest.mark.full
@pytest.mark.parametrize("name", ["00d_data", "03_train", "04_results", "05_report"])
def test_task_notebook_runs_twice_in_one_kernel(name, checkpoint, tmp_path, monkeypatch):
    task = write_task(tmp_path / "data" / "task", DATA["duplicates"])
    own = {"00d_data": dict(resize=66, image_size=64), "03_train": SMALL}
    quick = dict(checkpoint=str(checkpoint), max_length=8, beams=1)
    given = dict(task=str(task)) | own.get(name, quick)
    if name == "05_report":
        given["paths"] = given.pop("task")
    notebook = nbformat.read(ROOT / "nbs" / f"{name}.ipynb", as_version=4)
    cells = [c for c in notebook.cells if c.cell_type == "code"]
    place = next(i for i, c in enumerate(cells) if "parameters" in c.metadata.get("tags", ()))
    text = "\n".join(f"{parameter} = {value!r}" for parameter, value in given.items())
    cells.insert(place + 1, nbformat.v4.new_code_cell(text))
    notebook.cells = cells + [nbformat.v4.new_code_cell(c.source) for c in cells]
    for variable, value in (QUIET | {"CVT2DISTILGPT2_HOME": str(tmp_path)}).items():
        monkeypatch.setenv(variable, value)
    place = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=place).execute()
