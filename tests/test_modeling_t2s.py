import copy
import itertools
import math
import re
from importlib.metadata import version

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import make_tiny_t2s, randomize, tiny_t2s_config
from huggingface_hub.errors import StrictDataclassError
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from indextts2_hf import IndexTTS2GenerationConfig, IndexTTS2T2SConfig, IndexTTS2T2SForConditionalGeneration
from indextts2_hf.generation_t2s import CACHE_NAME
from indextts2_hf.modeling_t2s import LORA_TARGET_MODULES, IndexTTS2T2SModel, TextRecognizer, sinusoidal_positions


TEXT_LENGTHS = (9, 4, 7)
CODE_LENGTHS = (6, 11, 8)


@pytest.fixture(scope="module")
def t2s():
    """As trained here. Shared: a test must not change it."""
    return make_tiny_t2s()


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_rows(config, device="cpu"):
    """Three rows of different lengths, not padded: text ids, codes, speaker features, emotion features."""
    generator = torch.Generator().manual_seed(3)
    return [
        {
            "input_ids": torch.randint(2, config.text_vocab_size, (text_length,), generator=generator),
            "labels": torch.randint(0, 64, (code_length,), generator=generator),
            "speaker_features": torch.randn(10 + code_length, config.feature_size, generator=generator),
            "emotion_features": torch.randn(5 + text_length, config.feature_size, generator=generator),
        }
        for text_length, code_length in zip(TEXT_LENGTHS, CODE_LENGTHS, strict=True)
    ]


def make_batch(rows, padding_side="left"):
    """The rows in one batch, the text padded on one side and everything else on the right, with masks and lengths."""
    input_ids = [row["input_ids"] for row in rows]
    return {
        "input_ids": pad_sequence(input_ids, batch_first=True, padding_value=7, padding_side=padding_side),
        "attention_mask": pad_sequence(
            [torch.ones_like(ids) for ids in input_ids], batch_first=True, padding_side=padding_side
        ),
        "labels": pad_sequence([row["labels"] for row in rows], batch_first=True, padding_value=-100),
        "num_semantic_tokens": torch.tensor([len(row["labels"]) for row in rows]),
    } | {
        key: value
        for name in ("speaker", "emotion")
        for key, value in {
            f"{name}_features": pad_sequence([row[f"{name}_features"] for row in rows], batch_first=True),
            f"{name}_feature_lengths": torch.tensor([len(row[f"{name}_features"]) for row in rows]),
        }.items()
    }


@pytest.fixture(scope="module")
def rows(t2s):
    return make_rows(t2s.config)


def assert_close(left, right, atol=1e-5):
    torch.testing.assert_close(left, right, atol=atol, rtol=1e-5)


# Condition encoders


