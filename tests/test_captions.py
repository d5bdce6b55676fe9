"Captions, tables and folders: the same studies in every form, and what broken input gets."

import csv
import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian, generate_uid

from cvt2distilgpt2.captions import (
    drawn_split,
    folder_files,
    is_image_file,
    read_captions,
    read_folder,
    read_listed,
    read_table,
)
from cvt2distilgpt2.images import open_image
from cvt2distilgpt2.tasks import SPLITS, DataError, by_split, read_annotation, write_annotation

N = 12  # studies of the good inputs


def image(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 20), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def state(root: Path) -> dict:
    "All files and folders with what is in them."
    return {
        str(p.relative_to(root)).encode("utf-8", "surrogateescape"): (
            p.lstat().st_mtime_ns,
            p.is_file() and hashlib.sha256(p.read_bytes()).digest(),
        )
        for p in sorted(root.rglob("*"))
    }


def write_rows(path: Path, rows: list[list], delimiter: str = ",", encoding: str = "utf-8") -> Path:
    with open(path, "w", encoding=encoding, newline="") as f:
        csv.writer(f, delimiter=delimiter).writerows(rows)
    return path


# good inputs, one of each reader


def good_captions(root: Path) -> dict:
    "Write a COCO-style file and return its content, to be changed."
    images = [dict(id=i, file_name=f"{i}.png") for i in range(N)]
    captions = [
        dict(id=10 * i + k, image_id=i, caption=f'Caption {k} of picture {i}, "größer".')
        for i in range(N)
        for k in range(2 + i % 4)
    ]
    for i in range(N):
        image(root / "pictures" / f"{i}.png", i)
    image(root / "0.png")  # outside, to be led to
    return dict(info={}, images=images, annotations=captions)


def good_table(root: Path) -> list[list]:
    rows = [["id", "image", "report", "split", "patient", "view"]]
    for i in range(N):
        for k in range(2):
            image(root / "pictures" / f"{i}" / f"{k}.png", i)
        images = f"pictures/{i}/0.png;pictures/{i}/1.png"
        text = f'Line 1 of "{i}",\nline 2: größer.'
        rows.append([f"s{i}", images, text, SPLITS[i % 3], f"p{i}", "PA;LATERAL"])
    return rows


def good_folder(root: Path) -> None:
    for i in range(N):
        place = root / "in" / SPLITS[i % 3]
        if i % 2:
            image(place / f"s{i}.png", i)
            (place / f"s{i}.txt").write_text(f"Report {i}, größer.\n", encoding="utf-8")
        else:
            for name in ("a.png", "b.jpg"):
                image(place / f"s{i}" / name, i)
            (place / f"s{i}" / "report.txt").write_text(f"Report {i}.", encoding="utf-8")


# mutations: each changes a good input in one place; what they return is the ids of the studies
# they touch and what must become of these: "listed" (as problems), "read", "listed by line" (where
# the id is not known), "counted" (left out, in `counts`), "refused" (the whole file)


def entry(change, outcome="listed"):
    def mutate(root, raw, rng):
        i = int(rng.integers(N))
        change(raw["images"][i], raw)
        return {str(i)}, outcome

    return mutate


def caption(change, outcome="listed"):
    def mutate(root, raw, rng):
        k = int(rng.integers(len(raw["annotations"])))
        i = raw["annotations"][k]["image_id"]
        change(raw["annotations"], k)
        return {str(i)}, outcome

    return mutate


def on_disk(change, outcome="listed"):
    def mutate(root, raw, rng):
        i = int(rng.integers(N))
        change(root / "pictures" / f"{i}.png")
        return {str(i)}, outcome

    return mutate


def whole(change, outcome="refused", touched=()):
    def mutate(root, raw, rng):
        change(raw)
        return set(touched), outcome

    return mutate


def without_captions(image, raw):
    raw["annotations"] = [c for c in raw["annotations"] if c["image_id"] != image["id"]]


def without_entries(raw):
    raw["images"].clear()
    raw["annotations"].clear()


def into_folder(path):
    path.unlink()
    path.mkdir()


def into_link(path, target="nowhere"):
    path.unlink()
    path.symlink_to(target)


