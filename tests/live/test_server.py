"""A real SGLang server: what it returns is true, what it must survive it survives, and nothing of it is left behind."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from tiny import LENGTH, ROLLOUT, SIGNATURE, STOP, VOCAB, save_tiny
from transformers_forward import Reference

from megatron_bai.errors import UserError
from megatron_bai.rollout.client import RolloutClient, SampleRequest, sampling_seed
from megatron_bai.rollout.route_format import RouteFormat
from megatron_bai.rollout.sample import Sample
from megatron_bai.rollout.servers import control
from megatron_bai.rollout.servers.sglang_server import SGLangServer
from megatron_bai.rollout.servers.weight_sync import sync_from_disk, tensor_shapes

pytestmark = pytest.mark.live
MakeClient = Callable[..., RolloutClient]
PROMPTS = [[5, 6, 7], [9], [11, 12, 13, 14, 15, 16, 17, 18]]


@pytest.fixture(scope="module")
def reference(checkpoints: dict[str, Path]) -> dict[str, Reference]:
    return {version: Reference(path) for version, path in checkpoints.items()}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_routes_are_those_of_transformers(
    client: MakeClient, serving: Callable[[str], None], reference: dict[str, Reference], temperature: float
) -> None:
    serving("v0")
    samples = client(temperature=temperature).generate(PROMPTS, 4, seed=0, stop_token_ids=[STOP])
    assert [s.prompt_index for s in samples] == [0] * 4 + [1] * 4 + [2] * 4
    for sample in samples:
        reference["v0"].agrees(sample, temperature)
        assert sample.tokens[: sample.prompt_length].tolist() == PROMPTS[sample.prompt_index]
        assert [(span.version, span.start, span.end) for span in sample.spans] == [("v0", 0, len(sample.response))]
        assert sample.finish == ("stop" if sample.tokens[-1] == STOP else "length")


def test_scores_are_those_of_transformers(
    client: MakeClient, serving: Callable[[str], None], reference: dict[str, Reference]
) -> None:
    serving("v0")
    sequences = [[5, 6], list(range(2, 42)), [3] * 20]
    for ids, found in zip(sequences, client(temperature=0.7).score(sequences), strict=True):
        wanted, _, sure = reference["v0"](np.array(ids))
        np.testing.assert_allclose(found[sure], wanted[sure], atol=1e-4, rtol=0)


def test_a_seed_repeats_its_sample_in_any_company(client: MakeClient, serving: Callable[[str], None]) -> None:
    serving("v0")
    together = client().generate(PROMPTS, 4, seed=3, stop_token_ids=[STOP])
    assert len({s.tokens.tobytes() for s in together}) == len(together)
    alone = client(concurrency=1).generate(PROMPTS[:1], 2, seed=3, stop_token_ids=[STOP])
    other = client().generate(PROMPTS[:1], 2, seed=4, stop_token_ids=[STOP])
    assert [s.tokens.tolist() for s in alone] == [s.tokens.tolist() for s in together[:2]]
    assert [s.tokens.tolist() for s in other] != [s.tokens.tolist() for s in alone]


def test_tokens_are_drawn_with_their_probabilities(client: MakeClient, serving: Callable[[str], None]) -> None:
    """χ² of 2048 first tokens against the model's own distribution: seeds must not bias the draw."""
    serving("v0")
    samples = client(max_new_tokens=1).generate([PROMPTS[0]], 2048, seed=0, stop_token_ids=[STOP])
    rows = client().score([PROMPTS[0] + [token] for token in range(VOCAB)])
    expected = 2048 * np.exp([row[-1] for row in rows])
    seen = np.bincount([int(s.response[0]) for s in samples], minlength=VOCAB)
    common = expected >= 5
    chi2 = ((seen - expected)[common] ** 2 / expected[common]).sum()
    assert chi2 < common.sum() + 5 * np.sqrt(2 * common.sum())


def test_an_update_brings_the_new_weights(
    client: MakeClient, serving: Callable[[str], None], reference: dict[str, Reference]
) -> None:
    probe = list(range(2, 22))
    for version in ("v0", "v1", "v0"):
        serving(version)
        assert control.weight_version(client().urls[0]) == version
        wanted, _, sure = reference[version](np.array(probe))
        np.testing.assert_allclose(client().score([probe])[0][sure], wanted[sure], atol=1e-4, rtol=0)
        (sample,) = client().generate([probe], 1, 0, [STOP])
        assert {span.version for span in sample.spans} == {version}
        reference[version].agrees(sample)


