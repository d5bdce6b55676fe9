"""Made-up data for tests only: MIMIC-CXR and IU X-Ray as they are downloaded.

Both are also written in the one form in which Chen et al. (2020) selected them.
"""

import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

PHRASES = (
    "The heart size is normal.",
    "The lungs are clear.",
    "No pleural effusion or pneumothorax.",
    "Mild cardiomegaly is seen.",
    "There is a small left pleural effusion.",
    "Stable 5.5 cm nodule in the right upper lobe.",
    "No acute osseous abnormality.",
)


def _picture(path: Path, seed: int, size: tuple[int, int]) -> None:
    "Write a small grey picture, smooth enough for JPEG."
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 5), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path)


def _report(seed: int, removed: str) -> str:
    "Make a report of three sentences, with what stands where an identifier was removed."
    chosen = np.random.default_rng(seed).choice(PHRASES, 3, replace=False)
    return f"Compared to {removed}. " + " ".join(chosen)


def _write(root: Path, annotation: str, images: str, splits: dict) -> dict[str, str]:
    path = root / annotation
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(splits))
    return {"annotation": str(path), "images": str(root / images)}


def make_mimic(
    root: str | Path,  # stands for `data/`
    n: int = 8,  # training images; validation and test have 3 each
    size: tuple = (120, 100),  # width and height of an image
) -> dict[str, str]:  # `annotation` and `images`, to be given to `get_task`
    "Write MIMIC-CXR as Chen et al. selected it: an image is an entry, every second study has two."
    images = "mimic_cxr/images"
    splits = {}
    study = 0
    for split, count in (("train", n), ("val", 3), ("test", 3)):
        splits[split] = entries = []
        while len(entries) < count:
            study += 1
            subject, study_id = 10000000 + study, 50000000 + study
            report = _report(study, "___ exam.\n \n").replace(" The", "\n The")
            for image in range(1 + study % 2):
                dicom = "-".join(
                    f"{(study * 7919 + image * 104729 + k * 1299709) % 2**32:08x}" for k in range(5)
                )
                place = f"p{str(subject)[:2]}/p{subject}/s{study_id}/{dicom}.jpg"
                _picture(Path(root) / images / place, 2 * study + image, size)
                entries.append(
                    dict(
                        id=dicom,
                        study_id=study_id,
                        subject_id=subject,
                        report=report,
                        image_path=[place],
                        split=split,
                    )
                )
        del entries[count:]
    return _write(Path(root), "mimic_cxr/annotation.json", images, splits)


MIMIC_REPORTS = (  # made up; the headings' variety is in test_mimic
    "                                 FINAL REPORT\n"
    " EXAMINATION:  CHEST (PA AND LAT)\n \n"
    " INDICATION:  ___M with cough  // pneumonia?\n \n"
    " COMPARISON:  ___\n \n"
    " FINDINGS: \n \n"
    " The lungs are clear of\n focal consolidation.  The heart is normal.\n \n"
    " IMPRESSION: \n \n No acute process.\n",
    "                                 FINAL REPORT\n"
    " HISTORY:  Shortness of breath.\n \n"
    " IMPRESSION:  AP chest compared to ___:\n \n Mild edema is new.\n",
    "                                 FINAL REPORT\n"
    " CHEST, TWO VIEWS: ___\n \n"
    " HISTORY:  Fall.\n \n"
    " FINDINGS:  No pneumothorax is seen.\n",
)
MIMIC_VIEWS = (("PA", "LATERAL"), ("AP",), ("LATERAL", "AP", ""))


def mimic_images(patients: int) -> pd.DataFrame:
    """Make the table of a MIMIC-CXR.

    Every patient has two studies of one to three images; the last two patients are validation
    and test.
    """
    rows = []
    for study in range(2 * patients):
        patient = study // 2
        split = {patients - 1: "test", patients - 2: "validate"}.get(patient, "train")
        for image, view in enumerate(MIMIC_VIEWS[study % 3]):
            dicom = "-".join(
                f"{(study * 7919 + image * 104729 + (k + 1) * 1299709) % 2**32:08x}"
                for k in range(5)
            )
            row = dict(
                dicom_id=dicom,
                subject_id=10000032 + 1100000 * patient,
                study_id=50414267 + 1009 * study,
                split=split,
                ViewPosition=view,
                report=MIMIC_REPORTS[study % 3],
            )
            rows.append(row)
    return pd.DataFrame(rows)


