"From anyone's files to the one form: every layout, broken inputs, kills at any moment."

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid
from torchvision.transforms import v2
from trees import make_iu, make_kaggle, make_mimic_jpg, make_openi

from cvt2distilgpt2.cache import ImageCache
from cvt2distilgpt2.data import ReportDataset, image_transform
from cvt2distilgpt2.images import open_image
from cvt2distilgpt2.prepare import build, main, prepare, read_source, verify
from cvt2distilgpt2.tasks import DataError, get_task, read_annotation

SIDE = 48  # of what is prepared here


def picture(rng, mode="L", size=None):
    "A smooth picture, so that all formats keep it well."
    width, height = size or rng.integers(SIDE - 8, 2 * SIDE, 2)
    small = Image.fromarray(rng.integers(0, 256, (6, 5), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def dicom(path, image, inverted=False):
    "Write a grey picture as an uncompressed DICOM file."
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file = FileDataset(str(path), {}, file_meta=meta, preamble=bytes(128))
    file.SOPClassUID = meta.MediaStorageSOPClassUID
    file.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    file.Rows = image.height
    file.Columns = image.width
    file.SamplesPerPixel = 1
    file.BitsAllocated = 8
    file.BitsStored = 8
    file.HighBit = 7
    file.PixelRepresentation = 0
    file.PhotometricInterpretation = "MONOCHROME1" if inverted else "MONOCHROME2"
    file.WindowCenter, file.WindowWidth = 128, 256  # the levels as they are
    pixels = np.asarray(image)
    file.PixelData = (255 - pixels if inverted else pixels).tobytes() + bytes(pixels.size % 2)
    file.save_as(path, enforce_file_format=True)


def picture_16_bit(rng):
    return Image.fromarray(np.asarray(picture(rng)).astype(np.uint16) * 200)


WRITERS = {
    "png": lambda p, r: picture(r).save(p),
    "jpg": lambda p, r: picture(r).save(p, quality=90),
    "webp": lambda p, r: picture(r, "RGB").save(p),
    "tif": lambda p, r: picture(r).save(p, compression="tiff_lzw"),
    "gif": lambda p, r: picture(r).save(p),
    "bmp": lambda p, r: picture(r, "RGB").save(p),
    "palette.png": lambda p, r: picture(r).convert("P").save(p),
    "alpha.png": lambda p, r: picture(r, "LA").save(p),
    "cmyk.jpg": lambda p, r: picture(r, "CMYK").save(p),
    "rgb.png": lambda p, r: picture(r, "RGB").save(p),
    "16 bit.png": lambda p, r: picture_16_bit(r).save(p),
    "dcm": lambda p, r: dicom(p, picture(r)),
    "inverted.dcm": lambda p, r: dicom(p, picture(r), inverted=True),
}


def _rewrite(change):
    def apply(path, rng):
        path.write_bytes(change(bytearray(path.read_bytes()), rng))

    return apply


def _flip(content, rng):
    for i in rng.integers(len(content), size=8):
        content[i] ^= 1 << int(rng.integers(8))
    return content


def _zeros(content, rng):
    start = int(rng.integers(len(content)))
    content[start : start + 64] = bytes(len(content[start : start + 64]))
    return content


def _replaced(make):
    def apply(path, rng):
        path.unlink()
        make(path, rng)

    return apply


FILE_DAMAGE = {  # what is done to an image file -> whether that must be a problem
    "none": (lambda path, rng: None, False),
    "cut": (_rewrite(lambda c, rng: c[: int(len(c) * rng.uniform(0.05, 0.6))]), None),
    "flipped": (_rewrite(_flip), None),
    "zeros": (_rewrite(_zeros), None),
    "noise": (_rewrite(lambda c, rng: rng.bytes(500)), True),
    "empty": (_rewrite(lambda c, rng: b""), True),
    "text": (_rewrite(lambda c, rng: b"<html>404 not found</html>"), True),
    "missing": (lambda path, rng: path.unlink(), True),
    "folder": (_replaced(lambda p, rng: p.mkdir()), True),
    "one pixel": (_replaced(lambda p, rng: Image.new("L", (1, 200), 9).save(p, "PNG")), True),
    "blank": (_replaced(lambda p, rng: Image.new("L", (90, 80), 9).save(p, "PNG")), True),
}


def _to_other_split(entry, rng):
    entry["split"] = "test" if entry["split"] == "train" else "train"


TEXT_DAMAGE = {  # what is done to an entry -> whether that must be a problem
    "none": (lambda e, rng: None, False),
    "no report": (lambda e, rng: e.pop("report"), True),
    "empty report": (lambda e, rng: e.update(report=" \n"), True),
    "number": (lambda e, rng: e.update(report=3), True),
    "no paths": (lambda e, rng: e.update(image_path=[]), True),
    "path is text": (lambda e, rng: e.update(image_path="a.png"), True),
    "leads out": (lambda e, rng: e.update(image_path=["../../secret.png"]), True),
    "absolute": (lambda e, rng: e.update(image_path=["/etc/passwd"]), True),
    "nul": (lambda e, rng: e.update(image_path=["a\0.png"]), True),
    "no id": (lambda e, rng: e.pop("id"), True),
    "doubled id": (lambda e, rng: e.update(id="doubled"), True),
    "other split": (_to_other_split, True),
    # the test keeps such a patient
    "patient": (lambda e, rng: e.update(patient="on both sides"), None),
    "views": (lambda e, rng: e.update(views=["frontal"] * 7), True),
    "odd text": (lambda e, rng: e.update(report="\u202e\0 ____ \ud800 ..." + "x" * 5000), None),
}


def broken_folder(folder, n, seed):
    "Write `n` studies, each damaged in one way at most -> place, id, damage, must be a problem."
    rng = np.random.default_rng(seed)
    splits = {"train": [], "val": [], "test": []}
    truth = []
    (folder / "images").mkdir(parents=True)
    kinds = list(WRITERS)
    damages = [("file", d) for d in FILE_DAMAGE] + [("text", d) for d in TEXT_DAMAGE]
    for i in range(n):
        kind = kinds[i % len(kinds)]
        what, damage = damages[i % len(damages)]
        split = list(splits)[int(rng.integers(3))]
        entry = dict(id=f"s{i}", report=f"Report {i}.", image_path=[f"{i}.{kind}"], split=split)
        WRITERS[kind](folder / "images" / f"{i}.{kind}", rng)
        act, must = (FILE_DAMAGE if what == "file" else TEXT_DAMAGE)[damage]
        act(folder / "images" / f"{i}.{kind}" if what == "file" else entry, rng)
        splits[split].append(entry)
        truth.append((f"{split}[{len(splits[split]) - 1}]", entry.get("id"), damage, must))
    (folder / "annotation.json").write_text(json.dumps(splits))
    return truth


def everything(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.suffix not in (".lock", ".part")
    }


def new_task(folder, **changes):
    fields = dict(resize=SIDE, image_size=SIDE - 8, model="small")
    return get_task(str(folder) + os.sep, **{**fields, **changes})


def sized(*words):
    "Return the words of a command line with the sizes of what is prepared here."
    words = map(str, (*words, "--resize", SIDE, "--image_size", SIDE - 8))
    return list(words)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "n, seed",
    [
        (78, 0),
        pytest.param(360, 1, marks=pytest.mark.full),
        pytest.param(360, 2, marks=pytest.mark.full),
    ],
)
def test_broken_inputs_are_listed_or_read_right(tmp_path, n, seed):
    "Every study is listed as a problem or prepared as its original shows it; none is dropped."
    truth = broken_folder(tmp_path / "raw", n, seed)
    before = everything(tmp_path / "raw")
    raw = read_source(tmp_path / "raw")
    task = new_task(tmp_path / "made")
    with pytest.raises(DataError) as e:
        build(raw, task)
    kept = build(raw, replace(task, on_problem="skip"))
    assert everything(tmp_path / "raw") == before
    listed = pd.read_csv(tmp_path / "made" / "problems.csv", keep_default_na=False)
    assert len(listed) == len(e.value.problems)
    assert (listed.what.str.len() > 0).all()
    assert (listed.mend.str.len() > 0).all()
    good = {s.id: s for split in kept.values() for s in split}
    for place, name, damage, must in truth:
        told = bool({place, name} & set(listed.id))
        if damage == "patient":
            told = told or listed.what.str.contains("on both sides").any()
        assert told or name in good, f"{place} {name} ({damage}) was dropped in silence"
        assert must is None or must == (name not in good), (place, name, damage)
        assert not (damage == "none" and name not in good)
    cache = ImageCache(task.image_folder)
    for s in good.values():  # what was kept is what its original shows
        original = open_image(tmp_path / "raw" / "images" / s.image_path[0])
        if min(original.size) > SIDE:
            original = v2.Resize(SIDE)(original)
        cached = cache(s.image_path[0])
        assert np.array_equal(original.convert("RGB"), cached.convert("RGB"))
    every = list(good.values())
    loaded = ReportDataset(every, task.image_folder, image_transform(task, train=True))
    assert {loaded[i]["pixel_values"].shape[-1] for i in range(len(every))} == {SIDE - 8}
    assert prepare(task) == kept
    assert verify(task)["studies"] == len(every)


@pytest.mark.filterwarnings("ignore")
def test_broken_inputs_where_they_lie(tmp_path):
    "A folder in the one form is used as it stands: the same problems, and the rest can be loaded."
    truth = broken_folder(tmp_path / "raw", 78, seed=3)
    before = everything(tmp_path / "raw")
    task = new_task(tmp_path / "raw")
    with pytest.raises(DataError):
        prepare(task)
    kept = [s for v in prepare(replace(task, on_problem="skip")).values() for s in v]
    assert everything(tmp_path / "raw") == before and kept
    must = {name for _, name, _, must in truth if must}
    assert not must & {s.id for s in kept}
    loaded = ReportDataset(kept, task.image_folder, image_transform(task, train=False))
    assert len([loaded[i] for i in range(len(kept))]) == len(kept)


def table(folder, n, seed=0, size=(120, 100)):
    "Write `n` pictures and a table of them."
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    rows = [
        dict(image=f"{i}.png", text=f"Report {i}.", split=("train", "train", "val", "test")[i % 4])
        for i in range(n)
    ]
    for row in rows:
        picture(rng, size=size).save(folder / row["image"])
    pd.DataFrame(rows).to_csv(folder / "table.csv", index=False)
    return folder / "table.csv"


SCRIPT = """
import sys
from functools import partial
import cvt2distilgpt2.prepare as prepare
prepare.build_cache = partial(prepare.build_cache, shard_size=8)
prepare.main(sys.argv[1:])
"""


def start(source, made, processes):
    words = sized("--task", f"{made}/", "--source", source, "--processes", processes)
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *words],
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"},
        text=True,
    )


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.full)])
def test_killed_at_any_moment_ends_with_the_same_bytes(tmp_path, kills):
    "Killed again and again, with changing numbers of processes, it ends as if undisturbed."
    source = table(tmp_path / "raw", 240, size=(700, 600))
    before = everything(tmp_path / "raw")
    rng = np.random.default_rng(kills)
    begun = time.perf_counter()
    whole = start(source, tmp_path / "undisturbed", 1)
    said = whole.communicate(timeout=300)
    assert whole.returncode == 0, said
    span = time.perf_counter() - begun
    wanted = everything(tmp_path / "undisturbed")
    killed = 0
    for _ in range(10 * kills):
        if killed == kills:
            break
        process = start(source, tmp_path / "killed", int(rng.integers(1, 4)))
        try:
            process.communicate(timeout=span * rng.uniform(0.2, 0.9))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            killed += 1
        else:  # done before it was killed: as it should be, and from the beginning
            assert process.returncode == 0 and everything(tmp_path / "killed") == wanted
            shutil.rmtree(tmp_path / "killed")
    process = start(source, tmp_path / "killed", 2)
    said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert killed == kills
    assert everything(tmp_path / "killed") == wanted
    assert everything(tmp_path / "raw") == before


