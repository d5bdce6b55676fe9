"The statistics of reports against plain counting; the notebook on tasks that lack some things."

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cvt2distilgpt2.data import (
    FINDING_WORDS,
    UNKNOWN,
    Labels,
    clean_report,
    copies_of_training,
    find_findings,
    most_frequent_sentences,
    report_table,
    split_sentences,
    texts_of,
    unknown_by_threshold,
    word_counts,
)
from cvt2distilgpt2.iu import REPORTS, packaged
from cvt2distilgpt2.prepare import build
from cvt2distilgpt2.tasks import RawData, Study, get_task, read_annotation, write_annotation

ROOT = Path(__file__).resolve().parent.parent
WORDS = [*"no effusion heart Lungs clear œdème 肺 5.5 2. XXXX right-sided ..".split(), "\n"]


def random_texts(n, seed):
    rng = random.Random(seed)
    texts = []
    for i in range(n):
        words = rng.choices([*WORDS, f"once{i}"], k=rng.randint(1, 14))
        texts.append(" ".join(words) + rng.choice([".", "", "!", "  "]))
    return texts


@pytest.fixture
def studies():
    "Several references in training, an empty validation split."
    texts = random_texts(90, 0)
    pairs = zip(texts[:30], texts[30:60], strict=True)
    train = [Study(f"t{i}", a, ("x.png",), "train", (a, b)) for i, (a, b) in enumerate(pairs)]
    tested = texts[60:] + texts[:5]
    test = [Study(f"e{i}", text, ("x.png",), "test") for i, text in enumerate(tested)]
    return {"train": train, "val": [], "test": test}


@pytest.mark.parametrize("style, length", [(None, 60), ("iu_x_ray", 8), ("mimic_cxr", 5)])
def test_report_table_against_plain_counting(studies, style, length):
    texts = {
        s: [r for x in found for r in (x.reports or [x.report])] for s, found in studies.items()
    }
    labels = Labels(texts["train"], style, threshold=3, max_length=length)
    table = report_table(studies, labels)
    assert table.index.tolist() == ["train", "test"]
    train = [labels(r) for r in texts["train"]]
    for split, row in table.iterrows():
        made = [labels(r) for r in texts[split]]
        cleaned = [clean_report(r, style) if style else r for r in texts[split]]
        whole = pd.Series([len(r.split()) for r in cleaned])
        kept = [w for m in made for w in m.split()]
        assert (row["reports"], row["distinct"]) == (len(made), len(set(made)))
        assert row["most"] == whole.max()
        assert row["median"] == int(whole.median()) and row["95 %"] == int(whole.quantile(0.95))
        assert row["cut"] == pytest.approx((whole > length - 1).mean() if style else 0)
        assert row["unknown"] == pytest.approx(kept.count(UNKNOWN) / len(kept) if style else 0)
        copies = [any(" ".join(m.split()) == " ".join(t.split()) for t in train) for m in made]
        wanted = np.nan if split == "train" else np.mean(copies)
        assert row["copies"] == pytest.approx(wanted, nan_ok=True)
    assert table.loc["test", "copies"] > 0
    assert not style or 0 < table.loc["test", "unknown"] < 1


def test_cut_is_what_the_labels_lose(studies):
    labels = Labels(texts_of(studies["train"]), "iu_x_ray", threshold=1, max_length=6)
    lost = [
        len(labels(r).split()) < len(clean_report(r, "iu_x_ray").split())
        for r in texts_of(studies["train"])
    ]
    assert 0 < np.mean(lost) < 1
    assert report_table(studies, labels).loc["train", "cut"] == np.mean(lost)


def test_copies_against_comparison_in_pairs():
    train, others = random_texts(40, 1), random_texts(40, 2)
    others += [t.replace(" ", "  \n") for t in train[:7]] + [train[0] + " More."]
    expected = [any(o.split() == t.split() for t in train) for o in others]
    assert copies_of_training(others, train) == expected and 7 <= sum(expected) < 40


