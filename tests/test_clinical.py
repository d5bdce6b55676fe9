"CheXbert on any text and from any file, averages, intervals, and measures of others."

import os
import sys
import time
import types
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import multilabel_confusion_matrix, precision_recall_fscore_support
from transformers import BertConfig, BertModel

from cvt2distilgpt2 import clinical
from cvt2distilgpt2.clinical import (
    AVERAGES,
    CLASSES,
    FIVE,
    OBSERVATIONS,
    SCORES,
    averages,
    class_confusion,
    clinical_scores,
    label_table,
    load_chexbert,
    load_vocabulary,
    optional_scores,
    positives,
    read_cache,
    read_chexbert,
)

torch.set_num_threads(1)
WORDS = (
    "the heart lungs are is normal clear no there small left effusion edema pneumo ##thor ##ax "
    ". , - 1 '"
).split()
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
REPORTS = [
    "The heart is normal.",
    "",
    "no effusion, no pneumothorax .",
    "there is edema\n\nleft - small",
    "zzz",
    "pneumothor",
    "é [MASK] 1'",
    "lungs are clear . " * 40,
]


def made_up_weights(seed=0, vocab_size=26, width=128, layers=3, inner=96, positions=512):
    "Random tensors by the published names, made without our own class."

    def linear(name, outputs, inputs):
        return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}

    def norm(name):
        return {f"{name}.weight": (width,), f"{name}.bias": (width,)}

    shapes = {
        "bert.embeddings.word_embeddings.weight": (vocab_size, width),
        "bert.embeddings.position_embeddings.weight": (positions, width),
        "bert.embeddings.token_type_embeddings.weight": (2, width),
    }
    shapes |= norm("bert.embeddings.LayerNorm")
    for i in range(layers):
        layer = f"bert.encoder.layer.{i}"
        for part in ("query", "key", "value"):
            shapes |= linear(f"{layer}.attention.self.{part}", width, width)
        shapes |= linear(f"{layer}.attention.output.dense", width, width)
        shapes |= norm(f"{layer}.attention.output.LayerNorm")
        shapes |= linear(f"{layer}.intermediate.dense", inner, width)
        shapes |= linear(f"{layer}.output.dense", width, inner)
        shapes |= norm(f"{layer}.output.LayerNorm")
    shapes |= linear("bert.pooler.dense", width, width)
    for i in range(14):
        shapes |= linear(f"linear_heads.{i}", 2 if i == 13 else 4, width)

    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        mean = 1 if name.endswith("LayerNorm.weight") else 0
        weights[f"module.{name}"] = mean + 0.3 * torch.randn(shape, generator=generator)
    return weights


def save(weights, path, **how):
    "Save `weights` as the authors did, with the optimizer's state beside them."
    optimizer = {
        "state": {0: {"step": 3, "exp_avg": torch.zeros(2)}},
        "param_groups": [{"lr": 2e-5, "betas": (0.9, 0.999), "params": [0]}],
    }
    torch.save(
        {"epoch": 7, "model_state_dict": weights, "optimizer_state_dict": optimizer}, path, **how
    )
    return path


@pytest.fixture
def files(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY))
    return save(made_up_weights(), tmp_path / "chexbert.pth"), tmp_path / "vocab.txt"


@pytest.fixture
def labeller(files):
    return load_chexbert(*files, "cpu")


def plain_labels(weights, reports, tokenizer, heads, layers):
    "The labels of a plain BERT of transformers and the 14 heads, one report at a time."
    weights = {name.removeprefix("module."): tensor for name, tensor in weights.items()}
    vocab_size, width = weights["bert.embeddings.word_embeddings.weight"].shape
    config = BertConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=len(weights["bert.encoder.layer.0.intermediate.dense.weight"]),
        attn_implementation="eager",
    )
    bert = BertModel(config).eval()
    bert.load_state_dict(
        {
            name.removeprefix("bert."): tensor
            for name, tensor in weights.items()
            if name.startswith("bert.")
        }
    )
    labels = []
    for report in reports:
        inputs = tokenizer(report, truncation=True, max_length=512, return_tensors="pt")
        with torch.no_grad():
            first = bert(**inputs).last_hidden_state[:, 0]
        for i in range(14):
            head = weights[f"linear_heads.{i}.weight"], weights[f"linear_heads.{i}.bias"]
            labels.append(int(F.linear(first, *head).argmax()))
    return np.array(labels).reshape(-1, 14)


