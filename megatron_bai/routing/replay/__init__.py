"""Record the experts a Megatron-Core model chooses and force recorded ones: R2 and R3 (docs/replay.md)."""

from megatron_bai.routing.replay.forward_step_routes import ForwardStepRoutes
from megatron_bai.routing.replay.replay_pass import MicroRoutes
from megatron_bai.routing.replay.routing_replay import RoutingReplay

__all__ = ["ForwardStepRoutes", "MicroRoutes", "RoutingReplay"]