def test_an_update_amid_requests_mixes_nothing(
    client: MakeClient, serving: Callable[[str], None], reference: dict[str, Reference]
) -> None:
    serving("v0")
    samples = []
    asking = threading.Thread(
        target=lambda: samples.extend(client(max_new_tokens=100).generate([PROMPTS[0]], 48, 0, stop_token_ids=[STOP]))
    )
    asking.start()
    time.sleep(0.3)  # most are under way by now; nothing below depends on how many
    serving("v1")
    asking.join()
    assert len(samples) == 48 and control.weight_version(client().urls[0]) == "v1"
    for sample in samples:
        (span,) = sample.spans
        reference[span.version].agrees(sample)


def test_a_sample_in_parts_is_the_sample_in_one(client: MakeClient, serving: Callable[[str], None]) -> None:
    """With the same weights: a seed draws alike at a token's place, wherever the request that asks for it began."""
    serving("v0")
    asking = client(max_new_tokens=24)
    whole = asking.generate(PROMPTS, 2, seed=5, stop_token_ids=[STOP])
    samples: list[Sample | None] = [None] * len(whole)
    while any(sample is None or not sample.complete for sample in samples):
        wanted = [
            SampleRequest(0, PROMPTS[i // 2], sampling_seed(5, i // 2, i % 2), sample)
            for i, sample in enumerate(samples)
            if sample is None or not sample.complete
        ]
        parts = iter(asking.sample(wanted, [STOP], budget=7))
        samples = [next(parts) if sample is None or not sample.complete else sample for sample in samples]
    for sample, one in zip(samples, whole, strict=True):
        np.testing.assert_array_equal(sample.tokens, one.tokens)
        np.testing.assert_array_equal(np.sort(sample.routes, -1), np.sort(one.routes, -1))
        np.testing.assert_allclose(sample.logprobs, one.logprobs, atol=1e-4, rtol=0)
        assert (sample.finish, sample.spans, sample.route_mask) == (one.finish, one.spans, None)


def test_a_sample_goes_on_with_new_weights(
    client: MakeClient, serving: Callable[[str], None], reference: dict[str, Reference]
) -> None:
    """Each part has the log-probabilities and the routes of the weights that sampled it."""
    serving("v0")
    asking = client(max_new_tokens=24)
    wanted = [SampleRequest(0, ids, 9 + i) for i, ids in enumerate(PROMPTS * 2)]
    first = asking.sample(wanted, [STOP], budget=10)
    serving("v1")
    going_on = [i for i, sample in enumerate(first) if not sample.complete]
    second = asking.sample([replace(wanted[i], partial=first[i]) for i in going_on], [STOP])
    assert second and all(sample.complete for sample in second)
    for sample in second:
        assert [(span.version, span.start) for span in sample.spans] == [("v0", 0), ("v1", 10)]
        for span, rows in zip(sample.spans, sample.row_spans):
            reference[span.version].agrees(sample, of=slice(span.start, span.end))
            _, routes, sure = reference[span.version](sample.tokens)
            own, theirs, known = (each[rows.start : rows.end] for each in (np.sort(sample.routes, -1), routes, sure))
            np.testing.assert_array_equal(own[known], theirs[known])
        assert len(sample.routes) == len(sample.tokens) - 1 and sample.route_mask is None


def test_another_models_weights_never_reach_the_server(
    client: MakeClient, server: SGLangServer, serving: Callable[[str], None], tmp_path: Path
) -> None:
    serving("v0")
    with pytest.raises(UserError, match="is not the served model"):
        sync_from_disk(
            [server.url], save_tiny(tmp_path, 0, moe_intermediate_size=16), "v9", tensor_shapes(server.model_dir)
        )
    assert control.weight_version(server.url) == "v0" and client().generate([[5]], 1, 0, [STOP])


def test_a_prompt_outside_the_vocabulary_is_refused_and_the_server_lives(client: MakeClient) -> None:
    with pytest.raises(UserError, match=rf"outside \[0, {VOCAB}\)"):
        client().generate([[5], [VOCAB]], 1, 0, [STOP])
    assert control.is_healthy(client().urls[0]) and client().generate([[VOCAB - 1]], 1, 0, [STOP])


def test_the_longest_sequence_the_client_allows_is_served(client: MakeClient) -> None:
    longest = client().max_length
    (sample,) = client(max_new_tokens=1).generate([[2] * (longest - 1)], 1, 0, [STOP])
    assert len(sample.tokens) == longest and len(client().score([[2] * longest])[0]) == longest - 1
    with pytest.raises(UserError, match="exceeds"):
        client(max_new_tokens=1).generate([[2] * longest], 1, 0, [STOP])
    assert longest >= LENGTH - 8


def test_it_imports_the_model_that_it_serves_and_no_other(server: SGLangServer) -> None:
    """SGLang complains of each of its models that this machine has no package for."""
    said = server.log_path.read_text()
    assert "Load weight end" in said and "error when loading sglang.srt.models" not in said


def test_a_clusters_signals_do_not_end_it(server: SGLangServer, client: MakeClient) -> None:
    """Slurm sends them to all processes of a job, and the trainer's step needs the server to its end."""
    for process in [psutil.Process(server.pid), *family(server.pid)]:
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGUSR1)
    assert len(client().generate(PROMPTS, 2, seed=0, stop_token_ids=[STOP])) == 6


PARENT = """
import time
from megatron_bai.config import Rollout
from megatron_bai.rollout.servers.sglang_server import SGLangServer
server = SGLangServer({model!r}, Rollout(), {log!r})
server.start()
print(server.url, flush=True)
time.sleep(600)
"""


@contextmanager
def trainer(model: Path, log: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that starts a server and then does nothing. Ended here with all that it started."""
    code = PARENT.format(model=str(model), log=str(log))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    started: list[psutil.Process] = []
    try:
        yield process
    finally:
        if process.poll() is None:
            started = family(process.pid)
            process.kill()
        process.wait()
        for orphan in started:
            with suppress(psutil.NoSuchProcess):
                orphan.kill()


def family(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def gone(processes: list[psutil.Process]) -> bool:
    """Whether all end soon; if not, ends them. (A zombie has ended: reaping it is up to this machine's init.)"""
    _, alive = psutil.wait_procs(processes, timeout=30)
    left = [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    for process in left:
        process.kill()
    return not left


@pytest.mark.long
def test_the_shared_memory_of_two_ranks_is_noted_and_goes_with_them(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Those that are killed leave it; SGLang names it by a process id, which says nothing of whose it is."""
    with SGLangServer(checkpoints["v0"], replace(ROLLOUT, tensor=2), tmp_path / "log") as server:
        notes = server._socket_dir.path.glob("holds-*")
        held = [Path("/dev/shm", note.name.removeprefix("holds-")) for note in notes]
        assert held and all(path.exists() for path in held)
        server.stop(graceful=False)
    assert not any(path.exists() for path in held)


@pytest.mark.long
def test_kill_9_of_the_parent_leaves_no_process(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with trainer(checkpoints["v0"], tmp_path / "log") as parent:
        assert parent.stdout is not None
        url = parent.stdout.readline().strip()
        client = RolloutClient([url], ROLLOUT, RouteFormat(SIGNATURE), VOCAB, LENGTH)
        assert client.generate([[5]], 1, 0, [STOP])
        processes = family(parent.pid)
        assert len(processes) >= 3, "server, scheduler, detokenizer"
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        assert gone(processes)
    with pytest.raises(UserError, match=rf"SGLang at {url} failed 3 times"):
        client.generate([[5]], 1, 0, [STOP])


@pytest.mark.long
def test_kill_9_of_the_parent_while_the_server_starts(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with trainer(checkpoints["v0"], tmp_path / "log") as parent:
        server: list[psutil.Process] = []
        while len(server) < 2 and parent.poll() is None:  # until the first worker has been forked
            time.sleep(0.01)
            own = []
            for process in family(parent.pid):
                with suppress(psutil.NoSuchProcess):  # it ended since
                    own.append((process, " ".join(process.cmdline())))
            server = [
                p
                for p, line in own
                if "-m megatron_bai.rollout.servers.server_main " in line or line.startswith("sglang::")
            ]
        processes = family(parent.pid)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        assert len(server) > 1 and gone(processes)
