"""The adversary that guesses without looking: what every other one has to beat."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fl_privacy.component import Component
from fl_privacy.protocols import Progress, silent
from fl_privacy.seeding import generator
from fl_privacy.types import Failure, Observation, Outcome, Reconstruction, Samples, Task


class Baseline(Component):
    """Answer with the same picture for every target, and with random labels.

    ``mean`` is the mean of the auxiliary inputs, the best single picture in squared
    error; ``constant`` fills each channel with its mean over the auxiliary inputs, the best
    constant one, or without them with the mean that the task normalizes by. ``auto`` takes
    ``mean`` when auxiliary data is granted. The update is never read.
    """

    guess: Annotated[
        Literal["auto", "mean", "constant"], Field(description="picture to answer with")
    ] = "auto"

    shortfall: ClassVar[str] = "the number of images is unknown, so there is nothing to guess"

    @property
    def requires(self) -> frozenset[str]:
        """The mean picture needs auxiliary data."""
        return frozenset({"auxiliary"}) if self.guess == "mean" else frozenset()

    def attack(
        self,
        observations: Sequence[Observation],
        *,
        seed: int,
        device: torch.device,
        progress: Progress = silent,
    ) -> Iterator[Reconstruction | Failure]:
        """Guess for each target; labels are drawn from (seed, key)."""
        pictures: dict[int, Tensor] = {}
        for i, observation in enumerate(observations, start=1):
            images = image_count(observation)
            if images == 0:
                flaw = next((e.flaw for e in observation.exchanges if e.flaw), self.shortfall)
                yield Failure(observation.key, flaw)
                continue
            auxiliary = observation.auxiliary
            if id(auxiliary) not in pictures:
                pictures[id(auxiliary)] = self.picture(observation.task, auxiliary)
            draw = generator(seed, observation.key, "baseline labels")
            yield Reconstruction(
                key=observation.key,
                inputs=pictures[id(auxiliary)].expand(images, *observation.task.input_shape),
                labels=torch.randint(observation.task.classes, (images,), generator=draw),
                outcome=Outcome("completed"),
                seconds=0.0,
            )
            progress(i, len(observations))

    def picture(self, task: Task, auxiliary: Samples | None) -> Tensor:
        """What every image is answered with, in pixels, ``[*input_shape]``."""
        if auxiliary is None:
            return task.denormalize(torch.zeros(task.input_shape)).clamp(task.low, task.high)
        mean = auxiliary.inputs.mean(0)
        if self.guess != "constant":
            return mean
        levels = mean.flatten(1).mean(1).view(-1, *[1] * (mean.ndim - 1))
        return levels.expand_as(mean)


def image_count(observation: Observation) -> int:
    """How many images a target holds: linked rounds of FedAvg repeat the same ones."""
    training = observation.local_training
    counts = [e.num_examples or 0 for e in observation.exchanges]
    if training is None:
        return max(counts)
    return training.images(max(counts))