CAPTIONS = {
    "image gone": on_disk(Path.unlink),
    "image is a folder": on_disk(into_folder),
    "image is a broken link": on_disk(into_link),
    "image is empty": on_disk(lambda p: p.write_bytes(b""), "read"),  # pixels are looked at later
    **{
        f"file name {v!r:.30}": entry(lambda e, _, v=v: e.update(file_name=v))
        for v in (
            "",
            " ",
            "/etc/hostname",
            "../0.png",
            "a/../../0.png",
            "C:\\0.png",
            "..\\0.png",
            "a\0b",
            "\ud800.png",
            "x" * 5000,
            None,
            7,
            ["0.png"],
            ".",
            "0.png/0.png",
        )
    },
    "backslash": entry(lambda e, _: e.update(file_name=".\\" + e["file_name"]), "read"),
    "no file name": entry(lambda e, _: e.pop("file_name")),
    **{
        f"image id {v!r}": entry(lambda e, _, v=v: e.update(id=v))
        for v in (None, True, 1.5, [1], {}, "", "new")
    },
    "image id as text": entry(lambda e, _: e.update(id=str(e["id"])), "read"),
    "doubled image id": entry(lambda e, raw: raw["images"].append(dict(e, file_name="0.png"))),
    "no captions": entry(without_captions, "counted"),
    "image entry is a text": whole(
        lambda raw: raw["images"].__setitem__(3, "3.png"), "listed", {"3"}
    ),
    **{
        f"caption {v!r:.20}": caption(lambda cs, k, v=v: cs[k].update(caption=v))
        for v in ("", " \n", None, 7, ["a"], {}, "half a \udfff character")
    },
    "no caption key": caption(lambda cs, k: cs[k].pop("caption")),
    "caption with outer space": caption(
        lambda cs, k: cs[k].update(caption=f"\n {cs[k]['caption']} \t"), "read"
    ),
    "caption of an unknown image": whole(
        lambda raw: raw["annotations"].append(dict(id=9999, image_id=777, caption="x")),
        "listed",
        {"777"},
    ),
    "caption of no image": whole(
        lambda raw: raw["annotations"].append(dict(id=9999, caption="x")), "listed", {"None"}
    ),
    "caption entry is null": whole(lambda raw: raw["annotations"].append(None), "listed"),
    "caption listed twice": whole(
        lambda raw: raw["annotations"].append(dict(raw["annotations"][0])), "listed", {"0"}
    ),
    "no image list": whole(lambda raw: raw.pop("images")),
    "images are an object": whole(lambda raw: raw.update(images={"a": 1})),
    "no entries": whole(without_entries),
    "captions are a text": whole(lambda raw: raw.update(annotations="all")),
}


def cell(column: int, change, outcome="listed"):
    def mutate(root, rows, rng):
        i = int(rng.integers(1, N + 1))
        name = rows[i][0]
        rows[i][column] = change(rows[i][column], root) if callable(change) else change
        return {name}, outcome

    return mutate


def row(change, outcome="listed"):
    def mutate(root, rows, rng):
        i = int(rng.integers(1, N + 1))
        touched = {rows[i][0]}
        change(rows, i)
        return touched, outcome

    return mutate


def two_rows(column: int):
    "Let a row say in one cell what the next one says."

    def mutate(root, rows, rng):
        i = int(rng.integers(1, N))
        touched = {rows[i][0], rows[i + 1][0]}
        rows[i][column] = rows[i + 1][column]
        return touched, "listed"

    return mutate


TABLES = {
    **{
        f"image {v!r:.30}": cell(1, v)
        for v in (
            "",
            " ",
            ";|;",
            "gone.png",
            "/etc/hostname",
            "../0.png",
            "C:/0.png",
            "a\0b",
            "x" * 5000,
            ".",
            "pictures",
            "pictures/0/0.png;pictures/0/0.png;",
        )
    },
    "one of two images": cell(1, lambda v, root: v.split(";")[0]),  # but two views
    "absolute, inside": cell(
        1, lambda v, root: ";".join(str(root / p) for p in v.split(";")), "read"
    ),
    "backslashes and bars": cell(
        1, lambda v, root: v.replace("/", "\\").replace(";", " | "), "read"
    ),
    **{f"text {v!r}": cell(2, v) for v in ("", " \n ")},
    "text with a NUL": cell(2, lambda v, root: v + "\0", "read"),
    "text of other alphabets": cell(2, "心臓 ♥ 𝔛-ray \u2028 line", "read"),
    "text with quotes": cell(2, '"" , "x', "read"),
    **{f"split {v!r}": cell(3, v) for v in ("", "nonsense", "train,val")},
    **{f"split {v!r}": cell(3, v, "read") for v in ("Training", " VALIDATE ", "test")},
    "patient on both sides": two_rows(4),
    "same id, other study": two_rows(0),
    "id blank": row(lambda rows, i: rows[i].__setitem__(0, " "), "listed by line"),
    "row twice": row(lambda rows, i: rows.append(list(rows[i])), "read"),
    "same images, other text": row(
        lambda rows, i: rows.append(rows[i][:2] + ["Another reference."] + rows[i][3:]), "read"
    ),
    "same id, other split": row(
        lambda rows, i: rows.append(
            rows[i][:3] + [SPLITS[SPLITS.index(rows[i][3]) - 1]] + rows[i][4:]
        )
    ),
    "a cell too many": row(lambda rows, i: rows[i].append("x"), "listed by line"),
    "a cell too few": row(lambda rows, i: rows[i].pop(), "listed by line"),
    "blank line": row(lambda rows, i: rows.insert(i, []), "read"),
    "empty row": row(lambda rows, i: rows.__setitem__(i, [""] * 6), "listed by line"),
    "one view": cell(5, "PA"),
    "views unknown": cell(5, "oblique;?", "read"),
    "view blank": cell(5, "", "read"),
    "no text column": whole(lambda rows: rows[0].__setitem__(2, "words")),
    "no image column": whole(lambda rows: rows[0].__setitem__(1, "x-ray")),
    "two ids": whole(lambda rows: rows[0].__setitem__(4, "id")),
    "header only": whole(lambda rows: rows.__delitem__(slice(1, None))),
    "a very long text": cell(2, "x " * 100_000, "read"),
}


