"""What goes wrong ends as one clear line and a non-zero exit code, and leaves no process behind."""

import json
import re
import shutil
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from command import SERVER, Command, Result, succeeded
from pipeline import ONE_PROCESS, Demo

from megatron_bai.model import manifest

pytestmark = [pytest.mark.live, pytest.mark.distributed]

LONG = ["trainer.prompts_per_step=512", "rollout.deterministic=false"]  # its first rollout goes on for a while


def damaged(demo: Demo, name: str, damage: Callable[[Path], None]) -> str:
    """The setting that starts from a copy of the actor with something wrong."""
    copy = demo.logs / "damaged" / name
    shutil.copytree(demo.actor, copy)
    damage(copy)
    return f"init.checkpoint={copy}"


def truncate(checkpoint: Path) -> None:
    shard = max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])


def forget_tokenizer(checkpoint: Path) -> None:
    """As if made without one: complete by its manifest."""
    noted = json.loads((checkpoint / "manifest.json").read_text())
    for name in [name for name in noted["files"] if name.startswith("tokenizer")]:
        (checkpoint / name).unlink()
        del noted["files"][name]
    noted["crc32"] = manifest._sum_of({name: noted[name] for name in ("version", "files", "info")})
    (checkpoint / "manifest.json").write_text(json.dumps(noted))


def garble_tokenizer(checkpoint: Path) -> None:
    """Same size, other content."""
    path = checkpoint / "tokenizer.json"
    path.write_text("x" * path.stat().st_size)


def otherwise(demo: Demo) -> list[str]:
    """Settings that would train over a checkpoint made with others."""
    return ["objective=sft", f"init.checkpoint={demo.directory}/pretrained", f"trainer.save={demo.directory}/instruct"]


# mistake → the verb and what is wrong in its settings, in one process
WRONG: dict[str, Callable[[Demo], list[str]]] = {
    "override": lambda demo: ["train", "trainer.stepz=3"],
    "missing": lambda demo: ["train", f"init.checkpoint={demo.logs}/nowhere"],
    "unfinished": lambda demo: ["train", damaged(demo, "unfinished", lambda copy: (copy / "manifest.json").unlink())],
    "truncated": lambda demo: ["train", damaged(demo, "truncated", truncate)],
    "tokenizer": lambda demo: ["train", damaged(demo, "tokenizer", forget_tokenizer)],
    "garbled": lambda demo: ["train", damaged(demo, "garbled", garble_tokenizer)],
    "vocabulary": lambda demo: ["train", "model.vocab_size=128"],
    "prompts": lambda demo: ["train", "trainer.prompts_per_step=15"],
    "micro-batch": lambda demo: ["train", "trainer.micro_batch_size=24"],
    "otherwise": lambda demo: ["train", *otherwise(demo)],
    "weights": lambda demo: ["merge", "merge.weights=[0.5,0.6]"],
    "member": lambda demo: ["merge", f"merge.pretrained={demo.logs}/nowhere"],
    "convert": lambda demo: ["convert", f"convert.source={demo.actor}", f"convert.target={demo.directory}/instruct"],
    "serve": lambda demo: ["serve", f"serve.checkpoint={demo.directory}/tokenizer"],
}
# mistake → what the line must name
NAMED = {
    "override": "trainer.stepz",
    "missing": r"no checkpoint at .*/nowhere",
    "unfinished": r"damaged/unfinished has no manifest.json: it was never finished",
    "truncated": r"damaged/truncated/.*\.distcp has \d+ bytes instead of \d+",
    "tokenizer": r"damaged/tokenizer holds no tokenizer.json",
    "garbled": r"damaged/garbled/tokenizer.json is not what was written",
    "vocabulary": r"vocab_size 64, the configured model.vocab_size is 128",
    "prompts": r"trainer.prompts_per_step \(15\) is not a multiple of trainer.mini_batches \(2\)",
    "micro-batch": r"trainer.micro_batch_size \(24\) does not divide the 64 samples",
    "otherwise": r"/instruct was made with other settings: remove it",
    "weights": r"merge.weights .* 1.1",
    "member": r"/nowhere",
    "convert": r"instruct exists: remove it",
    "serve": r"tokenizer holds neither a Megatron torch_dist nor a Hugging Face safetensors checkpoint",
}