def write_mimic_tables(root: Path, table: pd.DataFrame, packed: bool = True) -> None:
    "Write the two tables as PhysioNet does, columns in order; both versions name them 2.0.0."
    suffix = "csv.gz" if packed else "csv"
    table[["dicom_id", "study_id", "subject_id", "split"]].to_csv(
        root / f"mimic-cxr-2.0.0-split.{suffix}", index=False
    )
    rest = dict(
        PerformedProcedureStepDescription="CHEST (PA AND LAT)",
        Rows=3056,
        Columns=2544,
        StudyDate=21800506,
        StudyTime=213014.531,
        ProcedureCodeSequence_CodeMeaning="CHEST (PA AND LAT)",
        ViewCodeSequence_CodeMeaning="",
        PatientOrientationCodeSequence_CodeMeaning="Erect",
    )
    names = [
        "dicom_id",
        "subject_id",
        "study_id",
        "PerformedProcedureStepDescription",
        "ViewPosition",
        "Rows",
        "Columns",
        "StudyDate",
        "StudyTime",
        "ProcedureCodeSequence_CodeMeaning",
        "ViewCodeSequence_CodeMeaning",
        "PatientOrientationCodeSequence_CodeMeaning",
    ]
    table.assign(**rest)[names].to_csv(root / f"mimic-cxr-2.0.0-metadata.{suffix}", index=False)


def mimic_folder(row) -> str:
    "Return where a study's images lie; its report has the same name with `.txt`."
    return f"files/p{str(row.subject_id)[:2]}/p{row.subject_id}/s{row.study_id}"


def make_mimic_jpg(
    base: str | Path,  # holds both downloads, as `wget` from PhysioNet leaves them
    patients: int = 6,  # of two studies each; with three, one has an impression only
    version: str = "2.0.0",  # of MIMIC-CXR-JPG: "2.0.0" or "2.1.0"
    packed: bool = True,  # the tables by gzip
    zipped: bool = True,  # the reports
    size: tuple = (40, 32),  # width and height of an image
) -> dict:  # `root`, `reports` and `table`
    "Write MIMIC-CXR-JPG and the reports of MIMIC-CXR in PhysioNet's layout."
    root = Path(base) / "mimic-cxr-jpg" / version
    texts = Path(base) / "mimic-cxr" / "2.0.0"
    texts.mkdir(parents=True)
    table = mimic_images(patients)
    for i, row in enumerate(table.itertuples()):
        _picture(root / mimic_folder(row) / f"{row.dicom_id}.jpg", i, size)
    write_mimic_tables(root, table, packed)
    for name in (
        "LICENSE.txt",
        "README",
        "SHA256SUMS.txt",
        "mimic-cxr-2.0.0-chexpert.csv.gz",
        "mimic-cxr-2.0.0-negbio.csv.gz",
    ):
        (root / name).touch()
    (root / "IMAGE_FILENAMES").write_text(
        "".join(f"{mimic_folder(r)}/{r.dicom_id}.jpg\n" for r in table.itertuples())
    )
    if version == "2.1.0":
        (root / "mimic-cxr-2.1.0-test-set-labeled.csv").write_text("study_id,Edema\n")
    reports = {
        f"{mimic_folder(r)}.txt": r.report for r in table.drop_duplicates("study_id").itertuples()
    }
    place = texts / ("mimic-cxr-reports.zip" if zipped else "mimic-cxr-reports")
    if zipped:
        with zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, text in reports.items():
                archive.writestr(name, text)
    else:
        for name, text in reports.items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_text(text)
    return dict(root=root, reports=place, table=table)


def make_iu(
    root: str | Path,  # stands for `data/`
    n: int = 8,  # training studies; validation and test have 3 each
    size: tuple = (100, 120),  # width and height of an image
) -> dict[str, str]:  # `annotation` and `images`, to be given to `get_task`
    "Write IU X-Ray as Chen et al. selected and renamed it: every study has two images."
    images = "iu_x_ray/images"
    splits = {}
    study = 0
    for split, count in (("train", n), ("val", 3), ("test", 3)):
        splits[split] = []
        for _ in range(count):
            study += 1
            name = f"CXR{study}_IM-{study:04d}"
            paths = [f"{name}/{i}.png" for i in range(2)]
            for i, path in enumerate(paths):
                _picture(Path(root) / images / path, 2 * study + i, size)
            splits[split].append(
                dict(id=name, report=_report(study, "XXXX"), image_path=paths, split=split)
            )
    return _write(Path(root), "iu_x_ray/annotation.json", images, splits)


