import math

import pytest
import torch
from conftest import make_tiny_t2s
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList
from transformers.cache_utils import DynamicLayer
from transformers.generation import TopKLogitsWarper

from indextts2_hf import IndexTTS2GenerationConfig, IndexTTS2T2SForConditionalGeneration
from indextts2_hf.generation_t2s import (
    CACHE_NAME,
    RoomyLayer,
    SeededSamplingLogitsProcessor,
    SemanticTokenCountLogitsProcessor,
    best_candidates,
    mean_log_probs,
)


STOP = 65
MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 30, "top_p": 0.8},
    "beams": {"do_sample": False, "num_beams": 3},
    "beam sampling": {"do_sample": True, "num_beams": 3, "temperature": 0.8, "top_k": 30, "top_p": 0.8},
}
TEXTS = [[11, 12, 13, 14, 15], [21, 22], [31, 32, 33]]


@pytest.fixture(scope="module")
def t2s():
    """As trained here. Shared: a test must not change it."""
    return make_tiny_t2s()


def make_inputs(t2s, texts=TEXTS, padding_side="left"):
    texts = [torch.tensor(text) for text in texts]
    generator = torch.Generator().manual_seed(4)
    config = t2s.config
    return {
        "input_ids": pad_sequence(texts, batch_first=True, padding_value=9, padding_side=padding_side),
        "attention_mask": pad_sequence(
            [torch.ones_like(text) for text in texts], batch_first=True, padding_side=padding_side
        ),
        # Each row has a voice and an emotion of its own.
        "speaker_latents": torch.randn(3, config.speaker_num_latents, config.hidden_size, generator=generator)[: len(texts)],
        "emotion_embeds": torch.randn(3, config.hidden_size, generator=generator)[: len(texts)],
    }  # fmt: skip


def make_row(t2s, row):
    inputs = make_inputs(t2s)
    return {
        "input_ids": torch.tensor([TEXTS[row]]),
        "speaker_latents": inputs["speaker_latents"][row : row + 1],
        "emotion_embeds": inputs["emotion_embeds"][row : row + 1],
    }


def count_tokens(sequences):
    """Tokens before the first stop in each row; the rest must be stops."""
    counts = []
    for row in sequences.tolist():
        count = row.index(STOP) if STOP in row else len(row)
        assert all(token == STOP for token in row[count:])
        assert all(0 <= token < 64 for token in row[:count])
        counts.append(count)
    return counts


def seeded_processor(*seeds):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return LogitsProcessorList([SeededSamplingLogitsProcessor(generators)])


# Generation in batches


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("mode", ["greedy", "beams"])
@pytest.mark.parametrize("num_semantic_tokens", [None, [9, 4, 14]])
def test_a_row_alone_equals_the_row_in_a_batch(t2s, mode, padding_side, num_semantic_tokens):
    settings = MODES[mode] | {"max_new_tokens": 20, "repetition_penalty": 1.3}
    batch = t2s.generate(
        **make_inputs(t2s, padding_side=padding_side), **settings, num_semantic_tokens=num_semantic_tokens
    )
    for row in range(3):
        count = num_semantic_tokens and num_semantic_tokens[row]
        alone = t2s.generate(**make_row(t2s, row), **settings, num_semantic_tokens=count)[0].tolist()
        assert batch[row].tolist() == alone + [STOP] * (batch.shape[1] - len(alone))


@pytest.mark.parametrize("seeds", [(5, 6, 7)])
@pytest.mark.parametrize("num_semantic_tokens", [None, 12])
def test_seeded_sampling_is_the_same_in_every_batch(t2s, seeds, num_semantic_tokens):
    settings = MODES["sampling"] | {"max_new_tokens": 20, "num_semantic_tokens": num_semantic_tokens}
    batch = t2s.generate(**make_inputs(t2s), **settings, logits_processor=seeded_processor(*seeds))
    for row, seed in enumerate(seeds):
        torch.manual_seed(row)
        alone = t2s.generate(**make_row(t2s, row), **settings, logits_processor=seeded_processor(seed))[0].tolist()
        assert batch[row].tolist() == alone + [STOP] * (batch.shape[1] - len(alone))
    other = t2s.generate(**make_inputs(t2s), **settings, logits_processor=seeded_processor(5, 8, 7))
    assert other[0].tolist()[:5] == batch[0].tolist()[:5] and other[1].tolist() != batch[1].tolist()


def test_prepared_prefix_equals_text(t2s):
    inputs = make_inputs(t2s)
    settings = {"do_sample": False, "num_semantic_tokens": [3, None, 5], "max_new_tokens": 12}
    embeds, mask = t2s.prepare_prefix(**inputs, num_semantic_tokens=[3, None, 5])
    assert torch.equal(
        t2s.generate(inputs_embeds=embeds, attention_mask=mask, **settings), t2s.generate(**inputs, **settings)
    )
    # Without a mask everything counts.
    row = make_row(t2s, 0)
    embeds, _ = t2s.prepare_prefix(**row)
    assert torch.equal(
        t2s.generate(inputs_embeds=embeds, do_sample=False, max_new_tokens=12),
        t2s.generate(**row, do_sample=False, max_new_tokens=12),
    )


