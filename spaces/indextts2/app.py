"""
The Space: type, choose a voice, an emotion and a length, hear it, and take the call in Python along.

`build_demo` makes the interface over a pipeline; started as a program, this file loads one and serves it.
"""

import gc
import html
import logging
import os
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import torch

from asking import (
    FREE,
    MAX_CHARACTERS,
    MAX_DESCRIPTION_CHARACTERS,
    MAX_SPEECH_S,
    OWN,
    RECORDING,
    SECONDS,
    SETTINGS,
    TOKENS,
    WEIGHTS,
    WORDS,
    usual_settings,
)
from indextts2_hf import EMOTIONS, EmotionTextModel, IndexTTS2TextToAudioPipeline, set_num_threads
from showing import EXAMPLES, NOTHING, example_path, is_embedded, read_card, show_example, to_data_url, write_facts
from speaking import FEELINGS, LENGTHS, make_compare, make_speak, make_speak_from_page
from templates import (
    DOWNLOADS_TEMPLATE,
    NAMES_SCRIPT,
    PAGE_SCRIPT,
    PLAY_SAMPLE_SCRIPT,
    PLAY_SCRIPT,
    SAMPLE_TEMPLATE,
    SEGMENTS_SCRIPT,
    SEGMENTS_TEMPLATE,
    SHOW_VERSIONS_SCRIPT,
    STATUS_TEMPLATE,
    TAKES_SCRIPT,
    TAKES_TEMPLATE,
    VERSIONS_TEMPLATE,
)


logger = logging.getLogger(__name__)

MAX_UPLOAD = "20mb"
QUEUE_SIZE = 16

# Recordings are deleted when they are an hour old.
DELETE_EVERY_S, DELETE_AFTER_S = 600, 3600

THEME = gr.themes.Base(
    primary_hue="teal",
    secondary_hue="teal",
    neutral_hue="slate",
    radius_size="lg",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
).set(
    body_background_fill="*neutral_50",
    body_background_fill_dark="*neutral_950",
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_300",
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover_dark="*primary_800",
    button_primary_text_color="white",
    block_label_text_color="*neutral_600",
    block_label_text_color_dark="*neutral_300",
    block_title_text_color="*neutral_800",
    block_title_text_color_dark="*neutral_100",
    block_title_text_weight="600",
    block_info_text_color="*neutral_600",
    block_info_text_color_dark="*neutral_300",
)

CONSENT = (
    "**Whose voice is it?** Use your own, or one whose owner has agreed to it and to what you will make it say. Do not pass "
    "off the result as a recording of that person. Recordings are deleted from this server after about an hour."
)
NO_CLONE = "The small checkpoint follows its pitch and colour: a voice of the same kind, not that person's."

# Name, label, least, most and step of the sliders; a checkpoint's own setting is always within reach.
SLIDERS = {
    "temperature": ("Temperature", 0.1, 2.0, 0.05),
    "top_p": ("Top p", 0.05, 1.0, 0.05),
    "top_k": ("Top k", 1, 200, 1),
    "num_beams": ("Beams", 1, 5, 1),
    "text_guidance_scale": ("Guidance by the text, for tokens", 1.0, 4.0, 0.1),
    "num_candidates": ("Candidates, of which the best is spoken", 1, 8, 1),
    "num_inference_steps": ("Flow-matching steps", 1, 50, 1),
    "guidance_scale": ("Guidance, for flow matching", 1.0, 4.0, 0.1),
    "segment_silence_s": ("Pause between segments, in seconds", 0.0, 2.0, 0.05),
}


class Demo(gr.Blocks):
    """
    Takes files that were uploaded here and no others. Gradio itself would fetch addresses, of any size, and refuse other paths
    without a word.
    """

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *args: Any, **kwargs: Any) -> list[Any]:
        for component, value in zip(block_fn.inputs, inputs, strict=False):
            path = value.get("path") if isinstance(value, dict) else None
            if path and not Path(path).resolve().is_relative_to(Path(component.GRADIO_CACHE).resolve()):
                message = f"{html.escape(str(path))!r} was not uploaded here. Upload the recording first."
                raise gr.Error(message, print_exception=False)
        return await super().preprocess_data(block_fn, inputs, *args, **kwargs)


def use_example(pipe: IndexTTS2TextToAudioPipeline, name: str) -> list[Any]:
    """The fields of an example and its sound."""
    example = EXAMPLES[name]
    weights = [example.get(emotion, 0) for emotion in EMOTIONS]
    return [
        *(example["text"], pipe.model.config.default_voice, None, WEIGHTS if any(weights) else OWN, *weights),
        *(SECONDS if "duration_s" in example else FREE, example.get("duration_s", 3.0)),
        *show_example(pipe, name),
    ]


