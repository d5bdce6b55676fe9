"Open-i's IU X-Ray: the real reports, made-up trees sound and broken, a server that misbehaves."

import gzip
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import tarfile
import threading
import time
import zipfile
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from trees import make_kaggle, make_openi, openi_files, openi_xml, pack

from cvt2distilgpt2 import iu
from cvt2distilgpt2.data import Labels, clean_report
from cvt2distilgpt2.iu import IMAGES, REPORTS, deal, download_openi, read_iu
from cvt2distilgpt2.tasks import DataError, by_split, read_annotation, write_annotation


@pytest.fixture
def no_package(monkeypatch):
    "A machine without torchxrayvision."
    monkeypatch.setattr(iu, "find_spec", lambda name: None)


@pytest.fixture(scope="session")
def real(tmp_path_factory) -> Path:
    "The data folder of torchxrayvision: installed, or a wheel or folder that a variable names."
    given = os.environ.get("CVT2DISTILGPT2_TORCHXRAYVISION")
    found = iu.packaged(REPORTS)
    if not given and found:
        return found.parent
    if not given:
        pytest.skip(
            "torchxrayvision is not installed, "
            "and CVT2DISTILGPT2_TORCHXRAYVISION names no wheel or folder of it"
        )
    place = Path(given)
    if place.is_file():
        made = tmp_path_factory.mktemp("wheel")
        with zipfile.ZipFile(place) as wheel:
            wheel.extractall(
                made, [n for n in wheel.namelist() if "/data/" in n and "nlmcxr" in n.lower()]
            )
        place = made
    return next(place.rglob(f"data/{REPORTS}")).parent


@pytest.fixture
def real_package(real, monkeypatch):
    "The same, found as an installed package is."
    monkeypatch.syspath_prepend(str(real.parent.parent))
    return real


def snapshot(folder: Path) -> dict:
    "What lies in a folder, by its bytes."
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file()
    }


# the real reports


# & last: "&amp;lt;" stands for "&lt;"
ENTITIES = {"&lt;": "<", "&gt;": ">", "&quot;": '"', "&apos;": "'", "&amp;": "&"}


def by_regular_expression(data: Path) -> dict[str, tuple[str, list[str]]]:
    "Read findings and images of the archive without an XML parser, by number."
    found = {}
    with tarfile.open(data / REPORTS) as tar:
        for member in tar:
            if not member.isfile():
                continue
            xml = tar.extractfile(member).read().decode()
            section = r'<AbstractText Label="FINDINGS"(?:/>|>(.*?)</AbstractText>)'
            findings = re.search(section, xml, re.DOTALL)[1] or ""
            for entity, char in ENTITIES.items():
                findings = findings.replace(entity, char)
            images = re.findall(r'<parentImage id="(.*?)"', xml)
            found[f"CXR{Path(member.name).stem}"] = (findings, images)
    return found


def test_real_reports(real_package):
    raw, truth = read_iu(), by_regular_expression(real_package)
    assert raw.counts["reports"] == len(truth) == 3955
    assert not raw.problems
    assert "torchxrayvision" not in sys.modules
    selected = {uid for uid, (findings, images) in truth.items() if findings and len(images) > 1}
    assert {s.id for s in raw.studies} == selected and len(selected) == 2955
    assert all(s.report == truth[s.id][0] for s in raw.studies)
    assert all(
        sorted(s.image_path) == sorted(f"{i}.png" for i in truth[s.id][1]) for s in raw.studies
    )
    assert {k: len(v) for k, v in by_split(raw.studies).items()} == {
        "train": 2069,
        "val": 296,
        "test": 590,
    }
    assert Counter(len(s.image_path) for s in raw.studies) == {2: 2790, 3: 150, 4: 14, 5: 1}


def test_real_findings_of_every_report(real_package):
    problems = []
    reports = iu.read_reports(real_package / REPORTS, problems)
    truth = by_regular_expression(real_package)
    assert not problems
    assert {r.uid: (r.sections["findings"], list(r.images)) for r in reports} == truth


def test_real_views(real_package):
    first = Counter(" ".join(v or "?" for v in s.views[:2]) for s in read_iu().studies)
    assert first == {
        "frontal ?": 2022,
        "frontal lateral": 883,
        "? lateral": 45,
        "lateral lateral": 5,
    }