@pytest.mark.parametrize("mode", MODES)
def test_static_cache_equals_dynamic_cache(t2s, mode):
    settings = MODES[mode] | {"num_semantic_tokens": [7, 15, None], "max_new_tokens": 18}
    torch.manual_seed(0)
    dynamic = t2s.generate(**make_inputs(t2s), **settings)
    torch.manual_seed(0)
    assert torch.equal(t2s.generate(**make_inputs(t2s), **settings, cache_implementation="static"), dynamic)


@pytest.mark.parametrize("mode", MODES)
def test_the_roomy_cache_equals_the_stock_one(t2s, mode, monkeypatch):
    # Room for three tokens: it moves while it grows.
    monkeypatch.setattr("indextts2_hf.generation_t2s._CACHE_ROOM", 3)
    settings = MODES[mode] | {"max_new_tokens": 18, "return_dict_in_generate": True, "text_guidance_scale": 1.5}
    outputs = []
    # Whatever transformers calls it, a cache is given under either name.
    for given in ({}, {"past_key_values": DynamicCache()}, {"cache": DynamicCache()}):
        torch.manual_seed(0)
        outputs.append(t2s.generate(**make_inputs(t2s), **settings, **given))
        # One that is given stays what it is.
        layers = outputs[-1][CACHE_NAME].layers
        assert {type(layer) for layer in layers} == {DynamicLayer if given else RoomyLayer}
        assert not given or outputs[-1][CACHE_NAME] is next(iter(given.values()))
        assert torch.equal(outputs[-1].sequences, outputs[0].sequences)
        for layer, other in zip(layers, outputs[0][CACHE_NAME].layers, strict=True):
            assert torch.equal(layer.keys, other.keys) and torch.equal(layer.values, other.values)


def test_a_cache_under_both_of_its_names(t2s):
    with pytest.raises(ValueError, match="`cache` and `past_key_values` are two names of one argument"):
        t2s.generate(**make_inputs(t2s), cache=DynamicCache(), past_key_values=DynamicCache())


def test_the_roomy_layer_under_all_that_is_done_to_a_cache(monkeypatch):
    monkeypatch.setattr("indextts2_hf.generation_t2s._CACHE_ROOM", 4)
    generator = torch.Generator().manual_seed(0)
    roomy, stock = RoomyLayer(), DynamicCache().layer_class_to_replicate()
    addresses = []

    def update(num_tokens):
        states = [torch.randn(len(rows), 2, num_tokens, 3, generator=generator) for _ in range(2)]
        for found, expected in zip(roomy.update(*states), stock.update(*states), strict=True):
            assert torch.equal(found, expected)
        assert roomy.get_seq_length() == stock.get_seq_length()
        addresses.append(roomy.keys.data_ptr())

    rows = range(4)
    for num_tokens in (5, 1, 1, 1, 1, 1, 7):
        update(num_tokens)
    # Four tokens stay where they are; the next ones do not fit.
    assert len(set(addresses[:5])) == 1 and len(set(addresses)) == 3
    earlier = roomy.keys.clone(), roomy.keys
    for act in (
        lambda layer: layer.reorder_cache(torch.tensor([1, 1, 3, 0])),
        lambda layer: layer.crop(-3),
        lambda layer: layer.batch_select_indices(torch.tensor([2, 0])),
        lambda layer: layer.batch_repeat_interleave(3),
        lambda layer: layer.reset(),
    ):
        act(roomy), act(stock)
        rows = range(4 if stock.keys is None else len(stock.keys))
        update(1), update(2)
    # What was returned before is what it was.
    assert torch.equal(*earlier)


