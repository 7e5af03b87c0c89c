# Shared by the batch scripts of this folder: finds the code, reads the site file, and starts a supervised training. The
# script that sources it sets `home`, the checkout.
# Nothing here has to be edited: a cluster's own values go into a site file, see site.example.sh.

fail() { echo "error: $*" >&2; exit 2; }

# From the batch script's first line on, a signal that comes too early is kept for the supervisor.
megagamma_signalled=${megagamma_signalled:-}
trap 'megagamma_signalled=--preempted' USR1

find_home() {    # sbatch runs a copy of the script, so that its own folder says nothing
  local place
  for place in "${MEGAGAMMA_HOME:-}" "${SLURM_SUBMIT_DIR:-}" "$1"; do
    [ -n "$place" ] && [ -f "$place/megagamma/pretrain.py" ] && { (cd "$place" && pwd -P); return; }
  done
  fail "no megagamma/pretrain.py in ${SLURM_SUBMIT_DIR:-$1}: submit from the checkout's folder, or set MEGAGAMMA_HOME to it"
}

read_site() {
  local file=${MEGAGAMMA_SITE:-}
  if [ -n "$file" ]; then
    [ -f "$file" ] || fail "MEGAGAMMA_SITE=$file: there is no such file: copy launch/site.example.sh there"
  else
    file=${XDG_CONFIG_HOME:-$HOME/.config}/megagamma/site.sh
    [ -f "$file" ] || file=
  fi
  if [ -n "$file" ]; then
    bash -n "$file" || fail "$file: the site file is no valid bash: fix the line above"
    . "$file"
  fi
  python=${MEGAGAMMA_PYTHON:-}
  [ -n "$python" ] || { python=$home/.venv/bin/python; [ -x "$python" ] || python=python3; }
  # Outside of a container, where srun is: its Python needs no torch.
  host_python=${MEGAGAMMA_HOST_PYTHON:-}
  [ -n "$host_python" ] || { host_python=$python; [ -z "${MEGAGAMMA_CONTAINER:-}" ] || host_python=python3; }
  if [ -n "$file" ]; then PYTHONPATH=$home "$host_python" -m megagamma.launching.site "$file" || exit 2; fi
}

take_snapshot() {    # the first start of a job takes it; a requeue finds it again, whatever was edited since
  [ -n "${MEGAGAMMA_CODE:-}" ] && { code=$MEGAGAMMA_CODE; return; }
  code=$home
  [ -n "${SLURM_JOB_ID:-}" ] && [ -z "${MEGAGAMMA_DRY_RUN:-}" ] || return 0
  local root=${MEGAGAMMA_CODE_ROOT:-$home/runs/.code}
  local link=$root/job-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}
  # Numbers begin anew where a controller is set up again: a first start takes no link of another job. (Tasks of an array do.)
  [ "${SLURM_RESTART_COUNT:-0}" != 0 ] || [ -n "${SLURM_ARRAY_JOB_ID:-}" ] || rm -f "$link"
  if [ ! -e "$link" ]; then
    code=$(PYTHONPATH=$home "$host_python" -m megagamma.launching.snapshot "$home" "$root") || exit 2
    ln -s "$(basename "$code")" "$link" 2>/dev/null
  fi
  code=$(readlink -f "$link")
}

