#!/bin/bash
# Trains under SLURM until the run is finished: before the time is over it makes a checkpoint and queues again.
#   sbatch cloud/slurm.sh --config recipes/gpu_24gb.yaml --train_data_dir PICTURES --output_dir runs/mine
# Two nodes of eight GPUs (a task is one GPU's process):
#   sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 cloud/slurm.sh ...
# Submit it from the project's folder, which all nodes must see; PYTHON=... names another Python than .venv's.
#SBATCH --job-name=lora
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=lora-%j.log

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))

# SLURM starts the processes itself: torchrun would turn the exit code 75 into 1, and kills what takes 30 seconds to stop.
# One that ends first must not end the others (SLURM's KillOnBadExit), which may still be writing.
# shellcheck disable=SC2016  # the variables are those of each task
srun --kill-on-bad-exit=0 bash -c '
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
  export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))
  exec "$@"' process "${PYTHON:-.venv/bin/python}" train_text_to_image_lora.py "$@" &
processes=$!

# B: above sends the signal to this shell alone, and srun hands it to every process. The trap interrupts `wait`.
trap 'interrupted=yes; kill -USR1 "$processes"' USR1
interrupted=yes
while [ "$interrupted" = yes ]; do
  interrupted=no
  wait "$processes"
  code=$?
done

# 75: stopped at a checkpoint. 138: the signal came before Python could catch it.
if [ "$code" -eq 75 ] || [ "$code" -eq 138 ]; then
  echo "Not finished: job $SLURM_JOB_ID goes back into the queue."
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