def test_what_is_made_says_what_it_is_made_of(tmp_path, capsys):
    source = table(tmp_path / "raw", 12)
    main(sized("--task", f"{tmp_path}/made/", "--source", source))
    assert "6 train, 3 val, 3 test studies" in capsys.readouterr().out
    facts = json.loads((tmp_path / "made" / "prepared.json").read_text())
    assert facts["state"] == "whole"
    assert facts["counts"]["studies in train"] == 6
    assert facts["resize"] == SIDE
    assert not (tmp_path / "made" / "problems.csv").exists()
    main(sized("--task", f"{tmp_path}/made/", "--verify"))
    assert "12 studies, 12 images are whole" in capsys.readouterr().out


def test_what_was_downloaded_is_prepared(tmp_path, monkeypatch, capsys):
    "Without a source, Open-i's files go to data/openi and are read from there."
    monkeypatch.setenv("CVT2DISTILGPT2_HOME", str(tmp_path))
    monkeypatch.setattr("cvt2distilgpt2.prepare.download_openi", make_openi)
    main(sized("--task", "iu_x_ray", "--download"))
    assert "iu_x_ray: " in capsys.readouterr().out
    assert (tmp_path / "data" / "openi").is_dir()
    made = read_annotation(tmp_path / "data" / "iu_x_ray" / "annotation.json")
    assert sum(map(len, made.values())) == 7


