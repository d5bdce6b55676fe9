"CheXbert on any text and from any file, averages against scikit-learn's, intervals, and measures that can't be had."
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
from cvt2distilgpt2.clinical import AVERAGES, CLASSES, FIVE, OBSERVATIONS, SCORES, averages, class_confusion, clinical_scores
from cvt2distilgpt2.clinical import label_table, load_chexbert, load_vocabulary, optional_scores, positives, read_cache, read_chexbert

torch.set_num_threads(1)
WORDS = ["the", "heart", "lungs", "are", "is", "normal", "clear", "no", "there", "small", "left", "effusion", "edema", "pneumo", "##thor", "##ax", ".", ",", "-", "1", "'"]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
REPORTS = ["The heart is normal.", "", "no effusion, no pneumothorax .", "there is edema\n\nleft - small", "zzz", "pneumothor", "é [MASK] 1'", "lungs are clear . " * 40]


def made_up_weights(seed=0, words=len(VOCABULARY), width=128, layers=3, inner=96, positions=512):
    "Tensors by the published names, none of them by way of our own class."
    def linear(name, out, into): return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}
    norm = lambda name: {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    shapes = {"bert.embeddings.word_embeddings.weight": (words, width), "bert.embeddings.position_embeddings.weight": (positions, width),
              "bert.embeddings.token_type_embeddings.weight": (2, width)} | norm("bert.embeddings.LayerNorm")
    for layer in (f"bert.encoder.layer.{i}" for i in range(layers)):
        for part in ("query", "key", "value"): shapes |= linear(f"{layer}.attention.self.{part}", width, width)
        shapes |= linear(f"{layer}.attention.output.dense", width, width) | norm(f"{layer}.attention.output.LayerNorm")
        shapes |= linear(f"{layer}.intermediate.dense", inner, width) | linear(f"{layer}.output.dense", width, inner) | norm(f"{layer}.output.LayerNorm")
    shapes |= linear("bert.pooler.dense", width, width)
    for i in range(14): shapes |= linear(f"linear_heads.{i}", 2 if i == 13 else 4, width)
    draw = torch.Generator().manual_seed(seed)
    random = lambda name, shape: torch.randn(shape, generator=draw) * .3 + (1 if name.endswith("LayerNorm.weight") else 0)
    return {f"module.{name}": random(name, shape) for name, shape in shapes.items()}


def save(weights, path, **how):
    "As the authors did: with the optimizer's state beside the weights."
    optimizer = {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 2e-5, "betas": (.9, .999), "params": [0]}]}
    torch.save({"epoch": 7, "model_state_dict": weights, "optimizer_state_dict": optimizer}, path, **how)
    return path


@pytest.fixture
def files(tmp_path):
    (tmp_path/"vocab.txt").write_text("\n".join(VOCABULARY))
    return save(made_up_weights(), tmp_path/"chexbert.pth"), tmp_path/"vocab.txt"


@pytest.fixture
def labeller(files): return load_chexbert(*files, "cpu")


def plain_labels(weights, reports, tokenizer, heads, layers):
    "What a plain BERT of transformers and the 14 heads say, one report at a time."
    weights = {name.removeprefix("module."): tensor for name, tensor in weights.items()}
    words, width = weights["bert.embeddings.word_embeddings.weight"].shape
    inner = len(weights["bert.encoder.layer.0.intermediate.dense.weight"])
    bert = BertModel(BertConfig(vocab_size=words, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=inner,
                                attn_implementation="eager")).eval()
    bert.load_state_dict({name.removeprefix("bert."): tensor for name, tensor in weights.items() if name.startswith("bert.")})
    labels = []
    for report in reports:
        with torch.no_grad(): first = bert(**tokenizer(report, truncation=True, max_length=512, return_tensors="pt")).last_hidden_state[:, 0]
        labels.append([int(F.linear(first, weights[f"linear_heads.{i}.weight"], weights[f"linear_heads.{i}.bias"]).argmax()) for i in range(14)])
    return np.array(labels)


