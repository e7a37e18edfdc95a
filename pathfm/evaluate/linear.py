"""A linear probe on frozen features: a grid of heads trained at once, of which one is chosen on held-out samples.

As DINOv2 evaluates (arXiv 2304.07193, appendix B.3, and its code), but from features that were extracted once, so
without augmentation.

N query samples   T test samples   D width of the features   C classes   R learning rates   B samples of a step
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from pathfm.log import progress
from pathfm.random_streams import stream

Features = Mapping[str, Float[Tensor, "N D"]]  # kinds of features of the same samples, of their own widths


@dataclass(frozen=True)
class LinearSettings:
    """Defaults of DINOv2's linear evaluation."""

    # For a batch of 256, and scaled with it.
    learning_rates: tuple[float, ...] = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
    steps: int = 12_500  # its 10 epochs of 1250
    batch_size: int = 128
    momentum: float = 0.9


@dataclass(frozen=True)
class Heads:
    """One linear classifier for each learning rate."""

    weight: Float[Tensor, "R C D"]
    bias: Float[Tensor, "R C"]

    def logits(self, features: Float[Tensor, "N D"]) -> Float[Tensor, "R N C"]:
        return features @ self.weight.mT + self.bias[:, None]


@dataclass(frozen=True)
class Choice:
    """Which head was best on samples that it had not learned from."""

    features: str
    learning_rate: float
    balanced_acc: float  # on the held-out samples
    cross_entropy: float


@dataclass(frozen=True)
class LinearProbe:
    """The chosen head, trained once more on all query samples."""

    choice: Choice
    heads: Heads  # R = 1

    def probabilities(self, test: Features) -> Float[Tensor, "T C"]:
        features = test[self.choice.features]
        return self.heads.logits(features.to(self.heads.bias))[0].softmax(-1)


def fit_linear_probe(
    query: Features,
    labels: Int[Tensor, " N"],
    held_out: Bool[Tensor, " N"],
    num_classes: int,
    settings: LinearSettings,
    seed: int,
) -> LinearProbe:
    """Train all heads without the `held_out` samples, choose by these, and train the best anew with all.

    Chosen by balanced accuracy; of equal ones by cross-entropy, then the smaller learning rate of the earlier features.
    """
    rates = settings.learning_rates
    choices: list[Choice] = []
    for name, features in query.items():
        heads = train_heads(features[~held_out], labels[~held_out], num_classes, rates, settings, seed)
        choices += _choices(name, rates, heads.logits(features[held_out]), labels[held_out])
    best = max(choices, key=lambda choice: (choice.balanced_acc, -choice.cross_entropy))
    heads = train_heads(query[best.features], labels, num_classes, [best.learning_rate], settings, seed)
    return LinearProbe(best, heads)


@torch.no_grad()
def train_heads(
    features: Float[Tensor, "N D"],
    labels: Int[Tensor, " N"],
    num_classes: int,
    learning_rates: Sequence[float],
    settings: LinearSettings,
    seed: int,
) -> Heads:
    """SGD with momentum on the cross-entropy, the learning rates falling to 0 along half a cosine.

    All heads begin alike and see the same batches, so one pass over the features serves them all; what each learns is
    what it would have learned alone. Batches follow from the seed and the number of samples.
    """
    num_rates, width = len(learning_rates), features.shape[1]
    drawn = stream(seed, 0, "linear head").normal(0.0, 0.01, (num_classes, width))
    weight = torch.from_numpy(drawn).to(features).repeat(num_rates, 1)  # all heads below each other: one product a step
    bias = weight.new_zeros(len(weight))
    weight_speed, bias_speed = torch.zeros_like(weight), torch.zeros_like(bias)
    rates = torch.tensor(learning_rates).to(features).repeat_interleave(num_classes) * settings.batch_size / 256
    truth = one_hot(labels, num_classes).to(features)[:, None]
    batches = progress(_batches(len(labels), settings, seed), "linear probe", settings.steps, "steps")
    for step, rows in enumerate(batches):
        rows = rows.to(features.device)
        batch = features[rows]
        rate = rates * (1 + math.cos(math.pi * step / settings.steps)) / 2
        logits = torch.addmm(bias, batch, weight.T).unflatten(1, (num_rates, num_classes))
        gradient = (logits.softmax(-1) - truth[rows]).flatten(1) / len(rows)  # of the loss by the logits
        weight_speed.mul_(settings.momentum).addmm_(gradient.T, batch)
        bias_speed.mul_(settings.momentum).add_(gradient.sum(0))
        weight.sub_(rate[:, None] * weight_speed)
        bias.sub_(rate * bias_speed)
    return Heads(weight.view(num_rates, num_classes, width), bias.view(num_rates, num_classes))


def _batches(num_samples: int, settings: LinearSettings, seed: int) -> Iterator[Int[Tensor, " B"]]:
    """One permutation of all samples after the other, cut into batches."""
    waiting, epoch = torch.empty(0, dtype=torch.int64), 0
    for _ in range(settings.steps):
        while len(waiting) < settings.batch_size:
            order = torch.from_numpy(stream(seed, epoch, "linear probe").permutation(num_samples))
            waiting, epoch = torch.cat([waiting, order]), epoch + 1
        yield waiting[: settings.batch_size]
        waiting = waiting[settings.batch_size :]


def _choices(
    name: str, rates: Sequence[float], logits: Float[Tensor, "R n C"], labels: Int[Tensor, " n"]
) -> Iterator[Choice]:
    """Heads that diverged are left as the worst."""
    of_class = one_hot(labels, logits.shape[-1]).double()
    there = of_class.sum(0) > 0
    for rate, of_rate in zip(rates, logits.double(), strict=True):
        hit = (of_rate.argmax(-1) == labels).double()
        recall = (hit @ of_class)[there] / of_class.sum(0)[there]
        loss = cross_entropy(of_rate, labels)
        is_finite = bool(of_rate.isfinite().all())
        yield Choice(name, rate, float(recall.mean()) if is_finite else -1.0, float(loss) if is_finite else math.inf)
