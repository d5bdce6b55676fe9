"The tokenizers on any text, and the warm start of the decoder."

import os
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

from cvt2distilgpt2.decoder import (
    add_special_tokens,
    decode_reports,
    decoder_config,
    is_cross_attention,
    load_decoder,
    load_tokenizer,
    report_ids,
    tokenize_reports,
    train_tokenizer,
)

torch.set_num_threads(1)
DATA = os.environ.get("CVT2DISTILGPT2_TEST_DATA")
with_data = pytest.mark.skipif(
    not DATA, reason="CVT2DISTILGPT2_TEST_DATA does not name the folder of the test data"
)
REPORTS = [
    "The heart is enlarged. There is a small left effusion.",
    "No focal consolidation, effusion or pneumothorax.",
    "Lungs are clear. The heart is normal in size.",
]


@pytest.fixture(params=["trained", pytest.param("gpt2", marks=with_data)])
def tokenizer(request):
    if request.param == "trained":
        return train_tokenizer(REPORTS * 3, 320)
    return load_tokenizer(Path(DATA) / "gpt2_bpe")


def odd_texts(n=300):
    "Texts of pieces that tokenizers get wrong, and texts of random characters."
    rng = random.Random(0)
    special = ["[BOS]", "[PAD]", "<|endoftext|>", "<unk>"]
    spaces = [" ", "  ", "\n", "\r\n", "\t", "\x00", "\u00a0", "\u200b", "\ufffd"]
    words = ["A", "b", "7", "the", "n't", "'s ", " .", " ,", "___"]
    beyond_ascii = ["é", "e\u0301", "ß", "🫁", "中文", "Ġ"]
    pieces = special + spaces + words + beyond_ascii
    texts = ["".join(rng.choices(pieces, k=rng.randint(0, 12))) for _ in range(n)]
    planes = [range(0xD800), range(0xE000, 0x110000)]  # all characters but surrogates
    for _ in range(50):
        texts.append("".join(chr(rng.choice(rng.choice(planes))) for _ in range(20)))
    return texts


def test_any_text_comes_back_exactly(tokenizer):
    texts = odd_texts()
    batch = tokenize_reports(tokenizer, texts, max_length=1000)
    assert decode_reports(tokenizer, batch["decoder_input_ids"]) == texts
    labels = batch["labels"].masked_fill(batch["labels"] == -100, tokenizer.pad_token_id)
    assert decode_reports(tokenizer, labels) == texts


def test_what_is_saved_is_the_same_tokenizer(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert len(loaded) == len(tokenizer)
    for text in odd_texts():
        assert report_ids(loaded, text) == report_ids(tokenizer, text)


def test_ends_padding_and_shift(tokenizer):
    eos, bos, pad = tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id
    assert (eos, bos, pad) == (len(tokenizer) - 3, len(tokenizer) - 2, len(tokenizer) - 1)
    body = tokenizer.encode(REPORTS[0])
    batch = tokenize_reports(tokenizer, [REPORTS[0], ""])
    n = len(body) + 1
    assert batch["decoder_input_ids"].tolist() == [[bos, *body], [bos, eos, *[pad] * (n - 2)]]
    assert batch["labels"].tolist() == [[*body, eos], [eos, *[-100] * (n - 1)]]
    assert batch["decoder_attention_mask"].tolist() == [[1] * n, [1] + [0] * (n - 1)]


@pytest.mark.parametrize("max_length", [1, 2, 60, 128])
def test_long_reports_are_cut(tokenizer, max_length):
    batch = tokenize_reports(tokenizer, ["effusion " * 300, "x"], max_length)
    assert batch["labels"].shape == (2, max_length)
    assert tokenizer.eos_token_id not in batch["labels"][0]
    assert batch["labels"][0, -1] == report_ids(tokenizer, "effusion " * 300, 1000)[max_length]


@with_data
def test_gpt2s_own_vocabulary():
    gpt2 = load_tokenizer(Path(DATA) / "gpt2_bpe")
    special = ["<|endoftext|>", "[BOS]", "[PAD]"]
    assert gpt2.convert_tokens_to_ids(special) == [50256, 50257, 50258]
    assert len(gpt2) == 50259
    assert gpt2.encode("Hello world") == [15496, 995]  # as transformers documents
    assert report_ids(gpt2, "Hello world") == [50257, 15496, 995, 50256]


def test_training_a_tokenizer_is_deterministic_and_learns():
    first = train_tokenizer(REPORTS * 3, 320)
    second = train_tokenizer(REPORTS * 3, 320)
    assert first.get_vocab() == second.get_vocab() and len(first) == 320
    assert len(report_ids(first, REPORTS[0])) < len(REPORTS[0]) / 2


def test_a_vocabulary_of_no_reports_has_the_bytes_and_the_special_tokens():
    assert len(train_tokenizer([], 1000)) == 259


def test_a_vocabulary_too_small_for_all_bytes():
    with pytest.raises(ValueError, match="259"):
        train_tokenizer(REPORTS, 258)


def test_an_empty_tokenizer():
    with pytest.raises(ValueError, match="were its files found"):
        add_special_tokens(GPT2Tokenizer())


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises((OSError, ValueError)):
        load_tokenizer(tmp_path)


def test_a_size_that_gpt2_does_not_have():
    with pytest.raises(TypeError, match="n_layers"):
        decoder_config(n_layers=3)


@pytest.fixture
def language_model(tmp_path):
    "A small random GPT-2 without cross-attention, and the folder where it is saved."
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=318, n_layer=2, n_embd=32, n_head=2, bos_token_id=317, eos_token_id=317
    )
    model = GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path)
    return model, tmp_path