def test_stock_output(t2s):
    output = t2s.generate(
        **make_inputs(t2s), num_beams=2, num_semantic_tokens=4, return_dict_in_generate=True, output_scores=True
    )
    assert output.sequences.shape == (3, 5) and output.sequences.dtype == torch.long
    assert output.sequences_scores.isfinite().all()
    assert len(output.scores) == 5
    two = t2s.generate(**make_inputs(t2s), do_sample=True, num_return_sequences=2, num_semantic_tokens=[2, 3, 4])
    assert count_tokens(two) == [2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize("num_beams", [1, 2])
def test_nothing_is_left_on_the_model(t2s, num_beams):
    before = t2s.generation_config.to_dict()
    t2s.generate(**make_inputs(t2s), num_semantic_tokens=4, num_beams=num_beams)
    assert t2s.generation_config.to_dict() == before


@pytest.mark.parametrize("mode", ["greedy", "beam sampling"])
def test_bfloat16(t2s, mode):
    half = make_tiny_t2s().to(torch.bfloat16)
    inputs = {
        key: value.bfloat16() if value.is_floating_point() else value for key, value in make_inputs(half).items()
    }
    assert count_tokens(half.generate(**inputs, **MODES[mode], num_semantic_tokens=[3, 8, 5])) == [3, 8, 5]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert count_tokens(t2s.generate(**make_inputs(t2s), **MODES[mode], num_semantic_tokens=6)) == [6, 6, 6]


# Positions


def trace_positions(t2s, **settings):
    """What each step of `generate` feeds to the semantic position table."""
    seen = []
    handle = t2s.semantic_position_embedding.register_forward_hook(
        lambda module, args, output: seen.append(args[0].tolist())
    )
    t2s.generate(**make_inputs(t2s), **settings)
    handle.remove()
    return seen


@pytest.mark.parametrize(("skip", "expected"), [(True, [2, 3, 4, 5]), (False, [1, 2, 3, 4])])
def test_positions_of_cached_steps(skip, expected):
    t2s = make_tiny_t2s(skip_semantic_position_one=skip, use_length_row=False)
    seen = trace_positions(t2s, do_sample=False, num_semantic_tokens=4)
    # The texts have different lengths; the positions do not.
    assert seen == [[[0]]] + [[[position]] * 3 for position in expected]


def test_every_position_has_a_row_in_the_table():
    t2s = make_tiny_t2s(skip_semantic_position_one=True, max_semantic_tokens=12, use_length_row=False)
    seen = trace_positions(t2s, do_sample=False, num_semantic_tokens=12)
    assert seen[-1] == [[13]] * 3 and t2s.semantic_position_embedding.num_embeddings == 15


@pytest.mark.parametrize("row", range(3))
def test_steps_equal_teacher_forcing(t2s, row):
    settings = {"do_sample": False, "num_semantic_tokens": 10, "repetition_penalty": 1.5}
    output = t2s.generate(**make_inputs(t2s), **settings, return_dict_in_generate=True, output_logits=True)
    codes = output.sequences[row : row + 1, :10]
    inputs = make_row(t2s, row)
    logits = t2s(**inputs, semantic_ids=codes, num_semantic_tokens=torch.tensor([10])).logits
    generated = torch.stack([step[row] for step in output.logits])[None]
    torch.testing.assert_close(generated, logits, atol=1e-4, rtol=1e-4)


def test_quirk_changes_the_steps():
    inputs = make_inputs(make_tiny_t2s())
    plain, quirk = (
        make_tiny_t2s(skip_semantic_position_one=skip).generate(
            **inputs, do_sample=False, num_semantic_tokens=8, return_dict_in_generate=True, output_logits=True
        )
        for skip in (False, True)
    )
    torch.testing.assert_close(plain.logits[0], quirk.logits[0])
    assert not torch.allclose(plain.logits[1], quirk.logits[1], atol=1e-3)


# Token count


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [1, 2, 17, 61])
def test_exactly_that_many_tokens(t2s, mode, count):
    torch.manual_seed(count)
    sequences = t2s.generate(**make_inputs(t2s), **MODES[mode], num_semantic_tokens=count)
    assert sequences.shape == (3, count + 1)
    assert count_tokens(sequences) == [count] * 3


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("counts", [[1, 9, 4], (30, 1, 2), torch.tensor([3, 5, 3])], ids=["list", "tuple", "tensor"])
def test_a_count_for_each_row(t2s, mode, counts):
    for seed in range(3):
        torch.manual_seed(seed)
        sequences = t2s.generate(
            **make_inputs(t2s), **MODES[mode], num_semantic_tokens=counts, repetition_penalty=10.0
        )
        assert count_tokens(sequences) == list(counts)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, -1.0])
def test_free_rows_beside_counted_ones(t2s, mode, length_penalty):
    settings = MODES[mode] | ({"length_penalty": length_penalty} if "beam" in mode else {})
    torch.manual_seed(0)
    sequences = t2s.generate(
        **make_inputs(t2s), **settings, num_semantic_tokens=[5, None, 2], max_new_tokens=15, eos_token_id=STOP
    )
    counts = count_tokens(sequences)
    assert (counts[0], counts[2]) == (5, 2) and counts[1] <= 15


def test_all_rows_free(t2s):
    settings = {"do_sample": False, "max_new_tokens": 9}
    free = t2s.generate(**make_inputs(t2s), **settings)
    assert torch.equal(t2s.generate(**make_inputs(t2s), **settings, num_semantic_tokens=[None] * 3), free)
    assert torch.equal(t2s.generate(**make_inputs(t2s), **settings, num_semantic_tokens=None), free)


@pytest.mark.parametrize("mode", MODES)
def test_as_many_tokens_as_there_are_positions(mode):
    t2s = make_tiny_t2s(max_semantic_tokens=24, skip_semantic_position_one=True)
    sequences = t2s.generate(**make_inputs(t2s), **MODES[mode], num_semantic_tokens=24)
    assert count_tokens(sequences) == [24] * 3
    with pytest.raises(ValueError, match=r"is 25 but this checkpoint has positions for at most 24 \(0.5 s\). Split"):
        t2s.generate(**make_inputs(t2s), **MODES[mode], num_semantic_tokens=25)
    with pytest.raises(ValueError, match="is 25 but this checkpoint has positions for at most 24"):
        t2s.generate(**make_inputs(t2s), **MODES[mode], num_semantic_tokens=[3, None, 25])


