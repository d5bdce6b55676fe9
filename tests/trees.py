"""Made-up data for tests only: MIMIC-CXR and IU X-Ray in the one form, as Chen et al. (2020) selected them."""
import json
from pathlib import Path

import numpy as np
from PIL import Image

PHRASES = ("The heart size is normal.", "The lungs are clear.", "No pleural effusion or pneumothorax.", "Mild cardiomegaly is seen.",
           "There is a small left pleural effusion.", "Stable 5.5 cm nodule in the right upper lobe.", "No acute osseous abnormality.")


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
    path = root/annotation
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(splits))
    return {"annotation": str(path), "images": str(root/images)}


def make_mimic(
    root: str | Path,              # stands for `data/`
    n: int = 8,                    # training images; validation and test have 3 each
    size: tuple = (120, 100),      # width and height of an image
) -> dict[str, str]:               # `annotation` and `images`, to be given to `get_task`
    "Write MIMIC-CXR as Chen et al. selected it: an image is an entry, every second study has two."
    images = "mimic_cxr/images"
    splits, study = {}, 0
    for split, count in (("train", n), ("val", 3), ("test", 3)):
        splits[split] = entries = []
        while len(entries) < count:
            study += 1
            subject, study_id = 10000000 + study, 50000000 + study
            report = _report(study, "___ exam.\n \n").replace(" The", "\n The")
            for image in range(1 + study % 2):
                dicom = "-".join(f"{(study*7919 + image*104729 + k*1299709) % 2**32:08x}" for k in range(5))
                place = f"p{str(subject)[:2]}/p{subject}/s{study_id}/{dicom}.jpg"
                _picture(Path(root)/images/place, 2*study + image, size)
                entries.append(dict(id=dicom, study_id=study_id, subject_id=subject, report=report, image_path=[place], split=split))
        del entries[count:]
    return _write(Path(root), "mimic_cxr/annotation.json", images, splits)


def make_iu(
    root: str | Path,         # stands for `data/`
    n: int = 8,               # training studies; validation and test have 3 each
    size: tuple = (100, 120), # width and height of an image
) -> dict[str, str]:          # `annotation` and `images`, to be given to `get_task`
    "Write IU X-Ray as Chen et al. selected and renamed it: every study has two images."
    images, splits, study = "iu_x_ray/images", {}, 0
    for split, count in (("train", n), ("val", 3), ("test", 3)):
        splits[split] = []
        for _ in range(count):
            study += 1
            name = f"CXR{study}_IM-{study:04d}"
            paths = [f"{name}/{i}.png" for i in range(2)]
            for i, path in enumerate(paths): _picture(Path(root)/images/path, 2*study + i, size)
            splits[split].append(dict(id=name, report=_report(study, "XXXX"), image_path=paths, split=split))
    return _write(Path(root), "iu_x_ray/annotation.json", images, splits)
