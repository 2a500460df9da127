"""What the model makes heard: is an impact heard when the caption says, and when the generated picture shows it?

Onsets are found in the waveform, impacts in the paths of the pucks; in generated and true clips alike.
"""

from __future__ import annotations

import numpy as np

from cosmos_jax.evaluate.measure import first_onset, nearest, onset_error, seen_impact, track
from cosmos_jax.evaluate.study import UPPER, Study
from data_pipelines.toy_world.episodes import FRAMES
from data_pipelines.toy_world.sound import onsets

AGREE = 150.0  # ms: about one frame and the width of an onset


def text2video_sound(study: Study) -> None:
    """Two rows: onset against the caption's time, and sound against the picture that was made with it."""
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
            f"tokeniser alone {UPPER}": ms(through),
        },
        note=f"The caption gives the time to 0.1 s. A clip in which nothing is heard counts as {1000 * length:.0f} ms.",
        silent=float(np.isnan(heard).mean()),
    )  # fmt: skip
    _together(study, index, made, length)


def _together(study: Study, index: list[int], made: list, length: float) -> None:
    """The hardest visible knock of a puck against the nearest heard onset of the same clip, and of all other clips."""
    fps = study.raw[0].fps

    def gaps(videos, sounds) -> np.ndarray:  # [video, sound] ms
        seen = [seen_impact(track(v, study.raw[i].colours)[:, 1:], fps) for i, v in zip(index, videos, strict=True)]
        heard = [onsets(s) for s in sounds]
        table = np.array([[nearest(t, found) for found in heard] for t in seen])
        return 1000 * np.where(np.isnan(table), length, table)

    true = np.diag(gaps([study.raw[i].video for i in index], [study.raw[i].sound for i in index]))
    told = true <= AGREE  # elsewhere the largest visible jerk is a silent one: a puck that is grasped, or let go
    ours = gaps([g.video for g in made], [g.sound for g in made])[told]
    own = np.eye(len(index), dtype=bool)[told]
    study.score(
        "sound with picture", ours[own], "ms", "lower",
        {"sound of the other clips": ours[~own] if len(index) > 1 else np.nan, f"true clips {UPPER}": true[told]},
        note="From the largest change of a puck's velocity in the generated picture to the nearest onset in the "
        f"generated sound; {1000 * length:.0f} ms where there is no such change or no sound. Judged on the "
        f"{told.sum()} captions whose true clip passes the same test within {AGREE:.0f} ms.",
    )  # fmt: skip


def _codec(study: Study, i: int) -> np.ndarray:
    z = study.seen[i].sound
    return study.pipeline.assets.sound.decode(z, study.raw[i].sound.shape[1])