@pytest.mark.filterwarnings("ignore:.*have more than 512 tokens")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("new_format", [True, False]) # the authors' PyTorch wrote the old one
def test_labels_are_those_of_a_plain_bert(seed, new_format, files, tmp_path):
    weights, draw = made_up_weights(seed), np.random.default_rng(seed)
    labeller = load_chexbert(save(weights, tmp_path/"other.pth", _use_new_zipfile_serialization=new_format), files[1], "cpu")
    reports = REPORTS + [" ".join(draw.choice(WORDS[:13], n)) for n in (1, 3, 10, 50, 200, 509, 510, 511, 600)]
    labels = labeller(reports)
    assert (labels == plain_labels(weights, reports, labeller.tokenizer, 2, 3)).all()
    assert len(np.unique(labels[:, :13])) == 4 and len(np.unique(labels, axis=0)) > 5 # they do tell texts apart
    shuffled = draw.permutation(len(reports))
    assert (load_chexbert(tmp_path/"other.pth", files[1], "cpu")([reports[i] for i in shuffled]) == labels[shuffled]).all()


@pytest.mark.full
def test_the_published_size(tmp_path):
    words = VOCABULARY + [f"w{i}" for i in range(30522 - len(VOCABULARY))]
    (tmp_path/"vocab.txt").write_text("\n".join(words))
    weights = {name: tensor / 10 if "LayerNorm" not in name else tensor for name, tensor in made_up_weights(0, 30522, 768, 12, 3072).items()}
    labeller = load_chexbert(save(weights, tmp_path/"chexbert.pth"), tmp_path/"vocab.txt", "cpu")
    assert sum(p.numel() for p in labeller.model.parameters()) == 109_482_240 + 13*4*769 + 2*769 # BERT-base and the heads
    reports = REPORTS + ["w7 w9 w30000 the heart"]
    assert (labeller(reports) == plain_labels(weights, reports, labeller.tokenizer, 12, 12)).all()


def test_old_files_may_hold_positions(files, tmp_path):
    weights = made_up_weights() | {"module.bert.embeddings.position_ids": torch.arange(512)[None]}
    assert (load_chexbert(save(weights, tmp_path/"old.pth"), files[1], "cpu")(REPORTS) == load_chexbert(*files, "cpu")(REPORTS)).all()


# files that are no CheXbert

class Mischief:
    def __reduce__(self): return (os.mkdir, (os.environ["MISCHIEF"],))


@pytest.mark.parametrize("new_format", [True, False])
def test_code_in_the_file_is_not_run(new_format, files, tmp_path, monkeypatch):
    monkeypatch.setenv("MISCHIEF", str(tmp_path/"mischief"))
    for content in ({"model_state_dict": made_up_weights(), "args": Mischief()}, {"model_state_dict": made_up_weights() | {"module.x": Mischief()}}, Mischief()):
        torch.save(content, tmp_path/"bad.pth", _use_new_zipfile_serialization=new_format)
        with pytest.raises(ValueError, match=r"bad\.pth cannot be read as weights"): read_chexbert(tmp_path/"bad.pth")
    assert not (tmp_path/"mischief").exists()