@pytest.mark.parametrize("num_frames", [3, 4, 17, 18])
def test_condition_shapes(t2s, num_frames):
    features = randn(2, num_frames, 24)
    latents = t2s.encode_speaker(features)
    assert latents.shape == (2, 4, 32) and latents.dtype == torch.float32
    assert t2s.encode_emotion(features).shape == (2, 32)
    context, mask = t2s.speaker_conformer(features, torch.tensor([num_frames, 3]))
    assert context.shape == (2, (num_frames - 1) // 2, 16)
    assert mask.sum(dim=1).tolist() == [(num_frames - 1) // 2, 1]


@pytest.mark.parametrize("encode", ["encode_speaker", "encode_emotion"])
def test_conditions_are_independent_of_padding(t2s, encode):
    lengths = torch.tensor([21, 3, 12, 7, 20])
    features = [randn(length, 24, seed=length) for length in lengths.tolist()]
    batch = pad_sequence(features, batch_first=True)
    for padding in (0.0, 100.0):
        steps = torch.arange(batch.shape[1])
        batch = batch.masked_fill((steps >= lengths[:, None])[..., None], padding)
        encoded = getattr(t2s, encode)(batch, lengths)
        for row, alone in zip(encoded, features, strict=True):
            assert_close(row, getattr(t2s, encode)(alone[None])[0])


def test_full_lengths_equal_no_lengths(t2s):
    features = randn(2, 15, 24)
    assert_close(t2s.encode_speaker(features, torch.tensor([15, 15])), t2s.encode_speaker(features))


def test_sinusoidal_positions():
    table = sinusoidal_positions(5, 6, torch.device("cpu"))
    assert table.shape == (5, 6) and table.dtype == torch.float32
    assert_close(table[3, 2], torch.sin(torch.tensor(3 * 10000 ** (-2 / 6))))
    assert_close(table[3, 3], torch.cos(torch.tensor(3 * 10000 ** (-2 / 6))))


def test_mix_emotion(t2s):
    base, emotion = randn(2, 32), randn(2, 32, seed=1)
    assert_close(t2s.mix_emotion(base, emotion), emotion)
    assert torch.equal(t2s.mix_emotion(base, emotion, 0.0), base)
    strength = torch.tensor([[0.25], [1.0]])
    assert_close(t2s.mix_emotion(base, emotion, strength)[0], 0.75 * base[0] + 0.25 * emotion[0])


def test_weigh_emotion_takes_the_nearest_speaker_of_each_emotion(t2s):
    prototypes = t2s.emotion_prototypes
    speaker_embeds, base, weights = randn(3, 16), randn(3, 32), torch.rand(3, 8)
    for row in range(3):
        expected, start = (1 - weights[row].sum()) * base[row], 0
        for emotion, count in enumerate(t2s.config.emotion_prototype_counts):
            candidates = prototypes.speaker_embeds[start : start + count]
            best = start + int(F.cosine_similarity(candidates, speaker_embeds[row][None], dim=1).argmax())
            assert prototypes.nearest(speaker_embeds)[row, emotion] == best
            expected = expected + weights[row, emotion] * prototypes.emotion_embeds[best]
            start += count
        assert_close(t2s.weigh_emotion(weights, speaker_embeds, base)[row], expected)


# Prefix


def make_condition(t2s, batch_size=1, seed=5):
    return {
        "speaker_latents": randn(batch_size, t2s.config.speaker_num_latents, t2s.config.hidden_size, seed=seed),
        "emotion_embeds": randn(batch_size, t2s.config.hidden_size, seed=seed + 1),
    }


def test_prefix_layout(t2s):
    condition = make_condition(t2s)
    input_ids = torch.tensor([[11, 12, 13]])
    embeds, mask = t2s.prepare_prefix(input_ids, **condition, num_semantic_tokens=5)
    assert embeds.shape == (1, 4 + 2 + 5 + 1, 32) and embeds.dtype == torch.float32
    assert mask.tolist() == [[1] * 12] and mask.dtype == torch.long

    voice = condition["speaker_latents"] + condition["emotion_embeds"][:, None]
    assert torch.equal(embeds[:, :4], voice)
    assert torch.equal(embeds[0, 4], t2s.semantic_position_embedding.weight[5])
    assert torch.equal(embeds[0, 5], t2s.slot_embedding.weight[0])
    text = t2s.text_embedding(torch.tensor([0, 11, 12, 13, 1])) + t2s.text_position_embedding.weight[:5]
    assert torch.equal(embeds[0, 6:11], text)
    start = t2s.semantic_embedding.weight[64] + t2s.semantic_position_embedding.weight[0]
    assert torch.equal(embeds[0, 11], start)

    neutral, _ = t2s.prepare_prefix(input_ids, speaker_latents=condition["speaker_latents"])
    assert torch.equal(neutral[:, :4], condition["speaker_latents"])


@pytest.mark.parametrize("use_length_row", [True, False])
@pytest.mark.parametrize("duration_conditioning", [None, True, False])
@pytest.mark.parametrize("as_tensor", [True, False])
def test_length_slot(use_length_row, duration_conditioning, as_tensor):
    t2s = make_tiny_t2s(use_length_row=use_length_row)
    counts = torch.tensor([7, 0, 200]) if as_tensor else [7, None, 200]
    embeds, _ = t2s.prepare_prefix(
        torch.tensor([[11, 12]] * 3),
        **make_condition(t2s, 3),
        num_semantic_tokens=counts,
        duration_conditioning=duration_conditioning,
    )
    free = torch.zeros(32) if use_length_row else t2s.slot_embedding.weight[1]
    is_written = use_length_row if duration_conditioning is None else duration_conditioning
    for row, count in enumerate((7, None, 200)):
        expected = t2s.semantic_position_embedding.weight[count] if is_written and count else free
        assert torch.equal(embeds[row, 4], expected)
        assert torch.equal(embeds[row, 5], t2s.slot_embedding.weight[0])


def test_one_count_for_all_rows(t2s):
    inputs = {"input_ids": torch.tensor([[11, 12]] * 2), **make_condition(t2s, 2)}
    one, _ = t2s.prepare_prefix(**inputs, num_semantic_tokens=9)
    assert torch.equal(one, t2s.prepare_prefix(**inputs, num_semantic_tokens=[9, 9])[0])
    assert torch.equal(one, t2s.prepare_prefix(**inputs, num_semantic_tokens=(9, 9))[0])


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_prefix_is_independent_of_padding(t2s, rows, padding_side):
    batch = make_batch(rows, padding_side)
    condition = make_condition(t2s, 3)
    embeds, mask = t2s.prepare_prefix(batch["input_ids"], batch["attention_mask"], **condition)
    for row, alone in enumerate(rows):
        expected, _ = t2s.prepare_prefix(
            alone["input_ids"][None], **{key: value[row : row + 1] for key, value in condition.items()}
        )
        length = expected.shape[1]
        assert mask[row].tolist() == [0] * (mask.shape[1] - length) + [1] * length
        assert torch.equal(embeds[row, -length:], expected[0])
        assert not embeds[row, :-length].any()


def test_prefix_without_text_equals_that_of_an_empty_text(t2s, rows):
    batch, condition = make_batch(rows, "left"), make_condition(t2s, 3)
    inputs = {"input_ids": batch["input_ids"], **condition, "num_semantic_tokens": [7, None, 20]}
    prefix = t2s.prepare_prefix(**inputs, attention_mask=batch["attention_mask"])
    empty = t2s.prepare_prefix(**inputs, attention_mask=torch.zeros_like(batch["attention_mask"]))
    embeds, mask = t2s.without_text(*prefix)
    assert embeds.shape == prefix[0].shape and mask.dtype == torch.long
    assert torch.equal(mask.sum(dim=1), empty[1].sum(dim=1))
    for row in range(3):
        assert torch.equal(embeds[row, mask[row].bool()], empty[0][row, empty[1][row].bool()])


def test_start_and_stop_ids_inside_a_text_are_dropped(t2s):
    condition = make_condition(t2s)
    clean, _ = t2s.prepare_prefix(torch.tensor([[11, 12, 13]]), **condition)
    marked, mask = t2s.prepare_prefix(torch.tensor([[0, 11, 1, 12, 13, 1, 1]]), **condition)
    assert mask.sum() == clean.shape[1]
    assert torch.equal(marked[:, -clean.shape[1] :], clean)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"speaker_latents": None}, "There is no voice: `speaker_latents` is missing"),
        ({"input_ids": torch.full((1, 131), 5)}, "text has 131 tokens but this checkpoint has positions for 130"),
        ({"num_semantic_tokens": 201}, "is 201 but this checkpoint has positions for at most 200"),
        ({"num_semantic_tokens": [3, 4]}, "has 2 counts for a batch of 1 rows"),
        ({"num_semantic_tokens": torch.tensor([3, 4])}, "has 2 counts for a batch of 1 rows"),
        ({"num_semantic_tokens": []}, "has 0 counts for a batch of 1 rows"),
        ({"num_semantic_tokens": 0}, "is 0, but it must be a whole number of at least 1"),
        ({"num_semantic_tokens": [2.5]}, "is 2.5, but it must be a whole number"),
    ],
)
def test_prefix_errors(t2s, inputs, message):
    with pytest.raises(ValueError, match=message):
        t2s.prepare_prefix(**({"input_ids": torch.tensor([[11, 12]]), **make_condition(t2s)} | inputs))


