import math

import pytest
import torch
import torch.nn.functional as F
from conftest import make_speech

from indextts2_hf.feature_extraction_indextts2 import log_mel
from indextts2_hf.modeling_vocoder import (
    AntiAliasedSnake,
    IndexTTS2Vocoder,
    IndexTTS2VocoderOutput,
    downsample_twice,
    kaiser_sinc_filter,
    make_pulses,
    repeat_beyond_end,
    upsample_twice,
    zero_beyond_end,
)


TINY = {
    "num_mel_bins": 10,
    "initial_channels": 16,
    "upsample_rates": (4, 2),
    "upsample_kernel_sizes": (8, 4),
    "resblock_kernel_sizes": (3, 7),
    "resblock_dilations": ((1, 3), (1, 5)),
    "sampling_rate": 8000,
}


def tiny_vocoder(**kwargs) -> IndexTTS2Vocoder:
    torch.manual_seed(0)
    vocoder = IndexTTS2Vocoder(**{**TINY, **kwargs}).eval()
    with torch.no_grad():
        for name, parameter in vocoder.named_parameters():
            if "log_" in name:
                parameter.normal_(std=0.3)
    return vocoder


@pytest.fixture
def vocoder() -> IndexTTS2Vocoder:
    return tiny_vocoder()


SOURCE = {"use_source": True, "source_hidden_size": 12, "n_fft": 64, "win_length": 48}


def sourced_vocoder() -> IndexTTS2Vocoder:
    vocoder = tiny_vocoder(**SOURCE)
    with torch.no_grad():
        vocoder.conv_out.weight.normal_(std=0.01)  # made as zeros
    return vocoder


@pytest.fixture(params=[tiny_vocoder, sourced_vocoder], ids=["plain", "source"])
def any_vocoder(request) -> IndexTTS2Vocoder:
    return request.param()


