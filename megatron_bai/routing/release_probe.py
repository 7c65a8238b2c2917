"""What a release of Megatron-Core must do that nobody has tried with this package.

`python -m megatron_bai.routing.release_probe SETTINGS`, those of `backend` as JSON: in a world of one process, on a
model of one MoE layer. Prints a JSON object: `verified`, a line for each claim, or `failed`, the first claim that does
not hold and why. `distributed/release_admission.py` starts it.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from megatron_bai import config
from megatron_bai.compat import releases
from megatron_bai.distributed import backend
from megatron_bai.distributed.kernel_sources import format_kernels
from megatron_bai.errors import UserError
from megatron_bai.model import build, megatron_checkpoint, param_shards
from megatron_bai.routing.replay.replay_pass import MicroRoutes
from megatron_bai.routing.replay.routing_replay import RoutingReplay

MODEL = config.Model(
    num_layers=1, hidden_size=32, num_attention_heads=4, num_query_groups=2, head_dim=8, num_experts=8, moe_topk=2,
    moe_ffn_hidden_size=16, vocab_size=64, max_position_embeddings=32, init_std=0.1,
)  # fmt: skip
_BATCH, _LENGTH = 2, 16


@dataclass
class Probe:
    """The model that is probed, with its routers."""

    model: build.MegatronModel
    replay: RoutingReplay
    tokens: torch.Tensor

    def run(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits, `[B, T, V]`, and the gradient of the router's weight, `[E, H]`."""
        gpt = self.model.modules[0]
        positions = torch.arange(_LENGTH, device=self.tokens.device).expand(_BATCH, -1)
        logits = gpt(self.tokens, positions, None)
        (weight,) = (value for name, value in gpt.named_parameters() if name.endswith("mlp.router.weight"))
        (gradient,) = torch.autograd.grad(logits.float().square().sum(), [weight])
        return logits.detach(), gradient


def _check_identity(probe: Probe) -> list[MicroRoutes]:
    """Raise unless routes that were recorded and are forced leave output and gradient as they were, bit for bit.

    Returns:
        The routes.
    """
    live = probe.run()
    with probe.replay.record() as routes:
        recorded = probe.run()
    with probe.replay.force(routes):
        forced = probe.run()
    _require(all(map(torch.equal, live, recorded)), "recording changes the output")
    _require(all(map(torch.equal, live, forced)), "the output differs from the live one")
    _require(bool(live[1].any()), "the router has no gradient")
    return routes


def _check_other_routes(probe: Probe, routes: list[MicroRoutes]) -> None:
    """Raise unless other routes than the recorded ones change output and gradient."""
    others = [MicroRoutes((micro.ids.long() + 1) % MODEL.num_experts) for micro in routes]
    live = probe.run()
    with probe.replay.force(others):
        forced = probe.run()
    _require(not torch.equal(live[0], forced[0]), "the output is the live one")
    _require(bool(forced[1].any()) and not torch.equal(live[1], forced[1]), "the router's gradient is the live one")


def _check_checkpoint(probe: Probe) -> None:
    """Raise unless weights that are saved, changed and loaded are those that were saved, and compute the same."""
    model, before = probe.model, probe.run()[0]
    weights = [value.detach().clone() for value in model.modules[0].parameters()]
    with TemporaryDirectory(prefix="megatron-bai-") as directory:
        megatron_checkpoint.save(model, Path(directory) / "saved", directory, {})
        param_shards.init_random(model.modules, model.architecture, seed=1)
        _require(not torch.equal(probe.run()[0], before), "other weights compute the same")
        megatron_checkpoint.load(model, Path(directory) / "saved")
    _require(all(map(torch.equal, model.modules[0].parameters(), weights)), "the weights loaded are not those saved")
    _require(torch.equal(probe.run()[0], before), "the output differs after loading")


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise UserError(what)


def verify(settings: config.Backend) -> list[str]:
    """Verify the installed release, claim by claim.

    Args:
        settings: of the model that is probed.

    Returns:
        A line for each claim.

    Raises:
        UserError: the first claim that does not hold, with the reason.
    """
    releases.admit_megatron(releases.installed_megatron() or "")
    verified: list[str] = []

    def claim(text: str, check: Callable[[], Any]) -> Any:
        try:
            result = check()
        except Exception as error:  # whatever a foreign release raises
            raise UserError(f"{text}: {_first_line(error)}") from error
        verified.append(text)
        return result

    probe: Probe = claim(
        "a model of one MoE layer is built with its optimizer, and its router bound", lambda: _build(settings)
    )
    try:
        routes = claim("recorded routes, forced, change no bit", lambda: _check_identity(probe))
        claim("other routes change output and gradient", lambda: _check_other_routes(probe, routes))
        claim("a checkpoint is saved and loaded bit for bit", lambda: _check_checkpoint(probe))
    finally:
        backend.shutdown_backend()
    return verified


def _build(chosen: config.Backend) -> Probe:
    """Build the model, with random weights."""
    settings = config.Config(model=MODEL, backend=chosen)
    device = backend.join_world(settings.backend)
    build.init_parallel(settings.parallel, seed=0)
    model = build.build_actor(settings, device)
    format_kernels(device.use_transformer_engine)  # asks modules of its optimizers, as a run does
    param_shards.init_random(model.modules, model.architecture, seed=0)
    tokens = torch.randint(MODEL.vocab_size, (_BATCH, _LENGTH), generator=torch.Generator().manual_seed(0))
    return Probe(model, RoutingReplay(model.chunks), tokens.to(device.device))


def _first_line(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def main() -> None:
    """Print the result as a line of JSON."""
    try:
        answer: dict[str, Any] = {"verified": verify(config.Backend(**json.loads(sys.argv[1])))}
    except UserError as error:
        answer = {"failed": str(error)}
    sys.stdout.flush()
    os.write(1, f"{json.dumps(answer)}\n".encode())


if __name__ == "__main__":
    main()
