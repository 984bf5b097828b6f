"""Continuations of prompts, generated before both are captured.

Batches are planned over all scenarios and repeats, done or not, so that a resumed run makes those
of an uninterrupted one. Each continuation is kept as soon as its batch is done
(:mod:`zarrtrace.store.continuations`): nothing is generated twice.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from zarrtrace.extraction.answers import (
    expected_prompts,
    refuse_taken_names,
    with_continuation,
)
from zarrtrace.extraction.configuration import prompt_digest
from zarrtrace.extraction.job import Job, with_prompts
from zarrtrace.extraction.packages import capture_package
from zarrtrace.extraction.progress import GenerationProgress
from zarrtrace.records import Continuation
from zarrtrace.scenarios import Sampling
from zarrtrace.storage import Location
from zarrtrace.store import ContinuationFile, Repeat, stored_continuations

if TYPE_CHECKING:
    from zarrtrace.capture import Prompt

# Continuations of a table that are planned together: no more prompts are held.
_AT_ONCE = 4096
# Parts of a run's configuration that decide its continuations.
_DECISIVE = ("model", "revision", "model_fingerprint", "model_settings", "dtype", "prepend_bos",
             "device", "generation", "end_of_sequence", "versions")  # fmt: skip


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a run's configuration decides its continuations."""
    return {name: config[name] for name in _DECISIVE}


def with_continuations(
    job: Job, output: Location, folder: Location, progress: GenerationProgress
) -> Job:
    """Return a job for its prompts with their continuations; those not kept are generated.

    Parameters
    ----------
    output
        The run, beside which continuations are kept; its writer has compared the configuration.
    folder
        Where its traces are written, some of which may be complete.
    progress
        Is told of what was generated.

    Raises
    ------
    ModelError, NonFiniteError
        If the model cannot go on after a prompt.
    """
    if (sampling := job.options.generate) is None:
        return job
    known = stored_continuations(folder, trace_names(job))
    with ContinuationFile(output, settings_of(job.config)) as file:
        prompts = _continued(job, sampling, job.prompts, known, file, progress)
        return with_prompts(job, tuple(prompts))


def continued_stream(
    job: Job,
    sampling: Sampling,
    prompts: Iterable[Prompt],
    file: ContinuationFile,
    progress: GenerationProgress,
) -> Iterator[Prompt]:
    """Yield the prompts of a table with their continuations, some thousand planned together.

    Parameters
    ----------
    sampling
        How they are generated.
    prompts
        All prompts, in order.
    file
        The continuations that are kept.
    """
    rest, step = iter(prompts), max(1, _AT_ONCE // sampling.samples)
    while some := list(itertools.islice(rest, step)):
        capture_package().check_context(job.model, some, sampling)
        for prompt in some:
            refuse_taken_names(prompt)
        yield from _continued(job, sampling, some, {}, file, progress)


def _continued(
    job: Job,
    sampling: Sampling,
    prompts: Sequence[Prompt],
    known: Mapping[Repeat, Continuation],
    file: ContinuationFile,
    progress: GenerationProgress,
) -> Iterator[Prompt]:
    """Yield prompts with all their continuations, scenario by scenario."""
    capture = capture_package()
    repeats = range(sampling.samples)
    digests = {
        Repeat(prompt.scenario.name, n): digest
        for prompt, digest in zip(prompts, map(prompt_digest, prompts), strict=True)
        for n in repeats
    }
    found = {**known, **file.take(digests)}
    progress.found(sum(key in found for key in digests))
    lengths = [len(prompt.tokens.ids) for prompt in prompts]
    for batch in capture.plan_batches(job.model, lengths, sampling):
        keys = [Repeat(prompts[at].scenario.name, n) for at, n in batch]
        if all(key in found for key in keys):
            continue
        with progress.timed():
            requests = [(prompts[at], n) for at, n in batch]
            made = zip(keys, capture.generate(job.model, requests, sampling), strict=True)
        new = {key: one for key, one in made if key not in found}
        file.add(new, digests)
        found |= new
        progress.update(len(new))
    for prompt in prompts:
        for n in repeats:
            one = found[Repeat(prompt.scenario.name, n)]
            yield with_continuation(job.model, prompt, n, one, sampling, job.options.answer)


def trace_names(job: Job) -> list[str]:
    """Return the names of the traces of a job, whose continuations need not be known."""
    return [prompt.scenario.name for prompt in expected(job, 1).prompts]


def expected(job: Job, tokens: int | None = None) -> Job:
    """Return a job as it may be with continuations of some tokens, by default of the most."""
    sampling = job.options.generate
    if sampling is None:
        return job
    found = expected_prompts(job.model, job.prompts, sampling, tokens)
    return with_prompts(job, tuple(found))