def test_longest_text_and_count(t2s):
    embeds, _ = t2s.prepare_prefix(torch.full((1, 130), 5), **make_condition(t2s), num_semantic_tokens=200)
    assert embeds.shape[1] == 4 + 2 + 132 + 1


# Forward and loss


def test_forward_shapes(t2s, rows):
    batch = make_batch(rows)
    output = t2s(**batch)
    assert output.loss.shape == output.semantic_loss.shape == output.text_loss.shape == ()
    assert output.logits.shape == (3, 12, 66)
    assert output.text_logits.shape == (3, 11, 1000)
    assert output.last_hidden_state.shape == (3, 12, 32)
    assert output[CACHE_NAME].get_seq_length() == 4 + 2 + 11 + 12
    del batch["labels"]
    output = t2s(**batch, use_cache=False)
    assert output.logits.shape == (3, 1, 66)
    assert output.loss is output.text_logits is getattr(output, CACHE_NAME) is None


def test_recorded_outputs(t2s, rows):
    t2s = make_tiny_t2s()
    t2s.set_attn_implementation("eager")
    output = t2s(**make_batch(rows), output_hidden_states=True, output_attentions=True)
    assert [state.shape for state in output.hidden_states] == [(3, 29, 32)] * 3
    assert [attention.shape for attention in output.attentions] == [(3, 4, 29, 29)] * 2
    as_tuple = t2s(**make_batch(rows), return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], output.loss)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_a_row_alone_equals_the_row_in_a_batch(t2s, rows, padding_side):
    batch = make_batch(rows, padding_side)
    output = t2s(**batch)
    semantic_losses, text_losses = [], []
    for index, row in enumerate(rows):
        alone = t2s(**make_batch([row]))
        num_codes, num_text = len(row["labels"]), len(row["input_ids"])
        assert_close(output.logits[index, : num_codes + 1], alone.logits[0])
        assert_close(output.last_hidden_state[index, : num_codes + 1], alone.last_hidden_state[0])
        assert_close(output.text_logits[index, : num_text + 2], alone.text_logits[0])
        semantic_losses.append(alone.semantic_loss)
        text_losses.append(alone.text_loss)
    # The loss is the mean over rows: what a row contributes does not depend on its neighbours.
    assert_close(output.semantic_loss, torch.stack(semantic_losses).mean())
    assert_close(output.text_loss, torch.stack(text_losses).mean())