@pytest.fixture
def mel() -> torch.Tensor:
    return torch.randn(3, 19, TINY["num_mel_bins"], generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_and_dtypes(any_vocoder, mel, dtype):
    assert any_vocoder.hop_length == 8
    output = any_vocoder.to(dtype)(mel.to(dtype))
    assert isinstance(output, IndexTTS2VocoderOutput)
    assert output.waveform.shape == (3, 19 * 8)
    assert output.waveform.dtype == dtype


def test_tuple_holds_the_same_value(vocoder, mel):
    (waveform,) = vocoder(mel, return_dict=False)
    assert torch.equal(waveform, vocoder(mel).waveform)


def test_the_waveform_is_clipped_not_squashed(vocoder, mel):
    quiet = vocoder(mel).waveform
    peak = quiet.abs().max()
    with torch.no_grad():
        vocoder.conv_out.weight.mul_(2 / peak)
    torch.testing.assert_close(vocoder(mel).waveform, (quiet * 2 / peak).clamp(-1, 1))
    assert vocoder(mel).waveform.abs().max() == 1


def test_default_is_the_released_size():
    with torch.device("meta"):
        vocoder = IndexTTS2Vocoder()
    assert vocoder.hop_length == 256
    assert sum(parameter.numel() for parameter in vocoder.parameters()) == 112_199_472


def test_filter_is_the_published_one():
    taps = kaiser_sinc_filter()
    half = torch.tensor([0.00202896, 0.00938947, -0.02554346, -0.05765738, 0.12857258, 0.4432098])
    torch.testing.assert_close(taps, torch.cat([half, half.flip(0)]), rtol=0, atol=1e-7)
    assert taps.sum().item() == pytest.approx(1, abs=1e-6)


def test_resampling_is_the_filter_on_a_replicate_padded_signal():
    taps = kaiser_sinc_filter()
    signal = torch.randn(2, 3, 17)
    # Zero between the samples, then the low-pass: the definition of upsampling.
    padded = F.pad(signal, (5, 5), mode="replicate").reshape(6, 1, -1)
    stretched = torch.zeros(6, 1, 2 * padded.shape[-1])
    stretched[..., ::2] = padded
    expected = 2 * F.conv1d(stretched, taps[None, None], padding=11)[..., 15:][..., : 2 * 17].view(2, 3, -1)
    torch.testing.assert_close(upsample_twice(signal, taps), expected)

    padded = F.pad(expected, (5, 6), mode="replicate").reshape(6, 1, -1)
    expected_down = F.conv1d(padded, taps[None, None])[..., ::2].view(2, 3, -1)
    torch.testing.assert_close(downsample_twice(expected, taps), expected_down)


def test_resampling_keeps_a_constant():
    taps = kaiser_sinc_filter()
    constant = torch.full((1, 2, 9), 0.7)
    torch.testing.assert_close(upsample_twice(constant, taps), torch.full((1, 2, 18), 0.7), rtol=0, atol=2e-3)
    torch.testing.assert_close(downsample_twice(constant.repeat(1, 1, 2), taps), constant)


def test_activation_is_the_formula_between_the_filters():
    taps = kaiser_sinc_filter()
    activation = AntiAliasedSnake(3)
    with torch.no_grad():
        activation.log_alpha.copy_(torch.tensor([-0.5, 0.0, 0.7]))
        activation.log_beta.copy_(torch.tensor([0.4, 0.0, -0.6]))
    signal = torch.randn(2, 3, 17)
    x = upsample_twice(signal, taps)
    alpha, beta = activation.log_alpha.exp()[:, None], activation.log_beta.exp()[:, None]
    expected = downsample_twice(x + torch.sin(alpha * x) ** 2 / beta, taps)
    torch.testing.assert_close(activation(signal, taps), expected)


def test_activation_has_the_right_gradient():
    # The activation works in place; a wrong saved tensor would show here.
    activation = AntiAliasedSnake(2).double()
    taps = kaiser_sinc_filter().double()
    signal = torch.randn(2, 2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: activation(x, taps), (signal,))
    assert torch.autograd.gradcheck(lambda x: activation(x, taps, torch.tensor([5, 3])), (signal,))


def test_what_stands_beyond_a_row_end():
    rows = torch.arange(10.0).view(2, 1, 5)
    lengths = torch.tensor([5, 2])
    assert zero_beyond_end(rows, lengths).tolist() == [[[0, 1, 2, 3, 4]], [[5, 6, 0, 0, 0]]]
    assert repeat_beyond_end(rows, lengths).tolist() == [[[0, 1, 2, 3, 4]], [[5, 6, 6, 6, 6]]]
    assert zero_beyond_end(rows, None) is rows
    assert repeat_beyond_end(rows, None) is rows


@pytest.mark.parametrize("lengths", [(19, 12, 1), (7, 19, 0), (5, 5, 5)])
def test_a_row_of_a_padded_batch_is_the_row_alone(any_vocoder, mel, lengths):
    for row, length in enumerate(lengths):
        mel[row, length:] = float("nan")
    # Given, because a pulse moves by what float32 leaves open in the pitch that is read.
    pitch = torch.linspace(100, 200, 57).view(3, 19)
    output = any_vocoder(mel, torch.tensor(lengths), pitch=pitch)
    for row, length in enumerate(lengths):
        end = length * any_vocoder.hop_length
        assert output.waveform[row, end:].abs().sum() == 0
        if length:
            alone = any_vocoder(mel[row : row + 1, :length], pitch=pitch[row : row + 1, :length])
            torch.testing.assert_close(output.waveform[row, :end], alone.waveform[0], rtol=0, atol=1e-5)
            if alone.pitch is not None:
                torch.testing.assert_close(output.pitch[row, :length], alone.pitch[0], rtol=1e-6, atol=0)


def test_full_lengths_change_nothing(any_vocoder, mel):
    assert torch.equal(any_vocoder(mel, torch.tensor([19, 19, 19])).waveform, any_vocoder(mel).waveform)


def test_gradients_reach_every_parameter(vocoder, mel):
    vocoder.train()
    vocoder(mel, torch.tensor([19, 12, 4])).waveform.square().sum().backward()
    for name, parameter in vocoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_gradient_checkpointing_gives_the_same_gradients(any_vocoder, mel):
    lengths = torch.tensor([19, 12, 4])
    gradients = []
    for _ in range(2):
        any_vocoder.zero_grad()
        any_vocoder(mel, lengths).waveform.square().sum().backward()
        gradients.append([p.grad.clone() for p in any_vocoder.parameters() if p.grad is not None])
        any_vocoder.enable_gradient_checkpointing()
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_save_and_load(any_vocoder, mel, tmp_path, low_cpu_mem_usage):
    any_vocoder.save_pretrained(tmp_path)
    loaded = IndexTTS2Vocoder.from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not loaded.training
    assert loaded.hop_length == any_vocoder.hop_length
    assert loaded.config.sampling_rate == TINY["sampling_rate"]
    assert loaded.state_dict().keys() == any_vocoder.state_dict().keys()
    for name, tensor in any_vocoder.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert torch.equal(loaded.filter_taps, kaiser_sinc_filter())
    assert torch.equal(loaded(mel).waveform, any_vocoder(mel).waveform)


def test_loading_in_another_dtype_casts_the_filter_too(any_vocoder, mel, tmp_path):
    any_vocoder.save_pretrained(tmp_path)
    loaded = IndexTTS2Vocoder.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert loaded.filter_taps.dtype == torch.bfloat16
    assert loaded(mel.bfloat16()).waveform.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"upsample_rates": (4, 2, 2)}, "`upsample_rates` has 3 stages but `upsample_kernel_sizes` has 2"),
        ({"resblock_dilations": ((1, 3),)}, "`resblock_kernel_sizes` has 2 blocks but `resblock_dilations` has 1"),
        ({"upsample_kernel_sizes": (8, 5)}, "upsampling rate 2 and kernel size 5"),
        ({"upsample_kernel_sizes": (2, 4)}, "upsampling rate 4 and kernel size 2"),
        ({"resblock_kernel_sizes": (3, 4)}, r"`resblock_kernel_sizes` is \(3, 4\) but every size must be odd"),
        ({"initial_channels": 18}, "`initial_channels` is 18, which cannot be halved 2 times"),
    ],
)
def test_impossible_sizes_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        tiny_vocoder(**sizes)