def test_real_labels(real_package, tmp_path):
    "A file in Chen's form, made of the real reports, gives labels as published."
    path = write_annotation(read_iu().studies, tmp_path / "annotation.json")
    studies = read_annotation(path)
    assert sum(map(len, studies.values())) == 2955
    train = [s.report for s in studies["train"]]
    labels = Labels(train, style="iu_x_ray", threshold=3, max_length=60)
    counts = Counter(w for r in train for w in clean_report(r, "iu_x_ray").split())
    frequent = {w for w, n in counts.items() if n >= 3}
    assert set(labels.vocabulary) == frequent | {"<unk>"}
    assert len(labels.vocabulary) == 734  # Chen's own split, which trains on others, gives 760
    for split in studies.values():
        for s in split:
            words = clean_report(s.report, "iu_x_ray").split()
            assert labels(s.report).split() == [w if w in frequent else "<unk>" for w in words][:59]


def test_real_reports_in_chens_form(real_package, tmp_path):
    "Chen's ids lead back to every report."
    raw = read_iu()
    names = {s.id: re.match(r"CXR[0-9]+(_1)?_IM-[0-9]+", s.image_path[0])[0] for s in raw.studies}
    splits = {
        k: [
            dict(
                id=names[s.id],
                report=s.report,
                image_path=[f"{names[s.id]}/{i}.png" for i in (0, 1)],
                split=k,
            )
            for s in v
        ]
        for k, v in by_split(raw.studies).items()
    }
    (tmp_path / "annotation.json").write_text(json.dumps(splits))
    again = read_iu(chen=tmp_path / "annotation.json")
    assert not again.problems
    assert {(s.patient, s.split, s.report, s.image_path) for s in again.studies} == {
        (s.id, s.split, s.report, s.image_path) for s in raw.studies
    }
    assert (
        again.counts["of these selected here too"]
        == again.counts["of these with the findings that Open-i has"]
        == 2955
    )
    assert again.counts["of these, unclear which two images Chen took"] == 165


# made-up trees


def test_packed_and_unpacked_are_the_same(tmp_path, no_package):
    packed = read_iu(make_openi(tmp_path / "a"))
    unpacked = read_iu(make_openi(tmp_path / "b", packed=False))
    assert packed.studies == unpacked.studies
    assert [s.id for s in packed.studies] == [f"CXR{i}" for i in (1, 2, 3, 6, 7, 9, 11)]
    pictures = openi_files()[1]
    for raw in (packed, unpacked):
        assert not raw.problems
        assert raw.counts["selected"] == 7
        assert raw.counts["without findings"] == 3
        assert all(
            (raw.folder / p).read_bytes() == pictures[p] for s in raw.studies for p in s.image_path
        )
    assert packed.studies[3].image_path == tuple(f"CXR6_IM-0006-0001-000{k}.png" for k in (1, 2, 3))
    assert packed.studies[0].views is None


@pytest.mark.parametrize("place", [".", "ecgen-radiology", "NLMCXR_png"])
def test_any_folder_of_the_tree(tmp_path, place, monkeypatch):
    "What the folder lacks comes from the package (reports), or is one problem (images)."
    root = make_openi(tmp_path / "tree", packed=False)
    data = tmp_path / "torchxrayvision" / "data"
    data.mkdir(parents=True)
    pack(data / REPORTS, openi_files()[0])
    monkeypatch.syspath_prepend(str(tmp_path))
    raw = read_iu(root / place)
    if place == "ecgen-radiology":
        assert not raw.studies
        assert [p.what for p in raw.problems] == [f"neither {IMAGES} nor NLMCXR_png/ with images"]
    else:
        assert len(raw.studies) == 7 and not raw.problems
    assert len(read_iu().studies) == 7  # no folder at all


def test_entities_are_read():
    report = iu.parse_report(
        openi_xml(1, [], findings="Nodule &lt; 5 mm &amp; stable, &#176;C.", impression=" Clear. ")
    )
    assert report.sections == {"findings": "Nodule < 5 mm & stable, °C.", "impression": "Clear."}
    assert report.images == ()


def test_nothing_there(tmp_path, no_package):
    for folder in (None, tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match="torchxrayvision|no such folder"):
            read_iu(folder)


def test_views_decide_the_order(tmp_path, monkeypatch):
    seen = {"CXR2_IM-0002-1001": "lateral", "CXR6_IM-0006-0001-0001": "frontal"}
    header = {
        "CXR2_IM-0002-2001": "frontal",
        "CXR6_IM-0006-0001-0002": "frontal",
        "CXR6_IM-0006-0001-0003": "lateral",
    }
    monkeypatch.setattr(iu, "read_views", lambda: (seen, header))
    studies = {s.id: s for s in read_iu(make_openi(tmp_path)).studies}
    assert studies["CXR2"].image_path == (
        "CXR2_IM-0002-2001.png",
        "CXR2_IM-0002-1001.png",
    )
    assert studies["CXR2"].views == ("frontal", "lateral")
    assert [p[-5] for p in studies["CXR6"].image_path] == ["1", "3", "2"]
    assert studies["CXR6"].views == ("frontal", "lateral", "frontal")
    assert studies["CXR1"].views == ("", "")