def test_the_task_that_was_made_is_not_made_of_itself(tmp_path):
    source = table(tmp_path / "raw", 4)
    build(read_source(source), new_task(tmp_path / "made"))
    before = everything(tmp_path / "made")
    with pytest.raises(ValueError, match="prepared already"):
        read_source(tmp_path / "made")
    assert everything(tmp_path / "made") == before


def test_another_size_is_told(tmp_path):
    task = new_task(tmp_path / "made")
    build(read_source(table(tmp_path / "raw", 4)), task)
    with pytest.raises(ValueError, match="prepare it again with --resize 64"):
        prepare(replace(task, resize=64))


def test_a_smaller_size_is_told_of_once_as_it_is_prepared(tmp_path, capsys, recwarn):
    task = new_task(tmp_path / "made")
    main(sized("--task", f"{tmp_path}/made/", "--source", table(tmp_path / "raw", 4)))
    assert f"short side {SIDE} pixels" in capsys.readouterr().out
    prepare(replace(task, resize=40))
    assert not recwarn.list and not capsys.readouterr().out


@pytest.mark.parametrize(
    "words, said",
    [
        (["--source", "nowhere"], "does not exist"),
        (["--task", "demo", "--source", "{raw}"], "the demo is drawn"),
        (["--source", "{raw}/0.png"], "nothing that can be read here"),
        (["--source", "{raw}", "--store", "best"], "store"),
        (["--source", "{raw}", "--processes", "two"], "processes"),
        (["--source", "{empty}"], "nothing that can be read here"),
        (["--source", "{raw}", "--examples", "pair"], "examples"),
        (["--source", "{raw}", "--split", "test"], "given or drawn"),
        (["--verify"], "annotation.json"),
    ],
)
def test_wrong_words_get_an_answer(tmp_path, words, said):
    table(tmp_path / "raw", 4)
    (tmp_path / "empty").mkdir()
    words = [w.format(raw=tmp_path / "raw", empty=tmp_path / "empty") for w in words]
    if "--task" not in words:
        words += ["--task", f"{tmp_path}/made/"]
    with pytest.raises(SystemExit) as e:
        main(words)
    assert said in str(e.value)


