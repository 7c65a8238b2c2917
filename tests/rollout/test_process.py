"""What the server's process is started with, and how a failure to start reads. No SGLang is started here."""

import os
import signal
import socket
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import psutil
import pytest
from safetensors.numpy import save_file

from megatron_bai.config import Rollout
from megatron_bai.errors import UserError
from megatron_bai.rollout import served_models
from megatron_bai.rollout.servers import control, server_main
from megatron_bai.rollout.servers import sglang_server as module
from megatron_bai.rollout.servers.ports import reserve_port
from megatron_bai.rollout.servers.server_main import uses_cpu
from megatron_bai.rollout.servers.sglang_server import SGLangServer, last_error


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    return tmp_path


def fails_to_start(model: Path, **settings: object) -> str:
    with pytest.raises(UserError) as caught:
        SGLangServer(model, Rollout(**settings), model / "log").start()
    return str(caught.value)


def test_refuses_what_is_no_checkpoint(tmp_path: Path) -> None:
    assert f"{tmp_path} is no Hugging Face checkpoint" in fails_to_start(tmp_path)


def test_refuses_another_release(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "version", lambda name: "0.5.20")
    assert "SGLang 0.5.20 is installed; a run starts servers of 0.5.21, 0.5.22, 0.5.23 alone" in fails_to_start(model)


def test_refuses_a_port_in_use(model: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert f"rollout.port={port} cannot be used: Address already in use" in fails_to_start(model, port=port)


def test_refuses_a_port_that_a_starting_server_of_another_run_will_listen_at(model: Path) -> None:
    """It looks free for the half minute until that server listens."""
    other = reserve_port("127.0.0.1", 0)
    message = fails_to_start(model, port=other.port)
    assert f"rollout.port={other.port} cannot be used: Address already in use, by another run" in message
    assert not (model / "log").exists(), "no process was started"
    other.release()
    reserve_port("127.0.0.1", other.port).release()


def test_a_reservation_ends_with_the_process_that_holds_it() -> None:
    program = (
        "from megatron_bai.rollout.servers.ports import reserve_port; import time; "
        "r = reserve_port('127.0.0.1', 0); print(r.port, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as holder:
        port = int(holder.stdout.readline())
        with pytest.raises(UserError, match=f"rollout.port={port} cannot be used"):
            reserve_port("127.0.0.1", port)
        holder.kill()
    reserve_port("127.0.0.1", port).release()


class Answering(BaseHTTPRequestHandler):
    """Another program's server, which is healthy, and says 200 to everything or has an instance of another name."""

    reply = b"{}"

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.reply)

    def log_message(self, *words: object) -> None:
        pass


@pytest.mark.parametrize("reply", [b"{}", b"", b'{"instance": "another"}', b'{"instance": ["x"]}', b"[1]"])
def test_a_healthy_server_at_the_port_that_is_not_ours_is_refused_and_left_alone(
    model: Path, monkeypatch: pytest.MonkeyPatch, reply: bytes
) -> None:
    """It took the port after ours was started: ours still imports, or has died."""
    sleeper = model / "sleeper"
    sleeper.write_text("#!/bin/sh\nsleep 600\n")
    sleeper.chmod(0o755)
    monkeypatch.setattr(module.sys, "executable", str(sleeper))
    monkeypatch.setattr(module, "_STOP_S", 0.5)
    server = SGLangServer(model, Rollout(), model / "log")
    server.launch()
    handler = type("Handler", (Answering,), {"reply": reply})
    with ThreadingHTTPServer(("127.0.0.1", server.port), handler) as other:
        Thread(target=other.serve_forever, daemon=True).start()
        with pytest.raises(UserError, match=rf"rollout\.port={server.port} is another server's, which answers at"):
            server.wait()
        assert server.pid is None and control.is_healthy(server.url)
        other.shutdown()


def test_a_process_that_ends_is_one_line_with_its_last_words(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.sys, "executable", "/bin/false")
    message = fails_to_start(model)
    assert message == f"the SGLang server ended (exit code 1): the log is empty [{model / 'log'}]"


def test_a_process_that_never_answers_is_stopped(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sleeper = model / "sleeper"
    sleeper.write_text("#!/bin/sh\necho waiting for nothing\nsleep 600 & sleep 600\n")
    sleeper.chmod(0o755)
    monkeypatch.setattr(module.sys, "executable", str(sleeper))
    monkeypatch.setattr(module, "_STOP_S", 0.5)
    server = SGLangServer(model, Rollout(start_timeout_s=0.3), model / "log")
    with pytest.raises(UserError, match=r"not healthy after rollout\.start_timeout_s=0\.3 s.*waiting for nothing"):
        server.start()
    assert server.pid is None
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(sleeper) in (p.info["cmdline"] or [])]
    server.stop()


def test_last_error_is_the_failure_and_not_what_it_led_to(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "[time] Ignore import error when loading x: ImportError\n"
        "Traceback (most recent call last):\n  raise ValueError(\nValueError: no such layer\n\n"
        "RuntimeError: Rank 0 scheduler died during initialization (exit code: 1).\n"
        "nanobind: leaked 64 types!\n"
    )
    assert last_error(log) == "ValueError: no such layer"
    log.write_text("one\n\ntwo\n\n")
    assert last_error(log) == "two"
    assert "No such file" in last_error(tmp_path / "absent")


def test_environment_leaves_out_torchrun_and_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "SGLANG_X", "http_proxy"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth0")
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    cpu, cuda = module._environment("cpu"), module._environment("cuda")
    assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "SGLANG_X"} & cpu.keys()
    assert "http_proxy" not in cpu and cpu["NCCL_SOCKET_IFNAME"] == "eth0" and cpu["PATH"] == os.environ["PATH"]
    assert (cpu["OMP_NUM_THREADS"], cuda["OMP_NUM_THREADS"]) == ("1", "64")


