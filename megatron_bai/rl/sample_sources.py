"""Fingerprint what determines a run's samples beside its settings: rows, code of reward and environment, tokenizer.

Contents count, not names, places or times of files. They are entered in every checkpoint and compared when the run is
resumed, and between the ranks of a run, each of which reads its own machine's files.
"""

import ast
import hashlib
import json
import socket
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from megatron_bai import config, rewards
from megatron_bai.distributed.rank_group import RankGroup
from megatron_bai.errors import UserError

_BLOCK_BYTES = 1 << 20


def compute_sample_sources(
    settings: config.Config, tokenizer_dir: Path, chat_template: Any = None, end_tokens: Collection[int] = ()
) -> dict[str, str]:
    """Return SHA-256 by the setting or the thing that names the content.

    Args:
        settings: of the run.
        tokenizer_dir: holds `tokenizer.json`.
        chat_template: of the tokenizer that the task uses.
        end_tokens: ids that end a response, which other files than `tokenizer.json` name; empty: not entered.

    Raises:
        UserError: a file cannot be read.
    """
    sources = {
        f"data.{name}": hash_files(data_files(Path(path)))
        for name in ("train", "eval")
        if (path := getattr(settings.data, name, ""))
    }
    for name, reward in rewards.list_reward_settings(settings.reward).items():
        sources |= _reward_sources(name, reward)
    if isinstance(settings.env, config.UserEnvironment):
        sources["env.environment"] = hash_files(module_files(settings.env.environment.rpartition(":")[0]))
    elif module := _outside_module(type(settings.env)):
        sources["env"] = hash_files(module_files(module))
    sources["the tokenizer"] = hash_files(_existing(tokenizer_dir, ("tokenizer.json",)))
    named = {"the chat template": chat_template}
    if end_tokens:  # a single one as releases entered it that knew no other
        named["the end token"] = sorted(end_tokens) if len(end_tokens) > 1 else min(end_tokens)
    for name, value in named.items():
        sources[name] = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
    return sources


def _reward_sources(name: str, reward: config.Reward) -> dict[str, str]:
    """Return the hashes of the files that determine a reward.

    Args:
        name: `reward`, or that of a part of several.
        reward: its settings.
    """
    sources = {}
    if isinstance(reward, config.Function):
        sources[f"{name}.function"] = hash_files(module_files(reward.function.partition(":")[0]))
    elif module := _outside_module(type(reward)):
        sources[name] = hash_files(module_files(module))
    if isinstance(reward, config.RewardModel) and reward.tokenizer:
        sources[f"{name}.tokenizer"] = hash_files(_existing(Path(reward.tokenizer), _TOKENIZER_FILES))
    return sources


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")


def gather_sample_sources(group: RankGroup, compute: Callable[[], dict[str, str]]) -> dict[str, str]:
    """Return what all ranks read, after refusing ranks that read other contents. *Collective*.

    Args:
        group: all ranks.
        compute: gives this rank's, by `compute_sample_sources`.

    Raises:
        UserError: on every rank; names a rank, its machine and what differs.
    """
    of_ranks = group.run_on_all(lambda: (socket.gethostname(), compute()))
    first_host, first = of_ranks[0]
    for rank, (host, theirs) in enumerate(of_ranks):
        if names := list_changed_sources(first, theirs):
            raise UserError(
                f"rank {rank} on {host} reads other content than rank 0 on {first_host}: {', '.join(names)}: give all "
                "machines the same files"
            )
    return first


def list_changed_sources(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return the names of what both have with other content, in order; the settings say what only one of them has.

    Args:
        before: hashes by name, of `compute_sample_sources`.
        now: likewise.
    """
    return [name for name in sorted(before.keys() & now.keys()) if before[name] != now[name]]


def data_files(path: Path) -> list[Path]:
    """Return the files of rows at a path: itself, or those of a directory that readers take."""
    if not path.is_dir():
        return [path]
    visible = [
        file
        for file in sorted(path.rglob("*"))
        if file.is_file() and not any(part.startswith((".", "_")) for part in file.relative_to(path).parts)
    ]
    for suffix in (".parquet", ".arrow"):
        if rows := [file for file in visible if file.suffix == suffix and not file.name.startswith("cache-")]:
            return rows
    return visible


def module_files(module: str) -> list[Path]:
    """Return the source of a module and of those beside it that it imports; empty where there is no source.

    Nothing is imported. A reward's process searches the working directory first.

    Args:
        module: dotted, or a path that ends in `.py`.
    """
    roots = [Path.cwd(), *map(Path, filter(None, sys.path))]
    if module.endswith(".py"):
        roots, module = [Path(module).absolute().parent], Path(module).stem
    found = _find_module(module, roots)
    if found is None:
        return []
    root, files, waiting = found[0], set(), [module]
    installed = not {"site-packages", "dist-packages"}.isdisjoint(root.parts)
    while waiting:
        name = waiting.pop()
        top = name.partition(".")[0]
        if top == "megatron_bai" or installed and top != module.partition(".")[0]:
            continue  # its release is another matter
        parts = name.split(".")
        for length in range(1, len(parts) + 1):  # a package's own module runs, too
            other = _find_module(".".join(parts[:length]), [root])
            if other is not None and other[1] not in files:
                files.add(other[1])
                waiting += _imported_names(other[1], root)
    return sorted(files)


def hash_files(files: list[Path]) -> str:
    """Compute the SHA-256 of the contents of files, one after another, in bounded memory.

    Raises:
        UserError: one cannot be read.
    """
    digest = hashlib.sha256()
    for path in files:
        try:
            with open(path, "rb") as file:
                digest.update(f"{path.stat().st_size}\0".encode())
                while block := file.read(_BLOCK_BYTES):
                    digest.update(block)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def _outside_module(kind: type[Any]) -> str:
    """Return the module of a reward's or an environment's settings that a package registered; empty for one of ours."""
    return "" if kind.__module__.partition(".")[0] == "megatron_bai" else kind.__module__


def _existing(directory: Path, names: tuple[str, ...]) -> list[Path]:
    return [directory / name for name in names if (directory / name).is_file()]


def _find_module(module: str, roots: list[Path]) -> tuple[Path, Path] | None:
    """Return the first root that has a module, and its file."""
    relative = Path(*module.split("."))
    for root in roots:
        for path in (root / relative / "__init__.py", root / relative.with_name(relative.name + ".py")):
            if path.is_file():
                return root, path
    return None


def _imported_names(file: Path, root: Path) -> list[str]:
    """Return the dotted names of modules that a file may import, relative ones resolved below `root`."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return []  # the reward's process says what is wrong with it
    package = file.relative_to(root).parent.parts
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *filter(None, [node.module])])
            names += [base, *(f"{base}.{alias.name}".strip(".") for alias in node.names)]
    return [name for name in names if name and "*" not in name]