def test_a_model_that_always_wants_to_stop(t2s):
    eager = make_tiny_t2s()
    eager.semantic_head.bias.data[STOP] = 100.0
    for mode, settings in MODES.items():
        assert count_tokens(eager.generate(**make_inputs(t2s), **settings)) == [0, 0, 0], mode
        assert count_tokens(eager.generate(**make_inputs(t2s), **settings, num_semantic_tokens=[4, 9, 1])) == [4, 9, 1]


def test_a_model_that_never_wants_to_stop(t2s):
    endless = make_tiny_t2s()
    endless.semantic_head.bias.data[STOP] = -100.0
    for settings in MODES.values():
        assert count_tokens(endless.generate(**make_inputs(t2s), **settings, num_semantic_tokens=[4, 9, 1])) == [
            4,
            9,
            1,
        ]
        assert count_tokens(endless.generate(**make_inputs(t2s), **settings, max_new_tokens=7)) == [7, 7, 7]


def test_count_overrules_other_lengths(t2s):
    assert count_tokens(t2s.generate(**make_inputs(t2s), num_semantic_tokens=30, max_new_tokens=5)) == [30] * 3
    assert count_tokens(t2s.generate(**make_inputs(t2s), num_semantic_tokens=30, min_new_tokens=10)) == [30] * 3


def test_start_token_is_never_generated(t2s):
    wild = make_tiny_t2s()
    wild.semantic_head.bias.data[64] = 100.0
    for settings in MODES.values():
        count_tokens(wild.generate(**make_inputs(t2s), **settings, max_new_tokens=6))


@pytest.mark.parametrize("is_length_row", [True, False])
@pytest.mark.parametrize("duration_conditioning", [None, True, False])
def test_count_is_written_into_the_prefix(is_length_row, duration_conditioning):
    t2s = make_tiny_t2s(use_length_row=is_length_row)
    row = make_row(t2s, 0)
    settings = {"do_sample": False, "duration_conditioning": duration_conditioning, "return_dict_in_generate": True}
    free = t2s.generate(**row, **settings, output_logits=True, max_new_tokens=1).logits[0]
    asked = t2s.generate(**row, **settings, output_logits=True, num_semantic_tokens=9).logits[0]
    is_written = is_length_row if duration_conditioning is None else duration_conditioning
    assert torch.allclose(free, asked, atol=1e-5) != is_written


# Text guidance


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_guided_scores_go_from_no_text_to_text(t2s, padding_side):
    inputs = make_inputs(t2s, padding_side=padding_side)
    settings = {"do_sample": False, "max_new_tokens": 12, "output_scores": True, "return_dict_in_generate": True}
    guided = t2s.generate(**inputs, **settings, text_guidance_scale=2.5)
    texts = {"text": inputs["attention_mask"], "no text": torch.zeros_like(inputs["attention_mask"])}
    logits = {}
    for name, attention_mask in texts.items():
        output = t2s(**(inputs | {"attention_mask": attention_mask}), semantic_ids=guided.sequences)
        logits[name] = output.logits[:, : guided.sequences.shape[1]]
    expected = logits["no text"] + 2.5 * (logits["text"] - logits["no text"])
    scores = torch.stack(guided.scores, dim=1)
    is_possible = scores > -float("inf")
    assert is_possible.sum(dim=-1).eq(65).all()  # all but the start token
    expected, unguided = (rows.log_softmax(dim=-1)[is_possible] for rows in (expected, logits["text"]))
    assert torch.allclose(scores[is_possible], expected, atol=1e-4)
    assert not torch.allclose(scores[is_possible], unguided, atol=0.1)


@pytest.mark.parametrize("mode", ["greedy", "sampling", "beams"])
@pytest.mark.parametrize("num_semantic_tokens", [None, [9, 4, None]])
def test_a_guided_row_alone_equals_the_row_in_a_batch(t2s, mode, num_semantic_tokens):
    settings = MODES[mode] | {"max_new_tokens": 20, "text_guidance_scale": 2.0}
    seeds = {"logits_processor": seeded_processor(3, 4, 5)} if mode == "sampling" else {}
    batch = t2s.generate(**make_inputs(t2s), **settings, **seeds, num_semantic_tokens=num_semantic_tokens)
    unguided = t2s.generate(**make_inputs(t2s), **(settings | {"text_guidance_scale": 1.0}))
    assert not torch.equal(batch, unguided)
    for row in range(3):
        count = num_semantic_tokens and num_semantic_tokens[row]
        seeds = {"logits_processor": seeded_processor(3 + row)} if mode == "sampling" else {}
        alone = t2s.generate(**make_row(t2s, row), **settings, **seeds, num_semantic_tokens=count)[0]
        assert torch.equal(batch[row, : len(alone)], alone) and (batch[row, len(alone) :] == STOP).all()
        assert count is None or count_tokens(alone[None]) == [count]


