"""Reports under headings of every spelling; official trees whole, damaged, and one of full size.

All texts are made up.
"""

import gzip
import json
import os
import random
import shutil
import subprocess
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from trees import MIMIC_REPORTS, _picture, make_mimic_jpg, mimic_folder, write_mimic_tables

from cvt2distilgpt2.mimic import (
    SECTIONS,
    SPELLINGS,
    find_headings,
    find_root,
    read_mimic,
    read_sections,
)
from cvt2distilgpt2.tasks import DataError, write_annotation

# ---------------------------------------------------------------- sections

F = "findings"
IMP = "impression"
TEXTS = [  # a report, and what each section of it says
    # plain
    ("FINDINGS: The lungs are clear.", {F: "The lungs are clear."}),
    ("FINDINGS:\n\nThe lungs are clear.\n", {F: "The lungs are clear."}),
    ("FINDINGS:The lungs are clear.", {F: "The lungs are clear."}),
    ("   FINDINGS  :   The lungs are clear.   ", {F: "The lungs are clear."}),
    ("Findings: The lungs are clear.", {F: "The lungs are clear."}),
    ("Findings : The lungs are clear.", {F: "The lungs are clear."}),
    ("findings: the lungs are clear.", {F: "the lungs are clear."}),
    ("FINDING: One rib is broken.", {F: "One rib is broken."}),
    ("FINDINGS\n The lungs are clear.\n", {F: "The lungs are clear."}),
    (
        "FINDINGS - The lungs are clear.\nIMPRESSION - Normal.",
        {F: "The lungs are clear.", IMP: "Normal."},
    ),
    (
        "FINDINGS:\r\n\r\nThe lungs\r\nare clear.\r\n\r\nIMPRESSION\r\nNormal.\r\n",
        {F: "The lungs\r\nare clear.", IMP: "Normal."},
    ),
    # the usual order, in the layout of the published files
    (
        "                                 FINAL REPORT\n"
        " EXAMINATION:  CHEST (PORTABLE AP)\n \n"
        " INDICATION:  ___ with fever  // infection?\n \n"
        " TECHNIQUE:  Single view.\n \n"
        " COMPARISON:  ___ and ___.\n \n"
        " FINDINGS: \n \n A line ends in\n the right atrium.\n \n"
        " IMPRESSION: \n \n 1. No change.\n 2. See above.\n",
        {
            "examination": "CHEST (PORTABLE AP)",
            "indication": "___ with fever  // infection?",
            "technique": "Single view.",
            "comparison": "___ and ___.",
            F: "A line ends in\n the right atrium.",
            IMP: "1. No change.\n 2. See above.",
        },
    ),
    # several on a line
    (
        "COMPARISON: None. FINDINGS: Clear. IMPRESSION: Normal.",
        {"comparison": "None.", F: "Clear.", IMP: "Normal."},
    ),
    (
        "COMPARISON: None FINDINGS: Clear lungs IMPRESSION: Normal chest",
        {"comparison": "None", F: "Clear lungs", IMP: "Normal chest"},
    ),
    (
        "Comparison: none. Findings: clear. Impression: normal.",
        {"comparison": "none.", F: "clear.", IMP: "normal."},
    ),
    ("EXAM: Chest PA FINDINGS: Clear.", {"examination": "Chest PA", F: "Clear."}),
    (
        "EXAM: CHEST AP.  REASON FOR EXAM: Fever.  FINDINGS: Clear.",
        {"examination": "CHEST AP.", "indication": "Fever.", F: "Clear."},
    ),
    (
        "Indication: Comparison: None.\nFINDINGS: IMPRESSION: Normal.",
        {"comparison": "None.", IMP: "Normal."},
    ),
    (
        "HISTORY: Cough?  FINDINGS: Clear!  IMPRESSION: None.",
        {"history": "Cough?", F: "Clear!", IMP: "None."},
    ),
    # none at all
    ("", {}),
    (" \n \n", {}),
    ("The lungs are clear. The heart is normal.", {}),
    ("                     FINAL REPORT\n \n The lungs are clear.\n", {}),
    ("CLEAR LUNGS", {}),
    # every listed name of the other sections
    ("INDICATION: Cough.", {"indication": "Cough."}),
    ("CLINICAL INDICATION: Cough.", {"indication": "Cough."}),
    ("REASON FOR EXAM: Cough.", {"indication": "Cough."}),
    ("REASON FOR THE EXAM: Cough.", {"indication": "Cough."}),
    ("REASON FOR EXAMINATION: Cough.", {"indication": "Cough."}),
    ("Reason for exam: Cough.", {"indication": "Cough."}),
    ("REASON FOR CHEST RADIOGRAPH: Cough.", {"indication": "Cough."}),
    ("HISTORY: Cough.", {"history": "Cough."}),
    ("CLINICAL HISTORY: Cough.", {"history": "Cough."}),
    ("CLINICAL HISTORY\n Cough.\n", {"history": "Cough."}),
    ("CLINICAL INFORMATION: Cough.", {"history": "Cough."}),
    ("ONCOLOGIC HISTORY: Cough.", {"history": "Cough."}),
    ("COMPARISONS: None.", {"comparison": "None."}),
    ("COMPARISON FILM: None.", {"comparison": "None."}),
    ("REFERENCE EXAM: ___.", {"comparison": "___."}),
    ("COMPARISON STUDIES FROM ___: Two.", {"comparison": "Two."}),
    ("TECHNIQUE: Portable AP.", {"technique": "Portable AP."}),
    ("TYPE OF EXAMINATION: Chest.", {"examination": "Chest."}),
    ("EXAM:\n CHEST\n", {"examination": "CHEST"}),
    ("CONCLUSION: Normal.", {IMP: "Normal."}),
    # findings and impression together are an impression, as for MIMIC-CXR's authors
    ("FINDINGS AND IMPRESSION: Clear.", {IMP: "Clear."}),
    ("FINDINGS/IMPRESSION: Clear.", {IMP: "Clear."}),
    ("FINDINGS / IMPRESSION: Clear.", {IMP: "Clear."}),
    ("IMPRESSION AND FINDINGS:\n Clear.", {IMP: "Clear."}),
    ("COMPARISON: None. FINDINGS/ IMPRESSION: Clear.", {"comparison": "None.", IMP: "Clear."}),
    ("COMPARISON: None FINDINGS AND IMPRESSION: Clear.", {"comparison": "None", IMP: "Clear."}),
    ("Findings and impression: Clear.", {IMP: "Clear."}),
    ("COMPARISON: None IMPRESSION AND FINDINGS: Clear.", {"comparison": "None", IMP: "Clear."}),
    ("PROVISIONAL FINDINGS IMPRESSION (PFI): Clear.", {IMP: "Clear."}),
    # findings under the name of the picture
    ("CHEST, TWO VIEWS: The lungs are clear.", {F: "The lungs are clear."}),
    ("PA AND LATERAL VIEWS OF THE CHEST: The lungs are clear.", {F: "The lungs are clear."}),
    ("PORTABLE AP CHEST RADIOGRAPH: The lungs are clear.", {F: "The lungs are clear."}),
    (
        "CHEST RADIOGRAPH PERFORMED ON ___ AT 10:30 A.M.: The lungs are clear.",
        {F: "The lungs are clear."},
    ),
    (
        "SEMI-UPRIGHT FRONTAL VIEW OF THE CHEST:\n \n Clear.\n \n IMPRESSION: Normal.",
        {F: "Clear.", IMP: "Normal."},
    ),
    (
        "HISTORY: Cough.\n \n FRONTAL AND LATERAL CHEST X-RAY (2 VIEWS):\n Clear.",
        {"history": "Cough.", F: "Clear."},
    ),
    ("FINDINGS:\n PA AND LATERAL VIEWS OF THE CHEST:\n Clear.\n", {F: "Clear."}),
    ("FINDINGS ON THE LATERAL VIEW: Clear.", {F: "Clear."}),
    # ... which is often but a title
    (
        "CHEST, PA AND LATERAL:\n \n INDICATION: Cough.\n \n FINDINGS: Clear.",
        {"indication": "Cough.", F: "Clear."},
    ),
    ("FINDINGS: Clear.\n PORTABLE CHEST:\n \n IMPRESSION: Normal.", {F: "Clear.", IMP: "Normal."}),
    # the last that is not empty counts
    ("FINDINGS: Old.\n \n FINDINGS: New.", {F: "New."}),
    ("IMPRESSION: Normal.\n IMPRESSION:\n", {IMP: "Normal."}),
    ("FINDINGS:\n \n IMPRESSION: Normal.", {IMP: "Normal."}),
    # what ends a section
    (
        "WET READ: ___ ___ 9:14 PM\n  Small effusion.\n"
        " ______________________________________________________________________________\n"
        "                                 FINAL REPORT\n FINDINGS: Clear.",
        {"wet read": "___ ___ 9:14 PM\n  Small effusion.", F: "Clear."},
    ),
    (
        "FINDINGS: Clear.\n NOTIFICATION: Called to Dr. ___ at 3:45 PM.",
        {F: "Clear.", "notification": "Called to Dr. ___ at 3:45 PM."},
    ),
    ("FINDINGS: Nodule.\n RECOMMENDATION(S):  CT.", {F: "Nodule.", "recommendations": "CT."}),
    ("FINDINGS: Nodule.  RECOMMENDATIONS: CT.", {F: "Nodule.", "recommendations": "CT."}),
    ("FINDINGS: Nodule.\n RECOMMENDATION: CT.", {F: "Nodule.", "recommendations": "CT."}),
    (
        "ADDENDUM: Side corrected.\n                    FINAL REPORT\n FINDINGS: Left effusion.",
        {"addendum": "Side corrected.", F: "Left effusion."},
    ),
    (
        "FINDINGS: Clear.\n IMPRESSION: Normal.\n \n ADDENDUM\n There is a rib fracture.\n",
        {F: "Clear.", IMP: "Normal.", "addendum": "There is a rib fracture."},
    ),
    ("ADDENDUM BY DR. ___:  Called.\n FINDINGS: Clear.", {F: "Clear."}),
    ("FINDINGS: Clear.\n NODULE TABLE: None.\n", {F: "Clear.", "nodule table": "None."}),
    ("FINDINGS: Clear.\n DOSE:\n", {F: "Clear."}),
    # slips of the keyboard
    ("FINDNGS: Clear.\n IMPRESSON: Normal.", {F: "Clear.", IMP: "Normal."}),
    (
        "COMPARISION: None.\n IDICATION: Cough.\n TECHNIUQE: AP.",
        {"comparison": "None.", "indication": "Cough.", "technique": "AP."},
    ),
    # colons in running text
    ("FINDINGS: Seen at 3:45 PM, as follows: clear.", {F: "Seen at 3:45 PM, as follows: clear."}),
    (
        "FINDINGS: There are\n two lines: one left, one right.",
        {F: "There are\n two lines: one left, one right."},
    ),
    ("FINDINGS: The ratio is 1:2. Dr. ___: called.", {F: "The ratio is 1:2. Dr. ___: called."}),
    (
        "IMPRESSION: We discussed the following\n findings: clear lungs.",
        {IMP: "We discussed the following\n findings: clear lungs."},
    ),
    ("IMPRESSION: In short, the impression: clear.", {IMP: "In short, the impression: clear."}),
    (
        "FINDINGS: Tube tip is 3 cm from the carina.\n R:  Small effusion. L:  None.",
        {F: "Tube tip is 3 cm from the carina.\n R:  Small effusion. L:  None."},
    ),
    ("FINDINGS: This :: that : : other", {F: "This :: that : : other"}),
    # parts of the body stand within the findings
    (
        "FINDINGS:\n LUNGS: Clear.\n HEART: Normal.\n CHEST WALL: Intact.\n IMPRESSION: Normal.",
        {F: "LUNGS: Clear.\n HEART: Normal.\n CHEST WALL: Intact.", IMP: "Normal."},
    ),
    (
        "FINDINGS:\n LINES/TUBES: None.\n BONES AND SOFT TISSUES: Intact.",
        {F: "LINES/TUBES: None.\n BONES AND SOFT TISSUES: Intact."},
    ),
    # all capitals
    (
        "INDICATION: COUGH.\nFINDINGS: CLEAR LUNGS, AS FOLLOWS: NO EDEMA.\nIMPRESSION: NORMAL.",
        {"indication": "COUGH.", F: "CLEAR LUNGS, AS FOLLOWS: NO EDEMA.", IMP: "NORMAL."},
    ),
    (
        "FINDINGS: THE LUNGS ARE\nAS FOLLOWS: CLEAR.\nTHE HEART IS\nNORMAL",
        {F: "THE LUNGS ARE\nAS FOLLOWS: CLEAR.\nTHE HEART IS\nNORMAL"},
    ),
    ("FINDINGS: CLEAR\nIMPRESSION: NORMAL", {F: "CLEAR", IMP: "NORMAL"}),
    (
        "COMPARISON: NONE. FINDINGS: CLEAR. IMPRESSION: NORMAL.",
        {"comparison": "NONE.", F: "CLEAR.", IMP: "NORMAL."},
    ),
    (
        "IMPRESSION: WE SEE THE FOLLOWING FINDINGS: NONE",
        {IMP: "WE SEE THE FOLLOWING FINDINGS: NONE"},
    ),
    ("CHEST, TWO VIEWS: CLEAR.", {F: "CLEAR."}),
    # as written
    (
        "FINDINGS: The ___ line,\n  placed ___,   ends at ___.\n\n\n Clear.",
        {F: "The ___ line,\n  placed ___,   ends at ___.\n\n\n Clear."},
    ),
    ("FINDINGS: Fièvre, 38 °C – no “edema”.", {F: "Fièvre, 38 °C – no “edema”."}),
    (
        "FINDINGS: 1. Clear.\n 2. Normal.\nIMPRESSION:1. None",
        {F: "1. Clear.\n 2. Normal.", IMP: "1. None"},
    ),
]


