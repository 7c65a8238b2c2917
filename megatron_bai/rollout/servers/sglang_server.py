"""An SGLang server as a context manager: started, checked for health and release, and stopped with the block."""

import os
import re
import secrets
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType

import psutil

from megatron_bai.checkpoint.hf_config import read_raw_config
from megatron_bai.config import Rollout
from megatron_bai.distributed.hosts import host_address, is_loopback
from megatron_bai.errors import UserError, os_errors_as_user_errors
from megatron_bai.model.families.registry import all_families
from megatron_bai.rollout.sampling_params import needs_tokenizer
from megatron_bai.rollout.served_models import SERVED_MODULE
from megatron_bai.rollout.servers import auth, control, releases
from megatron_bai.rollout.servers.ports import PortReservation, reserve_port
from megatron_bai.rollout.servers.socket_dir import SocketDir, make_socket_dir

# Set by torchrun for the trainer, or by a proxied network: SGLang would take them for its own.
_NOT_INHERITED = re.compile(
    r"(RANK|WORLD_SIZE|LOCAL_\w+|GROUP_\w+|ROLE_\w+|MASTER_(ADDR|PORT)|TORCHELASTIC_\w+|SGLANG_\w+|\w+_proxy)", re.I
)
_LEAK_WARNING = "resource_tracker"  # Python's warning of what processes that were killed left behind
_STOP_S = 10.0  # from SIGINT to SIGKILL


