"""One export while it runs: the steps that have to do with the model, each taken once.

Whatever a step gives is kept in the journal, so that a resumed run takes it from there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import cached_property, partial
from typing import Any

from torch import Tensor

from mmr5_export.agreement import ORIGINAL, Ranking
from mmr5_export.assemble import Progress, QuantizedHere
from mmr5_export.calibration import Prompt, TokenCounts, encode_prompt, pixel_values
from mmr5_export.checkpoint import Checkpoint
from mmr5_export.estimate import ResourceError
from mmr5_export.evaluate import HeldOut, Question
from mmr5_export.hidden import HiddenStates
from mmr5_export.job import Job
from mmr5_export.journal import Journal
from mmr5_export.mixed import choose_mixed, group_bytes
from mmr5_export.plan import Plan
from mmr5_export.recipe import Recipe
from mmr5_export.response_cache import Response
from mmr5_export.responses import respond
from mmr5_export.samples import Sample, samples_sha256
from mmr5_export.sensitivity import measure_sensitivity
from mmr5_export.sequential import Prepared, Walk, reference_logits, walk_decoder
from mmr5_kernels.layout import Format


class Run:
    """A job at work, its finished steps in ``journal``.

    ``answering`` is the format of the model that is to write missing answers, None when there are
    none. ``sensitivity`` is what a mixed recipe was chosen by, None with any other.
    ``graphs_skipped`` is why graphs of ONNX Runtime are not run, where memory is what they lack.
    """

    def __init__(
        self,
        job: Job,
        journal: Journal,
        answering: str | None,
        progress: Progress,
        graphs_skipped: str | None = None,
    ) -> None:
        self.graphs_skipped = graphs_skipped
        self.job, self.journal, self.progress = job, journal, progress
        self._answering = answering
        self._hidden = HiddenStates(journal.folder / "hidden")
        self.sensitivity: Mapping[str, Mapping[str, float]] | None = None

    @cached_property
    def responses(self) -> list[Response]:
        """The model's answer to every sample of the job, in order.

        Which format answers was decided by the memory that happened to be free, so the decision is
        kept with the first answer: a resumed export goes on with it. Raises
        :class:`ResourceError` where the memory does not suffice for that any more.
        """
        if not self.journal.done("answers"):
            self._answer()
        return [Response.from_json(entry) for entry in self.journal.result("answers")["responses"]]

    @property
    def answered_by(self) -> str | None:
        """The format of the model that wrote the answers; None when all came with the data."""
        assert self.responses is not None
        by: str | None = self.journal.result("answers")["by"]
        return by

    def _answer(self) -> None:
        samples, journal = self.job.samples, self.journal
        asked = self._answering or ORIGINAL
        by = journal.result("answering") if journal.done("answering") else asked
        if by == ORIGINAL != asked:
            raise ResourceError(
                f"answers were begun with the model in {by}, which the free memory does not hold "
                "any more; free memory and pass --resume, or start over with --force."
            )
        unanswered = any(sample.response is None for sample in samples)

        def progress(stage: str, done: int, total: int) -> None:
            if done and unanswered and not journal.done("answering"):
                journal.finish("answering", by)
            self.progress(stage, done, total)

        found = respond(samples, self.job.generator(by), self.job.response_cache, progress)
        responses = [asdict(response) for response in found]
        journal.finish("answers", {"by": by if unanswered else None, "responses": responses})

    @cached_property
    def prompts(self) -> list[Prompt]:
        """Every sample of the job with its answer, as token ids."""
        tokenizer = self.job.tokenizer()
        pairs = zip(self.job.samples, self.responses, strict=True)
        return [
            encode_prompt(
                sample, response.token_ids, tokenizer, self.job.pixel_budget, self.job.spec
            )
            for sample, response in pairs
        ]

    @cached_property
    def recipe(self) -> Recipe | None:
        """The job's recipe; of a mixed one, with what the measured sensitivity made of it."""
        recipe = self.job.recipe
        if recipe is None or recipe.mixed is None:
            return recipe
        candidates = recipe.candidates(self.job.spec)
        if not self.journal.done("sensitivity"):
            walk = self._walk(self.job.plan(), self.job.methods())

            def progress(done: int, total: int) -> None:
                self.progress("sensitivity", done, total)

            self.journal.finish("sensitivity", measure_sensitivity(walk, candidates, progress))
        self.sensitivity = self.journal.result("sensitivity")
        sizes = group_bytes(self.job.spec, candidates)
        chosen = choose_mixed(self.sensitivity, sizes, recipe.mixed.budget_bytes(self.job.spec))
        return recipe.with_choice(self.job.spec, chosen)

    @cached_property
    def plan(self) -> Plan:
        """What the engine consists of."""
        return self.job.plan(self.recipe)

    @cached_property
    def walk(self) -> Walk:
        """The walk through the decoder, with the formats that were chosen."""
        return self._walk(self.plan, self.job.methods(self.recipe))

    def _walk(self, plan: Plan, methods: Mapping[str, str]) -> Walk:
        job = self.job
        assert isinstance(job.checkpoint, Checkpoint)
        count = len(job.calibration)
        prepared = [
            Prepared(prompt, partial(self._pixels, sample))
            for sample, prompt in zip(job.samples, self.prompts, strict=True)
        ]
        return Walk(
            checkpoint=job.checkpoint,
            calibration=prepared[:count],
            reference=prepared[count:],
            formats=plan.formats,
            methods=methods,
            damp=self.job.recipe.damp if self.job.recipe else 0.01,
            visual_weight=job.options.visual_weight,
            dtype=job.dtype,
            device=job.device,
        )

    def _pixels(self, sample: Sample) -> list[Tensor]:
        settings = asdict(self.job.image)
        return pixel_values(sample, self.job.pixel_budget, settings)

    def calibrate(self) -> None:
        """Walks through the decoder, if there is anything to calibrate or to verify with."""
        if not self.job.samples:
            return

        def progress(done: int, total: int, error: float | None) -> None:
            note = "" if error is None else f"largest output error {error:.2%}"
            self.progress("layer", done, total, note)

        walk_decoder(self.walk, self.journal, self._hidden, progress)

    def tensors(self, formats: Mapping[str, Format]) -> QuantizedHere:
        """Stored tensors of an engine with these formats, which calibration has gone through."""
        assert isinstance(self.job.checkpoint, Checkpoint)

        def layer(index: int) -> Mapping[str, Tensor]:
            step = f"layer-{index:02}"
            return self.journal.tensors(step) if self.job.calibration else {}

        methods = self.job.methods(self.recipe)
        return QuantizedHere(self.job.checkpoint, formats, methods, layer)

    def layer_reports(self) -> dict[str, dict[str, Any]]:
        """What calibration says of every linear it quantized."""
        found: dict[str, dict[str, Any]] = {}
        if self.job.calibration:
            for index in range(self.job.spec.text.num_layers):
                found |= self.journal.result(f"layer-{index:02}")
        return found

    def held_out(self) -> Iterator[HeldOut]:
        """The held-out samples with what the unquantized model made of them, one at a time."""
        first = len(self.job.calibration)
        for index, sample in enumerate(self.job.held_out):
            prompt, response = self.prompts[first + index], self.responses[first + index]
            question = Question(
                prompt.token_ids[: prompt.prompt_tokens].tolist(),
                self._pixels(sample),
                prompt.grids,
                self.job.options.max_new_tokens,
            )
            yield HeldOut(
                name=sample.name,
                question=question,
                response=response.token_ids,
                reference_logits=partial(reference_logits, self.walk, self._hidden, index),
                reference=Ranking(response.order, response.status),
                relevant=sample.relevant,
                # One that came with the data is the original's own, or would have been left out.
                reference_by=(self.answered_by if sample.response is None else None) or ORIGINAL,
            )

    def calibration_facts(self) -> dict[str, Any] | None:
        """What the samples were, for manifest and report; None without any."""
        job = self.job
        if not job.samples:
            return None
        count = len(job.calibration)
        counts = [prompt.counts for prompt in self.prompts]
        ids = [response.token_ids for response in self.responses]
        given = sum(sample.response is not None for sample in job.samples)
        return {
            "source": job.samples_name,
            "seed": job.options.seed,
            "samples": count,
            "samples_sha256": samples_sha256(job.calibration, ids[:count]),
            "tokens": asdict(sum(counts[:count], TokenCounts())),
            "visual_weight": job.options.visual_weight,
            "held_out": len(job.held_out),
            "held_out_sha256": samples_sha256(job.held_out, ids[count:]),
            "held_out_tokens": asdict(sum(counts[count:], TokenCounts())),
            "answers_given": given,
            "answers_generated": len(job.samples) - given,
            "answers_by": self.answered_by,
        }