@pytest.mark.parametrize("text, sections", TEXTS, ids=range(len(TEXTS)))
def test_sections(text, sections):
    found = read_sections(text)
    assert {n: s for n, s in found.items() if n in sections or n in (F, IMP)} == sections
    assert sections or not found


def test_table_is_wide_enough():
    assert len(TEXTS) >= 60 and set(SECTIONS) <= {n for _, s in TEXTS for n in s}


@pytest.mark.parametrize(
    "write",
    [str.upper, str.capitalize, str.title, str.lower],
    ids=["upper", "capitalized", "title", "lower"],
)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_each_listed_heading(spelling, write):
    "A listed name, however written, opens its section, in a report alone and between others."
    heading, name = write(spelling), SPELLINGS[spelling]
    assert read_sections(f"{heading}: Some text.") == {name: "Some text."}
    between = read_sections(f"DOSE: None.\n \n {heading} :\n Some text.\n MACHINE: Old.\n")
    assert between == {"dose": "None.", name: "Some text.", "machine": "Old."}


def random_report(rng: random.Random) -> str:
    "Make a text of headings, colons, sentences and white space in random order."
    pieces = [
        *(s.upper() for s in SPELLINGS),
        *SPELLINGS,
        "LUNGS",
        "DOSE",
        "CHEST, TWO VIEWS",
        "The lungs are clear.",
        "NO EDEMA.",
        "3:45 PM",
        "___",
        "_" * 20,
        "FINAL REPORT",
        "as follows",
        ":",
        ":",
        ":",
        " :",
        ": ",
        "\n",
        "\n \n",
        " ",
        ". ",
        "1. ",
        "\t",
        "\r\n",
        "é",
    ]
    return "".join(
        rng.choice(pieces) + rng.choice(("", " ", "\n", ":", ": "))
        for _ in range(rng.randrange(40))
    )