@pytest.mark.skipif(
    "CVT2DISTILGPT2_TEST_DATA" not in os.environ, reason="CVT2DISTILGPT2_TEST_DATA is not set"
)
def test_real_studies_are_the_same_as_folder_table_and_dicom(tmp_path):
    "70 real studies in three forms have the same ids, texts, splits and pixels."
    real = Path(os.environ["CVT2DISTILGPT2_TEST_DATA"]) / "cxr_pairs"
    as_folder = build(read_source(real), new_task(tmp_path / "folder"))
    every = [s for v in as_folder.values() for s in v]
    assert len(every) == 70
    rows = []
    dicom_rows = []
    for s in every:
        dicom_paths = [Path(p).with_suffix(".dcm").as_posix() for p in s.image_path]
        for p, dicom_path in zip(s.image_path, dicom_paths, strict=True):
            (tmp_path / "dicom" / p).parent.mkdir(parents=True, exist_ok=True)
            grey = open_image(real / "images" / p).convert("L")
            dicom(tmp_path / "dicom" / dicom_path, grey, inverted=len(p) % 2)
        row = dict(id=s.id, image=";".join(s.image_path), text=s.report, split=s.split)
        rows.append(row)
        dicom_rows.append({**row, "image": ";".join(dicom_paths)})
    pd.DataFrame(rows).to_csv(tmp_path / "table.csv", index=False)
    pd.DataFrame(dicom_rows).to_csv(tmp_path / "dicom.csv", index=False)
    raw = read_source(tmp_path / "table.csv", originals=real / "images")
    as_table = build(raw, new_task(tmp_path / "table"))
    raw = read_source(tmp_path / "dicom.csv", originals=tmp_path / "dicom")
    as_dicom = build(raw, new_task(tmp_path / "as_dicom"))
    caches = [ImageCache(tmp_path / n / "images") for n in ("folder", "table", "as_dicom")]
    for split in as_folder:
        for a, b, c in zip(as_folder[split], as_table[split], as_dicom[split], strict=True):
            assert (a.id, a.report.strip()) == (b.id, b.report.strip()) == (c.id, c.report.strip())
            for p, q, r in zip(a.image_path, b.image_path, c.image_path, strict=True):
                first = np.asarray(caches[0](p).convert("L"))
                assert np.array_equal(first, np.asarray(caches[1](q).convert("L")))
                # colour is made grey before or after
                assert np.abs(first.astype(int) - np.asarray(caches[2](r))).max() <= 1