@pytest.fixture(scope="module")
def mistakes(demo: Demo) -> dict[str, Result]:
    """What came of every mistake in one process, each in a fork of a process that has imported everything."""
    directory = demo.logs / "mistakes"
    members = f"merge.members=[{demo.directory}/instruct,{demo.directory}/reasoning]"
    merge = [f"merge.pretrained={demo.directory}/pretrained", members, f"merge.output={directory}/merged"]
    shared = ["experiment=demo", f"run.dir={directory}/run", "init=checkpoint", f"init.checkpoint={demo.actor}"]
    shared += [*merge, *ONE_PROCESS]
    cases = {}
    for name, wrong in WRONG.items():
        verb, *changes = wrong(demo)
        cases[name] = [verb, *shared, *changes]
    command = Command(directory, sys.executable, Path(__file__).with_name("forks.py"), directory, json.dumps(cases))
    orphans = succeeded(command).orphans
    outcomes = json.loads((directory / "codes.json").read_text())
    words = {name: [(directory / f"{name}.{s}").read_text() for s in ("out", "err")] for name in cases}
    return {name: Result(code, *words[name], orphans) for name, code in outcomes.items()}


@pytest.mark.parametrize("name", NAMED)
def test_a_mistake_is_one_clear_line(mistakes: dict[str, Result], name: str, demo: Demo) -> None:
    result = mistakes[name]
    assert len(result.complaints) == 1 and re.search(NAMED[name], result.complaints[0]), result.err
    assert (result.code, result.err) == (2, f"megatron-bai: error: {result.complaints[0]}\n")


def test_a_mistake_changes_nothing(mistakes: dict[str, Result], demo: Demo) -> None:
    assert not (demo.logs / "mistakes" / "merged").exists()
    assert not (demo.logs / "mistakes" / "run").exists()  # nor is a server started


def servers(command: Command) -> list[psutil.Process]:
    """The server's processes, the first one first. Its workers change their names."""
    first = next(iter(command.processes(SERVER)), None)
    return [first, *first.children(recursive=True)] if first else []


def sampling(demo: Demo, name: str, processes: int, *more: str) -> Command:
    """A run in the middle of its first rollout."""
    command = demo.reinforce(name, processes, *LONG, *more)
    return command.until_sampling(demo.logs / name / "run" / "server.log")


def starting(demo: Demo, name: str) -> Command:
    """A run whose server is starting its workers."""
    command = demo.reinforce(name, 1, *LONG, *ONE_PROCESS)
    return command.until(lambda: len(servers(command)) >= 2)


def wrong_world(demo: Demo) -> Result:
    return demo.reinforce("wrong-world", 2, "parallel.pipeline=2").wait()


def kill_server(demo: Demo) -> Result:
    command = sampling(demo, "killed-server", 2)
    servers(command)[0].kill()
    return command.wait()


def hang_server(demo: Demo) -> Result:
    limits = ["rollout.request_timeout_s=3", "rollout.retries=0"]
    command = sampling(demo, "hanging-server", 1, *ONE_PROCESS, *limits)
    servers(command)[0].suspend()
    return command.wait()


def interrupt(demo: Demo) -> Result:
    return sampling(demo, "interrupted", 1, *ONE_PROCESS).send(signal.SIGINT).wait()


def terminate(demo: Demo) -> Result:
    return starting(demo, "terminated").send(signal.SIGTERM).wait()


def kill_rank(demo: Demo) -> Result:
    command = starting(demo, "killed-rank")
    servers(command)[0].parent().kill()
    return command.wait()


@pytest.fixture(scope="module")
def faults(demo: Demo) -> dict[str, Result]:
    """What came of every fault of a run, two at a time."""
    actions = (kill_server, wrong_world, hang_server, interrupt, terminate, kill_rank)
    with ThreadPoolExecutor(2) as pool:
        return dict(zip((act.__name__ for act in actions), pool.map(lambda act: act(demo), actions)))


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ("wrong_world", r"number of processes \(2\) is not a multiple of parallel.tensor × parallel.pipeline \(4\)"),
        ("kill_server", r"SGLang at http://127.0.0.1:\d+ failed 3 times at /generate: Client\w+Error"),
        ("hang_server", r"SGLang at .* failed 1 times at /generate: no answer within rollout.request_timeout_s=3 s"),
    ],
)
def test_a_run_that_fails_says_so_once(faults: dict[str, Result], fault: str, named: str) -> None:
    result = faults[fault]
    assert result.code != 0 and result.orphans == []
    assert len(result.complaints) == 1 and re.search(named, result.complaints[0]), result.err
    assert result.tracebacks == []


@pytest.mark.parametrize("fault", ["interrupt", "terminate", "kill_rank"])
def test_no_server_outlives_its_trainer(faults: dict[str, Result], fault: str) -> None:
    result = faults[fault]
    assert result.code != 0 and result.orphans == []
    assert result.complaints == [] and result.tracebacks == []  # nobody made a mistake


def test_an_interrupted_run_says_so(faults: dict[str, Result]) -> None:
    assert "megatron-bai: interrupted" in faults["interrupt"].err
