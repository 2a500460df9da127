"""What a worker is asked for: plain numbers, so that any process can do it.

In: nothing. Out: `Job`, and `Prepare`, which turns one into a planned sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from data_pipelines.packing import Planned, check_fits, plan
from data_pipelines.sample import Sample
from data_pipelines.schema import Bucket, SequenceSpec


class Job(NamedTuple):
    """One sample of the stream, by where it is read and what it is called."""

    kind: int  # of the mixture
    record: int  # of the kind's source
    sample_id: int  # unique in the stream (modulo 2³¹); seeds everything that is drawn for it


@dataclass(frozen=True)
class Prepare:
    """Job → `Planned`: read, decode, encode, plan. The same wherever it runs; worker processes get a pickled copy.

    make(job) → Sample must depend on the job alone. ValueError: `sample.validate`'s, or a sample beyond the bucket;
    every exception says in a note which sample it was.
    """

    make: Callable[[Job], Sample]
    tokenizer: Any  # a `ChatTokenizer`
    spec: SequenceSpec
    bucket: Bucket

    def __call__(self, job: Job) -> Planned:
        try:
            p = plan(self.make(job), self.tokenizer, self.spec)
            check_fits(p, self.bucket)
        except Exception as e:
            e.add_note(f"(while preparing sample {job.sample_id}: record {job.record} of kind {job.kind})")
            raise
        # What became tokens need not travel and wait beside them.
        bare = replace(p.sample, vision_latents=None, sound_latents=None, context=(), frames=None, turns=())
        return replace(p, sample=bare)
