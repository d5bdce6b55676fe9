"""Broken annotations of many kinds, and what `get_task` and `task_parameters` refuse."""

import copy
import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from trees import make_iu, make_mimic

from cvt2distilgpt2.tasks import (
    TASKS,
    DataError,
    Study,
    Task,
    get_task,
    notebook_parameters,
    open_task,
    project_root,
    read_annotation,
    task_parameters,
    write_annotation,
)

GOOD = {
    s: [
        dict(
            id=f"{s}{i}",
            report="Clear lungs.",
            image_path=[f"{s}{i}/0.png"],
            split=s,
            patient=f"{s}{i}",
        )
        for i in range(2)
    ]
    for s in ("train", "val", "test")
}


def first(**changes):
    "Return a good annotation with its first entry changed; a field given as `...` is dropped."
    d = copy.deepcopy(GOOD)
    d["train"][0] = {n: v for n, v in {**d["train"][0], **changes}.items() if v is not ...}
    return json.dumps(d).encode()


def whole(**changes):
    return json.dumps({**GOOD, **changes}).encode()


TEXT = json.dumps(GOOD)
BROKEN = {  # what the file holds, and a word that must be in the error
    "empty file": (b"", "not valid JSON"),
    "cut short": (TEXT[:200].encode(), "cut short"),
    "one brace too many": (TEXT.encode() + b"}", "not valid JSON"),
    "not JSON": (b"id,report\n1,clear", "not valid JSON"),
    "UTF-16": (TEXT.encode("utf-16"), "not UTF-8"),
    "Latin-1": (TEXT.replace("Clear", "Größe").encode("latin-1"), "not UTF-8 (byte"),
    "binary": (bytes(range(256)), "not UTF-8"),
    "a list": (json.dumps(GOOD["train"]).encode(), "is not an object"),
    "a string": (b'"train"', "is not an object"),
    "null": (b"null", "is not an object"),
    "no split": (b"{}", "has no entries"),
    "empty splits": (whole(train=[], val=[], test=[]), "has no entries"),
    "unknown split": (whole(valid=GOOD["val"]), "unknown split 'valid'"),
    "capital split": (json.dumps({"Train": GOOD["train"]}).encode(), "unknown split 'Train'"),
    "split is an object": (whole(val={"a": 1}), "split 'val' is not a list"),
    "split is null": (whole(val=None), "split 'val' is not a list"),
    "entry is a string": (whole(val=["a"]), "split 'val' is not a list of entries"),
    "entry is null": (whole(test=[None]), "split 'test' is not a list of entries"),
    "no id": (first(id=...), "no 'id'"),
    "id is null": (first(id=None), "no 'id'"),
    "id is a list": (first(id=["a"]), "no 'id'"),
    "no report": (first(report=...), "'report'"),
    "report is null": (first(report=None), "'report' is NoneType"),
    "report is a number": (first(report=7), "'report' is int"),
    "report is a list": (first(report=["a"]), "'report' is list"),
    "report is empty": (first(report=""), "empty report"),
    "report holds half a character": (first(report="Clear \ud800."), "cut in half"),
    "split is another": (first(split="test"), "listed under 'train'"),
    "report is blank": (first(report=" \n\t"), "empty report"),
    "no image path": (first(image_path=...), "'image_path' must be a list"),
    "image path is a string": (first(image_path="train0/0.png"), "'image_path' must be a list"),
    "image path is empty": (first(image_path=[]), "'image_path' must be a list"),
    "image path holds a number": (first(image_path=[1]), "'image_path' must be a list"),
    "image path holds null": (first(image_path=["a.png", None]), "'image_path' must be a list"),
    "absolute image path": (first(image_path=["/etc/passwd"]), "leads out"),
    "image path climbs": (first(image_path=["a/../../b.png"]), "leads out"),
    "image path climbs by backslashes": (first(image_path=["..\\b.png"]), "leads out"),
    "image path has a drive": (first(image_path=["C:\\b.png"]), "leads out"),
    "image path is blank": (first(image_path=[""]), "leads out"),
    "image path has a NUL": (first(image_path=["a\0.png"]), "leads out"),
    "reports is a string": (first(reports="Clear."), "'reports'"),
    "reports is empty": (first(reports=[]), "'reports'"),
    "one view for two images": (first(image_path=["0.png", "1.png"], views=["frontal"]), "'views'"),
    "views is a string": (first(views="f"), "'views'"),
    "findings is a string": (first(findings="edema"), "'findings'"),
    "findings holds strings": (first(findings=["edema"]), "'findings'"),
    "nested without end": (b"[" * 100_000, "not valid JSON"),
    "a number without end": (b'{"train": [' + b"9" * 5000 + b"]}", "not valid JSON"),
    "doubled id in a split": (first(id="train1"), "train1: the id occurs 2 times"),
    "doubled id across splits": (first(id="test0"), "test0: the id occurs 2 times"),
    "id as text and as number": (
        whole(train=[dict(GOOD["train"][0], id=7), dict(GOOD["train"][1], id="7")]),
        "the id occurs 2 times",
    ),
    "patient on both sides": (first(patient="val1"), "patient val1 is in train and val"),
    "subject on both sides": (
        first(patient=..., subject_id="test1"),
        "patient test1 is in test and train",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_annotation(tmp_path, kind):
    content, said = BROKEN[kind]
    path = tmp_path / "annotation.json"
    path.write_bytes(content)
    with pytest.raises(DataError) as e:
        read_annotation(path)
    assert str(path) in str(e.value) and said in str(e.value)
    assert all(p.what and p.mend for p in e.value.problems)


def test_all_problems_at_once(tmp_path):
    d = copy.deepcopy(GOOD)
    del d["train"][0]["report"]
    d["val"][1]["image_path"] = []
    d["test"][0].update(report="", views=[])
    (tmp_path / "annotation.json").write_text(json.dumps(d))
    with pytest.raises(DataError) as e:
        read_annotation(tmp_path / "annotation.json")
    assert [p.id for p in e.value.problems] == ["train0", "val1", "test0", "test0"]
    assert str(e.value).startswith("4 problems")


def test_many_problems_are_counted_not_printed(tmp_path):
    entries = [dict(id=str(i), report="", image_path=["0.png"]) for i in range(500)]
    (tmp_path / "annotation.json").write_text(json.dumps({"train": entries}))
    with pytest.raises(DataError, match=r"\.\.\. and 480 more") as e:
        read_annotation(tmp_path / "annotation.json")
    assert len(e.value.problems) == 500


def test_annotation_that_is_a_folder(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_annotation(tmp_path)


def test_good_variants(tmp_path):
    "A byte-order mark, missing splits, integer ids, unknown fields: no problem, and none is lost."
    path = tmp_path / "annotation.json"
    entry = dict(id=1, report="Ü", image_path=["0.png"], study_id=5)
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"train": [entry]}).encode())
    (study,) = read_annotation(path)["train"]
    assert (study.id, study.report, study.extra) == ("1", "Ü", {"study_id": 5})
    write_annotation([study], path)
    again = read_annotation(path)
    assert again == {"train": [study], "val": [], "test": []}
    assert again["train"][0].extra == {"study_id": 5}