def test_split_stands_whatever_else_is_there():
    "The same numbers fall the same way in any order, and on any machine."
    uids = [f"CXR{i}" for i in range(1, 2956)]
    dealt = deal(random.Random(1).sample(uids, len(uids)))
    assert dealt == deal(uids)
    assert [u for u in uids[:12] if dealt[u] != "train"] == [
        "CXR2",
        "CXR3",
        "CXR4",
        "CXR5",
        "CXR8",
        "CXR12",
    ]
    assert [Counter(deal(uids[:n]).values())["train"] for n in (0, 1, 3, 8)] == [0, 1, 2, 6]


def test_a_missing_image_does_not_move_the_others(tmp_path):
    whole = read_iu(make_openi(tmp_path, n=60, packed=False))
    (whole.folder / whole.studies[0].image_path[0]).unlink()
    rest = read_iu(tmp_path)
    assert rest.studies == whole.studies[1:]
    assert [p.id for p in rest.problems] == [whole.studies[0].id]


# unpacking


def test_unpacked_once(tmp_path):
    raw = read_iu(make_openi(tmp_path))
    picture = raw.folder / raw.studies[0].image_path[0]
    before = picture.stat().st_mtime_ns
    picture.unlink()
    # not unpacked again without need: a user may have removed it
    assert len(read_iu(tmp_path).problems) == 1
    (raw.folder / iu.STAMP).write_text("being unpacked")
    assert not read_iu(tmp_path).problems and picture.stat().st_mtime_ns != before


def test_unpacked_by_someone_else_is_used_as_it_is(tmp_path):
    make_openi(tmp_path)
    make_openi(tmp_path, packed=False)
    before = snapshot(tmp_path)
    assert len(read_iu(tmp_path).studies) == 7 and snapshot(tmp_path) == before