def study_file(change, outcome="listed", other=False):
    def mutate(root, _, rng):
        texts = sorted((root / "in").rglob("*.txt"))
        text = texts[int(rng.integers(N))]
        alone = text.stem != "report"
        images = [p for p in sorted(text.parent.iterdir()) if p.suffix in (".png", ".jpg")]
        own = [p for p in images if not alone or p.stem == text.stem]
        change(own[0] if other else text)
        study = text.with_suffix("") if alone else text.parent
        return {study.relative_to(root / "in").as_posix()}, outcome

    return mutate


def beside(change, outcome="read", touched=()):
    def mutate(root, _, rng):
        change(root / "in")
        return set(touched), outcome

    return mutate


def without_images(text):
    for p in text.parent.iterdir():
        if p.suffix != ".txt" and (text.stem == "report" or p.stem == text.stem):
            p.unlink()


def with_outer_study(folder):
    image(folder / "more" / "a.png")
    (folder / "more" / "a.txt").write_text("x")


def with_odd_name(folder):
    image(Path(os.fsdecode(bytes(folder / "train") + b"/\xff.png")))
    Path(os.fsdecode(bytes(folder / "train") + b"/\xff.txt")).write_text("x")


def with_other_files(folder):
    for name in ("Thumbs.db", ".DS_Store", ".hidden.txt", "notes.csv"):
        (folder / "train" / name).write_text("x")


def emptied(folder):
    shutil.rmtree(folder)
    folder.mkdir()


FOLDERS = {
    "text gone": study_file(Path.unlink),
    "text empty": study_file(lambda p: p.write_bytes(b"")),
    "text blank": study_file(lambda p: p.write_text(" \n\t")),
    "text in Latin-1": study_file(lambda p: p.write_bytes("größer".encode("latin-1"))),
    "text in UTF-16": study_file(lambda p: p.write_text("größer", encoding="utf-16")),
    "text with a BOM": study_file(
        lambda p: p.write_text(p.read_text(encoding="utf-8"), encoding="utf-8-sig"), "read"
    ),
    "text cut in a character": study_file(lambda p: p.write_bytes("größ".encode()[:-1])),
    "text is a folder": study_file(into_folder),
    "text is a broken link": study_file(into_link),
    "text links to itself": study_file(lambda p: into_link(p, p.name)),
    "images gone": study_file(without_images),
    "image is a broken link": study_file(into_link, other=True),
    "image is empty": study_file(lambda p: p.write_bytes(b""), "read", other=True),
    "suffix in capitals": study_file(lambda p: p.rename(p.with_suffix(".TXT")), "read"),
    "one image more": beside(lambda f: image(f / "train" / "alone.png"), "listed"),
    "one text more": beside(lambda f: (f / "test" / "alone.txt").write_text("x"), "listed"),
    "two texts for all images": beside(
        lambda f: (f / "train" / "s0" / "more.txt").write_text("x"), "listed", ["train/s0"]
    ),
    "study outside of the splits": beside(with_outer_study, "listed"),
    "image at the top": beside(lambda f: image(f / "a.png"), "listed"),
    "readme at the top": beside(lambda f: (f / "readme.txt").write_text("x"), "listed"),
    "link to a folder": beside(
        lambda f: (f / "linked").symlink_to(f / "train", target_is_directory=True)
    ),
    "link to itself": beside(
        lambda f: (f / "train" / "loop").symlink_to(f, target_is_directory=True)
    ),
    "name not UTF-8": beside(with_odd_name, "listed"),
    "other files": beside(with_other_files),
    "empty sub-folder": beside(lambda f: (f / "train" / "later").mkdir()),
    "hidden sub-folder": beside(lambda f: image(f / ".cache" / "a.png")),
    "everything gone": beside(shutil.rmtree, "refused"),
    "nothing there": beside(emptied, "refused"),
    "annotation cut short": beside(
        lambda f: (f / "annotation.json").write_text('{"train": [{"id"'), "refused"
    ),
}


