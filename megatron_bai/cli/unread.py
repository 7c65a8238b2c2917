"""Words of a command line that the verb would never read: refused by name, since they were meant to do something."""

import re
from collections.abc import Sequence

from omegaconf import DictConfig, OmegaConf

from megatron_bai.cli.overrides import parse_word
from megatron_bai.cli.verbs import VERBS, Verb
from megatron_bai.errors import UserError

# Choices that set something of several groups: `experiment`, `cluster` and `updates`; `init=merge` sets `merge.output`.
_PRESETS = ("experiment", "cluster", "updates", "init")


def refuse_unread(verb: Verb, words: Sequence[str], composed: DictConfig) -> None:
    """Refuse settings that a command line gives and the verb never reads.

    An experiment describes a whole run, so what is given beside `experiment=NAME` is for all verbs, as what it sets is.

    Args:
        verb: an entry of `VERBS`.
        words: of its command line.
        composed: the settings, with their references: `${trainer.save}` in a group that is read reads `trainer.save`.

    Raises:
        UserError: names the setting, and the verbs that read it.
    """
    if any(word.startswith("experiment=") for word in words):
        return
    read = {*verb.groups, *verb.also_reads, "run"}
    referenced: set[str] | None = None
    for word in words:
        override = parse_word(word)
        if override is None:
            continue
        group = override.key.partition(".")[0]
        if group in read or override.key in _PRESETS:
            continue
        if referenced is None:
            referenced = _references(composed, read)
        if not any(name == override.setting or name.startswith(f"{override.key}.") for name in referenced):
            readers = [name for name, other in VERBS.items() if group in (*other.groups, *other.also_reads)]
            own = next(name for name, other in VERBS.items() if other is verb)
            raise UserError(
                f"{override.setting} is given, and the verb {own} never reads it: leave it out"
                + (f" (it is for {', '.join(readers)})" if readers else "")
            )


def _references(composed: DictConfig, groups: set[str]) -> set[str]:
    """Return the settings that those of some groups refer to, directly or not."""
    found: set[str] = set()
    texts = [
        OmegaConf.to_yaml(OmegaConf.create({"group": OmegaConf.to_container(composed[name])}))
        for name in sorted(groups & set(composed))
    ]
    while texts:
        for name in re.findall(r"\$\{([\w.]+)\}", texts.pop()):
            if name not in found:
                found.add(name)
                group, _, key = name.partition(".")
                node = OmegaConf.to_container(composed[group]) if group in composed else {}
                texts.append(str(node.get(key, "")) if isinstance(node, dict) else "")
    return found
