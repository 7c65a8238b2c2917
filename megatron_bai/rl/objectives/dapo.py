"""DAPO's token mean (arXiv 2503.14476, eq. 8): GRPO's loss, in which every token weighs the same."""

from megatron_bai import config
from megatron_bai.rl.objectives import grpo
from megatron_bai.rl.objectives.checks import validate_clipping
from megatron_bai.rl.objectives.objective import Mean, Objective


def token_mean(settings: config.Dapo | config.Cispo) -> Mean:
    """Return how tokens are averaged.

    The paper takes the mean over the tokens of each prompt's group, then over prompts (`token_mean=prompt`); its
    implementations take one mean over the mini-batch (`batch`).
    """
    return "prompt_mean" if settings.token_mean == "prompt" else "token_mean"


OBJECTIVE = Objective(grpo.loss, config.Dapo, token_mean, validate_clipping)
