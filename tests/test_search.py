"The search against transformers' generate, token by token; its memory; what it leaves to others."

import random
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GenerationConfig, GPT2LMHeadModel
from transformers.utils import logging

from cvt2distilgpt2.decoder import decoder_config
from cvt2distilgpt2.encoder import inference_form
from cvt2distilgpt2.search import (
    BLOCK,
    Cache,
    Ops,
    Search,
    SearchConfig,
    SyncPolicy,
    beam_search,
    decoder_for_inference,
    image_bytes,
    largest_batch,
    read_config,
)

torch.set_num_threads(1)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCABULARY = 60
IDS = {
    "eos_token_id": VOCABULARY - 3,
    "bos_token_id": VOCABULARY - 2,
    "pad_token_id": VOCABULARY - 1,
}


@pytest.fixture(autouse=True)
def quiet():
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(verbosity)


def drawn_model(seed, end):
    "A small GPT-2 with random weights; the larger `end`, the more its reports differ in length."
    torch.manual_seed(seed)
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 130, "initializer_range": 0.3}
    model = GPT2LMHeadModel(decoder_config(VOCABULARY, **sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
        model.transformer.wte.weight[IDS["eos_token_id"]] *= end
    return model


def drawn_case(seed, longest):
    "A model, visual tokens with their mask, and rules, all by chance."
    chance = random.Random(seed)
    model = drawn_model(chance.randrange(20), chance.choice([0.0, 1.0, 1.5, 2.0, 2.5]))
    images, views, n = chance.randint(1, 16), chance.randint(1, 3), chance.randint(1, 6)
    rules = {
        "num_beams": chance.randint(1, 8),
        "max_length": 1 + chance.choice([longest, chance.randint(1, longest)]),
    }
    if chance.random() < 0.3:
        rules["min_length"] = chance.randint(0, rules["max_length"])
    if rules["num_beams"] > 1:
        rules |= {
            "length_penalty": chance.choice([1.0, 0.0, 2.0, -1.0, 0.6]),
            "early_stopping": chance.choice([False, True, "never"]),
        }
    visual = chance.choice([0.5, 2.0, 4.0]) * torch.randn(images, views * n, 32)
    is_view = torch.rand(images, views) > 0.4
    is_view[:, 0] = True
    return model, visual, is_view.repeat_interleave(n, 1), rules


def by_transformers(model, visual, mask, **rules):
    start = torch.full((len(visual), 1), IDS["bos_token_id"], device=visual.device)
    return model.generate(
        start,
        attention_mask=torch.ones_like(start),
        encoder_hidden_states=visual,
        encoder_attention_mask=mask.long(),
        **IDS,
        **rules,
    )


def both(case, dtype, device="cpu", **kwargs):
    "Write the reports of a case by transformers and by our own search."
    model, visual, mask, rules = case
    model = model.to(device, dtype)
    visual = visual.to(device, dtype)
    mask = mask.to(device)
    decoder = decoder_for_inference(model, dtype)
    ours = beam_search(decoder, visual, mask, SearchConfig(**rules, **IDS), **kwargs)
    return by_transformers(model, visual, mask, **rules), ours


@torch.no_grad()
def score(model, visual, mask, tokens, rules):
    "What a report is chosen by: the sum of its log-probabilities, penalised."
    ends = (tokens == IDS["eos_token_id"]).nonzero()
    if len(ends):
        tokens = tokens[: ends[0].item() + 1]
    else:
        tokens = tokens[tokens != IDS["pad_token_id"]]
    logits = model(
        tokens[None, :-1],
        encoder_hidden_states=visual[None],
        encoder_attention_mask=mask[None].long(),
    ).logits[0]
    chosen = logits.log_softmax(-1).gather(1, tokens[1:, None])
    return (chosen.sum() / (len(tokens) - 1) ** rules.get("length_penalty", 1.0)).item()


def compare(seeds, longest, dtype, **kwargs):
    "Assert that reports differ in nothing but ties, which are listed with their two scores."
    ties = []
    different_lengths = 0
    for seed in seeds:
        case = drawn_case(seed, longest)
        expected, ours = both(case, dtype, **kwargs)
        lengths = (expected != IDS["pad_token_id"]).sum(1)
        different_lengths += len(lengths.unique())
        if torch.equal(expected, ours):
            continue
        assert dtype != torch.float64, f"case {seed} differs"
        model, visual, mask, rules = case
        model = model.to("cpu")
        visual = visual.to(dtype)
        for i, (a, b) in enumerate(zip(expected.cpu(), ours.cpu(), strict=True)):
            if a.tolist() != b.tolist():
                scores = [score(model, visual[i], mask[i], tokens, rules) for tokens in (a, b)]
                ties.append((seed, i, *scores))
    print(f"{len(seeds)} cases, {different_lengths} different lengths, ties: {ties}")
    assert all(abs(a - b) < 1e-5 for *_, a, b in ties), ties
    assert different_lengths > 1.5 * len(seeds)  # reports of a batch end at different times


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_few_drawn_cases_are_written_as_by_transformers(dtype):
    compare(range(40), 24, dtype)


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_drawn_cases_are_written_as_by_transformers(dtype):
    compare(range(1000, 1600), 127, dtype)


def test_looking_seldom_changes_nothing():
    compare(range(100, 120), 24, torch.float64, policy=SyncPolicy(8, 0.5))


def test_programs_for_a_gpu_change_nothing():
    "In Triton's interpreter, where there is no GPU."
    kernels = pytest.importorskip("cvt2distilgpt2.kernels", reason="there is no Triton")
    ops = Ops(kernels.beam_attention, kernels.write_kv, kernels.top_tokens, True)
    policy = SyncPolicy(3, 0.5)
    compare(range(200, 206), 8, torch.float32, device=DEVICE, policy=policy, ops=ops)


@pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU")
@pytest.mark.parametrize("plain", [True, False])
def test_drawn_cases_on_a_gpu_are_written_as_by_transformers(plain):
    ops = Ops() if plain else None
    compare(range(300, 330), 40, torch.float32, device=DEVICE, ops=ops)


def test_every_number_of_beams_and_images_alike():
    "One image alone is written as it is among others."
    model, visual, mask, _ = drawn_case(7, 10)
    visual = visual.double()
    decoder = decoder_for_inference(model.double(), torch.float64)
    for num_beams in range(1, 10):
        config = SearchConfig(num_beams=num_beams, max_length=20, **IDS)
        together = beam_search(decoder, visual, mask, config)
        for i in range(len(visual)):
            alone = beam_search(decoder, visual[i : i + 1], mask[i : i + 1], config)
            assert torch.equal(together[i : i + 1, : alone.shape[1]], alone)


def storages(tree):
    "The storages of all plain tensors of a nested structure."
    for leaf in tree_leaves(tree):
        if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided and not leaf.is_mkldnn:
            yield leaf.untyped_storage()


class Watch(TorchDispatchMode):
    "Count the bytes of tensors that are made and alive, and note what waits for a device."

    waits = {
        "aten.item.default",
        "aten._local_scalar_dense.default",
        "aten.nonzero.default",
        "aten.is_nonzero.default",
        "aten.equal.default",
    }

    def __init__(self):
        super().__init__()
        self.alive = 0
        self.peak = 0
        self.seen = set()
        self.waited = []

    def drop(self, key, size):
        self.alive -= size
        self.seen.discard(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func) in self.waits:
            self.waited.append(str(func))
        inputs = {storage._cdata for storage in storages((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for storage in storages(out):
            if storage._cdata in self.seen | inputs:
                continue
            self.seen.add(storage._cdata)
            self.alive += storage.nbytes()
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self.drop, storage._cdata, storage.nbytes())
        return out


def addresses(search):
    tensors = [*search.cache.tensors(), *search.chooser.tensors(), search.position]
    return [tensor.data_ptr() for tensor in tensors]


@pytest.mark.parametrize("num_beams", [1, 4])
def test_a_step_can_be_recorded(num_beams):
    "It neither reads anything back nor moves what it changes, so that a CUDA graph can replay it."
    model, visual, mask, _ = drawn_case(3, 10)
    rules = {"num_beams": num_beams, "max_length": 30, "min_length": 5, "early_stopping": True}
    with torch.inference_mode():
        decoder = decoder_for_inference(model, torch.float32)
        search = Search(decoder, visual, mask, SearchConfig(**rules, **IDS), Ops())
        search.advance(2)
        before = addresses(search)
        with Watch() as watch:
            search.step()
    assert addresses(search) == before
    assert not watch.waited


def measure(model, images, n, length, search):
    "Return the bytes that a search needs at most at a time."
    visual = torch.randn(images, n, model.config.n_embd)
    mask = torch.ones(images, n, dtype=torch.bool)
    rules = {"num_beams": 4, "max_length": length, "min_length": length}
    decoder = decoder_for_inference(model, torch.float32)
    with Watch() as watch:
        if search == "own":
            beam_search(decoder, visual, None, SearchConfig(**rules, **IDS))
        else:
            by_transformers(model, visual, mask, **rules)
    return watch.peak


def test_memory_is_a_third_and_known_beforehand():
    "In the published proportions: four beams, 576 visual tokens, 128 of text."
    torch.manual_seed(0)
    sizes = {"n_layer": 6, "n_embd": 96, "n_head": 3, "n_positions": 130, "initializer_range": 0.2}
    model = GPT2LMHeadModel(decoder_config(VOCABULARY, **sizes)).eval()
    config = SearchConfig(num_beams=4, max_length=128, **IDS)
    ours = measure(model, 2, 576, 128, "own")
    oracle = measure(model, 2, 576, 128, "transformers")
    bound = image_bytes(model.config, 576, config, torch.float32)
    print(f"ours {ours:,} bytes, transformers {oracle:,}; bound {2 * sum(bound.values()):,}")
    assert ours < oracle / 3
    assert bound["caches"] < 0.4 * 4 * 2 * 6 * (576 + 127) * 96 * 4
    memory = 20 * 2**20
    images = largest_batch(memory, model.config, 576, config, torch.float32)
    assert images >= 3
    assert 0.5 * memory < measure(model, images, 576, 128, "own") < memory


def test_the_bound_on_the_caches_is_met_exactly_at_worst():
    model, visual, _, _ = drawn_case(3, 10)
    images, n, _ = visual.shape
    config = SearchConfig(num_beams=4, max_length=65, **IDS)
    decoder = decoder_for_inference(model, torch.float32)
    cache = Cache(decoder, visual, torch.ones(images, n), 4)
    cache.make_room(images, 4 * 64 + BLOCK)
    bound = images * image_bytes(model.config, n, config, torch.float32)["caches"]
    assert sum(tensor.nbytes for tensor in cache.tensors()) == bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_writes_reports(dtype):
    model, visual, mask, _ = drawn_case(3, 10)
    config = SearchConfig(num_beams=4, max_length=20, **IDS)
    whole = beam_search(decoder_for_inference(model, torch.float32), visual, mask, config)
    half = beam_search(decoder_for_inference(model, dtype), visual, mask, config)
    assert (whole[:, :2] == half[:, :2]).float().mean() > 0.8


DEFAULTS = GenerationConfig(max_length=40, **IDS)


@pytest.mark.parametrize(
    "rules",
    [
        {"do_sample": True},
        {"num_return_sequences": 2, "num_beams": 2},
        {"repetition_penalty": 1.1},
        {"output_scores": True},
        {"return_dict_in_generate": True},
        {"streamer": object()},
        {"decoder_input_ids": torch.ones(1, 2)},
        {"eos_token_id": [1, 2]},
        {"max_length": 1},
        {"max_length": 200},
        {"bad_words_ids": [[3]]},
        {"use_cache": False},
        {"early_stopping": "soon"},
        {"generation_config": GenerationConfig(do_sample=True)},
    ],
)
def test_what_the_search_does_not_support_is_named(rules):
    assert isinstance(read_config(drawn_model(0, 1.0), DEFAULTS, rules), str)


@pytest.mark.parametrize(
    "change",
    [
        {"activation_function": "relu"},
        {"scale_attn_by_inverse_layer_idx": True},
        {"add_cross_attention": False},
    ],
)
def test_decoders_that_are_not_plain_are_left_alone(change):
    sizes = {"n_layer": 1, "n_embd": 32, "n_head": 2}
    model = GPT2LMHeadModel(decoder_config(VOCABULARY, **sizes, **change)).eval()
    assert str(*change.values()) in read_config(model, DEFAULTS, {})


def test_a_decoder_in_training_is_left_alone():
    assert read_config(drawn_model(0, 1.0).train(), DEFAULTS, {}) == "training mode"


def test_a_decoder_with_foreign_parts_is_left_alone():
    model = drawn_model(0, 1.0)
    adapter = type("Adapter", (torch.nn.Linear,), {"__module__": "peft.layer"})
    model.transformer.h[0].attn.c_attn = adapter(32, 96)
    assert read_config(model, DEFAULTS, {}) == "peft.layer"


def test_rules_are_read_as_transformers_reads_them():
    model = drawn_model(0, 1.0)
    assert read_config(model, DEFAULTS, {}) == SearchConfig(max_length=40, **IDS)
    rules = {"max_new_tokens": 5, "max_length": 90, "min_new_tokens": 2, "min_length": 30}
    expected = SearchConfig(max_length=6, min_length=3, **IDS)
    assert read_config(model, DEFAULTS, rules) == expected
    rules = {"generation_config": GenerationConfig(num_beams=3, length_penalty=0.5)}
    assert read_config(model, DEFAULTS, rules) == SearchConfig(3, 40, 0, 0.5, **IDS)


def test_without_a_limit_or_padding_transformers_defaults_hold():
    ids = {"eos_token_id": 57, "bos_token_id": 58}
    expected = SearchConfig(max_length=21, pad_token_id=57, **ids)
    assert read_config(drawn_model(0, 1.0), GenerationConfig(**ids), {}) == expected


def test_a_saved_configuration_that_spells_every_default_out_is_supported():
    rules = GenerationConfig._get_default_generation_params()
    defaults = GenerationConfig(**rules | {"max_length": 40, "temperature": 0.7} | IDS)
    expected = SearchConfig(num_beams=4, max_length=40, **IDS)
    assert read_config(drawn_model(0, 1.0), defaults, {"num_beams": 4}) == expected


def test_changed_weights_are_seen():
    model, visual, mask, _ = drawn_case(3, 10)
    config = SearchConfig(num_beams=3, max_length=20, **IDS)
    decoder = inference_form(model, torch.float32, decoder_for_inference)
    before = beam_search(decoder, visual, mask, config)
    with torch.no_grad():
        model.transformer.wte.weight.mul_(-1)
    decoder = inference_form(model, torch.float32, decoder_for_inference)
    after = beam_search(decoder, visual, mask, config)
    assert before.tolist() != after.tolist()
    assert torch.equal(after, by_transformers(model, visual, mask, num_beams=3, max_length=20))
