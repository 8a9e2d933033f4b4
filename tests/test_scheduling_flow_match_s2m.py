import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from indextts2_hf.scheduling_flow_match_s2m import IndexTTS2FlowMatchScheduler


EPSS_GRID = [t / 32 for t in (0, 2, 4, 6, 8, 16, 24, 32)]


def velocity_at(sample: torch.Tensor, t: float) -> torch.Tensor:
    """A made-up velocity field, mild enough that it does not magnify rounding."""
    return math.cos(4.0 * t) - torch.sin(sample)


def run(scheduler: IndexTTS2FlowMatchScheduler, sample: torch.Tensor) -> torch.Tensor:
    for t in scheduler.timesteps:
        sample = scheduler.step(velocity_at(sample, float(t)), t, sample).prev_sample
    return sample


@pytest.mark.parametrize("num_steps", [1, 2, 10, 25])
def test_default_grid_is_uniform_from_noise_to_data(num_steps):
    scheduler = IndexTTS2FlowMatchScheduler()
    scheduler.set_timesteps(num_steps)
    assert scheduler.timesteps.dtype == torch.float32
    assert scheduler.num_inference_steps == len(scheduler.timesteps) == num_steps
    torch.testing.assert_close(scheduler.timesteps, torch.linspace(0, 1, num_steps + 1)[:-1], rtol=0, atol=0)


@pytest.mark.parametrize("num_steps", [1, 7, 25])
def test_equals_the_stock_euler_scheduler_on_explicit_sigmas(num_steps):
    stock = FlowMatchEulerDiscreteScheduler(shift=1.0, invert_sigmas=True)
    stock.set_timesteps(sigmas=list(1.0 - np.linspace(0.0, 1.0, num_steps + 1)[:-1]))
    ours = IndexTTS2FlowMatchScheduler()
    ours.set_timesteps(num_steps)
    torch.testing.assert_close(ours.timesteps, stock.timesteps / 1000, rtol=0, atol=1e-6)

    noise = torch.randn(2, 11, 4, generator=torch.Generator().manual_seed(0))
    expected = noise
    for t in stock.timesteps:
        expected = stock.step(velocity_at(expected, float(t) / 1000), t, expected).prev_sample
    assert (run(ours, noise) - expected).abs().max() < 1e-6


def test_constant_velocity_ends_at_the_data():
    data, noise = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    for scheduler in (IndexTTS2FlowMatchScheduler(), IndexTTS2FlowMatchScheduler(-1.0, EPSS_GRID)):
        scheduler.set_timesteps(7)
        sample = noise
        for t in scheduler.timesteps:
            torch.testing.assert_close(sample, scheduler.scale_noise(data, t, noise))
            sample = scheduler.step(data - noise, t, sample).prev_sample
        torch.testing.assert_close(sample, data)


@pytest.mark.parametrize("sway", [-1.0, -0.4, 0.5, 1.7])
@pytest.mark.parametrize("grid", [None, EPSS_GRID])
def test_sway_warp(sway, grid):
    scheduler = IndexTTS2FlowMatchScheduler(sway_coefficient=sway, grid=grid)
    scheduler.set_timesteps(7)
    times = [step / 7 for step in range(7)] if grid is None else grid[:-1]
    expected = [t + sway * (math.cos(math.pi * t / 2) - 1 + t) for t in times]
    torch.testing.assert_close(scheduler.timesteps, torch.tensor(expected), rtol=0, atol=1e-6)

    all_times = scheduler._times
    assert all_times[0] == 0.0 and all_times[-1] == 1.0 and (all_times.diff() > 0).all()


def test_explicit_grid_gives_the_number_of_steps():
    scheduler = IndexTTS2FlowMatchScheduler(grid=EPSS_GRID)
    scheduler.set_timesteps()
    assert scheduler.num_inference_steps == 7
    assert scheduler.timesteps.tolist() == EPSS_GRID[:-1]
    scheduler.set_timesteps(7)
    assert scheduler.timesteps.tolist() == EPSS_GRID[:-1]


def test_scale_noise_takes_a_time_for_each_row():
    generator = torch.Generator().manual_seed(0)
    data, noise = torch.randn(2, 3, 5, 4, generator=generator)
    mixed = IndexTTS2FlowMatchScheduler().scale_noise(data, torch.tensor([0.0, 1.0, 0.25]), noise)
    torch.testing.assert_close(mixed[0], noise[0])
    torch.testing.assert_close(mixed[1], data[1])
    torch.testing.assert_close(mixed[2], 0.75 * noise[2] + 0.25 * data[2])
    torch.testing.assert_close(IndexTTS2FlowMatchScheduler().scale_noise(data, 0.5, noise), 0.5 * (data + noise))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_computes_in_float32_and_keeps_the_dtype(dtype):
    generator = torch.Generator().manual_seed(0)
    sample, velocity = torch.randn(2, 3, 5, 4, generator=generator).to(dtype)
    scheduler = IndexTTS2FlowMatchScheduler()
    scheduler.set_timesteps(25)
    moved = scheduler.step(velocity, scheduler.timesteps[0], sample).prev_sample
    assert moved.dtype == dtype and moved.shape == sample.shape
    assert torch.equal(moved, (sample.float() + scheduler.timesteps[1] * velocity.float()).to(dtype))
    mixed = scheduler.scale_noise(sample, 0.3, velocity)
    assert mixed.dtype == dtype
    torch.testing.assert_close(mixed, (0.7 * velocity.float() + 0.3 * sample.float()).to(dtype))


