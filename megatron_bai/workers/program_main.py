"""Run `python -I -S program_main.py JOB STATUS`: a Python program in namespaces of its own, with the standard library.

Reads its job, JSON, from the descriptor JOB; says on STATUS why the program cannot be isolated, and nothing where it
runs. It imports the standard library alone and runs by its path, so that a start takes milliseconds.

Four processes: this one, which stays outside and maps users; one that makes the namespaces; the first process of the
new process namespace, with whose end all others in it are killed; and the program. The program sees no network, no
process but its own, and of the file system the interpreter and the system's libraries, to read, and a small directory
in memory. It is no user of the machine's where this process is root, and has no capability.
"""

import ctypes
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

# linux/sched.h, linux/mount.h, linux/prctl.h, asm-generic/unistd.h
_NAMESPACES = {
    "user": 0x10000000,
    "network": 0x40000000,
    "mount": 0x00020000,
    "process": 0x20000000,
    "ipc": 0x08000000,
    "host name": 0x04000000,
}
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 2, 4, 8, 4096, 16384, 1 << 18
_MNT_DETACH = 2
_SYS_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE, _ATTR_READ_ONLY = 442, -100, 0x8000, 1 | 2 | 4  # no set-id, no devices
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
NOBODY = 65534
_TWO_USERS, _ONE_USER = b"2", b"1"
FAILED = 125  # exit code where STATUS says why
_ROOT = "/tmp"  # where the new root is mounted, in the new namespace alone
_WORK = "/work"
_MORE_DESCRIPTORS = 256  # than the highest that this process is given: it and its children open some dozens
_libc = ctypes.CDLL(None, use_errno=True)


def _call(what: str, function: Callable[..., int], *arguments: Any) -> None:
    """Call a function of libc; raise an OSError that says what it was for unless it returns 0."""
    if function(*arguments):
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def unshare() -> None:
    """Put this process into new namespaces.

    Raises:
        OSError: the kernel gives none of these, or not all.
    """
    flags = 0
    for flag in _NAMESPACES.values():
        flags |= flag
    _call(f"no namespaces of {', '.join(_NAMESPACES)}", _libc.unshare, flags)


def _mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    arguments = (source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode())
    _call(f"{target} cannot be mounted", _libc.mount, *arguments)


def _die_with_parent(pid: int) -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if pid and os.getppid() != pid:
        os._exit(FAILED)


