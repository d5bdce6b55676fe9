"The search against transformers' generate, token by token, over drawn cases; its memory, what it leaves to transformers."
import random
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GenerationConfig, GPT2LMHeadModel
from transformers.utils import logging

from cvt2distilgpt2.decoder import decoder_config
from cvt2distilgpt2.search import BLOCK, Cache, Pace, Request, Search, Tools, advance, image_bytes, largest_batch, prepare_decoder, read_request, run
from cvt2distilgpt2.search import search_reports

torch.set_num_threads(1)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCABULARY = 60
IDS = {"eos_token_id": VOCABULARY - 3, "bos_token_id": VOCABULARY - 2, "pad_token_id": VOCABULARY - 1}


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
            if parameter.ndim == 1: parameter += 0.2 * torch.randn_like(parameter)
        model.transformer.wte.weight[IDS["eos_token_id"]] *= end
    return model


def drawn_case(seed, longest):
    "A model, visual tokens with their mask, and rules, all by chance."
    chance = random.Random(seed)
    model = drawn_model(chance.randrange(20), chance.choice([0.0, 1.0, 1.5, 2.0, 2.5]))
    images, views, n = chance.randint(1, 16), chance.randint(1, 3), chance.randint(1, 6)
    rules = {"num_beams": chance.randint(1, 8), "max_length": 1 + chance.choice([longest, chance.randint(1, longest)])}
    if chance.random() < 0.3: rules["min_length"] = chance.randint(0, rules["max_length"])
    if rules["num_beams"] > 1:
        rules |= {"length_penalty": chance.choice([1.0, 0.0, 2.0, -1.0, 0.6]), "early_stopping": chance.choice([False, True, "never"])}
    visual = chance.choice([0.5, 2.0, 4.0]) * torch.randn(images, views * n, 32)
    is_view = torch.rand(images, views) > 0.4
    is_view[:, 0] = True
    return model, visual, is_view.repeat_interleave(n, 1), rules


def by_transformers(model, visual, mask, **rules):
    start = torch.full((len(visual), 1), IDS["bos_token_id"], device=visual.device)
    return model.generate(start, attention_mask=torch.ones_like(start), encoder_hidden_states=visual, encoder_attention_mask=mask.long(), **IDS, **rules)


def both(case, dtype, device="cpu", **kwargs):
    model, visual, mask, rules = case
    model, visual, mask = model.to(device, dtype), visual.to(device, dtype), mask.to(device)
    return by_transformers(model, visual, mask, **rules), run(prepare_decoder(model, dtype), visual, mask, Request(**rules, **IDS), **kwargs)


@torch.no_grad()
def score(model, visual, mask, tokens, rules):
    "What a report is chosen by: the sum of its log-probabilities, penalised."
    tokens = tokens[: tokens.tolist().index(IDS["eos_token_id"]) + 1] if IDS["eos_token_id"] in tokens.tolist() else tokens[tokens != IDS["pad_token_id"]]
    logits = model(tokens[None, :-1], encoder_hidden_states=visual[None], encoder_attention_mask=mask[None].long()).logits[0]
    chosen = logits.log_softmax(-1).gather(1, tokens[1:, None])
    return (chosen.sum() / (len(tokens) - 1) ** rules.get("length_penalty", 1.0)).item()


def compare(seeds, longest, dtype, **kwargs):
    "Count the reports that differ in anything but a tie, and list the ties by their two scores."
    ties, lengths = [], []
    for seed in seeds:
        case = drawn_case(seed, longest)
        theirs, ours = both(case, dtype, **kwargs)
        lengths.append(len(set((theirs != IDS["pad_token_id"]).sum(1).tolist())))
        if torch.equal(theirs, ours): continue
        assert dtype != torch.float64, f"case {seed} differs"
        (model, visual, mask, rules), theirs, ours = case, theirs.cpu(), ours.cpu()
        model, visual = model.to("cpu"), visual.to(dtype)
        for i in (i for i in range(len(visual)) if theirs[i].tolist() != ours[i].tolist()):
            ties.append((seed, i, *(score(model, visual[i], mask[i], tokens, rules) for tokens in (theirs[i], ours[i]))))
    print(f"{len(seeds)} cases, {sum(lengths) / len(lengths):.1f} different lengths a case, ties: {ties}")
    assert all(abs(a - b) < 1e-5 for *_, a, b in ties), ties
    assert sum(lengths) > 1.5 * len(lengths)  # reports of a batch do end at different times


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_few_drawn_cases_are_written_as_by_transformers(dtype):
    compare(range(40), 24, dtype)


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_drawn_cases_are_written_as_by_transformers(dtype):
    compare(range(1000, 1600), 127, dtype)