@pytest.mark.filterwarnings("ignore:.*have more than 512 tokens")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("new_format", [True, False])  # the authors' PyTorch wrote the old one
def test_labels_are_those_of_a_plain_bert(seed, new_format, files, tmp_path):
    weights = made_up_weights(seed)
    rng = np.random.default_rng(seed)
    path = save(weights, tmp_path / "other.pth", _use_new_zipfile_serialization=new_format)
    lengths = (1, 3, 10, 50, 200, 509, 510, 511, 600)
    reports = REPORTS + [" ".join(rng.choice(WORDS[:13], n)) for n in lengths]
    labeller = load_chexbert(path, files[1], "cpu")
    labels = labeller(reports)
    assert (labels == plain_labels(weights, reports, labeller.tokenizer, 2, 3)).all()
    assert len(np.unique(labels[:, :13])) == 4  # the made-up weights do tell texts apart
    assert len(np.unique(labels, axis=0)) > 5
    order = rng.permutation(len(reports))
    fresh = load_chexbert(path, files[1], "cpu")
    assert (fresh([reports[i] for i in order]) == labels[order]).all()


@pytest.mark.full
def test_the_published_size(tmp_path):
    words = VOCABULARY + [f"w{i}" for i in range(30522 - len(VOCABULARY))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    weights = made_up_weights(0, 30522, 768, 12, 3072)
    for name, tensor in weights.items():
        if "LayerNorm" not in name:
            tensor /= 10
    path = save(weights, tmp_path / "chexbert.pth")
    labeller = load_chexbert(path, tmp_path / "vocab.txt", "cpu")
    bert_base = 109_482_240
    heads = 13 * 4 * 769 + 2 * 769
    assert sum(p.numel() for p in labeller.model.parameters()) == bert_base + heads
    reports = REPORTS + ["w7 w9 w30000 the heart"]
    assert (labeller(reports) == plain_labels(weights, reports, labeller.tokenizer, 12, 12)).all()


def test_old_files_may_hold_positions(files, labeller, tmp_path):
    weights = made_up_weights() | {"module.bert.embeddings.position_ids": torch.arange(512)[None]}
    old = load_chexbert(save(weights, tmp_path / "old.pth"), files[1], "cpu")
    assert (old(REPORTS) == labeller(REPORTS)).all()


# files that are no CheXbert


class Mischief:
    def __reduce__(self):
        return (os.mkdir, (os.environ["MISCHIEF"],))


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize(
    "content",
    [
        {"model_state_dict": made_up_weights(), "args": Mischief()},
        {"model_state_dict": made_up_weights() | {"module.x": Mischief()}},
        Mischief(),
    ],
    ids=["beside the weights", "among the weights", "alone"],
)
def test_code_in_the_file_is_not_run(content, new_format, tmp_path, monkeypatch):
    monkeypatch.setenv("MISCHIEF", str(tmp_path / "mischief"))
    torch.save(content, tmp_path / "bad.pth", _use_new_zipfile_serialization=new_format)
    with pytest.raises(ValueError, match=r"bad\.pth cannot be read as weights"):
        read_chexbert(tmp_path / "bad.pth")
    assert not (tmp_path / "mischief").exists()


@pytest.mark.parametrize("new_format", [True, False])
def test_a_file_cut_short(new_format, tmp_path):
    path = tmp_path / "whole.pth"
    save(made_up_weights(), path, _use_new_zipfile_serialization=new_format)
    whole = path.read_bytes()
    for size in (0, 1, 100, len(whole) // 3, len(whole) // 2, len(whole) - 1000):
        (tmp_path / "cut.pth").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut\.pth cannot be read as weights: is it whole"):
            read_chexbert(tmp_path / "cut.pth")


def changed(weights, how):
    if how == "key missing":
        weights.pop("module.linear_heads.3.bias")
    if how == "layer missing":
        weights = {name: tensor for name, tensor in weights.items() if ".layer.1." not in name}
    if how == "key unknown":
        weights["module.linear_heads.14.bias"] = torch.zeros(2)
    if how == "other shape":
        weights["module.linear_heads.13.weight"] = torch.zeros(4, 128)
    if how == "no BERT":
        weights = {
            name: tensor for name, tensor in weights.items() if "word_embeddings" not in name
        }
    if how == "other width":
        weights = made_up_weights(width=72)
    if how == "no layers":
        weights = {name: tensor for name, tensor in weights.items() if ".layer." not in name}
    return weights


@pytest.mark.parametrize(
    "how, message",
    [
        ("key missing", "1 missing: linear_heads.3.bias"),
        ("layer missing", r"bert\.encoder\.layer\.1\.attention"),
        ("key unknown", "1 unexpected: linear_heads.14.bias"),
        ("other shape", r"linear_heads\.13\.weight \(4, 128\) instead of \(2, 128\)"),
        ("no BERT", "word_embeddings.weight' is missing"),
        ("other width", "72 channels"),
        ("no layers", "intermediate.dense.weight' is missing"),
    ],
)
def test_weights_that_do_not_fit(how, message, tmp_path):
    path = save(changed(made_up_weights(), how), tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=message) as error:
        read_chexbert(path)
    assert "bad.pth" in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        {"state_dict": {}},
        {"model_state_dict": [1]},
        {"model_state_dict": {"a": 1}},
        torch.zeros(3),
    ],
)
def test_another_kind_of_file(content, tmp_path):
    torch.save(content, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=r"bad\.pth does not hold CheXbert.*Checkpoint download"):
        read_chexbert(tmp_path / "bad.pth")


