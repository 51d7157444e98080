"""Preferences of a model: the log-probabilities of both replies of a pair, and how they differ from the reference."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from .config import PreferenceSection
from .rendered_pairs import RenderedPair
from .replies import reply_losses


def log_probabilities(model: PreTrainedModel, pairs: Sequence[RenderedPair]) -> torch.Tensor:
    """Returns the log-probabilities of the chosen and the rejected reply of each pair, `[pair, 2]` in float64."""
    losses = reply_losses(model, [example for pair in pairs for example in pair.examples()])
    return -torch.tensor(losses, dtype=torch.float64).view(-1, 2)


def preference_scores(
    pairs: Sequence[RenderedPair], policy: torch.Tensor, reference: torch.Tensor, preference: PreferenceSection
) -> dict[str, float]:
    """Returns the loss of DPO, and how often a model prefers the chosen reply.

    Args:
        pairs (`Sequence[RenderedPair]`): the pairs.
        policy (`torch.Tensor`): their log-probabilities by the model, from [`log_probabilities`].
        reference (`torch.Tensor`): the same by the model before training.
        preference (`PreferenceSection`): loss and `beta`.

    Returns:
        `validation_loss`; `validation_accuracy`, the share of pairs in which the chosen reply has the higher implicit
        reward, where equal rewards count one half; `validation_margin`, the mean difference of the rewards;
        `validation_likelier`, the share of pairs in which the chosen reply is more probable than the rejected one.
    """
    ratios = policy - reference
    margins = preference.beta * (ratios[:, 0] - ratios[:, 1])
    if preference.loss == "ipo":  # TRL divides by the number of tokens, as the authors of IPO do
        lengths = torch.tensor([[len(pair.chosen_ids), len(pair.rejected_ids)] for pair in pairs])
        means = ratios / lengths
        losses = (means[:, 0] - means[:, 1] - 1 / (2 * preference.beta)) ** 2
    elif preference.loss == "hinge":
        losses = torch.relu(1 - margins)
    else:
        losses = -torch.nn.functional.logsigmoid(margins)
    return {
        "validation_loss": losses.mean().item(),
        "validation_accuracy": ((margins > 0) + (margins == 0) / 2).double().mean().item(),
        "validation_margin": margins.mean().item(),
        "validation_likelier": (policy[:, 0] > policy[:, 1]).double().mean().item(),
    }