def test_write_that_is_cut_short_keeps_the_old_file(tmp_path, monkeypatch):
    study = Study("a", "Clear.", ("0.png",), "train")
    path = write_annotation([study], tmp_path / "annotation.json")
    before = path.read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_annotation([Study("b", "Clear.", ("0.png",), "train")], path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "make, name, views", [(make_mimic, "mimic_cxr", 1), (make_iu, "iu_x_ray", 2)]
)
def test_published_layouts(tmp_path, monkeypatch, make, name, views):
    "In the published folders under `data/` the tasks run as they are, under either name."
    make(tmp_path / "data")
    monkeypatch.setattr("cvt2distilgpt2.tasks.project_root", lambda: tmp_path)
    studies = open_task(get_task(name))
    assert [len(s) for s in studies.values()] == [8, 3, 3]
    folder = TASKS[name].image_folder
    for s in (s for v in studies.values() for s in v):
        assert len(s.image_path) == views
        assert all((folder / p).is_file() for p in s.image_path)


def test_going_on_keeps_what_is_good(tmp_path):
    "Bad entries, doubled ids and leaked patients are left out and listed; the test keeps its own."

    def entry(i, split, **more):
        return dict(id=i, report="Clear.", image_path=[f"{i}.png"], split=split, **more)

    splits = dict(
        train=[
            entry("a", "train", patient="p"),
            entry("b", "train"),
            entry("d", "train"),
            entry("e", "train") | {"report": ""},
        ],
        val=[entry("d", "val"), entry("f", "val", patient="p")],
        test=[entry("c", "test", patient="p"), entry("g", "test", patient="q")],
    )
    (tmp_path / "annotation.json").write_text(json.dumps(splits))
    problems = []
    studies = read_annotation(tmp_path / "annotation.json", problems)
    assert {s: [x.id for x in v] for s, v in studies.items()} == dict(
        train=["b"], val=[], test=["c", "g"]
    )
    assert [(p.id, p.what) for p in problems] == [
        ("e", "empty report"),
        ("d", "the id occurs 2 times"),
        ("", "patient p is in test and train and val"),
    ]
    with pytest.raises(DataError) as e:
        read_annotation(tmp_path / "annotation.json")
    assert e.value.problems == problems