def openi_xml(number: int, images: list[str], **sections: str) -> bytes:
    "Write a report as Open-i does, with odd indentation and unused parts; `sections` by name."
    texts = "".join(
        f'\n         \n            <AbstractText Label="{name.upper()}">{text}</AbstractText>'
        for name, text in sections.items()
    )
    parents = "".join(
        f"""
   <parentImage id="{image}">
      <figureId>F{k}</figureId>
      <caption>Xray Chest PA and Lateral</caption>
      <panel type="single">
         <url>/hadoop/storage/radiology/extract/{image}.jpg</url>
         <imgModality>7</imgModality>
      </panel>
   </parentImage>"""
        for k, image in enumerate(images, 1)
    )
    return f"""<?xml version="1.0" encoding="utf-8"?>
<eCitation>
   <meta type="rr"/>
   <uId id="CXR{number}"/>
   <pmcId id="{number}"/>
   <docSource>CXR</docSource>
   <licenseURL>http://creativecommons.org/licenses/by-nc-nd/4.0/</licenseURL>
   <title>Indiana University Chest X-ray Collection</title>
   <MedlineCitation Owner="Indiana University" Status="supplied by publisher">
      <Article PubModel="Electronic">
         <Abstract>{texts}

         </Abstract>
         <Affiliation>Indiana University</Affiliation>
      </Article>
   </MedlineCitation>
   <MeSH>
      <major>Spine/degenerative</major>
      <automatic>degenerative change</automatic>
   </MeSH>{parents}
</eCitation>""".encode()


def _image_count(number: int) -> int:
    "Return how many images a made-up report has: every fifth one, every sixth three, others two."
    if number % 5 == 0:
        return 1
    return 3 if number % 6 == 0 else 2


def openi_files(n: int = 12) -> tuple[dict[str, bytes], dict[str, bytes]]:
    "Make the members of the two archives; every fourth report has no findings."
    reports, pictures = {"ecgen-radiology/": b""}, {}
    for number in range(1, n + 1):
        ks = range(1, _image_count(number) + 1)
        # Open-i has both forms
        tails = [f"{k}001" if number % 3 else f"0001-000{k}" for k in ks]
        start = f"CXR{number}_1" if number == 1 else f"CXR{number}"
        images = [f"{start}_IM-{number % 7:04d}-{tail}" for tail in tails]
        findings = "" if number % 4 == 0 else _report(number, "XXXX")
        reports[f"ecgen-radiology/{number}.xml"] = openi_xml(
            number,
            images,
            comparison="None.",
            indication="XXXX-year-old, cough.",
            findings=findings,
            impression="No acute disease.",
        )
        for k, image in enumerate(images):
            rng = np.random.default_rng(10 * number + k)
            buffer = io.BytesIO()
            pixels = rng.integers(0, 256, (24, 20), dtype=np.uint8)
            Image.fromarray(pixels).save(buffer, "PNG")
            pictures[f"{image}.png"] = buffer.getvalue()
    return reports, pictures


def pack(path: Path, files: dict, compresslevel: int = 6) -> Path:
    """Write a .tgz of bytes by name.

    A name that ends in / is a folder, and a TarInfo in place of bytes is taken as it is.
    """
    with tarfile.open(path, "w:gz", compresslevel=compresslevel) as tar:
        for name, data in files.items():
            entry = data if isinstance(data, tarfile.TarInfo) else tarfile.TarInfo(name)
            if entry is not data:
                entry.size = len(data)
            if name.endswith("/"):
                entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(entry, io.BytesIO(data) if entry is not data else None)
    return path


def make_openi(
    root: str | Path,  # the folder to fill
    n: int = 12,  # reports; of twelve, seven are selected
    packed: bool = True,  # as two archives, or as what they unpack to
) -> Path:  # the same folder
    "Write IU X-Ray in Open-i's layout."
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    reports, pictures = openi_files(n)
    if packed:
        pack(root / "NLMCXR_reports.tgz", reports)
        pack(root / "NLMCXR_png.tgz", pictures)
    else:
        files = {**reports, **{f"NLMCXR_png/{name}": data for name, data in pictures.items()}}
        for name, data in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            if name.endswith("/"):
                (root / name).mkdir(exist_ok=True)
            else:
                (root / name).write_bytes(data)
    return root


def make_kaggle(
    root: str | Path,  # the folder to fill
    n: int = 12,  # reports; of twelve, seven are selected
) -> Path:  # the same folder
    "Write IU X-Ray as Kaggle has it; every fourth report has no findings."
    root = Path(root)
    reports, projections = [], []
    for number in range(1, n + 1):
        for k in reversed(range(_image_count(number))):
            name = f"{number}_IM-{number % 7:04d}-{k + 1}001.dcm.png"
            _picture(root / "images" / "images_normalized" / name, 10 * number + k, (24, 20))
            projections.append((number, name, "Lateral" if k == 1 else "Frontal"))
        findings = "" if number % 4 == 0 else _report(number, "XXXX")
        row = dict(
            uid=number,
            MeSH="Cardiomegaly/mild;Spine/degenerative",
            Problems="Cardiomegaly",
            image="Xray Chest PA and Lateral",
            indication="XXXX-year-old, cough.",
            comparison="None.",
            findings=findings,
            impression="No acute disease.",
        )
        reports.append(row)
    pd.DataFrame(reports).to_csv(root / "indiana_reports.csv", index=False)
    pd.DataFrame(projections, columns=["uid", "filename", "projection"]).to_csv(
        root / "indiana_projections.csv", index=False
    )
    return root