def test_any_text():
    """Headings are in order and apart, and sections stand in the text, stripped and not empty.

    Nothing is in two sections.
    """
    rng = random.Random(0)
    for _ in range(3000):
        text = random_report(rng)
        headings, sections = find_headings(text), read_sections(text)
        marks = [0] + [x for start, end, _ in headings for x in (start, end)] + [len(text)]
        assert marks == sorted(marks)
        assert all(s and s == s.strip() and s in text for s in sections.values())
        assert sum(map(len, sections.values())) <= len(text) - sum(
            end - start for start, end, _ in headings
        )


def random_words(rng: random.Random) -> str:
    "Draw some words of a report."
    pieces = ("clear", "lungs", "___", "no edema,", "Small effusion.", "at 3:45", "LUNGS", "\n")
    return " ".join(rng.choice(pieces) for _ in range(rng.randrange(1, 12))).strip()


def test_written_and_read_again():
    "What was read, written in plain form, reads the same."
    rng = random.Random(1)
    checked = 0
    for _ in range(500):
        names = rng.sample(list(SECTIONS), rng.randrange(1, 8))
        sections = {n: words for n in names if (words := random_words(rng))}
        if not any(any(map(str.islower, w)) for w in sections.values()):
            continue  # all in capitals: another case
        text = "\n \n ".join(f"{n.upper()}: {s}" for n, s in sections.items())
        assert read_sections(text) == sections
        checked += 1
    assert checked > 400


LONG = {  # each a million characters
    "words": "clear lungs " * 83_000,
    "colons": ":" * 1_000_000,
    "spaces": " " * 1_000_000,
    "lines": "\n" * 1_000_000,
    "blank lines": " \n" * 500_000,
    "capitals": "A" * 1_000_000,
    "capitals and spaces": "A " * 500_000,
    "headings": "FINDINGS: " * 100_000,
    "half headings": "FINDINGS " * 111_000,
    "lines of headings": "FINDINGS:\n" * 100_000,
    "unknown headings": "".join(
        f"H{chr(65 + i % 26)}{chr(65 + i // 26 % 26)}{chr(65 + i // 676)}: x\n"
        for i in range(30_000)
    ),
    "underscores": "_" * 1_000_000,
    "lines of underscores": ("_" * 50 + "\n") * 20_000,
    "full stops": ". " * 500_000,
    "names and spaces": ("FINDINGS" + " " * 5000) * 200,
    "reasons": "REASON FOR " * 91_000,
    "times": "3:45 PM " * 125_000,
    "small names": "findings: " * 100_000,
}


