import pytest
import torch
import torch.nn.functional as F

from indextts2_hf.modeling_semantic_codec import IndexTTS2SemanticCodec, IndexTTS2SemanticCodecOutput


TINY = {
    "feature_size": 12,
    "codebook_size": 32,
    "codebook_dim": 4,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_layers": 2,
}


@pytest.fixture
def codec() -> IndexTTS2SemanticCodec:
    torch.manual_seed(0)
    return IndexTTS2SemanticCodec(**TINY).eval()


@pytest.fixture
def features() -> torch.Tensor:
    return torch.randn(3, 21, TINY["feature_size"], generator=torch.Generator().manual_seed(1))


@pytest.fixture
def mask() -> torch.Tensor:
    return (torch.arange(21) < torch.tensor([[21], [13], [4]])).long()


def test_shapes(codec, features):
    output = codec(features)
    assert isinstance(output, IndexTTS2SemanticCodecOutput)
    assert output.semantic_ids.shape == (3, 21)
    assert output.semantic_ids.dtype == torch.long
    assert output.semantic_embeds.shape == features.shape
    assert output.reconstruction.shape == features.shape
    assert output.latents.shape == (3, 21, TINY["codebook_dim"])
    assert output.loss.shape == ()
    assert codec.embed(output.semantic_ids).shape == features.shape
    assert codec.decode(output.semantic_ids).shape == features.shape
    encoded = codec.encode(features)
    assert encoded.reconstruction is None and encoded.latents is None and encoded.loss is None


def test_tuples_hold_the_same_values(codec, features):
    for method in (codec.encode, codec):
        for value, expected in zip(method(features, return_dict=False), method(features).to_tuple(), strict=True):
            torch.testing.assert_close(value, expected)


def test_encode_is_embed_of_the_ids_and_forward_adds_decode(codec, features):
    encoded, output = codec.encode(features), codec(features)
    assert torch.equal(encoded.semantic_ids, output.semantic_ids)
    torch.testing.assert_close(encoded.semantic_embeds, codec.embed(encoded.semantic_ids), rtol=0, atol=0)
    torch.testing.assert_close(output.semantic_embeds, encoded.semantic_embeds)
    torch.testing.assert_close(output.reconstruction, codec.decode(encoded.semantic_ids))


def test_ids_are_the_rows_of_the_largest_cosine(codec):
    latents = torch.randn(2, 50, TINY["codebook_dim"])
    rows = codec.quantizer.codebook.weight
    cosine = F.cosine_similarity(latents[:, :, None], rows, dim=-1)
    assert torch.equal(codec.quantizer.nearest(latents), cosine.argmax(dim=-1))


def test_equal_rows_give_the_first_id(codec):
    with torch.no_grad():
        codec.quantizer.codebook.weight[9] = codec.quantizer.codebook.weight[5]
    latents = codec.quantizer.codebook.weight[[5, 9]][None]
    assert codec.quantizer.nearest(latents).tolist() == [[5, 5]]


def test_the_length_of_a_latent_does_not_matter_but_that_of_a_row_does(codec):
    latents = torch.randn(1, 30, TINY["codebook_dim"])
    assert torch.equal(codec.quantizer.nearest(latents), codec.quantizer.nearest(7 * latents))
    ids = torch.arange(5)[None]
    bias = codec.quantizer.project_out.bias
    before = codec.embed(ids) - bias
    with torch.no_grad():
        codec.quantizer.codebook.weight.mul_(2)
    torch.testing.assert_close(codec.embed(ids) - bias, 2 * before)


def test_half_precision_weights_do_not_confuse_neighbours(codec):
    codec.to(torch.bfloat16)
    rows = codec.quantizer.codebook.weight
    assert torch.equal(codec.quantizer.nearest(rows[None]), torch.arange(TINY["codebook_size"])[None])


def test_autocast_does_not_confuse_neighbours(codec):
    latents = torch.randn(4, 500, TINY["codebook_dim"])
    expected = codec.quantizer.nearest(latents)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codec.quantizer.nearest(latents), expected)


def test_an_output_is_built_anew_from_a_dictionary(codec, features):
    # As Accelerate does under mixed precision.
    output = codec(features)
    again = type(output)(dict(output))
    assert again.loss is output.loss and again.latents is output.latents


def test_normalize_uses_the_statistics(codec):
    hidden_states = torch.randn(2, 400, TINY["feature_size"]) * 3 + 5
    torch.testing.assert_close(codec.normalize(hidden_states), hidden_states)
    codec.feature_mean.copy_(hidden_states.mean(dim=(0, 1)))
    codec.feature_variance.copy_(hidden_states.var(dim=(0, 1)))
    normal = codec.normalize(hidden_states)
    torch.testing.assert_close(normal.mean(dim=(0, 1)), torch.zeros(TINY["feature_size"]), rtol=0, atol=1e-5)
    torch.testing.assert_close(normal.std(dim=(0, 1)), torch.ones(TINY["feature_size"]))


