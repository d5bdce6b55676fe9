"The cache: exact, resumable, the same bytes however it was made, and never wrong in silence."

import hashlib
import json
import os
import pickle
import random
import re
import shutil
import signal
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from cvt2distilgpt2 import cache as module
from cvt2distilgpt2.cache import (
    INDEX,
    STORES,
    ImageCache,
    Recipe,
    Texts,
    _write_index,
    build_cache,
    decode,
    encode,
    verify_cache,
)
from cvt2distilgpt2.data import (
    ReportDataset,
    collate,
    image_transform,
    random_numbers_of,
    transform_image,
)
from cvt2distilgpt2.images import open_image
from cvt2distilgpt2.tasks import DataError, Study, get_task

torch.set_num_threads(1)
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def picture(rng, width, height, mode="L"):
    "A smooth picture with noise: something that compresses as a radiograph does."
    channels = {"L": (), "RGB": (3,)}[mode]
    coarse = rng.integers(0, 256, (5, 4, *channels), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.BICUBIC), float)
    return Image.fromarray((smooth + rng.normal(0, 5, smooth.shape)).clip(0, 255).astype(np.uint8))


def paths_in(folder):
    "The sorted relative paths of all files."
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*"))


def make_originals(folder, n, side=120, seed=0):
    "Pictures of n different sizes, every third in colour; returns their paths."
    rng = np.random.default_rng(seed)
    for i in range(n):
        ending = ("png", "jpg")[i % 2]
        path = folder / f"p{i % 4}" / f"{i:03d}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        width, height = rng.integers(side // 2, 2 * side, 2).tolist()
        picture(rng, width, height, "L" if i % 3 else "RGB").save(path)
    return paths_in(folder)