def bytes_of(path: Path, kind: str, rng) -> str:
    "Damage a file as a whole; returns what must become of it."
    raw = path.read_bytes()
    where = int(rng.integers(1, len(raw) - 2))
    damaged = {
        "cut": raw[:where],
        "not UTF-8": raw[:where] + b"\xff" + raw[where:],
        "BOM": b"\xef\xbb\xbf" + raw,
        "UTF-16": raw.decode().encode("utf-16"),
        "empty": b"",
        "NULs": bytes(200),
        "CRLF": raw.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"),
        "noise": rng.bytes(500),
    }[kind]
    path.write_bytes(damaged)
    if kind in ("BOM", "CRLF"):
        return "read"
    return "refused" if kind in ("empty", "NULs", "UTF-16", "noise") else "anything"


BYTES = ("cut", "not UTF-8", "BOM", "UTF-16", "empty", "NULs", "CRLF", "noise")


def write_captions(root, raw):
    (root / "captions.json").write_text(json.dumps(raw), encoding="utf-8")
    return root / "captions.json"


READERS = {  # good input, mutations, how it is written, how it is read
    "captions": (
        good_captions,
        CAPTIONS,
        write_captions,
        lambda root: read_captions(root / "captions.json", root / "pictures"),
    ),
    "table": (
        good_table,
        TABLES,
        lambda root, rows: write_rows(root / "table.csv", rows),
        lambda root: read_table(root / "table.csv"),
    ),
    "folder": (good_folder, FOLDERS, lambda root, _: None, lambda root: read_folder(root / "in")),
}


def judge(root: Path, read, before: dict, touched: set, outcome: str) -> None:
    "What every input must get: a right read or a listed problem, nothing dropped, nothing changed."
    untouched = state(root)
    try:
        found = read(root)
    except DataError as e:
        assert outcome in ("refused", "anything"), str(e)
        problems, kept, counts = e.problems, {}, {}
        assert problems
    else:
        assert outcome != "refused", found.problems
        problems, kept, counts = found.problems, {s.id: s for s in found.studies}, found.counts
        assert len(kept) == len(found.studies)
        assert all((found.folder / p).is_file() for s in kept.values() for p in s.image_path)
    assert state(root) == untouched
    for p in problems:
        assert p.what.strip() and p.mend.strip() and (p.id or p.path)
        json.dumps([p.id, p.path, p.what, p.mend], ensure_ascii=False).encode("utf-8")
    told = {p.id for p in problems}
    same = {name for name, study in before.items() if kept.get(name) == study}
    if outcome in ("refused", "anything"):
        return
    # no other study is hurt
    assert before.keys() - touched - told <= same
    assert before.keys() <= same | touched | told
    match outcome:
        case "read":
            assert not problems
            assert before.keys() == kept.keys()
            assert before.keys() - touched <= same
        case "counted":
            assert not problems
            assert not touched & kept.keys()
            assert counts["images without captions (left out)"] == len(touched)
        case "listed":
            assert problems
            assert not touched or touched & told or not touched <= same
        case "listed by line":
            assert problems
            assert all(p.path.rsplit(":", 1)[1].isdigit() for p in problems)
            assert not touched & kept.keys()


def mutated(reader: str, name: str, seed: int, root: Path):
    good, mutations, write, read = READERS[reader]
    rng = np.random.default_rng(seed)
    raw = good(root)
    path = write(root, raw)
    before = {s.id: s for s in read(root).studies}
    assert len(before) == N
    if name in mutations:
        touched, outcome = mutations[name](root, raw, rng)
        if reader != "folder":
            write(root, raw)
    else:
        touched, outcome = set(), bytes_of(path, name, rng)
    judge(root, read, before, touched, outcome)


CASES = [
    (reader, name)
    for reader, (_, mutations, *_) in READERS.items()
    for name in (*mutations, *(BYTES if reader != "folder" else ()))
]


@pytest.mark.timeout(30)
@pytest.mark.parametrize("reader, name", CASES, ids=lambda v: ascii(v)[1:-1][:40])
def test_every_mutation_is_listed_or_read(reader, name, tmp_path):
    mutated(reader, name, 0, tmp_path)


# the same studies in every form


def table_forms(rows: list[list]) -> dict:
    "The good table in other words: (rows, options of the writer, options of the reader)."
    header, *body = rows
    numbered = ["ID", "Path_1", "path2", "text", "split", "subject_id", "view_1", "view_2"]
    other = ["conclusion", "fold", "pictures", "no", "who", "position", "age"]
    roles = dict(
        text="Conclusion", split="fold", image="pictures", id="no", patient="who", view="position"
    )
    second = ["study", "file_name", "findings", "split", "subject", "views", "impression"]
    images = [
        [r[0], p, *r[2:5], v]
        for r in body
        for p, v in zip(r[1].split(";"), r[5].split(";"), strict=True)
    ]
    return {
        "tabs": (rows, dict(delimiter="\t"), {}),
        "semicolons": (rows, dict(delimiter=";"), {}),
        "BOM": (rows, dict(encoding="utf-8-sig"), {}),
        "bars": ([header] + [[r[0], r[1].replace(";", "|"), *r[2:]] for r in body], {}, {}),
        "numbered columns": (
            [numbered] + [[r[0], *r[1].split(";"), *r[2:5], *r[5].split(";")] for r in body],
            {},
            {},
        ),
        "a row an image": ([header] + images, {}, {}),
        "other columns in another order": (
            [other] + [[r[2], r[3], r[1], r[0], r[4], r[5], "60"] for r in body],
            {},
            dict(columns=roles),
        ),
        "names that come second": ([second] + [r + ["Normal."] for r in body], {}, {}),
    }