@pytest.mark.parametrize("new_format", [True, False])
def test_a_file_cut_short(new_format, files, tmp_path):
    whole = save(made_up_weights(), tmp_path/"whole.pth", _use_new_zipfile_serialization=new_format).read_bytes()
    for size in (0, 1, 100, len(whole) // 3, len(whole) // 2, len(whole) - 1000):
        (tmp_path/"cut.pth").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut\.pth cannot be read as weights: is it whole"): read_chexbert(tmp_path/"cut.pth")


def changed(weights, how):
    if how == "key missing": weights.pop("module.linear_heads.3.bias")
    if how == "layer missing": [weights.pop(name) for name in list(weights) if ".layer.1." in name]
    if how == "key unknown": weights["module.linear_heads.14.bias"] = torch.zeros(2)
    if how == "other shape": weights["module.linear_heads.13.weight"] = torch.zeros(4, 128)
    if how == "no BERT": weights = {name: tensor for name, tensor in weights.items() if "word_embeddings" not in name}
    if how == "other width": weights = made_up_weights(width=72)
    if how == "no layers": weights = {name: tensor for name, tensor in weights.items() if ".layer." not in name}
    return weights


@pytest.mark.parametrize("how, said", [
    ("key missing", "1 missing: linear_heads.3.bias"), ("layer missing", r"bert\.encoder\.layer\.1\.attention"),
    ("key unknown", "1 unexpected: linear_heads.14.bias"), ("other shape", r"linear_heads\.13\.weight \(4, 128\) instead of \(2, 128\)"),
    ("no BERT", "word_embeddings.weight' is missing"), ("other width", "72 channels"), ("no layers", "intermediate.dense.weight' is missing")])
def test_weights_that_do_not_fit(how, said, tmp_path):
    with pytest.raises(ValueError, match=said) as error: read_chexbert(save(changed(made_up_weights(), how), tmp_path/"bad.pth"))
    assert "bad.pth" in str(error.value)


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": {}}, {"model_state_dict": [1]}, {"model_state_dict": {"a": 1}}, torch.zeros(3)])
def test_another_kind_of_file(content, tmp_path):
    torch.save(content, tmp_path/"bad.pth")
    with pytest.raises(ValueError, match=r"bad\.pth does not hold CheXbert.*Checkpoint download"): read_chexbert(tmp_path/"bad.pth")


def test_what_is_not_there(files, tmp_path, monkeypatch):
    for path in (tmp_path/"no.pth", tmp_path):
        with pytest.raises(FileNotFoundError, match="Checkpoint download.*non-commercial"): load_chexbert(path)
    with pytest.raises(FileNotFoundError, match="no/such/vocab.txt does not exist"): load_chexbert(files[0], "no/such/vocab.txt")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="no-owner/no-such-vocabulary"): load_vocabulary("no-owner/no-such-vocabulary")
    for content in (b"", b"\n", b"\xff\xfe\x00", "\n".join(WORDS).encode()): # the last one lacks [CLS] and its like
        (tmp_path/"wrong.txt").write_bytes(content)
        with pytest.raises(OSError, match="vocabulary"): load_vocabulary(tmp_path/"wrong.txt")


def test_another_vocabulary(files, tmp_path):
    for words in (VOCABULARY[:-1], VOCABULARY + ["more"]):
        (tmp_path/"wrong.txt").write_text("\n".join(words))
        with pytest.raises(ValueError, match="vocabulary.*26.*bert-base-uncased"): load_chexbert(files[0], tmp_path/"wrong.txt", "cpu")


def test_vocabulary_from_a_folder(files, labeller, tmp_path):
    assert (load_chexbert(files[0], tmp_path, "cpu")(REPORTS) == labeller(REPORTS)).all() # holds vocab.txt
    labeller.tokenizer.save_pretrained(tmp_path/"saved")
    assert (load_chexbert(files[0], tmp_path/"saved", "cpu")(REPORTS) == labeller(REPORTS)).all()


# texts

def word_pieces(report):
    "BERT's pieces of plain ASCII text, the longest first."
    pieces = []
    for word in "".join(f" {c} " if c in ".,-'" else c for c in report.lower()).split():
        rest, found = word, []
        while rest:
            known = [rest[:n] for n in range(len(rest), 0, -1) if ("##" if found else "") + rest[:n] in VOCABULARY]
            if not known: found = ["[UNK]"]; break
            found.append(("##" if found else "") + known[0]); rest = rest[len(known[0]):]
        pieces += found
    return ["[CLS]", *pieces, "[SEP]"]


