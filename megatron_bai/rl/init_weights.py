"""A run's initial weights, as `init` says: random, a checkpoint's, or those of a merge that is run at the start."""

import functools
import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_bai import config
from megatron_bai.checkpoint import crc32, formats, manifest
from megatron_bai.checkpoint.carried_files import require_tokenizer
from megatron_bai.checkpoint.formats import open_checkpoint
from megatron_bai.checkpoint.reader import CheckpointReader
from megatron_bai.data.tokenizer import build_tokenizer
from megatron_bai.distributed.rank_group import current_ranks, merge_ranks
from megatron_bai.errors import UserError
from megatron_bai.merge import pipeline
from megatron_bai.merge.recipe.output_spec import make_output_spec
from megatron_bai.merge.recipe.recipe import ORIGINAL_SETTINGS
from megatron_bai.model import megatron_checkpoint, param_shards
from megatron_bai.model.architecture import Architecture, architecture_of, require_same
from megatron_bai.model.build import MegatronModel
from megatron_bai.model.load_weights import load_weights
from megatron_bai.utils.dataclass_defaults import drop_later_defaults

_log = logging.getLogger(__name__)
_SAMPLED_BYTES = 1 << 20


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


def require_sources(settings: config.Config) -> None:
    """Refuse checkpoints and tokenizers that a run names and could not start from, before a process group is made.

    Raises:
        UserError: names the directory, and what it is in place of a complete checkpoint.
    """
    for source in list_sources(settings):
        source.require()


@dataclass(frozen=True)
class Source:
    """A directory that a run reads.

    Attributes:
        setting: that names it.
        path: of the directory.
        check: raises a UserError where it cannot be used, as far as its index tells.
    """

    setting: str
    path: str
    check: Callable[[str], object]

    def require(self) -> None:
        """Refuse a directory that cannot be used.

        Raises:
            UserError: names the setting, the directory, and what it is in place of what it should be.
        """
        try:
            self.check(self.path)
        except UserError as error:
            raise UserError(f"{self.setting}: {error}") from None


def list_sources(settings: config.Config) -> list[Source]:
    """List the checkpoints and tokenizers that a run reads at its start, but for the result of its own merge."""
    found = []
    if isinstance(settings.init, config.CheckpointInit):
        found.append(Source("init.checkpoint", settings.init.checkpoint, _require_complete_model))
    if isinstance(settings.init, config.MergeInit):
        # `merge.keep` may take the output layer from the pretrained checkpoint; the plan of the merge knows.
        check = functools.partial(formats.require_model, output_layer=not settings.merge.keep)
        found += [Source("init=merge", path, check) for path in list_merge_sources(settings.merge)]
    critic = getattr(settings.objective, "critic_checkpoint", "")
    found.append(Source("objective.critic_checkpoint", critic, _require_complete_model))
    found.append(Source("reward.tokenizer", getattr(settings.reward, "tokenizer", ""), require_tokenizer))
    return [source for source in found if source.path]


def _require_complete_model(directory: str) -> None:
    """Refuse what is no complete checkpoint of a model."""
    formats.require_model(directory)
    formats.require_complete(directory)


def weight_crcs(directory: str | Path) -> dict[str, int]:
    """Return CRC-32s that tell the weights of a checkpoint from others: its manifest's, of each whole file.

    Without a manifest they are of the first and the last MiB of each file, since reading all of it takes minutes: other
    weights differ there, too.

    Raises:
        UserError: the manifest cannot be read.
    """
    if recorded := manifest.recorded_crcs(directory):
        return recorded
    found = {}
    for path in sorted(path for path in Path(directory).iterdir() if path.suffix in manifest.WEIGHT_SUFFIXES):
        size = path.stat().st_size
        length = min(size, _SAMPLED_BYTES)
        ends = crc32.compute_file(path, 0, length), crc32.compute_file(path, size - length, length)
        found[path.name] = ends[0] ^ ends[1] << 1 ^ size
    return found


def list_merge_sources(merge: config.Merge) -> list[str]:
    """Return the directories that a merge reads, the pretrained checkpoint first."""
    return [term.source for term in pipeline.make_jobs(merge)[0].recipe.terms()]


def run_init_merge(settings: config.Config) -> None:
    """Run the merge of `init=merge` on all ranks, unless it is complete already. Collective.

    Args:
        settings: of the run, whose model is its `Architecture`.

    Raises:
        UserError: as the verb `merge`; or its result would not be the configured model, or `merge.output` holds
            another merge, which is left unchanged.
    """
    if not isinstance(settings.init, config.MergeInit):
        return
    current_ranks().run_on_first(lambda: _check_sources(settings.merge, architecture_of(settings.model)))
    with merge_ranks() as ranks:
        summary = pipeline.run_merge(settings.merge, ranks, replace=False)
        if ranks.rank == 0:
            _log.info(summary)


def _check_sources(merge: config.Merge, model: Architecture) -> None:
    """Refuse a merge whose result could not be loaded, before hours of merging; the first source gives its config."""
    base = Path(list_merge_sources(merge)[0])
    formats.checkpoint_format(base)
    require_same(base, model)
    require_tokenizer(find_merged_tokenizer(merge))


def find_merged_tokenizer(merge: config.Merge) -> Path:
    """Return the source whose tokenizer the output of a merge gets: `merge.tokenizer`, or the first that has one."""
    sources = [Path(source) for source in list_merge_sources(merge)]
    with_tokenizer = (path for path in sources if (path / "tokenizer.json").is_file())
    return make_output_spec(merge).tokenizer or next(with_tokenizer, sources[0])


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
            assert isinstance(settings.data, config.Generated)  # other data brings the checkpoint's tokenizer
            build_tokenizer(settings.data, settings.model.vocab_size).save_pretrained(directory)
        dist.barrier()
        return directory
    formats.require_complete(source)
    ranks = current_ranks()
    with ExitStack() as stack:
        readers: list[CheckpointReader] = []
        ranks.run_on_all(lambda: readers.append(stack.enter_context(open_checkpoint(source))))
        load_weights(actor, source)
        ranks.run_on_all(readers[0].require_unchanged)  # its config.json and tokenizer, too
    return Path(source)


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
    if source and not manifest.has_manifest(Path(source)):
        formats.require_complete(source)
        with open_checkpoint(source) as reader:
            return reader.stat_fingerprint()
    return manifest.require_info(source) if source else None
