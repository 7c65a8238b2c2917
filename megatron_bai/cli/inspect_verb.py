"""The verb `inspect`: of a checkpoint or of a store of routes, as the directory says; and of a model's routing."""

import os

from megatron_bai import config
from megatron_bai.cli import inspect_routing
from megatron_bai.errors import UserError
from megatron_bai.routing.store.route_store import is_store


def run(settings: config.Config) -> None:
    """Describe `inspect.path` and, with `inspect.other`, compare the two; report its routing where that is wanted.

    Raises:
        UserError: one is neither a complete checkpoint nor a store of routes, or they are not of one kind; or the
            routing cannot be reported.
    """
    path, other = settings.inspect.path, settings.inspect.other
    if not path:
        raise UserError("inspect.path is empty: give the directory of a checkpoint or of a store of routes")
    if other and is_store(path) != is_store(other):
        raise UserError(f"one of {path} and {other} holds routes and the other does not: compare two of one kind")
    routing = inspect_routing.is_wanted(settings.inspect)
    if is_store(path):
        if routing:
            raise UserError(f"{path} is a store of routes: inspect.routing, .parents and .prompts are for checkpoints")
        from megatron_bai.routing.store.store_stats import print_store

        print_store(path, other)
        return
    from megatron_bai.merge.compare import inspect_checkpoint

    if not routing or int(os.environ.get("RANK", 0)) == 0:
        inspect_checkpoint(settings)
    if routing:
        inspect_routing.inspect_routing(settings)
