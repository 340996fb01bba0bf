"""Heads that begin by comparing."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from regiongpt.train.alignment import FOUND, compare_at_first


def untrained(seed=0):
    torch.manual_seed(seed)
    shape = {"hidden_size": 256, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, num_key_value_heads=4, **shape)).eval()


def test_a_comparing_head_attends_to_the_token_like_its_own():
    torch.manual_seed(0)
    model = untrained()
    model.set_attn_implementation("eager")
    compare_at_first(model, 1, seed=0)
    # A beginning that is like nothing, five different tokens, and the third of them once more.
    embeds = torch.randn(1, 7, 256)
    embeds[0, 6] = embeds[0, 3]
    attention = model(inputs_embeds=embeds, output_attentions=True).attentions[0][0, :, 6]
    for head in range(2):
        assert attention[head, :6].argmax() == 3
        assert attention[head, 3] > 3 * attention[head, [0, 1, 2, 4, 5]].max()
    assert (attention[2:, 3] < 0.3).all()


def test_it_hands_on_what_it_finds():
    model = untrained()
    compare_at_first(model, 1, seed=0)
    attention = model.model.layers[0].self_attn
    for rows in (slice(0, 64), slice(64, 128)):
        passed = attention.o_proj.weight[:, rows] @ attention.v_proj.weight[rows]
        torch.testing.assert_close(passed @ passed, FOUND * passed, rtol=1e-4, atol=1e-5)
        assert torch.equal(attention.q_proj.weight[rows], attention.k_proj.weight[rows])


def test_other_heads_and_layers_stay_as_they_are_and_the_seed_says_which_projections():
    plain, first, again, other = (untrained() for _ in range(4))
    compare_at_first(plain, 0, seed=1)
    compare_at_first(untrained(), 9, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), untrained().parameters(), strict=True))
    for model, seed in ((first, 1), (again, 1), (other, 2)):
        compare_at_first(model, 2, seed)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    for index in range(3):
        mine, theirs, before = (model.model.layers[index].self_attn for model in (first, other, plain))
        for name in ("q_proj", "k_proj", "v_proj"):
            new, old = getattr(mine, name).weight, getattr(before, name).weight
            assert torch.equal(new[128:], old[128:])
            assert torch.equal(new[:128], old[:128]) == (index == 2)
            assert torch.equal(new[:128], getattr(theirs, name).weight[:128]) == (index == 2)
        assert torch.equal(mine.o_proj.weight[:, 128:], before.o_proj.weight[:, 128:])
    queries = [
        first.model.layers[index].self_attn.q_proj.weight[rows]
        for index in (0, 1)
        for rows in (slice(64), slice(64, 128))
    ]
    assert not any(torch.equal(a, b) for k, a in enumerate(queries) for b in queries[:k])