def test_weights_that_do_not_exist(tmp_path):
    for path in (tmp_path / "no.pth", tmp_path):
        with pytest.raises(FileNotFoundError, match="Checkpoint download.*non-commercial"):
            load_chexbert(path)


def test_a_vocabulary_that_does_not_exist():
    with pytest.raises(FileNotFoundError, match="no/such/vocab.txt does not exist"):
        load_vocabulary("no/such/vocab.txt")


def test_a_vocabulary_while_the_hub_is_out_of_reach(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="no-owner/no-such-vocabulary"):
        load_vocabulary("no-owner/no-such-vocabulary")


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b"\xff\xfe\x00", "\n".join(WORDS).encode()],
    ids=["empty", "blank line", "not text", "no special tokens"],
)
def test_a_file_that_is_no_vocabulary(content, tmp_path):
    (tmp_path / "other.txt").write_bytes(content)
    with pytest.raises(OSError, match="vocabulary"):
        load_vocabulary(tmp_path / "other.txt")


@pytest.mark.parametrize("words", [VOCABULARY[:-1], VOCABULARY + ["more"]])
def test_a_vocabulary_of_another_size(words, files, tmp_path):
    (tmp_path / "other.txt").write_text("\n".join(words))
    with pytest.raises(ValueError, match="vocabulary.*26.*bert-base-uncased"):
        load_chexbert(files[0], tmp_path / "other.txt", "cpu")


def test_vocabulary_from_a_folder_with_vocab_txt(files, labeller, tmp_path):
    assert (load_chexbert(files[0], tmp_path, "cpu")(REPORTS) == labeller(REPORTS)).all()


def test_vocabulary_that_transformers_saved(files, labeller, tmp_path):
    labeller.tokenizer.save_pretrained(tmp_path / "saved")
    assert (load_chexbert(files[0], tmp_path / "saved", "cpu")(REPORTS) == labeller(REPORTS)).all()