def test_a_row_of_a_padded_batch_is_the_row_alone(codec, features, mask):
    features[mask == 0] = 1e3
    encoded, output = codec.encode(features, mask), codec(features, mask)
    decoded = codec.decode(encoded.semantic_ids, mask)
    for row, length in enumerate(mask.sum(dim=1).tolist()):
        alone = codec(features[row : row + 1, :length])
        assert torch.equal(encoded.semantic_ids[row, :length], alone.semantic_ids[0])
        for batch in (encoded.semantic_embeds, output.semantic_embeds):
            torch.testing.assert_close(batch[row, :length], alone.semantic_embeds[0], rtol=0, atol=1e-5)
        for batch in (decoded, output.reconstruction):
            torch.testing.assert_close(batch[row, :length], alone.reconstruction[0], rtol=0, atol=1e-5)
    for padded in (encoded.semantic_embeds, output.semantic_embeds, output.reconstruction, decoded):
        assert padded[mask == 0].abs().max() == 0


def test_the_loss_is_the_mean_over_rows_of_the_mean_over_real_frames(codec, features, mask):
    losses = [codec(features[row : row + 1, :n]).loss for row, n in enumerate(mask.sum(dim=1).tolist())]
    torch.testing.assert_close(codec(features, mask).loss, sum(losses) / len(losses))
    torch.testing.assert_close(codec(features, torch.ones_like(mask)).loss, codec(features).loss)


def test_gradients_reach_every_parameter(codec, features, mask):
    codec.train()
    codec(features, mask).loss.backward()
    for name, parameter in codec.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_gradient_checkpointing_changes_nothing(codec, features, mask):
    gradients = []
    for _ in range(2):
        codec.train().zero_grad()
        codec(features, mask).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in codec.named_parameters()})
        codec.enable_gradient_checkpointing()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_the_latents_are_what_the_ids_were_chosen_for(codec, features):
    output = codec(features)
    assert torch.equal(codec.quantizer.nearest(output.latents), output.semantic_ids)


def test_the_gradient_of_the_reconstruction_passes_the_quantiser(codec, features):
    # Straight-through: the encoder learns from the reconstruction, the codebook only from its own term of the loss.
    codec(features).reconstruction.sum().backward()
    assert codec.encoder.conv_in.weight.grad.abs().sum() > 0
    assert codec.quantizer.codebook.weight.grad is None


def test_training_learns_features_that_repeat(codec):
    # Eight kinds of frames and 32 codes: a codec that learns leaves little of the variance, which is 1, unexplained.
    features = torch.randn(8, TINY["feature_size"])[torch.randint(8, (4, 40))]
    codec.train()
    optimizer = torch.optim.Adam(codec.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        codec(features).loss.backward()
        optimizer.step()
    assert F.mse_loss(codec(features).reconstruction, features) < 0.4


def test_save_and_load(codec, features, tmp_path):
    codec.feature_mean.copy_(torch.randn(TINY["feature_size"]))
    codec.feature_variance.copy_(torch.rand(TINY["feature_size"]) + 0.5)
    codec.save_pretrained(tmp_path)
    loaded = IndexTTS2SemanticCodec.from_pretrained(tmp_path)
    assert not loaded.training
    assert {name: loaded.config[name] for name in TINY} == TINY
    assert loaded.state_dict().keys() == codec.state_dict().keys()
    for name, tensor in codec.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert torch.equal(
        loaded(loaded.normalize(features)).reconstruction, codec(codec.normalize(features)).reconstruction
    )


def test_offloading_sees_every_method(codec, features):
    hooks = pytest.importorskip("accelerate.hooks")
    calls = []

    class Recorder(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(module)
            return args, kwargs

    hooks.add_hook_to_module(codec, Recorder())
    ids = codec.encode(features).semantic_ids
    for call in (lambda: codec.normalize(features), lambda: codec.embed(ids), lambda: codec.decode(ids)):
        calls.clear()
        call()
        assert calls


@pytest.mark.parametrize("shape", [(21, 12), (3, 12, 21)])
def test_features_of_another_shape_are_refused(codec, shape):
    for method in (codec.encode, codec):
        with pytest.raises(ValueError, match=r"`semantic_features` has shape .* but the codec expects .* 12\)"):
            method(torch.zeros(shape))
