"""What a path is that is no checkpoint of the two formats: each kind has one line, the same in every verb.

`formats.checkpoint_format` decides which format a directory has, and asks here where it has neither. What is told
apart is what people have on their disks: other formats of weights, a directory above checkpoints, a save or a download
that was not finished. Only names are looked at, and the beginnings of small files.
"""

import os
import re
from pathlib import Path

from megatron_bai.checkpoint import atomic_dir
from megatron_bai.checkpoint.hf_config import CONFIG, LFS_POINTER
from megatron_bai.errors import UserError
from megatron_bai.utils.strict_json import parse

TRACKER = "latest_checkpointed_iteration.txt"
_MAX_POINTER_BYTES = 1024  # by the specification of git-LFS
_MAX_SMALL_BYTES = 1 << 16  # of what is read to name something in a message
_READ = re.compile(  # the names of files that a verb reads
    r"(model|model-.*)\.safetensors|model\.safetensors\.index\.json|\.metadata|metadata\.json|common\.pt|.*\.distcp"
    r"|config\.json|generation_config\.json|tokenizer.*\.(json|model)|vocab\.(json|txt)|merges\.txt|spiece\.model"
    r"|sentencepiece\.bpe\.model|special_tokens_map\.json|added_tokens\.json|chat_template\.(jinja|json)"
)
_CHECKPOINT_FILES = ("model.safetensors", "model.safetensors.index.json", ".metadata", "metadata.json")
_ITERATION = re.compile(r"iter_\d+/|release/")
_STEP = re.compile(r"step-(\d{5,})/")  # of a run of this library, below its `checkpoints`
_RUN_LOG = "metrics.jsonl"  # what it writes beside them
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_NO_PICKLES = "unpickling can run code, so it is not done"
# The first pattern that a name fits decides; names of directories end in `/`. What is said follows the path.
_KINDS = tuple(
    (re.compile(pattern), text)
    for pattern, text in (
        (
            r"model_index\.json|diffusion_pytorch_model.*",
            "holds a diffusers model ({name}), and no language model: nothing here computes with it",
        ),
        (
            r"zero_to_fp32\.py|global_step\d+/|.*_model_states\.pt|zero_pp_rank_.*",
            "is a checkpoint of DeepSpeed ({name}): make safetensors of it with its own zero_to_fp32.py"
            " --safe_serialization",
        ),
        (
            r"mp_rank_\d+(_\d+)*/|model_optim_rng\.pt",
            "is a checkpoint in Megatron-LM's legacy format ({name}), pickles of one layout: write it as torch_dist"
            " with Megatron-LM's --ckpt-convert-format torch_dist",
        ),
        (
            r"adapter_config\.json|adapter_model\..*",
            "is a LoRA adapter{base} ({name}), no model: merge it into its base first (peft: merge_and_unload, then"
            " save_pretrained), and give the directory of the result",
        ),
        (
            r".*\.distcp",
            "was never finished: it has {name} and no .metadata, which is written last; give the directory of an"
            " earlier iteration",
        ),
        (
            r".*\.gguf",
            "holds GGUF weights ({name}), which are not read: give the safetensors checkpoint that they were made from",
        ),
        (
            r"(pytorch_model|consolidated|model).*\.(bin|pth|pt)(\.index\.json)?",
            f"holds pickled weights alone ({{name}}{{pointer}}), and {_NO_PICKLES}: load them with transformers once,"
            " and save_pretrained writes safetensors",
        ),
        (
            r".*\.safetensors",
            "holds {name}, and neither model.safetensors nor model.safetensors.index.json: only these names are read;"
            " save_pretrained of transformers writes them",
        ),
        (
            r".*\.(h5|msgpack|onnx|ckpt|nemo|bin|pth?|npz|ot|mlpackage/?)",
            "holds weights as {name}: only Hugging Face's safetensors and Megatron-Core's torch_dist are read",
        ),
    )
)