def read_until_killed(root: Path, left: int) -> None:
    "Read a tree and kill this process when `left` more images are unpacked; never returns."
    replace = Path.replace

    def kill_at(self, target):
        nonlocal left
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return replace(self, target)

    Path.replace = kill_at
    try:
        read_iu(root)
    finally:
        os._exit(0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_while_unpacking(tmp_path):
    expected = {
        f"NLMCXR_png/{n}": hashlib.sha256(d).hexdigest() for n, d in openi_files(20)[1].items()
    }
    for at in (0, 1, 7, 30):
        root = make_openi(tmp_path / str(at), n=20)
        child = os.fork()
        if child == 0:
            read_until_killed(root, at)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        assert not read_iu(root).problems
        assert {k: v for k, v in snapshot(root).items() if k.endswith(".png")} == expected
        assert not list(root.rglob("*.part"))


def test_cut_archive_is_named_and_mended_by_a_whole_one(tmp_path):
    root = make_openi(tmp_path)
    whole = (root / IMAGES).read_bytes()
    (root / IMAGES).write_bytes(whole[: len(whole) // 2])
    raw = read_iu(root)
    assert "cut short" in raw.problems[0].what and 0 < len(raw.studies) < 7
    (root / IMAGES).write_bytes(whole)
    assert not read_iu(root).problems


def test_no_room(tmp_path, monkeypatch):
    root = make_openi(tmp_path)
    monkeypatch.setattr(iu.shutil, "disk_usage", lambda path: SimpleNamespace(free=1))
    with pytest.raises(DataError, match="needs 0.00 GB.*Make room"):
        read_iu(root)
    assert not (root / "NLMCXR_png").exists()


def link(name: str, to: str, kind=tarfile.SYMTYPE) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, to
    return entry


def test_nothing_leaves_the_folder(tmp_path):
    "Links, paths upwards and absolute ones in an archive are listed, never followed."
    root = make_openi(tmp_path / "in")
    _, pictures = openi_files()
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"secret")
    bad = {
        "../CXR90_IM-1-1.png": b"x",
        "/tmp/CXR91_IM-1-1.png": b"x",
        "CXR92_IM-1-1.png": link("CXR92_IM-1-1.png", str(secret)),
        "CXR93_IM-1-1.png": link("CXR93_IM-1-1.png", "../secret.png", tarfile.LNKTYPE),
        "CXR94_IM-1-1.png": link("CXR94_IM-1-1.png", "", tarfile.FIFOTYPE),
    }
    pack(root / IMAGES, {**bad, **pictures})
    raw = read_iu(root)
    assert len(raw.studies) == 7 and len(raw.problems) == len(bad)
    assert sorted(p.name for p in (root / "NLMCXR_png").glob("*.png")) == sorted(pictures)
    assert secret.read_bytes() == b"secret"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "secret.png"]


# broken trees: each a listed problem or read as if nothing were wrong


def cut(data: bytes, rng) -> bytes:
    return data[: rng.randrange(len(data))]


def flip(data: bytes, rng) -> bytes:
    k = rng.randrange(len(data))
    return data[:k] + bytes([data[k] ^ 1 << rng.randrange(8)]) + data[k + 1 :]


IN_XML = {
    "cut": cut,
    "flipped": flip,
    "empty": lambda d, r: b"",
    "not XML": lambda d, r: b"\x89PNG" + r.randbytes(99),
    "no number": lambda d, r: re.sub(rb"<uId.*?/>", b"", d),
    "odd number": lambda d, r: re.sub(rb'<uId id="CXR\d+"', b'<uId id="../CXR"', d),
    "doubled number": lambda d, r: re.sub(rb'<uId id="CXR\d+"', b'<uId id="CXR7"', d),
    "Latin-1": lambda d, r: d.replace(b"cough", b"fi\xe8vre"),
    "UTF-16": lambda d, r: d.decode().replace("utf-8", "utf-16").encode("utf-16"),
    "unknown encoding": lambda d, r: d.replace(b"utf-8", b"utf-9"),
    "NUL": lambda d, r: d.replace(b"cough", b"\0"),
    "laughs": lambda d, r: d.replace(
        b"<eCitation>", b'<!DOCTYPE e [<!ENTITY a "ha"><!ENTITY b "&a;&a;">]><eCitation>'
    ),
    "outer entity": lambda d, r: d.replace(
        b"<eCitation>", b'<!DOCTYPE e [<!ENTITY a SYSTEM "file:///etc/passwd">]><eCitation>'
    ).replace(b"cough", b"&a;"),
    "two findings": lambda d, r: d.replace(b'Label="IMPRESSION"', b'Label="FINDINGS"'),
    "image upwards": lambda d, r: re.sub(rb'parentImage id="CXR', b'parentImage id="../CXR', d),
    "image twice": lambda d, r: re.sub(
        rb"(<parentImage.*?</parentImage>)", rb"\1\1", d, count=1, flags=re.DOTALL
    ),
    "another's image": lambda d, r: re.sub(
        rb'parentImage id="CXR[\w-]+"', b'parentImage id="CXR7_IM-0000-1001"', d, count=1
    ),
    "deep": lambda d, r: b"<a>" * 20000 + d,
}


def mutate(root: Path, kind: str, rng) -> None:
    "Break one thing in a packed or unpacked tree."
    reports, pictures = openi_files()
    name = f"ecgen-radiology/{rng.choice((1, 2, 3, 6, 9, 11))}.xml"
    of_selected = [p for p in sorted(pictures) if p.startswith(("CXR2_", "CXR6_", "CXR11_"))]
    picture = rng.choice(of_selected)
    if kind in IN_XML:
        reports[name] = IN_XML[kind](reports[name], rng)
        if (root / REPORTS).exists():
            pack(root / REPORTS, reports)
        else:
            (root / name).write_bytes(reports[name])
    elif kind == "archive cut":
        archive = root / rng.choice((REPORTS, IMAGES))
        archive.write_bytes(cut(archive.read_bytes(), rng))
    elif kind == "archive flipped":
        archive = root / rng.choice((REPORTS, IMAGES))
        archive.write_bytes(flip(archive.read_bytes(), rng))
    elif kind == "damage under gzip":
        archive = root / rng.choice((REPORTS, IMAGES))
        tar = gzip.decompress(archive.read_bytes())
        archive.write_bytes(gzip.compress(spoil_header(tar, rng)))
    elif kind == "a page for an archive":
        (root / rng.choice((REPORTS, IMAGES))).write_text("<html>sign in</html>")
    elif kind == "picture missing":
        pack(root / IMAGES, {n: d for n, d in pictures.items() if n != picture})
    elif kind == "picture linked":
        pack(root / IMAGES, {**pictures, picture: link(picture, "/etc/passwd")})
    elif kind == "picture upwards":
        pack(root / IMAGES, {f"../{n}" if n == picture else n: d for n, d in pictures.items()})
    elif kind == "picture twice":
        pack(root / IMAGES, {**pictures, f"./{picture}": b"other"})
    elif kind == "odd name":
        pack(root / REPORTS, {**reports, "ecgen-radiology/\udcff.xml": reports[name]})
    elif kind == "report linked":
        pack(root / REPORTS, {**reports, name: link(name, "/etc/passwd")})
    elif kind == "in folders":
        pack(root / IMAGES, {f"./NLMCXR_png/{n}": d for n, d in pictures.items()})
    elif kind == "macOS":
        pack(root / REPORTS, {**reports, "ecgen-radiology/._1.xml": b"\0\5\x16\7"})
    elif kind == "file missing":
        (root / "NLMCXR_png" / picture).unlink()
    elif kind == "file is a folder":
        (root / name).unlink()
        (root / name).mkdir()
    elif kind == "file leads nowhere":
        (root / name).unlink()
        (root / name).symlink_to("nowhere.xml")
    elif kind == "pipe":
        (root / name).unlink()
        os.mkfifo(root / name)


def spoil_header(tar: bytes, rng) -> bytes:
    "Spoil the header of a member but the first; `tarfile` would stop there without a word."
    heads = [k for k in range(512, len(tar), 512) if tar[k + 257 : k + 262] == b"ustar"]
    k = rng.choice(heads)
    return tar[: k + 148] + b"777777\0 " + tar[k + 156 :]


PACKED = [
    "archive cut",
    "archive flipped",
    "damage under gzip",
    "a page for an archive",
    "picture missing",
    "picture linked",
    "picture upwards",
    "picture twice",
    "odd name",
    "report linked",
    "in folders",
    "macOS",
]
UNPACKED = ["file missing", "file is a folder", "file leads nowhere", "pipe"]
HARMLESS = {"in folders", "macOS"}  # read as if nothing were wrong
# a changed letter is another sound text; a bit of gzip's header says nothing; UTF-16 is declared
EITHER = {"flipped", "archive flipped", "UTF-16"}


def check_mutated(folder: Path, seed: int) -> None:
    rng = random.Random(seed)
    kinds = (
        [(k, p) for k in IN_XML for p in (True, False)]
        + [(k, True) for k in PACKED]
        + [(k, False) for k in UNPACKED]
    )
    kind, packed = kinds[seed % len(kinds)]
    root = make_openi(folder / str(seed), packed=packed)
    sound = read_iu(make_openi(folder / "sound" / str(packed), packed=packed))
    expected = {s.id: s for s in sound.studies}
    mutate(root, kind, rng)
    before = {} if kind == "pipe" else snapshot(root)
    try:
        raw = read_iu(root)
    except DataError as e:
        raw, problems = None, e.problems
    else:
        problems = raw.problems
    for p in problems:
        f"{p.id} {p.path} {p.what} {p.mend}".encode()  # can be written to a file
    assert all(p.what and p.mend and p.path for p in problems)
    assert problems or kind in HARMLESS | EITHER, f"{kind}: nothing said"
    assert not (problems and kind in HARMLESS), f"{kind}: {problems}"
    studies = {} if raw is None else {s.id: s for s in raw.studies}
    told = {(s.id, s.report, s.image_path) for s in expected.values()}
    changed = [i for i, s in studies.items() if (i, s.report, s.image_path) not in told]
    assert not changed or kind in EITHER, f"{kind}: {changed} read otherwise"
    if not problems and kind != "flipped":
        assert len(studies) == len(expected)
    if before:
        assert {k: v for k, v in snapshot(root).items() if k in before} == before


@pytest.mark.parametrize("seed", range(52))
def test_broken_trees(tmp_path, seed, no_package):
    check_mutated(tmp_path, seed)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(100, 310))
