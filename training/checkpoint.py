"""
The checkpoint side of a run folder: parts read with a check, written whole, and what must change with them.

Whatever happens to a run, each file of its folder is the old or the new one, never half of it.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from indextts2_hf import IndexTTS2Config, IndexTTS2ForTextToWaveform, IndexTTS2SemanticCodec, VoicePrompt
from indextts2_hf.configuration_indextts2 import resolve_checkpoint
from indextts2_hf.modeling_indextts2 import check_weights, read_weight_shapes


PART_NAMES = ("t2s", "s2m", "scheduler", "semantic_encoder", "semantic_codec", "speaker_encoder", "vocoder")
OTHER_FOLDERS = ("feature_extractor", "emotion_text", "tokenizer", "voices")
# Written by a run beside the checkpoint; not part of it.
OWN_FILES = ("README.md", "log.jsonl", "run.json")
# In a saved state, where the weights of a frozen base are left out.
TRAINED_WEIGHTS_NAME = "trained.safetensors"
# What a saved voice depends on: when one of these is trained, the voices are made anew.
PARTS_OF_A_VOICE = {"semantic_encoder", "semantic_codec", "speaker_encoder", "s2m"}

Part = TypeVar("Part", bound=nn.Module)


def find_checkpoint(name: str) -> Path:
    """
    The folder `name`, that of the checkpoint of the package for `"tiny"`, or that of a repository on the Hub.

    Raises:
        ValueError: it is neither, or no checkpoint.
    """
    folder = Path(resolve_checkpoint(name))
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(name))
        except (ValueError, OSError) as error:
            raise ValueError(f"--model {name} is neither a folder here nor a repository: {error}") from error
    if not (folder / "config.json").is_file():
        raise ValueError(f"--model {folder} is no checkpoint: it has no config.json. Download, convert or make one.")
    return folder


def load_part(
    part_class: type[Part], checkpoint: Path, name: str, dtype: torch.dtype = torch.float32, **settings: Any
) -> Part:
    """
    A part of a checkpoint folder, in float32 as it is trained; `settings` go over those of its `config.json`.

    Raises:
        ValueError: the weights are damaged or do not fit the `config.json` beside them.
    """
    shapes = read_weight_shapes(str(checkpoint / name))
    if issubclass(part_class, PreTrainedModel):
        # Settings given to the model would land in its generation config too.
        config = part_class.config_class.from_pretrained(checkpoint, subfolder=name, **settings)
        # Of weights that do not fit, `check_weights` says more.
        settings = {"config": config, "ignore_mismatched_sizes": True}
    try:
        part = part_class.from_pretrained(checkpoint, subfolder=name, dtype=dtype, **settings)
    except RuntimeError as error:
        raise ValueError(f"{checkpoint / name} cannot be loaded: {error}") from error
    check_weights(part, str(checkpoint / name), shapes)
    return part


def copy_checkpoint(base: Path, folder: Path) -> None:
    """Everything of the checkpoint `base`, and nothing of the run that may have made it."""
    files = [path for path in base.iterdir() if path.is_file() and path.name not in OWN_FILES]
    for name in PART_NAMES + OTHER_FOLDERS:
        files += [path for path in (base / name).rglob("*") if path.is_file()]
    for path in files:
        target = folder / path.relative_to(base)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.tmp")
        shutil.copyfile(path, temporary)
        os.replace(temporary, target)


def write_part(
    folder: Path,
    name: str,
    part: nn.Module | Callable[[Path], None],
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """
    One part of a checkpoint folder.

    Args:
        folder (`Path`): the checkpoint.
        name (`str`): folder of the part; `"."` for the checkpoint's own, where an adapter is written.
        part (`nn.Module` or `Callable`):
            A model, or a function that writes into the folder it is given: for what is not saved as it is trained.
        weights (`dict[str, torch.Tensor]`, *optional*): of the model, where they are not in it.

    Raises:
        OSError: it could not be written.
    """
    temporary = folder / f".{name}.tmp"
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        if not isinstance(part, nn.Module):
            part(temporary)
        elif isinstance(part, PreTrainedModel):
            part.save_pretrained(temporary, state_dict=weights)
        else:
            part.save_config(temporary)
            tensors = {key: tensor.cpu().contiguous() for key, tensor in (weights or part.state_dict()).items()}
            save_file(tensors, temporary / SAFETENSORS_WEIGHTS_NAME, {"format": "pt"})
        (folder / name).mkdir(exist_ok=True)
        # Weights are written readable to their owner alone; here whoever may read the folder may read them.
        mode = temporary.stat().st_mode & 0o666
        for path in sorted(temporary.iterdir()):
            path.chmod(mode)
            os.replace(path, folder / name / path.name)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise OSError(
            f"{folder / name} could not be written: {error}. The files that were there are whole; make room, then --resume."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_trained_weights_alone(accelerator: Accelerator, base: str) -> None:
    """
    Leaves the frozen weights of the model that is prepared out of saved states: they are where they were. `base` tells them from
    others; a state is read with the same alone.
    """

    def save(models: list[nn.Module], weights: list[dict], folder: str) -> None:
        weights.clear()
        if accelerator.is_main_process:
            parameters = accelerator.unwrap_model(models[0]).named_parameters()
            trained = {name: parameter.detach().cpu() for name, parameter in parameters if parameter.requires_grad}
            save_file(trained, Path(folder) / TRAINED_WEIGHTS_NAME, {"base": base})

    def load(models: list[nn.Module], folder: str) -> None:
        path = Path(folder) / TRAINED_WEIGHTS_NAME
        with safe_open(path, framework="pt") as file:
            found = file.metadata()["base"]
        if found != base:
            raise ValueError(
                f"The run was begun on a base with the weights {found}, but the one given now has {base}. Resume with the base that it "
                "was begun with."
            )
        accelerator.unwrap_model(models.pop()).load_state_dict(load_file(path), strict=False)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def digest_files(files: Iterable[Path]) -> str:
    """Of their sizes and of samples of what they hold: the released speech encoder has two gigabytes, and training moves all."""
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with open(path, "rb") as file:
            for block in range(256):
                file.seek(size * block // 256)
                digest.update(file.read(2**14))
    return digest.hexdigest()[:16]


def digest_weights(checkpoint: Path) -> str:
    """Of the weights of all parts."""
    return digest_files(sorted(path for name in PART_NAMES for path in (checkpoint / name).glob("*.safetensors")))


def link_other_parts(folder: Path, last: Path, parts: Iterable[str]) -> None:
    """Makes `last`, which holds `parts`, a whole checkpoint: everything else is that of `folder`."""
    own = {*parts} | ({"voices"} if PARTS_OF_A_VOICE & {*parts} else set())
    names = [path.name for path in folder.iterdir() if path.is_file() and path.name not in OWN_FILES]
    names += [name for name in PART_NAMES + OTHER_FOLDERS if (folder / name).is_dir()]
    for name in names:
        if name not in own:
            (last / name).unlink(missing_ok=True)
            (last / name).symlink_to(Path("..") / name)


def remake_voices(base: Path, folder: Path, parts: Iterable[str]) -> list[str]:
    """
    Writes the voices of `base` into `folder`, as its parts hear them. What a speech or a speaker encoder hears is in the recordings
    alone: if one of those was trained, the voices are gone.

    Returns:
        `list[str]`: the voices that are gone.
    """
    paths = sorted((base / "voices").glob("*.safetensors"))
    if not paths:
        return []
    if {"semantic_encoder", "speaker_encoder"} & {*parts}:
        config = IndexTTS2Config.from_pretrained(folder)
        config.default_voice = config.default_emotion = None
        (folder / "config.json").unlink()  # where it is a link, what it links to is kept
        config.save_pretrained(folder)
        return [path.stem for path in paths]
    old_codec = load_part(IndexTTS2SemanticCodec, base, "semantic_codec")
    model = IndexTTS2ForTextToWaveform.from_pretrained(folder)
    codec, fingerprint = model.semantic_codec, model.semantic_to_mel.fingerprint
    (folder / "voices").mkdir(exist_ok=True)
    for path in paths:
        voice = VoicePrompt.load(path)
        speaker_features, emotion_features = (
            codec.normalize(features * old_codec.feature_variance.sqrt() + old_codec.feature_mean)
            for features in (voice.speaker_features, voice.emotion_features)
        )
        with torch.no_grad():
            semantic_embeds = codec.encode(speaker_features[None]).semantic_embeds
            num_frames = torch.tensor([len(voice.prompt_mel)])
            content_embeds = model.s2m.regulate_length(semantic_embeds, None, num_frames)[0]
        replace(
            voice,
            speaker_features=speaker_features,
            emotion_features=emotion_features,
            content_embeds=content_embeds,
            checkpoint=fingerprint,
        ).save(folder / "voices" / path.name)
    return []