def _build_root(job: dict[str, Any]) -> None:
    """Mount a root with what the program may see, and make it this process's."""
    held = {path: os.open(path, os.O_PATH) for path in job["paths"] if os.path.exists(path)}
    devices = {f"/dev/{name}": os.open(f"/dev/{name}", os.O_PATH) for name in ("null", "zero", "urandom")}
    _mount("none", "/", "", _MS_REC | _MS_PRIVATE)
    _mount("none", _ROOT, "tmpfs", _MS_NOSUID | _MS_NODEV, f"size={job['disk_bytes']},nr_inodes=4096,mode=755")
    for path, descriptor in (held | devices).items():
        target = _ROOT + path
        if os.path.islink(path):
            os.symlink(os.readlink(path), target)
            continue
        os.makedirs(target if os.path.isdir(path) else os.path.dirname(target), 0o755, exist_ok=True)
        if not os.path.isdir(path):
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o444))
        _mount(f"/proc/self/fd/{descriptor}", target, "", _MS_BIND | _MS_REC)
        if path not in devices:
            _set_read_only(target)
    os.makedirs(f"{_ROOT}/proc")
    with suppress(OSError):  # where parts of /proc are hidden the kernel shows none
        _mount("proc", f"{_ROOT}/proc", "proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC | _MS_RDONLY)
    for name, content in job["files"].items():
        path = f"{_ROOT}{_WORK}/{name}"
        os.makedirs(os.path.dirname(path), 0o777, exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            file.write(content)
    os.chmod(_ROOT + _WORK, 0o777)
    os.makedirs(f"{_ROOT}/.old")
    _call("no root of its own", _libc.syscall, _SYS_PIVOT_ROOT[os.uname().machine], _ROOT.encode(), b"/tmp/.old")
    os.chdir("/")
    _call("the root cannot be left", _libc.umount2, b"/.old", _MNT_DETACH)
    os.rmdir("/.old")
    os.symlink(_WORK, "/tmp")
    for descriptor in (*held.values(), *devices.values()):
        os.close(descriptor)


def _set_read_only(path: str) -> None:
    """Make a mount and all below it read-only, without devices."""
    attributes = (ctypes.c_uint64 * 4)(_ATTR_READ_ONLY, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    arguments = (_SYS_MOUNT_SETATTR, _AT_FDCWD, path.encode(), _AT_RECURSIVE, ctypes.byref(attributes), size)
    _call(f"{path} cannot be made read-only", _libc.syscall, *arguments)


def _exec_program(job: dict[str, Any], is_root: bool) -> NoReturn:
    """Become the program: no user, no capability, limits, no descriptor but the standard ones."""
    limits = {
        resource.RLIMIT_AS: job["memory_bytes"],
        resource.RLIMIT_CPU: job["cpu_s"],
        resource.RLIMIT_NPROC: job["processes"],
        resource.RLIMIT_NOFILE: job["open_files"],
        resource.RLIMIT_FSIZE: job["disk_bytes"],
        resource.RLIMIT_CORE: 0,
    }
    os.chdir(_WORK)
    if is_root:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    _call("no_new_privs", _libc.prctl, _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    for kind, limit in limits.items():
        resource.setrlimit(kind, (limit, limit))
    for number in range(1, signal.NSIG):
        with suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    environment = {"PATH": "/usr/bin:/bin", "HOME": _WORK, "TMPDIR": _WORK, "LANG": "C.UTF-8"}
    os.execve(job["command"][0], job["command"], environment)


def _close_all() -> None:
    """Close all descriptors up to `main`'s limit, the standard ones too: the program's pipes end with the program.

    Not by /proc, which the first process has perhaps replaced already by one in which this process is not.
    """
    os.closerange(0, os.sysconf("SC_OPEN_MAX"))


def _wait_for(child: int) -> int:
    """Return the exit code of a child, as a shell has it, and reap all others until then."""
    while True:
        pid, status = os.wait()
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def _run_first(job: dict[str, Any], is_root: bool, status: int) -> NoReturn:
    """Be the first process of the process namespace: build the root, start the program, end with it."""
    _die_with_parent(0)  # whose pid is of another namespace
    try:
        _build_root(job)
        program = os.fork()
        if not program:
            _exec_program(job, is_root)
    except BaseException as error:
        _fail(status, error)
    _close_all()
    os._exit(_wait_for(program))


def _run_in_namespaces(job: dict[str, Any], status: int, outside: int, ready: int, mapped: int) -> NoReturn:
    """Make the namespaces, wait until users are mapped, and start their first process; end as it does."""
    try:
        _die_with_parent(outside)
        unshare()
        _die_with_parent(outside)  # changed credentials have undone it
        os.write(ready, b"\0")
        users = os.read(mapped, 1)
        if not users:
            os._exit(FAILED)
        first = os.fork()
    except BaseException as error:
        _fail(status, error)
    if not first:
        _run_first(job, users == _TWO_USERS, status)
    _close_all()
    os._exit(_wait_for(first))


def _map_users(pid: int) -> bytes:
    """Give the process's user namespace its users: root, for the mounts, and nobody; or nobody for the one there is.

    Returns:
        `_TWO_USERS` or `_ONE_USER`.

    Raises:
        OSError: neither is allowed.
    """
    users = {"uid_map": os.geteuid(), "gid_map": os.getegid()}
    if os.geteuid() == 0:
        with suppress(OSError):  # in a container whose root has no other users
            for name in users:
                _write(f"/proc/{pid}/{name}", f"0 0 1\n{NOBODY} {NOBODY} 1\n")
            return _TWO_USERS
    _write(f"/proc/{pid}/setgroups", "deny")
    for name, outside in users.items():
        _write(f"/proc/{pid}/{name}", f"{NOBODY} {outside} 1\n")
    return _ONE_USER


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _fail(status: int, error: BaseException) -> NoReturn:
    with suppress(OSError):
        os.write(status, str(getattr(error, "strerror", "") or f"{type(error).__name__}: {error}").encode()[:500])
    os._exit(FAILED)


def main() -> NoReturn:
    """Run the job, and exit as its program does."""
    job_file, status = map(int, sys.argv[1:3])
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # Containers allow 2^30, and a Python that was built with an old libc closes a range one by one.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = max(job_file, status) + _MORE_DESCRIPTORS
    if soft == resource.RLIM_INFINITY or soft > limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    with os.fdopen(job_file, encoding="utf-8") as file:
        job = json.load(file)
    outside = os.getpid()
    os.set_inheritable(status, False)
    is_ready, ready = os.pipe()
    is_mapped, mapped = os.pipe()
    child = os.fork()
    if not child:
        os.close(is_ready)
        os.close(mapped)
        _run_in_namespaces(job, status, outside, ready, is_mapped)
    os.close(ready)
    os.close(is_mapped)
    if os.read(is_ready, 1):
        try:
            os.write(mapped, _map_users(child))
        except OSError as error:
            _fail(status, OSError(error.errno, f"users cannot be mapped: {error.strerror}"))
    os.close(mapped)
    _close_all()
    os._exit(_wait_for(child))


if __name__ == "__main__":
    main()