@pytest.mark.parametrize("form", table_forms([["x"]]))
def test_one_table_in_many_forms(form, tmp_path):
    rows = good_table(tmp_path)
    expected = read_table(write_rows(tmp_path / "good.csv", rows))
    assert not expected.problems
    assert len(expected.studies) == N
    study = expected.studies[4]
    assert study.views == ("frontal", "lateral")
    assert study.report == 'Line 1 of "4",\nline 2: größer.'
    assert study.patient == "p4"
    rows, write, options = table_forms(rows)[form]
    found = read_table(write_rows(tmp_path / "other.csv", rows, **write), **options)
    assert not found.problems and found.studies == expected.studies


def test_a_table_elsewhere_names_its_images_folder(tmp_path):
    rows = good_table(tmp_path)
    expected = read_table(write_rows(tmp_path / "good.csv", rows)).studies
    (tmp_path / "lists").mkdir()
    path = write_rows(tmp_path / "lists" / "good.csv", rows)
    assert read_table(path, images=tmp_path).studies == expected
    assert len(read_table(path).problems) == 2 * N  # counted from its own folder, all are missing


def test_columns_that_are_missing_are_named(tmp_path):
    path = write_rows(tmp_path / "t.csv", [["scan", "words"], ["a.png", "x"]])
    known = "'scan', 'words'.*image or images or .*report or text or caption"
    with pytest.raises(DataError, match=known):
        read_table(path)
    with pytest.raises(DataError, match="'scan', 'words'.*split: fold"):
        read_table(path, columns=dict(image="scan", text="words", split="fold"))
    roles = "unknown role 'img'; known: image, text, id, split, patient, view"
    with pytest.raises(ValueError, match=roles):
        read_table(path, columns={"img": "scan"})
    for broken in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(DataError, match="cannot be read"):
            read_table(broken)
    with pytest.raises(DataError, match="no such folder"):
        read_table(path, images=tmp_path / "none")
    with pytest.raises(DataError, match="no such folder"):
        read_folder(tmp_path / "none")
    with pytest.raises(DataError, match="no such folder"):
        read_captions(path, tmp_path / "none")


def test_the_line_of_a_problem_is_where_its_row_begins(tmp_path):
    for i in range(4):
        image(tmp_path / f"{i}.png")
    text = 'image,text\n0.png,"two\nlines"\n\n1.png,\n2.png,b,c\n3.png,"open'
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(DataError, match=r"t.csv:7: the row that begins here"):
        read_table(tmp_path / "t.csv")
    (tmp_path / "t.csv").write_text(text + '"')
    assert [p.path.rsplit(":")[-1] for p in read_table(tmp_path / "t.csv").problems] == ["6", "5"]


# splits


def test_folders_of_images_are_the_split_of_a_table_above_them(tmp_path):
    rows = [["file_name", "text"]]
    for split in ("train", "validation", "test"):
        image(tmp_path / split / "0.png")
        rows.append([f"{split}/0.png", f"Of {split}."])
    found = read_table(write_rows(tmp_path / "metadata.csv", rows))
    assert {s.id: s.split for s in found.studies} == {
        "train/0.png": "train",
        "validation/0.png": "val",
        "test/0.png": "test",
    }
    found = read_table(write_rows(tmp_path / "metadata.csv", rows[:2]))
    assert "split by this project (80/10/10, seed 0)" in found.counts  # one folder tells no split


def test_a_drawn_split_stays_when_rows_are_added(tmp_path):
    rows = [["image", "text", "patient"]] + [
        [image(tmp_path / f"{i}.png").name, f"Text {i}.", f"p{i // 2}"] for i in range(60)
    ]

    def read(rows, **more):
        path = write_rows(tmp_path / "t.csv", rows)
        return {s.id: s for s in read_table(path, **more).studies}

    every = read(rows)
    assert {s.split for s in every.values()} == set(SPLITS)
    assert all(every[f"{i}.png"].split == every[f"{i + 1}.png"].split for i in range(0, 60, 2))
    assert read(rows[:1] + rows[:0:-2]).items() <= every.items()  # every second row, from the end
    other = read(rows, seed=1)
    assert {i: s.split for i, s in other.items()} != {i: s.split for i, s in every.items()}
    assert read_table(tmp_path / "t.csv").counts["split by this project (80/10/10, seed 0)"] == 60