# texts


def longest_pieces(word):
    "BERT's pieces of one word: the longest known one, again and again."
    pieces = []
    while word:
        prefix = "##" if pieces else ""
        sizes = [n for n in range(len(word), 0, -1) if prefix + word[:n] in VOCABULARY]
        if not sizes:
            return ["[UNK]"]
        pieces.append(prefix + word[: sizes[0]])
        word = word[sizes[0] :]
    return pieces


def word_pieces(report):
    "BERT's pieces of plain ASCII text."
    spaced = "".join(f" {c} " if c in ".,-'" else c for c in report.lower())
    pieces = [piece for word in spaced.split() for piece in longest_pieces(word)]
    return ["[CLS]", *pieces, "[SEP]"]


def test_tokens(labeller):
    reports = [
        "The heart,is NORMAL.",
        "pneumothorax pneumothor pneumothorx axe",
        "  no\t\r\n edema\fleft\x0bis\x85the ",
        "",
        "left-small 1's 11",
    ]
    rows = clinical.report_tokens(labeller.tokenizer, reports)
    for report, row in zip(reports, rows, strict=True):
        assert labeller.tokenizer.convert_ids_to_tokens(row) == word_pieces(report)


def test_a_text_of_5000_words_is_cut_and_counted(labeller):
    words = list(np.random.default_rng(0).choice(WORDS[:13], 5000))
    for _ in range(2):  # the second time, the label is known
        with pytest.warns(UserWarning, match="^1 of 3 reports have more than 512 tokens"):
            labels = labeller(["no edema .", " ".join(words), "clear ."])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (labeller([" ".join(words[:510])])[0] == labels[1]).all()


@pytest.mark.parametrize(
    "reports, message",
    [
        ("one text", "not a str"),
        ({"s1": "text"}, "not a dict"),
        (["a", None, 3], "2 reports are not text, the first at place 1: None"),
    ],
)
def test_what_is_not_text(reports, message, labeller):
    with pytest.raises(TypeError, match=message):
        labeller(reports)


@pytest.mark.parametrize("kind", [tuple, pd.Series, iter])
def test_lists_of_all_kinds(kind, labeller):
    assert (labeller(kind(REPORTS)) == labeller(REPORTS)).all()


def test_no_reports(labeller):
    assert labeller([]).shape == (0, 14)


@pytest.fixture
def classified(monkeypatch):
    "The numbers of reports that CheXbert itself has read, call by call."
    counts = []
    classify = clinical.classify

    def counting(model, rows):
        counts.append(len(rows))
        return classify(model, rows)

    monkeypatch.setattr(clinical, "classify", counting)
    return counts


def test_each_text_is_read_once(labeller, classified):
    labels = labeller(REPORTS + REPORTS[:3] + ["THE  heart\nis normal."])
    assert classified == [len(REPORTS)]
    assert (labels[len(REPORTS) : -1] == labels[:3]).all() and (labels[-1] == labels[0]).all()
    assert (labeller(REPORTS[::-1]) == labels[len(REPORTS) - 1 :: -1]).all()
    assert classified == [len(REPORTS), 0]


def test_labels_are_kept_from_run_to_run(files, classified, tmp_path):
    cache = tmp_path / "a folder.json"
    labels = load_chexbert(*files, "cpu", cache)(REPORTS)
    assert (load_chexbert(*files, "cpu", cache)(REPORTS) == labels).all()
    assert classified == [len(REPORTS), 0]
    assert len(read_cache(cache)) == len(REPORTS) and "heart" not in cache.read_text()
    assert set(tmp_path.iterdir()) == {*files, cache}


