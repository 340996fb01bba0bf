"""Many sequences behind a shared beginning against each run plainly by itself, for many kinds of language models."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from regiongpt.inference.shared_prefix import Decoder, LeanDecoder, PrefixCache, RereadingDecoder, decoder_for

WORDS = 90
SHAPE = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"vocab_size": WORDS, "max_position_embeddings": 256, "initializer_range": 0.3},
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}
GROUPED = {"num_key_value_heads": 2}
WINDOW = {**GROUPED, "head_dim": 8, "sliding_window": 8}
SHARING: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, grouped": ("llama", GROUPED),
    "mistral": ("mistral", {**GROUPED, "sliding_window": None}),
    "mistral, window of 8": ("mistral", {**GROUPED, "sliding_window": 8}),
    "qwen2, one key head": ("qwen2", {"num_key_value_heads": 1}),
    "qwen3": ("qwen3", {**GROUPED, "head_dim": 8}),
    "gemma2, capped scores": ("gemma2", WINDOW),
    "gemma3": ("gemma3_text", WINDOW),
    "phi3": ("phi3", GROUPED),
    "gpt_neox": ("gpt_neox", {}),
    "opt, learnt positions": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "olmo2": ("olmo2", GROUPED),
    "mixtral": ("mixtral", {**GROUPED, "num_local_experts": 4}),
}
LEAN = {"llama", "llama, grouped", "mistral", "qwen2, one key head"}
REREADING: dict[str, tuple[str, dict[str, Any]]] = {
    "phimoe, a window in its mask alone": ("phimoe", {**GROUPED, "sliding_window": 8, "num_local_experts": 4}),
    "gpt_oss, sinks": ("gpt_oss", {**WINDOW, "num_local_experts": 4}),
    "bloom, a bias of its own": ("bloom", {"n_layer": 2, "n_head": 4}),
    "llama4, chunks of 8": (
        "llama4_text",
        {**GROUPED, "head_dim": 8, "attention_chunk_size": 8, "num_local_experts": 2, "intermediate_size_mlp": 48},
    ),
    "mamba, no attention": ("mamba", {"state_size": 4, "expand": 2}),
    "deepseek_v3, compressed keys": (
        "deepseek_v3",
        {
            **{"num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1},
            **{"num_experts_per_tok": 2},
            **{"moe_intermediate_size": 16, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16},
            **{"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
        },
    ),
}


class Operations(TorchDispatchMode):
    """Counts PyTorch's operations."""

    count = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return operation(*args, **(kwargs or {}))


def language_model(kind: str, options: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SHAPE, **options})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter)
    return model


def words_of(model: Any) -> Callable[[int], Tensor]:
    """Gives some random words of a model, as embeddings."""
    generator = torch.Generator().manual_seed(0)
    return torch.inference_mode()(
        lambda count: model.get_input_embeddings()(torch.randint(3, WORDS, (count,), generator=generator))
    )


@torch.inference_mode()
def plainly(model: Any, embeds_TD: Tensor) -> Tensor:
    logits: Tensor = model(inputs_embeds=embeds_TD[None], use_cache=False).logits[0]
    return logits


def assert_alike(model: Any, texts: Sequence[Tensor], last_RV: Tensor) -> None:
    for text, logits in zip(texts, last_RV, strict=True):
        torch.testing.assert_close(logits, plainly(model, text)[-1], rtol=1e-4, atol=1e-4)