def test_a_drawn_split_is_the_same_on_every_machine():
    expected = "val val train train val train train train train train test train"
    assert [drawn_split(f"p{i}") for i in range(12)] == expected.split()
    shares = np.mean(
        [[drawn_split(f"p{i}", 3) == s for s in SPLITS] for i in range(20_000)], axis=0
    )
    np.testing.assert_allclose(shares, (0.8, 0.1, 0.1), atol=0.01)


# COCO's files


def test_coco_in_its_own_layout(tmp_path):
    "Two files, images in a sub-folder for each; and the same as one of Karpathy's files."
    raw = good_captions(tmp_path)
    for name, part in dict(train2017=range(8), val2017=range(8, N)).items():
        for i in part:
            image(tmp_path / "coco" / name / f"{i}.png", i)
        write = dict(
            raw,
            images=[e for e in raw["images"] if e["id"] in part],
            annotations=[c for c in raw["annotations"] if c["image_id"] in part],
        )
        (tmp_path / f"captions_{name}.json").write_text(json.dumps(write))
    found = read_captions(
        [tmp_path / f"captions_{n}2017.json" for n in ("train", "val")], tmp_path / "coco"
    )
    assert not found.problems
    sizes = {k: len(v) for k, v in by_split(found.studies).items()}
    assert sizes == dict(train=8, val=4, test=0)
    assert found.studies[9].image_path == ("val2017/9.png",)
    assert found.studies[9].report == 'Caption 0 of picture 9, "größer".'
    assert [len(s.reports) for s in found.studies] == [2 + i % 4 for i in range(N)]
    assert found.counts["captions"] == len(raw["annotations"])
    entries = [
        dict(
            filepath=s.image_path[0].split("/")[0],
            filename=s.image_path[0].split("/")[1],
            cocoid=int(s.id),
            imgid=500,
            split="restval" if s.split == "train" else s.split,
            sentences=[dict(raw=r, tokens=r.split()) for r in s.reports],
        )
        for s in found.studies
    ]
    (tmp_path / "dataset_coco.json").write_text(json.dumps(dict(images=entries, dataset="coco")))
    assert read_captions(tmp_path / "dataset_coco.json", tmp_path / "coco").studies == found.studies
    entries[3]["split"] = "nonsense"
    (tmp_path / "dataset_coco.json").write_text(json.dumps(dict(images=entries, dataset="coco")))
    bad = read_captions(tmp_path / "dataset_coco.json", tmp_path / "coco")
    assert [(p.id, p.what) for p in bad.problems] == [("3", "unknown split 'nonsense'")]
    assert bad.studies == found.studies[:3] + found.studies[4:]


def test_what_was_read_can_be_written_and_read_again(tmp_path):
    write_captions(tmp_path, good_captions(tmp_path))
    found = read_captions(tmp_path / "captions.json", tmp_path / "pictures")
    again = read_annotation(write_annotation(found.studies, tmp_path / "annotation.json"))
    studies = [s for part in again.values() for s in part]
    assert sorted(studies, key=lambda s: int(s.id)) == found.studies
    assert again["train"][0].reports[1].startswith("Caption 1 of picture")


def test_one_bad_file_of_several(tmp_path):
    write_captions(tmp_path, good_captions(tmp_path)).rename(tmp_path / "train.json")
    (tmp_path / "val.json").write_text("{")
    images = [dict(id="x", file_name="1.png")]
    captions = [dict(image_id="x", caption="A.")]
    write_captions(tmp_path, dict(images=images, annotations=captions)).rename(
        tmp_path / "more.json"
    )
    found = read_captions(sorted(tmp_path.glob("*.json")), tmp_path / "pictures")
    assert len(found.studies) == N
    assert [Path(p.path).name for p in found.problems] == ["more.json", "val.json"]
    with pytest.raises(DataError, match="not valid JSON"):
        read_captions(tmp_path / "val.json", tmp_path / "pictures")


@pytest.mark.full
@pytest.mark.timeout(300)
def test_the_size_of_coco(tmp_path):
    first = image(tmp_path / "images" / "0.png")
    for i in range(1, 118_287):
        path = tmp_path / "images" / f"{i}.png"
        if i % 60_000:
            os.link(first, path)
        else:  # a file has room for 65,000 links
            first = image(path)
    images = [dict(id=i, file_name=f"{i}.png") for i in range(118_287)]
    captions = [dict(id=i, image_id=i % 118_287, caption=f"Caption {i}.") for i in range(591_753)]
    write_captions(tmp_path, dict(images=images, annotations=captions))
    found = read_captions(tmp_path / "captions.json", tmp_path / "images")
    assert not found.problems
    assert len(found.studies) == 118_287
    assert found.counts["captions"] == 591_753