def build_api_fields(pipe: IndexTTS2TextToAudioPipeline) -> list[Any]:
    """What the API takes, in fields that nobody sees: empty ones, so that what is given counts and nothing else."""
    token_rate, usual = pipe.model.t2s.config.semantic_token_rate, usual_settings(pipe)

    def number(name: str, least: float, most: float, step: float = 0.1) -> gr.Number:
        return gr.Number(None, label=name, minimum=least, maximum=most, precision=0 if step == 1 else None)

    return [
        gr.Textbox(label="text"),
        gr.Dropdown(sorted(pipe.model.voices), value=None, label="voice"),
        gr.Audio(label="voice_audio", type="filepath"),
        *(number(name, 0, 1.2) for name in EMOTIONS),
        gr.Audio(label="emotion_audio", type="filepath"),
        gr.Textbox(None, label="emotion_text"),
        number("emotion_strength", 0, 1),
        number("duration_s", 0, MAX_SPEECH_S),
        number("num_semantic_tokens", 1, round(MAX_SPEECH_S * token_rate), 1),
        gr.Textbox(None, label="seed"),
        *(
            number(name, min(SLIDERS[name][1], usual[name]), max(SLIDERS[name][2], usual[name]), SLIDERS[name][3])
            for name in SETTINGS
        ),
    ]