def walk(decoder: Decoder) -> None:
    """Prefixes of several kinds, suffixes of several lengths, steps, a sequence that leaves and one that enters."""
    model, words = decoder.model, words_of(decoder.model)
    long_text, short_text = words(13), words(7)
    long, short = decoder.read(long_text), decoder.read(short_text)
    more = words(5)
    longer, longer_text = decoder.read(more, long), torch.cat([long_text, more])
    assert longer.length == 18
    cache = PrefixCache()
    before = [long_text, short_text, longer_text, words(0), long_text, longer_text]
    suffixes = [words(count) for count in (3, 11, 1, 6, 11, 2)]
    for prefix in (long, short, longer, None, long, longer):
        cache.add(prefix)
    texts = [torch.cat(pair) for pair in zip(before, suffixes, strict=True)]
    assert_alike(model, texts, decoder.forward(cache, torch.cat(suffixes), [len(s) for s in suffixes]))
    for step in range(3):
        new = [words(1 + 3 * (step == 2 and row == 5)) for row in range(len(texts))]
        texts = [torch.cat(pair) for pair in zip(texts, new, strict=True)]
        assert_alike(model, texts, decoder.forward(cache, torch.cat(new), [len(each) for each in new]))
        if step == 1:
            cache.remove(1)
            texts[1] = texts.pop()
            cache.add(short)
            texts.append(short_text)
    # Sequences become prefixes of others.
    behind, some = [cache.prefix(row) for row in (0, 0, 2, 5)], [words(count) for count in (2, 1, 4, 3)]
    cache = PrefixCache()
    for prefix in behind:
        cache.add(prefix)
    whole = [torch.cat([texts[row], own]) for row, own in zip((0, 0, 2, 5), some, strict=True)]
    logits = decoder.forward(cache, torch.cat(some), [2, 1, 4, 3], range(10))
    for text, own, found in zip(whole, some, logits.split([2, 1, 4, 3]), strict=True):
        torch.testing.assert_close(found, plainly(model, text)[-len(own) :], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SHARING)
def test_a_shared_prefix_gives_the_logits_of_plain_passes(name):
    decoder = decoder_for(language_model(*SHARING[name]))
    assert type(decoder) is (LeanDecoder if name in LEAN else Decoder)
    walk(decoder)


def test_no_rows_of_a_matrix_lie_whole_pages_of_memory_apart():
    model = language_model("llama", {"intermediate_size": 1024})
    linear = {name: each for name, each in model.named_modules() if isinstance(each, torch.nn.Linear)}
    before = {name: each.weight.clone() for name, each in linear.items()}
    walk(decoder_for(model))
    for name, each in linear.items():
        assert torch.equal(each.weight, before[name])
        assert each.weight.stride(0) == 1, name
        assert each.weight.stride(1) % 1024, name


def test_a_step_is_few_operations(llama):
    """Speed is arithmetic and the number of operations around it; the number is the same on every machine."""
    lean = decoder_for(llama.model)
    counts = {}
    for decoder in (llama, lean):
        words, cache = words_of(llama.model), PrefixCache()
        prefix = decoder.read(words(5))
        for _ in range(3):
            cache.add(prefix)
        decoder.forward(cache, words(6), [2, 2, 2])
        with Operations() as counted:
            decoder.forward(cache, words(3), [1, 1, 1])
        counts[decoder] = counted.count
    # Seven products and two attentions a layer, in 2 layers; the rest is around them.
    assert counts[lean] <= 210
    assert counts[lean] < 0.8 * counts[llama]


@pytest.mark.parametrize("name", REREADING)
def test_a_model_that_cannot_share_reads_again(name, caplog):
    decoder = decoder_for(language_model(*REREADING[name]))
    assert isinstance(decoder, RereadingDecoder) or name.startswith("deepseek")  # which shares before transformers 5.13
    assert isinstance(decoder, RereadingDecoder) == ("is slow" in caplog.text)
    walk(decoder)


@pytest.fixture(scope="module")
def llama() -> Decoder:
    return Decoder(language_model(*SHARING["llama, grouped"]))


def test_the_prefix_is_stored_once(llama):
    words = words_of(llama.model)
    prefix = llama.read(words(200))
    sizes = []
    for count in (2, 20):
        cache = PrefixCache()
        for _ in range(count):
            cache.add(prefix)
        llama.forward(cache, words(count * 3), [3] * count)
        assert all(other is prefix for other in cache.prefixes)
        sizes.append(sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers))
    assert sizes[1] == 10 * sizes[0]
    # 2 layers of keys and values, 2 heads of 8, in float32.
    assert prefix.nbytes == 2 * 2 * 200 * 2 * 8 * 4
    assert sizes[0] == 2 * 2 * 2 * 3 * 2 * 8 * 4


def test_the_model_keeps_its_own_attention(llama):
    words = words_of(llama.model)
    text = words(9)
    before = plainly(llama.model, text)
    llama.read(text)
    assert llama.model.config._attn_implementation == "eager"
    assert torch.equal(plainly(llama.model, text), before)
