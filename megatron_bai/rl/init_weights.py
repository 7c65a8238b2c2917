"""A run's initial weights, as `init` says: random, a checkpoint's, or those of a merge that is run at the start."""

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_bai import config
from megatron_bai.checkpoint import manifest
from megatron_bai.checkpoint.formats import open_checkpoint
from megatron_bai.data.tokenizer import build_tokenizer
from megatron_bai.distributed.rank_group import current_ranks, merge_ranks
from megatron_bai.errors import UserError
from megatron_bai.merge import pipeline
from megatron_bai.merge.recipe.output_spec import make_output_spec
from megatron_bai.merge.recipe.recipe import ORIGINAL_SETTINGS
from megatron_bai.model import hf_checkpoint, megatron_checkpoint, param_shards
from megatron_bai.model.build import MegatronModel
from megatron_bai.utils.dataclass_defaults import drop_later_defaults

_log = logging.getLogger(__name__)


def validate_init(settings: config.Config) -> None:
    """Refuse initial weights that a run cannot start from, by name, before any work starts.

    Raises:
        UserError: names the settings.
    """
    init, merge = settings.init, settings.merge
    if isinstance(init, config.CheckpointInit) and not init.checkpoint:
        raise UserError("init.checkpoint is empty: give a checkpoint's directory, or choose init=random or init=merge")
    if not isinstance(init, config.MergeInit):
        return
    if merge.dry_run:
        raise UserError("merge.dry_run=true merges nothing that init=merge could start from: use the verb merge for it")
    if merge.sweep:
        raise UserError("merge.sweep gives several outputs, init=merge starts from one: set merge.alpha (or its like)")
    target = pipeline.make_jobs(merge)[0].target
    if settings.trainer.save and Path(settings.trainer.save).resolve() == target.resolve():
        raise UserError(f"trainer.save and merge.output are both {target}: the merge would be written over")


def run_init_merge(settings: config.Config) -> None:
    """Run the merge of `init=merge` on all ranks, unless it is complete already. Collective.

    Raises:
        UserError: as the verb `merge`; or its result would not be the configured model, or `merge.output` holds
            another merge, which is left unchanged.
    """
    if not isinstance(settings.init, config.MergeInit):
        return
    base = pipeline.make_jobs(settings.merge)[0].recipe.terms()[0].source  # has the output's config and tokenizer
    current_ranks().run_on_first(lambda: _check_base(Path(base), settings.model))
    with merge_ranks() as ranks:
        summary = pipeline.run_merge(settings.merge, ranks, replace=False)
        if ranks.rank == 0:
            _log.info(summary)


def _check_base(base: Path, model: config.Model) -> None:
    """Refuse a merge whose result could not be loaded, before hours of merging."""
    if not base.is_dir():
        raise UserError(f"no checkpoint at {base}: merge.pretrained and merge.members name directories")
    megatron_checkpoint.require_architecture(base, model)
    require_tokenizer(base)


def load_initial_weights(actor: MegatronModel, settings: config.Config) -> Path:
    """Load the actor's initial weights, after `run_init_merge`. Collective.

    Args:
        actor: in place.
        settings: of the run.

    Returns:
        The directory of its tokenizer.

    Raises:
        UserError: the checkpoint cannot be used.
    """
    source = config.initial_checkpoint(settings)
    if not source:
        param_shards.init_random(actor.modules, settings.model, settings.run.seed)
        megatron_checkpoint.reload_master_weights(actor)
        directory = Path(settings.run.dir) / "tokenizer"
        if dist.get_rank() == 0:
            assert isinstance(settings.data, config.Arithmetic)  # other data brings the checkpoint's tokenizer
            build_tokenizer(settings.data, settings.model.vocab_size).save_pretrained(directory)
        dist.barrier()
        return directory
    manifest.require_info(source)
    if megatron_checkpoint.checkpoint_format(source) == "hf":
        megatron_checkpoint.require_architecture(source, settings.model)
        hf_checkpoint.load_hf(actor.modules, settings.model, source)
        megatron_checkpoint.reload_master_weights(actor)
    else:
        megatron_checkpoint.load(actor, source)
    return Path(source)


def require_tokenizer(directory: Path) -> None:
    """Raise a UserError unless the directory holds a tokenizer."""
    if not (directory / "tokenizer.json").is_file():
        raise UserError(f"{directory} holds no tokenizer.json: copy the model's tokenizer files there")


def weights_fingerprint(settings: config.Config) -> Any:
    """Return what determines the initial weights beside `run.seed`, as JSON: equal ones are the same weights.

    Raises:
        UserError: a checkpoint that they come from cannot be used.
    """
    if isinstance(settings.init, config.MergeInit):
        recipe = pipeline.make_jobs(settings.merge)[0].recipe
        with ExitStack() as stack:
            sources = [stack.enter_context(open_checkpoint(term.source)).stat_fingerprint() for term in recipe.terms()]
        form = str(make_output_spec(settings.merge).fingerprint_fields())
        options = drop_later_defaults(recipe.settings, type(recipe), ORIGINAL_SETTINGS)
        return [recipe.method, options, [term.coefficient for term in recipe.terms()], sources, form]
    source = config.initial_checkpoint(settings)
    return manifest.require_info(source) if source else None