def test_limits_keep_the_first(tmp_path):
    task = get_task("iu_x_ray", **make_iu(tmp_path), n_train=3, views=1)
    studies = open_task(task)
    assert [s.id for s in studies["train"]] == [f"CXR{i}_IM-{i:04d}" for i in (1, 2, 3)]
    assert all(len(s.image_path) == 1 for v in studies.values() for s in v)
    assert len(studies["test"]) == 3


@pytest.mark.parametrize("name", ["mimic_cxr", "iu_x_ray"])
def test_missing_data_say_what_where_and_from_where(tmp_path, monkeypatch, name):
    monkeypatch.setattr("cvt2distilgpt2.tasks.project_root", lambda: tmp_path)
    task = get_task(name)
    with pytest.raises(FileNotFoundError) as e:
        open_task(task)
    parts = (task.annotation_path, task.image_folder, task.source)
    assert all(str(part) in str(e.value) for part in parts)


WRONG_VALUES = dict(
    epochs=0,
    batch_size=-1,
    views=0,
    image_size=449,
    max_length=1,
    profile="cxr",
    style="mimic",
    model="large",
    recipe="new",
    schedule="step",
    precision="int8",
    lr="fast",
    workers=1.5,
    n_train=True,
    seed="0",
)


@pytest.mark.parametrize("name", WRONG_VALUES)
def test_wrong_value_is_named(name):
    with pytest.raises((TypeError, ValueError), match=name):
        get_task("mimic_cxr", **{name: WRONG_VALUES[name]})


@pytest.mark.parametrize("name", [f.name for f in fields(Task) if f.name not in ("name", "source")])
def test_every_misspelt_field_is_found(name):
    with pytest.raises(TypeError, match=f"did you mean '{name}'"):
        get_task("demo", **{name[:-1] + "_" + name[-1]: 1})
    with pytest.raises(TypeError, match="unknown parameter"):
        task_parameters({"task": "demo", name + "_": 1}, ())


