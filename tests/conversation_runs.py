"""Runs with conversations: an environment in a file, rows, and a tokenizer with a chat template."""

import json
from pathlib import Path

CHAT = (
    "{% for message in messages %}{% if message.role == 'assistant' %}<assistant>{{ message.content }}<eos>"
    "{% else %}<user>{{ message.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
ENVIRONMENT = """
from megatron_bai.environments import Conversation, Reply


class Counting:
    def __init__(self, settings):
        self.turns = min(3, settings.max_turns)

    def respond(self, conversation: Conversation) -> Reply:
        said, seen = conversation.messages[-1]["content"], (conversation.state or 0) + 1
        assert seen == conversation.num_turns and len(conversation.messages) == 2 * seen
        if len(said) % 7 == 6:
            raise ValueError("a turn of this length is too much")
        reward = len(said) % 5 / 4
        if seen == self.turns or len(said) % 5 == 4:
            return Reply(done=True, reward=reward)
        return Reply(({"role": "tool", "content": f"{len(said) % 9}+{seen}="},), reward=reward, state=seen)
"""


def add_chat(checkpoint: Path) -> None:
    """Give a checkpoint's tokenizer the chat template."""
    (checkpoint / "chat_template.jinja").write_text(CHAT)


def conversation_settings(directory: Path) -> list[str]:
    """Settings of a small run whose rollouts are conversations, some of which the environment fails."""
    rows = [{"prompt": f"{i % 10}+{i % 7}", "answer": str(i % 10 + i % 7)} for i in range(80)]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "counting.py").write_text(ENVIRONMENT)
    return [
        "data=dataset", f"data.train={directory}/rows.jsonl", "data.hold_out=0.3", "data.eval_prompts=2",
        "env=class", f"env.environment={directory}/counting.py:Counting", "env.max_turns=3", "reward=environment",
        "trainer.prompts_per_step=4", "trainer.group_size=2", "trainer.mini_batches=1", "trainer.micro_batch_size=4",
        "trainer.eval_every=1", "monitor.tensorboard=false", "monitor.samples=64",
    ]  # fmt: skip
