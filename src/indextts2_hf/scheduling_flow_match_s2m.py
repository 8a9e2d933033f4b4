"""
Flow-matching scheduler of the semantic-to-mel half: a time grid from noise (0) to data (1) and the Euler step along it.

It knows nothing about prompts, guidance or lengths, and imports no model.
"""

import math
from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput


# Outside these bounds the warped times would no longer increase.
MIN_SWAY_COEFFICIENT = -1.0
MAX_SWAY_COEFFICIENT = 2.0 / (math.pi - 2.0)


@dataclass
class IndexTTS2FlowMatchSchedulerOutput(BaseOutput):
    """
    Output of `IndexTTS2FlowMatchScheduler.step`.

    Args:
        prev_sample (`torch.FloatTensor`):
            The sample at the next time of the grid, shape and dtype of the `sample` given. (`prev_sample` is the name
            all diffusers schedulers use; here time runs upwards.)
    """

    prev_sample: torch.FloatTensor


class IndexTTS2FlowMatchScheduler(SchedulerMixin, ConfigMixin):
    r"""
    Euler sampler for a network that predicts the velocity `data - noise` at times from 0 (noise) to 1 (data).

    The default is the released one: uniform steps, 25 of them in the released pipeline. Fewer network calls for
    about the same quality are possible with the sway warp, which puts more of the steps near the noise, alone
    (F5-TTS: `sway_coefficient=-1.0`) or over a non-uniform grid (EPSS: also
    `grid=[t / 32 for t in (0, 2, 4, 6, 8, 16, 24, 32)]`, seven calls).

    Args:
        sway_coefficient (`float`, defaults to 0.0):
            `s` of the warp `t + s * (cos(pi * t / 2) - 1 + t)` applied to every time of the grid. 0 leaves the grid
            as it is, negative values move it towards the noise. Between -1 and 1.75.
        grid (`list[float]`, *optional*):
            Times before the warp, strictly increasing, first 0 and last 1: `n + 1` times make `n` steps. `None`
            spaces the number of steps asked for uniformly.
        default_num_inference_steps (`int`, defaults to 25):
            Steps of a uniform grid when no number is asked for, at least 1.
        init_noise_sigma (`float`, defaults to 1.0):
            Standard deviation of the noise that a pipeline begins with, above 0. The released sampler calls it temperature.
            Below 1 speech sounds cleaner and varies less.

    Raises:
        ValueError: if an argument is outside these bounds.
    """

    _compatibles = []
    order = 1

    @register_to_config
    def __init__(
        self,
        sway_coefficient: float = 0.0,
        grid: list[float] | None = None,
        default_num_inference_steps: int = 25,
        init_noise_sigma: float = 1.0,
    ):
        if not MIN_SWAY_COEFFICIENT <= sway_coefficient <= MAX_SWAY_COEFFICIENT:
            raise ValueError(
                f"`sway_coefficient` is {sway_coefficient} but the times only increase for values from "
                f"{MIN_SWAY_COEFFICIENT} to {MAX_SWAY_COEFFICIENT:.2f}. Use 0.0 for no warp."
            )
        if grid is not None:
            increases = all(earlier < later for earlier, later in zip(grid[:-1], grid[1:], strict=True))
            if len(grid) < 2 or grid[0] != 0.0 or grid[-1] != 1.0 or not increases:
                raise ValueError(
                    f"`grid` is {list(grid)} but must increase strictly from 0.0 (noise) to 1.0 (data), both "
                    "included. Use `grid=None` for uniform steps."
                )
        if default_num_inference_steps < 1:
            raise ValueError(
                f"`default_num_inference_steps` is {default_num_inference_steps} but at least one step is needed."
            )
        if not 0.0 < init_noise_sigma < math.inf:
            raise ValueError(f"`init_noise_sigma` is {init_noise_sigma} but must be a finite number above 0.")
        self.init_noise_sigma = init_noise_sigma
        self.num_inference_steps: int | None = None
        self.timesteps: torch.FloatTensor | None = None
        # All times, the final 1 included. On the CPU, so that a step does not wait for an accelerator.
        self._times: torch.FloatTensor | None = None
        self._step_index: int | None = None
        self._begin_index: int | None = None

    @property
    def step_index(self) -> int | None:
        """Index into `timesteps` of the next step; `None` before the first one."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Index of the first step as set by `set_begin_index`."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Starts the next run at this index of `timesteps`, without looking up the time of the first `step`."""
        self._begin_index = begin_index

    def set_timesteps(self, num_inference_steps: int | None = None, device: str | torch.device | None = None) -> None:
        r"""
        Lays out the time grid and forgets the previous run.

        Args:
            num_inference_steps (`int`, *optional*):
                Steps, at least 1; by default those of the `grid`, with which it must agree, or
                `default_num_inference_steps`.
            device (`str` or `torch.device`, *optional*):
                Where `timesteps` shall be, the CPU by default.

        Raises:
            ValueError: if the number of steps is below 1 or not that of the grid.
        """
        grid = self.config.grid
        if num_inference_steps is None:
            num_inference_steps = self.config.default_num_inference_steps if grid is None else len(grid) - 1
        if num_inference_steps < 1:
            raise ValueError(f"`num_inference_steps` is {num_inference_steps} but at least one step is needed.")
        if grid is not None and num_inference_steps != len(grid) - 1:
            raise ValueError(
                f"`num_inference_steps` is {num_inference_steps} but the `grid` of this scheduler has "
                f"{len(grid) - 1} steps. Leave `num_inference_steps` out, or use a scheduler with `grid=None`."
            )

        if grid is None:
            # Parity: `linspace` in float32. The released pipeline accumulates its steps to exactly these times.
            times = torch.linspace(0.0, 1.0, num_inference_steps + 1, dtype=torch.float32)
        else:
            times = torch.tensor(grid, dtype=torch.float32)
        # The warp is taken in float64 so that its ends stay exactly 0 and 1.
        times = times.double()
        times = times + self.config.sway_coefficient * (torch.cos(0.5 * math.pi * times) - 1.0 + times)

        self._times = times.float()
        self.timesteps = self._times[:-1].to(device)
        self.num_inference_steps = num_inference_steps
        self._step_index = None
        self._begin_index = None

    def scale_model_input(
        self, sample: torch.FloatTensor, timestep: float | torch.FloatTensor | None = None
    ) -> torch.FloatTensor:
        """The `sample` itself: this sampler does not scale the input of the network."""
        return sample

    def index_for_timestep(self, timestep: float | torch.FloatTensor) -> int:
        r"""
        Index of a time in `timesteps`.

        Raises:
            ValueError: if `set_timesteps` was not called, or the time is not one of `timesteps`.
        """
        self._check_timesteps_are_set()
        indices = (self._times[:-1] == float(timestep)).nonzero()
        if len(indices) == 0:
            raise ValueError(
                f"`timestep` is {float(timestep)} but must be one of `scheduler.timesteps`, which are times in [0, 1), "
                "not indices. Loop over `scheduler.timesteps`."
            )
        return int(indices[0])

    def step(
        self,
        model_output: torch.FloatTensor,
        timestep: float | torch.FloatTensor,
        sample: torch.FloatTensor,
        return_dict: bool = True,
    ) -> IndexTTS2FlowMatchSchedulerOutput | tuple[torch.FloatTensor]:
        r"""
        Moves the sample along the velocity to the next time of the grid.

        The first step of a run looks its time up; each further step takes the next interval, whatever `timestep` says.

        Args:
            model_output (`torch.FloatTensor`):
                Velocity `data - noise` at `timestep`, same shape as `sample`.
            timestep (`float` or 0-dimensional `torch.FloatTensor`):
                The element of `timesteps` at which the network was called.
            sample (`torch.FloatTensor`):
                Sample at `timestep`, any shape.
            return_dict (`bool`, defaults to `True`):
                Whether to return an output object or a plain tuple.

        Returns:
            `IndexTTS2FlowMatchSchedulerOutput` or a tuple with its one element. Computed in float32, returned in the
            dtype of `sample`.

        Raises:
            ValueError: if `set_timesteps` was not called, `timestep` is not one of `timesteps`, or the run is over.
        """
        self._check_timesteps_are_set()
        if self._step_index is None:
            self._step_index = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index
        if self._step_index >= self.num_inference_steps:
            raise ValueError(
                f"All {self.num_inference_steps} steps of this run have been taken. Call `set_timesteps` to start "
                "another one."
            )

        step_size = self._times[self._step_index + 1] - self._times[self._step_index]
        prev_sample = (sample.float() + step_size * model_output.float()).to(sample.dtype)
        self._step_index += 1

        if not return_dict:
            return (prev_sample,)
        return IndexTTS2FlowMatchSchedulerOutput(prev_sample=prev_sample)

    def scale_noise(
        self, sample: torch.FloatTensor, timestep: float | torch.FloatTensor, noise: torch.FloatTensor
    ) -> torch.FloatTensor:
        r"""
        Point between noise and data at a time: `(1 - t) * noise + t * sample`.

        This is the network's input in training, where `t` is drawn from [0, 1] for each row; the velocity to predict
        there is `sample - noise`. The time grid plays no part.

        Args:
            sample (`torch.FloatTensor` of shape `(batch_size, ...)`):
                Data.
            timestep (`float` or `torch.FloatTensor` of shape `(batch_size,)` or `()`):
                Time of each row, 0 (noise) to 1 (data).
            noise (`torch.FloatTensor` of shape `(batch_size, ...)`):
                Standard normal noise.

        Returns:
            `torch.FloatTensor` of the shape and dtype of `sample`; computed in float32.
        """
        # Parity: the original keeps 1e-6 of the noise at t = 1, which float32 sums cannot tell from nothing.
        t = torch.as_tensor(timestep, dtype=torch.float32, device=sample.device)
        t = t.reshape(-1, *[1] * (sample.ndim - 1))
        return ((1.0 - t) * noise.float() + t * sample.float()).to(sample.dtype)

    def _check_timesteps_are_set(self) -> None:
        if self._times is None:
            raise ValueError(
                "The scheduler has no time grid yet. Call `set_timesteps(num_inference_steps)` before `step`."
            )