def test_tokens(labeller):
    reports = ["The heart,is NORMAL.", "pneumothorax pneumothor pneumothorx axe", "  no\t\r\n edema\fleft\x0bis\x85the ", "", "left-small 1's 11"]
    rows = clinical.report_tokens(labeller.tokenizer, reports)
    assert [labeller.tokenizer.convert_ids_to_tokens(row) for row in rows] == [word_pieces(report) for report in reports]


def test_a_text_of_5000_words_is_cut_and_counted(labeller):
    words = list(np.random.default_rng(0).choice(WORDS[:13], 5000))
    for _ in range(2): # the second time, the label is known
        with pytest.warns(UserWarning, match="^1 of 3 reports have more than 512 tokens"): labels = labeller(["no edema .", " ".join(words), "clear ."])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (labeller([" ".join(words[:510])])[0] == labels[1]).all()


@pytest.mark.parametrize("reports, said", [("one text", "not a str"), ({"s1": "text"}, "not a dict"), (["a", None, 3], "2 reports are not text, the first at place 1: None")])
def test_what_is_not_text(reports, said, labeller):
    with pytest.raises(TypeError, match=said): labeller(reports)


def test_lists_of_all_kinds(labeller):
    expected = labeller(REPORTS)
    assert all((labeller(kind(REPORTS)) == expected).all() for kind in (tuple, pd.Series, iter)) and labeller([]).shape == (0, 14)


