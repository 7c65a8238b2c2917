"""What goes wrong ends as one clear line and a non-zero exit code, and leaves no process behind."""

import json
import re
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from command import SERVER, Command, Result, forked
from omegaconf import OmegaConf
from pipeline import ONE_PROCESS, Demo
from processes import TESTS

from megatron_bai.checkpoint import manifest
from megatron_bai.config import Model, Rollout
from megatron_bai.model import hf_checkpoint
from megatron_bai.rollout.servers.sglang_server import SGLangServer

pytestmark = [pytest.mark.live, pytest.mark.distributed, pytest.mark.long]

KEY = "sesame-0123456789"
Note = Callable[[str, str, str, float | None], None]  # the fixture `fault`
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
    noted["crc32"] = manifest._content_crc({name: noted[name] for name in ("version", "files", "info")})
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
    "vocabulary": r"model.vocab_size is 128, and \S+ has 64: leave it out",
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
    """What came of every mistake in one process."""
    directory = demo.logs / "mistakes"
    members = f"merge.members=[{demo.directory}/instruct,{demo.directory}/reasoning]"
    merge = [f"merge.pretrained={demo.directory}/pretrained", members, f"merge.output={directory}/merged"]
    shared = ["experiment=demo", f"run.dir={directory}/run", "init=checkpoint", f"init.checkpoint={demo.actor}"]
    shared += [*merge, *ONE_PROCESS]
    cases = {}
    for name, wrong in WRONG.items():
        verb, *changes = wrong(demo)
        cases[name] = [verb, *shared, *changes]
    return forked(directory, cases)


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


@dataclass(frozen=True)
class Recovered:
    """A run that a server failed: what it did, how long nobody sampled, and its directory."""

    result: Result
    seconds: float
    directory: Path

    @property
    def steps(self) -> list[dict[str, Any]]:
        return json.loads((self.directory / "summary.json").read_text())["steps"]


def until_asked_again(command: Command, log: Path) -> float:
    """Seconds until a server answers more than it needs to start and to be proven."""
    start, before = time.monotonic(), log.read_text(errors="replace").count("POST /generate")
    command.until(lambda: log.read_text(errors="replace").count("POST /generate") > before + 8)
    return time.monotonic() - start


def kill_server(demo: Demo) -> Recovered:
    """On two ranks, in the middle of its first rollout."""
    run = demo.logs / "killed-server" / "run"
    command = demo.reinforce("killed-server", 2, "trainer.steps=1", "trainer.eval_every=0")
    command.until_sampling(run / "server.log")
    servers(command)[0].kill()
    seconds = until_asked_again(command, run / "server.log")
    return Recovered(command.wait(), seconds, run)


def old_weights(demo: Demo) -> Recovered:
    """Somebody else's server, with a key, that its owner kills in the second rollout and starts again as it was."""
    directory = demo.logs / "old-weights"
    model, key = directory / "model", directory / "key"
    directory.mkdir()
    key.touch(mode=0o600)
    key.write_text(KEY)
    random_weights(model)
    own = Rollout(dtype="bfloat16", sync="tensors", host="0.0.0.0", api_key_file=str(key))
    with SGLangServer(model, own, directory / "server.log") as server:
        words = ["trainer.steps=2", "trainer.eval_every=0", f"rollout.urls=[{server.url}]", "rollout.sync=tensors"]
        command = demo.reinforce("old-weights", 1, *ONE_PROCESS, *words, f"rollout.api_key_file={key}")
        command.until(lambda: "step    1/2" in command.said())
        before = server.log_path.read_text().count("POST /generate")
        command.until(lambda: server.log_path.read_text().count("POST /generate") > before + 16)
        server.stop(graceful=False)
        start = time.monotonic()
        server.start()
        seconds = time.monotonic() - start + until_asked_again(command, server.log_path)
        return Recovered(command.wait(), seconds, directory / "run")


