import json

import pytest
import torch
import torch.nn.functional as F

from indextts2_hf.modeling_s2m import (
    IndexTTS2SemanticToMelTransformer,
    LengthRegulator,
    MaskedGroupNorm,
    WaveNet,
    apply_rotary,
    mel_lengths_for,
    nearest_indices,
    rotary_table,
)


TINY = {
    "num_mel_bins": 6,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_layers": 5,
    "content_size": 12,
    "semantic_size": 16,
    "speaker_embed_dim": 5,
    "wavenet_hidden_size": 24,
    "wavenet_num_layers": 3,
    "wavenet_kernel_size": 5,
    "t2s_hidden_size": 20,
    "t2s_projection_sizes": (10, 8),
}


def tiny_model(**kwargs) -> IndexTTS2SemanticToMelTransformer:
    torch.manual_seed(0)
    return IndexTTS2SemanticToMelTransformer(**{**TINY, **kwargs}).eval()


def random_inputs(batch_size: int = 3, num_frames: int = 23) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "sample": randn(batch_size, num_frames, TINY["num_mel_bins"]),
        "timestep": torch.rand(batch_size, generator=generator),
        "prompt_mel": randn(batch_size, num_frames, TINY["num_mel_bins"]),
        "content_embeds": randn(batch_size, num_frames, TINY["content_size"]),
        "speaker_embeds": randn(batch_size, TINY["speaker_embed_dim"]),
    }


def row_alone(inputs: dict[str, torch.Tensor], row: int, length: int) -> dict[str, torch.Tensor]:
    alone = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
    return {name: tensor[:, :length] if tensor.ndim == 3 else tensor for name, tensor in alone.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_and_dtypes(dtype):
    model = tiny_model().to(dtype)
    inputs = {name: tensor.to(dtype) for name, tensor in random_inputs().items()}
    velocity = model(**inputs).velocity
    assert velocity.shape == inputs["sample"].shape and velocity.dtype == dtype

    semantic_embeds = torch.randn(2, 7, TINY["semantic_size"], dtype=dtype)
    hidden_states = torch.randn(2, 7, TINY["t2s_hidden_size"], dtype=dtype)
    semantic_embeds = model.add_hidden_states(semantic_embeds, hidden_states)
    assert semantic_embeds.shape == (2, 7, TINY["semantic_size"]) and semantic_embeds.dtype == dtype
    content_embeds = model.regulate_length(semantic_embeds, torch.tensor([7, 4]), torch.tensor([12, 6]))
    assert content_embeds.shape == (2, 12, TINY["content_size"]) and content_embeds.dtype == dtype


def test_tuple_output_equals_the_output_object():
    model, inputs = tiny_model(), random_inputs()
    output, values = model(**inputs), model(**inputs, return_dict=False)
    assert output.loss is None and len(values) == 1
    assert torch.equal(values[0], output.velocity)

    output = model(**inputs, labels=inputs["sample"])
    loss, velocity = model(**inputs, labels=inputs["sample"], return_dict=False)
    assert torch.equal(loss, output.loss) and torch.equal(velocity, output.velocity)


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[23, 17, 9], [23, 2, 1], [3, 5, 4]])
def test_padded_row_equals_the_row_alone(lengths):
    model, inputs = tiny_model(), random_inputs()
    velocity = model(**inputs, mel_lengths=torch.tensor(lengths)).velocity
    for row, length in enumerate(lengths):
        alone = model(**row_alone(inputs, row, length)).velocity
        torch.testing.assert_close(velocity[row, :length], alone[0], rtol=0, atol=1e-5)
        assert (velocity[row, length:] == 0).all()