def test_more_broken_trees(tmp_path, seed, no_package):
    check_mutated(tmp_path, seed)


# Chen's file


def chen_tree(
    folder: Path, ids=("CXR1_IM-0001", "CXR2_IM-0002", "CXR6_IM-0006"), images: bool = True
) -> Path:
    "Write a file in Chen's form, with the images' folder as they distribute it."
    texts = {s.id: s.report for s in read_iu(make_openi(folder / "for texts")).studies}
    splits = {"train": [], "val": [], "test": []}
    for k, name in enumerate(ids):
        paths = [f"{name}/{i}.png" for i in (0, 1)]
        split = ("train", "val", "test")[k % 3]
        report = texts.get(iu.chen_uid(name), "Other.")
        splits[split].append(dict(id=name, report=report, image_path=paths, split=split))
        for path in paths if images else ():
            (folder / "chen" / "images" / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / "chen" / "images" / path).write_bytes(b"png")
    (folder / "chen").mkdir(exist_ok=True)
    (folder / "chen" / "annotation.json").write_text(json.dumps(splits))
    return folder / "chen" / "annotation.json"


def test_chen_with_its_images(tmp_path, no_package):
    "Exactly the file, with or without Open-i's reports beside it."
    path = chen_tree(tmp_path)
    alone = read_iu(chen=path)
    both = read_iu(make_openi(tmp_path / "openi"), chen=path)
    wanted = [s for v in read_annotation(path).values() for s in v]
    assert alone.studies == both.studies == wanted
    assert alone.folder == path.parent / "images"
    assert not alone.problems
    assert both.counts["of these selected here too"] == 3
    assert both.counts["selected here, not in Chen's file"] == 4
    assert not alone.counts
    assert both.counts["of these with the findings that Open-i has"] == 3
    (path.parent / "images/CXR2_IM-0002/1.png").unlink()
    assert [(p.id, p.what) for p in read_iu(chen=path).problems] == [
        ("CXR2_IM-0002", "missing image")
    ]


