"""The HTML of the page and its scripts; the longer ones have files of their own."""

from pathlib import Path


# The takes that are kept in the page.
MAX_TAKES = 8

FOLDER = Path(__file__).parent
SEGMENTS_SCRIPT = (FOLDER / "segments.js").read_text()
TAKES_SCRIPT = f"const most = {MAX_TAKES};\n{(FOLDER / 'takes.js').read_text()}"

SEGMENTS_TEMPLATE = """
<ol aria-label="Segments">
  {{#each value}}
  <li><p>{{text}}</p><audio controls preload="auto" src="{{audio}}" aria-label="Segment {{number}}"></audio></li>
  {{/each}}
</ol>
"""
TAKES_TEMPLATE = """
<section aria-label="Takes" hidden>
  <h2>Takes of this visit</h2>
  <p><button type="button"></button> <small>Mark two takes as A and B to compare them.</small></p>
  <ol></ol>
</section>
"""
VERSIONS_TEMPLATE = """
<div>
  {{#each value}}
  <figure>
    <figcaption><b>{{label}}</b> {{length}}</figcaption>
    <img src="{{picture}}" style="width: {{width}}%" alt="Mel spectrogram of: {{label}}">
    <audio controls preload="auto" src="{{audio}}" aria-label="{{label}}"></audio>
  </figure>
  {{/each}}
</div>
"""
DOWNLOADS_TEMPLATE = (
    """{{#if value}}Also as {{#each value}}<a download="{{file}}" href="{{url}}">{{name}}</a> {{/each}}{{/if}}"""
)
STATUS_TEMPLATE = """
<p role="status">{{value}}</p>
<progress max="100" value="${(String(value).match(/, (\\d+)%/) ?? [0, 0])[1]}" aria-label="Progress"></progress>
"""
SAMPLE_TEMPLATE = """{{#if value}}<audio src="{{value}}"></audio>{{/if}}"""

# One sound at a time, all over the page.
PAGE_SCRIPT = """
() => document.addEventListener('play', event => {
  document.querySelectorAll('audio').forEach(one => { if (one !== event.target) one.pause(); });
}, true)
"""
# Gradio leaves player and picture without a name for those who do not see them.
NAMES_SCRIPT = """
() => {
  const picture = document.querySelector('#picture img');
  document.querySelector('#speech audio')?.setAttribute('aria-label', 'Speech');
  picture?.setAttribute('alt', 'Waveform and mel spectrogram of the speech');
  picture?.closest('button')?.setAttribute('aria-label', 'Enlarge waveform and mel spectrogram');
}
"""
# Several segments were played as they came.
PLAY_SCRIPT = """
() => {
  if (!document.querySelector('#segments audio')) document.querySelector('#speech audio')?.play().catch(() => {});
  if (innerWidth < 700) document.querySelector('#speech').scrollIntoView({block: 'nearest'});
}
"""
SHOW_VERSIONS_SCRIPT = "() => document.querySelector('#versions').scrollIntoView({block: 'nearest'})"
PLAY_SAMPLE_SCRIPT = "() => { document.querySelector('#sample audio')?.play(); }"