class SGLangServer:
    """Serves one checkpoint while the `with` block runs.

    The server leads its own session, so a Ctrl-C reaches only the trainer, which then stops it; and the kernel kills
    it when the thread that started it ends (`child_processes.die_with_parent`), so start it from a thread
    that lives as long.

    Args:
        model_dir: a Hugging Face checkpoint.
        rollout: port, precision, layout, limits and time-outs.
        log_path: where everything the server prints goes.
        device: `cpu` or `cuda`.
        text: also load the checkpoint's tokenizer, for SGLang's OpenAI endpoints. Rollouts need it only where
            `sampling_params.needs_tokenizer` says so.
        route_weights: return the weights of a token's experts beside their ids (`replay.weights=server`).
    """

    def __init__(
        self,
        model_dir: str | Path,
        rollout: Rollout,
        log_path: str | Path,
        device: str = "cpu",
        text: bool = False,
        route_weights: bool = False,
    ):
        self.model_dir, self.rollout, self.log_path = Path(model_dir), rollout, Path(log_path)
        self.device, self.text, self.route_weights = device, text, route_weights
        self.port = rollout.port
        self._launched, self._log_start = False, 0  # bytes of the log before those of the process at hand
        self._process: subprocess.Popen[bytes] | None = None
        self._reservation: PortReservation | None = None
        self._socket_dir: SocketDir | None = None
        self._instance = ""  # the name that the process at hand answers to

    @property
    def url(self) -> str:
        """The URL at which the trainer's machines reach the server."""
        host = host_address() if self.rollout.host == "0.0.0.0" else self.rollout.host
        return f"http://{host}:{self.port}"

    @property
    def pid(self) -> int | None:
        """The id of the server's first process; None while there is none."""
        return self._process.pid if self._process else None

    def __enter__(self) -> "SGLangServer":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Launch, and return when the server answers.

        Raises:
            UserError: as `launch` and `wait`.
        """
        self.launch()
        self.wait()

    def launch(self) -> None:
        """Start the server's processes; `stop` must follow, whatever happens.

        Once stopped it can be launched again, at the same URL and with the same log.

        Raises:
            UserError: SGLang is absent or another release, the port is taken, or others reach it and it has no key.
        """
        auth.require_key_or_loopback(self.rollout)
        if not (self.model_dir / "config.json").is_file():
            raise UserError(f"{self.model_dir} is no Hugging Face checkpoint: it has no config.json")
        releases.require_startable(installed_release(), "is installed", self.device)
        if self.route_weights:
            releases.require_route_weights(installed_release())
        self._reservation = reserve_port(self.rollout.host, self.port)
        self.port = self._reservation.port
        try:
            self._start_process()
        except BaseException:
            self._clean_up()
            raise

    def _start_process(self) -> None:
        """Start the server's first process, which gets a name that no other server has."""
        auth.register_key([self.url], self.rollout.api_key_file)
        self._instance = secrets.token_hex(16)
        self._socket_dir = make_socket_dir(self._instance)
        own = ["--parent", str(os.getpid()), "--instance", self._instance]
        if self.rollout.api_key_file:
            own += ["--key-file", os.path.abspath(self.rollout.api_key_file)]
        if self.rollout.sync == "tensors":
            own.append("--take-tensors")
        if self.rollout.exact:
            own.append("--exact")
        if releases.is_untested(installed_release()):
            own.append("--untested")
        if self.route_weights:
            own.append("--route-weights")
        command = [sys.executable, "-m", "megatron_bai.rollout.servers.server_main", *own, *self._arguments()]
        environment = _environment(self.device, self.rollout.tensor, self.rollout.host, self._socket_dir.path)
        environment |= _served_model(self.model_dir)
        with os_errors_as_user_errors(self.log_path):
            self.log_path.parent.mkdir(parents=True, exist_ok=True)
            log_file = open(self.log_path, "ab" if self._launched else "wb")
        with log_file as log:
            self._log_start, self._launched = log.tell(), True
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def wait(self) -> None:
        """Wait until the server answers.

        Raises:
            UserError: it ended or did not become healthy in time, and quotes its log; or another server answers at its
                URL. The server is stopped.
        """
        try:
            self._wait_until_healthy()
            self._require_own_answer()
            found = control.get(self.url, "/server_info").get("version")
            releases.require_startable(found, f"answers at {self.url}", self.device)
            self._record_shared_memory()
        except BaseException:
            self.stop()
            raise

    def stop(self, graceful: bool = True) -> None:
        """End every process of the server. Bounded in time; a second call does nothing.

        Args:
            graceful: send SIGINT before SIGKILL, which is of no use where they hang.
        """
        if self._process is None:
            return
        group = self._process.pid  # it leads its session, so its group has its id
        self._record_shared_memory()
        for send, sign in ((os.kill, signal.SIGINT), (os.killpg, signal.SIGKILL))[not graceful :]:
            if not _group_pids(group):
                break
            with suppress(ProcessLookupError):
                # The first process ends the others in order. (SIGTERM would make it look for requests every 5 s.)
                send(group, sign)
            deadline = time.monotonic() + _STOP_S
            while _group_pids(group) and time.monotonic() < deadline:
                self._process.poll()  # reaps it, without which it would stay a member
                time.sleep(0.05)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_S)
        self._process = None
        self._clean_up()

    def _record_shared_memory(self) -> None:
        if self._process is not None and self._socket_dir is not None:
            self._socket_dir.record_shared_memory(_group_pids(self._process.pid))

    def _clean_up(self) -> None:
        """Remove what the server's processes left on this machine, once there are none, and release its port."""
        if self._socket_dir:
            self._socket_dir.remove()
            self._socket_dir = None
        if self._reservation:
            self._reservation.release()

    def check_alive(self) -> None:
        """Raise a UserError that quotes the log if the server has ended."""
        if self._process is None or self._process.poll() is not None:
            code = self._process.returncode if self._process else "none"
            words = last_error(self.log_path, self._log_start)
            raise UserError(f"the SGLang server ended (exit code {code}): {words} [{self.log_path}]")

    def _arguments(self) -> list[str]:
        """Make SGLang's own command line."""
        rollout = self.rollout
        options = {
            "model-path": self.model_dir,
            "host": rollout.host,
            "port": self.port,
            "device": self.device,
            "dtype": rollout.dtype,
            "max-total-tokens": rollout.max_total_tokens,
            "max-running-requests": rollout.max_running_requests,
            "tp-size": rollout.tensor,
            "grammar-backend": "none",
            "log-level": "info",
        }
        # Without a prefix cache every route returned was computed for this very request, with these very weights.
        flags = ["enable-return-routed-experts", "disable-radix-cache"]
        if self.device == "cpu":
            options |= {"attention-backend": "torch_native", "sampling-backend": "pytorch"}
            # An idle scheduler would keep a core busy; one that overlaps computes a token too many.
            flags += ["disable-cuda-graph", "sleep-on-idle", "disable-overlap-schedule"]
        if rollout.deterministic:
            flags.append("enable-deterministic-inference")
        if not (self.text or needs_tokenizer(rollout)):
            flags.append("skip-tokenizer-init")
        pairs = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        return pairs + [f"--{flag}" for flag in flags]

    def _wait_until_healthy(self) -> None:
        """Poll the server until it generates."""
        limit = self.rollout.start_timeout_s
        if not control.wait_until_healthy(self.url, limit, self.check_alive):
            raise UserError(
                f"the SGLang server was not healthy after rollout.start_timeout_s={limit:g} s; its last words: "
                f"{last_error(self.log_path, self._log_start)} [{self.log_path}]"
            )

    def _require_own_answer(self) -> None:
        """Refuse a server of another run or program that answers in place of this one, whose process may be dying."""
        if control.instance(self.url) != self._instance:
            raise UserError(
                f"rollout.port={self.port} is another server's, which answers at {self.url}: choose another port, or 0 "
                "for a free one"
            )
        self.check_alive()


