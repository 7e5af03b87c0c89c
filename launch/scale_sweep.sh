#!/bin/bash
#SBATCH --job-name=scale_sweep
#SBATCH --output=%x-%j.out
#SBATCH --nodes=1 --ntasks=1 --time=30
# A whole study: plans the sweep, submits its points, and chains collection behind them.
#     sbatch launch/scale_sweep.sh                                     # configs/sweeps/scale.yaml
#     sbatch launch/scale_sweep.sh configs/sweeps/masks.yaml --throttle 4 --evaluate "--tasks reasoning"
#     bash launch/scale_sweep.sh --dry_run                             # prints every script, also where no SLURM is
# Give it again at any time: finished points are skipped, running ones left alone. This first job takes its partition and
# account from sbatch's flags or SBATCH_*, since it starts before a site file is read, and hands them on.
# Where a site forbids sbatch inside jobs: tools/sweep.py submit from a login node.
case " $* " in *" --dry_run "*) export MEGAGAMMA_DRY_RUN=1 ;; esac
home=${MEGAGAMMA_HOME:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")/.." && pwd)}}
[ -f "$home/launch/common.sh" ] || { echo "error: no launch/common.sh in $home: submit from the checkout's folder, or set MEGAGAMMA_HOME to it" >&2; exit 2; }
. "$home/launch/common.sh"
sweep=configs/sweeps/scale.yaml
case ${1:-} in *.yaml | *.yml) sweep=$1; shift ;; esac
[ -f "$sweep" ] || sweep=$home/$sweep
export PYTHONPATH=$home${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
# Outside of a container, where sbatch is; submitting needs no torch. The plan is for the log.
exec "$host_python" -m megagamma.commands sweep submit "$sweep" --plan ${MEGAGAMMA_DRY_RUN:+--dry_run} "$@"