def test_unknown_words_are_those_that_labels_replace(studies):
    counts = {split: word_counts(texts_of(found), "iu_x_ray") for split, found in studies.items()}
    table = unknown_by_threshold(counts, [1, 3, 10])
    for threshold, row in table.iterrows():
        labels = Labels(texts_of(studies["train"]), "iu_x_ray", threshold, max_length=10**6)
        assert row["vocabulary"] == len(labels.vocabulary) - 1  # without <unk>
        for split, found in studies.items():
            words = [w for r in texts_of(found) for w in labels(r).split()]
            assert row[split] == pytest.approx(words.count(UNKNOWN) / max(len(words), 1))
    assert table.loc[10, "test"] > 0


def test_words_against_scikit_learn():
    text = pytest.importorskip("sklearn.feature_extraction.text")
    texts = random_texts(200, 3)
    texts = [t.replace("right-sided", "right sided").replace("5.5", "55") for t in texts]
    counter = text.CountVectorizer(token_pattern=r"(?u)\b\w+\b")
    total = np.asarray(counter.fit_transform(texts).sum(axis=0)).ravel()
    assert word_counts(texts) == Counter({w: int(total[i]) for w, i in counter.vocabulary_.items()})


def test_most_frequent_sentences_against_pandas():
    phrases = [
        "The heart is normal.",
        "No  effusion!",
        "Lungs clear.",
        "Nodule of 5.5 mm?",
        "2.",
        "肺野清晰。",
    ]
    rng = random.Random(0)
    weights = [9, 5, 3, 2, 2, 1]
    reports = [" ".join(rng.choices(phrases, weights, k=rng.randint(1, 6))) for _ in range(300)]
    clean = {p: " ".join(p.lower().split()).rstrip(".!?。") for p in phrases if p != "2."}
    said = []
    for i, report in enumerate(reports):
        for phrase, sentence in clean.items():
            said += [(i, sentence)] * report.count(phrase)
    said = pd.DataFrame(said, columns=["report", "sentence"])
    table = most_frequent_sentences(reports).set_index("sentence")
    assert table.times.to_dict() == said.sentence.value_counts().to_dict()
    assert table.times.is_monotonic_decreasing
    shares = said.groupby("sentence").report.nunique() / 300
    assert table.reports.to_dict() == pytest.approx(shares.to_dict())
    words = said.sentence.str.split().str.len()
    shares = [words[said.sentence == s].sum() / words.sum() for s in table.index]
    assert np.diff(table.words, prepend=0).tolist() == pytest.approx(shares)
    assert table.words.iloc[-1] == pytest.approx(1)
    assert len(most_frequent_sentences(reports, 2)) == 2
    assert most_frequent_sentences(reports, 2).words.tolist() == table.words.head(2).tolist()


def test_no_sentence_is_a_table_too():
    assert split_sentences(" 1. 2.\n\n---") == [] and most_frequent_sentences(["1.", ""]).empty


STATED = (
    "There is {}.",
    "Mild {} is noted.",
    "Findings: {}, not changed.",
    "No change in the {}.",
    "No fever, but {}.",
)
DENIED = (
    "No {}.",
    "There is no definite {}.",
    "{} is not seen.",
    "{} has resolved.",
    "Without focal {} or other disease.",
    "Negative for {}.",
    "Free of {}.",
)
EXAMPLES = {
    "cardiomegaly": "cardiomegaly",
    "pleural effusion": "pleural effusion",
    "pneumothorax": "pneumothorax",
    "opacity": "airspace opacity",
    "consolidation": "consolidation",
    "pneumonia": "pneumonia",
    "edema": "pulmonary oedema",
    "atelectasis": "atelectasis",
    "emphysema": "emphysema",
    "fracture": "rib fracture",
    "nodule": "nodule",
    "mass": "mass",
    "endotracheal tube": "endotracheal tube",
    "central line": "central venous catheter",
    "pacemaker": "pacemaker",
}