@pytest.mark.parametrize("shape", [(19, 10), (1, 10, 19)])
def test_a_mel_of_another_shape_is_refused(vocoder, shape):
    with pytest.raises(ValueError, match=r"`mel` has shape .* but the vocoder expects .* 10\)"):
        vocoder(torch.zeros(shape))


def test_pulses_are_the_sum_of_all_harmonics():
    pitch = torch.full((1, 20), 130.0)
    pulses = make_pulses(pitch, hop_length=50, sampling_rate=8000)
    phase = 2 * torch.pi * 130.0 * torch.arange(1, 1001, dtype=torch.float64) / 8000
    harmonics = sum((number * phase).cos() for number in range(1, 31))  # 30 * 130 Hz is the last below 4 kHz
    torch.testing.assert_close(pulses[0].double(), harmonics * (2 / 30) ** 0.5, rtol=0, atol=2e-2)
    assert pulses.square().mean() == pytest.approx(1, abs=0.02)


def test_pulses_follow_the_pitch_for_minutes():
    pitch = torch.full((1, 12000), 199.9)  # two minutes
    pulses = make_pulses(pitch, hop_length=160, sampling_rate=16000)
    spectrum = torch.fft.rfft(pulses[0, -160000:] * torch.hann_window(160000)).abs()
    assert spectrum[:3000].argmax() / 10 == pytest.approx(199.9, abs=0.06)


def test_a_draft_has_the_mel_that_was_asked_for():
    vocoder = IndexTTS2Vocoder(
        **{**TINY, "num_mel_bins": 40, "upsample_rates": (5, 5, 4), "upsample_kernel_sizes": (11, 11, 8)},
        **{"use_source": True, "n_fft": 512, "win_length": 400},
    ).eval()
    settings = {"sampling_rate": 8000, "num_mel_bins": 40, "n_fft": 512, "win_length": 400, "hop_length": 100}
    speech = torch.from_numpy(make_speech(1.0, 8000))
    wanted = log_mel(speech, **settings)
    output = vocoder(wanted[None], pitch=torch.full((1, 80), 120.0))
    found = log_mel(output.waveform[0], **settings)
    loud = wanted > wanted.max() - 5
    assert (found - wanted)[loud].abs().mean() < 0.35 < (wanted - wanted.mean(dim=0))[loud].abs().mean()
    assert output.pitch.shape == (1, 80) and ((output.pitch >= 60) & (output.pitch <= 600)).all()


def test_gradients_reach_every_parameter_of_a_source(mel):
    vocoder = sourced_vocoder().train()
    output = vocoder(mel - 6, torch.tensor([19, 12, 4]))
    (output.waveform.square().sum() + output.pitch.log().sum() + output.periodicity.sum()).backward()
    for name, parameter in vocoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_a_new_vocoder_with_a_source_gives_the_draft(mel):
    vocoder = tiny_vocoder(**SOURCE)
    mel -= 8  # quiet enough not to be clipped
    draft, pitch, logits, periodicity = vocoder.source(mel.transpose(1, 2).contiguous())
    output = vocoder(mel)
    assert torch.equal(output.waveform, draft) and draft.abs().max() > 1e-3
    for found, wanted in zip(vocoder(mel, return_dict=False)[1:], (pitch, logits, periodicity), strict=True):
        assert torch.equal(found, wanted)
    assert torch.equal(output.pitch, pitch) and torch.equal(output.periodicity, periodicity)
    assert torch.equal(output.pitch_logits, logits) and logits.shape == (3, 19, 64)
    octaves = logits.softmax(dim=-1) @ torch.linspace(0, 1, 64) * math.log2(600 / 60)
    torch.testing.assert_close(pitch, 60 * octaves.exp2())


def test_periodicity_is_that_of_each_band():
    source = IndexTTS2Vocoder(
        **{**TINY, "num_mel_bins": 40, "upsample_rates": (5, 5, 4), "upsample_kernel_sizes": (11, 11, 8)},
        **{"use_source": True, "n_fft": 512, "win_length": 400},
    ).source
    pitch = torch.linspace(110, 140, 80)[None]
    pulses = make_pulses(pitch, hop_length=100, sampling_rate=8000)
    noise = torch.randn(pulses.shape, generator=torch.Generator().manual_seed(0))
    inside = slice(3, -3)  # where no window reaches beyond the ends
    assert source.measure_periodicity(pulses, pitch)[:, inside].min() > 0.9
    assert source.measure_periodicity(noise, pitch)[:, inside].mean() < 0.15
    # Of another pitch than its own a voice is not periodic, but in the lowest band, where it is one slow sine.
    assert source.measure_periodicity(pulses, 1.45 * pitch)[:, inside, 2:].mean() < 0.3
    # Pulses below, noise above.
    spectrum = torch.fft.rfft(noise)
    spectrum[:, : spectrum.shape[1] // 4] = torch.fft.rfft(pulses)[:, : spectrum.shape[1] // 4]
    mixed = source.measure_periodicity(torch.fft.irfft(spectrum), pitch)[:, inside].mean(dim=(0, 1))
    assert mixed[0] > 0.9 and mixed[-1] < 0.2