def build_demo(pipe: IndexTTS2TextToAudioPipeline) -> gr.Blocks:
    """The interface over a pipeline. Emotion in words is offered where the pipeline has its `emotion_text_model` already."""
    voices = sorted(pipe.model.voices)
    token_rate = pipe.model.t2s.config.semantic_token_rate
    usual, card = usual_settings(pipe), read_card(pipe)
    card_text = "" if card is None else card.text
    has_words = pipe.emotion_text_model is not None
    no_words = "This checkpoint has no emotion language model, so it cannot take the emotion from words."
    first = next(iter(EXAMPLES))
    at_first = dict(zip([*NOTHING, "status"], show_example(pipe, first), strict=True))
    # Those that its card has figures of.
    presets = [name for name in EMOTIONS if f"emotion-{name}" in card_text] or list(EMOTIONS)
    of_the_page = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}

    demo = Demo(title="IndexTTS2", analytics_enabled=False, delete_cache=(DELETE_EVERY_S, DELETE_AFTER_S))
    with demo:
        gr.Markdown(
            f"# IndexTTS2\nSpeech with the emotion and the length that you choose.\n\n{write_facts(pipe, card)}",
            elem_id="introduction",
        )
        with gr.Row(equal_height=False, elem_id="page"):
            with gr.Column(scale=5, min_width=320, elem_classes="side"):
                with gr.Column(elem_id="ask"):
                    with gr.Row(elem_classes="chips", elem_id="examples"):
                        examples = {name: gr.Button(name, size="sm") for name in EXAMPLES}
                    text = gr.Textbox(
                        EXAMPLES[first]["text"],
                        label="Text",
                        info=f"At most {MAX_CHARACTERS:,} characters. Shift and Enter speaks it.",
                        placeholder="What to say",
                        lines=3,
                        max_lines=12,
                        max_length=MAX_CHARACTERS,
                    )
                    with gr.Row():
                        speak_button = gr.Button("Speak", variant="primary", scale=3, min_width=120)
                        stop_button = gr.Button("Stop", scale=1, min_width=80)
                    with gr.Row(elem_classes="chips", elem_id="comparisons"):
                        lengths_button = gr.Button("In three lengths", size="sm")
                        feelings_button = gr.Button("In three emotions", size="sm")
                    status = gr.HTML(
                        at_first["status"], html_template=STATUS_TEMPLATE, label="Status", elem_id="status"
                    )
                with gr.Column(elem_id="settings"):
                    voice = gr.Dropdown(
                        voices,
                        value=pipe.model.config.default_voice if voices else None,
                        label="Voice",
                        info=None if voices else "This checkpoint brings no voice: give a recording.",
                        interactive=bool(voices),
                    )
                    sample = gr.HTML(None, html_template=SAMPLE_TEMPLATE, elem_id="sample")
                    with gr.Row(elem_classes="chips", elem_id="samples"):
                        samples = {name: gr.Button(f"▶ {name}", size="sm") for name in voices if is_embedded(pipe)}
                    recorder = {"sources": ["upload", "microphone"], "type": "filepath", "elem_classes": "recorder"}
                    voice_audio = gr.Audio(label="Or a recording of a voice", **recorder)
                    if is_embedded(pipe):
                        gr.Markdown(NO_CLONE, elem_classes="note")
                    consent = gr.Markdown(CONSENT, elem_id="consent", visible=False)
                    emotion_from = gr.Radio(
                        [OWN, WEIGHTS, RECORDING, *([WORDS] if has_words else [])],
                        value=OWN,
                        label="Emotion",
                        info=None if has_words else no_words,
                    )
                    with gr.Row(elem_classes="chips", elem_id="presets"):
                        preset_buttons = {name: gr.Button(name.capitalize(), size="sm") for name in presets}
                    emotion_strength = gr.Slider(
                        0, 1, value=1, step=0.05, label="Strength of the emotion", visible=False
                    )
                    with gr.Row(visible=False) as weights_area:
                        weights = [
                            gr.Slider(0, 1.2, value=0, step=0.05, label=name.capitalize(), min_width=180, buttons=[])
                            for name in EMOTIONS
                        ]
                    emotion_audio = gr.Audio(label="A recording of the emotion", visible=False, **recorder)
                    emotion_text = gr.Textbox(
                        label="The emotion in words",
                        placeholder="bursting with joy",
                        max_length=MAX_DESCRIPTION_CHARACTERS,
                        visible=False,
                    )
                    length_from = gr.Radio([FREE, SECONDS, TOKENS], value=FREE, label="Length")
                    duration_s = gr.Number(
                        value=3.0,
                        minimum=0,
                        maximum=MAX_SPEECH_S,
                        step=0.1,
                        label="Seconds",
                        info="Exact to the sample, pauses included.",
                        visible=False,
                    )
                    num_semantic_tokens = gr.Number(
                        value=round(3 * token_rate),
                        minimum=1,
                        maximum=round(MAX_SPEECH_S * token_rate),
                        precision=0,
                        label="Semantic tokens",
                        info=f"{token_rate:g} are a second.",
                        visible=False,
                    )
                    seed = gr.Textbox(
                        label="Seed",
                        info="The same seed gives the same sound. Empty: a new one each time.",
                        max_length=18,
                    )
                    with gr.Accordion("Sampling", open=False), gr.Row():
                        settings = [
                            gr.Slider(
                                min(least, usual[name]),
                                max(most, usual[name]),
                                value=usual[name],
                                step=step,
                                label=label,
                                min_width=180,
                            )
                            for name in SETTINGS
                            for label, least, most, step in [SLIDERS[name]]
                        ]
            with gr.Column(scale=6, min_width=320, elem_classes="side"):
                with gr.Column(elem_id="hear"):
                    speech = gr.Audio(
                        at_first["speech"],
                        label="Speech",
                        format="wav",
                        interactive=False,
                        buttons=["download"],
                        waveform_options=gr.WaveformOptions(show_recording_waveform=False),  # the browser's own player
                        elem_id="speech",
                    )
                    downloads = gr.HTML([], html_template=DOWNLOADS_TEMPLATE, elem_id="downloads")
                    versions = gr.HTML([], html_template=VERSIONS_TEMPLATE, elem_id="versions")
                    segments = gr.HTML(
                        [],
                        html_template=SEGMENTS_TEMPLATE,
                        js_on_load=SEGMENTS_SCRIPT,
                        label="Segments",
                        elem_id="segments",
                    )
                with gr.Column(elem_id="details"):
                    picture = gr.Image(
                        at_first["picture"],
                        label="Picture",
                        format="png",
                        interactive=False,
                        buttons=["download"],
                        elem_id="picture",
                    )
                    take = gr.HTML(
                        None,
                        html_template=TAKES_TEMPLATE,
                        js_on_load=TAKES_SCRIPT,
                        elem_id="takes",
                    )
                    code = gr.Code(
                        at_first["code"],
                        label="Code",
                        language="python",
                        interactive=False,
                        wrap_lines=True,
                        show_line_numbers=False,
                        elem_id="code",
                    )
        if card_text:
            with gr.Accordion("The card of this checkpoint", open=False, elem_id="card"):
                gr.Markdown(card_text)
        with gr.Column(visible=False):
            api_fields = build_api_fields(pipe)

        # One at a time, whoever asks.
        speaks = {"concurrency_limit": 1, "concurrency_id": "speak"}
        page_fields = [
            *(text, voice, voice_audio, emotion_from, *weights, emotion_audio, emotion_text, emotion_strength),
            *(length_from, duration_s, num_semantic_tokens, seed, *settings),
        ]
        answer = [speech, segments, picture, code, status]
        api_fields[0].submit(make_speak(pipe), api_fields, answer, api_name="speak", **speaks)
        # Gradio's own progress would lie over the status.
        on_page = {"show_progress": "hidden", "api_visibility": "private", **speaks}
        asking = [speak_button.click, text.submit, lengths_button.click, feelings_button.click]
        gr.on(asking, None, None, status, js="() => 'Waiting …'")
        speaking = gr.on(
            asking[:2],
            make_speak_from_page(pipe),
            page_fields,
            [*answer, downloads, versions, take],
            **on_page,
        )
        comparing = [
            button.click(make_compare(pipe, variants), page_fields, [versions, status], **on_page)
            for button, variants in ((lengths_button, LENGTHS), (feelings_button, FEELINGS))
        ]
        for event in comparing:
            event.success(None, js=SHOW_VERSIONS_SCRIPT)
        for event in (speaking, *comparing):
            # Being stopped is a failure too, for Gradio.
            event.failure(None, status, status, js="now => now === 'Stopped.' ? now : 'Nothing was spoken.'")
        stop_button.click(lambda: "Stopped.", None, status, cancels=[speaking, *comparing], **of_the_page)

        used = [text, voice, voice_audio, emotion_from, *weights, length_from, duration_s]
        shown = [speech, segments, picture, code, downloads, versions, status]
        chosen_examples = [
            button.click(partial(use_example, pipe, name), None, [*used, *shown], **of_the_page)
            for name, button in examples.items()
        ]
        for name, button in samples.items():
            url = to_data_url(example_path(f"voice-{name}").read_bytes(), "audio/flac")
            chosen = button.click(lambda name=name, url=url: (name, url), None, [voice, sample], **of_the_page)
            chosen.success(None, js=PLAY_SAMPLE_SCRIPT)
        for name, button in preset_buttons.items():
            values = [WEIGHTS, *(float(emotion == name) for emotion in EMOTIONS)]
            button.click(lambda values=values: values, None, [emotion_from, *weights], **of_the_page)
        emotion_from.change(
            lambda chosen: [
                gr.update(visible=chosen == WEIGHTS),
                gr.update(visible=chosen == RECORDING),
                gr.update(visible=chosen == WORDS),
                gr.update(visible=chosen != OWN),
            ],
            emotion_from,
            [weights_area, emotion_audio, emotion_text, emotion_strength],
            **of_the_page,
        )
        length_from.change(
            lambda chosen: [gr.update(visible=chosen == SECONDS), gr.update(visible=chosen == TOKENS)],
            length_from,
            [duration_s, num_semantic_tokens],
            **of_the_page,
        )
        gr.on(
            [voice_audio.change, emotion_audio.change],
            lambda *paths: [gr.update(interactive=bool(voices) and not paths[0]), gr.update(visible=any(paths))],
            [voice_audio, emotion_audio],
            [voice, consent],
            **of_the_page,
        )
        demo.load(None, js=PAGE_SCRIPT)
        for event in (demo.load, *(event.success for event in (speaking, *chosen_examples))):
            event(None, js=NAMES_SCRIPT)
        for event in (speaking, *chosen_examples):
            event.success(None, js=PLAY_SCRIPT)
    return demo.queue(max_size=QUEUE_SIZE, default_concurrency_limit=1, api_open=False)


