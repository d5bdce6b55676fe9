"""Labels, pixels and batches against plain implementations; the notebook on all kinds of task."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms as v1
from torchvision.transforms import v2
from trees import make_iu, make_mimic

from cvt2distilgpt2.cache import build_cache
from cvt2distilgpt2.data import (
    MEAN,
    STD,
    ImageFolder,
    Labels,
    ReportDataset,
    TextLists,
    clean_report,
    collate,
    image_transform,
    make_labels,
    normalise,
    random_numbers_of,
    show_studies,
    transform_image,
)
from cvt2distilgpt2.images import open_image
from cvt2distilgpt2.tasks import DataError, Study, get_task, open_task

DATA = os.environ.get("CVT2DISTILGPT2_TEST_DATA")
NO_DATA = "CVT2DISTILGPT2_TEST_DATA does not name the folder of the test data"
needs_data = pytest.mark.skipif(not DATA, reason=NO_DATA)
ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)


# labels


def random_reports(n, seed=0):
    "Texts that are mostly what the cleaning looks for."
    rng = np.random.default_rng(seed)
    words = ["The", "heart", "is", "5.5", "XXXX"]
    numbers = ["1. ", "2. ", ". 3. ", " 4. ", "10. "]
    runs = ["..", "....", ". ", ".", " ", "  ", "\n", "_", "___", "__________"]
    marks = [", ", "(mild)", "/", "\\", '"', "'", "right-sided", "%", "#2", ";", "É", "µm", "¿"]
    parts = [*words, *numbers, *runs, *marks]
    return ["".join(rng.choice(parts, rng.integers(0, 25))) for _ in range(n)]


def clean_by_rules(report, style):
    "Clean a report by regular expressions, rule after rule of Chen et al.'s documented cleaning."
    if style == "mimic_cxr":
        report = report.replace("\n", " ")
        # n halvings: what stays of a run of k
        for run, to, halvings in (("_", "_", 7), (" ", " ", 6), (r"\.", ".", 8)):

            def shorten(found, to=to, halvings=halvings):
                k = len(found.group())
                for _ in range(halvings):
                    k = (k + 1) // 2
                return to * k

            report = re.sub(f"{run}+", shorten, report)
    else:
        report = re.sub(r"\.+", lambda found: "." * -(-len(found.group()) // 8), report)
    report = re.sub(r"1\. ", "", report)
    for before in (r"\. ", " "):
        for n in "2345":
            report = re.sub(f"{before}{n}\\. ", ". ", report)
    pieces = [
        re.sub(r"[.,?;*!%^&_+():<=>@\[\]{}]", "", re.sub(r"[\"/\\']", "", piece).strip())
        for piece in report.strip().lower().split(". ")
    ]
    return " . ".join(pieces) + " ."


@pytest.mark.parametrize("style", ["iu_x_ray", "mimic_cxr"])
def test_cleaning_against_rules(style):
    reports = random_reports(5000)
    assert [clean_report(r, style) for r in reports] == [clean_by_rules(r, style) for r in reports]
    assert sum(clean_report(r, "iu_x_ray") != clean_report(r, "mimic_cxr") for r in reports) > 500


@pytest.mark.parametrize("style", ["iu", "", None, "MIMIC_CXR"])
def test_unknown_style(style):
    with pytest.raises(ValueError, match="iu_x_ray, mimic_cxr"):
        clean_report("Clear.", style)


def test_labels_use_training_words_only():
    train = random_reports(300)
    labels = Labels(train, "mimic_cxr", threshold=10, max_length=20)
    counts = {}
    for r in train:
        for w in clean_report(r, "mimic_cxr").split():
            counts[w] = counts.get(w, 0) + 1
    assert set(labels.vocabulary) == {w for w, n in counts.items() if n >= 10} | {"<unk>"}
    assert list(labels.vocabulary) == sorted(labels.vocabulary)
    for r in random_reports(300, seed=1):
        words, cleaned = labels(r).split(), clean_report(r, "mimic_cxr").split()
        assert len(words) == min(19, len(cleaned))
        known = [c if counts.get(c, 0) >= 10 else "<unk>" for c in cleaned]
        assert words == known[:19]


@pytest.mark.parametrize(
    "name, profile, threshold, words",
    [
        ("iu_x_ray", "chen", 3, 59),
        ("mimic_cxr", "chen", 3, 59),
        ("iu_x_ray", "r2gen", 3, 59),
        ("mimic_cxr", "r2gen", 10, 99),
    ],
)
def test_profiles(name, profile, threshold, words):
    train = ["often " * threshold, "seldom " * (threshold - 1)]
    labels = make_labels(get_task(name, profile=profile), train)
    assert labels("often seldom").split()[:2] == ["often", "<unk>"]
    assert len(labels("often " * 500).split()) == words


# pixels


def published(task, train):
    "torchvision's first transforms, as the published system composes them."
    before = [v1.Lambda(lambda i: i.convert("RGB")), v1.Resize(task.resize)]
    place = [v1.CenterCrop(task.image_size)]
    if train:
        place = [v1.RandomCrop(task.image_size), v1.RandomRotation(task.rotation)]
    return v1.Compose([*before, *place, v1.ToTensor(), v1.Normalize(MEAN, STD)])


SIZES = [(500, 448), (448, 700), (300, 200), (1000, 900), (448, 448), (17, 40)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_transforms_are_the_published_ones(size, mode):
    task = get_task("mimic_cxr")
    channels = () if mode == "L" else (3,)
    shape = (*size[::-1], *channels)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    tested = normalise(image_transform(task, False)(image))
    assert torch.equal(tested, published(task, False)(image))
    for i in range(3):
        with random_numbers_of(i):
            ours = normalise(image_transform(task, True)(image))
        with random_numbers_of(i):
            theirs = published(task, True)(image)
        assert torch.equal(ours, theirs)


def noise(rng, width, height, mode):
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    return Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))


@pytest.mark.parametrize("seed", range(4))
def test_transform_is_torchvisions_bit_for_bit(seed):
    """Of 400 drawn images, sizes, crops and angles the pixels are those of v2's own Compose.

    They are made from the same random numbers, which are left in the same state.
    """
    rng = np.random.default_rng(seed)
    for i in range(100):
        resize = int(rng.integers(20, 70))
        size = int(rng.integers(resize - 15, resize + 1))  # up to no choice at all
        if i % 3:
            width, height = (int(rng.integers(16, 200)) for _ in range(2))
        else:
            width, height = resize, int(rng.integers(resize, 90))
        if i % 10 == 0:
            width, height = 16, int(rng.integers(300, 900))  # very long
        if i % 2 == 0:
            width, height = height, width
        image = noise(rng, width, height, "L" if i % 4 else "RGB")
        degrees = float(rng.choice([0.0, 5.0, 180.0]))
        train = bool(rng.integers(5))
        place = [v2.CenterCrop(size)]
        if train:
            place = [v2.RandomCrop(size)] + ([v2.RandomRotation(degrees)] if degrees else [])
        theirs = v2.Compose([v2.Resize(resize), *place, v2.PILToTensor()])
        with random_numbers_of(seed, i):
            ours, after = transform_image(image, resize, size, degrees, train), torch.rand(())
        with random_numbers_of(seed, i):
            wanted, wanted_after = theirs(image), torch.rand(())
        case = (i, image.size, resize, size, degrees)
        assert ours.shape == wanted.shape and torch.equal(ours, wanted), case
        assert after == wanted_after, case


@pytest.fixture
def iu(tmp_path):
    return get_task("iu_x_ray", **make_iu(tmp_path, n=7), resize=40, image_size=32)


def all_pixels(dataset, **options):
    loader = DataLoader(dataset, batch_size=2, collate_fn=collate, **options)
    for epoch in (0, 1, 5):
        dataset.set_epoch(epoch)  # while the workers run
        yield torch.cat([batch["pixel_values"] for batch in loader])


@pytest.mark.parametrize(
    "options",
    [
        dict(num_workers=1),
        dict(num_workers=2),
        dict(num_workers=2, persistent_workers=True),
        pytest.param(dict(num_workers=1, multiprocessing_context="spawn"), marks=pytest.mark.full),
    ],
)
def test_pixels_do_not_depend_on_workers(iu, options):
    def make():
        transform = image_transform(iu, train=True)
        return ReportDataset(open_task(iu)["train"], iu.image_folder, transform)

    alone, together = list(all_pixels(make())), list(all_pixels(make(), **options))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert not torch.equal(alone[0], alone[1])


def test_pixels_depend_on_seed_epoch_and_index_only(iu):
    transform = image_transform(iu, train=True)

    def make(seed):
        return ReportDataset(open_task(iu)["train"], iu.image_folder, transform, seed=seed)

    a, b = make(3), make(3)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    forward = [a[i]["pixel_values"] for i in range(7)]
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    backward = [b[i]["pixel_values"] for i in reversed(range(7))][::-1]
    assert all(torch.equal(x, y) for x, y in zip(forward, backward, strict=True))
    assert not torch.equal(make(4)[0]["pixel_values"], forward[0])
    twice = ReportDataset([open_task(iu)["train"][0]] * 2, iu.image_folder, transform)
    assert not torch.equal(twice[0]["pixel_values"], twice[1]["pixel_values"])


def test_held_images(iu, monkeypatch):
    "Up to the limit images are held, above it read each time; the pixels are those of the file."
    paths = [p for s in open_task(iu)["train"] for p in s.image_path]
    images = ImageFolder(iu.image_folder, limit=3 * 100 * 120 + 1)
    first, second = [[np.asarray(images(p)) for p in paths] for _ in range(2)]
    for a, b, p in zip(first, second, paths, strict=True):
        assert np.array_equal(a, b)
        assert np.array_equal(a, np.asarray(open_image(iu.image_folder / p)))
    with monkeypatch.context() as m:  # in a worker, none is held: each would have its own
        m.setattr("cvt2distilgpt2.data.get_worker_info", lambda: "a worker")
        other = ImageFolder(iu.image_folder)
        assert np.array_equal(other(paths[0]), first[0]) and not other._held
    for p in paths:
        (iu.image_folder / p).unlink()
    assert [images(p).size for p in paths[:3]] == [(100, 120)] * 3
    with pytest.raises(DataError, match="missing"):
        images(paths[3])


def test_bad_image_is_named(iu):
    studies = open_task(iu)["train"]
    path = iu.image_folder / studies[4].image_path[1]
    path.write_bytes(path.read_bytes()[:500])
    dataset = ReportDataset(studies, iu.image_folder, image_transform(iu, train=True))
    with pytest.raises(DataError, match=re.escape(str(path))):
        list(DataLoader(dataset, collate_fn=collate))


def test_cache_instead_of_files(iu, tmp_path):
    "From a cache come the pixels of the files, whatever the workers; what it lacks is named."
    studies = open_task(iu)["train"]
    cache = tmp_path / "cache"
    paths = [p for s in studies for p in s.image_path]
    build_cache(paths[1:], cache, iu.image_folder, iu.resize)

    def make(folder, studies=studies[1:]):
        return ReportDataset(studies, folder, image_transform(iu, train=True))

    for options in (dict(), dict(num_workers=2)):
        ours, files = all_pixels(make(cache), **options), all_pixels(make(iu.image_folder))
        assert all(torch.equal(a, b) for a, b in zip(files, ours, strict=True))
    with pytest.raises(DataError, match=re.escape(studies[0].image_path[0]) + ".*not in the cache"):
        make(cache, studies)[0]


def test_several_references(iu):
    """Training draws one a study and epoch, always the same for the same seed.

    One alone changes no random number; all else takes the first.
    """
    texts = ("First.", "Second.", "Third.")
    one, *others = open_task(iu)["train"]
    several = [Study(f"{i}", texts[0], one.image_path, "train", texts) for i in range(60)]
    transform = image_transform(iu, train=True)

    def make(studies, **options):
        return ReportDataset(studies, iu.image_folder, transform, str.upper, **options)

    drawn = make(several, draw=True)
    epochs = []
    for epoch in range(3):
        drawn.set_epoch(epoch)
        epochs.append([drawn[i]["label"] for i in range(60)])
    assert all(set(e) == {t.upper() for t in texts} for e in epochs)
    assert epochs[0] != epochs[1]
    assert [make(several, draw=True)[i]["label"] for i in range(60)] == epochs[0]
    assert {make(several)[i]["label"] for i in range(60)} == {"FIRST."}
    for i in range(len(others)):
        a, b = make(others)[i], make(others, draw=True)[i]
        assert torch.equal(a["pixel_values"], b["pixel_values"]) and a["label"] == b["label"]
        a, b = make([several[0]] * 9)[8], make([several[0]] * 9, draw=True)[8]
        assert torch.equal(a["pixel_values"], b["pixel_values"])


def test_lists_are_packed():
    lists = [["a", "Größe 5 µm"], [], ["", "\ud800 alone"], ["x"]]
    packed = TextLists.pack(lists)
    assert [packed[i] for i in range(4)] == lists == [packed[i] for i in range(len(packed))]
    with pytest.raises(IndexError):
        packed[4]


# batches


def test_grey_and_colour(iu):
    """Grey stays one channel; where one view or one study is in colour, all have three.

    The numbers are those of the published code.
    """
    rng = np.random.default_rng(0)
    grey, colour = (
        torch.from_numpy(rng.integers(0, 256, (1, c, 4, 4), dtype=np.uint8)) for c in (1, 3)
    )

    def item(pixels):
        return {"pixel_values": pixels, "label": ""}

    assert collate([item(grey)] * 2)["pixel_values"].shape == (2, 1, 4, 4)
    mixed = collate([item(grey), item(colour)])["pixel_values"]
    assert mixed.shape == (2, 3, 4, 4) and mixed.dtype == torch.uint8
    assert torch.equal(mixed[0], grey[0].expand(3, 4, 4)) and torch.equal(mixed[1], colour[0])
    assert torch.equal(normalise(grey), normalise(grey.expand(1, 3, 4, 4)))
    noise(rng, 60, 50, "L").save(iu.image_folder / "g.png")
    noise(rng, 60, 50, "RGB").save(iu.image_folder / "c.png")
    studies = [Study("1", "x", ("g.png", "c.png"), "train")]
    dataset = ReportDataset(studies, iu.image_folder, image_transform(iu, train=False))
    both = dataset[0]["pixel_values"]
    assert both.shape == (2, 3, 32, 32)
    assert both[0].eq(both[0, :1]).all() and not both[1].eq(both[1, :1]).all()


@pytest.mark.parametrize("views", [(1, 1), (2, 2), (1, 3, 2), (3,), (1,)])
def test_collate(views):
    rng = torch.Generator().manual_seed(0)
    items = []
    for i, v in enumerate(views):
        pixels = torch.randint(0, 256, (v, 3, 4, 4), dtype=torch.uint8, generator=rng)
        items.append({"pixel_values": pixels, "label": f"{i}"})

    def tokenize(labels):
        return {"labels": torch.tensor([int(label) for label in labels])}

    batch = collate(items, tokenize=tokenize)
    B, V = len(views), max(views)
    assert batch["pixel_values"].shape == ((B, 3, 4, 4) if V == 1 else (B, V, 3, 4, 4))
    assert batch["labels"].tolist() == list(range(B))
    assert ("view_mask" in batch) == (len(set(views)) > 1)
    for row, item in zip(batch["pixel_values"].reshape(B, V, 3, 4, 4), items, strict=True):
        v = len(item["pixel_values"])
        assert torch.equal(row[:v], item["pixel_values"])
        assert row.dtype == torch.uint8 and not row[v:].any()
    if "view_mask" in batch:
        assert batch["view_mask"].sum(1).tolist() == list(views)
        assert batch["view_mask"].dtype == torch.bool


@needs_data
def test_real_radiographs():
    task = get_task(str(Path(DATA) / "cxr_pairs"), resize=64, image_size=56)
    for train, studies in ((True, open_task(task)["train"]), (False, open_task(task)["test"])):
        transform, labels = image_transform(task, train), make_labels(task, [])
        dataset = ReportDataset(studies, task.image_folder, transform, labels)
        (batch,) = DataLoader(dataset, batch_size=len(studies), collate_fn=collate)
        pixels = batch["pixel_values"]
        assert pixels.shape[:2] == (len(studies), 2) and pixels.shape[3:] == (56, 56)
        assert pixels.dtype == torch.uint8
        assert batch["view_mask"].sum() == sum(len(s.image_path) for s in studies)
        made = [dataset[i]["label"] for i in range(len(studies))]
        assert made == [s.report.strip() for s in studies]


# the notebook


def explore(tmp_path, folder, *words):
    out = tmp_path / "out.ipynb"
    papermill = [sys.executable, "-m", "papermill", "--no-progress-bar"]
    command = [*papermill, str(ROOT / "nbs" / "00d_data.ipynb"), str(out), *words]
    env = {**os.environ, "TQDM_DISABLE": "1", "CVT2DISTILGPT2_HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=env)
    return done, out


@pytest.mark.full
def test_notebook_refuses_a_misspelt_parameter(tmp_path):
    done, _ = explore(tmp_path, ROOT, "-p", "n_trian", "5")
    assert done.returncode and "did you mean 'n_train'" in done.stderr


@pytest.mark.full
@pytest.mark.parametrize(
    "name, make, folder",
    [
        ("mimic_cxr", make_mimic, ROOT),
        ("iu_x_ray", make_iu, ROOT / "nbs"),
        ("iu_x_ray_chen", make_iu, Path("/")),
    ],
)
def test_notebook_explores_published_tasks(tmp_path, name, make, folder):
    words = [w for n, v in make(tmp_path).items() for w in ("-p", n, v)]
    sizes = "-p resize 64 -p image_size 48".split()
    done, out = explore(tmp_path, folder, "-p", "task", name, *words, *sizes)
    assert done.returncode == 0, done.stderr[-3000:]
    assert out.read_text().count('"image/png"') >= 4
    assert (tmp_path / "runs" / get_task(name).name / "data.csv").exists()


@pytest.mark.full
@needs_data
def test_notebook_explores_a_folder(tmp_path):
    done, out = explore(tmp_path, ROOT, "-p", "task", str(Path(DATA) / "cxr_pairs"))
    assert done.returncode == 0, done.stderr[-3000:]


def test_generated_reports_of_other_ids_are_not_shown_as_nothing(tmp_path):
    Image.linear_gradient("L").resize((40, 40)).save(tmp_path / "0.png")
    studies = [Study("003", "Clear.", ("0.png",), "test")]
    with pytest.raises(ValueError, match="ids such as 3, not '003': ids are text"):
        show_studies(studies, tmp_path, {3: "Clear."})