@pytest.mark.parametrize("text_loss_weight", [0.01, 0.5])
def test_loss_by_hand(rows, text_loss_weight):
    t2s = make_tiny_t2s(text_loss_weight=text_loss_weight)
    row = rows[0]
    codes, text = row["labels"].tolist(), row["input_ids"].tolist()
    voice = (
        t2s.encode_speaker(row["speaker_features"][None]) + t2s.encode_emotion(row["emotion_features"][None])[:, None]
    )

    # The sequence as the module docstring draws it, embedded one by one.
    sequence = list(voice[0]) + [t2s.semantic_position_embedding.weight[len(codes)], t2s.slot_embedding.weight[0]]
    for position, token in enumerate([0, *text, 1]):
        sequence.append(t2s.text_embedding.weight[token] + t2s.text_position_embedding.weight[position])
    for position, token in enumerate([64, *codes]):
        sequence.append(t2s.semantic_embedding.weight[token] + t2s.semantic_position_embedding.weight[position])
    states = t2s.model(inputs_embeds=torch.stack(sequence)[None]).last_hidden_state[0]

    first_text, first_code = 6, 6 + len(text) + 2
    text_loss = -sum(
        t2s.text_head(states[first_text + index]).log_softmax(-1)[token] for index, token in enumerate([*text, 1])
    ) / (len(text) + 1)
    semantic_loss = -sum(
        t2s.semantic_head(states[first_code + index]).log_softmax(-1)[token]
        for index, token in enumerate([*codes, 65])
    ) / (len(codes) + 1)

    output = t2s(**make_batch([row]))
    assert_close(output.text_loss, text_loss)
    assert_close(output.semantic_loss, semantic_loss)
    assert_close(output.loss, semantic_loss + text_loss_weight * text_loss)