def test_chen_with_open_is_images(tmp_path, no_package):
    path = chen_tree(
        tmp_path,
        ids=("CXR1_IM-0001", "CXR6_IM-0006", "CXR2_IM-0002", "CXR999_IM-1", "odd"),
        images=False,
    )
    raw = read_iu(make_openi(tmp_path / "openi"), chen=path)
    assert [(s.id, s.split, s.patient) for s in raw.studies] == [
        ("CXR1_IM-0001", "train", "CXR1"),
        ("CXR6_IM-0006", "val", "CXR6"),
        ("CXR2_IM-0002", "test", "CXR2"),
    ]
    assert raw.studies[0].image_path == ("CXR1_1_IM-0001-1001.png", "CXR1_1_IM-0001-2001.png")
    assert sorted(p.id for p in raw.problems) == ["CXR999_IM-1", "odd"]
    assert raw.counts["of these, unclear which two images Chen took"] == 1


def test_chen_with_a_report_on_both_sides(tmp_path, no_package):
    path = chen_tree(tmp_path, ids=("CXR1_IM-0001", "CXR2_IM-0002", "CXR1_IM-0009"), images=False)
    raw = read_iu(make_openi(tmp_path / "openi"), chen=path)
    assert any("patient CXR1 is in test and train" in p.what for p in raw.problems)
    assert [s.id for s in raw.studies] == ["CXR2_IM-0002", "CXR1_IM-0009"]


def test_chen_without_anything_else(tmp_path, no_package):
    with pytest.raises(DataError, match="torchxrayvision"):
        read_iu(chen=chen_tree(tmp_path, images=False))


# Kaggle's copy


def edit_kaggle(folder: Path, table: str, old: str, new: str) -> Path:
    path = folder / f"indiana_{table}.csv"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    return folder


def test_kaggles_copy_gives_the_studies_of_open_i(tmp_path, no_package):
    kaggle = read_iu(make_kaggle(tmp_path / "kaggle"))
    openi = read_iu(make_openi(tmp_path / "openi"))
    assert not kaggle.problems and kaggle.counts == openi.counts and len(kaggle.studies) == 7
    told = [
        [(s.id, s.report, s.split, s.patient, len(s.image_path)) for s in raw.studies]
        for raw in (kaggle, openi)
    ]
    assert told[0] == told[1]
    assert all((kaggle.folder / p).is_file() for s in kaggle.studies for p in s.image_path)


def test_kaggles_frontal_view_comes_first(tmp_path, no_package):
    studies = {s.id: s for s in read_iu(make_kaggle(tmp_path)).studies}
    assert studies["CXR1"].image_path == ("1_IM-0001-1001.dcm.png", "1_IM-0001-2001.dcm.png")
    assert studies["CXR1"].views == ("frontal", "lateral")
    assert studies["CXR6"].views == (
        "frontal",
        "lateral",
        "frontal",
    )


def test_kaggles_other_sections_are_kept(tmp_path, no_package):
    extra = read_iu(make_kaggle(tmp_path)).studies[0].extra
    assert extra == dict(
        indication="XXXX-year-old, cough.",
        comparison="None.",
        impression="No acute disease.",
        mesh=["Cardiomegaly/mild", "Spine/degenerative"],
    )


@pytest.mark.parametrize(
    "table, old, new, said",
    [
        ("reports", "\n2,", "\ntwo,", "uid 'two' is no number"),
        ("reports", "\n2,", "\n1,", "CXR1 is in several reports"),
        ("projections", "2_IM-0002-1001.dcm.png", "../2.png", "cannot be an image's name"),
        (
            "projections",
            "2_IM-0002-1001",
            "1_IM-0001-1001",
            "1_IM-0001-1001.dcm is in several reports",
        ),
        ("projections", "2_IM-0002-1001", "gone", "missing image"),
    ],
)
def test_kaggles_broken_rows_are_listed_and_the_rest_is_read(
    tmp_path, no_package, table, old, new, said
):
    raw = read_iu(edit_kaggle(make_kaggle(tmp_path), table, old, new))
    assert any(said in p.what for p in raw.problems)
    assert {"CXR3", "CXR7", "CXR9"} <= {s.id for s in raw.studies}
    assert "CXR2" not in {s.id for s in raw.studies}