@pytest.mark.parametrize("place", ["", "train"])
def test_a_readme_beside_many_images_is_no_report(place, tmp_path):
    for name in "ab":
        image(tmp_path / place / f"{name}.png")
    (tmp_path / place / "readme.txt").write_text("How these were made.")
    with pytest.raises(DataError, match=r"(?s)3 problems.*without a partner") as e:
        read_folder(tmp_path)
    assert {Path(p.path).name for p in e.value.problems} == {"a.png", "b.png", "readme.txt"}


# folders as archives and disks leave them


def test_folders_behind_links_are_read(tmp_path):
    image(tmp_path / "disk" / "s" / "a.png")
    (tmp_path / "disk" / "s" / "report.txt").write_text("Clear.")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "train").symlink_to(tmp_path / "disk")
    studies = read_folder(tmp_path / "in").studies
    assert [(s.id, s.split, s.image_path) for s in studies] == [
        ("train/s", "train", ("train/s/a.png",))
    ]


def test_links_that_lead_back_end(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "self").symlink_to(tmp_path / "a")
    assert [p for p, _ in folder_files(tmp_path)] == [
        tmp_path,
        tmp_path / "a",
        tmp_path / "a" / "b",
    ]


def test_a_folder_is_met_by_its_own_name_before_its_links(tmp_path):
    (tmp_path / "z").mkdir()
    (tmp_path / "a").symlink_to(tmp_path / "z")
    assert [p.name for p, _ in folder_files(tmp_path)][1:] == ["z"]


def test_dicom_files_without_a_suffix_are_images(tmp_path):
    names = ("IM000001", "1.2.840.113619.2.55", "old.ima", "DICOMDIR", "VERSION", "empty")
    for name in names[:4]:
        (tmp_path / name).write_bytes(bytes(128) + b"DICM" + bytes(40))
    (tmp_path / "VERSION").write_text("1.0 " * 50)
    (tmp_path / "empty").touch()
    assert [n for n in names if is_image_file(tmp_path / n)] == list(names[:3])


def test_texts_beside_dicom_files_without_a_suffix(tmp_path):
    for name in ("1.2.840.1", "1.2.840.2"):
        (tmp_path / name).write_bytes(bytes(128) + b"DICM" + bytes(40))
        (tmp_path / f"{name}.txt").write_text(f"Report of {name}.")
    (tmp_path / "DICOMDIR").write_bytes(bytes(128) + b"DICM" + bytes(40))
    raw = read_folder(tmp_path)
    assert {s.id: s.image_path for s in raw.studies} == {
        "1.2.840.1": ("1.2.840.1",),
        "1.2.840.2": ("1.2.840.2",),
    }
    assert not raw.problems and raw.counts["other files (left out)"] == 1


# Chen et al.'s form


def listed_study(id: str) -> dict:
    return dict(id=id, report="Clear.", image_path=[f"{id}.png"])


@pytest.mark.parametrize("folder", ["", "images", "elsewhere"])
def test_a_listed_file_of_any_name_and_some_splits(tmp_path, folder):
    image(tmp_path / folder / "a.png")
    (tmp_path / "mine.json").write_text(json.dumps({"val": [listed_study("a")]}))
    images = tmp_path / folder if folder == "elsewhere" else None
    raw = read_listed(tmp_path / "mine.json", images)
    assert not raw.problems
    assert [(s.id, s.split) for s in raw.studies] == [("a", "val")]
    assert raw.folder == tmp_path / folder


# real studies


@pytest.fixture
def pairs(test_data) -> tuple[Path, list]:
    folder = test_data / "cxr_pairs"
    studies = [s for part in read_annotation(folder / "annotation.json").values() for s in part]
    assert len(studies) == 70
    return folder, studies


def test_real_studies_as_they_are(pairs):
    folder, studies = pairs
    found = read_folder(folder)
    assert not found.problems
    assert found.studies == studies
    assert found.folder == folder / "images"
    assert found.counts == {"entries": 70}


def test_real_studies_as_a_plain_folder(pairs, tmp_path):
    folder, studies = pairs
    for s in studies:
        place = tmp_path / s.split / s.id
        place.mkdir(parents=True)
        for p in s.image_path:
            os.symlink(folder / "images" / p, place / Path(p).name)
        (place / "report.txt").write_text(s.report + "\n", encoding="utf-8")
    found = read_folder(tmp_path)
    assert not found.problems and len(found.studies) == 70 and found.counts["images"] == 83
    again = {s.id.split("/")[1]: s for s in found.studies}
    for s in studies:
        assert (again[s.id].report, again[s.id].split) == (s.report.strip(), s.split)
        originals = [(folder / "images" / p).resolve() for p in s.image_path]
        assert [(tmp_path / p).resolve() for p in again[s.id].image_path] == originals