def launch(demo: gr.Blocks, **kwargs: Any) -> tuple:
    """Serves the demo with this Space's looks and limits; `kwargs` are further arguments of Gradio's `launch`."""
    return demo.launch(
        theme=THEME,
        css_paths=Path(__file__).parent / "style.css",
        max_file_size=MAX_UPLOAD,
        run_history=False,
        ssr_mode=False,
        footer_links=["api", "gradio"],
        **kwargs,
    )


def load_pipeline(checkpoint: str | None) -> IndexTTS2TextToAudioPipeline:
    """The pipeline of a folder or Hub repository, on the GPU if there is one, with the emotion language model if it has one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = IndexTTS2TextToAudioPipeline.from_pretrained(checkpoint, device=device)
    set_num_threads(pipe.model)
    try:
        # Everything that a repository has was downloaded with the model.
        pipe.emotion_text_model = EmotionTextModel.from_pretrained(
            pipe.model.config.name_or_path, local_files_only=True
        )
        pipe.emotion_text_model.model.to(device)
    except OSError:
        logger.info("the checkpoint has no emotion language model")
    return pipe


if __name__ == "__main__":
    demo = build_demo(load_pipeline(os.environ.get("INDEXTTS2_MODEL") or None))
    # What is there now stays: collections have only to look at what requests leave behind.
    gc.freeze()
    launch(demo)