def test_looking_seldom_changes_nothing():
    compare(range(100, 120), 24, torch.float64, pace=Pace(8, 0.5))


def test_programs_for_a_gpu_change_nothing():
    "In Triton's interpreter, where there is no GPU."
    kernels = pytest.importorskip("cvt2distilgpt2.kernels", reason="there is no Triton")
    tools = Tools(kernels.attend, kernels.enter, kernels.best_words, True)
    compare(range(200, 206), 8, torch.float32, device=DEVICE, pace=Pace(3, 0.5), tools=tools)


@pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU")
@pytest.mark.parametrize("plain", [True, False])
def test_drawn_cases_on_a_gpu_are_written_as_by_transformers(plain):
    compare(range(300, 330), 40, torch.float32, device=DEVICE, tools=Tools() if plain else None)


def test_every_number_of_beams_and_images_alike():
    "One image alone is written as it is among others."
    model, visual, mask, _ = drawn_case(7, 10)
    decoder = prepare_decoder(model.double(), torch.float64)
    for beams in range(1, 10):
        request = Request(num_beams=beams, max_length=20, **IDS)
        together = run(decoder, visual.double(), mask, request)
        for i in range(len(visual)):
            alone = run(decoder, visual[i : i + 1].double(), mask[i : i + 1], request)
            assert torch.equal(together[i : i + 1, : alone.shape[1]], alone)