def test_arguments_follow_the_settings(model: Path) -> None:
    rollout = Rollout(deterministic=False, dtype="bfloat16", max_total_tokens=99)
    cpu = SGLangServer(model, rollout, model / "log")._arguments()
    assert uses_cpu(cpu) and "--skip-tokenizer-init" in cpu and "--enable-deterministic-inference" not in cpu
    assert cpu[cpu.index("--dtype") + 1] == "bfloat16" and cpu[cpu.index("--max-total-tokens") + 1] == "99"
    cuda = SGLangServer(model, Rollout(), model / "log", device="cuda", text=True)._arguments()
    assert not uses_cpu(cuda) and "--attention-backend" not in cuda and "--skip-tokenizer-init" not in cuda
    assert {"--enable-deterministic-inference", "--enable-return-routed-experts"} <= set(cuda)


def test_a_release_that_returns_no_weights_is_refused_before_it_starts(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "installed_release", lambda: "0.5.99")
    monkeypatch.setattr(module.releases, "require_startable", lambda *_: None)  # as with backend.untested, on a GPU
    monkeypatch.setattr(module, "reserve_port", lambda *_: pytest.fail("it would start"))
    with pytest.raises(UserError, match=r"replay\.weights=server needs SGLang 0\.5\.21, .*and 0\.5\.99 is installed"):
        SGLangServer(model, Rollout(), model / "log", route_weights=True).launch()


@pytest.mark.parametrize("way", [["--device", "cpu"], ["--device=cpu"]])
def test_cpu_is_recognised_either_way(way: list[str]) -> None:
    assert uses_cpu(["--dtype", "float32", *way]) and not uses_cpu(["--device", "cuda", "--served-model-name", "cpu"])


DIES = """
import time
from megatron_bai.rollout.servers.server_main import die_with_parent
die_with_parent({})
print('armed', flush=True)
time.sleep(60)
"""


def test_a_child_dies_with_its_parent() -> None:
    """The parent prints its child's id once the child is armed, and is then killed with no chance to clean up."""
    child = f"import os, subprocess, sys; c = subprocess.Popen([sys.executable, '-c', {DIES!r}.format(os.getpid())]); "
    parent = subprocess.Popen(
        [sys.executable, "-c", child + "print(c.pid, flush=True); c.wait()"], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    lines = {parent.stdout.readline().strip(), parent.stdout.readline().strip()}
    assert "armed" in lines
    process = psutil.Process(int((lines - {"armed"}).pop()))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert not psutil.wait_procs([process], timeout=20)[1] or process.status() == psutil.STATUS_ZOMBIE


def test_a_child_whose_parent_is_already_gone_ends() -> None:
    run = subprocess.run([sys.executable, "-c", DIES.format(1)], stdout=subprocess.PIPE, text=True, timeout=60)
    assert run.returncode == 1 and run.stdout == ""


@pytest.mark.parametrize("given", [{}, {"SGLANG_EXTERNAL_MODEL_PACKAGE": "models_of.the_user"}])
def test_a_users_models_are_looked_at_before_ours(given: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_main.os, "environ", environment := dict(given))
    monkeypatch.setattr(server_main.compat, "apply", lambda scope: None)
    monkeypatch.setattr(server_main, "_restrict_tcp_store", lambda: None)
    server_main.prepare(cpu=True)
    assert environment == (given or {"SGLANG_EXTERNAL_MODEL_PACKAGE": served_models.__name__})


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ([], (False, False, False, False)),
        (["--device", "cpu"], (True, False, False, False)),
        (["--untested"], (False, True, False, False)),
        (["--exact"], (False, False, True, False)),
        (["--route-weights"], (False, False, False, True)),
    ],
)
def test_a_server_and_its_spawned_workers_are_prepared_by_all_of_their_arguments(
    words: list[str], wanted: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker takes the same path: what only the server was told, a worker of SGLang's on a GPU would not do."""
    given: list[tuple[bool, ...]] = []
    monkeypatch.setattr(server_main, "prepare", lambda *options: given.append(options))
    server_main.prepare_for(server_main.parse_args(words))
    assert given == [wanted]