def test_tuple_output_equals_the_output_object():
    sample = torch.ones(1, 2, 3)
    results = []
    for return_dict in (True, False):
        scheduler = IndexTTS2FlowMatchScheduler()
        scheduler.set_timesteps(4)
        results.append(scheduler.step(sample, scheduler.timesteps[0], sample, return_dict=return_dict)[0])
    assert torch.equal(*results)


def test_starts_in_the_middle_by_time_or_by_index():
    sample = torch.ones(1, 2, 3)
    scheduler = IndexTTS2FlowMatchScheduler(sway_coefficient=-1.0)
    scheduler.set_timesteps(4)
    assert scheduler.step_index is None and scheduler.begin_index is None
    by_time = scheduler.step(sample, scheduler.timesteps[2], sample).prev_sample
    assert scheduler.step_index == 3

    scheduler.set_timesteps(4)
    scheduler.set_begin_index(2)
    by_index = scheduler.step(sample, scheduler.timesteps[2], sample).prev_sample
    assert scheduler.begin_index == 2
    torch.testing.assert_close(by_time, 1.0 + (scheduler.timesteps[3] - scheduler.timesteps[2]) * sample)
    assert torch.equal(by_time, by_index)


def test_a_second_run_equals_the_first():
    noise = torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(0))
    scheduler = IndexTTS2FlowMatchScheduler()
    results = []
    for _ in range(2):
        scheduler.set_timesteps(5)
        results.append(run(scheduler, noise))
    assert torch.equal(*results)


def test_input_of_the_network_is_not_scaled():
    sample = torch.ones(1, 2, 3)
    scheduler = IndexTTS2FlowMatchScheduler()
    assert scheduler.scale_model_input(sample, 0.5) is sample
    assert scheduler.init_noise_sigma == 1.0 and scheduler.order == 1


def test_save_load_and_from_config(tmp_path):
    scheduler = IndexTTS2FlowMatchScheduler(sway_coefficient=-0.8, grid=tuple(EPSS_GRID))
    scheduler.save_pretrained(tmp_path)
    for copy in (
        IndexTTS2FlowMatchScheduler.from_pretrained(tmp_path),
        IndexTTS2FlowMatchScheduler.from_config(scheduler.config),
    ):
        assert copy.config.sway_coefficient == -0.8 and list(copy.config.grid) == EPSS_GRID
        copy.set_timesteps()
        scheduler.set_timesteps()
        assert torch.equal(copy.timesteps, scheduler.timesteps)


@pytest.mark.parametrize("sway", [-1.1, 1.8])
def test_rejects_a_sway_that_turns_time_back(sway):
    with pytest.raises(ValueError, match=rf"`sway_coefficient` is {sway} but .* from -1.0 to 1.75"):
        IndexTTS2FlowMatchScheduler(sway_coefficient=sway)


@pytest.mark.parametrize("grid", [[], [0.0], [0.1, 1.0], [0.0, 0.9], [0.0, 0.5, 0.5, 1.0], [0.0, 0.6, 0.3, 1.0]])
def test_rejects_a_grid_that_does_not_go_from_noise_to_data(grid):
    with pytest.raises(ValueError, match="`grid` is .* must increase strictly from 0.0"):
        IndexTTS2FlowMatchScheduler(grid=grid)


def test_a_checkpoint_says_how_many_steps_it_needs(tmp_path):
    scheduler = IndexTTS2FlowMatchScheduler()
    scheduler.set_timesteps()
    assert len(scheduler.timesteps) == 25
    IndexTTS2FlowMatchScheduler(default_num_inference_steps=8, init_noise_sigma=0.6).save_pretrained(tmp_path)
    scheduler = IndexTTS2FlowMatchScheduler.from_pretrained(tmp_path)
    assert scheduler.init_noise_sigma == 0.6
    scheduler.set_timesteps()
    assert len(scheduler.timesteps) == 8
    scheduler.set_timesteps(3)
    assert len(scheduler.timesteps) == 3


def test_rejects_bad_numbers_of_steps():
    with pytest.raises(ValueError, match="`default_num_inference_steps` is 0 but at least one"):
        IndexTTS2FlowMatchScheduler(default_num_inference_steps=0)
    with pytest.raises(ValueError, match="`init_noise_sigma` is 0.0 but must be"):
        IndexTTS2FlowMatchScheduler(init_noise_sigma=0.0)
    with pytest.raises(ValueError, match="`num_inference_steps` is 0 but at least one"):
        IndexTTS2FlowMatchScheduler().set_timesteps(0)
    with pytest.raises(ValueError, match="`num_inference_steps` is 25 but the `grid` of this scheduler has 7 steps"):
        IndexTTS2FlowMatchScheduler(grid=EPSS_GRID).set_timesteps(25)


def test_rejects_steps_that_are_not_on_the_grid():
    sample = torch.ones(1, 2, 3)
    scheduler = IndexTTS2FlowMatchScheduler()
    with pytest.raises(ValueError, match="Call `set_timesteps"):
        scheduler.step(sample, 0.0, sample)
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match="`timestep` is 1.0 but must be one of `scheduler.timesteps`"):
        scheduler.step(sample, 1, sample)
    run(scheduler, sample)
    with pytest.raises(ValueError, match="All 2 steps of this run have been taken"):
        scheduler.step(sample, 0.5, sample)
