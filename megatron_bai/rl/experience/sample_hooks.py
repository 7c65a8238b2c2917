"""What happens to a sample between its requests and at its end: the environment's replies, and its reward."""

from megatron_bai.data.task import Prompt
from megatron_bai.rewards import make_scoring
from megatron_bai.rl.session import Session
from megatron_bai.rollout.conversation import OnComplete
from megatron_bai.rollout.turns import TurnEnvironment


def make_sample_hooks(
    session: Session, prompts: list[Prompt] | None
) -> tuple[TurnEnvironment | None, OnComplete | None]:
    """Return what replies to turns of these prompts' samples, and what rewards a sample that is complete.

    Args:
        session: of the run, on a leader.
        prompts: indexed by `Sample.prompt_index`; None: no turn is replied to, and nothing is rewarded.
    """
    if prompts is None:
        return None, None
    assert session.scorer
    environment = session.environment.for_prompts(prompts) if session.environment else None
    return environment, make_scoring(session.scorer, session.task, prompts)