def require_directory(path: Path) -> None:
    """Refuse a path at which there is no directory, and say what there is.

    Args:
        path: where a checkpoint should be; a commit that was killed between its two renames is completed first.

    Raises:
        UserError: nothing is there, or a file; or it cannot be read.
    """
    atomic_dir.recover(path)
    if path.is_dir():
        if not os.access(path, os.R_OK | os.X_OK):
            raise UserError(f"{path} cannot be read: you lack the permission")
    elif path.is_symlink() and not path.exists():
        raise UserError(f"no checkpoint at {path}: it is a link to {os.readlink(path)}, which does not exist")
    elif path.exists():
        raise UserError(f"no checkpoint at {path}: {_describe_file(path)}")
    else:
        raise UserError(f"no checkpoint at {path}: {describe_missing(path) or 'give the directory of one'}")


def require_downloaded(directory: Path) -> None:
    """Refuse a directory in which a file that is read is git-LFS's pointer to it.

    Args:
        directory: of a checkpoint.

    Raises:
        UserError: names the file.
    """
    for entry in sorted(directory.iterdir()):
        if _READ.fullmatch(entry.name) and _is_pointer(entry):
            raise UserError(
                f"{entry} is a git-LFS pointer: download the file itself (`git lfs pull` in its directory, or `hf"
                " download`)"
            )


def describe_missing(path: Path) -> str:
    """Say what a path at which nothing is may mean instead: Hugging Face's names of repositories look like one.

    Args:
        path: absolute, or as it was typed.

    Returns:
        What to do; empty where it can only be a path.
    """
    relative = Path(os.path.relpath(path))
    if re.match(r"(hf|https?|s3|gs|file):", relative.parts[0]):
        return "addresses are not read, download it first and give its directory"
    if _REPOSITORY.fullmatch(relative.as_posix()) and not path.absolute().parent.exists():
        return (
            f"if it is a repository of Hugging Face, download it first (`hf download {relative.as_posix()} --local-dir"
            " DIR`) and give DIR"
        )
    return ""


def describe(directory: Path) -> str:
    """Say in one line what a directory holds that has neither of the two formats, and what to do.

    Args:
        directory: which exists.
    """
    entries = sorted(directory.iterdir())
    names = [f"{entry.name}/" if entry.is_dir() else entry.name for entry in entries]
    neither = f"{directory} holds neither a Megatron torch_dist nor a Hugging Face safetensors checkpoint"
    if not names:
        return f"{neither}: it is empty"
    for said in (
        _describe_cache(directory, names),
        _describe_iterations(directory, names),
        _describe_run(directory, names),
    ):
        if said:
            return said
    for pattern, text in _KINDS:
        if name := next((name for name in names if pattern.fullmatch(name)), None):
            pointer = ", a git-LFS pointer" if _is_pointer(directory / name) else ""
            return f"{directory} {text.format(name=name, pointer=pointer, base=_adapted_base(directory))}"
    if inside := [name for name in names if name.endswith("/") and has_checkpoint(directory / name)]:
        return f"{neither} itself: give the directory of one, {_list(directory, inside)}"
    if CONFIG in names:
        return f"{neither}: it has {CONFIG} and no weights, download them, too"
    return f"{neither}: it has {', '.join(names[:3])}{' …' if len(names) > 3 else ''}"


def _describe_file(path: Path) -> str:
    """Say what to give in place of a file."""
    if path.suffix == ".gguf":
        return "it is a file of GGUF weights, which are not read: give the safetensors checkpoint it was made from"
    if path.suffix in (".tar", ".gz", ".tgz", ".zip", ".zst", ".xz"):
        return "it is an archive, unpack it and give the directory"
    if has_checkpoint(path.parent):
        return f"it is a file, give its directory {path.parent}"
    return "it is a file, give the directory of a checkpoint"