def test_encoded_conditions_equal_features(t2s, rows):
    batch = make_batch(rows)
    expected = t2s(**batch).logits
    speaker_latents = t2s.encode_speaker(batch.pop("speaker_features"), batch.pop("speaker_feature_lengths"))
    emotion_embeds = t2s.encode_emotion(batch.pop("emotion_features"), batch.pop("emotion_feature_lengths"))
    assert_close(t2s(**batch, speaker_latents=speaker_latents, emotion_embeds=emotion_embeds).logits, expected)


def test_prepared_prefix_equals_text(t2s, rows):
    batch = make_batch(rows)
    codes = batch["labels"].clamp(min=0)
    condition = make_condition(t2s, 3)
    text = {name: batch[name] for name in ("input_ids", "attention_mask", "num_semantic_tokens")}
    inputs_embeds, mask = t2s.prepare_prefix(**text, **condition)
    output = t2s(inputs_embeds=inputs_embeds, attention_mask=mask, semantic_ids=codes)
    assert_close(output.logits, t2s(**text, **condition, semantic_ids=codes).logits)


@pytest.mark.parametrize("skip_semantic_position_one", [True, False])
def test_forward_counts_positions_from_zero(rows, skip_semantic_position_one):
    t2s = make_tiny_t2s(skip_semantic_position_one=skip_semantic_position_one)
    seen = []
    t2s.semantic_position_embedding.register_forward_hook(lambda module, args, output: seen.append(args[0].tolist()))
    t2s(**make_batch(rows[:1]) | {"num_semantic_tokens": None})
    # Slot one (free), the start token, the codes.
    assert seen == [[0], [[0]], [[1, 2, 3, 4, 5, 6]]]


def test_given_positions(t2s, rows):
    batch = make_batch(rows[:1])
    codes = batch.pop("labels")
    default = t2s(**batch, semantic_ids=codes).logits
    assert_close(t2s(**batch, semantic_ids=codes, position_ids=torch.arange(1, 7)[None]).logits, default)
    assert not torch.allclose(t2s(**batch, semantic_ids=codes, position_ids=torch.arange(2, 8)[None]).logits, default)


def test_logits_to_keep(t2s, rows):
    batch = make_batch(rows)
    codes = batch.pop("labels").clamp(min=0)
    assert_close(
        t2s(**batch, semantic_ids=codes, logits_to_keep=2).logits, t2s(**batch, semantic_ids=codes).logits[:, -2:]
    )


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_cached_steps_equal_one_pass(t2s, rows, name):
    row = make_batch(rows[:1])
    codes = row.pop("labels")
    whole = t2s(**row, semantic_ids=codes)
    output = t2s(**row, use_cache=True)
    logits, states = [output.logits], [output.last_hidden_state]
    for step in range(codes.shape[1]):
        output = t2s(
            semantic_ids=codes[:, step : step + 1],
            position_ids=torch.tensor([[step + 1]]),
            use_cache=True,
            **{name: output[CACHE_NAME]},
        )
        logits.append(output.logits)
        states.append(output.last_hidden_state)
    assert_close(torch.cat(logits, dim=1), whole.logits)
    assert_close(torch.cat(states, dim=1), whole.last_hidden_state)


def test_a_cache_under_both_of_its_names(t2s):
    with pytest.raises(ValueError, match="`cache` and `past_key_values` are two names of one argument"):
        t2s(semantic_ids=torch.tensor([[5]]), cache=DynamicCache(), past_key_values=DynamicCache())