def test_paths_count_from_where_the_user_stands(tmp_path, monkeypatch):
    make_iu(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    paths = dict(annotation="data/iu_x_ray/annotation.json", images="data/iu_x_ray/images")
    task = get_task("iu_x_ray", **paths)
    monkeypatch.chdir("/")
    assert len(open_task(task)["train"]) == 8
    monkeypatch.chdir(tmp_path)
    assert get_task("data/iu_x_ray").image_folder == tmp_path / "data" / "iu_x_ray" / "images"


def test_installed_alone_the_project_is_the_working_directory(tmp_path):
    "Outside a checkout, `data/` and `runs/` are looked for where the user stands."
    package = Path(sys.modules["cvt2distilgpt2"].__file__).parent
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(package, tmp_path / "site" / "cvt2distilgpt2", ignore=ignore)
    (tmp_path / "elsewhere").mkdir()
    code = "from cvt2distilgpt2.tasks import project_root; print(project_root())"
    said = subprocess.run(
        [sys.executable, "-c", code],
        text=True,
        capture_output=True,
        cwd=tmp_path / "elsewhere",
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site"), "CVT2DISTILGPT2_HOME": ""},
    ).stdout
    assert said.strip() == str(tmp_path / "elsewhere")


def test_folder_called_demo_is_not_the_demo(tmp_path, monkeypatch):
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert get_task("./demo").name.startswith("demo-")
    assert get_task("demo").name == "demo"


def test_folder_within_data_keeps_its_name(tmp_path, monkeypatch):
    monkeypatch.setenv("CVT2DISTILGPT2_HOME", str(tmp_path))
    task = get_task(str(tmp_path / "data" / "mine"))
    assert (task.name, task.address) == ("mine", str(tmp_path / "data" / "mine"))


def test_tilde_is_the_users_own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CVT2DISTILGPT2_HOME", "~/scratch")
    assert project_root() == tmp_path / "scratch"
    task = get_task("~/mine", images="~/pictures", encoder="~/cvt")
    assert task.annotation_path == tmp_path / "mine" / "annotation.json"
    assert (task.image_folder, task.encoder) == (tmp_path / "pictures", str(tmp_path / "cvt"))


NUMBERS = {"1": 1, "2026_01": 202601, "0012": 12, "1e5": 1e5, "nan": float("nan"), "True": True}


@pytest.mark.parametrize("word", NUMBERS)
@pytest.mark.parametrize("name", ["task", "run", "compare", "decoder", "annotation"])
def test_number_is_no_text(name, word):
    "What papermill's -p made of a word cannot be turned back, so the error says how to give it."
    with pytest.raises(TypeError, match=f"parameter '{name}' must be text.*`-r {name} WORD`"):
        task_parameters({"task": "demo", name: NUMBERS[word]}, extra=("run", "compare"))


def test_text_may_be_a_path_or_several():
    given = dict(task="demo", compare=["a.csv", Path("b.csv")], run=None)
    assert task_parameters(given, extra=("run", "compare")) == TASKS["demo"]
    with pytest.raises(TypeError, match="parameter 'compare' must be text"):
        task_parameters(given | dict(compare=["a.csv", 7]), extra=("run", "compare"))


PARAMETERS = 'task:str = "demo"  # a task\nepochs:int = None\nrun:str = None'
CALL = "settings = task_parameters(globals(), extra=('run',))"
CELLS = {  # the cells that ran, in order: what is found in them
    "parameters": ([PARAMETERS, CALL], "epochs run task"),
    "injected": (
        [PARAMETERS, "# Parameters\nlr = 0.1\nclip = float('inf')", CALL],
        "clip epochs lr run task",
    ),
    "twice": ([PARAMETERS, CALL, "studies = {}", "state = 1", PARAMETERS, CALL], "epochs run task"),
    "injected the first time": (
        [PARAMETERS, "lr = 0.1", CALL, PARAMETERS, CALL],
        "epochs run task",
    ),
    "injected the second time": (
        [PARAMETERS, CALL, PARAMETERS, "epoch = 3", CALL],
        "epoch epochs run task",
    ),
    "a field added": (
        [PARAMETERS, CALL, PARAMETERS + "\nn_val = 5", CALL],
        "epochs n_val run task",
    ),
    "computed": (["import os\ntask:str = os.sep.join('ab')", "import re", CALL], "task"),
    "in a cell of its own": (
        [PARAMETERS, "import os", "epochs:int = 3", "n_val = 2", CALL],
        "epochs n_val run task",
    ),
    "magics and constants": (
        ["%matplotlib inline", PARAMETERS, "OPTIONS = ('a',)", "%time x = 1", CALL],
        "epochs run task",
    ),
}


@pytest.mark.parametrize("name", CELLS)
def test_parameters_are_what_their_cells_set(name):
    cells, found = CELLS[name]
    variables = dict.fromkeys([*found.split(), "studies", "state", "settings", "x"], 1)
    assert sorted(notebook_parameters({**variables, "In": ["", *cells]})) == found.split()


def test_outside_of_a_notebook_every_plain_value_counts():
    names = dict(task="demo", epoch=3, Path=Path, _x=1, json=json)
    assert set(notebook_parameters(names)) == {"task", "epoch"}


@pytest.mark.parametrize("paths", [7, None, "a.png", {}])
def test_entry_whose_paths_are_no_list_is_listed(paths, tmp_path):
    entry = {"id": "a", "report": "Clear.", "image_path": paths, "views": ["frontal"]}
    (tmp_path / "annotation.json").write_text(json.dumps({"train": [entry]}))
    with pytest.raises(DataError, match="'image_path' must be a list of at least one path"):
        read_annotation(tmp_path / "annotation.json")
