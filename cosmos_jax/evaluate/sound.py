"""What the model makes heard: is the first impact of a generated clip heard when the caption says?

Onsets are found in the waveform, in generated and true sound alike.
"""

from __future__ import annotations

import numpy as np

from cosmos_jax.evaluate.measure import first_onset, onset_error
from cosmos_jax.evaluate.study import UPPER, Study
from data_pipelines.toy_world.episodes import FRAMES


def text2video_sound(study: Study) -> None:
    """First onset in the generated sound against the true time of the first impact, in milliseconds."""
    index = [i for i, e in enumerate(study.raw) if e.onsets][: study.config.evaluate.samples]
    made = study.generate("text2video_sound", index)
    study.keep_clips("text2video_sound", index, made)
    true = np.array([study.raw[i].onsets[0] for i in index])
    length = FRAMES / study.raw[0].fps
    usual = np.array([e.onsets[0] for e in study.train if e.onsets])
    anywhere = np.random.RandomState(0).uniform(0, length, (200, 1))
    heard = np.array([first_onset(g.sound) for g in made])
    through = np.array([first_onset(_codec(study, i)) for i in index])

    def ms(times):
        return 1000 * onset_error(times, true, length)

    study.score(
        "sound onset", ms(heard), "ms", "lower",
        {
            "mean onset in training": ms(np.full(len(true), usual.mean())),
            "a random time": ms(anywhere),
            f"true sound through the tokeniser {UPPER}": ms(through),
        },
        note=f"The caption gives the time to 0.1 s. A clip in which nothing is heard counts as {1000 * length:.0f} ms.",
        silent=float(np.isnan(heard).mean()),
    )  # fmt: skip


def _codec(study: Study, i: int) -> np.ndarray:
    z = study.seen[i].sound
    return study.pipeline.assets.sound.decode(z, study.raw[i].sound.shape[1])