@pytest.mark.parametrize(
    "table, old, new, said",
    [
        ("reports", "findings", "text", "has no column findings"),
        ("projections", "projection", "view", "has no column projection"),
    ],
)
def test_kaggles_missing_column_is_named(tmp_path, no_package, table, old, new, said):
    with pytest.raises(DataError, match=said):
        read_iu(edit_kaggle(make_kaggle(tmp_path), table, old, new))


def test_kaggles_tables_without_images_say_where_they_are_looked_for(tmp_path, no_package):
    shutil.rmtree(make_kaggle(tmp_path) / "images")
    raw = read_iu(tmp_path)
    assert not raw.studies and "no images/images_normalized" in raw.problems[0].what


def test_chen_with_kaggles_images(tmp_path, no_package):
    path = chen_tree(tmp_path, ids=("CXR1_IM-0001", "CXR2_IM-0002"), images=False)
    raw = read_iu(make_kaggle(tmp_path / "kaggle"), chen=path)
    assert [(s.id, s.split, s.image_path[0]) for s in raw.studies] == [
        ("CXR1_IM-0001", "train", "1_IM-0001-1001.dcm.png"),
        ("CXR2_IM-0002", "val", "2_IM-0002-1001.dcm.png"),
    ]


# downloads

CONTENT = gzip.compress(random.Random(0).randbytes(400_000))  # noise: as large packed


class Server(BaseHTTPRequestHandler):
    "Serve CONTENT as `server.manner` says; `server.asked` collects the Range of each request."

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.server.asked.append(self.headers.get("Range"))
        self.server.manner(self, len(self.server.asked))

    def send(
        self,
        data=None,
        drop=None,
        tag='"one"',
        ranges=True,
        length=True,
        kind="application/x-gzip",
        pause=0.0,
        lie=0,
    ):
        "Answer with `data`, at most `drop` bytes of it."
        data = CONTENT if data is None else data
        asked = self.headers.get("Range")
        same = self.headers.get("If-Range") in (None, tag)
        start = int(asked[6:-1]) if ranges and asked and same else 0
        if start > len(data):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start + lie}-{len(data) - 1}/{len(data)}")
        if tag:
            self.send_header("ETag", tag)
        self.send_header("Content-Type", kind)
        if length:
            self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        body = io.BytesIO(data[start:][:drop])
        while chunk := body.read(40_000):
            self.wfile.write(chunk)
            time.sleep(pause)
        self.close_connection = True


class QuietServer(ThreadingHTTPServer):
    "A server whose clients may hang up."

    daemon_threads = True
    block_on_close = False

    def handle_error(self, *_):
        pass


@pytest.fixture
def serve(monkeypatch, tmp_path):
    "Download from a server of a given manner; return what came and what was asked for."
    monkeypatch.setattr(iu, "PAUSE", 0.001)
    monkeypatch.setattr(iu, "TIMEOUT", 0.3)
    servers = []

    def start(manner, folder=tmp_path / "in", files=("a.tgz",)):
        server = QuietServer(("127.0.0.1", 0), Server)
        server.manner, server.asked = manner, []
        servers.append(server)
        poll = dict(poll_interval=0.01)
        threading.Thread(target=server.serve_forever, kwargs=poll, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}/"
        try:
            path = download_openi(folder, base=base, files=files) / files[0]
            return path.read_bytes(), server.asked
        except DataError as e:
            return e.problems[0], server.asked

    yield start
    for s in servers:
        s.shutdown()
        s.server_close()


def test_download(serve, tmp_path, capsys):
    got, asked = serve(lambda h, k: h.send())
    assert got == CONTENT
    assert asked == [None]
    assert "CC BY-NC-ND 4.0" in capsys.readouterr().out.splitlines()[0]
    assert [p.name for p in (tmp_path / "in").iterdir()] == ["a.tgz"]
    assert serve(lambda h, k: h.send_error(500))[1] == []  # what is there is not fetched again


GOOD = {
    "drops midway, goes on": (lambda h, k: h.send(drop=150_000), 3),
    "drops, ignores Range": (
        lambda h, k: h.send(drop=150_000 if k == 1 else None, ranges=False),
        2,
    ),
    "drops, has no names of versions": (
        lambda h, k: h.send(drop=150_000 if k == 1 else None, tag=None),
        2,
    ),
    "drops, weak names of versions": (
        lambda h, k: h.send(drop=150_000 if k == 1 else None, tag='W/"x"', ranges=False),
        2,
    ),
    "500, 503, then well": (lambda h, k: h.send_error((500, 503)[k - 1]) if k < 3 else h.send(), 3),
    "hangs up at once, then well": (lambda h, k: None if k < 3 else h.send(), 3),
    "silent, then well": (lambda h, k: time.sleep(0.5) if k < 2 else h.send(), 2),
    "slow": (lambda h, k: h.send(pause=0.05), 1),
    "no length": (lambda h, k: h.send(length=False), 1),
    "the wrong part of it": (
        lambda h, k: h.send(drop=150_000 if k == 1 else None, lie=k == 2 and 7),
        3,
    ),
    "not HTTP, then well": (
        lambda h, k: h.wfile.write(b"ICY 200 OK\r\n\r\n") if k < 2 else h.send(),
        2,
    ),
}


