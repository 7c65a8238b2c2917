"""Run as a script: the probe of a release without a row, healthy and with faults. Argument: a directory.

The installed release is taken out of the table; the compatibility fix for a CPU still names it. Each of FAULTS is a
fork with one thing of Megatron-Core's replaced; `NAME.json` is what the probe answers there.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from processes import prepare

from megatron_bai.compat import releases


def healthy() -> None:
    """Nothing is replaced."""


def ignores_forced_routes() -> None:
    from megatron.core.transformer.moe.router_replay import RouterReplay

    def choose(self: Any, scores: Any, topk: int, num_groups: Any, group_topk: Any, default: Callable) -> Any:
        probs, chosen = default(scores, topk, num_groups=num_groups, group_topk=group_topk)
        if self.router_replay_action is not None and "RECORD" in self.router_replay_action.name:
            self.record_indices(chosen)
        return probs, chosen

    RouterReplay.get_replay_topk = choose


def weighs_forced_routes_otherwise() -> None:
    from megatron.core.transformer.moe.router_replay import RouterReplay

    inner = RouterReplay.get_replay_topk

    def choose(self: Any, *arguments: Any, **named: Any) -> Any:
        probs, chosen = inner(self, *arguments, **named)
        return (probs * 1.001 if self.target_topk_idx is not None else probs), chosen

    RouterReplay.get_replay_topk = choose


def records_otherwise() -> None:
    from megatron.core.transformer.moe.router_replay import RouterReplay

    inner = RouterReplay.get_replay_topk

    def choose(self: Any, *arguments: Any, **named: Any) -> Any:
        probs, chosen = inner(self, *arguments, **named)
        return (probs if self.router_replay_action is None else probs * 1.001), chosen

    RouterReplay.get_replay_topk = choose


def stops_gradients() -> None:
    from megatron.core.transformer.moe.router import TopKRouter

    inner = TopKRouter.routing

    def routing(self: Any, *arguments: Any, **named: Any) -> Any:
        probs, chosen = inner(self, *arguments, **named)
        return probs.detach() + 0 * self.weight.sum(), chosen

    TopKRouter.routing = routing


def has_no_replay() -> None:
    from megatron.core.transformer.moe.router import TopKRouter

    inner = TopKRouter.__init__

    def build(self: Any, *arguments: Any, **named: Any) -> None:
        inner(self, *arguments, **named)
        self.router_replay = None

    TopKRouter.__init__ = build


def loads_other_weights() -> None:
    from megatron.core import dist_checkpointing

    inner = dist_checkpointing.load

    def load(state: Any, *arguments: Any, **named: Any) -> Any:
        loaded = inner(state, *arguments, **named)
        loaded["model0"]["decoder.final_layernorm.weight"].mul_(1.001)
        return loaded

    dist_checkpointing.load = load


def cannot_be_built() -> None:
    from megatron.core.models.gpt import GPTModel

    def build(*_: Any, **__: Any) -> None:
        raise TypeError("unexpected keyword argument 'vp_stage'\nand more")

    GPTModel.__init__ = build


FAULTS = (
    healthy, ignores_forced_routes, weighs_forced_routes_otherwise, records_otherwise, stops_gradients, has_no_replay,
    loads_other_weights, cannot_be_built,
)  # fmt: skip


def main(directory: Path) -> None:
    prepare("megatron.core.models.gpt", "megatron_bai.routing.release_probe")
    from megatron_bai.routing import release_probe

    del releases.MEGATRON[releases.installed_megatron()]
    for fault in FAULTS:
        if os.fork() == 0:
            os.dup2(os.open(directory / f"{fault.__name__}.json", os.O_WRONLY | os.O_CREAT), 1)
            sys.argv = ["release_probe", '{"kind": "cpu"}']
            try:
                fault()
                release_probe.main()
            finally:
                os._exit(0)
        os.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
