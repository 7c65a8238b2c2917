"""The environment in docs/conversations.md does what the page says."""

import re
from pathlib import Path
from typing import Any

from megatron_bai.environments import Conversation, Reply

PAGE = Path(__file__).parents[2] / "docs" / "conversations.md"


def test_the_pages_environment_adds_and_pays() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    names: dict[str, Any] = {}
    exec(code, names)
    asked = ({"role": "user", "content": "3 + 4?"}, {"role": "assistant", "content": "add 3 4"})
    environment = names["Adding"]()
    assert environment.respond(Conversation(asked, "7")) == Reply(({"role": "tool", "content": "7"},))
    for said, reward in (("7", 1.0), ("8", 0.0)):
        told = (*asked, {"role": "tool", "content": "7"}, {"role": "assistant", "content": said})
        assert environment.respond(Conversation(told, "7")) == Reply(done=True, reward=reward)
