"The programs for a GPU against the plain operations; without a GPU in Triton's interpreter."

import pytest
import torch

from cvt2distilgpt2 import search

kernels = pytest.importorskip("cvt2distilgpt2.kernels", reason="there is no Triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLOSE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize(
    "beams, heads, d, length", [(1, 2, 16, 7), (4, 3, 64, 576), (5, 1, 32, 65), (17, 1, 16, 64)]
)
def test_beam_attention(dtype, beams, heads, d, length):
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("the interpreter does not multiply bfloat16")
    torch.manual_seed(beams)
    width = heads * d
    query = torch.randn(3, beams, 3 * width, device=DEVICE, dtype=dtype)[:, :, :width]
    keys, values = torch.randn(2, 3 * heads, length, d, device=DEVICE, dtype=dtype)
    used = torch.tensor([length, 1, length // 2], device=DEVICE, dtype=torch.int32)
    past_mask = torch.where(torch.rand(3, beams, length, device=DEVICE) < 0.3, 0.0, -torch.inf)
    past_mask = past_mask.to(dtype)
    past_mask[:, :, 0] = 0
    slot = torch.arange(length, device=DEVICE).expand(3, beams, -1)
    past_mask[slot >= used[:, None, None]] = -torch.inf
    image_mask = past_mask[:, :1].contiguous()
    cases = ((past_mask, used), (past_mask, None), (image_mask, None), (None, None))
    for mask, used_slots in cases:
        float_mask = None if mask is None else mask.float()
        expected = search.beam_attention(query.float(), keys.float(), values.float(), float_mask)
        out = kernels.beam_attention(query, keys, values, mask, used_slots).float()
        assert torch.allclose(out, expected, atol=CLOSE[dtype], rtol=CLOSE[dtype])


def test_what_lies_beyond_the_used_slots_is_never_read():
    query = torch.randn(1, 4, 32, device=DEVICE)
    keys, values = torch.full((2, 1, 200, 32), torch.nan, device=DEVICE)
    keys[:, :70] = torch.randn(1, 70, 32, device=DEVICE)
    values[:, :70] = torch.randn(1, 70, 32, device=DEVICE)
    used = torch.tensor([70], dtype=torch.int32, device=DEVICE)
    out = kernels.beam_attention(query, keys, values, None, used)
    expected = search.beam_attention(query, keys[:, :70], values[:, :70], None)
    assert torch.allclose(out, expected, atol=1e-5)


def test_write_kv():
    qkv = torch.randn(2, 3, 3 * 2 * 16, device=DEVICE)
    slots = torch.tensor([[4, 0, 9], [1, 2, 3]], device=DEVICE)
    pools = torch.zeros(2, 4, 10, 16, device=DEVICE)
    expected = torch.zeros(2, 4, 10, 16, device=DEVICE)
    kernels.write_kv(qkv, slots, *pools)
    search.write_kv(qkv, slots, *expected)
    assert torch.equal(pools, expected) and pools.any()


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("vocabulary", [8, 60, 4096, 9001])
def test_top_tokens(dtype, vocabulary):
    torch.manual_seed(vocabulary)
    logits = 3 * torch.randn(5, vocabulary + 7, device=DEVICE).to(dtype)[:, :vocabulary]
    end = int(logits[0].argmax())
    for penalty in (0.0, -torch.inf):
        args = (logits.clone(), 8, end, torch.tensor([penalty], device=DEVICE))
        best, tokens = kernels.top_tokens(*args)
        expected, _ = search.top_tokens(*args)
        assert torch.allclose(best, expected, atol=1e-5)
        of_tokens = logits.float().log_softmax(-1).gather(1, tokens)
        of_tokens += torch.where(tokens == end, penalty, 0.0)
        assert torch.allclose(best, of_tokens, atol=1e-5)
        assert all(len(set(row)) == 8 for row in tokens.tolist())


def test_a_machine_that_cannot_build_them_is_told(monkeypatch):
    def fail(*args):
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(kernels, "write_kv", fail)
    kernels.can_build.cache_clear()
    with pytest.warns(UserWarning, match="does without.*no C compiler"):
        assert not kernels.can_build(torch.device(DEVICE))
    kernels.can_build.cache_clear()


def test_they_are_not_supported_on_a_cpu():
    assert not kernels.is_supported(torch.device("cpu"), torch.float32, 64)
    decoder = search.Decoder(1, torch.float32, torch.zeros(3, 16), None, [], None, None)
    assert search.default_ops(decoder) == search.Ops()