def openi_with_chen(folder):
    "Write IU X-Ray as Chen et al. renamed it."
    return Path(make_iu(folder)["annotation"]).parent


def coco(folder):
    "Write captions as COCO's archives unpack, two an image."
    for number, split in enumerate(("train2017", "val2017", "test2017")):
        made = table(folder / split / "made", 4, seed=len(split)).parent
        pictures = [p.rename(folder / split / p.name) for p in sorted(made.glob("*.png"))]
        images = [dict(id=4 * number + i, file_name=p.name) for i, p in enumerate(pictures)]
        captions = [
            dict(id=2 * i["id"] + k, image_id=i["id"], caption=f"Caption {k} of {i['id']}.")
            for i in images
            for k in range(2)
        ]
        (folder / "annotations").mkdir(exist_ok=True)
        path = folder / "annotations" / f"captions_{split}.json"
        path.write_text(json.dumps(dict(images=images, annotations=captions)))
    return folder


def unpacked_openi(folder):
    "Unpack both of Open-i's archives into one folder, as `tar` does."
    make_openi(folder, packed=False)
    for p in (folder / "NLMCXR_png").iterdir():
        p.rename(folder / p.name)
    (folder / "NLMCXR_png").rmdir()
    return folder


def chen_by_another_name(folder):
    "Write Chen et al.'s file under another name, its images beside."
    made = openi_with_chen(folder)
    return (made / "annotation.json").rename(made / "iu_annotation_v2.json")


def above_three_folders(folder):
    make_mimic_jpg(folder / "physionet.org" / "files")
    return folder / "physionet.org"