@pytest.fixture
def warm(language_model):
    "The decoder that starts from `language_model`."
    _, folder = language_model
    return load_decoder(folder, train_tokenizer(REPORTS * 3, 320))


def test_warm_start_keeps_everything_but_what_is_new(language_model, warm):
    plain, _ = language_model
    for name, tensor in plain.state_dict().items():
        assert torch.equal(warm.state_dict()[name][: len(tensor)], tensor)


def test_warm_start_draws_the_new_embeddings_as_gpt2_does(language_model, warm):
    plain, _ = language_model
    new = warm.transformer.wte.weight[318:]
    mean = plain.transformer.wte.weight.mean(0)
    assert 0.01 < new.std() < 0.03 and not torch.allclose(new, mean, atol=0.01)


def test_warm_start_draws_the_cross_attention(warm):
    drawn = warm.transformer.h[1].crossattention.c_attn.weight
    assert 0.015 < drawn.std() < 0.025 and drawn.shape == (32, 64)


def test_warm_start_knows_the_special_tokens(warm):
    config = warm.config
    assert config.vocab_size == 320
    assert (config.eos_token_id, config.bos_token_id, config.pad_token_id) == (317, 318, 319)


def test_warm_start_attends_by_pytorchs_own_function(warm):
    assert warm.config._attn_implementation == "sdpa"


def test_masks_among_the_weights_and_bin_files_are_welcome(language_model):
    plain, folder = language_model
    weights = {
        **plain.state_dict(),
        "transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8),
        "transformer.h.1.attn.masked_bias": torch.tensor(-1e4),
    }
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    warm = load_decoder(folder, train_tokenizer(REPORTS * 3, 320))
    assert torch.equal(warm.transformer.wpe.weight, plain.transformer.wpe.weight)


@pytest.mark.parametrize("how", ["missing", "unexpected", "another shape"])
def test_weights_that_do_not_fit(language_model, how):
    plain, folder = language_model
    weights = load_file(folder / "model.safetensors")
    if how == "missing":
        del weights["transformer.h.1.mlp.c_fc.weight"]
    if how == "unexpected":
        weights["transformer.h.1.mlp.c_gate.weight"] = torch.ones(2)
    if how == "another shape":
        weights["transformer.h.1.mlp.c_fc.weight"] = torch.ones(2, 2)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match="h.1.mlp.c_|mismatched"):
        load_decoder(folder, train_tokenizer(REPORTS * 3, 320))


def test_published_parameter_counts():
    with torch.device("meta"):
        model = GPT2LMHeadModel(decoder_config())
    model.tie_weights()
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert sum(sizes.values()) == 96_097_536
    assert sum(sizes[name] for name in sizes if is_cross_attention(name)) == 14_183_424
