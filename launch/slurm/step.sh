# Sourced by the job scripts, which have set `script` (their name), `launch` (the directory above) and `words` (what the
# job was given). It reads the site's file, takes --container-image and --container-mounts out of `words`, and leaves
# the options of srun in `srun_options`, and in `image` what the step runs in; empty: no container.
site=${MEGATRON_BAI_SITE:-$launch/site.sh}
if [ -f "$site" ]; then
    set +eu # modules and the like are not written for it
    # shellcheck source=/dev/null
    . "$site"
    set -eu
elif [ -n "${MEGATRON_BAI_SITE:-}" ]; then
    echo "$script: error: MEGATRON_BAI_SITE is $site, and there is no such file on $(hostname)" >&2
    exit 2
fi

# Options come before the verb, and each has a value. A job's own overrule the site's.
image=${MEGATRON_BAI_IMAGE:-} mounts=${MEGATRON_BAI_MOUNTS:-} given=(${words[@]+"${words[@]}"}) words=()
while [ ${#given[@]} -gt 0 ]; do
    case ${given[0]} in
        --container-image | --container-mounts)
            [ ${#given[@]} -gt 1 ] || { echo "$script: error: ${given[0]} needs a value" >&2 && exit 2; }
            printf -v "${given[0]#--container-}" %s "${given[1]}"
            ;;
        --*) words+=("${given[@]:0:2}") ;;
        *) break ;;
    esac
    given=("${given[@]:2}")
done
words+=(${given[@]+"${given[@]}"})
if [ -z "$image" ] && [ -n "$mounts" ]; then
    echo "$script: error: mounts ($mounts) are of a container: give --container-image, or MEGATRON_BAI_IMAGE" >&2
    exit 2
fi

# All ranks of a node share its one task, which some sites would bind to a single core (TaskPluginParam=autobind).
srun_options=(--cpu-bind=none)
# The job's directory and these scripts have the same paths inside. The options are pyxis'.
[ -z "$image" ] || srun_options+=(
    --container-image="$image" --container-workdir="$PWD"
    --container-mounts="$PWD:$PWD,$launch:$launch${mounts:+,$mounts}"
)
