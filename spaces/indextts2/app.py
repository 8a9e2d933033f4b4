"""
The Space: type, choose a voice, an emotion and a length, hear it, and take the call in Python along.

`build_demo` makes the interface over a pipeline; started as a program, this file loads one and serves it.
"""

import gc
import html
import logging
import os
from pathlib import Path
from typing import Any

import gradio as gr
import torch

from indextts2_hf import EMOTIONS, EmotionTextModel, IndexTTS2TextToAudioPipeline, set_num_threads
from speaking import (
    FREE,
    MAX_CHARACTERS,
    MAX_DESCRIPTION_CHARACTERS,
    MAX_SPEECH_S,
    OWN,
    RECORDING,
    SECONDS,
    TOKENS,
    WEIGHTS,
    WORDS,
    make_speak,
    usual_settings,
)


logger = logging.getLogger(__name__)

MAX_UPLOAD = "20mb"
QUEUE_SIZE = 16

# Recordings and results are deleted when they are an hour old.
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

INTRODUCTION = "# IndexTTS2\nSpeech in any voice, with the emotion and the length you choose."

CONSENT = (
    "**Whose voice is it?** Use your own, or one whose owner has agreed to it and to what you will make it say. Do not pass "
    "off the result as a recording of that person. Recordings are deleted from this server after about an hour."
)

LONG_TEXT = (
    "The lighthouse keeper climbed the stairs every evening, lamp in hand, and counted the steps as he went. There were two "
    "hundred and four of them, and he knew each one by its sound. On the night of the great storm he lost count for the "
    "first time, because the wind was louder than his feet. He stood still in the dark, listened, and began again."
)
# Text, source of the emotion, happy, source of the length, seconds.
EXAMPLES = {
    "A greeting": ["Hello there. How are you today?", OWN, 0, FREE, 3.0],
    "In exactly 3 seconds": ["This line has to fit between two cuts.", OWN, 0, SECONDS, 3.0],
    "With joy": ["You did it! I knew you would.", WEIGHTS, 0.8, FREE, 3.0],
    "A long text, piece by piece": [LONG_TEXT, OWN, 0, FREE, 3.0],
}

# The segments, which play in order as they arrive. Those that are there stay untouched when another is added.
SEGMENTS_TEMPLATE = """
<ol aria-label="Segments">
  {{#each value}}
  <li><p>{{text}}</p><audio controls preload="auto" src="{{audio}}" aria-label="Segment {{number}}"></audio></li>
  {{/each}}
</ol>
"""
SEGMENTS_SCRIPT = """
let next = 0;
const players = () => [...element.querySelectorAll('audio')];
const playNext = () => {
  const player = players()[next];
  if (player && players().every(one => one.paused || one.ended)) { next += 1; player.play().catch(() => {}); }
};
element.addEventListener('play', event => {
  players().filter(one => one !== event.target).forEach(one => one.pause());
  next = players().indexOf(event.target) + 1;
}, true);
element.addEventListener('ended', playNext, true);
watch('value', () => {
  if (players().length <= 1) next = 0;
  if (next === players().length - 1) playNext();
});
"""


# On a narrow page the result is below all controls.
SHOW_RESULT_SCRIPT = "() => { if (innerWidth < 700) document.querySelector('#result').scrollIntoView(); }"
# Gradio leaves player and picture without a name for those who do not see them. Several segments were heard as they came.
DONE_SCRIPT = """
() => {
  const speech = document.querySelector('#speech audio');
  if (!document.querySelector('#segments audio')) speech?.play().catch(() => {});
  speech?.setAttribute('aria-label', 'Speech');
  const picture = document.querySelector('#picture img');
  picture?.setAttribute('alt', 'Waveform and mel spectrogram of the speech');
  picture?.closest('button')?.setAttribute('aria-label', 'Enlarge waveform and mel spectrogram');
}
"""


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


