"""The verb `inspect`: of a checkpoint or of a store of routes, as the directory says."""

from megatron_bai import config
from megatron_bai.errors import UserError
from megatron_bai.routing.store.route_store import is_store


def run(settings: config.Config) -> None:
    """Describe `inspect.path` and, with `inspect.other`, compare the two.

    Raises:
        UserError: one is neither a complete checkpoint nor a store of routes, or they are not of one kind.
    """
    path, other = settings.inspect.path, settings.inspect.other
    if not path:
        raise UserError("inspect.path is empty: give the directory of a checkpoint or of a store of routes")
    if other and is_store(path) != is_store(other):
        raise UserError(f"one of {path} and {other} holds routes and the other does not: compare two of one kind")
    if is_store(path):
        from megatron_bai.routing.store.store_stats import print_store

        print_store(path, other)
        return
    from megatron_bai.merge.compare import inspect_checkpoint

    inspect_checkpoint(settings)
