#!/usr/bin/env bash
# One verb in many processes, on this machine or on many.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: launch/torchrun.sh [OPTION VALUE …] VERB [group.key=value …]

Runs `megatron-bai VERB` under torchrun. On many nodes, run the same line on each of them.

  --processes N   per node (default: one a GPU, or one a core where there is none)
  --nodes N       machines that take part (default 1)
  --head HOST     where they meet, HOST or HOST:PORT (port 29500): one of them, the same on all
  --node-rank R   this node's number, 0 on HEAD: static rendezvous. Without it the nodes agree among themselves (c10d)
  --id NAME       of the meeting, for several on one head (default: megatron-bai)
  --restarts N    start all processes again, at most N times, when one is lost (default 0)
  --grace S       seconds that a run has after SIGTERM to end its step and save (trainer.grace_s; default 20)
  --logs DIR      every rank's output, a file each, below DIR (default: logs in run.dir); rank 0's is shown as well

The environment is MEGATRON_BAI_VENV, if that is set, else the checkout's .venv, else the one that is active.

e.g. launch/torchrun.sh --processes 2 train experiment=demo
     launch/torchrun.sh --nodes 2 --head 10.0.0.1 --processes 8 --restarts 3 train experiment=demo run.dir=/shared/demo
TEXT
}

fail() {
    echo "torchrun.sh: error: $*" >&2
    exit 2
}

number() { # NAME VALUE LEAST
    case $2 in '' | *[!0-9]*) fail "$1 is '$2': give a whole number" ;; esac
    [ "$2" -ge "$3" ] || fail "$1 is $2: it must be at least $3"
}

processes=auto nodes=1 head='' node_rank='' id=megatron-bai restarts=0 grace=20 logs=''
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage && exit ;;
        --processes | --nodes | --head | --node-rank | --id | --restarts | --grace | --logs)
            [ $# -gt 1 ] || fail "$1 needs a value"
            name=${1#--}
            printf -v "${name//-/_}" %s "$2"
            shift 2
            ;;
        -*) fail "there is no option $1: see launch/torchrun.sh --help" ;;
        *) break ;;
    esac
done
[ $# -gt 0 ] || fail "say which verb to run: see launch/torchrun.sh --help"
[ "$processes" = auto ] || number --processes "$processes" 1
number --nodes "$nodes" 1
number --restarts "$restarts" 0
number --grace "$grace" 0

# Of the environment that is named, of the checkout, of the one that the package is installed in, or of the active one.
here=$(cd "$(dirname "$0")" && pwd) bin=''
if [ -n "${MEGATRON_BAI_VENV:-}" ]; then
    bin=$MEGATRON_BAI_VENV/bin
    [ -x "$bin/megatron-bai" ] || fail "MEGATRON_BAI_VENV is $MEGATRON_BAI_VENV, and there is no bin/megatron-bai in it"
fi
for each in "$here/../.venv/bin/megatron-bai" "${here%/lib*/python*/*}/bin/megatron-bai" "$(command -v megatron-bai)"; do
    [ -n "$bin" ] || [ ! -x "$each" ] || bin=$(dirname "$each")
done
[ -n "$bin" ] || fail "no megatron-bai here: run \`make install\` in a checkout, or activate the environment that has it"

# The head's address and this machine's on the way there: torch would announce host names, which may mean loopback.
route='
import socket, sys
found = socket.getaddrinfo(sys.argv[1], 9, type=socket.SOCK_DGRAM)[0]
probe = socket.socket(found[0], socket.SOCK_DGRAM)
probe.connect(found[4])
print(found[4][0], probe.getsockname()[0])'

if [ "$nodes" -eq 1 ]; then
    [ -z "$head$node_rank" ] || fail "--head and --node-rank are for many nodes: give --nodes, too"
    meeting=(--standalone)
else
    [ -n "$head" ] || fail "$nodes nodes need a place to meet: give --head HOST"
    case $head in *:*) port=${head##*:} head=${head%:*} ;; *) port=29500 ;; esac
    number "the port of --head" "$port" 1
    found=$("$bin/python" -c "$route" "$head" 2>/dev/null) || fail "no way from $(hostname) to --head $head"
    read -r there here <<<"$found"
    if [ "${here#127.}" != "$here" ] && [ "$head" = "$(hostname)" ]; then # Debian gives a machine's own name to loopback
        here=$(hostname -I) here=${here%% *} there=$here
    fi
    case $here in 127.* | ::1 | '') fail "--head $head means this machine alone on $(hostname): give its address" ;; esac
    if [ -n "$node_rank" ]; then
        number --node-rank "$node_rank" 0
        [ "$node_rank" -lt "$nodes" ] || fail "--node-rank is $node_rank: with --nodes $nodes it is 0 to $((nodes - 1))"
        [ "$restarts" -eq 0 ] || fail "--restarts needs nodes that agree among themselves: leave out --node-rank"
        meeting=(--master-addr "$there" --master-port "$port" --node-rank "$node_rank")
    else
        is_host=0
        [ "$here" != "$there" ] || is_host=1
        # A network that is cut is waited for as long as a node that is late, 10 minutes, and not the store's 60 s.
        meeting=(--rdzv-backend c10d --rdzv-endpoint "$there:$port" --rdzv-conf "is_host=$is_host,read_timeout=600")
    fi
    meeting+=(--nnodes "$nodes" --rdzv-id "$id" --local-addr "$here")
fi

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # what torchrun would choose, with a warning
export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE="[\${rank}] "
# In the store that torchrun would share with its ranks, those started again find addresses of the former (pytorch#135712).
[ "$restarts" -eq 0 ] || export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# Ranks take SIGUSR1 as a wish for a checkpoint. torchrun, which would die of it, is born deaf to it.
trap '' USR1
# What rank 0 says is shown at once: into a file, as Slurm's, torchrun would write 8 KiB at a time, some sixty steps.
export PYTHONUNBUFFERED=1
# The verbs that do not train refuse settings that they never read.
settings=()
[ "$1" != train ] || settings=("trainer.grace_s=$grace")
options=() # without --log-dir the files are in run.dir, which the settings say
[ -z "$logs" ] || options=(--log-dir "$logs/$(hostname)")
# torchrun waits a little longer than the ranks do before it kills.
exec "$bin/megatron-bai" torchrun "${meeting[@]}" --nproc-per-node "$processes" --max-restarts "$restarts" \
    --shutdown-timeout $((grace + 10)) "${options[@]}" --redirects 3 --tee 0:3 \
    "$@" ${settings[@]+"${settings[@]}"}