def test_labels_of_other_weights_are_kept_apart(files, classified, tmp_path):
    cache = tmp_path / "labels.json"
    labels = load_chexbert(*files, "cpu", cache)(REPORTS)
    other = save(made_up_weights(1), tmp_path / "other.pth")
    assert not (load_chexbert(other, files[1], "cpu", cache)(REPORTS) == labels).all()
    assert classified == [len(REPORTS), len(REPORTS)]
    assert len(read_cache(cache)) == 2 * len(REPORTS)


def test_two_writers_keep_each_others_labels(files, tmp_path):
    cache = tmp_path / "runs" / "labels.json"
    one = load_chexbert(*files, "cpu", cache)
    two = load_chexbert(*files, "cpu", cache)
    one(REPORTS[:2])
    two(REPORTS[2:])
    assert len(read_cache(cache)) == len(REPORTS)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"a": "1"}', '{"a": 3}', '{"a": "00000000000007"}', "\x80\x04K"]
)
def test_a_damaged_cache(content, files, tmp_path):
    (tmp_path / "labels.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"labels\.json.*delete it"):
        load_chexbert(*files, "cpu", tmp_path / "labels.json")


# averages


def random_labels(seed):
    "Labels of any size and frequency; half of the time, the reports mostly agree with the truth."
    rng = np.random.default_rng(seed)
    n = rng.integers(1, 60)
    c = rng.integers(2, 15)
    share = rng.choice([0, 0.05, 0.3, 0.8, 1], (2, 15))
    truth, predicted = rng.random((2, n, c)) < share[:, None, :c]
    agreeing = np.where(rng.random((n, c)) < 0.6, truth, predicted)
    return truth, agreeing if rng.random() < 0.5 else predicted


MANY_LABELS = [random_labels(seed) for seed in range(120)]


def table_of(truth, predicted):
    return label_table(truth, predicted, tuple(range(truth.shape[1])), resamples=1)


def test_the_random_labels_have_scores_of_0_by_0():
    undefined = 0
    for truth, predicted in MANY_LABELS:
        precision, *_ = precision_recall_fscore_support(
            truth, predicted, average=None, zero_division=np.nan
        )
        undefined += np.isnan(precision).any()
    assert undefined > 20


@pytest.mark.parametrize(
    "average, name", [("macro", "macro"), ("micro", "micro"), ("example", "samples")]
)
def test_averages_are_scikit_learns(average, name):
    for truth, predicted in MANY_LABELS:
        expected = precision_recall_fscore_support(truth, predicted, average=name, zero_division=0)[
            :3
        ]
        scores = averages(truth, predicted)
        assert np.allclose([scores[f"{score}_{average}"] for score in SCORES], expected, atol=1e-12)
        row = table_of(truth, predicted).loc[average, list(SCORES)].astype(float)
        assert np.allclose(row, expected, atol=1e-12)


def test_scores_of_each_observation_are_scikit_learns():
    for truth, predicted in MANY_LABELS:
        each = precision_recall_fscore_support(truth, predicted, average=None, zero_division=0)
        rows = table_of(truth, predicted).iloc[:-3][[*SCORES, "support"]]
        assert np.allclose(rows.to_numpy().T, each)


def test_counts_are_scikit_learns():
    counts = ["true_negative", "false_positive", "false_negative", "true_positive"]
    for truth, predicted in MANY_LABELS:
        table = table_of(truth, predicted)
        expected = multilabel_confusion_matrix(truth, predicted).reshape(-1, 4)
        assert (table.iloc[:-3][counts].to_numpy() == expected).all()
        assert (table.iloc[:-3][counts].sum() == table.loc["micro", counts]).all()


NOTHING = np.zeros((5, 3), bool)
EVERYTHING = np.ones((5, 3), bool)


@pytest.mark.parametrize(
    "truth, predicted, score",
    [
        (NOTHING, NOTHING, 0.0),
        (NOTHING, EVERYTHING, 0.0),
        (EVERYTHING, NOTHING, 0.0),
        (EVERYTHING, EVERYTHING, 1.0),
    ],
)
def test_0_by_0_is_0(truth, predicted, score):
    assert set(averages(truth, predicted).values()) == {score}


def test_a_study_with_nothing_scores_nothing():
    labels = np.array([[True], [False]])
    assert averages(labels, labels)["f1_example"] == 0.5


@pytest.mark.parametrize(
    "truth, predicted, message",
    [
        (np.zeros((3, 2)), np.zeros((2, 3)), r"truth \(3, 2\) and predicted \(2, 3\)"),
        (np.zeros(3), np.zeros(3), r"truth \(3,\)"),
        (np.zeros((0, 3)), np.zeros((0, 3)), "not empty"),
        (np.full((2, 2), 3), np.zeros((2, 2)), "`positives`"),
        (np.zeros((2, 2)), np.full((2, 2), np.nan), "true or false"),
    ],
)
def test_labels_that_cannot_be_scored(truth, predicted, message):
    with pytest.raises(ValueError, match=message):
        averages(truth, predicted)


def test_names_that_do_not_fit():
    with pytest.raises(ValueError, match="3 names for 2 observations"):
        label_table(np.ones((4, 2)), np.ones((4, 2)), ("a", "b", "c"))


def test_an_unknown_way_to_count_uncertain_labels():
    with pytest.raises(ValueError, match="not as 'blank'"):
        positives(np.zeros((2, 14)), "blank")


def scores_of_resamples(truth, predicted, times):
    "Scores of each resample, its studies really repeated."
    rows = [
        averages(np.repeat(truth, row, axis=0), np.repeat(predicted, row, axis=0)) for row in times
    ]
    return pd.DataFrame(rows)


def test_intervals_are_those_of_resampled_studies():
    truth, predicted = np.random.default_rng(0).random((2, 40, 4)) < 0.4
    times = np.random.default_rng(7).multinomial(40, np.full(40, 1 / 40), size=600)
    table = label_table(truth, predicted, tuple("abcd"), resamples=600, seed=7)
    scores = scores_of_resamples(truth, predicted, times)
    for average in AVERAGES:
        for score in SCORES:
            interval = table.loc[average, [f"{score}_low", f"{score}_high"]].astype(float)
            assert np.allclose(interval, scores[f"{score}_{average}"].quantile([0.025, 0.975]))
    scores = scores_of_resamples(truth[:, :1], predicted[:, :1], times)
    interval = table.loc["a", ["f1_low", "f1_high"]].astype(float)
    assert np.allclose(interval, scores.f1_macro.quantile([0.025, 0.975]))


@pytest.mark.parametrize("draws", [150, pytest.param(1000, marks=pytest.mark.full)])
def test_intervals_cover_the_truth(draws):
    "Many test sets are drawn out of one large population, whose scores are known."
    rng = np.random.default_rng(0)
    truth = rng.random((100_000, 5)) < [0.1, 0.2, 0.3, 0.4, 0.5]
    predicted = np.where(rng.random(truth.shape) < 0.7, truth, rng.random(truth.shape) < 0.3)
    known = averages(truth, predicted)
    covered = []
    for _ in range(draws):
        picked = rng.integers(len(truth), size=400)
        table = label_table(truth[picked], predicted[picked], tuple(range(5)), resamples=400)
        covered.append([table.f1_low[a] <= known[f"f1_{a}"] <= table.f1_high[a] for a in AVERAGES])
    assert (np.abs(np.mean(covered, axis=0) - 0.95) < (0.02 if draws == 1000 else 0.05)).all()


def test_10000_resamples_of_3858_studies():
    truth, predicted = np.random.default_rng(0).random((2, 3858, 14)) < 0.2
    start = time.perf_counter()
    label_table(truth, predicted, OBSERVATIONS, resamples=10_000)
    assert time.perf_counter() - start < 40  # 6 seconds on an idle core


@pytest.fixture(scope="module")
def chosen():
    "Random labels of references and reports, and their `clinical_scores`."
    rng = np.random.default_rng(1)
    truth, predicted = rng.choice(4, (2, 120, 14), p=[0.5, 0.25, 0.05, 0.2])
    scores = clinical_scores(truth, predicted, resamples=50)
    return truth, predicted, scores.set_index(["observations", "uncertain", "average", "metric"])


def test_clinical_scores_have_a_row_for_each_choice(chosen):
    _, _, scores = chosen
    assert len(scores) == 36 and scores.index.is_unique


def test_clinical_scores_of_five_observations_are_those_of_their_table(chosen):
    truth, predicted, scores = chosen
    five = [OBSERVATIONS.index(name) for name in FIVE]
    assert five == [1, 4, 5, 7, 9]
    named = [labels[:, five] % 2 == 1 for labels in (truth, predicted)]  # positive or uncertain
    table = label_table(*named, FIVE, resamples=50)
    expected = table.loc["example", ["recall", "recall_low", "recall_high"]].tolist()
    assert scores.loc[(5, "positive", "example", "recall")].tolist() == expected


def test_clinical_scores_of_all_observations_are_their_averages(chosen):
    truth, predicted, scores = chosen
    expected = averages(truth == 1, predicted == 1)["f1_micro"]
    assert scores.score[14, "negative", "micro", "f1"] == pytest.approx(expected)


def test_class_confusion():
    truth, predicted = np.random.default_rng(2).integers(0, 4, (2, 50, 14))
    confusion = class_confusion(truth, predicted)
    for i, name in enumerate(OBSERVATIONS):
        for a, row in enumerate(CLASSES):
            of_class = predicted[truth[:, i] == a, i]
            assert confusion.loc[(name, row)].tolist() == [(of_class == b).sum() for b in range(4)]


# what RadEval has


class FakeRadEval:
    def __init__(self, metrics, show_progress):
        (self.metric,) = metrics

    def __call__(self, refs, hyps):
        if self.metric == "radcliq":
            raise OSError("no weights\nhere is a long story")
        return {
            f"{self.metric}_said": float(len(hyps[0])),
            f"{self.metric}_true": float(len(refs[0])),
        }


@pytest.fixture
def radeval(monkeypatch):
    monkeypatch.setitem(sys.modules, "radeval", types.SimpleNamespace(RadEval=FakeRadEval))
    monkeypatch.delitem(sys.modules, "RadEval", raising=False)
    yield
    sys.modules.pop("RadEval", None)


def test_optional_scores_pair_reports_by_id_and_take_the_first_reference(radeval):
    predictions = {"a": "Edema.", "b": "clear"}
    references = {"b": "clear", "a": ["No edema.", "other"]}
    table = optional_scores(predictions, references, ("radgraph",))
    assert table.metric.tolist() == ["radgraph_said", "radgraph_true"]
    assert table.value.tolist() == [len("Edema."), len("No edema.")]


def test_a_measure_that_fails_is_skipped_with_the_reason(radeval):
    table = optional_scores(["Edema."], ["Edema."], ("radgraph", "radcliq"))
    assert table.metric.tolist() == ["radgraph_said", "radgraph_true", "radcliq"]
    assert table.better.tolist() == ["higher", "higher", "lower"]
    assert np.isnan(table.value[2])
    assert table.reason.tolist() == ["", "", "OSError: no weights"]


def test_without_radeval(monkeypatch):
    monkeypatch.setitem(sys.modules, "radeval", None)
    table = optional_scores(["a"], ["a"])
    assert table.metric.tolist() == list(clinical.OPTIONAL)
    assert table.value.isna().all()
    assert table.reason.str.contains("pip install cvt2distilgpt2[clinical]", regex=False).all()


def test_an_unknown_measure():
    with pytest.raises(ValueError, match="not \\('bleu',\\)"):
        optional_scores(["a"], ["a"], ("bleu",))


def test_optional_scores_of_a_study_without_a_report():
    with pytest.raises(ValueError, match="no prediction for 1: 's2'"):
        optional_scores({"s1": "a"}, {"s1": "a", "s2": "b"})