def last_error(log_path: Path, start: int = 0) -> str:
    """Find the last line of a server's log that names an error, else the last that is not empty.

    Args:
        log_path: of the log.
        start: byte to read from.
    """
    try:
        text = log_path.read_bytes()[start:].decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip() and _LEAK_WARNING not in line]
    except OSError as error:
        return f"no log ({error.strerror})"
    raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    errors = [line for line in raised if "scheduler died" not in line]  # the first process, about the one that failed
    return (errors or raised or lines or ["the log is empty"])[-1]


def installed_release() -> str | None:
    """Return the release of the installed SGLang; None where there is none."""
    try:
        return version("sglang")
    except PackageNotFoundError:
        return None


def _served_model(model_dir: Path) -> dict[str, str]:
    """Return the variable that says which of SGLang's modules has the model; nothing where no family knows."""
    model_type = read_raw_config(model_dir).get("model_type")
    served_by = {name: family.served_by for family in all_families().values() for name in family.model_types}
    module = served_by.get(model_type) if isinstance(model_type, str) else None
    return {SERVED_MODULE: module} if module else {}


def _environment(
    device: str, tensor: int = 1, host: str = "127.0.0.1", socket_dir: Path | None = None
) -> dict[str, str]:
    """Make a server's environment: the trainer's without torchrun's and proxies' variables, and its own."""
    inherited = {name: value for name, value in os.environ.items() if not _NOT_INHERITED.fullmatch(name)}
    fixed = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if socket_dir:  # what is compiled stays, for the next server
        fixed["TMPDIR"] = str(socket_dir)
        compiled = socket_dir.parent / f"torchinductor_{os.getuid()}"
        fixed["TORCHINDUCTOR_CACHE_DIR"] = os.environ.get("TORCHINDUCTOR_CACHE_DIR", str(compiled))
    if is_loopback(host):  # gloo would listen where the host's name leads
        fixed["GLOO_SOCKET_IFNAME"] = "lo"
    if device == "cpu":  # a second thread a step costs more than it gives, most of all on a shared machine
        fixed |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        if tensor > 1:  # a core a rank: SGLang cannot divide them itself where it finds no NUMA node for each
            cores = sorted(os.sched_getaffinity(0))
            fixed["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(str(cores[i % len(cores)]) for i in range(tensor))
    return inherited | fixed


def _group_pids(group: int) -> list[int]:
    """List the living processes of a process group, without zombies."""
    pids = []
    for process in psutil.process_iter(["pid", "status"]):
        try:
            if process.info["status"] != psutil.STATUS_ZOMBIE and os.getpgid(process.pid) == group:
                pids.append(process.pid)
        except ProcessLookupError:
            continue
    return pids