def build_demo(pipe: IndexTTS2TextToAudioPipeline) -> gr.Blocks:
    """The interface over a pipeline. Emotion in words is offered where the pipeline has its `emotion_text_model` already."""
    voices = sorted(pipe.model.voices)
    token_rate = pipe.model.t2s.config.semantic_token_rate
    usual = usual_settings(pipe)
    has_words = pipe.emotion_text_model is not None
    no_words = "This checkpoint has no emotion language model, so it cannot take the emotion from words."

    demo = Demo(title="IndexTTS2", analytics_enabled=False, delete_cache=(DELETE_EVERY_S, DELETE_AFTER_S))
    with demo:
        gr.Markdown(INTRODUCTION, elem_id="introduction")
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=320):
                text = gr.Textbox(
                    label="Text",
                    info=f"At most {MAX_CHARACTERS:,} characters. Shift and Enter speaks it.",
                    placeholder="What to say",
                    lines=4,
                    max_lines=12,
                    max_length=MAX_CHARACTERS,
                )
                with gr.Row():
                    speak_button = gr.Button("Speak", variant="primary", scale=3)
                    stop_button = gr.Button("Stop", scale=1, min_width=80)
                voice = gr.Dropdown(
                    voices,
                    value=pipe.model.config.default_voice if voices else None,
                    label="Voice",
                    info=None if voices else "This checkpoint brings no voice: give a recording.",
                    interactive=bool(voices),
                )
                recorder = {"sources": ["upload", "microphone"], "type": "filepath", "elem_classes": "recorder"}
                voice_audio = gr.Audio(label="Or a recording of the voice", **recorder)
                gr.Markdown(CONSENT, elem_id="consent")
                emotion_from = gr.Radio(
                    [OWN, WEIGHTS, RECORDING, *([WORDS] if has_words else [])],
                    value=OWN,
                    label="Emotion",
                    info=None if has_words else no_words,
                )
                emotion_strength = gr.Slider(0, 1, value=1, step=0.05, label="Strength of the emotion", visible=False)
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
                        # A checkpoint's own setting is always within reach.
                        gr.Slider(
                            least, max(most, usual[name]), value=usual[name], step=step, label=label, min_width=180
                        )
                        for name, label, (least, most), step in (
                            ("temperature", "Temperature", (0.1, 2.0), 0.05),
                            ("top_p", "Top p", (0.05, 1.0), 0.05),
                            ("top_k", "Top k", (1, 200), 1),
                            ("num_beams", "Beams", (1, 5), 1),
                            ("text_guidance_scale", "Guidance by the text, for tokens", (1.0, 4.0), 0.1),
                            ("num_candidates", "Candidates, of which the best is spoken", (1, 8), 1),
                            ("num_inference_steps", "Flow-matching steps", (1, 50), 1),
                            ("guidance_scale", "Guidance, for flow matching", (1.0, 4.0), 0.1),
                            ("segment_silence_s", "Pause between segments, in seconds", (0.0, 2.0), 0.05),
                        )
                    ]
            with gr.Column(scale=6, min_width=320, elem_id="result"):
                speech = gr.Audio(
                    label="Speech",
                    format="wav",
                    interactive=False,
                    buttons=["download"],
                    waveform_options=gr.WaveformOptions(show_recording_waveform=False),  # the browser's own player
                    elem_id="speech",
                )
                status = gr.Markdown("Nothing spoken yet.", elem_id="status")
                segments = gr.HTML(
                    [],
                    html_template=SEGMENTS_TEMPLATE,
                    js_on_load=SEGMENTS_SCRIPT,
                    label="Segments",
                    elem_id="segments",
                )
                picture = gr.Image(
                    label="Waveform and mel spectrogram",
                    format="png",
                    interactive=False,
                    buttons=["download"],
                    elem_id="picture",
                )
                code = gr.Code(
                    label="The same in Python",
                    language="python",
                    interactive=False,
                    wrap_lines=True,
                    show_line_numbers=False,
                    elem_id="code",
                )
        gr.Examples(
            list(EXAMPLES.values()),
            [text, emotion_from, weights[0], length_from, duration_s],
            example_labels=list(EXAMPLES),
            api_name="use_example",
            api_visibility="undocumented",
        )

        speaking = gr.on(
            [speak_button.click, text.submit],
            make_speak(pipe),
            [
                *(text, voice, voice_audio, emotion_from, *weights, emotion_audio, emotion_text, emotion_strength),
                *(length_from, duration_s, num_semantic_tokens, seed, *settings),
            ],
            [speech, segments, picture, code, status],
            show_progress_on=[status],
            concurrency_limit=1,
            api_name="speak",
        )
        speak_button.click(None, js=SHOW_RESULT_SCRIPT)
        speaking.success(None, js=DONE_SCRIPT)
        of_the_page = {"queue": False, "show_progress": "hidden", "api_visibility": "undocumented"}
        stop_button.click(lambda: "Stopped.", None, status, cancels=[speaking], api_name="stop", **of_the_page)
        emotion_from.change(
            lambda chosen: [
                gr.update(visible=chosen == WEIGHTS),
                gr.update(visible=chosen == RECORDING),
                gr.update(visible=chosen == WORDS),
                gr.update(visible=chosen != OWN),
            ],
            emotion_from,
            [weights_area, emotion_audio, emotion_text, emotion_strength],
            api_name="show_emotion",
            **of_the_page,
        )
        length_from.change(
            lambda chosen: [gr.update(visible=chosen == SECONDS), gr.update(visible=chosen == TOKENS)],
            length_from,
            [duration_s, num_semantic_tokens],
            api_name="show_length",
            **of_the_page,
        )
        if voices:
            voice_audio.change(
                lambda path: gr.update(interactive=not path), voice_audio, voice, api_name="show_voice", **of_the_page
            )
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
    demo = build_demo(load_pipeline(os.environ.get("INDEXTTS2_MODEL")))
    # What is there now stays: collections have only to look at what requests leave behind.
    gc.freeze()
    launch(demo)
