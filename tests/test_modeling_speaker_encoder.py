import pytest
import torch

from indextts2_hf.modeling_speaker_encoder import (
    CONTEXT_WINDOW,
    ContextAwareMasking,
    IndexTTS2SpeakerEncoder,
    IndexTTS2SpeakerEncoderOutput,
)


TINY = {
    "num_mel_bins": 16,
    "embed_dim": 10,
    "growth_rate": 4,
    "bottleneck_factor": 2,
    "initial_channels": 8,
    "block_layers": (2, 3, 1),
}


@pytest.fixture
def encoder() -> IndexTTS2SpeakerEncoder:
    torch.manual_seed(0)
    encoder = IndexTTS2SpeakerEncoder(**TINY)
    # Two steps of training, so that the running statistics are not those of the constructor.
    for _ in range(2):
        encoder(torch.randn(4, 60, TINY["num_mel_bins"]))
    return encoder.eval()


@pytest.fixture
def fbank() -> torch.Tensor:
    return torch.randn(3, 237, TINY["num_mel_bins"], generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_and_dtypes(encoder, fbank, dtype):
    output = encoder.to(dtype)(fbank.to(dtype))
    assert isinstance(output, IndexTTS2SpeakerEncoderOutput)
    assert output.speaker_embeds.shape == (3, TINY["embed_dim"])
    assert output.speaker_embeds.dtype == dtype
    assert torch.isfinite(output.speaker_embeds).all()


def test_tuple_holds_the_same_value(encoder, fbank):
    (speaker_embeds,) = encoder(fbank, return_dict=False)
    assert torch.equal(speaker_embeds, encoder(fbank).speaker_embeds)


@pytest.mark.parametrize("num_frames", [3, 4, 199, 200, 201, 237])
def test_a_batch_of_equal_lengths_is_its_clips_one_by_one(encoder, fbank, num_frames):
    fbank = fbank[:, :num_frames]
    alone = torch.cat([encoder(clip[None]).speaker_embeds for clip in fbank])
    torch.testing.assert_close(encoder(fbank).speaker_embeds, alone, rtol=0, atol=1e-5)
    assert torch.isfinite(alone).all()


def test_the_context_is_the_mean_of_the_clip_and_of_each_window():
    torch.manual_seed(0)
    layer = ContextAwareMasking(6, 4, dilation=2)
    hidden_states = torch.randn(2, 6, 2 * CONTEXT_WINDOW + 31)
    windows = hidden_states.split(CONTEXT_WINDOW, dim=-1)
    local = torch.cat([window.mean(dim=-1, keepdim=True).expand_as(window) for window in windows], dim=-1)
    context = hidden_states.mean(dim=-1, keepdim=True) + local
    gate = layer.gate_out(layer.gate_in(context).relu()).sigmoid()
    torch.testing.assert_close(layer(hidden_states), layer.conv(hidden_states) * gate)


def test_depth_is_configuration(fbank):
    shallow = IndexTTS2SpeakerEncoder(**{**TINY, "block_layers": (1, 1, 1)})
    assert [len(block.layers) for block in shallow.blocks] == [1, 1, 1]
    assert shallow(fbank).speaker_embeds.shape == (3, TINY["embed_dim"])


def test_default_is_the_released_size():
    with torch.device("meta"):
        encoder = IndexTTS2SpeakerEncoder()
    assert [len(block.layers) for block in encoder.blocks] == [12, 24, 16]
    assert [block.out_channels for block in encoder.blocks] == [256, 512, 512]
    assert len(encoder.state_dict()) == 937


def test_gradients_reach_every_parameter(fbank):
    torch.manual_seed(0)
    encoder = IndexTTS2SpeakerEncoder(**TINY).train()
    encoder(fbank).speaker_embeds.pow(3).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_save_and_load(encoder, fbank, tmp_path):
    encoder.save_pretrained(tmp_path)
    loaded = IndexTTS2SpeakerEncoder.from_pretrained(tmp_path)
    assert not loaded.training
    assert tuple(loaded.config.block_layers) == TINY["block_layers"]
    assert loaded.state_dict().keys() == encoder.state_dict().keys()
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert torch.equal(loaded(fbank).speaker_embeds, encoder(fbank).speaker_embeds)


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="`num_mel_bins` is 20 but the head joins 8 bands"):
        IndexTTS2SpeakerEncoder(num_mel_bins=20)
    with pytest.raises(ValueError, match="`block_layers` has 2 entries but the network has 3 blocks"):
        IndexTTS2SpeakerEncoder(block_layers=(1, 2))


@pytest.mark.parametrize("shape", [(50, 16), (1, 16, 50)])
def test_a_filter_bank_of_another_shape_is_refused(encoder, shape):
    with pytest.raises(ValueError, match=r"`fbank` has shape .* but the speaker encoder expects .* 16\)"):
        encoder(torch.zeros(shape))


def test_a_clip_without_a_deviation_is_refused(encoder):
    with pytest.raises(ValueError, match="`fbank` has 2 frames but the speaker encoder needs at least 3"):
        encoder(torch.zeros(1, 2, TINY["num_mel_bins"]))