@pytest.mark.parametrize("finding", FINDING_WORDS)
def test_findings_stated_and_denied(finding):
    words = EXAMPLES[finding]
    for form in STATED:
        assert find_findings(form.format(words).upper()) == {finding: True}, form
    for form in DENIED:
        assert find_findings(form.format(words)) == {finding: False}, form
    assert find_findings(f"No {words}. Later, {words} is seen.") == {finding: True}


def test_findings_against_what_phantoms_have():
    from cvt2distilgpt2.phantom import sample_phantom

    counts = Counter()
    names = [n for n in FINDING_WORDS if n not in ("opacity", "pneumonia", "emphysema")]
    for seed in range(600):
        phantom = sample_phantom(seed)
        said = find_findings(phantom.report)
        drawn = {f.type for f in phantom.findings}
        counts.update((name in drawn, said.get(name, False)) for name in names)
    both, extra, missed = counts[True, True], counts[False, True], counts[True, False]
    assert both > 300 and extra == 0 and missed < 0.03 * both


def test_findings_of_any_text_end():
    rng = random.Random(1)
    pieces = [*EXAMPLES.values(), *"no not seen but . ; heart enlarged É ...".split(), "\n"]
    for _ in range(2000):
        found = find_findings(" ".join(rng.choices(pieces, k=rng.randint(0, 40))))
        assert set(found) <= set(FINDING_WORDS) and set(found.values()) <= {True, False}


# the notebook


def make_task(folder, entries, images=True):
    "Write a task of (split, text, fields) entries with tiny pictures."
    (folder / "images").mkdir(parents=True)
    studies = []
    for i, (split, text, more) in enumerate(entries):
        paths = tuple(f"{i}-{k}.png" for k in range(more.pop("n", 1)))
        for k, p in enumerate(paths):
            pixels = np.random.default_rng(i + k).integers(0, 256, (40, 48), np.uint8)
            Image.fromarray(pixels).save(folder / "images" / p)
        studies.append(Study(f"study{i}", text, paths, split, **more))
    write_annotation(studies, folder / "annotation.json")
    return folder


CAPTIONS = (
    "A man rides a bicycle along the road.",
    "Two dogs play in the snow.",
    "Ein Hund läuft über die Wiese.",
    "猫が窓のそばで寝ている。",
    "A red bus near a tall building!",
)


def captioned(i, split):
    "Make an entry with several references."
    references = tuple(CAPTIONS[(i + k) % 5] for k in (0, 1, 3))
    return split, references[0], dict(reports=references)


