# What this cluster wants to be told. Copy to ~/.config/megagamma/site.sh (or name it in MEGAGAMMA_SITE), and keep the lines
# that you need. The scripts of launch/ source it on the first node of a job, tools/sweep.py submit on the login node.

# Jobs that tools/sweep.py submits. sbatch itself knows SBATCH_PARTITION and SBATCH_ACCOUNT, or its flags.
# export MEGAGAMMA_PARTITION=gpu
# export MEGAGAMMA_ACCOUNT=my_project
# export MEGAGAMMA_QOS=normal
# export MEGAGAMMA_SBATCH="--gpus-per-node=8 --exclusive"
# And for collection and evaluation, which take of those only where they may run and who pays.
# export MEGAGAMMA_FOLLOW_SBATCH="--partition=cpu --time=120"

# How long before its end a job is told to save. Unit: seconds. It must be longer than a step and a save together; SLURM
# may be half a minute early. (With sbatch launch/pretrain.sbatch: --signal=B:USR1@300, which is the default.)
# export MEGAGAMMA_SIGNAL_SECONDS=300

# Python, modules, container. Words of MEGAGAMMA_CONTAINER come before the command, on every node.
# module load cuda/12.4
# export MEGAGAMMA_PYTHON=$HOME/megagamma/.venv/bin/python
# The supervisor runs outside of the container, with MEGAGAMMA_HOST_PYTHON (python3): it needs no torch.
# export MEGAGAMMA_CONTAINER="apptainer exec --nv --bind /scratch /images/megagamma.sif"

# One process per GPU of the job's nodes, unless this says another number. The points of a sweep have their own.
# export MEGAGAMMA_TASKS_PER_NODE=8
# srun: one task per process. deepspeed: one deepspeed launcher per node.
# export MEGAGAMMA_LAUNCHER=srun
# export MEGAGAMMA_SRUN="--cpu-bind=none"
# export MEGAGAMMA_SUPERVISE="--hang_minutes 30"

# The network of the ranks.
# export NCCL_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5_0,mlx5_1
# export GLOO_SOCKET_IFNAME=ib0

# Examine the nodes before each start (tools/doctor.py); 1, or further options of it.
# export MEGAGAMMA_DOCTOR="--mib 256"

# A folder that tools/fetch_benchmarks.py filled, where nodes have no network.
# export MEGAGAMMA_MIRROR=/scratch/benchmarks