def random_weights(directory: Path) -> None:
    """A checkpoint of the demo's model whose weights are not the demo's."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    described = hf_checkpoint.hf_config(Model(**OmegaConf.load(TESTS.parent / "conf/model/tiny.yaml")), torch.float32)
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**described)).save_pretrained(directory)


def interrupt(demo: Demo) -> Result:
    return sampling(demo, "interrupted", 1, *ONE_PROCESS).send(signal.SIGINT).wait()


def terminate(demo: Demo) -> Result:
    return starting(demo, "terminated").send(signal.SIGTERM).wait()


def kill_rank(demo: Demo) -> Result:
    command = starting(demo, "killed-rank")
    servers(command)[0].parent().kill()
    return command.wait()


@pytest.fixture(scope="module")
def faults(demo: Demo) -> dict[str, Any]:
    """What came of every fault of a run, two at a time."""
    actions = (kill_server, old_weights, wrong_world, interrupt, terminate, kill_rank)
    with ThreadPoolExecutor(2) as pool:
        return dict(zip((act.__name__ for act in actions), pool.map(lambda act: act(demo), actions)))


def test_a_run_that_fails_says_so_once(faults: dict[str, Any]) -> None:
    result = faults["wrong_world"]
    named = r"number of processes \(2\) is not a multiple of parallel.tensor × parallel.pipeline \(4\)"
    assert result.code != 0 and result.orphans == []
    assert len(result.complaints) == 1 and re.search(named, result.complaints[0]), result.err
    assert result.tracebacks == []


def recovered(found: Recovered, said: str, steps: int) -> str:
    """The line that a run says of a server that failed, having proved that the run lost nothing by it."""
    result = found.result
    assert (result.code, result.orphans, result.tracebacks) == (0, [], []), result.err
    lines = [line for line in result.err.splitlines() if re.search(said, line)]
    assert len(lines) == 1, result.err
    assert [step["step"] for step in found.steps] == list(range(1, steps + 1))
    for step in found.steps:
        assert step["rollout_failed_fraction"] == 0 and step["route_coverage"] == 1.0
        assert sum(count for name, count in step.items() if name.startswith("responses_by_length/")) == 16 * 8
        assert 0 <= step["sync_gap"] <= 0.1 and 0 < step["kl_k3"] < 0.1  # the log-probabilities are the actor's
    return lines[0]


def test_a_server_killed_in_mid_generation_is_started_anew_and_nothing_is_lost(
    faults: dict[str, Any], fault: Note
) -> None:
    said = r"^\[rank 0\] the SGLang server ended \(exit code -9\): .* \[.*server.log\]: it is started anew \(1 of 2\)$"
    line = recovered(faults["kill_server"], said, steps=1)
    lost = "nothing: a new server gets the weights in use, and outstanding requests are retried"
    fault("a server killed in mid-generation", lost, line, faults["kill_server"].seconds)


def test_a_server_that_came_back_with_old_weights_is_given_those_in_use(faults: dict[str, Any], fault: Note) -> None:
    """Of somebody else, who starts it again."""
    said = r"^\[rank 0\] SGLang at http://127.0.0.1:\d+ .*: it is waited for and given the run's weights \(1 of 2\)$"
    line = recovered(faults["old_weights"], said, steps=2)
    lost = "nothing: samples of other weights are refused; the run waits for the server and sends it the weights in use"
    fault("a server restarted with old weights", lost, line, faults["old_weights"].seconds)


def test_the_key_of_a_server_is_written_nowhere(faults: dict[str, Any]) -> None:
    directory = faults["old_weights"].directory
    found = [path for path in directory.parent.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert found == [directory.parent / "key"] and "api_key_file" in (directory / "config.yaml").read_text()


@pytest.mark.parametrize("name", ["interrupt", "terminate", "kill_rank"])
def test_no_server_outlives_its_trainer(faults: dict[str, Any], name: str) -> None:
    result = faults[name]
    assert result.code != 0 and result.orphans == []
    assert result.complaints == [] and result.tracebacks == []  # nobody made a mistake


def test_an_interrupted_run_says_so(faults: dict[str, Any]) -> None:
    assert "megatron-bai: interrupted" in faults["interrupt"].err