def test_forward_errors(t2s, rows):
    with pytest.raises(
        ValueError, match=r"needs text \(`input_ids`\) or a prefix \(`inputs_embeds`\), but got neither"
    ):
        t2s(semantic_ids=torch.tensor([[1, 2]]))
    with pytest.raises(ValueError, match="The loss needs the text: give `input_ids` instead of `inputs_embeds`"):
        t2s(inputs_embeds=torch.zeros(1, 5, 32), labels=torch.tensor([[1, 2]]))
    with pytest.raises(ValueError, match="There is no voice"):
        t2s(input_ids=torch.tensor([[11]]))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations_agree(t2s, rows, implementation):
    other = make_tiny_t2s()
    other.set_attn_implementation(implementation)
    assert other.config._attn_implementation == other.model.config._attn_implementation == implementation
    assert_close(other(**make_batch(rows)).logits, t2s(**make_batch(rows)).logits)


# Training


@pytest.mark.parametrize("use_length_row", [True, False])
def test_gradient_reaches_every_parameter(rows, use_length_row):
    t2s = make_tiny_t2s(use_length_row=use_length_row).train()
    t2s(**make_batch(rows)).loss.backward()
    for name, parameter in t2s.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        # A softmax does not feel what all its keys share.
        if not name.endswith("k_proj.bias"):
            assert parameter.grad.abs().max() > 1e-8, name
    assert {name for name, _ in t2s.named_buffers()} == {
        "emotion_prototypes.speaker_embeds",
        "emotion_prototypes.emotion_embeds",
    }


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(rows, use_reentrant):
    t2s = make_tiny_t2s(attn_pdrop=0, resid_pdrop=0, embd_pdrop=0).train()
    batch = make_batch(rows)
    t2s(**batch).loss.backward()
    expected = {name: parameter.grad for name, parameter in t2s.named_parameters()}
    t2s.zero_grad()
    t2s.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    assert t2s.is_activation_checkpointing
    loss = t2s(**batch).loss
    assert_close(loss, make_tiny_t2s(attn_pdrop=0, resid_pdrop=0, embd_pdrop=0)(**batch).loss)
    loss.backward()
    for name, parameter in t2s.named_parameters():
        assert_close(parameter.grad, expected[name])


def test_a_few_steps_of_training_lower_the_loss(rows):
    t2s = make_tiny_t2s().train()
    batch = make_batch(rows)
    optimizer = torch.optim.AdamW(t2s.parameters(), lr=3e-3)
    torch.manual_seed(0)
    losses = []
    for _ in range(15):
        loss = t2s(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_new_weights():
    torch.manual_seed(0)
    config = tiny_t2s_config(hidden_size=64)
    t2s = IndexTTS2T2SForConditionalGeneration(config)
    block = t2s.model.layers[0]
    assert block.attn.c_attn.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert block.attn.c_proj.weight.std().item() == pytest.approx(
        0.02 / (2 * config.num_hidden_layers) ** 0.5, rel=0.1
    )
    assert block.mlp.c_proj.weight.std().item() == pytest.approx(0.02 / (2 * config.num_hidden_layers) ** 0.5, rel=0.1)
    assert not t2s.slot_embedding.weight.any()
    assert not t2s.emotion_prototypes.emotion_embeds.any()
    assert t2s.speaker_perceiver.latents.std() > 0 and t2s.speaker_conformer.layers[0].attention.content_bias.std() > 0


# Number formats


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(t2s, rows, dtype):
    half = copy.deepcopy(t2s).to(dtype)
    batch = make_batch(rows)
    batch = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}
    output = half(**batch)
    assert output.logits.dtype == output.last_hidden_state.dtype == dtype
    assert output.loss.dtype == torch.float32
    assert output.loss.item() == pytest.approx(t2s(**make_batch(rows)).loss.item(), rel=0.05)