@torch.no_grad()
def test_content_of_the_padding_does_not_matter():
    model, inputs = tiny_model(), random_inputs()
    lengths = torch.tensor([23, 17, 2])
    padding = torch.arange(23) >= lengths[:, None]
    other = {
        name: tensor.masked_fill(padding[..., None], 50.0) if tensor.ndim == 3 else tensor
        for name, tensor in inputs.items()
    }
    expected = model(**inputs, mel_lengths=lengths).velocity
    torch.testing.assert_close(model(**other, mel_lengths=lengths).velocity, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_full_lengths_equal_no_lengths():
    model, inputs = tiny_model(), random_inputs()
    with_lengths = model(**inputs, mel_lengths=torch.full((3,), 23)).velocity
    torch.testing.assert_close(with_lengths, model(**inputs).velocity, rtol=0, atol=1e-5)


@torch.no_grad()
def test_zeros_are_not_the_same_as_no_conditions():
    """The unconditional branch of the sampler: zeros still pass through the bias of the content projection."""
    model, inputs = tiny_model(), random_inputs()
    nothing = {name: torch.zeros_like(inputs[name]) for name in ("prompt_mel", "content_embeds", "speaker_embeds")}
    velocity = model(**{**inputs, **nothing}).velocity
    model.content_projection.bias += 1.0
    assert (model(**{**inputs, **nothing}).velocity - velocity).abs().max() > 1e-3


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_gradient_reaches_every_parameter(gradient_checkpointing):
    model, inputs = tiny_model().train(), random_inputs()
    if gradient_checkpointing:
        model.enable_gradient_checkpointing()
    generator = torch.Generator().manual_seed(2)
    semantic_embeds = torch.randn(3, 13, TINY["semantic_size"], generator=generator)
    hidden_states = torch.randn(3, 13, TINY["t2s_hidden_size"], generator=generator)
    mel_lengths = torch.tensor([23, 17, 9])

    semantic_embeds = model.add_hidden_states(semantic_embeds, hidden_states)
    inputs["content_embeds"] = model.regulate_length(semantic_embeds, torch.tensor([13, 10, 5]), mel_lengths)
    model(**inputs, mel_lengths=mel_lengths, labels=torch.randn(3, 23, 6, generator=generator)).loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    zero = [name for name, parameter in model.named_parameters() if not parameter.grad.abs().max() > 0]
    assert without == [] and zero == []


def test_gradient_checkpointing_changes_nothing():
    model, inputs = tiny_model().train(), random_inputs()
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(**inputs, labels=inputs["sample"]).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        model.enable_gradient_checkpointing()
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])


@torch.no_grad()
def test_loss_is_the_mean_over_frames_of_each_row_then_over_rows():
    model, inputs = tiny_model(), random_inputs()
    labels = inputs["prompt_mel"]
    lengths, prompt_lengths = [23, 17, 9], [4, 5, 0]
    mel_lengths = torch.tensor(lengths)
    frames = torch.arange(23)
    loss_mask = (frames >= torch.tensor(prompt_lengths)[:, None]) & (frames < mel_lengths[:, None])
    output = model(**inputs, mel_lengths=mel_lengths, labels=labels, loss_mask=loss_mask)
    rows = [
        F.l1_loss(output.velocity[row, start:end], labels[row, start:end])
        for row, (start, end) in enumerate(zip(prompt_lengths, lengths, strict=True))
    ]
    torch.testing.assert_close(output.loss, torch.stack(rows).mean())

    whole_rows = [F.l1_loss(output.velocity[row, :end], labels[row, :end]) for row, end in enumerate(lengths)]
    torch.testing.assert_close(
        model(**inputs, mel_lengths=mel_lengths, labels=labels).loss, torch.stack(whole_rows).mean()
    )
    output = model(**inputs, labels=labels)
    torch.testing.assert_close(output.loss, F.l1_loss(output.velocity, labels))