def test_caches_agree_under_guidance(t2s):
    settings = {"do_sample": False, "max_new_tokens": 12, "text_guidance_scale": 3.0}
    expected = t2s.generate(**make_inputs(t2s), **settings)
    for cache in ({"cache_implementation": "static"}, {"use_cache": False}):
        assert torch.equal(t2s.generate(**make_inputs(t2s), **settings, **cache), expected)
    beams = t2s.generate(**make_inputs(t2s), **settings, num_beams=3)
    assert torch.equal(t2s.generate(**make_inputs(t2s), **settings, num_beams=3, use_cache=False), beams)


def test_guidance_from_the_generation_config_of_the_model(tmp_path):
    t2s = make_tiny_t2s()
    settings = {"do_sample": False, "max_new_tokens": 12}
    expected = t2s.generate(**make_inputs(t2s), **settings, text_guidance_scale=3.0)
    t2s.generation_config = IndexTTS2GenerationConfig(text_guidance_scale=3.0)
    t2s.save_pretrained(tmp_path)
    t2s = IndexTTS2T2SForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(t2s.generate(**make_inputs(t2s), **settings), expected)
    assert not torch.equal(t2s.generate(**make_inputs(t2s), **settings, text_guidance_scale=1.0), expected)


def test_guided_return_sequences(t2s):
    settings = MODES["sampling"] | {"max_new_tokens": 12, "text_guidance_scale": 2.0, "num_return_sequences": 2}
    sequences = t2s.generate(**make_inputs(t2s), **settings)
    assert len(sequences) == 6 and not torch.equal(sequences[0], sequences[1])


@pytest.mark.parametrize("scale", [0.5, float("nan"), float("inf"), True, "2"])
def test_impossible_guidance(t2s, scale):
    message = "`text_guidance_scale` is .*, but it must be a finite number of at least 1; 1 is no guidance"
    with pytest.raises(ValueError, match=message):
        t2s.generate(**make_inputs(t2s), text_guidance_scale=scale)
    with pytest.raises(ValueError, match=message):
        IndexTTS2GenerationConfig(text_guidance_scale=scale)


# Candidates


@pytest.mark.parametrize("text_guidance_scale", [1.0, 2.0])
@pytest.mark.parametrize("num_semantic_tokens", [None, [9, 4, None]])
def test_the_likeliest_candidate_is_kept(t2s, text_guidance_scale, num_semantic_tokens):
    settings = MODES["sampling"] | {"max_new_tokens": 20, "text_guidance_scale": text_guidance_scale}
    settings |= {"num_semantic_tokens": num_semantic_tokens}
    inputs = make_inputs(t2s)
    all_sequences = t2s.generate(
        **inputs, **settings, num_return_sequences=4, logits_processor=seeded_processor(0, 1, 2)
    )
    kept = t2s.generate(**inputs, **settings, num_candidates=4, logits_processor=seeded_processor(0, 1, 2))
    assert len({tuple(row) for row in all_sequences.tolist()}) > 6
    embeds, mask = t2s.prepare_prefix(**inputs, num_semantic_tokens=num_semantic_tokens)
    places = []
    for row, candidates in enumerate(all_sequences.split(4)):
        scores = []
        for ids in candidates:
            is_cut = STOP not in ids
            num_tokens = len(ids) if is_cut else ids.tolist().index(STOP)
            output = t2s(
                inputs_embeds=embeds[row : row + 1],
                attention_mask=mask[row : row + 1],
                semantic_ids=ids[None, :num_tokens],
            )
            targets = ids if is_cut else ids[: num_tokens + 1]
            log_probs = output.logits[0, : len(targets)].log_softmax(dim=-1)
            scores.append(-math.inf if is_cut else log_probs.gather(1, targets[:, None]).mean().item())
        places.append(max(range(4), key=scores.__getitem__))
        best = candidates[places[-1]]
        assert torch.equal(kept[row], best[: kept.shape[1]]), scores
    assert any(places)


@pytest.mark.parametrize("num_semantic_tokens", [None, [9, 4, None]])
def test_a_row_with_candidates_alone_equals_the_row_in_a_batch(t2s, num_semantic_tokens):
    settings = MODES["sampling"] | {"max_new_tokens": 20, "text_guidance_scale": 2.0, "num_candidates": 3}
    settings |= {"num_semantic_tokens": num_semantic_tokens}
    batch = t2s.generate(**make_inputs(t2s), **settings, logits_processor=seeded_processor(3, 4, 5))
    assert len(batch) == 3
    for row in range(3):
        alone = settings | {"num_semantic_tokens": num_semantic_tokens and num_semantic_tokens[row]}
        alone = t2s.generate(**make_row(t2s, row), **alone, logits_processor=seeded_processor(3 + row))[0]
        length = min(len(alone), batch.shape[1])
        assert torch.equal(batch[row, :length], alone[:length])
        assert (batch[row, length:] == STOP).all() and (alone[length:] == STOP).all()