keep_configs() {    # the same for the configs that the options name: sets `options`
  options=("$@")
  [ -n "${SLURM_JOB_ID:-}" ] && [ -z "${MEGAGAMMA_DRY_RUN:-}" ] || return 0
  local folder=${MEGAGAMMA_CODE_ROOT:-$home/runs/.code}/configs-$SLURM_JOB_ID i name file copy
  for ((i = 0; i < $#; i++)); do
    case ${options[i]} in
      --config=* | --deepspeed_config=*) name=${options[i]%%=*}= file=${options[i]#*=} ;;
      --config | --deepspeed_config) i=$((i + 1)) name='' file=${options[i]:-} ;;
      *) continue ;;
    esac
    copy=$folder/$i-${file##*/}
    if [ ! -f "$copy" ] || [ "${SLURM_RESTART_COUNT:-0}" = 0 ]; then
      [ -f "$file" ] || continue    # pretrain.py says what is wrong with it
      { mkdir -p "$folder" && cp "$file" "$copy.new" && mv "$copy.new" "$copy"; } || fail "$copy: cannot be written"
    fi
    options[i]=$name$copy
  done
}

# train OPTIONS...: replaces this shell by the supervisor of a training with these options.
train() {
  local nodes=${SLURM_JOB_NUM_NODES:-${SLURM_NNODES:-1}}
  local tasks=${MEGAGAMMA_TASKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-${SLURM_NTASKS_PER_NODE:-1}}}
  # A point of a sweep has the ranks that its sweep says, whatever the site says of other jobs.
  tasks=${MEGAGAMMA_POINT_TASKS:-$tasks}
  tasks=${tasks%%(*}
  [ "$nodes" = "${MEGAGAMMA_POINT_NODES:-$nodes}" ] ||
    fail "the job has $nodes nodes, and its point is for $MEGAGAMMA_POINT_NODES: leave --nodes to the sweep's launch.nodes"
  local cpus=$((${SLURM_CPUS_ON_NODE:-1} / tasks))
  local share="--cpus-per-task=$cpus"
  [ "$cpus" -ge 1 ] || share=--overcommit
  # All of it in the environment: libraries read it, and a step has it on every node.
  export MASTER_ADDR=${MASTER_ADDR:-localhost} MASTER_PORT=$((20000 + ${SLURM_JOB_ID:-0} % 10000))
  if [ -n "${SLURM_JOB_NODELIST:-}" ]; then
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    [ -n "$MASTER_ADDR" ] || fail "SLURM_JOB_NODELIST=$SLURM_JOB_NODELIST: scontrol does not list its hosts"
  fi
  export PYTHONPATH=$code${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
  # The sizes that sbatch was given are those of the job, not of the step.
  unset SLURM_NTASKS SLURM_NPROCS SLURM_NTASKS_PER_NODE SLURM_CPUS_PER_TASK SLURM_TASKS_PER_NODE
  # A first rank that ends must not be what decides the exit code: the others get a minute to end by themselves.
  # And --export, since a job that was submitted with less would hand nothing on to its steps.
  local step=(srun "--nodes=$nodes" --kill-on-bad-exit=0 --wait=60 --mpi=none --export=ALL ${MEGAGAMMA_SRUN:-})
  local container=(${MEGAGAMMA_CONTAINER:-}) command
  case ${MEGAGAMMA_LAUNCHER:-srun} in
    srun)
      command=("${step[@]}" "--ntasks=$((nodes * tasks))" "--ntasks-per-node=$tasks" "$share" '--output={logs}/rank-%t.log'
        "${container[@]}" "$python" "$code/megagamma/pretrain.py" --checkpoint.on_damage previous "$@") ;;
    deepspeed)
      # One launcher per node. Signals come to all processes of a step: the launchers ignore what is meant for the ranks.
      local hosts=${MEGAGAMMA_CODE_ROOT:-$home/runs/.code}/hosts-${SLURM_JOB_ID:-0}
      if [ -n "${SLURM_JOB_NODELIST:-}" ] && [ -z "${MEGAGAMMA_DRY_RUN:-}" ]; then
        mkdir -p "${hosts%/*}" && scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/\$/ slots=$tasks/" >"$hosts" ||
          fail "$hosts: cannot be written"
      fi
      command=("${step[@]}" "--ntasks=$nodes" --ntasks-per-node=1 "--cpus-per-task=${SLURM_CPUS_ON_NODE:-1}"
        '--output={logs}/node-%t.log' "${container[@]}" bash "$code/launch/deepspeed_node.sh" "$python"
        "$hosts" "$MASTER_ADDR" "$MASTER_PORT" "$code/megagamma/pretrain.py" --checkpoint.on_damage previous "$@") ;;
    *) fail "MEGAGAMMA_LAUNCHER=$MEGAGAMMA_LAUNCHER: use srun or deepspeed" ;;
  esac
  local supervise=("$host_python" -m megagamma.commands supervise ${MEGAGAMMA_SUPERVISE:-})
  if [ -n "${MEGAGAMMA_DRY_RUN:-}" ]; then
    printf '%q ' "${supervise[@]}" -- "${command[@]}"; echo
    exit 0
  fi
  if [ -n "${MEGAGAMMA_DOCTOR:-}" ]; then
    # A sick node costs a minute here, and hours later.
    "${step[@]}" "--ntasks=$((nodes * tasks))" "--ntasks-per-node=$tasks" "$share" "${container[@]}" \
      "$python" "$code/tools/doctor.py" ${MEGAGAMMA_DOCTOR#1} "$@" || fail "tools/doctor.py found what must be fixed, see above"
  fi
  echo "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, start ${SLURM_RESTART_COUNT:-0}; rendezvous $MASTER_ADDR:$MASTER_PORT; code $code"
  trap '' USR1    # until the supervisor listens; one that came before is handed over
  exec "${supervise[@]}" $megagamma_signalled -- "${command[@]}"
}

command -v scontrol >/dev/null || [ -n "${MEGAGAMMA_DRY_RUN:-}" ] ||
  fail "SLURM is not installed here: MEGAGAMMA_DRY_RUN=1 bash ${BASH_SOURCE[1]:-SCRIPT} ... shows what it would run"
[ -n "${SLURM_JOB_ID:-}" ] || [ -n "${MEGAGAMMA_DRY_RUN:-}" ] || fail "start it with sbatch, or with MEGAGAMMA_DRY_RUN=1 to look"
home=$(find_home "$home") || exit 2
read_site