@pytest.mark.parametrize("manner", GOOD)
def test_download_comes_whole(serve, manner, tmp_path):
    answer, tries = GOOD[manner]
    got, asked = serve(answer)
    assert got == CONTENT and len(asked) == tries and len(list((tmp_path / "in").iterdir())) == 1
    if manner == "drops midway, goes on":
        assert asked == [None, "bytes=150000-", "bytes=300000-"]


OTHER = gzip.compress(b"other" + random.Random(1).randbytes(390_000))


@pytest.mark.parametrize("obeys", [True, False])
def test_changed_file_is_not_glued(serve, obeys):
    "Whether the server heeds If-Range or not."

    def manner(h, k):
        if k == 1:
            return h.send(drop=150_000)
        if not obeys and h.headers.get("If-Range"):
            h.headers.replace_header("If-Range", '"two"')
        h.send(OTHER, tag='"two"')

    got, asked = serve(manner)
    assert got == OTHER and len(asked) == (2 if obeys else 3)


def test_a_shorter_file_than_before(serve):
    "What is there is longer than the file (416)."
    small = gzip.compress(random.Random(2).randbytes(90_000))
    assert serve(lambda h, k: h.send(drop=150_000) if k == 1 else h.send(small))[0] == small


BAD = {
    "404": (lambda h, k: h.send_error(404), "404", 1),
    "403": (lambda h, k: h.send_error(403), "403", 1),
    "500 for ever": (lambda h, k: h.send_error(500), "6 tries", 6),
    "a page": (
        lambda h, k: h.send(b"<html>sign in</html>", kind="text/html; charset=utf-8"),
        "a web page",
        1,
    ),
    "a page that says it is an archive": (
        lambda h, k: h.send(b"<html>sign in</html>" * 50),
        "no sound gzip",
        1,
    ),
    "short for ever, always anew": (lambda h, k: h.send(drop=150_000, ranges=False), "6 tries", 7),
    "a cut archive": (lambda h, k: h.send(CONTENT[:200_000]), "no sound gzip", 1),
    "no length, and short": (lambda h, k: h.send(drop=150_000, length=False), "no sound gzip", 1),
    "silent for ever": (lambda h, k: time.sleep(0.5), "6 tries", 6),
}


@pytest.mark.parametrize("manner", BAD)
def test_download_that_cannot_be(serve, manner, tmp_path):
    answer, said, tries = BAD[manner]
    problem, asked = serve(answer)
    assert said in problem.what
    assert problem.mend
    assert len(asked) == tries
    assert not (tmp_path / "in" / "a.tgz").exists()


def test_download_goes_on_in_another_run(serve, tmp_path):
    problem, _ = serve(lambda h, k: h.send(drop=150_000) if k == 1 else h.send_error(503))
    assert "6 tries" in problem.what and (tmp_path / "in" / "a.tgz.part").stat().st_size == 150_000
    got, asked = serve(lambda h, k: h.send())
    assert got == CONTENT and asked == ["bytes=150000-"]


def test_download_without_room(serve, monkeypatch, tmp_path):
    monkeypatch.setattr(iu.shutil, "disk_usage", lambda path: SimpleNamespace(free=1))
    assert "needs 0.00 GB" in serve(lambda h, k: h.send())[0].what


def test_disk_fills_up_midway(serve, monkeypatch):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    monkeypatch.setattr(iu, "open", lambda path, mode: open("/dev/full", mode), raising=False)
    problem, asked = serve(lambda h, k: h.send())
    assert "No space left" in problem.what and len(asked) == 1


def test_download_when_nobody_answers(tmp_path, monkeypatch):
    monkeypatch.setattr(iu, "PAUSE", 0.001)
    with pytest.raises(DataError, match="6 tries in a row"):
        download_openi(tmp_path, base="http://127.0.0.1:9/")


def test_downloaded_is_read(serve, tmp_path, no_package):
    made = make_openi(tmp_path / "made")

    def manner(h, k):
        h.send((made / h.path[1:]).read_bytes())

    serve(manner, tmp_path / "got", (REPORTS, IMAGES))
    assert read_iu(tmp_path / "got").studies == read_iu(made).studies