LAYOUTS = {  # how a source is written -> its path
    "mimic": lambda f: make_mimic_jpg(f)["root"],
    "folder above mimic": lambda f: Path(make_mimic_jpg(f)["root"]).parent,
    "files of mimic": lambda f: Path(make_mimic_jpg(f)["root"]) / "files",
    "folder above three folders": above_three_folders,
    "kaggle": make_kaggle,
    "table of kaggle": lambda f: make_kaggle(f) / "indiana_reports.csv",
    "chen by another name": chen_by_another_name,
    "openi": make_openi,
    "openi unpacked": unpacked_openi,
    "chen": openi_with_chen,
    "table": lambda f: table(f, 8),
    "folder of a table": lambda f: table(f, 8).parent,
    "coco": coco,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_becomes_a_task(tmp_path, layout):
    "What is made opens as a task of any name, and its images are those of the originals."
    source = Path(LAYOUTS[layout](tmp_path / "raw"))
    before = everything(tmp_path / "raw")
    task = new_task(tmp_path / "made")
    kept = build(read_source(source), replace(task, on_problem="skip"))
    after = everything(tmp_path / "raw")
    unpacked = {name for name in after if "NLMCXR_png" in name}  # beside its archive
    assert {name: content for name, content in after.items() if name in before} == before
    assert set(after) - unpacked <= set(before)
    every = [s for v in kept.values() for s in v]
    assert len(every) >= 4
    assert prepare(task) == kept
    assert verify(task)["studies"] == len(every)
    loaded = ReportDataset(kept["train"], task.image_folder, image_transform(task, train=True))
    assert loaded[0]["pixel_values"].shape[-2:] == (SIDE - 8, SIDE - 8)
    assert loaded[0]["label"]


# tasks that have a name


def texts_with_images(folder):
    "Write images with texts of the same name."
    for i in range(4):
        folder.mkdir(parents=True, exist_ok=True)
        picture(np.random.default_rng(i), size=(60, 60)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"Report {i}.")
    return folder


FOREIGN = {  # task -> what it is not made of
    "mimic_cxr": (texts_with_images, lambda f: table(f, 4), make_openi, make_kaggle),
    "mimic_cxr_jpg_chen": (texts_with_images,),
    "iu_x_ray": (texts_with_images, lambda f: table(f, 4), lambda f: make_mimic_jpg(f)["root"]),
}


@pytest.mark.parametrize(
    "task, make", [(task, make) for task, makes in FOREIGN.items() for make in makes]
)
def test_a_task_with_a_name_is_not_made_of_something_else(tmp_path, monkeypatch, task, make):
    monkeypatch.setenv("CVT2DISTILGPT2_HOME", str(tmp_path))
    source = make(tmp_path / "raw")
    said = "nothing that the task .* is read from(.|\n)*such as --task ./mine"
    with pytest.raises(SystemExit, match=said):
        main(["--task", task, "--source", str(source)])
    assert not (tmp_path / "data").exists()


OWN = {
    "mimic_cxr": (lambda f: make_mimic_jpg(f)["root"], openi_with_chen),
    "iu_x_ray": (make_openi, make_kaggle, openi_with_chen, chen_by_another_name),
}


@pytest.mark.parametrize(
    "task, make", [(task, make) for task, makes in OWN.items() for make in makes]
)
def test_a_task_with_a_name_is_made_of_its_own_form_or_chens(tmp_path, task, make):
    assert read_source(Path(make(tmp_path / "raw")), task=task).studies


def test_texts_behind_a_link_are_a_layout(tmp_path):
    texts_with_images(tmp_path / "disk")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "train").symlink_to(tmp_path / "disk")
    assert len(read_source(tmp_path / "raw").studies) == 4


def test_listed_studies_with_images_elsewhere(tmp_path):
    made = openi_with_chen(tmp_path / "raw")
    (made / "images").rename(tmp_path / "originals")
    raw = read_source(made / "annotation.json", originals=tmp_path / "originals")
    assert len(raw.studies) == 14 and not raw.problems


def test_an_export_of_an_archive_becomes_a_task(tmp_path):
    "DICOM files without a suffix, a DICOMDIR beside, a report a folder."
    for i in range(3):
        place = tmp_path / "raw" / f"PAT{i}"
        place.mkdir(parents=True)
        dicom(place / "IM000001", picture(np.random.default_rng(i), size=(60, 60)))
        (place / "report.txt").write_text(f"Report {i}.")
    (tmp_path / "raw" / "DICOMDIR").write_bytes(bytes(128) + b"DICM" + bytes(40))
    task = new_task(tmp_path / "made")
    kept = build(read_source(tmp_path / "raw"), task)
    paths = sorted(s.image_path for v in kept.values() for s in v)
    assert paths == [(f"PAT{i}/IM000001",) for i in range(3)]
    assert verify(task)["images"] == 3