@torch.no_grad()
def test_save_load_equality(tmp_path):
    model, inputs = tiny_model(), random_inputs()
    model.save_pretrained(tmp_path)
    loaded = IndexTTS2SemanticToMelTransformer.from_pretrained(tmp_path)
    assert not loaded.training
    assert loaded.config.mel_frames_per_token == 1.72 and tuple(loaded.config.t2s_projection_sizes) == (10, 8)
    assert torch.equal(loaded(**inputs).velocity, model(**inputs).velocity)


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4, 5, 13])
def test_skip_connections_of_any_depth(num_layers):
    model = tiny_model(num_layers=num_layers)
    with_skip = [i for i, block in enumerate(model.blocks) if block.skip_proj is not None]
    assert with_skip == [i for i in range(num_layers) if i > num_layers // 2]

    # The states handed over, last in first out.
    outputs, received = {}, {}

    def record(block, args, output):
        received[block], outputs[block] = args[1], output

    for block in model.blocks:
        block.register_forward_hook(record)
    with torch.no_grad():
        model(**random_inputs())
    for i, block in enumerate(model.blocks):
        source = num_layers - 1 - i if num_layers % 2 else num_layers - i
        assert received[block] is (outputs[model.blocks[source]] if i in with_skip else None)


@pytest.mark.parametrize("hidden_size, inner_size", [(64, 256), (96, 256), (97 * 8, 2304), (512, 1536)])
def test_width_of_the_feed_forward(hidden_size, inner_size):
    with torch.device("meta"):
        model = IndexTTS2SemanticToMelTransformer(hidden_size=hidden_size, num_attention_heads=4, num_layers=1)
    assert model.blocks[0].feed_forward.up_proj.out_features == inner_size


def test_default_is_the_size_of_the_released_checkpoint():
    with torch.device("meta"):
        model = IndexTTS2SemanticToMelTransformer()
    assert sum(parameter.numel() for parameter in model.parameters()) == 98_354_640


def test_time_table_has_cosines_first():
    model = tiny_model()
    t = torch.tensor([0.36])
    angles = 1000.0 * t[:, None] * torch.exp(-torch.log(torch.tensor(10000.0)) * torch.arange(128) / 128)
    expected = torch.cat([angles.cos(), angles.sin()], dim=-1)
    torch.testing.assert_close(model.time_table(1000.0 * t), expected, rtol=0, atol=1e-4)


def test_rotary_turns_interleaved_pairs_as_complex_numbers():
    states = torch.randn(2, 9, 3, 8, generator=torch.Generator().manual_seed(0))
    angles = torch.arange(9.0)[:, None] * 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    turned = (
        torch.view_as_complex(states.unflatten(-1, (4, 2))) * torch.polar(torch.ones_like(angles), angles)[:, None]
    )
    expected = torch.view_as_real(turned).flatten(-2)
    torch.testing.assert_close(apply_rotary(states, rotary_table(9, 8, states.device)), expected)


def test_nearest_indices_equal_interpolate():
    generator = torch.Generator().manual_seed(0)
    small = torch.cartesian_prod(torch.arange(1, 61), torch.arange(1, 61))
    tokens = torch.randint(1, 1816, (300,), generator=generator)
    large = torch.stack([tokens, mel_lengths_for(tokens, 1.72)], dim=1)
    other = torch.randint(1, 3000, (300, 2), generator=generator)
    pairs = torch.cat([small, large, other])
    indices = nearest_indices(pairs[:, 0], pairs[:, 1], int(pairs[:, 1].max()))
    for (num_inputs, num_outputs), row in zip(pairs.tolist(), indices, strict=True):
        # float32 holds these positions exactly.
        positions = torch.arange(num_inputs, dtype=torch.float32)[None, None]
        expected = F.interpolate(positions, size=num_outputs, mode="nearest")[0, 0].long()
        assert torch.equal(row[:num_outputs], expected), (num_inputs, num_outputs)
    assert (indices < pairs[:, :1]).all()


@torch.no_grad()
def test_group_norm_equals_the_stock_one_on_valid_frames():
    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(2, 12, 9, generator=generator) * 3.0 + 1.0
    norm, stock = MaskedGroupNorm(12), torch.nn.GroupNorm(1, 12, eps=1e-5)
    for parameter, other in zip(norm.parameters(), stock.parameters(), strict=True):
        parameter.copy_(torch.randn(12, generator=generator))
        other.copy_(parameter)
    mask = (torch.arange(9) < torch.tensor([[9], [4]]))[:, None]
    normalized = norm(hidden_states, mask)
    for row, length in enumerate((9, 4)):
        expected = stock(hidden_states[row : row + 1, :, :length])
        torch.testing.assert_close(normalized[row : row + 1, :, :length], expected)


@torch.no_grad()
def test_regulated_row_equals_the_row_alone():
    model = tiny_model()
    semantic_embeds = torch.randn(4, 13, TINY["semantic_size"], generator=torch.Generator().manual_seed(0))
    semantic_lengths, mel_lengths = [13, 10, 5, 1], [22, 31, 3, 1]
    content_embeds = model.regulate_length(semantic_embeds, torch.tensor(semantic_lengths), torch.tensor(mel_lengths))
    assert content_embeds.shape == (4, 31, TINY["content_size"])
    for row, (num_tokens, num_frames) in enumerate(zip(semantic_lengths, mel_lengths, strict=True)):
        alone = model.regulate_length(semantic_embeds[row : row + 1, :num_tokens], None, torch.tensor([num_frames]))
        torch.testing.assert_close(content_embeds[row, :num_frames], alone[0], rtol=0, atol=1e-5)
        assert (content_embeds[row, num_frames:] == 0).all()


@torch.no_grad()
def test_regulator_equals_stock_layers():
    torch.manual_seed(0)
    regulator = LengthRegulator(16, 12).eval()
    semantic_embeds = torch.randn(1, 13, 16)
    hidden_states = regulator.input_projection(semantic_embeds).transpose(1, 2)
    hidden_states = F.interpolate(hidden_states, size=22, mode="nearest")
    for conv, norm in zip(regulator.convs, regulator.norms, strict=True):
        hidden_states = F.mish(F.group_norm(conv(hidden_states), 1, norm.weight, norm.bias, eps=1e-5))
    expected = regulator.output_projection(hidden_states.transpose(1, 2))
    content_embeds = regulator(semantic_embeds, torch.tensor([13]), torch.tensor([22]))
    torch.testing.assert_close(content_embeds, expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("num_frames", [1, 2])
def test_wavenet_row_too_short_to_reflect(num_frames):
    """Zeros up to the shortest length that can be reflected, then the usual reflection, then the extra frames go."""
    torch.manual_seed(0)
    wavenet = WaveNet(8, num_layers=1, kernel_size=5).eval()
    hidden_states, time_embeds = torch.randn(1, num_frames, 8), torch.randn(1, 8)
    extended = F.pad(hidden_states.transpose(1, 2), (0, 3 - num_frames))
    filtered, gate = (
        wavenet.gate_convs[0](F.pad(extended, (2, 2), mode="reflect"))
        + wavenet.time_projection(time_embeds)[..., None]
    ).chunk(2, dim=1)
    expected = wavenet.output_convs[0](filtered.tanh() * gate.sigmoid())[..., :num_frames].transpose(1, 2)
    output = wavenet(hidden_states, time_embeds, None)
    assert output.shape == (1, num_frames, 8)
    torch.testing.assert_close(output, expected)

    longer = torch.cat([hidden_states, torch.randn(1, 6, 8)], dim=1)
    padded = wavenet(longer, time_embeds, torch.tensor([num_frames]))
    torch.testing.assert_close(padded[:, :num_frames], expected)
    assert (padded[:, num_frames:] == 0).all()


@torch.no_grad()
def test_hidden_states_are_added_through_stacked_linear_layers():
    model = tiny_model()
    generator = torch.Generator().manual_seed(0)
    semantic_embeds = torch.randn(2, 7, TINY["semantic_size"], generator=generator)
    hidden_states = torch.randn(2, 7, TINY["t2s_hidden_size"], generator=generator)
    expected = hidden_states
    for layer in model.t2s_projection:
        expected = F.linear(expected, layer.weight, layer.bias)
    torch.testing.assert_close(model.add_hidden_states(semantic_embeds, hidden_states), semantic_embeds + expected)
    assert [layer.out_features for layer in model.t2s_projection] == [10, 8, TINY["semantic_size"]]
    # Nothing at all is added without them, not even the biases.
    assert model.add_hidden_states(semantic_embeds, None) is semantic_embeds


def test_mel_lengths_are_truncated_and_at_least_one():
    counts = torch.tensor([0, 1, 2, 19, 22, 23, 32, 40])
    assert mel_lengths_for(counts, 1.72).tolist() == [1, 1, 3, 32, 37, 39, 55, 68]
    # Counts whose product is whole do not lose a frame to rounding.
    whole = torch.arange(25, 2000, 25)
    assert mel_lengths_for(whole, 1.72).tolist() == [count * 172 // 100 for count in whole.tolist()]


def test_rejects_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"`hidden_size` is 30 but must be a multiple .* \(8\)"):
        tiny_model(hidden_size=30)
    with pytest.raises(ValueError, match="`wavenet_kernel_size` is 4 but must be odd"):
        tiny_model(wavenet_kernel_size=4)
    for mel_std in (0, -3.0, float("nan")):
        with pytest.raises(ValueError, match=f"`mel_std` is {mel_std} but must be above 0"):
            tiny_model(mel_std=mel_std)


def test_normalised_mels_are_of_the_checkpoint(tmp_path):
    mel = 3 * torch.randn(2, 9, 6) - 5
    model = tiny_model(mel_mean=-5.0, mel_std=3.0)
    model.save_pretrained(tmp_path)
    loaded = IndexTTS2SemanticToMelTransformer.from_pretrained(tmp_path)
    assert (loaded.config.mel_mean, loaded.config.mel_std) == (-5.0, 3.0)
    torch.testing.assert_close(loaded.normalize_mel(mel), (mel + 5) / 3)
    torch.testing.assert_close(loaded.denormalize_mel(loaded.normalize_mel(mel)), mel)

    # A folder from before there was such a thing works on log-mels as they are.
    config = json.loads((tmp_path / "config.json").read_text())
    old = {key: value for key, value in config.items() if key not in ("mel_mean", "mel_std")}
    (tmp_path / "config.json").write_text(json.dumps(old))
    loaded = IndexTTS2SemanticToMelTransformer.from_pretrained(tmp_path)
    assert torch.equal(loaded.normalize_mel(mel), mel) and torch.equal(loaded.denormalize_mel(mel), mel)


@pytest.mark.parametrize(
    "name, shape, expected",
    [
        ("sample", (3, 23, 7), (3, 23, 6)),
        ("timestep", (), (3,)),
        ("prompt_mel", (3, 6, 23), (3, 23, 6)),
        ("content_embeds", (3, 20, 12), (3, 23, 12)),
        ("speaker_embeds", (3, 1, 5), (3, 5)),
        ("mel_lengths", (2,), (3,)),
        ("labels", (3, 22, 6), (3, 23, 6)),
        ("loss_mask", (3, 22), (3, 23)),
    ],
)
def test_rejects_wrong_shapes(name, shape, expected):
    inputs = {**random_inputs(), name: torch.ones(shape)}
    with pytest.raises(ValueError) as error:
        tiny_model()(**inputs)
    assert f"`{name}` has shape {shape} but {expected} goes with" in str(error.value)


def test_rejects_hidden_states_of_other_tokens():
    with pytest.raises(ValueError, match=r"\(2, 8\) but `semantic_embeds` has \(2, 7\).*start and stop"):
        tiny_model().add_hidden_states(torch.ones(2, 7, 16), torch.ones(2, 8, 20))
