"""A demo that is killed, and the command line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_images import BROKEN, KINDS
from threadpoolctl import threadpool_info
from trees import make_iu, make_mimic

from cvt2distilgpt2.images import open_image
from cvt2distilgpt2.prepare import (
    _map_processes,
    check_images,
    draw_demo,
    main,
    prepare,
    read_size,
    read_source,
    task_arguments,
)
from cvt2distilgpt2.tasks import DataError, Study, get_task, read_annotation


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_all_broken_images_at_once(tmp_path):
    for kind, (write, _, _) in BROKEN.items():
        write(tmp_path / kind)
    KINDS["grey.png"](tmp_path / "good.png")
    studies = [Study(f"study {kind}", "Clear.", ("good.png", kind), "train") for kind in BROKEN]
    problems = check_images(studies, tmp_path)
    expected = [(f"study {kind}", kind) for kind in BROKEN]
    assert [(p.id, Path(p.path).name) for p in problems] == expected
    problems = check_images(studies, tmp_path, decode=False)
    expected = [kind for kind, (_, _, told) in BROKEN.items() if told]
    assert [Path(p.path).name for p in problems] == expected
    assert check_images([Study("a", "Clear.", ("good.png",), "train")], tmp_path) == []


# the demo


def demo(folder, n=6, **changes):
    places = dict(annotation=str(folder / "annotation.json"), images=str(folder / "images"))
    counts = dict(n_train=n, n_val=3, n_test=3, resize=48, image_size=48)
    return get_task("demo", **places, **{**counts, **changes})


def everything(folder):
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def test_demo(tmp_path):
    studies = prepare(demo(tmp_path))
    assert {s: len(v) for s, v in studies.items()} == dict(train=6, val=3, test=3)
    every = [s for v in studies.values() for s in v]
    assert len({s.patient for s in every}) == len({s.report for s in every}) == 12
    for s in every:
        assert s.views == ("frontal",)
        assert isinstance(s.findings, tuple)
        assert open_image(tmp_path / "images" / s.image_path[0]).size == (48, 48)
    assert not list(tmp_path.rglob("*.part"))


def test_demo_of_other_sizes_agree(tmp_path):
    "The first phantoms are the same for all counts and views, drawn at once or bit by bit."
    draw_demo(demo(tmp_path / "a", n=8, views=2))
    for n, views in ((2, 1), (8, 1), (8, 2)):
        draw_demo(demo(tmp_path / "b", n=n, views=views))
    assert everything(tmp_path / "a") == everything(tmp_path / "b")
    (first, *_), few = open_first(tmp_path / "b", n=2, views=1)
    assert few == 2 and first.image_path == ("train000000/0.png",)


def open_first(folder, **changes):
    studies = prepare(demo(folder, **changes))["train"]
    return studies, len(studies)


def test_demo_is_not_drawn_twice(tmp_path):
    draw_demo(demo(tmp_path))
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.*")}
    draw_demo(demo(tmp_path, n=3))
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.*")}


def test_whole_demo_is_opened_where_nothing_can_be_written(tmp_path, monkeypatch):
    def refuse(*args):
        raise PermissionError("read-only file system")

    monkeypatch.setattr("cvt2distilgpt2.prepare.FileLock", refuse)
    with pytest.raises(PermissionError, match="CVT2DISTILGPT2_HOME"):
        draw_demo(demo(tmp_path))
    monkeypatch.undo()
    draw_demo(demo(tmp_path))
    monkeypatch.setattr("cvt2distilgpt2.prepare.FileLock", refuse)
    assert len(prepare(demo(tmp_path))["train"]) == 6


def test_demo_drawn_otherwise_is_replaced(tmp_path):
    draw_demo(demo(tmp_path, n=9))
    draw_demo(demo(tmp_path, n=2, resize=56))
    assert len(list((tmp_path / "images").iterdir())) == 8  # nothing of the other size is left
    assert {read_size(p) for p in tmp_path.rglob("*.png")} == {(56, 56)}
    stamp = json.loads((tmp_path / "drawn.json").read_text())
    (tmp_path / "drawn.json").write_text(json.dumps({**stamp, "code": "another"}))
    before = (tmp_path / "annotation.json").stat().st_mtime_ns
    draw_demo(demo(tmp_path, n=2, resize=56))
    assert (tmp_path / "annotation.json").stat().st_mtime_ns > before


def test_foreign_files_are_never_drawn_over(tmp_path):
    (tmp_path / "images").mkdir()
    KINDS["grey.png"](tmp_path / "images" / "mine.png")
    before = everything(tmp_path)
    with pytest.raises(FileExistsError, match="Move it away"):
        draw_demo(demo(tmp_path))
    assert everything(tmp_path) == before
    make_iu(tmp_path / "data")
    folder = tmp_path / "data" / "iu_x_ray"
    before = everything(folder)
    with pytest.raises(FileExistsError, match="Move it away"):
        draw_demo(demo(folder))
    assert everything(folder) == before


def test_damaged_demo_is_told(tmp_path):
    draw_demo(demo(tmp_path))
    path = tmp_path / "images" / "val000001" / "0.png"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(DataError, match="val000001") as e:
        prepare(demo(tmp_path))
    assert len(e.value.problems) == 1


QUIET = {**os.environ, "TQDM_DISABLE": "1"}  # no progress bars


def command(*words):
    return [sys.executable, "-m", "cvt2distilgpt2.prepare", *map(str, words)]


def demo_words(folder, n, **changes):
    task = dict(
        annotation=folder / "annotation.json",
        images=folder / "images",
        n_train=n,
        n_val=3,
        n_test=3,
        resize=48,
        image_size=48,
    )
    return [w for name, v in {**task, **changes}.items() for w in (f"--{name}", v)]


def test_killed_demo_goes_on(tmp_path):
    "A run that is killed leaves no annotation, and the next one ends with the same files."
    words = command(*demo_words(tmp_path / "a", 60))
    process = subprocess.Popen(words, start_new_session=True, env=QUIET)
    while len(list((tmp_path / "a").rglob("*.png"))) < 10 and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    drawn = len(list((tmp_path / "a").rglob("0.png")))
    assert 10 <= drawn < 66 and not (tmp_path / "a" / "annotation.json").exists()
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("0.png")}
    for folder in (tmp_path / "a", tmp_path / "b"):
        draw_demo(demo(folder, n=60))
    assert all(p.stat().st_mtime_ns == t for p, t in kept.items())  # not drawn again
    killed = everything(tmp_path / "a")
    whole = {name: content for name, content in killed.items() if not name.endswith(".part")}
    assert whole == everything(tmp_path / "b")


def test_processes_that_start_together_draw_once(tmp_path):
    runs = [command(*demo_words(tmp_path / "a", n)) for n in (30, 30, 20)]
    processes = [subprocess.Popen(words, env=QUIET) for words in runs]
    assert [p.wait() for p in processes] == [0, 0, 0]
    draw_demo(demo(tmp_path / "b", n=30))
    assert everything(tmp_path / "a") == everything(tmp_path / "b")


def threads(_):
    np.ones((64, 64)) @ np.ones((64, 64))
    return max(pool["num_threads"] for pool in threadpool_info())


def test_drawing_processes_have_one_thread():
    assert _map_processes(threads, [1, 2, 3], "") == [1, 1, 1]


# the command line


def run(*words):
    return subprocess.run(command(*words), capture_output=True, text=True, env=QUIET)


def test_command_line(tmp_path):
    done = run(*demo_words(tmp_path, 4))
    assert done.returncode == 0 and "demo: 4 train, 3 val, 3 test studies" in done.stdout
    assert len(read_annotation(tmp_path / "annotation.json")["train"]) == 4
    (tmp_path / "images" / "test000000" / "0.png").unlink()
    done = run(*demo_words(tmp_path, 4))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "test000000: missing" in done.stderr


@pytest.mark.parametrize(
    "words, said",
    [
        (["--epoch", "3"], "did you mean 'epochs'"),
        (["--epoch=3"], "did you mean 'epochs'"),
        (["--task", "mimic"], "unknown task 'mimic'"),
        (["--epochs", "many"], "invalid int value"),
        (["--epochs", "0"], "epochs must be at least 1"),
        (["mimic_cxr"], "unexpected words: mimic_cxr"),
        (["--name", "x"], "unknown parameter 'name'"),
        (["--profile", "cxr"], "profile must be one of"),
        (["--lr"], "expected one argument"),
    ],
)
def test_wrong_command_line(capsys, words, said):
    with pytest.raises(SystemExit) as e:
        task_arguments(words)
    assert e.value.code == 2 and said in capsys.readouterr().err


def test_command_line_sets_every_type():
    words = "--task iu_x_ray --style mimic_cxr --views 1 --lr 1 --rotation 2.5 --init here"
    task, extra = task_arguments(words.split(), ("run", "init"))
    assert (task.style, task.views, task.lr, task.rotation) == ("mimic_cxr", 1, 1.0, 2.5)
    assert extra == {"run": None, "init": "here"}


# the published tasks


@pytest.mark.parametrize(
    "make, name, n", [(make_mimic, "mimic_cxr", 14), (make_iu, "iu_x_ray", 28)]
)
def test_published_tasks(tmp_path, make, name, n):
    task = get_task(name, **make(tmp_path))
    studies = prepare(task)
    assert sum(len(s.image_path) for v in studies.values() for s in v) == n
    paths = [
        task.image_folder / studies["train"][0].image_path[0],
        task.image_folder / studies["test"][1].image_path[-1],
    ]
    paths[0].unlink()
    paths[1].write_bytes(paths[1].read_bytes()[:-200])
    with pytest.raises(DataError) as e:
        prepare(task)
    assert [p.path for p in e.value.problems] == list(map(str, paths))


@pytest.mark.skipif(
    "CVT2DISTILGPT2_TEST_DATA" not in os.environ, reason="CVT2DISTILGPT2_TEST_DATA is not set"
)
def test_real_radiographs():
    task = get_task(os.path.join(os.environ["CVT2DISTILGPT2_TEST_DATA"], "cxr_pairs"))
    assert sum(len(s.image_path) for v in prepare(task).values() for s in v) == 83


# tables as people have them


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.linear_gradient("L").resize((64, 64)).save(path)


def test_flickrs_captions(tmp_path):
    "captions.txt beside the folder Images, a row a caption."
    picture(tmp_path / "Images" / "1.jpg")
    (tmp_path / "captions.txt").write_text(
        'image,caption\n1.jpg,A child in a dress .\n1.jpg,"A girl , ""going"" in ."\n'
    )
    (study,) = read_source(tmp_path).studies
    assert study.references == ("A child in a dress .", 'A girl , "going" in .')
    assert study.image_path == ("1.jpg",)


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_image_folders_of_the_hub(form, tmp_path):
    listed = {
        "jsonl": '{"file_name": "0.png", "text": "Clear."}\n',
        "csv": "file_name,text\n0.png,Clear.\n",
    }
    for split in ("train", "validation", "test"):
        picture(tmp_path / split / "0.png")
        (tmp_path / split / f"metadata.{form}").write_text(listed[form])
    raw = read_source(tmp_path)
    assert not raw.problems
    assert {s.id: s.split for s in raw.studies} == {
        "train/0.png": "train",
        "validation/0.png": "val",
        "test/0.png": "test",
    }
    assert all((raw.folder / p).is_file() for s in raw.studies for p in s.image_path)


def test_tables_named_after_their_splits(tmp_path):
    for i, name in enumerate(("train", "valid", "test")):
        picture(tmp_path / f"{i}.png")
        (tmp_path / f"{name}.csv").write_text(f"image,caption\n{i}.png,Text.\n")
    assert {s.id: s.split for s in read_source(tmp_path).studies} == {
        "0.png": "train",
        "1.png": "val",
        "2.png": "test",
    }
    (tmp_path / "other.csv").write_text("image,caption\n0.png,Text.\n")
    said = "4 tables, and the name of .*other.csv speaks of no split"
    with pytest.raises(ValueError, match=said):
        read_source(tmp_path)


def test_columns_are_said_on_the_command_line(tmp_path, monkeypatch):
    picture(tmp_path / "0.png")
    (tmp_path / "t.csv").write_text("scan,words\n0.png,Clear.\n")
    given = ["--task", str(tmp_path / "mine"), "--source", str(tmp_path / "t.csv")]
    with pytest.raises(SystemExit) as e:
        main(given)
    assert "--columns image=NAME,text=NAME" in str(e.value)
    main([*given, "--columns", "image=scan,text=words", "--resize", "64", "--image_size", "64"])
    assert (tmp_path / "mine" / "annotation.json").is_file()
    with pytest.raises(ValueError, match="'picture'; roles: image, text"):
        read_source(tmp_path / "t.csv", columns="picture=scan")


def test_task_of_any_size_is_verified(tmp_path, capsys):
    "What was prepared at another size than the task's own is whole all the same."
    for i in range(30):
        picture(tmp_path / f"{i}.png")
    (tmp_path / "t.csv").write_text(
        "image,text\n" + "".join(f"{i}.png,Clear.\n" for i in range(30))
    )
    task = ["--task", str(tmp_path / "mine")]
    main([*task, "--source", str(tmp_path / "t.csv"), "--resize", "48", "--image_size", "48"])
    main([*task, "--verify"])
    assert "30 studies, 30 images are whole" in capsys.readouterr().out
    with pytest.raises(SystemExit) as e:
        main(task)
    assert "take them as they are (resize=48, image_size=48)" in str(e.value)


def test_list_of_records_in_json(tmp_path):
    picture(tmp_path / "0.png")
    (tmp_path / "x.json").write_text(
        '[{"id": "007", "images": ["0.png"], "captions": ["A.", "B."]}]'
    )
    (study,) = read_source(tmp_path / "x.json").studies
    assert (study.id, study.image_path, study.references) == ("007", ("0.png",), ("A.", "B."))