@pytest.mark.parametrize("kind", LONG)
def test_time_is_linear(kind):
    "A text twice as long takes at most about twice the time; none takes long."

    def seconds(text):
        start = time.process_time()
        read_sections(text)
        return time.process_time() - start

    text = "FINDINGS: " + LONG[kind]
    half, whole = seconds(text[: len(text) // 2]), seconds(text)
    assert whole < 20 and whole < 3 * half + 0.3


# ---------------------------------------------------------------- trees


def listed(raw) -> dict:
    return {s.id: s for s in raw.studies}


@pytest.mark.parametrize("version", ["2.0.0", "2.1.0"])
@pytest.mark.parametrize("packed", [True, False], ids=["gz", "csv"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "folder"])
def test_official_tree(tmp_path, version, packed, zipped):
    tree = make_mimic_jpg(tmp_path, version=version, packed=packed, zipped=zipped)
    raw, table = read_mimic(tree["root"]), tree["table"]
    used = table[~table.report.str.contains("HISTORY:  Shortness")]
    assert not raw.problems and raw.folder == tree["root"] / "files"
    assert [s.id for s in raw.studies] == used.dicom_id.tolist()  # the table's order
    for s, row in zip(raw.studies, used.itertuples(), strict=True):
        assert s.image_path == (f"{mimic_folder(row)[6:]}/{row.dicom_id}.jpg",)
        assert (raw.folder / s.image_path[0]).is_file()
        assert s.split == {"validate": "val"}.get(row.split, row.split)
        assert s.patient == str(row.subject_id)
        assert s.views == (
            {"PA": "frontal", "AP": "frontal", "LATERAL": "lateral", "": ""}[row.ViewPosition],
        )
        assert s.extra["study_id"] == row.study_id and s.extra["subject_id"] == row.subject_id
        assert s.report in row.report
        assert s.report in (
            "The lungs are clear of\n focal consolidation.  The heart is normal.",
            "No pneumothorax is seen.",
        )
    assert raw.counts == {
        "images in the table": 24,
        "images on disk": 24,
        "images on disk that the table does not list": 0,
        "reports": 12,
        "reports with findings": 8,
        "reports without findings, an impression only": 4,
        "images of unknown view": 4,
        "examples": 20,
    }


def test_other_sections_are_kept(tmp_path):
    tree = make_mimic_jpg(tmp_path)
    extra = read_mimic(tree["root"]).studies[0].extra
    assert extra == dict(
        study_id=50414267,
        subject_id=10000032,
        indication="___M with cough  // pneumonia?",
        comparison="___",
        impression="No acute process.",
    )
    path = write_annotation(read_mimic(tree["root"]).studies, tmp_path / "annotation.json")
    assert json.loads(path.read_text())["train"][0]["study_id"] == 50414267


def test_studies_with_all_views(tmp_path):
    tree = make_mimic_jpg(tmp_path)
    raw = read_mimic(tree["root"], examples="study")
    assert len(raw.studies) == 8 == raw.counts["examples"]
    assert {len(s.image_path) for s in raw.studies} == {2, 3}
    assert {s.views for s in raw.studies} == {("frontal", "lateral"), ("frontal", "lateral", "")}
    one = read_mimic(tree["root"])
    assert sorted(p for s in raw.studies for p in s.image_path) == sorted(
        s.image_path[0] for s in one.studies
    )
    assert all(
        s.id == f"s{s.extra['study_id']}" and s.image_path[0].split("/")[2] == s.id
        for s in raw.studies
    )


def test_root_and_reports_by_other_names(tmp_path):
    tree = make_mimic_jpg(tmp_path)
    wanted = read_mimic(tree["root"])
    for root in (tree["root"] / "files", tree["root"].parent, str(tree["root"]) + "/"):
        for reports in (None, tree["reports"], str(tree["reports"]), tree["reports"].parent):
            assert read_mimic(root, reports) == wanted


@pytest.mark.parametrize(
    "place", ["files", "mimic-cxr-reports/files", "../mimic-cxr-reports/files", "../somewhere"]
)
def test_unpacked_reports_elsewhere(tmp_path, place):
    "Among the images, beside them, or in a folder that is named."
    tree = make_mimic_jpg(tmp_path)
    wanted = read_mimic(tree["root"]).studies
    with zipfile.ZipFile(tree["reports"]) as archive:
        archive.extractall(tmp_path / "unpacked")
    tree["reports"].unlink()
    shutil.copytree(tmp_path / "unpacked" / "files", tree["root"] / place, dirs_exist_ok=True)
    raw = read_mimic(tree["root"], tree["root"] / place if "somewhere" in place else None)
    assert raw.studies == wanted and not raw.problems


def test_dicom_where_there_is_no_jpg(tmp_path):
    tree = make_mimic_jpg(tmp_path)
    jpgs = sorted((tree["root"] / "files").rglob("*.jpg"))
    jpgs[0].rename(jpgs[0].with_suffix(".dcm"))
    shutil.copy(jpgs[1], jpgs[1].with_suffix(".dcm"))  # both: the .jpg is used
    raw = read_mimic(tree["root"])
    assert not raw.problems
    assert Counter(Path(p).suffix for s in raw.studies for p in s.image_path) == {
        ".jpg": 19,
        ".dcm": 1,
    }


@pytest.mark.parametrize("suffix", [".png", ".jpeg", ".JPG", ".JPEG", ".PNG", ".DCM"])
def test_images_of_another_suffix(tmp_path, suffix):
    tree = make_mimic_jpg(tmp_path)
    for path in (tree["root"] / "files").rglob("*.jpg"):
        path.rename(path.with_suffix(suffix))
    raw = read_mimic(tree["root"])
    assert not raw.problems
    assert {Path(p).suffix for s in raw.studies for p in s.image_path} == {suffix}
    assert all((raw.folder / p).is_file() for s in raw.studies for p in s.image_path)


def test_of_several_files_of_an_image_the_published_form_is_taken(tmp_path):
    tree = make_mimic_jpg(tmp_path)
    for path in list((tree["root"] / "files").rglob("*.jpg")):
        shutil.copy(path, path.with_suffix(".png"))
    assert {Path(p).suffix for s in read_mimic(tree["root"]).studies for p in s.image_path} == {
        ".jpg"
    }


@pytest.mark.parametrize(
    "above", ["physionet.org", "physionet.org/files", "physionet.org/files/mimic-cxr-jpg"]
)
def test_folders_above_as_wget_leaves_them(tmp_path, above):
    tree = make_mimic_jpg(tmp_path / "physionet.org" / "files")
    assert find_root(tmp_path / above) == tree["root"]
    assert read_mimic(tmp_path / above).studies == read_mimic(tree["root"]).studies


def test_the_dicom_files_of_mimic_may_lie_beside(tmp_path):
    "They are the same studies, and have no table of splits."
    tree = make_mimic_jpg(tmp_path)
    (tmp_path / "mimic-cxr" / "2.0.0" / "files" / "p10" / "p10000032").mkdir(parents=True)
    assert find_root(tmp_path) == tree["root"]


def test_names_that_lead_out_of_the_archive(tmp_path):
    "They are not read, and nothing is written."
    tree = make_mimic_jpg(tmp_path)
    place = mimic_folder(tree["table"].iloc[0])[6:]
    with zipfile.ZipFile(tree["reports"], "w") as archive:
        for name in ("../", "/", "C:/", "files/../../"):
            archive.writestr(f"{name}{place}.txt", "FINDINGS: Wrong.")
        archive.writestr(
            f"mimic-cxr-reports/files/{place.replace('10000032', '10000033')}.txt",
            "FINDINGS: Nobody's.",
        )
    raw = read_mimic(tree["root"])
    assert not raw.studies and {p.what for p in raw.problems} == {"there is no such report"}


def test_what_cannot_be_read_at_all_says_why(tmp_path):
    tree = make_mimic_jpg(tmp_path)
    root = tree["root"]
    with pytest.raises(DataError, match="files/p10"):
        read_mimic(tmp_path / "mimic-cxr")
    with pytest.raises(DataError, match="is not a folder"):
        read_mimic(tmp_path / "nowhere")
    with pytest.raises(DataError, match="looked for .*none.zip"):
        read_mimic(root, tmp_path / "none.zip")
    with pytest.raises(ValueError, match='"image" or "study"'):
        read_mimic(root, examples="patient")
    with pytest.raises(ValueError, match="leave `examples`"):
        read_mimic(root, examples="study", chen="annotation.json")
    copy = tmp_path / "mimic-cxr-jpg" / "copy"
    (copy / "files" / "p10").mkdir(parents=True)
    shutil.copy(next(root.glob("*-split.csv.gz")), copy)
    with pytest.raises(DataError, match="more than once: 2.0.0, copy"):
        read_mimic(root.parent)
    split = next(root.glob("*-split.csv.gz"))
    table = pd.read_csv(split)
    table.drop(columns=["study_id", "split"]).to_csv(split, index=False)
    with pytest.raises(DataError, match="lacks the columns study_id, split.*should have dicom_id"):
        read_mimic(root)
    split.write_bytes(b"")
    with pytest.raises(DataError, match="split.csv.gz: cannot be read"):
        read_mimic(root)
    split.unlink()
    with pytest.raises(DataError, match=r"no table named \*-split.csv.gz"):
        read_mimic(root)


# ---------------------------------------------------------------- problems


def edit(tree, kind, change):
    "Change a table of a tree."
    path = next(tree["root"].glob(f"*-{kind}.csv.gz"))
    change(pd.read_csv(path, dtype=str, keep_default_na=False)).to_csv(path, index=False)


def rewrite(tree, change):
    "Change the texts of the archive: name -> bytes, or None for none."
    with zipfile.ZipFile(tree["reports"]) as archive:
        members = {i.filename: archive.read(i) for i in archive.infolist()}
    with zipfile.ZipFile(tree["reports"], "w") as archive:
        for name, raw in members.items():
            if (new := change(name, raw)) is not None:
                archive.writestr(name, new)


def test_problems_are_listed_and_the_rest_is_read(tmp_path):
    tree = make_mimic_jpg(tmp_path)
    root, good = tree["root"], listed(read_mimic(tree["root"]))
    ids = list(good)  # two of a study, three of the next, ...
    (root / "files" / good[ids[0]].image_path[0]).unlink()
    (root / "files" / good[ids[1]].image_path[0]).with_name("unknown.jpg").touch()
    edit(
        tree,
        "split",
        lambda t: pd.concat([t, t[t.dicom_id == ids[2]]]).assign(
            split=lambda t: t.split.where(t.dicom_id != ids[3], "training")
        ),
    )
    gone = {
        f"s{good[ids[5]].extra['study_id']}": None,
        f"s{good[ids[7]].extra['study_id']}": b"FINDINGS: 38 \xb0C",
        f"s{good[ids[10]].extra['study_id']}": b" \n",
    }
    rewrite(tree, lambda name, raw: gone.get(name[-13:-4], raw))
    raw = read_mimic(root)
    said = {(p.id, p.what.split(" (line")[0]) for p in raw.problems}
    names = list(gone)
    assert said == {
        (ids[0], "missing, and there is no .dcm either"),
        (ids[2], "the image occurs 2 times"),
        (ids[3], f"line {tree['table'].dicom_id.tolist().index(ids[3]) + 2}: split is 'training'"),
        (names[0], "there is no such report"),
        (names[1], "not UTF-8 (byte 13)"),
        (names[2], "empty report"),
    }
    lost = {ids[0], ids[2], ids[3]} | {
        i for i, s in good.items() if f"s{s.extra['study_id']}" in gone
    }
    assert listed(raw) == {i: s for i, s in good.items() if i not in lost}
    # one unknown, and those of bad rows
    assert raw.counts["images on disk that the table does not list"] == 3
    assert all(p.mend and p.path for p in raw.problems)


def test_byte_order_mark(tmp_path):
    tree = make_mimic_jpg(tmp_path)
    rewrite(tree, lambda name, raw: "\ufeffFindings: Clear.".encode())
    assert {s.report for s in read_mimic(tree["root"]).studies} == {"Clear."}


@pytest.mark.parametrize("damage", ["packed bytes", "checksum", "encrypted", "unknown method"])
def test_a_damaged_member_is_one_problem(tmp_path, damage):
    "The other reports of the archive are read."
    tree = make_mimic_jpg(tmp_path)
    good = listed(read_mimic(tree["root"]))
    with zipfile.ZipFile(tree["reports"]) as archive:
        member = archive.infolist()[0]
    raw = bytearray(tree["reports"].read_bytes())
    body, central = member.header_offset + 30 + len(member.filename), raw.index(b"PK\x01\x02")
    if damage == "packed bytes":
        raw[body : body + 4] = b"\xff" * 4
    if damage == "checksum":
        raw[central + 16] ^= 1
    if damage == "encrypted":
        raw[central + 8] |= 1
        raw[member.header_offset + 6] |= 1
    if damage == "unknown method":
        raw[central + 10] = raw[member.header_offset + 8] = 99
    tree["reports"].write_bytes(raw)
    found = read_mimic(tree["root"])
    assert [p.id for p in found.problems] == ["s50414267"]
    assert "cannot be read" in found.problems[0].what
    assert listed(found) == {i: s for i, s in good.items() if s.extra["study_id"] != 50414267}


def test_a_study_that_lost_an_image_is_no_example(tmp_path):
    tree = make_mimic_jpg(tmp_path)
    good = listed(read_mimic(tree["root"], examples="study"))
    ids = list(good)
    (tree["root"] / "files" / good[ids[0]].image_path[1]).unlink()
    doubled = Path(good[ids[1]].image_path[2]).stem
    edit(tree, "split", lambda t: pd.concat([t, t[t.dicom_id == doubled]]))
    raw = read_mimic(tree["root"], examples="study")
    assert [p.id for p in raw.problems] == [doubled, ids[0]]
    assert listed(raw) == {i: s for i, s in good.items() if i not in ids[:2]}


def test_a_patient_on_both_sides(tmp_path):
    "Training gives way to the test."
    tree = make_mimic_jpg(tmp_path)
    good, table = listed(read_mimic(tree["root"])), tree["table"]
    # with findings, as the other study of its patient
    third = table.study_id[table.report == MIMIC_REPORTS[2]].iloc[0]
    patient = str(table.subject_id[table.study_id == third].iloc[0])
    edit(tree, "split", lambda t: t.assign(split=t.split.where(t.study_id != str(third), "test")))
    raw = read_mimic(tree["root"])
    assert [p.what for p in raw.problems] == [f"patient {patient} is in test and train"]
    assert set(listed(raw)) == {
        i for i, s in good.items() if s.patient != patient or s.extra["study_id"] == third
    }


def test_unknown_views(tmp_path):
    "Without the second table the images are read, and it is said."
    tree = make_mimic_jpg(tmp_path)
    edit(tree, "metadata", lambda t: t.iloc[1:])
    raw = read_mimic(tree["root"])
    assert not raw.problems
    assert raw.studies[0].views == ("",)
    assert raw.counts["images of unknown view"] == 5
    edit(tree, "metadata", lambda t: t.drop(columns="ViewPosition"))
    raw = read_mimic(tree["root"])
    assert len(raw.studies) == 20 == raw.counts["images of unknown view"]
    assert [p.what for p in raw.problems] == ["lacks the column ViewPosition"]


# ---------------------------------------------------------------- Chen's file


def chens(tmp_path, tree, change=lambda entries: entries) -> Path:
    "Write some built examples in Chen's form."
    entries = [
        dict(
            id=s.id,
            study_id=s.extra["study_id"],
            subject_id=s.extra["subject_id"],
            report=s.report,
            image_path=list(s.image_path),
            split=s.split,
        )
        for s in read_mimic(tree["root"]).studies
    ]
    path = tmp_path / "chen.json"
    splits = {s: [e for e in change(entries) if e["split"] == s] for s in ("train", "val", "test")}
    path.write_text(json.dumps(splits))
    return path


def test_exactly_chens_examples(tmp_path):
    tree = make_mimic_jpg(tmp_path)

    def change(entries):
        entries[0]["report"] = "Other words."
        entries[1]["report"] = entries[1]["report"].replace(" ", "\n ")  # the same words
        for e in entries:
            if e["subject_id"] == entries[0]["subject_id"]:
                e["split"] = "val"
        return entries[:9]

    path = chens(tmp_path, tree, change)
    raw = read_mimic(tree["root"], chen=path)
    wanted = [e for entries in json.loads(path.read_text()).values() for e in entries]
    assert [(s.id, s.report, list(s.image_path), s.split, s.patient) for s in raw.studies] == [
        (e["id"], e["report"], e["image_path"], e["split"], str(e["subject_id"])) for e in wanted
    ]
    assert raw.studies[0].extra["study_id"] == wanted[0]["study_id"] and not raw.problems
    moved = sum(e["split"] == "val" for e in wanted)
    assert raw.counts == {
        "examples": 9,
        "images on disk": 24,
        "in Chen's file and built": 9,
        "only in Chen's file": 0,
        "only built": 11,
        "in both with the same text": 8,
        "in both with the same split": 9 - moved,
        "problems in what is compared with": 0,
    }


def test_chens_examples_without_tables_or_reports(tmp_path):
    tree = make_mimic_jpg(tmp_path)
    path = chens(tmp_path, tree)
    wanted = read_mimic(tree["root"], chen=path).studies
    tree["reports"].unlink()
    raw = read_mimic(tree["root"], chen=path)
    assert raw.studies == wanted
    assert raw.counts["could not be compared: no table or no reports"] == 1
    for table in tree["root"].glob("*.csv.gz"):
        table.unlink()
    assert read_mimic(tree["root"], chen=path).studies == wanted


def test_chens_problems(tmp_path):
    tree = make_mimic_jpg(tmp_path)

    def change(entries):
        entries[0]["image_path"] = ["../../secret.jpg"]
        entries[1]["report"] = ""
        return entries

    path = chens(tmp_path, tree, change)
    ids = [e["id"] for e in json.loads(path.read_text())["train"]]
    image = Path(json.loads(path.read_text())["train"][2]["image_path"][0])
    (tree["root"] / "files" / image).unlink()
    raw = read_mimic(tree["root"], chen=path)
    assert [(p.id, p.what.split(" '")[0]) for p in raw.problems] == [
        (ids[0], "image path"),
        (ids[1], "empty report"),
        (ids[2], "missing"),
    ]
    assert len(raw.studies) == 17 and raw.counts["problems in what is compared with"] == 1


# ---------------------------------------------------------------- mutations


def cut(path, rng):
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def spoil(path, rng):
    "Change a few bytes."
    raw = bytearray(path.read_bytes())
    for _ in range(rng.randrange(1, 6)):
        raw[rng.randrange(len(raw))] = rng.randrange(256)
    path.write_bytes(raw)


def plain(path, change):
    "Change the text of a packed table."
    path.write_bytes(gzip.compress(change(gzip.decompress(path.read_bytes()))))


def spoil_text(raw: bytes, rng) -> bytes:
    at = rng.randrange(len(raw))
    noise = rng.choice((b"\xff", b"\x00", b",", b"\n", b'"', b"\xc3", b"..", b""))
    return raw[:at] + noise + raw[at + rng.randrange(3) :]


def some(rng, things):
    return rng.choice(sorted(things))


def mutate(tree, rng) -> str:
    "Damage a tree in one random way; returns which."
    root, table = tree["root"], tree["table"]
    kind = rng.choice(("split", "metadata"))
    path = next(root.glob(f"*-{kind}.csv.gz"))
    image, folder = some(rng, root.glob("files/*/*/*/*.jpg")), some(rng, root.glob("files/*/*/*"))
    column = rng.choice(
        ["dicom_id", "subject_id", "study_id", "split" if kind == "split" else "ViewPosition"]
    )
    text = f"{mimic_folder(table.sample(1, random_state=rng.randrange(999)).iloc[0])}.txt"
    value = rng.choice(
        ("", "x", "None", "../../etc", "5041426", "1e7", "50414267.0", "é", "a" * 10_000)
    )

    def row(t):
        t.loc[rng.randrange(len(t)), column] = value
        return t

    kinds = {
        "no image": lambda: image.unlink(),
        "no study folder": lambda: shutil.rmtree(folder),
        "no patient": lambda: shutil.rmtree(folder.parent),
        "a file for a folder": lambda: (shutil.rmtree(folder), folder.touch()),
        "a folder for an image": lambda: (image.unlink(), image.mkdir()),
        "another name": lambda: image.rename(image.with_name("x.jpg")),
        "image elsewhere": lambda: image.rename(image.parent.parent / image.name),
        "foreign files": lambda: [
            (p / "notes.txt").touch() for p in (folder, folder.parent, root / "files")
        ],
        "cut table": lambda: cut(path, rng),
        "spoilt table": lambda: spoil(path, rng),
        "empty table": lambda: path.write_bytes(b""),
        "no table": lambda: path.unlink(),
        "table not packed": lambda: path.write_bytes(gzip.decompress(path.read_bytes())),
        "cut text of a table": lambda: plain(path, lambda r: r[: rng.randrange(len(r))]),
        "spoilt text of a table": lambda: plain(path, lambda r: spoil_text(r, rng)),
        "windows lines": lambda: plain(path, lambda r: r.replace(b"\n", b"\r\n")),
        "utf-8 mark": lambda: plain(path, lambda r: b"\xef\xbb\xbf" + r),
        "only a header": lambda: edit(tree, kind, lambda t: t[:0]),
        "no column": lambda: edit(tree, kind, lambda t: t.drop(columns=column)),
        "another column": lambda: edit(tree, kind, lambda t: t.rename(columns={column: "name"})),
        "doubled row": lambda: edit(
            tree, kind, lambda t: pd.concat([t, t.sample(1, random_state=rng.randrange(999))])
        ),
        "missing row": lambda: edit(tree, kind, lambda t: t.drop(index=rng.randrange(len(t)))),
        "wrong value": lambda: edit(tree, kind, row),
        "other order": lambda: edit(
            tree, kind, lambda t: t.sample(frac=1, random_state=rng.randrange(999))
        ),
        "other columns": lambda: edit(tree, kind, lambda t: t[t.columns[::-1]].assign(more="x")),
        "no report": lambda: rewrite(tree, lambda n, r: None if n == text else r),
        "empty report": lambda: rewrite(tree, lambda n, r: b"" if n == text else r),
        "bad bytes in a report": lambda: rewrite(
            tree, lambda n, r: spoil_text(r, rng) if n == text else r
        ),
        "no reports": lambda: rewrite(tree, lambda n, r: None),
        "noise for a report": lambda: rewrite(
            tree, lambda n, r: rng.randbytes(500) if n == text else r
        ),
        "endless report": lambda: rewrite(tree, lambda n, r: b"x" * 2_000_000 if n == text else r),
        "cut archive": lambda: cut(tree["reports"], rng),
        "spoilt archive": lambda: spoil(tree["reports"], rng),
        "no archive": lambda: tree["reports"].unlink(),
        "a folder for the archive": lambda: (tree["reports"].unlink(), tree["reports"].mkdir()),
    }
    name = rng.choice(sorted(kinds))
    kinds[name]()
    return name


def snapshot(base: Path) -> dict:
    return {
        str(p): (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else None)
        for p in sorted(base.rglob("*"))
    }


HARMLESS = {"foreign files", "windows lines", "utf-8 mark", "other order", "other columns"}
# the rest can be read
ROW_ONLY = {
    "no image",
    "no report",
    "doubled row",
    "missing row",
    "wrong value",
    "empty report",
    "endless report",
    "bad bytes in a report",
}
CHANGES_TEXT = {"bad bytes in a report", "noise for a report"}  # may be a report, though another
CHANGES_ROWS = {"missing row", "cut text of a table"}  # tables of fewer images are tables


def essence(s) -> tuple:
    "What must be right of a study even if its views, and so its images' order, are not known."
    return s.report, tuple(sorted(s.image_path)), s.split, s.patient


def check_mutation(template, tmp_path, seed, tree, good):
    "A damaged tree gives listed problems or a right read, and is left as it is."
    rng = random.Random(seed)
    shutil.copytree(template, tmp_path / "tree")

    def move(path):
        return tmp_path / "tree" / Path(path).relative_to(template)

    tree = dict(root=move(tree["root"]), reports=move(tree["reports"]), table=tree["table"])
    name = mutate(tree, rng)
    before, examples = snapshot(tmp_path), rng.choice(("image", "study"))
    try:
        raw = read_mimic(tree["root"], examples=examples)
    except DataError as e:
        assert e.problems and all(p.path and p.what and p.mend for p in e.problems)
        assert name not in HARMLESS | ROW_ONLY, (name, str(e))
    else:
        assert all(p.path and p.what and p.mend for p in raw.problems)
        assert all((raw.folder / p).exists() for s in raw.studies for p in s.image_path)
        found = {i: essence(s) for i, s in listed(raw).items()}
        wanted = {i: essence(s) for i, s in good[examples].items()}
        if name not in CHANGES_TEXT | CHANGES_ROWS:
            # a study without an image whose row names no study, which is listed
            for i in (i for i in found if found[i] != wanted.get(i)):
                assert name in ("wrong value", "spoilt text of a table"), (name, i)
                assert raw.problems, (name, i)
                assert set(found[i][1]) < set(wanted[i][1]), (name, i)
        if name not in CHANGES_TEXT | CHANGES_ROWS | {"only a header"}:
            assert raw.problems or found == wanted, name
        if name in HARMLESS:
            assert found == wanted and not raw.problems
    assert snapshot(tmp_path) == before
    return name


def run_mutations(tmp_path_factory, seeds):
    template = tmp_path_factory.mktemp("template")
    tree = make_mimic_jpg(template)
    good = {e: listed(read_mimic(tree["root"], examples=e)) for e in ("image", "study")}
    return {
        check_mutation(template, tmp_path_factory.mktemp("mutation"), seed, tree, good)
        for seed in seeds
    }


def test_mutations(tmp_path_factory):
    assert len(run_mutations(tmp_path_factory, range(40))) > 15  # kinds


@pytest.mark.full
def test_many_mutations(tmp_path_factory):
    assert len(run_mutations(tmp_path_factory, range(1000, 1200))) > 30


# ---------------------------------------------------------------- full size

READ = """
import json, resource, sys, time
start = time.time()
from cvt2distilgpt2.mimic import read_mimic
raw = read_mimic(sys.argv[1], examples=sys.argv[2])
seconds = time.time() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
splits = {s: sum(x.split == s for x in raw.studies) for s in ("train", "val", "test")}
found = dict(seconds=seconds, peak=peak, counts=raw.counts, problems=len(raw.problems))
print(json.dumps(found | dict(first=raw.studies[0].report, splits=splits)))
"""
IMAGES, STUDIES, PATIENTS = 377_110, 227_827, 65_379  # of MIMIC-CXR-JPG


def make_full(base: Path) -> dict:
    "Write a tree as large as the real one, of hard links to a few images and long reports."
    rng = np.random.default_rng(0)
    patient = np.sort(
        np.concatenate([np.arange(PATIENTS), rng.integers(0, PATIENTS, STUDIES - PATIENTS)])
    )
    study = np.sort(
        np.concatenate([np.arange(STUDIES), rng.integers(0, STUDIES, IMAGES - STUDIES)])
    )
    hexes = rng.integers(0, 2**32, (IMAGES, 5), dtype=np.uint32)
    subjects = 10_000_032 + patient[study] * 152
    of_hundred = patient[study] % 100
    kinds = np.full(IMAGES, "train", dtype=object)
    kinds[of_hundred == 0] = "validate"
    kinds[of_hundred == 1] = "test"
    table = pd.DataFrame(
        dict(
            dicom_id=["-".join(f"{v:08x}" for v in row) for row in hexes.tolist()],
            subject_id=subjects,
            study_id=50_000_000 + study * 43,
            split=kinds,
            ViewPosition=rng.choice(["AP", "PA", "LATERAL", "LL", ""], IMAGES),
        )
    )
    root = base / "mimic-cxr-jpg" / "2.0.0"
    # a file has at most 65,000 names
    sources = [base / f"{i}.jpg" for i in range(IMAGES // 60_000 + 1)]
    for i, path in enumerate(sources):
        _picture(path, i, (40, 32))
    last = None
    for i, row in enumerate(table.itertuples()):
        folder = root / mimic_folder(row)
        if folder != last:
            os.makedirs(folder, exist_ok=True)
        last = folder
        os.link(sources[i // 60_000], f"{folder}/{row.dicom_id}.jpg")
    write_mimic_tables(root, table)
    texts = base / "mimic-cxr" / "2.0.0" / "mimic-cxr-reports.zip"
    texts.parent.mkdir(parents=True)
    with zipfile.ZipFile(texts, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for i, row in enumerate(table.drop_duplicates("study_id").itertuples()):
            more = "No pleural effusion is seen, ___. " * (i % 20)
            line = f"Line {i} ends here: at {i % 24}:30. {more}The heart"
            text = MIMIC_REPORTS[i % 3].replace("The heart", line)
            archive.writestr(f"{mimic_folder(row)}.txt", text)
    return dict(root=root, reports=texts)


@pytest.mark.full
@pytest.mark.parametrize("unpacked", [False, True], ids=["zip", "folder"])
def test_full_size(tmp_path_factory, unpacked):
    "227,827 reports and 377,110 images are read within 5 minutes and 3 GiB."
    base = full_tree(tmp_path_factory)
    if unpacked:
        with zipfile.ZipFile(base / "mimic-cxr/2.0.0/mimic-cxr-reports.zip") as archive:
            archive.extractall(base / "mimic-cxr/2.0.0/mimic-cxr-reports")
        (base / "mimic-cxr/2.0.0/mimic-cxr-reports.zip").unlink()
    for examples in ("image", "study"):
        out = subprocess.run(
            [sys.executable, "-c", READ, str(base / "mimic-cxr-jpg/2.0.0"), examples],
            capture_output=True,
            text=True,
            timeout=900,
            env={**os.environ, "TQDM_DISABLE": "1"},
        )
        assert out.returncode == 0, out.stderr
        found = json.loads(out.stdout)
        print("reports unpacked" if unpacked else "reports in a zip", examples, found)
        assert found["seconds"] < 300 and found["peak"] < 3 * 2**30 and not found["problems"]
        assert found["counts"]["reports"] == STUDIES and found["counts"]["images on disk"] == IMAGES
        assert found["counts"]["examples"] == sum(found["splits"].values())
        assert min(found["splits"].values()) > 1000
        if examples == "study":
            assert found["counts"]["examples"] == found["counts"]["reports with findings"]


_made = []


def full_tree(tmp_path_factory) -> Path:
    "Make the large tree once."
    if not _made:
        _made.append(tmp_path_factory.mktemp("full"))
        make_full(_made[0])
    return _made[0]