@pytest.mark.parametrize("rows", ["a study", "an image"])
def test_real_studies_as_a_table(rows, pairs, tmp_path):
    folder, studies = pairs
    table = [["id", "image", "report", "split"]]
    for s in studies:
        cells = [";".join(s.image_path)] if rows == "a study" else s.image_path
        table += [[s.id, cell, s.report, s.split] for cell in cells]
    found = read_table(write_rows(tmp_path / "t.csv", table), images=folder / "images")
    assert not found.problems
    assert found.studies == [replace(s, report=s.report.strip()) for s in studies]


def dicom(path: Path, picture: Image.Image, inverted: bool, view: str) -> None:
    "Write a picture as a DICOM file whose window shows its pixels as they are."
    pixels = np.asarray(picture)
    grey = picture.mode == "L"
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file = FileDataset(str(path), {}, file_meta=meta, preamble=bytes(128))
    file.SOPClassUID = meta.MediaStorageSOPClassUID
    file.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    file.ViewPosition = view
    file.Rows, file.Columns = pixels.shape[:2]
    file.BitsAllocated = 8
    file.BitsStored = 8
    file.HighBit = 7
    file.PixelRepresentation = 0
    if grey:
        file.SamplesPerPixel = 1
        file.PhotometricInterpretation = "MONOCHROME1" if inverted else "MONOCHROME2"
        file.WindowCenter, file.WindowWidth = 128, 256
    else:
        file.SamplesPerPixel = 3
        file.PhotometricInterpretation = "RGB"
        file.PlanarConfiguration = 0
    pixels = 255 - pixels if grey and inverted else pixels
    file.PixelData = pixels.tobytes() + bytes(pixels.size % 2)
    file.save_as(path, enforce_file_format=True)


@pytest.mark.parametrize("form", ["folder", "table"])
def test_real_studies_as_dicom(form, pairs, tmp_path):
    "Every second image is inverted; studies and pixels are the same, the header tells the views."
    folder, studies = pairs
    rows = [["id", "image", "report", "split"]]
    for i, s in enumerate(studies):
        place = tmp_path / s.split / s.id
        place.mkdir(parents=True)
        for k, p in enumerate(s.image_path):
            picture = open_image(folder / "images" / p)
            view = ("PA", "LL")[k % 2]
            dicom(place / f"{k}.dcm", picture, inverted=bool((i + k) % 2), view=view)
        (place / "report.txt").write_text(s.report, encoding="utf-8")
        paths = "|".join(f"{s.split}/{s.id}/{k}.dcm" for k in range(len(s.image_path)))
        rows.append([s.id, paths, s.report, s.split])
    before = state(tmp_path)
    if form == "folder":
        found = read_folder(tmp_path)
    else:
        found = read_table(write_rows(tmp_path.parent / "t.csv", rows), images=tmp_path)
    assert not found.problems
    assert state(tmp_path) == before
    again = {s.id.split("/")[-1]: s for s in found.studies}
    assert again.keys() == {s.id for s in studies}
    for s in studies:
        other = again[s.id]
        assert (other.report, other.split) == (s.report.strip(), s.split)
        assert other.views == tuple(("frontal", "lateral")[k % 2] for k in range(len(s.image_path)))
        for p, q in zip(s.image_path, other.image_path, strict=True):
            assert np.array_equal(open_image(folder / "images" / p), open_image(found.folder / q))


def test_views_of_damaged_dicom_are_unknown(tmp_path):
    for i, raw in enumerate((b"", bytes(200), b"x" * 128 + b"DICM" + b"\xff" * 50)):
        (tmp_path / f"{i}.dcm").write_bytes(raw)
        (tmp_path / f"{i}.txt").write_text("x")
    found = read_folder(tmp_path)
    assert not found.problems
    assert [s.views for s in found.studies] == [None, None, None]


@pytest.mark.full
@pytest.mark.parametrize("seed", range(1, 11))
def test_mutations_in_other_places(seed, tmp_path):
    for number, case in enumerate(CASES):
        mutated(*case, 1000 * seed + number, tmp_path / str(number))


@pytest.mark.full
@pytest.mark.parametrize("reader", ["captions", "table"])
@pytest.mark.parametrize("seed", range(5))
def test_random_bytes_never_crash(reader, seed, tmp_path):
    good, _, write, read = READERS[reader]
    path = write(tmp_path, good(tmp_path))
    rng = np.random.default_rng(seed)
    raw = path.read_bytes()
    for _ in range(200):
        damaged = bytearray(raw)
        for _ in range(rng.integers(1, 5)):
            damaged[rng.integers(len(raw))] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            found = read(tmp_path)
        except DataError:
            continue
        assert all((found.folder / p).is_file() for s in found.studies for p in s.image_path)
        for s in found.studies:
            (s.id + s.report).encode()
