# What one cluster needs, in one file: copy it to launch/site.sh (git ignores that) or elsewhere, and change it. Source
# it in the shell that submits, where sbatch takes the SBATCH_… variables; the job scripts source it again on the first
# node, and what it exports reaches every process of the job:
#
#     . launch/site.sh && sbatch --nodes 4 launch/slurm/torchrun.sbatch train experiment=demo …
#
# Delete what you do not need: a line that is not here is Slurm's, NCCL's or this library's default. Options of sbatch
# overrule the variables. A run without Slurm may source it before launch/torchrun.sh, too.
export MEGATRON_BAI_SITE # where the job scripts find this file; without it launch/site.sh
MEGATRON_BAI_SITE=$(realpath "${BASH_SOURCE[0]:-$0}")

# The job: `man sbatch`, "input environment variables", has all of them.
export SBATCH_ACCOUNT=my-project
export SBATCH_PARTITION=gpu
export SBATCH_GRES=gpu:8    # of each node; torchrun.sh starts a rank on each
export SBATCH_EXCLUSIVE=exclusive    # all CPUs of each node: without it one, or as many as --cpus-per-task says
export SBATCH_TIMELIMIT=24:00:00
# export SBATCH_QOS=normal SBATCH_CONSTRAINT=h100 SBATCH_RESERVATION=mine

# The software: modules, and an environment elsewhere than in the checkout's .venv.
# module purge && module load cuda/13.0
# export MEGATRON_BAI_VENV=/shared/environments/megatron-bai

# Or an image, where Slurm has pyxis: a file made by `enroot import`, or a name in a registry (docs/install.md). The
# directory that the job starts in is mounted at its own path; name others, such as those of models and data.
# export MEGATRON_BAI_IMAGE=/shared/images/megatron-bai.sqsh
# export MEGATRON_BAI_MOUNTS=/shared/models:/shared/models,/scratch:/scratch
# export MEGATRON_BAI_LAUNCH=/opt/megatron_bai/launch    # in the image; without it this directory, mounted
# export MEGATRON_BAI_VENV=/opt/venv                     # in the image, as its Dockerfile has it

# The network. Runs on several machines choose the interface of the address by which the first machine is reached, for
# gloo and NCCL; name another here ("=" for this name alone, and not all that begin with it).
# export GLOO_SOCKET_IFNAME=bond0 NCCL_SOCKET_IFNAME==bond0
# export NCCL_IB_HCA==mlx5_0,mlx5_1,mlx5_4,mlx5_5        # adapters for InfiniBand or RoCE, not those of storage
# export NCCL_IB_GID_INDEX=3                             # RoCE v2
# export NCCL_IB_DISABLE=1                               # no InfiniBand: sockets
# export NCCL_DEBUG=INFO                                 # says which interfaces and adapters were chosen