# splits, and what is left


def test_skipping_everything_is_an_error(tmp_path):
    source = table(tmp_path / "raw", 4)
    for path in source.parent.glob("*.png"):
        path.write_bytes(b"")
    task = new_task(tmp_path / "made", on_problem="skip")
    with pytest.raises(DataError, match="no study is left(.|\n)*empty file(.|\n)*problems.csv"):
        build(read_source(source), task)
    assert not task.annotation_path.exists()


def test_a_source_without_a_study_is_an_error(tmp_path):
    "Even where nothing is wrong with it: these reports have no findings."
    made = make_kaggle(tmp_path / "raw")
    reports = pd.read_csv(made / "indiana_reports.csv")
    reports.assign(findings="").to_csv(made / "indiana_reports.csv", index=False)
    with pytest.raises(DataError, match="no study is left"):
        build(read_source(made), new_task(tmp_path / "made"))


def test_a_task_as_it_stands_that_is_skipped_whole_is_an_error(tmp_path):
    made = openi_with_chen(tmp_path)
    shutil.rmtree(made / "images")
    (made / "images").mkdir()
    with pytest.raises(DataError, match="no study is left"):
        prepare(new_task(made, on_problem="skip"))


def without_test(folder):
    "Write captions as COCO gives them to the public, without a test split."
    for number, split in enumerate(("train2017", "val2017")):
        made = table(folder / split, 40, seed=number)
        made.unlink()
        images = [dict(id=1000 * number + i, file_name=f"{i}.png") for i in range(40)]
        captions = [dict(id=i["id"], image_id=i["id"], caption="A picture.") for i in images]
        listed = json.dumps(dict(images=images, annotations=captions))
        (folder / f"captions_{split}.json").write_text(listed)
    return folder


def main_words(tmp_path, *more):
    return sized("--task", f"{tmp_path}/made/", "--source", tmp_path / "raw", *more)


def test_a_missing_split_is_told_with_the_option_that_draws_one(tmp_path, capsys):
    without_test(tmp_path / "raw")
    main(main_words(tmp_path))
    said = capsys.readouterr().out
    assert "no studies for test" in said
    assert "--split drawn" in said


def test_training_and_testing_name_the_option_too(tmp_path):
    from cvt2distilgpt2.results import task_protocol
    from cvt2distilgpt2.train import training_studies

    without_test(tmp_path / "raw")
    task = new_task(tmp_path / "made")
    kept = build(read_source(tmp_path / "raw"), task)
    with pytest.raises(ValueError, match="no test studies.*--split drawn"):
        task_protocol(task, kept)
    listed = json.loads(task.annotation_path.read_text())
    task.annotation_path.write_text(json.dumps({**listed, "val": []}))
    with pytest.raises(ValueError, match="no studies for val.*--split drawn"):
        training_studies(task)


def test_a_drawn_split_has_all_three(tmp_path, capsys):
    without_test(tmp_path / "raw")
    main(main_words(tmp_path, "--split", "drawn"))
    assert "no studies for" not in capsys.readouterr().out
    assert all(read_annotation(tmp_path / "made" / "annotation.json").values())
    facts = json.loads((tmp_path / "made" / "prepared.json").read_text())
    assert facts["counts"]["split by this project (80/10/10, seed 0)"] == 80


def test_a_drawn_split_keeps_patients_together(tmp_path):
    studies = [
        dict(id=f"s{i}", report="Clear.", image_path=["a.png"], patient=f"p{i // 4}")
        for i in range(80)
    ]
    picture(np.random.default_rng(0)).save(tmp_path / "a.png")
    (tmp_path / "mine.json").write_text(json.dumps({"train": studies}))
    drawn = read_source(tmp_path / "mine.json", split="drawn").studies
    assert len({s.split for s in drawn}) == 3
    assert len({(s.patient, s.split) for s in drawn}) == 20