class Watch(TorchDispatchMode):
    "Count the bytes of all tensors that are made and alive, and note operations that wait for a device."
    waits = {"aten.item.default", "aten._local_scalar_dense.default", "aten.nonzero.default", "aten.is_nonzero.default", "aten.equal.default"}

    def __init__(self):
        super().__init__()
        self.alive, self.peak, self.seen, self.waited = 0, 0, set(), []

    def drop(self, key, size):
        self.alive -= size
        self.seen.discard(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func) in self.waits: self.waited.append(str(func))
        plain = lambda tree: [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor) and t.layout is torch.strided and not t.is_mkldnn]
        given = {t.untyped_storage()._cdata for t in plain((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for storage in (t.untyped_storage() for t in plain(out)):
            if storage._cdata in self.seen | given: continue
            self.seen.add(storage._cdata)
            self.alive += storage.nbytes()
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self.drop, storage._cdata, storage.nbytes())
        return out


def addresses(search): return [t.data_ptr() for t in [*search.cache.tensors(), *search.chooser.tensors(), search.position]]


@pytest.mark.parametrize("beams", [1, 4])
def test_a_step_can_be_recorded(beams):
    "It neither reads anything back nor moves what it changes, so that a CUDA graph can replay it."
    model, visual, mask, _ = drawn_case(3, 10)
    request = Request(num_beams=beams, max_length=30, min_length=5, early_stopping=True, **IDS)
    with torch.inference_mode():
        search = Search(prepare_decoder(model, torch.float32), visual, mask, request, Pace(8, 0.5))
        search.advance(1)
        before, images = addresses(search), len(search.rows)
        with Watch() as watch: advance(search.decoder, search.cache, search.chooser, search.position, images)
    assert addresses(search) == before and not watch.waited


def measure(model, images, n, length, search):
    visual = torch.randn(images, n, model.config.n_embd)
    request, mask = Request(num_beams=4, max_length=length, min_length=length, **IDS), torch.ones(images, n, dtype=torch.bool)
    decoder = prepare_decoder(model, torch.float32)
    with Watch() as watch:
        if search == "own": run(decoder, visual, None, request)
        else: by_transformers(model, visual, mask, num_beams=4, max_length=length, min_length=length)
    return watch.peak


def test_memory_is_a_third_and_known_beforehand():
    "In the published proportions: four beams, 576 visual tokens, 128 of text."
    torch.manual_seed(0)
    model = GPT2LMHeadModel(decoder_config(VOCABULARY, n_layer=6, n_embd=96, n_head=3, n_positions=130, initializer_range=0.2)).eval()
    request = Request(num_beams=4, max_length=128, **IDS)
    ours, theirs = (measure(model, 2, 576, 128, search) for search in ("own", "transformers"))
    bound = image_bytes(model.config, 576, request, torch.float32)
    print(f"peak {ours / 2**20:.1f} MB, transformers {theirs / 2**20:.1f} MB, ratio {ours / theirs:.3f}; bound {2 * sum(bound.values()) / 2**20:.1f} MB")
    assert ours < theirs / 3
    assert bound["caches"] < 0.4 * 4 * 2 * 6 * (576 + 127) * 96 * 4
    memory = 20 * 2**20
    images = largest_batch(memory, model.config, 576, request, torch.float32)
    assert images >= 3 and 0.5 * memory < measure(model, images, 576, 128, "own") < memory


def test_the_bound_on_the_caches_is_met_exactly_at_worst():
    model, visual, _, _ = drawn_case(3, 10)
    request = Request(num_beams=4, max_length=65, **IDS)
    cache = Cache(prepare_decoder(model, torch.float32), visual, torch.ones(visual.shape[:2]), 4)
    cache.make_room(len(visual), 4 * 64 + BLOCK)
    assert sum(t.nbytes for t in cache.tensors()) == len(visual) * image_bytes(model.config, visual.shape[1], request, torch.float32)["caches"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_writes_reports(dtype):
    model, visual, mask, _ = drawn_case(3, 10)
    request = Request(num_beams=4, max_length=20, **IDS)
    whole, half = (run(prepare_decoder(model, t), visual, mask, request) for t in (torch.float32, dtype))
    assert (whole[:, :2] == half[:, :2]).float().mean() > 0.8


USUAL = GenerationConfig(max_length=40, **IDS)


@pytest.mark.parametrize("rules", [{"do_sample": True}, {"num_return_sequences": 2, "num_beams": 2}, {"repetition_penalty": 1.1}, {"output_scores": True},
    {"return_dict_in_generate": True}, {"streamer": object()}, {"decoder_input_ids": torch.ones(1, 2)}, {"eos_token_id": [1, 2]}, {"max_length": 1},
    {"max_length": 200}, {"bad_words_ids": [[3]]}, {"use_cache": False}, {"early_stopping": "soon"}, {"generation_config": GenerationConfig(do_sample=True)}])
def test_what_the_search_does_not_serve_is_named(rules):
    assert isinstance(read_request(drawn_model(0, 1.0), USUAL, rules), str)


@pytest.mark.parametrize("change", [{"activation_function": "relu"}, {"scale_attn_by_inverse_layer_idx": True}, {"add_cross_attention": False}])
def test_decoders_that_are_not_plain_are_left_alone(change):
    model = GPT2LMHeadModel(decoder_config(VOCABULARY, n_layer=1, n_embd=32, n_head=2, **change)).eval()
    assert str(*change.values()) in read_request(model, USUAL, {})


def test_decoders_with_foreign_parts_or_in_training_are_left_alone():
    model = drawn_model(0, 1.0)
    assert read_request(model.train(), USUAL, {}) == "training mode"
    model.eval().transformer.h[0].attn.c_attn = type("Adapter", (torch.nn.Linear,), {"__module__": "peft.layer"})(32, 96)
    assert read_request(model, USUAL, {}) == "peft.layer"


def test_rules_are_read_as_transformers_reads_them():
    model, read = drawn_model(0, 1.0), lambda **rules: read_request(drawn_model(0, 1.0), USUAL, rules)
    assert read() == Request(max_length=40, **IDS)
    assert read(max_new_tokens=5, max_length=90, min_new_tokens=2, min_length=30) == Request(max_length=6, min_length=3, **IDS)
    assert read(generation_config=GenerationConfig(num_beams=3, length_penalty=0.5)) == Request(3, 40, 0, 0.5, **IDS)
    assert read_request(model, GenerationConfig(eos_token_id=57, bos_token_id=58), {}) == Request(max_length=21, eos_token_id=57, bos_token_id=58, pad_token_id=57)


def test_a_saved_configuration_that_spells_every_default_out_is_served():
    usual = GenerationConfig(**GenerationConfig._get_default_generation_params() | {"max_length": 40, "temperature": 0.7} | IDS)
    assert read_request(drawn_model(0, 1.0), usual, {"num_beams": 4}) == Request(num_beams=4, max_length=40, **IDS)


def test_changed_weights_are_seen():
    model, visual, mask, _ = drawn_case(3, 10)
    request = Request(num_beams=3, max_length=20, **IDS)
    before = search_reports(model, visual, mask, request)
    with torch.no_grad(): model.transformer.wte.weight.mul_(-1)
    after = search_reports(model, visual, mask, request)
    assert before.tolist() != after.tolist() and torch.equal(after, by_transformers(model, visual, mask, num_beams=3, max_length=20))
