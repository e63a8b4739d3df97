#!/usr/bin/env bash
# One task a GPU host; the tasks find each other through Slurm's variables. Submit with
#   sbatch tools/launch/slurm.sh configs/pretrain_1b.py --data.prepared /data/main --run /data/runs/1b
#SBATCH --job-name=llm-jax
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
# 120 s before the end of the time every task gets SIGTERM: the step is finished and saved, and the job ends as
# failed (143); a next one with --dependency=afternotok goes on
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
# from Slurm 22.05 on srun does not take it over from sbatch, and would give a task one core
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

# names what differs between the hosts before anything is spent
srun llm-jax doctor "$@"
# one lost task ends the step on all hosts within 20 s; then all of them start again from the checkpoint
srun --kill-on-bad-exit=0 llm-jax supervise -- llm-jax pretrain "$@"
