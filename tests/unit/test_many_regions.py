"""Many regions in one batch against plain ``generate``, one region at a time: the same tokens, the same logits."""

import pytest
import torch
from asking import batch_tokens, boxes, photograph, plain_tokens, tiny_parts
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TOWERS
from transformers import AutoConfig

from regiongpt.images import load_image
from regiongpt.inference.engine import Engine, question_turns
from regiongpt.inference.options import Options
from regiongpt.inference.shared_prefix import PrefixCache, RereadingDecoder
from regiongpt.model.configuration import REFINEMENTS
from regiongpt.prompts import CHAT_TEMPLATES, question

DESCRIBE, BRIEF = question("describe", regions=[1]), question("caption", regions=[1])
TWO = "How does <region2> relate to <region1>, and <region2> to the rest?"
HISTORY = [{"role": "user", "content": "What is <region1>?"}, {"role": "assistant", "content": "A hot dog."}]
KINDS = [*TOWERS, "efficientnet_lite"]
# Every tower with every refinement, and every template several times.
COMBINATIONS = [
    (tower, refinement, list(CHAT_TEMPLATES)[(i + j) % len(CHAT_TEMPLATES)])
    for i, tower in enumerate(KINDS)
    for j, refinement in enumerate(REFINEMENTS)
]


def assert_exact(engine: Engine, most: int = 5) -> None:
    photo, regions = photograph(), boxes(3)
    scene = engine.encode_image(load_image(photo))
    asked = [
        *((question_turns((), DESCRIBE), [region]) for region in regions),
        (question_turns((), BRIEF), regions[:1]),
        (question_turns(HISTORY, TWO), regions[:2]),
    ]
    expected = [plain_tokens(engine, photo, messages, own, most) for messages, own in asked]
    assert batch_tokens(engine, scene, asked, most) == expected
    messages, own = asked[-1]
    prompt = engine.prompt(messages, engine.pool(scene, own), len(own), most)
    prefix, embeds = engine.begin(scene, prompt.ids, prompt.rows, prompt.pooled)
    assert prefix is not None
    assert prefix.length >= engine.processor.num_image_tokens
    cache = PrefixCache()
    cache.add(prefix)
    logits = engine.decoder.forward(cache, embeds, [len(embeds)], logits=range(len(embeds)))
    encoded = engine.processor.encode_conversation(messages, image=photo, regions=own, add_generation_prompt=True)
    with torch.inference_mode():
        plain = engine.model(**engine.processor.collate([encoded])).logits[0, prefix.length :]
    torch.testing.assert_close(logits, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("tower", "refinement", "template"), COMBINATIONS)
def test_answers_are_those_of_generate(tower, refinement, template):
    assert_exact(
        Engine(*tiny_parts(tower, template, refinement=refinement, region_position=5.0 * (template == "plain")))
    )


@pytest.mark.parametrize("kind", ["qwen2", "gemma2", "bloom"])
def test_with_other_language_models(kind):
    def language(size: int):
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        grouped = {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16}
        shape |= {"n_layer": 2, "n_head": 4} if kind == "bloom" else grouped
        shape |= {"vocab_size": size, "max_position_embeddings": 512}
        return AutoConfig.for_model(kind, **shape, initializer_range=0.3, bos_token_id=0, eos_token_id=1)

    engine = Engine(*tiny_parts(language=language))
    engine.model.language_model.set_attn_implementation("eager")  # the one that caps Gemma's scores in every release
    assert isinstance(engine.decoder, RereadingDecoder) == (kind == "bloom")
    assert_exact(engine)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(*tiny_parts())


@settings(max_examples=8, deadline=None)
@given(
    asked=st.lists(
        st.tuples(st.integers(1, 3), st.integers(0, 25), st.integers(1, 7), st.booleans()), min_size=1, max_size=7
    ),
    rows=st.integers(1, 4),
    seed=st.integers(0, 2**16),
)
def test_questions_of_any_length_enter_and_leave(engine, asked, rows, seed):
    photo = photograph()
    scene = engine.encode_image(load_image(photo))
    narrow = Engine(engine.model, engine.processor, rows=rows)
    conversations, most = [], []
    for place, (count, words, limit, later) in enumerate(asked):
        text = " and ".join(f"<region{n}>" for n in range(1, count + 1)) + " why" * words
        conversations.append((question_turns(HISTORY if later else (), text), boxes(count, seed + place)))
        most.append(limit)
    expected = [plain_tokens(engine, photo, *each, limit) for each, limit in zip(conversations, most, strict=True)]
    assert batch_tokens(narrow, scene, conversations, most) == expected


def test_the_image_is_read_once_for_all_questions(engine, monkeypatch):
    photo, regions = photograph(), boxes(5)
    scene = engine.encode_image(load_image(photo))
    read, forward = [], engine.decoder.forward

    def watched(cache, embeds, counts, **options):
        read.append((len(counts), len(embeds)))
        return forward(cache, embeds, counts, **options)

    monkeypatch.setattr(engine.decoder, "forward", watched)
    for text in (DESCRIBE, BRIEF):
        engine.answer_each(scene, text, regions, Options(max_new_tokens=1))
    image, region = engine.model.config.image_token_id, engine.model.config.region_token_id
    expected = []
    for text in (DESCRIBE, BRIEF):  # what stands before the region once, what follows for each
        ids = engine.encode_text(question_turns((), text), 1)["input_ids"].tolist()
        end, first = len(ids) - ids[::-1].index(image), ids.index(region)
        expected += [*([] if expected else [(1, end)]), (1, first - end), (5, 5 * (len(ids) - first))]
    assert read == expected