def test_the_choice_among_candidates():
    # Rows of two candidates each; the second row has one that is likelier but never ends, the third only such.
    sequences = torch.tensor([[1, 2, 3], [2, 3, 3], [1, 1, 1], [2, 3, 3], [1, 1, 1], [1, 1, 1]])
    probabilities = torch.tensor([[0.1, 0.5, 0.2, 0.2], [0.1, 0.3, 0.1, 0.5], [0.1, 0.5, 0.2, 0.2]])
    logits = tuple((row.log() + 3.0).expand(12, 4) for row in probabilities)  # not normalised, and twice the rows
    scores = mean_log_probs(sequences, logits, 3)
    # Means of three and of two tokens: log(0.5 * 0.1 * 0.2) / 3 = -1.54 and log(0.2 * 0.5) / 2 = -1.15.
    torch.testing.assert_close(scores[:2], torch.tensor([-1.5351, -1.1513]), atol=1e-4, rtol=0)
    assert best_candidates(scores, sequences, 2, 3).tolist() == [1, 3, 4]
    # The mean decides, not the sum: log(0.5 * 0.3 * 0.2) / 3 = -1.17 and log(0.1 * 0.5) / 2 = -1.50.
    sequences = torch.tensor([[1, 1, 3], [0, 3, 3]])
    assert best_candidates(mean_log_probs(sequences, logits, 3), sequences, 2, 3).tolist() == [0]


@pytest.mark.parametrize("num_semantic_tokens", [None, [9, 14, None]])
def test_what_a_recogniser_reads_counts_among_candidates(num_semantic_tokens):
    t2s = make_tiny_t2s(text_recognizer_size=16)
    settings = MODES["sampling"] | {"max_new_tokens": 60, "num_semantic_tokens": num_semantic_tokens}
    inputs = make_inputs(t2s)
    candidates = t2s.generate(**inputs, **settings, num_return_sequences=6, logits_processor=seeded_processor(0, 1, 2))
    output = t2s.generate(
        **inputs,
        **settings,
        num_candidates=6,
        logits_processor=seeded_processor(0, 1, 2),
        return_dict_in_generate=True,
    )
    embeds, mask = t2s.prepare_prefix(**inputs, num_semantic_tokens=num_semantic_tokens)
    places = []
    for row, sequences in enumerate(candidates.split(6)):
        text = make_row(t2s, row)["input_ids"][0]
        scores = []
        for ids in sequences:
            ids = ids[: ids.tolist().index(STOP)] if STOP in ids else ids[:0]
            if not len(ids):  # it never ended
                scores.append(-math.inf)
                continue
            lengths = torch.tensor([len(ids)]), torch.tensor([len(text)])
            read = t2s.text_recognizer(ids[None], lengths[0], text[None], lengths[1]).item()
            logits = t2s(
                inputs_embeds=embeds[row : row + 1], attention_mask=mask[row : row + 1], semantic_ids=ids[None]
            ).logits[0]
            targets = torch.cat([ids, torch.tensor([STOP])])
            scores.append(read + logits.log_softmax(dim=-1).gather(1, targets[:, None]).mean().item())
        places.append(max(range(6), key=scores.__getitem__))
        best = sequences[places[-1]]
        assert torch.equal(output.sequences[row], best[: output.sequences.shape[1]]), scores
    assert any(places)

    # With a prefix the text has to be told; without it the likeliest is kept, as without a recogniser.
    prefix = {"inputs_embeds": embeds, "attention_mask": mask, **settings, "num_candidates": 6}
    text_ids = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, t2s.config.text_stop_token_id)
    told = t2s.generate(**prefix, text_ids=text_ids, logits_processor=seeded_processor(0, 1, 2))
    assert torch.equal(told, output.sequences)
    untold = t2s.generate(**prefix, logits_processor=seeded_processor(0, 1, 2))
    t2s.text_recognizer = None
    assert torch.equal(untold, t2s.generate(**prefix, text_ids=text_ids, logits_processor=seeded_processor(0, 1, 2)))
    assert not torch.equal(untold, told)


def test_candidates_are_for_sampling_alone(t2s):
    for mode in ("greedy", "beams"):
        settings = MODES[mode] | {"max_new_tokens": 12}
        plain = t2s.generate(**make_inputs(t2s), **settings)
        assert torch.equal(t2s.generate(**make_inputs(t2s), **settings, num_candidates=4), plain), mode


def test_candidates_from_the_generation_config_of_the_model(tmp_path):
    t2s = make_tiny_t2s()
    settings = MODES["sampling"] | {"max_new_tokens": 12}

    def speak(**options):
        return t2s.generate(**make_inputs(t2s), **settings, **options, logits_processor=seeded_processor(0, 1, 2))

    expected, one = speak(num_candidates=5), speak()
    t2s.generation_config = IndexTTS2GenerationConfig(num_candidates=5)
    t2s.save_pretrained(tmp_path)
    t2s = IndexTTS2T2SForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(speak(), expected)
    assert torch.equal(speak(num_candidates=1), one) and not torch.equal(one, expected)
    output = speak(return_dict_in_generate=True)
    assert torch.equal(output.sequences, expected) and len(output.logits[0]) == 15
    with pytest.raises(ValueError, match=r"Both `num_candidates` \(5\) and `num_return_sequences` \(2\) are above 1"):
        speak(num_return_sequences=2)


