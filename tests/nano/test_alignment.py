"""What a region's embedding is pulled towards, and what the language model reads before it sees."""

import copy

import pytest
import torch
from alignment import (
    SHARPNESS,
    ClassWords,
    Marks,
    blur,
    cell_alignment,
    compare_at_first,
    region_alignment,
    stand_in_loss,
    visual_loss,
)
from tiny import save_language
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from regiongpt import Region
from regiongpt.model import weights
from regiongpt.prompts import COCO_80

CAT, DOG = COCO_80.index("cat"), COCO_80.index("dog")
EVEN = torch.full((80,), 1 / 80)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("language")
    save_language(folder, max_position_embeddings=512)
    shape = {"image_size": 64, "image_grid": [2, 2], "refinement_channels": 16}
    return weights.create("efficientnet-lite2", folder, chat_template="plain", **shape)


def test_a_class_is_the_mean_of_the_words_of_its_name(pair):
    model, processor = pair
    table = model.get_input_embeddings().weight
    names = ClassWords(processor.tokenizer)(table)
    assert names.shape == (80, table.shape[1])
    torch.testing.assert_close(ClassWords(processor.tokenizer).shares, EVEN)
    shares = ClassWords(processor.tokenizer, range(80)).shares
    assert shares[0] > 0
    assert (shares.diff() > 0).all()
    assert abs(shares.sum() - 1) < 1e-6
    for name in ("cat", "traffic light"):
        ids = processor.tokenizer(f" {name}", add_special_tokens=False)["input_ids"]
        torch.testing.assert_close(names[COCO_80.index(name)], table[ids].mean(0))


def test_region_alignment_leaves_padding_out():
    names = torch.eye(80)
    embeds, classes = torch.randn(2, 3, 80), torch.tensor([[CAT, -1, DOG], [DOG, -1, -1]])
    rows = [(0, 0, CAT), (0, 2, DOG), (1, 0, DOG)]
    expected = sum(
        F.cross_entropy(SHARPNESS * F.normalize(embeds[b, r], dim=0), torch.tensor(c))
        + SHARPNESS * (1 - F.normalize(embeds[b, r], dim=0)[c])
        + embeds[b, r].norm().log() ** 2
        for b, r, c in rows
    )
    torch.testing.assert_close(region_alignment(embeds, classes, names, EVEN), expected)
    assert region_alignment(embeds, torch.full((2, 3), -1), names, EVEN) == 0


def test_a_cell_may_say_any_of_the_classes_it_shows():
    names, shown = torch.eye(80), torch.zeros(1, 2, 80, dtype=torch.bool)
    shown[0, 0, [CAT, DOG]] = True
    wrong, either = torch.zeros(1, 2, 80), torch.zeros(1, 2, 80)
    wrong[..., 0], either[..., DOG] = 1.0, 1.0
    assert cell_alignment(either, shown, names) < 0.01 < cell_alignment(wrong, shown, names)
    assert cell_alignment(wrong, torch.zeros_like(shown), names) == 0
    # The nearer of two names counts, and the direction keeps counting when the class is no longer in doubt.
    near, exact = torch.zeros(1, 2, 80), torch.zeros(1, 2, 80)
    exact[..., CAT] = 1.0
    near[..., CAT], near[..., 79] = 0.8, 0.6
    shown[0, 0, DOG] = False
    lost = [cell_alignment(each, shown, names) for each in (exact, near)]
    assert lost[1] - lost[0] > 0.2 * SHARPNESS


def test_stand_ins_carry_their_numbers_and_texts_do_not_see_each_other(pair):
    model, processor = pair
    language, words, region = copy.deepcopy(model.language_model), ClassWords(processor.tokenizer), model.config
    ids = torch.tensor([[1, 9, region.region_token_id, 7, 1, 8, 6]])
    batch = {
        "input_ids": ids,
        "labels": torch.tensor([[-100, -100, -100, 7, -100, -100, 6]]),
        "stand_ins": torch.tensor([[-1, -1, CAT, -1, -1, -1, -1]]),
        "turns": torch.tensor([[1, 1, 1, 1, 2, 2, 2]]),
        "noise_seeds": torch.tensor([3]),
        "blurs": torch.tensor([1.0]),
    }
    table = language.get_input_embeddings()
    embeds = table(ids).clone()
    names = words(table.weight)
    embeds[0, 2] = blur(names, torch.tensor([CAT]), torch.Generator().manual_seed(3))[0] + table(torch.tensor(9))
    apart = [
        language(inputs_embeds=embeds[:, part], labels=batch["labels"][:, part], num_items_in_batch=2).loss
        for part in (slice(0, 4), slice(4, 7))
    ]
    numbered = stand_in_loss(words, Marks(region.region_token_id, 1), language, batch, 2)
    torch.testing.assert_close(numbered, sum(apart))
    assert stand_in_loss(words, Marks(region.region_token_id), language, batch, 2) != numbered


def test_the_two_losses_add_up_over_all_target_tokens(pair):
    model, processor = pair
    example = processor.encode_conversation(
        [{"role": "user", "content": "What is <region1>?"}, {"role": "assistant", "content": "cat"}],
        regions=[Region.box(2, 3, 20, 30)],
        image_size=(60, 40),
    )
    example["vision_features"] = torch.randn(model.config.vision_config.hidden_size, *model.config.tower_grid)
    words = ClassWords(processor.tokenizer)
    cells = torch.zeros(1, 4, 80, dtype=torch.bool)
    cells[0, 2, CAT] = True
    targets = {"region_classes": torch.tensor([[CAT]]), "cell_classes": cells}

    def loss(weight, answers, items):
        batch = {**processor.collate([example]), **targets}
        return visual_loss(words, weight, answers, model, batch, items)

    answer = model(**processor.collate([example]), num_items_in_batch=4).loss
    torch.testing.assert_close(loss(0.0, True, 4), answer)
    torch.testing.assert_close(loss(3.0, True, 4), answer + 3 * loss(1.0, False, 4))
    torch.testing.assert_close(loss(1.0, False, 8), loss(1.0, False, 4) / 2)
    assert loss(1.0, False, 4) > 0


# -- heads that begin by comparing -------------------------------------------------------------------------------------


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
