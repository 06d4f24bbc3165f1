"""The next step of an answer in two halves: queued on the device, and read by the host.

Between the halves the host is free, and so the pass over the chosen token can be launched before
anyone but the device knows which one it is. All that the host wants to know of a choice (the token,
whether the mask changed it, how sure the model was) comes in one small copy.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmr5_runtime.language import Language
from mmr5_runtime.replies import Step
from mmr5_runtime.sampler import Sampler
from mmr5_runtime.stopping.choices import way_logits, way_logprob
from mmr5_runtime.stopping.machine import AnswerMachine
from mmr5_runtime.transfer import Readback


class Choosing:
    """One choice under way. ``token`` [1] int64 is it on the device, always a valid id."""

    def __init__(
        self,
        row: Tensor,
        machine: AnswerMachine,
        sampler: Sampler,
        language: Language,
        constrain: bool,
    ) -> None:
        """Queue the choice from logits ``row`` [V] float32.

        ``machine`` has read everything before it. The mask is applied, where ``constrain`` says so,
        inside the list.
        """
        self._machine, self._sampler, self._language = machine, sampler, language
        allowed, self._ways = None, None
        if machine.state == "list":
            allowed = language.mask.allowed(machine) if constrain else None
            self._ways = way_logits(row, machine, language.mask)
        self._choice = sampler.choose(row, allowed)
        self.token = self._choice.token
        # Numbers by their bits: so one tensor holds all of it.
        parts = [self.token, self._choice.logit.double().view(torch.int64)]
        if self._choice.changed is not None:
            parts.append(self._choice.changed.long())
        if self._ways is not None:
            parts.append(self._ways.double().view(torch.int64))
        self._reading = Readback(torch.cat(parts))

    def read(self) -> Step | None:
        """Wait for the choice and take note of it; None where the logits are no numbers.

        The machine must not have been fed since.
        """
        bits = self._reading.wait()
        whole, numbers = bits.tolist(), bits.view(torch.float64).tolist()
        token = whole[0]
        if not math.isfinite(numbers[1]):
            return None
        masked = self._choice.changed is not None
        changed = masked and bool(whole[2])
        self._sampler.settle(self._choice, changed)
        if self._ways is None:
            return Step(token, None, changed)
        mask, vocabulary = self._language.mask, self._language.vocabulary
        logits = numbers[2 + masked :]
        return Step(token, way_logprob(logits, token, self._machine, mask, vocabulary), changed)