def _describe_cache(directory: Path, names: list[str]) -> str:
    """Say which revision to give of Hugging Face's cache; empty where it is none."""
    if "snapshots/" in names and ("refs/" in names or "blobs/" in names):
        revisions = sorted(path.name for path in (directory / "snapshots").iterdir() if path.is_dir())
        main = _read_small(directory / "refs" / "main").strip()
        chosen = [main] if main in revisions else revisions
        said = f"{directory} is a repository in Hugging Face's cache: "
        if not chosen:
            return f"{said}none of its revisions was downloaded"
        return f"{said}give the directory of a revision, {_list(directory / 'snapshots', chosen)}"
    if cached := [name for name in names if name.startswith("models--") and name.endswith("/")]:
        return (
            f"{directory} is Hugging Face's cache: give the directory of a revision, such as"
            f" {directory / cached[0] / 'snapshots'}/REVISION"
        )
    return ""


def _describe_iterations(directory: Path, names: list[str]) -> str:
    """Say which iteration to give of those that a directory holds; empty where it holds none."""
    iterations = [name for name in names if _ITERATION.fullmatch(name)]
    if not iterations:
        return ""
    return f"{directory} holds iterations of a run: give the directory of one, {_list(directory, iterations[::-1])}"


def _describe_run(directory: Path, names: list[str]) -> str:
    """Say which checkpoint to give of those of a run of this library; empty where it is none.

    What a run saves at its end may be below its directory, too, and is named before the steps it can be resumed from.
    """
    above = directory / "checkpoints" if "checkpoints/" in names else directory
    steps = sorted((int(match[1]), path) for path in above.iterdir() if (match := _STEP.fullmatch(f"{path.name}/")))
    complete = [path for _, path in reversed(steps) if has_checkpoint(path)]
    if not complete and _RUN_LOG not in names:
        return ""
    said = f"{directory} is the directory of a run, and no checkpoint"
    found = [directory / name for name in names if name.endswith("/") and not _STEP.fullmatch(name)]
    found = [path for path in found if has_checkpoint(path)] + complete
    if not found:
        return f"{said}: it holds none; trainer.save and trainer.save_every have a run write them"
    more = f", or another of {len(found)}" if len(found) > 1 else ""
    return f"{said}: give the directory of one, such as {found[0]}{more}"


def list_iterations(directory: Path) -> str:
    """List the first iterations of a save directory of Megatron-LM, the latest first, after a comma; empty for none.

    Args:
        directory: which exists.
    """
    names = [entry.name for entry in sorted(directory.iterdir(), reverse=True)]
    iterations = [name for name in names if _ITERATION.fullmatch(f"{name}/")]
    return f", {_list(directory, iterations)}" if iterations else ""


def _adapted_base(directory: Path) -> str:
    """Return ` of NAME`, the base that an adapter is for; empty where it does not say."""
    try:
        content = parse(_read_small(directory / "adapter_config.json").encode())
    except ValueError:
        return ""
    name = content.get("base_model_name_or_path") if isinstance(content, dict) else None
    return f" of {name}" if isinstance(name, str) and re.fullmatch(r"[\w./~ -]{1,200}", name) else ""


def has_checkpoint(directory: Path) -> bool:
    """Return whether a directory has a file by which a checkpoint is known."""
    return any((directory / name).is_file() for name in _CHECKPOINT_FILES)


def _is_pointer(file: Path) -> bool:
    """Return whether a file is a small text that stands for one not yet downloaded."""
    try:
        if not file.is_file() or file.stat().st_size > _MAX_POINTER_BYTES:
            return False
        return file.read_bytes().startswith(LFS_POINTER)
    except OSError:
        return False


def _read_small(file: Path) -> str:
    """Return the text of a small file; empty where there is none."""
    try:
        with open(file, "rb") as stream:
            return stream.read(_MAX_SMALL_BYTES).decode(errors="replace")
    except OSError:
        return ""


def _list(directory: Path, names: list[str]) -> str:
    """Return the first paths of a list."""
    more = f" or another of {len(names)}" if len(names) > 2 else ""
    return " or ".join(str(directory / name) for name in names[: 1 if more else 2]) + more