def contents(folder):
    "A checksum of each file, but for the lock."
    paths = [path for path in folder.iterdir() if path.name != "build.lock"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


SMALL = {"side": 64, "shard_size": 8}  # three shards for twenty images


@pytest.fixture
def originals(tmp_path):
    folder = tmp_path / "originals"
    return folder, make_originals(folder, 20)


@pytest.fixture
def built(originals, tmp_path):
    source, paths = originals
    assert build_cache(paths, tmp_path / "cache", source, processes=2, **SMALL) == []
    return tmp_path / "cache", source, paths


# pixels

SIZES = [
    (636, 764),
    (764, 636),
    (500, 500),
    (448, 448),
    (448, 600),
    (447, 900),
    (300, 410),
    (449, 451),
    (17, 40),
    (40, 900),
    (801, 633),
]
KINDS = [("L", "png"), ("L", "jpg"), ("RGB", "png"), ("RGB", "jpg"), ("equal", "png")]


@pytest.mark.parametrize("store", ["lossless", "uncompressed"])
@pytest.mark.parametrize("mode, ending", KINDS)
def test_training_sees_the_same_pixels(tmp_path, store, mode, ending):
    "At any size, the published transform makes the same of a cached image as of its original."
    source = tmp_path / "originals"
    source.mkdir()
    rng = np.random.default_rng(0)
    kept_mode = "RGB" if mode == "RGB" else "L"  # equal channels are kept as one
    paths = [f"{i}.{ending}" for i in range(len(SIZES))]
    for path, size in zip(paths, SIZES, strict=True):
        image = picture(rng, *size, kept_mode)
        if mode == "equal":
            image = image.convert("RGB")
        image.save(source / path)
    assert build_cache(paths, tmp_path / "cache", source, store=store, processes=1) == []
    cache = ImageCache(tmp_path / "cache")
    for path, size in zip(paths, SIZES, strict=True):
        original = open_image(source / path)
        assert cache(path).mode == kept_mode
        assert min(cache(path).size) == min(448, *size)
        for train in (False, True, True):
            with random_numbers_of(1, *size):
                from_cache = transform_image(cache(path), 448, 384, 5.0, train)
            with random_numbers_of(1, *size):
                from_original = transform_image(original, 448, 384, 5.0, train)
            assert torch.equal(from_cache.expand_as(from_original), from_original)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("fill", [0, 9, 10, 32, 53, 255])
def test_uncompressed_images_are_read_rightly(mode, fill):
    "The first and the last pixels may look like the header's end."
    for size in ((1, 1), (3, 1), (7, 999), (448, 538)):
        image = Image.new(mode, size, (fill, fill, fill) if mode == "RGB" else fill)
        data = encode(image, "uncompressed")
        decoded = decode(data, "uncompressed")
        assert np.array_equal(decoded, image)
        assert decoded.mode == mode
        for cut in (3, 8, len(data) - 1):
            with pytest.raises((OSError, ValueError)):
                decode(data[:cut], "uncompressed").load()


def test_sums_see_every_bit():
    rng = np.random.default_rng(0)
    for size in (1, 7, 8, 9, 1001):
        data = rng.integers(0, 256, size, dtype=np.uint8).tobytes()
        words = [int.from_bytes(data[i : i + 8], "little") for i in range(0, size, 8)]
        checksum = module._sum(data)
        assert checksum % 2**64 == sum(words) % 2**64
        assert np.int64(checksum) == checksum
        for _ in range(200):
            assert module._sum(flip(data, rng)) != checksum


def test_lossy_is_near_and_small(tmp_path):
    source = tmp_path / "originals"
    paths = make_originals(source, 8, side=500)
    size = {}
    for store in STORES:
        build_cache(paths, tmp_path / store, source, store=store, processes=1)
        size[store] = (tmp_path / store / "00000.tar").stat().st_size
    assert size["lossy"] < size["lossless"] < size["uncompressed"]
    exact = ImageCache(tmp_path / "lossless")
    near = ImageCache(tmp_path / "lossy")
    differences = [np.asarray(exact(p), float) - np.asarray(near(p), float) for p in paths]
    assert 0 < max(abs(difference).mean() for difference in differences) < 5
    assert verify_cache(tmp_path / "lossy", source, processes=1) == []


def test_metadata_are_left_out(tmp_path):
    source = tmp_path / "originals"
    source.mkdir()
    exif = Image.Exif()
    exif[0x010E] = "DOE^JANE"
    image = picture(np.random.default_rng(0), 60, 50)
    profile = b"DOE^JANE" * 20
    image.save(source / "a.jpg", exif=exif, icc_profile=profile, comment="DOE^JANE")
    image.save(source / "b.tif", tiffinfo={270: "DOE^JANE"})
    for store in STORES:
        build_cache(["a.jpg", "b.tif"], tmp_path / store, source, store=store, processes=1)
        assert b"DOE^JANE" not in (tmp_path / store / "00000.tar").read_bytes()


def test_shards_are_plain_tar_files(built):
    folder, _, paths = built
    images = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                assert (member.mtime, member.uid, member.gid) == (0, 0, 0)
                assert (member.uname, member.gname) == ("", "")
                images[member.name] = decode(tar.extractfile(member).read(), "lossless")
    cache = ImageCache(folder)
    assert list(cache.paths) == sorted(paths)
    assert sorted(images) == [f"{path}.tif" for path in cache.paths]
    assert all(np.array_equal(images[f"{path}.tif"], cache(path)) for path in paths)


# building


@pytest.mark.parametrize("processes", [1, 3])
def test_bytes_do_not_depend_on_processes(built, tmp_path, processes):
    folder, source, paths = built
    build_cache(paths, tmp_path / "other", source, processes=processes, **SMALL)
    assert contents(tmp_path / "other") == contents(folder)


def state_of(folder):
    "The time and the bytes of all in a folder."
    state = {}
    for path in folder.rglob("*"):
        state[path] = (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
    return state


def test_originals_are_only_read(originals, tmp_path):
    source, paths = originals
    before = state_of(source)
    build_cache(paths, tmp_path / "cache", source, side=64, processes=1)
    assert state_of(source) == before


def test_only_what_changed_is_made_again(built):
    folder, source, paths = built
    times = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.tar")}
    picture(np.random.default_rng(9), 90, 90).save(source / paths[9])  # in the second shard
    build_cache(paths, folder, source, processes=1, **SMALL)
    made = {name for name, time in times.items() if (folder / name).stat().st_mtime_ns != time}
    assert made == {"00001.tar"}
    assert ImageCache(folder)(paths[9]).size == (64, 64)


def test_shards_of_fewer_images_are_kept_and_the_others_go(built):
    folder, source, paths = built
    before = contents(folder)
    build_cache(paths[:8], folder, source, processes=1, **SMALL)
    after = contents(folder)
    assert after.pop(INDEX) != before[INDEX]
    assert after == {name: before[name] for name in ("00000.json", "00000.tar")}


def test_another_recipe_makes_all_again(built):
    folder, source, paths = built
    build_cache(paths, folder, source, store="uncompressed", processes=1, **SMALL)
    assert ImageCache(folder).store == "uncompressed"
    assert verify_cache(folder, source, processes=1) == []


def test_problems_are_listed_again_by_a_resumed_build(originals, tmp_path):
    source, paths = originals
    folder = tmp_path / "cache"
    (source / paths[1]).write_bytes((source / paths[1]).read_bytes()[:300])
    (source / paths[2]).write_bytes(b"")
    (source / paths[3]).write_text("not a picture")
    (source / paths[4]).unlink()
    Image.new("L", (80, 80), 7).save(source / paths[5])
    problems = build_cache(paths, folder, source, processes=2, **SMALL)
    assert [problem.path for problem in problems] == paths[1:6]
    words = ("damaged", "empty", "not an image", "missing", "blank")
    for word, problem in zip(words, problems, strict=True):
        assert word in problem.what and problem.mend
    assert build_cache(paths, folder, source, processes=2, **SMALL) == problems
    assert list(ImageCache(folder).paths) == sorted(paths[:1] + paths[6:])
    assert verify_cache(folder, source, processes=1) == []


@pytest.mark.parametrize(
    "paths, options, message",
    [
        (["../out.png"], {}, "outside"),
        (["/etc/x.png"], {}, "outside"),
        (["a.png", "a.png"], {}, "twice"),
        ([], {"store": "best"}, "lossless, uncompressed"),
    ],
)
def test_wrong_input(tmp_path, paths, options, message):
    with pytest.raises(ValueError, match=message):
        build_cache(paths, tmp_path / "cache", tmp_path, **options)
    assert not (tmp_path / "cache").exists()


def test_foreign_folders_are_left_alone(originals):
    source, paths = originals
    with pytest.raises(FileExistsError, match="other files"):
        build_cache(paths, source, source)
    assert paths_in(source) == paths


def test_room_and_time_are_told(originals, tmp_path, capsys):
    source, paths = originals
    build_cache(paths, tmp_path / "cache", source, side=64, processes=1)
    pattern = r"20 images to store need about \d+ \w+ \(.* free\) and .* s\n"
    assert re.search(pattern, capsys.readouterr().out)


def test_a_full_disk_is_told_before_the_work(originals, tmp_path, monkeypatch):
    source, paths = originals
    usage = SimpleNamespace(free=20_000)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(OSError, match="not enough room"):
        build_cache(paths, tmp_path / "cache", source, side=64, processes=1)
    assert not list((tmp_path / "cache").glob("*.tar"))
    assert not ImageCache.is_in(tmp_path / "cache")


def test_a_whole_cache_needs_no_room(built, monkeypatch):
    folder, source, paths = built
    usage = SimpleNamespace(free=20_000)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: usage)
    assert build_cache(paths, folder, source, processes=1, **SMALL) == []


def test_estimate_is_near(tmp_path):
    source = tmp_path / "originals"
    paths = make_originals(source, 60, side=400)
    recipe = Recipe(300, "lossless", False)

    def store_all(sample, chunksize):
        return [module._store_image(path, source, recipe) for path in sample]

    message = module._estimate(paths, tmp_path, store_all)
    estimate = float(re.search(r"about ([\d.]+) MB", message)[1])
    build_cache(paths, tmp_path / "cache", source, side=300, processes=1)
    size = (tmp_path / "cache" / "00000.tar").stat().st_size / 1e6
    assert 0.75 * size < estimate < 1.33 * size


@pytest.mark.skipif(sys.platform != "linux", reason="needs fork")
def test_killed_worker_is_an_error(originals, tmp_path, monkeypatch):
    source, paths = originals
    folder = tmp_path / "cache"
    build_cache(paths, folder, source, side=32, processes=1)  # by another recipe
    open_visible = module.open_visible

    def fatal(path, side=None):
        if Path(path).name.startswith("010") and (folder / "00001.json").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return open_visible(path, side)

    monkeypatch.setattr(module, "open_visible", fatal)
    options = {"side": 64, "shard_size": 5, "processes": 2}
    with pytest.raises(OSError, match="worker process was killed"):
        build_cache(paths, folder, source, **options)
    assert not ImageCache.is_in(folder)  # half of one kind, half of the other
    monkeypatch.setattr(module, "open_visible", open_visible)
    assert build_cache(paths, folder, source, **options) == []
    assert verify_cache(folder, source, processes=1) == []


def build_alone(*args):
    "Build in a process group and session of its own, as a user's command would."
    os.setsid()
    build_cache(*args, processes=2, **SMALL)


def start_build(*args):
    "Start a build in another process."
    process = get_context("fork").Process(target=build_alone, args=args)
    process.start()
    return process


def session_of(process):
    "The session of a folder of /proc; None for a process that has ended."
    try:
        text = (process / "stat").read_text()
    except OSError:
        return None
    state, _, _, session, *_ = text.rpartition(")")[2].split()
    return None if state == "Z" else int(session)


def processes_of(session):
    "Processes that a build started and that still run."
    processes = [path for path in Path("/proc").iterdir() if path.name.isdigit()]
    return [path.name for path in processes if session_of(path) == session]


def kill_build(paths, folder, source, shards, delay):
    "Kill a build some seconds after its first shards are whole."
    process = start_build(paths, folder, source)
    while process.is_alive() and len(list(folder.glob("*.json"))) < shards:
        time.sleep(0.002)
    time.sleep(delay)
    process.kill()  # the parent alone: its workers must end by themselves
    process.join()
    deadline = time.time() + 10
    while processes_of(process.pid) and time.time() < deadline:
        time.sleep(0.05)
    assert not processes_of(process.pid), "workers outlive their parent, and hold its lock"


def kill_and_resume(tmp_path, kills):
    "Kill builds at random moments; returns how many of them were unfinished."
    source = tmp_path / "originals"
    folder = tmp_path / "cache"
    paths = make_originals(source, 64, side=300)
    start = time.perf_counter()
    start_build(paths, tmp_path / "whole", source).join()
    seconds = time.perf_counter() - start
    whole = contents(tmp_path / "whole")
    rng = random.Random(0)
    unfinished = 0
    for i in range(kills):
        if i % 3 == 0:  # begin again, or else go on where the last was killed
            shutil.rmtree(folder, ignore_errors=True)
        kill_build(paths, folder, source, rng.randrange(8), rng.uniform(0, seconds / 8))
        unfinished += not ImageCache.is_in(folder)
        for name, checksum in contents(folder).items():
            assert name.endswith(".part") or checksum == whole[name]
    build_cache(paths, folder, source, processes=2, **SMALL)
    assert contents(folder) == whole
    return unfinished


@LINUX
def test_killed_build_resumes(tmp_path):
    assert kill_and_resume(tmp_path, 4) > 0


@LINUX
@pytest.mark.full
def test_build_killed_twenty_times(tmp_path):
    assert kill_and_resume(tmp_path, 20) > 5


@LINUX
def test_builds_at_once(tmp_path):
    "Processes that build the same cache wait for each other; one does the work."
    source = tmp_path / "originals"
    paths = make_originals(source, 40, side=200)
    build_cache(paths, tmp_path / "alone", source, processes=2, **SMALL)
    processes = []
    for _ in range(4):
        processes.append(start_build(paths, tmp_path / "shared", source))
        time.sleep(0.1)  # while the first is at work
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")


# damage


def flip(data, rng):
    "Turn one bit."
    i = rng.integers(len(data))
    return data[:i] + bytes([data[i] ^ (1 << rng.integers(8))]) + data[i + 1 :]


@pytest.mark.parametrize("name", ["00001.tar", "00001.json", INDEX])
def test_every_flipped_bit_is_found(built, name):
    "Reading gives the right pixels or an error that names the image or the index."
    folder, _, paths = built
    before = {path: np.asarray(ImageCache(folder)(path)) for path in paths}
    whole = (folder / name).read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(25):
        (folder / name).write_bytes(flip(whole, rng))
        problems = verify_cache(folder, processes=1)
        if name == INDEX and not problems:  # a bit of the zip file that says nothing
            assert list(ImageCache(folder).paths) == sorted(paths)
        else:
            assert problems
            assert all(problem.what and problem.mend for problem in problems)
        for path in paths:
            try:
                image = ImageCache(folder)(path)
            except DataError as e:
                assert path in str(e) or INDEX in str(e)
            else:
                assert np.array_equal(image, before[path])


def damaged(built):
    "The names of the files that verifying complains of."
    folder, source, _ = built
    return {Path(problem.path).name for problem in verify_cache(folder, source, processes=2)}


def test_nothing_is_found_where_nothing_is_damaged(built):
    assert damaged(built) == set()


@pytest.mark.parametrize("cut", [0, 1, 700, -5000, -1])
def test_cut_shards_are_found(built, cut):
    shard = built[0] / "00002.tar"
    shard.write_bytes(shard.read_bytes()[:cut])
    assert "00002.tar" in damaged(built)


@pytest.mark.parametrize("name", ["00000.tar", "00000.json"])
def test_missing_shards_and_stamps_are_found(built, name):
    (built[0] / name).unlink()
    assert "00000.tar" in damaged(built)


@pytest.mark.parametrize("endings", [(".tar",), (".tar", ".json")])
def test_swapped_shards_are_found(built, endings):
    "Swapped with their stamps they fit each other, but not the index."
    folder = built[0]
    for ending in endings:
        first = folder / f"00000{ending}"
        second = folder / f"00001{ending}"
        data = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(data)
    assert {"00000.tar", "00001.tar"} <= damaged(built)


def test_a_missing_index_alone_is_listed(built):
    (built[0] / INDEX).unlink()
    assert damaged(built) == {INDEX}


def test_a_build_mends_a_missing_shard(built):
    folder, source, paths = built
    (folder / "00001.tar").unlink()
    with pytest.raises(DataError, match="00001.tar: missing"):
        ImageCache(folder)(paths[8])
    build_cache(paths, folder, source, processes=1, **SMALL)
    assert damaged(built) == set()


def test_originals_that_changed_are_found(built):
    folder, source, paths = built
    picture(np.random.default_rng(5), 100, 100).save(source / paths[3])
    (source / paths[5]).unlink()
    assert {p.path for p in verify_cache(folder, source, processes=1)} == {paths[3], paths[5]}


def assert_refused(folder):
    "Both opening and verifying name the index."
    with pytest.raises(DataError, match=INDEX):
        ImageCache(folder)
    assert verify_cache(folder, processes=1)[0].path.endswith(INDEX)


def test_files_that_are_no_index_are_errors(built):
    folder = built[0]
    whole = (folder / INDEX).read_bytes()
    rng = np.random.default_rng(0)
    files = [whole[:n] for n in (0, 10, len(whole) // 2, len(whole) - 3)]
    files += [b"not an index", b"\x93NUMPY" + b"\0" * 100]
    files += [rng.integers(0, 256, 500, dtype=np.uint8).tobytes() for _ in range(5)]
    for data in files:
        (folder / INDEX).write_bytes(data)
        assert_refused(folder)


def changed(places, row, factor=1, shift=0):
    "The places, one row of which (shard, offset, size, checksum) is multiplied or shifted."
    places = places.copy()
    places[row] = places[row] * factor + shift
    return places


def test_indexes_that_say_what_must_not_be_believed_are_errors(built):
    folder, _, paths = built
    with np.load(folder / INDEX) as file:
        index = dict(file)
    places = index["places"]
    last = places.copy()
    last[0, places[0] == 2] = -1  # NumPy would take the last shard for it
    ends = index["ends"].copy()
    ends[[1, 2]] = ends[[2, 1]]
    changes = [{"places": last}, {"ends": ends}]
    changes += [{"places": changed(places, 0, shift=shift)} for shift in (-1, 5, 10**9)]
    for row in (1, 2):
        changes += [{"places": changed(places, row, factor=factor)} for factor in (-1, 10**6)]
    changes += [
        {"ends": index["ends"][::-1]},
        {"ends": index["ends"][:-1]},
        {"paths": index["paths"][:5]},
        {"places": places[:, :3]},
        {"recipe": "{}"},
        {"recipe": json.dumps({"side": 64, "store": "../..", "reduced": False})},
        {"recipe": np.array({"a": 1}, dtype=object)},
    ]
    for change in changes:
        np.savez(folder / INDEX, **index | change)
        assert_refused(folder)
    np.savez(folder / INDEX, **index)
    assert len(ImageCache(folder)) == len(paths)


def test_unknown_paths(built):
    folder, _, paths = built
    cache = ImageCache(folder)
    near = ("../" + paths[0], paths[0] + "x", paths[0][:-1])
    for path in ("", "nothing.png", *near, "\udcff", "ÿ"):
        assert path not in cache
        with pytest.raises(DataError, match="not in the cache"):
            cache(path)
    assert all(path in cache for path in paths)


# reading


def random_text(rng):
    "Up to five characters of one to four bytes, and some that are no text."
    codes = [65, 228, 8364, 0x1F600, 0xDC80, 0, 10]
    return "".join(chr(rng.choice(codes)) for _ in range(rng.randrange(6)))


def test_texts():
    rng = random.Random(0)
    texts = [random_text(rng) for _ in range(300)]
    packed = pickle.loads(pickle.dumps(Texts.pack(texts)))
    assert list(packed) == texts
    assert len(packed) == 300
    assert packed[np.int64(7)] == texts[7]
    for i in (300, -1):
        with pytest.raises(IndexError):
            packed[i]


def read_all(cache, paths):
    "A checksum of each image."
    return [hashlib.sha256(cache(path).tobytes()).hexdigest() for path in paths]


METHODS = [pytest.param("fork", marks=LINUX), pytest.param("spawn", marks=pytest.mark.full)]


@pytest.mark.parametrize("method", METHODS)
def test_one_cache_is_read_by_many(built, method):
    "Threads, then processes, read one cache at once."
    folder, _, paths = built
    cache = ImageCache(folder)
    rng = random.Random(0)
    shuffled = [rng.sample(paths, len(paths)) for _ in range(8)]
    expected = [read_all(cache, some) for some in shuffled]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read_all, [cache] * 8, shuffled)) == expected
    with get_context(method).Pool(2) as pool:
        assert pool.starmap(read_all, [(cache, some) for some in shuffled]) == expected


def test_without_pread(built, monkeypatch):
    folder, _, paths = built
    expected = read_all(ImageCache(folder), paths)
    monkeypatch.delattr(os, "pread", raising=False)
    assert read_all(ImageCache(folder), paths) == expected


def open_files():
    "How many files this process holds open."
    return len(os.listdir("/proc/self/fd"))


@LINUX
def test_few_shards_are_open(tmp_path):
    source = tmp_path / "originals"
    paths = make_originals(source, 200, side=32)
    build_cache(paths, tmp_path / "cache", source, side=16, shard_size=1, processes=2)
    cache = ImageCache(tmp_path / "cache")
    before = open_files()
    for path in random.Random(0).sample(paths, 200):
        cache(path)
    assert before + 100 < open_files() <= before + 128
    del cache
    assert open_files() <= before


def link_cache(tmp_path, n, images=64):
    "A cache of n paths whose images are few: many rows of the index point at one place."
    source = tmp_path / "originals"
    folder = tmp_path / "images"
    build_cache(make_originals(source, images, side=600), folder, source, processes=2)
    stamp = json.loads((folder / "00000.json").read_text())
    names = []
    for i in range(n):
        dicom = f"{i:08x}-aaaaaaaa-bbbbbbbb-cccccccc-dddddddd"
        names.append(f"files/p{i % 10 + 10}/p{i:08d}/s{i * 7:08d}/{dicom}.jpg")
    places = [place for _, *place in stamp["files"]]
    stamp["files"] = [[name, *places[i % images]] for i, name in enumerate(names)]
    _write_index(folder, Recipe(448, "lossless", False), [stamp])
    return folder, names


def test_large_index_opens_at_once(tmp_path):
    folder, names = link_cache(tmp_path, 377_110, images=4)
    some = names[::1000]
    opening = []
    finding = []
    for _ in range(3):
        start = time.perf_counter()
        cache = ImageCache(folder)
        opened = time.perf_counter()
        assert all(name in cache for name in some)
        opening.append(opened - start)
        finding.append((time.perf_counter() - opened) / len(some))
    assert len(cache) == 377_110
    assert min(opening) < 0.5
    assert min(finding) < 1e-3
    size = (folder / INDEX).stat().st_size / 1e6
    print(f"opened in {min(opening) * 1000:.0f} ms ({size:.0f} MB)")
    print(f"a path found in {min(finding) * 1e6:.0f} us")


def studies_of(names):
    "A study for each image."
    report = "No acute disease. The heart is of normal size."
    return [Study(str(i), report, (name,), "train") for i, name in enumerate(names)]


def first_batch(names, folder, method):
    "Seconds from the studies in memory to the first batch, at best of three."
    studies = studies_of(names)
    transform = image_transform(get_task("mimic_cxr"), train=True)
    options = {"shuffle": True, "collate_fn": collate, "multiprocessing_context": method}
    options["num_workers"] = 2 if method == "fork" else 1  # spawned, they start one by one
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        dataset = ReportDataset(studies, folder, transform)
        batches = iter(DataLoader(dataset, 16, **options))
        assert next(batches)["pixel_values"].shape[2:] == (384, 384)
        seconds.append(time.perf_counter() - start)
        del batches
    return min(seconds)


@pytest.mark.full
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_first_batch_of_a_large_cache(tmp_path, method):
    "It comes within 2 seconds; the imports of spawned workers, measured apart, do not count."
    folder, names = link_cache(tmp_path, 377_110, images=16)
    imports = 0 if method == "fork" else first_batch(names[:16], folder, method)
    seconds = first_batch(names, folder, method)
    print(f"{method}: first batch after {seconds:.2f} s ({imports:.2f} s of a small data set)")
    assert seconds - imports < 2


def memory_of(pids):
    "Summed megabytes of processes: PSS (shared pages counted once), and their own pages."
    totals = np.zeros(2)
    for pid in pids:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        kilobytes = {name: int(n) for name, n in re.findall(r"^(\w+): +(\d+) kB", text, re.M)}
        own = kilobytes["Private_Clean"] + kilobytes["Private_Dirty"]
        totals += [kilobytes["Pss"], own]
    return totals / 1000


def memory_over_an_epoch(tmp_path, n, read, workers, make=ReportDataset, batch=64):
    "Memory of all workers at 20 moments, while `read` of n studies are read in random order."
    folder, names = link_cache(tmp_path, n, images=16)
    studies = studies_of(names)  # the parent holds all of them
    task = get_task("mimic_cxr", image_size=64)  # small crops: the reading is what counts
    dataset = make(studies, folder, image_transform(task, train=True))
    order = torch.randperm(n)[:read].tolist()
    options = {"sampler": order, "collate_fn": collate, "multiprocessing_context": "fork"}
    batches = iter(DataLoader(dataset, batch, num_workers=workers, **options))
    pids = [worker.pid for worker in batches._workers]
    steps = read // batch
    memory = []
    for step, _ in enumerate(batches):
        if step and step % (steps // 20) == 0 and step < steps - 2 * workers:
            memory.append(memory_of(pids))
    return np.array(memory)


@LINUX
@pytest.mark.full
def test_memory_of_sixteen_workers_is_flat(tmp_path):
    memory = memory_over_an_epoch(tmp_path, 377_110, 40_000, 16)
    print("MB of 16 workers (in all; their own):", memory.round().astype(int).tolist())
    assert (memory[2:] < memory[1] * 1.03 + 5).all()


class Objects(ReportDataset):
    "What is not done: studies as Python objects in the way of the workers."

    def __init__(self, studies, *args):
        super().__init__(studies, *args)
        self.studies = studies

    def __getitem__(self, i):
        return super().__getitem__(i) | {"label": self.studies[i].report}


@LINUX
@pytest.mark.full
def test_memory_of_objects_grows(tmp_path):
    "The measure sees what it is for."
    memory = memory_over_an_epoch(tmp_path, 377_110, 40_000, 4, Objects)
    print("MB of 4 workers that read objects:", memory.round().astype(int).tolist())
    assert (memory[2:, 1] > memory[1, 1] * 1.03 + 5).any()