def complete(i, split):
    "Make an entry that has all fields."
    history = "" if i % 3 else "Cough"
    fields = dict(
        n=1 + i % 2,
        patient=f"p{i // 2}",
        views=("frontal", "lateral")[: 1 + i % 2],
        findings=({"type": "nodule"},),
        extra={"impression": "Nodule.", "history": history, "study_id": i // 2},
    )
    return split, f"No effusion. Small nodule {i}.", fields


def entries_of(make, **counts):
    "Make so many entries for each split, numbered throughout."
    splits = [split for split, n in counts.items() for _ in range(n)]
    return [make(i, split) for i, split in enumerate(splits)]


TASKS = {
    "several references": entries_of(captioned, train=12, val=3, test=3),
    "one study": [("train", "The lungs are clear. No effusion.", {})],
    "all there is": entries_of(complete, train=8, test=4),
    "no sentences": [("train", "1 2 3", {}), ("train", "4", {}), ("val", "5", {})],
    "other findings": [
        (s, CAPTIONS[i % 5], dict(findings=({"type": "dog"},) if i % 2 else ()))
        for i, s in enumerate(["train"] * 6 + ["test"] * 2)
    ],
}


def explore(task, out, home, **given):
    given = dict(task=task, resize=40, image_size=32) | given
    words = [w for n, v in given.items() for w in ("-p", n, str(v))]
    papermill = [sys.executable, "-m", "papermill", "--no-progress-bar"]
    command = [*papermill, str(ROOT / "nbs" / "00d_data.ipynb"), str(out), *words]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = {"PYTHONPATH": path, "TQDM_DISABLE": "1", "CVT2DISTILGPT2_HOME": str(home)}
    done = subprocess.run(
        command,
        cwd=ROOT / "nbs",
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | env,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    cells = nbformat.read(out, as_version=4).cells
    outputs = [o.get("data", {}) for c in cells for o in c.get("outputs", ())]
    shown = [str(data.get("text/markdown") or data.get("text/plain", "")) for data in outputs]
    return "\n".join(shown), pd.read_csv(next((home / "runs").rglob("data.csv")), index_col="split")


@pytest.mark.full
@pytest.mark.parametrize("name", TASKS)
def test_notebook_explores_what_is_there(name, tmp_path):
    entries = [(s, t, dict(m)) for s, t, m in TASKS[name]]
    shown, table = explore(make_task(tmp_path / "task", entries), tmp_path / "out.ipynb", tmp_path)
    references = Counter(s for s, _, m in TASKS[name] for _ in m.get("reports", "x"))
    assert table.reports.to_dict() == references
    fields = {n for _, _, m in TASKS[name] for n in m}
    lacking = [n for n in ("patient", "views", "findings", "reports") if n not in fields]
    assert f"Not given in this task: {', '.join(lacking)}." in shown
    assert ("This task keeps no sections" in shown) != (name == "all there is")
    of_chests = name in ("one study", "all there is")
    assert ("Few reports speak of findings of the chest" in shown) != of_chests
    if name == "all there is":
        assert "12 entries are 6 studies." in shown and "history" in shown and "impression" in shown


@pytest.mark.full
def test_notebook_lists_problems_and_selection(tmp_path):
    entries = [("train", "No effusion. Clear lungs.", {}) for _ in range(4)]
    task = make_task(tmp_path / "task", entries)
    problems = "id,path,what,mend\na,a.png,missing,Fetch it.\nb,b.png,missing,Fetch it.\n"
    (task / "problems.csv").write_text(problems)
    prepared = {"state": "whole", "counts": {"reports without findings": 77}}
    (task / "prepared.json").write_text(json.dumps(prepared))
    shown, _ = explore(task, tmp_path / "out.ipynb", tmp_path)
    assert "2 problems are listed, of 2 entries" in shown and "77" in shown


@pytest.mark.full
def test_notebook_explores_a_cache(tmp_path):
    entries = [("train", "No effusion. Clear lungs.", {}) for _ in range(4)]
    raw = make_task(tmp_path / "raw", entries)
    studies = [s for found in read_annotation(raw / "annotation.json").values() for s in found]
    task = get_task(str(tmp_path / "task"), resize=36, image_size=32)
    build(RawData(studies, raw / "images", counts={"reports": 5}), task, processes=1)
    shown, table = explore(tmp_path / "task", tmp_path / "out.ipynb", tmp_path, resize=36)
    assert table.reports.to_dict() == {"train": 4} and "what was chosen from" in shown
    # the cache's images, not the originals'
    assert "Short sides are from 36 to 36 pixels; 0% are enlarged to 36." in shown


@pytest.mark.full
def test_notebook_explores_the_reports_of_iu_without_images(tmp_path):
    if not packaged(REPORTS):
        pytest.skip("the package torchxrayvision, which has the reports, is not installed")
    shown, table = explore("iu_x_ray", tmp_path / "out.ipynb", tmp_path)
    assert table.reports.to_dict() == {"train": 2069, "val": 296, "test": 590}
    assert set(table.profile) == {"chen"}
    assert "Its images are not there" in shown
    assert 700 < table.vocabulary["train"] < 800 and 0.05 < table.cut["train"] < 0.1