def test_autocast(rows):
    t2s = make_tiny_t2s().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = t2s(**make_batch(rows))
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert all(parameter.grad.dtype == torch.float32 for parameter in t2s.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loading_in_another_dtype(t2s, tmp_path, dtype):
    t2s.save_pretrained(tmp_path)
    loaded = IndexTTS2T2SForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    # Near speakers look equal in half precision: the prototypes stay as they are.
    assert {buffer.dtype for buffer in loaded.buffers()} == {torch.float32}
    for name, buffer in loaded.named_buffers():
        torch.testing.assert_close(buffer, t2s.get_buffer(name), atol=0, rtol=0)
    loaded.save_pretrained(tmp_path / "half")
    assert IndexTTS2T2SForConditionalGeneration.from_pretrained(tmp_path / "half", dtype="auto").dtype == dtype


# Files


@pytest.mark.parametrize("subfolder", ["", "t2s"])
def test_save_and_load(t2s, rows, tmp_path, subfolder):
    t2s.save_pretrained(tmp_path / subfolder)
    loaded, info = IndexTTS2T2SForConditionalGeneration.from_pretrained(
        tmp_path, subfolder=subfolder, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not loaded.training
    assert type(loaded.config) is IndexTTS2T2SConfig
    assert type(loaded.generation_config) is IndexTTS2GenerationConfig
    for name in ("temperature", "top_k", "top_p", "max_new_tokens", "eos_token_id", "pad_token_id", "bos_token_id"):
        assert getattr(loaded.generation_config, name) == getattr(t2s.generation_config, name)
    assert loaded.state_dict().keys() == t2s.state_dict().keys()
    assert all(torch.equal(tensor, t2s.state_dict()[key]) for key, tensor in loaded.state_dict().items())
    assert_close(loaded(**make_batch(rows)).logits, t2s(**make_batch(rows)).logits)


def test_trunk_loads_from_the_whole(t2s, tmp_path):
    t2s.save_pretrained(tmp_path)
    trunk = IndexTTS2T2SModel.from_pretrained(tmp_path)
    embeds = randn(2, 5, 32)
    assert_close(trunk(embeds).last_hidden_state, t2s.model(embeds).last_hidden_state)


def test_embeddings_of_the_semantic_tokens(t2s):
    assert t2s.get_input_embeddings() is t2s.semantic_embedding
    assert t2s.get_output_embeddings() is t2s.semantic_head
    assert t2s.base_model is t2s.model


# Adapters


def make_adapter_config():
    from peft import LoraConfig

    return LoraConfig(r=4, lora_alpha=8, target_modules=LORA_TARGET_MODULES, init_lora_weights=False)


@pytest.mark.lora
@torch.no_grad()
def test_lora(rows, tmp_path):
    batch = make_batch(rows)
    adapted = make_tiny_t2s()
    base = adapted(**batch).logits
    torch.manual_seed(1)
    adapted.add_adapter(make_adapter_config(), adapter_name="happy")
    adapted.add_adapter(make_adapter_config(), adapter_name="sad")
    adapted.eval()

    adapted.set_adapter("happy")
    happy = adapted(**batch).logits
    adapted.set_adapter("sad")
    sad = adapted(**batch).logits
    assert not torch.allclose(happy, base, atol=1e-3) and not torch.allclose(happy, sad, atol=1e-3)
    adapted.disable_adapters()
    assert torch.equal(adapted(**batch).logits, base)
    kept = {name.replace(".base_layer", ""): value for name, value in adapted.state_dict().items()}
    assert all(torch.equal(kept[name], value) for name, value in make_tiny_t2s().state_dict().items())
    adapted.enable_adapters()

    adapted.set_adapter("happy")
    adapted.save_pretrained(tmp_path / "happy")
    assert not list((tmp_path / "happy").glob("model*.safetensors"))
    fresh = make_tiny_t2s()
    fresh.load_adapter(str(tmp_path / "happy"), adapter_name="happy")
    assert_close(fresh.eval()(**batch).logits, happy)

    trained = {name for name, _ in fresh.named_modules() if name.endswith("lora_A")}
    assert trained == {
        f"model.layers.{layer}.{name}.lora_A"
        for layer in range(2)
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }


@pytest.mark.lora
def test_lora_trains_the_adapter_alone(rows):
    t2s = make_tiny_t2s()
    t2s.add_adapter(make_adapter_config())
    t2s.train()
    t2s(**make_batch(rows)).loss.backward()
    for name, parameter in t2s.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name), name


def test_versions_of_transformers_and_peft_that_do_not_work_together(t2s, monkeypatch):
    monkeypatch.setattr("indextts2_hf.modeling_t2s.MIN_PEFT_VERSION", "99.0")
    message = (
        f"transformers {transformers.__version__} asks for PEFT 99.0 or newer, but PEFT {version('peft')} is installed: "
        '`pip install "indextts2-hf[train]"` installs versions that work together. Only adapters need PEFT.'
    )
    for change in (lambda: t2s.add_adapter(make_adapter_config()), lambda: t2s.load_adapter("somewhere")):
        with pytest.raises(ImportError, match=re.escape(message)):
            change()
    assert not hasattr(t2s, "peft_config")


def test_without_peft(t2s, monkeypatch):
    monkeypatch.setattr("indextts2_hf.modeling_t2s.is_peft_available", lambda: False)
    for change in (lambda: t2s.add_adapter(make_adapter_config()), lambda: t2s.load_adapter("somewhere")):
        with pytest.raises(
            ImportError, match=r"An adapter needs PEFT, which is not installed: `pip install .*\[train\]"
        ):
            change()


# The recogniser


@pytest.fixture
def recognizer():
    torch.manual_seed(0)
    return randomize(TextRecognizer(tiny_t2s_config(text_recognizer_size=16, text_vocab_size=3)))


def test_likelihood_of_a_text_by_hand(recognizer):
    """The sum over all ways to spread the text and blanks over the codes."""
    codes, text = torch.tensor([[5, 17, 17, 60, 2]]), [2, 0, 0]
    log_probs = recognizer.log_probs(codes, torch.tensor([5]))[0]
    assert log_probs.shape == (5, 4)
    torch.testing.assert_close(log_probs.exp().sum(dim=1), torch.ones(5))
    total = 0.0
    for path in itertools.product(range(4), repeat=5):
        runs = [symbol for symbol, _ in itertools.groupby(path)]
        if [symbol for symbol in runs if symbol != 3] == text:
            total += math.exp(sum(log_probs[step, symbol].item() for step, symbol in enumerate(path)))
    found = recognizer(codes, torch.tensor([5]), torch.tensor([text]), torch.tensor([3]))
    assert found.item() == pytest.approx(math.log(total) / 3, rel=1e-4)


def test_the_recogniser_hears_no_neighbours_and_no_padding(recognizer):
    codes, lengths = torch.randint(0, 64, (3, 30)), torch.tensor([30, 12, 4])
    texts, num_pieces = torch.tensor([[0, 1, 2, 1], [1, 1, 0, 0], [2, 2, 2, 0]]), torch.tensor([4, 2, 3])
    both = recognizer(codes, lengths, texts, num_pieces)
    for row in range(3):
        alone = recognizer(
            codes[row : row + 1, : lengths[row]],
            lengths[row : row + 1],
            texts[row : row + 1, : num_pieces[row]],
            num_pieces[row : row + 1],
        )
        torch.testing.assert_close(both[row : row + 1], alone)
    # Three times the same piece takes five codes: a blank parts them.
    assert both[2] == -math.inf and both[:2].isfinite().all()


def test_a_recogniser_is_added_and_saved(tmp_path):
    t2s = make_tiny_t2s()
    assert t2s.text_recognizer is None
    t2s.add_text_recognizer(16)
    t2s.add_text_recognizer(16)  # there already
    with pytest.raises(ValueError, match="width 8 was asked for, but this checkpoint has one of width 16"):
        t2s.add_text_recognizer(8)
    t2s.save_pretrained(tmp_path)
    loaded = IndexTTS2T2SForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.text_recognizer_size == 16
    for name, tensor in t2s.text_recognizer.state_dict().items():
        assert torch.equal(loaded.text_recognizer.state_dict()[name], tensor), name


def test_impossible_size_of_the_recogniser():
    with pytest.raises(StrictDataclassError, match="`text_recognizer_size` is -1, but it must be a width, or 0"):
        tiny_t2s_config(text_recognizer_size=-1)