@pytest.mark.parametrize("number", [0, -1, 1.5, True, "2"])
def test_impossible_candidates(t2s, number):
    message = "`num_candidates` is .*, but it must be a whole number of at least 1; 1 samples each row once"
    with pytest.raises(ValueError, match=message):
        t2s.generate(**make_inputs(t2s), num_candidates=number)
    with pytest.raises(ValueError, match=message):
        IndexTTS2GenerationConfig(num_candidates=number)


# The processors alone


def test_token_count_processor_on_random_scores():
    processor = SemanticTokenCountLogitsProcessor([2, None, 5], prompt_length=4, semantic_stop_token_id=7)
    generator = torch.Generator().manual_seed(0)
    for num_beams in (1, 3):
        for num_generated in range(8):
            scores = torch.randn(3 * num_beams, 10, generator=generator)
            before = scores.clone()
            changed = processor(torch.zeros(3 * num_beams, 4 + num_generated, dtype=torch.long), scores)
            assert torch.equal(scores, before) and changed.shape == scores.shape
            others = [token for token in range(10) if token != 7]
            for row, count in enumerate([count for count in (2, None, 5) for _ in range(num_beams)]):
                if count is None:
                    assert torch.equal(changed[row], before[row])
                elif num_generated < count:
                    assert changed[row, 7] == -float("inf")
                    assert torch.equal(changed[row, others], before[row, others])
                else:
                    assert changed[row].isfinite().all()
                    assert changed[row].softmax(-1)[7] == 1.0


def test_seeded_sampling_draws_from_the_softmax():
    scores = torch.tensor([[0.0, 1.0, -1.0, 2.0, -float("inf"), 0.5]])
    draws = 20000
    processor = SeededSamplingLogitsProcessor([torch.Generator().manual_seed(seed) for seed in range(draws)])
    chosen = processor(torch.zeros(draws, 1, dtype=torch.long), scores.expand(draws, -1))
    assert (chosen == 0.0).sum(dim=1).eq(1).all() and (chosen == -float("inf")).sum(dim=1).eq(5).all()
    counts = (chosen == 0.0).sum(dim=0).double()
    expected = scores[0].double().softmax(-1) * draws
    assert counts[4] == 0
    kept = expected > 0
    chi_square = ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    assert chi_square < 18.5  # 4 degrees of freedom: one time in a thousand


def test_seeded_sampling_draws_anew_at_each_step():
    processor = SeededSamplingLogitsProcessor([torch.Generator().manual_seed(0)])
    draws = [processor(torch.zeros(1, 1), torch.zeros(1, 50)).argmax().item() for _ in range(30)]
    assert len(set(draws)) > 15


def test_seeded_sampling_stays_within_top_k(t2s):
    scores = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    kept = scores.topk(3).indices[0].tolist()
    warped = TopKLogitsWarper(3)(None, scores)
    processor = SeededSamplingLogitsProcessor([torch.Generator().manual_seed(0)])
    assert {processor(None, warped).argmax().item() for _ in range(200)} == set(kept)


# Generation config


def test_config_round_trip(tmp_path):
    config = IndexTTS2GenerationConfig(
        num_semantic_tokens=[5, None], duration_conditioning=True, do_sample=True, top_k=7
    )
    config.save_pretrained(tmp_path)
    loaded = IndexTTS2GenerationConfig.from_pretrained(tmp_path)
    assert loaded.num_semantic_tokens == [5, None] and loaded.duration_conditioning is True and loaded.top_k == 7
    assert loaded.to_dict() == config.to_dict()
    silent = IndexTTS2GenerationConfig(num_semantic_tokens=None, duration_conditioning=None)
    assert not hasattr(silent, "num_semantic_tokens") and not hasattr(silent, "duration_conditioning")


def test_count_from_the_generation_config_of_the_model(tmp_path):
    t2s = make_tiny_t2s()
    t2s.generation_config = IndexTTS2GenerationConfig(num_semantic_tokens=6, duration_conditioning=False)
    t2s.save_pretrained(tmp_path)
    t2s = IndexTTS2T2SForConditionalGeneration.from_pretrained(tmp_path)
    assert type(t2s.generation_config) is IndexTTS2GenerationConfig
    assert t2s.generation_config.duration_conditioning is False
    assert count_tokens(t2s.generate(**make_inputs(t2s))) == [6, 6, 6]
    assert count_tokens(t2s.generate(**make_inputs(t2s), num_semantic_tokens=None)) == [6, 6, 6]
    assert count_tokens(t2s.generate(**make_inputs(t2s), num_semantic_tokens=[2, 3, 4])) == [2, 3, 4]
    assert count_tokens(
        t2s.generate(**make_inputs(t2s), generation_config=IndexTTS2GenerationConfig(num_semantic_tokens=8))
    ) == [8, 8, 8]