def test_each_text_is_read_once(files, labeller, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(clinical, "classify", lambda model, rows, classify=clinical.classify: read.append(len(rows)) or classify(model, rows))
    cache, other = tmp_path/"a folder.json", save(made_up_weights(1), tmp_path/"other.pth")
    first = load_chexbert(*files, "cpu", cache)
    expected = first(REPORTS + REPORTS[:3] + ["THE  heart\nis normal."])
    assert (first(REPORTS[::-1]) == expected[len(REPORTS) - 1::-1]).all() and read == [len(REPORTS), 0]
    assert (load_chexbert(*files, "cpu", cache)(REPORTS) == expected[:len(REPORTS)]).all() and read[2:] == [0]
    assert not (load_chexbert(other, files[1], "cpu", cache)(REPORTS) == expected[:len(REPORTS)]).all() and read[3:] == [len(REPORTS)] # other weights, other labels
    assert len(read_cache(cache)) == 2*len(REPORTS) and "heart" not in cache.read_text() and set(tmp_path.iterdir()) == {*files, cache, other}


def test_two_writers_keep_each_others_labels(files, tmp_path):
    one, two = (load_chexbert(*files, "cpu", tmp_path/"runs"/"labels.json") for _ in range(2))
    one(REPORTS[:2]), two(REPORTS[2:])
    assert len(read_cache(tmp_path/"runs"/"labels.json")) == len(REPORTS)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": "1"}', '{"a": 3}', '{"a": "00000000000007"}', "\x80\x04K"])
def test_a_damaged_cache(content, files, tmp_path):
    (tmp_path/"labels.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"labels\.json.*delete it"): load_chexbert(*files, "cpu", tmp_path/"labels.json")


# averages

def random_labels(seed):
    draw = np.random.default_rng(seed)
    n, c, share = draw.integers(1, 60), draw.integers(2, 15), draw.choice([0, .05, .3, .8, 1], (2, 15))
    truth, predicted = draw.random((2, n, c)) < share[:, None, :c]
    return (truth, np.where(draw.random((n, c)) < .6, truth, predicted)) if draw.random() < .5 else (truth, predicted)


def test_averages_are_scikit_learns():
    undefined = 0
    for truth, predicted in map(random_labels, range(120)):
        ours, table = averages(truth, predicted), label_table(truth, predicted, tuple(range(truth.shape[1])), resamples=1)
        for ours_name, name in (("macro", "macro"), ("micro", "micro"), ("example", "samples")):
            theirs = precision_recall_fscore_support(truth, predicted, average=name, zero_division=0)[:3]
            assert np.allclose([ours[f"{score}_{ours_name}"] for score in SCORES], theirs, atol=1e-12)
            assert np.allclose(table.loc[ours_name, list(SCORES)].astype(float), theirs, atol=1e-12)
        each = precision_recall_fscore_support(truth, predicted, average=None, zero_division=0)
        assert np.allclose(table.iloc[:-3][[*SCORES, "support"]].to_numpy().T, each)
        counts = ["true_negative", "false_positive", "false_negative", "true_positive"]
        assert (table.iloc[:-3][counts].to_numpy() == multilabel_confusion_matrix(truth, predicted).reshape(-1, 4)).all()
        assert (table.iloc[:-3][counts].sum() == table.loc["micro", counts]).all()
        undefined += np.isnan(precision_recall_fscore_support(truth, predicted, average=None, zero_division=np.nan)[0]).any()
    assert undefined > 20 # 0/0 did occur, and counted as 0


def test_what_scikit_learn_does_not_define_is_0():
    nothing = np.zeros((5, 3), bool)
    assert set(averages(nothing, nothing).values()) == {0.0}
    assert averages(nothing, ~nothing) == averages(~nothing, nothing) == dict.fromkeys(averages(nothing, nothing), 0.0)
    assert set(averages(~nothing, ~nothing).values()) == {1.0}
    assert averages(np.array([[True], [False]]), np.array([[True], [False]]))["f1_example"] == .5 # the study with nothing earns nothing


@pytest.mark.parametrize("truth, predicted, said", [
    (np.zeros((3, 2)), np.zeros((2, 3)), r"truth \(3, 2\) and predicted \(2, 3\)"), (np.zeros(3), np.zeros(3), r"truth \(3,\)"), (np.zeros((0, 3)), np.zeros((0, 3)), "not empty"),
    (np.full((2, 2), 3), np.zeros((2, 2)), "`positives`"), (np.zeros((2, 2)), np.full((2, 2), np.nan), "true or false")])
def test_labels_that_cannot_be_scored(truth, predicted, said):
    with pytest.raises(ValueError, match=said): averages(truth, predicted)


def test_names_that_do_not_fit():
    with pytest.raises(ValueError, match="3 names for 2 observations"): label_table(np.ones((4, 2)), np.ones((4, 2)), ("a", "b", "c"))
    with pytest.raises(ValueError, match="not as 'blank'"): positives(np.zeros((2, 14)), "blank")


def test_intervals_are_those_of_resampled_studies():
    truth, predicted = np.random.default_rng(0).random((2, 40, 4)) < .4
    times = np.random.default_rng(7).multinomial(40, np.full(40, 1/40), size=600)
    draws = pd.DataFrame([averages(np.repeat(truth, row, axis=0), np.repeat(predicted, row, axis=0)) for row in times])
    table = label_table(truth, predicted, tuple("abcd"), resamples=600, seed=7)
    for average in AVERAGES:
        for score in SCORES:
            assert np.allclose(table.loc[average, [f"{score}_low", f"{score}_high"]].astype(float), draws[f"{score}_{average}"].quantile([.025, .975]))
    first = pd.DataFrame([averages(np.repeat(truth[:, :1], row, axis=0), np.repeat(predicted[:, :1], row, axis=0)) for row in times])
    assert np.allclose(table.loc["a", ["f1_low", "f1_high"]].astype(float), first.f1_macro.quantile([.025, .975]))


@pytest.mark.parametrize("draws", [150, pytest.param(1000, marks=pytest.mark.full)])
def test_intervals_cover_the_truth(draws):
    "Many test sets are drawn out of one large population, whose scores are known."
    rng = np.random.default_rng(0)
    truth = rng.random((100_000, 5)) < [.1, .2, .3, .4, .5]
    predicted = np.where(rng.random(truth.shape) < .7, truth, rng.random(truth.shape) < .3)
    known, covered = averages(truth, predicted), []
    for _ in range(draws):
        picked = rng.integers(len(truth), size=400)
        table = label_table(truth[picked], predicted[picked], tuple(range(5)), resamples=400)
        covered.append([table.f1_low[a] <= known[f"f1_{a}"] <= table.f1_high[a] for a in AVERAGES])
    assert (np.abs(np.mean(covered, axis=0) - .95) < (.02 if draws == 1000 else .05)).all()


def test_10000_resamples_of_3858_studies():
    truth, predicted = np.random.default_rng(0).random((2, 3858, 14)) < .2
    start = time.perf_counter()
    label_table(truth, predicted, OBSERVATIONS, resamples=10_000)
    assert time.perf_counter() - start < 40 # 6 seconds on an idle core


def test_clinical_scores_are_those_of_the_tables():
    truth, predicted = np.random.default_rng(1).choice(4, (2, 120, 14), p=[.5, .25, .05, .2])
    scores = clinical_scores(truth, predicted, resamples=50).set_index(["observations", "uncertain", "average", "metric"])
    five = [OBSERVATIONS.index(name) for name in FIVE]
    assert five == [1, 4, 5, 7, 9] and len(scores) == 36 and scores.index.is_unique
    table = label_table((truth[:, five] % 2 == 1), (predicted[:, five] % 2 == 1), FIVE, resamples=50) # 1 and 3: positive and uncertain
    assert scores.loc[(5, "positive", "example", "recall")].tolist() == table.loc["example", ["recall", "recall_low", "recall_high"]].tolist()
    assert scores.score[14, "negative", "micro", "f1"] == pytest.approx(averages(truth == 1, predicted == 1)["f1_micro"])


def test_class_confusion():
    truth, predicted = np.random.default_rng(2).integers(0, 4, (2, 50, 14))
    confusion = class_confusion(truth, predicted)
    for i, name in enumerate(OBSERVATIONS):
        for a, row in enumerate(CLASSES):
            assert confusion.loc[(name, row)].tolist() == [int(((truth[:, i] == a) & (predicted[:, i] == b)).sum()) for b in range(4)]


# what RadEval has

class FakeRadEval:
    def __init__(self, metrics, show_progress): self.metric, = metrics
    def __call__(self, refs, hyps):
        if self.metric == "radcliq": raise OSError("no weights\nhere is a long story")
        return {f"{self.metric}_said": float(len(hyps[0])), f"{self.metric}_true": float(len(refs[0]))}


def test_optional_scores(monkeypatch):
    monkeypatch.setitem(sys.modules, "radeval", types.SimpleNamespace(RadEval=FakeRadEval))
    monkeypatch.delitem(sys.modules, "RadEval", raising=False)
    table = optional_scores({"a": "Edema.", "b": "clear"}, {"b": "clear", "a": ["No edema.", "other"]}, ("radgraph", "radcliq"))
    assert table.metric.tolist() == ["radgraph_said", "radgraph_true", "radcliq"] and table.value.tolist()[:2] == [6, 9] and np.isnan(table.value[2])
    assert table.better.tolist() == ["higher", "higher", "lower"] and table.reason.tolist() == ["", "", "OSError: no weights"]
    sys.modules.pop("RadEval")


def test_without_radeval(monkeypatch):
    monkeypatch.setitem(sys.modules, "radeval", None)
    table = optional_scores(["a"], ["a"])
    assert table.metric.tolist() == list(clinical.OPTIONAL) and table.value.isna().all() and table.reason.str.contains(r"pip install cvt2distilgpt2\[clinical\]", regex=True).all()


def test_optional_scores_check_what_they_are_given():
    with pytest.raises(ValueError, match="not \\('bleu',\\)"): optional_scores(["a"], ["a"], ("bleu",))
    with pytest.raises(ValueError, match="no prediction for 1: 's2'"): optional_scores({"s1": "a"}, {"s1": "a", "s2": "b"})