@pytest.mark.parametrize("config_class", [GenerationConfig, IndexTTS2GenerationConfig])
def test_a_given_generation_config(t2s, config_class):
    config = config_class(do_sample=False, num_semantic_tokens=[2, 7, 4])
    assert count_tokens(t2s.generate(**make_inputs(t2s), generation_config=config)) == [2, 7, 4]


def test_a_new_model_knows_its_ids(t2s):
    new = IndexTTS2T2SForConditionalGeneration(t2s.config).eval()
    assert type(new.generation_config) is IndexTTS2GenerationConfig
    new.load_state_dict(t2s.state_dict())
    expected = t2s.generate(**make_inputs(t2s), do_sample=False, max_new_tokens=60)
    assert torch.equal(new.generate(**make_inputs(t2s), max_new_tokens=60), expected)
    assert count_tokens(new.generate(**make_inputs(t2s), num_semantic_tokens=[3, 5, 2])) == [3, 5, 2]


def test_without_a_limit_the_table_is_the_limit():
    t2s = make_tiny_t2s(max_semantic_tokens=20)
    t2s.generation_config = IndexTTS2GenerationConfig(do_sample=False)
    t2s.semantic_head.bias.data[STOP] = -100.0
    assert t2s.generate(**make_inputs(t2s)).shape == (3, 21)


def test_config_comes_from_its_file_only(t2s):
    with pytest.raises(NotImplementedError, match="keeps its generation settings in `generation_config.json`"):
        IndexTTS2GenerationConfig.from_model_config(t2s.config)


# Errors


@pytest.mark.parametrize("count", [0, -3, 2.0, True, "5", [4, 0], [None, 1.5]])
def test_counts_that_are_none(t2s, count):
    with pytest.raises(
        ValueError, match="but it must be a whole number of at least 1. Leave it out for a free length"
    ):
        t2s.generate(**make_inputs(t2s), num_semantic_tokens=count)
    with pytest.raises(ValueError, match="but it must be a whole number of at least 1"):
        IndexTTS2GenerationConfig(num_semantic_tokens=count)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_semantic_tokens": [3, 4]}, "has 2 counts for a batch of 3 rows"),
        ({"num_semantic_tokens": []}, "has 0 counts for a batch of 3 rows"),
        ({"max_new_tokens": 202}, "`max_new_tokens` is 202 but .* 200 semantic tokens and a stop token: give at most 201"),
        ({"max_length": 50}, "`max_length` is 50, but it would count the rows of the prefix .* Give `max_new_tokens`"),
        ({"min_length": 20}, "`min_length` is 20, but it would count the rows of the prefix .* Give `min_new_tokens`"),
        ({"num_semantic_tokens": [9, 4, None], "min_new_tokens": 6}, "is 4 but `min_new_tokens` is 6: give one of them"),
    ],
)  # fmt: skip
def test_impossible_settings(t2s, settings, message):
    with pytest.raises(ValueError, match=message):
        t2s.generate(**make_inputs(t2s), **settings)
    if "length" not in str(settings):
        return
    with pytest.raises(ValueError, match=message):
        t2s.generate(**make_inputs(t2s), generation_config=GenerationConfig(**settings))


def test_longest_limit_is_allowed(t2s):
    assert t2s.generate(**make_inputs(t2s), do_sample=False, max_new_tokens=201).shape[1] <= 201


def test_wrong_number_of_counts_for_a_prefix(t2s):
    embeds, mask = t2s.prepare_prefix(**make_inputs(t2s))
    with pytest.raises(
        ValueError, match="has 2 counts for a batch of 3 rows. Give one number for all rows or one for"
    ):
        t2s.generate(inputs_embeds=embeds, attention_mask=mask, num_semantic_tokens=[3, 4])


def test_prefix_given_twice_or_not_at_all(t2s):
    with pytest.raises(ValueError, match=r"a prefix made by `prepare_prefix` \(`inputs_embeds`\), but got neither"):
        t2s.generate()
    with pytest.raises(ValueError, match="but got both"):
        t2s.generate(**make_inputs(t2s), inputs_embeds=torch.zeros(3, 4, 32))
    with pytest.raises(ValueError, match="There is no voice"):
        t2s.generate(input_ids=torch.tensor([[11]]))


def test_seeded_sampling_errors(t2s):
    with pytest.raises(ValueError, match="needs one beam, but `num_beams` is 3"):
        t2s.generate(**make_inputs(t2s), num_beams=3, logits_processor=seeded_processor(1, 2, 3))
    with pytest.raises(ValueError, match="There are 2 generators for 3 rows"):
        t2s.generate(**make_inputs(t2s), do_sample=True, logits_processor=seeded_processor(1, 2))
    with pytest.raises(ValueError, match="There are 4 generators for 3 rows"):
        t2s.generate(**make_inputs(t2s), do_sample=True, logits_processor=seeded_processor(1, 2, 3, 4))
